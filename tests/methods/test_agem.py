import copy
from types import SimpleNamespace

import datasets
import pytest
import torch
from contract import MethodContract
from test_ewc import KeepWeights, logged, row_batch

from hf_continual.distributed import Distributed, GradView
from hf_continual.errors import InputError
from hf_continual.lora import trainable_parameters
from hf_continual.methods.agem import AGEM, correction, dot, project
from hf_continual.methods.base import ContinualMethod
from hf_continual.testing import equal, tiny_model, toy_rows, train_task, weights


class TestAGEM(MethodContract):
    method = {"name": "agem", "count": 6, "memory_batch_size": 4}


# -- the equation ------------------------------------------------------------------------------------------------------


def test_projection_by_hand():
    g = torch.tensor([1.0, 0.0])
    assert project(g, torch.tensor([-1.0, 1.0])).tolist() == [0.5, 0.5]  # g . r = -1, r . r = 2
    assert project(g, torch.tensor([1.0, 1.0])).tolist() == [1.0, 0.0]
    assert project(g, torch.tensor([-3.0, 0.0])).tolist() == [0.0, 0.0]
    assert project(g, torch.zeros(2)).tolist() == [1.0, 0.0]


def test_projection_is_the_nearest_vector_without_conflict():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        g, r, other = torch.randn(3, 7, generator=generator, dtype=torch.float64)
        found = project(g, r)
        assert found @ r >= -1e-12
        assert torch.equal(found, g) == bool(g @ r >= 0)
        allowed = other - min(0.0, float(other @ r)) / float(r @ r) * r
        assert (found - g).norm() <= (allowed - g).norm() + 1e-12


