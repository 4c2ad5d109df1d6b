"""Taps: what looks into a forward, and removes only itself. Forward hooks for outputs of modules, and an attention
function in transformers' registry for the attention of chosen heads (what it can be asked for: `attention.py`)."""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention import FLASH, KWARG, AttentionCall, Request
from .errors import InputError

logger = logging.getLogger(__name__)


class OutputTap:
    """Hands the output tensor of each module to its function while the tap records.

    The hooks stay in place for the whole task (a model compiled with `torch.compile` ignores hooks that come later);
    `recording()` opens them for one forward, so evaluation, generation and the recomputation of gradient checkpointing
    are never counted.

    Args:
        functions (`Mapping[nn.Module, Callable[[Tensor], None]]`): called under `no_grad` with the detached output.
    """

    def __init__(self, functions: Mapping[nn.Module, Callable[[Tensor], None]]) -> None:
        self._open = False
        self._handles = [module.register_forward_hook(self._hook(fn)) for module, fn in functions.items()]

    def _hook(self, function: Callable[[Tensor], None]) -> Callable[..., None]:
        def forward_hook(module: nn.Module, args: Any, output: Any) -> None:
            if self._open:
                with torch.no_grad():
                    function((output[0] if isinstance(output, tuple) else output).detach())

        return forward_hook

    @contextmanager
    def recording(self) -> Iterator[None]:
        self._open = True
        try:
            yield
        finally:
            self._open = False

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


class AttentionTap:
    """Puts the attention function that serves requests on a model, until `close()` or the end of a `with` block.

    Only the registries of transformers and the implementation named in the model's configurations change, and both are
    restored. Without a request the output is that of the model's own implementation: `sdpa`, `eager` or
    `flash_attention_2`/`_3`; any other is refused, and so is a second tap. Models that cap their scores run `eager`,
    which `sdpa` would refuse. A copy made of the model while the tap is open works only as long.

    Args:
        model: a transformers model, or a PEFT model around one.
        method: who asks; part of the registered name.

    Attributes:
        names: the attention modules, in the order of the model, named as in the base model (the same with PEFT).
        num_heads: query heads of each of them.
        sides: for each, whether its queries and its keys are positions of the "input" or of the "decoder".
    """

    def __init__(self, model: nn.Module, method: str = "seekr") -> None:
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        if not isinstance(base, PreTrainedModel):
            raise InputError(f"the attention of {type(base).__name__} cannot be tapped; use a model of transformers")
        self._method = method
        modules = {n: m for n, m in base.named_modules() if _owner(m) is not None}
        if not modules:
            raise InputError(
                f"the attention of {type(base).__name__} cannot be tapped: it does not go through transformers' "
                "attention interface; use another model"
            )
        self.names = list(modules)
        heads = {name: _num_heads(module, base) for name, module in modules.items()}
        if len(set(heads.values())) > 1:
            raise InputError(
                f"attention modules must have equally many heads, and these have {sorted(set(heads.values()))}"
            )
        self.num_heads = heads[self.names[0]]
        self.sides = _sides(base, modules)
        self._implementation = self._base_implementation(modules)
        self._function = {id(module): (name, self._base_function(module)) for name, module in modules.items()}
        self._name = f"{method}_tap_{id(self):x}"
        self._configs = _configs(base)
        self._open = True
        try:
            ALL_ATTENTION_FUNCTIONS.register(self._name, self._attention)
            ALL_MASK_ATTENTION_FUNCTIONS.register(self._name, ALL_MASK_ATTENTION_FUNCTIONS[self._implementation])
            base.set_attn_implementation(self._name)
            for name, module in modules.items():
                if _implementation(module) != self._name:
                    raise InputError(
                        f"the attention of '{name}' cannot be tapped: its implementation is fixed; use another model"
                    )
        except BaseException:
            self.close()
            raise

    def _base_implementation(self, modules: Mapping[str, nn.Module]) -> str:
        found: list[Any] = sorted({_implementation(module) for module in modules.values()})
        if "_tap_" in found[0]:
            raise InputError(
                f"method '{self._method}': the attention of this model is tapped already; close that tap first"
            )
        if len(found) > 1 or found[0] not in ("sdpa", "eager", *FLASH):
            raise InputError(
                f"'{', '.join(found)}' is an attention implementation that cannot be tapped; load the model with "
                "attn_implementation='sdpa', 'eager' or 'flash_attention_2'"
            )
        for name, module in modules.items():
            if getattr(module, "sinks", None) is not None:
                raise InputError(
                    f"the attention of '{name}' cannot be tapped: it has attention sinks; use another model"
                )
            if found[0] == "sdpa" and getattr(module, "attn_logit_softcapping", None) is not None:
                logger.warning(
                    "method '%s': the scores of this model are capped, so its attention runs eager", self._method
                )
                return "eager"
        return found[0]

    def _base_function(self, module: nn.Module) -> Callable[..., Any]:
        if self._implementation != "eager":
            function = ALL_ATTENTION_FUNCTIONS[self._implementation]
            if self._implementation not in FLASH:
                return function
            return lambda module, *args, **kwargs: function(_As(module, self._implementation), *args, **kwargs)
        owner = _owner(module)
        assert owner is not None
        found = getattr(sys.modules[owner.__module__], "eager_attention_forward", None)
        if found is None:
            raise InputError(
                f"the eager attention of {owner.__name__} cannot be tapped; use attn_implementation='sdpa'"
            )
        return found

    def _attention(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Any]:
        """The registered function; shapes as in transformers: query [B, H, Q, d], output [B, Q, H, d]."""
        request: Request | None = kwargs.pop(KWARG, None)
        name, function = self._function.get(id(module)) or (None, self._base_function(module))
        output, weights = function(module, query, key, value, attention_mask, **kwargs)
        if request is None:
            return output, weights
        if name is None:
            raise InputError(f"{KWARG}: {type(module).__name__} is of a copy of the tapped model; tap the copy")
        if unknown := request.names().difference(self.names):
            raise InputError(
                f"{KWARG}: the model has no attention module '{min(unknown)}', but {', '.join(self.names)}"
            )
        causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        scaling, flash = kwargs.get("scaling"), self._implementation in FLASH
        call = AttentionCall(
            name=name,
            sides=self.sides[name],
            query=query,
            key=key,
            value=value,
            mask=attention_mask,
            bias=kwargs.get("position_bias"),
            scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
            softcap=kwargs.get("softcap"),
            # Without a mask sdpa makes the causal one itself, and eager none
            causal=bool(causal) and (flash or (self._implementation == "sdpa" and query.shape[2] > 1)),
            window=kwargs.get("sliding_window"),
            flash=flash,
        )
        request.run(call, output, module.training)
        return output, weights

    def close(self) -> None:
        """Restores every configuration and takes the name out of the registries; a second call does nothing."""
        if not self._open:
            return
        self._open = False
        for config, implementation in self._configs:
            config._attn_implementation = implementation
        for registry in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
            registry._global_mapping.pop(self._name, None)

    def __enter__(self) -> AttentionTap:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()


