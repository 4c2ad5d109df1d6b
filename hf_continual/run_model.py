"""The model of a run: fresh, or as it was after a learnt task, from memory or from that task's folder."""

from __future__ import annotations

import copy
import functools
import gc
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedTokenizerBase, set_seed
from transformers.integrations import unset_hf_deepspeed_config

from .distributed import Processes, full, is_partitioned
from .errors import InputError, build
from .lora import LoraView
from .models import ModelConfig, apply_lora, check_four_bits, fix_loss_scaling, load_model, load_tokenizer, to_meta
from .provenance import fingerprint
from .run_state import read_json, write_json
from .tokenization import ensure_pad_token

logger = logging.getLogger(__name__)

BEFORE_ANY_TASK = -1
OF_ADAPTERS = ("lora_", "modules_to_save", "trainable_tokens")
"""In the names of parameters that PEFT saves with an adapter."""


class RunModel:
    """Holds the model of one run.

    Args:
        source: a model, a function returning one, a name or path, or [`ModelConfig`] or its options.
        tokenizer: by default that of `source`.
        peft_config: `LoraConfig` or its options; None fine-tunes the full model.
        seed: of weights that are drawn.
        folder_of: where task `i` is committed.
        use_cpu: as in the training arguments; a 4-bit model stays on the device that it is loaded on.
        masked: load it with the head of a masked language model.
    """

    def __init__(
        self,
        source: Any,
        tokenizer: PreTrainedTokenizerBase | None,
        peft_config: Any,
        seed: int,
        folder_of: Callable[[int], Path],
        use_cpu: bool = False,
        masked: bool = False,
    ) -> None:
        if isinstance(source, str):
            source = ModelConfig(name=source)
        elif isinstance(source, Mapping):
            source = build(ModelConfig, source, "model")
        self.source, self.peft_config, self.seed = source, peft_config, seed
        self._tokenizer, self._folder_of, self._use_cpu, self._masked = tokenizer, folder_of, use_cpu, masked
        self._model: nn.Module | None = None
        self._at: int | None = None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        if self._tokenizer is None:
            if not isinstance(self.source, ModelConfig):
                raise InputError("processing_class: give the tokenizer, since the model was given as an object")
            self._tokenizer = load_tokenizer(self.source)
        ensure_pad_token(self._tokenizer)
        return self._tokenizer

    @property
    def given_tokenizer(self) -> PreTrainedTokenizerBase | None:
        return self._tokenizer

    @property
    def at(self) -> int | None:
        """The task after which the model in memory is."""
        return self._at

    def description(self) -> Any:
        """What a run records, to refuse another model later."""
        if isinstance(self.source, ModelConfig):
            return {k: v for k, v in vars(self.source).items() if v is not None}
        return {"fingerprint": fingerprint(self._bare())}

    def _bare(self, empty: bool = False) -> Any:
        unset_hf_deepspeed_config()  # `from_pretrained` splits the weights while ZeRO-3's arguments are alive
        set_seed(self.seed)  # weights that a checkpoint lacks are drawn alike by every process of the run
        if isinstance(self.source, ModelConfig):
            device = "cpu" if self._use_cpu else None
            model = load_model(self.source, empty=empty, device=device, masked=self._masked)
            on_cpu = not empty and model.device.type == "cpu"
            if self.source.load_in_4bit and on_cpu and os.environ.get("RANK", "0") == "0":
                _say_what_four_bits_lack()
            return model
        return copy.deepcopy(self.source) if isinstance(self.source, nn.Module) else self.source()

    def fresh(self, empty: bool = False) -> Any:
        """The model before any task; with `empty` without weights, for checks."""
        model = self._bare(empty)
        of_file = isinstance(self.source, ModelConfig)  # without weights it is not packed yet
        check_four_bits(self.source if of_file else model, self.peft_config is not None or isinstance(model, PeftModel))
        fix_loss_scaling(model)
        words, tokens = model.get_input_embeddings().weight.shape[0], len(self.tokenizer)
        if tokens > words:
            raise InputError(
                f"the tokenizer has {tokens} tokens and the model embeds only {words}; use the model's own tokenizer"
            )
        if self.peft_config is not None and not isinstance(model, PeftModel):
            set_seed(self.seed)
            model = apply_lora(model, self.peft_config)
        if isinstance(model, PeftModel):
            self._check_adapters(model)
        return to_meta(model) if empty else model

    def _check_adapters(self, model: Any) -> None:
        """Everything that learns must be in the adapters, for only they are committed."""
        LoraView(model).peft_model("the task queue")
        learning = [name for name, p in model.named_parameters() if p.requires_grad]
        loose = [name for name in learning if not any(word in name for word in OF_ADAPTERS)]
        biases = any(getattr(config, "bias", "none") != "none" for config in model.peft_config.values())
        if loose and not (biases and all(n.endswith("bias") for n in loose)):
            raise InputError(
                f"the parameter '{loose[0]}' learns outside the adapter and would not be saved with it; freeze "
                "it, or name "
                "its module in peft.modules_to_save"
            )

    def after(self, index: int) -> Any:
        """The model after task `index` (-1: before any), from memory or from its commit."""
        if self._model is None or self._at != index:
            self.release()
            self._model, self._at = self.load(index), index
        return self._model

    def load(self, index: int) -> Any:
        """The model after task `index` from its commit, for the caller alone."""
        model = self.fresh()
        if index != BEFORE_ANY_TASK:
            folder = self._folder_of(index)
            meta = read_json(folder / "model.json")
            if meta["kind"] == "lora":
                LoraView(model).load(folder / "adapters", meta)
            else:
                load_full(model, folder / "model")
        return model

    def take(self, index: int) -> Any:
        """As `after`, for training in place: the model in memory is nobody's until `keep`."""
        model = self.after(index)
        self._model, self._at = None, None
        return model

    def keep(self, model: nn.Module, index: int) -> None:
        self._model, self._at = model, index

    def release(self) -> None:
        self._model, self._at = None, None
        gc.collect()

    def whole(self, model: Any, ranks: Processes) -> Any:
        """`model`, or a whole copy of it on rank 0 (None elsewhere) where its weights are split between the ranks.

        Every rank must call it, and none returns before all have.
        """
        ranks.barrier()
        if not any(is_partitioned(p) for p in model.parameters()):
            return model
        view, copies = LoraView(model), []

        def make() -> None:
            copied = self.fresh()
            for name in view.adapters:
                if name not in copied.peft_config:
                    copied.add_adapter(name, copy.deepcopy(model.peft_config[name]))
            if view.is_peft:
                trainable = {name for _, layer in view.layers() for name in view.trainable(layer)}
                LoraView(copied).activate(view.active, sorted(trainable))
            copies.append(copied)

        ranks.on_main(make)
        targets = dict(copies[0].named_parameters()) if ranks.is_main else {}
        for name, parameter in model.named_parameters():
            if view.is_peft and not parameter.requires_grad and not any(word in name for word in OF_ADAPTERS):
                continue
            value = full({name: parameter})[name]  # one by one: only rank 0 keeps them all
            if ranks.is_main:
                with torch.no_grad():
                    targets[name].copy_(value)
        return copies[0] if ranks.is_main else None

    def save(self, model: Any, folder: Path) -> None:
        """Write the model in plain PEFT or plain transformers layout, and what `after` needs."""
        view = LoraView(model)
        if view.is_peft:
            meta = {"kind": "lora", **view.save(folder / "adapters")}
            view.export(folder / "adapter")
        else:
            meta = {"kind": "full"}
            model.save_pretrained(str(folder / "model"))
            self.tokenizer.save_pretrained(str(folder / "model"))
        write_json(folder / "model.json", meta)


