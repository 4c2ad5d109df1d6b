import pytest
import torch
from contract import MethodContract

from hf_continual.errors import InputError
from hf_continual.methods.olora import OLoRA, orthogonality
from hf_continual.task_queue import TaskQueue
from hf_continual.testing import (
    equal,
    tiny_model,
    toy_queue_options,
    toy_rows,
    toy_stream,
    toy_tokenizer,
    train_task,
    weights,
)


class TestOLoRA(MethodContract):
    method = {"name": "olora", "lambda_1": 0.5, "lambda_2": 0.1}


def test_orthogonality_by_hand():
    old = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]])  # rows e1 and e2
    new = torch.tensor([[[2.0, -3.0, 5.0]]])
    assert float(orthogonality(old, new)) == 5.0  # |2| + |-3|; e3 is free
    assert float(orthogonality(old, torch.tensor([[[0.0, 0.0, 7.0]]]))) == 0.0


def penalty_naively(model, newest):
    """Entry by entry in double precision, from the formula."""
    total = 0.0
    for _, layer in model.named_modules():
        if not hasattr(layer, "lora_A") or newest not in layer.lora_A:
            continue
        new = layer.lora_A[newest].weight.double()
        for name, module in layer.lora_A.items():
            if name != newest:
                for a in module.weight.double():
                    for b in new:
                        total += abs(float((a * b).sum()))
    return total


def test_logged_penalty_equals_the_formula(tmp_path):
    model, method = tiny_model(lora=True), OLoRA(lambda_1=0.5)
    for i in range(2):
        train_task(model, toy_rows(seed=i), [method], tmp_path / str(i))
    trainer = train_task(model, toy_rows(seed=2), [method], tmp_path / "2", learning_rate=0.0)
    logged = [e["olora/orthogonal"] for e in trainer.state.log_history if "olora/orthogonal" in e]
    assert logged == pytest.approx([0.5 * penalty_naively(model, "task2")] * len(logged), rel=1e-5) and logged


def test_norm_penalty_equals_the_formula_and_is_not_squared(tmp_path):
    model, method = tiny_model(lora=True), OLoRA(lambda_1=0.0, lambda_2=0.3)
    train_task(model, toy_rows(seed=0), [method], tmp_path / "0")
    trainer = train_task(model, toy_rows(seed=1), [method], tmp_path / "1", learning_rate=0.0)
    expected = 0.3 * sum(float(p.double().norm()) for n, p in model.named_parameters() if ".task1." in n)
    logged = [e["olora/norm"] for e in trainer.state.log_history if "olora/norm" in e]
    assert logged[0] == pytest.approx(expected, rel=1e-5)
    assert all(
        torch.isfinite(p).all() for p in model.parameters()
    )  # B is zero at the start: its norm has no NaN gradient


def test_penalty_lowers_the_overlap_with_old_adapters(tmp_path):
    overlaps = []
    for weight in (0.0, 5.0):
        model, method = tiny_model(lora=True), OLoRA(lambda_1=weight)
        for i in range(2):
            train_task(model, toy_rows(seed=i), [method], tmp_path / f"{weight}{i}", num_train_epochs=4)
        overlaps.append(penalty_naively(model, "task1"))
    assert overlaps[1] < 0.5 * overlaps[0]


def test_zero_weights_equal_inclora(tmp_path):
    models = []
    for method in ("inclora", {"name": "olora", "lambda_1": 0.0}):
        from hf_continual.methods.base import make_method

        model, made = tiny_model(lora=True), [make_method(method)]
        for i in range(2):
            train_task(model, toy_rows(seed=i), made, tmp_path / f"{made[0].name}{i}")
        models.append(weights(model))
    assert equal(*models)


def test_weights_per_task(tmp_path):
    method = OLoRA(lambda_1=[0.0, 0.5])
    model = tiny_model(lora=True)
    for i in range(2):
        train_task(model, toy_rows(seed=i), [method], tmp_path / str(i))
    with pytest.raises(InputError, match="lambda_1 lists 2 values and task 3"):
        train_task(model, toy_rows(seed=2), [method], tmp_path / "2")


@pytest.mark.parametrize("value", [-1.0, "much", [], [0.5, -1], True, float("nan")])
def test_refuses_weights_that_cannot_be(value):
    with pytest.raises(InputError, match="lambda_1"):
        OLoRA(lambda_1=value)


@pytest.mark.parametrize("name", ["olora", "inclora"])
def test_a_dry_run_of_three_tasks_needs_no_weights(name, tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    toy_tokenizer().save_pretrained(tmp_path / "model")
    options = {**toy_queue_options(), "model": str(tmp_path / "model")}
    options.pop("processing_class")
    queue = TaskQueue(tmp_path / "run", tasks=toy_stream(3), methods=[name], **options)
    queue.check()
    assert {p.device.type for p in queue.model.fresh(empty=True).parameters()} == {"meta"}
