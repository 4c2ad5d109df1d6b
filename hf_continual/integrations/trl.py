"""[`trl.SFTTrainer`] that learns one task after another without forgetting."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..trainer import ContinualMixin
from ..training_args import ContinualArgumentsMixin

try:
    from trl import SFTConfig, SFTTrainer
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
except ImportError as error:
    raise InputError(
        f"ContinualSFTTrainer needs trl, which cannot be imported ({error}); run pip install 'hf-continual[trl]'"
    ) from error


@dataclass
class ContinualSFTConfig(ContinualArgumentsMixin, SFTConfig):
    """[`~trl.SFTConfig`] plus [`ContinualArgumentsMixin`]."""


class _KeepColumns:
    """TRL's collator, which drops what it does not know, plus the columns of the methods."""

    def __init__(self, collator: Any, columns: list[str]) -> None:
        self.collator, self.columns = collator, columns

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        kept = {c: torch.as_tensor([e[c] for e in examples]) for c in self.columns if c in examples[0]}
        return {**self.collator(examples), **kept}


class ContinualSFTTrainer(ContinualMixin, SFTTrainer):
    """[`~trl.SFTTrainer`] that learns one task after another without forgetting.

    `extra_loss` gets the outputs that the loss was made of: TRL's fused head gives log-probabilities and no logits;
    with `compute_loss_func` they are the model's own.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        config = kwargs.get("args", args[1] if len(args) > 1 else None)
        if isinstance(config, ContinualArgumentsMixin) and not isinstance(config, SFTConfig):
            raise InputError(f"ContinualSFTTrainer takes ContinualSFTConfig as args, not {type(config).__name__}")
        super().__init__(*args, **kwargs)
        if self.methods.batch_columns and isinstance(self.data_collator, DataCollatorForLanguageModeling):
            self.data_collator = _KeepColumns(self.data_collator, self.methods.batch_columns)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        names = [m.name for m in self.methods if m.needs_logits]
        if names and self.compute_loss_func is None:
            raise InputError(
                f"method '{names[0]}' needs logits, which TRL's fused head never builds; give compute_loss_func=..., "
                "or use ContinualTrainer"
            )
        return super().train(*args, **kwargs)

    def _loss_and_outputs(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool, num_items_in_batch: Any
    ) -> tuple[Tensor, Any]:
        if return_outputs or not self.methods.overrides("extra_loss"):
            return super()._loss_and_outputs(model, inputs, return_outputs, num_items_in_batch)
        seen: list[Any] = []

        def recorded(**inputs: Any) -> Any:  # asked for its outputs, TRL runs the model a second time
            seen.append(model(**inputs))
            return seen[-1]

        loss = super(ContinualMixin, self).compute_loss(recorded, inputs, num_items_in_batch=num_items_in_batch)  # type: ignore[misc,arg-type]
        return loss, seen[0]
