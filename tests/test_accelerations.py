"""Optional accelerations: found, chosen, named and recorded, with stand-ins for libraries that need a GPU."""

from __future__ import annotations

import importlib.util
import logging
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from distributed import run_ranks
from tiny import tiny_config

from megadiff import accelerations
from megadiff.training.adam import fused_adam, initialize_state, set_step_count

GAF = accelerations.GRADIENT_ACCUMULATION
ON_THE_HOST = {"DeepSpeed CPU Adam", "nvidia-resiliency-ext"}


def make_fused_adam() -> type[torch.optim.Optimizer]:
    """A stand-in with the interface that Transformer Engine's and Apex's share, as their sources state it.

    Steps are counted in groups, and a group without parameters is an error, as it is in Apex.
    """

    class FusedAdam(torch.optim.Optimizer):
        def __init__(self, params: Any, lr: float = 1e-3, *, bias_correction: bool, adam_w_mode: bool) -> None:
            super().__init__(params, {"lr": lr, "bias_correction": bias_correction, "betas": (0.9, 0.999), "eps": 1e-8})
            self.adam_w_mode = adam_w_mode

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                group["params"][0].add_(1.0)
                group["step"] = group.get("step", 0) + 1

    return FusedAdam


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine that says it has CUDA, on a Hopper GPU, and none of the libraries."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    for module in (GAF, "triton", *accelerations.FUSED_ADAMS.values()):
        monkeypatch.setitem(sys.modules, module, None)
    return monkeypatch


def install(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    stand_in = ModuleType(module)
    stand_in.FusedAdam = make_fused_adam()  # type: ignore[attr-defined]
    for depth in range(1, module.count(".") + 1):
        parent = ".".join(module.split(".")[:depth])
        monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
    monkeypatch.setitem(sys.modules, module, stand_in)


def install_transformer_engine(
    monkeypatch: pytest.MonkeyPatch, *, version: str = "2.9.0", known_to_megatron: bool = True
) -> None:
    """What is asked of Transformer Engine, of Megatron's layers by it, and of what pip knows of it."""
    install(monkeypatch, accelerations.TRANSFORMER_ENGINE)
    checks = ModuleType(accelerations.TRANSFORMER_ENGINE_FP8)
    for name in set(accelerations.FP8_CHECK.values()):
        setattr(checks, name, lambda: (True, ""))
    monkeypatch.setitem(sys.modules, accelerations.TRANSFORMER_ENGINE_FP8, checks)
    extension = ModuleType(accelerations.MEGATRON_EXTENSION)
    extension.HAVE_TE = known_to_megatron  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, accelerations.MEGATRON_EXTENSION, extension)
    monkeypatch.setattr(accelerations, "version", {"transformer_engine": version}.get)


def states() -> dict[str, str]:
    return {row.name: row.state for row in accelerations.table()}


def test_without_cuda_nothing_applies_and_torch_does_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for library, module in accelerations.FUSED_ADAMS.items():
        install(monkeypatch, module)
        with pytest.raises(ValueError, match=rf"implementation is {library}, .*cannot run here \(no CUDA device\)"):
            accelerations.resolve_adam(library)
    install(monkeypatch, GAF)
    assert not accelerations.fuses_gradient_accumulation()
    assert accelerations.resolve_adam("auto") == accelerations.resolve_adam("torch") == "torch"
    everything_by_torch = {"gradient_accumulation": "torch", "rms_norm": "torch", "rotary_and_activations": "torch"}
    assert accelerations.used("local") == everything_by_torch
    assert {state for name, state in states().items() if name not in ON_THE_HOST} == {"not applicable"}


