"""Reading the scores of run directories back, for reports: `queue.json` and `scores.jsonl` only, no model."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .errors import InputError, did_you_mean
from .metrics import METRICS, MetricInfo

# Column of the summary for each default metric.
COLUMNS = {
    "average_performance": "AP",
    "backward_transfer": "BWT",
    "forgetting": "F",
    "learning_accuracy": "LA",
    "forward_transfer": "FWT",
}
NO_VALUE = "-"
MAX_DEPTH = 3


@dataclass
class RunScores:
    """The scores of one run.

    Attributes:
        R: (rows x columns) scores: row = task trained last, column = task evaluated; NaN = not evaluated. A finished
            run of T tasks is T x T, a joint run 1 x T.
        baseline: (columns,) scores of the base model before any task; `None` if it was not evaluated.
        metrics: which score each task has, such as `{"agnews": "exact_match"}`.
        sizes: number of evaluation examples of each task.
        cursor: number of tasks that are finished.
        train_hashes: hash of the training rows of each task trained.
        eval_hashes: hash of the evaluation rows of each task evaluated.
        single_task: (columns,) scores of models trained on one task each; `None` until `add_single_task`.
    """

    path: Path
    variant: str | None
    seed: int | None
    tasks: list[str]
    eval_tasks: list[str]
    R: np.ndarray
    baseline: np.ndarray | None
    metrics: dict[str, str]
    finished: bool
    cursor: int
    joint: bool = False
    sizes: dict[str, int] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    train_hashes: dict[str, str] = field(default_factory=dict)
    eval_hashes: dict[str, str] = field(default_factory=dict)
    single_task: np.ndarray | None = None

    @property
    def label(self) -> str:
        """Name of the variant; without one, "joint", or the folder (above `seed-42`)."""
        if self.variant:
            return self.variant
        if self.joint:
            return "joint"
        path = self.path.resolve()
        return path.parent.name if path.name.startswith("seed-") else path.name

    @property
    def title(self) -> str:
        return self.label if self.seed is None else f"{self.label}, seed {self.seed}"

    @property
    def progress(self) -> str:
        return f"{self.cursor} of {len(self.tasks)} task{'' if len(self.tasks) == 1 else 's'}"


def load_run(path: str | Path, scorer: str | None = None) -> RunScores:
    """Read one run directory; with `scorer`, its kept predictions are scored anew, without the model.

    Raises:
        InputError: if there is no run, or a line of its files cannot be understood.
    """
    path = Path(path)
    queue_file = path / "queue.json"
    if not queue_file.is_file():
        raise InputError(f"{path}: no such run: a run directory holds queue.json")
    try:
        queue = json.loads(queue_file.read_text(encoding="utf-8"))
        tasks = [str(task["name"]) for task in queue["tasks"]]
        eval_tasks = [str(name) for name in queue.get("eval_tasks") or tasks]
        joint = bool(queue.get("joint", False))
        finished = bool(queue["finished"])
        cursor = int(queue["cursor"])
        versions = {str(name): str(version) for name, version in (queue.get("versions") or {}).items()}
        train_hashes = {str(task["name"]): str(task["hash"]) for task in queue["tasks"] if task.get("hash")}
        evaluation = queue.get("evaluation") or []
        eval_hashes = {str(task["task"]): str(task["hash"]) for task in evaluation if task.get("hash")}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{queue_file}: cannot be read as the state of a run ({_reason(error)})") from None
    if not tasks:
        raise InputError(f"{queue_file}: lists no tasks")
    # The metrics compare row i with column i, so both follow the order of training.
    if not joint and set(eval_tasks) == set(tasks):
        eval_tasks = tasks

    run = RunScores(
        path=path,
        variant=queue.get("variant"),
        seed=queue.get("seed"),
        tasks=tasks,
        eval_tasks=eval_tasks,
        R=np.full((len(tasks), len(eval_tasks)), np.nan),
        baseline=None,
        metrics={},
        finished=finished,
        cursor=cursor,
        joint=joint,
        versions=versions,
        train_hashes=train_hashes,
        eval_hashes=eval_hashes,
    )
    scores_file = path / "scores.jsonl"
    if scores_file.is_file():
        for number, line in enumerate(scores_file.read_text(encoding="utf-8").splitlines(), start=1):
            if line.strip():
                _add_score(run, line, f"{scores_file}: unreadable line {number}", scorer)
    elif finished:
        raise InputError(f"{path}: the run is finished but has no scores.jsonl")
    return run


def _add_score(run: RunScores, line: str, where: str, scorer: str | None) -> None:
    """Put one line of scores.jsonl into its cell; of two lines for one cell the later one counts."""
    try:
        row = json.loads(line)
        task, index = str(row["task"]), int(row["after_index"])
        after, metric = str(row["after_task"]), str(row["metric"])
        score, size = float(row["score"]), int(row["n"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{where} ({_reason(error)})") from None
    if task not in run.eval_tasks:
        raise InputError(f"{where}: queue.json has no task '{task}'")
    if not -1 <= index < len(run.tasks):
        raise InputError(f"{where}: after_index is {index}, but the run has {len(run.tasks)} tasks")
    if index >= 0 and run.tasks[index] != after:
        raise InputError(f"{where}: after_task is '{after}', but task {index} of queue.json is '{run.tasks[index]}'")
    if scorer is not None:
        metric, score = _score_again(run.path, index, after, task, scorer)
    column = run.eval_tasks.index(task)
    if index == -1:
        if run.baseline is None:
            run.baseline = np.full(len(run.eval_tasks), np.nan)
        run.baseline[column] = score
    else:
        run.R[index, column] = score
    run.metrics[task] = metric
    run.sizes[task] = size


def _score_again(run_dir: Path, index: int, after: str, task: str, scorer: str) -> tuple[str, float]:
    """(metric, score) of a cell from its kept predictions."""
    from .evaluation import SCORERS, make_cell  # brings torch, which plain reports do without

    if scorer not in SCORERS:
        raise InputError(f"--scorer {scorer}: it is unknown{did_you_mean(scorer, SCORERS)}")
    path = predictions_file(run_dir, index, after, task)
    try:
        predictions = read_predictions(path)
        kept = path.with_suffix(".json")  # the label set of the task, if it has one
        settings = json.loads(kept.read_text(encoding="utf-8"))["settings"] if kept.is_file() else {}
        cell = make_cell(scorer, predictions, {"labels": settings.get("labels")})
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"--scorer {scorer}: the predictions in {path} cannot be read ({_reason(error)})") from error
    return cell.metric, cell.score


def predictions_file(run_dir: Path, index: int, after: str, task: str) -> Path:
    """Where the predictions of a cell are kept; `index` -1 is the base model."""
    folder = run_dir / "base" if index < 0 else run_dir / "tasks" / f"{index:02d}-{after}"
    return folder / "predictions" / f"{task}.jsonl"


def read_predictions(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"no key '{error.args[0]}'"
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg}"
    return str(error)


def find_runs(path: str | Path) -> list[Path]:
    """The run directories at `path` or up to three folders below it, sorted.

    Raises:
        InputError: if there are none.
    """
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"{path}: no such directory")
    if (path / "queue.json").is_file():
        return [path]
    found = {file.parent for depth in range(1, MAX_DEPTH + 1) for file in path.glob("*/" * depth + "queue.json")}
    if not found:
        raise InputError(f"{path}: no run here or up to {MAX_DEPTH} folders below: a run directory holds queue.json")
    return sorted(found)


# Tables


def measure(run: RunScores) -> tuple[dict[str, float], list[str]]:
    """The default metrics of a run (of an unfinished one: over the tasks so far), and why others are missing."""
    done = tasks_done(run)
    if done == 0:
        return {}, []
    values, problems = {}, []
    # One by one, so that a missing cell does not hide the metrics that do not need it.
    for name in ["average_performance"] if run.joint else COLUMNS:
        optional = bool(METRICS[name].needs)
        if optional and (run.baseline is None or done == 1):
            continue
        try:
            values[name] = compute(run, METRICS[name])
        except InputError as error:
            # Evaluating tasks before they are trained is a choice, so forward transfer may just be absent.
            if not optional:
                problems.append(str(error))
    return values, problems


def tasks_done(run: RunScores) -> int:
    return len(run.tasks) if run.finished else run.cursor


def compute(run: RunScores, info: MetricInfo) -> float:
    """One metric of a run, of an unfinished one over the tasks so far.

    Raises:
        InputError: naming the score it needs and does not have.
    """
    done = tasks_done(run)
    if done == 0:
        raise InputError(f"{info.id} needs a finished task, and {run.title} has none yet")
    R, baseline, single_task = run.R[:done], run.baseline, run.single_task
    sizes = np.array([run.sizes.get(name, np.nan) for name in run.eval_tasks])
    if run.R.shape[1] == len(run.tasks):
        R, sizes = R[:, :done], sizes[:done]
        baseline = None if baseline is None else baseline[:done]
        single_task = None if single_task is None else single_task[:done]
    return info.compute(R, baseline=baseline, single_task=single_task, sizes=sizes)


def add_single_task(runs: Sequence[RunScores], path: str | Path, scorer: str | None = None) -> None:
    """Give each run the scores of the runs of one task each at `path`, the mean over seeds.

    Raises:
        InputError: if a task has no such run, or its run was scored on other rows or by another scorer.
    """
    singles = [run for run in (load_run(each, scorer) for each in find_runs(path)) if run.finished]
    singles = [run for run in singles if not run.joint and len(run.tasks) == 1 and run.tasks == run.eval_tasks]
    for run in runs:
        scores = []
        for task in run.eval_tasks:
            found = [single for single in singles if single.tasks == [task] and not np.isnan(single.R[0, 0])]
            if not found:
                raise InputError(f"--single_task {path}: no finished run there has {task} as its only task")
            for single in found:
                if single.eval_hashes.get(task) != run.eval_hashes.get(task):
                    raise InputError(
                        f"--single_task {path}: {single.path} evaluates {task} on other rows than {run.path}"
                    )
                if single.metrics[task] != run.metrics.get(task, single.metrics[task]):
                    raise InputError(
                        f"--single_task {path}: {single.path} scores {task} by {single.metrics[task]}, and {run.path} "
                        f"by {run.metrics[task]}; score both with --scorer"
                    )
            scores.append(statistics.fmean(float(single.R[0, 0]) for single in found))
        run.single_task = np.array(scores)


def groups(runs: Sequence[RunScores]) -> dict[str, list[RunScores]]:
    """Runs by variant; runs of one variant with different task orders are kept apart."""
    orders: dict[str, list[tuple[str, ...]]] = {}
    for run in runs:
        known = orders.setdefault(run.label, [])
        if order_of(run) not in known:
            known.append(order_of(run))
    groups: dict[str, list[RunScores]] = {}
    for run in runs:
        known = orders[run.label]
        label = run.label if len(known) == 1 else f"{run.label} (order {known.index(order_of(run)) + 1})"
        groups.setdefault(label, []).append(run)
    return groups


def order_of(run: RunScores) -> tuple[str, ...]:
    # A joint run has no order: only the set of its tasks matters.
    return tuple(sorted(run.eval_tasks)) if run.joint else (*run.tasks, *run.eval_tasks)


def duplicates(seeds: Iterable[Any]) -> list[Any]:
    seeds = [seed for seed in seeds if seed is not None]
    return [seed for seed in dict.fromkeys(seeds) if seeds.count(seed) > 1]


def percent(value: float) -> str:
    # "+ 0.0" turns the -0.0 of a tiny negative number into 0.0.
    return NO_VALUE if np.isnan(value) else f"{round(100 * float(value), 1) + 0.0:.1f}"


def mean_and_std(values: Sequence[float]) -> str:
    if not values:
        return NO_VALUE
    mean = percent(statistics.fmean(values))
    return mean if len(values) == 1 else f"{mean} ± {percent(statistics.stdev(values))}"
