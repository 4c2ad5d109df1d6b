"""Tables and plots of run directories: one run, or a folder of runs that are compared.

A run directory holds `queue.json` (tasks in order, seed, variant, how far it came) and `scores.jsonl` (one cell of the
score matrix per line). Reports read those two files, the skill units of TaSL and KIF, and the attention heads of SEEKR,
so they need no model and no GPU.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from .attention_report import attention_section, read_report_attention
from .bounds import BOUNDS, PADDED, add_independent, bounds_table, has_bounds
from .errors import InputError
from .gate import gate_section
from .general_report import general_section, general_text
from .metrics import CONVENTIONS, METRICS, find_convention
from .plots import plot_comparison, plot_matrix
from .run_scores import (
    COLUMNS,
    NO_VALUE,
    RunScores,
    add_single_task,
    cited,
    compute,
    duplicates,
    find_runs,
    groups,
    in_unit,
    load_run,
    mean_and_std,
    measure,
    number,
    refuse_mixed_streams,
    shown,
)
from .scorers import lower_is_better
from .skill_report import read_report_units, skill_section

__all__ = [
    "RunScores",
    "convention_table",
    "differences_table",
    "find_runs",
    "load_run",
    "matrix_table",
    "plot_comparison",
    "plot_matrix",
    "print_report",
    "summary_table",
    "write_report",
]


def matrix_table(run: RunScores, tablefmt: str = "simple") -> str:
    """The score matrix: one row after each task, one column for each task evaluated; percent, or plain perplexities."""
    tasks, columns = run.tasks, run.eval_tasks
    # Many long names do not fit a terminal side by side: number the columns and put the numbers beside the row names.
    if tablefmt != "github" and not run.joint and sum(map(len, columns)) > 80:
        tasks, columns = [f"{i} {name}" for i, name in enumerate(tasks)], [str(j) for j in range(len(columns))]
    kinds = [run.metrics.get(task, "") for task in run.eval_tasks]
    rows = [] if run.baseline is None else [["base model", *map(shown, kinds, run.baseline)]]
    rows += [[task, *map(shown, kinds, scores)] for task, scores in zip(tasks, run.R, strict=True)]
    return _table(rows, ["after training", *columns], tablefmt)


def perplexity_table(run: RunScores, tablefmt: str = "simple") -> str:
    """The perplexities of texts whose tasks are scored by end tasks, as in `matrix_table`."""
    assert run.perplexity is not None
    rows = [[task, *map(number, values)] for task, values in zip(run.tasks, run.perplexity, strict=True)]
    return _table(rows, ["after training", *run.eval_tasks], tablefmt)


def summary_table(runs: Sequence[RunScores], tablefmt: str = "simple") -> str:
    """Metrics in percent, one row a variant: mean over seeds, with the sample standard deviation if there are several.

    Below the table: runs that are not finished and therefore not in the means, and metrics that could not be computed.
    """
    grouped = groups(runs)
    values: dict[str, list[dict[str, float]]] = {}
    notes: list[str] = []
    for label, members in grouped.items():
        values[label] = []
        for run in members:
            if not run.finished:
                notes.append(f"Not finished, not in the means: {run.title} ({run.progress}), {run.path}")
                continue
            measured, problems = measure(run)
            values[label].append(measured)
            notes += [f"{run.title}: {problem}" for problem in problems]
        seeds = [run.seed for run in members if run.finished]
        notes += [f"{label}: seed {seed} is there {seeds.count(seed)} times" for seed in duplicates(seeds)]
    if len({tuple(run.tasks) for run in runs if run.sequential}) > 1:
        notes += [f"Order of {label}: {' > '.join(members[0].tasks)}" for label, members in grouped.items()]

    columns = [name for name in COLUMNS if any(name in measured for each in values.values() for measured in each)]
    rows = [
        [
            label,
            len(each),
            *(mean_and_std([m[name] for m in each if name in m], _unit(grouped[label])) for name in columns),
        ]
        for label, each in values.items()
    ]
    notes += _units(runs)
    table = _table(rows, ["variant", "seeds", *(COLUMNS[name] for name in columns)], tablefmt)
    if not notes:
        return table
    bullet = "- " if tablefmt == "github" else ""
    return table + "\n\n" + "\n".join(bullet + note for note in notes)


def _variants_table(runs: Sequence[RunScores], tablefmt: str = "github") -> str:
    """Every metric of the registry in percent, mean over seeds: one row a definition, one column a variant."""
    grouped = {
        label: [run for run in members if run.finished and run.sequential] for label, members in groups(runs).items()
    }
    grouped = {label: members for label, members in grouped.items() if members}
    rows = []
    for info in METRICS.values():
        cells = []
        for members in grouped.values():
            try:
                cells.append(in_unit(_unit(members))(statistics.fmean(compute(run, info) for run in members)))
            except InputError:
                cells.append(NO_VALUE)
        rows.append([f"`{info.id}`", *cells, f"`{info.formula}`", info.source])
    return _table(rows, ["metric", *grouped, "formula", "source"], tablefmt)


def convention_table(runs: Sequence[RunScores], convention: str, tablefmt: str = "simple") -> str:
    """The metrics of one convention in percent, under the names it uses: mean over seeds, with the standard deviation.

    Below the table: what could not be computed, and from which scores it would be.

    Raises:
        InputError: if there is no such convention.
    """
    found = find_convention(convention)
    notes: list[str] = []
    columns: dict[str, list[str]] = {}
    for label, members in groups(runs).items():
        counted = [run for run in members if run.finished] if len(runs) > 1 else members
        notes += [
            f"Not finished, not in the means: {run.title} ({run.progress})" for run in members if run not in counted
        ]
        cells, reasons = _values(counted, list(found.metrics.values()))
        columns[label] = [mean_and_std(cells[id], _unit(members)) for id in found.metrics.values()]
        names = {id: name for name, id in found.metrics.items()}
        notes += [f"{label}: no {names[id]}: {reason}" for id, reason in reasons.items()]
    rows = [
        [name, *(cells[i] for cells in columns.values()), METRICS[id].formula, METRICS[id].source]
        for i, (name, id) in enumerate(found.metrics.items())
    ]
    if found.note:
        notes.append(f"Note: {found.note}")
    table = _table(rows, [found.id, *_headers(columns, runs), "formula", "source"], tablefmt, wrap=40)
    bullet = "- " if tablefmt == "github" else ""
    return "\n".join([table, *([""] if notes else []), *(bullet + note for note in notes)])


def differences_table(runs: Sequence[RunScores], tablefmt: str = "simple") -> str:
    """Where the conventions differ on these scores, in percent: one row a definition of a metric.

    Below the table: the metrics that all conventions agree on, and the definitions that lack a score.
    """
    used: dict[str, list[str]] = {}
    for convention in CONVENTIONS.values():
        for name, id in convention.metrics.items():
            used.setdefault(id, []).append(f"{convention.id} {name}")
    grouped = {
        label: [run for run in members if run.sequential and (run.finished or len(runs) == 1)]
        for label, members in groups(runs).items()
    }
    grouped = {label: members for label, members in grouped.items() if members}
    if not grouped:
        return "No run with a row for every task."
    values: dict[str, dict[str, str]] = {id: {} for id in METRICS}
    missing: dict[str, str] = {}
    for label, members in grouped.items():
        cells, reasons = _values(members, list(METRICS))
        for id in METRICS:
            values[id][label] = in_unit(_unit(members))(statistics.fmean(cells[id])) if cells[id] else NO_VALUE
        missing |= {id: reason for id, reason in reasons.items() if id in used and id not in missing}

    rows, notes = [], []
    for family in dict.fromkeys(info.family for info in METRICS.values()):
        known = {
            id: tuple(values[id].values())
            for id in used
            if METRICS[id].family == family and set(values[id].values()) != {NO_VALUE}
        }
        kinds = list(dict.fromkeys(known.values()))
        if len(kinds) == 1 and len(known) > 1:
            notes.append(f"The same here by {len(known)} definitions: {family.replace('_', ' ')}")
        if len(kinds) > 1:
            # The default first, then as in the registry.
            for id in (id for id in METRICS if id in known):
                rows.append([f"{id}", *known[id], METRICS[id].differs or "the default here", ", ".join(used[id])])
    notes += [f"Not computed: {reason} ({', '.join(used[id])})" for id, reason in missing.items()]
    bullet = "- " if tablefmt == "github" else ""
    lines = ["On these scores, no two conventions differ."]
    if rows:
        lines = [_table(rows, ["metric", *_headers(grouped, runs), "difference", "reported as"], tablefmt, wrap=48)]
    return "\n".join([*lines, *([""] if notes else []), *(bullet + note for note in notes)])


def _headers(labels: Iterable[str], runs: Sequence[RunScores]) -> list[str]:
    return [runs[0].unit] if len(runs) == 1 else list(labels)


def _unit(runs: Sequence[RunScores]) -> str:
    return runs[0].unit if runs else "percent"


def _units(runs: Sequence[RunScores]) -> list[str]:
    """What to know of metrics that are not in percent."""
    small = list(dict.fromkeys(run.label for run in runs if run.unit == "nats"))
    if not small:
        return []
    whose = "" if len(small) == len({run.label for run in runs}) else f" of {', '.join(small)}"
    return [f"In nats{whose}: {_NATS}"]


def _values(runs: Sequence[RunScores], ids: Sequence[str]) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Values of each metric over runs, and the reason where a run lacks it."""
    values: dict[str, list[float]] = {id: [] for id in ids}
    reasons: dict[str, str] = {}
    for run in runs:
        for id in ids:
            try:
                values[id].append(compute(run, METRICS[id]))
            except InputError as error:
                reasons[id] = str(error)
    # A mean over some of the seeds would be another number.
    return {id: [] if id in reasons else found for id, found in values.items()}, reasons


