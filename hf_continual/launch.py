"""Starting a recipe in several processes: presets of `accelerate launch`, its flags, and how a run's end comes back.

`hf-continual run RECIPE --accelerate_config zero2` starts `accelerate launch`, which starts the workers, each of which
is `hf-continual run RECIPE` again. A worker that ends with a sentence leaves it in a folder named by `STATUS`; the
command that started them prints it once and ends with its exit code, which torchrun would turn into 1.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import importlib.resources
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import TrainingArguments

from .deepspeed_config import agree, check_config, need_deepspeed, read_config
from .errors import InputError, did_you_mean
from .recipes import SECTIONS, apply_overrides
from .recipes import _overlay as overlaid
from .stopping import end_with_parent

STATUS = "HF_CONTINUAL_LAUNCH_STATUS"
"""Environment variable: the folder in which each worker leaves its process id and how it ended."""
OURS = ("config_file", "module", "no_python", "training_script", "training_script_args", "help")
"""Flags of `accelerate launch` that this package fills in itself."""
RUN_OPTIONS = (
    "accelerate_config",
    "isolate_tasks",
    "only",
    "dry_run",
    "with_bounds",
    "with_padded_control",
    "max_forgetting",
    "on_violation",
)
"""Options of `hf-continual run`, which a typing error may have meant."""
NODE_FLAGS = ("num_machines", "machine_rank", "main_process_ip", "main_process_port", "num_processes")
PATIENCE = 5.0
"""Seconds a worker that ends early waits for the others of its machine to end as well."""


# -- presets and flags -----------------------------------------------------------------------------------------------


def presets() -> dict[str, Path]:
    """The accelerate configurations that this package brings, by name."""
    try:
        root = Path(str(importlib.resources.files("hf_continual.recipe_files")))
    except ModuleNotFoundError:  # a checkout that is not installed
        root = Path(__file__).parent.parent / "recipes"
    return {path.stem: path for path in sorted((root / "accelerate_configs").glob("*.yaml"))}


def find_config(name: str) -> Path:
    """A preset's name or the path of an accelerate configuration.

    Raises:
        InputError: if there is neither, or accelerate cannot read it.
    """
    path = Path(name) if Path(name).is_file() else presets().get(name)
    if path is None:
        raise InputError(
            f"--accelerate_config {name}: there is no such file, and no such preset{did_you_mean(name, presets())}"
        )
    from accelerate.commands.config.config_args import load_config_from_file

    try:
        load_config_from_file(str(path))
    except (ValueError, TypeError, KeyError, AttributeError, OSError, yaml.YAMLError) as error:
        raise InputError(
            f"--accelerate_config {name}: accelerate cannot read it ({' '.join(str(error).split())}); write one with "
            f"`accelerate config`, or use a preset: {', '.join(presets())}"
        ) from error
    return path


def launcher_options() -> dict[str, argparse.Action]:
    """What `accelerate launch` takes, by name without dashes."""
    from accelerate.commands.launch import launch_command_parser

    actions = launch_command_parser()._actions
    return {
        option[2:].replace("-", "_"): action
        for action in actions
        for option in action.option_strings
        if option.startswith("--")
    }


def split_flags(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Words after the recipe -> (flags of `accelerate launch`, overrides of the recipe).

    Raises:
        InputError: for a flag that is neither, with the nearest that is.
    """
    options: dict[str, argparse.Action] | None = None
    launcher: list[str] = []
    overrides: list[str] = []
    i = 0
    while i < len(words):
        word = words[i]
        if not word.startswith("--"):
            raise InputError(f"command line: '{word}' belongs to no option; write --section.key value")
        key, equals, value = word[2:].partition("=")
        if "." in key or key in SECTIONS:
            overrides += words[i : i + (1 if equals else 2)]
            i += 1 if equals else 2
            continue
        if options is None:
            options = launcher_options()
        name = key.replace("-", "_")
        if name not in options:
            known = [*RUN_OPTIONS, *SECTIONS, *(n for n in options if n not in OURS)]
            raise InputError(f"command line: run has no option --{key}{did_you_mean(name, known)}")
        if name in OURS:
            raise InputError(f"command line: --{key} of accelerate launch is set by run; use --accelerate_config FILE")
        if options[name].nargs == 0:
            launcher.append(f"--{name}")
            i += 1
            continue
        if not equals:
            i += 1
            if i == len(words):
                raise InputError(f"command line: --{key} has no value; write --{key} value")
            value = words[i]
        _check_value(options[name], key, value)
        launcher += [f"--{name}", value]
        i += 1
    return launcher, overrides


