r"""GEM: the step nearest to the gradient that raises the loss on the stored rows of no earlier task.

    g~ = g + G^T v,   v = argmin_v 1/2 v^T (G G^T + eps I) v + (G g)^T v   s.t.  v_k >= margin        if any (G g)_k < 0

G [tasks, P]: row k is the gradient of the loss on the memory of task k at the present weights; all parameters are one
vector. With margin = eps = 0 this is the projection onto {x : G x >= 0}. A margin gamma makes g~ contain at least gamma
times the gradient of every earlier task, so that G g~ >= 0 still and the step also favours the past.

Source: Lopez-Paz and Ranzato, "Gradient Episodic Memory for Continual Learning", arXiv:1706.08840, Eq. 8-11 and
facebookresearch/GradientEpisodicMemory. The paper adds gamma to the v* of the problem with v >= 0 (`margin_as: added`),
its code bounds v by gamma before solving (`bound`, the default); the paper has no eps. The signs above are the code's.
TRACE's code (BeyonderXX/TRACE, model/Regular/GEM.py) projects each tensor by itself; its memory of a task is the
gradient of that task's last batch at the weights of then, in bfloat16; it hands the QP solver qpth, whose constraint is
G v <= h, what was written for quadprog, where it is G v >= h and the linear term has the other sign, so that a conflict
g.m = -1 becomes -2; and under ZeRO-2 `.grad` is None, so that nothing is projected.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ..attention import refuse_reentrant_arguments
from ..distributed import ALL_BACKENDS, GradView, SideGradients
from ..errors import InputError
from ..replay import SOURCE_HELP, Policy, ReplayBuffer, Source
from .agem import (
    check_checkpointing,
    check_memory,
    check_task,
    draw_rows,
    keep_task,
    memory_gradient,
    task_memory,
)
from .base import ContinualMethod, MethodContext


@dataclass
class GEMConfig:
    ratio: float = field(default=0.01, metadata={"help": "Share of each past task that is kept."})
    count: int | None = field(default=None, metadata={"help": "Rows kept per task; overrides ratio."})
    total: int | None = field(
        default=None, metadata={"help": "Rows kept in all, overriding ratio; older tasks then give up theirs."}
    )
    policy: Policy = field(default="random", metadata={"help": "Which rows are kept, as in replay."})
    source: Source = field(default="past", metadata={"help": SOURCE_HELP})
    seed: int = field(default=42, metadata={"help": "Seed of the rows that are kept, and of those drawn at each step."})
    margin: float = field(
        default=0.5,
        metadata={
            "help": "gamma, the least share of each memory's gradient in a corrected step (paper, code, TRACE: 0.5)."
        },
    )
    margin_as: Literal["bound", "added"] = field(
        default="bound",
        metadata={"help": "bound: v >= margin is a constraint (the code). added: v >= 0, then v + margin (the paper)."},
    )
    eps: float = field(
        default=1e-3,
        metadata={
            "help": "Added to the diagonal of G G^T (code and TRACE: 1e-3). It is not relative to the gradients: where "
            "their squared norm is near it, a step keeps part of a conflict. 0 is exact."
        },
    )
    memory_batch_size: int | None = field(
        default=None,
        metadata={"help": "Stored rows of each task drawn at each optimizer step; default: all of them (the paper)."},
    )
    memory_micro_batch: int = field(
        default=8,
        metadata={"help": "Stored rows in one forward on each process; fewer need less memory and more forwards."},
    )

    def __post_init__(self) -> None:
        check_memory(self)
        for option in ("margin", "eps"):
            value = getattr(self, option)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
                raise InputError(f"{option}={value!r} must be a number of at least 0")
        if self.margin_as not in ("bound", "added"):
            raise InputError(f"margin_as={self.margin_as!r} is unknown; choose bound, added")


def solve_qp(gram: Tensor, products: Tensor, margin: float = 0.0) -> Tensor:
    """argmin_v 1/2 v^T P v + q^T v  s.t.  v >= margin, by Lawson and Hanson's active sets, in float64 on the CPU.

    Args:
        gram: P = G G^T, [tasks, tasks]; it may be singular.
        products: q = G g, [tasks].
        margin: the least value of each v_k.

    Returns:
        v, float64, [tasks]. Where gradients are parallel v is not unique, but G^T v is.
    """
    gram, products = gram.double().cpu(), products.double().cpu()
    size = gram.diagonal().clamp_min(0).sqrt()
    size = torch.where(size > 0, size, 1.0)  # gradients of very different length make a badly scaled problem
    matrix = gram / torch.outer(size, size)
    linear = (products + gram.sum(1) * margin) / size  # of x = (v - margin) size >= 0
    x, free = torch.zeros_like(linear), torch.zeros_like(linear, dtype=torch.bool)
    refused = torch.zeros_like(free)
    tolerance = 1e-12 * float(linear.abs().max())
    while True:
        slope = torch.where(free | refused, -torch.inf, -(matrix @ x + linear))
        entering = int(slope.argmax())
        if slope[entering] <= tolerance:
            return x / size + margin
        free[entering] = True
        first = True
        while True:
            target = torch.zeros_like(x)
            target[free] = _least_squares(matrix[free][:, free], -linear[free])
            if first and target[entering] <= 0:  # by rounding: its gradient is a combination of the others
                free[entering], refused[entering] = False, True
                break
            first = False
            low = free & (target <= 0)
            if not low.any():
                x, refused = target, torch.zeros_like(refused)
                break
            step = (x[low] / (x[low] - target[low])).min()
            leaving = low & (x / (x - target).where(low, 1.0) <= step)
            x = x + step * (target - x)
            free = free & ~leaving
            x[~free] = 0.0


def _least_squares(matrix: Tensor, right: Tensor) -> Tensor:
    return torch.linalg.lstsq(matrix, right.unsqueeze(1), rcond=1e-11, driver="gelsd").solution.squeeze(1)


def multipliers(
    gram: Tensor, products: Tensor, margin: float = 0.5, eps: float = 1e-3, margin_as: str = "bound"
) -> Tensor | None:
    """v of a gradient with the products G g, or None if it conflicts with no memory; NaN where anything is."""
    if not torch.isfinite(products).all() or not torch.isfinite(gram).all():
        return torch.full_like(products, torch.nan)  # as a step of NaN gradients, which fp16 skips
    if not (products < 0).any():
        return None
    padded = gram + eps * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    if margin_as == "added":
        return solve_qp(padded, products) + margin
    return solve_qp(padded, products, margin)


def project(
    gradient: Tensor, memory_gradients: Tensor, margin: float = 0.5, eps: float = 1e-3, margin_as: str = "bound"
) -> Tensor:
    """g~ of a gradient [P] and those of the memories [tasks, P]; with eps = 0, G g~ >= 0."""
    v = multipliers(*inner_products(gradient, memory_gradients), margin, eps, margin_as)
    return gradient if v is None else gradient + memory_gradients.T @ v.to(gradient)


def inner_products(gradient: Tensor, memory_gradients: Tensor) -> tuple[Tensor, Tensor]:
    """(G G^T, G g) in float64 on the CPU, of one transfer."""
    # Vector by vector: a matrix product would round to TF32 where that is allowed.
    vectors = [*memory_gradients, gradient]
    both = torch.stack([memory_gradients @ vector for vector in vectors], dim=1).double().cpu()
    gram = both[:, :-1]
    return (gram + gram.T) / 2, both[:, -1]


class GEM(ContinualMethod[GEMConfig]):
    """Gradient episodic memory. Logs `gem/violated`, the share of steps that were corrected.

    Each step costs a forward and a backward on the memory of every past task, a whole float32 gradient a task in the
    memory of every process, and one transfer of [tasks, tasks + 1] numbers from the accelerator, for which the step
    waits. State: the stored rows.
    """

    config_class = GEMConfig
    supports = ALL_BACKENDS
    paper = "arxiv:1706.08840"
    neutral = {"count": 0}

    def __init__(self, config: GEMConfig | None = None, **options: Any) -> None:
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
        memory, config = self._rows, self.config
        if memory is None or not len(memory):
            return
        if ctx.state.global_step == 0:
            check_checkpointing(ctx.model, self.name)
        of_task: dict[int, list[int]] = {}
        for row, task in enumerate(self.memory_.tasks):
            of_task.setdefault(task, []).append(row)
        parameters, gradients = grads.with_gradient(), []
        for stored in of_task.values():
            if config.memory_batch_size is not None:
                drawn = draw_rows(len(stored), config.memory_batch_size, config.seed, ctx)
                stored = [stored[i] for i in drawn]
            rows = [memory[i] for i in stored]
            gradients.append(memory_gradient(ctx, self._side, parameters, rows, config.memory_micro_batch))
        memories = torch.stack([grads.cut_flat(g) for g in ctx.dist.sum_(torch.stack(gradients))])
        gram, products = inner_products(grads.flat(), memories)
        tasks = len(memories)
        both = grads.total(torch.cat([gram, products.view(tasks, 1)], dim=1))
        gram, products = both[:, :tasks], both[:, tasks]
        scale = ctx.dist.grad_scale() ** 2  # eps is for gradients without the fp16 loss scale
        v = multipliers(gram / scale, products / scale, config.margin, config.eps, config.margin_as)
        if v is not None:
            grads.add_flat_(memories.T @ v.to(memories))
        ctx.log("gem/violated", torch.tensor(float(v is not None)))

    def on_task_end(self, ctx: MethodContext) -> None:
        keep_task(self.memory_, ctx)
        self._rows = self._side = None
