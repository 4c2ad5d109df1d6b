"""What a teacher said about stored rows, on disk: logits at answer positions and the attention of selected heads.

    <folder>/
      <row id>.safetensors   one row, unpadded; memory-mapped when read; carries its key and its own checksum
      index.json             what `save` wrote: the key, and size and sha256 of every row

A row is computed once, by the model as it was after the row's own task, and never changes: every checkpoint and every
learnt task has all rows as hard links, which cost no space. Whoever edits such a file in place edits all of them.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from .errors import InputError
from .run_state import write_json

SCHEMA = 1
INDEX = "index.json"
SUFFIX = ".safetensors"
SIDES = ("input", "decoder")
NO_LINK = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
AGAIN = "restore it from a backup, or learn its task again in another run directory"


@dataclass
class LogitSignal:
    """Logits of one row.

    Attributes:
        positions: [n] where they stand in the unpadded sequence (of the decoder, if there is one); 0 for a classifier.
        values: [n, k] the logits, all of the vocabulary or the k largest.
        indices: [n, k] the vocabulary ids of the k largest; None if all are there, in order.
        lse: [n] log-sum-exp over the whole vocabulary, in float32.

    Without `values` and `lse` it says only where logits are wanted, of a teacher that is asked later.
    """

    positions: Tensor
    values: Tensor | None = None
    indices: Tensor | None = None
    lse: Tensor | None = None

    @classmethod
    def from_logits(
        cls, logits: Tensor, positions: Tensor, top_k: int | None = None, dtype: torch.dtype = torch.float32
    ) -> LogitSignal:
        """Keep `logits` [n, vocabulary], or their `top_k` largest.

        Half precision is for saving space over a full vocabulary: a logit of 16 is off by up to 0.008.
        """
        logits = logits.detach()
        lse = torch.logsumexp(logits.float(), dim=-1)
        indices = None
        if top_k is not None and top_k < logits.shape[-1]:
            logits, indices = logits.topk(top_k, dim=-1)
            indices = indices.int()
        return cls(positions.int(), logits.to(dtype), indices, lse)


@dataclass
class AttentionSignal:
    """Attention of selected heads of one module, for one row.

    Attributes:
        kind: "weights" (probabilities), "outputs" (of the heads) or "qk" (queries and keys as they are multiplied).
        sides: the sequence the queries are of, and the keys: each "input" or "decoder".
        heads: [h]
        rows: [r] query positions in the unpadded sequence.
        values: weights [h, r, keys] or outputs [h, r, head size].
        query: [h, r, size]
        key: [h, keys, size]

    Without the last three it says only which heads and rows are wanted.
    """

    kind: str
    sides: tuple[str, str]
    heads: Tensor
    rows: Tensor
    values: Tensor | None = None
    query: Tensor | None = None
    key: Tensor | None = None


@dataclass
class RowSignals:
    """All signals of one row.

    Attributes:
        lengths: tokens without padding, under "input" and, with an encoder-decoder model, "decoder".
        logits: None if they are not kept.
        attention: by the name of the attention module.
    """

    lengths: dict[str, int]
    logits: LogitSignal | None = None
    attention: dict[str, AttentionSignal] = field(default_factory=dict)


@dataclass(frozen=True)
class _File:
    """A row's file as it was when its content was last seen to be right."""

    path: Path
    bytes: int
    sha256: str
    stamp: tuple[int, int, int]  # device, inode and time: with the size, whether it is still the same file


