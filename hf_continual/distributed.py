"""Ranks, shards and the gradient seam: the only file that knows what runs the processes.

**The seam** is the one moment at which methods read and edit gradients: after accumulation and reduction, before
clipping and the optimizer step. On one process, under DDP and FSDP2 that is the end of `Trainer.training_step` on the
last micro-batch; DeepSpeed steps inside of it, so there it is the beginning of `engine.step`, wrapped on the instance.
`Trainer.on_pre_optimizer_step` is the wrong place: it runs after clipping everywhere, and after the update under
DeepSpeed. Methods only ever see the `GradView` they are handed.

**Shards.** FSDP2 and ZeRO give each rank a part of a gradient. Every such part is a contiguous piece of the flattened
tensor, so a shard is (start, numel), and masks and statistics are cut to it instead of gathering gradients.

| backend | weights in the forward | gradient at the seam | what the optimizer holds |
|---|---|---|---|
| single, ddp, zero0 | whole | whole | whole |
| fsdp2 | gathered, layer by layer | rows of this rank | rows of this rank |
| zero1, zero2 | whole | a piece of some parameters | float32 pieces in one flat tensor a group |
| zero3 | gathered, module by module | a piece of each parameter | the same |
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .errors import InputError

BACKENDS = ("single", "ddp", "fsdp2", "zero0", "zero1", "zero2", "zero3")
ALL_BACKENDS = frozenset(BACKENDS)
WHOLE_WEIGHTS = ALL_BACKENDS - {"fsdp2", "zero3"}
"""Backends on which every rank has every weight between the steps."""
WHOLE_GRADIENTS = frozenset({"single", "ddp", "zero0"})

T = TypeVar("T")


def detect_backend(accelerator: Accelerator | None) -> str:
    """One of `BACKENDS`, or `fsdp1`."""
    if accelerator is None or accelerator.distributed_type == DistributedType.NO:
        return "single"
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return f"zero{accelerator.state.deepspeed_plugin.zero_stage}"
    if accelerator.distributed_type == DistributedType.FSDP:
        return "fsdp2" if accelerator.is_fsdp2 else "fsdp1"
    return "ddp"


# -- processes ---------------------------------------------------------------------------------------------------------


class Processes:
    """The processes that a launcher started, before and beside any Trainer.

    Values go from rank to rank as JSON, so only what JSON can hold.
    """

    def __init__(self) -> None:
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def _group(self) -> Any:
        """A gloo group beside that of the training.

        What the processes agree on is on the CPU: NCCL would wait for the GPU at each word, and for ever where another
        process is gone; gloo says so at once.
        """
        global _beside
        if not dist.is_initialized():
            from accelerate import PartialState

            PartialState(cpu=not torch.accelerator.is_available(), timeout=PATIENCE)
        if _beside is None or _beside[0] is not dist.group.WORLD:
            _beside = (dist.group.WORLD, dist.new_group(backend="gloo", timeout=PATIENCE))
            atexit.register(leave_gloo)
        return _beside[1]

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier(group=self._group())

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on any rank."""
        if self.world_size == 1:
            return flag
        found = torch.tensor([int(flag)])
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self._group())
        return bool(found)

    def broadcast(self, value: T) -> T:
        """Rank 0's `value`, on every rank."""
        if self.world_size == 1:
            return value
        group = self._group()
        text = torch.tensor(list(json.dumps(value if self.is_main else None).encode()), dtype=torch.uint8)
        size = torch.tensor([len(text)])
        dist.broadcast(size, 0, group=group)
        buffer = text if self.is_main else torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(buffer, 0, group=group)
        return json.loads(bytes(buffer.tolist()))  # type: ignore[no-any-return]

    def on_main(self, function: Callable[[], T]) -> T:
        """Run `function` on rank 0; every rank gets its result, or its `InputError`."""
        if self.world_size == 1:
            return function()
        answer: dict[str, Any] = {}
        error: BaseException | None = None
        if self.is_main:
            try:
                answer = {"value": function()}
            except BaseException as raised:
                error = raised
                text = str(raised) if isinstance(raised, InputError) else f"rank 0 stopped ({raised!r})"
                answer = {"error": text}
        answer = self.broadcast(answer)
        if error is not None:
            raise error
        if "error" in answer:
            raise InputError(answer["error"])
        return answer["value"]  # type: ignore[no-any-return]


def processes() -> Processes:
    return Processes()


PATIENCE = timedelta(hours=2)  # rank 0 may write a large model meanwhile
_beside: tuple[Any, Any] | None = None
"""The process group of the training, and the one that `Processes` made beside it."""


def leave_gloo() -> None:
    """End gloo's process groups before the interpreter ends, which its threads would now and then abort (SIGABRT)."""
    global _beside
    beside, _beside = _beside, None
    if not dist.is_initialized():
        return
    if "gloo" in dist.get_backend():
        dist.destroy_process_group()
    elif beside is not None and beside[0] is dist.group.WORLD:
        dist.destroy_process_group(beside[1])
    else:
        return
    time.sleep(0.3)  # the threads end a little later


