"""The queue under several processes learns, scores and commits what it does in one, whatever stops it on the way."""

import functools
import json
import os
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from ranks import run_ranks
from test_end_tasks import end_task
from test_pretraining import masked_model, masked_tokenizer, text_task
from toy_runs import assert_same, save_model, snapshot
from transformers import RobertaForMaskedLM, set_seed

from hf_continual import InputError, TaskQueue
from hf_continual.checkpoints import usable_checkpoint
from hf_continual.errors import Interrupted
from hf_continual.same_run import check_other_processes
from hf_continual.testing import backend_options, close, tiny_model, toy_queue_options, toy_stream

pytestmark = pytest.mark.distributed

METHODS = {
    "naive": [],
    "migu": [{"name": "migu", "threshold": 0.5}],
    "kif": [{"name": "kif", "replay_count": 0, "fusion": "categorical", "quantile": 0.5}],
    "replay": ["inclora", {"name": "replay", "count": 4}],
    "full": [{"name": "migu", "threshold": 0.5}],
}
LOST = 3


def make_queue(folder, model, name="naive", backend="single", *, batch=2, accumulation=2, tasks=2, **training):
    options = toy_queue_options(
        lora=name != "full",
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        train_sampling_strategy="sequential",
        adam_epsilon=1e-3,  # else a gradient of zero but for rounding moves a weight as far as any other
        learning_rate=5e-2,
        **training,
    )
    options["model"] = str(model)
    if options["peft_config"] is not None:
        options["peft_config"] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    options["args"] |= backend_options(backend)
    return TaskQueue(folder, tasks=toy_stream(tasks, rows=8, eval_rows=6), methods=METHODS[name], **options)


def pretend_accelerators():
    """accelerate turns FSDP on for several accelerators only; gloo can do the work as well."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    original = TaskQueue._training_args

    def replaced(self, *args):
        made = original(self, *args)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        return made

    TaskQueue._training_args = replaced


def in_rank(rank, folder, function, *args):
    """Run `function`; the sentence that it ends with is left in a file, and is a rank's end as it is a command's."""
    try:
        function(folder, *args)
    except (InputError, Interrupted) as error:
        (folder / f"said{rank}").write_text(str(error))
        os._exit(2 if isinstance(error, InputError) else 130)


def launch(function, folder, *args, world_size=2, timeout=60):
    """Exit codes, and what each rank said."""
    folder.mkdir(exist_ok=True)
    for left in [*folder.glob("said*"), *folder.glob("rank*.error")]:
        left.unlink()
    codes = run_ranks(in_rank, world_size, folder, folder, function, *args, timeout=timeout, check=False)
    said = {}
    for rank in range(world_size):
        files = [path for path in (folder / f"said{rank}", folder / f"rank{rank}.error") if path.exists()]
        said[rank] = files[0].read_text() if files else ""
    return codes, said


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory, model):
    """What one process gives, by method."""
    made = {}

    def get(name, tasks=2):
        if (name, tasks) not in made:
            folder = tmp_path_factory.mktemp(name) / "run"
            before = torch.get_num_threads()
            torch.set_num_threads(1)
            make_queue(folder, model, name, tasks=tasks).run()
            torch.set_num_threads(before)
            made[name, tasks] = snapshot(folder)
        return made[name, tasks]

    return get


def assert_close(run, reference, tolerance):
    """Weights and methods' state within `tolerance`; predictions, scores and buffers byte for byte."""
    ours = snapshot(run)
    assert ours.keys() == reference.keys()
    compared = 0
    for name, value in reference.items():
        if isinstance(value, dict):
            assert close(value, ours[name], tolerance), f"{name} differs"
            compared += len(value)
        elif "/methods/" not in name or name.endswith(".arrow"):
            assert ours[name] == value, f"{name} differs"
    assert compared
    assert not (run / "work").exists()
    queue = json.loads((run / "queue.json").read_text())
    assert queue["finished"] is True and queue["world_size"] > 1


def learn(folder, model, name, backend, options=None, run=None):
    if backend == "fsdp2":
        pretend_accelerators()
    queue = make_queue(folder / "run", model, name, backend, accumulation=1, **(options or {}))
    result = queue.run(**(run or {}))
    (folder / f"result{queue.processes.rank}").write_text(json.dumps(result.R.tolist()))


