"""Looking inside the runs of SEEKR: which attention heads it holds, and how far attention drifts on old tasks.

Reads `tasks/*/methods/seekr.{json,safetensors}`. No model and no GPU, and no torch where a run has no such files.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from .errors import InputError
from .plots import new_figure, save_figure, short_name, style_cells
from .run_scores import NO_VALUE, RunScores
from .skill_report import file_name, shown_runs, unit_places
from .skill_state import foreign_state, learnt_tasks, read_tensors, trained_with

METHOD = "seekr"
MEAN = "mean"
PANELS = 8
"""A heat map shows so many tasks, the last ones."""
SCORES = {
    "importance": ("I", "importance_"),
    "sensitivity": ("S~", "sums_/sensitivity"),
    "forgettability": ("F", "sums_/change"),
    "random": ("S~", "sums_/sensitivity"),  # F and so I are not measured then
}
"""Symbol and stored tensor of the score that is drawn, by `head_choice`: the one by which heads are chosen."""


@dataclass(frozen=True)
class HeadScores:
    """The heads of one model after a task; all arrays are [modules, heads].

    Attributes:
        modules: names of the attention modules.
        score: what the heads were chosen by, summed over the tasks so far; `symbol` says which of `I`, `S~`, `F`.
        chosen: the heads of the task's plan.
        sensitivity: S~ of this task alone.
        forgettability: F of this task alone; None if it was not measured.
    """

    modules: list[str]
    score: np.ndarray
    symbol: str
    chosen: np.ndarray
    sensitivity: np.ndarray
    forgettability: np.ndarray | None

    def measures(self, first: HeadScores) -> dict[str, float]:
        """How the score is spread and the plan lies.

        Returns:
            `heads` and `layers` of the plan, `share` of the score's sum that its heads hold, `overlap` with the plan of
            the `first` task (Jaccard), and `correlation` of S~ and F (Spearman). What is not defined is left out.
        """
        values = {"heads": float(self.chosen.sum()), "layers": float(self.chosen.any(axis=1).sum())}
        if self.score.sum() > 0:
            values["share"] = float(self.score[self.chosen].sum() / self.score.sum())
        if first is not self and first.modules == self.modules:
            values["overlap"] = float((self.chosen & first.chosen).sum() / (self.chosen | first.chosen).sum())
        if self.forgettability is not None:
            correlation = rank_correlation(self.sensitivity, self.forgettability)
            values |= {} if correlation is None else {"correlation": correlation}
        return values


@dataclass(frozen=True)
class TaskAttention:
    """What SEEKR stored after one task.

    Attributes:
        task: name of the task.
        index: its place in the stream, from 0.
        heads: None if nothing was measured: `attention_weight` 0 and `track_drift` off.
        drift: after which task, of which earlier task: the distance on its stored rows; up to this task.
        options: all options of the method.
    """

    task: str
    index: int
    heads: HeadScores | None
    drift: dict[str, dict[str, float]]
    options: dict[str, Any]


@dataclass(frozen=True)
class RunAttention:
    """What SEEKR stored in one run: one entry a learnt task, at least one, in the order of the stream."""

    title: str
    tasks: list[TaskAttention]

    @property
    def options(self) -> dict[str, Any]:
        return self.tasks[0].options

    @property
    def drift(self) -> list[dict[str, float]]:
        """Task by task, the distance of each earlier task's rows after it; empty where it was not measured."""
        return [self.tasks[-1].drift.get(task.task, {}) for task in self.tasks]

    @property
    def unit(self) -> str:
        """The unit of the drift."""
        outputs, summed = self.options["attention"] == "outputs", self.options["kl_reduction"] == "sum"
        if outputs:
            return "relative squared error" + (", summed over layers and heads" if summed else " per head")
        return "KL, nats" + (", summed over layers, heads and query rows" if summed else " per head and query row")

    def measures(self) -> list[dict[str, float]]:
        """Task by task, `HeadScores.measures`; empty where there are no heads."""
        first = self.tasks[0].heads
        return [task.heads.measures(first) if task.heads and first else {} for task in self.tasks]

    @property
    def has_scores(self) -> bool:
        return any(task.heads is not None and task.heads.score.any() for task in self.tasks)


