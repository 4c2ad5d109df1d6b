"""What TaSL and KIF share: score the skill units while a task is learnt, then fuse its weights with the earlier ones.

One task: track importance at the optimizer steps -> fuse with I_k and Ihat_{k-1} -> optional replay phase with frozen
units -> Ihat_k. The equations stand in `importance.py`, `units.py` and above each method.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, get_args

import datasets
import torch
from torch import Tensor

from .distributed import ALL_BACKENDS, GradView
from .errors import InputError
from .importance import ImportanceTracker, Normalisation, Order, accumulate, check_lengths, check_share, normalise
from .methods.base import ContinualMethod, MethodContext, TrainingPhase
from .replay import (
    SOURCE_HELP,
    Source,
    buffer_size,
    check_columns,
    check_rows,
    check_sizes,
    check_source,
    keep_rows,
    replayed_rows,
)
from .units import SCHEMES, PairReduce, SkillUnits, fuse, fuse_products

CASES = ("neither", "past", "current", "shared")
"""The four cases of a unit: important to neither, to the past only, to the current task only, to both."""


def unit_cases(current: Tensor, previous: Tensor, quantile: float = 0.8, kind: str = "minmax") -> Tensor:
    """Which of `CASES` each unit is: above its quantile in I_k, in Ihat_{k-1}, in both or in neither (TaSL Eq. 8).

    Args:
        current: I_k, [units].
        previous: Ihat_{k-1}, [units].
        quantile: in [0, 1]; 0.8 takes about the top 20 % of units for important. Linear interpolation, strictly above.
        kind: normalisation, see `normalise`.

    Returns:
        int64, [units]: an index into `CASES`.
    """
    check_share("quantile", quantile)
    check_lengths(current, previous)
    now, before = normalise(current, kind), normalise(previous, kind)
    return (now > now.quantile(quantile)).long() * 2 + (before > before.quantile(quantile)).long()


@dataclass
class SkillFusionConfig:
    """Options that TaSL and KIF have in common."""

    units: Literal["auto", "matrix", "lora_matrix", "lora_rank1"] = field(
        default="auto",
        metadata={
            "help": "What is scored and merged as one: every parameter (matrix), each A and each B (lora_matrix), or "
            "row r of A with column r of B (lora_rank1). auto: lora_matrix with LoRA, else matrix."
        },
    )
    order: Order = field(
        default="first", metadata={"help": "Importance of one weight at a step: |wg|, (wg)^2 or |wg - (wg)^2/2|."}
    )
    beta1: float = field(default=0.85, metadata={"help": "Smoothing of the sensitivity (both papers: 0.85)."})
    beta2: float = field(default=0.85, metadata={"help": "Smoothing of the uncertainty (both papers: 0.85)."})
    beta: float = field(default=0.7, metadata={"help": "Weight of the past in the cumulative importance (0.7)."})
    quantile: float = field(
        default=0.8, metadata={"help": "Units above it count as important (the code: top 20 %, hard-coded)."}
    )
    timing: Literal["reference", "consistent"] = field(
        default="reference",
        metadata={
            "help": "reference: after the optimizer step, the new weight times the clipped gradient of the old one. "
            "consistent: before it, weight and gradient of the same point, not clipped."
        },
    )
    warmup_steps: int = field(
        default=1,
        metadata={"help": "Optimizer steps at the start of a task that do not count (the code: 1; its 50 is dead)."},
    )
    every_n_steps: int = field(
        default=1, metadata={"help": "Count only every n-th step, with the betas to the power of n: cheaper."}
    )
    last_fraction: float = field(
        default=1.0, metadata={"help": "Count only the last share of a task's steps: cheaper; old steps fade anyway."}
    )
    average: Literal["end", "run"] = field(
        default="end",
        metadata={
            "help": "Score with the averages at the end (the code), or with their product averaged over all counted "
            "steps, so that the last steps do not decide alone; takes a third buffer."
        },
    )
    pair_reduce: PairReduce = field(
        default="product",
        metadata={"help": "How the scores of A's row and B's column become one: product (the code), mean or sum."},
    )
    min_ndim: int = field(
        default=0,
        metadata={"help": "2 leaves vectors (norms, biases) out of the units; they then keep the new task's values."},
    )
    normalisation: Normalisation = field(
        default="minmax",
        metadata={"help": "minmax (both papers), or rank or log, which spread out scores that one unit dominates."},
    )
    space: Literal["factors", "products"] = field(
        default="factors",
        metadata={
            "help": "Merge A and B themselves (the code), or the matrices b a^T, brought back to rank r by SVD; the "
            "latter needs lora_rank1, and unit r of the next task is then another one."
        },
    )
    keep_unmerged: bool = field(
        default=False,
        metadata={"help": "Also store the task's weights before the merge, so that it can be repeated offline."},
    )
    replay_ratio: float = field(
        default=0.0,
        metadata={"help": "TaSL-M, KIF-M: share of every past task to keep and to train on after the merge."},
    )
    replay_count: int | None = field(default=None, metadata={"help": "Rows kept per task; overrides replay_ratio."})
    replay_epochs: float = field(default=1.0, metadata={"help": "Epochs over the kept rows after each merge."})
    replay_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the replay phase; default: that of the training."}
    )
    replay_seed: int = field(default=42, metadata={"help": "Seed of the rows that are kept."})
    source: Source = field(default="past", metadata={"help": SOURCE_HELP})

    def __post_init__(self) -> None:
        for option in ("beta", "quantile"):
            check_share(option, getattr(self, option))
        for option in ("beta1", "beta2"):
            check_share(option, getattr(self, option), open_end=True)
        choices: dict[str, tuple[str, ...]] = {
            "units": ("auto", *SCHEMES),
            "order": get_args(Order),
            "timing": ("reference", "consistent"),
            "average": ("end", "run"),
            "pair_reduce": get_args(PairReduce),
            "normalisation": get_args(Normalisation),
            "space": ("factors", "products"),
        }
        for option, allowed in choices.items():
            if getattr(self, option) not in allowed:
                raise InputError(f"{option}={getattr(self, option)!r} is unknown; choose {', '.join(allowed)}")
        for option, least in (("warmup_steps", 0), ("every_n_steps", 1), ("min_ndim", 0)):
            value = getattr(self, option)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise InputError(f"{option}={value!r} must be a whole number, at least {least}")
        for option in ("last_fraction", "replay_epochs", "replay_learning_rate"):
            value = getattr(self, option)
            if value is None and option == "replay_learning_rate":
                continue
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not 0 < value < float("inf") or (option == "last_fraction" and value > 1):
                upper = ", at most 1" if option == "last_fraction" else ""
                raise InputError(f"{option}={value!r} must be a number above 0{upper}")
        check_sizes(self.replay_ratio, self.replay_count, prefix="replay_")
        check_source(self.source)
        if not isinstance(self.replay_seed, int) or isinstance(self.replay_seed, bool):
            raise InputError(f"replay_seed={self.replay_seed!r} must be a whole number")
        if not isinstance(self.keep_unmerged, bool):
            raise InputError(f"keep_unmerged={self.keep_unmerged!r} must be true or false")
        if self.space == "products" and (self.replay_ratio or self.replay_count):
            raise InputError(
                "space='products' cannot be combined with a replay phase: after it no row of A stands for one skill "
                "unit, so none can be frozen; leave out replay_ratio and replay_count, or use space='factors'"
            )
        if self.space == "products" and self.units in ("matrix", "lora_matrix"):
            raise InputError(
                f"space='products' needs units='lora_rank1', not units={self.units!r}, where A and B have "
                "coefficients of their own"
            )


ConfigT = TypeVar("ConfigT", bound=SkillFusionConfig)


class SkillFusion(ContinualMethod[ConfigT], Generic[ConfigT]):
    """Base of TaSL and KIF. A subclass gives the coefficients.

    State: `unit_keys_`, and per unit, in float64: `raw_` (I_k), `before_` (Ihat_{k-1}, with which the task was merged),
    `cumulative_` (Ihat_k) and `coefficients_` (c). While a task is learnt also the buffers of the tracker.
    """

    name = "skillfusion"
    supports = ALL_BACKENDS

    def __init__(self, config: ConfigT | None = None, **options: Any) -> None:
        super().__init__(config, **options)
        self.needs_lora = self.config.units.startswith("lora")
        self.scheme_: str | None = None
        self.unit_keys_: list[str] = []
        self.unit_sizes_: list[int] = []
        self.units_hash_: str | None = None
        self.raw_: Tensor | None = None
        self.before_: Tensor | None = None
        self.cumulative_: Tensor | None = None
        self.coefficients_: Tensor | None = None
        self.tracking_: dict[str, Tensor] = {}
        self.unmerged_: dict[str, Tensor] = {}
        self.buffer_: datasets.Dataset | None = None
        self.shares_: dict[str, float] = {}
        self._replayed = ""
        self._tracker: ImportanceTracker | None = None
        self._current: Any = None

    def fusion_coefficients(self, current: Tensor, previous: Tensor) -> Tensor:
        """c in [0, 1] per unit from I_k and Ihat_{k-1}: 0 keeps the previous weights, 1 the current ones."""
        raise NotImplementedError

    # -- a task ------------------------------------------------------------------------------------------------------

    def on_task_begin(self, ctx: MethodContext) -> None:
        config = self.config
        scheme = config.units
        if scheme == "auto":
            scheme = "lora_matrix" if ctx.lora.is_peft else "matrix"
        if config.space == "products" and scheme != "lora_rank1":
            raise InputError(f"method '{self.name}': space='products' needs units='lora_rank1', not '{scheme}'")
        self._units = SkillUnits.of_model(ctx.model, scheme, method=self.name, min_ndim=config.min_ndim)
        if len(self._units) == 1:
            raise InputError(
                f"method '{self.name}': the model has one skill unit only ('{self._units.keys[0]}'), which cannot be "
                "compared with others; use finer units (lora_rank1), or more target modules"
            )
        if self.unit_keys_:
            self._units.check_same(self.unit_keys_, self.name, f"the task before '{ctx.task.name}'", self.unit_sizes_)
        self._tracker = ImportanceTracker(
            self._units,
            order=config.order,
            beta1=config.beta1,
            beta2=config.beta2,
            pair_reduce=config.pair_reduce,
            every_n_steps=config.every_n_steps,
            average=config.average,
        )
        self._cases: Tensor | None = None

    def train_dataset(self, ctx: MethodContext, dataset: Any) -> Any:
        if self._replays:
            own = dataset if ctx.rows is None else ctx.rows  # not what another method has mixed in
            check_rows(own, self.name, ctx.task.name)
            check_columns(own, self.buffer_, self.name, ctx.task.name)
            self._current = own
        return dataset

    @property
    def _replays(self) -> bool:
        return bool(self.config.replay_ratio or self.config.replay_count)

    def on_gradients(self, ctx: MethodContext, grads: GradView) -> None:
        assert self._tracker is not None
        if ctx.dist.sharded and self._tracker.layout is None:
            self._tracker.layout = grads.layout(self._units.names)
        if ctx.state.global_step == 0:
            self._tracker.load_state({})  # the Trainer begins again when it has found a smaller batch size
        if ctx.state.max_steps <= self.config.warmup_steps:
            raise InputError(
                f"method '{self.name}': task '{ctx.task.name}' has {ctx.state.max_steps} optimizer step(s) and the "
                f"first {self.config.warmup_steps} do(es) not count, so nothing would be scored; train longer or lower "
                "warmup_steps"
            )
        if self.config.timing == "consistent":
            self._track(ctx, ctx.dist.grad_scale())

    def on_step_end(self, ctx: MethodContext) -> None:
        if self.config.timing == "reference" and not ctx.dist.step_was_skipped:
            self._track(ctx, 1.0)  # the scaler has taken its scale out of the gradients by now

    def _track(self, ctx: MethodContext, scale: float) -> None:
        step, steps, config = ctx.state.global_step, ctx.state.max_steps, self.config
        if step < config.warmup_steps or step < min(steps * (1 - config.last_fraction), steps - 1):
            return
        if (steps - 1 - step) % config.every_n_steps:  # so that the last step counts
            return
        assert self._grads is not None and self._tracker is not None
        self._tracker.update_lists(*self._grads.lists(self._units.names), scale)

    def merge(
        self, ctx: MethodContext, previous: Mapping[str, Tensor], current: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        assert self._tracker is not None
        if self._tracker.updates is None and self.config.last_fraction < 1:
            raise InputError(
                f"method '{self.name}': the training of task '{ctx.task.name}' stopped before its last "
                f"last_fraction={self.config.last_fraction} of steps, or went back to a checkpoint from before, so "
                "nothing was scored; use last_fraction: 1 with early stopping and load_best_model_at_end"
            )
        past = self.cumulative_
        try:
            raw = self._tracker.scores()
            cumulative = accumulate(raw, past, self.config.beta, self.config.normalisation)
            coefficients = None if past is None else self.fusion_coefficients(raw, past)
            if past is not None:
                self._cases = unit_cases(raw, past, self.config.quantile, self.config.normalisation)
        except InputError as error:
            raise InputError(f"method '{self.name}', task '{ctx.task.name}': {error}") from error
        self.scheme_, self.units_hash_ = self._units.scheme, self._units.digest
        self.unit_keys_, self.unit_sizes_ = self._units.keys, self._units.sizes
        self.raw_, self.before_, self.cumulative_, self.coefficients_ = raw, past, cumulative, coefficients
        if self.config.keep_unmerged:
            self.unmerged_ = {name: value.clone() for name, value in current.items()}
        if coefficients is None or self._cases is None:
            return current
        counts = torch.bincount(self._cases, minlength=len(CASES))
        self.shares_ = {case: float(n) / len(self._cases) for case, n in zip(CASES, counts, strict=True)}
        return self.fuse(self._units, previous, current, coefficients)

    def fuse(
        self, units: SkillUnits, previous: Mapping[str, Tensor], current: Mapping[str, Tensor], coefficients: Tensor
    ) -> dict[str, Tensor]:
        """The merged weights, in the space of the configuration."""
        merge = fuse_products if self.config.space == "products" else fuse
        return merge(units, previous, current, coefficients)

    def training_phase(self, ctx: MethodContext) -> TrainingPhase | None:
        """TaSL-M, KIF-M: train on the kept rows with the units frozen that only the current task needs."""
        if self.buffer_ is None or self._cases is None:
            return None
        free = (self._cases != CASES.index("current")).to(torch.float32)
        options: dict[str, Any] = {"num_train_epochs": self.config.replay_epochs}
        if self.config.replay_learning_rate is not None:
            options["learning_rate"] = self.config.replay_learning_rate
        seed = self.config.replay_seed + ctx.task.index
        rows = replayed_rows(self.buffer_, self._current, self.config.source, seed)
        kept = "kept rows" if self.config.source == "past" else "rows of this task in the place of kept ones"
        self._replayed = f", then trained on {len(self.buffer_)} {kept} with {int((free == 0).sum())} units frozen"
        keep = {piece.name: piece.view(free) for piece in self._units.pieces}
        return TrainingPhase(f"{self.name}/replay", rows, options, keep)

    def on_task_end(self, ctx: MethodContext) -> None:
        if self._replays:
            size = buffer_size(len(self._current), self.config.replay_ratio, self.config.replay_count)
            self.buffer_ = keep_rows(self.buffer_, self._current, size, self.config.replay_seed + ctx.task.index)
        self._tracker = self._current = self._cases = None
        self.tracking_ = {}

    def summary(self) -> str | None:
        if self.coefficients_ is None:
            return None
        shares = ", ".join(f"{case} {100 * share:.0f} %" for case, share in self.shares_.items())
        low, high = float(self.coefficients_.min()), float(self.coefficients_.max())
        text = f"merged {len(self.coefficients_)} units ({shares}), c from {low:.2f} to {high:.2f}"
        return text + self._replayed

    # -- state -------------------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        self.tracking_ = self._tracker.state() if self._tracker is not None else {}
        super().save(folder)

    def load(self, folder: Path) -> None:
        super().load(folder)
        if self._tracker is not None:
            self._tracker.load_state(self.tracking_)
