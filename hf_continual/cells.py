"""A cell of the score matrix, made from kept predictions: no model, and no torch."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any

from .scorers import SCORERS, lower_is_better
from .scorers import score as score_rows


@dataclass
class Cell:
    """One evaluated cell R[i, j]: the score and everything needed to compute another one later.

    Attributes:
        metric: the name of the number.
        score: the score of the task.
        n: rows.
        others: further numbers, such as `predictions_outside_labels`.
        settings: how the predictions were made.
        predictions: for each row `index`, `prediction`, `references` and what the scorer needs.
        tokens: the tokens of each row's (first) answer, its end token included, if it was generated; not stored.
    """

    metric: str
    score: float
    n: int
    others: dict[str, float]
    settings: dict[str, Any]
    predictions: list[dict[str, Any]]
    tokens: list[list[int]] | None = field(default=None, repr=False, compare=False)

    @property
    def higher_is_better(self) -> bool:
        """False where less is better, as for perplexity."""
        return not lower_is_better(self.metric)


def make_cell(scorer: str, predictions: list[dict[str, Any]], settings: dict[str, Any], where: str = "") -> Cell:
    """Score kept predictions. `where` names their file or task in messages.

    Predictions made with several seeds, as of an end task, give the mean of the seeds' scores.
    """
    seeds = list(dict.fromkeys(row["seed"] for row in predictions if "seed" in row))
    if seeds:
        return _over_seeds(scorer, predictions, settings, where, seeds)
    found = score_rows(scorer, predictions, settings.get("labels"), where)
    if scorer == "rouge_l":
        found.details["exact_match"] = score_rows("exact_match", predictions, None, where).value
    metric = SCORERS[scorer].metric or scorer
    return Cell(metric, found.value, len(predictions), found.details, settings, predictions)


def _over_seeds(
    scorer: str, predictions: list[dict[str, Any]], settings: dict[str, Any], where: str, seeds: list[int]
) -> Cell:
    """`n` is the rows of one seed, and `others` has the score of each seed beside the means."""
    cells = []
    for seed in seeds:
        own = (row for row in predictions if row["seed"] == seed)
        rows = [{key: value for key, value in row.items() if key != "seed"} for row in own]
        cells.append(make_cell(scorer, rows, settings, f"{where}, seed {seed}"))
    others = {name: statistics.fmean(cell.others[name] for cell in cells) for name in cells[0].others}
    metric = cells[0].metric
    others |= {f"{metric} of seed {seed}": cell.score for seed, cell in zip(seeds, cells, strict=True)}
    return Cell(metric, statistics.fmean(c.score for c in cells), cells[0].n, others, settings, predictions)
