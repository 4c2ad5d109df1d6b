"""The same contract for every method: `check_method` on all tiny models."""

from hf_continual.testing import MODELS, check_method


class MethodContract:
    """Subclass it, set `method` to what `make_method` takes, and the contract is tested on every model.

    A second class for other options of the same method may name fewer `kinds`.
    """

    method = None
    kinds = MODELS

    def pytest_generate_tests(self, metafunc):
        if "kind" in metafunc.fixturenames and metafunc.function.__name__ == "test_contract":
            metafunc.parametrize("kind", self.kinds)

    def test_contract(self, kind):
        results = check_method(self.method, kinds=(kind,))
        failed = [f"{r.model}: {r.name}: {r.detail}" for r in results if not r.passed]
        assert results and not failed, "\n".join(failed)
