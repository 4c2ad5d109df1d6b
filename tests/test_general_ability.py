import json
import math
import os
import queue
import signal
import threading

import numpy as np
import pytest
import torch
from toy_runs import assert_same, make_queue, save_model, snapshot, write_recipe
from transformers import BertConfig, BertForMaskedLM, TrainerCallback
from transformers.integrations import integration_utils

from hf_continual import general_ability
from hf_continual.cli import main
from hf_continual.distributed import Processes
from hf_continual.errors import InputError
from hf_continual.evaluation import EvaluationConfig
from hf_continual.general_ability import (
    FILES,
    GeneralData,
    answer_sequence,
    load_general,
    measure_general,
    on_main_patiently,
    text_sequences,
    token_scores,
)
from hf_continual.general_report import (
    comparison_table,
    general_line,
    general_text,
    lm_eval_comparison,
    read_general_log,
)
from hf_continual.plots import plot_matrix
from hf_continual.report import write_report
from hf_continual.run_scores import RunScores
from hf_continual.run_state import RunDirectory
from hf_continual.testing import VOCABULARY, tiny_model, toy_tokenizer
from hf_continual.tokenization import encode_prompt

WORDS = "red blue green dog cat bird one two three w1 w2 w3 w4 w5 w6 w7"
PASSAGES = (WORDS, "dog cat w9 w8", "one")
PROMPTS = (
    {"id": "1", "kind": "colours", "prompt": "w1 say", "options": ["red", "blue", "green dog"], "answer": "blue"},
    {"id": "2", "kind": "colours", "prompt": "w2 w3 say", "options": ["red", "blue"], "answer": "red"},
    {"id": "3", "kind": "open", "prompt": "w4 w5", "answer": "one two"},
)
DATA = GeneralData(PASSAGES, PROMPTS, {"text": "t", "prompts": "p"})
OWN = {"general": True}


def masked_model(**changes):
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=32, **changes,
    )  # fmt: skip
    torch.manual_seed(0)
    return BertForMaskedLM(config)


def masked_tokenizer():
    tokenizer = toy_tokenizer()
    tokenizer.mask_token = "w69"
    return tokenizer


def ids_of(text):
    return toy_tokenizer()(text, add_special_tokens=False)["input_ids"]


def log_probabilities(model, **inputs):
    with torch.no_grad():
        return model.eval()(**{k: torch.tensor([v]) for k, v in inputs.items()}).logits[0].double().log_softmax(-1)


# -- the files of the package ----------------------------------------------------------------------------------------


def test_the_packaged_files_are_frozen_and_sound():
    """Another text would be another measure: a change needs new files, not an edit of these."""
    data = load_general(True)
    assert data.hashes == {
        "text": "8c570c0885f7962cca02f871113410e4d5185ac54ca5885ba9829d3d6ab9f491",
        "prompts": "1d75cdc5507eb5fad9c6673ba64976754aba07080bfa1ebd3c271d04683ede22",
    }
    assert 1500 < sum(len(p.split()) for p in data.passages) < 2500 and len(data.prompts) == 60
    assert len({row["kind"] for row in data.prompts}) == 7
    for row in data.prompts:
        options = row.get("options", [row["answer"]])
        # The likelihood of what an option begins with is never smaller than its own.
        assert not any(a != b and b.startswith(a) for a in options for b in options if " " in a), row["id"]
    places = [row["options"].index(row["answer"]) for row in data.prompts if len(row.get("options", [])) == 4]
    assert max(places.count(place) for place in range(4)) < len(places) / 2  # the first option is no safe guess


# -- the numbers -----------------------------------------------------------------------------------------------------


def test_a_decoder_reads_each_passage_from_its_beginning():
    model = tiny_model()
    found = measure_general(model, toy_tokenizer(), DATA).values
    total, count = 0.0, 0
    for passage in PASSAGES[:2]:  # of a single token without a beginning-of-text token nothing is predicted
        ids = ids_of(passage)
        logs = log_probabilities(model, input_ids=ids)
        total += sum(float(logs[i, ids[i + 1]]) for i in range(len(ids) - 1))
        count += len(ids) - 1
    assert found["tokens"] == count == 18
    assert found["loss"] == pytest.approx(-total / count, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(-total / count), rel=1e-5)


