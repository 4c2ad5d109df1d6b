"""Published layouts that are more than rows of one file, each read into rows with plain columns.

`READERS` reads one file of a format; `arrange` then makes the splits that a layout leaves to its code: the start of a
corpus for validation, and training rows that go to the test split.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from .data_sources import Splits, Table, read_json, read_text, read_texts, stem_of, suffix_of
from .errors import InputError, did_you_mean

Rows = list[dict[str, Any]]

# DAS, dataloader/data.py, with config.py's validation_split_percentage: the first 5 % of the lines.
VALIDATION_PERCENT = 5
# Which endings of a file of rows its index file does not have: sgd_x-train-LLM_T5.json goes with sgd_x-train.idx.
SGD_ENDINGS = ("-LLM_T5", "-LLM")
SGD_FIELDS = ("json", "dialogue", "turn", "frame", "service", "slot")
POLARITIES = {"+": "positive", "-": "negative"}
# RoBERTa's separator, which its tokenizer reads as one token.
SEPARATOR = "</s>"
ASPECT = ("term", "sentence", "polarity")
HUMANEVAL = ("prompt", "canonical_solution", "test", "entry_point")


def read_sgd(path: Path) -> Rows:
    """TaSL's dialogue state tracking: rows of a `.json`, and who they are from the `.idx` beside it.

    Line i of the index belongs to row i and reads `json|||dialogue|||turn|||frame|||service|||slot`; the row gets the
    columns `dialogue`, `turn`, `service` and `slot`.
    """
    rows = _objects(path)
    stem = stem_of(path)
    stem = next((stem.removesuffix(end) for end in SGD_ENDINGS if stem.endswith(end)), stem)
    index = path.with_name(f"{stem}.idx")
    shape = "|||".join(SGD_FIELDS)
    if not index.is_file():
        raise InputError(
            f"path: '{path}' has no index '{index.name}' beside it; the format 'sgd' needs one with a line '{shape}' "
            "for each row"
        )
    lines = read_text(index).splitlines()
    if len(lines) != len(rows):
        raise InputError(
            f"path: '{index}' has {len(lines)} lines and '{path.name}' {len(rows)} rows; fetch both from one place, "
            "line and row belong together"
        )
    result = []
    for number, (line, row) in enumerate(zip(lines, rows, strict=True), 1):
        fields = line.strip().split("|||")
        if len(fields) != len(SGD_FIELDS):
            raise InputError(f"path: line {number} of '{index}' is {line[:80]!r}; write it as '{shape}'")
        _, dialogue, turn, _, service, slot = fields
        result.append({**row, "dialogue": dialogue, "turn": turn, "service": service, "slot": slot})
    return result


def read_aspect_sentiment(path: Path) -> Rows:
    """DAS's aspect sentiment: an object of `{"term", "sentence", "polarity"}`, as rows of `text` and `label`.

    The text is the term, RoBERTa's separator and the sentence. The polarities `+` and `-` get their names.
    """
    try:
        content = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise InputError(f"path: '{path}' is not valid JSON ({error}); correct that place") from error
    if not isinstance(content, Mapping) or not all(isinstance(row, Mapping) for row in content.values()):
        raise InputError(
            f"path: '{path}' is no object of rows; the format 'aspect_sentiment' reads "
            '{"<id>": {"term": ..., "sentence": ..., "polarity": ...}, ...}'
        )
    rows = []
    for name, row in content.items():
        term, sentence, polarity = (_string(row, key, f"row {name!r}", path) for key in ASPECT)
        rows.append({"text": f"{term} {SEPARATOR}{sentence}", "label": POLARITIES.get(polarity, polarity)})
    return rows


def read_corpus(path: Path) -> Rows:
    """One text a line, as rows of `text`; blank lines are left out."""
    if suffix_of(path) != ".txt":
        raise InputError(f"path: '{path}' is no .txt file; the format 'das_corpus' reads one text a line")
    return read_texts(path, "lines")


def read_code(path: Path, language: str | None = None) -> Rows:
    """Code instructions, and HumanEval's problems, as rows of `prompt` and `completion`.

    Evol-Instruct has `instruction` and `response`. OSS-Instruct has `problem`, `solution` and `lang`; with `language`
    only the rows in it are taken. Of HumanEval the completion is the canonical solution, and the columns `prefix` (its
    own prompt), `test` and `entry_point` are for the scorer pass@k. Problems are put as Magicoder puts them
    (src/magicoder/prompt_template.py, experiments/text2code.py).
    """
    rows = _objects(path)
    if rows and set(HUMANEVAL) <= set(rows[0]):
        return [_problem(row, number, path) for number, row in enumerate(rows)]
    result = []
    for number, row in enumerate(rows):
        where = f"row {number}"
        if "problem" in row:
            if language is not None and _string(row, "lang", where, path) != language:
                continue
            problem, response = _string(row, "problem", where, path), _string(row, "solution", where, path)
            instruction = f"Write a solution to the following coding problem:\n{problem}"
        else:
            if language is not None:
                raise InputError(
                    f"path: {where} of '{path}' has no 'problem'; rows of one language are taken from OSS-Instruct, "
                    "with 'lang', 'problem' and 'solution'"
                )
            instruction, response = (_string(row, key, where, path) for key in ("instruction", "response"))
        result.append({"prompt": instruction, "completion": response})
    if rows and not result:
        raise InputError(f"path: '{path}' has no row with lang: {language}; give OSS-Instruct's file of all languages")
    return result


def _problem(row: Mapping[str, Any], number: int, path: Path) -> dict[str, Any]:
    prompt, solution, test, entry_point = (_string(row, key, f"row {number}", path) for key in HUMANEVAL)
    instruction = f"Write a solution to the following problem:\n```python\n{prompt.strip()}\n```"
    extra = {"prefix": prompt, "test": test, "entry_point": entry_point}
    return {"prompt": instruction, "completion": solution, **extra}


READERS: dict[str, tuple[Callable[[Path], Rows], str]] = {
    "sgd": (read_sgd, "input_output"),
    "aspect_sentiment": (read_aspect_sentiment, "auto"),
    "das_corpus": (read_corpus, "auto"),
    "code_instructions": (read_code, "prompt_completion"),
    "code_instructions_python": (partial(read_code, language="python"), "prompt_completion"),
}
"""Of each format: what reads one of its files, and the plain format its rows then have."""


def arrange(spec: Mapping[str, Any], splits: Splits) -> Splits:
    """The splits as the layout's own code makes them.

    A `das_corpus` without an evaluation file gives the start of its lines for validation. With `train_share`, rows of
    each label go from the training to the evaluation split: see `move_rows`.

    Raises:
        InputError: for a corpus of one line, and for `train_share` without an evaluation split or labels.
    """
    train, evaluation, labels = splits
    if spec.get("format") == "das_corpus" and evaluation is None:
        held = round(len(train.rows) * VALIDATION_PERCENT / 100)
        if not held:
            raise InputError(
                f"path: {train.source} has {len(train.rows)} texts; a das_corpus needs more, its first "
                f"{VALIDATION_PERCENT} % are for validation"
            )
        evaluation = _table(train.rows[:held], train.source, train.format)
        train = _table(train.rows[held:], train.source, train.format)
    if spec.get("train_share") is not None:
        if evaluation is None:
            raise InputError(
                f"train_share: {spec['train_share']!r} needs an evaluation split to move rows to; name it in "
                "'data_files: {train: ..., eval: ...}'"
            )
        column = (spec.get("columns") or {}).get("label", "label")
        train, evaluation = move_rows(train, evaluation, spec["train_share"], spec.get("labels"), column)
    return train, evaluation, labels


def move_rows(
    train: Table, evaluation: Table, train_share: float, labels: Sequence[str] | None = None, column: str = "label"
) -> tuple[Table, Table]:
    """DAS's smaller training splits: of each label the first n training rows go to the end of the evaluation split.

    n = floor(rows * (1 - train_share) / labels), and fewer where a label has fewer (dataloader/data.py, "re-partition
    by classes").
    """
    found = [_label(row, column, number, train) for number, row in enumerate(train.rows)]
    labels = list(labels or dict.fromkeys(found))
    if not labels:
        return train, evaluation  # no rows, which whoever loads them refuses
    each = int(len(found) * (1 - train_share) // len(labels))
    moved: dict[str, list[int]] = {label: [] for label in labels}
    for number, label in enumerate(found):
        if label not in moved:
            raise InputError(
                f"labels: '{label}' in row {number} of {train.source} is not one of the labels "
                f"{', '.join(map(repr, labels))}{did_you_mean(label, labels)}"
            )
        if len(moved[label]) < each:
            moved[label].append(number)
    gone = {number for numbers in moved.values() for number in numbers}
    kept = [row for number, row in enumerate(train.rows) if number not in gone]
    more = [train.rows[number] for numbers in moved.values() for number in numbers]
    return (
        _table(kept, train.source, train.format),
        _table([*evaluation.rows, *more], f"{evaluation.source} with rows of {train.source}", evaluation.format),
    )


def _label(row: Mapping[str, Any], column: str, number: int, table: Table) -> str:
    label = row.get(column)
    if not isinstance(label, str):
        raise InputError(
            f"train_share: row {number} of {table.source} has no string '{column}', by which its rows are divided"
        )
    return label


def _table(rows: Any, source: str, form: str) -> Table:
    return Table(rows, source, list(range(len(rows))), form)


def _objects(path: Path) -> Rows:
    """The rows of a `.json` or `.jsonl` file."""
    if suffix_of(path) not in (".json", ".jsonl"):
        raise InputError(f"path: '{path}' is no .json or .jsonl file, which this format reads")
    rows = read_json(path)
    if isinstance(rows, Mapping):
        raise InputError(f"path: '{path}' is a Natural-Instructions object; this format reads a list of rows")
    return rows


def _string(row: Mapping[str, Any], key: str, where: str, path: Path) -> str:
    if key not in row:
        raise InputError(f"path: {where} of '{path}' has no '{key}'{did_you_mean(key, row)}")
    if not isinstance(row[key], str):
        raise InputError(f"path: '{key}' in {where} of '{path}' is {row[key]!r}, not a string; put it in quotes")
    return row[key]
