"""Optional libraries that make a GPU faster: what each does, and whether it is live here.

Whoever uses an acceleration asks here, and so does `megadiff doctor`: what is told is what runs. Each one computes what
the plain path computes, to rounding. A run records which ones it used, for another day other ones may be installed.

Norms need nothing of this kind: torch's own RMS norm is one fused CUDA kernel in every torch that megadiff accepts. Nor
do rotary phases and activations, which torch.compile fuses (`megadiff.models.fused`).
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
from dataclasses import dataclass
from typing import Any, Literal

import torch

from megadiff.machine.versions import major_minor, version

State = Literal["live", "missing", "not applicable"]
NO_CUDA = "no CUDA device"
GRADIENT_ACCUMULATION = "fused_weight_gradient_mlp_cuda"
"""The module of Apex's that Megatron's linear layers call, built with --cuda_ext."""
TRANSFORMER_ENGINE = "transformer_engine.pytorch"
"""The module with layers, attention and FP8."""
TRANSFORMER_ENGINE_FP8 = "transformer_engine.pytorch.fp8"
TRANSFORMER_ENGINE_VERSIONS = (2, 10), (2, 20)
"""The oldest and the newest version that is supported: the sources of both have all that is used of the package."""
MEGATRON_EXTENSION = "megatron.core.extensions.transformer_engine"
"""Megatron's layers by Transformer Engine; where it finds that it cannot use the package, they are stubs."""
FP8_CAPABILITY = {"delayed": (8, 9), "tensorwise": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}
"""Compute capability from which on Transformer Engine computes each recipe, as its own checks state."""
FP8_VERSION = {"delayed": (1, 0), "tensorwise": (2, 2), "blockwise": (2, 3), "mxfp8": (2, 1)}
"""Transformer Engine's version from which on Megatron-Core has each recipe; `get_fp8_recipe` of 0.16.1."""
BLOCKWISE_CUDA = (12, 9)
FP8_CHECK = {
    "delayed": "check_fp8_support",
    "tensorwise": "check_fp8_support",
    "blockwise": "check_fp8_block_scaling_support",
    "mxfp8": "check_mxfp8_support",
}
"""These checks, functions of `TRANSFORMER_ENGINE_FP8`: a version may refuse more, as blockwise on Blackwell once."""
FUSED_ADAMS = {"transformer_engine": "transformer_engine.pytorch.optimizers", "apex": "apex.optimizers"}
"""Modules with a class `FusedAdam`, the preferred one first."""


@dataclass(frozen=True, kw_only=True)
class Acceleration:
    """One row of the doctor's table."""

    name: str
    purpose: str
    state: State
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.state}{f', {self.reason}' if self.reason else ''} ({self.purpose})"


def _imported(module: str) -> tuple[Any | None, str]:
    """A module, or None and why there is none."""
    try:
        return importlib.import_module(module), ""
    except ModuleNotFoundError as error:
        return None, f"no module {error.name}"
    except Exception as error:  # a library built for another torch or CUDA fails in its own way
        return None, f"{module} fails to import: {' '.join(str(error).split())[:120]}"


def fuses_gradient_accumulation() -> bool:
    """Whether Megatron's layers add weight gradients to the fp32 buffer by the product that computes them.

    Transformer Engine's always do.
    """
    return torch.cuda.is_available() and _imported(GRADIENT_ACCUMULATION)[0] is not None


def why_not_compiled() -> str:
    """Why torch.compile cannot make kernels for the device; empty where it can."""
    if not torch.cuda.is_available():
        return NO_CUDA
    if reason := _imported("triton")[1]:
        return reason
    compilers = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang"]
    return "" if any(map(shutil.which, compilers)) else f"no {' or '.join(compilers)}, which Triton needs"


def why_no_transformer_engine() -> str:
    """Why layers cannot be Transformer Engine's; empty where they can: where Megatron-Core says so, too."""
    if not torch.cuda.is_available():
        return NO_CUDA
    if reason := _imported(TRANSFORMER_ENGINE)[1]:
        return reason
    extension, reason = _imported(MEGATRON_EXTENSION)
    if extension is None or extension.HAVE_TE:
        return reason
    return f"Megatron-Core finds no {TRANSFORMER_ENGINE_FP8} with fp8_autocast in it"


def supported_transformer_engine() -> str:
    """The supported versions of Transformer Engine, in words."""
    return " to ".join(f"{major}.{minor}" for major, minor in TRANSFORMER_ENGINE_VERSIONS)


def transformer_engine_concern() -> str:
    """What whoever trains on this GPU with `auto` has to know of Transformer Engine, as a sentence.

    Empty where layers and attention can be those of a supported version, and where there is no GPU.
    """
    reason, supported = why_no_transformer_engine(), supported_transformer_engine()
    if reason == NO_CUDA:
        return ""
    if reason:
        return (
            f"Transformer Engine cannot be used on this GPU ({reason}), so slower local layers and attention train: "
            f"install transformer_engine[pytorch] of a version from {supported}, or set model.transformer_impl and "
            "model.attention_backend local"
        )
    installed, (oldest, newest) = version("transformer_engine") or "0", TRANSFORMER_ENGINE_VERSIONS
    if oldest <= major_minor(installed) <= newest:
        return ""
    return (
        f"Transformer Engine is of version {installed}, but supported are {supported}: install one of these, or set "
        "model.transformer_impl and model.attention_backend local"
    )


def has_transformer_engine_attention() -> bool:
    """Whether attention may be Transformer Engine's."""
    return not why_no_transformer_engine()


