"""Attention of selected heads and query rows: captured, distilled and scored inside the attention function.

`taps.AttentionTap` registers an attention function of its own with transformers (`ALL_ATTENTION_FUNCTIONS`), together
with the mask function of the implementation it stands in for: without one, masks would silently be None. What to do
with a forward travels as one keyword argument and reaches every layer, also through PEFT and gradient checkpointing:

    with AttentionTap(model) as tap:
        request = Distil("weights", targets)
        loss = model(**batch, attention_request=request).loss + weight * sum(x.mean() for x in request.losses.values())

A request serves one forward. The output is that of the stock function; only the chosen heads and rows are computed
again, in float32, so that the maps of all heads never exist (unless the model itself runs `eager`).
Weights are softmax(scaling q k^T [soft-capped] + position bias + mask), before dropout.

Source: SEEKR, https://arxiv.org/abs/2411.06171 (Eq. 8-12); reference code github.com/jinghan1he/SEEKR,
training/seekr.py and utils/llama_flash_att.py.
"""

from __future__ import annotations

import functools
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .errors import InputError

KWARG = "attention_request"
# What a request collects is in a UserDict: FSDP2 copies the dicts and dataclasses among a layer's arguments once they
# hold tensors with a graph, and what the next layer adds to its copy would be lost.
FLASH = ("flash_attention_2", "flash_attention_3")
BLOCK = 2**22  # scores computed at a time
KEEP_GRAPH = "use gradient_checkpointing_kwargs={'use_reentrant': False}"


# -- functions ---------------------------------------------------------------------------------------------------------


def attention_kl(teacher: Tensor, student: Tensor, row_mask: Tensor) -> Tensor:
    """KL(teacher || student) of attention weights: mean over heads and valid rows of a sample, then over samples.

        (1/B) sum_b mean over (h, t) of sum_j A*[h,t,j] (log A*[h,t,j] - log A[h,t,j])

    Source: utils/llama_flash_att.py:222-282 of the reference (without its 1e-8 and its bf16). A sample without valid
    rows adds 0 and counts.

    Args:
        teacher: probabilities, [batch, heads, rows, keys]; entries of 0 add 0.
        student: probabilities of the same shape.
        row_mask: rows that count, [batch, rows].
    """
    dtype = torch.promote_types(student.dtype, torch.float32)
    teacher, student = teacher.to(dtype), student.to(dtype)
    row_mask = row_mask.bool()
    counts = (teacher > 0) & row_mask[:, None, :, None]
    teacher = torch.where(counts, teacher, 1.0)
    student = torch.where(counts, student, 1.0).clamp_min(torch.finfo(dtype).tiny)
    terms = torch.where(counts, teacher * (teacher.log() - student.log()), 0.0)
    rows = row_mask.sum(1).clamp_min(1) * teacher.shape[1]
    return (terms.sum((1, 2, 3)) / rows).mean()


def head_sensitivity(grad_output: Tensor, value: Tensor) -> Tensor:
    """Mean squared entry of dL/dA = g V^T, without the map: <g^T g, V^T V> / (rows keys).

    Source: training/seekr.py:244-254 of the reference, which keeps the map instead.

    Args:
        grad_output: g, the gradient of a head's output before the output projection, [..., rows, head_dim].
        value: V, [..., keys, head_dim].

    Returns:
        [...], in float32, or float64 if the arguments are.
    """
    return (_gram(grad_output) * _gram(value)).sum((-1, -2)) / (grad_output.shape[-2] * value.shape[-2])


