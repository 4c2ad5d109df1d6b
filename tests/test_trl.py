"""`trl.SFTTrainer` with the same mixin."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import sys
import warnings

import pytest
import torch

from hf_continual import ContinualMethod, ContinualTrainingArguments, InputError
from hf_continual.methods.migu import MIGU
from hf_continual.methods.replay import Replay
from hf_continual.testing import close, equal, hook_count, tiny_model, toy_stream, toy_tokenizer, weights

trl = pytest.importorskip("trl")
from hf_continual.integrations.trl import ContinualSFTConfig, ContinualSFTTrainer  # noqa: E402


def rows(index=0, count=12):
    task = toy_stream(2, rows=count)[index]
    return task.train_dataset.remove_columns("references")


def make(folder, model=None, cls=ContinualSFTTrainer, data=None, given=None, **options):
    config = ContinualSFTConfig if issubclass(cls, ContinualSFTTrainer) else trl.SFTConfig
    settings = {
        "per_device_train_batch_size": 4, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "logging_steps": 1,
        "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True, "num_train_epochs": 1,
        "dataloader_pin_memory": False, "gradient_checkpointing": False, "bf16": False, **options,
    }  # fmt: skip
    return cls(
        model=tiny_model(lora=True) if model is None else model,
        args=config(output_dir=str(folder), **settings),
        train_dataset=rows() if data is None else data,
        processing_class=toy_tokenizer(),
        **(given or {}),
    )


def fit(*args, **kwargs):
    trainer = make(*args, **kwargs)
    trainer.train()
    return trainer


class Pull(ContinualMethod):
    """0.5 ||p||^2, whose gradient is p."""

    def extra_loss(self, ctx, batch, outputs):
        scores = outputs.logits if outputs.get("log_probs") is None else outputs.log_probs
        assert scores.requires_grad and "labels" in batch
        return {"pull": 0.5 * sum(p.pow(2).sum() for p in ctx.model.parameters() if p.requires_grad)}


@pytest.mark.parametrize("lora", [True, False])
def test_without_methods_it_is_the_sft_trainer_and_neutral_methods_change_nothing(lora, tmp_path):
    options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    build = lambda: tiny_model(lora=lora, dropout=0.1)  # noqa: E731
    expected = fit(tmp_path, build(), trl.SFTTrainer, **options)
    assert not equal(weights(build()), weights(expected.model))
    for methods in (None, [MIGU(threshold=0.0, skip_first_task=False)]):
        trainer = fit(tmp_path, build(), given={"methods": methods}, **options)
        assert equal(weights(expected.model), weights(trainer.model)), methods
        theirs, ours = (
            [(e["loss"], e["grad_norm"], e["entropy"]) for e in t.state.log_history if "loss" in e]
            for t in (expected, trainer)
        )
        assert ours == theirs


def test_every_argument_of_the_parent_is_accepted(tmp_path):
    parameters = inspect.signature(trl.SFTTrainer.__init__).parameters
    values = {name: p.default for name, p in parameters.items() if name != "self"}
    assert not {"methods", "task"} & set(values)
    args = ContinualSFTConfig(str(tmp_path), report_to="none", use_cpu=True, bf16=False, methods=["migu"])
    values |= {"model": tiny_model(), "args": args, "train_dataset": rows(), "processing_class": toy_tokenizer()}
    trainer = ContinualSFTTrainer(*values.values())
    assert trainer.methods[0].name == "migu" and trainer.methods[0].config.threshold == 0.7
    theirs = {f.name for f in dataclasses.fields(trl.SFTConfig)}
    assert theirs < {f.name for f in dataclasses.fields(ContinualSFTConfig)}


def test_arguments_of_another_trainer_are_refused(tmp_path):
    args = ContinualTrainingArguments(str(tmp_path), use_cpu=True, methods=["migu"])
    with pytest.raises(InputError, match="ContinualSFTConfig"):
        ContinualSFTTrainer(tiny_model(), args, train_dataset=rows(), processing_class=toy_tokenizer())


def test_two_tasks_with_migu_and_replay(tmp_path):
    methods, model = [MIGU(threshold=0.5), Replay(count=4)], tiny_model(lora=True)
    steps = []
    for index in range(2):
        before = weights(model)
        options = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 1} if index else {}
        trainer = fit(tmp_path, model, data=rows(index), given={"methods": methods, "eval_dataset": rows(1)}, **options)
        steps.append(len(trainer.get_train_dataloader()))
        assert trainer.evaluate()["eval_loss"] > 0
    assert steps == [3, 3] and methods[1].sizes_ == {"task0": 4, "task1": 4} and methods[0].tasks_done_ == 2
    assert set(methods[1].buffer_.rows.column_names) >= {"input_ids", "labels"}
    moved = {n: (p != before[n]).any(1).float().mean() for n, p in weights(model).items() if "lora_B" in n}
    assert moved and all(0 < share <= 0.5 for share in moved.values())
    assert hook_count(model) == 0


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_extra_losses_are_scaled_like_the_task_loss(smoothing, tmp_path):
    """As test_trainer.py has it; the model runs once, so that its outputs are those of the task loss."""
    options = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "max_steps": 1}
    data, start = rows(count=8), weights(tiny_model())
    for micro, steps in ((8, 1), (2, 4)):
        ended = []
        for methods in (None, [Pull()]):
            model, calls = tiny_model(), []
            sizes = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": steps}
            trainer = make(tmp_path, model, data=data, given={"methods": methods}, label_smoothing_factor=smoothing,
                           **sizes, **options)  # fmt: skip
            model.model.register_forward_hook(lambda *a, calls=calls: calls.append(1))
            with warnings.catch_warnings():
                warnings.simplefilter("error", FutureWarning)
                trainer.train()
            ended.append(weights(model))
            assert len(calls) == steps * (2 if smoothing else 1)
        pulled = {name: ended[0][name] - ended[1][name] for name in start}
        assert close({n: 0.1 * p for n, p in start.items()}, pulled, 1e-4), (micro, steps)


def test_batch_columns(tmp_path):
    seen = []

    class Weighted(ContinualMethod):
        batch_columns = ("weight",)

        def extra_loss(self, ctx, batch, outputs):
            seen.append(batch["weight"].tolist())
            return {}

    data = rows(count=8).add_column("weight", [float(i) for i in range(8)]).add_column("unused", list(range(8)))
    given = {"methods": [Weighted()], "eval_dataset": data}
    trainer = fit(tmp_path, data=data, given=given, train_sampling_strategy="sequential")
    assert seen == [[0.0, 1.0, 2.0, 3.0], [4.0, 5.0, 6.0, 7.0]]
    plain = trl.SFTTrainer(trainer.model, trl.SFTConfig(str(tmp_path), report_to="none", use_cpu=True, bf16=False),
                           train_dataset=rows(), processing_class=toy_tokenizer())  # fmt: skip
    assert trainer.evaluate()["eval_loss"] == plain.evaluate(rows(count=8))["eval_loss"]


def test_a_user_collator_is_left_alone(tmp_path):
    class Column(ContinualMethod):
        batch_columns = ("weight",)

    collate = lambda examples: {"input_ids": torch.ones(1, 2, dtype=torch.long)}  # noqa: E731
    trainer = make(tmp_path, given={"methods": [Column()], "data_collator": collate})
    assert trainer.data_collator is collate


def test_without_trl_one_sentence_says_what_to_install(monkeypatch):
    name = "hf_continual.integrations.trl"
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(InputError, match=r"pip install 'hf-continual\[trl\]'$"):
        importlib.import_module(name)


@pytest.mark.parametrize("method", ["seekr", "derpp", "lwf"])
def test_methods_that_need_logits_are_refused_before_training(tmp_path, method):
    args = ContinualSFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_length=16)
    rows = toy_stream(1)[0].train_dataset.select_columns(["prompt", "completion"])
    trainer = ContinualSFTTrainer(
        model=tiny_model(), args=args, train_dataset=rows, processing_class=toy_tokenizer(), methods=[method]
    )
    with pytest.raises(InputError, match=f"'{method}' needs logits"):
        trainer.train()
