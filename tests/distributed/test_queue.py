"""The queue under several processes learns, scores and commits what it does in one."""

import json
import multiprocessing
import os
import signal
import socket
import sys
import time

import pytest
import torch
from toy_runs import save_model, snapshot

from hf_continual import InputError, TaskQueue
from hf_continual.testing import close, toy_queue_options, toy_stream

pytestmark = pytest.mark.distributed

METHODS = {
    "naive": [],
    "migu": [{"name": "migu", "threshold": 0.5}],
    "kif": [{"name": "kif", "replay_count": 0, "fusion": "categorical", "quantile": 0.5}],
    "replay": ["inclora", {"name": "replay", "count": 4}],
    "full": [{"name": "migu", "threshold": 0.5}],
}
LOST = 3


def make_queue(folder, model, name="naive", backend="single", *, batch=2, accumulation=2, tasks=2, **training):
    options = toy_queue_options(
        lora=name != "full",
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        train_sampling_strategy="sequential",
        adam_epsilon=1e-3,  # else a gradient of zero but for rounding moves a weight as far as any other
        learning_rate=5e-2,
        **training,
    )
    options["model"] = str(model)
    if options["peft_config"] is not None:
        options["peft_config"] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    if backend.startswith("zero"):
        options["args"]["deepspeed"] = {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "zero_optimization": {
                "stage": int(backend[-1]),
                **({"stage3_param_persistence_threshold": 0} if backend == "zero3" else {}),
            },
        }
    elif backend == "fsdp2":
        options["args"] |= {
            "fsdp": True,
            "fsdp_config": {
                "version": 2,
                "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
                "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
                "reshard_after_forward": True,
                "state_dict_type": "FULL_STATE_DICT",
            },
        }
    return TaskQueue(folder, tasks=toy_stream(tasks, rows=8, eval_rows=6), methods=METHODS[name], **options)


def pretend_accelerators():
    """accelerate turns FSDP on for several accelerators only; gloo can do the work as well."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    original = TaskQueue._training_args

    def replaced(self, *args):
        made = original(self, *args)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        return made

    TaskQueue._training_args = replaced


def _child(rank, world_size, port, function, folder, args):
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), HF_HUB_OFFLINE="1",
    )  # fmt: skip
    torch.set_num_threads(1)
    status = 1
    try:
        import deepspeed  # noqa: F401

        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # compiled for a minute, and not needed
        function(folder, *args)
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        time.sleep(0.3)  # gloo threads die badly while the interpreter exits
        status = 0
    except InputError as error:
        (folder / f"error{rank}").write_text(str(error))
        status = 2
    except BaseException:
        import traceback

        (folder / f"traceback{rank}").write_text(traceback.format_exc())
    finally:
        os._exit(status)


@pytest.fixture(scope="module")
def context():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["torch", "transformers.trainer", "peft", "accelerate", "deepspeed", "hf_continual.task_queue",
         "hf_continual.testing"]
    )  # fmt: skip
    return context


@pytest.fixture(scope="module")
def launch(context):
    def launch(function, folder, *args, world_size=2, timeout=120):
        folder.mkdir(exist_ok=True)
        for left in [*folder.glob("error*"), *folder.glob("traceback*")]:
            left.unlink()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        given = [(rank, world_size, port, function, folder, args) for rank in range(world_size)]
        children = [context.Process(target=_child, args=one) for one in given]
        for child in children:
            child.start()
        deadline = time.monotonic() + timeout
        for child in children:
            child.join(max(0, deadline - time.monotonic()))
        codes = [child.exitcode for child in children]
        for child in children:
            if child.is_alive():
                child.kill()
                child.join()
        said = "\n".join(p.read_text() for p in [*folder.glob("traceback*"), *folder.glob("error*")])
        return codes, said

    return launch


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory, model):
    """What one process gives, by method."""
    made = {}

    def get(name, tasks=2):
        if (name, tasks) not in made:
            folder = tmp_path_factory.mktemp(name) / "run"
            before = torch.get_num_threads()
            torch.set_num_threads(1)
            make_queue(folder, model, name, tasks=tasks).run()
            torch.set_num_threads(before)
            made[name, tasks] = snapshot(folder)
        return made[name, tasks]

    return get


def assert_close(run, reference, tolerance):
    """Weights and methods' state within `tolerance`; predictions, scores and buffers byte for byte."""
    ours = snapshot(run)
    assert ours.keys() == reference.keys()
    compared = 0
    for name, value in reference.items():
        if isinstance(value, dict):
            assert close(value, ours[name], tolerance), f"{name} differs"
            compared += len(value)
        elif "/methods/" not in name or name.endswith(".arrow"):
            assert ours[name] == value, f"{name} differs"
    assert compared
    assert not (run / "work").exists()
    queue = json.loads((run / "queue.json").read_text())
    assert queue["finished"] is True and queue["world_size"] > 1


