"""Whether a run directory may go on: under this stream and recipe, and with this number of processes.

Scores of one matrix compare only if every task is learnt and scored as the run was started. What only decides whether
to go on, as the forgetting gate, may change.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .data import content_hash
from .errors import InputError
from .evaluation import EvaluationConfig
from .methods.base import ContinualMethod
from .provenance import first_difference, plain, plain_peft
from .tasks import Task

if TYPE_CHECKING:
    from .task_queue import TaskQueue

__all__ = ["BATCHES", "check_other_processes", "check_same_stream", "evaluation_of", "rows_of_a_step"]

BATCHES = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
"""Training arguments, with the Trainer's defaults, that may change with the number of processes."""


def evaluation_of(task: Task, evaluation: EvaluationConfig) -> dict[str, Any]:
    """What a task is scored on; it must stay the same for the scores of one matrix to be comparable."""
    labels = list(task.labels) if task.labels is not None else None
    scorer = task.scorer or evaluation.scorer
    own: dict[str, Any] = {
        "task": task.name, "hash": content_hash(task.eval_dataset), "scorer": scorer, "labels": labels
    }  # fmt: skip
    if task.kind != "completion":
        own["kind"] = task.kind
    if task.end_task is not None:
        end = task.end_task
        own["end_task"] = {
            **evaluation_of(end, evaluation),
            "rows": content_hash(end.train_dataset),
            "training": plain(dict(end.training)),
            "seeds": list(end.seeds),
            "peft": plain_peft(end.peft),
        }
    return own


def check_same_stream(queue: TaskQueue, stored: Mapping[str, Any]) -> None:
    """Refuse a queue whose stream, methods or recipe differ from those that a run directory was started with.

    Args:
        stored: the directory's queue.json.

    Raises:
        InputError: naming the first difference.
    """
    directory = queue.directory
    where = f"run directory {directory.path}"
    mine = queue.learnt_tasks
    for i, entry in enumerate(stored["tasks"]):
        if i >= len(mine):
            if queue._recipe is None and stored["cursor"] > len(mine):
                break  # a script that calls `add` later is being run again
            raise InputError(
                f"{where} also has the task '{entry['name']}', which this stream lacks; give the whole stream, or use "
                "another run directory"
            )
        if entry["name"] != mine[i].name:
            raise InputError(
                f"{where} belongs to another recipe: its task {i} is '{entry['name']}' and not '{mine[i].name}'; use "
                "another run directory"
            )
        if entry["hash"] != content_hash(mine[i].train_dataset):
            raise InputError(
                f"{where} belongs to another recipe: the training rows of task '{mine[i].name}' differ from those it "
                "was started with; use another run directory"
            )
    for entry, task in zip(stored.get("evaluation", ()), queue.stream, strict=False):
        compared = {"hash": "evaluation rows", "scorer": "scorer", "labels": "labels", "kind": "kind",
                    "end_task": "end task"}  # fmt: skip
        for key, what in compared.items():
            if entry.get(key) != evaluation_of(task, queue._evaluation).get(key):
                raise InputError(
                    f"{where} belongs to another recipe: the {what} of task '{task.name}' differ from those it was "
                    "started with, and scores of both would not compare; use another run directory"
                )
    names = [method.name for method in queue._new_methods()]
    if stored.get("method_names") != names or stored.get("seed") != queue.seed:
        raise InputError(
            f"{where} belongs to another recipe: methods {stored.get('method_names')} with seed {stored.get('seed')} "
            f"and not {names} with seed {queue.seed}; use another run directory"
        )
    if stored.get("recipe_sha256") not in (None, directory.recipe_checksum()):
        raise InputError(
            f"{directory.path / 'recipe.yaml'} was edited after the run was started; undo the change, or run the "
            "changed recipe in another run directory"
        )
    # What the gate allows may change at any time: it decides whether to go on, not how a task is learnt.
    old, new = (
        {key: value for key, value in recipe.items() if key != "gate"}
        for recipe in (directory.read_recipe(), plain(queue._description()))
    )
    if stored.get("world_size", 1) != queue.processes.world_size:  # `check_other_processes` looks at these
        old, new = _without_batches(old), _without_batches(new)
    difference = first_difference(old, new)
    if difference:
        key, there, here = difference
        raise InputError(
            f"{where} belongs to another recipe: {key} is {there!r} there and {here!r} here; use the same recipe, or "
            "another run directory"
        )


