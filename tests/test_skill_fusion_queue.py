"""TaSL and KIF in a task queue: killed anywhere, and refused where they cannot work."""

import hashlib
import json
import os
import shutil
import signal

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from toy_runs import FUSION_POINTS, assert_same, make_queue, run_until_killed, save_model, snapshot, write_recipe
from transformers import TrainerCallback

from hf_continual import TaskQueue
from hf_continual.cli import main
from hf_continual.errors import Interrupted
from hf_continual.run_state import RunDirectory
from hf_continual.testing import tiny_model, toy_queue_options, toy_stream

IDS = torch.tensor([[5, 9, 30, 41, 60, 7]])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kif") / "run"
    make_queue(folder, "kif").run()
    return folder


# -- what a run holds --------------------------------------------------------------------------------------------------


def test_state_and_log_of_each_task(finished):
    for index, folder in enumerate(sorted((finished / "tasks").iterdir())):
        record = json.loads((folder / "methods" / "kif.json").read_text())
        tensors = load_file(str(folder / "methods" / "kif.safetensors"))
        assert record["options"]["replay_count"] == 6 and record["state"]["tasks_done_"]["value"] == index + 1
        assert len(record["state"]["unit_keys_"]["value"]) == len(tensors["raw_"]) == 16
        assert set(tensors) == {"raw_", "cumulative_", *(["before_", "coefficients_"] if index else [])}
        phases = [entry.get("phase") for entry in json.loads((folder / "log.json").read_text())]
        assert ("kif/replay" in phases) == (index == 1)


def test_adapters_load_in_plain_peft(finished):
    queue = make_queue(finished, "kif")
    for index in range(2):
        ours = queue.model.after(index).eval()(IDS).logits
        plain = PeftModel.from_pretrained(
            tiny_model("llama"), str(finished / "tasks" / f"0{index}-toy{index}" / "adapter")
        )
        assert torch.equal(ours, plain.eval()(IDS).logits)
        assert not torch.equal(ours, tiny_model("llama").eval()(IDS).logits)


# -- killed ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("point", FUSION_POINTS)
def test_killed_and_continued(finished, tmp_path, point):
    run = tmp_path / "run"
    run_until_killed(run, "kif", point)
    assert (run / "tasks" / "00-toy0").is_dir() and not (run / "tasks" / "01-toy1").exists()
    make_queue(run, "kif").run()
    assert_same(run, finished)


def test_killed_again_and_again(finished, tmp_path):
    """In the phase, and then again in the merge before it."""
    run = tmp_path / "run"
    for point in ("in the replay phase", "in the merge"):
        run_until_killed(run, "kif", point)
    make_queue(run, "kif").run()
    assert_same(run, finished)


class InterruptInPhase(TrainerCallback):
    in_phases = True
    """SIGINT after the first step of the second training of a trainer, which is its replay phase."""

    def __init__(self):
        self.trainings = 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainings += "01-toy1" in args.output_dir

    def on_step_begin(self, args, state, control, **kwargs):
        if self.trainings == 2 and state.global_step == 0:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("saving", ["steps", "no"])  # with a checkpoint from before the merge, and without
def test_sigint_in_the_replay_phase(finished, tmp_path, saving):
    run, callback = tmp_path / "run", InterruptInPhase()
    queue = make_queue(run, "kif", save_strategy=saving)
    queue._trainer_kwargs = {"callbacks": [callback]}
    with pytest.raises(Interrupted, match="'toy1'"):
        queue.run()
    assert callback.trainings == 2 and not (run / "tasks" / "01-toy1").exists()
    queue._trainer_kwargs = {}
    queue.run()
    assert_same(run, finished)


# -- refused -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def refused(capsys):
    def check(words, *said):
        capsys.readouterr()
        assert main([str(word) for word in words]) == 2
        error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(error) == 1, error
        for part in said:
            assert part in error[0], error[0]

    return check


