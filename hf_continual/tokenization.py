"""Turning prompts and completions into token ids, the same way for training and evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
from datasets import Dataset
from datasets.fingerprint import generate_random_fingerprint
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from .errors import InputError, did_you_mean

Prompt = str | Sequence[Mapping[str, str]]

TAIL_TOKENS = 16
QUIET_ROWS = 5_000


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