def _table(rows: list[list[Any]], headers: list[str], tablefmt: str, wrap: int | None = None) -> str:
    """`wrap`: the widest a column of text may be; not for Markdown, whose rows are lines."""
    text = [header in ("formula", "source", "difference", "reported as") for header in headers]
    align = ["left"] + ["left" if words else "right" for words in text[1:]]
    widths = [wrap if words and tablefmt != "github" else None for words in text] if wrap and rows else None
    return tabulate(
        rows, headers, tablefmt=tablefmt, disable_numparse=True, colalign=align if rows else None, maxcolwidths=widths
    )


# Reports


def write_report(
    path: str | Path,
    out: str | Path | None = None,
    scorer: str | None = None,
    convention: str = "default",
    single_task: str | Path | None = None,
) -> Path:
    """Write `report.md` and its plots for one run or for a folder of runs; returns the path of `report.md`.

    Args:
        path: a run directory, or a folder with run directories up to three levels below.
        out: folder to write to; `path` if left out.
        scorer: score the kept predictions with this one instead.
        convention: also show the metrics of this paper or library, and where conventions differ.
        single_task: a folder with a run of each task alone, for the conventions that compare with them.
    """
    find_convention(convention)
    path = Path(path)
    out = path if out is None else Path(out)
    runs = [load_run(each, scorer) for each in find_runs(path)]
    refuse_mixed_streams(runs)
    if single_task is not None:
        add_single_task(runs, single_task, scorer)
    add_independent(runs)
    single = len(runs) == 1 and runs[0].path == path
    units, attention = read_report_units(runs), read_report_attention(runs)  # before anything is written
    out.mkdir(parents=True, exist_ok=True)

    blocks = [f"# {runs[0].title}" if single else f"# Comparison: {path.resolve().name}"]
    if single:
        run = runs[0]
        plot_matrix(run, out / "matrix.png")
        if not run.finished:
            blocks.append(f"**Not finished**: {run.progress}. The metrics below are over the finished tasks only.")
        blocks += ["## Scores", _matrix_caption(run), matrix_table(run, "github"), "![score matrix](matrix.png)"]
        blocks += _perplexity_blocks(run)
        blocks += ["## Metrics", _run_metrics(run)]
        blocks += _gate_blocks(runs)
    else:
        plot_comparison(runs, out / "comparison.png")
        unit = "Percent; mean" if all(run.unit == "percent" for run in runs) else "Mean"
        caption = f"{unit} over seeds, ± sample standard deviation where there are several."
        blocks += ["## Summary", caption, summary_table(runs, "github"), "![comparison](comparison.png)"]
        if has_bounds(runs):
            blocks += ["## Bounds and controls", bounds_table(runs, "github")]
        blocks += _gate_blocks(runs)
        blocks.append("## Runs")
        for run in runs:
            state = "" if run.finished else f" (not finished: {run.progress})"
            blocks += [f"### {run.title}{state}", f"`{run.path}`", _matrix_caption(run), matrix_table(run, "github")]
            blocks += _perplexity_blocks(run)

    blocks += general_section(runs, single)
    blocks += skill_section(runs, units, out, single) + attention_section(runs, attention, out, single)
    if convention != "default":
        blocks += [f"## Convention: {convention}", convention_table(runs, convention, "github")]
        blocks += ["## Where conventions differ", differences_table(runs, "github")]
    blocks += ["## Formulas", _FORMULAS]
    unit = "Percent, mean" if all(run.unit == "percent" for run in runs) else "Mean"
    blocks += [f"{unit} over the finished runs, by every definition this package knows:", _variants_table(runs)]
    blocks += ["## Predictions", _predictions(runs)]
    streams = _streams(runs)
    if streams:
        blocks += ["## Streams", streams]
    versions = _versions(runs)
    if versions:
        blocks += ["## Versions", versions]

    report = out / "report.md"
    report.write_text("\n\n".join(blocks) + "\n", encoding="utf-8")
    return report


