import dataclasses
import json
import math
import os
import shutil

import numpy as np
import pytest
import torch
import yaml
from toy_runs import KINDS, assert_same, make_queue, save_model, snapshot, write_recipe, write_rows

from hf_continual import InputError, TaskQueue, gate, metrics, queue_evaluation, recipes, run_state, task_queue
from hf_continual.cli import main
from hf_continual.errors import ForgettingLimit, Interrupted
from hf_continual.gate import GateConfig, gate_section, judge, loss_of, make_gate
from hf_continual.methods.ewc import EWC
from hf_continual.run_scores import load_run
from hf_continual.run_state import RunDirectory
from hf_continual.testing import toy_queue_options, toy_stream
from hf_continual.trainer import ContinualMixin

LEVEL = os.environ.get("HF_CONTINUAL_DISTRIBUTED", "")
"""Of `make test-distributed`: each start of a launcher takes long."""


class Killed(BaseException):
    pass


# -- the verdict -----------------------------------------------------------------------------------------------------


def cells(R, metric="exact_match"):
    return [
        {"after_index": i, "after_task": f"t{i}", "task_index": j, "task": f"t{j}", "score": score, "metric": metric}
        for i, row in enumerate(R) for j, score in enumerate(row) if score is not None
    ]  # fmt: skip


R = [[0.9, None, None, None], [0.5, 0.8, None, None], [0.7, 0.85, 0.6, None], [0.6, 0.8, 0.65, 0.9]]


def test_losses_are_those_of_the_metric():
    for index in (1, 2, 3):
        verdict = judge(cells(R), index, GateConfig(0.1))
        square = np.array([[math.nan if v is None else v for v in row[: index + 1]] for row in R[: index + 1]])
        assert verdict.mean == pytest.approx(metrics.forgetting(square))
    assert verdict.losses == pytest.approx({"t0": 0.3, "t1": 0.05, "t2": -0.05})
    assert verdict.worst == "t0" and verdict.max == pytest.approx(0.3) and verdict.mean == pytest.approx(0.1)


def test_the_largest_loss_is_compared_or_the_mean():
    assert judge(cells(R), 3, GateConfig(0.2)).violated and not judge(cells(R), 3, GateConfig(0.3)).violated
    assert not judge(cells(R), 3, GateConfig(0.1, measure="mean")).violated
    assert judge(cells(R), 3, GateConfig(0.09, measure="mean")).violated
    assert not judge(cells([[0.9, None], [0.85, 0.5]]), 1, GateConfig(0.05)).violated, "0.9 - 0.85 > 0.05 by rounding"
    assert not judge(cells(R), 0, GateConfig(0.0)).violated


def test_both_numbers_and_the_limit_are_said():
    verdict = judge(cells(R), 3, GateConfig(0.05))
    assert verdict.line == ("gate after t3: t0 lost 30.0, 10.0 on average of 3; limit 5.0 for the worst: exceeded")
    assert (
        "task 't0' lost 30.0 points of exact_match (90.0 -> 60.0), more than gate.max_forgetting=0.05"
        in verdict.sentence
    )
    verdict = judge(cells(R), 3, GateConfig(0.05, measure="mean"))
    assert "for the mean: exceeded" in verdict.line and "the mean loss is 10.0" in verdict.sentence


def test_a_perplexity_that_rises_is_forgotten():
    rows = cells([[10.0, None, None], [8.0, 20.0, None], [10.0, 18.0, 5.0]], "perplexity")
    verdict = judge(rows, 2, GateConfig(0.2))
    assert verdict.losses == pytest.approx({"t0": 0.25, "t1": -0.1}) and verdict.violated
    assert "the perplexity of task 't0' rose by 25.0 %" in verdict.sentence
    assert not judge(rows, 2, GateConfig(0.25)).violated
    assert loss_of([0.0], 0.0, higher=False) == 0 and loss_of([0.0], 0.1, higher=False) == math.inf


def test_a_score_that_is_no_number_is_lost():
    for value in (math.nan, math.inf):
        assert judge(cells([[0.5, None], [value, 0.5]]), 1, GateConfig(1.0)).violated


