"""The forgetting gate: after each task, has a task seen before lost more of its score than is allowed?

    loss_j = max_{j <= i < k} R[i, j] - R[k, j]                   k: the task just learnt, j < k one seen before it

which is `metrics.forgetting` task by task. Where less is better, as of a perplexity, the loss is the relative increase
R[k, j] / min_{j <= i < k} R[i, j] - 1. The largest loss (or the mean, with `measure: mean`) may be `max_forgetting` at
most. If it is more, `on_violation` says what happens:

    stop      the queue ends, with everything kept; the same command says so again and trains nothing
    rollback  the task is taken out of the run, which goes on with the next one as if it had never had that task
    rehearse  some rows of all tasks seen so far are trained on once more and the scores taken anew; at last stop

The verdict follows from the scores alone, so a run that is killed comes to the same one when it goes on.
"""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from .errors import ForgettingLimit, InputError, Interrupted, build, refuse_unknown
from .run_state import read_json, write_json
from .scorers import lower_is_better

if TYPE_CHECKING:
    from .methods.base import MethodList
    from .run_scores import RunScores
    from .task_queue import TaskQueue

__all__ = ["ForgettingGate", "GateConfig", "Verdict", "gate_section", "judge", "make_gate"]

OnViolation = Literal["stop", "rollback", "rehearse"]
ROUNDING = 1e-9
"""A loss may be that much above the limit: 0.9 - 0.85 is a little more than 0.05."""


@dataclass
class GateConfig:
    """The recipe's `gate:` section."""

    max_forgetting: float = field(
        metadata={"help": "The most a task may lose, in the unit of its score: 0.05 is 5 points of percent."}
    )
    on_violation: OnViolation = field(
        default="stop", metadata={"help": "stop; rollback (leave the task out and go on); rehearse (old rows again)."}
    )
    measure: Literal["max", "mean"] = field(
        default="max",
        metadata={"help": "What may not exceed the limit: the largest loss of a task (default), or the mean of all."},
    )
    rehearsal_source: Literal["tasks", "buffer"] = field(
        default="tasks",
        metadata={"help": "tasks: a share of each task's training rows. buffer: the rows that a method has kept."},
    )
    rehearsal_ratio: float = field(
        default=0.1, metadata={"help": "Share of every task's rows, the new one's too, so that it is not lost in turn."}
    )
    rehearsal_epochs: float = field(default=1.0, metadata={"help": "Epochs over these rows in each round."})
    rehearsal_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the rehearsal; default: that of the training."}
    )
    rehearsal_rounds: int = field(default=3, metadata={"help": "Rounds before the queue stops after all."})

    def __post_init__(self) -> None:
        limit = self.max_forgetting
        if not _number(limit) or not 0 <= limit <= 1:
            raise InputError(
                f"gate.max_forgetting={limit!r} must be a number from 0 to 1, in the unit of the scores: 0.05 is 5 "
                "points of percent"
            )
        choices = {"on_violation": get_args(OnViolation), "measure": ("max", "mean"),
                   "rehearsal_source": ("tasks", "buffer")}  # fmt: skip
        for option, allowed in choices.items():
            if getattr(self, option) not in allowed:
                raise InputError(
                    f"gate.{option}={getattr(self, option)!r} is unknown; choose {', '.join(map(str, allowed))}"
                )
        if not _number(self.rehearsal_ratio) or not 0 < self.rehearsal_ratio <= 1:
            raise InputError(f"gate.rehearsal_ratio={self.rehearsal_ratio!r} must lie in (0, 1]")
        for option in ("rehearsal_epochs", "rehearsal_learning_rate"):
            value = getattr(self, option)
            if value is not None and (not _number(value) or not value > 0) or (value is None and "epochs" in option):
                raise InputError(f"gate.{option}={value!r} must be a number above 0")
        rounds = self.rehearsal_rounds
        if not isinstance(rounds, int) or isinstance(rounds, bool) or rounds < 1:
            raise InputError(f"gate.rehearsal_rounds={rounds!r} must be a whole number, at least 1")
        if self.on_violation != "rehearse":
            for known in dataclasses.fields(self):
                given = getattr(self, known.name)
                if known.name.startswith("rehearsal_") and given != known.default:
                    raise InputError(
                        f"gate.{known.name}={given!r} is for on_violation='rehearse', not '{self.on_violation}'; "
                        "leave it out"
                    )


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def make_gate(gate: GateConfig | Mapping[str, Any] | None) -> GateConfig | None:
    """The gate of a recipe's section or of its options; None for none.

    Raises:
        InputError: for an unknown option or a value that cannot be.
    """
    if isinstance(gate, Mapping):
        refuse_unknown(gate, [known.name for known in dataclasses.fields(GateConfig)], "gate.")
    if isinstance(gate, Mapping) and "max_forgetting" not in gate:
        raise InputError(
            "gate.max_forgetting is missing; say how much a task may lose, for example --max_forgetting 0.05"
        )
    return None if gate is None else build(GateConfig, gate, "gate")


