"""Rows a second of the evaluation, against a plain loop in file order with the same batch size and the same answers.

    python benchmarks/evaluation.py --threads 1 --out evaluation.json
    python benchmarks/evaluation.py --cases generation --rows 512 --max_new_tokens 100 --device cuda

`generation`: `evaluate_task` against `model.generate`, batch after batch as the rows stand in the file. Prompts have
mixed lengths, drawn evenly on a log scale. The model is random and of Llama's shape; a part of the vocabulary
(`--ends`) counts as end tokens, so most answers end after a few tokens and some run to `max_new_tokens`, as those of a
model that has learnt its task and now and then does not stop.

`likelihood`: label likelihood with each prompt read once, against the usual way of one sequence for each prompt and
label. Labels are of one to three words.

Both are run in turn, in a new random order each round; ratios are taken within a round, and their median and bootstrap
interval are printed, for the time on the clock and for the CPU time of the process. That both give the same
predictions is asserted, and the likelihoods within 1e-3.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import datasets
import numpy as np
import torch
from step_overhead import ratio
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from hf_continual.evaluation import EvaluationConfig, evaluate_task
from hf_continual.generation import left_pad
from hf_continual.provenance import versions
from hf_continual.tasks import Task
from hf_continual.tokenization import encode_completion, encode_prompt

CASES = ("generation", "likelihood")


def make_tokenizer(words: int) -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(words))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def make_model(options: argparse.Namespace) -> Any:
    set_seed(options.seed)
    config = LlamaConfig(
        vocab_size=options.vocabulary, hidden_size=options.hidden, intermediate_size=options.hidden * 8 // 3,
        num_hidden_layers=options.layers, num_attention_heads=options.heads,
        num_key_value_heads=max(1, options.heads // 3), max_position_embeddings=4096, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2)  # so that most answers do not fall into a cycle, and few tokens are near-ties
    generator = torch.Generator().manual_seed(options.seed)
    drawn = torch.rand(options.vocabulary, generator=generator) < options.ends
    model.generation_config.eos_token_id = sorted({2, *drawn.nonzero().flatten().tolist()} - {0, 1, 3})
    return model.to(options.device).eval()


def make_task(options: argparse.Namespace, labels: int | None) -> Task:
    rng = random.Random(options.seed)
    words = options.vocabulary - 4

    def text(count: int) -> str:
        return " ".join(f"w{rng.randrange(words)}" for _ in range(count))

    shortest, longest = np.log(options.shortest), np.log(options.longest)
    prompts = [text(round(float(np.exp(rng.uniform(shortest, longest))))) for _ in range(options.rows)]
    rows = datasets.Dataset.from_dict({"prompt": prompts, "references": [["w0"]] * options.rows})
    names = [text(rng.choice((1, 1, 2, 3))) for _ in range(labels)] if labels else None
    return Task("benchmark", eval_dataset=rows, labels=names, scorer="label_likelihood" if labels else "exact_match")


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@torch.no_grad()
def plain_generation(model: Any, tokenizer: Any, task: Task, options: argparse.Namespace) -> list[str]:
    """`model.generate` on the rows as they stand in the file."""
    answers: list[str] = []
    for start in range(0, options.rows, options.batch):
        prompts = task.eval_dataset[start : start + options.batch]["prompt"]
        encoded = [encode_prompt(prompt, tokenizer, options.longest + 8, False) for prompt in prompts]
        ids, mask = left_pad(encoded, tokenizer.pad_token_id, model.device, left=True)
        output = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=options.max_new_tokens, do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        answers += tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in answers]


@torch.no_grad()
def plain_likelihood(model: Any, tokenizer: Any, task: Task, options: argparse.Namespace) -> list[list[float]]:
    """One sequence for each prompt and label, in batches as they come."""
    pairs = []
    for row in task.eval_dataset:
        prompt = encode_prompt(row["prompt"], tokenizer, options.longest + 8, False)
        for label in task.labels or ():
            pairs.append((prompt, encode_completion(label, row["prompt"], tokenizer, 100, False)))
    scores: list[float] = []
    for start in range(0, len(pairs), options.batch):
        batch = pairs[start : start + options.batch]
        ids, mask = left_pad([a + b for a, b in batch], tokenizer.pad_token_id, model.device, left=False)
        logits = model(input_ids=ids, attention_mask=mask).logits
        for place, (prompt, label) in enumerate(batch):
            at = logits[place, len(prompt) - 1 : len(prompt) + len(label) - 1].float().log_softmax(-1)
            scores.append(float(at.gather(-1, torch.tensor(label, device=at.device)[:, None]).sum()))
    n = len(task.labels or ())
    return [scores[start : start + n] for start in range(0, len(scores), n)]


def measure(case: str, options: argparse.Namespace) -> dict[str, Any]:
    tokenizer, model = make_tokenizer(options.vocabulary - 4), make_model(options)
    task = make_task(options, options.labels if case == "likelihood" else None)
    config = EvaluationConfig(batch_size=options.batch, max_new_tokens=options.max_new_tokens)

    def ours() -> list[Any]:
        cell = evaluate_task(model, tokenizer, task, config, max_prompt_length=options.longest + 8)
        lengths.extend(map(len, cell.tokens or ()))
        return [p["log_likelihood"] if case == "likelihood" else p["prediction"] for p in cell.predictions]

    def plain() -> list[Any]:
        run: Callable[..., list[Any]] = plain_likelihood if case == "likelihood" else plain_generation
        return run(model, tokenizer, task, options)

    lengths: list[int] = []
    runs = {"ours": ours, "plain": plain}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in runs}
    found: dict[str, list[Any]] = {}
    shuffled = random.Random(options.seed)
    for number in range(options.warmup + options.rounds):
        for name in shuffled.sample(list(runs), 2):
            synchronize(options.device)
            start, cpu = time.perf_counter(), time.process_time()
            found[name] = runs[name]()
            synchronize(options.device)
            if number >= options.warmup:
                seconds[name].append(time.perf_counter() - start)
                cpu_seconds[name].append(time.process_time() - cpu)
        check(case, found["ours"], found["plain"])
    wall, cpu_time = ({name: np.array(each) for name, each in kind.items()} for kind in (seconds, cpu_seconds))
    return {
        "rows": options.rows,
        "parameters": sum(p.numel() for p in model.parameters()),
        "labels": len(task.labels or ()),
        "answer_tokens": {"mean": float(np.mean(lengths)), "median": float(np.median(lengths))} if lengths else None,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "rows_per_second": {name: options.rows / float(np.median(each)) for name, each in wall.items()},
        "faster": ratio(wall["plain"], wall["ours"], options.seed),
        "faster_cpu": ratio(cpu_time["plain"], cpu_time["ours"], options.seed),
    }


def check(case: str, ours: list[Any], plain: list[Any]) -> None:
    """Raises AssertionError if one way answers a row as the other does not."""
    assert len(ours) == len(plain)
    for row, (a, b) in enumerate(zip(ours, plain, strict=True)):
        if case == "generation":
            assert a == b, f"row {row}: {a!r} and not {b!r}"
        else:
            assert np.allclose(a, b, rtol=0, atol=1e-3), f"row {row}: {a} and not {b}"
            assert int(np.argmax(a)) == int(np.argmax(b)), f"row {row}: another label"


def table(case: str, result: dict[str, Any]) -> str:
    lines = [f"{case}: {result['rows']} rows, {result['parameters'] / 1e6:.1f} M parameters"]
    if result["answer_tokens"]:
        tokens = result["answer_tokens"]
        lines[0] += f", answers of {tokens['median']:.0f} tokens (median), {tokens['mean']:.1f} (mean)"
    else:
        lines[0] += f", {result['labels']} labels"
    for name, rate in result["rows_per_second"].items():
        lines.append(f"  {name:6} {rate:8.1f} rows/s")
    for key, what in (("faster", "on the clock"), ("faster_cpu", "of CPU time")):
        r = result[key]
        lines.append(f"  {r['median']:.2f} times as fast {what} ({r['low']:.2f}-{r['high']:.2f})")
    return "\n".join(lines)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--shortest", type=int, default=10, help="tokens of the shortest prompts")
    parser.add_argument("--longest", type=int, default=200, help="tokens of the longest prompts")
    parser.add_argument("--max_new_tokens", type=int, default=50)
    parser.add_argument("--ends", type=float, default=0.3, help="part of the vocabulary that ends an answer")
    parser.add_argument("--labels", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=3)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1, help="rounds before them")
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
    datasets.disable_progress_bars()
    machine = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or platform.machine()
    load = os.getloadavg()[0]
    settings = {k: v for k, v in vars(options).items() if k != "out"}
    results: dict[str, Any] = {
        "settings": {**settings, "threads": torch.get_num_threads(), "cpus": os.cpu_count(), "machine": machine},
        "load_before": load,
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
