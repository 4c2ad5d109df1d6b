r"""Skill units: the groups of weights that are scored, and merged, as one (TaSL section 3.1, KIF section 3.1).

    matrix        every trainable parameter is a unit                                     TaSL, full fine-tuning
    lora_matrix   each A and each B is a unit                                             TaSL on LoRA
    lora_rank1    row A[r, :] and column B[:, r] of one LoRA module together are a unit   KIF

Parameters that learn beside LoRA (`modules_to_save`, biases, trainable tokens) are one unit each in every scheme.
A unit's key holds no adapter name, so that the adapter of the next task, or a file, has the same keys.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from .distributed import full_shape
from .errors import InputError
from .lora import LoraView, stored_name, trainable_parameters

UnitScheme = Literal["matrix", "lora_matrix", "lora_rank1"]
PairReduce = Literal["product", "mean", "sum"]
SCHEMES: tuple[str, ...] = get_args(UnitScheme)


@dataclass(frozen=True)
class Piece:
    """What one parameter is to the units: the unit `start` as a whole, or one unit for each index along `axis`.

    Attributes:
        name: the parameter, by its name in the model or in a file.
        shape: of the parameter.
        axis: None, or the axis along which the rank runs: 0 for A, 1 for B.
        start: its first unit.
    """

    name: str
    shape: tuple[int, ...]
    axis: int | None
    start: int

    @property
    def units(self) -> int:
        return 1 if self.axis is None else self.shape[self.axis]

    def view(self, per_unit: Tensor) -> Tensor:
        """This parameter's part of a vector over all units, broadcastable to the parameter."""
        part = per_unit[self.start : self.start + self.units]
        if self.axis is None:
            return part.reshape([1] * len(self.shape))
        return part.reshape([-1 if i == self.axis else 1 for i in range(len(self.shape))])

    def mean(self, elements: Tensor) -> Tensor:
        """The mean of `elements` (shaped like the parameter) over each of its units, in double precision: [units]."""
        elements = elements.double()
        if self.axis is None:
            return elements.mean().reshape(1)
        return elements.mean(dim=[i for i in range(elements.dim()) if i != self.axis])


