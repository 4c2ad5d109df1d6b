r"""O-LoRA: IncLoRA with each new adapter kept orthogonal to the old ones.

    L = L_task + l1 \sum_layers \sum_{i,k} |(A_old A_t^T)_{ik}| + l2 \sum_layers (||A_t||_F + ||B_t||_F)

Source: Wang et al., "Orthogonal Subspace Learning for Language Model Continual Learning", arXiv:2310.14152, Eq. 4-8,
and its code: the first penalty is the entrywise L1 of the Gram block, summed; the second is the norm, not squared. The
paper writes the square of the Gram entries for the first; the code's absolute value is what produced the numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..distributed import ALL_BACKENDS, GradView, full
from ..errors import InputError
from .base import ContinualMethod, MethodContext


@dataclass
class OLoRAConfig:
    lambda_1: float | list[float] = field(
        default=0.5,
        metadata={"help": "Weight of the orthogonality penalty; a list gives one value a task (O-LoRA scripts: 0.5)."},
    )
    lambda_2: float | list[float] = field(
        default=0.0,
        metadata={"help": "Weight of the norm of the new A and B; a list gives one value a task (O-LoRA scripts: 0)."},
    )

    def __post_init__(self) -> None:
        for option in ("lambda_1", "lambda_2"):
            value = getattr(self, option)
            values = value if isinstance(value, list) else [value]
            if not values or any(isinstance(v, bool) or not isinstance(v, (int, float)) or not v >= 0 for v in values):
                raise InputError(f"method 'olora': {option}={value!r} must be a number >= 0, or a list of them")


def orthogonality(old: Tensor, new: Tensor) -> Tensor:
    """Sum of |A_old A_t^T| over layers; `old` [layers, r_old, d_in], `new` [layers, r, d_in] -> scalar."""
    return torch.matmul(old, new.transpose(-1, -2)).abs().sum()


class OLoRA(ContinualMethod[OLoRAConfig]):
    """IncLoRA plus the orthogonality penalty, logged as `olora/orthogonal` and `olora/norm`.

    Its gradient passes the mask of MIGU, as in MIGU's code for OIncLoRA+MIGU.
    """

    config_class = OLoRAConfig
    supports = ALL_BACKENDS
    paper = "arxiv:2310.14152"
    owns = frozenset({"adapters"})
    needs_lora = True

    def on_task_begin(self, ctx: MethodContext) -> None:
        for option in ("lambda_1", "lambda_2"):
            self._weight(option, ctx.task.index)
        if not ctx.task.is_first:
            ctx.lora.add(f"task{ctx.task.index}", self.name)
        newest = ctx.lora.adapters[-1]
        by_width: dict[tuple[int, int], list[tuple[Tensor, str]]] = {}
        self._learning: list[str] = []
        layers = list(ctx.lora.layers())
        earlier = {f"{n}.{a}": m.weight for n, layer in layers for a, m in layer.lora_A.items() if a != newest}
        earlier = {name: w.detach() for name, w in earlier.items()} if ctx.dist.whole_weights else full(earlier)
        for name, layer in layers:
            if newest not in layer.lora_A:
                continue
            new = f"{name}.lora_A.{newest}.weight"
            self._learning += [new, f"{name}.lora_B.{newest}.weight"]
            old = [earlier[f"{name}.{adapter}"] for adapter in layer.lora_A if adapter != newest]
            if old:
                stacked = torch.cat(old)
                by_width.setdefault((stacked.shape[0], stacked.shape[1]), []).append((stacked, new))
        self._groups = [(torch.stack([o for o, _ in pairs]), [n for _, n in pairs]) for pairs in by_width.values()]
        named = dict(ctx.model.named_parameters())
        self._weights: dict[str, Tensor] = {name: named[name] for name in self._learning}

    def _weight(self, option: str, index: int) -> float:
        value = getattr(self.config, option)
        if not isinstance(value, list):
            return float(value)
        if index >= len(value):
            raise InputError(f"method 'olora': {option} lists {len(value)} values and task {index + 1} needs one more")
        return float(value[index])

    def extra_loss(self, ctx: MethodContext, batch: Mapping[str, Any], outputs: Any) -> dict[str, Tensor]:
        return self._penalties(ctx.task.index, self._weights) if ctx.dist.whole_weights else {}

    def weight_gradients(self, ctx: MethodContext, grads: GradView) -> None:
        lambda_1, lambda_2 = self._weight("lambda_1", ctx.task.index), self._weight("lambda_2", ctx.task.index)
        if (lambda_1 and self._groups) or lambda_2:
            # Without the norm no B is in the loss, and none has to be collected from the ranks.
            names = self._learning if lambda_2 else [name for _, names in self._groups for name in names]
            losses = grads.add_loss(names, lambda weights: self._penalties(ctx.task.index, weights))
            for name, value in losses.items():
                ctx.log(name, value)

    def _penalties(self, task: int, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        losses = {}
        lambda_1, lambda_2 = self._weight("lambda_1", task), self._weight("lambda_2", task)
        if lambda_1 and self._groups:
            pairs = [(old, [weights[name] for name in names]) for old, names in self._groups]
            terms = [orthogonality(old.to(new[0]), torch.stack(new)) for old, new in pairs]
            losses["olora/orthogonal"] = lambda_1 * torch.stack(terms).sum()
        if lambda_2:
            norms = torch._foreach_norm([weights[name] for name in self._learning])
            losses["olora/norm"] = lambda_2 * torch.stack(norms).sum()
        return losses
