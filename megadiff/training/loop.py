"""The training loop: step, and between two steps report, validate, save or stop when it is time.

Whatever one rank finds out alone (a signal, a clock, a file that is written) becomes a decision of all ranks at the
same step boundary, once per step. Everything that follows is a collective that all of them enter.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megadiff import accelerations
from megadiff.data.loader import Batch
from megadiff.devices import peak_tflops
from megadiff.parallel.groups import Groups
from megadiff.training.checkpoint import checkpoint_path, from_rank_zero
from megadiff.training.metrics import MetricsWriter, read_metrics
from megadiff.training.rank_monitor import rank_monitor
from megadiff.training.rerun import SuspectResultError
from megadiff.training.resilience import Decisions, StepBoundary
from megadiff.training.sinks import open_sinks
from megadiff.training.trainer import Trainer

if TYPE_CHECKING:
    from megadiff.config import TrainConfig

logger = logging.getLogger(__name__)


def train(config: TrainConfig, run_dir: Path, groups: Groups) -> bool:
    """Train `config` in `run_dir`, resuming what is there; returns whether the run is complete.

    Raises:
        ValueError: configuration, corpus, layout and run directory do not fit together; the directory is as it was.
        NonFiniteLossError, SuspectResultError: see `Trainer.train_step`.
        TimeoutError: data did not come in time.
    """
    trainer = Trainer(config, run_dir, groups)
    trainer.resume()
    from_rank_zero(lambda: _write_config(run_dir, config), groups.control)
    return run(trainer)


def _write_config(run_dir: Path, config: TrainConfig) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.yaml").write_text(config.to_yaml())


def run(trainer: Trainer) -> bool:
    """Train to the last step, or until a signal or the clock asks to stop.

    Returns:
        True when the run is complete, False when it was stopped; either way the newest checkpoint holds its state.

    Raises:
        NonFiniteLossError, SuspectResultError: see `train_step`.
        SaveError: the last checkpoint cannot be written.
    """
    training = trainer.config.training
    if trainer.completed_steps >= training.train_steps:
        logger.info("%s has already completed its %d steps", trainer.run_dir, training.train_steps)
        if not from_rank_zero(lambda: _has_validated(trainer), trainer.groups.control):
            with _open_writer(trainer) as writer:
                _validate(trainer, writer)
        return True
    logger.info(
        "training %s on tensor %d x context %d x pipeline %d x data %d: batches of %d x %d tokens, %d x %d at once",
        trainer.run_dir,
        trainer.groups.tp.size(),
        trainer.groups.cp.size(),
        trainer.groups.pp.size(),
        trainer.groups.dp.size(),
        training.global_batch_size_at(trainer.consumed_samples),
        trainer.config.data.sequence_length,
        training.micro_batch_size * trainer.groups.dp.size(),
        trainer.config.data.sequence_length,
    )
    used = accelerations.used(trainer.transformer_impl)
    logger.info("optimizer: %s; accelerations: %s", trainer.config.optimizer.description, used)
    if trainer.groups.rank == 0 and (concern := _concern_of(trainer.config)):
        logger.warning(concern)
    with (
        trainer.watchdog,
        rank_monitor() as send_heartbeat,
        StepBoundary(trainer.groups.control) as boundary,
        _open_writer(trainer) as writer,
    ):
        batches = trainer.training_batches()
        while trainer.completed_steps < training.train_steps:
            line = _step_or_save(trainer, batches)
            trainer.clock.record("step", line["step_time"])
            trainer.watchdog.beat("between two steps", step=trainer.completed_steps)
            send_heartbeat()
            if writer and trainer.observed:
                writer.training(line, trainer.observed, trainer.grad_norms)
            if _is_due(trainer, training.log_interval):
                _report_stragglers(trainer, writer)

            is_last = trainer.completed_steps == training.train_steps
            validates = is_last or _is_due(trainer, trainer.config.validation.interval)
            saves = is_last or _is_due(trainer, trainer.config.checkpoint.interval)
            upcoming = ["validation"] * validates + ["save"] * saves + ["step", "save"] * (not is_last)
            decisions = boundary.agree(
                time_is_up=trainer.clock.is_up(*upcoming),
                save_is_due=trainer.groups.rank == 0 and trainer.writer.is_due_by_clock,
                is_writing=trainer.writer.is_writing,
            )
            if trainer.writer.in_flight and not decisions.is_writing:
                trainer.collect_save()
            # Whoever asks to stop may not wait for long: save at once. The last validation is made up for later.
            if validates and not decisions.stop:
                _validate(trainer, writer)
            if saves or decisions.save or decisions.stop:
                trainer.save(is_final=is_last or decisions.stop is not None)
            if decisions.stop:
                _log_stop(trainer, decisions)
                return False
            if trainer.groups.rank == 0:
                trainer.clock.warn_if_grace_is_short()
    return True


def _has_validated(trainer: Trainer) -> bool:
    """Whether the metrics of the run hold a validation of its last step."""
    lines = read_metrics(trainer.run_dir)
    return any(line["step"] == trainer.completed_steps and "split" in line for line in lines)


def _concern_of(config: TrainConfig) -> str:
    """What Transformer Engine is to be warned of, where the run would have it; empty else."""
    model = config.model
    wants_it = (model.transformer_impl, model.attention_backend) != ("local", "local")
    return accelerations.transformer_engine_concern() if wants_it and config.training.precision != "fp32" else ""


def _step_or_save(trainer: Trainer, batches: Iterator[Batch]) -> dict[str, Any]:
    """`train_step`, or where another start must compute the step once more, the checkpoint that this needs."""
    try:
        return trainer.train_step(batches)
    except SuspectResultError as error:
        trainer.collect_save()
        if error.needs_checkpoint and trainer.last_checkpoint != checkpoint_path(
            trainer.run_dir, trainer.completed_steps
        ):
            trainer.save(is_final=True)
        raise


def _report_stragglers(trainer: Trainer, writer: MetricsWriter | None) -> None:
    """Compare the ranks' own work; a collective of the whole job."""
    report = trainer.stragglers.report(trainer.completed_steps)
    if writer:
        writer.stragglers(trainer.completed_steps, report)


