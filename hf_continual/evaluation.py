"""Scoring a task: greedy generation or label likelihood, in length-sorted batches, with the raw predictions kept."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import DynamicCache, GenerationConfig, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutput

from .distributed import Processes
from .errors import InputError
from .models import is_seq2seq
from .scorers import SCORERS, Scorer, check_rows, exact_match, normalize_answer, references_of, rouge_l
from .scorers import get as get_scorer
from .scorers import score as score_rows
from .tasks import Task
from .tokenization import encode_completion, encode_prompt

__all__ = [
    "SCORERS",
    "Cell",
    "EvaluationConfig",
    "check_task",
    "evaluate_task",
    "evaluating",
    "exact_match",
    "make_cell",
    "normalize_answer",
    "references_of",
    "rouge_l",
]

T = TypeVar("T")


@dataclass
class EvaluationConfig:
    """The recipe's `evaluation:` section."""

    scorer: str = field(
        default="exact_match",
        metadata={
            "help": "A scorer's name, such as exact_match, rouge_l or label_likelihood; a task may name its own."
        },
    )
    batch_size: int = field(default=16, metadata={"help": "Rows per batch; for label_likelihood, sequences per batch."})
    max_new_tokens: int = field(default=50, metadata={"help": "Longest answer that is generated (MIGU: 50)."})
    unseen: bool = field(default=False, metadata={"help": "Also score tasks not learnt yet, for forward transfer."})
    base_model: bool = field(
        default=False, metadata={"help": "Also score the model before any task, the baseline of forward transfer."}
    )

    def __post_init__(self) -> None:
        get_scorer(self.scorer, "evaluation.scorer")
        for option in ("batch_size", "max_new_tokens"):
            value = getattr(self, option)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"evaluation.{option}={value!r} must be a whole number above 0")
        for option in ("unseen", "base_model"):
            if not isinstance(getattr(self, option), bool):
                raise InputError(f"evaluation.{option}={getattr(self, option)!r} must be true or false")


@dataclass
class Cell:
    """One evaluated cell R[i, j]: the score and everything needed to compute another one later."""

    metric: str
    score: float
    n: int
    others: dict[str, float]
    settings: dict[str, Any]
    predictions: list[dict[str, Any]]


def evaluate_task(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    config: EvaluationConfig,
    *,
    max_prompt_length: int,
    description: str = "",
    autocast_dtype: torch.dtype | None = None,
    ranks: Processes | None = None,
) -> Cell:
    """Score `model` on `task.eval_dataset` (columns `prompt`, `references`, and what the scorer needs).

    With `ranks` every process must call it with the same whole model; they share the batches and all get the cell. It
    is that of one process, since no batch is made differently.

    Raises:
        InputError: if the task has no evaluation data, or no labels where the scorer needs them.
    """
    scorer = _scorer_of(task, config)
    rows = list(task.eval_dataset)
    encoded = [encode_prompt(row["prompt"], tokenizer, max_prompt_length, is_seq2seq(model)) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: (-len(encoded[i]), i))
    device = next(model.parameters()).device
    hidden = ranks is not None and not ranks.is_main
    title = description or f"evaluating {task.name}"
    bar = tqdm(total=len(rows), desc=title, leave=False, unit="row", disable=hidden)
    autocast = torch.autocast(device.type, autocast_dtype, enabled=autocast_dtype is not None)
    with bar, evaluating(model), torch.no_grad(), autocast:
        if scorer.answers == "labels":
            predictions = _by_likelihood(model, tokenizer, task, config, rows, encoded, order, bar, ranks)
        else:
            predictions = _by_generation(model, tokenizer, scorer, config, rows, encoded, order, bar, ranks)
    settings: dict[str, Any] = {
        "scorer": scorer.name,
        "max_prompt_length": max_prompt_length,
        "batch_size": config.batch_size,
    }
    if scorer.same is not None and task.labels:
        settings["labels"] = list(task.labels)
    if scorer.answers != "labels":
        settings |= {"max_new_tokens": config.max_new_tokens, "do_sample": False, "num_beams": 1}
    return make_cell(scorer.name, predictions, settings, f"task '{task.name}'")


