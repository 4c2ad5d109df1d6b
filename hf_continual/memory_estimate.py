r"""How much memory a training takes on each GPU, found without loading the model.

    peak = weights + optimizer + method state + teacher cache + gradients
           + max(forward and backward, the seam, the optimizer step, the end of a task) beyond the gradients

The model is built without weights, and one forward and backward run on tensors that have a shape and no content
(`FakeTensorMode`). Every storage that an operator makes is counted while it lives, so gradient checkpointing, LoRA,
dropout, autocast, the float32 logits of the loss and the losses of methods count as they are computed. The rest is
arithmetic: what the optimizer, the sharding backend and each method keep. Batches are as long as `data:` allows.

Not counted: evaluation, fragmentation of the allocator, what `torch.compile` saves. CUDA itself gets `RESERVE`.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import math
import re
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from .distillation import ReplayDistillation, logit_kl, logit_mse
from .errors import InputError
from .lora import LoraView
from .methods.agem import AGEM
from .methods.base import ContinualMethod, MethodList
from .methods.derpp import DERPP
from .methods.ewc import EWC, quadratic
from .methods.fisher_merge import FisherMerge
from .methods.gem import GEM
from .methods.inclora import IncLoRA
from .methods.kif import KIF
from .methods.kif import orthogonality as unit_orthogonality
from .methods.lwf import LwF, distillation
from .methods.migu import MIGU, find_targets
from .methods.olora import OLoRA
from .methods.olora import orthogonality as old_and_new
from .methods.seekr import HEADS, LAYERS, SEEKR
from .methods.weight_ema import WeightEMA
from .models import ModelConfig, apply_lora, first_line, is_seq2seq, load_model
from .skill_fusion import SkillFusion
from .task_queue import DataConfig
from .training_args import make_training_args

__all__ = ["MemoryEstimate", "Plan", "estimate", "parse_size", "plan_of"]

Backend = Literal["single", "ddp", "fsdp2", "zero0", "zero1", "zero2", "zero3"]

FLOAT = 4
_READ = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "gradient_checkpointing_kwargs",
    "activation_checkpointing",
    "activation_checkpointing_kwargs",
    "optim",
    "optim_args",
)
RESERVE = 2**30
"""For the CUDA context, kernels and workspaces of libraries: a round figure, not measured."""
PARTS = ("weights", "gradients", "optimizer", "activations", "method_state", "teacher_cache", "reserve")
SIZES = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
GIB = 2**30


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one GPU when most is in use.

    Attributes:
        weights: the model, and with sharded weights those that are gathered for the layer at work.
        gradients: of everything that learns, and the buffers they are reduced in.
        optimizer: its moments, and the float32 copy of half-precision weights where DeepSpeed keeps one.
        activations: what the moment of most memory takes beyond all the above; mostly saved activations and logits.
        method_state: what the methods keep on the GPU while a task is learnt.
        teacher_cache: weights of a teacher, and a batch's signals of one.
        reserve: a round figure for CUDA and its libraries; 0 on a CPU.
        moment: when most is in use.
        backend: one of single, ddp, fsdp2, zero0, zero1, zero2, zero3.
        parameters, trainable: how many there are in the whole model.
        notes: what was assumed.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    method_state: int
    teacher_cache: int
    reserve: int
    moment: str
    backend: str
    parameters: int
    trainable: int
    notes: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        return sum(getattr(self, part) for part in PARTS)

    def fits(self, gpu_memory: int) -> bool:
        return self.total <= gpu_memory


def parse_size(text: str | int | float) -> int:
    """`80GB`, `24GiB`, `80e9` in bytes.

    Raises:
        InputError: if it is no size.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*([kmgt]i?)?b?\s*", str(text), re.I)
    size = float(match[1]) * SIZES[(match[2] or "").lower()] if match else 0.0
    if not 1 <= size < 2**63:
        raise InputError(f"--gpu_memory {text}: this is no size of memory; write 80GB, 24GiB or 80e9")
    return int(size)


