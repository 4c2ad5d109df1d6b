r"""Moving average of the weights: a task leaves the average along its training, begun at the earlier weights.

    \bar\theta = \hat\theta_{k-1} at first,  \bar\theta <- d \bar\theta + (1 - d) \theta after every optimizer step
    \hat\theta_k = \bar\theta

Source: the EMA baseline that TaSL (arXiv:2408.09857) compares itself with. The first task keeps its last weights: its
average would hold on to weights that have learnt nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..distributed import ALL_BACKENDS, GradView
from ..importance import check_share
from ..lora import trainable_parameters
from .base import ContinualMethod, MethodContext


@dataclass
class WeightEMAConfig:
    decay: float = field(default=0.99, metadata={"help": "d per optimizer step; not stated in the paper."})

    def __post_init__(self) -> None:
        check_share("decay", self.decay)


class WeightEMA(ContinualMethod[WeightEMAConfig]):
    """Keeps the moving average of the trainable weights, in fp32."""

    name = "weight_ema"
    config_class = WeightEMAConfig
    supports = ALL_BACKENDS
    paper = "arxiv:2408.09857"
    sharded_state = ("average_",)
    neutral = {"decay": 0.0}

    def __init__(self, config: WeightEMAConfig | None = None, **options: float) -> None:
        super().__init__(config, **options)
        self.average_: dict[str, Tensor] = {}

    def on_task_begin(self, ctx: MethodContext) -> None:
        self.average_ = {}

    def on_gradients(self, ctx: MethodContext, grads: GradView) -> None:
        if ctx.state.global_step == 0 and not ctx.task.is_first:
            names = list(trainable_parameters(ctx.model))
            self.average_ = dict(zip(names, [w.float().clone() for w in grads.lists(names)[0]], strict=True))

    @torch.no_grad()
    def on_step_end(self, ctx: MethodContext) -> None:
        if not self.average_ or ctx.dist.step_was_skipped:
            return
        assert self._grads is not None
        weights, _ = self._grads.lists(self.average_)
        torch._foreach_lerp_(list(self.average_.values()), [w.float() for w in weights], 1 - self.config.decay)

    def merge(
        self, ctx: MethodContext, previous: Mapping[str, Tensor], current: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        average = self._whole("average_")
        return {n: average[n].to(after) if n in average else after for n, after in current.items()}

    def on_task_end(self, ctx: MethodContext) -> None:
        self.average_ = {}
