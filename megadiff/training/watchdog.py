"""Who hangs: a rank that makes no progress is reported with its stack, and no rank waits for ever.

The main thread beats at every step boundary and micro-batch; a thread beside it sees when the beats stop. Each rank
posts where it is to the job's store, so that when one gives the alarm, the ranks together can name the culprit: the
one whose process is silent (stopped as a whole, or its node gone), else the one with the fewest beats (all ranks beat
at the same places), and among equals the one that does not wait for others. Then every rank ends with exit code 4.

Two threads, because one may get stuck where the other must not: the one that corresponds with the store in the network,
the one that watches in nothing but the interpreter's lock. Where that is held for ever, a timer of C (`faulthandler`)
prints all stacks and ends the process with exit code 1.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import FrameType

import torch.distributed as dist

from megadiff.exit_codes import EXIT_HUNG
from megadiff.training.metrics import format_duration

logger = logging.getLogger(__name__)

TICKS_TO_JUDGE = 4
"""A rank that posts nothing for so many ticks of the others is silent."""
LONGEST_TICK = 5.0
SECONDS_TO_END = 2.0
_WAITING_PLACES = ("torch/distributed/", "p2p_communication")
"""In the path of the innermost Python frame of who waits for others."""


@dataclass(frozen=True, kw_only=True)
class Post:
    """Where a rank is, as it tells the others."""

    rank: int
    host: str
    pid: int
    posts: int
    """How many it has sent: they stop when the process is stopped."""
    beats: int
    """Of its main thread."""
    step: int
    phase: str
    waits: bool
    """Whether its main thread waits for others in a collective or a pipeline's exchange."""

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host}, pid {self.pid}), step {self.step}, {self.phase}"


def name_culprits(before: list[Post | None], after: list[Post | None]) -> str:
    """Say which ranks hold up the others.

    Args:
        before, after: what each rank has posted, by rank, `TICKS_TO_JUDGE` ticks apart; None: nothing yet.
    """
    silent = [
        str(new) if new else f"rank {rank}, which never began"
        for rank, (old, new) in enumerate(zip(before, after, strict=True))
        if new is None or (old is not None and old.posts == new.posts)
    ]
    if silent:
        return f"silent, so stopped or gone as a whole: {'; '.join(silent)}"
    posts = [post for post in after if post is not None]
    last = [post for post in posts if post.beats == min(post.beats for post in posts)]
    if busy := [post for post in last if not post.waits]:
        last = busy
    if len(last) == len(posts) > 1:
        return "no rank is behind the others or busy with anything else"
    return f"behind the others: {'; '.join(map(str, last))}"


