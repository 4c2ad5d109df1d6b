"""Reading tasks: local files, benchmark folders and hub datasets, all turned into the same rows.

A canonical dataset has the columns `prompt` (a string, or a list of `{"role", "content"}` messages), `completion`
(the text to learn) and `references` (the texts accepted as right).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import string
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset

from .data_sources import BUILDERS, EVAL_SPLITS, FORMAT_COLUMNS, FORMATS, ROLES, SUFFIXES, Table, read_splits, stem_of
from .errors import InputError, did_you_mean
from .scorers import SCORERS, Scorer
from .scorers import get as get_scorer
from .tasks import KINDS, TEXT_KINDS, EndTask, Task, refuse_twice

TASK_KEYS = (
    "name",
    "path",
    "format",
    "subset",
    "data_files",
    "data_dir",
    "train_split",
    "eval_split",
    "columns",
    "template",
    "train_share",
    "train_rows",
    "eval_rows",
    "eval_fraction",
    "labels",
    "extra_answers",
    "scorer",
    "training",
    "revision",
    "kind",
    "end_task",
)
END_TASK_KEYS = (*(key for key in TASK_KEYS if key != "end_task"), "seeds", "peft")
HASH_ALL_ROWS = 20_000
# What some scorers read of an evaluation row besides prompt and references; `columns` may name where it is.
SCORED_COLUMNS = sorted(
    {
        column
        for scorer in SCORERS.values()
        for column in (*scorer.columns, *scorer.optional)
        if scorer.answers != "tokens"
    }
    - {"prompt"}
)


def load_task(spec: Mapping[str, Any], *, base_dir: str | Path | None = None, seed: int = 42) -> Task:
    """Read the data of one task.

    Args:
        spec: the task's entry in a configuration; its keys are `TASK_KEYS`, those of its `end_task` `END_TASK_KEYS`.
        base_dir: folder that relative local paths start from; the current directory is tried after it.
        seed: chooses the rows of `train_rows`, `eval_rows` and `eval_fraction`.

    An evaluation split is used where there is one (dev, eval, validation or test, in this order); otherwise
    `eval_fraction` of the train rows is held out, as with `eval_split: train`, which is for choosing options without
    looking at the scores that are reported. Where labels are known, a training row answered outside them and
    `extra_answers` is an error. Evaluation rows are kept whatever their answer (of MNLI some have `-`), count as wrong,
    as in O-LoRA's and MIGU's code, and are counted by the scorers and by `answers_outside_labels`. With
    `train_share`, the first training rows of each label go to the evaluation split until so large a part is left, as in
    DAS (`stream_layouts.move_rows`).

    Tasks of the kinds `clm` and `mlm` have a column `text`; of a .txt file each line is a text, or with
    `format: paragraphs` what stands between blank lines, or with `format: document` all of it. A `classification` has
    the columns `text`, perhaps `text_pair`, and `label`.

    Raises:
        InputError: if the spec or the data cannot be used.
    """
    _check_keys(spec)
    if spec.get("end_task") is not None:
        spec = dict(spec)
        end = spec.pop("end_task")
        return dataclasses.replace(
            load_task(spec, base_dir=base_dir, seed=seed),
            end_task=_load_end_task(end, str(spec.get("name") or _default_name(spec)), base_dir, seed),
        )
    spec = {key: value for key, value in spec.items() if value is not None}
    _check_values(spec)
    roots = [Path(base_dir)] if base_dir is not None else []
    roots.append(Path.cwd())
    tuning = spec.get("eval_split") == "train"
    if tuning:
        del spec["eval_split"]
    train, evaluation, found_labels = read_splits(spec, roots)
    if tuning:
        evaluation = None
    name = spec.get("name") or _default_name(spec)
    scorer = spec.get("scorer")
    if scorer is None and train.format == "natural_instructions":
        scorer = "rouge_l"
    own = get_scorer(scorer, f"task '{name}': scorer") if scorer is not None else None

    if not len(train.rows):
        raise InputError(f"task '{name}': the train split {train.source} is empty; give a file with rows")
    if evaluation is None:
        together = _together(train, own, spec.get("columns") or {}, 1)
        train, evaluation = _hold_out(train, spec.get("eval_fraction", 0.1), seed, name, together)
    elif not len(evaluation.rows):
        raise InputError(
            f"task '{name}': the evaluation split {evaluation.source} is empty; remove it to hold out part of train"
        )
    train = _subset(train, spec.get("train_rows"), seed)
    together = _together(evaluation, own, spec.get("columns") or {})
    evaluation = _subset(evaluation, spec.get("eval_rows"), seed, together)

    given = dict(spec.get("columns") or {})
    kind = spec.get("kind", "completion")
    if kind != "completion":
        labels = spec.get("labels")
        if kind == "classification" and labels is None:
            labels = label_names(train, given)
        learnt, scored = (rows_of_kind(table, kind, given, labels, f"task '{name}'") for table in (train, evaluation))
        training = dict(spec.get("training") or {})
        return Task(name, learnt, scored, labels=labels, scorer=scorer, training=training, kind=kind)
    columns = {role: column for role, column in given.items() if role in ROLES}
    template = _parse_template(spec["template"]) if "template" in spec else None
    train_dataset, train_labels = _canonical(train, columns, template=template)
    eval_dataset, _ = _canonical(evaluation, columns, _scored_columns(evaluation, given, own), template)

    labels = spec.get("labels")
    allowed = found_labels or labels
    if allowed:
        _check_labels(train_dataset, allowed, train, spec.get("extra_answers") or ())
    return Task(
        name=name,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        labels=labels or found_labels or train_labels,
        scorer=scorer,
        training=dict(spec.get("training") or {}),
    )


def _load_end_task(spec: Any, name: str, base_dir: str | Path | None, seed: int) -> EndTask:
    where = f"task '{name}': end_task"
    if not isinstance(spec, Mapping):
        raise InputError(f"{where}={spec!r} must be a mapping of a task's options, such as {{path: rows.jsonl}}")
    for key in spec:
        if key not in END_TASK_KEYS:
            raise InputError(f"{where} option {key!r} is unknown{did_you_mean(str(key), END_TASK_KEYS)}")
    own = {key: value for key, value in spec.items() if key not in ("seeds", "peft")}
    task = load_task({"name": name, "kind": "classification", **own}, base_dir=base_dir, seed=seed)
    options = {key: spec[key] for key in ("seeds", "peft") if spec.get(key) is not None}
    known = ("name", "train_dataset", "eval_dataset", "labels", "scorer", "training", "kind")
    return EndTask(**{key: getattr(task, key) for key in known}, **options)


def answers_outside_labels(task: Task) -> int:
    """How many evaluation rows have no answer among the task's labels; they count as wrong."""
    rows = task.eval_dataset
    if not task.labels or not isinstance(rows, Dataset) or "references" not in rows.column_names:
        return 0
    return sum(not set(task.labels).intersection(references) for references in rows["references"])


