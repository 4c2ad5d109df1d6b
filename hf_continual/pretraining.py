"""Continual pre-training: tasks of the kinds `clm` and `mlm`, from plain text to batches."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerBase,
    TrainerCallback,
)

from .collators import make_collator
from .data_sources import Table
from .errors import InputError, did_you_mean
from .models import is_masked, is_seq2seq, positions_of
from .tasks import Task
from .tokenization import Blocks, Packing, default_block_size, tokenize_texts

if TYPE_CHECKING:
    from .methods.base import ContinualMethod
    from .task_queue import DataConfig

AFTER_TRAINING = -1
IN_EVALUATION = -2
"""Stand for the epoch in the seed of a row's mask: after the last step of a task, and in every evaluation."""


# -- rows --------------------------------------------------------------------------------------------------------------


def text_rows(table: Table, columns: Mapping[str, str]) -> Dataset:
    """The canonical rows of a text task: `text`, and `domain` where the data has it.

    Raises:
        InputError: without a column of texts, or for a text that is empty or no string.
    """
    chosen = pick_columns(table, columns, ("text",), ("domain",))
    result: dict[str, list[Any]] = {role: [] for role in chosen}
    for index, row in iterate(table, chosen):
        text = row.get(chosen["text"])
        if not isinstance(text, str) or not text.strip():
            what = "empty; leave the row out" if isinstance(text, str) else f"{text!r:.60}, not a string; convert it"
            raise InputError(f"column '{chosen['text']}' in row {index} of {table.source} is {what}")
        result["text"].append(text)
        if "domain" in chosen:
            result["domain"].append(str(row.get(chosen["domain"])))
    return Dataset.from_dict(result)


def pick_columns(
    table: Table, columns: Mapping[str, str], needed: Sequence[str], optional: Sequence[str]
) -> dict[str, str]:
    """Which column of the data has each role: that of `columns`, or the one of the role's name."""
    for role in columns:
        if role not in (*needed, *optional):
            known = ", ".join((*needed, *optional))
            raise InputError(f"columns: '{role}' is no column of this kind of task; it has {known}")
    chosen = {}
    for role in (*needed, *optional):
        column = columns.get(role, role)
        if column in table.columns:
            chosen[role] = column
        elif role in needed or role in columns:
            hint = did_you_mean(column, table.columns) if role in columns else ""
            raise InputError(
                f"columns: {table.source} has no column '{column}' for the role '{role}'"
                + (hint or f"; it has {', '.join(map(repr, table.columns))}: set 'columns: {{{role}: <column>}}'")
            )
    return chosen


def iterate(table: Table, chosen: Mapping[str, str]) -> Any:
    """(index, row) of the rows in use, with the chosen columns alone where that spares decoding others."""
    if not isinstance(table.rows, Dataset):
        return ((index, table.rows[index]) for index in table.indices)
    rows = table.rows.with_format(None).select_columns(list(dict.fromkeys(chosen.values()))).select(table.indices)
    return zip(table.indices, rows, strict=True)


# -- from texts to rows of tokens --------------------------------------------------------------------------------------


