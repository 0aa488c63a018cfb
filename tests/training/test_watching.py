"""What is watched of a run: parts of the bound, noise levels, groups of gradients, texts; and where it is shown."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_ranks
from tiny import tiny_config

from megadiff.devices import peak_tflops
from megadiff.diffusion import Rows
from megadiff.objectives import AutoregressiveConfig, EsoLmConfig, GiddConfig
from megadiff.training.observed import LEVEL_EDGES, LEVEL_NAMES, NUM_LEVELS, NUM_SUMS, Observed, observed_sums
from megadiff.training.sinks import Prometheus, WandB, WatchConfig


def rows_of(counted: torch.Tensor, weight: torch.Tensor) -> Rows:
    zero = torch.zeros_like(weight)
    return Rows(
        target=torch.zeros_like(counted, dtype=torch.int64),
        noised=torch.zeros_like(counted, dtype=torch.int64),
        alpha=zero,
        uniform_mass=zero,
        kl_weight=weight,
        is_weight=weight,
        elbo_weight=weight,
        counted=counted,
        any_uniform_mass=True,
    )


def test_sums_are_those_of_a_plain_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    counted = torch.rand(200, generator=generator) < 0.7
    weight, kl, is_ = (torch.rand(200, generator=generator) for _ in range(3))
    kl[~counted] = math.nan  # rows that do not count may hold anything
    log_snr = 9 * (2 * torch.rand(200, generator=generator, dtype=torch.float64) - 1)
    found = Observed.of(observed_sums(torch.tensor(3.0), rows_of(counted, weight), kl, is_, log_snr).tolist())
    nelbo, tokens = [0.0] * NUM_LEVELS, [0.0] * NUM_LEVELS
    for i in counted.nonzero().flatten().tolist():
        level = sum(log_snr[i].item() > edge for edge in LEVEL_EDGES)
        nelbo[level] += (weight[i] * (kl[i] + is_[i])).item()
        tokens[level] += 1
    assert found.level_tokens == tuple(tokens) and min(tokens) > 0
    assert found.level_nelbo == pytest.approx(nelbo, rel=1e-5)
    assert (found.loss, found.num_tokens) == (3.0, sum(tokens))
    assert found.kl + found.is_ == pytest.approx(found.nelbo) == pytest.approx(sum(nelbo), rel=1e-5)
    assert found.scalars[f"bound_by_log_snr/{LEVEL_NAMES[4]}"] == pytest.approx(nelbo[4] / tokens[4], rel=1e-5)
    twice = found + found
    assert twice.scalars == pytest.approx(found.scalars) and twice.num_tokens == 2 * found.num_tokens
    without = observed_sums(torch.tensor(3.0), rows_of(counted, weight), kl, is_, None)
    assert without.shape == (NUM_SUMS,) and not without[5:].any()


def watch(corpus: Path, folder: Path, parallel: dict[str, Any], objective: Any) -> dict[str, Any]:
    """Three steps and a validation; what TensorBoard holds, on rank 0, and the norms of groups beside the whole."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from megadiff.parallel import groups as parallel_groups
    from megadiff.training.loop import run
    from megadiff.training.trainer import Trainer

    config = tiny_config(
        corpus,
        objective=objective,
        model={"num_layers": 4},
        parallel=parallel,
        training={"train_steps": 3, "log_interval": 2},
        checkpoint={"interval": 0},
        watch={"num_texts": 2, "text_length": 16, "text_steps": 8, "text_prompt": "def "},
    )
    groups = parallel_groups.initialize(config.parallel)
    trainer = Trainer(config, folder, groups)
    folder.mkdir(exist_ok=True)
    run(trainer)
    rank = groups.rank
    parallel_groups.shutdown()
    if rank != 0:
        return {}
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    texts = {tag: events.Tensors(tag)[-1].tensor_proto.string_val[0].decode() for tag in tags["tensors"]}
    numbers = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags["scalars"]}
    return {"texts": texts, "numbers": numbers, "norms": trainer.grad_norms}


LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "distributed optimizer": {
        "use_distributed_optimizer": True,
        "overlap_grad_reduce": True,
        "overlap_param_gather": True,
    },
    "context": {"context_parallel_size": 2},
    "pipeline": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
}


