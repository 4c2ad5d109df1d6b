"""`hf-continual estimate` on a model without weights."""

import json

import pytest
from toy_runs import save_model, write_recipe
from transformers import MixtralConfig, MixtralForCausalLM, RobertaConfig, RobertaForMaskedLM

from hf_continual.cli import main
from hf_continual.testing import toy_tokenizer


def test_parts_of_a_toy_recipe_and_whether_it_fits(tmp_path, capsys):
    recipe = write_recipe(tmp_path, save_model(tmp_path / "model"))
    assert main(["estimate", str(recipe), "--gpus", "1", "--gpu_memory", "80GB"]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("weights", "gradients", "optimizer", "activations", "method state", "yes"))
    assert main(["estimate", str(recipe), "--gpus", "1", "--gpu_memory", "1e6"]) == 0
    assert " no " in capsys.readouterr().out


@pytest.mark.parametrize("size", ["80XB", "-1GB", ""])
def test_a_size_that_is_none_is_refused(size, tmp_path, capsys):
    recipe = write_recipe(tmp_path, save_model(tmp_path / "model"))
    assert main(["estimate", str(recipe), "--gpus", "1", "--gpu_memory", size]) == 2
    assert "gpu_memory" in capsys.readouterr().err


def test_the_preset_it_would_be_launched_with(tmp_path, capsys):
    recipe = write_recipe(tmp_path, save_model(tmp_path / "model"))
    command = ["estimate", str(recipe), "--gpus", "2", "--gpu_memory", "1GB", "--accelerate_config"]
    assert main([*command, "zero3"]) == 0
    shown = capsys.readouterr().out
    assert "zero3" in shown and "of them are DeepSpeed's buckets" in shown and "hosts" not in shown
    assert main([*command, "zero3_offload"]) == 0
    assert "offloaded to the memory of the hosts, all together: about " in capsys.readouterr().out
    assert main([*command, "zero33"]) == 2
    assert "--accelerate_config zero33" in capsys.readouterr().err


def test_half_precision_that_zero_would_not_train(tmp_path, capsys):
    recipe = write_recipe(tmp_path, save_model(tmp_path / "model"), peft=None)
    command = ["estimate", str(recipe), "--gpus", "1", "--gpu_memory", "1GB", "--model.dtype"]
    for dtype, said in (("bfloat16", True), ("float32", False)):
        assert main([*command, dtype]) == 0
        assert ("moments are in 16 bits; DeepSpeed keeps float32" in capsys.readouterr().out) is said


def test_a_step_that_cannot_be_followed(tmp_path, capsys):
    """Experts in float32: torch has their kernel for real weights only."""
    config = MixtralConfig(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                           num_attention_heads=4, num_key_value_heads=2, num_local_experts=2)  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path / "model")
    toy_tokenizer().save_pretrained(tmp_path / "model")
    recipe = write_recipe(tmp_path, tmp_path / "model", peft=None, methods=[])
    command = ["estimate", str(recipe), "--gpus", "1", "--gpu_memory", "1GB"]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "a step of MixtralForCausalLM cannot be followed without its weights" in said and said.count("\n") == 1
    assert main([*command, "--model.dtype", "bfloat16"]) == 0


def test_tasks_of_text_are_rows_of_a_block_and_mlm_has_its_own_head(tmp_path, capsys):
    config = RobertaConfig(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                           num_attention_heads=4, max_position_embeddings=130, pad_token_id=0)  # fmt: skip
    RobertaForMaskedLM(config).save_pretrained(tmp_path / "roberta")
    toy_tokenizer().save_pretrained(tmp_path / "roberta")
    shown = {}
    for size in (16, 128):
        recipe = {"model": {"name": str(tmp_path / "roberta")}, "data": {"block_size": size},
                  "training": {"per_device_train_batch_size": 256},
                  "tasks": [{"name": name, "path": f"{name}.txt", "kind": "mlm"} for name in "ab"]}  # fmt: skip
        (tmp_path / "mine.yaml").write_text(json.dumps(recipe))
        assert main(["estimate", str(tmp_path / "mine.yaml"), "--gpus", "1", "--gpu_memory", "1GB"]) == 0
        shown[size] = capsys.readouterr().out
    parameters = sum(p.numel() for p in RobertaForMaskedLM(config).parameters())
    assert all(f"parameters that learn: {parameters:,} of {parameters:,}" in text for text in shown.values())
    activations = {size: float(text.splitlines()[3].split()[5]) for size, text in shown.items()}
    assert 5 * activations[16] < activations[128] < 20 * activations[16]
