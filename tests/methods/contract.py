"""The same contract for every method: `check_method` on all tiny models."""

import os
from pathlib import Path

from hf_continual.methods.base import make_method
from hf_continual.testing import MODELS, _Contract, check_method

LEVEL = os.environ.get("HF_CONTINUAL_DISTRIBUTED", "")  # `make test-distributed` sets it

ONE_KIND = MODELS if LEVEL else ("llama",)
"""For methods that see only weights, or are another's with other defaults."""


class MethodContract:
    """Subclass it, set `method` to what `make_method` takes, and the contract is tested on every model.

    A second class for other options of the same method may name fewer `kinds`.
    """

    method = None
    # By default an encoder is in the tests of MIGU, TaSL and replay alone; RoBERTa's layers are BERT's.
    kinds = MODELS if LEVEL else ("llama", "t5")

    def pytest_generate_tests(self, metafunc):
        if "kind" in metafunc.fixturenames and metafunc.function.__name__ == "test_contract":
            metafunc.parametrize("kind", self.kinds)

    def test_contract(self, kind):
        results = check_method(self.method, kinds=(kind,))
        failed = [f"{r.model}: {r.name}: {r.detail}" for r in results if not r.passed]
        assert results and not failed, "\n".join(failed)


def check_exact(method, kind, folder, lora=True):
    """The parts of the contract on which options of a method may differ, for one more variant of it."""
    for name in ("resume_within_a_task_is_exact", "state_survives_between_tasks",
                 "gradient_checkpointing_changes_nothing"):  # fmt: skip
        getattr(_Contract(lambda: make_method(method), kind, lora, Path(folder) / name), f"check_{name}")()
