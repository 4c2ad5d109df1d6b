r"""How much each skill unit matters to a task, tracked while it is learnt.

At every counted optimizer step, for each weight w with gradient g and x = w g:

    I_t  = |x|                        order `first`                                              (TaSL Eq. 3)
         = x^2                        order `second`
         = |x - x^2 / 2|              order `mix`; the Hessian is taken for the squared gradient (KIF Eq. 5)
    Ibar = b1 Ibar + (1 - b1) I_t                        sensitivity, from 0, no bias correction (TaSL Eq. 4)
    Ubar = b2 Ubar + (1 - b2) |I_t - Ibar|               uncertainty, with the new Ibar          (TaSL Eq. 5)

and at the end of the task

    s(w) = Ibar Ubar,          I(u) = mean of s over the unit u;  of a rank-1 unit mean s(A[r, :]) * mean s(B[:, r])
    Norm(x) = (x - min x) / (max x - min x)                         over all units of the model
    Ihat_1 = I_1,      Ihat_k = Norm( (1 - b) Norm(I_k) + b Norm(Ihat_{k-1}) )                   (TaSL Eq. 6)

Source: TaSL (arXiv:2408.09857), KIF (arXiv:2408.05200) and their code; Ibar and Ubar are those of AdaLoRA.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .distributed import Layout
from .errors import InputError
from .units import PairReduce, Piece, SkillUnits

Order = Literal["first", "second", "mix"]
Normalisation = Literal["minmax", "rank", "log"]

CHUNK = {"cpu": 2**18}
"""Elements that are worked on at once: what stays in a CPU core's cache. Elsewhere, what bounds the scratch memory."""
LARGE_CHUNK = 2**26
KEPT = 2**23
"""Up to so many weights, the products w g are made once and kept until it is known that all are finite."""


def normalise(scores: Tensor, kind: str = "minmax") -> Tensor:
    """Bring scores to [0, 1] over all units: Norm(x) of the equations.

    Args:
        scores: [units], at least two different values.
        kind: `minmax` (the papers); `rank` gives the smallest 0, the largest 1 and equal steps in between (equal
            scores share the mean of their places); `log` is min-max of the logarithm, with zeros at a tenth of the
            smallest score above them. The last two spread out scores of which one is far above all others.

    Returns:
        float64, [units]. Normalised scores stay as they are.

    Raises:
        InputError: for NaN or infinite scores, a single unit, or scores that are all equal.
    """
    scores = scores.detach().to("cpu", torch.float64)
    if scores.dim() != 1 or scores.numel() == 0:
        raise InputError(f"importance scores must be a vector with one score a unit, not shaped {list(scores.shape)}")
    bad = int((~torch.isfinite(scores)).sum())
    if bad:
        raise InputError(
            f"{bad} of {len(scores)} importance scores are NaN or infinite; the training diverged, lower "
            "training.learning_rate or use a wider dtype"
        )
    if len(scores) == 1:
        raise InputError(
            "there is only one skill unit, so its importance cannot be compared; choose finer units (lora_rank1), or "
            "more target modules"
        )
    low, high = scores.min(), scores.max()
    if low == high:
        raise InputError(
            f"the importance scores of all {len(scores)} skill units are equal ({float(low):.3g}), so none is more "
            "important; train more optimizer steps per task, with a learning rate above zero"
        )
    if kind == "minmax":
        return (scores - low) / (high - low)
    if kind == "rank":
        values, inverse, counts = scores.unique(return_inverse=True, return_counts=True)
        places = counts.cumsum(0).double() - (counts.double() + 1) / 2
        return normalise(places[inverse])
    if kind == "log":
        if low < 0:
            raise InputError("normalisation='log' needs importance scores of at least zero; use rank or minmax")
        if low == 0 and high == 1:
            return scores  # normalised before
        floor = float(scores[scores > 0].min()) / (10 if low == 0 else 1)
        return normalise(scores.clamp_min(floor).log())
    raise InputError(f"normalisation={kind!r} is unknown; choose {', '.join(get_args(Normalisation))}")


