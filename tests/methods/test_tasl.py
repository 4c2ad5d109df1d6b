import copy
import json

import pytest
import torch
from contract import MethodContract
from naive_skills import (
    Movement,
    NaiveSkills,
    OutOfMemory,
    StopAfter,
    assert_agrees,
    assert_close,
    four_cases,
    norm,
    percentile,
    soft,
    still_and_moving,
    units_of,
)
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback, TrainerCallback

from hf_continual.distributed import Distributed
from hf_continual.errors import InputError
from hf_continual.lora import trainable_state
from hf_continual.methods.base import MethodList, make_method
from hf_continual.methods.tasl import TaSL
from hf_continual.testing import equal, tiny_model, toy_rows, train_task, weights
from hf_continual.trainer import ContinualTrainer


class TestTaSL(MethodContract):
    method = {"name": "tasl"}


class TestTaSLMemory(MethodContract):
    method = {"name": "tasl", "units": "matrix", "replay_count": 8, "every_n_steps": 2, "average": "run"}
    kinds = ("roberta",)


def train(model, index, methods, folder, kind="llama", **options):
    rows = toy_rows(kind, rows=16, seed=index)
    return train_task(model, rows, methods, folder / f"t{index}", kind=kind, **{"num_train_epochs": 2, **options})


# -- the naive one -----------------------------------------------------------------------------------------------------

MODELS = [(kind, lora) for kind in ("llama", "t5", "roberta") for lora in (True, False)]


@pytest.mark.parametrize(("kind", "lora"), MODELS)
def test_three_tasks_agree_with_the_naive_one(kind, lora, tmp_path):
    model, method = tiny_model(kind, lora=lora), TaSL()
    naive = NaiveSkills("lora_matrix" if lora else "matrix", "first", four_cases)
    for index in range(3):
        train(model, index, [method], tmp_path, kind, callbacks=[naive])
        assert naive.steps_seen == list(range(1, 8))
        assert_agrees(method, naive, model)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_gradients_count_as_they_are_clipped(kind, tmp_path):
    model, method = tiny_model(kind), TaSL(order="second")
    naive = NaiveSkills("matrix", "second", four_cases)
    for index in range(2):
        train(model, index, [method], tmp_path, kind, callbacks=[naive], max_grad_norm=0.1, optim="sgd")
        assert_agrees(method, naive, model)


