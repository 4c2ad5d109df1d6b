from pathlib import Path

import pytest
from toy_runs import save_model, write_recipe, write_rows

from hf_continual import InputError
from hf_continual.recipes import (
    apply_overrides,
    expand,
    find_recipe,
    load_recipe,
    parse_overrides,
    parse_yaml,
    recipe_files,
    with_absolute_paths,
)
from hf_continual.training_args import make_training_args

BASE = {"model": {"name": "somewhere"}, "tasks": [{"name": "a", "path": "a.jsonl"}], "name": "r"}


def one(recipe, **overrides):
    return expand(recipe, Path("."), {k.replace("__", "."): v for k, v in overrides.items()})[0].recipe


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("1E3", 1000.0), ("-2.5e-3", -0.0025), ("3", 3), ("0.5", 0.5), ("1.", 1.0), ("e4", "e4"),
     ("true", True), ("no", "no"), ("on", "on"), ("null", None), ("1e-4x", "1e-4x"), ("[a, 1e1]", ["a", 10.0])],
)  # fmt: skip
def test_yaml_values(text, value):
    parsed = parse_yaml(text, "here")
    assert parsed == value and type(parsed) is type(value)


def test_precedence():
    assert one(BASE)["data"]["max_prompt_length"] == 512  # default
    assert one({**BASE, "data": {"max_prompt_length": 100}})["data"] == {
        "max_prompt_length": 100, "max_completion_length": 50,
        "block_size": None, "pack": True, "drop_last_block": True, "mlm_probability": 0.15,
    }  # fmt: skip
    recipe = {**BASE, "data": {"max_prompt_length": 100}, "variants": {"v": {"data": {"max_prompt_length": 90}}}}
    assert one(recipe)["data"]["max_prompt_length"] == 90  # a variant over the recipe
    assert one(recipe, data__max_prompt_length=80)["data"]["max_prompt_length"] == 80  # the command line over both


def test_overrides():
    words = ["--training.learning_rate", "1e-4", "--methods=[migu]", "--methods.0.threshold", "0.3", "--peft", "null"]
    overrides = parse_overrides(words)
    assert overrides == {"training.learning_rate": 1e-4, "methods": ["migu"], "methods.0.threshold": 0.3, "peft": None}
    recipe = apply_overrides({**BASE, "peft": {"r": 8}}, overrides)
    assert recipe["methods"] == [{"name": "migu", "threshold": 0.3}]
    assert recipe["training"] == {"learning_rate": 1e-4} and recipe["peft"] is None
    assert apply_overrides(BASE, {"tasks.0.path": "b"})["tasks"] == [{"name": "a", "path": "b"}]
    assert BASE["tasks"][0]["path"] == "a.jsonl"


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ({"modle": {}}, "'modle'; did you mean 'model'"),
        ({"model": {"nam": "x"}}, "'model.nam'; did you mean 'name'"),
        ({"peft": {"lora_alfa": 1}}, "'peft.lora_alfa'; did you mean 'lora_alpha'"),
        ({"training": {"learning_rat": 1}}, "training.learning_rat .*did you mean 'learning_rate'"),
        ({"methods": ["migo"]}, "'migo'; did you mean 'migu'"),
        ({"methods": [{"name": "migu", "treshold": 1}]}, "'treshold'; did you mean 'threshold'"),
        ({"tasks": [{"nme": "a"}]}, r"'tasks\.0\.nme'; did you mean 'name'"),
        ({"tasks": {"stream": "quickstart", "trainrows": 1}}, r"'tasks\.trainrows'; did you mean 'train_rows'"),
        ({"data": {"max_prompt_lenght": 1}}, "did you mean 'max_prompt_length'"),
        ({"evaluation": {"scorrer": 1}}, "did you mean 'scorer'"),
        ({"variants": {"v": {"methds": []}}}, r"'variants\.v\.methds'; did you mean 'methods'"),
    ],
)
def test_unknown_keys_name_the_nearest(recipe, said):
    with pytest.raises(InputError, match=said):
        one({**BASE, **recipe})


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"trainin.learning_rate": 1}, "no section 'trainin'; did you mean 'training'"),
        ({"methods.3.threshold": 1}, "no index of a list of 1"),
        ({"methods.x": 1}, "no index of a list of 1"),
        ({"data.max_prompt_lenght": 1}, "did you mean 'max_prompt_length'"),
    ],
)
def test_unknown_override(overrides, said):
    with pytest.raises(InputError, match=said):
        expand({**BASE, "methods": ["migu"]}, Path("."), overrides)


