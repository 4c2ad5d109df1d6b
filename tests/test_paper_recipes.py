"""Every recipe is resolved and runs two steps of two toy tasks, with its own methods, adapters and training."""

import copy
import functools
import gc
import json
import math
import os
import re
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from test_benchmark_streams import write_data
from test_pretraining import masked_model, masked_tokenizer
from test_streams import jsonl_layout

from hf_continual import InputError
from hf_continual.cli import main
from hf_continual.recipes import expand, load_recipe, recipe_files
from hf_continual.scorers import get as get_scorer
from hf_continual.streams import find_stream, stream_names
from hf_continual.task_queue import TaskQueue
from hf_continual.tasks import TEXT_KINDS, Task
from hf_continual.testing import tiny_model, toy_stream, toy_tokenizer

RECIPES = recipe_files()
OURS = {"quickstart"} | {name for name in RECIPES if name.startswith("llama2/") or "smollm2" in name}
PAPER = sorted(RECIPES.keys() - OURS)
SHORT = {
    "max_steps": 2,
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
    "use_cpu": True,
    "fp16": False,
}
WORDS = ["red", "blue", "green"]


@functools.cache
def runs_of(name):
    """One run a variant."""
    path = RECIPES[name]
    return expand(load_recipe(path), path.parent, {"seeds": [1]})


stream_of = functools.cache(find_stream)


# -- two steps of every variant ----------------------------------------------------------------------------------------


def architecture(recipe):
    name = recipe["model"]["name"]
    return "t5" if "t5" in name else "roberta" if "roberta" in name else "llama"


def toy_scorers(recipe):
    """Kind, scorer and end task of two tasks of the recipe's stream, with another scorer if there is one."""
    if isinstance(recipe["tasks"], list):
        return [("completion", spec.get("scorer"), None) for spec in recipe["tasks"][:2]]
    tasks = list(stream_of(recipe["tasks"]["stream"]).tasks.values())
    first = tasks[0]
    others = [task for task in tasks[1:] if task.get("scorer") != first.get("scorer")] + tasks[1:]
    own = recipe["tasks"].get("scorer")
    return [(t.get("kind", "completion"), own or t.get("scorer"), t.get("end_task")) for t in [first, *others[:1]]]


def toy_tasks(wanted):
    """Toy tasks of the same kinds and scorers, with the columns that these read."""
    tasks = []
    for task, (kind, scorer, end) in zip(toy_stream(len(wanted), rows=8, eval_rows=2), wanted, strict=True):
        if kind in TEXT_KINDS:
            text = [f"{row['prompt']} {row['completion']}" for row in task.train_dataset]
            rows = datasets.Dataset.from_dict({"text": text})
            labelled = [{"text": t, "label": WORDS[i % 3], "references": [WORDS[i % 3]]} for i, t in enumerate(text)]
            ending = {
                "name": "end", "train_dataset": labelled, "eval_dataset": labelled[:3], "labels": WORDS, "seeds": [1],
                "scorer": end["scorer"], "kind": end["kind"], "training": {"max_steps": 1},
            }  # fmt: skip
            tasks.append(Task(task.name, rows, rows, kind=kind, end_task=ending))
            continue
        evaluation = task.eval_dataset
        for column in get_scorer(scorer).columns if scorer else ():
            if column not in evaluation.column_names:
                evaluation = evaluation.add_column(column, ["0"] * len(evaluation))
        tasks.append(Task(task.name, task.train_dataset, evaluation, labels=task.labels, scorer=scorer))
    return tasks