class SkillUnits:
    """The units of a set of parameters.

    Args:
        scheme: see above.
        pieces: one a parameter, in the order of the model.
        keys: one a unit.
    """

    def __init__(self, scheme: str, pieces: Sequence[Piece], keys: Sequence[str]) -> None:
        self.scheme, self.pieces, self.keys = scheme, list(pieces), list(keys)
        self._sides = torch.zeros(len(self.keys), dtype=torch.float64)
        sizes = torch.zeros(len(self.keys), dtype=torch.int64)
        for piece in self.pieces:
            piece.view(self._sides).add_(1)
            piece.view(sizes).add_(torch.Size(piece.shape).numel() // piece.units)
        self.sizes: list[int] = sizes.tolist()
        """Weights in each unit."""

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def names(self) -> list[str]:
        return [piece.name for piece in self.pieces]

    @property
    def digest(self) -> str:
        """A hash of the scheme, the keys in their order, and their sizes."""
        lines = [self.scheme, *(f"{key} {size}" for key, size in zip(self.keys, self.sizes, strict=True))]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]

    @classmethod
    def of_model(cls, model: nn.Module, scheme: str, *, method: str = "units", min_ndim: int = 0) -> SkillUnits:
        """The units of what learns in `model`.

        Args:
            model: unwrapped.
            scheme: `matrix`, `lora_matrix` or `lora_rank1`.
            method: named in errors.
            min_ndim: parameters with fewer dimensions belong to no unit.

        Raises:
            InputError: if the scheme does not fit the model.
        """
        lora = LoraView(model)
        pairs: list[tuple[str, str, str, str]] = []
        if lora.is_peft or scheme != "matrix":
            pairs = lora.trainable_pairs(method)
        parameters = trainable_parameters(model)
        pairs = [pair for pair in pairs if pair[2] in parameters and pair[3] in parameters]
        adapters = {adapter for _, adapter, _, _ in pairs} or set(lora.active)
        # The name of an adapter is kept out of the keys unless two learn at once.
        rename = (lambda name: name) if len(adapters) > 1 else (lambda name: stored_name(name, adapters))
        shapes = {rename(name): (name, tuple(full_shape(p))) for name, p in parameters.items()}
        stored_pairs = [
            (f"{module}@{adapter}" if len(adapters) > 1 else module, rename(a), rename(b))
            for module, adapter, a, b in pairs
        ]
        return cls._build(scheme, shapes, stored_pairs, method, min_ndim)

    @classmethod
    def of_shapes(
        cls, shapes: Mapping[str, Sequence[int]], scheme: str, *, method: str = "units", min_ndim: int = 0
    ) -> SkillUnits:
        """The units of parameters known by the names under which PEFT and transformers store them."""
        pairs = []
        for a in shapes:
            for side, other in ((".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B")):
                module = a.removesuffix(side)
                if module != a and module + other in shapes:
                    pairs.append((module, a, module + other))
        if scheme != "matrix" and not pairs:
            raise InputError(
                f"method '{method}': units='{scheme}' needs LoRA weights and there are none; give adapters, or use "
                "units='matrix'"
            )
        return cls._build(scheme, {k: (k, tuple(s)) for k, s in shapes.items()}, pairs, method, min_ndim)

    @classmethod
    def _build(
        cls,
        scheme: str,
        shapes: Mapping[str, tuple[str, tuple[int, ...]]],
        pairs: Iterable[tuple[str, str, str]],
        method: str,
        min_ndim: int,
    ) -> SkillUnits:
        if scheme not in SCHEMES:
            raise InputError(f"method '{method}': units={scheme!r} is unknown; choose {', '.join(SCHEMES)}")
        pieces: list[Piece] = []
        keys: list[str] = []
        partner = {a: (module, b) for module, a, b in pairs} if scheme == "lora_rank1" else {}
        seconds = {b for _, b in partner.values()}
        for key, (name, shape) in shapes.items():
            if key in partner:
                module, other = partner[key]
                b_name, b_shape = shapes[other]
                if len(b_shape) < 2 or b_shape[1] != shape[0]:
                    raise InputError(
                        f"method '{method}': '{module}' has A of shape {list(shape)} and B of shape {list(b_shape)}, "
                        "whose rows and columns do not pair up; leave it out of target_modules, or use "
                        "units='lora_matrix'"
                    )
                pieces += [Piece(name, shape, 0, len(keys)), Piece(b_name, b_shape, 1, len(keys))]
                keys += [f"{module}[{r}]" for r in range(shape[0])]
            elif key not in seconds and len(shape) >= min_ndim:
                pieces.append(Piece(name, shape, None, len(keys)))
                keys.append(key)
        if not keys:
            raise InputError(f"method '{method}': no parameter of the model learns; there are no units to score")
        return cls(scheme, pieces, keys)

    def check_same(self, keys: Sequence[str], method: str, whose: str, sizes: Sequence[int] | None = None) -> None:
        """Refuse other units than `keys` with `sizes`, naming the first that differs."""
        if list(keys) == self.keys:
            for key, mine, theirs in zip(self.keys, self.sizes, sizes or self.sizes, strict=True):
                if mine != theirs:
                    raise InputError(
                        f"method '{method}': {whose} has other skill units than this model: '{key}' has {theirs} "
                        f"weights there and {mine} here; keep the model, the rank and the target modules the same for "
                        "all tasks"
                    )
            return
        own, others = set(self.keys), set(keys)
        first = next((k for k in [*self.keys, *keys] if (k in own) != (k in others)), None)
        if first is None:
            first = next(a for a, b in zip(self.keys, keys, strict=True) if a != b)
            difference = f"'{first}' stands at another place"
        elif first in own:
            difference = f"'{first}' is missing there"
        else:
            difference = f"'{first}' is there and not here"
        raise InputError(
            f"method '{method}': {whose} has other skill units than this model: {difference}; keep the model, the rank "
            "and the target modules the same for all tasks"
        )

    def reduce(self, means: Mapping[str, Tensor], pair: str = "product") -> Tensor:
        """One score a unit from the means of its parameters.

        With rank-1 units, the scores of what learns beside LoRA (heads, biases) are scaled so that the largest of them
        equals the largest of a rank-1 unit. As they are they lie orders of magnitude above a product of two means, and
        would leave all rank-1 units at 0 once normalised.

        Args:
            means: by parameter, [units of the parameter].
            pair: how the two means of a rank-1 unit become one; `product` equals the mean over the outer product of
                the two, which is never built.

        Returns:
            float64, [units].
        """
        scores = torch.ones(len(self), dtype=torch.float64) if pair == "product" else torch.zeros(len(self)).double()
        for piece in self.pieces:
            part = scores[piece.start : piece.start + piece.units]
            value = means[piece.name].to(device="cpu", dtype=torch.float64)
            if pair == "product":
                part *= value
            else:
                part += value
        scores = scores / self._sides if pair == "mean" else scores
        beside = self._sides == 1
        if self.scheme == "lora_rank1" and bool(beside.any()):
            largest = scores[beside].max()
            if largest > 0:
                scores[beside] *= scores[~beside].max() / largest
        return scores


