"""What a model could do before it learnt anything here: a held text and a frozen set of prompts, at every task.

The text gives a perplexity, the prompts the share of right answers; the changes against the base model say what the
tasks have cost. Both files come with the package (`general/`) or from the user, and their hashes stand in the results.

- Decoder-only models read each passage from its beginning; the first token counts only where the tokenizer puts a
  beginning-of-text token before it. Passages longer than `MAX_TOKENS` are read in pieces, each by itself.
- Encoder-decoder models read the first half of each piece in the encoder and are asked for the second half: a
  perplexity given the first half, and no perplexity of the text.
- Masked models see each piece `MASK_STRIDE` times with every `MASK_STRIDE`-th token masked, another one each time, so
  that every token is predicted once: a pseudo-perplexity.

A prompt with options is answered by the most likely one: the sum of its tokens' log-likelihoods, without the end token,
which base models never write (masked models: the mean, all of its tokens masked at once). One without options is right
if each token of the answer is the most likely one, so that greedy decoding would begin with it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from .errors import InputError, refuse_unknown
from .models import is_masked, is_seq2seq, positions_of
from .perplexity import _right_pad, _sums
from .tokenization import _affixes, _ids, encode_completion, encode_prompt

if TYPE_CHECKING:
    from .distributed import Processes
    from .evaluation import EvaluationConfig
    from .run_state import RunDirectory
    from .tasks import Task

FOLDER = Path(__file__).parent / "general"
FILES = {"text": FOLDER / "text.txt", "prompts": FOLDER / "prompts.jsonl"}
PROMPT_KEYS = ("id", "kind", "prompt", "options", "answer")
MAX_TOKENS = 256
"""A longer passage is read in pieces."""
MASK_STRIDE = 7
"""One token in so many is masked at once, about as many as in the training of masked models."""
BATCH_TOKENS = 2048
"""At most so many tokens, padding included, go through the model at once: logits of 150 000 words take 0.6 GB then."""
GENERAL, LM_EVAL = "general", "lm_eval"


# -- what is asked -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GeneralData:
    """A held text and the prompts.

    Attributes:
        passages: of the text, scored one by one.
        prompts: mappings with `id`, `kind`, `prompt`, `answer` and, for most, `options`.
        hashes: sha256 of both files.
    """

    passages: tuple[str, ...]
    prompts: tuple[Mapping[str, Any], ...]
    hashes: Mapping[str, str]


def check_general(value: Any) -> Any:
    """`evaluation.general` as it is recorded: None, True, or a mapping of files.

    Raises:
        InputError: for anything else.
    """
    if value is None or value is False:
        return None
    if value is True:
        return True
    if not isinstance(value, Mapping):
        raise InputError(
            f"evaluation.general={value!r} must be true, false, or files such as {{text: my.txt, prompts: my.jsonl}}"
        )
    refuse_unknown(value, FILES, "evaluation.general.")
    for option, path in value.items():
        if path is not None and not (isinstance(path, (str, Path)) and str(path)):
            raise InputError(f"evaluation.general.{option}={path!r} must be the path of a file")
    return {option: str(path) for option, path in value.items() if path is not None} or True


def with_paths_below(evaluation: Mapping[str, Any], base_dir: Path) -> dict[str, Any]:
    """The recipe's `evaluation:` section with its relative paths made absolute, from `base_dir` or else from here."""

    def absolute(path: str) -> str:
        found = [root / path for root in (base_dir, Path.cwd()) if (root / path).exists()]
        return str(found[0] if found else base_dir / path)

    result = dict(evaluation)
    for section, options in ((GENERAL, tuple(FILES)), (LM_EVAL, ("include_path",))):
        if isinstance(result.get(section), Mapping):
            result[section] = {k: absolute(v) if k in options and v else v for k, v in result[section].items()}
    return result