def test_what_cannot_be_imported_is_missing(on_cuda: pytest.MonkeyPatch) -> None:
    assert accelerations.resolve_adam("auto") == "torch"
    assert not accelerations.fuses_gradient_accumulation()
    found = states()
    assert found["gradient accumulation"] == found["FusedAdam, apex"] == "missing"
    assert found["fused RMS norm"] == "live" and found["fused rotary phases, activations"] == "missing"
    install(on_cuda, "triton")
    on_cuda.setattr("megadiff.accelerations.shutil.which", lambda _: None)
    assert accelerations.why_not_compiled() == "no gcc or clang, which Triton needs"
    used = accelerations.used("transformer_engine")
    assert used["gradient_accumulation"] == "transformer_engine, torch in the output layer"
    with pytest.raises(
        ValueError, match=r"implementation is apex, .*\(no module apex.optimizers\): choose auto or torch"
    ):
        accelerations.resolve_adam("apex")


def test_what_can_be_imported_is_live(on_cuda: pytest.MonkeyPatch) -> None:
    install(on_cuda, GAF)
    install(on_cuda, accelerations.FUSED_ADAMS["apex"])
    assert accelerations.fuses_gradient_accumulation()
    install(on_cuda, "triton")
    on_cuda.setattr("megadiff.accelerations.shutil.which", lambda name: f"/bin/{name}")
    used = accelerations.used("local")
    assert used["gradient_accumulation"] == "apex"
    assert used["rms_norm"] == "torch, fused" and used["rotary_and_activations"] == "torch, compiled"
    assert accelerations.resolve_adam("auto") == "apex" and accelerations.resolve_adam("torch") == "torch"
    assert states()["gradient accumulation"] == states()["FusedAdam, apex"] == "live"

    install(on_cuda, accelerations.FUSED_ADAMS["transformer_engine"])
    assert accelerations.resolve_adam("auto") == "transformer_engine" and accelerations.resolve_adam("apex") == "apex"
    found = {row.name: str(row) for row in accelerations.table()}
    assert found["FusedAdam, transformer_engine"].startswith("live")
    assert found["FusedAdam, apex"].startswith("not applicable, transformer_engine goes before it")


@pytest.mark.parametrize(
    "capability, cuda, live, reason",
    [
        ((8, 0), "12.9", set(), "compute capability 8.0, below 9.0"),
        ((8, 9), "12.9", {"delayed", "tensorwise"}, "compute capability 8.9, below 9.0"),
        ((9, 0), "12.8", {"delayed", "tensorwise"}, "CUDA 12.8, below 12.9"),
        ((9, 0), "12.9", {"delayed", "tensorwise", "blockwise"}, ""),
        ((10, 0), "13.0", {"delayed", "tensorwise", "blockwise", "mxfp8"}, ""),
    ],
)
def test_fp8_is_live_by_device_and_recipe(
    on_cuda: pytest.MonkeyPatch, capability: tuple[int, int], cuda: str, live: set[str], reason: str
) -> None:
    assert accelerations.why_no_fp8("tensorwise").startswith("no module transformer_engine")
    assert states()["FP8"] == states()["transformer layers"] == "missing"
    install_transformer_engine(on_cuda)
    on_cuda.setattr(torch.cuda, "get_device_capability", lambda: capability)
    on_cuda.setattr(torch.version, "cuda", cuda)
    assert {recipe for recipe in accelerations.FP8_CAPABILITY if not accelerations.why_no_fp8(recipe)} == live
    assert accelerations.why_no_fp8("blockwise") == reason
    [row] = [row for row in accelerations.table() if row.name == "FP8"]
    assert row.state == ("live" if live else "missing")
    missing = accelerations.FP8_CAPABILITY.keys() - live
    assert all(f"no {recipe}: " in row.reason for recipe in missing)
    assert states()["transformer layers"] == "live"


