"""Whatever a user can get wrong: one sentence, exit code 2, and nothing already learnt is lost."""

import errno
import json
import os
import resource
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from toy_runs import assert_same, save_model, snapshot, write_recipe

from hf_continual import run_state
from hf_continual.cli import main


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def learnt(tmp_path_factory, model):
    """A recipe of one task that was run, with replay and MIGU. Tests work on a copy."""
    folder = tmp_path_factory.mktemp("learnt")
    path = write_recipe(folder, model, methods=["migu", {"name": "replay", "ratio": 0.5}], run_dir="run",
                        tasks=[{"name": "a", "path": "data/a.jsonl", "eval_fraction": 0.25}])  # fmt: skip
    before = os.getcwd()
    os.chdir(folder)
    try:
        assert main(["run", str(path)]) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def copy(learnt, tmp_path, monkeypatch):
    """A copy of `learnt`, and the current directory: the recipe is `recipe.yaml`, its run `run`."""
    shutil.copytree(learnt, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


TWO = ["--tasks", "[{name: a, path: data/a.jsonl, eval_fraction: 0.25}, {name: b, path: data/b.jsonl}]"]


@pytest.fixture
def refused(capsys):
    def check(words, *said):
        capsys.readouterr()
        assert main(words) == 2
        error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(error) == 1, error
        for part in said:
            assert part in error[0], error[0]
        return error[0]

    return check


# -- before anything is learnt: refused, and the corrected recipe runs in the same directory -------------------------


def _rows(text):
    return lambda folder: (folder / "data" / "a.jsonl").write_text(text)


def _remove(name):
    return lambda folder: (folder / name).unlink()


BAD = {
    "missing file": (_remove("data/a.jsonl"), [], ["a.jsonl", "data"]),
    "empty dataset": (_rows(""), [], ["'a'", "empty", "a.jsonl"]),
    "wrong column": (_rows('{"question": "x", "answer": "y"}\n' * 4), [], ["columns", "question", "a.jsonl"]),
    "mapped column": (None, ["--tasks.0.columns", "{prompt: inputt, completion: output}"], ["'inputt'", "'input'"]),
    "label that is no string": (_rows('{"input": "x", "output": 3}\n' * 4), [], ["'output'", "3", "not a string"]),
    "broken JSON": (_rows('{"input": "x", \n' * 3), [], ["line 1", "a.jsonl", "JSON"]),
    "answer outside the labels": (None, ["--tasks.0.labels", "[yes, no]"], ["labels", "'yes', 'no'"]),
    "unknown method": (None, ["--methods", "[miguu]"], ["'miguu'", "did you mean 'migu'"]),
    "unknown stream": (None, ["--tasks", "{stream: standard-order9}"], ["standard-order9", "did you mean"]),
    "unknown key": (None, ["--training.learning_rte", "1"], ["learning_rte", "did you mean 'learning_rate'"]),
    "no rows a batch": (None, ["--training.per_device_train_batch_size", "0"], ["batch_size=0 must be at least 1"]),
    "no accumulation": (None, ["--training.gradient_accumulation_steps", "0"], ["_steps=0 must be at least 1"]),
    "epochs below 0": (None, ["--training.num_train_epochs", "-1"], ["num_train_epochs=-1 must be at least 0"]),
    "learning rate below 0": (None, ["--training.learning_rate", "-1"], ["learning_rate=-1 must be at least 0"]),
    "norm below 0": (None, ["--training.max_grad_norm", "-1"], ["max_grad_norm=-1 must be at least 0"]),
    "unknown task key": (None, ["--tasks.0.pth", "x"], ["pth", "did you mean 'path'"]),
    "threshold 1": (None, ["--methods.0.threshold", "1"], ["migu", "threshold=1", "[0, 1)"]),
    "threshold below 0": (None, ["--methods.0.threshold", "-0.1"], ["migu", "threshold=-0.1", "[0, 1)"]),
    "threshold NaN": (None, ["--methods.0.threshold", ".nan"], ["migu", "threshold=nan", "[0, 1)"]),
    "threshold of text": (None, ["--methods.0.threshold", "high"], ["migu", "threshold", "high"]),
    "LoRA without a target": (None, ["--peft.target_modules", "[nothing]"], ["target_modules", "nothing", "q_proj"]),
    "LoRA of rank 0": (None, ["--peft.r", "0"], ["peft"]),
    "MIGU without a target": (None, ["--methods.0.targets", "nothing"], ["migu", "targets", "nothing"]),
    "InCLoRA without LoRA": (None, ["--methods", "[inclora]", "--peft", "null"], ["inclora", "peft"]),
    "two methods adding adapters": (None, ["--methods", "[inclora, olora]"], ["inclora", "olora"]),
    "duplicate names": (None, ["--tasks.1.name", "a"], ["two tasks are named 'a'"]),
    "name with a separator": (None, ["--tasks.1.name", "../b"], ["'../b'", "letters"]),
    "no labels": (None, ["--evaluation.scorer", "label_likelihood"], ["'a'", "label_likelihood", "labels"]),
    "model folder missing": (None, ["--model.name", "./absent"], ["model.name=./absent", "folder"]),
    "model folder without a model": (None, ["--model.name", "./data"], ["model.name=./data", "config.json"]),
    "hub model without network": (None, ["--model.name", "nobody/nothing"], ["model.name=nobody/nothing", "hub id"]),
    "package missing": (None, ["--model.name", "package:absent.pkg"], ["package:absent.pkg", "pip install"]),
    "GGUF file missing": (None, ["--model.gguf_file", "x.gguf"], ["gguf_file=x.gguf"]),
    "tasks missing": (None, ["--tasks", "null"], ["tasks", "missing"]),
    "trainer missing": (None, ["--trainer", "absent:Class"], ["trainer='absent:Class'"]),
    "per-task option": (None, ["--tasks.1.training", "{learning_rte: 1}"], ["'b'", "did you mean 'learning_rate'"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory, model):
    """What the corrected recipe should end with."""
    folder = tmp_path_factory.mktemp("plain")
    path = write_recipe(folder, model)
    assert main(["run", str(path)]) == 0
    return folder / "run"


@pytest.mark.parametrize("case", BAD)
def test_refused_before_training(tmp_path, model, case, refused, monkeypatch):
    breaking, words, said = BAD[case]
    path = write_recipe(tmp_path, model)
    monkeypatch.chdir(tmp_path)
    if breaking:
        breaking(tmp_path)
    refused(["run", str(path), *words], *said)
    assert not (tmp_path / "run" / "tasks").exists() and not (tmp_path / "run" / "queue.json").exists()


@pytest.mark.parametrize("case", ["LoRA without a target", "no labels", "loss", "loss after a checkpoint"])
def test_corrected_recipe_runs_in_the_same_directory(tmp_path, model, case, refused, plain):
    path = write_recipe(tmp_path, model)
    huge = ["--training.learning_rate", "1e38", "--training.max_grad_norm", "0", "--training.num_train_epochs", "3"]
    words = {"loss": huge, "loss after a checkpoint": [*huge, "--training.logging_steps", "50"]}.get(case)
    refused(["run", str(path), *(words or BAD[case][1])], *(["NaN", "learning_rate=1e+38", "lower"] if words else []))
    assert main(["run", str(path)]) == 0
    assert_same(tmp_path / "run", plain)


def test_no_padding_token(tmp_path, model, refused):
    bare = shutil.copytree(model, tmp_path / "bare")
    settings = json.loads((bare / "tokenizer_config.json").read_text())
    settings.pop("pad_token")
    (bare / "tokenizer_config.json").write_text(json.dumps(settings))
    path = write_recipe(tmp_path, bare)
    refused(["run", str(path)], "model.pad_token", "no padding token", "pad_token: eos")
    assert main(["run", str(path), "--model.pad_token", "eos", "--training.max_steps", "1"]) == 0


@pytest.mark.parametrize(
    ("file", "cut"), [("model.safetensors", 5000), ("config.json", 40), ("tokenizer.json", 100), ("config.json", 0)]
)
def test_truncated_model(tmp_path, model, refused, file, cut):
    broken = shutil.copytree(model, tmp_path / "broken")
    (broken / file).write_bytes((broken / file).read_bytes()[:cut])
    refused(["run", str(write_recipe(tmp_path, broken))], f"model.name={broken}", "could")


def test_nan_weights(tmp_path, model, refused):
    broken = shutil.copytree(model, tmp_path / "nan")
    weights = load_file(str(broken / "model.safetensors"))
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], float("nan"))
    save_file(weights, str(broken / "model.safetensors"), metadata={"format": "pt"})
    refused(["run", str(write_recipe(tmp_path, broken))], "task 'a'", "NaN")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"model: [", "not valid YAML"), (b"- a\n- b\n", "no mapping"), (b"", "no mapping"),
        (b"\xff\xfe\x00", "UTF-8"), (b"model: x\nmodel: y\n", "twice"),
        (b"model: {name: x}\n", "tasks: is missing"), (b"tasks: [{}]", "model: is missing"),
    ],
)  # fmt: skip
def test_recipes_that_are_none(tmp_path, refused, content, said):
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    refused(["run", str(path)], said)


