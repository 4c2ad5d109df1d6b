"""The benchmark runs and says what it should; what it measures on a tiny model means nothing."""

import importlib.util
import json
from pathlib import Path

import pytest

FILE = Path(__file__).parents[1] / "benchmarks" / "step_overhead.py"


@pytest.fixture(scope="module")
def overhead():
    spec = importlib.util.spec_from_file_location("step_overhead", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
