"""Stream files: one YAML file defines a published stream, and here it is found, checked and resolved.

A reference to a stream is `name`, `name:variant`, or either with `@hash`; a path of a stream file can be the name.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..data import TASK_KEYS
from ..data_sources import FORMATS
from ..errors import InputError, did_you_mean
from ..scorers import get as get_scorer
from ..tasks import KINDS, Task
from ..yaml_files import overlay, parse_yaml, read_text
from .quickstart import QUICKSTART_TASKS

DEFINITIONS = Path(__file__).parent / "definitions"
TOP_KEYS = {
    "name": "how the stream is cited; default: the file's name",
    "title": "one line for `hf-continual ls streams`",
    "paper": "the paper it is from",
    "source": "where the data is published",
    "licence": "what is known of the data's licence",
    "note": "what a reader of its scores should know",
    "extends": "a stream whose keys are taken over; those given here lie over them",
    "order": "the tasks, in the order in which they are learnt; default: that of `tasks`",
    "lengths": "defaults of the recipe's `data:`",
    "evaluation": "defaults of the recipe's `evaluation:`",
    "training": "defaults of the recipe's `training:`",
    "layout": "what data_dir holds, in words",
    "defaults": "keys of every task, under the task's own",
    "tasks": "the tasks by name",
    "variants": "{name: {key: ...}}: cited as name:variant, with these keys laid over",
}
STREAM_TASK_KEYS = {
    "layouts": "where the data is below data_dir, tried in this order",
    "hub": "the dataset that is loaded when no data_dir is given",
    "template": "the prompt, from a row's columns",
    "labels": "the possible answers, in the prompt's order",
    "extra_answers": "answers outside the labels that training rows may have",
    "scorer": "a name of hf_continual.scorers",
    "kind": "completion, clm, mlm or classification",
    "train_rows": "at most so many rows to learn",
    "eval_rows": "at most so many rows to score",
    "eval_split": "the split that is scored; default: the first there is of dev, eval, validation and test",
    "eval_fraction": "the part of the training rows that is held out where no split is there to score",
    "published_rows": "{train: N, eval: N}: how many rows the paper has, for the reader",
    "training": "training arguments of this task",
    "end_task": "of a pre-training task: what is fine-tuned from its checkpoint, with the same keys",
    "note": "what a reader of its scores should know",
}
END_TASK_KEYS = {
    **{key: text for key, text in STREAM_TASK_KEYS.items() if key != "end_task"},
    "name": "default: the name of the task it is of",
    "seeds": "it is fine-tuned once with each",
    "peft": "LoRA options; default: all weights are fine-tuned",
}
_NOT_IN_LAYOUT = {
    "name",
    "end_task",
    "labels",
    "extra_answers",
    "scorer",
    "kind",
    "train_rows",
    "eval_rows",
    "training",
}
LAYOUT_KEYS = tuple(key for key in TASK_KEYS if key not in _NOT_IN_LAYOUT)
_TEXTS = ("name", "title", "paper", "source", "licence", "note", "layout", "extends")
_REFERENCE = re.compile(r"(?P<base>.*?\.ya?ml|[^:@]*)(?::(?P<variant>[^@:]*))?(?:@(?P<hash>.*))?", re.S)


@dataclass(frozen=True)
class Stream:
    """A stream as its file defines it, without its data.

    Attributes:
        name: as it is cited, such as `standard-order1` or `standard-order1:tasl`.
        tasks: the keys of each task, in the order in which they are learnt.
        lengths, evaluation, training: defaults of the recipe's sections `data:`, `evaluation:` and `training:`.
        variants: names of the variants, with their titles.
        pinned: the hash that the data must have, if the reference names one.
        file: where it is defined; None if it is generated.
    """

    name: str
    tasks: dict[str, dict[str, Any]]
    title: str = ""
    paper: str = ""
    source: str = ""
    licence: str = ""
    note: str = ""
    layout: str = ""
    lengths: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    variants: dict[str, str] = field(default_factory=dict)
    pinned: str | None = None
    file: Path | None = None

    @property
    def where_published(self) -> str:
        """The expected layout and the source, for messages."""
        parts = [f"it should hold {' '.join(self.layout.split())}"] if self.layout else []
        return ", ".join(parts + ([f"published as {self.source}"] if self.source else []))


QUICKSTART = Stream(
    name="quickstart",
    tasks={name: {} for name in QUICKSTART_TASKS},
    title="three short classification tasks in different formats, for trying things out",
    source="generated from the seed; needs no data",
    licence="that of this package",
)


def stream_names() -> list[str]:
    """The names of the streams that this package brings."""
    return [*sorted(path.stem for path in DEFINITIONS.glob("*.yaml")), QUICKSTART.name]


def split_reference(reference: str) -> tuple[str, str | None, str | None]:
    """(name or path, variant, hash) of a reference.

    Raises:
        InputError: if it is no reference, or the hash no hash.
    """
    if not isinstance(reference, str | Path):
        raise InputError(f"stream: {reference!r} is unknown{did_you_mean(str(reference), stream_names())}")
    match = _REFERENCE.fullmatch(str(reference))
    if match is None:
        raise InputError(f"stream: {str(reference)!r} is no reference; write name, name:variant or name:variant@hash")
    base, variant, pinned = match["base"], match["variant"], match["hash"]
    if pinned is not None and not re.fullmatch(r"[0-9a-f]{12,64}", pinned):
        raise InputError(
            f"stream: '@{pinned}' of {str(reference)!r} is no hash; write the 12 hexadecimal digits that "
            "`hf-continual ls streams` shows, or leave it out"
        )
    return base, variant, pinned


def absolute_reference(reference: Any, base_dir: Path) -> Any:
    """A reference to a stream file by an absolute path; any other reference as it is."""
    if not isinstance(reference, str):
        return reference
    base, _, _ = split_reference(reference)
    if not _is_path(base):
        return reference
    found = _file(base, base_dir)
    return f"{found.resolve()}{reference[len(base) :]}" if found is not None else reference


def find_stream(reference: str | Path | Stream, base_dir: str | Path | None = None) -> Stream:
    """The definition that a reference names.

    Args:
        base_dir: folder that a relative path starts from; the current directory is tried after it.

    Raises:
        InputError: if there is none, or its file cannot be used.
    """
    if isinstance(reference, Stream):
        return reference
    base, variant, pinned = split_reference(reference)  # type: ignore[arg-type]
    if _is_path(base):
        found = _file(base, Path(base_dir) if base_dir is not None else None)
        if found is None:
            raise InputError(f"stream: the file '{base}' does not exist; give a stream file, or a name of a stream: "
                             f"{', '.join(stream_names())}")  # fmt: skip
        path = found
    else:
        if base not in stream_names():
            raise InputError(f"stream: {base!r} is unknown{did_you_mean(base, stream_names())}")
        if base == QUICKSTART.name:
            if variant is not None:
                raise InputError(f"stream: {str(reference)!r}: the stream 'quickstart' has no variants; leave it out")
            return dataclasses.replace(QUICKSTART, pinned=pinned)
        path = DEFINITIONS / f"{base}.yaml"
    return _resolve(path, variant, pinned)


def _is_path(base: str) -> bool:
    return base.endswith((".yaml", ".yml")) or "/" in base


def _file(base: str, base_dir: Path | None) -> Path | None:
    for folder in (base_dir, Path.cwd()):
        if folder is not None and (folder / Path(base).expanduser()).is_file():
            return folder / Path(base).expanduser()
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Reading a file
# ---------------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def _parsed(text: str, where: str) -> Any:
    """Parsed once, since each of the many runs of a recipe resolves its stream; not to be changed."""
    return parse_yaml(text, where)


def _read(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The keys of a file, over those of the stream it extends."""
    if path.resolve() in seen:
        raise InputError(f"stream file {path}: extends: the files extend each other in a circle; remove one `extends`")
    content = copy.deepcopy(_parsed(read_text(path, "stream file"), f"stream file {path}"))
    if not isinstance(content, dict):
        raise InputError(f"stream file {path} is no mapping; write keys such as `order:` and `tasks:`")
    where = f"stream file {path}: "
    _known(content, TOP_KEYS, where)
    for key in _TEXTS:
        if content.get(key) is not None and not isinstance(content[key], str):
            raise InputError(f"{where}{key}: {content[key]!r} is not a string; put it in quotes")
    _mappings(content, ("lengths", "evaluation", "training", "defaults", "tasks", "variants"), where)
    content = {key: value for key, value in content.items() if value is not None}
    content.setdefault("name", path.stem)
    parent = content.pop("extends", None)
    if parent is None:
        return content
    parent_base, parent_variant, _ = split_reference(parent)
    if parent_variant is not None:
        raise InputError(f"{where}extends: '{parent}' names a variant; name the stream alone")
    parent_path = path.parent / parent_base if _is_path(parent_base) else DEFINITIONS / f"{parent_base}.yaml"
    if not parent_path.is_file():
        names = [name for name in stream_names() if name != QUICKSTART.name]
        raise InputError(f"{where}extends: there is no stream '{parent}'{did_you_mean(parent_base, names)}")
    inherited = _read(parent_path, (*seen, path.resolve()))
    return overlay(inherited, content)  # type: ignore[no-any-return]


