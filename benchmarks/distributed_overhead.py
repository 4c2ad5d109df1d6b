"""What a method adds to an optimizer step of two processes: time and communication, on each backend, over gloo.

    python benchmarks/distributed_overhead.py --out overhead.json
    python benchmarks/distributed_overhead.py --backends ddp zero2 --methods migu kif --rounds 20

A Llama from its configuration with random weights, LoRA r 8 on all linear layers, and for `migu_full` full fine-tuning.
`plain` is the Trainer of transformers; the methods run in a ContinualTrainer, in their second task where they need an
earlier one. SEEKR and DER++ replay in every fourth step, A-GEM and GEM draw as many stored rows a step as new ones.

**Time.** Every method of a backend has two processes of its own, which stay until the end and run a block of steps when
their turn comes, in a new random order each round; so only two processes run at any moment, and a machine that gets
busier slows all methods. A ratio is that of two blocks of one round; printed are the median over rounds and its
bootstrap interval, for the time on the clock and for the CPU time of both processes.

**Communication** is counted, not estimated: a dispatch mode sees each `c10d` operator, which every collective of torch
passes, whether Python calls it (FSDP2, DeepSpeed, the package) or C++ (the buckets of DDP, in backward, which the CPU
runs in the same thread); a test compares with the calls that gloo records. Counted is what one rank takes part in
during a step, from one `on_step_begin` to the next. The bytes of a collective are those of the whole tensor: of an
all-reduce its input, of an all-gather its output, of a reduce-scatter its input (which gloo does as an all-reduce); a
ring sends 2 (W - 1) / W times that for an all-reduce and (W - 1) / W times for the others.
Steps that are counted are not timed.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import multiprocessing
import os
import platform
import random
import socket
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import datasets
import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from tabulate import tabulate
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, default_data_collator, set_seed
from transformers.trainer_callback import PrinterCallback

from hf_continual.distributed import check_backend, release_engine
from hf_continual.errors import InputError
from hf_continual.methods.base import MethodList, method_class
from hf_continual.models import fix_loss_scaling
from hf_continual.provenance import versions
from hf_continual.testing import backend_options, tiny_model
from hf_continual.trainer import ContinualTrainer
from hf_continual.training_args import ContinualTrainingArguments

WORLD_SIZE = 2
BACKENDS = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
PERIOD = 4  # steps; the last of them is one of stored rows where a method has such steps
WARMUP = 4  # DDP arranges its buckets anew, ZeRO-3 learns the order of the modules
STORING = {"replay", "seekr", "derpp", "agem", "gem"}
PAST = {"olora", "ewc", "lwf", *STORING}  # they do nothing in a first task
OPTIONS: dict[str, dict[str, Any]] = {
    "migu": {"skip_first_task": False}, "seekr": {"track_drift": False}, "ewc": {"fisher_rows": 8},
    "agem": {"memory_batch_size": 4}, "gem": {"memory_batch_size": 4},
}  # fmt: skip
METHODS = ("naive", "migu", "kif", "tasl", "olora", "replay", "seekr", "derpp", "ewc", "lwf", "agem", "migu_full")
PRELOAD = [
    "torch", "transformers.trainer", "peft", "accelerate", "datasets", "deepspeed", "deepspeed.runtime.zero.stage3",
    "deepspeed.module_inject.auto_ep_layer", "torch._inductor.compile_fx", "hf_continual.methods.kif",
    "hf_continual.testing",
]  # fmt: skip


# -- communication -----------------------------------------------------------------------------------------------------

COLLECTIVES = {  # operators of torch, without their namespace and last underscore
    "allreduce": "all_reduce", "allreduce_coalesced": "all_reduce", "all_reduce": "all_reduce",
    "all_reduce_coalesced": "all_reduce", "broadcast": "broadcast", "reduce": "reduce", "allgather": "all_gather",
    "allgather_coalesced": "all_gather", "_allgather_base": "all_gather",
    "allgather_into_tensor_coalesced": "all_gather", "all_gather_into_tensor": "all_gather",
    "all_gather_into_tensor_coalesced": "all_gather", "all_gather_into_tensor_out": "all_gather",
    "reduce_scatter": "reduce_scatter", "_reduce_scatter_base": "reduce_scatter",
    "reduce_scatter_tensor_coalesced": "reduce_scatter", "reduce_scatter_tensor": "reduce_scatter",
    "reduce_scatter_tensor_out": "reduce_scatter", "alltoall": "all_to_all", "alltoall_base": "all_to_all",
    "all_to_all_single": "all_to_all", "gather": "gather", "scatter": "scatter", "send": "send", "recv": "recv",
    "barrier": "barrier",
}  # fmt: skip
NO_COLLECTIVES = {"wait_tensor", "_wrap_tensor_autograd", "check_for_nan"}
Counts = dict[str, list[int]]
"""Calls and bytes by the name of the collective."""


class CommunicationCounter(TorchDispatchMode):
    """Counts the collectives of this process, and their bytes, while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counts = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its own operators and collectives come back here
        result = func(*args, **(kwargs or {}))
        space, _, name = func.name().partition("::")
        if space in ("c10d", "_c10d_functional", "_c10d_functional_autograd"):
            name = name.partition(".")[0].rstrip("_")
            if name not in NO_COLLECTIVES:
                found = self.counts.setdefault(COLLECTIVES[name], [0, 0])
                found[0] += 1
                found[1] += 0 if name == "barrier" else _bytes([*args, result])
        return result

    def snapshot(self) -> Counts:
        return {kind: list(found) for kind, found in self.counts.items()}


