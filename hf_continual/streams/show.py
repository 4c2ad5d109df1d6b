"""What `hf-continual ls streams` prints."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tabulate import tabulate

from ..data import answers_outside_labels
from ..data_sources import cl_prompt
from ..tasks import DEFAULT_SCORERS
from .definition import Stream, check_sections, find_stream, stream_names
from .loading import load, named_hash, stream_hash

WIDTH = 110
HELD_OUT = "held out of train"


def streams_text() -> str:
    """One line a stream."""
    rows = []
    for name in stream_names():
        stream = find_stream(name)
        variants = f" (variants: {', '.join(stream.variants)})" if stream.variants else ""
        rows.append([name, len(stream.tasks), f"{stream.title}{variants}"])
    return tabulate(rows, ["stream", "tasks", ""], tablefmt="plain", colalign=("left", "right", "left"))


def stream_text(reference: str, data_dir: str | Path | None = None) -> str:
    """One stream: what its file says, and with data what it resolves to, with the hash it is cited by."""
    stream = find_stream(reference)
    check_sections(stream)
    lines = [f"{stream.name}: {stream.title}"]
    for key in ("paper", "source", "licence", "note", "layout"):
        if getattr(stream, key):
            label = "data_dir" if key == "layout" else key
            text = " ".join(getattr(stream, key).split())
            lines.append(textwrap.fill(f"{label}: {text}", WIDTH, subsequent_indent="    ", break_long_words=False))
    for section, values in (("data", stream.lengths), ("evaluation", stream.evaluation), ("training", stream.training)):
        if values:
            lines.append(f"{section}: {_pairs(values)}")
    for name, title in stream.variants.items():
        lines.append(f"variant {stream.name.split(':')[0]}:{name}: {title}")
    lines += ["", _tasks(stream), *_templates(stream)]
    if data_dir is None and stream.file is not None:
        hubs = dict.fromkeys(task["hub"]["path"] for task in stream.tasks.values() if "hub" in task)
        hub = f"Without a data_dir it is loaded from the hub: {', '.join(hubs)}. " if hubs else ""
        return "\n".join([*lines, "", f"{hub}With --data_dir DIR: the rows that are found there, and their hash."])
    return "\n".join([*lines, "", _found(stream, data_dir)])


def _tasks(stream: Stream) -> str:
    rows = []
    for name, task in stream.tasks.items():
        rows.append(_row(name, task, stream))
        if "end_task" in task:
            end = task["end_task"]
            rows.append(_row(f"  end task {end.get('name', name)}", end, stream, kind="classification"))
    headers = ["task", "kind", "scorer", "published rows", "splits", "labels", "training"]
    used = [i for i in range(len(headers)) if i == 0 or any(row[i] for row in rows)]
    return tabulate([[row[i] for i in used] for row in rows], [headers[i] for i in used], disable_numparse=True)


def _row(name: str, task: Mapping[str, Any], stream: Stream, kind: str = "completion") -> list[str]:
    kind = task.get("kind", kind)
    scorer = task.get("scorer") or DEFAULT_SCORERS.get(kind) or stream.evaluation.get("scorer", "exact_match")
    published = task.get("published_rows") or {}
    sizes = " + ".join(str(published.get(key) or "?") for key in ("train", "eval")) if published else ""
    labels = task.get("labels") or []
    shown = ", ".join(labels) if len(", ".join(labels)) <= 40 else f"{len(labels)}: {', '.join(labels)[:33]}..."
    training = {**(task.get("training") or {}), **{k: task[k] for k in ("seeds", "peft") if task.get(k)}}
    return [name, kind, scorer, sizes, _splits(task), shown, _pairs(training)]


def _splits(task: Mapping[str, Any]) -> str:
    """Which split is scored, as far as the file alone says."""
    if "eval_split" in task:
        return str(task["eval_split"])
    named = [layout["data_files"] for layout in task.get("layouts", ()) if "data_files" in layout]
    names = dict.fromkeys(split for files in named for split in files if split != "train")
    if named and len(named) == len(task["layouts"]):
        return ", ".join(names) or HELD_OUT
    return "dev or test, else held out"


def _templates(stream: Stream) -> list[str]:
    """The prompts: once if all tasks have the same."""
    templates: dict[str, list[str]] = {}
    for name, task in stream.tasks.items():
        own = [layout["template"] for layout in task.get("layouts", ()) if "template" in layout]
        for layout in task.get("layouts", ()):
            if layout.get("format") == "cl_benchmark":  # the group is the folder above the data set's
                group = layout["path"].split("/")[-2]
                own.append(cl_prompt(group, "{dataset}", "{labels}", "{sentence}"))
        for template in dict.fromkeys([*own, *([task["template"]] if "template" in task else [])]):
            templates.setdefault(template, []).append(name)
    lines = []
    for template, names in templates.items():
        who = "" if len(names) == len(stream.tasks) else f" of {', '.join(names)}"
        lines.append(textwrap.fill(f"prompt{who}: {template!r}", WIDTH, subsequent_indent="    "))
    return ["", *lines] if lines else []


def _found(stream: Stream, data_dir: str | Path | None) -> str:
    tasks, sources = load(stream, data_dir=data_dir)
    rows = []
    for task in tasks:
        source = sources[task.name]
        outside = answers_outside_labels(task)
        rows.append(
            [task.name, len(task.train_dataset), len(task.eval_dataset), source.evaluation or HELD_OUT,
             outside or "", source.train]
        )  # fmt: skip
    headers = ["task", "train rows", "eval rows", "scored split", "answers outside labels", "from"]
    if not any(row[4] for row in rows):
        rows, headers = [row[:4] + row[5:] for row in rows], headers[:4] + headers[5:]
    cited = named_hash(stream.name, stream_hash(tasks, stream))
    return f"{tabulate(rows, headers)}\n\nstream: {cited}"


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}: {value}" for key, value in values.items())
