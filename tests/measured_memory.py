"""Measure what a training step keeps in memory on a CPU, allocation by allocation, and hold it against the plan.

    python tests/measured_memory.py      measure all cases and print the table of docs/benchmarks

torch's profiler reports every allocation and release of the CPU allocator that the profiled thread makes, with the
running total: exact, where resident memory would count the interpreter, the allocator's own reserves and the pages of
mapped files. Other threads are not seen: what gloo copies for itself is left out (NCCL keeps its buffers to itself,
too), and so are the batches that the loader reads ahead (8 bytes per token).
"""

from __future__ import annotations

import gc
import json
import math
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.distributed import Work
from torch.profiler import ProfilerActivity, profile, record_function

if TYPE_CHECKING:
    from megadiff.config import TrainConfig
    from megadiff.planning import StageMemory

MEASURED, UPDATE = "measured step", "optimizer update"
SECONDS_FOR_GLOO = 0.03


@dataclass(frozen=True, kw_only=True)
class MeasuredStep:
    """Memory of one training step on this rank, in bytes."""

    at_start: int
    """What lives between steps."""
    peak: int
    peak_of_update: int
    """Largest total from the end of backward on: gradient norm, clipping, Adam."""
    alive_at_peak: list[tuple[str, int]]
    """Bytes that live at the peak and did not live at the start, by the operators that allocated them."""


@contextmanager
def released_by_this_thread() -> Iterator[None]:
    """Wait a little longer for every collective, so that gloo's thread lets go of its tensors before the caller does.

    What another thread releases, the profiler counts for ever.
    """
    wait = Work.wait

    def wait_longer(self: Any, *args: Any) -> Any:
        result = wait(self, *args)
        time.sleep(SECONDS_FOR_GLOO)
        return result

    Work.wait = wait_longer
    try:
        yield
    finally:
        Work.wait = wait


def measure_step(config: TrainConfig) -> MeasuredStep:
    """Build a trainer on this rank and measure its second step; the first one fills buffers that stay."""
    from megadiff.parallel import groups as parallel_groups
    from megadiff.training.trainer import Trainer

    groups = parallel_groups.initialize(config.parallel)
    gc.collect()
    with (
        released_by_this_thread(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
    ):
        trainer = Trainer(config, Path("unused"), groups)
        batches = trainer.training_batches()
        trainer.train_step(batches)
        prepare_grads = trainer.optimizer.prepare_grads

        def marked() -> Any:
            with record_function(UPDATE):
                return prepare_grads()

        trainer.optimizer.prepare_grads = marked
        with record_function(MEASURED):
            trainer.train_step(batches)
    with tempfile.TemporaryDirectory() as directory:
        trace = Path(directory) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        return _read(json.loads(trace.read_text())["traceEvents"])


def _read(events: list[dict[str, Any]]) -> MeasuredStep:
    memory = sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: (e["ts"], e["args"]["Ev Idx"]))
    (step,) = (e for e in events if e["name"] == MEASURED and e["cat"] == "user_annotation")
    (update,) = (e for e in events if e["name"] == UPDATE and e["cat"] == "user_annotation")
    end = step["ts"] + step["dur"]

    def allocated(event: dict[str, Any]) -> int:
        return event["args"]["Total Allocated"]

    # Trainers of earlier measurements in this process live on: Megatron's hooks hold each other.
    left_over = allocated(memory[0]) - memory[0]["args"]["Bytes"]

    def total(event: dict[str, Any]) -> int:
        return allocated(event) - left_over

    before = [e for e in memory if e["ts"] < step["ts"]]
    during = [e for e in memory if step["ts"] <= e["ts"] <= end]
    highest = max(during, key=total)
    alive: dict[int, tuple[float, int]] = {}
    for event in during[: during.index(highest) + 1]:
        address, size = event["args"]["Addr"], event["args"]["Bytes"]
        if size > 0:
            alive[address] = (event["ts"], size)
        else:
            alive.pop(address, None)
    return MeasuredStep(
        at_start=total(before[-1]),
        peak=total(highest),
        peak_of_update=max(total(e) for e in during if e["ts"] >= update["ts"]),
        alive_at_peak=_by_operator(alive, [e for e in events if e.get("cat") == "cpu_op"]),
    )


