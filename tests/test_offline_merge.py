import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from hf_continual import TaskQueue
from hf_continual.cli import main
from hf_continual.errors import InputError
from hf_continual.methods.kif import adaptive_coefficients
from hf_continual.offline_merge import merge_offline, read_importance
from hf_continual.testing import tiny_model, toy_queue_options, toy_stream

ADAPTER = "adapter_model.safetensors"


def learn(folder, method, kind="llama", lora=True, **options):
    queue = TaskQueue(folder, tasks=toy_stream(2), methods=[{"name": method, "keep_unmerged": True, **options}],
                      **toy_queue_options(kind, lora=lora, num_train_epochs=1))  # fmt: skip
    queue.run()
    return sorted((folder / "tasks").iterdir())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return learn(tmp_path_factory.mktemp("kif") / "run", "kif")


def equal_files(a, b):
    first, second = load_file(str(a)), load_file(str(b))
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_repeats_the_merge_of_the_run_bit_for_bit(run, tmp_path, capsys):
    words = [
        "--previous",
        str(run[0]),
        "--current",
        str(run[1]),
        "--importance",
        str(run[1]),
        "-o",
        str(tmp_path / "o"),
    ]
    assert main(["merge", "--method", "kif", *words]) == 0
    assert "kif: 16 units" in capsys.readouterr().out
    assert equal_files(run[1] / "adapter" / ADAPTER, tmp_path / "o" / ADAPTER)
    PeftModel.from_pretrained(tiny_model(), str(tmp_path / "o"))
    summary = json.loads((tmp_path / "o" / "merge.json").read_text())
    assert summary["options"]["temperature"] == 0.25 and sum(summary["shares"].values()) == pytest.approx(1.0)
    assert not list(tmp_path.glob(".o*"))


@pytest.mark.parametrize(("method", "kind", "lora"), [("tasl", "t5", False), ("tasl", "roberta", True)])
def test_repeats_other_schemes(method, kind, lora, tmp_path):
    if kind == "roberta":  # a classifier: its head is saved with the adapter
        tasks = learn_classifier(tmp_path / "run", method)
        name = ADAPTER
    else:
        tasks = learn(tmp_path / "run", method, kind, lora)
        name = "model.safetensors"
    merge_offline(method, tasks[0], tasks[1], [tasks[1]], tmp_path / "o")
    folder = "adapter" if name == ADAPTER else "model"
    assert equal_files(tasks[1] / folder / name, tmp_path / "o" / name)


def learn_classifier(folder, method):
    """Two tasks by hand, kept in the layout of a run; the head is in modules_to_save."""
    from hf_continual.methods.base import MethodList
    from hf_continual.run_state import write_json
    from hf_continual.testing import toy_rows, train_task

    config = LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"], task_type="SEQ_CLS")
    model = get_peft_model(tiny_model("roberta"), config)
    methods = MethodList([{"name": method, "keep_unmerged": True}])
    for i in range(2):
        train_task(model, toy_rows("roberta", seed=i), methods, folder / "out", kind="roberta")
        task = folder / "tasks" / f"0{i}-t{i}"
        model.save_pretrained(str(task / "adapter"))
        methods.save(task / "methods")
        write_json(task / "model.json", {"kind": "lora"})
    return sorted((folder / "tasks").iterdir())


def test_plain_adapters_and_two_score_files(run, tmp_path):
    """No run directory: two adapters of PEFT, the scores of the task, and those of the past."""
    current = tmp_path / "current"
    shutil.copytree(run[0] / "adapter", current)
    generator = torch.Generator().manual_seed(0)
    before = load_file(str(run[0] / "adapter" / ADAPTER))
    after = {k: v + torch.randn(v.shape, generator=generator) for k, v in before.items()}
    save_file(after, str(current / ADAPTER))
    files = [run[1] / "methods" / "kif.json", run[0] / "methods" / "kif.safetensors"]
    merge_offline("kif", run[0] / "adapter", current, files, tmp_path / "o", {"temperature": 0.1})
    now, past = read_importance(run[1]), read_importance(run[0])
    c = dict(zip(now.keys, adaptive_coefficients(now.raw, past.cumulative, 0.1), strict=True))
    merged = load_file(str(tmp_path / "o" / ADAPTER))
    for name in merged:
        module = name.split(".lora_")[0]
        weights = torch.stack([c[f"{module}[{r}]"] for r in range(4)])
        weights = weights[:, None] if ".lora_A." in name else weights[None]
        expected = before[name].double() + weights * (after[name].double() - before[name].double())
        assert torch.allclose(merged[name].double(), expected, rtol=1e-6, atol=1e-9)


def test_weight_ensemble_needs_no_importance(run, tmp_path):
    current = tmp_path / "current"
    shutil.copytree(run[0] / "adapter", current)
    before = load_file(str(run[0] / "adapter" / ADAPTER))
    save_file({k: v + 2 for k, v in before.items()}, str(current / ADAPTER))
    merge_offline("weight_ensemble", run[0], current, [], tmp_path / "o", {"coefficient": 0.25})
    merged = load_file(str(tmp_path / "o" / ADAPTER))
    assert all(torch.allclose(merged[k], before[k] + 0.5) for k in merged)


