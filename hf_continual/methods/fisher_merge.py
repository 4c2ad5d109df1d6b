r"""Fisher-weighted merging: each weight moves by how much more the new task pins it down than the earlier ones.

    F_k = mean over optimizer steps of g^2                                    g: gradient of the batch, not clipped
    c = F_k / (F_k + \hat F_{k-1}),      \hat\theta_k = (1 - c) \hat\theta_{k-1} + c \theta_k
    \hat F_k = d \hat F_{k-1} + F_k                                                                           d = 1

per element; where neither task has Fisher information, c = 1/2.

Source: Matena and Raffel, "Merging Models with Fisher-Weighted Averaging", arXiv:2111.09832, Eq. 5, as a baseline for
TaSL and KIF. Deviation: there F is a mean of squared gradients of single examples with labels drawn from the model;
here it is gathered from the training batches as they pass, which costs no further pass over the data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..distributed import ALL_BACKENDS, GradView
from ..importance import check_share
from ..lora import stored_name, trainable_parameters
from ..units import lerp
from .base import ContinualMethod, MethodContext


def fisher_coefficients(current: Tensor, previous: Tensor) -> Tensor:
    """c = F_k / (F_k + F_{k-1}), and 1/2 where both are zero; both non-negative and of one shape, as is the result."""
    total = current + previous
    return torch.where(total > 0, current / total.clamp_min(torch.finfo(total.dtype).tiny), 0.5)


@dataclass
class FisherMergeConfig:
    decay: float = field(
        default=1.0, metadata={"help": "d, what is left of the past Fisher information after each task; 1 keeps all."}
    )

    def __post_init__(self) -> None:
        check_share("decay", self.decay)


class FisherMerge(ContinualMethod[FisherMergeConfig]):
    """Merges weights by their Fisher information.

    State: the Fisher information of all tasks so far, as large as the trainable weights, by their stored names.
    """

    name = "fisher_merge"
    config_class = FisherMergeConfig
    supports = ALL_BACKENDS
    paper = "arxiv:2111.09832"
    sharded_state = ("sum_",)

    def __init__(self, config: FisherMergeConfig | None = None, **options: float) -> None:
        super().__init__(config, **options)
        self.total_: dict[str, Tensor] = {}
        self.sum_: dict[str, Tensor] = {}
        self.steps_: Tensor | None = None

    def on_task_begin(self, ctx: MethodContext) -> None:
        self.sum_, self.steps_ = {}, None

    @torch.no_grad()
    def on_gradients(self, ctx: MethodContext, grads: GradView) -> None:
        if ctx.state.global_step == 0:
            names = list(trainable_parameters(ctx.model))
            weights, _ = grads.lists(names)
            self.sum_ = {n: torch.zeros_like(w, dtype=torch.float32) for n, w in zip(names, weights, strict=True)}
            self.steps_ = None
        weights, gradients = grads.lists(self.sum_)
        device = weights[0].device
        pairs = [(s, g.float()) for s, g in zip(self.sum_.values(), gradients, strict=True) if g is not None]
        # A step with a NaN or infinite gradient, such as one that fp16 skips, does not count.
        finite = grads.all_finite([g for _, g in pairs], device)
        clean = [torch.where(finite, g, 0.0) for _, g in pairs]
        torch._foreach_addcmul_([s for s, _ in pairs], clean, clean, value=ctx.dist.grad_scale() ** -2)
        self.steps_ = finite.float() if self.steps_ is None else self.steps_.to(device) + finite

    def merge(
        self, ctx: MethodContext, previous: Mapping[str, Tensor], current: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        merged, adapters = dict(current), set(ctx.lora.active)
        assert self.steps_ is not None
        steps, sums = self.steps_.clamp_min(1).cpu(), self._whole("sum_")
        for name, after in current.items():
            key = stored_name(name, adapters)
            fisher = sums[name].cpu() / steps
            if key in self.total_ and not ctx.task.is_first:
                merged[name] = lerp(previous[name], after, fisher_coefficients(fisher, self.total_[key]))
            self.total_[key] = fisher + self.config.decay * self.total_[key] if key in self.total_ else fisher
        return merged

    def on_task_end(self, ctx: MethodContext) -> None:
        self.sum_, self.steps_ = {}, None
