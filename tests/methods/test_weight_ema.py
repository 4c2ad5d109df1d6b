import pytest
import torch
from contract import ONE_KIND, MethodContract
from naive_skills import Movement, OutOfMemory

from hf_continual.errors import InputError
from hf_continual.lora import trainable_state
from hf_continual.methods.weight_ema import WeightEMA
from hf_continual.testing import equal, tiny_model, toy_rows, train_task


class TestWeightEma(MethodContract):
    method = "weight_ema"
    kinds = ONE_KIND


def two_tasks(decay, folder, kind="llama", lora=True):
    """The weights at the begin and after every step of the second task, and its result."""
    model, method, watched = tiny_model(kind, lora=lora), WeightEMA(decay=decay), Movement()
    for index in range(2):
        rows = toy_rows(kind, rows=16, seed=index)
        train_task(model, rows, [method], folder / str(index), kind=kind, callbacks=[watched])
        if index == 0:
            assert equal(trainable_state(model), watched.trainings[0][-1])  # the first task keeps its last weights
    return watched.trainings[1], trainable_state(model)


@pytest.mark.parametrize(("kind", "lora"), [("llama", True), ("t5", False)])
@pytest.mark.parametrize("decay", [0.5, 0.99])
def test_is_the_average_along_the_training(decay, kind, lora, tmp_path):
    states, merged = two_tasks(decay, tmp_path, kind, lora)
    assert len(states) == 1 + 4 and not equal(states[-1], merged)
    for name, value in merged.items():
        average = states[0][name].double()
        for state in states[1:]:
            average = decay * average + (1 - decay) * state[name].double()
        torch.testing.assert_close(value.double(), average, rtol=1e-5, atol=1e-7)


def test_begins_anew_when_the_trainer_does(tmp_path):
    model, method, watched = tiny_model(lora=True), WeightEMA(decay=0.5), Movement()
    train_task(model, toy_rows(), [method], tmp_path / "0")
    callbacks = [watched, OutOfMemory(2)]
    train_task(model, toy_rows(seed=1), [method], tmp_path / "1", callbacks=callbacks, auto_find_batch_size=True)
    states = watched.trainings[1]
    assert len(watched.trainings) == 2 and len(states) > 1 + 4  # of smaller batches
    for name, value in trainable_state(model).items():
        average = states[0][name].double()
        for state in states[1:]:
            average = 0.5 * average + 0.5 * state[name].double()
        torch.testing.assert_close(value.double(), average, rtol=1e-5, atol=1e-7)


def test_decay_one_keeps_the_earlier_weights_and_zero_the_last_ones(tmp_path):
    states, merged = two_tasks(1.0, tmp_path / "1")
    assert equal(states[0], merged)
    states, merged = two_tasks(0.0, tmp_path / "0")
    assert equal(states[-1], merged)


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan"), "slow"])
def test_refuses_decays_that_cannot_be(value):
    with pytest.raises(InputError, match="method 'weight_ema': decay"):
        WeightEMA(decay=value)