def test_a_model_of_several_files(tmp_path):
    tasks = learn(tmp_path / "run", "tasl", "llama", False)
    sharded = []
    for task in tasks:
        model = tiny_model()
        model.load_state_dict(load_file(str(task / "model" / "model.safetensors")), strict=False)
        model.save_pretrained(str(tmp_path / task.name), max_shard_size="40KB")
        sharded.append(tmp_path / task.name)
    assert len(list(sharded[1].glob("*.safetensors"))) > 1
    merge_offline("tasl", sharded[0], sharded[1], [tasks[1]], tmp_path / "o")
    record = read_importance(tasks[1])
    merged, before, after = (
        {k: v for f in folder.glob("*.safetensors") for k, v in load_file(str(f)).items()}
        for folder in (tmp_path / "o", *sharded)
    )
    state = load_file(str(tasks[1] / "methods" / "tasl.safetensors"))
    for key, c in zip(record.keys, state["coefficients_"], strict=True):
        expected = before[key].double() + c * (after[key].double() - before[key].double())
        assert torch.allclose(merged[key].double(), expected, rtol=1e-6, atol=1e-8), key


def refused(tmp_path, capsys, *words):
    code = main(["merge", "-o", str(tmp_path / "out"), *map(str, words)])
    error = capsys.readouterr().err
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    assert not (tmp_path / "out").exists()
    return error


def test_bad_input_is_one_sentence_and_writes_nothing(run, tmp_path, capsys):
    fuse = ["--previous", run[0], "--current", run[1]]
    assert "needs a run directory" in refused(tmp_path, capsys)
    assert "--current" in refused(tmp_path, capsys, "--method", "kif", "--previous", run[0])
    assert "migu" in refused(tmp_path, capsys, "--method", "migu", *fuse, "--importance", run[1])
    assert "needs --importance" in refused(tmp_path, capsys, "--method", "kif", *fuse)
    assert "takes no --importance" in refused(tmp_path, capsys, "--method", "weight_ensemble", *fuse,
                                                  "--importance", run[1])  # fmt: skip
    assert "temperature" in refused(tmp_path, capsys, "--method", "kif", *fuse, "--importance", run[1],
                                    "--options", "{temprature: 1}")  # fmt: skip
    assert "a mapping" in refused(tmp_path, capsys, "--method", "kif", *fuse, "--importance", run[1], "--options", "1")
    assert "by 'kif' already" in refused(tmp_path, capsys, "--method", "kif", *fuse, "--importance", run[0])
    assert "first task" in refused(tmp_path, capsys, "--method", "kif", "--previous", run[0] / "adapter",
                                   "--current", run[0] / "adapter", "--importance", run[0])  # fmt: skip
    assert "holds no importance" in refused(tmp_path, capsys, "--method", "kif", *fuse, "--importance", tmp_path)
    assert "is not there" in refused(tmp_path, capsys, "--method", "kif", "--previous", tmp_path, "--current", run[1],
                                     "--importance", run[1])  # fmt: skip
    assert "leave out the run" in refused(tmp_path, capsys, run[0].parent.parent, "--method", "kif", *fuse,
                                          "--importance", run[1])  # fmt: skip


@pytest.mark.parametrize("change", ["rank", "targets", "alpha", "dora"])
def test_other_adapters_are_refused_with_what_differs(change, run, tmp_path, capsys):
    options = {"rank": {"r": 2}, "targets": {"target_modules": ["q_proj"]}, "alpha": {"lora_alpha": 4},
               "dora": {"use_dora": True}}[change]  # fmt: skip
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **options})
    get_peft_model(tiny_model(), config).save_pretrained(str(tmp_path / "other"))
    words = ["--method", "kif", "--current", tmp_path / "other", "--importance", run[1]]
    error = refused(tmp_path, capsys, *words, "--previous", run[0] / "adapter")
    first = "'base_model.model.model.layers.0.self_attn."
    named = {"rank": first + "q_proj.lora_A.weight'", "targets": first + "v_proj.lora_A.weight'",
             "alpha": "'lora_alpha'", "dora": first + "q_proj.lora_magnitude_vector'"}  # fmt: skip
    assert named[change] in error
    if change in ("rank", "targets", "dora"):  # two that fit each other, and not the importance
        error = refused(tmp_path, capsys, *words, "--previous", tmp_path / "other")
        assert "DoRA" in error if change == "dora" else "belongs to another model" in error
    assert sorted(p.name for p in run[1].iterdir()) == ["adapter", "adapters", "log.json", "manifest.json", "methods",
                                                        "model.json", "predictions"]  # fmt: skip


def test_damaged_importance_is_refused(run, tmp_path):
    for name, content in (("kif.json", b"{"), ("kif.safetensors", b"x" * 40)):
        folder = tmp_path / name
        shutil.copytree(run[1] / "methods", folder)
        (folder / name).write_bytes(content)
        with pytest.raises(InputError, match="kif"):
            read_importance(folder)
    with pytest.raises(InputError, match="missing"):
        (tmp_path / "kif.json" / "kif.json").write_bytes((run[1] / "methods" / "kif.json").read_bytes())
        (tmp_path / "kif.json" / "kif.safetensors").unlink()
        read_importance(tmp_path / "kif.json" / "kif.json")


def test_an_interrupted_merge_leaves_nothing(run, tmp_path, monkeypatch):
    import hf_continual.offline_merge as module

    def fail(*args, **kwargs):
        raise RuntimeError("killed")

    monkeypatch.setattr(module, "write_json", fail)
    with pytest.raises(RuntimeError):
        merge_offline("kif", run[0], run[1], [run[1]], tmp_path / "o")
    assert not list(tmp_path.iterdir())
