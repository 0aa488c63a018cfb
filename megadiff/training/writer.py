"""Saving: what is on the ranks becomes a published checkpoint, at once or in the background.

    plan      Megatron-Core says which rank writes which part of which tensor           all ranks, at the step boundary
    stage     the parts are copied to host memory                                       each rank alone
    write     the copies go to files, which are synced and hashed                       each rank alone, in a thread
    publish   rank 0 writes the table of contents and the manifest, renames, deletes    all ranks, at a step boundary

A synchronous save waits between the last two. A failure anywhere in writing or publishing is an outcome that all ranks
agree on, not an exception that one of them meets while the others wait for it. The background is a thread: Megatron's
own callers fork processes, one of which survives the death of the run.
"""

from __future__ import annotations

import io
import logging
import queue
import shutil
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.storage import WriteResult

from megadiff.integrity import FileDigest, digest_of, sync, write_manifest, write_synced
from megadiff.parallel.groups import Groups
from megadiff.training.checkpoint import (
    CheckpointConfig,
    checkpoint_path,
    list_checkpoints,
    outdated,
    partial_path,
    set_aside,
    sweep,
)
from megadiff.training.ema import WeightAverage
from megadiff.training.state import sharded_state

logger = logging.getLogger(__name__)

_FORMAT = CheckpointingConfig("torch_dist", 1)


class SaveError(OSError):
    """A checkpoint could not be saved; raised on all ranks alike, and the checkpoints before it are as they were."""


class _Planner(TorchDistSaveShardedStrategy):
    """Megatron's planning, which hands over what is to be written instead of a request to fork processes for it."""

    def _get_save_and_finalize_callbacks(self, writer: FileSystemWriterAsync, planned: Any) -> Any:
        return writer, planned[1]


@dataclass
class _Part:
    """One rank's part of a save: what rank 0 has to know of it in the end."""

    results: list[WriteResult] = field(default_factory=list)
    """Where in which file each piece went, for the table of contents."""
    files: dict[str, FileDigest] = field(default_factory=dict)
    """By path relative to the checkpoint."""
    problem: str | None = None
    """Why it could not be written."""


@dataclass(kw_only=True)
class _Save:
    """A save under way."""

    final: Path
    manifest: dict[str, Any]
    writer: FileSystemWriterAsync
    metadata: Metadata | None
    """The table of contents without the places in the files; on rank 0."""
    part: _Part
    thread: threading.Thread

    @property
    def partial(self) -> Path:
        return partial_path(self.final)


