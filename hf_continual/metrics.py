"""Continual-learning metrics of a score matrix, each variant under its own name.

`R` is a (tasks x tasks) array: `R[i, j]` is the score on task `j` after training task `i`, both counted from 0, and
`NaN` (or `None`) means "not evaluated". `T` is the number of tasks. "BWT" in two papers is often two formulas, so the
variant is an argument, `METRICS` keeps the formula and the source of each, and `CONVENTIONS` which of them each paper
or library reports, under the name it uses.

In every formula more is better. Perplexities, of which less is better, enter them as `R[i, j] = -ln PPL[i, j]`, the
mean log-likelihood of a token in nats (`oriented`): backward transfer below 0 and forgetting above 0 then say that a
task got worse, as with accuracies, and a difference of 0.1 is a factor of 1.105 in perplexity wherever it begins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import ArrayLike

from .errors import InputError, did_you_mean
from .scorers import lower_is_better

__all__ = [
    "CONVENTIONS",
    "METRICS",
    "Convention",
    "MetricInfo",
    "average_performance",
    "backward_transfer",
    "find_convention",
    "forgetting",
    "forward_transfer",
    "learning_accuracy",
    "less_is_better",
    "oriented",
    "summarize",
]

AVERAGE_PERFORMANCE_VARIANTS = ("lopez-paz", "weighted", "incremental")
BACKWARD_TRANSFER_VARIANTS = ("lopez-paz", "divide_by_t", "lower_triangle")
FORWARD_TRANSFER_VARIANTS = ("lopez-paz", "divide_by_t", "diagonal", "zero_shot", "sapt")
FORGETTING_VARIANTS = ("chaudhry", "all_rows", "sapt", "mammoth", "since_learned")

SAPT_SINGLE_TASK_MEAN = 0.5094
"""The mean single-task score that SAPT's score.py subtracts whatever it has loaded: 50.94 there, in percent."""


def less_is_better(names: Iterable[str]) -> bool:
    """Whether of all these scores less is better, as of perplexities.

    Raises:
        InputError: if of some less is better and of others more, so that their mean would be neither.
    """
    names = sorted(set(names))
    small = [name for name in names if lower_is_better(name)]
    if small and len(small) < len(names):
        raise InputError(
            f"some tasks are scored by {', '.join(small)}, where less is better, and some by "
            f"{', '.join(name for name in names if name not in small)}, so that their mean is neither; choose one "
            "--scorer, or read the tasks one by one"
        )
    return bool(small)


def oriented(R: ArrayLike, less_is_better: bool) -> np.ndarray:
    """The scores as the formulas take them: -ln of those of which less is better."""
    values = np.array(R, dtype=float)
    if not less_is_better:
        return values
    with np.errstate(divide="ignore"):
        return -np.log(values)


def average_performance(R: ArrayLike, sizes: ArrayLike | None = None, *, variant: str = "lopez-paz") -> float:
    """Score after the last task. `R` is T x T; it may be 1 x T (a joint run) where only its last row is used.

    Args:
        sizes: number of evaluation rows of each task, for `"weighted"`.
        variant: `"lopez-paz"`: (1/T) sum_j R[T-1, j] (ACC in Lopez-Paz & Ranzato 2017, Eq. 2);
            `"weighted"`: sum_j n_j R[T-1, j] / sum_j n_j, the score over all rows as if they were one task;
            `"incremental"`: (1/T) sum_i (1/(i+1)) sum_{j<=i} R[i, j], over all moments (Rebuffi et al. 2017).
    """
    _check_variant("average_performance", variant, AVERAGE_PERFORMANCE_VARIANTS)
    if variant == "incremental":
        R = _square(R, "average_performance/incremental")
        score = _reader(R, "average_performance/incremental")
        return _mean(_mean(score(i, j) for j in range(i + 1)) for i in range(len(R)))
    R = _matrix(R)
    score = _reader(R, "average_performance")
    last, T = R.shape[0] - 1, R.shape[1]
    if variant == "weighted":
        size = _given(sizes, T, "average_performance/weighted", "sizes", "the number of evaluation rows")
        return sum(size(j) * score(last, j) for j in range(T)) / sum(size(j) for j in range(T))
    return _mean(score(last, j) for j in range(T))


