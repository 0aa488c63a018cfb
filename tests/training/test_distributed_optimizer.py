"""Ranges of flattened matrices as boxes, and optimizer state that any layout takes over and hands back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_ranks
from tiny import tiny_config

from megadiff.training.distributed_optimizer import boxes

TOLERANCE = 1e-5
"""Relative: the sums of fp32 gradients are taken in another order, over a dozen steps."""
NOT_DISTRIBUTED = {"use_distributed_optimizer": False}
SHAPES: dict[str, dict[str, Any]] = {
    "tp2 pp2": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
    "dp4": {"overlap_grad_reduce": True},
    "cp2 dp2": {"context_parallel_size": 2, "num_distributed_optimizer_instances": 2},
    "tp2 cp2, not distributed": {"tensor_model_parallel_size": 2, "context_parallel_size": 2, **NOT_DISTRIBUTED},
    "pp2 vpp2 dp2": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    "tp2 pp2 again": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
}
STEPS_EACH = 3


@pytest.mark.parametrize("shape", [(7,), (5, 6), (1, 30), (30, 1)])
def test_boxes_cover_every_range_exactly(shape: tuple[int, ...]) -> None:
    whole = torch.arange(torch.Size(shape).numel())
    for start in range(len(whole)):
        for end in range(start + 1, len(whole) + 1):
            found = list(boxes(start, end, shape))
            assert len(found) <= 3
            pieces = [
                whole.view(shape)[tuple(slice(f, f + n) for f, n in zip(first, size, strict=True))].flatten()
                for _, first, size in found
            ]
            assert torch.equal(torch.cat(pieces), whole[start:end])
            assert [at for at, _, _ in found] == [int(piece[0]) - start for piece in pieces]


def train_on_one_layout_after_another(corpus: Path, directory: Path) -> dict[str, Any]:
    """Each layout trains three steps from the checkpoint of the one before; the first one trains on, too."""
    from megatron.core.distributed import DistributedDataParallelConfig

    from megadiff.parallel import groups as parallel_groups
    from megadiff.training import chunks
    from megadiff.training.trainer import Trainer

    # Buckets of a size that the model fills several times, with padding between them.
    chunks.DistributedDataParallelConfig = lambda **settings: DistributedDataParallelConfig(  # type: ignore[misc, assignment]
        **settings, bucket_size=5000 if settings["overlap_grad_reduce"] else None
    )

    def build(layout: dict[str, Any], run_dir: Path) -> Trainer:
        config = tiny_config(
            corpus,
            model={"hidden_size": 40, "num_layers": 4},
            parallel={"use_distributed_optimizer": True, **layout},
            training={"train_steps": STEPS_EACH * len(SHAPES)},
            checkpoint={"keep_last": 0},
        )
        return Trainer(config, run_dir, parallel_groups.initialize(config.parallel))

    def losses(trainer: Trainer, num_steps: int) -> list[float]:
        batches = trainer.training_batches()
        return [trainer.train_step(batches)["loss"] for _ in range(num_steps)]

    unbroken = losses(build(SHAPES["tp2 pp2"], directory / "unbroken"), STEPS_EACH * len(SHAPES))
    found: dict[str, Any] = {"unbroken": unbroken}
    for name, layout in SHAPES.items():
        trainer = build(layout, directory / "handed on")
        trainer.resume()
        assert trainer.completed_steps == STEPS_EACH * list(SHAPES).index(name)
        found[name] = losses(trainer, STEPS_EACH)
        trainer.save()
        buffer = trainer.chunks[0].buffers[0]
        found[f"{name}: buckets"], padding = len(buffer.buckets), buffer.numel - buffer.numel_unpadded
        assert padding > 0 or "overlap_grad_reduce" not in layout
    return found


@pytest.mark.slow
def test_layouts_hand_a_run_on_with_the_same_losses(corpus_dir: Path, tmp_path: Path) -> None:
    for found in run_ranks(4, train_on_one_layout_after_another, corpus_dir, tmp_path, timeout=400.0):
        handed_on = [loss for name in SHAPES for loss in found[name]]
        assert handed_on == pytest.approx(found["unbroken"], rel=TOLERANCE)
        assert found["dp4: buckets"] > 1


def hand_on_in_bf16(corpus: Path, directory: Path, algorithm: str) -> dict[str, list[float]]:
    """Six steps with each kind of optimizer, and three of either followed by three of the other."""
    from megadiff.parallel import groups as parallel_groups
    from megadiff.training.trainer import Trainer

    groups = parallel_groups.initialize(parallel_groups.ParallelConfig())

    def build(distributed: bool, run_dir: str) -> Trainer:
        config = tiny_config(
            corpus,
            parallel={"use_distributed_optimizer": distributed},
            optimizer={"algorithm": algorithm},
            training={"precision": "bf16", "train_steps": 6},
        )
        return Trainer(config, directory / run_dir, groups)

    found = {}
    for first in (False, True):
        trainer = build(first, f"first {first}")
        batches = trainer.training_batches()
        losses = [trainer.train_step(batches)["loss"] for _ in range(3)]
        trainer.save()
        found[f"stayed {first}"] = losses + [trainer.train_step(batches)["loss"] for _ in range(3)]
        trainer = build(not first, f"first {first}")
        trainer.resume()
        batches = trainer.training_batches()
        found[f"left {first}"] = losses + [trainer.train_step(batches)["loss"] for _ in range(3)]
    parallel_groups.shutdown()
    return found


@pytest.mark.parametrize("algorithm", ["adamw", "laprop"])
def test_either_kind_of_optimizer_goes_on_with_the_state_of_the_other(
    corpus_dir: Path, tmp_path: Path, algorithm: str
) -> None:
    """In bf16, where the state includes fp32 copies of the parameters; one process, so to the last bit."""
    [found] = run_ranks(1, hand_on_in_bf16, corpus_dir, tmp_path, algorithm)
    assert found["left False"] == found["stayed False"] == found["stayed True"] == found["left True"]
