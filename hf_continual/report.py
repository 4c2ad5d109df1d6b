"""Tables and plots of run directories: one run, or a folder of runs that are compared.

A run directory holds `queue.json` (tasks in order, seed, variant, how far it came) and `scores.jsonl` (one cell of the
score matrix per line). Reports read those two files only, so they need no model and no GPU.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tabulate import tabulate

from .errors import InputError
from .metrics import METRICS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "RunScores",
    "find_runs",
    "load_run",
    "matrix_table",
    "plot_comparison",
    "plot_matrix",
    "print_report",
    "summary_table",
    "write_report",
]

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


def load_run(path: str | Path) -> RunScores:
    """Read one run directory.

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
    )
    scores_file = path / "scores.jsonl"
    if scores_file.is_file():
        for number, line in enumerate(scores_file.read_text(encoding="utf-8").splitlines(), start=1):
            if line.strip():
                _add_score(run, line, f"{scores_file}: unreadable line {number}")
    elif finished:
        raise InputError(f"{path}: the run is finished but has no scores.jsonl")
    return run


def _add_score(run: RunScores, line: str, where: str) -> None:
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
    column = run.eval_tasks.index(task)
    if index == -1:
        if run.baseline is None:
            run.baseline = np.full(len(run.eval_tasks), np.nan)
        run.baseline[column] = score
    else:
        run.R[index, column] = score
    run.metrics[task] = metric
    run.sizes[task] = size


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


def matrix_table(run: RunScores, tablefmt: str = "simple") -> str:
    """The score matrix in percent: one row after each task, one column for each task evaluated."""
    tasks, columns = run.tasks, run.eval_tasks
    # Many long names do not fit a terminal side by side: number the columns and put the numbers beside the row names.
    if tablefmt != "github" and not run.joint and sum(map(len, columns)) > 80:
        tasks, columns = [f"{i} {name}" for i, name in enumerate(tasks)], [str(j) for j in range(len(columns))]
    rows = [] if run.baseline is None else [["base model", *map(_percent, run.baseline)]]
    rows += [[task, *map(_percent, scores)] for task, scores in zip(tasks, run.R, strict=True)]
    return _table(rows, ["after training", *columns], tablefmt)


def summary_table(runs: Sequence[RunScores], tablefmt: str = "simple") -> str:
    """Metrics in percent, one row a variant: mean over seeds, with the sample standard deviation if there are several.

    Below the table: runs that are not finished and therefore not in the means, and metrics that could not be computed.
    """
    groups = _groups(runs)
    values: dict[str, list[dict[str, float]]] = {}
    notes: list[str] = []
    for label, members in groups.items():
        values[label] = []
        for run in members:
            if not run.finished:
                notes.append(f"Not finished, not in the means: {run.title} ({run.progress}), {run.path}")
                continue
            measured, problems = _measure(run)
            values[label].append(measured)
            notes += [f"{run.title}: {problem}" for problem in problems]
        seeds = [run.seed for run in members if run.finished]
        notes += [f"{label}: seed {seed} is there {seeds.count(seed)} times" for seed in _duplicates(seeds)]
    if len({tuple(run.tasks) for run in runs if not run.joint}) > 1:
        notes += [f"Order of {label}: {' > '.join(members[0].tasks)}" for label, members in groups.items()]

    columns = [name for name in COLUMNS if any(name in measured for each in values.values() for measured in each)]
    rows = [
        [label, len(each), *(_mean_and_std([m[name] for m in each if name in m]) for name in columns)]
        for label, each in values.items()
    ]
    table = _table(rows, ["variant", "seeds", *(COLUMNS[name] for name in columns)], tablefmt)
    if not notes:
        return table
    bullet = "- " if tablefmt == "github" else ""
    return table + "\n\n" + "\n".join(bullet + note for note in notes)


def _variants_table(runs: Sequence[RunScores], tablefmt: str = "github") -> str:
    """Every metric of the registry in percent, mean over seeds: one row a definition, one column a variant."""
    groups = {
        label: [run for run in members if run.finished and not run.joint] for label, members in _groups(runs).items()
    }
    groups = {label: members for label, members in groups.items() if members}
    rows = []
    for info in METRICS.values():
        cells = []
        for members in groups.values():
            try:
                each = [info.function(r.R, r.baseline) if info.needs_baseline else info.function(r.R) for r in members]
                cells.append(_percent(statistics.fmean(each)))
            except InputError:
                cells.append(NO_VALUE)
        rows.append([f"`{info.id}`", *cells, f"`{info.formula}`", info.source])
    return _table(rows, ["metric", *groups, "formula", "source"], tablefmt)


