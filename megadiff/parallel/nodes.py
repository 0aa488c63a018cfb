"""What the launcher says of this node, checked before any device is touched."""

from __future__ import annotations

import logging
import os
import socket

import torch

from megadiff.parallel.groups import ParallelConfig, launched_world_size

logger = logging.getLogger(__name__)


def check_node(config: ParallelConfig) -> None:
    """Check that this node has a device for each of its processes; warn where a layer is divided between nodes.

    Reads LOCAL_WORLD_SIZE and RANK, as torchrun sets them, SLURM_GPUS_ON_NODE, and NVIDIA_VISIBLE_DEVICES, which
    NVIDIA's images set. The warning is rank 0's.

    Raises:
        ValueError: GPUs that Slurm granted, or that the container is made for, are not seen by torch, or there are more
            processes than GPUs.
    """
    host, num_gpus = socket.gethostname(), torch.cuda.device_count()
    num_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    granted = int(os.environ.get("SLURM_GPUS_ON_NODE") or 0)
    if granted and not num_gpus:
        raise ValueError(
            f"Slurm granted {granted} GPU(s) on {host}, but torch {torch.__version__} sees none: compare with "
            "nvidia-smi, install a CUDA build of torch, or ask for --gpus-per-node 0"
        )
    promised = os.environ.get("NVIDIA_VISIBLE_DEVICES", "")
    if promised not in ("", "void", "none") and not num_gpus:
        raise ValueError(
            f"this container is made for GPUs (NVIDIA_VISIBLE_DEVICES is {promised}), but torch sees none on {host}: "
            "start it with --gpus all (Docker) or --nv (Apptainer), or set NVIDIA_VISIBLE_DEVICES=void to use its CPUs"
        )
    if 0 < num_gpus < num_processes:
        raise ValueError(
            f"{num_processes} processes on {host}, but torch sees {num_gpus} GPU(s), and each needs its own: start "
            f"--nproc-per-node {num_gpus}"
        )
    size = config.tensor_model_parallel_size
    if launched_world_size() > num_processes and num_processes % size and os.environ.get("RANK", "0") == "0":
        logger.warning(
            "parallel.tensor_model_parallel_size %d crosses nodes, which have %d process(es) each: every layer waits "
            "for the network; choose a divisor of %d, and divide over nodes by pipeline or context",
            size,
            num_processes,
            num_processes,
        )
