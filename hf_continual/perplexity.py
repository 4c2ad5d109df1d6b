"""Log-likelihoods of given tokens: of texts, of masked tokens, and of the right answers to prompts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .data import as_rows
from .errors import InputError
from .models import is_seq2seq, positions_of
from .pretraining import IN_EVALUATION, MaskingCollator
from .scorers import references_of
from .tasks import Task
from .tokenization import Packing, default_block_size, encode_completion, encode_prompt, tokenize_texts

IGNORED = -100
LOGITS_AT_ONCE = 2**24
"""So many logits are brought to float32 together."""


class TokenJobs:
    """The texts to find log-likelihoods of, each row with a sum over its tokens and their number.

    Texts of the kinds `clm` and `mlm` are cut into rows as in training. A masked row has the same mask in every
    evaluation, drawn with the seed of [`MaskingCollator`]; a row of which no token is masked is left out. Of a row
    with a prompt it is the first reference, with the end token, given the prompt.

    Args:
        packing: how texts become rows; by default as run_clm.py does it.

    Raises:
        InputError: if there is no row, or one that cannot be encoded.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        task: Task,
        batch_size: int,
        max_prompt_length: int,
        packing: Packing | None = None,
    ) -> None:
        self.model, self.at_once, self.pad = model, batch_size, tokenizer.pad_token_id
        self.seq2seq = is_seq2seq(model)
        self.known = inspect.signature(_base(model).forward).parameters
        self.inputs: list[list[int]] = []
        self.targets: list[list[int]] = []
        self.rows: list[dict[str, Any]] = []
        self.settings: dict[str, Any] = {}
        self.shift = not self.seq2seq and task.kind != "mlm"
        """Whether a token is predicted by the logits before it."""
        if task.is_text:
            if packing is None:
                size = default_block_size(tokenizer, positions_of(model))
                packing = Packing(size, masked=task.kind == "mlm")
            self._add_texts(task, tokenizer, packing)
        else:
            self._add_answers(task, tokenizer, max_prompt_length)
        self.prompts = [tuple(ids) + tuple(wanted) for ids, wanted in zip(self.inputs, self.targets, strict=True)]
        self.of_rows = list(range(len(self.rows)))

    def _add_texts(self, task: Task, tokenizer: PreTrainedTokenizerBase, packing: Packing) -> None:
        self.settings = {"kind": task.kind, "block_size": packing.block_size, "pack": packing.pack,
                         "drop_last_block": packing.drop_last}  # fmt: skip
        masking = None
        if packing.masked:
            masking = MaskingCollator(tokenizer, packing.probability)
            masking.epoch = IN_EVALUATION
            self.settings |= {"mlm_probability": packing.probability, "mask_seed": masking.seed}
        rows = task.eval_dataset
        if not isinstance(rows, Dataset):
            rows = as_rows(rows, f"eval_dataset of task '{task.name}'", task.kind)
        for domain, texts in _by_domain(rows):
            where = f"task '{task.name}', evaluation texts" + (f" of the domain '{domain}'" if domain else "")
            for ids in tokenize_texts(texts, tokenizer, packing, where).rows["input_ids"]:
                inputs, targets = ids, [IGNORED, *ids[1:]]
                if masking is not None:
                    inputs, targets = (part.tolist() for part in masking.mask(ids))
                if any(target != IGNORED for target in targets):
                    self.inputs.append(inputs)
                    self.targets.append(targets)
                    self.rows.append({"domain": domain} if domain else {})
        if not self.rows:
            raise InputError(
                f"task '{task.name}': of its few evaluation tokens none is masked or predicted; give it more text"
            )

    def _add_answers(self, task: Task, tokenizer: PreTrainedTokenizerBase, max_prompt_length: int) -> None:
        for number, row in enumerate(task.eval_dataset):
            prompt = encode_prompt(row["prompt"], tokenizer, max_prompt_length, self.seq2seq)
            answer = references_of(row, f"task '{task.name}', row {number}")[0]
            ids = encode_completion(answer, row["prompt"], tokenizer, 10_000, self.seq2seq)
            self.inputs.append(prompt if self.seq2seq else prompt + ids)
            self.targets.append(ids if self.seq2seq else [IGNORED] * len(prompt) + ids)
            self.rows.append(dict(row))

    def work(self, group: Sequence[int], done: Callable[[float], Any]) -> dict[int, list[float]]:
        """[sum of the log-likelihoods, number of tokens] of these rows."""
        found: dict[int, list[float]] = {}
        for start in range(0, len(group), self.at_once):
            rows = group[start : start + self.at_once]
            found |= dict(zip(rows, self._batch(rows), strict=True))
            done(len(rows))
        return found

    def kept(self, index: int, row: Any, answer: list[float]) -> dict[str, Any]:
        further = {key: row[key] for key in ("domain",) if row.get(key) is not None}
        return {"index": index, "text_log_likelihood": answer[0], "tokens": int(answer[1]), **further}

    def _batch(self, rows: Sequence[int]) -> list[list[float]]:
        device = next(self.model.parameters()).device
        ids, mask = _right_pad([self.inputs[i] for i in rows], self.pad, device)
        targets, known = _right_pad([self.targets[i] for i in rows], IGNORED, device)
        given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        if "use_cache" in self.known:
            given["use_cache"] = False
        if self.seq2seq:
            begin = torch.full_like(targets[:, :1], self.model.config.decoder_start_token_id)
            written = targets[:, :-1].masked_fill(known[:, :-1] == 0, self.pad)
            given["decoder_input_ids"] = torch.cat([begin, written], 1)
        if self.shift:
            targets = targets[:, 1:]
            first = min(next(t for t, target in enumerate(self.targets[i]) if target != IGNORED) for i in rows) - 1
            if first > 0 and "logits_to_keep" in self.known:  # not those of the prompts
                given["logits_to_keep"] = torch.arange(first, ids.shape[1] - 1, device=device)
                targets = targets[:, first:]
        logits = self.model(**given).logits[:, : targets.shape[1]]
        return _sums(logits, targets)