def as_rows(rows: Any, source: str, kind: str = "completion", labels: Sequence[str] | None = None) -> Any:
    """Rows given from Python, brought to the canonical columns; rows that have `input_ids`, and None, stay as they are.

    Args:
        kind, labels: of their task.

    Raises:
        InputError: for rows without length, or without the columns of any format.
    """
    if rows is None:
        return None
    if isinstance(rows, (list, tuple)):
        if kind in TEXT_KINDS:
            rows = [{"text": row} if isinstance(row, str) else row for row in rows]
        if any(not isinstance(row, Mapping) for row in rows):
            columns = {"completion": "'prompt': ..., 'completion': ...", "classification": "'text': ..., 'label': ..."}
            example = columns.get(kind, "'text': ...")
            raise InputError(f"{source}: a row is no mapping; write {{{example}}}")
        rows = Dataset.from_list([dict(row) for row in rows])
    if _is_iterable_only(rows):
        raise InputError(f"{source} is a stream without length; give a map-style dataset")
    if not isinstance(rows, Dataset) or not len(rows) or "input_ids" in rows.column_names:
        return rows
    table = Table(rows, source, list(range(len(rows))))
    if kind != "completion":
        return rows_of_kind(table, kind, {}, labels, source)
    # Rows to score bring what their scorer reads, such as the turns of a dialogue.
    scored = SCORED_COLUMNS if "references" in rows.column_names else ()
    return _canonical(table, {}, {name: name for name in scored if name in rows.column_names})[0]


