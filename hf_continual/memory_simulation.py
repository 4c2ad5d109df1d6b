"""A training step on a model without weights, and the most bytes that live in it.

Tensors are fake: they have a shape and a dtype, so that forward and backward of any size run in no memory. What lives
beside the weights is counted at each operation.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from .errors import InputError
from .models import first_line, is_seq2seq

if TYPE_CHECKING:
    from .memory_estimate import Plan

__all__ = ["FLOAT", "Counts", "Loss", "Shape", "Simulation"]

FLOAT = 4


@dataclass
class Counts:
    """Sizes of the model that is trained."""

    numel: int = 0
    bytes: int = 0
    trained: int = 0
    trained_bytes: int = 0
    largest: int = 0
    """Bytes of the largest parameter that learns."""

    @classmethod
    def of(cls, model: nn.Module) -> Counts:
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
class Shape:
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


class Simulation:
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
        shape: Shape,
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