def _bytes(sides: list[Any]) -> int:
    """Bytes of the larger of a collective's input and output."""
    return max(sum(t.numel() * t.element_size() for t in tree_leaves(side) if torch.is_tensor(t)) for side in sides)


def difference(after: Counts, before: Counts) -> Counts:
    """What `after` has more, without the kinds that are equal."""
    result = {}
    for kind in sorted({*after, *before}):
        calls, size = (a - b for a, b in zip(after.get(kind, [0, 0]), before.get(kind, [0, 0]), strict=True))
        if calls or size:
            result[kind] = [calls, size]
    return result


# -- one process -------------------------------------------------------------------------------------------------------


class _Measured(Exception):
    """Ends a training whose steps have been measured."""


class Turns(TrainerCallback):
    """Counts the communication of `PERIOD` steps, then runs blocks of steps as `connection` asks for them."""

    def __init__(self, connection: Any = None) -> None:
        self.steps: list[Counts] = []
        self._connection = connection
        self._counter = CommunicationCounter()
        self._before: Counts = {}
        self._left: int | None = None
        self._start = (0.0, 0.0)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.perf_counter(), time.process_time()
        counted = state.global_step - WARMUP
        if counted < 0:
            return
        if counted <= PERIOD:
            after = self._counter.snapshot()
            if counted:
                self.steps.append(difference(after, self._before))
            self._before = after
            if counted == 0:
                self._counter.__enter__()
            elif counted == PERIOD:
                self._counter.__exit__(None, None, None)
                if self._connection is None:
                    raise _Measured
                self._tell(steps=self.steps)
                self._wait()
            return
        assert self._left is not None
        self._left -= 1
        if not self._left:
            self._tell(seconds=now[0] - self._start[0], cpu_seconds=now[1] - self._start[1])
            self._wait()

    def _tell(self, **message: Any) -> None:
        self._connection.send_bytes(json.dumps(message).encode())

    def _wait(self) -> None:
        self._left = int(self._connection.recv_bytes())
        if not self._left:
            raise _Measured
        self._start = time.perf_counter(), time.process_time()


def make_model(name: str, job: dict[str, Any]) -> Any:
    """Random weights, the same in every process; LoRA unless the method's name ends in `_full`."""
    lora = not name.endswith("_full")
    if job["size"] == "tiny":
        return tiny_model("llama", lora=lora)
    set_seed(0)
    size = int(job["size"])
    config: Any = LlamaConfig(
        vocab_size=job["vocabulary"], hidden_size=size, intermediate_size=3 * size, num_hidden_layers=job["layers"],
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    model: Any = fix_loss_scaling(LlamaForCausalLM(config))
    if lora:
        set_seed(1)
        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    return model


def make_rows(rows: int, job: dict[str, Any], seed: int) -> datasets.Dataset:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, job["vocabulary"], (rows, job["length"]), generator=generator)
    columns = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    return datasets.Dataset.from_dict({name: column.tolist() for name, column in columns.items()})