def _resolve(path: Path, variant: str | None, pinned: str | None) -> Stream:
    where = f"stream file {path}: "
    content = _read(path)
    name = content["name"]
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
        raise InputError(f"{where}name: {name!r} cannot be cited; use letters, digits, '.', '_' and '-'")
    variants = content.pop("variants", {})
    for key, over in variants.items():
        inside = f"{where}variants.{key}: "
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", str(key)):
            raise InputError(f"{inside}{key!r} cannot be cited; use letters, digits, '.', '_' and '-'")
        if not isinstance(over, dict):
            raise InputError(f"{inside}{over!r} is not a mapping of keys of the stream")
        _known(over, [key for key in TOP_KEYS if key not in ("name", "extends", "variants")], inside)
        _mappings(over, ("lengths", "evaluation", "training", "defaults", "tasks"), inside)
        for task in over.get("tasks") or {}:
            if task not in (content.get("tasks") or {}):
                raise InputError(f"{inside}tasks: the stream has no task {task!r}"
                                 f"{did_you_mean(task, content.get('tasks') or {})}")  # fmt: skip
    if variant is not None:
        if variant not in variants:
            hint = did_you_mean(variant, variants) if variants else "; leave it out, it has no variants"
            raise InputError(f"stream: '{name}' has no variant '{variant}'{hint}")
        titles = [title for title in (content.get("title"), variants[variant].get("title")) if title]
        content = {**overlay(content, variants[variant]), "title": ": ".join(titles)}
        where += f"variants.{variant}: "
    tasks = _ordered_tasks(content, where)
    texts: dict[str, Any] = {
        key: content.get(key) or "" for key in ("title", "paper", "source", "licence", "note", "layout")
    }
    sections: dict[str, Any] = {key: dict(content.get(key) or {}) for key in ("lengths", "evaluation", "training")}
    return Stream(
        name=name if variant is None else f"{name}:{variant}",
        tasks=tasks,
        variants={str(key): str(over.get("title") or "") for key, over in variants.items()},
        pinned=pinned,
        file=path,
        **texts,
        **sections,
    )