def _measure(run: RunScores) -> tuple[dict[str, float], list[str]]:
    """The default metrics of a run (of an unfinished one: over the tasks so far), and why others are missing."""
    done = len(run.tasks) if run.finished else run.cursor
    if done == 0:
        return {}, []
    R, baseline = run.R[:done], run.baseline
    if run.R.shape[1] == len(run.tasks):
        R, baseline = R[:, :done], None if baseline is None else baseline[:done]
    values, problems = {}, []
    # One by one, so that a missing cell does not hide the metrics that do not need it.
    for name in ["average_performance"] if run.joint else COLUMNS:
        optional = METRICS[name].needs_baseline
        if optional and (baseline is None or done == 1):
            continue
        try:
            values[name] = METRICS[name].function(R, baseline) if optional else METRICS[name].function(R)
        except InputError as error:
            # Evaluating tasks before they are trained is a choice, so forward transfer may just be absent.
            if not optional:
                problems.append(str(error))
    return values, problems


def _groups(runs: Sequence[RunScores]) -> dict[str, list[RunScores]]:
    """Runs by variant; runs of one variant with different task orders are kept apart."""
    orders: dict[str, list[tuple[str, ...]]] = {}
    for run in runs:
        known = orders.setdefault(run.label, [])
        if _order(run) not in known:
            known.append(_order(run))
    groups: dict[str, list[RunScores]] = {}
    for run in runs:
        known = orders[run.label]
        label = run.label if len(known) == 1 else f"{run.label} (order {known.index(_order(run)) + 1})"
        groups.setdefault(label, []).append(run)
    return groups


def _order(run: RunScores) -> tuple[str, ...]:
    # A joint run has no order: only the set of its tasks matters.
    return tuple(sorted(run.eval_tasks)) if run.joint else (*run.tasks, *run.eval_tasks)


def _duplicates(seeds: Iterable[Any]) -> list[Any]:
    seeds = [seed for seed in seeds if seed is not None]
    return [seed for seed in dict.fromkeys(seeds) if seeds.count(seed) > 1]


def _table(rows: list[list[Any]], headers: list[str], tablefmt: str) -> str:
    align = ["left"] + ["left" if header in ("formula", "source") else "right" for header in headers[1:]]
    return tabulate(rows, headers, tablefmt=tablefmt, disable_numparse=True, colalign=align if rows else None)


def _percent(value: float) -> str:
    # "+ 0.0" turns the -0.0 of a tiny negative number into 0.0.
    return NO_VALUE if np.isnan(value) else f"{round(100 * float(value), 1) + 0.0:.1f}"


def _mean_and_std(values: Sequence[float]) -> str:
    if not values:
        return NO_VALUE
    mean = _percent(statistics.fmean(values))
    return mean if len(values) == 1 else f"{mean} ± {_percent(statistics.stdev(values))}"


# Plots


def plot_matrix(run: RunScores, path: str | Path) -> Path:
    """Draw the score matrix of one run as a heat-map PNG with the scores (percent) in the cells."""
    rows = len(run.tasks) + (run.baseline is not None)
    figure = _figure(2.6 + 0.72 * len(run.eval_tasks), 1.9 + 0.5 * rows)
    axes = figure.subplots()
    _heat_map(axes, run, run.R, run.baseline)
    axes.set_ylabel("after training", fontsize=9)
    axes.set_title(_plot_title(run.title if run.finished else f"{run.title} ({run.progress})", [run]), fontsize=10)
    _colour_bar(figure, [axes])
    return _save(figure, path)