def print_report(
    path: str | Path,
    out: str | Path | None = None,
    scorer: str | None = None,
    convention: str = "default",
    single_task: str | Path | None = None,
) -> None:
    """Write the report and print its tables and its path; of a convention other than the default also its metrics."""
    report = write_report(path, out, scorer, convention, single_task)
    runs = [load_run(each, scorer) for each in find_runs(path)]
    if single_task is not None:
        add_single_task(runs, single_task, scorer)
    add_independent(runs)  # what it could not use is said below the table of bounds
    for run in runs:
        state = "" if run.finished else f" (not finished: {run.progress})"
        print(f"{run.title}{state}: {_scores_of(run)}")
        print(matrix_table(run), end="\n\n")
        if run.perplexity is not None:
            print(_PERPLEXITIES, perplexity_table(run), sep="\n", end="\n\n")
    single = len(runs) == 1 and runs[0].path == Path(path)
    for block in gate_section(runs, "simple"):
        print(block, end="\n\n")
    print(_run_metrics(runs[0], "simple") if single else summary_table(runs), end="\n\n")
    if has_bounds(runs):
        print(bounds_table(runs), end="\n\n")
    if text := general_text(runs, single):
        print(text, end="\n\n")
    if convention != "default":
        print(convention_table(runs, convention), "Where conventions differ:", differences_table(runs), sep="\n\n")
        print()
    print(f"Report: {report}")


