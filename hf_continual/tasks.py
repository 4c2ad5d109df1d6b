"""A task of the stream: its data, and how it is trained and scored."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .errors import InputError


@dataclass
class Task:
    """One task of a stream.

    Args:
        name (`str`): unique within the stream; names its folder, so no path separators.
        train_dataset (`datasets.Dataset`, *optional*): rows to learn. In the queue: `prompt` (a string, or a list of
            chat messages) and `completion` (a string). Used by hand, whatever the Trainer takes.
        eval_dataset (`datasets.Dataset`, *optional*): rows to score; as above, plus `references` (a list of strings).
        labels (`list[str]`, *optional*): the possible answers, for `scorer="label_likelihood"`.
        scorer (`str`, *optional*): a name of `hf_continual.scorers.SCORERS`; `None` takes the queue's default.
        training (`dict`): training arguments that differ for this task, such as `{"num_train_epochs": 2}`.
        index (`int`): position in the stream, from 0. The queue sets it.

    Raises:
        InputError: if `name` is empty or cannot be a folder name.
    """

    name: str
    train_dataset: Any = None
    eval_dataset: Any = None
    labels: Sequence[str] | None = None
    scorer: str | None = None
    training: dict[str, Any] = field(default_factory=dict)
    index: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not re.fullmatch(r"[A-Za-z0-9][\w.+=@ -]*", self.name):
            raise InputError(
                f"task name {self.name!r} cannot name a folder: use letters, digits, '.', '_' and '-', "
                "starting with a letter or a digit"
            )

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def folder(self) -> str:
        """Folder of this task in a run directory, such as `00-agnews`."""
        return f"{self.index:02d}-{self.name}"


def check_stream(tasks: Sequence[Task]) -> None:
    """Refuse an empty stream and duplicate names."""
    if not tasks:
        raise InputError("tasks: the stream is empty; give at least one task")
    seen: set[str] = set()
    for task in tasks:
        if task.name in seen:
            raise InputError(f"tasks: two tasks are named '{task.name}'; give each its own name")
        seen.add(task.name)
