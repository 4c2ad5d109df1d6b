"""Padding batches."""

from __future__ import annotations

import copy
from typing import Any

from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase


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