def test_a_missing_score_is_no_verdict():
    with pytest.raises(InputError, match="score of task 0 after task 1"):
        judge(cells([[0.5, None, None], [None, 0.5, None], [0.5, 0.5, 0.5]]), 2, GateConfig(0.1))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_forgetting": 5}, "max_forgetting=5 must be a number from 0 to 1"),
        ({"max_forgetting": -0.1}, "from 0 to 1"),
        ({"max_forgetting": "a"}, "from 0 to 1"),
        ({"max_forgetting": True}, "from 0 to 1"),
        ({"max_forgetting": math.nan}, "from 0 to 1"),
        ({"max_forgeting": 0.1}, "unknown key 'gate.max_forgeting'; did you mean 'max_forgetting'"),
        ({"on_violation": "stop"}, "gate.max_forgetting is missing"),
        ({"max_forgetting": 0.1, "on_violation": "undo"}, "on_violation='undo' is unknown; choose stop, rollback"),
        ({"max_forgetting": 0.1, "measure": "sum"}, "measure='sum' is unknown; choose max, mean"),
        ({"max_forgetting": 0.1, "rehearsal_rounds": 2}, "rehearsal_rounds=2 is for on_violation='rehearse'"),
        ({"max_forgetting": 0.1, "on_violation": "rehearse", "rehearsal_rounds": 0}, "rehearsal_rounds=0 must be"),
        ({"max_forgetting": 0.1, "on_violation": "rehearse", "rehearsal_ratio": 0}, r"rehearsal_ratio=0 must lie in"),
        ({"max_forgetting": 0.1, "on_violation": "rehearse", "rehearsal_epochs": 0}, "rehearsal_epochs=0 must be"),
        ({"max_forgetting": 0.1, "on_violation": "rehearse", "rehearsal_epochs": None}, "rehearsal_epochs=None must"),
        ({"max_forgetting": 0.1, "on_violation": "rehearse", "rehearsal_learning_rate": -1}, "rehearsal_learning_rate"),
        ({"max_forgetting": 0.1, "on_violation": "rehearse", "rehearsal_source": "web"}, "rehearsal_source='web'"),
        (0.05, "gate=0.05 must map options to values"),
    ],
)
def test_options_that_cannot_be(options, words):
    with pytest.raises(InputError, match=words.replace("(", r"\(")):
        make_gate(options)


# -- queues, with scores as a test wants them ------------------------------------------------------------------------

BAD = {("toy0", "toy0"): 0.75, ("toy1", "toy0"): 0.25, ("toy2", "toy0"): 0.75}
"""Task 1 costs task 0 50 points; all else scores 50."""


@pytest.fixture
def scores(monkeypatch):
    """Scores by (after task, task): a number, or a list of which each scoring takes the next and the last stays."""
    table, original = {}, queue_evaluation.evaluate_task

    def scripted(model, tokenizer, task, config, *, description="", **kwargs):
        cell = original(model, tokenizer, task, config, description=description, **kwargs)
        after = description.removeprefix("after ").split(":")[0]
        value = table.get((after, task.name), 0.5)
        if isinstance(value, list):
            value = value.pop(0) if len(value) > 1 else value[0]
        cell.score = value
        return cell

    monkeypatch.setattr(queue_evaluation, "evaluate_task", scripted)
    return table


def queue_with(folder, kind="naive", names=("toy0", "toy1", "toy2"), evaluation=None, stream=None, **options):
    chosen = dict(KINDS[kind])
    lora = chosen.pop("lora", True)
    made = toy_queue_options(chosen.pop("kind", "llama"), lora=lora, learning_rate=5e-2)
    made["evaluation"] |= {"max_new_tokens": 2, **(evaluation or {})}
    tasks = [task for task in toy_stream(3, rows=8, eval_rows=4) if task.name in names]
    return TaskQueue(folder, tasks=tasks, **{**chosen, **options}, **made)


def queue_file(run):
    return json.loads((run / "queue.json").read_text())


def learns_nothing(monkeypatch):
    monkeypatch.setattr(TaskQueue, "_learn", lambda *a: pytest.fail("trained"))
    monkeypatch.setattr(gate.ForgettingGate, "_rehearse", lambda *a: pytest.fail("rehearsed"))


def test_stop(scores, tmp_path, monkeypatch, capsys):
    scores |= BAD
    with pytest.raises(ForgettingLimit, match="'toy0' lost 50.0 points of exact_match .75.0 -> 25.0.") as stopped:
        queue_with(tmp_path / "run", gate={"max_forgetting": 0.05}).run()
    for way_out in ("max_forgetting=0.05", "--max_forgetting", "--on_violation rollback", "everything learnt is kept"):
        assert way_out in str(stopped.value)
    queue = queue_file(tmp_path / "run")
    assert queue["cursor"] == 2 and not queue["finished"] and queue["gate"]["max_forgetting"] == 0.05
    assert (tmp_path / "run" / "tasks" / "01-toy1" / "predictions" / "toy0.json").is_file()
    before = snapshot(tmp_path / "run")
    with monkeypatch.context() as patch:
        learns_nothing(patch)
        with pytest.raises(ForgettingLimit) as again:
            queue_with(tmp_path / "run", gate={"max_forgetting": 0.05}).run()
    assert str(again.value) == str(stopped.value) and snapshot(tmp_path / "run").keys() == before.keys()
    capsys.readouterr()
    result = queue_with(tmp_path / "run", gate={"max_forgetting": 0.5}).run()  # the way out
    assert result.R.shape == (3, 3) and "== task 3/3" in capsys.readouterr().out
    queue_with(tmp_path / "ungated").run()
    assert_same(tmp_path / "run", tmp_path / "ungated")
    assert not any(key in queue_file(tmp_path / "ungated") for key in ("gate", "rejected", "rehearsals"))


