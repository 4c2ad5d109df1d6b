import gc
import json
import os

import numpy as np
import pytest
import torch
import yaml
from toy_runs import assert_same, make_queue, save_model, snapshot, write_recipe
from transformers import LlamaForCausalLM

from hf_continual import InputError, TaskQueue, bounds, recipes
from hf_continual.bounds import bounds_rows, bounds_table, gap_closed, replays
from hf_continual.cli import main
from hf_continual.compare import compare_runs, comparison_text
from hf_continual.methods.base import ContinualMethod, make_method
from hf_continual.metrics import METRICS
from hf_continual.run_model import RunModel
from hf_continual.run_scores import compute, find_runs, load_run
from hf_continual.testing import tiny_model, toy_queue_options, toy_rows, toy_stream, train_task
from hf_continual.trainer import ContinualMixin


class Killed(BaseException):
    pass


# -- independent -----------------------------------------------------------------------------------------------------


def independent(folder, stream=None, **options):
    made = toy_queue_options(learning_rate=5e-2)
    made["evaluation"] |= {"max_new_tokens": 2}
    return TaskQueue(folder, tasks=stream or toy_stream(3, rows=8, eval_rows=4), independent=True, **made, **options)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("independent") / "run"
    return folder, independent(folder).run()


def adapter(run, task):
    return snapshot(run)[f"tasks/{task}/adapter/adapter_model.safetensors"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_each_task_starts_from_the_base_model(alone, tmp_path):
    run, result = alone
    make_queue(tmp_path / "naive", tasks=3).run()
    assert same(adapter(run, "00-toy0"), adapter(tmp_path / "naive", "00-toy0"))
    assert not same(adapter(run, "01-toy1"), adapter(tmp_path / "naive", "01-toy1"))
    stream = toy_stream(3, rows=8, eval_rows=4)
    independent(tmp_path / "other", [stream[2], stream[1]]).run()  # whatever comes before it
    assert same(adapter(run, "01-toy1"), adapter(tmp_path / "other", "01-toy1"))
    assert not same(adapter(run, "01-toy1"), adapter(run, "02-toy2"))


def test_the_matrix_has_its_diagonal_only(alone):
    run, result = alone
    scored = ~np.isnan(result.R)
    assert (scored == np.eye(3, dtype=bool)).all()
    assert result.metrics == {"average_performance": pytest.approx(np.diagonal(result.R).mean())}
    loaded = load_run(run)
    assert loaded.independent and not loaded.sequential and loaded.label == "independent"
    assert compute(loaded, METRICS["average_performance"]) == pytest.approx(result.metrics["average_performance"])
    assert json.loads((run / "queue.json").read_text())["independent"] is True


@pytest.mark.parametrize("point", ["step", "commit", "cell"])
def test_independent_goes_on_after_a_kill(alone, tmp_path, monkeypatch, point):
    from hf_continual.run_state import RunDirectory

    step, commit, cell = ContinualMixin.training_step, RunDirectory.commit_task, RunDirectory.write_cell
    with monkeypatch.context() as patch:

        def killed(original, when):
            def replaced(self, *args, **kwargs):
                if when(self, *args):
                    raise Killed
                return original(self, *args, **kwargs)

            return replaced

        if point == "step":
            at = killed(step, lambda self, *a: self.task.index == 1 and self.state.global_step == 3)
            patch.setattr(ContinualMixin, "training_step", at)
        elif point == "commit":
            patch.setattr(RunDirectory, "commit_task", killed(commit, lambda self, task, *a: task.index == 1))
        else:
            patch.setattr(RunDirectory, "write_cell", killed(cell, lambda self, after, *a: after.index == 1))
        with pytest.raises(Killed):
            independent(tmp_path / "run").run()
    independent(tmp_path / "run").run()
    assert_same(tmp_path / "run", alone[0])


def test_independent_one_task_a_start(alone, tmp_path):
    """As `isolate_tasks` does in processes of their own."""
    for _ in range(3):
        independent(tmp_path / "run").run(one_task=True)
    assert_same(tmp_path / "run", alone[0])


def test_independent_keeps_one_model_at_a_time(tmp_path, monkeypatch):
    living, fresh = [], RunModel.fresh

    def counting(self, empty=False):
        gc.collect()
        if not empty:
            living.append(sum(isinstance(o, LlamaForCausalLM) for o in gc.get_objects()) - before)
        return fresh(self, empty)

    gc.collect()
    before = sum(isinstance(o, LlamaForCausalLM) for o in gc.get_objects())
    monkeypatch.setattr(RunModel, "fresh", counting)
    independent(tmp_path / "run").run()
    assert len(living) == 3 and max(living[1:]) <= 0  # the first may find one that another test has left


def test_a_task_is_added_to_an_independent_run(alone, tmp_path):
    stream = toy_stream(3, rows=8, eval_rows=4)
    queue = independent(tmp_path / "run", stream[:2])
    queue.run()
    queue.add(stream[2])
    queue.run()
    assert_same(tmp_path / "run", alone[0])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"methods": ["migu"]}, "method 'migu' has no earlier task to keep; give no methods"),
        ({"joint": True}, "two different bounds"),
        ({"gate": {"max_forgetting": 0.1}}, "independent=True no task comes after another"),
    ],
)
def test_what_an_independent_run_cannot_be(tmp_path, options, words):
    with pytest.raises(InputError, match=words):
        independent(tmp_path / "run", **options)


