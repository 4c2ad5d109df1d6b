"""The published numbers: `paper_numbers.yaml`, read and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..errors import InputError, did_you_mean, refuse_unknown
from ..metrics import METRICS

__all__ = ["PAPER_NUMBERS", "Mean", "Model", "Number", "Published", "Table", "read_numbers"]

PAPER_NUMBERS = Path(__file__).parent / "paper_numbers.yaml"
OTHER_METRICS = ("task/", "end_task/", "general/", "minutes/")


@dataclass(frozen=True)
class Model:
    id: str
    title: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Mean:
    """A column that is no stream of ours: a mean over streams, or other data, where `of` is empty."""

    id: str
    title: str
    of: tuple[str, ...]


@dataclass(frozen=True)
class Number:
    """What a table says of one method on one stream.

    Attributes:
        stream: the column: a stream, a mean over streams, or other data.
        values: metric -> percent; empty if the number was not found.
        recipes: stream -> recipe, of a mean each of its streams; empty if the package has none.
        reduced: results of a smaller model or fewer rows, `group/variant`, that are shown beside it.
    """

    method: str
    stream: str
    values: dict[str, float]
    recipes: dict[str, str]
    variants: tuple[str, ...]
    reduced: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    paper: str
    source: str
    title: str
    model: Model
    metrics: tuple[str, ...]
    columns: tuple[str, ...]
    numbers: tuple[Number, ...]
    secondary: bool
    note: str

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(number.method for number in self.numbers))

    def row(self, method: str) -> list[Number]:
        return [number for number in self.numbers if number.method == method]


@dataclass(frozen=True)
class Published:
    models: dict[str, Model]
    means: dict[str, Mean]
    tables: tuple[Table, ...]

    def model_title(self, name: str) -> str:
        """How papers call the model of a recipe."""
        return next((model.title for model in self.models.values() if name in model.names), name)

    def stream_title(self, stream: str) -> str:
        return self.means[stream].title if stream in self.means else stream


def read_numbers(path: str | Path | None = None) -> Published:
    """The published numbers of a file; default: the package's.

    Raises:
        InputError: naming the table and the row that cannot be understood.
    """
    path = PAPER_NUMBERS if path is None else Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"--paper_numbers {path}: cannot be read ({' '.join(str(error).split())})") from error
    try:
        return _published(path, content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        reason = f"no key '{error.args[0]}'" if isinstance(error, KeyError) else str(error)
        raise InputError(f"--paper_numbers {path}: cannot be understood ({reason})") from error


def _published(path: Path, content: Any) -> Published:
    if not isinstance(content, dict):
        raise InputError(f"--paper_numbers {path}: must map papers, models, other_columns and tables")
    refuse_unknown(content, ("papers", "models", "other_columns", "tables"), f"{path}: ")
    models = {id: Model(id, spec["title"], tuple(spec["names"])) for id, spec in content["models"].items()}
    others = content.get("other_columns") or {}
    means = {id: Mean(id, spec["title"], tuple(spec.get("of") or ())) for id, spec in others.items()}
    tables = tuple(_table(path, spec, content["papers"], models, means) for spec in content["tables"])
    return Published(models, means, tables)


def _table(
    path: Path, spec: Mapping[str, Any], papers: Mapping[str, Any], models: dict[str, Model], means: dict[str, Mean]
) -> Table:
    where = f"{path}, {spec['paper']} {spec['table']}"
    keys = ("paper", "table", "model", "metrics", "columns", "recipe", "secondary", "note", "rows")
    refuse_unknown(spec, keys, f"{where}: ")
    for kind, id, known in (("paper", spec["paper"], papers), ("model", spec["model"], models)):
        if id not in known:
            raise InputError(f"{where}: unknown {kind} {id}{did_you_mean(id, known)}")
    metrics = tuple(spec["metrics"])
    for metric in metrics:
        if metric not in METRICS and not metric.startswith(OTHER_METRICS):
            raise InputError(f"{where}: unknown metric {metric}{did_you_mean(metric, METRICS)}")
    columns = tuple(spec["columns"])
    numbers = []
    for row in spec["rows"]:
        numbers += _row(f"{where}, {row.get('method')}", row, columns, metrics, spec.get("recipe"), means)
    methods = [row["method"] for row in spec["rows"]]
    for method in methods:
        if methods.count(method) > 1:
            raise InputError(f"{where}: two rows are called {method}")
    paper = papers[spec["paper"]]
    return Table(
        paper=spec["paper"], source=f"{paper['title']} ({paper['id']})", title=str(spec["table"]),
        model=models[spec["model"]], metrics=metrics, columns=columns, numbers=tuple(numbers),
        secondary=bool(spec.get("secondary", False)), note=" ".join(str(spec.get("note") or "").split()),
    )  # fmt: skip


def _row(
    where: str, row: Mapping[str, Any], columns: tuple[str, ...], metrics: tuple[str, ...],
    recipe: str | Mapping[str, str] | None, means: dict[str, Mean],
) -> list[Number]:  # fmt: skip
    refuse_unknown(row, ("method", "variants", "values", "reduced"), f"{where}: ")
    if len(row["values"]) != len(columns):
        raise InputError(f"{where}: {len(row['values'])} values for {len(columns)} columns")
    reduced = row.get("reduced") or {}
    refuse_unknown(reduced, columns, f"{where}, reduced: ")
    numbers = []
    for column, cell in zip(columns, row["values"], strict=True):
        values = cell if isinstance(cell, list) else [cell] * len(metrics) if cell is None else [cell]
        if len(values) != len(metrics):
            raise InputError(f"{where}, {column}: {len(values)} values for the metrics {', '.join(metrics)}")
        for value in values:
            if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
                raise InputError(f"{where}, {column}: {value!r} is no number")
        streams = means[column].of if column in means else (column,)
        variants = tuple(row.get("variants") or ())
        template = recipe.get(column) if isinstance(recipe, Mapping) else recipe
        recipes = {}
        if template and variants:
            for stream in streams:
                base = stream.partition(":")[0]
                recipes[stream] = template.format(stream=base, benchmark=base.partition("-order")[0])
        numbers.append(
            Number(
                method=row["method"],
                stream=column,
                values={m: v for m, v in zip(metrics, values, strict=True) if v is not None},
                recipes=recipes,
                variants=variants,
                reduced=tuple(reduced.get(column) or ()),
            )
        )
    return numbers
