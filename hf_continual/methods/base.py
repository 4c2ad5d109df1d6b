"""What a method is: one small object with optional hooks that sees a context and never the Trainer.

The order of one optimizer step (all phases are global; within a phase, list order, but that a method which adds
adapters begins a task before the others):

    for each micro-batch:
        own columns popped -> forward_context opens -> forward with forward_kwargs, task loss -> closes
        loss = task_loss_weight * loss + like_task_loss(extra_loss)  -> backward
    seam: every on_gradients (read), then every edit_gradients (write)  -> clip -> optimizer step -> on_step_end

and of one task:

    on_task_begin -> train_dataset -> data_collator -> task_context around the training
        -> merge -> training_phase -> on_task_end -> on_rehearsed, if the queue's forgetting gate rehearses
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar, runtime_checkable

import datasets
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerState

from ..distributed import Distributed, GradView, assign_, check_backend, processes
from ..errors import InputError, did_you_mean
from ..lora import LoraView, trainable_state
from ..tasks import Task

ConfigT = TypeVar("ConfigT")


def _no_batches(rows: Sequence[Mapping[str, Any]], collator: Any = None) -> dict[str, Any]:
    raise RuntimeError("this context belongs to no Trainer and makes no batches")


@dataclass(frozen=True)
class MethodContext:
    """Everything a method may see.

    Attributes:
        model: the unwrapped model.
        task: the task being learnt; `task.index` counts from 0, `task.is_first`.
        dist: ranks and collectives.
        lora: the adapters of `model`.
        state: the Trainer's own state, read only.
        seed: the seed of this task's training.
        log: `log(name, scalar tensor)` adds a value to the next training log, averaged since the last one.
        rows: the task's training rows as the Trainer got them, before any method's `train_dataset`.
        tokenizer: the Trainer's processing class, if it has one.
        folder: where a method may write what is too large for memory while the task is learnt; None outside training.
        make_batch: `make_batch(rows)` is the batch that the Trainer would make of these rows, on the model's device;
            `make_batch(rows, collator)` with another collator than its own.
        autocast: `with ctx.autocast():` computes in the precision of the training.
        args: the training arguments, to refuse what cannot work; read only.
    """

    model: nn.Module
    task: Task
    dist: Distributed
    lora: LoraView
    state: TrainerState
    seed: int
    log: Callable[[str, Tensor], None]
    rows: Any = None
    tokenizer: Any = None
    folder: Path | None = None
    make_batch: Callable[..., dict[str, Any]] = field(default=_no_batches)
    autocast: Callable[[], AbstractContextManager[Any]] = field(default=nullcontext)
    args: Any = None


@runtime_checkable
class StoredState(Protocol):
    """State of a method that reads and writes itself, such as a replay buffer."""

    def save(self, folder: Path) -> None:
        """Write everything to `folder`, which does not exist yet."""

    def load(self, folder: Path) -> None:
        """Become what was written there; InputError if it is damaged."""


@dataclass(frozen=True)
class TrainingPhase:
    """A further training after the merge, on the task loss alone: no other hook runs in it.

    It is not saved in checkpoints; a task that is stopped in it does it again from its start. It has no warm-up, no
    evaluation, and of the Trainer's callbacks only those that show progress: trackers and callbacks of the user's own
    take a Trainer to train once. Its logs stand in `log_history` with `phase` as a key.

    Attributes:
        name: in logs.
        dataset: rows as the Trainer takes them.
        options: training arguments that differ from the task's, such as `learning_rate`.
        keep: by parameter, broadcastable; where it is 0 nothing moves, by momentum or weight decay neither.
    """

    name: str
    dataset: Any
    options: Mapping[str, Any] = field(default_factory=dict)
    keep: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass
class EmptyConfig:
    """A method without options."""


class ContinualMethod(Generic[ConfigT]):
    """Base class of all methods. Override only the hooks you need; call no `super()`.

    Attributes that end in `_` (tensors, dicts of tensors, `datasets.Dataset`, [`StoredState`], JSON values) are the
    method's state: they are saved with every checkpoint and every task. Names that begin with `_` are scratch.
    `__init__` stores the config.
    """

    name: ClassVar[str] = ""
    """The one word for this method in recipes, logs and files; default: the class name in lower case."""
    config_class: ClassVar[type] = EmptyConfig
    paper: ClassVar[str] = ""
    """Where the method comes from, such as `arxiv:2406.17245`."""
    batch_columns: ClassVar[tuple[str, ...]] = ()
    """Dataset columns that this method adds and reads; they reach `extra_loss` and never the model."""
    supports: ClassVar[frozenset[str]] = frozenset({"single"})
    """Backends on which the method computes the same as on one process; tests prove each claim."""
    unsupported: ClassVar[Mapping[str, str]] = {}
    """Why not on the others, by backend; part of the sentence that refuses them."""
    sharded_state: tuple[str, ...] = ()
    """State by parameter of which each rank holds its part, laid out like `GradView.lists`, from the first gradients of
    a task to its end; saved and read whole. A method whose backend decides sets it in `on_task_begin`."""
    owns: ClassVar[frozenset[str]] = frozenset()
    """What only one method of a list may do, such as `{"adapters"}` (adding adapters per task)."""
    needs_lora: bool = False
    """Whether it works on LoRA adapters alone; a method whose options decide sets it in its constructor."""
    needs_logits: bool = False
    """Whether `extra_loss` reads `outputs.logits`, which trainers with a fused loss never build."""
    counts_micro_batches: bool = False
    """Whether it treats whole micro-batches differently, so that four of two rows are not one of eight."""
    neutral: ClassVar[dict[str, Any] | None] = None
    """Options under which training must equal a plain Trainer bit for bit; `check_method` tries them."""

    _grads: GradView | None = None  # of the task being learnt, once a gradient was seen

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in cls.__dict__:
            cls.name = cls.__name__.lower()
        for attribute, value in list(cls.__dict__.items()):
            if (
                attribute.startswith("_")
                or attribute in HOOKS
                or not callable(value)
                or hasattr(ContinualMethod, attribute)
            ):
                continue
            if attribute.startswith(PREFIXES):
                raise TypeError(f"{cls.__name__}.{attribute} is not a hook{did_you_mean(attribute, HOOKS)}")

    def __init__(self, config: ConfigT | None = None, **options: Any) -> None:
        if config is not None and options:
            raise InputError(f"{type(self).__name__}: give a config or options, not both")
        self.config: ConfigT = config if config is not None else make_config(self.config_class, self.name, options)
        self.tasks_done_ = 0

    # -- hooks, in the order in which they run -----------------------------------------------------------------------

    def on_task_begin(self, ctx: MethodContext) -> None:
        """Before the optimizer exists: add an adapter, bind a teacher, reset counters."""

    def train_dataset(self, ctx: MethodContext, dataset: Any) -> Any:
        """Return the dataset to train on; replay mixes here."""
        return dataset

    def data_collator(self, ctx: MethodContext, collator: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
        """Return the collator of the training batches; what it adds to a batch is named in `batch_columns`."""
        return collator

    def task_context(self, ctx: MethodContext) -> AbstractContextManager[Any]:
        """Open around the whole training of a task; taps are placed here and always removed."""
        return nullcontext()

    def forward_context(self, ctx: MethodContext, batch: Mapping[str, Any]) -> AbstractContextManager[Any]:
        """Open around the forward and the task loss of one micro-batch, and closed before its backward."""
        return nullcontext()

    def forward_kwargs(self, ctx: MethodContext, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Further keyword arguments of the model in the forward of one micro-batch."""
        return {}

    def task_loss_weight(self, ctx: MethodContext, batch: Mapping[str, Any]) -> float:
        """The factor of this micro-batch's task loss; the weights of several methods are multiplied."""
        return 1.0

    def extra_loss(self, ctx: MethodContext, batch: Mapping[str, Any], outputs: Any) -> dict[str, Tensor]:
        """Named scalar losses added to the task loss, such as `{"olora/orthogonal": tensor}`."""
        return {}

    def weight_gradients(self, ctx: MethodContext, grads: GradView) -> None:
        """Add the gradient of losses of the weights alone, with `grads.add_loss`. Called before the other gradient
        hooks, and only where weights are split between the ranks (fsdp2, zero3): `extra_loss` cannot see them there."""

    def on_gradients(self, ctx: MethodContext, grads: GradView) -> None:
        """READ the gradients, once per optimizer step, before any edit."""

    def edit_gradients(self, ctx: MethodContext, grads: GradView) -> None:
        """WRITE the gradients, in list order, before clipping."""

    def on_step_end(self, ctx: MethodContext) -> None:
        """The weights have moved. The `GradView` of this step's hooks now shows the gradients as they were applied:
        edited, clipped, and without the fp16 loss scale; `ctx.dist.step_was_skipped` says if fp16 skipped the step."""

    def merge(
        self, ctx: MethodContext, previous: Mapping[str, Tensor], current: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        """Combine the trainable weights from before and after the task (by name, on the CPU)."""
        return current

    def training_phase(self, ctx: MethodContext) -> TrainingPhase | None:
        """A further training after the merge, such as replay with some weights frozen; None for none."""
        return None

    def on_task_end(self, ctx: MethodContext) -> None:
        """After everything: fill the buffer, compute the Fisher information, keep the teacher."""

    def on_rehearsed(self, model: nn.Module) -> None:
        """After the forgetting gate has trained the model on rows of all tasks so far: state that holds its weights.

        `model` is unwrapped, and its weights are still split under FSDP2 and ZeRO-3. `load` comes before, `save` after;
        every rank calls it, where it is overridden.
        """

    # -- state -------------------------------------------------------------------------------------------------------

    @classmethod
    def roles(cls) -> frozenset[str]:
        """`owns`, plus `merge` where that hook is overridden."""
        return cls.owns | ({"merge"} if cls.merge is not ContinualMethod.merge else set())

    def summary(self) -> str | None:
        """What happened at the end of the task just learnt, for the queue to print; None for nothing."""
        return None

    def options(self) -> dict[str, Any]:
        """The configuration as plain values."""
        config: Any = self.config
        return dataclasses.asdict(config)

    def save(self, folder: Path) -> None:
        """Write the state to `folder/<name>.json`, `.safetensors` and, for datasets, `folder/<name>-<attribute>/`.

        Every rank calls it and rank 0 writes.
        """
        values: dict[str, Any] = {}
        tensors: dict[str, Tensor] = {}
        shards = {name: self._whole(name) for name in self.sharded_state}  # on every rank: parts are collected
        if not processes().is_main:
            return
        folder.mkdir(parents=True, exist_ok=True)
        for attribute, value in sorted(vars(self).items()):
            if not attribute.endswith("_") or attribute.startswith("_"):
                continue
            value = shards.get(attribute, value)
            if torch.is_tensor(value):
                tensors[attribute] = value.detach().cpu().contiguous()
                values[attribute] = {"kind": "tensor"}
            elif isinstance(value, dict) and value and all(torch.is_tensor(v) for v in value.values()):
                tensors |= {f"{attribute}/{key}": v.detach().cpu().contiguous() for key, v in value.items()}
                values[attribute] = {"kind": "tensors", "keys": list(value)}
            elif isinstance(value, datasets.Dataset):
                value.save_to_disk(str(folder / f"{self.name}-{attribute}"))
                values[attribute] = {"kind": "dataset"}
            elif isinstance(value, StoredState):
                value.save(folder / f"{self.name}-{attribute}")
                values[attribute] = {"kind": "stored"}
            else:
                values[attribute] = {"kind": "value", "value": value}
        if tensors:
            save_file(tensors, str(folder / f"{self.name}.safetensors"))
        record = {"method": self.name, "options": self.options(), "state": values}
        (folder / f"{self.name}.json").write_text(json.dumps(record, indent=1) + "\n")

    def _whole(self, attribute: str) -> Any:
        """A state of `sharded_state` as it is stored."""
        value = getattr(self, attribute)
        return value if self._grads is None or not value else self._grads.gather(value)

    def _bind(self, grads: GradView | None) -> None:
        """From now on a rank holds its part of `sharded_state`, which was whole and may be on the CPU."""
        self._grads = grads
        if grads is not None:
            for attribute in self.sharded_state:
                setattr(self, attribute, grads.local(getattr(self, attribute)))

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote.

        Raises:
            InputError: if a file is missing, unreadable or belongs to another method.
        """
        path = folder / f"{self.name}.json"
        try:
            record = json.loads(path.read_text())
            files = {name: spec["kind"] for name, spec in record["state"].items()}
            has_tensors = any(kind in ("tensor", "tensors") for kind in files.values())
            tensors = load_file(str(folder / f"{self.name}.safetensors")) if has_tensors else {}
            for attribute, spec in record["state"].items():
                if spec["kind"] == "tensor":
                    value: Any = tensors[attribute]
                elif spec["kind"] == "tensors":
                    value = {key: tensors[f"{attribute}/{key}"] for key in spec["keys"]}
                elif spec["kind"] == "stored":
                    getattr(self, attribute).load(folder / f"{self.name}-{attribute}")
                    continue
                elif spec["kind"] == "dataset":
                    # Read into memory, so that the folder may be moved or deleted while the dataset is in use.
                    value = datasets.load_from_disk(str(folder / f"{self.name}-{attribute}"), keep_in_memory=True)
                else:
                    value = spec["value"]
                setattr(self, attribute, value)
            self._bind(self._grads)
        except InputError as error:
            raise InputError(f"state of method '{self.name}': {error}") from error
        except FileNotFoundError as error:
            raise InputError(f"state of method '{self.name}': {error.filename or path} is missing") from error
        except Exception as error:
            raise InputError(
                f"state of method '{self.name}': {path} or the .safetensors file beside it cannot be read ({error})"
            ) from error


PREFIXES = ("on_", "before_", "after_", "edit_", "extra_", "train_", "forward_", "task_", "data_")
"""How hooks begin; another public function that begins so is taken for a misspelt one."""

HOOKS: tuple[str, ...] = (
    "on_task_begin",
    "train_dataset",
    "data_collator",
    "task_context",
    "forward_context",
    "forward_kwargs",
    "task_loss_weight",
    "extra_loss",
    "weight_gradients",
    "on_gradients",
    "edit_gradients",
    "on_step_end",
    "merge",
    "training_phase",
    "on_task_end",
)


def make_config(config_class: type, method: str, options: Mapping[str, Any]) -> Any:
    """Build a method's config, refusing unknown options with the nearest name."""
    known = [f.name for f in dataclasses.fields(config_class)]
    for option in options:
        if option not in known:
            raise InputError(f"method '{method}' has no option '{option}'{did_you_mean(option, known)}")
    try:
        return config_class(**options)
    except (InputError, TypeError, ValueError) as error:
        prefix = "" if str(error).startswith("method ") else f"method '{method}': "
        raise InputError(f"{prefix}{error}") from error


def method_names() -> list[str]:
    """Names of the methods that this package brings."""
    package = importlib.import_module("hf_continual.methods")
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if m.name not in ("base",))