class Distributed:
    """What a method may ask about processes.

    Args:
        accelerator (`accelerate.Accelerator`, *optional*): the Trainer's; without one this is a single process.
    """

    def __init__(self, accelerator: Accelerator | None = None) -> None:
        self.accelerator = accelerator
        self.backend = detect_backend(accelerator)
        self.world_size = accelerator.num_processes if accelerator is not None else 1
        self.rank = accelerator.process_index if accelerator is not None else 0
        self.engine: Any = None
        """DeepSpeed's, while it trains."""
        if self.world_size > 1:
            atexit.register(leave_gloo)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        """Whether a rank sees only its part of the gradients."""
        return self.backend not in WHOLE_GRADIENTS

    @property
    def whole_weights(self) -> bool:
        """Whether every rank has every weight between the steps."""
        return self.backend in WHOLE_WEIGHTS

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum `tensor` over ranks in place: one collective, nothing on a single process. Returns `tensor`."""
        if self.world_size > 1:
            if tensor.device.type == "cpu" and dist.get_backend() == "nccl":
                assert self.accelerator is not None
                there = tensor.to(self.accelerator.device)
                dist.all_reduce(there)
                return tensor.copy_(there)
            dist.all_reduce(tensor)
        return tensor

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def grad_scale(self) -> float:
        """The fp16 loss scale still in the gradients at the seam; 1.0 without one."""
        if self.engine is not None:
            if not self.engine.fp16_enabled():
                return 1.0
            return float(self.engine.optimizer.loss_scale)
        scaler = getattr(self.accelerator, "scaler", None)
        return float(scaler.get_scale()) if scaler is not None and scaler.is_enabled() else 1.0

    @property
    def step_was_skipped(self) -> bool:
        """Whether the fp16 scaler skipped the optimizer step just taken."""
        return self.accelerator is not None and bool(self.accelerator.optimizer_step_was_skipped)


# -- whole weights -----------------------------------------------------------------------------------------------------


def is_partitioned(parameter: Tensor) -> bool:
    """Whether this rank holds only a part of the weight (FSDP2, ZeRO-3)."""
    return isinstance(parameter, DTensor) or hasattr(parameter, "ds_id")


def own_part(parameter: Tensor) -> Tensor:
    """What this rank holds of a weight."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def full_shape(parameter: Tensor) -> torch.Size:
    """The shape of the whole weight; that of a ZeRO-3 parameter itself is (0,)."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


@torch.no_grad()
def full(parameters: Mapping[str, Any]) -> dict[str, Tensor]:
    """Whole copies of weights on the CPU, on every rank. Where weights are sharded, every rank must call it."""
    copies = {}
    for name, p in parameters.items():
        if isinstance(p, DTensor):
            copies[name] = p.full_tensor().detach().cpu().clone()
        elif hasattr(p, "ds_id"):
            with _gather([p]):
                copies[name] = p.detach().cpu().clone()
        else:
            copies[name] = p.detach().cpu().clone()
    return copies


@torch.no_grad()
def assign_(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    """Write whole values, the same on every rank, into weights that may be sharded. Every rank must call it."""
    for name, value in values.items():
        p = parameters[name]
        if isinstance(p, DTensor):
            start, shape = _dtensor_place(p)
            local = p.to_local()
            local.copy_(value.reshape(-1)[start : start + local.numel()].view(shape).to(local.device, local.dtype))
        elif hasattr(p, "ds_id"):
            with _gather([p], modifier_rank=0):
                p.copy_(value.to(p.device, p.dtype))
        else:
            p.copy_(value.to(p.device))


def _gather(parameters: list[Any], modifier_rank: int | None = None) -> Any:
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=modifier_rank)


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Every weight whole on every rank inside of the block (ZeRO-3, FSDP2): for generation, at the cost of a copy."""
    parameters = [p for p in model.parameters() if hasattr(p, "ds_id")]
    shards = _fsdp_modules(model)
    with _gather(parameters) if parameters else nullcontext():
        for module in shards:
            module.unshard()
        try:
            yield
        finally:
            for module in shards:
                module.reshard()


def refuse_partitioned(model: nn.Module, what: str) -> None:
    """ZeRO-3 and FSDP2 leave empty or partial tensors in the model, which a save or a merge would take as they are."""
    for name, p in model.named_parameters():
        if is_partitioned(p):
            raise InputError(
                f"{what}: the weight '{name}' is split between the processes; use trainer.save_model(), or load the "
                "saved model in a process without DeepSpeed or FSDP"
            )


# -- shards ------------------------------------------------------------------------------------------------------------


def _dtensor_place(parameter: DTensor) -> tuple[int, torch.Size]:
    """Where a rank's rows begin in the flattened weight, and their shape."""
    from torch.distributed.tensor import Shard as ShardPlacement
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    for placement in parameter.placements:
        if isinstance(placement, ShardPlacement) and placement.dim != 0:
            raise InputError(
                f"a weight is sharded along dimension {placement.dim}, by tensor parallelism for instance; the methods "
                "follow FSDP2, which shards along the first"
            )
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    row = parameter.shape[1:].numel()  # not that of `parameter[0]`, which would be collected
    return int(offset[0]) * row, torch.Size(shape)


class Shard:
    """This rank's part of a parameter, its gradient and its place in the optimizer; here, all of it.

    Attributes:
        shape: of the whole parameter.
        start, numel: the part, in the flattened parameter.
    """

    def __init__(self, parameter: Any) -> None:
        self.parameter = parameter
        self.shape = full_shape(parameter)
        self.start, self.numel = 0, self.shape.numel()
        self.local_shape = self.shape

    def weight(self) -> Tensor:
        return self.parameter.detach()  # type: ignore[no-any-return]

    def grad(self) -> Tensor | None:
        """Accumulated, reduced, unclipped; a view that may be written to."""
        return self.parameter.grad  # type: ignore[no-any-return]

    def set_grad(self, value: Tensor) -> None:
        if self.parameter.grad is None:
            self.parameter.grad = torch.empty_like(self.parameter)
        self.parameter.grad.copy_(value)

    def slot(self) -> tuple[Any, int]:
        """The optimizer's tensor that holds this part, and where in it the part begins."""
        return self.parameter, 0

    def cut(self, whole: Tensor) -> Tensor:
        """This part of a tensor that broadcasts to `shape`, such as a row mask [rows, 1]; not all of it is built."""
        if self.numel == self.shape.numel():
            return whole if self.local_shape == self.shape else whole.expand(self.shape).reshape(self.local_shape)
        if not self.numel:
            return whole.new_zeros(self.local_shape)
        expanded = whole.expand(self.shape or (1,))
        row = self.shape[1:].numel() if len(self.shape) > 1 else 1
        first, last = self.start // row, (self.start + self.numel - 1) // row
        rows = expanded[first : last + 1].reshape(-1)
        begin = self.start - first * row
        return rows[begin : begin + self.numel].view(self.local_shape)


