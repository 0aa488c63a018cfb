"""Whose code computes on each rank, compared before anything is trained.

What is left to `auto` each rank decides by what is installed on its node. Were the decisions to differ, nothing would
fail: Transformer Engine's layers have the same parameters in another order, so gradients of equally long buffers would
be added to those of other parameters; and ranks that share a sequence would wait for each other in other collectives.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from megadiff import accelerations
from megadiff.integrity import sources_digest
from megadiff.machine.versions import versions
from megadiff.ops import _library

if TYPE_CHECKING:
    from megadiff.config import TrainConfig


def implementations(config: TrainConfig) -> dict[str, str]:
    """What this rank has decided, by the setting that decides otherwise where there is one, its versions and sources.

    Raises:
        ValueError: what is asked for cannot run here.
    """
    transformer_impl = config.resolved_transformer_impl()
    return {
        "model.transformer_impl": transformer_impl,
        "model.attention_backend": config.resolved_attention(),
        "optimizer.implementation": config.optimizer.description,
        **{name.replace("_", " "): whose for name, whose in accelerations.used(transformer_impl).items()},
        "operators": _library.state("cuda" if torch.cuda.is_available() else "cpu"),
        **{f"version of {package}": version for package, version in versions().items()},
        "digest of megadiff's sources": sources_digest(),
    }


def check_agreement(found: dict[str, str], control: dist.ProcessGroup) -> None:
    """Compare what every rank has decided; a collective of the whole job.

    Args:
        found: `implementations` of this rank.
        control: all ranks, over gloo.

    Raises:
        ValueError: on every rank; they differ.
    """
    gathered: list[tuple[str, dict[str, str]] | None] = [None] * dist.get_world_size(control)
    # all-gather over all ranks, on the host, a dozen short texts
    dist.all_gather_object(gathered, (socket.gethostname(), found), group=control)
    if problem := first_difference([rank for rank in gathered if rank is not None]):
        raise ValueError(problem)


def first_difference(ranks: Sequence[tuple[str, dict[str, str]]]) -> str:
    """The first rank that is not as rank 0 is, and how; empty where there is none.

    Args:
        ranks: host and `implementations` of each.
    """
    first_host, first = ranks[0]
    for rank, (host, found) in enumerate(ranks):
        if found != first:
            names = [name for name in {**first, **found} if found.get(name) != first.get(name)]
            here, there = (
                ", ".join(f"{name} {of_rank.get(name, 'none')}" for name in names) for of_rank in (found, first)
            )
            return (
                f"rank {rank} on {host} would train with {here}, but rank 0 on {first_host} with {there}: install the "
                "same on all nodes (megadiff doctor on each says what is missing), or set what differs"
            )
    return ""