def shrunk(recipe):
    """The recipe with a toy model, toy rows and toy lengths: what `TaskQueue` takes, and what a run depends on."""
    recipe = copy.deepcopy(recipe)
    training = {**recipe["training"], **SHORT}
    training.pop("num_train_epochs", None)  # max_steps stands in its place
    training.pop("save_steps", None)
    if training.get("warmup_steps", 0) >= 1:
        training["warmup_steps"] = 0  # two steps of fifty would have no learning rate yet
    training["per_device_train_batch_size"] = min(2, training.get("per_device_train_batch_size", 8))
    training["gradient_accumulation_steps"] = min(2, training.get("gradient_accumulation_steps", 1))
    for method in recipe["methods"]:
        if method["name"] == "seekr":  # the toy has 2 layers of 4 heads
            method |= {"layers": method["layers"] and 2, "heads": method["heads"] and 4}
            method["query_rows"] = min(4, method["query_rows"])
    options = {
        "methods": recipe["methods"],
        "args": training,
        "peft_config": recipe["peft"],
        "joint": recipe["joint"],
        "data": {**recipe["data"], "max_prompt_length": 16, "max_completion_length": 4},
        "evaluation": {**recipe["evaluation"], "max_new_tokens": 2, "lm_eval": None},
    }
    if options["data"].get("block_size") or architecture(recipe) == "roberta":
        options["data"]["block_size"] = 12
    return architecture(recipe), toy_scorers(recipe), options


DONE, SCORED = {}, set()


def run_shrunk(recipe, folder):
    """Logs and weights of two steps a task. What is the same for two variants is run once, with each set of scorers."""
    kind, wanted, options = shrunk(recipe)
    key = json.dumps([kind, [task[0] for task in wanted], options], sort_keys=True)
    scored = json.dumps([kind, wanted])
    if key not in DONE or scored not in SCORED:
        SCORED.add(scored)
        masked = kind == "roberta"
        model = masked_model() if masked else tiny_model(kind)
        queue = TaskQueue(
            folder,
            model=model,
            processing_class=masked_tokenizer() if masked else toy_tokenizer(),
            tasks=toy_tasks(wanted),
            seed=1,
            **options,
        )
        scores = queue.run().R
        logs = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("tasks/*/log.json"))]
        stored = [
            {
                f"{path.parent.name}/{name}": w
                for path in p.rglob("*.safetensors")
                for name, w in load_file(path).items()
            }
            for p in sorted(Path(folder).glob("tasks/*"))
        ]
        before = {} if options["peft_config"] else dict(model.state_dict())
        DONE[key] = scores, logs, [before, *stored]
    return DONE[key]


def learnt(before, after):
    """Whether weights moved: of adapters from the zeros that B starts at, of other weights from those of before."""
    if not before:
        return any("lora_B" in name and bool(w.any()) for name, w in after.items())
    shared = {name.split("/", 1)[-1]: w for name, w in before.items()}
    pairs = [(shared.get(name.split("/", 1)[-1]), w) for name, w in after.items()]
    return any(old is None or not torch.equal(old, new) for old, new in pairs)


def has_a_phase(recipe):
    """Whether there is further training on stored rows after a task: TaSL-M, KIF-M."""
    return any(method.get("replay_ratio") or method.get("replay_count") for method in recipe["methods"])


GROUPS = {}  # recipes whose toys are often the same run
for _name in sorted(RECIPES):
    _folder, _, _file = _name.rpartition("/")
    _kind = "ours" if _name in OURS else architecture({"model": {"name": _file}})
    GROUPS.setdefault(f"{_folder or 'recipes'}-{_kind}", []).append(_name)