def backward_transfer(R: ArrayLike, *, variant: str = "lopez-paz") -> float:
    """What later tasks did to earlier ones; negative is forgetting. `R` is T x T; 0.0 for one task.

    Args:
        variant: `"lopez-paz"`: (1/(T-1)) sum_{j<T-1} (R[T-1, j] - R[j, j]) (Lopez-Paz & Ranzato 2017, Eq. 3);
            `"divide_by_t"`: the same sum divided by T (the code of GEM, SAPT and SEEKR);
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
            `"divide_by_t"`: the same sum divided by T (the code of GEM);
            `"diagonal"`: (1/T) sum_j (R[j, j] - baseline[j]) (SAPT, with single-task scores as baseline);
            `"zero_shot"`: (1/(T-1)) sum_{j>=1} R[j-1, j], no baseline (TaSL);
            `"sapt"`: (1/T) sum_j R[j, j] - 0.5094, whatever the task (the code of SAPT).
    """
    _check_variant("forward_transfer", variant, FORWARD_TRANSFER_VARIANTS)
    R = _square(R, "forward_transfer")
    score = _reader(R, "forward_transfer")
    T = len(R)
    if variant == "zero_shot":
        return _mean(score(j - 1, j) for j in range(1, T))
    if variant == "sapt":
        return _mean(score(j, j) for j in range(T)) - SAPT_SINGLE_TASK_MEAN
    base = _baseline(baseline, T)
    if variant == "diagonal":
        return _mean(score(j, j) - base(j) for j in range(T))
    changes = [score(j - 1, j) - base(j) for j in range(1, T)]
    return sum(changes) / T if variant == "divide_by_t" else _mean(changes)


def forgetting(R: ArrayLike, *, variant: str = "chaudhry") -> float:
    """Best earlier score minus the last: (1/(T-1)) sum_{j<T-1} (best_j - R[T-1, j]). `R` is T x T; 0.0 for one task.

    Args:
        variant: which rows count for `best_j`.
            `"chaudhry"`: max_{j<=i<=T-2} R[i, j], since the task was learned (Chaudhry et al. 2018, Eq. 3, on a matrix
            without scores of tasks not learned yet);
            `"all_rows"`: max_{0<=i<=T-2} R[i, j], also before the task was learned (Eq. 3 as written);
            `"sapt"`: max(0, max_{j<=i<=T-2} R[i, j]): F.Ra in SAPT's code, which fills the rest of the matrix with 0;
            `"mammoth"`: max(0, max_{j<=i<=T-1} R[i, j]): with the last row, so a task that improved counts as 0;
            `"since_learned"`: R[j, j], no maximum: the negative of backward transfer (Avalanche).
    """
    _check_variant("forgetting", variant, FORGETTING_VARIANTS)
    R = _square(R, "forgetting")
    score = _reader(R, "forgetting")
    T = len(R)

    def best(j: int) -> float:
        if variant == "since_learned":
            return score(j, j)
        first = 0 if variant == "all_rows" else j
        # The matrices of SAPT and Mammoth have a 0 above the diagonal for every task but the first.
        padding = [0.0] if variant in ("sapt", "mammoth") and j > 0 else []
        return max(padding + [score(i, j) for i in range(first, T if variant == "mammoth" else T - 1)])

    return _mean(best(j) - score(T - 1, j) for j in range(T - 1))


def learning_accuracy(R: ArrayLike) -> float:
    """Score of each task just after it was learned: LA = (1/T) sum_j R[j, j] (Riemer et al. 2019). `R` is T x T."""
    R = _square(R, "learning_accuracy")
    score = _reader(R, "learning_accuracy")
    return _mean(score(j, j) for j in range(len(R)))


