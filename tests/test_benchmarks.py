"""The benchmarks run and say what they should; what they measure on tiny sizes means nothing."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from hf_continual.importance import ImportanceTracker
from hf_continual.units import SkillUnits

FOLDER = Path(__file__).parents[1] / "benchmarks"


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def overhead():
    return load("step_overhead")


@pytest.fixture(scope="module")
def skills():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))  # it takes `ratio` from step_overhead
        yield load("skill_importance")


def test_measures_three_trainers_on_both_cases(overhead, tmp_path, capsys):
    out = tmp_path / "overhead.json"
    overhead.main(
        ["--model", "tiny", "--steps", "3", "--warmup", "1", "--batch", "2", "--length", "8", "--target_length", "4",
         "--device", "cpu", "--out", str(out)]
    )  # fmt: skip
    found = json.loads(out.read_text())
    assert found["settings"]["steps"] == 3 and found["settings"]["threads"] >= 1
    assert {"torch", "transformers", "hf_continual"} <= set(found["versions"])
    assert list(found["cases"]) == ["lora", "full"]
    for result in found["cases"].values():
        assert result["equal_weights"]
        assert all(len(seconds) == 3 and min(seconds) > 0 for seconds in result["seconds"].values())
        assert list(result["median_seconds"]) == ["trainer", "ours", "ours+migu"]
        for ratios in (result["ratios"], result["cpu_ratios"]):
            assert list(ratios) == ["ours", "ours+migu"]
            assert all(0 < r["low"] <= r["median"] <= r["high"] for r in ratios.values())
        assert 1 <= result["migu"]["quantile_calls_per_step"] <= 6
        assert result["migu"]["floats_per_output_row"] <= 4
        assert result["peak_bytes_of_a_step"] is None
    # Two layers of q,v with r 8: four A of 8 rows, and B of 32 and 16 rows a layer.
    assert found["cases"]["lora"]["migu"]["output_rows"] == 4 * 8 + 2 * (32 + 16)
    assert "ours+migu" in capsys.readouterr().out


def test_a_trainer_that_fails_ends_the_others(overhead, monkeypatch):
    def fail(self, ctx, grads):
        raise ArithmeticError("raised within a step, while the other trainers wait for their turn")

    monkeypatch.setattr(overhead.MIGU, "edit_gradients", fail)
    with pytest.raises(ArithmeticError, match="raised within a step"):
        overhead.main(["--model", "tiny", "--cases", "lora", "--steps", "1", "--batch", "2", "--device", "cpu"])


def test_measures_the_methods_that_track_importance(overhead, capsys):
    found = overhead.main(
        ["--model", "tiny", "--cases", "lora_all", "full", "--methods", "kif", "kif_tracker", "tasl", "--steps", "3",
         "--warmup", "3", "--batch", "2", "--length", "8", "--target_length", "4", "--device", "cpu"]
    )["cases"]  # fmt: skip
    assert list(found["lora_all"]["trackers"]) == ["ours+kif", "ours+kif_tracker", "ours+tasl"]
    assert list(found["full"]["trackers"]) == ["ours+tasl"]
    for result in found.values():
        assert result["equal_weights"] and result["migu"] is None
        for name, tracker in result["trackers"].items():
            assert tracker["tracked_elements"] == result["trainable_parameters"], name
            assert 8 <= tracker["bytes_per_element"] < 8.1
            share = tracker["share_of_a_step"]
            assert tracker["hook_seconds"] > 0 and 0 < share["low"] <= share["median"] <= share["high"]
    assert "ours+kif_tracker" in capsys.readouterr().out


def test_measures_tracking_and_fusion(skills, tmp_path, capsys):
    out = tmp_path / "importance.json"
    skills.main(
        ["--layers", "1", "--rank", "2", "--vocab", "32", "--rounds", "2", "--warmup", "1", "--ops_layers", "1", "2",
         "--cases", "lora", "lora_all", "--fusion_layers", "2", "--fusion_width", "24", "--fusion_rank", "4",
         "--fusion_rounds", "1", "--device", "cpu", "--out", str(out)]
    )  # fmt: skip
    found = json.loads(out.read_text())
    for result in found["tracker"].values():  # that the three agree, it asserts itself
        assert list(result["median_seconds"]) == ["ours", "naive", "foreach"]
        assert all(0 < r["low"] <= r["median"] <= r["high"] for r in result["ratios"].values())
        assert 8 <= result["bytes_per_element"]["ours"] < 8.1 and result["bytes_per_element"]["naive"] == 12
        assert all(size > 0 for size in result["scratch_bytes"].values())
    for result in found["ops"].values():
        naive, ours = result["naive"], result["ours, accelerator"]
        assert naive[1]["top"] == 2 * naive[0]["top"] and naive[1]["waits"] == 2 * naive[0]["waits"] > 0
        assert ours[1]["top"] == ours[0]["top"] and ours[1]["waits"] == 0
    assert found["fusion"]["units"] == 2 * 4 * 4 and len(found["fusion"]["median_seconds"]) == 5
    assert "from disk" in capsys.readouterr().out


def random_weights(layers, device="cpu"):
    generator = torch.Generator().manual_seed(layers)
    shapes = {}
    for layer in range(layers):
        for module in ("q_proj", "v_proj"):
            shapes[f"{layer}.{module}.lora_A.weight"] = (4, 24)
            shapes[f"{layer}.{module}.lora_B.weight"] = (24, 4)
    weights, gradients = (
        [torch.randn(shape, generator=generator).to(device) for shape in shapes.values()] for _ in range(2)
    )
    return SkillUnits.of_shapes(shapes, "lora_rank1"), weights, gradients


@pytest.mark.parametrize("order", ["first", "mix"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_an_update_dispatches_as_many_operators_with_more_layers(skills, device, order):
    counts = []
    for layers in (2, 8):
        units, weights, gradients = random_weights(layers, device)
        tracker = ImportanceTracker(units, order=order)
        tracker.update_lists(weights, gradients)
        counts.append(skills.count_ops(lambda t=tracker, w=weights, g=gradients: t.update_lists(w, g)))
    assert counts[0]["top"] == counts[1]["top"] <= 30
    assert counts[0]["waits"] == counts[1]["waits"] == (device == "cpu")


def test_only_two_floats_a_weight_stay(skills):
    units, weights, gradients = random_weights(8)
    elements = sum(w.numel() for w in weights)
    tracker = ImportanceTracker(units)
    assert 8 * elements <= skills.lasting_bytes(lambda: tracker.update_lists(weights, gradients)) <= 8 * elements + 64
    assert skills.lasting_bytes(lambda: tracker.update_lists(weights, gradients)) == 0


# -- attention distillation --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def attention():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield load("attention_distillation")


def test_measures_attention_distillation_and_the_buffer(attention, tmp_path, capsys):
    out = tmp_path / "attention.json"
    found = attention.main(
        ["--length", "48", "--hidden", "32", "--model_heads", "8", "--heads", "2", "--rows", "6", "--vocabulary", "50",
         "--steps", "2", "--warmup", "1", "--disk_rows", "2", "--disk_length", "128", "--device", "cpu",
         "--out", str(out)]
    )  # fmt: skip
    assert json.loads(out.read_text())["steps"].keys() == found["steps"].keys()
    saved, modes = found["steps"]["saved_bytes"], attention.MODES
    assert list(saved) == list(modes) and all(found["steps"]["ratios"][mode]["median"] > 0 for mode in modes[1:])
    # What is counted, exactly: (student - teacher) of 2 heads x 6 rows x 48 keys in each of 2 layers, and indices.
    kept = 2 * 2 * 6 * 48 * 4
    assert kept <= saved["heads, rows"] - saved["replay"] < 3 * kept
    assert saved["heads, all rows"] - saved["replay"] >= 8 * kept
    assert saved["recomputed"] < saved["heads, rows"] < saved["heads, all rows"] < saved["reference"]
    row = 128 * 100 * 128 * 2
    assert 2 * row < found["disk"]["bytes"] < 2.2 * row + 2 * 32 * 256 * 8
    assert "heads, rows" in capsys.readouterr().out


def test_all_modes_have_the_gradients_of_what_they_say(attention):
    """Without budgets the selected heads are all heads: our loss and gradient equal those of the published way."""
    options = attention.make_parser().parse_args(
        ["--length", "24", "--hidden", "32", "--model_heads", "4", "--heads", "4", "--rows", "24", "--vocabulary", "50",
         "--device", "cpu"]
    )  # fmt: skip
    modes, found = attention.Modes(options), {}
    for mode in ("heads, rows", "heads, all rows", "recomputed", "reference"):
        modes.model.zero_grad(set_to_none=True)
        loss = modes.loss(mode)
        loss.backward()
        found[mode] = loss.detach(), [p.grad.clone() for p in modes.model.parameters()]
    for mode, (loss, gradients) in found.items():
        assert torch.allclose(loss, found["reference"][0], rtol=1e-4), mode
        for ours, theirs in zip(gradients, found["reference"][1], strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-3, atol=2e-5), mode


# -- evaluation --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluation():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield load("evaluation")


SMALL = ["--rows", "20", "--batch", "4", "--longest", "24", "--max_new_tokens", "8", "--hidden", "48", "--layers", "2",
         "--vocabulary", "200", "--rounds", "2", "--warmup", "0", "--device", "cpu"]  # fmt: skip


def test_measures_evaluation_against_plain_loops(evaluation, tmp_path, capsys):
    out = tmp_path / "evaluation.json"
    evaluation.main([*SMALL, "--out", str(out)])  # that both give the same, it asserts itself
    found = json.loads(out.read_text())
    assert list(found["cases"]) == ["generation", "likelihood"] and found["load_before"] >= 0
    for result in found["cases"].values():
        assert all(rate > 0 for rate in result["rows_per_second"].values())
        assert all(0 < result[key]["low"] <= result[key]["median"] for key in ("faster", "faster_cpu"))
        assert [len(seconds) for seconds in result["seconds"].values()] == [2, 2]
    tokens = found["cases"]["generation"]["answer_tokens"]
    assert 1 <= tokens["median"] <= tokens["mean"] <= 8  # most end early
    assert "times as fast" in capsys.readouterr().out


def test_the_evaluation_benchmark_notices_other_predictions(evaluation, monkeypatch):
    monkeypatch.setattr(evaluation, "plain_generation", lambda *given: ["another answer"] * 20)
    with pytest.raises(AssertionError, match="row 0: .* and not 'another answer'"):
        evaluation.main([*SMALL, "--cases", "generation"])
    monkeypatch.setattr(evaluation, "plain_likelihood", lambda *given: [[-1.0] * 8] * 20)
    with pytest.raises(AssertionError, match="row 0"):
        evaluation.main([*SMALL, "--cases", "likelihood"])


def test_a_step_of_evaluation_feeds_few_rows_that_have_ended(evaluation, monkeypatch):
    """What the speed comes from, counted: tokens through the model, against the plain loop's."""
    options = evaluation.make_parser().parse_args([*SMALL, "--rows", "64", "--longest", "80", "--max_new_tokens", "20"])
    tokenizer, model = evaluation.make_tokenizer(196), evaluation.make_model(options)
    task, fed = evaluation.make_task(options, None), []
    model.model.embed_tokens.register_forward_hook(lambda m, args, out: fed.append(args[0].numel()))
    config = evaluation.EvaluationConfig(batch_size=4, max_new_tokens=20)
    cell = evaluation.evaluate_task(model, tokenizer, task, config, max_prompt_length=88)
    ours, needed = sum(fed), sum(len(evaluation.encode_prompt(row["prompt"], tokenizer, 88, False))
                                 for row in task.eval_dataset) + sum(len(t) - 1 for t in cell.tokens)  # fmt: skip
    fed.clear()
    assert evaluation.plain_generation(model, tokenizer, task, options) == [p["prediction"] for p in cell.predictions]
    assert needed <= ours <= 1.1 * needed and ours < 0.65 * sum(fed)
