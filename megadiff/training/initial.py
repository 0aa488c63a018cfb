"""A new run that begins with the weights of another: for another objective, or to go on as a run of its own.

Only weights are taken over. Optimizer, step and data begin anew, and objective, precision and layout are the new run's.
Once the run has a checkpoint of its own, that is where it goes on, and the other may be gone.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import nn

from megadiff.models.config import DenoiserConfig
from megadiff.training.checkpoint import check_all_see, checked_manifest, find_checkpoint, from_rank_zero
from megadiff.training.identity import differences
from megadiff.training.state import Weights, load_weights

logger = logging.getLogger(__name__)


def load_initial_weights(
    source: Path,
    weights: Weights,
    denoisers: Sequence[nn.Module],
    optimizer: MegatronOptimizer,
    *,
    expected: dict[str, Any],
    verify: bool,
    control: dist.ProcessGroup,
) -> dict[str, Any]:
    """Load the weights of a checkpoint into a new model and its optimizer; a collective of the whole job.

    Args:
        source: a step_* directory, or a run directory, of which the newest checkpoint is taken.
        weights: those that were trained, or their average.
        expected: what must agree: entries of the manifest, with the model's `architecture`.
        verify: compare all files with their checksums.
        control: all ranks, over gloo.

    Returns:
        What the run's own manifests say of it: path, step and which weights.

    Raises:
        DamagedCheckpointError: the files are not what was saved.
        ValueError: there is no such checkpoint, it is of another model, or it holds no average.
    """
    try:
        checkpoint = from_rank_zero(lambda: find_checkpoint(source), control)
    except ValueError as error:
        raise ValueError(f"training.init_from: {error}") from error
    check_all_see(checkpoint, control)
    manifest = checked_manifest(checkpoint, control, verify=verify)
    architecture = DenoiserConfig.of_manifest(manifest["model"]).architecture
    if problems := differences({**manifest, "model": architecture}, expected):
        raise ValueError(
            f"training.init_from {checkpoint} does not fit: it has {', '.join(problems)}; choose the same model and a "
            "corpus prepared with its tokenizer.model"
        )
    if weights == "ema" and manifest.get("ema_decay") is None:
        raise ValueError(
            f"training.init_from {checkpoint} holds no average of the weights (it was trained without "
            "optimizer.ema_decay): set training.init_weights model"
        )
    new, unused = load_weights(checkpoint, denoisers, weights=weights, control=control)
    # Master weights were copied from the initial parameters.
    optimizer.reload_model_params()
    logger.info("began with the %s weights of %s", weights, checkpoint)
    if new:
        logger.info("not in %s, so with their own initial values: %s", checkpoint.name, ", ".join(new))
    if unused:
        logger.info("in %s, but not in this model: %s", checkpoint.name, ", ".join(unused))
    return {"path": str(checkpoint.resolve()), "step": manifest["step"], "weights": weights}