def packing_of(task: Task, config: DataConfig, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Packing:
    """How this task's texts become rows for this model.

    Raises:
        InputError: if the blocks are longer than what the model can tell apart.
    """
    positions = positions_of(model)
    size = config.block_size if config.block_size is not None else default_block_size(tokenizer, positions)
    if positions is not None and size > positions:
        raise InputError(
            f"data.block_size={size} is more than the {positions} positions of this model; set {positions} or less"
        )
    return Packing(size, config.pack, config.drop_last_block, task.kind == "mlm", config.mlm_probability)


def tokenized(task: Task, packing: Packing, tokenizer: PreTrainedTokenizerBase) -> Blocks:
    """The training rows of a text task."""
    return tokenize_texts(task.train_dataset, tokenizer, packing, f"task '{task.name}'")


def describe(task: Task, blocks: Blocks, packing: Packing) -> list[str]:
    """What became of a task's texts, for the queue to print."""
    how = f"rows of {packing.block_size} tokens" if packing.pack else f"rows of up to {packing.block_size} tokens"
    left = f", {blocks.dropped} tokens at the end left out" if blocks.dropped else ""
    lines = [f"{task.name}: {blocks.texts} text(s) in {len(blocks.rows)} {how}{left}"]
    if blocks.cut:
        lines.append(
            f"warning: task '{task.name}': {blocks.cut} of {blocks.texts} texts are longer than "
            f"data.block_size={packing.block_size} tokens and are cut"
        )
    return lines


# -- masking -----------------------------------------------------------------------------------------------------------


class MaskingCollator:
    """Batches for masked language modelling, masked by transformers' DataCollatorForLanguageModeling.

    The mask of a row is drawn from the seed, the epoch and the row itself. So it is another one in every epoch, and the
    same wherever the row stands in a batch, on whichever process, and after a run was stopped and continued; the
    collator's own generator would be where the last process left it.

    Deviation: a batch of which no token was drawn has no loss; there the first token that may be is masked.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, probability: float = 0.15, seed: int = 42) -> None:
        if tokenizer.mask_token is None:
            raise InputError(
                f"the tokenizer '{tokenizer.name_or_path}' has no mask token, which kind: mlm needs; use the tokenizer "
                "of a masked language model, or kind: clm"
            )
        self._masking = DataCollatorForLanguageModeling(tokenizer, mlm=True, mlm_probability=probability)
        self._pad = make_collator(tokenizer)
        self._special = torch.tensor(sorted(tokenizer.all_special_ids))
        self._mask_id = int(tokenizer.mask_token_id)  # type: ignore[arg-type]
        self.seed = seed
        # Workers of the data loader hold a copy of this object, which must see the epoch change.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    @epoch.setter
    def epoch(self, value: int) -> None:
        self._epoch.fill_(value)

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        masked = [self.mask(feature["input_ids"]) for feature in features]
        rows = [{"input_ids": ids.tolist(), "labels": labels.tolist()} for ids, labels in masked]
        batch: dict[str, Any] = dict(self._pad(rows))
        if not bool((batch["labels"] != -100).any()):
            self._mask_one(batch)
        return batch

    def mask(self, ids: Any) -> tuple[Tensor, Tensor]:
        """(input ids, labels) of one row."""
        ids = np.asarray(ids, dtype=np.int64)
        text = f"{self.seed},{self.epoch},".encode() + ids.tobytes()
        seed = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1
        self._masking.generator = torch.Generator().manual_seed(seed)
        inputs = torch.from_numpy(ids.copy())[None]
        masked, labels = self._masking.torch_mask_tokens(inputs, torch.isin(inputs, self._special))
        return masked[0], labels[0]

    def _mask_one(self, batch: dict[str, Any]) -> None:
        may = (~torch.isin(batch["input_ids"], self._special)).nonzero()
        if len(may):
            row, column = may[0].tolist()
            batch["labels"][row, column] = batch["input_ids"][row, column]
            batch["input_ids"][row, column] = self._mask_id


class MaskingEpoch(TrainerCallback):
    """Tells the collator which epoch it is."""

    in_phases = True

    def __init__(self, collator: MaskingCollator) -> None:
        self.collator = collator

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.collator.epoch = int((state.epoch or 0) + 1e-6)  # a resumed epoch begins in its middle

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Whether or not there was an epoch left to train when the task was continued.
        self.collator.epoch = AFTER_TRAINING


def collator_of(
    task: Task, tokenizer: PreTrainedTokenizerBase, model: Any, probability: float, seed: int
) -> tuple[Callable[[list[Any]], Any], list[TrainerCallback]]:
    """The collator of a task's training batches, and the callbacks it needs."""
    if task.kind != "mlm":
        return make_collator(tokenizer, model, is_seq2seq(model)), []
    collator = MaskingCollator(tokenizer, probability, seed)
    return collator, [MaskingEpoch(collator)]


# -- what cannot work --------------------------------------------------------------------------------------------------


def joint_kind(tasks: Sequence[Task]) -> str:
    """The kind of a task made of all these.

    Raises:
        InputError: if they are of several.
    """
    for task in tasks:
        if task.kind != tasks[0].kind:
            raise InputError(
                f"joint: task '{task.name}' is of kind '{task.kind}' and '{tasks[0].name}' of kind '{tasks[0].kind}'; "
                "train tasks of one kind together"
            )
    return tasks[0].kind


def check_model(task: Task, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a model that cannot learn a task of this kind.

    Raises:
        InputError: naming the task and the model.
    """
    base: Any = model
    name = type(base.get_base_model() if hasattr(base, "get_base_model") else base).__name__
    masked = is_masked(model)
    if task.kind == "mlm":
        if not masked:
            raise InputError(
                f"task '{task.name}': kind 'mlm' needs a masked language model such as RoBERTa, and this is a {name}; "
                "use kind: clm"
            )
        MaskingCollator(tokenizer)
    elif masked:
        raise InputError(
            f"task '{task.name}': kind '{task.kind}' needs a model that writes text, and {name} fills in masked "
            "tokens; use kind: mlm"
        )
    elif task.kind == "clm" and is_seq2seq(model):
        raise InputError(
            f"task '{task.name}': kind 'clm' needs a decoder-only model, and {name} has an encoder; use one such as "
            "Llama or GPT-2, or tasks of kind completion"
        )
    elif task.kind == "clm" and _looks_both_ways(model):
        raise InputError(
            f"task '{task.name}': kind 'clm' needs a model that reads from left to right, and this {name} is an "
            "encoder; use kind: mlm"
        )


def _looks_both_ways(model: Any) -> bool:
    """An encoder with a head that writes, as AutoModelForCausalLM makes of RoBERTa."""
    config = getattr(model, "config", None)
    return type(config) in MODEL_FOR_MASKED_LM_MAPPING and getattr(config, "is_decoder", None) is False


def check_method(method: ContinualMethod[Any], task: Task) -> None:
    """Refuse a method that keeps a teacher's answers to rows whose tokens are masked anew each time.

    Raises:
        InputError: naming the method and the task.
    """
    from .distillation import ReplayDistillation

    if task.kind == "mlm" and isinstance(method, ReplayDistillation):
        raise InputError(
            f"method '{method.name}' keeps what a teacher said about stored rows, and in task '{task.name}' of kind "
            "'mlm' the same row is masked otherwise each time; use replay, or kind: clm"
        )
