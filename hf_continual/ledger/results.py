"""Result files: what is worth keeping of finished runs, small enough to be committed.

One file a variant of a recipe, `<results>/<group>/<variant>.json`, with the score matrix of each seed in it:

    {"schema": 1, "source": "runs", "group": ..., "variant": ..., "title": ..., "recipe_file": ..., "recipe": {...},
     "changed": {...}, "stream": {...}, "scorers": {task: metric}, "notes": [...],
     "seeds": {"42": {"R": [[...]], "baseline": ..., "commit": ..., "versions": {...}, "hardware": ...,
                      "finished": "2026-01-31", "training_seconds": ...}}}

A file whose `source` names something else holds no matrices, only `summary`: mean and sd of each metric, in percent.
Paths of the machine a run was made on are not kept: `data_dir` becomes DIR.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError, refuse_unknown
from ..metrics import METRICS
from ..run_scores import RunScores, compute, find_runs, load_run
from ..run_state import RunDirectory, read_json, write_text

__all__ = ["Measured", "Result", "add_runs", "read_results"]

SCHEMA = 1
FROM_RUNS = "runs"
NAME = re.compile(r"[\w.+=@-]+")
KEYS = (
    "schema", "source", "group", "variant", "title", "recipe_file", "recipe", "changed", "joint", "independent",
    "stream", "scorers", "sizes", "seeds", "summary", "notes", "detail_only", "hardware", "commit", "versions",
    "same_rows_as",
)  # fmt: skip
PLACES = ("run_dir", "base_dir")
"""Keys of a stored recipe that say where a run was made, not what it was."""


@dataclass(frozen=True)
class Measured:
    """One metric over seeds, in percent or nats; `sd` is the sample standard deviation, `None` for one seed."""

    mean: float
    sd: float | None
    seeds: int
    unit: str = "percent"


@dataclass
class Result:
    """One result file.

    Attributes:
        group: the folder: the recipe's name, unless the runs were added under another.
        data: the file's content.
    """

    path: Path
    group: str
    variant: str
    data: dict[str, Any]
    _runs: dict[int, RunScores] = field(init=False, default_factory=dict, repr=False)

    @property
    def key(self) -> str:
        return f"{self.group}/{self.variant}"

    @property
    def title(self) -> str:
        return str(self.data.get("title") or self.variant)

    @property
    def summary_only(self) -> bool:
        return bool(self.data["source"] != FROM_RUNS)

    @property
    def seeds(self) -> list[int]:
        return sorted(int(seed) for seed in self.data["seeds"])

    @property
    def recipe(self) -> dict[str, Any]:
        return dict(self.data["recipe"])

    @property
    def stream(self) -> dict[str, Any]:
        return dict(self.data["stream"])

    @property
    def joint(self) -> bool:
        return bool(self.data.get("joint", False))

    def of_seeds(self, name: str) -> list[Any]:
        """What the seeds say under `name`, each once; of a summary what the file says."""
        if self.summary_only:
            value = self.data.get(name)
            return value if isinstance(value, list) else [] if value is None else [value]
        values = [self.data["seeds"][str(seed)].get(name) for seed in self.seeds]
        return [value for i, value in enumerate(values) if value is not None and value not in values[:i]]

    def measure(self, metric: str) -> Measured | None:
        """A metric over all seeds; `None` if it cannot be computed, or not for every seed."""
        if self.summary_only:
            found = self.data["summary"].get(metric)
            return found and Measured(float(found["mean"]), found.get("sd"), len(self.seeds))
        values, unit = [], self._run(self.seeds[0]).unit
        for seed in self.seeds:
            value = _value(self._run(seed), metric)
            if value is None:
                return None
            values.append(100 * value if unit == "percent" else value)
        sd = statistics.stdev(values) if len(values) > 1 else None
        return Measured(statistics.fmean(values), sd, len(values), unit)

    def _run(self, seed: int) -> RunScores:
        if seed not in self._runs:
            kept, stream = self.data["seeds"][str(seed)], self.stream
            baseline = kept.get("baseline")
            self._runs[seed] = RunScores(
                path=self.path, variant=self.variant, seed=seed, tasks=stream["tasks"],
                eval_tasks=stream["eval_tasks"], R=np.array(kept["R"], dtype=float),
                baseline=None if baseline is None else np.array(baseline, dtype=float),
                metrics=self.data["scorers"], finished=True, cursor=len(stream["tasks"]), joint=self.joint,
                independent=bool(self.data.get("independent", False)), sizes=self.data["sizes"],
            )  # fmt: skip
        return self._runs[seed]


def _value(run: RunScores, metric: str) -> float | None:
    if metric.startswith("task/"):
        task = metric.removeprefix("task/")
        value = float(run.R[-1, run.eval_tasks.index(task)]) if task in run.eval_tasks else math.nan
        return None if math.isnan(value) else value
    if metric not in METRICS:
        return None
    try:
        return compute(run, METRICS[metric])
    except InputError:  # a score it needs was not evaluated
        return None


# Reading


def read_results(folder: str | Path) -> list[Result]:
    """Every result below `folder`, by group and variant.

    Raises:
        InputError: if there is none, or a file is not one.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"--results {folder}: no such directory; make it with hf-continual ledger add RUN")
    files = sorted(folder.glob("*/*.json"))
    if not files:
        raise InputError(f"--results {folder}: no result file <group>/<variant>.json; make one with ledger add RUN")
    return [read_result(file) for file in files]


