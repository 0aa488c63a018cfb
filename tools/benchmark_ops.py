"""Time and memory of the row loss against what a user would otherwise run, on this machine.

    python tools/benchmark_ops.py                                   CPU, T = 256, V = 131072, fp32: about ten minutes
    python tools/benchmark_ops.py --device cuda --dtype bfloat16 --vocab-size 32768 131072 --rows 256 1024 8192
    python tools/benchmark_ops.py --head                            output layer and loss together

Forward and backward of one loss over the same logits, every implementation in turn, repeated; medians are reported.
On a CPU, memory that PyTorch's allocator takes afresh from the system for each tensor costs as much as the arithmetic,
so both ways are measured, each in a process of its own: `fresh` pages (PyTorch's default) and `reused` ones.

Written into --output-dir as CSV, with the hardware and the date:

    time_ms           median of --repetitions
    copy_share        least bytes (logits of rows with weight read once, gradient written once) / time, over the
                      bandwidth of a plain copy; on a GPU only where they are four times its cache
    peak_extra_mib    memory taken at most beyond the logits; not measured where pages are reused

Implementations: `megadiff` (the gradient in a tensor of its own), `megadiff in place` (over the logits, as in
training), `megadiff eager` (the twins without kernels), `dense` and `dense compiled` (the bound as it is published,
over the whole vocabulary, in fp32), `cross-entropy` and `cross-entropy compiled` (PyTorch's: one target, no noise).
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import ctypes
import datetime
import gc
import itertools
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megadiff.diffusion import (
    DiffusionProcess,
    HybridMixing,
    MaskedMixing,
    MixingDistribution,
    NoiseSchedule,
    Rows,
    UniformMixing,
)
from megadiff.ops import RowTargets, _library, eager
from megadiff.parallel.vocab_loss import vocab_loss

MASK_ID = 3
NOISES = ("masked", "uniform", "hybrid")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="type of the logits")
    parser.add_argument("--vocab-size", type=int, nargs="+", default=[131072])
    parser.add_argument("--rows", type=int, nargs="+", default=[256], help="T, tokens of a micro-batch")
    parser.add_argument("--noise", choices=NOISES, nargs="+", default=NOISES)
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1], help="CPU threads")
    parser.add_argument("--pages", choices=("fresh", "reused"), help="CPU memory; both in turn by default")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="implementations, by name; all by default")
    parser.add_argument("--head", action="store_true", help="output layer and loss, plain and fused, instead")
    parser.add_argument("--hidden-size", type=int, default=1024, help="H of --head")
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--output-dir", type=Path, help="folder for the CSV; printed only by default")
    arguments = parser.parse_args()
    for name in ("rows", "vocab_size", "threads", "repetitions", "hidden_size"):
        values = getattr(arguments, name)
        if min(values if isinstance(values, list) else [values]) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {values}")
    return arguments


def hardware(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    with open("/proc/cpuinfo") as file:
        model = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), "CPU")
    return f"{model} ({platform.machine()}, {_library.instruction_set() if _library.is_live('cpu') else 'eager'})"


def choose_pages(pages: str) -> None:
    """Set how this process gets memory (glibc): anew from the system for each tensor, or what it had before."""
    libc, m_trim_threshold, m_mmap_threshold, m_mmap_max = ctypes.CDLL("libc.so.6"), -1, -3, -4
    if pages == "reused":
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)
    elif pages == "fresh":
        libc.mallopt(m_mmap_threshold, 2**20)  # else it grows with what has been freed, and large tensors are reused


@dataclass
class Contender:
    """One implementation: what is timed, and what has to be put right before each time."""

    name: str
    run: Callable[[], object]
    prepare: Callable[[], object] = lambda: None


# ---------------------------------------------------------------------------------------------------- what is measured


def make_rows(noise: str, num_rows: int, vocab_size: int, device: str) -> tuple[Rows, Tensor, DiffusionProcess]:
    """Rows as the process draws them, each at a time of its own from nearly clean to nearly pure noise."""
    mixings: dict[str, MixingDistribution] = {
        "masked": MaskedMixing(vocab_size, MASK_ID),
        "uniform": UniformMixing(vocab_size, MASK_ID),
        "hybrid": HybridMixing(vocab_size, MASK_ID, 0.0),
    }
    process = DiffusionProcess(NoiseSchedule(), mixings[noise])
    generator = torch.Generator().manual_seed(0)
    tokens, other = torch.randint(4, vocab_size, (2, num_rows), generator=generator)
    log_snr = process.schedule.log_snr((torch.arange(num_rows) + 0.5).double() / num_rows)
    kept = torch.rand(num_rows, generator=generator) < process.alpha(log_snr)
    uniform = torch.rand(num_rows, generator=generator) < process.mixing.uniform_share(log_snr)
    noised = torch.where(kept, tokens, torch.where(uniform, other, MASK_ID))
    weight = process.loss_weight(log_snr, tokens, noised).float()
    rows = Rows(
        target=tokens.to(device),
        noised=noised.to(device),
        alpha=process.alpha(log_snr).float().to(device),
        uniform_mass=process.uniform_mass(log_snr).float().to(device),
        kl_weight=weight.to(device),
        is_weight=weight.to(device),
        elbo_weight=weight.to(device),
        counted=torch.ones(num_rows, dtype=torch.bool, device=device),
        any_uniform_mass=process.any_uniform_mass,
    )
    return rows, log_snr.float().to(device), process


def dense_loss(logits: Tensor, rows: Rows, noise_TV: Tensor) -> Tensor:
    """The published training loss, written as it reads: both marginals over the whole vocabulary, in fp32.

    The marginals of pure noise are given, and no one-hot tensor is made: a lean version of its kind.

    Source: von Rütte et al. (arXiv 2512.10858), proposition 1.
    """
    vocab = torch.arange(logits.shape[-1], device=logits.device)
    alpha = rows.alpha[:, None]
    p = alpha * logits.float().masked_fill(vocab == MASK_ID, -1e6).softmax(-1) + noise_TV
    q = noise_TV.scatter_add(-1, rows.target[:, None], alpha)
    log_p, log_q = p.clamp(min=1e-38).log(), q.clamp(min=1e-38).log()
    kl_div = (q * (log_q - log_p)).sum(-1)
    log_ratio = (log_q - log_p).gather(-1, rows.noised[:, None])[:, 0]
    return (rows.kl_weight * (kl_div + torch.expm1(log_ratio) - log_ratio)).sum()


def loss_contenders(noise: str, logits: Tensor) -> list[Contender]:
    """Forward and backward of one loss over the same logits."""
    num_rows, vocab_size = logits.shape
    rows, log_snr, process = make_rows(noise, num_rows, vocab_size, logits.device.type)
    targets = RowTargets(rows.target, rows.noised, rows.alpha, rows.uniform_mass, rows.kl_weight, rows.is_weight)
    noise_TV = torch.sigmoid(-log_snr)[:, None] * process.mixing.probs(log_snr)
    numbers: Any = {"vocab_size": vocab_size, "mask_id": MASK_ID}
    work = logits.clone()  # overwritten in place, and made good again

    def ours(values: Tensor, overwrite: bool) -> object:
        values = values.detach().requires_grad_()
        losses = vocab_loss(values, rows, **numbers, overwrite_logits=overwrite)
        return torch.autograd.grad(losses.loss_T.sum(), values)

    def gradient_of(loss: Callable[..., Tensor], *arguments: object, **options: object) -> object:
        values = logits.detach().requires_grad_()
        return torch.autograd.grad(loss(values, *arguments, **options), values)

    compiled_dense, compiled_cross_entropy = torch.compile(dense_loss), torch.compile(F.cross_entropy)
    return [
        Contender("megadiff", lambda: ours(logits, overwrite=False)),
        Contender("megadiff in place", lambda: ours(work, overwrite=True), lambda: work.copy_(logits)),
        Contender("megadiff eager", lambda: eager.whole_row_gradient(logits, targets, **numbers)),
        Contender("dense", lambda: gradient_of(dense_loss, rows, noise_TV)),
        Contender("dense compiled", lambda: gradient_of(compiled_dense, rows, noise_TV)),
        Contender("cross-entropy", lambda: gradient_of(F.cross_entropy, rows.target, reduction="sum")),
        Contender("cross-entropy compiled", lambda: gradient_of(compiled_cross_entropy, rows.target, reduction="sum")),
    ]


def head_contenders(noise: str, logits: Tensor, hidden_size: int) -> list[Contender]:
    """Forward and backward of output layer and loss; of the given logits only shape, type and device are used.

    The number of rows with weight is given: in training the host counts it while the device computes the layers.
    """
    from megadiff.parallel.head_loss import head_loss  # needs Megatron-Core, which nothing else here does

    num_rows, vocab_size = logits.shape
    rows, _, _ = make_rows(noise, num_rows, vocab_size, logits.device.type)
    generator = torch.Generator(logits.device).manual_seed(2)
    options: Any = {"generator": generator, "device": logits.device, "dtype": logits.dtype}
    hidden = torch.randn(num_rows, hidden_size, **options).requires_grad_()
    weight = torch.randn(vocab_size, hidden_size, **options).mul_(hidden_size**-0.5).requires_grad_()
    numbers: Any = {"vocab_size": vocab_size, "mask_id": MASK_ID}
    active_rows = int(((rows.kl_weight != 0) | (rows.is_weight != 0)).sum())

    def plain() -> object:
        losses = vocab_loss(hidden @ weight.t(), rows, **numbers, overwrite_logits=True)
        return torch.autograd.grad(losses.loss_T.sum(), (hidden, weight))

    def fused() -> object:
        loss = head_loss(hidden[:, None], weight, rows, **numbers, active_rows=active_rows).loss
        return torch.autograd.grad(loss, (hidden, weight))

    return [Contender("head, then loss", plain), Contender("head and loss fused", fused)]


# ----------------------------------------------------------------------------------------------------------- measuring


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def time_of(contender: Contender, device: str) -> float:
    """Seconds of one run."""
    contender.prepare()
    synchronize(device)
    if device == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(4_000_000)  # the host runs ahead meanwhile, as it does in training
        begin.record()
        result = contender.run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
    start = time.perf_counter()
    result = contender.run()
    synchronize(device)
    elapsed = time.perf_counter() - start
    del result  # its memory is given back outside the time
    return elapsed


def resident_bytes(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def peak_extra_bytes(contender: Contender, device: str) -> int:
    """Memory that one run takes at most beyond what was there before it."""
    contender.prepare()
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        contender.run()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident_bytes("VmRSS")
    contender.run()
    return max(0, resident_bytes("VmHWM") - before)


def copy_bandwidth(logits: Tensor) -> float:
    """Bytes per second of a copy of the logits into a tensor that is already there, reads and writes both counted."""
    target = torch.zeros_like(logits)
    copy = Contender("copy", lambda: target.copy_(logits))
    times = [time_of(copy, logits.device.type) for _ in range(15)]
    return 2 * logits.numel() * logits.element_size() / statistics.median(times)


def measure(arguments: argparse.Namespace, pages: str, threads: int) -> Iterator[dict[str, object]]:
    """One record per size, noise and implementation."""
    torch.set_num_threads(threads)
    device = arguments.device
    shared = {
        "date": datetime.date.today().isoformat(),
        "hardware": hardware(device),
        "torch": torch.__version__,
        "threads": threads if device == "cpu" else "",
        "pages": pages if device == "cpu" else "",
        "dtype": arguments.dtype,
    }
    for vocab_size in arguments.vocab_size:
        for num_rows in arguments.rows:
            generator = torch.Generator(device).manual_seed(1)
            logits = torch.randn(num_rows, vocab_size, generator=generator, device=device).mul_(2.0)
            logits = logits.to(DTYPES[arguments.dtype])
            bandwidth = copy_bandwidth(logits)
            for noise in arguments.noise:
                torch.compiler.reset()
                rows, _, _ = make_rows(noise, num_rows, vocab_size, device)
                num_read = int(((rows.kl_weight != 0) | (rows.is_weight != 0)).sum())
                least_bytes = (num_read + num_rows) * vocab_size * logits.element_size()
                # A copy that stays in the cache tells nothing of memory.
                in_memory = device == "cpu" or logits.nbytes > 4 * torch.cuda.get_device_properties(0).L2_cache_size
                has_share = in_memory and not arguments.head
                contenders = (
                    head_contenders(noise, logits, arguments.hidden_size)
                    if arguments.head
                    else loss_contenders(noise, logits)
                )
                if unknown := set(arguments.only or ()) - {contender.name for contender in contenders}:
                    sys.exit(f"error: --only {unknown} names none of {[contender.name for contender in contenders]}")
                contenders = [c for c in contenders if not arguments.only or c.name in arguments.only]
                for contender in contenders:  # compiles, fills caches
                    time_of(contender, device), time_of(contender, device)
                times: dict[str, list[float]] = {contender.name: [] for contender in contenders}
                for _ in range(arguments.repetitions):  # in turn: a busy moment of the machine meets all alike
                    for contender in contenders:
                        times[contender.name].append(time_of(contender, device))
                for contender in contenders:
                    seconds = statistics.median(times[contender.name])
                    peak = "" if pages == "reused" else f"{peak_extra_bytes(contender, device) / 2**20:.0f}"
                    yield {
                        **shared,
                        "rows": num_rows,
                        "vocab_size": vocab_size,
                        "noise": noise,
                        "implementation": contender.name,
                        "time_ms": f"{1e3 * seconds:.3f}",
                        "copy_gb_per_s": f"{bandwidth / 1e9:.1f}",
                        "copy_share": f"{least_bytes / seconds / bandwidth:.3f}" if has_share else "",
                        "peak_extra_mib": peak,
                    }


def in_own_processes(arguments: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Records of both kinds of memory: an allocator is chosen once per process."""
    for pages in ("fresh", "reused"):
        command = [sys.executable, __file__, *sys.argv[1:], "--device", "cpu", "--pages", pages]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            yield from csv.DictReader(process.stdout)
        if process.returncode:
            sys.exit(process.returncode)


def main() -> None:
    arguments = parse_arguments()
    records: Iterator[dict[str, object]]
    if arguments.pages or arguments.device == "cuda":
        choose_pages(arguments.pages or "")
        threads = arguments.threads if arguments.device == "cpu" else [torch.get_num_threads()]
        records = itertools.chain.from_iterable(measure(arguments, arguments.pages or "", number) for number in threads)
    else:
        records = in_own_processes(arguments)

    output = None
    if arguments.output_dir and not arguments.pages:
        kind = f"ops-{'head-' if arguments.head else ''}{arguments.device}-{arguments.dtype}"
        output = arguments.output_dir / f"{datetime.date.today().isoformat()}-{kind}.csv"
        output.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        files = [sys.stdout] + ([stack.enter_context(output.open("w", newline=""))] if output else [])
        writers: list[csv.DictWriter[str]] = []
        for record in records:
            if not writers:
                writers = [csv.DictWriter(file, list(record), lineterminator="\n") for file in files]
                for writer in writers:
                    writer.writeheader()
            for writer, file in zip(writers, files, strict=True):
                writer.writerow(record)
                file.flush()
    if output:
        print(f"written to {output}", file=sys.stderr)


if __name__ == "__main__":
    main()
