"""What tracking importance costs, and what fusing an adapter costs.

    python benchmarks/skill_importance.py --threads 1 --out importance.json

`tracker`   time of one update of `ImportanceTracker`, of the loop over the parameters that the reference code of TaSL
            and KIF runs (three fp32 buffers, a NaN check in an `if` for each parameter), and of the plainest version
            with `torch._foreach_*`, on the weights that LoRA (r 8 on q,v and on all linear layers of SmolLM2-135M)
            and full fine-tuning of a T5 of the size of t5-small learn. They take turns in random order; medians, and
            ratios within a round with their bootstrap interval, as in `step_overhead.py`. Beside it the bytes that
            stay, per tracked weight, and the largest sum of what an update allocates for its own use.
`ops`       how many operators an update dispatches with 2, 8 and 30 layers, counted by the profiler: those that Python
            calls (top), all with those that they call in turn (nested), and how often the host waits for a value. On
            an accelerator the buffers are worked on in one piece instead of in pieces of a core's cache, and no value
            is waited for; that path is counted on the device `meta`, which computes nothing and would refuse to wait.
`fusion`    time to fuse a LoRA adapter of the size of a 7B model's (32 layers, q,k,v,o of 4096x4096, r 16), from the
            scores on: normalise, coefficients, fuse; in memory, and from files to a file. No model is loaded.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import torch
from safetensors.torch import save_file
from step_overhead import ratio
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import T5Config, T5ForConditionalGeneration

from hf_continual.importance import ImportanceTracker, accumulate
from hf_continual.methods.kif import KIF, adaptive_coefficients
from hf_continual.methods.tasl import categorical_coefficients
from hf_continual.offline_merge import merge_offline
from hf_continual.provenance import versions
from hf_continual.units import SkillUnits, fuse, fuse_products

PARTS = ("tracker", "ops", "fusion")
HIDDEN, NARROW, INNER = 576, 192, 1536
"""SmolLM2-135M: width, width of k and v, width of the MLP."""
LINEARS = {
    "q_proj": (HIDDEN, HIDDEN), "k_proj": (HIDDEN, NARROW), "v_proj": (HIDDEN, NARROW), "o_proj": (HIDDEN, HIDDEN),
    "gate_proj": (HIDDEN, INNER), "up_proj": (HIDDEN, INNER), "down_proj": (INNER, HIDDEN),
}  # fmt: skip
"""Linear layers of a block: what goes in, what comes out."""
SHAPES = {
    "lora": "LoRA r 8 on q,v, SmolLM2-135M",
    "lora_all": "LoRA r 8 on all linear layers, SmolLM2-135M",
    "full": "all weights of a T5 of the size of t5-small",
}
BETA1 = BETA2 = 0.85


def lora_shapes(layers: int, rank: int, linears: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """Shapes of A and B by name."""
    shapes = {}
    for layer in range(layers):
        for name, (inputs, outputs) in linears.items():
            shapes[f"layers.{layer}.{name}.lora_A.weight"] = (rank, inputs)
            shapes[f"layers.{layer}.{name}.lora_B.weight"] = (outputs, rank)
    return shapes


def shapes_of(case: str, layers: int, options: argparse.Namespace) -> tuple[dict[str, tuple[int, ...]], str]:
    """The tracked weights of a case, and their units."""
    if case != "full":
        chosen = LINEARS if case == "lora_all" else {name: LINEARS[name] for name in ("q_proj", "v_proj")}
        return {**lora_shapes(layers, options.rank, chosen)}, "lora_rank1"
    with torch.device("meta"):
        config = T5Config(vocab_size=options.vocab, d_model=512, d_kv=64, d_ff=2048, num_layers=layers, num_heads=8)
        model = T5ForConditionalGeneration(config)
    return {name: tuple(p.shape) for name, p in model.named_parameters()}, "matrix"


def random_tensors(shapes: Mapping[str, tuple[int, ...]], scale: float, seed: int, device: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: (torch.randn(s, generator=generator) * scale).to(device) for name, s in shapes.items()}


# -- three ways to track -----------------------------------------------------------------------------------------------


class Ours:
    """`ImportanceTracker`."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], scheme: str, order: str) -> None:
        self.tracker = ImportanceTracker(SkillUnits.of_shapes(shapes, scheme), order=order, beta1=BETA1, beta2=BETA2)
        self.names = self.tracker.units.names

    def update(self, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> None:
        names = self.names
        self.tracker.update_lists([weights[name] for name in names], [gradients[name] for name in names])

    def averages(self, names: list[str]) -> tuple[Tensor, Tensor]:
        """Both moving averages as one vector each, in the order of `names`."""
        tracker = self.tracker
        sizes = [torch.Size(piece.shape).numel() for piece in tracker.units.pieces]
        vectors = []
        for flat, factor in ((tracker.sensitivity, 1.0), (tracker.uncertainty, BETA1)):
            by_name = dict(zip(self.names, flat.split(sizes), strict=True))
            vectors.append(torch.cat([by_name[name] for name in names]) * factor)
        return vectors[0], vectors[1]


class Naive:
    """Parameter by parameter, as the reference code does it; three buffers stay."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], scheme: str, order: str) -> None:
        self.order = order
        self.importance: dict[str, Tensor] = {}
        self.sensitivity: dict[str, Tensor] = {}
        self.uncertainty: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> None:
        for name, w in weights.items():
            g = gradients[name]
            if name not in self.importance:
                self.importance[name] = torch.zeros_like(w)
                self.sensitivity[name] = torch.zeros_like(w)
                self.uncertainty[name] = torch.zeros_like(w)
            if torch.isnan(g).any():
                return
            x = w * g
            self.importance[name] = x.abs() if self.order == "first" else (x - 0.5 * x * x).abs()
            self.sensitivity[name] = BETA1 * self.sensitivity[name] + (1 - BETA1) * self.importance[name]
            self.uncertainty[name] = (
                BETA2 * self.uncertainty[name] + (1 - BETA2) * (self.importance[name] - self.sensitivity[name]).abs()
            )

    def averages(self, names: list[str]) -> tuple[Tensor, Tensor]:
        s, u = (torch.cat([d[name].flatten() for name in names]) for d in (self.sensitivity, self.uncertainty))
        return s, u


class Foreach:
    """One multi-tensor call an operation, over all parameters at once."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], scheme: str, order: str) -> None:
        self.order = order
        self.names: list[str] = []
        self.sensitivity: list[Tensor] = []
        self.uncertainty: list[Tensor] = []

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> None:
        if not self.names:
            self.names = list(weights)
            self.sensitivity = [torch.zeros_like(w) for w in weights.values()]
            self.uncertainty = [torch.zeros_like(w) for w in weights.values()]
        g = [gradients[name] for name in self.names]
        if not torch.isfinite(torch.stack(torch._foreach_norm(g))).all():
            return
        x = torch._foreach_mul([weights[name] for name in self.names], g)
        if self.order != "first":
            torch._foreach_addcmul_(x, x, x, value=-0.5)
        torch._foreach_abs_(x)
        torch._foreach_lerp_(self.sensitivity, x, 1 - BETA1)
        torch._foreach_sub_(x, self.sensitivity)
        torch._foreach_abs_(x)
        torch._foreach_lerp_(self.uncertainty, x, 1 - BETA2)

    def averages(self, names: list[str]) -> tuple[Tensor, Tensor]:
        pick = [self.names.index(name) for name in names]
        s, u = (torch.cat([d[i].flatten() for i in pick]) for d in (self.sensitivity, self.uncertainty))
        return s, u


WAYS: dict[str, Any] = {"ours": Ours, "naive": Naive, "foreach": Foreach}


# -- what they take ----------------------------------------------------------------------------------------------------


def storages() -> dict[int, int]:
    """Bytes of every tensor storage that Python holds, by address."""
    found = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), Tensor) and thing.device.type != "meta":
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


