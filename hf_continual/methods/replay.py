r"""Replay: train on the new task mixed with a few stored examples of every earlier one.

    D_t' = D_t \cup \bigcup_{i<t} M_i,   M_i = a subset of D_i with |M_i| = max(1, floor(ratio |D_i|))

`policy` says which subset: `random` without replacement; `first_n` rows of the file (SEEKR's code); `reservoir`, where
row n of the stream takes a random one of the m places with chance m / n (Vitter's algorithm R); `class_balanced`, one
random row of each answer in turn; `herding` (iCaRL), the row that brings the mean feature of M_i nearest to D_i's:

    p_k = argmin_{x \in D_i} || mu - (phi(x) + \sum_{j<k} phi(p_j)) / k ||

phi is the mean of the last hidden state over tokens, of length 1, by the model that has just learnt task i. `total`
shares a fixed number of rows equally between the tasks, or with `reservoir` between all rows that were ever seen.

`mixing` says how they are trained on: `mix` shuffles D_t' (MIGU); `alternate` puts a micro-batch of stored rows after
every floor(|D_t| / |M|) new ones (SEEKR's code); `after` trains on D_t, then on the stored rows alone (TRACE's code).

`source: current_task` is the padded control: as many rows of D_t in the place of M, so the same steps without old data.

Source: LoRAReplay and FTReplay of MIGU (arXiv:2406.17245, App. A: 2 % of every past task).
Deviation: the reference draws M_i again from the full D_i for every later task; a buffer that keeps only M_i cannot, so
here it is drawn once, when task i ends. floor(ratio n) = 0 becomes 1, so that small tasks are not silently left out.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import datasets

from ..distributed import ALL_BACKENDS
from ..errors import InputError
from ..interleaving import InterleavedDataset
from ..replay import (
    SOURCE_HELP,
    Policy,
    ReplayBuffer,
    Source,
    check_buffer,
    check_columns,
    check_rows,
    check_source,
    features_of,
    replayed_rows,
    tokenizer_key,
)
from .base import ContinualMethod, MethodContext, TrainingPhase

Mixing = Literal["mix", "alternate", "after"]


@dataclass
class ReplayConfig:
    ratio: float = field(default=0.02, metadata={"help": "Share of each past task that is kept (MIGU App. A: 2%)."})
    count: int | None = field(default=None, metadata={"help": "Examples kept per task; overrides ratio."})
    seed: int = field(default=42, metadata={"help": "Seed of the draw."})
    total: int | None = field(
        default=None, metadata={"help": "Examples kept in all, in equal shares per task; overrides ratio."}
    )
    policy: Policy = field(
        default="random",
        metadata={"help": "Which are kept: random (MIGU), first_n, reservoir, class_balanced or herding."},
    )
    mixing: Mixing = field(
        default="mix",
        metadata={
            "help": "mix: shuffled among the new ones (MIGU). alternate: in micro-batches of their own between the new "
            "ones (SEEKR). after: in a further training after the task (TRACE)."
        },
    )
    after_epochs: float = field(default=1.0, metadata={"help": "Epochs of that further training (TRACE: 1)."})
    after_learning_rate: float | None = field(
        default=None, metadata={"help": "Its learning rate; default: that of the training."}
    )
    source: Source = field(default="past", metadata={"help": SOURCE_HELP})

    def __post_init__(self) -> None:
        check_buffer(self.ratio, self.count, self.total, self.policy, self.seed)
        check_source(self.source)
        if self.mixing not in get_args(Mixing):
            raise InputError(f"mixing={self.mixing!r} is unknown; choose {', '.join(get_args(Mixing))}")
        for option, default in (("after_epochs", 1.0), ("after_learning_rate", None)):
            value = getattr(self, option)
            if value == default:
                continue
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not 0 < value < float("inf"):
                raise InputError(f"{option}={value!r} must be a number above 0")
            if self.mixing != "after":
                raise InputError(f"{option}={value} is for mixing='after', not {self.mixing!r}; leave it out")


class Replay(ContinualMethod[ReplayConfig]):
    """Trains on a few stored rows of every earlier task, too. Rows are kept as the Trainer saw them.

    State: `buffer_` (rows, their ids and tasks) and `sizes_` (rows by task).
    """

    config_class = ReplayConfig
    supports = ALL_BACKENDS
    owns = frozenset({"replay"})
    paper = "arxiv:2406.17245"
    neutral = {"count": 0}

    def __init__(self, config: ReplayConfig | None = None, **options: Any) -> None:
        super().__init__(config, **options)
        self.counts_micro_batches = self.config.mixing == "alternate"
        self.buffer_ = self._empty_buffer()
        self.sizes_: dict[str, int] = {}
        self._current: Any = None

    def _empty_buffer(self) -> ReplayBuffer:
        c = self.config
        return ReplayBuffer(ratio=c.ratio, count=c.count, total=c.total, policy=c.policy, seed=c.seed)

    def train_dataset(self, ctx: MethodContext, dataset: Any) -> Any:
        check_rows(dataset, self.name, ctx.task.name)
        check_columns(dataset, self.buffer_.rows, self.name, ctx.task.name)
        self.buffer_.bind(None, tokenizer_key(ctx.tokenizer))  # rows say nothing of the model
        self._current = dataset
        stored = self._replayed(ctx)
        if stored is None or self.config.mixing == "after":
            return dataset
        if self.config.mixing == "alternate":
            return InterleavedDataset(dataset, stored)
        if not isinstance(dataset, datasets.Dataset):
            dataset = datasets.Dataset.from_list([dataset[i] for i in range(len(dataset))])
        return datasets.concatenate_datasets([dataset, stored.cast(dataset.features)])

    def _replayed(self, ctx: MethodContext) -> datasets.Dataset | None:
        own = self._current if ctx.rows is None else ctx.rows  # not what another method has mixed in
        return replayed_rows(self.buffer_.rows, own, self.config.source, self.config.seed + ctx.task.index)

    def training_phase(self, ctx: MethodContext) -> TrainingPhase | None:
        stored = self._replayed(ctx) if self.config.mixing == "after" else None
        if stored is None:
            return None
        options: dict[str, Any] = {"num_train_epochs": self.config.after_epochs}
        if self.config.after_learning_rate is not None:
            options["learning_rate"] = self.config.after_learning_rate
        return TrainingPhase(f"{self.name}/after", stored, options)

    def on_task_end(self, ctx: MethodContext) -> None:
        buffer = copy.copy(self.buffer_)  # as with other state, whoever holds the old one keeps it
        buffer.add(ctx.task.index, ctx.task.name, self._current, features=lambda rows: features_of(ctx, rows))
        self.buffer_ = buffer
        self.sizes_ = self.buffer_.sizes
        self._current = None

    def load(self, folder: Path) -> None:
        super().load(folder)
        if not isinstance(self.buffer_, ReplayBuffer):
            self.buffer_ = self._empty_buffer()
            raise InputError(
                f"state of method '{self.name}': {folder} was written by a version that kept rows without a record; "
                "continue with that version, or start again in another run directory"
            )