def _check_value(action: argparse.Action, key: str, value: str) -> None:
    """Refuse a value that accelerate would answer with its whole usage, or start nothing by."""
    try:
        number = action.type(value) if callable(action.type) else None
    except (TypeError, ValueError) as error:
        raise InputError(f"--{key}={value}: accelerate launch cannot read this value; see its --help") from error
    if action.dest in ("num_processes", "num_machines") and isinstance(number, int) and number < 1:
        raise InputError(f"--{key}={value} must be a whole number, at least 1")


def refuse_flags(launcher: Sequence[str]) -> None:
    """Refuse flags of `accelerate launch` where nothing is launched."""
    if launcher:
        raise InputError(
            f"command line: {launcher[0]} is an option of accelerate launch; add --accelerate_config with a preset "
            f"({', '.join(presets())}) or a file"
        )


def launch_command(
    config: str, launcher: Sequence[str], recipe: str, rest: Sequence[str], gpus: int | None = None
) -> list[str]:
    """The command that starts the workers.

    Args:
        config: name of a preset or a path.
        launcher: flags of `accelerate launch`, as `split_flags` gives them.
        recipe, rest: what each worker's `run` gets.
        gpus: GPUs of this machine; counted if not given.

    Raises:
        InputError: for a configuration that would start something else than it says.
    """
    path = find_config(config)
    gpus = torch.cuda.device_count() if gpus is None else gpus
    text = path.read_text(encoding="utf-8")
    settings = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    given = {word[2:]: True for word in launcher if word.startswith("--")}
    kind = str(settings.get("distributed_type", "NO"))
    if "cpu" in given or settings.get("use_cpu") or kind == "MULTI_CPU":
        raise InputError(
            f"--accelerate_config {config}: accelerate starts one process on the CPU; use the preset ddp with "
            "--num_processes N --training.use_cpu true, which starts N without a GPU"
        )
    fsdp = kind == "FSDP" or "use_fsdp" in given
    flag = launcher[launcher.index("--fsdp_version") + 1] if "fsdp_version" in given else None
    version = flag or (settings.get("fsdp_config") or {}).get("fsdp_version", 1)
    if fsdp and str(version) != "2":
        raise InputError(
            f"--accelerate_config {config}: it starts FSDP1 (fsdp_version {version}), which is not supported; use the "
            "preset fsdp2, or set fsdp_version: 2"
        )
    if fsdp and gpus == 0:
        raise InputError(
            f"--accelerate_config {config}: FSDP needs a GPU and this machine has none; use ddp, zero1, zero2 or zero3"
        )
    if kind == "DEEPSPEED" or "use_deepspeed" in given:
        need_deepspeed(f"--accelerate_config {config}")
    extra: list[str] = []
    if "num_processes" not in given and settings.get("num_processes") is None:
        if "num_machines" in given or config == "multi_node":
            raise InputError("--num_processes is missing; give the number of processes of all machines together")
        if gpus == 0:
            raise InputError("--num_processes is missing and this machine has no GPUs to count; give it, for example 2")
        chosen = launcher[launcher.index("--gpu_ids") + 1] if "gpu_ids" in given else settings.get("gpu_ids")
        some = [] if chosen in (None, "all") else str(chosen).split(",")
        extra = ["--num_processes", str(len(some) or gpus)]
    if config == "multi_node":
        for flag in NODE_FLAGS:
            if flag not in given:
                raise InputError(f"--accelerate_config multi_node: --{flag} is missing; give it on every machine")
    start = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(path)]
    return [*start, *extra, *launcher, "-m", "hf_continual.cli", "run", recipe, *rest]


# -- the command that starts the workers -----------------------------------------------------------------------------


def run_launched(command: Sequence[str], isolate_tasks: bool = False) -> int:
    """Start the workers and wait; once a task until all are learnt, if `isolate_tasks`. Returns the exit code."""
    if not isolate_tasks:
        return _launch_once(command)[0]
    while True:
        code, finished = _launch_once([*command, "--one_task"])
        if code or finished:
            return code


