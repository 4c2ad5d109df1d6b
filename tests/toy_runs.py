"""Small queues and recipes, a child process that kills itself at a chosen point, and what to compare afterwards."""

import json
import multiprocessing
import os
import signal
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

from hf_continual import run_state, skill_fusion, task_queue
from hf_continual.lora import LoraView
from hf_continual.methods.base import MethodList
from hf_continual.run_state import RunDirectory
from hf_continual.task_queue import TaskQueue
from hf_continual.testing import tiny_model, toy_queue_options, toy_stream, toy_tokenizer
from hf_continual.trainer import ContinualMixin

STACK = ["inclora", {"name": "migu", "threshold": 0.5}, {"name": "replay", "ratio": 0.3}]
KINDS = {
    "stack": {"methods": STACK},
    "naive": {"methods": []},
    "full": {"methods": ["migu"], "lora": False},
    "t5": {"methods": ["inclora"], "kind": "t5"},
    "seekr": {"methods": [{"name": "seekr", "count": 3, "layers": 2, "heads": 4, "query_rows": 4}]},
    "kif": {"methods": [{"name": "kif", "replay_count": 6, "fusion": "categorical", "quantile": 0.5}]},
}


def make_queue(folder, name="naive", *, tasks=2, options=None, callbacks=(), **training):
    chosen = dict(KINDS[name])
    queue_options = toy_queue_options(
        chosen.pop("kind", "llama"), lora=chosen.pop("lora", True), **{"learning_rate": 5e-2, **training}
    )
    queue_options["evaluation"] |= {"max_new_tokens": 2}
    for section, values in (options or {}).items():
        queue_options[section] = {**queue_options.get(section, {}), **values}
    stream = toy_stream(tasks, rows=8, eval_rows=4)
    return TaskQueue(folder, tasks=stream, callbacks=callbacks, **chosen, **queue_options)


def snapshot(run):
    """Everything a run has learnt and scored, by file: weights, methods' state, predictions, scores."""
    run, found = Path(run), {}
    for path in sorted([*run.glob("tasks/**/*"), *run.glob("base/**/*"), run / "scores.jsonl"]):
        name = str(path.relative_to(run))
        if path.suffix == ".safetensors":
            found[name] = load_file(str(path))
        elif path.suffix == ".arrow" or "predictions" in path.parts[:-1] or path.suffix == ".jsonl":
            found[name] = path.read_bytes()
        elif path.suffix == ".json" and (path.parent.name == "methods" or path.name in ("buffer.json", "index.json")):
            found[name] = path.read_text()
    return found


def assert_same(run, reference):
    ours, theirs = snapshot(run), reference if isinstance(reference, dict) else snapshot(reference)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if isinstance(value, dict):
            assert value.keys() == ours[name].keys(), name
            assert all(torch.equal(tensor, ours[name][key]) for key, tensor in value.items()), f"{name} differs"
        else:
            assert ours[name] == value, f"{name} differs"
    assert not (Path(run) / "work").exists()


# -- a process that dies ---------------------------------------------------------------------------------------------


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def _before(owner, name, when):
    original = getattr(owner, name)

    def replaced(*args, **kwargs):
        if when(*args, **kwargs):
            die()
        return original(*args, **kwargs)

    setattr(owner, name, replaced)


