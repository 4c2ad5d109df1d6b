r"""KIF: after each task, merge every rank-1 skill unit of LoRA by how much more the new task needs it than the past.

    c = exp(I_k / tau) / (exp(I_k / tau) + exp(Ihat_{k-1} / tau)) = sigmoid((I_k - Ihat_{k-1}) / tau)        per unit
    \hat u_k = (1 - c) \hat u_{k-1} + c u_k                    u = row A[r, :] with column B[:, r]

on normalised scores (`importance.py`), and while training, over all n matrices A and B of the model,

    L = L_task + lambda / n \sum_A ||A A^T - I||_F + lambda / n \sum_B ||B^T B - I||_F              not squared

Source: Feng et al., "KIF: Knowledge Identification and Fusion for Language Model Continual Learning",
arXiv:2408.05200, and its code at github.com/WoodScene/TaSL. METHODS.md lists where they disagree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ..distributed import GradView, full_shape
from ..errors import InputError
from ..importance import Order, check_lengths, normalise
from ..skill_fusion import SkillFusion, SkillFusionConfig
from .base import MethodContext
from .tasl import categorical_coefficients

FORMS = ("norm", "squared", "decorrelation", "off")


@dataclass
class KIFConfig(SkillFusionConfig):
    units: Literal["auto", "matrix", "lora_matrix", "lora_rank1"] = field(
        default="lora_rank1",
        metadata={"help": "As in TaSL; KIF's own are the rank-1 units of LoRA. matrix is for full fine-tuning."},
    )
    order: Order = field(
        default="mix", metadata={"help": "Importance of one weight at a step: |wg|, (wg)^2 or |wg - (wg)^2/2| (KIF)."}
    )
    fusion: Literal["adaptive", "categorical"] = field(
        default="adaptive", metadata={"help": "Coefficients of KIF, or the four cases of TaSL with shared = 0.3."}
    )
    temperature: float = field(
        default=0.25, metadata={"help": "tau of the adaptive fusion (the code: 0.25); larger is closer to one half."}
    )
    orthogonality: float = field(
        default=0.1, metadata={"help": "lambda (the code: 0.1). Its gradient counts for the importance, as there."}
    )
    orthogonality_form: Literal["norm", "squared", "decorrelation", "off"] = field(
        default="norm",
        metadata={
            "help": "norm: ||G - I||_F (the code). squared: its square. decorrelation: only the entries beside the "
            "diagonal, so that rows need not have length one. off: no such loss."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fusion not in ("adaptive", "categorical"):
            raise InputError(f"fusion={self.fusion!r} is unknown; choose adaptive or categorical")
        if self.orthogonality_form not in FORMS:
            raise InputError(f"orthogonality_form={self.orthogonality_form!r} is unknown; choose {', '.join(FORMS)}")
        for option, low in (("temperature", 0), ("orthogonality", -1)):
            value = getattr(self, option)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not low < value < float("inf") or value < 0:
                raise InputError(f"{option}={value!r} must be a number {'above' if low == 0 else 'of at least'} 0")


def adaptive_coefficients(
    current: Tensor, previous: Tensor, temperature: float = 0.25, *, normalisation: str = "minmax"
) -> Tensor:
    """c = sigmoid((I_k - Ihat_{k-1}) / tau).

    Args:
        current: I_k, [units]; normalised here, and normalised scores stay as they are.
        previous: Ihat_{k-1}, [units].
        temperature: tau > 0.
        normalisation: see `normalise`.

    Returns:
        float64, [units], in (0, 1).
    """
    if not temperature > 0:
        raise InputError(f"temperature={temperature!r} must be a number above 0")
    check_lengths(current, previous)
    return torch.sigmoid((normalise(current, normalisation) - normalise(previous, normalisation)) / temperature)


def orthogonality(matrices: Tensor, form: str = "norm") -> Tensor:
    """||M M^T - I||_F of each matrix, or another `form` of it; `matrices` [n, r, d] -> [n]."""
    gram = matrices @ matrices.transpose(-1, -2)
    eye = torch.eye(gram.shape[-1], device=gram.device, dtype=gram.dtype)
    off = gram - (gram * eye if form == "decorrelation" else eye)
    norms = torch.linalg.vector_norm(off, dim=(-2, -1))
    return norms.square() if form == "squared" else norms


class KIF(SkillFusion[KIFConfig]):
    """Knowledge identification and fusion; with `replay_ratio` its variant with a memory, KIF-M.

    Logs the orthogonality term as `kif/orthogonality`; the evaluation loss does not contain it (the code's does).
    """

    config_class = KIFConfig
    paper = "arxiv:2408.05200"

    def on_task_begin(self, ctx: MethodContext) -> None:
        super().on_task_begin(ctx)
        self._groups: list[tuple[list[str], bool]] = []
        if not self.config.orthogonality or self.config.orthogonality_form == "off" or not ctx.lora.is_peft:
            return
        self._weights: dict[str, Tensor] = dict(ctx.model.named_parameters())
        by_shape: dict[tuple[bool, tuple[int, ...]], list[str]] = {}
        for _, _, a, b in ctx.lora.trainable_pairs(self.name):
            for is_b, name in ((False, a), (True, b)):
                by_shape.setdefault((is_b, tuple(full_shape(self._weights[name]))), []).append(name)
        self._groups = [(names, is_b) for (is_b, _), names in by_shape.items()]

    def extra_loss(self, ctx: MethodContext, batch: Mapping[str, Any], outputs: Any) -> dict[str, Tensor]:
        return self._penalty(self._weights) if self._groups and ctx.dist.whole_weights else {}

    def weight_gradients(self, ctx: MethodContext, grads: GradView) -> None:
        if self._groups:
            names = [name for group, _ in self._groups for name in group]
            for name, value in grads.add_loss(names, self._penalty).items():
                ctx.log(name, value)

    def _penalty(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        terms = []
        for names, is_b in self._groups:  # one batched product a shape
            stacked = torch.stack([weights[name].flatten(1) for name in names])
            terms.append(orthogonality(stacked.mT if is_b else stacked, self.config.orthogonality_form))
        return {"kif/orthogonality": self.config.orthogonality * torch.cat([t.float() for t in terms]).mean()}

    def fusion_coefficients(self, current: Tensor, previous: Tensor) -> Tensor:
        config = self.config
        if config.fusion == "categorical":
            return categorical_coefficients(current, previous, config.quantile, normalisation=config.normalisation)
        return adaptive_coefficients(current, previous, config.temperature, normalisation=config.normalisation)
