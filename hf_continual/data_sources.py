"""Where rows come from: files, folders of splits, benchmark layouts and the hub, each read into a `Table`."""

from __future__ import annotations

import csv
import gzip
import json
import os
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

from .errors import InputError, did_you_mean

FORMATS = (
    "auto",
    "input_output",
    "prompt_completion",
    "conversational",
    "cl_benchmark",
    "natural_instructions",
    # of .txt files: what of one is a text
    "lines",
    "paragraphs",
    "document",
    # read by stream_layouts
    "sgd",
    "aspect_sentiment",
    "das_corpus",
    "code_instructions",
    "code_instructions_python",
)
EVAL_SPLITS = ("dev", "eval", "validation", "test")
SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".txt", ".gz")
TEXT_FORMATS = ("lines", "paragraphs", "document")
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


@dataclass
class Table:
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


# ---------------------------------------------------------------------------------------------------------------------
# Finding the splits
# ---------------------------------------------------------------------------------------------------------------------

BUILDERS = ("json", "csv", "parquet")
Splits = tuple[Table, "Table | None", "list[str] | None"]


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


def read_splits(spec: Mapping[str, Any], roots: Sequence[Path]) -> Splits:
    from .stream_layouts import arrange  # which reads by functions of this module

    return arrange(spec, _read_splits(spec, roots))


def _read_splits(spec: Mapping[str, Any], roots: Sequence[Path]) -> Splits:
    form = spec.get("format", "auto")
    path = str(spec["path"]) if spec.get("path") is not None else None
    files = spec.get("data_files")
    if path is None and files is None:
        path = str(spec["data_dir"])
    found = _find(path, roots) if path is not None and path not in BUILDERS else None

    if files is not None and (path is None or path in BUILDERS or (found is not None and found.is_dir())):
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


def _read_data_files(spec: Mapping[str, Any], files: Any, roots: Sequence[Path]) -> Splits:
    if not isinstance(files, Mapping):
        files = {"train": files}
    train_name = spec.get("train_split") or "train"
    eval_names = (spec["eval_split"],) if spec.get("eval_split") else EVAL_SPLITS
    for key in files:
        if key not in (train_name, *eval_names, *EVAL_SPLITS):
            raise InputError(f"data_files: split {key!r} is unknown{did_you_mean(key, (train_name, *eval_names))}")
    if train_name not in files:
        raise InputError(f"data_files: the split '{train_name}' is missing; add '{train_name}: <file>'")
    if spec.get("eval_split") and spec["eval_split"] not in files:
        raise InputError(
            f"eval_split: {spec['eval_split']!r} is not in data_files{did_you_mean(spec['eval_split'], files)}"
        )

    def read(split: str) -> Table:
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


def _read_template(spec: Mapping[str, Any], path: str, roots: Sequence[Path]) -> Splits:
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
            files[stem_of(file)] = file
    files.pop("labels", None)
    return files


def _read_folder(spec: Mapping[str, Any], folder: Path, form: str) -> Splits:
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


def _read_hub(spec: Mapping[str, Any], path: str) -> Splits:
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


def _pick_splits(spec: Mapping[str, Any], loaded: Any, source: str) -> Splits:
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


def _table(rows: Any, source: str, form: str, definition: str | None = None) -> Table:
    return Table(rows, source, list(range(len(rows))), form, definition)


def _read_file(path: Path, form: str) -> Table:
    from .stream_layouts import READERS

    source = f"'{path}'"
    if form in READERS:
        read, plain = READERS[form]
        return _table(read(path), source, plain)
    suffix = suffix_of(path)
    if suffix not in SUFFIXES:
        raise InputError(f"path: the type of '{path}' is not supported; use one of: {', '.join(SUFFIXES)}")
    if form == "cl_benchmark":
        raise InputError(
            f"path: the format 'cl_benchmark' needs a folder, and '{path}' is a file; give '{path.parent}'"
        )
    if suffix == ".txt":
        return _table(read_texts(path, form), source, "auto")
    if form in TEXT_FORMATS:
        raise InputError(f"format: '{form}' is for .txt files, and '{path}' is none; use format: auto")
    if suffix == ".parquet":
        rows: Any = _read_parquet(path)
    elif suffix == ".csv":
        rows = _read_csv(path)
    else:
        rows = read_json(path)
        if isinstance(rows, Mapping):
            if form not in ("auto", "natural_instructions"):
                raise InputError(f"format: '{path}' is a JSON object, not a list of rows; use format: auto")
            return _ni_table(rows, source)
    if form == "natural_instructions":
        raise InputError(f"format: '{path}' is not a Natural-Instructions object with 'Definition' and 'Instances'")
    return _table(rows, source, form)


