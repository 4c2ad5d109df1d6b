import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from hf_continual import TaskQueue
from hf_continual.cli import main
from hf_continual.errors import InputError
from hf_continual.lora import LoraView
from hf_continual.methods.base import MethodList
from hf_continual.methods.kif import adaptive_coefficients
from hf_continual.offline_merge import merge_offline, read_importance
from hf_continual.run_state import write_json
from hf_continual.testing import tiny_model, toy_queue_options, toy_rows, toy_stream, train_task

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
    config = LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"], task_type="SEQ_CLS")
    return learn_by_hand(folder, get_peft_model(tiny_model("roberta"), config), method, "roberta", keep_unmerged=True)


def learn_by_hand(folder, model, method, kind="llama", seed=0, **options):
    """Two tasks of any model, kept in the layout of a run."""
    methods, view = MethodList([{"name": method, **options}]), LoraView(model)
    for i in range(2):
        train_task(model, toy_rows(kind, seed=seed + i), methods, folder / "out", kind=kind)
        task = folder / "tasks" / f"0{i}-t{i}"
        if view.is_peft:
            view.export(task / "adapter")
        else:
            model.save_pretrained(str(task / "model"))
        methods.save(task / "methods")
        write_json(task / "model.json", {"kind": "lora" if view.is_peft else "full"})
    return sorted((folder / "tasks").iterdir())


def tied_llama():
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, pad_token_id=0,
                         num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)  # fmt: skip
    return LlamaForCausalLM(config)


def adapted(model, **options):
    torch.manual_seed(1)
    return get_peft_model(
        model, LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | options)
    )


def partly_frozen(model):
    model.model.layers[0].requires_grad_(False)
    return model


TIED = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
UNUSUAL = {
    "LoRA on embeddings": lambda: adapted(tiny_model(), target_modules=["embed_tokens", "q_proj"]),
    "LoRA on tied embeddings": lambda: adapted(tied_llama(), target_modules=["embed_tokens", "q_proj"]),
    "kept modules": lambda: adapted(tied_llama(), modules_to_save=["embed_tokens"]),
    "kept modules, tied": lambda: adapted(tied_llama(), **TIED),
    "partly frozen": lambda: partly_frozen(tiny_model()),
    "partly frozen, tied": lambda: partly_frozen(tied_llama()),
}


@pytest.mark.parametrize("method", ["tasl", "kif"])
@pytest.mark.parametrize("case", UNUSUAL)
def test_repeats_the_merge_of_models_with_frozen_or_tied_weights(case, method, tmp_path):
    model, options = UNUSUAL[case](), {"quantile": 0.5} if method == "tasl" else {}
    if method == "kif" and "frozen" in case:
        options["units"] = "matrix"
    tasks = learn_by_hand(tmp_path / "run", model, method, keep_unmerged=True, **options)
    merge_offline(method, tasks[0], tasks[1], [tasks[1]], tmp_path / "o")
    name = "model.safetensors" if "frozen" in case else ADAPTER
    stored = tasks[1] / ("model" if "frozen" in case else "adapter") / name
    assert equal_files(stored, tmp_path / "o" / name)


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
    assert "not the importance of the task" in refused(
        tmp_path, capsys, "--method", "kif", *fuse, "--importance", run[0]
    )
    assert "beta1 acts while" in refused(tmp_path, capsys, "--method", "kif", *fuse, "--importance", run[1],
                                         "--options", "{beta1: 0.5}")  # fmt: skip
    swapped = ["--previous", run[1], "--current", run[0], "--importance", run[1]]
    assert "not the importance of the task" in refused(tmp_path, capsys, "--method", "kif", *swapped)
    assert "first task" in refused(tmp_path, capsys, "--method", "kif", "--previous", run[0] / "adapter",
                                   "--current", run[0] / "adapter", "--importance", run[0])  # fmt: skip
    assert "holds no importance" in refused(tmp_path, capsys, "--method", "kif", *fuse, "--importance", tmp_path)
    assert "is not there" in refused(tmp_path, capsys, "--method", "kif", "--previous", tmp_path, "--current", run[1],
                                     "--importance", run[1])  # fmt: skip
    assert "leave out the run" in refused(tmp_path, capsys, run[0].parent.parent, "--method", "kif", *fuse,
                                          "--importance", run[1])  # fmt: skip


def test_input_that_is_missing_or_damaged_is_one_sentence(run, tmp_path, capsys):
    fuse = ["--method", "kif", "--previous", run[0], "--current", run[1]]
    missing = tmp_path / "elsewhere"
    error = refused(tmp_path, capsys, *fuse, "--importance", missing)
    assert f"--importance {missing}: there is no such file or folder" in error
    for options in ("[1]", "temperature", "3"):
        error = refused(tmp_path, capsys, *fuse, "--importance", run[1], "--options", options)
        assert f"--options {options}: write a mapping" in error
    scores = copied_scores(run[1], tmp_path / "scores.json", raw_=float("nan"))
    error = refused(tmp_path, capsys, *fuse[:-1], tmp_path / "adapter", "--importance", scores)
    assert f"--importance {scores}: 1 of 16 importance scores are NaN" in error