def rows_of_kind(
    table: Table, kind: str, columns: Mapping[str, str], labels: Sequence[str] | None, where: str
) -> Dataset:
    """The canonical rows of a task that is no `completion`."""
    from .end_tasks import label_rows  # both import torch and transformers, which most readers do without
    from .pretraining import text_rows

    return label_rows(table, columns, labels, where) if kind == "classification" else text_rows(table, columns)


def label_names(table: Table, columns: Mapping[str, str]) -> list[str] | None:
    """The names of the labels, where their column is a `ClassLabel`."""
    feature = table.rows.features.get(columns.get("label", "label")) if isinstance(table.rows, Dataset) else None
    return list(feature.names) if isinstance(feature, ClassLabel) else None


def content_hash(dataset: Any) -> str:
    """SHA-256 of the rows in their order, the same in every process.

    Of more than 20000 rows only the number and every k-th row are hashed. Datasets without random access give
    `"unhashed"`.
    """
    if isinstance(dataset, Dataset):
        dataset = dataset.with_format(None)
    elif _is_iterable_only(dataset):
        return "unhashed"
    length = len(dataset)
    step = max(1, -(-length // HASH_ALL_ROWS))
    digest = hashlib.sha256()
    if step > 1:
        digest.update(f"{length}\n".encode())
    for index in range(0, length, step):
        row = json.dumps(plain_value(dataset[index]), sort_keys=True, ensure_ascii=True)
        digest.update(row.encode() + b"\n")
    return digest.hexdigest()


def _is_iterable_only(dataset: Any) -> bool:
    from datasets import IterableDataset as HubIterable
    from torch.utils.data import IterableDataset as TorchIterable

    # torch's IterableDataset inherits a __getitem__ that only raises, so its class has to be asked.
    if isinstance(dataset, HubIterable | TorchIterable):
        return True
    return not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"))


def plain_value(value: Any) -> Any:
    """JSON-ready copy of a value; objects without a stable text count by their type alone."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_value(item) for item in value]
    if isinstance(value, bytes):
        return value.hex()
    if hasattr(value, "tolist"):
        return plain_value(value.tolist())
    return f"<{type(value).__module__}.{type(value).__qualname__}>"


# ---------------------------------------------------------------------------------------------------------------------
# The spec
# ---------------------------------------------------------------------------------------------------------------------


def _check_keys(spec: Any) -> None:
    if not isinstance(spec, Mapping):
        raise InputError(f"task {spec!r} is not a mapping of options; write it as 'path: <file or dataset>'")
    for key in spec:
        if key not in TASK_KEYS:
            raise InputError(f"task option {key!r} is unknown{did_you_mean(str(key), TASK_KEYS)}")


def _check_values(spec: Mapping[str, Any]) -> None:
    if not any(key in spec for key in ("path", "data_files", "data_dir")):
        raise InputError(f"task {spec.get('name', '')!r} has no data: set 'path' to a file, a folder or a dataset")
    kind = spec.get("kind", "completion")
    if kind not in KINDS:
        raise InputError(f"kind: {kind!r} is unknown{did_you_mean(str(kind), KINDS)}")
    if kind != "completion":
        for key in ("template", "extra_answers", *(() if kind == "classification" else ("labels",))):
            if spec.get(key) is not None:
                raise InputError(f"{key}: {spec[key]!r} has no use for a task of kind '{kind}'; leave it out")
    for key in ("name", "path", "format", "subset", "data_dir", "train_split", "eval_split", "scorer", "revision"):
        value = spec.get(key)
        if value is not None and not isinstance(value, str | Path):
            raise InputError(f"{key}: {value!r} is not a string; put it in quotes")
    if spec.get("format", "auto") not in FORMATS:
        raise InputError(f"format: {spec['format']!r} is unknown{did_you_mean(spec['format'], FORMATS)}")
    for key in ("train_rows", "eval_rows"):
        value = spec.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise InputError(f"{key}: {value!r} is not a whole number above 0; leave it out to use all rows")
    fraction = spec.get("eval_fraction", 0.1)
    if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 < fraction < 1:
        raise InputError(f"eval_fraction: {fraction!r} is not a number between 0 and 1; the default is 0.1")
    share = spec.get("train_share")
    if share is not None and (isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 1):
        raise InputError(f"train_share: {share!r} is not a number between 0 and 1; leave it out to move no rows")
    labels = spec.get("labels")
    if labels is not None:
        if isinstance(labels, str) or not isinstance(labels, Sequence) or not labels:
            raise InputError(f"labels: {labels!r} is not a list of answers; write it as [first, second]")
        for label in labels:
            if not isinstance(label, str):
                raise InputError(f"labels: {label!r} is not a string; put it in quotes")
        refuse_twice(labels)
    extra = spec.get("extra_answers")
    if extra is not None:
        if not isinstance(extra, list | tuple) or not all(isinstance(answer, str) for answer in extra):
            raise InputError(f"extra_answers: {extra!r} is not a list of strings; put each answer in quotes")
        if labels is None and spec.get("format") != "cl_benchmark":
            raise InputError("extra_answers: there are no labels they could be outside of; add `labels: [a, b, ...]`")
    template = spec.get("template")
    if template is not None:
        if not isinstance(template, str):
            raise InputError(f"template: {template!r} is not a string; put it in quotes")
        if "prompt" in (spec.get("columns") or {}):
            raise InputError("template: it makes the prompt, which columns.prompt names too; leave one of them out")
        _parse_template(template)
    for key in ("columns", "training"):
        if spec.get(key) is not None and not isinstance(spec[key], Mapping):
            raise InputError(f"{key}: {spec[key]!r} is not a mapping; write it as 'name: value' lines")
    for role, column in (spec.get("columns") or {}).items():
        if kind == "completion" and role not in ROLES and role not in SCORED_COLUMNS:
            known = (*ROLES, *SCORED_COLUMNS)
            raise InputError(f"columns: {role!r} is not a column of a task{did_you_mean(str(role), known)}")
        if not isinstance(column, str):
            raise InputError(f"columns: the name {column!r} for '{role}' is not a string; put it in quotes")


def _default_name(spec: Mapping[str, Any]) -> str:
    path = spec.get("path")
    if path is None or str(path) in BUILDERS:
        files = spec.get("data_files")
        if isinstance(files, Mapping):
            files = next(iter(files.values()), None)
        if isinstance(files, list | tuple):
            files = files[0] if files else None
        path = files or spec.get("data_dir")
    last = Path(str(path))
    stem = stem_of(last) if last.suffix in SUFFIXES else last.name
    # `task/train.json` is the task, not a task called "train".
    if stem in ("train", "{split}", *EVAL_SPLITS) and last.parent.name:
        stem = last.parent.name
    return stem


# ---------------------------------------------------------------------------------------------------------------------
# Choosing and converting rows
# ---------------------------------------------------------------------------------------------------------------------


def _order(count: int, seed: int) -> list[int]:
    """The order of `Dataset.shuffle(seed=seed)`."""
    return np.random.default_rng(seed).permutation(count).tolist()


def _together(table: Table, scorer: Scorer | None, columns: Mapping[str, str], count: int | None = None) -> list[Any]:
    """What each row in use is scored together with, such as its dialogue and turn; empty if rows stand alone.

    Args:
        count: of the scorer's `together` only so many columns, such as the dialogue alone.
    """
    names = [columns.get(name, name) for name in (scorer.together if scorer is not None else ())[:count]]
    if not names or not set(names) <= set(table.columns):  # a column that is missing is refused with the rows
        return []
    return [tuple(row.get(name) for name in names) for _, row in _iterate(table, {name: name for name in names})]


def _draw(together: Sequence[Any], rows: int, seed: int) -> list[int]:
    """Positions of at most so many rows in random whole groups, at least one group."""
    groups: dict[Any, list[int]] = {}
    for position, key in enumerate(together):
        groups.setdefault(key, []).append(position)
    members = list(groups.values())
    drawn: list[int] = []
    for number in _order(len(members), seed):
        if not drawn or len(drawn) + len(members[number]) <= rows:
            drawn += members[number]
    return drawn


def _subset(table: Table, rows: int | None, seed: int, together: Sequence[Any] = ()) -> Table:
    if rows is None or rows >= len(table.indices):
        return table
    drawn = _draw(together, rows, seed) if together else _order(len(table.indices), seed)[:rows]
    return Table(table.rows, table.source, [table.indices[i] for i in drawn], table.format, table.definition)


def _hold_out(table: Table, fraction: float, seed: int, name: str, together: Sequence[Any] = ()) -> tuple[Table, Table]:
    count = len(table.indices)
    if count < 2:
        raise InputError(
            f"task '{name}': {table.source} has one row and there is no evaluation split; add rows or set 'data_files'"
        )
    held = min(count - 1, max(1, round(count * fraction)))
    chosen = set(_draw(together, held, seed) if together else _order(count, seed)[:held])
    if len(chosen) == count:
        raise InputError(
            f"task '{name}': all rows of {table.source} are scored together and there is no evaluation split; add rows "
            "or set 'data_files'"
        )
    parts = [i for i in range(count) if i not in chosen], sorted(chosen)
    train, evaluation = (
        Table(table.rows, table.source, [table.indices[i] for i in part], table.format, table.definition)
        for part in parts
    )
    return train, evaluation


def _pick_columns(table: Table, columns: Mapping[str, str]) -> dict[str, str]:
    """Which column of the data holds `prompt` and `completion` (or `messages`), and `references` if any."""
    available = table.columns
    for role, column in columns.items():
        if column not in available:
            raise InputError(
                f"columns: {table.source} has no column '{column}' for '{role}'{did_you_mean(column, available)}"
            )
    if columns and "messages" not in columns:
        chosen = dict(columns)
        for role in ("prompt", "completion"):
            if role not in chosen:
                if role not in available:
                    raise InputError(f"columns: '{role}' is missing; add '{role}: <column>' for {table.source}")
                chosen[role] = role
        return chosen
    if columns:
        return dict(columns)
    if table.format == "natural_instructions":
        return {"prompt": "input", "completion": "output"}
    if table.format != "auto":
        wanted = FORMAT_COLUMNS[table.format]
        for column in wanted:
            if column not in available:
                raise InputError(
                    f"format: {table.source} has no column '{column}', which '{table.format}' needs"
                    f"{did_you_mean(column, available)}"
                )
    else:
        wanted = next((names for names in FORMAT_COLUMNS.values() if set(names) <= set(available)), ())
        if not wanted:
            hint = "set 'columns: {prompt: <column>, completion: <column>}'"
            if {"sentence", "label"} <= set(available):
                hint += " or, for the CL benchmark, give the folder that holds labels.json"
            raise InputError(
                f"columns: {table.source} has the columns {', '.join(map(repr, available))}, neither "
                f"prompt/completion, input/output nor messages; {hint}"
            )
    chosen = {"messages": wanted[0]} if len(wanted) == 1 else {"prompt": wanted[0], "completion": wanted[1]}
    if "references" in available:
        chosen["references"] = "references"
    return chosen


def _scored_columns(table: Table, columns: Mapping[str, str], scorer: Scorer | None) -> dict[str, str]:
    """Further columns of the evaluation rows: those `columns` names, and what the task's own scorer reads."""
    kept = {name: column for name, column in columns.items() if name not in ROLES}
    if scorer is not None:
        wanted = (*scorer.columns, *(name for name in scorer.optional if name in table.columns))
        kept = {**{name: name for name in wanted if name in SCORED_COLUMNS}, **kept}
    for name, column in kept.items():
        if column not in table.columns:
            raise InputError(
                f"columns: {table.source} has no column '{column}' for '{name}'{did_you_mean(column, table.columns)}"
            )
    return kept


Template = list[tuple[str, str | None]]
"""Pieces of a prompt template: text, and the column that follows it."""


def _parse_template(template: str) -> Template:
    try:
        pieces = list(string.Formatter().parse(template))
    except ValueError as error:
        raise InputError(
            f"template: {template!r} cannot be read ({error}); write {{column}}, and {{{{ and }}}} for braces"
        ) from error
    for _, name, form, conversion in pieces:
        # Only columns: format strings could otherwise reach into objects.
        if name is not None and (not name or form or conversion or set(name) & set(".[]")):
            raise InputError(f"template: {template!r} has a field that is no plain {{column}}; write the column's name")
    if all(name is None for _, name, _, _ in pieces):
        raise InputError(
            f"template: {template!r} names no column, so that all prompts would be the same; add {{column}}"
        )
    return [(text, name) for text, name, _, _ in pieces]


def _fill(template: Template, row: Mapping[str, Any], definition: str | None, where: str) -> str:
    parts = []
    for text, name in template:
        value: Any = ""
        if name is not None:
            value = definition if name == "definition" and definition is not None else row.get(name)
            if isinstance(value, bool) or not isinstance(value, str | int | float):
                raise InputError(f"column '{name}' {where} is {_show(value)}, and the template needs text or a number")
        parts += [text, str(value)]
    return "".join(parts)


def _template_columns(template: Template, table: Table) -> list[str]:
    """The columns a template reads, refused if they are not there."""
    names = [name for _, name in template if name is not None]
    if table.definition is not None:
        names = [name for name in names if name != "definition"]
    for name in names:
        if name not in table.columns:
            raise InputError(f"template: {table.source} has no column '{name}'{did_you_mean(name, table.columns)}")
    return names


def _canonical(
    table: Table,
    columns: Mapping[str, str],
    further: Mapping[str, str] | None = None,
    template: Template | None = None,
) -> tuple[Dataset, list[str] | None]:
    """The canonical rows, and the names of the answers where the completion column is a `ClassLabel`."""
    further = further or {}
    read = _template_columns(template, table) if template is not None else []
    if template is not None and columns:
        columns = {"prompt": read[0] if read else columns.get("completion", "completion"), **columns}
    chosen = _pick_columns(table, columns)
    if template is not None and "messages" in chosen:
        raise InputError(f"template: {table.source} holds messages; name the answers, as columns: {{completion: ...}}")
    _check_kinds(table, [chosen[role] for role in ("completion", "references") if role in chosen])
    names: list[str] | None = None
    if isinstance(table.rows, Dataset) and "completion" in chosen:
        feature = table.rows.features[chosen["completion"]]
        if isinstance(feature, ClassLabel):
            names = list(feature.names)
    result: dict[str, list[Any]] = {"prompt": [], "completion": [], "references": [], **{name: [] for name in further}}
    chat: bool | None = None
    for index, row in _iterate(table, {**chosen, **further, **{f"template {name}": name for name in read}}):
        where = f"in row {index} of {table.source}"
        if "messages" in chosen:
            messages = _messages(row.get(chosen["messages"]), chosen["messages"], where)
            if len(messages) < 2 or messages[-1]["role"] != "assistant":
                raise InputError(
                    f"column '{chosen['messages']}' {where} does not end in an assistant message after another; "
                    "its last message is the text to learn"
                )
            prompt: Any = messages[:-1]
            answers = [messages[-1]["content"]]
        else:
            if template is not None:
                prompt = _fill(template, row, table.definition, where)
            else:
                prompt = _prompt(row.get(chosen["prompt"]), chosen["prompt"], where)
            answers = _answers(row.get(chosen["completion"]), chosen["completion"], where, names)
        if table.definition is not None and template is None:
            prompt = f"Definition: {table.definition}\n\nInput: {prompt}\nOutput:"
        if chat is None:
            chat = not isinstance(prompt, str)
        elif chat != (not isinstance(prompt, str)):
            raise InputError(
                f"the prompt {where} is not of the same kind as before; use strings or messages throughout"
            )
        references = answers
        if "references" in chosen and row.get(chosen["references"]) is not None:
            references = _answers(row[chosen["references"]], chosen["references"], where, None)
        result["prompt"].append(prompt)
        result["completion"].append(answers[0])
        result["references"].append(list(references))
        for name, column in further.items():
            result[name].append(row.get(column))
    return Dataset.from_dict(result), names


def _check_kinds(table: Table, columns: Sequence[str]) -> None:
    """Refuse a file in which answers are strings in some rows and lists in others; a Dataset has one type a column."""
    if isinstance(table.rows, Dataset):
        return
    for column in columns:
        first: str | None = None
        for index, row in enumerate(table.rows):
            value = row.get(column)
            kind = "a list" if isinstance(value, list) else "a string"
            if value is not None and (first := first or kind) != kind:
                raise InputError(
                    f"column '{column}' in row {index} of {table.source} is {kind}, and {first} in the rows before; "
                    "write the references of a task alike in all rows"
                )


def _iterate(table: Table, chosen: Mapping[str, str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    rows = table.rows
    if not isinstance(rows, Dataset):
        yield from ((index, rows[index]) for index in table.indices)
        return
    # Only the columns in use: others may hold images or audio, which are costly to decode.
    rows = rows.with_format(None).select_columns(list(dict.fromkeys(chosen.values()))).select(table.indices)
    yield from zip(table.indices, rows, strict=True)


def _prompt(value: Any, column: str, where: str) -> Any:
    if isinstance(value, list):
        return _messages(value, column, where)
    if not isinstance(value, str):
        raise InputError(f"column '{column}' {where} is {_show(value)}, not a string; convert it or map another column")
    if not value:
        raise InputError(f"column '{column}' {where} is empty; a prompt needs text")
    return value


def _messages(value: Any, column: str, where: str) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise InputError(f"column '{column}' {where} is {_show(value)}; write a list of messages")
    messages = []
    for message in value:
        parts = [message.get(key) for key in ("role", "content")] if isinstance(message, Mapping) else [None]
        if not all(isinstance(part, str) for part in parts):
            raise InputError(
                f"column '{column}' {where} holds {_show(message)}; give each message a string 'role' and 'content'"
            )
        messages.append({"role": str(parts[0]), "content": str(parts[1])})
    return messages


def _answers(value: Any, column: str, where: str, names: Sequence[str] | None) -> list[str]:
    """The accepted texts: one string, a list of strings, assistant messages, or the name behind a class number."""
    if names is not None and isinstance(value, int):
        if not 0 <= value < len(names):
            raise InputError(
                f"column '{column}' {where} is {value}, which is no class (unlabelled split?); choose another split"
            )
        return [names[value]]
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value):
            return value
        if all(isinstance(item, Mapping) for item in value):
            messages = _messages(value, column, where)
            if len(messages) == 1 and messages[0]["role"] == "assistant":
                return [messages[0]["content"]]
            raise InputError(f"column '{column}' {where} is not one assistant message; put the others in the prompt")
        kinds = sorted({type(item).__name__ for item in value})
        if len(kinds) > 1:
            raise InputError(
                f"column '{column}' {where} mixes {' and '.join(kinds)} in {_show(value)}; write each accepted answer "
                "as a string"
            )
    raise InputError(
        f"column '{column}' {where} is {_show(value)}, not a string or a list of strings; "
        "convert it or map another column"
    )


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _check_labels(dataset: Dataset, labels: Sequence[str], table: Table, extra: Sequence[str]) -> None:
    allowed = {*labels, *extra}
    for position, references in enumerate(dataset["references"]):
        if not allowed.intersection(references):
            raise InputError(
                f"labels: the answer {references[0]!r} in row {table.indices[position]} of {table.source} is not one "
                f"of the labels {', '.join(map(repr, labels))}; correct the row or the labels, or add it to "
                "`extra_answers`"
            )
