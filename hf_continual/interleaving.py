"""Stored rows between new ones: whole micro-batches of either, in an order that the Trainer's own data loader takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler

from .errors import InputError

FILLER = -1


class InterleavedDataset(Dataset[Any]):
    """New rows and stored ones, which its sampler puts into micro-batches of their own.

    SEEKR: one micro-batch of stored rows after each floor(new / stored) micro-batches of new ones, so that each stored
    row is seen once an epoch. Index -1 stands for no row; it fills up a micro-batch, and the collator leaves it out.

    Args:
        new: the rows of the task, with a length.
        stored: the rows of earlier tasks.
    """

    def __init__(self, new: Any, stored: Any) -> None:
        self.new = new
        self.stored = stored
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The epoch of the samplers. A resumed loader of several processes reaches the dataset and not its sampler."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.new) + len(self.stored)

    def __getitem__(self, index: int) -> Any:
        if index == FILLER:
            return None
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is not among {len(self)} rows")
        return self.new[index] if index < len(self.new) else self.stored[index - len(self.new)]

    @property
    def column_names(self) -> list[str]:
        """The columns of the new rows."""
        names = getattr(self.new, "column_names", None)
        if names is None:
            raise AttributeError("the new rows have no column_names")
        return list(names)

    def sampler(self, batch_size: int, processes: int = 1, seed: int = 42, shuffle: bool = True) -> InterleavedSampler:
        """Indices for a DataLoader of `batch_size`, whose batches `processes` ranks take in turn."""
        return InterleavedSampler(self, batch_size, processes, seed, shuffle)

    def collator(self, inner: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
        """`inner` for batches with fillers."""
        return _WithoutFillers(inner)


class _WithoutFillers:
    """A collator that leaves fillers out; a class, so that worker processes can be given it."""

    def __init__(self, inner: Callable[[list[Any]], Any]) -> None:
        self.inner = inner

    def __call__(self, rows: list[Any]) -> Any:
        rows = [row for row in rows if row is not None]
        if not rows:
            raise InputError(
                "accelerator_config splits batches between processes, and one got none of an incomplete one; leave "
                "split_batches and dispatch_batches out where stored micro-batches come between new ones"
            )
        return self.inner(rows)


class InterleavedSampler(Sampler[int]):
    """The order of an epoch: whole micro-batches, one a rank, of new rows or of stored ones."""

    def __init__(
        self,
        dataset: InterleavedDataset,
        batch_size: int,
        processes: int = 1,
        seed: int = 42,
        shuffle: bool = True,
    ) -> None:
        self.dataset = dataset
        self.batch_size, self.processes = batch_size, processes
        self.seed, self.shuffle = seed, shuffle

    def set_epoch(self, epoch: int) -> None:
        self.dataset.set_epoch(epoch)

    def __len__(self) -> int:
        unit = self.batch_size * self.processes
        return unit * (-(-len(self.dataset.new) // unit) + -(-len(self.dataset.stored) // unit))

    def __iter__(self) -> Iterator[int]:
        first = len(self.dataset.new)
        orders: list[Sequence[int]] = [range(first), range(first, len(self.dataset))]
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed + self.dataset.epoch)
            orders = [[rows[i] for i in torch.randperm(len(rows), generator=generator)] for rows in orders]
        new_units, stored_units = (self._units(order) for order in orders)
        for after, unit in enumerate(new_units, 1):
            yield from unit
            for number in replay_after(after, len(new_units), len(stored_units)):
                yield from stored_units[number]
        if not new_units:
            for unit in stored_units:
                yield from unit

    def _units(self, order: Sequence[int]) -> list[list[int]]:
        """Rows by the step in which all ranks see them; the last step is filled up."""
        size = self.batch_size * self.processes
        units = [list(order[start : start + size]) for start in range(0, len(order), size)]
        if units and len(units[-1]) < size:
            units[-1] = self._filled(units[-1])
        return units

    def _filled(self, rows: list[int]) -> list[int]:
        """Spread fewer rows than a step has places, so that every rank has one of them at least."""
        rows = rows + [rows[i % len(rows)] for i in range(self.processes - len(rows))]
        share, more = divmod(len(rows), self.processes)
        filled, start = [], 0
        for rank in range(self.processes):
            own = rows[start : start + share + (rank < more)]
            filled += own + [FILLER] * (self.batch_size - len(own))
            start += len(own)
        return filled


def replay_after(step: int, new: int, stored: int) -> range:
    """Which of `stored` replay steps follow new step `step` (from 1) of `new`: one in every floor(new / stored).

    Where more are stored than new, several follow each. (The reference computes a cycle of 0 then and never replays.)
    """
    if new >= stored:
        cycle = new // stored if stored else new + 1
        return range(step // cycle - 1, step // cycle) if step % cycle == 0 and step // cycle <= stored else range(0)
    return range((step - 1) * stored // new, step * stored // new)
