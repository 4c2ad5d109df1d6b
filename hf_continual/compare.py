"""Paired comparison of variants over seeds: `hf-continual compare RUN RUN ...`.

A run is paired with the run of the other variant that has the same seed, and the differences are averaged:

    d_s = metric(B, seed s) - metric(A, seed s),    mean(d) ± t_{0.975, n-1} · std(d) / sqrt(n)

The interval is over n seeds: it says how far another choice of seeds could move the mean. Within one seed, rows of the
kept predictions are drawn anew with replacement, the same rows for both runs and for every moment of a task; the
percentiles of the differences are a bootstrap interval over evaluation rows, which says nothing about other seeds.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from tabulate import tabulate

from .bounds import BOUNDS, bounds_table, has_bounds
from .errors import InputError, did_you_mean
from .metrics import CONVENTIONS, METRICS, MetricInfo
from .run_scores import (
    RunScores,
    cited,
    compute,
    duplicates,
    find_runs,
    groups,
    in_unit,
    load_run,
    other_stream,
    predictions_file,
    read_predictions,
    tasks_done,
)

__all__ = ["Comparison", "Pair", "bootstrap", "compare_runs", "comparison_text", "student_t"]

# 97.5 % quantiles of Student's t by degrees of freedom, from its tables; the tests integrate its density to them.
_T_975 = {
    1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228,
    11: 2.201, 12: 2.179, 13: 2.160, 14: 2.145, 15: 2.131, 16: 2.120, 17: 2.110, 18: 2.101, 19: 2.093, 20: 2.086,
    21: 2.080, 22: 2.074, 23: 2.069, 24: 2.064, 25: 2.060, 26: 2.056, 27: 2.052, 28: 2.048, 29: 2.045, 30: 2.042,
    40: 2.021, 60: 2.000, 120: 1.980,
}  # fmt: skip

RESAMPLES = 2000
SAME = 1e-12
"""Differences up to here are rounding."""


def student_t(freedom: int) -> float:
    """The 97.5 % quantile of Student's t; between entries of the table that of fewer degrees, which is wider."""
    if freedom < 1:
        raise ValueError(f"Student's t needs a degree of freedom, not {freedom}")
    return _T_975[max(entry for entry in _T_975 if entry <= freedom)]


@dataclass
class Pair:
    """Two runs of one seed.

    Attributes:
        rows: 95 % bootstrap interval over evaluation rows; `None` if it could not be computed.
        problem: why not.
    """

    seed: int | None
    first: float
    second: float
    rows: tuple[float, float] | None = None
    problem: str = ""

    @property
    def difference(self) -> float:
        return self.second - self.first