def _by_operator(alive: dict[int, tuple[float, int]], operators: list[dict[str, Any]]) -> list[tuple[str, int]]:
    """Sum allocations by the operators they happened in, outermost first."""
    by_operator: Counter[str] = Counter()
    for moment, size in alive.values():
        around = [e for e in operators if e["ts"] <= moment <= e["ts"] + e["dur"]]
        by_operator[" > ".join(e["name"] for e in sorted(around, key=lambda e: -e["dur"]))] += size
    return by_operator.most_common()


@dataclass(frozen=True, kw_only=True)
class Case:
    """A run whose memory is predicted and measured."""

    name: str
    world_size: int = 1
    parallel: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    noise: str = "hybrid"

    def config(self, corpus: Path, sequence_length: int) -> TrainConfig:
        """Four layers of width 256 on four sequences at a time; enough micro-batches to fill the pipeline."""
        from tiny import tiny_config

        sizes = {name: self.parallel.get(f"{name}_parallel_size", 1) for name in ("tensor_model", "context")}
        num_stages = self.parallel.get("pipeline_model_parallel_size", 1)
        data_parallel_size = self.world_size // math.prod(sizes.values()) // num_stages
        return tiny_config(
            corpus,
            parallel=self.parallel,
            model={"num_layers": 4, "hidden_size": 256, "num_attention_heads": 4, **self.model},
            objective={"noise": self.noise},
            data={"sequence_length": sequence_length},
            # Clipped for certain, because clipping takes memory.
            optimizer={"clip_grad": 1e-6},
            training={
                "train_steps": 9,
                "micro_batch_size": 4,
                "global_batch_size": 4 * 2 * num_stages * data_parallel_size,
                "precision": "bf16",
                **self.training,
            },
        )


