"""Which checkpoints a run has, which of them it resumes from, and which may go.

    RUN/checkpoints/step_00000400/
        manifest.json     step, consumed samples, shapes, versions; size and SHA-256 of every other file; its own digest
        config.yaml       the run's resolved configuration
        tokenizer.model
        state/            Megatron-Core distributed checkpoint: model and optimizer, by canonical parameter name

A checkpoint is written beside its final name and renamed when everything is on disk; it is renamed away before it is
deleted. So a directory named step_* is complete, and a crash at any byte leaves the previous ones as they were. Nothing
random is saved, because noise, data order and learning rate are functions of the step.

`megadiff.training.writer` writes them, `megadiff.training.state` says what they hold, `megadiff.integrity` checks them.
"""

from __future__ import annotations

import logging
import math
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megadiff.fields import require
from megadiff.integrity import MANIFEST_NAME, damage, has_checksums, read_manifest

logger = logging.getLogger(__name__)

_NAME = re.compile(r"step_(\d{8,})")
_PARTIAL, _DELETING, _DAMAGED = ".partial", ".deleting", ".damaged"


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are written, how many stay, and where a run starts from."""

    interval: int = 1000
    """Steps between checkpoints; one more always follows the last step. 0 saves only then."""
    interval_minutes: float = 0.0
    """Minutes between checkpoints, by the clock of rank 0 and beside `interval`; 0 looks at steps only."""
    keep_last: int = 3
    """Checkpoints kept; older ones are deleted after a new one is complete. 0 keeps all."""
    keep_every: int = 0
    """Checkpoints whose step is a multiple of this are never deleted; 0 makes no exception."""
    async_save: bool = False
    """Copy the state and write it while training goes on; takes memory for the copy. The last save always waits."""
    load: str = "latest"
    """Where the run starts: "latest" good checkpoint of the run directory, if any; a step or step_* name of it, which
    must be its last; the path of another run or of its checkpoint, to branch off; "none": the directory must be new."""
    verify: bool = True
    """Compare all files with the checksums before resuming; a damaged checkpoint is passed over for the one before."""

    def __post_init__(self) -> None:
        for name in ("interval", "keep_last", "keep_every"):
            require(getattr(self, name) >= 0, f"checkpoint.{name}", getattr(self, name), "be at least 0")
        require(
            0 <= self.interval_minutes < math.inf,
            "checkpoint.interval_minutes",
            self.interval_minutes,
            "be at least 0 and finite",
        )
        require(self.load != "", "checkpoint.load", self.load, 'be "latest", "none", a step or a path')


# Names and places


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step is published."""
    return run_dir / "checkpoints" / f"step_{step:08d}"


def partial_path(final: Path) -> Path:
    """Where a checkpoint is written before it is published."""
    return final.with_name(final.name + _PARTIAL)


def step_of(checkpoint: Path) -> int | None:
    """The step that a published checkpoint is named after; None for any other name."""
    match = _NAME.fullmatch(checkpoint.name)
    return int(match[1]) if match else None


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    directory = run_dir / "checkpoints"
    if not directory.is_dir():
        return []
    found = [(step, path) for path in directory.iterdir() if (step := step_of(path)) is not None]
    return [path for _, path in sorted(found)]


def is_checkpoint(path: Path) -> bool:
    """Whether a directory has the parts of a checkpoint."""
    return (path / MANIFEST_NAME).is_file() and (path / "state").is_dir()


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that `path` means: itself, or the newest one of a run directory.

    Raises:
        ValueError: there is none.
    """
    if is_checkpoint(path):
        return path
    checkpoints = list_checkpoints(path)
    if not checkpoints:
        raise ValueError(
            f"{path} is neither a checkpoint (step_* with manifest.json and state/) nor a run directory that has one: "
            "check the path, or train until the first checkpoint is saved"
        )
    return checkpoints[-1]


# Which one to resume from


def candidates(run_dir: Path, load: str) -> list[Path]:
    """The checkpoints that `CheckpointConfig.load` allows, in the order to try them; empty to start from nothing.

    A run goes back only into a new directory: were an older step of the same one taken, the newer checkpoints would win
    again at the next start. So the launch command of a branch may stay the same from start to start: what the branch
    itself has saved goes before the checkpoint that it came from.

    Raises:
        ValueError: there is no such checkpoint, or taking it would leave newer ones in the way.
    """
    own = list_checkpoints(run_dir)[::-1]
    if load == "latest":
        return own
    if load == "none":
        if own:
            raise ValueError(
                f"checkpoint.load is none, but {run_dir} already has {own[0].name}: choose another --run-dir, or leave "
                "checkpoint.load at latest to go on"
            )
        return []
    path = checkpoint_path(run_dir, int(load)) if load.isdecimal() else Path(load)
    if _NAME.fullmatch(load):
        path = run_dir / "checkpoints" / load
    if path.resolve().parent == (run_dir / "checkpoints").resolve():
        return [_last_of(own, path, run_dir)]
    if own:
        logger.info("%s goes on from its own checkpoints; checkpoint.load %s is where it began", run_dir, path)
        return own
    found = [path] if is_checkpoint(path) else list_checkpoints(path)[::-1]
    if not found:
        raise ValueError(
            f"checkpoint.load is {load}, which is neither a checkpoint nor a run directory that has one: expected "
            "latest, none, a step, a step_* name or a path"
        )
    return found


def _last_of(own: list[Path], named: Path, run_dir: Path) -> Path:
    names = [path.name for path in own]
    if named.name not in names:
        raise ValueError(f"{run_dir} has no checkpoint {named.name}: it has {', '.join(names) or 'none'}")
    if named.name != names[0]:
        raise ValueError(
            f"{run_dir} has checkpoints after {named.name} (the newest is {names[0]}), which would be taken again at "
            f"the next start: branch off with another --run-dir and --checkpoint.load {named}, or move the newer ones "
            "away"
        )
    return own[0]


def choose_checkpoint(
    run_dir: Path, config: CheckpointConfig, control: dist.ProcessGroup
) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to start from and its manifest, the same on every rank; None to start from nothing.

    A collective of the whole job. Rank 0 says what there is, because file systems may show a new directory to one node
    before another; all ranks share the checking. A damaged checkpoint is passed over with a warning, and renamed if it
    is the run's own: it must neither be tried again nor count among those that are kept.

    Args:
        control: all ranks, over gloo.

    Raises:
        ValueError: none of the checkpoints is good, `config.load` cannot be followed, or some rank sees no such file.
    """
    damaged: dict[Path, str] = {}
    for checkpoint in from_rank_zero(lambda: candidates(run_dir, config.load), control):
        check_all_see(checkpoint, control)
        try:
            manifest = checked_manifest(checkpoint, control, verify=config.verify)
        except DamagedCheckpointError as error:
            damaged[checkpoint] = str(error)
            if dist.get_rank() == 0:
                logger.warning("%s; trying the one before", error)
            continue
        own = [path for path in damaged if path.parent == run_dir / "checkpoints"]
        from_rank_zero(partial(_mark_as_damaged, own), control)
        return checkpoint, manifest
    if damaged:
        raise ValueError(
            f"no checkpoint to start from is undamaged: {'; '.join(damaged.values())}; restore one from a copy, "
            "or choose another --run-dir to start anew"
        )
    return None