def lerp(previous: Tensor, current: Tensor, coefficient: Tensor | float) -> Tensor:
    """previous + c (current - previous), rounded once to the dtype of `current`; exact at c = 0 and c = 1."""
    c = torch.as_tensor(coefficient, device=current.device, dtype=torch.float64)
    previous = previous.to(current)
    merged = torch.lerp(previous.double(), current.double(), c).to(current.dtype)
    if bool(((c == 0) | (c == 1)).any()):  # signed zeros and infinities too
        merged = torch.where(c == 0, previous, torch.where(c == 1, current, merged))
    return merged


def fuse(
    units: SkillUnits, previous: Mapping[str, Tensor], current: Mapping[str, Tensor], coefficients: Tensor
) -> dict[str, Tensor]:
    r"""Move each unit from its previous to its current weights by its coefficient.

        \hat u_k = \hat u_{k-1} + c (u_k - \hat u_{k-1})                  c in [0, 1], one per unit

    Args:
        units: [units] in all.
        previous, current: by parameter; what belongs to no unit stays as in `current`.
        coefficients: [units]; 0 gives the previous weights bit for bit, 1 the current ones.

    Returns:
        The merged weights by parameter, in the dtype of `current`.

    Source: TaSL (arXiv:2408.09857, Eq. 7) and KIF (arXiv:2408.05200, Eq. 8), written as one step.
    """
    merged = dict(current)
    for piece in units.pieces:
        merged[piece.name] = lerp(previous[piece.name], current[piece.name], piece.view(coefficients))
    return merged


def fuse_products(
    units: SkillUnits, previous: Mapping[str, Tensor], current: Mapping[str, Tensor], coefficients: Tensor
) -> dict[str, Tensor]:
    r"""As `fuse`, but of the rank-1 matrices b a^T that the units stand for, brought back to rank r.

        \Delta\hat W = \sum_r (1 - c_r) \hat b_r \hat a_r^T + c_r b_r a_r^T        then the best rank-r factors B A

    The sum is L R with the stacked factors L [d_out, 2 r] and R [2 r, d_in]. With L^T L = F^T F, R R^T = G^T G and
    the SVD F G^T = U S V^T, all of size 2 r, its truncated SVD has the factors L G^T V S^{-1/2} and S^{-1/2} U^T F R.
    The full matrix is never built. The factors share the singular values evenly. Rows of A change places in general,
    so unit r of the result is not unit r of the inputs.

    Raises:
        InputError: unless the scheme is `lora_rank1`.
    """
    if units.scheme != "lora_rank1":
        raise InputError(
            f"fusing products of LoRA factors needs units='lora_rank1', not '{units.scheme}', where A and B have "
            "coefficients of their own"
        )
    merged = dict(current)
    pairs: dict[int, list[Piece]] = {}
    for piece in units.pieces:
        c = coefficients[piece.start : piece.start + piece.units]
        if piece.axis is not None and not bool((c == c[0]).all() & ((c[0] == 0) | (c[0] == 1))):
            pairs.setdefault(piece.start, []).append(piece)
        else:  # a pair with c = 0 or 1 throughout: its factors are the previous or the current ones
            merged[piece.name] = lerp(previous[piece.name], current[piece.name], piece.view(coefficients))
    for start, (first, second) in pairs.items():
        rank = first.units
        c = coefficients[start : start + rank].double()
        a_before, a_after = (w[first.name].double().cpu().flatten(1) for w in (previous, current))
        b_before, b_after = (w[second.name].double().cpu().flatten(1) for w in (previous, current))
        if b_before.shape[1] != rank:
            raise InputError(f"'{second.name}' of shape {list(second.shape)} is no matrix of {rank} columns")
        left = torch.cat([b_before * (1 - c), b_after * c], dim=1)
        right = torch.cat([a_before, a_after], dim=0)
        f, g = _root(left.T @ left), _root(right @ right.T)
        u, s, vh = torch.linalg.svd(f @ g.T)
        u, s, vh = u[:, :rank], s[:rank], vh[:rank]
        # Directions that the sum does not have, as in a layer narrower than the rank, stay zero.
        root = torch.where(s > 1e-14 * s[0], s, torch.inf).rsqrt()
        a = (root[:, None] * (u.T @ f)) @ right
        b = left @ ((g.T @ vh.T) * root)
        merged[first.name] = a.reshape(first.shape).to(current[first.name])
        merged[second.name] = b.reshape(second.shape).to(current[second.name])
    return merged


def _root(gram: Tensor) -> Tensor:
    """F with F^T F = `gram`, which may be singular."""
    values, vectors = torch.linalg.eigh(gram)
    return values.clamp_min(0).sqrt()[:, None] * vectors.T
