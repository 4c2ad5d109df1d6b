import logging
import os
import random

import datasets
import pytest
import torch
from toy_runs import make_queue, snapshot
from transformers import DataCollatorForSeq2Seq

from hf_continual import compilation
from hf_continual.cli import main
from hf_continual.errors import InputError
from hf_continual.methods import migu
from hf_continual.methods.base import make_method
from hf_continual.testing import close, tiny_model, toy_rows, toy_tokenizer, train_task, weights
from hf_continual.trainer import ContinualTrainer

COMPILE = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
TRACED = {"torch_compile": True, "torch_compile_backend": "eager"}  # traced alike, and quicker
CHECKPOINTED = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
SEEKR = {"name": "seekr", "count": 4, "query_rows": 4}
TOLERANCE = 1e-9  # in float64; in float32 SEEKR's stored half-precision maps would amplify the rounding


@pytest.fixture(autouse=True)
def _no_code_left():
    yield
    torch.compiler.reset()


def rows_of_many_lengths(seed, rows=16):
    draw = random.Random(seed)
    ids = [[draw.randrange(3, 96) for _ in range(draw.randrange(5, 40))] for _ in range(rows)]
    return datasets.Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(r) for r in ids], "labels": ids})


class PaddingTrainer(ContinualTrainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, data_collator=DataCollatorForSeq2Seq(toy_tokenizer()), **kwargs)


def learn(folder, methods, compiled, *, lora=True, tasks=2, rows=toy_rows, dtype=torch.float64, **options):
    """Learn toy tasks, the last of them compiled; returns weights, the methods' state and the last trainer."""
    model = tiny_model("llama", lora=lora).to(dtype)
    made = [make_method(method) for method in methods]
    options = {"optim": "sgd", "learning_rate": 0.1, **options}
    for index in range(tasks):
        last = compiled if index == tasks - 1 else {}
        trainer = train_task(model, rows(seed=index), made, folder / str(index), **options, **last)
    return weights(model), state_of(made), trainer


def state_of(methods):
    found = {}
    for method in methods:
        for name, value in vars(method).items():
            if name.endswith("_") and not name.startswith("_"):
                items = value.items() if isinstance(value, dict) else [("", value)]
                found |= {f"{method.name}.{name}.{key}": v for key, v in items if torch.is_tensor(v)}
    return found


def assert_compiled_equals(folder, methods, compiled=COMPILE, tolerance=TOLERANCE, **options):
    ours, our_state, trainer = learn(folder / "compiled", methods, compiled, **options)
    theirs, their_state, plain = learn(folder / "plain", methods, {}, **options)
    assert plain.compile_report is None
    assert trainer.compile_report.graphs > 0, "nothing was compiled"
    assert close(ours, theirs, tolerance) and close(our_state, their_state, tolerance)
    return trainer


# -- the same weights, and how often tracing breaks --------------------------------------------------------------------

WITHOUT_BREAKS = {  # name: methods, graphs of a task, fully trained
    "no methods": ([], 1, False),
    "migu": (["migu"], 1, False),
    "migu, padding left out": ([{"name": "migu", "ignore_padding": True}], 1, False),
    "migu, micro-batches, full": ([{"name": "migu", "scope": "micro_batch"}], 1, True),
    "new adapters, migu and replay": (["inclora", "migu", {"name": "replay", "ratio": 0.3}], 1, False),
    "kif, with its phase, and migu": ([{"name": "kif", "replay_count": 6}, "migu"], 3, False),
    "seekr, weights": ([SEEKR], 2, False),
    "seekr, outputs, full": ([{**SEEKR, "attention": "outputs"}], 2, True),
    "lwf": (["lwf"], 1, False),
}


@pytest.mark.parametrize("name", WITHOUT_BREAKS)
def test_compiled_training_computes_the_same_in_whole_graphs(tmp_path, name):
    methods, graphs, full = WITHOUT_BREAKS[name]
    trainer = assert_compiled_equals(tmp_path, methods, lora=not full)
    assert trainer.compile_report == compilation.CompileReport(graphs, {})
    assert trainer.state.log_history[-1]["compile_graphs"] == graphs


def test_checkpointed_layers_break_graphs_and_compute_the_same(tmp_path):
    trainer = assert_compiled_equals(tmp_path, ["migu", SEEKR], **CHECKPOINTED)
    assert 0 < trainer.compile_report.total <= 9


def test_rows_of_many_lengths_are_compiled_a_few_times(tmp_path, monkeypatch):
    monkeypatch.setattr(migu, "CHUNK", 256)  # several parts of an output, their number by the length
    trainer = assert_compiled_equals(
        tmp_path, ["migu", SEEKR], TRACED, rows=rows_of_many_lengths, trainer_class=PaddingTrainer
    )
    assert trainer.compile_report.total == 0 and trainer.compile_report.graphs <= 4


