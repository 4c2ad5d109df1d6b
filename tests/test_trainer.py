"""The drop-in trainer: without methods it is the Trainer; with methods, everything a Trainer does keeps working."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import re
from contextlib import contextmanager
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    GenerationConfig,
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

import hf_continual
from hf_continual import (
    ContinualMethod,
    ContinualMixin,
    ContinualSeq2SeqTrainer,
    ContinualSeq2SeqTrainingArguments,
    ContinualTrainer,
    ContinualTrainingArguments,
    InputError,
    Task,
)
from hf_continual.collators import make_collator
from hf_continual.distributed import Distributed, GradientSeam, GradView
from hf_continual.evaluation import EvaluationConfig, evaluate_task
from hf_continual.lora import LoraView, trainable_state
from hf_continual.methods.base import MethodList
from hf_continual.methods.inclora import IncLoRA
from hf_continual.methods.migu import MIGU
from hf_continual.methods.olora import OLoRA
from hf_continual.methods.replay import Replay
from hf_continual.testing import close, equal, hook_count, tiny_model, toy_rows, toy_tokenizer, weights
from hf_continual.tokenization import encode_prompt, tokenize_dataset

TRAINERS = {"llama": (Trainer, ContinualTrainer), "t5": (Seq2SeqTrainer, ContinualSeq2SeqTrainer)}


def arguments(folder, kind="llama", **options):
    cls = ContinualSeq2SeqTrainingArguments if kind == "t5" else ContinualTrainingArguments
    settings = {
        "per_device_train_batch_size": 4, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "logging_steps": 1,
        "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True, "num_train_epochs": 1,
        "dataloader_pin_memory": False, **options,
    }  # fmt: skip
    return cls(output_dir=str(folder), **settings)


def make(folder, model=None, cls=ContinualTrainer, rows=None, kind="llama", given=None, **options):
    """A trainer; `given` are constructor arguments, `options` training arguments."""
    return cls(
        model=tiny_model(kind) if model is None else model,
        args=arguments(folder, kind, **options),
        train_dataset=toy_rows(kind) if rows is None else rows,
        **(given or {}),
    )


def fit(*args, resume=None, **kwargs):
    trainer = make(*args, **kwargs)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses(trainer):
    return [(e["loss"], e["grad_norm"]) for e in trainer.state.log_history if "loss" in e]


def neutral():
    """MIGU with its taps in place and a mask of ones."""
    return MIGU(threshold=0.0, skip_first_task=False)


def with_dropout(**kwargs):
    model = tiny_model("llama", dropout=0.1)
    set_seed(1)
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.2, target_modules=["q_proj", "v_proj"], **kwargs)
    return get_peft_model(model, config)


def needing_input_gradients():
    model = with_dropout()
    model.enable_input_require_grads()
    return model


class StopAfter(TrainerCallback):
    """A process killed after that step, as far as one process can be."""

    def __init__(self, step):
        self.step, self.trainer = step, None

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_training_stop = self.trainer.interrupted = True


# -- without methods --------------------------------------------------------------------------------------------------

CASES = {
    "lora_dropout": (with_dropout, {"num_train_epochs": 2}),
    "full": (lambda: tiny_model("llama", dropout=0.1), {}),
    "accumulation": (with_dropout, {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2}),
    "bf16": (with_dropout, {"bf16": True}),
    "checkpointing": (
        with_dropout,
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    ),
    "reentrant": (
        needing_input_gradients,
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    ),
    "t5": (lambda: tiny_model("t5", dropout=0.1), {"gradient_accumulation_steps": 2}),
}


@pytest.mark.parametrize("case", CASES)
def test_without_methods_it_is_the_trainer_and_neutral_methods_change_nothing(case, tmp_path):
    build, options = CASES[case]
    kind = "t5" if case == "t5" else "llama"
    theirs, ours = TRAINERS[kind]
    expected = fit(tmp_path / "a", build(), theirs, kind=kind, **options)
    assert not equal(weights(build()), weights(expected.model))
    for given in ({}, {"methods": []}, {"methods": [neutral()]}):
        trainer = fit(tmp_path / "b", build(), ours, kind=kind, given=given, **options)
        assert equal(weights(expected.model), weights(trainer.model)), given
        assert losses(expected) == losses(trainer)


@pytest.mark.parametrize("kind", TRAINERS)
def test_every_constructor_argument_of_the_parent_is_accepted(kind, tmp_path):
    theirs, ours = TRAINERS[kind]
    parameters = inspect.signature(theirs.__init__).parameters
    values = {name: p.default for name, p in parameters.items() if name != "self"}
    assert not {"methods", "task"} & set(values)
    assert inspect.Parameter.VAR_KEYWORD in {p.kind for p in inspect.signature(ours.__init__).parameters.values()}
    values |= {"model": tiny_model(kind), "args": arguments(tmp_path, kind), "train_dataset": toy_rows(kind)}
    values["callbacks"], values["compute_metrics"] = [TrainerCallback()], lambda p: {}
    trainer = ours(**values, methods=["migu"])
    assert trainer.compute_metrics is values["compute_metrics"] and trainer.methods[0].name == "migu"
    positional = ours(*values.values())
    assert positional.compute_metrics is values["compute_metrics"]


@pytest.mark.parametrize("hook", ["train", "compute_loss", "training_step", "prediction_step", "log"])
def test_overridden_methods_take_the_parents_arguments_in_its_order(hook):
    theirs = list(inspect.signature(getattr(Trainer, hook)).parameters)
    ours = inspect.signature(getattr(ContinualMixin, hook)).parameters
    named = [n for n, p in ours.items() if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    assert named == theirs[: len(named)]
    assert len(named) == len(theirs) or any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in ours.values())


@pytest.mark.parametrize(
    ("ours", "parent"),
    [
        (ContinualTrainingArguments, TrainingArguments),
        (ContinualSeq2SeqTrainingArguments, Seq2SeqTrainingArguments),
    ],
)
def test_arguments_have_every_field_of_the_parent(ours, parent, tmp_path):
    theirs = {f.name: f for f in dataclasses.fields(parent)}
    assert theirs.keys() < {f.name for f in dataclasses.fields(ours)}
    given = parent(output_dir=str(tmp_path), learning_rate=0.5, use_cpu=True)
    args = ours(**{name: getattr(given, name) for name, f in theirs.items() if f.init})
    assert args.learning_rate == 0.5 and args.methods is None and not args.stop_on_nonfinite_loss
    assert {n for n in theirs if getattr(args, n) != getattr(given, n)} <= {"_n_gpu"}


def test_methods_on_the_command_line(tmp_path):
    parser = HfArgumentParser(ContinualTrainingArguments)
    words = ["--output_dir", str(tmp_path), "--use_cpu", "--methods", '{"name": "migu", "threshold": 0.5}', "replay"]
    (args,) = parser.parse_args_into_dataclasses(words)
    assert args.methods == [{"name": "migu", "threshold": 0.5}, "replay"]
    assert '"threshold": 0.5' in args.to_json_string()
    methods = make(tmp_path, methods=args.methods).methods
    assert [m.name for m in methods] == ["migu", "replay"] and methods[0].config.threshold == 0.5
    (plain,) = parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--use_cpu", "--methods", "migu"])
    assert plain.methods == ["migu"]
    assert arguments(tmp_path, methods="migu").methods == ["migu"]
    assert parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--use_cpu"])[0].methods is None
    with pytest.raises(InputError, match="is not JSON"):
        arguments(tmp_path, methods=['{"name": '])
    with pytest.raises(InputError, match="give method objects to the trainer"):
        arguments(tmp_path, methods=[MIGU()])


# -- the user's own code ----------------------------------------------------------------------------------------------


class Overrides:
    """What users override, each calling super()."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return (2 * result[0], result[1]) if return_outputs else 2 * result

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.steps = getattr(self, "steps", 0) + 1
        return super().training_step(model, inputs, num_items_in_batch)

    def log(self, logs, start_time=None):
        logs["seen"] = self.steps
        super().log(logs, start_time)