def train(name: str, backend: str, job: dict[str, Any], folder: Path, turns: Turns) -> None:
    """Train until `turns` has enough; `name` is a method, `plain`, or either with `_full`."""
    method = name.removesuffix("_full")
    # As many steps as can be asked for, every fourth of them one of stored rows.
    periods = 2 + WARMUP // PERIOD + job["rounds"] * job["block"] // PERIOD
    unit = job["batch"] * WORLD_SIZE
    specs: list[Any] = []
    stored = periods * unit
    if method != "plain":
        options = dict(OPTIONS.get(method, {}))
        if method in STORING:
            options["count"] = stored
        specs = [{"name": method, **options, **job.get("options", {})}]
    methods = MethodList(specs)
    for task in ("past", "measured") if method in PAST else ("measured",):
        measured = task == "measured"
        model = make_model(name, job)
        args = ContinualTrainingArguments(
            output_dir=str(folder / task), per_device_train_batch_size=job["batch"], learning_rate=1e-4,
            max_steps=PERIOD * periods if measured else 1, lr_scheduler_type="constant", optim="adamw_torch",
            gradient_accumulation_steps=job["accumulation"], train_sampling_strategy="sequential", save_strategy="no",
            logging_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False,
            **{"ddp_find_unused_parameters": False, **backend_options(backend)},
        )  # fmt: skip
        if backend == "fsdp2":
            from accelerate.state import PartialState
            from accelerate.utils import DistributedType

            # accelerate has FSDP for accelerators only
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        new = (PERIOD - 1 if methods and getattr(methods[0], "counts_micro_batches", False) else PERIOD) * stored
        rows = make_rows(new * job["accumulation"] if measured else stored, job, int(measured))
        trainer_class: Any = ContinualTrainer if specs else Trainer
        extra: dict[str, Any] = {"methods": methods, "task": task} if specs else {}
        trainer = trainer_class(
            model, args, train_dataset=rows, data_collator=default_data_collator,
            callbacks=[turns] if measured else [], **extra,
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        if specs:
            assert trainer.dist.backend == backend
        try:
            trainer.train()
        except _Measured:
            return
        if not measured:
            release_engine(trainer)
    raise AssertionError("the training ended before it was measured")


def count_steps(rank: int, folder: Path, name: str, backend: str, job: dict[str, Any]) -> None:
    """For a process of a test: write the collectives of `PERIOD` steps as JSON."""
    turns = Turns()
    train(name, backend, {**TINY, **job}, folder / name, turns)
    (folder / f"{name}-{rank}.json").write_text(json.dumps(turns.steps))


TINY = {"size": "tiny", "vocabulary": 96, "length": 10, "batch": 2, "accumulation": 1, "rounds": 0, "block": PERIOD}


def _child(rank: int, port: int, name: str, backend: str, job: dict[str, Any], folder: Path, connection: Any) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD_SIZE), LOCAL_WORLD_SIZE=str(WORLD_SIZE),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1",
    )  # fmt: skip
    gc.freeze()
    status = 1
    try:
        import hf_continual.distributed

        warnings.filterwarnings("ignore")
        tqdm.set_lock(threading.RLock())  # its own would be a semaphore that outlives the process
        datasets.disable_progress_bars()
        torch.set_num_threads(1)
        if backend.startswith("zero"):
            importlib.import_module("deepspeed.comm")
            # gloo does the work on a CPU; compiling DeepSpeed's shared-memory operator would take most of a minute.
            setattr(sys.modules["deepspeed.comm.torch"], "build_shm_op", lambda: None)  # noqa: B010
        hf_continual.distributed._GIVEN_BY_LAUNCHER = None
        train(name, backend, job, folder / name, Turns(connection))
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        time.sleep(0.3)  # gloo's threads die badly while the interpreter exits
        status = 0
    except BaseException:
        connection.send_bytes(json.dumps({"error": traceback.format_exc()}).encode())
    finally:
        sys.stdout.flush()
        os._exit(status)


# -- all processes -----------------------------------------------------------------------------------------------------


