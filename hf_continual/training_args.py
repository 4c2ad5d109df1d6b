"""Training arguments: the parent's, plus the methods."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from transformers import Seq2SeqTrainingArguments, TrainingArguments

from .errors import InputError


@dataclass
class ContinualArgumentsMixin:
    """Fields added to `TrainingArguments`.

    > Parameters that control continual learning

    Args:
        methods (`list`, *optional*): names (`"migu"`), mappings with options (`{"name": "migu", "threshold": 0.7}`), or
            either as JSON text, as the command line gives them.
        stop_on_nonfinite_loss (`bool`, defaults to `False`): stop with a sentence when the loss becomes NaN or infinite,
            checked when the Trainer logs, saves or ends. The task queue turns it on; `Trainer` itself goes on.
    """

    methods: list[Any] | None = field(
        default=None,
        metadata={
            "help": 'Continual-learning methods, by name or as JSON such as \'{"name": "migu", "threshold": 0.7}\'.'
        },
    )
    stop_on_nonfinite_loss: bool = field(
        default=False, metadata={"help": "Stop with a sentence when the loss becomes NaN or infinite."}
    )

    def __post_init__(self) -> None:
        if isinstance(self.methods, (str, dict)):
            self.methods = [self.methods]
        self.methods = [_parse(spec) for spec in self.methods] if self.methods is not None else None
        super().__post_init__()  # type: ignore[misc]


def _parse(spec: Any) -> Any:
    if isinstance(spec, str) and spec.lstrip().startswith("{"):
        try:
            return json.loads(spec)
        except json.JSONDecodeError as error:
            raise InputError(f'methods: {spec!r} is not JSON ({error}); write \'{{"name": "migu"}}\'') from error
    return spec


@dataclass
class ContinualTrainingArguments(ContinualArgumentsMixin, TrainingArguments):
    """[`~transformers.TrainingArguments`] plus [`ContinualArgumentsMixin`]."""


@dataclass
class ContinualSeq2SeqTrainingArguments(ContinualArgumentsMixin, Seq2SeqTrainingArguments):
    """[`~transformers.Seq2SeqTrainingArguments`] plus [`ContinualArgumentsMixin`]."""