def stem_of(path: Path) -> str:
    """The name without what kind of file it is; of `train.jsonl.gz`, `train`."""
    return Path(path.stem).stem if path.suffix.lower() == ".gz" else path.stem


def suffix_of(path: Path) -> str:
    """What kind of file it is; of `train.jsonl.gz`, `.jsonl`."""
    if path.suffix.lower() != ".gz":
        return path.suffix.lower()
    inner = Path(path.stem).suffix.lower()
    return inner if inner in (".json", ".jsonl", ".csv", ".txt") else ""


def read_text(path: Path) -> str:
    """The text of a file, unpacked if it is a `.gz`."""
    try:
        if path.suffix.lower() != ".gz":
            return path.read_text(encoding="utf-8-sig")
        with gzip.open(path, "rt", encoding="utf-8-sig") as file:
            return file.read()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise InputError(f"path: '{path}' cannot be read ({error}); save it as UTF-8 text") from error


def read_texts(path: Path, form: str) -> list[dict[str, str]]:
    """The texts of a `.txt` file: its lines, unless `form` says otherwise; without those that are blank."""
    if form not in ("auto", *TEXT_FORMATS):
        raise InputError(
            f"format: '{path}' is plain text, which '{form}' is not; use lines, paragraphs (between blank lines) or "
            "document (the whole file)"
        )
    text = read_text(path)
    if form == "document":
        texts = [text]
    elif form == "paragraphs":
        texts = re.split(r"\n\s*\n", text)
    else:
        texts = text.split("\n")
    return [{"text": part.strip("\n")} for part in texts if part.strip()]


def read_json(path: Path) -> Any:
    """A list of rows, or the object of a Natural-Instructions file. A `.json` file may hold JSON lines too."""
    text = read_text(path)
    if suffix_of(path) == ".json":
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            if not error.msg.startswith("Extra data"):
                raise InputError(f"path: '{path}' is not valid JSON ({error}); correct that place") from error
        else:
            if isinstance(content, Mapping) and "Instances" in content:
                return content
            if isinstance(content, Mapping):
                wrapped = [key for key, value in content.items() if isinstance(value, list) and value
                           and all(isinstance(row, Mapping) for row in value)]  # fmt: skip
                if len(content) == 1 and wrapped and wrapped[0] != "messages":
                    raise InputError(
                        f"path: '{path}' is an object whose '{wrapped[0]}' holds the rows; write the list alone"
                    )
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
    lines = read_text(path).splitlines(keepends=True)
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


def _ni_table(content: Mapping[str, Any], source: str) -> Table:
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
        labels = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise InputError(f"path: '{path}' is not valid JSON ({error}); correct that place") from error
    if not isinstance(labels, list) or not labels or not all(isinstance(label, str) for label in labels):
        raise InputError(f'path: \'{path}\' is not a list of strings; write it as ["first", "second"]')
    return labels


def cl_prompt(group: str, dataset: str, options: str, sentence: str) -> str:
    """O-LoRA's prompt."""
    head = f"Task:{group}\nDataset:{dataset}\n"
    if CL_INSTRUCTIONS[group] is not None:
        head += f"{CL_INSTRUCTIONS[group]} Choose one from the option.\nOption: {options} \n"
    return f"{head}{sentence}\nAnswer:"


def _cl_table(path: Path, labels: Sequence[str]) -> Table:
    """A split in O-LoRA's layout as rows of `input` and `output`."""
    folder = Path(os.path.abspath(path)).parent
    group = {name.lower(): name for name in CL_INSTRUCTIONS}.get(folder.parent.name.lower())
    if group is None:
        raise InputError(
            f"path: '{folder}' lies in '{folder.parent.name}', which is no task group of the CL benchmark"
            f"{did_you_mean(folder.parent.name, CL_INSTRUCTIONS)}"
        )
    rows = read_json(path) if suffix_of(path) != ".csv" else _read_csv(path)
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
        table.rows.append(
            {"input": cl_prompt(group, folder.name, ", ".join(labels), row["sentence"]), "output": row["label"]}
        )
    table.indices = list(range(len(table.rows)))
    return table