VARIANTS = {
    "rank-1 units": ({"units": "lora_rank1"}, "lora_rank1", {}),
    "other betas": ({"beta1": 0.5, "beta2": 0.95}, "lora_matrix", {"beta1": 0.5, "beta2": 0.95}),
    "every third step": (
        {"every_n_steps": 3}, "lora_matrix",
        {"beta1": 0.85**3, "beta2": 0.85**3, "counted": lambda step, steps: step in (1, 4, 7)},
    ),
    "the last quarter": ({"last_fraction": 0.25}, "lora_matrix", {"counted": lambda step, steps: step in (6, 7)}),
    "a longer warm-up": ({"warmup_steps": 4}, "lora_matrix", {"counted": lambda step, steps: step >= 4}),
    "no warm-up": ({"warmup_steps": 0}, "lora_matrix", {"counted": lambda step, steps: True}),
    "consistent": ({"timing": "consistent"}, "lora_matrix", {"timing": "consistent"}),
    "consistent, all steps": (
        {"timing": "consistent", "warmup_steps": 0}, "lora_matrix",
        {"timing": "consistent", "counted": lambda step, steps: True},
    ),
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_options_agree_with_the_naive_one(variant, tmp_path):
    options, scheme, changes = VARIANTS[variant]
    model, method = tiny_model(lora=True), TaSL(**options)
    naive = NaiveSkills(scheme, "first", four_cases, **changes)
    for index in range(2):
        train(model, index, [method], tmp_path, callbacks=[naive], max_grad_norm=0)  # not clipped: both timings see it
        assert_agrees(method, naive, model)


def test_quantile_and_shared_agree_with_the_naive_one(tmp_path):
    model, method = tiny_model(lora=True), TaSL(quantile=0.4, shared=0.1, beta=0.7)
    rule = lambda now, before: four_cases(now, before, quantile=0.4, gamma=0.9)  # noqa: E731
    naive = NaiveSkills("lora_matrix", "first", rule)
    found = set()
    for index in range(3):
        train(model, index, [method], tmp_path, callbacks=[naive])
        assert_agrees(method, naive, model)
        found |= set((method.coefficients_ if method.coefficients_ is not None else torch.ones(0)).tolist())
    assert found >= {0.1, 1.0, 0.0}


def test_shares_of_the_cases(tmp_path):
    model, method = tiny_model("roberta"), TaSL(quantile=0.5)
    for index in range(2):
        train(model, index, [method], tmp_path, "roberta")
    now = norm(dict(zip(method.unit_keys_, method.raw_.tolist(), strict=True)))
    before = norm(dict(zip(method.unit_keys_, method.before_.tolist(), strict=True)))
    high, past = percentile(now.values(), 0.5), percentile(before.values(), 0.5)
    counted = {"neither": 0, "past": 0, "current": 0, "shared": 0}
    for key in now:
        counted[{(0, 0): "neither", (0, 1): "past", (1, 0): "current", (1, 1): "shared"}[
            int(now[key] > high), int(before[key] > past)
        ]] += 1  # fmt: skip
    assert method.shares_ == {case: count / len(now) for case, count in counted.items()}


# -- timing ------------------------------------------------------------------------------------------------------------


def test_consistent_timing_does_not_see_clipping_and_the_reference_does(tmp_path):
    scores = {}
    for timing in ("consistent", "reference"):
        for norm_limit in (0, 1e-3):
            method = TaSL(timing=timing)
            # With a learning rate of zero both trainings stand at the same weights all the time.
            train(tiny_model(), 0, [method], tmp_path, max_grad_norm=norm_limit, learning_rate=0.0, optim="sgd")
            scores[timing, norm_limit] = method.raw_
    assert torch.equal(scores["consistent", 0], scores["consistent", 1e-3])
    assert torch.equal(scores["consistent", 0], scores["reference", 0])
    assert float(scores["reference", 1e-3].max()) < 1e-3 * float(scores["reference", 0].max())


@pytest.mark.parametrize(
    ("kind", "options"), [("llama", {}), ("t5", {"timing": "consistent"}), ("roberta", {"every_n_steps": 2})]
)
def test_accumulated_batches_count_as_one(kind, options, tmp_path):
    found = []
    for size, accumulated in ((8, 1), (2, 4)):
        method, model = TaSL(**options), tiny_model(kind)
        for index in range(2):
            train(model, index, [method], tmp_path, kind, per_device_train_batch_size=size, optim="sgd",
                  gradient_accumulation_steps=accumulated, train_sampling_strategy="sequential")  # fmt: skip
        found.append(method)
    least = 1e-6 * float(found[0].raw_.max())  # the gradient of a key's bias is nothing but rounding
    torch.testing.assert_close(found[0].raw_, found[1].raw_, rtol=1e-4, atol=least)
    torch.testing.assert_close(found[0].cumulative_, found[1].cumulative_, rtol=1e-4, atol=1e-5)


def test_a_step_with_a_gradient_that_is_not_finite_is_left_out(tmp_path):
    class Spoil(TaSL):
        name = "tasl"

        def on_step_end(self, ctx):
            if ctx.state.global_step in self._spoilt:
                next(p for p in ctx.model.parameters() if p.requires_grad).grad[0] = float("nan")
            super().on_step_end(ctx)

    model, method = tiny_model(lora=True), Spoil()
    method._spoilt = (3, 5)
    naive = NaiveSkills("lora_matrix", "first", four_cases, counted=lambda step, steps: step in (1, 2, 4, 6, 7))
    train(model, 0, [method], tmp_path, callbacks=[naive])
    assert_agrees(method, naive, model)


@pytest.mark.parametrize(("timing", "factor"), [("consistent", 16), ("reference", 1)])
def test_loss_scale_is_taken_out_where_it_is_still_in_the_gradients(timing, factor, tmp_path, monkeypatch):
    found = []
    for scale in (1.0, 4.0):
        monkeypatch.setattr(Distributed, "grad_scale", lambda self, scale=scale: scale)
        method = TaSL(timing=timing)
        train(tiny_model(), 0, [method], tmp_path, num_train_epochs=1, learning_rate=0.0)
        found.append(method.raw_)
    torch.testing.assert_close(found[0], found[1] * factor, rtol=1e-6, atol=0)  # a product of two averages


def test_skipped_steps_do_not_count(tmp_path, monkeypatch):
    steps = iter(range(8))
    monkeypatch.setattr(Distributed, "step_was_skipped", property(lambda self: next(steps) in (2, 5)))
    model, method = tiny_model(lora=True), TaSL()
    naive = NaiveSkills("lora_matrix", "first", four_cases, counted=lambda step, steps: step in (1, 3, 4, 6, 7))
    train(model, 0, [method], tmp_path, callbacks=[naive])
    assert_agrees(method, naive, model)


def test_a_share_of_less_than_a_step_is_the_last_step(tmp_path):
    model, method = tiny_model(lora=True), TaSL(last_fraction=0.1)
    naive = NaiveSkills("lora_matrix", "first", four_cases, counted=lambda step, steps: step == 3)
    for index in range(2):
        train(model, index, [method], tmp_path, callbacks=[naive], num_train_epochs=1)
        assert naive.steps_seen == [3]
        assert_agrees(method, naive, model)


@pytest.mark.parametrize("timing", ["reference", "consistent"])
def test_scores_begin_anew_when_the_trainer_does(timing, tmp_path):
    method, naive = TaSL(timing=timing), NaiveSkills("lora_matrix", "first", four_cases, timing=timing)
    callbacks = [naive, OutOfMemory(5)]
    trainer = train(tiny_model(lora=True), 0, [method], tmp_path, callbacks=callbacks, auto_find_batch_size=True,
                    max_grad_norm=0)  # fmt: skip
    assert trainer.state.global_step > 8  # of smaller batches
    assert_close(method.raw_, naive.raw, method.unit_keys_)


# -- stopping ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "stop"), [({}, 6), ({"average": "run", "every_n_steps": 2}, 2), ({"timing": "consistent"}, 2)]
)
def test_resumed_in_a_task_equals_uninterrupted(options, stop, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2}
    whole, model = TaSL(**options), tiny_model(lora=True)
    for index in range(2):
        train(model, index, [whole], tmp_path / "whole", **saving)
    expected = weights(model)

    model, method = tiny_model(lora=True), TaSL(**options)
    train(model, 0, [method], tmp_path / "cut", **saving)
    before, state = trainable_state(model), tmp_path / "state"
    method.save(state)
    train(model, 1, [method], tmp_path / "cut", callbacks=[StopAfter(stop)], **saving)
    model.load_state_dict(before, strict=False)
    method = TaSL(**options)
    method.load(state)
    train(model, 1, [method], tmp_path / "cut", resume=str(tmp_path / "cut" / "t1" / f"checkpoint-{stop}"), **saving)
    assert equal(weights(model), expected)
    for name in ("raw_", "before_", "cumulative_", "coefficients_"):
        assert torch.equal(getattr(method, name), getattr(whole, name)), name
    buffers = [
        load_file(str(tmp_path / run / "t1" / "checkpoint-8" / "continual" / "tasl.safetensors"))
        for run in ("whole", "cut")
    ]
    assert equal(*buffers) and {"tracking_/sensitivity", "tracking_/uncertainty"} < buffers[0].keys()
    assert float(buffers[0]["tracking_/sensitivity"].abs().max()) > 0