# -- one task after another --------------------------------------------------------------------------------------------


def test_every_task_is_compiled_with_its_own_taps_and_the_model_keeps_its_names(tmp_path):
    model, methods, wrapped = tiny_model("llama", lora=True), [make_method("migu")], []
    for index in range(3):
        names = [name for name, _ in model.named_parameters()]
        trainer = train_task(model, toy_rows(rows=8, seed=index), methods, tmp_path / str(index), bf16=True, **TRACED)
        assert trainer.compile_report.graphs == 1
        assert [name for name, _ in model.named_parameters()] == names and not any("_orig_mod" in n for n in names)
        assert trainer.ctx.model is model
        depth, forward = 0, model.forward
        while hasattr(forward, "__wrapped__"):
            depth, forward = depth + 1, forward.__wrapped__
        wrapped.append(depth)
    assert len(set(wrapped)) == 1, "autocast is wrapped around the forward once more in each task"
    assert methods[0].steps_ > 0


def test_a_queue_of_compiled_tasks_equals_one_that_is_not(tmp_path):
    for name, options in (("compiled", {**TRACED, "save_steps": 100}), ("plain", {"save_steps": 100})):
        make_queue(tmp_path / name, "stack", num_train_epochs=1, **options).run()
    ours, theirs = snapshot(tmp_path / "compiled"), snapshot(tmp_path / "plain")
    assert ours.keys() == theirs.keys()
    tensors = [name for name, value in theirs.items() if isinstance(value, dict)]
    assert tensors and all(close(ours[name], theirs[name], 1e-4) for name in tensors)
    logs = [(tmp_path / "compiled").glob(f"tasks/{task}*/log.json") for task in ("00", "01")]
    assert all('"compile_graph_breaks": 0' in next(found).read_text() for found in logs)


def test_the_arguments_compile_only_their_own_trainer(tmp_path):
    train_task(tiny_model("llama"), toy_rows(rows=4), ["naive"], tmp_path / "a", **TRACED)
    assert "ACCELERATE_DYNAMO_BACKEND" not in os.environ
    assert train_task(tiny_model("llama"), toy_rows(rows=4), ["naive"], tmp_path / "b").compile_report is None


def test_accelerate_still_marks_a_model_as_prepared(tmp_path):
    """The private names that `take_off` removes."""
    model = tiny_model("llama")
    train_task(model, toy_rows(rows=4), ["naive"], tmp_path, bf16=True, **TRACED)
    assert {"_is_accelerate_prepared", "_original_forward", "forward"} <= model.__dict__.keys()
    compilation.take_off(model)
    assert not {"_is_accelerate_prepared", "_original_forward", "forward"} & model.__dict__.keys()


# -- what is said ------------------------------------------------------------------------------------------------------


def breaking(method):
    """MIGU's statistic with a call in it that cannot be traced."""
    add = method._add

    def add_and_break(*args):
        torch._dynamo.graph_break("on purpose")
        add(*args)

    method._add = add_and_break
    return method


def test_breaks_are_counted_and_logged_with_their_reason(tmp_path, caplog):
    model = tiny_model("llama", lora=True)
    with caplog.at_level(logging.DEBUG, logger="hf_continual"):
        methods = [breaking(make_method({"name": "migu", "skip_first_task": False, "targets": "0.*q_proj"}))]
        trainer = train_task(model, toy_rows(), methods, tmp_path, **TRACED)
    report = trainer.compile_report
    assert report.total >= 2 and any("on purpose" in reason for reason in report.breaks)
    lines = [record.getMessage() for record in caplog.records if record.name == compilation.logger.name]
    assert sum(line.startswith("torch.compile after 4 micro-batches") for line in lines) == 1
    assert any("on purpose" in line for line in lines)
    assert trainer.state.log_history[-1]["compile_graph_breaks"] == report.total


def test_env_counts_the_breaks_of_a_method(capsys):
    assert main(["env", "--compile", "migu"]) == 0
    out = capsys.readouterr().out
    assert "torch.compile: " in out and "inductor" in out
    assert "compiled with migu: 1 graph, 0 graph breaks" in out


def test_env_without_a_compiler_says_so(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    assert "no C++ compiler" in compilation.describe_compile()


def test_a_model_compiled_by_hand_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(InputError, match="'migu' went through torch.compile already.*torch_compile=True"):
        train_task(torch.compile(tiny_model("llama")), toy_rows(rows=4), ["migu"], tmp_path)


def test_backends_without_a_test_are_refused_in_a_sentence():
    with pytest.raises(InputError, match="torch_compile=True with method 'kif'.* fsdp2; leave torch_compile out"):
        compilation.check_compiled(tiny_model("llama"), "fsdp2", ["kif"])
    compilation.check_compiled(tiny_model("llama"), "single", ["kif"])
