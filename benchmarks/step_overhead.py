"""What one optimizer step costs: Trainer, ContinualTrainer without methods, ContinualTrainer with a method.

    python benchmarks/step_overhead.py --steps 100 --threads 2 --out overhead.json
    python benchmarks/step_overhead.py --cases lora lora_all full --methods kif kif_tracker tasl

Three cases: LoRA on SmolLM2-135M, r 8 on q,v or on all linear layers, and full fine-tuning of a T5 of the size of
t5-small with random weights. `kif` is KIF with its orthogonality loss, `kif_tracker` without; KIF needs LoRA.

The trainers of a case train at once, each in its own thread with its own copy of the model and the same rows, and hand
one another the turn after every step, in a new random order each round. So only one of them runs at any moment, and a
machine that gets slower or busier slows all of them. A turn lasts from one `on_step_begin` to the next and holds
everything that the Trainer does for a step, loading the batch included. Ratios are taken within a round; their median
and its bootstrap interval are printed, for the time on the clock and for the CPU time of the process, which other jobs
on the machine disturb less. Dropout is off, so without methods the weights must end equal, bit for bit.

For methods that track importance the time inside their hooks is measured too, on the CPU: what is far smaller than the
noise of a step can still be read there. It does not hold the backward pass of their loss.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import platform
import random
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import datasets
import numpy as np
import torch
from peft import LoraConfig
from torch.overrides import TorchFunctionMode
from transformers import (
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback

from hf_continual import (
    ContinualSeq2SeqTrainer,
    ContinualSeq2SeqTrainingArguments,
    ContinualTrainer,
    ContinualTrainingArguments,
)
from hf_continual.methods.kif import KIF
from hf_continual.methods.migu import MIGU
from hf_continual.methods.tasl import TaSL
from hf_continual.models import ModelConfig, apply_lora, fix_loss_scaling, load_model
from hf_continual.provenance import versions
from hf_continual.recipes import load_recipe
from hf_continual.skill_fusion import SkillFusion
from hf_continual.testing import equal, tiny_model, weights

CASES = {"lora": "LoRA r 8 on q,v", "lora_all": "LoRA r 8 on all linear layers", "full": "full fine-tuning, T5"}
METHODS = ("migu", "kif", "kif_tracker", "tasl")


def make_method(name: str, options: argparse.Namespace) -> Any:
    if name == "migu":
        return MIGU(**{"threshold": 0.7, "skip_first_task": False, **json.loads(options.migu)})
    return TaSL() if name == "tasl" else KIF(orthogonality_form="norm" if name == "kif" else "off")


def methods_of(case: str, options: argparse.Namespace) -> list[str]:
    """The methods that fit a case."""
    return [name for name in options.methods if case != "full" or not name.startswith("kif")]


class Turns:
    """Lets one thread run at a time, in the order of `schedule`."""

    def __init__(self, schedule: list[int]) -> None:
        self._schedule, self._at, self._error = schedule, 0, None
        self._changed = threading.Condition()

    def wait(self, who: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None or self._schedule[self._at] == who)
            if self._error is not None:
                raise RuntimeError("another trainer failed") from self._error

    def hand_on(self) -> None:
        with self._changed:
            self._at += 1
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    @property
    def error(self) -> BaseException | None:
        return self._error


class _CountQuantiles(TorchFunctionMode):
    """Counts calls of `quantile` in this thread alone."""

    calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += getattr(func, "__name__", "") == "quantile"
        return func(*args, **(kwargs or {}))


class Stopwatch(TrainerCallback):
    """Times each turn of one trainer and hands the turn on; the first, untimed turn sets the training up."""

    def __init__(self, who: int, turns: Turns, device: torch.device, method: Any) -> None:
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.hook_seconds: list[float] = []
        self.peak_bytes = 0
        self.quantile_calls = 0
        self.buffers = 0
        self.rows = 0
        self.tracked = 0
        self._who, self._turns, self._device, self._method = who, turns, device, method
        self._counting = ExitStack()
        self._start: tuple[float, float] | None = None
        self._hooks = 0.0
        if isinstance(method, SkillFusion) and device.type == "cpu":
            for hook in ("on_gradients", "on_step_end", "extra_loss"):
                setattr(method, hook, self._timed(getattr(method, hook)))

    def _timed(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            start = time.perf_counter()
            try:
                return hook(*args)
            finally:
                self._hooks += time.perf_counter() - start

        return run

    def _clock(self) -> tuple[float, float]:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter(), time.process_time()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = self._clock()
        if self._start is not None:
            self.seconds.append(now[0] - self._start[0])
            self.cpu_seconds.append(now[1] - self._start[1])
            self.hook_seconds.append(self._hooks)
            if self._device.type == "cuda":
                self.peak_bytes = torch.cuda.max_memory_allocated(self._device) - self._allocated
        self._turns.hand_on()
        self._turns.wait(self._who)
        if isinstance(self._method, MIGU) and state.global_step == 0:  # of the warm-up; the counter makes it slower
            self._counter = self._counting.enter_context(_CountQuantiles())
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._allocated = torch.cuda.memory_allocated(self._device)
        self._hooks = 0.0
        self._start = self._clock()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if isinstance(self._method, MIGU) and state.global_step == 1:
            self._counting.close()
            self.quantile_calls = self._counter.calls
            self.buffers, self.rows = buffer_bytes(self._method), sum(t.rows for t in self._method._targets)
        elif isinstance(self._method, SkillFusion) and state.global_step == 2:  # its first step does not count
            tracker = self._method._tracker
            self.buffers, self.tracked = buffer_bytes(tracker), tracker.sensitivity.numel()


def buffer_bytes(method: Any) -> int:
    """Bytes of the storages that a method's attributes hold, counted once each."""
    storages: dict[int, int] = {}

    def visit(value: Any) -> None:
        if torch.is_tensor(value):
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, dict):
            for item in value.values():
                visit(item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                visit(item)

    for value in vars(method).values():
        visit(value)
    return sum(storages.values())


def build_model(case: str, options: argparse.Namespace) -> Any:
    if case != "full":
        if options.model == "tiny":
            model = tiny_model("llama")
        else:
            quickstart = load_recipe(Path(__file__).parents[1] / "recipes" / "quickstart.yaml")["model"]
            model = load_model(ModelConfig(**(quickstart if options.model == "smollm2" else {"name": options.model})))
        set_seed(options.seed)
        targets = ["q_proj", "v_proj"] if case == "lora" else "all-linear"
        return apply_lora(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets))
    if options.model == "tiny":
        return tiny_model("t5")
    set_seed(options.seed)
    config = T5Config(
        vocab_size=options.vocab, d_model=512, d_kv=64, d_ff=2048, num_layers=6, num_heads=8, dropout_rate=0.0,
        pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip
    return fix_loss_scaling(T5ForConditionalGeneration(config))


def random_rows(case: str, vocabulary: int, rows: int, options: argparse.Namespace) -> datasets.Dataset:
    generator = torch.Generator().manual_seed(options.seed)
    ids = torch.randint(3, vocabulary, (rows, options.length), generator=generator)
    labels = ids if case != "full" else torch.randint(3, vocabulary, (rows, options.target_length), generator=generator)
    return datasets.Dataset.from_dict(
        {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist(), "labels": labels.tolist()}
    )


def measure(case: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train the trainers of one case in turns; returns seconds, ratios and memory."""
    model = build_model(case, options)
    learns = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    # One step more than is timed: a turn ends where the next step begins.
    steps = options.warmup + options.steps + 1
    methods = {f"ours+{name}": make_method(name, options) for name in methods_of(case, options)}
    names = ["trainer", "ours", *methods]
    data = random_rows(case, model.get_input_embeddings().weight.shape[0], steps * options.batch, options)
    shuffle = random.Random(options.seed)
    rounds = [shuffle.sample(range(len(names)), len(names)) for _ in range(steps)]
    turns = Turns([*range(len(names)), *(who for each in rounds for who in each), -1])
    device = torch.device(options.device)

    seq2seq = case == "full"
    plain = (Seq2SeqTrainer, Seq2SeqTrainingArguments) if seq2seq else (Trainer, TrainingArguments)
    ours = (
        (ContinualSeq2SeqTrainer, ContinualSeq2SeqTrainingArguments)
        if seq2seq
        else (ContinualTrainer, ContinualTrainingArguments)
    )
    kinds: list[tuple[Any, Any, dict[str, Any]]] = [
        (*plain, {}),
        (*ours, {"methods": []}),
        *((*ours, {"methods": [method], "task": "overhead"}) for method in methods.values()),
    ]
    with tempfile.TemporaryDirectory() as folder:
        watches, trainers = [], []
        for who, (trainer_class, args_class, extra) in enumerate(kinds):
            watch = Stopwatch(who, turns, device, methods.get(names[who]))
            args = args_class(
                output_dir=f"{folder}/{who}", seed=options.seed, max_steps=steps, learning_rate=1e-4,
                per_device_train_batch_size=options.batch, lr_scheduler_type="constant",
                train_sampling_strategy="sequential", save_strategy="no", logging_strategy="no", report_to="none",
                disable_tqdm=True, use_cpu=device.type == "cpu", bf16=options.bf16, dataloader_pin_memory=False,
            )  # fmt: skip
            own = copy.deepcopy(model) if who < len(kinds) - 1 else model
            trainer = trainer_class(
                model=own,
                args=args,
                train_dataset=data,
                data_collator=default_data_collator,
                callbacks=[watch],
                **extra,
            )
            trainer.remove_callback(PrinterCallback)
            watches.append(watch)
            trainers.append(trainer)

        def train(who: int) -> None:
            try:
                turns.wait(who)
                trainers[who].train()
                turns.hand_on()
            except BaseException as error:
                turns.fail(error)

        threads = [threading.Thread(target=train, args=(who,), daemon=True) for who in range(len(kinds))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if turns.error is not None:
            raise turns.error

    seconds = np.array([watch.seconds[options.warmup :] for watch in watches])
    cpu = np.array([watch.cpu_seconds[options.warmup :] for watch in watches])
    medians = np.median(seconds, axis=1)
    result = {
        "what": CASES[case],
        "parameters": total,
        "trainable_parameters": learns,
        "steps": options.steps,
        "median_seconds": dict(zip(names, medians.tolist(), strict=True)),
        "ratios": {name: ratio(seconds[i], seconds[0], options.seed) for i, name in enumerate(names) if i},
        "cpu_ratios": {name: ratio(cpu[i], cpu[0], options.seed) for i, name in enumerate(names) if i},
        "equal_weights": equal(weights(trainers[0].model), weights(trainers[1].model)),
        "migu": None,
        "trackers": {},
        "peak_bytes_of_a_step": {name: w.peak_bytes for name, w in zip(names, watches, strict=True)}
        if device.type == "cuda"
        else None,
        "seconds": dict(zip(names, seconds.tolist(), strict=True)),
    }
    for name, watch in zip(names, watches, strict=True):
        if watch.rows:
            result["migu"] = {
                "quantile_calls_per_step": watch.quantile_calls,
                "output_rows": watch.rows,
                "buffer_bytes": watch.buffers,
                "floats_per_output_row": watch.buffers / 4 / watch.rows,
            }
        if watch.tracked:
            hooks = np.array(watch.hook_seconds[options.warmup :])
            result["trackers"][name] = {
                "tracked_elements": watch.tracked,
                "bytes_per_element": watch.buffers / watch.tracked,
                "hook_seconds": float(np.median(hooks)) if hooks.any() else None,
                "share_of_a_step": ratio(hooks, seconds[0], options.seed) if hooks.any() else None,
            }
    trainers.clear()
    gc.collect()
    return result


def ratio(ours: np.ndarray, plain: np.ndarray, seed: int) -> dict[str, float]:
    """Median over rounds of ours / plain, and its 95 % bootstrap interval; beside it the ratio of the medians."""
    each = ours / plain
    draws = np.random.default_rng(seed).integers(0, len(each), (2000, len(each)))
    low, high = np.percentile(np.median(each[draws], axis=1), [2.5, 97.5])
    return {
        "median": float(np.median(each)),
        "low": float(low),
        "high": float(high),
        "of_medians": float(np.median(ours) / np.median(plain)),
    }


def table(case: str, result: dict[str, Any]) -> str:
    learns, total = result["trainable_parameters"] / 1e6, result["parameters"] / 1e6
    peaks = result["peak_bytes_of_a_step"]
    header = f"  {'':16} {'s/step':>9} {'ratio':>7} {'95 %':>13} {'CPU time':>9} {'95 %':>13}"
    lines = [
        f"{result['what']}: {learns:.2f} of {total:.2f} M parameters learn, {result['steps']} steps",
        header + (f" {'peak MB':>9}" if peaks else ""),
    ]
    for name in result["median_seconds"]:
        line = f"  {name:16} {result['median_seconds'][name]:9.4f}"
        for key, width in (("ratios", 7), ("cpu_ratios", 9)):
            found = result[key].get(name)
            interval = f"{found['low']:.3f}-{found['high']:.3f}" if found else ""
            line += f" {found['median'] if found else 1:{width}.3f} {interval:>13}"
        lines.append(line + (f" {peaks[name] / 1e6:9.1f}" if peaks else ""))
    migu = result["migu"]
    if migu:
        lines.append(
            f"  MIGU: {migu['quantile_calls_per_step']} quantile calls a step; {migu['output_rows']} output rows; "
            f"buffers of {migu['buffer_bytes'] / 1e3:.0f} kB, {migu['floats_per_output_row']:.1f} floats a row"
        )
    for name, tracker in result["trackers"].items():
        line = f"  {name}: {tracker['tracked_elements']:,} weights in {tracker['bytes_per_element']:.2f} bytes each"
        share = tracker["share_of_a_step"]
        if share:
            line += (
                f"; {tracker['hook_seconds'] * 1e3:.2f} ms a step in its hooks, {100 * share['median']:.2f} % of the "
                f"Trainer's ({100 * share['low']:.2f}-{100 * share['high']:.2f})"
            )
        lines.append(line)
    same = "yes" if result["equal_weights"] else "NO"
    lines.append(f"  weights without methods equal the Trainer's bit for bit: {same}")
    return "\n".join(lines)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=tuple(CASES), default=["lora", "full"])
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=["migu"], help="one trainer more for each")
    parser.add_argument(
        "--model", default="smollm2", help="smollm2, tiny (for all cases), or a folder or hub id for the LoRA cases"
    )
    parser.add_argument("--vocab", type=int, default=32128, help="vocabulary of the T5")
    parser.add_argument("--steps", type=int, default=50, help="timed steps of each trainer")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=96, help="tokens of an input")
    parser.add_argument("--target_length", type=int, default=16, help="tokens of an answer of the T5")
    parser.add_argument("--migu", default="{}", help="options of MIGU as JSON, such as '{\"ignore_padding\": true}'")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--threads", type=int, default=None, help="torch threads")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write")
    return parser


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure, print the tables, and return what `--out` writes."""
    options = make_parser().parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    datasets.disable_progress_bars()
    machine = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or platform.machine()
    settings = {k: v for k, v in vars(options).items() if k != "out"}
    results: dict[str, Any] = {
        "settings": {**settings, "threads": torch.get_num_threads(), "cpus": os.cpu_count(), "machine": machine},
        "versions": versions(),
        "cases": {},
    }
    for case in options.cases:
        results["cases"][case] = measure(case, options)
        print(table(case, results["cases"][case]), end="\n\n", flush=True)
    if options.out is not None:
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    return results


if __name__ == "__main__":
    main()
