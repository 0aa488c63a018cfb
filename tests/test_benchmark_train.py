"""The training benchmark on a tiny model: every contender, layouts over two processes, and a profile that adds up."""

from __future__ import annotations

import csv
import importlib
import itertools
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from distributed import run_ranks
from tiny import tiny_config
from torch.nn.functional import cross_entropy

from megadiff import planning
from megadiff.config import load_recipe

TOOL = Path(__file__).parents[1] / "tools" / "benchmark_train.py"
TINY = (
    *("--shape", "quickstart", "--vocab-size", "300", "--rounds", "2", "--warm-up", "1"),
    *("--model.num-layers=1", "--model.hidden-size=32", "--data.sequence-length=16"),
    *("--training.global-batch-size=4", "--training.micro-batch-size=2"),
)
MODEL_PARTS = ("embedding", "attention, projections", "attention, core", "feed-forward", "norms", "output layer")


def losses_of_plain_steps(corpus: Path, precision: str) -> list[dict[str, Any]]:
    """What every cross-entropy reports of a step, and what torch says of the same tokens and logits."""
    sys.path.insert(0, str(TOOL.parent))
    from benchmark_train_cases import AUTOREGRESSIVE
    from benchmark_train_steps import contenders, step_of

    from megadiff.diffusion import AttentionLayout
    from megadiff.parallel import groups as parallel_groups
    from megadiff.training.trainer import Trainer

    config = tiny_config(corpus, training={"precision": precision})
    found = []
    with parallel_groups.joined(config.parallel) as groups:
        for name in contenders(config, ()):
            kind, shift = ("causal", 1) if name == AUTOREGRESSIVE else ("bidirectional", 0)
            trainer = Trainer(config, Path("unused"), groups)
            trainer.step = step_of(name, config, trainer)
            tokens_BL = torch.cat([b.tokens_BL for b in itertools.islice(trainer.training_batches(), 4)])
            length = tokens_BL.shape[1]
            with torch.no_grad():
                logits_SBW = trainer.denoisers[0](
                    tokens_BL, torch.arange(length).expand_as(tokens_BL), AttentionLayout(kind)
                )
            expected = cross_entropy(
                logits_SBW[: length - shift].float().transpose(0, 1).flatten(0, 1), tokens_BL[:, shift:].flatten()
            )
            line = trainer.train_step(trainer.training_batches())
            tokens = line["tokens_per_second"] * line["step_time"]
            said = {"name": name, "loss": line["loss"], "grad_norm": line["grad_norm"], "tokens": tokens}
            found.append({**said, "expected": expected.item(), "shift": shift})
    return found