class Gang:
    """The processes of one method."""

    def __init__(self, name: str, port: int, backend: str, job: dict[str, Any], folder: Path) -> None:
        self.name = name
        context = multiprocessing.get_context("forkserver")
        self._connections: list[Any] = []
        self._processes: list[Any] = []
        for rank in range(WORLD_SIZE):
            ours, theirs = context.Pipe()
            process = context.Process(target=_child, args=(rank, port, name, backend, job, folder, theirs), daemon=True)
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)

    def hear(self) -> list[dict[str, Any]]:
        """The next message of every rank."""
        messages = []
        for rank, connection in enumerate(self._connections):
            if not connection.poll(600):
                raise RuntimeError(f"{self.name}: rank {rank} has not answered for ten minutes")
            try:
                message = json.loads(connection.recv_bytes())
            except EOFError:
                raise RuntimeError(f"{self.name}: rank {rank} ended without a message") from None
            if "error" in message:
                raise RuntimeError(f"{self.name}: rank {rank} failed\n{message['error']}")
            messages.append(message)
        return messages

    def run(self, steps: int) -> tuple[float, float]:
        """Seconds of a block of steps, and CPU seconds of all ranks."""
        self._ask(steps)
        messages = self.hear()
        return max(m["seconds"] for m in messages), sum(m["cpu_seconds"] for m in messages)

    def _ask(self, steps: int) -> None:
        for connection in self._connections:
            connection.send_bytes(str(steps).encode())

    def stop(self) -> None:
        self._ask(0)
        for process in self._processes:
            process.join(30)

    def kill(self) -> None:
        for process in self._processes:
            if process.is_alive():
                process.kill()


def _free_ports(number: int) -> list[int]:
    """Below those that systems give to connections, of which every gang opens many before the last one listens."""
    ports = []
    for port in random.sample(range(20000, 30000), 1000):
        with socket.socket() as free:
            if free.connect_ex(("127.0.0.1", port)):
                ports.append(port)
        if len(ports) == number:
            return ports
    raise RuntimeError(f"found no {number} free ports between 20000 and 30000")


@contextmanager
def gangs(names: list[str], backend: str, job: dict[str, Any]) -> Iterator[list[Gang]]:
    """Processes for each name; they are ended in any case."""
    started: list[Gang] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            ports = _free_ports(len(names))
            for name, port in zip(names, ports, strict=True):
                started.append(Gang(name, port, backend, job, Path(folder)))
            yield started
            for gang in started:
                gang.stop()
        finally:
            for gang in started:
                gang.kill()