def test_inner_product_in_pieces(monkeypatch):
    a, b = torch.randn(2, 10, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("hf_continual.methods.agem.PIECE", 3)
    assert float(dot(a, b)) == pytest.approx(float(a @ b), rel=1e-6)


# -- through the seam --------------------------------------------------------------------------------------------------


class Tensors(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.idle = (torch.nn.Parameter(torch.zeros(s)) for s in ((2, 3), (4,), (5,)))


def test_tensor_by_tensor_equals_the_flat_vector():
    model, view = Tensors(), None
    generator = torch.Generator().manual_seed(1)
    model.a.grad, model.b.grad = torch.randn(2, 3, generator=generator), torch.randn(4, generator=generator)
    view = GradView(model, Distributed())
    before = view.flat()
    assert torch.equal(before, torch.cat([model.a.grad.flatten(), model.b.grad]))
    reference = -before + 0.1 * torch.randn(10, generator=generator)
    view.add_flat_(correction(before, reference)[0])
    assert torch.equal(view.flat(), project(before, reference)) and model.idle.grad is None
    unchanged = view.flat()
    view.add_flat_(correction(unchanged, unchanged)[0])
    assert torch.equal(view.flat(), unchanged)


class Watch(ContinualMethod):
    """The gradients before and after those of the list in front of it have edited them."""

    name = "watch"
    supports = frozenset({"single", "ddp"})

    def __init__(self, config=None):
        super().__init__(config)
        self._before, self._after = [], []

    def on_gradients(self, ctx, grads):
        self._before.append(grads.flat().double())

    def edit_gradients(self, ctx, grads):
        self._after.append(grads.flat().double())


def gradient_naively(model, at, rows):
    """Of the mean loss of rows of equal length, in double precision on a copy, with `backward`."""
    twin = copy.deepcopy(model).double()
    with torch.no_grad():
        for name, p in trainable_parameters(twin).items():
            p.copy_(at[name])
    twin.zero_grad()
    twin(**row_batch(rows)).loss.backward()
    return torch.cat([p.grad.flatten() for p in trainable_parameters(twin).values()])


@pytest.mark.parametrize(("kind", "lora"), [("llama", True), ("t5", False)])
@pytest.mark.parametrize("micro_batch", [16, 3])
def test_steps_of_a_run_are_projected(kind, lora, micro_batch, tmp_path):
    model = tiny_model(kind, lora=lora).double()
    method, watch = AGEM(count=5, memory_batch_size=4, memory_micro_batch=micro_batch), Watch()
    for task in range(2):
        train_task(model, toy_rows(kind, seed=task), [method, watch], tmp_path / str(task), kind=kind)
    assert all(torch.equal(a, b) for a, b in zip(watch._before[:4], watch._after[:4], strict=True))  # of the first task
    stored, watch, keep = method.memory_.rows, Watch(), KeepWeights(model)
    watch.tasks_done_ = 2
    rows = answers_of_another_kind(kind, stored)
    trainer = train_task(
        model,
        rows,
        [method, watch],
        tmp_path / "2",
        kind=kind,
        callbacks=[keep],
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
        max_grad_norm=0.01,
    )
    violated = []
    for step, (now, before, after) in enumerate(zip(keep.steps, watch._before, watch._after, strict=True)):
        generator = torch.Generator().manual_seed(42 + 1_000_003 * 2 + step)
        drawn = torch.randperm(len(stored), generator=generator)[:4].tolist()
        r = gradient_naively(model, now, [stored[i] for i in drawn])
        product = float(before @ r)
        expected = before - min(0.0, product) / float(r @ r) * r
        assert (after - expected).norm() <= 1e-6 * expected.norm()
        violated.append(float(product < 0))
    assert logged(trainer, "agem/violated") == violated and sum(violated) > 0


def answers_of_another_kind(kind, stored):
    """The stored inputs with other answers: what is learnt from them contradicts what is stored."""
    rows = stored.to_list()
    other = toy_rows(kind, rows=len(rows), seed=99).to_list()
    return datasets.Dataset.from_list([{**row, "labels": o["labels"]} for row, o in zip(rows, other, strict=True)])


def test_the_loss_scale_cancels(monkeypatch, tmp_path):
    model, method = tiny_model(lora=True), AGEM(count=4)
    trainer = train_task(model, toy_rows(), [method], tmp_path)
    ctx = trainer.ctx
    object.__setattr__(ctx, "task", SimpleNamespace(index=1))
    batch = trainer._prepare_inputs(
        trainer.data_collator(answers_of_another_kind("llama", method.memory_.rows).to_list())
    )
    gradients = torch.autograd.grad(model(**batch).loss, list(trainable_parameters(model).values()))
    results = []
    for scale in (1.0, 1024.0):
        monkeypatch.setattr(Distributed, "grad_scale", lambda self, scale=scale: scale)
        for p, g in zip(trainable_parameters(model).values(), gradients, strict=True):
            p.grad = -g * scale
        view = GradView(model, trainer.dist)
        method.edit_gradients(ctx, view)
        results.append(view.flat() / scale)
    assert torch.allclose(*results, rtol=1e-4, atol=1e-9)


def test_a_neutral_run_draws_no_random_numbers(tmp_path):
    results = []
    for methods in ([AGEM(count=0)], None):
        model = tiny_model(lora=True, dropout=0.2)
        for task in range(2):
            train_task(model, toy_rows(seed=task), methods, tmp_path / f"{methods is None}{task}")
        results.append((weights(model), torch.get_rng_state()))
    assert equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def test_memory_holds_every_past_task(tmp_path):
    model, method = tiny_model(lora=True), AGEM(count=3, policy="herding")
    for task in range(3):
        train_task(model, toy_rows(seed=task), [method], tmp_path / str(task))
    assert method.memory_.tasks == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_refuses_reentrant_checkpointing(tmp_path):
    model, method = tiny_model(lora=True), AGEM(count=3)
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    train_task(model, toy_rows(seed=0), [method], tmp_path / "0")
    with pytest.raises(InputError, match="use_reentrant"):
        train_task(model, toy_rows(seed=1), [method], tmp_path / "1", **options)


@pytest.mark.parametrize(
    "options",
    [
        {"ratio": 1.5},
        {"count": -1},
        {"total": 0},
        {"policy": "best"},
        {"seed": "one"},
        {"memory_batch_size": 0},
        {"memory_micro_batch": True},
    ],
)
def test_refuses_options_that_cannot_be(options):
    with pytest.raises(InputError, match=next(iter(options))):
        AGEM(**options)