def load_general(value: Any) -> GeneralData:
    """The text and the prompts that `evaluation.general` names.

    Raises:
        InputError: for a file that cannot be read, and for a row that cannot be asked, with its line.
    """
    given = value if isinstance(value, Mapping) else {}
    texts, hashes = {}, {}
    for option, default in FILES.items():
        path = Path(given.get(option) or default).expanduser()
        try:
            data = path.read_bytes()
            texts[option] = data.decode("utf-8").lstrip("\ufeff").replace("\r\n", "\n")
        except OSError as error:
            raise InputError(
                f"evaluation.general.{option}={path} cannot be read ({error.strerror}); give a file that can"
            ) from error
        except UnicodeDecodeError as error:
            raise InputError(f"evaluation.general.{option}={path} is not text in UTF-8; convert it") from error
        hashes[option] = hashlib.sha256(data).hexdigest()
    passages = tuple(" ".join(p.split()) for p in texts["text"].split("\n\n") if p.strip())
    if not passages:
        raise InputError(
            f"evaluation.general.text={given.get('text')} is empty; give passages with blank lines between"
        )
    return GeneralData(passages, tuple(_prompts(texts["prompts"], str(given.get("prompts") or "prompts"))), hashes)


def _prompts(text: str, where: str) -> Iterator[dict[str, Any]]:
    seen: set[str] = set()
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        place = f"evaluation.general.prompts={where} line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{place} is not JSON ({error}); write one JSON object a line") from error
        if not isinstance(row, dict):
            raise InputError(f"{place} is no JSON object; write {{'prompt': ..., 'options': [...], 'answer': ...}}")
        refuse_unknown(row, PROMPT_KEYS, f"{place}: ")
        for key in ("prompt", "answer"):
            if not (isinstance(row.get(key), str) and row[key].strip()):
                raise InputError(f"{place}: {key}={row.get(key)!r} must be text that is not empty")
        options = row.get("options")
        if options is not None:
            if not isinstance(options, list) or not all(isinstance(o, str) and o.strip() for o in options):
                raise InputError(f"{place}: options={options!r} must be a list of texts that are not empty")
            if len(options) < 2 or len(set(options)) < len(options):
                raise InputError(f"{place}: options={options!r} must be at least two, all different")
            if row["answer"] not in options:
                raise InputError(f"{place}: the answer {row['answer']!r} is not among its options {options}")
        row = {"id": str(row.get("id", number)), "kind": str(row.get("kind", "prompts")), **row}
        row["id"], row["kind"] = str(row["id"]), str(row["kind"])
        if row["id"] in seen:
            raise InputError(f"{place}: the id '{row['id']}' stands there twice; give each prompt its own")
        seen.add(row["id"])
        yield row
    if not seen:
        raise InputError(f"evaluation.general.prompts={where} is empty; give at least one prompt")


# -- how it is answered ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """Tokens to score: the logits at `positions` of `ids` are compared with `gold`.

    `source` is what an encoder reads, `ids` then what the decoder does.
    """

    ids: tuple[int, ...]
    positions: tuple[int, ...]
    gold: tuple[int, ...]
    source: tuple[int, ...] = ()


@dataclass(frozen=True)
class TokenScore:
    """Sum of the log-likelihoods of a sequence's tokens, their number, and whether each was the most likely one."""

    log_likelihood: float
    tokens: int
    greedy: bool


