"""Turning prompts and completions into token ids, the same way for training and evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from datasets import Dataset
from datasets.fingerprint import generate_random_fingerprint
from datasets.table import InMemoryTable
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from .errors import InputError, did_you_mean

Prompt = str | Sequence[Mapping[str, str]]

TAIL_TOKENS = 16
QUIET_ROWS = 5_000
TEXTS_AT_ONCE = 1_000
LARGEST_BLOCK = 1024
"""Of blocks whose size nobody chose, as in transformers' run_clm.py and run_mlm.py."""


def ensure_pad_token(tokenizer: PreTrainedTokenizerBase, pad_token: str | None = None) -> None:
    """Give a tokenizer without a padding token the one named, where `"eos"` stands for its end-of-text token."""
    if tokenizer.pad_token_id is not None:
        return
    if pad_token is None:
        raise InputError(
            f"model.pad_token: the tokenizer '{tokenizer.name_or_path}' has no padding token; "
            "set 'pad_token: eos' under 'model' to pad with its end-of-text token"
        )
    if pad_token == "eos":
        if tokenizer.eos_token is None:
            raise InputError(
                "model.pad_token: 'eos' cannot be used, the tokenizer has no eos token; name another token"
            )
        pad_token = tokenizer.eos_token
    if pad_token not in tokenizer.get_vocab():
        raise InputError(f"model.pad_token: {pad_token!r} is not in the tokenizer's vocabulary; use 'eos'")
    tokenizer.pad_token = pad_token


def tokenize_dataset(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seq2seq: bool,
    max_prompt_length: int = 512,
    max_completion_length: int = 50,
) -> Dataset:
    """Training rows: `input_ids`, `attention_mask` and `labels`.

    Decoder-only models get prompt and completion in one sequence, with the loss on the completion alone.
    """
    if not isinstance(dataset, Dataset):
        raise InputError(
            f"train_dataset is a {type(dataset).__name__}; give a datasets.Dataset of prompts and completions"
        )
    for column in ("prompt", "completion"):
        if column not in dataset.column_names:
            raise InputError(f"train_dataset has no column '{column}'{did_you_mean(column, dataset.column_names)}")
    if not len(dataset):
        raise InputError("train_dataset is empty; give at least one row")

    def encode(row: dict[str, Any]) -> dict[str, list[int]]:
        prompt = encode_prompt(row["prompt"], tokenizer, max_prompt_length, seq2seq)
        completion = encode_completion(row["completion"], row["prompt"], tokenizer, max_completion_length, seq2seq)
        ids = prompt if seq2seq else prompt + completion
        labels = completion if seq2seq else [-100] * len(prompt) + completion
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}

    quiet = len(dataset) < QUIET_ROWS and not datasets.are_progress_bars_disabled()
    if quiet:
        datasets.disable_progress_bars()
    try:
        return dataset.map(
            encode,
            remove_columns=dataset.column_names,
            keep_in_memory=True,
            load_from_cache_file=False,
            # Nothing is cached, so spare the pickling and hashing of the tokenizer that a fingerprint takes.
            new_fingerprint=generate_random_fingerprint(),
            desc="Tokenizing",
        )
    finally:
        if quiet:
            datasets.enable_progress_bars()


def encode_prompt(
    prompt: Prompt, tokenizer: PreTrainedTokenizerBase, max_prompt_length: int, seq2seq: bool
) -> list[int]:
    """Token ids of a prompt, as the model sees it in training and in evaluation.

    A prompt that is too long loses tokens from just before its last line (for a chat, from the end of the last user
    message), so that the instruction at its head and the answer cue at its end survive.
    """
    text, cues = _render(prompt, tokenizer)
    prefix, suffix = _affixes(tokenizer)
    if not seq2seq:
        suffix = []
    body = _ids(tokenizer, text)
    # A text may bring its own special tokens, as chat templates do; they must not double.
    if prefix and (not isinstance(prompt, str) or body[: len(prefix)] == prefix):
        prefix = []
    if suffix and body[-len(suffix) :] == suffix:
        suffix = []
    room = max_prompt_length - len(prefix) - len(suffix)
    if room < 2:
        raise InputError(f"max_prompt_length: {max_prompt_length} leaves no room for a prompt; use 16 or more")
    if len(body) > room:
        tail = _tail_length(tokenizer, text, cues, len(body), room)
        body = body[: room - tail] + body[len(body) - tail :]
    return prefix + body + suffix


