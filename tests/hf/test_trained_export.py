"""Checkpoints that Megatron-Core wrote, in several layouts, export to the logits of the trained denoiser."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_ranks
from tiny import tiny_config
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from megadiff.hf.convert import convert_to_hf

RUNS: dict[str, dict[str, dict[str, Any]]] = {
    "tp2": {"parallel": {"tensor_model_parallel_size": 2}},
    "pp2": {"parallel": {"pipeline_model_parallel_size": 2}},
    "dp2": {"parallel": {"use_distributed_optimizer": True}},
    "complete_p": {"model": {"parametrization": "complete_p"}, "optimizer": {"lr": 0.1, "decoupled_lr": None}},
}


def train_two_steps(corpus: Path, run_dir: Path, sections: dict[str, dict[str, Any]]) -> None:
    """Train in this process group and leave a checkpoint."""
    from megadiff.parallel import groups as parallel_groups
    from megadiff.training.loop import train

    model = {"num_query_groups": 2, **sections.get("model", {})}
    config = tiny_config(corpus, **{**sections, "model": model, "training": {"train_steps": 2}})
    train(config, run_dir, parallel_groups.initialize(config.parallel))
    parallel_groups.shutdown()


def denoiser_logits(runs: list[Path], ids_BL: Tensor) -> list[Tensor]:
    """Logits [B, L, V] of each run's newest checkpoint, by the denoiser of training in one process."""
    from megadiff.config import TrainConfig
    from megadiff.diffusion import AttentionLayout
    from megadiff.integrity import read_manifest
    from megadiff.parallel import groups as parallel_groups
    from megadiff.training.checkpoint import find_checkpoint
    from megadiff.training.state import load_denoiser

    logits = []
    for run in runs:
        checkpoint = find_checkpoint(run)
        manifest, config = read_manifest(checkpoint), TrainConfig.from_yaml(checkpoint / "config.yaml")
        groups = parallel_groups.initialize(parallel_groups.ParallelConfig())
        [denoiser] = load_denoiser(checkpoint, config.model, groups, sequence_length=ids_BL.shape[1])
        position_BL = torch.arange(ids_BL.shape[1]).expand_as(ids_BL)
        with torch.no_grad():
            logits_LBV = denoiser(ids_BL, position_BL, AttentionLayout())[..., : manifest["vocab_size"]]
        logits.append(logits_LBV.transpose(0, 1).contiguous())
    parallel_groups.shutdown()
    return logits


@pytest.mark.slow
def test_exports_have_the_logits_of_the_trained_denoiser(corpus_dir: Path, tmp_path: Path) -> None:
    runs = [tmp_path / name for name in RUNS]
    for run in runs:
        run_ranks(2, train_two_steps, corpus_dir, run, RUNS[run.name])
    ids_BL = torch.randint(400, (2, 32), generator=torch.Generator().manual_seed(0))
    (expected,) = run_ranks(1, denoiser_logits, runs, ids_BL)
    for run, expected_BLV in zip(runs, expected, strict=True):
        convert_to_hf(run, tmp_path / "exported" / run.name)
        exported = tmp_path / "exported" / run.name
        model: Any = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True)
        with torch.no_grad():
            logits_BLV = model(ids_BL).logits
        assert expected_BLV.std() > 0.1  # else agreement would mean little
        torch.testing.assert_close(logits_BLV, expected_BLV, rtol=0, atol=1e-5)
        tokenizer: Any = AutoTokenizer.from_pretrained(exported, trust_remote_code=True)
        prompt = tokenizer("import json", return_tensors="pt")
        text = tokenizer.decode(model.generate(**prompt, num_denoising_steps=8, seed=0)[0])
        assert text.startswith("import json")
        config = json.loads((exported / "config.json").read_text())
        assert config["suppressed_token_ids"] == [0, 2, 4] and config["max_position_embeddings"] == 32
