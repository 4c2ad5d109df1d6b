"""Looking inside the runs of TaSL and KIF: which units each task needed, how peaked the scores are, what was merged.

What is drawn and tabulated here is read by `skill_state.py`.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from tabulate import tabulate

from .errors import InputError
from .plots import new_figure, save_figure, short_name, style_cells
from .run_scores import NO_VALUE, RunScores, groups, percent
from .skill_state import HALF, LOW, SHOWN_CASES, TaskUnits, read_run_units, skill_method

PEAKED = 0.5
"""From this share of scores near zero on, min-max colours would show one bright cell, so ranks are drawn instead."""
OTHER = "other"
"""Row and panel of the units whose names hold no layer number, such as embeddings and heads."""

T = TypeVar("T")

CASE_COLOURS = {"shared": "#7b5ea7", "past": "#2c7fb8", "current": "#f28e4c", "neither": "#dddddd"}


# Layers and modules


@dataclass(frozen=True)
class LayerImportance:
    """The importance of layers to tasks.

    Attributes:
        rows: layers, such as `0` or `encoder 0`, with `other` last.
        kinds: types of modules, such as `q_proj A`; `other` last.
        tasks: names.
        values: mean normalised importance of the units there; NaN where there is none; [kinds, rows, tasks].
        scale: the normalisation: `minmax`, `rank` or `log`.
    """

    rows: list[str]
    kinds: list[str]
    tasks: list[str]
    values: np.ndarray
    scale: str


def unit_places(keys: Iterable[str]) -> dict[str, tuple[str, str]]:
    """(layer, type of module) of each unit, from the names of all units of a model.

    The first number in a name is the layer. What stands before it names the layer only where that differs (`encoder 0`,
    `decoder 0`); of what stands behind it, the type keeps as many last parts as it takes to tell the types apart, and
    further numbers (experts, sub-layers) are left out. `A` and `B` are those of LoRA.
    """
    parsed = {key: _parse(key) for key in keys}
    if all(place.number is None for place in parsed.values()):
        parsed = {key: _parse(key, lists=True) for key in parsed}
    layered = [place for place in parsed.values() if place.number is not None]
    towers = _tower_names({place.tower for place in layered})
    kinds = _kind_names({place.module for place in layered} or {place.module for place in parsed.values()})
    places = {}
    for key, place in parsed.items():
        row = OTHER if place.number is None else f"{towers[place.tower]} {place.number}".strip()
        # A head gets no panel of its own beside those of the layers.
        own = place.number is not None or not layered
        places[key] = row, f"{kinds[place.module]} {place.side}".strip() if own else OTHER
    return places


@dataclass(frozen=True)
class _Place:
    tower: tuple[str, ...]
    number: int | None
    module: tuple[str, ...]
    side: str


_FACTOR = re.compile(r"lora_(?:embedding_)?([AB])")


def _parse(key: str, lists: bool = False) -> _Place:
    """`lists`: whether a number with nothing behind it, as in `classifier.3.weight`, is a layer."""
    parts = re.sub(r"\[\d+\]$", "", key).split(".")
    ending = ["bias"] if len(parts) > 1 and parts[-1] == "bias" else []
    if len(parts) > 1 and parts[-1] in ("weight", "bias"):
        parts = parts[:-1]
    sides: list[str] = []
    factor = next((i for i, part in enumerate(parts) if _FACTOR.fullmatch(part)), None)
    if factor is not None:
        # What follows is the adapter's name, where several learn.
        sides = [parts[factor][-1], *parts[factor + 1 :]]
        parts = parts[:factor]
    side = " ".join([*sides, *ending])
    number = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    if number is None or (number == len(parts) - 1 and not lists):
        return _Place((), None, tuple(parts), side)
    module = tuple(part for part in parts[number + 1 :] if not part.isdecimal())
    return _Place(tuple(parts[:number]), int(parts[number]), module or tuple(parts[number - 1 : number]), side)


def _tower_names(towers: set[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """What tells stacks of layers apart: their names without the parts that all begin and all end with."""
    start, end = 0, 0
    shortest = min(map(len, towers), default=0)
    while len(towers) > 1 and start < shortest and len({tower[start] for tower in towers}) == 1:
        start += 1
    while len(towers) > 1 and end < shortest - start and len({tower[-1 - end] for tower in towers}) == 1:
        end += 1
    if len(towers) == 1:
        return dict.fromkeys(towers, "")
    return {tower: ".".join(tower[start : len(tower) - end]) for tower in towers}


def _kind_names(modules: set[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """Each module by its last part; by more of them where several share it."""
    names: dict[tuple[str, ...], str] = {}
    for module in modules:
        for length in range(1, len(module) + 1):
            if sum(other[-length:] == module[-length:] for other in modules) == 1:
                break
        names[module] = ".".join(module[-length:])
    return names


def layer_importance(units: Sequence[TaskUnits], scale: str = "auto") -> LayerImportance:
    """Normalised importance I_k, averaged over the units of each layer and type of module, for each task.

    Args:
        units: of one run, or of several runs over the same tasks (seeds), which are averaged.
        scale: `minmax`, `rank` or `log`, see `importance.normalise`; `auto` takes the run's own normalisation, or
            `rank` where half of a task's scores or more lie below 0.05.

    Raises:
        InputError: for no units, or scores that `scale` cannot normalise.
    """
    from .importance import normalise

    if not units:
        raise InputError("layer_importance: there are no units; the run has learnt no task yet")
    if scale == "auto":
        scale = _scale(units)
    places = unit_places(dict.fromkeys(key for each in units for key in each.keys))
    rows, kinds = _ordered_rows(places), _ordered([kind for _, kind in places.values()])
    indices = sorted({each.index for each in units})
    cells = {key: (kinds.index(kind), rows.index(row)) for key, (row, kind) in places.items()}
    sums, counts = np.zeros((2, len(kinds), len(rows), len(indices)))
    for each in units:
        panel, row = np.array([cells[key] for key in each.keys]).T
        column = indices.index(each.index)
        np.add.at(sums, (panel, row, column), normalise(each.raw, scale).numpy())
        np.add.at(counts, (panel, row, column), 1)
    with np.errstate(invalid="ignore"):
        values = sums / counts
    names = {each.index: each.task for each in units}
    return LayerImportance(rows, kinds, [names[index] for index in indices], values, scale)


def _scale(units: Sequence[TaskUnits]) -> str:
    own = {str(each.options["normalisation"]) for each in units}
    peaked = any(each.measures()["low"] >= PEAKED for each in units)
    return "rank" if peaked or len(own) > 1 else own.pop()


def _ordered(names: Iterable[str]) -> list[str]:
    """In the order of the model, `other` last."""
    return sorted(dict.fromkeys(names), key=lambda name: name == OTHER)


def _ordered_rows(places: Mapping[str, tuple[str, str]]) -> list[str]:
    """Stack by stack in the order of the model, by number within each."""
    rows = _ordered(row for row, _ in places.values())
    stacks = [row.rpartition(" ")[0] for row in rows]

    def place(row: str) -> tuple[bool, int, int]:
        stack, _, number = row.rpartition(" ")
        return (True, 0, 0) if row == OTHER else (False, stacks.index(stack), int(number))

    return sorted(rows, key=place)


# Plots


def plot_skill_importance(importance: LayerImportance, path: str | Path, title: str = "") -> Path:
    """Draw one heat map a type of module into one PNG: layers by tasks, the colour their importance."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    panels, rows, tasks = importance.values.shape
    # The row `other` has cells in the panel `other` alone, which has no other row: what is empty is not drawn.
    apart = OTHER in importance.kinds and panels > 1
    height = rows - apart
    width = max(max(0.3 * min(tasks, 6), 0.18 * tasks) + 0.25, 0.08 * max(map(len, importance.kinds)) + 0.1, 0.7)
    columns = max(1, min(panels, int(12 / width)))
    lines = -(-panels // columns)
    labels = 0.055 * max(map(len, importance.rows)) + 0.1
    figure = new_figure(
        columns * width + labels + 1.3,
        max(lines * (max(0.17 * min(height, 12), 0.13 * height) + 1.0), 1.4) + (0.3 if title else 0),
    )
    grid = figure.subplots(lines, columns, squeeze=False)
    highest = float(np.nanmax(importance.values))
    # Means of a few bright units among many dark ones would all look alike on the full range.
    norm = Normalize(0, 1 if highest > 0.5 or highest == 0 else highest)
    colours = colormaps["YlGnBu"].with_extremes(bad="#f0f0f0")
    turn = 90 if max(map(len, importance.tasks)) > 3 else 0
    for number, (axes, kind, values) in enumerate(zip(grid.flat, importance.kinds, importance.values, strict=False)):
        alone = apart and kind == OTHER
        cells, names = (values[-1:], importance.rows[-1:]) if alone else (values[:height], importance.rows[:height])
        axes.imshow(np.ma.masked_invalid(cells), cmap=colours, norm=norm, aspect="auto")
        axes.set_ylim(height - 0.5, -0.5)  # the panel `other` has cells of the same size
        first = number % columns == 0
        style_cells(axes, names if first or alone else [""] * height, importance.tasks, 7, turn=turn, gap=0.6)
        axes.set_title(kind, fontsize=8)
        if first and not alone:
            axes.set_ylabel("layer", fontsize=8)
    for axes in list(grid.flat)[panels:]:
        axes.set_axis_off()
    bar = figure.colorbar(ScalarMappable(norm, "YlGnBu"), ax=list(grid.flat), fraction=0.05, pad=0.02, aspect=25)
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.ax.tick_params(labelsize=7, length=0)
    bar.set_label(f"importance ({importance.scale})", fontsize=7)
    if title:
        figure.suptitle(title, fontsize=9)
    return save_figure(figure, path)


def plot_skill_cases(shares: Mapping[str, Mapping[str, Mapping[str, float]]], path: str | Path) -> Path:
    """Draw the shares of the four cases as stacked bars, one panel a variant, one bar a task, into one PNG.

    Args:
        shares: by variant, by task, by case.

    Raises:
        InputError: if there is nothing to draw: no second task yet.
    """
    shares = {label: tasks for label, tasks in shares.items() if tasks}
    if not shares:
        raise InputError("plot_skill_cases: no task was merged yet; the first one has no cases")
    columns = min(len(shares), 3)
    lines = -(-len(shares) // columns)
    bars = max(map(len, shares.values()))
    figure = new_figure(columns * max(0.55 * bars + 0.7, 1.8) + 1.0, lines * 2.6)
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes, (label, tasks) in zip(grid.flat, shares.items(), strict=False):
        bottom = np.zeros(len(tasks))
        for case in SHOWN_CASES:
            heights = np.array([100 * each[case] for each in tasks.values()])
            axes.bar(range(len(tasks)), heights, 0.8, bottom, color=CASE_COLOURS[case], label=case)
            for x, (height, low) in enumerate(zip(heights, bottom, strict=True)):
                if height >= 7:
                    colour = "#222222" if case == "neither" else "white"
                    axes.text(x, low + height / 2, f"{height:.0f}", ha="center", va="center", fontsize=7, color=colour)
            bottom += heights
        names = [short_name(task) for task in tasks]
        axes.set_xticks(range(len(tasks)), names, fontsize=7, rotation=40, ha="right", rotation_mode="anchor")
        axes.tick_params(labelsize=7, length=0)
        axes.spines[:].set_visible(False)
        axes.set_ylim(0, 100)
        axes.set_title(label, fontsize=9)
    for axes in list(grid.flat)[len(shares) :]:
        axes.set_axis_off()
    for line in grid:
        line[0].set_ylabel("units, %", fontsize=8)
    handles, names = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles[::-1], names[::-1], loc="outside right center", fontsize=7, frameon=False)
    return save_figure(figure, path)


# The section of the report


def skill_table(
    members: Mapping[str, Sequence[Sequence[TaskUnits]]], tablefmt: str = "github", *, compare: bool = True
) -> str:
    """Shares of the cases, peakedness of the scores and coefficients, one row a variant and task.

    Args:
        members: by variant, the units of each of its runs (seeds). Shares and medians are means over the runs, `c min`
            and `c max` the smallest and largest of all.
        tablefmt: of `tabulate`.
        compare: whether to show the columns `variant` and `seeds`.
    """
    table = []
    for label, runs in members.items():
        for same in _by_task(runs):
            measured, shares = [each.measures() for each in same], [each.case_shares() for each in same]
            row = [same[0].task, len(same[0].keys)]
            row += [_mean(shares, case) for case in SHOWN_CASES]
            row += [_mean(measured, "low"), _mean(measured, "top"), _mean(measured, "half")]
            for name, of in (("min", min), ("median", statistics.fmean), ("max", max)):
                values = [each[name] for each in measured if name in each]
                row.append(f"{of(values):.3f}" if values else NO_VALUE)
            table.append([label, len(same), *row] if compare else row)
    headers = ["variant", "seeds"] if compare else []
    headers += ["task", "units", *SHOWN_CASES, f"scores < {LOW}", "top unit", f"c in [{HALF[0]}, {HALF[1]}]"]
    headers += ["c min", "c median", "c max"]
    align = ["left" if header in ("variant", "task") else "right" for header in headers]
    return tabulate(table, headers, tablefmt=tablefmt, disable_numparse=True, colalign=align)


def _by_task(runs: Sequence[Sequence[TaskUnits]]) -> list[list[TaskUnits]]:
    """The same task of all runs, task by task."""
    by_index: dict[int, list[TaskUnits]] = {}
    for run in runs:
        for each in run:
            by_index.setdefault(each.index, []).append(each)
    return [by_index[index] for index in sorted(by_index)]


def _mean(rows: Sequence[Mapping[str, float]], name: str) -> str:
    values = [row[name] for row in rows if name in row]
    return percent(statistics.fmean(values)) if values else NO_VALUE


def read_report_units(runs: Sequence[RunScores]) -> dict[Path, list[TaskUnits]]:
    """The units of those runs that train with TaSL or KIF and have learnt a task, by run directory.

    Raises:
        InputError: see `read_skill_units`.
    """
    found = {run.path: read_run_units(run) for run in runs if skill_method(run.path) is not None}
    return {path: units for path, units in found.items() if units}


def skill_section(
    runs: Sequence[RunScores], units: Mapping[Path, list[TaskUnits]], out: Path, single: bool
) -> list[str]:
    """The Markdown blocks of the section "Skill units"; writes its figures to `out`.

    Args:
        runs: all runs of the report.
        units: from `read_report_units`; runs that are not in it are left out.
        out: folder of the report.
        single: whether the report is on one run, which is then shown also if it is not finished, and not on a folder.
    """
    members, notes = shown_runs(runs, units, single)
    if not members and not notes:
        return []
    blocks = ["## Skill units"]
    if members:
        blocks += [_settings(members, single), _EXPLANATION if single else f"{_EXPLANATION} {_SEEDS}"]
        blocks.append(skill_table(members, compare=not single))
        blocks += _figures(members, out, single)
    return [*blocks, "\n".join(notes)] if notes else blocks


def shown_runs(runs: Sequence[RunScores], read: Mapping[Path, T], single: bool) -> tuple[dict[str, list[T]], list[str]]:
    """What was `read` of the runs that a report shows, by variant, and a note on each that is left out, unfinished."""
    members: dict[str, list[T]] = {}
    notes = []
    for label, same in groups(runs).items():
        for run in same:
            if run.path in read and (run.finished or single):
                members.setdefault(label, []).append(read[run.path])
            elif run.path in read:
                notes.append(f"- Not finished, not in the means: {run.title} ({run.progress})")
    return members, notes


def _figures(members: Mapping[str, list[list[TaskUnits]]], out: Path, single: bool) -> list[str]:
    # One scale for all figures of a report, so that they can be compared.
    scale = _scale([each for own in members.values() for run in own for each in run])
    blocks = []
    taken: set[str] = set()
    for label, own in members.items():
        name = "skill_importance.png" if single else file_name("skill_importance", label, taken)
        seeds = f"{label} ({len(own)} seeds)" if len(own) > 1 else label
        importance = layer_importance([each for run in own for each in run], scale)
        plot_skill_importance(importance, out / name, "" if single else seeds)
        blocks.append(f"![unit importance, {seeds}]({name})")
    blocks.append(f"{_SCALES[scale]} {_LAYERS}")
    shares = {label: _mean_shares(own) for label, own in members.items()}
    if any(shares.values()):
        plot_skill_cases(shares, out / "skill_cases.png")
        blocks.append("![shares of the four cases](skill_cases.png)")
    return blocks


def _mean_shares(runs: Sequence[Sequence[TaskUnits]]) -> dict[str, dict[str, float]]:
    """Shares of the cases by task, mean over runs; without the tasks that have none."""
    shares = {}
    for same in _by_task(runs):
        each = [units.case_shares() for units in same if units.cases is not None]
        if each:
            shares[same[0].task] = {case: statistics.fmean(one[case] for one in each) for case in SHOWN_CASES}
    return shares


def file_name(stem: str, label: str, taken: set[str]) -> str:
    """A PNG's name for a variant, other than those `taken`, to which it is added."""
    base = name = re.sub(r"[^A-Za-z0-9_.+-]+", "-", label).strip("-") or "run"
    number = 2
    while name in taken:
        name, number = f"{base}-{number}", number + 1
    taken.add(name)
    return f"{stem}-{name}.png"


_UNITS = {
    "matrix": "each parameter is a unit",
    "lora_matrix": "each A and each B of LoRA is a unit",
    "lora_rank1": "row r of A with column r of B is a unit",
}

_SCALES = {
    "minmax": "Colour: I_k, min-max over all units (0 the least, 1 the most important), mean over the units there.",
    "rank": "Colour: I_k as ranks over all units (0 the least, 1 the most important, equal steps in between), mean "
    "over the units there. Ranks are drawn where a run normalises so, where half of a task's scores or more are near "
    "zero, and where runs normalise differently.",
    "log": "Colour: the logarithm of I_k, min-max over all units (0 the least, 1 the most important), mean over the "
    "units there.",
}
_LAYERS = f"Grey: no unit there. Units whose names hold no layer number are in the row `{OTHER}`."

_EXPLANATION = f"""\
Percent, but for c min, c median and c max. I_k is the importance to the task itself, Ihat_(k-1) that to all tasks
before it. A unit is `current` where its I_k lies above the quantile of all units, `past` where its Ihat_(k-1) does,
`shared` where both do, else `neither`. TaSL merges by these cases; KIF's adaptive fusion does not look at them.
`scores < {LOW}`: normalised I_k that are near zero; `top unit`: the largest I_k as a share of their sum. The higher
both, the less do the other units differ. c is how far a unit goes from its weights before the task (0) to those after
it (1); near one half the merge is a plain average. The first task is merged with nothing: it has no cases and no c."""
_SEEDS = "Means over seeds; c min and c max are those of all seeds."


def _settings(members: Mapping[str, Sequence[Sequence[TaskUnits]]], single: bool) -> str:
    settings: dict[str, None] = {}
    for label, runs in members.items():
        for first, *_ in runs:
            text = f"{first.method}, `{first.scheme}`: {_UNITS[first.scheme]}; "
            text += f"normalisation {first.options['normalisation']}, quantile {first.options['quantile']:g}."
            settings[text if single else f"- {label}: {text}"] = None
    return "\n".join(settings)
