"""Keeping rows of past tasks."""

from __future__ import annotations

from typing import Any

import datasets
import torch
from torch.utils.data import IterableDataset

from .errors import InputError


def buffer_size(rows: int, ratio: float, count: int | None) -> int:
    """Examples to keep of a task with `rows` training rows."""
    if count is not None:
        return min(count, rows)
    return min(rows, max(1, int(ratio * rows))) if ratio > 0 else 0


def check_sizes(ratio: float, count: int | None, prefix: str = "") -> None:
    """Refuse a buffer size that cannot be."""
    number = isinstance(ratio, (int, float)) and not isinstance(ratio, bool)
    if not number or not 0.0 <= ratio <= 1.0:
        raise InputError(f"{prefix}ratio={ratio!r} must lie in [0, 1]")
    if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 0):
        raise InputError(f"{prefix}count={count!r} must be a whole number, not negative")


def check_rows(dataset: Any, method: str, task: str) -> None:
    """Refuse a stream without length, of which no rows can be drawn."""
    if isinstance(dataset, (IterableDataset, datasets.IterableDataset)):
        raise InputError(
            f"method '{method}': the training data of task '{task}' is a stream without length; "
            "give a map-style dataset"
        )


def check_columns(dataset: Any, buffer: datasets.Dataset | None, method: str, task: str) -> None:
    """Refuse rows with other columns than those that are kept."""
    if buffer is None:
        return
    columns = dataset.column_names if isinstance(dataset, datasets.Dataset) else list(dict(dataset[0]))
    if set(columns) != set(buffer.column_names):
        raise InputError(
            f"method '{method}': task '{task}' has the columns {sorted(columns)} and the buffer "
            f"{sorted(buffer.column_names)}; give every task the same columns"
        )


def keep_rows(buffer: datasets.Dataset | None, dataset: Any, size: int, seed: int) -> datasets.Dataset | None:
    """`buffer` with `size` random rows of `dataset` appended, drawn without replacement."""
    if size == 0:
        return buffer
    generator = torch.Generator().manual_seed(seed)
    chosen = sorted(torch.randperm(len(dataset), generator=generator)[:size].tolist())
    kept = datasets.Dataset.from_list([dict(dataset[i]) for i in chosen])
    if isinstance(dataset, datasets.Dataset):
        kept = kept.cast(dataset.features)
    return kept if buffer is None else datasets.concatenate_datasets([buffer, kept.cast(buffer.features)])