def make_cell(scorer: str, predictions: list[dict[str, Any]], settings: dict[str, Any], where: str = "") -> Cell:
    """Score kept predictions; works without the model. `where` names their file or task in messages."""
    found = score_rows(scorer, predictions, settings.get("labels"), where)
    if scorer == "rouge_l":
        found.details["exact_match"] = score_rows("exact_match", predictions, None, where).value
    metric = SCORERS[scorer].metric or scorer
    return Cell(metric, found.value, len(predictions), found.details, settings, predictions)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode with the key-value cache on, and back."""
    training = model.training
    config = getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", None)
    checkpointing = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False) is True]
    model.eval()
    if use_cache is not None:
        config.use_cache = True  # type: ignore[union-attr]
    for module in checkpointing:  # it switches the cache off
        module.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        yield
    finally:
        model.train(training)
        if use_cache is not None:
            config.use_cache = use_cache  # type: ignore[union-attr]
        for module in checkpointing:
            module.gradient_checkpointing = True  # type: ignore[assignment]


@contextmanager
def using(model: Any, generation: GenerationConfig) -> Iterator[None]:
    """Make `generation` the model's own for a while: `generate` fills what it takes for unset from there."""
    owners: list[Any] = [m for m in (model, getattr(model, "base_model", None)) if hasattr(m, "generation_config")]
    if hasattr(model, "get_base_model"):
        owners.append(model.get_base_model())
    before = [owner.generation_config for owner in owners]
    try:
        for owner in owners:
            owner.generation_config = generation
        yield
    finally:
        for owner, config in zip(owners, before, strict=True):
            owner.generation_config = config


def _left_pad(sequences: Sequence[Sequence[int]], pad: int, device: torch.device, left: bool) -> tuple[Tensor, Tensor]:
    width = max(len(s) for s in sequences)
    ids, mask = [], []
    for sequence in sequences:
        fill = width - len(sequence)
        padding, real = [pad] * fill, list(sequence)
        ids.append(padding + real if left else real + padding)
        mask.append([0] * fill + [1] * len(real) if left else [1] * len(real) + [0] * fill)
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _scorer_of(task: Task, config: EvaluationConfig) -> Scorer:
    """The scorer of a task, refused if evaluation cannot make what it scores."""
    scorer = get_scorer(task.scorer or config.scorer, f"task '{task.name}': scorer")
    if scorer.answers == "tokens":
        raise InputError(
            f"task '{task.name}': scorer '{scorer.name}' needs token log-likelihoods, which evaluation does not keep; "
            "score rows with them by hf_continual.scorers.score"
        )
    if scorer.samples > 1:
        raise InputError(
            f"task '{task.name}': scorer '{scorer.name}' needs {scorer.samples} samples a row, and evaluation makes "
            "one; use pass_at_1"
        )
    return scorer


def _keep(index: int, row: Any, prediction: str, scorer: Scorer | None = None) -> dict[str, Any]:
    """What is stored of a row: enough to score it again."""
    columns = (*scorer.columns, *scorer.optional) if scorer is not None else ()
    further = {column: row[column] for column in columns if row.get(column) is not None}
    return {"index": index, "prediction": prediction, "references": references_of(row, f"row {index}"), **further}


def _own_batches(order: Sequence[int], size: int, ranks: Processes | None) -> Iterator[Sequence[int]]:
    """Every so many-th batch, whole: rows padded to another length may be answered differently."""
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    yield from batches if ranks is None else batches[ranks.rank :: ranks.world_size]


def _of_all_ranks(own: dict[int, T], ranks: Processes | None) -> dict[int, T]:
    """What all ranks found, by row."""
    if ranks is None or ranks.world_size == 1:
        return own
    ranks.barrier()
    device = PartialState().device
    text = torch.frombuffer(bytearray(json.dumps(list(own.items())).encode()), dtype=torch.uint8)
    sizes = gather(torch.tensor([len(text)], device=device)).tolist()
    padded = torch.nn.functional.pad(text, (0, max(sizes) - len(text))).to(device)
    found = gather(padded[None]).cpu()
    return {
        i: value for row, size in zip(found, sizes, strict=True) for i, value in json.loads(bytes(row[:size].tolist()))
    }


def _by_generation(
    model: Any,
    tokenizer: Any,
    scorer: Scorer,
    config: EvaluationConfig,
    rows: list[Any],
    encoded: list[list[int]],
    order: list[int],
    bar: Any,
    ranks: Processes | None,
) -> list[dict[str, Any]]:
    seq2seq = is_seq2seq(model)
    device = next(model.parameters()).device
    eos = model.generation_config.eos_token_id
    eos = sorted({*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id} - {None})
    generation = GenerationConfig(
        max_new_tokens=config.max_new_tokens, do_sample=False, num_beams=1, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=eos, use_cache=True,
        decoder_start_token_id=model.generation_config.decoder_start_token_id if seq2seq else None,
    )  # fmt: skip
    answers: dict[int, str] = {}
    for batch in _own_batches(order, config.batch_size, ranks):
        ids, mask = _left_pad([encoded[i] for i in batch], tokenizer.pad_token_id, device, left=not seq2seq)
        with using(model, generation):
            output = model.generate(input_ids=ids, attention_mask=mask, generation_config=generation)
        if not seq2seq:
            output = output[:, ids.shape[1] :]
        for i, text in zip(batch, tokenizer.batch_decode(output, skip_special_tokens=True), strict=True):
            answers[i] = text.rstrip() if scorer.answers == "code" else text.strip()  # code begins with its indentation
        bar.update(len(batch) * (ranks.world_size if ranks is not None else 1))
    answers = _of_all_ranks(answers, ranks)
    return [_keep(i, row, answers[i], scorer) for i, row in enumerate(rows)]


