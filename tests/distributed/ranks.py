"""Several processes in a test: forked from a server that has imported everything, so that two ranks take a second."""

import gc
import multiprocessing
import os
import socket
import sys
import time
import traceback
import warnings
from importlib import import_module
from pathlib import Path

PRELOAD = [
    "torch", "transformers.trainer", "peft", "accelerate", "datasets", "deepspeed", "deepspeed.runtime.zero.stage3",
    "deepspeed.module_inject.auto_ep_layer", "torch._inductor.compile_fx", "hf_continual.methods.kif",
    "hf_continual.testing", "hf_continual.task_queue",
]  # fmt: skip


def _child(rank, world_size, port, folder, function, args):
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1",
    )  # fmt: skip
    gc.freeze()  # what the server imported need not be searched again by each of the trainer's collections
    status = 1
    try:
        import torch

        import hf_continual.distributed

        warnings.filterwarnings("ignore")
        torch.set_num_threads(1)
        # gloo does the work on a CPU; compiling DeepSpeed's shared-memory operator would take most of a minute.
        import_module("deepspeed.comm.torch").build_shm_op = lambda: None
        hf_continual.distributed._GIVEN_BY_LAUNCHER = None
        function(rank, *args)
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
            time.sleep(0.3)  # gloo's threads die badly while the interpreter exits
        status = 0
    except BaseException:
        (Path(folder) / f"rank{rank}.error").write_text(traceback.format_exc())
    finally:
        sys.stdout.flush()
        os._exit(status)


def run_ranks(function, world_size, folder, *args, timeout=150, check=True):
    """Run `function(rank, *args)` on every rank; returns the exit codes, and fails with the tracebacks of the ranks."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    children = [
        context.Process(target=_child, args=(rank, world_size, port, folder, function, args))
        for rank in range(world_size)
    ]
    for child in children:
        child.start()
    deadline = time.monotonic() + timeout
    for child in children:
        child.join(max(0.1, deadline - time.monotonic()))
    for child in children:
        if child.is_alive():
            child.kill()
            child.join()
    codes = [child.exitcode for child in children]
    if check and any(codes):
        errors = "\n".join(path.read_text() for path in sorted(folder.glob("rank*.error")))
        raise AssertionError(f"the ranks ended with {codes}\n{errors}")
    return codes
