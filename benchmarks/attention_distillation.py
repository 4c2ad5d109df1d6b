"""What distilling the attention of chosen heads costs beside the same replay step without it.

    python benchmarks/attention_distillation.py --threads 1

A step is forward and backward of one stored row of `--length` tokens through a Llama of `--layers` layers, with a task
loss. Modes, interleaved round by round in random order:

- `replay`: the step without attention distillation (SDPA);
- `heads, rows`: 8 heads a layer, 100 query rows; `heads, all rows`; the latter `recomputed` in backward;
- `outputs`: the outputs of the same heads and 100 rows instead of their weights;
- `reference`: eager attention that returns the maps of all heads, and a KL on 8 of them: the published code's way.

*Saved* is what autograd holds for backward: the bytes of all distinct storages that it saves, counted by
`saved_tensors_hooks`, without parameters and without the teacher's constants. `--parts disk` writes a buffer with the
signals of 50 rows of 1536 tokens (128 heads, 100 query rows), says its size, and how much memory reading one row takes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from step_overhead import ratio
from tabulate import tabulate
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from hf_continual.attention import KWARG, Capture, Distil, LayerTarget, attention_kl
from hf_continual.provenance import versions
from hf_continual.signals import AttentionSignal, LogitSignal, RowSignals, SignalStore
from hf_continual.taps import AttentionTap

MODES = ("replay", "heads, rows", "heads, all rows", "recomputed", "outputs", "reference")


def build_model(options: argparse.Namespace) -> LlamaForCausalLM:
    set_seed(0)
    config = LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.hidden,
        intermediate_size=int(2.75 * options.hidden),
        num_hidden_layers=options.layers,
        num_attention_heads=options.model_heads,
        num_key_value_heads=options.model_heads,
        max_position_embeddings=max(2048, options.length),
    )
    return LlamaForCausalLM(config).to(options.device).train()


class Modes:
    """One forward pass with its losses for each mode, on the same weights, row and teacher."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.model = build_model(options)
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(3, options.vocabulary, (1, options.length), generator=generator)
        self.batch = {"input_ids": ids.to(options.device), "labels": ids.to(options.device)}
        chosen = torch.randperm(options.model_heads, generator=generator)[: options.heads].sort().values
        rows = torch.randperm(options.length, generator=generator)[: options.rows].sort().values
        self.heads, self.rows = chosen, rows
        self.layers = [f"model.layers.{i}.self_attn" for i in range(options.layers)]
        # A teacher that differs: the same row read by a model with other weights in its projections.
        self.teachers = {kind: self._teacher(kind, rows) for kind in ("weights", "outputs")}
        self.all_rows = self._teacher("weights", torch.arange(options.length))

    def _target(self, rows: Tensor) -> LayerTarget:
        heads = self.heads[None]
        target = LayerTarget(
            None,
            heads,
            torch.ones_like(heads, dtype=torch.bool),
            rows[None],
            torch.ones(1, len(rows), dtype=torch.bool),
        )
        return target.to(self.options.device)

    def _teacher(self, kind: str, rows: Tensor) -> dict[str, LayerTarget]:
        request = Capture(kind, {name: self._target(rows) for name in self.layers})
        state = {n: p.detach().clone() for n, p in self.model.named_parameters() if ".self_attn." in n}
        with torch.no_grad(), AttentionTap(self.model):
            for name, parameter in self.model.named_parameters():
                if name in state:
                    parameter.mul_(1.1)
            self.model(input_ids=self.batch["input_ids"], **{KWARG: request})
            for name, parameter in self.model.named_parameters():
                if name in state:
                    parameter.copy_(state[name])
        targets = {}
        for name in self.layers:
            target = self._target(rows)
            target.values = request.values[name]
            targets[name] = target
        return targets

    def constants(self) -> set[int]:
        """Storages that are there anyway: parameters, the batch, and what the teacher said."""
        tensors = [*self.model.parameters(), *self.model.buffers(), *self.batch.values()]
        for targets in (*self.teachers.values(), self.all_rows):
            for target in targets.values():
                tensors += [t for t in vars(target).values() if torch.is_tensor(t)]
        return {t.untyped_storage().data_ptr() for t in tensors}

    def loss(self, mode: str) -> Tensor:
        if mode == "replay":
            return self.model(**self.batch).loss
        if mode == "reference":
            self.model.set_attn_implementation("eager")
            outputs = self.model(**self.batch, output_attentions=True)
            self.model.set_attn_implementation("sdpa")
            mask = torch.ones(1, self.options.length, dtype=torch.bool, device=self.options.device)
            terms = [
                attention_kl(self.all_rows[name].values, maps[:, self.heads], mask)
                for name, maps in zip(self.layers, outputs.attentions, strict=True)
            ]
            return outputs.loss + 1e3 * torch.stack(terms).mean()
        kind = "outputs" if mode == "outputs" else "weights"
        targets = self.all_rows if mode in ("heads, all rows", "recomputed") else self.teachers[kind]
        request = Distil(kind, targets, recompute=mode == "recomputed")
        with AttentionTap(self.model):
            task = self.model(**self.batch, **{KWARG: request}).loss
        return task + 1e3 * torch.stack([loss.mean() for loss in request.losses.values()]).mean()


def saved_bytes(make_loss: Callable[[], Tensor], known: set[int]) -> int:
    """Bytes of the distinct storages that autograd holds for the backward of a loss."""
    found: dict[int, int] = {}
    held = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)  # an address that is free again would be counted once
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        make_loss().backward()
    return sum(found.values())


