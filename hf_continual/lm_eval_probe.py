"""lm-evaluation-harness on the live model: before the first task and after the last one, or at every task.

The model in memory is handed over as it is (`HFLM(pretrained=model)`): nothing is loaded a second time, a PEFT model
keeps its adapters, and training mode, cache setting and random numbers are what they were. With several processes rank
0 evaluates alone and the others wait, however long it takes.

Tasks are those of lm-eval, most of which read data sets of the hub, or your own: YAML files in `include_path`. A task
with `dataset_path: json` and `dataset_kwargs: {data_files: ...}` needs no network.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import logging
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .errors import InputError, did_you_mean, refuse_unknown
from .general_ability import LM_EVAL, Measured, model_mode
from .models import first_line

if TYPE_CHECKING:
    from .evaluation import EvaluationConfig

INSTALL = 'pip install "hf_continual[eval]"'
KEYS = ("tasks", "include_path", "limit", "num_fewshot", "batch_size", "when")
WHEN = ("before_after", "every_task")
SEED = 1234
"""Of few-shot examples and bootstraps, lm-eval's own default."""


def check_lm_eval(value: Any, batch_size: int) -> dict[str, Any] | None:
    """`evaluation.lm_eval` with its defaults filled in.

    Raises:
        InputError: for an unknown key or a value that cannot be.
    """
    if value is None or value is False:
        return None
    if not isinstance(value, Mapping):
        raise InputError(f"evaluation.lm_eval={value!r} must be a mapping such as {{tasks: [arc_easy], limit: 100}}")
    refuse_unknown(value, KEYS, "evaluation.lm_eval.")
    options = {
        "include_path": None, "limit": None, "num_fewshot": None, "batch_size": batch_size, "when": WHEN[0], **value
    }  # fmt: skip
    tasks = options.get("tasks")
    tasks = [tasks] if isinstance(tasks, str) else tasks
    if not isinstance(tasks, (list, tuple)) or not tasks or not all(isinstance(t, str) and t for t in tasks):
        raise InputError(f"evaluation.lm_eval.tasks={tasks!r} must be a list of names of lm-eval's tasks")
    options["tasks"] = list(dict.fromkeys(tasks))
    path = options["include_path"]
    if path is not None:
        if not isinstance(path, (str, Path)) or not str(path):
            raise InputError(f"evaluation.lm_eval.include_path={path!r} must be a folder with YAML files of tasks")
        options["include_path"] = str(path)
    for option, low in (("limit", 1), ("num_fewshot", 0), ("batch_size", 1)):
        number = options[option]
        if number is None and option != "batch_size":
            continue
        if not isinstance(number, int) or isinstance(number, bool) or number < low:
            raise InputError(f"evaluation.lm_eval.{option}={number!r} must be a whole number, at least {low}")
    if options["when"] not in WHEN:
        raise InputError(f"evaluation.lm_eval.when={options['when']!r} is unknown{did_you_mean(options['when'], WHEN)}")
    return {key: options[key] for key in KEYS}