def encode_completion(
    completion: str, prompt: Prompt, tokenizer: PreTrainedTokenizerBase, max_completion_length: int, seq2seq: bool
) -> list[int]:
    """Token ids of a completion with the end-of-text token, which one that is cut off does not get."""
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"the tokenizer '{tokenizer.name_or_path}' has no eos token, so the model could not learn to stop; "
            "set its eos_token"
        )
    if max_completion_length < 1:
        raise InputError(f"max_completion_length: {max_completion_length} is too short; use 1 or more")
    if seq2seq:
        prefix, _ = _affixes(tokenizer)
        ids = prefix + _ids(tokenizer, completion)
    else:
        ids = _ids(tokenizer, _separator(prompt, completion, tokenizer) + completion)
    if not ids or ids[-1] != tokenizer.eos_token_id:
        ids = [*ids, tokenizer.eos_token_id]
    return ids[:max_completion_length]


def _separator(prompt: Prompt, completion: str, tokenizer: PreTrainedTokenizerBase) -> str:
    if not isinstance(prompt, str) or not prompt or prompt[-1].isspace() or not completion or completion[0].isspace():
        return ""
    # SentencePiece tokenizers begin every text with a space of their own.
    first = tokenizer.convert_ids_to_tokens(_ids(tokenizer, "a")[:1])
    return "" if first and first[0].startswith(("\u2581", "\u0120")) else " "


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # verbose=False: no warning about texts longer than the model's limit, they are cut afterwards.
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _affixes(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and after a text."""
    probe = "a"
    plain = _ids(tokenizer, probe)
    if not plain:
        # A small vocabulary without an unknown token: take one of its own words.
        probe = next((word for word in tokenizer.get_vocab() if word.isalnum() and _ids(tokenizer, word)), "")
        plain = _ids(tokenizer, probe)
        if not plain:
            return [], []
    full = list(tokenizer(probe, add_special_tokens=True)["input_ids"])
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start], full[start + len(plain) :]
    return [], []


def _render(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[int]]:
    """The text of a prompt and where its answer cue may start, best place first."""
    if isinstance(prompt, str):
        return prompt, [_last_line(prompt, len(prompt))]
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            f"the tokenizer '{tokenizer.name_or_path}' has no chat template for prompts that are lists of messages; "
            "use a chat model or write the prompts as strings"
        )
    messages = [dict(message) for message in prompt]
    try:
        text = str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    except TemplateError as error:
        raise InputError(
            f"the chat template of '{tokenizer.name_or_path}' refuses a prompt with the roles "
            f"{', '.join(message['role'] for message in messages)} ({error}); change the messages"
        ) from error
    users = [message for message in messages if message["role"] == "user"] or messages
    content = users[-1]["content"].strip()
    start = text.rfind(content)
    end = start + len(content) if start >= 0 else len(text)
    # The last user message often ends in a cue of its own, such as "Answer:".
    return text, [_last_line(text, end), end] if "\n" in content else [end]


def _last_line(text: str, end: int) -> int:
    """Where the last line of `text[:end]` starts, its line break included; the start if there is but one line."""
    return max(0, text.rfind("\n", 0, len(text[:end].rstrip())))


def _tail_length(tokenizer: PreTrainedTokenizerBase, text: str, cues: Sequence[int], length: int, room: int) -> int:
    """How many tokens at the end of a prompt of `length` tokens to keep."""
    offsets = None
    if tokenizer.is_fast:
        offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)[
            "offset_mapping"
        ]
    for cue in cues:
        if offsets is not None:
            first = next((i for i, (_, end) in enumerate(offsets) if end > cue), length)
            tail = length - first
        else:
            tail = len(_ids(tokenizer, text[cue:]))
        if 0 < tail <= max(1, room // 4):
            return tail
    return min(TAIL_TOKENS, room // 2)


# -- plain text --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Packing:
    """How texts become rows.

    Attributes:
        block_size: tokens of a row, special tokens included.
        pack: cut the texts, one after another, into rows of `block_size`; without it each text is a row, cut to it.
        drop_last: leave out what remains after the last whole row (run_clm.py does).
        masked: rows for masked language modelling: each begins and ends with the tokenizer's special tokens.
        probability: of a token to be masked.
    """

    block_size: int
    pack: bool = True
    drop_last: bool = True
    masked: bool = False
    probability: float = 0.15


@dataclass(frozen=True)
class Blocks:
    """Texts as rows, and what became of them.

    Attributes:
        rows: `input_ids`, `attention_mask` and, for causal language modelling, `labels`.
        texts: how many there were.
        tokens: in the rows, special tokens included.
        dropped: tokens after the last whole row.
        cut: texts that lost their end, without packing.
    """

    rows: Dataset
    texts: int
    tokens: int
    dropped: int = 0
    cut: int = 0


def default_block_size(tokenizer: PreTrainedTokenizerBase, positions: int | None) -> int:
    """The block size of run_clm.py: the tokenizer's longest text, or at most 1024 where it knows of none.

    Args:
        positions: how many tokens the model can tell apart; None for any number.
    """
    longest = int(tokenizer.model_max_length)
    if longest > (positions or LARGEST_BLOCK):
        return min(LARGEST_BLOCK, positions or LARGEST_BLOCK)
    return longest


def tokenize_texts(texts: Dataset, tokenizer: PreTrainedTokenizerBase, packing: Packing, where: str) -> Blocks:
    """Rows of the column `text`.

    Causal: every text begins as the tokenizer begins one and ends with the end token, so that a row which holds several
    shows where one ends. Packed rows are pieces of the stream of all of them; `labels` are the `input_ids`.
    Masked: texts are joined by the separator, and each row stands between the tokenizer's special tokens, as RoBERTa
    was trained (run_mlm.py puts them around texts, so that most of its rows begin within one).

    Deviation: run_clm.py adds no end token, and drops what remains of every thousand texts; here it is what remains of
    all.

    Args:
        where: the task, for messages.

    Raises:
        InputError: if there is no whole row, or the tokenizer lacks a token.
    """
    prefix, suffix = _affixes(tokenizer)
    end = tokenizer.eos_token_id
    if packing.masked:
        end = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else end
    if end is None:
        raise InputError(
            f"the tokenizer '{tokenizer.name_or_path}' has no eos token, so texts could not be told apart in a row; "
            "set its eos_token"
        )
    room = packing.block_size - (len(prefix) + len(suffix) if packing.masked else 0)
    if room < 2:
        raise InputError(f"data.block_size={packing.block_size} leaves no room for text; use 16 or more")
    parts, cut = [], 0
    for ids in _ids_of_texts(texts, tokenizer):
        if not packing.masked:
            ids = [*prefix, *ids, *suffix]
            ids = ids if ids[-1] == end else [*ids, end]
        elif packing.pack:
            ids = [*ids, end]
        if not packing.pack:
            cut += len(ids) > room
            ids = ids[:room]
        parts.append(np.array(ids, dtype=np.int32))
    if not parts:
        raise InputError(f"{where}: its texts have no tokens; give texts in which the tokenizer knows words")
    dropped = 0
    if packing.pack:
        stream = np.concatenate(parts)
        if packing.masked:
            stream = stream[:-1]  # the separator behind the last text
        whole = len(stream) // room * room
        rest = len(stream) - whole
        parts = list(stream[:whole].reshape(-1, room))
        if not packing.drop_last and rest > (0 if packing.masked else 1):  # one token predicts nothing
            parts.append(stream[whole:])
        else:
            dropped = rest
        if not parts:
            raise InputError(
                f"{where}: its {len(stream)} tokens are less than one row of data.block_size={packing.block_size}; set "
                "a smaller block_size, or drop_last_block: false"
            )
    if packing.masked:
        parts = [np.concatenate([prefix, part, suffix]).astype(np.int32) for part in parts]
    rows = _as_dataset(parts, labels=not packing.masked)
    return Blocks(rows, len(texts), sum(map(len, parts)), dropped, cut)


def _ids_of_texts(texts: Dataset, tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """The tokens of each text that has any, without special tokens."""
    column = texts.with_format(None)
    for start in range(0, len(column), TEXTS_AT_ONCE):
        some = column[start : start + TEXTS_AT_ONCE]["text"]
        yield from filter(None, tokenizer(some, add_special_tokens=False, verbose=False)["input_ids"])


def _as_dataset(parts: Sequence[np.ndarray], labels: bool) -> Dataset:
    """Arrow columns without a Python object for each token."""
    tokens = np.concatenate(parts)
    starts = pa.array(np.cumsum([0, *map(len, parts)]), pa.int64())
    columns = {"input_ids": tokens, "attention_mask": np.ones(len(tokens), np.int8)}
    if labels:
        columns["labels"] = tokens.astype(np.int64)
    kinds = {name: datasets.Value(str(values.dtype)) for name, values in columns.items()}
    table = pa.table({name: pa.LargeListArray.from_arrays(starts, pa.array(v)) for name, v in columns.items()})
    features = datasets.Features({name: datasets.List(kind) for name, kind in kinds.items()})
    table = InMemoryTable(table.cast(features.arrow_schema))
    return Dataset(table, fingerprint=generate_random_fingerprint())
