import json
import os
import signal

import pytest
import torch
import yaml
from peft import PeftModel
from toy_runs import assert_same, save_model, snapshot, write_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_continual.cli import main
from hf_continual.run_state import RunDirectory
from hf_continual.testing import toy_tokenizer

IDS = torch.tensor([[5, 9, 30, 41, 60, 7]])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, model):
    """A recipe that was run: its path. The run is in `run` beside it."""
    path = write_recipe(tmp_path_factory.mktemp("recipe"), model, methods=["inclora", "migu"])
    assert main(["run", str(path)]) == 0
    return path


def test_run_reports_and_says_when_finished(recipe, capsys):
    assert main(["run", str(recipe)]) == 0
    out = capsys.readouterr().out
    assert "finished, 2 task(s) learnt; nothing to do" in out and "average_performance" in out.replace(" ", "_").lower()
    assert (recipe.parent / "run" / "report.md").is_file() and list((recipe.parent / "run").glob("*.png"))
    assert main(["run", str(recipe.parent / "run")]) == 0
    assert "finished" in capsys.readouterr().out


def test_no_clutter(recipe, tmp_path, model, capsys):
    path = write_recipe(tmp_path, model, methods=["replay"])
    assert main(["run", str(path)]) == 0
    noise = capsys.readouterr()
    for word in ("Casting", "Saving the dataset", "Loading weights", "Writing model", "FutureWarning", "pin_memory",
                 "mtime"):  # fmt: skip
        assert word not in noise.out + noise.err, word
    assert "scoring a" in noise.err  # the bars of the evaluation stay