@pytest.mark.parametrize(
    ("precision", "names"),
    [
        ("fp32", ["cross-entropy", "autoregressive"]),
        ("bf16", ["cross-entropy", "cross-entropy, fused", "autoregressive"]),
    ],
)
def test_plain_steps_train_cross_entropy_of_clean_tokens(corpus_dir: Path, precision: str, names: list[str]) -> None:
    """Losses: one fp32 sum in two orders. Gradients of two implementations: rounded to bf16 once each."""
    [found] = run_ranks(1, losses_of_plain_steps, corpus_dir, precision)
    assert [step["name"] for step in found] == names
    norms = [step["grad_norm"] for step in found if step["shift"] == 0]
    assert norms == pytest.approx([norms[0]] * len(norms), rel=2**-8)
    for step in found:
        assert step["loss"] == pytest.approx(step["expected"], rel=1e-6)
        assert step["tokens"] == pytest.approx(8 * (32 - step["shift"]))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, str]]]:
    """Lines of all three parts by name, as they are written."""
    folder = tmp_path_factory.mktemp("results")
    command = [sys.executable, str(TOOL), *TINY, "--layout", "tp2+sp", "dp2+zero", "--output-dir", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    [page] = folder.glob("*-train.md")
    assert page.read_text().strip() == done.stdout.strip()
    return {path.stem.rpartition("-")[2]: list(csv.DictReader(path.open())) for path in folder.glob("*.csv")}


def test_every_contender_is_timed_against_cross_entropy(results: dict[str, list[dict[str, str]]]) -> None:
    lines = {line["contender"]: line for line in results["step"]}
    ours = {"masked", "uniform", "hybrid", "masked, fused head", "hybrid, fused head"}
    assert set(lines) == ours | {"cross-entropy", "autoregressive"}
    assert lines["cross-entropy"]["ratio"] == lines["cross-entropy"]["cpu_ratio"] == "1.000"
    for line in lines.values():
        tokens = float(line["tokens_per_s"]) * float(line["step_ms"]) / 1e3
        assert abs(tokens - 4 * 16) < 0.05 * 64  # both are rounded
        assert float(line["cpu_ms"]) > 0
        passes, optimizer = float(line["passes_ms"]), float(line["optimizer_ms"])
        assert passes > 0 and optimizer > 0 and passes < float(line["step_ms"])
    assert min(float(line["ratio"]) for name, line in lines.items() if name.startswith("cross-entropy")) == 1.0


def test_layouts_are_measured_over_their_processes(results: dict[str, list[dict[str, str]]]) -> None:
    assert [(line["layout"], line["processes"]) for line in results["layouts"]] == [("tp2+sp", "2"), ("dp2+zero", "2")]
    assert all(float(line["tokens_per_s"]) > 0 and 0 <= float(line["waiting"]) < 1 for line in results["layouts"])
    assert {line["to_one_process"] for line in results["layouts"]} == {""}  # which was not asked for


def test_shapes_for_gpus_have_the_widths_of_the_large_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(TOOL.parent)
    cases = importlib.import_module("benchmark_train_cases")
    for name, shape in cases.GPU_SHAPES.items():
        recipe = load_recipe(TOOL.parents[1] / "examples" / "recipes" / f"gidd_{name.split('-')[0]}_masked.py")
        config = load_recipe(cases.RECIPE).overridden(list(shape.settings))
        config.check(1)
        for field in ("hidden_size", "num_attention_heads", "ffn_size"):
            assert getattr(config.model, field) == getattr(recipe.model, field)
        assert config.data.sequence_length == recipe.data.sequence_length
        # What the documents say: logits and their softmax in fp32, as the unfused cross-entropy has them, come on top.
        fp8 = ["--training.precision=fp8", "--model.transformer-impl=transformer_engine"]
        bf16, in_fp8, with_logits = (
            planning.plan(config.overridden(settings), 1, shape.vocab_size).worst.peak / planning.GIB
            for settings in (
                ["--training.precision=bf16", "--model.fused-head-loss=true"],
                [*fp8, "--model.fused-head-loss=true"],
                fp8,
            )
        )
        assert f"{bf16:.1f}, {in_fp8:.1f} |" in (TOOL.parents[1] / "docs" / "benchmarks" / "README.md").read_text()
        fp32_logits = 4 * config.training.micro_batch_size * config.data.sequence_length * shape.vocab_size
        assert with_logits + 2 * fp32_logits / planning.GIB < 53
        assert config.training.global_batch_size == 16 * config.training.micro_batch_size


@pytest.mark.parametrize(
    ("lacking", "precisions"), [({}, ["bf16", "fp8"]), ({"tensorwise": "compute capability 8.0, below 8.9"}, ["bf16"])]
)
def test_a_gpu_is_measured_in_fp8_where_it_can(
    monkeypatch: pytest.MonkeyPatch, lacking: dict[str, str], precisions: list[str]
) -> None:
    monkeypatch.syspath_prepend(TOOL.parent)
    tool = importlib.import_module(TOOL.stem)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tool, "why_no_figures", lambda: "")
    monkeypatch.setattr(tool, "why_no_fp8", lambda recipe: lacking.get(recipe, ""))
    arguments = tool.parse_arguments(["--gpu"])
    assert arguments.precision == precisions and arguments.shape == ["3b-layers", "10b-layers"]
    assert (arguments.part, arguments.rounds, arguments.warm_up) == (["step"], 3, 20.0)
    assert tool.parse_arguments(["--gpu", "--fp8.recipe=delayed"]).precision == ["bf16", "fp8"]


def test_figures_of_eager_kernels_are_refused_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    """In one sentence: the warning of the kernels themselves is part of it."""
    monkeypatch.syspath_prepend(TOOL.parent)
    tool = importlib.import_module(TOOL.stem)
    machine = importlib.import_module("benchmark_train_machine")

    def state(device: str) -> str:
        warnings.warn("not live", stacklevel=1)
        return "eager: MEGADIFF_KERNELS asks for it"

    monkeypatch.setattr(machine._library, "state", state)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert tool.main(["--gpu"]) == 2
    assert capsys.readouterr().err == (
        "error: --gpu is given, but megadiff's CUDA kernels are not live (eager: MEGADIFF_KERNELS asks for it): build "
        "them, and leave MEGADIFF_KERNELS unset\n"
    )
    assert not [warning for warning in recwarn if "not live" in str(warning.message)]


