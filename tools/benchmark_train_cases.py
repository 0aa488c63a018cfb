"""Which runs `benchmark_train.py` measures: shapes, layouts, and the configurations that they make.

Megatron-Core is imported where it is needed, so that help and errors come at once.
"""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from megadiff.config import TrainConfig

RECIPE = Path(__file__).parents[1] / "examples" / "recipes" / "quickstart.py"
CORPUS_TOKENS = 2_000_000
PRECISIONS = ("fp32", "bf16", "fp8", "fp8-emulated")

STEADY = (
    *("--optimizer.lr=1e-6", "--optimizer.decoupled-lr=none", "--optimizer.lr-warmup-steps=0"),
    "--optimizer.clip-grad=1e6",
)
"""Contenders share their weights: what one of them learns must not change what the others compute. And each takes the
gradient's norm, but none clips: it would scale all gradients once more where the loss happens to be steep."""

OURS: dict[str, tuple[Literal["masked", "uniform", "hybrid"], bool]] = {
    "masked": ("masked", False),
    "uniform": ("uniform", False),
    "hybrid": ("hybrid", False),
    "masked, fused head": ("masked", True),
    "hybrid, fused head": ("hybrid", True),
}
"""Noise of our steps, and whether output layer and loss are one, by name."""
BASELINE, FUSED_BASELINE = "cross-entropy", "cross-entropy, fused"
TRANSFORMER_ENGINE_BASELINE = "cross-entropy, Transformer Engine"
BASELINES = (BASELINE, FUSED_BASELINE, TRANSFORMER_ENGINE_BASELINE)
"""Megatron's loss in fp32 pieces, the same compiled (bf16 alone), and Transformer Engine's kernel (GPUs alone)."""
AUTOREGRESSIVE = "autoregressive"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Size of model and batch, as settings that replace the recipe's."""

    vocab_size: int
    settings: tuple[str, ...] = ()
    layout_settings: tuple[str, ...]
    """Of the layouts part: micro-batches that every layout can divide."""
    ours: tuple[str, ...] = tuple(OURS)
    """Which of our steps are measured."""


SHAPES = {
    "quickstart": Shape(vocab_size=2048, layout_settings=("--training.micro-batch-size=4",)),
    "large": Shape(
        vocab_size=32768,
        settings=(
            *("--model.hidden-size=512", "--model.num-layers=8", "--model.num-attention-heads=8"),
            *("--model.init-std=0.02", "--data.sequence-length=512"),
            *("--training.global-batch-size=2", "--training.micro-batch-size=2"),
        ),
        layout_settings=("--training.global-batch-size=8", "--training.micro-batch-size=1"),
    ),
}
GPU_MICRO_BATCH, GPU_MICRO_BATCHES = 4, 16
"""Samples of a micro-batch, as in the 3B recipes, and micro-batches of a step. One GPU updates alone what 64
share in a run, some 40 bytes a parameter: 25 ms and more, 3 % of 16 micro-batches of 57 ms and more at the peak."""
GPU_SHAPES = {
    name: Shape(
        vocab_size=131_072,
        settings=(
            *(f"--model.hidden-size={hidden_size}", f"--model.num-layers={num_layers}"),
            *(f"--model.num-attention-heads={hidden_size // 128}", "--model.init-std=0.02"),
            *("--data.sequence-length=2048", f"--training.micro-batch-size={GPU_MICRO_BATCH}"),
            f"--training.global-batch-size={GPU_MICRO_BATCH * GPU_MICRO_BATCHES}",
        ),
        layout_settings=("--training.micro-batch-size=1",),
        ours=ours,
    )
    # Kernels of uniform noise are those of hybrid; the recipes have the fused head.
    for name, hidden_size, num_layers, ours in (
        ("3b-layers", 3072, 6, ("masked", "hybrid", "masked, fused head", "hybrid, fused head")),
        ("10b-layers", 4608, 3, ("masked, fused head", "hybrid, fused head")),
    )
}
"""Some layers of a large model, as many as one GPU holds with their optimizer, between its embedding and its head."""
SHAPES |= GPU_SHAPES
SHAPES["7b-layers"] = Shape(
    vocab_size=100_278,
    settings=(
        *("--model.hidden-size=4096", "--model.num-layers=8", "--model.num-attention-heads=32"),
        *("--model.num-query-groups=8", "--model.activation=swiglu", "--model.ffn-hidden-size=11008"),
        *("--model.init-std=0.02", "--data.sequence-length=1184", "--training.micro-batch-size=8"),
        f"--training.global-batch-size={8 * GPU_MICRO_BATCHES}",
    ),
    layout_settings=("--training.micro-batch-size=1",),
    ours=("masked, fused head", "hybrid, fused head"),
)
"""8 of the 36 layers of Sumi (arXiv 2606.19005), whose training speed is published: near 9600 tokens/s per H100."""

