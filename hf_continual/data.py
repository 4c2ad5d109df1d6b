"""Reading tasks: local files, benchmark folders and hub datasets, all turned into the same rows.

A canonical dataset has the columns `prompt` (a string, or a list of `{"role", "content"}` messages), `completion`
(the text to learn) and `references` (the texts accepted as right).
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, load_dataset, load_from_disk

from .errors import InputError, did_you_mean
from .tasks import Task

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
    "train_rows",
    "eval_rows",
    "eval_fraction",
    "labels",
    "scorer",
    "training",
    "revision",
)
FORMATS = (
    "auto",
    "input_output",
    "prompt_completion",
    "conversational",
    "cl_benchmark",
    "natural_instructions",
)
EVAL_SPLITS = ("dev", "eval", "validation", "test")
SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
ROLES = ("prompt", "completion", "references", "messages")
FORMAT_COLUMNS = {
    "prompt_completion": ("prompt", "completion"),
    "input_output": ("input", "output"),
    "conversational": ("messages",),
}
# O-LoRA's instructions, word for word: the prompt must match for its published numbers to be comparable.
CL_INSTRUCTIONS = {
    "SC": "What is the sentiment of the following paragraph?",
    "TC": "What is the topic of the following paragraph?",
    "NLI": 'What is the logical relationship between the "sentence 1" and the "sentence 2"?',
    "QQP": 'Whether the "first sentence" and the "second sentence" have the same meaning?',
    "BoolQA": "According to the following passage, is the question true or false?",
    "MultiRC": "According to the following passage and question, is the candidate answer true or false?",
    "WiC": "Given a word and two sentences, whether the word is used with the same sense in both sentence?",
    "COPA": None,
}
# MNLI's evaluation rows without a gold label. The reference code scores them (always wrong), so they stay.
NO_GOLD_LABEL = "-"
HASH_ALL_ROWS = 20_000


@dataclass
class _Table:
    """One split as it was read: rows, where they came from, and which of them are in use."""

    rows: Any  # a list of dicts or a datasets.Dataset
    source: str
    indices: list[int]
    format: str = "auto"
    definition: str | None = None  # Natural-Instructions only

    @property
    def columns(self) -> list[str]:
        if isinstance(self.rows, Dataset):
            return list(self.rows.column_names)
        return list(dict.fromkeys(key for row in self.rows for key in row))


def load_task(spec: Mapping[str, Any], *, base_dir: str | Path | None = None, seed: int = 42) -> Task:
    """Read the data of one task.

    Args:
        spec: the task's entry in a configuration; its keys are `TASK_KEYS`.
        base_dir: folder that relative local paths start from; the current directory is tried after it.
        seed: chooses the rows of `train_rows`, `eval_rows` and `eval_fraction`.

    An evaluation split is used where there is one (dev, eval, validation or test, in this order); otherwise
    `eval_fraction` of the train rows is held out. Where labels are known, an answer outside them is an error, but for
    evaluation rows answered `-` (MNLI has some): they are kept and count as wrong, as in O-LoRA's and MIGU's code.

    Raises:
        InputError: if the spec or the data cannot be used.
    """
    _check_keys(spec)
    spec = {key: value for key, value in spec.items() if value is not None}
    _check_values(spec)
    roots = [Path(base_dir)] if base_dir is not None else []
    roots.append(Path.cwd())
    train, evaluation, found_labels = _read(spec, roots)
    name = spec.get("name") or _default_name(spec)

    if not len(train.rows):
        raise InputError(f"task '{name}': the train split {train.source} is empty; give a file with rows")
    if evaluation is None:
        train, evaluation = _hold_out(train, spec.get("eval_fraction", 0.1), seed, name)
    elif not len(evaluation.rows):
        raise InputError(
            f"task '{name}': the evaluation split {evaluation.source} is empty; remove it to hold out part of train"
        )
    train = _subset(train, spec.get("train_rows"), seed)
    evaluation = _subset(evaluation, spec.get("eval_rows"), seed)

    columns = dict(spec.get("columns") or {})
    train_dataset, train_labels = _canonical(train, columns)
    eval_dataset, _ = _canonical(evaluation, columns)

    labels = spec.get("labels")
    allowed = found_labels or labels
    if allowed:
        _check_labels(train_dataset, allowed, train, ())
        _check_labels(eval_dataset, allowed, evaluation, (NO_GOLD_LABEL,))
    scorer = spec.get("scorer")
    if scorer is None and train.format == "natural_instructions":
        scorer = "rouge_l"
    return Task(
        name=name,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        labels=labels or found_labels or train_labels,
        scorer=scorer,
        training=dict(spec.get("training") or {}),
    )


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
        row = json.dumps(_plain(dataset[index]), sort_keys=True, ensure_ascii=True)
        digest.update(row.encode() + b"\n")
    return digest.hexdigest()


def _is_iterable_only(dataset: Any) -> bool:
    from datasets import IterableDataset as HubIterable
    from torch.utils.data import IterableDataset as TorchIterable

    # torch's IterableDataset inherits a __getitem__ that only raises, so its class has to be asked.
    if isinstance(dataset, HubIterable | TorchIterable):
        return True
    return not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"))


def _plain(value: Any) -> Any:
    """JSON-ready copy of a value; objects without a stable text count by their type alone."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, bytes):
        return value.hex()
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
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
    labels = spec.get("labels")
    if labels is not None:
        if isinstance(labels, str) or not isinstance(labels, Sequence) or not labels:
            raise InputError(f"labels: {labels!r} is not a list of answers; write it as [first, second]")
        for label in labels:
            if not isinstance(label, str):
                raise InputError(f"labels: {label!r} is not a string; put it in quotes")
    for key in ("columns", "training"):
        if spec.get(key) is not None and not isinstance(spec[key], Mapping):
            raise InputError(f"{key}: {spec[key]!r} is not a mapping; write it as 'name: value' lines")
    for role, column in (spec.get("columns") or {}).items():
        if role not in ROLES:
            raise InputError(f"columns: {role!r} is not a column of a task{did_you_mean(str(role), ROLES)}")
        if not isinstance(column, str):
            raise InputError(f"columns: the name {column!r} for '{role}' is not a string; put it in quotes")