def test_a_run_that_keeps_the_limit_is_the_run_without_a_gate(scores, tmp_path, capsys):
    queue_with(tmp_path / "run", gate=GateConfig(0.1)).run()
    assert (
        "gate after toy1: toy0 lost 0.0, 0.0 on average of 1; limit 10.0 for the worst: kept" in capsys.readouterr().out
    )
    queue_with(tmp_path / "ungated").run()
    assert_same(tmp_path / "run", tmp_path / "ungated")


def test_a_gate_over_a_finished_run(scores, tmp_path, monkeypatch):
    scores |= {("toy0", "toy0"): 0.9}
    queue_with(tmp_path / "run").run()
    learns_nothing(monkeypatch)
    with pytest.raises(ForgettingLimit, match="after task 'toy2' task 'toy0' lost 40.0"):
        queue_with(tmp_path / "run", gate={"max_forgetting": 0.3}).run()
    assert queue_with(tmp_path / "run", gate={"max_forgetting": 0.4}).run().rejected == []


# -- rollback --------------------------------------------------------------------------------------------------------

ROLLBACK = {"max_forgetting": 0.05, "on_violation": "rollback"}


def assert_never_learnt(run, reference, rejected=("toy1",)):
    """Bit for bit, and queue.json but for what it says of the rejected (the recipe lists all tasks)."""
    assert_same(run, reference)
    ours, theirs = queue_file(run), queue_file(reference)
    assert [entry["name"] for entry in ours.pop("rejected")] == list(rejected)
    for queue in (ours, theirs):
        queue.pop("recipe_sha256")
        queue.pop("git")  # a checkout may get a commit between two runs
    assert ours == theirs
    ours, theirs = (sorted(str(p.relative_to(r)) for r in [root] for p in root.rglob("*")) for root in (run, reference))
    assert [path for path in ours if not path.startswith("rejected")] == theirs
    assert all((run / "rejected" / folder.name / "manifest.json").is_file() for folder in (run / "rejected").iterdir())


@pytest.fixture(scope="module")
def never(tmp_path_factory):
    """Runs over tasks 0 and 2 alone, by kind."""
    made = {}

    def get(kind, names=("toy0", "toy2"), evaluation=None):
        key = kind, names, bool(evaluation)
        if key not in made:
            folder = tmp_path_factory.mktemp("never") / "run"
            queue_with(folder, kind, names, evaluation, gate=ROLLBACK).run()
            made[key] = folder
        return made[key]

    return get


@pytest.mark.parametrize("kind", ["naive", "stack", "seekr", "kif", "full"])
def test_rolled_back_is_as_if_never_learnt(scores, never, tmp_path, kind, capsys, monkeypatch):
    scores |= BAD
    result = queue_with(tmp_path / "run", kind, gate=ROLLBACK).run()
    out = capsys.readouterr().out
    assert "rolled back: task 'toy1' is rejected" in out and "== task 2/2: toy2" in out
    assert result.tasks == ["toy0", "toy2"] and [entry["name"] for entry in result.rejected] == ["toy1"]
    assert result.rejected[0]["losses"] == {"toy0": 0.5} and result.rejected[0]["limit"] == 0.05
    assert_never_learnt(tmp_path / "run", never(kind))
    kept = tmp_path / "run" / "rejected" / "01-toy1"
    assert (kept / "predictions" / "toy0.jsonl").is_file() and (kept / "model.json").is_file()
    learns_nothing(monkeypatch)
    again = queue_with(tmp_path / "run", kind, gate=ROLLBACK).run()
    assert [entry["name"] for entry in again.rejected] == ["toy1"]
    assert "task 'toy1' was rejected by the gate and is left out" in capsys.readouterr().out


def test_the_comparison_can_fail(scores, never, tmp_path):
    scores |= {("toy1", "toy0"): 0.5}
    queue_with(tmp_path / "run", gate=ROLLBACK).run()
    with pytest.raises((AssertionError, KeyError)):
        assert_never_learnt(tmp_path / "run", never("naive"))


def test_scores_of_tasks_not_learnt_yet_move_up(scores, never, tmp_path):
    evaluation = {"unseen": True, "base_model": True}
    scores |= BAD
    queue_with(tmp_path / "run", "stack", evaluation=evaluation, gate=ROLLBACK).run()
    assert_never_learnt(tmp_path / "run", never("stack", evaluation=evaluation))
    kept = tmp_path / "run" / "rejected" / "01-toy1" / "scored_before"
    assert sorted(str(p.relative_to(kept)) for p in kept.rglob("*.json")) == ["00-toy0/toy1.json", "base/toy1.json"]