def test_another_kind_of_run_does_not_go_on_in_its_directory(alone, tmp_path):
    made = toy_queue_options(learning_rate=5e-2)
    made["evaluation"] |= {"max_new_tokens": 2}
    with pytest.raises(InputError, match="independent is True there and False here"):
        TaskQueue(alone[0], tasks=toy_stream(3, rows=8, eval_rows=4), **made).run()


# -- the padded control ----------------------------------------------------------------------------------------------

REPLAYING = {
    "replay": {"name": "replay", "count": 5},
    "more than the task has": {"name": "replay", "ratio": 1.0},
    "alternate": {"name": "replay", "count": 6, "mixing": "alternate"},
    "after": {"name": "replay", "count": 6, "mixing": "after"},
    "er": {"name": "er", "total": 6, "policy": "reservoir"},
    "derpp": {"name": "derpp", "count": 4},
    "derpp summed": {"name": "derpp", "count": 4, "loss_mix": "summed"},
    "derpp of previous": {"name": "derpp", "count": 4, "teacher": "previous"},
    "seekr": {"name": "seekr", "count": 4, "layers": 2, "heads": 4, "query_rows": 4},
    "agem": {"name": "agem", "count": 4, "memory_batch_size": 3},
    "gem": {"name": "gem", "count": 4},
    "kif": {"name": "kif", "replay_count": 4, "fusion": "categorical", "quantile": 0.5},
    "tasl": {"name": "tasl", "replay_count": 4, "quantile": 0.5},
}


def trained_rows(spec, folder):
    """Of each task: rows that took part in a forward with gradients, in order, and steps; and the rows of each task."""
    model, method, data = tiny_model(lora=True), make_method(spec), [toy_rows(seed=i, rows=12) for i in range(3)]
    seen, steps, names = [], [], []

    def look(module, args, kwargs):
        if torch.is_grad_enabled() and module.training:
            seen[-1] += [tuple(row) for row in kwargs["input_ids"].tolist()]

    handle = model.get_base_model().register_forward_pre_hook(look, with_kwargs=True)
    for index, rows in enumerate(data):
        seen.append([])
        trainer = train_task(model, rows, [method], folder / str(index))
        steps.append(len([entry for entry in trainer.state.log_history if "loss" in entry]))
        names.append({name for entry in trainer.state.log_history for name in entry if "/" in name})
    handle.remove()
    return seen, steps, [{tuple(row) for row in rows["input_ids"]} for rows in data], names


@pytest.mark.parametrize("name", REPLAYING)
def test_the_control_has_as_many_steps_and_rows_and_none_is_old(name, tmp_path):
    spec = REPLAYING[name]
    with_old, steps, own, _ = trained_rows(spec, tmp_path / "past")
    without, same_steps, _, logged = trained_rows({**spec, "source": "current_task"}, tmp_path / "control")
    assert steps == same_steps and [len(rows) for rows in with_old] == [len(rows) for rows in without]
    assert with_old[0] == without[0]
    for task in (1, 2):
        assert set(with_old[task]) & own[0], "the method itself sees old rows"
        assert set(without[task]) <= own[task]
        assert len(without[task]) > len(own[task]), "and the control more rows than the task alone"
    assert not logged[2] & {"derpp/logits", "seekr/logits", "seekr/attention"}


