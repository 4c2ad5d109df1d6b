r"""Weight ensemble: after each task, one coefficient for all weights between the earlier and the new ones.

    \hat\theta_k = (1 - c) \hat\theta_{k-1} + c \theta_k                                    c = 1/2 unless given

Source: the coarse baseline that TaSL (arXiv:2408.09857) compares itself with; WiSE-FT (arXiv:2109.01903).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ..distributed import ALL_BACKENDS
from ..importance import check_share
from ..units import lerp
from .base import ContinualMethod, MethodContext


@dataclass
class WeightEnsembleConfig:
    coefficient: float = field(default=0.5, metadata={"help": "c: 0 keeps the earlier weights, 1 the new ones."})

    def __post_init__(self) -> None:
        check_share("coefficient", self.coefficient)


class WeightEnsemble(ContinualMethod[WeightEnsembleConfig]):
    """Interpolates all trainable weights between before and after the task."""

    name = "weight_ensemble"
    config_class = WeightEnsembleConfig
    supports = ALL_BACKENDS
    paper = "arxiv:2408.09857"
    neutral = {"coefficient": 1.0}

    def merge(
        self, ctx: MethodContext, previous: Mapping[str, Tensor], current: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        if ctx.task.is_first:
            return current
        return {name: lerp(previous[name], after, self.config.coefficient) for name, after in current.items()}
