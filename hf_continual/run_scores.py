"""Reading the scores of run directories back, for reports: `queue.json` and `scores.jsonl` only, no model."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .bounds import runs_beside
from .cells import make_cell
from .errors import InputError, did_you_mean
from .metrics import METRICS, MetricInfo, less_is_better, oriented
from .scorers import SCORERS, lower_is_better, of_metric

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
        stream: `name` and `hash` of the stream it was run on; `None` if its recipe lists the tasks, or is older.
        outside: number of evaluation rows of each task whose answers are outside its labels.
        strays: for each task, after which task (its place, from 0) how many predictions were outside its labels.
        single_task: (columns,) scores of models trained on one task each; `None` until `add_single_task`.
        independent: whether each task was learnt alone; R then has its diagonal only.
        gate: the options of the forgetting gate; `None` without one.
        rejected: what the gate took out of the run: name, index, losses and limit.
        rehearsals: how many rounds of rehearsal the gate has made after a task.
        perplexity: as R, the perplexities of texts whose task is scored by an end task; `None` if there are none.
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
    stream: dict[str, str] | None = None
    outside: dict[str, int] = field(default_factory=dict)
    strays: dict[str, dict[int, int]] = field(default_factory=dict)
    single_task: np.ndarray | None = None
    independent: bool = False
    gate: dict[str, Any] | None = None
    rejected: list[dict[str, Any]] = field(default_factory=list)
    rehearsals: dict[str, int] = field(default_factory=dict)
    perplexity: np.ndarray | None = None

    @property
    def less_is_better(self) -> bool:
        """Whether its scores are better when smaller, as perplexities are.

        Raises:
            InputError: if some are and some are not.
        """
        try:
            return less_is_better(self.metrics.values())
        except InputError as error:
            raise InputError(f"{self.path}: {error}") from None

    @property
    def mixes(self) -> bool:
        """Whether some scores are better when smaller and some are not, so that they have no mean."""
        return len({lower_is_better(metric) for metric in self.metrics.values()}) > 1

    @property
    def unit(self) -> str:
        """Of its metrics: `percent`, or `nats` for perplexities, which enter the formulas as -ln PPL."""
        return "nats" if not self.mixes and self.less_is_better else "percent"

    @property
    def sequential(self) -> bool:
        """Whether its tasks were learnt one after another by one model."""
        return not self.joint and not self.independent

    @property
    def label(self) -> str:
        """Name of the variant; without one, "joint" or "independent", or the folder (above `seed-42`)."""
        if self.variant:
            return self.variant
        if not self.sequential:
            return "joint" if self.joint else "independent"
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
        joint, independent = (bool(queue.get(bound, False)) for bound in ("joint", "independent"))
        gate, rejected = queue.get("gate"), [dict(entry) for entry in queue.get("rejected", [])]
        rehearsals = {str(name): int(count) for name, count in (queue.get("rehearsals") or {}).items()}
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
        stream=_stream(queue, queue_file),
        independent=independent,
        gate=dict(gate) if gate else None,
        rejected=rejected,
        rehearsals=rehearsals,
    )
    scores_file = path / "scores.jsonl"
    if scores_file.is_file():
        for number, line in enumerate(scores_file.read_text(encoding="utf-8").splitlines(), start=1):
            if line.strip():
                _add_score(run, line, f"{scores_file}: unreadable line {number}", scorer)
    elif finished:
        raise InputError(f"{path}: the run is finished but has no scores.jsonl")
    return run


def _stream(queue: dict[str, Any], where: Path) -> dict[str, str] | None:
    stream = queue.get("stream")
    if stream is None:
        return None
    if not isinstance(stream, dict) or not all(isinstance(stream.get(key), str) for key in ("name", "hash")):
        raise InputError(f"{where}: cannot be read as the state of a run (stream has no name and hash)")
    return {"name": stream["name"], "hash": stream["hash"]}


def cited(run: RunScores) -> str:
    """The stream of a run with the hash it is cited by; empty if it has none."""
    return "" if run.stream is None else f"{run.stream['name']}@{run.stream['hash'][:12]}"


def other_stream(a: RunScores, b: RunScores) -> bool:
    """Whether two runs are known to be of streams with different hashes."""
    return a.stream is not None and b.stream is not None and a.stream["hash"] != b.stream["hash"]


def refuse_mixed_streams(runs: Sequence[RunScores]) -> None:
    """Refuse to put runs into one table that have the same tasks in the same order and yet other hashes.

    Runs of different orders stay: tables keep them apart and say so.
    """
    for i, a in enumerate(runs):
        for b in runs[:i]:
            same_order = (a.eval_tasks if a.joint else a.tasks) == (b.eval_tasks if b.joint else b.tasks)
            if same_order and other_stream(a, b):
                raise InputError(
                    f"{b.path} and {a.path} cannot be compared: the stream of one is {cited(b)} and of the other "
                    f"{cited(a)}, so that rows, labels, scorers or lengths differ; report them apart, or run one of "
                    "them again with the `tasks:` of the other"
                )


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
    others = row.get("others") or {}
    if scorer is not None:
        metric, score, again = _score_again(run.path, index, after, task, scorer)
        others = {**others, **again}
    column = run.eval_tasks.index(task)
    if index == -1:
        if run.baseline is None:
            run.baseline = np.full(len(run.eval_tasks), np.nan)
        run.baseline[column] = score
    else:
        run.R[index, column] = score
    run.metrics[task] = metric
    run.sizes[task] = size
    if index >= 0 and "predictions_outside_labels" in others:
        run.strays.setdefault(task, {})[index] = int(others["predictions_outside_labels"])
    run.outside[task] = int(others.get("references_outside_labels") or 0)
    if metric != "perplexity" and isinstance(others.get("perplexity"), float) and index >= 0:
        if run.perplexity is None:
            run.perplexity = np.full_like(run.R, np.nan)
        run.perplexity[index, column] = others["perplexity"]


def _score_again(run_dir: Path, index: int, after: str, task: str, scorer: str) -> tuple[str, float, dict[str, float]]:
    """Metric, score and further numbers of a cell, from its kept predictions."""
    if scorer not in SCORERS:
        raise InputError(f"--scorer {scorer}: it is unknown{did_you_mean(scorer, SCORERS)}")
    path = predictions_file(run_dir, index, after, task)
    try:
        predictions = read_predictions(path)
        kept = path.with_suffix(".json")  # the label set of the task, if it has one
        settings = json.loads(kept.read_text(encoding="utf-8"))["settings"] if kept.is_file() else {}
        cell = make_cell(scorer, predictions, {"labels": settings.get("labels")}, str(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"--scorer {scorer}: the predictions in {path} cannot be read ({_reason(error)})") from error
    return cell.metric, cell.score, cell.others


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
    """The run directories at `path` or up to three folders below it, sorted; bounds and controls in a run's folder too.

    Raises:
        InputError: if there are none.
    """
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"{path}: no such directory")
    if (path / "queue.json").is_file():
        return [path, *runs_beside(path)]
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
    try:
        run.less_is_better  # noqa: B018 - to say once, not for every metric, that there is no mean
    except InputError as error:
        return {}, [str(error)]
    values, problems = {}, []
    # One by one, so that a missing cell does not hide the metrics that do not need it.
    for name in COLUMNS if run.sequential else ["average_performance"]:
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
    if R.shape == (1, 1) and info.id.partition("/")[0] in ("backward_transfer", "forgetting"):
        raise InputError(f"{info.id} needs two tasks, and {run.title} has learnt one")
    if run.independent:
        R = np.diagonal(R)[None]  # no row is of a model that has learnt all tasks
    small = run.less_is_better
    if small and info.bounded:
        raise InputError(f"{info.id} is for scores from 0 to 1, and here they are perplexities")
    R = oriented(R, small)
    baseline, single_task = (None if v is None else oriented(v, small) for v in (baseline, single_task))
    return info.compute(R, baseline=baseline, single_task=single_task, sizes=sizes)


def add_single_task(runs: Sequence[RunScores], path: str | Path, scorer: str | None = None) -> None:
    """Give each run the scores of the runs of one task each at `path`, the mean over seeds.

    Raises:
        InputError: if a task has no such run, or its run was scored on other rows or by another scorer.
    """
    singles = [run for run in (load_run(each, scorer) for each in find_runs(path)) if run.finished]
    one = [run for run in singles if run.sequential and len(run.tasks) == 1 and run.tasks == run.eval_tasks]
    singles = [*one, *(run for run in singles if run.independent)]
    for run in runs:
        scores = []
        for task in run.eval_tasks:
            found = [single for single in singles if task in single.tasks and not np.isnan(alone(single, task))]
            if not found:
                raise InputError(
                    f"--single_task {path}: no finished run there has {task} as its only task, and no independent run "
                    "has it"
                )
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
            scores.append(statistics.fmean(alone(single, task) for single in found))
        run.single_task = np.array(scores)


def alone(run: RunScores, task: str) -> float:
    """The score of a task right after it was learnt, in a run that learns it alone."""
    index = run.tasks.index(task)
    return float(run.R[index, index])


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
    # A joint or independent run has no order: only the set of its tasks matters.
    return (*run.tasks, *run.eval_tasks) if run.sequential else tuple(sorted(run.eval_tasks))


def duplicates(seeds: Iterable[Any]) -> list[Any]:
    seeds = [seed for seed in seeds if seed is not None]
    return [seed for seed in dict.fromkeys(seeds) if seeds.count(seed) > 1]


def percent(value: float) -> str:
    # "+ 0.0" turns the -0.0 of a tiny negative number into 0.0.
    return NO_VALUE if np.isnan(value) else f"{round(100 * float(value), 1) + 0.0:.1f}"


def number(value: float) -> str:
    """As it is: nats, and perplexities."""
    if np.isnan(value):
        return NO_VALUE
    return f"{round(float(value), 3) + 0.0:.3f}" if abs(value) < 1000 else f"{float(value):.4g}"


def shown(metric: str, score: float) -> str:
    """A score in percent, or as it is where it does not lie in [0, 1]."""
    scorer = of_metric(metric)
    return percent(score) if scorer is None or scorer.bounded else number(score)


def in_unit(unit: str) -> Callable[[float], str]:
    """How a number of that unit is written."""
    return number if unit == "nats" else percent


def mean_and_std(values: Sequence[float], unit: str = "percent") -> str:
    if not values:
        return NO_VALUE
    write = in_unit(unit)
    mean = write(statistics.fmean(values))
    return mean if len(values) == 1 else f"{mean} ± {write(statistics.stdev(values))}"