@pytest.mark.parametrize("name", ["replay", "derpp", "seekr", "kif"])
def test_a_control_is_the_same_when_it_is_resumed(name, tmp_path):
    def queue(folder):
        made = toy_queue_options(learning_rate=5e-2)
        made["evaluation"] |= {"max_new_tokens": 2}
        method = {**REPLAYING[name], "source": "current_task"}
        return TaskQueue(folder, tasks=toy_stream(2, rows=8, eval_rows=4), methods=[method], **made)

    queue(tmp_path / "whole").run()
    step = ContinualMixin.training_step
    with pytest.MonkeyPatch.context() as patch:

        def killed(self, *args, **kwargs):
            if self.task is not None and self.task.index == 1 and self.state.global_step == 3:
                raise Killed
            return step(self, *args, **kwargs)

        patch.setattr(ContinualMixin, "training_step", killed)
        with pytest.raises(Killed):
            queue(tmp_path / "run").run()
    queue(tmp_path / "run").run()
    assert_same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("name", ["replay", "derpp", "seekr", "agem", "gem", "kif", "tasl"])
def test_an_unknown_source_is_refused(name):
    with pytest.raises(InputError, match="source='current' is unknown; choose past, current_task"):
        make_method({**REPLAYING[name], "source": "current"})


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        *((spec, True) for spec in REPLAYING.values()),
        ({"name": "replay", "count": 0}, False),
        ({"name": "agem", "count": 0}, False),
        ({"name": "kif"}, False),
        ({"name": "replay", "source": "current_task"}, False),
        ("migu", False),
        ("lwf", False),
        ("naive", False),
    ],
)
def test_which_methods_replay(spec, expected):
    assert replays(make_method(spec)) is expected


def test_a_method_of_ones_own_that_cannot_be_padded():
    class Mine(ContinualMethod):
        owns = frozenset({"replay"})

    with pytest.raises(InputError, match="method 'mine' keeps rows of earlier tasks and has no option 'source'"):
        replays(Mine())


def test_a_run_from_before_the_option_goes_on(tmp_path):
    """recipe.yaml of a run that was started when methods had no `source`."""
    options = dict(toy_queue_options(), methods=[{"name": "replay", "count": 2}])
    TaskQueue(tmp_path / "run", tasks=toy_stream(1, rows=8), **options).run()
    path = tmp_path / "run" / "recipe.yaml"
    recipe = yaml.safe_load(path.read_text())
    assert recipe["methods"][0].pop("source") == "past"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    queue = json.loads((tmp_path / "run" / "queue.json").read_text())
    del queue["recipe_sha256"]
    (tmp_path / "run" / "queue.json").write_text(json.dumps(queue))
    result = TaskQueue(tmp_path / "run", tasks=toy_stream(2, rows=8), **options).run()
    assert result.R.shape == (2, 2)


# -- by one flag -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, model):
    """A recipe without variants, run without and then with both flags; when its own files were written."""
    path = write_recipe(tmp_path_factory.mktemp("plain"), model, methods=[{"name": "replay", "ratio": 0.5}])
    assert main(["run", str(path)]) == 0
    run = path.parent / "run"
    times = {p: p.stat().st_mtime_ns for p in run.glob("tasks/**/*")}
    assert main(["run", str(path), "--with_bounds", "--with_padded_control"]) == 0
    return path, times


def test_only_keeps_what_the_flags_add_to_a_variant(tmp_path, model, capsys):
    variants = {"plain": {}, "rep": {"methods": [{"name": "replay", "ratio": 0.5}]}, "ewc": {"methods": ["ewc"]}}
    path = write_recipe(tmp_path, model, variants=variants, methods=[])

    def chosen(*words):
        assert main(["run", str(path), "--dry_run", "--only", *words]) == 0
        lines = [line for line in capsys.readouterr().out.splitlines() if "; tasks: " in line]
        return {line.partition(":")[0].removeprefix(str(tmp_path / "run") + "/") for line in lines}

    assert chosen("rep") == {"rep"}
    assert chosen("rep", "--with_padded_control") == {"rep", "rep+padded"}
    assert chosen("ewc", "--with_padded_control") == {"ewc"}
    assert chosen("ewc", "--with_bounds") == {"ewc", "naive", "independent", "joint"}
    assert chosen("joint", "--with_bounds") == {"joint"}


