"""Ports for the tests' servers."""

from __future__ import annotations

import contextlib
import random
import socket


def free_ports(number: int) -> list[int]:
    """Ports that nobody has, all different.

    From a range that Linux gives nobody who does not ask for a port by number: else another process could be given one
    before it is used.
    """
    found: list[int] = []
    for port in random.SystemRandom().sample(range(10000, 20000), 200):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == number:
            return found
    raise RuntimeError(f"of 200 ports from 10000 to 19999, only {len(found)} were free")
