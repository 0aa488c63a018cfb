"""The pre-flight check, from the first sign of life to the verdict.

First what a rank does alone (matrix products, writing), then collectives: within each node, between pairs of
neighbouring nodes, over the whole job. A node takes part in two pairs, with the node before it and the one behind it,
and the better one counts: so a broken link is blamed on the node that is slow with both. In a pair, each rank also
sends to its peer on the other node, all at once, as pipeline stages do.
"""

from __future__ import annotations

import dataclasses
import os
import socket
import time
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from megadiff.preflight import measure
from megadiff.preflight.facts import facts
from megadiff.preflight.judge import PreflightConfig, Report, Verdict
from megadiff.preflight.meeting import Meeting, Place

NUM_BARRIERS = 3
Edge = tuple[int, int]


def check_cluster(config: PreflightConfig) -> tuple[bool, Verdict | None]:
    """Check the nodes of this job; every process of it calls this.

    Returns:
        Whether all is well, the same on every rank, and on rank 0 the whole verdict.

    Raises:
        MeetingEndedError: a rank did not answer in time, or failed.
        ValueError: the launcher has set only a part of the job's environment.
    """
    place = Place.of(os.environ)
    meeting = Meeting(place, timeout=config.timeout)
    hosts = meeting.enter()
    device = _device(place)
    report = _alone(meeting, config, device)
    meeting.collect("what ranks do alone")
    with meeting.in_time("the job's process group"):
        backend = "nccl" if device.type == "cuda" else "gloo"
        store = dist.PrefixStore("collectives", meeting.store)
        limit = timedelta(seconds=config.timeout)
        dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.world_size, timeout=limit)
    measured = report.measured | _together(meeting, hosts, device)
    meeting.collect("the time of day")
    with meeting.in_time("a barrier"):
        times = [_leave_barrier(device) for _ in range(NUM_BARRIERS)]
    dist.destroy_process_group()
    report = dataclasses.replace(report, measured=measured, times_of_day=times)
    reports = [Report(**told) for told in meeting.collect("reports", dataclasses.asdict(report))]
    verdict = Verdict.of(reports, config) if place.rank == 0 else None
    is_good = meeting.tell_all("verdict", verdict and not verdict.wrong)
    meeting.leave()
    return is_good, verdict


def _device(place: Place) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    # srun may show each process one device.
    device = torch.device("cuda", place.local_rank if torch.cuda.device_count() > 1 else 0)
    torch.cuda.set_device(device)
    return device


def _alone(meeting: Meeting, config: PreflightConfig, device: torch.device) -> Report:
    with meeting.in_time("matrix products"):
        measured = measure.products(device)
    problems = []
    if config.scratch is not None:
        meeting.collect("writing")  # all at once, as checkpoints are written
        with meeting.in_time(f"writing in {config.scratch}"):
            try:
                measured["writing"] = measure.writing(config.scratch, meeting.place.rank, config.scratch_mib)
            except OSError as error:
                problems.append(
                    f"cannot write in {config.scratch} ({error.strerror}): make the directory, or free space"
                )
    return Report(host=socket.gethostname(), facts=facts(), measured=measured, problems=problems)


def _together(meeting: Meeting, hosts: Sequence[str], device: torch.device) -> dict[str, float]:
    """Bandwidth within this rank's node, with its neighbours and in the whole job, as far as there are any."""
    nodes = list(dict.fromkeys(hosts))
    ranks_of = [[rank for rank, host in enumerate(hosts) if host == node] for node in nodes]
    rounds: list[tuple[str, list[list[int]], dict[int, int]]] = [("node", ranks_of, {})]
    for index, edges in enumerate(rounds_of_pairs(len(nodes))):
        pairs = [(ranks_of[a], ranks_of[b]) for a, b in edges]
        rounds.append((f"pairs of nodes, round {index}", [one + other for one, other in pairs], peers(pairs)))
    if len(nodes) > 2:
        rounds.append(("job", [list(range(len(hosts)))], {}))
    found: dict[str, float] = {}
    for name, members, peer_of in rounds:
        meeting.collect(name)
        with meeting.in_time(f"collectives ({name})"):
            # Every rank takes part in making every group.
            groups = [dist.new_group(ranks) for ranks in members]
            for ranks, group in zip(members, groups, strict=True):
                if meeting.place.rank not in ranks or len(ranks) < 2:
                    continue
                scope = name.partition(",")[0]
                measured = measure.collectives(group, device)
                if meeting.place.rank in peer_of:
                    measured |= measure.sending(peer_of[meeting.place.rank], group, device)
                for kind, value in measured.items():
                    key = f"{kind}, {scope}"
                    found[key] = max(value, found.get(key, 0.0))
    return found


def rounds_of_pairs(num_nodes: int) -> list[list[Edge]]:
    """Neighbours on a ring of nodes, in rounds in which every node is in one pair at most."""
    if num_nodes < 2:
        return []
    ring = [(node, (node + 1) % num_nodes) for node in range(num_nodes if num_nodes > 2 else 1)]
    odd_one = [ring.pop()] if num_nodes % 2 else []
    return [edges for edges in (ring[0::2], ring[1::2], odd_one) if edges]


def peers(pairs: Sequence[tuple[list[int], list[int]]]) -> dict[int, int]:
    """Of each rank the one at the same place on the other node; who has none there does not send."""
    there = {first: second for pair in pairs for first, second in zip(*pair, strict=False)}
    return there | {second: first for first, second in there.items()}


def _leave_barrier(device: torch.device) -> float:
    dist.all_reduce(torch.zeros(1, device=device))
    measure.synchronize(device)
    return time.time()
