"""What a queue of twenty tasks in one process holds after each of them: no more after the twentieth than the third."""

import gc
import json
import threading
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from transformers import LlamaConfig, LlamaForCausalLM

from hf_continual.queue_evaluation import QueueEvaluation
from hf_continual.task_queue import TaskQueue
from hf_continual.testing import backend_options, hook_count, toy_queue_options, toy_stream, toy_tokenizer
from hf_continual.trainer import ContinualTrainer

pytestmark = pytest.mark.distributed

TASKS = 20
SETTLED = 3
"""From this task on: the first ones fill the caches of the libraries."""
KINDS = ("DeepSpeedEngine", "DistributedDataParallel", "ContinualTrainer", "Accelerator", "AdamW", "PeftModel")
EXACT = ("hooks", "groups", "threads", "modules", *KINDS)
LIMIT = {"tensors": 0.01, "tensor_bytes": 0.01, "objects": 0.01, "resident": 0.05}
"""Resident memory also has what the libraries keep of each engine outside of Python, whatever the model's size."""


def resident():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def held(model):
    """What this process holds now, counted."""
    gc.collect()
    objects = gc.get_objects()
    names = [type(found).__name__ for found in objects]
    tensors = [found for found in objects if isinstance(found, torch.Tensor) and found.is_floating_point()]
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.layout == torch.strided
    }
    return {
        "tensors": len(tensors),
        "tensor_bytes": sum(storages.values()),
        "objects": len(objects),
        "modules": sum(isinstance(found, torch.nn.Module) for found in objects),
        "hooks": hook_count(model),
        "groups": len(torch.distributed.distributed_c10d._world.pg_map),
        "threads": threading.active_count(),
        **{name: names.count(name) for name in KINDS},
        "resident": resident(),
    }


def learn_many(rank, folder, model, backend, lora, method, tasks):
    """A queue that writes down what is held after each task, and scores the newest task alone."""
    found = []
    evaluate = QueueEvaluation.score_missing

    def measured(self, learnt):
        evaluate(self, learnt)
        if learnt:
            found.append(held(self.queue.model.after(learnt - 1)))

    QueueEvaluation.score_missing = measured
    QueueEvaluation.wanted_cells = lambda self, learnt: ((i, self.queue.stream[i]) for i in range(learnt))
    options = toy_queue_options(
        lora=lora, per_device_train_batch_size=2, num_train_epochs=1, save_strategy="no", logging_strategy="no",
        **backend_options(backend),
    )  # fmt: skip
    options |= {"model": str(model), "evaluation": {"batch_size": 4, "max_new_tokens": 1}}
    TaskQueue(folder / "run", tasks=toy_stream(tasks, rows=4, eval_rows=2), methods=[method], **options).run()
    (folder / f"held{rank}").write_text(json.dumps(found))


def spread(values):
    """How far the values are apart, of the smallest."""
    return (max(values) - min(values)) / max(1, min(values))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """5 MB of weights: twenty of them would be a fifth of what the imports take."""
    folder = tmp_path_factory.mktemp("model")
    config = LlamaConfig(
        vocab_size=96, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(str(folder))
    toy_tokenizer().save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize("backend", ["single", "ddp", "zero2", "zero3"])
def test_memory_is_flat_over_twenty_tasks(backend, model, tmp_path):
    world_size = 1 if backend == "single" else 2
    method = {"name": "migu", "threshold": 0.5}
    run_ranks(learn_many, world_size, tmp_path, tmp_path, model, backend, True, method, TASKS, timeout=300)
    for rank in range(world_size):
        found = json.loads((tmp_path / f"held{rank}").read_text())
        assert len(found) == TASKS
        settled = found[SETTLED - 1 :]
        assert settled[0]["tensor_bytes"] > 4e6  # the model is among them
        for what in settled[0]:
            values = [entry[what] for entry in settled]
            if what in EXACT:
                assert len(set(values)) == 1, f"{what}: {values}"
            else:
                assert spread(values) <= LIMIT[what], f"{what}: {values}"
        assert settled[-1]["DeepSpeedEngine"] == settled[-1]["ContinualTrainer"] == settled[-1]["hooks"] == 0


def learn_and_leak(rank, folder, model, tasks):
    """As a reference that somebody kept to each Trainer would."""
    kept, train = [], ContinualTrainer.train

    def leaking(self, *args, **kwargs):
        kept.append(self)
        return train(self, *args, **kwargs)

    ContinualTrainer.train = leaking
    learn_many(rank, folder, model, "single", True, "migu", tasks)


def test_a_leak_is_seen(model, tmp_path):
    run_ranks(learn_and_leak, 1, tmp_path, tmp_path, model, 4, timeout=120)
    found = json.loads((tmp_path / "held0").read_text())
    assert found[3]["ContinualTrainer"] > found[2]["ContinualTrainer"] > 0
    assert spread([entry["objects"] for entry in found[2:]]) > LIMIT["objects"]
    assert spread([entry["tensors"] for entry in found[2:]]) > LIMIT["tensors"]