CASES = [("ddp", name) for name in METHODS] + [
    ("zero2", "naive"), ("zero2", "migu"), ("zero2", "kif"), ("zero2", "replay"), ("zero2", "full"),
    ("zero1", "full"), ("zero0", "replay"),
    ("zero3", "naive"), ("zero3", "migu"), ("zero3", "replay"), ("zero3", "full"),
    ("fsdp2", "naive"), ("fsdp2", "migu"), ("fsdp2", "replay"), ("fsdp2", "full"),
]  # fmt: skip


@pytest.mark.parametrize(("backend", "name"), CASES)
def test_queue_equals_one_process(backend, name, model, alone, tmp_path):
    codes, said = launch(learn, tmp_path, model, name, backend)
    assert codes == [0, 0], said
    assert_close(tmp_path / "run", alone(name), 1e-4 if backend == "zero3" else 1e-5)
    results = [(tmp_path / f"result{rank}").read_text() for rank in range(2)]
    assert results[0] == results[1]


# -- stopped and continued ---------------------------------------------------------------------------------------------


def _kill_one(rank, step):
    from hf_continual.trainer import ContinualMixin

    original = ContinualMixin.training_step

    def replaced(self, *args, **kwargs):
        loss = original(self, *args, **kwargs)
        if self.task.index == 1 and self.state.global_step == step and int(os.environ["RANK"]) == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss

    ContinualMixin.training_step = replaced


def learn_and_lose(folder, model, backend, rank):
    if backend == "fsdp2":
        pretend_accelerators()
    _kill_one(rank, LOST)
    make_queue(folder / "run", model, "migu", backend, accumulation=1, save_steps=2).run()


@pytest.mark.parametrize(("backend", "rank"), [("ddp", 1), ("ddp", 0), ("zero2", 1), ("zero3", 1), ("fsdp2", 1)])
def test_a_rank_that_dies(backend, rank, model, tmp_path):
    """The other stops with a sentence; then the run goes on from its checkpoint, as if nothing had been."""
    reference = tmp_path / "whole"
    codes, said = launch(learn, reference, model, "migu", backend, {"save_steps": 2})
    assert codes == [0, 0], said
    began = time.monotonic()
    codes, said = launch(learn_and_lose, tmp_path, model, backend, rank)
    assert time.monotonic() - began < 60
    assert codes[rank] == -signal.SIGKILL and codes[1 - rank] == 2, said
    assert "another process of this run ended" in said[1 - rank] and "every learnt task is kept" in said[1 - rank]
    assert (tmp_path / "run" / "work" / "01-toy1" / "checkpoint-2" / "sizes.json").exists()
    assert json.loads((tmp_path / "run" / "queue.json").read_text())["cursor"] == 1

    # One process is refused as long as there is a checkpoint of two.
    with pytest.raises(InputError, match=r"begun with 2 process\(es\) and would go on with 1 process\(es\)"):
        if backend == "ddp":
            make_queue(tmp_path / "run", model, "migu", accumulation=1, save_steps=2).run()
        else:
            refuse_alone(tmp_path / "run")

    codes, said = launch(learn, tmp_path, model, "migu", backend, {"save_steps": 2})
    assert codes == [0, 0], said
    assert_close(tmp_path / "run", snapshot(reference / "run"), 0.0)


def learn_and_lose_while_scoring(folder, model):
    """Rank 1 dies once its first answers to the second cell after the second task are kept."""
    from hf_continual.run_state import PartialAnswers

    add = PartialAnswers.add

    def replaced(self, found):
        add(self, found)
        if "01-toy1" in str(self._own) and self._own.name == "toy1.rank1.partial":
            os.kill(os.getpid(), signal.SIGKILL)

    PartialAnswers.add = replaced
    make_queue(folder / "run", model, "migu", "ddp", accumulation=1).run()


def test_a_rank_that_dies_while_it_scores(model, alone, tmp_path):
    """What it answered is not answered again, and the run ends as one process's, whose batches are the same."""
    codes, said = launch(learn_and_lose_while_scoring, tmp_path, model)
    assert codes[1] == -signal.SIGKILL and codes[0] == 2, said
    left = sorted((tmp_path / "run").glob("tasks/01-toy1/predictions/toy1.rank*.partial"))
    assert len(left[1].read_text().splitlines()) == 3  # the key, and a batch of two rows
    codes, said = launch(learn, tmp_path, model, "migu", "ddp")
    assert codes == [0, 0], said
    assert_close(tmp_path / "run", alone("migu"), 1e-5)
    assert not list((tmp_path / "run").glob("**/*.partial"))


