"""Recipes: strict YAML over defaults, command-line words over YAML, and from there to task queues.

A recipe's keys are constructor arguments; nothing is renamed. An unknown key is an error that names the nearest one.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import importlib.resources
import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig

from .data import TASK_KEYS, load_task
from .errors import InputError, build, did_you_mean, refuse_unknown
from .evaluation import EvaluationConfig
from .gate import make_gate
from .general_ability import with_paths_below
from .methods.base import MethodList
from .models import ModelConfig
from .run_state import RunDirectory, write_text
from .streams import Stream, absolute_reference, find_stream, load_stream, stream_hash, stream_names
from .task_queue import DataConfig, TaskQueue
from .tasks import Task
from .training_args import make_training_args
from .yaml_files import overlay as _overlay
from .yaml_files import parse_yaml, read_text

SECTIONS = {
    "name": "what the run is called; default: the file's name",
    "run_dir": "run directory; default: runs/<name>",
    "model": "name, dtype, gguf_file, revision, pad_token, attn_implementation",
    "peft": "LoraConfig options; null fine-tunes the full model",
    "training": "training arguments, verbatim",
    "methods": "list of names or {name: ..., option: ...}",
    "tasks": "{stream: NAME, ...} or a list of task specifications",
    "data": "max_prompt_length, max_completion_length; for text: block_size, pack, drop_last_block, mlm_probability",
    "evaluation": "scorer, batch_size, max_new_tokens, temperature, top_p, seed, unseen, base_model, general, lm_eval",
    "seed": "seed of the run; task i uses seed + i",
    "seeds": "several seeds: one run each",
    "joint": "true trains on all tasks at once, the upper bound",
    "independent": "true trains each task alone from the base model, one model a task",
    "gate": "max_forgetting, on_violation (stop, rollback, rehearse), measure, rehearsal_...",
    "trainer": "package.module:Class of your own trainer",
    "variants": "{name: {section: ...}}: one run each, with these sections laid over the recipe",
}
STREAM_KEYS = ("stream", "data_dir", "train_rows", "eval_rows", "scorer", "eval_split", "training", "order")


def recipe_files() -> dict[str, Path]:
    """The recipes that this package brings, by their name without `.yaml`."""
    try:
        root = Path(str(importlib.resources.files("hf_continual.recipe_files")))
    except ModuleNotFoundError:  # a checkout that is not installed
        root = Path(__file__).parent.parent / "recipes"
    return {
        str(p.relative_to(root).with_suffix("")): p
        for p in sorted(root.rglob("*.yaml"))
        if "accelerate_configs" not in p.parts
    }


def find_recipe(name: str) -> Path:
    """A path, or the name of a recipe that the package brings.

    Raises:
        InputError: if there is neither.
    """
    path = Path(name)
    if path.is_file():
        return path
    brought = recipe_files()
    key = name.removesuffix(".yaml").removesuffix(".yml").removeprefix("recipes/")
    if key in brought:
        return brought[key]
    raise InputError(
        f"recipe {name}: there is no such file, and no such recipe in the package{did_you_mean(key, brought)}"
    )


def parse_overrides(words: Sequence[str]) -> dict[str, Any]:
    """`["--training.learning_rate", "1e-4"]` -> `{"training.learning_rate": 0.0001}`; values are YAML."""
    overrides: dict[str, Any] = {}
    i = 0
    while i < len(words):
        word = words[i]
        if not word.startswith("--"):
            raise InputError(f"command line: '{word}' belongs to no option; write --section.key value")
        key, equals, value = word[2:].partition("=")
        if not equals:
            i += 1
            if i == len(words):
                raise InputError(f"command line: --{key} has no value; write --{key} value")
            value = words[i]
        overrides[key] = parse_yaml(value, f"the value of --{key}")
        i += 1
    return overrides


def apply_overrides(recipe: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Lay dotted keys over a recipe; lists take an index (`methods.0.threshold`)."""
    recipe = copy.deepcopy(recipe)
    for dotted, value in overrides.items():
        parts = dotted.split(".")
        if parts[0] not in SECTIONS:
            raise InputError(f"--{dotted}: there is no section '{parts[0]}'{did_you_mean(parts[0], SECTIONS)}")
        target: Any = recipe
        for k, part in enumerate(parts[:-1]):
            following: Any = [] if parts[k + 1].isdigit() else {}
            if isinstance(target, list):
                if not part.isdigit() or int(part) >= len(target):
                    raise InputError(f"--{dotted}: '{part}' is no index of a list of {len(target)}")
                if isinstance(target[int(part)], str):  # a bare method name takes options now
                    target[int(part)] = {"name": target[int(part)]}
                target = target[int(part)]
            else:
                if not isinstance(target.get(part), (dict, list)):
                    target[part] = following
                target = target[part]
        if isinstance(target, list):
            if not parts[-1].isdigit() or int(parts[-1]) >= len(target):
                raise InputError(f"--{dotted}: '{parts[-1]}' is no index of a list of {len(target)}")
            target[int(parts[-1])] = value
        else:
            target[parts[-1]] = value
    return recipe