@pytest.mark.parametrize(
    "version, missing",
    [
        ("1.13", {"tensorwise": "2.2", "blockwise": "2.3", "mxfp8": "2.1"}),
        ("2.2.0.dev0+39c0e70", {"blockwise": "2.3"}),
        ("2.10.0", {}),
    ],
)
def test_each_recipe_has_its_version_of_transformer_engine(
    on_cuda: pytest.MonkeyPatch, version: str, missing: dict[str, str]
) -> None:
    install_transformer_engine(on_cuda, version=version)
    on_cuda.setattr(torch.cuda, "get_device_capability", lambda: (10, 0))
    on_cuda.setattr(torch.version, "cuda", "13.0")
    reasons = {recipe: accelerations.why_no_fp8(recipe) for recipe in accelerations.FP8_VERSION}
    expected = {recipe: f"Transformer Engine {version}, below {least}" for recipe, least in missing.items()}
    assert {recipe: reason for recipe, reason in reasons.items() if reason} == expected


def test_what_else_transformer_engine_refuses_is_told_in_its_words(on_cuda: pytest.MonkeyPatch) -> None:
    install_transformer_engine(on_cuda)
    on_cuda.setattr(torch.version, "cuda", "13.0")
    refusal = False, "FP8 block scaled GEMM requires Hopper and CUDA >= 12.9."
    checks = sys.modules[accelerations.TRANSFORMER_ENGINE_FP8]
    on_cuda.setattr(checks, accelerations.FP8_CHECK["blockwise"], lambda: refusal)
    assert accelerations.why_no_fp8("blockwise") == "FP8 block scaled GEMM requires Hopper and CUDA >= 12.9"
    assert accelerations.why_no_fp8("tensorwise") == ""


def test_recipes_have_the_versions_that_megatron_asks_for() -> None:
    """Read from its source: the function exists only where the package is."""
    source = Path(importlib.util.find_spec("megatron.core.fp8_utils").origin).read_text()  # type: ignore[arg-type, union-attr]
    body = source.split("def get_fp8_recipe")[1]
    for recipe in ("tensorwise", "blockwise"):
        least = ".".join(map(str, accelerations.FP8_VERSION[recipe]))
        assert f'Fp8Recipe.{recipe} and is_te_min_version("{least}.0.dev0")' in body
    assert 'if is_te_min_version("2.1.0"):' in body and accelerations.FP8_VERSION["mxfp8"] == (2, 1)


def test_layers_are_megatrons_to_refuse(on_cuda: pytest.MonkeyPatch) -> None:
    install_transformer_engine(on_cuda, known_to_megatron=False)
    reason = "Megatron-Core finds no transformer_engine.pytorch.fp8 with fp8_autocast in it"
    assert accelerations.why_no_transformer_engine() == reason == accelerations.why_no_fp8("tensorwise")
    assert not accelerations.has_transformer_engine_attention()
    assert states()["transformer layers"] == states()["attention"] == "missing"
    on_cuda.setitem(sys.modules, accelerations.MEGATRON_EXTENSION, None)
    assert accelerations.why_no_transformer_engine() == f"no module {accelerations.MEGATRON_EXTENSION}"


def test_a_gpu_without_a_usable_transformer_engine_is_a_warning(on_cuda: pytest.MonkeyPatch) -> None:
    remedy = "install transformer_engine[pytorch] of a version from 2.10 to 2.20, or set"
    missing = accelerations.transformer_engine_concern()
    assert "cannot be used on this GPU (no module transformer_engine" in missing and remedy in missing
    install_transformer_engine(on_cuda, version="2.10.0", known_to_megatron=False)
    assert "(Megatron-Core finds no transformer_engine.pytorch.fp8" in accelerations.transformer_engine_concern()
    for version in ("2.10.0+769ed778", "2.15.1", "2.20.2"):
        install_transformer_engine(on_cuda, version=version)
        assert accelerations.transformer_engine_concern() == ""
    for version in ("2.9.0", "2.21.0", "3.0"):
        install_transformer_engine(on_cuda, version=version)
        expected = f"Transformer Engine is of version {version}, but supported are 2.10 to 2.20: install one of these"
        assert accelerations.transformer_engine_concern().startswith(expected)
        assert accelerations.why_no_transformer_engine() == "", "it is Megatron's to refuse a version"
    on_cuda.setattr(torch.cuda, "is_available", lambda: False)
    assert accelerations.transformer_engine_concern() == ""


