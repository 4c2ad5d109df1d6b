"""The same contract for every method: `check_method` on all tiny models."""

import pytest

from hf_continual.testing import MODELS, check_method


class MethodContract:
    """Subclass it, set `method` to what `make_method` takes, and the contract is tested on every model."""

    method = None

    @pytest.mark.parametrize("kind", MODELS)
    def test_contract(self, kind):
        results = check_method(self.method, kinds=(kind,))
        failed = [f"{r.model}: {r.name}: {r.detail}" for r in results if not r.passed]
        assert results and not failed, "\n".join(failed)
