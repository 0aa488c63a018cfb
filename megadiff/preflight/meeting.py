"""Ranks that find each other without a collective, so that those which are missing can be named.

A collective that a rank does not enter tells the others nothing but a time-out. So before each of them everybody signs
in at the job's key-value store, and whoever has not signed in time has a number and, once it has spoken, a host. What
then still hangs is ended by a timer.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from megadiff.exit_codes import EXIT_HUNG

logger = logging.getLogger(__name__)

SECONDS_FOR_AN_ANSWER = 15.0
"""How much longer others wait than rank 0, which says who is missing."""
SECONDS_TO_READ = 2.0
"""That rank 0 leaves the others to read who is missing."""
FIRST_PORT, NUM_PORTS = 20_000, 10_000
"""Of jobs that srun starts: a port by the number of the job."""


class MeetingEndedError(RuntimeError):
    """Some rank did not answer in time, or failed; the message names it."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """A process in its job."""

    rank: int
    world_size: int
    local_rank: int
    """On its node."""
    address: str
    """Host of the job's store."""
    port: int
    launcher_has_store: bool
    """Whether the launcher keeps the store; rank 0 does otherwise."""

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Place:
        """Read it from the environment that torchrun or srun has set; a process on its own is a job of one.

        Raises:
            ValueError: the launcher has set only a part of it.
        """
        tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
        if "RANK" not in environment and tasks != "1":
            job = int(environment["SLURM_JOB_ID"])
            return cls(
                rank=int(environment["SLURM_PROCID"]),
                world_size=int(tasks),
                local_rank=int(environment["SLURM_LOCALID"]),
                address=environment.get("MASTER_ADDR") or first_host(environment["SLURM_STEP_NODELIST"]),
                port=int(environment.get("MASTER_PORT") or FIRST_PORT + job % NUM_PORTS),
                launcher_has_store=False,
            )
        world_size = int(environment.get("WORLD_SIZE", "1"))
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in environment]
        if world_size > 1 and missing:
            raise ValueError(
                f"WORLD_SIZE is {world_size}, but {', '.join(missing)} not set: start with torchrun or srun"
            )
        return cls(
            rank=int(environment.get("RANK", "0")),
            world_size=world_size,
            local_rank=int(environment.get("LOCAL_RANK", "0")),
            address=environment.get("MASTER_ADDR", "localhost"),
            port=int(environment.get("MASTER_PORT", "0")),
            launcher_has_store=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        )


def first_host(node_list: str) -> str:
    """The first name of Slurm's short form: gpu007 of gpu[007-009,12],login1."""
    match = re.match(r"([^,\[]+)(?:\[(\d+))?", node_list)
    assert match is not None, node_list
    return match[1] + (match[2] or "")


