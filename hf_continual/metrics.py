"""Continual-learning metrics of a score matrix, each variant under its own name.

`R` is a (tasks x tasks) array: `R[i, j]` is the score on task `j` after training task `i`, both counted from 0, and
`NaN` (or `None`) means "not evaluated". `T` is the number of tasks. "BWT" in two papers is often two formulas, so the
variant is an argument and `METRICS` keeps the formula and the source of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import ArrayLike

from .errors import InputError, did_you_mean

__all__ = [
    "METRICS",
    "MetricInfo",
    "average_performance",
    "backward_transfer",
    "forgetting",
    "forward_transfer",
    "learning_accuracy",
    "summarize",
]

BACKWARD_TRANSFER_VARIANTS = ("lopez-paz", "divide_by_t", "lower_triangle")
FORWARD_TRANSFER_VARIANTS = ("lopez-paz", "diagonal", "zero_shot")
FORGETTING_VARIANTS = ("chaudhry", "all_rows", "sapt")


def average_performance(R: ArrayLike) -> float:
    """Score after the last task: AP = (1/T) sum_j R[T-1, j] (ACC in Lopez-Paz & Ranzato 2017, Eq. 2).

    Works on the last row, so `R` may also be 1 x T (a joint run).
    """
    R = _matrix(R)
    score = _reader(R, "average_performance")
    return _mean(score(R.shape[0] - 1, j) for j in range(R.shape[1]))


def backward_transfer(R: ArrayLike, *, variant: str = "lopez-paz") -> float:
    """What later tasks did to earlier ones; negative is forgetting. `R` is T x T; 0.0 for one task.

    Args:
        variant: `"lopez-paz"`: (1/(T-1)) sum_{j<T-1} (R[T-1, j] - R[j, j]) (Lopez-Paz & Ranzato 2017, Eq. 3);
            `"divide_by_t"`: the same sum divided by T (the code of SAPT and SEEKR);
            `"lower_triangle"`: mean over all i > j of R[i, j] - R[j, j] (LibContinual).
    """
    _check_variant("backward_transfer", variant, BACKWARD_TRANSFER_VARIANTS)
    R = _square(R, "backward_transfer")
    score = _reader(R, "backward_transfer")
    T = len(R)
    if variant == "lower_triangle":
        return _mean(score(i, j) - score(j, j) for i in range(T) for j in range(i))
    changes = [score(T - 1, j) - score(j, j) for j in range(T - 1)]
    return sum(changes) / T if variant == "divide_by_t" else _mean(changes)


def forward_transfer(R: ArrayLike, baseline: ArrayLike | None = None, *, variant: str = "lopez-paz") -> float:
    """What earlier tasks did for later ones. `R` is T x T, `baseline` has T scores; 0.0 where no term is left (T = 1).

    Args:
        baseline: scores to compare with: the base model's, or those of models trained on one task each.
        variant: `"lopez-paz"`: (1/(T-1)) sum_{j>=1} (R[j-1, j] - baseline[j]) (Lopez-Paz & Ranzato 2017, Eq. 4);
            `"diagonal"`: (1/T) sum_j (R[j, j] - baseline[j]) (SAPT, with single-task scores as baseline);
            `"zero_shot"`: (1/(T-1)) sum_{j>=1} R[j-1, j], no baseline (TaSL).
    """
    _check_variant("forward_transfer", variant, FORWARD_TRANSFER_VARIANTS)
    R = _square(R, "forward_transfer")
    score = _reader(R, "forward_transfer")
    T = len(R)
    if variant == "zero_shot":
        return _mean(score(j - 1, j) for j in range(1, T))
    base = _baseline(baseline, T)
    if variant == "diagonal":
        return _mean(score(j, j) - base(j) for j in range(T))
    return _mean(score(j - 1, j) - base(j) for j in range(1, T))


def forgetting(R: ArrayLike, *, variant: str = "chaudhry") -> float:
    """Best earlier score minus the last: (1/(T-1)) sum_{j<T-1} (best_j - R[T-1, j]). `R` is T x T; 0.0 for one task.

    Args:
        variant: which rows count for `best_j`, the last row never among them.
            `"chaudhry"`: max_{j<=i<=T-2} R[i, j], since the task was learned (Chaudhry et al. 2018, Eq. 3);
            `"all_rows"`: max_{0<=i<=T-2} R[i, j], also before the task was learned;
            `"sapt"`: max(0, max_{j<=i<=T-2} R[i, j]): F.Ra in SAPT's code, which fills the rest of the matrix with 0.
    """
    _check_variant("forgetting", variant, FORGETTING_VARIANTS)
    R = _square(R, "forgetting")
    score = _reader(R, "forgetting")
    T = len(R)

    def best(j: int) -> float:
        first = 0 if variant == "all_rows" else j
        # SAPT's matrix has a 0 above the diagonal for every task but the first.
        padding = [0.0] if variant == "sapt" and j > 0 else []
        return max(padding + [score(i, j) for i in range(first, T - 1)])

    return _mean(best(j) - score(T - 1, j) for j in range(T - 1))


def learning_accuracy(R: ArrayLike) -> float:
    """Score of each task just after it was learned: LA = (1/T) sum_j R[j, j] (Riemer et al. 2019). `R` is T x T."""
    R = _square(R, "learning_accuracy")
    score = _reader(R, "learning_accuracy")
    return _mean(score(j, j) for j in range(len(R)))


def summarize(R: ArrayLike, baseline: ArrayLike | None = None) -> dict[str, float]:
    """The default variant of each metric, by name.

    A joint run (`R` is 1 x T) has only `average_performance`. `forward_transfer` is there if `baseline` is given and
    every R[j-1, j] was evaluated.
    """
    R = _matrix(R)
    values = {"average_performance": average_performance(R)}
    if R.shape[0] == 1 and R.shape[1] > 1:
        return values
    values["backward_transfer"] = backward_transfer(R)
    values["forgetting"] = forgetting(R)
    values["learning_accuracy"] = learning_accuracy(R)
    if baseline is not None and len(R) > 1:
        known = np.array(baseline, dtype=float)[1:]
        if not np.isnan(np.diagonal(R, offset=1)).any() and not np.isnan(known).any():
            values["forward_transfer"] = forward_transfer(R, baseline)
    return values


@dataclass(frozen=True)
class MetricInfo:
    """One variant of one metric: `function(R)`, or `function(R, baseline)` if `needs_baseline`."""

    id: str
    formula: str
    source: str
    function: Callable[..., float]
    needs_baseline: bool = False


_GEM = "Lopez-Paz & Ranzato 2017 (GEM)"

METRICS: dict[str, MetricInfo] = {
    info.id: info
    for info in (
        MetricInfo("average_performance", "(1/T) sum_j R[T-1, j]", f"{_GEM}, Eq. 2", average_performance),
        MetricInfo(
            "backward_transfer",
            "(1/(T-1)) sum_{j<T-1} (R[T-1, j] - R[j, j])",
            f"{_GEM}, Eq. 3",
            backward_transfer,
        ),
        MetricInfo(
            "backward_transfer/divide_by_t",
            "(1/T) sum_{j<T-1} (R[T-1, j] - R[j, j])",
            "code of SAPT (score.py) and SEEKR (show_results.py)",
            partial(backward_transfer, variant="divide_by_t"),
        ),
        MetricInfo(
            "backward_transfer/lower_triangle",
            "(2/(T(T-1))) sum_{i>j} (R[i, j] - R[j, j])",
            "LibContinual (README)",
            partial(backward_transfer, variant="lower_triangle"),
        ),
        MetricInfo(
            "forward_transfer",
            "(1/(T-1)) sum_{j>=1} (R[j-1, j] - baseline[j])",
            f"{_GEM}, Eq. 4",
            forward_transfer,
            needs_baseline=True,
        ),
        MetricInfo(
            "forward_transfer/diagonal",
            "(1/T) sum_j (R[j, j] - baseline[j])",
            "SAPT (its score.py subtracts the constant 50.94 as mean baseline)",
            partial(forward_transfer, variant="diagonal"),
            needs_baseline=True,
        ),
        MetricInfo(
            "forward_transfer/zero_shot",
            "(1/(T-1)) sum_{j>=1} R[j-1, j]",
            "code of TaSL (eval_fwt.py)",
            partial(forward_transfer, variant="zero_shot"),
        ),
        MetricInfo(
            "forgetting",
            "(1/(T-1)) sum_{j<T-1} (max_{j<=i<=T-2} R[i, j] - R[T-1, j])",
            "Chaudhry et al. 2018 (Riemannian Walk), Eq. 3",
            forgetting,
        ),
        MetricInfo(
            "forgetting/all_rows",
            "(1/(T-1)) sum_{j<T-1} (max_{0<=i<=T-2} R[i, j] - R[T-1, j])",
            "F.Ra as SAPT writes it: the maximum over all earlier rows",
            partial(forgetting, variant="all_rows"),
        ),
        MetricInfo(
            "forgetting/sapt",
            "(1/(T-1)) sum_{j<T-1} (max(0, max_{j<=i<=T-2} R[i, j]) - R[T-1, j])",
            "code of SAPT (score.py), which fills cells above the diagonal with 0",
            partial(forgetting, variant="sapt"),
        ),
        MetricInfo("learning_accuracy", "(1/T) sum_j R[j, j]", "Riemer et al. 2019 (MER)", learning_accuracy),
    )
}


def _matrix(R: ArrayLike) -> np.ndarray:
    """A float copy of `R`; refuses what is not a non-empty table of numbers."""
    try:
        matrix = np.array(R, dtype=float)
    except (TypeError, ValueError):
        raise InputError("R: expected a table of numbers with rows of equal length") from None
    if matrix.ndim != 2 or matrix.size == 0:
        raise InputError(f"R: expected a table (tasks x tasks), got an array of shape {matrix.shape}")
    return matrix


def _square(R: ArrayLike, metric: str) -> np.ndarray:
    matrix = _matrix(R)
    rows, columns = matrix.shape
    if rows != columns:
        raise InputError(
            f"{metric} needs one row for each task, but R is {rows} x {columns}; "
            "for a joint run use average_performance"
        )
    return matrix


def _reader(R: np.ndarray, metric: str) -> Callable[[int, int], float]:
    """`score(i, j)` = R[i, j], or a sentence if that cell was not evaluated."""

    def score(i: int, j: int) -> float:
        value = float(R[i, j])
        if np.isnan(value):
            raise InputError(
                f"{metric} needs R[{i}, {j}], the score on task {j} after training task {i}, which was not evaluated"
            )
        return value

    return score


def _baseline(baseline: ArrayLike | None, tasks: int) -> Callable[[int], float]:
    if baseline is None:
        raise InputError(
            "forward_transfer needs a baseline, one score for each task; without one use variant='zero_shot'"
        )
    try:
        values = np.array(baseline, dtype=float)
    except (TypeError, ValueError):
        raise InputError("baseline: expected one number for each task") from None
    if values.shape != (tasks,):
        raise InputError(f"baseline: expected {tasks} scores, one for each task, got shape {values.shape}")

    def base(j: int) -> float:
        if np.isnan(values[j]):
            raise InputError(f"forward_transfer needs baseline[{j}], which was not evaluated")
        return float(values[j])

    return base


def _check_variant(metric: str, variant: str, variants: tuple[str, ...]) -> None:
    if variant not in variants:
        raise InputError(f"{metric}: no variant '{variant}'{did_you_mean(variant, variants)}")


def _mean(values: Iterable[float]) -> float:
    """Mean of `values`, 0.0 if there are none."""
    values = list(values)
    return float(sum(values) / len(values)) if values else 0.0