def accumulate(current: Tensor, previous: Tensor | None, beta: float = 0.7, kind: str = "minmax") -> Tensor:
    """Cumulative importance after a task, Ihat_k (TaSL Eq. 6).

    Args:
        current: I_k, [units].
        previous: Ihat_{k-1}, [units]; None at the first task, whose Ihat_1 is I_1.
        beta: weight of the past, in [0, 1].
        kind: see `normalise`.

    Returns:
        float64, [units], in [0, 1] from the second task on.
    """
    check_share("accumulate: beta", beta)
    if previous is None:
        normalise(current, kind)  # refuses what the next task could not use
        return current.detach().to("cpu", torch.float64, copy=True)
    check_lengths(current, previous)
    return normalise((1 - beta) * normalise(current, kind) + beta * normalise(previous, kind), kind)


def check_lengths(current: Tensor, previous: Tensor) -> None:
    """Refuse scores of different numbers of units."""
    if current.shape != previous.shape:
        raise InputError(
            f"the current importance scores {len(current)} units and the previous one {len(previous)}; both must "
            "belong to the same model, rank and target modules"
        )


def check_share(option: str, value: Any, *, open_end: bool = False) -> None:
    """Refuse anything but a number in [0, 1], or in [0, 1)."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 <= value <= 1 or (open_end and value == 1):
        raise InputError(f"{option}={value!r} must lie in [0, 1{')' if open_end else ']'}")


class ImportanceTracker:
    """Sensitivity and uncertainty of every weight, in fp32, and the scores of the units.

    Args:
        units: the units; by default each parameter of the first `update` is one (`matrix`).
        order: see above.
        beta1, beta2: of the two moving averages, for one step.
        pair_reduce: `product`, `mean` or `sum` of the two means of a rank-1 unit.
        every_n_steps: how many optimizer steps lie between two updates; the betas are raised to that power.
        average: `end` scores with the averages at the end (the reference); `run` with the mean of Ibar Ubar over all
            updates, which takes a third buffer.

    A step in which any gradient is NaN or infinite does not count; no accelerator is waited for to find out.
    """

    def __init__(
        self,
        units: SkillUnits | None = None,
        *,
        order: str = "first",
        beta1: float = 0.85,
        beta2: float = 0.85,
        pair_reduce: str = "product",
        every_n_steps: int = 1,
        average: str = "end",
    ) -> None:
        choices = {"order": (order, get_args(Order)), "average": (average, ("end", "run"))}
        choices["pair_reduce"] = (pair_reduce, get_args(PairReduce))
        for option, (value, allowed) in choices.items():
            if value not in allowed:
                raise InputError(f"{option}={value!r} is unknown; choose {', '.join(allowed)}")
        if not isinstance(every_n_steps, int) or isinstance(every_n_steps, bool) or every_n_steps < 1:
            raise InputError(f"every_n_steps={every_n_steps!r} must be a whole number, at least 1")
        check_share("beta1", beta1, open_end=True)
        check_share("beta2", beta2, open_end=True)
        self.units, self.order, self.pair_reduce, self.average = units, order, pair_reduce, average
        self.beta1, self.beta2 = float(beta1) ** every_n_steps, float(beta2) ** every_n_steps
        self.sensitivity: Tensor | None = None
        self.uncertainty: Tensor | None = None
        self.total: Tensor | None = None
        self.updates: Tensor | None = None
        self.layout: Layout | None = None
        """Where each rank sees its part of the weights: how the parts lie."""
        self._in_parts = False
        self._chunks: list[_Chunk] = []

    # -- state -------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """The flat buffers, whole, for `load_state`; empty before the first update. Every rank must call it."""
        if self.sensitivity is None:
            return {}
        buffers = {"sensitivity": self.sensitivity, "uncertainty": self.uncertainty, "updates": self.updates}
        if self.total is not None:
            buffers["total"] = self.total
        return {name: self._whole(tensor) for name, tensor in buffers.items() if tensor is not None}

    def _whole(self, buffer: Tensor) -> Tensor:
        if self.layout is None or not self._in_parts or buffer.dim() == 0:
            return buffer
        return self.layout.gather(buffer)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from `state`; an empty one starts anew.

        Raises:
            InputError: if it belongs to another number of weights.
        """
        size = self._size()
        for name in ("sensitivity", "uncertainty", "total"):
            if name in state and size is not None and state[name].numel() != size:
                raise InputError(
                    f"the saved importance covers {state[name].numel()} weights and the model has {size} in its skill "
                    "units; resume with the same model, rank and target modules"
                )
        self.sensitivity, self.uncertainty = state.get("sensitivity"), state.get("uncertainty")
        self.total, self.updates = state.get("total"), state.get("updates")
        self._in_parts = False
        self._chunks = []

    def _size(self) -> int | None:
        return None if self.units is None else sum(torch.Size(p.shape).numel() for p in self.units.pieces)

    # -- one step ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def update(self, weights: Any, gradients: Mapping[str, Tensor | None] | None = None, scale: float = 1.0) -> None:
        """Take one optimizer step into account.

        Args:
            weights: by name. Without `gradients`: parameters with their `.grad`, pairs (weight, gradient) by name, or
                triples (name, weight, gradient).
            gradients: by name; None or missing stands for zeros.
            scale: what the gradients were multiplied by, such as the fp16 loss scale.
        """
        w, g = _named(weights, gradients)
        if self.units is None:
            self.units = SkillUnits.of_shapes({name: tuple(t.shape) for name, t in w.items()}, "matrix")
        names = self.units.names
        missing = [name for name in names if name not in w]
        if missing:
            raise InputError(f"the importance tracker misses the weight '{missing[0]}'; give every weight each time")
        self.update_lists([w[name] for name in names], [g.get(name) for name in names], scale)

    @torch.no_grad()
    def update_lists(self, weights: list[Tensor], gradients: list[Tensor | None], scale: float = 1.0) -> None:
        """As `update`, with one entry a piece of `units`, in its order."""
        filled = [w.new_zeros(()).expand_as(w) if g is None else g for w, g in zip(weights, gradients, strict=True)]
        self._prepare(weights)
        assert self.updates is not None and self.sensitivity is not None
        products = None
        if self.sensitivity.numel() <= KEPT:
            # In one piece, which malloc keeps for the next step; it gives many smaller ones back to the system.
            products = torch.empty_like(self.sensitivity)
            for chunk in self._chunks:
                chunk.product(weights, filled, out=products[chunk.span])
            sums = products.sum()
        else:
            sums = torch.stack([chunk.gather(filled).sum().to(self.updates) for chunk in self._chunks])
        finite = torch.isfinite(sums).all()  # one NaN or infinity, and a sum is not finite
        if self.layout is not None:
            finite = self.layout.total((~finite).float()) == 0  # all ranks count the same steps
        if finite.device.type == "cpu":
            if not finite:
                return
            counts = None
        else:
            counts = finite.to(torch.float32)  # stays on the device
            self.updates += counts
        for chunk in self._chunks:
            x = chunk.product(weights, filled) if products is None else products[chunk.span]
            self._update_chunk(chunk, x, counts, scale)
        if counts is None:
            self.updates += 1

    def _update_chunk(self, chunk: _Chunk, x: Tensor, counts: Tensor | None, scale: float) -> None:
        if scale != 1.0:
            x.mul_(1.0 / scale)
        if self.order == "first":
            x.abs_()
        elif self.order == "second":
            x.square_()
        else:
            x.addcmul_(x, x, value=-0.5).abs_()
        # |I - Ibar'| = b1 |I - Ibar|: one difference serves both averages; the buffer holds Ubar / b1.
        x.sub_(chunk.sensitivity)
        if counts is not None:
            x.nan_to_num_(0.0, 0.0, 0.0).mul_(counts)
        chunk.sensitivity.add_(x, alpha=1 - self.beta1)
        x.abs_()
        if counts is None:
            chunk.uncertainty.lerp_(x, 1 - self.beta2)
        else:
            chunk.uncertainty.mul_(1 - (1 - self.beta2) * counts).add_(x, alpha=1 - self.beta2)
        if chunk.total is not None:
            torch.mul(chunk.sensitivity, chunk.uncertainty, out=x)
            chunk.total.add_(x if counts is None else x * counts, alpha=self.beta1)

    def _prepare(self, weights: list[Tensor]) -> None:
        """Lay out the buffers, and the chunks that they are worked on in."""
        if self._chunks:
            return
        size = sum(w.numel() for w in weights)
        devices = {w.device for w in weights}
        home = weights[0].device if len(devices) == 1 else torch.device("cpu")
        wanted = ["sensitivity", "uncertainty", *(["total"] if self.average == "run" else [])]
        for name in wanted:
            buffer = getattr(self, name)
            if buffer is not None and self.layout is not None and buffer.numel() == self.layout.size:
                buffer = self.layout.scatter(buffer)  # read from a checkpoint
            buffer = torch.zeros(size, device=home) if buffer is None else buffer.to(home, torch.float32)
            setattr(self, name, buffer)
        self.updates = torch.zeros((), device=home) if self.updates is None else self.updates.to(home)
        self._chunks = _chunks(weights, [getattr(self, name) for name in wanted])
        self._in_parts = self.layout is not None

    # -- the result --------------------------------------------------------------------------------------------------

    def scores(self) -> Tensor:
        """I(u): float64, [units], not normalised.

        Raises:
            InputError: before the first update.
        """
        if self.units is None or self.sensitivity is None or self.uncertainty is None:
            raise InputError("no optimizer step has been counted yet, so there are no importance scores")
        means = {}
        start = 0
        whole = self.state()
        for piece in self.units.pieces:
            stop = start + torch.Size(piece.shape).numel()
            means[piece.name] = self._mean(whole, piece, start, stop)
            start = stop
        return self.units.reduce(means, self.pair_reduce)

    def _mean(self, whole: Mapping[str, Tensor], piece: Piece, start: int, stop: int) -> Tensor:
        if "total" in whole:
            total = whole["total"][start:stop].double()
            score = total / whole["updates"].to(total.device).clamp_min(1).double()
        else:
            sensitivity, uncertainty = whole["sensitivity"][start:stop], whole["uncertainty"][start:stop]
            score = sensitivity.double() * uncertainty.double() * self.beta1
        return piece.mean(score.view(piece.shape))


