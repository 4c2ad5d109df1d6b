"""Ranks, shards and the gradient seam: the only file that knows what runs the processes.

**The seam** is the one moment at which methods read and edit gradients: after accumulation and reduction, before
clipping and the optimizer step. On one process and under DDP that is the end of `Trainer.training_step` on the last
micro-batch. `Trainer.on_pre_optimizer_step` is the wrong place: it runs after clipping everywhere, and after the
update under DeepSpeed. A backend whose engine steps inside `backward` attaches its own trigger in
`GradientSeam.attach`; methods only ever see the `GradView` they are handed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from .errors import InputError

SUPPORTED_BACKENDS = frozenset({"single", "ddp"})


def detect_backend(accelerator: Accelerator | None) -> str:
    """`single`, `ddp`, `fsdp1`, `fsdp2` or `deepspeed`."""
    if accelerator is None or accelerator.distributed_type == DistributedType.NO:
        return "single"
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return "deepspeed"
    if accelerator.distributed_type == DistributedType.FSDP:
        return "fsdp2" if accelerator.is_fsdp2 else "fsdp1"
    return "ddp"


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

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum `tensor` over ranks in place: one collective, nothing on a single process. Returns `tensor`."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def grad_scale(self) -> float:
        """The fp16 loss scale still in the gradients at the seam; 1.0 without one."""
        scaler = getattr(self.accelerator, "scaler", None)
        return float(scaler.get_scale()) if scaler is not None and scaler.is_enabled() else 1.0

    @property
    def step_was_skipped(self) -> bool:
        """Whether the fp16 scaler skipped the optimizer step just taken."""
        return self.accelerator is not None and bool(self.accelerator.optimizer_step_was_skipped)


class GradView:
    """The gradients of the trainable parameters at the seam, by their name in the unwrapped model."""

    def __init__(self, model: nn.Module, distributed: Distributed) -> None:
        self.distributed = distributed
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._frozen_rows: list[tuple[nn.Parameter, Tensor]] = []

    def names(self) -> Iterable[str]:
        return self._parameters.keys()

    def parameter(self, name: str) -> nn.Parameter:
        return self._parameters[name]

    def read(self, name: str) -> Tensor | None:
        """The accumulated, reduced, unclipped gradient without the fp16 loss scale, or None. Do not write to it."""
        grad = self._parameters[name].grad
        scale = self.distributed.grad_scale()
        return grad if grad is None or scale == 1.0 else grad / scale

    def lists(self, names: Iterable[str]) -> tuple[list[Tensor], list[Tensor | None]]:
        """Weights and gradients as they are, the gradients with the fp16 loss scale until the optimizer has stepped."""
        parameters = [self._parameters[name] for name in names]
        return [p.detach() for p in parameters], [p.grad for p in parameters]

    def mul_(self, factors: Mapping[str, Tensor]) -> None:
        """Multiply gradients in place by broadcastable factors, such as a row mask of shape [d_out, 1]."""
        pairs = [
            (p.grad, factors[name]) for name, p in self._parameters.items() if name in factors and p.grad is not None
        ]
        if pairs:
            torch._foreach_mul_([grad for grad, _ in pairs], [factor for _, factor in pairs])

    def set_(self, name: str, gradient: Tensor) -> None:
        """Replace a gradient, given without the fp16 loss scale."""
        parameter = self._parameters[name]
        if parameter.grad is None:
            parameter.grad = torch.empty_like(parameter)
        parameter.grad.copy_(gradient * self.distributed.grad_scale())

    def with_gradient(self) -> list[nn.Parameter]:
        """The parameters that this step moves; those that took no part in it have no gradient."""
        return [p for p in self._parameters.values() if p.grad is not None]

    def flat(self) -> Tensor:
        """A copy of the gradients of `with_gradient` as one float32 vector, with the fp16 loss scale."""
        parameters = self.with_gradient()
        return flatten([p.grad for p in parameters], parameters)

    def add_flat_(self, vector: Tensor) -> None:
        """Add a vector laid out like `flat` to the gradients, in place."""
        parameters = self.with_gradient()
        gradients = [p.grad for p in parameters if p.grad is not None]
        torch._foreach_add_(gradients, unflatten(vector, parameters))

    def freeze_(self, keep: Mapping[str, Tensor]) -> None:
        """Undo this step's movement, momentum and decay wherever `keep` (broadcastable, 0 = frozen) is zero."""
        self._frozen_rows += [(self._parameters[name], mask) for name, mask in keep.items()]


