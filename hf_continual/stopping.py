"""Stopping a queue by a signal: at the next step, with a checkpoint, on all processes at once."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback

from .distributed import processes
from .errors import Interrupted

__all__ = ["StopAtSignal", "end_with_parent", "forwarding_signals"]

STOPPING = (signal.SIGINT, signal.SIGTERM)


class StopAtSignal(TrainerCallback):
    """Ends the training at the next step, with a checkpoint, once the flag of a rank is set.

    Attributes:
        trainer: the one that trains, if any.
    """

    in_phases = True

    def __init__(self) -> None:
        self.stop = False
        self.trainer: Any = None
        self.processes = processes()

    def agreed(self) -> bool:
        """The flag of any rank: signals reach the ranks at different steps, or only one, and all must stop at the same.

        Asked after every step, since a checkpoint must come soon after a machine is called back. It is one integer
        between the hosts, in the group beside that of the training: no GPU is waited for, and a process that is gone
        is noticed here, where NCCL alone would go on waiting.
        """
        self.stop = self.processes.any(self.stop)
        return self.stop

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.agreed():
            control.should_save = control.should_training_stop = True
            if self.trainer is not None:
                self.trainer.interrupted = True

    @contextmanager
    def listening(self, say: Callable[[str], None]) -> Iterator[None]:
        """First SIGINT or SIGTERM: stop at the next step with a checkpoint. Second: at once.

        One process alone stops its scoring at once. Several finish the cell, so that all of them stop together.

        Raises:
            Interrupted: where it was stopped at once.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def handle(number: int, frame: Any) -> None:
            if self.stop or (self.trainer is None and self.processes.world_size == 1):
                raise KeyboardInterrupt
            self.stop = True
            where = "stopping, the phase after the merge is done again"  # it has no checkpoints
            if self.trainer is None:
                where = "stopping after this step or score"
            elif self.trainer._phase is None:
                where = "saving a checkpoint at the end of this step"
            say(f"\ninterrupted: {where} (once more to stop at once)")

        self.stop = False
        before = {number: signal.signal(number, handle) for number in STOPPING}
        try:
            yield
        except KeyboardInterrupt as error:
            raise Interrupted("stopped; the last checkpoint and every learnt task are kept") from error
        finally:
            self.trainer = None
            for number, handler in before.items():
                signal.signal(number, handler)


def end_with_parent() -> None:
    """Linux: SIGTERM to this process when the one that started it is gone, which a killed one cannot send itself.

    Else it would train on in the run directory. A launcher passes the signal on to its workers; they save.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


@contextmanager
def forwarding_signals(child: Any) -> Iterator[None]:
    """Pass the same signals on to a child process that leads a session of its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def forward(number: int, frame: Any) -> None:
        os.kill(child.pid, number)

    before = {number: signal.signal(number, forward) for number in STOPPING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