@pytest.mark.parametrize(
    ("bad", "names", "rejected"),
    [
        ({("toy2", "toy1"): 0.1}, ("toy0", "toy1"), ["toy2"]),
        ({("toy1", "toy0"): 0.1, ("toy2", "toy0"): 0.1}, ("toy0",), ["toy1", "toy2"]),
    ],
)
def test_the_last_task_and_several(scores, never, tmp_path, bad, names, rejected):
    reference = never("stack", names)
    scores |= bad
    result = queue_with(tmp_path / "run", "stack", gate=ROLLBACK).run()
    assert result.tasks == list(names)
    assert_never_learnt(tmp_path / "run", reference, rejected)
    assert queue_file(tmp_path / "run")["finished"]


def test_rolled_back_after_it_was_stopped(scores, never, tmp_path):
    scores |= BAD
    with pytest.raises(ForgettingLimit):
        queue_with(tmp_path / "run", "stack", gate={"max_forgetting": 0.05}).run()
    queue_with(tmp_path / "run", "stack", gate=ROLLBACK).run()
    assert_never_learnt(tmp_path / "run", never("stack"))


def kill_at(patch, owner, name, when=lambda *a, **k: True, after=False):
    original = getattr(owner, name)

    def replaced(*args, **kwargs):
        hit = when(*args, **kwargs)
        if hit and not after:
            raise Killed
        result = original(*args, **kwargs)
        if hit:
            raise Killed
        return result

    patch.setattr(owner, name, replaced)


def _rejecting(self, queue):
    return bool(queue.get("rejected"))


def _to_rejected(source, target):
    return "rejected" in str(target)


def _moves_up(path, value):
    return value.get("task") == "toy2" and value.get("task_index") == 1 and value.get("after_task") == "toy0"


ROLLBACK_POINTS = {
    "before queue.json": (RunDirectory, "write_queue", _rejecting, False),
    "after queue.json": (RunDirectory, "write_queue", _rejecting, True),
    "before the first score moves up": (run_state, "write_json", _moves_up, False),
    "after it": (run_state, "write_json", _moves_up, True),
    "before scores.jsonl": (RunDirectory, "write_scores", lambda self, rows: (self.tasks / "01-toy1").is_dir()
                            and not any(row["task"] == "toy1" for row in rows) and len(rows) > 2, False),
    "before the task is moved": (run_state.os, "replace", _to_rejected, False),
    "after the task was moved": (run_state.os, "replace", _to_rejected, True),
}  # fmt: skip


@pytest.mark.parametrize("point", ROLLBACK_POINTS)
def test_killed_in_a_rollback(scores, never, tmp_path, point):
    evaluation = {"unseen": True, "base_model": True}
    scores |= BAD
    reference = never("stack", evaluation=evaluation)
    run = tmp_path / "run"
    owner, name, when, after = ROLLBACK_POINTS[point]
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, owner, name, when, after)
        with pytest.raises(Killed):
            queue_with(run, "stack", evaluation=evaluation, gate=ROLLBACK).run()
    assert "toy2" not in {p.name[3:] for p in (run / "tasks").iterdir()}
    queue_with(run, "stack", evaluation=evaluation, gate=ROLLBACK).run()
    assert_never_learnt(run, reference)


def test_a_rejected_task_stays_out(scores, never, tmp_path, monkeypatch):
    scores |= BAD
    run = tmp_path / "run"
    queue_with(run, gate=ROLLBACK).run()
    queue = queue_with(run)  # no gate any more
    bad = toy_stream(2, rows=8, eval_rows=4)[1]
    with pytest.raises(InputError, match="task 'toy1' was rejected by the forgetting gate; add it under another name"):
        queue.add(bad)
    queue.add(dataclasses.replace(bad, name="again"))
    assert queue.run().tasks == ["toy0", "toy2", "again"]
    assert [entry["name"] for entry in queue_file(run)["rejected"]] == ["toy1"]
    queue_with(run).check()
    queue_file_now = queue_file(run) | {"rejected": ["toy1"]}
    (run / "queue.json").write_text(json.dumps(queue_file_now))
    with pytest.raises(InputError, match="its rejected tasks are no list; restore it"):
        queue_with(run).run()


# -- rehearsal -------------------------------------------------------------------------------------------------------

REHEARSE = {"max_forgetting": 0.05, "on_violation": "rehearse", "rehearsal_ratio": 0.5, "rehearsal_rounds": 2}
MENDED = {("toy0", "toy0"): 0.75, ("toy1", "toy0"): [0.25, 0.5, 0.75], ("toy2", "toy0"): 0.75}
HOPELESS = {("toy0", "toy0"): 0.75, ("toy1", "toy0"): 0.25}


def fresh(table):
    return {key: list(value) if isinstance(value, list) else value for key, value in table.items()}


def weights_of(folder):
    from safetensors.torch import load_file

    return load_file(str(folder / "adapter" / "adapter_model.safetensors"))


