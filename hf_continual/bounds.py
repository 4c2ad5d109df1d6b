"""Bounds and controls of a recipe: what its variants are to be measured against.

    naive         the same training and no method: what forgetting costs
    independent   each task alone from the base model, one model a task: what the tasks give without each other
    joint         all tasks together: what the same rows give at once

The gap between naive and joint, and how much of it a method closes; AP is the average performance after the last task:

    gap closed = (AP(method) - AP(naive)) / (AP(joint) - AP(naive))

    <variant>+padded    the variant with as many rows of the present task in the place of the old ones that it replays

A gain over that control is the old data's: steps and rows of each task are as many.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import InputError

if TYPE_CHECKING:
    from .recipes import Run
    from .run_scores import RunScores

__all__ = [
    "BOUNDS",
    "PADDED",
    "add_independent",
    "bounds_of",
    "bounds_table",
    "gap_closed",
    "has_bounds",
    "padded",
    "replays",
    "runs_beside",
]

BOUNDS: dict[str, dict[str, Any]] = {
    "naive": {"methods": [], "joint": False, "independent": False},
    "independent": {"methods": [], "joint": False, "independent": True},
    "joint": {"methods": [], "joint": True, "independent": False},
}
"""Sections of the recipe, by the name of the bound."""
PADDED = "+padded"
OF_VARIANTS = ("variants", "methods", "joint", "independent", "gate")
"""Overrides of the command line that say what the variants are, and not how anything is trained."""
SMALL = 1e-9


# -- runs ------------------------------------------------------------------------------------------------------------


def bounds_of(recipe: Mapping[str, Any], runs: Sequence[Run], overrides: Mapping[str, Any]) -> list[Run]:
    """The runs that `--with_bounds` adds to those of a recipe: each bound with every seed, in a folder beside them.

    They are trained as the recipe says without its variants. A variant that is one of them is not run twice. None has
    a forgetting gate: a bound that stops early is none.

    Args:
        recipe: as it was loaded.
        runs: what it expands to.
        overrides: of the command line.

    Raises:
        InputError: if a variant has the name of a bound and is something else.
    """
    from . import recipes

    there = {run.variant: run for run in runs}
    for name, sections in BOUNDS.items():
        if name in there:
            own = there[name].recipe
            methods = [spec["name"] for spec in own["methods"] if spec["name"] != "naive"]
            if methods or any(own[key] != sections[key] for key in ("joint", "independent")):
                raise InputError(
                    f"--with_bounds: the recipe's variant '{name}' has the name of a bound and is another run; give it "
                    "another name"
                )
    for run in runs:
        if run.variant in BOUNDS:
            run.recipe.pop("gate", None)
    missing = {name: {**sections, "gate": None} for name, sections in BOUNDS.items() if name not in there}
    if not missing:
        return []
    plain = {key: value for key, value in recipe.items() if key != "methods"}
    return recipes.expand({**plain, "variants": missing}, runs[0].base_dir, _of_training(overrides))


def padded(recipe: Mapping[str, Any], runs: Sequence[Run], overrides: Mapping[str, Any]) -> tuple[list[Run], list[str]]:
    """The runs that `--with_padded_control` adds, and a line for each variant that needs none.

    Raises:
        InputError: if no variant replays, or a name is taken.
    """
    from . import recipes

    changed = recipes.apply_overrides(dict(recipe), overrides)
    own_name = Path(changed.get("run_dir") or Path("runs") / str(changed["name"])).resolve().name
    overlays = changed.get("variants") or {}
    variants: dict[str, Any] = {}
    lines = []
    for run in {run.variant: run for run in runs}.values():
        if run.variant in BOUNDS and run.variant not in overlays:
            continue  # added by --with_bounds
        specs, found = _padded_methods(run.recipe["methods"])
        label = run.variant or own_name
        if not found or run.recipe["joint"] or run.recipe["independent"]:
            lines.append(f"{label}: replays no rows of earlier tasks, so it needs no padded control")
            continue
        if f"{label}{PADDED}" in overlays:
            raise InputError(f"--with_padded_control: the recipe has a variant '{label}{PADDED}' already; rename it")
        variants[f"{label}{PADDED}"] = {**(overlays.get(run.variant) or {}), "methods": specs, "gate": None}
    if not variants:
        raise InputError(
            "--with_padded_control: no variant of this recipe replays rows of earlier tasks, so there is nothing to "
            "control; add a method such as replay, or leave the flag out"
        )
    return recipes.expand({**recipe, "variants": variants}, runs[0].base_dir, _of_training(overrides)), lines


def _of_training(overrides: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in overrides.items() if key.split(".")[0] not in OF_VARIANTS}


def _padded_methods(specs: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], bool]:
    """Resolved methods with the replaying ones turned into their control, and whether there are any."""
    from .methods.base import MethodList

    which = [replays(method) for method in MethodList(specs)]
    changes = [{"source": "current_task"} if own else {} for own in which]
    return [{**spec, **change} for spec, change in zip(specs, changes, strict=True)], any(which)


def replays(method: Any) -> bool:
    """Whether a method, with its options, trains on stored rows of earlier tasks or takes gradients of them.

    Raises:
        InputError: if it does and has no option `source`.
    """
    from .replay import ReplayBuffer

    config = method.config
    buffers = [value for value in vars(method).values() if isinstance(value, ReplayBuffer)]
    if not hasattr(config, "source"):
        if buffers or "replay" in method.owns:
            raise InputError(
                f"--with_padded_control: method '{method.name}' keeps rows of earlier tasks and has no option 'source' "
                "to replace them; see hf_continual.replay.replayed_rows"
            )
        return False
    if config.source != "past":
        return False
    return any(b.count != 0 or b.total is not None for b in buffers) if buffers else bool(method._replays)


def runs_beside(path: Path) -> list[Path]:
    """Bounds and controls of a recipe without variants, whose own run is `path`."""
    folders = [child for child in sorted(path.iterdir()) if child.name in BOUNDS or child.name.endswith(PADDED)]
    places = [place for folder in folders for place in (folder, *sorted(folder.glob("seed-*")))]
    return [place for place in places if (place / "queue.json").is_file()]


# -- scores ----------------------------------------------------------------------------------------------------------


def gap_closed(method: float, naive: float, joint: float) -> float | None:
    """How much of the gap from naive to joint a method closes, 1 for all of it; None where joint is not above naive.

    Of each more must be better, as of `run_scores.compute`.
    """
    gap = joint - naive
    return None if gap < SMALL else (method - naive) / gap


@dataclass
class BoundsRow:
    """One variant against the bounds: values of each seed.

    Attributes:
        unit: of all but the gap, as `run_scores.in_unit` takes it.
        transfer: SAPT's forward transfer, from the independent run.
        gains: average performance above that of its padded control.
    """

    label: str
    unit: str = "percent"
    performance: list[float] = field(default_factory=list)
    closed: list[float] = field(default_factory=list)
    transfer: list[float] = field(default_factory=list)
    gains: list[float] = field(default_factory=list)


def add_independent(runs: Sequence[RunScores]) -> list[str]:
    """Give each run the scores of the independent run with its seed (else the mean over seeds), where it has none yet.

    Returns:
        Why a run got none.
    """
    notes = []
    singles = [run for run in runs if run.independent and run.finished]
    for run in runs:
        if run.joint or run.independent or run.single_task is not None or not singles:
            continue
        same = [single for single in singles if single.seed == run.seed] or singles
        usable, why = [], ""
        for single in same:
            why = _why_not(run, single)
            if not why:
                usable.append([single.R[i, i] for i in (single.tasks.index(task) for task in run.eval_tasks)])
        if usable:
            run.single_task = np.mean(np.array(usable, dtype=float), axis=0)
        else:
            notes.append(f"{run.title}: no forward transfer from the independent run: {why}")
    return notes


def _why_not(run: RunScores, single: RunScores) -> str:
    """Why the scores of an independent run cannot be compared with those of `run`; empty if they can."""
    for task in run.eval_tasks:
        if task not in single.tasks:
            return f"{single.path} has no task {task}"
        if single.eval_hashes.get(task) != run.eval_hashes.get(task):
            return f"{single.path} evaluates {task} on other rows"
        if single.metrics.get(task) != run.metrics.get(task, single.metrics.get(task)):
            return f"{single.path} scores {task} by {single.metrics.get(task)}"
    return ""


def bounds_rows(runs: Sequence[RunScores]) -> tuple[list[BoundsRow], list[str]]:
    """Every variant of finished runs against the bounds among them, paired by seed; and what could not be paired."""
    from .metrics import METRICS
    from .run_scores import compute, groups

    finished = [run for run in runs if run.finished]
    notes = add_independent(finished)
    performance: dict[str, dict[Any, float]] = {}
    of_label: dict[str, list[RunScores]] = groups(finished)
    rows_of = {run.label: (set(run.eval_tasks), run.eval_hashes) for run in finished if run.label in ("naive", "joint")}
    for label, members in of_label.items():
        for run in members:
            if any((set(run.eval_tasks), run.eval_hashes) != scored for scored in rows_of.values()):
                notes.append(f"{run.title}: not compared with the bounds, which are scored on other tasks or rows")
                continue
            try:
                performance.setdefault(label, {})[run.seed] = compute(run, METRICS["average_performance"])
            except InputError as error:
                notes.append(f"{run.title}: {error}")
    naive, joint = performance.get("naive", {}), performance.get("joint", {})
    rows = []
    for label, found in performance.items():
        row = BoundsRow(label, of_label[label][0].unit, list(found.values()))
        control = performance.get(f"{label}{PADDED}", {})
        row.gains = [value - control[seed] for seed, value in found.items() if seed in control]
        for run in of_label[label]:
            if run.single_task is not None:
                try:
                    row.transfer.append(compute(run, METRICS["forward_transfer/diagonal"]))
                except InputError as error:
                    notes.append(f"{run.title}: {error}")
        if label not in BOUNDS:
            for seed, value in found.items():
                if seed in naive and seed in joint:
                    closed = gap_closed(value, naive[seed], joint[seed])
                    if closed is not None:
                        row.closed.append(closed)
        rows.append(row)
    for seed in [seed for seed in naive if seed in joint]:
        if gap_closed(0.0, naive[seed], joint[seed]) is None:
            notes.append(f"seed {seed}: joint is not better than naive, so there is no gap to close")
    return rows, notes


def has_bounds(runs: Sequence[RunScores]) -> bool:
    """Whether there is anything for `bounds_table` to show."""
    labels = {run.label for run in runs if run.finished}
    if any(run.independent for run in runs if run.finished) or {"naive", "joint"} <= labels:
        return True
    return any(f"{label}{PADDED}" in labels for label in labels)


def bounds_table(runs: Sequence[RunScores], tablefmt: str = "simple") -> str:
    """AP of bounds and variants in percent, the gap closed, SAPT's forward transfer, the gain over the control."""
    from tabulate import tabulate

    from .run_scores import mean_and_std

    rows, notes = bounds_rows(runs)
    order = list(BOUNDS)
    rows.sort(key=lambda row: order.index(row.label) if row.label in order else len(order))
    columns = {"AP": "performance", "gap closed": "closed", "FWT": "transfer", "gain of old data": "gains"}
    shown = {title: name for title, name in columns.items() if any(getattr(row, name) for row in rows)}
    body = []
    for row in rows:
        cells = [
            mean_and_std(getattr(row, name), "percent" if name == "closed" else row.unit) for name in shown.values()
        ]
        body.append([row.label, len(row.performance), *cells])
    table = tabulate(
        body, ["variant", "seeds", *shown], tablefmt=tablefmt, disable_numparse=True,
        colalign=["left", *["right"] * (len(shown) + 1)],
    )  # fmt: skip
    said = [_EXPLAINED[title] for title in shown if title in _EXPLAINED]
    bullet = "- " if tablefmt == "github" else ""
    return "\n".join([table, "", *(bullet + line for line in [*said, *_intervals(rows), *notes])])


_EXPLAINED = {
    "gap closed": "gap closed: (AP - AP of naive) / (AP of joint - AP of naive), by seed",
    "FWT": "FWT: SAPT's forward transfer, mean of R[j, j] - score of the independent run on task j",
    "gain of old data": "gain of old data: AP above the padded control, which has as many steps and no old rows",
}


def _intervals(rows: Sequence[BoundsRow]) -> list[str]:
    """95 % intervals over seeds of the gains."""
    from .compare import student_t
    from .run_scores import in_unit

    lines = []
    for row in rows:
        n = len(row.gains)
        if n > 1:
            mean = statistics.fmean(row.gains)
            half = student_t(n - 1) * statistics.stdev(row.gains) / n**0.5
            low, middle, high = (in_unit(row.unit)(value) for value in (mean - half, mean, mean + half))
            lines.append(f"{row.label}: the old data's gain is {middle} [{low}, {high}], 95 % over {n} seeds")
        elif n == 1:
            lines.append(f"{row.label}: of one seed no interval over seeds can be given for the old data's gain")
    return lines
