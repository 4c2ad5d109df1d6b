"""From a stream's definition to its tasks with their rows: finding the published layouts, and the hash over it all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..data import content_hash, load_task, plain_value
from ..data_sources import EVAL_SPLITS, SUFFIXES
from ..errors import InputError, did_you_mean
from ..tasks import EndTask, Task
from .definition import DEFINITIONS, QUICKSTART, Stream, check_sections
from .quickstart import quickstart_tasks

SHORT = 12
"""So many digits of a hash are shown; a reference may give more."""
BENCHMARK_FOLDERS = ("CL_Benchmark", "data_Long_Sequence_Benchmark", "data_SuperNI_Benchmark")
"""Of the repositories of O-LoRA and SAPT, and of TaSL: data_dir may be the clone."""
_BATCH = 1000
# Of a definition, what tells apart streams that resolve to the same rows. Prompts and splits are in the rows.
_HASHED_SECTIONS = ("lengths", "evaluation", "training")


@dataclass(frozen=True)
class Source:
    """Where a task's rows were found.

    Attributes:
        train: file, folder or dataset.
        evaluation: the split that is scored; None if a part of the training rows is held out.
    """

    train: str
    evaluation: str | None


def load(
    stream: Stream,
    *,
    data_dir: str | Path | None = None,
    base_dir: str | Path | None = None,
    seed: int = 42,
    train_rows: int | None = None,
    eval_rows: int | None = None,
    scorer: str | None = None,
    eval_split: str | None = None,
    order: Sequence[str] | None = None,
) -> tuple[list[Task], dict[str, Source]]:
    """The tasks of a stream in their order, and where their rows were found; see `load_stream`."""
    names = list(stream.tasks) if order is None else list(order)
    for name in names:
        if name not in stream.tasks:
            raise InputError(
                f"order: the stream '{stream.name}' has no task '{name}'{did_you_mean(name, stream.tasks)}"
            )
    if stream.file is None:
        tasks = _quickstart(seed, data_dir, train_rows, eval_rows, scorer, eval_split, names)
        sources = {name: Source("generated", "generated") for name in names}
    else:
        if stream.file.parent != DEFINITIONS:
            check_sections(stream)
        if eval_split not in (None, "train", *EVAL_SPLITS):
            raise InputError(
                f"eval_split={eval_split!r} must be 'train' or one of {', '.join(EVAL_SPLITS)}, or be left out for the "
                "stream's own split"
            )
        given = {"train_rows": train_rows, "eval_rows": eval_rows, "scorer": scorer, "eval_split": eval_split}
        places = _places(stream, names, data_dir, base_dir)
        tasks = [_load_task(stream, name, places, given, seed) for name in names]
        sources = {name: _source(stream.tasks[name], places[name, ""], given) for name in names}
    if stream.pinned is not None:
        found = stream_hash(tasks, stream)
        if not found.startswith(stream.pinned):
            where = f"the data in '{data_dir}'" if data_dir is not None else "the data"
            raise InputError(
                f"stream: {stream.name}@{stream.pinned} is cited, and {where} with these options resolves to "
                f"{stream.name}@{found[:SHORT]}; use the cited data, train_rows, eval_rows, scorer and order, or leave "
                "out the hash"
            )
    return tasks, sources


def stream_hash(tasks: Sequence[Task], definition: Stream | None = None) -> str:
    """SHA-256 over a stream: its tasks in their order, every row of theirs, and what its definition says of them.

    The same rows give the same hash whatever layout, machine or Python they were read with; names, notes and places
    do not count, but every character of a row, the order, the labels, the scorers, and the lengths, evaluation and
    training that the definition sets.
    """
    sections = {key: getattr(definition, key) if definition is not None else {} for key in _HASHED_SECTIONS}
    described = [_described(task, definition.tasks.get(task.name, {}) if definition else {}) for task in tasks]
    text = json.dumps({"format": 1, **sections, "tasks": described}, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def named_hash(name: str, full_hash: str) -> str:
    """How a stream is cited, such as `standard-order1@1a2b3c4d5e6f`."""
    return f"{name}@{full_hash[:SHORT]}"


def _described(task: Task, defined: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "name": task.name,
        "kind": task.kind,
        "labels": list(task.labels) if task.labels is not None else None,
        "scorer": task.scorer,
        "training": dict(defined.get("training") or {}),
        "train": _rows_hash(task.train_dataset),
        "eval": _rows_hash(task.eval_dataset),
    }
    if isinstance(task, EndTask):
        found["seeds"], found["peft"] = list(task.seeds), dict(task.peft) if task.peft is not None else None
    if task.end_task is not None:
        found["end_task"] = _described(task.end_task, defined.get("end_task") or {})
    return found


def _rows_hash(dataset: Any) -> str:
    """Of all rows; `content_hash` takes a sample of many."""
    if not isinstance(dataset, Dataset):
        return content_hash(dataset)
    digest = hashlib.sha256()
    for batch in dataset.with_format(None).iter(batch_size=_BATCH):
        columns = sorted(batch)
        for values in zip(*(batch[column] for column in columns), strict=True):
            row = plain_value(dict(zip(columns, values, strict=True)))
            digest.update(json.dumps(row, sort_keys=True, ensure_ascii=True).encode() + b"\n")
    return digest.hexdigest()


def _quickstart(
    seed: int, data_dir: Any, train_rows: Any, eval_rows: Any, scorer: Any, eval_split: Any, names: list[str]
) -> list[Task]:
    for option, value in (("eval_split", eval_split), ("data_dir", data_dir)):
        if value is not None:
            shown = f"{option}: '{value}'" if option == "data_dir" else option
            raise InputError(f"{shown} has no use, the stream '{QUICKSTART.name}' is generated; leave it out")
    sizes = {"train_rows": train_rows, "eval_rows": eval_rows}
    tasks = quickstart_tasks(seed=seed, scorer=scorer, **{key: n for key, n in sizes.items() if n is not None})
    by_name = {task.name: task for task in tasks}
    return [by_name[name] for name in names]


# ---------------------------------------------------------------------------------------------------------------------
# Where the rows are
# ---------------------------------------------------------------------------------------------------------------------

Places = dict[tuple[str, str], dict[str, Any]]
"""(task, "" or "end_task") -> the part of a task's specification that says where its rows are."""


