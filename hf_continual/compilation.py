"""Models compiled with `torch.compile`: compiled anew for each task, with its taps, and their graph breaks counted.

A hook, a tap on attention, an adapter that a task adds: all of it is traced into the compiled code with the rest of the
model. Hooks are not guarded (PyTorch's `skip_nnmodule_hook_guards`), so code compiled for one task must not run in
another: it is forgotten when a task begins, and when its taps are removed. Only the training forward is compiled;
teachers, what a method measures at the end of a task, and generation run the model as it is.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DynamoBackend, is_compiled_module
from torch import nn

from .errors import InputError

logger = logging.getLogger(__name__)

BACKENDS = ("single", "ddp", "zero1", "zero2")
"""Where a test has shown that compiled training computes the same with methods."""
FIRST_STEPS = 4
"""After so many micro-batches the breaks are first logged; stored rows have come between new ones by then."""


# -- around a training -------------------------------------------------------------------------------------------------


def is_compiled(accelerator: Any, model: Any) -> bool:
    """Whether training runs compiled code: by the arguments, by `accelerate launch`, or by the user's own hand."""
    if accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
        return True
    return any(is_compiled_module(m) or m._compiled_call_impl is not None for m in model.modules())


def check_compiled(model: Any, backend: str, methods: list[str]) -> None:
    """Raise InputError where methods have not been shown to work in a compiled model."""
    if is_compiled_module(model):
        raise InputError(
            f"the model given to the trainer with method '{methods[0]}' went through torch.compile already, and its "
            "arguments cannot be seen any more; give the model itself and torch_compile=True"
        )
    if backend not in BACKENDS:
        raise InputError(
            f"torch_compile=True with method '{methods[0]}' is tested on {', '.join(BACKENDS)} and this run is "
            f"{backend}; leave torch_compile out, or use one of these"
        )


def take_off(model: nn.Module) -> None:
    """Undo what accelerate's `prepare` left on a model, so that the next Trainer compiles it again.

    The mark "prepared" that accelerate sets on the compiled module lands on the model inside, and a second Trainer
    would train that model as it is: not compiled. The forward under autocast is taken off as well, or each task would
    wrap it once more.
    """
    own = model.__dict__
    own.pop("_is_accelerate_prepared", None)
    original = own.pop("_original_forward", None)
    if original is not None:
        own.pop("forward", None)
        if model.forward != original:
            own["forward"] = original


def forget_environment(args: Any) -> None:
    """Remove the variables by which `TrainingArguments(torch_compile=True)` would compile every later Trainer too.

    The Trainer has handed their values on by then.
    """
    if getattr(args, "torch_compile", False):
        for name in ("ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_DYNAMO_MODE"):
            os.environ.pop(name, None)


# -- graph breaks ------------------------------------------------------------------------------------------------------


@dataclass
class CompileReport:
    """What `torch.compile` did while it was watched.

    Attributes:
        graphs: how many graphs were compiled: one, one more for each further kind or shape of batch, and more where
            it breaks.
        breaks: how often tracing broke off, by reason, each compilation counted; what breaks is split, not skipped.
    """

    graphs: int = 0
    breaks: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.breaks.values())

    def __str__(self) -> str:
        return f"{_count(self.graphs, 'graph')}, {_count(self.total, 'graph break')}"

    def as_log(self) -> dict[str, Any]:
        """For `log_history`: reasons by their first line."""
        reasons: Counter[str] = Counter()
        for reason, times in self.breaks.items():
            reasons[first_line(reason)] += times
        return {
            "compile_graphs": self.graphs,
            "compile_graph_breaks": self.total,
            "compile_graph_break_reasons": dict(reasons),
        }


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"


def first_line(reason: str) -> str:
    return reason.strip().splitlines()[0] if reason.strip() else "no reason given"


class CompileWatch:
    """Counts the graphs and graph breaks of all compilations of this process since it was made."""

    def __init__(self) -> None:
        self._before = self._now()
        self._steps = 0

    @staticmethod
    def _now() -> tuple[int, Counter[str]]:
        from torch._dynamo.utils import counters

        return int(counters["stats"]["unique_graphs"]), Counter(counters["graph_break"])

    def report(self) -> CompileReport:
        graphs, breaks = self._now()
        return CompileReport(graphs - self._before[0], dict(breaks - self._before[1]))

    def after_step(self) -> None:
        """Call it after each micro-batch: the first few are reported once, at debug level."""
        self._steps += 1
        if self._steps == FIRST_STEPS:
            self.log(f"after {FIRST_STEPS} micro-batches")

    def log(self, when: str) -> CompileReport:
        report = self.report()
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug("torch.compile %s: %s", when, report)
            for reason, times in report.breaks.items():
                logger.debug("graph break (%d times): %s", times, reason)
        return report


# -- hf-continual env --------------------------------------------------------------------------------------------------

DEFAULT_OPTIONS: dict[str, dict[str, Any]] = {name: {"count": 4} for name in ("replay", "er", "derpp", "seekr")}
"""Options without which a method has nothing to do, or too much, on four rows."""


def compiler_found() -> str | None:
    """The C++ compiler with which the backend `inductor` builds code for the CPU."""
    for name in (os.environ.get("CXX"), "g++", "clang++"):
        if name and (path := shutil.which(name)):
            return path
    return None


def describe_compile() -> str:
    """One line on what `torch.compile` finds here."""
    names = ", ".join(torch.compiler.list_backends())
    compiler = compiler_found()
    if compiler is None:
        return f"torch.compile: {names}; no C++ compiler, so inductor does not run on the CPU (install g++)"
    return f"torch.compile: {names}; C++ compiler {compiler}"


def toy_graph_breaks(method: Any, lora: bool = True) -> CompileReport:
    """Graphs and breaks of the second of two toy tasks with this method, on a tiny Llama; trains for seconds.

    The model is traced and not optimised (backend `eager`): where it breaks is the same with every backend.
    """
    import datasets

    from .methods.base import make_method
    from .testing import tiny_model, toy_rows, train_task

    made = make_method(method)
    model = tiny_model("llama", lora=lora)
    showing = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        with tempfile.TemporaryDirectory() as folder:
            options: dict[str, Any] = {"per_device_train_batch_size": 2, "logging_strategy": "no"}
            train_task(model, toy_rows(rows=4), [made], Path(folder) / "0", **options)
            trainer = train_task(
                model, toy_rows(rows=8, seed=1), [made], Path(folder) / "1", torch_compile_backend="eager", **options
            )
    finally:
        if showing:
            datasets.enable_progress_bars()
    return trainer.compile_report


__all__ = ["CompileReport", "CompileWatch", "toy_graph_breaks"]