# -- how it is trained -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What of the training arguments decides about memory.

    Attributes:
        half: what the whole model is cast to by DeepSpeed or FSDP.
        autocast: what the forward computes in where the weights keep their dtype.
        bucket: elements of a DeepSpeed reduce bucket; None: the square of the hidden size.
        buckets: how many of them there are.
        live: elements that ZeRO-3 may keep gathered.
        gradient_half: ZeRO keeps gradients in the dtype of the weights.
    """

    backend: Backend = "single"
    world_size: int = 1
    half: torch.dtype | None = None
    autocast: torch.dtype | None = None
    offload_optimizer: bool = False
    offload_param: bool = False
    bucket: int | None = 0
    buckets: int = 1
    live: int = 10**9

    @property
    def zero(self) -> int | None:
        return int(self.backend[-1]) if self.backend.startswith("zero") else None

    @property
    def shards_optimizer(self) -> bool:
        return self.backend in ("zero1", "zero2", "zero3", "fsdp2")

    @property
    def shards_gradients(self) -> bool:
        return self.backend in ("zero2", "zero3", "fsdp2")

    @property
    def shards_weights(self) -> bool:
        return self.backend in ("zero3", "fsdp2")


def plan_of(training: Mapping[str, Any], gpus: int = 1) -> Plan:
    """The plan of a recipe's `training:` section on `gpus` GPUs.

    Raises:
        InputError: if a DeepSpeed configuration cannot be read, or both DeepSpeed and FSDP are asked for.
    """
    if isinstance(gpus, bool) or not isinstance(gpus, int) or gpus < 1:
        raise InputError(f"--gpus {gpus}: this must be a whole number, at least 1")
    half = torch.bfloat16 if training.get("bf16") else torch.float16 if training.get("fp16") else None
    engine, fsdp = training.get("deepspeed"), training.get("fsdp")
    if engine and fsdp:
        raise InputError("training.deepspeed and training.fsdp are both given; leave one of them out")
    if fsdp:
        return Plan("fsdp2", gpus, half=half)
    if not engine:
        return Plan("ddp" if gpus > 1 else "single", gpus, autocast=half)
    config = _read_engine(engine)
    for option, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if _section(config, option).get("enabled") is True:
            half = dtype
    zero = _section(config, "zero_optimization")
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise InputError(f"training.deepspeed: zero_optimization.stage={stage!r} is unknown; choose 0, 1, 2 or 3")
    offloads = {}
    for what in ("optimizer", "param"):
        offloads[what] = _section(zero, f"offload_{what}").get("device", "none") not in ("none", None)
    bucket, overlap = zero.get("reduce_bucket_size", 5 * 10**8), zero.get("overlap_comm", stage == 3)
    return Plan(
        f"zero{stage}",  # type: ignore[arg-type]
        gpus,
        half=half,
        offload_optimizer=offloads["optimizer"] and stage > 0,
        offload_param=offloads["param"] and stage == 3,
        bucket=None if bucket == "auto" else int(float(bucket)) if stage else 0,
        buckets=2 if overlap is True and zero.get("contiguous_gradients", True) else 1,
        live=int(float(zero.get("stage3_max_live_parameters", 1e9))),
    )


def _read_engine(engine: Any) -> Mapping[str, Any]:
    if isinstance(engine, Mapping):
        return engine
    try:
        config = json.loads(Path(str(engine)).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"training.deepspeed={engine}: it cannot be read as JSON ({error}); give its path") from error
    if not isinstance(config, Mapping):
        raise InputError(f"training.deepspeed={engine}: it holds no mapping; give a DeepSpeed configuration")
    return config


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = config.get(name) or {}
    if not isinstance(found, Mapping):
        raise InputError(f"training.deepspeed: {name}={found!r} must map options to values")
    return found


# -- counting ----------------------------------------------------------------------------------------------------------


class _LiveBytes(TorchDispatchMode):
    """Bytes of all storages that operators make, while they live."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()
        self._known = {id(t.untyped_storage()): t.untyped_storage() for t in known}  # held: an id is used again
        self._alive: dict[int, tuple[Any, int]] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return out

    def _see(self, storage: Any) -> None:
        key = id(storage)
        if key in self._known or key in self._alive:
            return
        size = storage.nbytes()
        self._alive[key] = weakref.ref(storage, lambda _: self._drop(key)), size
        self.now += size
        self.peak = max(self.peak, self.now)

    def _drop(self, key: int) -> None:
        self.now -= self._alive.pop(key)[1]


