"""Speed of training steps: of ours against plain cross-entropy, of every layout, and where the time goes.

    python tools/benchmark_train.py                                 all parts; half an hour on two cores
    python tools/benchmark_train.py --part step --shape quickstart --tensor-parallel 2
    python tools/benchmark_train.py --part layouts --layout one tp2+sp dp2+zero+overlap
    python tools/benchmark_train.py --part profile --noise masked --model.num-layers 2
    python tools/benchmark_train.py --gpu                           steps of 3B and 10B layers on one GPU, bf16 and FP8

step      Steps of one model on the same data, with the same optimizer, that differ in the forward step alone: ours, for
          every noise; `cross-entropy`, clean tokens and Megatron's vocabulary-parallel cross-entropy of all positions,
          without noise and bound; the same by Megatron's `fused` one (in bf16, whose gradient it rounds) and by
          Transformer Engine's, where they run; `autoregressive`, causal attention, shifted targets and the last of
          these. They take turns, in an order drawn anew for each round. Ratios are those within rounds, to the
          cross-entropy whose median is the shortest. `passes` is the time of forward and backward, by CUDA's events on
          a GPU, and `optimizer` that of all else: zeros, gradient norm, update, copies. `cpu` is the time in which the
          main thread computed: on a machine that does other things too, it is worth more. `peak` and `plan` are the
          memory of a GPU that a step took and that megadiff.planning predicts. --contender chooses among them.
layouts   Tokens per second of each way to divide the same batches over processes of --threads each, against one.
          `waiting` is the share of a step in which the main thread of rank 0 did not compute: it waited for messages,
          for other stages, or for a core, where there are fewer of these than processes. A layout is written in words
          joined by +: tpN cpN ppN dpN, vppN (virtual stages), sp (sequence parallel), zero (distributed optimizer),
          overlap, full and selective (recompute), packing; or `one`.
profile   Milliseconds of our step and of cross-entropy's by part of model and loop. A part's time is that outside of
          the parts within it; backward belongs to the part whose forward made it. `step` is the loop's own time.
          Recorded by torch's profiler; means of the steps between the quartiles. On a GPU it is the time of kernels,
          and `waiting` what they leave of the step. `kernels` lists those (on a CPU: operators) of our step that take
          the longest.

Shapes are `quickstart` (the recipe, V = 2048), `large` (H = 512, 8 layers, V = 32768, L = 512, micro-batch 2), and for
GPUs `3b-layers` (H = 3072, 6 layers) and `10b-layers` (H = 4608, 3 layers), V = 131072, L = 2048, 16 micro-batches of 4
a step, and `7b-layers` (H = 4096, 8 layers with 8 key-value heads, V = 100278, L = 1184, 16 of 8).

`mfu` is operations per second, with the full square of attention and the padded head, over the device's peak in
bf16, also under FP8, where that is known. Any setting can be replaced: --section.field VALUE; --fp8.recipe chooses what
fp8 is. Tokens are random, in Zipf's frequencies, unless --data.path names a corpus. Results are printed, and written
into --output-dir as Markdown and CSV with hardware, software and date. What --gpu needs: docs/benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import pickle
import socket
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing import set_forkserver_preload
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeVar

import torch
from benchmark_ops import NOISES
from benchmark_train_cases import (
    AUTOREGRESSIVE,
    BASELINE,
    BASELINES,
    GPU_SHAPES,
    LAYOUTS,
    OURS,
    PRECISIONS,
    SHAPES,
    Case,
    fp8_recipe,
    parse_layout,
)
from benchmark_train_machine import implementations, machine, why_no_figures
from benchmark_train_results import Record, heading, section, write_csv
from torch import multiprocessing

from megadiff.accelerations import why_no_fp8

if TYPE_CHECKING:
    from megadiff.config import TrainConfig

T = TypeVar("T")
Tables = dict[str, list[Record]]
"""Records by the name of their table."""
CONTENDERS = (*OURS, *BASELINES, AUTOREGRESSIVE)
NUM_KERNELS = 30
"""Lines of the table of kernels."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see `python tools/benchmark_train.py --help`")


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; what it does not know are settings of the runs.

    Raises:
        ValueError: a value is refused.
    """
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu_help = "--part step --shape 3b-layers 10b-layers --precision bf16, and fp8 where it can run"
    parser.add_argument("--gpu", action="store_true", help=gpu_help)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), help="all by default")
    shapes = "quickstart and large by default, quickstart for layouts"
    parser.add_argument("--shape", nargs="+", choices=SHAPES, help=shapes)
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=["fp32"])
    parser.add_argument("--vocab-size", type=int, help="V of the random tokens; the shape's by default")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each process (default: 1)")
    rounds_help = "steps of each that are reported (default: 15; with --gpu 3)"
    parser.add_argument("--rounds", type=int, help=rounds_help)
    warm_up_help = "seconds of steps before them, one of each at least (default: 2; with --gpu 20)"
    parser.add_argument("--warm-up", type=float, help=warm_up_help)
    parser.add_argument("--tensor-parallel", type=int, default=1, help="processes of the step part (default: 1)")
    parser.add_argument("--processes", type=int, nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="of layouts")
    parser.add_argument("--layout", nargs="+", help="layouts to measure instead of those for --processes")
    contender_help = "steps to measure, by name, a cross-entropy among them; all of the shape's by default"
    parser.add_argument("--contender", nargs="+", choices=CONTENDERS, metavar="NAME", help=contender_help)
    parser.add_argument("--noise", choices=NOISES, default="hybrid", help="of the profile (default: hybrid)")
    parser.add_argument("--output-dir", type=Path, help="folder for the results; printed only by default")
    arguments, settings = parser.parse_known_args(argv)
    arguments.settings = settings
    if arguments.contender and not set(BASELINES) & set(arguments.contender):
        raise ValueError(f"--contender names no cross-entropy to compare with: add one of {', '.join(BASELINES)}")
    if arguments.gpu:
        if not torch.cuda.is_available():
            raise ValueError("--gpu is given, but torch sees no CUDA device: leave it out to measure on the CPU")
        if reason := why_no_figures():
            raise ValueError(
                f"--gpu is given, but megadiff's CUDA kernels are not live ({reason}): build them, and leave "
                "MEGADIFF_KERNELS unset"
            )
        arguments.part, arguments.shape = ["step"], list(GPU_SHAPES)
        arguments.precision = ["bf16"] if why_no_fp8(fp8_recipe(settings)) else ["bf16", "fp8"]
    rounds, warm_up_seconds = (3, 20.0) if arguments.gpu else (15, 2.0)
    arguments.rounds = rounds if arguments.rounds is None else arguments.rounds
    arguments.warm_up = warm_up_seconds if arguments.warm_up is None else arguments.warm_up
    for layout in arguments.layout or ():
        parse_layout(layout)
    for name, least in {"threads": 1, "rounds": 1, "warm_up": 0, "tensor_parallel": 1, "vocab_size": 8}.items():
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} is {value}, but must be at least {least}")
    return arguments


# ------------------------------------------------------------------------------------------------------ running ranks


def _run_rank(rank: int, world_size: int, port: int, threads: int, answer: Path, job: Callable[[], Any]) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(threads)
    result = job()
    if rank == 0:
        answer.write_bytes(pickle.dumps(result))


def on_ranks(world_size: int, threads: int, job: Callable[[], Any]) -> Any:
    """What rank 0 of a fresh job of `world_size` processes returns from `job()`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Without CUDA, which no fork survives, imports are made once for all jobs.
    method = "spawn" if torch.cuda.is_available() else "forkserver"
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer"
        arguments = (world_size, port, threads, answer, job)
        multiprocessing.start_processes(_run_rank, arguments, nprocs=world_size, start_method=method)
        return pickle.loads(answer.read_bytes())


