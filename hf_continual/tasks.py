"""A task of the stream: its data, and how it is trained and scored."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from .errors import InputError, did_you_mean, refuse_unknown

KINDS = ("completion", "clm", "mlm", "classification")
"""What is learnt of a row: its completion, all its text, masked tokens of its text, or its label."""
TEXT_KINDS = ("clm", "mlm")
"""Kinds that learn plain text: continual pre-training."""
DEFAULT_SCORERS = {"clm": "perplexity", "mlm": "perplexity", "classification": "macro_f1"}
"""Of tasks that name none; those of the kind `completion` take the queue's."""


@dataclass
class Task:
    """One task of a stream.

    Args:
        name (`str`): unique within the stream; names its folder, so no path separators.
        train_dataset (`datasets.Dataset`, *optional*): rows to learn. In the queue: `prompt` (a string, or a list of
            chat messages) and `completion` (a string); of the kinds `clm` and `mlm` `text` (a string), or plain
            strings; of `classification` `text`, perhaps `text_pair`, and `label`. Used by hand, whatever the Trainer
            takes.
        eval_dataset (`datasets.Dataset`, *optional*): rows to score; as above, for completions plus `references` (a
            list of strings), for texts perhaps `domain`, whose perplexities are then kept too.
        labels (`list[str]`, *optional*): the possible answers, for `scorer="label_likelihood"`; the classes of a
            classification.
        scorer (`str`, *optional*): a name of `hf_continual.scorers.SCORERS`; `None` takes the queue's default, for
            texts perplexity and for a classification macro-F1.
        training (`dict`): training arguments that differ for this task, such as `{"num_train_epochs": 2}`.
        index (`int`): position in the stream, from 0. The queue sets it.
        kind (`str`): one of `KINDS`: `completion` learns the completion of a prompt, `clm` the next token of plain
            text, `mlm` its masked tokens; `classification` is for end tasks alone.
        end_task ([`EndTask`], a [`Task`] or a mapping, *optional*): fine-tuned from the model after each task of the
            stream; its score is then the task's. For the kinds `clm` and `mlm`.

    Raises:
        InputError: if `name` is empty or cannot be a folder name, or `kind`, `scorer` and `end_task` do not fit.
    """

    name: str
    train_dataset: Any = None
    eval_dataset: Any = None
    labels: Sequence[str] | None = None
    scorer: str | None = None
    training: dict[str, Any] = field(default_factory=dict)
    index: int = 0
    kind: str = "completion"
    end_task: Any = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not re.fullmatch(r"[A-Za-z0-9][\w.+=@ -]*", self.name):
            raise InputError(
                f"task name {self.name!r} cannot name a folder: use letters, digits, '.', '_' and '-', "
                "starting with a letter or a digit"
            )
        refuse_twice(self.labels or (), f"task '{self.name}': ")
        if self.kind not in KINDS:
            raise InputError(f"task '{self.name}': kind={self.kind!r} is unknown{did_you_mean(str(self.kind), KINDS)}")
        if self.scorer is None:
            self.scorer = DEFAULT_SCORERS.get(self.kind)
        if self.is_text and self.scorer != "perplexity":
            raise InputError(
                f"task '{self.name}': scorer '{self.scorer}' needs answers, and a task of kind '{self.kind}' has text "
                "alone; leave the scorer out, which is then perplexity"
            )
        if self.end_task is not None:
            if not self.is_text:
                raise InputError(
                    f"task '{self.name}': end_task is for tasks of pre-training, and this one is of kind "
                    f"'{self.kind}'; set its kind to clm or mlm"
                )
            self.end_task = EndTask.of(self.end_task, self.name)

    @property
    def is_text(self) -> bool:
        """Whether it learns plain text."""
        return self.kind in TEXT_KINDS

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def folder(self) -> str:
        """Folder of this task in a run directory, such as `00-agnews`."""
        return f"{self.index:02d}-{self.name}"


def refuse_twice(labels: Sequence[str], where: str = "") -> None:
    """Raise InputError if an answer stands in `labels` twice."""
    if twice := sorted({label for label in labels if list(labels).count(label) > 1}):
        raise InputError(f"{where}labels holds {twice[0]!r} twice; give each answer once")


@dataclass
class EndTask(Task):
    """A task that is fine-tuned from the model after each task of the stream, and scored; nothing of it is kept.

    Args:
        kind (`str`): `classification` (a new head on the model's encoder) or `completion` (causal models).
        training (`dict`): its training arguments. Of the queue's it takes only those that say on what and how
            precisely to compute.
        seeds (`list[int]`): it is fine-tuned once with each; its score is the mean.
        peft (`dict`, *optional*): LoRA options; by default all weights are fine-tuned.
    """

    kind: str = "classification"
    seeds: Sequence[int] = (42,)
    peft: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        where = f"end_task '{self.name}'"
        if self.is_text:
            raise InputError(f"{where}: kind='{self.kind}' is one of pre-training; choose classification or completion")
        seeds = [self.seeds] if isinstance(self.seeds, int) and not isinstance(self.seeds, bool) else self.seeds
        right = isinstance(seeds, list | tuple) and seeds
        if not right or any(not isinstance(s, int) or isinstance(s, bool) or s < 0 for s in seeds):
            raise InputError(f"{where}: seeds={self.seeds!r} must be a list of whole numbers, such as [1, 2, 3]")
        if len(set(seeds)) < len(seeds):
            raise InputError(f"{where}: seeds={self.seeds!r} has one seed twice; give each once")
        self.seeds = list(seeds)
        if self.peft is not None and not isinstance(self.peft, Mapping):
            raise InputError(f"{where}: peft={self.peft!r} must map LoraConfig options to values, or be left out")

    @classmethod
    def of(cls, given: Any, owner: str) -> EndTask:
        """An end task from what stands for one; without a name it has that of its task."""
        if isinstance(given, cls):
            return given
        known = [f.name for f in fields(cls)]
        if isinstance(given, Task):
            given = {name: getattr(given, name) for name in known if hasattr(given, name)}
        if not isinstance(given, Mapping):
            raise InputError(f"task '{owner}': end_task={given!r} must be a task: a Task, or a mapping of its options")
        refuse_unknown(given, known, "end_task.")
        return cls(**{"name": owner, **given})


def check_stream(tasks: Sequence[Task]) -> None:
    """Refuse an empty stream, duplicate names, and kinds of task that no model can learn together."""
    if not tasks:
        raise InputError("tasks: the stream is empty; give at least one task")
    seen: set[str] = set()
    for task in tasks:
        if task.name in seen:
            raise InputError(f"tasks: two tasks are named '{task.name}'; give each its own name")
        seen.add(task.name)
        if task.kind == "classification" and not isinstance(task, EndTask):
            raise InputError(
                f"task '{task.name}': kind 'classification' is for end tasks; put it under `end_task` of a task of "
                "kind clm or mlm, or let the model write the label, with kind: completion"
            )
        if (task.kind == "mlm") != (tasks[0].kind == "mlm"):
            raise InputError(
                f"task '{task.name}' is of kind '{task.kind}' and '{tasks[0].name}' of kind '{tasks[0].kind}'; one "
                "model cannot learn both, so use mlm for all tasks or for none"
            )
