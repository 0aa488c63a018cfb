"""Whether an unexpected result is the run's or the device's: compute it again and compare.

Megatron's rerun state machine does the attribution. A step whose loss is not a number, or a spike, is computed again
where it is: another result means that the device erred (transient). The same result means data, settings or a device
that always errs; for a number that is none, the run then saves and ends with exit code 16, to be computed once more on
another device: another result there means that the first device is faulty (persistent), the same that the run is.

This works because a step is a function of the parameters and its sample ordinals: noise and data have no state that a
first attempt would have moved. Nothing is updated before the verdict. What the machine needs to remember until the job
has moved lies in RUN/rerun.json, so checkpoints know nothing of it.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import statistics
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core.rerun_state_machine import (
    COMPARISON_MATCH,
    COMPARISON_MISMATCH,
    Call,
    Caller,
    RerunMode,
    RerunState,
    RerunStateMachine,
)

from megadiff.integrity import replace_text
from megadiff.parallel.groups import Groups
from megadiff.training.checkpoint import from_rank_zero
from megadiff.training.config import TrainingConfig

logger = logging.getLogger(__name__)

T = TypeVar("T")

MEMORY_NAME = "rerun.json"
NOT_A_NUMBER, SPIKE = "not a number", "spike"
GPU_TOLERANCE = 1e-3
"""Relative difference of two results on a GPU that counts as equal: sums in varying order, rounded to bf16. A CPU
repeats itself to the last bit."""
SPIKE_WINDOW, SPIKE_MIN_STEPS = 100, 20


class SuspectResultError(RuntimeError):
    """A result was not a number, and the machine has said what is to be done about it; nothing was updated."""

    def __init__(self, message: str, *, exit_code: int, needs_checkpoint: bool) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        """Megatron's: 16 asks for another device, 17 is a verdict."""
        self.needs_checkpoint = needs_checkpoint
        """Whether the state before this step has to be saved, for the step to be computed once more."""


class _Machine(RerunStateMachine):
    """Megatron's machine, without device collectives and without its report of statistics."""

    def __init__(self, control: dist.ProcessGroup, mode: str) -> None:
        super().__init__(mode=RerunMode(mode))
        self._control = control

    def _reduce_any(self, value: bool | list[bool]) -> bool | tuple[bool, ...]:
        flags = torch.tensor(value if isinstance(value, list) else [value], dtype=torch.int32)
        # all-reduce MAX over all ranks, on the host
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._control)
        found = tuple(flag > 0 for flag in flags.tolist())
        return found if isinstance(value, list) else found[0]

    def _maybe_report_stats(self) -> None:
        """Ours is in `StepRerun.settle`: Megatron's, in 0.16.1, reads attributes that its records do not have."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one computation of a step gave, as one rank knows it."""

    own_loss: float
    """Mean over this rank's own micro-batches; 0 where this rank has no loss."""
    loss: float
    grad_norm: float

    def __str__(self) -> str:
        return f"loss {self.loss:.6g} and gradient norm {self.grad_norm:.6g}"

    def distance(self, other: Result) -> float:
        """Largest relative difference of a number; 0 for equal bits and for NaN in both."""
        return max(_relative_difference(a, b) for a, b in zip(astuple(self), astuple(other), strict=True))


def _relative_difference(a: float, b: float) -> float:
    if a == b or (math.isnan(a) and math.isnan(b)):
        return COMPARISON_MATCH
    if not (math.isfinite(a) and math.isfinite(b)):
        return COMPARISON_MISMATCH
    return abs(a - b) / max(abs(a), abs(b))


def _is_no_number(result: Result) -> bool:
    """Whether this rank rejects the result: for its own loss, or for a norm that no rank's loss explains."""
    return not math.isfinite(result.own_loss) or (math.isfinite(result.loss) and not math.isfinite(result.grad_norm))


@dataclass(frozen=True, kw_only=True)
class _Witness:
    """What one rank has seen of a step that was computed more than once."""

    rank: int
    node: str
    device: int | str
    suspect: bool
    """Whether it rejected the first result."""
    accused: str
    """Host and device on which the first result came out twice."""
    first: Result
    last: Result

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.node}, device {self.device})"