@pytest.mark.parametrize(
    ("words", "said"), [(["--seed"], "--seed has no value"), (["seed", "3"], "'seed' belongs to no option"),
                        (["--seed", "[1"], "the value of --seed is not valid YAML")],
)  # fmt: skip
def test_malformed_overrides(words, said):
    with pytest.raises(InputError, match=said):
        parse_overrides(words)


@pytest.mark.parametrize(
    "recipe",
    [
        {"training": {"learning_rate": "high"}}, {"training": {"bf16": "yes"}}, {"training": [1]},
        {"training": {"seed": 1}}, {"training": {"output_dir": "x"}}, {"peft": "lora"}, {"seeds": [1, "x"]},
        {"seeds": [1, 1]},
        {"seed": 1.5}, {"joint": 1}, {"tasks": "all"}, {"tasks": []}, {"tasks": {"train_rows": 3}}, {"model": None},
        {"model": {"name": 3}}, {"model": {"name": "x", "dtype": "int8"}}, {"variants": []}, {"variants": {"a/b": {}}},
        {"variants": {"v": 3}}, {"data": {"max_prompt_length": 0}}, {"evaluation": {"batch_size": "x"}},
        {"evaluation": {"unseen": 1}}, {"evaluation": {"scorer": "bleu"}}, {"methods": 3},
    ],
)  # fmt: skip
def test_values_that_cannot_be(recipe):
    with pytest.raises(InputError):
        one({**BASE, **recipe})


def test_variants_and_seeds(tmp_path):
    recipe = {**BASE, "run_dir": str(tmp_path), "seeds": [1, 2], "variants": {"a": {}, "b": {"methods": ["migu"]}}}
    runs = expand(recipe, tmp_path)
    assert [str(r.run_dir.relative_to(tmp_path)) for r in runs] == ["a/seed-1", "a/seed-2", "b/seed-1", "b/seed-2"]
    assert [(r.variant, r.seed, len(r.recipe["methods"])) for r in runs] == [
        ("a", 1, 0), ("a", 2, 0), ("b", 1, 1), ("b", 2, 1),
    ]  # fmt: skip
    assert [r.run_dir for r in expand({**BASE, "seed": 7}, tmp_path)] == [Path("runs/r")]
    assert [r.seed for r in expand({**BASE, "seeds": [1, 2]}, tmp_path, {"seeds": [9]})] == [9]


def test_training_defaults():
    args = make_training_args({"output_dir": "x"}, seq2seq=False)
    import torch

    assert args.dataloader_pin_memory is torch.cuda.is_available() and args.stop_on_nonfinite_loss
    assert args.report_to == []


def test_data_paths_start_at_the_recipe_then_here(tmp_path, monkeypatch):
    model = save_model(tmp_path / "model")
    path = write_recipe(tmp_path / "recipes", model)
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    run = expand(load_recipe(path), path.parent)[0]
    assert [t.name for t in run.tasks()] == ["a", "b"]
    write_rows(here / "local.jsonl", 2, rows=12)
    run = expand(load_recipe(path), path.parent, {"tasks.0.path": "local.jsonl"})[0]
    assert len(run.tasks()[0].train_dataset) == 9
    spec = with_absolute_paths({"name": "x", "path": "data/c.jsonl"}, path.parent)
    assert spec == {"name": "x", "path": str(path.parent / "data" / "c.jsonl")}


def test_recipes_of_the_package():
    assert {"quickstart", "migu/smollm2-standard-order1"} <= set(recipe_files())
    assert find_recipe("recipes/quickstart.yaml").name == "quickstart.yaml" and find_recipe("quickstart").is_file()
    with pytest.raises(InputError, match="did you mean 'quickstart'"):
        find_recipe("quickstrat")
