"""General ability in reports: a table with a row for each task learnt. Reads `general.jsonl`, no model and no torch."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from .errors import InputError
from .run_scores import NO_VALUE, RunScores, groups, mean_and_std, percent

GENERAL, LM_EVAL = "general", "lm_eval"
BASE = "base model"
CAPTION = (
    "Of a text and of prompts that no task teaches. Delta: against the base model, in nats a token; above 0, the text "
    "has become harder to predict."
)
LM_EVAL_CAPTION = "lm-evaluation-harness on the model in memory; in brackets the change against the base model."

Rows = Sequence[Mapping[str, Any]]


def read_general_log(run_dir: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's general.jsonl; none if nothing was measured.

    Raises:
        InputError: for a line that cannot be understood.
    """
    path = Path(run_dir) / "general.jsonl"
    if not path.is_file():
        return []
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            int(row["after_index"])
            known = ("loss", "perplexity", "right", "prompts", "accuracy") if row["probe"] == GENERAL else ("scores",)
            if any(key not in row for key in known):
                raise KeyError(next(key for key in known if key not in row))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path} line {number} is truncated or was edited ({error}); continue the run, which writes it anew"
            ) from None
        rows.append(row)
    return rows


def of_probe(rows: Rows, probe: str) -> list[Mapping[str, Any]]:
    return [row for row in rows if row["probe"] == probe]


def _signed(value: float | None, digits: int = 3) -> str:
    return NO_VALUE if value is None else f"{value:+.{digits}f}"


def number(value: float) -> str:
    """A perplexity: it may be 5 or 50 000."""
    return f"{value:.2f}" if value < 1000 else f"{value:.4g}"


def general_table(rows: Rows, tablefmt: str = "simple") -> str:
    """Perplexity, its change and the prompts answered, before the first task and after each."""
    body = [
        [
            row["after_task"] or BASE,
            number(row["perplexity"]),
            _signed(row.get("delta", {}).get("loss")),
            f"{row['right']}/{row['prompts']}",
        ]
        for row in of_probe(rows, GENERAL)
    ]
    headers = ["after training", "perplexity", "delta", "prompts right"]
    align = ("left", "right", "right", "right")
    return tabulate(body, headers, tablefmt=tablefmt, disable_numparse=True, colalign=align)


def lm_eval_table(rows: Rows, tablefmt: str = "simple") -> str:
    """One row a checkpoint, one column a task and metric of lm-eval."""
    found = of_probe(rows, LM_EVAL)
    columns = list(
        dict.fromkeys((task, metric) for row in found for task in row["scores"] for metric in row["scores"][task])
    )
    body = []
    for row in found:
        cells = []
        for task, metric in columns:
            value, delta = row["scores"].get(task, {}).get(metric), row.get("delta", {}).get(f"{task}_{metric}")
            fraction = value is not None and 0 <= value <= 1
            text = NO_VALUE if value is None else percent(value) if fraction else number(value)
            change = None if delta is None else 100 * delta if fraction else delta
            cells.append(text if change is None else f"{text} ({change:+.1f})")
        body.append([row["after_task"] or BASE, *cells])
    headers = ["after training", *(f"{task} {metric}" for task, metric in columns)]
    align = ("left", *("right" for _ in columns))
    return tabulate(body, headers, tablefmt=tablefmt, disable_numparse=True, colalign=align if body else None)


def kinds_table(rows: Rows, tablefmt: str = "simple") -> str:
    """Prompts right by kind, base model and last measurement."""
    found = of_probe(rows, GENERAL)
    first, last = found[0], found[-1]
    body = [
        [kind, *("{}/{}".format(*row["kinds"].get(kind, (0, 0))) for row in (first, last))] for kind in first["kinds"]
    ]
    headers = ["kind of prompt", *(row["after_task"] or BASE for row in (first, last))]
    return tabulate(body, headers, tablefmt=tablefmt, disable_numparse=True, colalign=("left", "right", "right"))


def general_line(rows: Rows) -> str:
    """Before and after in one line, for a plot; empty if there is nothing to compare."""
    found = of_probe(rows, GENERAL)
    if len(found) < 2 or found[0]["after_task"] is not None:
        return ""
    first, last = found[0], found[-1]
    return (
        f"general ability: perplexity {number(first['perplexity'])} to {number(last['perplexity'])}, prompts right "
        f"{first['right']} to {last['right']} of {last['prompts']}"
    )


def general_section(runs: Sequence[RunScores], single: bool) -> list[str]:
    """The Markdown blocks of the section "General ability"; empty if no run measured it."""
    found = {id(run): rows for run in runs if (rows := read_general_log(run.path))}
    if not found:
        return []
    blocks = ["## General ability"]
    if not single:
        if any(of_probe(rows, GENERAL) for rows in found.values()):
            blocks += [CAPTION, comparison_table(runs, "github")]
        if any(of_probe(rows, LM_EVAL) for rows in found.values()):
            blocks += [LM_EVAL_CAPTION, lm_eval_comparison(runs, "github")]
        return blocks
    rows = found[id(runs[0])]
    if of_probe(rows, GENERAL):
        blocks += [f"{CAPTION} {_hashes(rows)}", general_table(rows, "github"), kinds_table(rows, "github")]
    if of_probe(rows, LM_EVAL):
        blocks += [LM_EVAL_CAPTION, lm_eval_table(rows, "github")]
    return blocks


