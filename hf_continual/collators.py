"""Padding batches, and putting what the teacher said about their stored rows beside them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from .attention import LayerTarget
from .errors import InputError
from .signals import LogitSignal, RowSignals

T = TypeVar("T")


def make_collator(
    tokenizer: PreTrainedTokenizerBase, model: Any = None, seq2seq: bool = False, pad_to_multiple_of: int | None = None
) -> DataCollatorForSeq2Seq:
    """A collator that pads on the right, and labels with -100. The encoder-decoder one also makes decoder inputs."""
    # Generation needs left padding and may switch the shared tokenizer to it between two training batches.
    tokenizer = copy.copy(tokenizer)
    tokenizer.padding_side = "right"
    return DataCollatorForSeq2Seq(
        tokenizer,
        model=model if seq2seq else None,
        label_pad_token_id=-100,
        pad_to_multiple_of=pad_to_multiple_of,
    )


@dataclass
class LogitTarget:
    """The teacher's logits at all answer positions of a batch's stored rows, one after another.

    Attributes:
        batch: [N] the row in the batch.
        position: [N] where in the padded sequence; 0 for a classifier.
        values: [N, k] the logits, all or the k largest.
        indices: [N, k] vocabulary ids of the k largest; None if all are there.
        lse: [N] log-sum-exp over the whole vocabulary, in float32.

    Of a teacher that is asked later, `values` and `lse` are None until it has answered.
    """

    batch: Tensor
    position: Tensor
    values: Tensor
    indices: Tensor | None
    lse: Tensor


@dataclass
class TeacherBatch:
    """What the teacher said about the stored rows of a batch.

    Attributes:
        rows: which rows of the batch are stored ones; plain numbers, so that nobody waits for the GPU to know.
        size: rows in the batch.
        tasks: the task of each of `rows`.
        logits: None if there are none.
        attention: by the name of the attention module, for the rows whose teacher has it.
    """

    rows: list[int]
    size: int
    tasks: list[int]
    logits: LogitTarget | None = None
    attention: dict[str, LayerTarget] = field(default_factory=dict)

    @property
    def all_stored(self) -> bool:
        return len(self.rows) == self.size

    def to(self, device: Any, non_blocking: bool = False) -> TeacherBatch:
        """The same on another device. BatchEncoding and accelerate find and call this when they move a batch."""
        logits = None if self.logits is None else _to(self.logits, device, non_blocking)
        attention = {name: _to(target, device, non_blocking) for name, target in self.attention.items()}
        return dataclasses.replace(self, logits=logits, attention=attention)


class Signals(Protocol):
    """Where a row's signals come from, such as a [`SignalStore`]."""

    def read(self, row_id: str) -> RowSignals: ...