def _launch_once(command: Sequence[str]) -> tuple[int, bool]:
    with tempfile.TemporaryDirectory(prefix="hf-continual-") as folder:
        environment = {**os.environ, STATUS: folder}
        # A session of its own: Ctrl-C reaches this process alone, which passes it on once. A second SIGINT to a worker
        # means "at once", and torchrun would kill it in the middle of its checkpoint.
        child = subprocess.Popen(list(command), env=environment, start_new_session=True, preexec_fn=end_with_parent)
        with _forward_signals(child, Path(folder)):
            code = child.wait()
        ends = _ends(Path(folder))
    said = [end for end in ends if end.get("message")]
    if said:
        print(said[0]["message"], file=sys.stderr, flush=True)  # noqa: T201 - the workers' sentence, once
        return int(said[0]["code"]), False
    finished = any(end.get("finished") for end in ends)
    if code == 0 and not any("finished" in end for end in ends) and not _is_other_machine(command):
        raise InputError(
            "--accelerate_config: the launcher ended without starting a run; see what it printed, and check its flags"
        )
    return (128 - code if code < 0 else code), finished


def _is_other_machine(command: Sequence[str]) -> bool:
    """Only the first of several machines has rank 0, which says whether the run is finished."""
    rank = command[command.index("--machine_rank") + 1] if "--machine_rank" in command else "0"
    return rank != "0"