def method_class(name: str) -> type[ContinualMethod[Any]]:
    """The class behind `migu` (module `hf_continual.methods.migu`) or `pkg.mod:Class`.

    Raises:
        InputError: if there is no such method.
    """
    if ":" in name:
        module_name, _, class_name = name.partition(":")
        try:
            found = getattr(importlib.import_module(module_name), class_name)
        except (ImportError, AttributeError) as error:
            raise InputError(f"methods: '{name}' cannot be imported ({error})") from error
        if not (isinstance(found, type) and issubclass(found, ContinualMethod)):
            raise InputError(f"methods: '{name}' is not a subclass of hf_continual.ContinualMethod")
        return found
    if name not in method_names():
        raise InputError(
            f"methods: there is no method '{name}'{did_you_mean(name, method_names())} "
            "(your own is named 'package.module:Class')"
        )
    module = importlib.import_module(f"hf_continual.methods.{name}")
    return next(
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, ContinualMethod)
        and value.__module__ == module.__name__
        and value.name == name
    )


MethodSpec = "ContinualMethod[Any] | str | Mapping[str, Any]"


def make_method(spec: Any) -> ContinualMethod[Any]:
    """A method from an object, a name, or a mapping such as `{"name": "migu", "threshold": 0.7}`."""
    if isinstance(spec, ContinualMethod):
        return spec
    if isinstance(spec, str):
        return method_class(spec)()
    if isinstance(spec, Mapping):
        options = dict(spec)
        name = options.pop("name", None)
        if not isinstance(name, str):
            raise InputError(f"methods: {dict(spec)!r} has no 'name'; write {{name: migu, threshold: 0.7}}")
        cls = method_class(name)
        return cls(make_config(cls.config_class, cls.name, options))
    raise InputError(f"methods: {spec!r} is neither a method, a name nor a mapping with a name")


