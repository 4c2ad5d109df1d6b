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
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .errors import InputError
from .lora import LoraView
from .memory_of_methods import method_memory
from .memory_simulation import FLOAT, Counts, Shape, Simulation
from .methods.base import ContinualMethod, MethodList
from .methods.fisher_merge import FisherMerge
from .methods.inclora import IncLoRA
from .methods.olora import OLoRA
from .models import ModelConfig, apply_lora, load_model
from .task_queue import DataConfig
from .training_args import make_training_args

__all__ = ["MemoryEstimate", "Plan", "estimate", "parse_size", "plan_of"]

Backend = Literal["single", "ddp", "fsdp2", "zero0", "zero1", "zero2", "zero3"]

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


def _step_scratch(name: str, counts: Counts, master: bool, shards: int, device: str) -> int:
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


def _weights(model: Any, counts: Counts, plan: Plan, four_bit: set[str]) -> int:
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


def _gradients(counts: Counts, plan: Plan, model: Any) -> tuple[int, int]:
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
    whole = Counts.of(empty)
    if whole.trained == 0:
        raise InputError("the model has no parameter that learns; leave some unfrozen, or give peft options")
    persistent = _weights(empty, whole, plan, four_bit)
    checkpointing: Mapping[str, Any] | None = None
    if args.activation_checkpointing:
        checkpointing = dict(args.activation_checkpointing_kwargs or {})
    simulation = Simulation(empty, plan, checkpointing)
    counts = Counts.of(simulation.model)
    shape = Shape(args.per_device_train_batch_size, data.max_prompt_length, data.max_completion_length)
    memory = method_memory(list(listed), simulation, counts, shape, plan, tasks, device)

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


def _notes(plan: Plan, counts: Counts, optimizer: int, bucket: int, whole: Counts) -> list[str]:
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
