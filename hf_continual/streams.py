"""Named streams: the orders of the Standard and Long Sequence benchmarks, and a generated one to try things with."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .data import EVAL_SPLITS, load_task
from .errors import InputError, did_you_mean
from .quickstart_stream import QUICKSTART_TASKS, quickstart_tasks
from .tasks import Task

_SENTIMENT = ["very negative", "negative", "neutral", "positive", "very positive"]
# The task's group folder in the CL benchmark, and its labels in the order in which the prompt lists them.
_TASKS: dict[str, tuple[str, list[str]]] = {
    "amazon": ("SC", _SENTIMENT),
    "yelp": ("SC", _SENTIMENT),
    "imdb": ("SC", ["Good", "Bad"]),
    "sst-2": ("SC", ["Good", "Bad"]),
    "agnews": ("TC", ["World", "Sports", "Business", "Science or Technology"]),
    "dbpedia": (
        "TC",
        [
            "Company",
            "Educational Institution",
            "Artist",
            "Athlete",
            "Office Holder",
            "Mean of Transportation",
            "Building",
            "Natural Place",
            "Village",
            "Animal",
            "Plant",
            "Album",
            "Film",
            "Written Work",
        ],
    ),
    "yahoo": (
        "TC",
        [
            "Society & Culture",
            "Science & Mathematics",
            "Health",
            "Education & Reference",
            "Computers & Internet",
            "Sports",
            "Business & Finance",
            "Entertainment & Music",
            "Family & Relationships",
            "Politics & Government",
        ],
    ),
    "mnli": ("NLI", ["neutral", "entailment", "contradiction"]),
    "cb": ("NLI", ["entailment", "contradiction", "neutral"]),
    "rte": ("NLI", ["contradiction", "entailment"]),
    "qqp": ("QQP", ["False", "True"]),
    "boolqa": ("BoolQA", ["True", "False"]),
    "multirc": ("MultiRC", ["False", "True"]),
    "wic": ("WiC", ["True", "False"]),
    "copa": ("COPA", ["A", "B"]),
}
_ORDERS = {
    "standard-order1": "dbpedia amazon yahoo agnews",
    "standard-order2": "dbpedia amazon agnews yahoo",
    "standard-order3": "yahoo amazon agnews dbpedia",
    "long-order4": "mnli cb wic copa qqp boolqa rte imdb yelp amazon sst-2 dbpedia agnews multirc yahoo",
    "long-order5": "multirc boolqa wic mnli cb copa qqp rte imdb sst-2 dbpedia agnews yelp amazon yahoo",
    "long-order6": "yelp amazon mnli cb copa qqp rte imdb sst-2 dbpedia agnews yahoo multirc boolqa wic",
}
_SOURCE = "the CL_Benchmark folder of the O-LoRA repository, https://github.com/cmnfriend/O-LoRA"
_LAYOUT = "<Task>/<Dataset>/{train,dev,test,labels}.json or {train,dev}/<task>.jsonl"


def stream_names() -> list[str]:
    """The names that `load_stream` knows."""
    return [*_ORDERS, "quickstart"]


def describe_stream(name: str) -> dict[str, Any]:
    """The `tasks` of a stream in their order, the `source` of its data, and a `note`."""
    _check_name(name)
    if name == "quickstart":
        return {
            "tasks": list(QUICKSTART_TASKS),
            "source": "generated from the seed; needs no data",
            "note": "three short classification tasks in different formats, for trying things out",
        }
    tasks = _ORDERS[name].split()
    bench = "Standard CL benchmark" if name.startswith("standard") else "Long Sequence benchmark"
    return {
        "tasks": tasks,
        "source": _SOURCE,
        "note": f"order {name[-1]} of the {bench}, {len(tasks)} tasks; data_dir holds {_LAYOUT}",
    }


def load_stream(
    name: str,
    *,
    data_dir: str | Path | None = None,
    base_dir: str | Path | None = None,
    seed: int = 42,
    train_rows: int | None = None,
    eval_rows: int | None = None,
    scorer: str | None = None,
    eval_split: str | None = None,
) -> list[Task]:
    """The tasks of a named stream, in order.

    Args:
        name: one of `stream_names()`.
        data_dir: the benchmark's data, in either layout: `<Task>/<Dataset>/{train,dev,test,labels}.json` or
            `{train,dev}/<task>.jsonl`. The stream `quickstart` takes none.
        base_dir: folder that a relative `data_dir` starts from; the current directory is tried after it.
        seed: chooses the rows of `train_rows` and `eval_rows`, and generates `quickstart`.
        train_rows: at most so many random rows to learn per task (`quickstart`: 96 unless given).
        eval_rows: at most so many random rows to score per task (`quickstart`: 60 unless given).
        scorer: scorer of every task.
        eval_split: `train` scores on a held-out tenth of the training rows, for choosing options.

    Raises:
        InputError: if the stream is unknown or its data is not there.
    """
    _check_name(name)
    if name == "quickstart":
        if eval_split is not None:
            raise InputError("eval_split has no use, the stream 'quickstart' is generated; leave it out")
        if data_dir is not None:
            raise InputError(f"data_dir: '{data_dir}' has no use, the stream 'quickstart' is generated; leave it out")
        sizes = {"train_rows": train_rows, "eval_rows": eval_rows}
        return quickstart_tasks(
            seed=seed, scorer=scorer, **{key: value for key, value in sizes.items() if value is not None}
        )
    if data_dir is None:
        raise InputError(
            f"data_dir: the stream '{name}' needs its data; set data_dir to a folder with {_LAYOUT}, "
            f"published as {_SOURCE}"
        )
    root = _root(data_dir, base_dir)
    found = {task: _locate(root, task) for task in _ORDERS[name].split()}
    missing = [task for task, spec in found.items() if spec is None]
    if missing:
        raise InputError(
            f"data_dir: '{root}' lacks the tasks {', '.join(missing)} of the stream '{name}'; "
            f"it should hold {_LAYOUT}, published as {_SOURCE}"
        )
    if eval_split not in (None, "train"):
        raise InputError(f"eval_split={eval_split!r} must be 'train', or be left out for the stream's own split")
    rows = {"train_rows": train_rows, "eval_rows": eval_rows, "scorer": scorer, "eval_split": eval_split}
    return [
        load_task({"name": task, "labels": _TASKS[task][1], **rows, **(spec or {})}, seed=seed)
        for task, spec in found.items()
    ]


def _check_name(name: str) -> None:
    if name not in stream_names():
        raise InputError(f"stream: {name!r} is unknown{did_you_mean(str(name), stream_names())}")


def _root(data_dir: str | Path, base_dir: str | Path | None) -> Path:
    folders = [Path(base_dir), Path.cwd()] if base_dir is not None else [Path.cwd()]
    for folder in folders:
        root = folder / Path(data_dir).expanduser()
        if root.is_dir():
            return _child([root], "CL_Benchmark") or root
    raise InputError(
        f"data_dir: the folder '{data_dir}' does not exist; it should hold {_LAYOUT}, published as {_SOURCE}"
    )


def _child(folders: Iterable[Path | None], *names: str) -> Path | None:
    """The entry of the first folder that has one of these names, whatever their case."""
    for folder in folders:
        if folder is not None and folder.is_dir():
            entries = {entry.name.lower(): entry for entry in sorted(folder.iterdir())}
            for name in names:
                if name.lower() in entries:
                    return entries[name.lower()]
    return None


def _locate(root: Path, task: str) -> dict[str, Any] | None:
    """The part of a task spec that says where its data is."""
    folder = _child([_child([root], _TASKS[task][0])], task)
    if folder is not None and folder.is_dir() and _child([folder], "train.json"):
        return {"path": str(folder), "format": "cl_benchmark"}
    files = (f"{task}.jsonl", f"{task}.json")
    train = _child([_child([root], "train")], *files)
    if train is None:
        return None
    data_files = {"train": str(train)}
    evaluation = _child((_child([root], split) for split in EVAL_SPLITS), *files)
    if evaluation is not None:
        data_files["eval"] = str(evaluation)
    return {"data_files": data_files}
