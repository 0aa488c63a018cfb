"""A node without the devices that are asked for is refused; a layer divided between nodes is a warning."""

from __future__ import annotations

import logging

import pytest
import torch

from megadiff.parallel.groups import ParallelConfig
from megadiff.parallel.nodes import check_node


def check(
    monkeypatch: pytest.MonkeyPatch, *, gpus: int, tensor_model_parallel_size: int = 1, **environment: object
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_GPUS_ON_NODE", "NVIDIA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    check_node(ParallelConfig(tensor_model_parallel_size=tensor_model_parallel_size))


def test_every_process_needs_a_gpu_where_there_are_any(monkeypatch: pytest.MonkeyPatch) -> None:
    check(monkeypatch, gpus=0, LOCAL_WORLD_SIZE=2)
    check(monkeypatch, gpus=8, LOCAL_WORLD_SIZE=8, SLURM_GPUS_ON_NODE=8)
    with pytest.raises(ValueError, match=r"Slurm granted 8 GPU\(s\) on .* sees none"):
        check(monkeypatch, gpus=0, SLURM_GPUS_ON_NODE=8)
    check(monkeypatch, gpus=0, NVIDIA_VISIBLE_DEVICES="void")
    with pytest.raises(ValueError, match=r"this container is made for GPUs \(NVIDIA_VISIBLE_DEVICES is all\)"):
        check(monkeypatch, gpus=0, NVIDIA_VISIBLE_DEVICES="all")
    with pytest.raises(ValueError, match=r"8 processes on .* sees 4 GPU\(s\).*--nproc-per-node 4"):
        check(monkeypatch, gpus=4, LOCAL_WORLD_SIZE=8)


def test_tensor_parallelism_between_nodes_is_warned_of_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    for rank, size in ((0, 2), (0, 1), (1, 4)):
        check(monkeypatch, gpus=0, tensor_model_parallel_size=size, RANK=rank, WORLD_SIZE=4, LOCAL_WORLD_SIZE=2)
    assert not caplog.records
    check(monkeypatch, gpus=0, tensor_model_parallel_size=4, WORLD_SIZE=4, LOCAL_WORLD_SIZE=2)
    assert "tensor_model_parallel_size 4 crosses nodes, which have 2 process(es) each" in caplog.text
