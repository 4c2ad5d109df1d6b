r"""ER: experience replay, a small memory of past tasks in the training data of the new one.

    L = E_{(x,y) ~ D_t \cup M} [-log p(y | x)],   M = \bigcup_{i<t} M_i,   M_i \subset D_i

The same as `replay` with `mixing: mix`, under the name it has in the literature.
Source: On Tiny Episodic Memories in Continual Learning (Chaudhry et al. 2019, arXiv:1902.10486).
Deviation: the paper sees every new row once, with as many rows of the memory in each step as new ones; here each
epoch has every new and every stored row once. Its memory is `policy: reservoir` with `total`; the default is replay's.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import InputError
from .replay import Replay, ReplayConfig


@dataclass
class ERConfig(ReplayConfig):
    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mixing != "mix":
            raise InputError(f"mixing={self.mixing!r} is not experience replay; use the method 'replay'")


class ER(Replay):
    """Experience replay: stored rows of earlier tasks are shuffled among the new ones."""

    config_class = ERConfig
    paper = "arxiv:1902.10486"
