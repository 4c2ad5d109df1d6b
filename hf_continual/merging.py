"""Merging what a run has learnt into one plain model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .errors import InputError, did_you_mean
from .lora import LoraView
from .run_state import disk_full

if TYPE_CHECKING:
    from .task_queue import TaskQueue


@torch.no_grad()
def _probe(model: Any, vocabulary: int) -> torch.Tensor:
    """Logits on a fixed input, to compare a model before and after a merge."""
    ids = torch.arange(1, 25).view(1, -1) % vocabulary
    inputs = {"input_ids": ids, "decoder_input_ids": ids} if model.config.is_encoder_decoder else {"input_ids": ids}
    return model.eval()(**inputs).logits.float()  # type: ignore[no-any-return]


def merge_adapters(model: Any, tolerance: float = 1e-3) -> Any:
    """Merge all active LoRA adapters into the base weights; returns the plain model.

    Raises:
        InputError: if the merged model's logits differ by more than `tolerance` of their range.
    """
    view = LoraView(model)
    if not view.is_peft:
        return model
    vocabulary = model.config.vocab_size
    before = _probe(model, vocabulary)
    merged = model.merge_and_unload(adapter_names=view.active)
    after = _probe(merged, vocabulary)
    scale = float(before.abs().max()) or 1.0
    wide = {torch.float32: 1.0, torch.float64: 1.0}.get(next(merged.parameters()).dtype, 50.0)
    error = float((before - after).abs().max()) / scale
    if not error <= tolerance * wide:
        raise InputError(
            f"the merged model differs from the adapted one (relative error {error:.2e}); keep the adapters as they are"
        )
    return merged


def write_merged(queue: TaskQueue, out: Path, task: str | None = None) -> str:
    """Write the model after `task` (default: the last learnt) to `out`, in transformers layout. Returns the task."""
    learnt = [t for t in queue.learnt_tasks if queue.directory.is_learnt(t)]
    if not learnt:
        raise InputError(f"run directory {queue.directory.path} has learnt no task yet; run it first")
    names = [t.name for t in learnt]
    if task is not None and task not in names:
        raise InputError(f"--task {task}: the run has not learnt it{did_you_mean(task, names)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"-o {out}: it is a file or a folder that is not empty; give a new folder")
    index = names.index(task) if task is not None else len(names) - 1
    queue.directory.check_task(learnt[index])
    model = merge_adapters(queue.model.after(index))
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        model.save_pretrained(str(temporary))
        queue.model.tokenizer.save_pretrained(str(temporary))
        temporary.replace(out)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError) and not disk_full(error):
            raise InputError(f"-o {out}: it cannot be written ({error.strerror}); give another folder") from error
        raise
    return names[index]
