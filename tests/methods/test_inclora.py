import pytest
import torch
from contract import MethodContract
from peft import LoraConfig, get_peft_model

from hf_continual.errors import InputError
from hf_continual.methods.inclora import IncLoRA
from hf_continual.testing import tiny_model, toy_rows, train_task, weights


class TestIncLoRA(MethodContract):
    method = "inclora"


def test_adds_an_adapter_per_task_and_only_the_newest_learns(tmp_path):
    model, methods = tiny_model(lora=True), [IncLoRA()]
    train_task(model, toy_rows(seed=0), methods, tmp_path / "0")
    first = {n: p for n, p in weights(model).items() if ".default." in n}
    train_task(model, toy_rows(seed=1), methods, tmp_path / "1")
    assert list(model.active_adapters) == ["default", "task1"]
    now = weights(model)
    assert all(torch.equal(p, now[n]) for n, p in first.items())
    learns = {n for n, p in model.named_parameters() if p.requires_grad}
    assert learns and all(".task1." in n for n in learns)
    assert all(float(now[n].abs().max()) > 0 for n in learns if "lora_B" in n)  # B started at zero, so it moved


def test_new_adapters_start_from_different_weights(tmp_path):
    model, methods = tiny_model(lora=True), [IncLoRA()]
    for i in range(3):
        train_task(model, toy_rows(seed=i), methods, tmp_path / str(i), learning_rate=0.0)
    starts = [p for n, p in weights(model).items() if "layers.0.self_attn.q_proj.lora_A" in n]
    assert len(starts) == 3 and not any(torch.equal(starts[i], starts[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


@pytest.mark.parametrize("options", [{"lora_bias": True}, {"use_dora": True}, {"init_lora_weights": "pissa"}])
def test_refuses_adapters_whose_sum_is_no_adapter(options, tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **options)
    model, methods = get_peft_model(tiny_model(), config), [IncLoRA()]
    train_task(model, toy_rows(), methods, tmp_path / "0")
    with pytest.raises(InputError, match=f"peft.{next(iter(options))}="):
        train_task(model, toy_rows(), methods, tmp_path / "1")


def test_output_is_the_sum_of_all_adapters(tmp_path):
    model, methods = tiny_model(lora=True), [IncLoRA()]
    for i in range(3):
        train_task(model, toy_rows(seed=i), methods, tmp_path / str(i))
    layer = next(m for n, m in model.named_modules() if n.endswith("layers.0.self_attn.q_proj"))
    x = torch.randn(2, 5, 32)
    expected = x @ layer.base_layer.weight.T
    for name in ("default", "task1", "task2"):
        expected = expected + layer.scaling[name] * (x @ layer.lora_A[name].weight.T @ layer.lora_B[name].weight.T)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)


def test_refuses_a_model_without_lora(tmp_path):
    with pytest.raises(InputError, match="'inclora' needs LoRA adapters"):
        train_task(tiny_model(), toy_rows(), ["inclora"], tmp_path)


def test_refuses_modules_to_save(tmp_path):
    model = get_peft_model(
        tiny_model("bert"), LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"])
    )
    methods = [IncLoRA()]
    train_task(model, toy_rows("bert"), methods, tmp_path / "0", kind="bert")
    with pytest.raises(InputError, match="modules_to_save"):
        train_task(model, toy_rows("bert"), methods, tmp_path / "1", kind="bert")