def learn(folder, model, name, backend, options=None, run=None):
    if backend == "fsdp2":
        pretend_accelerators()
    queue = make_queue(folder / "run", model, name, backend, accumulation=1, **(options or {}))
    result = queue.run(**(run or {}))
    (folder / f"result{queue.processes.rank}").write_text(json.dumps(result.R.tolist()))


CASES = [("ddp", name) for name in METHODS] + [
    ("zero2", "naive"), ("zero2", "migu"), ("zero2", "kif"), ("zero2", "replay"), ("zero2", "full"),
    ("zero1", "full"), ("zero0", "replay"),
    ("zero3", "naive"), ("zero3", "migu"), ("zero3", "replay"), ("zero3", "full"),
    ("fsdp2", "naive"), ("fsdp2", "migu"), ("fsdp2", "replay"), ("fsdp2", "full"),
]  # fmt: skip


@pytest.mark.parametrize(("backend", "name"), CASES)
def test_queue_equals_one_process(backend, name, launch, model, alone, tmp_path):
    codes, said = launch(learn, tmp_path, model, name, backend)
    assert codes == [0, 0], said
    assert_close(tmp_path / "run", alone(name), 1e-4 if backend == "zero3" else 1e-5)
    results = [(tmp_path / f"result{rank}").read_text() for rank in range(2)]
    assert results[0] == results[1]


# -- stopped and continued ---------------------------------------------------------------------------------------------


def _kill_one(rank, step):
    from hf_continual.trainer import ContinualMixin

    original = ContinualMixin.training_step

    def replaced(self, *args, **kwargs):
        loss = original(self, *args, **kwargs)
        if self.task.index == 1 and self.state.global_step == step and int(os.environ["RANK"]) == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss

    ContinualMixin.training_step = replaced


def learn_and_lose(folder, model, backend, rank):
    if backend == "fsdp2":
        pretend_accelerators()
    _kill_one(rank, LOST)
    make_queue(folder / "run", model, "migu", backend, accumulation=1, save_steps=2).run()


@pytest.mark.parametrize(("backend", "rank"), [("ddp", 1), ("ddp", 0), ("zero2", 1), ("zero3", 1), ("fsdp2", 1)])
def test_a_rank_that_dies(backend, rank, launch, model, tmp_path):
    """The other stops with a sentence; then the run goes on from its checkpoint, as if nothing had been."""
    reference = tmp_path / "whole"
    codes, said = launch(learn, reference, model, "migu", backend, {"save_steps": 2})
    assert codes == [0, 0], said
    began = time.monotonic()
    codes, said = launch(learn_and_lose, tmp_path, model, backend, rank)
    assert time.monotonic() - began < 60
    assert codes[rank] == -signal.SIGKILL and codes[1 - rank] == 2, said
    assert "another process of this run ended" in said and "every learnt task is kept" in said
    assert (tmp_path / "run" / "work" / "01-toy1" / "checkpoint-2" / "sizes.json").exists()
    assert json.loads((tmp_path / "run" / "queue.json").read_text())["cursor"] == 1

    # One process is refused as long as there is a checkpoint of two.
    with pytest.raises(InputError, match=r"begun with 2 process\(es\) and would go on with 1 process\(es\)"):
        make_queue(tmp_path / "run", model, "migu", accumulation=1, save_steps=2).run() if not backend.startswith(
            "zero"
        ) and backend != "fsdp2" else refuse_alone(tmp_path / "run")

    codes, said = launch(learn, tmp_path, model, "migu", backend, {"save_steps": 2})
    assert codes == [0, 0], said
    assert_close(tmp_path / "run", snapshot(reference / "run"), 0.0)


def refuse_alone(run):
    """A recipe with DeepSpeed or FSDP cannot come as far in one process without a launcher."""
    stream = toy_stream(2, rows=8, eval_rows=6)
    queue = TaskQueue(run, tasks=stream, **toy_queue_options())
    queue._checkpoint_of(stream[1], "single")
