import builtins
import importlib.util
import json
import random

import numpy as np
import pytest
import torch
import yaml
from toy_runs import assert_same, make_queue, save_model, snapshot, write_recipe
from transformers import BertConfig, BertForMaskedLM

from hf_continual import TaskQueue, queue_evaluation
from hf_continual.cli import main
from hf_continual.errors import InputError
from hf_continual.evaluation import EvaluationConfig
from hf_continual.general_report import read_general_log
from hf_continual.lm_eval_probe import LmEvalProbe
from hf_continual.model_card import model_card
from hf_continual.report import write_report
from hf_continual.run_state import RunDirectory
from hf_continual.testing import VOCABULARY, tiny_model, toy_queue_options, toy_stream, toy_tokenizer

COLOURS = ["red", "blue", "green"]


@pytest.fixture
def folder(tmp_path):
    """Two tasks in the layout of lm-eval, with their data: one by likelihood, one by generation."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"question": f"w{i} w{i + 1} say", "answer": i % 3} for i in range(12)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"test": str(folder / "rows.jsonl"), "train": str(folder / "rows.jsonl")}
    shared = {"dataset_path": "json", "dataset_kwargs": {"data_files": data}, "test_split": "test",
              "doc_to_text": "{{question}} Answer :", "metadata": {"version": 1.0}}  # fmt: skip
    choice = {
        "task": "toy_colours", "output_type": "multiple_choice", "doc_to_choice": COLOURS, "doc_to_target": "answer",
        "fewshot_split": "train", "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    write = {
        "task": "toy_say", "output_type": "generate_until",
        "doc_to_target": "{{['red', 'blue', 'green'][answer]}}",
        "generation_kwargs": {"until": ["w1"], "max_gen_toks": 2, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    for task in (choice, write):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump({**shared, **task}))
    return folder


def probe_of(folder, **options):
    tasks = {"tasks": ["toy_colours", "toy_say"], "include_path": str(folder), **options}
    return LmEvalProbe(EvaluationConfig(lm_eval=tasks, batch_size=4))


def lm_queue(run, folder, name="full", **options):
    own = {"tasks": ["toy_colours"], "include_path": str(folder), "limit": 6, **options}
    return make_queue(run, name, options={"evaluation": {"lm_eval": own}})


# -- the live model --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize("lora", [False, True])
def test_the_live_model_is_scored_and_left_as_it_was(folder, kind, lora):
    model, tokenizer = tiny_model(kind, lora=lora, seed=3), toy_tokenizer()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # adapters that do something
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    model.train()
    model.config.use_cache = False
    before = {name: p.clone() for name, p in model.named_parameters()}
    random_states = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state())
    ticks = []
    probe = probe_of(folder)
    probe.check(model, tokenizer)
    found = probe.measure(model, tokenizer, None, lambda: ticks.append(1))
    assert model.training and model.config.use_cache is False and ticks
    assert tokenizer.padding_side == toy_tokenizer().padding_side
    assert random.getstate() == random_states[0] and np.random.get_state()[1].tolist() == random_states[1]
    assert torch.equal(torch.get_rng_state(), random_states[2])
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    # By hand: the most likely colour after each question.
    right, model = [], model.eval()
    for i in range(12):
        prompt = tokenizer(f"w{i} w{i + 1} say Answer :", return_tensors="pt", add_special_tokens=False).input_ids
        inputs = {"input_ids": prompt}
        if kind == "t5":
            inputs["decoder_input_ids"] = torch.zeros((1, 1), dtype=torch.long)
        with torch.no_grad():
            logits = model(**inputs).logits[0, -1]
        right.append(int(logits[tokenizer.convert_tokens_to_ids(COLOURS)].argmax()) == i % 3)
    assert found.values["scores"]["toy_colours"] == {"acc": sum(right) / 12}
    assert found.values["samples"] == {"toy_colours": 12, "toy_say": 12}
    assert set(found.values["scores"]["toy_say"]) == {"exact_match"}
    assert [row["task"] for row in found.details] == ["toy_colours", "toy_say"]


def test_limit_and_few_shot_examples_are_passed_on(folder):
    model, tokenizer = tiny_model(), toy_tokenizer()
    found = [
        probe_of(folder, tasks=["toy_colours"], limit=5, num_fewshot=shots).measure(model, tokenizer, None, int)
        for shots in (0, 2)
    ]
    assert [row["samples"] for each in found for row in each.details] == [5, 5]
    assert [row["num_fewshot"] for each in found for row in each.details] == [0, 2]


def test_no_second_model_is_loaded(folder, monkeypatch):
    probe = probe_of(folder, tasks=["toy_colours"], limit=2)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", pytest.fail)
    model = tiny_model(lora=True)
    seen = []
    model.register_forward_pre_hook(lambda *args: seen.append(1))
    probe.measure(model, toy_tokenizer(), None, lambda: None)
    assert seen


# -- in a queue ------------------------------------------------------------------------------------------------------


def test_a_queue_measures_before_and_after(folder, tmp_path, capsys):
    lm_queue(tmp_path / "run", folder).run()
    log = read_general_log(tmp_path / "run")
    assert [(row["after_task"], row["probe"]) for row in log] == [(None, "lm_eval"), ("toy1", "lm_eval")]
    before, after = (row["scores"]["toy_colours"]["acc"] for row in log)
    assert log[1]["delta"] == {"toy_colours_acc": pytest.approx(after - before)}
    assert f"after toy1: lm-eval: toy_colours acc {100 * after:.1f}" in capsys.readouterr().out
    report = write_report(tmp_path / "run").read_text()
    assert f" {100 * after:.1f} ({100 * (after - before):+.1f})" in report
    card = model_card(tmp_path / "run")
    assert "lm-evaluation-harness" in card.text
    results = {(r.dataset_type, r.metric_type): r.metric_value for r in card.data.eval_results}
    assert results["lm-eval/toy_colours", "acc"] == pytest.approx(after, abs=1e-6)


def test_every_task_beside_the_cheap_probe(folder, tmp_path):
    own = {"tasks": "toy_colours", "include_path": str(folder), "limit": 3, "when": "every_task"}
    make_queue(tmp_path / "run", options={"evaluation": {"lm_eval": own, "general": True}}).run()
    log = read_general_log(tmp_path / "run")
    assert [(row["probe"], row["after_task"]) for row in log] == [
        (probe, after) for probe in ("general", "lm_eval") for after in (None, "toy0", "toy1")
    ]


def test_a_longer_stream_is_measured_at_its_new_end(folder, tmp_path):
    lm_queue(tmp_path / "run", folder).run()
    own = {"tasks": ["toy_colours"], "include_path": str(folder), "limit": 6}
    make_queue(tmp_path / "run", "full", tasks=3, options={"evaluation": {"lm_eval": own}}).run()
    assert [row["after_task"] for row in read_general_log(tmp_path / "run")] == [None, "toy1", "toy2"]


def test_a_rejected_last_task_makes_the_one_before_the_last(folder, tmp_path, monkeypatch):
    original = queue_evaluation.evaluate_task

    def scripted(*args, description="", **kwargs):
        cell = original(*args, description=description, **kwargs)
        cell.score = 0.1 if description == "after toy1: scoring toy0" else 0.9
        return cell

    monkeypatch.setattr(queue_evaluation, "evaluate_task", scripted)
    own = {"tasks": ["toy_colours"], "include_path": str(folder), "limit": 3}
    options = toy_queue_options(num_train_epochs=1)
    options["evaluation"] |= {"lm_eval": own, "general": True}
    gate = {"max_forgetting": 0.05, "on_violation": "rollback"}
    result = TaskQueue(tmp_path / "run", tasks=toy_stream(2, rows=8, eval_rows=4), gate=gate, **options).run()
    assert result.tasks == ["toy0"]
    log = read_general_log(tmp_path / "run")
    assert [(row["probe"], row["after_task"]) for row in log] == [
        (probe, after) for probe in ("general", "lm_eval") for after in (None, "toy0")
    ]


def test_measuring_does_not_change_what_is_learnt(folder, tmp_path):
    make_queue(tmp_path / "plain", "stack").run()
    lm_queue(tmp_path / "measured", folder, "stack").run()
    measured = {name: value for name, value in snapshot(tmp_path / "measured").items() if "/general/" not in name}
    assert_same(tmp_path / "plain", measured)


def test_changed_task_files_are_refused(folder, tmp_path):
    lm_queue(tmp_path / "run", folder).run()
    path = folder / "toy_colours.yaml"
    path.write_text(path.read_text().replace("Answer :", "say :"))
    with pytest.raises(InputError, match="was measured with another include_sha256"):
        lm_queue(tmp_path / "run", folder).run()


def test_a_recipe_names_a_folder_beside_it(folder, tmp_path, capsys):
    save_model(tmp_path / "model")
    own = {"tasks": ["toy_colours"], "include_path": "tasks", "limit": 2}
    path = write_recipe(tmp_path, tmp_path / "model", evaluation={"max_new_tokens": 2, "lm_eval": own})
    assert main(["run", str(path)]) == 0
    assert "lm-eval (in brackets: change against the base model)" in capsys.readouterr().out
    assert RunDirectory(tmp_path / "run").read_recipe()["evaluation"]["lm_eval"]["include_path"] == "tasks"


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("arc", r"evaluation\.lm_eval='arc' must be a mapping"),
        ({}, r"evaluation\.lm_eval\.tasks=None must be a list of names"),
        ({"tasks": []}, r"evaluation\.lm_eval\.tasks=\[\] must be a list of names"),
        ({"tasks": ["a"], "limits": 2}, r"unknown key 'evaluation\.lm_eval\.limits'; did you mean 'limit'"),
        ({"tasks": ["a"], "limit": 0}, r"evaluation\.lm_eval\.limit=0 must be a whole number, at least 1"),
        ({"tasks": ["a"], "num_fewshot": 1.5}, r"evaluation\.lm_eval\.num_fewshot=1\.5 must be a whole number"),
        ({"tasks": ["a"], "batch_size": None}, r"evaluation\.lm_eval\.batch_size=None must be a whole number"),
        ({"tasks": ["a"], "batch_size": "auto"}, r"evaluation\.lm_eval\.batch_size='auto' must be a whole number"),
        ({"tasks": ["a"], "when": "before"}, r"when='before' is unknown; did you mean 'before_after'"),
        ({"tasks": ["a"], "include_path": 3}, r"evaluation\.lm_eval\.include_path=3 must be a folder"),
        ({"tasks": ["a"], "include_path": "none"}, r"evaluation\.lm_eval\.include_path=none: there is no such folder"),
    ],
)
def test_bad_options(options, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=sentence):
        make_queue(tmp_path / "run", options={"evaluation": {"lm_eval": options}})


@pytest.mark.slow
def test_an_unknown_task_is_named_before_training(folder, tmp_path, capsys):
    save_model(tmp_path / "model")
    own = {"tasks": ["toy_color"], "include_path": str(folder)}
    path = write_recipe(tmp_path, tmp_path / "model", evaluation={"lm_eval": own})
    assert main(["run", str(path)]) == 2
    error = capsys.readouterr().err
    assert error == (
        f"error: evaluation.lm_eval.tasks: 'toy_color' is no task of lm-eval nor of include_path={folder}; did you "
        "mean 'toy_colours'?\n"
    )
    assert not (tmp_path / "run/queue.json").exists()


def test_data_that_is_missing_is_named_before_training(folder, tmp_path):
    (folder / "rows.jsonl").unlink()
    with pytest.raises(InputError, match=r"tasks=\['toy_colours'\]: their definition or data cannot be loaded"):
        lm_queue(tmp_path / "run", folder).run()
    assert not (tmp_path / "run/queue.json").exists()


def test_tasks_that_run_code_are_refused(folder):
    path = folder / "toy_say.yaml"
    path.write_text(path.read_text() + "unsafe_code: true\n")
    with pytest.raises(InputError, match="'toy_say' runs code that the model has written"):
        probe_of(folder).check(tiny_model(), toy_tokenizer())


def test_masked_models_are_refused(folder):
    config = BertConfig(vocab_size=VOCABULARY, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                        num_attention_heads=2)  # fmt: skip
    with pytest.raises(InputError, match="lm-eval has no masked language models such as BertForMaskedLM"):
        probe_of(folder).check(BertForMaskedLM(config), toy_tokenizer())
    with pytest.raises(InputError, match="evaluation.lm_eval: BertForSequenceClassification has no language-model"):
        probe_of(folder).check(tiny_model("bert"), toy_tokenizer())


def test_without_lm_eval_one_sentence_says_what_to_install(folder, tmp_path, monkeypatch, capsys):
    save_model(tmp_path / "model")
    own = {"tasks": ["toy_colours"], "include_path": str(folder)}
    path = write_recipe(tmp_path, tmp_path / "model", evaluation={"lm_eval": own})
    find, imported = importlib.util.find_spec, builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "lm_eval":
            raise ModuleNotFoundError(name)
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "lm_eval" else find(name, *a))
    monkeypatch.setattr(builtins, "__import__", without)
    for flags in ([], ["--dry_run"]):
        assert main(["run", str(path), *flags]) == 2
        assert 'not installed; run `pip install "hf_continual[eval]"`' in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