def model_mode(model: Any, option: str = "evaluation.general") -> str:
    """How a model is read: `causal`, `seq2seq` or `masked`.

    Raises:
        InputError: if it has no language-model head.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if base.get_output_embeddings() is None:
        raise InputError(
            f"{option}: {type(base).__name__} has no language-model head, so neither likelihoods nor answers; leave "
            f"{option} out"
        )
    if is_seq2seq(base):
        return "seq2seq"
    return "masked" if is_masked(base) else "causal"


def _limit(model: Any, tokenizer: PreTrainedTokenizerBase) -> int:
    """The longest piece, special tokens included, that the model can take."""
    return int(min(MAX_TOKENS, tokenizer.model_max_length, positions_of(model) or MAX_TOKENS))


def text_sequences(passages: Sequence[str], tokenizer: Any, mode: str, limit: int, start: int) -> list[Piece]:
    """The passages, in pieces that fit; `start` is the token that a decoder begins with."""
    prefix, suffix = _affixes(tokenizer)
    room = limit - len(prefix) - len(suffix)
    found = []
    for passage in passages:
        tokens = _ids(tokenizer, passage)
        for first in range(0, len(tokens), room):
            piece = tokens[first : first + room]
            if mode == "causal":
                context = prefix or piece[:1]
                rest = piece if prefix else piece[1:]
                if rest:
                    found.append(_continuation(context, rest))
            elif mode == "seq2seq":
                half = len(piece) // 2
                if half:
                    source = (*prefix, *piece[:half], *suffix)
                    found.append(_continuation([start, *prefix], piece[half:], source))
            else:
                ids = [*prefix, *piece, *suffix]
                for offset in range(MASK_STRIDE):
                    places = range(len(prefix) + offset, len(prefix) + len(piece), MASK_STRIDE)
                    if len(places):
                        found.append(_masked(ids, places, tokenizer.mask_token_id))
    return found


def answer_sequence(prompt: str, answer: str, tokenizer: Any, mode: str, limit: int, start: int) -> Piece:
    """One possible answer after a prompt."""
    target = encode_completion(answer, prompt, tokenizer, 10_000, mode == "seq2seq")
    target = target[:-1] if target[-1] == tokenizer.eos_token_id else target
    if mode == "seq2seq":
        prefix, _ = _affixes(tokenizer)
        source = encode_prompt(prompt, tokenizer, limit, True)
        return _continuation([start, *prefix], target[len(prefix) :], source)
    suffix = _affixes(tokenizer)[1] if mode == "masked" else []
    context = encode_prompt(prompt, tokenizer, max(16, limit - len(target) - len(suffix)), False)
    if mode == "causal":
        return _continuation(context, target)
    return _masked(
        [*context, *target, *suffix], range(len(context), len(context) + len(target)), tokenizer.mask_token_id
    )


def _continuation(context: Sequence[int], target: Sequence[int], source: Sequence[int] = ()) -> Piece:
    ids = (*context, *target[:-1])
    return Piece(ids, tuple(range(len(context) - 1, len(ids))), tuple(target), tuple(source))


def _masked(ids: Sequence[int], places: Sequence[int], mask: int) -> Piece:
    hidden = set(places)
    shown = tuple(mask if i in hidden else token for i, token in enumerate(ids))
    return Piece(shown, tuple(places), tuple(ids[i] for i in places))


def token_scores(
    model: Any, pieces: Sequence[Piece], pad: int, batch_size: int, tick: Callable[[], None] = lambda: None
) -> list[TokenScore]:
    """Log-likelihoods of `pieces`, in batches of similar length.

    What differs in nothing that the model reads, such as answers of one token after a prompt, is read once.
    """
    device = next(model.parameters()).device
    same: dict[tuple[Sequence[int], Sequence[int]], list[int]] = {}
    for i, piece in enumerate(pieces):
        same.setdefault((piece.ids, piece.source), []).append(i)
    inputs = sorted(same, key=lambda read: (-len(read[0]), -len(read[1]), read))
    scores: dict[int, TokenScore] = {}
    while inputs:
        longest = len(inputs[0][0]) + max(len(source) for _, source in inputs[:batch_size])
        size = max(1, min(batch_size, BATCH_TOKENS // longest))
        batch, inputs = inputs[:size], inputs[size:]
        tick()
        ids, mask = _right_pad([read for read, _ in batch], pad, device)
        if batch[0][1]:
            source, source_mask = _right_pad([read for _, read in batch], pad, device)
            logits = model(
                input_ids=source, attention_mask=source_mask, decoder_input_ids=ids, decoder_attention_mask=mask
            ).logits
        else:
            logits = model(input_ids=ids, attention_mask=mask).logits
        for row, read in enumerate(batch):
            for i in same[read]:
                own = logits[row, torch.tensor(pieces[i].positions, device=device)]
                gold = torch.tensor(pieces[i].gold, device=device)
                [[total, tokens]] = _sums(own[None], gold[None])
                scores[i] = TokenScore(total, int(tokens), bool((own.argmax(-1) == gold).all()))
    return [scores[i] for i in range(len(pieces))]


@dataclass(frozen=True)
class Measured:
    """What one probe found: `values` for the tables, `details` a row each, `settings` that must stay the same."""

    values: dict[str, Any]
    details: list[dict[str, Any]]
    settings: dict[str, Any]


def measure_general(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    data: GeneralData,
    batch_size: int = 16,
    tick: Callable[[], None] = lambda: None,
) -> Measured:
    """Perplexity of the text and answers to the prompts. The model is left as it was.

    Returns:
        values: `loss` (nats a token), `perplexity`, `tokens`, `right` of `prompts`, `accuracy`, and `kinds`, which maps
        a kind of prompt to `[right, of]`. details: one row a prompt.
    """
    from .evaluation import evaluating

    mode = model_mode(model)
    limit = _limit(model, tokenizer)
    start = getattr(model.config, "decoder_start_token_id", None) if mode == "seq2seq" else 0
    pieces = text_sequences(data.passages, tokenizer, mode, limit, start)  # type: ignore[arg-type]
    asked = [
        (row, answer_sequence(row["prompt"], option, tokenizer, mode, limit, start))  # type: ignore[arg-type]
        for row in data.prompts
        for option in row.get("options") or [row["answer"]]
    ]
    if not pieces:
        raise InputError("evaluation.general.text has no passage of two tokens or more; give a longer text")
    pad = tokenizer.pad_token_id or 0
    with evaluating(model), torch.no_grad():
        read = token_scores(model, pieces, pad, batch_size, tick)
        answered = token_scores(model, [piece for _, piece in asked], pad, batch_size, tick)
    tokens = sum(score.tokens for score in read)
    loss = -sum(score.log_likelihood for score in read) / tokens
    details = []
    place = 0
    for row in data.prompts:
        options = row.get("options")
        own = answered[place : place + len(options or [0])]
        place += len(own)
        values = [s.log_likelihood / (s.tokens if mode == "masked" else 1) for s in own]
        if options:
            choice = options[max(range(len(options)), key=lambda k, v=values: v[k])]  # type: ignore[misc]
            right = choice == row["answer"]
        else:
            choice, right = None, own[0].greedy
        found = {"id": row["id"], "kind": row["kind"], "right": right, "choice": choice, "answer": row["answer"]}
        details.append({**found, "log_likelihood": [round(v, 6) for v in values]})
    kinds: dict[str, list[int]] = {}
    for detail in details:
        counts = kinds.setdefault(detail["kind"], [0, 0])
        counts[0] += detail["right"]
        counts[1] += 1
    total = sum(detail["right"] for detail in details)
    values_ = {
        "loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf, "tokens": tokens, "right": total,
        "prompts": len(details), "accuracy": total / len(details), "kinds": kinds,
    }  # fmt: skip
    return Measured(values_, details, {**data.hashes, "mode": mode, "max_tokens": limit})


# -- what a queue measures ---------------------------------------------------------------------------------------------


class Probe(Protocol):
    """One way to measure general ability."""

    name: str

    def wanted(self, index: int, last: int) -> bool:
        """Whether the model after task `index` (-1: before any) is measured, in a stream that ends with `last`."""

    def check(self, model: Any, tokenizer: Any) -> None:
        """Refuse, before training, what could not be measured."""

    def settings(self) -> dict[str, Any]:
        """What must be the same in all results of a run."""

    def measure(self, model: Any, tokenizer: Any, dtype: torch.dtype | None, tick: Callable[[], None]) -> Measured:
        """Called on rank 0; `tick` now and then says that it is alive."""

    def line(self, values: Mapping[str, Any]) -> str:
        """For the terminal."""


class TextProbe:
    """`evaluation.general`, at every task."""

    name = GENERAL

    def __init__(self, config: EvaluationConfig) -> None:
        self.data, self.batch_size = load_general(config.general), config.batch_size

    def wanted(self, index: int, last: int) -> bool:
        return True

    def check(self, model: Any, tokenizer: Any) -> None:
        if model_mode(model) == "masked" and tokenizer.mask_token_id is None:
            raise InputError(
                "evaluation.general: the tokenizer of this masked model has no mask token; set its mask_token, or "
                "leave evaluation.general out"
            )

    def settings(self) -> dict[str, Any]:
        return dict(self.data.hashes)

    def measure(self, model: Any, tokenizer: Any, dtype: torch.dtype | None, tick: Callable[[], None]) -> Measured:
        device = next(model.parameters()).device
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            return measure_general(model, tokenizer, self.data, self.batch_size, tick)

    def line(self, values: Mapping[str, Any]) -> str:
        return f"perplexity {values['perplexity']:.2f}, {values['right']} of {values['prompts']} prompts right"


class GeneralAbility:
    """The probes of a queue: which are missing, measured by rank 0 alone while the others wait, stored, logged."""

    def __init__(self, config: EvaluationConfig) -> None:
        self.probes: list[Probe] = []
        if config.general is not None:
            self.probes.append(TextProbe(config))
        if config.lm_eval is not None:
            from .lm_eval_probe import LmEvalProbe

            self.probes.append(LmEvalProbe(config))
        self.log = GeneralLog()

    def check(self, model: Any, tokenizer: Any) -> None:
        for probe in self.probes:
            probe.check(model, tokenizer)

    def check_stored(self, directory: RunDirectory, learnt: Sequence[Task]) -> None:
        """Refuse results of another text or other tasks; a changed one would look like a changed model.

        Raises:
            InputError: naming the file.
        """
        for probe in self.probes:
            settings = probe.settings()
            for after in [None, *learnt]:
                stored = (directory.read_general(after, probe.name) or {}).get("settings")
                for key, value in settings.items():
                    if stored is not None and stored.get(key) != value:
                        raise InputError(
                            f"{directory.general_file(after, probe.name)} was measured with another {key} "
                            f"({str(stored.get(key))[:12]}, now {str(value)[:12]}), and results of both would not "
                            "compare; put back the old one, or use another run directory"
                        )

    def missing(self, directory: RunDirectory, learnt: Sequence[Task], last: int) -> list[tuple[int, str]]:
        """(index, probe) of what is to be measured after the `learnt` tasks."""
        found = []
        for index, after in enumerate([None, *learnt], -1):
            for probe in self.probes:
                if probe.wanted(index, last) and not directory.has_general(after, probe.name):
                    found.append((index, probe.name))
        return found

    def measure(
        self,
        name: str,
        after: Task | None,
        model: Any,
        tokenizer: Any,
        dtype: torch.dtype | None,
        directory: RunDirectory,
        ranks: Processes,
    ) -> str:
        """Measure and store; every rank must call it. Returns the line for the terminal."""
        probe = next(p for p in self.probes if p.name == name)

        def on_main(tick: Callable[[], None]) -> dict[str, Any]:
            start = time.perf_counter()
            measured = probe.measure(model, tokenizer, dtype, tick)
            seconds = round(time.perf_counter() - start, 2)
            directory.write_general(after, name, measured, seconds)
            return {"values": measured.values, "seconds": seconds}

        found = on_main_patiently(ranks, on_main)
        before = ranks.on_main(lambda: directory.read_general(None, name)) if after is not None else None
        self.log.add(name, found["values"], before and before["values"])
        where = after.name if after is not None else "no task"
        return f"after {where}: {probe.line(found['values'])} ({found['seconds']:.1f} s)"


def general_rows(directory: RunDirectory, learnt: Sequence[Task]) -> list[dict[str, Any]]:
    """The lines of general.jsonl: what was measured, in the order of the stream, and how far it is from the base model.

    `delta` has the changes, `loss` in nats a token.
    """
    rows = []
    for probe in (GENERAL, LM_EVAL):
        base = directory.read_general(None, probe)
        for after in [None, *learnt]:
            found = directory.read_general(after, probe)
            if found is None:
                continue
            row = {key: found[key] for key in ("after_task", "after_index", "probe")} | found["values"]
            if after is not None and base is not None:
                row["delta"] = {
                    key.removesuffix("_delta"): value
                    for key, value in flat_values(probe, found["values"], base["values"]).items()
                    if key.endswith("_delta")
                }
            hashes = {key: value for key, value in found["settings"].items() if key in (*FILES, "include_sha256")}
            rows.append({**row, "hashes": hashes})
    return rows


PAUSE = 60.0
"""Seconds between two signs of life."""


def on_main_patiently(ranks: Processes, function: Callable[[Callable[[], None]], dict[str, Any]]) -> dict[str, Any]:
    """As `Processes.on_main`, for work that may take longer than a collective waits.

    `function` gets one to call now and then; it tells the other ranks to go on waiting.
    """
    if ranks.world_size == 1:
        return function(lambda: None)
    if not ranks.is_main:
        while True:
            if not ranks.broadcast(True):
                return ranks.on_main(dict)
    last = time.monotonic()

    def tick() -> None:
        nonlocal last
        if time.monotonic() - last > PAUSE:
            ranks.broadcast(True)
            last = time.monotonic()

    result: dict[str, Any] = {}
    error: BaseException | None = None
    try:
        result = function(tick)
    except BaseException as raised:
        error = raised

    def end() -> dict[str, Any]:
        if error is not None:
            raise error
        return result

    ranks.broadcast(False)
    return ranks.on_main(end)


# -- what is told to trackers ------------------------------------------------------------------------------------------


class GeneralLog(TrainerCallback):
    """Hands what is measured between tasks to the trackers of the Trainer's `report_to`.

    A Trainer lives as long as a task. What was measured before it (the base model) is logged when its training begins;
    what is measured afterwards goes to its trackers as that of a `Trainer.evaluate` after the training would.
    """

    in_phases = False

    def __init__(self) -> None:
        self.waiting: list[dict[str, float]] = []
        self._trackers: list[Any] = []
        self._tell: Callable[[dict[str, float]], None] | None = None

    def attach(self, trainer: Any) -> None:
        """Take this trainer's trackers, without keeping the trainer or its model."""
        kinds = tuple(INTEGRATION_TO_CALLBACK.values())
        self._trackers = [c for c in trainer.callback_handler.callbacks if isinstance(c, kinds)]
        self._tell = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trackers = self._trackers

        def tell(values: dict[str, float]) -> None:
            for tracker in trackers:
                folder = getattr(tracker, "logging_dir", None)
                if folder and not os.path.isdir(folder):
                    continue  # TensorBoard's default is in the work folder, which a learnt task has no more
                tracker.on_log(args, state, control, logs=dict(values))

        self._tell = tell
        waiting, self.waiting = self.waiting, []
        for values in waiting:
            tell(values)

    def add(self, name: str, values: Mapping[str, Any], base: Mapping[str, Any] | None) -> None:
        logged = {f"eval_{name}_{key}": value for key, value in flat_values(name, values, base).items()}
        if self._tell is None:
            self.waiting.append(logged)
        else:
            self._tell(logged)


def flat_values(name: str, values: Mapping[str, Any], base: Mapping[str, Any] | None) -> dict[str, float]:
    """The numbers of a result by name, with the changes against the base model."""
    if name == GENERAL:
        flat = {key: values[key] for key in ("loss", "perplexity", "accuracy")}
        before = base
    else:
        flat = {f"{task}_{metric}": v for task, found in values["scores"].items() for metric, v in found.items()}
        before = None if base is None else flat_values(name, base, None)
    if before is not None:
        keys = ("loss", "accuracy") if name == GENERAL else tuple(flat)
        flat |= {f"{key}_delta": flat[key] - before[key] for key in keys if key in before}
    return {key.replace(" ", "_"): float(value) for key, value in flat.items()}