def _log_stop(trainer: Trainer, decisions: Decisions) -> None:
    spent = ""
    if decisions.seconds_since_signal:
        step, save = decisions.seconds_since_signal, trainer.clock.last("save")
        spent = f", {step + save:.1f}s after the signal ({step:.1f}s to end the step, {save:.1f}s to save)"
    logger.info("stopped by %s after step %d%s; start again to go on", decisions.stop, trainer.completed_steps, spent)


def _open_writer(trainer: Trainer) -> AbstractContextManager[MetricsWriter | None]:
    """The files of the run on rank 0, nothing elsewhere."""
    if trainer.groups.rank != 0:
        return nullcontext()
    config, device = trainer.config, trainer.groups.device
    tflops = peak_tflops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return MetricsWriter(
        trainer.run_dir,
        open_sinks(config.watch, trainer.run_dir, trainer.completed_steps, dataclasses.asdict(config)),
        config.training,
        resumed_step=trainer.completed_steps,
        flops_per_sample=config.flops_per_token(trainer.step.vocab_size).total * config.data.sequence_length,
        peak_flops=None if tflops is None else tflops * 1e12 * trainer.groups.world_size,
        device=device,
    )


def _is_due(trainer: Trainer, interval: int) -> bool:
    return interval > 0 and trainer.completed_steps % interval == 0


def _validate(trainer: Trainer, writer: MetricsWriter | None) -> None:
    """Estimate the bound, let the model write, and record both; a collective of the whole job."""
    estimate, corpus = trainer.validate(), trainer.corpus.manifest
    logger.info("validation: %s; unigram entropy of the corpus %.4f nats/token", estimate, corpus.unigram_entropy)
    if writer:
        writer.validation(
            {
                "step": trainer.completed_steps,
                "split": "validation",
                "nelbo": estimate.nelbo,
                "nelbo_stderr": estimate.stderr,
                "bits_per_byte": estimate.bits_per_byte,
                "num_sequences": estimate.num_sequences,
                "unigram_entropy": corpus.unigram_entropy,
                "corpus_sha256": corpus.corpus_sha256,
                "corpus_python": corpus.python_version,
            }
        )
    texts = trainer.write_texts()
    if writer:
        writer.texts(trainer.completed_steps, texts)
