r"""Naive sequential fine-tuning: the lower bound every method is compared with.

    theta_t = argmin_theta L_t(theta), started at theta_{t-1}

Source: sequential fine-tuning (FT and LoRA in the tables of MIGU, arXiv:2406.17245).
"""

from __future__ import annotations

from dataclasses import dataclass

from ..distributed import ALL_BACKENDS
from .base import ContinualMethod


@dataclass
class NaiveConfig:
    """Nothing to set."""


class Naive(ContinualMethod[NaiveConfig]):
    """Fine-tune on each task in turn and do nothing else."""

    config_class = NaiveConfig
    supports = ALL_BACKENDS
    neutral = {}
