"""Merging what a run has learnt into one plain model."""

from __future__ import annotations

import copy
import logging
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

from .distributed import refuse_partitioned
from .errors import InputError, build, did_you_mean
from .lora import LoraView
from .model_card import write_model_card
from .models import ModelConfig, first_line, in_four_bits, is_masked, is_seq2seq, load_model, load_tokenizer
from .run_state import RunDirectory, disk_full, read_json
from .tasks import Task

logger = logging.getLogger(__name__)


@torch.no_grad()
def _probe(model: Any, vocabulary: int) -> torch.Tensor:
    """Logits on a fixed input, to compare a model before and after a merge."""
    ids = torch.arange(1, 25).view(1, -1) % vocabulary
    inputs = {"input_ids": ids, "decoder_input_ids": ids} if model.config.is_encoder_decoder else {"input_ids": ids}
    return model.eval()(**inputs).logits.float()  # type: ignore[no-any-return]


def merge_adapters(model: Any, tolerance: float = 1e-3) -> Any:
    """Merge all active LoRA adapters into the base weights; returns the plain model.

    Merged and compared in at least fp32, then rounded to the dtypes that the base weights had: in bf16 even the same
    model gives other logits on unusual tokens, and a comparison there says nothing about the merge.

    A 4-bit base is dequantised first, and the merged model stays dequantised: rounding the sum to 4 bits again would
    lose most of what the adapter has learnt. The dequantised model must give what the 4-bit one gives when it computes
    in fp32, whatever its compute dtype was; how far the merged model is from that is logged.

    Raises:
        InputError: if the dequantised or the merged model's logits differ by more than `tolerance` of their range.
    """
    view = LoraView(model)
    if not view.is_peft:
        return model
    refuse_partitioned(model, "merging adapters")
    vocabulary = model.config.vocab_size
    packed: torch.Tensor | None = None
    dtypes = {
        re.sub(r"^base_model\.model\.|\b(base_layer|original_module)\.", "", n): p.dtype
        for n, p in model.named_parameters()
    }
    if in_four_bits(model):
        packed_as = _compute_in_float32(model)
        packed = _probe(model, vocabulary)
        model = dequantize(model)
        view = LoraView(model)
        error = _distance(packed, _probe(model, vocabulary))
        if not error <= tolerance:
            raise InputError(
                f"the dequantised model differs from the 4-bit one (relative error {error:.2e}); keep the adapters as "
                "they are"
            )
        # Preparing for training made norms and embeddings float32; plain layers need one dtype.
        kept = set(getattr(model.get_base_model(), "_keep_in_fp32_modules", None) or [])
        dtypes = {n: torch.float32 if kept & set(n.split(".")) else packed_as for n in dtypes}
    elif torch.float64 not in dtypes.values():
        model.float()
    before = _probe(model, vocabulary)
    merged = model.merge_and_unload(adapter_names=view.active)
    after = _probe(merged, vocabulary)
    error = _distance(before, after)
    if not error <= tolerance:
        raise InputError(
            f"the merged model differs from the adapted one (relative error {error:.2e}); keep the adapters as they are"
        )
    if packed is not None:
        logger.warning(
            "the 4-bit base was dequantised, for sums with adapters do not fit into 4 bits; computing in float32, the "
            "merged model's logits differ from the 4-bit model's by %.1e of their range",
            _distance(packed, after),
        )
    for name, parameter in merged.named_parameters():
        parameter.data = parameter.data.to(dtypes.get(name, parameter.dtype))
    return merged


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, relative to the largest entry of `a`."""
    return float((a - b).abs().max()) / (float(a.abs().max()) or 1.0)


def _compute_in_float32(model: Any) -> torch.dtype:
    """Let a 4-bit model compute in, and be dequantised to, float32; returns the dtype that its weights were in."""
    packed_as = torch.float32
    model.float()
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None and hasattr(module, "compute_dtype"):
            packed_as, module.compute_dtype, state.dtype = state.dtype, torch.float32, torch.float32
    return packed_as


def dequantize(model: Any) -> Any:
    """A 4-bit PEFT model with plain float32 base weights and the same adapters. The given model is used up.

    Raises:
        InputError: if a base weight stays quantised.
    """
    view = LoraView(model)
    active, trainable = view.active, sorted({n for _, layer in view.layers() for n in view.trainable(layer)})
    configs = {name: copy.deepcopy(model.peft_config[name]) for name in view.adapters}
    states = {
        name: {k: v.detach().clone() for k, v in get_peft_model_state_dict(model, adapter_name=name).items()}
        for name in configs
    }
    base = model.unload().dequantize(dtype=torch.float32)
    base.is_loaded_in_4bit = False  # transformers leaves it
    left = [n for n, p in base.named_parameters() if type(p).__name__ in ("Params4bit", "Int8Params")]
    if left:
        raise InputError(
            f"the quantised weight '{left[0]}' could not be dequantised, and adapters are not merged into quantised "
            "weights; keep the adapters as they are"
        )
    plain: Any = None
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT lists the frozen base weights as missing keys
        for name, config in configs.items():
            if plain is None:
                plain = PeftModel(base, config, adapter_name=name)
            else:
                plain.add_adapter(name, config)
        for name, state in states.items():
            set_peft_model_state_dict(plain, state, adapter_name=name)
    LoraView(plain).activate(active, trainable)
    return plain


def write_merged(run_dir: str | Path, out: str | Path, task: str | None = None) -> str:
    """Write the model after `task` (default: the last learnt) to `out`, in transformers layout. Returns the task.

    Needs the run directory and the base model, not the data. `README.md` there is the model card.

    Raises:
        InputError: if nothing is learnt, `out` is not empty, or the run was started from a model object in Python.
    """
    directory, out = RunDirectory(run_dir), Path(out)
    directory.read_recipe()  # says so if this is no run directory
    stored = [Task(entry["name"], index=i) for i, entry in enumerate(directory.read_queue()["tasks"])]
    learnt = {t.name: t for t in stored if directory.is_learnt(t)}
    if not learnt:
        raise InputError(f"run directory {directory.path} has learnt no task yet; run it first")
    if task is not None and task not in learnt:
        raise InputError(f"--task {task}: the run has not learnt it{did_you_mean(task, learnt)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"-o {out}: it is a file or a folder that is not empty; give a new folder")
    chosen = learnt[task] if task is not None else list(learnt.values())[-1]
    directory.check_task(chosen)
    model, tokenizer = _load(directory, directory.task_folder(chosen))
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        model.save_pretrained(str(temporary))
        tokenizer.save_pretrained(str(temporary))
        kind = "fill-mask" if is_masked(model) else "text2text-generation" if is_seq2seq(model) else "text-generation"
        write_model_card(directory.path, temporary, chosen.name, name=out.resolve().name, pipeline=kind)
        temporary.replace(out)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError) and not disk_full(error):
            raise InputError(f"-o {out}: it cannot be written ({error.strerror}); give another folder") from error
        raise
    return chosen.name


def push_merged(folder: str | Path, repo_id: str) -> str:
    """Upload a merged model with its card to the hub, as a private repository if it is new; returns its address.

    Raises:
        InputError: if the hub refuses or cannot be reached; the folder stays.
    """
    api = HfApi()
    try:
        repo = api.create_repo(repo_id, private=True, exist_ok=True)
        api.upload_folder(repo_id=repo.repo_id, folder_path=str(folder), commit_message="Upload the merged model")
    except (OSError, ValueError, HTTPError) as error:
        raise InputError(
            f"--push_to_hub {repo_id}: the hub did not take it ({first_line(error)}); check the name and "
            f"`hf auth login`, then upload {folder} with `hf upload {repo_id} {folder}`"
        ) from error
    return str(repo)


def _load(directory: RunDirectory, folder: Path) -> tuple[Any, Any]:
    """The merged model of a task's folder, and its tokenizer."""
    if read_json(folder / "model.json")["kind"] == "full":
        config = ModelConfig(name=str((folder / "model").resolve()), dtype="auto")
        return load_model(config), load_tokenizer(config)
    source = directory.read_recipe().get("model") or {}
    if "name" not in source:
        raise InputError(
            f"run directory {directory.path} was started from a model object; merge it from Python: "
            f"merge_adapters(PeftModel.from_pretrained(model, '{folder / 'adapter'}'))"
        )
    config = build(ModelConfig, source, "model")
    model = PeftModel.from_pretrained(load_model(config, device="cpu"), str(folder / "adapter"))
    return merge_adapters(model), load_tokenizer(config)
