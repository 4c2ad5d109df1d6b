"""ROUGE-L and edit similarity."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from ..errors import InputError

TINY = 1e-8
_LITERAL = re.compile(r"<(?:STR|NUM|CHAR)_LIT:(.*?)>", re.DOTALL)


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """F-measure of ROUGE-L with stemming, the best over references.

    With L the longest common subsequence in words: P = L / |prediction|, R = L / |reference|, F = 2 P R / (P + R).
    """
    scorer = _rouge_scorer()
    return max(float(scorer.score(reference, prediction)["rougeL"].fmeasure) for reference in references)


@cache
def _rouge_scorer() -> Any:
    try:
        from rouge_score import rouge_scorer
    except ImportError as error:
        raise InputError(
            "scorer 'rouge_l' needs the package rouge-score; run `pip install 'hf-continual[eval]'`"
        ) from error
    return rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)


def rouge_ready() -> None:
    _rouge_scorer()


def rouge_l_trace(prediction: str, references: Sequence[str]) -> float:
    """TRACE's ROUGE-L: on sets of words, sentence by sentence, without stemming; the best over references.

    The reference is taken for the hypothesis H and the prediction for the text R, both split at full stops. U is the
    union, over all pairs of sentences (r, h), of the words in a longest common subsequence of r and h; words count
    once: P = |U| / |words of H|, R = |U| / |words of R|, F = 2 P R / (P + R + 1e-8). Empty text scores 0. This is what
    the package `rouge` 1.0.1 computes, which TRACE calls, and is not what `rouge_l` does.
    """
    return max(_set_rouge_l(reference, prediction) for reference in references)


def _set_rouge_l(hypothesis: str, text: str) -> float:
    ours, theirs = _sentences(hypothesis), _sentences(text)
    if not ours or not theirs:
        return 0.0
    common: set[str] = set()
    for sentence in theirs:
        for other in ours:
            common |= _words_in_common(sentence, other)
    precision = len(common) / len({word for sentence in ours for word in sentence})
    recall = len(common) / len({word for sentence in theirs for word in sentence})
    return 2 * precision * recall / (precision + recall + TINY)


def _sentences(text: str) -> list[list[str]]:
    # A sentence of white space alone is one empty word, as in the package.
    return [" ".join(part.split()).split(" ") for part in text.split(".") if part]


def _words_in_common(first: list[str], second: list[str]) -> set[str]:
    """Words of one longest common subsequence; among equally long ones the one found backwards, left before up."""
    length = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, a in enumerate(first, 1):
        for j, b in enumerate(second, 1):
            length[i][j] = length[i - 1][j - 1] + 1 if a == b else max(length[i - 1][j], length[i][j - 1])
    i, j, words = len(first), len(second), set()
    while i and j:
        if first[i - 1] == second[j - 1]:
            words.add(first[i - 1])
            i, j = i - 1, j - 1
        elif length[i - 1][j] > length[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return words


def edit_similarity(prediction: str, references: Sequence[str]) -> float:
    """1 - d / (|a| + |b|), d the least number of characters inserted and deleted; the best over references.

    `rapidfuzz.fuzz.ratio` / 100. Two empty texts are alike.
    """
    return max(_ratio(prediction, reference) / 100 for reference in references)


def edit_similarity_trace(prediction: str, references: Sequence[str]) -> float:
    """TRACE's Py150 score: placeholders of literals filled in, then edit similarity rounded to whole percent.

    `<NUM_LIT>` becomes 0, `<STR_LIT>` and `<CHAR_LIT>` nothing, `<STR_LIT:x>` (also NUM, CHAR) x. Rounded as
    fuzzywuzzy does with python-Levenshtein; empty text scores 0.
    """
    answer = fill_literals(prediction)
    expected = [fill_literals(reference) for reference in references]
    return max(round(_ratio(answer, r)) / 100 if answer and r else 0.0 for r in expected)


def fill_literals(code: str) -> str:
    """Py150's placeholders of literals (CodeXGLUE) as text."""
    code = code.replace("<NUM_LIT>", "0").replace("<STR_LIT>", "").replace("<CHAR_LIT>", "")
    return _LITERAL.sub(lambda found: found[1], code)


def _ratio(first: str, second: str) -> float:
    return float(_fuzz().ratio(first, second))


@cache
def _fuzz() -> Any:
    try:
        from rapidfuzz import fuzz
    except ImportError as error:
        raise InputError(
            "scorer 'edit_similarity' needs the package rapidfuzz; run `pip install 'hf-continual[eval]'`"
        ) from error
    return fuzz


def edit_ready() -> None:
    _fuzz()
