"""Named streams: published sequences of tasks, each defined by a file and cited by a hash over what it resolves to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..tasks import Task
from .definition import Stream, absolute_reference, find_stream, stream_names
from .loading import load, named_hash, stream_hash

__all__ = [
    "Stream",
    "absolute_reference",
    "describe_stream",
    "find_stream",
    "load_stream",
    "named_hash",
    "stream_hash",
    "stream_names",
]


def describe_stream(name: str | Path | Stream, base_dir: str | Path | None = None) -> dict[str, Any]:
    """The `tasks` of a stream in their order, the `source` of its data, and a `note`."""
    stream = find_stream(name, base_dir)
    layout = f"; data_dir holds {' '.join(stream.layout.split())}" if stream.layout else ""
    return {"tasks": list(stream.tasks), "source": stream.source, "note": f"{stream.title}{layout}"}


def load_stream(
    name: str | Path | Stream,
    *,
    data_dir: str | Path | None = None,
    base_dir: str | Path | None = None,
    seed: int = 42,
    train_rows: int | None = None,
    eval_rows: int | None = None,
    scorer: str | None = None,
    eval_split: str | None = None,
    order: Sequence[str] | None = None,
) -> list[Task]:
    """The tasks of a stream, in order.

    Args:
        name: one of `stream_names()` or the path of a stream file; with `:variant` and `@hash` if wanted. With a hash,
            anything that resolves to another one is refused.
        data_dir: the stream's data in a layout of its definition, upper or lower case; without it the data is loaded
            from the hub, if it is published there. The stream `quickstart` takes none.
        base_dir: folder that a relative `data_dir` and path start from; the current directory is tried after it.
        seed: chooses the rows of `train_rows`, `eval_rows` and of a held-out part, and generates `quickstart`.
        train_rows: at most so many random rows to learn per task (`quickstart`: 96 unless given).
        eval_rows: at most so many random rows to score per task (`quickstart`: 60 unless given).
        scorer: scorer of every task.
        eval_split: the split to score, such as `test`; `train` scores on a held-out tenth of the training rows, for
            choosing options.
        order: these tasks of the stream alone, in this order.

    Raises:
        InputError: if the stream is unknown, its file or its data cannot be used, or the hash is another.
    """
    stream = find_stream(name, base_dir)
    tasks, _ = load(
        stream,
        data_dir=data_dir,
        base_dir=base_dir,
        seed=seed,
        train_rows=train_rows,
        eval_rows=eval_rows,
        scorer=scorer,
        eval_split=eval_split,
        order=order,
    )
    return tasks