class Watchdog:
    """Ends this process, with a report, when its main thread or that of another rank makes no progress.

    Use as a context manager around the training loop.

    Args:
        store: a connection to the job's store that nobody else uses.
        timeout: seconds without a beat after which a rank hangs; 0: never.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int, *, timeout: float) -> None:
        self._store, self._rank, self._world_size = dist.PrefixStore("watchdog", store), rank, world_size
        self._timeout = self._patience = timeout
        self._tick = min(timeout / 10, LONGEST_TICK)
        self._main_thread = threading.get_ident()
        self._beats, self._step, self._phase = 0, 0, "starting"
        self._posts = 0
        self._threads: list[threading.Thread] = []
        self._has_ended, self._alarm, self._is_judged = threading.Event(), threading.Event(), threading.Event()

    def beat(self, phase: str, *, step: int | None = None) -> None:
        """Note that the main thread has come to the next phase; every rank must beat at the same places."""
        self._phase = phase
        if step is not None:
            self._step = step
        self._beats += 1

    @contextmanager
    def patience(self, seconds: float) -> Iterator[None]:
        """Wait for the beat after this for so long, or for the timeout if that is longer."""
        self._patience = max(seconds, self._timeout)
        try:
            yield
        finally:
            self.beat("between two steps")
            self._patience = self._timeout

    def __enter__(self) -> Watchdog:
        if self._timeout:
            self._arm(self._timeout)
            self._post()
            for work in (self._watch, self._correspond):
                thread = threading.Thread(target=work, name=f"watchdog {work.__name__}", daemon=True)
                thread.start()
                self._threads.append(thread)
        return self

    def __exit__(self, *exception: object) -> None:
        self._has_ended.set()
        # A thread that is still in the store's network code when the interpreter ends would take the process down.
        for thread in self._threads:
            thread.join(SECONDS_TO_END)
        faulthandler.cancel_dump_traceback_later()

    @staticmethod
    def _arm(seconds: float) -> None:
        """Let all stacks be printed to stderr and the process end, unless this is called again in time."""
        faulthandler.dump_traceback_later(seconds, exit=True, file=2)

    def _watch(self) -> None:
        """Count how long the main thread has not beaten, and end the process; touches no network."""
        seen, since = -1, time.monotonic()
        while not self._has_ended.wait(self._tick):
            self._arm(self._timeout)
            if (beats := self._beats) != seen:
                seen, since = beats, time.monotonic()
            idle = time.monotonic() - since
            if idle > self._patience or self._alarm.is_set():
                self._end_job(idle)

    def _end_job(self, idle: float) -> None:
        """Report this rank, wait for the verdict on the job, and end the process."""
        time_to_judge = 3 * TICKS_TO_JUDGE * self._tick + 2.0
        self._arm(2 * time_to_judge)
        self._report(idle)
        self._alarm.set()
        if not self._is_judged.wait(time_to_judge):
            logger.critical(
                "rank %d got no verdict: the job's store does not answer, so its process (that of rank 0, "
                "or the launcher on its node) is stopped or gone",
                self._rank,
            )
        os._exit(EXIT_HUNG)

    def _report(self, idle: float) -> None:
        stack = "".join(traceback.format_stack(self._main_frame()))
        logger.critical("no progress for %s: %s; its main thread:\n%s", format_duration(idle), self._here(), stack)

    def _main_frame(self) -> FrameType:
        return sys._current_frames()[self._main_thread]

    def _here(self) -> Post:
        where = self._main_frame().f_code.co_filename
        return Post(
            rank=self._rank,
            host=socket.gethostname(),
            pid=os.getpid(),
            posts=self._posts,
            beats=self._beats,
            step=self._step,
            phase=self._phase,
            waits=any(part in where for part in _WAITING_PLACES),
        )

    def _correspond(self) -> None:
        """Post where this rank is, and after an alarm find the culprit together with the others."""
        while not self._has_ended.wait(self._tick):
            try:
                self._post()
                if self._store.check(["alarm"]):
                    self._alarm.set()
                if self._alarm.is_set():
                    self._judge()
                    return
            except (RuntimeError, OSError) as error:
                # At the end of a job rank 0 may take the store with it; if that hurts, a rank will hang.
                logger.debug("rank %d cannot reach the job's store: %s", self._rank, error)

    def _post(self) -> None:
        self._posts += 1
        self._store.set(f"post/{self._rank}", json.dumps(asdict(self._here())))

    def _judge(self) -> None:
        """The first rank with an alarm compares what all post; the others go on posting until it has spoken."""
        if self._store.add("alarm", 1) == 1:
            before = self._read_posts()
            for _ in range(TICKS_TO_JUDGE):
                time.sleep(self._tick)
                self._post()
            logger.critical("the job hangs; %s", name_culprits(before, self._read_posts()))
            self._store.set("verdict", "")
        while not self._store.check(["verdict"]):
            self._post()
            time.sleep(self._tick)
        self._is_judged.set()

    def _read_posts(self) -> list[Post | None]:
        keys = [f"post/{rank}" for rank in range(self._world_size)]
        return [Post(**json.loads(self._store.get(key))) if self._store.check([key]) else None for key in keys]