def best_at(step):
    """A Trainer whose evaluation is best after `step`."""

    class Judged(ContinualTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs, eval_dataset=toy_rows(rows=4, seed=9))

        def evaluate(self, *args, **kwargs):
            metrics = {"eval_loss": float(abs(self.state.global_step - step))}
            self.log(metrics)
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

    return Judged


BEST = {
    "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2,
    "load_best_model_at_end": True,
}  # fmt: skip


@pytest.mark.parametrize("lora", [True, False])
def test_the_best_checkpoint_brings_its_importance(lora, tmp_path):
    def run(folder, **options):
        model, method = tiny_model(lora=lora), TaSL()
        for index in range(2):
            train(model, index, [method], tmp_path / folder, **options)
        return weights(model), method.raw_, method.cumulative_, method.coefficients_

    ours = run("best", trainer_class=best_at(4), **BEST)
    stopped = run("stopped", max_steps=4)
    last = run("last")
    assert equal(ours[0], stopped[0]) and not equal(ours[0], last[0])
    assert all(torch.equal(a, b) for a, b in zip(ours[1:], stopped[1:], strict=True))
    assert not torch.equal(ours[1], last[1])
    saved = tmp_path / "best" / "t1" / "checkpoint-4" / "continual"
    assert {p.name for p in saved.iterdir()} == {"tasl.json", "tasl.safetensors"}


