"""The model card of a run: README.md beside the merged model, with what was learnt, what was forgotten, and how.

Written from the run directory alone. Its metadata has the scores as `model-index` results, which the hub shows.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from peft import LoraConfig

from .errors import InputError, did_you_mean
from .general_report import (
    CAPTION,
    GENERAL,
    LM_EVAL,
    LM_EVAL_CAPTION,
    general_table,
    lm_eval_table,
    of_probe,
    read_general_log,
)
from .report import _matrix_caption, _run_metrics, matrix_table
from .run_scores import COLUMNS, RunScores, load_run, measure, tasks_done
from .run_state import RunDirectory

TAGS = ["hf_continual", "continual-learning"]
FILE = "README.md"
TO_FILL_IN = (
    "**To fill in before publishing.** The card says `license: unknown`: choose one that the base model's licence and "
    "those of the data allow."
)


def model_card(
    run_dir: str | Path, task: str | None = None, *, name: str | None = None, pipeline: str = "text-generation"
) -> ModelCard:
    """The card of a run's model.

    Args:
        run_dir: the run directory.
        task: as it was after this task; by default after the last one learnt.
        name: of the model; by default that of the recipe.
        pipeline: what it is for, in the hub's words.

    Raises:
        InputError: if nothing is learnt, or a file of the run cannot be read.
    """
    directory = RunDirectory(run_dir)
    recipe = directory.read_recipe()
    queue = directory.read_queue()
    run = load_run(directory.path)
    if task is None and tasks_done(run) == 0:
        raise InputError(f"run directory {directory.path} has learnt no task yet; run it first")
    if task is not None and task not in run.tasks:
        raise InputError(f"task '{task}' is not one of this run{did_you_mean(task, run.tasks)}")
    last = run.tasks.index(task) if task is not None else tasks_done(run) - 1
    run = _up_to(run, last)
    general = [row for row in read_general_log(directory.path) if row["after_index"] <= last]
    title = name or str(recipe.get("name") or run.label)
    results = _results(run, general, queue, pipeline)
    data = ModelCardData(
        model_name=title,
        base_model=_hub_id(recipe),
        library_name="transformers",
        license="unknown",
        pipeline_tag=pipeline,
        tags=[*TAGS, *dict.fromkeys(method["name"] for method in _methods(recipe) if method["name"] != "naive")],
        eval_results=results or None,
    )
    blocks = [
        f"---\n{data.to_yaml(line_break=chr(10))}\n---",
        f"# {title}",
        _summary(run, recipe, queue),
        TO_FILL_IN,
        "## Training",
        _training(run, recipe, queue),
        "## Scores",
        _matrix_caption(run),
        matrix_table(run, "github"),
        _measured(run),
        *_general(general),
        "## Versions",
        _versions(run, queue),
    ]
    return ModelCard("\n\n".join(block for block in blocks if block) + "\n", ignore_metadata_errors=True)


def write_model_card(run_dir: str | Path, folder: str | Path, task: str | None = None, **options: Any) -> Path:
    """Write the card as `README.md` into `folder`; returns its path."""
    path = Path(folder) / FILE
    path.write_text(str(model_card(run_dir, task, **options)), encoding="utf-8")
    return path


def _up_to(run: RunScores, last: int) -> RunScores:
    """The run as it was after task `last`."""
    if last == len(run.tasks) - 1 and run.finished:
        return run
    own = run.eval_tasks == run.tasks
    kept = slice(0, last + 1)
    return dataclasses.replace(
        run,
        tasks=run.tasks[kept],
        eval_tasks=run.eval_tasks[kept] if own else run.eval_tasks,
        R=run.R[kept, kept] if own else run.R[kept],
        baseline=run.baseline[kept] if own and run.baseline is not None else run.baseline,
        metrics={t: m for t, m in run.metrics.items() if not own or t in run.tasks[kept]},
        perplexity=None,
        cursor=last + 1,
        finished=True,
    )


def _methods(recipe: Mapping[str, Any]) -> list[dict[str, Any]]:
    methods = recipe.get("methods") or []
    return [{"name": method} if isinstance(method, str) else dict(method) for method in methods]


def _base_name(recipe: Mapping[str, Any]) -> str:
    model = recipe.get("model")
    if isinstance(model, Mapping):
        return str(model.get("name") or "a model object")
    return str(model or "a model object")


def _hub_id(recipe: Mapping[str, Any]) -> str | None:
    """The base model, if it looks like an id of the hub; the card's metadata take nothing else."""
    name = _base_name(recipe)
    looks = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None
    return name if looks and not Path(name).exists() else None


def stream_label(run: RunScores, queue: Mapping[str, Any]) -> str:
    """Name and hash of what was learnt; without a named stream a hash over its tasks."""
    stream = queue.get("stream")
    if isinstance(stream, Mapping) and stream.get("name"):
        return f"{stream['name']}@{str(stream.get('hash', ''))[:12]}"
    hashes = [[name, run.train_hashes.get(name), run.eval_hashes.get(name)] for name in run.tasks]
    return f"{len(run.tasks)} tasks@{hashlib.sha256(json.dumps(hashes).encode()).hexdigest()[:12]}"