class _FusedAttention(TorchFunctionMode):
    """Attention dropout leaves a CPU no fused kernel, while a GPU has one: it is left out, for it keeps no mask."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            kwargs["dropout_p"] = 0.0
        return func(*args, **kwargs)


Loss = Callable[[Any, Any, dict[str, Tensor], Any], Tensor]
"""A further loss: model, its trainable parameters by name, batch, outputs."""


@dataclass(frozen=True)
class _Shape:
    """A micro-batch: rows, and tokens of each part."""

    rows: int
    prompt: int
    completion: int

    def batch(self, seq2seq: bool) -> dict[str, Tensor]:
        tokens = self.prompt if seq2seq else self.prompt + self.completion
        ids = torch.zeros(self.rows, tokens, dtype=torch.long)
        labels = torch.zeros(self.rows, self.completion, dtype=torch.long) if seq2seq else ids.clone()
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    @property
    def labels(self) -> int:
        return self.rows * self.completion


def _drop_gradients(parameters: Sequence[nn.Parameter]) -> None:
    for p in parameters:
        p.grad = None


@contextmanager
def _can_be_followed(model: Any) -> Iterator[None]:
    """Some kernels, such as the grouped matrix products of experts in float32, run on weights that exist alone."""
    torchs = logging.getLogger("torch._subclasses.fake_tensor")
    before, torchs.disabled = torchs.disabled, True  # what it says is in the sentence
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"estimate: a step of {type(model).__name__} cannot be followed without its weights "
            f"({first_line(error)}); try --model.dtype bfloat16, or measure a few steps"
        ) from error
    finally:
        torchs.disabled = before


class _Simulation:
    """A model whose tensors have shapes and no content."""

    def __init__(self, model: nn.Module, plan: Plan, checkpointing: Mapping[str, Any] | None) -> None:
        self.mode, self.plan = FakeTensorMode(), plan
        self.seq2seq = is_seq2seq(model)
        made: dict[int, Tensor] = {}
        with self.mode:
            for module in model.modules():
                for name, parameter in module._parameters.items():
                    if parameter is not None:
                        if id(parameter) not in made:
                            content = self._empty(parameter)
                            made[id(parameter)] = nn.Parameter(content, requires_grad=parameter.requires_grad)
                        module._parameters[name] = made[id(parameter)]  # type: ignore[assignment]
                for name, buffer in module._buffers.items():
                    if buffer is not None:
                        module._buffers[name] = self._empty(buffer)
        self.model: Any = model
        if checkpointing is not None:
            options = dict(checkpointing)
            every, _ = options.pop("every_n_layers", 1), options.pop("offload", False)
            enable: Any = self.model.activation_checkpointing_enable
            enable(activation_checkpointing_kwargs=options or None, every_n_layers=every)
        model.train()
        self.trained: dict[str, Any] = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._held: list[Tensor] = []

    def hold(self, *shape: int) -> Tensor:
        """A float32 tensor that is there all the time, and not counted."""
        with self.mode:
            self._held.append(torch.empty(shape))
        return self._held[-1]

    def _empty(self, tensor: Tensor) -> Tensor:
        half = self.plan.half if tensor.is_floating_point() else None
        return torch.empty(tensor.shape, dtype=half or tensor.dtype)

    def peak(
        self,
        shape: _Shape,
        losses: Sequence[Loss] = (),
        gradients: Literal["new", "kept", "released", "returned"] = "new",
    ) -> int:
        """Most bytes beside the weights during one forward and backward.

        Args:
            losses: added to the task loss.
            gradients: `new` in this backward; `kept` from an earlier one, and not counted; `released` as soon as they
                are there, as where they are sharded; `returned`, as by `torch.autograd.grad`.
        """
        parameters = list(self.trained.values())
        with ExitStack() as stack:
            stack.enter_context(self.mode)
            if gradients == "released":
                for p in parameters:
                    handle = p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
                    stack.callback(handle.remove)
            if gradients == "kept":
                for p in parameters:
                    p.grad = torch.empty(p.shape, dtype=p.dtype)
            stack.callback(_drop_gradients, parameters)
            batch = shape.batch(self.seq2seq)
            grads = [p.grad for p in parameters if p.grad is not None]
            known = [*self.model.parameters(), *self.model.buffers(), *grads, *batch.values(), *self._held]
            counter = stack.enter_context(_LiveBytes(known))
            stack.enter_context(_FusedAttention())
            with _can_be_followed(self.model):
                loss = self._loss(batch, losses)
            if gradients == "returned":
                torch.autograd.grad(loss, parameters, allow_unused=True)
            else:
                loss.backward()
            return counter.peak

    def _loss(self, batch: dict[str, Tensor], losses: Sequence[Loss]) -> Tensor:
        outputs = self.forward(batch)
        loss = outputs.loss
        if losses:
            loss = loss + torch.stack([further(self, self.trained, batch, outputs).float() for further in losses]).sum()
        return loss

    def forward(self, batch: Mapping[str, Any]) -> Any:
        """As the prepared model does: under autocast, whose outputs accelerate brings to float32."""
        arguments = dict(batch) if self.seq2seq else {**batch, "use_cache": False}
        if self.plan.autocast is None:
            return self.model(**arguments)

        def run() -> Any:
            with torch.autocast("cpu", self.plan.autocast):
                return self.model(**arguments)

        return convert_outputs_to_fp32(run)()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        self.model.eval()
        with torch.no_grad():
            yield
        self.model.train()


# -- what methods keep -------------------------------------------------------------------------------------------------


@dataclass
class _Counts:
    """Sizes of the model that is trained."""

    numel: int = 0
    bytes: int = 0
    trained: int = 0
    trained_bytes: int = 0
    largest: int = 0
    """Bytes of the largest parameter that learns."""

    @classmethod
    def of(cls, model: nn.Module) -> _Counts:
        counts = cls()
        for p in model.parameters():
            size = p.numel() * p.element_size()
            counts.numel += p.numel()
            counts.bytes += size
            if p.requires_grad:
                counts.trained += p.numel()
                counts.trained_bytes += size
                counts.largest = max(counts.largest, size)
        return counts


@dataclass
class _MethodMemory:
    """What the methods add, in bytes of one GPU."""

    state: int = 0
    teacher: int = 0
    losses: list[Loss] = field(default_factory=list)
    stored_losses: list[Loss] | None = None
    """Of a micro-batch of stored rows that comes in place of one of new rows."""
    stored_teacher: int = 0
    """Signals of a teacher that such a micro-batch brings."""
    seam: list[tuple[_Shape, int]] = field(default_factory=list)
    """Backwards at the seam: the micro-batch, and what is kept beside it."""
    seam_scratch: int = 0
    step_scratch: int = 0
    end_scratch: int = 0
    notes: list[str] = field(default_factory=list)


def _method_memory(
    methods: Sequence[ContinualMethod[Any]],
    simulation: _Simulation,
    counts: _Counts,
    shape: _Shape,
    plan: Plan,
    tasks: int,
    device: str,
) -> _MethodMemory:
    found = _MethodMemory()
    shards = plan.world_size if plan.shards_optimizer else 1
    copy_of_all = -(-counts.trained * FLOAT // shards)
    """One float32 copy of what learns, as far as this process holds it."""
    weights = counts.trained_bytes // (plan.world_size if plan.shards_weights else 1)
    later = tasks > 1
    for method in methods:
        c: Any = method.config
        if isinstance(method, MIGU):
            view: Any = SimpleNamespace(model=simulation.model, lora=LoraView(simulation.model))
            targets = find_targets(view, c)
            rows = sum(target.rows for target in targets)
            found.state += 4 * FLOAT * rows  # magnitude, mask, updates, and the mask in the dtype of the gradients
            if c.mask == "update":  # the weights and their moments, as they were before the step
                masked = sum(simulation.trained[target.weight].numel() for target in targets)
                found.step_scratch += -(-3 * FLOAT * masked // shards)
        elif isinstance(method, SkillFusion):
            units = sum(p.numel() for p in simulation.trained.values() if p.dim() >= c.min_ndim)
            found.state += -(-(3 if c.average == "run" else 2) * FLOAT * units // shards)
            found.step_scratch = max(found.step_scratch, _tracker_scratch(-(-units // shards), device))
            # The scores of a unit are products in float64.
            found.end_scratch = max(found.end_scratch, 3 * 8 * max(p.numel() for p in simulation.trained.values()))
            if isinstance(method, KIF) and c.orthogonality and c.orthogonality_form != "off":
                found.losses.append(_kif_loss(method))
        elif isinstance(method, EWC):
            if not c.ewc_lambda:
                continue
            trace = c.fisher == "trace"
            found.state += ((2 if later else 0) + trace) * copy_of_all
            if later:
                found.losses.append(_ewc_loss(simulation))
            if trace:
                found.seam_scratch = max(found.seam_scratch, 2 * copy_of_all)
            else:  # the sum over rows, the gradients of one and the same as a vector; with activations of one row
                row = dataclasses.replace(shape, rows=1)
                pass_ = simulation.peak(row, gradients="returned")
                end = counts.trained * FLOAT + max(pass_, counts.trained_bytes + counts.trained * FLOAT)
                found.end_scratch = max(found.end_scratch, end)
        elif isinstance(method, LwF):
            if c.weight and later:
                found.teacher += weights
                found.losses.append(_lwf_loss(shape, c.temperature))
        elif isinstance(method, (AGEM, GEM)):
            _gradient_memory(found, method, shape, plan, counts, tasks)
        elif isinstance(method, WeightEMA):
            found.state += copy_of_all if later else 0
        elif isinstance(method, FisherMerge):
            found.state += copy_of_all + (
                copy_of_all if device == "cpu" and later else 0
            )  # the sum over tasks: on the CPU
            found.seam_scratch = max(found.seam_scratch, copy_of_all)
        elif isinstance(method, ReplayDistillation):
            if later:
                _stored_memory(found, method, simulation, shape, counts, weights)
        elif isinstance(method, OLoRA):
            if later:
                found.losses.append(_olora_loss(simulation, method))
        elif type(method).__module__.rpartition(".")[0] != __package__ + ".methods":
            found.notes.append(f"what method '{method.name}' keeps is unknown here and not counted")
    return found


def _tracker_scratch(units: int, device: str) -> int:
    """The products w g: of all weights where they are few, else of a piece with both factors."""
    from .importance import CHUNK, KEPT, LARGE_CHUNK

    piece = min(units, CHUNK.get(device, LARGE_CHUNK))
    return FLOAT * ((units if units <= KEPT else piece) + 2 * piece)


def _kif_loss(method: KIF) -> Loss:
    def loss(simulation: Any, trained: dict[str, Tensor], batch: Any, outputs: Any) -> Tensor:
        groups: dict[tuple[bool, tuple[int, ...]], list[Tensor]] = {}
        for name, p in trained.items():
            is_b = "lora_B" in name or "lora_embedding_B" in name
            if is_b or "lora_A" in name or "lora_embedding_A" in name:
                groups.setdefault((is_b, tuple(p.shape)), []).append(p)
        terms = []
        for (is_b, _), tensors in groups.items():
            stacked = torch.stack([t.flatten(1) for t in tensors])
            terms.append(unit_orthogonality(stacked.mT if is_b else stacked, method.config.orthogonality_form).float())
        return torch.cat(terms).mean()

    return loss


def _ewc_loss(simulation: _Simulation) -> Loss:
    precision, centre = ([simulation.hold(*p.shape) for p in simulation.trained.values()] for _ in range(2))
    return lambda _, trained, batch, outputs: quadratic(list(trained.values()), precision, centre)


def _olora_loss(simulation: _Simulation, method: OLoRA) -> Loss:
    newest = [(n, p) for n, p in simulation.model.named_parameters() if ".lora_A." in n]
    old = [p for _, p in newest if not p.requires_grad]
    new = [p for _, p in newest if p.requires_grad]

    def loss(simulation: Any, trained: dict[str, Tensor], batch: Any, outputs: Any) -> Tensor:
        terms, per_layer = [], len(old) // max(1, len(new))
        for number, fresh in enumerate(new):
            before = old[number * per_layer : (number + 1) * per_layer]
            terms.append(old_and_new(torch.cat([t.to(fresh) for t in before])[None], fresh[None]))
        return torch.stack(terms).sum()

    return loss


def _lwf_loss(shape: _Shape, temperature: float) -> Loss:
    def loss(simulation: Any, trained: dict[str, Tensor], batch: Any, outputs: Any) -> Tensor:
        index = torch.zeros(shape.rows, shape.completion, 1, dtype=torch.long)
        inputs = dict(batch) if simulation.seq2seq else {k: v for k, v in batch.items() if k != "labels"}
        with simulation.evaluating():
            old = simulation.forward(inputs).logits
            old = old.gather(1, index.expand(-1, -1, old.shape[-1]))
        new = outputs.logits.gather(1, index.expand(-1, -1, old.shape[-1]))
        return distillation(new, old, temperature).sum()

    return loss


def _gradient_memory(found: _MethodMemory, method: Any, shape: _Shape, plan: Plan, counts: _Counts, tasks: int) -> None:
    """GEM and A-GEM: gradients of stored rows, as flat float32 vectors."""
    if tasks < 2 or method.config.count == 0 or method.config.total == 0:
        return
    c, vector = method.config, counts.trained * FLOAT
    rows = c.memory_micro_batch
    if c.memory_batch_size is not None:
        rows = min(rows, max(1, -(-c.memory_batch_size // plan.world_size)))
    for most in (c.count, c.total):
        rows = rows if most is None else min(rows, most)
    vectors = 1 if isinstance(method, AGEM) else tasks - 1
    # While rows are passed: the sum, and for GEM those of the tasks before. At the end of a pass the gradients once
    # more as a vector; then the projection, with the step's own gradient and the correction as vectors.
    found.seam.append((dataclasses.replace(shape, rows=rows), vectors * vector))
    flattened = vectors * vector + counts.trained_bytes + vector
    projection = vector * (3 if isinstance(method, AGEM) else 2 * vectors + 2)
    found.seam_scratch = max(found.seam_scratch, flattened, projection)


def _stored_memory(
    found: _MethodMemory,
    method: Any,
    simulation: _Simulation,
    shape: _Shape,
    counts: _Counts,
    weights: int,
) -> None:
    """DER++ and SEEKR: a micro-batch of stored rows, with what a teacher says of them."""
    c: Any = method.config
    rows = shape.rows if c.loss_mix == "alternate" else c.replay_batch_size or shape.rows
    stored = dataclasses.replace(shape, rows=rows)
    is_seekr = isinstance(method, SEEKR)
    needs_change = isinstance(method, SEEKR) and method._needs_change and LoraView(simulation.model).is_peft
    if c.teacher == "previous" or needs_change:
        found.teacher += weights
    if c.teacher == "tasks":
        found.teacher += weights
    maps = residual = 0
    if is_seekr and c.attention_weight:
        maps, residual = _attention_signals(method, simulation, stored)
    vocabulary = simulation.model.get_output_embeddings().weight.shape[0]
    known = c.top_k or vocabulary
    wants_logits = c.logit_weight if is_seekr else c.alpha
    signals = maps + (stored.labels * known * (FLOAT + (8 if c.top_k else 0)) if wants_logits else 0)

    values, lse = simulation.hold(stored.labels, known if wants_logits else 0), simulation.hold(stored.labels)

    def distil(simulation: Any, trained: dict[str, Tensor], batch: Any, outputs: Any) -> Tensor:
        if c.teacher != "cached":
            inputs = dict(batch) if simulation.seq2seq else {k: v for k, v in batch.items() if k != "labels"}
            with simulation.evaluating():
                simulation.forward(inputs)
        kept = torch.empty(residual, dtype=torch.uint8)
        total = torch.zeros(())
        if wants_logits:
            flat = outputs.logits.flatten(0, 1)
            student = flat[torch.zeros(stored.labels, dtype=torch.long)]
            indices = torch.zeros(stored.labels, known, dtype=torch.long) if c.top_k else None
            if isinstance(method, DERPP) and method.config.loss != "kl":
                total = total + logit_mse(student, values, indices)
            else:
                total = total + logit_kl(student, values, lse, indices)
        return total.sum() + _Keep.apply(outputs.loss, kept)

    if c.loss_mix == "alternate":
        found.stored_losses = [distil]
    else:

        def summed(simulation: Any, trained: dict[str, Tensor], batch: Any, outputs: Any) -> Tensor:
            again = stored.batch(simulation.seq2seq)
            replayed = simulation.forward(again)
            return replayed.loss + distil(simulation, trained, again, replayed)

        found.losses.append(summed)
    found.stored_teacher = max(found.stored_teacher, signals)


class _Keep(torch.autograd.Function):
    """Holds a tensor until backward, as a saved activation."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, kept: Tensor) -> Tensor:
        ctx.save_for_backward(kept)
        return value * 0

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None


