"""What a checkpoint holds of model, optimizer and average of the weights, and how it comes back on any layout.

Every tensor is saved under its canonical name with its place in the whole, so a job of another shape picks the parts
that it needs. `fully_reshardable` asks the same of the distributed optimizer's state, which lives in flat buffers that
are cut by the layout.

Loading executes nothing that a checkpoint contains. Megatron-Core opens three pickles: `.metadata`, which is first
read here by an unpickler that refuses all but torch's records; `common.pt` and the objects inside `.distcp` files, for
which torch is told to read tensors and plain containers only, whatever the caller below asks of it.
"""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedTensor
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException as DCPCheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megadiff.models.config import DenoiserConfig
from megadiff.models.denoiser import Denoiser, build_denoiser
from megadiff.parallel.groups import Groups
from megadiff.records import load_metadata
from megadiff.training.checkpoint import checked_manifest, from_rank_zero
from megadiff.training.ema import PREFIX, WeightAverage
from megadiff.training.optimizer import load_optimizer

Weights = Literal["model", "ema"]

_OPTIMIZER_STATE = re.compile(r"optimizer\.|chained_\d+\.")


def sharded_state(
    denoisers: Sequence[nn.Module],
    optimizer: MegatronOptimizer | None = None,
    average: WeightAverage | None = None,
    *,
    is_loading: bool,
) -> dict[str, Any]:
    """This rank's tensors with their places in the whole, as Megatron-Core saves and loads them.

    A collective of the whole job where an optimizer is given and `is_loading` is false.
    """

    def metadata() -> dict[str, Any]:
        # Megatron writes this job's groups into the mapping: a new one for every call.
        return {"non_homogeneous_layers": True, "distrib_optim_sharding_type": "fully_reshardable"}

    model_state = {
        _stage_key(stage): denoiser.sharded_state_dict(metadata=metadata())  # type: ignore[operator]
        for stage, denoiser in enumerate(denoisers)
    }
    state: dict[str, Any] = {"model": model_state}
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(model_state, is_loading=is_loading, metadata=metadata())
    if average is not None:
        state["average"] = average.sharded_state_dict(model_state, is_loading=is_loading)
    return state


def _stage_key(stage: int) -> str:
    """Where a virtual stage stands in the state of this rank; in files, tensors are named by their layer instead."""
    return f"stage_{stage}"


def load_checkpoint(
    checkpoint: Path,
    denoisers: Sequence[nn.Module],
    optimizer: MegatronOptimizer | None = None,
    average: WeightAverage | None = None,
    *,
    weights: Weights = "model",
    control: dist.ProcessGroup,
) -> None:
    """Load the model and what else is given into this rank's parts, whatever layout saved them.

    A collective of the whole job. Megatron reads each shard from the files that hold parts of it.

    Args:
        weights: what the model gets: its own weights, or their average.
        control: all ranks, over gloo.

    Raises:
        ValueError: the state is damaged, of another model, or would have to execute code.
    """
    _contents(checkpoint, control)
    wanted = sharded_state(denoisers, optimizer, average, is_loading=True)
    if weights == "ema":
        for tensor in _tensors(wanted["model"]):
            tensor.key = f"{PREFIX}.{tensor.key}"
    state = _load(checkpoint, wanted)
    for stage, denoiser in enumerate(denoisers):
        denoiser.load_state_dict(state["model"][_stage_key(stage)])
    if optimizer is not None:
        load_optimizer(optimizer, _with_loaded_tensors(wanted["optimizer"], state["optimizer"]))
    if average is not None:
        average.load_state_dict(state["average"])


def load_weights(
    checkpoint: Path, denoisers: Sequence[nn.Module], *, weights: Weights, control: dist.ProcessGroup
) -> tuple[list[str], list[str]]:
    """Load what model and checkpoint have in common; what is new in the model stays as it is.

    A collective of the whole job.

    Returns:
        The names of the whole model's parameters that the checkpoint does not have, and of those that only it has.

    Raises:
        ValueError: as `load_checkpoint`.
    """
    saved = _contents(checkpoint, control)
    averages = f"{PREFIX}."
    prefix = averages if weights == "ema" else ""
    state = sharded_state(denoisers, is_loading=True)["model"]
    names: set[str] = set()
    for tensor in _tensors(state):
        names.add(tensor.key)
        tensor.key = prefix + tensor.key
    common = {
        stage: {name: x for name, x in of_stage.items() if isinstance(x, ShardedTensor) and x.key in saved}
        for stage, of_stage in state.items()
    }
    loaded = _load(checkpoint, {"model": common})["model"]
    for stage, denoiser in enumerate(denoisers):
        denoiser.load_state_dict({**denoiser.state_dict(), **loaded[_stage_key(stage)]})
    of_ranks: list[set[str]] = [set()] * dist.get_world_size()
    # all-gather of the parameters' names over all ranks, on the host
    dist.all_gather_object(of_ranks, names, group=control)
    names = names.union(*of_ranks)
    of_model = {
        name.removeprefix(prefix)
        for name in saved
        if not _OPTIMIZER_STATE.match(name) and name.startswith(averages) == bool(prefix)
    }
    return sorted(names - of_model), sorted(of_model - names)