def summarize(R: ArrayLike, baseline: ArrayLike | None = None, names: Iterable[str] = ()) -> dict[str, float]:
    """The default variant of each metric, by name.

    Args:
        names: of the scores in `R`, such as `["exact_match"]`. Where of all less is better, the values are in nats
            (`oriented`); where of some, there are none.

    A joint run (`R` is 1 x T) has only `average_performance`. `forward_transfer` is there if `baseline` is given and
    every R[j-1, j] was evaluated.
    """
    try:
        small = less_is_better(names)
    except InputError:
        return {}
    R = oriented(_matrix(R), small)
    baseline = oriented(baseline, small) if baseline is not None else None
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
    """One variant of one metric.

    Args:
        function: `function(R)`, or `function(R, x)` with what `needs` names.
        needs: `baseline` (scores of the model before any task), `single_task` (scores of models trained on one task
            each) or `sizes` (number of evaluation rows); each one number a task.
        differs: in a few words, how it departs from the default variant of its family.
        lower_is_better: true for forgetting.
        bounded: true if it has numbers of its own in it that only fit scores from 0 to 1.
    """

    id: str
    formula: str
    source: str
    function: Callable[..., float]
    needs: str = ""
    differs: str = ""
    lower_is_better: bool = False
    bounded: bool = False

    @property
    def family(self) -> str:
        """The metric it is a variant of."""
        return self.id.partition("/")[0]

    def compute(
        self,
        R: ArrayLike,
        *,
        baseline: ArrayLike | None = None,
        single_task: ArrayLike | None = None,
        sizes: ArrayLike | None = None,
    ) -> float:
        """The value on a matrix; InputError names what is missing."""
        if not self.needs:
            return self.function(R)
        given = {"baseline": baseline, "single_task": single_task, "sizes": sizes}[self.needs]
        if given is None:
            raise InputError(f"{self.id} needs {NEEDS[self.needs]}")
        return self.function(R, given)


NEEDS = {
    "baseline": "the scores of the model before any task; set evaluation.base_model to true",
    "single_task": "the scores of models trained on one task each; report takes their runs with --single_task",
    "sizes": "the number of evaluation rows of each task",
}

_GEM = "Lopez-Paz & Ranzato 2017 (GEM)"

