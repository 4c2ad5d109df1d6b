"""What a queue scores after its tasks: the cells of the score matrix, end tasks, and general ability."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from .end_tasks import score_end_task
from .errors import Interrupted
from .evaluation import EvaluationConfig, evaluate_task
from .general_ability import GeneralAbility
from .run_model import training_device
from .run_scores import shown
from .tasks import Task

if TYPE_CHECKING:
    from .task_queue import TaskQueue

__all__ = ["QueueEvaluation"]


class QueueEvaluation:
    """The scoring of one queue. Every process calls it; rank 0 says what is missing and writes.

    A cell is (index of the task learnt last, task scored), with index -1 for the base model.

    Args:
        queue: whose model and directory it uses.
        config: how to score.
    """

    def __init__(self, queue: TaskQueue, config: EvaluationConfig) -> None:
        self.queue, self.config = queue, config
        self.general = GeneralAbility(config)

    # -- cells -------------------------------------------------------------------------------------------------------

    def wanted_cells(self, learnt: int) -> Iterator[tuple[int, Task]]:
        """All cells of the first `learnt` tasks."""
        queue = self.queue
        if self.config.base_model:
            yield from ((-1, task) for task in queue.stream)
        if queue.independent:
            yield from enumerate(queue.stream[:learnt])
            return
        for index in range(learnt):
            seen = len(queue.stream) if queue.joint or self.config.unseen else index + 1
            yield from ((index, task) for task in queue.stream[:seen])

    def missing_cells(self, learnt: int) -> list[tuple[int, Task]]:
        """Those that the run directory lacks, as rank 0 sees it; first those of the model that it has in memory."""
        queue, in_memory = self.queue, self.queue.model.at
        tasks = queue.learnt_tasks

        def missing() -> list[tuple[int, int]]:
            cells = [
                (i, task.index)
                for i, task in self.wanted_cells(learnt)
                if not queue.directory.has_cell(tasks[i] if i >= 0 else None, task)
            ]
            return sorted(cells, key=lambda c: (c[0] != in_memory, *c))

        return [(index, queue.stream[j]) for index, j in queue._on_main(missing)]

    def score_missing(self, learnt: int) -> None:
        """Score, then measure general ability; the ranks share the batches.

        DeepSpeed's and FSDP2's models were left at the commit, and `after` loads it on every rank. So `generate` runs
        without an engine, which would have to collect the weights for every token, and the scores are those of the
        files that are kept, whatever trained them.

        Raises:
            Interrupted: if a signal came; cells that are finished are kept.
        """
        queue = self.queue
        tasks = queue.learnt_tasks
        for index, task in self.missing_cells(learnt):
            model = queue.model.after(index).to(self._device)
            after = tasks[index] if index >= 0 else None
            name = after.name if after is not None else "no task"
            key = queue._on_main(lambda: queue.directory.model_key(after))  # noqa: B023 - called at once
            log = queue.directory.answers(after, task, key, queue.processes.rank)
            cell = evaluate_task(
                model,
                queue.model.tokenizer,
                task,
                self.config,
                max_prompt_length=queue._data.max_prompt_length,
                description=f"after {name}: scoring {task.name}",
                autocast_dtype=self._autocast,
                ranks=queue.processes,
                log=log,
                packing=queue._packing(task) if task.is_text else None,
            )
            if task.end_task is not None:
                cell = self._score_end_task(index, task, cell, f"after {name}: end task of {task.name}")
            queue._on_main(lambda: queue.directory.write_cell(after, task, cell))  # noqa: B023 - called at once
            log.drop()
            queue._say(f"after {name}: {task.name} {cell.metric} = {shown(cell.metric, cell.score)} (n={cell.n})")
            if queue._stop.agreed():
                raise Interrupted(f"stopped while scoring after {name}")
        self.measure_general(learnt)

    def _score_end_task(self, index: int, task: Task, cell: Any, title: str) -> Any:
        """The cell of a task's end task, fine-tuned from the commit: the model in memory stays as it is."""
        queue = self.queue
        return score_end_task(
            queue.model.load(index).to(self._device),
            queue.model.tokenizer,
            task.end_task,
            self.config,
            queue._plain_args(),
            max_prompt_length=queue._data.max_prompt_length,
            max_completion_length=queue._data.max_completion_length,
            perplexity=cell,
            description=title,
            autocast_dtype=self._autocast,
            ranks=queue.processes,
        )

    # -- general ability ---------------------------------------------------------------------------------------------

    def missing_general(self, learnt: int) -> list[tuple[int, str]]:
        """(task index, probe) of what is not measured yet; first those of the model in memory."""
        queue, in_memory = self.queue, self.queue.model.at
        tasks = queue.learnt_tasks

        def missing() -> list[tuple[int, str]]:
            found = self.general.missing(queue.directory, tasks[:learnt], last=len(tasks) - 1)
            return sorted(found, key=lambda m: (m[0] != in_memory, m[0]))

        return [(index, probe) for index, probe in queue._on_main(missing)]

    def measure_general(self, learnt: int) -> None:
        """Measure what is missing.

        Raises:
            Interrupted: if a signal came; what is measured is kept.
        """
        queue = self.queue
        for index, probe in self.missing_general(learnt):
            model = queue.model.after(index).to(self._device)
            after = queue.learnt_tasks[index] if index >= 0 else None
            with queue._clear_errors():
                line = self.general.measure(
                    probe, after, model, queue.model.tokenizer, self._autocast, queue.directory, queue.processes
                )
            queue._say(line)
            if queue._stop.agreed():
                raise Interrupted("stopped while measuring general ability")

    # -- how ---------------------------------------------------------------------------------------------------------

    @property
    def _device(self) -> torch.device:
        return training_device(bool(self.queue._option(None, "use_cpu")))

    @property
    def _autocast(self) -> torch.dtype | None:
        return torch.bfloat16 if self.queue._option(None, "bf16") else None