class _DTensorShard(Shard):
    def __init__(self, parameter: Any) -> None:
        super().__init__(parameter)
        self.start, self.local_shape = _dtensor_place(parameter)
        self.numel = self.local_shape.numel()

    def weight(self) -> Tensor:
        return self.parameter.detach().to_local()  # type: ignore[no-any-return]

    def grad(self) -> Tensor | None:
        grad = self.parameter.grad
        return None if grad is None else grad.to_local()  # type: ignore[no-any-return]

    def set_grad(self, value: Tensor) -> None:
        if self.parameter.grad is None:
            self.parameter.grad = torch.zeros_like(self.parameter)
        self.parameter.grad.to_local().copy_(value)


class _FragmentShard(Shard):
    """ZeRO-1 and -2. `_hp_mapping` is DeepSpeed's link from a parameter to this rank's float32 piece of it."""

    def __init__(self, parameter: Any, optimizer: Any) -> None:
        super().__init__(parameter)
        self.mapping, self.optimizer = parameter._hp_mapping, optimizer
        if self.mapping is None:  # all of it is another rank's
            self.start, self.numel = 0, 0
        else:
            address = self.mapping.lp_fragment_address
            self.start, self.numel = int(address.start), int(address.numel)
        self.local_shape = torch.Size([self.numel])

    def weight(self) -> Tensor:
        if self.mapping is None:
            return self.parameter.new_zeros(0, dtype=torch.float32)  # type: ignore[no-any-return]
        return self.mapping.hp_fragment.detach()  # type: ignore[no-any-return]

    def grad(self) -> Tensor | None:
        if self.mapping is None:
            return None
        grad = self.mapping.get_lp_grad_fragment(self.parameter._index_in_param_group).view(-1)
        return grad if grad.numel() == self.numel else grad.narrow(0, self.start, self.numel)  # type: ignore[no-any-return]

    def set_grad(self, value: Tensor) -> None:
        grad = self.grad()
        if grad is not None:
            grad.copy_(value)

    def slot(self) -> tuple[Any, int]:
        if self.mapping is None:
            return None, 0
        of_bf16 = getattr(self.optimizer, "fp32_groups_flat_partition", None)  # ZeRO-1 in bf16 has its own optimizer
        flats = of_bf16 if of_bf16 is not None else self.optimizer.single_partition_of_fp32_groups
        return flats[self.mapping.param_group_index], int(self.mapping.hp_fragment_address.start)


class _PartitionShard(Shard):
    """ZeRO-3: partitions of equal size, the last one padded."""

    def __init__(self, parameter: Any, optimizer: Any, rank: int) -> None:
        super().__init__(parameter)
        self.optimizer = optimizer
        size = int(parameter.ds_tensor.ds_numel)
        self.start = min(rank * size, self.shape.numel())
        self.numel = max(0, min(size, self.shape.numel() - self.start))
        self.local_shape = torch.Size([self.numel])

    def _group(self) -> tuple[int, int]:
        group, start, _ = self.optimizer.grad_position[self.optimizer.get_param_id(self.parameter)]
        return group, start

    def weight(self) -> Tensor:
        from deepspeed.utils import safe_get_local_fp32_param

        return safe_get_local_fp32_param(self.parameter).detach().view(-1)[: self.numel]  # type: ignore[no-any-return]

    def grad(self) -> Tensor | None:
        from deepspeed.utils import safe_get_local_grad

        grad = safe_get_local_grad(self.parameter)
        return None if grad is None else grad.view(-1)[: self.numel]

    def set_grad(self, value: Tensor) -> None:
        from deepspeed.utils import safe_get_local_grad, safe_set_local_grad

        grad = safe_get_local_grad(self.parameter)
        if grad is None:
            return
        grad = grad.clone()
        grad.view(-1)[: self.numel] = value
        safe_set_local_grad(self.parameter, grad)

    def slot(self) -> tuple[Any, int]:
        group, start = self._group()
        return self.optimizer.fp32_partitioned_groups_flat[group], int(start)


def make_shard(parameter: Any, distributed: Distributed) -> Shard:
    """This rank's part of a parameter that is being trained."""
    if isinstance(parameter, DTensor):
        return _DTensorShard(parameter)
    if distributed.engine is not None and hasattr(parameter, "ds_id"):
        return _PartitionShard(parameter, distributed.engine.optimizer, distributed.rank)
    if distributed.engine is not None and hasattr(parameter, "_hp_mapping"):
        return _FragmentShard(parameter, distributed.engine.optimizer)
    return Shard(parameter)