@pytest.mark.parametrize("kind", ["stack", "seekr"])
def test_rehearsed_until_it_is_good(scores, tmp_path, kind, capsys):
    scores |= fresh(MENDED)
    run = tmp_path / "run"
    result = queue_with(run, kind, gate=REHEARSE).run()
    out = capsys.readouterr().out
    assert "rehearsal 1 of 2: 8 rows of 2 tasks" in out and "rehearsal 2 of 2" in out and "rehearsal 3" not in out
    assert result.R[1, 0] == 0.75 and result.rejected == [] and queue_file(run)["rehearsals"] == {"toy1": 2}
    task, first, second = run / "tasks/01-toy1", run / "rehearsal/01-toy1/before-1", run / "rehearsal/01-toy1/before-2"
    changed = [weights_of(folder) for folder in (first, second, task)]
    for a, b in ((0, 1), (1, 2)):
        assert any(not torch.equal(changed[a][key], changed[b][key]) for key in changed[a])
    for path in sorted((first / "methods").rglob("*")):
        if path.is_file():  # a rehearsal is of the weights alone
            assert path.read_bytes() == (task / "methods" / path.relative_to(first / "methods")).read_bytes()
    assert json.loads((first / "predictions" / "toy0.json").read_text())["score"] == 0.25
    phases = [entry.get("phase") for entry in json.loads((task / "log.json").read_text())]
    assert phases[0] is None and {"rehearsal/1", "rehearsal/2"} <= set(phases)
    queue_with(tmp_path / "plain", kind, ("toy0", "toy1")).run()
    assert_same_weights(first, tmp_path / "plain" / "tasks/01-toy1")
    assert not (run / "work").exists()


def test_ewc_holds_to_the_rehearsed_weights(scores, tmp_path):
    """The next task's penalty would else pull the weights back to where the gate found them wanting."""
    scores |= fresh(MENDED)
    run = tmp_path / "run"
    queue_with(run, names=("toy0", "toy1"), methods=["ewc", "replay"], gate=REHEARSE).run()
    task, first = run / "tasks/01-toy1", run / "rehearsal/01-toy1/before-1"
    states = {}
    for folder in (task, first):
        states[folder] = EWC()
        states[folder].load(folder / "methods")
        weights = {key.removeprefix("base_model.model."): value for key, value in weights_of(folder).items()}
        own = {name: weights[name.removeprefix("base_model.model.").replace(".default", "")]
               for name in states[folder].centre_}  # fmt: skip
        assert own and (folder != task or all(torch.equal(own[n], c) for n, c in states[task].centre_.items()))
    assert set(states[task].constant_.values()) == {0.0} != set(states[first].constant_.values())
    assert all(torch.equal(f, states[first].precision_[n]) for n, f in states[task].precision_.items())
    kept = [sorted(p.name for p in (folder / "methods").iterdir()) for folder in (task, first)]
    assert kept[0] == kept[1] and any("replay" in name for name in kept[0])


def assert_same_weights(a, b):
    a, b = weights_of(a), weights_of(b)
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_stops_where_rehearsal_does_not_help(scores, tmp_path, monkeypatch):
    scores |= HOPELESS
    run = tmp_path / "run"
    with pytest.raises(ForgettingLimit, match=r"stopped after 2 round\(s\) of rehearsal: .*more gate.rehearsal_rounds"):
        queue_with(run, gate=REHEARSE).run()
    assert queue_file(run)["cursor"] == 2 and not (run / "tasks" / "02-toy2").exists()
    with monkeypatch.context() as patch:
        learns_nothing(patch)
        with pytest.raises(ForgettingLimit, match="after 2 round"):
            queue_with(run, gate=REHEARSE).run()
    scores |= {("toy1", "toy0"): 0.75, ("toy2", "toy0"): 0.75}  # a third round helps
    queue_with(run, gate={**REHEARSE, "rehearsal_rounds": 3}).run()
    assert queue_file(run)["rehearsals"] == {"toy1": 3} and queue_file(run)["finished"]


def test_rehearsed_and_then_rolled_back(scores, never, tmp_path):
    scores |= HOPELESS
    run = tmp_path / "run"
    with pytest.raises(ForgettingLimit):
        queue_with(run, "stack", gate=REHEARSE).run()
    scores[("toy2", "toy0")] = 0.75
    queue_with(run, "stack", gate=ROLLBACK).run()
    assert_never_learnt(run, never("stack"))
    assert (run / "rejected/01-toy1/rehearsal/before-1/model.json").is_file()


def test_rehearsal_takes_the_rows_and_the_rate_it_is_told(scores, tmp_path, monkeypatch):
    scores |= fresh({**MENDED, ("toy1", "toy0"): [0.25, 0.75]})
    seen = []
    make = TaskQueue._make_trainer

    def spy(self, model, args, rows, methods, task):
        seen.append((len(rows), args.learning_rate, args.num_train_epochs, args.save_strategy, len(methods)))
        return make(self, model, args, rows, methods, task)

    monkeypatch.setattr(TaskQueue, "_make_trainer", spy)
    options = {"rehearsal_ratio": 0.25, "rehearsal_epochs": 3, "rehearsal_learning_rate": 0.001}
    queue_with(tmp_path / "run", gate={**REHEARSE, **options}).run()
    assert [tuple(entry) for entry in seen if entry[0] != 8] == [(4, 0.001, 3, "no", 0)]