class _Chunk:
    """Neighbouring weights that are worked on at once: parts of some parameters, and their place in the buffers."""

    def __init__(
        self, parts: list[tuple[int, int, int]], span: slice, buffers: list[Tensor], weights: list[Tensor]
    ) -> None:
        self.parts, self.span = parts, span
        buffers = [buffer[span] for buffer in buffers]
        self.sensitivity, self.uncertainty = buffers[:2]
        self.total = buffers[2] if len(buffers) == 3 else None
        self.whole = all(start == 0 and stop == weights[i].numel() for i, start, stop in parts)

    def product(self, weights: list[Tensor], gradients: list[Tensor], out: Tensor | None = None) -> Tensor:
        """w g, on the device of the buffers."""
        w, g = self.gather(weights), self.gather(gradients)
        if out is None:
            return (g * w).to(self.sensitivity.device)
        return torch.mul(g, w, out=out) if out.device == w.device else out.copy_(g * w)

    def gather(self, tensors: list[Tensor]) -> Tensor:
        """This chunk of the tensors as one fp32 vector; it may be a view of them."""
        if len(self.parts) == 1:
            i, start, stop = self.parts[0]
            return tensors[i].reshape(-1)[start:stop].float()
        if self.whole:
            return torch._utils._flatten_dense_tensors([tensors[i] for i, _, _ in self.parts]).float()
        return torch.cat([tensors[i].reshape(-1)[start:stop] for i, start, stop in self.parts]).float()


