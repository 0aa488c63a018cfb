"""Layouts of the ten-billion recipes, as data: the tables of docs/ten_billion.md.

python tests/ten_billion.py      print them
"""

from __future__ import annotations

from pathlib import Path

from megadiff.config import TrainConfig, load_recipe
from megadiff.pace import H100_TFLOPS, SAVING_STEPS, bubble, exchanged_bytes, pace
from megadiff.planning import GIB, plan

FOLDER = Path(__file__).parents[1] / "examples" / "recipes"
RECIPES = [FOLDER / "gidd_10b_masked.py", FOLDER / "gidd_10b_uniform.py"]
VOCAB = 131_072
MFU = 0.4
RESERVE_GIB = 15
"""Of 80: for the CUDA context, NCCL's buffers, cuBLAS workspaces and what the allocator cannot use."""
DIVIDED_MATRICES = (
    "--parallel.tensor-model-parallel-size 2 --parallel.sequence-parallel true --training.micro-batch-size 2"
)
SETTINGS = {64: "", 128: "", 256: "", 512: DIVIDED_MATRICES}
"""What is added to the recipe, by GPUs."""


WHOLE = " ".join(
    f"--parallel.{name.replace('_', '-')} {value}"
    for name, value in {
        "pipeline_model_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": "none",
        "num_layers_in_first_pipeline_stage": "none",
    }.items()
)
ALTERNATIVES = {
    "a copy on each GPU": WHOLE,
    "the same, full recompute": f"{WHOLE} --parallel.recompute-granularity full",
    "layers by two (the recipe)": "",
    "the same, no virtual stages": "--parallel.virtual-pipeline-model-parallel-size none",
    "matrices by two": f"{WHOLE} {DIVIDED_MATRICES} --training.micro-batch-size 3",
    "both by two": DIVIDED_MATRICES,
}
"""What else 256 GPUs could do, as settings added to the recipe."""


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


def memory_and_traffic(config: TrainConfig, world_size: int) -> list[str]:
    """GiB per rank by stage, bubble, GB exchanged by a rank of the first stage."""
    stages = plan(config, world_size, VOCAB).stages
    exchanged = exchanged_bytes(stages[0], config.parallel.data_parallel_size(world_size))
    return [
        " / ".join(f"{stage.peak / GIB:.1f}" for stage in stages),
        f"{100 * bubble(config, world_size):.1f} %",
        f"{exchanged / 1e9:.1f}",
    ]


def table() -> str:
    """A row of each world size; raises AssertionError where a layout leaves less than the reserve."""
    lines = [
        f"| GPUs | layout | GiB per rank, by stage | bubble | GB exchanged | FLOPs per step | s per step | tokens/s "
        f"| days | checkpoint GiB | GB/s to hide it behind {SAVING_STEPS} steps |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for world_size, settings in SETTINGS.items():
        config = load_recipe(RECIPES[0]).overridden(settings.split())
        planned = plan(config, world_size, VOCAB)
        assert planned.worst.peak <= (80 - RESERVE_GIB) * GIB
        run = pace(planned, world_size, mfu=MFU, device_tflops=H100_TFLOPS)
        cells = [
            world_size,
            layout(config, world_size),
            *memory_and_traffic(config, world_size),
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
    lines = ["| | layout | GiB per rank, by stage | bubble | GB exchanged |", "|---|---|---|---|---|"]
    for name, settings in ALTERNATIVES.items():
        config = load_recipe(RECIPES[0]).overridden(settings.split())
        lines.append(f"| {name} | {layout(config, 256)} | {' | '.join(memory_and_traffic(config, 256))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(), alternatives(), sep="\n\n")
