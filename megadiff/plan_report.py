"""A memory plan as text, and what would help one that does not fit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megadiff.planning import GIB, Plan, plan_memory

if TYPE_CHECKING:
    from megadiff.config import TrainConfig


def what_would_help(config: TrainConfig, world_size: int, vocab_size: int) -> list[tuple[str, int]]:
    """Settings that lower the worst peak, one at a time, and the peak in bytes with each of them; the best first."""
    parallel, micro_batch_size = config.parallel, config.training.micro_batch_size
    wider = 2 * parallel.tensor_model_parallel_size
    candidates = [
        ["--parallel.use-distributed-optimizer", "true"],
        ["--optimizer.optimizer-cpu-offload", "true"],
        ["--parallel.sequence-parallel", "true"],
        ["--parallel.recompute-granularity", "selective", "--parallel.recompute-modules", "mlp"],
        ["--parallel.recompute-granularity", "full"],
        ["--parallel.tensor-model-parallel-size", str(wider)],
        ["--model.fused-head-loss", "true"],
        ["--training.micro-batch-size", str(max(1, micro_batch_size // 2))],
    ]
    now = max(stage.peak for stage in plan_memory(config, world_size, vocab_size))
    found = []
    for settings in candidates:
        try:
            changed = config.overridden(settings)
            peak = max(stage.peak for stage in plan_memory(changed, world_size, vocab_size))
        except ValueError:  # does not fit together with the rest
            continue
        if peak < now:
            found.append((" ".join(settings), peak))
    return sorted(found, key=lambda pair: pair[1])


def describe(plan: Plan, device_memory_gib: float, help_with: list[tuple[str, int]]) -> str:
    """A plan as text: the model, a table of pipeline stages in GiB, and whether a device holds the largest.

    Args:
        help_with: what `what_would_help` found, for plans that do not fit.
    """
    flops, tokens = plan.flops_per_token, plan.train_steps * plan.tokens_per_step
    columns: tuple[str, ...] = (
        "weights",
        "gradients",
        "optimizer",
        "communication",
        "activations",
        "logits",
        "working",
    )
    if any(stage.fp8_copies for stage in plan.stages):
        columns = ("weights", "fp8_copies", *columns[1:])
    lines = [
        f"parameters        {plan.parameters:,}",
        f"tokens per step   {plan.tokens_per_step:,}",
        f"tokens of the run {tokens:,}",
        "FLOPs             per token, of the run; forward and backward, full square of attention, no recompute",
        *(
            f"  {name:<16}{count:>16,}  {count * tokens:.3e}{source}"
            for name, count, source in (
                ("all", flops.total, ""),
                ("without head", flops.without_head, "  as in arXiv 2512.10858"),
                ("no attention", flops.without_attention, "  as in arXiv 2602.15014"),
            )
        ),
        f"checkpoint        {plan.checkpoint_bytes / GIB:.2f} GiB",
        "",
        "GiB per rank at the peak of forward and backward, and at the peak of the step:",
        "",
        f"{'stage':>5} {'layers':>6} " + " ".join(f"{name:>13}" for name in columns) + f" {'peak':>8}  at",
    ]
    for stage in plan.stages:
        numbers = " ".join(f"{getattr(stage, name) / GIB:>13.2f}" for name in columns)
        lines.append(f"{stage.stage:>5} {stage.num_layers:>6} {numbers} {stage.peak / GIB:>8.2f}  {stage.phase}")
    if host := max(stage.host for stage in plan.stages):
        lines += ["", f"and up to {host / GIB:.2f} GiB of host memory per rank for offloaded optimizer state"]
    worst = plan.worst
    room = device_memory_gib - worst.peak / GIB
    if room >= 0:
        lines += ["", f"fits {device_memory_gib:g} GiB: {room:.2f} GiB are left on the ranks of stage {worst.stage}"]
        return "\n".join(lines)
    too_large = ", ".join(str(stage.stage) for stage in plan.stages if stage.peak > device_memory_gib * GIB)
    lines += [
        "",
        f"does not fit {device_memory_gib:g} GiB on the ranks of stage(s) {too_large}; peak of the worst with",
    ]
    lines += [f"  {peak / GIB:>8.2f} GiB   {setting}" for setting, peak in help_with]
    return "\n".join(lines)