def lasting_bytes(update: Callable[[], Any], times: int = 3) -> int:
    """Bytes of the storages that are there after some updates and were not before."""
    gc.collect()
    before = storages()
    for _ in range(times):
        update()
    gc.collect()
    return sum(size for address, size in storages().items() if address not in before)


def scratch_bytes(update: Callable[[], Any]) -> int:
    """Most bytes that one update holds beyond what it holds before and after."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        update()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        update()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def count_ops(update: Callable[[], Any]) -> dict[str, int]:
    """Operators dispatched by one update: those that no other operator calls, all, and those that wait for a value."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        update()
    top = nested = waits = 0
    for event in profiler.events():
        if not event.name.startswith("aten::"):
            continue
        nested += 1
        waits += event.name == "aten::_local_scalar_dense"
        parent = event.cpu_parent
        while parent is not None and not parent.name.startswith("aten::"):
            parent = parent.cpu_parent
        top += parent is None
    return {"top": top, "nested": nested, "waits": waits}


def measure_tracker(case: str, options: argparse.Namespace) -> dict[str, Any]:
    shapes, scheme = shapes_of(case, options.layers or (6 if case == "full" else 30), options)
    elements = sum(torch.Size(s).numel() for s in shapes.values())
    weights = random_tensors(shapes, 0.02, options.seed, options.device)
    gradients = random_tensors(shapes, 1e-4, options.seed + 1, options.device)
    ways = {name: way(shapes, scheme, options.order) for name, way in WAYS.items()}
    lasting = {name: lasting_bytes(lambda w=way: w.update(weights, gradients)) for name, way in ways.items()}
    scratch = {name: scratch_bytes(lambda w=way: w.update(weights, gradients)) for name, way in ways.items()}

    names = list(ways)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    shuffle = random.Random(options.seed)
    for turn in range(options.warmup + options.rounds):
        for name in shuffle.sample(names, len(names)):
            sync(options)
            start = time.perf_counter()
            ways[name].update(weights, gradients)
            sync(options)
            if turn >= options.warmup:
                seconds[name].append(time.perf_counter() - start)

    # All three must have computed the same, to the rounding of fp32.
    s, u = ways["naive"].averages(list(shapes))
    errors = {}
    for name in ("ours", "foreach"):
        own_s, own_u = ways[name].averages(list(shapes))
        # The uncertainty is the difference of two nearly equal numbers, so its rounding is that of the sensitivity.
        errors[name] = float(max((own_s - s).abs().max(), (own_u - u).abs().max()) / s.abs().max())
    arrays = {name: np.array(values) for name, values in seconds.items()}
    result = {
        "what": SHAPES[case],
        "parameters": len(shapes),
        "elements": elements,
        "median_seconds": {name: float(np.median(values)) for name, values in arrays.items()},
        "ratios": {name: ratio(arrays[name], arrays["naive"], options.seed) for name in names if name != "naive"},
        "bytes_per_element": {name: size / elements for name, size in lasting.items()},
        "scratch_bytes": scratch,
        "relative_difference": errors,
        "seconds": seconds,
    }
    # Two fp32 buffers, and one number more: how many updates were counted.
    assert 8 * elements <= lasting["ours"] <= 8 * elements + 64, f"{lasting['ours']} bytes for {elements} weights"
    assert max(errors.values()) < 1e-5, f"the three ways to track disagree: {errors}"
    return result