def _default_name(spec: Mapping[str, Any]) -> str:
    path = spec.get("path")
    if path is None or str(path) in _BUILDERS:
        files = spec.get("data_files")
        if isinstance(files, Mapping):
            files = next(iter(files.values()), None)
        if isinstance(files, list | tuple):
            files = files[0] if files else None
        path = files or spec.get("data_dir")
    last = Path(str(path))
    stem = last.stem if last.suffix in SUFFIXES else last.name
    # `task/train.json` is the task, not a task called "train".
    if stem in ("train", "{split}", *EVAL_SPLITS) and last.parent.name:
        stem = last.parent.name
    return stem


# ---------------------------------------------------------------------------------------------------------------------
# Finding the splits
# ---------------------------------------------------------------------------------------------------------------------

_BUILDERS = ("json", "csv", "parquet")
_Splits = tuple[_Table, "_Table | None", "list[str] | None"]


def _find(path: str | Path, roots: Sequence[Path]) -> Path | None:
    for root in roots:
        candidate = root / Path(path).expanduser()
        if candidate.exists():
            return candidate
    return None


def _looks_local(path: str) -> bool:
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or Path(path).suffix in SUFFIXES


def _missing(option: str, path: str | Path, roots: Sequence[Path]) -> InputError:
    tried = " and ".join(dict.fromkeys(f"'{root}'" for root in roots))
    return InputError(f"{option}: '{path}' does not exist (looked in {tried}); give an existing file or folder")