def _gate_blocks(runs: Sequence[RunScores]) -> list[str]:
    blocks = gate_section(runs)
    return ["## Forgetting gate", *blocks] if blocks else []


_PERPLEXITIES = "Perplexity of the texts, whose scores above are those of their end tasks (less is better):"
_NATS = (
    "perplexity is better when smaller, and R[i, j] in the formulas is -ln of it, so that BWT below 0 and F above 0 "
    "mean that texts are predicted worse than before; exp(-AP) is the geometric mean of the perplexities."
)
_FORMULAS = """\
`R[i, j]` is the score on task `j` after training task `i`, both from 0; `T` is the number of tasks; `baseline` is the
base model before any task. AP = average performance, BWT = backward transfer (below 0: forgetting), LA = learning
accuracy (each task just after it was learned; framed in the plots), F = forgetting, FWT = forward transfer."""


def _scores_of(run: RunScores) -> str:
    """Which scores a run has, in what they are shown, and where less is better."""
    kinds = sorted(set(run.metrics.values()))
    if not any(map(lower_is_better, kinds)):
        return f"{', '.join(kinds) or 'no scores yet'}, percent"
    return ", ".join(f"{kind} (less is better)" if lower_is_better(kind) else f"{kind}, percent" for kind in kinds)


def _perplexity_blocks(run: RunScores) -> list[str]:
    return [] if run.perplexity is None else [_PERPLEXITIES, perplexity_table(run, "github")]