@dataclass
class Comparison:
    """A variant against another, over the seeds both have.

    Attributes:
        lower_is_better: whether a difference below 0 is a win of the second.
        runs: of the first comparison of several: all that were compared.
        unit: of the metric, `percent`, or `nats` where perplexities are compared.
    """

    first: str
    second: str
    metric: str
    pairs: list[Pair]
    lower_is_better: bool = False
    notes: list[str] = field(default_factory=list)
    runs: list[RunScores] = field(default_factory=list)
    unit: str = "percent"

    @property
    def mean(self) -> float:
        return statistics.fmean(pair.difference for pair in self.pairs)

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval of the mean difference over seeds; `None` for one seed."""
        n = len(self.pairs)
        if n < 2:
            return None
        half = student_t(n - 1) * statistics.stdev(pair.difference for pair in self.pairs) / math.sqrt(n)
        return self.mean - half, self.mean + half

    @property
    def wins(self) -> int:
        """Seeds in which the second is better."""
        return sum(self._gain(pair) > SAME for pair in self.pairs)

    @property
    def losses(self) -> int:
        """Seeds in which the second is worse."""
        return sum(self._gain(pair) < -SAME for pair in self.pairs)

    def _gain(self, pair: Pair) -> float:
        return -pair.difference if self.lower_is_better else pair.difference


def compare_runs(
    paths: Sequence[str | Path],
    metric: str = "average_performance",
    scorer: str | None = None,
    against: str | None = None,
    resamples: int = RESAMPLES,
) -> list[Comparison]:
    """Every variant in `paths` against one of them, paired by seed.

    Args:
        paths: run directories or folders of them.
        metric: an id of `METRICS`, or AP, BWT, F, LA or FWT for the default ones.
        scorer: score the kept predictions with this one instead.
        against: the variant the others are compared with; default: the first.
        resamples: of the bootstrap over rows; 0 leaves it out.

    Raises:
        InputError: if runs differ in tasks, data or scorer, if a seed is there twice, or if nothing can be paired.
    """
    short = {name.lower(): found for name, found in CONVENTIONS["default"].metrics.items()}
    metric = short.get(metric.lower(), metric)
    if metric not in METRICS:
        raise InputError(f"--metric {metric}: it is unknown{did_you_mean(metric, METRICS)}")
    info = METRICS[metric]
    found = list(dict.fromkeys(run.resolve() for path in paths for run in find_runs(path)))
    runs = [load_run(path, scorer) for path in found]
    finished = [run for run in runs if run.finished]
    notes = [f"Not finished, left out: {run.title} ({run.progress}), {run.path}" for run in runs if not run.finished]
    given = {Path(path).resolve() for path in paths}
    bounds: dict[tuple[str, int | None], Path] = {}
    for run in list(finished):  # of two recipes without variants, each has its own bounds beside its run
        if run.path.parent in given and run.label in BOUNDS:
            first_one = bounds.setdefault((run.label, run.seed), run.path)
            if first_one != run.path:
                finished.remove(run)
                notes.append(f"Left out: {run.path}, since {first_one} is {run.title} as well")
    sequential_runs = [run for run in finished if run.sequential]
    if info.family != "average_performance" and len({run.label for run in sequential_runs}) > 1:
        notes += [f"Left out: {run.title}, which has no {metric}" for run in finished if not run.sequential]
        finished = sequential_runs
    if len(finished) < 2:
        raise InputError(f"compare needs two finished runs; {_names(paths)} {'has' if len(paths) == 1 else 'have'} "
                         f"{len(finished)}")  # fmt: skip
    for run in finished[1:]:
        _refuse_difference(finished[0], run)

    grouped = groups(finished)
    for label, members in grouped.items():
        for seed in duplicates(run.seed for run in members):
            places = [str(run.path) for run in members if run.seed == seed]
            raise InputError(f"seed {seed} of {label} is there {len(places)} times: {', '.join(places)}; give one")
        if len(members) > 1 and any(run.seed is None for run in members):
            raise InputError(
                f"{label}: runs without a seed cannot be paired: {', '.join(str(r.path) for r in members)}"
            )
    if len(grouped) < 2:
        raise InputError(f"compare needs runs of two variants; {_names(paths)} only have {next(iter(grouped))}")
    if against is not None and against not in grouped:
        raise InputError(f"--against {against}: no such variant{did_you_mean(against, grouped)}")
    sequential = [label for label, members in grouped.items() if members[0].sequential]
    first = against if against is not None else (sequential or list(grouped))[0]
    unit = "nats" if finished[0].less_is_better else "percent"
    lower = info.lower_is_better  # perplexities enter as -ln, of which more is better

    comparisons = []
    for second in (label for label in grouped if label != first):
        pairs, unpaired = [], []
        firsts, seconds = ({run.seed: run for run in grouped[label]} for label in (first, second))
        for seed in sorted({*firsts, *seconds}, key=lambda seed: (seed is None, seed)):
            if seed in firsts and seed in seconds:
                pairs.append(_pair(firsts[seed], seconds[seed], info, scorer, resamples))
            else:
                unpaired.append(f"seed {seed} ({first if seed in seconds else second} lacks it)")
        if pairs:
            own = [f"{second}, not paired: {', '.join(unpaired)}"] if unpaired else []
            comparisons.append(Comparison(first, second, metric, pairs, lower, own, unit=unit))
        else:
            notes.append(f"Left out: {second} has no seed in common with {first}")
    if not comparisons:
        seeds = "; ".join(f"{label}: {', '.join(str(r.seed) for r in members)}" for label, members in grouped.items())
        raise InputError(
            f"no variant has a seed in common with {first} (seeds of {seeds}); give runs of the same seeds"
        )
    comparisons[0].notes[:0] = notes
    comparisons[0].runs = finished
    return comparisons


def _names(paths: Sequence[str | Path]) -> str:
    return ", ".join(str(path) for path in paths)


def _refuse_difference(a: RunScores, b: RunScores) -> None:
    """A sentence if two runs are not of the same stream."""
    if not other_stream(a, b):
        _refuse_other_rows(a, b)
        return
    between = f"{a.path} and {b.path} cannot be compared"
    try:
        _refuse_other_rows(a, b)
    except InputError as error:
        what = str(error).removeprefix(f"{between}: ")
    else:
        what = "their rows agree, and labels, scorers, lengths or training that the definition sets do not"
    raise InputError(
        f"{between}: their streams are {cited(a)} and {cited(b)} ({what}); compare runs of one stream, or run one of "
        "them again with the `tasks:` of the other"
    )


def _refuse_other_rows(a: RunScores, b: RunScores) -> None:
    between = f"{a.path} and {b.path} cannot be compared"
    joint = a.joint or b.joint  # a joint run's training rows are hashed as one task
    ordered = a.sequential and b.sequential
    tasks_a, tasks_b = (run.tasks if ordered else sorted(run.eval_tasks) for run in (a, b))
    if tasks_a != tasks_b:
        raise InputError(f"{between}: their tasks differ, {' > '.join(tasks_a)} and {' > '.join(tasks_b)}")
    if set(a.eval_tasks) != set(b.eval_tasks):
        only = sorted(set(a.eval_tasks) ^ set(b.eval_tasks))
        raise InputError(f"{between}: only one of them evaluates {', '.join(only)}")
    checks = [("evaluation", a.eval_hashes, b.eval_hashes, a.eval_tasks)]
    if not joint:
        checks.append(("training", a.train_hashes, b.train_hashes, a.tasks if ordered else tasks_a))
    for kind, hashes_a, hashes_b, tasks in checks:
        for task in tasks:
            for run, hashes in ((a, hashes_a), (b, hashes_b)):
                if task not in hashes:
                    raise InputError(f"{between}: queue.json of {run.path} has no hash of the {kind} rows of {task}")
            if hashes_a[task] != hashes_b[task]:
                raise InputError(
                    f"{between}: the {kind} rows of {task} differ, hash {hashes_a[task][:12]} and {hashes_b[task][:12]}"
                )
    for task in a.eval_tasks:
        if a.metrics.get(task) != b.metrics.get(task):
            raise InputError(
                f"{between}: {task} is scored by {a.metrics.get(task, 'nothing')} and "
                f"{b.metrics.get(task, 'nothing')}; score both with --scorer"
            )


def _pair(a: RunScores, b: RunScores, info: MetricInfo, scorer: str | None, resamples: int) -> Pair:
    pair = Pair(a.seed, _value(a, info), _value(b, info))
    if resamples:
        try:
            pair.rows = bootstrap(a, b, info, scorer, resamples)
        except InputError as error:
            pair.problem = str(error)
    return pair


def _value(run: RunScores, info: MetricInfo) -> float:
    try:
        return compute(run, info)
    except InputError as error:
        raise InputError(f"{run.path}: {error}") from None


def bootstrap(
    a: RunScores, b: RunScores, info: MetricInfo, scorer: str | None = None, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval of the difference `b` - `a` over evaluation rows.

    Raises:
        InputError: if predictions of a cell are not kept, or its score is not the mean over rows.
    """
    scores = {run.path: row_scores(run, scorer) for run in (a, b)}
    generator = np.random.default_rng(seed)
    differences = np.empty(resamples)
    for i in range(resamples):
        drawn = {task: generator.integers(0, n, n) for task, n in a.sizes.items()}
        values = []
        for run in (a, b):
            R = np.full_like(run.R, np.nan)
            baseline = None if run.baseline is None else np.full_like(run.baseline, np.nan)
            for (index, task), rows in scores[run.path].items():
                target = baseline if index < 0 else R[index]
                assert target is not None
                target[run.eval_tasks.index(task)] = rows[drawn[task]].mean()
            values.append(compute(replace(run, R=R, baseline=baseline), info))
        differences[i] = values[1] - values[0]
    low, high = np.quantile(differences, [0.025, 0.975])
    return float(low), float(high)


