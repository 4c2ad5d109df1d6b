r"""SEEKR: replay a few rows of earlier tasks, and keep what the heads that matter attended to on them.

    L_new = L_task(new)                     L_rep = (1 - w) L_task(stored) + w L_ld + \lambda L_ad

    L_ld = mean over label positions of KL(p_k || p)                                   p_k: the teacher after task k
    L_ad = mean over layers, heads h in H_k and query rows t of KL(A_k[h, t, :] || A[h, t, :])

    S_h = mean over rows of task k of mean((dL/dA_h)^2),   S~_h = S_h / \sum_{h' in layer} S_h'      task sensitivity
    F_h = mean over rows of task k of mean((A_h after task k - A_h before it)^2)                     forgettability
    I_h = \sum_k S~_h F_h     (paper: \sum_k S~_h times \sum_k F_h)
    H_k = the `heads` heads with the largest I_h, of the `layers` layers with the largest sum of I_h

With g_h the gradient of head h's output and V_h its values, dL/dA_h = g_h V_h^T, so mean((dL/dA_h)^2) =
<g_h^T g_h, V_h^T V_h> / S^2: no map is built.

Source: He et al., "SEEKR: Selective Attention-Guided Knowledge Retention for Continual Learning of Large Language
Models", arXiv:2411.06171, Eq. 6-13 and Alg. 1, and its code at github.com/jinghan1he/SEEKR. METHODS.md lists where they
disagree.
Deviation: L_ld stands at the positions that predict a label; the code takes those of the labels, one too far.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ..attention import (
    KWARG,
    Capture,
    Change,
    Distil,
    LayerTarget,
    Sensitivity,
    attention_kl,
    head_sensitivity,
    refuse_reentrant_arguments,
    select_heads,
)
from ..collators import TeacherBatch
from ..distillation import (
    OWN_COLUMNS,
    ReplayDistillation,
    ReplayDistillationConfig,
    RowLayout,
    check_choice,
    check_weight,
    evaluating,
    logit_kl,
    logits_at,
    query_rows,
    take_rows,
    teacher_forward,
    trainable_copy,
    without_labels,
)
from ..distributed import is_partitioned
from ..errors import InputError
from ..signals import AttentionSignal, RowSignals, SignalStore
from ..taps import AttentionTap
from .base import MethodContext

__all__ = ["SEEKR", "SEEKRConfig", "attention_kl", "head_sensitivity", "select_heads"]

LAYERS, HEADS = 24, 128


@dataclass
class SEEKRConfig(ReplayDistillationConfig):
    logit_weight: float = field(
        default=0.5, metadata={"help": "w: weight of L_ld; the task loss on stored rows has 1 - w (the code: 0.5)."}
    )
    attention_weight: float | None = field(
        default=None,
        metadata={
            "help": "lambda of L_ad; default: 1e3 for weights (the code; the paper: 1e2 where 10 % are replayed), 1e2 "
            "for outputs, whose relative error is several times as large a number."
        },
    )
    attention: Literal["weights", "outputs"] = field(
        default="weights",
        metadata={
            "help": "What heads must keep: their attention weights (the paper), or their outputs, as a relative "
            "squared error: exact with kernels that never build the weights, and smaller to store where rows are "
            "longer than a head is wide."
        },
    )
    layers: int | None = field(
        default=None,
        metadata={"help": "How many layers may have chosen heads; default: 24 (the code), or all of a smaller model."},
    )
    heads: int | None = field(
        default=None,
        metadata={"help": "How many heads, in all layers together; default: 128 (the code), or all there are."},
    )
    query_rows: int = field(default=100, metadata={"help": "Random query rows of each stored row; 0: all (100)."})
    head_choice: Literal["importance", "sensitivity", "forgettability", "random"] = field(
        default="importance",
        metadata={
            "help": "I, or one factor alone, or random (the paper's ablation). sensitivity is S before it is divided "
            "by its layer's sum, after which all layers would be equal."
        },
    )
    importance: Literal["sum_of_products", "product_of_sums"] = field(
        default="sum_of_products", metadata={"help": "I over the tasks: as the code, or as the paper."}
    )
    head_plan: Literal["per_task", "global"] = field(
        default="per_task",
        metadata={
            "help": "per_task: heads are chosen once, when a task ends (the code). global: for all stored rows by the "
            "newest I (the paper's Alg. 1); needs an online teacher."
        },
    )
    masked_scores: bool = field(
        default=False,
        metadata={"help": "Leave positions that cannot be attended out of S; the code counts them (19-32 % of it)."},
    )
    normalise_scores: bool = field(
        default=False,
        metadata={"help": "Divide F of each task by its sum, so that tasks with short rows do not outweigh others."},
    )
    kl_reduction: Literal["mean_rows", "sum"] = field(
        default="mean_rows",
        metadata={"help": "L_ad as a mean (the code), or summed over layers, heads and rows (Eq. 12)."},
    )
    kl_epsilon: float = field(
        default=0.0, metadata={"help": "Added to the student's weights before the logarithm; the code: 1e-8."}
    )
    logit_shift: Literal["correct", "reference"] = field(
        default="correct", metadata={"help": "reference: L_ld one position too far, as the code."}
    )
    attention_store: Literal["maps", "qk"] = field(
        default="maps",
        metadata={
            "help": "Store rows of the maps, or queries and keys: smaller where query_rows is 0 and rows are long."
        },
    )
    recompute: bool = field(
        default=False, metadata={"help": "Compute L_ad again in backward and keep none of its maps: less memory."}
    )
    track_drift: bool = field(
        default=True, metadata={"help": "After each task, measure L_ad on the rows of earlier ones (cached teacher)."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.attention_weight is None:
            self.attention_weight = 1e2 if self.attention == "outputs" else 1e3
        check_weight("logit_weight", self.logit_weight, most=1)
        check_weight("attention_weight", self.attention_weight)
        check_weight("kl_epsilon", self.kl_epsilon)
        check_choice("attention", self.attention, ("weights", "outputs"))
        check_choice("head_choice", self.head_choice, ("importance", "sensitivity", "forgettability", "random"))
        check_choice("importance", self.importance, ("sum_of_products", "product_of_sums"))
        check_choice("head_plan", self.head_plan, ("per_task", "global"))
        check_choice("kl_reduction", self.kl_reduction, ("mean_rows", "sum"))
        check_choice("logit_shift", self.logit_shift, ("correct", "reference"))
        check_choice("attention_store", self.attention_store, ("maps", "qk"))
        for option in ("layers", "heads", "query_rows"):
            value, least = getattr(self, option), 0 if option == "query_rows" else 1
            if value is None and least:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise InputError(f"{option}={value!r} must be a whole number, at least {least}")
        for option in ("masked_scores", "normalise_scores", "recompute", "track_drift"):
            if not isinstance(getattr(self, option), bool):
                raise InputError(f"{option}={getattr(self, option)!r} must be true or false")
        if self.head_plan == "global" and self.teacher == "cached":
            raise InputError(
                "head_plan='global' needs the maps of heads that were not stored; use teacher='previous' or 'tasks'"
            )
        if self.attention == "outputs" and (self.kl_epsilon or self.recompute):
            option = "kl_epsilon" if self.kl_epsilon else "recompute"
            raise InputError(f"{option}={getattr(self, option)!r} is for attention='weights'; leave it out")
        if self.attention_store == "qk" and (self.attention == "outputs" or self.teacher != "cached"):
            raise InputError("attention_store='qk' is for attention='weights' with teacher='cached'; leave it out")


def combined_importance(sums: Mapping[str, Tensor], rule: str) -> Tensor:
    """I from sums over tasks, each [modules, heads]: of S~ F (`product`), or of S~ times of F (Eq. 10)."""
    return sums["product"] if rule == "sum_of_products" else sums["sensitivity"] * sums["change"]


class SEEKR(ReplayDistillation[SEEKRConfig]):
    """Selective attention-guided knowledge retention. Logs `seekr/logits` and `seekr/attention`, weights included.

    State, beside the buffer: `modules_` (attention modules, in order), `sensitivity_` (S~), `forgettability_` (F) of
    the last task and `importance_` (I), each [modules, heads]; `sums_` over tasks; `plans_` (heads by task and module);
    `drift_` (after which task, of which task: L_ad on its stored rows).
    """

    config_class = SEEKRConfig
    paper = "arxiv:2411.06171"

    def __init__(self, config: SEEKRConfig | None = None, **options: Any) -> None:
        super().__init__(config, **options)
        self.stored_loss_weight = 1 - self.config.logit_weight
        self.needs_logits = bool(self.config.logit_weight) and self.config.loss_mix == "alternate"
        self.shift_logits = self.config.logit_shift == "correct"
        self.modules_: list[str] = []
        self.sensitivity_: Tensor | None = None
        self.forgettability_: Tensor | None = None
        self.importance_: Tensor | None = None
        self.sums_: dict[str, Tensor] = {}
        self.plans_: dict[str, dict[str, list[int]]] = {}
        self.drift_: dict[str, dict[str, float]] = {}
        self._request: Any = None

    @property
    def _attends(self) -> bool:
        wanted = bool(self.config.attention_weight) or self.config.track_drift
        return wanted and self.config.source == "past"

    def default_replay_weight(self, new: int, stored: int) -> float:
        """As often as stored micro-batches come between new ones where they alternate."""
        return min(1.0, stored / max(1, new))

    # -- the plan ----------------------------------------------------------------------------------------------------

    def on_task_begin(self, ctx: MethodContext) -> None:
        super().on_task_begin(ctx)
        if not self._attends:
            return
        refuse_reentrant_arguments(ctx.args, self.name)
        with AttentionTap(ctx.model, self.name) as tap:
            modules, heads, self._sides = tap.names, tap.num_heads, tap.sides
        if self.modules_ and self.modules_ != modules:
            first = next(iter(set(self.modules_) ^ set(modules)), "another order")
            raise InputError(
                f"method '{self.name}': the attention modules differ from those of the task before ('{first}'); go on "
                "with the model it was started with"
            )
        self._modules, self._num_heads = modules, heads
        layers = self.config.layers or min(LAYERS, len(modules))
        self._layers, self._heads = layers, self.config.heads or min(HEADS, layers * heads)
        try:
            select_heads(torch.zeros(len(modules), heads), layers, self._heads)
        except InputError as error:
            raise InputError(f"method '{self.name}': {error}") from error

    def _plan_of(self, task: int) -> dict[str, list[int]]:
        tasks = sorted(self.plans_)
        return self.plans_[tasks[-1] if self.config.head_plan == "global" else f"{task:03d}"]

    def planned_attention(self, row_id: str, task: int, layout: RowLayout) -> dict[str, AttentionSignal]:
        if not self.config.attention_weight:
            return {}
        kind = self.config.attention
        return {
            name: AttentionSignal(kind, self._sides[name], torch.tensor(heads), self._query_rows(name, row_id, layout))
            for name, heads in self._plan_of(task).items()
        }

    def _query_rows(self, module: str, row_id: str, layout: RowLayout) -> Tensor:
        side = self._sides[module][0]
        rows = query_rows(layout.lengths[side], self.config.query_rows, self.config.seed, f"{row_id} {side}")
        return torch.tensor(rows, dtype=torch.int32)

    def _target(self, module: str, heads: Sequence[int], row_id: str, layout: RowLayout) -> LayerTarget:
        """The heads and query rows of a batch of one stored row."""
        rows = self._query_rows(module, row_id, layout).long() + layout.starts[self._sides[module][0]]
        chosen = torch.tensor([list(heads)])
        target = LayerTarget(
            None,
            chosen,
            torch.ones_like(chosen, dtype=torch.bool),
            rows[None],
            torch.ones(1, len(rows), dtype=torch.bool),
        )
        return target.to(self._device)

    # -- a task ------------------------------------------------------------------------------------------------------

    def _weights_before(self, ctx: MethodContext) -> dict[str, Tensor]:
        self._device = next(ctx.model.parameters()).device
        before = super()._weights_before(ctx)
        if not before and self._needs_change and ctx.lora.is_peft:
            before = trainable_copy(ctx.model, ctx.dist)
        self._maps_before: Any = None
        if not before and self._needs_change:
            self._maps_before = self._capture_before(ctx)
        return before

    @property
    def _needs_change(self) -> bool:
        return self._attends and self.config.head_choice in ("importance", "forgettability")

    def _all_heads(self, row_id: str, layout: RowLayout) -> dict[str, LayerTarget]:
        return {name: self._target(name, range(self._num_heads), row_id, layout) for name in self._modules}

    @contextmanager
    def task_context(self, ctx: MethodContext) -> Iterator[None]:
        if not self._attends or not len(self.buffer_) or not self.config.attention_weight:
            yield
            return
        with AttentionTap(ctx.model, self.name):
            yield

    def attention_kwargs(self, teacher: TeacherBatch) -> dict[str, Any]:
        self._request = None
        if not self.config.attention_weight or not teacher.attention:
            return {}
        self._request = self._distil(teacher)
        return {KWARG: self._request}

    def _distil(self, teacher: TeacherBatch) -> Distil:
        c = self.config
        return Distil(
            c.attention, teacher.attention, reduction=c.kl_reduction, recompute=c.recompute, epsilon=c.kl_epsilon
        )

    def teacher_kwargs(self, teacher: TeacherBatch) -> dict[str, Any]:
        if not teacher.attention:
            return {}
        self._request = Capture(self.config.attention, teacher.attention)
        return {KWARG: self._request}

    def keep_attention(self, teacher: TeacherBatch, task_of_row: Tensor, task: int | None) -> None:
        for name, target in teacher.attention.items():
            target.values = take_rows(target.values, self._request.values[name], target.batch, task_of_row, task)

    def distillation_losses(self, teacher: TeacherBatch, outputs: Any) -> dict[str, Tensor]:
        losses, target = {}, teacher.logits
        if self.config.logit_weight and target is not None:
            student = logits_at(outputs.logits, target)
            distance = logit_kl(student, target.values, target.lse, target.indices)
            losses["seekr/logits"] = self.config.logit_weight * distance
        if self._request is not None:
            losses["seekr/attention"] = float(self.config.attention_weight or 0) * self._attention_loss(
                self._request, teacher
            )
        return losses

    def _attention_loss(self, request: Distil, teacher: TeacherBatch) -> Tensor:
        """Mean over the stored rows (those without heads in a layer count) and layers, or summed over layers."""
        layers = torch.stack([loss.sum() for loss in request.losses.values()]) / len(teacher.rows)
        return layers.mean() if self.config.kl_reduction == "mean_rows" else layers.sum()

    # -- the end of a task -------------------------------------------------------------------------------------------

    def _capture_before(self, ctx: MethodContext) -> SignalStore:
        """Queries and keys of all heads on the chosen rows, on disk: full fine-tuning has no other way back.

        In the dtype of the model, so that nothing is lost: F squares small differences.
        """
        assert ctx.folder is not None
        folder, dtype = ctx.folder / f"{self.name}-before", next(ctx.model.parameters()).dtype
        split = any(is_partitioned(p) for p in ctx.model.parameters())  # collected: every rank takes part
        if ctx.dist.is_main:
            shutil.rmtree(folder, ignore_errors=True)
        if ctx.dist.is_main or split:
            store = SignalStore(folder if ctx.dist.is_main else None)
            with AttentionTap(ctx.model, self.name), evaluating(ctx.model), torch.no_grad(), ctx.autocast():
                for row_id, batch, layout in self.own_rows(ctx):
                    request = Capture("qk", self._all_heads(row_id, layout))
                    ctx.model(**without_labels(ctx.model, batch), **{KWARG: request})
                    # As padded as the batch of one row, which will be the same after the task.
                    lengths = {self._sides[n][1]: key.shape[2] for n, (_, key, *_) in request.values.items()}
                    signals = {}
                    for name, (query, key, *bias) in request.values.items():
                        heads, rows = request.layers[name].heads[0], request.layers[name].rows[0]
                        signals[name] = signal = AttentionSignal("qk", self._sides[name], heads, rows)
                        signal.query, signal.key = query[0].to(dtype), key[0].to(dtype)
                        signal.values = bias[0][0].to(dtype) if bias else None
                    if ctx.dist.is_main:
                        store.write(row_id, RowSignals(lengths, None, signals))
        ctx.dist.barrier()
        store = SignalStore(folder)
        self._see(store, ctx)
        return store

    def _describe(self, task: str) -> str:
        said = super()._describe(task)
        if self.plans_ and self._attends:
            plan = self.plans_[sorted(self.plans_)[-1]]
            said += f", {sum(map(len, plan.values()))} heads in {len(plan)} layers"
        if self.drift_.get(task):
            drift = self.drift_[task]
            said += f", drift of attention on earlier tasks {sum(drift.values()) / len(drift):.3g}"
        return said

    def choose_heads(self, ctx: MethodContext) -> None:
        if not self._attends:
            return
        self.modules_ = list(self._modules)
        with AttentionTap(ctx.model, self.name):
            sensitivity, change = self._scores(ctx)
        if self._maps_before is not None:
            ctx.dist.barrier()
            if ctx.dist.is_main:
                shutil.rmtree(self._maps_before.folder)
            self._maps_before = None
        share = sensitivity / sensitivity.sum(1, keepdim=True).clamp_min(torch.finfo(sensitivity.dtype).tiny)
        raw = self.sums_.get("raw", torch.zeros_like(sensitivity)) + sensitivity
        if self.config.normalise_scores:
            change = change / change.sum().clamp_min(torch.finfo(change.dtype).tiny)
        self.sensitivity_, self.forgettability_ = share, change
        before = {name: self.sums_.get(name, torch.zeros_like(share)) for name in ("sensitivity", "change", "product")}
        self.sums_ = {
            "sensitivity": before["sensitivity"] + share,
            "change": before["change"] + change,
            "product": before["product"] + share * change,
            "raw": raw,
        }
        self.importance_ = combined_importance(self.sums_, self.config.importance).clone()
        choice = {
            "importance": self.importance_,
            "sensitivity": self.sums_["raw"],  # S~ sums to one in every layer and could not choose between them
            "forgettability": self.sums_["change"],
            "random": torch.rand(share.shape, generator=torch.Generator().manual_seed(self.config.seed)).double(),
        }[self.config.head_choice]
        chosen = select_heads(choice, self._layers, self._heads)
        self.plans_[f"{ctx.task.index:03d}"] = {
            name: mask.nonzero().flatten().tolist()
            for name, mask in zip(self.modules_, chosen, strict=True)
            if mask.any()
        }

    def _scores(self, ctx: MethodContext) -> tuple[Tensor, Tensor]:
        """S and F of this task, each [modules, heads], float64: means over the chosen rows."""
        sensitivity = torch.zeros(len(self._modules), self._num_heads, dtype=torch.float64)
        change = torch.zeros_like(sensitivity)
        for row_id, batch, layout in self.own_rows(ctx):
            inputs = {k: v for k, v in batch.items() if k not in OWN_COLUMNS}
            request = Sensitivity(masked=self.config.masked_scores)
            with evaluating(ctx.model), ctx.autocast():
                loss = ctx.model(**inputs, **{KWARG: request}).loss
                torch.autograd.grad(loss, list(request.outputs.values()))  # touches no parameter's .grad
            sensitivity += torch.stack([request.scores[name][0] for name in self._modules]).double().cpu()
            if self._needs_change:
                change += self._change(ctx, row_id, without_labels(ctx.model, batch), layout).double().cpu()
        return sensitivity / max(1, len(self._chosen)), change / max(1, len(self._chosen))

    def _change(self, ctx: MethodContext, row_id: str, inputs: Mapping[str, Any], layout: RowLayout) -> Tensor:
        """Mean squared difference of each head's weights on one row from before the task; [modules, heads]."""
        targets = self._all_heads(row_id, layout)
        before: Any
        if self._maps_before is not None:
            before = {
                name: tuple(t[None].to(self._device).float() for t in (s.query, s.key, s.values) if t is not None)
                for name, s in self._maps_before.read(row_id).attention.items()
            }
        else:
            capture = Capture("qk", targets)
            teacher_forward(ctx, self._before, {**inputs, KWARG: capture})
            before = capture.values
        request = Change(before, targets)
        with evaluating(ctx.model), torch.no_grad(), ctx.autocast():
            ctx.model(**inputs, **{KWARG: request})
        return torch.stack([request.scores[name][0] for name in self._modules])

    def capture_kwargs(self, row_id: str, layout: RowLayout) -> dict[str, Any]:
        self._request = None
        if not self._attends:
            return {}
        plan = self.plans_[sorted(self.plans_)[-1]]
        kind = "qk" if self.config.attention_store == "qk" else self.config.attention
        self._request = Capture(kind, {name: self._target(name, heads, row_id, layout) for name, heads in plan.items()})
        return {KWARG: self._request}

    def captured(self, layout: RowLayout) -> dict[str, AttentionSignal]:
        if self._request is None:
            return {}
        signals = {}
        for name, target in self._request.layers.items():
            query_side, key_side = self._sides[name]
            rows = (target.rows[0] - layout.starts[query_side]).cpu().int()
            keys = slice(layout.starts[key_side], layout.starts[key_side] + layout.lengths[key_side])
            signal = AttentionSignal(self._request.kind, (query_side, key_side), target.heads[0].cpu().int(), rows)
            found = self._request.values[name]
            if signal.kind == "qk":
                signal.query, signal.key = found[0][0].cpu().half(), found[1][0][:, keys].cpu().half()
            else:
                values = found[0] if signal.kind == "outputs" else found[0][..., keys]
                signal.values = values.cpu().half()
            signals[name] = signal
        return signals

    def signal_key(self, ctx: MethodContext) -> dict[str, str]:
        c = self.config
        key = super().signal_key(ctx) | {"attention": "none"}
        if self._attends:
            chosen = f"{c.head_choice}, {c.importance}, {c.masked_scores}, {c.normalise_scores}, {c.seed}"
            budgets = f"layers={self._layers}, heads={self._heads}, query_rows={c.query_rows}"
            key["attention"] = f"{c.attention}, {c.attention_store}, {budgets}, by {chosen}"
        return key

    def _write_signals(self, ctx: MethodContext) -> None:
        if not self._attends:
            super()._write_signals(ctx)
            return
        with AttentionTap(ctx.model, self.name):
            super()._write_signals(ctx)
            if self.config.track_drift and len(self.buffer_):
                self._measure_drift(ctx)

    def _measure_drift(self, ctx: MethodContext) -> None:
        """L_ad on the stored rows of each earlier task."""
        found: dict[int, list[float]] = {}
        collator, rows = self._collator, self._stored_rows(ctx)
        with evaluating(ctx.model), torch.no_grad(), ctx.autocast():
            for index, task in enumerate(self.buffer_.tasks):
                batch = ctx.make_batch([rows[index]], collator)
                teacher = batch.pop("teacher").to(self._device)
                request = self._distil(teacher)
                ctx.model(**without_labels(ctx.model, batch), **{KWARG: request})
                found.setdefault(task, []).append(float(self._attention_loss(request, teacher)))
        names = list(self.buffer_.sizes)
        self.drift_[ctx.task.name] = {names[t]: sum(v) / len(v) for t, v in found.items()}