def select_heads(importance: Tensor, layers: int, heads: int) -> Tensor:
    """The `heads` most important heads of the `layers` most important layers; of equals the first.

    A layer's importance is the sum over its heads. Source: training/seekr.py:368-388 of the reference.

    Args:
        importance: [layers of the model, heads of a layer].
        layers: how many layers may have chosen heads.
        heads: how many heads to choose, in all layers together.

    Returns:
        A bool tensor of the same shape.
    """
    if importance.dim() != 2 or not importance.isfinite().all():
        raise InputError(
            f"importance of shape {tuple(importance.shape)} must be a finite number for each layer and head"
        )
    all_layers, width = importance.shape
    for budget, value, most in (("layers", layers, all_layers), ("heads", heads, layers * width)):
        if not 1 <= value <= most:
            where = "the model has" if budget == "layers" else f"{layers} layers have"
            raise InputError(f"the budget {budget}={value} must be between 1 and {most}, as many as {where}")
    kept = importance.sum(1).sort(descending=True, stable=True).indices[:layers].sort().values
    best = importance[kept].flatten().sort(descending=True, stable=True).indices[:heads]
    chosen = torch.zeros_like(importance, dtype=torch.bool)
    chosen[kept[best // width], best % width] = True
    return chosen


def refuse_reentrant(model: nn.Module) -> None:
    """Raise InputError if a module checkpoints reentrantly: its forward has no graph, and a loss in it no gradient."""
    for module in model.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        options = function.keywords if isinstance(function, functools.partial) else {}
        if getattr(module, "gradient_checkpointing", False) and options.get("use_reentrant"):
            raise InputError(f"gradient checkpointing with use_reentrant=True drops the attention loss; {KEEP_GRAPH}")


def refuse_reentrant_arguments(args: Any, method: str, why: str = "it would drop the attention loss") -> None:
    """The same before training, by the training arguments; None is not looked at."""
    for name in ("gradient_checkpointing", "activation_checkpointing"):
        options = getattr(args, f"{name}_kwargs", None) or {}
        if getattr(args, name, False) and options.get("use_reentrant"):
            raise InputError(
                f"method '{method}' cannot work with training.{name}_kwargs={options!r}, for {why}; use "
                "{'use_reentrant': False}"
            )


def _gram(x: Tensor) -> Tensor:
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x.transpose(-1, -2) @ x


# -- what is selected --------------------------------------------------------------------------------------------------


@dataclass
class LayerTarget:
    """The heads and rows of one attention module that are asked for, and for distillation what they must match.

    Args:
        batch: which samples of the batch, [b]; None: all of them, in order.
        heads: query heads, [b, h], padded with 0.
        head_mask: [b, h], False for padding.
        rows: query positions in the padded sequence, [b, r], padded with 0.
        row_mask: [b, r], False for padding.
        values: the teacher's probabilities, [b, h, r, keys] (0 on padding), or outputs, [b, h, r, head_dim].
        query: in place of `values`, the teacher's queries as they enter the product, [b, h, r, head_dim], ...
        key: ... and keys, of query heads, [b, h, keys, head_dim]; mask and scaling are those of the current forward.
    """

    batch: Tensor | None
    heads: Tensor
    head_mask: Tensor
    rows: Tensor
    row_mask: Tensor
    values: Tensor | None = None
    query: Tensor | None = None
    key: Tensor | None = None

    def to(self, device: torch.device | str) -> LayerTarget:
        found: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: t.to(device) for name, t in found.items() if t is not None})

    def valid(self) -> Tensor:
        """Which heads and rows count, [b, h, r]."""
        return self.head_mask.bool()[:, :, None] & self.row_mask.bool()[:, None, :]

    def blocks(self, keys: int) -> Iterator[tuple[slice, LayerTarget]]:
        """The target in parts of a few heads, of at most `BLOCK` scores (or one head)."""
        step = max(1, BLOCK // max(1, self.rows.numel() * keys))
        for start in range(0, self.heads.shape[1], step):
            part = slice(start, start + step)
            cut: dict[str, Any] = {
                n: None if (t := getattr(self, n)) is None else t[:, part] for n in ("values", "query", "key")
            }
            yield part, replace(self, heads=self.heads[:, part], head_mask=self.head_mask[:, part], **cut)


@dataclass
class AttentionCall:
    """One call of an attention function. query [B, H, Q, d], key and value [B, H_kv, K, d]."""

    name: str
    sides: tuple[str, str]
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    bias: Tensor | None
    scaling: float
    softcap: float | None
    causal: bool
    window: int | None
    flash: bool

    @property
    def dtype(self) -> torch.dtype:
        return torch.promote_types(self.query.dtype, torch.float32)

    def samples(self, target: LayerTarget) -> Tensor:
        if target.batch is not None:
            return target.batch
        return torch.arange(self.query.shape[0], device=self.query.device)

    def at_rows(self, target: LayerTarget) -> tuple[Tensor, Tensor, Tensor]:
        """Indices into [B, H, Q, ...] that give [b, h, r, ...]."""
        return self.samples(target)[:, None, None], target.heads[:, :, None], target.rows[:, None, :]

    def at_keys(self, target: LayerTarget) -> tuple[Tensor, Tensor]:
        """Indices into [B, H_kv, K, d] that give [b, h, K, d]: query head h reads key head h // group."""
        return self.samples(target)[:, None], target.heads // (self.query.shape[1] // self.key.shape[1])

    def row_mask(self, target: LayerTarget) -> Tensor | None:
        """The mask at the chosen rows, [b, 1 or h, r or 1, K]: bool, or to be added, or None."""
        size, width, keys = self.query.shape[0], self.query.shape[2], self.key.shape[2]
        batch, heads, rows = self.at_rows(target)
        if self.mask is not None and self.mask.dim() == 4:
            mask = self.mask[..., :keys].expand(size, -1, width, -1)
            return mask[batch[:, 0], 0, target.rows].unsqueeze(1) if mask.shape[1] == 1 else mask[batch, heads, rows]
        key, row = torch.arange(keys, device=rows.device), rows[..., None]
        if self.flash:
            row = row + keys - width  # flash attention aligns the last row with the last key
        found = [key <= row] if self.causal else []
        if self.window is not None and self.flash:
            found.append((row - key).abs() < self.window)
        if self.mask is not None:
            found.append(self.mask[self.samples(target), None, None, :keys].bool())
        return functools.reduce(torch.logical_and, found) if found else None

    def real(self, given: Mapping[str, Tensor] | None) -> tuple[Tensor, Tensor]:
        """Rows [B, Q] and keys [B, K] that are no padding: by `given`, else as far as the mask shows it."""
        (size, _, width, _), keys, device = self.query.shape, self.key.shape[2], self.query.device
        if given is not None:
            rows, columns = (given[side].to(device).bool() for side in self.sides)
            return rows, columns
        ones = torch.ones(size, max(width, keys), dtype=torch.bool, device=device)
        if self.mask is None:
            return ones[:, :width], ones[:, :keys]
        if self.mask.dim() == 2:
            column = self.mask[:, :keys].bool()
            return (column if self.sides[0] == self.sides[1] else ones[:, :width]), column
        allowed = _allowed(self.mask[..., :keys]).any(1).expand(size, -1, -1)
        column, row = allowed.any(1), allowed.any(2).expand(-1, width)
        return (row & column if self.sides[0] == self.sides[1] and width == keys else row), column

    def scores(
        self, query: Tensor, key: Tensor, bias: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Scores [b, h, r, K] of chosen queries and keys, and what soft-capping multiplies their gradient by."""
        slope = None
        with torch.autocast(query.device.type, enabled=False):
            scores = query.to(self.dtype) @ key.to(self.dtype).transpose(-1, -2) * self.scaling
        if self.softcap is not None:
            bent = torch.tanh(scores / self.softcap)
            scores, slope = bent * self.softcap, 1 - bent * bent
        if bias is not None:
            scores = scores + bias.to(self.dtype)
        least = torch.finfo(self.dtype).min  # not -inf: a row of padding must not become NaN
        if mask is not None:
            scores = scores.masked_fill(~mask, least) if mask.dtype == torch.bool else (scores + mask).clamp_min(least)
        return scores, slope

    def selected_bias(self, target: LayerTarget) -> Tensor | None:
        if self.bias is None:
            return None
        return self.bias[..., : self.key.shape[2]].expand(self.query.shape[0], -1, -1, -1)[self.at_rows(target)]

    def selected_scores(self, target: LayerTarget) -> tuple[Tensor, Tensor | None]:
        query, key = self.query[self.at_rows(target)], self.key[self.at_keys(target)]
        return self.scores(query, key, self.selected_bias(target), self.row_mask(target))

    def weights(self, target: LayerTarget) -> Tensor:
        return self.selected_scores(target)[0].softmax(-1)

    def teacher(self, target: LayerTarget) -> Tensor:
        """The teacher's probabilities, [b, h, r, K]."""
        if target.values is not None:
            found = target.values.to(self.dtype)
            total = found.sum(-1, keepdim=True)  # not one, where the teacher was stored in half precision
            found = found / torch.where(total > 0, total, 1.0)
        elif target.query is None or target.key is None:
            raise InputError(f"attention target of '{self.name}': give the teacher's values, or its query and key")
        elif self.bias is not None:
            raise InputError(
                f"attention target of '{self.name}': query and key lack the position bias of this model; store values"
            )
        else:
            self._check_keys(target.key.shape[2])
            found = self.scores(target.query, target.key, None, self.row_mask(target))[0].softmax(-1)
        self._check_keys(found.shape[-1])
        return found

    def _check_keys(self, keys: int) -> None:
        if keys != self.key.shape[2]:
            raise InputError(
                f"attention target of '{self.name}': the teacher has {keys} keys and the model {self.key.shape[2]}; "
                "place the target in the padded batch"
            )


def _allowed(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


# -- requests ----------------------------------------------------------------------------------------------------------


class Request:
    """What one forward is asked for. `run` sees every attention module once, or twice under checkpointing."""

    def names(self) -> set[str]:
        return set()

    def run(self, call: AttentionCall, output: Tensor, training: bool) -> None:
        """`output` is that of the attention function, [B, Q, H, head_dim]."""
        raise NotImplementedError


def _check(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"{option}={value!r} is unknown; choose one of {', '.join(choices)}")


@dataclass
class Capture(Request):
    """Keeps what selected heads and rows look like, detached, in float32 (float64 of a float64 model).

    `values[name]`: of kind "weights" [b, h, r, keys] (before dropout), of "outputs" [b, h, r, head_dim] (as the
    attention function gave them), both 0 on padding; of "qk" a tuple of queries [b, h, r, head_dim] and keys
    [b, h, keys, head_dim], and where a position bias is added also that, [b, h, r, keys].
    """

    kind: str
    layers: dict[str, LayerTarget]
    values: MutableMapping[str, Any] = field(default_factory=UserDict)

    def __post_init__(self) -> None:
        _check("Capture: kind", self.kind, ("weights", "outputs", "qk"))

    def names(self) -> set[str]:
        return set(self.layers)

    @torch.no_grad()
    def run(self, call: AttentionCall, output: Tensor, training: bool) -> None:
        if call.name not in self.layers or call.name in self.values:
            return
        target = self.layers[call.name].to(output.device)
        if self.kind == "qk":
            pair = call.query[call.at_rows(target)], call.key[call.at_keys(target)]
            bias = call.selected_bias(target)
            self.values[call.name] = tuple(x.to(call.dtype) for x in ((*pair, bias) if bias is not None else pair))
        else:
            found = call.weights(target) if self.kind == "weights" else _outputs(call, output, target)
            self.values[call.name] = torch.where(target.valid()[..., None], found, 0.0)


@dataclass
class Distil(Request):
    """One loss a sample for each target, computed in the attention function, where checkpointing recomputes it too.

    `losses[name]`, [b], with graph:

        weights:  mean over heads and rows (h, t) of sum_j A*[h,t,j] (log A*[h,t,j] - log A[h,t,j])
        outputs:  mean over heads h of sum_t |o*[h,t] - o[h,t]|^2 / sum_t |o*[h,t]|^2

    A* and o* are the teacher's, A is before dropout, o is what the attention function returned. A sample without valid
    heads or rows adds 0.

    Args:
        kind: "weights" or "outputs".
        targets: by name of the attention module.
        reduction: "mean_rows": the means above (the reference code); "sum": sums instead (the paper, Eq. 12).
        recompute: compute the scores again in the backward pass and keep nothing of size rows x keys.
        epsilon: added to the student's weights before the logarithm; the reference has 1e-8.
    """

    kind: str
    targets: dict[str, LayerTarget]
    reduction: str = "mean_rows"
    recompute: bool = False
    epsilon: float = 0.0
    losses: MutableMapping[str, Tensor] = field(default_factory=UserDict)

    def __post_init__(self) -> None:
        _check("Distil: kind", self.kind, ("weights", "outputs"))
        _check("Distil: reduction", self.reduction, ("mean_rows", "sum"))

    def names(self) -> set[str]:
        return set(self.targets)

    def run(self, call: AttentionCall, output: Tensor, training: bool) -> None:
        if call.name not in self.targets:
            return
        if training and not torch.is_grad_enabled():
            raise InputError(
                f"the attention loss of '{call.name}' has no graph in reentrant checkpointing; {KEEP_GRAPH}"
            )
        target = self.targets[call.name].to(output.device)
        if self.kind == "weights":
            loss = _SelectedKL.apply(call.query, call.key, call.bias, call.mask, _settings(call), target, self)
        else:
            if target.values is None:
                raise InputError(f"attention target of '{call.name}': give the teacher's outputs as values")
            valid = target.valid()
            teacher = target.values.to(call.dtype)
            distance = (teacher - _outputs(call, output, target)).square().sum(-1) * valid
            size = (teacher.square().sum(-1) * valid).sum(-1)
            head = torch.where(size > 0, distance.sum(-1) / torch.where(size > 0, size, 1.0), 0.0)
            heads = valid.any(-1).sum(-1).clamp_min(1) if self.reduction == "mean_rows" else 1
            loss = head.sum(-1) / heads
        self.losses.setdefault(call.name, loss)

    def weight(self, target: LayerTarget, dtype: torch.dtype) -> Tensor:
        """What the KL of each head and row counts, [b, h, r]."""
        valid = target.valid().to(dtype)
        return valid / valid.sum((1, 2), keepdim=True).clamp_min(1) if self.reduction == "mean_rows" else valid


def _outputs(call: AttentionCall, output: Tensor, target: LayerTarget) -> Tensor:
    return output.transpose(1, 2)[call.at_rows(target)].to(call.dtype)


def _settings(call: AttentionCall) -> Callable[..., AttentionCall]:
    """Makes the call again from its tensors, which the graph must hold as saved tensors only."""
    rest = {f.name: getattr(call, f.name) for f in fields(call)}
    for name in ("query", "key", "value", "bias", "mask"):
        del rest[name]
    return lambda query, key, bias, mask: AttentionCall(query=query, key=key, value=key, bias=bias, mask=mask, **rest)


class _SelectedKL(torch.autograd.Function):
    """KL(teacher || student) of chosen heads and rows, [b]. With the scores s and pull = A* (times A / (A + epsilon)):

        dKL/ds = A sum_j pull_j - pull

    is all that is kept, in the dtype of the queries: queries and keys are kept by the stock function anyway.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        settings: Callable[..., AttentionCall],
        target: LayerTarget,
        request: Distil,
    ) -> Tensor:
        call = settings(query, key, bias, mask)
        weight = request.weight(target, call.dtype)
        loss, kept = weight.new_zeros(weight.shape[0]), []
        ctx.recompute = request.recompute or call.softcap is not None or not any(ctx.needs_input_grad)
        for part, block in target.blocks(key.shape[2]):
            kl, residual, _ = _kl(call, block, request.epsilon)
            loss += (kl * weight[:, part]).sum((1, 2))
            if not ctx.recompute:
                kept.append(residual.to(query.dtype))
        ctx.settings, ctx.target, ctx.options = settings, target, replace(request, targets={}, losses={})
        ctx.save_for_backward(query, key, bias, mask, *kept)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        query, key, bias, mask, *kept = ctx.saved_tensors
        call = ctx.settings(query, key, bias, mask)
        weight = ctx.options.weight(ctx.target, call.dtype) * grad[:, None, None]
        needs = ctx.needs_input_grad
        found = [
            torch.zeros_like(t) if t is not None and n else None
            for t, n in zip((query, key, bias), needs, strict=False)
        ]
        for number, (part, block) in enumerate(ctx.target.blocks(key.shape[2])):
            slope = None
            if ctx.recompute:
                _, residual, slope = _kl(call, block, ctx.options.epsilon)
            else:
                residual = kept[number].to(call.dtype)
            residual = residual * weight[:, part, :, None]
            rows, keys = call.at_rows(block), call.at_keys(block)
            if found[2] is not None:
                found[2].index_put_(_broadcast(rows, found[2]), residual.to(found[2].dtype), accumulate=True)
            residual = residual * call.scaling if slope is None else residual * slope * call.scaling
            with torch.autocast(query.device.type, enabled=False):
                if found[0] is not None:
                    product = residual @ key[keys].to(call.dtype)
                    found[0].index_put_(rows, product.to(query.dtype), accumulate=True)
                if found[1] is not None:
                    product = residual.transpose(-1, -2) @ query[rows].to(call.dtype)
                    found[1].index_put_(keys, product.to(key.dtype), accumulate=True)
        return *found, None, None, None, None


def _broadcast(rows: tuple[Tensor, Tensor, Tensor], bias: Tensor) -> tuple[Tensor, ...]:
    """Indices into a position bias whose batch may be of size 1."""
    batch, heads, positions = rows
    return (batch if bias.shape[0] > 1 else torch.zeros_like(batch)), heads, positions


def _kl(call: AttentionCall, target: LayerTarget, epsilon: float) -> tuple[Tensor, Tensor, Tensor | None]:
    """KL of each head and row [b, h, r], its gradient by the scores, and the slope of soft-capping."""
    teacher = call.teacher(target)
    scores, slope = call.selected_scores(target)
    log = scores.log_softmax(-1)
    student, pull = log.exp(), teacher
    if epsilon:
        log = (student + epsilon).log()
        pull = teacher * student / (student + epsilon)
    kl = (torch.xlogy(teacher, teacher) - teacher * log).sum(-1)
    return kl, student * pull.sum(-1, keepdim=True) - pull, slope


@dataclass
class Sensitivity(Request):
    """How much the loss depends on each head's attention: mean squared entry of dL/dA, without the maps.

    With g = dL/d(output of the head before the output projection), dL/dA = g V^T. `scores[name]`, [batch, heads] in
    float32, is there after a backward pass from the loss to anything below the module (`torch.autograd.grad` with
    respect to `list(outputs.values())` is enough, and computes no gradient of any weight).
    Source: training/seekr.py:244-254, 292-293 of the reference, where padding counts and batches hold one sample.

    Args:
        masked: over the positions that may be attended only; else over all real rows and keys, as the reference,
            with future positions that can never receive attention.
        real: which positions are no padding, by side ("input", "decoder"), [batch, positions]. None: by the mask of
            each layer, which cannot show the padding of a decoder in cross-attention.
    """

    masked: bool = False
    real: Mapping[str, Tensor] | None = None
    scores: MutableMapping[str, Tensor] = field(default_factory=UserDict)
    outputs: MutableMapping[str, Tensor] = field(default_factory=UserDict)

    def run(self, call: AttentionCall, output: Tensor, training: bool) -> None:
        if not torch.is_grad_enabled():
            raise InputError(
                f"the sensitivity of '{call.name}' needs gradients, and no reentrant checkpointing; {KEEP_GRAPH}"
            )
        if call.name in self.outputs:
            return
        if not output.requires_grad:
            output.requires_grad_()
        self.outputs[call.name] = output
        with torch.no_grad():
            rows, keys = call.real(self.real)
            value = call.value.detach().masked_fill(~keys[:, None, :, None], 0)
            score = _masked_score(call, value, rows, keys) if self.masked else _full_score(value, rows, keys)

        def hook(grad: Tensor) -> None:
            with torch.no_grad(), torch.autocast(grad.device.type, enabled=False):
                self.scores.setdefault(call_name, score(grad.transpose(1, 2)))

        call_name = call.name
        output.register_hook(hook)


def _full_score(value: Tensor, rows: Tensor, keys: Tensor) -> Callable[[Tensor], Tensor]:
    values = _gram(value)  # instead of V itself, which checkpointing would have freed
    count = (rows.sum(1) * keys.sum(1)).clamp_min(1)[:, None]

    def score(grad: Tensor) -> Tensor:
        group = grad.shape[1] // values.shape[1]
        grads = _gram(grad.masked_fill(~rows[:, None, :, None], 0))
        return (grads * values.repeat_interleave(group, 1)).sum((-1, -2)) / count

    return score


def _masked_score(call: AttentionCall, value: Tensor, rows: Tensor, keys: Tensor) -> Callable[[Tensor], Tensor]:
    call = replace(call, query=call.query.detach(), key=call.key.detach(), value=value, bias=None)

    def score(grad: Tensor) -> Tensor:
        size, heads, width, _ = grad.shape
        group = heads // value.shape[1]
        head = torch.arange(heads, device=grad.device).expand(size, heads)
        total = count = grad.new_zeros(size, heads, dtype=call.dtype)
        for positions in torch.arange(width, device=grad.device).split(max(1, BLOCK // (size * heads * keys.shape[1]))):
            block = LayerTarget(None, head, head, positions.expand(size, -1), rows[:, positions])
            allowed = (rows[:, positions, None] & keys[:, None, :]).unsqueeze(1)
            mask = call.row_mask(block)
            if mask is not None:
                allowed = allowed & _allowed(mask)
            found = grad[:, :, positions].to(call.dtype).unflatten(1, (-1, group)).flatten(2, 3)
            found = (found @ value.to(call.dtype).transpose(-1, -2)).view(size, heads, len(positions), -1)
            total = total + (found.square() * allowed).sum((-1, -2))
            count = count + allowed.sum((-1, -2))
        return total / count.clamp_min(1)

    return score


@dataclass
class Change(Request):
    """How far the attention of heads moved since `before`, a block of heads at a time.

    `scores[name]`, [b, h] in float32: mean over valid rows and real keys of (A_before - A)^2, 0 for padding.
    Source: training/seekr.py:361-365 of the reference, where padding counts.

    Args:
        before: by name, what `Capture("qk")` gave of the other model on the same rows (or `Capture("weights")`).
        layers: by name, the heads and rows, as in that capture.
        normalise: sum over keys in place of their mean, so that a long sample weighs as much as a short one.
        real: as in `Sensitivity`; only the keys matter.
    """

    before: Mapping[str, Any]
    layers: dict[str, LayerTarget]
    normalise: bool = False
    real: Mapping[str, Tensor] | None = None
    scores: MutableMapping[str, Tensor] = field(default_factory=UserDict)

    def names(self) -> set[str]:
        return set(self.layers)

    @torch.no_grad()
    def run(self, call: AttentionCall, output: Tensor, training: bool) -> None:
        if call.name not in self.layers or call.name in self.scores:
            return
        target, before = self.layers[call.name].to(output.device), self.before[call.name]
        before = [x.to(output.device) for x in ((before,) if isinstance(before, Tensor) else before)]
        keys = call.real(self.real)[1][call.samples(target)]
        found = []
        for part, block in target.blocks(call.key.shape[2]):
            then = [x[:, part] for x in before]
            if len(then) == 1:
                weights = then[0]
            else:
                bias = then[2] if len(then) == 3 else None
                weights = call.scores(then[0], then[1], bias, call.row_mask(block))[0].softmax(-1)
            square = (weights - call.weights(block)).square() * keys[:, None, None, :]
            found.append((square.sum(-1) * block.valid()).sum(-1))
        count = target.row_mask.sum(1) * (1 if self.normalise else keys.sum(1))
        self.scores[call.name] = torch.cat(found, 1) / count.clamp_min(1)[:, None]


__all__ = [
    "KWARG",
    "Capture",
    "Change",
    "Distil",
    "LayerTarget",
    "Sensitivity",
    "attention_kl",
    "head_sensitivity",
    "refuse_reentrant",
    "refuse_reentrant_arguments",
    "select_heads",
]
