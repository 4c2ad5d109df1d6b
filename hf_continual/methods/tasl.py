r"""TaSL: after each task, merge every skill unit by whether the past, the new task, both or neither need it.

    delta = the q-quantile of the normalised scores over all units, q = 0.8                                     (Eq. 8)

    \hat u_k = g \hat u_{k-1} + (1 - g) u_k     where both are above:  Ihat_{k-1} > delta_{k-1}, I_k > delta_k
             = \hat u_{k-1}                     where only the past is
             = u_k                              where only the current task is
             = (\hat u_{k-1} + u_k) / 2         where neither is

with g = 0.7, so `shared` = 1 - g = 0.3 of the way from the previous to the current weights. Scores: `importance.py`.

Source: Feng et al., "TaSL: Continual Dialog State Tracking via Task Skill Localization and Consolidation",
arXiv:2408.09857 (ACL 2024), and its code at github.com/WoodScene/TaSL. METHODS.md lists where they disagree.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..importance import check_share
from ..skill_fusion import SkillFusion, SkillFusionConfig, unit_cases


@dataclass
class TaSLConfig(SkillFusionConfig):
    shared: float = field(
        default=0.3, metadata={"help": "How far units that both need move to the new weights (1 - gamma, gamma 0.7)."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("shared", self.shared)


def categorical_coefficients(
    current: Tensor, previous: Tensor, quantile: float = 0.8, shared: float = 0.3, *, normalisation: str = "minmax"
) -> Tensor:
    """c of the four cases: `shared`, 0 for the past, 1 for the current task, 0.5 for neither.

    Args:
        current: I_k, [units]; normalised here, and normalised scores stay as they are.
        previous: Ihat_{k-1}, [units].
        quantile: of each, above which a unit counts as important.
        shared: c of units that both need.
        normalisation: see `normalise`.

    Returns:
        float64, [units].
    """
    check_share("shared", shared)
    values = torch.tensor([0.5, 0.0, 1.0, shared], dtype=torch.float64)  # in the order of CASES
    return values[unit_cases(current, previous, quantile, normalisation)]


class TaSL(SkillFusion[TaSLConfig]):
    """Task skill localization and consolidation; with `replay_ratio` its variant with a memory, TaSL-M."""

    config_class = TaSLConfig
    paper = "arxiv:2408.09857"

    def fusion_coefficients(self, current: Tensor, previous: Tensor) -> Tensor:
        config = self.config
        return categorical_coefficients(
            current, previous, config.quantile, config.shared, normalisation=config.normalisation
        )
