"""The Trainer that runs methods: one mixin over any Hugging Face Trainer, a few overrides that all call `super()`.

With no methods it *is* the Trainer it extends. `methods/base.py` shows the order of one step and one task.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, ProgressCallback, Seq2SeqTrainer, Trainer, TrainerCallback, set_seed
from transformers.trainer_callback import DefaultFlowCallback

from .collators import make_collator
from .compilation import CompileReport, CompileWatch, check_compiled, forget_environment, is_compiled, take_off
from .deepspeed_config import mismatches_as_input_errors
from .distributed import (
    Distributed,
    GradientSeam,
    GradView,
    is_partitioned,
    processes,
    release_engine,
)
from .errors import InputError
from .evaluation import evaluate_task
from .interleaving import InterleavedDataset
from .launch_guards import check_launch, check_tied
from .lora import ADAPTER_WEIGHTS, LoraView, load_adapters, trainable_state
from .methods.base import MethodContext, MethodList, TrainingPhase
from .models import check_four_bits, in_four_bits, is_seq2seq, keep_layout
from .tasks import Task
from .trainer_answers import (
    MAX_PROMPT_LENGTH,
    Answering,
    EvalRows,
    GeneratedAnswers,
    answering,
    eval_rows,
    padded,
    task_of,
)
from .training_args import ContinualArgumentsMixin

STATE_FOLDER = "continual"

if TYPE_CHECKING:
    _Parent = Trainer
else:
    _Parent = object


class _ContinualCallback(TrainerCallback):
    """What the Trainer only offers to callbacks."""

    in_phases = True

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._on_optimizer_ready()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._on_optimizer_step()


class ContinualMixin(_Parent):
    """Adds `methods` and `task` to a Hugging Face Trainer; put it first among the bases.

    Args:
        methods (`list`, *optional*): method objects, names or mappings; they learn one task per `train()` call. Pass
            the same objects to the next task's trainer. Defaults to `args.methods`.
        task ([`Task`] or `str`, *optional*): the task that the next `train()` learns; by default `task<N>`, counted by
            the methods, which also number a `Task` whose `index` is that of a task they have already learnt.

    Every other argument is the parent's. With methods, `model_init` is called once, by the constructor.

    With `args.predict_with_generate`, `evaluate()` and `predict()` also generate an answer to the prompt of each row:
    see `evaluate`.
    """

    methods: MethodList = MethodList()  # for what the parent calls while it is constructed
    _seam: GradientSeam | None = None
    _phase: TrainingPhase | None = None
    _load_late: Path | None = None
    _compile_watch: CompileWatch | None = None
    _answering: tuple[Answering, EvalRows, Task] | None = None

    def __init__(
        self, *args: Any, methods: Iterable[Any] | None = None, task: Task | str | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        forget_environment(self.args)
        from_args = getattr(self.args, "methods", None)
        if methods is not None and from_args:
            raise InputError("methods are given twice, to the trainer and in args.methods; give them once")
        self.methods = (
            methods
            if isinstance(methods, MethodList)
            else MethodList(methods if methods is not None else from_args or ())
        )
        self.task = task
        self.dist = Distributed(self.accelerator)
        self.ctx: MethodContext | None = None
        self.interrupted = False
        """Set it to end a task early without merging: `train()` then returns before `on_task_end`."""
        self.compile_report: CompileReport | None = None
        """Graphs and graph breaks of the last training, if it was compiled."""
        self.seeds_per_task = False
        """Whether `args.seed` differs between tasks, as in the queue; else new adapters are drawn from seed + index."""
        self._forward_seen = self._seam_passed = False
        self._phase: TrainingPhase | None = None
        self._phase_keep: dict[str, Tensor] | None = None
        self._new_parameters: list[str] = []
        self._made_optimizer: Any = None
        self._logged: dict[str, tuple[Tensor, int]] = {}
        self._nonfinite: Tensor | None = None
        if self.methods:
            self.add_callback(_ContinualCallback(self))

    # -- one task ----------------------------------------------------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Learn one task: begin, train as the parent does, merge, end. Arguments and result are the parent's.

        To resume, give the constructor the model as it was before the task (the checkpoint then replaces what has been
        trained since), and methods with the same options.
        """
        check_launch(self.args, self.dist)
        check_tied(self.model, self.dist.backend)
        if self._generates and self.args.eval_strategy != "no":
            self._check_answering()
        if in_four_bits(self.model):
            keep_layout(self.model)
            check_four_bits(self.model, True, self.dist.backend, self.args.device)
        self._nonfinite, self._logged, self.interrupted = None, {}, False
        kwargs["ignore_keys_for_eval"] = ignore_keys_for_eval
        compiled = is_compiled(self.accelerator, self.model)
        self.compile_report, self._compile_watch = None, None
        if compiled:
            take_off(self.accelerator.unwrap_model(self.model, keep_torch_compile=False))
            self._compile_watch = CompileWatch()
        if not self.methods:
            with mismatches_as_input_errors():
                output = super().train(resume_from_checkpoint=resume_from_checkpoint, trial=trial, **kwargs)
            self._check_finite()
            self._end_compiled()
            return output
        if compiled:
            check_compiled(self.model, self.dist.backend, [method.name for method in self.methods])
        if trial is not None:
            self._refuse_search()
        if self.args.n_gpu > 1:
            raise InputError(
                f"one process sees {self.args.n_gpu} GPUs and would run torch.nn.DataParallel, whose replicas "
                "the methods "
                "cannot follow; start one process a GPU with `accelerate launch`, or set CUDA_VISIBLE_DEVICES to one"
            )
        checkpoint = self._resolve_checkpoint(resume_from_checkpoint)
        if checkpoint is not None:
            self._load_methods(Path(checkpoint))  # how many tasks are done, before the task begins
        # DeepSpeed loads its checkpoints without `_load_from_checkpoint`, where the methods' state is read again.
        self._load_late = Path(checkpoint) if checkpoint is not None and self.dist.backend.startswith("zero") else None
        ctx = self.ctx = self._make_context()
        self.methods.check(ctx)
        if self.dist.backend == "fsdp2" and any(is_partitioned(p) for p in ctx.model.parameters()):
            raise InputError(
                "the model was trained with FSDP2 before, which cannot wrap it again; save it with "
                "trainer.save_model() and load it anew for each task"
            )
        original, collator = self.train_dataset, self.data_collator
        model_init: Any = self.model_init
        self.model_init: Any = None  # the parent would begin every task with a new model
        if self.optimizer is not None and self.optimizer is self._made_optimizer:
            self.optimizer = None  # the parent would keep the last task's, with its moments and without new parameters
        makes_optimizer = self.optimizer is None
        if compiled:
            torch.compiler.reset()  # code compiled for an earlier task would be reused, without this task's taps
        try:
            before = {id(p) for p in ctx.model.parameters() if p.requires_grad}
            self.methods.on_task_begin(ctx)
            self._new_parameters = [
                name for name, p in ctx.model.named_parameters() if p.requires_grad and id(p) not in before
            ]
            previous = trainable_state(ctx.model) if self.methods.merges else {}
            self.train_dataset = self.methods.train_dataset(ctx, original)
            self.data_collator = self.methods.data_collator(ctx, collator)
            if isinstance(self.train_dataset, InterleavedDataset):
                self.data_collator = self.train_dataset.collator(self.data_collator)
            self._seam = GradientSeam(ctx.model, self.dist, lambda grads: self.methods.gradient_hooks(ctx, grads))
            with self.methods.task_context(ctx), mismatches_as_input_errors():
                output = super().train(resume_from_checkpoint=checkpoint, **kwargs)
            self._check_finite()
        finally:
            if self._seam is not None:
                self._seam.detach()
            self._seam = None
            if compiled:
                torch.compiler.reset()  # a phase would run code that has the taps
            self.train_dataset, self.data_collator, self.model_init = original, collator, model_init
            if makes_optimizer:
                self._made_optimizer = self.optimizer
        if not self.interrupted:
            if self.methods.merges:
                self.methods.merge(ctx, previous)
            for phase in self.methods.training_phases(ctx):
                self._run_phase(ctx, phase)
                if self.interrupted:
                    break
        self._end_compiled()
        if not self.interrupted:
            self.methods.on_task_end(ctx)
            self.task = None
        return output

    def _end_compiled(self) -> None:
        if self._compile_watch is not None:
            self.compile_report = self._compile_watch.log("of the whole training")
            entry: Any = {**self.compile_report.as_log(), "step": self.state.global_step}
            self.state.log_history.append(entry)
            self._compile_watch = None

    def _run_phase(self, ctx: MethodContext, phase: TrainingPhase) -> None:
        """Train on what a method gives, with a new optimizer, then put everything back as it was."""
        before = {name: getattr(self, name) for name in ("args", "state", "train_dataset", "model_init", "optimizer")}
        scheduler = self.lr_scheduler
        # A copy: constructing TrainingArguments would reset accelerate's state, which the model is prepared with.
        args: Any = copy.copy(self.args)
        fixed = {"max_steps": -1, "save_strategy": "no", "eval_strategy": "no", "load_best_model_at_end": False}
        fixed |= {"dataloader_drop_last": False, "warmup_steps": 0}  # a few kept rows may be less than a batch
        for name, value in {**fixed, **phase.options}.items():
            setattr(args, name, value)
        set_seed(args.seed)  # the same whether or not the training before was resumed
        self.args, self.train_dataset, self.model_init = args, phase.dataset, None
        self.optimizer, self.lr_scheduler, self._phase = None, None, phase
        self._phase_keep = None
        release_engine(self)
        callbacks = self.callback_handler.callbacks
        shown = (DefaultFlowCallback, PrinterCallback, ProgressCallback)
        self.callback_handler.callbacks = [c for c in callbacks if isinstance(c, shown) or hasattr(c, "in_phases")]
        self._seam = GradientSeam(ctx.model, self.dist, self._freeze)
        try:
            super().train()
            self._check_finite()
        finally:
            self._seam.detach()
            self._seam = self._phase = None
            self.callback_handler.callbacks = callbacks
            history: list[Any] = [{"phase": phase.name, **entry} for entry in self.state.log_history]
            for name, value in before.items():
                setattr(self, name, value)
            self.lr_scheduler = scheduler
            self.state.log_history += history
            object.__setattr__(ctx, "state", self.state)

    def _freeze(self, grads: GradView) -> None:
        assert self._phase is not None
        if self._phase.keep:
            if self._phase_keep is None:
                self._phase_keep = {n: mask.to(grads.parameter(n).device) for n, mask in self._phase.keep.items()}
            grads.mul_(self._phase_keep)  # before clipping, which would otherwise count them
            grads.freeze_(self._phase_keep)

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        if self.methods:
            self._refuse_search()
        return super().hyperparameter_search(*args, **kwargs)

    def _refuse_search(self) -> None:
        raise InputError(
            "hyperparameter search cannot run with methods, whose state one trial hands to the next; "
            "search without methods, or start one run per trial"
        )

    def _make_context(self) -> MethodContext:
        task, done = self.task, self.methods.tasks_done
        if not isinstance(task, Task):
            task = Task(name=task or f"task{done}", index=done, train_dataset=self.train_dataset)
        elif task.index < done:
            task = dataclasses.replace(task, index=done)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        # Every Trainer seeds the generator with args.seed: each task's new adapter would start from the same weights.
        adapter_seed = None if self.seeds_per_task else self.args.seed + task.index
        lora = LoraView(model, adapter_seed)
        return MethodContext(
            model,
            task,
            self.dist,
            lora,
            self.state,
            self.args.seed,
            self._log_value,
            self.train_dataset,
            tokenizer=self.processing_class,
            folder=Path(str(self.args.output_dir)) / STATE_FOLDER,
            make_batch=partial(self._make_batch, self.data_collator),
            autocast=self.accelerator.autocast,
            args=self.args,
        )

    def _make_batch(self, own: Any, rows: Sequence[Mapping[str, Any]], collator: Any = None) -> dict[str, Any]:
        """The batch that the Trainer would make of these rows, on its device."""
        self._set_signature_columns_if_needed()
        known: set[str] = set(self._signature_columns or ())
        if self.args.remove_unused_columns:
            rows = [{name: value for name, value in row.items() if name in known} for row in rows]
        return dict(self._prepare_inputs((collator or own)([dict(row) for row in rows])))

    # -- one step ----------------------------------------------------------------------------------------------------

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        own = {column: inputs.pop(column) for column in self.methods.batch_columns if column in inputs}
        alone = self._seam is None or self._phase is not None or not model.training
        if not self.methods or alone:  # the evaluation loss is the task's alone
            self._forward_seen = True
            return super().compute_loss(
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
        self._forward_seen = True
        ctx = self.ctx
        assert ctx is not None
        batch = {**inputs, **own}
        # Before the contexts open, which must not see the forward of a teacher.
        given = {**inputs, **self.methods.forward_kwargs(ctx, batch)}
        with self.methods.forward_context(ctx, batch):  # closed before backward, which may run the forward again
            loss, outputs = self._loss_and_outputs(model, given, return_outputs, num_items_in_batch)
        weight = self.methods.task_loss_weight(ctx, batch)
        if weight != 1.0:
            loss = loss * weight
        extra = self.methods.extra_loss(ctx, batch, outputs)
        if extra:
            for name, value in extra.items():
                self._log_value(name, value)
            loss = loss + self._like_task_loss(
                torch.stack([v.to(loss.device) for v in extra.values()]).sum(), num_items_in_batch
            )
        return (loss, outputs) if return_outputs else loss

    def _loss_and_outputs(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool, num_items_in_batch: Any
    ) -> tuple[Tensor, Any]:
        """The parent's loss, and the model's outputs where someone reads them."""
        wanted = return_outputs or self.methods.overrides("extra_loss")
        result: Any = super().compute_loss(model, inputs, return_outputs=wanted, num_items_in_batch=num_items_in_batch)
        return result if wanted else (result, None)

    def _like_task_loss(self, extra: Tensor, num_items_in_batch: Any) -> Tensor:
        """Scale an extra loss (a mean) as the Trainer scales the task loss under gradient accumulation.

        Where the Trainer takes the task loss for normalised over the whole step it divides nothing, so the extra loss
        is divided here; elsewhere it divides their sum. The rule mirrors `Trainer.training_step`.
        """
        scaled = self.loss_is_scaled_for_ga
        if scaled is None:
            scaled = (
                self.model_accepts_loss_kwargs and num_items_in_batch is not None
            ) or self.compute_loss_func is not None
        return extra / self.current_gradient_accumulation_steps if scaled else extra

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        self._forward_seen = False
        if self._seam is not None:
            self._seam.before_micro_batch()
        loss = super().training_step(model, inputs, *args, **kwargs)
        if self._compile_watch is not None:
            self._compile_watch.after_step()
        if getattr(self.args, "stop_on_nonfinite_loss", False):
            bad = ~torch.isfinite(loss)
            self._nonfinite = bad if self._nonfinite is None else self._nonfinite | bad
        if self._seam is not None:
            if not self._forward_seen:
                raise InputError(
                    f"{type(self).__name__}.compute_loss does not call super().compute_loss, so the methods never see "
                    "the forward; put ContinualMixin in front of the class with that loss: "
                    "class Mine(ContinualMixin, Theirs)"
                )
            self._seam.after_backward(self.accelerator.sync_gradients)
            self._seam_passed = True
        return loss

    def prediction_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if any(column in inputs for column in self.methods.batch_columns):
            inputs = {key: value for key, value in inputs.items() if key not in self.methods.batch_columns}
        return super().prediction_step(model, inputs, *args, **kwargs)

    # -- evaluation --------------------------------------------------------------------------------------------------

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        **gen_kwargs: Any,
    ) -> dict[str, float]:
        """The parent's; with `args.predict_with_generate` also the scores of generated answers.

        Rows are tokenised ones with `labels`, -100 for the prompt, or text: `prompt` and `references`. Of both the
        loss is computed as ever, padded on the right; then prompts, padded on the left, are answered by
        `evaluation.evaluate_task`, as in the task queue: sorted by length, shared between the processes, with the same
        scores however many these are. Metrics are those of `args.eval_scorer` and of `compute_metrics`, which gets
        [`GeneratedAnswers`]. A dataset in a mapping, such as `{"agnews": rows}`, gives `eval_agnews_exact_match`.

        Answers are greedy unless `args.generation_config`, `args.generation_num_beams` or `gen_kwargs` (`num_beams`,
        `max_new_tokens`, ...) say otherwise; the model's own settings do not count. An encoder-decoder trainer without
        a tokenizer, or with arguments that are not this package's, generates as its parent does.
        """
        if not self._generates:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix, **gen_kwargs)
        given = eval_dataset if eval_dataset is not None else self.eval_dataset
        if isinstance(given, dict):
            metrics: dict[str, float] = {}
            for name, each in given.items():
                metrics |= self._evaluate_answers(each, ignore_keys, f"{metric_key_prefix}_{name}", gen_kwargs, name)
            return metrics
        if isinstance(given, str):
            return self._evaluate_answers(
                cast(Any, self.eval_dataset)[given], ignore_keys, metric_key_prefix, gen_kwargs, given
            )
        return self._evaluate_answers(given, ignore_keys, metric_key_prefix, gen_kwargs)

    def _evaluate_answers(
        self, dataset: Any, ignore_keys: Any, prefix: str, gen_kwargs: Mapping[str, Any], name: str | None = None
    ) -> dict[str, float]:
        with self._asked(dataset, gen_kwargs, name) as loss_rows:
            return super().evaluate(loss_rows, ignore_keys, prefix)

    def predict(
        self,
        test_dataset: Any,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "test",
        **gen_kwargs: Any,
    ) -> Any:
        """The parent's; with `args.predict_with_generate` predictions are the tokens of answers, as in `evaluate`."""
        if not self._generates:
            return super().predict(test_dataset, ignore_keys, metric_key_prefix, **gen_kwargs)
        with self._asked(test_dataset, gen_kwargs) as loss_rows:
            return super().predict(loss_rows, ignore_keys, metric_key_prefix)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        if self._answering is None:
            return super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        output = super().evaluation_loop(dataloader, description, True, ignore_keys, metric_key_prefix)
        return self._answered(output, metric_key_prefix)

    @property
    def _generates(self) -> bool:
        """Whether answers are generated here."""
        if not isinstance(self.args, ContinualArgumentsMixin) or not getattr(self.args, "predict_with_generate", False):
            return False
        return self.processing_class is not None or not is_seq2seq(self._plain_model)

    @property
    def _plain_model(self) -> Any:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    @contextmanager
    def _asked(self, dataset: Any, gen_kwargs: Mapping[str, Any], name: str | None = None) -> Iterator[Any]:
        """Answer these rows in the evaluation loop, which gets the tokenised rows given here."""
        collator = self.data_collator
        how, found, _ = self._answering = self._to_answer(dataset, gen_kwargs, name)
        if found.made:
            tokenizer: Any = self.processing_class
            self.data_collator = make_collator(tokenizer, self._plain_model, is_seq2seq(self._plain_model))
        try:
            yield found.loss_rows
        finally:
            self._answering, self.data_collator = None, collator

    def _to_answer(
        self, dataset: Any, gen_kwargs: Mapping[str, Any], name: str | None
    ) -> tuple[Answering, EvalRows, Task]:
        """What is answered and how, refused if it cannot be."""
        tokenizer: Any = self.processing_class
        if not hasattr(tokenizer, "batch_decode") or getattr(tokenizer, "pad_token_id", None) is None:
            raise InputError(
                "predict_with_generate=True needs a tokenizer with a padding token; give the trainer "
                "processing_class=tokenizer"
            )
        model = self._plain_model
        if not hasattr(model, "generate") or not model.can_generate():
            raise InputError(
                f"predict_with_generate=True needs a model that generates, and this is a {type(model).__name__}; "
                "set it to False"
            )
        if not self.dist.whole_weights:
            raise InputError(
                f"predict_with_generate=True cannot answer on backend {self.dist.backend}, which would collect the "
                "weights for every token; use DDP or ZeRO-2, or the task queue, which scores what it has saved"
            )
        if self.args.batch_eval_metrics:
            raise InputError(
                "batch_eval_metrics=True gives compute_metrics one batch, and answers come all at once; set it to "
                "False with predict_with_generate=True"
            )
        args, seq2seq = cast(Any, self.args), is_seq2seq(model)
        how = answering(args, gen_kwargs, seq2seq=seq2seq)
        length = args.eval_max_prompt_length or MAX_PROMPT_LENGTH
        rows = eval_rows(dataset, tokenizer, seq2seq=seq2seq, max_prompt_length=length)
        own = isinstance(self.task, Task) and name in (None, self.task.name)
        labels = self.task.labels if own else None  # type: ignore[union-attr]
        return how, rows, task_of(name or "eval_dataset", rows.rows, how.config, labels)

    def _check_answering(self) -> None:
        """Before training, so that the first evaluation does not end it."""
        given: Any = self.eval_dataset
        for name, dataset in (given if isinstance(given, dict) else {None: given}).items():
            self._to_answer(dataset, {}, name)

    def _answered(self, output: Any, prefix: str) -> Any:
        """The output of the evaluation loop with answers and their metrics in it."""
        assert self._answering is not None
        how, found, task = self._answering
        args, tokenizer = cast(Any, self.args), cast(Any, self.processing_class)
        cell = evaluate_task(
            self._plain_model,
            tokenizer,
            task,
            how.config,
            max_prompt_length=args.eval_max_prompt_length or MAX_PROMPT_LENGTH,
            description=f"{prefix}: answering",
            autocast_dtype=torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None,
            ranks=processes(),
            generation=how.generation,
        )
        metrics: dict[str, Any] = {}
        if args.eval_scorer is not None or self.compute_metrics is None:
            metrics |= {cell.metric: cell.score, **cell.others}
        answers = [row["prediction"] for row in cell.predictions]
        tokens = padded(cell.tokens or [[tokenizer.pad_token_id]] * len(answers), tokenizer.pad_token_id)
        label_ids = padded(found.label_ids, -100)
        if self.compute_metrics is not None:
            references = [row["references"] for row in cell.predictions]
            metrics |= self.compute_metrics(GeneratedAnswers(tokens, label_ids, answers, references))
        named = {key if key.startswith(f"{prefix}_") else f"{prefix}_{key}": value for key, value in metrics.items()}
        plain = {key: value.item() if hasattr(value, "item") else value for key, value in named.items()}
        return output._replace(predictions=tokens, label_ids=label_ids, metrics={**output.metrics, **plain})

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().create_optimizer(*args, **kwargs)
        except (ValueError, ImportError) as error:  # such as a learning rate below 0
            missing = "bitsandbytes" in str(error)
            way_out = "run `pip install 'hf-continual[qlora]'`" if missing else "change the training arguments"
            raise InputError(
                f"optim={getattr(self.args.optim, 'value', self.args.optim)} with learning_rate="
                f"{self.args.learning_rate} makes no optimizer ({error}); {way_out}"
            ) from error

    def _on_optimizer_ready(self) -> None:
        if self._seam is None or self.ctx is None:
            return
        object.__setattr__(self.ctx, "state", self.state)  # the parent makes its state anew in every train()
        assert self.optimizer is not None
        optimized = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        parameters = dict(self.ctx.model.named_parameters())
        for name in self._new_parameters:
            if not self.dist.sharded and id(parameters[name]) not in optimized:
                raise InputError(
                    f"'{name}' began to learn with this task and the optimizer given as optimizers=... does not have "
                    "it; give optimizer_cls_and_kwargs=..., from which each task makes its own"
                )
        self._seam.attach(self.optimizer, self.model_wrapped)
        if self._load_late is not None:
            self._load_methods(self._load_late)
            self._load_late = None

    def _on_optimizer_step(self) -> None:
        if self._seam is None or self.ctx is None:
            return
        if not self._seam_passed:
            raise InputError(
                f"{type(self).__name__}.training_step does not call super().training_step, so the methods never see "
                "the gradients; put ContinualMixin in front of the class with that step: "
                "class Mine(ContinualMixin, Theirs)"
            )
        self._seam_passed = False
        if self._phase is None:
            self.methods.on_step_end(self.ctx)

    # -- logs --------------------------------------------------------------------------------------------------------

    def _log_value(self, name: str, value: Tensor) -> None:
        total, count = self._logged.get(name, (torch.zeros((), device=value.device), 0))
        self._logged[name] = (total + value.detach().float(), count + 1)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            self._check_finite()
            for name, (total, count) in self._logged.items():
                logs[name] = float(total) / count
            self._logged = {}
        super().log(logs, *args, **kwargs)

    def _check_finite(self) -> None:
        """On all ranks alike: a loss that is not finite on one of them stops them all, at the same step."""
        if self._nonfinite is not None:
            self._nonfinite = self.dist.sum_(self._nonfinite.detach().float()) > 0
        if self._nonfinite is not None and bool(self._nonfinite):
            name = self.ctx.task.name if self.ctx is not None else getattr(self.task, "name", self.task)
            of_task = f" of task '{name}'" if name else ""
            raise InputError(
                f"the loss{of_task} became NaN or infinite by step {self.state.global_step} with "
                f"learning_rate={self.args.learning_rate}; lower training.learning_rate or use a wider dtype"
            )

    # -- data --------------------------------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if isinstance(dataset, InterleavedDataset):
            return dataset.sampler(
                batch_size=self._train_batch_size,
                processes=self.args.world_size,
                seed=self.args.data_seed if self.args.data_seed is not None else self.args.seed,
                shuffle=self.args.train_sampling_strategy != "sequential",
            )
        return super()._get_train_sampler(train_dataset)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self._signature_columns is not None:
            self._signature_columns += [c for c in self.methods.batch_columns if c not in self._signature_columns]

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._check_finite()
        if self._phase is not None:
            return  # asked for by SIGINT; the phase is done again from the checkpoint before it
        if self.methods:
            # Before the parent, whose trainer_state.json then is the last file and marks the checkpoint as complete.
            # On every rank: state that is split is collected, and rank 0 writes.
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}" / STATE_FOLDER
            self.methods.save(folder)
        super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self._load_all_adapters(Path(resume_from_checkpoint), model if model is not None else self.model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.methods:
            self._load_methods(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        best = Path(str(self.state.best_model_checkpoint))
        if not self._load_all_adapters(best, self.model):
            super()._load_best_model()
        if self.methods:
            self._load_methods(best)  # what was measured must belong to the weights

    def _load_all_adapters(self, checkpoint: Path, model: Any) -> bool:
        """Load a checkpoint with several adapters; False if it is the parent's to load.

        Of several active adapters the parent considers only the first: it would make that one the trainable one, and
        load only that one at the end.
        """
        target = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        adapters = LoraView(target).adapters
        stored = [path.parent.name for path in checkpoint.glob(f"*/{ADAPTER_WEIGHTS}")]
        if self.dist.sharded or not adapters or max(len(adapters), len(stored)) < 2:
            return False
        if (checkpoint / ADAPTER_WEIGHTS).is_file():
            stored.append("default")  # PEFT writes this one at the root
        if set(stored) != set(adapters):
            raise InputError(
                f"{checkpoint} holds the adapters {sorted(stored)} and the model has {sorted(adapters)}; give the "
                "trainer the model as it was before this task"
            )
        load_adapters(target, {n: checkpoint if n == "default" else checkpoint / n for n in adapters})
        return True

    def _load_methods(self, checkpoint: Path) -> None:
        folder = Path(checkpoint) / STATE_FOLDER
        if not folder.is_dir():
            raise InputError(
                f"{checkpoint} was saved without the methods {[m.name for m in self.methods]}; resume with the "
                "methods it was trained with, or train the task again from its start"
            )
        self.methods.load(folder)

    def _resolve_checkpoint(self, resume: str | bool | None) -> str | None:
        if resume is None or resume is False:
            return None
        if resume is True:
            found = last_complete_checkpoint(str(self.args.output_dir))
            if found is None:
                raise ValueError(f"No valid checkpoint found in output directory ({self.args.output_dir})")
            return str(found)
        return str(resume)


def last_complete_checkpoint(folder: str | Path) -> Path | None:
    """The newest checkpoint that was written to its end; a process killed while saving leaves one that was not."""
    found = []
    for path in Path(folder).glob("checkpoint-*"):
        step = path.name.removeprefix("checkpoint-")
        try:
            state = json.loads((path / "trainer_state.json").read_text())
        except (OSError, ValueError):
            continue
        if step.isdigit() and state.get("global_step") == int(step):
            found.append((int(step), path))
    return max(found)[1] if found else None


class ContinualTrainer(ContinualMixin, Trainer):
    """[`~transformers.Trainer`] that learns one task after another without forgetting.

    Takes every argument of `Trainer`, plus those of [`ContinualMixin`].

    Example:

    ```python
    methods = [MIGU(threshold=0.7), Replay(ratio=0.02)]
    for task in tasks:
        trainer = ContinualTrainer(model, args, train_dataset=task, methods=methods)
        trainer.train()
    ```
    """


class ContinualSeq2SeqTrainer(ContinualMixin, Seq2SeqTrainer):
    """[`~transformers.Seq2SeqTrainer`] that learns one task after another without forgetting."""
