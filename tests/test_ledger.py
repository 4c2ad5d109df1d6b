"""The ledger: result files of runs written by hand, published numbers, verdicts, and the tables of METHODS.md."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import pytest
import yaml
from test_report import write_run

from hf_continual.cli import main
from hf_continual.errors import InputError
from hf_continual.ledger import add_runs, ledger_text, read_numbers, read_results, verdict, write_ledger
from hf_continual.ledger.papers import PAPER_NUMBERS
from hf_continual.ledger.results import brought_recipe, dump, read_result
from hf_continual.ledger.tables import BEGIN, END, RULES
from hf_continual.recipes import load_recipe, recipe_files
from hf_continual.streams import stream_names

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
TASKS = ["a", "b", "c"]
# AP 0.6, BWT ((0.5 - 0.8) + (0.7 - 0.9)) / 2 = -0.25, LA (0.8 + 0.9 + 0.6) / 3
R = [[0.8, None, None], [0.6, 0.9, None], [0.5, 0.7, 0.6]]


def recipe_of(name="unit", **sections):
    recipe = {
        "name": name,
        "model": {"name": "org/small", "dtype": "float32"},
        "peft": {"r": 8, "target_modules": ["q", "v"]},
        "training": {"learning_rate": 0.001, "disable_tqdm": True},
        "methods": [],
        "tasks": {"stream": "standard-order1", "data_dir": "/home/someone/data", "train_rows": 8},
        "data": {"max_prompt_length": 16},
        "evaluation": {"batch_size": 2},
        "joint": False,
        "trainer": None,
    }
    return recipe | sections


def a_run(root: Path, variant="lora", seed=42, R=R, recipe=None, hashes="", tasks=TASKS, **queue) -> Path:
    """A finished run with what a run directory holds for the ledger: recipe, hashes, logs."""
    path = write_run(
        root / variant / f"seed-{seed}", R=R, baseline=None, tasks=tasks, variant=variant, seed=seed,
        git="0123456789abcdef", versions={"torch": "2.13.0+cpu", "peft": "0.21.2"}, **queue,
    )  # fmt: skip
    state = json.loads((path / "queue.json").read_text())
    for i, task in enumerate(state["tasks"]):
        task |= {"hash": f"train-{task['name']}{hashes}", "rows": 8}
        folder = path / "tasks" / f"{i:02d}-{task['name']}"
        folder.mkdir(parents=True)
        log = [
            {"loss": 1.0},
            {"train_runtime": 15.0 + i},
            {"kif/replay": 1.0, "train_runtime": 5.0},
        ]  # a phase of its own
        (folder / "log.json").write_text(json.dumps(log))
    state["evaluation"] = [{"task": name, "hash": f"eval-{name}{hashes}"} for name in state["eval_tasks"]]
    (path / "queue.json").write_text(json.dumps(state))
    stored = (recipe or recipe_of()) | {"seed": seed, "variant": variant, "base_dir": "/home/someone/recipes"}
    (path / "recipe.yaml").write_text(yaml.safe_dump(stored))
    return path


def shifted(by):
    return [[None if v is None else v + by for v in row] for row in R]


# -- add ---------------------------------------------------------------------------------------------------------------


def test_what_a_result_file_holds(tmp_path):
    (line,) = add_runs([a_run(tmp_path / "runs")], tmp_path / "results", hardware="2 CPU cores", notes=["a note"])
    file = tmp_path / "results" / "unit" / "lora.json"
    assert line == f"added: {file} (seeds 42)"
    data = json.loads(file.read_text())
    assert data["seeds"]["42"]["R"] == R and data["seeds"]["42"]["baseline"] is None
    assert data["seeds"]["42"]["commit"] == "0123456789abcdef" and data["seeds"]["42"]["hardware"] == "2 CPU cores"
    assert data["seeds"]["42"]["training_seconds"] == 63.0
    assert data["stream"]["name"] == "standard-order1" and data["stream"]["tasks"] == TASKS
    assert data["stream"]["train_hashes"] == {name: f"train-{name}" for name in TASKS}
    assert data["stream"]["eval_hashes"] == {name: f"eval-{name}" for name in TASKS}
    assert data["stream"]["train_rows"] == dict.fromkeys(TASKS, 8) and data["sizes"] == dict.fromkeys(TASKS, 100)
    assert data["scorers"] == dict.fromkeys(TASKS, "exact_match") and data["notes"] == ["a note"]
    assert data["recipe"]["tasks"] == {"stream": "standard-order1", "data_dir": "DIR", "train_rows": 8}
    assert "/home" not in file.read_text() and not {"seed", "variant", "base_dir"} & set(data["recipe"])
    assert data["recipe_file"] is None and data["changed"] == {}
    # Sorted and without a trace of when it was written.
    assert file.read_text() == dump(json.loads(file.read_text())) and list(data) == sorted(data)
    assert "    [0.6, 0.9, null]," in file.read_text()


def test_adding_again_changes_nothing_and_seeds_come_together(tmp_path):
    runs, results = tmp_path / "runs", tmp_path / "results"
    add_runs([a_run(runs)], results, hardware="2 CPU cores")
    before = (results / "unit" / "lora.json").read_bytes()
    (line,) = add_runs([runs], results)
    assert line.startswith("unchanged: ") and (results / "unit" / "lora.json").read_bytes() == before
    a_run(runs, seed=43, R=shifted(0.1))
    (line,) = add_runs([runs], results)
    assert line.startswith("updated: ") and line.endswith("(seeds 42, 43)")
    (result,) = read_results(results)
    found = result.measure("average_performance")
    assert found.mean == pytest.approx(65.0) and found.seeds == 2
    assert found.sd == pytest.approx(statistics.stdev([60.0, 70.0]))
    assert result.measure("backward_transfer").mean == pytest.approx(-25.0)
    assert result.measure("task/b").mean == pytest.approx(75.0)
    assert result.measure("task/nowhere") is None and result.measure("general/MMLU") is None
    assert result.measure("forward_transfer") is None  # no scores before a task


def test_perplexities_are_in_nats_and_not_in_percent(tmp_path):
    path = a_run(tmp_path / "runs", R=[[20.0, None, None], [30.0, 10.0, None], [40.0, 20.0, 5.0]])
    scores = path / "scores.jsonl"
    scores.write_text(scores.read_text().replace('"exact_match"', '"perplexity"'))
    add_runs([path], tmp_path / "results")
    (result,) = read_results(tmp_path / "results")
    found = result.measure("average_performance")
    assert found.unit == "nats" and found.mean == pytest.approx(-math.log(40 * 20 * 5) / 3)
    assert result.measure("backward_transfer").mean == pytest.approx(-math.log(2))
    text = ledger_text([result], read_numbers())
    assert row_of(text, "lora", "42")[2:4] == ["-2.765", "-0.693"]


def test_independent_runs_have_an_average_alone(tmp_path):
    alone = [[0.8, None, None], [None, 0.9, None], [None, None, 0.7]]
    recipe = recipe_of(independent=True)
    add_runs([a_run(tmp_path / "runs", "independent", R=alone, recipe=recipe, independent=True)], tmp_path / "results")
    (result,) = read_results(tmp_path / "results")
    assert result.measure("average_performance").mean == pytest.approx(80.0)
    assert result.measure("backward_transfer") is None


def test_order_of_the_runs_does_not_matter(tmp_path):
    one, two = a_run(tmp_path / "runs", seed=44), a_run(tmp_path / "runs", seed=42, R=shifted(0.1))
    add_runs([one, two], tmp_path / "x")
    add_runs([two, one], tmp_path / "y")
    assert (tmp_path / "x/unit/lora.json").read_text() == (tmp_path / "y/unit/lora.json").read_text()


def test_no_paths_of_a_machine_are_kept(tmp_path):
    tasks = [{"name": name, "path": f"/home/someone/data/{name}/train.json"} for name in TASKS]
    recipe = recipe_of(tasks=tasks, training={"deepspeed": "~/configs/zero.json"}, model={"name": "/home/models/small"})
    path = a_run(tmp_path / "runs", recipe=recipe)
    add_runs([path], tmp_path / "results", stream="my-stream")
    (result,) = read_results(tmp_path / "results")
    assert [task["path"] for task in result.recipe["tasks"]] == [f"DIR/{name}/train.json" for name in TASKS]
    assert result.recipe["training"]["deepspeed"] == "DIR/configs/zero.json"
    assert result.recipe["model"]["name"] == "DIR/models/small" and result.stream["name"] == "my-stream"
    assert "someone" not in result.path.read_text()


def test_options_that_are_younger_than_a_run_are_no_difference(tmp_path):
    results = tmp_path / "results"
    add_runs([a_run(tmp_path / "old", recipe=recipe_of(methods=[{"name": "migu", "threshold": 0.7}]))], results)
    young = recipe_of(methods=[{"name": "migu", "threshold": 0.7, "mask": "gradient"}])
    young["model"] |= {"revision": None, "load_in_4bit": False}
    (line,) = add_runs([a_run(tmp_path / "new", seed=43, recipe=young)], results)
    assert line.endswith("(seeds 42, 43)")
    other = recipe_of(methods=[{"name": "migu", "threshold": 0.5}])
    with pytest.raises(InputError, match=r"methods\.0\.threshold is 0\.5, and 0\.7 there; use another --group"):
        add_runs([a_run(tmp_path / "other", seed=44, recipe=other)], results)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"hashes": "-other"},
            "the training rows of a differ, hash train-a-othe and train-a; use another --group",
        ),
        ({"tasks": ["a", "b", "d"]}, "its tasks are a, b, d, not a, b, c"),
        ({"recipe": recipe_of(training={"learning_rate": 0.1})}, "training.learning_rate is 0.1, and 0.001 there"),
        ({"recipe": recipe_of(model={"name": "org/large"})}, "model.name is 'org/large', and 'org/small' there"),
        ({"seed": 42, "R": shifted(0.1)}, "seed 42 is there with other scores"),
    ],
)
def test_other_runs_under_the_same_entry_are_refused(tmp_path, change, message):
    results = tmp_path / "results"
    add_runs([a_run(tmp_path / "first")], results)
    before = (results / "unit" / "lora.json").read_bytes()
    with pytest.raises(InputError) as error:
        add_runs([a_run(tmp_path / "second", **({"seed": 43} | change))], results)
    assert message in str(error.value) and "cannot be added to" in str(error.value)
    assert (results / "unit" / "lora.json").read_bytes() == before
    assert add_runs([tmp_path / "second"], results, group="another")[0].startswith("added: ")


def test_another_scorer_is_refused(tmp_path):
    results = tmp_path / "results"
    add_runs([a_run(tmp_path / "first")], results)
    path = a_run(tmp_path / "second", seed=43)
    scores = path / "scores.jsonl"
    scores.write_text(scores.read_text().replace('"exact_match"', '"rouge_l"'))
    with pytest.raises(InputError, match=r"a is scored by rouge_l and exact_match; use another --group"):
        add_runs([path], results)


def test_what_cannot_be_a_result(tmp_path):
    results = tmp_path / "results"
    good = a_run(tmp_path / "runs")
    unfinished = a_run(tmp_path / "runs", seed=43, finished=False, cursor=1)
    with pytest.raises(InputError, match=r"not finished \(1 of 3 tasks\); finish it, or leave it out with --skip_unf"):
        add_runs([tmp_path / "runs"], results)
    assert not results.exists()  # nothing is written unless all can be
    with pytest.raises(InputError, match="no finished run"):
        add_runs([unfinished], results, skip_unfinished=True)
    lines = add_runs([tmp_path / "runs"], results, skip_unfinished=True)
    assert lines == [
        f"left out, not finished (1 of 3 tasks): {unfinished}",
        f"added: {results}/unit/lora.json (seeds 42)",
    ]
    with pytest.raises(InputError, match="no run here"):
        add_runs([results], results)
    with pytest.raises(InputError, match="has no seed"):
        add_runs([a_run(tmp_path / "none", seed=None)], results)
    with pytest.raises(InputError, match=r"--group a/b: cannot name a file"):
        add_runs([good], results, group="a/b")
    two = [good, a_run(tmp_path / "runs", variant="ewc")]
    with pytest.raises(InputError, match=r"--title 'X': the runs make 2 entries"):
        add_runs(two, results, title="X")
    python = a_run(tmp_path / "python", seed=45)
    (python / "recipe.yaml").write_text("python: true\n")
    with pytest.raises(InputError, match="started from Python"):
        add_runs([python], results)
    queue = json.loads((good / "queue.json").read_text())
    del queue["evaluation"][1]["hash"]
    (good / "queue.json").write_text(json.dumps(queue))
    with pytest.raises(InputError, match="no hash of the evaluation rows of b"):
        add_runs([good], results, group="x")


def test_recipes_of_the_package_are_found_and_compared(tmp_path):
    brought = load_recipe(recipe_files()["migu/smollm2-standard-order1"])
    own = {k: v for k, v in brought.items() if k not in ("variants", "seeds")} | {"joint": False, "trainer": None}
    own["methods"] = [{"name": "migu", "threshold": 0.7}]
    own["tasks"] = own["tasks"] | {"data_dir": "/home/someone/data"}
    add_runs([a_run(tmp_path / "same", variant="lora+migu", recipe=own)], tmp_path / "results")
    file = tmp_path / "results" / "smollm2-standard-order1" / "lora+migu.json"
    assert json.loads(file.read_text())["recipe_file"] == "migu/smollm2-standard-order1"
    assert json.loads(file.read_text())["changed"] == {}
    less = own | {"tasks": own["tasks"] | {"train_rows": 60}, "name": "mine"}
    where = a_run(tmp_path / "less", variant="lora+migu", recipe=less)
    add_runs([where], tmp_path / "results", recipe="migu/smollm2-standard-order1")
    changed = json.loads((tmp_path / "results/mine/lora+migu.json").read_text())["changed"]
    assert changed == {"tasks.train_rows": [120, 60]}
    with pytest.raises(InputError, match=r"has no variant none-such; it has lora, lora\+migu"):
        add_runs(
            [a_run(tmp_path / "x", variant="none-such", recipe=less)], tmp_path / "results",
            recipe="migu/smollm2-standard-order1",
        )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "is no result file of schema 1"),
        ({"group": "other"}, "holds other/lora; name the file as its entry"),
        ({"colour": "red"}, "unknown key"),
        ({"seeds": {}}, "has no seed"),
        ({"seeds": {"42": {"R": [[0.5]]}}}, "R of seed 42 has the shape (1, 1), and the tasks make it (3, 3)"),
        ({"seeds": {"x": {}}}, "is no result file"),
        ({"stream": {}}, "is no result file (no key 'tasks')"),
        ({"source": "a table", "summary": {"AP": {"mean": 1.0}}}, "a metric that is not known, AP"),
        ({"source": "x", "summary": {"average_performance": {"mean": 1.0, "sd": 1.0}}}, "must have sd if and only if"),
    ],
)  # fmt: skip
def test_a_result_file_that_was_edited(tmp_path, change, message):
    add_runs([a_run(tmp_path / "runs")], tmp_path / "results")
    file = tmp_path / "results" / "unit" / "lora.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(InputError) as error:
        read_results(tmp_path / "results")
    assert message in str(error.value) and str(file) in str(error.value)


def test_a_summary_holds_numbers_and_takes_no_runs(tmp_path):
    results = tmp_path / "results"
    path = a_run(tmp_path / "runs")
    add_runs([path], results)
    file = results / "unit" / "lora.json"
    data = json.loads(file.read_text()) | {"source": "a table", "seeds": {"1": {}, "2": {}}, "hardware": ["a GPU"]}
    data["summary"] = {"average_performance": {"mean": 55.5, "sd": 1.5}}
    file.write_text(dump(data))
    result = read_result(file)
    assert result.measure("average_performance").mean == 55.5 and result.measure("backward_transfer") is None
    assert result.seeds == [1, 2] and result.of_seeds("hardware") == ["a GPU"]
    with pytest.raises(InputError, match=r"holds only a summary \(a table\); remove the file"):
        add_runs([path], results)


# -- published numbers -------------------------------------------------------------------------------------------------


def test_every_published_number_names_what_is_there():
    published = read_numbers()
    assert sum(len(number.values) for table in published.tables for number in table.numbers) > 600
    files = recipe_files()
    streams = {name.partition(":")[0] for name in stream_names()}
    for table in published.tables:
        for number in table.numbers:
            assert number.stream in published.means or number.stream.partition(":")[0] in streams, number
            if not number.values and any(other.values for other in table.row(number.method)):
                continue  # the paper does not have it
            for recipe in number.recipes.values():
                assert recipe in files, f"{table.paper} {table.title}, {number.method}: no recipe {recipe}"
                written = brought_recipe(files[recipe])
                lacking = set(number.variants) - set(written["variants"])
                assert len(lacking) < len(number.variants), f"{recipe} has no variant {lacking}"
                assert written["model"]["name"] in table.model.names, f"{recipe} is of {written['model']['name']}"
            for name in number.reduced:
                group, _, variant = name.partition("/")
                smaller = [each for each in map(brought_recipe, files.values()) if each["name"] == group]
                assert smaller and variant in smaller[0]["variants"], f"{name} is no variant of a recipe"


def test_some_numbers_as_the_papers_print_them():
    def value(paper, title, model, method, stream, metric="average_performance"):
        (found,) = [
            number.values[metric]
            for table in read_numbers().tables
            for number in table.numbers
            if (table.paper, table.title, table.model.id) == (paper, title, model)
            and (number.method, number.stream) == (method, stream)
        ]
        return found

    assert value("migu", "Table 8", "t5-large", "LoRA+MIGU", "standard-order1") == 74.8
    assert value("migu", "Table 8", "t5-large", "OIncLoRA+MIGU", "long-order6") == 74.2
    assert value("migu", "Table 3", "roberta-base", "FT+MIGU", "das", "end_task/accuracy") == 81.19
    assert value("seekr", "Table 1", "llama-2-7b-chat", "SEEKR, 1 %", "trace-order2:reasoning") == 54.69
    assert value("seekr", "Table 1", "vicuna-7b", "SEEKR, 10 %", "trace-order1:reasoning", "backward_transfer") == 0.47
    assert value("tasl", "SGD", "t5-small", "TaSL", "sgd-mean", "backward_transfer") == -9.1
    assert value("trace", "Table 1", "vicuna-13b", "SeqFT", "trace-order1") == 51.7


def numbers_file(path: Path, table=None, **row) -> Path:
    """Published numbers of one method on standard-order1, for which a recipe of the package stands."""
    content = {
        "papers": {"p": {"title": "A paper", "id": "arXiv:1"}},
        "models": {"small": {"title": "Small", "names": ["org/small"]}},
        "other_columns": {"mean": {"title": "mean of two", "of": ["standard-order1", "standard-order2"]}},
        "tables": [
            {
                "paper": "p",
                "table": "Table 1",
                "model": "small",
                "metrics": ["average_performance"],
                "columns": ["standard-order1"],
                "recipe": "migu/{stream}",
                "rows": [{"method": "LoRA", "variants": ["lora"], "values": [60.9]} | row],
            }
            | (table or {})
        ],
    }
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.parametrize(
    ("table", "row", "message"),
    [
        ({"model": "smal"}, {}, "unknown model smal; did you mean 'small'?"),
        ({"paper": "q"}, {}, "unknown paper q"),
        ({"metrics": ["average_performence"]}, {}, "unknown metric average_performence; did you mean 'average_perf"),
        ({}, {"values": [1, 2]}, "Table 1, LoRA: 2 values for 1 columns"),
        ({}, {"values": [[1, 2]]}, "Table 1, LoRA, standard-order1: 2 values for the metrics average_performance"),
        ({}, {"values": ["60.7"]}, "'60.7' is no number"),
        ({}, {"variant": "lora"}, "unknown key"),
        ({}, {"reduced": {"standard-order2": ["x/y"]}}, "unknown key"),
        ({"colour": 1}, {}, "unknown key"),
        ({"rows": None}, {}, "cannot be understood"),
    ],
)  # fmt: skip
def test_published_numbers_that_cannot_be_understood(tmp_path, table, row, message):
    with pytest.raises(InputError) as error:
        read_numbers(numbers_file(tmp_path / "n.yaml", table, **row))
    assert message in str(error.value)
    with pytest.raises(InputError, match="cannot be read"):
        read_numbers(tmp_path / "absent.yaml")


def test_a_gate_given_later_is_a_change(tmp_path):
    gate = {"max_forgetting": 0.3, "on_violation": "rehearse"}
    for key, queue in (("plain", {}), ("gated", {"gate": gate, "rehearsals": {"b": 3}})):
        runs = a_run(tmp_path / key, "migu", recipe=recipe_of(name="quickstart"), **queue)
        add_runs([runs], tmp_path / "results", group=key)
    changed = {
        key: set(read_result(tmp_path / "results" / key / "migu.json").data["changed"]) for key in ("plain", "gated")
    }
    assert changed["plain"] and changed["gated"] - changed["plain"] == {"gate", "rehearsals"}


# -- verdicts ----------------------------------------------------------------------------------------------------------


def judged(
    tmp_path, aps=(60.0, 60.0), stream="standard-order1", paper=60.9, model="org/small", changed=None, table=None, **row
):
    """The verdict on a result of the recipe of that stream, with these average performances."""
    folder = tmp_path / f"results-{len(list(tmp_path.iterdir()))}"
    runs = tmp_path / f"runs-{len(list(tmp_path.iterdir()))}"
    for seed, ap in enumerate(aps):
        a_run(runs, seed=seed, R=shifted(ap / 100 - 0.6), recipe=recipe_of(model={"name": model}))
    add_runs([runs], folder)
    file = folder / "unit" / "lora.json"
    data = json.loads(file.read_text())
    data |= {"recipe_file": f"migu/{stream}", "changed": changed or {}}
    data["stream"]["name"] = stream
    file.write_text(dump(data))
    published = read_numbers(numbers_file(tmp_path / "n.yaml", table, **({"values": [paper]} | row)))
    (only,) = published.tables
    return verdict(only, only.numbers[0], read_result(file))


def test_verdicts(tmp_path):
    assert judged(tmp_path, aps=(60.0,), paper=60.0) == "inconclusive"  # one seed
    assert judged(tmp_path, paper=60.9) == "reproduced"  # no spread: within 1.0
    assert judged(tmp_path, paper=61.1) == "failed"
    assert judged(tmp_path, paper=58.9) == "failed"
    # Two standard deviations of (58, 62) are 5.66, of (59, 61) 2.83.
    assert judged(tmp_path, aps=(58.0, 62.0), paper=65.7) == "failed"
    assert judged(tmp_path, aps=(58.0, 62.0), paper=65.6) == "inconclusive"  # within the spread, which is wide
    assert judged(tmp_path, aps=(58.0, 62.0), paper=62.9) == "reproduced"
    assert judged(tmp_path, aps=(59.0, 61.0), paper=62.8) == "reproduced"
    assert judged(tmp_path, aps=(40.0, 80.0), paper=74.4) == "inconclusive"
    assert judged(tmp_path, table={"secondary": True}) == "unverified"
    assert judged(tmp_path, model="org/other") == "reduced"
    assert judged(tmp_path, changed={"tasks.train_rows": [120, 60]}) == "reduced"
    assert judged(tmp_path, stream="standard-order2") == "reduced"  # the number is of order 1
    assert judged(tmp_path, variants=["ewc"]) == "reduced"
    # Every metric that ours has counts, and none that it has not.
    both = {"metrics": ["average_performance", "backward_transfer"]}
    assert judged(tmp_path, table=both, values=[[60.9, -25.5]]) == "reproduced"
    assert judged(tmp_path, table=both, values=[[60.9, -20.0]]) == "failed"
    with_general = {"metrics": ["average_performance", "general/MMLU"]}
    assert judged(tmp_path, table=with_general, values=[[60.9, 10.0]]) == "reproduced"
    assert judged(tmp_path, table={"metrics": ["general/MMLU"]}, values=[60.0]) == "not run"


def test_another_order_of_the_same_recipe_counts_and_other_prompts_do_not(tmp_path):
    recipe = {"recipe": "migu/standard-order1"}
    same = {"tasks.stream": ["standard-order1", "standard-order1"]}
    assert judged(tmp_path, changed=same, table=recipe) == "reproduced"
    prompts = {"tasks.stream": ["standard-order1", "standard-order1:tasl"]}
    assert judged(tmp_path, changed=prompts, table=recipe) == "reduced"


def write(tmp_path, results, numbers) -> str:
    into = tmp_path / "out.md"
    into.write_text(f"before\n{BEGIN}\n{END}\nafter\n")
    write_ledger(results, into, numbers)
    text = into.read_text()
    assert text.startswith(f"before\n{BEGIN}\n") and text.endswith(f"\n{END}\nafter\n")
    return text


def row_of(text: str, *cells: str) -> list[str]:
    """The cells of the only table row that begins with these."""
    (found,) = [line for line in text.splitlines() if line.startswith("| " + " | ".join(cells) + " |")]
    return [cell.strip() for cell in found.strip("|").split("|")]


def test_a_mean_over_streams_is_judged_when_all_of_them_were_run(tmp_path):
    results = tmp_path / "results"
    for order, ap in ((1, 0.6), (2, 0.7)):
        stream = f"standard-order{order}"
        add_runs([a_run(tmp_path / stream, R=shifted(ap - 0.6), seed=s) for s in (1, 2)], results, group=stream)
        file = results / stream / "lora.json"
        data = json.loads(file.read_text()) | {"recipe_file": f"migu/{stream}"}
        data["stream"]["name"] = stream
        file.write_text(dump(data))
    table = {"columns": ["standard-order1", "mean"]}
    numbers = numbers_file(tmp_path / "n.yaml", table, values=[None, 65.5])
    assert row_of(write(tmp_path, results, numbers), "LoRA", "-", "65.5")[-1] == "reproduced"
    numbers = numbers_file(tmp_path / "n.yaml", table, values=[50, 67.0])
    assert row_of(write(tmp_path, results, numbers), "LoRA", "50", "67.0")[-1] == "failed"
    (results / "standard-order2" / "lora.json").unlink()
    assert (
        row_of(write(tmp_path, results, numbers), "LoRA", "50", "67.0")[-1]
        == "failed: standard-order1; not run: the others"
    )


# -- tables ------------------------------------------------------------------------------------------------------------


def two_methods(tmp_path, here=(0.6, 0.7), there=(60.0, 70.0), seeds=2) -> str:
    """The ledger of lora and ewc, on a smaller model than a paper's."""
    results = tmp_path / "results"
    for variant, ap in zip(("lora", "ewc"), here, strict=True):
        for seed in range(seeds):
            a_run(tmp_path / "runs", variant=variant, seed=seed, R=shifted(ap - 0.6 + 0.01 * seed))
    add_runs([tmp_path / "runs"], results, hardware="2 CPU cores")
    content = yaml.safe_load(numbers_file(tmp_path / "n.yaml").read_text())
    content["models"] = {"large": {"title": "Large", "names": ["org/large"]}}
    content["tables"][0] |= {
        "model": "large",
        "rows": [
            {"method": "LoRA", "values": [there[0]], "reduced": {"standard-order1": ["unit/lora"]}},
            {"method": "EWC", "values": [there[1]], "reduced": {"standard-order1": ["unit/ewc"]}},
            {"method": "GEM", "values": [10.25]},
        ],
    }
    (tmp_path / "n.yaml").write_text(yaml.safe_dump(content))
    return write(tmp_path, results, tmp_path / "n.yaml")


