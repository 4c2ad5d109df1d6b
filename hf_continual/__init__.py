"""The Hugging Face Trainer, learning one task after another without forgetting."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "ContinualMethod": "methods.base",
    "ContinualMixin": "trainer",
    "ContinualSeq2SeqTrainer": "trainer",
    "ContinualSeq2SeqTrainingArguments": "training_args",
    "ContinualTrainer": "trainer",
    "ContinualTrainingArguments": "training_args",
    "InputError": "errors",
    "MethodContext": "methods.base",
    "Task": "tasks",
    "TaskQueue": "task_queue",
}

if TYPE_CHECKING:
    from .errors import InputError
    from .methods.base import ContinualMethod, MethodContext
    from .task_queue import TaskQueue
    from .tasks import Task
    from .trainer import ContinualMixin, ContinualSeq2SeqTrainer, ContinualTrainer
    from .training_args import ContinualSeq2SeqTrainingArguments, ContinualTrainingArguments

__all__ = [
    "ContinualMethod",
    "ContinualMixin",
    "ContinualSeq2SeqTrainer",
    "ContinualSeq2SeqTrainingArguments",
    "ContinualTrainer",
    "ContinualTrainingArguments",
    "InputError",
    "MethodContext",
    "Task",
    "TaskQueue",
    "__version__",
]


def __getattr__(name: str) -> Any:
    # Loaded on first use, so that `hf-continual --help` does not wait for torch.
    if name in _WHERE:
        return getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
