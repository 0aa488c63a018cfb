"""Run unmodified Megatron-Core on a machine without CUDA, over gloo.

Megatron-Core writes `device="cuda"` into factory calls, asks for the current CUDA device, keeps the CUDA generator's
state and recognises parameters by the name `torch.cuda.FloatTensor`. None of this is essential: with the word
"cuda" read as "cpu", tensor, pipeline and data parallelism, the distributed optimizer and distributed checkpoints
run as they are, so every layout can be tested on a laptop. `install` rebinds exactly the functions below and does
nothing where CUDA is present; nothing else of torch or Megatron-Core is touched.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

_FACTORIES = ("arange", "empty", "empty_like", "full", "ones", "ones_like", "tensor", "zeros", "zeros_like")
_NO_OPS = ("synchronize", "empty_cache", "set_device")
_CPU = torch.device("cpu")

_installed = False


class _HostStream:
    """A queue of work that is always empty: everything has run when a call returns. Its own event, too."""

    def record_event(self) -> _HostStream:
        return self

    def wait_stream(self, stream: _HostStream) -> None:
        """Nothing to wait for."""

    def wait(self, stream: _HostStream) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""


class _TypeName(str):
    """A tensor type name that equals its CUDA spelling, e.g. `torch.FloatTensor == torch.cuda.FloatTensor`."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and str.__eq__(self, other.replace("torch.cuda.", "torch."))

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


def _names_cuda(device: Any) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


def _read_cuda_as_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def on_cpu(*args: Any, **kwargs: Any) -> Any:
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        return factory(*args, **kwargs)

    return on_cpu


def _type_with_alias(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        return _TypeName(result) if isinstance(result, str) else result

    return type_


def install() -> bool:
    """Make Megatron-Core usable without CUDA in this process.

    Returns:
        True if the process now runs on the shim, False where CUDA is present and nothing was changed.
    """
    global _installed
    if torch.cuda.is_available():
        return False
    if _installed:
        return True

    from megatron.core.tensor_parallel import random as megatron_random

    for name in _FACTORIES:
        setattr(torch, name, _read_cuda_as_cpu(getattr(torch, name)))
    for name in _NO_OPS:
        setattr(torch.cuda, name, lambda *args, **kwargs: None)
    torch.cuda.current_device = lambda: _CPU  # type: ignore[assignment, return-value]
    torch.cuda.current_stream = lambda device=None: _HostStream()  # type: ignore[assignment, return-value]
    torch.cuda.stream = nullcontext  # type: ignore[assignment]
    torch.cuda.default_stream = torch.cuda.current_stream
    torch.cuda.Stream = lambda device=None: _HostStream()  # type: ignore[assignment, misc]
    torch.cuda.manual_seed = torch.manual_seed  # type: ignore[assignment]

    # Megatron's tracker swaps generator states around weight initialisation and recomputation.
    torch.cuda.get_rng_state = lambda device="cuda": torch.get_rng_state()
    torch.cuda.random.get_rng_state = torch.cuda.get_rng_state
    megatron_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)

    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[assignment, method-assign]
    torch.Tensor.type = _type_with_alias(torch.Tensor.type)  # type: ignore[assignment, method-assign]
    _installed = True
    return True