def read_result(path: Path) -> Result:
    data = read_json(path)
    try:
        _check(path, data)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        reason = f"no key '{error.args[0]}'" if isinstance(error, KeyError) else str(error)
        raise InputError(f"{path}: is no result file ({reason}); remove it and add its runs again") from error
    return Result(path, data["group"], data["variant"], data)


def _check(path: Path, data: Any) -> None:
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise InputError(f"{path}: is no result file of schema {SCHEMA}; remove it and add its runs again")
    refuse_unknown(data, KEYS, f"{path}: ")
    if (data["group"], data["variant"]) != (path.parent.name, path.stem):
        raise InputError(f"{path}: holds {data['group']}/{data['variant']}; name the file as its entry")
    tasks, evaluated = data["stream"]["tasks"], data["stream"]["eval_tasks"]
    if not isinstance(data["recipe"]["model"]["name"], str):
        raise InputError(f"{path}: its recipe names no model")
    seeds = [int(seed) for seed in data["seeds"]]
    if not seeds:
        raise InputError(f"{path}: has no seed")
    if data["source"] != FROM_RUNS:
        for metric, value in data["summary"].items():
            if metric not in METRICS:
                raise InputError(f"{path}: its summary has a metric that is not known, {metric}")
            float(value["mean"])
            if (value.get("sd") is None) != (len(seeds) == 1):
                raise InputError(f"{path}: {metric} of {len(seeds)} seed(s) must have sd if and only if there are more")
        return
    shape = (len(tasks), len(evaluated))
    for seed, kept in data["seeds"].items():
        found = np.array(kept["R"], dtype=float).shape
        if found != shape:
            raise InputError(f"{path}: R of seed {seed} has the shape {found}, and the tasks make it {shape}")


# Adding


