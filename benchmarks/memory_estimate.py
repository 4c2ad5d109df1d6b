"""What `hf-continual estimate` says against the peak that a training really has, on small models on the CPU.

    python benchmarks/memory_estimate.py
    python benchmarks/memory_estimate.py --cases llama-lora t5-full --length 128

Each case learns two tasks with a real Trainer, of three optimizer steps each, under torch.profiler, which records what
the allocator gives out and takes back, inside of kernels too. The measured peak is the largest sum of these, and of the
weights that were there before. The estimate does not train: it sees shapes only. Printed are its parts, both totals,
and the ratio estimate / measured.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import datasets
import torch
from peft import LoraConfig, get_peft_model
from tabulate import tabulate
from torch.profiler import ProfilerActivity, profile
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    default_data_collator,
    set_seed,
)

from hf_continual import (
    ContinualSeq2SeqTrainer,
    ContinualSeq2SeqTrainingArguments,
    ContinualTrainer,
    ContinualTrainingArguments,
)
from hf_continual.memory_estimate import PARTS, MemoryEstimate, estimate
from hf_continual.models import fix_loss_scaling
from hf_continual.task_queue import DataConfig

PROMPT, COMPLETION, ROWS = 48, 16, 4
CHECKPOINTING = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}}
CASES: dict[str, dict[str, Any]] = {
    "llama-lora": {"lora": True},
    "llama-lora-checkpointing": {"lora": True, "training": CHECKPOINTING},
    "llama-lora-bf16": {"lora": True, "dtype": torch.bfloat16, "training": {"bf16": True}},
    "llama-full": {},
    "llama-full-checkpointing": {"training": CHECKPOINTING},
    "llama-full-accumulation": {"training": {"gradient_accumulation_steps": 2}},
    "llama-full-bf16": {"training": {"bf16": True}},
    "llama-full-eager": {"attention": "eager"},
    "llama-full-long": {"rows": 2, "prompt": 384, "completion": 128},
    "llama-full-adafactor": {"training": {"optim": "adafactor"}},
    "llama-full-sgd": {"training": {"optim": "sgd"}},
    "t5-full": {"kind": "t5"},
    "t5-full-checkpointing": {"kind": "t5", "training": CHECKPOINTING},
    "llama-full+migu": {"methods": [{"name": "migu", "threshold": 0.7}]},
    "llama-full+migu-update": {"methods": [{"name": "migu", "threshold": 0.7, "mask": "update"}]},
    "llama-lora+kif": {"lora": True, "methods": ["kif"]},
    "llama-full+tasl": {"methods": ["tasl"]},
    "llama-full+ewc": {"methods": ["ewc"]},
    "llama-full+ewc-trace": {"methods": [{"name": "ewc", "fisher": "trace"}]},
    "llama-lora+ewc": {"lora": True, "methods": ["ewc"]},
    "llama-full+lwf": {"methods": ["lwf"]},
    "llama-full+agem": {"methods": [{"name": "agem", "count": 4, "memory_batch_size": 4}]},
    "llama-full+gem": {"methods": [{"name": "gem", "count": 4}]},
    "llama-lora+inclora": {"lora": True, "methods": ["inclora"]},
    "llama-lora+olora": {"lora": True, "methods": ["olora"]},
    "llama-full+weight_ema": {"methods": ["weight_ema"]},
    "llama-full+fisher_merge": {"methods": ["fisher_merge"]},
    "llama-full+derpp": {"methods": [{"name": "derpp", "count": 4}]},
    "llama-full+seekr": {"methods": [{"name": "seekr", "count": 4, "track_drift": False}]},
    "llama-lora+seekr-previous": {"lora": True, "methods": [{"name": "seekr", "count": 4, "teacher": "previous"}]},
}


def make_model(kind: str, lora: bool, dtype: torch.dtype, attention: str, size: int) -> Any:
    """Random weights; `size` is the hidden size."""
    set_seed(0)
    model: Any
    if kind == "t5":
        config: Any = T5Config
        config = config(
            vocab_size=2048, d_model=size, d_kv=size // 4, d_ff=2 * size, num_layers=2, num_heads=4, dropout_rate=0.0,
            pad_token_id=0, eos_token_id=2, decoder_start_token_id=0,
        )  # fmt: skip
        model = T5ForConditionalGeneration(config)
    else:
        config = LlamaConfig(
            vocab_size=2048, hidden_size=size, intermediate_size=3 * size, num_hidden_layers=3, num_attention_heads=4,
            max_position_embeddings=1024, pad_token_id=0, bos_token_id=1, eos_token_id=2, attn_implementation=attention,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
    model = fix_loss_scaling(model.to(dtype))
    if lora:
        targets = ["q", "v"] if kind == "t5" else "all-linear"
        model = get_peft_model(model, LoraConfig(r=8, target_modules=targets, task_type="CAUSAL_LM"))
    return model


def make_rows(kind: str, rows: int, prompt: int, completion: int, seed: int) -> datasets.Dataset:
    generator = torch.Generator().manual_seed(seed)

    def draw(length: int) -> list[list[int]]:
        return torch.randint(3, 2000, (rows, length), generator=generator).tolist()

    if kind == "t5":
        inputs, labels = draw(prompt), draw(completion)
    else:
        inputs = draw(prompt + completion)
        labels = [[-100] * prompt + row[prompt:] for row in inputs]
    mask = [[1] * len(row) for row in inputs]
    return datasets.Dataset.from_dict({"input_ids": inputs, "attention_mask": mask, "labels": labels})


def compare(
    *,
    kind: str = "llama",
    lora: bool = False,
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
    methods: list[Any] | None = None,
    training: dict[str, Any] | None = None,
    rows: int = ROWS,
    prompt: int = PROMPT,
    completion: int = COMPLETION,
    size: int = 192,
    tasks: int = 2,
) -> tuple[MemoryEstimate, int]:
    """The estimate, and the measured peak in bytes of the same training."""
    model = make_model(kind, lora, dtype, attention, size)
    options: dict[str, Any] = {"per_device_train_batch_size": rows, "optim": "adamw_torch", **(training or {})}
    methods = methods or []
    told = estimate(
        model, training=options, methods=methods, data=DataConfig(prompt, completion), tasks=tasks, device="cpu"
    )
    return told, measure(model, options, methods, kind, rows, prompt, completion, tasks)


def measure(
    model: Any, options: dict[str, Any], methods: list[Any], kind: str, rows: int, prompt: int, completion: int,
    tasks: int,
) -> int:  # fmt: skip
    """The most bytes that were alive at once while two tasks were learnt."""
    trainer_class: Any = ContinualSeq2SeqTrainer if kind == "t5" else ContinualTrainer
    args_class: Any = ContinualSeq2SeqTrainingArguments if kind == "t5" else ContinualTrainingArguments
    steps = 3 * rows * options.get("gradient_accumulation_steps", 1)
    before = sum({t.data_ptr(): t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()]}.values())
    carried: Any = methods
    with (
        tempfile.TemporaryDirectory() as folder,
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
    ):
        for task in range(tasks):
            args = args_class(
                output_dir=f"{folder}/{task}", use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
                logging_strategy="no", num_train_epochs=1, dataloader_pin_memory=False, **options,
            )  # fmt: skip
            trainer = trainer_class(
                model, args, train_dataset=make_rows(kind, steps, prompt, completion, task), methods=carried,
                data_collator=default_data_collator,
            )  # fmt: skip
            trainer.train()
            carried = trainer.methods
            del trainer
            gc.collect()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert len(events) > 100  # else the profiler's names have changed
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return before + peak


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--size", type=int, default=192, help="hidden size of the models")
    parser.add_argument("--out", default=None, help="JSON file for the numbers")
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore", category=FutureWarning)
    table, found = [], {}
    for name in args.cases:
        told, measured = compare(size=args.size, **CASES[name])
        found[name] = {"estimate": told.total, "measured": measured, "ratio": told.total / measured}
        parts = [f"{getattr(told, part) / 1e6:.2f}" for part in PARTS if part != "reserve"]
        table.append([name, *parts, f"{told.total / 1e6:.2f}", f"{measured / 1e6:.2f}",
                      f"{told.total / measured:.3f}", told.moment])  # fmt: skip
    header = [
        "case",
        *[p.replace("_", " ") for p in PARTS if p != "reserve"],
        "estimate",
        "measured",
        "ratio",
        "most at",
    ]
    print("MB")
    print(tabulate(table, header, disable_numparse=True))
    if args.out:
        Path(args.out).write_text(json.dumps(found, indent=1) + "\n")
    return {name: values["ratio"] for name, values in found.items()}


if __name__ == "__main__":
    main()