STOPPED = {
    "early": {"callbacks": [StopAfter(2)]},
    "at the best checkpoint": {"trainer_class": best_at(2), **BEST},
}


@pytest.mark.parametrize("how", STOPPED)
def test_refuses_to_stop_before_the_share_that_counts(how, tmp_path):
    model, method = tiny_model(lora=True), TaSL(last_fraction=0.25)
    train(model, 0, [method], tmp_path)
    said = r"method 'tasl': the training of task 'task1' stopped before its last last_fraction=0\.25 of steps"
    with pytest.raises(InputError, match=said):
        train(model, 1, [method], tmp_path, **STOPPED[how])
    assert method.tasks_done_ == 1


# -- the replay phase --------------------------------------------------------------------------------------------------

MEMORY = [
    ("tasl", {}, "llama", True, "lora_matrix", "adamw"),
    ("tasl", {"units": "lora_rank1"}, "t5", True, "lora_rank1", "sgd"),
    ("tasl", {}, "roberta", False, "matrix", "adamw"),
    ("kif", {}, "llama", True, "lora_rank1", "adamw"),
    ("kif", {"fusion": "categorical"}, "roberta", True, "lora_rank1", "sgd"),
]
OPTIMIZERS = {
    "adamw": {"optim": "adamw_torch", "weight_decay": 0.1},
    "sgd": {"optim": "sgd", "optim_args": "momentum=0.9", "weight_decay": 0.1},
}


def turn_past(method):
    """As if the past had needed what it did not, so that every case of a unit occurs."""
    method.cumulative_ = method.cumulative_.max() - method.cumulative_


def by_key(method, scores):
    return dict(zip(method.unit_keys_, scores.tolist(), strict=True))


@pytest.mark.parametrize(("name", "options", "kind", "lora", "scheme", "optimizer"), MEMORY)
def test_only_units_of_the_current_task_are_frozen_in_the_replay_phase(
    name, options, kind, lora, scheme, optimizer, tmp_path
):
    model, watched = tiny_model(kind, lora=lora), Movement()
    method = make_method({"name": name, "quantile": 0.5, "replay_count": 6, "replay_epochs": 2, **options})
    train(model, 0, [method], tmp_path, kind, **OPTIMIZERS[optimizer])
    turn_past(method)
    train(model, 1, [method], tmp_path, kind, callbacks=[watched], **OPTIMIZERS[optimizer])
    assert len(watched.trainings) == 2 and len(watched.trainings[1]) == 1 + 4
    cases = four_cases(by_key(method, method.raw_), by_key(method, method.before_), quantile=0.5)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert 0 < sum(c == 1.0 for c in cases.values()) < len(cases)
    for key, parts in units_of(parameters, scheme).items():
        still, moving = still_and_moving(watched.trainings[1], parts)
        assert still if cases[key] == 1.0 else moving, key
    assert equal(trainable_state(model), watched.trainings[1][-1])


def test_the_phase_starts_at_the_merged_weights(tmp_path):
    model, method, watched = tiny_model(lora=True), TaSL(units="lora_rank1", replay_count=4, quantile=0.5), Movement()
    train(model, 0, [method], tmp_path)
    turn_past(method)
    train(model, 1, [method], tmp_path, callbacks=[watched])
    (previous, *_, present), start = watched.trainings[0], watched.trainings[1][0]
    c = four_cases(by_key(method, method.raw_), by_key(method, method.before_), quantile=0.5)
    assert len(set(c.values())) >= 2
    for key, parts in units_of(present, "lora_rank1").items():
        for name, index in parts:
            expected = (1 - c[key]) * previous[name][index].double() + c[key] * present[name][index].double()
            torch.testing.assert_close(start[name][index].double(), expected, rtol=1e-5, atol=1e-7)