class DistillationCollator:
    """Gives batches with stored rows a [`TeacherBatch`] under the key "teacher"; other batches get no such key.

    The Trainer drops columns that it does not know: a method names `column` and "teacher" in its `batch_columns`.

    Args:
        collator: makes the batch itself, with any padding.
        signals: the teacher's signals; None to say only which rows are stored ones.
        ids: the id in `signals` of each row of the buffer.
        tasks: the task of each row of the buffer.
        column: says which row of the buffer a row is; absent, None or -1 for a new row.
        use: which signals to read.
    """

    def __init__(
        self,
        collator: Callable[[list[Any]], Any],
        signals: Signals | None,
        ids: Sequence[str],
        tasks: Sequence[int],
        column: str = "replay_row",
        use: Sequence[str] = ("logits", "attention"),
    ) -> None:
        self.collator = collator
        self.signals = signals
        self.ids = list(ids)
        self.tasks = [int(task) for task in tasks]
        self.column = column
        self.use = tuple(use)

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> Any:
        numbers = [_number(feature.get(self.column)) for feature in features]
        plain = [{name: value for name, value in feature.items() if name != self.column} for feature in features]
        batch = self.collator(plain)
        rows = [row for row, number in enumerate(numbers) if number >= 0]
        if rows:
            stored = [numbers[row] for row in rows]
            teacher = TeacherBatch(rows, len(features), [self.tasks[number] for number in stored])
            if self.signals is not None:
                self._fill(teacher, self.signals, stored, plain, batch)
            batch["teacher"] = teacher
        return batch

    def _fill(
        self,
        teacher: TeacherBatch,
        signals: Signals,
        stored: Sequence[int],
        features: Sequence[Mapping[str, Any]],
        batch: Mapping[str, Any],
    ) -> None:
        placed = []
        for row, number in zip(teacher.rows, stored, strict=True):
            signal = signals.read(self.ids[number])
            starts = _find_starts(signal, row, features[row], batch, f"row {number} of the buffer")
            placed.append(_Placed(row, signal, starts))
        if "logits" in self.use:
            teacher.logits = _logit_target(placed, _is_classified(batch))
        if "attention" in self.use:
            widths = {side: _width(side, batch) for side in placed[0].signals.lengths}
            for name in dict.fromkeys(name for one in placed for name in one.signals.attention):
                chosen = [one for one in placed if name in one.signals.attention]
                teacher.attention[name] = _layer_target(name, chosen, widths, teacher.size)


@dataclass
class _Placed:
    """A stored row in a batch, and where its unpadded sequences begin in the padded ones."""

    row: int
    signals: RowSignals
    starts: dict[str, int]


def _number(value: Any) -> int:
    return -1 if value is None else int(value)


def _is_classified(batch: Mapping[str, Any]) -> bool:
    """Whether a row has one label, or a vector of targets, and not one a token."""
    labels = batch.get("labels")
    return torch.is_tensor(labels) and (labels.dim() == 1 or labels.is_floating_point())


def _width(side: str, batch: Mapping[str, Any]) -> int:
    if side == "input":
        return int(batch["input_ids"].shape[1])
    decoder = batch.get("decoder_input_ids")
    return int((batch["labels"] if decoder is None else decoder).shape[1])


def _find_starts(
    signals: RowSignals, row: int, feature: Mapping[str, Any], batch: Mapping[str, Any], which: str
) -> dict[str, int]:
    starts = {}
    for side, length in signals.lengths.items():
        start, found = _span(side, row, feature, batch)
        if found != length:
            raise InputError(
                f"{which} has {found} {side} tokens in the batch and its teacher signals were made of {length}; "
                "use the tokenizer, the maximum lengths and the collator of then, or start again in another "
                "run directory"
            )
        starts[side] = start
    return starts


def _span(side: str, row: int, feature: Mapping[str, Any], batch: Mapping[str, Any]) -> tuple[int, int]:
    """Where a row begins in its padded sequence, and how many tokens it has there."""
    if side == "decoder":
        real = batch["labels"][row] != -100
    else:
        mask = batch.get("attention_mask")
        if mask is None or mask.dim() != 2:
            ids = torch.as_tensor(feature["input_ids"])
            padded = batch["input_ids"][row]
            length = min(len(ids), len(padded))
            starts = (0, len(padded) - length)
            return next(((s, length) for s in starts if torch.equal(padded[s : s + length], ids)), (0, 0))
        real = mask[row] != 0
    places = real.nonzero()
    if not len(places):
        return 0, 0
    # The last minus the first, not the count: a token inside may be masked, or be a label that is not learnt.
    start = int(places[0])
    return start, int(places[-1]) + 1 - start


