import copy
import math

import datasets
import pytest
import torch
from contract import MethodContract
from test_ewc import KeepWeights, logged
from transformers import TrainerCallback

from hf_continual.errors import InputError
from hf_continual.lora import trainable_parameters
from hf_continual.methods.base import ContinualMethod, MethodList
from hf_continual.methods.lwf import LwF, distillation, label_positions
from hf_continual.testing import equal, tiny_model, toy_rows, train_task, weights


class TestLwF(MethodContract):
    method = {"name": "lwf", "weight": 1.0, "temperature": 2.0}


# -- the equations -----------------------------------------------------------------------------------------------------


def test_distillation_by_hand():
    student, teacher = torch.zeros(1, 2), torch.tensor([[2 * math.log(3), 0.0]])  # 1/2, 1/2 and, at T = 2, 3/4, 1/4
    expected = 4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert distillation(student, teacher, 2.0).tolist() == pytest.approx([expected])
    assert distillation(teacher, teacher, 2.0).tolist() == [0.0]
    reversed_by_trace = 4 * (0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25))
    assert distillation(student, teacher, 2.0).item() != pytest.approx(reversed_by_trace, rel=0.05)


def test_positions_that_predict_a_label_by_hand():
    labels = torch.tensor([[-100, 5, -100, 7], [-100, -100, -100, 9], [8, -100, -100, -100]])
    assert label_positions(labels, shift=True).tolist() == [[0, 2], [2, -1], [-1, -1]]  # nothing predicts label 0
    assert label_positions(labels, shift=False).tolist() == [[1, 3], [3, -1], [0, -1]]
    assert label_positions(torch.tensor([2, 0]), shift=False).tolist() == [[0], [0]]
    assert label_positions(torch.full((2, 3), -100), shift=True).tolist() == [[-1], [-1]]


# -- a training run ----------------------------------------------------------------------------------------------------


def answers_of_different_length(kind, seed):
    """Rows of which only the end, or for T5 the beginning, has labels; the rest is -100."""
    rows = toy_rows(kind, rows=8, seed=seed).to_list()
    for i, row in enumerate(rows):
        if kind == "llama":
            row["labels"] = [-100] * (9 - i) + row["labels"][9 - i :]
        elif kind == "t5":
            row["labels"] = row["labels"][: 1 + i % 5] + [-100] * (4 - i % 5)
    return datasets.Dataset.from_list(rows)


def loss_naively(kind, student, teacher, rows, temperature):
    """Position by position, class by class."""
    batch = {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
    with torch.no_grad():
        new, old = (model.eval()(**batch).logits.double() / temperature for model in (student, teacher))
    total, count = 0.0, 0
    for i, row in enumerate(rows):
        if kind == "bert":
            pairs = [(new[i], old[i])]
        else:
            step = 1 if kind == "llama" else 0
            pairs = [
                (new[i, t - step], old[i, t - step])
                for t, label in enumerate(row["labels"])
                if label != -100 and t >= step
            ]
        for z, y in pairs:
            p, q = y.exp() / y.exp().sum(), z.exp() / z.exp().sum()
            total += float(sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist(), strict=True)))
            count += 1
    return temperature**2 * total / count


@pytest.mark.parametrize(("kind", "lora"), [("llama", True), ("t5", False), ("bert", True)])
def test_logged_loss_equals_the_formula(kind, lora, tmp_path):
    model, method = tiny_model(kind, lora=lora).double(), LwF(weight=0.5, temperature=3.0)
    first = train_task(model, answers_of_different_length(kind, 0), [method], tmp_path / "0", kind=kind)
    assert not logged(first, "lwf/distillation")  # nothing is known before the first task
    teacher, rows, keep = copy.deepcopy(model), answers_of_different_length(kind, 1), KeepWeights(model)
    options = {"num_train_epochs": 2, "train_sampling_strategy": "sequential"}
    options["learning_rate"] = 0.1 if kind == "bert" else 1e-2  # little moves it
    trainer = train_task(model, rows, [method], tmp_path / "1", kind=kind, callbacks=[keep], **options)
    student = copy.deepcopy(model)
    expected = []
    for step, now in enumerate(keep.steps):
        with torch.no_grad():
            for name, p in trainable_parameters(student).items():
                p.copy_(now[name])
        batch = [rows[i] for i in range(4 * (step % 2), 4 * (step % 2) + 4)]
        expected.append(0.5 * loss_naively(kind, student, teacher, batch, 3.0))
    assert logged(trainer, "lwf/distillation") == pytest.approx(expected, rel=1e-6, abs=1e-12)
    assert expected[0] == pytest.approx(0.0, abs=1e-12) and expected[-1] > 1e-6


