"""A 4-bit base (bitsandbytes) under LoRA, on the CPU; the same code runs on GPUs."""

import importlib.util
import logging

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, set_seed

from hf_continual import TaskQueue
from hf_continual.errors import InputError
from hf_continual.lora import LoraView
from hf_continual.merging import merge_adapters, write_merged
from hf_continual.models import ModelConfig, apply_lora, check_four_bits, in_four_bits, load_model
from hf_continual.replay import model_key
from hf_continual.testing import VOCABULARY, toy_queue_options, toy_rows, toy_stream, toy_tokenizer, train_task

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


def four_bits(folder, **options):
    return ModelConfig(name=str(folder), load_in_4bit=True, **options)


def queue(folder, run, methods, tasks=2, **training):
    options = toy_queue_options(**{"num_train_epochs": 1, **training})
    options["evaluation"] |= {"max_new_tokens": 2}
    options |= {"model": four_bits(folder), "processing_class": None}
    return TaskQueue(run, tasks=toy_stream(tasks, rows=8, eval_rows=4), methods=methods, **options)


def adapted(folder, **options):
    model = apply_lora(
        load_model(four_bits(folder, **options)), {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
    )
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
@pytest.mark.parametrize("dtype, near", [("float32", 1e-5), ("bfloat16", 5e-2)])
def test_merging_dequantises_the_base(folder, caplog, dtype, near):
    model = adapted(folder, dtype=dtype).eval()
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
def test_a_base_that_stays_quantised_is_not_merged(folder, monkeypatch):
    model = adapted(folder)
    monkeypatch.setattr(type(model.get_base_model()), "dequantize", lambda self: self)
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
