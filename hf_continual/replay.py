"""Rows of past tasks: which are kept, and how they are stored."""

from __future__ import annotations

import hashlib
import inspect
import json
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

import datasets
import torch
from datasets.table import InMemoryTable
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from .distributed import full_shape, is_partitioned
from .errors import InputError
from .run_state import write_json

if TYPE_CHECKING:
    from .methods.base import MethodContext

Policy = Literal["random", "first_n", "reservoir", "class_balanced", "herding"]
"""Which rows of a task are kept."""
Source = Literal["past", "current_task"]
"""Of which tasks the rows are that a method replays."""
SOURCE_HELP = (
    "past: stored rows of earlier tasks. current_task: as many rows of the present task in their place, without a "
    "teacher's signals: the padded control, which shows how much of a gain is the old data's."
)


def buffer_size(rows: int, ratio: float, count: int | None) -> int:
    """Examples to keep of a task with `rows` training rows."""
    if count is not None:
        return min(count, rows)
    return min(rows, max(1, int(ratio * rows))) if ratio > 0 else 0


def check_sizes(ratio: float, count: int | None, prefix: str = "") -> None:
    """Refuse a buffer size that cannot be."""
    number = isinstance(ratio, (int, float)) and not isinstance(ratio, bool)
    if not number or not 0.0 <= ratio <= 1.0:
        raise InputError(f"{prefix}ratio={ratio!r} must lie in [0, 1]")
    if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 0):
        raise InputError(f"{prefix}count={count!r} must be a whole number, not negative")


def check_rows(dataset: Any, method: str, task: str) -> None:
    """Refuse a stream without length, of which no rows can be drawn."""
    if isinstance(dataset, (IterableDataset, datasets.IterableDataset)):
        raise InputError(
            f"method '{method}': the training data of task '{task}' is a stream without length; "
            "give a map-style dataset"
        )


def check_columns(dataset: Any, buffer: datasets.Dataset | None, method: str, task: str) -> None:
    """Refuse rows with other columns than those that are kept."""
    if buffer is None:
        return
    columns = dataset.column_names if isinstance(dataset, datasets.Dataset) else list(dict(dataset[0]))
    if set(columns) != set(buffer.column_names):
        raise InputError(
            f"method '{method}': task '{task}' has the columns {sorted(columns)} and the buffer "
            f"{sorted(buffer.column_names)}; give every task the same columns"
        )


def keep_rows(buffer: datasets.Dataset | None, dataset: Any, size: int, seed: int) -> datasets.Dataset | None:
    """`buffer` with `size` random rows of `dataset` appended, drawn without replacement."""
    if size == 0:
        return buffer
    return append_rows(buffer, dataset, sorted(random_rows(len(dataset), size, seed)))