def row_scores(run: RunScores, scorer: str | None = None) -> dict[tuple[int, str], np.ndarray]:
    """(moment, task) -> the score of each evaluation row, from the kept predictions; moment -1 is the base model.

    Raises:
        InputError: if they are not kept, or the score of the cell is not their mean.
    """
    from .scorers import score

    found = {}
    moments = [(-1, "base", run.baseline)] if run.baseline is not None else []
    moments += [(i, run.tasks[i], run.R[i]) for i in range(tasks_done(run))]
    for index, after, cells in moments:
        for task, value in zip(run.eval_tasks, cells, strict=True):
            if np.isnan(value):
                continue
            path = predictions_file(run.path, index, after, task)
            if not path.is_file():
                raise InputError(f"no bootstrap over rows: {path} is not there")
            try:
                settings = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["settings"]
                predictions = read_predictions(path)
                scores = score(scorer or settings["scorer"], predictions, settings.get("labels"), str(path))
            except (OSError, ValueError, KeyError, TypeError) as error:
                if isinstance(error, InputError):
                    raise
                raise InputError(f"no bootstrap over rows: {path} cannot be read ({error})") from error
            if scores.rows is None or not math.isclose(statistics.fmean(scores.rows), value, abs_tol=1e-9):
                raise InputError(f"no bootstrap over rows: the score of {task} is not the mean over its rows ({path})")
            if len(scores.rows) != run.sizes[task]:
                raise InputError(f"no bootstrap over rows: {path} has {len(scores.rows)} rows, not {run.sizes[task]}")
            found[index, task] = np.array(scores.rows)
    return found


