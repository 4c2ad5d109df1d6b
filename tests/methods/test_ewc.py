import copy

import pytest
import torch
from contract import MethodContract
from torch.nn import functional as F
from transformers import TrainerCallback

from hf_continual.errors import InputError
from hf_continual.lora import trainable_parameters
from hf_continual.methods.base import MethodList
from hf_continual.methods.ewc import EWC, combine, draw, quadratic
from hf_continual.testing import close, equal, tiny_model, toy_rows, train_task, weights


class TestEWC(MethodContract):
    method = {"name": "ewc", "ewc_lambda": 50.0}


class TestEWCOfSteps(MethodContract):
    method = {"name": "ewc", "fisher": "trace", "online_decay": 1.0}
    kinds = ("llama",)


# -- the equations -----------------------------------------------------------------------------------------------------


def test_two_quadratics_are_one_by_hand():
    two, one, three = torch.tensor([2.0]), torch.tensor([1.0]), torch.tensor([3.0])
    precision, centre, constant = combine(two, one, two, three)  # 2 (x - 1)^2 + 2 (x - 3)^2
    assert (float(precision), float(centre), float(constant)) == (4.0, 2.0, 4.0)  # = 4 (x - 2)^2 + 4
    precision, centre, constant = combine(torch.zeros(1), one, torch.zeros(1), three)
    assert (float(precision), float(centre), float(constant)) == (0.0, 1.0, 0.0)


def test_quadratic_by_hand():
    weights = [torch.tensor([3.0, 1.0], requires_grad=True), torch.tensor([[2.0]], requires_grad=True)]
    value = quadratic(weights, [torch.tensor([2.0, 0.0]), torch.tensor([[1.0]])], [torch.zeros(2), torch.ones(1, 1)])
    assert value.item() == 2 * 9 + 0 + 1
    first, second = torch.autograd.grad(value, weights)
    assert first.tolist() == [12.0, 0.0] and second.tolist() == [[2.0]]


def test_drawn_labels_have_the_probabilities_of_the_model():
    probabilities = torch.tensor([0.5, 0.3, 0.0, 0.2])
    drawn = draw(probabilities.log().expand(20000, 4), torch.Generator().manual_seed(0))
    assert torch.bincount(drawn, minlength=4).div(20000).sub(probabilities).abs().max() < 0.02
    assert not (drawn == 2).any()


# -- a training run ----------------------------------------------------------------------------------------------------


class KeepWeights(TrainerCallback):
    """The weights before each step."""

    def __init__(self, model):
        self.model, self.steps = model, []

    def on_step_begin(self, args, state, control, **kwargs):
        self.steps.append({n: p.detach().clone() for n, p in trainable_parameters(self.model).items()})


def row_batch(rows):
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


def fisher_naively(model, rows, loss_of=None):
    """Row by row with `backward`, in double precision, on a copy."""
    model = copy.deepcopy(model).double().eval()
    named = trainable_parameters(model)
    total = {n: torch.zeros_like(p) for n, p in named.items()}
    for i in range(len(rows)):
        model.zero_grad()
        outputs = model(**row_batch([rows[i]]))
        (outputs.loss if loss_of is None else loss_of(outputs, rows[i], i)).backward()
        for n, p in named.items():
            total[n] += 0 if p.grad is None else p.grad**2
    return {n: t / len(rows) for n, t in total.items()}


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize(("kind", "lora"), [("llama", True), ("t5", False)])
def test_penalty_equals_the_sum_over_all_tasks(kind, lora, tmp_path):
    model, method = tiny_model(kind, lora=lora).double(), EWC(ewc_lambda=30.0)
    past = []
    for task in range(4):
        rows, keep = toy_rows(kind, rows=6 + task, seed=task), KeepWeights(model)
        trainer = train_task(model, rows, [method], tmp_path / str(task), kind=kind, callbacks=[keep])
        values = logged(trainer, "ewc/penalty")
        expected = [
            15.0 * sum(float((f[n] * (now[n] - then[n]) ** 2).sum()) for f, then in past for n in now)
            for now in keep.steps
        ]
        assert values == pytest.approx(expected if past else [], rel=1e-6, abs=1e-12)
        assert not past or values[-1] > 0
        then = {n: p.detach().clone() for n, p in trainable_parameters(model).items()}
        past.append((fisher_naively(model, rows), then))
    assert len(method.precision_) == len(method.centre_) == len(past[0][0])


def test_online_keeps_only_the_latest_weights(tmp_path):
    model, method = tiny_model(lora=True).double(), EWC(ewc_lambda=30.0, online_decay=0.5)
    total, then = None, None
    for task in range(3):
        rows, keep = toy_rows(rows=6, seed=task), KeepWeights(model)
        trainer = train_task(model, rows, [method], tmp_path / str(task), callbacks=[keep])
        if total is not None:
            expected = [
                15.0 * sum(float((total[n] * (now[n] - then[n]) ** 2).sum()) for n in now) for now in keep.steps
            ]
            assert logged(trainer, "ewc/penalty") == pytest.approx(expected, rel=1e-6, abs=1e-12)
        fisher = fisher_naively(model, rows)
        total = fisher if total is None else {n: 0.5 * total[n] + fisher[n] for n in fisher}
        then = {n: p.detach().clone() for n, p in trainable_parameters(model).items()}


