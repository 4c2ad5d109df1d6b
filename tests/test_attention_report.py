"""Looking inside runs of SEEKR: state written by the method's own `save`, with known numbers."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from test_report import image, write_run
from test_skill_report import edit, rows_of

from hf_continual import attention_report
from hf_continual.attention import select_heads
from hf_continual.attention_report import (
    HeadScores,
    TaskAttention,
    drift_comparison,
    drift_lines,
    module_rows,
    plot_drift,
    plot_head_importance,
    rank_correlation,
    read_attention,
)
from hf_continual.errors import InputError
from hf_continual.methods.seekr import SEEKR, combined_importance
from hf_continual.report import load_run, write_report
from hf_continual.testing import tiny_model

MODULES = ["model.layers.0.self_attn", "model.layers.1.self_attn"]
# S~ F of the first task: 0.2, 0, 1.2, 1.6; of the second: 0.45, 0, 0, 0; in sum 0.65, 0, 1.2, 1.6.
SENSITIVITY = [[[0.2, 0.8], [0.6, 0.4]], [[0.9, 0.1], [0.5, 0.5]]]
FORGETTABILITY = [[[1.0, 0.0], [2.0, 4.0]], [[0.5, 0.0], [0.0, 0.0]]]
# The chosen two heads hold 2.8 of 3.0 and 2.8 of 3.45.
DRIFT = {"reviews": {"news": 0.02}, "mail": {"news": 0.03, "reviews": 0.01}}


def write_seekr(
    path,
    tasks=("news", "reviews"),
    modules=MODULES,
    sensitivity=SENSITIVITY,
    forgettability=FORGETTABILITY,
    heads=2,
    drift=DRIFT,
    variant="seekr",
    seed=42,
    learnt=None,
    plans=None,
    **options,
):
    learnt = len(tasks) if learnt is None else learnt
    R = [[0.8] * (i + 1) + [None] * (len(tasks) - 1 - i) for i in range(learnt)]
    finished = learnt == len(tasks)
    run = write_run(path, R, None, list(tasks), variant=variant, seed=seed, finished=finished, cursor=learnt)
    method = SEEKR(heads=heads, **options)
    for i, task in enumerate(tasks[:learnt]):
        if modules and sensitivity is not None:
            share = torch.tensor(sensitivity[i], dtype=torch.float64)
            change = torch.tensor(forgettability[i], dtype=torch.float64)
            before = method.sums_ or {name: torch.zeros_like(share) for name in ("sensitivity", "change", "product")}
            method.modules_, method.sensitivity_, method.forgettability_ = list(modules), share, change
            method.sums_ = {
                name: before[name] + new
                for name, new in (("sensitivity", share), ("change", change), ("product", share * change))
            }
            method.importance_ = combined_importance(method.sums_, "sum_of_products").clone()
            chosen = select_heads(method.importance_, len(modules), heads)
            named = {
                m: mask.nonzero().flatten().tolist() for m, mask in zip(modules, chosen, strict=True) if mask.any()
            }
            method.plans_[f"{i:03d}"] = named if plans is None else plans[i]
        if i and task in drift:
            method.drift_[task] = drift[task]
        method.save(run / "tasks" / f"{i:02d}-{task}" / "methods")
    return run


def section(report: Path) -> str:
    text = report.read_text(encoding="utf-8")
    return text[text.index("## Attention") : text.index("## Formulas")]


def scores(shape, seed=0, modules=None, symbol="I"):
    generator = np.random.default_rng(seed)
    values = generator.gamma(0.3, size=shape)
    names = modules or [f"model.layers.{i}.self_attn" for i in range(shape[0])]
    return HeadScores(names, values, symbol, values > np.quantile(values, 0.9), values, None)


# Reading


def test_what_a_run_stored(tmp_path):
    run = read_attention(load_run(write_seekr(tmp_path / "run")))
    first, second = run.tasks
    assert (run.title, first.task, first.index, second.task, second.index) == (
        "seekr, seed 42",
        "news",
        0,
        "reviews",
        1,
    )
    np.testing.assert_allclose(first.heads.score, [[0.2, 0.0], [1.2, 1.6]])
    np.testing.assert_allclose(second.heads.score, [[0.65, 0.0], [1.2, 1.6]])
    assert first.heads.modules == MODULES and first.heads.symbol == "I"
    assert first.heads.chosen.tolist() == second.heads.chosen.tolist() == [[False, False], [True, True]]
    np.testing.assert_array_equal(second.heads.sensitivity, SENSITIVITY[1])
    np.testing.assert_array_equal(second.heads.forgettability, FORGETTABILITY[1])
    assert run.drift == [{}, {"news": 0.02}] and run.unit == "KL, nats per head and query row"
    assert second.options["attention_weight"] == 1000


def test_measures(tmp_path):
    plans = [{MODULES[1]: [0, 1]}, {MODULES[0]: [0], MODULES[1]: [1]}]
    first, second = read_attention(load_run(write_seekr(tmp_path / "run", plans=plans))).measures()
    # Ranks of S~: 0, 3, 2, 1; of F: 1, 0, 2, 3: 1 - 6 * (1 + 9 + 0 + 4) / (4 * 15).
    assert first == pytest.approx({"heads": 2, "layers": 1, "share": 2.8 / 3, "correlation": -0.4})
    # Ranks of S~: 3, 0, 1.5, 1.5; of F: 3, 1, 1, 1.
    assert second == pytest.approx(
        {"heads": 2, "layers": 2, "share": 2.25 / 3.45, "overlap": 1 / 3, "correlation": np.sqrt(2 / 3)}
    )


def test_rank_correlation():
    assert rank_correlation(np.array([1.0, 10.0, 100.0]), np.array([3.0, 4.0, 5.0])) == pytest.approx(1)
    assert rank_correlation(np.array([1.0, 2.0]), np.array([3.0, 3.0])) is None
    assert rank_correlation(np.array([1.0]), np.array([3.0])) is None


@pytest.mark.parametrize(
    ("choice", "symbol", "expected"),
    [
        ("sensitivity", "S~", SENSITIVITY[0]),
        ("forgettability", "F", FORGETTABILITY[0]),
        ("random", "S~", SENSITIVITY[0]),
    ],
)
def test_the_score_is_the_one_that_chose(tmp_path, choice, symbol, expected):
    run = read_attention(load_run(write_seekr(tmp_path / "run", head_choice=choice)))
    assert run.tasks[0].heads.symbol == symbol
    np.testing.assert_array_equal(run.tasks[0].heads.score, expected)


def test_forgettability_that_was_not_measured(tmp_path):
    none = np.zeros((2, 2, 2)).tolist()
    run = read_attention(load_run(write_seekr(tmp_path / "run", forgettability=none, head_choice="random")))
    assert run.tasks[0].heads.forgettability is None and "correlation" not in run.measures()[0]


@pytest.mark.parametrize(
    ("options", "unit"),
    [
        ({"kl_reduction": "sum"}, "KL, nats, summed over layers, heads and query rows"),
        ({"attention": "outputs"}, "relative squared error per head"),
        ({"attention": "outputs", "kl_reduction": "sum"}, "relative squared error, summed over layers and heads"),
    ],
)
def test_units(tmp_path, options, unit):
    assert read_attention(load_run(write_seekr(tmp_path / "run", **options))).unit == unit


def test_runs_without_seekr_and_runs_that_have_learnt_nothing(tmp_path):
    run = write_run(tmp_path / "run", R=[], baseline=None, finished=False, cursor=0)
    assert read_attention(load_run(run)) is None
    (run / "recipe.yaml").write_text(yaml.safe_dump({"methods": [{"name": "seekr"}]}))
    assert read_attention(load_run(run)) is None
    assert "## Attention" not in write_report(run).read_text(encoding="utf-8")


def tensors(change):
    def damage(path):
        path = path.with_suffix(".safetensors")
        stored = load_file(path)
        change(stored)
        save_file(stored, path)

    return damage


def value(name, new):
    return edit(lambda record: record["state"][name].update(value=new))


FOREIGN = "is no state of method 'seekr'"


@pytest.mark.parametrize(
    ("damage", "file", "message"),
    [
        (lambda p: p.unlink(), "seekr.json", "is missing"),
        (lambda p: p.write_text(p.read_text()[:50]), "seekr.json", "is truncated or was edited"),
        (lambda p: p.write_text("[]"), "seekr.json", FOREIGN),
        (lambda p: p.with_suffix(".safetensors").unlink(), "seekr.safetensors", "is missing"),
        (lambda p: p.with_suffix(".safetensors").write_bytes(b"\0" * 9), "seekr.safetensors", "is truncated"),
        (edit(lambda r: r.update(method="derpp")), "seekr.json", FOREIGN),
        (edit(lambda r: r["options"].pop("attention")), "seekr.json", FOREIGN),
        (edit(lambda r: r["options"].update(head_choice="largest")), "seekr.json", FOREIGN),
        (edit(lambda r: r["options"].update(attention_weight=None)), "seekr.json", FOREIGN),
        (edit(lambda r: r["state"].pop("plans_")), "seekr.json", FOREIGN),
        (edit(lambda r: r["state"]["plans_"]["value"].pop("001")), "seekr.json", FOREIGN),
        (value("modules_", "layers"), "seekr.json", FOREIGN),
        (value("modules_", []), "seekr.json", FOREIGN),
        (value("plans_", {"001": {"model.layers.7.self_attn": [0]}}), "seekr.json", FOREIGN),
        (value("plans_", {"001": {MODULES[0]: [-1]}}), "seekr.json", FOREIGN),
        (value("plans_", {"001": {MODULES[0]: ["0"]}}), "seekr.json", FOREIGN),
        (value("plans_", {"001": {MODULES[0]: [2]}}), "seekr.safetensors", "was edited: importance_ has no finite"),
        (value("drift_", {"reviews": {"sport": 0.1}}), "seekr.json", FOREIGN),
        (value("drift_", {"reviews": {"news": "much"}}), "seekr.json", FOREIGN),
        (value("drift_", {"reviews": 0.1}), "seekr.json", FOREIGN),
        (value("modules_", MODULES[:1]), "seekr.json", FOREIGN),
        (tensors(lambda t: t.pop("importance_")), "seekr.safetensors", "is truncated or was edited"),
        (tensors(lambda t: t.update(sensitivity_=torch.ones(2))), "seekr.safetensors", "sensitivity_ has no finite"),
        (tensors(lambda t: t["importance_"].fill_(np.nan)), "seekr.safetensors", "importance_ has no finite number"),
    ],
)
def test_damaged_state(tmp_path, damage, file, message):
    run = write_seekr(tmp_path / "run")
    path = run / "tasks" / "01-reviews" / "methods"
    damage(path / "seekr.json")
    with pytest.raises(InputError, match=re.escape(message)) as error:
        write_report(run)
    text = str(error.value)
    assert text.startswith(str(path / file)) and "\n" not in text
    assert not (run / "report.md").exists() and not list(run.glob("*.png"))


# Plots


def test_rows_of_a_decoder():
    assert module_rows(MODULES) == ([0, 1], ["0", "1"], [])
    assert module_rows(["transformer.h.10.attn", "transformer.h.11.attn"])[1] == ["10", "11"]


@pytest.mark.parametrize("cross", ["block.{}.layer.1.EncDecAttention", "layers.{}.encoder_attn"])
def test_rows_of_an_encoder_and_a_decoder(cross):
    own = "block.{}.layer.0.SelfAttention" if "EncDec" in cross else "layers.{}.self_attn"
    modules = [f"encoder.{own.format(i)}" for i in range(2)]
    modules += [f"decoder.{name.format(i)}" for i in range(2) for name in (own, cross)]
    order, names, begins = module_rows(modules)
    assert order == [0, 1, 2, 4, 3, 5] and begins == [2, 4]
    assert names == ["encoder 0", "encoder 1", "decoder 0", "decoder 1", "decoder 0 cross", "decoder 1 cross"]


def test_rows_of_real_models():
    from hf_continual.taps import AttentionTap

    for kind, expected in (("llama", ["0", "1"]), ("roberta", ["0", "1"])):
        with AttentionTap(tiny_model(kind, lora=kind == "llama"), "seekr") as tap:
            assert module_rows(tap.names)[1] == expected
    with AttentionTap(tiny_model("t5", lora=False), "seekr") as tap:
        assert module_rows(tap.names)[1][-1] == "decoder 1 cross" and len(set(module_rows(tap.names)[1])) == 6


@pytest.mark.parametrize(("modules", "heads", "tasks"), [(30, 9, 1), (32, 32, 8)])
def test_heat_maps_stay_readable(tmp_path, modules, heads, tasks):
    found = [TaskAttention(f"task{i}", i, scores((modules, heads), i), {}, {}) for i in range(tasks)]
    drawn = image(plot_head_importance(found, tmp_path / "map.png", "a title"))
    panels = min(tasks, 8)
    # At 150 dots an inch a cell is at least 12 x 16 pixels, and the picture fits a page.
    assert drawn.shape[1] >= 12 * heads * min(panels, 4) and drawn.shape[0] >= 16 * modules * (panels // 4 or 1)
    assert drawn.shape[1] < 2100


def test_heat_maps_show_the_numbers(tmp_path):
    def draw(heads):
        return image(plot_head_importance([TaskAttention("a", 0, heads, {}, {})], tmp_path / "map.png"))

    def with_(heads, **changed):
        return HeadScores(**(vars(heads) | changed))

    heads = scores((4, 4))
    plain = draw(heads)
    assert (plain != draw(with_(heads, score=heads.score[::-1]))).any()
    assert (plain == draw(with_(heads, score=1000 * heads.score))).all()  # shares of the sum
    orange = np.array([0xFF, 0x5A, 0x1F]) / 255
    outlines = [
        (np.abs(draw(with_(heads, chosen=chosen))[..., :3] - orange).max(axis=-1) < 0.1).sum()
        for chosen in (np.zeros((4, 4), bool), np.eye(4, dtype=bool), np.ones((4, 4), bool))
    ]
    assert outlines[0] == 0 and outlines[2] == pytest.approx(4 * outlines[1], rel=0.1) and outlines[1] > 100
    with pytest.raises(InputError, match="no task has scores"):
        draw(with_(heads, score=np.zeros((4, 4))))


def test_the_last_tasks_are_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(attention_report, "PANELS", 2)

    def draw(changed):
        seeds = [100 if i == changed else i for i in range(3)]
        tasks = [TaskAttention("a", i, scores((2, 2), seed), {}, {}) for i, seed in enumerate(seeds)]
        return image(plot_head_importance(tasks, tmp_path / "map.png"))

    plain = draw(None)
    assert (plain == draw(0)).all() and (plain != draw(2)).any()


def test_rows_keep_their_scores_and_plans(tmp_path):
    listed = ["encoder.block.0.layer.0.SelfAttention"]
    listed += [f"decoder.block.{i}.layer.{j}" for i in (0, 1) for j in ("0.SelfAttention", "1.EncDecAttention")]
    order = [0, 1, 3, 2, 4]
    heads = scores((5, 3), modules=listed)
    arrays = {name: getattr(heads, name)[order] for name in ("score", "chosen", "sensitivity")}
    sorted_ = HeadScores(modules=[listed[i] for i in order], symbol="I", forgettability=None, **arrays)
    drawn = [
        image(plot_head_importance([TaskAttention("a", 0, each, {}, {})], tmp_path / "map.png"))
        for each in (heads, sorted_)
    ]
    assert (drawn[0] == drawn[1]).all()


def test_drift_lines(tmp_path):
    nan = math.nan
    three = (*SENSITIVITY, SENSITIVITY[0]), (*FORGETTABILITY, FORGETTABILITY[0])
    whole = {"tasks": ("news", "reviews", "mail"), "sensitivity": three[0], "forgettability": three[1]}
    one = read_attention(load_run(write_seekr(tmp_path / "a", **whole)))
    lines = {line.label: line.values for line in drift_lines({"seekr": [one]})}
    assert list(lines) == ["news", "reviews", "mean"]
    np.testing.assert_allclose(lines["news"], [[nan, 0.02, 0.03]])
    np.testing.assert_allclose(lines["reviews"], [[nan, nan, 0.01]])
    np.testing.assert_allclose(lines["mean"], [[nan, 0.02, 0.02]])
    short = read_attention(load_run(write_seekr(tmp_path / "b")))
    off = read_attention(load_run(write_seekr(tmp_path / "c", drift={})))
    (line,) = drift_lines({"seekr": [one, short], "off": [off]})
    assert line.label == "seekr" and line.unit == one.unit
    np.testing.assert_allclose(line.values, [[nan, 0.02, 0.02], [nan, 0.02, nan]])
    # With two tasks there is one line: a mean would lie on it.
    assert [each.label for each in drift_lines({"seekr": [short]})] == ["news"]


def test_equal_scores_can_be_drawn(tmp_path):
    heads = HeadScores(MODULES, np.ones((2, 2)), "I", np.eye(2, dtype=bool), np.ones((2, 2)), None)
    assert plot_head_importance([TaskAttention("a", 0, heads, {}, {})], tmp_path / "map.png").exists()
    with pytest.raises(InputError, match="no drift was measured"):
        plot_drift([], [], tmp_path / "drift.png")


# Reports


def test_report_of_one_run(tmp_path):
    three = (*SENSITIVITY, SENSITIVITY[0]), (*FORGETTABILITY, np.zeros((2, 2)).tolist())
    run = write_seekr(tmp_path / "run", ("news", "reviews", "mail"), sensitivity=three[0], forgettability=three[1])
    text = section(write_report(run, tmp_path / "out"))
    rows = rows_of(text)
    assert rows[0] == ["task", "heads", "layers", "held", "overlap", "S~ and F"]
    assert rows[1] == ["news", "2", "1", "93.3%", "-", "-0.40"]
    assert rows[2] == ["reviews", "2", "1", "81.2%", "100.0%", "0.82"]
    assert rows[3] == ["mail", "2", "1", "81.2%", "100.0%", "-"]
    assert rows[4:] == [
        ["after training", "news", "reviews"],
        ["reviews", "0.02", "-"],
        ["mail", "0.03", "0.01"],
    ]
    assert "seekr, seed 42: KL, nats per head and query row." in text
    assert "attention weights, attention_weight 1000, head_choice importance." in text
    assert re.findall(r"!\[.*?\]\((.*?)\)", text) == ["head_importance.png", "attention_drift.png"]
    assert all(
        image(tmp_path / "out" / n)[..., :3].std() > 0.02 for n in ("head_importance.png", "attention_drift.png")
    )


@pytest.mark.parametrize("finished", [True, False])
def test_report_after_the_first_task(tmp_path, finished):
    run = write_seekr(tmp_path / "run", ("news",) if finished else ("news", "reviews"), learnt=1)
    text = section(write_report(run))
    assert [row[0] for row in rows_of(text)] == ["task", "news"] and (run / "head_importance.png").exists()
    assert "No drift of attention: it is measured from the second task on" in text
    assert not (run / "attention_drift.png").exists()


def test_report_where_attention_is_off(tmp_path):
    run = write_seekr(
        tmp_path / "run", modules=[], drift={}, head_choice="random", attention_weight=0, track_drift=False
    )
    text = section(write_report(run))
    assert "No importance of heads was measured: seekr." in text and "No drift of attention: " in text
    assert not rows_of(text) and not (run / "head_importance.png").exists()


def test_report_of_several_variants(tmp_path):
    root = tmp_path / "runs"
    for seed, news in ((42, 0.02), (43, 0.04)):
        write_seekr(root / f"with/seed-{seed}", drift={"reviews": {"news": news}}, seed=seed)
    tasks, large = ("news", "reviews"), {"reviews": {"news": 0.6}}
    write_seekr(root / "without", tasks, drift=large, variant="no attention", attention_weight=0)
    write_seekr(root / "outputs", tasks, drift=large, variant="outputs", attention="outputs")
    write_seekr(root / "off", tasks, drift={}, variant="off", track_drift=False)
    write_seekr(root / "waiting", tasks, variant="waiting", learnt=1)
    write_run(root / "naive", tasks=list(tasks), R=[[0.8, None], [0.6, 0.9]], baseline=None)
    text = section(write_report(root, tmp_path / "out"))
    rows = rows_of(text)
    compared = {row[0]: row[1:] for row in rows if len(row) == 7 and "KL" in row[-1] or "error" in row[-1]}
    kl = "KL, nats per head and query row"
    assert compared == {
        "seekr": ["2", "1000", *["0.03 ± 0.014"] * 3, kl],
        "no attention": ["1", "0", "0.6", "0.6", "0.6", kl],
        "outputs": ["1", "100", "0.6", "0.6", "0.6", "relative squared error per head"],
    }
    heads = [row for row in rows if len(row) == 8 and row[0] == "seekr"]
    assert [row[1:5] for row in heads] == [["2", "news", "2", "1"], ["2", "reviews", "2", "1"]]
    assert "Not finished, not in the means: waiting, seed 42 (1 of 2 tasks)" in text
    assert "No drift of attention in off, seed 42: " in text
    assert sorted(re.findall(r"!\[.*?\]\((.*?)\)", text)) == [
        "attention_drift.png",
        "head_importance-no-attention.png",
        "head_importance-off.png",
        "head_importance-outputs.png",
        "head_importance-seekr.png",
    ]


def test_mean_over_the_old_tasks(tmp_path):
    values = {"reviews": {"news": 9.0}, "mail": {"news": 0.1, "reviews": 0.3}}
    three = (*SENSITIVITY, SENSITIVITY[0]), (*FORGETTABILITY, FORGETTABILITY[0])
    tasks = ("news", "reviews", "mail")
    run = write_seekr(tmp_path / "a", tasks, sensitivity=three[0], forgettability=three[1], drift=values)
    rows = rows_of(drift_comparison({"a": [read_attention(load_run(run))]}))
    assert rows[1] == ["a", "1", "1000", "0.2", "0.1", "0.3", "KL, nats per head and query row"]


def test_orders_that_differ(tmp_path):
    write_seekr(tmp_path / "runs" / "a", drift={"reviews": {"news": 0.1}})
    write_seekr(tmp_path / "runs" / "b", ("reviews", "news"), drift={"news": {"reviews": 0.2}}, seed=43)
    rows = rows_of(section(write_report(tmp_path / "runs")))
    assert {row[0]: row[3] for row in rows if "KL" in row[-1]} == {"seekr (order 1)": "0.1", "seekr (order 2)": "0.2"}


def test_no_finished_run(tmp_path):
    write_seekr(tmp_path / "runs" / "a", learnt=1)
    text = section(write_report(tmp_path / "runs"))
    assert "Not finished, not in the means: seekr, seed 42" in text and not rows_of(text)