def add_runs(
    paths: Sequence[str | Path],
    results: str | Path,
    group: str | None = None,
    title: str | None = None,
    stream: str | None = None,
    hardware: str | None = None,
    notes: Sequence[str] = (),
    recipe: str | None = None,
    model: str | None = None,
    detail_only: bool = False,
    skip_unfinished: bool = False,
) -> list[str]:
    """Distil runs into result files; returns what was done, a line a file. Nothing is written unless all runs can be.

    Args:
        paths: run directories, or folders of them.
        group: folder of the entries; default: the recipe's name.
        title: of the entry in tables; default: the variant.
        stream: name of the stream, for a recipe that lists its tasks.
        hardware: what the runs were made on.
        recipe: recipe file or name of a recipe of the package; default: the package's recipe of the same name.
        model: hub id of a model that was read from a folder.
        detail_only: keep the entries out of the table of methods and streams.
        skip_unfinished: leave unfinished runs out instead of refusing them.

    Raises:
        InputError: if a run is not finished, or has not the rows, scorers, model or recipe of the entry.
    """
    results = Path(results)
    found = list(dict.fromkeys(run for path in paths for run in find_runs(path)))
    runs, lines = [], []
    for path in found:
        run = load_run(path)
        if run.finished:
            runs.append(run)
        elif skip_unfinished:
            lines.append(f"left out, not finished ({run.progress}): {path}")
        else:
            raise InputError(
                f"{path}: the run is not finished ({run.progress}); finish it, or leave it out with --skip_unfinished"
            )
    if not runs:
        raise InputError(f"ledger add: no finished run in {', '.join(str(path) for path in paths)}")
    brought = _Brought(recipe)
    entries: dict[tuple[str, str], Result] = {}
    before: dict[tuple[str, str], str | None] = {}
    for run in runs:
        data = _distil(run, brought, group, title, stream, hardware, notes, model, detail_only)
        key = (data["group"], data["variant"])
        if key not in entries:
            file = results / key[0] / f"{key[1]}.json"
            before[key] = file.read_text(encoding="utf-8") if file.is_file() else None
            entries[key] = read_result(file) if file.is_file() else Result(file, *key, data={})
        entries[key] = _merge(entries[key], data, run.path)
    if title is not None and len(entries) > 1:
        raise InputError(f"--title {title!r}: the runs make {len(entries)} entries; add them one at a time")
    for key, entry in entries.items():
        text = dump(entry.data)
        seeds = ", ".join(str(seed) for seed in entry.seeds)
        if text == before[key]:
            lines.append(f"unchanged: {entry.path} (seeds {seeds})")
        else:
            write_text(entry.path, text)
            lines.append(f"{'added' if before[key] is None else 'updated'}: {entry.path} (seeds {seeds})")
    return lines


def _gated(queue: Mapping[str, Any]) -> dict[str, Any]:
    """What a forgetting gate changed, which may have been given after the recipe was frozen."""
    return {key: [None, queue[key]] for key in ("gate", "rejected", "rehearsals") if queue.get(key)}


def _distil(
    run: RunScores,
    brought: _Brought,
    group: str | None,
    title: str | None,
    stream: str | None,
    hardware: str | None,
    notes: Sequence[str],
    model: str | None,
    detail_only: bool,
) -> dict[str, Any]:
    """A result file's content with this one run in it."""
    queue = read_json(run.path / "queue.json")
    if run.seed is None or isinstance(run.seed, bool) or not isinstance(run.seed, int):
        raise InputError(f"{run.path}: the run has no seed; the ledger keeps runs by seed")
    for what, tasks, hashes in (
        ("training", run.tasks, run.train_hashes),
        ("evaluation", run.eval_tasks, run.eval_hashes),
    ):
        for task in tasks:
            if task not in hashes:
                raise InputError(f"{run.path}: queue.json has no hash of the {what} rows of {task}; run it again")
    unscored = [task for task in run.eval_tasks if task not in run.metrics]
    if unscored:
        raise InputError(f"{run.path}: {unscored[0]} was not evaluated, so that the run has no result")
    stored = _stored_recipe(run.path)
    group = group or str(stored["name"])
    variant = run.variant or ("run" if run.sequential else run.label)
    for what, name in (("--group", group), ("variant", variant)):
        if not NAME.fullmatch(name):
            raise InputError(f"{what} {name}: cannot name a file; use letters, digits, '.', '_', '+', '=', '@' and '-'")
    recipe = _without_places(stored)
    if model is not None:
        recipe["model"]["name"] = model
    recipe_file, today = brought.find(str(stored["name"]), run.variant)
    named = queue.get("stream") if isinstance(queue.get("stream"), dict) else {}
    tasks = recipe["tasks"]
    sizes = {task: run.sizes[task] for task in run.eval_tasks}
    manifest = run.path / "tasks" / f"{len(run.tasks) - 1:02d}-{run.tasks[-1]}" / "manifest.json"
    written = (manifest if manifest.is_file() else run.path / "scores.jsonl").stat().st_mtime
    return {
        "schema": SCHEMA,
        "source": FROM_RUNS,
        "group": group,
        "variant": variant,
        "title": title,
        "recipe_file": recipe_file,
        "recipe": recipe,
        "changed": {} if today is None else {**_changes(today, recipe), **_gated(queue)},
        "joint": run.joint,
        "independent": run.independent,
        "stream": {
            "name": stream or named.get("name") or (tasks["stream"] if isinstance(tasks, dict) else None),
            "hash": named.get("hash"),
            "tasks": run.tasks,
            "eval_tasks": run.eval_tasks,
            "train_rows": {task["name"]: task.get("rows") for task in queue["tasks"]},
            "train_hashes": run.train_hashes,
            "eval_hashes": run.eval_hashes,
        },
        "scorers": run.metrics,
        "sizes": sizes,
        "seeds": {
            str(run.seed): {
                "R": _numbers(run.R),
                "baseline": None if run.baseline is None else _numbers(run.baseline),
                "commit": queue.get("git"),
                "versions": run.versions,
                "hardware": hardware,
                "finished": datetime.fromtimestamp(written, UTC).date().isoformat(),
                "training_seconds": _training_seconds(run),
            }
        },
        "notes": list(notes),
        "detail_only": detail_only,
    }