def test_run_dir_that_cannot_be(tmp_path, model, refused, monkeypatch):
    (tmp_path / "file").write_text("")
    path = write_recipe(tmp_path, model)
    refused(["run", str(path), "--run_dir", str(tmp_path / "file")], "run_dir=", "another run_dir")
    refused(["run", str(path), "--run_dir", str(tmp_path / "file" / "run")], "run_dir=", "another run_dir")
    original = os.replace

    def read_only(source, target, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(target))

    monkeypatch.setattr(run_state.os, "replace", read_only)
    refused(["run", str(path)], "run_dir=", "Permission denied", "permissions")
    monkeypatch.setattr(run_state.os, "replace", original)
    assert main(["run", str(path), "--training.max_steps", "1"]) == 0


# -- in a run that has learnt ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--training.learning_rate", "0.01"], "training.learning_rate is 0.05 there and 0.01 here"),
        (["--methods.0.threshold", "0.9"], "methods.0.threshold is 0.7 there and 0.9 here"),
        (["--methods", "[]"], "methods"), (["--seed", "3"], "seed 42"),
        (["--peft.r", "4"], "peft.r is 2 there and 4 here"),
        (["--tasks.0.name", "z"], "its task 0 is 'a' and not 'z'"),
        (["--tasks.0.path", "data/b.jsonl"], "the training rows of task 'a' differ"),
        (["--tasks.0.eval_fraction", "0.5"], "the training rows of task 'a' differ"),
    ],
)  # fmt: skip
def test_run_directory_of_another_recipe(copy, refused, words, said):
    before = snapshot("run")
    refused(["run", "recipe.yaml", *words], "another recipe", said, "another run directory")
    assert main(["run", "recipe.yaml"]) == 0
    assert_same("run", before)


