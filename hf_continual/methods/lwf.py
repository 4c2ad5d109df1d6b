r"""LwF: on the new task's rows, keep the predictions that the model made before it began to learn them.

    L = L_task + w T^2 mean over the positions that predict a label of KL(softmax(z_old / T) || softmax(z_new / T))

Source: Li and Hoiem, "Learning without Forgetting", arXiv:1606.09282, Eq. 2-3 with one head for all tasks; T^2, which
keeps the gradient's size, is from Hinton et al., arXiv:1503.02531 (`weight: 0.25` is the paper's loss at T = 2).
TRACE's code (BeyonderXX/TRACE, model/Regular/LwF.py) has the arguments of KL reversed, KL(new || old) without T^2; sums
over all tokens, padding too, and divides by rows only; and holds the logits of a whole task in memory, by the number of
the step, so that from the second epoch on they are those of other rows if the order changes. Here z_old is one more
forward a batch, by the same model with the weights of before.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import functional as F

from ..distillation import shifts_labels, teacher_forward, trainable_copy
from ..distributed import ALL_BACKENDS
from ..errors import InputError
from .base import ContinualMethod, MethodContext

COLUMN = "lwf_positions"


@dataclass
class LwFConfig:
    weight: float = field(
        default=1.0,
        metadata={
            "help": "w (paper and TRACE: 1). Each task but the first keeps a copy of the trainable weights on the "
            "device: small with LoRA, another copy of the whole model with full fine-tuning."
        },
    )
    temperature: float = field(default=2.0, metadata={"help": "T, above 0 (paper and TRACE: 2)."})

    def __post_init__(self) -> None:
        for option in ("weight", "temperature"):
            value = getattr(self, option)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not 0 <= value < float("inf") or (option == "temperature" and value == 0):
                raise InputError(
                    f"{option}={value!r} must be a number {'above' if option == 'temperature' else 'of at least'} 0"
                )


def distillation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)) of each row of logits; [..., classes] -> [...]."""
    dtype = torch.promote_types(student.dtype, torch.float32)
    old = F.log_softmax(teacher.to(dtype) / temperature, dim=-1)
    new = F.log_softmax(student.to(dtype) / temperature, dim=-1)
    return temperature**2 * F.kl_div(new, old, reduction="none", log_target=True).sum(-1)


def without_peft(model: Any) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def label_positions(labels: Tensor, shift: bool) -> Tensor:
    """Positions of the logits that predict a label, row by row and padded with -1: [rows, most labels of a row].

    Rows with a single label have the one position 0.
    """
    if labels.dim() == 1:
        return torch.zeros(len(labels), 1, dtype=torch.long, device=labels.device)
    known = labels != -100
    if shift:
        known = F.pad(known[:, 1:], (0, 1), value=False)
    most = max(1, int(known.sum(-1).max())) if known.numel() else 1
    order = torch.argsort(known.to(torch.uint8), dim=-1, descending=True, stable=True)[:, :most]
    return torch.where(known.gather(1, order), order, -1)


def logits_at_labels(logits: Tensor, positions: Tensor, labels: Tensor, method: str) -> Tensor:
    """[rows, most labels of a row, classes]; where the position is -1, logits of no meaning."""
    if logits.shape[-1] < 2 or labels.is_floating_point():
        raise InputError(
            f"method '{method}' needs predictions that are one of several classes, and this model has none"
        )
    if logits.dim() == 2:
        return logits.unsqueeze(1)
    if logits.shape[1] != labels.shape[1]:
        raise InputError(
            f"method '{method}': the model gives {logits.shape[1]} logits for {labels.shape[1]} labels, so it cannot "
            "be known which belong together; train without prompt tuning"
        )
    index = positions.clamp_min(0).unsqueeze(-1).expand(-1, -1, logits.shape[-1])
    return logits.gather(1, index)


def with_positions(collator: Callable[[list[Any]], Any], shift: bool, rows: list[Any]) -> dict[str, Any]:
    """A batch that says where its labels are. On the CPU, where counting them waits for nothing."""
    batch = dict(collator(rows))
    if torch.is_tensor(batch.get("labels")):
        batch[COLUMN] = label_positions(batch["labels"], shift)
    return batch


class LwF(ContinualMethod[LwFConfig]):
    """Learning without forgetting. Logs `lwf/distillation`, weight included.

    It has no state: the teacher is the model as it was when the task began.
    """

    config_class = LwFConfig
    supports = ALL_BACKENDS
    paper = "arxiv:1606.09282"
    batch_columns = (COLUMN,)
    neutral = {"weight": 0.0}

    def __init__(self, config: LwFConfig | None = None, **options: Any) -> None:
        super().__init__(config, **options)
        self.needs_logits = bool(self.config.weight)
        self._teacher: dict[str, Tensor] = {}
        self._inputs: set[str] = set()
        self._old: Any = None

    def on_task_begin(self, ctx: MethodContext) -> None:
        self._teacher = {}
        if ctx.task.is_first or not self.config.weight:
            return
        self._teacher = trainable_copy(ctx.model, ctx.dist)
        base = without_peft(ctx.model)
        self._inputs = set(inspect.signature(base.forward).parameters)
        if not getattr(getattr(base, "config", None), "is_encoder_decoder", False):
            self._inputs.discard("labels")  # the teacher's own loss is of no use; T5 makes decoder inputs of labels

    def data_collator(self, ctx: MethodContext, collator: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
        return partial(with_positions, collator, shifts_labels(ctx.model)) if self._teacher else collator

    def forward_kwargs(self, ctx: MethodContext, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Asks the teacher before the student's forward: then no activations are there yet."""
        if not self._teacher:
            return {}
        if COLUMN not in batch:
            raise InputError(
                "method 'lwf': a batch has no `labels`, so it has no predictions to keep; give every row labels"
            )
        inputs = {name: value for name, value in batch.items() if name in self._inputs}
        if "use_cache" in self._inputs:
            inputs["use_cache"] = False
        logits = teacher_forward(ctx, self._teacher, inputs).logits
        self._old = logits_at_labels(logits, batch[COLUMN], batch["labels"], self.name)
        return {}

    def extra_loss(self, ctx: MethodContext, batch: Mapping[str, Any], outputs: Any) -> dict[str, Tensor]:
        if not self._teacher:
            return {}
        positions = batch[COLUMN]
        new = logits_at_labels(outputs.logits, positions, batch["labels"], self.name)
        weights = (positions >= 0).to(torch.float32)
        kept = distillation(new, self._old, self.config.temperature) * weights
        self._old = None
        return {"lwf/distillation": self.config.weight * kept.sum() / weights.sum().clamp_min(1)}

    def on_task_end(self, ctx: MethodContext) -> None:
        self._teacher, self._old = {}, None
