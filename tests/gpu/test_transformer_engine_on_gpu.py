"""Transformer Engine on a GPU: its layers and attention beside local ones, and FP8 beside bf16, in every recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_ranks
from models.te_cases import LAYOUTS, MODELS, errors, kind_of_dry_run, trained

from megadiff import accelerations
from megadiff.models.fp8 import ROW_MULTIPLE

MISSING = accelerations.why_no_transformer_engine()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(MISSING), reason=MISSING)]

BF16 = torch.finfo(torch.bfloat16).eps
STEPS = 3
NEAR = 0.02
"""Largest relative difference of losses in FP8 from those in bf16, as for the emulation."""
SHARDED: dict[str, Any] = {"use_distributed_optimizer": True}
THEIRS: dict[str, Any] = {"transformer_impl": "transformer_engine"}


def in_fp8(recipe: str, parallel: dict[str, Any] | None = None, **fp8: Any) -> dict[str, dict[str, Any]]:
    """Settings of a phase that computes in FP8; a recipe that the device does not have is skipped."""
    if reason := accelerations.why_no_fp8(recipe):
        pytest.skip(reason)
    return {"training": {"precision": "fp8"}, "fp8": {"recipe": recipe, **fp8}, "parallel": SHARDED | (parallel or {})}


def losses(corpus: Path, run_dir: Path, *phases: tuple[int, dict[str, dict[str, Any]]]) -> list[float]:
    [found] = run_ranks(1, trained, corpus, run_dir, list(phases), timeout=600.0)
    return found


@pytest.fixture(scope="module")
def in_bf16(corpus_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of twice as many steps by local layers and attention."""
    local = {"model": {"transformer_impl": "local", "attention_backend": "local"}}
    return losses(corpus_dir, tmp_path_factory.mktemp("bf16"), (2 * STEPS, local))


@pytest.mark.parametrize("model", MODELS)
def test_layers_are_as_near_to_fp32_as_local_ones(model: str) -> None:
    [found] = run_ranks(1, errors, MODELS[model], "bidirectional", "transformer_engine", "local")
    for name, (theirs, ours) in found.items():
        assert theirs <= 2 * ours + BF16, name


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_attention_is_as_near_to_fp32_as_the_local_one(model: str, layout: str) -> None:
    [found] = run_ranks(1, errors, MODELS[model], layout, "local", "transformer_engine")
    for name, (theirs, ours) in found.items():
        assert theirs <= 2 * ours + BF16, name


@pytest.mark.parametrize("param_gather", [False, True])
@pytest.mark.parametrize("recipe", ROW_MULTIPLE)
def test_a_run_in_fp8_is_near_one_in_bf16(
    corpus_dir: Path, tmp_path: Path, in_bf16: list[float], recipe: str, param_gather: bool
) -> None:
    if param_gather and recipe == "mxfp8":
        pytest.skip("refused: Megatron gathers such parameters in the buffer of the gradients")
    found = losses(corpus_dir, tmp_path, (STEPS, in_fp8(recipe, param_gather=param_gather)))
    assert found == pytest.approx(in_bf16[:STEPS], rel=NEAR)
    assert found != in_bf16[:STEPS], "nothing was rounded"


@pytest.mark.parametrize("param_gather", [False, True])
def test_a_run_goes_on_with_local_layers_and_back(
    corpus_dir: Path, tmp_path: Path, in_bf16: list[float], param_gather: bool
) -> None:
    fp8, local = in_fp8("tensorwise", param_gather=param_gather), {"model": {"transformer_impl": "local"}}
    local["parallel"] = SHARDED
    for name, first, then in (("to local layers", fp8, local), ("to FP8", local, fp8)):
        found = losses(corpus_dir, tmp_path / name, (STEPS, first), (2 * STEPS, then))
        assert found == pytest.approx(in_bf16, rel=NEAR), name


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise"])
@pytest.mark.parametrize(
    "recompute",
    [
        {"recompute_granularity": "full"},
        {"recompute_granularity": "selective", "recompute_modules": ("mlp",)},
        {"recompute_granularity": "selective", "recompute_modules": ("core_attn", "mlp")},
    ],
    ids=lambda recompute: " ".join(map(str, recompute.values())),
)
def test_recomputation_does_not_change_a_run_in_fp8(
    corpus_dir: Path, tmp_path: Path, recipe: str, recompute: dict[str, Any]
) -> None:
    kept = losses(corpus_dir, tmp_path / "kept", (STEPS, in_fp8(recipe)))
    again = losses(corpus_dir, tmp_path / "again", (STEPS, in_fp8(recipe, recompute)))
    # Kernels of backward add in any order, and a sum next to a step of FP8 is rounded to the other side.
    assert again == pytest.approx(kept, rel=2e-3)


def test_layers_in_bf16_train_as_local_ones(corpus_dir: Path, tmp_path: Path, in_bf16: list[float]) -> None:
    assert losses(corpus_dir, tmp_path, (STEPS, {"model": THEIRS})) == pytest.approx(in_bf16[:STEPS], rel=2e-3)


@pytest.mark.parametrize("sections", [{"model": THEIRS}, {"training": {"precision": "fp8"}}], ids=["bf16", "fp8"])
def test_dry_runs_build_them_without_memory(corpus_dir: Path, sections: dict[str, dict[str, Any]]) -> None:
    sections = {**sections, "training": {"precision": "bf16", **sections.get("training", {})}}
    [kind] = run_ranks(1, kind_of_dry_run, corpus_dir, sections)
    assert kind == "layers: transformer_engine, attention: transformer_engine"
