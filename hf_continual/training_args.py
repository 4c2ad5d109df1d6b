"""Training arguments: the parent's, plus the methods."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers import Seq2SeqTrainingArguments, TrainingArguments

from .errors import InputError, did_you_mean

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
        raise InputError(f"args.methods: {spec!r} is no name or mapping; give method objects to the trainer's methods=")
    return spec


@dataclass
class ContinualTrainingArguments(ContinualArgumentsMixin, TrainingArguments):
    """[`~transformers.TrainingArguments`] plus [`ContinualArgumentsMixin`]."""


@dataclass
class ContinualSeq2SeqTrainingArguments(ContinualArgumentsMixin, Seq2SeqTrainingArguments):
    """[`~transformers.Seq2SeqTrainingArguments`] plus [`ContinualArgumentsMixin`]."""


def make_training_args(options: Mapping[str, Any], seq2seq: bool) -> TrainingArguments:
    """Training arguments for one task; unknown names are refused with the nearest one."""
    cls = ContinualSeq2SeqTrainingArguments if seq2seq else ContinualTrainingArguments
    known = {f.name for f in dataclasses.fields(cls) if f.init}
    for option in options:
        if option not in known:
            raise InputError(f"training.{option} is not a training argument{did_you_mean(option, known)}")
    defaults = {
        "report_to": "none",
        "save_total_limit": 1,
        "stop_on_nonfinite_loss": True,
        "dataloader_pin_memory": torch.cuda.is_available(),  # without one it does nothing but warn
    }
    for field_ in dataclasses.fields(cls):
        if field_.name in options and not _fits(options[field_.name], field_.type):
            raise InputError(
                f"training.{field_.name}={options[field_.name]!r} must be of type {_type_name(field_.type)}"
            )
    try:
        return cls(**{**defaults, **options})
    except InputError:
        raise
    except (TypeError, ValueError) as error:
        raise InputError(f"training: {error}") from error


def _fits(value: Any, annotation: Any) -> bool:
    """Whether a value suits a field that takes numbers or truth values alone; other fields check their own."""
    kinds = set(typing.get_args(annotation) or [annotation])
    if not kinds <= {int, float, bool, type(None)}:
        return True
    return type(value) in kinds or (type(value) is int and float in kinds)


def _type_name(annotation: Any) -> str:
    names = [kind.__name__ for kind in typing.get_args(annotation) or [annotation] if kind is not type(None)]
    return " or ".join(names)