def _matrix_caption(run: RunScores) -> str:
    if not run.metrics:
        return "No scores yet."
    kinds = {f"{run.metrics[name]}, n = {run.sizes[name]}": name for name in run.metrics}
    if len(kinds) == 1:
        scored = next(iter(kinds))
    else:
        scored = "; ".join(f"{name}: {run.metrics[name]}, n = {run.sizes[name]}" for name in run.metrics)
    small = sorted({metric for metric in run.metrics.values() if lower_is_better(metric)})
    direction = f" Of {', '.join(small)}, which is no percentage, less is better." if small else ""
    of_all = "" if small and not run.mixes else "Percent. "
    counts = [f"{name} {run.outside[name]} of {run.sizes[name]}" for name in run.metrics if run.outside.get(name)]
    outside = f" Evaluation rows answered outside the labels, which are wrong: {', '.join(counts)}." if counts else ""
    what = f"Rows: the task trained last. Columns: the task evaluated ({scored})."
    return f"{of_all}{what}{direction}{outside}{_strays(run)}"


def _strays(run: RunScores) -> str:
    """How many predictions were none of the labels: answers of another task, often, or of no task."""
    told = []
    for task in run.eval_tasks:
        after = run.strays.get(task, {})
        if any(after.values()):
            told.append(f"{task} {', '.join(str(after[i]) for i in sorted(after))} of {run.sizes[task]}")
    return f" Predictions outside the labels, after one task and the next: {'; '.join(told)}." if told else ""


def _run_metrics(run: RunScores, tablefmt: str = "github") -> str:
    """The default metrics of one run in percent, and the metrics that could not be computed."""
    values, problems = measure(run)
    if not values and not problems:
        return "No task is finished yet."
    write = in_unit(run.unit)
    rows = [[f"{name.replace('_', ' ')} ({COLUMNS[name]})", write(value)] for name, value in values.items()]
    bullet = "- " if tablefmt == "github" else ""
    table = _table(rows, ["metric", run.unit], tablefmt)
    notes = [*problems, *_units([run])]
    return "\n".join([table, *([""] if notes else []), *(bullet + note for note in notes)])


def _predictions(runs: Sequence[RunScores]) -> str:
    """Where the raw predictions of each run are: the folders, with the number of files in each."""
    lines = []
    for run in runs:
        files = [
            file
            for file in sorted(run.path.rglob("*.jsonl"))
            if any("prediction" in part for part in file.relative_to(run.path).parts)
            and not _of_another_run(file.relative_to(run.path).parts[0])
        ]
        folders = list(dict.fromkeys(file.parent for file in files))
        places = [f"`{folder}` ({sum(f.parent == folder for f in files)})" for folder in folders]
        lines.append(f"- {run.title}: {', '.join(places) or 'no prediction files'}")
    return "\n".join(lines)


def _of_another_run(folder: str) -> bool:
    return folder in BOUNDS or folder.endswith(PADDED)


def _streams(runs: Sequence[RunScores]) -> str:
    """One line for each stream, as it is cited; names the runs if there are several."""
    sets: dict[str, list[str]] = {}
    for run in runs:
        if run.stream is not None:
            sets.setdefault(cited(run), []).append(run.title)
    if len(sets) == 1:
        return f"`{next(iter(sets))}`"
    return "\n".join(f"- `{name}`: {', '.join(titles)}" for name, titles in sets.items())


def _versions(runs: Sequence[RunScores]) -> str:
    """One line for each set of package versions; names the runs if they differ."""
    sets: dict[str, list[str]] = {}
    for run in runs:
        if run.versions:
            sets.setdefault(", ".join(f"{k} {v}" for k, v in run.versions.items()), []).append(run.title)
    if len(sets) == 1:
        return next(iter(sets))
    return "\n".join(f"- {', '.join(titles)}: {versions}" for versions, titles in sets.items())