def _read(spec: Mapping[str, Any], roots: Sequence[Path]) -> _Splits:
    form = spec.get("format", "auto")
    path = str(spec["path"]) if spec.get("path") is not None else None
    files = spec.get("data_files")
    if path is None and files is None:
        path = str(spec["data_dir"])
    found = _find(path, roots) if path is not None and path not in _BUILDERS else None

    if files is not None and (path is None or path in _BUILDERS or (found is not None and found.is_dir())):
        roots = [found] if found is not None else roots
        if "data_dir" in spec:
            roots = [root / Path(spec["data_dir"]).expanduser() for root in roots]
        return _read_data_files(spec, files, roots)
    if path is not None and "{split}" in path:
        return _read_template(spec, path, roots)
    if found is None or path is None:
        if path is None or _looks_local(path):
            raise _missing("path", str(path), roots)
        if form in ("cl_benchmark", "natural_instructions"):
            raise _missing("path", path, roots)
        return _read_hub(spec, path)
    if found.is_file():
        if spec.get("eval_split") is not None:
            raise InputError(
                f"eval_split: {spec['eval_split']!r} cannot be found in the single file '{found}'; "
                "use 'data_files: {train: ..., eval: ...}'"
            )
        return _read_file(found, form), None, None
    return _read_folder(spec, found, form)


def _read_data_files(spec: Mapping[str, Any], files: Any, roots: Sequence[Path]) -> _Splits:
    if not isinstance(files, Mapping):
        files = {"train": files}
    train_name = spec.get("train_split") or "train"
    eval_names = (spec["eval_split"],) if spec.get("eval_split") else EVAL_SPLITS
    for key in files:
        if key not in (train_name, *eval_names):
            raise InputError(f"data_files: split {key!r} is unknown{did_you_mean(key, (train_name, *eval_names))}")
    if train_name not in files:
        raise InputError(f"data_files: the split '{train_name}' is missing; add '{train_name}: <file>'")
    if spec.get("eval_split") and spec["eval_split"] not in files:
        raise InputError(
            f"eval_split: {spec['eval_split']!r} is not in data_files{did_you_mean(spec['eval_split'], files)}"
        )

    def read(split: str) -> _Table:
        names = files[split] if isinstance(files[split], list | tuple) else [files[split]]
        tables = []
        for name in names:
            found = _find(name, roots) if isinstance(name, str | Path) else None
            if found is None or not found.is_file():
                raise _missing(f"data_files: {split}", name, roots)
            tables.append(_read_file(found, spec.get("format", "auto")))
        if not tables:
            raise InputError(f"data_files: the split '{split}' lists no files; add '{split}: <file>'")
        if len(tables) == 1:
            return tables[0]
        if len({table.definition for table in tables}) > 1:
            raise InputError(f"data_files: the files of '{split}' have different definitions; make each its own task")
        rows = [row for table in tables for row in table.rows]
        return _table(rows, ", ".join(f"'{name}'" for name in names), tables[0].format, tables[0].definition)

    eval_name = next((name for name in eval_names if name in files), None)
    return read(train_name), read(eval_name) if eval_name else None, None


def _read_template(spec: Mapping[str, Any], path: str, roots: Sequence[Path]) -> _Splits:
    form = spec.get("format", "auto")
    train_name = spec.get("train_split") or "train"
    train = _find(path.replace("{split}", train_name), roots)
    if train is None:
        raise _missing("path", path.replace("{split}", train_name), roots)
    eval_names = (spec["eval_split"],) if spec.get("eval_split") else EVAL_SPLITS
    candidates = (_find(path.replace("{split}", name), roots) for name in eval_names)
    evaluation = next((found for found in candidates if found is not None), None)
    if evaluation is None and spec.get("eval_split"):
        raise _missing("eval_split", path.replace("{split}", spec["eval_split"]), roots)
    return _read_file(train, form), _read_file(evaluation, form) if evaluation else None, None


def _split_files(folder: Path) -> dict[str, Path]:
    """The split files of a folder by their stem; of `train.json` and `train.csv` the first suffix in our list."""
    files: dict[str, Path] = {}
    for suffix in reversed(SUFFIXES):
        for file in sorted(folder.glob(f"*{suffix}")):
            files[file.stem] = file
    files.pop("labels", None)
    return files