METRICS: dict[str, MetricInfo] = {
    info.id: info
    for info in (
        MetricInfo("average_performance", "(1/T) sum_j R[T-1, j]", f"{_GEM}, Eq. 2", average_performance),
        MetricInfo(
            "average_performance/weighted",
            "sum_j n_j R[T-1, j] / sum_j n_j",
            "code of O-LoRA and MIGU (predict_exact_match), Avalanche (StreamAccuracy)",
            partial(average_performance, variant="weighted"),
            needs="sizes",
            differs="weighs each task by its evaluation rows",
        ),
        MetricInfo(
            "average_performance/incremental",
            "(1/T) sum_i (1/(i+1)) sum_{j<=i} R[i, j]",
            "Rebuffi et al. 2017 (iCaRL); code of EasyCL (cl_metrics.py, Avg)",
            partial(average_performance, variant="incremental"),
            differs="averages over the moments after every task, not the last alone",
        ),
        MetricInfo(
            "backward_transfer",
            "(1/(T-1)) sum_{j<T-1} (R[T-1, j] - R[j, j])",
            f"{_GEM}, Eq. 3",
            backward_transfer,
        ),
        MetricInfo(
            "backward_transfer/divide_by_t",
            "(1/T) sum_{j<T-1} (R[T-1, j] - R[j, j])",
            "code of GEM (metrics.py), SAPT (score.py) and SEEKR (show_results.py)",
            partial(backward_transfer, variant="divide_by_t"),
            differs="divides by T: counts the last task, whose change is 0",
        ),
        MetricInfo(
            "backward_transfer/lower_triangle",
            "(2/(T(T-1))) sum_{i>j} (R[i, j] - R[j, j])",
            "LibContinual (README)",
            partial(backward_transfer, variant="lower_triangle"),
            differs="averages over every later task, not the last alone",
        ),
        MetricInfo(
            "forward_transfer",
            "(1/(T-1)) sum_{j>=1} (R[j-1, j] - baseline[j])",
            f"{_GEM}, Eq. 4",
            forward_transfer,
            needs="baseline",
        ),
        MetricInfo(
            "forward_transfer/divide_by_t",
            "(1/T) sum_{j>=1} (R[j-1, j] - baseline[j])",
            "code of GEM (metrics.py)",
            partial(forward_transfer, variant="divide_by_t"),
            needs="baseline",
            differs="divides by T: counts the first task as 0",
        ),
        MetricInfo(
            "forward_transfer/diagonal",
            "(1/T) sum_j (R[j, j] - single_task[j])",
            "SAPT; code of AimMerging (eval_fwt_superni.py)",
            partial(forward_transfer, variant="diagonal"),
            needs="single_task",
            differs="each task after it was learned, against a model trained on it alone",
        ),
        MetricInfo(
            "forward_transfer/zero_shot",
            "(1/(T-1)) sum_{j>=1} R[j-1, j]",
            "code of TaSL (eval_fwt.py)",
            partial(forward_transfer, variant="zero_shot"),
            differs="subtracts no baseline",
        ),
        MetricInfo(
            "forward_transfer/sapt",
            "(1/T) sum_j R[j, j] - 0.5094",
            "code of SAPT (score.py, line 26: the constant 50.94, not the single-task scores it loads)",
            partial(forward_transfer, variant="sapt"),
            differs="each task after it was learned, minus the constant 50.94 whatever the tasks",
            bounded=True,
        ),
        MetricInfo(
            "forgetting",
            "(1/(T-1)) sum_{j<T-1} (max_{j<=i<=T-2} R[i, j] - R[T-1, j])",
            "Chaudhry et al. 2018 (Riemannian Walk), Eq. 3, over the rows since the task was learned",
            forgetting,
            lower_is_better=True,
        ),
        MetricInfo(
            "forgetting/all_rows",
            "(1/(T-1)) sum_{j<T-1} (max_{0<=i<=T-2} R[i, j] - R[T-1, j])",
            "Chaudhry et al. 2018 (Riemannian Walk), Eq. 3 as written",
            partial(forgetting, variant="all_rows"),
            differs="the best score may be from before the task was learned",
            lower_is_better=True,
        ),
        MetricInfo(
            "forgetting/sapt",
            "(1/(T-1)) sum_{j<T-1} (max(0, max_{j<=i<=T-2} R[i, j]) - R[T-1, j])",
            "code of SAPT (score.py), which fills cells above the diagonal with 0",
            partial(forgetting, variant="sapt"),
            differs="cells above the diagonal count as 0, which matters for scores below 0 only",
            lower_is_better=True,
            bounded=True,
        ),
        MetricInfo(
            "forgetting/mammoth",
            "(1/(T-1)) sum_{j<T-1} (max(0, max_{j<=i<=T-1} R[i, j]) - R[T-1, j])",
            "code of Mammoth (utils/metrics.py)",
            partial(forgetting, variant="mammoth"),
            differs="the best score may be the last one: never below 0",
            lower_is_better=True,
            bounded=True,
        ),
        MetricInfo(
            "forgetting/since_learned",
            "(1/(T-1)) sum_{j<T-1} (R[j, j] - R[T-1, j])",
            "code of Avalanche (forgetting_bwt.py)",
            partial(forgetting, variant="since_learned"),
            differs="takes no best score, but the one just after the task: minus backward transfer",
            lower_is_better=True,
        ),
        MetricInfo("learning_accuracy", "(1/T) sum_j R[j, j]", "Riemer et al. 2019 (MER)", learning_accuracy),
    )
}