def _ends(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.end")]
    # What a worker says of itself before what it says of a lost one, which is only a consequence.
    return sorted(found, key=lambda end: (bool(end.get("lost")), end["rank"]))


@contextlib.contextmanager
def _forward_signals(child: subprocess.Popen[bytes], folder: Path) -> Iterator[None]:
    def forward(number: int, frame: Any) -> None:
        workers = [int(path.read_text()) for path in folder.glob("*.pid")] if number == signal.SIGINT else []
        for pid in workers or [child.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# -- in a worker -----------------------------------------------------------------------------------------------------


def register_worker(environment: Mapping[str, str] = os.environ) -> None:
    """Leave this worker's process id for the command that started it, and end when the launcher is gone."""
    if environment.get(STATUS):
        end_with_parent()
        _write(Path(environment[STATUS]) / f"{environment.get('RANK', '0')}.pid", str(os.getpid()))


def report_end(
    code: int, message: str = "", finished: bool | None = None, environment: Mapping[str, str] = os.environ
) -> int | None:
    """Leave how this worker ends for the command that started it; None if no command of ours did.

    Under torchrun, the exit code if another worker of this machine has printed the same message, so that it comes once.

    Returns the exit code to end with: 0 once every worker has left its end, for torchrun then has nothing to add;
    otherwise `code`, so that it stops the workers that still run.
    """
    if not environment.get(STATUS):
        return code if message and _said_already(message, environment.get("TORCHELASTIC_ERROR_FILE")) else None
    folder, rank = Path(environment[STATUS]), int(environment.get("RANK", "0"))
    end: dict[str, Any] = {"rank": rank, "code": code, "message": message, "lost": "another process of this" in message}
    if finished is not None:
        end["finished"] = finished
    _write(folder / f"{rank}.end", json.dumps(end))
    if not code:
        return 0
    world = int(environment.get("WORLD_SIZE", "1"))
    if world != int(environment.get("LOCAL_WORLD_SIZE", "1")):
        return code  # ends on other machines cannot be seen
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        if len(list(folder.glob("*.end"))) == world:
            return 0
        time.sleep(0.05)
    return code


def _said_already(message: str, error_file: str | None) -> bool:
    """torchrun gives each worker the path of a file, DIR/RANK/error.json; DIR is that of one start on this machine."""
    if not error_file:
        return False
    mark = Path(error_file).parent.parent / f"{hashlib.sha256(message.encode()).hexdigest()[:16]}.said"
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return True
    except OSError:  # then every worker says it
        return False
    return False


def _write(path: Path, text: str) -> None:
    temporary = path.with_suffix(f"{path.suffix}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


# -- recipe and launcher ---------------------------------------------------------------------------------------------


def check_recipe(
    recipe: Mapping[str, Any],
    overrides: Mapping[str, Any],
    base_dir: Path | None = None,
    environment: Mapping[str, str] = os.environ,
) -> None:
    """`check_launch` for every variant of a recipe as it is written.

    It comes before training arguments are made of the recipe: transformers would answer first, in paragraphs.

    Raises:
        InputError: if they disagree.
    """
    ours = {key: value for key, value in overrides.items() if key.split(".")[0] == "training"}
    variants = apply_overrides(dict(recipe), overrides).get("variants")
    for overlay in variants.values() if isinstance(variants, Mapping) and variants else [{}]:
        whole = overlaid(recipe, overlay) if isinstance(overlay, Mapping) else recipe
        merged = {"training": whole.get("training") or {}}
        training = apply_overrides(merged, ours)["training"]
        if isinstance(training, Mapping):
            check_launch({"training": training}, environment, base_dir)


def check_launch(
    recipe: Mapping[str, Any], environment: Mapping[str, str] = os.environ, base_dir: Path | None = None
) -> None:
    """Refuse a recipe that asks for something else than the launcher that started this process.

    Reads environment variables and configuration files, nothing else.

    Args:
        recipe: resolved.
        environment: variables as `accelerate launch` or torchrun set them.
        base_dir: where a relative path of `training.deepspeed` may start, besides the current folder.

    Raises:
        InputError: if they disagree.
    """
    world = int(environment.get("WORLD_SIZE", "1"))
    here = max(int(environment.get("LOCAL_RANK", "0")) + 1, int(environment.get("LOCAL_WORLD_SIZE", "1")))
    if here > world:
        raise InputError(
            f"WORLD_SIZE={world} and this machine alone has {here} processes, which do not know of each other and "
            "would each train alone; start them with --accelerate_config, torchrun or `accelerate launch`"
        )
    training = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    training |= recipe.get("training") or {}

    def on(name: str) -> bool:
        return environment.get(name, "false").lower() in ("true", "1")

    uses_deepspeed, uses_fsdp = on("ACCELERATE_USE_DEEPSPEED"), on("ACCELERATE_USE_FSDP")
    if training["deepspeed"]:
        need_deepspeed("training.deepspeed is given")
    precision = environment.get("ACCELERATE_MIXED_PRECISION")  # only accelerate launch sets it
    if training["deepspeed"] and uses_deepspeed:
        raise InputError(
            "training.deepspeed is given and the launcher brings DeepSpeed too; remove one of them: "
            "training.deepspeed, or --accelerate_config with DeepSpeed"
        )
    if training["deepspeed"] and precision is not None:
        raise InputError(
            f"training.deepspeed is given and accelerate launch starts {'FSDP' if uses_fsdp else 'no DeepSpeed'}; use "
            "--accelerate_config zero2 (or zero1, zero3) and remove training.deepspeed, or start with torchrun"
        )
    if (training["deepspeed"] or uses_deepspeed) and on("ACCELERATE_USE_CPU"):
        raise InputError("ACCELERATE_USE_CPU is set, which turns DeepSpeed off; unset it and use training.use_cpu=true")
    if training["fsdp"] and uses_deepspeed:
        raise InputError(
            f"training.fsdp={training['fsdp']!r} and the launcher brings DeepSpeed; remove training.fsdp, or use "
            "--accelerate_config fsdp2"
        )
    if training["fsdp"] and "WORLD_SIZE" not in environment:
        raise InputError(
            f"training.fsdp={training['fsdp']!r} and no launcher started this process, so nothing would be sharded; "
            "use --accelerate_config fsdp2 instead, or torchrun"
        )
    if uses_fsdp and environment.get("FSDP_VERSION", "1") != "2":
        raise InputError("the launcher starts FSDP1, which is not supported; use --accelerate_config fsdp2")
    if uses_fsdp and training["use_cpu"]:
        raise InputError("training.use_cpu=true and the launcher starts FSDP, which needs GPUs; use ddp or zero2")
    for kind in ("bf16", "fp16"):
        if precision == kind and not training[kind]:
            raise InputError(
                f"training.{kind}={training[kind]!r} and the launcher says mixed_precision {kind}; set "
                f"training.{kind}=true, or leave mixed_precision out of the launcher"
            )
    if precision in ("bf16", "fp16") and training["bf16" if precision == "fp16" else "fp16"]:
        raise InputError(f"the launcher says mixed_precision {precision} and the recipe another; set it in the recipe")

    if uses_deepspeed:
        for variable, option in (
            ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "gradient_accumulation_steps"),
            ("ACCELERATE_GRADIENT_CLIPPING", "max_grad_norm"),
        ):
            agree(environment.get(variable, "auto"), training[option], f"the launcher's {variable}", option)
    source = training["deepspeed"] or (uses_deepspeed and environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE"))
    if source and source != "none":
        check_config(read_config(source, base_dir), training, world if "WORLD_SIZE" in environment else None)
