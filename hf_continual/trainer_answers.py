"""Generated answers in `evaluate()`: which rows are answered, how, and what a Trainer's `compute_metrics` gets."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import EvalPrediction, GenerationConfig, Seq2SeqTrainer

from .errors import InputError
from .evaluation import EvaluationConfig, check_task
from .models import first_line
from .scorers import get as get_scorer
from .scorers import references_of
from .tasks import Task
from .tokenization import encode_completion, tokenize_dataset

MAX_PROMPT_LENGTH = 512
MAX_NEW_TOKENS = 50
WHOLE = 10**6
"""References are not cut."""


class GeneratedAnswers(EvalPrediction):
    """What `compute_metrics` gets: tokens as from [`~transformers.Seq2SeqTrainer`], and the same as text.

    Attributes:
        predictions: (rows, longest answer) token ids, padded with the tokenizer's padding token.
        label_ids: (rows, longest reference) token ids of each row's first reference, padded with -100.
        answers: the text of each answer.
        references: the right answers of each row.
    """

    def __init__(
        self, predictions: np.ndarray, label_ids: np.ndarray, answers: list[str], references: list[list[str]]
    ) -> None:
        super().__init__(predictions, label_ids)
        self.answers, self.references = answers, references


@dataclass
class EvalRows:
    """The rows of one evaluation.

    Attributes:
        rows: what `evaluation.evaluate_task` takes, in order.
        loss_rows: the tokenised rows that the loss is computed of.
        label_ids: tokens of each row's first reference.
        made: whether `loss_rows` were tokenised here, and so are padded by this package's collator.
    """

    rows: list[dict[str, Any]]
    loss_rows: Any
    label_ids: list[list[int]]
    made: bool


def eval_rows(dataset: Any, tokenizer: Any, *, seq2seq: bool, max_prompt_length: int) -> EvalRows:
    """Prompts and references of an evaluation dataset.

    Tokenised rows, as the Trainer takes them: the prompt is what stands before the last stretch of labels that are not
    -100 (of an encoder-decoder model, `input_ids`), and the reference is that stretch, unless there is a column
    `references`. Rows of text have `prompt` and `references` or `completion`, as in the task queue; their loss is that
    of the completion, or else of the first reference, which is not cut.

    Raises:
        InputError: for rows that are neither, or whose labels do not leave out the prompt.
    """
    if not hasattr(dataset, "__len__") or not len(dataset):
        kind = "is empty" if hasattr(dataset, "__len__") else f"is a {type(dataset).__name__}, which has no length"
        raise InputError(f"eval_dataset {kind}; with predict_with_generate=True give a dataset with rows")
    given = [dataset[i] for i in range(len(dataset))]
    if not isinstance(given[0], Mapping) or not ({"input_ids", "labels"} <= given[0].keys() or "prompt" in given[0]):
        columns = ", ".join(given[0]) if isinstance(given[0], Mapping) else type(given[0]).__name__
        raise InputError(
            f"eval_dataset has {columns}; with predict_with_generate=True its rows need input_ids and labels, or "
            "prompt and references"
        )
    if "input_ids" in given[0] and "labels" in given[0]:
        rows = [_from_tokens(row, number, tokenizer, seq2seq) for number, row in enumerate(given)]
        return EvalRows(rows, dataset, [row.pop("label_ids") for row in rows], False)
    texts = []
    for number, row in enumerate(given):
        references = references_of(row, f"eval_dataset, row {number}")
        texts.append({**row, "references": references, "completion": row.get("completion") or references[0]})
    pairs = Dataset.from_list([{"prompt": row["prompt"], "completion": row["completion"]} for row in texts])
    loss_rows = tokenize_dataset(
        pairs, tokenizer, seq2seq=seq2seq, max_prompt_length=max_prompt_length, max_completion_length=WHOLE
    )
    label_ids = [encode_completion(row["references"][0], row["prompt"], tokenizer, WHOLE, seq2seq) for row in texts]
    return EvalRows(texts, loss_rows, label_ids, True)


def _from_tokens(row: Mapping[str, Any], number: int, tokenizer: Any, seq2seq: bool) -> dict[str, Any]:
    ids, labels = _numbers(row["input_ids"]), _numbers(row["labels"])
    mask = _numbers(row["attention_mask"]) if row.get("attention_mask") is not None else [1] * len(ids)
    answered = [place for place, label in enumerate(labels) if label != -100]
    if not answered:
        raise InputError(f"eval_dataset, row {number}: all its labels are -100, so it has no reference; drop the row")
    if seq2seq:
        start = len(ids)
        reference = [labels[place] for place in answered]
    else:
        start = answered[-1]
        while start > 0 and labels[start - 1] != -100:
            start -= 1
        reference = labels[start : answered[-1] + 1]
    prompt = [token for token, real in zip(ids[:start], mask[:start], strict=True) if real]
    if not prompt:
        raise InputError(
            f"eval_dataset, row {number}: its labels begin at its first token, so there is no prompt to answer; set "
            "those of the prompt to -100, or give rows with prompt and references"
        )
    text = row.get("prompt") or tokenizer.decode(prompt, skip_special_tokens=True)
    references = row.get("references")
    if references is None:
        references = [tokenizer.decode(reference, skip_special_tokens=True).strip()]
    further = {name: row[name] for name in row if name not in ("input_ids", "labels", "attention_mask")}
    found = {"prompt": text, "references": references_of({"references": references}, f"eval_dataset, row {number}")}
    return {**further, **found, "prompt_ids": prompt, "label_ids": reference}


def _numbers(values: Any) -> list[int]:
    return [int(value) for value in (values.tolist() if hasattr(values, "tolist") else values)]


@dataclass
class Answering:
    """How answers are generated.

    Attributes:
        config: for `evaluation.evaluate_task`.
        generation: settings of the model's own `generate`, if more was asked for than greedy answers.
    """

    config: EvaluationConfig
    generation: GenerationConfig | None


def answering(args: Any, given: Mapping[str, Any], *, seq2seq: bool) -> Answering:
    """From the training arguments and the keywords of `evaluate()`, which come first.

    Raises:
        InputError: for settings that `generate` does not know, or that draw answers.
    """
    options = {name: value for name, value in given.items() if value is not None}
    beams = options.pop("num_beams", None) or getattr(args, "generation_num_beams", None)
    length, new = options.pop("max_length", None), options.pop("max_new_tokens", None)
    base = _load(args.generation_config) if args.generation_config is not None else None
    if length is None and new is None:
        length = args.generation_max_length
        if length is None and base is not None:
            length, new = base.max_length, base.max_new_tokens
    if new is None:
        # As for Seq2SeqTrainer it counts the token that the decoder starts with; a prompt is never counted.
        new = MAX_NEW_TOKENS if length is None else length - 1 if seq2seq else length
    if not isinstance(new, int) or isinstance(new, bool) or new < 1:
        raise InputError(f"generation_max_length={length!r} leaves {new!r} tokens for an answer; give a larger number")
    config = EvaluationConfig(
        scorer=args.eval_scorer or "exact_match", batch_size=args.per_device_eval_batch_size, max_new_tokens=new
    )
    if base is None and not options and beams in (None, 1):
        return Answering(config, None)
    generation = copy.deepcopy(base) if base is not None else GenerationConfig()
    unknown = generation.update(**options)
    if unknown:
        raise InputError(f"evaluate() got {sorted(unknown)}, which is no setting of generate; leave it out")
    generation.max_length, generation.max_new_tokens = None, new
    if beams is not None:
        generation.num_beams = beams
    if generation.do_sample:
        raise InputError(
            "generation_config.do_sample=True would give other scores at every evaluation; set do_sample=False"
        )
    return Answering(config, generation)


def _load(given: Any) -> GenerationConfig:
    try:
        return Seq2SeqTrainer.load_generation_config(given)
    except (OSError, ValueError) as error:
        raise InputError(
            f"generation_config={given!r} cannot be used ({first_line(error)}); give a GenerationConfig, or a folder "
            "with generation_config.json"
        ) from error


def task_of(name: str, rows: Sequence[Mapping[str, Any]], config: EvaluationConfig, labels: Any) -> Task:
    """The rows as a task to score; label likelihood takes the references for the labels where there are none.

    Raises:
        InputError: if they lack what the scorer needs.
    """
    if get_scorer(config.scorer).answers == "labels" and not labels:
        labels = sorted({reference for row in rows for reference in row["references"]})
    task = Task(name, eval_dataset=list(rows), labels=labels, scorer=config.scorer)
    check_task(task, config)
    return task


def padded(sequences: Sequence[Sequence[int]], fill: int) -> np.ndarray:
    """(rows, longest) token ids, filled up on the right."""
    found = np.full((len(sequences), max(map(len, sequences))), fill, dtype=np.int64)
    for row, sequence in enumerate(sequences):
        found[row, : len(sequence)] = sequence
    return found
