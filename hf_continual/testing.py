"""Public test kit: tiny models, toy streams, and `check_method`, the contract every method keeps.

Everything is built from configurations and seeds; nothing is downloaded.
"""

from __future__ import annotations

import copy
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
    Seq2SeqTrainer,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    set_seed,
)

from .errors import InputError
from .methods.base import ContinualMethod, make_method
from .models import fix_loss_scaling
from .tasks import Task
from .trainer import ContinualMixin, ContinualSeq2SeqTrainer, ContinualTrainer
from .training_args import ContinualSeq2SeqTrainingArguments, ContinualTrainingArguments

VOCABULARY = 96
LORA_TARGETS = {
    "llama": ["q_proj", "v_proj"],
    "t5": ["q", "v"],
    "bert": ["query", "value"],
    "roberta": ["query", "value"],
}
MODELS = ("llama", "t5", "bert", "roberta")


def tiny_model(kind: str = "llama", *, lora: bool = False, seed: int = 0, dropout: float = 0.0, rank: int = 4) -> Any:
    """A random two-layer model: `llama`, `t5`, `bert` or `roberta` (the last two classify into three labels)."""
    set_seed(seed)
    small: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    if kind == "llama":
        config: Any = LlamaConfig(
            vocab_size=VOCABULARY,
            num_key_value_heads=2,
            max_position_embeddings=128,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            attention_dropout=dropout,
            **small,
        )
        model: Any = LlamaForCausalLM(config)
    elif kind == "t5":
        t5_config: Any = T5Config  # its decoder_start_token_id is a plain keyword
        config = t5_config(
            vocab_size=VOCABULARY,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            dropout_rate=dropout,
            pad_token_id=0,
            eos_token_id=2,
            decoder_start_token_id=0,
        )
        model = T5ForConditionalGeneration(config)
    elif kind in ("bert", "roberta"):
        classifiers: dict[str, tuple[Any, Any]] = {
            "bert": (BertConfig, BertForSequenceClassification),
            "roberta": (RobertaConfig, RobertaForSequenceClassification),
        }
        config_class, model_class = classifiers[kind]
        config = config_class(
            vocab_size=VOCABULARY,
            max_position_embeddings=130,
            num_labels=3,
            pad_token_id=0,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            **small,
        )
        model = model_class(config)
    else:
        raise InputError(f"tiny_model: kind={kind!r} is unknown; choose one of {', '.join(MODELS)}")
    model = fix_loss_scaling(model)
    if lora:
        task_type = {"llama": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM"}.get(kind)
        set_seed(seed + 1)
        model = get_peft_model(
            model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LORA_TARGETS[kind], task_type=task_type)
        )
    return model