def test_an_encoder_decoder_is_asked_for_the_second_half():
    model = tiny_model("t5")
    found = measure_general(model, toy_tokenizer(), DATA).values
    total, count = 0.0, 0
    for passage in PASSAGES[:2]:
        ids = ids_of(passage)
        source, target = ids[: len(ids) // 2], ids[len(ids) // 2 :]
        logs = log_probabilities(model, input_ids=source, decoder_input_ids=[0, *target[:-1]])
        total += sum(float(logs[i, token]) for i, token in enumerate(target))
        count += len(target)
    assert found["tokens"] == count == 10 and found["loss"] == pytest.approx(-total / count, rel=1e-5)


def test_a_masked_model_predicts_every_token_once():
    model, tokenizer = masked_model(), masked_tokenizer()
    pieces = text_sequences([WORDS], tokenizer, "masked", 32, 0)
    assert sorted(place for piece in pieces for place in piece.positions) == list(range(16))
    found = measure_general(model, tokenizer, DATA).values
    total, count = 0.0, 0
    for passage in PASSAGES:
        ids = ids_of(passage)
        for offset in range(min(7, len(ids))):
            hidden = range(offset, len(ids), 7)
            logs = log_probabilities(model, input_ids=[tokenizer.mask_token_id if i in hidden else t
                                                       for i, t in enumerate(ids)])  # fmt: skip
            total += sum(float(logs[i, ids[i]]) for i in hidden)
        count += len(ids)
    assert found["tokens"] == count == 21 and found["loss"] == pytest.approx(-total / count, rel=1e-5)


def test_long_passages_are_read_in_pieces_that_the_model_can_take():
    model, tokenizer = masked_model(), masked_tokenizer()
    text = " ".join(f"w{i}" for i in range(69))
    assert measure_general(model, tokenizer, GeneralData((text,), PROMPTS, {})).settings["max_tokens"] == 32
    pieces = text_sequences([text], tokenizer, "causal", 32, 0)
    assert [len(piece.ids) for piece in pieces] == [31, 31, 4]
    assert sum(len(piece.gold) for piece in pieces) == 69 - 3


@pytest.mark.parametrize("kind", ["llama", "t5", "masked"])
def test_the_most_likely_option_answers_and_an_open_answer_must_be_greedy(kind):
    model = masked_model() if kind == "masked" else tiny_model(kind)
    tokenizer = masked_tokenizer() if kind == "masked" else toy_tokenizer()
    found = measure_general(model, tokenizer, DATA)

    def likelihood(prompt, answer):
        target = ids_of(answer)
        if kind == "masked":
            logs = log_probabilities(model, input_ids=ids_of(prompt) + [tokenizer.mask_token_id] * len(target))
            logs = logs[-len(target) :]
        elif kind == "t5":
            logs = log_probabilities(model, input_ids=ids_of(prompt), decoder_input_ids=[0, *target[:-1]])
        else:
            logs = log_probabilities(model, input_ids=ids_of(prompt) + target[:-1])[len(ids_of(prompt)) - 1 :]
        total = sum(float(logs[i, t]) for i, t in enumerate(target))
        return total / len(target) if kind == "masked" else total, logs.argmax(-1).tolist() == target

    for row, detail in zip(PROMPTS, found.details, strict=True):
        own = [likelihood(row["prompt"], option) for option in row.get("options", [row["answer"]])]
        assert detail["log_likelihood"] == pytest.approx([value for value, _ in own], abs=1e-4)
        if "options" in row:
            assert detail["choice"] == row["options"][max(range(len(own)), key=lambda k: own[k][0])]
            assert detail["right"] == (detail["choice"] == row["answer"])
        else:
            assert detail["right"] == own[0][1]
    right = sum(detail["right"] for detail in found.details)
    assert found.values["right"] == right and found.values["accuracy"] == right / 3
    assert {kind: of for kind, (_, of) in found.values["kinds"].items()} == {"colours": 2, "open": 1}


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_an_open_answer_is_right_when_generation_would_begin_with_it(kind):
    model, tokenizer = tiny_model(kind), toy_tokenizer()
    ids = encode_prompt("w1 w2 say", tokenizer, 64, kind == "t5")
    new = model.generate(torch.tensor([ids]), max_new_tokens=2, min_new_tokens=2, do_sample=False)
    words = tokenizer.convert_ids_to_tokens(new[0][-2:].tolist())
    assert "</s>" not in words
    row = {"id": "1", "kind": "k", "prompt": "w1 w2 say"}
    other = "red dog" if words != ["red", "dog"] else "dog red"
    for answer, right in ((" ".join(words), True), (other, False)):
        data = GeneralData(PASSAGES, ({**row, "answer": answer},), {})
        assert measure_general(model, tokenizer, data).values["right"] == right


@pytest.mark.parametrize("kind", ["llama", "t5", "masked"])
def test_batches_and_shared_prompts_change_nothing(kind):
    model = masked_model() if kind == "masked" else tiny_model(kind)
    tokenizer = masked_tokenizer() if kind == "masked" else toy_tokenizer()
    alone, together = (measure_general(model, tokenizer, DATA, size) for size in (1, 16))
    assert alone.values["loss"] == pytest.approx(together.values["loss"], rel=1e-5)
    for a, b in zip(alone.details, together.details, strict=True):
        assert a["log_likelihood"] == pytest.approx(b["log_likelihood"], abs=1e-4)


def test_what_the_model_reads_twice_is_read_once():
    model, tokenizer, seen = tiny_model(), toy_tokenizer(), []
    model.register_forward_pre_hook(lambda m, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True)
    pieces = [
        answer_sequence("w1 w2", word, tokenizer, "causal", 64, 0) for word in ("red", "blue", "green", "dog cat")
    ]
    with torch.no_grad():
        scores = token_scores(model.eval(), pieces, 0, 16)
    assert sum(seen) == 2 and len({score.log_likelihood for score in scores}) == 4


def test_the_model_is_left_as_it_was():
    model = tiny_model(lora=True)
    model.train()
    model.gradient_checkpointing_enable()
    before = {name: p.clone() for name, p in model.named_parameters()}
    numbers = torch.get_rng_state()
    measure_general(model, toy_tokenizer(), DATA)
    assert model.training and torch.equal(torch.get_rng_state(), numbers) and model.config.use_cache
    assert any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())


