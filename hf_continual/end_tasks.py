"""End tasks: a copy of the model after each task of pre-training is fine-tuned on a task of its own, and scored."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    PrinterCallback,
    set_seed,
)

from .cells import Cell, make_cell
from .collators import make_collator
from .data_sources import Table
from .distributed import Processes, release_engine
from .errors import InputError
from .evaluation import EvaluationConfig, _of_all_ranks, check_task, evaluate_task, evaluating
from .models import apply_lora, fix_loss_scaling, in_four_bits, is_masked, is_seq2seq, positions_of
from .pretraining import iterate, pick_columns
from .scorers import get as get_scorer
from .scorers import normalize_answer
from .tasks import EndTask, Task
from .tokenization import tokenize_dataset
from .trainer import ContinualTrainer
from .training_args import make_training_args

FROM_THE_QUEUE = ("use_cpu", "bf16", "fp16", "tf32", "disable_tqdm", "dataloader_pin_memory", "full_determinism")
"""Training arguments of the queue that end tasks take over: where and how precisely to compute."""
TAKEN = ("output_dir", "methods", "seed", "deepspeed", "fsdp", "fsdp_config", "save_strategy", "eval_strategy",
         "load_best_model_at_end", "resume_from_checkpoint", "report_to")  # fmt: skip
SPLITTING = {"deepspeed": "ACCELERATE_USE_DEEPSPEED", "fsdp": "ACCELERATE_USE_FSDP"}
"""Training arguments that split a model's weights, and what accelerate sets in the environment for them."""


# -- rows --------------------------------------------------------------------------------------------------------------


def label_rows(table: Table, columns: Mapping[str, str], labels: Sequence[str] | None, where: str) -> Dataset:
    """The canonical rows of a classification: `text`, perhaps `text_pair`, `label` (its name), and `references`.

    A label may also be given by its number, counted from 0.

    Raises:
        InputError: without labels or a column, or for a row whose label is not among them.
    """
    if not labels:
        raise InputError(f"{where}: a classification needs its labels; add `labels: [a, b, ...]` to it")
    chosen = pick_columns(table, columns, ("text", "label"), ("text_pair",))
    result: dict[str, list[Any]] = {role: [] for role in (*chosen, "references")}
    for index, row in iterate(table, chosen):
        place = f"in row {index} of {table.source}"
        for role in ("text", "text_pair"):
            if role in chosen:
                text = row.get(chosen[role])
                if not isinstance(text, str) or not text.strip():
                    raise InputError(f"column '{chosen[role]}' {place} is {text!r:.60}; give text or leave the row out")
                result[role].append(text)
        label = row.get(chosen["label"])
        if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(labels):
            label = labels[label]
        if label not in labels:
            raise InputError(
                f"column '{chosen['label']}' {place} is {label!r}, which is none of the labels "
                f"{', '.join(map(repr, labels))}; correct the row or the labels"
            )
        result["label"].append(label)
        result["references"].append([label])
    return Dataset.from_dict(result)


# -- what cannot work --------------------------------------------------------------------------------------------------


def check_end_task(
    end: EndTask, owner: str, evaluation: EvaluationConfig, queue_args: Mapping[str, Any], model: Any = None
) -> None:
    """Refuse, before anything is trained, an end task that cannot be.

    Args:
        owner: the task it belongs to.
        queue_args: training arguments of the queue.
        model: without weights; None to leave out what depends on it.

    Raises:
        InputError: naming the task and what to change.
    """
    where = f"task '{owner}': end_task"
    for name, rows in (("train_dataset", end.train_dataset), ("eval_dataset", end.eval_dataset)):
        if rows is None or len(rows) == 0:
            raise InputError(f"{where} has no {name}; give it rows to {'learn' if name[0] == 't' else 'score'}")
    for taken in TAKEN:
        if taken in end.training:
            raise InputError(f"{where}: training.{taken} is set by the queue; remove it")
    for option, variable in SPLITTING.items():
        if queue_args.get(option) or os.environ.get(variable, "").lower() in ("1", "true"):
            raise InputError(
                f"{where} is fine-tuned from a whole model, and this run splits it by {option}; use one process or DDP"
            )
    try:
        make_training_args(_arguments(end, queue_args, "unused", 0), seq2seq=False)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    scorer = get_scorer(end.scorer or evaluation.scorer, f"{where}: scorer")
    if end.kind == "classification":
        labels = list(end.labels or ())
        if len(labels) < 2:
            raise InputError(f"{where}: a classification needs its labels; add `labels: [a, b, ...]` to it")
        if scorer.same is None:
            raise InputError(
                f"{where}: scorer '{scorer.name}' cannot score labels; use macro_f1, micro_f1 or exact_match"
            )
        plain = [normalize_answer(label) for label in labels]
        for label, form in zip(labels, plain, strict=True):
            if not form or plain.count(form) > 1:
                raise InputError(
                    f"{where}: the label {label!r} reads like {'nothing' if not form else 'another'} without case and "
                    "punctuation, as scorers compare labels; rename it"
                )
    else:
        check_task(_scored(end, evaluation), evaluation)
    if model is not None:
        _check_model(end, where, model)


