"""Checkpoints that any layout can open, published all at once or not at all.

    RUN/checkpoints/step_00000400/
        config.yaml       the run's resolved configuration
        manifest.json     step, consumed samples, shapes, versions, what the optimizer was
        tokenizer.model
        state/            Megatron-Core distributed checkpoint: model and optimizer, by canonical parameter name

A checkpoint is written beside its final name, synced, and renamed when everything is on disk; it is renamed away before
it is deleted. So a directory named step_* is complete, and a crash at any byte leaves the previous ones as they were.
Nothing random is saved, because noise, data order and learning rate are functions of the step.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException as DCPCheckpointException

from megadiff.fields import require
from megadiff.models.denoiser import Denoiser, DenoiserConfig, build_denoiser
from megadiff.parallel.groups import Groups

logger = logging.getLogger(__name__)

_NAME = re.compile(r"step_(\d{8,})")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are written and how many stay."""

    interval: int = 1000
    """Steps between checkpoints; one more always follows the last step. 0 saves only then."""
    keep_last: int = 3
    """Checkpoints kept; older ones are deleted after a new one is complete. 0 keeps all."""

    def __post_init__(self) -> None:
        for name in ("interval", "keep_last"):
            require(getattr(self, name) >= 0, f"checkpoint.{name}", getattr(self, name), "be at least 0")


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    directory = run_dir / "checkpoints"
    if not directory.is_dir():
        return []
    found = [(int(match[1]), path) for path in directory.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that `path` means: itself, or the newest one of a run directory.

    Raises:
        ValueError: there is none.
    """
    if (path / "manifest.json").is_file() and (path / "state").is_dir():
        return path
    checkpoints = list_checkpoints(path)
    if not checkpoints:
        raise ValueError(
            f"{path} is neither a checkpoint (step_* with manifest.json and state/) nor a run directory that has one: "
            "check the path, or train until the first checkpoint is saved"
        )
    return checkpoints[-1]


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a checkpoint.

    Raises:
        ValueError: it is damaged.
    """
    path = checkpoint / "manifest.json"
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged ({error}): delete {checkpoint} to go on from the one before") from error


def newest_checkpoint(run_dir: Path, control: dist.ProcessGroup) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint of a run and its manifest, or None; as rank 0 sees it, on every rank.

    File systems may show a new directory to one node before another: one rank decides for all.

    Raises:
        ValueError: the manifest is damaged, or this rank cannot see the checkpoint.
    """
    decided: list[Any] = [None]
    if dist.get_rank() == 0 and (checkpoints := list_checkpoints(run_dir)):
        decided = [(checkpoints[-1], read_manifest(checkpoints[-1]))]
    # broadcast of one small object over all ranks, on the host
    dist.broadcast_object_list(decided, src=0, group=control)
    if decided[0] is not None and not decided[0][0].is_dir():
        raise ValueError(
            f"rank {dist.get_rank()} does not see {decided[0][0]}, from which rank 0 resumes: put the run directory on "
            "a file system that all nodes share"
        )
    return decided[0]


def check_same_model(checkpoint: Path, manifest: dict[str, Any], expected: dict[str, Any]) -> None:
    """Refuse a checkpoint of another model before anything is loaded.

    Args:
        expected: entries that this run would write into its manifest; nested mappings are compared entry by entry.

    Raises:
        ValueError: naming every entry that differs.
    """
    differences = []
    for name, value in expected.items():
        saved = manifest.get(name)
        if isinstance(value, dict) and isinstance(saved, dict):
            differences += [
                f"{name}.{k} {saved.get(k)} (this run: {value[k]})" for k in value if saved.get(k) != value[k]
            ]
        elif saved != value:
            differences.append(f"{name} {saved} (this run: {value})")
    if differences:
        raise ValueError(
            f"checkpoint {checkpoint} belongs to another model: it has {', '.join(differences)}; "
            "resume with the configuration in its config.yaml or choose another --run-dir"
        )


def _sharded_state(
    denoisers: Sequence[nn.Module], optimizer: MegatronOptimizer | None, *, is_loading: bool
) -> dict[str, Any]:
    def metadata() -> dict[str, Any]:
        # Megatron writes this job's groups into the mapping: a new one for every call.
        return {"non_homogeneous_layers": True, "distrib_optim_sharding_type": "fully_reshardable"}

    model_state = {
        _stage_key(stage): denoiser.sharded_state_dict(metadata=metadata())  # type: ignore[operator]
        for stage, denoiser in enumerate(denoisers)
    }
    if optimizer is None:
        return {"model": model_state}
    optimizer_state = optimizer.sharded_state_dict(model_state, is_loading=is_loading, metadata=metadata())
    return {"model": model_state, "optimizer": optimizer_state}


def _stage_key(stage: int) -> str:
    """Where a virtual stage stands in the state of this rank; in files, tensors are named by their layer instead."""
    return f"stage_{stage}"


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sweep(directory: Path) -> None:
    """Remove what earlier crashes left half written or half deleted."""
    for path in directory.glob("step_*"):
        if path.suffix in (".partial", ".deleting"):
            shutil.rmtree(path)


def save_checkpoint(
    run_dir: Path,
    step: int,
    denoisers: Sequence[nn.Module],
    optimizer: MegatronOptimizer,
    *,
    manifest: dict[str, Any],
    config_yaml: str,
    tokenizer: bytes,
    keep_last: int,
) -> Path:
    """Write the state after `step` steps; a collective of the whole job.

    Args:
        denoisers, optimizer: this rank's parts; `denoisers` are the bare virtual stages.
        manifest: what identifies the checkpoint, JSON-able; the same on every rank.
        tokenizer: SentencePiece model, so that a checkpoint is enough to generate from.
        keep_last: complete checkpoints that stay, this one included; 0 keeps all.

    Returns:
        The published directory.
    """
    final = run_dir / "checkpoints" / f"step_{step:08d}"
    partial = final.with_name(final.name + ".partial")
    if dist.get_rank() == 0:
        _sweep(final.parent)
        (partial / "state").mkdir(parents=True)
    dist.barrier()
    # Megatron reports write results through a manager process, for savers in the background. This one saves here: a
    # plain queue does, and no manager outlives a killed run.
    filesystem_async._results_queue = queue.SimpleQueue()
    dist_checkpointing.save(_sharded_state(denoisers, optimizer, is_loading=False), str(partial / "state"))
    if dist.get_rank() == 0:
        _write_synced(partial / "tokenizer.model", tokenizer)
        _write_synced(partial / "config.yaml", config_yaml.encode())
        _write_synced(partial / "manifest.json", json.dumps(manifest, indent=2).encode() + b"\n")
        for directory in (partial / "state", partial):
            _sync_directory(directory)
        os.replace(partial, final)
        _sync_directory(final.parent)
        if keep_last:
            for old in list_checkpoints(run_dir)[:-keep_last]:
                os.replace(old, old.with_name(old.name + ".deleting"))
            _sweep(final.parent)
    dist.barrier()
    return final


def load_checkpoint(
    checkpoint: Path, denoisers: Sequence[nn.Module], optimizer: MegatronOptimizer | None = None
) -> None:
    """Load model and, where given, optimizer state into this rank's parts, whatever layout saved them.

    A collective of the whole job. Megatron reads each shard from the files that hold parts of it.

    Raises:
        ValueError: the state is damaged or of another model.
    """
    try:
        state = dist_checkpointing.load(
            _sharded_state(denoisers, optimizer, is_loading=True), str(checkpoint / "state")
        )
    except (CheckpointingException, DCPCheckpointException) as error:
        raise ValueError(
            f"checkpoint {checkpoint} cannot be loaded ({' '.join(str(error).split())[:300]}): delete it to go on from "
            "the one before"
        ) from error
    for stage, denoiser in enumerate(denoisers):
        denoiser.load_state_dict(state["model"][_stage_key(stage)])
    if optimizer is not None:
        optimizer.load_state_dict(state["optimizer"])


def load_denoiser(checkpoint: Path, config: DenoiserConfig, groups: Groups, *, sequence_length: int) -> list[Denoiser]:
    """Build this rank's part of a saved denoiser, in fp32 and without gradients, on any layout.

    A collective of the whole job.
    """
    denoisers = build_denoiser(
        config, groups, vocab_size=read_manifest(checkpoint)["vocab_size"], sequence_length=sequence_length, seed=0
    )
    load_checkpoint(checkpoint, denoisers)
    return [denoiser.requires_grad_(False).eval() for denoiser in denoisers]
