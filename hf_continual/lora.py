"""A view on the LoRA layers of a PEFT model: which adapters there are, which learn, and how they are stored.

Everything this package does with adapters goes through here; it calls PEFT and never patches it.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.lora import LoraLayer, ParamWrapper
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .distributed import full, own_part, refuse_partitioned
from .errors import InputError

ADAPTER_WEIGHTS = "adapter_model.safetensors"


class LoraView:
    """The LoRA side of `model`.

    Args:
        model (`nn.Module`): unwrapped; anything but a PEFT model has no adapters.
        seed (`int`, *optional*): seed of new adapters' weights; without one the global generator draws them.
    """

    def __init__(self, model: nn.Module, seed: int | None = None) -> None:
        self.model = model
        self.seed = seed

    @property
    def is_peft(self) -> bool:
        return isinstance(self.model, PeftModel)

    def peft_model(self, method: str) -> Any:
        """The PEFT model, or a sentence that names the `method` asking for it."""
        if not isinstance(self.model, PeftModel) or not any(True for _ in self.layers()):
            raise InputError(
                f"method '{method}' needs LoRA adapters and this model has none; add `peft: {{r: 8, ...}}` to the "
                "recipe, or wrap the model with peft.get_peft_model"
            )
        return self.model

    def layers(self) -> list[tuple[str, Any]]:
        """(name, `LoraLayer`) in the order of the model."""
        return [(name, module) for name, module in self.model.named_modules() if isinstance(module, LoraLayer)]

    @property
    def adapters(self) -> list[str]:
        """Names in the order in which they were added."""
        return list(self.model.peft_config) if isinstance(self.model, PeftModel) else []

    @property
    def active(self) -> list[str]:
        return list(self.model.active_adapters) if isinstance(self.model, PeftModel) else []

    def trainable(self, layer: Any) -> list[str]:
        """Adapters of this linear layer whose A learns."""
        return [name for name, module in layer.lora_A.items() if module.weight.requires_grad]

    def trainable_pairs(self, method: str) -> list[tuple[str, str, str, str]]:
        """(module, adapter, name of A, name of B) of every pair of factors that learns, in the order of the model.

        Raises:
            InputError: if there is none, or if a layer is not plain LoRA (DoRA, AdaLoRA, expert parameters).
        """
        model = self.peft_model(method)
        names = {id(p): name for name, p in model.named_parameters()}
        pairs = []
        for module, layer in self.layers():
            if isinstance(layer, (AdaLoraLayer, ParamWrapper)):
                factors: list[tuple[str, Any, Any]] = []
            else:
                factors = [(name, a.weight, layer.lora_B[name].weight) for name, a in layer.lora_A.items()]
                factors += [(name, a, layer.lora_embedding_B[name]) for name, a in layer.lora_embedding_A.items()]
            learning = [(name, a, b) for name, a, b in factors if a.requires_grad and b.requires_grad]
            unfit = None
            if isinstance(layer, AdaLoraLayer):
                unfit = "AdaLoRA, whose rank changes"
            elif isinstance(layer, ParamWrapper):
                unfit = "LoRA on target_parameters, whose rows of A and columns of B do not pair up"
            elif {name for name, _, _ in learning} & set(layer.lora_magnitude_vector):
                unfit = "DoRA or a LoRA variant with weights beside A and B"
            if unfit is not None:
                raise InputError(
                    f"method '{method}' cannot split '{module}' into skill units: it is {unfit}; use plain LoRA there"
                )
            pairs += [(module, adapter, names[id(a)], names[id(b)]) for adapter, a, b in learning]
        if not pairs:
            raise InputError(f"method '{method}': no LoRA adapter of the model learns; activate one for training")
        return pairs

    def output_factors(self, adapters: Sequence[str]) -> list[str]:
        """Names of the B of `adapters`; where they are zero the adapters take no part."""
        names = []
        for module, layer in self.layers():
            names += [f"{module}.lora_B.{name}.weight" for name in layer.lora_B if name in adapters]
            names += [f"{module}.lora_embedding_B.{name}" for name in layer.lora_embedding_B if name in adapters]
        return names

    def activate(self, adapters: Sequence[str], trainable: Sequence[str]) -> None:
        """Make `adapters` take part in the forward, and let only `trainable` learn."""
        model = self.peft_model("lora")
        model.base_model.set_adapter(list(adapters))  # makes every one of them trainable
        frozen = [name for name in self.adapters if name not in trainable]
        if frozen:
            model.set_requires_grad(frozen, False)

    def add(self, name: str, method: str) -> None:
        """Add an adapter shaped like the first one; all stay active, only the new one learns."""
        model = self.peft_model(method)
        if name in self.adapters:
            raise InputError(
                f"method '{method}': the model already has an adapter named '{name}'; start from the base model"
            )
        first = model.peft_config[self.adapters[0]]
        if not isinstance(first, LoraConfig):
            raise InputError(f"method '{method}' needs LoRA adapters, not {type(first).__name__}")
        unfit = {
            "use_dora": first.use_dora,
            "lora_bias": first.lora_bias,
            "init_lora_weights": isinstance(first.init_lora_weights, str) and first.init_lora_weights != "gaussian",
            "target_modules": any(
                not isinstance(layer.get_base_layer(), (nn.Linear, Conv1D)) for _, layer in self.layers()
            ),
        }
        for option, refused in unfit.items():
            if refused:
                raise InputError(
                    f"method '{method}' cannot stack adapters with peft.{option}={getattr(first, option)!r}: "
                    "their sum is "
                    "not one plain adapter; use LoRA on linear layers without it"
                )
        if first.modules_to_save:
            raise InputError(
                f"method '{method}' cannot stack adapters that have modules_to_save={first.modules_to_save}: only one "
                "copy of those modules can be active; remove modules_to_save"
            )
        with fresh_draw(self.seed):
            model.add_adapter(name, copy.deepcopy(first))
        for _, layer in self.layers():  # PEFT leaves a new adapter on the CPU where the model has no weights yet
            if name in layer.lora_A and layer.get_base_layer().weight.is_meta:
                layer.lora_A[name].to("meta")
                layer.lora_B[name].to("meta")
        self.activate([*self.adapters], [name])

    # -- storage ---------------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> dict[str, Any]:
        """Write every adapter in PEFT's layout to `folder/<name>/`. Returns what `load` needs."""
        model = self.peft_model("lora")
        refuse_partitioned(model, "saving adapters")
        model.save_pretrained(str(folder), selected_adapters=self.adapters)
        if "default" in self.adapters:  # PEFT writes this one at the root
            (folder / "default").mkdir(exist_ok=True)
            for file in [f for f in folder.iterdir() if f.is_file() and f.name.startswith("adapter_")]:
                file.rename(folder / "default" / file.name)
        for file in folder.glob("**/README.md"):
            file.unlink()  # PEFT's empty card template
        trainable = sorted({name for _, layer in self.layers() for name in self.trainable(layer)})
        return {"adapters": self.adapters, "active": self.active, "trainable": trainable}

    def load(self, folder: Path, meta: dict[str, Any]) -> None:
        """Restore what `save` wrote into a model that has at least the first adapter's configuration."""
        model = self.peft_model("lora")
        for name in meta["adapters"]:
            if name not in self.adapters:
                model.add_adapter(name, LoraConfig.from_pretrained(str(folder / name)))
        load_adapters(model, {name: folder / name for name in meta["adapters"]})
        self.activate(meta["active"], meta["trainable"])

    def export(self, folder: Path) -> None:
        """Write one adapter in PEFT's layout that alone gives the same outputs as all active adapters together.

        Adapters are concatenated: A along its rows, B along its columns, scaled so that
        `sum_i s_i B_i A_i = s B A` exactly in real arithmetic.
        """
        model = self.peft_model("lora")
        refuse_partitioned(model, "saving adapters")
        if len(self.active) == 1:
            name = self.active[0]
            model.save_pretrained(str(folder), selected_adapters=[name])
            inner = folder / name
            if inner.is_dir():
                for file in inner.iterdir():
                    file.rename(folder / file.name)
                inner.rmdir()
        else:
            self._export_concatenated(model, folder)
        (folder / "README.md").unlink(missing_ok=True)

    def _export_concatenated(self, model: Any, folder: Path) -> None:
        name = "exported"
        configs = [model.peft_config[adapter] for adapter in self.active]
        active, trainable = self.active, sorted({n for _, layer in self.layers() for n in self.trainable(layer)})
        rank = sum(config.r for config in configs)
        config = copy.deepcopy(configs[0])
        config.r, config.lora_alpha, config.use_rslora = rank, rank, False  # scaling 1; each s_i goes into its B_i
        config.rank_pattern, config.alpha_pattern, config.inference_mode = {}, {}, True
        ranks = {
            adapter_layer: sum(layer.r[a] for a in active if a in layer.r) for adapter_layer, layer in self.layers()
        }
        if set(ranks.values()) != {rank}:
            prefix = "base_model.model."
            config.rank_pattern = {k.removeprefix(prefix): v for k, v in ranks.items() if v != rank}
            config.alpha_pattern = dict(config.rank_pattern)
        with torch.random.fork_rng(devices=[]):  # initialising weights that are overwritten must not move the RNG
            model.add_adapter(name, config)
        try:
            with torch.no_grad():
                for _, layer in self.layers():
                    have = [a for a in active if a in layer.lora_A]
                    layer.lora_A[name].weight.copy_(torch.cat([layer.lora_A[a].weight for a in have]))
                    scaled = [layer.lora_B[a].weight * layer.scaling[a] for a in have]
                    layer.lora_B[name].weight.copy_(torch.cat(scaled, dim=1))
            model.save_pretrained(str(folder), selected_adapters=[name])
            for file in (folder / name).iterdir():
                file.rename(folder / file.name)
            (folder / name).rmdir()
        finally:
            model.delete_adapter(name)
            self.activate(active, trainable)


