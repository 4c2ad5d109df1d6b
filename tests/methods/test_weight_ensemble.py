import pytest
import torch
from contract import ONE_KIND, MethodContract
from naive_skills import Movement

from hf_continual.errors import InputError
from hf_continual.lora import trainable_state
from hf_continual.methods.weight_ensemble import WeightEnsemble
from hf_continual.testing import equal, tiny_model, toy_rows, train_task


class TestWeightEnsemble(MethodContract):
    method = "weight_ensemble"
    kinds = ONE_KIND


def two_tasks(coefficient, folder, kind="llama", lora=True):
    """The weights before, and after, the second task was merged, and its result."""
    model, method, watched = tiny_model(kind, lora=lora), WeightEnsemble(coefficient=coefficient), Movement()
    for index in range(2):
        rows = toy_rows(kind, rows=12, seed=index)
        train_task(model, rows, [method], folder / str(index), kind=kind, callbacks=[watched])
        if index == 0:
            assert equal(trainable_state(model), watched.trainings[0][-1])  # the first task is not merged
    return watched.trainings[1][0], watched.trainings[1][-1], trainable_state(model)


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("coefficient", [0.5, 0.2])
def test_goes_a_part_of_the_way(coefficient, lora, tmp_path):
    previous, present, merged = two_tasks(coefficient, tmp_path, lora=lora)
    for name, value in merged.items():
        expected = (1 - coefficient) * previous[name].double() + coefficient * present[name].double()
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-8)
    assert not equal(previous, present)


def test_zero_and_one_are_exact(tmp_path):
    previous, _, merged = two_tasks(0.0, tmp_path / "0")
    assert equal(previous, merged)
    _, present, merged = two_tasks(1.0, tmp_path / "1")
    assert equal(present, merged)


def test_tied_weights_are_merged_once(tmp_path):
    previous, present, merged = two_tasks(0.5, tmp_path, "t5", lora=False)
    half = (previous["shared.weight"] + present["shared.weight"]) / 2
    torch.testing.assert_close(merged["shared.weight"], half)


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan"), "half", True])
def test_refuses_coefficients_that_cannot_be(value):
    with pytest.raises(InputError, match="method 'weight_ensemble': coefficient"):
        WeightEnsemble(coefficient=value)
