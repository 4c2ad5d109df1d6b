"""Heat-maps of score matrices, as PNG files."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .errors import InputError
from .general_report import general_line, read_general_log
from .run_scores import COLUMNS, RunScores, groups, mean_and_std, measure, shown
from .scorers import lower_is_better

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_matrix(run: RunScores, path: str | Path) -> Path:
    """Draw the score matrix of one run as a heat-map PNG with the scores (percent) in the cells."""
    rows = len(run.tasks) + (run.baseline is not None)
    figure = new_figure(2.6 + 0.72 * len(run.eval_tasks), 1.9 + 0.5 * rows)
    axes = figure.subplots()
    _heat_map(axes, run, run.R, run.baseline)
    axes.set_ylabel("after training", fontsize=9)
    axes.set_title(_plot_title(run.title if run.finished else f"{run.title} ({run.progress})", [run]), fontsize=10)
    if line := general_line(read_general_log(run.path)):
        figure.supxlabel(textwrap.fill(line, int(16 * figure.get_figwidth())), fontsize=8)
    _colour_bar(figure, [axes], [run])
    return save_figure(figure, path)


def plot_comparison(runs: Sequence[RunScores], path: str | Path) -> Path:
    """Draw one small heat-map a variant into one PNG: the mean of its finished runs over seeds."""
    grouped = groups(runs)
    if not grouped:
        raise InputError("plot_comparison: no runs to draw")
    done = {label: [run for run in members if run.finished] for label, members in grouped.items()}
    done = {label: members for label, members in done.items() if members}
    waiting = [label for label in grouped if label not in done]
    columns = max(1, min(len(done), 3 if len(done) != 4 else 2))
    rows = max(1, -(-len(done) // columns))
    width = max(1.6 + 0.5 * max(len(run.eval_tasks) for run in runs), 3.0)
    cells = max(len(run.tasks) + (run.baseline is not None) for run in runs)
    figure = new_figure(columns * width + 0.8, rows * (1.3 + 0.36 * cells) + (0.3 if waiting else 0))
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
        _colour_bar(figure, list(grid.flat), runs)
    if waiting:
        figure.supxlabel(f"not finished: {', '.join(waiting)}", fontsize=9)
    return save_figure(figure, path)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches."""
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
    kinds = [run.metrics.get(task, "") for task in run.eval_tasks]
    shades = np.where([lower_is_better(kind) for kind in kinds], _to_the_best(cells), cells)
    axes.imshow(np.ma.masked_invalid(shades), cmap=colours, vmin=0, vmax=1, aspect="auto")
    # Panels side by side keep the same cell size: a joint run has fewer rows and leaves the rest white.
    axes.set_ylim(max(height or 0, len(cells)) - 0.5, -0.5)
    size = 8 if cells.shape[1] <= 8 else 7
    style_cells(axes, names, run.eval_tasks, size, turn=40 if max(map(len, run.eval_tasks)) > 8 else 0)
    for (i, j), value in np.ndenumerate(cells):
        if not np.isnan(value):
            colour = "white" if shades[i, j] > 0.55 else "#222222"
            axes.text(j, i, shown(kinds[j], value), ha="center", va="center", fontsize=size, color=colour)
    if not run.joint and R.shape[0] == R.shape[1]:
        shift = len(cells) - len(R)
        for j in range(len(R)):
            corner = (j - 0.45, j + shift - 0.42)
            axes.add_patch(Rectangle(corner, 0.9, 0.84, fill=False, edgecolor="#f28e4c", linewidth=1.4, zorder=3))
    if baseline is not None:
        axes.axhline(0.5, color="white", linewidth=4)


def _to_the_best(cells: np.ndarray) -> np.ndarray:
    """The smallest number of each column over its numbers: 1 for the best where less is better."""
    best = np.fmin.reduce(cells, axis=0)
    return np.asarray(best / np.maximum(cells, 1e-12))


def style_cells(
    axes: Axes, rows: Sequence[str], columns: Sequence[str], size: int, *, turn: int, gap: float = 1.5
) -> None:
    """White lines `gap` points wide between the cells of an image, row names left, column names above at an angle."""
    axes.xaxis.tick_top()
    axes.autoscale(False)
    # Two collections of lines: a grid of minor ticks takes seconds where there are many panels.
    axes.vlines(np.arange(len(columns) + 1) - 0.5, -0.5, len(rows) - 0.5, color="white", linewidth=gap)
    axes.hlines(np.arange(len(rows) + 1) - 0.5, -0.5, len(columns) - 0.5, color="white", linewidth=gap)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xticks(
        range(len(columns)),
        [short_name(name) for name in columns],
        fontsize=size,
        rotation=turn,
        ha="left" if turn else "center",
        va="center" if turn == 90 else "bottom",
        rotation_mode="anchor" if turn else "default",
    )
    axes.set_yticks(range(len(rows)) if any(rows) else [], [short_name(name) for name in rows if name], fontsize=size)


def _colour_bar(figure: Figure, axes: list[Axes], runs: Sequence[RunScores]) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    bar = figure.colorbar(ScalarMappable(Normalize(0, 100), "YlGnBu"), ax=axes, fraction=0.05, pad=0.02, aspect=25)
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.ax.tick_params(labelsize=8, length=0)
    small = sorted({kind for run in runs for kind in run.metrics.values() if lower_is_better(kind)})
    plain = any(not lower_is_better(kind) for run in runs for kind in run.metrics.values()) or not small
    parts = ["score, %"] if plain else []
    parts += [f"best {kind} of the column / {kind}, %" for kind in small]
    bar.set_label("; ".join(parts), fontsize=8)


def _plot_title(name: str, runs: Sequence[RunScores]) -> str:
    measured = [measure(run)[0] for run in runs]
    parts = []
    for metric in ("average_performance", "backward_transfer"):
        values = [each[metric] for each in measured if metric in each]
        if values:
            nats = " nats" if runs[0].unit == "nats" else ""
            parts.append(f"{COLUMNS[metric]} {mean_and_std(values, runs[0].unit)}{nats}")
    return "\n".join([name, "   ".join(parts)]) if parts else name


def short_name(name: str) -> str:
    """A label that fits beside a cell."""
    return name if len(name) <= 18 else name[:17] + "…"


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a PNG, with its folder; returns `path`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
    return path