LAYOUTS = {
    1: ("one", "full", "selective", "packing"),
    2: ("tp2", "tp2+sp", "cp2", "pp2", "pp2+vpp2", "dp2", "dp2+zero", "dp2+zero+overlap"),
    4: (
        *("tp4", "tp4+sp", "cp4", "pp4", "dp4", "dp4+zero", "dp4+zero+overlap"),
        *("tp2+cp2", "tp2+sp+cp2", "tp2+pp2", "tp2+sp+pp2+vpp2", "tp2+dp2", "tp2+sp+dp2+zero"),
        *("cp2+pp2", "cp2+pp2+vpp2", "cp2+dp2", "cp2+dp2+zero", "pp2+dp2", "pp2+vpp2+dp2+zero"),
    ),
}
"""What the layouts part measures, by number of processes."""
SIZES = {
    "tp": "--parallel.tensor-model-parallel-size",
    "cp": "--parallel.context-parallel-size",
    "pp": "--parallel.pipeline-model-parallel-size",
    "vpp": "--parallel.virtual-pipeline-model-parallel-size",
    "dp": None,  # what the processes leave over
}
WORDS: dict[str, tuple[str, ...]] = {
    "one": (),
    "sp": ("--parallel.sequence-parallel=true",),
    "zero": ("--parallel.use-distributed-optimizer=true",),
    "overlap": ("--parallel.overlap-grad-reduce=true", "--parallel.overlap-param-gather=true"),
    "full": ("--parallel.recompute-granularity=full",),
    "selective": ("--parallel.recompute-granularity=selective",),
    "packing": ("--data.reset-at-document=true",),
}


def fp8_recipe(settings: Sequence[str]) -> str:
    """Which recipe FP8 has in runs with these settings.

    Raises:
        ValueError: they are refused.
    """
    from megadiff.config import load_recipe

    return load_recipe(RECIPE).overridden(list(settings)).fp8.recipe


def parse_layout(layout: str) -> tuple[int, list[str]]:
    """Number of processes and settings of a layout.

    Raises:
        ValueError: a word is not known.
    """
    world_size, settings = 1, []
    for word in layout.split("+"):
        if sized := re.fullmatch(f"({'|'.join(SIZES)})([1-9][0-9]*)", word):
            name, size = sized.groups()
            world_size *= 1 if name == "vpp" else int(size)
            settings += [f"{SIZES[name]}={size}"] if SIZES[name] else []
        elif word in WORDS:
            settings += WORDS[word]
        else:
            raise ValueError(
                f"layout {layout} has the word {word!r}, but must be words joined by +, of "
                f"{', '.join(f'{name}N' for name in SIZES)}, {', '.join(WORDS)}"
            )
    return world_size, settings


@dataclass(frozen=True, kw_only=True)
class Case:
    """One shape in one precision: how to measure it, and what its results have in common."""

    shape: str
    precision: str
    arguments: argparse.Namespace
    corpora: Path
    """Folder for corpora of random tokens."""

    @property
    def vocab_size(self) -> int:
        """V of the random tokens."""
        return self.arguments.vocab_size or SHAPES[self.shape].vocab_size

    def config(self, world_size: int, *settings: str) -> TrainConfig:
        """The run of this case with further settings, checked.

        Raises:
            ValueError: they are refused.
        """
        from megadiff.config import load_recipe

        corpus = self.corpora / str(self.vocab_size)
        settings_of_shape = SHAPES[self.shape].settings
        first = [f"--data.path={corpus}", f"--training.precision={self.precision}", *STEADY, *settings_of_shape]
        config = load_recipe(RECIPE).overridden([*first, *settings, *self.arguments.settings])
        config.check(world_size)
        if config.data.path == str(corpus) and not corpus.exists():
            from benchmark_train_steps import write_corpus, zipf_tokens

            write_corpus(corpus, self.vocab_size, zipf_tokens(self.vocab_size, CORPUS_TOKENS))
        return config

    def step_run(self) -> TrainConfig:
        """The run whose steps are measured against cross-entropy; see `config`."""
        size = self.arguments.tensor_parallel
        return self.config(size, f"--parallel.tensor-model-parallel-size={size}")

    def layout_runs(self) -> dict[int, dict[str, TrainConfig]]:
        """The runs of the layouts part by number of processes and layout; see `config`."""
        arguments = self.arguments
        runs: dict[int, dict[str, TrainConfig]] = {}
        for layout in arguments.layout or itertools.chain.from_iterable(LAYOUTS[n] for n in arguments.processes):
            world_size, settings = parse_layout(layout)
            config = self.config(world_size, *SHAPES[self.shape].layout_settings, *settings)
            runs.setdefault(world_size, {})[layout] = config
        return dict(sorted(runs.items()))

    def profile_run(self) -> TrainConfig:
        """The run whose steps are profiled; see `config`."""
        return self.config(1)

    def record(self, **values: object) -> dict[str, Any]:
        """A line of results: what the lines of a case share, and these values."""
        return {"shape": self.shape, "precision": self.precision, "threads": self.arguments.threads, **values}