def queue_of(run):
    return json.loads((run / "queue.json").read_text())


def test_bounds_lie_in_the_folder_of_the_run_which_is_not_trained_again(recipe, capsys):
    path, times = recipe
    run = path.parent / "run"
    assert {p: p.stat().st_mtime_ns for p in run.glob("tasks/**/*")} == times
    made = sorted(str(p.parent.relative_to(run)) for p in run.rglob("queue.json"))
    assert made == [".", "independent", "joint", "naive", "run+padded"]
    assert queue_of(run)["variant"] is None and queue_of(run / "naive")["method_names"] == []
    assert queue_of(run / "joint")["joint"] and queue_of(run / "independent")["independent"]
    control = yaml.safe_load((run / "run+padded" / "recipe.yaml").read_text())
    assert control["methods"][0]["source"] == "current_task" and control["methods"][0]["ratio"] == 0.5
    assert main(["run", str(path), "--with_bounds", "--with_padded_control"]) == 0
    out = capsys.readouterr().out
    assert out.count("nothing to do") == 5 and "== task" not in out
    assert "gap closed" in out or "seed 42: joint is not better than naive, so there is no gap to close" in out
    assert "FWT" in out and "gain of old data" in out
    assert main(["run", str(path)]) == 0
    assert main(["run", str(run)]) == 0  # the run's own directory, without the bounds
    assert "== task" not in capsys.readouterr().out


def test_the_report_and_a_comparison_show_them(recipe, capsys):
    run = recipe[0].parent / "run"
    assert main(["report", str(run), "--convention", "sapt"]) == 0
    out, text = capsys.readouterr().out, (run / "report.md").read_text()
    assert "## Bounds and controls" in text and "| independent" in text and "run+padded" in text
    missing = [line for line in out.splitlines() if line.startswith("run: no ")]
    assert missing == [], "the independent run gives the scores of single tasks"
    ours, alone = load_run(run), load_run(run / "independent")
    expected = np.mean(np.diagonal(ours.R) - np.diagonal(alone.R))
    assert bounds.add_independent([ours, alone]) == []
    assert compute(ours, METRICS["forward_transfer/diagonal"]) == pytest.approx(expected)
    assert main(["compare", str(run)]) == 0
    out = capsys.readouterr().out
    assert "average_performance against run, percent" in out and "Against the bounds and controls" in out
    assert main(["compare", str(run), "--metric", "backward_transfer", "--against", "naive"]) == 0
    out = capsys.readouterr().out
    assert "Left out: independent, seed 42, which has no backward_transfer" in out and "Against the" not in out
    predictions = text.split("## Predictions")[1].split("##")[0]
    assert predictions.count("run/naive/tasks/00-a/predictions") == 1


def test_a_recipe_with_variants_and_seeds(tmp_path, model, capsys):
    variants = {
        "replay": {"methods": [{"name": "replay", "ratio": 0.5}]},
        "naive": {},
        "ewc-free": {"methods": ["migu"]},
    }
    path = write_recipe(tmp_path, model, methods=[], seeds=[1, 2], variants=variants,
                        tasks=[{"name": "a", "path": "data/a.jsonl"}], gate={"max_forgetting": 0.5})  # fmt: skip
    words = ["--with_bounds", "--with_padded_control", "--training.max_steps", "1"]
    assert main(["run", str(path), *words, "--dry_run"]) == 0
    out = capsys.readouterr().out
    places = [line.split(": ")[0].removeprefix(f"{tmp_path}/run/") for line in out.splitlines() if ", seed " in line]
    names = ["ewc-free", "naive", "replay", "independent", "joint", "replay+padded"]
    assert places == [f"{name}/seed-{seed}" for name in names for seed in (1, 2)]
    assert "naive: replays no rows of earlier tasks, so it needs no padded control" in out
    assert "ewc-free: replays no rows" in out and not (tmp_path / "run").exists()
    assert main(["run", str(path), *words, "--only", "joint"]) == 0
    stored = yaml.safe_load((tmp_path / "run" / "joint" / "seed-1" / "recipe.yaml").read_text())
    assert stored["training"]["max_steps"] == 1 and stored["joint"] and "gate" not in stored
    runs = recipes.expand(recipes.load_recipe(path), tmp_path)
    added = bounds.bounds_of(recipes.load_recipe(path), runs, {})
    assert [run.variant for run in added] == ["independent", "independent", "joint", "joint"]
    gated = {run.variant for run in [*runs, *added] if "gate" in run.recipe}
    assert gated == {"replay", "ewc-free"}, "a bound that stops early is none"


