"""F1 over classes, and joint goal accuracy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ..errors import InputError
from .base import Row, Scores, mean
from .exact_match import exact_match_tasl, normalize_answer


def macro_f1(rows: Sequence[Row], labels: Sequence[str] | None = None) -> Scores:
    """Mean over classes of F1 = 2 TP / (2 TP + FP + FN), answers compared as by `exact_match`.

    Classes are the labels that occur as a reference or as a prediction (without a label set: all references), which
    is `sklearn.metrics.f1_score(average="macro")` if every answer is a label. An answer that is none is a missed
    reference and no class of its own. Of several references the predicted one counts, else the first.
    """
    counts = _count(rows, labels)
    scores = [_f1(*counts[name]) for name in sorted(counts)]
    return Scores(mean(scores), None, {"classes": float(len(scores)), "accuracy": _accuracy(rows)})


def micro_f1(rows: Sequence[Row], labels: Sequence[str] | None = None) -> Scores:
    """F1 = 2 TP / (2 TP + FP + FN) with the counts of all classes added; answers and classes as in `macro_f1`.

    It equals the accuracy if every answer and every reference is a label.
    """
    counts = _count(rows, labels)
    total = [sum(count[k] for count in counts.values()) for k in range(3)]
    return Scores(_f1(*total), None, {"classes": float(len(counts)), "accuracy": _accuracy(rows)})


def _f1(right: int, wrong: int, missed: int) -> float:
    return 2 * right / (2 * right + wrong + missed)


def _accuracy(rows: Sequence[Row]) -> float:
    return mean([float(_gold(row) == normalize_answer(row["prediction"]) != "") for row in rows])


def _gold(row: Row) -> str:
    references = [normalize_answer(reference) for reference in row["references"]]
    answer = normalize_answer(row["prediction"])
    return answer if answer in references else references[0]


def _count(rows: Sequence[Row], labels: Sequence[str] | None) -> dict[str, list[int]]:
    """TP, FP and FN of each class that occurs."""
    if labels is None:
        names = {_gold(row) for row in rows}
    else:
        names = set()
        for label in labels:
            if normalize_answer(label) in names:
                raise InputError(f"labels: {label!r} reads like another label without case and punctuation; rename it")
            names.add(normalize_answer(label))
    names.discard("")  # MNLI's "-" is no class
    right: Counter[str] = Counter()
    wrong: Counter[str] = Counter()
    missed: Counter[str] = Counter()
    for row in rows:
        gold, answer = _gold(row), normalize_answer(row["prediction"])
        if gold == answer:
            right[gold] += 1
        else:
            wrong[answer] += 1
            missed[gold] += 1
    counts = {name: [right[name], wrong[name], missed[name]] for name in names}
    counts = {name: count for name, count in counts.items() if any(count)}
    if not counts:
        raise InputError("no reference and no prediction is one of the labels; check the task's `labels`")
    return counts


def joint_goal_accuracy(rows: Sequence[Row], labels: Sequence[str] | None = None) -> Scores:
    """Share of turns in which all slots are right; rows of the same `dialogue` and `turn` are the slots of a turn.

    JGA = (1/G) sum_g min over slots s of g of [prediction_s = reference_s], in lower case and without `</s>`
    (`exact_match_tasl`). Slots without a row are not tested: TaSL's data has rows for active slots only. The score of
    a row is that of its slot; their mean is `slot_accuracy`.
    """
    slots = [exact_match_tasl(row["prediction"], row["references"]) for row in rows]
    turns: dict[tuple[str, str], float] = {}
    for row, right in zip(rows, slots, strict=True):
        key = (str(row["dialogue"]), str(row["turn"]))
        turns[key] = min(right, turns.get(key, 1.0))
    details = {"turns": float(len(turns)), "slot_accuracy": mean(slots)}
    return Scores(mean(list(turns.values())), slots, details)