def _tensors(state: Any) -> Iterator[ShardedTensor]:
    """The tensors of a sharded state; Megatron's layers have other state beside."""
    return (value for value in nested_values(state) if isinstance(value, ShardedTensor))


def _load(checkpoint: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """Megatron's load of what is wanted, after `_contents` has looked at the checkpoint.

    Raises:
        ValueError: the state is damaged, of another model, or would have to execute code.
    """
    try:
        with _weights_only():
            return dist_checkpointing.load(wanted, str(checkpoint / "state"))
    except (CheckpointingException, DCPCheckpointException, pickle.UnpicklingError) as error:
        raise ValueError(f"checkpoint {checkpoint} cannot be loaded ({_reason(error)}): use another one") from error


def _with_loaded_tensors(wanted: Any, loaded: Any) -> Any:
    """What is asked for, nested lists and mappings, with what was loaded in the place of everything sharded.

    The rest of a saved state has the form that the saving run's optimizer gave it.
    """
    if isinstance(wanted, ShardedBase):
        return loaded
    if isinstance(wanted, dict):
        return {name: _with_loaded_tensors(value, loaded.get(name, {})) for name, value in wanted.items()}
    if isinstance(wanted, list) and wanted and len(wanted) == len(loaded):
        return [_with_loaded_tensors(value, of_value) for value, of_value in zip(wanted, loaded, strict=True)]
    return wanted


def _contents(checkpoint: Path, control: dist.ProcessGroup) -> set[str]:
    """The names of the saved tensors, after rank 0 has read the table of contents with care: others open it without.

    Raises:
        ValueError: on every rank; it cannot be read, or would have to execute code.
    """
    path = checkpoint / "state" / ".metadata"

    def read() -> set[str]:
        try:
            with path.open("rb") as file:
                saved = load_metadata(file, refuse_unknown=True).state_dict_metadata
        except Exception as error:  # a damaged pickle raises almost anything
            problem = f"{path} is not loaded ({type(error).__name__}: {error}): use another checkpoint"
            raise ValueError(problem) from error
        return {name for name, record in saved.items() if isinstance(record, TensorStorageMetadata)}

    return from_rank_zero(read, control)


def _reason(error: BaseException) -> str:
    if isinstance(error, DCPCheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, pickle.UnpicklingError):
        # Torch's own words end with the advice to execute it.
        return "it holds an object that is no tensor, number, text or container of these"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


@contextmanager
def _weights_only() -> Iterator[None]:
    """Make every `torch.load` of this process read tensors and plain containers only.

    Torch's load planner asks for unrestricted unpickling of objects and offers no setting; these documented variables
    overrule it.
    """
    names = ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
    before = {name: os.environ.pop(name, None) for name in names}
    os.environ[names[0]] = "1"
    try:
        yield
    finally:
        del os.environ[names[0]]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def load_denoiser(
    checkpoint: Path, config: DenoiserConfig, groups: Groups, *, sequence_length: int, weights: Weights = "model"
) -> list[Denoiser]:
    """Build this rank's part of a saved denoiser, in fp32 and without gradients, on any layout.

    A collective of the whole job.

    Args:
        weights: those that were trained, or their average.

    Raises:
        DamagedCheckpointError: the files are not what was saved.
        ValueError: the checkpoint holds no average.
    """
    manifest = checked_manifest(checkpoint, groups.control)
    if weights == "ema" and manifest.get("ema_decay") is None:
        raise ValueError(
            f"checkpoint {checkpoint} holds no average of the weights (it was trained without optimizer.ema_decay): "
            "use --weights model"
        )
    denoisers = build_denoiser(
        config, groups, vocab_size=manifest["vocab_size"], sequence_length=sequence_length, seed=0
    )
    load_checkpoint(checkpoint, denoisers, weights=weights, control=groups.control)
    return [denoiser.requires_grad_(False).eval() for denoiser in denoisers]