class LmEvalProbe:
    """`evaluation.lm_eval` of a queue.

    Raises:
        InputError: if lm-eval is not installed, or there is no such folder.
    """

    name = LM_EVAL

    def __init__(self, config: EvaluationConfig) -> None:
        self.options = dict(config.lm_eval or {})
        if importlib.util.find_spec("lm_eval") is None:
            raise InputError(
                f"evaluation.lm_eval needs lm-eval, which is not installed; run `{INSTALL}`, or leave it out"
            )
        path = self.options["include_path"]
        if path is not None and not Path(path).expanduser().is_dir():
            raise InputError(f"evaluation.lm_eval.include_path={path}: there is no such folder")
        self._manager: Any = None

    def wanted(self, index: int, last: int) -> bool:
        return self.options["when"] == "every_task" or index in (-1, last)

    def settings(self) -> dict[str, Any]:
        """The options that change results, and a hash of the files of your own tasks."""
        import importlib.metadata

        kept = {key: self.options[key] for key in ("tasks", "limit", "num_fewshot")}
        return {**kept, "lm_eval": importlib.metadata.version("lm_eval"), "include_sha256": self._hash()}

    def _hash(self) -> str | None:
        path = self.options["include_path"]
        if path is None:
            return None
        digest = hashlib.sha256()
        root = Path(path).expanduser()
        for file in sorted(p for p in root.rglob("*") if p.is_file() and "__pycache__" not in p.parts):
            digest.update(str(file.relative_to(root)).encode() + b"\0")
            digest.update(hashlib.sha256(file.read_bytes()).digest())
        return digest.hexdigest()

    def check(self, model: Any, tokenizer: Any) -> None:
        """Load the tasks, with their data.

        Raises:
            InputError: for a masked model, an unknown task, or one whose data cannot be had.
        """
        if model_mode(model, "evaluation.lm_eval") == "masked":
            raise InputError(
                f"evaluation.lm_eval: lm-eval has no masked language models such as {type(model).__name__}; leave it "
                "out, evaluation.general measures them"
            )
        self._load()

    def _load(self) -> Any:
        """lm-eval's tasks, made anew each time: evaluating fills them."""
        from lm_eval.tasks import TaskManager

        names, path = self.options["tasks"], self.options["include_path"]
        root = None if path is None else str(Path(path).expanduser())
        with _quiet(), _kept_random_state():
            if self._manager is None:
                if root is not None:
                    own = TaskManager(include_path=root, include_defaults=False)
                    self._manager = own if all(own.match_tasks([name]) for name in names) else None
                if self._manager is None:  # reading lm-eval's thousands of files takes seconds
                    self._manager = TaskManager(include_path=root)
            for name in names:
                if not self._manager.match_tasks([name]):
                    where = "" if root is None else f" nor of include_path={root}"
                    raise InputError(
                        f"evaluation.lm_eval.tasks: '{name}' is no task of lm-eval{where}"
                        f"{did_you_mean(name, self._manager.all_tasks)}"
                    )
            try:
                loaded = self._manager.load(self._manager.match_tasks(names))
            except Exception as error:  # of YAML, of the user's Python files, of datasets and of the network
                raise InputError(
                    f"evaluation.lm_eval.tasks={names}: their definition or data cannot be loaded "
                    f"({first_line(error)}); check the YAML file, and whether the data is there or can be reached"
                ) from error
        for name, task in loaded["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False) or getattr(task.config, "unsafe_code", False):
                raise InputError(
                    f"evaluation.lm_eval.tasks: '{name}' runs code that the model has written; leave it out, or run it "
                    "with lm-eval itself on the merged model"
                )
        return loaded

    def measure(self, model: Any, tokenizer: Any, dtype: torch.dtype | None, tick: Callable[[], None]) -> Measured:
        """Scores of each task.

        Returns:
            values: `scores`, `stderr` {task: {metric: value}} and `samples` {task: number}; details: one row a task.
        """
        import lm_eval

        from .evaluation import evaluating

        loaded, shots = self._load(), self.options["num_fewshot"]
        for task in loaded["tasks"].values():  # as lm_eval.simple_evaluate does
            own = task.get_config("num_fewshot")
            if own is None or (shots is not None and own != 0):
                task.set_config(key="num_fewshot", value=shots or 0)
            task.set_fewshot_seed(seed=SEED)
        with _quiet(), _kept_random_state(), evaluating(model), torch.no_grad():
            live = _live_model(model, tokenizer, self.options["batch_size"], dtype, tick)
            results = lm_eval.evaluate(
                lm=live, task_dict=loaded, limit=self.options["limit"], bootstrap_iters=1000, log_samples=False
            )
        scores: dict[str, dict[str, float]] = {}
        errors: dict[str, dict[str, float]] = {}
        samples: dict[str, int] = {}
        for task, found in results["results"].items():  # groups are in here too, and lists of what belongs to them
            for key, value in found.items():
                if "," not in key or isinstance(value, (str, bool)) or value is None:
                    continue
                metric, filter_name = key.split(",", 1)
                metric = metric if filter_name == "none" else f"{metric}/{filter_name}"
                where = errors if "_stderr" in metric else scores
                where.setdefault(task, {})[metric.replace("_stderr", "")] = float(value)
            if task in results.get("n-samples", {}):
                samples[task] = int(results["n-samples"][task]["effective"])
        details = [
            {
                "task": task,
                "version": results["versions"].get(task),
                "num_fewshot": results["n-shot"].get(task),
                "samples": samples.get(task),
                "scores": found,
                "stderr": errors.get(task, {}),
            }
            for task, found in scores.items()
        ]
        return Measured({"scores": scores, "stderr": errors, "samples": samples}, details, self.settings())

    def line(self, values: Mapping[str, Any]) -> str:
        shown = [f"{task} {m} {100 * v:.1f}" if abs(v) <= 1 else f"{task} {m} {v:.2f}"
                 for task, found in values["scores"].items() for m, v in found.items()]  # fmt: skip
        return f"lm-eval: {', '.join(shown)}"


def _live_model(model: Any, tokenizer: Any, batch_size: int, dtype: torch.dtype | None, tick: Any) -> Any:
    from lm_eval.models.huggingface import HFLM

    class LiveModel(HFLM):  # type: ignore[misc, valid-type]
        """The model as it is; `tick` is called before each batch."""

        def _model_call(self, *args: Any, **kwargs: Any) -> Any:
            tick()
            return super()._model_call(*args, **kwargs)

        def _model_generate(self, *args: Any, **kwargs: Any) -> Any:
            tick()
            return super()._model_generate(*args, **kwargs)

    own = copy.deepcopy(tokenizer)  # lm-eval changes the side of padding
    extra = {} if dtype is None else {"mixed_precision_dtype": dtype}
    return LiveModel(pretrained=model, tokenizer=own, batch_size=batch_size, **extra)


@contextmanager
def _kept_random_state() -> Iterator[None]:
    """lm-eval draws from the global generators, also when it loads a task; the training must not notice."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval warns about every default that is used."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