def sync(options: argparse.Namespace) -> None:
    if options.device == "cuda":
        torch.cuda.synchronize()


def measure_ops(case: str, options: argparse.Namespace) -> dict[str, Any]:
    """Counts by way and number of layers; the second update is counted, which finds the buffers laid out."""
    result: dict[str, Any] = {"what": SHAPES[case], "layers": options.ops_layers}
    for label, way, device in (("ours", Ours, "cpu"), ("ours, accelerator", Ours, "meta"), ("naive", Naive, "cpu")):
        counts = []
        for layers in options.ops_layers:
            shapes, scheme = shapes_of(case, layers, options)
            weights, gradients = (
                {name: torch.full(s, value, device=device) for name, s in shapes.items()} for value in (0.02, 1e-4)
            )
            tracker = way(shapes, scheme, options.order)
            tracker.update(weights, gradients)
            counts.append(count_ops(lambda t=tracker, w=weights, g=gradients: t.update(w, g)))
        result[label] = counts
    return result


# -- fusion ------------------------------------------------------------------------------------------------------------


def measure_fusion(options: argparse.Namespace) -> dict[str, Any]:
    width = options.fusion_width
    shapes = lora_shapes(options.fusion_layers, options.fusion_rank, {f"{x}_proj": (width, width) for x in "qkvo"})
    previous = random_tensors(shapes, 0.02, options.seed, "cpu")
    moved = random_tensors(shapes, 0.01, options.seed + 1, "cpu")
    current = {name: previous[name] + moved[name] for name in shapes}
    units = SkillUnits.of_shapes(shapes, "lora_rank1")
    generator = torch.Generator().manual_seed(options.seed)
    raw, past = (torch.exp(1.5 * torch.randn(len(units), generator=generator).double()) for _ in range(2))

    def run(coefficients: Callable[..., Tensor], merge: Callable[..., Any]) -> Callable[[], Any]:
        def once() -> Any:
            accumulate(raw, past)
            return merge(units, previous, current, coefficients(raw, past))

        return once

    kinds = {
        "adaptive": run(adaptive_coefficients, fuse),
        "categorical": run(categorical_coefficients, fuse),
        "adaptive, products": run(adaptive_coefficients, fuse_products),
    }
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(options.fusion_rounds):
        for name, once in kinds.items():
            start = time.perf_counter()
            once()
            seconds[name].append(time.perf_counter() - start)
    seconds |= from_disk(previous, current, units, raw, past, options)
    return {
        "what": f"{options.fusion_layers} layers, q,k,v,o of {width}x{width}, r {options.fusion_rank}",
        "elements": sum(t.numel() for t in current.values()),
        "units": len(units),
        "median_seconds": {name: float(np.median(values)) for name, values in seconds.items()},
        "seconds": seconds,
    }


