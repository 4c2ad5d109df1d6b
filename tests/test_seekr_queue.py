"""SEEKR in a task queue: killed while a buffer or a signal is written, damaged, and refused where it cannot work."""

import json
import os

import pytest
import torch
from toy_runs import SIGNAL_POINTS, assert_same, make_queue, run_until_killed, save_model, write_recipe

from hf_continual.cli import main
from hf_continual.errors import InputError
from hf_continual.methods.seekr import SEEKR


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seekr") / "run"
    make_queue(folder, "seekr").run()
    return folder


def signal_files(run, task="01-toy1"):
    return sorted((run / "tasks" / task / "methods" / "seekr-buffer_" / "signals").glob("*.safetensors"))


def test_each_task_holds_all_signals_at_no_cost(finished):
    assert [path.name[:3] for path in signal_files(finished)] == ["000"] * 3 + ["001"] * 3
    first = signal_files(finished, "00-toy0")
    assert all(os.path.samefile(a, b) for a, b in zip(first, signal_files(finished), strict=False))
    record = json.loads((finished / "tasks" / "01-toy1" / "methods" / "seekr.json").read_text())["state"]
    assert set(record["plans_"]["value"]) == {"000", "001"}
    assert set(record["drift_"]["value"]["toy1"]) == {"toy0"}
    method = SEEKR(**json.loads((finished / "tasks" / "01-toy1" / "methods" / "seekr.json").read_text())["options"])
    method.load(finished / "tasks" / "01-toy1" / "methods")
    signal = method.buffer_.signals.read(method.buffer_.ids[0])
    chosen = sum(len(attention.heads) for attention in signal.attention.values())
    assert chosen == 4 and all(torch.isfinite(a.values).all() for a in signal.attention.values())


def test_report_shows_heads_and_drift(finished, tmp_path, capsys):
    assert main(["report", str(finished), "-o", str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text()
    assert "## Attention" in text and "head_importance.png" in text and "attention_drift.png" in text
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("head_importance.png", "attention_drift.png"))


@pytest.mark.parametrize("point", SIGNAL_POINTS)
def test_killed_and_continued(finished, tmp_path, point):
    run = tmp_path / "run"
    run_until_killed(run, "seekr", point)
    assert (run / "tasks" / "00-toy0").is_dir() and not (run / "tasks" / "01-toy1").exists()
    if point == "in the signals of the second task":
        assert len(list((run / "work").rglob("001-*.safetensors"))) == 2
    make_queue(run, "seekr").run()
    assert_same(run, finished)


def test_a_damaged_signal_is_refused_and_nothing_is_lost(tmp_path):
    run = tmp_path / "run"
    make_queue(run, "seekr").run()
    file = signal_files(run)[0]
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content[:-8] + b"xxxxxxxx")
    with pytest.raises(InputError, match=r"is truncated or was edited"):
        make_queue(run, "seekr", tasks=3).run()
    assert not (run / "tasks" / "02-toy2").exists()
    file.write_bytes(content)
    make_queue(run, "seekr", tasks=3).run()
    assert (run / "tasks" / "02-toy2").is_dir()


def test_a_buffer_of_another_tokenizer_is_refused(finished, tmp_path):
    from hf_continual.replay import tokenizer_key
    from hf_continual.testing import toy_tokenizer

    method = SEEKR(count=3, layers=2, heads=4, query_rows=4)
    method.load(finished / "tasks" / "01-toy1" / "methods")
    other = toy_tokenizer()
    other.add_tokens(["new"])
    with pytest.raises(InputError, match="another tokenizer"):
        method.buffer_.bind(None, tokenizer_key(other))
    with pytest.raises(InputError, match="another model"):
        method.buffer_.bind("another", None)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"ratio": 0}, "ratio=0"),
        ({"ratio": 1.01}, "ratio=1.01"),
        ({"layers": 3}, "layers=3"),
        ({"layers": 1, "heads": 5}, "heads=5"),
        ({"count": 0}, "count=0"),
        ({"attention": "maps"}, "attention='maps'"),
        ({"ratoi": 0.1}, "did you mean 'ratio'"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_no_run(model, tmp_path, capsys, options, said):
    path = write_recipe(tmp_path, model, methods=[{"name": "seekr", **options}])
    assert main(["run", str(path)]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and said in errors[0], errors
    assert not (tmp_path / "run" / "queue.json").exists()


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"model": {"attn_implementation": "flex_attention"}}, "flex_attention"),
        (
            {"training": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}},
            "use_reentrant",
        ),
    ],
)
def test_models_that_cannot_be_tapped_are_refused(model, tmp_path, capsys, sections, said):
    path = write_recipe(tmp_path, model, methods=[{"name": "seekr", "count": 2}])
    words = [f"--{section}.{key}={json.dumps(value)}" for section, options in sections.items()
             for key, value in options.items()]  # fmt: skip
    assert main(["run", str(path), *words]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and said in errors[0], errors
