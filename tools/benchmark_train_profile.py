"""Where the time of a training step goes, by part of the model and of the loop.

Every moment of a step belongs to exactly one part, so the parts add up to the step. While one is recorded, modules and
the loop's functions open ranges in torch's profiler; an operator, and the Python between operators, belongs to the
innermost range that is open. Backward has no modules: autograd gives each of its nodes the number of the forward
operator that made it, and it belongs to that operator's part. What no range covers is `other`.

On a GPU it is kernels whose time is divided: each belongs to the operator that launched it, and what they leave of the
step is `waiting`. Recording makes a step slower, by about a microsecond for each operator: of two steps with as many
operators, the same.
"""

from __future__ import annotations

import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.autograd.profiler import record_function
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from megadiff.data.loader import Batch
from megadiff.models.attention import RMSNorm
from megadiff.parallel import head_loss
from megadiff.training.trainer import Trainer

FORWARD, BACKWARD, BETWEEN = "forward", "backward", ""
ON_GPU = torch.cuda.is_available()
"""What is attributed: the time of the kernels that an operator launches, on a GPU; its own, on a CPU."""

MODEL_PARTS = {
    "embedding": "embedding",
    "layers": "residual sums",
    "self_attention": "attention, projections",
    "core_attention": "attention, core",
    "mlp": "feed-forward",
    "norm": "norms",
    "output_layer": "output layer",
}
"""Parts by what a module is called."""
LOSS, DATA, NOISE = "loss", "reading and sharing data", "noise and its numbers"
ADDING, REDUCING, CLIPPING = "adding gradients up", "reducing gradients", "gradient norm and clipping"
ADAM, ZEROING, OTHER, WAITING = "Adam", "zeroing gradients", "other", "waiting"

ROWS = [
    *((part, BETWEEN) for part in (DATA, NOISE)),
    *((part, FORWARD) for part in (*MODEL_PARTS.values(), LOSS)),
    *((part, BACKWARD) for part in (LOSS, *reversed(MODEL_PARTS.values()))),
    *((part, BETWEEN) for part in (ADDING, REDUCING, CLIPPING, ADAM, ZEROING, OTHER, WAITING)),
]
"""Every (part, pass), in the order of a step."""


class Profile(NamedTuple):
    """Where the time of a step goes."""

    seconds: dict[tuple[str, str], float]
    """By (part, pass)."""
    step_time: float
    """Of the whole step, in seconds, as the loop itself measures it."""
    kernels: dict[str, float]
    """Seconds by the name of a kernel, on a CPU of an operator."""


_STEP, _RANGE, _NODE = "benchmark: step", "benchmark: ", "autograd::engine::evaluate_function: "


def profiled(trainer: Trainer, batches: Iterator[Batch]) -> Profile:
    """Record one training step on this rank."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if ON_GPU else [])]
    with ExitStack() as stack, profile(activities=activities) as recorded:
        for chunk in trainer.chunks:
            for name, module in chunk.module.named_modules():
                if part := _part_of(name, module):
                    stack.enter_context(_module_range(module, part))
        for owner, name, part in _functions(trainer):
            stack.enter_context(_function_range(owner, name, part))
        with record_function(_STEP):
            line = trainer.train_step(_ranged(batches))
            torch.cuda.synchronize()  # nothing on a CPU
    events = recorded.events()
    [step] = [event for event in events if event.name == _STEP and event.device_type == DeviceType.CPU]
    seconds, kernels = _attribute(step, events if ON_GPU else ()), _kernels(events)
    if ON_GPU:
        seconds[WAITING, BETWEEN] = max(0.0, line["step_time"] - sum(seconds.values()))
    return Profile(seconds, line["step_time"], kernels)


def _part_of(name: str, module: nn.Module) -> str | None:
    if isinstance(module, RMSNorm):
        return MODEL_PARTS["norm"]
    *above, last = name.split(".")
    return MODEL_PARTS["layers"] if above[-1:] == ["layers"] else MODEL_PARTS.get(last) if last != "layers" else None


def _functions(trainer: Trainer) -> Iterator[tuple[Any, str, str]]:
    """Functions that are parts of their own: who holds them, under which name, and the part."""
    step = type(trainer.step)
    yield sys.modules[step.__module__], "broadcast_batch", DATA
    yield step, "noised_batch", NOISE
    yield step, "_training_loss", LOSS
    yield head_loss, "sharded_row_loss", LOSS
    for chunk, denoiser in zip(trainer.chunks, trainer.denoisers, strict=True):
        yield chunk, "zero_grad_buffer", ZEROING
        yield denoiser.config, "finalize_model_grads_func", REDUCING
    for name, part in {
        "zero_grad": ZEROING,
        "prepare_grads": CLIPPING,
        "clip_grad_norm": CLIPPING,
        "step_with_ready_grads": ADAM,
    }.items():
        yield trainer.optimizer, name, part


@contextmanager
def _module_range(module: nn.Module, part: str) -> Iterator[None]:
    """Open a range while the module computes."""
    opened: list[record_function] = []

    def enter(*_: Any) -> None:
        opened.append(record_function(_RANGE + part))
        opened[-1].__enter__()

    def leave(*_: Any) -> None:
        opened.pop().__exit__(None, None, None)

    hooks = [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    yield
    for hook in hooks:
        hook.remove()


@contextmanager
def _function_range(owner: Any, name: str, part: str) -> Iterator[None]:
    """Open a range while the function computes."""
    function, is_own = getattr(owner, name), name in vars(owner)

    def in_range(*args: Any, **kwargs: Any) -> Any:
        with record_function(_RANGE + part):
            return function(*args, **kwargs)

    setattr(owner, name, in_range)
    yield
    if is_own:
        setattr(owner, name, function)
    else:
        delattr(owner, name)


def _ranged(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The batches, with a range open while one is waited for."""
    while True:
        with record_function(_RANGE + DATA):
            batch = next(batches)
        yield batch