class StepRerun:
    """The machine around the forward and backward passes of each step.

        for micro_batches in rerun.attempts(batches, num_micro_batches):
            ...forward, backward...
            rerun.validate(result)
        rerun.settle(step)
        ...update...

    Args:
        config_yaml: of the run; a step is not compared with one under other settings.
    """

    def __init__(self, config: TrainingConfig, config_yaml: str, groups: Groups, run_dir: Path) -> None:
        self._config, self._config_yaml, self._groups = config, config_yaml, groups
        self._memory = run_dir / MEMORY_NAME
        self._machine = _Machine(groups.control, config.rerun_mode)
        self._tolerance = GPU_TOLERANCE if groups.device.type == "cuda" else 0.0
        self._recent: deque[Result] = deque(maxlen=SPIKE_WINDOW)
        self._results: list[Result] = []

    def resume(self, completed_steps: int) -> None:
        """Take up a run that has completed these steps, perhaps to compute the next once more; a collective."""
        # The machine validates from the second step on: only a run that has made a step can be saved.
        self._machine.first_iteration_complete = completed_steps > 0
        if self._machine.mode != RerunMode.VALIDATE_RESULTS:
            return
        memory = from_rank_zero(self._read_memory, self._groups.control)
        if memory is None:
            return
        now = self._circumstances(completed_steps + 1)
        if changed := [name for name, value in now.items() if memory[name] != value]:
            logger.info("%s no longer counts and is deleted: %s changed", self._memory, ", ".join(changed))
            if self._groups.rank == 0:
                self._memory.unlink()
            return
        logger.info("computing step %d once more, to tell a fault of a device from one of the run", now["step"])
        self._machine.state = RerunState.WILL_RERUN_FROM_CHECKPOINT
        if suspect := memory["suspects"].get(str(self._groups.rank)):
            self._machine.failed_validation_call = Call(Caller(NOT_A_NUMBER, self._groups.rank), sequence=1)
            self._machine.initial_result = Result(**suspect["result"])
            self._machine.suspicious_node = suspect["node"]
            device = suspect["device"]
            self._machine.suspicious_device = torch.device(device) if isinstance(device, str) else device

    def _read_memory(self) -> dict[str, Any] | None:
        """What an earlier start has written down; None if it has not."""
        if not self._memory.is_file():
            return None
        try:
            memory = json.loads(self._memory.read_text())
            return {name: memory[name] for name in ("suspects", *self._circumstances(0))}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self._memory} is damaged ({error!r}): delete it to go on without it") from error

    def attempts(self, batches: Iterator[T], num_micro_batches: int) -> Iterator[Iterator[T]]:
        """Yield the micro-batches of a step, once for each time that it has to be computed; a collective of the job."""
        self._results = []
        if self._machine.mode != RerunMode.DISABLED:
            batches = itertools.islice(batches, num_micro_batches)
        while self._machine.should_run_forward_backward(None):
            if self._machine.mode == RerunMode.DISABLED:
                yield batches
            else:
                batches, attempt = itertools.tee(batches)
                yield attempt

    def validate(self, result: Result) -> None:
        """Tell the machine what an attempt gave; before anything is updated."""
        self._results.append(result)
        if self._machine.mode == RerunMode.DISABLED:
            return
        compare, tolerance = Result.distance, self._tolerance
        self._machine.validate_result(result, _is_no_number, NOT_A_NUMBER, compare, tolerance, fatal=True)
        if self._machine.mode == RerunMode.VALIDATE_RESULTS:
            self._machine.validate_result(result, self._is_spike, SPIKE, compare, tolerance, fatal=False)

    def _is_spike(self, result: Result) -> bool:
        """Whether a number of the whole job is far above its median of late; so all ranks decide alike."""
        if len(self._recent) < SPIKE_MIN_STEPS:
            return False
        return any(
            getattr(result, name)
            > self._config.spike_factor * statistics.median(getattr(r, name) for r in self._recent)
            for name in ("loss", "grad_norm")
        )

    def settle(self, step: int) -> None:
        """Report what the machine found about a step, and remember what another start has to know; a collective.

        Raises:
            SuspectResultError: the step must not be updated with, and the run ends here.
        """
        machine = self._machine
        self._recent.append(self._results[-1])
        if machine.mode == RerunMode.REPORT_DETERMINISM_STATS and step % self._config.log_interval == 0:
            (stats,) = machine.stats.values()
            logger.info("every step was computed twice; relative differences: %s", stats.print_stats())
        # All ranks are in the same state: it follows from flags that they have exchanged.
        state = machine.state
        needs_checkpoint, must_exit, exit_code = machine.should_checkpoint_and_exit()
        if machine.mode != RerunMode.VALIDATE_RESULTS or (len(self._results) == 1 and not must_exit):
            return

        witnesses = self._witnesses()
        suspects = [witness for witness in witnesses if witness.suspect]
        sentence = f"step {step}: {suspects[0].first}; {self._verdict(state, witnesses, suspects)}"
        if not must_exit:
            if self._groups.rank == 0:
                logger.warning("%s; going on", sentence)
            return
        if self._groups.rank == 0:
            if state == RerunState.WILL_RERUN_FROM_CHECKPOINT:
                self._remember(step, suspects)
            elif state == RerunState.RERUNNING_FROM_CHECKPOINT:
                self._memory.unlink()
        raise SuspectResultError(sentence, exit_code=exit_code, needs_checkpoint=needs_checkpoint)

    def _verdict(self, state: RerunState, witnesses: list[_Witness], suspects: list[_Witness]) -> str:
        """What a state of the machine means, in words."""
        differs = any(witness.first.distance(witness.last) > self._tolerance for witness in suspects)
        last = suspects[0].last
        if state == RerunState.RERUNNING_AGAIN_FROM_CHECKPOINT:
            return (
                f"to be computed on another device, but on the same again: {_named(suspects)}; start on another node, "
                f"or delete {self._memory} if there is none"
            )
        if state == RerunState.RERUNNING_FROM_CHECKPOINT:
            if differs:
                return (
                    f"on another device it is {last}: a persistent fault of {suspects[0].accused}; take it out, and "
                    "start again to go on"
                )
            return "the same on another device: it is the run's own; lower optimizer.lr or look at the samples"
        if differs:
            return f"computed again it is {last}: a transient fault of {_culprits(witnesses)}"
        if state == RerunState.WILL_RERUN_FROM_CHECKPOINT:
            return (
                f"the same when computed again on {_named(suspects)}: data, settings, or a device that always errs; "
                "start again on another node to tell, or with other settings"
            )
        return "the same when computed again: it belongs to data or settings, not to a device"

    def _witnesses(self) -> list[_Witness]:
        """What every rank has seen of this step; a collective of the job."""
        machine, last = self._machine, self._results[-1]
        # After a return the first result is that of the run before, on the ranks that rejected it.
        first = self._results[0] if len(self._results) > 1 else machine.initial_result or last
        device = torch.cuda.current_device()
        mine = _Witness(
            rank=self._groups.rank,
            node=os.uname().nodename,
            device=device if isinstance(device, int) else str(device),
            suspect=machine.rerun_requested if len(self._results) > 1 else machine.initial_result is not None,
            accused=f"host {machine.suspicious_node}, device {machine.suspicious_device}",
            first=first,
            last=last,
        )
        everyone: list[Any] = [None] * self._groups.world_size
        # all-gather of one small object over all ranks, on the host
        dist.all_gather_object(everyone, mine, group=self._groups.control)
        return everyone

    def _circumstances(self, step: int) -> dict[str, Any]:
        """What must not change for a step to be compared with what it gave before."""
        return {"step": step, "world_size": self._groups.world_size, "settings": self._config_yaml}

    def _remember(self, step: int, suspects: list[_Witness]) -> None:
        """Write down what the machine needs when the job starts again elsewhere."""
        memory = self._circumstances(step) | {
            "suspects": {
                str(suspect.rank): {"result": asdict(suspect.first), "node": suspect.node, "device": suspect.device}
                for suspect in suspects
            }
        }
        replace_text(self._memory, json.dumps(memory, indent=2))


def _named(witnesses: list[_Witness]) -> str:
    """Ranks with host and device; of many, the first."""
    more = f" and {len(witnesses) - 4} more" if len(witnesses) > 5 else ""
    return ", ".join(map(str, witnesses if not more else witnesses[:4])) + more


def _culprits(witnesses: list[_Witness]) -> str:
    """The ranks whose own loss was another the second time; where none was, the fault came after the loss."""
    own = [w for w in witnesses if _relative_difference(w.first.own_loss, w.last.own_loss) > 0]
    return _named(own) if own else f"one of {_named(witnesses)}, in the backward pass"
