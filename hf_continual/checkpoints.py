"""Which checkpoint of a task to continue from, whatever happened while it was written."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from .distributed import processes
from .run_state import try_json, write_json
from .trainer import last_complete_checkpoint

SIZES = "sizes.json"


class CheckpointSizes(TrainerCallback):
    """Notes the size of every file of a checkpoint, so that a damaged one is not resumed from."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        processes().barrier()  # the others may still be writing their parts
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != SIZES)
            write_json(folder / SIZES, {str(p.relative_to(folder)): p.stat().st_size for p in files})


def usable_checkpoint(folder: str | Path, world_size: int = 1) -> Path | None:
    """The newest whole checkpoint, after removing those that a process left half-written or that were damaged since."""
    for path in Path(folder).glob("checkpoint-*"):
        sizes = try_json(path / SIZES)
        # Of several processes, any may have died after rank 0 wrote the Trainer's last file; the sizes come after all.
        if sizes is None and world_size > 1:
            shutil.rmtree(path, ignore_errors=True)
            continue
        sizes = sizes or {}
        if any(not (path / n).is_file() or (path / n).stat().st_size != size for n, size in sizes.items()):
            shutil.rmtree(path, ignore_errors=True)
    newest = last_complete_checkpoint(folder)
    state = (try_json(newest / "trainer_state.json") if newest is not None else None) or {}
    keep = {newest.name if newest is not None else None, Path(state.get("best_model_checkpoint") or "").name}
    for path in Path(folder).glob("checkpoint-*"):
        if path.name not in keep:
            shutil.rmtree(path, ignore_errors=True)
    return newest