@pytest.mark.parametrize("kind", ["llama", "t5", "bert"])
def test_sampled_fisher_equals_that_of_the_drawn_labels(kind, tmp_path):
    model, method, rows = tiny_model(kind, lora=True).double(), EWC(fisher="sampled"), toy_rows(kind, rows=5)
    trainer = train_task(model, rows, [method], tmp_path, kind=kind)

    def loss_of(outputs, row, index):
        logits = outputs.logits[0] if kind != "llama" else outputs.logits[0, :-1]  # no label for the first token
        logits = logits.reshape(-1, logits.shape[-1])
        generator = torch.Generator().manual_seed(trainer.args.seed + 1_000_003 + index)
        return F.cross_entropy(logits, draw(logits.detach(), generator))

    expected = fisher_naively(model, rows, loss_of)
    assert all(method.precision_[n] == pytest.approx(f.float(), rel=1e-5, abs=1e-12) for n, f in expected.items())
    assert not close(method.precision_, {n: f.float() for n, f in fisher_naively(model, rows).items()}, 0.1)


def test_fisher_of_steps_has_no_gradient_of_the_penalty(tmp_path):
    """F = epochs x mean over steps of the squared gradient of the task loss alone, and each task adds its own."""
    model, method = tiny_model(lora=True).double(), EWC(fisher="trace", ewc_lambda=1000.0)
    total = {}
    for task in range(2):
        rows, keep = toy_rows(rows=8, seed=task), KeepWeights(model)
        options = {"num_train_epochs": 2, "train_sampling_strategy": "sequential"}
        trainer = train_task(model, rows, [method], tmp_path / str(task), callbacks=[keep], **options)
        assert task == 0 or max(logged(trainer, "ewc/penalty")) > 1e-4
        twin = copy.deepcopy(model)
        named = trainable_parameters(twin)
        for step, now in enumerate(keep.steps):  # two batches of four an epoch
            with torch.no_grad():
                torch._foreach_copy_(list(named.values()), [now[n] for n in named])
            twin.zero_grad()
            twin(**row_batch([rows[i] for i in range(4 * (step % 2), 4 * (step % 2) + 4)])).loss.backward()
            for n, p in named.items():
                total[n] = total.get(n, 0) + p.grad**2 / 2  # two batches an epoch, summed over epochs and tasks
    assert all(method.precision_[n] == pytest.approx(t.float(), rel=1e-4, abs=1e-9) for n, t in total.items())


def test_fisher_touches_neither_gradients_nor_generators_nor_modes(tmp_path):
    states = []
    for value in (0.0, 400.0):
        model = tiny_model(lora=True, dropout=0.2)
        train_task(model, toy_rows(), [EWC(ewc_lambda=value)], tmp_path / str(value))
        assert all(module.training for module in model.modules())
        states.append((torch.get_rng_state(), [p.grad for p in model.parameters()], weights(model)))
    assert torch.equal(states[0][0], states[1][0]) and equal(states[0][2], states[1][2])
    assert all((a is None) == (b is None) for a, b in zip(states[0][1], states[1][1], strict=True))


def test_some_rows_are_a_seeded_choice(tmp_path):
    fishers = []
    for rows in (3, 3, None):
        model, method = tiny_model(lora=True), EWC(fisher_rows=rows)
        train_task(model, toy_rows(), [method], tmp_path / f"{len(fishers)}")
        fishers.append(method.precision_)
    assert equal(fishers[0], fishers[1]) and not close(fishers[0], fishers[2], 1e-3)


def test_new_adapters_have_no_penalty(tmp_path):
    model, methods = tiny_model(lora=True), MethodList(["inclora", {"name": "ewc"}])
    for task in range(2):
        trainer = train_task(model, toy_rows(seed=task), methods, tmp_path / str(task))
    assert not logged(trainer, "ewc/penalty")
    assert (
        sum(".default." in n for n in methods[1].precision_) == sum(".task1." in n for n in methods[1].precision_) > 0
    )


def test_penalty_holds_the_weights_back(tmp_path):
    moved = []
    for value in (0.0, 1e6):
        model, method = tiny_model(lora=True), EWC(ewc_lambda=value)
        train_task(model, toy_rows(seed=0), [method], tmp_path / f"{value}0")
        before = weights(model)
        train_task(model, toy_rows(seed=1), [method], tmp_path / f"{value}1", num_train_epochs=3)
        moved.append(sum(float((p - before[n]).square().sum()) for n, p in weights(model).items()))
    assert moved[1] < 0.7 * moved[0]


@pytest.mark.parametrize(
    "options",
    [
        {"ewc_lambda": -1},
        {"ewc_lambda": True},
        {"ewc_lambda": float("inf")},
        {"fisher": "exact"},
        {"fisher_rows": 0},
        {"fisher_rows": 8, "fisher": "trace"},
        {"online_decay": 1.5},
    ],
)
def test_refuses_options_that_cannot_be(options):
    with pytest.raises(InputError, match=next(iter(options))):
        EWC(**options)