def toy_rows(kind: str = "llama", *, rows: int = 16, length: int = 10, seed: int = 0) -> datasets.Dataset:
    """Random tokenised rows for `tiny_model(kind)`, all of one length (so that a sum of means is a mean)."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    columns: dict[str, Any] = {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}
    if kind == "llama":
        columns["labels"] = ids.tolist()
    elif kind == "t5":
        columns["labels"] = torch.randint(3, VOCABULARY, (rows, 5), generator=generator).tolist()
    else:
        columns["labels"] = torch.randint(0, 3, (rows,), generator=generator).tolist()
    return datasets.Dataset.from_dict(columns)


TOY_WORDS_OF_TASKS = [":", "Answer", "say", "red", "blue", "green", "dog", "cat", "bird", "one", "two", "three"]
TOY_WORDS = ["<pad>", "<s>", "</s>", "<unk>", *TOY_WORDS_OF_TASKS, *[f"w{i}" for i in range(70)]]


def toy_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer that fits `tiny_model`; unknown words become `<unk>`."""
    words = {word: i for i, word in enumerate(TOY_WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def toy_stream(tasks: int = 3, *, rows: int = 16, eval_rows: int = 6, seed: int = 0) -> list[Task]:
    """Tasks of text rows (`prompt`, `completion`, `references`) for `toy_tokenizer`; each task has its own answers."""
    answers = [["red", "blue", "green"], ["dog", "cat", "bird"], ["one", "two", "three"]]
    stream = []
    for index in range(tasks):
        generator = torch.Generator().manual_seed(seed + index)
        labels = answers[index % len(answers)]
        splits = []
        for count in (rows, eval_rows):
            drawn = torch.randint(0, 70, (count, 3), generator=generator).tolist()
            prompts = [" ".join(f"w{i}" for i in words) + f" say w{index} Answer :" for words in drawn]
            answer = [labels[words[0] % len(labels)] for words in drawn]
            splits.append(
                datasets.Dataset.from_dict(
                    {"prompt": prompts, "completion": answer, "references": [[a] for a in answer]}
                )
            )
        stream.append(Task(f"toy{index}", splits[0], splits[1], labels=labels, index=index))
    return stream


def toy_queue_options(kind: str = "llama", *, lora: bool = True, **training: Any) -> dict[str, Any]:
    """Keyword arguments for a `TaskQueue` over `toy_stream` that trains in about a second a task."""
    return {
        "model": lambda: tiny_model(kind),
        "processing_class": toy_tokenizer(),
        "peft_config": LoraConfig(r=4, lora_alpha=8, target_modules=LORA_TARGETS[kind]) if lora else None,
        "args": {
            "per_device_train_batch_size": 4,
            "num_train_epochs": 2,
            "learning_rate": 1e-2,
            "use_cpu": True,
            "save_steps": 2,
            "disable_tqdm": True,
            "logging_steps": 4,
            **training,
        },
        "evaluation": {"batch_size": 4, "max_new_tokens": 4},
        "data": {"max_prompt_length": 16, "max_completion_length": 4},
    }


def train_task(
    model: Any,
    rows: Any,
    methods: Any,
    folder: str | Path,
    *,
    kind: str = "llama",
    callbacks: Any = None,
    resume: Any = None,
    task: Any = None,
    trainer_class: type[Any] | None = None,
    **options: Any,
) -> Any:
    """Train one task on one CPU process; returns the trainer. `options` are training arguments."""
    seq2seq = kind == "t5"
    args_class = ContinualSeq2SeqTrainingArguments if seq2seq else ContinualTrainingArguments
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "num_train_epochs": 1,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        **options,
    }
    args = args_class(output_dir=str(folder), **settings)
    cls = trainer_class or (ContinualSeq2SeqTrainer if seq2seq else ContinualTrainer)
    kwargs = {"methods": methods, "task": task} if issubclass(cls, ContinualMixin) else {}
    trainer = cls(model=model, args=args, train_dataset=rows, callbacks=callbacks, **kwargs)
    trainer.remove_callback(_printer())
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def _printer() -> Any:
    from transformers.trainer_callback import PrinterCallback

    return PrinterCallback


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def backend_options(backend: str) -> dict[str, Any]:
    """Training arguments that ask for one of `hf_continual.distributed.BACKENDS`, for models as small as these."""
    if backend.startswith("zero"):
        zero: dict[str, Any] = {"stage": int(backend[-1])}
        if zero["stage"] == 3:
            zero["stage3_param_persistence_threshold"] = 0  # weights this small would never be split
        return {
            "deepspeed": {
                "train_micro_batch_size_per_gpu": "auto",
                "gradient_accumulation_steps": "auto",
                "gradient_clipping": "auto",
                "zero_optimization": zero,
                "bf16": {"enabled": "auto"},
            }
        }
    if backend == "fsdp2":
        return {
            "fsdp": True,
            "fsdp_config": {
                "version": 2,
                "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
                "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
                "reshard_after_forward": True,
                "state_dict_type": "FULL_STATE_DICT",
            },
        }
    return {}


def close(a: Mapping[str, Tensor], b: Mapping[str, Tensor], tolerance: float) -> bool:
    """Every tensor within `tolerance`, relative to its largest entry."""
    return a.keys() == b.keys() and all(
        float((a[n].double() - b[n].double()).abs().max()) <= tolerance * (float(a[n].double().abs().max()) + 1e-8)
        for n in a
        if a[n].numel()
    )


def hook_count(model: nn.Module) -> int:
    """Forward hooks of all modules plus tensor hooks of all parameters."""
    forward = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    return forward + sum(len(p._backward_hooks or ()) for p in model.parameters())


# -- the contract ------------------------------------------------------------------------------------------------------


@dataclass
class CheckResult:
    """One check of `check_method` on one model."""

    name: str
    model: str
    passed: bool
    detail: str = ""


class _Skipped(Exception):
    """Why a check does not apply."""


class _StopAfter(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            control.should_training_stop = True


class _Raise(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        raise RuntimeError("raised on purpose")


class _Contract:
    """The checks, each a method whose name says what holds; an AssertionError says what does not."""

    def __init__(self, make: Callable[[], ContinualMethod[Any]], kind: str, lora: bool, folder: Path) -> None:
        self.make, self.kind, self.lora, self.folder = make, kind, lora, folder
        self.data = [toy_rows(kind, rows=16, seed=i) for i in range(3)]
        self._count = 0

    def _model(self) -> Any:
        return tiny_model(self.kind, lora=self.lora)

    def _train(self, model: Any, index: int, methods: Any, **options: Any) -> Any:
        self._count += 1
        folder = options.pop("folder", self.folder / str(self._count))
        data = options.pop("data", self.data[index])
        return train_task(model, data, methods, folder, kind=self.kind, **options)

    def _stream(self, methods: Any, tasks: int = 2, **options: Any) -> Any:
        model = self._model()
        for index in range(tasks):
            self._train(model, index, methods, **options)
        return model

    def check_neutral_setting_equals_trainer(self) -> None:
        neutral = type(self.make()).neutral
        if neutral is None:
            raise _Skipped("the method declares no neutral options")
        plain = self._model()
        for index in range(2):
            cls = Seq2SeqTrainer if self.kind == "t5" else Trainer
            self._train(plain, index, None, trainer_class=cls)
        ours = self._stream([type(self.make())(**neutral)])
        assert equal(weights(plain), weights(ours)), (
            "with its neutral options the weights differ from a plain Trainer's"
        )

    def check_accumulation_equals_large_batch(self) -> None:
        if self.make().counts_micro_batches:
            raise _Skipped("the method counts micro-batches")
        large = self._stream(
            [self.make()], per_device_train_batch_size=8, train_sampling_strategy="sequential", optim="sgd"
        )
        small = self._stream(
            [self.make()],
            per_device_train_batch_size=2,
            gradient_accumulation_steps=4,
            train_sampling_strategy="sequential",
            optim="sgd",
        )
        assert close(weights(large), weights(small), 2e-4), (
            "4 micro-batches of 2 and 1 batch of 8 give different weights"
        )

    def check_evaluation_loss_is_the_task_loss(self) -> None:
        methods = [self.make()]
        model = self._stream(methods, tasks=1)
        trainer = self._train(model, 1, methods)
        ours = trainer.evaluate(self.data[2])["eval_loss"]
        plain_class = Seq2SeqTrainer if self.kind == "t5" else Trainer
        other = plain_class(model=trainer.model, args=trainer.args)
        other.remove_callback(_printer())
        plain = other.evaluate(self.data[2])["eval_loss"]
        assert ours == plain, f"the evaluation loss is {ours} with the method and {plain} without"

    def check_resume_within_a_task_is_exact(self) -> None:
        whole = self._stream([self.make()], save_strategy="steps", save_steps=2)
        methods = [self.make()]
        model = self._model()
        self._train(model, 0, methods)
        before = copy.deepcopy((model, methods))
        folder = self.folder / "resume"
        self._train(model, 1, methods, folder=folder, save_strategy="steps", save_steps=2, callbacks=[_StopAfter(2)])
        model, methods = before
        self._train(
            model, 1, methods, folder=folder, save_strategy="steps", save_steps=2, resume=str(folder / "checkpoint-2")
        )
        assert equal(weights(whole), weights(model)), "a run resumed within a task ends with other weights"

    def check_state_survives_between_tasks(self) -> None:
        whole = self._stream([self.make()], tasks=3)
        method, model = self.make(), self._model()
        for index in range(3):
            self._train(model, index, [method])
            state = self.folder / f"state{index}"
            method.save(state)
            method = self.make()
            method.load(state)
        assert equal(weights(whole), weights(model)), "saving and loading the state between tasks changes the weights"

    def check_no_hooks_are_left(self) -> None:
        model = self._model()
        seen: list[int] = []
        handle = next(m for m in model.modules() if isinstance(m, nn.Linear)).register_forward_hook(
            lambda *a: seen.append(1)
        )
        before = hook_count(model)
        methods = [self.make()]
        self._train(model, 0, methods)
        self._train(model, 1, methods)
        assert hook_count(model) == before, "hooks are left behind, or hooks of others are gone"
        assert seen, "a hook that was there before no longer fires"
        handle.remove()

    def check_hooks_are_removed_after_an_exception(self) -> None:
        model, methods = self._model(), [self.make()]
        self._train(model, 0, methods)
        before = hook_count(model)
        try:
            self._train(model, 1, methods, callbacks=[_Raise()])
        except RuntimeError as error:
            assert "on purpose" in str(error), f"another error came first: {error}"
        else:
            raise AssertionError("the exception of a callback did not come through")
        assert hook_count(model) == before, "hooks are left behind after an exception"

    def check_frozen_parameters_do_not_move(self) -> None:
        model = self._model()
        frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
        methods = [self.make()]
        for index in range(2):
            self._train(model, index, methods)
        now = dict(model.named_parameters())
        assert all(torch.equal(value, now[name]) for name, value in frozen.items()), "frozen parameters moved"

    def check_runs_beside_replay_and_migu(self) -> None:
        from .methods.migu import MIGU
        from .methods.replay import Replay

        own = self.make()
        others = [m for m in (Replay(count=4), MIGU(threshold=0.5)) if m.name != own.name]
        methods = [own, *(m for m in others if not m.roles() & own.roles())]
        model = self._model()
        for index in range(2):
            trainer = self._train(model, index, methods)
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert losses and all(torch.isfinite(torch.tensor(losses))), f"losses are {losses}"

    def check_gradient_checkpointing_changes_nothing(self) -> None:
        plain = self._stream([self.make()], optim="sgd")
        checkpointed = self._stream(
            [self.make()],
            optim="sgd",
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": False},
        )
        assert close(weights(plain), weights(checkpointed), 1e-4), "gradient checkpointing changes the weights"

    def check_options_round_trip(self) -> None:
        method = self.make()
        again = type(method)(**method.options())
        assert again.options() == method.options(), "the options do not build an equal method"


def _checks() -> Iterator[str]:
    return (name for name in vars(_Contract) if name.startswith("check_"))


def check_method(
    method: Any, *, kinds: tuple[str, ...] = MODELS, report: Callable[[str], None] | None = None
) -> list[CheckResult]:
    """Check that a method keeps the contract, on tiny models with LoRA and, where it can, with full fine-tuning.

    Args:
        method: a method object, its name, `package.module:Class`, or a mapping with options.
        kinds: models to try, of `llama`, `t5`, `bert`, `roberta`.
        report: called with one line a check.

    Returns:
        One result a check and model. Nothing is raised for a check that fails.

    Raises:
        InputError: if there is no such method.
    """
    prototype = make_method(method)
    options = prototype.options()
    make = lambda: type(prototype)(**copy.deepcopy(options))  # noqa: E731
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for kind in kinds:
            for lora in (True,) if prototype.needs_lora else (True, False):
                label = f"{kind} {'LoRA' if lora else 'full'}"
                for name in _checks():
                    inner = Path(folder) / f"{kind}{lora}{name}"
                    try:
                        getattr(_Contract(make, kind, lora, inner), name)()
                        result = CheckResult(name.removeprefix("check_"), label, True)
                    except _Skipped as reason:
                        result = CheckResult(name.removeprefix("check_"), label, True, f"skipped: {reason}")
                    except AssertionError as error:
                        result = CheckResult(name.removeprefix("check_"), label, False, str(error))
                    except Exception as error:  # a method that raises fails this check; the others still run
                        place = traceback.extract_tb(error.__traceback__)[-1]
                        detail = f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"
                        result = CheckResult(name.removeprefix("check_"), label, False, detail)
                    results.append(result)
                    if report is not None:
                        mark = "ok  " if result.passed else "FAIL"
                        detail = f": {result.detail}" if result.detail else ""
                        report(f"{mark} {label:13} {result.name.replace('_', ' ')}{detail}")
    return results


__all__ = [
    "MODELS",
    "CheckResult",
    "backend_options",
    "check_method",
    "close",
    "equal",
    "hook_count",
    "tiny_model",
    "toy_queue_options",
    "toy_rows",
    "toy_stream",
    "toy_tokenizer",
    "train_task",
    "weights",
]