def _ordered_tasks(content: Mapping[str, Any], where: str) -> dict[str, dict[str, Any]]:
    given = content.get("tasks") or {}
    if not given:
        raise InputError(f"{where}tasks: there are none; write {{name: {{layouts: [...]}}}}")
    order = content.get("order")
    if order is None:
        order = list(given)
    if not isinstance(order, list) or not order or not all(isinstance(name, str) for name in order):
        raise InputError(f"{where}order: {order!r} is not a list of names of tasks")
    for name in order:
        if name not in given:
            raise InputError(f"{where}order: there is no task '{name}' in `tasks`{did_you_mean(name, given)}")
        if order.count(name) > 1:
            raise InputError(f"{where}order: '{name}' stands there twice; a stream learns each task once")
    defaults = content.get("defaults") or {}
    _check_task_keys(defaults, f"{where}defaults.")
    tasks = {}
    for name in order:
        own = given[name] if given[name] is not None else {}
        _mappings({name: own}, (name,), f"{where}tasks.")
        _check_task_keys(own, f"{where}tasks.{name}.")
        task = {key: value for key, value in overlay(dict(defaults), own).items() if value is not None}
        _check_task(name, task, f"{where}tasks.{name}.")
        tasks[name] = _filled(task, name)
    return tasks


def _check_task_keys(task: Mapping[str, Any], where: str, known: Mapping[str, str] = STREAM_TASK_KEYS) -> None:
    _known(task, known, where)
    _mappings(task, ("training", "hub", "end_task", "published_rows"), where)