def test_tables_of_a_reduced_run(tmp_path):
    text = two_methods(tmp_path)
    assert row_of(text, "lora", "standard-order1 (3 tasks)") == [
        "lora", "standard-order1 (3 tasks)", "60.00 (A paper Table 1, Large)", "60.5 ± 0.7", "org/small, 8 rows",
        "0, 1", "2 CPU cores", "reduced",
    ]  # fmt: skip
    detail = row_of(text, "lora", "0, 1", "60.5 ± 0.7")
    assert detail[3:] == ["-25.0 ± 0.0", "25.0 ± 0.0", "77.2 ± 0.7", "1.1", "0123456"]
    assert "### org/small, standard-order1 (3 tasks), 8 rows a task" in text
    assert "a, b, c; 8 training and 100 evaluation rows a task; exact_match. Common to all: " in text
    common = (
        "model: name org/small, dtype float32; peft: r 8, target_modules q/v; training: learning_rate 0.001; data: "
    )
    assert common in " ".join(text.split()) and "disable_tqdm" not in text and "torch 2.13.0, peft 0.21.2" in text
    assert row_of(text, "GEM", "10.25")[-1] == "not run"
    assert row_of(text, "LoRA", "60.00")[-1] == "reduced"
    assert RULES in text


@pytest.mark.parametrize(
    ("here", "there", "expected"),
    [
        ((0.6, 0.7), (60.0, 70.0), ["1", "1", "0", "0", "-"]),
        ((0.7, 0.6), (60.0, 70.0), ["1", "0", "1", "0", "EWC behind LoRA"]),
        ((0.6, 0.605), (60.0, 70.0), ["1", "0", "0", "1", "-"]),
        ((0.6, 0.7), (60.0, 60.0), ["0", "0", "0", "0", "-"]),
    ],
)
def test_which_method_is_ahead(tmp_path, here, there, expected):
    text = two_methods(tmp_path, here, there)
    (row,) = [line for line in text.splitlines() if line.startswith("| A paper Table 1, Large | standard-order1 |")]
    assert [cell.strip() for cell in row.strip("|").split("|")][3:] == expected


