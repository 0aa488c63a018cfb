"""Layouts of the ten-billion recipes, as data: the tables of docs/ten_billion.md.

python tests/ten_billion.py      print them
"""

from __future__ import annotations

from pathlib import Path

from megadiff.config import TrainConfig, load_recipe
from megadiff.pace import (
    H100_TFLOPS,
    SAVING_STEPS,
    accumulated_bytes,
    bubble,
    exchanged_bytes,
    pace,
    step_costs,
)
from megadiff.planning import GIB, Plan, plan

FOLDER = Path(__file__).parents[1] / "examples" / "recipes"
RECIPES = [FOLDER / "gidd_10b_masked.py", FOLDER / "gidd_10b_uniform.py"]
VOCAB = 131_072
MFU = 0.4
RESERVE_GIB = 15
"""Of 80: for the CUDA context, NCCL's buffers, cuBLAS workspaces and what the allocator cannot use."""
WORLD_SIZES = (64, 128, 256, 512)


def divided(*, tensor: int = 1, pipeline: int = 1, virtual: int = 1, at_once: int = 1) -> str:
    """Settings of another layout, added to the recipe."""
    return " ".join(
        (
            f"--parallel.tensor-model-parallel-size {tensor}",
            f"--parallel.sequence-parallel {'true' if tensor > 1 else 'false'}",
            f"--parallel.pipeline-model-parallel-size {pipeline}",
            f"--parallel.virtual-pipeline-model-parallel-size {virtual if virtual > 1 else 'none'}",
            f"--parallel.num-layers-in-first-pipeline-stage {18 if pipeline > 1 else 'none'}",
            f"--training.micro-batch-size {at_once}",
        )
    )


DIVIDED_LAYERS = divided(pipeline=2, virtual=2)
ALTERNATIVES = {
    "a copy on each GPU": divided(),
    "the same, full recompute": f"{divided(at_once=3)} --parallel.recompute-granularity full",
    "layers by two": DIVIDED_LAYERS,
    "matrices by two": divided(tensor=2, at_once=3),
    "matrices by four": divided(tensor=4, at_once=6),
    "both by two, one at once": divided(tensor=2, pipeline=2, virtual=2, at_once=1),
    "both by two, two at once": divided(tensor=2, pipeline=2, virtual=2, at_once=2),
    "both by two, three at once (the recipe)": "",
    "the same, no virtual stages": divided(tensor=2, pipeline=2, at_once=3),
}
"""What else the GPUs could do, as settings added to the recipe."""


def layout(config: TrainConfig, world_size: int) -> str:
    """In words: tp2 sp · pp2 vpp2 (18 + 16 layers) · dp128, 2 samples at once."""
    parallel = config.parallel
    tensor = f"tp{parallel.tensor_model_parallel_size} sp · " if parallel.sequence_parallel else ""
    layers = " + ".join(map(str, config.model.layers_per_stage(parallel)))
    virtual = f" vpp{parallel.num_virtual_stages}" if parallel.num_virtual_stages > 1 else ""
    stages = parallel.pipeline_model_parallel_size
    pipeline = f"pp{stages}{virtual} ({layers}) · " if stages > 1 else ""
    data = f"dp{parallel.data_parallel_size(world_size)}, {config.training.micro_batch_size} at once"
    return tensor + pipeline + data


def memory_and_traffic(config: TrainConfig, planned: Plan, world_size: int) -> list[str]:
    """GiB per rank by stage, bubble, GB exchanged by a rank of the first stage, GB moved to add a micro-batch's up."""
    first = planned.stages[0]
    exchanged = exchanged_bytes(first, config.parallel.data_parallel_size(world_size))
    costs = step_costs(config, planned, world_size)
    added = f"{accumulated_bytes(first) / 1e9:.1f} ({100 * costs.accumulation / costs.products:.0f} %)"
    return [
        " / ".join(f"{stage.peak / GIB:.1f}" for stage in planned.stages),
        added,
        f"{100 * bubble(config, world_size):.1f} %",
        f"{exchanged / 1e9:.1f}",
    ]


def table() -> str:
    """A row of each world size; raises AssertionError where a layout leaves less than the reserve."""
    lines = [
        f"| GPUs | layout | GiB per rank, by stage | GB per micro-batch to add gradients | bubble | GB exchanged "
        f"| FLOPs per step | s per step | tokens/s | days | checkpoint GiB "
        f"| GB/s to hide it behind {SAVING_STEPS} steps |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    config = load_recipe(RECIPES[0])
    for world_size in WORLD_SIZES:
        planned = plan(config, world_size, VOCAB)
        assert planned.worst.peak <= (80 - RESERVE_GIB) * GIB
        run = pace(planned, world_size, mfu=MFU, device_tflops=H100_TFLOPS)
        cells = [
            world_size,
            layout(config, world_size),
            *memory_and_traffic(config, planned, world_size),
            f"{run.step_flops:.3e}",
            f"{run.step_seconds:.2f}",
            f"{run.tokens_per_second:,.0f}",
            f"{run.days:.2f}",
            f"{planned.checkpoint_bytes / GIB:.1f}",
            f"{run.saving_bytes_per_second / 1e9:.2f}",
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def alternatives() -> str:
    """A row of each layout that 256 GPUs could also have."""
    lines = [
        "| | layout | GiB per rank, by stage | GB per micro-batch to add gradients | bubble | GB exchanged |",
        "|---|---|---|---|---|---|",
    ]
    for name, settings in ALTERNATIVES.items():
        config = load_recipe(RECIPES[0]).overridden(settings.split())
        cells = memory_and_traffic(config, plan(config, 256, VOCAB), 256)
        lines.append(f"| {name} | {layout(config, 256)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def sums() -> str:
    """A row of each of these layouts: its costs on 256 GPUs, and their sum on each number of GPUs."""
    names = ("products", "accumulation", "tensor_parallel", "bubble", "gradients")
    titles = ("products", "adding gradients", "between tensor ranks", "bubble", "sharing gradients")
    totals = [f"sum, {world_size} GPUs" for world_size in WORLD_SIZES]
    lines = [f"| s per step | {' | '.join((*titles, *totals))} |", "|---" * (1 + len(titles) + len(totals)) + "|"]
    for name, settings in ALTERNATIVES.items():
        config = load_recipe(RECIPES[0]).overridden(settings.split())
        costs = {size: step_costs(config, plan(config, size, VOCAB), size) for size in WORLD_SIZES}
        cells = [f"{getattr(costs[256], cost):.2f}" for cost in names]
        cells += [f"{costs[size].total:.2f}" for size in WORLD_SIZES]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(), alternatives(), sums(), sep="\n\n")
