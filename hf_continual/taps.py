"""Taps: forward hooks that record only while they are open, and remove only themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


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
