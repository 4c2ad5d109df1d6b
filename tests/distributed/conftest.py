import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))


def pytest_sessionfinish(session):
    target = os.environ.get("HF_CONTINUAL_WRITE_MATRIX")
    if target and os.environ.get("HF_CONTINUAL_DISTRIBUTED"):
        import support_matrix

        support_matrix.write(Path(session.config.rootpath) / target, support_matrix.RESULTS)
