r"""EWC: pull every weight towards where earlier tasks left it, the harder the more they pin it down.

    L = L_task + \lambda / 2 \sum_{k<t} \sum_i F_{k,i} (\theta_i - \theta*_{k,i})^2
    F_{k,i} = mean over the rows of task k of (\partial L_row / \partial \theta_i)^2 at \theta*_k    per_sample, sampled
    S = \sum_k F_k,   m = \sum_k F_k \theta*_k / S:   \sum_k F_k (\theta - \theta*_k)^2 = S (\theta - m)^2 + constant
    online:  S <- d S + F_k,   m = \theta*_k of the latest task,   constant = 0

Source: Kirkpatrick et al., arXiv:1612.00796, Eq. 3 (a sum over tasks, kept here in two buffers for any number of them);
online: Schwarz et al., arXiv:1805.06370. TRACE's code (BeyonderXX/TRACE, model/Regular/EWC.py) gathers F from the
training batches as they pass: squares of micro-batches' mean gradients, at weights still far from \theta*, of the loss
with the penalty in it, each epoch once more; the Fisher information of the task being learnt is in the penalty already;
and of several tasks only the last \theta* is kept. `fisher: trace` with `online_decay: 1` is that without two of them:
a task's own F joins at its end, and the penalty's gradient, known in closed form, is taken out before squaring. What is
squared are gradients of optimizer steps, not of micro-batches.

L_row is the model's own loss of one row: for language models, the mean over its labels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..distillation import evaluating, shifts_labels
from ..distributed import ALL_BACKENDS, GradView, SideGradients, full, full_shape
from ..errors import InputError
from ..importance import check_share
from ..lora import trainable_parameters
from ..replay import check_rows
from .base import ContinualMethod, MethodContext
from .lwf import label_positions, logits_at_labels

FISHERS = ("per_sample", "sampled", "trace")


@dataclass
class EWCConfig:
    ewc_lambda: float = field(
        default=400.0, metadata={"help": "lambda, the weight of the penalty (TRACE: 400; it too halves it)."}
    )
    fisher: Literal["per_sample", "sampled", "trace"] = field(
        default="per_sample",
        metadata={
            "help": "per_sample: squared gradient of each row's loss, after the task. sampled: the same with labels "
            "drawn from the model (the true Fisher information, given the words before each label). trace: squared "
            "gradients of the training steps as they pass, times epochs (TRACE); no further pass over the data."
        },
    )
    fisher_rows: int | None = field(
        default=None, metadata={"help": "Rows of a task to take, drawn at random; default: all. Not for trace."}
    )
    online_decay: float | None = field(
        default=None,
        metadata={
            "help": "d in [0, 1]: keep only the latest weights as the centre (online EWC). Default: every task's."
        },
    )

    def __post_init__(self) -> None:
        value = self.ewc_lambda
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
            raise InputError(f"ewc_lambda={value!r} must be a number of at least 0")
        if self.fisher not in FISHERS:
            raise InputError(f"fisher={self.fisher!r} is unknown; choose {', '.join(FISHERS)}")
        rows = self.fisher_rows
        if rows is not None and (isinstance(rows, bool) or not isinstance(rows, int) or rows < 1):
            raise InputError(f"fisher_rows={rows!r} must be a whole number, at least 1")
        if rows is not None and self.fisher == "trace":
            raise InputError(
                f"fisher_rows={rows!r} has no meaning with fisher='trace', which takes every batch; drop it"
            )
        if self.online_decay is not None:
            check_share("online_decay", self.online_decay)


def quadratic(weights: Sequence[Tensor], precision: Sequence[Tensor], centre: Sequence[Tensor]) -> Tensor:
    """sum_i S_i (theta_i - m_i)^2 over all tensors of the lists; differentiable in the weights."""
    shift = torch._foreach_sub(list(weights), list(centre))
    terms = torch._foreach_mul(torch._foreach_mul(shift, shift), list(precision))
    return torch.stack(torch._foreach_norm(terms, 1)).sum()  # no term is negative: its 1-norm is its sum


def combine(precision: Tensor, centre: Tensor, fisher: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(S', m', c) with S (x - m)^2 + F (x - theta*)^2 = S' (x - m')^2 + c for every x; c is summed over entries."""
    total = precision + fisher
    share = fisher / total.clamp_min(torch.finfo(total.dtype).tiny)
    shift = weights - centre
    return total, centre + share * shift, (precision.double() * share.double() * shift.double().square()).sum()