def plot_comparison(runs: Sequence[RunScores], path: str | Path) -> Path:
    """Draw one small heat-map a variant into one PNG: the mean of its finished runs over seeds."""
    groups = _groups(runs)
    if not groups:
        raise InputError("plot_comparison: no runs to draw")
    done = {label: [run for run in members if run.finished] for label, members in groups.items()}
    done = {label: members for label, members in done.items() if members}
    waiting = [label for label in groups if label not in done]
    columns = max(1, min(len(done), 3 if len(done) != 4 else 2))
    rows = max(1, -(-len(done) // columns))
    width = max(1.6 + 0.5 * max(len(run.eval_tasks) for run in runs), 3.0)
    cells = max(len(run.tasks) + (run.baseline is not None) for run in runs)
    figure = _figure(columns * width + 0.8, rows * (1.3 + 0.36 * cells) + (0.3 if waiting else 0))
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, (label, members) in zip(grid.flat, done.items(), strict=False):
        # Joint runs of one variant may list the same tasks in another order.
        names = members[0].eval_tasks
        picks = [(run, [run.eval_tasks.index(name) for name in names]) for run in members]
        baselines = [run.baseline[pick] for run, pick in picks if run.baseline is not None]
        baseline = np.mean(baselines, axis=0) if len(baselines) == len(members) else None
        _heat_map(axes, members[0], np.mean([run.R[:, pick] for run, pick in picks], axis=0), baseline, cells)
        seeds = f" ({len(members)} seeds)" if len(members) > 1 else ""
        axes.set_title(_plot_title(label + seeds, members), fontsize=9)
    for axes in list(grid.flat)[len(done) :]:
        axes.set_axis_off()
    if done:
        _colour_bar(figure, list(grid.flat))
    if waiting:
        figure.supxlabel(f"not finished: {', '.join(waiting)}", fontsize=9)
    return _save(figure, path)


def _figure(width: float, height: float) -> Figure:
    # Figure with its own canvas, not pyplot: pyplot would choose a backend for the whole process.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(hspace=0.06, wspace=0.03)
    figure = Figure(figsize=(width, height), dpi=150, layout=layout, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _heat_map(
    axes: Axes, run: RunScores, R: np.ndarray, baseline: np.ndarray | None, height: int | None = None
) -> None:
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    cells, names = R, list(run.tasks)
    if baseline is not None:
        cells, names = np.vstack([baseline, R]), ["base model", *names]
    colours = colormaps["YlGnBu"].with_extremes(bad="#f0f0f0")
    axes.imshow(np.ma.masked_invalid(cells), cmap=colours, vmin=0, vmax=1, aspect="auto")
    # Panels side by side keep the same cell size: a joint run has fewer rows and leaves the rest white.
    axes.set_ylim(max(height or 0, len(cells)) - 0.5, -0.5)
    axes.xaxis.tick_top()
    axes.set_xticks(np.arange(cells.shape[1] + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(cells.shape[0] + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)

    size = 8 if cells.shape[1] <= 8 else 7
    turned = max(map(len, run.eval_tasks)) > 8
    axes.set_xticks(
        range(cells.shape[1]),
        [_short(name) for name in run.eval_tasks],
        fontsize=size,
        rotation=40 if turned else 0,
        ha="left" if turned else "center",
        rotation_mode="anchor" if turned else "default",
    )
    axes.set_yticks(range(cells.shape[0]), [_short(name) for name in names], fontsize=size)
    for (i, j), value in np.ndenumerate(cells):
        if not np.isnan(value):
            colour = "white" if value > 0.55 else "#222222"
            axes.text(j, i, _percent(value), ha="center", va="center", fontsize=size, color=colour)
    if not run.joint and R.shape[0] == R.shape[1]:
        shift = len(cells) - len(R)
        for j in range(len(R)):
            corner = (j - 0.45, j + shift - 0.42)
            axes.add_patch(Rectangle(corner, 0.9, 0.84, fill=False, edgecolor="#f28e4c", linewidth=1.4, zorder=3))
    if baseline is not None:
        axes.axhline(0.5, color="white", linewidth=4)


def _colour_bar(figure: Figure, axes: list[Axes]) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    bar = figure.colorbar(ScalarMappable(Normalize(0, 100), "YlGnBu"), ax=axes, fraction=0.05, pad=0.02, aspect=25)
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.ax.tick_params(labelsize=8, length=0)
    bar.set_label("score, %", fontsize=8)


def _plot_title(name: str, runs: Sequence[RunScores]) -> str:
    measured = [_measure(run)[0] for run in runs]
    parts = []
    for metric in ("average_performance", "backward_transfer"):
        values = [each[metric] for each in measured if metric in each]
        if values:
            parts.append(f"{COLUMNS[metric]} {_mean_and_std(values)}")
    return "\n".join([name, "   ".join(parts)]) if parts else name


def _short(name: str) -> str:
    return name if len(name) <= 18 else name[:17] + "…"


def _save(figure: Figure, path: str | Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
    return path


# Reports


def write_report(path: str | Path, out: str | Path | None = None) -> Path:
    """Write `report.md` and its plots for one run or for a folder of runs; returns the path of `report.md`.

    Args:
        path: a run directory, or a folder with run directories up to three levels below.
        out: folder to write to; `path` if left out.
    """
    path = Path(path)
    out = path if out is None else Path(out)
    runs = [load_run(each) for each in find_runs(path)]
    single = runs[0].path == path
    out.mkdir(parents=True, exist_ok=True)

    blocks = [f"# {runs[0].title}" if single else f"# Comparison: {path.resolve().name}"]
    if single:
        run = runs[0]
        plot_matrix(run, out / "matrix.png")
        if not run.finished:
            blocks.append(f"**Not finished**: {run.progress}. The metrics below are over the finished tasks only.")
        blocks += ["## Scores", _matrix_caption(run), matrix_table(run, "github"), "![score matrix](matrix.png)"]
        blocks += ["## Metrics", _run_metrics(run)]
    else:
        plot_comparison(runs, out / "comparison.png")
        caption = "Percent; mean over seeds, ± sample standard deviation where there are several."
        blocks += ["## Summary", caption, summary_table(runs, "github"), "![comparison](comparison.png)"]
        blocks.append("## Runs")
        for run in runs:
            state = "" if run.finished else f" (not finished: {run.progress})"
            blocks += [f"### {run.title}{state}", f"`{run.path}`", _matrix_caption(run), matrix_table(run, "github")]

    blocks += ["## Formulas", _FORMULAS]
    blocks += ["Percent, mean over the finished runs, by every definition this package knows:", _variants_table(runs)]
    blocks += ["## Predictions", _predictions(runs)]
    versions = _versions(runs)
    if versions:
        blocks += ["## Versions", versions]

    report = out / "report.md"
    report.write_text("\n\n".join(blocks) + "\n", encoding="utf-8")
    return report


def print_report(path: str | Path, out: str | Path | None = None) -> None:
    """Write the report and print its tables and its path."""
    report = write_report(path, out)
    runs = [load_run(each) for each in find_runs(path)]
    for run in runs:
        state = "" if run.finished else f" (not finished: {run.progress})"
        print(f"{run.title}{state}: {', '.join(sorted(set(run.metrics.values()))) or 'no scores yet'}, percent")
        print(matrix_table(run), end="\n\n")
    single = runs[0].path == Path(path)
    print(_run_metrics(runs[0], "simple") if single else summary_table(runs), end="\n\n")
    print(f"Report: {report}")


_FORMULAS = """\
`R[i, j]` is the score on task `j` after training task `i`, both from 0; `T` is the number of tasks; `baseline` is the
base model before any task. AP = average performance, BWT = backward transfer (below 0: forgetting), LA = learning
accuracy (each task just after it was learned; framed in the plots), F = forgetting, FWT = forward transfer."""


def _matrix_caption(run: RunScores) -> str:
    if not run.metrics:
        return "No scores yet."
    kinds = {f"{run.metrics[name]}, n = {run.sizes[name]}": name for name in run.metrics}
    if len(kinds) == 1:
        scored = next(iter(kinds))
    else:
        scored = "; ".join(f"{name}: {run.metrics[name]}, n = {run.sizes[name]}" for name in run.metrics)
    return f"Percent. Rows: the task trained last. Columns: the task evaluated ({scored})."


def _run_metrics(run: RunScores, tablefmt: str = "github") -> str:
    """The default metrics of one run in percent, and the metrics that could not be computed."""
    values, problems = _measure(run)
    if not values and not problems:
        return "No task is finished yet."
    rows = [[f"{name.replace('_', ' ')} ({COLUMNS[name]})", _percent(value)] for name, value in values.items()]
    bullet = "- " if tablefmt == "github" else ""
    table = _table(rows, ["metric", "percent"], tablefmt)
    return "\n".join([table, *([""] if problems else []), *(bullet + problem for problem in problems)])


def _predictions(runs: Sequence[RunScores]) -> str:
    """Where the raw predictions of each run are: the folders, with the number of files in each."""
    lines = []
    for run in runs:
        files = [
            file
            for file in sorted(run.path.rglob("*.jsonl"))
            if any("prediction" in part for part in file.relative_to(run.path).parts)
        ]
        folders = list(dict.fromkeys(file.parent for file in files))
        places = [f"`{folder}` ({sum(f.parent == folder for f in files)})" for folder in folders]
        lines.append(f"- {run.title}: {', '.join(places) or 'no prediction files'}")
    return "\n".join(lines)


def _versions(runs: Sequence[RunScores]) -> str:
    """One line for each set of package versions; names the runs if they differ."""
    sets: dict[str, list[str]] = {}
    for run in runs:
        if run.versions:
            sets.setdefault(", ".join(f"{k} {v}" for k, v in run.versions.items()), []).append(run.title)
    if len(sets) == 1:
        return next(iter(sets))
    return "\n".join(f"- {', '.join(titles)}: {versions}" for versions, titles in sets.items())
