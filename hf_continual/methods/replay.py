r"""Replay: train on the new task mixed with a few stored examples of every earlier one.

    D_t' = D_t \cup \bigcup_{i<t} M_i,   M_i = a random subset of D_i with |M_i| = max(1, floor(ratio |D_i|))

Source: LoRAReplay and FTReplay of MIGU (arXiv:2406.17245, App. A: 2 % of every past task).
Deviation: the reference draws M_i again from the full D_i for every later task; a buffer that keeps only M_i cannot, so
here it is drawn once, when task i ends. floor(ratio n) = 0 becomes 1, so that small tasks are not silently left out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import datasets

from ..replay import buffer_size, check_columns, check_rows, check_sizes, keep_rows
from .base import ContinualMethod, MethodContext


@dataclass
class ReplayConfig:
    ratio: float = field(default=0.02, metadata={"help": "Share of each past task that is kept (MIGU App. A: 2%)."})
    count: int | None = field(default=None, metadata={"help": "Examples kept per task; overrides ratio."})
    seed: int = field(default=42, metadata={"help": "Seed of the draw."})

    def __post_init__(self) -> None:
        check_sizes(self.ratio, self.count)


class Replay(ContinualMethod[ReplayConfig]):
    """Mixes a few stored rows of every earlier task into the new one.

    Rows are kept as the Trainer saw them and concatenated with the next task's; the Trainer's sampler shuffles.
    """

    config_class = ReplayConfig
    supports = frozenset({"single", "ddp"})
    paper = "arxiv:2406.17245"
    neutral = {"ratio": 0.0}

    def __init__(self, config: ReplayConfig | None = None, **options: Any) -> None:
        super().__init__(config, **options)
        self.buffer_: datasets.Dataset | None = None
        self.sizes_: dict[str, int] = {}
        self._current: Any = None

    def train_dataset(self, ctx: MethodContext, dataset: Any) -> Any:
        check_rows(dataset, self.name, ctx.task.name)
        self._current = dataset
        if self.buffer_ is None:
            return dataset
        if not isinstance(dataset, datasets.Dataset):
            dataset = datasets.Dataset.from_list([dataset[i] for i in range(len(dataset))])
        check_columns(dataset, self.buffer_, self.name, ctx.task.name)
        return datasets.concatenate_datasets([dataset, self.buffer_.cast(dataset.features)])

    def on_task_end(self, ctx: MethodContext) -> None:
        size = buffer_size(len(self._current), self.config.ratio, self.config.count)
        self.buffer_ = keep_rows(self.buffer_, self._current, size, self.config.seed + ctx.task.index)
        self.sizes_[ctx.task.name] = size
        self._current = None