def _attention_signals(method: Any, simulation: _Simulation, stored: _Shape) -> tuple[int, int]:
    """Bytes of the teacher's maps in a batch, and of what the student keeps of its own for backward."""
    c, config = method.config, simulation.model.config
    heads_each = int(config.num_attention_heads)
    modules = int(config.num_hidden_layers) * (3 if simulation.seq2seq else 1)
    layers = c.layers or min(LAYERS, modules)
    heads = c.heads or min(HEADS, layers * heads_each)
    keys = max(stored.prompt, stored.completion) if simulation.seq2seq else stored.prompt + stored.completion
    rows = min(keys, c.query_rows or keys)
    width = getattr(config, "head_dim", None) or getattr(config, "d_kv", None) or config.hidden_size // heads_each
    entries = stored.rows * heads * rows * (keys if c.attention == "weights" else width)
    size = next(simulation.model.parameters()).element_size()
    if simulation.plan.autocast is not None:
        size = 2
    # Padded to the most heads of a layer, so an uneven choice takes more; the loss works on float32 blocks.
    return entries * FLOAT, 0 if c.recompute else entries * size


# -- the optimizer -----------------------------------------------------------------------------------------------------


def _optimizer_bytes(name: str, parameters: Sequence[Tensor], master: bool, training: Any) -> int:
    """Moments of all parameters that learn, unsharded."""
    numel = sum(p.numel() for p in parameters)
    size = numel * FLOAT if master else sum(p.numel() * p.element_size() for p in parameters)
    if name in ("adamw_torch", "adamw_torch_fused", "adamw_anyprecision"):
        return 2 * size
    if name == "sgd":
        return size if "momentum" in str(training.optim_args or "") else 0
    if name in ("adagrad", "rmsprop"):
        return size
    if name in ("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit"):
        # bitsandbytes leaves tensors of fewer than 4096 elements in float32; a float32 maximum a block of 256.
        return sum(
            2 * (p.numel() + 4 * -(-p.numel() // 256)) if p.numel() >= 4096 else 8 * p.numel() for p in parameters
        )
    if name in ("lion_8bit", "paged_lion_8bit"):
        return sum(p.numel() + 4 * -(-p.numel() // 256) if p.numel() >= 4096 else 4 * p.numel() for p in parameters)
    if name in ("lion_32bit", "paged_lion_32bit"):
        return numel * FLOAT
    if name == "paged_adamw_32bit":
        return 2 * numel * FLOAT
    if name == "adafactor":
        return sum(
            FLOAT * (math.prod(p.shape[:-1]) + math.prod((*p.shape[:-2], p.shape[-1])))
            if p.dim() > 1
            else FLOAT * p.numel()
            for p in parameters
        )
    raise InputError(
        f"training.optim={name}: how much memory it keeps is unknown here; estimate with adamw_torch, "
        "adamw_torch_fused, adafactor, sgd, adagrad, rmsprop, lion_32bit or adamw_bnb_8bit"
    )


def _step_scratch(name: str, counts: _Counts, master: bool, shards: int, device: str) -> int:
    """What the optimizer's step needs for a moment."""
    size = counts.trained * FLOAT if master else counts.trained_bytes
    largest = counts.largest * (FLOAT * counts.trained // max(1, counts.trained_bytes) if master else 1)
    if name == "adafactor":
        return 4 * max(largest, counts.largest)
    if name == "adamw_torch":
        return -(-size // shards) if device != "cpu" else 2 * largest  # all tensors at once, or one at a time
    return 0


# -- the model ---------------------------------------------------------------------------------------------------------


def _empty_model(
    source: ModelConfig | nn.Module, peft: Any, methods: Sequence[ContinualMethod[Any]], tasks: int, masked: bool
) -> tuple[Any, set[str]]:
    """The model that learns the last task, on the meta device, and which of its weights are kept in 4 bits."""
    four_bit: set[str] = set()
    model: Any
    if isinstance(source, nn.Module):
        memo: dict[int, Any] = {
            id(p): nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad) for p in source.parameters()
        }
        memo |= {id(b): b.to("meta") for b in source.buffers()}
        model = copy.deepcopy(source, memo)
    else:
        config = source
        if (config.attn_implementation or "").startswith("flash"):  # needs a GPU to be built, and keeps as much as sdpa
            config = dataclasses.replace(config, attn_implementation="sdpa")
        model = load_model(
            dataclasses.replace(config, load_in_4bit=False), empty=True, masked=masked
        )  # no bitsandbytes
        wanted = config.dtype if config.dtype != "auto" else getattr(model.config, "dtype", None) or "float32"
        dtype = wanted if isinstance(wanted, torch.dtype) else getattr(torch, str(wanted))
        quantized = config.load_in_4bit
        if quantized and dtype == torch.float32:
            dtype = torch.bfloat16
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
        if quantized:
            head = model.get_output_embeddings()
            linears = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
            chosen = {id(m.weight) for m in linears}
            for parameter in model.parameters():
                parameter.requires_grad_(False)
    with torch.device("meta"):
        if peft is not None and not LoraView(model).is_peft:
            model = apply_lora(model, peft)
        if any(isinstance(method, (IncLoRA, OLoRA)) for method in methods):
            for task in range(1, tasks):
                LoraView(model, 0).add(f"task{task}", "estimate")
    if not isinstance(source, nn.Module) and quantized:
        four_bit = {name for name, p in model.named_parameters() if id(p) in chosen}
    return model, four_bit


def _weights(model: Any, counts: _Counts, plan: Plan, four_bit: set[str]) -> int:
    """Bytes of the weights on one GPU, and of those that are gathered for the layer at work."""
    size = plan.half.itemsize if plan.half is not None else None
    whole = saved = largest = 0
    for name, p in model.named_parameters():
        each = p.element_size() if size is None else size
        whole += p.numel() * each
        if (
            name in four_bit
        ):  # a float32 maximum for each block of 64, if not quantised; one weight is unpacked at a time
            saved += p.numel() * each - p.numel() // 2 - p.numel() * FLOAT // 64
            largest = max(largest, p.numel() * each)
    if plan.backend == "fsdp2":
        named = list(model.named_parameters())
        shards = sum(p.numel() * (FLOAT if p.requires_grad and size else p.element_size()) for _, p in named)
        layers, rest = _layers(model)
        gathered = sum(p.numel() * (size or p.element_size()) for p in rest)
        gathered += 2 * max((sum(p.numel() * (size or p.element_size()) for p in layer) for layer in layers), default=0)
        return -(-shards // plan.world_size) + gathered
    if plan.backend == "zero3":
        kept = 0 if plan.offload_param else -(-whole // plan.world_size)
        return kept + min(counts.numel, plan.live) * whole // counts.numel
    return whole - saved + largest


def _layers(model: Any) -> tuple[list[list[Tensor]], list[Tensor]]:
    """Parameters of each repeated layer, and of everything else."""
    classes = set(getattr(model, "_no_split_modules", None) or ())
    layers = [list(m.parameters()) for m in model.modules() if type(m).__name__ in classes]
    inside = {id(p) for layer in layers for p in layer}
    return layers, [p for p in model.parameters() if id(p) not in inside]


def _gradients(counts: _Counts, plan: Plan, model: Any) -> tuple[int, int]:
    """Bytes of the gradients that stay until the step, and of what they are reduced in."""
    whole = counts.trained_bytes
    if plan.zero:
        hidden = int(getattr(model.config, "hidden_size", None) or getattr(model.config, "d_model", 0) or 0)
        bucket = plan.bucket if plan.bucket is not None else hidden * hidden
        buffer = plan.buckets * bucket * (plan.half.itemsize if plan.half is not None else FLOAT)
        shards = plan.world_size if plan.shards_gradients else 1
        return (0 if plan.offload_optimizer and plan.shards_gradients else -(-whole // shards)), buffer
    if plan.backend == "fsdp2":
        layers, _ = _layers(model)
        widest = max((sum(p.numel() for p in layer if p.requires_grad) for layer in layers), default=0)
        width = FLOAT if plan.half is not None else whole // max(1, counts.trained)
        return -(-counts.trained * width // plan.world_size), widest * FLOAT
    return whole, whole if plan.backend in ("ddp", "zero0") and plan.world_size > 1 else 0


# -- the estimate ------------------------------------------------------------------------------------------------------


def estimate(
    model: ModelConfig | nn.Module,
    *,
    peft: Any = None,
    training: Mapping[str, Any] | None = None,
    methods: Sequence[Any] = (),
    data: DataConfig | None = None,
    gpus: int = 1,
    tasks: int = 2,
    device: str = "cuda",
    plan: Plan | None = None,
    masked: bool = False,
) -> MemoryEstimate:
    """Memory of one GPU in the last of `tasks` tasks, without loading or computing anything.

    Args:
        model: the recipe's `model:`, or a model, which is not changed.
        peft: `LoraConfig` or its options; None trains all weights, or what learns in a given model.
        training: the recipe's `training:`.
        methods: names, mappings or objects.
        data: `max_prompt_length` and `max_completion_length`; each row is taken to be that long.
        gpus: processes, one a GPU.
        tasks: how many there are; most methods keep nothing before the second.
        device: `cuda`, or `cpu` for what the same training takes on a CPU.
        plan: in place of what `training` says about sharding and precision.
        masked: a model that is named learns with the head of a masked language model (tasks of kind `mlm`).

    Raises:
        InputError: if the model cannot be found, an option cannot be, or the optimizer is unknown here.
    """
    options = dict(training or {})
    plan = plan or plan_of(options, gpus)
    listed = methods if isinstance(methods, MethodList) else MethodList(methods)
    args: Any = make_training_args(
        {"output_dir": "unused", "use_cpu": True, **{k: v for k, v in options.items() if k in _READ}}, seq2seq=True
    )
    data = data or DataConfig()
    empty, four_bit = _empty_model(model, peft, listed, tasks, masked)
    whole = _Counts.of(empty)
    if whole.trained == 0:
        raise InputError("the model has no parameter that learns; leave some unfrozen, or give peft options")
    persistent = _weights(empty, whole, plan, four_bit)
    checkpointing: Mapping[str, Any] | None = None
    if args.activation_checkpointing:
        checkpointing = dict(args.activation_checkpointing_kwargs or {})
    simulation = _Simulation(empty, plan, checkpointing)
    counts = _Counts.of(simulation.model)
    shape = _Shape(args.per_device_train_batch_size, data.max_prompt_length, data.max_completion_length)
    memory = _method_memory(list(listed), simulation, counts, shape, plan, tasks, device)

    master = plan.zero is not None
    parameters = list(simulation.trained.values())
    name = str(getattr(args.optim, "value", args.optim))
    shards = plan.world_size if plan.shards_optimizer else 1
    fsdp_float = plan.backend == "fsdp2" and plan.half is not None
    wide = master or fsdp_float
    optimizer = _optimizer_bytes(name, parameters, wide, args) + (counts.trained * FLOAT if master else 0)
    optimizer_whole = optimizer
    optimizer = 0 if plan.offload_optimizer else -(-optimizer // shards)
    gradients, bucket = _gradients(counts, plan, simulation.model)

    accumulates = args.gradient_accumulation_steps > 1
    mode: Any = "released" if plan.shards_gradients else "kept" if accumulates else "new"
    beside = counts.trained_bytes if mode == "kept" else gradients if mode == "released" else 0
    moments = {"forward and backward": simulation.peak(shape, memory.losses, mode) + beside}
    if memory.stored_losses is not None:
        rows = simulation.peak(shape, [*memory.losses, *memory.stored_losses], mode)
        moments["stored rows"] = rows + beside + memory.stored_teacher
    elif memory.stored_teacher:
        moments["forward and backward"] += memory.stored_teacher
    # At the seam and in the step all gradients are there.
    there = gradients if plan.shards_gradients else counts.trained_bytes
    for rows_at_seam, kept in memory.seam:
        moments["gradients of stored rows"] = there + kept + simulation.peak(rows_at_seam, gradients="returned")
    if memory.seam_scratch:
        moments["gradients of the methods"] = there + memory.seam_scratch
    step = _step_scratch(name, counts, wide, shards, device)
    if master and plan.half is not None and not plan.offload_optimizer:
        step += -(-counts.trained * FLOAT // shards)  # the gradients once more, in float32
    moments["optimizer step"] = there + max(step, memory.step_scratch)
    if memory.end_scratch:
        moments["end of a task"] = memory.end_scratch
    if device == "cpu" and listed.merges:
        memory.state += counts.trained_bytes  # the weights from before the task; a GPU leaves them to the CPU
        if tasks > 1:  # those from after it, the merged ones, and one tensor at work
            moments["merge"] = 2 * counts.trained_bytes + 2 * counts.largest
            moments["merge"] += counts.trained_bytes if any(isinstance(m, FisherMerge) for m in listed) else 0
    moment = max(moments, key=lambda key: moments[key])

    teacher, peak = memory.teacher, moments[moment]
    if memory.stored_teacher and moment in ("stored rows", "forward and backward"):
        teacher, peak = teacher + memory.stored_teacher, peak - memory.stored_teacher
    notes = [*memory.notes, *_notes(plan, counts, optimizer_whole, bucket, whole)]
    if checkpointing is not None and checkpointing.get("offload"):
        notes.append("activations that are offloaded to the CPU are counted as if they stayed")
    return MemoryEstimate(
        weights=persistent,
        gradients=gradients + bucket,
        optimizer=optimizer,
        activations=max(0, peak - there),
        method_state=memory.state,
        teacher_cache=teacher,
        reserve=RESERVE if device != "cpu" else 0,
        moment=moment,
        backend=plan.backend,
        parameters=whole.numel,
        trainable=whole.trained,
        notes=tuple(notes),
    )


def _notes(plan: Plan, counts: _Counts, optimizer: int, bucket: int, whole: _Counts) -> list[str]:
    """What the numbers alone would not say."""
    notes = []
    if plan.offload_optimizer or plan.offload_param:
        host = (optimizer + counts.trained * FLOAT if plan.offload_optimizer else 0) + (
            2 * whole.numel if plan.offload_param else 0
        )
        notes.append(f"offloaded to the memory of the hosts, all together: about {host / 1e9:.3g} GB")
    if bucket:
        notes.append(f"gradients: {bucket / 1e9:.2f} GB of them are DeepSpeed's buckets, whatever is trained")
    if plan.zero is None and counts.trained and counts.trained_bytes < FLOAT * counts.trained:
        notes.append(
            f"{plan.backend}: weights that learn, their gradients and moments are in 16 bits; DeepSpeed keeps float32 "
            "weights and moments, so the two do not train alike"
        )
    return notes