def _by_likelihood(
    model: Any, tokenizer: Any, task: Task, config: EvaluationConfig, rows: list[Any], encoded: list[list[int]],
    order: list[int], bar: Any, ranks: Processes | None,
) -> list[dict[str, Any]]:  # fmt: skip
    """argmax over labels of log p(label, end | prompt), with each prompt encoded once and shared by its labels."""
    labels = list(task.labels or ())
    if len(labels) < 2:
        raise InputError(
            f"task '{task.name}': scorer 'label_likelihood' needs its labels; add `labels: [a, b, ...]` to the task"
        )
    seq2seq = is_seq2seq(model)
    device = next(model.parameters()).device
    scores: dict[int, list[float]] = {}
    size = max(1, config.batch_size // len(labels))
    for batch in _own_batches(order, size, ranks):
        ids, mask = _left_pad([encoded[i] for i in batch], tokenizer.pad_token_id, device, left=not seq2seq)
        answers = [
            encode_completion(label, rows[i]["prompt"], tokenizer, 10_000, seq2seq) for i in batch for label in labels
        ]
        target, target_mask = _left_pad(answers, tokenizer.pad_token_id, device, left=False)
        n = len(labels)
        many_mask = mask.repeat_interleave(n, 0)
        if seq2seq:
            encoder = model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state.repeat_interleave(n, 0)
            decoder_ids = _shift_right(model, target)
            logits = model(encoder_outputs=BaseModelOutput(last_hidden_state=encoder), attention_mask=many_mask,
                           decoder_input_ids=decoder_ids).logits  # fmt: skip
        else:
            positions = (mask.cumsum(-1) - 1).clamp_min(0)
            first = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1)
            cache = first.past_key_values
            if not isinstance(cache, DynamicCache):
                raise InputError("scorer 'label_likelihood' needs a model with a key-value cache; use exact_match")
            cache.batch_repeat_interleave(n)
            steps = torch.arange(target.shape[1] - 1, device=device)
            logits = first.logits[:, -1:].repeat_interleave(n, 0)
            if target.shape[1] > 1:
                rest = model(
                    input_ids=target[:, :-1], attention_mask=torch.cat([many_mask, target_mask[:, :-1]], 1),
                    position_ids=positions[:, -1:].repeat_interleave(n, 0) + 1 + steps, past_key_values=cache,
                ).logits  # fmt: skip
                logits = torch.cat([logits, rest], 1)
        token_scores = logits.float().log_softmax(-1).gather(-1, target.unsqueeze(-1)).squeeze(-1)
        totals = (token_scores * target_mask).sum(-1).view(len(batch), n)
        for i, row_scores in zip(batch, totals.tolist(), strict=True):
            scores[i] = row_scores
        bar.update(len(batch) * (ranks.world_size if ranks is not None else 1))
    scores = _of_all_ranks(scores, ranks)
    return [
        {
            **_keep(i, row, labels[max(range(len(labels)), key=lambda k, s=scores[i]: s[k])]),  # type: ignore[misc]
            "log_likelihood": [round(s, 6) for s in scores[i]],
        }
        for i, row in enumerate(rows)
    ]


def _shift_right(model: Any, target: Tensor) -> Tensor:
    start = model.config.decoder_start_token_id
    return torch.cat([torch.full_like(target[:, :1], start), target[:, :-1]], 1)


def check_task(task: Task, config: EvaluationConfig) -> None:
    """Refuse, before training, a task that could not be scored."""
    scorer = _scorer_of(task, config)
    if task.eval_dataset is None or len(task.eval_dataset) == 0:
        raise InputError(f"task '{task.name}' has no evaluation rows; give it an eval split, or eval_fraction")
    if scorer.answers == "labels" and len(task.labels or ()) < 2:
        raise InputError(
            f"task '{task.name}': scorer '{scorer.name}' needs its labels; add `labels: [a, b, ...]` to the task"
        )
    check_rows(scorer, task.eval_dataset, f"task '{task.name}'", predicted=False)
    scorer.ready()