Members = Mapping[str, Sequence[RunAttention]]
"""By variant, its runs (seeds)."""


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """Spearman's correlation, equal values sharing their mean rank; None where one of the two is constant."""
    import torch

    from .importance import normalise

    if a.size < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    first, second = (normalise(torch.from_numpy(each.ravel()), "rank").numpy() for each in (a, b))
    return float(np.corrcoef(first, second)[0, 1])


# Reading


def read_attention(run: RunScores) -> RunAttention | None:
    """What SEEKR stored in a run; None if it trains without SEEKR or has learnt no task.

    Raises:
        InputError: if a file is missing or cannot be understood.
    """
    if trained_with(run.path, [METHOD]) is None:
        return None
    tasks = [_read_task(folder, task, index, run.tasks) for index, task, folder in learnt_tasks(run)]
    return RunAttention(run.title, tasks) if tasks else None


def read_report_attention(runs: Sequence[RunScores]) -> dict[Path, RunAttention]:
    """By run directory, where `read_attention` finds something.

    Raises:
        InputError: see `read_attention`.
    """
    found = {run.path: read_attention(run) for run in runs}
    return {path: each for path, each in found.items() if each is not None}


def _read_task(folder: Path, task: str, index: int, tasks: Sequence[str]) -> TaskAttention:
    from .run_state import read_json

    path = folder / f"{METHOD}.json"
    record = read_json(path)
    try:
        options, state = dict(record["options"]), record["state"]
        symbol, key = SCORES[options["head_choice"]]
        modules, plans, drift = (state[name]["value"] for name in ("modules_", "plans_", "drift_"))
        measured = state["importance_"]["kind"] == "tensor"
        plan = plans[f"{index:03d}"] if measured else {}
        right = record["method"] == METHOD and options["attention"] in ("weights", "outputs")
        right = right and options["kl_reduction"] in ("mean_rows", "sum")
        right = right and isinstance(options["attention_weight"], (int, float))
        right = right and isinstance(modules, list) and all(isinstance(name, str) for name in modules)
        right = right and bool(modules) == measured == bool(plan) and set(plan) <= set(modules)
        right = right and all(heads and all(isinstance(h, int) and h >= 0 for h in heads) for heads in plan.values())
        right = right and all({after, *of} <= set(tasks) for after, of in drift.items())
        right = right and all(isinstance(value, (int, float)) for of in drift.values() for value in of.values())
    except (KeyError, TypeError, ValueError, AttributeError):
        right = False
    if not right:
        raise foreign_state(path, METHOD)
    heads = _read_heads(folder / f"{METHOD}.safetensors", modules, plan, symbol, key) if measured else None
    return TaskAttention(task, index, heads, drift, options)


def _read_heads(path: Path, modules: list[str], plan: Mapping[str, Sequence[int]], symbol: str, key: str) -> HeadScores:
    keys = {"score": key, "sensitivity": "sensitivity_", "forgettability": "forgettability_"}
    arrays = {name: tensor.numpy() for name, tensor in read_tensors(path, keys).items()}
    shape = arrays["score"].shape
    width = max(max(heads) for heads in plan.values()) + 1
    for name, array in arrays.items():
        right = array.ndim == 2 and array.shape == shape and shape[0] == len(modules) and shape[1] >= width
        if not right or not np.isfinite(array).all() or (array < 0).any():
            raise InputError(
                f"{path} was edited: {keys[name]} has no finite number of at least 0 for each of the {len(modules)} "
                "attention modules and their heads in the .json file beside it; restore both"
            )
    chosen = np.zeros(shape, dtype=bool)
    for row, module in enumerate(modules):
        chosen[row, list(plan.get(module, ()))] = True
    change = arrays["forgettability"]
    return HeadScores(modules, arrays["score"], symbol, chosen, arrays["sensitivity"], change if change.any() else None)


# Tables


