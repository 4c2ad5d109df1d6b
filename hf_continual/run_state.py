"""The run directory: its layout, atomic commits, checks on loading. No other file writes into it.

    run/
      recipe.yaml           the resolved recipe
      queue.json            schema, tasks, cursor (tasks learnt and scored), seed, versions: written last, the commit
      scores.jsonl          one JSON object per evaluated cell R[after_task, task]
      tasks/00-name/        one learnt task, renamed into place when complete
        adapter/            one PEFT adapter (all of the task's adapters together), loadable with plain peft; or
        model/              the full model, loadable with plain transformers
        adapters/           each adapter on its own, where there are several
        methods/            state of the methods (safetensors + JSON)
        log.json            the Trainer's log
        manifest.json       size and checksum of every file above
        predictions/        <task>.jsonl: raw predictions; <task>.json: score, settings
      work/00-name/         checkpoints of the task being learnt

A process may die at any moment: a task is either renamed into place or learnt again from its last checkpoint.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from .errors import InputError
from .tasks import Task

SCHEMA = 1
HASHED_BYTES = 256 * 2**20  # larger files are checked by size alone, so that opening a 7B run stays quick


def write_text(path: Path, text: str) -> None:
    """Write a whole file or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Raises InputError if the file is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing; restore it, or start again in another run directory") from error
    except (ValueError, OSError) as error:
        raise InputError(
            f"{path} is truncated or was edited ({error}); restore it from a backup, or start again in another run "
            "directory (the adapters and models in tasks/ stay usable)"
        ) from error


def try_json(path: Path) -> Any:
    try:
        return read_json(path)
    except InputError:
        return None


def _checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