def test_old_predictions_are_kept(tmp_path):
    distances = []
    for weight in (0.0, 100.0):
        model, method, rows = tiny_model(lora=True), LwF(weight=weight), toy_rows(seed=1)
        train_task(model, toy_rows(seed=0), [method], tmp_path / f"{weight}0")
        teacher = copy.deepcopy(model)
        train_task(model, rows, [method], tmp_path / f"{weight}1", num_train_epochs=3)
        distances.append(loss_naively("llama", model, teacher, rows.to_list(), 2.0))
    assert distances[1] < 0.3 * distances[0]


class KeepGenerator(TrainerCallback):
    def __init__(self):
        self.states = []

    def on_step_end(self, args, state, control, model, **kwargs):
        assert all(module.training for module in model.modules())
        self.states.append(torch.get_rng_state())


def test_the_teacher_draws_no_random_numbers_and_leaves_the_mode(tmp_path):
    seen = []
    for weight in (0.0, 1.0):
        model, method, keep = tiny_model(lora=True, dropout=0.3), LwF(weight=weight), KeepGenerator()
        for task in range(2):
            train_task(model, toy_rows(seed=task), [method], tmp_path / f"{weight}{task}", callbacks=[keep])
        seen.append(keep.states)
    assert len(seen[0]) == 8 and all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


class AddsColumn(ContinualMethod):
    """Another method with a column of its own, which no model takes."""

    batch_columns = ("of_another",)

    def data_collator(self, ctx, collator):
        return lambda rows: {**collator(rows), "of_another": torch.zeros(len(rows))}


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_columns_of_other_methods_do_not_reach_the_teacher(kind, tmp_path):
    results = []
    for others in ([], [AddsColumn()]):
        model, methods = tiny_model(kind, lora=True), [LwF(), *others]
        for task in range(2):
            train_task(model, toy_rows(kind, seed=task), methods, tmp_path / f"{len(others)}{task}", kind=kind)
        results.append(weights(model))
    assert equal(*results)


def test_new_adapters_begin_at_the_old_predictions(tmp_path):
    model, methods = tiny_model(lora=True), MethodList(["lwf", "olora"])  # the adapter is added first in any order
    for task in range(2):
        trainer = train_task(model, toy_rows(seed=task), methods, tmp_path / str(task))
    values = logged(trainer, "lwf/distillation")
    assert values[0] == pytest.approx(0.0, abs=1e-6) and values[-1] > 1e-4


@pytest.mark.parametrize("options", [{"weight": -1}, {"weight": "much"}, {"temperature": 0}, {"temperature": True}])
def test_refuses_options_that_cannot_be(options):
    with pytest.raises(InputError, match=next(iter(options))):
        LwF(**options)


def test_refuses_predictions_without_classes(tmp_path):
    from transformers import BertForSequenceClassification

    config = tiny_model("bert").config
    config.num_labels = 1
    model, method = BertForSequenceClassification(config), LwF()
    rows = toy_rows("bert").map(lambda row: {"labels": float(row["labels"])})
    train_task(model, rows, [method], tmp_path / "0", kind="bert")
    with pytest.raises(InputError, match="one of several classes"):
        train_task(model, rows, [method], tmp_path / "1", kind="bert")