def load_full(model: nn.Module, folder: Path) -> None:
    """Load the weights of a full model saved by `save_pretrained` into `model`."""
    index = folder / "model.safetensors.index.json"
    files = sorted(set(read_json(index)["weight_map"].values())) if index.exists() else ["model.safetensors"]
    state: dict[str, Any] = {}
    for file in files:
        state |= load_file(str(folder / file))
    missing, unexpected = model.load_state_dict(state, strict=False)
    tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
    if unexpected or set(missing) - tied:
        raise InputError(
            f"{folder} does not fit this model: '{sorted({*unexpected, *missing} - tied)[0]}' is in only one of the two"
        )
    tie: Any = getattr(model, "tie_weights", None)
    if tie is not None:
        tie()


@functools.cache
def _say_what_four_bits_lack() -> None:
    """Once, not at every task."""
    logger.warning(
        "model.load_in_4bit on the CPU saves memory and makes steps slower: bitsandbytes dequantises every layer at "
        "every step there, and its fast kernels need a GPU"
    )


def training_device(use_cpu: bool) -> torch.device:
    """The device on which the Trainer would put a model."""
    if use_cpu or not torch.accelerator.is_available():
        return torch.device("cpu")
    return torch.device(torch.accelerator.current_accelerator() or "cpu")
