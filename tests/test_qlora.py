"""A 4-bit base (bitsandbytes) under LoRA, on the CPU; the same code runs on GPUs."""

import importlib.util
import logging
import sys
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, set_seed

from hf_continual import TaskQueue, run_model
from hf_continual.distributed import release_engine
from hf_continual.errors import InputError
from hf_continual.lora import LoraView
from hf_continual.merging import merge_adapters, write_merged
from hf_continual.methods.base import MethodList, method_names
from hf_continual.models import ModelConfig, apply_lora, check_four_bits, in_four_bits, load_model, to_meta
from hf_continual.provenance import first_difference
from hf_continual.replay import model_key
from hf_continual.run_model import RunModel
from hf_continual.run_state import RunDirectory, read_json, write_json
from hf_continual.testing import (
    VOCABULARY,
    close,
    equal,
    toy_queue_options,
    toy_rows,
    toy_stream,
    toy_tokenizer,
    train_task,
)
from hf_continual.trainer import ContinualTrainer

sys.path.insert(0, str(Path(__file__).parent / "distributed"))

from backends import make_args, state_of  # noqa: E402
from ranks import run_ranks  # noqa: E402

IDS = torch.arange(3, 15).view(1, -1)
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason="bitsandbytes is missing: pip install 'hf-continual[qlora]'",
)
METHODS = {
    "naive": {"name": "naive"},
    "migu": {"name": "migu", "threshold": 0.5},
    "tasl": {"name": "tasl"},
    "kif": {"name": "kif", "replay_count": 6, "quantile": 0.5},
    "seekr": {"name": "seekr", "count": 3, "layers": 2, "heads": 4, "query_rows": 4},
    "seekr, outputs": {"name": "seekr", "count": 3, "layers": 2, "heads": 4, "query_rows": 4, "attention": "outputs"},
    "kif, products": {"name": "kif", "space": "products"},
    "tasl, memory": {"name": "tasl", "replay_count": 6, "units": "lora_rank1"},
    "derpp": {"name": "derpp", "count": 4},
    "replay": {"name": "replay", "count": 4},
    "er": {"name": "er", "count": 4},
    "olora": {"name": "olora"},
    "inclora": {"name": "inclora"},
    "ewc": {"name": "ewc"},
    "lwf": {"name": "lwf"},
    "agem": {"name": "agem", "count": 4},
    "gem": {"name": "gem", "count": 4},
    "weight_ema": {"name": "weight_ema"},
    "weight_ensemble": {"name": "weight_ensemble"},
    "fisher_merge": {"name": "fisher_merge"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama whose weights fill whole blocks of 64, which bitsandbytes packs without padding."""
    path = tmp_path_factory.mktemp("model")
    set_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    toy_tokenizer().save_pretrained(path)
    return path


TARGETS = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}


def four_bits(folder, **options):
    return ModelConfig(name=str(folder), load_in_4bit=True, **options)


def queue(folder, run, methods, tasks=2, **training):
    options = toy_queue_options(**{"num_train_epochs": 1, **training})
    options["evaluation"] |= {"max_new_tokens": 2}
    options |= {"model": four_bits(folder), "processing_class": None}
    return TaskQueue(run, tasks=toy_stream(tasks, rows=8, eval_rows=4), methods=methods, **options)


def adapted(folder, **options):
    model = load_model(four_bits(folder, **options))
    set_seed(1)
    model = apply_lora(model, TARGETS)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def packed(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if type(p).__name__ == "Params4bit"}


# -- without bitsandbytes ----------------------------------------------------------------------------------------------


def test_a_missing_bitsandbytes_names_the_extra(folder, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else found(name))
    with pytest.raises(InputError, match=r"pip install 'hf-continual\[qlora\]'"):
        load_model(four_bits(folder))


@pytest.mark.parametrize(
    "options, said",
    [
        ({"gguf_file": "m.gguf"}, r"model\.load_in_4bit with model\.gguf_file=m\.gguf"),
        ({"bnb_4bit_quant_type": "int4"}, "bnb_4bit_quant_type='int4' is unknown; choose nf4 or fp4"),
        ({"bnb_4bit_use_double_quant": "yes"}, "bnb_4bit_use_double_quant='yes' must be true or false"),
    ],
)
def test_options_that_do_not_fit_are_named(folder, options, said):
    with pytest.raises(InputError, match=said):
        four_bits(folder, **options)


def test_what_four_bits_cannot_do_is_refused(folder):
    config = four_bits(folder)
    with pytest.raises(InputError, match="leaves nothing to train"):
        check_four_bits(config, adapted=False)
    for backend in ("fsdp2", "zero3"):
        with pytest.raises(InputError, match=f"cannot be combined with {backend}"):
            check_four_bits(config, True, backend)
    for backend in (None, "single", "ddp", "zero0", "zero1", "zero2"):
        check_four_bits(config, True, backend)
    check_four_bits(ModelConfig(name=str(folder)), False, "zero3")


def test_every_method_is_tried():
    assert {spec["name"] for spec in METHODS.values()} == set(method_names())


# -- with bitsandbytes -------------------------------------------------------------------------------------------------


@needs_bitsandbytes
@pytest.mark.parametrize("quant_type, double", [("nf4", True), ("fp4", False)])
def test_options_reach_the_weights(folder, quant_type, double):
    model = load_model(
        four_bits(folder, dtype="bfloat16", bnb_4bit_quant_type=quant_type, bnb_4bit_use_double_quant=double)
    )
    layer = model.model.layers[0].self_attn.q_proj
    assert in_four_bits(model) and type(layer).__name__ == "Linear4bit" and layer.weight.dtype == torch.uint8
    assert (layer.weight.quant_state.quant_type, layer.weight.quant_state.nested) == (quant_type, double)
    assert layer.compute_dtype == torch.bfloat16 and model.lm_head.weight.dtype == torch.bfloat16


@needs_bitsandbytes
def test_an_empty_model_has_the_same_layers(folder):
    empty = load_model(four_bits(folder), empty=True)
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    assert [n for n, _ in empty.named_parameters()] == [n for n, _ in load_model(four_bits(folder)).named_parameters()]


@needs_bitsandbytes
@pytest.mark.parametrize("reentrant", [None, True, False])
def test_only_the_adapter_learns(folder, tmp_path, reentrant):
    model = adapted(folder, dtype="bfloat16")
    assert {p.dtype for n, p in model.named_parameters() if "norm" in n or "lora" in n} == {torch.float32}
    before, frozen = LoraView(model), packed(model)
    start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    assert before.is_peft and len(frozen) == 14 and all("lora_" in n for n in start)
    options = {}
    if reentrant is not None:
        options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    train_task(model, toy_rows(), ["migu"], tmp_path, **options)
    after = dict(model.named_parameters())
    assert all(torch.equal(value, after[name]) for name, value in frozen.items())
    assert all(not torch.equal(value, after[n]) for n, value in start.items() if "lora_B" in n)


@needs_bitsandbytes
def test_scoring_changes_neither_the_weights_nor_the_gradients(folder):
    """On CPUs with AVX512-BF16 bitsandbytes repacks weights in eval mode, for a kernel that passes no gradients on."""
    model = adapted(folder)

    def gradients():
        model.train().zero_grad()
        model(IDS, labels=IDS).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    before, frozen = gradients(), packed(model)
    with torch.no_grad():
        model.eval()(IDS)
    assert {n: p.shape for n, p in packed(model).items()} == {n: p.shape for n, p in frozen.items()}
    after = gradients()
    assert len(before) == 28 and all(torch.equal(value, after[name]) for name, value in before.items())


@needs_bitsandbytes
def test_full_fine_tuning_is_refused(folder, tmp_path):
    options = toy_queue_options(lora=False) | {"model": four_bits(folder), "processing_class": None}
    for model in (four_bits(folder), load_model(four_bits(folder))):
        options |= {"model": model, "processing_class": toy_tokenizer()}
        with pytest.raises(InputError, match="leaves nothing to train"):
            TaskQueue(tmp_path / "run", tasks=toy_stream(1), methods=[], **options).run()
    assert not (tmp_path / "run/recipe.yaml").exists()


@needs_bitsandbytes
def test_weights_on_another_device_are_refused(folder):
    check_four_bits(adapted(folder), True, "single", torch.device("cpu"))
    with pytest.raises(InputError, match=r"weights on cpu and is to be trained on cuda.*device_map=\{'': 'cuda'\}"):
        check_four_bits(adapted(folder), True, "single", torch.device("cuda", 0))


@needs_bitsandbytes
@pytest.mark.parametrize("use_cpu, device", [(True, "cpu"), (False, None)])
def test_a_run_on_the_cpu_loads_there(folder, monkeypatch, use_cpu, device):
    asked = []
    monkeypatch.setattr(run_model, "load_model", lambda *a, device, **k: asked.append(device) or load_model(*a, **k))
    RunModel(four_bits(folder), None, TARGETS, 0, lambda index: folder, use_cpu=use_cpu).fresh()
    assert asked == [device]


@needs_bitsandbytes
def test_a_run_on_the_cpu_says_once_what_is_missing(folder, caplog):
    run_model._say_what_four_bits_lack.cache_clear()
    with caplog.at_level(logging.WARNING, "hf_continual.run_model"):
        for _ in range(2):
            RunModel(four_bits(folder), None, TARGETS, 0, lambda index: folder).fresh()
        RunModel(ModelConfig(name=str(folder)), None, TARGETS, 0, lambda index: folder).fresh()
    assert len(caplog.messages) == 1 and "load_in_4bit on the CPU saves memory" in caplog.text


@needs_bitsandbytes
@pytest.mark.parametrize("make", [lambda folder: load_model(four_bits(folder)), adapted])
def test_a_packed_model_given_as_an_object(folder, tmp_path, make):
    """It is checked without weights, and bitsandbytes' parameters refuse `.to("meta")`."""
    source = make(folder)
    options = toy_queue_options(num_train_epochs=1)
    options["evaluation"] |= {"max_new_tokens": 2}
    options |= {"model": source, "peft_config": None if hasattr(source, "peft_config") else TARGETS}

    def run(tasks):
        return TaskQueue(tmp_path / "run", tasks=toy_stream(tasks, rows=8, eval_rows=4), methods=["migu"], **options)

    run(1).run()
    assert run(2).run().R.shape == (2, 2)
    assert len(packed(source)) == 14 and {p.device.type for p in source.parameters()} == {"cpu"}


@needs_bitsandbytes
def test_without_weights_tied_parameters_stay_tied(folder):
    model = load_model(four_bits(folder))
    model.lm_head.weight = model.model.embed_tokens.weight
    shapes = {name: (p.shape, p.dtype, p.requires_grad) for name, p in model.named_parameters()}
    assert to_meta(model) is model and model.lm_head.weight is model.model.embed_tokens.weight
    assert {t.device.type for t in [*model.parameters(), *model.buffers()]} == {"meta"}
    assert {name: (p.shape, p.dtype, p.requires_grad) for name, p in model.named_parameters()} == shapes


@needs_bitsandbytes
def test_a_repacked_model_is_not_trained(folder, tmp_path):
    model = adapted(folder)
    layer = model.get_base_model().model.layers[1].mlp.up_proj
    layer.base_layer.support_avx512bf16_for_cpu = True  # as PEFT leaves it for a model that did not come through here
    trainer = train_task(model, toy_rows(rows=4), [], tmp_path)
    assert not layer.base_layer.support_avx512bf16_for_cpu
    layer.base_layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(InputError, match=r"'.*layers\.1\.mlp\.up_proj\.base_layer' were rounded and repacked"):
        trainer.train()


@needs_bitsandbytes
@pytest.mark.parametrize("name", METHODS)
def test_every_method_runs_on_four_bits(folder, tmp_path, name):
    result = queue(folder, tmp_path / "run", [METHODS[name]]).run()
    assert result.R.shape == (2, 2) and not torch.isnan(torch.as_tensor(result.R[1])).any()
    state = (tmp_path / "run/tasks/01-toy1/adapter/adapter_model.safetensors").stat().st_size
    assert state > 1000


@needs_bitsandbytes
def test_a_stopped_run_is_continued_on_four_bits(folder, tmp_path):
    """The buffer of the first task is bound to the packed model, and its second loading is accepted."""
    whole = queue(folder, tmp_path / "whole", [METHODS["derpp"]]).run()
    queue(folder, tmp_path / "run", [METHODS["derpp"]], tasks=1).run()
    again = queue(folder, tmp_path / "run", [METHODS["derpp"]], tasks=2).run()
    assert (whole.R[-1] == again.R[-1]).all()


@needs_bitsandbytes
def test_the_key_of_a_model_tells_packed_from_plain(folder):
    key = model_key(load_model(four_bits(folder)))
    assert key == model_key(adapted(folder)) and key != model_key(load_model(ModelConfig(name=str(folder))))


# -- merging -----------------------------------------------------------------------------------------------------------


@needs_bitsandbytes
@pytest.mark.parametrize("quant_type, double", [("nf4", True), ("fp4", False)])
@pytest.mark.parametrize("dtype, near", [("float32", 1e-5), ("bfloat16", 5e-2)])
def test_merging_dequantises_the_base(folder, caplog, dtype, near, quant_type, double):
    options = {"bnb_4bit_quant_type": quant_type, "bnb_4bit_use_double_quant": double}
    model = adapted(folder, dtype=dtype, **options).eval()
    with torch.no_grad():
        expected = model(IDS).logits.float()
    with caplog.at_level(logging.WARNING, "hf_continual.merging"):
        merged = merge_adapters(model)
    assert "the 4-bit base was dequantised" in caplog.text
    assert {type(m).__name__ for m in merged.modules()} & {"Linear4bit", "Params4bit"} == set()
    assert not hasattr(merged.config, "quantization_config") and not in_four_bits(merged)
    with torch.no_grad():
        given = merged(IDS).logits.float()
    assert float((given - expected).abs().max() / expected.abs().max()) < near


@needs_bitsandbytes
def test_several_adapters_are_merged_into_the_dequantised_base(folder):
    model = adapted(folder)
    LoraView(model, 0).add("second", "inclora")
    for name, parameter in model.named_parameters():
        if "lora_B.second" in name:
            torch.nn.init.normal_(parameter.data, std=0.05)
    with torch.no_grad():
        expected = model.eval()(IDS).logits
        given = merge_adapters(model)(IDS).logits
    torch.testing.assert_close(given, expected, rtol=0, atol=1e-5)


@needs_bitsandbytes
def test_a_wrong_dequantisation_is_found(folder, monkeypatch):
    model = adapted(folder)
    base = type(model.get_base_model())
    monkeypatch.setattr(base, "dequantize", lambda self, dtype, right=base.dequantize: spoilt(right(self, dtype)))

    def spoilt(plain):
        plain.model.layers[0].mlp.up_proj.weight.data *= 1.05
        return plain

    with pytest.raises(InputError, match="the dequantised model differs from the 4-bit one"):
        merge_adapters(model)


@pytest.mark.parametrize("quantised", [pytest.param(True, marks=needs_bitsandbytes), False])
def test_layers_that_were_trained_whole_are_merged_in_the_dtype_of_the_base(folder, quantised):
    config = ModelConfig(name=str(folder), dtype="bfloat16", load_in_4bit=quantised)
    model = apply_lora(load_model(config), {**TARGETS, "modules_to_save": ["lm_head"]})
    model.get_base_model().lm_head.modules_to_save["default"].weight.data += 0.1
    merged = merge_adapters(model)
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    assert torch.isfinite(merged(IDS).logits).all()


@needs_bitsandbytes
def test_a_base_that_stays_quantised_is_not_merged(folder, monkeypatch):
    model = adapted(folder)
    monkeypatch.setattr(type(model.get_base_model()), "dequantize", lambda self, dtype: self)
    with pytest.raises(InputError, match="not merged into quantised weights"):
        merge_adapters(model)


@needs_bitsandbytes
def test_a_run_is_merged_into_plain_weights(folder, tmp_path):
    queue(folder, tmp_path / "run", ["inclora"], learning_rate=5e-2).run()
    assert write_merged(tmp_path / "run", tmp_path / "out") == "toy1"
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert {p.dtype for p in merged.parameters()} == {torch.float32}
    base = load_model(four_bits(folder))
    adapter = tmp_path / "run/tasks/01-toy1/adapter"
    with torch.no_grad():
        alone = base.eval()(IDS).logits
        with_adapter = PeftModel.from_pretrained(base, adapter).eval()(IDS).logits
        torch.testing.assert_close(merged(IDS).logits, with_adapter, rtol=0, atol=1e-4)
    assert (with_adapter - alone).abs().max() > 1e-2  # the adapter has learnt something to merge


# -- two processes -----------------------------------------------------------------------------------------------------


def learn_on_rank(rank, folder, out, backend, method, batch):
    """Two tasks on 4 bits; writes what was learnt, the methods' state of the second task included."""
    methods, learnt = MethodList([method]), {}
    for index in range(2):
        model = adapted(folder)
        frozen = packed(model)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name in learnt:
                    p.copy_(learnt[name])
        args = make_args(backend, out / f"{index}", per_device_train_batch_size=batch, num_train_epochs=1)
        trainer = ContinualTrainer(model=model, args=args, train_dataset=toy_rows(seed=index), methods=methods)
        trainer.train()
        assert trainer.dist.backend == backend
        assert all(torch.equal(value, packed(model)[name]) for name, value in frozen.items())
        learnt = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        release_engine(trainer)
    save_file({**learnt, **state_of(methods)}, str(out / f"{rank}.safetensors"))


@needs_bitsandbytes
@pytest.mark.parametrize("method", [METHODS["migu"], {**METHODS["kif"], "replay_count": 8}], ids=["migu", "kif"])
def test_two_processes_learn_what_one_does(folder, tmp_path, method):
    (tmp_path / "one").mkdir()
    learn_on_rank(0, folder, tmp_path / "one", "single", method, 4)
    one = load_file(tmp_path / "one/0.safetensors")
    for backend in ("ddp", "zero2"):
        run_ranks(learn_on_rank, 2, tmp_path / backend, folder, tmp_path / backend, backend, method, 2)
        ranks = [load_file(tmp_path / backend / f"{rank}.safetensors") for rank in range(2)]
        assert equal(*ranks) and close(one, ranks[0], 1e-5)


def refused_on_rank(rank, folder, out, backend):
    trainer = ContinualTrainer(
        model=adapted(folder), args=make_args(backend, out), train_dataset=toy_rows(), methods=["migu"]
    )
    with pytest.raises(InputError, match=f"cannot be combined with {backend}"):
        trainer.train()


@needs_bitsandbytes
@pytest.mark.parametrize("backend", ["zero3", "fsdp2"])
def test_backends_that_split_the_base_are_refused_before_training(folder, tmp_path, backend):
    run_ranks(refused_on_rank, 2, tmp_path, folder, tmp_path, backend)


def test_a_run_that_is_older_than_the_options_of_four_bits_goes_on(folder, tmp_path):
    """Recipes and descriptions record every option of `model:`; those of older runs lack the youngest."""
    model = {"name": "m", "dtype": "float32"}
    now = {**model, "load_in_4bit": False, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    assert first_difference({"model": model}, {"model": now}) is None
    assert first_difference({"model": now}, {"model": model}) is None
    changed = {"model": {**now, "load_in_4bit": True}}
    assert first_difference({"model": model}, changed) == ("model.load_in_4bit", False, True)
    options = toy_queue_options(num_train_epochs=1) | {"model": ModelConfig(str(folder)), "processing_class": None}
    options["evaluation"] |= {"max_new_tokens": 2}

    def run(tasks):
        return TaskQueue(tmp_path / "run", tasks=toy_stream(tasks, rows=8, eval_rows=4), methods=[], **options)

    run(1).run()
    directory = RunDirectory(tmp_path / "run")
    recipe = directory.read_recipe()
    assert recipe["model"].keys() >= now.keys() - model.keys()
    recipe["model"] = {k: v for k, v in recipe["model"].items() if "4bit" not in k}
    (directory.path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    queue = read_json(directory.path / "queue.json")
    write_json(directory.path / "queue.json", {**queue, "recipe_sha256": directory.recipe_checksum()})
    assert run(2).run().R.shape == (2, 2)


@needs_bitsandbytes
def test_a_queue_on_the_cpu_loads_there(folder, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(run_model, "load_model", lambda *a, device, **k: asked.append(device) or load_model(*a, **k))
    queue(folder, tmp_path / "run", [], tasks=1).run()
    assert asked and set(asked) == {"cpu"}
