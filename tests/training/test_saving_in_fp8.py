"""Parameters in FP8 are saved as the numbers that they stand for, however Transformer Engine's tensors are moved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_ranks
from models import te_stand_in

from megadiff.models.config import DenoiserConfig

VOCAB, LENGTH = 400, 8
MODEL = DenoiserConfig(num_layers=2, hidden_size=32, num_attention_heads=4, init_std=0.3)


def saved_and_loaded(run_dir: Path, stays_when_moved: bool, overlap: bool) -> dict[str, Any]:
    """The weights of a model with a matrix in FP8, and those of models that load its checkpoint: plain, and in FP8."""
    from megadiff.models.denoiser import Denoiser
    from megadiff.parallel import groups as parallel_groups
    from megadiff.training.checkpoint import CheckpointConfig
    from megadiff.training.state import load_checkpoint
    from megadiff.training.writer import CheckpointWriter

    te_stand_in.install_quantized_tensors()
    te_stand_in.QuantizedTensor.stays_when_moved = stays_when_moved
    groups = parallel_groups.initialize(parallel_groups.ParallelConfig())

    def build(seed: int, *, in_fp8: bool) -> Denoiser:
        denoiser = Denoiser(MODEL, groups, vocab_size=VOCAB, sequence_length=LENGTH, seed=seed, dtype=torch.bfloat16)
        linear = denoiser.decoder.layers[1].mlp.linear_fc1
        if in_fp8:
            linear.weight = torch.nn.Parameter(te_stand_in.QuantizedTensor.of(linear.weight))
        return denoiser

    def numbers(denoiser: Denoiser) -> dict[str, torch.Tensor]:
        of_fp8 = {name: x for name, x in denoiser.named_parameters() if isinstance(x, te_stand_in.QuantizedTensor)}
        plain = {name: x.detach() for name, x in denoiser.named_parameters() if name not in of_fp8}
        return plain | {name: x.dequantize() for name, x in of_fp8.items()}

    trained = build(3, in_fp8=True)
    writer = CheckpointWriter(run_dir, CheckpointConfig(), groups)
    writer.start(1, [trained], None, manifest={"step": 1}, config_yaml="", tokenizer=b"", overlap=overlap)
    checkpoint, _ = writer.finish()
    plain, in_fp8 = build(4, in_fp8=False), build(4, in_fp8=True)
    for denoiser in (plain, in_fp8):
        load_checkpoint(checkpoint, [denoiser], control=groups.control)
    found = {"trained": numbers(trained), "plain": numbers(plain), "in FP8": numbers(in_fp8)}
    parallel_groups.shutdown()
    return found


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("stays_when_moved", [False, True])
def test_parameters_in_fp8_are_saved_as_plain_numbers(tmp_path: Path, stays_when_moved: bool, overlap: bool) -> None:
    [found] = run_ranks(1, saved_and_loaded, tmp_path, stays_when_moved, overlap)
    for name, trained in found["trained"].items():
        assert torch.equal(found["plain"][name], trained), name
        assert torch.equal(found["in FP8"][name], trained), name