def copied_scores(task, path, options=None, **first):
    """The importance of a task under another name, with other options, or another first value of a tensor."""
    record = json.loads((task / "methods" / "kif.json").read_text())
    record["options"] |= options or {}
    path.write_text(json.dumps(record))
    tensors = load_file(str(task / "methods" / "kif.safetensors"))
    for name, value in first.items():
        tensors[name][0] = value
    save_file(tensors, str(path.with_suffix(".safetensors")))
    shutil.copytree(task / "adapter", path.parent / "adapter")
    return path


def test_a_renamed_file_keeps_its_options_and_the_weights_from_before_the_merge(run, tmp_path):
    plain = merge_offline("kif", run[0], run[1], [run[1]], tmp_path / "plain", {"temperature": 0.07})
    renamed = copied_scores(run[1], tmp_path / "mine.json", {"temperature": 0.07})
    summary = merge_offline("kif", run[0], run[1], [renamed], tmp_path / "renamed")
    assert summary["options"] == plain["options"] and summary["options"]["temperature"] == 0.07
    assert equal_files(tmp_path / "plain" / ADAPTER, tmp_path / "renamed" / ADAPTER)
    assert not equal_files(run[1] / "adapter" / ADAPTER, tmp_path / "renamed" / ADAPTER)


def test_importance_may_be_given_in_one_option_or_two(run, tmp_path, capsys):
    fuse = ["merge", "--method", "kif", "--previous", str(run[0]), "--current", str(run[1])]
    now, past = str(run[1]), str(run[0])
    assert main([*fuse, "--importance", now, past, "-o", str(tmp_path / "one")]) == 0
    assert main([*fuse, "--importance", now, "--importance", past, "-o", str(tmp_path / "two")]) == 0
    assert equal_files(tmp_path / "one" / ADAPTER, tmp_path / "two" / ADAPTER)
    assert equal_files(tmp_path / "one" / ADAPTER, run[1] / "adapter" / ADAPTER)
    error = refused(tmp_path, capsys, *fuse[1:], "--importance", now, now)
    assert f"--importance {now}" in error and "is not the one that" in error


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """Runs by hand that keep no weights from before the merge."""
    folder = tmp_path_factory.mktemp("merged")
    names = ("kif", "weight_ensemble", "weight_ema", "fisher_merge")
    return {name: learn_by_hand(folder / name, tiny_model(lora=True), name, seed=5) for name in names}


@pytest.mark.parametrize("inside", ["", "adapter"])
@pytest.mark.parametrize("merger", ["kif", "weight_ensemble", "weight_ema", "fisher_merge"])
def test_weights_of_a_merged_task_are_refused(merger, inside, run, merged, tmp_path, capsys):
    current = merged[merger][1] / inside
    words = ["--previous", merged[merger][0], "--current", current]
    said = f"--current {current}: its weights were merged by '{merger}' already"
    assert said in refused(tmp_path, capsys, "--method", "weight_ensemble", *words)
    assert said in refused(tmp_path, capsys, "--method", "kif", *words, "--importance", merged["kif"][1])


@pytest.mark.parametrize("inside", ["", "adapter"])
def test_weights_of_a_first_task_are_not_merged_yet(inside, run, merged, tmp_path):
    """Two runs side by side, each with the importance of its own."""
    files = [merged["kif"][0], run[0]]
    merge_offline("kif", run[0] / inside, merged["kif"][0] / inside, files, tmp_path / "o")
    now, past = (read_importance(file) for file in files)
    c = dict(zip(now.keys, adaptive_coefficients(now.raw, past.cumulative), strict=True))
    before, after, found = (
        load_file(str(folder / ADAPTER))["base_model.model.model.layers.1.self_attn.v_proj.lora_A.weight"]
        for folder in (run[0] / "adapter", merged["kif"][0] / "adapter", tmp_path / "o")
    )
    shares = torch.stack([c[f"base_model.model.model.layers.1.self_attn.v_proj[{r}]"] for r in range(4)])[:, None]
    torch.testing.assert_close(found.double(), before.double().lerp(after.double(), shares), rtol=1e-6, atol=1e-9)


def test_importance_of_another_rank_is_refused_for_whole_matrices(tmp_path):
    tasks = learn_by_hand(tmp_path / "run", adapted(tiny_model(), r=4), "tasl")
    adapted(tiny_model(), r=2).save_pretrained(str(tmp_path / "two"))
    said = r"belongs to another model: '.*layers\.0\.self_attn\.q_proj\.lora_A\.weight' has 128 weights there and 64 in"
    with pytest.raises(InputError, match=said):
        merge_offline("tasl", tmp_path / "two", tmp_path / "two", [tasks[1]], tmp_path / "o")
    assert not (tmp_path / "o").exists()


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