def evaluate_answers(folder, backend):
    """Metrics of `evaluate()` with answers, of text rows and of tokenised ones, on this rank."""
    from hf_continual import ContinualTrainer, ContinualTrainingArguments
    from hf_continual.collators import make_collator
    from hf_continual.testing import toy_tokenizer
    from hf_continual.tokenization import tokenize_dataset

    if backend == "fsdp2":
        pretend_accelerators()
    task, tokenizer, model = toy_stream(1, eval_rows=11)[0], toy_tokenizer(), tiny_model()
    args = ContinualTrainingArguments(
        output_dir=str(folder), predict_with_generate=True, generation_max_length=4, per_device_eval_batch_size=2,
        eval_scorer="rouge_l", use_cpu=True, disable_tqdm=True, report_to="none", max_steps=1, save_strategy="no",
        dataloader_pin_memory=False, **backend_options(backend),
    )  # fmt: skip
    answers = []
    trainer = ContinualTrainer(
        model, args, processing_class=tokenizer, data_collator=make_collator(tokenizer),
        train_dataset=tokenize_dataset(task.train_dataset, tokenizer, seq2seq=False),
        compute_metrics=lambda p: answers.append(p.answers) or {"rows": len(p.answers)},
    )  # fmt: skip
    found = []
    if backend in ("fsdp2", "zero3"):
        trainer.train()
    for rows in (task.eval_dataset, tokenize_dataset(task.eval_dataset, tokenizer, seq2seq=False)):
        metrics = trainer.evaluate(rows)
        found.append({k: v for k, v in metrics.items() if k in ("eval_rouge_l", "eval_exact_match", "eval_rows")})
    rank = os.environ.get("RANK", "alone")
    (folder / f"found{rank}").write_text(json.dumps([found, answers]))


def test_evaluate_answers_the_same_on_two_ranks(tmp_path):
    evaluate_answers(tmp_path, "single")
    codes, said = launch(evaluate_answers, tmp_path, "single")
    assert codes == [0, 0], said
    alone = (tmp_path / "foundalone").read_text()
    assert [(tmp_path / f"found{rank}").read_text() for rank in range(2)] == [alone, alone]
    assert json.loads(alone)[0][0]["eval_rows"] == 11


def test_evaluate_refuses_answers_where_the_weights_are_split(tmp_path):
    codes, said = launch(evaluate_answers, tmp_path, "zero3")
    assert codes == [2, 2] and "predict_with_generate=True cannot answer on backend zero3" in said[0], said


def learn_and_lose_while_noting(folder, model):
    """Rank 0 dies when the second checkpoint of the second task is written and not yet noted as whole."""
    from hf_continual import checkpoints

    write = checkpoints.write_json

    def replaced(path, value):
        if "01-toy1" in str(path) and path.parent.name == "checkpoint-4":
            os.kill(os.getpid(), signal.SIGKILL)
        write(path, value)

    checkpoints.write_json = replaced
    make_queue(folder / "run", model, "migu", "ddp", accumulation=1, save_steps=2).run()


def test_a_rank_that_dies_while_a_checkpoint_is_noted(model, tmp_path):
    """The one before it is still there to continue from."""
    reference = tmp_path / "whole"
    codes, said = launch(learn, reference, model, "migu", "ddp", {"save_steps": 2})
    assert codes == [0, 0], said
    codes, said = launch(learn_and_lose_while_noting, tmp_path, model)
    assert codes == [-signal.SIGKILL, 2], said
    work = tmp_path / "run" / "work" / "01-toy1"
    assert not (work / "checkpoint-4" / "sizes.json").exists()
    assert usable_checkpoint(work, 2) == work / "checkpoint-2"
    codes, said = launch(learn, tmp_path, model, "migu", "ddp", {"save_steps": 2})
    assert codes == [0, 0], said
    assert_close(tmp_path / "run", snapshot(reference / "run"), 0.0)


def refuse_alone(run):
    """A recipe with DeepSpeed or FSDP cannot come as far in one process without a launcher."""
    stream = toy_stream(2, rows=8, eval_rows=6)
    queue = TaskQueue(run, tasks=stream, **toy_queue_options())
    queue._checkpoint_of(stream[1], "single")


