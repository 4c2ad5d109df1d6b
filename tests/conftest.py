import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the suite never needs the network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import datasets  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

import hf_continual.testing  # noqa: E402, F401


@pytest.fixture(autouse=True, scope="session")
def _quiet():
    datasets.disable_progress_bars()
    torch.set_num_threads(1)  # models are tiny; threads only cost
    gc.collect()
    gc.freeze()  # the Trainer collects garbage once a training; the imported modules need not be walked each time
