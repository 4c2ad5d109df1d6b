"""Looking inside runs of TaSL and KIF: state files written by hand with known numbers, and small real runs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_report import image, write_run

from hf_continual import TaskQueue
from hf_continual.cli import main
from hf_continual.errors import InputError
from hf_continual.methods.kif import adaptive_coefficients
from hf_continual.report import write_report
from hf_continual.skill_fusion import CASES
from hf_continual.skill_report import (
    LayerImportance,
    layer_importance,
    plot_skill_cases,
    plot_skill_importance,
    skill_table,
    unit_places,
)
from hf_continual.skill_state import read_skill_units, skill_method
from hf_continual.testing import tiny_model, toy_queue_options, toy_stream
from hf_continual.units import SkillUnits

BASE = "base_model.model.model"
KEYS = [*(f"{BASE}.layers.{i}.self_attn.q_proj[{r}]" for i in range(2) for r in range(2)), f"{BASE}.embed_tokens[0]"]

# The worked example of both papers' equations: raw I_2 and Ihat_1, quantile 0.8, temperature 0.25.
FIRST = [0.0, 10.0, 2.0, 9.0, 1.0]
SECOND = [4.0, 1.0, 0.0, 3.0, 2.0]
CUMULATIVE = [0.22378, 0.88811, 0.0, 1.0, 0.11189]
COEFFICIENTS = [0.98201, 0.04743, 0.31003, 0.35434, 0.83202]
NORMALISED = [1.0, 0.25, 0.0, 0.75, 0.5]


def write_task(run, folder, raw, *, method="kif", before=None, cumulative=None, coefficients=None, **options):
    """The state of one task, as the method saves it."""
    keys, scheme = options.pop("keys", KEYS), options.pop("scheme", "lora_rank1")
    vectors = {"raw_": raw, "before_": before, "cumulative_": cumulative or raw, "coefficients_": coefficients}
    state = {name: {"kind": "value", "value": None} for name in vectors}
    state |= {name: {"kind": "tensor"} for name, value in vectors.items() if value is not None}
    state |= {"unit_keys_": {"kind": "value", "value": keys}, "scheme_": {"kind": "value", "value": scheme}}
    options = {"quantile": 0.8, "normalisation": "minmax", **options}
    folder = run / "tasks" / folder / "methods"
    folder.mkdir(parents=True)
    (folder / f"{method}.json").write_text(json.dumps({"method": method, "options": options, "state": state}))
    tensors = {k: torch.tensor(v, dtype=torch.float64) for k, v in vectors.items() if v is not None}
    save_file(tensors, folder / f"{method}.safetensors")
    return folder / f"{method}.json"


def write_kif(path, second=SECOND, coefficients=COEFFICIENTS, method="kif", tasks=("news", "reviews"), **queue):
    run = write_run(path, R=[[0.8, None], [0.6, 0.9]], baseline=None, tasks=list(tasks), **{"variant": method, **queue})
    write_task(run, f"00-{tasks[0]}", FIRST, method=method)
    write_task(
        run,
        f"01-{tasks[1]}",
        second,
        method=method,
        before=FIRST,
        cumulative=CUMULATIVE,
        coefficients=coefficients,
    )
    return run


def rows_of(text):
    """The cells of the rows of every Markdown table in `text`."""
    lines = [line for line in text.splitlines() if line.startswith("|") and set(line) - set("|-: ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def section(report: Path) -> str:
    text = report.read_text(encoding="utf-8")
    return text[text.index("## Skill units") : text.index("## Formulas")]


# Reading


def test_units_of_a_run(tmp_path):
    first, second = read_skill_units(write_kif(tmp_path / "run"))
    assert (first.task, first.index, first.method, first.scheme) == ("news", 0, "kif", "lora_rank1")
    assert (second.task, second.index, second.keys) == ("reviews", 1, KEYS)
    assert first.before is None and first.coefficients is None and first.cases is None and first.case_shares() == {}
    assert second.raw.tolist() == SECOND and second.normalised.tolist() == NORMALISED
    assert second.before.tolist() == FIRST and first.cumulative.tolist() == FIRST
    assert second.cumulative.tolist() == CUMULATIVE and second.coefficients.tolist() == COEFFICIENTS
    assert {each.dtype for each in (second.raw, second.normalised, second.cumulative)} == {torch.float64}
    # Above 0.8 of Norm(I_2) lies the first unit, above 0.92 of Norm(Ihat_1) the second.
    assert [CASES[case] for case in second.cases] == ["current", "past", "neither", "neither", "neither"]
    assert second.case_shares() == pytest.approx({"shared": 0, "past": 0.2, "current": 0.2, "neither": 0.6})
    assert second.options["quantile"] == 0.8


def test_shared_units_and_another_quantile(tmp_path):
    run = write_run(tmp_path / "run", R=[[0.8]], baseline=None, tasks=["news"])
    # Above the median of each: units 0, 3 of the current and 1, 3 of the past.
    write_task(run, "00-news", SECOND, before=FIRST, cumulative=CUMULATIVE, coefficients=COEFFICIENTS, quantile=0.5)
    (units,) = read_skill_units(run)
    assert units.case_shares() == pytest.approx({"shared": 0.2, "past": 0.2, "current": 0.2, "neither": 0.4})


def test_measures(tmp_path):
    first, second = read_skill_units(
        write_kif(tmp_path / "run", second=[10, 14.9, 15, 110, 10.1], coefficients=[0.45, 0.55, 0.5, 0.449, 0.551])
    )
    # Norm(I_2) = 0, 0.049, 0.05, 1, 0.001: three below 0.05; 110 of 160; three of five within [0.45, 0.55].
    assert second.measures() == pytest.approx(
        {"low": 0.6, "top": 110 / 160, "half": 0.6, "min": 0.449, "median": 0.5, "max": 0.551}
    )
    assert first.measures() == pytest.approx({"low": 0.2, "top": 10 / 22})


def test_the_runs_own_normalisation_counts(tmp_path):
    run = write_run(tmp_path / "run", R=[[0.8]], baseline=None, tasks=["news"])
    write_task(run, "00-news", [1000.0, 1.0, 0.0, 3.0, 2.0], normalisation="rank")
    (units,) = read_skill_units(run)
    assert units.normalised.tolist() == NORMALISED


def test_an_unfinished_run(tmp_path):
    run = write_kif(tmp_path / "run", finished=False, cursor=1)
    assert [units.task for units in read_skill_units(run)] == ["news", "reviews"]  # learnt, and not scored yet
    for file in (run / "tasks" / "01-reviews").rglob("*.*"):
        file.unlink()
    (run / "tasks" / "01-reviews" / "methods").rmdir()
    (run / "tasks" / "01-reviews").rmdir()
    assert [units.task for units in read_skill_units(run)] == ["news"]


def test_a_run_of_another_method(tmp_path):
    run = write_run(tmp_path / "run")
    assert skill_method(run) is None
    with pytest.raises(InputError, match="run has no skill units: it trains with none of the methods tasl, kif"):
        read_skill_units(run)
    with pytest.raises(InputError, match="no such run"):
        read_skill_units(tmp_path / "nothing")
    (run / "recipe.yaml").write_text(yaml.safe_dump({"methods": [{"name": "migu"}, {"name": "tasl"}]}))
    assert skill_method(run) == "tasl"
    (run / "recipe.yaml").write_text("methods: [")
    assert skill_method(run) is None


def edit(change):
    def damage(path):
        record = json.loads(path.read_text())
        change(record)
        path.write_text(json.dumps(record))

    return damage


def tensors(**changed):
    def damage(path):
        path = path.with_suffix(".safetensors")
        stored = load_file(path)
        stored |= {name: torch.tensor(value).double() for name, value in changed.items()}
        save_file({name: value for name, value in stored.items() if value.numel()}, path)

    return damage


@pytest.mark.parametrize(
    ("damage", "file", "message"),
    [
        (lambda p: p.unlink(), "kif.json", "is missing"),
        (lambda p: p.write_text(p.read_text()[:50]), "kif.json", "is truncated or was edited"),
        (lambda p: p.write_text("[]"), "kif.json", "is no state of method 'kif'"),
        (lambda p: p.with_suffix(".safetensors").unlink(), "kif.safetensors", "is missing"),
        (lambda p: p.with_suffix(".safetensors").write_bytes(b"\0" * 9), "kif.safetensors", "is truncated"),
        (tensors(raw_=[]), "kif.safetensors", "is truncated or was edited"),
        (tensors(raw_=[1, 2]), "kif.safetensors", "raw_ is no vector of finite numbers for the 5 units"),
        (tensors(coefficients_=[1, 2, 3, 4, np.nan]), "kif.safetensors", "coefficients_ is no vector of finite"),
        (tensors(raw_=[1] * 5), "kif.json", "all 5 skill units are equal"),
        (edit(lambda r: r.update(method="tasl")), "kif.json", "is no state of method 'kif'"),
        (edit(lambda r: r["options"].pop("quantile")), "kif.json", "is no state of method 'kif'"),
        (edit(lambda r: r["options"].update(normalisation="softmax")), "kif.json", "'softmax' is unknown"),
        (edit(lambda r: r["state"].pop("unit_keys_")), "kif.json", "is no state of method 'kif'"),
        (edit(lambda r: r["state"]["unit_keys_"].update(value="layers")), "kif.json", "is no state of method 'kif'"),
        (edit(lambda r: r["state"]["unit_keys_"]["value"].pop()), "kif.safetensors", "for the 4 units"),
        (edit(lambda r: r["state"]["scheme_"].update(value=None)), "kif.json", "is no state of method 'kif'"),
        (edit(lambda r: r["state"].update(before_={"kind": "value", "value": None})), "kif.json", "is no state of"),
    ],
)
def test_damaged_state(tmp_path, damage, file, message):
    run = write_kif(tmp_path / "run")
    path = run / "tasks" / "01-reviews" / "methods"
    damage(path / "kif.json")
    with pytest.raises(InputError, match=message) as error:
        write_report(run)
    text = str(error.value)
    assert text.startswith(str(path / file)) and "\n" not in text
    assert not (run / "report.md").exists() and not list(run.glob("*.png"))


def test_missing_task_folder_and_all_state_gone(tmp_path, capsys):
    run = write_kif(tmp_path / "run")
    (run / "tasks" / "00-news").rename(tmp_path / "elsewhere")
    assert main(["report", str(run)]) == 2
    assert f"error: {run / 'tasks/00-news/methods/kif.json'} is missing" in capsys.readouterr().err
    for file in run.glob("tasks/*/methods/*"):
        file.unlink()
    (run / "recipe.yaml").write_text(yaml.safe_dump({"methods": [{"name": "kif"}]}))
    with pytest.raises(InputError, match=r"00-news/methods/kif\.json is missing"):
        read_skill_units(run)


# Layers and modules


@pytest.mark.parametrize(
    ("expected", "case"),
    [
        (
            {
                f"{BASE}.layers.0.self_attn.q_proj[3]": ("0", "q_proj"),
                f"{BASE}.layers.11.self_attn.q_proj[3]": ("11", "q_proj"),
                f"{BASE}.layers.0.mlp.experts.7.down_proj[0]": ("0", "down_proj"),
                f"{BASE}.layers.0.mlp.experts.8.down_proj[0]": ("0", "down_proj"),
                f"{BASE}.embed_tokens[0]": ("other", "other"),
                "base_model.model.score.weight": ("other", "other"),
            },
            "rank-1 units of a Llama",
        ),
        (
            {
                f"{BASE}.layers.0.self_attn.q_proj.lora_A.weight": ("0", "q_proj A"),
                f"{BASE}.layers.0.self_attn.q_proj.lora_B.weight": ("0", "q_proj B"),
                f"{BASE}.layers.0.self_attn.q_proj.lora_B.bias": ("0", "q_proj B bias"),
                f"{BASE}.layers.0.self_attn.v_proj.lora_A.second.weight": ("0", "v_proj A second"),
                f"{BASE}.embed_tokens.lora_embedding_A": ("other", "other"),
            },
            "A and B of a Llama",
        ),
        (
            {
                "shared.weight": ("other", "other"),
                "encoder.block.0.layer.0.SelfAttention.q.weight": ("encoder 0", "SelfAttention.q"),
                "encoder.block.1.layer.1.layer_norm.weight": ("encoder 1", "layer_norm"),
                "encoder.final_layer_norm.weight": ("other", "other"),
                "decoder.layer_norm.weight": ("other", "other"),
                "decoder.block.0.layer.0.SelfAttention.q.weight": ("decoder 0", "SelfAttention.q"),
                "decoder.block.0.layer.1.EncDecAttention.q.weight": ("decoder 0", "EncDecAttention.q"),
                "decoder.block.0.layer.2.DenseReluDense.wi.weight": ("decoder 0", "wi"),
            },
            "T5",
        ),
        (
            {
                "roberta.embeddings.LayerNorm.bias": ("other", "other"),
                "roberta.encoder.layer.0.attention.self.query.weight": ("0", "query"),
                "roberta.encoder.layer.0.attention.self.query.bias": ("0", "query bias"),
                "roberta.encoder.layer.0.attention.output.dense.weight": ("0", "attention.output.dense"),
                "roberta.encoder.layer.0.intermediate.dense.weight": ("0", "intermediate.dense"),
                "roberta.encoder.layer.0.output.dense.weight": ("0", "output.dense"),
                "classifier.3.weight": ("other", "other"),
            },
            "RoBERTa with a head that is a list",
        ),
        (
            {
                "model.layers.0.mlp.weight": ("0", "mlp"),
                "model.vision.layers.0.mlp.weight": ("vision 0", "mlp"),
            },
            "a stack beside another of nearly the same name",
        ),
        ({"layers.0.weight": ("0", "layers"), "layers.2.bias": ("2", "layers bias")}, "a list of layers"),
        ({"embed.weight": ("other", "embed"), "head.weight": ("other", "head")}, "no layers"),
        ({"weight": ("other", "weight"), "bias": ("other", "bias")}, "a single module"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unit_places(expected, case):
    assert unit_places(expected) == expected


@pytest.mark.parametrize("scheme", ["matrix", "lora_matrix", "lora_rank1"])
@pytest.mark.parametrize(
    ("kind", "layers", "modules"),
    [
        ("llama", {"0", "1"}, {"q_proj", "v_proj"}),
        (
            "t5",
            {"encoder 0", "encoder 1", "decoder 0", "decoder 1"},
            {"SelfAttention.q", "SelfAttention.v", "EncDecAttention.q", "EncDecAttention.v"},
        ),
        ("roberta", {"0", "1"}, {"query", "value"}),
    ],
)
def test_places_of_real_models(kind, layers, modules, scheme):
    places = unit_places(SkillUnits.of_model(tiny_model(kind, lora=scheme != "matrix"), scheme).keys)
    found = set(places.values())
    rows, kinds = {row for row, _ in found}, {kind for _, kind in found}
    assert rows - {"other"} == layers
    if scheme == "matrix":
        assert modules <= kinds and ("other", "other") in found
    else:
        sides = ["{} A", "{} B"] if scheme == "lora_matrix" else ["{}"]
        assert rows == layers and kinds == {side.format(module) for module in modules for side in sides}


def test_a_head_that_learns_beside_lora():
    config = LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    places = unit_places(SkillUnits.of_model(get_peft_model(tiny_model("roberta"), config), "lora_rank1").keys)
    assert list(places.values()).count(("0", "query")) == list(places.values()).count(("1", "query")) == 2
    heads = {key for key, place in places.items() if place == ("other", "other")}
    assert heads and heads == {key for key in places if "classifier" in key} and len(places) == 4 + len(heads)


def test_layer_importance(tmp_path):
    found = layer_importance(read_skill_units(write_kif(tmp_path / "run")))
    assert (found.rows, found.kinds, found.tasks) == (["0", "1", "other"], ["q_proj", "other"], ["news", "reviews"])
    assert found.scale == "minmax"
    # News: 0, 1, 0.2, 0.9, 0.1; reviews: 1, 0.25, 0, 0.75, 0.5. The last unit is the embedding.
    none = [np.nan] * 2
    np.testing.assert_allclose(
        found.values, [[[0.5, 0.625], [0.55, 0.375], none], [none, none, [0.1, 0.5]]], rtol=1e-12
    )


def test_peaked_scores_are_drawn_as_ranks(tmp_path):
    peaked = [100.0, 1.0, 0.0, 3.0, 2.0]
    units = read_skill_units(write_kif(tmp_path / "run", second=peaked))
    found = layer_importance(units)
    assert found.scale == "rank"
    np.testing.assert_allclose(found.values[0, :2, 1], [0.625, 0.375])
    np.testing.assert_allclose(layer_importance(units, "minmax").values[0, :2, 1], [0.505, 0.015])
    logs = np.log([1000, 10, 1, 30]) / np.log(1000)  # a score of zero counts as a tenth of the smallest above it
    np.testing.assert_allclose(layer_importance(units, "log").values[0, :2, 1], [logs[:2].mean(), logs[2:].mean()])
    with pytest.raises(InputError, match="no units"):
        layer_importance([])


def test_layers_come_in_their_order(tmp_path):
    run = write_run(tmp_path / "run", R=[[0.8]], baseline=None, tasks=["news"])
    keys = ["shared.weight", *(f"{t}.block.{i}.layer.0.SelfAttention.q.weight" for t in "ed" for i in (10, 9))]
    write_task(run, "00-news", FIRST, keys=keys, method="tasl", scheme="matrix")
    found = layer_importance(read_skill_units(run))
    assert found.rows == ["e 9", "e 10", "d 9", "d 10", "other"]
    np.testing.assert_allclose(found.values[0, :4, 0], [0.2, 1, 0.1, 0.9])


# Plots and reports


def test_plots_show_the_numbers(tmp_path):
    import matplotlib

    backend = dict.__getitem__(matplotlib.rcParams, "backend")
    drawn = [
        image(
            plot_skill_importance(
                LayerImportance(["0", "1"], ["q_proj"], ["a", "b"], np.array([cells]), "rank"), tmp_path / "map.png"
            )
        )
        for cells in ([[0.1, 0.9], [0.2, 0.0]], [[0.9, 0.1], [0.2, 0.0]], [[0.1, 0.9], [0.2, np.nan]])
    ]
    assert drawn[0].shape == drawn[1].shape and (drawn[0] != drawn[1]).any()
    assert (drawn[0] != drawn[2]).any()  # no unit is another thing than no importance
    shares = {"shared": 0.25, "past": 0.25, "current": 0.0, "neither": 0.5}
    bars = [
        image(plot_skill_cases({"kif": {"news": each}}, tmp_path / "bars.png"))
        for each in (shares, shares | {"past": 0.0, "current": 0.25})
    ]
    assert (bars[0] != bars[1]).any()
    # Purple is `shared`, a quarter of the bar; grey is `neither`, a half, so twice the area but for the number in it.
    purple, grey = (
        (np.abs(bars[0][..., :3] - np.array(colour) / 255).max(axis=-1) < 0.01).sum()
        for colour in [(0x7B, 0x5E, 0xA7), (0xDD, 0xDD, 0xDD)]
    )
    assert 1.7 < grey / purple < 2.3
    with pytest.raises(InputError, match="no task was merged yet"):
        plot_skill_cases({"kif": {}}, tmp_path / "none.png")
    assert dict.__getitem__(matplotlib.rcParams, "backend") is backend


def test_report_of_one_run(tmp_path):
    run = write_kif(tmp_path / "run")
    text = section(write_report(run, tmp_path / "out"))
    header, news, reviews = rows_of(text)
    assert header[:6] == ["task", "units", "shared", "past", "current", "neither"]
    assert header[6:] == ["scores < 0.05", "top unit", "c in [0.45, 0.55]", "c min", "c median", "c max"]
    assert news == ["news", "5", *"----", "20.0", "45.5", *"----"]
    assert reviews == ["reviews", "5", "0.0", "20.0", "20.0", "60.0", "20.0", "40.0", "0.0", "0.047", "0.354", "0.982"]
    assert "kif, `lora_rank1`: row r of A with column r of B" in text and "quantile 0.8" in text
    assert "![unit importance, kif](skill_importance.png)" in text and "Colour: I_k, min-max over all units" in text
    assert "(skill_cases.png)" in text
    for name in ("skill_importance.png", "skill_cases.png"):
        assert image(tmp_path / "out" / name)[..., :3].std() > 0.05
    assert not list(run.glob("*.png"))


def test_report_says_when_ranks_are_drawn(tmp_path):
    text = section(write_report(write_kif(tmp_path / "run", second=[100.0, 1.0, 0.0, 3.0, 2.0])))
    assert "Colour: I_k as ranks over all units" in text and "min-max over all units" not in text


@pytest.mark.parametrize("finished", [True, False])
def test_report_after_the_first_task(tmp_path, finished):
    tasks = ["news"] if finished else ["news", "reviews"]
    run = write_run(tmp_path / "run", R=[[0.8] * len(tasks)], baseline=None, tasks=tasks, finished=finished, cursor=1)
    write_task(run, "00-news", FIRST, method="tasl")
    text = section(write_report(run))
    assert len(rows_of(text)) == 2 and rows_of(text)[1][:3] == ["news", "5", "-"]
    assert (run / "skill_importance.png").exists()
    assert not (run / "skill_cases.png").exists() and "skill_cases" not in text


def test_report_of_a_run_that_has_learnt_nothing(tmp_path):
    run = write_run(tmp_path / "run", R=[], baseline=None, finished=False, cursor=0)
    (run / "recipe.yaml").write_text(yaml.safe_dump({"methods": [{"name": "kif"}]}))
    assert read_skill_units(run) == []
    assert "## Skill units" not in write_report(run).read_text(encoding="utf-8")


def test_report_of_several_runs(tmp_path):
    root = tmp_path / "runs"
    write_kif(root / "kif" / "seed-42")
    # Every unit but one near zero and one half; the most and the least important are the first and the third again.
    flat = [0.5, 0.5, 0.5, 0.5, 0.99]
    write_kif(root / "kif" / "seed-43", second=[100.0, 1.0, 0.0, 3.0, 2.0], coefficients=flat, seed=43)
    write_kif(root / "tasl" / "seed-42", method="tasl")
    write_kif(root / "one", variant="a/b c")
    write_kif(root / "two", variant="a b c")
    write_kif(root / "waiting", variant="waiting", finished=False, cursor=1)
    write_run(root / "naive", tasks=["news", "reviews"], R=[[0.8, None], [0.6, 0.9]], baseline=None)
    text = section(write_report(root, tmp_path / "out"))
    _, *table = rows_of(text)
    rows = {(row[0], row[2]): row for row in table}
    assert set(rows) == {(label, task) for label in ("kif", "tasl", "a/b c", "a b c") for task in ("news", "reviews")}
    # Means over seeds of 20 and 80 %, 40 and 100/106, 0 and 80 %, medians 0.354 and 0.5; extremes over both.
    assert rows["kif", "reviews"][1:4] == ["2", "reviews", "5"]
    assert rows["kif", "reviews"][8:] == ["50.0", "67.2", "40.0", "0.047", "0.427", "0.990"]
    assert rows["tasl", "reviews"][1] == "1" and rows["tasl", "reviews"][-3:] == ["0.047", "0.354", "0.982"]
    assert "Not finished, not in the means: waiting, seed 42 (1 of 2 tasks)" in text
    figures = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert sorted(figures) == [
        "skill_cases.png",
        "skill_importance-a-b-c-2.png",
        "skill_importance-a-b-c.png",
        "skill_importance-kif.png",
        "skill_importance-tasl.png",
    ]
    assert all((tmp_path / "out" / name).is_file() for name in figures)
    # One seed of one variant is peaked, so all figures show ranks.
    assert text.count("Colour: ") == 1 and "as ranks" in text


def test_seeds_are_averaged_in_the_heat_map(tmp_path):
    one = read_skill_units(write_kif(tmp_path / "a"))
    two = read_skill_units(write_kif(tmp_path / "b", second=[1.0, 1.0, 0.0, 3.0, 4.0]))
    # The second seed's scores are 0.25, 0.25, 0, 0.75, 1.
    np.testing.assert_allclose(layer_importance([*one, *two], "minmax").values[0, :2, 1], [(0.625 + 0.25) / 2, 0.375])
    assert "| kif" in skill_table({"kif": [one, two]}) and "| 2 " not in skill_table({"x": [one]})


def test_no_finished_run(tmp_path):
    write_kif(tmp_path / "runs" / "kif", finished=False, cursor=1)
    text = section(write_report(tmp_path / "runs"))
    assert "Not finished, not in the means: kif, seed 42" in text and not rows_of(text)


def test_reports_of_other_runs_need_no_torch(tmp_path):
    run = write_run(tmp_path / "run")
    code = (
        "import sys; from hf_continual.report import write_report; "
        f"print(write_report({str(run)!r})); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


# Real runs


@pytest.mark.parametrize(
    ("kind", "method", "lora", "scheme"),
    [("llama", "kif", True, "lora_rank1"), ("t5", "tasl", True, "lora_matrix"), ("t5", "tasl", False, "matrix")],
)
def test_a_trained_run(tmp_path, kind, method, lora, scheme):
    options = toy_queue_options(kind, lora=lora, num_train_epochs=1)
    TaskQueue(tmp_path / "run", tasks=toy_stream(2, rows=8, eval_rows=2), methods=[method], **options).run()
    first, second = read_skill_units(tmp_path / "run")
    assert (first.scheme, first.keys) == (scheme, second.keys) and len(second.keys) > 4
    assert first.cases is None and torch.equal(second.before, first.cumulative)
    assert sum(second.case_shares().values()) == pytest.approx(1)
    # What the method stored of itself, and what it merged with, is what is read from the scores.
    record = json.loads((tmp_path / f"run/tasks/01-toy1/methods/{method}.json").read_text())
    assert second.case_shares() == pytest.approx(record["state"]["shares_"]["value"])
    if method == "kif":
        torch.testing.assert_close(
            adaptive_coefficients(second.raw, second.before, second.options["temperature"]), second.coefficients
        )
    assert main(["report", str(tmp_path / "run")]) == 0
    rows = rows_of(section(tmp_path / "run" / "report.md"))
    assert [row[:2] for row in rows[1:]] == [["toy0", str(len(first.keys))], ["toy1", str(len(first.keys))]]
    assert (tmp_path / "run" / "skill_importance.png").is_file() and (tmp_path / "run" / "skill_cases.png").is_file()
