"""What a scorer is, what it gives, and the rows it takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import InputError

Row = Mapping[str, Any]


@dataclass
class Scores:
    """What a scorer finds in the rows of one task.

    Args:
        value: the score of the task.
        rows: the score of each row, in order; `None` where a row alone has none. `value` is their mean unless the
            scorer says otherwise.
        details: further numbers worth keeping, such as the perplexity of each domain.
    """

    value: float
    rows: list[float] | None = None
    details: dict[str, float] = field(default_factory=dict)


def nothing_needed() -> None:
    """The scorer works as installed."""


@dataclass(frozen=True)
class Scorer:
    """One way to score the rows of a task.

    Args:
        name: its name in a recipe.
        function: gives the scores of checked rows, and the label set if there is one. Its docstring has the formula.
        source: the paper or the code it follows.
        columns: what a row needs besides `prediction` and `references`; each is also the argument of `compute`.
        optional: what a row may also have.
        metric: the name of the number, where it differs from `name`.
        answers: `text` (generated), `code` (generated, white space kept), `labels` (the likeliest label) or `tokens`
            (log-likelihoods of given text).
        uses_references: whether rows need `references`.
        samples: so many answers to a row are needed.
        together: columns of which rows with the same values are scored as one, the widest first; such rows are not
            separated when rows are drawn or held out.
        bounded: the score lies in [0, 1].
        higher_is_better: false for perplexity.
        ready: raises InputError if a package or a permission is missing.
        same: the form in which an answer is compared with a label.
    """

    name: str
    function: Callable[[Sequence[Row], Sequence[str] | None], Scores]
    source: str
    columns: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    metric: str = ""
    answers: str = "text"
    uses_references: bool = True
    samples: int = 1
    together: tuple[str, ...] = ()
    bounded: bool = True
    higher_is_better: bool = True
    ready: Callable[[], None] = nothing_needed
    same: Callable[[str], str] | None = None

    @property
    def summary(self) -> str:
        """First line of the docstring."""
        return (self.function.__doc__ or "").strip().splitlines()[0]


def mean(values: Sequence[float]) -> float:
    return float(sum(values) / len(values))


def each_row(score: Callable[[str, Sequence[str]], float]) -> Callable[[Sequence[Row], Sequence[str] | None], Scores]:
    """A scorer of rows one by one, whose value is their mean."""

    def score_rows(rows: Sequence[Row], labels: Sequence[str] | None = None) -> Scores:
        scores = [score(row["prediction"], row["references"]) for row in rows]
        return Scores(mean(scores), scores)

    score_rows.__doc__ = score.__doc__
    return score_rows


def references_of(row: Row, where: str = "the row") -> list[str]:
    """The right answers of a row: `references`, one string or several, or else its `completion`.

    Raises:
        InputError: if it has none, or one that is no string.
    """
    found = row.get("references")
    if found is None:
        found = row.get("completion")
    if isinstance(found, str):
        return [found]
    if found is None or (isinstance(found, Sequence) and not len(found)):
        raise InputError(f"{where} has no references; give it `references`, a string or a list of strings")
    if not isinstance(found, Sequence):
        raise InputError(
            f"{where}: references={found!r} is of type {type(found).__name__}; give a string or a list of strings"
        )
    for reference in found:
        if not isinstance(reference, str):
            raise InputError(
                f"{where}: the reference {reference!r} is of type {type(reference).__name__}, not a string; "
                "convert all references of a task to strings"
            )
    return list(found)


def check_rows(scorer: Scorer, rows: Sequence[Row], where: str = "", predicted: bool = True) -> list[dict[str, Any]]:
    """The rows with `references` as a list, each having what the scorer needs.

    Args:
        where: the file or the task the rows are of, for messages.
        predicted: false for evaluation rows that have no predictions yet.

    Raises:
        InputError: for a row without references, with references of mixed type, or without a column.
    """
    prefix = f"{where}, " if where else ""
    checked = []
    first: Any = None
    for number, row in enumerate(rows):
        place = f"{prefix}row {number}"
        full = dict(row)
        if scorer.uses_references:
            full["references"] = references_of(row, place)
            given = row.get("references")
            kind = None if given is None else "a string" if isinstance(given, str) else "a list"
            if number == 0:
                first = kind
            elif kind != first:
                raise InputError(
                    f"{place}: references is {kind or 'missing'}, but {first or 'missing'} in row 0; "
                    "write them alike in all rows of a task"
                )
        for column in scorer.columns if predicted else [c for c in scorer.columns if c not in ANSWERED]:
            if row.get(column) is None:
                raise InputError(f"{place} has no '{column}', which scorer '{scorer.name}' needs; add that column")
        if predicted and scorer.answers != "tokens":
            prediction = row.get("prediction")
            if not isinstance(prediction, str) and not (scorer.answers == "code" and isinstance(prediction, list)):
                raise InputError(f"{place}: prediction={prediction!r} is no string; score rows with predictions")
        checked.append(full)
    return checked


ANSWERED = ("text_log_likelihood", "tokens")
"""Columns that come with the predictions, not with the data."""


def outside_labels(rows: Sequence[Row], labels: Sequence[str], same: Callable[[str], str]) -> dict[str, float]:
    """How many predictions, and how many rows by all their references, are not among the labels."""
    allowed = {same(label) for label in labels}
    return {
        "predictions_outside_labels": float(sum(same(row["prediction"]) not in allowed for row in rows)),
        "references_outside_labels": float(sum(not allowed.intersection(map(same, row["references"])) for row in rows)),
    }