@dataclass(frozen=True)
class Convention:
    """The metrics of one paper or library.

    Args:
        metrics: the name it uses for a metric -> id in `METRICS`.
        note: what to know before comparing with its numbers, such as where its paper and its code part.
    """

    id: str
    source: str
    metrics: dict[str, str]
    note: str = ""


_AP, _BWT, _FWT, _F = "average_performance", "backward_transfer", "forward_transfer", "forgetting"
_RANDOM = "Its baseline of forward transfer is the model at random initialisation; here it is the base model."
_SUM_T = "Its code divides by T: see "

CONVENTIONS: dict[str, Convention] = {
    convention.id: convention
    for convention in (
        Convention(
            "default",
            "this package",
            {"AP": _AP, "BWT": _BWT, "F": _F, "LA": "learning_accuracy", "FWT": _FWT},
        ),
        Convention(
            "lopez-paz",
            f"{_GEM}, Eqs. 2 to 4",
            {"ACC": _AP, "BWT": _BWT, "FWT": _FWT},
            f"{_RANDOM} {_SUM_T}gem-code.",
        ),
        Convention(
            "gem-code",
            "code of GEM (metrics/metrics.py)",
            {"Final Accuracy": _AP, "Backward": f"{_BWT}/divide_by_t", "Forward": f"{_FWT}/divide_by_t"},
            f"The paper divides by T-1: see lopez-paz. {_RANDOM}",
        ),
        Convention(
            "chaudhry",
            "Chaudhry et al. 2018 (Riemannian Walk)",
            {"A": _AP, "F": f"{_F}/all_rows"},
            "Its intransigence needs a jointly trained model for each task and is not computed.",
        ),
        Convention(
            "sapt",
            "SAPT, Zhao et al. 2024",
            {"AP": _AP, "F.Ra": _F, "FWT": f"{_FWT}/diagonal", "BWT": f"{_BWT}/divide_by_t"},
            "F.Ra is over the scores since a task was learned; its code computes it and FWT otherwise: see sapt-code.",
        ),
        Convention(
            "sapt-code",
            "code of SAPT (score.py)",
            {"Cl": _AP, "Fgt": f"{_F}/sapt", "Fwt": f"{_FWT}/sapt", "Bwt": f"{_BWT}/divide_by_t"},
            "Fwt subtracts a constant that belongs to one model on one benchmark.",
        ),
        Convention(
            "kif",
            "KIF, Feng et al. 2024, which cites SAPT's protocol",
            {"AP": _AP, "F.Ra": _F, "FWT": f"{_FWT}/diagonal", "BWT": f"{_BWT}/divide_by_t"},
            "Taken from SAPT, whose evaluation it follows; formulas of its own were not found.",
        ),
        Convention(
            "tasl",
            "TaSL, Feng et al. 2024; its code (eval_avgJGA.py, eval_fwt.py, eval_bwt.py)",
            {"Avg.JGA": _AP, "FWT": f"{_FWT}/zero_shot", "BWT": _BWT},
            "The paper averages over five orders, and its scores are joint goal accuracy of merged models.",
        ),
        Convention(
            "aimmerging",
            "code of AimMerging (src/eval_*_superni.py)",
            {"OP": _AP, "FWT": f"{_FWT}/diagonal", "BWT": _BWT},
        ),
        Convention(
            "trace",
            "TRACE, Wang et al. 2023",
            {"OP": _AP, "BWT": _BWT},
            "No code computes them; the published BWT agrees with T-1 (Table 8), not with T.",
        ),
        Convention("seekr", "SEEKR, He et al. 2024, Eq. 15", {"OP": _AP, "BWT": _BWT}, f"{_SUM_T}seekr-code."),
        Convention(
            "seekr-code",
            "code of SEEKR (show_results.py)",
            {"avg": _AP, "bwt": f"{_BWT}/divide_by_t"},
            "The paper divides by T-1: see seekr.",
        ),
        Convention(
            "olora",
            "O-LoRA, Wang et al. 2023",
            {"average accuracy": _AP},
            "Its code prints the score over all rows: see olora-code.",
        ),
        Convention("olora-code", "code of O-LoRA (src/compute_metrics.py)", {"predict_exact_match": f"{_AP}/weighted"}),
        Convention(
            "migu",
            "MIGU, Du et al. 2024",
            {"average accuracy": _AP},
            "The paper does not say whether tasks or rows are averaged; its code prints the score over all rows: "
            "see migu-code.",
        ),
        Convention("migu-code", "code of MIGU (src/compute_metrics.py)", {"predict_exact_match": f"{_AP}/weighted"}),
        Convention(
            "mammoth",
            "code of Mammoth (utils/metrics.py)",
            {"accuracy": _AP, "backward transfer": _BWT, "forward transfer": _FWT, "forgetting": f"{_F}/mammoth"},
            _RANDOM,
        ),
        Convention(
            "avalanche",
            "code of Avalanche (accuracy.py, forgetting_bwt.py, forward_transfer.py)",
            {
                "StreamAccuracy": f"{_AP}/weighted",
                "StreamForgetting": f"{_F}/since_learned",
                "StreamBWT": _BWT,
                "StreamForwardTransfer": _FWT,
            },
            _RANDOM,
        ),
        Convention(
            "easycl",
            "code of EasyCL (cl_metrics.py)",
            {"Last": _AP, "Avg": f"{_AP}/incremental", "BWT": _BWT, "FWT": _FWT},
            "There a score that is missing counts as 0; here the metric is left out.",
        ),
        Convention("libcontinual", "LibContinual (README)", {"BWT": f"{_BWT}/lower_triangle"}),
    )
}