def _places(stream: Stream, names: Sequence[str], data_dir: Any, base_dir: Any) -> Places:
    wanted = {(name, ""): stream.tasks[name] for name in names}
    wanted |= {(name, "end_task"): task["end_task"] for (name, _), task in wanted.items() if "end_task" in task}
    if data_dir is None:
        lacking = [key for key, task in wanted.items() if "hub" not in task]
        if lacking:
            hint = stream.where_published
            some = "" if len(lacking) == len(wanted) else f" for {', '.join(_title(key) for key in lacking)}"
            raise InputError(
                f"data_dir: the stream '{stream.name}' needs its data{some}; set data_dir to its folder"
                f"{': ' + hint if hint else ''}"
            )
        return {key: dict(task["hub"]) for key, task in wanted.items()}
    roots = _roots(stream, data_dir, base_dir)
    found = {key: _locate(roots, task.get("layouts", []), stream, key) for key, task in wanted.items()}
    missing = [_title(key) for key, place in found.items() if place is None]
    if missing:
        hint = stream.where_published
        layouts = next(wanted[key].get("layouts", []) for key, place in found.items() if place is None)
        first = next((_first_file(layout) for layout in layouts), "a layout in the stream file")
        raise InputError(
            f"data_dir: '{roots[0]}' lacks the tasks {', '.join(missing)} of the stream '{stream.name}' (there is no "
            f"{first}){'; ' + hint if hint else ''}"
        )
    return {key: place for key, place in found.items() if place is not None}


def _first_file(layout: Mapping[str, Any]) -> str:
    """The file or folder of a layout that is looked for first."""
    split = layout.get("train_split", "train")
    if "path" in layout:
        return str(layout["path"]).replace("{split}", split)
    files = layout["data_files"].get(split, next(iter(layout["data_files"].values())))
    return str(files[0] if isinstance(files, list) else files)


def _title(key: tuple[str, str]) -> str:
    return f"{key[0]} (end task)" if key[1] else key[0]


def _roots(stream: Stream, data_dir: str | Path, base_dir: str | Path | None) -> list[Path]:
    """First the benchmark folders in data_dir, then data_dir."""
    folders = [Path(base_dir), Path.cwd()] if base_dir is not None else [Path.cwd()]
    for folder in folders:
        root = folder / Path(data_dir).expanduser()
        if root.is_dir():
            inside = (_below(root, name) for name in BENCHMARK_FOLDERS)
            return [*(folder for folder in inside if folder is not None and folder.is_dir()), root]
    hint = stream.where_published
    raise InputError(f"data_dir: the folder '{data_dir}' does not exist{'; ' + hint if hint else ''}")


def _below(root: Path, path: str) -> Path | None:
    """The file or folder at this path below `root`, whatever the case of its parts."""
    current = root
    for part in Path(path).parts:
        if (current / part).exists():
            current = current / part
            continue
        if not current.is_dir():
            return None
        entries = {entry.name.lower(): entry for entry in sorted(current.iterdir())}
        if part.lower() not in entries:
            return None
        current = entries[part.lower()]
    return current