def test_phase_is_logged_and_leaves_the_trainer_as_it_was(tmp_path):
    model, method = tiny_model(lora=True), TaSL(replay_count=6, replay_epochs=3, replay_learning_rate=0.004)
    first = train(model, 0, [method], tmp_path)
    assert not [e for e in first.state.log_history if "phase" in e] and len(method.buffer_) == 6
    options = {"max_steps": 5, "learning_rate": 0.02, "save_strategy": "steps", "save_steps": 5}
    trainer = train(model, 1, [method], tmp_path, **options)
    phase = [e for e in trainer.state.log_history if "phase" in e]
    losses = [e for e in phase if "loss" in e]
    assert {e["phase"] for e in phase} == {"tasl/replay"}
    assert len(losses) == 3 * 2 and {e["learning_rate"] for e in losses} == {0.004}  # 3 epochs of 6 rows by 4
    task = [e for e in trainer.state.log_history if "loss" in e and "phase" not in e]
    assert len(task) == 5 and {e["learning_rate"] for e in task} == {0.02}
    assert trainer.args.learning_rate == 0.02 and trainer.args.max_steps == 5 and trainer.args.num_train_epochs == 2
    assert trainer.args.save_strategy == "steps" and trainer.state.global_step == 5
    assert len(trainer.train_dataset) == 16 and trainer.optimizer.param_groups[0]["lr"] == 0.02
    assert [p.name for p in (tmp_path / "t1").glob("checkpoint-*")] == ["checkpoint-5"]
    assert len(method.buffer_) == 12 and trainer._seam is None and trainer._phase is None


class Counting(TrainerCallback):
    """A callback of the user's own: what it is called for, and the last scheduler it has seen."""

    def __init__(self):
        self.calls, self.scheduler = [], None

    def on_train_begin(self, args, state, control, lr_scheduler=None, **kwargs):
        self.calls.append("begin")
        self.scheduler = lr_scheduler

    def on_step_end(self, args, state, control, **kwargs):
        self.calls.append("step")

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.calls.append("log")


def test_the_phase_has_no_warm_up_and_runs_no_callbacks_of_the_user(tmp_path):
    model, method, counting = tiny_model(lora=True), TaSL(replay_count=8, replay_learning_rate=0.004), Counting()
    train(model, 0, [method], tmp_path)
    seen = []

    class Remember(ContinualTrainer):
        def _run_phase(self, ctx, phase):
            seen.extend([self.args, self.lr_scheduler, [*self.callback_handler.callbacks]])
            super()._run_phase(ctx, phase)

    options = {"warmup_steps": 3, "lr_scheduler_type": "constant_with_warmup", "num_train_epochs": 1}
    trainer = train(model, 1, [method], tmp_path, callbacks=[counting], trainer_class=Remember, **options)
    rates = [(e.get("phase"), e["learning_rate"]) for e in trainer.state.log_history if "learning_rate" in e]
    assert [rate for phase, rate in rates if phase] == [0.004] * 2
    assert [rate for phase, rate in rates if not phase] == pytest.approx([0, 0.01 / 3, 0.02 / 3, 0.01])
    assert counting.calls.count("begin") == 1 and counting.calls.count("step") == 4
    assert counting.calls.count("log") == 5  # of four steps and the end
    assert trainer.args is seen[0] and trainer.args.warmup_steps == 3
    assert trainer.lr_scheduler is seen[1] is counting.scheduler
    assert trainer.callback_handler.callbacks == seen[2] and counting in seen[2]


def test_learning_rate_and_epochs_of_the_phase_take_effect(tmp_path):
    def run(**options):
        model, method = tiny_model(lora=True), TaSL(replay_count=6, **options)
        for index in range(2):
            train(model, index, [method], tmp_path)
        return weights(model)

    plain = run()
    assert equal(plain, run(replay_learning_rate=0.01, replay_epochs=1))  # the defaults: the training's rate, one epoch
    assert not equal(plain, run(replay_learning_rate=0.001))
    assert not equal(plain, run(replay_epochs=2))


@pytest.mark.parametrize("stop", [2, 4])
def test_the_phase_draws_the_same_dropout_after_a_resume(stop, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 1}
    model, method = tiny_model(lora=True, dropout=0.3), TaSL(replay_count=6)
    train(model, 0, [method], tmp_path, **saving)
    before, again = trainable_state(model), copy.deepcopy(method)
    train(model, 1, [method], tmp_path, **saving)
    expected = weights(model)
    model.load_state_dict(before, strict=False)
    train(model, 1, [again], tmp_path, resume=str(tmp_path / "t1" / f"checkpoint-{stop}"), **saving)
    assert equal(weights(model), expected)