def why_no_fp8(recipe: str) -> str:
    """Why linear layers cannot compute in FP8 by a recipe; empty where they can."""
    if reason := why_no_transformer_engine():
        return reason
    installed = version("transformer_engine") or "0"
    if major_minor(installed) < FP8_VERSION[recipe]:
        return "Transformer Engine {}, below {}.{}".format(installed, *FP8_VERSION[recipe])
    capability, least = torch.cuda.get_device_capability(), FP8_CAPABILITY[recipe]
    if capability < least:
        return "compute capability {}.{}, below {}.{}".format(*capability, *least)
    cuda = torch.version.cuda or "0.0"
    if recipe == "blockwise" and major_minor(cuda) < BLOCKWISE_CUDA:
        return "CUDA {}, below {}.{}".format(cuda, *BLOCKWISE_CUDA)
    _, reason = getattr(importlib.import_module(TRANSFORMER_ENGINE_FP8), FP8_CHECK[recipe])()
    return reason.rstrip(".")


def resolve_adam(implementation: str) -> str:
    """The Adam on the device that a setting means here: torch, transformer_engine or apex.

    Args:
        implementation: one of these, or auto: the first one that can be imported where there is a CUDA device.

    Raises:
        ValueError: what was asked for cannot run here.
    """
    if implementation == "torch" or (implementation == "auto" and not torch.cuda.is_available()):
        return "torch"
    if implementation == "auto":
        return next((name for name, module in FUSED_ADAMS.items() if _imported(module)[0] is not None), "torch")
    reason = _imported(FUSED_ADAMS[implementation])[1] if torch.cuda.is_available() else NO_CUDA
    if reason:
        raise ValueError(
            f"optimizer.implementation is {implementation}, but its FusedAdam cannot run here ({reason}): "
            "choose auto or torch"
        )
    return implementation


def used(transformer_impl: str) -> dict[str, str]:
    """What a run records beside its optimizer: whose implementation does what could be done by another.

    Args:
        transformer_impl: whose layers, local or transformer_engine; the output layer is Megatron's in any case.
    """
    on_cuda = torch.cuda.is_available()
    accumulation = "apex" if fuses_gradient_accumulation() else "torch"
    if transformer_impl == "transformer_engine":
        accumulation = f"transformer_engine, {accumulation} in the output layer"
    return {
        "gradient_accumulation": accumulation,
        "rms_norm": "torch, fused" if on_cuda else "torch",
        "rotary_and_activations": "torch" if why_not_compiled() else "torch, compiled",
    }


def table() -> list[Acceleration]:
    """All optional accelerations and their state on this machine."""
    on_cuda = torch.cuda.is_available()
    rows = [
        Acceleration(
            name="fused RMS norm",
            purpose="one kernel per norm, torch's own",
            state="live" if on_cuda else "not applicable",
            reason="" if on_cuda else NO_CUDA,
        ),
        _row_of("fused rotary phases, activations", "one kernel each, by torch.compile", why_not_compiled()),
        _row(
            "gradient accumulation",
            "Apex: weight gradients of Megatron's layers go straight into the buffer",
            GRADIENT_ACCUMULATION,
        ),
    ]
    for name, purpose in (("transformer layers", "norms fused with linears"), ("attention", "flash kernels")):
        rows.append(_row_of(name, f"Transformer Engine: {purpose}", why_no_transformer_engine()))
    rows.append(_fp8_row())
    preferred = resolve_adam("auto")
    for library, module in FUSED_ADAMS.items():
        row = _row(f"FusedAdam, {library}", "all weights in a few kernels", module)
        if row.state == "live" and library != preferred:
            row = Acceleration(
                name=row.name, purpose=row.purpose, state="not applicable", reason=f"{preferred} goes before it"
            )
        rows.append(row)
    has_deepspeed = importlib.util.find_spec("deepspeed") is not None
    rows.append(
        Acceleration(
            name="DeepSpeed CPU Adam",
            purpose="optimizer offload, when chosen",
            state="live" if has_deepspeed else "missing",
            reason="compiled at its first use" if has_deepspeed else "pip install megadiff[offload]",
        )
    )
    has_monitor = importlib.util.find_spec("nvidia_resiliency_ext") is not None
    rows.append(
        Acceleration(
            name="nvidia-resiliency-ext",
            purpose="heartbeats to ft_launcher, when it starts the job",
            state="live" if has_monitor else "missing",
        )
    )
    return rows


def _fp8_row() -> Acceleration:
    """FP8 products, by recipe: live where any is, and what the others lack."""
    reasons = {recipe: why_no_fp8(recipe) for recipe in FP8_CAPABILITY}
    missing = {recipe: reason for recipe, reason in reasons.items() if reason}
    state: State = (
        "live" if len(missing) < len(reasons) else "missing" if torch.cuda.is_available() else "not applicable"
    )
    shared = set(reasons.values())
    reason = shared.pop() if len(shared) == 1 else "; ".join(f"no {name}: {why}" for name, why in missing.items())
    return Acceleration(name="FP8", purpose="products of the layers, when chosen", state=state, reason=reason)


def _row(name: str, purpose: str, module: str) -> Acceleration:
    """The row of something that lives on a CUDA device in a module of its own."""
    return _row_of(name, purpose, _imported(module)[1] if torch.cuda.is_available() else NO_CUDA)


def _row_of(name: str, purpose: str, reason: str) -> Acceleration:
    """The row of something that is live unless there is a reason why not."""
    state: State = "live" if not reason else "not applicable" if reason == NO_CUDA else "missing"
    return Acceleration(name=name, purpose=purpose, state=state, reason=reason)
