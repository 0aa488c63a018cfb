"""What a rank computes, sends and writes: each measurement takes seconds, and nothing that training would not do.

Bandwidths of collectives are bus bandwidths, as NCCL's own tests define them: bytes that each rank must send over the
time, 2(n-1)/n of the buffer for an all-reduce and (n-1)/n for an all-gather, so that they compare with the links.
Sending counts one way of an exchange.
"""

from __future__ import annotations

import math
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

SECONDS_OF_PRODUCTS = 2.0
"""Long enough for a GPU to reach the clock that power and temperature allow."""
PATIENCE_WITH_NVIDIA_SMI = 10.0
REPETITIONS = 10
MIB = 2**20


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def products(device: torch.device) -> dict[str, float]:
    """Rate of square matrix products in TFLOP/s, bf16 on a GPU and fp32 on a CPU; a GPU's clock in MHz under them.

    The clock is read while products run, for an idle GPU's says nothing; it is left out where nvidia-smi cannot tell.
    """
    on_cuda = device.type == "cuda"
    size, at_once = (8192, 50) if on_cuda else (256, 5)
    matrix = torch.randn(size, size, device=device, dtype=torch.bfloat16 if on_cuda else torch.float32)
    result = torch.empty_like(matrix)
    torch.mm(matrix, matrix, out=result)
    synchronize(device)
    query = _query_clock(device) if on_cuda else None
    seconds = SECONDS_OF_PRODUCTS if on_cuda else SECONDS_OF_PRODUCTS / 10
    started, count = time.perf_counter(), 0
    while (now := time.perf_counter() - started) < seconds or (
        query is not None and query.poll() is None and now < PATIENCE_WITH_NVIDIA_SMI
    ):
        for _ in range(at_once):
            torch.mm(matrix, matrix, out=result)
        count += at_once
        synchronize(device)
    found = {"matrix products": 2 * size**3 * count / (time.perf_counter() - started) / 1e12}
    clock = _answer(query)
    return found if clock is None else {**found, "GPU clock": clock}


def _query_clock(device: torch.device) -> subprocess.Popen[str] | None:
    """Ask for this GPU by its identity: numbers of visible devices are not those of nvidia-smi."""
    identity = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    command = ["nvidia-smi", "-i", identity, "--query-gpu=clocks.sm", "--format=csv,noheader,nounits"]
    try:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:  # not installed in this container
        return None


def _answer(query: subprocess.Popen[str] | None) -> float | None:
    """What nvidia-smi has said by now, if it is there and has said a number."""
    if query is None:
        return None
    if query.poll() is None:
        query.kill()
    try:
        return float(query.communicate()[0])
    except ValueError:
        return None


def collectives(group: dist.ProcessGroup, device: torch.device) -> dict[str, float]:
    """Bus bandwidth of all-reduce and all-gather within a group, in GB/s; a collective of it."""
    num_ranks = group.size()
    size = (256 if device.type == "cuda" else 4) * MIB
    piece = torch.zeros(math.ceil(size / 4 / num_ranks), device=device)
    whole = torch.zeros(piece.numel() * num_ranks, device=device)
    num_bytes = 4 * whole.numel()
    share = (num_ranks - 1) / num_ranks
    reduce = _seconds(lambda: dist.all_reduce(whole, group=group), device)
    gather = _seconds(lambda: dist.all_gather_into_tensor(whole, piece, group=group), device)
    return {"all-reduce": 2 * share * num_bytes / reduce / 1e9, "all-gather": share * num_bytes / gather / 1e9}


def sending(peer: int, group: dist.ProcessGroup, device: torch.device) -> dict[str, float]:
    """Bandwidth to and from another rank at once, in GB/s each way, as stages of a pipeline exchange hidden states.

    Args:
        peer: rank in the job, which calls this, too.
        group: one in which a collective has run.
    """
    outgoing = torch.zeros((64 if device.type == "cuda" else 4) * MIB // 4, device=device)
    incoming = torch.empty_like(outgoing)

    def exchange() -> None:
        # a send and a receive between two ranks, in one call
        both = [
            dist.P2POp(dist.isend, outgoing, peer, group=group),
            dist.P2POp(dist.irecv, incoming, peer, group=group),
        ]
        for work in dist.batch_isend_irecv(both):
            work.wait()

    return {"sending": 4 * outgoing.numel() / _seconds(exchange, device) / 1e9}


def _seconds(collective: Callable[[], object], device: torch.device) -> float:
    """Of one call, after one that builds connections."""
    collective()
    synchronize(device)
    started = time.perf_counter()
    for _ in range(REPETITIONS):
        collective()
    synchronize(device)
    return (time.perf_counter() - started) / REPETITIONS


def writing(folder: Path, rank: int, mebibytes: int) -> float:
    """Bandwidth of writing a file and having it on disk, in GB/s; the file is gone afterwards.

    Its content is random: some file systems compress.

    Raises:
        OSError: the folder cannot be written to.
    """
    path = folder / f".megadiff-preflight-{rank}-{os.getpid()}"
    block = os.urandom(MIB)
    try:
        started = time.perf_counter()
        with path.open("wb") as file:
            for _ in range(mebibytes):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        return mebibytes * MIB / (time.perf_counter() - started) / 1e9
    finally:
        path.unlink(missing_ok=True)