def _check_task(name: str, task: Mapping[str, Any], where: str) -> None:
    """Everything about a task that needs no data."""
    try:
        Task(name)
    except InputError as error:
        raise InputError(f"{where.removesuffix('.')}: {error}") from None
    layouts = task.get("layouts", [])
    if not isinstance(layouts, list) or not all(isinstance(layout, Mapping) for layout in layouts):
        raise InputError(f"{where}layouts: {layouts!r} is not a list of mappings; write [{{path: FILE}}]")
    if not layouts and not task.get("hub"):
        raise InputError(
            f"{where}layouts: the task has no data; add `layouts: [{{path: FILE}}]` or `hub: {{path: ID}}`"
        )
    for number, layout in enumerate(layouts):
        _check_layout(layout, f"{where}layouts.{number}.")
    if task.get("hub"):
        _known(task["hub"], LAYOUT_KEYS, f"{where}hub.")
        if not isinstance(task["hub"].get("path"), str):
            raise InputError(f"{where}hub.path is missing; write the dataset's id, such as org/name")
    if "scorer" in task:
        get_scorer(task["scorer"], f"{where}scorer")
    if task.get("kind", "completion") not in KINDS:
        raise InputError(f"{where}kind: {task['kind']!r} is unknown{did_you_mean(str(task['kind']), KINDS)}")
    for key in ("labels", "extra_answers"):
        answers = task.get(key)
        if answers is not None and (
            not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers)
        ):
            wrong = (
                next((a for a in answers if not isinstance(a, str)), answers) if isinstance(answers, list) else answers
            )
            raise InputError(f"{where}{key}: {wrong!r} is no list of strings; put each answer in quotes")
    for key in ("template", "eval_split"):
        if key in task and not isinstance(task[key], str):
            raise InputError(f"{where}{key}: {task[key]!r} is not a string; put it in quotes")
    for key in ("train_rows", "eval_rows"):
        value = task.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise InputError(f"{where}{key}: {value!r} is not a whole number above 0; leave it out to use all rows")
    _known(task.get("published_rows") or {}, ("train", "eval"), f"{where}published_rows.")
    for split, rows in (task.get("published_rows") or {}).items():
        if rows is not None and (isinstance(rows, bool) or not isinstance(rows, int) or rows < 1):
            raise InputError(f"{where}published_rows.{split}: {rows!r} is not a whole number above 0; leave it out")
    if "end_task" in task:
        _check_task_keys(task["end_task"], f"{where}end_task.", END_TASK_KEYS)
        _check_task(task["end_task"].get("name", name), task["end_task"], f"{where}end_task.")


def _check_layout(layout: Mapping[str, Any], where: str) -> None:
    _known(layout, LAYOUT_KEYS, where)
    if ("path" in layout) == ("data_files" in layout):
        raise InputError(f"{where.removesuffix('.')}: give either path or data_files, which say where the rows are")
    if layout.get("format", "auto") not in FORMATS:
        raise InputError(
            f"{where}format: {layout['format']!r} is unknown{did_you_mean(str(layout['format']), FORMATS)}"
        )
    if "path" in layout:
        if not isinstance(layout["path"], str) or Path(layout["path"]).is_absolute():
            raise InputError(f"{where}path: {layout['path']!r} is no path below data_dir; write it relative to that")
        return
    files = layout["data_files"]
    if not isinstance(files, Mapping) or "train" not in files:
        raise InputError(f"{where}data_files: {files!r} names no train file; write {{train: FILE, test: FILE}}")
    for split, names in files.items():
        for file in names if isinstance(names, list) and names else [names]:
            if not isinstance(file, str) or Path(file).is_absolute():
                raise InputError(f"{where}data_files.{split}: {file!r} is no file below data_dir; write it relative "
                                 "to that")  # fmt: skip


def _filled(task: dict[str, Any], name: str) -> dict[str, Any]:
    """A task with its name in place of `{task}` in paths."""

    def fill(value: Any) -> Any:
        if isinstance(value, str):
            return value.replace("{task}", name)
        if isinstance(value, list):
            return [fill(item) for item in value]
        return {key: fill(item) for key, item in value.items()} if isinstance(value, dict) else value

    filled = dict(task)
    for key in ("layouts", "hub"):
        if key in filled:
            places = filled[key] if key == "layouts" else [filled[key]]
            done = [{k: fill(v) if k in ("path", "data_files", "subset") else v for k, v in p.items()} for p in places]
            filled[key] = done if key == "layouts" else done[0]
    if "end_task" in filled:
        filled["end_task"] = _filled(filled["end_task"], name)
    return filled


def check_sections(stream: Stream) -> None:
    """Refuse `lengths` and `evaluation` that the recipe's sections could not have; apart, since this brings torch."""
    from ..evaluation import EvaluationConfig
    from ..task_queue import DataConfig

    for key, values, cls in (
        ("lengths", stream.lengths, DataConfig),
        ("evaluation", stream.evaluation, EvaluationConfig),
    ):
        where = f"stream file {stream.file}: {key}."
        _known(values, [f.name for f in dataclasses.fields(cls)], where)
        try:
            cls(**values)
        except InputError as error:
            raise InputError(f"{where.removesuffix('.')}: {error}") from None


def _known(given: Mapping[str, Any], known: Any, where: str) -> None:
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), list(known), n=1, cutoff=0.0)
            raise InputError(f"{where}{key} is no key of a stream file; did you mean '{near[0]}'?")


def _mappings(content: Mapping[str, Any], keys: tuple[str, ...], where: str) -> None:
    for key in keys:
        if content.get(key) is not None and not isinstance(content[key], dict):
            raise InputError(f"{where}{key}: {content[key]!r} is not a mapping; write it as `name: value` lines")
