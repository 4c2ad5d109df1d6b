"""`hf-continual estimate`: the memory of each run of a recipe, and whether it fits."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from . import recipes
from .errors import InputError
from .launch import find_config
from .memory_estimate import GIB, PARTS, RESERVE, MemoryEstimate, estimate, parse_size
from .models import ModelConfig, load_model, load_tokenizer, positions_of, quiet
from .streams import find_stream
from .task_queue import DataConfig
from .tokenization import default_block_size

SHORTEST = 4
"""Tokens of the shortest answer that `data.max_completion_length` allows."""


def estimate_command(
    recipe: str | Path,
    overrides: Mapping[str, Any],
    gpus: int,
    gpu_memory: str,
    only: str | None = None,
    accelerate_config: str | None = None,
) -> int:
    """Print the memory of each run of a recipe, seeds left out, and whether it fits. Returns 0.

    Args:
        recipe: a path, or the name of a recipe of the package.
        overrides: as for `run`, dotted.
        gpus: how many train together.
        gpu_memory: of one of them, such as `80GB`.
        only: comma-separated variants.
        accelerate_config: preset or file that the run would be launched with.

    Raises:
        InputError: as `estimate`, for a size that is none, and for a variant that there is not.
    """
    quiet()
    available = parse_size(gpu_memory)
    path = recipes.find_recipe(str(recipe))
    runs = recipes.expand(recipes.load_recipe(path), path.parent.resolve(), overrides)
    if only:
        wanted = recipes.variants_named(only, runs)
        runs = [run for run in runs if str(run.variant) in wanted]
    kinds: dict[str, Any] = {}
    for run in runs:
        key = json.dumps([run.variant, {k: v for k, v in run.recipe.items() if k != "seed"}], default=str)
        kinds.setdefault(key, run)
    found: list[tuple[str, MemoryEstimate]] = []
    for run in kinds.values():
        of_tasks = _kinds_of_tasks(run.recipe["tasks"], run.base_dir)
        alone = run.recipe["joint"] or run.recipe["independent"]
        methods = [] if run.recipe["joint"] else run.recipe["methods"]
        model, data = ModelConfig(**run.recipe["model"]), DataConfig(**run.recipe["data"])
        masked = "mlm" in of_tasks
        one = estimate(
            model,
            peft=run.recipe["peft"],
            training=_launched(_with_absolute_engine(run.recipe["training"], run.base_dir), accelerate_config),
            methods=methods,
            data=_longest_row(model, data, of_tasks, masked),
            gpus=gpus,
            tasks=1 if alone else len(of_tasks),
            masked=masked,
        )
        found.append((run.variant or "+".join(m["name"] for m in methods) or "naive", one))
    print(_table(found, available, gpus, gpu_memory))  # noqa: T201 - the command's answer
    return 0


def _kinds_of_tasks(tasks: Any, base_dir: Path) -> list[str]:
    """The kind of each task."""
    if isinstance(tasks, list):
        return [task.get("kind") or "completion" for task in tasks]
    stream = find_stream(tasks["stream"], base_dir)
    return [stream.tasks[name].get("kind", "completion") for name in tasks.get("order") or stream.tasks]


def _longest_row(model: ModelConfig, data: DataConfig, of_tasks: Sequence[str], masked: bool) -> DataConfig:
    """`data`, with prompts as long as a row of text where there are tasks of text."""
    if set(of_tasks) <= {"completion"}:
        return data
    size = data.block_size
    if size is None:
        positions = positions_of(load_model(dataclasses.replace(model, load_in_4bit=False), empty=True, masked=masked))
        size = default_block_size(load_tokenizer(model), positions)
    whole = data.max_prompt_length + data.max_completion_length if "completion" in of_tasks else 0
    if whole >= size:
        return data
    return dataclasses.replace(data, max_prompt_length=size - SHORTEST, max_completion_length=SHORTEST)


def _with_absolute_engine(training: Mapping[str, Any], base_dir: Path) -> dict[str, Any]:
    engine = training.get("deepspeed")
    if isinstance(engine, str) and not Path(engine).is_file() and (base_dir / engine).is_file():
        return {**training, "deepspeed": str(base_dir / engine)}
    return dict(training)


def _launched(training: dict[str, Any], accelerate_config: str | None) -> dict[str, Any]:
    """The training arguments, with what a configuration of `accelerate launch` adds about sharding."""
    if accelerate_config is None:
        return training
    path = find_config(accelerate_config)
    config = recipes.parse_yaml(recipes.read_text(path, "accelerate configuration"), str(path))
    if not isinstance(config, Mapping):
        raise InputError(f"--accelerate_config {accelerate_config}: it holds no mapping; give a preset or a YAML file")
    kind = config.get("distributed_type")
    if kind == "FSDP":
        return {**training, "fsdp": True}
    if kind != "DEEPSPEED":
        return training
    engine = config.get("deepspeed_config") or {}
    if engine.get("deepspeed_config_file"):
        return {**training, "deepspeed": engine["deepspeed_config_file"]}
    zero: dict[str, Any] = {"stage": engine.get("zero_stage", 2)}
    for what in ("optimizer", "param"):
        zero[f"offload_{what}"] = {"device": engine.get(f"offload_{what}_device", "none")}
    return {**training, "deepspeed": {"zero_optimization": zero}}


def _table(found: Sequence[tuple[str, MemoryEstimate]], available: int, gpus: int, gpu_memory: str) -> str:
    most = max(one.total for _, one in found)
    unit, size = ("GB", 1e9) if most >= 1e9 else ("MB", 1e6)
    rows = []
    for name, one in found:
        parts = [f"{getattr(one, part) / size:.2f}" for part in PARTS]
        fits = "yes" if one.fits(available) else "no"
        rows.append([name, one.backend, *parts, f"{one.total / size:.2f}", fits, one.moment])
    header = ["run", "backend", *[part.replace("_", " ") for part in PARTS], "total", f"fits {gpu_memory}", "most at"]
    lines = [f"{unit} on each of {gpus} GPU(s), rows of the greatest length, last task"]
    lines.append(
        tabulate(rows, header, disable_numparse=True, colalign=["left", "left", *["right"] * 8, "left", "left"])
    )
    counts = ", ".join(sorted({f"{one.trainable:,} of {one.parameters:,}" for _, one in found}))
    lines.append(f"parameters that learn: {counts}")
    lines += sorted({f"note: {note}" for _, one in found for note in one.notes})
    lines.append(
        f"reserve: {RESERVE / GIB:.0f} GiB for CUDA and its libraries; evaluation and fragmentation not counted"
    )
    return "\n".join(lines)