def head_table(members: Members, *, compare: bool = True) -> str:
    """How the importance of heads is spread and where the plans lie, one row a variant and task: means over the runs.

    Args:
        members: the runs by variant.
        compare: whether to show the columns `variant` and `seeds`.
    """
    table = []
    for label, runs in members.items():
        measured = [run.measures() for run in runs]
        for i, task in enumerate(_longest(runs).tasks):
            each = [tasks[i] for tasks in measured if len(tasks) > i and tasks[i]]
            if each:
                values = {name: [m[name] for m in each if name in m] for name in MEASURES}
                means = {name: statistics.fmean(found) for name, found in values.items() if found}
                row = [MEASURES[name].format(means[name]) if name in means else NO_VALUE for name in MEASURES]
                table.append([label, len(each), task.task, *row] if compare else [task.task, *row])
    headers = ["variant", "seeds"] if compare else []
    headers += ["task", "heads", "layers", "held", "overlap", "S~ and F"]
    return _table(table, headers)


MEASURES = {"heads": "{:.4g}", "layers": "{:.4g}", "share": "{:.1%}", "overlap": "{:.1%}", "correlation": "{:.2f}"}


def drift_table(run: RunAttention) -> str:
    """The drift of one run: rows after which task, columns of which task."""
    rows = {task.task: of for task, of in zip(run.tasks, run.drift, strict=True) if of}
    columns = [task.task for task in run.tasks if any(task.task in of for of in rows.values())]
    cells = [[row, *(f"{of[c]:.3g}" if c in of else NO_VALUE for c in columns)] for row, of in rows.items()]
    return _table(cells, ["after training", *columns])


def drift_comparison(members: Members) -> str:
    """The drift after the last task, one row a variant: mean over the old tasks, of the first task, and the largest.

    Mean over the runs, ± sample standard deviation where there are several.
    """
    table = []
    for label, runs in members.items():
        last = [list(run.drift[-1].values()) for run in runs if run.drift[-1]]
        if last:
            cells = [_mean_and_std([of(values) for values in last]) for of in (statistics.fmean, itemgetter(0), max)]
            table.append([label, len(last), f"{runs[0].options['attention_weight']:g}", *cells, runs[0].unit])
    headers = ["variant", "seeds", "attention_weight", "mean of old tasks", "first task", "largest", "unit"]
    return _table(table, headers)


def _longest(runs: Iterable[RunAttention]) -> RunAttention:
    return max(runs, key=lambda run: len(run.tasks))


def _mean_and_std(values: Sequence[float]) -> str:
    mean = f"{statistics.fmean(values):.3g}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.2g}"


def _table(rows: list[list[Any]], headers: list[str]) -> str:
    align = ["left" if name in ("variant", "task", "after training", "unit") else "right" for name in headers]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True, colalign=align if rows else None)


# Plots


def module_rows(modules: Sequence[str]) -> tuple[list[int], list[str], list[int]]:
    """How a heat map lists attention modules: their order, short names, and the places where a new stack begins.

    `3`; with an encoder and a decoder `encoder 3`, `decoder 3`, and `decoder 3 cross`, which come last.
    """
    places = unit_places(modules)
    names, stacks = [], []
    for module in modules:
        row, kind = places[module]
        beside = [places[other][1] for other in modules if places[other][0] == row]
        extra = ""
        if len(beside) > 1 and "self" not in kind.lower():
            extra = "cross" if any(word in kind.lower() for word in ("cross", "encdec", "encoder_attn")) else kind
        names.append(f"{row} {extra}".strip())
        stacks.append(f"{row.rpartition(' ')[0]} {extra}")
    found = list(dict.fromkeys(stacks))
    found.sort(key=lambda stack: stack.endswith(" cross"))
    order = sorted(range(len(modules)), key=lambda i: found.index(stacks[i]))
    if len(set(names)) < len(names):
        names = list(modules)
    begins = [i for i in range(1, len(order)) if stacks[order[i]] != stacks[order[i - 1]]]
    return order, [names[i] for i in order], begins