@contextmanager
def fresh_draw(seed: int | None) -> Iterator[None]:
    """Draw random numbers from `seed` and leave the global generator as it was; with None, draw from that."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def load_adapters(model: PeftModel, folders: dict[str, Path]) -> None:
    """Load the weights of adapters that the model already has, each from its folder."""
    for name, folder in folders.items():
        if name not in model.peft_config:
            raise InputError(
                f"{folder} holds the adapter '{name}' and the model has none of that name; load the model of the "
                "previous task first"
            )
        weights = load_file(str(folder / ADAPTER_WEIGHTS))
        own = get_peft_model_state_dict(model, adapter_name=name)
        if set(own) != set(weights):
            first = sorted(set(own) ^ set(weights))[0]
            raise InputError(f"{folder} does not fit this model: '{first}' is in only one of the two")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT lists the frozen base weights as missing keys
            set_peft_model_state_dict(model, weights, adapter_name=name)


_OF_ONE_ADAPTER = re.compile(
    r"\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|modules_to_save|trainable_tokens_delta)\.([^.]+)(?=\.|$)"
)


def stored_name(name: str, adapters: Iterable[str]) -> str:
    """The name under which PEFT stores the parameter `name` of one of `adapters`: without the adapter's name."""
    known = set(adapters)

    def strip(match: re.Match[str]) -> str:
        if match[2] not in known:
            return match[0]
        return "" if match[1] == "modules_to_save" else f".{match[1]}"

    return _OF_ONE_ADAPTER.sub(strip, name)


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What learns, by name. Of parameters that share their memory (PEFT's `ensure_weight_tying`) only the first."""
    found: dict[str, nn.Parameter] = {}
    seen: set[tuple[int, int]] = set()
    for name, parameter in model.named_parameters():
        held = own_part(parameter)
        place = (held.data_ptr(), held.numel())
        if parameter.requires_grad and (parameter.is_meta or not place[0] or place not in seen):
            found[name] = parameter
            seen.add(place)
    return found


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """A detached copy, on the CPU, of everything that learns, whole on every rank."""
    return full(trainable_parameters(model))