def test_a_user_subclass_that_calls_super(tmp_path):
    theirs = type("Theirs", (Overrides, Trainer), {})
    ours = type("Ours", (Overrides, ContinualTrainer), {})
    mixed = type("Mixed", (ContinualMixin, theirs), {})
    expected = fit(tmp_path, cls=theirs)
    for cls in (ours, mixed):
        trainer = fit(tmp_path, cls=cls, given={"methods": [neutral()]})
        assert equal(weights(expected.model), weights(trainer.model))
        assert [e["seen"] for e in trainer.state.log_history] == [1, 2, 3, 4, 4]
    migu = fit(tmp_path, cls=ours, given={"methods": [MIGU(threshold=0.5, skip_first_task=False)]})
    assert not equal(weights(expected.model), weights(migu.model))


class OwnLoss(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        outputs = model(**inputs)
        loss = outputs.logits.float().pow(2).mean()
        return (loss, outputs) if return_outputs else loss


def test_a_user_loss_without_super_is_refused_and_the_remedy_works(tmp_path):
    class Mine(ContinualTrainer):
        compute_loss = OwnLoss.compute_loss

    class Remedy(ContinualMixin, OwnLoss):
        pass

    with pytest.raises(InputError, match=r"Mine\.compute_loss .*class Mine\(ContinualMixin, Theirs\)"):
        fit(tmp_path, cls=Mine, given={"methods": [neutral()]})
    fit(tmp_path, cls=Mine, max_steps=1)  # without methods it is nobody's business
    expected = fit(tmp_path, cls=OwnLoss)
    assert equal(weights(expected.model), weights(fit(tmp_path, cls=Remedy, given={"methods": [neutral()]}).model))
    penalised = fit(tmp_path, cls=Remedy, given={"methods": [Pull()]})
    assert not equal(weights(expected.model), weights(penalised.model))


def test_a_user_step_without_super_is_refused(tmp_path):
    class Mine(ContinualTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = self.compute_loss(model, inputs)
            loss.backward()
            return loss.detach()

    with pytest.raises(InputError, match=r"Mine\.training_step .*class Mine\(ContinualMixin, Theirs\)"):
        fit(tmp_path, cls=Mine, given={"methods": [neutral()]})


def test_user_callbacks_and_compute_metrics(tmp_path):
    seen = []

    class Mine(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            seen.append("begin")

        def on_optimizer_step(self, args, state, control, **kwargs):
            seen.append(kwargs["optimizer"] is not None)

    def accuracy(prediction):
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    given = {"methods": [neutral()], "callbacks": [Mine()], "compute_metrics": accuracy, "eval_dataset": toy_rows()}
    trainer = fit(tmp_path, given=given)
    assert seen == ["begin", True, True, True, True]
    expected = Trainer(trainer.model, trainer.args, eval_dataset=toy_rows(), compute_metrics=accuracy).evaluate()
    found = trainer.evaluate()
    assert found["eval_accuracy"] == expected["eval_accuracy"] and found["eval_loss"] == expected["eval_loss"]


def test_a_custom_optimizer(tmp_path):
    def sgd(model):
        return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)

    expected, ours = tiny_model(lora=True), tiny_model(lora=True)
    fit(tmp_path, expected, Trainer, given={"optimizers": (sgd(expected), None)})
    methods = [IncLoRA(), neutral()]
    fit(tmp_path, ours, given={"optimizers": (sgd(ours), None), "methods": methods})
    assert equal(weights(expected), weights(ours))
    with pytest.raises(InputError, match="lora_A.task1.weight' began to learn .* optimizer_cls_and_kwargs"):
        given = {"optimizers": (sgd(ours), None), "methods": copy.deepcopy(methods)}
        fit(tmp_path, copy.deepcopy(ours), given=given)

    def tasks(cls, more):
        model = tiny_model(lora=True)
        given = {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.5}), **more}
        return weights(fit(tmp_path, model, cls, given=given).model)

    first = tasks(ContinualTrainer, {"methods": [neutral()]})
    assert equal(first, tasks(Trainer, {})) and equal(first, weights(expected))
    before = weights(ours)
    given = {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.5}), "methods": methods}
    after = weights(fit(tmp_path, ours, given=given).model)
    moved = {n.split(".")[-2] for n in after if n in before and not torch.equal(after[n], before[n])}
    assert not moved and any(".task1." in n and after[n].any() for n in after if "lora_B" in n)


# -- checkpoints ------------------------------------------------------------------------------------------------------

LISTS = {
    "migu_replay": lambda: [MIGU(threshold=0.5, skip_first_task=False), Replay(count=4)],
    "inclora_migu": lambda: [IncLoRA(), MIGU(threshold=0.5)],
    "olora": lambda: [OLoRA(lambda_1=0.5, lambda_2=0.1)],
}


def same_state(one, other):
    """Whether everything two methods have learnt is equal."""
    for name, value in vars(one).items():
        found = vars(other)[name]
        if not name.endswith("_"):
            continue
        if torch.is_tensor(value):
            same = torch.equal(value, found)
        elif isinstance(value, dict) and any(torch.is_tensor(v) for v in value.values()):
            same = equal(value, found)
        else:
            same = (value[:] == found[:]) if hasattr(value, "column_names") else value == found
        if not same:
            return False
    return True