def _logit_target(placed: Sequence[_Placed], classified: bool) -> LogitTarget | None:
    found: list[tuple[_Placed, LogitSignal]] = [
        (one, one.signals.logits) for one in placed if one.signals.logits is not None
    ]
    if not found:
        return None
    batch, position = [], []
    for one, logits in found:
        start = 0 if classified else one.starts["decoder" if "decoder" in one.starts else "input"]
        batch.append(torch.full((len(logits.positions),), one.row))
        position.append(torch.zeros_like(batch[-1]) if classified else logits.positions.long() + start)
    kept = {None if logits.values is None else logits.values.shape[1] for _, logits in found}
    if len(kept) > 1 or len({logits.indices is None for _, logits in found}) > 1:
        raise InputError(
            "the teacher signals of the tasks keep different numbers of logits; use the option of then, or start again "
            "in another run directory"
        )
    values, indices, lse = (
        _cat([getattr(logits, part) for _, logits in found]) for part in ("values", "indices", "lse")
    )
    return LogitTarget(
        torch.cat(batch),
        torch.cat(position),
        values,  # type: ignore[arg-type]  # None for a teacher that is asked later
        None if indices is None else indices.long(),
        lse,  # type: ignore[arg-type]
    )


def _cat(parts: Sequence[Tensor | None]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return torch.cat(present) if present else None


def _layer_target(name: str, placed: Sequence[_Placed], widths: Mapping[str, int], size: int) -> LayerTarget:
    """The signals of one module, padded to the most heads and query rows among them and to the keys of the batch."""
    signals = [one.signals.attention[name] for one in placed]
    if len({(signal.kind, tuple(signal.sides)) for signal in signals}) > 1:
        raise InputError(
            f"the teacher signals of {name} are of different kinds "
            f"({', '.join(sorted({signal.kind for signal in signals}))}); use the option of then, or start again in "
            "another run directory"
        )
    kind, (query_side, key_side) = signals[0].kind, signals[0].sides
    count, most = len(placed), (max(len(s.heads) for s in signals), max(len(s.rows) for s in signals))
    heads, rows = (torch.zeros(count, n, dtype=torch.long) for n in most)
    head_mask, row_mask = (torch.zeros(count, n, dtype=torch.bool) for n in most)
    for i, (one, signal) in enumerate(zip(placed, signals, strict=True)):
        heads[i, : len(signal.heads)] = signal.heads.long()
        head_mask[i, : len(signal.heads)] = True
        rows[i, : len(signal.rows)] = signal.rows.long() + one.starts[query_side]
        row_mask[i, : len(signal.rows)] = True

    keys = widths[key_side], [one.starts[key_side] for one in placed]
    chosen = [one.row for one in placed]
    return LayerTarget(
        batch=None if chosen == list(range(size)) else torch.tensor(chosen),
        heads=heads,
        head_mask=head_mask,
        rows=rows,
        row_mask=row_mask,
        values=_stack([s.values for s in signals], most, keys, dim=2 if kind == "weights" else None),
        query=_stack([s.query for s in signals], most, keys, dim=None),
        key=_stack([s.key for s in signals], most, keys, dim=1),
    )


def _stack(
    values: Sequence[Tensor | None], most: tuple[int, int], keys: tuple[int, list[int]], dim: int | None
) -> Tensor | None:
    """[heads, rows, size] of each row, stacked with zeros; `dim` is that of the keys: their number, and the starts."""
    first = values[0]
    if first is None:
        return None
    shape, (width, starts) = [*most, first.shape[2]], keys
    if dim is not None:
        shape[dim] = width
    stacked = first.new_zeros(len(values), *shape)
    for i, value in enumerate(values):
        assert value is not None
        place = stacked[i] if dim is None else stacked[i].narrow(dim, starts[i], value.shape[dim])
        place[: value.shape[0], : value.shape[1], : value.shape[2]] = value
    return stacked


def _to(value: T, device: Any, non_blocking: bool) -> T:
    """A dataclass with its tensors on another device."""
    moved = {
        f.name: getattr(value, f.name).to(device, non_blocking=non_blocking)
        for f in dataclasses.fields(value)  # type: ignore[arg-type]
        if torch.is_tensor(getattr(value, f.name))
    }
    return dataclasses.replace(value, **moved)  # type: ignore[type-var]
