r"""MIGU: update only the output rows whose activations have the largest magnitude.

    S_j = \sum_{ranks} \sum_{micro-batches} \sum_{tokens} |h_j|          h = W x (+ b), j an output row of W     (Eq. 2)
    m_j = 1[ S_j >= quantile(S, T) ]                                     T = share of rows that stay             (Eq. 6)
    \nabla W <- m \odot \nabla W                                         before clipping and the optimizer step  (Eq. 6)

With LoRA, the rows of A are chosen by x_A = A(dropout(x)) and the rows of B by x_O, the output of the whole layer
(frozen weight, old adapters and the new one).

Source: Du et al., "Unlocking Continual Learning Abilities in Language Models", arXiv:2406.17245 (EMNLP 2024 Findings),
and its code at github.com/wenyudu/MIGU. Where the two disagree the default is the code, with the paper as an option;
METHODS.md lists the differences. Plain bugs of the code that are not reproduced: deleting other hooks of the model,
keeping the graph of every activation, counting the recomputation of gradient checkpointing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..distributed import ALL_BACKENDS, GradView, MicroBatchMasks, full_shape
from ..errors import InputError
from ..taps import OutputTap
from .base import ContinualMethod, MethodContext


@dataclass
class MIGUConfig:
    threshold: float = field(
        default=0.7,
        metadata={
            "help": "T, the share of rows that stay. Paper: 0.7 for FT, LoRA and IncLoRA, 0.4 with replay, 0.05 "
            "(App. A) or 0.1 (App. F) with O-LoRA. 0 masks nothing."
        },
    )
    targets: str | None = field(
        default=None,
        metadata={
            "help": "Regular expression (re.search) on module names; default: every Linear whose weight learns, "
            "and every LoRA layer."
        },
    )
    include_lm_head: bool = field(
        default=False,
        metadata={
            "help": "Also mask the output embedding. The code does, the paper does not; with tied embeddings it "
            "zeroes gradients of the input embedding of rare tokens, hence off."
        },
    )
    skip_first_task: bool = field(
        default=True,
        metadata={"help": "Learn the first task without a mask, as the code does; the paper is always on."},
    )
    ignore_padding: bool = field(
        default=False, metadata={"help": "Leave padding tokens out of the sum; the code counts them."}
    )
    normalize_tokens: bool = field(
        default=False, metadata={"help": "Divide |h| by its L1 norm per token first, as the paper's wording suggests."}
    )
    sync: bool = field(default=True, metadata={"help": "Add the statistic up over ranks, so that all use one mask."})
    scope: Literal["step", "micro_batch"] = field(
        default="step",
        metadata={
            "help": "One mask per optimizer step (the code), or one per micro-batch, applied before accumulation."
        },
    )
    select: Literal["quantile", "topk"] = field(
        default="quantile",
        metadata={
            "help": "Rows at or above the interpolated quantile (the code), or exactly d - floor(T d) (the paper)."
        },
    )
    mask: Literal["gradient", "update"] = field(
        default="gradient",
        metadata={
            "help": "Zero the gradient (the code; AdamW still moves the row through momentum and weight decay), or "
            "undo the whole update of the row (Eq. 6 as written)."
        },
    )
    mask_bias: bool = field(default=False, metadata={"help": "Mask the bias with its row; the code leaves it alone."})
    lora_b_stat: Literal["x_O", "x_B"] = field(
        default="x_O", metadata={"help": "Rows of B by the whole layer's output (the paper) or by B's own output."}
    )

    def __post_init__(self) -> None:
        valid = isinstance(self.threshold, (int, float)) and not isinstance(self.threshold, bool)
        if not valid or not 0.0 <= self.threshold < 1.0:
            raise InputError(f"method 'migu': threshold={self.threshold!r} must lie in [0, 1); the paper uses 0.7")
        choices = {
            "scope": ("step", "micro_batch"),
            "select": get_args(Select),
            "mask": ("gradient", "update"),
            "lora_b_stat": ("x_O", "x_B"),
        }
        for option, allowed in choices.items():
            if getattr(self, option) not in allowed:
                raise InputError(
                    f"method 'migu': {option}={getattr(self, option)!r} is unknown; choose {' or '.join(allowed)}"
                )
        if self.scope == "micro_batch" and self.mask == "update":
            raise InputError("method 'migu': mask='update' undoes a whole step, so it needs scope='step'")
        if self.targets is not None:
            try:
                re.compile(self.targets)
            except (re.error, TypeError) as error:
                raise InputError(
                    f"method 'migu': targets={self.targets!r} is no regular expression ({error})"
                ) from error


Select = Literal["quantile", "topk"]


def keep_mask(magnitude: Tensor, threshold: float, select: Select = "quantile") -> Tensor:
    """Rows to update, m_j = 1[S_j >= quantile(S, T)] (Eq. 6).

    Args:
        magnitude: S, non-negative, [..., d_out]; each leading index is a layer of its own.
        threshold: T in [0, 1), the share of rows that stay.
        select: `quantile` interpolates linearly and keeps ties; `topk` keeps exactly d_out - floor(T d_out) rows, of
            ties the first.

    Returns:
        bool, shaped like `magnitude`; True = update.
    """
    if not 0.0 <= threshold < 1.0:
        raise InputError(f"keep_mask: threshold={threshold!r} must lie in [0, 1)")
    if select == "quantile":
        return magnitude >= torch.quantile(magnitude.float(), threshold, dim=-1, keepdim=True)
    if select == "topk":
        frozen = int(threshold * magnitude.shape[-1] + 1e-9)  # 0.29 * 100 is 28.999... in floating point
        keep = magnitude.shape[-1] - frozen
        rows = torch.sort(magnitude, dim=-1, descending=True, stable=True).indices[..., :keep]
        return torch.zeros_like(magnitude, dtype=torch.bool).scatter_(-1, rows, True)
    raise InputError(f"keep_mask: select={select!r} is unknown; choose quantile or topk")


CHUNK = 2**18  # elements; larger copies of |h| cost a CPU several times as much per element


def magnitude_of(output: Tensor, weights: Tensor | None = None, normalize: bool = False) -> Tensor:
    """S_j = sum over tokens of |h_j| (Eq. 2), in fp32; `output` [..., d_out], `weights` [tokens] or None -> [d_out]."""
    flat = output.flatten(0, -2)
    if weights is None and not normalize:
        if flat.is_cuda:
            return torch.linalg.vector_norm(flat, ord=1, dim=0, dtype=torch.float32)  # one kernel, no |h| in memory
        if torch.compiler.is_compiling():  # fused, so |h| is in no memory; parts would be compiled for each number
            return flat.abs().sum(0, dtype=torch.float32)
        parts = flat.split(max(1, CHUNK // max(1, flat.shape[-1])))
        total = parts[0].abs().sum(0, dtype=torch.float32)
        for part in parts[1:]:
            total += part.abs().sum(0, dtype=torch.float32)
        return total
    magnitude = flat.abs().float()
    if normalize:
        magnitude /= magnitude.sum(-1, keepdim=True).clamp_min(1e-12)
    return magnitude.sum(0) if weights is None else weights.to(magnitude) @ magnitude


@dataclass
class Target:
    """One masked weight: `weight` (and `bias`) of the model, ranked by the output of `tap`."""

    weight: str
    bias: str | None
    tap: nn.Module
    tap_name: str
    rows: int
    out_dim: int


def find_targets(ctx: MethodContext, config: MIGUConfig) -> list[Target]:
    """The weights MIGU masks in this model.

    Raises:
        InputError: if there is none.
    """
    model: Any = ctx.model
    targets: list[Target] = []
    chosen = re.compile(config.targets) if config.targets is not None else None
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    lora_layers = dict(ctx.lora.layers())
    inside_lora = tuple(f"{name}." for name in lora_layers)
    own_name = {id(p): name for name, p in model.named_parameters()}  # a tied weight has one name of its own
    for name, module in model.named_modules():
        if chosen is not None and not chosen.search(name):
            continue
        if name in lora_layers:
            for adapter in ctx.lora.trainable(module):
                a, b = module.lora_A[adapter], module.lora_B[adapter]
                if not isinstance(a, nn.Linear):
                    continue
                a_name, b_name = f"{name}.lora_A.{adapter}", f"{name}.lora_B.{adapter}"
                tap, tap_name = (module, name) if config.lora_b_stat == "x_O" else (b, b_name)
                bias = f"{b_name}.bias" if b.bias is not None else None
                targets.append(Target(f"{a_name}.weight", None, a, a_name, a.out_features, 0))
                targets.append(Target(f"{b_name}.weight", bias, tap, tap_name, b.out_features, 0))
        elif (
            isinstance(module, (nn.Linear, Conv1D)) and module.weight.requires_grad and not name.startswith(inside_lora)
        ):
            if lora_layers or (module is head and not config.include_lm_head):
                continue  # with LoRA only A and B are masked; fully trained modules_to_save are heads
            out_dim = 1 if isinstance(module, Conv1D) else 0
            bias = f"{name}.bias" if module.bias is not None and module.bias.requires_grad else None
            targets.append(
                Target(own_name[id(module.weight)], bias, module, name, full_shape(module.weight)[out_dim], out_dim)
            )
    if not targets:
        where = f" that matches targets={config.targets!r}" if config.targets else ""
        raise InputError(
            f"method 'migu': the model has no Linear layer with a trainable weight{where}; "
            "change targets, or train the model's linear layers or LoRA adapters on them"
        )
    return sorted(targets, key=lambda target: target.rows)  # equal widths side by side: one batched quantile a width


class MIGU(ContinualMethod[MIGUConfig]):
    """Masks gradients by the magnitude of activations.

    State: how often each row was updated in the last two tasks, from which the overlap of tasks is reported
    (`overlap_`: Jaccard index of the rows updated most, per layer; the paper's Fig. 5).
    """

    config_class = MIGUConfig
    supports = ALL_BACKENDS
    paper = "arxiv:2406.17245"
    neutral = {"threshold": 0.0}

    def __init__(self, config: MIGUConfig | None = None, **options: Any) -> None:
        super().__init__(config, **options)
        self.updates_: Tensor | None = None
        self.steps_ = 0
        self.top_rows_: dict[str, Tensor] = {}
        self.overlap_: dict[str, float] = {}
        self.never_updated_ = 0.0

    def on_task_begin(self, ctx: MethodContext) -> None:
        if ctx.dist.world_size > 1 and not self.config.sync:
            raise InputError(
                "method 'migu': sync=False gives every process its own mask, so their weights would drift apart; "
                "leave sync on"
            )
        self._targets = find_targets(ctx, self.config)
        total = sum(target.rows for target in self._targets)
        device = (
            ctx.dist.accelerator.device if ctx.dist.accelerator is not None else next(ctx.model.parameters()).device
        )
        # One flat fp32 vector for all layers, with a view per layer and per width.
        self._magnitude = torch.zeros(total, device=device)
        self._mask = torch.ones(total, device=device)
        self._views = list(self._magnitude.split([target.rows for target in self._targets]))
        self._widths: list[tuple[int, int, int]] = []  # (start, layers, width)
        for target in self._targets:
            if self._widths and self._widths[-1][2] == target.rows:
                start, layers, width = self._widths[-1]
                self._widths[-1] = (start, layers + 1, width)
            else:
                previous = self._widths[-1] if self._widths else (0, 0, 0)
                self._widths.append((previous[0] + previous[1] * previous[2], 1, target.rows))
        self._factor_dtype: torch.dtype | None = None
        self._token_weights: dict[str, Tensor] = {}
        self.updates_, self.steps_ = torch.zeros(total, device=device), 0
        self._masks_this_task = not (ctx.task.is_first and self.config.skip_first_task)

    @contextmanager
    def task_context(self, ctx: MethodContext) -> Iterator[None]:
        self._tap: OutputTap | None = None
        self._hooks: MicroBatchMasks | None = None
        if not self._masks_this_task:
            yield
            return
        self._magnitude.zero_()
        indices: dict[nn.Module, list[int]] = {}
        for i, target in enumerate(self._targets):
            indices.setdefault(target.tap, []).append(i)  # two adapters of a layer share its output
        functions = {tap: partial(self._add, which, self._targets[which[0]].tap_name) for tap, which in indices.items()}
        if self.config.scope == "micro_batch":
            names = [
                n for t in self._targets for n in (t.weight, t.bias) if n and (n == t.weight or self.config.mask_bias)
            ]
            self._hooks = MicroBatchMasks(ctx.model, names, ctx.dist.backend)
        self._tap = OutputTap(functions)
        try:
            yield
        finally:
            self._tap.remove()
            if self._hooks is not None:
                self._hooks.remove()
            self._tap = self._hooks = None

    def _add(self, which: list[int], name: str, output: Tensor) -> None:
        weights = token_weights(name, output, self._token_weights) if self.config.ignore_padding else None
        magnitude = magnitude_of(output, weights, self.config.normalize_tokens)
        for index in which:
            self._views[index].add_(magnitude)

    @contextmanager
    def forward_context(self, ctx: MethodContext, batch: Mapping[str, Any]) -> Iterator[None]:
        if self._tap is None:
            yield
            return
        if self.config.ignore_padding:
            self._token_weights = padding_masks(batch, getattr(ctx.model.config, "is_encoder_decoder", False))
        with self._tap.recording():
            yield
        self._token_weights = {}
        if self._hooks is not None:
            self._hooks.factors = self._factors(ctx, None)

    def edit_gradients(self, ctx: MethodContext, grads: GradView) -> None:
        if self._tap is None or self._hooks is not None:
            return
        factors = self._factors(ctx, grads)
        grads.mul_(factors)
        if self.config.mask == "update":
            grads.freeze_(factors)

    @torch.no_grad()
    def _factors(self, ctx: MethodContext, grads: GradView | None) -> dict[str, Tensor]:
        """The masks of the statistic gathered so far, which starts again from zero. No host sync."""
        if self.config.sync:
            ctx.dist.sum_(self._magnitude)  # one collective for all layers
        for start, layers, width in self._widths:  # one batched quantile a width
            block = slice(start, start + layers * width)
            mask = keep_mask(self._magnitude[block].view(layers, width), self.config.threshold, self.config.select)
            self._mask[block].copy_(mask.reshape(-1))
        self._magnitude.zero_()
        assert self.updates_ is not None
        if self.updates_.device != self._mask.device:  # a checkpoint is read on the CPU
            self.updates_ = self.updates_.to(self._mask.device)
        self.updates_ += self._mask
        self.steps_ += 1
        return self._broadcastable(grads)

    def _broadcastable(self, grads: GradView | None) -> dict[str, Tensor]:
        dtype = torch.float32 if grads is None else grads.parameter(self._targets[0].weight).dtype
        if dtype != self._factor_dtype:  # views over one persistent buffer, made once a task
            self._cast = self._mask if dtype == torch.float32 else self._mask.to(dtype)
            self._factor_dtype, self._factor_views = dtype, {}
            for target, view in zip(self._targets, self._cast.split([t.rows for t in self._targets]), strict=True):
                self._factor_views[target.weight] = view.unsqueeze(1) if target.out_dim == 0 else view.unsqueeze(0)
                if target.bias is not None and self.config.mask_bias:
                    self._factor_views[target.bias] = view
        if self._cast is not self._mask:
            self._cast.copy_(self._mask)
        return self._factor_views

    def on_task_end(self, ctx: MethodContext) -> None:
        if self.steps_ and self.updates_ is not None:
            share = self.updates_.cpu() / self.steps_
            parts = dict(
                zip([t.tap_name for t in self._targets], share.split([t.rows for t in self._targets]), strict=True)
            )
            top = {name: keep_mask(part, self.config.threshold, "topk") for name, part in parts.items()}
            both = {name: (top[name] & rows, top[name] | rows) for name, rows in self.top_rows_.items() if name in top}
            self.overlap_ = {name: float(a.sum() / o.sum()) for name, (a, o) in both.items()}
            self.top_rows_ = top
            self.never_updated_ = float((share == 0).float().mean())
        self._magnitude = self._mask = torch.empty(0)
        self._views, self._factor_views, self._factor_dtype = [], {}, None
        self._cast, self._targets = self._mask, []


CROSS_KEYS = re.compile(
    r"(EncDecAttention|encoder_attn|cross_?attn|cross_?attention)\.(\w+\.)*(k|v|key|value)(_proj)?(\.|$)", re.I
)


def padding_masks(batch: Mapping[str, Any], encoder_decoder: bool) -> dict[str, Tensor]:
    """Which positions of a batch are real: `input`, and for encoder-decoder models `decoder`."""
    masks = {}
    if batch.get("attention_mask") is not None:
        masks["input"] = batch["attention_mask"]
    if encoder_decoder and batch.get("decoder_attention_mask") is not None:
        masks["decoder"] = batch["decoder_attention_mask"]
    elif encoder_decoder and batch.get("labels") is not None:
        masks["decoder"] = batch["labels"] != -100
    return masks


def token_weights(name: str, output: Tensor, masks: Mapping[str, Tensor]) -> Tensor | None:
    """Weights of the tokens in `output` of module `name`, or None where it has no padding (one row a sample)."""
    of_decoder = "decoder" in masks and "decoder" in name.split(".") and not CROSS_KEYS.search(name)
    mask = masks.get("decoder" if of_decoder else "input")
    tokens = output.shape[:-1].numel()
    if mask is not None and mask.numel() == tokens:
        return mask.reshape(-1)
    if output.dim() == 2 and any(m.shape[0] == tokens for m in masks.values()):
        return None
    raise InputError(
        f"method 'migu': ignore_padding cannot tell the padding of module '{name}' (output {tuple(output.shape)}); "
        "give the batches an attention_mask, set ignore_padding: false, or leave the module out with targets"
    )