def test_rehearsal_on_the_buffer_of_a_method(scores, tmp_path, capsys):
    scores |= fresh({**MENDED, ("toy1", "toy0"): [0.25, 0.75]})
    for kind, rows in (("stack", 4), ("kif", 12)):  # 30 % of 8, of each task; 6 of each
        scores[("toy1", "toy0")] = [0.25, 0.75]
        queue_with(tmp_path / kind, kind, gate={**REHEARSE, "rehearsal_source": "buffer"}).run()
        assert f"rehearsal 1 of 2: {rows} rows of 2 tasks" in capsys.readouterr().out
    with pytest.raises(InputError, match="rehearsal_source='buffer' needs a method that keeps rows"):
        queue_with(tmp_path / "run", gate={**REHEARSE, "rehearsal_source": "buffer"})


def _in_rehearsal_step(self, *args, **kwargs):
    return not self.methods and self.state.global_step == 1


def _saves_rehearsal(self, model, folder):
    return (folder.parents[1] / "tasks" / "01-toy1").is_dir()


def _is_ready(self, task):
    return list(self.rehearsal_folder(task).glob("after-*"))


def _scores_rehearsal(self, after, task, cell):
    return task.index == 1 and self.rehearsals(after)


REHEARSAL_POINTS = {
    "in a step": (ContinualMixin, "training_step", _in_rehearsal_step, False),
    "in its commit": (task_queue.RunModel, "save", _saves_rehearsal, True),
    "before it takes the place": (RunDirectory, "take_rehearsed", _is_ready, False),
    "between the two moves": (run_state.os, "replace", lambda a, b: "before-" in str(b), True),
    "after both": (run_state.os, "replace", lambda a, b: "after-" in str(a), True),
    "in the new scores": (RunDirectory, "write_cell", _scores_rehearsal, False),
}


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    return tmp_path_factory.mktemp("rehearsed") / "run"


@pytest.mark.parametrize("stopped", [False, True])
@pytest.mark.parametrize("point", REHEARSAL_POINTS)
def test_killed_in_a_rehearsal(scores, rehearsed, tmp_path, point, stopped):
    if not rehearsed.exists():
        scores |= fresh({**MENDED, ("toy1", "toy0"): [0.25, 0.75]})
        queue_with(rehearsed, "stack", gate=REHEARSE).run()
    run = tmp_path / "run"
    scores |= fresh({**MENDED, ("toy1", "toy0"): 0.25})
    if stopped:  # its scores stand in scores.jsonl already
        with pytest.raises(ForgettingLimit):
            queue_with(run, "stack", gate={"max_forgetting": 0.05}).run()
    owner, name, when, after = REHEARSAL_POINTS[point]
    original = RunDirectory.take_rehearsed
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, owner, name, when, after)

        def mended(self, task):  # after the swap, task 0 is good again
            original(self, task)
            if self.rehearsals(task):
                scores[("toy1", "toy0")] = 0.75

        if name != "take_rehearsed":
            patch.setattr(RunDirectory, "take_rehearsed", mended)
        with pytest.raises(Killed):
            queue_with(run, "stack", gate=REHEARSE).run()
        patch.undo()
        patch.setattr(RunDirectory, "take_rehearsed", mended)
        queue_with(run, "stack", gate=REHEARSE).run()
    assert_same(run, rehearsed)
    assert queue_file(run)["rehearsals"] == {"toy1": 1}


def test_interrupted_in_a_rehearsal(scores, tmp_path, monkeypatch):
    scores |= fresh({**MENDED, ("toy1", "toy0"): [0.25, 0.75]})
    step = ContinualMixin.training_step

    def stops(self, *args, **kwargs):
        loss = step(self, *args, **kwargs)
        if len(self.train_dataset) == 8 and self.args.save_strategy == "no":
            queue._stop.stop = True
        return loss

    queue = queue_with(tmp_path / "run", gate=REHEARSE)
    with monkeypatch.context() as patch:
        patch.setattr(ContinualMixin, "training_step", stops)
        with pytest.raises(Interrupted, match="stopped in rehearsal 1 after task 'toy1'"):
            queue.run()
    queue_with(tmp_path / "run", gate=REHEARSE).run()
    assert queue_file(tmp_path / "run")["rehearsals"] == {"toy1": 1} and not (tmp_path / "run" / "work").exists()


# -- what has no gate ------------------------------------------------------------------------------------------------


def test_a_joint_run_forgets_nothing(tmp_path):
    with pytest.raises(InputError, match="with joint=True no task comes after another"):
        queue_with(tmp_path / "run", joint=True, gate={"max_forgetting": 0.1})


# -- on the command line, with real scores ---------------------------------------------------------------------------