def measure_steps(options: argparse.Namespace) -> dict[str, Any]:
    modes = Modes(options)
    known = modes.constants()
    saved = {mode: saved_bytes(lambda mode=mode: modes.loss(mode), known) for mode in MODES}
    order = np.random.default_rng(0)
    clock: dict[str, list[float]] = {mode: [] for mode in MODES}
    cpu: dict[str, list[float]] = {mode: [] for mode in MODES}
    for step in range(options.warmup + options.steps):
        for index in order.permutation(len(MODES)):
            mode = MODES[index]
            modes.model.zero_grad(set_to_none=True)
            _wait(options)
            start, start_cpu = time.perf_counter(), time.process_time()
            modes.loss(mode).backward()
            _wait(options)
            if step >= options.warmup:
                clock[mode].append(time.perf_counter() - start)
                cpu[mode].append(time.process_time() - start_cpu)
    plain, plain_cpu = np.array(clock["replay"]), np.array(cpu["replay"])
    return {
        "seconds": {mode: float(np.median(values)) for mode, values in clock.items()},
        "ratios": {mode: ratio(np.array(clock[mode]), plain, 0) for mode in MODES[1:]},
        "cpu_ratios": {mode: ratio(np.array(cpu[mode]), plain_cpu, 0) for mode in MODES[1:]},
        "saved_bytes": saved,
        "saved_ratios": {mode: saved[mode] / saved["replay"] for mode in MODES[1:]},
    }


def _wait(options: argparse.Namespace) -> None:
    if options.device == "cuda":
        torch.cuda.synchronize()


def resident_bytes() -> int:
    """Memory of this process that is not backed by a file: what is mapped from one does not count."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("/proc/self/status has no RssAnon")


def measure_disk(options: argparse.Namespace) -> dict[str, Any]:
    """A buffer of `--disk_rows` rows of 1536 tokens: 128 heads over 24 layers, 100 query rows, top 256 of 32 answer
    positions' logits."""
    generator = torch.Generator().manual_seed(0)
    counts = [6] * 8 + [5] * 16  # 128 heads in 24 layers
    tokens, rows = options.disk_length, 100
    with tempfile.TemporaryDirectory() as folder:
        store = SignalStore(Path(folder), {"kind": "benchmark"})
        start = time.perf_counter()
        for number in range(options.disk_rows):
            logits = LogitSignal.from_logits(torch.randn(32, 32000, generator=generator), torch.arange(32), 256)
            attention = {}
            for layer, heads in enumerate(counts):
                values = torch.rand(heads, rows, tokens, generator=generator).half()
                chosen = torch.arange(heads, dtype=torch.int32), torch.arange(rows, dtype=torch.int32)
                attention[f"layers.{layer}.self_attn"] = AttentionSignal("weights", ("input", "input"), *chosen, values)
            store.write(f"000-{number:07d}", RowSignals({"input": tokens}, logits, attention))
        written = time.perf_counter() - start
        size = store.bytes()
        store.save(Path(folder) / "saved")
        fresh, start = SignalStore(), time.perf_counter()
        fresh.load(Path(folder) / "saved")
        loaded = time.perf_counter() - start
        before, start = resident_bytes(), time.perf_counter()
        row = fresh.read(fresh.ids[options.disk_rows // 2])
        read = time.perf_counter() - start
        sum(float(signal.values[0, 0].float().sum()) for signal in row.attention.values())
        return {
            "rows": options.disk_rows,
            "bytes": size,
            "write_seconds": written,
            "load_and_verify_seconds": loaded,
            "read_one_row_seconds": read,
            "anonymous_memory_of_a_read": resident_bytes() - before,
        }


def steps_table(result: dict[str, Any]) -> str:
    rows = [
        ["replay", f"{result['seconds']['replay']:.3f} s", "", f"{result['saved_bytes']['replay'] / 2**20:.0f} MiB"]
    ]
    for mode in MODES[1:]:
        times, cpu = result["ratios"][mode], result["cpu_ratios"][mode]
        rows.append(
            [
                mode,
                f"{times['median']:.3f} ({times['low']:.3f}-{times['high']:.3f})",
                f"{cpu['median']:.3f} ({cpu['low']:.3f}-{cpu['high']:.3f})",
                f"{result['saved_ratios'][mode]:.3f}",
            ]
        )
    return tabulate(rows, ["mode", "clock", "CPU time", "saved for backward"], "github", disable_numparse=True)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--parts", nargs="+", default=["steps", "disk"], choices=["steps", "disk"])
    add("--length", type=int, default=1024, help="tokens of the stored row")
    add("--layers", type=int, default=2)
    add("--hidden", type=int, default=1024)
    add("--model_heads", type=int, default=32)
    add("--vocabulary", type=int, default=1000)
    add("--heads", type=int, default=8, help="distilled heads of each layer")
    add("--rows", type=int, default=100, help="distilled query rows")
    add("--steps", type=int, default=15)
    add("--warmup", type=int, default=2)
    add("--disk_rows", type=int, default=50)
    add("--disk_length", type=int, default=1536)
    add("--threads", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--out", type=Path, help="write the results as JSON")
    return parser


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure, print the tables, and return what `--out` writes."""
    options = make_parser().parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    machine = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or platform.machine()
    settings = {k: v for k, v in vars(options).items() if k != "out"}
    results: dict[str, Any] = {
        "settings": {**settings, "threads": torch.get_num_threads(), "cpus": os.cpu_count(), "machine": machine},
        "versions": versions(),
    }
    if "steps" in options.parts:
        results["steps"] = measure_steps(options)
        print(steps_table(results["steps"]), end="\n\n", flush=True)
    if "disk" in options.parts:
        results["disk"] = measure_disk(options)
        print(json.dumps(results["disk"], indent=1), flush=True)
    if options.out is not None:
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    return results


if __name__ == "__main__":
    main()