class Layout:
    """How one float32 vector over several parameters lies on the ranks."""

    def __init__(self, shards: Sequence[Shard], distributed: Distributed) -> None:
        self.shards, self.distributed = list(shards), distributed
        self.size = sum(shard.shape.numel() for shard in self.shards)
        self.local_size = sum(shard.numel for shard in self.shards)

    def gather(self, local: Tensor) -> Tensor:
        """The whole vector, on the CPU of every rank: one collective."""
        whole = torch.zeros(self.size, device=local.device, dtype=local.dtype)
        start = 0
        for shard, piece in zip(self.shards, local.split([s.numel for s in self.shards]), strict=True):
            whole[start + shard.start : start + shard.start + shard.numel] = piece
            start += shard.shape.numel()
        return self.distributed.sum_(whole).cpu()

    def scatter(self, whole: Tensor) -> Tensor:
        """This rank's part of a whole vector."""
        pieces, start = [], 0
        for shard in self.shards:
            pieces.append(whole[start + shard.start : start + shard.start + shard.numel])
            start += shard.shape.numel()
        return torch.cat(pieces) if pieces else whole

    def total(self, values: Tensor) -> Tensor:
        """The sum over ranks of sums over their parts."""
        return self.distributed.sum_(values.clone())


# -- beside the training -----------------------------------------------------------------------------------------------


def _own(parameter: Any, distributed: Distributed) -> tuple[Shard, Tensor]:
    """What this rank holds of a weight, trained or not: its place, and the tensor that forwards are gathered from."""
    if isinstance(parameter, DTensor):
        return _DTensorShard(parameter), parameter.to_local().detach()
    if hasattr(parameter, "ds_id"):
        shard = _PartitionShard(parameter, None, distributed.rank)
        return shard, parameter.ds_tensor.detach().view(-1)[: shard.numel]
    return Shard(parameter), parameter.detach()


@torch.no_grad()
def own_parts(
    parameters: Mapping[str, nn.Parameter], weights: Mapping[str, Tensor], distributed: Distributed
) -> dict[str, Tensor]:
    """This rank's parts of whole `weights`, where the parameters lie; parts stay what they are."""
    parts = {}
    for name, weight in weights.items():
        shard, held = _own(parameters[name], distributed)
        if weight.shape == shard.shape:
            weight = shard.cut(weight.to(held.device)).reshape(held.shape)
        parts[name] = weight.to(held.device)
    return parts


@torch.no_grad()
def own_copies(parameters: Mapping[str, nn.Parameter], distributed: Distributed) -> dict[str, Tensor]:
    """Copies of what this rank holds of weights: all of them, where they are not split."""
    return {name: _own(p, distributed)[1].clone() for name, p in parameters.items()}


@contextmanager
def other_weights(model: nn.Module, weights: dict[str, Tensor], distributed: Distributed) -> Iterator[None]:
    """`weights` in the place of the model's, where these are split; for forwards without gradients.

    What was collected of other weights is given up before and after. Of `weights` this rank keeps no more than its
    part. Every rank must enter it.
    """
    _give_up_gathered(model, distributed)
    parameters = dict(model.named_parameters())
    weights.update(own_parts(parameters, weights, distributed))
    held = [_own(parameters[name], distributed)[1] for name in weights]
    before = [tensor.clone() for tensor in held]
    _copy(held, list(weights.values()))
    try:
        yield
    finally:
        _give_up_gathered(model, distributed)
        _copy(held, before)