def test_a_broken_model_has_an_infinite_perplexity(tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e6)
        model.model.norm.weight.mul_(1e6)
    found = measure_general(model, toy_tokenizer(), DATA)
    assert found.values["perplexity"] == math.inf and found.values["loss"] > 700


# -- in a queue ------------------------------------------------------------------------------------------------------


def general_queue(folder, **options):
    return make_queue(folder, "full", options={"evaluation": OWN}, **options)


def test_a_queue_measures_before_the_first_task_and_after_each(tmp_path, capsys):
    general_queue(tmp_path / "run").run()
    log = read_general_log(tmp_path / "run")
    assert [row["after_task"] for row in log] == [None, "toy0", "toy1"]
    assert "delta" not in log[0]
    for row in log[1:]:
        assert row["delta"]["loss"] == pytest.approx(row["loss"] - log[0]["loss"]) and row["delta"]["loss"] != 0
        assert row["delta"]["accuracy"] == pytest.approx(row["accuracy"] - log[0]["accuracy"])
        assert row["hashes"] == load_general(True).hashes
    said = capsys.readouterr().out
    assert f"after no task: perplexity {log[0]['perplexity']:.2f}, {log[0]['right']} of 60 prompts right" in said
    details = (tmp_path / "run/tasks/01-toy1/general/general.jsonl").read_text().splitlines()
    assert len(details) == 60 and sum(json.loads(line)["right"] for line in details) == log[2]["right"]
    kept = json.loads((tmp_path / "run/base/general/general.json").read_text())
    assert kept["settings"]["mode"] == "causal" and kept["seconds"] > 0
    report = write_report(tmp_path / "run").read_text()
    assert "## General ability" in report
    for row, delta in zip(log, ["-", *(f"{row['delta']['loss']:+.3f}" for row in log[1:])], strict=True):
        name = row["after_task"] or "base model"
        cells = [name, f"{row['perplexity']:.2f}", delta, f"{row['right']}/60"]
        assert any([c.strip() for c in line.strip("|").split("|")] == cells for line in report.splitlines()), cells
    assert not (tmp_path / "run/work").exists()