def test_a_broken_transformer_engine_is_a_warning_with_its_reason(on_cuda: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "transformer_engine" / "pytorch"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").write_text("")
    (package / "__init__.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    on_cuda.setitem(sys.modules, "transformer_engine", ModuleType("to be removed again"))
    del sys.modules["transformer_engine"]
    on_cuda.syspath_prepend(tmp_path)
    reason = "transformer_engine.pytorch fails to import: undefined symbol: _ZN3c10"
    assert f"cannot be used on this GPU ({reason})" in accelerations.transformer_engine_concern()


def warnings_of_a_run(corpus: Path, run_dir: Path, sections: dict[str, dict[str, Any]]) -> list[str]:
    """On a GPU that lacks Transformer Engine, as far as the run asks."""
    from megadiff.parallel import groups as parallel_groups
    from megadiff.training.loop import train

    accelerations.transformer_engine_concern = lambda: "no Transformer Engine"
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("megadiff").addHandler(handler)
    config = tiny_config(corpus, **sections)
    with parallel_groups.joined(config.parallel) as groups:
        train(config, run_dir, groups)
    return lines


@pytest.mark.parametrize(
    "precision, model, expected",
    [
        ("bf16", {}, ["no Transformer Engine"]),
        ("bf16", {"transformer_impl": "local"}, ["no Transformer Engine"]),
        ("bf16", {"transformer_impl": "local", "attention_backend": "local"}, []),
        ("fp32", {}, []),
    ],
)
def test_runs_warn_where_they_would_have_it(
    corpus_dir: Path, tmp_path: Path, precision: str, model: dict[str, Any], expected: list[str]
) -> None:
    sections = {"model": model, "training": {"precision": precision, "train_steps": 1}}
    first, second = run_ranks(2, warnings_of_a_run, corpus_dir, tmp_path, sections)
    assert first == expected and second == [], "one rank speaks for all"


def test_library_that_fails_to_import_is_missing_and_says_why(on_cuda: pytest.MonkeyPatch, tmp_path: Any) -> None:
    (tmp_path / f"{GAF}.py").write_text("raise OSError('undefined symbol: _ZN3c10')")
    on_cuda.delitem(sys.modules, GAF)
    on_cuda.syspath_prepend(tmp_path)
    [row] = [row for row in accelerations.table() if row.name == "gradient accumulation"]
    assert row.state == "missing" and "fails to import: undefined symbol: _ZN3c10" in row.reason


@pytest.mark.parametrize("library", accelerations.FUSED_ADAMS)
def test_fused_adams_get_decoupled_decay_full_state_and_no_empty_groups(
    monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    install(monkeypatch, accelerations.FUSED_ADAMS[library])
    weight = torch.zeros(3)
    optimizer: Any = fused_adam([{"params": [weight], "wd_mult": 1.0}, {"params": [], "wd_mult": 0.0}], library)
    initialize_state(optimizer)
    assert optimizer.adam_w_mode and all(group["bias_correction"] for group in optimizer.param_groups)
    assert set(optimizer.state[weight]) == {"exp_avg", "exp_avg_sq"}, "a step count would be taken for a moment"
    set_step_count(optimizer, 41)
    optimizer.step()
    assert weight.tolist() == [1.0] * 3
    assert [group["step"] for group in optimizer.param_groups] == [42, 41]
    assert [group["wd_mult"] for group in optimizer.param_groups] == [1.0, 0.0], "checkpoints want all groups"


def test_denoiser_fuses_gradient_accumulation_where_it_is_live(monkeypatch: pytest.MonkeyPatch) -> None:
    from megadiff.models.config import DenoiserConfig
    from megadiff.models.denoiser import transformer_config
    from megadiff.parallel.groups import ParallelConfig

    for live in (False, True):
        monkeypatch.setattr(accelerations, "fuses_gradient_accumulation", lambda live=live: live)
        config = transformer_config(DenoiserConfig(), ParallelConfig(), torch.bfloat16)
        assert config.gradient_accumulation_fusion is live
