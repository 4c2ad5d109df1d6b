import pytest
from contract import ONE_KIND, MethodContract

from hf_continual.errors import InputError
from hf_continual.methods.er import ER
from hf_continual.methods.replay import Replay
from hf_continual.testing import equal, tiny_model, toy_rows, train_task, weights


class TestER(MethodContract):
    method = {"name": "er", "total": 6, "policy": "reservoir"}
    kinds = ONE_KIND


def test_it_is_replay_that_mixes(tmp_path):
    """D_2 of 16 rows and M of 4: 5 micro-batches of 4 in place of 4, and the weights that replay gives."""
    results = []
    for method in (ER(count=4), Replay(count=4, mixing="mix")):
        model = tiny_model(lora=True)
        for index in range(2):
            folder = tmp_path / f"{method.name}{index}"
            trainer = train_task(model, toy_rows(seed=index), [method], folder)
        results.append((weights(model), trainer.state.global_step, method.buffer_.ids))
    assert equal(results[0][0], results[1][0]) and results[0][1:] == results[1][1:] and results[0][1] == 5


def test_refuses_another_mixing():
    with pytest.raises(InputError, match="mixing='alternate'.*'replay'"):
        ER(mixing="alternate")
