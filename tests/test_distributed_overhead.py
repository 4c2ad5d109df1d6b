"""What each method sends in a step, counted on two processes and worked out by hand.

The tiny Llama has 2 layers of hidden size 32 (q, o and down have 32 outputs, k and v 16, gate and up 48), LoRA r 4 on
q and v, in fp32: 4 bytes a number.
"""

import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
for folder in (HERE / "distributed", HERE.parent / "benchmarks"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import distributed_overhead  # noqa: E402
from distributed_overhead import PERIOD, WARMUP, CommunicationCounter, difference  # noqa: E402
from ranks import run_ranks  # noqa: E402

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(200)]

LORA = 2 * ((4 * 32 + 32 * 4) + (4 * 32 + 16 * 4))  # weights of A and B of q, and of v, in each layer
LORA_ROWS = 2 * ((4 + 32) + (4 + 16))
FULL_ROWS = 2 * (32 + 16 + 16 + 32 + 48 + 48 + 32)
TOKENS = {"all_gather": [1, 2 * 8]}  # the Trainer counts the labels of all ranks: an int64 of each
COUNTED = {}


def count(folder, name, backend, **job):
    """The collectives of each of four steps, the same on both ranks."""
    key = (name, backend, json.dumps(job, sort_keys=True))
    if key not in COUNTED:
        run_ranks(distributed_overhead.count_steps, 2, folder, folder, name, backend, job)
        ranks = [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in range(2)]
        assert ranks[0] == ranks[1] and len(ranks[0]) == PERIOD
        COUNTED[key] = ranks[0]
    return COUNTED[key]


def extra(folder, name, backend, **job):
    """What a method adds to each of four steps of the plain Trainer."""
    plain = "plain_full" if name.endswith("_full") else "plain"
    of_plain = count(folder, plain, backend, **{k: v for k, v in job.items() if k != "options"})
    return [difference(a, b) for a, b in zip(count(folder, name, backend, **job), of_plain, strict=True)]


def test_the_plain_trainer_reduces_its_gradients(tmp_path):
    """DDP's reducer, which is C++, is seen too; its buffers are the two of the rotary embedding, 4 numbers each."""
    expected = {**TOKENS, "all_reduce": [1, 4 * LORA], "broadcast": [1, 2 * 4 * 4]}
    assert count(tmp_path, "plain", "ddp") == [expected] * PERIOD


def test_the_plain_trainer_under_zero2(tmp_path):
    """Gradients there and weights back, and one number for the norm by which they are clipped."""
    expected = {"all_gather": [2, 16 + 4 * LORA], "all_reduce": [2, 4 * LORA + 4]}
    assert count(tmp_path, "plain", "zero2") == [expected] * PERIOD


@pytest.mark.parametrize("backend", ["ddp", "zero2", "fsdp2"])
@pytest.mark.parametrize(("name", "rows"), [("migu", LORA_ROWS), ("migu_full", FULL_ROWS)])
def test_migu_adds_one_all_reduce_of_the_output_widths(name, rows, backend, tmp_path):
    assert extra(tmp_path, name, backend) == [{"all_reduce": [1, 4 * rows]}] * PERIOD


@pytest.mark.parametrize(("scope", "calls"), [("step", 1), ("micro_batch", 2)])
def test_migu_does_so_once_a_mask(scope, calls, tmp_path):
    found = extra(tmp_path, "migu", "ddp", accumulation=2, options={"scope": scope})
    assert found == [{"all_reduce": [calls, calls * 4 * LORA_ROWS]}] * PERIOD


@pytest.mark.parametrize("name", ["naive", "kif", "tasl", "olora", "replay", "seekr", "derpp"])
def test_nothing_under_ddp(name, tmp_path):
    assert extra(tmp_path, name, "ddp") == [{}] * PERIOD


def test_olora_collects_a_alone_where_weights_are_split(tmp_path):
    """lambda_2 is 0 by default, so no B is in the loss. The old adapter is in the blocks that FSDP2 gathers twice."""
    expected = {"all_gather": [0, 2 * 4 * LORA], "all_reduce": [1, 4 * 2 * 2 * 4 * 32]}
    assert extra(tmp_path, "olora", "fsdp2") == [expected] * PERIOD


