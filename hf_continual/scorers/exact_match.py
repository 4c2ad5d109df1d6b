"""Exact match, one variant for each normalisation that papers use."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence

from .base import Row, Scores

_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLE = re.compile(r"\b(?:a|an|the)\b")


ScoreRows = Callable[[Sequence[Row], Sequence[str] | None], Scores]


def plain(text: str) -> str:
    return text


def normalize_answer(text: str) -> str:
    """Lower case, ASCII punctuation deleted, white space collapsed; articles stay (O-LoRA, MIGU, SAPT)."""
    return " ".join(text.lower().translate(_WITHOUT_PUNCTUATION).split())


def normalize_squad(text: str) -> str:
    """As `normalize_answer`, and without a, an, the (Rajpurkar et al. 2016)."""
    return " ".join(_ARTICLE.sub(" ", text.lower().translate(_WITHOUT_PUNCTUATION)).split())


def normalize_tasl(text: str) -> str:
    """Lower case, the end token `</s>` taken out."""
    return text.lower().replace("</s>", "").strip()


def extract_answer(text: str) -> str:
    """SEEKR's answer within reasoned text: before "\\nReasoning:", else after "\\nAnswer:", else all of it.

    A full-width colon counts as a colon, the Chinese words for "answer" as "Answer".
    """
    text = text.replace("\uff1a", ":")
    if "\nReasoning:" in text:
        return text.split("\nReasoning:")[0].strip()
    for cue in ("\nAnswer:", "\n\u56de\u7b54:", "\n\u7b54\u6848:"):
        if cue in text:
            return text.split(cue)[1].strip()  # up to a second cue, as re_eval.py
    return text.strip()


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1 if the prediction equals a reference, both lower-cased, without ASCII punctuation and extra white space.

    A reference of punctuation alone (MNLI's "-" for "no label") is never right, also for an empty prediction; that is
    all in which it differs from `exact_match_olora`.
    """
    answer = normalize_answer(prediction)
    return float(any(answer == normalize_answer(r) for r in references if normalize_answer(r) or not r.strip()))


def exact_match_olora(prediction: str, references: Sequence[str]) -> float:
    """1 if normalize(prediction) = normalize(reference): lower case, no ASCII punctuation, white space collapsed."""
    return _equal(normalize_answer, prediction, references)


def exact_match_plain(prediction: str, references: Sequence[str]) -> float:
    """1 if the prediction is a reference, character by character."""
    return _equal(plain, prediction, references)


def exact_match_squad(prediction: str, references: Sequence[str]) -> float:
    """1 if equal in lower case, without ASCII punctuation, articles (a, an, the) and extra white space."""
    return _equal(normalize_squad, prediction, references)


def exact_match_tasl(prediction: str, references: Sequence[str]) -> float:
    """1 if equal in lower case, `</s>` taken out; the value of one slot in TaSL's dialogue state tracking."""
    return _equal(normalize_tasl, prediction, references)


def exact_match_casefold(prediction: str, references: Sequence[str]) -> float:
    """1 if equal apart from case; SuperNI classification in AimMerging's code (TaSL's authors)."""
    return _equal(str.casefold, prediction, references)


def exact_match_trace(prediction: str, references: Sequence[str]) -> float:
    """1 if the prediction is a reference, character by character; an empty one of either never counts."""
    return float(prediction != "" and prediction in references)


def exact_match_seekr(prediction: str, references: Sequence[str]) -> float:
    """1 if the answer extracted from the prediction (`extract_answer`) is a reference; empty never counts."""
    return exact_match_trace(extract_answer(prediction), references)


def first_letter(prediction: str, references: Sequence[str]) -> float:
    """1 if prediction and reference begin with the same character; an empty one of either never counts."""
    return float(any(prediction[:1] == reference[:1] != "" for reference in references))


def first_letter_seekr(prediction: str, references: Sequence[str]) -> float:
    """1 if the first character of the extracted answer (`extract_answer`) is the reference's first character."""
    return first_letter(extract_answer(prediction), references)


def label_likelihood(prediction: str, references: Sequence[str]) -> float:
    """1 if the label of highest log p(label, end | prompt) is a reference; predictions are labels as they stand."""
    return float(prediction in references)


def _equal(normalize: Callable[[str], str], prediction: str, references: Sequence[str]) -> float:
    answer = normalize(prediction)
    return float(any(answer == normalize(reference) for reference in references))


def of_extracted_answer(function: ScoreRows) -> ScoreRows:
    """A scorer that sees of each prediction the answer SEEKR takes out of it (`extract_answer`)."""

    def score_rows(rows: Sequence[Row], labels: Sequence[str] | None = None) -> Scores:
        return function([{**row, "prediction": extract_answer(row["prediction"])} for row in rows], labels)

    first = (function.__doc__ or "").strip().splitlines()[0]
    score_rows.__doc__ = f"Of the answer within reasoned text (`extract_answer`): {first}"
    return score_rows