def _file(roots: Sequence[Path], path: str) -> Path | None:
    """The file at this path, which may lack its suffix, or whose first folder is the root."""
    first, _, rest = path.partition("/")
    for root in roots:
        for name in (path, rest) if rest and root.name == first else (path,):
            for suffix in ("", ".jsonl", *(s for s in SUFFIXES if s != ".jsonl")):
                found = _below(root, name + suffix)
                if found is not None and found.is_file():
                    return found
    return None


def _locate(
    roots: Sequence[Path], layouts: Sequence[Mapping[str, Any]], stream: Stream, key: tuple[str, str]
) -> dict[str, Any] | None:
    """The first layout whose training rows are there, with absolute paths."""
    for layout in layouts:
        place = {k: v for k, v in layout.items() if k not in ("path", "data_files")}
        if "data_files" in layout:
            files = _named_files(roots, layout["data_files"], stream, key)
            if files is not None:
                return {**place, "data_files": files}
        elif "{split}" in layout["path"]:
            train = _file(roots, layout["path"].replace("{split}", layout.get("train_split", "train")))
            if train is not None:
                splits = {layout.get("train_split", "train"): str(train)}
                for split in EVAL_SPLITS:
                    found = _file(roots, layout["path"].replace("{split}", split))
                    if found is not None:
                        splits[split] = str(found)
                return {**place, "data_files": splits}
        else:
            for root in roots:
                found = _below(root, layout["path"])
                if found is None:
                    continue
                if found.is_dir() and layout.get("format") == "cl_benchmark" and _below(found, "train.json") is None:
                    continue
                return {**place, "path": str(found)}
    return None


def _named_files(
    roots: Sequence[Path], files: Mapping[str, Any], stream: Stream, key: tuple[str, str]
) -> dict[str, list[str]] | None:
    """The files of every split; None if those to learn are not there."""
    found: dict[str, list[str]] = {}
    for split, names in files.items():
        for name in names if isinstance(names, list) else [names]:
            file = _file(roots, name)
            if file is not None:
                found.setdefault(split, []).append(str(file))
            elif split == "train":
                return None
            else:
                hint = stream.where_published
                raise InputError(
                    f"data_dir: '{roots[0]}' has the training rows of {_title(key)} and lacks '{name}', its split "
                    f"'{split}'{'; ' + hint if hint else ''}"
                )
    return found


def _load_task(stream: Stream, name: str, places: Places, given: Mapping[str, Any], seed: int) -> Task:
    defined = stream.tasks[name]
    spec = _spec(name, defined, places[name, ""], given)
    end = defined.get("end_task")
    task = _read(stream, name, spec, seed)
    if end is None:
        return task
    # The recipe's options are for the tasks that are learnt; an end task keeps its own.
    rows = _read(stream, name, _spec(end.get("name", name), end, places[name, "end_task"], {}), seed)
    options = {key: getattr(rows, key) for key in ("name", "train_dataset", "eval_dataset", "labels", "scorer",
                                                   "training", "kind")}  # fmt: skip
    return replace(task, end_task=EndTask(**options, **{k: end[k] for k in ("seeds", "peft") if k in end}))


def _spec(name: str, defined: Mapping[str, Any], place: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The specification for `load_task`: the task's keys, over them those of its layout, over them the recipe's."""
    passed = ("labels", "extra_answers", "scorer", "kind", "template", "train_rows", "eval_rows", "eval_split",
              "eval_fraction", "training")  # fmt: skip
    spec = {key: defined[key] for key in passed if key in defined}
    if spec.get("kind") == "completion":
        del spec["kind"]
    return {**spec, **place, **{key: value for key, value in given.items() if value is not None}, "name": name}


def _read(stream: Stream, name: str, spec: Mapping[str, Any], seed: int) -> Task:
    try:
        return load_task(spec, seed=seed)
    except InputError as error:
        hint = stream.where_published
        if "could not be loaded" in str(error) and hint:
            raise InputError(f"{error}; or set data_dir: {hint}") from error
        raise InputError(f"stream '{stream.name}', task '{name}': {error}") from error


def _source(defined: Mapping[str, Any], place: Mapping[str, Any], given: Mapping[str, Any]) -> Source:
    spec = _spec("", defined, place, given)
    wanted = spec.get("eval_split")
    if wanted == "train":
        wanted = None
        splits: list[str] = []
    elif "data_files" in spec:
        splits = [split for split in EVAL_SPLITS if split in spec["data_files"]]
    else:
        folder = Path(spec["path"])
        splits = [s for s in EVAL_SPLITS if folder.is_dir() and any((folder / f"{s}{x}").exists() for x in SUFFIXES)]
        if not folder.exists():
            splits = ["as on the hub"]
    files = spec.get("data_files", {}).get(spec.get("train_split", "train"), spec.get("path"))
    train = ", ".join(files) if isinstance(files, list) else str(files)
    return Source(train, wanted or next(iter(splits), None))