# ------------------------------------------------------------------------------------------------------------- parts


def tokens_of(config: TrainConfig) -> int:
    """Tokens of an optimizer step."""
    return config.training.global_batch_size * config.data.sequence_length


def quartiles(values: Sequence[float]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [*values] * 3


def in_turns(
    case: Case, config: TrainConfig, names: Sequence[str], measure: Callable[..., T]
) -> tuple[dict[str, list[T]], Record]:
    """Measurements of the contenders by name, from a fresh job, and its clocks meanwhile."""
    from benchmark_train_steps import in_turns

    arguments, world_size = case.arguments, config.parallel.tensor_model_parallel_size
    job = partial(in_turns, config, names, arguments.rounds, arguments.warm_up, measure)
    return on_ranks(world_size, arguments.threads, job)


def measure_steps(case: Case) -> Tables:
    """Contenders against cross-entropy."""
    from benchmark_train_steps import contenders, timed_step

    config = case.step_run()
    tokens, wanted = tokens_of(config), case.arguments.contender or CONTENDERS
    ours = OURS if case.arguments.contender else SHAPES[case.shape].ours
    names = [name for name in contenders(config, tuple(ours)) if name in wanted]
    found, clocks = in_turns(case, config, names, timed_step)
    plain_names = [name for name in BASELINES if name in found]
    fastest = min(plain_names, key=lambda name: statistics.median(time.wall for time in found[name]))
    records = []
    for name, times in found.items():
        wall, cpu, passes, peak = (statistics.median(values) for values in zip(*times, strict=True))
        step_low, _, step_high = quartiles([time.wall for time in times])
        pairs = list(zip(times, found[fastest], strict=True))
        low, ratio, high = quartiles([ours.wall / plain.wall for ours, plain in pairs])
        cpu_low, cpu_ratio, cpu_high = quartiles([ours.cpu / plain.cpu for ours, plain in pairs])
        records.append(
            case.record(
                processes=config.parallel.tensor_model_parallel_size,
                **implementations(config),
                contender=name,
                step_ms=f"{1e3 * wall:.1f}",
                step_quartiles=f"{1e3 * step_low:.1f}-{1e3 * step_high:.1f}",
                passes_ms=f"{1e3 * passes:.1f}",
                optimizer_ms=f"{1e3 * statistics.median(time.wall - time.passes for time in times):.1f}",
                tokens_per_s=f"{tokens / wall:.0f}",
                ratio=f"{ratio:.3f}",
                quartiles=f"{low:.3f}-{high:.3f}",
                cpu_ms=f"{1e3 * cpu:.1f}",
                cpu_ratio=f"{cpu_ratio:.3f}",
                cpu_quartiles=f"{cpu_low:.3f}-{cpu_high:.3f}",
                mfu=utilisation(config, case.vocab_size, tokens / wall),
                peak_gib=f"{peak / 2**30:.1f}" if peak else "",
                plan_gib=planned_gib(config, case.vocab_size, name) if peak else "",
                **clocks,
            )
        )
    return {"step": records}


def utilisation(config: TrainConfig, vocab_size: int, tokens_per_second: float) -> str:
    """Share of one device's peak in bf16 that the model's operations are; empty where no peak is known."""
    from megadiff.devices import peak_tflops
    from megadiff.models.accounting import flops_per_token

    tflops = peak_tflops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    if tflops is None:
        return ""
    flops = flops_per_token(config.model, vocab_size, config.data.sequence_length).total
    return f"{tokens_per_second * flops / (tflops * 1e12):.3f}"


def planned_gib(config: TrainConfig, vocab_size: int, contender: str) -> str:
    """Memory that is predicted for one of our steps; empty for another's."""
    from megadiff.planning import GIB, plan

    if contender not in OURS:
        return ""
    _, fused_head_loss = OURS[contender]
    model = dataclasses.replace(config.model, fused_head_loss=fused_head_loss)
    world_size = config.parallel.tensor_model_parallel_size
    return f"{plan(dataclasses.replace(config, model=model), world_size, vocab_size).worst.peak / GIB:.1f}"


def measure_layouts(case: Case) -> Tables:
    """Layouts against one process."""
    from benchmark_train_steps import measure_layout

    records, alone = [], math.nan
    for world_size, configs in case.layout_runs().items():
        for layout, config in configs.items():
            # In processes of its own: groups of an earlier layout would keep threads awake beside it.
            job = partial(measure_layout, config, case.arguments.rounds, case.arguments.warm_up)
            times = on_ranks(world_size, case.arguments.threads, job)
            low, speed, high = quartiles([tokens_of(config) / time.wall for time in times])
            alone = speed if layout == "one" else alone
            records.append(
                case.record(
                    processes=world_size,
                    layout=layout,
                    tokens_per_s=f"{speed:.0f}",
                    quartiles=f"{low:.0f}-{high:.0f}",
                    to_one_process="" if math.isnan(alone) else f"{speed / alone:.2f}",
                    waiting=f"{statistics.median(1 - time.cpu / time.wall for time in times):.2f}",
                )
            )
    return {"layouts": records}


def measure_profile(case: Case) -> Tables:
    """Parts of our step and of cross-entropy's, and what takes the longest in ours."""
    from benchmark_train_profile import ROWS, middle_half, profiled

    noise, config = case.arguments.noise, case.profile_run()
    name = f"{noise}, fused head" if config.model.fused_head_loss else noise
    if name not in OURS:
        raise ValueError(f"a step with {name} is not measured: choose one of {', '.join(OURS)}")
    profiles, _ = in_turns(case, config, (name, BASELINE), profiled)
    ours, plain = middle_half(profiles[name]), middle_half(profiles[BASELINE])

    def record(part: str, which: str, our_seconds: float, plain_seconds: float) -> Record:
        return case.record(
            part=f"{part}, {which}" if which else part,
            **{
                f"{noise}_ms": f"{1e3 * our_seconds:.2f}",
                f"{noise}_share": f"{our_seconds / ours.step_time:.4f}",
                "cross_entropy_ms": f"{1e3 * plain_seconds:.2f}",
                "cross_entropy_share": f"{plain_seconds / plain.step_time:.4f}",
                "difference_ms": f"{1e3 * (our_seconds - plain_seconds):+.2f}",
                "difference_share": f"{(our_seconds - plain_seconds) / plain.step_time:+.4f}",
            },
        )

    rows = [record(*row, ours.seconds[row], plain.seconds[row]) for row in ROWS]
    kernels = [
        case.record(kernel=name[:160], ms=f"{1e3 * seconds:.2f}", share=f"{seconds / ours.step_time:.4f}")
        for name, seconds in sorted(ours.kernels.items(), key=lambda kernel: -kernel[1])[:NUM_KERNELS]
    ]
    return {"profile": [*rows, record("step", "", ours.step_time, plain.step_time)], "kernels": kernels}


# ------------------------------------------------------------------------------------------------------------ results


class Part(NamedTuple):
    """One of the things that are measured."""

    check: Callable[[Case], object]
    """Raises what measuring would raise first."""
    measure: Callable[[Case], Tables]


PARTS = {
    "step": Part(Case.step_run, measure_steps),
    "layouts": Part(Case.layout_runs, measure_layouts),
    "profile": Part(Case.profile_run, measure_profile),
}
TITLES = {
    "step": "Steps against cross-entropy",
    "layouts": "Layouts against one process",
    "profile": "Where the time goes",
    "kernels": "What takes the longest",
}
"""Of the tables."""


def run(argv: Sequence[str]) -> None:
    """Measure, print and write what was asked for.

    Raises:
        ValueError: it cannot be had.
    """
    arguments = parse_arguments(argv)
    facts = machine()
    shared = {"threads": arguments.threads, "rounds": arguments.rounds, "warm_up": arguments.warm_up}
    prefix, sections = f"{facts['date']}-train", [heading(facts, argv, **shared)]
    with tempfile.TemporaryDirectory() as folder:
        cases_by_part = cases_of(arguments, Path(folder))
        # For the processes to be started: the libraries' warnings and the profiler's messages come once per process.
        os.environ.update(OMP_NUM_THREADS=str(arguments.threads), PYTHONWARNINGS="ignore", KINETO_LOG_LEVEL="99")
        set_forkserver_preload(["megadiff.training.loop"])
        print(sections[0], flush=True)
        tables: Tables = {}
        for part, case in ((part, case) for part, cases in cases_by_part.items() for case in cases):
            for name, records in PARTS[part].measure(case).items():
                tables.setdefault(name, []).extend(records)
                sections.append(section(TITLES[name], case.shape, case.precision, records))
                print(sections[-1], flush=True)
                if arguments.output_dir:  # at once: a stop later on loses nothing
                    arguments.output_dir.mkdir(parents=True, exist_ok=True)
                    write_csv(arguments.output_dir / f"{prefix}-{name}.csv", facts, tables[name])
    if arguments.output_dir:
        (arguments.output_dir / f"{prefix}.md").write_text("\n".join(sections))


def cases_of(arguments: argparse.Namespace, corpora: Path) -> dict[str, list[Case]]:
    """What is to be measured, by part; checked before anything is, as far as it can be.

    Raises:
        ValueError: a setting or layout is refused.
    """
    cases: dict[str, list[Case]] = {}
    for part in arguments.part:
        shapes = arguments.shape or (["quickstart"] if part == "layouts" else ["quickstart", "large"])
        cases[part] = [
            Case(shape=shape, precision=precision, arguments=arguments, corpora=corpora)
            for shape in shapes
            for precision in arguments.precision
        ]
        for case in cases[part]:
            PARTS[part].check(case)
    return cases


def main(argv: Sequence[str]) -> int:
    warnings.filterwarnings("ignore", module="megatron")
    try:
        run(argv)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