def _check_model(end: EndTask, where: str, model: Any) -> None:
    if in_four_bits(model):
        raise InputError(f"{where} fine-tunes whole models, and model.load_in_4bit=true packs this one; leave it out")
    base = _base(model)
    if end.kind == "completion" and (is_masked(base) or is_seq2seq(base)):
        raise InputError(
            f"{where}: kind 'completion' needs a model that writes text, and this is a {type(base).__name__}; use "
            "kind: classification"
        )
    if end.kind == "classification" and type(base.config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise InputError(
            f"{where}: transformers has no classifier for models of type '{base.config.model_type}'; use kind: "
            "completion"
        )


# -- fine-tuning and scoring -------------------------------------------------------------------------------------------


def score_end_task(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    end: EndTask,
    evaluation: EvaluationConfig,
    queue_args: Mapping[str, Any],
    *,
    max_prompt_length: int,
    max_completion_length: int,
    perplexity: Cell | None = None,
    description: str = "",
    autocast_dtype: torch.dtype | None = None,
    ranks: Processes | None = None,
) -> Cell:
    """The cell of an end task: fine-tuned with each of its seeds, and the mean of their scores.

    Args:
        model: as it is after a task; it is used up. Adapters are merged into it.
        queue_args: training arguments of the queue.
        perplexity: the cell of the task it belongs to, whose numbers go to `others`.
        ranks: all processes call it; they fine-tune together, as the Trainer does (DDP), and share the rows to score.
    """
    base = model.merge_and_unload() if isinstance(model, PeftModel) else model
    fine_tune = _classify if end.kind == "classification" else _complete
    predictions = []
    for seed in end.seeds:
        with tempfile.TemporaryDirectory() as folder:
            args = make_training_args(_arguments(end, queue_args, folder, seed), seq2seq=False)
            found = fine_tune(
                base, tokenizer, end, evaluation, args, max_prompt_length=max_prompt_length,
                max_completion_length=max_completion_length, description=f"{description}, seed {seed}",
                autocast_dtype=autocast_dtype, ranks=ranks,
            )  # fmt: skip
        predictions += [{"seed": seed, **row} for row in found]
    scorer = end.scorer or evaluation.scorer
    settings = {"scorer": scorer, "end_task": end.kind, "seeds": list(end.seeds), "training": dict(end.training),
                "max_prompt_length": max_prompt_length}  # fmt: skip
    if end.labels:
        settings["labels"] = list(end.labels)
    cell = make_cell(scorer, predictions, settings, f"end task '{end.name}'")
    if perplexity is not None:
        cell.others |= {perplexity.metric: perplexity.score}
        cell.others |= {f"{perplexity.metric} {name}": value for name, value in perplexity.others.items()}
    return cell


def _classify(
    base: Any, tokenizer: Any, end: EndTask, evaluation: EvaluationConfig, args: Any, *, max_prompt_length: int,
    description: str, autocast_dtype: Any, ranks: Processes | None, **_: Any,
) -> list[dict[str, Any]]:  # fmt: skip
    labels = list(end.labels or ())
    model: Any = classifier(base, labels, tokenizer, args.seed)
    if end.peft is not None:
        model = apply_lora(model, {"task_type": "SEQ_CLS", **end.peft})
    length = min(max_prompt_length, positions_of(model) or max_prompt_length)
    right = copy.copy(tokenizer)
    right.padding_side = "right"
    collator = DataCollatorWithPadding(right)
    train, scored = (_encoded(rows, right, labels, length) for rows in (end.train_dataset, end.eval_dataset))
    model = _trained(model, train, collator, args, tokenizer)
    order = sorted(range(len(scored)), key=lambda i: (-len(scored[i]["input_ids"]), i))
    batches = [order[at : at + evaluation.batch_size] for at in range(0, len(order), evaluation.batch_size)]
    device = next(model.parameters()).device
    found: dict[int, int] = {}
    autocast = torch.autocast(device.type, autocast_dtype, enabled=autocast_dtype is not None)
    with evaluating(model), torch.no_grad(), autocast:
        for batch in batches if ranks is None else batches[ranks.rank :: ranks.world_size]:
            made: Any = collator([{k: v for k, v in scored[i].items() if k != "labels"} for i in batch])
            inputs = made.to(device)
            chosen = model(**inputs).logits.float().argmax(-1).tolist()
            found |= dict(zip(batch, chosen, strict=True))
    found = _of_all_ranks(found, ranks)
    return [
        {"index": i, "prediction": labels[found[i]], "references": list(row["references"])}
        for i, row in enumerate(end.eval_dataset)
    ]


def _complete(
    base: Any, tokenizer: Any, end: EndTask, evaluation: EvaluationConfig, args: Any, *, max_prompt_length: int,
    max_completion_length: int, description: str, autocast_dtype: Any, ranks: Processes | None,
) -> list[dict[str, Any]]:  # fmt: skip
    model: Any = copy.deepcopy(base)
    if end.peft is not None:
        set_seed(args.seed)
        model = apply_lora(model, end.peft)
    rows = tokenize_dataset(
        end.train_dataset, tokenizer, seq2seq=False, max_prompt_length=max_prompt_length,
        max_completion_length=max_completion_length,
    )  # fmt: skip
    model = _trained(model, rows, make_collator(tokenizer, model), args, tokenizer)
    cell = evaluate_task(
        model, tokenizer, _scored(end, evaluation), evaluation, max_prompt_length=max_prompt_length,
        description=description, autocast_dtype=autocast_dtype, ranks=ranks,
    )  # fmt: skip
    return cell.predictions


def classifier(base: Any, labels: Sequence[str], tokenizer: PreTrainedTokenizerBase, seed: int) -> Any:
    """A classifier with the encoder of a language model. Its head, and a pooler which that lacks, are drawn anew.

    Raises:
        InputError: if the encoder does not fit.
    """
    config = copy.deepcopy(base.config)
    config.num_labels = len(labels)
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: number for number, label in enumerate(labels)}
    config.problem_type = "single_label_classification"
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    set_seed(seed)
    made: Any = AutoModelForSequenceClassification.from_config(config)
    source, target = (getattr(model, model.base_model_prefix) for model in (base, made))
    made.to(next(source.parameters()).dtype)
    missing, unexpected = target.load_state_dict(source.state_dict(), strict=False)
    wrong = [*unexpected, *(name for name in missing if not name.startswith("pooler."))]
    if wrong:
        raise InputError(
            f"{type(made).__name__} cannot take the encoder of {type(base).__name__}: '{wrong[0]}' is in only one of "
            "the two; use an end task of kind completion"
        )
    return fix_loss_scaling(made)