def random_rows(rows: int, size: int, seed: int) -> list[int]:
    """`size` of `rows`, without replacement."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(rows, generator=generator)[:size].tolist()


def append_rows(buffer: datasets.Dataset | None, dataset: Any, rows: Sequence[int]) -> datasets.Dataset:
    """`buffer` and, in its column types, these rows of `dataset`."""
    kept = datasets.Dataset.from_list([dict(dataset[i]) for i in rows])
    if isinstance(dataset, datasets.Dataset):
        kept = kept.cast(dataset.features)
    return kept if buffer is None else datasets.concatenate_datasets([buffer, kept.cast(buffer.features)])


# -- of which tasks ----------------------------------------------------------------------------------------------------


def check_source(source: Any) -> None:
    """Refuse what is no [`Source`]."""
    if source not in get_args(Source):
        raise InputError(f"source={source!r} is unknown; choose {', '.join(get_args(Source))}")


def replayed_rows(stored: datasets.Dataset | None, own: Any, source: str, seed: int) -> datasets.Dataset | None:
    """The rows that a method replays: `stored`, or in the padded control as many of the present task.

    Those are drawn at random, each once before any comes again, and have the columns and types of the stored ones.

    Args:
        own: the training rows of the present task.
        seed: of the draw.
    """
    if stored is None or source == "past":
        return stored
    rounds = -(-len(stored) // len(own))
    drawn = [row for number in range(rounds) for row in random_rows(len(own), len(own), seed + PADDING + number)]
    return append_rows(None, own, drawn[: len(stored)]).cast(stored.features)


# -- which rows --------------------------------------------------------------------------------------------------------


def equal_shares(available: Sequence[int], total: int) -> list[int]:
    """Split `total` as equally as can be, none above what is available; what is left over goes to the first."""
    shares = [0] * len(available)
    left = min(total, sum(available))
    while left:
        growing = [i for i, most in enumerate(available) if shares[i] < most]
        each = left // len(growing)
        for i in growing if each else growing[:left]:
            more = min(max(each, 1), available[i] - shares[i])
            shares[i] += more
            left -= more
    return shares


def reservoir_rows(rows: int, size: int, seed: int, held: int = 0, seen: int = 0) -> list[int]:
    """Which of the next `rows` of a stream are among its `size` in the end (Vitter's algorithm R).

    Args:
        held: how many of the `size` places are taken by earlier rows.
        seen: how many rows came earlier.
    """
    places: list[int | None] = [None] * held
    draws = torch.rand(rows, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    drawn = (draws * torch.arange(seen + 1, seen + rows + 1)).long().tolist()
    for row, place in enumerate(drawn):
        if len(places) < size:
            places.append(row)
        elif place < size:
            places[place] = row
    return [row for row in places if row is not None]


def row_class(row: Any) -> Any:
    """The class of a row: the label tokens that are not -100, one label, or the column `label`."""
    value = row.get("labels", row.get("label"))
    if torch.is_tensor(value) or hasattr(value, "tolist"):
        value = value.tolist()
    return tuple(v for v in value if v != -100) if isinstance(value, (list, tuple)) else value


def balanced_rows(classes: Sequence[Any], size: int, seed: int) -> list[int]:
    """One random row of each class in turn: as many of each as can be, small classes whole."""
    waiting: dict[Any, deque[int]] = {}
    for row in random_rows(len(classes), len(classes), seed):
        waiting.setdefault(classes[row], deque()).append(row)
    chosen: list[int] = []
    while len(chosen) < min(size, len(classes)):
        chosen += [queue.popleft() for queue in waiting.values() if queue]
    return chosen[:size]


def herding_rows(features: Tensor, size: int) -> list[int]:
    r"""Greedily the rows whose mean feature is nearest to that of all.

        p_k = argmin_x || mu - (phi(x) + sum_{j<k} phi(p_j)) / k ||

    Source: iCaRL (arXiv:1611.07725), Alg. 4. No row is taken twice.

    Args:
        features: [rows, d].
    """
    features = features.detach().cpu().double()
    mean, norms, chosen_sum = features.mean(0), features.square().sum(1), torch.zeros_like(features[0])
    chosen: list[int] = []
    for count in range(1, min(size, len(features)) + 1):
        # k^2 times the squared distance, less what is the same for all.
        distances = norms - 2 * features @ (count * mean - chosen_sum)
        distances[chosen] = torch.inf
        best = int(distances.argmin())
        chosen.append(best)
        chosen_sum += features[best]
    return chosen


@torch.no_grad()
def features_of(ctx: MethodContext, rows: Any) -> Tensor:
    """phi for herding: the mean of the last hidden state (an encoder's, if there is one) over tokens, of length 1.

    The processes share the rows, and all get the same.

    Returns:
        float32, [rows, hidden size], on the CPU.
    """
    # Not output_hidden_states=True, for which transformers places hooks that stay.
    backbone = _backbone(ctx.model)
    known = inspect.signature(backbone.forward).parameters
    size = ctx.state.train_batch_size or 8
    features: Tensor | None = None
    training = ctx.model.training
    split = any(is_partitioned(p) for p in ctx.model.parameters())  # collected in every forward, by all ranks
    ctx.model.eval()
    try:
        for number, start in enumerate(range(0, len(rows), size)):
            own = number % ctx.dist.world_size == ctx.dist.rank
            if features is not None and not own and not split:
                continue  # the first batch is for all, which then know the hidden size
            indices = range(start, min(start + size, len(rows)))
            batch = ctx.make_batch([dict(rows[i]) for i in indices])
            with ctx.autocast():
                if split:  # FSDP2 gathers the weights of a part where the whole model calls it, and not otherwise
                    outputs = _output_of(backbone, ctx.model, batch)
                else:
                    outputs = backbone(**{name: value for name, value in batch.items() if name in known})
            hidden = getattr(outputs, "last_hidden_state", None)
            if hidden is None or hidden.dim() != 3 or len(hidden) != len(indices):
                raise InputError(
                    f"policy='herding' needs the last hidden state of each row and {type(backbone).__name__} does not "
                    "give it; use another policy"
                )
            mask = batch.get("attention_mask")
            mask = hidden.new_ones(hidden.shape[:2]) if mask is None else mask
            weights = mask.to(hidden.device, torch.float32)[..., None]
            means = (hidden.float() * weights).sum(1) / weights.sum(1).clamp_min(1)
            if features is None:
                features = means.new_zeros(len(rows), means.shape[1])
            if own:
                features[start : start + size] = nn.functional.normalize(means, dim=1)
    finally:
        ctx.model.train(training)
    return torch.zeros(0, 1) if features is None else ctx.dist.sum_(features).cpu()


def _output_of(part: nn.Module, model: nn.Module, batch: Mapping[str, Any]) -> Any:
    """What a part returns in a forward of the whole model."""
    seen: list[Any] = []
    handle = part.register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        model(**batch)
    finally:
        handle.remove()
    return seen[0] if seen else None


def _backbone(model: Any) -> Any:
    """The part of a model of transformers that is below its head: the encoder, or what gives the last hidden state."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        return base.get_encoder()
    return getattr(base, "base_model", base)


# -- whose rows --------------------------------------------------------------------------------------------------------

WRAPPERS = frozenset({"base_layer", "original_module", "token_adapter", "_orig_mod"})
"""Parts that PEFT and `torch.compile` put into the names of a model's own parameters."""


def model_key(model: nn.Module) -> str:
    """A hash of the model type and of names and shapes of its parameters, those of adapters left out."""
    adapter = getattr(getattr(model, "base_model", None), "prefix", None) or "lora_"
    shapes = set()
    for name, parameter in model.named_parameters():
        parts = [part for part in name.removeprefix("base_model.model.").split(".") if part not in WRAPPERS]
        if not any(part == "modules_to_save" or part.startswith((adapter, "trainable_tokens_")) for part in parts):
            shapes.add((".".join(parts), tuple(full_shape(parameter))))
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    return _digest([kind, sorted(shapes)])


def tokenizer_key(tokenizer: Any) -> str | None:
    """A hash of what decides token ids; None for what is no tokenizer. Padding and truncation are left out."""
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor's
    if not hasattr(tokenizer, "get_vocab"):
        return None
    content: dict[str, Any] = {"special": tokenizer.special_tokens_map}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        fast = json.loads(backend.to_str())
        content["backend"] = {name: value for name, value in fast.items() if name not in ("truncation", "padding")}
    else:
        pieces = getattr(getattr(tokenizer, "sp_model", None), "serialized_model_proto", bytes)()
        merges = sorted(map(list, (getattr(tokenizer, "bpe_ranks", None) or {}).items()))
        content |= {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
        content |= {"merges": merges, "pieces": hashlib.sha256(pieces).hexdigest()}
    return _digest(content)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


# -- the buffer --------------------------------------------------------------------------------------------------------

SCHEMA = 1
RECORD = "buffer.json"
SIGNALS = "signals"
AGAIN = "restore it from a backup, or learn its task again in another run directory"
EVICTION = 1 << 40
"""Keeps the seeds of evictions apart from those of draws."""
PADDING = 1 << 41
"""Likewise those of the padded control."""


class Signals(Protocol):
    """What is stored beside the rows of a buffer, by their ids."""

    def save(self, folder: Path) -> None:
        """Write everything to `folder`."""

    def load(self, folder: Path) -> None:
        """Become what was written there."""

    def drop(self, ids: Iterable[str]) -> None:
        """Forget these rows."""


def check_buffer(ratio: float, count: int | None, total: int | None, policy: str, seed: int) -> None:
    """Refuse options of a [`ReplayBuffer`] that cannot be."""
    number = isinstance(ratio, (int, float)) and not isinstance(ratio, bool)
    if not number or not 0 < ratio <= 1:
        raise InputError(f"ratio={ratio!r} must lie in (0, 1]; to keep a number of rows, or none, give count")
    check_sizes(ratio, count)
    if total is not None and (not isinstance(total, int) or isinstance(total, bool) or total < 1):
        raise InputError(f"total={total!r} must be a whole number, at least 1")
    if total is not None and count is not None:
        raise InputError(f"count={count} and total={total} cannot both be given; total is shared between the tasks")
    if policy not in get_args(Policy):
        raise InputError(f"policy={policy!r} is unknown; choose {', '.join(get_args(Policy))}")
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise InputError(f"seed={seed!r} must be a whole number")


class ReplayBuffer:
    """Rows of past tasks, with the columns they had.

    Attributes:
        rows: task by task, each in the order of its dataset; None while there are none.
        ids: of each row, `<task index>-<row>`, which never change.
        tasks: the task index of each row.
        signals: what is stored beside the rows, such as a teacher's logits; None for nothing.

    Args:
        ratio: share of each task, in (0, 1]; at least one row.
        count: rows of each task; overrides `ratio`, and 0 keeps nothing.
        total: rows in all; overrides `ratio`. Tasks have equal shares, and with `policy="reservoir"` every row that was
            ever seen the same chance. Rows that no longer fit leave.
        policy: `random`; `first_n` (of the file); `reservoir` (algorithm R); `class_balanced` (as many rows of each
            answer); `herding` (those whose mean feature is nearest to the task's).
        seed: of the draws; task i draws from seed + i.
    """

    def __init__(
        self,
        ratio: float = 0.02,
        count: int | None = None,
        total: int | None = None,
        policy: str = "random",
        seed: int = 42,
    ) -> None:
        check_buffer(ratio, count, total, policy, seed)
        self.ratio, self.count, self.total, self.policy, self.seed = ratio, count, total, policy, seed
        self.rows: datasets.Dataset | None = None
        self.ids: list[str] = []
        self.tasks: list[int] = []
        self.signals: Signals | None = None
        self._order: list[int] = []  # of each row among the chosen ones of its task; the last leave first
        self._names: dict[int, str] = {}
        self._seen = 0
        self._keys: dict[str, str | None] = {"model": None, "tokenizer": None}

    def __len__(self) -> int:
        return len(self.ids)

    def __eq__(self, other: object) -> bool:
        """Whether options, keys and rows are the same; the signals are not compared."""
        if not isinstance(other, ReplayBuffer):
            return NotImplemented
        rows = (None if each.rows is None else each.rows[:] for each in (self, other))
        return self._state() == other._state() and next(rows) == next(rows)

    @property
    def sizes(self) -> dict[str, int]:
        """Rows of each task, by its name; 0 for a task that left none."""
        sizes: dict[str, int] = {}
        for index, name in self._names.items():
            sizes[name] = sizes.get(name, 0) + self.tasks.count(index)
        return sizes

    def options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("ratio", "count", "total", "policy", "seed")}

    def rows_of(self, task_index: int) -> datasets.Dataset | None:
        """The rows of one task; None if there are none."""
        chosen = [row for row, task in enumerate(self.tasks) if task == task_index]
        return self.rows.select(chosen) if self.rows is not None and chosen else None

    def bind(self, model_key: str | None, tokenizer_key: str | None) -> None:
        """Say whose rows they are: at first remembered, later compared. None is not compared.

        Raises:
            InputError: if there are rows of another model or tokenizer.
        """
        given = {"model": model_key, "tokenizer": tokenizer_key}
        for what, key in given.items():
            held = self._keys[what]
            if len(self) and None not in (key, held) and key != held:
                raise InputError(
                    f"the buffer holds rows of another {what} ({str(held)[:12]}, not {str(key)[:12]}); use the model "
                    "and tokenizer it was made with, or start with an empty buffer"
                )
        self._keys = {**self._keys, **{what: key for what, key in given.items() if key is not None}}

    # -- rows in, rows out -------------------------------------------------------------------------------------------

    def choose(
        self, dataset: Any, task_index: int, features: Tensor | Callable[[Any], Tensor] | None = None
    ) -> list[int]:
        """Which rows of a task to keep, the best first: the same for the same seed, task index and earlier tasks.

        Args:
            features: [rows, d], or what gives them for `dataset`; for `policy="herding"`.
        """
        rows, seed = len(dataset), self.seed + task_index
        if self.policy == "reservoir" and self.total is not None:
            return reservoir_rows(rows, self.total, seed, held=len(self), seen=self._seen)
        size = self._size(rows)
        if size == 0:
            return []
        if self.policy == "first_n":
            return list(range(size))
        if self.policy == "reservoir":
            return reservoir_rows(rows, size, seed)
        if self.policy == "class_balanced":
            return balanced_rows(self._classes(dataset), size, seed)
        if self.policy == "herding":
            return herding_rows(self._features(dataset, features), size)
        return random_rows(rows, size, seed)

    def _size(self, rows: int) -> int:
        if self.total is None:
            return buffer_size(rows, self.ratio, self.count)
        return equal_shares([*(self.tasks.count(task) for task in self._names), rows], self.total)[-1]

    def _classes(self, dataset: Any) -> list[Any]:
        columns = dataset.column_names if isinstance(dataset, datasets.Dataset) else list(dict(dataset[0]))
        column = next((name for name in ("labels", "label") if name in columns), None)
        if column is None:
            raise InputError(
                f"policy='class_balanced' needs a column 'labels' or 'label' and the rows have {sorted(columns)}; use "
                "another policy"
            )
        if isinstance(dataset, datasets.Dataset):
            dataset = dataset.select_columns(column)
        return [row_class(dict(dataset[i])) for i in range(len(dataset))]

    def _features(self, dataset: Any, features: Any) -> Tensor:
        found = features(dataset) if callable(features) else features
        if found is None:
            raise InputError("policy='herding' needs features of the rows; give them, or use another policy")
        if found.dim() != 2 or len(found) != len(dataset) or not bool(torch.isfinite(found).all()):
            raise InputError(
                f"policy='herding' needs finite features of {len(dataset)} rows, [rows, d], not {tuple(found.shape)}; "
                "check the model, or use another policy"
            )
        return found

    def add(
        self,
        task_index: int,
        task_name: str,
        dataset: Any,
        indices: Sequence[int] | None = None,
        features: Tensor | Callable[[Any], Tensor] | None = None,
    ) -> list[str]:
        """Append rows of a task that is over, and evict what no longer fits.

        Args:
            indices: as `choose` gave them, the best first; by default chosen now.

        Returns:
            The ids of evicted rows.
        """
        if task_index in self._names:
            raise InputError(f"the buffer already holds task {task_index} ('{self._names[task_index]}'); add it once")
        best = self.choose(dataset, task_index, features) if indices is None else [int(i) for i in indices]
        chosen = sorted(best)
        if len(set(best)) < len(best) or (best and not 0 <= chosen[0] <= chosen[-1] < len(dataset)):
            raise ValueError(f"the indices of task {task_index} are no {len(best)} different rows of {len(dataset)}")
        if chosen:
            self.rows = append_rows(self.rows, dataset, chosen)
        places = {row: place for place, row in enumerate(best)}
        # New lists: a shallow copy from before the task stays as it was.
        self.ids = [*self.ids, *(f"{task_index:03d}-{row:07d}" for row in chosen)]
        self.tasks = [*self.tasks, *[task_index] * len(chosen)]
        self._order = [*self._order, *(places[row] for row in chosen)]
        self._names = {**self._names, task_index: task_name}
        self._seen += len(dataset)
        return self._keep(self._staying(task_index))

    def _staying(self, new: int) -> list[int]:
        """Which rows stay, now that those of the task `new` have come."""
        if self.total is None or len(self) <= self.total:
            return list(range(len(self)))
        members = {task: [row for row, own in enumerate(self.tasks) if own == task] for task in self._names}
        for rows in members.values():
            rows.sort(key=self._order.__getitem__)
        if self.policy == "reservoir":
            # Algorithm R overwrites places drawn at random: given how many new rows stay, any old ones are as likely.
            own = members[new][: self.total]
            old = [row for row, task in enumerate(self.tasks) if task != new]
            kept = random_rows(len(old), self.total - len(own), self.seed + new + EVICTION)
            return sorted(own + [old[i] for i in kept])
        shares = equal_shares([len(rows) for rows in members.values()], self.total)
        return sorted(row for rows, share in zip(members.values(), shares, strict=True) for row in rows[:share])

    def _keep(self, staying: list[int]) -> list[str]:
        """Drop all other rows; returns their ids."""
        gone = sorted(set(range(len(self))) - set(staying))
        evicted = [self.ids[row] for row in gone]
        for name in ("ids", "tasks", "_order"):
            values = getattr(self, name)
            setattr(self, name, [values[row] for row in staying])
        if self.rows is not None:
            rows = self.rows.select(staying) if gone else self.rows
            self.rows = self._plain(rows) if staying else None
        if evicted and self.signals is not None:
            self.signals.drop(evicted)
        return evicted

    def _plain(self, rows: datasets.Dataset) -> datasets.Dataset:
        """The same rows as one table without history, so that equal buffers are written as equal bytes."""
        table = InMemoryTable(rows.with_format("arrow")[:].combine_chunks())
        info = datasets.DatasetInfo(features=rows.features)
        return datasets.Dataset(table, info=info, fingerprint=_digest(self.ids)[:16])

    # -- state -------------------------------------------------------------------------------------------------------

    def _state(self) -> dict[str, Any]:
        """All but rows and signals, as JSON has it."""
        return {
            "options": self.options(),
            "sizes": self.sizes,
            "names": {str(index): name for index, name in self._names.items()},
            "ids": self.ids,
            "tasks": self.tasks,
            "order": self._order,
            "seen": self._seen,
            "keys": self._keys,
        }

    def save(self, folder: Path) -> None:
        """Write the rows (as `datasets.Dataset.save_to_disk`), the signals, and a record with a hash of every file."""
        folder = Path(folder)
        if folder.is_dir():  # what a process left that was killed while saving
            for path in folder.iterdir():
                if path.is_dir() and path.name != SIGNALS:
                    shutil.rmtree(path)
                elif not path.is_dir():
                    path.unlink()
        folder.mkdir(parents=True, exist_ok=True)
        if self.rows is not None:
            self.rows.save_to_disk(str(folder))
        files = {name: _fingerprint(path) for name, path in sorted(_files(folder).items())}
        if self.signals is not None:
            self.signals.save(folder / SIGNALS)
        record = {"schema": SCHEMA, **self._state(), "signals": self.signals is not None, "files": files}
        write_json(folder / RECORD, {**record, "sha256": _digest(record)})

    def load(self, folder: Path) -> None:
        """Become what was saved in `folder`, which may be deleted afterwards (but for the signals).

        Raises:
            InputError: if a file is missing, damaged or not part of it, or if the options differ.
        """
        folder = Path(folder)
        record = _read_record(folder / RECORD)
        for name, value in self.options().items():
            if record["options"].get(name) != value:
                raise InputError(
                    f"{folder} was filled with {name}={record['options'].get(name)!r} and now it is {value!r}; use the "
                    "same as then, or start again in another run directory"
                )
        if record["signals"] != (self.signals is not None):
            has, wants = ("has", "uses none") if record["signals"] else ("has no", "needs them")
            raise InputError(
                f"{folder} {has} signals of a teacher and this method {wants}; go on with the method that made it"
            )
        found = _files(folder)
        for name in sorted(record["files"].keys() | found.keys()):
            if name not in found:
                raise InputError(f"{folder / name} is missing; {AGAIN}")
            if name not in record["files"]:
                raise InputError(f"{found[name]} is not part of the buffer; remove it")
            if _fingerprint(found[name]) != record["files"][name]:
                raise InputError(f"{found[name]} is truncated or was edited; {AGAIN}")
        # Read into memory, so that the folder may be moved or deleted while the rows are in use.
        rows = datasets.load_from_disk(str(folder), keep_in_memory=True) if record["files"] else None
        if self.signals is not None:
            self.signals.load(folder / SIGNALS)
        self.ids, self.tasks, self._order = record["ids"], record["tasks"], record["order"]
        self._names = {int(index): name for index, name in record["names"].items()}
        self._seen, self._keys = record["seen"], record["keys"]
        self.rows = self._plain(rows) if isinstance(rows, datasets.Dataset) else None


def _files(folder: Path) -> dict[str, Path]:
    """All files of a saved buffer by their relative path, but for the record and the signals, which check their own."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path for name, path in found.items() if name != RECORD and not name.startswith(f"{SIGNALS}/")}


def _fingerprint(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        schema, sealed = record["schema"], record.pop("sha256")
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing; {AGAIN}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path} is truncated or was edited; {AGAIN}") from error
    if schema != SCHEMA:
        raise InputError(
            f"{path} has schema version {schema} and this version reads {SCHEMA}; "
            "continue with the version that made it"
        )
    if _digest(record) != sealed:
        raise InputError(f"{path} was edited; {AGAIN}")
    return dict(record)
