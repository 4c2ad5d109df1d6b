"""What the methods of a run add to its memory: state, teacher signals, losses, and what they do at the seam."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .distillation import ReplayDistillation, logit_kl, logit_mse
from .lora import LoraView
from .memory_simulation import FLOAT, Counts, Loss, Shape, Simulation
from .methods.agem import AGEM
from .methods.base import ContinualMethod
from .methods.derpp import DERPP
from .methods.ewc import EWC, quadratic
from .methods.fisher_merge import FisherMerge
from .methods.gem import GEM
from .methods.kif import KIF
from .methods.kif import orthogonality as unit_orthogonality
from .methods.lwf import LwF, distillation
from .methods.migu import MIGU, find_targets
from .methods.olora import OLoRA
from .methods.olora import orthogonality as old_and_new
from .methods.seekr import HEADS, LAYERS, SEEKR
from .methods.weight_ema import WeightEMA
from .skill_fusion import SkillFusion

if TYPE_CHECKING:
    from .memory_estimate import Plan

__all__ = ["MethodMemory", "method_memory"]


@dataclass
class MethodMemory:
    """What the methods add, in bytes of one GPU."""

    state: int = 0
    teacher: int = 0
    losses: list[Loss] = field(default_factory=list)
    stored_losses: list[Loss] | None = None
    """Of a micro-batch of stored rows that comes in place of one of new rows."""
    stored_teacher: int = 0
    """Signals of a teacher that such a micro-batch brings."""
    seam: list[tuple[Shape, int]] = field(default_factory=list)
    """Backwards at the seam: the micro-batch, and what is kept beside it."""
    seam_scratch: int = 0
    step_scratch: int = 0
    end_scratch: int = 0
    notes: list[str] = field(default_factory=list)


def method_memory(
    methods: Sequence[ContinualMethod[Any]],
    simulation: Simulation,
    counts: Counts,
    shape: Shape,
    plan: Plan,
    tasks: int,
    device: str,
) -> MethodMemory:
    found = MethodMemory()
    shards = plan.world_size if plan.shards_optimizer else 1
    copy_of_all = -(-counts.trained * FLOAT // shards)
    """One float32 copy of what learns, as far as this process holds it."""
    weights = counts.trained_bytes // (plan.world_size if plan.shards_weights else 1)
    later = tasks > 1
    for method in methods:
        c: Any = method.config
        if isinstance(method, MIGU):
            view: Any = SimpleNamespace(model=simulation.model, lora=LoraView(simulation.model))
            targets = find_targets(view, c)
            rows = sum(target.rows for target in targets)
            found.state += 4 * FLOAT * rows  # magnitude, mask, updates, and the mask in the dtype of the gradients
            if c.mask == "update":  # the weights and their moments, as they were before the step
                masked = sum(simulation.trained[target.weight].numel() for target in targets)
                found.step_scratch += -(-3 * FLOAT * masked // shards)
        elif isinstance(method, SkillFusion):
            units = sum(p.numel() for p in simulation.trained.values() if p.dim() >= c.min_ndim)
            found.state += -(-(3 if c.average == "run" else 2) * FLOAT * units // shards)
            found.step_scratch = max(found.step_scratch, _tracker_scratch(-(-units // shards), device))
            # The scores of a unit are products in float64.
            found.end_scratch = max(found.end_scratch, 3 * 8 * max(p.numel() for p in simulation.trained.values()))
            if isinstance(method, KIF) and c.orthogonality and c.orthogonality_form != "off":
                found.losses.append(_kif_loss(method))
        elif isinstance(method, EWC):
            if not c.ewc_lambda:
                continue
            trace = c.fisher == "trace"
            # The penalty is in the loss, over whole weights, or at the seam, over parts.
            held = copy_of_all if plan.shards_weights else counts.trained * FLOAT
            found.state += (2 * held if later else 0) + trace * copy_of_all
            if later and plan.shards_weights:
                found.seam_scratch = max(found.seam_scratch, 3 * copy_of_all)
            elif later:
                found.losses.append(_ewc_loss(simulation))
            if trace:
                found.seam_scratch = max(found.seam_scratch, 2 * copy_of_all)
            else:  # the sum over rows, the gradients of one and the same as a vector; with activations of one row
                row = dataclasses.replace(shape, rows=1)
                pass_ = simulation.peak(row, gradients="returned")
                end = counts.trained * FLOAT + max(pass_, counts.trained_bytes + counts.trained * FLOAT)
                found.end_scratch = max(found.end_scratch, end)
        elif isinstance(method, LwF):
            if c.weight and later:
                found.teacher += weights * (2 if plan.shards_weights else 1)  # the model's own, put aside meanwhile
                found.losses.append(_lwf_loss(shape, c.temperature))
        elif isinstance(method, (AGEM, GEM)):
            _gradient_memory(found, method, shape, plan, counts, tasks)
        elif isinstance(method, WeightEMA):
            found.state += copy_of_all if later else 0
        elif isinstance(method, FisherMerge):
            found.state += copy_of_all + (
                copy_of_all if device == "cpu" and later else 0
            )  # the sum over tasks: on the CPU
            found.seam_scratch = max(found.seam_scratch, copy_of_all)
        elif isinstance(method, ReplayDistillation):
            if later:
                _stored_memory(found, method, simulation, shape, counts, weights)
        elif isinstance(method, OLoRA):
            if later:
                found.losses.append(_olora_loss(simulation, method))
        elif type(method).__module__.rpartition(".")[0] != __package__ + ".methods":
            found.notes.append(f"what method '{method.name}' keeps is unknown here and not counted")
    return found


def _tracker_scratch(units: int, device: str) -> int:
    """The products w g: of all weights where they are few, else of a piece with both factors."""
    from .importance import CHUNK, KEPT, LARGE_CHUNK

    piece = min(units, CHUNK.get(device, LARGE_CHUNK))
    return FLOAT * ((units if units <= KEPT else piece) + 2 * piece)


def _kif_loss(method: KIF) -> Loss:
    def loss(simulation: Any, trained: dict[str, Tensor], batch: Any, outputs: Any) -> Tensor:
        groups: dict[tuple[bool, tuple[int, ...]], list[Tensor]] = {}
        for name, p in trained.items():
            is_b = "lora_B" in name or "lora_embedding_B" in name
            if is_b or "lora_A" in name or "lora_embedding_A" in name:
                groups.setdefault((is_b, tuple(p.shape)), []).append(p)
        terms = []
        for (is_b, _), tensors in groups.items():
            stacked = torch.stack([t.flatten(1) for t in tensors])
            terms.append(unit_orthogonality(stacked.mT if is_b else stacked, method.config.orthogonality_form).float())
        return torch.cat(terms).mean()

    return loss


def _ewc_loss(simulation: Simulation) -> Loss:
    precision, centre = ([simulation.hold(*p.shape) for p in simulation.trained.values()] for _ in range(2))
    return lambda _, trained, batch, outputs: quadratic(list(trained.values()), precision, centre)


def _olora_loss(simulation: Simulation, method: OLoRA) -> Loss:
    newest = [(n, p) for n, p in simulation.model.named_parameters() if ".lora_A." in n]
    old = [p for _, p in newest if not p.requires_grad]
    new = [p for _, p in newest if p.requires_grad]

    def loss(simulation: Any, trained: dict[str, Tensor], batch: Any, outputs: Any) -> Tensor:
        terms, per_layer = [], len(old) // max(1, len(new))
        for number, fresh in enumerate(new):
            before = old[number * per_layer : (number + 1) * per_layer]
            terms.append(old_and_new(torch.cat([t.to(fresh) for t in before])[None], fresh[None]))
        return torch.stack(terms).sum()

    return loss


def _lwf_loss(shape: Shape, temperature: float) -> Loss:
    def loss(simulation: Any, trained: dict[str, Tensor], batch: Any, outputs: Any) -> Tensor:
        index = torch.zeros(shape.rows, shape.completion, 1, dtype=torch.long)
        inputs = dict(batch) if simulation.seq2seq else {k: v for k, v in batch.items() if k != "labels"}
        with simulation.evaluating():
            old = simulation.forward(inputs).logits
            old = old.gather(1, index.expand(-1, -1, old.shape[-1]))
        new = outputs.logits.gather(1, index.expand(-1, -1, old.shape[-1]))
        return distillation(new, old, temperature).sum()

    return loss


def _gradient_memory(found: MethodMemory, method: Any, shape: Shape, plan: Plan, counts: Counts, tasks: int) -> None:
    """GEM and A-GEM: gradients of stored rows, as flat float32 vectors."""
    if tasks < 2 or method.config.count == 0 or method.config.total == 0:
        return
    c, vector = method.config, counts.trained * FLOAT
    rows = c.memory_micro_batch
    if c.memory_batch_size is not None:
        rows = min(rows, max(1, -(-c.memory_batch_size // plan.world_size)))
    for most in (c.count, c.total):
        rows = rows if most is None else min(rows, most)
    vectors = 1 if isinstance(method, AGEM) else tasks - 1
    # While rows are passed: the sum, and for GEM those of the tasks before. At the end of a pass the gradients once
    # more as a vector; then the projection, with the step's own gradient and the correction as vectors.
    found.seam.append((dataclasses.replace(shape, rows=rows), vectors * vector))
    flattened = vectors * vector + counts.trained_bytes + vector
    projection = vector * (3 if isinstance(method, AGEM) else 2 * vectors + 2)
    found.seam_scratch = max(found.seam_scratch, flattened, projection)


def _stored_memory(
    found: MethodMemory,
    method: Any,
    simulation: Simulation,
    shape: Shape,
    counts: Counts,
    weights: int,
) -> None:
    """DER++ and SEEKR: a micro-batch of stored rows, with what a teacher says of them."""
    c: Any = method.config
    rows = shape.rows if c.loss_mix == "alternate" else c.replay_batch_size or shape.rows
    stored = dataclasses.replace(shape, rows=rows)
    is_seekr = isinstance(method, SEEKR)
    needs_change = isinstance(method, SEEKR) and method._needs_change and LoraView(simulation.model).is_peft
    if c.teacher == "previous" or needs_change:
        found.teacher += weights
    if c.teacher == "tasks":
        found.teacher += weights
    maps = residual = 0
    if is_seekr and c.attention_weight:
        maps, residual = _attention_signals(method, simulation, stored)
    vocabulary = simulation.model.get_output_embeddings().weight.shape[0]
    known = c.top_k or vocabulary
    wants_logits = c.logit_weight if is_seekr else c.alpha
    signals = maps + (stored.labels * known * (FLOAT + (8 if c.top_k else 0)) if wants_logits else 0)

    values, lse = simulation.hold(stored.labels, known if wants_logits else 0), simulation.hold(stored.labels)

    def distil(simulation: Any, trained: dict[str, Tensor], batch: Any, outputs: Any) -> Tensor:
        if c.teacher != "cached":
            inputs = dict(batch) if simulation.seq2seq else {k: v for k, v in batch.items() if k != "labels"}
            with simulation.evaluating():
                simulation.forward(inputs)
        kept = torch.empty(residual, dtype=torch.uint8)
        total = torch.zeros(())
        if wants_logits:
            flat = outputs.logits.flatten(0, 1)
            student = flat[torch.zeros(stored.labels, dtype=torch.long)]
            indices = torch.zeros(stored.labels, known, dtype=torch.long) if c.top_k else None
            if isinstance(method, DERPP) and method.config.loss != "kl":
                total = total + logit_mse(student, values, indices)
            else:
                total = total + logit_kl(student, values, lse, indices)
        return total.sum() + _Keep.apply(outputs.loss, kept)

    if c.loss_mix == "alternate":
        found.stored_losses = [distil]
    else:

        def summed(simulation: Any, trained: dict[str, Tensor], batch: Any, outputs: Any) -> Tensor:
            again = stored.batch(simulation.seq2seq)
            replayed = simulation.forward(again)
            return replayed.loss + distil(simulation, trained, again, replayed)

        found.losses.append(summed)
    found.stored_teacher = max(found.stored_teacher, signals)


class _Keep(torch.autograd.Function):
    """Holds a tensor until backward, as a saved activation."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, kept: Tensor) -> Tensor:
        ctx.save_for_backward(kept)
        return value * 0

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None


def _attention_signals(method: Any, simulation: Simulation, stored: Shape) -> tuple[int, int]:
    """Bytes of the teacher's maps in a batch, and of what the student keeps of its own for backward."""
    c, config = method.config, simulation.model.config
    heads_each = int(config.num_attention_heads)
    modules = int(config.num_hidden_layers) * (3 if simulation.seq2seq else 1)
    layers = c.layers or min(LAYERS, modules)
    heads = c.heads or min(HEADS, layers * heads_each)
    keys = max(stored.prompt, stored.completion) if simulation.seq2seq else stored.prompt + stored.completion
    rows = min(keys, c.query_rows or keys)
    width = getattr(config, "head_dim", None) or getattr(config, "d_kv", None) or config.hidden_size // heads_each
    entries = stored.rows * heads * rows * (keys if c.attention == "weights" else width)
    size = next(simulation.model.parameters()).element_size()
    if simulation.plan.autocast is not None:
        size = 2
    # Padded to the most heads of a layer, so an uneven choice takes more; the loss works on float32 blocks.
    return entries * FLOAT, 0 if c.recompute else entries * size