def _own_time(event: FunctionEvent) -> float:
    """Microseconds outside of the events within: of the kernels that it launched itself, or of the CPU."""
    if ON_GPU:
        return sum(kernel.duration for kernel in event.kernels if not kernel.name.startswith(_RANGE))
    return event.self_cpu_time_total


def _kernels(events: Iterable[FunctionEvent]) -> dict[str, float]:
    """Seconds by name, of what is not one of our ranges or autograd's nodes."""
    seconds: dict[str, float] = defaultdict(float)
    for event in events:
        is_name = event.name.startswith((_RANGE, _NODE)) or event.is_user_annotation
        if (event.device_type == DeviceType.CUDA) == ON_GPU and not is_name:
            seconds[event.name] += 1e-6 * (event.device_time_total if ON_GPU else event.self_cpu_time_total)
    return dict(seconds)


def _attribute(step: FunctionEvent, events: Iterable[FunctionEvent] = ()) -> dict[tuple[str, str], float]:
    """Divide the time of a recorded step: what an event spends outside of its children belongs to its part.

    Args:
        events: all that was recorded. Backward of a GPU has a thread of its own, whose events are nobody's children.
    """
    seconds: dict[tuple[str, str], float] = defaultdict(float)
    made_by: dict[int, str] = {}  # part of the forward operator that made the backward node of this number

    def add(event: FunctionEvent, row: tuple[str, str]) -> None:
        part, which = row
        if event.name.startswith(_RANGE):
            part = event.name.removeprefix(_RANGE)
            which = FORWARD if (part, FORWARD) in ROWS else BETWEEN
        elif event.name.startswith(_NODE):
            accumulates = event.name.endswith("AccumulateGrad")
            part = ADDING if accumulates else made_by.get(event.sequence_nr, OTHER)
            which = BACKWARD if (part, BACKWARD) in ROWS else BETWEEN
        elif which != BACKWARD and event.sequence_nr >= 0:
            made_by[event.sequence_nr] = part  # others may have seen the number that was next: the last has used it
        seconds[part, which] += 1e-6 * _own_time(event)
        for child in event.cpu_children:
            add(child, (part, which))

    seconds[OTHER, BETWEEN] += 1e-6 * _own_time(step)
    for child in step.cpu_children:
        add(child, (OTHER, BETWEEN))
    for event in events:
        is_root = event.device_type == DeviceType.CPU and event.cpu_parent is None and not event.is_async
        if is_root and event.thread != step.thread and _is_within(event, step):
            add(event, (OTHER, BETWEEN))
    return dict(seconds)


def _is_within(event: FunctionEvent, step: FunctionEvent) -> bool:
    """Whether it began while the step was taken."""
    return step.time_range.start <= event.time_range.start <= step.time_range.end


def middle_half(profiles: Sequence[Profile]) -> Profile:
    """Mean of the steps whose time lies between the quartiles: a busy moment of the machine is left out as a whole."""
    ordered = sorted(profiles, key=lambda profile: profile.step_time)
    cut = len(ordered) // 4
    kept = ordered[cut : len(ordered) - cut]
    names = {name for profile in kept for name in profile.kernels}
    return Profile(
        {row: statistics.fmean(profile.seconds.get(row, 0.0) for profile in kept) for row in ROWS},
        statistics.fmean(profile.step_time for profile in kept),
        {name: statistics.fmean(profile.kernels.get(name, 0.0) for profile in kept) for name in names},
    )