def test_clocks_are_those_that_nvidia_smi_says_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for it that answers at once, and one that is not there."""
    monkeypatch.syspath_prepend(TOOL.parent)
    machine = importlib.import_module("benchmark_train_machine")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid="0"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with machine.Clocks() as clocks:
        pass
    assert clocks.medians == {"sm_clock_mhz": "", "power_w": "", "temperature_c": ""}
    assert machine._nvidia_smi(["driver_version"]) == []
    (tmp_path / "nvidia-smi").write_text(
        "#!/bin/sh\n"
        'case "$*" in *loop*) printf "1980, 690.5, [N/A]\\n1755, 700.1, [N/A]\\n1755, 699.0, [N/A]\\n17";'
        f" : > {tmp_path}/said; exec /bin/sleep 60;; *) echo 570.1;; esac\n"
    )
    (tmp_path / "nvidia-smi").chmod(0o755)
    with machine.Clocks() as clocks:
        while not (tmp_path / "said").exists():
            time.sleep(0.01)
    assert clocks.medians == {"sm_clock_mhz": "1755", "power_w": "699", "temperature_c": ""}
    assert machine._nvidia_smi(["driver_version"]) == [["570.1"]]


def test_rows_say_which_fp8_they_are_of(tmp_path: Path) -> None:
    once = ("--part", "step", "--precision", "fp8-emulated", "--rounds", "1", "--warm-up", "0")
    command = [sys.executable, str(TOOL), *TINY, *once, "--output-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "quickstart, fp8-emulated" in done.stdout
    [path] = tmp_path.glob("*-step.csv")
    lines = list(csv.DictReader(path.open()))
    assert {(line["precision"], line["fp8_recipe"], line["layers"]) for line in lines} == {
        ("fp8-emulated", "tensorwise", "local")
    }
    assert "cross-entropy, fused" in {line["contender"] for line in lines}
    said = {"attention": "local", "optimizer": "AdamW by torch", "gradient_accumulation": "torch"}
    assert all(line[name] == value for line in lines for name, value in said.items())
    assert all(line["torch"] and line["megatron_core"] and line["sources"] and line["kernels"] for line in lines)
    assert "layers local, fp8 recipe tensorwise, attention local, optimizer AdamW by torch" in done.stdout


@pytest.mark.parametrize("column", ["hybrid_ms", "cross_entropy_ms"])
def test_parts_of_a_profile_add_up_to_the_step(results: dict[str, list[dict[str, str]]], column: str) -> None:
    """The loop has its own clock, which runs within the recorded range: 5 % are for what lies between the two."""
    *parts, step = [(line["part"], float(line[column])) for line in results["profile"]]
    assert step[0] == "step" and abs(sum(time for _, time in parts) - step[1]) < 0.05 * step[1]
    times = dict(parts)
    for part in MODEL_PARTS:
        assert times[f"{part}, forward"] > 0 and times[f"{part}, backward"] > 0, part
    for part in ("loss, forward", "loss, backward", "adding gradients up", "Adam", "gradient norm and clipping"):
        assert times[part] > 0, part


def test_kernels_of_backward_belong_to_the_part_that_made_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where backward has a thread of its own; events with the fields that torch's profiler gives them."""
    monkeypatch.syspath_prepend(TOOL.parent)
    tool = importlib.import_module("benchmark_train_profile")
    monkeypatch.setattr(tool, "ON_GPU", True)

    def event(name: str, start: int, thread: int, *kernels: float, number: int = -1, **more: Any) -> SimpleNamespace:
        launched = [SimpleNamespace(name="gemm", duration=microseconds) for microseconds in kernels]
        fields = {"cpu_children": [], "cpu_parent": None, "is_async": False, "device_type": tool.DeviceType.CPU, **more}
        time_range = SimpleNamespace(start=start, end=start + 10)
        return SimpleNamespace(
            name=name, thread=thread, kernels=launched, sequence_nr=number, time_range=time_range, **fields
        )

    product = event("aten::mm", 2, 1, 3e6, number=7)
    forward = event("benchmark: feed-forward", 1, 1, cpu_children=[product])
    step = event("benchmark: step", 0, 1, cpu_children=[forward])
    step.time_range.end = 100
    backward = event(f"{tool._NODE}MmBackward0", 50, 2, 5e6, number=7)
    after = event(f"{tool._NODE}MmBackward0", 200, 2, 9e6, number=7)
    seconds = tool._attribute(step, [step, forward, product, backward, after])
    assert seconds["feed-forward", "forward"] == 3.0 and seconds["feed-forward", "backward"] == 5.0
    assert sum(seconds.values()) == 8.0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--layout", "tp2+fast"), "layout tp2+fast has the word 'fast', but must be words joined by +"),
        (("--rounds", "0"), "--rounds is 0, but must be at least 1"),
        (("--vocab-size", "4"), "--vocab-size is 4, but must be at least 8"),
        (("--part", "steps"), "argument --part: invalid choice: 'steps'"),
        pytest.param(
            *(("--gpu",), "--gpu is given, but torch sees no CUDA device"),
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
        (("--part", "profile", "--model.num-layerz", "2"), "unknown option --model.num-layerz"),
    ],
)
def test_wrong_input_is_refused_in_one_sentence(
    arguments: tuple[str, ...], sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(TOOL.parent)
    assert importlib.import_module(TOOL.stem).main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and sentence in err and len(err.splitlines()) == 1