def _edit(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def _cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))


T = "run/tasks/00-a"
DAMAGE = {
    "other schema": ("run/queue.json", lambda p: _edit(p, lambda q: q.update(schema=99)), "schema version 99"),
    "no schema": ("run/queue.json", lambda p: _edit(p, lambda q: q.pop("schema")), "queue.json"),
    "cursor": ("run/queue.json", lambda p: _edit(p, lambda q: q.update(cursor=5)), "cursor"),
    "cursor of text": ("run/queue.json", lambda p: _edit(p, lambda q: q.update(cursor="1")), "cursor"),
    "task entries": ("run/queue.json", lambda p: _edit(p, lambda q: q.update(tasks=[3])), "edited"),
    "queue cut": ("run/queue.json", _cut, "truncated or was edited"),
    "queue gone": ("run/queue.json", os.unlink, "missing"),
    "recipe cut": ("run/recipe.yaml", _cut, "recipe.yaml"),
    "recipe edited": (
        "run/recipe.yaml", lambda p: p.write_text(p.read_text().replace("r: 2", "r: 3")), "recipe.yaml was edited",
    ),
    "recipe gone": ("run/recipe.yaml", os.unlink, "recipe.yaml"),
    "scores cut": ("run/scores.jsonl", _cut, "scores.jsonl line 1"),
    "scores edited": (
        "run/scores.jsonl", lambda p: p.write_text(p.read_text().replace('"n": 2', '"n": 3')), "scores.jsonl line 1",
    ),
    "scores of noise": ("run/scores.jsonl", lambda p: p.write_bytes(b"\xff\xfe\n"), "scores.jsonl line 1"),
    "adapter cut": (f"{T}/adapter/adapter_model.safetensors", _cut, "adapter_model.safetensors"),
    "adapter edited": (f"{T}/adapters/default/adapter_model.safetensors", _flip, "was edited"),
    "adapter gone": (f"{T}/adapters/default/adapter_model.safetensors", os.unlink, "is missing"),
    "method state cut": (f"{T}/methods/migu.json", _cut, "migu.json"),
    "method state edited": (f"{T}/methods/migu.safetensors", _flip, "migu.safetensors"),
    "buffer cut": (f"{T}/methods/replay-buffer_/data-00000-of-00001.arrow", _cut, "arrow"),
    "model.json": (f"{T}/model.json", lambda p: p.write_text("{}"), "model.json"),
    "manifest cut": (f"{T}/manifest.json", _cut, "manifest.json"),
    "manifest edited": (f"{T}/manifest.json", lambda p: p.write_text('{"a": 1}'), "manifest.json"),
    "cell cut": (f"{T}/predictions/a.json", _cut, "delete it and run again"),
    "cell emptied": (f"{T}/predictions/a.json", lambda p: p.write_text("{}"), "delete it and run again"),
    "cell of another task": (
        f"{T}/predictions/a.json", lambda p: _edit(p, lambda c: c.update(task="b")), "delete it and run again",
    ),
    "cell edited": (
        f"{T}/predictions/a.json", lambda p: _edit(p, lambda c: c.update(score=0.123)), "scores.jsonl line 1",
    ),
    "added tasks": ("run/added_tasks.yaml", lambda p: p.write_text("{a: [}"), "added_tasks.yaml"),
    "added tasks of another kind": ("run/added_tasks.yaml", lambda p: p.write_text("a"), "added_tasks.yaml"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_state(copy, refused, case, learnt):
    name, damage, said = DAMAGE[case]
    path, before = copy / name, snapshot("run")
    damage(path)
    # Finished or not, from the recipe or from the directory: the damage is seen.
    refused(["run", "recipe.yaml"], said)
    refused(["run", "recipe.yaml", *TWO], said)
    refused(["run", "run"], said)
    original = learnt / name
    if original.exists():
        shutil.copy(original, path)
    else:
        path.unlink()
    assert main(["run", "recipe.yaml"]) == 0
    assert_same("run", before)


@pytest.mark.parametrize("name", ["run/scores.jsonl", f"{T}/predictions/a.json"])
def test_what_can_be_rebuilt_is(copy, name):
    before = snapshot("run")
    (copy / name).unlink()
    assert main(["run", "recipe.yaml"]) == 0
    assert_same("run", before)


@pytest.mark.parametrize(
    "case", ["missing file", "empty dataset", "wrong column", "label that is no string", "broken JSON"]
)
def test_bad_task_added(copy, refused, case):
    breaking, _, said = BAD[case]
    shutil.copy("data/a.jsonl", "kept.jsonl")
    before = (copy / "run" / "queue.json").read_text()
    (copy / "task.yaml").write_text("{name: new, path: data/new.jsonl}")
    breaking(copy)
    if (copy / "data" / "a.jsonl").exists():
        shutil.move("data/a.jsonl", "data/new.jsonl")
    shutil.copy("kept.jsonl", "data/a.jsonl")
    refused(
        ["add", "run", "task.yaml"], *(part.replace("a.jsonl", "new.jsonl").replace("'a'", "'new'") for part in said)
    )
    assert (copy / "run" / "queue.json").read_text() == before and not (copy / "run" / "added_tasks.yaml").exists()
    assert main(["run", "recipe.yaml"]) == 0


def test_nan_loss_in_a_later_task(copy, refused):
    before = snapshot("run")
    task = "{name: b, path: data/b.jsonl, training: {learning_rate: %s, max_grad_norm: 0, num_train_epochs: 3}}"
    words = ["run", "recipe.yaml", "--tasks", f"[{{name: a, path: data/a.jsonl, eval_fraction: 0.25}}, {task}]"]
    refused([*words[:3], words[3] % "1e38"], "task 'b'", "learning_rate", "this task's alone")
    assert snapshot("run").keys() == before.keys()
    assert main([*words[:3], words[3] % "0.01"]) == 0


# -- a full disk -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_tasks(learnt, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two") / "copy"
    shutil.copytree(learnt, folder)
    before = os.getcwd()
    os.chdir(folder)
    try:
        assert main(["run", "recipe.yaml", *TWO]) == 0
    finally:
        os.chdir(before)
    return folder / "run"


def _full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def _full_torch(*args, **kwargs):
    raise RuntimeError("[enforce fail at inline_container.cc:664] . PytorchStreamWriter failed writing file data/0")


@pytest.mark.parametrize(
    ("where", "fail"),
    [
        ("transformers.Trainer._save_optimizer_and_scheduler", _full),
        ("torch.save", _full_torch),
        ("hf_continual.lora.LoraView.export", _full),
        ("hf_continual.methods.base.MethodList.save", _full),
        ("hf_continual.task_queue.write_json", _full),
        ("hf_continual.run_state.os.replace", _full),
        ("hf_continual.run_state.RunDirectory.write_cell", _full),
    ],
)
def test_full_disk(copy, refused, monkeypatch, two_tasks, where, fail):
    monkeypatch.setattr(where, fail)
    refused(["run", "recipe.yaml", *TWO], "run_dir=run: the disk is full", "free some space")
    assert not list((copy / "run" / "work").glob("*.tmp"))
    monkeypatch.undo()
    monkeypatch.chdir(copy)
    assert main(["run", "recipe.yaml", *TWO]) == 0
    assert_same("run", two_tasks)


@pytest.mark.parametrize("limit", [3_000, 6_000, 9_000])
def test_files_that_may_not_grow(copy, refused, two_tasks, limit):
    """A real failing write: no file may grow past the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        code = main(["run", "recipe.yaml", *TWO])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 2
    assert main(["run", "recipe.yaml", *TWO]) == 0
    assert_same("run", two_tasks)


def test_full_disk_while_merging(copy, refused, monkeypatch):
    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", _full)
    refused(["merge", "run", "-o", "out"], "the disk is full")
    assert not (copy / "out").exists() and not (copy / ".out.tmp").exists()
    monkeypatch.undo()
    monkeypatch.chdir(copy)
    assert main(["merge", "run", "-o", "out"]) == 0


def test_merge_and_report_of_a_damaged_run(copy, refused):
    _flip(copy / T / "adapters" / "default" / "adapter_model.safetensors")
    refused(["merge", "run", "-o", "out"], "was edited")
    _cut(copy / "run" / "queue.json")
    refused(["report", "run"], "queue.json")
    refused(["report", "."], "queue.json")
