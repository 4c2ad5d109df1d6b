"""SARI: how well a text was simplified, against its source and references."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from .base import Row, Scores, mean

_ENTITIES = (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"))
# The rules of mteval-v13a: symbols stand alone; full stop and comma too unless between digits; a dash after a digit.
_RULES = (
    (re.compile(r"([{-~\[-` -&(-+:-@/])"), r" \1 "),
    (re.compile(r"([^0-9])([.,])"), r"\1 \2 "),
    (re.compile(r"([.,])([^0-9])"), r" \1 \2"),
    (re.compile(r"([0-9])(-)"), r"\1 \2 "),
)


def tokenize_13a(text: str) -> list[str]:
    """Words as in mteval-v13a, the tokenisation of BLEU and of SARI."""
    text = text.replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, character in _ENTITIES:
        text = text.replace(entity, character)
    text = f" {text} "
    for pattern, spaced in _RULES:
        text = pattern.sub(spaced, text)
    return text.split()


def sentence_sari(source: str, prediction: str, references: Sequence[str]) -> dict[str, float]:
    """SARI of one text, and its parts `keep`, `delete` and `add`, each in [0, 1].

    Lower case, 13a tokens. For n = 1..4 with the n-gram counts S, C, R of source, prediction and all references, S and
    C taken once for each reference:

        keep:   K = min(S, C), good = min(K, R), all = min(S, R); P = mean over K of good/K, R = sum good / sum all; F1
        delete: D = S - C, good = D - R; P = mean over D of good/D
        add:    A = n-grams of C not in S, all = those of R not in S; P = |A and all| / |A|, R = |A and all| / |all|; F1

    with 0/0 = 1, each part the mean over n, and SARI the mean of the three.
    """
    words, answer = tokenize_13a(source.lower()), tokenize_13a(prediction.lower())
    rights = [tokenize_13a(reference.lower()) for reference in references]
    parts = [_order(words, answer, rights, n) for n in range(1, 5)]
    keep, delete, add = (mean([part[k] for part in parts]) for k in range(3))
    return {"sari": (keep + delete + add) / 3, "keep": keep, "delete": delete, "add": add}


def _order(source: list[str], answer: list[str], references: list[list[str]], n: int) -> tuple[float, float, float]:
    times = len(references)
    R = Counter(gram for reference in references for gram in _grams(reference, n))
    S = Counter({gram: count * times for gram, count in Counter(_grams(source, n)).items()})
    C = Counter({gram: count * times for gram, count in Counter(_grams(answer, n)).items()})

    kept, wanted = S & C, S & R
    good = kept & R
    precision = mean([good[gram] / kept[gram] for gram in kept]) if kept else 1.0
    recall = sum(good.values()) / sum(wanted.values()) if wanted else 1.0
    keep = _f1(precision, recall)

    deleted = S - C
    good = deleted - R
    delete = mean([good[gram] / deleted[gram] for gram in deleted]) if deleted else 1.0

    added, missing = set(C) - set(S), set(R) - set(S)
    right = len(added & missing)
    add = _f1(right / len(added) if added else 1.0, right / len(missing) if missing else 1.0)
    return keep, delete, add


def _grams(words: list[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0


def sari(rows: Sequence[Row], labels: Sequence[str] | None = None) -> Scores:
    """Mean SARI over texts: the mean of keep F1, delete precision and add F1, against `source` and references.

    The formula is at `sentence_sari`.
    """
    return _over_rows(rows, "source")


def sari_trace(rows: Sequence[Row], labels: Sequence[str] | None = None) -> Scores:
    """SARI with the whole prompt, instruction included, for the source, as TRACE scores 20Minuten."""
    return _over_rows(rows, "prompt")


def _over_rows(rows: Sequence[Row], column: str) -> Scores:
    found = [sentence_sari(_text(row[column]), row["prediction"], row["references"]) for row in rows]
    details = {part: mean([each[part] for each in found]) for part in ("keep", "delete", "add")}
    scores = [each["sari"] for each in found]
    return Scores(mean(scores), scores, details)


def _text(prompt: str | Sequence[Row]) -> str:
    """A prompt, or the messages of a chat one below the other."""
    return prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)