def measure(backend: str, methods: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """Ratios and communication of the methods on one backend; the plain Trainer, LoRA and full, is beside them."""
    plains = [p for p in ("plain", "plain_full") if any(_plain_of(m) == p for m in methods)]
    names = [*plains, *methods]
    shuffle = random.Random(options.seed)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    cpu: dict[str, list[float]] = {name: [] for name in names}
    with gangs(names, backend, _job(options)) as started:
        steps = {}
        for gang in started:
            messages = gang.hear()
            steps[gang.name] = messages[0]["steps"]
            totals = [[sum(calls for calls, _ in step.values()) for step in m["steps"]] for m in messages]
            assert all(total == totals[0] for total in totals), f"{gang.name}: the ranks differ in their collectives"
        for _ in range(options.rounds):
            for gang in shuffle.sample(started, len(started)):
                clock, work = gang.run(options.block)
                seconds[gang.name].append(clock / options.block)
                cpu[gang.name].append(work / options.block)
    result: dict[str, Any] = {"plain": {}, "methods": {}}
    for plain in plains:
        result["plain"][plain] = {
            "median_seconds": float(np.median(seconds[plain])),
            "steps": steps[plain],
            "seconds": seconds[plain],
        }
    for name in methods:
        plain = _plain_of(name)
        result["methods"][name] = {
            "over": plain,
            "median_seconds": float(np.median(seconds[name])),
            "ratio": ratio(seconds[name], seconds[plain], options.seed),
            "cpu_ratio": ratio(cpu[name], cpu[plain], options.seed),
            "extra": [difference(a, b) for a, b in zip(steps[name], steps[plain], strict=True)],
            "steps": steps[name],
            "seconds": seconds[name],
        }
    return result


def _plain_of(name: str) -> str:
    return "plain_full" if name.endswith("_full") else "plain"


def _job(options: argparse.Namespace) -> dict[str, Any]:
    names = ("size", "layers", "vocabulary", "length", "batch", "accumulation", "rounds", "block")
    return {name: getattr(options, name) for name in names}


def ratio(ours: list[float], plain: list[float], seed: int) -> dict[str, float]:
    """Median over rounds of ours / plain, and its 95 % bootstrap interval."""
    each = np.array(ours) / np.array(plain)
    draws = np.random.default_rng(seed).integers(0, len(each), (2000, len(each)))
    low, high = np.quantile(np.median(each[draws], axis=1), [0.025, 0.975])
    return {"median": float(np.median(each)), "low": float(low), "high": float(high)}


def in_words(steps: list[Counts]) -> str:
    """Collectives of the steps: once if all have the same, else those of each kind of step."""
    texts = []
    for step in steps:
        text = ", ".join(f"{calls:+d} {kind} ({size:+,} B)" for kind, (calls, size) in step.items()) or "0"
        if text not in texts:
            texts.append(text)
    return " | ".join(texts)


def _interval(found: dict[str, float]) -> str:
    return f"{found['median']:.3f} ({found['low']:.2f}-{found['high']:.2f})"


def _split(text: str) -> list[str]:
    return [part for part in text.replace(",", " ").split() if part]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS), help=", ".join(BACKENDS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help=f"{', '.join(METHODS)}, or others")
    parser.add_argument("--size", default="256", help="hidden size; or `tiny`, for tests")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--length", type=int, default=48)
    parser.add_argument("--batch", type=int, default=2, help="rows of a micro-batch of one process")
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=8, help="blocks of each method")
    parser.add_argument("--block", type=int, default=PERIOD, help=f"steps of a block, a multiple of {PERIOD}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", "--json", default=None, help="JSON file for all numbers")
    return parser


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = _parser()
    options = parser.parse_args(argv)
    options.backends = [b for text in options.backends for b in _split(text)]
    options.methods = [m for text in options.methods for m in _split(text)]
    unknown = [b for b in options.backends if b not in BACKENDS]
    if unknown:
        parser.error(f"--backends {unknown[0]} is unknown; choose from {', '.join(BACKENDS)}")
    if options.block < PERIOD or options.block % PERIOD or options.rounds < 1:
        parser.error(
            f"--block {options.block} must be a multiple of {PERIOD}, and --rounds {options.rounds} at least 1"
        )
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOAD)
    load, start = os.getloadavg()[0], time.monotonic()
    found: dict[str, Any] = {
        "settings": vars(options), "versions": versions(), "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(), "load_before": load, "backends": {}, "unsupported": {},
    }  # fmt: skip
    rows = []
    for backend in options.backends:
        usable = []
        for name in options.methods:
            cls = method_class(name.removesuffix("_full"))
            try:
                check_backend(backend, cls.supports, name, getattr(cls, "unsupported", None))
                usable.append(name)
            except InputError as error:
                found["unsupported"].setdefault(backend, {})[name] = str(error)
                rows.append([backend, name, "-", "-", "-", "not supported"])
        result = found["backends"][backend] = measure(backend, usable, options)
        for name, plain in result["plain"].items():
            rows.append([backend, name, f"{1000 * plain['median_seconds']:.0f} ms", "1", "1", in_words(plain["steps"])])
        for name, of in result["methods"].items():
            rows.append(
                [backend, name, f"{1000 * of['median_seconds']:.0f} ms", _interval(of["ratio"]),
                 _interval(of["cpu_ratio"]), in_words(of["extra"])]
            )  # fmt: skip
        if options.out:  # after each backend, so that a later one that fails loses nothing
            Path(options.out).write_text(json.dumps(found, indent=1) + "\n")
        print(f"{backend}: {time.monotonic() - start:.0f} s", file=sys.stderr)
    found["load_after"], found["seconds"] = os.getloadavg()[0], time.monotonic() - start
    print(f"load {load:.1f} before, {found['load_after']:.1f} after; {found['seconds']:.0f} s in all")
    print("Communication: of plain, all of a step; of a method, what it adds. `|` parts steps that differ.")
    header = ["backend", "method", "step", "clock / plain", "CPU / plain", "collectives of a step and their bytes"]
    print(tabulate(rows, header, disable_numparse=True))
    if options.out:
        Path(options.out).write_text(json.dumps(found, indent=1) + "\n")
    return found


if __name__ == "__main__":
    # For the processes, too: on a machine with GPUs it is still gloo and the CPU that are measured.
    os.environ.update(HF_HUB_OFFLINE="1", DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="")
    main()
