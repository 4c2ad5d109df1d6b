"""Perplexity from token log-likelihoods."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..errors import InputError
from .base import Row, Scores


def perplexity(rows: Sequence[Row], labels: Sequence[str] | None = None) -> Scores:
    """PPL = exp(-sum of log p(token) / number of tokens), over all tokens of the task; lower is better.

    A row brings `text_log_likelihood`, in nats: a list with one number a token, or their sum and the number of
    `tokens`. With a `domain`, details have `perplexity/<domain>`. The score of a row is its own perplexity; the value
    is not their mean, since long rows count for more.
    """
    sums: dict[str, list[float]] = {}
    scores = []
    for number, row in enumerate(rows):
        total, tokens = _sum(row, number)
        scores.append(_exp(-total / tokens))
        for name in ("", str(row["domain"])) if row.get("domain") is not None else ("",):
            part = sums.setdefault(name, [0.0, 0.0])
            part[0] += total
            part[1] += tokens
    values = {name: _exp(-total / tokens) for name, (total, tokens) in sums.items()}
    details = {f"perplexity/{name}": value for name, value in sorted(values.items()) if name}
    return Scores(values[""], scores, {"tokens": sums[""][1], **details})


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def _sum(row: Row, number: int) -> tuple[float, float]:
    given = row["text_log_likelihood"]
    each = list(given) if isinstance(given, list | tuple) else None
    tokens = row.get("tokens", len(each) if each is not None else None)
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
        raise InputError(
            f"row {number}: tokens={tokens!r} must be the number of tokens text_log_likelihood is the sum of"
        )
    if each is not None and len(each) != tokens:
        raise InputError(f"row {number}: text_log_likelihood has {len(each)} numbers for {tokens} tokens")
    numbers = each if each is not None else [given]
    if any(isinstance(x, bool) or not isinstance(x, int | float) or not x <= 0 for x in numbers):
        raise InputError(
            f"row {number}: text_log_likelihood={given!r} must be natural logarithms of probabilities, up to 0"
        )
    return float(sum(numbers)), float(tokens)