LEARNING = {
    "per_device_train_batch_size": 4, "num_train_epochs": 15, "learning_rate": 0.01, "use_cpu": True,
    "disable_tqdm": True, "logging_strategy": "no", "save_strategy": "no",
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def forgetful(folder, model, **sections):
    """Three tasks of which each, learnt alone, wipes out those before."""
    tasks = [{"name": name, "path": f"data/{name}.jsonl", "eval_fraction": 0.25} for name in "abc"]
    given = {"methods": [], "peft": None, "training": LEARNING, "tasks": tasks, **sections}
    path = write_recipe(folder, model, **given)
    for index, name in enumerate("abc"):
        write_rows(folder / "data" / f"{name}.jsonl", index, rows=24)
    return path


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, model):
    """The recipe of a run that its gate has stopped."""
    path = forgetful(tmp_path_factory.mktemp("stopped"), model)
    assert main(["run", str(path), "--max_forgetting", "0.05"]) == 3
    return path


def copy_of(path, folder):
    shutil.copytree(path.parent, folder)
    (folder / "recipe.yaml").write_text(path.read_text().replace(str(path.parent), str(folder)))
    return folder / "recipe.yaml"


def test_the_command_stops_with_3_and_says_so_again(stopped, capsys, monkeypatch):
    run = stopped.parent / "run"
    learns_nothing(monkeypatch)
    sentences = []
    for words in ([str(stopped), "--max_forgetting", "0.05"], [str(run)]):  # queue.json knows the gate
        assert main(["run", *words]) == 3
        captured = capsys.readouterr()
        sentences.append(captured.err.splitlines()[-1])
        assert "Forgetting gate of run, seed 42: max at most 5.0, then stop" in captured.out
        assert "exceeded, stopped here" in captured.out
    assert sentences[0] == sentences[1] and sentences[0].startswith(f"forgotten: run directory {run} stopped: after")
    text = (run / "report.md").read_text()
    assert "## Forgetting gate" in text and "exceeded, stopped here" in text


def test_the_command_goes_on_where_it_was_told_to(stopped, tmp_path, capsys):
    path = copy_of(stopped, tmp_path / "copy")
    assert main(["run", str(path.parent / "run"), "--on_violation", "rollback"]) == 3
    captured = capsys.readouterr()
    assert "rolled back: task 'b' is rejected" in captured.out and "| rejected" not in captured.out
    assert "left out 'b'" in captured.err and "rejected" in captured.out
    assert "| rejected" in (path.parent / "run" / "report.md").read_text()
    run = load_run(path.parent / "run")
    assert "b" not in run.tasks and run.rejected[0]["name"] == "b" and run.finished
    assert main(["run", str(path), "--gate.max_forgetting", "0.05", "--on_violation", "rollback"]) == 3
    assert "nothing to do" in capsys.readouterr().out
    assert main(["run", str(path)]) == 0  # without a gate nothing is wrong; what was rejected stays out
    assert "task 'b' was rejected by the gate and is left out" in capsys.readouterr().out


def test_a_task_that_is_added_is_judged(stopped, tmp_path, capsys):
    path = copy_of(stopped, tmp_path / "copy")
    assert main(["run", str(path.parent / "run"), "--on_violation", "rollback"]) == 3
    (tmp_path / "task.yaml").write_text(f"{{name: again, path: {path.parent}/data/b.jsonl, eval_fraction: 0.25}}")
    capsys.readouterr()
    assert main(["add", str(path.parent / "run"), str(tmp_path / "task.yaml")]) == 3
    captured = capsys.readouterr()
    assert "gate after again: a lost" in captured.out and "left out 'b'" in captured.err and "'again'" in captured.err
    (tmp_path / "task.yaml").write_text(f"{{name: again, path: {path.parent}/data/b.jsonl}}")
    assert main(["add", str(path.parent / "run"), str(tmp_path / "task.yaml")]) == 2
    assert "task 'again' was rejected by the forgetting gate; add it under another name" in capsys.readouterr().err


def test_the_way_out_of_a_rehearsal_that_did_not_help(tmp_path, model, capsys):
    """Its options are of no use to another answer, and are dropped; typed beside it, they are refused."""
    gate = {"max_forgetting": 0.05, "on_violation": "rehearse", "rehearsal_rounds": 1, "rehearsal_learning_rate": 1e-9}
    path = forgetful(tmp_path, model, gate=gate)
    assert main(["run", str(path)]) == 3
    assert "go on with" in capsys.readouterr().err
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    assert main(["run", str(tmp_path / "other"), "--on_violation", "rollback"]) == 3
    assert "rolled back: task 'b' is rejected" in capsys.readouterr().out
    assert main(["run", str(path), "--on_violation", "rollback", "--gate.rehearsal_rounds", "2"]) == 2
    assert "gate.rehearsal_rounds=2 is for on_violation='rehearse'" in capsys.readouterr().err
    assert main(["run", str(path), "--on_violation", "rollback"]) == 3
    assert "rolled back: task 'b' is rejected" in capsys.readouterr().out


