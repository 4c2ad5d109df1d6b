"""Shards and guards, without starting processes; `tests/distributed` starts them."""

import ast
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import hf_continual
from hf_continual import distributed
from hf_continual.distributed import (
    Distributed,
    GradView,
    Layout,
    Shard,
    assign_,
    check_engine,
    full,
    refuse_partitioned,
)
from hf_continual.errors import InputError
from hf_continual.launch_guards import _processes_asked_for, check_launch


def part(shape, start, numel):
    shard = Shard(torch.nn.Parameter(torch.zeros(shape)))
    shard.start, shard.numel, shard.local_shape = start, numel, torch.Size([numel])
    return shard


@pytest.mark.parametrize("shape", [(5, 3), (3, 2, 4), (7,), ()])
def test_a_part_of_any_factor_is_that_of_the_expanded_tensor(shape):
    size = torch.Size(shape).numel()
    rows = shape[0] if shape else 1
    factors = [torch.randn(shape), torch.randn(())]
    if len(shape) > 1:
        factors += [torch.randn(rows, *[1] * (len(shape) - 1)), torch.randn(shape[-1])]
    for start in range(size):
        for numel in range(1, size - start + 1):
            for factor in factors:
                expected = factor.expand(shape).reshape(-1)[start : start + numel]
                cut = part(shape, start, numel).cut(factor)
                cut = cut.expand(shape) if numel == size and cut.numel() < size else cut  # a whole one may broadcast
                assert torch.equal(cut.reshape(-1), expected)


def test_a_rank_without_a_part_gets_nothing():
    assert part((5, 3), 0, 0).cut(torch.ones(5, 1)).numel() == 0


def test_the_parts_of_two_ranks_are_the_whole():
    whole = torch.arange(22.0)
    cuts = [[(0, 7), (0, 0)], [(7, 8), (0, 7)]]  # of a [5, 3] and a [7]: the second is all of rank 1
    alone = Distributed()
    parts = []
    for pieces in cuts:
        layout = Layout([part(s, *p) for s, p in zip([(5, 3), (7,)], pieces, strict=True)], alone)
        local = layout.scatter(whole)
        assert len(local) == layout.local_size
        parts.append(layout.gather(local))
    assert torch.equal(sum(parts), whole)


def test_the_view_reads_and_sets_and_masks_rows():
    model = torch.nn.Linear(3, 4)
    model.weight.grad, model.bias.grad = torch.ones(4, 3), torch.ones(4)
    grads = GradView(model, Distributed())
    grads.mul_rows_("weight", torch.tensor([1.0, 0.0, 1.0, 0.0]))
    assert grads.read("weight").sum(1).tolist() == [3, 0, 3, 0]
    grads.set_("bias", torch.arange(4.0))
    assert dict(grads.items())["bias"].tolist() == [0, 1, 2, 3]
    losses = grads.add_loss(["bias"], lambda w: {"squared": w["bias"].square().sum()})
    assert torch.allclose(grads.read("bias"), torch.arange(4.0) + 2 * model.bias.detach())
    assert float(losses["squared"]) == pytest.approx(float(model.bias.detach().square().sum()))


def test_whole_copies_and_back():
    model = torch.nn.Linear(3, 4)
    copies = full(dict(model.named_parameters()))
    assign_(dict(model.named_parameters()), {"weight": torch.zeros(4, 3)})
    assert not model.weight.any() and copies["weight"].any()


def test_saving_split_weights_is_refused():
    model = torch.nn.Linear(3, 4)
    model.weight.ds_id = 0
    with pytest.raises(InputError, match="'weight' is split between the processes"):
        refuse_partitioned(model, "saving")


# -- guards ------------------------------------------------------------------------------------------------------------


def given(backend="single", world_size=1):
    processes = Distributed()
    processes.backend, processes.world_size = backend, world_size
    return processes


def arguments(**options):
    return SimpleNamespace(**{"deepspeed": None, "fsdp": None, **options})


def test_ranks_that_do_not_see_each_other(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="WORLD_SIZE=2 .* use_cpu=True"):
        check_launch(arguments(), given())


def test_a_launcher_that_started_one_process(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    line = "/bin/python\0/bin/accelerate\0launch\0--cpu\0--num_processes\x002\0train.py\0"
    monkeypatch.setattr(Path, "read_bytes", lambda path: line.encode())
    with pytest.raises(InputError, match="num_processes=2 and started one"):
        check_launch(arguments(), given())
    monkeypatch.setattr(Path, "read_bytes", lambda path: line.replace("2", "1").encode())
    check_launch(arguments(), given())


@pytest.mark.parametrize(
    ("options", "backend", "sentence"),
    [
        ({"deepspeed": {"zero_optimization": {}}}, "ddp", "training.deepspeed is given and the backend is 'ddp'"),
        ({"fsdp": True}, "ddp", "training.fsdp=True is given and the backend is 'ddp'"),
        ({"fsdp": True}, "fsdp1", "FSDP1 is not supported"),
    ],
)  # fmt: skip
def test_what_was_asked_for_is_not_what_trains(options, backend, sentence, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(InputError, match=sentence):
        check_launch(arguments(**options), given(backend))


def test_deepspeed_left_over_from_an_earlier_trainer(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(distributed, "_GIVEN_BY_LAUNCHER", None)
    with pytest.raises(InputError, match="release_engine"):
        check_launch(arguments(), given("zero2"))
    monkeypatch.setattr(distributed, "_GIVEN_BY_LAUNCHER", "true")
    check_launch(arguments(), given("zero2"))


def test_an_engine_that_is_none_or_cannot_be_read():
    with pytest.raises(InputError, match="made no engine"):
        check_engine(torch.nn.Linear(1, 1))
    engine = SimpleNamespace(
        is_gradient_accumulation_boundary=None,
        zero_optimization_stage=lambda: 0,
        fp16_enabled=lambda: False,
        bfloat16_enabled=lambda: True,
    )
    with pytest.raises(InputError, match="stage: 1"):
        check_engine(engine)


def test_no_other_file_imports_what_runs_the_processes():
    package = Path(hf_continual.__file__).parent
    for path in package.rglob("*.py"):
        if path.name == "distributed.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in names:
                assert not name.startswith(("deepspeed", "torch.distributed")), f"{path.name} imports {name}"


def test_how_many_processes_a_launcher_was_asked_for(tmp_path, monkeypatch):
    from accelerate.commands.config import config_args

    monkeypatch.setattr(config_args, "default_config_file", str(tmp_path / "default.yaml"))
    launch = ["python", "/bin/accelerate", "launch"]
    config = tmp_path / "two.yaml"
    config.write_text("num_processes: 2\ndistributed_type: MULTI_CPU\n")
    assert _processes_asked_for([*launch, "--num_processes", "3", "train.py"]) == 3
    assert _processes_asked_for([*launch, "--num-processes=4", "train.py"]) == 4
    assert _processes_asked_for([*launch, "--config_file", str(config), "train.py"]) == 2
    assert _processes_asked_for([*launch, "train.py"]) is None
    (tmp_path / "default.yaml").write_text("num_processes: 5\n")
    assert _processes_asked_for([*launch, "train.py"]) == 5