class MethodList(Sequence[ContinualMethod[Any]]):
    """Several methods run as one, phase by phase.

    Raises:
        InputError: at construction, naming both methods, if two have the same name, claim the same batch column, or
            both do what only one can (`merge`, or anything in their `owns`).
    """

    def __init__(self, methods: Iterable[Any] = ()) -> None:
        if isinstance(methods, (str, Mapping)):
            methods = [methods]
        self.methods = [make_method(spec) for spec in methods or ()]
        owners: dict[str, str] = {}
        for method in self.methods:
            claims = [(f"name '{method.name}'", "give the stream one of them")]
            claims += [(f"role '{role}'", "keep one of them") for role in sorted(method.roles())]
            claims += [(f"batch column '{c}'", "rename one") for c in method.batch_columns]
            for claim, way_out in claims:
                if claim in owners:
                    raise InputError(
                        f"methods '{owners[claim]}' and '{method.name}' cannot be combined: both have the {claim}; "
                        f"{way_out}"
                    )
                owners[claim] = method.name
        done = {method.tasks_done_ for method in self.methods}
        if len(done) > 1:
            counts = ", ".join(f"'{m.name}' {m.tasks_done_}" for m in self.methods)
            raise InputError(f"methods have learnt different numbers of tasks ({counts}); use objects of one history")

    def __len__(self) -> int:
        return len(self.methods)

    def __getitem__(self, index: Any) -> Any:
        return self.methods[index]

    def __iter__(self) -> Iterator[ContinualMethod[Any]]:
        return iter(self.methods)

    @property
    def tasks_done(self) -> int:
        return self.methods[0].tasks_done_ if self.methods else 0

    @property
    def batch_columns(self) -> list[str]:
        return [column for method in self.methods for column in method.batch_columns]

    @property
    def merges(self) -> bool:
        return any("merge" in method.roles() for method in self.methods)

    def overrides(self, hook: str) -> bool:
        return any(getattr(type(m), hook) is not getattr(ContinualMethod, hook) for m in self.methods)

    def check(self, ctx: MethodContext) -> None:
        """Refuse what cannot work on this model and backend, before anything is trained."""
        for method in self.methods:
            check_backend(ctx.dist.backend, method.supports, method.name, method.unsupported)
            if method.needs_lora:
                ctx.lora.peft_model(method.name)

    def on_task_begin(self, ctx: MethodContext) -> None:
        """Who adds adapters comes first, so that all others see what learns, whatever the order of the list."""
        for method in sorted(self.methods, key=lambda m: "adapters" not in m.owns):
            method.on_task_begin(ctx)

    def train_dataset(self, ctx: MethodContext, dataset: Any) -> Any:
        for method in self.methods:
            dataset = method.train_dataset(ctx, dataset)
        return dataset

    def data_collator(self, ctx: MethodContext, collator: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
        for method in self.methods:
            collator = method.data_collator(ctx, collator)
        return collator

    def task_context(self, ctx: MethodContext) -> AbstractContextManager[Any]:
        return self._stack(lambda method: method.task_context(ctx))

    def forward_context(self, ctx: MethodContext, batch: Mapping[str, Any]) -> AbstractContextManager[Any]:
        return self._stack(lambda method: method.forward_context(ctx, batch))

    def _stack(self, make: Callable[[ContinualMethod[Any]], AbstractContextManager[Any]]) -> ExitStack:
        with ExitStack() as stack:
            for method in self.methods:
                stack.enter_context(make(method))
            return stack.pop_all()

    def forward_kwargs(self, ctx: MethodContext, batch: Mapping[str, Any]) -> dict[str, Any]:
        given: dict[str, Any] = {}
        for method in self.methods:
            given |= method.forward_kwargs(ctx, batch)
        return given

    def task_loss_weight(self, ctx: MethodContext, batch: Mapping[str, Any]) -> float:
        return math.prod(method.task_loss_weight(ctx, batch) for method in self.methods)

    def extra_loss(self, ctx: MethodContext, batch: Mapping[str, Any], outputs: Any) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = {}
        for method in self.methods:
            losses |= method.extra_loss(ctx, batch, outputs)
        return losses

    def gradient_hooks(self, ctx: MethodContext, grads: GradView) -> None:
        """All reads, then all edits."""
        for method in self.methods:
            if method._grads is not grads:
                method._bind(grads)
            if not ctx.dist.whole_weights:
                method.weight_gradients(ctx, grads)
        for method in self.methods:
            method.on_gradients(ctx, grads)
        for method in self.methods:
            method.edit_gradients(ctx, grads)

    def on_step_end(self, ctx: MethodContext) -> None:
        for method in self.methods:
            method.on_step_end(ctx)

    @torch.no_grad()
    def merge(self, ctx: MethodContext, previous: Mapping[str, Tensor]) -> None:
        current = trainable_state(ctx.model)
        for method in self.methods:
            if "merge" in method.roles():
                current = dict(method.merge(ctx, previous, current))
        assign_(dict(ctx.model.named_parameters()), current)

    def training_phases(self, ctx: MethodContext) -> Iterator[TrainingPhase]:
        """The phases of all methods, each asked for when the one before is over."""
        for method in self.methods:
            phase = method.training_phase(ctx)
            if phase is not None:
                yield phase

    def on_task_end(self, ctx: MethodContext) -> None:
        for method in self.methods:
            method.on_task_end(ctx)
        for method in self.methods:
            method.tasks_done_, method._grads = ctx.task.index + 1, None

    def save(self, folder: Path) -> None:
        """Write every method's state below `folder`: every rank calls it, rank 0 writes, all wait for it."""
        for method in self.methods:
            method.save(folder)
        processes().barrier()

    def load(self, folder: Path) -> None:
        """Restore every method's state from `folder`."""
        for method in self.methods:
            method.load(folder)
