"""Two gloo processes compute what one process computes on the same global batch."""

import multiprocessing
import os
import socket
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_continual.testing import close, tiny_model, toy_rows, train_task, weights

pytestmark = pytest.mark.distributed

STREAMS = {
    "naive": ["naive"],
    "migu": [{"name": "migu", "threshold": 0.5}],
    "migu-micro-batch": [{"name": "migu", "threshold": 0.5, "scope": "micro_batch"}],
    "migu-update": [{"name": "migu", "threshold": 0.5, "mask": "update"}],
    "inclora": ["inclora"],
    "olora+migu": [{"name": "olora", "lambda_1": 0.5, "lambda_2": 0.1}, {"name": "migu", "threshold": 0.5}],
    "replay+migu": [{"name": "replay", "count": 4}, {"name": "migu", "threshold": 0.5}],
    "tasl": ["tasl"],
    "kif+migu": ["kif", {"name": "migu", "threshold": 0.5}],
    "kif-memory": [{"name": "kif", "units": "matrix", "timing": "consistent", "replay_count": 8}],
    "weight_ensemble": ["weight_ensemble"],
    "weight_ema": [{"name": "weight_ema", "decay": 0.5}],
    "fisher_merge": ["fisher_merge"],
    "replay-herding": [{"name": "replay", "count": 8, "mixing": "alternate", "policy": "herding"}],
    "derpp": [{"name": "derpp", "count": 8}],
    "seekr": [{"name": "seekr", "count": 8, "layers": 2, "heads": 5, "query_rows": 4, "attention_weight": 10}],
    "seekr-summed": [
        {"name": "seekr", "count": 8, "loss_mix": "summed", "teacher": "previous", "attention_weight": 10}
    ],
}
ALTERNATE = ("replay-herding", "derpp", "seekr")
SCORES = ("raw_", "coefficients_", "sensitivity_", "forgettability_", "importance_")


def learn(name, lora, folder, accumulation, batch):
    """Two tasks; returns weights, how often MIGU updated each row, and the importance of skill units."""
    from hf_continual.methods.base import MethodList

    torch.set_num_threads(1)
    methods, model = MethodList(STREAMS[name]), tiny_model(lora=lora)
    for index in range(2):
        train_task(
            model,
            toy_rows(seed=index),
            methods,
            folder / str(index),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            train_sampling_strategy="sequential",
            max_grad_norm=0.5,
            adam_epsilon=1e-3,
            ddp_find_unused_parameters=False,
        )
    tensors = weights(model)
    usage = {f"{m.name}.updates": m.updates_ for m in methods if m.name == "migu"}
    scores = {f"{m.name}.{a}": getattr(m, a) for m in methods for a in SCORES if getattr(m, a, None) is not None}
    return {**tensors, **usage, **scores}


def work(rank, port, name, lora, folder, accumulation):
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        LOCAL_WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        HF_HUB_OFFLINE="1",
    )
    status = 1
    try:
        tensors = learn(name, lora, folder / "both", accumulation, batch=2)
        save_file({k: v.contiguous() for k, v in tensors.items()}, str(folder / f"rank{rank}.safetensors"))
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        time.sleep(0.3)  # gloo threads die badly while the interpreter exits
        status = 0
    finally:
        os._exit(status)


@pytest.fixture(scope="module")
def context():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers.trainer", "peft", "accelerate", "hf_continual.testing"])
    return context


@pytest.mark.parametrize(
    ("name", "lora", "accumulation"),
    [
        ("naive", True, 1),
        ("migu", True, 1),
        ("migu", False, 2),
        ("migu-micro-batch", False, 2),
        ("migu-update", True, 2),
        ("inclora", True, 1),
        ("olora+migu", True, 2),
        ("replay+migu", False, 1),
        ("tasl", True, 2),
        ("kif+migu", True, 1),
        ("kif-memory", False, 1),
        ("weight_ensemble", True, 1),
        ("weight_ema", False, 1),
        ("fisher_merge", True, 2),
        ("replay-herding", True, 1),
        ("derpp", False, 1),
        ("seekr", True, 1),
        ("seekr-summed", True, 1),
    ],
)
def test_two_processes_equal_one(name, lora, accumulation, context, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [
        context.Process(target=work, args=(rank, port, name, lora, tmp_path, accumulation)) for rank in range(2)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(timeout=120)
    assert [child.exitcode for child in children] == [0, 0]
    first, second = (load_file(str(tmp_path / f"rank{rank}.safetensors")) for rank in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first), "the ranks hold different weights"
    # Micro-batch j of a step in one process is rank j % 2, accumulation j // 2.
    alone = learn(name, lora, tmp_path / "one", 2 * accumulation, batch=2)
    if name == "migu-micro-batch" or name in ALTERNATE or name == "seekr-summed":
        # A micro-batch is that of all ranks together: its mask, and the place of stored ones between new ones.
        alone = learn(name, lora, tmp_path / "one", accumulation, batch=4)
    assert close(alone, first, 1e-5)
