"""Training arguments: the parent's, plus the methods."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DynamoBackend
from transformers import GenerationConfig, Seq2SeqTrainingArguments, TrainingArguments

from .errors import InputError, did_you_mean
from .scorers import get as get_scorer

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
        eval_scorer (`str`, *optional*): with `predict_with_generate`, the scorer of `hf_continual.scorers` that
            `evaluate()` scores the answers by; by default `exact_match` where there is no `compute_metrics`.
        eval_max_prompt_length (`int`, *optional*, defaults to 512): with `predict_with_generate`, longer prompts of
            evaluation rows that are text lose what stands before their last line.
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
    eval_scorer: str | None = field(
        default=None,
        metadata={"help": "With predict_with_generate: the scorer of the answers, such as exact_match or rouge_l."},
    )
    eval_max_prompt_length: int | None = field(
        default=None, metadata={"help": "With predict_with_generate: longer prompts of text rows are cut (512)."}
    )

    def __post_init__(self) -> None:
        generates = getattr(self, "predict_with_generate", False)
        for option in ("eval_scorer", "eval_max_prompt_length", "generation_max_length"):
            value = getattr(self, option, None)
            if value is None:
                continue
            if not generates and option.startswith("eval_"):
                raise InputError(f"{option}={value!r} scores generated answers; set predict_with_generate=True with it")
            if option == "eval_scorer":
                get_scorer(value, "eval_scorer")
            elif not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"{option}={value!r} must be a whole number of tokens above 0")
        if isinstance(self.methods, (str, dict)):
            self.methods = [self.methods]
        self.methods = [_parse(spec) for spec in self.methods] if self.methods is not None else None
        backend = getattr(self, "torch_compile_backend", None)
        if backend is not None and str(backend).upper() not in DynamoBackend.list():
            known = [name.lower() for name in DynamoBackend.list()]
            raise InputError(f"torch_compile_backend={backend!r} is unknown{did_you_mean(str(backend), known)}")
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
    """[`~transformers.TrainingArguments`] plus [`ContinualArgumentsMixin`], and generation as for encoder-decoders.

    Args:
        predict_with_generate (`bool`, *optional*, defaults to `False`): `evaluate()` also generates an answer to each
            row's prompt and scores it.
        generation_max_length (`int`, *optional*, defaults to 50): the longest answer, in tokens; the prompt does not
            count.
        generation_config (`str` or `Path` or [`~generation.GenerationConfig`], *optional*): settings such as beams, as
            in [`~transformers.Seq2SeqTrainingArguments`]. By default answers are greedy, whatever the model's own
            settings are.
    """

    predict_with_generate: bool = field(default=False, metadata={"help": "Generate and score answers in evaluate()."})
    generation_max_length: int | None = field(
        default=None, metadata={"help": "The longest answer that evaluate() generates, in tokens (50)."}
    )
    generation_config: str | Path | GenerationConfig | None = field(
        default=None, metadata={"help": "A GenerationConfig, or a folder or hub id with one, for evaluate()."}
    )

    def to_dict(self) -> dict[str, Any]:
        """As the parent's, with a `GenerationConfig` as a mapping."""
        values = super().to_dict().items()
        return {name: value.to_dict() if isinstance(value, GenerationConfig) else value for name, value in values}


@dataclass
class ContinualSeq2SeqTrainingArguments(ContinualArgumentsMixin, Seq2SeqTrainingArguments):
    """[`~transformers.Seq2SeqTrainingArguments`] plus [`ContinualArgumentsMixin`]."""


LEAST: dict[str, float] = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 0,
    "max_grad_norm": 0,
    "learning_rate": 0,
    "weight_decay": 0,
}
"""Arguments whose values below this the Trainer takes, and fails on later or trains nothing."""


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
    for option, least in LEAST.items():
        value = options.get(option)
        if value is not None and not value >= least:
            raise InputError(
                f"training.{option}={value!r} must be at least {least}; leave it out for the Trainer's own"
            )
    try:
        return cls(**{**defaults, **options})
    except InputError:
        raise
    except (TypeError, ValueError, ImportError) as error:
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