def test_one_seed_tells_no_two_methods_apart(tmp_path):
    text = two_methods(tmp_path, seeds=1)
    (row,) = [line for line in text.splitlines() if line.startswith("| A paper Table 1, Large | standard-order1 |")]
    assert [cell.strip() for cell in row.strip("|").split("|")][3:7] == ["1", "0", "0", "1"]
    assert row_of(text, "lora", "0", "60.0")[1] == "0"  # the seed, and no ±


def test_runs_on_other_rows_stand_in_a_table_of_their_own(tmp_path):
    results = tmp_path / "results"
    add_runs([a_run(tmp_path / "x")], results)
    add_runs([a_run(tmp_path / "y", variant="ewc")], results)
    add_runs([a_run(tmp_path / "z", hashes="-other")], results, group="other", detail_only=True)
    text = ledger_text(read_results(results), read_numbers())
    assert text.count("### org/small, standard-order1 (3 tasks), 8 rows a task\n") == 1
    assert "### org/small, standard-order1 (3 tasks), 8 rows a task: other\n" in text
    methods = text[: text.index("### Which method is ahead")]
    assert methods.count("org/small, 8 rows") == 2  # not that of `other`


def test_a_joint_run_stands_with_those_that_are_scored_on_its_rows(tmp_path):
    results = tmp_path / "results"
    add_runs([a_run(tmp_path / "x")], results)
    joint = a_run(tmp_path / "y", variant="joint", R=[[0.9, 0.8, 0.7]], joint=True, recipe=recipe_of(joint=True))
    add_runs([joint], results)
    text = ledger_text(read_results(results), read_numbers())
    assert text.count("### org/small") == 1
    assert row_of(text, "joint", "42")[2:6] == ["80.0", "-", "-", "-"]