def test_buffer_holds_rows_of_every_past_task(tmp_path):
    model, method = tiny_model(lora=True), TaSL(replay_ratio=0.25)
    data = [toy_rows(rows=16, seed=i)["input_ids"] for i in range(3)]
    for index in range(3):
        train(model, index, [method], tmp_path, num_train_epochs=1)
    kept = method.buffer_["input_ids"]
    assert [sum(row in rows for row in kept) for rows in data] == [4, 4, 4]


def test_early_stopping_beside_a_phase(tmp_path):
    model, method = tiny_model(lora=True), TaSL(replay_count=4)
    options = {"trainer_class": best_at(2), "metric_for_best_model": "eval_loss", "greater_is_better": False, **BEST}
    for index in range(2):
        train(model, index, [method], tmp_path, callbacks=[EarlyStoppingCallback(2)], **options)


def test_phase_after_the_best_checkpoint(tmp_path):
    model, method, watched = tiny_model(lora=True), TaSL(replay_count=4), Movement()
    options = {"trainer_class": best_at(2), "metric_for_best_model": "eval_loss", "greater_is_better": False, **BEST}
    for index in range(2):
        trainer = train(model, index, [method], tmp_path, callbacks=[watched], **options)
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2") and trainer.args.load_best_model_at_end
    assert len(watched.trainings) == 3 and trainer.state.global_step == 8
    assert equal(trainable_state(model), watched.trainings[-1][-1])  # nothing is loaded after the phase


# -- state -------------------------------------------------------------------------------------------------------------


def test_state_files(tmp_path):
    model, method = tiny_model(lora=True), TaSL(units="lora_rank1", quantile=0.7, keep_unmerged=True)
    for index in range(2):
        train(model, index, [method], tmp_path)
    method.save(tmp_path / "state")
    record = json.loads((tmp_path / "state" / "tasl.json").read_text())
    tensors = load_file(str(tmp_path / "state" / "tasl.safetensors"))
    assert record["options"] == method.options() and record["options"]["quantile"] == 0.7
    assert record["state"]["unit_keys_"]["value"] == method.unit_keys_ and len(method.unit_keys_) == 16
    assert record["state"]["scheme_"]["value"] == "lora_rank1" and record["state"]["tasks_done_"]["value"] == 2
    for name in ("raw_", "before_", "cumulative_", "coefficients_"):
        assert tensors[name].dtype == torch.float64 and torch.equal(tensors[name], getattr(method, name))
    assert not any(name.startswith("tracking_") for name in tensors)  # the task is over
    again = TaSL(units="lora_rank1")
    again.load(tmp_path / "state")
    assert torch.equal(again.cumulative_, method.cumulative_) and again.unit_keys_ == method.unit_keys_
    assert equal(again.unmerged_, method.unmerged_) and set(again.unmerged_) == set(trainable_state(model))


def test_unmerged_weights_are_those_before_the_merge(tmp_path):
    model, method, watched = tiny_model(lora=True), TaSL(keep_unmerged=True), Movement()
    for index in range(2):
        train(model, index, [method], tmp_path, callbacks=[watched])
        assert equal(method.unmerged_, watched.trainings[index][-1])
    assert not equal(method.unmerged_, trainable_state(model))


# -- what cannot be ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", ["kif", "weight_ensemble", "weight_ema", "fisher_merge"])
def test_refuses_a_second_method_that_merges(other):
    with pytest.raises(
        InputError, match=f"methods 'tasl' and '{other}' cannot be combined: both have the role 'merge'"
    ):
        MethodList(["tasl", other])


@pytest.mark.parametrize("units", ["matrix", "auto"])
def test_refuses_one_unit_only(units, tmp_path):
    model = tiny_model().requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    with pytest.raises(InputError, match=r"one skill unit only \('lm_head.weight'\)"):
        train(model, 0, [TaSL(units=units)], tmp_path)


def test_refuses_other_units_in_the_next_task(tmp_path):
    method = TaSL(units="lora_rank1")
    train(tiny_model(lora=True, rank=4), 0, [method], tmp_path)
    before = method.cumulative_.clone()
    with pytest.raises(InputError, match=r"the task before 'task1'.*q_proj\[3\]' is there and not here"):
        train(tiny_model(lora=True, rank=3), 1, [method], tmp_path)
    assert torch.equal(method.cumulative_, before)


