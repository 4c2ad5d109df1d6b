r"""IncLoRA: one LoRA adapter per task; all are active, only the newest learns.

    x_O = W_0 x + s \sum_{i<t} B_i A_i x + s B_t A_t x

Source: the incremental LoRA of O-LoRA's code base, a baseline of MIGU (arXiv:2406.17245, section 4) and of O-LoRA
(arXiv:2310.14152). There the frozen adapters are stored as one concatenated A and B; here each stays a plain PEFT
adapter, which gives the same function.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..distributed import ALL_BACKENDS
from .base import ContinualMethod, MethodContext


@dataclass
class IncLoRAConfig:
    """Rank, scaling and targets are those of the model's first adapter."""


class IncLoRA(ContinualMethod[IncLoRAConfig]):
    """A new LoRA adapter for each task; the old ones stay active and frozen.

    Works with any method that does not add adapters itself. Refuses `modules_to_save`.
    """

    config_class = IncLoRAConfig
    supports = ALL_BACKENDS
    paper = "arxiv:2310.14152"
    owns = frozenset({"adapters"})
    needs_lora = True

    def on_task_begin(self, ctx: MethodContext) -> None:
        if not ctx.task.is_first:
            ctx.lora.add(f"task{ctx.task.index}", self.name)
