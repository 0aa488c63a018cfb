"""Run a function on several gloo ranks, with a deadline.

    results = run_ranks(2, function, argument, …)      # function(argument, …) on ranks 0 and 1, results by rank

Ranks are forked from a server that has imported the libraries once, so they start in less than a second. The function
must be importable (defined at the top of a test module). Gloo's groups do not quite end with their layout, and each
keeps a thread awake: cases of another layout are better off in ranks of their own.
"""

from __future__ import annotations

import os
import pickle
import queue
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing import set_forkserver_preload
from typing import Any

import torch
import torch.multiprocessing as mp
from ports import free_ports


def _run_rank(rank: int, environment: dict[str, str], results: Any, job: bytes) -> None:
    os.environ.clear()  # the server's, as it was when the first test started ranks
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # the libraries' own, once per rank
    try:
        # Pickled here: the queue would share tensors through this process, which is about to end.
        function, arguments = pickle.loads(job)
        results.put((rank, None, pickle.dumps(function(*arguments))))
    except BaseException:
        results.put((rank, traceback.format_exc(), None))


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any, timeout: float = 180.0) -> list[Any]:
    """Call `function(*arguments)` on every rank of a fresh job and return the picklable results by rank.

    Raises:
        AssertionError: a rank failed (with its traceback) or the deadline passed; all ranks are gone then.
    """
    # No fork survives CUDA.
    context = mp.get_context("spawn" if torch.cuda.is_available() else "forkserver")
    set_forkserver_preload(["megadiff.training.loop"])
    results = context.Queue()
    environment = {
        **os.environ,
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_ports(1)[0]),
    }
    job = pickle.dumps((function, arguments))
    processes = [
        context.Process(target=_run_rank, args=(rank, environment, results, job)) for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    collected: dict[int, Any] = {}
    deadline = time.monotonic() + timeout
    try:
        while len(collected) < world_size:
            try:
                rank, error, value = results.get(timeout=1.0)
            except queue.Empty:
                missing = sorted(set(range(world_size)) - set(collected))
                dead = [rank for rank in missing if processes[rank].exitcode not in (None, 0)]
                assert not dead, f"rank(s) {dead} died without a word"
                assert time.monotonic() < deadline, f"rank(s) {missing} still ran after {timeout:.0f} s"
                continue
            assert error is None, f"rank {rank} failed:\n{error}"
            collected[rank] = pickle.loads(value)
    finally:
        for process in processes:
            if len(collected) < world_size:
                process.kill()
            process.join(timeout=30)
    return [collected[rank] for rank in range(world_size)]
