"""The cases that hold Transformer Engine to local modules on a GPU, by stand-ins: they run, and they compare."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from distributed import run_ranks
from models.te_cases import LAYOUTS, MODELS, errors, kind_of_dry_run, trained

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on GPUs by tests/gpu")
THEIRS = {"transformer_impl": "transformer_engine"}


def errors_by_stand_ins() -> list[dict[str, tuple[float, float]]]:
    """Of each layout, and of both kinds of layers."""
    return [
        errors(MODELS[model], layout, "transformer_engine", "transformer_engine")
        for model, layout in zip([*MODELS, *MODELS], LAYOUTS, strict=True)
    ]


def test_stand_ins_are_as_near_to_fp32_as_local_modules() -> None:
    [found] = run_ranks(1, errors_by_stand_ins)
    for of_layout in found:
        assert len(of_layout) == 20 and all(1e-4 < ours < 0.1 for _, ours in of_layout.values())
        assert all(theirs <= 2 * ours + 2**-7 for theirs, ours in of_layout.values())


@pytest.mark.slow
def test_phases_of_a_run_go_on_in_either(corpus_dir: Path, tmp_path: Path) -> None:
    fp8 = {
        "training": {"precision": "fp8"},
        "fp8": {"param_gather": True},
        "parallel": {"use_distributed_optimizer": True},
    }
    local = {"model": {"transformer_impl": "local", "attention_backend": "local"}}
    [alone] = run_ranks(1, trained, corpus_dir, tmp_path / "bf16", [(4, local)])
    [found] = run_ranks(1, trained, corpus_dir, tmp_path / "fp8", [(2, fp8), (4, local)])
    assert found == pytest.approx(alone, rel=2e-3)


def test_dry_runs_build_stand_ins(corpus_dir: Path) -> None:
    [kind] = run_ranks(1, kind_of_dry_run, corpus_dir, {"model": THEIRS, "training": {"precision": "bf16"}})
    assert kind == "layers: transformer_engine, attention: transformer_engine"
