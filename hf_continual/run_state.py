"""The run directory: its layout, atomic commits, checks on loading. No other file writes into it.

    run/
      recipe.yaml           the resolved recipe
      queue.json            schema, tasks, cursor (tasks learnt and scored), seed, versions: written last, the commit
      scores.jsonl          one JSON object per evaluated cell R[after_task, task]
      general.jsonl         one per measurement of general ability, with the change against the base model
      tasks/00-name/        one learnt task, renamed into place when complete
        adapter/            one PEFT adapter (all of the task's adapters together), loadable with plain peft; or
        model/              the full model, loadable with plain transformers
        adapters/           each adapter on its own, where there are several
        methods/            state of the methods (safetensors + JSON)
        log.json            the Trainer's log
        manifest.json       size and checksum of every file above
        predictions/        <task>.jsonl: raw predictions; <task>.json: score, settings; <task>.rank0.partial: answers
                            of a cell that is being scored
        general/            <probe>.json: what a probe of general ability found; <probe>.jsonl: each prompt or task
      work/00-name/         checkpoints of the task being learnt
      rehearsal/00-name/    before-1/, ...: the task's folder as it was before each rehearsal of the forgetting gate
      rejected/01-name/     a task that the gate took out of the run, with every score of it; nothing reads it

A process may die at any moment: a task is either renamed into place or learnt again from its last checkpoint.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from .errors import InputError
from .tasks import Task

SCHEMA = 1
PARTIAL = ".partial"
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
        found = [self.tasks, self.path / "base" / "predictions", self.path / "base" / "general"]
        if any(folder.is_dir() and any(p.suffix != PARTIAL for p in folder.iterdir()) for folder in found):
            return True
        if any((self.path / "work").glob("*/checkpoint-*/trainer_state.json")):
            return True
        queue = self.path / "queue.json"
        return queue.exists() and (not isinstance(read := try_json(queue), dict) or read.get("schema") != SCHEMA)

    def start(self, recipe: dict[str, Any]) -> None:
        """Record a new run's recipe, over that of an attempt which learnt nothing."""
        for stale in ("queue.json", "scores.jsonl", "general.jsonl"):
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

    def commit_task(self, task: Task, write: Callable[[Path], None], into: Path | None = None) -> None:
        """Let `write` fill a new folder, then move it into place in one step and drop the checkpoints.

        `into`: another place than the task's own.
        """
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
            target = into or self.task_folder(task)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(temporary, target)
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

    # -- what the forgetting gate changes ----------------------------------------------------------------------------

    def rehearsal_folder(self, task: Task) -> Path:
        return self.path / "rehearsal" / task.folder

    def rehearsals(self, task: Task) -> int:
        """How many rehearsals have taken the task's place."""
        return len(list(self.rehearsal_folder(task).glob("before-*")))

    def take_rehearsed(self, task: Task) -> None:
        """Put a rehearsal that is finished, if there is one, into the task's place; it may be killed anywhere."""
        for after in sorted(self.rehearsal_folder(task).glob("after-*")):
            self._drop_scores(task)
            before = after.with_name(after.name.replace("after", "before"))
            if not before.is_dir():
                os.replace(self.task_folder(task), before)
            os.replace(after, self.task_folder(task))

    def _drop_scores(self, task: Task) -> None:
        """Take what was scored after a task out of scores.jsonl, before it is scored anew."""
        path = self.path / "scores.jsonl"
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            write_text(path, "".join(line for line in lines if json.loads(line)["after_task"] != task.name))

    def rejected_folder(self, entry: dict[str, Any]) -> Path:
        return self.path / "rejected" / str(entry["folder"])

    def settle_rejected(self, entry: dict[str, Any], learnt: list[Task], stream: list[Task]) -> None:
        """Move everything of a rejected task out of the way; its own folder last, which says that all is done.

        Args:
            entry: as in queue.json, which lists the task no more.
            learnt, stream: as they are without it.
        """
        folder = self.tasks / str(entry["folder"])
        if not folder.is_dir():
            return
        for after in [None, *learnt]:
            scored = self.prediction_folder(after)
            kept = folder / "scored_before" / (after.folder if after is not None else "base")
            for path in (scored / f"{entry['name']}{suffix}" for suffix in (".jsonl", ".json")):
                if path.is_file():
                    kept.mkdir(parents=True, exist_ok=True)
                    os.replace(path, kept / path.name)
            for task in stream:  # those that came after it have moved up
                path = scored / f"{task.name}.json"
                if isinstance(row := try_json(path), dict) and row.get("task_index") != task.index:
                    write_json(path, {**row, "task_index": task.index})
        for place in ("work", "rehearsal"):
            own = self.path / place / folder.name
            if place == "rehearsal" and own.is_dir():
                os.replace(own, folder / place)
            shutil.rmtree(own, ignore_errors=True)
            with suppress(OSError):
                own.parent.rmdir()
        self.write_scores(self.cells(learnt, stream))
        target = self.rejected_folder(entry)
        target.parent.mkdir(exist_ok=True)
        os.replace(folder, target)

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

    def answers(self, after: Task | None, task: Task, model_key: str, rank: int) -> PartialAnswers:
        """Where the answers of a cell are kept while it is scored; see `model_key`."""
        # A rank on another host, without the run directory, makes none there.
        folder = self.prediction_folder(after) if (self.path / "queue.json").exists() else None
        return PartialAnswers(folder, task.name, model_key, rank)

    def model_key(self, after: Task | None) -> str:
        """Which model a cell is scored with: a hash of what was committed, or of the recipe for none."""
        path = self.task_folder(after) / "manifest.json" if after is not None else self.path / "recipe.yaml"
        return _checksum(path)

    def drop_answers(self) -> None:
        """Remove the answers of cells that are scored, left where a process died just after one was written."""
        for path in [*self.tasks.glob(f"*/predictions/*{PARTIAL}"), *self.path.glob(f"base/predictions/*{PARTIAL}")]:
            if path.with_suffix("").with_suffix(".json").is_file():
                path.unlink(missing_ok=True)

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

    # -- general ability ---------------------------------------------------------------------------------------------

    def general_file(self, after: Task | None, probe: str) -> Path:
        """What a probe found after learning `after`; `None` is the model before any task."""
        return (self.task_folder(after) if after is not None else self.path / "base") / "general" / f"{probe}.json"

    def has_general(self, after: Task | None, probe: str) -> bool:
        return self.general_file(after, probe).is_file()

    def write_general(self, after: Task | None, probe: str, measured: Any, seconds: float) -> None:
        """The details first: the result counts once its file is there."""
        path = self.general_file(after, probe)
        lines = [json.dumps(row, ensure_ascii=False) for row in measured.details]
        write_text(path.with_suffix(".jsonl"), "\n".join(lines) + "\n")
        row = {**self._place(after), "probe": probe, "values": measured.values}
        write_json(path, {**row, "settings": measured.settings, "seconds": seconds})

    def read_general(self, after: Task | None, probe: str) -> dict[str, Any] | None:
        """`values`, `settings` and `seconds` of a result; None if it was not measured.

        Raises:
            InputError: for a file that was edited.
        """
        path = self.general_file(after, probe)
        if not path.is_file():
            return None
        row = try_json(path)
        expected = {**self._place(after), "probe": probe}
        if (
            not isinstance(row, dict)
            or any(row.get(key, "") != value for key, value in expected.items())
            or not all(isinstance(row.get(key), dict) for key in ("values", "settings"))
        ):
            raise InputError(f"{path} is truncated or was edited; delete it and run again, it is then measured again")
        return row

    def write_general_log(self, rows: list[dict[str, Any]]) -> None:
        """general.jsonl, made anew from the results of the tasks; nothing where there are none."""
        if rows:
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            write_text(self.path / "general.jsonl", text)
        else:
            (self.path / "general.jsonl").unlink(missing_ok=True)

    @staticmethod
    def _place(after: Task | None) -> dict[str, Any]:
        return {
            "after_task": after.name if after is not None else None,
            "after_index": after.index if after is not None else -1,
        }