class CheckpointWriter:
    """Saves the states of one run, one at a time; every method is a collective of the whole job unless it says not."""

    def __init__(self, run_dir: Path, config: CheckpointConfig, groups: Groups) -> None:
        self._run_dir, self._config, self._groups = run_dir, config, groups
        planner = _Planner(_FORMAT.sharded_backend, _FORMAT.sharded_backend_version, thread_count=1)
        # Data- and context-parallel ranks hold the same state: each writes a share of it.
        self._strategy = FullyParallelSaveStrategyWrapper(planner, groups.collection.dp_cp, do_cache_distribution=True)
        self._save: _Save | None = None
        self._last_start = time.monotonic()
        self._last_num_bytes = 0

    @property
    def in_flight(self) -> bool:
        """Whether a save was started and not finished; the same on every rank, no collective."""
        return self._save is not None

    @property
    def is_writing(self) -> bool:
        """Whether this rank's part is still being written; no collective."""
        return self._save is not None and self._save.thread.is_alive()

    @property
    def is_due_by_clock(self) -> bool:
        """Whether `interval_minutes` have passed since the last start, by this rank's clock; no collective."""
        minutes = self._config.interval_minutes
        return minutes > 0 and time.monotonic() - self._last_start >= 60 * minutes

    def start(
        self,
        step: int,
        denoisers: Sequence[nn.Module],
        optimizer: MegatronOptimizer | None,
        average: WeightAverage | None = None,
        *,
        manifest: dict[str, Any],
        config_yaml: str,
        tokenizer: bytes,
        overlap: bool,
    ) -> None:
        """Begin to save the state after `step` steps; `finish` must follow before the next one is started.

        Args:
            denoisers, optimizer, average: this rank's parts; `denoisers` are the bare virtual stages.
            manifest: what identifies the checkpoint, JSON-able; the same on every rank.
            tokenizer: SentencePiece model, so that a checkpoint is enough to generate from.
            overlap: whether these parts may change before `finish`; takes a copy of the state on the host.

        Raises:
            SaveError: there is no room to write to.
        """
        assert self._save is None, "finish() the save in flight first"
        self._last_start = time.monotonic()
        final = checkpoint_path(self._run_dir, step)
        partial = partial_path(final)
        self._agree_on(self._make_room(partial) if self._groups.rank == 0 else None, final)

        # Megatron reports write results through a manager process, for savers in other processes. Here a plain queue
        # does, and no manager outlives a killed run.
        filesystem_async._results_queue = queue.SimpleQueue()
        sharded, common = save_preprocess(sharded_state(denoisers, optimizer, average, is_loading=False))
        writer, metadata = self._strategy.async_save(sharded, partial / "state")  # type: ignore[misc]

        part = _Part()
        buckets = _stage(writer, part, copy=overlap)
        small_files = {}
        if self._groups.rank == 0:
            small_files = {"tokenizer.model": tokenizer, "config.yaml": config_yaml.encode()}
            small_files["state/common.pt"] = _torch_bytes(common)
        thread = threading.Thread(
            target=_write, args=(part, writer, partial, buckets, small_files), name="checkpoint writer", daemon=True
        )
        self._save = _Save(final=final, manifest=manifest, writer=writer, metadata=metadata, part=part, thread=thread)
        thread.start()

    def finish(self) -> tuple[Path, float]:
        """Wait until every rank has written its part of the save in flight, and publish it.

        Returns:
            The published directory, and the seconds since `start`.

        Raises:
            SaveError: some rank could not write; what was written of it is removed.
        """
        save = self._save
        assert save is not None, "start() a save first"
        self._save = None
        save.thread.join()
        is_first = self._groups.rank == 0
        parts: list[_Part] | None = [_Part()] * self._groups.world_size if is_first else None
        # gather of file names, sizes and hashes on rank 0, on the host
        dist.gather_object(save.part, parts, dst=0, group=self._groups.control)
        problem = self._publish(save, parts) if parts is not None else None
        self._agree_on(problem, save.final)
        return save.final, time.monotonic() - self._last_start

    def _make_room(self, partial: Path) -> str | None:
        """Prepare the directory to write in; on rank 0 alone."""
        try:
            sweep(self._run_dir)
            (partial / "state").mkdir(parents=True)
            free = shutil.disk_usage(partial).free
        except OSError as error:
            return f"rank 0: {error}"
        if free < self._last_num_bytes:
            logger.warning(
                "%.1f GB are free for %s, but the checkpoint before it took %.1f GB: free some space",
                free / 1e9,
                partial,
                self._last_num_bytes / 1e9,
            )
        return None

    def _publish(self, save: _Save, parts: list[_Part]) -> str | None:
        """Seal and rename what was written, then let outdated checkpoints go; on rank 0 alone."""
        problems = [f"rank {rank}: {part.problem}" for rank, part in enumerate(parts) if part.problem]
        if problems:
            return "; ".join(problems)
        state = save.partial / "state"
        files = {name: digest for part in parts for name, digest in part.files.items()}
        try:
            assert save.metadata is not None
            save.writer.finish(save.metadata, [part.results for part in parts])
            save_config(_FORMAT, str(state))
            sync(state / "metadata.json")
            for name in (".metadata", "metadata.json"):
                files[f"state/{name}"] = digest_of(state / name)
            write_manifest(save.partial, save.manifest, files)
            sync(state)
            sync(save.partial)
            if save.final.exists():  # a damaged one, which the run passed over when it resumed
                set_aside(save.final)
            save.partial.replace(save.final)
            sync(save.final.parent)
        except Exception as error:  # whatever it is, all ranks must hear of it
            return f"rank 0: {_reason(error)}"
        self._last_num_bytes = sum(digest["bytes"] for digest in files.values())
        try:
            for checkpoint in outdated(self._run_dir, int(save.manifest["step"]), self._config):
                set_aside(checkpoint)
            sweep(self._run_dir)
        except OSError as error:
            logger.warning("%s is saved, but older checkpoints could not be deleted: %s", save.final, error)
        return None

    def _agree_on(self, problem: str | None, final: Path) -> None:
        """Raise what rank 0 has found wrong on every rank, and leave nothing half written behind."""
        if problem is not None:
            shutil.rmtree(partial_path(final), ignore_errors=True)
        found = [problem]
        # broadcast of one sentence over all ranks, on the host
        dist.broadcast_object_list(found, src=0, group=self._groups.control)
        if found[0] is None:
            return
        before = list_checkpoints(self._run_dir)
        raise SaveError(
            f"checkpoint {final} could not be saved ({found[0]}); the last one is "
            f"{before[-1] if before else 'none'}: free space on the disk or mend what is named here"
        )


def _stage(writer: FileSystemWriterAsync, part: _Part, *, copy: bool) -> list[Any]:
    """Bring what this rank writes to host memory, as copies of its own where asked for."""
    staged = []
    try:
        buckets = writer.write_buckets or []
        while buckets:
            path, name, (objects, tensors) = buckets.pop(0)
            on_host = [(item, _plain(tensor).to("cpu", non_blocking=True, copy=copy)) for item, tensor in tensors]
            staged.append((path, name, (objects, on_host)))
        torch.cuda.synchronize()
    except (MemoryError, RuntimeError) as error:
        part.problem = f"no copy of the state could be made ({error})"
    return staged


def _plain(tensor: Tensor) -> Tensor:
    """The numbers of a tensor, rounded as they are: what every implementation of the layers can load.

    Until version 2.15, Transformer Engine's tensors in FP8 became plain ones on their way to the host. From 2.16 on
    they stay in FP8 there, and a file would hold an object of its classes.
    """
    return dequantize_fp8_tensor(tensor) if is_float8tensor(tensor) else tensor


def _write(
    part: _Part, writer: FileSystemWriterAsync, partial: Path, buckets: list[Any], small_files: dict[str, bytes]
) -> None:
    """Write, sync and hash this rank's files; in a thread, which tells through `part` how it went."""
    if part.problem:
        return
    try:
        for name, content in small_files.items():
            part.files[name] = write_synced(partial / name, content)
        outcomes: queue.Queue[Any] = queue.Queue()
        running: queue.Queue[int] = queue.Queue()
        while buckets:
            running.put(0)
            path, name, _ = bucket = buckets.pop(0)
            writer.write_preloaded_data([writer.transforms], 0, bucket, outcomes, running, use_fsync=True)
            _, outcome = outcomes.get_nowait()
            if isinstance(outcome, Exception):
                raise outcome
            part.results += outcome
            part.files[f"state/{name}"] = digest_of(Path(path))
    except Exception as error:  # whatever it is, all ranks must hear of it
        part.problem = _reason(error)


def _reason(error: BaseException) -> str:
    """What the operating system said, where it did: torch reports an unfinished file instead of the full disk."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return str(cause) if cause is not None else f"{type(error).__name__}: {error}"


def _torch_bytes(content: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()