BAD = {
    "KIF without LoRA": (["--methods", "[kif]", "--peft", "null"], ["'kif' needs LoRA", "peft"]),
    "LoRA units without LoRA": (
        ["--methods", "[{name: tasl, units: lora_matrix}]", "--peft", "null"], ["'tasl' needs LoRA"],
    ),
    "two that merge": (["--methods", "[kif, tasl]"], ["'kif' and 'tasl'", "merge"]),
    "two baselines": (["--methods", "[weight_ensemble, fisher_merge]"], ["'weight_ensemble' and 'fisher_merge'"]),
    "DoRA": (["--methods", "[kif]", "--peft.use_dora", "true"], ["'kif'", "DoRA", "plain LoRA"]),
    "one unit": (
        ["--methods", "[kif]", "--peft.r", "1", "--peft.target_modules", "[layers.0.self_attn.q_proj]"],
        ["'kif'", "one skill unit only"],
    ),
    "products of matrices": (["--methods", "[{name: tasl, space: products}]"], ["space='products'", "lora_rank1"]),
    "products beside a replay phase": (
        ["--methods", "[{name: kif, space: products, replay_ratio: 0.5}]"], ["space='products'", "replay phase"],
    ),
    "no seed": (["--methods", "[{name: kif, replay_count: 2, replay_seed: today}]"], ["'kif'", "replay_seed='today'"]),
    "unknown order": (["--methods", "[{name: kif, order: third}]"], ["order='third'", "first, second, mix"]),
    "unknown option": (["--methods", "[{name: kif, temprature: 1}]"], ["temprature", "did you mean 'temperature'"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_refused_before_training(tmp_path, model, case, refused):
    words, said = BAD[case]
    path = write_recipe(tmp_path, model)
    refused(["run", path, *words], *said)
    assert not (tmp_path / "run" / "tasks").exists() and not (tmp_path / "run" / "queue.json").exists()


@pytest.fixture(scope="module")
def learnt(tmp_path_factory, model):
    """Recipes with KIF of one learnt task, whose adapters have rank 2 and rank 4."""
    folders = {}
    for rank in (2, 4):
        folders[rank] = tmp_path_factory.mktemp(f"rank{rank}")
        peft = {"r": rank, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}
        tasks = [{"name": "a", "path": "data/a.jsonl", "eval_fraction": 0.25}]
        training = {"per_device_train_batch_size": 2, "num_train_epochs": 1, "learning_rate": 0.05, "use_cpu": True,
                    "disable_tqdm": True, "save_steps": 1}  # fmt: skip
        path = write_recipe(folders[rank], model, methods=["kif"], peft=peft, tasks=tasks, training=training,
                            run_dir="run")  # fmt: skip
        before = os.getcwd()
        os.chdir(folders[rank])
        try:
            assert main(["run", str(path)]) == 0
        finally:
            os.chdir(before)
    return folders


TWO = ["--tasks", "[{name: a, path: data/a.jsonl, eval_fraction: 0.25}, "
                  "{name: b, path: data/b.jsonl, eval_fraction: 0.25}]"]  # fmt: skip


def sign(folder):
    """Write the manifest anew, as if the files had always been these."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in manifest:
        data = (folder / name).read_bytes()
        manifest[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("how", ["plainly", "with its manifest"])
def test_refuses_the_importance_of_another_model(learnt, tmp_path, refused, how, monkeypatch):
    folder = tmp_path / "copy"
    shutil.copytree(learnt[2], folder)
    monkeypatch.chdir(folder)
    methods, own = folder / "run" / "tasks" / "00-a" / "methods", tmp_path / "own"
    shutil.copytree(methods, own)
    for file in methods.iterdir():
        shutil.copy(learnt[4] / "run" / "tasks" / "00-a" / "methods" / file.name, file)
    manifest = (methods.parent / "manifest.json").read_text()
    said = ["00-a", "kif"]
    if how == "with its manifest":
        sign(methods.parent)
        said = ["method 'kif'", "other skill units", "q_proj[2]"]
    before = snapshot(folder / "run")
    refused(["run", folder / "recipe.yaml", *TWO], *said)
    after = snapshot(folder / "run")
    assert before.keys() == after.keys() and not (folder / "run" / "tasks" / "01-b").exists()
    for file in own.iterdir():
        shutil.copy(file, methods / file.name)
    (methods.parent / "manifest.json").write_text(manifest)
    assert main(["run", str(folder / "recipe.yaml"), *TWO]) == 0
    assert RunDirectory(folder / "run").read_queue()["cursor"] == 2


def test_refuses_too_few_steps_and_runs_with_more(learnt, tmp_path, refused, monkeypatch):
    folder = tmp_path / "copy"
    shutil.copytree(learnt[2], folder)
    monkeypatch.chdir(folder)
    before = snapshot(folder / "run")
    one_step = TWO[1].replace("name: b,", "name: b, training: {max_steps: 1},")
    refused(["run", folder / "recipe.yaml", "--tasks", one_step], "task 'b' has 1 optimizer step", "train longer")
    assert snapshot(folder / "run").keys() == before.keys()
    assert json.loads((folder / "run" / "queue.json").read_text())["cursor"] == 1


def test_the_run_says_what_was_merged(tmp_path, capsys):
    options = toy_queue_options(num_train_epochs=1)
    TaskQueue(tmp_path / "run", tasks=toy_stream(2), methods=[{"name": "kif", "replay_count": 4}], **options).run()
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("kif: merged ")]
    assert len(said) == 1 and said[0].startswith("kif: merged 16 units (neither ")
    assert "then trained on 4 kept rows with" in said[0] and "c from 0." in said[0]