@pytest.mark.parametrize("how", ["path", "true"])
@pytest.mark.parametrize("methods", LISTS)
def test_resume_equals_the_uninterrupted_run(methods, how, tmp_path):
    """In the first and the second task, with a new model and new method objects."""
    build = LISTS[methods]
    options = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 2}
    whole, objects = with_dropout(), build()
    for index in range(2):
        rows, start, folder = toy_rows(seed=index), copy.deepcopy(whole), tmp_path / f"cut{index}"
        before = [vars(m).copy() for m in objects]
        fit(tmp_path / f"whole{index}", whole, rows=rows, given={"methods": objects}, **options)

        stop = StopAfter(4)
        cut = build()
        for method, state in zip(cut, before, strict=True):
            vars(method).update(copy.deepcopy(state))
        given = {"methods": cut, "callbacks": [stop]}
        stop.trainer = make(folder, copy.deepcopy(start), rows=rows, given=given, **options)
        stop.trainer.train()
        assert cut[0].tasks_done_ == index

        fresh = build()
        resume = str(folder / "checkpoint-4") if how == "path" else True
        resumed = fit(folder, start, rows=rows, given={"methods": fresh}, resume=resume, **options)
        assert equal(weights(whole), weights(resumed.model))
        assert trainable_state(whole).keys() == trainable_state(resumed.model).keys()
        assert fresh[0].tasks_done_ == index + 1 and resumed.state.global_step > 4
        assert all(same_state(a, b) for a, b in zip(objects, fresh, strict=True))


def test_resume_refuses_what_does_not_fit(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2}
    methods, model = [IncLoRA()], with_dropout()
    fit(tmp_path / "0", model, given={"methods": methods}, **options)
    fit(tmp_path / "1", model, given={"methods": methods}, **options)
    third = copy.deepcopy(methods)
    fit(tmp_path / "2", model, given={"methods": third}, **options)
    checkpoint = str(tmp_path / "2" / "checkpoint-2")
    with pytest.raises(InputError, match=r"holds the adapters .*'task1', 'task2'\] and the model has"):
        fit(tmp_path / "2", with_dropout(), given={"methods": [IncLoRA()]}, resume=checkpoint, **options)
    fit(tmp_path / "plain", **options)
    with pytest.raises(InputError, match=r"saved without the methods \['migu'\]"):
        fit(tmp_path / "plain", given={"methods": [MIGU()]}, resume=True, **options)
    with pytest.raises(ValueError, match="No valid checkpoint"):
        fit(tmp_path / "empty", given={"methods": [MIGU()]}, resume=True, **options)


def test_resume_passes_over_a_checkpoint_that_was_not_written_to_its_end(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1}
    expected = fit(tmp_path, given={"methods": [neutral()]}, **options)
    (tmp_path / "checkpoint-4" / "trainer_state.json").unlink()
    trainer = fit(tmp_path, given={"methods": [neutral()]}, resume=True, **options)
    assert equal(weights(expected.model), weights(trainer.model))


@pytest.mark.parametrize("adapters", [0, 1, 2])
def test_load_best_model_at_end(adapters, tmp_path):
    model = with_dropout() if adapters else tiny_model()
    methods = [IncLoRA()] if adapters == 2 else [neutral()]
    if adapters == 2:
        fit(tmp_path / "first", model, given={"methods": methods})
    best, calls = {}, []

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                best.update(weights(model))

    def score(prediction):
        calls.append(1)
        return {"score": float(len(calls) == 2)}

    given = {"methods": methods, "callbacks": [Keep()], "compute_metrics": score, "eval_dataset": toy_rows(rows=4)}
    every_step = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    best_of = {"load_best_model_at_end": True, "metric_for_best_model": "score", "greater_is_better": True}
    trainer = fit(tmp_path, model, given=given, **every_step, **best_of)
    assert trainer.state.best_global_step == 2 and trainer.state.global_step == 4
    assert equal(best, weights(trainer.model))
    if adapters == 2:
        view = LoraView(trainer.model)
        assert view.active == ["default", "task1"]
        assert all(".task1." in name for name in trainable_state(trainer.model))
        assert len(trainable_state(trainer.model)) == 8


# -- data and evaluation ----------------------------------------------------------------------------------------------


def test_evaluation_sets_as_a_dict(tmp_path):
    given = {"methods": [neutral(), Pull()], "eval_dataset": {"one": toy_rows(rows=4), "two": toy_rows(rows=4, seed=1)}}
    trainer = fit(tmp_path, given=given, eval_strategy="epoch")
    logged = {key: value for entry in trainer.state.log_history for key, value in entry.items()}
    plain = Trainer(trainer.model, trainer.args, eval_dataset=toy_rows(rows=4))
    for name, rows in given["eval_dataset"].items():  # while training too, the evaluation loss is the task's alone
        assert logged[f"eval_{name}_loss"] == plain.evaluate(rows)["eval_loss"]


class Weighted(ContinualMethod):
    """Reads a column of its own."""

    batch_columns = ("weight",)

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._seen = []

    def extra_loss(self, ctx, batch, outputs):
        self._seen.append(batch["weight"].tolist())
        assert "labels" in batch and outputs.logits.requires_grad
        return {"weighted": (outputs.logits.float().pow(2).mean((1, 2)) * batch["weight"]).mean()}


@pytest.mark.parametrize("kind", TRAINERS)
def test_batch_columns_reach_the_extra_loss_and_not_the_model(kind, tmp_path):
    rows = toy_rows(kind, rows=8)
    rows = rows.add_column("weight", [float(i) for i in range(8)]).add_column("unused", list(range(8)))
    method = Weighted()
    options = {"train_sampling_strategy": "sequential", "per_device_eval_batch_size": 4}
    if kind == "t5":
        options |= {"predict_with_generate": True, "generation_max_length": 4}
    given = {"methods": [method], "eval_dataset": rows}
    trainer = fit(tmp_path, rows=rows, kind=kind, cls=TRAINERS[kind][1], given=given, **options)
    assert method._seen == [[0.0, 1.0, 2.0, 3.0], [4.0, 5.0, 6.0, 7.0]]
    plain = TRAINERS[kind][0](trainer.model, trainer.args)
    assert trainer.evaluate()["eval_loss"] == plain.evaluate(rows)["eval_loss"]
    # Here the parent calls the model or its generate() itself.
    predicted = trainer.predict(rows if kind == "t5" else rows.remove_columns("labels"))
    assert predicted.predictions.shape[0] == 8


@pytest.mark.parametrize("path", ["label_smoothing", "compute_loss_func"])
def test_other_task_losses(path, tmp_path):
    options = {"label_smoothing_factor": 0.1} if path == "label_smoothing" else {}
    given = {"compute_loss_func": summed_loss} if path == "compute_loss_func" else {}
    options["gradient_accumulation_steps"] = 2
    expected = fit(tmp_path, cls=Trainer, given=given, **options)
    trainer = fit(tmp_path, given={"methods": [neutral(), Watch()], **given}, **options)
    assert equal(weights(expected.model), weights(trainer.model))
    assert not equal(weights(fit(tmp_path, gradient_accumulation_steps=2).model), weights(trainer.model))


def summed_loss(outputs, labels, num_items_in_batch=None):
    logits = outputs.logits[:, :-1].flatten(0, 1).float()
    return 1.5 * nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch


class Watch(ContinualMethod):
    """Reads the batch, adds nothing."""

    def extra_loss(self, ctx, batch, outputs):
        assert "labels" in batch and outputs.logits.shape[:2] == batch["labels"].shape
        return {}


def test_a_partial_accumulation_window_is_one_step(tmp_path):
    rows, options = toy_rows(rows=20), {"gradient_accumulation_steps": 2}
    expected = fit(tmp_path, cls=Trainer, rows=rows, **options)
    counter = Order("a", [])
    trainer = fit(tmp_path, rows=rows, given={"methods": [neutral(), counter]}, **options)
    assert trainer.state.global_step == 3 and equal(weights(expected.model), weights(trainer.model))
    assert [counter.config.events.count(e) for e in ("open", "edit a", "step_end a")] == [5, 3, 3]


def test_without_clipping_gradients_are_masked_all_the_same(tmp_path):
    method = MIGU(threshold=0.5, skip_first_task=False)
    model = tiny_model(lora=True)
    before = weights(model)
    given = {"methods": [method]}
    trainer = fit(tmp_path, model, given=given, max_grad_norm=0.0, max_steps=1, optim="sgd", learning_rate=0.1)
    moved = {n: (p != before[n]).any(1).float().mean() for n, p in weights(trainer.model).items() if "lora_B" in n}
    assert moved and all(0 < share <= 0.5 for share in moved.values())
    expected = fit(tmp_path, cls=Trainer, max_grad_norm=0.0)
    ours = fit(tmp_path, given={"methods": [neutral()]}, max_grad_norm=0.0)
    assert equal(weights(expected.model), weights(ours.model))


def test_taps_fire_under_torch_compile(tmp_path):
    """The first task has none: the code that was compiled for it does not know those of the second."""
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=96, num_key_value_heads=2, pad_token_id=0, **small)
    options = {"optim": "sgd", "learning_rate": 0.5, "max_steps": 1}
    moved, ended = [], []
    for compiled in (False, True):
        options |= {"torch_compile": True, "torch_compile_backend": "aot_eager"} if compiled else {}
        set_seed(0)
        model = LlamaForCausalLM(config)
        trainer = make(tmp_path, model, given={"methods": [MIGU(threshold=0.5)]}, **options)
        trainer.train()
        before = weights(model)
        trainer.train()
        ended.append(weights(model))
        moved.append({n: (ended[-1][n] != before[n]).flatten(1).any(1) for n in before if "proj" in n})
    assert equal(*moved) and all(0 < rows.float().mean() <= 0.5 for rows in moved[0].values())
    assert close(*ended, 1e-4)


# -- extra losses -----------------------------------------------------------------------------------------------------


class Pull(ContinualMethod):
    """0.5 ||p||^2, whose gradient is p."""

    def extra_loss(self, ctx, batch, outputs):
        return {"pull": 0.5 * sum(p.pow(2).sum() for p in ctx.model.parameters() if p.requires_grad)}


@pytest.mark.parametrize("path", ["num_items", "label_smoothing", "compute_loss_func", "t5", "t5_lora"])
def test_extra_losses_are_scaled_like_the_task_loss(path, tmp_path):
    """One SGD step with a penalty differs from one without by exactly lr * p, however it is accumulated."""
    kind, lora = ("t5" if path.startswith("t5") else "llama"), path == "t5_lora"
    given = {"compute_loss_func": summed_loss} if path == "compute_loss_func" else {}
    options = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "max_steps": 1}
    options |= {"label_smoothing_factor": 0.1} if path == "label_smoothing" else {}
    rows, start = toy_rows(kind, rows=8), trainable_state(tiny_model(kind, lora=lora))
    for micro, steps in ((8, 1), (2, 4)):
        sizes = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": steps}
        ended = []
        for methods in (None, [Pull()]):
            model, constructor = tiny_model(kind, lora=lora), {"methods": methods, **given}
            fit(tmp_path, model, TRAINERS[kind][1], rows=rows, kind=kind, given=constructor, **sizes, **options)
            ended.append(trainable_state(model))
        pulled = {name: ended[0][name] - ended[1][name] for name in start}
        assert close({n: 0.1 * p for n, p in start.items()}, pulled, 1e-4), (micro, steps)


def test_extra_losses_are_logged_by_name(tmp_path):
    class Counts(ContinualMethod):
        def on_task_begin(self, ctx):
            self._n = 0

        def extra_loss(self, ctx, batch, outputs):
            self._n += 1
            return {"counts/n": outputs.logits.sum() * 0 + self._n}

        def on_step_end(self, ctx):
            ctx.log("counts/step", torch.tensor(float(ctx.state.global_step)))

    trainer = fit(tmp_path, given={"methods": [Counts()]}, gradient_accumulation_steps=2, logging_steps=1)
    logged = [e for e in trainer.state.log_history if "loss" in e]
    assert [e["counts/n"] for e in logged] == [1.5, 3.5]
    assert [e["counts/step"] for e in logged] == [0.0, 1.0]  # the trainer counts the step just after
    assert all("counts/n" not in e for e in trainer.state.log_history if "loss" not in e)


# -- order ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class OrderConfig:
    events: list = dataclasses.field(default_factory=list)


class Order(ContinualMethod):
    """Writes down which hook ran."""

    config_class = OrderConfig

    def __init__(self, name, events):
        super().__init__(OrderConfig(events))
        self.name = name

    def _add(self, event):
        self.config.events.append(event)

    def save(self, folder):
        pass

    @contextmanager
    def forward_context(self, ctx, batch):
        self._add("open")
        yield
        self._add("close")

    def extra_loss(self, ctx, batch, outputs):
        self._add("extra")
        assert ctx.model.training
        return {}

    def on_gradients(self, ctx, grads):
        self._add(f"on_gradients {self.name}")

    def edit_gradients(self, ctx, grads):
        self._add(f"edit {self.name}")

    def on_step_end(self, ctx):
        self._add(f"step_end {self.name}")


def test_the_order_of_one_step(tmp_path):
    events = []

    class Clips(ContinualTrainer):
        def _clip_grad_norm(self, model):
            events.append("clip")
            return super()._clip_grad_norm(model)

    class Steps(torch.optim.SGD):
        def step(self, closure=None):
            events.append("step")
            return super().step(closure)

    given = {"methods": [Order("a", events), Order("b", events)], "optimizer_cls_and_kwargs": (Steps, {"lr": 0.1})}
    fit(tmp_path, cls=Clips, given=given, gradient_accumulation_steps=2)
    micro = ["open", "open", "close", "close", "extra", "extra"]
    seam = ["on_gradients a", "on_gradients b", "edit a", "edit b", "clip", "step", "step_end a", "step_end b"]
    assert events == (2 * micro + seam) * 2


