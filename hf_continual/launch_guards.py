"""What would train the wrong thing without an error, refused when a training starts: launchers, DeepSpeed and FSDP."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from .deepspeed_config import check_optimizer
from .distributed import DEEPSPEED_SWITCH, Distributed, given_by_launcher
from .errors import InputError

__all__ = ["check_launch", "check_tied"]


def check_launch(args: Any, distributed: Distributed) -> None:
    """Refuse what would train the wrong thing without an error.

    Raises:
        InputError: if the processes that were started, or DeepSpeed or FSDP that was asked for, are not what trains.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != distributed.world_size:
        raise InputError(
            f"WORLD_SIZE={launched} processes were started and each of them trains alone (it sees "
            f"{distributed.world_size}); on machines without GPUs set use_cpu=True in the training arguments"
        )
    if launched == 1:
        asked = _processes_of_launcher()
        if asked is not None and asked > 1:
            raise InputError(
                f"`accelerate launch` was asked for num_processes={asked} and started one; without GPUs give it "
                "--multi_gpu (distributed_type: MULTI_GPU), which works there too, instead of --cpu or MULTI_CPU"
            )
    if getattr(args, "deepspeed", None) and not distributed.backend.startswith("zero"):
        raise InputError(
            f"training.deepspeed is given and the backend is '{distributed.backend}'; unset ACCELERATE_USE_CPU (which "
            "`accelerate launch --cpu` sets) and use use_cpu=True, and make the training arguments before the Trainer"
        )
    if distributed.backend.startswith("zero") and distributed.accelerator is not None:
        check_optimizer(distributed.accelerator.state.deepspeed_plugin.deepspeed_config, vars(args))
    if getattr(args, "fsdp", None) and not distributed.backend.startswith("fsdp"):
        raise InputError(
            f"training.fsdp={args.fsdp!r} is given and the backend is '{distributed.backend}': accelerate turns FSDP "
            "on only for several accelerators; use fewer options or another backend (ddp, zero2) on this machine"
        )
    if distributed.backend == "fsdp1":
        raise InputError(
            "FSDP1 is not supported, since its flat parameters have no rows; use fsdp_config: {version: 2}"
        )
    left_over = distributed.backend.startswith("zero") and not getattr(args, "deepspeed", None)
    if left_over and not given_by_launcher():
        raise InputError(
            "DeepSpeed is still on from an earlier Trainer of this process, through the environment variable "
            f"{DEEPSPEED_SWITCH}; call hf_continual.distributed.release_engine(trainer) on that one when it is done"
        )


def check_tied(model: Any, backend: str) -> None:
    """Refuse weights that FSDP2 finds twice: accelerate (1.15) keeps the input and output embedding together alone.

    Raises:
        InputError: naming the weight and the modules that share it, such as those of T5's `shared`.
    """
    if backend != "fsdp2":
        return
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for own, p in module.named_parameters(recurse=False):
            owners.setdefault(id(p), []).append(f"{name}.{own}")
    ends = [getattr(model, f"get_{which}_embeddings", lambda: None)() for which in ("input", "output")]
    together = {id(p) for end in ends if end is not None for p in end.parameters()}
    for key, names in owners.items():
        if len(names) > (2 if key in together else 1):
            raise InputError(
                f"backend 'fsdp2': {' and '.join(names)} are one weight, which FSDP2 cannot put into one group; run "
                "this model on ddp, zero1, zero2 or zero3"
            )


def _processes_of_launcher() -> int | None:
    """How many processes the `accelerate launch` that started this one was asked for; None if there is none."""
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return None
    if not any("accelerate" in word for word in words[:3]) or "launch" not in " ".join(words[:4]):
        return None
    return _processes_asked_for(words)


def _processes_asked_for(words: Sequence[str]) -> int | None:
    """`num_processes` on a command line of `accelerate launch`, or in the configuration it reads."""
    given: dict[str, str] = {}
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, _, value = word.partition("=")
        given.setdefault(name.replace("-", "_"), value or following)
    asked: Any = given.get("__num_processes")
    if asked is None:
        from accelerate.commands.config.config_args import default_config_file

        file = Path(given.get("__config_file", default_config_file))
        if not file.is_file():
            return None
        asked = (yaml.safe_load(file.read_text(encoding="utf-8")) or {}).get("num_processes")
    return int(asked) if str(asked).isdigit() else None
