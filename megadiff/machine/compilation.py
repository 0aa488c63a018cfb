"""How many workers torch.compile may start in this process.

Inductor starts one per core, up to 32, and each process of a node does so: eight ranks would start 256 of them beside
training and loading. The pieces that are compiled here are few, so a share of the node is enough.
"""

from __future__ import annotations

import os

INDUCTOR_WORKERS = "TORCHINDUCTOR_COMPILE_THREADS"
"""Read by Inductor once, when it is imported."""
_MOST_WORKERS = 32
"""Inductor's own bound."""


def bound_compile_workers() -> None:
    """Bound Inductor's workers by the cores of this process over the processes of its node; one compiles by itself.

    A number that the environment holds already stays. To be called before Inductor is imported, which Megatron-Core
    does.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    os.environ.setdefault(INDUCTOR_WORKERS, str(max(1, min(_MOST_WORKERS, _num_cores() // processes))))


def _num_cores() -> int:
    """Those that this process may run on, as far as the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