def from_disk(
    previous: Mapping[str, Tensor],
    current: Mapping[str, Tensor],
    units: SkillUnits,
    raw: Tensor,
    past: Tensor,
    options: argparse.Namespace,
) -> dict[str, list[float]]:
    """As `hf-continual merge --method kif`: read two adapters and the scores, write the merged one."""
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for side, weights in (("previous", previous), ("current", current)):
            (folder / side).mkdir()
            save_file(dict(weights), folder / side / "adapter_model.safetensors")
            (folder / side / "adapter_config.json").write_text(
                json.dumps({"peft_type": "LORA", "r": options.fusion_rank})
            )
        for space in ("factors", "products"):
            method = KIF(space=space)
            method.scheme_, method.unit_keys_, method.unit_sizes_ = units.scheme, units.keys, units.sizes
            method.raw_, method.before_, method.cumulative_ = raw, past, accumulate(raw, past)
            scores = folder / f"scores-{space}"
            scores.mkdir()
            method.save(scores)
            label = "adaptive, from disk" if space == "factors" else "adaptive, products, from disk"
            seconds[label] = []
            for turn in range(options.fusion_rounds):
                out = folder / f"{space}-{turn}"
                start = time.perf_counter()
                merge_offline("kif", folder / "previous", folder / "current", [scores], out)
                seconds[label].append(time.perf_counter() - start)
                shutil.rmtree(out)
    return seconds


# -- output ------------------------------------------------------------------------------------------------------------


def tracker_table(result: dict[str, Any]) -> str:
    lines = [
        f"{result['what']}: {result['elements'] / 1e6:.2f} M weights in {result['parameters']} parameters",
        f"  {'':10} {'ms/update':>10} {'of naive':>9} {'95 %':>13} {'bytes kept/weight':>18} {'scratch MB':>11}",
    ]
    for name, median in result["median_seconds"].items():
        found = result["ratios"].get(name)
        interval = f"{found['low']:.3f}-{found['high']:.3f}" if found else ""
        lines.append(
            f"  {name:10} {median * 1e3:10.3f} {found['median'] if found else 1:9.3f} {interval:>13} "
            f"{result['bytes_per_element'][name]:18.4f} {result['scratch_bytes'][name] / 1e6:11.2f}"
        )
    return "\n".join(lines)


def ops_table(result: dict[str, Any]) -> str:
    lines = [
        f"{result['what']}: operators of an update, called from Python (all, waits of the host)",
        "  {:20}".format("") + "".join(f"{layers:>10} layers   " for layers in result["layers"]),
    ]
    for label, counts in result.items():
        if label not in ("what", "layers"):
            cells = (f"{c['top']:>6} ({c['nested']}, {c['waits']})" for c in counts)
            lines.append(f"  {label:20}" + "".join(f"{cell:>20}" for cell in cells))
    return "\n".join(lines)


def fusion_table(result: dict[str, Any]) -> str:
    lines = [
        f"Fusion of a LoRA adapter, {result['what']}: {result['elements'] / 1e6:.1f} M weights, {result['units']} units"
    ]
    lines += [f"  {name:30} {median:7.3f} s" for name, median in result["median_seconds"].items()]
    return "\n".join(lines)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--cases", nargs="+", choices=tuple(SHAPES), default=list(SHAPES))
    parser.add_argument("--order", choices=("first", "mix"), default="first", help="importance of one weight at a step")
    parser.add_argument("--layers", type=int, default=None, help="default: 30 with LoRA, 6 (twice) of the T5")
    parser.add_argument("--ops_layers", type=int, nargs="+", default=[2, 8, 30])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=32128, help="vocabulary of the T5")
    parser.add_argument("--rounds", type=int, default=50, help="timed updates of each way")
    parser.add_argument("--warmup", type=int, default=3, help="updates before them")
    parser.add_argument("--fusion_layers", type=int, default=32)
    parser.add_argument("--fusion_width", type=int, default=4096)
    parser.add_argument("--fusion_rank", type=int, default=16)
    parser.add_argument("--fusion_rounds", type=int, default=5)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=None, help="torch threads")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write")
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
    for part, measure, table in (("tracker", measure_tracker, tracker_table), ("ops", measure_ops, ops_table)):
        if part in options.parts:
            results[part] = {}
            for case in options.cases:
                results[part][case] = measure(case, options)
                print(table(results[part][case]), end="\n\n", flush=True)
    if "fusion" in options.parts:
        results["fusion"] = measure_fusion(options)
        print(fusion_table(results["fusion"]), end="\n\n", flush=True)
    if options.out is not None:
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    return results


if __name__ == "__main__":
    main()