def test_a_comparison_has_a_row_for_each_variant(tmp_path):
    def log(folder, losses, text="t"):
        rows = []
        for index, (loss, right) in enumerate(losses, -1):
            row = {
                "after_task": None if index < 0 else "a", "after_index": index, "probe": "general", "loss": loss,
                "perplexity": math.exp(loss), "right": right, "prompts": 20, "accuracy": right / 20, "kinds": {},
                "hashes": {"text": text, "prompts": "p"},
            }  # fmt: skip
            rows.append(row if index < 0 else {**row, "delta": {"loss": loss - losses[0][0], "accuracy": 0.0}})
        folder.mkdir(parents=True)
        (folder / "general.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return RunScores(
            folder, folder.parent.name, int(folder.name[-1]), ["a"], ["a"], np.array([[0.5]]), None, {}, True, 1
        )

    runs = [log(tmp_path / "migu/seed-1", [(1.0, 10), (1.5, 8)]), log(tmp_path / "migu/seed-2", [(1.0, 10), (1.7, 6)]),
            log(tmp_path / "naive/seed-1", [(1.0, 10), (3.0, 5)])]  # fmt: skip
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in comparison_table(runs, "github").splitlines()]
    assert ["migu", "2", "2.72", "4.98", "+0.600 ± 0.141", "50.0 ± 0.0", "35.0 ± 7.1"] in rows
    assert ["naive", "1", "2.72", "20.09", "+2.000", "50.0", "25.0"] in rows and len(rows) == 4
    runs.append(log(tmp_path / "other/seed-1", [(1.0, 10), (3.0, 5)], text="another"))
    assert "measured with different texts or prompts" in comparison_table(runs)
    runs[2].independent = True  # its last model has learnt one task
    assert "naive" not in comparison_table(runs)
    line = general_line(read_general_log(runs[0].path))
    assert line == "general ability: perplexity 2.72 to 4.48, prompts right 10 to 8 of 20"
    assert general_line(read_general_log(runs[0].path)[1:]) == ""
    plot_matrix(runs[0], tmp_path / "with.png")
    (runs[0].path / "general.jsonl").unlink()
    plot_matrix(runs[0], tmp_path / "without.png")
    assert (tmp_path / "with.png").read_bytes() != (tmp_path / "without.png").read_bytes()