def plot_head_importance(tasks: Sequence[TaskAttention], path: str | Path, title: str = "") -> Path:
    """Draw one heat map a task into one PNG: attention layers by heads, the heads of the plan outlined.

    The colour is the head's share of the sum over all heads, on a logarithmic scale that all panels have in common.

    Args:
        tasks: of one run; the last eight are drawn.
        path: the PNG.
        title: above it.

    Raises:
        InputError: if no head has a score.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.collections import PatchCollection
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    scored = [(task.task, task.heads) for task in tasks if task.heads is not None and task.heads.score.any()]
    if not scored:
        raise InputError("plot_head_importance: no task has scores of its heads")
    shown = scored[-PANELS:]
    shares = [100 * heads.score / heads.score.sum() for _, heads in shown]
    # Of the smallest scores the exact size tells nothing, and the colours are for the others.
    positive = np.concatenate([share[share > 0] for share in shares])
    highest = float(positive.max())
    lowest = min(max(float(np.quantile(positive, 0.05)), highest / 1e4), highest / 2)
    norm = LogNorm(lowest, highest)

    modules, heads = shares[0].shape
    cell_width = max(0.085, min(0.2, 1.6 / heads))
    cell_height = max(0.11, min(0.2, 3.4 / modules))
    width, height = max(heads * cell_width, 1.0) + 0.12, modules * cell_height + 0.45
    order, names, begins = module_rows(shown[0][1].modules)
    labels = 0.06 * max(map(len, names)) + 0.2
    columns = max(1, min(len(shown), int(12.5 / width)))
    lines = -(-len(shown) // columns)
    columns = -(-len(shown) // lines)
    figure = new_figure(columns * width + labels + 0.9, lines * height + 0.3 + (0.25 if title else 0))
    grid = figure.subplots(lines, columns, squeeze=False)
    step = 1
    while step * cell_width < 0.06 + 0.06 * len(str(heads - 1)):
        step *= 2
    numbers = [str(head) if head % step == 0 else "" for head in range(heads)]
    kept = [i for i in range(modules) if _within_stack(i, begins) % (1 if cell_height >= 0.125 else 2) == 0]
    for number, (axes, (task, scores), share) in enumerate(zip(grid.flat, shown, shares, strict=False)):
        axes.imshow(np.clip(share[order], lowest, None), cmap="YlGnBu", norm=norm, aspect="auto")
        style_cells(axes, [""] * modules, numbers, 6, turn=0, gap=0.4)
        axes.tick_params(axis="x", pad=1)
        if number % columns == 0:
            axes.set_yticks(kept, [names[i] for i in kept], fontsize=6)
            axes.set_ylabel("layer", fontsize=7)
        for begin in begins:
            axes.axhline(begin - 0.5, color="white", linewidth=2.5)
        # Each cell by itself: of a common border one cannot tell which side is meant.
        cells = [Rectangle((x - 0.42, y - 0.4), 0.84, 0.8) for y, x in np.argwhere(scores.chosen[order])]
        axes.add_collection(PatchCollection(cells, facecolor="none", edgecolor="#ff5a1f", linewidth=1, zorder=3))
        axes.set_title(f"after {short_name(task)}", fontsize=8)
    for axes in list(grid.flat)[len(shown) :]:
        axes.set_axis_off()
    for line in grid[-1]:
        line.set_xlabel("head", fontsize=7)
    bar = figure.colorbar(
        ScalarMappable(norm, colormaps["YlGnBu"]),
        ax=list(grid.flat),
        fraction=0.05,
        pad=0.02,
        aspect=25,
        extend="min",
        ticks=LogLocator(subs=(1, 2, 5) if highest / lowest < 50 else (1,)),
        format=FuncFormatter(lambda value, _: f"{value:g}"),
    )
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.tick_params(labelsize=7, length=0)
    bar.set_label(f"share of the sum of {shown[0][1].symbol}, %, log scale", fontsize=7)
    left_out = f"the last {PANELS} of {len(scored)} tasks" if len(scored) > PANELS else ""
    if title or left_out:
        figure.suptitle(", ".join(filter(None, [title, left_out])), fontsize=9)
    return save_figure(figure, path)


def _within_stack(row: int, begins: Sequence[int]) -> int:
    return row - max((begin for begin in begins if begin <= row), default=0)


@dataclass(frozen=True)
class DriftLine:
    """One line of a drift plot: [runs, tasks] of drift after each task, NaN where there is none."""

    label: str
    unit: str
    values: np.ndarray


def drift_lines(members: Members) -> list[DriftLine]:
    """One line a variant, the mean over its old tasks; for one run alone one line an old task, and their mean."""
    runs = [run for same in members.values() for run in same]
    length = max(len(run.tasks) for run in runs)
    if len(runs) == 1:
        run = runs[0]
        rows = {task.task: [of.get(task.task, math.nan) for of in run.drift] for task in run.tasks}
        rows = {task: row for task, row in rows.items() if not np.isnan(row).all()}
        if len(rows) > 1:
            rows[MEAN] = _means(run)
        return [DriftLine(label, run.unit, np.array([row])) for label, row in rows.items()]
    lines = []
    for label, same in members.items():
        means = [[*_means(run), *[math.nan] * (length - len(run.tasks))] for run in same]
        lines.append(DriftLine(label, same[0].unit, np.array(means)))
    return [line for line in lines if not np.isnan(line.values).all()]


def _means(run: RunAttention) -> list[float]:
    return [statistics.fmean(of.values()) if of else math.nan for of in run.drift]


def plot_drift(lines: Sequence[DriftLine], tasks: Sequence[str], path: str | Path) -> Path:
    """Draw lines of drift over the tasks into one PNG: mean over runs, the band one sample standard deviation wide.

    Args:
        lines: from `drift_lines`; one panel a unit, since different units cannot be compared.
        tasks: names below the axis.
        path: the PNG.

    Raises:
        InputError: if there are no lines.
    """
    from matplotlib import colormaps

    if not lines:
        raise InputError("plot_drift: no drift was measured")
    units = list(dict.fromkeys(line.unit for line in lines))
    width = max(0.42 * len(tasks) + 1.0, 3.2)
    figure = new_figure(len(units) * (width + 1.4), 3.1)
    by_task = any(line.label == MEAN for line in lines)
    for axes, unit in zip(figure.subplots(1, len(units), squeeze=False).flat, units, strict=True):
        own = [line for line in lines if line.unit == unit]
        for number, line in enumerate(own):
            if line.label == MEAN:
                style: dict[str, Any] = {"color": "#222222", "linewidth": 2.2, "linestyle": "--"}
            elif by_task:
                style = {"color": colormaps["viridis"](0.92 * number / max(1, len(own) - 2)), "linewidth": 1.2}
            else:
                style = {"color": colormaps["tab10" if len(own) <= 10 else "tab20"](number), "linewidth": 1.6}
            there = ~np.isnan(line.values).all(axis=0)
            places, values = np.flatnonzero(there), line.values[:, there]
            mean = np.nanmean(values, axis=0)
            axes.plot(places, mean, marker="o", markersize=3.5, label=line.label, **style)
            if len(values) > 1:
                counts = (~np.isnan(values)).sum(axis=0)
                squares = np.nansum((values - mean) ** 2, axis=0)
                spread = np.sqrt(squares / np.maximum(counts - 1, 1))
                axes.fill_between(places, mean - spread, mean + spread, color=style["color"], alpha=0.15, linewidth=0)
        found = np.concatenate([line.values[~np.isnan(line.values)] for line in own])
        log = found.min() > 0 and found.max() / found.min() > 30
        if log:
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        axes.set_xlim(0.6, len(tasks) - 0.6)
        axes.set_xticks(range(1, len(tasks)), [short_name(task) for task in tasks[1:]])
        axes.tick_params(labelsize=7, length=2)
        axes.yaxis.get_offset_text().set_fontsize(7)
        for label in axes.get_xticklabels():
            label.set(rotation=40, ha="right", rotation_mode="anchor")
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel("after training", fontsize=8)
        axes.set_ylabel("drift, log scale" if log else "drift", fontsize=8)
        axes.set_title(unit, fontsize=8, loc="left")
        axes.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.02), borderaxespad=0.3)
    return save_figure(figure, path)


# The section of the report


def attention_section(
    runs: Sequence[RunScores], found: Mapping[Path, RunAttention], out: Path, single: bool
) -> list[str]:
    """The Markdown blocks of the section "Attention"; writes its figures to `out`.

    Args:
        runs: all runs of the report.
        found: from `read_report_attention`; runs that are not in it are left out.
        out: folder of the report.
        single: whether the report is on one run, which is then shown also if it is not finished, and not on a folder.
    """
    members, notes = shown_runs(runs, found, single)
    if not members and not notes:
        return []
    blocks = ["## Attention"]
    if members:
        blocks += [_settings(members, single), *_head_blocks(members, out, single)]
        blocks += _drift_blocks(members, out, single)
    return [*blocks, "\n".join(notes)] if notes else blocks


def _settings(members: Members, single: bool) -> str:
    settings: dict[str, None] = {}
    for label, runs in members.items():
        for o in (run.options for run in runs):
            text = f"attention {o['attention']}, attention_weight {o['attention_weight']:g}"
            text += f", head_choice {o['head_choice']}."
            settings[f"SEEKR: {text}" if single else f"- {label}: {text}"] = None
    return "\n".join(settings)


def _head_blocks(members: Members, out: Path, single: bool) -> list[str]:
    figures, skipped = [], []
    taken: set[str] = set()
    for label, runs in members.items():
        # The plans of several seeds have no mean: the first seed is shown.
        run = next((run for run in runs if run.has_scores), None)
        if run is None:
            skipped.append(label)
            continue
        name = "head_importance.png" if single else file_name("head_importance", label, taken)
        plot_head_importance(run.tasks, out / name, "" if single else run.title)
        figures.append(f"![importance of heads, {run.title}]({name})")
    blocks = []
    if any(task.heads for runs in members.values() for run in runs for task in run.tasks):
        blocks += ["### Heads", _HEADS if single else f"{_HEADS} Means over seeds."]
        blocks.append(head_table(members, compare=not single))
    if figures:
        blocks += [*figures, _MAP if single else f"{_MAP} One seed a variant."]
    if skipped:
        blocks.append(f"No importance of heads was measured: {', '.join(skipped)}.")
    return blocks


def _drift_blocks(members: Members, out: Path, single: bool) -> list[str]:
    lines = drift_lines(members)
    if not lines:
        return [f"No drift of attention: {_NO_DRIFT}"]
    runs = [run for same in members.values() for run in same]
    blocks = ["### Drift of attention", _DRIFT]
    if not single:
        blocks += [_COMPARISON, drift_comparison(members)]
    names = [task.task for task in _longest(runs).tasks]
    if any(task.task != name for run in runs for task, name in zip(run.tasks, names, strict=False)):
        names = [f"task {i + 1}" for i in range(len(names))]
    plot_drift(lines, names, out / "attention_drift.png")
    blocks.append("![drift of attention](attention_drift.png)")
    for run in runs:
        if any(run.drift):
            blocks += [f"{run.title}: {run.unit}.", drift_table(run)]
    without = [run.title for run in runs if not any(run.drift)]
    if without:
        blocks.append(f"No drift of attention in {'; '.join(without)}: {_NO_DRIFT}")
    return blocks


_HEADS = """\
Heads and layers of each task's plan; `held`: the share of the score's sum over all heads that the plan's heads have,
the score being that by which heads are chosen, summed over the tasks so far (with head_choice random: S~); `overlap`:
heads in both this plan and the first task's, of those in either; `S~ and F`: Spearman correlation of the task's
sensitivity and forgettability over all heads."""

_MAP = """\
Colour: the head's share of the score's sum over all heads, on a logarithmic scale (a twentieth of the heads, or what is
below a ten-thousandth of the highest, have the lowest colour). Outlined: the heads of the task's plan."""

_DRIFT = """\
The distance of attention from that just after the row's own task, on the stored rows of old tasks and the heads chosen
for them: mean over the rows, and over heads (kl_reduction sum: the sum over them), without attention_weight. Nats: KL
divergence of the attention weights. Relative squared error: of the outputs of heads."""

_COMPARISON = """\
After the last task, mean over seeds ± sample standard deviation. attention_weight 0 is the run without the attention
loss. Each run is measured on the heads it chose itself; only rows with the same unit can be compared."""

_NO_DRIFT = "it is measured from the second task on, with track_drift and teacher cached."