# -- one process a task ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["ddp", "zero2"])
def test_processes_of_its_own_for_each_task_change_nothing(backend, model, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    codes, said = launch(learn, whole, model, "migu", backend)
    assert codes == [0, 0], said
    for learnt, run in enumerate(({"isolate_tasks": True}, {"one_task": True}), 1):  # under a launcher the same
        codes, said = launch(learn, parts, model, "migu", backend, None, run)
        assert codes == [0, 0], said
        assert json.loads((parts / "run" / "queue.json").read_text())["cursor"] == learnt
    assert_same(parts / "run", whole / "run")


def test_a_process_for_each_task_takes_a_model_in_memory(tmp_path):
    options = toy_queue_options() | {"model": tiny_model()}
    stream = toy_stream(2, rows=8, eval_rows=6)
    whole = TaskQueue(tmp_path / "whole", tasks=stream, methods=["migu"], **options).run()
    parts = TaskQueue(tmp_path / "parts", tasks=stream, methods=["migu"], **options).run(isolate_tasks=True)
    assert_same(tmp_path / "parts", tmp_path / "whole")
    np.testing.assert_array_equal(parts.R, whole.R)


def test_a_model_that_cannot_be_sent_to_a_process(tmp_path):
    options = toy_queue_options()  # its model is a lambda
    queue = TaskQueue(tmp_path / "run", tasks=toy_stream(2, rows=8, eval_rows=6), **options)
    with pytest.raises(
        InputError, match="isolate_tasks: the queue cannot be sent to another process .* give the model"
    ):
        queue.run(isolate_tasks=True)
    assert not (tmp_path / "run" / "tasks").exists()


# -- another number of processes ---------------------------------------------------------------------------------------


def learn_one(folder, model, options):
    make_queue(folder / "run", model, "migu", **options).run(one_task=True)


@pytest.fixture(scope="module")
def half(tmp_path_factory, model):
    """A run of two processes whose first task is learnt: 2 x 2 rows a step."""
    folder = tmp_path_factory.mktemp("half")
    codes, said = launch(learn_one, folder, model, {"accumulation": 1})
    assert codes == [0, 0], said
    return folder / "run"


def test_fewer_processes_go_on_between_tasks_with_the_same_rows_a_step(half, model, alone, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(half, run)
    make_queue(run, model, "migu", batch=2, accumulation=2).run()
    ours, reference = snapshot(run), alone("migu")
    assert ours.keys() == reference.keys()
    tensors = [name for name, value in reference.items() if isinstance(value, dict)]
    assert any("01-toy1" in name for name in tensors)
    assert all(close(reference[name], ours[name], 1e-5) for name in tensors)


def test_more_processes_go_on_between_tasks_with_the_same_rows_a_step(model, alone, tmp_path):
    make_queue(tmp_path / "run", model, "migu", batch=2, accumulation=2).run(one_task=True)
    codes, said = launch(learn, tmp_path, model, "migu", "ddp")
    assert codes == [0, 0], said
    assert_close(tmp_path / "run", alone("migu"), 1e-5)


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("migu", {"accumulation": 1}, r"2 process\(es\) .* 1 process\(es\), which makes the 4 rows of an optimizer step"
         r" 2 in task 'toy1'; set training.per_device_train_batch_size=2 .* go on with 2 process\(es\)$"),
        ("migu", {"lr_scheduler_type": "constant"}, "belongs to another recipe: training.lr_scheduler_type"),
        ("naive", {}, "belongs to another recipe: methods"),
    ],
)  # fmt: skip
def test_other_processes_that_would_train_on_other_rows(name, options, sentence, half, model, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(half, run)
    with pytest.raises(InputError, match=sentence):
        make_queue(run, model, name, **options).run()
    assert json.loads((run / "queue.json").read_text())["cursor"] == 1


@pytest.mark.parametrize(
    ("methods", "rows", "training", "why"),
    [
        (["inclora", {"name": "replay", "count": 4}], 8, {}, "method 'replay' spreads its stored rows"),
        (["kif"], 8, {}, "method 'kif' spreads its stored rows"),
        (["migu"], 10, {}, "the 10 rows of task 'toy0' are no multiple of 4 and 2"),
        (["migu"], 8, {"train_sampling_strategy": "group_by_length"}, "'group_by_length' groups the rows"),
        (["migu"], 8, {"accelerator_config": {"split_batches": True}}, "splits batches between the processes"),
    ],
)
def test_other_processes_with_rows_that_do_not_divide_alike(methods, rows, training, why, tmp_path):
    given = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, **training}
    options = toy_queue_options(**given)
    queue = TaskQueue(tmp_path / "run", tasks=toy_stream(2, rows=rows, eval_rows=6), methods=methods, **options)
    step = {"processes": 2, "batch": 2, "accumulation": 1}
    with pytest.raises(InputError, match=rf"2 process\(es\) and would go on with 1 process\(es\), where .*{why}"):
        check_other_processes(queue, {"tasks": [{"step": step}] * 2, "world_size": 2})
    check_other_processes(queue, {"tasks": [{"step": {**step, "processes": 1}}] * 2, "world_size": 2})