def test_lm_eval_of_several_variants(tmp_path):
    """Without the cheap probe, too: a table of its own, and no empty one of the probe."""
    runs = []
    for label, seed, pairs in (("migu", 1, (0.5, 0.4)), ("migu", 2, (0.5, 0.6)), ("naive", 1, (0.5, 0.1))):
        folder = tmp_path / label / f"seed-{seed}"
        folder.mkdir(parents=True)
        rows = [
            {"after_task": None if i else "a", "after_index": -i, "probe": "lm_eval", "samples": {"arc": 4},
             "scores": {"arc": {"acc": value}, "text": {"ppl": 10 * value + 5}}}
            for i, value in zip((1, 0), pairs, strict=True)
        ]  # fmt: skip
        (folder / "general.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        runs.append(RunScores(folder, label, seed, ["a"], ["a"], np.array([[0.5]]), None, {}, True, 1))
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in lm_eval_comparison(runs, "github").splitlines()]
    assert ["variant", "seeds", "arc acc", "text ppl"] in rows
    assert ["migu", "2", "50.0 -> 50.0 (+0.0)", "10.00 -> 10.00 (+0.0)"] in rows
    assert ["naive", "1", "50.0 -> 10.0 (-40.0)", "10.00 -> 6.00 (-4.0)"] in rows
    text = general_text(runs, single=False)
    assert "lm-eval, before -> after" in text and "perplexity" not in text and "do not compare" not in text
    log = runs[2].path / "general.jsonl"
    log.write_text(log.read_text().replace('"arc": 4', '"arc": 5'))
    assert "do not compare" in lm_eval_comparison(runs)


def test_a_damaged_log_is_named(tmp_path):
    for text, reason in (("{", "line 1"), ('{"after_index": -1, "probe": "general", "loss": 1.0}', "perplexity")):
        (tmp_path / "general.jsonl").write_text(text + "\n")
        with pytest.raises(InputError, match=f"{reason}.* continue the run, which writes it anew"):
            read_general_log(tmp_path)


def test_measuring_does_not_change_what_is_learnt(tmp_path):
    make_queue(tmp_path / "plain", "stack").run()
    make_queue(tmp_path / "measured", "stack", options={"evaluation": OWN}).run()
    plain, measured = snapshot(tmp_path / "plain"), snapshot(tmp_path / "measured")
    measured = {name: value for name, value in measured.items() if "/general/" not in name}
    assert_same(tmp_path / "plain", measured)
    assert any(name.endswith(".safetensors") for name in plain)