def _stored_recipe(run_dir: Path) -> dict[str, Any]:
    stored = RunDirectory(run_dir).read_recipe()
    if stored.get("python"):
        raise InputError(
            f"{run_dir}: the run was started from Python; the ledger keeps runs of recipes, which it can name"
        )
    missing = [key for key in ("name", "model", "training", "methods", "tasks") if key not in stored]
    if missing or not isinstance(stored["model"], dict) or not isinstance(stored["methods"], list):
        raise InputError(
            f"{run_dir / 'recipe.yaml'} is truncated or was edited (it has no {', '.join(missing) or 'model'})"
        )
    return stored


def _without_places(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe without what belongs to one run of it: seed, variant, and where it was."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(k): plain(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        if isinstance(value, str) and value.startswith(("/", "~")):
            return "/".join(["DIR", *Path(value).parts[-2:]])
        return value

    kept = {k: v for k, v in recipe.items() if k not in (*PLACES, "seed", "seeds", "variant", "variants", "name")}
    kept = json.loads(json.dumps(plain(kept), default=str))
    if isinstance(kept["tasks"], dict) and kept["tasks"].get("data_dir") is not None:
        kept["tasks"]["data_dir"] = "DIR"
    return kept


_read: dict[Path, tuple[int, dict[str, Any]]] = {}


def brought_recipe(path: Path) -> dict[str, Any]:
    """A recipe of the package, read once until it changes."""
    from ..recipes import load_recipe

    changed = path.stat().st_mtime_ns
    if path not in _read or _read[path][0] != changed:
        _read[path] = (changed, load_recipe(path))
    return _read[path][1]


class _Brought:
    """The recipes of the package as they are today.

    Args:
        given: the recipe all runs are of; default: for each the one of the same name.
    """

    def __init__(self, given: str | None = None) -> None:
        from ..recipes import find_recipe, recipe_files

        files = recipe_files()
        self.given = given
        self._found: dict[tuple[str, str | None], tuple[str | None, dict[str, Any] | None]] = {}
        self._paths: dict[str, list[tuple[str, Path]]] = {}
        if given is not None:
            path = find_recipe(given)
            known = [key for key, file in files.items() if file.resolve() == path.resolve()]
            self._only = (known[0] if known else path.name, path)
        else:
            for key, file in files.items():
                self._paths.setdefault(str(brought_recipe(file)["name"]), []).append((key, file))

    def find(self, name: str, variant: str | None) -> tuple[str | None, dict[str, Any] | None]:
        """The file's name and the resolved variant; (None, None) if there is no such recipe.

        Raises:
            InputError: if two are called so, or the one given has no such variant.
        """
        if (name, variant) not in self._found:
            self._found[name, variant] = self._find(name, variant)
        return self._found[name, variant]

    def _find(self, name: str, variant: str | None) -> tuple[str | None, dict[str, Any] | None]:
        from ..recipes import expand

        same = [self._only] if self.given is not None else self._paths.get(name, [])
        if len(same) > 1:
            raise InputError(
                f"the recipes {' and '.join(key for key, _ in same)} are both called {name}; choose one with --recipe"
            )
        if not same:
            return None, None
        key, path = same[0]
        runs = expand(brought_recipe(path), path.parent.resolve())
        for run in runs:
            if run.variant == variant:
                return key, _without_places(run.recipe)
        if self.given is not None:
            has = ", ".join(dict.fromkeys(str(run.variant) for run in runs))
            raise InputError(f"--recipe {self.given}: has no variant {variant}; it has {has}")
        return None, None


def _changes(brought: Any, recipe: Any) -> dict[str, list[Any]]:
    """Dotted keys in which a run differs from the package's recipe: [recipe's, run's]."""
    from ..provenance import HARMLESS

    old, new = _flat(_with_defaults(brought)), _flat(_with_defaults(recipe))
    changed = {}
    for key in sorted({*old, *new}):
        before, now = old.get(key), new.get(key)
        # A key that a recipe lacks is as if it were off, such as `independent` of runs that are older than it.
        same = before == now or ((key not in old or key not in new) and not before and not now)
        place = key == "tasks.data_dir" or key.endswith(".path") or (key == "model.name" and _is_place(now))
        if not same and not place and key not in HARMLESS - {"tasks"} and not key.startswith("training.logging"):
            changed[key] = [before, now]
    return changed


def option_defaults() -> dict[str, dict[str, Any]]:
    """Today's defaults of the sections of a recipe that have some of ours."""
    from ..evaluation import EvaluationConfig
    from ..models import ModelConfig
    from ..task_queue import DataConfig

    return {
        "model": _field_defaults(ModelConfig),
        "data": _field_defaults(DataConfig),
        "evaluation": _field_defaults(EvaluationConfig),
    }


def _field_defaults(config: Any) -> dict[str, Any]:
    return {f.name: f.default for f in dataclasses.fields(config) if f.default is not dataclasses.MISSING}


def _with_defaults(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe with today's defaults of the options that it is older than."""
    from ..methods.base import method_class

    filled = {name: {**defaults, **(recipe.get(name) or {})} for name, defaults in option_defaults().items()}
    methods = [{**_field_defaults(method_class(spec["name"]).config_class), **spec} for spec in recipe["methods"]]
    return json.loads(json.dumps({**recipe, **filled, "methods": methods}, default=str))  # type: ignore[no-any-return]


def _is_place(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("DIR/")


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        pairs = ((f"{key}.{k}" if key else str(k), v) for k, v in value.items())
        return {k: v for name, each in pairs for k, v in _flat(each, name).items()}
    if isinstance(value, list) and any(isinstance(v, dict) for v in value):
        return {k: v for i, each in enumerate(value) for k, v in _flat(each, f"{key}.{i}").items()}
    return {key: value}


def _numbers(array: np.ndarray) -> Any:
    return [_numbers(row) for row in array] if array.ndim > 1 else [None if np.isnan(v) else float(v) for v in array]


def _training_seconds(run: RunScores) -> float | None:
    """Wall seconds of the Trainer over all tasks, evaluation not counted; `None` if a log is missing."""
    total = 0.0
    for i, task in enumerate(run.tasks):
        path = run.path / "tasks" / f"{i:02d}-{task}" / "log.json"
        if not path.is_file():
            return None
        found = [row["train_runtime"] for row in read_json(path) if "train_runtime" in row]
        if not found:
            return None
        total += sum(map(float, found))  # a phase after the merge and a rehearsal have one of their own
    return round(total, 1)


def _merge(entry: Result, data: dict[str, Any], run_dir: Path) -> Result:
    """The entry with one more run; the same run again changes nothing."""
    if not entry.data:
        return replace(entry, data=data)
    if entry.summary_only:
        raise InputError(
            f"{entry.path}: holds only a summary ({entry.data['source']}); remove the file to put runs in its place"
        )
    between = f"{run_dir} cannot be added to {entry.path}"
    old_stream, new_stream = entry.data["stream"], data["stream"]
    for what in ("tasks", "eval_tasks"):
        if old_stream[what] != new_stream[what]:
            raise InputError(
                f"{between}: its tasks are {', '.join(new_stream[what])}, not {', '.join(old_stream[what])}; "
                "use another --group"
            )
    for what in ("name", "hash"):
        if None not in (old_stream[what], new_stream[what]) and old_stream[what] != new_stream[what]:
            raise InputError(
                f"{between}: the {what} of its stream is {str(new_stream[what])[:40]}, not "
                f"{str(old_stream[what])[:40]}; use another --group"
            )
    for kind in ("train", "eval"):
        for task, digest in old_stream[f"{kind}_hashes"].items():
            other = new_stream[f"{kind}_hashes"].get(task)
            if other != digest:
                raise InputError(
                    f"{between}: the {'training' if kind == 'train' else 'evaluation'} rows of {task} differ, hash "
                    f"{str(other)[:12]} and {digest[:12]}; use another --group"
                )
    for task, metric in entry.data["scorers"].items():
        if data["scorers"].get(task) != metric:
            raise InputError(
                f"{between}: {task} is scored by {data['scorers'].get(task)} and {metric}; use another --group"
            )
    difference = _changes(entry.data["recipe"], data["recipe"])
    if difference:
        key, (old, new) = next(iter(difference.items()))
        raise InputError(f"{between}: {key} is {new!r}, and {old!r} there; use another --group")
    if entry.data["recipe"]["model"]["name"] != data["recipe"]["model"]["name"]:
        raise InputError(
            f"{between}: its model is {data['recipe']['model']['name']}, not {entry.data['recipe']['model']['name']}; "
            "use another --group"
        )
    merged = json.loads(json.dumps(entry.data))
    for seed, kept in data["seeds"].items():
        known = merged["seeds"].get(seed)
        if known is None:
            merged["seeds"][seed] = kept
            continue
        if known["R"] != kept["R"] or known["baseline"] != kept["baseline"]:
            raise InputError(
                f"{between}: seed {seed} is there with other scores; use another --group, or remove the file to start "
                "it anew"
            )
        if kept["hardware"] is not None:
            known["hardware"] = kept["hardware"]
    if data["title"] is not None:
        merged["title"] = data["title"]
    merged["notes"] += [note for note in data["notes"] if note not in merged["notes"]]
    merged["detail_only"] = merged["detail_only"] or data["detail_only"]
    merged["recipe_file"], merged["changed"] = data["recipe_file"], data["changed"]
    return replace(entry, data=merged)


def dump(value: Any) -> str:
    """JSON with sorted keys, a row of numbers or words on one line."""
    return _dump(value, 0) + "\n"


def _dump(value: Any, depth: int) -> str:
    inner, outer = "\n" + " " * (depth + 1), "\n" + " " * depth
    if isinstance(value, dict) and value:
        pairs = (f"{json.dumps(k, ensure_ascii=False)}: {_dump(value[k], depth + 1)}" for k in sorted(value))
        return "{" + inner + f",{inner}".join(pairs) + outer + "}"
    if isinstance(value, list) and any(isinstance(each, (dict, list)) for each in value):
        return "[" + inner + f",{inner}".join(_dump(each, depth + 1) for each in value) + outer + "]"
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