def _summary(run: RunScores, recipe: Mapping[str, Any], queue: Mapping[str, Any]) -> str:
    base = f"`{_base_name(recipe)}`"
    methods = " + ".join(method["name"] for method in _methods(recipe)) or "no method against forgetting (naive)"
    if run.independent:
        learnt = f"{run.tasks[-1]} alone (the run has a model of its own for each task)"
    else:
        how = "all at once" if run.joint else "one after another"
        learnt = f"{how}: {', '.join(run.eval_tasks if run.joint else run.tasks)}"
    rejected = ", ".join(str(entry["name"]) for entry in queue.get("rejected") or ())
    left_out = f" Left out by the forgetting gate: {rejected}." if rejected else ""
    return f"{base} after learning {learnt}. Trained by hf_continual with {methods}.{left_out}"


def _training(run: RunScores, recipe: Mapping[str, Any], queue: Mapping[str, Any]) -> str:
    rows = {entry["name"]: entry.get("rows") for entry in queue["tasks"]}
    tasks = ", ".join(
        f"{name} ({rows.get(name)} rows, {str(run.train_hashes.get(name, '?'))[:12]})" for name in run.tasks
    )
    settings: dict[str, Any] = {
        "methods": [{k: v for k, v in method.items() if v is not None} for method in _methods(recipe)] or "naive",
        "peft": _changed(recipe.get("peft")) or "full fine-tuning",
        "training": recipe.get("training") or {},
        "data": {k: v for k, v in (recipe.get("data") or {}).items() if v is not None},
    }
    lines = [
        f"- Base model: `{_base_name(recipe)}`",
        f"- Stream: `{stream_label(run, queue)}`",
        f"- Tasks, with a hash of their rows: {tasks}",
        f"- Seed: {run.seed}; task i is trained with seed + i",
    ]
    if run.gate:
        lines.append(f"- Forgetting gate: {json.dumps(run.gate)}")
    text = yaml.safe_dump(json.loads(json.dumps(settings, default=str)), sort_keys=False, allow_unicode=True)
    return "\n".join(lines) + f"\n\n```yaml\n{text}```"


def _changed(peft: Mapping[str, Any] | None) -> dict[str, Any]:
    """Options of an adapter that are not their defaults; a run started from Python has recorded all of them."""
    defaults = {f.name: f.default for f in dataclasses.fields(LoraConfig)}
    own = {k: v for k, v in (peft or {}).items() if v is not None and v != {} and v != defaults.get(k)}
    return {k: v for k, v in own.items() if k not in ("peft_version", "megatron_core")}


def _measured(run: RunScores) -> str:
    values, problems = measure(run)
    if not values and not problems:
        return ""
    formula = "Backward transfer below 0 is forgetting; every definition is in the report of `hf-continual report`."
    return f"{_run_metrics(run)}\n\n{formula}"


def _general(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    if not rows:
        return []
    blocks = ["## General ability"]
    if of_probe(rows, GENERAL):
        blocks += [CAPTION, general_table(rows, "github")]
    if of_probe(rows, LM_EVAL):
        blocks += [LM_EVAL_CAPTION, lm_eval_table(rows, "github")]
    return blocks


def _versions(run: RunScores, queue: Mapping[str, Any]) -> str:
    lines = [f"{name} {version}" for name, version in run.versions.items()]
    if queue.get("git"):
        lines.append(f"commit of hf_continual {queue['git']}")
    if queue.get("recipe_sha256"):
        lines.append(f"recipe {queue['recipe_sha256'][:12]}")
    return ", ".join(lines)


def _results(
    run: RunScores, general: Sequence[Mapping[str, Any]], queue: Mapping[str, Any], pipeline: str
) -> list[EvalResult]:
    """Scores of the model itself, as fractions: those of each task after the last one, and what follows from all."""
    stream = stream_label(run, queue).replace(" ", "-")
    found = []

    def add(dataset: str, kind: str, metric: str, value: float, name: str | None = None, args: Any = None) -> None:
        if math.isfinite(value):
            found.append(
                EvalResult(
                    task_type=pipeline,
                    dataset_type=kind,
                    dataset_name=dataset,
                    metric_type=metric,
                    metric_value=round(float(value), 6),
                    metric_name=name or metric,
                    dataset_args=args or None,
                )  # fmt: skip
            )

    for task, value in zip(run.eval_tasks, run.R[-1], strict=True):
        if not np.isnan(value):
            args = {"hash": run.eval_hashes.get(task), "rows": run.sizes.get(task)}
            add(
                task,
                f"{stream}/{task}",
                run.metrics[task],
                value,
                args={k: v for k, v in args.items() if v is not None},
            )
    # Those of an independent run belong to all of its models, not to this one.
    for name, value in ({} if run.independent else measure(run)[0]).items():
        add(f"all tasks of {stream}", stream, name, value, f"{name.replace('_', ' ')} ({COLUMNS[name]})")
    for row in of_probe(general, GENERAL)[-1:]:
        hashes = dict(row.get("hashes", {}))
        for metric in ("perplexity", "accuracy"):
            add("general text and prompts", "hf_continual/general", metric, row[metric], args=hashes)
    for row in of_probe(general, LM_EVAL)[-1:]:
        for task, scores in row["scores"].items():
            for metric, value in scores.items():
                add(task, f"lm-eval/{task}", metric, value)
    return found
