"""DeepSpeed's configuration against the training arguments: what would silently win over them, or be ignored."""

from __future__ import annotations

import difflib
import importlib.util
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import InputError

__all__ = ["agree", "check_config", "check_optimizer", "mismatches_as_input_errors", "need_deepspeed", "read_config"]

WHERE = "DeepSpeed's config: "
SECTIONS = (
    "activation_checkpointing", "aio", "amp", "bf16", "comms_logger", "communication_data_type", "data_types",
    "dump_state", "flops_profiler", "fp16", "gradient_accumulation_steps", "gradient_clipping",
    "gradient_predivide_factor", "optimizer", "prescale_gradients", "scheduler", "sparse_gradients", "steps_per_print",
    "tensorboard", "train_batch_size", "train_micro_batch_size_per_gpu", "wall_clock_breakdown", "wandb",
    "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "zero_optimization",
)  # fmt: skip
"""Keys that a typing error may have meant; DeepSpeed ignores those it does not know."""


def need_deepspeed(asked: str) -> None:
    """Raise InputError naming the extra where DeepSpeed is asked for and missing."""
    if importlib.util.find_spec("deepspeed") is None:
        raise InputError(f"{asked}: DeepSpeed is not installed; run `pip install 'hf-continual[deepspeed]'`")


def read_config(source: Any, base_dir: Path | None) -> dict[str, Any]:
    """A mapping, or the JSON file at a path, which may be relative to `base_dir`.

    Raises:
        InputError: if it cannot be read.
    """
    if isinstance(source, Mapping):
        return dict(source)
    path = Path(str(source))
    if base_dir is not None and not path.is_file() and (base_dir / path).is_file():
        path = base_dir / path
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"DeepSpeed config {source}: it cannot be read ({error}); give a JSON file") from error
    if not isinstance(config, dict):
        raise InputError(f"DeepSpeed config {source}: it is no mapping; see DeepSpeed's configuration JSON")
    return config


def check_config(config: Mapping[str, Any], training: Mapping[str, Any], processes: int | None = None) -> None:
    """Refuse what differs from the training arguments.

    Args:
        config: as it was written, with "auto" where the Trainer fills in.
        training: arguments by name.
        processes: how many there are, if it is known.

    Raises:
        InputError: naming the first difference.
    """
    for key in config:
        near = difflib.get_close_matches(str(key), SECTIONS, n=1, cutoff=0.85)
        if near and key not in SECTIONS:
            raise InputError(f"{WHERE}DeepSpeed ignores the key {key!r}; did you mean {near[0]!r}?")
    check_optimizer(config, training)
    if training["max_grad_norm"] and config.get("gradient_clipping") is None:
        raise InputError(
            f"{WHERE}gradient_clipping is missing, so DeepSpeed would not clip, against training.max_grad_norm="
            f'{training["max_grad_norm"]}; set it to "auto"'
        )
    for theirs, ours in (
        ("gradient_clipping", "max_grad_norm"),
        ("gradient_accumulation_steps", "gradient_accumulation_steps"),
        ("train_micro_batch_size_per_gpu", "per_device_train_batch_size"),
    ):
        if config.get(theirs) is not None:
            agree(config[theirs], training[ours], WHERE + theirs, ours)
    rows = config.get("train_batch_size")
    if rows not in (None, "auto") and processes is not None:
        own = int(training["per_device_train_batch_size"]), int(training["gradient_accumulation_steps"])
        if rows != own[0] * own[1] * processes:
            raise InputError(
                f"{WHERE}train_batch_size={rows} against {own[0]} x {own[1]} x {processes} "
                '(training.per_device_train_batch_size, gradient_accumulation_steps, processes); set it to "auto"'
            )
    for kind in ("bf16", "fp16"):
        enabled = (config.get(kind) or {}).get("enabled", "auto")
        if enabled != "auto" and bool(enabled) != bool(training[kind]):
            raise InputError(
                f'{WHERE}{kind}.enabled={enabled} against training.{kind}={training[kind]}; set the first to "auto"'
            )


def check_optimizer(config: Mapping[str, Any], training: Mapping[str, Any]) -> None:
    """Refuse an optimizer of DeepSpeed's that is not the one of the training arguments, which it would replace.

    Raises:
        InputError: naming the difference.
    """
    optimizer = config.get("optimizer")
    if not optimizer:
        return
    kind = str(optimizer.get("type", ""))
    ours = str(getattr(training["optim"], "value", training["optim"]))
    if kind.lower() != "adamw" or not ours.startswith("adamw_torch"):
        raise InputError(
            f"{WHERE}optimizer.type={kind!r} against training.optim={ours!r}, which DeepSpeed would not use; remove "
            "`optimizer` from DeepSpeed's config"
        )
    options = optimizer.get("params") or {}
    for theirs, option in (("lr", "learning_rate"), ("eps", "adam_epsilon"), ("weight_decay", "weight_decay")):
        if theirs in options:
            agree(options[theirs], training[option], f"{WHERE}optimizer.params.{theirs}", option)


def agree(theirs: Any, ours: Any, name: str, option: str) -> None:
    """Raise InputError if a value is neither "auto" nor that of the training argument."""
    if theirs == "auto":
        return
    try:
        same = float(theirs) == float(ours)
    except (TypeError, ValueError):
        same = False
    if not same:
        raise InputError(f'{name}={theirs} against training.{option}={ours}; set the first to "auto" or to that value')


@contextmanager
def mismatches_as_input_errors() -> Iterator[None]:
    """Transformers lists all values of DeepSpeed's config that differ from the arguments, in a paragraph."""
    try:
        yield
    except ValueError as error:
        lines = str(error).splitlines()
        if isinstance(error, InputError) or "correct the following DeepSpeed config values" not in lines[0]:
            raise
        found = "; ".join(line.removeprefix("- ") for line in lines if line.startswith("- "))
        raise InputError(f'{WHERE}{found} (hf: the training arguments); set these values to "auto"') from error