def _read_folder(spec: Mapping[str, Any], folder: Path, form: str) -> _Splits:
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return _pick_splits(spec, load_from_disk(str(folder)), f"'{folder}'")
    files = _split_files(folder)
    train_name = spec.get("train_split") or "train"
    if train_name not in files:
        data = [file for file in folder.rglob("*") if file.suffix in SUFFIXES and file.name != "labels.json"]
        if not data or form in ("cl_benchmark", "natural_instructions"):
            raise InputError(
                f"path: '{folder}' has no {train_name}.json, .jsonl, .csv or .parquet; "
                "give a task's folder, a file, or 'data_files: {train: ..., eval: ...}'"
            )
        # Layouts such as data/train-00000-of-00002.parquet are for the datasets library to sort out.
        if files and not any(re.match(rf"{re.escape(train_name)}[-_.]", stem) for stem in files):
            raise InputError(f"train_split: '{folder}' has no file '{train_name}'{did_you_mean(train_name, files)}")
        return _read_hub(spec, str(folder))
    eval_names = (spec["eval_split"],) if spec.get("eval_split") else EVAL_SPLITS
    eval_name = next((name for name in eval_names if name in files), None)
    if eval_name is None and spec.get("eval_split"):
        raise InputError(
            f"eval_split: '{folder}' has no file '{spec['eval_split']}'{did_you_mean(spec['eval_split'], files)}"
        )

    labels_file = folder / "labels.json"
    if form == "cl_benchmark" or (form == "auto" and labels_file.is_file()):
        labels = _read_labels(labels_file)
        train = _cl_table(files[train_name], labels)
        return train, _cl_table(files[eval_name], labels) if eval_name else None, labels
    evaluation = _read_file(files[eval_name], form) if eval_name else None
    return _read_file(files[train_name], form), evaluation, None


def _read_hub(spec: Mapping[str, Any], path: str) -> _Splits:
    options = {key: spec[key] for key in ("data_files", "data_dir", "revision") if spec.get(key) is not None}
    try:
        loaded = load_dataset(path, spec.get("subset"), **options)
    except Exception as error:
        # Whatever it was (network, name, configuration, file format), the user mends it in the same place.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise InputError(
            f"path: the dataset '{path}' could not be loaded ({type(error).__name__}: {reason}); check its name, "
            "'subset' and 'revision', connect to the hub, or give a local file or folder"
        ) from error
    return _pick_splits(spec, loaded, f"'{path}'")


def _pick_splits(spec: Mapping[str, Any], loaded: Any, source: str) -> _Splits:
    form = spec.get("format", "auto")
    if isinstance(loaded, Dataset):
        loaded = DatasetDict({spec.get("train_split") or "train": loaded})
    train_name = spec.get("train_split") or "train"
    if train_name not in loaded:
        raise InputError(f"train_split: {source} has no split '{train_name}'{did_you_mean(train_name, loaded)}")
    eval_name = spec.get("eval_split")
    if eval_name is not None and eval_name not in loaded:
        raise InputError(f"eval_split: {source} has no split '{eval_name}'{did_you_mean(eval_name, loaded)}")
    if eval_name is None:
        eval_name = next((name for name in EVAL_SPLITS if name in loaded and name != train_name), None)
    train = _table(loaded[train_name], f"{source} (split {train_name})", form)
    evaluation = _table(loaded[eval_name], f"{source} (split {eval_name})", form) if eval_name else None
    return train, evaluation, None


# ---------------------------------------------------------------------------------------------------------------------
# Reading files
# ---------------------------------------------------------------------------------------------------------------------


def _table(rows: Any, source: str, form: str, definition: str | None = None) -> _Table:
    return _Table(rows, source, list(range(len(rows))), form, definition)


def _read_file(path: Path, form: str) -> _Table:
    source = f"'{path}'"
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise InputError(f"path: the type of '{path}' is not supported; use one of: {', '.join(SUFFIXES)}")
    if form == "cl_benchmark":
        raise InputError(
            f"path: the format 'cl_benchmark' needs a folder, and '{path}' is a file; give '{path.parent}'"
        )
    if suffix == ".parquet":
        rows: Any = _read_parquet(path)
    elif suffix == ".csv":
        rows = _read_csv(path)
    else:
        rows = _read_json(path)
        if isinstance(rows, Mapping):
            if form not in ("auto", "natural_instructions"):
                raise InputError(f"format: '{path}' is a JSON object, not a list of rows; use format: auto")
            return _ni_table(rows, source)
    if form == "natural_instructions":
        raise InputError(f"format: '{path}' is not a Natural-Instructions object with 'Definition' and 'Instances'")
    return _table(rows, source, form)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"path: '{path}' cannot be read ({error}); save it as UTF-8 text") from error