@pytest.mark.parametrize(
    ("backend", "expected"), [("zero2", {"all_reduce": [1, 4]}), ("fsdp2", {"all_reduce": [2, 4 + 4 * LORA]})]
)
def test_kif_where_gradients_are_split(backend, expected, tmp_path):
    """Whether they are finite everywhere; and where weights are split, A and B for the orthogonality loss."""
    assert extra(tmp_path, "kif", backend) == [expected] * PERIOD


class WithProfiler(distributed_overhead.Turns):
    """Also asks torch's profiler, which sees the calls of gloo from every thread."""

    def __init__(self):
        super().__init__()
        self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == WARMUP:
            self.profiler.start()
        elif state.global_step == WARMUP + PERIOD:
            self.profiler.stop()
        super().on_step_begin(args, state, control, **kwargs)


def profiled(rank, folder, backend):
    turns = WithProfiler()
    distributed_overhead.train("migu", backend, dict(distributed_overhead.TINY), folder / "run", turns)
    names = [e.name.partition(":")[2] for e in turns.profiler.events() if e.name.startswith("gloo:")]
    (folder / f"{rank}.json").write_text(json.dumps({"steps": turns.steps, "gloo": names}))


@pytest.mark.parametrize("backend", ["ddp", "fsdp2", "zero3"])
def test_gloo_was_called_as_often_as_was_counted(backend, tmp_path):
    run_ranks(profiled, 2, tmp_path, tmp_path, backend)
    found = json.loads((tmp_path / "0.json").read_text())
    counted = Counter()
    for step in found["steps"]:
        for kind, (calls, _) in step.items():
            counted["all_reduce" if kind == "reduce_scatter" else kind] += calls  # gloo has no reduce-scatter
    assert counted["all_reduce"] >= 2 * PERIOD  # gradients, and MIGU
    assert counted == Counter(found["gloo"])


def test_the_bytes_of_a_collective_are_those_of_the_larger_side(tmp_path):
    run_ranks(_collectives, 2, tmp_path)


def _collectives(rank):
    import torch.distributed as dist

    dist.init_process_group("gloo")
    ours, both = torch.ones(3), torch.ones(6)
    with CommunicationCounter() as counter:
        dist.all_reduce(ours)
        dist.all_gather([torch.empty(3), torch.empty(3)], ours)
        dist.all_gather_into_tensor(both, ours)
        dist.reduce_scatter_tensor(ours, both)
        dist.broadcast(both.double(), 0)
        dist.barrier()
        both.sum()
    assert counter.counts == {
        "all_reduce": [1, 12],
        "all_gather": [2, 48],
        "reduce_scatter": [1, 24],
        "broadcast": [1, 48],
        "barrier": [1, 0],
    }
    dist.all_reduce(ours)
    assert counter.counts["all_reduce"] == [1, 12]  # what is not inside is not counted


def test_the_benchmark_times_and_counts(tmp_path, capsys):
    out = tmp_path / "overhead.json"
    distributed_overhead.main(
        ["--backends", "ddp", "--methods", "migu,migu_full", "--size", "tiny", "--vocabulary", "96", "--length", "10",
         "--rounds", "2", "--json", str(out)]
    )  # fmt: skip
    found = json.loads(out.read_text())
    assert {"torch", "transformers", "hf_continual"} <= set(found["versions"])
    ddp = found["backends"]["ddp"]
    assert ddp["plain"]["plain"]["steps"] == count(tmp_path, "plain", "ddp")
    for name, rows in (("migu", LORA_ROWS), ("migu_full", FULL_ROWS)):
        of = ddp["methods"][name]
        assert of["extra"] == [{"all_reduce": [1, 4 * rows]}] * PERIOD
        assert len(of["seconds"]) == 2 and 0 < of["ratio"]["low"] <= of["ratio"]["median"] <= of["ratio"]["high"]
    assert "+1 all_reduce (+448 B)" in capsys.readouterr().out


def test_a_process_that_fails_ends_the_benchmark():
    wrong = ["--vocabulary", "9999"]  # the model has 96 words
    with pytest.raises(RuntimeError, match=r"(?s)plain: rank [01] failed.*IndexError"):
        distributed_overhead.main(["--backends", "ddp", "--methods", "migu", "--size", "tiny", "--length", "9", *wrong])


@pytest.mark.parametrize("wrong", [["--backends", "zero9"], ["--block", "3"], ["--rounds", "0"]])
def test_wrong_options(wrong, capsys):
    with pytest.raises(SystemExit):
        distributed_overhead.main(wrong)
    assert wrong[1] in capsys.readouterr().err
