import itertools

import pytest
import torch
from contract import ONE_KIND, MethodContract
from test_agem import Watch, answers_of_another_kind, gradient_naively
from test_ewc import KeepWeights, logged

from hf_continual.errors import InputError
from hf_continual.methods.gem import GEM, project, solve_qp
from hf_continual.testing import tiny_model, toy_rows, train_task


class TestGEM(MethodContract):
    method = {"name": "gem", "count": 4}
    kinds = ONE_KIND


# -- the equation ------------------------------------------------------------------------------------------------------


def solve_by_trying(gram, products, margin):
    """Every set of free multipliers: the feasible stationary point of least value."""
    best, lowest = None, float("inf")
    for free in itertools.product([False, True], repeat=len(products)):
        v, chosen = torch.full_like(products, margin), torch.tensor(free)
        if chosen.any():
            right = -(products + gram[:, ~chosen].sum(1) * margin)[chosen]
            v[chosen] = torch.linalg.solve(gram[chosen][:, chosen], right)
        value = float(v @ gram @ v / 2 + products @ v)
        if (v >= margin - 1e-12).all() and value < lowest:
            best, lowest = v, value
    return best


@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_solver_equals_trying_every_active_set(margin):
    generator = torch.Generator().manual_seed(0)
    for trial in range(200):
        tasks = 1 + trial % 6
        memories = torch.randn(tasks, 8, generator=generator, dtype=torch.float64)
        memories *= 10.0 ** torch.randint(-3, 4, (tasks, 1), generator=generator)
        g = torch.randn(8, generator=generator, dtype=torch.float64)
        gram, products = memories @ memories.T, memories @ g
        found, expected = solve_qp(gram, products, margin), solve_by_trying(gram, products, margin)
        assert torch.allclose(memories.T @ found, memories.T @ expected, rtol=1e-7, atol=1e-7)
        assert (found >= margin).all()


def test_conflict_by_hand():
    g, m = torch.tensor([-1.0, 2.0]), torch.tensor([[1.0, 0.0]])
    assert project(g, m, margin=0.0, eps=0.0).tolist() == [0.0, 2.0]  # g . m = -1 -> 0; TRACE's code: -2
    assert project(g, m, margin=0.5, eps=0.0).tolist() == [0.0, 2.0]  # v = 1 is above the margin
    assert project(g, m, margin=1.5, eps=0.0).tolist() == [0.5, 2.0]  # v = 1.5
    assert project(g, m, margin=0.5, eps=0.0, margin_as="added").tolist() == [0.5, 2.0]  # v = 1 + 0.5
    assert project(g, m, margin=0.0, eps=1.0).tolist() == [-0.5, 2.0]  # v = 1 / (1 + eps)
    assert torch.equal(project(-g, m), -g)  # no conflict: nothing is added, nor the margin
    # Two conflicting memories: x <= 0 and x + y >= 0 leave (0, 0) of (1, -1).
    both = torch.tensor([[-1.0, 0.0], [1.0, 1.0]])
    assert project(torch.tensor([1.0, -1.0]), both, margin=0.0, eps=0.0).tolist() == pytest.approx([0, 0], abs=1e-7)


@pytest.mark.parametrize("margin", [0.0, 0.5, 3.0])
def test_all_constraints_hold_after_projection(margin):
    generator = torch.Generator().manual_seed(1)
    for trial in range(100):
        tasks = 1 + trial % 12
        memories = torch.randn(tasks, 30, generator=generator, dtype=torch.float64)
        g = torch.randn(30, generator=generator, dtype=torch.float64)
        for rule in ("bound", "added"):
            found = project(g, memories, margin, eps=0.0, margin_as=rule)
            # `added` alone does not hold the constraints: memories may conflict with each other.
            if rule == "bound" or margin == 0:
                assert (memories @ found >= -1e-9).all()
        if margin == 0 and (memories @ g < 0).any():
            v = solve_qp(memories @ memories.T, memories @ g)
            assert (v * (memories @ found)).abs().max() < 1e-9  # what is held back is held at zero: it is the nearest


def test_many_and_parallel_memories():
    generator = torch.Generator().manual_seed(2)
    memories = torch.randn(25, 60, generator=generator, dtype=torch.float64)
    memories = torch.cat([memories, 2 * memories[:20], torch.zeros(2, 60, dtype=torch.float64)])  # rank 25 of 47
    g = torch.randn(60, generator=generator, dtype=torch.float64)
    once, twice = project(g, memories[:25], 0.0, 0.0), project(g, memories, 0.0, 0.0)
    assert torch.allclose(once, twice, atol=1e-8) and (memories @ twice >= -1e-8).all()
    many = torch.randn(50, 40, generator=generator, dtype=torch.float64) + 0.5
    assert (many @ project(-many.mean(0), many, 0.0, 0.0) >= -1e-8).all()


def test_no_numbers_stay_no_numbers():
    found = project(torch.tensor([1.0, torch.nan]), torch.eye(2))
    assert torch.isnan(found).all()


# -- a training run ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "lora"), [("llama", True), ("t5", False)])
@pytest.mark.parametrize(("size", "options"), [(None, {"margin": 0.0, "eps": 0.0}), (2, {})])
def test_steps_of_a_run_are_projected(kind, lora, size, options, tmp_path):
    model = tiny_model(kind, lora=lora).double()
    method, watch = GEM(count=4, memory_batch_size=size, memory_micro_batch=3, **options), Watch()
    for task in range(2):
        train_task(model, toy_rows(kind, seed=task), [method, watch], tmp_path / str(task), kind=kind)
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
        num_train_epochs=2,
        max_grad_norm=0.01,
    )
    violated = []
    for step, (now, before, after) in enumerate(zip(keep.steps, watch._before, watch._after, strict=True)):
        memories = []
        for task in range(2):
            rows = [stored[4 * task + i] for i in range(4)]
            if size is not None:
                generator = torch.Generator().manual_seed(42 + 1_000_003 * 2 + step)
                rows = [rows[i] for i in torch.randperm(4, generator=generator)[:size].tolist()]
            memories.append(gradient_naively(model, now, rows))
        memories = torch.stack(memories)
        products = memories @ before
        expected = before
        if (products < 0).any():
            gram = memories @ memories.T + method.config.eps * torch.eye(2, dtype=torch.float64)
            expected = before + memories.T @ solve_by_trying(gram, products, method.config.margin)
        assert (after - expected).norm() <= 1e-6 * expected.norm()
        if not method.config.eps:
            assert (memories @ after >= -1e-6 * memories.norm(dim=1) * before.norm()).all()
        violated.append(float((products < 0).any()))
    assert logged(trainer, "gem/violated") == violated and sum(violated) > 0


@pytest.mark.parametrize(
    "options",
    [{"ratio": -0.1}, {"margin": -1}, {"eps": float("nan")}, {"margin_as": "both"}, {"memory_batch_size": 0}],
)
def test_refuses_options_that_cannot_be(options):
    with pytest.raises(InputError, match=next(iter(options))):
        GEM(**options)


def test_reentrant_checkpointing_is_refused_before_the_first_task(tmp_path):
    with pytest.raises(InputError, match="use_reentrant"):
        train_task(
            tiny_model(), toy_rows(), [GEM(count=2)], tmp_path, gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": True},
        )  # fmt: skip