FP32, FUSED, LEVELS = {"precision": "fp32"}, {"fused_head_loss": True}, {"log_snr_conditioning": True}
TP, SP = {"tensor_model_parallel_size": 2}, {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP, CP, SHARDED = {"pipeline_model_parallel_size": 2}, {"context_parallel_size": 2}, {"use_distributed_optimizer": True}
FULL, MLP = {"recompute_granularity": "full"}, {"recompute_granularity": "selective", "recompute_modules": ("mlp",)}
GATED = {"activation": "swiglu", "qk_layernorm": False}
CASES = [
    Case(name="one process, fp32", training=FP32),
    Case(name="one process"),
    Case(name="grouped queries, fp32", training=FP32, model={"num_query_groups": 2}),
    Case(name="grouped queries", model={"num_query_groups": 2}),
    Case(name="gated, fp32", training=FP32, model=GATED),
    Case(name="gated", model=GATED),
    Case(name="gated, recompute of feed-forward", model=GATED, parallel=MLP),
    Case(name="gated, cp2, fp32", world_size=2, training=FP32, model=GATED, parallel=CP),
    Case(name="full recompute, fp32", training=FP32, parallel=FULL),
    Case(name="full recompute", parallel=FULL),
    Case(name="full recompute, two layers at a time", parallel={**FULL, "recompute_num_layers": 2}),
    Case(
        name="full recompute of two layers", parallel={**FULL, "recompute_method": "block", "recompute_num_layers": 2}
    ),
    Case(name="recompute of attention", parallel={"recompute_granularity": "selective"}),
    Case(name="recompute of feed-forward", parallel=MLP),
    Case(name="fused head, fp32", training=FP32, model=FUSED),
    Case(name="fused head", model=FUSED),
    Case(name="fused head, masked noise", model=FUSED, noise="masked"),
    Case(name="noise levels, fp32", training=FP32, model=LEVELS),
    Case(name="noise levels", model=LEVELS),
    Case(name="tp2, fp32", world_size=2, training=FP32, parallel=TP),
    Case(name="tp2", world_size=2, parallel=TP),
    Case(name="tp2 sp, fp32", world_size=2, training=FP32, parallel=SP),
    Case(name="tp2 sp", world_size=2, parallel=SP),
    Case(name="tp2 sp, full recompute", world_size=2, parallel={**SP, **FULL}),
    Case(name="tp2 sp, noise levels", world_size=2, parallel=SP, model=LEVELS),
    Case(name="tp2 sp, fused head", world_size=2, parallel=SP, model=FUSED),
    Case(name="pp2, fp32", world_size=2, training=FP32, parallel=PP),
    Case(name="pp2", world_size=2, parallel=PP),
    Case(name="pp2 of 3 and 1 layers", world_size=2, parallel={**PP, "num_layers_in_first_pipeline_stage": 3}),
    Case(name="pp2 vpp2", world_size=2, parallel={**PP, "virtual_pipeline_model_parallel_size": 2}),
    Case(name="pp2, full recompute", world_size=2, parallel={**PP, **FULL}),
    Case(name="cp2", world_size=2, parallel=CP),
    Case(name="cp2, recompute of attention", world_size=2, parallel={**CP, "recompute_granularity": "selective"}),
    Case(name="dp2", world_size=2),
    Case(name="dp2, distributed optimizer, fp32", world_size=2, training=FP32, parallel=SHARDED),
    Case(name="dp2, distributed optimizer", world_size=2, parallel=SHARDED),
    Case(name="cp2, distributed optimizer", world_size=2, parallel={**CP, **SHARDED}),
    Case(name="tp2 sp, pp2", world_size=4, parallel={**SP, **PP}),
]


def measure_cases(corpus: Path, cases: Sequence[Case], sequence_length: int) -> list[MeasuredStep]:
    """Measure cases of one number of processes, one after the other; on every rank."""
    from megadiff.parallel import groups as parallel_groups

    measured = [measure_step(case.config(corpus, sequence_length)) for case in cases]
    parallel_groups.shutdown()
    return measured


def predicted_and_measured(
    corpus: Path, cases: Sequence[Case], sequence_length: int
) -> Iterator[tuple[Case, StageMemory, MeasuredStep]]:
    """Every case's pipeline stages: what the plan says, and what the stage's first rank has measured."""
    from distributed import run_ranks

    from megadiff.data.corpus import Corpus
    from megadiff.planning import plan_memory

    vocab_size = Corpus.open(corpus).manifest.vocab_size
    for world_size in sorted({case.world_size for case in cases}):
        together = [case for case in cases if case.world_size == world_size]
        by_rank = run_ranks(world_size, measure_cases, corpus, together, sequence_length, timeout=900)
        for index, case in enumerate(together):
            stages = plan_memory(case.config(corpus, sequence_length), world_size, vocab_size)
            for stage in stages:
                yield case, stage, by_rank[stage.stage * world_size // len(stages)][index]


def main() -> None:
    """Measure all cases on the standard library's sources and print a table."""
    from megadiff.data.preprocess import PrepareConfig, prepare

    mib = 2**20
    with tempfile.TemporaryDirectory() as directory:
        prepare(PrepareConfig(output_dir=Path(directory), vocab_size=8192))
        print("| run | stage | predicted | measured | | at | between steps: predicted | measured |")
        print("|---|---|---|---|---|---|---|---|")
        for case, stage, measured in predicted_and_measured(Path(directory), CASES, 512):
            print(
                f"| {case.name} | {stage.stage} | {stage.peak / mib:.1f} | {measured.peak / mib:.1f} | "
                f"{100 * (stage.peak / measured.peak - 1):+.1f} % | {stage.phase} | {stage.constant / mib:.1f} | "
                f"{measured.at_start / mib:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