def _mark_as_damaged(checkpoints: list[Path]) -> None:
    for path in checkpoints:
        path.replace(path.with_name(path.name + _DAMAGED))


def check_all_see(checkpoint: Path, control: dist.ProcessGroup) -> None:
    """Check that the checkpoint that rank 0 has found is there on every rank; a collective of the whole job.

    Raises:
        ValueError: on every rank, naming one that does not see it.
    """
    sees = _from_all_ranks(checkpoint.is_dir(), control)
    if not all(sees):
        raise ValueError(
            f"rank {sees.index(False)} does not see {checkpoint}, with which rank 0 starts: put it on a file system "
            "that all nodes share"
        )


class DamagedCheckpointError(ValueError):
    """A checkpoint is not what was saved; the message names it and every file that differs."""


def checked_manifest(checkpoint: Path, control: dist.ProcessGroup, *, verify: bool = True) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are all as they were saved; a collective of the whole job.

    Args:
        verify: compare all files with their checksums, each rank its share; else only read the manifest.

    Raises:
        DamagedCheckpointError: on every rank, naming every damaged file.
    """
    manifest = from_rank_zero(lambda: read_manifest(checkpoint, verify=verify), control, DamagedCheckpointError)
    if not verify:
        return manifest
    if not has_checksums(manifest) and dist.get_rank() == 0:
        logger.warning("checkpoint %s has no checksums (an older version wrote it): it is taken unchecked", checkpoint)
    mine = damage(checkpoint, manifest, part=dist.get_rank(), num_parts=dist.get_world_size())
    if problems := [problem for of_rank in _from_all_ranks(mine, control) for problem in of_rank]:
        raise DamagedCheckpointError(f"checkpoint {checkpoint} is damaged: {', '.join(problems)}")
    return manifest


def from_rank_zero(
    decide: Callable[[], Any], control: dist.ProcessGroup, error_type: type[ValueError] = ValueError
) -> Any:
    """What `decide` returns on rank 0, or an error for what it raises there: on every rank, so that none waits."""
    decided: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            decided[0] = decide()
        except (ValueError, OSError) as error:
            decided[1] = str(error)
    # broadcast of one small object over all ranks, on the host
    dist.broadcast_object_list(decided, src=0, group=control)
    if decided[1] is not None:
        raise error_type(decided[1])
    return decided[0]


def _from_all_ranks(value: Any, control: dist.ProcessGroup) -> list[Any]:
    gathered: list[Any] = [None] * dist.get_world_size()
    # all-gather of one small object over all ranks, on the host
    dist.all_gather_object(gathered, value, group=control)
    return gathered


# Which ones may go


def outdated(run_dir: Path, step: int, config: CheckpointConfig) -> list[Path]:
    """Checkpoints that may go now that the one of `step` is published.

    Later ones are neither counted nor listed: the run has not come from them.
    """
    if not config.keep_last:
        return []
    until_now = [(saved, path) for path in list_checkpoints(run_dir) if (saved := step_of(path) or 0) <= step]
    return [
        path
        for saved, path in until_now[: -config.keep_last]
        if not (config.keep_every and saved % config.keep_every == 0)
    ]


def set_aside(checkpoint: Path) -> None:
    """Take a published checkpoint out of sight in one step, so that it is never seen half deleted; see `sweep`."""
    os.replace(checkpoint, checkpoint.with_name(checkpoint.name + _DELETING))


def sweep(run_dir: Path) -> None:
    """Remove what was set aside, and what earlier crashes left half written or half deleted."""
    for path in (run_dir / "checkpoints").glob("step_*"):
        if path.suffix in (_PARTIAL, _DELETING):
            shutil.rmtree(path)
