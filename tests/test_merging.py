import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from toy_runs import save_model
from transformers import AutoModelForCausalLM

from hf_continual import TaskQueue
from hf_continual.errors import InputError
from hf_continual.evaluation import rouge_l
from hf_continual.merging import merge_adapters, write_merged
from hf_continual.run_scores import load_run
from hf_continual.testing import tiny_model, toy_queue_options, toy_stream

IDS = torch.arange(3, 15).view(1, -1)


def test_a_run_from_python_is_merged_without_its_data(tmp_path):
    save_model(tmp_path / "model")
    options = {**toy_queue_options(num_train_epochs=1), "model": str(tmp_path / "model"), "processing_class": None}
    TaskQueue(tmp_path / "run", tasks=toy_stream(2), methods=["inclora"], **options).run()
    assert write_merged(tmp_path / "run", tmp_path / "out") == "toy1"
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(IDS).logits
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    adapted = PeftModel.from_pretrained(base, tmp_path / "run/tasks/01-toy1/adapter").eval()(IDS).logits
    torch.testing.assert_close(merged, adapted, rtol=0, atol=1e-5)


def test_a_script_that_adds_a_task_can_be_run_again(tmp_path, capsys):
    first, second, third = toy_stream(3)

    def script():
        queue = TaskQueue(tmp_path / "run", tasks=[first, second], **toy_queue_options(num_train_epochs=1))
        queue.run()
        queue.add(third)
        return queue.run()

    once = script()
    files = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    again = script()
    assert (once.R[-1] == again.R[-1]).all() and again.tasks == ["toy0", "toy1", "toy2"]
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == files
    assert "1 added since" in capsys.readouterr().out


def test_cut_answers_are_said(tmp_path, capsys):
    options = toy_queue_options(num_train_epochs=1) | {"data": {"max_prompt_length": 16, "max_completion_length": 4}}
    task = toy_stream(1)[0]
    rows = task.train_dataset.to_list()
    rows[0]["completion"] = "red blue green dog cat"
    task.train_dataset = rows
    TaskQueue(tmp_path / "run", tasks=[task], **options).check()
    assert "task 'toy0': 1 of 16 answers are longer than data.max_completion_length=4" in capsys.readouterr().out


def test_kept_predictions_are_scored_with_another_metric(tmp_path):
    result = TaskQueue(tmp_path / "run", tasks=toy_stream(2), **toy_queue_options(num_train_epochs=1)).run()
    again = load_run(tmp_path / "run", scorer="rouge_l")
    assert set(again.metrics.values()) == {"rouge_l"} and set(load_run(tmp_path / "run").metrics.values()) == {
        "exact_match"
    }
    row = (tmp_path / "run/tasks/01-toy1/predictions/toy0.jsonl").read_text().splitlines()
    kept = [json.loads(line) for line in row]
    expected = sum(rouge_l(p["prediction"], p["references"]) for p in kept) / len(kept)
    assert again.R[1, 0] == expected and result.R[1, 0] == load_run(tmp_path / "run").R[1, 0]
    with pytest.raises(InputError, match="did you mean 'rouge_l'"):
        load_run(tmp_path / "run", scorer="rouge")


def test_a_run_from_a_model_object_says_how_to_merge(tmp_path):
    TaskQueue(tmp_path / "run", tasks=toy_stream(1), **toy_queue_options(num_train_epochs=1)).run()
    with pytest.raises(InputError, match="merge it from Python"):
        write_merged(tmp_path / "run", tmp_path / "out")
    model = PeftModel.from_pretrained(tiny_model(), tmp_path / "run/tasks/00-toy0/adapter").eval()
    expected = model(IDS).logits
    torch.testing.assert_close(merge_adapters(model)(IDS).logits, expected, rtol=0, atol=1e-5)


def test_a_merge_that_changes_the_outputs_is_refused(monkeypatch):
    model = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules=["q_proj"]))
    torch.nn.init.normal_(model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight)
    monkeypatch.setattr(type(model.base_model), "merge_and_unload", lambda self, **kwargs: self.unload())
    with pytest.raises(InputError, match="differs from the adapted one"):
        merge_adapters(model)


def test_a_bfloat16_model_is_merged_in_float32_and_stays_bfloat16():
    """Compared in bfloat16 the logits of unusual tokens differ by more than any merge would change them."""
    model = tiny_model().to(torch.bfloat16)
    model.model.norm.float()  # a part that is kept in float32
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "v_proj"]))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    weight, delta = layer.base_layer.weight.float(), layer.get_delta_weight("default").float()
    merged = merge_adapters(model)
    own = merged.model.layers[0].self_attn.q_proj.weight
    assert own.dtype == torch.bfloat16 and merged.model.norm.weight.dtype == torch.float32
    assert torch.equal(own, (weight + delta).to(torch.bfloat16))