def _die(when):
    """Kill the process before one of its results is written."""
    original = RunDirectory.write_general

    def replaced(self, after, probe, measured, seconds):
        if (after and after.name) == when:
            lines = "".join(json.dumps(row) + "\n" for row in measured.details)
            path = self.general_file(after, probe).with_suffix(".jsonl")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(lines[: len(lines) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        original(self, after, probe, measured, seconds)

    RunDirectory.write_general = replaced


def _killed_child(folder, when):
    torch.set_num_threads(1)
    _die(when)
    general_queue(folder).run()


@pytest.mark.slow
def test_a_run_that_is_killed_while_measuring_goes_on_to_the_same_numbers(tmp_path):
    import multiprocessing

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hf_continual.task_queue", "hf_continual.testing"])
    for when in (None, "toy0", "toy1"):  # one after another, in one run
        child = context.Process(target=_killed_child, args=(tmp_path / "run", when))
        child.start()
        child.join(200)
        assert child.exitcode == -signal.SIGKILL
    general_queue(tmp_path / "run").run()
    general_queue(tmp_path / "whole").run()
    assert_same(tmp_path / "run", tmp_path / "whole")
    assert (tmp_path / "run/general.jsonl").read_text() == (tmp_path / "whole/general.jsonl").read_text()


def test_a_result_that_was_deleted_is_measured_again_and_an_edited_one_refused(tmp_path):
    run = tmp_path / "run"
    general_queue(run).run()
    before = (run / "general.jsonl").read_text()
    for file in ("base/general/general.json", "tasks/00-toy0/general/general.json"):
        (run / file).unlink()
    (run / "general.jsonl").unlink()
    general_queue(run).run()
    assert (run / "general.jsonl").read_text() == before
    path = run / "tasks/00-toy0/general/general.json"
    path.write_text(path.read_text().replace('"toy0"', '"toy1"'))
    with pytest.raises(InputError, match=r"general\.json is truncated or was edited; delete it and run again"):
        general_queue(run).run()


def test_a_result_from_another_text_is_refused(tmp_path):
    text = tmp_path / "mine.txt"
    text.write_text("red blue green\n\ndog cat")
    options = {"evaluation": {"general": {"text": str(text)}}}
    make_queue(tmp_path / "run", options=options).run()
    assert read_general_log(tmp_path / "run")[0]["tokens"] == 3
    text.write_text("red blue green dog cat")
    with pytest.raises(InputError, match="was measured with another text .* would not compare"):
        make_queue(tmp_path / "run", options=options).run()


def test_a_first_measurement_belongs_to_its_model(tmp_path):
    """Killed right after it, the run directory must not be taken over by another recipe."""

    class Stopped(Exception):
        pass

    def stop(self, *args):
        raise Stopped

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr("hf_continual.task_queue.TaskQueue._learn", stop)
        general_queue(tmp_path / "run").run()
    assert (tmp_path / "run/base/general/general.json").is_file()
    with pytest.raises(InputError, match="belongs to another recipe"):
        make_queue(tmp_path / "run", "stack", options={"evaluation": OWN}).run()


class Tracker(TrainerCallback):
    """As a tracker of `report_to`: keeps what it is told."""

    told: list[dict] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        Tracker.told.append({**logs, "step": state.global_step, "output_dir": args.output_dir})


def test_what_is_measured_goes_to_the_trackers(tmp_path, monkeypatch):
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "toytracker", Tracker)
    Tracker.told = []
    general_queue(tmp_path / "run", report_to=["toytracker"]).run()
    told = [logs for logs in Tracker.told if "eval_general_perplexity" in logs]
    log = read_general_log(tmp_path / "run")
    assert [logs["eval_general_loss"] for logs in told] == [row["loss"] for row in log]
    assert [logs.get("eval_general_loss_delta") for logs in told] == [None, *(row["delta"]["loss"] for row in log[1:])]
    # The base model's when training begins, the others' at the end of their task.
    assert [(logs["step"] > 0, logs["output_dir"][-7:]) for logs in told] == [
        (False, "00-toy0"), (True, "00-toy0"), (True, "01-toy1"),
    ]  # fmt: skip


# -- on the command line, and bad input ------------------------------------------------------------------------------


def test_a_recipe_with_files_beside_it(tmp_path, capsys):
    save_model(tmp_path / "model")
    path = write_recipe(
        tmp_path,
        tmp_path / "model",
        evaluation={"max_new_tokens": 2, "general": {"text": "t.txt", "prompts": "p.jsonl"}},
    )
    (tmp_path / "t.txt").write_text("red blue green\n\ndog cat w1 w2\n")
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    assert main(["run", str(path)]) == 0
    out = capsys.readouterr().out
    assert "general ability (delta: nats a token against the base model)" in out and "/3" in out
    assert (tmp_path / "run/general.jsonl").is_file()
    assert main(["run", str(tmp_path / "run")]) == 0  # from the run directory, too
    assert main(["run", str(path), "--run_dir", str(tmp_path / "b"), "--evaluation.general", "true"]) == 0
    assert json.loads((tmp_path / "b/general.jsonl").read_text().splitlines()[0])["prompts"] == 60
    write_report(tmp_path / "run", tmp_path / "out")
    assert (tmp_path / "out/matrix.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("general", "sentence"),
    [
        ("yes", r"evaluation\.general='yes' must be true, false, or files"),
        ({"texts": "a"}, r"unknown key 'evaluation\.general\.texts'; did you mean 'text'\?"),
        ({"text": 3}, r"evaluation\.general\.text=3 must be the path of a file"),
        ({"text": "none.txt"}, r"evaluation\.general\.text=none\.txt cannot be read \(No such file"),
        ({"text": "empty"}, r"evaluation\.general\.text=empty is empty"),
        ({"text": "latin"}, r"evaluation\.general\.text=latin is not text in UTF-8"),
        ({"prompts": "empty"}, r"evaluation\.general\.prompts=empty is empty"),
        ({"prompts": "p1"}, r"prompts=p1 line 2 is not JSON"),
        ({"prompts": "p2"}, r"prompts=p2 line 1 is no JSON object"),
        ({"prompts": "p3"}, r"prompts=p3 line 1: answer=None must be text"),
        ({"prompts": "p4"}, r"prompts=p4 line 1: the answer 'c' is not among its options"),
        ({"prompts": "p5"}, r"prompts=p5 line 1: options=\['a', 'a'\] must be at least two, all different"),
        ({"prompts": "p6"}, r"prompts=p6 line 1: options='ab' must be a list"),
        ({"prompts": "p7"}, r"unknown key 'evaluation\.general\.prompts=p7 line 1: option'; did you mean 'options'"),
        ({"prompts": "p8"}, r"prompts=p8 line 2: the id '1' stands there twice"),
    ],
)
def test_bad_input(general, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    row = {"prompt": "a", "answer": "b"}
    files = {
        "empty": " \n\n", "p1": json.dumps(row) + "\n{", "p2": "[1]", "p3": '{"prompt": "a"}',
        "p4": json.dumps({**row, "options": ["a", "b"], "answer": "c"}),
        "p5": json.dumps({**row, "options": ["a", "a"], "answer": "a"}),
        "p6": json.dumps({**row, "options": "ab"}), "p7": json.dumps({**row, "option": ["a", "b"]}),
        "p8": (json.dumps({**row, "id": 1}) + "\n") * 2,
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match=sentence):
        make_queue(tmp_path / "run", options={"evaluation": {"general": general}})
    assert not (tmp_path / "run").exists()


def test_a_model_without_words_is_refused_before_training(tmp_path):
    model = tiny_model("bert")
    with pytest.raises(InputError, match="BertForSequenceClassification has no language-model head"):
        measure_general(model, toy_tokenizer(), DATA)
    with pytest.raises(InputError, match="has no mask token"):
        general_ability.TextProbe(EvaluationConfig(general=True)).check(masked_model(), toy_tokenizer())
    queue_ = general_queue(tmp_path / "run")
    queue_.model.source = lambda: tiny_model("bert")
    with pytest.raises(InputError, match="no language-model head"):
        queue_.run()
    assert not (tmp_path / "run/queue.json").exists()


def test_false_means_off(tmp_path):
    assert EvaluationConfig(general=False).general is None and EvaluationConfig(general={}).general is True
    make_queue(tmp_path / "run", tasks=1, options={"evaluation": {"general": False}}).run()
    assert not (tmp_path / "run/general.jsonl").exists() and not (tmp_path / "run/base").exists()
    assert "General ability" not in write_report(tmp_path / "run").read_text()
    assert set(FILES) == {"text", "prompts"}


# -- several processes -----------------------------------------------------------------------------------------------


class TwoRanks(Processes):
    """One of two ranks that are threads; what is broadcast goes through a queue."""

    def __init__(self, rank, line):
        self.rank, self.world_size, self.line, self.count = rank, 2, line, 0

    def broadcast(self, value):
        self.count += 1
        if self.is_main:
            self.line.put(json.dumps(value))
            return value
        return json.loads(self.line.get(timeout=20))


@pytest.mark.parametrize("fails", [False, True])
def test_the_others_wait_however_long_rank_0_measures(monkeypatch, fails):
    monkeypatch.setattr(general_ability, "PAUSE", -1.0)
    line, found = queue.Queue(), {}

    def work(tick):
        for _ in range(5):
            tick()
        if fails:
            raise InputError("the data is gone")
        return {"loss": 1.5}

    def run(rank):
        ranks = TwoRanks(rank, line)
        try:
            found[rank] = on_main_patiently(ranks, work if rank == 0 else pytest.fail)
        except InputError as error:
            found[rank] = str(error)
        found[f"{rank} words"] = ranks.count

    threads = [threading.Thread(target=run, args=(rank,)) for rank in (1, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found[0] == found[1] == ("the data is gone" if fails else {"loss": 1.5})
    assert found["0 words"] == found["1 words"] == 7  # five signs of life, the end, the result
