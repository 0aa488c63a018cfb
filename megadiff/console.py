"""What processes say to people: one voice for a job, errors as one sentence."""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings

SECONDS_RANK_ZERO_HAS_TO_SPEAK = 5.0


def rank() -> int:
    """This process's rank, as its launcher says; 0 without one."""
    return int(os.environ.get("RANK", "0"))


def setup_logging() -> None:
    """Our messages from rank 0, warnings from every rank, of the libraries below us errors only."""
    logging.basicConfig(
        level=logging.INFO if rank() == 0 else logging.WARNING,
        format="%(asctime)s %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
        force=True,
    )
    for name in ("megatron", "torch", "tensorboard", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", module=name)
    # torch sets its own level anew when it is imported. Megatron-Core imports its builder of extensions, which warns in
    # CUDA builds wherever there is nvcc and no GPU.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


def report(error: Exception) -> None:
    """Say an error once.

    Mostly all ranks meet the same one: rank 0 speaks, and the launcher ends the others while they wait. What only
    another rank has met is said by that rank.
    """
    if rank() == 0:
        print(f"error: {error}", file=sys.stderr, flush=True)
    else:
        time.sleep(SECONDS_RANK_ZERO_HAS_TO_SPEAK)
        print(f"error on rank {rank()}: {error}", file=sys.stderr, flush=True)