class SignalStore:
    """Signals of stored rows, one file a row.

    It holds no open files, so it can be pickled and forked. Tensors that were read stay valid when their file is
    deleted, but a row not read before then is lost: train with a store that has a working folder (`work_in`), or with
    one loaded from a folder that stays, such as that of a learnt task.

    Args:
        folder: the working folder. Whole rows that a killed process left there are taken up if they have this key;
            others are left alone and replaced when they are written.
        key: what the signals depend on, such as hashes of the tokenizer and of each teacher. It may grow: a row
            belongs if every item of the key it was written under stands in this one.
    """

    def __init__(self, folder: Path | None = None, key: Mapping[str, str] | None = None) -> None:
        self.key: dict[str, str] = dict(key or {})
        self.folder: Path | None = None
        self._files: dict[str, _File] = {}
        if folder is not None:
            self.work_in(folder)
            for path in sorted(Path(folder).glob(f"*{SUFFIX}")):
                self.has(path.name.removesuffix(SUFFIX))

    # -- rows --------------------------------------------------------------------------------------------------------

    @property
    def ids(self) -> list[str]:
        """The rows there are, sorted."""
        return sorted(self._files)

    def bytes(self) -> int:
        """The size of all rows on disk."""
        return sum(file.bytes for file in self._files.values())

    def has(self, row_id: str) -> bool:
        """Whether the row need not be computed.

        A row of this key that another process left in the working folder counts from now on.
        """
        if row_id in self._files:
            return True
        if self.folder is None:
            return False
        path = self.folder / _file_name(row_id)
        if not path.is_file():
            return False
        try:
            header, tensors = _map(path)
            sealed = header.pop("sha256") == _seal(header, tensors)
        except (SafetensorError, TypeError, KeyError, ValueError):  # truncated, or not one of ours: written again
            return False
        own = sealed and (header["schema"], header["row"]) == (SCHEMA, row_id)
        if not own or not header["key"].items() <= self.key.items():
            return False
        self._files[row_id] = _look(path)
        return True

    def write(self, row_id: str, signals: RowSignals) -> None:
        """Write a row to the working folder, whole or not at all. One that is there already is left as it is."""
        if self.has(row_id):
            return
        if self.folder is None:
            raise RuntimeError("this store has no folder to write to; call work_in first")
        _check_shapes(row_id, signals)
        header, tensors = _to_tensors(row_id, self.key, signals)
        header["sha256"] = _seal(header, tensors)
        # One entry of metadata: with several, the order in the file is random.
        content = to_bytes(tensors, {"signals": json.dumps(header, sort_keys=True)})
        path = self.folder / _file_name(row_id)
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError:
            with suppress(OSError):
                temporary.unlink()
            raise
        self._files[row_id] = _File(path, len(content), hashlib.sha256(content).hexdigest(), _stamp(path))

    def read(self, row_id: str) -> RowSignals:
        """One row, memory-mapped; no other file is touched.

        Raises:
            InputError: if its file is gone or cannot be read.
        """
        if row_id not in self._files:
            raise KeyError(f"the store has no row '{row_id}'")
        path = self._files[row_id].path
        try:
            self._verify(row_id)
            return _from_tensors(*_map(path))
        except InputError:
            raise
        except FileNotFoundError as error:
            raise InputError(f"{path} is missing; {AGAIN}") from error
        except (SafetensorError, TypeError, KeyError, ValueError) as error:
            raise InputError(f"{path} is truncated or was edited ({error}); {AGAIN}") from error

    def _verify(self, row_id: str) -> None:
        """Look at a file again that another process has touched since it was last seen to be right."""
        known = self._files[row_id]
        if _stamp(known.path) == known.stamp and known.path.stat().st_size == known.bytes:
            return
        found = _look(known.path)
        if (found.bytes, found.sha256) != (known.bytes, known.sha256):
            raise InputError(f"{known.path} is truncated or was edited; {AGAIN}")
        self._files[row_id] = found

    def drop(self, ids: Iterable[str]) -> None:
        """Forget rows. Their files are removed from the working folder and from nowhere else."""
        for row_id in ids:
            self._files.pop(row_id, None)
            if self.folder is not None:
                (self.folder / _file_name(row_id)).unlink(missing_ok=True)

    # -- folders -----------------------------------------------------------------------------------------------------

    def work_in(self, folder: Path) -> None:
        """Write new rows to `folder` and have all others there too, as hard links.

        From then on the store needs no other folder: the checkpoint it was loaded from may be deleted.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._files = {row_id: _moved(file, folder) for row_id, file in self._files.items()}
        self.folder = folder

    def save(self, folder: Path) -> None:
        """Make `folder` whole by itself: a hard link for each row (a copy on another file system) and the index."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for file in self._files.values():
            _moved(file, folder)
        rows = {row: {"bytes": self._files[row].bytes, "sha256": self._files[row].sha256} for row in self.ids}
        write_json(folder / INDEX, {"schema": SCHEMA, "key": dict(sorted(self.key.items())), "rows": rows})

    def load(self, folder: Path) -> None:
        """Become what was saved in `folder`. The rows are read there, or linked into the working folder if it exists.

        Raises:
            InputError: if a file is missing, truncated or changed, or if the key contradicts this store's.
        """
        folder = Path(folder)
        key, rows = _read_index(folder / INDEX)
        _compare({name: value for name, value in self.key.items() if name in key}, key, folder)
        known = {file.stamp: file for file in self._files.values()}
        files = {}
        for row_id, expected in rows.items():
            path = folder / _file_name(row_id)
            if not path.is_file():
                raise InputError(f"{path} is missing; {AGAIN}")
            # A hard link to a file that this store has read or written needs no second look.
            file = known.get(_stamp(path))
            if file is not None and file.bytes == path.stat().st_size:
                file = _File(path, file.bytes, file.sha256, file.stamp)
            else:
                file = _look(path)
            if (file.bytes, file.sha256) != expected:
                raise InputError(f"{path} is truncated or was edited; {AGAIN}")
            files[row_id] = file
        self.key, self._files = key, files
        # The working folder of a task that is learnt is removed behind the store's back.
        if self.folder is not None and self.folder.is_dir():
            self.work_in(self.folder)
        else:
            self.folder = None

    def check(self, key: Mapping[str, str]) -> None:
        """Refuse signals that were made under another key.

        Raises:
            InputError: if an item of `key` is missing in the store's or differs.
        """
        _compare(key, self.key, self.folder)


