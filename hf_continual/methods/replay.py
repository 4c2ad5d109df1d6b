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
import torch
from torch.utils.data import IterableDataset

from ..errors import InputError
from .base import ContinualMethod, MethodContext


@dataclass
class ReplayConfig:
    ratio: float = field(default=0.02, metadata={"help": "Share of each past task that is kept (MIGU App. A: 2%)."})
    count: int | None = field(default=None, metadata={"help": "Examples kept per task; overrides ratio."})
    seed: int = field(default=42, metadata={"help": "Seed of the draw."})

    def __post_init__(self) -> None:
        if not 0.0 <= self.ratio <= 1.0:
            raise InputError(f"method 'replay': ratio={self.ratio!r} must lie in [0, 1]")
        if self.count is not None and self.count < 0:
            raise InputError(f"method 'replay': count={self.count!r} must not be negative")


def buffer_size(rows: int, ratio: float, count: int | None) -> int:
    """Examples to keep of a task with `rows` training rows."""
    if count is not None:
        return min(count, rows)
    return min(rows, max(1, int(ratio * rows))) if ratio > 0 else 0


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
        if isinstance(dataset, (IterableDataset, datasets.IterableDataset)):
            raise InputError(
                f"method 'replay': the training data of task '{ctx.task.name}' is a stream without length; "
                "give a map-style dataset"
            )
        self._current = dataset
        if self.buffer_ is None:
            return dataset
        if not isinstance(dataset, datasets.Dataset):
            dataset = datasets.Dataset.from_list([dataset[i] for i in range(len(dataset))])
        if set(dataset.column_names) != set(self.buffer_.column_names):
            raise InputError(
                f"method 'replay': task '{ctx.task.name}' has the columns {sorted(dataset.column_names)} and the "
                f"buffer {sorted(self.buffer_.column_names)}; give every task the same columns"
            )
        return datasets.concatenate_datasets([dataset, self.buffer_.cast(dataset.features)])

    def on_task_end(self, ctx: MethodContext) -> None:
        rows = len(self._current)
        size = buffer_size(rows, self.config.ratio, self.config.count)
        if size:
            generator = torch.Generator().manual_seed(self.config.seed + ctx.task.index)
            chosen = sorted(torch.randperm(rows, generator=generator)[:size].tolist())
            kept = datasets.Dataset.from_list([dict(self._current[i]) for i in chosen])
            if isinstance(self._current, datasets.Dataset):
                kept = kept.cast(self._current.features)
            self.buffer_ = (
                kept
                if self.buffer_ is None
                else datasets.concatenate_datasets([self.buffer_, kept.cast(self.buffer_.features)])
            )
        self.sizes_[ctx.task.name] = size
        self._current = None
