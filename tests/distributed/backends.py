"""One stream of two tasks on any backend, for comparison with one process."""

import os
import sys

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, set_seed
from transformers.modeling_outputs import CausalLMOutput

from hf_continual.distributed import assign_, full, release_engine
from hf_continual.lora import LoraView
from hf_continual.methods.base import MethodList
from hf_continual.testing import VOCABULARY, backend_options, tiny_model, toy_rows
from hf_continual.trainer import ContinualSeq2SeqTrainer, ContinualTrainer
from hf_continual.training_args import ContinualSeq2SeqTrainingArguments, ContinualTrainingArguments

BLOCKS = {
    "llama": "LlamaDecoderLayer",
    "sometimes": "LlamaDecoderLayer",
    "t5": "T5Block",
    "bert": "BertLayer",
    "gpt2": "GPT2Block",
}


class SometimesScaled(LlamaForCausalLM):
    """Llama with a layer that only some micro-batches use: those of which `used`, repeated, says so."""

    used = (True,)

    def __init__(self, config):
        super().__init__(config)
        self.scale = torch.nn.Linear(config.hidden_size, 3)
        self.calls = 0
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        micro_batch = self.calls * int(os.environ.get("WORLD_SIZE", "1")) // 2  # one process has those of both ranks
        self.calls += 1
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        if self.used[micro_batch % len(self.used)]:
            hidden = hidden * (1 + self.scale(hidden).sum(-1, keepdim=True))
        logits = self.lm_head(hidden)
        loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutput(loss=loss, logits=logits)


def offloading(backend):
    """DeepSpeed's configuration with the optimizer on the CPU."""
    config = backend_options(backend)["deepspeed"]
    config["zero_optimization"] |= {"offload_optimizer": {"device": "cpu"}}
    config["zero_force_ds_cpu_optimizer"] = False  # its AdamW would be compiled for a minute
    return {"deepspeed": config}


def learn_sometimes(rank, folder, backend, offloads, accumulation, used):
    SometimesScaled.used = used
    options = {"kind": "sometimes", **PLAIN_STEPS, **(offloading(backend) if offloads else {})}
    learn_and_save(rank, folder, backend, ["migu"], False, accumulation, 2, options)


BACK_TO_A_CHECKPOINT = {
    "eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss", "greater_is_better": True, "num_train_epochs": 3,
}  # fmt: skip
"""To the worst one, which is not the last."""

PLAIN_STEPS = {"optim": "sgd", "max_grad_norm": 0, "ddp_find_unused_parameters": True}
"""SGD alone takes no gradient and one of zeros, as DeepSpeed has it, for the same."""


def make_model(kind, lora):
    """As `tiny_model`; also GPT-2, whose layers hold their weights transposed and whose embeddings are tied."""
    if kind == "sometimes":
        set_seed(0)
        return SometimesScaled(tiny_model().config)
    if kind != "gpt2":
        return tiny_model(kind, lora=lora)
    set_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "n_positions": 64, "vocab_size": VOCABULARY}
    model = GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    config = LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    return get_peft_model(model, config) if lora else model


def make_args(backend, folder, kind="llama", **options):
    defaults = {"optim": "adamw_torch", "adam_epsilon": 1e-3, "max_grad_norm": 0.5, "ddp_find_unused_parameters": False}
    defaults["save_strategy"] = "no"
    known = backend_options(backend)
    if backend == "fsdp2":
        known["fsdp_config"]["transformer_layer_cls_to_wrap"] = [BLOCKS[kind]]
    args_class = ContinualSeq2SeqTrainingArguments if kind == "t5" else ContinualTrainingArguments
    args = args_class(
        output_dir=str(folder), learning_rate=1e-2, lr_scheduler_type="constant",
        logging_strategy="no", report_to="none", disable_tqdm=True, use_cpu=use_cpu(),
        dataloader_pin_memory=False, train_sampling_strategy="sequential",
        **{**defaults, **known, **options},
    )  # fmt: skip
    if backend == "fsdp2" and use_cpu():
        from accelerate.state import PartialState
        from accelerate.utils import DistributedType

        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU  # accelerate wants accelerators
    return args


def use_cpu():
    return torch.cuda.device_count() < int(os.environ.get("WORLD_SIZE", "1"))


def state_of(methods):
    """The tensors of the methods' state."""
    found = {}
    for method in methods:
        for name, value in vars(method).items():
            if name.endswith("_") and torch.is_tensor(value):
                found[f"{method.name}.{name}"] = value
            elif name.endswith("_") and isinstance(value, dict):
                tensors = {k: v for k, v in value.items() if torch.is_tensor(v)}
                found |= {f"{method.name}.{name}.{k}": v for k, v in tensors.items()}
    return {name: value.detach().cpu() for name, value in found.items()}


def learn(
    backend,
    specs,
    lora,
    accumulation,
    batch,
    folder,
    dtype=torch.float32,
    kind="llama",
    tasks=2,
    go_on=False,
    **options,
):
    """Tasks of 4 steps (6 with replay); the model is made anew for each unless it is to `go_on`; returns
    whole weights and the methods' state."""
    methods, state, adapters, trained = MethodList(specs), {}, [], None
    epochs = max(1, accumulation * batch * int(os.environ.get("WORLD_SIZE", "1")) // 4)
    for index in range(tasks):
        model = trained if go_on and index else make_model(kind, lora).to(dtype)
        for name in adapters:
            if name not in LoraView(model).adapters:
                LoraView(model).add(name, "test")
        if model is not trained:
            assign_(dict(model.named_parameters()), state)
        args = make_args(
            backend, folder / str(index), kind, per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation, **{"num_train_epochs": epochs, **options},
        )  # fmt: skip
        trainer_class = ContinualSeq2SeqTrainer if kind == "t5" else ContinualTrainer
        rows = toy_rows("llama" if kind in ("gpt2", "sometimes") else kind, seed=index)
        others = toy_rows("llama", seed=5) if "eval_strategy" in options else None
        trainer = trainer_class(model=model, args=args, train_dataset=rows, eval_dataset=others, methods=methods)
        trainer.train()
        expected = "ddp" if backend == "ddp" and int(os.environ.get("WORLD_SIZE", "1")) > 1 else backend
        assert trainer.dist.backend == ("single" if backend == "ddp" and expected != "ddp" else backend)
        trained = trainer.accelerator.unwrap_model(trainer.model)
        adapters, state = LoraView(trained).adapters, full(dict(trained.named_parameters()))
        release_engine(trainer)
    return {**state, **state_of(methods)}


def learn_and_save(rank, folder, backend, specs, lora, accumulation, batch, options):
    result = learn(backend, specs, lora, accumulation, batch, folder / "ranks", **options)
    save_file({name: value.contiguous().clone() for name, value in result.items()}, str(folder / f"{rank}.safetensors"))


def learn_in_fp16(rank, folder, backend, specs, scale_power):
    """As `learn_and_save` with DeepSpeed's loss scaling; it believes a CPU cannot compute in fp16, which torch can."""
    accelerator = type(sys.modules["deepspeed.accelerator"].get_accelerator())
    known = accelerator.supported_dtypes
    accelerator.is_fp16_supported = lambda self: True
    accelerator.supported_dtypes = lambda self: [*known(self), torch.half]
    config = backend_options(backend)["deepspeed"]
    del config["bf16"]
    config["fp16"] = {"enabled": True, "initial_scale_power": scale_power, "hysteresis": 1}
    learn_and_save(rank, folder, backend, specs, True, 1, 2, {"fp16": True, "deepspeed": config})
