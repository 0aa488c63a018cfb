"""Runs that begin with the weights of others, on any layout, and adapt them."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_ranks
from tiny import tiny_config

from megadiff.integrity import read_manifest, write_manifest
from megadiff.objectives import MdlmConfig

TOLERANCE = 1e-5
STEPS, SAVED_AFTER = 6, 3
ADAPTING = {"noise": "masked", "shift_inputs": True, "attention_annealing_samples": 20}
"""Attention is causal at the first sample, and bidirectional from the middle of the third step on."""
CASES: dict[int, dict[str, dict[str, dict[str, Any]]]] = {
    1: {"one process": {}, "packed": {"data": {"reset_at_document": True}}},
    2: {
        "tp2": {"parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True}},
        "pp2": {"parallel": {"pipeline_model_parallel_size": 2, "recompute_granularity": "full"}},
        "cp2": {"parallel": {"context_parallel_size": 2}},
        "cp2, packed": {"parallel": {"context_parallel_size": 2}, "data": {"reset_at_document": True}},
        "dp2, distributed": {"parallel": {"use_distributed_optimizer": True}},
    },
}
OPTIMIZERS: dict[str, dict[str, dict[str, Any]]] = {
    "plain": {},
    "distributed": {"parallel": {"use_distributed_optimizer": True}},
    "offloaded": {
        "parallel": {"use_distributed_optimizer": True},
        "optimizer": {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.5, "cpu_adam": "torch"},
    },
}


def build(corpus: Path, run_dir: Path, source: Path | None, sections: dict[str, dict[str, Any]]) -> Any:
    """A trainer that has begun, or gone on, where its settings say."""
    from megadiff.parallel import groups as parallel_groups
    from megadiff.training.trainer import Trainer

    training = {"init_from": None if source is None else str(source), **sections.get("training", {})}
    config = tiny_config(corpus, **{**sections, "training": training})
    config.check(2 if sections.get("parallel") else 1)
    trainer = Trainer(config, run_dir, parallel_groups.initialize(config.parallel))
    trainer.resume()
    return trainer


def losses(trainer: Any, num_steps: int) -> list[float]:
    batches = trainer.training_batches()
    return [trainer.train_step(batches)["loss"] for _ in range(num_steps)]


def train_source(corpus: Path, run_dir: Path) -> None:
    trainer = build(corpus, run_dir, None, {"optimizer": {"ema_decay": 0.9}})
    losses(trainer, SAVED_AFTER)
    trainer.save()


def begin_with(corpus: Path, source: Path, world_size: int) -> dict[str, list[float]]:
    """Losses of every step and the validation bound, by case."""
    curves = {}
    for name, sections in CASES[world_size].items():
        trainer = build(corpus, source / "unused", source, {"objective": ADAPTING, **sections})
        assert trainer.completed_steps == trainer.consumed_samples == 0
        if trainer.config.data.reset_at_document:
            # Few documents of the corpus end in the samples of six steps: here, every line is one.
            [line_end] = trainer.corpus.tokenizer.encode("\n")
            trainer.step = dataclasses.replace(trainer.step, document_end_id=line_end)
        curves[name] = [*losses(trainer, STEPS), trainer.validate().nelbo]
    return curves


def go_on_without_source(corpus: Path, source: Path, run_dir: Path) -> dict[str, Any]:
    """Losses of a run that was stopped, and of the same when the weights it began with are gone."""
    sections = {"objective": ADAPTING}
    trainer = build(corpus, run_dir, source, sections)
    found: dict[str, Any] = {"begin": losses(trainer, SAVED_AFTER)}
    trainer.save()
    found["unbroken"] = losses(trainer, STEPS - SAVED_AFTER)
    shutil.rmtree(source)
    # As an older version would have written it, which knew one activation and one parametrisation only.
    checkpoint = run_dir / "checkpoints" / f"step_{SAVED_AFTER:08d}"
    manifest = read_manifest(checkpoint)
    del manifest["model"]["activation"], manifest["model"]["parametrization"]
    write_manifest(checkpoint, manifest, manifest.pop("files"))
    trainer = build(corpus, run_dir, source, sections)
    found["resumed"] = losses(trainer, STEPS - SAVED_AFTER)
    trainer.save()
    return found


def keep_weights(corpus: Path, source: Path) -> dict[str, bool]:
    """Whether a step that moves nothing leaves the loaded weights as they are, in bf16: by optimizer and weights.

    A master weight that still is the initial one would overwrite them.
    """
    from megadiff.parallel import groups as parallel_groups
    from megadiff.training.state import load_denoiser

    checkpoint, still = source / "checkpoints" / f"step_{SAVED_AFTER:08d}", {"lr": 1e-30, "decoupled_lr": 1e-30}
    found = {}
    for weights in ("model", "ema"):
        config = tiny_config(corpus)
        groups = parallel_groups.initialize(config.parallel)
        saved = load_denoiser(checkpoint, config.model, groups, sequence_length=32, weights=weights)
        expected = [parameter.bfloat16() for denoiser in saved for parameter in denoiser.parameters()]
        for name, settings in OPTIMIZERS.items():
            optimizer = {**settings.get("optimizer", {}), **still, "ema_decay": 0.5}
            training = {"precision": "bf16", "init_weights": weights}
            sections = {**settings, "optimizer": optimizer, "training": training}
            trainer = build(corpus, source / "unused", source, sections)
            losses(trainer, 1)
            ours = [parameter for denoiser in trainer.denoisers for parameter in denoiser.parameters()]
            averages, masters = trainer.average._averages, trainer.average._weights
            pairs = [*zip(ours, expected, strict=True), *((averages[p], masters[p]) for p in masters)]
            # A weight of zero has become one of 1e-30.
            found[f"{name} {weights}"] = all(torch.allclose(a, b, rtol=0.0, atol=1e-20) for a, b in pairs)
    return found


def refuse(corpus: Path, source: Path) -> dict[str, str]:
    """What is said of checkpoints that a run cannot begin with."""
    cases: dict[str, tuple[Path, dict[str, dict[str, Any]]]] = {
        "missing": (source / "nothing", {}),
        "another model": (source, {"model": {"hidden_size": 64, "rotary_base": 500, "parametrization": "complete_p"}}),
        "no average": (source / "no average", {"training": {"init_weights": "ema"}}),
        "damaged": (source / "damaged", {}),
    }
    checkpoint = source / "checkpoints" / f"step_{SAVED_AFTER:08d}"
    for name in ("no average", "damaged"):
        shutil.copytree(checkpoint, source / name)
    manifest = read_manifest(checkpoint)
    files = manifest.pop("files")
    write_manifest(source / "no average", {**manifest, "ema_decay": None}, files)
    with (source / "damaged" / "config.yaml").open("a") as file:
        file.write(" ")
    said = {}
    for name, (path, sections) in cases.items():
        try:
            build(corpus, source / "unused", path, sections)
        except ValueError as error:
            said[name] = str(error)
    imported = source / "imported" / "checkpoints" / "step_00000000"
    shutil.copytree(checkpoint, imported)
    write_manifest(imported, {**manifest, "imported_from": {}}, files)
    for name, run_dir in (("another objective", source), ("imported", source / "imported")):
        try:
            build(corpus, run_dir, None, {"objective": MdlmConfig()})  # resumes what is there
        except ValueError as error:
            said[name] = str(error)
    return said


def begin_with_other_layers(checkpoint: Path) -> list[Any]:
    """What two models find in a checkpoint of two layers: one with a layer more, one with a layer less."""
    from megadiff.models.config import DenoiserConfig
    from megadiff.models.denoiser import build_denoiser
    from megadiff.parallel import groups as parallel_groups
    from megadiff.training.state import load_weights

    groups = parallel_groups.initialize(parallel_groups.ParallelConfig(pipeline_model_parallel_size=1))
    found = []
    for num_layers in (3, 1):
        config = DenoiserConfig(num_layers=num_layers, hidden_size=32, num_attention_heads=4, init_std=0.1)
        [denoiser] = build_denoiser(config, groups, vocab_size=400, sequence_length=32, seed=1)
        before = {name: parameter.clone() for name, parameter in denoiser.named_parameters()}
        new, unused = load_weights(checkpoint, [denoiser], weights="model", control=groups.control)
        kept = {name for name, parameter in denoiser.named_parameters() if torch.equal(parameter, before[name])}
        found.append((new, unused, sorted(name for name in kept if "norm" not in name)))
    parallel_groups.shutdown()
    return found


@pytest.fixture(scope="module")
def source(corpus_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("source")
    run_ranks(1, train_source, corpus_dir, run_dir)
    return run_dir


def test_runs_begin_with_the_same_weights_on_any_layout(corpus_dir: Path, source: Path) -> None:
    """And the end of annealing is crossed alike, in the middle of a step."""
    [reference] = run_ranks(1, begin_with, corpus_dir, source, 1)
    assert reference["one process"][:STEPS] != reference["packed"][:STEPS]
    for curves in run_ranks(2, begin_with, corpus_dir, source, 2):
        for name, curve in curves.items():
            expected = reference["packed" if "packed" in name else "one process"]
            assert curve == pytest.approx(expected, rel=TOLERANCE), name


def test_a_run_goes_on_when_its_source_is_gone(corpus_dir: Path, source: Path, tmp_path: Path) -> None:
    copy, run_dir = tmp_path / "source", tmp_path / "run"
    shutil.copytree(source, copy)
    [found] = run_ranks(1, go_on_without_source, corpus_dir, copy, run_dir)
    assert found["resumed"] == found["unbroken"]
    origins = [
        json.loads((run_dir / "checkpoints" / f"step_{step:08d}" / "manifest.json").read_text())["init_from"]
        for step in (SAVED_AFTER, STEPS)
    ]
    checkpoint = copy / "checkpoints" / f"step_{SAVED_AFTER:08d}"
    assert origins == [{"path": str(checkpoint), "step": SAVED_AFTER, "weights": "model"}] * 2


def test_master_weights_and_average_are_the_loaded_ones(corpus_dir: Path, source: Path) -> None:
    for found in run_ranks(2, keep_weights, corpus_dir, source):
        assert found == dict.fromkeys((f"{name} {w}" for w in ("model", "ema") for name in OPTIMIZERS), True)


def test_what_cannot_be_begun_with_is_refused(corpus_dir: Path, source: Path, tmp_path: Path) -> None:
    copy = tmp_path / "source"
    shutil.copytree(source, copy)
    [said] = run_ranks(1, refuse, corpus_dir, copy)
    assert said["missing"].startswith(f"training.init_from: {copy / 'nothing'} is neither a checkpoint")
    assert "does not fit: it has model.hidden_size 32 (this run: 64)" in said["another model"]
    assert "model.rotary_base 10000 (this run: 500)" in said["another model"]
    assert "model.parametrization standard (this run: complete_p)" in said["another model"]
    assert "holds no average of the weights" in said["no average"]
    assert "is damaged: config.yaml has" in said["damaged"]
    assert "was trained for objective gidd, but this run's is mdlm: choose another" in said["another objective"]
    assert "holds imported weights, no run that could go on: choose another --run-dir" in said["imported"]


def test_parameters_that_only_one_side_has_are_named(source: Path) -> None:
    [(more, fewer)] = run_ranks(1, begin_with_other_layers, source / "checkpoints" / f"step_{SAVED_AFTER:08d}")
    new, unused, kept = more
    assert new and all(name.startswith("decoder.layers.2.") for name in new) and not unused
    assert kept == [name for name in new if "norm" not in name]
    new, unused, kept = fewer
    assert unused and all(name.startswith("decoder.layers.1.") for name in unused) and not new and not kept