def _chunks(weights: list[Tensor], buffers: list[Tensor]) -> list[_Chunk]:
    chunks: list[_Chunk] = []
    parts: list[tuple[int, int, int]] = []
    filled, offset = 0, 0

    def close() -> None:
        nonlocal parts, filled, offset
        if parts:
            chunks.append(_Chunk(parts, slice(offset, offset + filled), buffers, weights))
        parts, offset, filled = [], offset + filled, 0

    for i, weight in enumerate(weights):
        limit = CHUNK.get(weight.device.type, LARGE_CHUNK)
        if parts and (weights[parts[0][0]].device, weights[parts[0][0]].dtype) != (weight.device, weight.dtype):
            close()
        if filled + weight.numel() > limit:
            close()
        for start in range(0, weight.numel(), limit):
            stop = min(start + limit, weight.numel())
            parts.append((i, start, stop))
            filled += stop - start
            if filled >= limit:
                close()
    close()
    return chunks


def _named(weights: Any, gradients: Mapping[str, Any] | None) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
    """Weights and gradients by name, from any of the forms that `update` takes."""
    if gradients is not None:
        return dict(weights), dict(gradients)
    items: Iterable[Any] = weights.items() if isinstance(weights, Mapping) else weights
    w: dict[str, Tensor] = {}
    g: dict[str, Tensor | None] = {}
    for entry in items:
        name, value = entry if len(entry) == 2 else (entry[0], entry[1:])
        w[name], g[name] = (value, value.grad) if torch.is_tensor(value) else value
    return w, g