# -- the verdict -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """What the scores after one task say.

    Attributes:
        task: the task just learnt.
        losses: by each task seen before it; below 0 where the score rose.
        scores: (best score before, score now) of the same tasks.
        metrics: their names.
        rising: those of which less is better.
    """

    task: str
    losses: dict[str, float]
    scores: dict[str, tuple[float, float]]
    metrics: dict[str, str]
    limit: float
    measure: str
    rising: list[str] = field(default_factory=list)

    @property
    def worst(self) -> str:
        """The task that lost most."""
        return max(self.losses, key=self.losses.__getitem__)

    @property
    def max(self) -> float:
        return self.losses[self.worst]

    @property
    def mean(self) -> float:
        return sum(self.losses.values()) / len(self.losses)

    @property
    def violated(self) -> bool:
        return bool(self.losses) and not (self.max if self.measure == "max" else self.mean) <= self.limit + ROUNDING

    @property
    def line(self) -> str:
        """Both numbers and the verdict, in percent."""
        verdict = "exceeded" if self.violated else "kept"
        return (
            f"gate after {self.task}: {self.worst} lost {points(self.max)}, {points(self.mean)} on average of "
            f"{len(self.losses)}; limit {points(self.limit)} for the {'worst' if self.measure == 'max' else 'mean'}: "
            f"{verdict}"
        )

    @property
    def sentence(self) -> str:
        """Task, loss and limit."""
        from .run_scores import shown

        best, now = self.scores[self.worst]
        metric = self.metrics[self.worst]
        if self.worst in self.rising:
            what = f"the {metric} of task '{self.worst}' rose by {points(self.max)} %"
        else:
            what = f"task '{self.worst}' lost {points(self.max)} points of {metric}"
        what += f" ({shown(metric, best)} -> {shown(metric, now)})"
        mean = f" and the mean loss is {points(self.mean)}" if self.measure == "mean" else ""
        return (
            f"after task '{self.task}' {what}{mean}, more than gate.max_forgetting={self.limit:g} allows "
            f"({points(self.limit)})"
        )

    def record(self) -> dict[str, Any]:
        """What queue.json keeps of a task that was rejected."""
        return {
            "worst": self.worst,
            "max": self.max,
            "mean": self.mean,
            "limit": self.limit,
            "measure": self.measure,
            "losses": self.losses,
        }


def points(value: float) -> str:
    return f"{100 * value + 0.0:.1f}"


def loss_of(earlier: Sequence[float], now: float, higher: bool) -> float:
    """How much is lost since the best of the earlier scores; relative to it where less is better.

    A score that is no number any more counts as lost altogether.
    """
    if not math.isfinite(now):
        return math.inf
    if higher:
        return max(earlier) - now
    best = min(earlier)
    return now / best - 1 if best > 0 else (0.0 if now <= best else math.inf)


def judge(rows: Sequence[Mapping[str, Any]], index: int, gate: GateConfig) -> Verdict:
    """The verdict after task `index`, from cells as scores.jsonl has them.

    Raises:
        InputError: if a score is missing that it needs.
    """
    cells = {(row["after_index"], row["task_index"]): row for row in rows}
    losses, scores, metrics, rising = {}, {}, {}, []
    for seen in range(index):
        for moment in range(seen, index + 1):
            if (moment, seen) not in cells:
                raise InputError(
                    f"the gate needs the score of task {seen} after task {moment}, which is not there; run the same "
                    "command again to score it"
                )
        row = cells[index, seen]
        earlier = [float(cells[moment, seen]["score"]) for moment in range(seen, index)]
        name, now, higher = str(row["task"]), float(row["score"]), not lower_is_better(str(row["metric"]))
        losses[name] = loss_of(earlier, now, higher)
        scores[name] = ((max if higher else min)(earlier), now)
        metrics[name] = str(row["metric"])
        rising += [] if higher else [name]
    after = str(cells[index, index]["after_task"])
    return Verdict(after, losses, scores, metrics, gate.max_forgetting, gate.measure, rising)


# -- what follows ----------------------------------------------------------------------------------------------------


class ForgettingGate:
    """The gate of one queue. Every process calls it; rank 0 judges and writes.

    Args:
        queue: whose parts it uses.
        config: limit and what to do.
    """

    def __init__(self, queue: TaskQueue, config: GateConfig) -> None:
        self.queue, self.config = queue, config

    def after(self, learnt: int, again: bool = False) -> int:
        """Judge the last of the `learnt` tasks; returns how many tasks the run then has learnt.

        Args:
            again: it was judged before, when the run was last open; then only what is wrong is said.

        Raises:
            ForgettingLimit: if the queue stops here.
        """
        queue, action = self.queue, self.config.on_violation
        while learnt > 1:
            verdict = self.verdict(learnt - 1)
            if not again or verdict.violated:
                queue._say(verdict.line)
            if not verdict.violated:
                break
            if action == "rollback":
                learnt, again = self._reject(verdict, learnt - 1), True
                continue
            again = False
            task = queue.learnt_tasks[learnt - 1]
            done = queue._on_main(lambda task=task: queue.directory.rehearsals(task))  # type: ignore[misc]
            if action == "rehearse" and done < self.config.rehearsal_rounds:
                self._rehearse(learnt - 1, done + 1)
                queue._scoring.score_missing(learnt)
                continue
            queue._on_main(lambda: queue._write_queue(learnt))  # noqa: B023 - called at once
            queue.model.release()
            raise ForgettingLimit(self._stopped(verdict, done))
        return learnt

    def verdict(self, index: int) -> Verdict:
        """The verdict after task `index`, the same for every process."""
        queue = self.queue

        def found() -> dict[str, Any]:
            rows = queue.directory.cells(queue.learnt_tasks[: index + 1], queue.stream)
            return dataclasses.asdict(judge(rows, index, self.config))

        return Verdict(**queue._on_main(found))

    def _stopped(self, verdict: Verdict, rounds: int) -> str:
        path = self.queue.directory.path
        tried = f" after {rounds} round(s) of rehearsal" if rounds else ""
        others = {
            "stop": "--on_violation rollback to go on without this task, --on_violation rehearse",
            "rehearse": "--on_violation rollback to go on without this task, more gate.rehearsal_rounds",
        }[self.config.on_violation]
        return (
            f"run directory {path} stopped{tried}: {verdict.sentence}; everything learnt is kept, so go on with a "
            f"higher --max_forgetting, {others}, or with a method against forgetting in another run directory"
        )

    # -- rollback ----------------------------------------------------------------------------------------------------

    def _reject(self, verdict: Verdict, index: int) -> int:
        """Take task `index`, the last learnt, out of the run; queue.json is the commit, the files follow."""
        queue = self.queue
        task = queue.stream[index]
        queue.model.release()  # what is in memory has learnt it
        entry: dict[str, Any] = {"name": task.name, "folder": task.folder, "index": index, **verdict.record()}
        queue.leave_out([*queue.rejected, entry])
        queue._on_main(lambda: queue._write_queue(index, scores=False))
        queue._on_main(queue.settle)
        queue._say(
            f"rolled back: task '{task.name}' is rejected, and kept for inspection in "
            f"{queue.directory.rejected_folder(entry)}; the run is as it was after "
            f"'{queue.stream[index - 1].name}'"
        )
        queue._scoring.score_missing(index)  # what is measured after the last task only, which may be another one now
        return index

    # -- rehearsal ---------------------------------------------------------------------------------------------------

    def _rehearse(self, index: int, number: int) -> None:
        """Train on rows of all tasks so far, from the model after task `index`, and put the result in its place.

        It is not saved in checkpoints; a run that is stopped in it does the round again, from the same weights.
        """
        from .methods.base import ContinualMethod, MethodList
        from .models import is_seq2seq

        queue, config = self.queue, self.config
        task = queue.learnt_tasks[index]
        seq2seq = is_seq2seq(queue.model.after(index))
        rows = self._rows(index, number, seq2seq)
        queue._say(f"rehearsal {number} of {config.rehearsal_rounds}: {len(rows)} rows of {index + 1} tasks")
        changes: dict[str, Any] = {
            "num_train_epochs": config.rehearsal_epochs,
            "max_steps": -1,
            "warmup_steps": 0,
            "save_strategy": "no",
            "eval_strategy": "no",
            "load_best_model_at_end": False,
            "dataloader_drop_last": False,  # a few rows may be less than a batch
            "seed": queue.seed + index + 1000 * number,
        }
        if config.rehearsal_learning_rate is not None:
            changes["learning_rate"] = config.rehearsal_learning_rate
        args = queue._training_args(task, seq2seq, changes)
        trainer = queue._make_trainer(queue.model.take(index), args, rows, MethodList(), task)
        trainer.train()
        if trainer.interrupted:
            raise Interrupted(f"stopped in rehearsal {number} after task '{task.name}', which is done again")
        before = queue.directory.task_folder(task)
        told = [m for m in queue._new_methods() if type(m).on_rehearsed is not ContinualMethod.on_rehearsed]
        for method in told:
            method.load(before / "methods")
            method.on_rehearsed(trainer.accelerator.unwrap_model(trainer.model))

        def fill(folder: Path) -> None:
            of_told = [f"{method.name}{rest}" for method in told for rest in (".json", ".safetensors", "-*")]
            if (before / "methods").is_dir():
                others = shutil.ignore_patterns(*of_told)
                shutil.copytree(before / "methods", folder / "methods", copy_function=_link, ignore=others)
            for method in told:
                method.save(folder / "methods")
            entries = [{"phase": f"rehearsal/{number}", **entry} for entry in trainer.state.log_history]
            write_json(folder / "log.json", [*read_json(before / "log.json"), *entries])

        queue._commit(trainer, task, fill, queue.directory.rehearsal_folder(task) / f"after-{number}")
        queue._on_main(lambda: queue.directory.take_rehearsed(task))

    def _rows(self, index: int, number: int, seq2seq: bool) -> Any:
        import datasets
        import torch

        from .replay import buffer_size, random_rows
        from .task_queue import _concatenate

        queue, config = self.queue, self.config
        tasks = queue.learnt_tasks[: index + 1]
        if config.rehearsal_source == "buffer":
            methods = queue._new_methods()
            methods.load(queue.directory.task_folder(tasks[-1]) / "methods")
            rows = _concatenate(kept_rows(methods))
        else:
            parts = []
            for task in tasks:
                size = buffer_size(len(task.train_dataset), config.rehearsal_ratio, None)
                drawn = sorted(random_rows(len(task.train_dataset), size, queue.seed + 1000 * number + task.index))
                own = task.train_dataset
                some = own.select(drawn) if isinstance(own, datasets.Dataset) else torch.utils.data.Subset(own, drawn)
                parts.append(queue._tokenized(dataclasses.replace(task, train_dataset=some), seq2seq))
            rows = _concatenate(parts)
        return rows


def kept_rows(methods: MethodList) -> list[Any]:
    """The rows that methods keep of earlier tasks, as the Trainer saw them.

    Raises:
        InputError: if none of them keeps any.
    """
    import datasets

    from .replay import ReplayBuffer

    found: list[Any] = []
    for method in methods:
        for name, value in vars(method).items():
            if isinstance(value, ReplayBuffer) and value.rows is not None:
                found.append(value.rows)
            elif name == "buffer_" and isinstance(value, datasets.Dataset):
                found.append(value)
    if not found:
        raise InputError(
            "gate.rehearsal_source='buffer' needs a method that keeps rows, such as replay, and this run has none; "
            "add one, or use rehearsal_source: tasks"
        )
    return found[:1]


def keeps_rows(methods: MethodList) -> bool:
    """Whether a method of the list would keep rows of its tasks."""
    from .replay import ReplayBuffer

    return any(
        isinstance(value, ReplayBuffer) or getattr(method, "_replays", False)
        for method in methods
        for value in vars(method).values()
    )


# -- in reports ------------------------------------------------------------------------------------------------------


def gate_section(runs: Sequence[RunScores], tablefmt: str = "github") -> list[str]:
    """For each run with a gate, its verdict after every task, from the scores; nothing where no run has one.

    No model is needed, and no torch.
    """
    blocks = []
    for run in runs:
        if run.gate is None and not run.rejected:
            continue
        table = _gate_table(run, tablefmt)
        if table:
            blocks.append(f"Forgetting gate of {run.title}: {_describe(run.gate)}\n\n{table}")
    return blocks


def _describe(options: Mapping[str, Any] | None) -> str:
    if options is None:
        return "none any more"
    gate = GateConfig(**options)
    return (
        f"{gate.measure} at most {points(gate.max_forgetting)}, then {gate.on_violation} (percent of the score, or of "
        "its best value where less is better)"
    )


def _gate_table(run: RunScores, tablefmt: str) -> str:
    from tabulate import tabulate

    rows: list[tuple[float, list[str]]] = []
    for entry in run.rejected:
        rows.append(
            (
                entry["index"] - 0.5,
                [entry["name"], entry["worst"], points(entry["max"]), points(entry["mean"]), points(entry["limit"]),
                 "rejected"],
            )
        )  # fmt: skip
    for index in range(1, len(run.tasks) if run.gate is not None else 0):
        task = run.tasks[index]
        try:
            verdict = judge(_cells(run), index, GateConfig(**run.gate or {}))
        except InputError:
            continue  # not scored yet
        said = "exceeded" if verdict.violated else "kept"
        if rounds := run.rehearsals.get(task):
            said += f" after {rounds} round(s) of rehearsal"
        if verdict.violated and index == run.cursor - 1:
            said += ", stopped here"
        numbers = [points(verdict.max), points(verdict.mean), points(verdict.limit)]
        rows.append((index, [task, verdict.worst, *numbers, said]))
    if not rows:
        return ""
    headers = ["after", "lost most", "max", "mean", "limit", "verdict"]
    body = [cells for _, cells in sorted(rows, key=lambda row: row[0])]
    align = ["left", "left", "right", "right", "right", "left"]
    return tabulate(body, headers, tablefmt=tablefmt, disable_numparse=True, colalign=align)


def _cells(run: RunScores) -> list[dict[str, Any]]:
    """The scores of a run as cells."""
    return [
        {"after_index": i, "after_task": run.tasks[i], "task_index": j, "task": task, "score": float(run.R[i, j]),
         "metric": run.metrics[task]}
        for i in range(len(run.tasks)) for j, task in enumerate(run.eval_tasks)
        if not math.isnan(run.R[i, j])
    ]  # fmt: skip


def _link(source: str, target: str) -> None:
    """A task's files never change, so a second name will do; a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