def test_clipping_and_the_logged_norm_see_edited_gradients(tmp_path):
    class Scale(ContinualMethod):
        def edit_gradients(self, ctx, grads):
            names = list(grads.names())
            grads.mul_({name: torch.zeros(1) for name in names[1:]})
            grads.set_(names[0], torch.full_like(grads.parameter(names[0]), 0.5))
            self._expected = 0.5 * grads.parameter(names[0]).numel() ** 0.5
            self._name = names[0]

    method, model = Scale(), tiny_model()
    before = weights(model)
    trainer = fit(
        tmp_path, model, given={"methods": [method]}, optim="sgd", learning_rate=1.0, max_grad_norm=1.0, max_steps=1
    )
    assert losses(trainer)[0][1] == pytest.approx(method._expected, rel=1e-5)
    moved = {n: before[n] - p for n, p in weights(model).items()}
    assert all(not step.any() for n, step in moved.items() if n != method._name)
    assert float(moved[method._name].norm()) == pytest.approx(1.0, rel=1e-3)  # clipped to max_grad_norm


def test_the_order_of_one_task(tmp_path):
    events = []

    class Toy(ContinualMethod):
        def on_task_begin(self, ctx):
            events.append(("begin", ctx.task.name, ctx.task.index, ctx.task.is_first))

        def train_dataset(self, ctx, dataset):
            events.append("dataset")
            return dataset.select(range(8))

        @contextmanager
        def task_context(self, ctx):
            events.append("open")
            yield
            events.append("close")

        def on_step_end(self, ctx):
            events.append(ctx.state.global_step)

        def merge(self, ctx, previous, current):
            events.append("merge")
            return current

        def on_task_end(self, ctx):
            events.append("end")

    trainer = make(tmp_path, given={"methods": [Toy()], "task": "mine"})
    trainer.train()
    whole = [("begin", "mine", 0, True), "dataset", "open", 0, 1, "close", "merge", "end"]
    assert events == whole and len(trainer.train_dataset) == 16
    events.clear()
    trainer.train()
    assert events == [("begin", "task1", 1, False), *whole[1:]]
    events.clear()
    given = {"methods": trainer.methods, "task": Task("late", index=7)}
    fit(tmp_path, given=given)
    fit(tmp_path, given={"methods": trainer.methods, "task": Task("next")})  # index 0: never set
    assert [e[1:3] for e in events if isinstance(e, tuple)] == [("late", 7), ("next", 8)]


class Average(ContinualMethod):
    """A merger that keeps what it was given."""

    def merge(self, ctx, previous, current):
        assert not hasattr(self, "_given"), "merged twice"
        self._given = {n: (p.clone(), current[n].clone()) for n, p in previous.items()}
        return {name: (previous[name] + current[name]) / 2 for name in previous}


def test_merge_gets_both_weights_by_name_and_its_result_is_written(tmp_path):
    method, model = Average(), tiny_model(lora=True)
    before = trainable_state(model)
    plain = trainable_state(fit(tmp_path, tiny_model(lora=True), cls=Trainer).model)
    fit(tmp_path, model, given={"methods": [method]})
    assert equal({n: p for n, (p, _) in method._given.items()}, before)
    assert equal({n: c for n, (_, c) in method._given.items()}, plain)
    assert equal(trainable_state(model), {n: (before[n] + plain[n]) / 2 for n in before})


def test_an_interrupted_task_is_neither_merged_nor_ended(tmp_path):
    stop, method = StopAfter(2), Average()
    stop.trainer = make(tmp_path, tiny_model(lora=True), given={"methods": [method], "callbacks": [stop]})
    stop.trainer.train()
    assert stop.trainer.interrupted and not hasattr(method, "_given") and method.tasks_done_ == 0
    stop.step = -1
    stop.trainer.train()
    assert hasattr(method, "_given") and method.tasks_done_ == 1 and not stop.trainer.interrupted


def test_an_exception_leaves_no_hooks_and_the_dataset_as_it_was(tmp_path):
    class Raise(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            raise RuntimeError("on purpose")

    model, rows = tiny_model(), toy_rows()
    half = claiming("half", train_dataset=lambda self, ctx, dataset: dataset.select(range(8)))
    given = {"methods": [neutral(), half], "callbacks": [Raise()]}
    trainer = make(tmp_path, model, rows=rows, given=given)
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer.train()
    assert hook_count(model) == 0 and trainer.train_dataset is rows
    inner = trainer.optimizer.optimizer
    assert not inner._optimizer_step_pre_hooks and not inner._optimizer_step_post_hooks


# -- several tasks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("methods", [*LISTS, "none"])
def test_training_twice_equals_two_trainers(methods, tmp_path):
    """With methods; without, the Trainer keeps its optimizer, and so do we."""
    if methods == "none":
        first, second = make(tmp_path, cls=Trainer), make(tmp_path)
        for trainer in (first, second):
            trainer.train()
            trainer.train()
        assert equal(weights(first.model), weights(second.model))
        return
    one, objects = tiny_model(lora=True), LISTS[methods]()
    trainer = make(tmp_path, one, given={"methods": objects})
    two, others = tiny_model(lora=True), LISTS[methods]()
    for _ in range(2):
        set_seed(3)
        trainer.train()
    for _ in range(2):
        other = make(tmp_path, two, given={"methods": others})
        set_seed(3)
        other.train()
    assert equal(weights(one), weights(two))
    assert [m.tasks_done_ for m in objects] == [m.tasks_done_ for m in others] == [2] * len(objects)


def test_by_hand_without_a_queue(tmp_path):
    methods = [MIGU(threshold=0.5), Replay(count=3)]
    model = tiny_model(lora=True)
    args = arguments(tmp_path)
    sizes = []
    for index, task in enumerate([toy_rows(seed=i) for i in range(3)]):
        trainer = ContinualTrainer(model, args, train_dataset=task, methods=methods)
        trainer.train()
        sizes.append(trainer.state.max_steps)
        assert trainer.methods[0] is methods[0] and methods[0].tasks_done_ == index + 1
    assert sizes == [4, 5, 6]  # 16, 19 and 22 rows
    assert methods[0].steps_ == 6 and methods[0].overlap_  # the first task was not masked
    assert methods[1].sizes_ == {"task0": 3, "task1": 3, "task2": 3} and len(methods[1].buffer_) == 9
    assert hook_count(model) == 0


def test_model_init_makes_one_model_for_all_tasks(tmp_path):
    def build():
        return tiny_model(lora=True)

    def trainer(cls, **given):
        return cls(model_init=build, args=arguments(tmp_path), train_dataset=toy_rows(), **given)

    expected, ours = trainer(Trainer), trainer(ContinualTrainer, methods=[neutral()])
    expected.train()
    ours.train()
    assert equal(weights(expected.model), weights(ours.model))
    learnt = ours.model
    ours.train()
    assert ours.model is learnt and ours.model_init is build


# -- refusals ---------------------------------------------------------------------------------------------------------


def claiming(name, **attributes):
    return type(name, (ContinualMethod,), attributes)()


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (Average(), claiming("other", merge=lambda self, ctx, previous, current: current)),
        (MIGU(), MIGU()),
        (claiming("one", batch_columns=("c",)), claiming("two", batch_columns=("d", "c"))),
        (IncLoRA(), OLoRA()),
    ],
    ids=["mergers", "name", "column", "adapters"],
)
def test_conflicts_name_both(first, second, tmp_path):
    with pytest.raises(InputError, match=f"'{first.name}' and '{second.name}' cannot be combined"):
        make(tmp_path, given={"methods": [first, second]})


