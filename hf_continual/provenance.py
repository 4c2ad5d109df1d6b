"""Where a run came from: versions, commit, and what must stay the same for a run to be continued."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import accelerate
import datasets
import peft
import torch
import transformers
from torch import nn
from transformers import TrainingArguments

# Keys of a recipe that do not change what is learnt. Tasks are compared by the rows they resolve to.
HARMLESS = {
    "name",
    "run_dir",
    "base_dir",
    "tasks",
    "variants",
    "seeds",
    *(f"training.{key}" for key in ("disable_tqdm", "report_to", "run_name")),
    *(f"training.{key}" for key in ("save_steps", "save_strategy", "save_total_limit")),
}


# Options that are younger than some run directories, with what was done before them.
YOUNGER = {
    "model.load_in_4bit": False,
    "model.bnb_4bit_quant_type": "nf4",
    "model.bnb_4bit_use_double_quant": True,
    "data.pack": True,
    "data.drop_last_block": True,
    "data.mlm_probability": 0.15,
    "evaluation.temperature": 0.0,
    "evaluation.top_p": 1.0,
    "evaluation.seed": 0,
    "independent": False,
    "methods.*.source": "past",
}


def versions() -> dict[str, str]:
    """Versions of everything that takes part in training."""
    from . import __version__

    modules: dict[str, Any] = {
        "torch": torch,
        "transformers": transformers,
        "peft": peft,
        "accelerate": accelerate,
        "datasets": datasets,
    }
    found = {name: str(module.__version__) for name, module in modules.items()}
    return {"hf_continual": __version__, "python": platform.python_version(), **found}


def git_commit() -> str | None:
    """The commit of this package's checkout, if it is one."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def plain(value: Any) -> Any:
    """`value` as JSON would give it back."""
    return json.loads(json.dumps(value, default=lambda v: sorted(v) if isinstance(v, (set, frozenset)) else str(v)))


def plain_peft(config: Any) -> Any:
    if config is None:
        return None
    return plain(dict(config) if isinstance(config, Mapping) else config.to_dict())


def changed_arguments(args: TrainingArguments) -> dict[str, Any]:
    """The training arguments that differ from their defaults."""
    reference = type(args)(output_dir="")
    names = [f.name for f in dataclasses.fields(args) if f.init and f.name not in ("output_dir", "methods")]
    return {n: getattr(args, n) for n in names if getattr(args, n) != getattr(reference, n)}


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """A short hash of a model's parameters: names, shapes and the first values of each."""
    digest = hashlib.sha256(type(model).__name__.encode())
    for name, parameter in model.named_parameters():
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(parameter.flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def first_difference(old: Any, new: Any, key: str = "") -> tuple[str, Any, Any] | None:
    """The first differing key of two recipes, other than those that do not change what is learnt."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in [*old, *(n for n in new if n not in old)]:
            path = f"{key}.{name}" if key else name
            if path in HARMLESS or path.startswith("training.logging"):
                continue
            before = YOUNGER.get(re.sub(r"\.\d+\.", ".*.", path))
            found = first_difference(old.get(name, before), new.get(name, before), path)
            if found:
                return found
        return None
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = (first_difference(a, b, f"{key}.{i}") for i, (a, b) in enumerate(zip(old, new, strict=True)))
        return next((found for found in pairs if found), None)
    return None if old == new else (key, old, new)
