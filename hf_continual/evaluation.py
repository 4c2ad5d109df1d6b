"""Scoring a task: generation or label likelihood, in length-sorted batches, with the raw predictions kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather
from torch import nn
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase

from .cells import Cell, make_cell
from .distributed import Processes
from .errors import InputError
from .generation import Choice, Chooser, Draw, Prompt, Writer, work_groups
from .models import is_seq2seq
from .perplexity import TokenJobs
from .scorers import SCORERS, Scorer, check_rows, exact_match, normalize_answer, references_of, rouge_l
from .scorers import get as get_scorer
from .tasks import Task
from .tokenization import Packing, encode_completion, encode_prompt

__all__ = [
    "SCORERS",
    "AnswerLog",
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
    temperature: float = field(
        default=0.0,
        metadata={
            "help": "0 is greedy; above, answers are drawn, as scorers with several answers a row need (Codex: 0.8 for "
            "pass_at_100)."
        },
    )
    top_p: float = field(default=1.0, metadata={"help": "Draw from the likeliest tokens with this much probability."})
    seed: int = field(default=0, metadata={"help": "Of drawn answers; each row has random numbers of its own."})
    unseen: bool = field(default=False, metadata={"help": "Also score tasks not learnt yet, for forward transfer."})
    base_model: bool = field(
        default=False, metadata={"help": "Also score the model before any task, the baseline of forward transfer."}
    )
    general: bool | Mapping[str, Any] | None = field(
        default=None,
        metadata={
            "help": "Before the first and after every task, the perplexity of a held text and the answers to frozen "
            "prompts: true, or files of your own, {text: FILE, prompts: FILE}."
        },
    )
    lm_eval: Mapping[str, Any] | None = field(
        default=None,
        metadata={
            "help": "Tasks of lm-evaluation-harness on the live model: tasks, include_path, limit, num_fewshot, "
            "batch_size, when (before_after or every_task); needs the extra `eval`."
        },
    )

    def __post_init__(self) -> None:
        from .general_ability import check_general  # which measures in this module's `evaluating`
        from .lm_eval_probe import check_lm_eval

        self.general, self.lm_eval = check_general(self.general), check_lm_eval(self.lm_eval, self.batch_size)
        get_scorer(self.scorer, "evaluation.scorer")
        for option in ("batch_size", "max_new_tokens"):
            value = getattr(self, option)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"evaluation.{option}={value!r} must be a whole number above 0")
        for option, low, high in (("temperature", 0.0, 100.0), ("top_p", 0.0, 1.0)):
            value = getattr(self, option)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not low <= value <= high or (option == "top_p" and value == 0):
                least = "above 0" if option == "top_p" else "at least 0"
                raise InputError(f"evaluation.{option}={value!r} must be a number {least} and at most {high:g}")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or self.seed < 0:
            raise InputError(f"evaluation.seed={self.seed!r} must be a whole number, 0 or above")
        if self.top_p < 1 and not self.temperature:
            raise InputError(
                f"evaluation.top_p={self.top_p!r} has no effect on greedy answers; set evaluation.temperature above 0"
            )
        for option in ("unseen", "base_model"):
            if not isinstance(getattr(self, option), bool):
                raise InputError(f"evaluation.{option}={getattr(self, option)!r} must be true or false")


class AnswerLog(Protocol):
    """Where the answers of an evaluation are kept until all are there, for it to go on after a stop."""

    def begin(self, key: str) -> dict[int, Any]:
        """What was found by an evaluation of the same key that was stopped; what belongs to another is dropped."""

    def add(self, found: Mapping[int, Any]) -> None:
        """Keep what was found of some rows."""


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
    generation: GenerationConfig | None = None,
    log: AnswerLog | None = None,
    packing: Packing | None = None,
) -> Cell:
    """Score `model` on `task.eval_dataset` (columns `prompt`, `references`, and what the scorer needs; or `text`).

    With `ranks` every process must call it with the same whole model; they share the groups of batches and all get the
    cell. It is that of one process, since no batch is made differently. Rank 0 alone scores the predictions.

    Args:
        max_prompt_length: in tokens. A row with a column `prompt_ids` has its tokens already.
        autocast_dtype: compute in this dtype.
        generation: settings for the model's own `generate`, such as beams, in place of those of `config`.
        log: keeps the answers of finished groups, so that a stopped evaluation goes on with the rest.
        packing: how the texts of a task of kind `clm` or `mlm` become rows.

    Raises:
        InputError: if the task has no evaluation data, or no labels where the scorer needs them.
    """
    scorer = _scorer_of(task, config)
    rows = list(task.eval_dataset)
    seq2seq = is_seq2seq(model)
    settings = _settings(task, scorer, config, max_prompt_length, generation)
    jobs: _Labels | _Answers | TokenJobs
    encoded: list[tuple[int, ...]]
    if scorer.answers == "tokens":
        jobs = TokenJobs(model, tokenizer, task, config.batch_size, max_prompt_length, packing)
        rows, encoded, settings = jobs.rows, jobs.prompts, {**settings, **jobs.settings}
    else:
        encoded = [
            tuple(row.get("prompt_ids") or encode_prompt(row["prompt"], tokenizer, max_prompt_length, seq2seq))
            for row in rows
        ]
        if scorer.answers == "labels":
            jobs = _Labels(model, tokenizer, task, config, rows, encoded)
        else:
            jobs = _Answers(model, tokenizer, scorer, config, encoded, generation)
    order = sorted(range(len(jobs.prompts)), key=lambda k: (-len(jobs.prompts[k]), k))
    groups = work_groups(order, jobs.at_once)
    found: dict[int, Any] = {}
    if log is not None:
        told = [settings, str(autocast_dtype), task.name, encoded]
        found = _of_all_ranks(log.begin(hashlib.sha256(json.dumps(told).encode()).hexdigest()), ranks)
    left = [group for group in groups if not all(k in found for k in group)]
    device = next(model.parameters()).device
    processes = 1 if ranks is None else ranks.world_size
    bar = tqdm(
        total=len(order), initial=len(order) - sum(map(len, left)), desc=description or f"evaluating {task.name}",
        leave=False, unit="row", disable=ranks is not None and not ranks.is_main,
    )  # fmt: skip
    autocast = torch.autocast(device.type, autocast_dtype, enabled=autocast_dtype is not None)
    made: dict[int, Any] = {}
    with bar, evaluating(model), torch.no_grad(), autocast:
        for group in left if ranks is None else left[ranks.rank :: ranks.world_size]:
            answers = jobs.work(group, lambda rows: bar.update(rows * processes))
            made |= answers
            if log is not None:
                log.add(answers)
    found |= _of_all_ranks(made, ranks)
    predictions = [jobs.kept(i, row, found[k]) for i, (row, k) in enumerate(zip(rows, jobs.of_rows, strict=True))]

    def score() -> dict[str, Any]:
        cell = make_cell(scorer.name, predictions, settings, f"task '{task.name}'")
        return {"metric": cell.metric, "score": cell.score, "n": cell.n, "others": cell.others}

    scored = score() if ranks is None else ranks.on_main(score)  # programs are run once, not by every rank
    tokens = [found[k][0] for k in jobs.of_rows] if isinstance(jobs, _Answers) else None
    return Cell(**scored, settings=settings, predictions=predictions, tokens=tokens)


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


def _scorer_of(task: Task, config: EvaluationConfig) -> Scorer:
    """The scorer of a task, refused if evaluation cannot make what it scores."""
    scorer = get_scorer(task.scorer or config.scorer, f"task '{task.name}': scorer")
    if scorer.samples > 1 and not config.temperature:
        raise InputError(
            f"task '{task.name}': scorer '{scorer.name}' needs {scorer.samples} samples a row, and greedy ones are all "
            "the same; set evaluation.temperature, such as 0.8, or use pass_at_1"
        )
    return scorer


def _settings(
    task: Task, scorer: Scorer, config: EvaluationConfig, max_prompt_length: int, generation: GenerationConfig | None
) -> dict[str, Any]:
    """How predictions are made; kept beside them."""
    settings: dict[str, Any] = {
        "scorer": scorer.name,
        "max_prompt_length": max_prompt_length,
        "batch_size": config.batch_size,
    }
    if scorer.same is not None and task.labels:
        settings["labels"] = list(task.labels)
    if scorer.answers in ("labels", "tokens"):
        return settings
    if generation is not None:
        return {**settings, "generation": generation.to_diff_dict()}
    settings |= {"max_new_tokens": config.max_new_tokens, "do_sample": bool(config.temperature), "num_beams": 1}
    if config.temperature:
        drawn = {"temperature": config.temperature, "top_p": config.top_p, "seed": config.seed}
        settings |= {**drawn, "samples": scorer.samples}
    return settings


def _keep(index: int, row: Any, prediction: Any, scorer: Scorer) -> dict[str, Any]:
    """What is stored of a row: enough to score it again."""
    columns = (*scorer.columns, *scorer.optional)
    further = {column: row[column] for column in columns if row.get(column) is not None}
    given = any(row.get(column) is not None for column in ("references", "completion"))
    references = references_of(row, f"row {index}") if scorer.uses_references or given else []
    return {"index": index, "prediction": prediction, "references": references, **further}


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


class _Answers:
    """Answers to write: to each prompt once, or, drawn, for each row as many as its scorer needs."""

    def __init__(
        self, model: Any, tokenizer: Any, scorer: Scorer, config: EvaluationConfig, encoded: list[tuple[int, ...]],
        generation: GenerationConfig | None,
    ) -> None:  # fmt: skip
        self.tokenizer, self.scorer, self.length = tokenizer, scorer, config.max_new_tokens
        self.draw = Draw(config.temperature, config.top_p, config.seed) if config.temperature else None
        self.prompts = list(dict.fromkeys(encoded)) if self.draw is None else encoded
        place = {ids: k for k, ids in enumerate(self.prompts)}
        self.of_rows = [place[ids] for ids in encoded] if self.draw is None else list(range(len(encoded)))
        self.at_once = max(1, config.batch_size // scorer.samples)
        self.writer = Writer(model, tokenizer, batch_size=config.batch_size, max_new_tokens=config.max_new_tokens,
                             draw=self.draw, generation=generation)  # fmt: skip

    def work(self, group: Sequence[int], done: Callable[[float], Any]) -> dict[int, Any]:
        n = self.scorer.samples
        numbers = [None if self.draw is None else self.draw.numbers(k, j, self.length) for k in group for j in range(n)]
        prompts = [Prompt(self.prompts[k], drawn) for k, drawn in zip((k for k in group for _ in range(n)), numbers,
                                                                      strict=True)]  # fmt: skip
        answers = self.writer(prompts, lambda ended: done(ended / n))
        return {k: answers[at * n : (at + 1) * n] for at, k in enumerate(group)}

    def kept(self, index: int, row: Any, answers: list[list[int]]) -> dict[str, Any]:
        texts = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
        # Code begins with its indentation.
        texts = [text.rstrip() if self.scorer.answers == "code" else text.strip() for text in texts]
        return _keep(index, row, texts if self.scorer.samples > 1 else texts[0], self.scorer)


class _Labels:
    """argmax over labels of log p(label, end | prompt), of each prompt once."""

    def __init__(
        self, model: Any, tokenizer: Any, task: Task, config: EvaluationConfig, rows: list[Any],
        encoded: list[tuple[int, ...]],
    ) -> None:  # fmt: skip
        self.labels = list(task.labels or ())
        self.scorer = get_scorer("label_likelihood")
        if len(self.labels) < 2:
            raise InputError(
                f"task '{task.name}': scorer 'label_likelihood' needs its labels; add `labels: [a, b, ...]` to the task"
            )
        seq2seq = is_seq2seq(model)
        known: dict[Any, tuple[tuple[int, ...], ...]] = {}

        def tokens(prompt: Any) -> tuple[tuple[int, ...], ...]:
            end = prompt[-1:] if isinstance(prompt, str) else None  # what stands before a label decides on a space
            if end not in known:
                known[end] = tuple(
                    tuple(encode_completion(label, "" if end is None else end, tokenizer, 10_000, seq2seq))
                    for label in self.labels
                )
            return known[end]

        choices = [Choice(ids, tokens(row["prompt"])) for ids, row in zip(encoded, rows, strict=True)]
        self.choices = list(dict.fromkeys(choices))
        self.prompts = [choice.ids for choice in self.choices]
        place = {choice: k for k, choice in enumerate(self.choices)}
        self.of_rows = [place[choice] for choice in choices]
        self.at_once = config.batch_size
        self.chooser = Chooser(model, tokenizer, batch_size=config.batch_size)

    def work(self, group: Sequence[int], done: Callable[[float], Any]) -> dict[int, Any]:
        return dict(zip(group, self.chooser([self.choices[k] for k in group], done), strict=True))

    def kept(self, index: int, row: Any, scores: list[float]) -> dict[str, Any]:
        best = max(range(len(scores)), key=scores.__getitem__)
        kept = _keep(index, row, self.labels[best], self.scorer)
        return {**kept, "log_likelihood": [round(score, 6) for score in scores]}


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