def test_a_misspelt_hook_is_refused_with_the_nearest_name():
    with pytest.raises(TypeError, match=r"Typo\.edit_gradient is not a hook; did you mean 'edit_gradients'\?"):
        type("Typo", (ContinualMethod,), {"edit_gradient": lambda self, ctx, grads: None})


def test_methods_given_both_ways_are_refused(tmp_path):
    with pytest.raises(InputError, match="given twice"):
        make(tmp_path, given={"methods": [MIGU()]}, methods=["migu"])


def test_hyperparameter_search_is_refused(tmp_path):
    trainer = make(tmp_path, given={"methods": [MIGU()]})
    with pytest.raises(InputError, match="hyperparameter search cannot run with methods"):
        trainer.hyperparameter_search(n_trials=1)
    with pytest.raises(InputError, match="hyperparameter search cannot run with methods"):
        trainer.train(trial={"learning_rate": 1.0})


@pytest.mark.parametrize("methods", [[], [neutral()]])
def test_a_nonfinite_loss_stops_with_a_sentence(methods, tmp_path):
    model = tiny_model()
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    fit(tmp_path, model, given={"methods": copy.deepcopy(methods)}, max_steps=1)  # the Trainer goes on
    name = " of task 'task0'" if methods else ""
    with pytest.raises(InputError, match=f"the loss{name} became NaN .*learning_rate=0.01"):
        fit(tmp_path, model, given={"methods": methods}, stop_on_nonfinite_loss=True)


# -- the gradient seam ------------------------------------------------------------------------------------------------


def linear():
    torch.manual_seed(0)
    model = nn.Linear(3, 4)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    return model


def test_grad_view_reads_multiplies_and_sets():
    model = linear()
    frozen = nn.Parameter(torch.ones(1), requires_grad=False)
    model.register_parameter("frozen", frozen)
    before = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    grads = GradView(model, Distributed())
    assert list(grads.names()) == ["weight", "bias"] and grads.parameter("bias") is model.bias
    assert torch.equal(grads.read("weight"), before["weight"])
    keep = torch.tensor([1.0, 0.0, 1.0, 0.0])
    grads.mul_({"weight": keep.unsqueeze(1), "elsewhere": keep})
    assert torch.equal(model.weight.grad, before["weight"] * keep.unsqueeze(1))
    assert torch.equal(model.bias.grad, before["bias"])
    model.bias.grad = None
    assert grads.read("bias") is None
    grads.mul_({"bias": keep})
    grads.set_("bias", torch.arange(4.0))
    assert torch.equal(model.bias.grad, torch.arange(4.0))


def test_grad_view_hides_the_fp16_loss_scale(monkeypatch):
    model, distributed = linear(), Distributed()
    monkeypatch.setattr(distributed, "grad_scale", lambda: 4.0)
    grads, scaled = GradView(model, distributed), model.weight.grad.clone()
    assert torch.equal(grads.read("weight"), scaled / 4)
    grads.set_("weight", scaled / 4)
    assert torch.equal(model.weight.grad, scaled)


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5),
    "sgd_momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.5),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("warm", [False, True])
def test_freeze_undoes_movement_momentum_and_decay(name, warm):
    """Rows frozen for a step are afterwards as if the step had not been; the others as if nothing were frozen."""
    model, free = linear(), linear()
    optimizers = [OPTIMIZERS[name](m.parameters()) for m in (model, free)]
    keep = torch.tensor([True, False, True, False])
    seam = GradientSeam(model, Distributed(), lambda grads: grads.freeze_({"weight": keep.unsqueeze(1).float()}))
    seam.attach(optimizers[0])
    if warm:
        for optimizer in optimizers:
            optimizer.step()
        assert torch.equal(model.weight, free.weight)  # nothing was frozen yet
    before = model.weight.detach().clone()
    moments = {k: v.clone() for k, v in optimizers[0].state[model.weight].items() if v.shape == before.shape}
    seam.after_backward(False)
    seam.after_backward(True)
    for optimizer in optimizers:
        optimizer.step()
    assert torch.equal(model.weight[~keep], before[~keep]) and torch.equal(model.weight[keep], free.weight[keep])
    assert torch.equal(model.bias, free.bias)
    state, other = optimizers[0].state[model.weight], optimizers[1].state[free.weight]
    shaped = [key for key, value in state.items() if value.shape == before.shape]
    assert shaped
    for key in shaped:
        assert torch.equal(state[key][~keep], moments.get(key, torch.zeros_like(before))[~keep])
        assert torch.equal(state[key][keep], other[key][keep]) and state[key][keep].any()
    for optimizer in optimizers:
        optimizer.step()  # freezing lasts one step
    assert not torch.equal(model.weight[~keep], before[~keep])
    seam.detach()
    assert not optimizers[0]._optimizer_step_pre_hooks and not optimizers[0]._optimizer_step_post_hooks


def test_a_seam_attached_twice_hooks_once():
    model = linear()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    seam = GradientSeam(model, Distributed(), lambda grads: None)
    seam.attach(optimizer)
    seam.attach(optimizer)
    assert len(optimizer._optimizer_step_pre_hooks) == 1


def test_migu_with_mask_update_does_not_move_masked_rows(tmp_path):
    class Moves(ContinualMethod):
        """Compares every step with MIGU's mask."""

        def on_task_begin(self, ctx):
            self._before, self._checked = weights(ctx.model), 0

        def on_step_end(self, ctx):
            now = weights(ctx.model)
            for name, keep in ctx_migu._factor_views.items():
                rows = keep.squeeze(1) == 0
                assert rows.any() and torch.equal(now[name][rows], self._before[name][rows])
                self._checked += 1
            self._before = now

    ctx_migu, moves = MIGU(threshold=0.5, skip_first_task=False, mask="update"), Moves()
    fit(tmp_path, given={"methods": [ctx_migu, moves]}, weight_decay=0.1)
    assert moves._checked >= 4


# -- what we rely on --------------------------------------------------------------------------------------------------