class PartialAnswers:
    """The answers to some rows of a cell, one file a rank: a line for each row, added as its group of batches is done.

    A process may die at any moment: what follows the last whole line is dropped, and so is what belongs to another
    model, other rows or other settings.
    """

    def __init__(self, folder: Path | None, task: str, model_key: str, rank: int) -> None:
        self._folder, self._task, self._model_key, self._rank = folder, task, model_key, rank
        self._own = folder / f"{task}.rank{rank}{PARTIAL}" if folder is not None else None

    def begin(self, key: str) -> dict[int, Any]:
        """What all ranks have left here for this model and `key`; this rank goes on with its own file."""
        if self._folder is None or self._own is None:
            return {}
        self._folder.mkdir(parents=True, exist_ok=True)
        head = json.dumps({"key": hashlib.sha256(f"{self._model_key} {key}".encode()).hexdigest()})
        found: dict[int, Any] = {}
        kept = head + "\n"
        for path in sorted(self._folder.glob(f"{self._task}.rank*{PARTIAL}")):
            with suppress(FileNotFoundError):  # of a rank that drops it
                lines = self._whole_lines(path)
                if lines[:1] == [head]:
                    found |= {row: answer for row, answer in map(json.loads, lines[1:])}
                    if path == self._own:
                        kept = "".join(line + "\n" for line in lines)
        write_text(self._own, kept)
        return found

    @staticmethod
    def _whole_lines(path: Path) -> list[str]:
        lines: list[str] = []
        for line in path.read_bytes().split(b"\n")[:-1]:
            try:
                json.loads(line)
            except ValueError:
                break
            lines.append(line.decode())
        return lines

    def add(self, found: Mapping[int, Any]) -> None:
        if self._own is not None:
            with open(self._own, "a", encoding="utf-8") as file:
                file.write("".join(json.dumps(item) + "\n" for item in found.items()))

    def drop(self) -> None:
        """Once the cell is written."""
        if self._folder is not None and self._own is not None:
            for path in self._folder.glob(f"{self._task}.rank*{PARTIAL}") if self._rank == 0 else [self._own]:
                path.unlink(missing_ok=True)


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