def _read_json(path: Path) -> Any:
    """A list of rows, or the object of a Natural-Instructions file. A `.json` file may hold JSON lines too."""
    text = _text(path)
    if path.suffix.lower() == ".json":
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            if not error.msg.startswith("Extra data"):
                raise InputError(f"path: '{path}' is not valid JSON ({error}); correct that place") from error
        else:
            if isinstance(content, Mapping) and "Instances" in content:
                return content
            if isinstance(content, Mapping):
                content = [content]
            if not isinstance(content, list):
                raise InputError(f"path: '{path}' holds a {type(content).__name__}; write a list of rows")
            return _check_rows(content, path)
    rows = []
    # Not str.splitlines: it also breaks at U+2028 and others, which JSON strings may hold.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise InputError(f"path: line {number} of '{path}' is not valid JSON ({error}); correct it") from error
    return _check_rows(rows, path)


def _check_rows(rows: list[Any], path: Path) -> list[Any]:
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise InputError(f"path: row {index} of '{path}' is {row!r}; write each row as an object with columns")
    return rows


def _read_csv(path: Path) -> list[dict[str, str]]:
    # The csv module, not pandas, which would read the label "None" or "NA" as a missing value.
    lines = _text(path).splitlines(keepends=True)
    limit = csv.field_size_limit(2**31 - 1)
    try:
        reader = csv.DictReader(lines, strict=True)
        rows = []
        for row in reader:
            if None in row or None in row.values():
                raise InputError(
                    f"path: line {reader.line_num} of '{path}' has another number of fields than the header; quote "
                    "fields that hold commas"
                )
            rows.append(dict(row))
        return rows
    except csv.Error as error:
        raise InputError(f"path: '{path}' is not valid CSV ({error}); correct that place") from error
    finally:
        csv.field_size_limit(limit)


def _read_parquet(path: Path) -> Dataset:
    import pyarrow
    import pyarrow.parquet
    from datasets.table import InMemoryTable

    try:
        return Dataset(InMemoryTable(pyarrow.parquet.read_table(path)))
    except (pyarrow.ArrowInvalid, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"path: '{path}' is not a valid parquet file ({reason}); write it again") from error


def _ni_table(content: Mapping[str, Any], source: str) -> _Table:
    definition = content.get("Definition")
    if isinstance(definition, list) and definition:
        definition = definition[0]
    if not isinstance(definition, str):
        raise InputError(f"path: {source} has no 'Definition'; add the task's instruction as a string or a list")
    instances = content.get("Instances")
    if not isinstance(instances, list):
        raise InputError(f"path: 'Instances' of {source} is not a list; write a list of rows")
    for index, row in enumerate(instances):
        if not isinstance(row, Mapping):
            raise InputError(f"path: instance {index} of {source} is {row!r}; write 'input' and 'output'")
    return _table(instances, source, "natural_instructions", definition)


def _read_labels(path: Path) -> list[str]:
    if not path.is_file():
        raise InputError(f"path: '{path}' is missing; the format 'cl_benchmark' needs it: a list of strings")
    try:
        labels = json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise InputError(f"path: '{path}' is not valid JSON ({error}); correct that place") from error
    if not isinstance(labels, list) or not labels or not all(isinstance(label, str) for label in labels):
        raise InputError(f'path: \'{path}\' is not a list of strings; write it as ["first", "second"]')
    return labels


