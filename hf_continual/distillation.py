"""What DER++ and SEEKR share: stored rows trained on beside the new ones, with the signals of a teacher.

One task: choose rows R_k -> train on the task and on R_1..R_{k-1}, each with the signals of its teacher -> signals of
R_k by the model as it now is. Losses stand above each method; buffer, signals and collator have files of their own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

import datasets
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from .collators import DistillationCollator, LogitTarget, TeacherBatch
from .distributed import ALL_BACKENDS, Distributed, full_shape, other_weights, own_copies, processes
from .errors import InputError
from .interleaving import InterleavedDataset
from .lora import trainable_parameters, trainable_state
from .methods.base import ContinualMethod, MethodContext
from .replay import (
    SOURCE_HELP,
    Policy,
    ReplayBuffer,
    Source,
    check_buffer,
    check_columns,
    check_rows,
    check_source,
    features_of,
    model_key,
    replayed_rows,
    tokenizer_key,
)
from .signals import AttentionSignal, LogitSignal, RowSignals, SignalStore, teacher_hash

OWN_COLUMNS = ("replay_row", "teacher")
TEACHERS = ("cached", "previous", "tasks")
ONLINE = ("previous", "tasks")


# -- losses ------------------------------------------------------------------------------------------------------------


def logit_kl(student: Tensor, values: Tensor, lse: Tensor, indices: Tensor | None = None) -> Tensor:
    """Mean over positions of KL(teacher || student), temperature 1.

    Of a teacher of which only the top k logits are known, what is left of its probability is one further outcome.

    Args:
        student: logits, [positions, vocabulary].
        values: the teacher's logits, [positions, k]; all of them, or those of `indices`.
        lse: the teacher's log-sum-exp over the whole vocabulary, [positions].
        indices: [positions, k]; None: all of the vocabulary.

    Returns:
        A scalar in float32, or float64 if the student's logits are.
    """
    dtype = torch.promote_types(student.dtype, torch.float32)
    student_log = F.log_softmax(student.to(dtype), dim=-1)
    teacher_log = values.to(dtype) - lse.to(dtype).unsqueeze(-1)
    if indices is not None:
        student_log = student_log.gather(-1, indices)
    teacher = teacher_log.exp()
    loss = (teacher * (teacher_log - student_log)).sum(-1)
    if indices is not None:
        tiny = torch.finfo(torch.float32).eps
        rest = (1 - teacher.sum(-1)).clamp_min(tiny)
        student_rest = (1 - student_log.exp().sum(-1)).clamp_min(tiny)
        loss = loss + rest * (rest.log() - student_rest.log())
    return loss.mean()


def logit_mse(student: Tensor, values: Tensor, indices: Tensor | None = None) -> Tensor:
    """Mean over positions and (the teacher's known) vocabulary entries of the squared difference of logits."""
    student = student.to(torch.promote_types(student.dtype, torch.float32))
    chosen = student if indices is None else student.gather(-1, indices)
    return (chosen - values.to(chosen.dtype)).square().mean()


# -- teachers ----------------------------------------------------------------------------------------------------------


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout and no gradient checkpointing; the random generators are not touched."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def trainable_copy(model: nn.Module, distributed: Distributed) -> dict[str, Tensor]:
    """A detached copy of everything that learns, or of this rank's part of it: the weights of a teacher."""
    return own_copies(trainable_parameters(model), distributed)


def teacher_forward(ctx: MethodContext, weights: dict[str, Tensor], inputs: Mapping[str, Any]) -> Any:
    """The outputs of the model with `weights` in the place of its own: no second model, nothing is moved or copied.

    Where weights are split between the ranks every rank must call it. Each puts its part of the model's aside, a copy,
    and keeps in `weights` no more than its part.
    """
    with evaluating(ctx.model), torch.no_grad(), ctx.autocast():
        if ctx.dist.whole_weights:
            return functional_call(ctx.model, dict(weights), (), dict(inputs))
        with other_weights(ctx.model, weights, ctx.dist):
            return ctx.model(**inputs)


def without_labels(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What the model needs for its logits: without labels no loss is computed, but T5 makes decoder inputs of them."""
    seq2seq = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    return {k: v for k, v in inputs.items() if k not in OWN_COLUMNS and (k != "labels" or seq2seq)}


# -- rows --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RowLayout:
    """Where the parts of one stored row stand.

    Attributes:
        lengths: tokens without padding, by side: `input`, and `decoder` for sequence-to-sequence models.
        starts: where they begin in the batch of this row alone.
        logits: positions of the logits that predict a label, without padding.
    """

    lengths: dict[str, int]
    starts: dict[str, int]
    logits: list[int]


def row_layout(model: nn.Module, batch: Mapping[str, Any], shift: bool = True) -> RowLayout:
    """The layout of a batch of one row. `shift`: position t - 1 predicts label t, as in decoder-only models."""
    labels = batch.get("labels")
    first = next(batch[name] for name in ("input_ids", "inputs_embeds", "attention_mask") if name in batch)
    mask = batch.get("attention_mask")
    present = torch.ones(first.shape[1], dtype=torch.bool) if mask is None else mask[0].bool().cpu()
    # The last minus the first, as in the collator: a token inside may be masked.
    places = present.nonzero().flatten().tolist() or [0]
    lengths, starts = {"input": places[-1] + 1 - places[0]}, {"input": places[0]}
    if labels is None:
        raise InputError("stored rows without labels have no logits to distil; give every row `labels`")
    if first.shape[0] != 1:
        raise InputError(
            f"one row became a batch of {first.shape[0]}; stored rows need a collator that makes one of each, and no "
            "packing"
        )
    if labels.dim() == 1 or labels.is_floating_point():
        if bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False)):
            raise InputError("rows of an encoder-decoder model with one label each cannot be distilled; use 'replay'")
        return RowLayout(lengths, starts, [0])
    known = [i for i, label in enumerate(labels[0].tolist()) if label != -100]
    if bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False)):
        starts["decoder"] = known[0] if known else 0
        lengths["decoder"] = known[-1] - known[0] + 1 if known else 0
        return RowLayout(lengths, starts, [i - starts["decoder"] for i in known])
    start = starts["input"]
    known = [i - start for i in known]
    return RowLayout(lengths, starts, [i - 1 for i in known if i > 0] if shift and shifts_labels(model) else known)


def shifts_labels(model: nn.Module) -> bool:
    """Whether the logits at t - 1 predict the label at t, as in decoder-only language models."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        return False
    # What transformers takes for a causal language model: also every head whose name it does not know.
    return getattr(base, "loss_type", None) in (None, "ForCausalLM", "ForConditionalGeneration")


def query_rows(length: int, budget: int, seed: int, row_id: str) -> list[int]:
    """`budget` random query positions of a row of `length` tokens, the same in every process; 0: all of them."""
    if budget == 0 or length <= budget:
        return list(range(length))
    generator = torch.Generator().manual_seed(seed + sum(ord(c) * 31**i for i, c in enumerate(row_id)) % 2**31)
    return sorted(torch.randperm(length, generator=generator)[:budget].tolist())


class PlannedSignals:
    """Signals without values, which an online teacher fills in: the same positions, heads and rows, nothing stored."""

    def __init__(self, rows: Mapping[str, RowSignals]) -> None:
        self._rows = dict(rows)

    def read(self, row_id: str) -> RowSignals:
        return self._rows[row_id]


# -- the method --------------------------------------------------------------------------------------------------------


@dataclass
class ReplayDistillationConfig:
    """Options that DER++ and SEEKR have in common."""

    ratio: float = field(default=0.01, metadata={"help": "Share of each past task that is kept, in (0, 1] (1 %)."})
    count: int | None = field(default=None, metadata={"help": "Rows kept per task; overrides ratio."})
    total: int | None = field(default=None, metadata={"help": "Rows kept in all; older tasks then give up theirs."})
    policy: Policy = field(
        default="random",
        metadata={
            "help": "Which rows are kept: random (the papers), first_n (SEEKR's code), reservoir, class_balanced or "
            "herding (by features from before the task, for it is then that rows are chosen)."
        },
    )
    seed: int = field(default=42, metadata={"help": "Seed of the rows that are kept and of their order."})
    teacher: Literal["cached", "previous", "tasks"] = field(
        default="cached",
        metadata={
            "help": "cached: each row's signals by the model after the row's own task, on disk (the code). previous: "
            "the weights before the present task, one more forward and nothing stored; full fine-tuning then keeps "
            "a copy of the weights. tasks: as cached, but computed anew from the adapter of each task (LoRA only)."
        },
    )
    loss_mix: Literal["alternate", "summed"] = field(
        default="alternate",
        metadata={
            "help": "alternate: whole micro-batches of stored rows between new ones, each stored row once an epoch "
            "(SEEKR's code). summed: a batch of stored rows beside every new one (both papers' equations)."
        },
    )
    replay_batch_size: int | None = field(
        default=None, metadata={"help": "summed: stored rows beside each micro-batch; default: as many as in it."}
    )
    replay_weight: float | None = field(
        default=None, metadata={"help": "summed: factor of all losses on stored rows; default: see the method."}
    )
    top_k: int | None = field(
        default=None,
        metadata={"help": "Store only the k largest logits and the log-sum-exp; default: all of the vocabulary."},
    )
    source: Source = field(default="past", metadata={"help": SOURCE_HELP})

    def __post_init__(self) -> None:
        check_buffer(self.ratio, self.count, self.total, self.policy, self.seed)
        check_source(self.source)
        for option in ("count", "replay_batch_size", "top_k"):
            value = getattr(self, option)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise InputError(f"{option}={value!r} must be a whole number, at least 1")
        check_choice("teacher", self.teacher, TEACHERS)
        check_choice("loss_mix", self.loss_mix, ("alternate", "summed"))
        if self.top_k is not None and self.teacher != "cached":
            raise InputError(f"top_k={self.top_k} is for stored logits, with teacher='cached'; leave it out")
        if self.replay_weight is not None:
            check_weight("replay_weight", self.replay_weight)
        if self.loss_mix == "alternate" and (self.replay_batch_size is not None or self.replay_weight is not None):
            given = "replay_batch_size" if self.replay_batch_size is not None else "replay_weight"
            raise InputError(f"{given}={getattr(self, given)!r} needs loss_mix='summed'; leave it out")


def check_choice(option: str, value: Any, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise InputError(f"{option}={value!r} is unknown; choose {', '.join(allowed)}")


def check_weight(option: str, value: Any, most: float = math.inf) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 <= value <= most or value == math.inf:
        upper = f" and at most {most:g}" if most < math.inf else ""
        raise InputError(f"{option}={value!r} must be a number of at least 0{upper}")


ConfigT = TypeVar("ConfigT", bound=ReplayDistillationConfig)


class ReplayDistillation(ContinualMethod[ConfigT], Generic[ConfigT]):
    """Base of DER++ and SEEKR. A subclass gives the losses, and may add signals of its own.

    State: `buffer_` (rows and, with the cached teacher, their signals), `teachers_` and `adapters_` (with `teacher:
    tasks`), `drawn_` (stored rows drawn so far in this task, with `loss_mix: summed`).
    """

    name = "replaydistillation"
    supports = ALL_BACKENDS
    batch_columns = OWN_COLUMNS
    owns = frozenset({"replay"})

    def __init__(self, config: ConfigT | None = None, **options: Any) -> None:
        super().__init__(config, **options)
        c = self.config
        self.buffer_ = ReplayBuffer(ratio=c.ratio, count=c.count, total=c.total, policy=c.policy, seed=c.seed)
        self._teacher_kind = c.teacher if c.source == "past" else "none"  # the padded control has no old knowledge
        if self._teacher_kind == "cached":
            self.buffer_.signals = SignalStore(None)
        self.counts_micro_batches = c.loss_mix == "alternate"
        self.teachers_: dict[str, Tensor] = {}
        self.adapters_: dict[str, list[str]] = {}
        self.drawn_ = 0
        self._rows: Any = None
        self._chosen: list[int] = []
        self._before: dict[str, Tensor] = {}
        self._collator: Any = None
        self._planned: Any = None
        self._features: Any = None
        self._drawn_from: datasets.Dataset | None = None
        self._teacher: Any = None
        self._means: dict[str, tuple[Any, int]] = {}
        self._said = ""

    @property
    def store(self) -> SignalStore:
        """The signals of the cached teacher."""
        signals = self.buffer_.signals
        assert isinstance(signals, SignalStore)
        return signals

    # -- what a subclass gives ---------------------------------------------------------------------------------------

    stored_loss_weight: float = 1.0
    """The factor of the task loss on stored rows."""
    shift_logits = True
    """Whether the logits at position t - 1 are those of label t (decoder-only models)."""

    def distillation_losses(self, teacher: TeacherBatch, outputs: Any) -> dict[str, Tensor]:
        """The named losses on the stored rows of a batch, their weights included."""
        raise NotImplementedError

    def planned_attention(self, row_id: str, task: int, layout: RowLayout) -> dict[str, AttentionSignal]:
        """Which heads and rows of a stored row to match, without values."""
        return {}

    def capture_kwargs(self, row_id: str, layout: RowLayout) -> dict[str, Any]:
        """Keyword arguments of the model that capture the attention of one stored row."""
        return {}

    def captured(self, layout: RowLayout) -> dict[str, AttentionSignal]:
        """What they have captured, without padding, on the CPU."""
        return {}

    def attention_kwargs(self, teacher: TeacherBatch) -> dict[str, Any]:
        """Keyword arguments of the student's forward."""
        return {}

    def teacher_kwargs(self, teacher: TeacherBatch) -> dict[str, Any]:
        """Keyword arguments of an online teacher's forward."""
        return {}

    def keep_attention(self, teacher: TeacherBatch, task_of_row: Tensor, task: int | None) -> None:
        """Move what they have captured into `teacher`; of the rows of `task` alone, if given."""

    def default_replay_weight(self, new: int, stored: int) -> float:
        """`replay_weight` where it is not given."""
        return 1.0

    # -- a task ------------------------------------------------------------------------------------------------------

    def on_task_begin(self, ctx: MethodContext) -> None:
        if self._teacher_kind == "tasks" and not ctx.lora.is_peft:
            raise InputError(
                f"method '{self.name}': teacher='tasks' keeps the adapter of every task and this model has none; use "
                "teacher='cached', or LoRA"
            )
        if ctx.task.index == 0:
            self.drawn_ = 0

    def train_dataset(self, ctx: MethodContext, dataset: Any) -> Any:
        own = dataset if ctx.rows is None else ctx.rows  # not what another method has mixed in
        check_rows(own, self.name, ctx.task.name)
        check_columns(own, self.buffer_.rows, self.name, ctx.task.name)
        self.buffer_.bind(model_key(ctx.model), tokenizer_key(ctx.tokenizer))
        self._rows, self._means = own, {}
        features = features_of(ctx, own) if self.config.policy == "herding" else None
        self._chosen = self.buffer_.choose(own, ctx.task.index, features)
        self._features = features
        if self._teacher_kind == "cached":
            # Beside the checkpoints, so that rows which a killed process has finished are not computed again.
            key, store = self.signal_key(ctx), self.store
            if store.ids:
                store.check(key)
            store.key |= key
            assert ctx.folder is not None
            store.work_in(ctx.folder / f"{self.name}-signals")
        self._before = self._weights_before(ctx)
        if not len(self.buffer_):
            return dataset
        self._drawn_from = self._replayed(ctx) if self.config.loss_mix == "summed" else None
        if self._teacher_kind in ONLINE:
            self._plan(ctx)
        if self.config.loss_mix == "summed":
            return dataset
        return InterleavedDataset(dataset, self._stored_rows(ctx))

    def _weights_before(self, ctx: MethodContext) -> dict[str, Tensor]:
        """The weights before the task, where something needs them later."""
        return trainable_copy(ctx.model, ctx.dist) if self._teacher_kind == "previous" and len(self.buffer_) else {}

    def _replayed(self, ctx: MethodContext) -> datasets.Dataset:
        seed = self.config.seed + ctx.task.index
        rows = replayed_rows(self.buffer_.rows, self._rows, self.config.source, seed)
        assert rows is not None
        return rows

    def _stored_rows(self, ctx: MethodContext) -> datasets.Dataset:
        rows = self._replayed(ctx)
        return rows.add_column("replay_row", list(range(len(rows))))  # type: ignore[call-arg]

    def _plan(self, ctx: MethodContext) -> None:
        """What an online teacher is asked for each stored row."""
        planned, rows = {}, self.buffer_.rows
        assert rows is not None
        for row, row_id, task in zip(rows, self.buffer_.ids, self.buffer_.tasks, strict=True):
            layout = row_layout(ctx.model, ctx.make_batch([row]), self.shift_logits)
            positions = torch.tensor(layout.logits, dtype=torch.int32)
            planned[row_id] = RowSignals(
                layout.lengths,
                LogitSignal(positions, None, None, None),
                self.planned_attention(row_id, task, layout),
            )
        self._planned = PlannedSignals(planned)

    def data_collator(self, ctx: MethodContext, collator: Any) -> Any:
        if getattr(collator, "mlm", False):
            raise InputError(
                f"method '{self.name}': {type(collator).__name__} masks other tokens of a row each time, so that no "
                "teacher's signals fit it; use 'replay', or rows that are masked once"
            )
        if not len(self.buffer_):
            return collator
        signals = self.store if self._teacher_kind == "cached" else self._planned
        self._collator = DistillationCollator(collator, signals, self.buffer_.ids, self.buffer_.tasks)
        return collator if self.config.loss_mix == "summed" else self._collator

    # -- a micro-batch -----------------------------------------------------------------------------------------------

    def forward_kwargs(self, ctx: MethodContext, batch: Mapping[str, Any]) -> dict[str, Any]:
        teacher = batch.get("teacher")
        if teacher is None:
            return {}
        return self._with_teacher(ctx, batch, teacher)

    def _with_teacher(self, ctx: MethodContext, batch: Mapping[str, Any], teacher: TeacherBatch) -> dict[str, Any]:
        """Moves the teacher's signals to the device, or asks an online teacher; keyword arguments of the student."""
        device = next(v.device for v in batch.values() if torch.is_tensor(v))
        teacher = teacher.to(device)
        if self._teacher_kind in ONLINE:
            self._ask_teacher(ctx, batch, teacher)
        self._teacher = teacher
        return self.attention_kwargs(teacher)

    def _ask_teacher(self, ctx: MethodContext, batch: Mapping[str, Any], teacher: TeacherBatch) -> None:
        """Fill in what an online teacher says of the stored rows: one forward, or one for each task among them."""
        inputs = without_labels(ctx.model, batch)
        device = next(v.device for v in inputs.values() if torch.is_tensor(v))
        task_of_row = torch.full((teacher.size,), -1)
        task_of_row[teacher.rows] = torch.tensor(teacher.tasks)
        task_of_row = task_of_row.to(device)
        for task in self._tasks_to_ask(ctx, teacher) if self._teacher_kind == "tasks" else [None]:
            request = self.teacher_kwargs(teacher)
            outputs = teacher_forward(ctx, self._teacher_weights(ctx, task), {**inputs, **request})
            if teacher.logits is not None:
                found = logits_at(outputs.logits, teacher.logits)
                found = found.to(torch.promote_types(found.dtype, torch.float32))
                values = take_rows(teacher.logits.values, found, teacher.logits.batch, task_of_row, task)
                teacher.logits.values, teacher.logits.lse = values, values.logsumexp(-1)
            self.keep_attention(teacher, task_of_row, task)

    def _tasks_to_ask(self, ctx: MethodContext, teacher: TeacherBatch) -> list[int]:
        """Whose teachers are asked, one after the other; where weights are split all ranks ask the same ones."""
        if ctx.dist.whole_weights:
            return sorted(set(teacher.tasks))
        asked = torch.zeros(max(self.buffer_.tasks) + 1)
        asked[list(teacher.tasks)] = 1.0
        return ctx.dist.sum_(asked).nonzero().flatten().tolist()

    def _teacher_weights(self, ctx: MethodContext, task: int | None) -> dict[str, Tensor]:
        """The weights before this task, or those after `task`: its own, and adapters that came later left out."""
        if task is None:
            return self._before
        parameters, prefix = dict(ctx.model.named_parameters()), f"{task:03d}/"
        later = [name for name in ctx.lora.adapters if name not in self.adapters_[f"{task:03d}"]]
        weights = {}
        for name in ctx.lora.output_factors(later):
            p = parameters[name]
            weights[name] = torch.zeros(full_shape(p), dtype=p.dtype, device=p.device)
        for key, value in self.teachers_.items():
            if key.startswith(prefix):
                name = key.removeprefix(prefix)
                weights[name] = value.to(parameters[name].device)
        return weights

    def task_loss_weight(self, ctx: MethodContext, batch: Mapping[str, Any]) -> float:
        return self.stored_loss_weight if batch.get("teacher") is not None else 1.0

    def extra_loss(self, ctx: MethodContext, batch: Mapping[str, Any], outputs: Any) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = {}
        if self.config.loss_mix == "summed":
            losses = self._summed(ctx, batch)
        elif batch.get("teacher") is not None:
            losses = self.distillation_losses(self._teacher, outputs)
        for name, loss in losses.items():
            total, times = self._means.get(name, (0.0, 0))
            self._means[name] = total + loss.detach().float(), times + 1
        return losses

    def _summed(self, ctx: MethodContext, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """All losses of a further batch of stored rows."""
        if not len(self.buffer_):
            return {}
        new = next(v.shape[0] for v in batch.values() if torch.is_tensor(v) and v.dim())
        rows = self._draw(ctx, self.config.replay_batch_size or new)
        stored = ctx.make_batch(rows, self._collator)
        teacher = stored.pop("teacher")
        stored.pop("replay_row", None)
        kwargs = self._with_teacher(ctx, stored, teacher)
        with ctx.autocast():
            outputs = ctx.model(**stored, **kwargs)
        weight = self.config.replay_weight
        if weight is None:
            weight = self.default_replay_weight(len(self._rows), len(self.buffer_))
        losses = {f"{self.name}/replay": self.stored_loss_weight * outputs.loss}
        losses |= self.distillation_losses(self._teacher, outputs)
        return {name: weight * loss for name, loss in losses.items()}

    def _draw(self, ctx: MethodContext, size: int) -> list[dict[str, Any]]:
        """The next stored rows, in a new order whenever all have had their turn; each rank gets its own."""
        total, rows = len(self.buffer_), self._drawn_from
        assert rows is not None
        size = min(size, total)
        first = self.drawn_ + ctx.dist.rank * size
        self.drawn_ += ctx.dist.world_size * size
        drawn = []
        for place in range(first, first + size):
            generator = torch.Generator().manual_seed(self.config.seed + 1000 * ctx.task.index + place // total)
            index = int(torch.randperm(total, generator=generator)[place % total])
            drawn.append({**rows[index], "replay_row": index})
        return drawn

    # -- the end of a task -------------------------------------------------------------------------------------------

    def on_task_end(self, ctx: MethodContext) -> None:
        task = ctx.task
        if self._teacher_kind != "none":
            self.choose_heads(ctx)
        if self._teacher_kind == "tasks":
            self.teachers_ |= {f"{task.index:03d}/{n}": t for n, t in trainable_state(ctx.model).items()}
            self.adapters_[f"{task.index:03d}"] = ctx.lora.adapters
        if self._teacher_kind == "cached":
            self._write_signals(ctx)
        self.buffer_.add(task.index, task.name, self._rows, self._chosen, self._features)
        self._said = self._describe(task.name)
        self.drawn_ = 0
        self._rows, self._chosen, self._before, self._features = None, [], {}, None
        self._collator = self._planned = self._teacher = self._drawn_from = None

    def row_ids(self, task: int) -> list[str]:
        """The ids that the buffer gives the chosen rows."""
        return [f"{task:03d}-{row:07d}" for row in self._chosen]

    def summary(self) -> str | None:
        return self._said

    def _describe(self, task: str) -> str:
        parts = [f"kept {self.buffer_.sizes.get(task, 0)} of {len(self._rows)} rows, {len(self.buffer_)} in all"]
        if self._teacher_kind == "cached":
            parts.append(f"{self.store.bytes() / 2**20:.1f} MiB of signals")
        parts += [f"{name} {float(total) / times:.3g} on average" for name, (total, times) in self._means.items()]
        return ", ".join(parts)

    def own_rows(self, ctx: MethodContext) -> Iterator[tuple[str, dict[str, Any], RowLayout]]:
        """Id, batch and layout of each chosen row of this task, one at a time."""
        for row_id, index in zip(self.row_ids(ctx.task.index), self._chosen, strict=True):
            batch = ctx.make_batch([dict(self._rows[index])])
            yield row_id, batch, row_layout(ctx.model, batch, self.shift_logits)

    def choose_heads(self, ctx: MethodContext) -> None:
        """Before the signals are taken: which heads of the task's own rows they are of."""

    def signal_key(self, ctx: MethodContext) -> dict[str, str]:
        """What must be equal for signals to be used again."""
        return {
            "model": model_key(ctx.model),
            "tokenizer": str(tokenizer_key(ctx.tokenizer)),
            "logits": f"top_k={self.config.top_k}, shift={self.shift_logits}",
        }

    def _write_signals(self, ctx: MethodContext) -> None:
        """Signals of the task's own rows; the first process computes them, all read them."""
        store = self.store
        store.key[f"teacher:{ctx.task.index:03d}"] = teacher_hash(trainable_state(ctx.model))
        if ctx.dist.is_main or not ctx.dist.whole_weights:  # split weights are collected: every rank takes part
            with evaluating(ctx.model), torch.no_grad(), ctx.autocast():
                for row_id, batch, layout in self.own_rows(ctx):
                    missing = not store.has(row_id)
                    if not ctx.dist.whole_weights:
                        missing = processes().broadcast(missing)
                    if missing:
                        signals = self._signals(ctx, row_id, batch, layout)
                        if ctx.dist.is_main:
                            store.write(row_id, signals)
        ctx.dist.barrier()
        self._see(store, ctx)

    def _see(self, store: SignalStore, ctx: MethodContext) -> None:
        """Take up what the first process has written."""
        for row_id in self.row_ids(ctx.task.index):
            if not store.has(row_id):
                raise InputError(
                    f"method '{self.name}': {store.folder} lacks the signals that the first process has written there; "
                    "give all processes an output_dir on one shared file system"
                )

    def _signals(self, ctx: MethodContext, row_id: str, batch: Mapping[str, Any], layout: RowLayout) -> RowSignals:
        request = self.capture_kwargs(row_id, layout)
        logits = ctx.model(**without_labels(ctx.model, batch), **request).logits
        if logits.dim() == 3:
            side = "decoder" if "decoder" in layout.starts else "input"
            logits = logits[0, [layout.starts[side] + p for p in layout.logits]]
        positions = torch.tensor(layout.logits, dtype=torch.int32)
        signal = LogitSignal.from_logits(logits.float().cpu(), positions, self.config.top_k)
        return RowSignals(layout.lengths, signal, self.captured(layout))


def logits_at(logits: Tensor, target: LogitTarget) -> Tensor:
    """The logits at the positions of a target, [positions, vocabulary]."""
    return logits[target.batch] if logits.dim() == 2 else logits[target.batch, target.position]


def take_rows(
    before: Tensor | None, found: Tensor, batch: Tensor | None, task_of_row: Tensor, task: int | None
) -> Tensor:
    """`found`, or where its row is not of `task` what was there `before`; `batch` [n]: the row of each entry."""
    if task is None or before is None:
        return found
    mine = (task_of_row if batch is None else task_of_row[batch]) == task
    return torch.where(mine.view(-1, *[1] * (found.dim() - 1)), found, before)
