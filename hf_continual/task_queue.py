"""The task queue: load, train, merge, evaluate, commit; task after task, and again from wherever it was stopped."""

from __future__ import annotations

import copy
import dataclasses
import gc
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import datasets
import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerState, TrainingArguments

from . import metrics, pretraining
from .checkpoints import CheckpointSizes, usable_checkpoint
from .data import as_rows, content_hash
from .distributed import Distributed, processes, release_engine
from .end_tasks import check_end_task
from .errors import InputError, Interrupted, build, did_you_mean
from .evaluation import EvaluationConfig, check_task
from .gate import ForgettingGate, GateConfig, keeps_rows, make_gate
from .general_ability import general_rows
from .isolation import run_isolated
from .lora import LoraView
from .methods.base import MethodContext, MethodList
from .models import ModelConfig, is_seq2seq, library_bars
from .perplexity import check_texts
from .provenance import changed_arguments, git_commit, plain, plain_peft, versions
from .queue_evaluation import QueueEvaluation
from .run_model import BEFORE_ANY_TASK, RunModel
from .run_state import RunDirectory, disk_full, peer_lost, try_json, write_json
from .same_run import check_other_processes, check_same_stream, evaluation_of, rows_of_a_step
from .stopping import StopAtSignal
from .tasks import Task, check_stream
from .tokenization import Packing, tokenize_dataset
from .trainer import ContinualMixin, ContinualSeq2SeqTrainer, ContinualTrainer
from .training_args import make_training_args

JOINT = "joint"
LAUNCH = "processes.json"
"""In the work folder of a task: by how many processes, and on which backend, its checkpoints were made."""
IN_MEMORY = ("single", "ddp")
"""Backends that leave the model as it was given; elsewhere each task loads the last commit into a new one."""

T = TypeVar("T")


@dataclass
class DataConfig:
    """The recipe's `data:` section: how rows become tokens."""

    max_prompt_length: int = field(
        default=512, metadata={"help": "Longer prompts lose text before their last line (MIGU: 512)."}
    )
    max_completion_length: int = field(default=50, metadata={"help": "Longer answers are cut (MIGU: 50)."})
    block_size: int | None = field(
        default=None,
        metadata={
            "help": "Tokens of a row of plain text (kinds clm and mlm); default: the tokenizer's longest text, at most "
            "1024 where it knows of none and never more than the model's positions (run_clm.py)."
        },
    )
    pack: bool = field(
        default=True,
        metadata={"help": "Cut texts, one after another, into rows of block_size; false makes each text a row."},
    )
    drop_last_block: bool = field(
        default=True, metadata={"help": "Leave out the tokens after the last whole row (run_clm.py)."}
    )
    mlm_probability: float = field(
        default=0.15, metadata={"help": "Share of the tokens that kind mlm masks, anew in each epoch (BERT: 0.15)."}
    )

    def __post_init__(self) -> None:
        size = self.block_size
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 4):
            raise InputError(f"data.block_size={size!r} must be a whole number of tokens, at least 4")
        for option in ("pack", "drop_last_block"):
            if not isinstance(getattr(self, option), bool):
                raise InputError(f"data.{option}={getattr(self, option)!r} must be true or false")
        share = self.mlm_probability
        if not isinstance(share, (int, float)) or isinstance(share, bool) or not 0 < share < 1:
            raise InputError(f"data.mlm_probability={share!r} must be a number between 0 and 1; BERT's is 0.15")
        for option in ("max_prompt_length", "max_completion_length"):
            value = getattr(self, option)
            if not isinstance(value, int) or isinstance(value, bool) or value < 4:
                raise InputError(f"data.{option}={value!r} must be a whole number of tokens, at least 4")


@dataclass
class QueueResult:
    """What a finished queue returns.

    Attributes:
        run_dir: the run directory.
        R: (tasks, tasks) scores; R[i, j] = score on task j after task i, NaN where not evaluated. One row for `joint`.
        tasks: names, the columns of R.
        metrics: `average_performance`, `backward_transfer`, ... as far as R allows.
        rejected: what the forgetting gate took out of the run, each as queue.json has it; no column of R.
    """

    run_dir: Path
    R: np.ndarray
    tasks: list[str]
    metrics: dict[str, float]
    rejected: list[dict[str, Any]] = field(default_factory=list)


