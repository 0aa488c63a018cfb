"""Every layout that up to four processes allow, as data: what the layout test trains and what the README says of it.

python tests/training/layouts.py      print the README's table
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

GLOBAL_BATCH_SIZE = 8
NUM_LAYERS = 4
"""Of the model that is trained: two pipeline stages of two virtual stages, or four stages, of equal length."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way to divide a run, as settings of `ParallelConfig` and `DataConfig`."""

    tensor: int = 1
    sequence_parallel: bool = False
    context: int = 1
    pipeline: int = 1
    virtual: int | None = None
    data: int = 1
    distributed_optimizer: bool = False
    recompute: str | None = None
    packing: bool = False
    extra: tuple[tuple[str, Any], ...] = ()
    """Further settings of `ParallelConfig`, for cases beyond the grid."""

    @property
    def world_size(self) -> int:
        return self.tensor * self.context * self.pipeline * self.data

    @property
    def sizes(self) -> tuple[Any, ...]:
        """What process groups depend on."""
        extra = dict(self.extra)
        return (
            *(self.tensor, self.context, self.pipeline, self.virtual, self.data),
            extra.get("num_distributed_optimizer_instances"),
        )

    @property
    def division(self) -> str:
        """How the ranks divide the work: tp2 sp · cp2."""
        sequence = " sp" if self.sequence_parallel else ""
        virtual = f" vpp{self.virtual}" if self.virtual else ""
        parts = {
            f"tp{self.tensor}{sequence}": self.tensor,
            f"cp{self.context}": self.context,
            f"pp{self.pipeline}{virtual}": self.pipeline,
            f"dp{self.data}": self.data,
        }
        return " · ".join(name for name, size in parts.items() if size > 1) or "one process"

    def __str__(self) -> str:
        options = {
            "distributed optimizer": self.distributed_optimizer,
            f"{self.recompute} recompute": self.recompute,
            "packing": self.packing,
            **{f"{name} {value}": True for name, value in self.extra},
        }
        return ", ".join([self.division, *(name for name, on in options.items() if on)])

    @property
    def sections(self) -> dict[str, dict[str, Any]]:
        """As settings for `tiny_config`.

        Two micro-batches on every rank, enough to accumulate, and few enough for hundreds of cases; four where the
        schedule would not turn from forward to forward and backward otherwise.
        """
        num_micro_batches = 4 if self.virtual or self.pipeline > 2 else 2
        return {
            "parallel": {
                "tensor_model_parallel_size": self.tensor,
                "sequence_parallel": self.sequence_parallel,
                "context_parallel_size": self.context,
                "pipeline_model_parallel_size": self.pipeline,
                "virtual_pipeline_model_parallel_size": self.virtual,
                "use_distributed_optimizer": self.distributed_optimizer,
                "recompute_granularity": self.recompute,
                **dict(self.extra),
            },
            "data": {"reset_at_document": self.packing},
            "training": {"micro_batch_size": GLOBAL_BATCH_SIZE // (num_micro_batches * self.data)},
        }


def divisions(world_size: int) -> Iterator[dict[str, Any]]:
    """All ways to divide a run of `NUM_LAYERS` layers over this many processes."""
    sizes = [size for size in (1, 2, 4) if size <= world_size]
    for tensor, context, pipeline, data in itertools.product(sizes, repeat=4):
        if tensor * context * pipeline * data != world_size:
            continue
        for sequence_parallel in (False, True) if tensor > 1 else (False,):
            for virtual in (None, 2) if pipeline == 2 else (None,):
                yield {
                    "tensor": tensor,
                    "sequence_parallel": sequence_parallel,
                    "context": context,
                    "pipeline": pipeline,
                    "virtual": virtual,
                    "data": data,
                }


RECOMPUTE = (None, "full", "selective")
OPTIONS = [
    {"distributed_optimizer": distributed, "recompute": recompute, "packing": packing}
    for distributed in (False, True)
    for recompute in RECOMPUTE
    for packing in (False, True)
]

EVERY = [Layout(**division, **options) for size in (1, 2, 4) for division in divisions(size) for options in OPTIONS]
"""Every division x distributed optimizer x recompute x packing."""


def is_in_third(layout: Layout) -> bool:
    """Whether a layout is in the third of `EVERY` in which every division meets every value of every option."""
    options = layout.distributed_optimizer + RECOMPUTE.index(layout.recompute) + layout.packing
    return options % 3 == DIVISIONS.index(layout.division) % 3


DIVISIONS = list(dict.fromkeys(layout.division for layout in EVERY))

OVERLAP = (("overlap_grad_reduce", True), ("overlap_param_gather", True))
BEYOND_THE_GRID = [
    Layout(pipeline=2, extra=(("num_layers_in_first_pipeline_stage", 1),)),
    Layout(pipeline=2, extra=(("num_layers_in_last_pipeline_stage", 1),)),
    Layout(data=2, extra=(("overlap_grad_reduce", True),)),
    Layout(data=2, distributed_optimizer=True, extra=OVERLAP),
    Layout(data=2, distributed_optimizer=True, recompute="full", extra=(*OVERLAP, ("recompute_method", "block"))),
    Layout(recompute="full", extra=(("recompute_num_layers", 2),)),
    Layout(recompute="selective", extra=(("recompute_modules", ("core_attn", "mlp")),)),
    Layout(pipeline=4, extra=(("num_layers_in_first_pipeline_stage", 1), ("num_layers_in_last_pipeline_stage", 1))),
    Layout(tensor=2, sequence_parallel=True, data=2, distributed_optimizer=True, extra=OVERLAP),
    Layout(pipeline=2, virtual=2, data=2, distributed_optimizer=True, extra=OVERLAP),
    Layout(context=2, data=2, distributed_optimizer=True, packing=True, extra=OVERLAP),
    Layout(data=4, distributed_optimizer=True, extra=(("num_distributed_optimizer_instances", 2),)),
    Layout(data=4, distributed_optimizer=True, extra=(("num_distributed_optimizer_instances", 2), *OVERLAP)),
]
"""Settings that are tried where they say something."""

CORE = [
    Layout(packing=True),
    Layout(recompute="full"),
    Layout(tensor=2),
    Layout(tensor=2, sequence_parallel=True, recompute="selective", packing=True),
    Layout(pipeline=2, virtual=2, recompute="full"),
    Layout(context=2, packing=True),
    Layout(data=2, distributed_optimizer=True, extra=OVERLAP),
    Layout(tensor=2, sequence_parallel=True, pipeline=2, virtual=2, packing=True),
    Layout(tensor=2, sequence_parallel=True, context=2, recompute="full"),
    Layout(context=2, data=2, distributed_optimizer=True),
]
"""Few enough for every change: each way to divide, each option, and the pairs that have least in common."""


def table() -> str:
    """The README's table: each division that is tested, and how many combinations of options with it."""
    lines = ["| processes | layouts, each with combinations of the options below |", "|---|---|"]
    for world_size in (1, 2, 4):
        names = dict.fromkeys(f"`{layout.division}`" for layout in EVERY if layout.world_size == world_size)
        lines.append(f"| {world_size} | {', '.join(names)} |")
    lines += [
        "",
        f"Options: with and without distributed optimizer; no, full and selective recompute; with and without document "
        f"packing: all {len(OPTIONS)} combinations of each, {len(EVERY)} layouts. On four processes "
        "`tests/run.sh --all` takes a third, in which every division meets every option, `--exhaustive` all. And "
        f"{len(BEYOND_THE_GRID)} more: uneven first and last stages, overlapped gradient reduction and parameter "
        "gathering, several instances of the distributed optimizer, recompute by blocks, units and modules.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