def test_dry_run_writes_nothing(tmp_path, model, capsys):
    path = write_recipe(tmp_path, model)
    before = sorted(tmp_path.rglob("*"))
    assert main(["run", str(path), "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert "a (6 train, 2 eval)" in out and "nothing trained" in out
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "change",
    [["--evaluation.scorer", "label_likelihood"], ["--peft.target_modules", "[nothing]"], ["--peft", "null",
     "--methods", "[inclora]"], ["--tasks.1.path", "absent.jsonl"], ["--model.name", "/absent"]],
)  # fmt: skip
def test_dry_run_refuses_what_run_refuses(tmp_path, model, capsys, change):
    path = write_recipe(tmp_path, model)
    assert main(["run", str(path), "--dry_run", *change]) == 2
    first = capsys.readouterr().err
    assert main(["run", str(path), *change]) == 2
    assert capsys.readouterr().err == first
    assert not (tmp_path / "run" / "queue.json").exists()


def test_overrides_reach_the_run(tmp_path, model):
    path = write_recipe(tmp_path, model)
    assert main(["run", str(path), "--training.max_steps", "1", "--methods.0.threshold", "0.25",
                 "--training.learning_rate=1e-3", "--tasks.1.name", "renamed"]) == 0  # fmt: skip
    stored = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert stored["methods"][0]["name"] == "migu" and stored["methods"][0]["threshold"] == 0.25
    assert stored["training"]["learning_rate"] == 0.001
    assert (tmp_path / "run" / "tasks" / "01-renamed").is_dir()
    log = json.loads((tmp_path / "run" / "tasks" / "00-a" / "log.json").read_text())
    assert max(entry["step"] for entry in log) == 1


def test_variants_by_seeds(tmp_path, model, capsys):
    path = write_recipe(tmp_path, model, seeds=[1, 2], variants={"naive": {"methods": []}, "migu": {}})
    short = ["--training.max_steps", "1", "--tasks", "[{name: a, path: data/a.jsonl}]"]
    assert main(["run", str(path), *short, "--only", "naive"]) == 0
    assert not (tmp_path / "run" / "migu").exists()
    assert main(["run", str(path), *short]) == 0
    runs = sorted(str(p.parent.relative_to(tmp_path / "run")) for p in tmp_path.rglob("queue.json"))
    assert runs == ["migu/seed-1", "migu/seed-2", "naive/seed-1", "naive/seed-2"]
    assert "run 4/4" in capsys.readouterr().out
    weights = {r: snapshot(tmp_path / "run" / r)["tasks/00-a/adapter/adapter_model.safetensors"] for r in runs}
    assert len({str({k: v.tolist() for k, v in sorted(w.items())}) for w in weights.values()}) == 2
    assert main(["run", str(path), "--only", "nave"]) == 2


def test_add_equals_the_longer_recipe(recipe, tmp_path, model, capsys):
    three = [{"name": n, "path": f"data/{n}.jsonl", "eval_fraction": 0.25} for n in "abc"]
    path = write_recipe(tmp_path / "whole", model, methods=["inclora", "migu"], tasks=three)
    assert main(["run", str(path)]) == 0
    path = write_recipe(tmp_path / "grown", model, methods=["inclora", "migu"])
    run, task = tmp_path / "grown" / "run", tmp_path / "grown" / "task.yaml"
    task.write_text("{name: c, path: data/c.jsonl, eval_fraction: 0.25}")
    assert main(["run", str(path)]) == 0
    assert main(["add", str(run), str(task), "--no_run"]) == 0
    assert "added task 'c'" in capsys.readouterr().out and not (run / "tasks" / "02-c").exists()
    assert main(["run", str(path)]) == 0  # the recipe of two tasks, continued with the third
    assert_same(run, tmp_path / "whole" / "run")
    assert main(["add", str(run), str(task)]) == 2
    assert "two tasks are named 'c'" in capsys.readouterr().err
    (run / "added_tasks.yaml").unlink()
    assert main(["run", str(path)]) == 2
    assert "also has the task 'c'" in capsys.readouterr().err


def test_killed_while_adding(tmp_path, model, monkeypatch):
    path = write_recipe(tmp_path, model, methods=[])
    run, task = tmp_path / "run", tmp_path / "task.yaml"
    task.write_text("{name: c, path: data/c.jsonl}")
    assert main(["run", str(path), "--tasks", "[{name: a, path: data/a.jsonl}]"]) == 0

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(RunDirectory, "write_queue", killed)
    assert main(["add", str(run), str(task)]) == 130
    monkeypatch.undo()
    assert main(["run", str(run)]) == 0
    assert (run / "tasks" / "01-c").is_dir()


def test_merge_loads_in_plain_transformers(recipe, tmp_path, model, capsys):
    run = recipe.parent / "run"
    for options, folder in ([], "01-b"), (["--task", "a"], "00-a"):
        out = tmp_path / folder
        assert main(["merge", str(run), "-o", str(out), *options]) == 0
        merged = AutoModelForCausalLM.from_pretrained(str(out)).eval()(IDS).logits.detach()
        base = AutoModelForCausalLM.from_pretrained(str(model)).eval()
        before = base(IDS).logits.detach()
        adapted = PeftModel.from_pretrained(base, str(run / "tasks" / folder / "adapter")).eval()(IDS).logits.detach()
        torch.testing.assert_close(merged, adapted, rtol=0, atol=1e-5 * float(adapted.abs().max()))
        assert float((merged - before).abs().max()) > 1e-4
        assert AutoTokenizer.from_pretrained(str(out))("w3")["input_ids"] == toy_tokenizer()("w3")["input_ids"]
    assert "after task 'a'" in capsys.readouterr().out
    for words, said in (
        (["-o", str(tmp_path / "01-b")], "not empty"), (["-o", str(model / "config.json")], "a file"),
        (["-o", str(tmp_path / "x"), "--task", "c"], "--task c"), (["-o", str(model / "config.json" / "x")], "-o"),
    ):  # fmt: skip
        assert main(["merge", str(run), *words]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_report_ls_env(recipe, tmp_path, capsys):
    assert main(["report", str(recipe.parent / "run"), "-o", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "report.md").is_file()
    assert main(["report", str(tmp_path / "absent")]) == 2
    capsys.readouterr()
    for what, word in (("methods", "migu"), ("streams", "standard-order1"), ("recipes", "quickstart")):
        assert main(["ls", what]) == 0
        assert word in capsys.readouterr().out
    assert main(["env"]) == 0
    assert "torch: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "command"), (["runn"], "run"), (["run"], "recipe"), (["ls", "method"], "methods"),
        (["merge", "x"], "--out"), (["ls", "methods", "--x"], "no option --x"),
        (["run", "absent.yaml"], "no such file"),
        (["add", "absent", "absent.yaml"], "no such file"), (["validate", "absent"], "no method 'absent'"),
    ],
)  # fmt: skip
def test_command_line_mistakes(words, said, capsys):
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and said in error


def test_sigint_exits_130_and_continues(tmp_path, model, monkeypatch, capsys, recipe):
    from hf_continual.trainer import ContinualTrainer

    path = write_recipe(tmp_path, model, methods=["inclora", "migu"])
    original = ContinualTrainer.training_step

    def interrupted(self, *args, **kwargs):
        if self.task.name == "b":
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(ContinualTrainer, "training_step", interrupted)
    assert main(["run", str(path)]) == 130
    error = capsys.readouterr().err
    assert "interrupted: stopped in task 'b' at step 1; run the same command again to continue" in error
    monkeypatch.undo()
    assert main(["run", str(path)]) == 0
    assert_same(tmp_path / "run", recipe.parent / "run")


def test_ls_explains_every_option_of_a_method(capsys):
    assert main(["ls", "methods", "kif"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "  temperature = 0.25" in lines and lines[0].startswith("kif (arxiv:2408.05200): ")
    assert any("tau of the adaptive fusion" in line for line in lines)
    assert main(["ls", "methods", "kiff"]) == 2 and "did you mean 'kif'" in capsys.readouterr().err
    assert main(["ls", "recipes", "kif"]) == 2 and "takes no name" in capsys.readouterr().err
