"""The loops behind evaluation: answers to prompts, and likelihoods of labels, in groups that any process may work on.

Answers differ in length: most end after a few tokens, and one long one would hold its whole batch. So rows that have
ended leave the batch, and once half of it is free the next prompts of the group come in. Padding changes the last
digits of a score, so what is batched together depends on the rows and `batch_size` alone: never on the number of
processes, nor on where an evaluation was stopped.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import (
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
)
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import BaseModelOutput

from .errors import InputError
from .models import is_seq2seq

GROUPS, BATCHES = 4, 16
"""At least so many groups, for the processes to share evenly; at most so many batches in one, the most a kill loses."""
FULL = 0.75
"""Ended rows stay until no more than this part of a batch still writes: taking them out copies the cache."""


def work_groups(order: Sequence[int], size: int) -> list[list[int]]:
    """Rows in the order they are worked on, by group; each has rows of all lengths, and so about the same work."""
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    count = min(len(batches), max(GROUPS, math.ceil(len(batches) / BATCHES)))
    return [[i for batch in batches[first::count] for i in batch] for first in range(count)]


def left_pad(
    sequences: Sequence[Sequence[int]], pad_id: int, device: torch.device, left: bool
) -> tuple[Tensor, Tensor]:
    """Token ids and mask, padded on the left for generation, else on the right."""
    width = max(len(s) for s in sequences)
    ids, mask = [], []
    for sequence in sequences:
        fill = width - len(sequence)
        padding, real = [pad_id] * fill, list(sequence)
        ids.append(padding + real if left else real + padding)
        mask.append([0] * fill + [1] * len(real) if left else [1] * len(real) + [0] * fill)
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


@dataclass(frozen=True)
class Draw:
    """Drawn answers: each has random numbers of its own, so that they do not depend on who else is in the batch."""

    temperature: float
    top_p: float = 1.0
    seed: int = 0

    def numbers(self, row: int, sample: int, length: int) -> Tensor:
        """[length] one number in [0, 1) for each token of an answer."""
        digest = hashlib.sha256(f"{self.seed} {row} {sample}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return torch.rand(length, dtype=torch.float64, generator=generator)

    def choose(self, logits: Tensor, numbers: Tensor) -> Tensor:
        """The token at which the cumulated probability passes each row's number."""
        probabilities, tokens = (
            (logits.double() / self.temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
        )
        before = probabilities.cumsum(-1) - probabilities
        kept = probabilities.where(before < self.top_p, 0.0)
        cumulated = kept.cumsum(-1)
        at = torch.searchsorted(cumulated, numbers.to(logits.device)[:, None] * cumulated[:, -1:], right=True)
        return tokens.gather(-1, at.clamp_max(logits.shape[-1] - 1)).squeeze(-1)


@dataclass(frozen=True)
class Prompt:
    """A prompt to be continued, and the numbers its answer is drawn with, if it is drawn."""

    ids: tuple[int, ...]
    numbers: Tensor | None = None


class _Drawn(LogitsProcessor):
    """Leaves `generate` one token to choose from: the one that is drawn."""

    def __init__(self, draw: Draw, numbers: Tensor, start: int) -> None:
        self.draw, self.numbers, self.start = draw, numbers, start

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        chosen = self.draw.choose(scores, self.numbers[:, input_ids.shape[1] - self.start])
        return torch.full_like(scores, -torch.inf).scatter(-1, chosen[:, None], 0.0)


@dataclass
class _Batch:
    """Rows that are being answered, the cache of what each has seen, and their last tokens."""

    rows: list[int]
    cache: Any
    mask: Tensor
    last: Tensor
    encoded: Tensor | None = None

    def keep(self, places: Sequence[int]) -> None:
        """Let go of all other rows, and of columns that are padding in all that stay."""
        index = torch.tensor(places, device=self.mask.device)
        self.rows = [self.rows[place] for place in places]
        self.cache.batch_select_indices(index)
        self.mask, self.last = self.mask[index], self.last[index]
        if self.encoded is not None:
            self.encoded = self.encoded[index]
        else:
            used = self.mask.any(0).int()
            first = int(used.argmax())
            if first:
                self.mask = self.mask[:, first:]
                for layer in self.cache.layers:
                    layer.keys, layer.values = layer.keys[..., first:, :], layer.values[..., first:, :]

    def join(self, other: _Batch) -> None:
        """Take in the rows of another batch; the shorter of the two is padded on the left."""
        width = max(self.mask.shape[1], other.mask.shape[1])
        for batch in (self, other):
            fill = width - batch.mask.shape[1]
            if fill:
                batch.mask = pad(batch.mask, (fill, 0))
                for layer in batch.cache.layers:
                    layer.keys, layer.values = (pad(t, (0, 0, fill, 0)) for t in (layer.keys, layer.values))
        for mine, theirs in zip(self.cache.layers, other.cache.layers, strict=True):
            mine.keys = torch.cat([mine.keys, theirs.keys])
            mine.values = torch.cat([mine.values, theirs.values])
        self.rows = self.rows + other.rows
        self.mask, self.last = torch.cat([self.mask, other.mask]), torch.cat([self.last, other.last])


class Writer:
    """Continues prompts.

    Args:
        batch_size: so many at a time.
        max_new_tokens: the longest answer.
        draw: draw the answers; greedy without.
        generation: settings for the model's own `generate`, which then answers batch by batch.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        batch_size: int,
        max_new_tokens: int,
        draw: Draw | None = None,
        generation: GenerationConfig | None = None,
    ) -> None:
        self.model, self.batch_size, self.max_new_tokens, self.draw = model, batch_size, max_new_tokens, draw
        self.seq2seq = is_seq2seq(model)
        self.device = next(model.parameters()).device
        self.pad = tokenizer.pad_token_id
        own = model.generation_config.eos_token_id
        self.ends = sorted({*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id} - {None})
        self.start: Any = model.generation_config.decoder_start_token_id if self.seq2seq else None
        if self.seq2seq and self.start is None:
            self.start = model.config.decoder_start_token_id
        self.own_loop = generation is None and has_plain_cache(model)
        self.generation = copy.deepcopy(generation) if generation is not None else GenerationConfig(
            max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, use_cache=True
        )  # fmt: skip
        asked = self.generation.eos_token_id
        self.ends = sorted({*self.ends, *(asked if isinstance(asked, list) else [asked])} - {None})
        self.generation.pad_token_id, self.generation.eos_token_id = self.pad, self.ends
        self.generation.decoder_start_token_id = self.start
        self._few_logits = {"logits_to_keep": 1} if _takes(model, "logits_to_keep") else {}

    def __call__(self, prompts: Sequence[Prompt], done: Callable[[int], Any]) -> list[list[int]]:
        """The tokens of each answer, its end token included; `done` is told how many rows have ended."""
        if self.own_loop:
            return self._write(prompts, done)
        answers: list[list[int]] = []
        for start in range(0, len(prompts), self.batch_size):
            batch = prompts[start : start + self.batch_size]
            answers += self._generate(batch)
            done(len(batch))
        return answers

    def _generate(self, batch: Sequence[Prompt]) -> list[list[int]]:
        ids, mask = left_pad([prompt.ids for prompt in batch], self.pad, self.device, left=not self.seq2seq)
        start = 1 if self.seq2seq else ids.shape[1]
        drawn = LogitsProcessorList()
        if self.draw is not None:
            drawn.append(_Drawn(self.draw, torch.stack([_numbers(prompt) for prompt in batch]), start))
        with using(self.model, self.generation):
            output = self.model.generate(
                input_ids=ids, attention_mask=mask, generation_config=self.generation, logits_processor=drawn
            )
        return [self._to_its_end(answer) for answer in output[:, start:].tolist()]

    def _to_its_end(self, tokens: list[int]) -> list[int]:
        ends = [place for place, token in enumerate(tokens) if token in self.ends]
        return tokens[: ends[0] + 1] if ends else tokens

    def _write(self, prompts: Sequence[Prompt], done: Callable[[int], Any]) -> list[list[int]]:
        answers: list[list[int]] = [[] for _ in prompts]
        at = 0
        live: _Batch | None = None
        while live is not None or at < len(prompts):
            room = self.batch_size - (len(live.rows) if live is not None else 0)
            refill = live is None or (not self.seq2seq and 2 * room >= self.batch_size)
            if refill and at < len(prompts):
                rows = list(range(at, min(at + room, len(prompts))))
                at = rows[-1] + 1
                new, logits = self._read(rows, prompts)
                new_or_none = self._advance(new, logits, prompts, answers, done, always=True)
                if live is None:
                    live = new_or_none
                elif new_or_none is not None:
                    live.join(new_or_none)
            if live is not None:
                live = self._advance(live, self._step(live), prompts, answers, done, always=at < len(prompts))
        return answers

    def _read(self, rows: list[int], prompts: Sequence[Prompt]) -> tuple[_Batch, Tensor]:
        """A batch of prompts, each read once however many answers it gets, and the logits of their first tokens."""
        unique = list(dict.fromkeys(prompts[row].ids for row in rows))
        ids, mask = left_pad(unique, self.pad, self.device, left=not self.seq2seq)
        encoded = None
        if self.seq2seq:
            encoded = self.model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
            start = torch.full((len(unique), 1), self.start, device=self.device)
            output = self.model(
                encoder_outputs=BaseModelOutput(last_hidden_state=encoded), attention_mask=mask,
                decoder_input_ids=start, use_cache=True,
            )  # fmt: skip
        else:
            positions = (mask.cumsum(-1) - 1).clamp_min(0)
            output = self.model(
                input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, **self._few_logits
            )
        batch = _Batch(list(range(len(unique))), output.past_key_values, mask, ids[:, -1], encoded)
        logits = output.logits[:, -1]
        if len(unique) < len(rows):
            place = {ids: k for k, ids in enumerate(unique)}
            places = [place[prompts[row].ids] for row in rows]
            batch.keep(places)
            logits = logits[torch.tensor(places, device=self.device)]
        batch.rows = rows
        return batch, logits

    def _step(self, live: _Batch) -> Tensor:
        """Feed each row's last token; the logits of its next."""
        if live.encoded is not None:
            output = self.model(
                encoder_outputs=BaseModelOutput(last_hidden_state=live.encoded), attention_mask=live.mask,
                decoder_input_ids=live.last[:, None], past_key_values=live.cache, use_cache=True,
            )  # fmt: skip
        else:
            live.mask = torch.cat([live.mask, live.mask.new_ones(len(live.rows), 1)], 1)
            output = self.model(
                input_ids=live.last[:, None], attention_mask=live.mask,
                position_ids=live.mask.sum(-1, keepdim=True) - 1, past_key_values=live.cache, use_cache=True,
            )  # fmt: skip
        return output.logits[:, -1]

    def _advance(
        self, live: _Batch, logits: Tensor, prompts: Sequence[Prompt], answers: list[list[int]],
        done: Callable[[int], Any], always: bool,
    ) -> _Batch | None:  # fmt: skip
        """Add a token to each answer; without the rows that have ended once they are many; None if all have."""
        if self.draw is None:
            live.last = logits.argmax(-1)
        else:
            places = [min(len(answers[row]), self.max_new_tokens - 1) for row in live.rows]
            numbers = [_numbers(prompts[row])[place] for row, place in zip(live.rows, places, strict=True)]
            live.last = self.draw.choose(logits, torch.stack(numbers))
        going, ended = [], 0
        for place, (row, token) in enumerate(zip(live.rows, live.last.tolist(), strict=True)):
            answer = answers[row]
            if self._has_ended(answer):
                continue
            answer.append(token)
            if self._has_ended(answer):
                ended += 1
            else:
                going.append(place)
        if ended:
            done(ended)
        if not going:
            return None
        held = len(live.rows)
        leaves_room = always and 2 * (self.batch_size - len(going)) >= self.batch_size
        if len(going) < held and (leaves_room or len(going) <= FULL * held):
            live.keep(going)
        return live

    def _has_ended(self, answer: list[int]) -> bool:
        return bool(answer) and (answer[-1] in self.ends or len(answer) >= self.max_new_tokens)


def _numbers(prompt: Prompt) -> Tensor:
    assert prompt.numbers is not None
    return prompt.numbers


def _takes(model: Any, argument: str) -> bool:
    return argument in inspect.signature(_inner(model).forward).parameters


def _inner(model: Any) -> Any:
    """The model under PEFT's."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def has_plain_cache(model: nn.Module) -> bool:
    """Whether rows can leave a batch and others come in: keys and values of all tokens, and nothing else, are kept.

    Models whose cache is another, or that prepare their inputs in their own way, answer through `generate`.
    """
    inner = _inner(model)
    configs = [c for c in getattr(model, "peft_config", {}).values() if hasattr(model, "get_base_model")]
    if any(c.is_prompt_learning or getattr(c, "alora_invocation_tokens", None) for c in configs):
        return False
    if type(inner).prepare_inputs_for_generation is not GenerationMixin.prepare_inputs_for_generation:
        return False
    if not is_seq2seq(model) and not _takes(model, "position_ids"):
        return False
    layers = DynamicCache(config=inner.config).layers
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


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


# -- label likelihood --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LabelTree:
    """Labels as a tree of tokens, so that a beginning they share is read once.

    Attributes:
        tokens: the token of each inner node, parents before children.
        parents: the node before it, -1 for the prompt.
        paths: for each label its tokens, each with the node it is predicted at.
    """

    tokens: list[int]
    parents: list[int]
    paths: list[list[tuple[int, int]]]

    @classmethod
    def of(cls, labels: Sequence[Sequence[int]]) -> LabelTree:
        tokens: list[int] = []
        parents: list[int] = []
        known: dict[tuple[int, ...], int] = {(): -1}
        paths = []
        for label in labels:
            path = []
            for k, token in enumerate(label):
                before = tuple(label[:k])
                if before not in known:
                    known[before] = len(tokens)
                    tokens.append(before[-1])
                    parents.append(known[before[:-1]])
                path.append((known[before], token))
            paths.append(path)
        return cls(tokens, parents, paths)

    def depths(self) -> list[int]:
        """How many tokens after the prompt each node stands, from 0."""
        found: list[int] = []
        for parent in self.parents:
            found.append(0 if parent < 0 else found[parent] + 1)
        return found

    def sees(self) -> Tensor:
        """[nodes, nodes] whether a node comes after another, or is it."""
        mask = torch.eye(len(self.tokens), dtype=torch.bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                mask[node] |= mask[parent]
        return mask

    def totals(self, at_prompt: Tensor, at_nodes: Tensor | None) -> Tensor:
        """[rows, labels] log p of each label, from logits [rows, vocabulary] and [rows, nodes, vocabulary]."""
        logits = at_prompt[:, None] if at_nodes is None else torch.cat([at_prompt[:, None], at_nodes], 1)
        norms = logits.float().logsumexp(-1)
        width = max(map(len, self.paths))
        place = torch.zeros(len(self.paths), width, dtype=torch.long)
        token, real = torch.zeros_like(place), torch.zeros(len(self.paths), width, dtype=torch.bool)
        for label, path in enumerate(self.paths):
            for k, (node, word) in enumerate(path):
                place[label, k], token[label, k], real[label, k] = node + 1, word, True
        place, token, real = (t.to(logits.device) for t in (place, token, real))
        found = logits[:, place, token].float() - norms[:, place]
        return found.where(real, 0.0).sum(-1)


@lru_cache(maxsize=8)
def _tree(labels: tuple[tuple[int, ...], ...]) -> LabelTree:
    return LabelTree.of(labels)


@dataclass(frozen=True)
class Choice:
    """A prompt and the tokens of each answer to it."""

    ids: tuple[int, ...]
    labels: tuple[tuple[int, ...], ...]


class Chooser:
    """Likelihoods of answers, with each prompt read once for all of them; at most `batch_size` sequences at a time."""

    def __init__(self, model: Any, tokenizer: Any, *, batch_size: int) -> None:
        self.model, self.batch_size = model, batch_size
        self.seq2seq = is_seq2seq(model)
        self.device = next(model.parameters()).device
        self.pad = tokenizer.pad_token_id
        self.in_a_tree = reads_trees(model)
        self._few_logits = {"logits_to_keep": 1} if _takes(model, "logits_to_keep") else {}

    def __call__(self, choices: Sequence[Choice], done: Callable[[int], Any]) -> list[list[float]]:
        """log p(label | prompt) for each label of each choice."""
        found: list[list[float]] = []
        for start in range(0, len(choices), self.batch_size):
            batch = choices[start : start + self.batch_size]
            ids, mask = left_pad([choice.ids for choice in batch], self.pad, self.device, left=not self.seq2seq)
            read: Any = self._encode(ids, mask) if self.seq2seq else self._read(ids, mask)
            answer = self._decoded if self.seq2seq else self._in_a_tree if self.in_a_tree else self._one_by_one
            for places in self._parts(batch):
                labels = batch[places[0]].labels
                index = torch.tensor(places, device=self.device)
                found += answer(read, mask, index, labels).tolist()
                done(len(places))
        return found

    def _parts(self, batch: Sequence[Choice]) -> Iterator[list[int]]:
        """Neighbours with the same answers, few enough for the answers of all to be read at once."""
        start = 0
        while start < len(batch):
            labels = batch[start].labels
            if self.in_a_tree:
                tree, deepest = _tree(labels), max(map(len, labels)) - 1
                most = self.batch_size * max(1, deepest) // max(1, len(tree.tokens))
            else:
                most = self.batch_size // len(labels)
            end = start + 1
            while end < len(batch) and end - start < most and batch[end].labels == labels:
                end += 1
            yield list(range(start, end))
            start = end

    def _encode(self, ids: Tensor, mask: Tensor) -> Any:
        return self.model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state

    def _decoded(self, encoded: Tensor, mask: Tensor, index: Tensor, labels: Sequence[Sequence[int]]) -> Tensor:
        n = len(labels)
        target, real = self._padded(labels, len(index))
        start = torch.full_like(target[:, :1], self.model.config.decoder_start_token_id)
        logits = self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=encoded[index].repeat_interleave(n, 0)),
            attention_mask=mask[index].repeat_interleave(n, 0),
            decoder_input_ids=torch.cat([start, target[:, :-1]], 1),
        ).logits
        return self._sums(logits, target, real, n)

    def _read(self, ids: Tensor, mask: Tensor) -> tuple[Any, Tensor]:
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        output = self.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, **self._few_logits
        )
        cache = getattr(output, "past_key_values", None)
        if not isinstance(cache, DynamicCache):
            raise InputError("scorer 'label_likelihood' needs a model with a key-value cache; use exact_match")
        return cache, output.logits[:, -1]

    def _in_a_tree(
        self, read: tuple[DynamicCache, Tensor], mask: Tensor, index: Tensor, labels: tuple[tuple[int, ...], ...]
    ) -> Tensor:
        """All answers as one sequence after the prompt, in which each token sees the prompt and what leads to it."""
        tree, (whole, first) = _tree(labels), read
        if not tree.tokens:
            return tree.totals(first[index], None)
        rows, nodes = len(index), len(tree.tokens)
        cache = _part_of(whole, index)
        sees = tree.sees().to(self.device).expand(rows, nodes, nodes)
        prompt = mask[index].bool()
        allowed = torch.cat([prompt[:, None].expand(-1, nodes, -1), sees], -1)[:, None]
        ids = torch.tensor([tree.tokens], device=self.device).expand(rows, -1)
        positions = prompt.sum(-1, keepdim=True) + torch.tensor([tree.depths()], device=self.device)
        if _attention(self.model) == "eager":  # it adds its mask
            dtype = first.dtype
            allowed = torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)
        logits = self.model(input_ids=ids, attention_mask=allowed, position_ids=positions, past_key_values=cache).logits
        return tree.totals(first[index], logits)

    def _one_by_one(
        self, read: tuple[DynamicCache, Tensor], mask: Tensor, index: Tensor, labels: Sequence[Sequence[int]]
    ) -> Tensor:
        """Each answer as a row of its own, with a copy of what was kept of the prompt."""
        n, (whole, first) = len(labels), read
        target, real = self._padded(labels, len(index))
        logits = first[index].repeat_interleave(n, 0)[:, None]
        if target.shape[1] > 1:
            cache = _part_of(whole, index)
            cache.batch_repeat_interleave(n)
            prompt = mask[index].repeat_interleave(n, 0)
            positions = prompt.sum(-1, keepdim=True) + torch.arange(target.shape[1] - 1, device=self.device)
            rest = self.model(
                input_ids=target[:, :-1], attention_mask=torch.cat([prompt, real[:, :-1]], 1), position_ids=positions,
                past_key_values=cache,
            ).logits  # fmt: skip
            logits = torch.cat([logits, rest], 1)
        return self._sums(logits, target, real, n)

    def _padded(self, labels: Sequence[Sequence[int]], rows: int) -> tuple[Tensor, Tensor]:
        target, real = left_pad(labels, self.pad, self.device, left=False)
        return target.repeat(rows, 1), real.repeat(rows, 1)

    @staticmethod
    def _sums(logits: Tensor, target: Tensor, real: Tensor, n: int) -> Tensor:
        scores = logits.float().log_softmax(-1).gather(-1, target.unsqueeze(-1)).squeeze(-1)
        return (scores * real).sum(-1).view(-1, n)


def _part_of(cache: DynamicCache, index: Tensor) -> DynamicCache:
    """What was kept of some rows; reading on leaves the whole as it is."""
    part = copy.copy(cache)
    part.layers = [copy.copy(layer) for layer in cache.layers]
    part.batch_select_indices(index)
    return part


def _attention(model: Any) -> str:
    return str(getattr(_inner(model).config, "_attn_implementation", None))


def reads_trees(model: Any) -> bool:
    """Whether the model takes a mask that says for every token what it sees, beside a plain cache.

    ALiBi (Falcon) wants a mask of tokens, and GPT-Neo's local layers count the tokens between, siblings too.
    """
    config = getattr(model, "config", None)
    by_distance = getattr(config, "alibi", False) or getattr(config, "attention_types", None) is not None
    return (
        not by_distance and not is_seq2seq(model) and has_plain_cache(model) and _attention(model) in ("sdpa", "eager")
    )
