import pytest
import torch
from contract import MethodContract
from naive_skills import OutOfMemory, assert_same_weights
from transformers import TrainerCallback

from hf_continual.errors import InputError
from hf_continual.methods.fisher_merge import FisherMerge, fisher_coefficients
from hf_continual.testing import tiny_model, toy_rows, train_task, weights


class TestFisherMerge(MethodContract):
    method = "fisher_merge"


class NaiveFisher(TrainerCallback):
    """In double precision, element by element as the equations say; needs a training that does not clip."""

    def __init__(self, decay=1.0):
        self.decay, self.total = decay, None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.previous = {name: p.detach().double().clone() for name, p in self.parameters.items()}
        self.squares, self.steps = {name: torch.zeros_like(p) for name, p in self.previous.items()}, 0

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                self.squares[name] += parameter.grad.double() ** 2
        self.steps += 1

    def on_train_end(self, args, state, control, **kwargs):
        fisher = {name: value / self.steps for name, value in self.squares.items()}
        self.merged = {name: p.detach().double().clone() for name, p in self.parameters.items()}
        if self.total is None:
            self.total = fisher
            return
        for name, present in self.merged.items():
            sums = fisher[name] + self.total[name]
            c = torch.full_like(sums, 0.5)
            c[sums > 0] = fisher[name][sums > 0] / sums[sums > 0]
            self.merged[name] = self.previous[name] * (1 - c) + present * c
        self.total = {name: fisher[name] + self.decay * self.total[name] for name in fisher}


@pytest.mark.parametrize(("kind", "lora"), [("llama", True), ("llama", False), ("t5", True), ("roberta", False)])
@pytest.mark.parametrize("decay", [1.0, 0.5])
def test_three_tasks_agree_with_the_naive_one(decay, kind, lora, tmp_path):
    model, method, naive = tiny_model(kind, lora=lora), FisherMerge(decay=decay), NaiveFisher(decay)
    for index in range(3):
        rows = toy_rows(kind, rows=12, seed=index)
        train_task(model, rows, [method], tmp_path / str(index), kind=kind, callbacks=[naive], max_grad_norm=0)
        assert_same_weights(model, naive.merged)
        assert len(method.total_) == len(naive.total)
        for ours, theirs in zip(method.total_.values(), naive.total.values(), strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6 * float(theirs.max()))


def test_gradients_count_as_they_are_before_clipping(tmp_path):
    totals = []
    for limit in (0, 1e-3):
        method = FisherMerge()
        train_task(tiny_model(), toy_rows(), [method], tmp_path / str(limit), max_grad_norm=limit, learning_rate=0.0)
        totals.append(method.total_)
    assert all(torch.equal(totals[0][name], totals[1][name]) for name in totals[0])


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_step_with_a_gradient_that_is_not_finite_does_not_count(value, tmp_path):
    class Spoil(FisherMerge):
        name = "fisher_merge"

        def on_gradients(self, ctx, grads):
            gradient = grads.parameter("lm_head.weight").grad
            kept = gradient[0, 0].clone()
            if ctx.state.global_step in (0, 2):
                gradient[0, 0] = value
            super().on_gradients(ctx, grads)
            gradient[0, 0] = kept

    class NaiveSpoilt(NaiveFisher):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step not in (0, 2):
                super().on_pre_optimizer_step(args, state, control, **kwargs)

    model, method, naive = tiny_model(), Spoil(), NaiveSpoilt()
    for index in range(2):
        train_task(model, toy_rows(seed=index), [method], tmp_path / str(index), callbacks=[naive], max_grad_norm=0)
        assert naive.steps == 2
        assert_same_weights(model, naive.merged)
        for ours, theirs in zip(method.total_.values(), naive.total.values(), strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6 * float(theirs.max()))
    assert all(torch.isfinite(w).all() for w in weights(model).values())


def test_begins_anew_when_the_trainer_does(tmp_path):
    method, naive = FisherMerge(), NaiveFisher()
    train_task(tiny_model(), toy_rows(), [method], tmp_path, callbacks=[naive, OutOfMemory(2)], max_grad_norm=0,
               auto_find_batch_size=True)  # fmt: skip
    assert naive.steps > 4  # of smaller batches
    for ours, theirs in zip(method.total_.values(), naive.total.values(), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6 * float(theirs.max()))


def test_coefficients_by_hand():
    c = fisher_coefficients(torch.tensor([3.0, 0.0, 0.0, 5.0]), torch.tensor([1.0, 2.0, 0.0, 0.0]))
    assert c.tolist() == [0.75, 0.0, 0.5, 1.0]
    tiny = torch.tensor([3e-38, 1e-30])
    torch.testing.assert_close(fisher_coefficients(tiny, tiny), torch.full((2,), 0.5))


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan"), "slow"])
def test_refuses_decays_that_cannot_be(value):
    with pytest.raises(InputError, match="method 'fisher_merge': decay"):
        FisherMerge(decay=value)