def check_texts(task: Task, model: Any, tokenizer: PreTrainedTokenizerBase, packing: Packing) -> None:
    """Refuse, before anything is trained, texts that give no row to learn or to score.

    Args:
        model: may be without weights.

    Raises:
        InputError: naming the task.
    """
    for name in ("train_dataset", "eval_dataset"):
        columns = getattr(getattr(task, name), "column_names", ())
        if "text" not in columns and not (name == "train_dataset" and "input_ids" in columns):
            raise InputError(
                f"{name} of task '{task.name}' has no column 'text', which kind: {task.kind} reads; add it"
            )

    def scored(texts: Dataset) -> None:
        TokenJobs(model, tokenizer, replace(task, eval_dataset=texts), 1, 0, packing)

    def learnt(texts: Dataset) -> None:
        tokenize_texts(texts, tokenizer, packing, f"task '{task.name}'")

    if "text" in task.train_dataset.column_names:
        _check_as_few_as_do(task.train_dataset, learnt)
    if "domain" in task.eval_dataset.column_names:
        scored(task.eval_dataset)  # every domain must have a row
    else:
        _check_as_few_as_do(task.eval_dataset, scored)


def _check_as_few_as_do(texts: Dataset, check: Callable[[Dataset], None]) -> None:
    """Not all of a corpus is read where its first texts make a row."""
    count = 1
    while count < len(texts):
        try:
            return check(texts.select(range(count)))
        except InputError:
            count *= 4
    check(texts)


def _sums(logits: Tensor, targets: Tensor) -> list[list[float]]:
    """[sum of log p(target), number of targets] of each row; sums in float64, so that no order of rows matters."""
    places = (targets != IGNORED).nonzero()
    parts = []
    for some in places.split(max(1, LOGITS_AT_ONCE // logits.shape[-1])):
        of_tokens = logits[some[:, 0], some[:, 1]].float()
        wanted = targets[some[:, 0], some[:, 1]]
        lost = of_tokens.logsumexp(-1) - of_tokens.gather(-1, wanted[:, None])[:, 0]
        parts.append(lost.clamp_min(0).cpu())  # rounding may bring a certain token above 1
    losses = torch.cat(parts).double()
    counts = torch.bincount(places[:, 0].cpu(), minlength=len(targets)).tolist()
    return [[-float(part.sum()), float(len(part))] for part in losses.split(counts)]


def _by_domain(texts: Dataset) -> list[tuple[str, Dataset]]:
    """Texts of one domain share rows; those of two do not."""
    if "domain" not in texts.column_names:
        return [("", texts)]
    places: dict[str, list[int]] = {}
    for index, domain in enumerate(texts["domain"]):
        places.setdefault(domain, []).append(index)
    return [(domain, texts.select(indices)) for domain, indices in places.items()]


def _right_pad(rows: Sequence[Sequence[int]], fill: int, device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    padded = [[*row, *[fill] * (width - len(row))] for row in rows]
    mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
    return torch.tensor(padded, device=device), torch.tensor(mask, device=device)


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model