class Meeting:
    """The ranks of a job, by the store that all of them reach.

    Args:
        timeout: seconds that a rank may be late, or that anything may take.

    Raises:
        MeetingEndedError: there is no store at the job's address.
    """

    def __init__(self, place: Place, *, timeout: float) -> None:
        self.place, self.timeout = place, timeout
        self._hosts: list[str] = []
        is_master = place.rank == 0 and not place.launcher_has_store
        try:
            store = dist.TCPStore(
                place.address,
                place.port,
                is_master=is_master,
                timeout=timedelta(seconds=timeout),
                wait_for_workers=False,
            )
        except RuntimeError as error:  # torch's DistNetworkError is one
            raise MeetingEndedError(
                f"rank {place.rank} on {socket.gethostname()} found no store at {place.address}:{place.port} within "
                f"{timeout:g} s: look whether rank 0 runs there, and whether this node may reach that port"
            ) from error
        self.store: dist.Store = dist.PrefixStore("preflight", store)

    def enter(self) -> list[str]:
        """Meet for the first time, and return the hosts of all ranks.

        Raises:
            MeetingEndedError: as in `collect`.
        """
        self._hosts = self.tell_all("hosts", self.collect("host", socket.gethostname()))
        return self._hosts

    def collect(self, name: str, value: Any = None) -> list[Any]:
        """Wait for all ranks; on rank 0 return the value of each, plain data by rank, elsewhere nothing.

        Raises:
            MeetingEndedError: a rank did not come; every other one says which.
        """
        self.store.set(f"{name}/{self.place.rank}", json.dumps(value))
        keys = self._keys(name)
        if self.place.rank > 0:
            missing = self._wait_for_first(f"{name}/missing")
        else:
            missing = self._missing(keys)
            self.store.set(f"{name}/missing", json.dumps(missing))
        if missing:
            if self.place.rank == 0:
                time.sleep(SECONDS_TO_READ)  # the store may go with this process
            raise MeetingEndedError(
                f"{', '.join(map(self._name, missing))} did not answer within {self.timeout:g} s (before: {name}): "
                "look at what that node prints, or leave it out"
            )
        return [json.loads(self.store.get(key)) for key in keys] if self.place.rank == 0 else []

    def tell_all(self, name: str, value: Any) -> Any:
        """Rank 0's value, plain data, on every rank.

        Raises:
            MeetingEndedError: rank 0 does not come.
        """
        if self.place.rank == 0:
            self.store.set(f"{name}/told", json.dumps(value))
            return value
        return self._wait_for_first(f"{name}/told")

    def leave(self) -> None:
        """Go, rank 0 last: the store may go with it. Nobody waits for an answer that could not come any more."""
        self.store.set(f"good-bye/{self.place.rank}", "")
        if self.place.rank == 0 and (missing := self._missing(self._keys("good-bye"))):
            logger.warning("%s did not say good-bye: all is told, but look there", ", ".join(map(self._name, missing)))

    @contextmanager
    def in_time(self, what: str) -> Iterator[None]:
        """Do something that other ranks wait for, in time: later a timer ends this process, with exit code 4.

        Raises:
            MeetingEndedError: a library gave up; the others learn it when this rank does not come to the next meeting.
        """
        timer = threading.Timer(self.timeout, self._give_up, [what])
        timer.daemon = True
        timer.start()
        try:
            yield
        except RuntimeError as error:  # of devices, memory and networks
            reason = " ".join(str(error).split())[:200]
            raise MeetingEndedError(
                f"{what} failed on rank {self.place.rank} on {socket.gethostname()}, so look at that node first: "
                f"{reason}"
            ) from error
        finally:
            timer.cancel()

    def _give_up(self, what: str) -> None:
        logger.critical(
            "rank %d on %s waited %g s for %s and goes: all ranks that this needs had signed in, so look at this node, "
            "and at the network where others say the same",
            *(self.place.rank, socket.gethostname(), self.timeout, what),
        )
        os._exit(EXIT_HUNG)

    def _keys(self, name: str) -> list[str]:
        return [f"{name}/{rank}" for rank in range(self.place.world_size)]

    def _missing(self, keys: list[str]) -> list[int]:
        try:
            self.store.wait(keys, timedelta(seconds=self.timeout))
        except RuntimeError:  # torch's DistStoreError is one
            return [rank for rank, key in enumerate(keys) if not self.store.check([key])]
        return []

    def _wait_for_first(self, key: str) -> Any:
        try:
            self.store.wait([key], timedelta(seconds=self.timeout + SECONDS_FOR_AN_ANSWER))
            return json.loads(self.store.get(key))
        except RuntimeError as error:  # also where the store has gone with rank 0
            raise MeetingEndedError(
                f"{self._name(0)} did not answer rank {self.place.rank} within "
                f"{self.timeout + SECONDS_FOR_AN_ANSWER:g} s: look at what that node prints"
            ) from error

    def _name(self, rank: int) -> str:
        return f"rank {rank}{f' on {self._hosts[rank]}' if self._hosts else ''}"