def test_what_is_missing_of_a_recipe_is_named(tmp_path):
    brought = load_recipe(recipe_files()["migu/smollm2-standard-order1"])
    own = {k: v for k, v in brought.items() if k not in ("variants", "seeds")} | {"joint": False, "trainer": None}
    add_runs([a_run(tmp_path / "x", recipe=own | {"methods": []})], tmp_path / "results")
    text = ledger_text(read_results(tmp_path / "results"), read_numbers())
    text = " ".join(text.split())
    assert "Not run of `recipes/migu/smollm2-standard-order1.yaml`: lora (seeds 43, 44); lora+migu; inclora;" in text


# -- the file and the command ------------------------------------------------------------------------------------------


def test_markers(tmp_path):
    add_runs([a_run(tmp_path / "runs")], tmp_path / "results")
    into = tmp_path / "x.md"
    for text, message in (
        ("none", f"has 0 lines {BEGIN}"),
        (f"{BEGIN}\n{BEGIN}\n{END}\n", f"has 2 lines {BEGIN}"),
        (f"{BEGIN}\n", f"has 0 lines {END}"),
        (f"{END}\n{BEGIN}\n", f"{END} comes before {BEGIN}"),
    ):
        into.write_text(text)
        with pytest.raises(InputError) as error:
            write_ledger(tmp_path / "results", into)
        assert message in str(error.value) and into.read_text() == text
    with pytest.raises(InputError, match="cannot be read"):
        write_ledger(tmp_path / "results", tmp_path / "absent.md")
    into.write_text(f"{BEGIN}\n{END}\n")
    with pytest.raises(InputError, match="no such directory"):
        write_ledger(tmp_path / "absent", into)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no result file"):
        write_ledger(tmp_path / "empty", into)