# -- one rank alone is in trouble --------------------------------------------------------------------------------------


def _on_rank(rank, owner, name, error, when=lambda *args: True):
    if int(os.environ["RANK"]) != rank:
        return
    original = getattr(owner, name)

    @functools.wraps(original)  # the Trainer reads its signature
    def failing(*args, **kwargs):
        if when(*args):
            raise error
        return original(*args, **kwargs)

    setattr(owner, name, failing)


def full_disk_in_a_commit():
    from hf_continual.run_model import RunModel

    _on_rank(0, RunModel, "save", OSError(28, "No space left on device"))


def full_disk_in_a_checkpoint():
    from transformers import Trainer

    _on_rank(0, Trainer, "_save_optimizer_and_scheduler", OSError(28, "No space left on device"))


def evaluation_fails_on_one():
    from transformers import LlamaForCausalLM

    _on_rank(1, LlamaForCausalLM, "forward", RuntimeError("out of memory"), lambda self, *a: not self.training)


def scorer_fails_on_one():
    from hf_continual import queue_evaluation

    original = queue_evaluation.evaluate_task

    def failing(*args, **kwargs):
        original(*args, **kwargs)  # both ranks answer
        if os.environ["RANK"] == "0":
            raise ZeroDivisionError("a scorer")

    queue_evaluation.evaluate_task = failing


def nan_on_one():
    from transformers import LlamaForCausalLM

    if os.environ["RANK"] == "1":
        original = LlamaForCausalLM.forward

        @functools.wraps(original)
        def forward(self, *args, **kwargs):
            outputs = original(self, *args, **kwargs)
            if self.training:
                outputs.loss = outputs.loss.detach() * float("nan") + outputs.loss * 0
            return outputs

        LlamaForCausalLM.forward = forward


def learn_in_trouble(folder, model, trouble, options):
    trouble()
    make_queue(folder / "run", model, "naive", accumulation=1, **options).run()


LOST_ONE = "another process of this run ended (rank {} of 2 lost it)"


@pytest.mark.parametrize(
    ("trouble", "options", "codes", "sentences"),
    [
        (full_disk_in_a_commit, {}, [2, 2], ["the disk is full"] * 2),
        (full_disk_in_a_checkpoint, {}, [2, 2], ["the disk is full", LOST_ONE.format(1)]),
        (evaluation_fails_on_one, {}, [2, 1], [LOST_ONE.format(0), "RuntimeError: out of memory"]),
        (scorer_fails_on_one, {}, [1, 2], ["ZeroDivisionError: a scorer", LOST_ONE.format(1)]),
        (nan_on_one, {"logging_steps": 1}, [2, 2], ["the loss of task 'toy0' became NaN or infinite by step 1"] * 2),
        (nan_on_one, {"logging_steps": 100, "save_steps": 100}, [2, 2], ["became NaN or infinite by step 4"] * 2),
    ],
)
def test_trouble_of_one_rank_ends_all(trouble, options, codes, sentences, model, tmp_path):
    began = time.monotonic()
    ended, said = launch(learn_in_trouble, tmp_path, model, trouble, options)
    assert time.monotonic() - began < 60
    assert ended == codes, said
    for rank, sentence in enumerate(sentences):
        assert sentence in said[rank]


def test_a_run_directory_that_cannot_be_written(model, tmp_path):
    (tmp_path / "run").write_text("a file")
    codes, said = launch(learn, tmp_path, model, "naive", "ddp")
    assert codes == [2, 2] and said[0] == said[1]
    assert "no folder can be made or written there" in said[0]


# -- signals -----------------------------------------------------------------------------------------------------------