def test_only_distributed_knows_what_runs_the_processes():
    root = Path(hf_continual.__file__).parent
    pattern = re.compile(
        r"^\s*(from|import)\s+(torch\.distributed|deepspeed)\b|^\s*from torch import .*\bdistributed\b", re.M
    )
    found = {str(path.relative_to(root)) for path in root.rglob("*.py") if pattern.search(path.read_text())}
    assert found == {"distributed.py"}


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("_save_checkpoint", ["self", "model", "trial"]),
        ("_load_from_checkpoint", ["self", "resume_from_checkpoint", "model"]),
        ("_load_best_model", ["self"]),
        ("_set_signature_columns_if_needed", ["self"]),
        ("_clip_grad_norm", ["self", "model"]),
        ("_get_output_dir", ["self", "trial"]),
    ],
)
def test_private_methods_of_the_trainer_are_as_we_override_them(name, parameters):
    assert list(inspect.signature(getattr(Trainer, name)).parameters) == parameters


def test_training_step_ends_before_clipping_and_saving_ends_with_the_state(tmp_path):
    events = []

    class Spy(Trainer):
        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            events.append("training_step")
            return loss

        def _clip_grad_norm(self, model):
            events.append("clip")
            return super()._clip_grad_norm(model)

        def _save_checkpoint(self, model, trial):
            super()._save_checkpoint(model, trial)
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            files = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)
            events.append(files[-1].name)

    spy = fit(tmp_path, cls=Spy, gradient_accumulation_steps=2, max_steps=1, save_strategy="steps", save_steps=1)
    assert events == ["training_step", "training_step", "clip", "trainer_state.json"]
    assert spy._signature_columns and {"input_ids", "labels"} <= set(spy._signature_columns)


def test_an_empty_method_list_is_falsy():
    assert not MethodList() and not ContinualMixin.methods and MethodList(["migu"])


# -- answers in evaluate() ---------------------------------------------------------------------------------------------


def text_rows(rows=10, references=("red", "blue", "green")):
    prompts = [" ".join(f"w{(7 * i + k) % 70}" for k in range(1 + i % 5)) + " Answer :" for i in range(rows)]
    return datasets.Dataset.from_dict(
        {"prompt": prompts, "references": [[references[i % len(references)], "cat"] for i in range(rows)]}
    )


def token_rows(kind, rows):
    pairs = rows.map(lambda row: {"completion": row["references"][0]})
    return tokenize_dataset(pairs, toy_tokenizer(), seq2seq=kind == "t5")


def answering_trainer(folder, kind, rows=None, compute_metrics=None, task=None, cls=None, **options):
    model = tiny_model(kind)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3.0)  # no near-ties
    settings = {"predict_with_generate": True, "generation_max_length": 6, "per_device_eval_batch_size": 4, **options}
    kwargs = {"task": task} if task is not None else {}
    return (cls or TRAINERS[kind][1])(
        model, arguments(folder, kind, **settings), processing_class=toy_tokenizer(), eval_dataset=rows,
        train_dataset=token_rows(kind, text_rows()), compute_metrics=compute_metrics,
        data_collator=make_collator(toy_tokenizer(), model, kind == "t5"), **kwargs,
    )  # fmt: skip


def expected_cell(trainer, rows, kind, scorer="exact_match", labels=None):
    config = EvaluationConfig(scorer=scorer, batch_size=4, max_new_tokens=5 if kind == "t5" else 6)
    task = Task("t", eval_dataset=rows, labels=labels)
    return evaluate_task(trainer.model, toy_tokenizer(), task, config, max_prompt_length=512)


@pytest.mark.parametrize("kind", TRAINERS)
def test_evaluate_scores_generated_answers(kind, tmp_path):
    """The scores and answers of the task queue, from text rows and from tokenised ones, beside the loss as ever."""
    given, rows = [], text_rows()

    def measure(prediction):
        given.append(prediction)
        texts = toy_tokenizer().batch_decode(prediction.predictions, skip_special_tokens=True)  # as for Seq2SeqTrainer
        labels = np.where(prediction.label_ids != -100, prediction.label_ids, 0)
        return {"same": sum(a == b for a, b in zip(texts, toy_tokenizer().batch_decode(labels), strict=True)) / 10}

    # A model that is right now and then: references are its own answers.
    first = answering_trainer(tmp_path, kind, rows)
    answers = [p["prediction"] for p in expected_cell(first, rows, kind).predictions]
    rows = rows.map(lambda row, i: {"references": [answers[i] if i % 2 else "red"]}, with_indices=True)
    trainer = answering_trainer(tmp_path, kind, rows, measure, eval_scorer="rouge_l")
    cell = expected_cell(trainer, rows, kind, "rouge_l")
    metrics = trainer.evaluate()
    assert metrics["eval_rouge_l"] == cell.score > 0 and metrics["eval_exact_match"] == cell.others["exact_match"] > 0
    assert given[0].answers == [p["prediction"] for p in cell.predictions] == answers
    assert given[0].references == list(rows["references"]) and len(given[0].predictions) == 10
    decoded = toy_tokenizer().batch_decode(given[0].predictions, skip_special_tokens=True)
    assert [text.strip() for text in decoded] == answers

    tokens = token_rows(kind, rows)
    plain = TRAINERS[kind][0](trainer.model, trainer.args, data_collator=trainer.data_collator)
    plain.args = copy.copy(trainer.args)
    plain.args.predict_with_generate = False
    assert metrics["eval_loss"] == plain.evaluate(tokens)["eval_loss"]
    again = trainer.evaluate(tokens, metric_key_prefix="again")
    expected = {f"again_{name}": metrics[f"eval_{name}"] for name in ("loss", "rouge_l", "exact_match", "same")}
    assert {name: again[name] for name in expected} == expected
    assert given[1].answers == answers and np.array_equal(given[1].label_ids, given[0].label_ids)
    predicted = trainer.predict(tokens)
    assert np.array_equal(predicted.predictions, given[0].predictions)
    assert predicted.metrics["test_rouge_l"] == cell.score


@pytest.mark.parametrize("kind", TRAINERS)
def test_evaluate_while_training_and_by_task(kind, tmp_path):
    sets = {"first": text_rows(6), "second": token_rows(kind, text_rows(8))}
    trainer = answering_trainer(
        tmp_path, kind, sets, eval_strategy="steps", eval_steps=2, task=Task("first", labels=["red", "blue", "green"]),
        load_best_model_at_end=True, metric_for_best_model="eval_second_exact_match", save_strategy="steps",
        save_steps=2,
    )  # fmt: skip
    plain = answering_trainer(tmp_path, kind, cls=TRAINERS[kind][1], predict_with_generate=False)
    trainer.train()
    plain.train()
    logs = [log for log in trainer.state.log_history if "eval_first_exact_match" in log]
    assert [log["step"] for log in logs] == [2, 3]  # the last step saves, and so evaluates
    assert 0 <= logs[0]["eval_first_exact_match"] <= 1 and "eval_first_loss" in logs[0]
    second = [log for log in trainer.state.log_history if "eval_second_exact_match" in log]
    assert len(second) == 2 and "eval_second_loss" in second[0]
    # Evaluation changes nothing of the training; the last of three steps comes after the first.
    losses = [[log["loss"] for log in t.state.log_history if "loss" in log] for t in (trainer, plain)]
    assert losses[0] == losses[1] and len(losses[0]) == 3