def _cl_table(path: Path, labels: Sequence[str]) -> _Table:
    """A split in O-LoRA's layout as rows of `input` and `output`."""
    folder = Path(os.path.abspath(path)).parent
    group = {name.lower(): name for name in CL_INSTRUCTIONS}.get(folder.parent.name.lower())
    if group is None:
        raise InputError(
            f"path: '{folder}' lies in '{folder.parent.name}', which is no task group of the CL benchmark"
            f"{did_you_mean(folder.parent.name, CL_INSTRUCTIONS)}"
        )
    head = f"Task:{group}\nDataset:{folder.name}\n"
    if CL_INSTRUCTIONS[group] is not None:
        head += f"{CL_INSTRUCTIONS[group]} Choose one from the option.\nOption: {', '.join(labels)} \n"
    rows = _read_json(path) if path.suffix != ".csv" else _read_csv(path)
    if isinstance(rows, Mapping):
        raise InputError(f"path: '{path}' is a Natural-Instructions object; use format: natural_instructions")
    table = _table([], f"'{path}'", "input_output")
    for index, row in enumerate(rows):
        for column in ("sentence", "label"):
            if column not in row:
                raise InputError(f"path: row {index} of '{path}' has no '{column}'{did_you_mean(column, row)}")
            if not isinstance(row[column], str):
                raise InputError(
                    f"path: '{column}' in row {index} of '{path}' is {row[column]!r}, not a string; put it in quotes"
                )
        table.rows.append({"input": f"{head}{row['sentence']}\nAnswer:", "output": row["label"]})
    table.indices = list(range(len(table.rows)))
    return table


# ---------------------------------------------------------------------------------------------------------------------
# Choosing and converting rows
# ---------------------------------------------------------------------------------------------------------------------


def _order(count: int, seed: int) -> list[int]:
    """The order of `Dataset.shuffle(seed=seed)`."""
    return np.random.default_rng(seed).permutation(count).tolist()


def _subset(table: _Table, rows: int | None, seed: int) -> _Table:
    if rows is None or rows >= len(table.indices):
        return table
    indices = [table.indices[i] for i in _order(len(table.indices), seed)[:rows]]
    return _Table(table.rows, table.source, indices, table.format, table.definition)


def _hold_out(table: _Table, fraction: float, seed: int, name: str) -> tuple[_Table, _Table]:
    count = len(table.indices)
    if count < 2:
        raise InputError(
            f"task '{name}': {table.source} has one row and there is no evaluation split; add rows or set 'data_files'"
        )
    held = min(count - 1, max(1, round(count * fraction)))
    order = _order(count, seed)
    parts = sorted(order[held:]), sorted(order[:held])
    train, evaluation = (
        _Table(table.rows, table.source, [table.indices[i] for i in part], table.format, table.definition)
        for part in parts
    )
    return train, evaluation


def _pick_columns(table: _Table, columns: Mapping[str, str]) -> dict[str, str]:
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


def _canonical(table: _Table, columns: Mapping[str, str]) -> tuple[Dataset, list[str] | None]:
    """The canonical rows, and the names of the answers where the completion column is a `ClassLabel`."""
    chosen = _pick_columns(table, columns)
    names: list[str] | None = None
    if isinstance(table.rows, Dataset) and "completion" in chosen:
        feature = table.rows.features[chosen["completion"]]
        if isinstance(feature, ClassLabel):
            names = list(feature.names)
    result: dict[str, list[Any]] = {"prompt": [], "completion": [], "references": []}
    chat: bool | None = None
    for index, row in _iterate(table, chosen):
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
            prompt = _prompt(row.get(chosen["prompt"]), chosen["prompt"], where)
            answers = _answers(row.get(chosen["completion"]), chosen["completion"], where, names)
        if table.definition is not None:
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
    return Dataset.from_dict(result), names


def _iterate(table: _Table, chosen: Mapping[str, str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
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
        raise InputError(
            f"column '{column}' {where} is {_show(value)}, not a string; convert it or map another column"
        )
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
    raise InputError(
        f"column '{column}' {where} is {_show(value)}, not a string or a list of strings; "
        "convert it or map another column"
    )


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _check_labels(dataset: Dataset, labels: Sequence[str], table: _Table, tolerated: Sequence[str]) -> None:
    allowed = {*labels, *tolerated}
    for position, references in enumerate(dataset["references"]):
        if not allowed.intersection(references):
            raise InputError(
                f"labels: the answer {references[0]!r} in row {table.indices[position]} of {table.source} is not one "
                f"of the labels {', '.join(map(repr, labels))}; correct the row or the labels"
            )