@pytest.mark.parametrize(
    ("sections", "words", "sentence"),
    [
        ({"variants": {"naive": {"methods": ["migu"]}}}, ["--with_bounds"], "variant 'naive' has the name of a bound"),
        ({"variants": {"joint": {}}}, ["--with_bounds"], "variant 'joint' has the name of a bound"),
        ({"methods": ["migu"]}, ["--with_padded_control"], "no variant of this recipe replays rows of earlier tasks"),
        ({"joint": True, "methods": ["replay"]}, ["--with_padded_control"], "no variant of this recipe replays"),
        ({"variants": {"x": {"methods": ["er"]}, "x+padded": {}}}, ["--with_padded_control"], "'x+padded' already"),
        ({"independent": True}, [], "independent=True learns each task from the base model, where method 'migu'"),
        ({"independent": "yes"}, [], "independent='yes' must be true or false"),
        ({"methods": [{"name": "replay", "source": "old"}]}, [], "source='old' is unknown"),
    ],
)
def test_what_the_flags_refuse(tmp_path, model, capsys, sections, words, sentence):
    path = write_recipe(tmp_path, model, **sections)
    assert main(["run", str(path), *words]) == 2
    assert sentence in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.parametrize("flag", ["--with_bounds", "--with_padded_control"])
def test_flags_are_for_recipes(recipe, capsys, flag):
    assert main(["run", str(recipe[0].parent / "run"), flag]) == 2
    assert f"{flag} adds runs to those of a recipe" in capsys.readouterr().err


