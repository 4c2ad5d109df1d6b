"""`isolate_tasks`: each task in a process of its own, so that nothing of one stays in memory for the next."""

from __future__ import annotations

import multiprocessing
import os
from typing import TYPE_CHECKING, Any

import torch

from .errors import ForgettingLimit, InputError, Interrupted
from .models import first_line
from .stopping import end_with_parent, forwarding_signals

if TYPE_CHECKING:
    from .task_queue import TaskQueue

__all__ = ["run_isolated"]

ERRORS: dict[str, type[Exception]] = {"interrupted": Interrupted, "error": InputError, "forgotten": ForgettingLimit}
"""What a child answers where it does not finish its task."""


def run_isolated(queue: TaskQueue) -> None:
    """Start processes, one after another, each of which learns and scores the next task, until none is left.

    Raises:
        InputError: if the queue cannot be sent there, or a process ends before its task is learnt.
        Interrupted, ForgettingLimit: as in one process.
    """
    context = multiprocessing.get_context("spawn")
    finished = False
    while not finished:
        receiver, sender = context.Pipe(duplex=False)
        given = (sender, torch.get_num_threads(), queue._options())
        child = context.Process(target=_learn_one_task, args=given)
        try:
            child.start()
        except Exception as error:  # pickling has no error of its own
            raise InputError(
                f"isolate_tasks: the queue cannot be sent to another process ({first_line(error)}); give the model "
                "as a folder or hub id, and methods, callbacks and collators as objects of classes in a module"
            ) from error
        sender.close()
        with forwarding_signals(child):
            try:
                answer = receiver.recv()
            except EOFError:
                answer = {}
            child.join()
        receiver.close()
        for name, error_class in ERRORS.items():
            if name in answer:
                raise error_class(answer[name])
        if "finished" not in answer:
            raise InputError(
                f"isolate_tasks: the process of a task ended with exit code {child.exitcode} before the task was "
                "learnt; what is learnt is kept, and the same command goes on from there"
            )
        finished = answer["finished"]
    queue.model.release()


def _learn_one_task(sender: Any, threads: int, options: dict[str, Any]) -> None:
    """What the child runs."""
    from .task_queue import TaskQueue

    os.setsid()  # SIGINT of the terminal comes through the parent, once
    end_with_parent()
    torch.set_num_threads(threads)  # sums are split by threads, so another number gives other last digits
    try:
        sender.send({"finished": TaskQueue(**options)._run(one_task=True)})
    except tuple(ERRORS.values()) as error:
        sender.send({name: str(error) for name, error_class in ERRORS.items() if isinstance(error, error_class)})