OBJECTIVES = (
    GiddConfig(independent_level_fraction=0.5),  # levels of tokens, which context parallelism has to divide with them
    EsoLmConfig(),
    AutoregressiveConfig(),
)


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: o.name)
def test_every_layout_shows_the_same(corpus_dir: Path, tmp_path: Path, objective: Any) -> None:
    [alone] = run_ranks(1, watch, corpus_dir, tmp_path / "alone", {}, objective)
    numbers = alone["numbers"]
    steps = [step for step, _ in numbers["train/loss"]]
    assert steps == [1, 2, 3] and [step for step, _ in numbers["validation/nelbo"]] == [3]
    assert {"device/memory_gib", "bound/kl", "bound/is"} <= set(numbers) and "device/mfu" not in numbers
    assert any(name.startswith("bound_by_log_snr/") for name in numbers) == (objective.name == "gidd")
    norms = alone["norms"]
    assert set(norms) == {"inner", "gains", "outer"}
    whole = numbers["train/grad_norm"][-1][1]
    assert math.sqrt(sum(norm**2 for norm in norms.values())) == pytest.approx(whole, rel=1e-5)
    assert alone["texts"]["text/samples/text_summary"].count("    def ") == 2
    assert "**call 1**" in alone["texts"]["text/denoising/text_summary"]

    for name, parallel in LAYOUTS.items():
        found = run_ranks(2, watch, corpus_dir, tmp_path / name, parallel, objective)[0]
        assert set(found["numbers"]) - set(numbers) <= {"device/slowest_rank", "device/straggler_ratio"}
        assert found["norms"] == pytest.approx(norms, rel=1e-4), name
        bounds = {tag for tag in numbers if tag.startswith(("bound/", "bound_by_log_snr/"))}
        assert bounds == {tag for tag in found["numbers"] if tag.startswith("bound")}, name
        for tag in bounds:
            (steps, values), (alone_at, expected) = (zip(*of[tag], strict=True) for of in (found["numbers"], numbers))
            assert steps == alone_at and values == pytest.approx(expected, rel=1e-4), (name, tag)
        assert found["texts"] == alone["texts"], name


def test_prometheus_reads_the_newest_numbers(tmp_path: Path) -> None:
    path = tmp_path / "run.prom"
    sink = Prometheus(path, "a run")
    sink.numbers(1, {"train/loss": 2.0})
    sink.numbers(2, {"train/loss": 1.5, "bound_by_log_snr/4 -1 to +1": 3.0})
    lines = path.read_text().splitlines()
    assert 'megadiff_train_loss{run="a run"} 1.5' in lines and 'megadiff_step{run="a run"} 2.0' in lines
    assert 'megadiff_bound_by_log_snr_4__1_to__1{run="a run"} 3.0' in lines


def test_weights_and_biases_go_on_with_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A stand-in: what it is asked for."""
    import sys
    import types

    calls: list[Any] = []

    class Run:
        def log(self, numbers: dict[str, Any], step: int) -> None:
            calls.append((step, numbers))

        def finish(self) -> None:
            calls.append("finish")

    def init(**settings: Any) -> Run:
        calls.append(settings)
        return Run()

    module = types.SimpleNamespace(init=init, Html=lambda text: f"html {text}")
    monkeypatch.setitem(sys.modules, "wandb", module)  # type: ignore[arg-type]
    sink = WandB(tmp_path / "my-run", "noise", {"seed": 1})
    sink.numbers(3, {"train/loss": 2.0})
    sink.text(3, "text/samples", "    a < b")
    sink.close()
    assert calls[0] == {
        "project": "noise",
        "name": "my-run",
        "id": "my-run",
        "resume": "allow",
        "dir": str(tmp_path / "my-run"),
        "config": {"seed": 1},
    }
    assert calls[1:] == [(3, {"train/loss": 2.0}), (3, {"text/samples": "html <pre>    a &lt; b</pre>"}), "finish"]


def test_what_is_not_installed_is_refused_before_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("megadiff.training.sinks.importlib.util.find_spec", lambda _: None)
    config = tiny_config(tmp_path, watch={"wandb_project": "noise"})
    with pytest.raises(ValueError, match=r"watch.wandb_project is noise, but wandb is not installed: pip install"):
        config.check(1)
    with pytest.raises(ValueError, match=r"watch.prometheus_file is run.txt, but node exporters read names .* \.prom"):
        WatchConfig(prometheus_file="run.txt")
    with pytest.raises(ValueError, match=r"watch.text_steps is 0, but must be at least 1"):
        dataclasses.replace(WatchConfig(), text_steps=0)


def test_peaks_are_known_by_the_names_of_devices() -> None:
    assert peak_tflops("NVIDIA H100 80GB HBM3") == 989.4 and peak_tflops("NVIDIA H100 PCIe") == 756.0
    assert peak_tflops("a toaster") is None
