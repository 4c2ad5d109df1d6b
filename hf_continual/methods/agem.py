r"""A-GEM: a step that would raise the loss on stored rows of earlier tasks loses the part of it that does so.

    g~ = g - min(0, g . r) / (r . r) r          r: gradient of the loss on rows drawn from the memory of all past tasks

over all parameters as one vector, after accumulation and reduction and before clipping.

Source: Chaudhry et al., "Efficient Lifelong Learning with A-GEM", arXiv:1812.00420, Eq. 10-11: r is computed anew at
every step, at the present weights. TRACE (BeyonderXX/TRACE) has no A-GEM; the class of that description in its
model/Regular/GEM.py is GEM, tensor by tensor: see `gem.py`.
Deviation: a parameter without a gradient in this step does not move, and is left out of both vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..attention import refuse_reentrant_arguments
from ..distributed import ALL_BACKENDS, GradView, SideGradients, full_shape
from ..errors import InputError
from ..replay import (
    SOURCE_HELP,
    Policy,
    ReplayBuffer,
    Source,
    check_buffer,
    check_columns,
    check_rows,
    check_source,
    features_of,
    replayed_rows,
    tokenizer_key,
)
from .base import ContinualMethod, MethodContext

PIECE = 1 << 30  # one product of vectors takes fewer than 2^31 entries


@dataclass
class AGEMConfig:
    ratio: float = field(default=0.01, metadata={"help": "Share of each past task that is kept."})
    count: int | None = field(default=None, metadata={"help": "Rows kept per task; overrides ratio."})
    total: int | None = field(
        default=None, metadata={"help": "Rows kept in all, overriding ratio; older tasks then give up theirs."}
    )
    policy: Policy = field(default="random", metadata={"help": "Which rows are kept, as in replay."})
    source: Source = field(default="past", metadata={"help": SOURCE_HELP})
    seed: int = field(default=42, metadata={"help": "Seed of the rows that are kept, and of those drawn at each step."})
    memory_batch_size: int = field(
        default=16, metadata={"help": "Stored rows drawn at each optimizer step, over all processes together."}
    )
    memory_micro_batch: int = field(
        default=16,
        metadata={"help": "Stored rows in one forward on each process; fewer need less memory and more forwards."},
    )

    def __post_init__(self) -> None:
        check_memory(self)


def check_memory(config: Any) -> None:
    """Refuse a memory that cannot be."""
    check_buffer(config.ratio, config.count, config.total, config.policy, config.seed)
    check_source(config.source)
    for option in ("memory_batch_size", "memory_micro_batch"):
        value = getattr(config, option)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise InputError(f"{option}={value!r} must be a whole number, at least 1")


def project(gradient: Tensor, reference: Tensor) -> Tensor:
    """g~ with g~ . r >= 0, the nearest to g; flat vectors. No branch: nothing waits for an accelerator."""
    return gradient + correction(gradient, reference)[0]


def correction(
    gradient: Tensor, reference: Tensor, total: Callable[[Tensor], Tensor] = lambda values: values
) -> tuple[Tensor, Tensor]:
    """g~ - g, and g . r; `total` makes inner products of those of the parts that ranks hold."""
    product, square = total(torch.stack([dot(gradient, reference), dot(reference, reference)]))
    return reference * (-product.clamp_max(0) / square.clamp_min(torch.finfo(square.dtype).tiny)), product


def dot(a: Tensor, b: Tensor) -> Tensor:
    """The inner product of vectors of any length, without a copy of them."""
    return torch.stack([torch.dot(x, y) for x, y in zip(a.split(PIECE), b.split(PIECE), strict=True)]).sum()


def memory_gradient(
    ctx: MethodContext,
    side: SideGradients,
    parameters: Sequence[nn.Parameter],
    rows: Sequence[Mapping[str, Any]],
    micro_batch: int,
) -> Tensor:
    """This rank's part of the gradient of the mean loss on `rows`; the sum over ranks is that gradient.

    Each forward counts by its number of rows. The fp16 loss scale stays in it, as in the gradients at the seam.

    Returns:
        A float32 vector over the whole `parameters`. Nothing is written to `.grad`.
    """
    total = torch.zeros(sum(full_shape(p).numel() for p in parameters), device=parameters[0].device)
    scale = ctx.dist.grad_scale() / len(rows)
    for part, counts in side.rounds(rows, micro_batch):
        batch = ctx.make_batch(part)
        with torch.enable_grad(), ctx.autocast():
            loss = ctx.model(**batch).loss
        if loss is None:
            raise InputError("the model gives no loss for a stored row; give every row `labels`")
        gradient = side.flat(loss * (len(part) * scale), parameters)
        if counts:
            total += gradient
    return total


def check_checkpointing(model: nn.Module, method: str) -> None:
    """Refuse the old kind of gradient checkpointing, through which no second gradient can be taken."""
    for module in model.modules():
        call = getattr(module, "_gradient_checkpointing_func", None)
        if getattr(module, "gradient_checkpointing", False) and getattr(call, "keywords", {}).get("use_reentrant"):
            raise InputError(
                f"method '{method}' takes gradients that gradient checkpointing with use_reentrant=True cannot give; "
                "train with gradient_checkpointing_kwargs: {use_reentrant: false}"
            )


class AGEM(ContinualMethod[AGEMConfig]):
    """Averaged gradient episodic memory. Logs `agem/violated`, the share of steps that were corrected.

    Each step costs a forward and a backward on `memory_batch_size` stored rows, and every process holds their gradient
    whole, in float32, where weights are split too. State: the stored rows.
    """

    config_class = AGEMConfig
    supports = ALL_BACKENDS
    paper = "arxiv:1812.00420"
    neutral = {"count": 0}

    def __init__(self, config: AGEMConfig | None = None, **options: Any) -> None:
        super().__init__(config, **options)
        c = self.config
        self.memory_ = ReplayBuffer(ratio=c.ratio, count=c.count, total=c.total, policy=c.policy, seed=c.seed)
        self._rows: Any = None
        self._side: Any = None

    def on_task_begin(self, ctx: MethodContext) -> None:
        refuse_reentrant_arguments(ctx.args, self.name, "no second gradient can be taken through it")
        check_task(self.memory_, ctx, self.name)
        self._rows = task_memory(self.memory_, ctx, self.config)
        self._side = SideGradients(ctx.model, ctx.dist)

    def edit_gradients(self, ctx: MethodContext, grads: GradView) -> None:
        memory = self._rows
        if memory is None or not len(memory):
            return
        if ctx.state.global_step == 0:
            check_checkpointing(ctx.model, self.name)
        drawn = draw_rows(len(memory), self.config.memory_batch_size, self.config.seed, ctx)
        rows = [memory[i] for i in drawn]
        reference = memory_gradient(ctx, self._side, grads.with_gradient(), rows, self.config.memory_micro_batch)
        # Both have the fp16 loss scale in them, and the projection of scaled vectors is the scaled projection.
        change, product = correction(grads.flat(), grads.cut_flat(ctx.dist.sum_(reference)), grads.total)
        grads.add_flat_(change)
        ctx.log("agem/violated", (product < 0).float())

    def on_task_end(self, ctx: MethodContext) -> None:
        keep_task(self.memory_, ctx)
        self._rows = self._side = None


def draw_rows(available: int, size: int, seed: int, ctx: MethodContext) -> list[int]:
    """The same in every process, and in a run that is resumed before this step."""
    generator = torch.Generator().manual_seed(seed + 1_000_003 * ctx.task.index + ctx.state.global_step)
    return torch.randperm(available, generator=generator)[:size].tolist()


def check_task(memory: ReplayBuffer, ctx: MethodContext, method: str) -> None:
    """Refuse a task whose rows do not go together with those that are kept."""
    check_rows(ctx.rows, method, ctx.task.name)
    check_columns(ctx.rows, memory.rows, method, ctx.task.name)
    memory.bind(None, tokenizer_key(ctx.tokenizer))


def task_memory(memory: ReplayBuffer, ctx: MethodContext, config: Any) -> Any:
    """The rows that are drawn from while a task is learnt."""
    return replayed_rows(memory.rows, ctx.rows, config.source, config.seed + ctx.task.index)


def keep_task(memory: ReplayBuffer, ctx: MethodContext) -> None:
    """Add rows of the task just learnt to the memory."""
    features = features_of(ctx, ctx.rows) if memory.policy == "herding" else None
    memory.add(ctx.task.index, ctx.task.name, ctx.rows, features=features)