@torch.no_grad()
def _copy(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for target, value in zip(targets, values, strict=True):
        target.copy_(value)


def _give_up_gathered(model: nn.Module, distributed: Distributed) -> None:
    """Nothing stays of the weights that were last collected for a forward, so that the next one collects them anew."""
    if distributed.engine is not None:
        distributed.engine.optimizer.empty_partition_cache()
    for module in _fsdp_modules(model):
        module.reshard()


def _fsdp_modules(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if hasattr(m, "unshard") and hasattr(m, "reshard")]


class SideGradients:
    """Gradients of losses beside those of the training: nothing is written to `.grad`, and nothing is reduced.

    On every backend they are whole and those of this rank's rows. Where weights are split every rank must run as many
    forwards and ask for as many gradients: see `rounds`.
    """

    def __init__(self, model: nn.Module, distributed: Distributed) -> None:
        self._model, self._distributed = model, distributed
        self._gathered: dict[int, Tensor] = {}

    def rounds(self, rows: Sequence[T], size: int = 1) -> Iterator[tuple[Sequence[T], bool]]:
        """This rank's share of `rows` in lists of at most `size`, and whether they count.

        Where weights are split, a rank that has no rows left goes through one that does not count.
        """
        rank, world = self._distributed.rank, self._distributed.world_size
        own = rows[rank::world]
        most = len(own) if self._distributed.whole_weights else len(rows[::world])
        for start in range(0, most, size):
            part = own[start : start + size]
            yield (part, True) if len(part) else (rows[:1], False)

    def flat(self, loss: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
        """The gradient of `loss` as one float32 vector over the whole parameters; zeros where they are not in it."""
        tensors = [self._in_forward(p) for p in parameters]
        gradients = torch.autograd.grad(loss, tensors, allow_unused=True)
        if self._distributed.backend == "zero3":  # whose `engine.backward` lets go of what some hooks have missed
            _give_up_gathered(self._model, self._distributed)
        pieces = [
            torch.zeros(full_shape(p).numel(), device=loss.device) if g is None else g.detach().reshape(-1).float()
            for p, g in zip(parameters, gradients, strict=True)
        ]
        return torch.cat(pieces)

    def _in_forward(self, parameter: Any) -> Any:
        """The tensor that stands for a parameter in a forward: FSDP2 has another, the same one at each step."""
        if not isinstance(parameter, DTensor):
            return parameter
        if id(parameter) not in self._gathered:
            _give_up_gathered(self._model, self._distributed)  # such as what a forward keeps for its backward
            of_name = dict(self._model.named_parameters())
            for module in _fsdp_modules(self._model):  # one after the other: all of the weights may not fit
                module.unshard()
                for name, whole in self._model.named_parameters():
                    if isinstance(of_name[name], DTensor) and not isinstance(whole, DTensor):
                        self._gathered[id(of_name[name])] = whole
                module.reshard()
        return self._gathered[id(parameter)]


# -- the seam ----------------------------------------------------------------------------------------------------------


class GradView:
    """The gradients of the trainable parameters at the seam, by their name in the unwrapped model.

    Where gradients are sharded, `lists`, `mul_`, `flat` and `freeze_` work on this rank's part without communication;
    `read` and `set_` take whole tensors, and every rank must call `read`.
    """

    def __init__(self, model: nn.Module, distributed: Distributed) -> None:
        self.distributed = distributed
        self._model = model
        self._frozen_rows: list[tuple[str, Tensor]] = []
        self._applied: dict[int, Tensor] = {}
        self._stepped = False
        self.bind()

    def bind(self) -> None:
        """Look the parameters up: FSDP2 replaces them when it wraps the model, DeepSpeed gives them their pieces."""
        named = {name: p for name, p in self._model.named_parameters() if p.requires_grad}
        ready = self.distributed.engine is not None or not self.distributed.backend.startswith("zero")
        self._parameters = named
        self._shards = {name: make_shard(p, self.distributed) for name, p in named.items()} if ready else {}

    def names(self) -> Iterable[str]:
        return self._parameters.keys()

    def parameter(self, name: str) -> nn.Parameter:
        return self._parameters[name]

    def items(self) -> Iterator[tuple[str, Tensor | None]]:
        """Names and this rank's part of the gradients, with the fp16 loss scale in them."""
        return ((name, self._grad(shard)) for name, shard in self._shards.items())

    def _grad(self, shard: Shard) -> Tensor | None:
        """At the seam, the gradient; after the step, that which the optimizer applied."""
        if self._stepped and self.distributed.engine is not None:
            flat, start = shard.slot()
            applied = None if flat is None else self._applied.get(id(flat))
            if applied is None:
                return None
            if isinstance(flat, nn.Parameter) and flat is shard.parameter:
                return applied
            return applied.view(-1)[start : start + shard.numel].view(shard.local_shape)
        return shard.grad()

    def read(self, name: str) -> Tensor | None:
        """The accumulated, reduced, unclipped gradient without the fp16 loss scale, or None. Do not write to it."""
        shard, scale = self._shards[name], self.distributed.grad_scale()
        grad = self._grad(shard)
        if self.distributed.sharded:
            layout = self.layout([name])
            local = torch.zeros(shard.numel, device=shard.weight().device) if grad is None else grad.reshape(-1)
            grad = layout.gather(local.float()).view(shard.shape).to(local.device)
        return grad if grad is None or scale == 1.0 else grad / scale

    def lists(self, names: Iterable[str]) -> tuple[list[Tensor], list[Tensor | None]]:
        """Weights and gradients as they are, the gradients with the fp16 loss scale until the optimizer has stepped.

        Where they are sharded these are this rank's parts, in the order of `names`; see `layout`.
        """
        shards = [self._shards[name] for name in names]
        return [s.weight() for s in shards], [self._grad(s) for s in shards]

    def layout(self, names: Iterable[str]) -> Layout:
        """How the concatenated `lists` of these names lie on the ranks."""
        return Layout([self._shards[name] for name in names], self.distributed)

    def gather(self, local: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors, on the CPU of every rank, from this rank's parts, which are laid out like `lists`.

        Those of parameters that do not learn are no parts, here and in `local`, and stay what they are.
        """
        names = [name for name in local if name in self._shards]
        if not self.distributed.sharded or not names:
            return dict(local)
        whole = self.layout(names).gather(torch.cat([local[name].reshape(-1) for name in names]))
        shapes = [self._shards[name].shape for name in names]
        pieces = whole.split([shape.numel() for shape in shapes])
        found = {name: piece.view(shape) for name, piece, shape in zip(names, pieces, shapes, strict=True)}
        return {name: found.get(name, tensor) for name, tensor in local.items()}

    def local(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's parts of tensors, on the parameters' devices; parts stay what they are."""
        parts = {}
        for name, tensor in tensors.items():
            shard = self._shards.get(name)
            if shard is not None:
                if self.distributed.sharded and tensor.shape == shard.shape:
                    tensor = shard.cut(tensor)
                tensor = tensor.to(shard.weight().device)
            parts[name] = tensor
        return parts

    @torch.no_grad()
    def mul_(self, factors: Mapping[str, Tensor]) -> None:
        """Multiply gradients in place by broadcastable factors, such as a row mask of shape [d_out, 1]."""
        gradients, cuts, rest = [], [], []
        for name, factor in factors.items():
            shard = self._shards.get(name)
            grad = shard.grad() if shard is not None else None
            if shard is None or grad is None or not shard.numel:
                continue
            cut = shard.cut(factor).to(grad.dtype)
            if isinstance(shard, _PartitionShard):
                rest.append((shard, grad * cut))  # DeepSpeed hands out a copy where it offloads
            else:
                gradients.append(grad)
                cuts.append(cut)
        if gradients:
            torch._foreach_mul_(gradients, cuts)
        for shard, value in rest:
            shard.set_grad(value)

    def mul_rows_(self, name: str, mask: Tensor) -> None:
        """Multiply the rows of one gradient by `mask`, [rows]."""
        shape = self._shards[name].shape
        self.mul_({name: mask.view(-1, *[1] * (len(shape) - 1))})

    def add_(self, tensors: Mapping[str, Tensor]) -> None:
        """Add this rank's parts, laid out like `lists`, to the gradients; given without the fp16 loss scale."""
        scale = self.distributed.grad_scale()
        for name, tensor in tensors.items():
            shard = self._shards[name]
            grad = shard.grad()
            if grad is not None and shard.numel:
                shard.set_grad(grad + (tensor * scale).to(grad.dtype))
            elif isinstance(shard, _DTensorShard):  # of a parameter that is in no other loss of this step
                shard.set_grad(tensor * scale)

    def add_loss(
        self, names: Sequence[str], losses: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Add the gradient of losses of whole weights, which are collected with one collective; returns the losses."""
        weights = self.gather({name: self._shards[name].weight().float() for name in names})
        device = self._shards[names[0]].weight().device
        with torch.enable_grad():
            whole = {name: w.to(device).requires_grad_() for name, w in weights.items()}
            values = losses(whole)
            total = torch.stack(list(values.values())).sum()
            gradients = torch.autograd.grad(total, list(whole.values()), allow_unused=True)
        found = {n: g for n, g in zip(whole, gradients, strict=True) if g is not None}
        self.add_({name: self._shards[name].cut(g) for name, g in found.items()})
        return {name: value.detach() for name, value in values.items()}

    def set_(self, name: str, gradient: Tensor) -> None:
        """Replace a gradient, given whole and without the fp16 loss scale.

        Raises:
            RuntimeError: under DeepSpeed, if the step has no gradient of this name, whose place it would take.
        """
        shard = self._shards[name]
        if shard.numel:
            if self.distributed.engine is not None and shard.grad() is None:
                raise RuntimeError(f"'{name}' has no gradient in this step, and DeepSpeed takes no other in its place")
            shard.set_grad(shard.cut(gradient * self.distributed.grad_scale()))

    def with_gradient(self) -> list[nn.Parameter]:
        """The parameters that this step moves; where gradients are sharded, all that learn."""
        if self.distributed.sharded:
            return list(self._parameters.values())
        return [p for p in self._parameters.values() if p.grad is not None]

    def _moving(self) -> list[Shard]:
        if self.distributed.sharded:
            return list(self._shards.values())
        return [shard for shard in self._shards.values() if shard.grad() is not None]

    def flat(self) -> Tensor:
        """A copy of this rank's part of the gradients of `with_gradient` as one float32 vector, with the loss scale."""
        shards = self._moving()
        return flatten([s.grad() for s in shards], [s.weight() for s in shards])

    def cut_flat(self, vector: Tensor) -> Tensor:
        """This rank's part, laid out like `flat`, of a vector over the whole parameters of `with_gradient`."""
        return Layout(self._moving(), self.distributed).scatter(vector) if self.distributed.sharded else vector

    def total(self, values: Tensor) -> Tensor:
        """Inner products of vectors laid out like `flat`, from those of this rank's parts."""
        return self.distributed.sum_(values.clone()) if self.distributed.sharded else values

    def add_flat_(self, vector: Tensor) -> None:
        """Add a vector laid out like `flat` to the gradients, in place."""
        shards = self._moving()
        for shard, piece in zip(shards, unflatten(vector, [s.weight() for s in shards]), strict=True):
            grad = shard.grad()
            if grad is None:
                continue
            if isinstance(shard, _PartitionShard):
                shard.set_grad(grad + piece.to(grad.dtype))
            else:
                grad.add_(piece)

    def all_finite(self, gradients: Sequence[Tensor], device: torch.device) -> Tensor:
        """Whether all of them are, on every rank; a boolean on `device`."""
        norms = torch._foreach_norm([g for g in gradients if g.numel()])
        finite = torch.isfinite(torch.stack(norms)).all() if norms else torch.ones((), dtype=torch.bool, device=device)
        return self.total((~finite).float()) == 0 if self.distributed.sharded else finite

    def freeze_(self, keep: Mapping[str, Tensor]) -> None:
        """Undo this step's movement, momentum and decay wherever `keep` (broadcastable, 0 = frozen) is zero."""
        self._frozen_rows += list(keep.items())


def flatten(tensors: Sequence[Tensor | None], like: Sequence[Tensor]) -> Tensor:
    """All entries as one float32 vector; None is the zeros of the tensor of `like` in its place."""
    dense = [torch.zeros_like(b) if a is None else a for a, b in zip(tensors, like, strict=True)]
    return torch.cat([t.detach().reshape(-1) for t in dense]).float()


def unflatten(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Views of a vector in the shapes of `like`."""
    pieces = vector.split([t.numel() for t in like])
    return [piece.view(t.shape) for piece, t in zip(pieces, like, strict=True)]


@dataclass
class _Frozen:
    """A part of an optimizer's tensor as it was before the step."""

    holder: Any
    part: Callable[[Tensor], Tensor]
    keep: Tensor
    weight: Tensor
    moments: dict[str, Tensor]


class GradientSeam:
    """Calls `hook(grads)` once per optimizer step, at the seam. Attach when the optimizer exists, detach after."""

    def __init__(self, model: nn.Module, distributed: Distributed, hook: Callable[[GradView], None]) -> None:
        self.distributed = distributed
        self.grads = GradView(model, distributed)
        self._hook = hook
        self._handles: list[Any] = []
        self._snapshot: list[_Frozen] = []
        self._optimizer: torch.optim.Optimizer | None = None
        self._engine_step: tuple[Any, Any] | None = None
        self._left_over = False

    def attach(self, optimizer: Any, engine: Any = None) -> None:
        """`engine`: the wrapped model, which under DeepSpeed is what steps."""
        self.detach()  # the Trainer begins again when it has found a smaller batch size
        while hasattr(optimizer, "optimizer"):  # accelerate wraps the torch optimizer, and ZeRO wraps it once more
            optimizer = optimizer.optimizer
        self._optimizer = optimizer
        if self.distributed.backend.startswith("zero"):
            self._attach_engine(engine)
        self.grads.bind()
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def _attach_engine(self, engine: Any) -> None:
        check_engine(engine)
        step = engine.step

        def step_after_hook(*args: Any, **kwargs: Any) -> Any:
            last = engine.is_gradient_accumulation_boundary()
            if last:
                self._open()
            result = step(*args, **kwargs)
            self._left_over |= last
            return result

        engine.step = step_after_hook  # on this instance alone
        self._engine_step = (engine, step)
        self.distributed.engine = engine

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._engine_step is not None:
            del self._engine_step[0].step
            self._engine_step = None
        self._left_over = False
        self.grads._applied.clear()

    def before_micro_batch(self) -> None:
        """The Trainer calls this at the start of every `training_step`.

        Where DeepSpeed (0.19) keeps gradients in buffers of its own, as at ZeRO-3 and for an offloaded optimizer, it
        overwrites those of the last step only where this one has any: of a parameter that no row uses now it would
        apply the old one again, and add to it in the second micro-batch.
        """
        if self._left_over and self._engine_step is not None:
            left = _kept_gradients(self._engine_step[0].optimizer, self.distributed.backend)
            if left:
                torch._foreach_zero_(left)
        self._left_over = False

    def after_backward(self, last_micro_batch: bool) -> None:
        """The Trainer calls this at the end of every `training_step`."""
        if last_micro_batch and self._engine_step is None:
            self._open()

    def _open(self) -> None:
        self.grads._frozen_rows = []  # an fp16 step that was skipped leaves its rows behind
        self.grads._stepped = False
        self.grads._applied.clear()
        self._hook(self.grads)
        if self._engine_step is not None:
            self._renew_norms(self._engine_step[0].optimizer)

    def _renew_norms(self, optimizer: Any) -> None:
        """ZeRO-1 and -2 with `offload_optimizer` clip with norms taken during backward, before the edits above."""
        if not getattr(optimizer, "cpu_offload", False) or self.distributed.backend == "zero3":
            return
        parts = {}
        for shard in self.grads._shards.values():
            grad = shard.grad() if shard.numel else None
            if grad is not None:
                parts[optimizer.get_param_id(shard.parameter)] = grad
        if not parts:  # all weights are other ranks'
            return
        norms = optimizer.norm_for_param_grads
        norms.update(
            (k, norm) for k, norm in zip(parts, torch._foreach_norm([*parts.values()]), strict=True) if k in norms
        )

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if not self.grads._frozen_rows:
            return
        stepping = _held(optimizer)
        for name, mask in self.grads._frozen_rows:
            shard = self.grads._shards[name]
            holder, start = shard.slot()
            if holder is None or id(holder) not in stepping or not shard.numel:
                continue
            part = _part_of(shard, holder, start)
            moments = {key: part(value).clone() for key, value in _moments(optimizer, holder).items()}
            keep = shard.cut(mask).bool().to(part(holder).device)
            self._snapshot.append(_Frozen(holder, part, keep, part(holder).clone(), moments))

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        with torch.no_grad():
            for frozen in self._snapshot:
                now = frozen.part(frozen.holder)
                now.copy_(torch.where(frozen.keep, now, frozen.weight))
                for key, value in _moments(optimizer, frozen.holder).items():
                    # A first step makes the moments, and makes them of zeros.
                    moment = frozen.part(value)
                    before = frozen.moments.get(key)
                    moment.copy_(
                        torch.where(frozen.keep, moment, torch.zeros_like(moment) if before is None else before)
                    )
        self._snapshot = []
        if self.grads._frozen_rows:  # freezing lasts one step
            stepped = _held(optimizer)
            rows = self.grads._frozen_rows
            self.grads._frozen_rows = [r for r in rows if id(self.grads._shards[r[0]].slot()[0]) not in stepped]
        if self.distributed.engine is not None:
            # DeepSpeed drops the gradients after the step; `lists` shows them to `on_step_end`.
            for group in optimizer.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        self.grads._applied[id(p)] = p.grad
        self.grads._stepped = True


def _kept_gradients(optimizer: Any, backend: str) -> list[Tensor]:
    """The buffers in which DeepSpeed still has the gradients of the last step."""
    if backend == "zero3":
        offloaded = [p.grad for p in optimizer.fp32_partitioned_groups_flat if p.grad is not None]
        return [optimizer.grad_partitions_flat_buffer, *offloaded]
    if getattr(optimizer, "cpu_offload", False):
        groups = [p.grad for p in optimizer.single_partition_of_fp32_groups if p.grad is not None]
        return [*groups, *optimizer.accumulated_grads_in_cpu.values()]
    return []


def _held(optimizer: torch.optim.Optimizer) -> set[int]:
    """What this call of `step` moves: ZeRO steps group by group."""
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def _part_of(shard: Shard, holder: Any, start: int) -> Callable[[Tensor], Tensor]:
    def part(tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        if isinstance(tensor, DTensor):
            return tensor.to_local()
        if holder is shard.parameter:
            return tensor
        return tensor.view(-1)[start : start + shard.numel].view(shard.local_shape)

    return part


def _moments(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """The optimizer's state that has an entry for each of the parameter's."""
    state = optimizer.state.get(parameter, {})
    return {key: value for key, value in state.items() if torch.is_tensor(value) and value.shape == parameter.shape}


class MicroBatchMasks:
    """Multiplies each micro-batch's gradient, before accumulation and reduction, by the factors of that micro-batch.

    The factors must be the same on every rank, because they act before the reduction.
    """

    def __init__(self, model: nn.Module, names: Iterable[str], backend: str = "single") -> None:
        self.factors: dict[str, Tensor] = {}
        self._handles: list[Any] = []
        self._tensors: dict[str, tuple[Any, Any]] = {}
        parameters = dict(model.named_parameters())
        for name in names:
            if backend == "fsdp2":
                # A hook on the sharded parameter never fires; the gathered one appears at the module's forward.
                owner, _, attribute = name.rpartition(".")
                module = model.get_submodule(owner)
                self._handles.append(module.register_forward_pre_hook(self._find(name, attribute)))
            else:
                self._handles.append(parameters[name].register_hook(self._hook(name)))

    def _find(self, name: str, attribute: str) -> Callable[..., None]:
        def pre_hook(module: nn.Module, args: Any) -> None:
            weight = getattr(module, attribute)
            known = self._tensors.get(name)
            if torch.is_grad_enabled() and weight.requires_grad and (known is None or known[0] is not weight):
                if known is not None:
                    known[1].remove()
                self._tensors[name] = (weight, weight.register_hook(self._hook(name)))

        return pre_hook

    def _hook(self, name: str) -> Callable[[Tensor], Tensor]:
        def multiply(gradient: Tensor) -> Tensor:
            factor = self.factors.get(name)
            return gradient if factor is None else gradient * factor.to(gradient.dtype)

        return multiply

    def remove(self) -> None:
        for handle in [*self._handles, *(handle for _, handle in self._tensors.values())]:
            handle.remove()
        self._handles, self._tensors = [], {}


# -- what is refused before training -----------------------------------------------------------------------------------

DEEPSPEED_SWITCH = "ACCELERATE_USE_DEEPSPEED"
_GIVEN_BY_LAUNCHER = os.environ.get(DEEPSPEED_SWITCH)


def check_backend(
    backend: str, supports: frozenset[str], method: str, reasons: Mapping[str, str] | None = None
) -> None:
    """Refuse, before training, a backend on which a method would compute something else."""
    if backend in supports & ALL_BACKENDS:
        return
    usable = ", ".join(b for b in BACKENDS if b in supports)
    if backend == "fsdp1":
        raise InputError(
            f"method '{method}' does not support FSDP1, whose flat parameters have no rows; use fsdp_config: "
            "{version: 2}"
        )
    reason = (reasons or {}).get(backend)
    because = f", because {reason}" if reason else " in this version"
    raise InputError(f"method '{method}' does not support the '{backend}' backend{because}; run it on one of: {usable}")


def given_by_launcher() -> bool:
    """Whether a launcher asked for DeepSpeed, and not an earlier Trainer of this process."""
    return _GIVEN_BY_LAUNCHER is not None


def check_engine(engine: Any) -> None:
    """Refuse a DeepSpeed engine that is none, or whose gradients the seam cannot see."""
    if engine is None or not hasattr(engine, "is_gradient_accumulation_boundary"):
        raise InputError(
            "DeepSpeed was asked for and the Trainer made no engine; give the optimizer through training.optim"
        )
    if engine.zero_optimization_stage() == 0 and (engine.fp16_enabled() or engine.bfloat16_enabled()):
        raise InputError(
            "ZeRO stage 0 keeps half-precision gradients where methods cannot read them; use zero_optimization: "
            "{stage: 1}, or train in fp32"
        )


def release_engine(trainer: Any) -> None:
    """Take DeepSpeed's engine off a trained model, so that the next Trainer of this process makes its own.

    Call it when a task is done and saved. Nothing but the environment changes without DeepSpeed.
    """
    engine = getattr(trainer, "model_wrapped", None)
    if hasattr(engine, "is_gradient_accumulation_boundary"):
        _destroy(engine)
        trainer.model_wrapped = trainer.model
        trainer.optimizer = trainer.lr_scheduler = None
        trainer.deepspeed = None
        trainer.accelerator.deepspeed_engine_wrapped = None
        trainer.accelerator._models.clear()
        trainer.accelerator._optimizers.clear()
        trainer.accelerator._schedulers.clear()
    if getattr(trainer, "dist", None) is not None:
        trainer.dist.engine = None
    if _GIVEN_BY_LAUNCHER is None:
        os.environ.pop(DEEPSPEED_SWITCH, None)
    gc.collect()


def _destroy(engine: Any) -> None:
    from deepspeed.runtime.zero import parameter_offload, partitioned_param_coordinator

    for name in ("module_forward_pre_hook", "module_forward_post_hook"):
        hook = getattr(engine, name, None)
        if hook is not None:
            hook.remove()
    engine.destroy()
    # Both hold on to every model that ZeRO-3 ever split.
    parameter_offload.FWD_MODULE_STACK.clear()
    released = partitioned_param_coordinator.PartitionedParameterCoordinator.__dict__.get(
        "_PartitionedParameterCoordinator__params_to_release"
    )
    for cell in getattr(released, "__closure__", None) or ():
        if hasattr(cell.cell_contents, "cache_clear"):
            cell.cell_contents.cache_clear()