def _half_written(path, value):
    Path(path).write_text(json.dumps(value)[: len(json.dumps(value)) // 2])
    die()


def _in_step():
    original = ContinualMixin.training_step

    def replaced(self, *args, **kwargs):
        loss = original(self, *args, **kwargs)
        if self.task.index == 1 and self.state.global_step == 3:  # gradients are there, the optimizer has not stepped
            die()
        return loss

    ContinualMixin.training_step = replaced


def _in_trainer_state():
    from transformers import TrainerState

    original = TrainerState.save_to_json

    def replaced(self, path):
        original(self, path)
        if self.global_step == 4 and "01-toy1" in str(path):
            Path(path).write_text(Path(path).read_text()[:200])
            die()

    TrainerState.save_to_json = replaced


def _in_task_end():
    original = MethodList.on_task_end

    def replaced(self, ctx):
        if ctx.task.index == 1:
            self.methods[0].on_task_end(ctx)
            die()
        original(self, ctx)

    MethodList.on_task_end = replaced


def _in_optimizer_file():
    from transformers import Trainer

    _before(Trainer, "_save_optimizer_and_scheduler",
            lambda self, folder: self.task.index == 1 and folder.endswith("checkpoint-4"))  # fmt: skip


POINTS = {
    "before the first queue.json": lambda: _before(RunDirectory, "write_queue", lambda *a: True),
    "in a step": _in_step,
    "in a checkpoint, before its optimizer": _in_optimizer_file,
    "in a checkpoint, in its last file": _in_trainer_state,
    "in the end of a task": _in_task_end,
    "in the export of the adapters": lambda: _before(LoraView, "export", lambda self, f: f.parent.name[:2] == "01"),
    "in a commit": lambda: _before(task_queue, "write_json", lambda p, v: p.name == "log.json" and "01-" in str(p)),
    "in the manifest": lambda: _before(run_state, "write_json", lambda p, v: "01-" in str(p) and "manifest" in p.name),
    "between commit and clean-up": lambda: _before(RunDirectory, "drop_work", lambda self, task: task.index == 1),
    "in the evaluation": lambda: _before(RunDirectory, "write_cell", lambda self, after, task, cell: task.index == 1),
    "between predictions and score": lambda: _before(
        run_state, "write_json", lambda p, v: p.name == "toy0.json" and "01-" in str(p)
    ),
    "between scores and queue.json": lambda: _before(RunDirectory, "write_queue", lambda self, q: q["cursor"] == 2),
}


def _in_answers():
    from hf_continual.run_state import PartialAnswers

    original = PartialAnswers.add

    def replaced(self, found):
        original(self, found)
        if "01-toy1" in str(self._own) and "toy0" in self._own.name:  # the first of two groups
            die()

    PartialAnswers.add = replaced


def _before_answers_are_dropped():
    from hf_continual.run_state import PartialAnswers

    _before(PartialAnswers, "drop", lambda self: "01-toy1" in str(self._own))


SCORING_POINTS = {"in the answers": _in_answers, "before the answers are dropped": _before_answers_are_dropped}


def _in_replay_phase():
    original = ContinualMixin.training_step

    def replaced(self, *args, **kwargs):
        loss = original(self, *args, **kwargs)
        if self._phase is not None and self.state.global_step == 1:  # one optimizer step is done
            die()
        return loss

    ContinualMixin.training_step = replaced


FUSION_POINTS = {  # the first task has neither a fusion nor a phase
    "in a step": _in_step,
    "in the merge": lambda: _before(skill_fusion, "fuse", lambda *a: True),
    "between merge and replay phase": lambda: _before(ContinualMixin, "_run_phase", lambda *a: True),
    "in the replay phase": _in_replay_phase,
    "in the end of a task": _in_task_end,
}


def _in_signals():
    from hf_continual.signals import SignalStore

    original = SignalStore.write

    def replaced(self, row_id, signals):
        if row_id.startswith("001") and sum(known.startswith("001") for known in self.ids) == 2:
            (self.folder / f".{row_id}.safetensors.tmp").write_bytes(b"half a row")
            die()
        original(self, row_id, signals)

    SignalStore.write = replaced


def _in_buffer():
    from hf_continual.replay import ReplayBuffer

    _before(ReplayBuffer, "add", lambda self, index, *a: index == 1)


def _in_saved_buffer():
    from hf_continual.signals import SignalStore

    _before(SignalStore, "save", lambda self, folder: "01-toy1.tmp" in str(folder))


SIGNAL_POINTS = {
    "in a step": _in_step,
    "in the signals of the second task": _in_signals,
    "between signals and buffer": _in_buffer,
    "in the buffer of a commit": _in_saved_buffer,
}


def _child(folder, name, point, training):
    torch.set_num_threads(1)
    {**POINTS, **FUSION_POINTS, **SIGNAL_POINTS, **SCORING_POINTS}[point]()
    make_queue(folder, name, **training).run()


def run_until_killed(folder, name, point, **training):
    # A server that has imported the package and run nothing: forking it is quick and, unlike forking pytest, safe.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hf_continual.task_queue", "hf_continual.testing"])
    child = context.Process(target=_child, args=(folder, name, point, training))
    child.start()
    child.join(120)
    assert child.exitcode == -signal.SIGKILL, f"the child ended with {child.exitcode} before it came to the point"


# -- recipes ---------------------------------------------------------------------------------------------------------


def save_model(folder, **changes):
    """A tiny Llama with its tokenizer; `changes` set attributes of the tokenizer."""
    tiny_model("llama").save_pretrained(str(folder))
    tokenizer = toy_tokenizer()
    for key, value in changes.items():
        setattr(tokenizer, key, value)
    tokenizer.save_pretrained(str(folder))
    return folder


def write_rows(path, task, rows=8):
    """Rows of toy task number `task` as JSON lines with `input` and `output`."""
    stream = toy_stream(task + 1, rows=rows)
    lines = [{"input": row["prompt"], "output": row["completion"]} for row in stream[task].train_dataset]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def write_recipe(folder, model, **sections):
    """A recipe of two toy tasks with its data in `folder`; returns the recipe's path."""
    folder = Path(folder)
    for index, name in enumerate("abc"):
        write_rows(folder / "data" / f"{name}.jsonl", index)
    recipe = {
        "model": {"name": str(model)},
        "peft": {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]},
        "training": {
            "per_device_train_batch_size": 4, "num_train_epochs": 1, "learning_rate": 0.05, "use_cpu": True,
            "disable_tqdm": True, "save_steps": 1, "logging_steps": 1,
        },
        "data": {"max_prompt_length": 16, "max_completion_length": 4},
        "evaluation": {"batch_size": 8, "max_new_tokens": 2},
        "tasks": [{"name": name, "path": f"data/{name}.jsonl", "eval_fraction": 0.25} for name in "ab"],
        "methods": ["migu"],
        "run_dir": str(folder / "run"),
    }  # fmt: skip
    recipe |= sections
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in recipe.items() if v is not ...}))
    return path