@dataclass
class Run:
    """One run of a recipe: a variant with a seed."""

    recipe: dict[str, Any]
    run_dir: Path
    base_dir: Path
    variant: str | None
    seed: int

    def tasks(self) -> list[Task]:
        return load_tasks(self.recipe["tasks"], self.base_dir, self.seed_of_data, self.recipe["training"])

    def named_stream(self, tasks: Sequence[Task]) -> dict[str, str] | None:
        """Name and hash of the stream that the recipe names, of which `tasks` are all tasks."""
        stream = stream_of(self.recipe["tasks"], self.base_dir)
        return {"name": stream.name, "hash": stream_hash(tasks, stream)} if stream is not None else None

    @property
    def seed_of_data(self) -> int:
        """Rows are drawn with one seed in all runs, so that seeds differ in training alone."""
        return 42

    def queue(self) -> TaskQueue:
        """The task queue; tasks added to the run directory later are included."""
        tasks = self.tasks()
        named_stream = self.named_stream(tasks)
        for spec in added_tasks(self.run_dir):
            tasks.append(load_task(spec, base_dir=self.base_dir, seed=self.seed_of_data))
        recipe = self.recipe
        trainer_class = _import_class(recipe["trainer"]) if recipe["trainer"] else None
        return TaskQueue(
            self.run_dir,
            model=ModelConfig(**recipe["model"]),
            tasks=tasks,
            methods=recipe["methods"],
            args=recipe["training"],
            peft_config=recipe["peft"],
            data=recipe["data"],
            evaluation=with_paths_below(recipe["evaluation"], self.base_dir),
            seed=self.seed,
            joint=recipe["joint"],
            independent=recipe["independent"],
            gate=recipe.get("gate"),
            trainer_class=trainer_class,
            recipe={**recipe, "variant": self.variant, "base_dir": str(self.base_dir)},
            variant=self.variant,
            named_stream=named_stream,
        )


