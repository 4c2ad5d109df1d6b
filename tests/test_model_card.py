import json

import pytest
import yaml
from huggingface_hub import HfApi, ModelCard
from toy_runs import make_queue, save_model, write_recipe
from transformers import AutoModelForCausalLM

from hf_continual.cli import main
from hf_continual.errors import InputError
from hf_continual.general_report import read_general_log
from hf_continual.merging import push_merged, write_merged
from hf_continual.model_card import TAGS, model_card, stream_label
from hf_continual.run_scores import load_run
from hf_continual.run_state import RunDirectory


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of a recipe, its scores set by hand so that they can be recognised."""
    folder = tmp_path_factory.mktemp("card")
    save_model(folder / "model")
    path = write_recipe(
        folder, folder / "model", name="toy recipe", evaluation={"max_new_tokens": 2, "general": True},
        methods=[{"name": "migu", "threshold": 0.6}, {"name": "replay", "ratio": 0.5}], seed=7,
    )  # fmt: skip
    assert main(["run", str(path)]) == 0
    run = folder / "run"
    rows = [json.loads(line) for line in (run / "scores.jsonl").read_text().splitlines()]
    for row, score in zip(rows, (0.75, 0.5, 0.25), strict=True):  # a after a, a after b, b after b
        row["score"] = score
    (run / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def results_of(card):
    return {(r.dataset_name, r.metric_type): r.metric_value for r in card.data.eval_results}


def test_the_card_says_what_was_learnt_and_forgotten(run):
    card = model_card(run)
    text, queue = card.text, RunDirectory(run).read_queue()
    for part in (
        "# toy recipe", f"`{run.parent / 'model'}`", "Seed: 7", "name: migu", "threshold: 0.6", "ratio: 0.5",
        "r: 2", "lora_alpha: 4", "learning_rate: 0.05", "exact_match", "| average performance (AP) |      37.5 |",
        "| backward transfer (BWT)  |     -25.0 |", "license: unknown", "hf_continual 0.1.0",
        queue["git"] or "hf_continual", queue["recipe_sha256"][:12],
    ):  # fmt: skip
        assert part in text or part in card.content, part
    assert all(entry["hash"][:12] in text for entry in queue["tasks"])
    last = read_general_log(run)[-1]
    cells = ["b", f"{last['perplexity']:.2f}", f"{last['delta']['loss']:+.3f}", f"{last['right']}/60"]
    assert any([c.strip() for c in line.strip("|").split("|")] == cells for line in text.splitlines())


def test_the_metadata_are_what_the_hub_reads(run):
    card = ModelCard(str(model_card(run)))  # as the hub reads it
    assert card.data.tags[:2] == TAGS == ["hf_continual", "continual-learning"]
    assert card.data.tags[2:] == ["migu", "replay"]
    assert card.data.license == "unknown" and card.data.pipeline_tag == "text-generation"
    assert card.data.base_model is None  # a local folder is no repository of the hub
    found, last = results_of(card), read_general_log(run)[-1]
    assert found["a", "exact_match"] == 0.5 and found["b", "exact_match"] == 0.25
    label = stream_label(load_run(run), RunDirectory(run).read_queue()).replace(" ", "-")
    whole = f"all tasks of {label}"
    assert found[whole, "average_performance"] == 0.375 and found[whole, "backward_transfer"] == -0.25
    assert found[whole, "forgetting"] == 0.25
    assert found["general text and prompts", "perplexity"] == pytest.approx(last["perplexity"], abs=1e-6)
    assert found["general text and prompts", "accuracy"] == pytest.approx(last["accuracy"], abs=1e-6)


def test_a_card_of_an_earlier_task_ends_there(run):
    card = model_card(run, "a", name="mine")
    assert "# mine" in card.text and "a (" in card.text and "b (" not in card.text
    found = results_of(card)
    assert found["a", "exact_match"] == 0.75 and ("b", "exact_match") not in found
    assert [line.split("|")[1].strip() for line in card.text.splitlines() if "/60" in line] == ["base model", "a"]
    assert found["general text and prompts", "perplexity"] == pytest.approx(
        read_general_log(run)[1]["perplexity"], abs=1e-6
    )
    with pytest.raises(InputError, match="task 'c' is not one of this run"):
        model_card(run, "c")


def test_a_hub_model_and_a_named_stream_are_linked(run, tmp_path):
    copy = tmp_path / "run"
    copy.mkdir()
    for file in ("queue.json", "scores.jsonl", "recipe.yaml"):
        (copy / file).write_bytes((run / file).read_bytes())
    recipe = yaml.safe_load((copy / "recipe.yaml").read_text())
    recipe["model"]["name"] = "someone/some-model"
    (copy / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    queue = json.loads((copy / "queue.json").read_text())
    queue["stream"] = {"name": "superni-15", "hash": "0123456789abcdef"}
    (copy / "queue.json").write_text(json.dumps(queue))
    card = ModelCard(str(model_card(copy)))
    assert card.data.base_model == "someone/some-model"
    assert "superni-15@0123456789ab" in card.text and "General ability" not in card.text
    assert {r.dataset_type for r in card.data.eval_results} == {
        "superni-15@0123456789ab", "superni-15@0123456789ab/a", "superni-15@0123456789ab/b",
    }  # fmt: skip


def test_merge_writes_the_card_beside_the_model(run, tmp_path, capsys):
    assert main(["merge", str(run), "-o", str(tmp_path / "my-model")]) == 0
    assert "and its model card" in capsys.readouterr().out
    card = ModelCard.load(tmp_path / "my-model/README.md")
    assert card.data.model_name == "my-model" and results_of(card)["a", "exact_match"] == 0.5
    AutoModelForCausalLM.from_pretrained(tmp_path / "my-model")


def test_runs_from_python_joint_runs_and_full_models_have_cards(tmp_path):
    make_queue(tmp_path / "full", "full").run()
    write_merged(tmp_path / "full", tmp_path / "out")
    card = ModelCard.load(tmp_path / "out/README.md")
    assert "peft: full fine-tuning" in card.text and card.data.tags[2:] == ["migu"]
    make_queue(tmp_path / "t5", "t5").run()
    assert model_card(tmp_path / "t5", pipeline="text2text-generation").data.pipeline_tag == "text2text-generation"
    queue = make_queue(tmp_path / "joint")
    queue.joint = True
    queue.run()
    card = model_card(tmp_path / "joint")
    assert "after learning all at once: toy0, toy1" in card.text and len(results_of(card)) == 3


def test_a_card_of_an_independent_run_is_of_one_model(tmp_path):
    queue = make_queue(tmp_path / "run")
    queue.independent = True
    queue.run()
    card = model_card(tmp_path / "run")
    assert "after learning toy1 alone (the run has a model of its own for each task)" in card.text
    assert {metric for _, metric in results_of(card)} == {"exact_match"}


def test_a_run_that_has_learnt_nothing_has_no_card(run, tmp_path):
    copy = tmp_path / "run"
    copy.mkdir()
    queue = json.loads((run / "queue.json").read_text())
    (copy / "queue.json").write_text(json.dumps({**queue, "cursor": 0, "finished": False}))
    (copy / "recipe.yaml").write_bytes((run / "recipe.yaml").read_bytes())
    with pytest.raises(InputError, match="has learnt no task yet"):
        model_card(copy)


def test_pushing_uploads_the_folder_with_its_card(run, tmp_path, monkeypatch, capsys):
    calls = []

    class Repo(str):
        repo_id = "me/mine"

    def create(self, repo_id, private, exist_ok):
        calls.append((repo_id, private, exist_ok))
        return Repo("https://hub.example/me/mine")

    def upload(self, *, repo_id, folder_path, commit_message):
        calls.append((repo_id, sorted(p.name for p in (tmp_path / "out").iterdir())))

    monkeypatch.setattr(HfApi, "create_repo", create)
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    assert main(["merge", str(run), "-o", str(tmp_path / "out"), "--push_to_hub", "mine"]) == 0
    assert calls[0] == ("mine", True, True) and calls[1][0] == "me/mine"
    assert {"README.md", "model.safetensors", "config.json"} <= set(calls[1][1])
    assert "uploaded to https://hub.example/me/mine" in capsys.readouterr().out


def test_a_hub_that_cannot_be_reached_leaves_the_folder(run, tmp_path, capsys):
    """The tests run offline."""
    assert main(["merge", str(run), "-o", str(tmp_path / "out"), "--push_to_hub", "me/mine"]) == 2
    assert "--push_to_hub me/mine: the hub did not take it" in capsys.readouterr().err
    assert (tmp_path / "out/README.md").is_file()
    with pytest.raises(InputError, match="--push_to_hub no such/name/here"):
        push_merged(tmp_path / "out", "no such/name/here")


def test_fusing_stored_weights_pushes_nothing(capsys):
    words = ["merge", "--method", "kif", "--previous", "a", "--current", "b", "-o", "c", "--push_to_hub", "me/mine"]
    assert main(words) == 2
    assert "leave out the run, --task and --push_to_hub" in capsys.readouterr().err