def learn_signalled(folder, model, backend, number, ranks):
    """A signal to some ranks in the third step of the second task."""
    from hf_continual.trainer import ContinualMixin

    original = ContinualMixin.training_step

    def replaced(self, *args, **kwargs):
        if self.task.index == 1 and self.state.global_step == 2 and int(os.environ["RANK"]) in ranks:
            os.kill(os.getpid(), number)
        return original(self, *args, **kwargs)

    ContinualMixin.training_step = replaced
    learn(folder, model, "migu", backend, {"save_steps": 100})


@pytest.mark.parametrize(
    ("backend", "number", "ranks"),
    [("ddp", signal.SIGINT, (0, 1)), ("ddp", signal.SIGTERM, (1,)), ("zero2", signal.SIGTERM, (0, 1))],
)
def test_a_signal_stops_all_ranks_at_one_step(backend, number, ranks, model, tmp_path):
    whole = tmp_path / "whole"
    codes, said = launch(learn, whole, model, "migu", backend, {"save_steps": 100})
    assert codes == [0, 0], said
    codes, said = launch(learn_signalled, tmp_path, model, backend, number, ranks)
    assert codes == [130, 130], said
    assert said[0] == said[1] == "stopped in task 'toy1' at step 3"
    checkpoints = list((tmp_path / "run" / "work" / "01-toy1").glob("checkpoint-*"))
    assert [path.name for path in checkpoints] == ["checkpoint-3"]
    codes, said = launch(learn, tmp_path, model, "migu", backend, {"save_steps": 100})
    assert codes == [0, 0], said
    assert_same(tmp_path / "run", whole / "run")


def signalled_in_an_evaluation(folder, model):
    from hf_continual.run_state import RunDirectory

    original = RunDirectory.write_cell

    def replaced(self, after, task, cell):
        original(self, after, task, cell)
        os.kill(os.getpid(), signal.SIGTERM)

    RunDirectory.write_cell = replaced
    make_queue(folder / "run", model, accumulation=1).run()


def test_a_signal_in_an_evaluation(model, tmp_path):
    codes, said = launch(signalled_in_an_evaluation, tmp_path, model)
    assert codes == [130, 130], said
    assert said[0] == said[1] == "stopped while scoring after toy0"
    assert (tmp_path / "run" / "tasks" / "00-toy0" / "predictions" / "toy0.json").exists()


# -- plain text --------------------------------------------------------------------------------------------------------


def make_texts(folder, kind, accumulation):
    settings = toy_queue_options(
        lora=False, per_device_train_batch_size=2, gradient_accumulation_steps=accumulation, max_steps=2,
        train_sampling_strategy="sequential", adam_epsilon=1e-3,
    )  # fmt: skip
    if kind == "mlm":
        settings |= {"model": still_masked_model, "processing_class": masked_tokenizer()}
    settings["data"] |= {"block_size": 12}
    training = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": accumulation, "adam_epsilon": 1e-3}
    end = end_task(0, seeds=[1], training={**training, "max_steps": 4})
    tasks = [text_task(0, kind, count=16, end_task=end), text_task(1, kind, count=16)]
    return TaskQueue(folder, tasks=tasks, methods=["migu"], **settings)


def still_masked_model():
    """Without dropout, which two processes draw for other rows than one."""
    config = masked_model().config
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    set_seed(0)
    return RobertaForMaskedLM(config)


def learn_texts(folder, kind):
    make_texts(folder / "run", kind, accumulation=1).run()


def cell_of(run, after, task):
    return json.loads((run / "tasks" / after / "predictions" / f"{task}.json").read_text())


@pytest.mark.parametrize("kind", ["clm", "mlm"])
def test_text_on_two_processes_equals_one(kind, tmp_path):
    """The same blocks and masks, perplexities and end task."""
    make_texts(tmp_path / "alone", kind, accumulation=2).run()
    codes, said = launch(learn_texts, tmp_path, kind)
    assert codes == [0, 0], said
    ours, theirs = snapshot(tmp_path / "run"), snapshot(tmp_path / "alone")
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if isinstance(value, dict):
            assert close(value, ours[name], 1e-5), f"{name} differs"
    for after, task in (("00-domain0", "domain0"), ("01-domain1", "domain0"), ("01-domain1", "domain1")):
        one, two = (cell_of(tmp_path / run, after, task) for run in ("alone", "run"))
        assert two["score"] == pytest.approx(one["score"], rel=1e-5) and two["n"] == one["n"]
        assert two["others"] == pytest.approx(one["others"], rel=1e-5)
    assert "perplexity" in one["metric"] and one["others"]["tokens"] >= 5
