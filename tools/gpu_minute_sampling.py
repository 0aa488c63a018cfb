"""How fast samplers write, and what masks cost: part e of tools/gpu_minute.sh.

    python tools/gpu_minute_sampling.py --output DIR

sampling.csv    tokens per second of each objective's sampler, by a model of 85 M random weights, whose work is that of
                any weights
attention.csv   forward and backward of one layer's attention under each kind of mask by FlexAttention, beside torch's
                own kernel without a mask over the same sequence; the time to make such a mask, once for all layers; and
                the graphs that torch.compile makes for five further masks of a kind, of other documents: none

On a CPU sizes are toys, and masks are dense: FlexAttention has no backward there.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from benchmark_ops import synchronize
from torch._dynamo.utils import counters

from megadiff.diffusion.layout import AttentionLayout, document_numbers
from megadiff.evaluation.generate import GenerateConfig, generate
from megadiff.models.attention import CoreAttention
from megadiff.models.config import DenoiserConfig
from megadiff.models.denoiser import build_denoiser
from megadiff.models.whole import undivided
from megadiff.objectives import (
    AutoregressiveConfig,
    BlockDiffusionConfig,
    EsoLmConfig,
    GiddConfig,
    ObjectiveConfig,
    Vocabulary,
)
from megadiff.parallel import groups as parallel_groups
from megadiff.parallel.groups import ParallelConfig

ON_GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if ON_GPU else ("cpu", torch.float32)
VOCABULARY = Vocabulary(size=32_768 if ON_GPU else 300, bos_id=0, eos_id=1, pad_id=2, mask_id=3)
MODEL = (
    DenoiserConfig(num_layers=12, hidden_size=768, num_attention_heads=12)
    if ON_GPU
    else DenoiserConfig(num_layers=1, hidden_size=32, num_attention_heads=4)
)
CANVAS = GenerateConfig(length=1024, num_denoising_steps=64, num_samples=16)
if not ON_GPU:
    CANVAS = GenerateConfig(length=16, num_denoising_steps=4, num_samples=2)
SAMPLERS: dict[str, ObjectiveConfig] = {
    "gidd, hybrid": GiddConfig(noise="hybrid", shift=0.0),
    "block diffusion": BlockDiffusionConfig(block_size=16 if ON_GPU else 4),
    "eso_lm": EsoLmConfig(),
    "autoregressive": AutoregressiveConfig(),
}
Record = dict[str, Any]


def timed(run: Callable[[], object]) -> float:
    """Seconds of a call, with all that the device has to do for it."""
    synchronize(DEVICE)
    started = time.perf_counter()
    run()
    synchronize(DEVICE)
    return time.perf_counter() - started


class Speechless:
    """In place of a tokenizer: no prompt is read, and nothing is made of the ids."""

    bos_id, eos_id, pad_id, unk_id = VOCABULARY.bos_id, VOCABULARY.eos_id, VOCABULARY.pad_id, VOCABULARY.pad_id

    def encode(self, text: str) -> list[int]:
        return []

    def decode(self, ids: list[int]) -> str:
        return ""


def measure_samplers() -> Iterator[Record]:
    """Tokens per second, and those per second of one sample."""
    with parallel_groups.joined(ParallelConfig()) as groups:
        denoisers = build_denoiser(
            MODEL, groups, vocab_size=VOCABULARY.size, sequence_length=CANVAS.length, seed=0, dtype=DTYPE
        )
        model = undivided(MODEL, denoisers, groups, vocab_size=VOCABULARY.size)
        for name, objective in SAMPLERS.items():
            tokenizer: Any = Speechless()

            write = partial(generate, CANVAS, model, objective, VOCABULARY, tokenizer)
            write()  # compiles, and chooses kernels
            seconds = timed(write)
            speed = CANVAS.num_samples * CANVAS.length / seconds
            yield {
                "sampler": name,
                "samples": CANVAS.num_samples,
                "length": CANVAS.length,
                "steps": CANVAS.num_denoising_steps,
                "seconds": f"{seconds:.3f}",
                "tokens_per_s": f"{speed:.0f}",
                "tokens_per_s_of_one": f"{speed / CANVAS.num_samples:.1f}",
            }


def masks(length: int, seed: int) -> dict[str, AttentionLayout]:
    """One layout of every kind that objectives ask for, over sequences of `length`; `seed` draws other documents."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(100, (2, length), generator=generator).to(DEVICE)
    documents, places = document_numbers(tokens, end_id=2), torch.arange(length, device=DEVICE)
    whole: Any = {"query_Q": places, "key_K": places}
    return {
        "none": AttentionLayout(),
        "causal": AttentionLayout("causal"),
        "documents": AttentionLayout("bidirectional", documents),
        "causal documents": AttentionLayout("causal", documents),
        "block diffusion, blocks of 16": AttentionLayout("block_diffusion", block_size=16, **whole),
        "block diffusion, blocks of 128": AttentionLayout("block_diffusion", block_size=128, **whole),
    }


def measure_attention() -> Iterator[Record]:
    """Milliseconds of one layer, two sequences of 4096 places and 12 heads of 64, each mask with new documents."""
    length, heads, head_size = (4096, 12, 64) if ON_GPU else (64, 2, 8)
    config: Any = SimpleNamespace(context_parallel_size=1)
    attention = CoreAttention(config, 1)
    inputs = [torch.randn(length, 2, heads, head_size, device=DEVICE, dtype=DTYPE, requires_grad=True) for _ in "qkv"]

    def both_ways(layout: AttentionLayout) -> None:
        output = attention(*inputs, None, attention_bias=layout)
        torch.autograd.grad(output.sum(), inputs)

    layouts = [masks(length, seed) for seed in range(6)]
    for name in layouts[0]:
        both_ways(layouts[0][name])
        before = counters["stats"]["unique_graphs"]
        making, times = 0.0, []
        for of_kind in (by_kind[name] for by_kind in layouts[1:]):
            if ON_GPU and not of_kind.is_plain:
                making = timed(lambda layout=of_kind: layout.block_mask)  # type: ignore[misc]
            times.append(timed(partial(both_ways, of_kind)))
        yield {
            "mask": name,
            "length": length,
            "ms": f"{1e3 * statistics.median(times):.3f}",
            "mask_ms": f"{1e3 * making:.3f}",
            "graphs_compiled": counters["stats"]["unique_graphs"] - before,
        }


def write(path: Path, records: Iterable[Record]) -> None:
    """Write each line as it comes: a stop loses none."""
    with path.open("w", newline="") as file:
        writer: csv.DictWriter[str] | None = None
        for record in records:
            if writer is None:
                writer = csv.DictWriter(file, list(record), lineterminator="\n")
                writer.writeheader()
            writer.writerow(record)
            file.flush()
            print(record, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the two files")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    write(arguments.output / "attention.csv", measure_attention())
    write(arguments.output / "sampling.csv", measure_samplers())


if __name__ == "__main__":
    main()