@pytest.mark.skipif(
    not os.environ.get("HF_CONTINUAL_DISTRIBUTED"), reason="half a minute of starting processes; make test-distributed"
)
@pytest.mark.distributed
@pytest.mark.slow
def test_bounds_in_two_processes(tmp_path, model):
    """Four rows a step either way, so the same weights but for rounding."""
    folders = {}
    for name, batch, words in (("one", 4, []), ("two", 2, ["--accelerate_config", "ddp", "--num_processes", "2"])):
        tasks = [{"name": task, "path": f"data/{task}.jsonl", "eval_fraction": 0.5} for task in "ab"]  # whole steps
        path = write_recipe(tmp_path / name, model, methods=[], tasks=tasks)
        words += ["--training.per_device_train_batch_size", str(batch), "--only", "independent"]
        assert main(["run", str(path), "--with_bounds", *words]) == 0
        folders[name] = tmp_path / name / "run"
    assert queue_of(folders["two"] / "independent")["world_size"] == 2
    one, two = (snapshot(folders[name] / "independent") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        if name.endswith("adapter_model.safetensors"):
            assert all(torch.allclose(value[key], two[name][key], atol=1e-4) for key in value)


# -- scores ----------------------------------------------------------------------------------------------------------


def test_the_gap():
    assert gap_closed(0.7, 0.2, 0.7) == pytest.approx(1.0)
    assert gap_closed(0.45, 0.2, 0.7) == pytest.approx(0.5)
    assert gap_closed(0.1, 0.2, 0.7) == pytest.approx(-0.2)
    assert gap_closed(0.5, 0.7, 0.7) is None and gap_closed(0.5, 0.7, 0.6) is None


TASKS = ["a", "b"]


def write_run(folder, variant, R, seed=1, hashes="1", **queue):
    """A finished run as reports read it; R[i][j], None where not scored."""
    folder.mkdir(parents=True)
    train = ["joint"] if queue.get("joint") else TASKS
    lines = [
        {"after_task": train[i], "after_index": i, "task": TASKS[j], "task_index": j, "metric": "exact_match",
         "score": score, "n": 10}
        for i, row in enumerate(R) for j, score in enumerate(row) if score is not None
    ]  # fmt: skip
    (folder / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    state = {
        "schema": 1, "tasks": [{"name": t, "hash": t} for t in train], "eval_tasks": TASKS, "cursor": len(train),
        "evaluation": [{"task": t, "hash": t + hashes} for t in TASKS], "finished": True, "variant": variant,
        "seed": seed, **queue,
    }  # fmt: skip
    (folder / "queue.json").write_text(json.dumps(state))
    return folder


@pytest.fixture
def written(tmp_path):
    for seed, shift in ((1, 0.0), (2, 0.1)):
        write_run(tmp_path / f"naive/seed-{seed}", "naive", [[0.8, None], [0.1, 0.7]], seed)
        write_run(tmp_path / f"replay/seed-{seed}", "replay", [[0.8, None], [0.5 + shift, 0.7]], seed)
        write_run(tmp_path / f"replay+padded/seed-{seed}", "replay+padded", [[0.8, None], [0.3, 0.7]], seed)
        write_run(tmp_path / f"joint/seed-{seed}", "joint", [[0.8, 0.8]], seed, joint=True)
        write_run(tmp_path / f"independent/seed-{seed}", "independent", [[0.8, None], [None, 0.9]], seed,
                  independent=True)  # fmt: skip
    return tmp_path


def test_variants_against_bounds_and_controls(written):
    runs = [load_run(path) for path in find_runs(written)]
    rows, notes = bounds_rows(runs)
    found = {row.label: row for row in rows}
    assert found["independent"].performance == pytest.approx([0.85, 0.85]) and notes == []
    assert found["replay"].closed == pytest.approx([0.5, 0.625])  # (0.6 - 0.4) / (0.8 - 0.4), (0.65 - 0.4) / 0.4
    assert found["replay"].transfer == pytest.approx([-0.1, -0.1])  # (0.8 - 0.8 + 0.7 - 0.9) / 2
    assert found["replay"].gains == pytest.approx([0.1, 0.15]) and found["replay+padded"].gains == []
    text = bounds_table(runs)
    assert "the old data's gain is 12.5 [-19.3, 44.3], 95 % over 2 seeds" in text  # 12.706 * 0.0354 / sqrt(2)
    assert [line.split()[0] for line in text.splitlines()[2:7]] == [
        "naive", "independent", "joint", "replay", "replay+padded",
    ]  # fmt: skip
    comparisons = compare_runs([written], resamples=0)
    assert comparisons[0].first == "naive" and {c.second for c in comparisons} >= {"joint", "independent", "replay"}
    assert "gap closed" in comparison_text(comparisons)


def test_what_cannot_be_compared_is_said(written):
    write_run(written / "other/seed-1", "other", [[0.8, None], [0.5, 0.7]], hashes="2")
    runs = [load_run(path) for path in find_runs(written)]
    rows, notes = bounds_rows(runs)
    assert "other" not in {row.label for row in rows if row.closed}
    assert any("other, seed 1: not compared with the bounds" in note for note in notes)
    assert any("other, seed 1: no forward transfer from the independent run" in note for note in notes)


def test_no_gap_is_said(tmp_path):
    write_run(tmp_path / "naive", "naive", [[0.8, None], [0.9, 0.9]])
    write_run(tmp_path / "ewc", "ewc", [[0.8, None], [0.9, 0.9]])
    write_run(tmp_path / "joint", "joint", [[0.8, 0.8]], joint=True)
    text = bounds_table([load_run(path) for path in find_runs(tmp_path)])
    assert "seed 1: joint is not better than naive, so there is no gap to close" in text and "gap closed" not in text


def test_bounds_of_two_recipes_without_variants(tmp_path):
    for name, score in (("migu", 0.5), ("ewc", 0.6)):
        write_run(tmp_path / name, None, [[0.8, None], [score, 0.7]])
        write_run(tmp_path / name / "naive", "naive", [[0.8, None], [0.1, 0.7]])
    comparisons = compare_runs([tmp_path / "migu", tmp_path / "ewc"], resamples=0)
    assert [c.second for c in comparisons] == ["naive", "ewc"]
    assert any("Left out:" in note and "is naive, seed 1 as well" in note for note in comparisons[0].notes)


def test_single_tasks_come_from_an_independent_run(written, capsys):
    runs = [str(written / "replay")]
    assert main(["report", *runs, "--single_task", str(written / "independent"), "--convention", "sapt"]) == 0
    assert "-10.0" in capsys.readouterr().out  # (0.8 - 0.8 + 0.7 - 0.9) / 2