def added_tasks(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "added_tasks.yaml"
    if not path.exists():
        return []
    added = parse_yaml(read_text(path, "added tasks"), str(path))
    if not isinstance(added, list) or not all(isinstance(spec, dict) for spec in added):
        raise InputError(f"{path} is truncated or was edited; restore it: a list of tasks")
    return added


def load_recipe(path: str | Path) -> dict[str, Any]:
    path = Path(path)
    recipe = parse_yaml(read_text(path, "recipe"), f"recipe {path}")
    if not isinstance(recipe, dict):
        raise InputError(f"recipe {path} is no mapping; write sections such as `model:` and `tasks:`")
    return {"name": path.stem, **recipe}


def variants_named(only: str, runs: Sequence[Run]) -> list[str]:
    """The names in `--only a,b`.

    Raises:
        InputError: if the runs have no such variant.
    """
    known = sorted({run.variant for run in runs if run.variant is not None})
    names = only.split(",")
    for name in names:
        if not known:
            raise InputError(f"--only {name}: the recipe has no variants; leave it out")
        if name not in known:
            raise InputError(f"--only {name}: the recipe has no such variant; it has {', '.join(known)}")
    return names


def expand(recipe: dict[str, Any], base_dir: Path, overrides: Mapping[str, Any] | None = None) -> list[Run]:
    """All runs of a recipe: variants x seeds, each resolved and checked.

    Raises:
        InputError: for an unknown key or a value that cannot be, with the key.
    """
    overrides = overrides or {}
    recipe = apply_overrides(recipe, overrides)
    refuse_unknown(recipe, SECTIONS, "")
    variants = recipe.pop("variants", None)
    if variants is not None and not (isinstance(variants, dict) and variants):
        raise InputError(f"variants={variants!r} must map names to sections, such as {{naive: {{methods: []}}}}")
    runs = []
    root = Path(recipe.pop("run_dir", None) or Path("runs") / str(recipe["name"]))
    for variant, overlay in (variants or {None: {}}).items():
        if variant is not None and not re.fullmatch(r"[\w.+=@-]+", str(variant)):
            raise InputError(f"variants: '{variant}' cannot name a folder; use letters, digits, '.', '_', '+' and '-'")
        if overlay is not None and not isinstance(overlay, dict):
            raise InputError(f"variants.{variant}={overlay!r} must be a mapping of sections")
        refuse_unknown(overlay or {}, SECTIONS, f"variants.{variant}.")
        merged = apply_overrides(
            _overlay(recipe, overlay or {}),
            {k: v for k, v in overrides.items() if not k.startswith(("variants", "run_dir"))},
        )
        seeds = merged.pop("seeds", None)
        if seeds is not None and (
            not isinstance(seeds, list) or not seeds or any(not isinstance(s, int) for s in seeds)
        ):
            raise InputError(f"seeds={seeds!r} must be a list of whole numbers")
        if seeds is not None and len(set(seeds)) < len(seeds):
            raise InputError(f"seeds={seeds!r} names a seed twice, and both runs would be one; give each once")
        for seed in seeds or [merged.get("seed", 42)]:
            if not isinstance(seed, int) or isinstance(seed, bool):
                raise InputError(f"seed={seed!r} must be a whole number")
            folder = root / str(variant) if variant is not None else root
            folder = folder / f"seed-{seed}" if seeds else folder
            if isinstance(merged.get("tasks"), dict) and "stream" in merged["tasks"]:
                reference = absolute_reference(merged["tasks"]["stream"], base_dir)
                merged["tasks"] = {**merged["tasks"], "stream": reference}
            resolved = resolve({**merged, "seed": seed})
            if variant is not None and (resolved["joint"] or resolved["independent"]):
                resolved.pop("gate", None)  # which is for the variants that can forget
            runs.append(Run(resolved, folder, base_dir, None if variant is None else str(variant), seed))
    return runs


def resolve(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Fill defaults and check every key; the result is what `recipe.yaml` of a run directory holds."""
    recipe = dict(recipe)
    if not isinstance(recipe.get("model"), (dict, str)):
        raise InputError("model: is missing; give at least {name: HUB_ID_OR_FOLDER}")
    if not recipe.get("tasks"):
        raise InputError(
            f"tasks: is missing; give a list of tasks or {{stream: NAME}} with one of {', '.join(stream_names())}"
        )
    model = {"name": recipe["model"]} if isinstance(recipe["model"], str) else recipe["model"]
    stream = stream_of(recipe["tasks"])
    if stream is not None:
        recipe |= _over_stream(recipe, stream)
    resolved = {
        "name": str(recipe.get("name", "run")),
        "model": dataclasses.asdict(build(ModelConfig, model, "model")),
        "peft": recipe.get("peft"),
        "training": recipe.get("training") or {},
        "methods": recipe.get("methods") or [],
        "tasks": recipe["tasks"],
        "data": dataclasses.asdict(build(DataConfig, recipe.get("data") or {}, "data")),
        "evaluation": dataclasses.asdict(build(EvaluationConfig, recipe.get("evaluation") or {}, "evaluation")),
        "seed": recipe.get("seed", 42),
        "joint": recipe.get("joint", False),
        "independent": recipe.get("independent", False),
        "trainer": recipe.get("trainer"),
    }
    if resolved["peft"] is not None:
        if not isinstance(resolved["peft"], dict):
            raise InputError(f"peft={resolved['peft']!r} must map LoraConfig options to values, or be null")
        refuse_unknown(resolved["peft"], inspect.signature(LoraConfig).parameters, "peft.")
    if not isinstance(resolved["training"], dict):
        raise InputError(f"training={resolved['training']!r} must map training arguments to values")
    for taken in ("output_dir", "methods", "seed"):
        if taken in resolved["training"]:
            raise InputError(
                f"training.{taken} is set by the queue; use {'run_dir' if taken == 'output_dir' else taken} of "
                "the recipe"
            )
    # What a recipe for GPUs says is checked on machines without one, too; training there is refused by the Trainer.
    elsewhere = {} if torch.accelerator.is_available() else {"use_cpu": True}
    make_training_args({"output_dir": "unused", **elsewhere, **resolved["training"]}, seq2seq=True)
    for bound in ("joint", "independent"):
        if not isinstance(resolved[bound], bool):
            raise InputError(f"{bound}={resolved[bound]!r} must be true or false")
    if (gate := make_gate(recipe.get("gate"))) is not None:
        resolved["gate"] = dataclasses.asdict(gate)
    if isinstance(resolved["methods"], (str, dict)):
        resolved["methods"] = [resolved["methods"]]
    if not isinstance(resolved["methods"], list):
        raise InputError(f"methods={resolved['methods']!r} must be a list of names or mappings")
    resolved["methods"] = [
        {"name": _method_word(spec), **method.options()}
        for spec, method in zip(resolved["methods"], MethodList(resolved["methods"]), strict=True)
    ]
    _check_tasks(resolved["tasks"])
    return resolved


def _method_word(spec: Any) -> str:
    return str(spec if isinstance(spec, str) else spec["name"])


def _check_tasks(tasks: Any) -> None:
    if isinstance(tasks, dict):
        refuse_unknown(tasks, STREAM_KEYS, "tasks.")
        if "stream" not in tasks:
            raise InputError(
                f"tasks.stream is missing; choose one of {', '.join(stream_names())}, or give a list of tasks"
            )
    elif isinstance(tasks, list):
        for i, spec in enumerate(tasks):
            if not isinstance(spec, dict):
                raise InputError(f"tasks.{i}={spec!r} must be a mapping such as {{name: mine, path: mine.jsonl}}")
            refuse_unknown(spec, TASK_KEYS, f"tasks.{i}.")
    else:
        raise InputError(f"tasks={tasks!r} must be a list of tasks or {{stream: NAME}}")


def stream_of(tasks: Any, base_dir: Path | None = None) -> Stream | None:
    """The stream that a recipe's `tasks:` section names, if it names one."""
    if not isinstance(tasks, Mapping) or "stream" not in tasks:
        return None
    return find_stream(tasks["stream"], base_dir)


def _over_stream(recipe: Mapping[str, Any], stream: Stream) -> dict[str, Any]:
    """The recipe's sections over the defaults that a stream has for them."""
    sections = {}
    for section, defaults in (
        ("data", stream.lengths),
        ("evaluation", stream.evaluation),
        ("training", stream.training),
    ):
        own = recipe.get(section)
        if defaults and (own is None or isinstance(own, Mapping)):
            sections[section] = {**defaults, **(own or {})}
    scorer = sections.get("evaluation", {}).get("scorer")
    if scorer not in (None, EvaluationConfig.scorer) and all("scorer" in task for task in stream.tasks.values()):
        raise InputError(
            f"evaluation.scorer={scorer!r} has no effect, each task of the stream '{stream.name}' names its own; "
            f"write tasks.scorer={scorer!r} to score all of them so"
        )
    return sections


def load_tasks(tasks: Any, base_dir: Path, seed: int, training: Mapping[str, Any] | None = None) -> list[Task]:
    """The tasks of a recipe's `tasks:` section.

    Args:
        training: the recipe's training arguments, which win over those that a stream has for its tasks.
    """
    if isinstance(tasks, list):
        return [load_task(spec, base_dir=base_dir, seed=seed) for spec in tasks]
    definition = find_stream(tasks["stream"], base_dir)
    changes = tasks.get("training") or {}
    if not isinstance(changes, dict) or not all(isinstance(c, dict) for c in changes.values()):
        raise InputError(f"tasks.training={changes!r} must map task names to training arguments")
    order = tasks.get("order")
    if order is not None and not (isinstance(order, list) and order and len(set(map(str, order))) == len(order)):
        raise InputError(f"tasks.order={order!r} must be a list of task names, each once")
    for name in order or ():
        if name not in definition.tasks:
            raise InputError(f"tasks.order: the stream has no task '{name}'{did_you_mean(name, definition.tasks)}")
    names = order or list(definition.tasks)
    for name in changes:
        if name not in names:
            raise InputError(f"tasks.training.{name}: the stream has no such task{did_you_mean(name, names)}")
    options = {k: v for k, v in tasks.items() if k not in ("stream", "training")}
    stream = load_stream(definition, base_dir=base_dir, seed=seed, **options)
    # A value that is the stream's own was written by nobody.
    own = {k for k, v in (training or {}).items() if k not in definition.training or definition.training[k] != v}
    for task in stream:
        published = {k: v for k, v in task.training.items() if k not in own}
        task.training = {**published, **changes.get(task.name, {})}
    return stream


def open_run(run_dir: str | Path) -> Run:
    """The run that a run directory's own `recipe.yaml` describes."""
    directory = RunDirectory(run_dir)
    if not (directory.path / "recipe.yaml").exists():
        raise InputError(f"{directory.path} is no run directory: it has no recipe.yaml; run a recipe first")
    stored = directory.read_recipe()
    if stored.get("python"):
        raise InputError(
            f"run directory {directory.path} was started from Python; continue it there with TaskQueue(...).run()"
        )
    variant, base_dir = stored.pop("variant", None), Path(str(stored.pop("base_dir", ".")))
    try:
        refuse_unknown(stored, SECTIONS, "")
        resolved = resolve(stored)
    except InputError as error:
        raise InputError(
            f"{directory.path / 'recipe.yaml'} is truncated or was edited ({error}); restore it"
        ) from error
    run = Run(resolved, directory.path, base_dir, variant, resolved["seed"])
    if (directory.path / "queue.json").exists():  # which has the gate that was last in force
        set_gate(run, directory.read_queue().get("gate"))
    return run


def set_gate(run: Run, gate: Any) -> None:
    """Give a run this forgetting gate; None takes it away."""
    run.recipe.pop("gate", None)
    if (made := make_gate(gate)) is not None:
        run.recipe["gate"] = dataclasses.asdict(made)


def add_task(run_dir: str | Path, spec: Any) -> TaskQueue:
    """Append a task specification to a run directory; returns its queue, ready to run."""
    run = open_run(run_dir)
    if not isinstance(spec, dict):
        raise InputError(f"the task {spec!r} must be a mapping such as {{name: mine, path: mine.jsonl}}")
    refuse_unknown(spec, TASK_KEYS, "task: ")
    queue = run.queue()
    added = added_tasks(run.run_dir)
    # Before queue.json: a process killed in between leaves a longer stream, which the next run learns.
    path, text = run.run_dir / "added_tasks.yaml", yaml.safe_dump([*added, spec], sort_keys=False)
    task = load_task(spec, base_dir=run.base_dir, seed=run.seed_of_data)
    queue.add(task, record=lambda: write_text(path, text))
    return queue


def with_absolute_paths(spec: Any, base_dir: Path) -> Any:
    """A task specification whose relative paths that exist below `base_dir` are absolute, so that it can be moved."""
    if not isinstance(spec, dict):
        return spec

    def absolute(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: absolute(v) for k, v in value.items()}
        if isinstance(value, str):
            stem = value.split("{")[0]
            for root in (base_dir, Path.cwd()):
                if stem and (root / stem).exists() and not Path(value).is_absolute():
                    return str(root / value)
        return value

    return {k: absolute(v) if k in ("path", "data_dir", "data_files") else v for k, v in spec.items()}


def _import_class(name: str) -> type[Any]:
    module, _, cls = str(name).partition(":")
    try:
        found = getattr(importlib.import_module(module), cls)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"trainer={name!r} cannot be imported ({error}); write package.module:Class") from error
    return found  # type: ignore[no-any-return]