def _hashes(rows: Rows) -> str:
    hashes = of_probe(rows, GENERAL)[-1].get("hashes", {})
    return f"Text {hashes.get('text', '?')[:12]}, prompts {hashes.get('prompts', '?')[:12]} (sha256)."


def comparison_table(runs: Sequence[RunScores], tablefmt: str = "simple") -> str:
    """One row a variant: before and after its finished runs, mean over seeds."""
    body, notes = [], []
    tests: dict[str, str] = {}
    for label, members in groups(runs).items():
        logs = [read_general_log(run.path) for run in members if run.finished and not run.independent]
        general = [of_probe(rows, GENERAL) for rows in logs]
        general = [rows for rows in general if len(rows) > 1 and rows[0]["after_task"] is None]
        if not general:
            continue
        hashes = {json.dumps(rows[-1].get("hashes"), sort_keys=True) for rows in general}
        tests |= dict.fromkeys(hashes, label)
        before, after = [rows[0] for rows in general], [rows[-1] for rows in general]
        deltas = [row["delta"]["loss"] for row in after]
        body.append(
            [
                label,
                len(general),
                number(statistics.fmean(row["perplexity"] for row in before)),
                number(statistics.fmean(row["perplexity"] for row in after)),
                _signed(statistics.fmean(deltas)) + (f" ± {statistics.stdev(deltas):.3f}" if len(deltas) > 1 else ""),
                mean_and_std([row["accuracy"] for row in before]),
                mean_and_std([row["accuracy"] for row in after]),
            ]
        )
    if len(tests) > 1:
        notes.append("The runs were measured with different texts or prompts; their numbers do not compare.")
    headers = ["variant", "seeds", "perplexity before", "after", "delta", "prompts right, % before", "after"]
    align = ("left", *("right" for _ in headers[1:]))
    table = tabulate(body, headers, tablefmt=tablefmt, disable_numparse=True, colalign=align if body else None)
    return "\n\n".join([table, *notes])


def lm_eval_comparison(runs: Sequence[RunScores], tablefmt: str = "simple") -> str:
    """One row a variant, one column a task and metric of lm-eval: before and after its finished runs, mean over seeds.

    Independent runs have no model that has learnt all tasks, so they are left out here and in `comparison_table`.
    """
    found: dict[str, list[tuple[dict[tuple[str, str], float], dict[tuple[str, str], float]]]] = {}
    tests = set()
    for label, members in groups(runs).items():
        for run in members:
            rows = of_probe(read_general_log(run.path), LM_EVAL) if run.finished and not run.independent else []
            if len(rows) > 1 and rows[0]["after_task"] is None:
                before, after = (
                    {(task, name): value for task, of in row["scores"].items() for name, value in of.items()}
                    for row in (rows[0], rows[-1])
                )
                found.setdefault(label, []).append((before, after))
                tests.add(json.dumps([rows[-1].get("hashes"), rows[-1].get("samples")], sort_keys=True))
    columns = list(dict.fromkeys(key for pairs in found.values() for _, after in pairs for key in after))
    body = []
    for label, pairs in found.items():
        cells: list[Any] = [label, len(pairs)]
        for key in columns:
            both = [(before[key], after[key]) for before, after in pairs if key in before and key in after]
            if not both:
                cells.append(NO_VALUE)
                continue
            old, new = (statistics.fmean(values) for values in zip(*both, strict=True))
            fraction = all(0 <= value <= 1 for values in both for value in values)
            write = percent if fraction else number
            cells.append(f"{write(old)} -> {write(new)} ({(100 if fraction else 1) * (new - old):+.1f})")
        body.append(cells)
    headers = ["variant", "seeds", *(f"{task} {metric}" for task, metric in columns)]
    align = ("left", *("right" for _ in headers[1:]))
    table = tabulate(body, headers, tablefmt=tablefmt, disable_numparse=True, colalign=align if body else None)
    notes = (
        ["The runs were measured with different tasks or rows; their numbers do not compare."] if len(tests) > 1 else []
    )
    return "\n\n".join([table, *notes])


def general_text(runs: Sequence[RunScores], single: bool) -> str:
    """The tables for the terminal; empty if no run measured it."""
    logs = [rows for run in runs if (rows := read_general_log(run.path))]
    if not logs:
        return ""
    parts = []
    if not single:
        if any(of_probe(rows, GENERAL) for rows in logs):
            parts.append(f"general ability\n{comparison_table(runs)}")
        if any(of_probe(rows, LM_EVAL) for rows in logs):
            parts.append(f"lm-eval, before -> after (in brackets: the change)\n{lm_eval_comparison(runs)}")
        return "\n\n".join(parts)
    rows = logs[0]
    if of_probe(rows, GENERAL):
        parts.append(f"general ability (delta: nats a token against the base model)\n{general_table(rows)}")
    if of_probe(rows, LM_EVAL):
        parts.append(f"lm-eval (in brackets: change against the base model)\n{lm_eval_table(rows)}")
    return "\n\n".join(parts)