def test_a_raised_limit_goes_on(stopped, tmp_path):
    path = copy_of(stopped, tmp_path / "copy")
    assert main(["run", str(path), "--max_forgetting", "1"]) == 0
    assert load_run(path.parent / "run").tasks == ["a", "b", "c"]


def test_other_runs_of_the_recipe_go_on(tmp_path, model, capsys):
    variants = {"forgetful": {}, "frozen": {"training": {"learning_rate": 1e-9}}, "joint": {"joint": True}}
    path = forgetful(tmp_path, model, variants=variants, gate={"max_forgetting": 0.05})
    assert main(["run", str(path)]) == 3
    captured = capsys.readouterr()
    assert captured.err.count("forgotten:") == 1 and "run/forgetful stopped" in captured.err
    assert load_run(tmp_path / "run" / "frozen").finished and load_run(tmp_path / "run" / "joint").finished
    assert "run 3/3: joint" in captured.out and not load_run(tmp_path / "run" / "forgetful").finished


def test_in_processes_of_their_own(stopped, tmp_path, capsys):
    path = copy_of(stopped, tmp_path / "copy")
    shutil.rmtree(path.parent / "run")
    assert main(["run", str(path), "--max_forgetting", "0.05", "--isolate_tasks"]) == 3
    assert "stopped: after task 'b'" in capsys.readouterr().err
    assert_same(path.parent / "run", stopped.parent / "run")


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("isolate", [False, True] if LEVEL else [False])
def test_two_processes_end_with_3_once(tmp_path, model, capfd, isolate):
    path = forgetful(tmp_path, model, training={**LEARNING, "per_device_train_batch_size": 2})
    words = ["--accelerate_config", "ddp", "--num_processes", "2", *(["--isolate_tasks"] if isolate else [])]
    run = tmp_path / "run"
    assert main(["run", str(path), *words, "--max_forgetting", "0.05"]) == 3
    assert capfd.readouterr().err.count("forgotten: run directory") == 1
    if not LEVEL:
        return
    rehearse = ["--max_forgetting", "0.05", "--on_violation", "rehearse", "--gate.rehearsal_ratio", "0.5",
                "--gate.rehearsal_rounds", "1"]  # fmt: skip
    if not isolate:
        assert main(["run", str(path), *words, *rehearse]) in (0, 3)
        assert queue_file(run)["rehearsals"]["b"] == 1 and queue_file(run)["world_size"] == 2
    assert main(["run", str(path), *words, "--max_forgetting", "0", "--on_violation", "rollback"]) in (0, 3)
    assert load_run(run).finished


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--on_violation", "stop"], "gate.max_forgetting is missing; say how much a task may lose"),
        (["--max_forgetting", "5"], "gate.max_forgetting=5.0 must be a number from 0 to 1"),
        (["--max_forgetting", "five"], "argument --max_forgetting: invalid float value: 'five'"),
        (["--max_forgetting", "0.1", "--on_violation", "undo"], "gate.on_violation='undo' is unknown"),
        (["--gate", "0.05"], "gate=0.05 must map options to values"),
        (["--gate.max_forgeting", "0.1"], "unknown key 'gate.max_forgeting'; did you mean 'max_forgetting'"),
        (["--max_forgetting", "0.1", "--joint", "true"], "with joint=True no task comes after another"),
    ],
)
def test_what_the_command_refuses(tmp_path, model, capsys, words, sentence):
    path = write_recipe(tmp_path, model)
    assert main(["run", str(path), *words]) == 2
    assert sentence in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_the_section_of_a_recipe(tmp_path, model):
    path = write_recipe(tmp_path, model, gate={"max_forgetting": 0.05, "on_violation": "rollback"})
    (run,) = recipes.expand(recipes.load_recipe(path), tmp_path)
    assert run.recipe["gate"]["on_violation"] == "rollback" and run.recipe["gate"]["measure"] == "max"
    (run,) = recipes.expand(recipes.load_recipe(path), tmp_path, {"gate": None})
    assert "gate" not in run.recipe
    queue = run.queue()
    assert queue._gate is None


# -- in reports ------------------------------------------------------------------------------------------------------


def test_the_report_has_a_verdict_for_each_task(scores, tmp_path):
    scores |= {**BAD, ("toy2", "toy0"): 0.6}
    queue_with(tmp_path / "run", gate={"max_forgetting": 0.2, "on_violation": "rollback"}).run()
    (text,) = gate_section([load_run(tmp_path / "run")])
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert lines[2:] == [
        ["toy1", "toy0", "50.0", "50.0", "20.0", "rejected"], ["toy2", "toy0", "15.0", "15.0", "20.0", "kept"],
    ]  # fmt: skip
    assert gate_section([load_run(make_queue(tmp_path / "plain").run().run_dir)]) == []
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["tasks"] == ["toy0", "toy1", "toy2"]