@pytest.mark.timeout(900)  # a group takes seconds, but not on a machine with many times more to do than cores
@pytest.mark.parametrize("group", GROUPS)
def test_every_variant_trains_two_steps_a_task(group, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    # Most of the time of runs as small as these.
    monkeypatch.setattr(gc, "collect", lambda *args: 0)
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    monkeypatch.setattr(PeftModel, "create_or_update_model_card", lambda self, folder: None)
    for name in GROUPS[group]:
        for run in runs_of(name):
            where = f"{name}, {run.variant}"
            try:
                scores, logs, weights = run_shrunk(run.recipe, tmp_path / name / str(run.variant))
            except InputError as error:
                raise AssertionError(f"{where}: {error}") from error
            tasks = 1 if run.recipe["joint"] else len(toy_scorers(run.recipe))
            assert len(logs) == tasks, where
            for log, before, after in zip(logs, weights, weights[1:], strict=False):
                losses = {entry["step"]: entry["loss"] for entry in log if "loss" in entry}
                assert sorted(losses)[:2] == [1, 2] and all(map(math.isfinite, losses.values())), (where, losses)
                assert len(losses) == 2 or has_a_phase(run.recipe), (where, losses)
                assert learnt(before, after), where
            assert all(math.isfinite(value) for value in scores[-1]), where


# -- where values come from --------------------------------------------------------------------------------------------


def scalars(node, path=()):
    """(path, node) of every value below a YAML node; an alias is the place it stands for."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield from scalars(value, (*path, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield from scalars(value, (*path, str(index)))
    else:
        yield path, node


NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
SOURCED = ("model", "peft", "training", "data", "evaluation", "seeds")


def unsourced(text):
    """Lines with a number, or with any value of the common sections, that say nothing of where it is from."""
    lines, found = text.splitlines(), set()
    for path, node in scalars(yaml.compose(text, Loader=yaml.SafeLoader)):
        number = node.style is None and NUMBER.fullmatch(node.value)
        if not number and path[0] not in SOURCED:
            continue
        comment = lines[node.start_mark.line][node.end_mark.column :].partition(" # ")[2]
        if len(re.findall(r"[A-Za-z]", comment)) < 2:
            found.add(f"line {node.start_mark.line + 1}: {lines[node.start_mark.line].strip()}")
    return sorted(found)


@pytest.mark.parametrize("name", PAPER)
def test_every_number_says_where_it_is_from(name):
    assert unsourced(RECIPES[name].read_text()) == []


def test_a_number_without_source_is_found():
    assert unsourced("training:\n  learning_rate: 1.0e-4\n") == ["line 2: learning_rate: 1.0e-4"]
    assert unsourced("variants:\n  a: {methods: [{name: migu, threshold: 0.7}]}  # ?\n")
    assert unsourced("model:\n  dtype: bfloat16\n") and not unsourced("model:\n  dtype: bfloat16  # App. A\n")
    assert not unsourced("variants:\n  a: {joint: true}\n")


@pytest.mark.parametrize("name", PAPER)
def test_the_header_says_what_there_is_to_know(name):
    text = RECIPES[name].read_text()
    header = " ".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
    for part in ("hf-continual run recipes/", "arXiv:", "Published", "Hardware", "Cannot be checked"):
        assert part in header, part
    assert f"hf-continual run recipes/{name}.yaml" in header
    assert load_recipe(RECIPES[name])["name"] == Path(name).name


# -- values, typed again from the papers and the published code -------------------------------------------------------

FT = {"learning_rate": 1e-4, "weight_decay": 0.01, "lr_scheduler_type": "constant", "num_train_epochs": 1}
MIGU_PAPER = {"skip_first_task": False, "normalize_tokens": True, "select": "topk", "mask": "update"}
VALUES = [
    # MIGU, App. A and its scripts
    *((f"migu/t5-large-{family}", variant, training, peft, methods)
      for family in ("standard-order1", "standard-order2", "standard-order3",
                     "long-order4", "long-order5", "long-order6")
      for variant, training, peft, methods in [
        ("ft-paper", FT, None, []),
        ("ft-code", {**FT, "weight_decay": 0.0}, None, []),
        ("ft+migu-paper", FT, None, [{"name": "migu", "threshold": 0.7, **MIGU_PAPER}]),
        ("ft+migu-code", {"weight_decay": 0.0}, None,
         [{"name": "migu", "threshold": 0.7, "include_lm_head": True, "skip_first_task": True, "select": "quantile"}]),
        ("lora-paper", {**FT, "learning_rate": 1e-3}, {"r": 8, "lora_alpha": 32, "lora_dropout": 0.05}, []),
        ("lora-code", {**FT, "weight_decay": 0.0}, {"r": 8, "lora_alpha": 32, "lora_dropout": 0.1}, []),
        ("lora+migu-paper", {"learning_rate": 1e-3}, {"r": 8}, [{"threshold": 0.7, **MIGU_PAPER}]),
        ("inclora-code", {"learning_rate": 1e-3, "weight_decay": 0.0}, {"lora_dropout": 0.1}, [{"name": "inclora"}]),
        ("inclora+migu-paper", {"learning_rate": 1e-3}, {"r": 8}, [{"name": "inclora"}, {"threshold": 0.7}]),
        ("inclora+migu-appf", {}, {"r": 8}, [{"name": "inclora"}, {"threshold": 0.6}]),
        ("oinclora+migu-paper", {"learning_rate": 1e-3}, {"r": 8}, [{"name": "olora"}, {"threshold": 0.05}]),
        ("oinclora+migu-appf", {}, {"r": 8}, [{"name": "olora"}, {"threshold": 0.1}]),
        ("lorareplay-paper", {"learning_rate": 1e-3}, {"r": 8}, [{"name": "replay", "ratio": 0.02}]),
        ("lorareplay+migu-paper", {}, {"r": 8}, [{"ratio": 0.02}, {"threshold": 0.4}]),
      ]),
    ("migu/t5-large-standard-order1", "ft-3e-5", {"learning_rate": 3e-5}, None, []),
    ("migu/t5-large-standard-order2", "oinclora-paper", {}, {"r": 8}, [{"lambda_1": 0.5, "lambda_2": 0.0}]),
    ("migu/t5-large-standard-order3", "ftreplay+migu-paper", FT, None, [{"ratio": 0.02}, {"threshold": 0.4}]),
    *((f"migu/t5-large-long-order{i}", "oinclora-code", {}, {"r": 8},
       [{"lambda_1": [0.0] + 8 * [0.5] + 6 * [5.0],
         "lambda_2": [0, 0, 0, 0, 0.1, 0.1, 0.3, 0, 0.1, 0, 0, 0.1, 0, 0.1, 0.3]}]) for i in (4, 5, 6)),
    ("migu/roberta-das", "ft+migu-code", {"learning_rate": 1e-4, "weight_decay": 0.0, "lr_scheduler_type": "linear"},
     None, [{"threshold": 0.7}]),
    ("migu/llama2-7b-magicoder", "lora+migu",
     {"learning_rate": 5e-4, "num_train_epochs": 32, "adam_beta2": 0.95, "weight_decay": 0.0, "warmup_steps": 0.1,
      "lr_scheduler_type": "cosine"},
     {"lora_alpha": 32, "lora_dropout": 0.05}, [{"threshold": 0.7, "skip_first_task": False}]),
    # TaSL and KIF, github.com/WoodScene/TaSL
    *((f"tasl/{model}-sgd", "tasl-code",
       {"learning_rate": 3e-4, "warmup_steps": 50, "num_train_epochs": 5, "weight_decay": 0.01, "fp16": True}, None,
       [{"name": "tasl", "units": "matrix", "beta1": 0.85, "beta2": 0.85, "beta": 0.7, "quantile": 0.8, "shared": 0.3,
         "timing": "reference", "warmup_steps": 1}]) for model in ("t5-small", "t5-base", "flan-t5-large")),
    ("tasl/llama-7b-sgd", "tasl-paper", {"learning_rate": 3e-4, "num_train_epochs": 5},
     {"r": 8, "lora_alpha": 16, "lora_dropout": 0.05, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
     [{"units": "lora_matrix", "timing": "consistent", "beta": 0.7, "quantile": 0.8}]),
    ("tasl/t5-small-sgd", "tasl-m", {}, None, [{"replay_count": 50}]),
    *((f"kif/{model}-{stream}", "kif-code",
       {"learning_rate": 3e-4, "warmup_steps": 50, "lr_scheduler_type": "linear", "num_train_epochs": 1},
       {"r": 8, "lora_alpha": 16, "lora_dropout": 0.05, "target_modules": ["q", "v"]},
       [{"name": "kif", "order": "mix", "beta1": 0.85, "beta2": 0.85, "beta": 0.7, "temperature": 0.25,
         "pair_reduce": "product", "orthogonality": 0.1, "timing": "reference", "units": "lora_rank1"}])
      for model in ("t5-base", "t5-large", "t5-xl") for stream in ("superni15", "long")),
    *((f"kif/{model}", "kif-sapt", training, peft, [{"name": "kif"}]) for model, training, peft in [
        ("t5-large-superni15", {"learning_rate": 3e-4, "num_train_epochs": 100}, {"r": 4, "lora_alpha": 32}),
        ("t5-large-long", {"learning_rate": 3e-4, "num_train_epochs": 10}, {"r": 8, "lora_alpha": 32}),
        ("llama2-7b-superni15", {"learning_rate": 5e-5, "num_train_epochs": 50}, {"r": 4, "lora_dropout": 0.0}),
        ("llama2-7b-long", {"learning_rate": 5e-5, "num_train_epochs": 20}, {"r": 4, "lora_dropout": 0.0}),
    ]),
    ("kif/llama2-7b-long", "kif-paper", {"learning_rate": 3e-4, "num_train_epochs": 10}, {"lora_alpha": 32},
     [{"temperature": 0.15, "pair_reduce": "mean", "timing": "consistent"}]),
    ("kif/t5-large-long", "kif-rkif", {"num_train_epochs": 10}, {"lora_alpha": 32}, [{"name": "kif"}]),
    ("kif/t5-xl-long", "kif-m", {}, {"r": 8}, [{"replay_ratio": 0.02}]),
    ("kif/t5-base-long", "tasl-full", {}, None, [{"units": "matrix"}]),
    # SEEKR, App. B and scripts/exp_seq_seekr.sh
    *((f"seekr/{name}", variant, {"learning_rate": 1e-5, "adam_beta2": 0.95, "weight_decay": 0.0, "warmup_steps": 0,
                                  "lr_scheduler_type": "constant"}, None, methods)
      for name in ("llama2-7b-chat-trace-order1", "llama2-7b-chat-trace-order2", "vicuna-7b-trace-order1",
                   "vicuna-7b-trace-order2")
      for variant, methods in [
        ("seekr-1-paper", [{"ratio": 0.01, "layers": 24, "heads": 128, "query_rows": 100, "attention_weight": 1e3,
                            "logit_weight": 0.5, "importance": "product_of_sums", "policy": "random"}]),
        ("seekr-1-code", [{"ratio": 0.01, "layers": 24, "heads": 128, "query_rows": 0, "attention_weight": 1e3,
                           "importance": "sum_of_products", "policy": "first_n", "logit_shift": "reference"}]),
        ("seekr-10-paper", [{"ratio": 0.1, "layers": 8, "heads": 128, "attention_weight": 1e2, "query_rows": 100}]),
        ("seekr-10-code", [{"ratio": 0.1, "layers": 24, "attention_weight": 1e3, "query_rows": 0}]),
        ("derpp-1", [{"name": "derpp", "ratio": 0.01, "loss": "kl", "alpha": 0.5, "beta": 0.5}]),
        ("replay-10-code", [{"name": "replay", "ratio": 0.1, "policy": "first_n", "mixing": "mix"}]),
        ("ewc", [{"ewc_lambda": 400.0, "fisher": "trace"}]),
        ("lwf", [{"weight": 1.0, "temperature": 2.0}]),
      ]),
    ("seekr/llama2-7b-chat-trace-order1", "seekr-1-random", {}, None, [{"head_choice": "random", "ratio": 0.01}]),
    ("seekr/llama2-7b-chat-superni12-order4", "seekr-1-equations", {}, None,
     [{"kl_reduction": "sum", "loss_mix": "summed", "replay_weight": 1.0}]),
    ("seekr/llama2-7b-chat-superni12-order3", "olora", {"learning_rate": 1e-4}, {"r": 8, "lora_alpha": 32},
     [{"lambda_1": 0.5, "lambda_2": 0.0}]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "variant", "training", "peft", "methods"), VALUES, ids=lambda v: str(v)[:40])
def test_values(name, variant, training, peft, methods):
    recipe = next(run.recipe for run in runs_of(name) if run.variant == variant)
    assert {key: recipe["training"].get(key) for key in training} == training
    assert (recipe["peft"] is None) == (peft is None)
    assert {key: recipe["peft"][key] for key in peft or {}} == (peft or {})
    assert len(recipe["methods"]) == len(methods)
    for ours, theirs in zip(recipe["methods"], methods, strict=True):
        assert {key: ours[key] for key in theirs} == theirs


BATCHES = {"migu/t5-large": 64, "migu/roberta-das": 248, "migu/llama2-7b-magicoder": 64, "tasl/llama-7b": 128,
           "tasl/": 8, "kif/llama2-7b": 64, "kif/": 8, "seekr/": 128}  # fmt: skip


@pytest.mark.parametrize("name", PAPER)
def test_global_batch_on_the_published_hardware(name):
    processes = re.search(r"--num_processes (\d+)", RECIPES[name].read_text())
    expected = next(batch for start, batch in BATCHES.items() if name.startswith(start))
    for run in runs_of(name):
        training = run.recipe["training"]
        rows = training["per_device_train_batch_size"] * training["gradient_accumulation_steps"]
        if str(run.variant).endswith("-sapt"):  # 32, on 4 GPUs with Llama
            assert rows * (4 if "llama" in name else 1) == 32
        else:
            assert rows * int(processes[1] if processes else 1) == expected, run.variant


ROWS = {"ft", "lora", "inclora", "oinclora", "lorareplay"}


def test_every_row_of_the_tables_has_a_variant():
    for name in PAPER:
        variants = {str(run.variant) for run in runs_of(name)}
        assert "joint" in variants or name in ("migu/roberta-das", "migu/llama2-7b-magicoder")
        if name.startswith("migu/t5-large"):
            rows = ROWS | ({"ftreplay"} if "standard" in name else set())
            assert variants >= {f"{r}{m}-{s}" for r in rows for m in ("", "+migu") for s in ("paper", "code")}, name
        if name.startswith(("kif/", "tasl/")):
            assert variants >= {"tasl-paper", "tasl-code", "tasl-m", "replay"}, name
        if name.startswith("kif/"):
            assert variants >= {"kif-paper", "kif-code", "kif-m", "kif-sapt", "lora", "olora", "ewc"}, name
        if name.startswith("seekr/"):
            assert variants >= {"seqft", "lwf", "olora", "replay-1-code", "derpp-1", "seekr-1-paper", "seekr-1-code"}, (
                name
            )
        if "trace" in name:
            assert variants >= {"ewc", "replay-10-paper", "derpp-10", "seekr-10-paper", "seekr-10-code"}, name
        if name.startswith("seekr/llama2-7b-chat-trace"):
            assert variants >= {f"seekr-1-{choice}" for choice in ("random", "sensitivity", "forgettability")}, name


# -- streams and orders ------------------------------------------------------------------------------------------------


def commands(name):
    """The `--tasks.stream S --name N` that a recipe's header, or the index, offers."""
    header = " ".join(line.lstrip("# ") for line in RECIPES[name].read_text().splitlines() if line.startswith("#"))
    return re.findall(r"--tasks\.stream ([\w:.-]+) --name ([\w.-]+)", header)


@pytest.mark.parametrize("name", PAPER)
def test_streams_exist_and_other_orders_run(name):
    path, recipe = RECIPES[name], load_recipe(RECIPES[name])
    streams = [recipe["tasks"]["stream"]]
    for stream, run_name in commands(name):
        run = expand(recipe, path.parent, {"tasks.stream": stream, "name": run_name, "seeds": [1]})[0]
        assert run.recipe["tasks"]["stream"] == stream and run.run_dir.parts[1] == run_name
        streams.append(stream)
    for stream in streams:
        assert stream.split(":")[0] in stream_names()
        stream_of(stream)  # the variant, too
    if "-order" not in name and name.split("/")[0] in ("kif", "tasl"):
        assert len(streams) > 1


@pytest.mark.parametrize("family", ["standard-order123", "long-order456"])
def test_orders_of_a_table_differ_in_the_stream_alone(family):
    stem, orders = family.rstrip("123456"), family[-3:]
    recipes = []
    for order in orders:
        recipe = load_recipe(RECIPES[f"migu/t5-large-{stem}{order}"])
        assert recipe.pop("name") == f"t5-large-{stem}{order}"
        assert recipe["tasks"].pop("stream") == f"{stem}{order}"
        recipes.append(recipe)
    # scripts/full_tuning/order_5.sh and order_6.sh
    exceptions = {"5": {"wic": {"num_train_epochs": 2}}, "6": {"mnli": {"num_train_epochs": 2}}}
    assert [r.pop("tasks") for r in recipes] == [{"training": exceptions[o]} if o in exceptions else {} for o in orders]
    assert recipes[0] == recipes[1] == recipes[2]


def test_the_index_names_every_recipe():
    text = (RECIPES["quickstart"].parent / "README.md").read_text()
    named = set(re.findall(r"`recipes/([\w./-]+)\.yaml`", text))
    assert named == set(RECIPES)


# -- dry runs ----------------------------------------------------------------------------------------------------------


def data_of_standard(root):
    write = {"dbpedia": "Film", "amazon": "neutral", "yahoo": "Health", "agnews": "World"}
    jsonl_layout(root, write)
    return root


def data_of_superni(root):
    for task in stream_of("superni15-order1").tasks:
        labels = stream_of("superni15-order1").tasks[task].get("labels") or ["a dog"]
        rows = [{"id": f"{task}-{i}", "input": f"w{i} w{i + 1}", "output": [labels[0]]} for i in range(6)]
        for split in ("train", "dev", "test"):
            folder = root / "SuperNI" / task
            folder.mkdir(parents=True, exist_ok=True)
            content = {"Definition": ["say it"], "Positive Examples": [], "Negative Examples": [], "Instances": rows}
            (folder / f"{split}.json").write_text(json.dumps(content))
    return root


def data_of_das(root):
    write_data("das", root)
    for corpus in root.rglob("*.txt"):  # in words of the toy tokenizer, for unknown ones are not masked
        corpus.write_text("".join(" ".join(f"w{i + j}" for j in range(8)) + "\n" for i in range(40)))
    return root


DRY = [
    ("migu/t5-large-standard-order1", "t5", data_of_standard, "ft+migu-code"),
    ("kif/t5-large-superni15", "t5", data_of_superni, "kif-code"),
    ("tasl/llama-7b-sgd", "llama", functools.partial(write_data, "sgd-order1"), "tasl-code"),
    ("seekr/vicuna-7b-trace-order2", "llama", functools.partial(write_data, "trace-order2:reasoning"), "seqft"),
    ("migu/roberta-das", "roberta", data_of_das, "ft"),
]


@pytest.mark.parametrize(("name", "kind", "data", "variant"), DRY, ids=[row[0] for row in DRY])
def test_dry_run_of_one_recipe_a_folder(name, kind, data, variant, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    masked = kind == "roberta"
    (masked_model() if masked else tiny_model(kind)).save_pretrained("model")
    (masked_tokenizer() if masked else toy_tokenizer()).save_pretrained("model")
    words = ["--tasks.data_dir", str(data(tmp_path / "data")), "--model.name", "./model", "--model.dtype", "float32",
             "--data.max_prompt_length", "16", "--data.max_completion_length", "4", "--seeds", "[1]",
             "--training.bf16", "false", "--training.fp16", "false"]  # fmt: skip
    words += ["--data.block_size", "8"] if masked else []
    assert main(["run", f"recipes/{name}.yaml", "--dry_run", "--only", variant, *words]) == 0
    said = capsys.readouterr().out
    assert f"stream: {load_recipe(RECIPES[name])['tasks']['stream']}@" in said and variant in said
    assert not Path("runs").exists()
