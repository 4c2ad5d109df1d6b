import json
import os
import signal

import pytest
import torch
from peft import PeftModel
from toy_runs import KINDS, POINTS, assert_same, make_queue, run_until_killed, snapshot
from transformers import AutoModelForCausalLM, TrainerCallback

from hf_continual import InputError, TaskQueue
from hf_continual.errors import Interrupted
from hf_continual.run_model import RunModel
from hf_continual.run_state import RunDirectory
from hf_continual.testing import tiny_model, toy_queue_options, toy_stream

IDS = torch.tensor([[5, 9, 30, 41, 60, 7]])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Uninterrupted runs, each made when first asked for."""
    made = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name.replace(" ", "-")) / "run"
            made[name] = folder, make_queue(folder, name).run()
        return made[name][0]

    return get


def test_layout(finished):
    run = finished("stack")
    assert {p.name for p in run.iterdir()} == {".lock", "recipe.yaml", "queue.json", "scores.jsonl", "tasks"}
    assert sorted(p.name for p in (run / "tasks").iterdir()) == ["00-toy0", "01-toy1"]
    task = run / "tasks" / "01-toy1"
    assert {p.name for p in task.iterdir()} == {
        "adapter", "adapters", "methods", "log.json", "manifest.json", "model.json", "predictions",
    }  # fmt: skip
    assert {p.name for p in (task / "adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert {p.name for p in (task / "adapters").iterdir()} == {"default", "task1"}
    assert {p.name for p in (task / "predictions").iterdir()} == {
        "toy0.json", "toy0.jsonl", "toy1.json", "toy1.jsonl",
    }  # fmt: skip
    assert {p.name for p in (finished("full") / "tasks" / "00-toy0" / "model").iterdir()} >= {
        "config.json", "model.safetensors", "tokenizer.json",
    }  # fmt: skip
    queue = json.loads((run / "queue.json").read_text())
    assert queue["schema"] == 1 and queue["cursor"] == 2 and queue["finished"] is True
    assert [t["name"] for t in queue["tasks"]] == ["toy0", "toy1"]


def test_scores_and_raw_predictions(finished):
    run = finished("stack")
    rows = [json.loads(line) for line in (run / "scores.jsonl").read_text().splitlines()]
    assert [(r["after_task"], r["task"]) for r in rows] == [("toy0", "toy0"), ("toy1", "toy0"), ("toy1", "toy1")]
    for row in rows:
        assert row["metric"] == "exact_match" and 0 <= row["score"] <= 1 and row["n"] == 4
        folder = run / "tasks" / f"{row['after_index']:02d}-{row['after_task']}" / "predictions"
        lines = [json.loads(line) for line in (folder / f"{row['task']}.jsonl").read_text().splitlines()]
        right = [line["prediction"] in line["references"] for line in lines]
        assert sum(right) / len(right) == row["score"]
        assert json.loads((folder / f"{row['task']}.json").read_text())["settings"]["max_new_tokens"] == 2


@pytest.mark.parametrize("name", ["naive", "stack"])
def test_adapters_load_in_plain_peft(finished, name):
    run, queue = finished(name), make_queue(finished(name), name)
    for index in range(2):
        ours = queue.model.after(index).eval()(IDS).logits
        plain = PeftModel.from_pretrained(tiny_model("llama"), str(run / "tasks" / f"0{index}-toy{index}" / "adapter"))
        theirs = plain.eval()(IDS).logits
        base = tiny_model("llama").eval()(IDS).logits
        scale = float(ours.detach().abs().max())
        assert float((ours - base).abs().max()) > 1e-3 * scale
        if name == "naive":
            assert torch.equal(ours, theirs)
        else:
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * scale)


def test_full_model_loads_in_plain_transformers(finished):
    run, queue = finished("full"), make_queue(finished("full"), "full")
    for index in range(2):
        plain = AutoModelForCausalLM.from_pretrained(str(run / "tasks" / f"0{index}-toy{index}" / "model"))
        assert torch.equal(queue.model.after(index).eval()(IDS).logits, plain.eval()(IDS).logits)
        assert not torch.equal(plain(IDS).logits, tiny_model("llama")(IDS).logits)


def test_finished_run_says_so_and_trains_nothing(finished, capsys, monkeypatch):
    run = finished("naive")
    before = {p: p.stat().st_mtime_ns for p in run.glob("tasks/**/*")}
    monkeypatch.setattr(TaskQueue, "_learn", lambda *a: pytest.fail("trained again"))
    monkeypatch.setattr(RunModel, "fresh", lambda *a, **k: pytest.fail("loaded a model"))
    result = make_queue(run).run()
    assert "finished, 2 task(s) learnt; nothing to do" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in run.glob("tasks/**/*")} == before
    assert result.tasks == ["toy0", "toy1"] and result.R.shape == (2, 2) and "forgetting" in result.metrics


@pytest.mark.parametrize("name", KINDS)
def test_a_fresh_object_for_every_task(finished, tmp_path, name):
    """The second task is also one that was added: it equals the stream that had it from the start."""
    for tasks in (1, 2):
        make_queue(tmp_path / "run", name, tasks=tasks).run()
    assert_same(tmp_path / "run", finished(name))


def test_comparison_can_fail(finished, tmp_path):
    make_queue(tmp_path / "run", "stack", learning_rate=0.0501).run()
    with pytest.raises(AssertionError, match="differs"):
        assert_same(tmp_path / "run", finished("stack"))


# -- killed ----------------------------------------------------------------------------------------------------------

OFTEN_ENOUGH = {
    "naive": ["in a step", "in a commit"],
    "full": ["in a checkpoint, before its optimizer", "in a commit", "in the evaluation"],
    "t5": ["in a step"],
}


@pytest.mark.parametrize(
    ("name", "point"),
    [("stack", p) for p in POINTS] + [(name, p) for name, points in OFTEN_ENOUGH.items() for p in points],
)
def test_killed_and_continued(finished, tmp_path, name, point):
    run = tmp_path / "run"
    run_until_killed(run, name, point)
    reference = snapshot(finished(name))
    assert snapshot(run).keys() != reference.keys() or "queue.json" in point or "clean-up" in point
    make_queue(run, name).run()
    assert_same(run, reference)
    assert json.loads((run / "queue.json").read_text())["finished"] is True


def test_killed_again_and_again(finished, tmp_path):
    run = tmp_path / "run"
    for point in ("in a step", "in a checkpoint, in its last file", "in a commit", "in the evaluation"):
        run_until_killed(run, "stack", point)
    make_queue(run, "stack").run()
    assert_same(run, finished("stack"))


def test_damaged_checkpoint_is_not_resumed_from(finished, tmp_path):
    run = tmp_path / "run"
    run_until_killed(run, "naive", "in a step")
    file = run / "work" / "01-toy1" / "checkpoint-2" / "optimizer.pt"
    file.write_bytes(file.read_bytes()[:100])
    make_queue(run).run()
    assert_same(run, finished("naive"))


# -- interrupted -----------------------------------------------------------------------------------------------------


class InterruptAt(TrainerCallback):
    def __init__(self, task, step):
        self.task, self.step = task, step

    def on_step_begin(self, args, state, control, **kwargs):
        if self.task in args.output_dir and state.global_step == self.step - 1:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(("step", "saving"), [(3, "steps"), (4, "steps"), (1, "no")])
def test_sigint_saves_and_continues(finished, tmp_path, step, saving):
    run, before = tmp_path / "run", signal.getsignal(signal.SIGINT)
    queue = make_queue(run, "stack", save_strategy=saving, callbacks=[InterruptAt("01-toy1", step)])
    with pytest.raises(Interrupted, match=f"'toy1' at step {step}"):
        queue.run()
    assert signal.getsignal(signal.SIGINT) is before
    assert (run / "work" / "01-toy1" / f"checkpoint-{step}" / "trainer_state.json").exists()
    assert not (run / "tasks" / "01-toy1").exists()
    queue._trainer_kwargs = {}
    queue.run()  # the same object, which still held the half-trained model
    assert_same(run, finished("stack"))


def test_sigint_while_scoring(finished, tmp_path, monkeypatch):
    run = tmp_path / "run"
    original = RunDirectory.write_cell

    def interrupted(self, after, task, cell):
        if after.index == 1:
            os.kill(os.getpid(), signal.SIGINT)
        original(self, after, task, cell)

    monkeypatch.setattr(RunDirectory, "write_cell", interrupted)
    with pytest.raises(Interrupted):
        make_queue(run, "stack").run()
    monkeypatch.undo()
    make_queue(run, "stack").run()
    assert_same(run, finished("stack"))


# -- growing ---------------------------------------------------------------------------------------------------------


def test_task_added_to_a_finished_run(tmp_path):
    options = {"evaluation": {"unseen": True, "base_model": True}}
    whole = make_queue(tmp_path / "whole", "stack", tasks=3, options=options)
    result = whole.run()
    assert "forward_transfer" in result.metrics
    queue = make_queue(tmp_path / "grown", "stack", tasks=2, options=options)
    queue.run()
    queue.add(toy_stream(3, rows=8, eval_rows=4)[2])
    assert json.loads((tmp_path / "grown" / "queue.json").read_text())["finished"] is False
    grown = queue.run()
    assert_same(tmp_path / "grown", tmp_path / "whole")
    assert len(snapshot(tmp_path / "grown")["scores.jsonl"].splitlines()) == 3 + 9
    assert grown.metrics == result.metrics


def test_refused_task_changes_nothing(tmp_path):
    queue = make_queue(tmp_path / "run", tasks=1)
    queue.run()
    before = (tmp_path / "run" / "queue.json").read_text()
    second = toy_stream(2, rows=8)[1]
    for name, change, said in (
        ("toy0", {}, "two tasks are named 'toy0'"),
        ("other", {"eval_dataset": None}, "no evaluation rows"),
        ("other", {"scorer": "label_likelihood", "labels": None}, "needs its labels"),
        ("other", {"training": {"learning_rat": 1}}, "did you mean 'learning_rate'"),
        ("other", {"training": {"learning_rate": "high"}}, "must be of type float"),
    ):
        task = type(second)(
            name, **{**{"train_dataset": second.train_dataset, "eval_dataset": second.eval_dataset}, **change}
        )
        with pytest.raises(InputError, match=said):
            queue.add(task)
    assert (tmp_path / "run" / "queue.json").read_text() == before and len(queue.stream) == 1


def test_one_process_at_a_time(finished, tmp_path):
    with RunDirectory(finished("naive")).locked(), pytest.raises(InputError, match="in use by another process"):
        make_queue(finished("naive")).run()
    make_queue(finished("naive")).run()


def test_plain_training_arguments_and_joint(tmp_path):
    from transformers import TrainingArguments

    options = toy_queue_options(lora=True)
    options["args"] = TrainingArguments(output_dir=str(tmp_path / "x"), max_steps=1, use_cpu=True, report_to="none",
                                        disable_tqdm=True, dataloader_pin_memory=False)  # fmt: skip
    result = TaskQueue(tmp_path / "run", tasks=toy_stream(2, rows=4, eval_rows=2), joint=True, **options).run()
    assert result.R.shape == (1, 2) and (tmp_path / "run" / "tasks" / "00-joint" / "adapter").is_dir()


def test_another_adapter_shape_is_another_run(tmp_path, finished):
    queue = make_queue(finished("naive"))
    queue._peft_config.r = 2
    with pytest.raises(InputError, match=r"peft\.r is 4 there and 2 here"):
        queue.run()


def test_model_without_linear_layers(tmp_path):
    model = tiny_model("llama")
    for module in list(model.modules()):
        for child, layer in list(module.named_children()):
            if isinstance(layer, torch.nn.Linear):
                setattr(module, child, torch.nn.Identity())
    options = toy_queue_options(lora=False)
    options["model"] = model
    with pytest.raises(InputError, match="migu"):
        TaskQueue(tmp_path / "run", tasks=toy_stream(1), methods=["migu"], **options).run()
    assert not (tmp_path / "run" / "queue.json").exists()