class _As:
    """A module or its config as it looks under another implementation, whose name flash attention reads there."""

    def __init__(self, seen: Any, implementation: str) -> None:
        self._seen = seen
        self._attn_implementation = implementation

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._seen, name)
        return _As(found, self._attn_implementation) if name == "config" else found


def _owner(module: nn.Module) -> type | None:
    """The class of an attention module whose code calls transformers' attention interface, or None."""
    for cls in type(module).__mro__:
        if cls in (nn.Module, PreTrainedModel):
            return None
        for member in vars(cls).values():
            code = getattr(inspect.unwrap(member), "__code__", None) if inspect.isfunction(member) else None
            if code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names:
                return cls
    return None


def _implementation(module: nn.Module) -> str:
    config: Any = module.config
    return str(config._attn_implementation)


def _num_heads(module: nn.Module, model: PreTrainedModel) -> int:
    for name in ("num_heads", "num_attention_heads", "n_heads"):
        if isinstance(found := getattr(module, name, None), int):
            return found
    return int(getattr(module, "config", model.config).num_attention_heads)


def _sides(model: PreTrainedModel, modules: Mapping[str, nn.Module]) -> dict[str, tuple[str, str]]:
    if not model.config.is_encoder_decoder:
        return {name: ("input", "input") for name in modules}
    encoder = {id(module) for module in model.get_encoder().modules()}
    sides = {}
    for name, module in modules.items():
        cross = any(
            word in f"{name}.{type(module).__name__}".lower() for word in ("encdecattention", "encoder_attn", "cross")
        )
        query = "input" if id(module) in encoder else "decoder"
        sides[name] = (query, "input" if cross else query)
    return sides


def _configs(model: PreTrainedModel) -> list[tuple[Any, Any]]:
    """Every configuration in the model with its attention implementation, parents first."""
    found: dict[int, tuple[Any, Any]] = {}

    def add(config: Any) -> None:
        if hasattr(config, "_attn_implementation") and id(config) not in found:
            found[id(config)] = config, config._attn_implementation
            for name in getattr(config, "sub_configs", {}):
                add(getattr(config, name, None))

    for module in model.modules():
        add(getattr(module, "config", None))
    return list(found.values())