class EWC(ContinualMethod[EWCConfig]):
    """Elastic weight consolidation. Logs the penalty as `ewc/penalty`, the constant included.

    State: two float32 copies of the trainable weights (three with `fisher: trace`), by parameter. A parameter that
    learns for the first time, such as that of a new adapter, has no penalty.
    """

    config_class = EWCConfig
    supports = ALL_BACKENDS
    paper = "arxiv:1612.00796"
    neutral = {"ewc_lambda": 0.0}

    def __init__(self, config: EWCConfig | None = None, **options: Any) -> None:
        super().__init__(config, **options)
        self.precision_: dict[str, Tensor] = {}
        self.centre_: dict[str, Tensor] = {}
        self.constant_: dict[str, float] = {}
        self.running_: dict[str, Tensor] = {}
        self.steps_: Tensor | None = None
        self._terms: dict[str, nn.Parameter] = {}
        self._constant = 0.0

    def on_task_begin(self, ctx: MethodContext) -> None:
        self.running_, self.steps_ = {}, None
        self._terms = {}
        # Where weights are split the penalty is that of parts, elsewhere of whole weights.
        self.sharded_state = ("running_",) if ctx.dist.whole_weights else ("running_", "precision_", "centre_")
        if not self.config.ewc_lambda:
            return
        if self.config.fisher != "trace":
            check_rows(ctx.rows, self.name, ctx.task.name)
        # By the parameter's own name: that under which PEFT stores it is the same for every adapter of a layer.
        for name, p in trainable_parameters(ctx.model).items():
            if name in self.precision_:
                if ctx.dist.whole_weights:
                    for state in (self.precision_, self.centre_):
                        state[name] = state[name].to(p.device)
                self._terms[name] = p
        self._constant = sum(self.constant_.get(name, 0.0) for name in self._terms)

    def extra_loss(self, ctx: MethodContext, batch: Mapping[str, Any], outputs: Any) -> dict[str, Tensor]:
        if not self._terms or not ctx.dist.whole_weights:
            return {}
        penalty = quadratic(list(self._terms.values()), *self._held_to(self._terms)) + self._constant
        return {"ewc/penalty": self.config.ewc_lambda / 2 * penalty}

    def _held_to(self, names: Iterable[str]) -> tuple[list[Tensor], list[Tensor]]:
        """S and m."""
        return [self.precision_[name] for name in names], [self.centre_[name] for name in names]

    @torch.no_grad()
    def weight_gradients(self, ctx: MethodContext, grads: GradView) -> None:
        """The gradient of the penalty, lambda S (theta - m), of this rank's part."""
        if not self._terms:
            return
        precision, centre = self._held_to(self._terms)
        shift = torch._foreach_sub([w.float() for w in grads.lists(self._terms)[0]], centre)
        pull = torch._foreach_mul(shift, precision)
        penalty = torch.stack([(a * b).sum() for a, b in zip(shift, pull, strict=True)]).sum()
        grads.add_(dict(zip(self._terms, torch._foreach_mul(pull, self.config.ewc_lambda), strict=True)))
        ctx.log("ewc/penalty", self.config.ewc_lambda / 2 * (grads.total(penalty) + self._constant))

    def on_rehearsed(self, model: nn.Module) -> None:
        """The weights now are those that earlier tasks are good with: they are held to these, no cost accrued."""
        held = {name: p for name, p in trainable_parameters(model).items() if name in self.centre_}
        for name, weights in full(held).items():
            self.centre_[name] = weights.float().to(self.centre_[name].device)
            self.constant_[name] = 0.0

    # -- Fisher information ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def on_gradients(self, ctx: MethodContext, grads: GradView) -> None:
        if self.config.fisher != "trace" or not self.config.ewc_lambda:
            return
        named = trainable_parameters(ctx.model)
        if ctx.state.global_step == 0:
            empty = [torch.zeros_like(w, dtype=torch.float32) for w in grads.lists(named)[0]]
            self.running_ = dict(zip(named, empty, strict=True))
            self.steps_ = None
        weights, gradients = grads.lists(self.running_)
        present = [n for n, g in zip(self.running_, gradients, strict=True) if g is not None]
        weights, gradients = grads.lists(present)
        scale = ctx.dist.grad_scale()
        squares = dict(zip(present, [g.float() / scale for g in gradients if g is not None], strict=True))
        pulled = [n for n in present if n in self._terms]
        if pulled:
            held_to = (dict(zip(pulled, state, strict=True)) for state in self._held_to(pulled))
            precision, centre = (list(grads.local(state).values()) for state in held_to)
            pull = torch._foreach_sub(grads.lists(pulled)[0], centre)
            torch._foreach_mul_(pull, precision)
            torch._foreach_sub_([squares[n] for n in pulled], pull, alpha=self.config.ewc_lambda)
        task = list(squares.values())
        # A step with a NaN or infinite gradient, such as one that fp16 skips, does not count.
        finite = grads.all_finite(task, next(iter(self.running_.values())).device)
        task = [torch.where(finite, g, 0.0) for g in task]
        torch._foreach_addcmul_([self.running_[n] for n in present], task, task)
        self.steps_ = finite.float() if self.steps_ is None else self.steps_.to(finite.device) + finite

    def on_task_end(self, ctx: MethodContext) -> None:
        self._terms = {}
        if not self.config.ewc_lambda:
            return
        named = trainable_parameters(ctx.model)
        fisher = self._of_steps(ctx) if self.config.fisher == "trace" else self._of_rows(ctx, named)
        if ctx.dist.whole_weights:
            weights = {name: p.detach() for name, p in named.items()}
        else:  # whole until the next task, on the CPU
            weights = full(named)
            self.precision_, self.centre_ = self._whole("precision_"), self._whole("centre_")
        for name, w in weights.items():
            self._add(name, fisher[name].to(w.device), w.float())
        self.running_, self.steps_ = {}, None

    def _add(self, name: str, fisher: Tensor, weights: Tensor) -> None:
        old, decay = self.precision_.get(name), self.config.online_decay
        if old is None:
            self.precision_[name], self.centre_[name], self.constant_[name] = fisher, weights.clone(), 0.0
        elif decay is not None:
            self.precision_[name], self.centre_[name] = decay * old.to(fisher.device) + fisher, weights.clone()
        else:
            centre = self.centre_[name].to(fisher.device)
            total, centre, constant = combine(old.to(fisher.device), centre, fisher, weights)
            self.precision_[name], self.centre_[name] = total, centre
            self.constant_[name] += float(constant)

    def _of_steps(self, ctx: MethodContext) -> dict[str, Tensor]:
        """The sum over steps divided by the steps of one epoch."""
        assert self.steps_ is not None
        factor = float(ctx.state.epoch or 1.0) / self.steps_.clamp_min(1)
        return {name: total.to(factor.device) * factor for name, total in self._whole("running_").items()}

    def _of_rows(self, ctx: MethodContext, named: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """The mean of squared gradients over rows, which are split over the ranks."""
        count, parameters = len(ctx.rows), list(named.values())
        chosen = list(range(count))
        if self.config.fisher_rows is not None and self.config.fisher_rows < count:
            generator = torch.Generator().manual_seed(ctx.seed + ctx.task.index)
            chosen = sorted(torch.randperm(count, generator=generator)[: self.config.fisher_rows].tolist())
        shapes = [full_shape(p) for p in parameters]
        sizes = [shape.numel() for shape in shapes]
        total = torch.zeros(sum(sizes), device=parameters[0].device)
        side = SideGradients(ctx.model, ctx.dist)
        with evaluating(ctx.model):
            for (row,), counts in side.rounds(chosen):
                gradient = side.flat(self._row_loss(ctx, row), parameters)
                if counts:
                    total.addcmul_(gradient, gradient)
        pieces = (ctx.dist.sum_(total) / len(chosen)).split(sizes)
        return {name: piece.view(shape) for name, piece, shape in zip(named, pieces, shapes, strict=True)}

    def _row_loss(self, ctx: MethodContext, row: int) -> Tensor:
        batch = ctx.make_batch([ctx.rows[row]])
        # Without the fp16 loss scale small gradients would vanish in half precision.
        with ctx.autocast() if ctx.dist.grad_scale() == 1.0 else nullcontext():
            outputs = ctx.model(**batch)
        if self.config.fisher == "per_sample":
            loss = outputs.loss
            if loss is None:
                raise InputError("method 'ewc': the model gives no loss for a row; give every row `labels`")
            return loss
        positions = label_positions(batch["labels"], shifts_labels(ctx.model))
        logits = logits_at_labels(outputs.logits, positions, batch["labels"], self.name).flatten(0, 1).float()
        generator = torch.Generator().manual_seed(ctx.seed + 1_000_003 * (ctx.task.index + 1) + row)
        drawn = draw(logits.detach(), generator)
        return F.cross_entropy(logits, drawn)


def draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One outcome of each row's softmax, from a generator on the CPU wherever the logits are; [n, classes] -> [n]."""
    uniform = torch.rand(len(logits), 1, generator=generator, dtype=torch.float64).to(logits.device)
    below = logits.double().softmax(-1).cumsum(-1) <= uniform
    return below.sum(-1).clamp_max(logits.shape[-1] - 1)