def test_command(tmp_path, capsys):
    a_run(tmp_path / "runs")
    a_run(tmp_path / "runs", seed=43, finished=False, cursor=1)
    results, into = str(tmp_path / "results"), tmp_path / "x.md"
    assert main(["ledger", "add", str(tmp_path / "runs"), "--results", results]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    add = ["ledger", "add", str(tmp_path / "runs"), "--results", results, "--skip_unfinished", "--hardware", "1 GPU"]
    assert main([*add, "--title", "Plain LoRA", "--note", "one", "--note", "two", "--model", "org/named"]) == 0
    assert "added: " in capsys.readouterr().out
    (result,) = read_results(results)
    assert result.title == "Plain LoRA" and result.data["notes"] == ["one", "two"]
    assert result.recipe["model"]["name"] == "org/named" and result.of_seeds("hardware") == ["1 GPU"]

    into.write_text(f"x\n{BEGIN}\nold\n{END}\n")
    write = ["ledger", "write", "--results", results, "--into", str(into)]
    assert main([*write, "--check"]) == 1 and into.read_text() == f"x\n{BEGIN}\nold\n{END}\n"
    assert "line 3: 'old', from the files 'Generated by" in capsys.readouterr().out
    assert main(write) == 0 and "wrote the ledger" in capsys.readouterr().out
    written = into.read_text()
    assert "Plain LoRA" in written and main([*write, "--check"]) == 0 and main(write) == 0
    assert into.read_text() == written
    assert main(["ledger"]) == 2 and main(["ledger", "write", "--colour", "red"]) == 2


def test_methods_md_is_what_the_result_files_give():
    difference = write_ledger(RESULTS, ROOT / "METHODS.md", check=True)
    assert difference is None, f"METHODS.md: run hf-continual ledger write ({difference})"


def test_committed_results_are_as_the_command_writes_them():
    results = read_results(RESULTS)
    assert len(results) >= 40
    for result in results:
        text = result.path.read_text(encoding="utf-8")
        assert text == dump(json.loads(text)), f"{result.path} was edited by hand"
        assert not any(place in text for place in ('"/', "/home", "/tmp", "/root")), result.path


def test_published_numbers_are_package_data():
    assert PAPER_NUMBERS.is_file() and PAPER_NUMBERS.parent.name == "ledger"