def comparison_text(comparisons: Sequence[Comparison]) -> str:
    """Two tables: one row a variant over seeds, and one row a seed; then what was left out and why."""
    first, metric, lower = comparisons[0].first, comparisons[0].metric, comparisons[0].lower_is_better
    better = "less is better" if lower else "more is better"
    unit = comparisons[0].unit
    write = in_unit(unit)
    rows: list[list[object]] = [
        [c.second, len(c.pairs), write(statistics.fmean(p.first for p in c.pairs)),
         write(statistics.fmean(p.second for p in c.pairs)), _signed(c.mean, unit), _interval(c.interval, unit),
         f"{c.wins}/{c.losses}"]
        for c in comparisons
    ]  # fmt: skip
    headers = ["variant", "seeds", first, "variant's", "difference", "95 % over seeds", "wins/losses"]
    blocks = [f"{metric} against {first}, {unit} ({better}), paired by seed", _table(rows, headers)]
    if unit == "nats":
        blocks.append("Perplexities enter the formulas as -ln PPL, the mean log-likelihood of a token.")
    if any(len(c.pairs) == 1 for c in comparisons):
        blocks.append("With one seed no interval over seeds can be given: other seeds may differ by any amount.")
    blocks.append("Within each seed; the interval is a bootstrap over evaluation rows, not over seeds:")
    rows = [
        [c.second, "-" if p.seed is None else p.seed, write(p.first), write(p.second), _signed(p.difference, unit),
         _interval(p.rows, unit)]
        for c in comparisons for p in c.pairs
    ]  # fmt: skip
    blocks.append(_table(rows, ["variant", "seed", first, "variant's", "difference", "95 % over rows"]))
    notes = [note for c in comparisons for note in c.notes]
    notes += [f"{c.second}, seed {p.seed}: {p.problem}" for c in comparisons for p in c.pairs if p.problem]
    if len(comparisons) > 1:
        notes.append(f"{len(comparisons)} comparisons: each interval is for one alone, so some may miss by chance")
    runs = comparisons[0].runs
    if metric == "average_performance" and has_bounds(runs):
        blocks.append(f"Against the bounds and controls, {runs[0].unit}:\n\n" + bounds_table(runs))
    return "\n\n".join([*blocks, *(["\n".join(notes)] if notes else [])])


def _table(rows: list[list[object]], headers: list[str]) -> str:
    align = ["left", *["right"] * (len(headers) - 1)]
    return tabulate(rows, headers, tablefmt="simple", disable_numparse=True, colalign=align)


def _signed(value: float, unit: str) -> str:
    text = in_unit(unit)(value)
    return text if text.startswith("-") or float(text) == 0 else f"+{text}"


def _interval(bounds: tuple[float, float] | None, unit: str) -> str:
    return "-" if bounds is None else f"[{_signed(bounds[0], unit)}, {_signed(bounds[1], unit)}]"
