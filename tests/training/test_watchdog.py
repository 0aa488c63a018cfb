"""A rank that makes no progress ends with its stack on stderr; here one process at a time, jobs in test_faults.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from megadiff.exit_codes import EXIT_HUNG
from megadiff.training.watchdog import Post, Watchdog, name_culprits

SCRIPT = """
import ctypes, time
import torch.distributed as dist
from megadiff.training.watchdog import Watchdog

def guilty_function():
    {last_deed}

with Watchdog(dist.HashStore(), rank=0, world_size=1, timeout={timeout}) as watchdog:
    watchdog.beat("computing", step=7)
    guilty_function()
"""


def start(last_deed: str, *, timeout: float) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(last_deed=last_deed, timeout=timeout)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_hanging_process_ends_itself_and_a_waiting_one_does_not() -> None:
    sleeper = start("time.sleep(1000)", timeout=2)
    holder = start("ctypes.PyDLL(None).sleep(1000)", timeout=2)  # holds the interpreter's lock
    patient = start("with watchdog.patience(1000): time.sleep(4)", timeout=2)
    lively = start("for _ in range(40): time.sleep(0.1); watchdog.beat('computing')", timeout=2)
    unwatched = start("time.sleep(4)", timeout=0)
    processes = [sleeper, holder, patient, lively, unwatched]
    results = [process.communicate(timeout=180)[1] for process in processes]
    codes = [process.returncode for process in processes]
    assert codes == [EXIT_HUNG, 1, 0, 0, 0], results
    assert "no progress for 2s: rank 0 (host" in results[0] and "step 7, computing; its main thread" in results[0]
    assert "in guilty_function\n" in results[0] and "the job hangs; behind the others: rank 0" in results[0]
    assert "Timeout (0:00:02)!" in results[1] and "in guilty_function" in results[1]
    assert results[2:] == ["", "", ""]


def test_patience_ends_with_what_it_was_for_even_if_that_fails() -> None:
    watchdog = Watchdog(dist.HashStore(), 0, 1, timeout=2.0)
    with pytest.raises(OSError, match="no space"), watchdog.patience(1000.0):
        assert watchdog._patience == 1000.0
        raise OSError("no space")
    assert watchdog._patience == 2.0


def post(rank: int, *, posts: int = 9, beats: int = 50, waits: bool = False) -> Post:
    return Post(rank=rank, host="n", pid=rank, posts=posts, beats=beats, step=3, phase="computing", waits=waits)


def test_culprits_are_silent_or_behind_or_busy() -> None:
    def named(*after: Post | None, before: tuple[Post | None, ...] = ()) -> str:
        return name_culprits(list(before) or [post(rank, posts=5) for rank in range(len(after))], list(after))

    everyone_waits = [post(rank, waits=True) for rank in range(3)]
    assert named(*everyone_waits) == "no rank is behind the others or busy with anything else"
    assert named(*everyone_waits[:2], post(2)) == "behind the others: rank 2 (host n, pid 2), step 3, computing"
    assert named(post(0, waits=True), post(1, beats=49, waits=True), post(2)).startswith("behind the others: rank 1 ")
    assert named(post(0), post(1, posts=5), post(2, beats=1)).startswith(
        "silent, so stopped or gone as a whole: rank 1 "
    )
    assert named(post(0), None, before=(None, None)).endswith("as a whole: rank 1, which never began")