def find_convention(name: str) -> Convention:
    """A convention by name.

    Raises:
        InputError: if there is none of that name.
    """
    if name not in CONVENTIONS:
        raise InputError(f"--convention {name}: it is unknown{did_you_mean(name, CONVENTIONS)}")
    return CONVENTIONS[name]


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
            hint = "; evaluation.unseen scores tasks before they are learned" if j > i else ""
            raise InputError(
                f"{metric} needs R[{i}, {j}], the score on task {j} after training task {i}, which was not evaluated"
                f"{hint}"
            )
        return value

    return score


def _baseline(baseline: ArrayLike | None, tasks: int) -> Callable[[int], float]:
    if baseline is None:
        raise InputError(
            "forward_transfer needs a baseline, one score for each task; without one use variant='zero_shot'"
        )
    return _given(baseline, tasks, "forward_transfer", "baseline", "one score")


def _given(values: ArrayLike | None, tasks: int, metric: str, name: str, what: str) -> Callable[[int], float]:
    """`value(j)` = values[j], or a sentence if it is missing."""
    if values is None:
        raise InputError(f"{metric} needs {name}: {what} of each task")
    try:
        array = np.array(values, dtype=float)
    except (TypeError, ValueError):
        raise InputError(f"{name}: expected one number for each task") from None
    if array.shape != (tasks,):
        noun = "scores" if name == "baseline" else "numbers"
        raise InputError(f"{name}: expected {tasks} {noun}, one for each task, got shape {array.shape}")

    def value(j: int) -> float:
        if np.isnan(array[j]):
            raise InputError(f"{metric} needs {name}[{j}], which was not evaluated")
        return float(array[j])

    return value


def _check_variant(metric: str, variant: str, variants: tuple[str, ...]) -> None:
    if variant not in variants:
        raise InputError(f"{metric}: no variant '{variant}'{did_you_mean(variant, variants)}")


def _mean(values: Iterable[float]) -> float:
    """Mean of `values`, 0.0 if there are none."""
    values = list(values)
    return float(sum(values) / len(values)) if values else 0.0