def _without_batches(recipe: Mapping[str, Any]) -> dict[str, Any]:
    training = recipe.get("training")
    if not isinstance(training, Mapping):
        return dict(recipe)
    return {**recipe, "training": {key: value for key, value in training.items() if key not in BATCHES}}


def rows_of_a_step(queue: TaskQueue, task: Task) -> dict[str, int]:
    """Of what the rows of one optimizer step are made: processes, rows in each, micro-batches."""
    batch, accumulation = (int(queue._option(task, name, default)) for name, default in BATCHES.items())
    return {"processes": queue.processes.world_size, "batch": batch, "accumulation": accumulation}


def check_other_processes(queue: TaskQueue, stored: Mapping[str, Any]) -> None:
    """Refuse, between two tasks, another number of processes under which a step would see other rows.

    Args:
        stored: the directory's queue.json.

    Raises:
        InputError: naming the task, and why its steps would differ.
    """
    for i, task in enumerate(queue.learnt_tasks):
        if queue.directory.is_learnt(task):
            continue
        now = rows_of_a_step(queue, task)
        entry = stored["tasks"][i] if i < len(stored["tasks"]) else {}
        old = entry.get("step") or {**now, "processes": stored.get("world_size", 1)}
        if old["processes"] == now["processes"]:
            continue
        of_old, of_now = (math.prod(step.values()) for step in (old, now))
        began = (
            f"run directory {queue.directory.path} was begun with {old['processes']} process(es) and would go on "
            f"with {now['processes']} process(es)"
        )
        as_before = f"go on with {old['processes']} process(es)"
        if of_old != of_now:
            raise InputError(
                f"{began}, which makes the {of_old} rows of an optimizer step {of_now} in task '{task.name}'; set "
                f"training.per_device_train_batch_size={now['batch']} and "
                f"training.gradient_accumulation_steps={now['accumulation']} so that their product times the "
                f"processes is {of_old} again, or {as_before}"
            )
        why = _other_rows(queue, task, [step["processes"] * step["batch"] for step in (old, now)])
        if why is not None:
            raise InputError(f"{began}, where some steps would see other rows: {why}; {as_before}")


def _other_rows(queue: TaskQueue, task: Task, at_once: list[int]) -> str | None:
    """Why steps of as many rows would be made of others; `at_once`: what all processes take together, then and now."""
    config = queue._option(task, "accelerator_config")
    split = config.get("split_batches") if isinstance(config, Mapping) else getattr(config, "split_batches", 0)
    order = str(queue._option(task, "train_sampling_strategy", "random"))
    own_rows = [
        method.name
        for method in queue._new_methods()
        if any(
            getattr(type(method), hook) is not getattr(ContinualMethod, hook)
            for hook in ("train_dataset", "training_phase")
        )
    ]
    if task.is_text:
        return "the texts are cut into rows, whose number may be no multiple of those that the processes take"
    if own_rows:
        return f"method '{own_rows[0]}' spreads its stored rows over the processes"
    if order not in ("random", "sequential"):
        return f"training.train_sampling_strategy='{order}' groups the rows by process"
    if split or isinstance(config, str):
        return f"training.accelerator_config={config} splits batches between the processes"
    if any(len(task.train_dataset) % rows for rows in at_once):
        return (
            f"the {len(task.train_dataset)} rows of task '{task.name}' are no multiple of "
            f"{' and '.join(map(str, at_once))}, the rows that the processes take at once"
        )
    return None