def _encoded(rows: Any, tokenizer: Any, labels: list[str], length: int) -> Dataset:
    pairs = [rows["text_pair"][:]] if "text_pair" in rows.column_names else []
    encoded = tokenizer(rows["text"][:], *pairs, truncation=True, max_length=length)
    return Dataset.from_dict({**encoded, "labels": [labels.index(label) for label in rows["label"]]})


def _trained(model: nn.Module, rows: Any, collator: Callable[[list[Any]], Any], args: Any, tokenizer: Any) -> Any:
    trainer = ContinualTrainer(
        model=model, args=args, train_dataset=rows, data_collator=collator, processing_class=tokenizer
    )
    trainer.remove_callback(PrinterCallback)  # its lines would stand among those of the stream's tasks
    trainer.train()
    trained = trainer.accelerator.unwrap_model(trainer.model)
    trained.zero_grad(set_to_none=True)
    release_engine(trainer)
    trainer.accelerator.free_memory()
    return trained


def _arguments(end: EndTask, queue_args: Mapping[str, Any], folder: str, seed: int) -> dict[str, Any]:
    taken = {name: queue_args[name] for name in FROM_THE_QUEUE if queue_args.get(name) is not None}
    fixed = {"output_dir": folder, "seed": seed, "save_strategy": "no", "report_to": "none"}
    return {"logging_strategy": "no", **taken, **end.training, **fixed}


def _scored(end: EndTask, evaluation: EvaluationConfig) -> Task:
    """What is evaluated of an end task that writes its answers."""
    return Task(end.name, eval_dataset=end.eval_dataset, labels=end.labels, scorer=end.scorer or evaluation.scorer)


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model