class TaskQueue:
    """Learns a stream of tasks in a run directory.

    Under `torchrun` or `accelerate launch` every process makes the same queue and runs it: rank 0 alone reads the
    state of the run directory, decides and writes; all train, and share the rows to score.

    Args:
        run_dir: where everything is written; see `run_state.py` for the layout. An unfinished run is continued, a
            finished one returns its result.
        model: a `PreTrainedModel`, a function returning one, a name or path, or [`ModelConfig`]. A PEFT model is taken
            as it is.
        tasks: the stream. Rows as described in [`Task`]; rows that already have `input_ids` are not tokenised again.
        methods: method objects, names or mappings. Objects must be fresh; the queue loads their state.
        args: training arguments, an object or a mapping; `output_dir`, `seed` and `methods` are the queue's.
        processing_class: the tokenizer; by default the one of `model`.
        peft_config: `LoraConfig` or its options; `None` fine-tunes the full model.
        data, evaluation: [`DataConfig`], [`EvaluationConfig`], or mappings with their options.
        seed: task `i` is trained with `seed + i`, so that new adapters do not all start from the same weights.
        joint: train once on all tasks together, the upper bound.
        independent: learn each task alone from the base model, one model a task; R then has its diagonal only.
        gate: the forgetting gate, [`GateConfig`] or its options, such as `{"max_forgetting": 0.05}`; None for none.
        trainer_class: a Trainer class built with [`ContinualMixin`].
        trainer_kwargs: further arguments for it, such as `data_collator`.
        callbacks: for the Trainer of every task.
        recipe, variant: recorded in the run directory.
        named_stream: `name` and `hash` of the stream that `tasks` are of, recorded for reports.

    Raises:
        InputError: for anything that cannot work, before training.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        model: PreTrainedModel | Callable[[], PreTrainedModel] | str | ModelConfig | Mapping[str, Any],
        tasks: Sequence[Task],
        methods: Iterable[Any] = (),
        args: TrainingArguments | Mapping[str, Any] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: Any = None,
        data: DataConfig | Mapping[str, Any] | None = None,
        evaluation: EvaluationConfig | Mapping[str, Any] | None = None,
        seed: int = 42,
        joint: bool = False,
        trainer_class: type[Any] | None = None,
        trainer_kwargs: Mapping[str, Any] | None = None,
        recipe: Mapping[str, Any] | None = None,
        variant: str | None = None,
        independent: bool = False,
        gate: GateConfig | Mapping[str, Any] | None = None,
        named_stream: Mapping[str, str] | None = None,
        callbacks: Sequence[Any] = (),
    ) -> None:
        self.directory = RunDirectory(run_dir)
        self._args = args if args is not None else {}
        self._data: DataConfig = build(DataConfig, data or {}, "data")
        self._evaluation: EvaluationConfig = build(EvaluationConfig, evaluation or {}, "evaluation")
        self._scoring = QueueEvaluation(self, self._evaluation)
        self._method_specs = [methods] if isinstance(methods, (str, Mapping)) else list(methods)
        self.seed, self.joint, self.variant, self.independent = seed, joint, variant, independent
        self._trainer_class = trainer_class
        self._trainer_kwargs = dict(trainer_kwargs or {})
        if callbacks:
            self._trainer_kwargs["callbacks"] = [*(self._trainer_kwargs.get("callbacks") or ()), *callbacks]
        self._recipe = recipe
        self.named_stream = named_stream
        self._peft_config = peft_config
        self._shape: Any = None
        self.model = RunModel(
            model,
            processing_class,
            peft_config,
            seed,
            lambda i: self.directory.task_folder(self.learnt_tasks[i]),
            use_cpu=bool(self._plain_args().get("use_cpu")),
            masked=any(task.kind == "mlm" for task in tasks),
        )
        self.stream = [readable(task, i) for i, task in enumerate(tasks)]
        check_stream(self.stream)
        made = self._new_methods()  # refuses unknown and conflicting methods at once
        self.rejected: list[dict[str, Any]] = []
        self._gate_config = make_gate(gate)
        self._gate = ForgettingGate(self, self._gate_config) if self._gate_config is not None else None
        self._check_bounds_and_gate(made)
        for task in self.stream:
            self._check_task(task)
        self.processes = processes()
        self._stop = StopAtSignal()
        self._bars = self.processes.is_main and not datasets.are_progress_bars_disabled()
        options = self._plain_args()
        if options.get("methods"):
            raise InputError("training.methods: give the methods to the TaskQueue, as methods=[...]")

    def _check_bounds_and_gate(self, methods: MethodList) -> None:
        if self.joint and self.independent:
            raise InputError("joint=True and independent=True are two different bounds; start one run for each")
        if self.independent and any(method.name != "naive" for method in methods):
            raise InputError(
                f"independent=True learns each task from the base model, where method '{methods[0].name}' has no "
                "earlier task to keep; give no methods"
            )
        if self._gate_config is None:
            return
        if self.joint or self.independent:
            raise InputError(
                f"gate.max_forgetting={self._gate_config.max_forgetting:g}: with "
                f"{'joint' if self.joint else 'independent'}=True no task comes after another, so nothing can be "
                "forgotten; leave the gate out"
            )
        if self._gate_config.rehearsal_source == "buffer" and not keeps_rows(methods):
            raise InputError(
                "gate.rehearsal_source='buffer' needs a method that keeps rows, such as replay; add one, or use "
                "rehearsal_source: tasks"
            )

    # -- the stream --------------------------------------------------------------------------------------------------

    def leave_out(self, rejected: Sequence[Mapping[str, Any]]) -> None:
        """Go on without the tasks that the gate has rejected; those after them move up."""
        self.rejected = [dict(entry) for entry in rejected]
        names = {entry["name"] for entry in rejected}
        kept = [task for task in self.stream if task.name not in names]
        if len(kept) < len(self.stream):
            self.stream = [dataclasses.replace(task, index=i) for i, task in enumerate(kept)]

    @property
    def gated(self) -> bool:
        """Whether a forgetting gate is in force."""
        return self._gate is not None

    def read_rejected(self) -> list[dict[str, Any]]:
        """What queue.json lists as rejected."""
        if not (self.directory.path / "queue.json").exists():
            return []
        rejected = self.directory.read_queue().get("rejected", [])
        if not isinstance(rejected, list) or not all(
            isinstance(e, dict) and {"name", "folder"} <= e.keys() for e in rejected
        ):
            raise InputError(
                f"{self.directory.path / 'queue.json'} was edited: its rejected tasks are no list; restore it"
            )
        return rejected

    def settle(self) -> None:
        """Finish what the gate has begun to change in the run directory; rank 0 calls it."""
        learnt = [task for task in self.learnt_tasks if self.directory.is_learnt(task)]
        for entry in self.rejected:
            self.directory.settle_rejected(entry, learnt, self.stream)
        for task in self.learnt_tasks:
            self.directory.take_rehearsed(task)

    @property
    def learnt_tasks(self) -> list[Task]:
        """What is trained, in order: the stream, or one joint task."""
        if not self.joint:
            return self.stream
        parts = [task.train_dataset for task in self.stream]
        kind = pretraining.joint_kind(self.stream)
        return [Task(JOINT, train_dataset=_concatenate(parts), index=0, kind=kind)]

    def add(self, task: Task, record: Callable[[], None] | None = None) -> None:
        """Append a task. It is learnt by the next `run()`, from the last commit, as if it had always been there.

        `record` is called before queue.json is written, once nothing speaks against the task.

        Raises:
            InputError: for a name that is taken, or if the run is joint.
        """
        if self.joint:
            raise InputError("a joint run trains on all tasks at once; start a new run with the longer stream")
        self.leave_out(self._on_main(self.read_rejected))
        if task.name in {entry["name"] for entry in self.rejected}:
            raise InputError(
                f"run directory {self.directory.path}: task '{task.name}' was rejected by the forgetting gate; add it "
                "under another name"
            )
        stream = [*self.stream, readable(task, len(self.stream))]
        check_stream(stream)
        self._check_task(stream[-1])
        check_task(stream[-1], self._evaluation)  # here already: a recorded task cannot be taken back
        before, self.stream = self.stream, stream

        def write() -> None:
            if (self.directory.path / "queue.json").exists():
                with self.directory.locked():
                    queue = self.directory.read_queue()
                    check_same_stream(self, queue)
                    if record is not None:
                        record()
                    self._write_queue(queue["cursor"], queue)

        try:
            self._on_main(write)
        except BaseException:
            self.stream = before
            raise

    def _check_task(self, task: Task) -> None:
        if task.train_dataset is None or len(task.train_dataset) == 0:
            raise InputError(f"task '{task.name}' has no training rows; give it a non-empty train_dataset")
        if task.training:
            for taken in ("output_dir", "methods", "seed"):
                if taken in task.training:
                    raise InputError(f"task '{task.name}': training.{taken} is set by the queue; remove it")
            try:
                if isinstance(self._args, Mapping):
                    make_training_args({"output_dir": "unused", **self._args, **task.training}, seq2seq=True)
                else:
                    known = [f.name for f in dataclasses.fields(self._args) if f.init]
                    for option in task.training:
                        if option not in known:
                            raise InputError(
                                f"training.{option} is not a training argument{did_you_mean(option, known)}"
                            )
            except InputError as error:
                raise InputError(f"task '{task.name}': {error}") from error

    # -- running -----------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Everything `run` checks before it trains, on a model without weights."""
        model = self.model.fresh(empty=True)
        self._scoring.general.check(model, self.model.tokenizer)
        self._check_methods(model)
        for task in self.learnt_tasks:
            self._tokenized(task, is_seq2seq(model))  # says how many answers are cut
        for task in self.stream:
            check_task(task, self._evaluation)
        if self.directory.holds_learning:
            self.leave_out(self.read_rejected())
            check_same_stream(self, self.directory.read_queue())

    def run(self, isolate_tasks: bool = False, one_task: bool = False) -> QueueResult:
        """Start or continue; returns when every task is learnt and scored.

        Args:
            isolate_tasks: learn each task in a process of its own, so that nothing of one is left in memory for the
                next; the result is the same. The queue is sent there, so a script needs `if __name__ == "__main__":`.
                Under a launcher it is `one_task`, and the command that started the processes starts them again.
            one_task: return after the next task that is learnt and scored.

        Raises:
            InputError: for bad input, a full disk or a process that died; what is learnt stays.
            ForgettingLimit: if the gate stops the queue; what is learnt stays.
            Interrupted: after SIGINT or SIGTERM to any process, with the current task's checkpoint saved.
        """
        self._check_launcher()
        if isolate_tasks and self.processes.world_size == 1 and not one_task:
            run_isolated(self)
        else:
            self._run(one_task or isolate_tasks)
        return self.result()

    def _run(self, one_task: bool = False) -> bool:
        """Returns whether nothing is left to learn."""
        with self._locked(), self._stop.listening(self._say), self._clear_errors(), library_bars(False):
            self.leave_out(self._on_main(self.read_rejected))
            cursor = self._on_main(self._open)
            tasks = self.learnt_tasks
            for entry in self.rejected:
                self._say(f"{self.directory.path}: task '{entry['name']}' was rejected by the gate and is left out")
            if cursor > len(tasks):
                self._say(f"{self.directory.path}: {len(tasks)} task(s) learnt, {cursor - len(tasks)} added since")
                return True
            scored = not self._scoring.missing_cells(cursor) and not self._scoring.missing_general(cursor)
            idle = cursor == len(tasks) and scored
            self._scoring.score_missing(cursor)
            cursor = self._judged(cursor, again=True)
            if cursor == len(self.learnt_tasks):
                self._on_main(lambda: self._write_queue(cursor))
                if idle:
                    self._say(f"{self.directory.path}: finished, {cursor} task(s) learnt; nothing to do")
            while cursor < len(self.learnt_tasks):
                task = self.learnt_tasks[cursor]
                if not self._on_main(lambda task=task: self.directory.is_learnt(task)):  # type: ignore[misc]
                    self._learn(task)
                    if self.model.at != cursor:
                        gc.collect()  # of what held the model that is not kept
                self._scoring.score_missing(cursor + 1)
                cursor = self._judged(cursor + 1)
                self._scoring.measure_general(cursor)  # the gate may have made an earlier task the last one
                self._on_main(lambda learnt=cursor: self._write_queue(learnt))  # type: ignore[misc]
                if one_task:
                    break
            self.model.release()
            return cursor == len(self.learnt_tasks)

    def _judged(self, learnt: int, again: bool = False) -> int:
        """How many of the learnt tasks stand before the gate."""
        return learnt if self._gate is None else self._gate.after(learnt, again)

    def _check_launcher(self) -> None:
        args = self._plain_args()
        if args.get("deepspeed") and "RANK" not in os.environ:
            raise InputError(
                "training.deepspeed is given and no launcher started this process, which DeepSpeed needs for one "
                "process too; start it with `torchrun --nproc_per_node 1`"
            )

    def _say(self, line: str) -> None:
        if self.processes.is_main:
            print(line, flush=True)

    def _on_main(self, function: Callable[[], T]) -> T:
        """Run on rank 0; what it returns (as JSON), or its clear error, is every rank's."""

        def clearly() -> T:
            with self._clear_errors():
                return function()

        return self.processes.on_main(clearly)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """The lock of the run directory, which rank 0 holds for all."""
        with ExitStack() as stack, self._clear_errors():
            self._on_main(lambda: stack.enter_context(self.directory.locked()))
            yield

    def _options(self) -> dict[str, Any]:
        """What makes an equal queue in another process."""
        return {
            "run_dir": self.directory.path,
            "model": self.model.source,
            "tasks": self.stream,
            "methods": self._method_specs,
            "args": self._args,
            "processing_class": self.model.given_tokenizer,
            "peft_config": self._peft_config,
            "data": self._data,
            "evaluation": self._evaluation,
            "seed": self.seed,
            "joint": self.joint,
            "trainer_class": self._trainer_class,
            "trainer_kwargs": self._trainer_kwargs,
            "recipe": self._recipe,
            "variant": self.variant,
            "named_stream": self.named_stream,
            "independent": self.independent,
            "gate": self._gate_config,
        }

    def result(self) -> QueueResult:
        """The score matrix and metrics of what is learnt so far."""
        self.leave_out(self.read_rejected())
        tasks = self.learnt_tasks
        rows = self.directory.cells([t for t in tasks if self.directory.is_learnt(t)], self.stream)
        R = np.full((len(tasks), len(self.stream)), np.nan)
        baseline = np.full(len(self.stream), np.nan)
        for row in rows:
            if row["after_index"] < 0:
                baseline[row["task_index"]] = row["score"]
            else:
                R[row["after_index"], row["task_index"]] = row["score"]
        base = None if np.isnan(baseline).any() else baseline
        last = np.diagonal(R)[None] if self.independent else R
        values = {} if np.isnan(last[-1]).any() else metrics.summarize(last, base, [row["metric"] for row in rows])
        if self.independent:  # of one task as well, which nothing came before or after
            values = {name: value for name, value in values.items() if name == "average_performance"}
        return QueueResult(self.directory.path, R, [t.name for t in self.stream], values, self.rejected)

    def _open(self) -> int:
        """Create or verify the run directory; returns the cursor."""
        for task in self.stream:
            check_task(task, self._evaluation)
        if not self.directory.holds_learning:
            self.check_model_early()
            self.directory.start(self._description())
            self._write_queue(0)
            return 0
        queue = self.directory.read_queue()
        check_same_stream(self, queue)
        self.settle()
        cursor = int(queue["cursor"])
        for task in self.learnt_tasks[:cursor]:
            if not self.directory.is_learnt(task):
                raise InputError(
                    f"{self.directory.path / 'queue.json'} says that task '{task.name}' is learnt and "
                    f"{self.directory.task_folder(task)} "
                    "is missing; restore it, or start again in another run directory"
                )
        learnt = [t for t in self.learnt_tasks if self.directory.is_learnt(t)]
        if cursor > len(self.learnt_tasks):
            return cursor
        if queue.get("world_size", 1) != self.processes.world_size:
            check_other_processes(self, queue)
        names = {task.name for task in [*self.stream, *self.learnt_tasks]}
        self.directory.check_scores(self.directory.cells(learnt, self.stream), names)
        self._scoring.general.check_stored(self.directory, learnt)
        for task in learnt:
            self.directory.check_task(task)
            self.directory.drop_work(task)  # left where a process died just after a commit
        self.directory.drop_answers()
        if len(self.learnt_tasks) > len(queue["tasks"]):
            self._write_queue(cursor)  # a longer stream is recorded before it is learnt
        return cursor

    def check_model_early(self) -> None:
        """Load the model and try the methods on it, so that what cannot work leaves no run directory behind."""
        model = self.model.fresh(empty=True)
        self._scoring.general.check(model, self.model.tokenizer)
        self._check_methods(model)
        self.model.after(BEFORE_ANY_TASK)

    def _check_methods(self, model: Any) -> None:
        """Begin every task on a model without weights."""
        methods = self._new_methods()
        for task in self.learnt_tasks:
            given = self._plain_args()
            args = SimpleNamespace(**{**given, **task.training})
            ctx = MethodContext(
                model, task, Distributed(), LoraView(model), TrainerState(), 0, lambda n, v: None, args=args
            )
            methods.check(ctx)
            for method in methods:
                pretraining.check_method(method, task)
            methods.on_task_begin(ctx)
        for task in self.stream:
            pretraining.check_model(task, model, self.model.tokenizer)
            if task.is_text:
                packing = pretraining.packing_of(task, self._data, model, self.model.tokenizer)
                check_texts(task, model, self.model.tokenizer, packing)
            if task.end_task is not None:
                check_end_task(task.end_task, task.name, self._evaluation, self._plain_args(), model)

    def _plain_args(self) -> Mapping[str, Any]:
        return self._args if isinstance(self._args, Mapping) else vars(self._args)

    def _description(self) -> dict[str, Any]:
        """The recipe, or what a run started from Python records as its recipe."""
        if self._recipe is not None:
            return dict(self._recipe)
        args = self._args if isinstance(self._args, Mapping) else changed_arguments(self._args)
        return {
            "python": True,
            "model": self.model.description(),
            "trainer": self._trainer_class.__name__ if self._trainer_class is not None else None,
            "methods": [{"name": m.name, **m.options()} for m in self._new_methods()],
            "peft": plain_peft(self._peft_config),
            "training": plain(dict(args)),
            "data": dataclasses.asdict(self._data),
            "evaluation": dataclasses.asdict(self._evaluation),
            "tasks": [task.name for task in self.stream],
            "seed": self.seed,
            **({"independent": True} if self.independent else {}),
        }

    def _write_queue(self, cursor: int, before: Mapping[str, Any] | None = None, scores: bool = True) -> None:
        """`before`: the queue.json whose processes and batches stay, for what does not train.

        `scores`: write scores.jsonl first.
        """
        learnt = self.learnt_tasks
        tasks: list[dict[str, Any]] = [
            {"name": t.name, "folder": t.folder, "rows": len(t.train_dataset), "hash": content_hash(t.train_dataset)}
            for t in learnt
        ]
        if before is None:
            steps = [rows_of_a_step(self, task) for task in learnt]
        else:
            steps = [entry.get("step") for entry in before["tasks"]]
        for entry, step in zip(tasks, steps, strict=False):
            if step is not None:
                entry["step"] = step
        scored = [t for t in self.stream]
        done = [t for t in learnt if self.directory.is_learnt(t)]
        if scores:
            self.directory.write_scores(self.directory.cells(done, scored))
            self.directory.write_general_log(general_rows(self.directory, done))
        self.directory.write_queue(
            {
                "tasks": tasks,
                "eval_tasks": [t.name for t in scored],
                "evaluation": [evaluation_of(t, self._evaluation) for t in scored],
                "cursor": cursor,
                "finished": cursor == len(tasks),
                "joint": self.joint,
                "variant": self.variant,
                **({"stream": dict(self.named_stream)} if self.named_stream is not None else {}),
                "seed": self.seed,
                "world_size": (before or {}).get("world_size", self.processes.world_size),
                "method_names": [m.name for m in self._new_methods()],
                "versions": versions(),
                "git": git_commit(),
                "recipe_sha256": self.directory.recipe_checksum(),
                **self._bounds_and_gate(done),
            }
        )

    def _bounds_and_gate(self, done: Sequence[Task]) -> dict[str, Any]:
        """What queue.json says of them, where they are used."""
        gate = dataclasses.asdict(self._gate_config) if self._gate_config is not None else None
        rehearsals = {task.name: self.directory.rehearsals(task) for task in done}
        found = {
            "independent": self.independent,
            "gate": gate,
            "rejected": self.rejected,
            "rehearsals": {name: count for name, count in rehearsals.items() if count},
        }
        return {key: value for key, value in found.items() if value}

    def _new_methods(self) -> MethodList:
        """Fresh methods; the queue loads their state."""
        return MethodList(copy.deepcopy(self._method_specs))

    def _option(self, task: Task | None, name: str, default: Any = None) -> Any:
        """A training argument, of a task where it has its own."""
        return {**self._plain_args(), **(task.training if task is not None else {})}.get(name, default)

    # -- one task ----------------------------------------------------------------------------------------------------

    def _learn(self, task: Task) -> None:
        """Train, merge and commit one task."""
        total = len(self.learnt_tasks)
        self._say(f"\n== task {task.index + 1}/{total}: {task.name} ({len(task.train_dataset)} rows) ==")
        start = BEFORE_ANY_TASK if self.independent else task.index - 1
        train_dataset = self._tokenized(task, is_seq2seq(self.model.after(start)))
        model = self.model.take(start)
        methods = self._new_methods()
        if task.index > 0 and not self.independent:
            methods.load(self.directory.task_folder(self.learnt_tasks[task.index - 1]) / "methods")
        seq2seq = is_seq2seq(model)
        args = self._training_args(task, seq2seq)
        if self.processes.world_size > 1 and args.save_total_limit == 1:
            args.save_total_limit = 2  # the Trainer removes the last one before the ranks have noted the new one whole
        trainer = self._make_trainer(model, args, train_dataset, methods, task)
        name = self._on_main(lambda: self._checkpoint_of(task, trainer.dist.backend))
        checkpoint = str(self.directory.work_folder(task) / name) if name is not None else None
        if name is not None:
            self._say(f"continuing from {name}")
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
        except InputError as error:
            if trainer._nonfinite is None or not bool(trainer._nonfinite):
                raise
            if self.processes.is_main:
                self.directory.drop_work(task)  # another learning rate must not continue from this one's checkpoints
            if task.index == 0:
                raise
            raise InputError(
                f"{error}; what is learnt keeps its options, so change this task's alone: "
                "its `training: {learning_rate: ...}`"
            ) from error
        if trainer.interrupted:
            raise Interrupted(f"stopped in task '{task.name}' at step {trainer.state.global_step}")
        for method in methods:
            if (line := method.summary()) is not None:
                self._say(f"{method.name}: {line}")

        def fill(folder: Path) -> None:
            for method in methods:  # rank 0 alone: after a task no part of the state is on another rank
                method.save(folder / "methods")
            write_json(folder / "log.json", trainer.state.log_history)

        self._commit(trainer, task, fill)

    def _make_trainer(self, model: Any, args: Any, rows: Any, methods: MethodList, task: Task) -> Any:
        """The Trainer of one task; a signal now stops it at the next step."""
        tokenizer, seq2seq = self.model.tokenizer, is_seq2seq(model)
        trainer_class = self._trainer_class or (ContinualSeq2SeqTrainer if seq2seq else ContinualTrainer)
        if not issubclass(trainer_class, ContinualMixin):
            raise InputError(
                f"trainer_class={trainer_class.__name__} lacks ContinualMixin; use class Mine(ContinualMixin, "
                f"{trainer_class.__name__})"
            )
        collator, own = pretraining.collator_of(task, tokenizer, model, self._data.mlm_probability, args.seed)
        kwargs: dict[str, Any] = {"data_collator": collator, **self._trainer_kwargs}
        own += [self._stop, CheckpointSizes(), self._scoring.general.log]
        kwargs["callbacks"] = [*(kwargs.get("callbacks") or ()), *own]
        trainer = trainer_class(
            model=model,
            args=args,
            train_dataset=rows,
            processing_class=tokenizer,
            methods=methods,
            task=task,
            **kwargs,
        )
        self._stop.trainer = trainer
        self._scoring.general.log.attach(trainer)
        trainer.seeds_per_task = True
        return trainer

    def _commit(self, trainer: Any, task: Task, fill: Callable[[Path], None], into: Path | None = None) -> None:
        """Write the model that was trained, with what `fill` adds, as the task's folder; then let go of the trainer."""
        trained = trainer.accelerator.unwrap_model(trainer.model)
        whole = self.model.whole(trained, self.processes)  # also waits until every rank is done with the work folder

        def write(folder: Path) -> None:
            self.model.save(whole, folder)
            fill(folder)

        self._on_main(lambda: self.directory.commit_task(task, write, into))
        trained.zero_grad(set_to_none=True)
        release_engine(trainer)
        trainer.accelerator.free_memory()
        self._stop.trainer = None
        if trainer.dist.backend in IN_MEMORY:
            self.model.keep(trained, task.index)

    def _checkpoint_of(self, task: Task, backend: str) -> str | None:
        """The checkpoint to continue from, refused if other processes made it: the batches would be others."""
        folder = self.directory.work_folder(task)
        found = usable_checkpoint(folder, self.processes.world_size)
        now = {"world_size": self.processes.world_size, "backend": backend}
        if found is not None:
            made = try_json(folder / LAUNCH) or {"world_size": 1, "backend": "single"}
            for key, what in (("world_size", "process(es)"), ("backend", "backend")):
                if made.get(key) != now[key]:
                    old, new = (f"{v[key]} {what}" if what[0] == "p" else f"{what} {v[key]}" for v in (made, now))
                    raise InputError(
                        f"task '{task.name}' was begun with {old} and would go on with {new}, which trains on other "
                        f"batches; start it as before, or delete {folder} to train this task anew"
                    )
        write_json(folder / LAUNCH, now)
        return found.name if found is not None else None

    def _training_args(self, task: Task, seq2seq: bool, changes: Mapping[str, Any] | None = None) -> TrainingArguments:
        work = str(self.directory.work_folder(task))
        given = {"output_dir": work, "seed": self.seed + task.index, **task.training, **(changes or {})}
        if isinstance(self._args, TrainingArguments):
            extra: dict[str, Any] = (
                {"stop_on_nonfinite_loss": True} if hasattr(self._args, "stop_on_nonfinite_loss") else {}
            )
            # TrainingArguments resets accelerate's state, so each task's are made when its turn comes.
            return dataclasses.replace(self._args, **extra, **given)
        return make_training_args({**self._args, **given}, seq2seq)

    def _packing(self, task: Task) -> Packing:
        """How the texts of a task become rows."""
        if self._shape is None:
            self._shape = self.model.fresh(empty=True)  # its number of positions
        return pretraining.packing_of(task, self._data, self._shape, self.model.tokenizer)

    def _tokenized(self, task: Task, seq2seq: bool) -> Any:
        rows = task.train_dataset
        if task.is_text and isinstance(rows, datasets.Dataset) and "text" in rows.column_names:
            packing = self._packing(task)
            blocks = pretraining.tokenized(task, packing, self.model.tokenizer)
            for line in pretraining.describe(task, blocks, packing):
                self._say(line)
            return blocks.rows
        if (
            not isinstance(rows, datasets.Dataset)
            or "prompt" not in rows.column_names
            or "input_ids" in rows.column_names
        ):
            return rows
        with library_bars(self._bars):
            tokens = tokenize_dataset(
                rows,
                self.model.tokenizer,
                seq2seq=seq2seq,
                max_prompt_length=self._data.max_prompt_length,
                max_completion_length=self._data.max_completion_length,
            )
        end = self.model.tokenizer.eos_token_id
        cut = sum(labels[-1] != end for labels in tokens["labels"])  # a whole answer ends in the end token
        if cut:
            self._say(
                f"warning: task '{task.name}': {cut} of {len(tokens)} answers are longer than "
                f"data.max_completion_length={self._data.max_completion_length} tokens and are cut"
            )
        return tokens

    # -- signals and errors ------------------------------------------------------------------------------------------

    @contextmanager
    def _clear_errors(self) -> Iterator[None]:
        try:
            yield
        except (InputError, Interrupted):
            raise
        except Exception as error:
            if self.processes.world_size > 1 and peer_lost(error):
                raise InputError(
                    f"run_dir={self.directory.path}: another process of this run ended (rank {self.processes.rank} of "
                    f"{self.processes.world_size} lost it); see what it said, and start all of them again: every "
                    "learnt task is kept"
                ) from error
            if disk_full(error):
                raise InputError(
                    f"run_dir={self.directory.path}: the disk is full; free some space and run the same command again, "
                    "every learnt task is kept"
                ) from error
            if isinstance(error, PermissionError):
                raise InputError(
                    f"run_dir={self.directory.path}: {error.filename or 'a file'} cannot be written "
                    f"({error.strerror}); "
                    "change its permissions, or use another run directory"
                ) from error
            raise


def _concatenate(parts: Sequence[Any]) -> Any:
    if all(isinstance(part, datasets.Dataset) for part in parts):
        columns = set.intersection(*(set(part.column_names) for part in parts))
        return datasets.concatenate_datasets([part.select_columns(sorted(columns)) for part in parts])
    return torch.utils.data.ConcatDataset(parts)


def readable(task: Task, index: int) -> Task:
    """The task at its place in the stream, with its rows checked and brought to the canonical columns."""
    rows: dict[str, Any] = {
        name: as_rows(getattr(task, name), f"{name} of task '{task.name}'", task.kind, task.labels)
        for name in ("train_dataset", "eval_dataset")
    }
    if task.end_task is not None:
        rows["end_task"] = readable(task.end_task, index)
    return dataclasses.replace(task, index=index, **rows)