def flatten(tensors: Sequence[Tensor | None], like: Sequence[Tensor]) -> Tensor:
    """All entries as one float32 vector; None is the zeros of the tensor of `like` in its place."""
    dense = [torch.zeros_like(b) if a is None else a for a, b in zip(tensors, like, strict=True)]
    return torch.cat([t.detach().reshape(-1) for t in dense]).float()


def unflatten(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Views of a vector in the shapes of `like`."""
    pieces = vector.split([t.numel() for t in like])
    return [piece.view(t.shape) for piece, t in zip(pieces, like, strict=True)]


class GradientSeam:
    """Calls `hook(grads)` once per optimizer step, at the seam. Attach when the optimizer exists, detach after."""

    def __init__(self, model: nn.Module, distributed: Distributed, hook: Callable[[GradView], None]) -> None:
        self.grads = GradView(model, distributed)
        self._hook = hook
        self._handles: list[Any] = []
        self._snapshot: list[tuple[nn.Parameter, Tensor, Tensor, dict[str, Tensor]]] = []
        self._optimizer: torch.optim.Optimizer | None = None

    def attach(self, optimizer: Any) -> None:
        self.detach()  # the Trainer begins again when it has found a smaller batch size
        while hasattr(optimizer, "optimizer"):  # accelerate wraps the torch optimizer
            optimizer = optimizer.optimizer
        self._optimizer = optimizer
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def after_backward(self, last_micro_batch: bool) -> None:
        """The Trainer calls this at the end of every `training_step`."""
        if last_micro_batch:
            self.grads._frozen_rows = []  # an fp16 step that was skipped leaves its rows behind
            self._hook(self.grads)

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for parameter, keep in self.grads._frozen_rows:
            moments = {key: value.clone() for key, value in _moments(optimizer, parameter).items()}
            self._snapshot.append((parameter, keep.bool(), parameter.detach().clone(), moments))

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        with torch.no_grad():
            for parameter, keep, before, moments in self._snapshot:
                parameter.copy_(torch.where(keep, parameter, before))
                for key, value in _moments(optimizer, parameter).items():
                    # A first step makes the moments, and makes them of zeros.
                    value.copy_(torch.where(keep, value, moments.get(key, torch.zeros_like(value))))
        self._snapshot = []
        self.grads._frozen_rows = []


def _moments(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """The optimizer's state that has an entry for each of the parameter's."""
    state = optimizer.state.get(parameter, {})
    return {key: value for key, value in state.items() if torch.is_tensor(value) and value.shape == parameter.shape}


class MicroBatchMasks:
    """Multiplies each micro-batch's gradient, before accumulation and reduction, by the factors of that micro-batch.

    The factors must be the same on every rank, because they act before the reduction.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        parameters = dict(model.named_parameters())
        self.factors: dict[str, Tensor] = {}
        self._handles = [parameters[name].register_hook(self._hook(name)) for name in names]

    def _hook(self, name: str) -> Callable[[Tensor], Tensor]:
        def multiply(gradient: Tensor) -> Tensor:
            factor = self.factors.get(name)
            return gradient if factor is None else gradient * factor.to(gradient.dtype)

        return multiply

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


def check_backend(backend: str, supports: frozenset[str], method: str) -> None:
    """Refuse, before training, a backend on which a method would compute something else."""
    if backend not in supports & SUPPORTED_BACKENDS:
        usable = ", ".join(sorted(supports & SUPPORTED_BACKENDS))
        raise InputError(
            f"method '{method}' does not support the '{backend}' backend in this version; run it on one of: {usable}"
        )