class RunDirectory:
    """One run on disk.

    Args:
        path: the directory; created by `create`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.tasks = self.path / "tasks"
        self._lock: Any = None

    @property
    def exists(self) -> bool:
        return (self.path / "queue.json").exists() or self.tasks.exists()

    @property
    def holds_learning(self) -> bool:
        """Whether anything would be lost by starting anew: a task, a score or a whole checkpoint."""
        found = [self.tasks, self.path / "base" / "predictions"]
        if any(folder.is_dir() and any(folder.iterdir()) for folder in found):
            return True
        if any((self.path / "work").glob("*/checkpoint-*/trainer_state.json")):
            return True
        queue = self.path / "queue.json"
        return queue.exists() and (not isinstance(read := try_json(queue), dict) or read.get("schema") != SCHEMA)

    def start(self, recipe: dict[str, Any]) -> None:
        """Record a new run's recipe, over that of an attempt which learnt nothing."""
        for stale in ("queue.json", "scores.jsonl"):
            (self.path / stale).unlink(missing_ok=True)
        shutil.rmtree(self.path / "work", ignore_errors=True)
        write_text(self.path / "recipe.yaml", yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One process at a time works in a run directory."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = open(self.path / ".lock", "w")  # noqa: SIM115 - closed below
        except OSError as error:
            if disk_full(error):
                raise
            raise InputError(
                f"run_dir={self.path}: no folder can be made or written there ({error.strerror}); give another run_dir"
            ) from error
        with lock as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise InputError(
                    f"run directory {self.path} is in use by another process; wait for it or use another"
                ) from error
            try:
                yield
            finally:
                fcntl.flock(file, fcntl.LOCK_UN)

    # -- queue.json --------------------------------------------------------------------------------------------------

    def read_queue(self) -> dict[str, Any]:
        """Raises InputError for a missing, damaged or foreign queue.json."""
        queue = read_json(self.path / "queue.json")
        if not isinstance(queue, dict) or "schema" not in queue:
            raise InputError(f"{self.path / 'queue.json'} is no queue of hf_continual; use another run directory")
        if queue["schema"] != SCHEMA:
            raise InputError(
                f"run directory {self.path} has schema version {queue['schema']} and this version reads {SCHEMA}; "
                "continue it with the version that made it, or use another run directory"
            )
        tasks, cursor = queue.get("tasks"), queue.get("cursor")
        entries = isinstance(tasks, list) and all(isinstance(t, dict) and {"name", "hash"} <= t.keys() for t in tasks)
        if not entries or type(cursor) is not int or not 0 <= cursor <= len(tasks):  # type: ignore[arg-type]
            raise InputError(f"{self.path / 'queue.json'} was edited: its tasks and cursor do not fit; restore it")
        return queue

    def write_queue(self, queue: dict[str, Any]) -> None:
        write_json(self.path / "queue.json", {"schema": SCHEMA, **queue})

    def recipe_checksum(self) -> str | None:
        path = self.path / "recipe.yaml"
        return _checksum(path) if path.is_file() else None

    def read_recipe(self) -> dict[str, Any]:
        path = self.path / "recipe.yaml"
        try:
            recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise InputError(f"{path} is missing; {self.path} is no run directory") from error
        except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path} is truncated or was edited; restore it") from error
        if not isinstance(recipe, dict):
            raise InputError(f"{path} is truncated or was edited; restore it")
        return recipe

    # -- tasks -------------------------------------------------------------------------------------------------------

    def task_folder(self, task: Task) -> Path:
        return self.tasks / task.folder

    def work_folder(self, task: Task) -> Path:
        """Where the task's checkpoints lie while it is learnt."""
        return self.path / "work" / task.folder

    def is_learnt(self, task: Task) -> bool:
        return self.task_folder(task).is_dir()

    def commit_task(self, task: Task, write: Callable[[Path], None]) -> None:
        """Let `write` fill a new folder, then move it into place in one step and drop the checkpoints."""
        temporary = self.path / "work" / f"{task.folder}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            write(temporary)
            files = sorted(p for p in temporary.rglob("*") if p.is_file())
            manifest = {
                str(p.relative_to(temporary)): {
                    "bytes": p.stat().st_size,
                    **({"sha256": _checksum(p)} if p.stat().st_size <= HASHED_BYTES else {}),
                }
                for p in files
            }
            write_json(temporary / "manifest.json", manifest)
            self.tasks.mkdir(exist_ok=True)
            os.replace(temporary, self.task_folder(task))
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        self.drop_work(task)

    def drop_work(self, task: Task) -> None:
        """Remove the checkpoints of a task."""
        shutil.rmtree(self.work_folder(task), ignore_errors=True)
        with suppress(OSError):
            self.work_folder(task).parent.rmdir()

    def check_task(self, task: Task) -> None:
        """Raises InputError if a file of a learnt task is missing or changed."""
        folder = self.task_folder(task)
        manifest = read_json(folder / "manifest.json")
        if not isinstance(manifest, dict) or not all(isinstance(v, dict) and "bytes" in v for v in manifest.values()):
            raise InputError(
                f"{folder / 'manifest.json'} was edited; restore it, or start again in another run directory"
            )
        for name, expected in manifest.items():
            path = folder / name
            if not path.is_file():
                raise InputError(f"{path} is missing; restore it, or start again in another run directory")
            if path.stat().st_size != expected["bytes"] or (
                "sha256" in expected and _checksum(path) != expected["sha256"]
            ):
                raise InputError(
                    f"{path} is truncated or was edited; restore it, or start again in another run directory"
                )

    # -- scores ------------------------------------------------------------------------------------------------------

    def prediction_folder(self, after: Task | None) -> Path:
        """Predictions made after learning `after`; `None` is the model before any task."""
        return (self.task_folder(after) if after is not None else self.path / "base") / "predictions"

    def has_cell(self, after: Task | None, task: Task) -> bool:
        return (self.prediction_folder(after) / f"{task.name}.json").is_file()

    def write_cell(self, after: Task | None, task: Task, cell: Any) -> None:
        """The predictions first: the cell counts once its score is there."""
        folder = self.prediction_folder(after)
        lines = [json.dumps(p, ensure_ascii=False) for p in cell.predictions]
        write_text(folder / f"{task.name}.jsonl", "\n".join(lines) + "\n")
        row = {
            "after_task": after.name if after is not None else None,
            "after_index": after.index if after is not None else -1,
            "task": task.name,
            "task_index": task.index,
            "metric": cell.metric,
            "score": cell.score,
            "n": cell.n,
            "others": cell.others,
        }
        write_json(folder / f"{task.name}.json", {**row, "settings": cell.settings})

    def cells(self, learnt: list[Task], scored: list[Task]) -> list[dict[str, Any]]:
        """All evaluated cells in the order of the stream."""
        rows = []
        for after in [None, *learnt]:
            for task in scored:
                if self.has_cell(after, task):
                    rows.append(self._read_cell(after, task))
        return rows

    def _read_cell(self, after: Task | None, task: Task) -> dict[str, Any]:
        path = self.prediction_folder(after) / f"{task.name}.json"
        row = try_json(path)
        expected = {
            "after_task": after.name if after is not None else None,
            "after_index": after.index if after is not None else -1,
            "task": task.name,
            "task_index": task.index,
        }
        if (
            not isinstance(row, dict)
            or any(row.get(key, "") != value for key, value in expected.items())
            or not isinstance(row.get("score"), float)
        ):
            raise InputError(
                f"{path} is truncated or was edited; delete it and run again, the task is then scored again"
            )
        row.pop("settings", None)
        return row

    def write_scores(self, rows: list[dict[str, Any]]) -> None:
        write_text(self.path / "scores.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    def check_scores(self, rows: list[dict[str, Any]], names: set[str]) -> None:
        """Raises InputError if scores.jsonl does not say what the cells of the committed tasks say.

        A line of a known task (one of `names`) whose cell was deleted passes: it is scored again.
        """
        path = self.path / "scores.jsonl"
        if not path.exists():
            return
        known = {(row["after_task"], row["task"]): row for row in rows}
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            try:
                row = json.loads(line)
                cell = row["after_task"], row["task"]
                same = known[cell] == row if cell in known else {*cell} <= {None, *names}
            except (ValueError, KeyError, TypeError):
                same = False
            if not same:
                raise InputError(
                    f"{path} line {number} is truncated or was edited, or the prediction file behind it; "
                    f"delete {path.name} "
                    "and run again, it is rebuilt from tasks/*/predictions"
                )


def disk_full(error: BaseException) -> bool:
    """Whether an error from anywhere below (torch and safetensors raise their own) means a full disk."""
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, OSError) and chain.errno in (28, 122, 27):  # ENOSPC, EDQUOT, EFBIG
            return True
        text = str(chain)
        if any(
            sign in text
            for sign in (
                "No space left",
                "os error 28",
                "os error 122",
                "os error 27",
                "PytorchStreamWriter failed",
                "iostream error",
            )
        ):
            return True
        chain = chain.__cause__ or chain.__context__
    return False


LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused", "Socket Timeout",
        "Timed out waiting", "NCCL error", "failed to recv", "Connection was likely closed")  # fmt: skip


def peer_lost(error: BaseException) -> bool:
    """Whether a collective failed because another process of the run is gone; torch says so only in words."""
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, RuntimeError) and any(sign in str(chain) for sign in LOST):
            return True
        chain = chain.__cause__ or chain.__context__
    return False