def test_evaluate_by_label_likelihood_takes_the_labels_of_the_task(tmp_path):
    rows = text_rows()
    trainer = answering_trainer(tmp_path, "llama", rows, eval_scorer="label_likelihood")
    own = expected_cell(trainer, rows, "llama", "label_likelihood", ["blue", "cat", "green", "red"])
    assert trainer.evaluate()["eval_accuracy"] == own.score
    trainer.task = Task("t", labels=["dog", "red"])
    of_task = expected_cell(trainer, rows, "llama", "label_likelihood", ["dog", "red"])
    metrics = trainer.evaluate()
    assert metrics["eval_accuracy"] == of_task.score
    assert metrics["eval_predictions_outside_labels"] == 0


def test_evaluate_with_beams_uses_generate(tmp_path):
    rows = text_rows()
    trainer = answering_trainer(tmp_path, "t5", rows, generation_num_beams=3)
    ids = [encode_prompt(row["prompt"], toy_tokenizer(), 512, True) for row in rows]
    expected = []
    for each in ids:
        output = trainer.model.generate(input_ids=torch.tensor([each]), num_beams=3, max_length=6, do_sample=False)
        expected.append(toy_tokenizer().decode(output[0], skip_special_tokens=True))
    given = []
    trainer.compute_metrics = lambda p: given.append(p.answers) or {}
    trainer.evaluate()
    assert given == [expected]
    greedy = expected_cell(trainer, rows, "t5").predictions
    trainer.evaluate(num_beams=1, max_new_tokens=5)
    assert given[1] == [p["prediction"] for p in greedy]
    by_file = GenerationConfig(num_beams=3, max_length=6)
    by_file.save_pretrained(tmp_path)
    trainer.args.generation_num_beams, trainer.args.generation_config = None, str(tmp_path)
    trainer.evaluate()
    assert given[2] == expected


def test_the_models_own_settings_and_left_padding_stay(tmp_path):
    trainer = answering_trainer(tmp_path, "llama", text_rows())
    plain = trainer.evaluate()
    trainer.model.generation_config.update(do_sample=True, temperature=5.0)
    tokenizer = trainer.processing_class
    assert tokenizer.padding_side == "right"
    metrics = trainer.evaluate()
    assert {k: v for k, v in metrics.items() if "exact" in k} == {k: v for k, v in plain.items() if "exact" in k}
    assert trainer.model.generation_config.temperature == 5.0 and tokenizer.padding_side == "right"
    assert trainer._answering is None


NO_PROMPT = datasets.Dataset.from_dict({"input_ids": [[5, 6]], "attention_mask": [[1, 1]], "labels": [[5, 6]]})
BAD_EVALUATION = {
    "no tokenizer": (lambda t, rows: setattr(t, "processing_class", None), {}, "give the trainer processing_class"),
    "beams of sampling": (None, {"do_sample": True}, "do_sample=True would give other scores"),
    "unknown keyword": (None, {"num_beems": 3}, r"\['num_beems'\], which is no setting of generate"),
    "no answer": (None, {"max_length": 0}, "leaves 0 tokens for an answer"),
    "batches": (lambda t, rows: setattr(t.args, "batch_eval_metrics", True), {}, "batch_eval_metrics=True"),
    "split weights": (lambda t, rows: setattr(t.dist, "backend", "zero3"), {}, "on backend zero3.*use DDP or ZeRO-2"),
    "no prompt": (lambda t, rows: rows.append(NO_PROMPT), {}, "row 0: its labels begin at its first token"),
    "no labels": (
        lambda t, rows: rows.append(NO_PROMPT.map(lambda r: {"labels": [-100, -100]})), {}, "row 0: all its labels"
    ),
    "columns": (lambda t, rows: rows.append(NO_PROMPT.remove_columns("labels")), {}, "has input_ids, attention_mask"),
    "no rows": (lambda t, rows: rows.append(text_rows(1).select([])), {}, "is empty"),
    "no references": (lambda t, rows: rows.append(text_rows().remove_columns("references")), {}, "row 0 has no ref"),
    "a scorer's column": (lambda t, rows: setattr(t.args, "eval_scorer", "sari"), {}, "row 0 has no 'source'"),
    "no such config": (lambda t, rows: setattr(t.args, "generation_config", "/none"), {}, "generation_config='/none'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_EVALUATION)
def test_evaluation_that_cannot_be_is_refused(case, tmp_path):
    change, keywords, sentence = BAD_EVALUATION[case]
    rows = []
    trainer = answering_trainer(tmp_path, "llama", text_rows())
    if change is not None:
        change(trainer, rows)
    with pytest.raises(InputError, match=sentence):
        trainer.evaluate(rows[0] if rows else None, **keywords)


def test_what_cannot_be_answered_is_refused_before_training(tmp_path):
    trainer = answering_trainer(
        tmp_path, "llama", {"a": text_rows(), "b": NO_PROMPT}, eval_strategy="steps", eval_steps=2
    )
    with pytest.raises(InputError, match="there is no prompt to answer"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize(("options", "sentence"), [
    ({"predict_with_generate": True, "eval_scorer": "exact"}, "eval_scorer='exact' is unknown; did you mean"),
    ({"eval_scorer": "exact_match"}, "eval_scorer='exact_match' scores generated answers; set predict_with_generate"),
    ({"predict_with_generate": True, "generation_max_length": 0}, "generation_max_length=0 must be a whole number"),
    ({"predict_with_generate": True, "eval_max_prompt_length": "long"}, "eval_max_prompt_length='long' must be"),
])  # fmt: skip
@pytest.mark.parametrize("kind", TRAINERS)
def test_options_of_answers_that_cannot_be_are_refused(kind, options, sentence, tmp_path):
    with pytest.raises(InputError, match=sentence):
        arguments(tmp_path, kind, **options)


def test_options_of_answers_are_read_from_the_command_line(tmp_path):
    words = ["--output_dir", str(tmp_path), "--predict_with_generate", "--generation_max_length", "7", "--eval_scorer",
             "rouge_l", "--generation_config", "somewhere"]  # fmt: skip
    for cls in (ContinualTrainingArguments, ContinualSeq2SeqTrainingArguments):
        (args,) = HfArgumentParser(cls).parse_args_into_dataclasses(words)
        assert args.predict_with_generate and args.generation_max_length == 7 and args.eval_scorer == "rouge_l"
        assert str(args.generation_config) == "somewhere"
    given = arguments(tmp_path, generation_config=GenerationConfig(num_beams=2))
    assert given.to_dict()["generation_config"]["num_beams"] == 2 and json.loads(given.to_json_string())
