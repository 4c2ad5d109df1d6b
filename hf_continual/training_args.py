"""Training arguments: the parent's, plus the methods."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from transformers import Seq2SeqTrainingArguments, TrainingArguments

from .errors import InputError

if TYPE_CHECKING:
    MethodSpec = Any
else:
    MethodSpec = str  # HfArgumentParser calls it on every word after --methods


@dataclass
class ContinualArgumentsMixin:
    """Fields added to `TrainingArguments`.

    > Parameters that control continual learning

    Args:
        methods (`list`, *optional*): names (`"migu"`), mappings with options (`{"name": "migu", "threshold": 0.7}`),
            or either as JSON text, as the command line gives them. Method objects go to the trainer.
        stop_on_nonfinite_loss (`bool`, defaults to `False`): stop with a sentence when the loss becomes NaN or
            infinite, checked when the Trainer logs, saves or ends. The task queue turns it on; `Trainer` goes on.
    """

    methods: list[MethodSpec] | None = field(
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
    if not isinstance(spec, (str, Mapping)):
        raise InputError(
            f"args.methods: {spec!r} is no name or mapping; give method objects to the trainer's methods="
        )
    return spec


@dataclass
class ContinualTrainingArguments(ContinualArgumentsMixin, TrainingArguments):
    """[`~transformers.TrainingArguments`] plus [`ContinualArgumentsMixin`]."""


@dataclass
class ContinualSeq2SeqTrainingArguments(ContinualArgumentsMixin, Seq2SeqTrainingArguments):
    """[`~transformers.Seq2SeqTrainingArguments`] plus [`ContinualArgumentsMixin`]."""