def teacher_hash(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, types, shapes and bytes, whatever the order of the mapping."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        # As bytes, since numpy knows no bfloat16.
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


# -- one row and its file ----------------------------------------------------------------------------------------------


def _to_tensors(row_id: str, key: Mapping[str, str], signals: RowSignals) -> tuple[dict[str, Any], dict[str, Tensor]]:
    parts: dict[str, Any] = {} if signals.logits is None else {"logits": signals.logits}
    described = []
    for number, (name, attention) in enumerate(sorted(signals.attention.items())):
        described.append({"name": name, "kind": attention.kind, "sides": list(attention.sides)})
        parts[f"attention.{number}"] = attention
    tensors = {
        # A copy, since safetensors takes no tensors that share memory, as the query rows of two modules may.
        f"{part}.{f.name}": getattr(value, f.name).detach().cpu().clone(memory_format=torch.contiguous_format)
        for part, value in parts.items()
        for f in fields(value)
        if torch.is_tensor(getattr(value, f.name))
    }
    lengths = {side: int(length) for side, length in signals.lengths.items()}
    header = {"schema": SCHEMA, "row": row_id, "key": dict(key), "lengths": lengths, "attention": described}
    return header, tensors


def _map(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header and the tensors of a file, which are read from disk where they are used."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        return json.loads(file.metadata()["signals"]), tensors


def _from_tensors(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> RowSignals:
    def part(name: str) -> dict[str, Any]:
        return {key.rpartition(".")[2]: value for key, value in tensors.items() if key.rpartition(".")[0] == name}

    logits = part("logits")
    attention = {
        spec["name"]: AttentionSignal(spec["kind"], tuple(spec["sides"]), **part(f"attention.{number}"))
        for number, spec in enumerate(header["attention"])
    }
    return RowSignals(dict(header["lengths"]), LogitSignal(**logits) if logits else None, attention)


def _seal(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """A checksum that a row's file carries itself, so that it can be believed without an index."""
    return hashlib.sha256((json.dumps(header, sort_keys=True) + teacher_hash(tensors)).encode()).hexdigest()


def _check_shapes(row_id: str, signals: RowSignals) -> None:
    """Refuse signals that could not be put into a batch; whoever captured them is at fault, not the user."""
    lengths, logits = signals.lengths, signals.logits
    if logits is not None:
        side = "decoder" if "decoder" in lengths else "input"
        shapes = {part.shape[:1] for part in (logits.positions, logits.values, logits.lse) if part is not None}
        whole = logits.values is not None and logits.lse is not None
        if len(shapes) > 1 or not whole or (len(logits.positions) and int(logits.positions.max()) >= lengths[side]):
            raise ValueError(f"row '{row_id}': the logits do not fit their positions in {lengths[side]} tokens")
    for name, signal in signals.attention.items():
        queries, keys = (lengths[side] for side in signal.sides)
        heads, rows = len(signal.heads), len(signal.rows)
        needed: dict[str, dict[str, tuple[int, ...]]] = {
            "weights": {"values": (heads, rows, keys)},
            "outputs": {"values": (heads, rows)},
            "qk": {"query": (heads, rows), "key": (heads, keys)},
        }
        for part, shape in needed[signal.kind].items():
            value = getattr(signal, part)
            if value is None or value.dim() != 3 or tuple(value.shape[: len(shape)]) != shape:
                found = None if value is None else tuple(value.shape)
                raise ValueError(f"row '{row_id}', {name}: {signal.kind} need {part} of {shape}, not {found}")
        if rows and int(signal.rows.max()) >= queries:
            raise ValueError(f"row '{row_id}', {name}: a query position is beyond the {queries} tokens")


def _file_name(row_id: str) -> str:
    if not re.fullmatch(r"\w[\w.-]*", row_id):
        raise ValueError(f"row id {row_id!r}: use letters, digits, '_', '-' and '.'")
    return f"{row_id}{SUFFIX}"


def _stamp(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_mtime_ns


def _look(path: Path) -> _File:
    with open(path, "rb") as file:
        return _File(path, path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest(), _stamp(path))


def _moved(file: _File, folder: Path) -> _File:
    """The same file in `folder`, by a hard link or, where there is none, a copy."""
    target = folder / file.path.name
    temporary = folder / f".{file.path.name}.{uuid.uuid4().hex}.tmp"  # all ranks may do this at once
    try:
        with suppress(FileNotFoundError):
            if os.path.samefile(file.path, target):
                return _File(target, file.bytes, file.sha256, file.stamp)
        try:
            os.link(file.path, temporary)
        except OSError as error:
            if error.errno not in NO_LINK:
                raise
            shutil.copyfile(file.path, temporary)
            with open(temporary, "rb+") as copied:
                os.fsync(copied.fileno())
        os.replace(temporary, target)
    except FileNotFoundError as error:
        raise InputError(f"{file.path} is missing; {AGAIN}") from error
    finally:
        with suppress(OSError):  # os.replace leaves it where another rank put the same file first
            temporary.unlink()
    return _File(target, file.bytes, file.sha256, _stamp(target))


def _read_index(path: Path) -> tuple[dict[str, str], dict[str, tuple[int, str]]]:
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        schema = index["schema"]
        rows = {row_id: (entry["bytes"], entry["sha256"]) for row_id, entry in index["rows"].items()}
        key = dict(index["key"])
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing; {AGAIN}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path} is truncated or was edited; {AGAIN}") from error
    if schema != SCHEMA:
        raise InputError(
            f"{path} has schema version {schema} and this version reads {SCHEMA}; "
            "continue with the version that made it"
        )
    return key, rows


def _compare(wanted: Mapping[str, str], found: Mapping[str, str], folder: Path | None) -> None:
    for name, value in wanted.items():
        if found.get(name) != value:
            raise InputError(
                f"the teacher signals{f' in {folder}' if folder else ''} were made with {name}={found.get(name)!r} and "
                f"now it is {value!r}; use the same as then, or start again in another run directory"
            )


__all__ = ["AttentionSignal", "LogitSignal", "RowSignals", "SignalStore", "teacher_hash"]