def test_refuses_another_rank_of_whole_matrices_in_the_next_task(tmp_path):
    method = TaSL()
    train(tiny_model(lora=True, rank=4), 0, [method], tmp_path)
    said = (
        r"the task before 'task1'.*'.*layers\.0\.self_attn\.q_proj\.lora_A\.weight' has 128 weights there and 96 here"
    )
    with pytest.raises(InputError, match=said):
        train(tiny_model(lora=True, rank=3), 1, [method], tmp_path)


def test_refuses_a_changed_scheme_in_the_next_task(tmp_path):
    method = TaSL()
    train(tiny_model(lora=True), 0, [method], tmp_path)
    with pytest.raises(InputError, match="other skill units than this model"):
        train(tiny_model(), 1, [method], tmp_path)


@pytest.mark.parametrize(("steps", "warmup"), [(1, 1), (4, 4), (3, 9)])
def test_refuses_a_task_without_counted_steps(steps, warmup, tmp_path):
    with pytest.raises(InputError, match=rf"task 'task0' has {steps} optimizer step\(s\) and the first {warmup}"):
        train(tiny_model(lora=True), 0, [TaSL(warmup_steps=warmup)], tmp_path, max_steps=steps)


def test_refuses_scores_that_are_all_equal(tmp_path):
    with pytest.raises(InputError, match=r"method 'tasl', task 'task0': the importance scores of all 4 .* are equal"):
        model = tiny_model().requires_grad_(False)
        for layer in model.model.layers:  # these never get a gradient
            for name in ("q_proj", "k_proj"):
                getattr(layer.self_attn, name).weight.requires_grad_(True)
                torch.nn.init.zeros_(getattr(layer.self_attn, name).weight)
        train(model, 0, [TaSL()], tmp_path, learning_rate=0.0)


@pytest.mark.parametrize(
    ("option", "value"),
    [("units", "rows"), ("order", "third"), ("beta1", 1.0), ("beta2", -0.1), ("beta", 1.5), ("quantile", float("nan")),
     ("timing", "late"), ("warmup_steps", -1), ("warmup_steps", 1.5), ("every_n_steps", 0), ("last_fraction", 0.0),
     ("last_fraction", 1.5), ("average", "all"), ("pair_reduce", "max"), ("min_ndim", -1), ("normalisation", "z"),
     ("space", "deltas"), ("replay_epochs", 0),
     ("replay_learning_rate", 0.0), ("replay_learning_rate", "high"), ("shared", 2.0), ("replay_seed", 1.5),
     ("replay_seed", True), ("replay_seed", "now"), ("keep_unmerged", "yes"), ("keep_unmerged", 1)],
)  # fmt: skip
def test_refuses_options_that_cannot_be(option, value):
    with pytest.raises(InputError, match=rf"method 'tasl'.*{option}"):
        TaSL(**{option: value})


@pytest.mark.parametrize(("option", "value"), [("replay_ratio", 2.0), ("replay_count", -1)])
def test_refuses_sizes_of_the_buffer_that_cannot_be(option, value):
    with pytest.raises(InputError, match=rf"method 'tasl'.*{option}"):
        TaSL(**{option: value})


@pytest.mark.parametrize("units", ["auto", "lora_matrix", "matrix"])
def test_products_need_pairs(units, tmp_path):
    with pytest.raises(InputError, match="space='products' needs units='lora_rank1'"):
        train(tiny_model(lora=True), 0, [TaSL(space="products", units=units)], tmp_path)


@pytest.mark.parametrize("sizes", [{"replay_count": 4}, {"replay_ratio": 0.1}], ids=str)
def test_refuses_products_beside_a_replay_phase(sizes):
    with pytest.raises(InputError, match=r"method 'tasl': space='products' cannot be combined with a replay phase"):
        TaSL(space="products", units="lora_rank1", **sizes)


def test_soft_coefficients_of_the_naive_one_are_those_of_the_worked_example():
    now, before = dict(enumerate([4, 1, 0, 3, 2])), dict(enumerate([0, 10, 2, 9, 1]))
    assert [round(c, 5) for c in soft(now, before).values()] == [0.98201, 0.04743, 0.31003, 0.35434, 0.83202]
    assert [round(c, 5) for c in four_cases(now, before).values()] == [1, 0, 0.5, 0.5, 0.5]
