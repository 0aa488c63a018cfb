"""The training loop: assemble, resume, step, and report, validate, save or stop when it is time.

State is the number of completed steps, the parameters and the optimizer's moments. Everything else (which samples
come next, their noise, the learning rate) is a function of the step and is recomputed, so a run that was killed goes
on as if nothing had happened.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import logging
import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import yaml

from megadiff.data.corpus import TOKENIZER_NAME, Corpus
from megadiff.data.loader import Batch, BatchLoader
from megadiff.evaluation.likelihood import NelboEstimate, estimate_nelbo
from megadiff.models.denoiser import build_denoiser, padded_vocab_size
from megadiff.parallel.groups import Groups
from megadiff.training.checkpoint import check_same_model, choose_checkpoint
from megadiff.training.chunks import parameters_gathered, wrap_chunks
from megadiff.training.metrics import MetricsWriter, format_duration
from megadiff.training.optimizer import build_optimizer, set_hyperparameters, set_step_count
from megadiff.training.resilience import NonFiniteLossError, StopSignal
from megadiff.training.state import load_checkpoint
from megadiff.training.step import VALIDATION_SEED
from megadiff.training.writer import CheckpointWriter, SaveError

if TYPE_CHECKING:
    from megadiff.config import TrainConfig

logger = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Trainer:
    """One run on this rank: its model, its optimizer and its place in the job."""

    def __init__(self, config: TrainConfig, run_dir: Path, groups: Groups) -> None:
        """Assemble everything; a collective of the whole job.

        Raises:
            ValueError: corpus, model and layout do not fit together.
        """
        self.config, self.run_dir, self.groups = config, run_dir, groups
        self.corpus = Corpus.open(config.data.path)
        length, seed = config.data.sequence_length, config.training.seed
        self.train_loader = BatchLoader(self.corpus.split("train"), length, seed)
        self.validation_loader = BatchLoader(self.corpus.split("validation"), length, VALIDATION_SEED)
        dtype = DTYPES[config.training.precision]

        self.step = config.denoising_step(self.corpus, groups)
        self.attention = config.model.resolved_attention(config.parallel, documents=config.data.reset_at_document)
        self.denoisers = build_denoiser(
            config.model,
            groups,
            vocab_size=self.step.vocab_size,
            sequence_length=self.step.objective.sequence_length(length),
            seed=seed,
            dtype=dtype,
            attention=self.attention,
        )
        self.chunks = wrap_chunks(self.denoisers, config.parallel)
        self.optimizer = build_optimizer(config.optimizer, self.chunks, groups, dtype=dtype)

        self.tokenizer = (self.corpus.directory / TOKENIZER_NAME).read_bytes()
        self.writer = CheckpointWriter(run_dir, config.checkpoint, groups)

        self.completed_steps = 0
        self.consumed_samples = 0
        self.last_checkpoint: Path | None = None
        self.last_validation: dict[str, Any] | None = None

    def model_identity(self) -> dict[str, Any]:
        """What must agree between a checkpoint and the run that resumes from it."""
        model = dataclasses.asdict(self.config.model)
        for name in ("fused_head_loss", "attention_backend"):
            del model[name]  # says how the model is computed, not which it is
        return {
            "model": model,
            "vocab_size": self.step.vocab_size,
            "padded_vocab_size": padded_vocab_size(self.step.vocab_size),
            "mask_id": self.step.mask_id,
            "tokenizer_sha256": hashlib.sha256(self.tokenizer).hexdigest(),
            "precision": self.config.training.precision,
        }

    def manifest(self) -> dict[str, Any]:
        """Everything a checkpoint tells about itself."""
        corpus = self.corpus.manifest
        return {
            "step": self.completed_steps,
            "consumed_samples": self.consumed_samples,
            "consumed_tokens": self.consumed_samples * self.step.sequence_length,
            **self.model_identity(),
            **{name: getattr(corpus, name) for name in ("bos_id", "eos_id", "pad_id")},
            "optimizer": "torch.optim.AdamW(fused)",
            "attention": self.attention,
            "layout": {
                "tensor": self.groups.tp.size(),
                "context": self.groups.cp.size(),
                "pipeline": self.groups.pp.size(),
                "virtual_stages": self.config.parallel.num_virtual_stages,
                "data": self.groups.dp.size(),
            },
            "corpus_sha256": corpus.corpus_sha256,
            "corpus_python": corpus.python_version,
            "validation": self.last_validation,
            "versions": {name: importlib.metadata.version(name) for name in ("megadiff", "megatron-core", "torch")},
        }

    def resume(self) -> None:
        """Continue from the checkpoint that `checkpoint.load` means, if there is one.

        Raises:
            ValueError: no such checkpoint is good, or it belongs to another model.
        """
        chosen = choose_checkpoint(self.run_dir, self.config.checkpoint, self.groups.control)
        if chosen is None:
            return
        checkpoint, manifest = chosen
        check_same_model(checkpoint, manifest, self.model_identity())
        load_checkpoint(checkpoint, self.denoisers, self.optimizer, control=self.groups.control)
        self.completed_steps, self.consumed_samples = manifest["step"], manifest["consumed_samples"]
        set_step_count(self.optimizer, self.completed_steps)
        self.last_checkpoint, self.last_validation = checkpoint, manifest["validation"]
        logger.info("resumed from %s", checkpoint)
        for difference in self.config.differences(yaml.safe_load((checkpoint / "config.yaml").read_text())):
            logger.info("changed since %s: %s", checkpoint.name, difference)

    def training_batches(self) -> Iterator[Batch]:
        """This rank's micro-batches from the next step on; ordinals alone where a tensor-parallel peer reads for us."""
        training = self.config.training
        return self.train_loader.iterate(
            start_sample=self.consumed_samples,
            global_batch_size=training.global_batch_size,
            micro_batch_size=training.micro_batch_size,
            data_parallel_rank=self.groups.dp.rank(),
            data_parallel_size=self.groups.dp.size(),
            read=self.groups.tp.rank() == 0,
        )

    def train_step(self, batches: Iterator[Batch]) -> dict[str, Any]:
        """One optimizer step over one global batch; returns its line for metrics.jsonl.

        Raises:
            NonFiniteLossError: loss or gradient norm is not finite; parameters are as before the step.
        """
        started = time.perf_counter()
        config = self.config.training
        global_batch_size = config.global_batch_size_at(self.consumed_samples)
        num_micro_batches = global_batch_size // (config.micro_batch_size * self.groups.dp.size())
        ordinals = [self.consumed_samples, self.consumed_samples + global_batch_size]

        # 1. forward and backward over all micro-batches; gradients come back reduced and divided by the token count
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        logged = self.step.run_micro_batches(self.chunks, batches, num_micro_batches)
        sums = torch.stack(logged).sum(dim=0) if logged else torch.zeros(3, dtype=torch.float64)
        loss_sum, nelbo_sum, num_tokens = self.step.reduce_over_job(self.step.sum_over_context(sums)).tolist()

        # 2. check before anything is updated; the norm is global, so all ranks decide alike
        self.optimizer.prepare_grads()
        clip = self.config.optimizer.clip_grad
        grad_norm = self.optimizer.clip_grad_norm(clip) if clip else self.optimizer.get_grad_norm()
        loss, nelbo = loss_sum / num_tokens, nelbo_sum / num_tokens
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self.collect_save()
            raise NonFiniteLossError(
                f"loss {loss} and gradient norm {grad_norm} at step {self.completed_steps + 1}, sample ordinals "
                f"{ordinals[0]} to {ordinals[1] - 1}; the last good checkpoint is "
                f"{self.last_checkpoint or 'none (nothing was saved yet)'}: lower optimizer.lr or look at these samples"
            )

        # 3. update
        learning_rate = self.config.optimizer.learning_rate(self.completed_steps, config.train_steps)
        set_hyperparameters(self.optimizer, self.config.optimizer, learning_rate)
        self.optimizer.step_with_ready_grads()
        self.completed_steps += 1
        self.consumed_samples = ordinals[1]

        step_time = time.perf_counter() - started
        return {
            "step": self.completed_steps,
            "consumed_samples": self.consumed_samples,
            "consumed_tokens": self.consumed_samples * self.step.sequence_length,
            "ordinals": ordinals,
            "loss": loss,
            "nelbo": nelbo,
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "tokens_per_second": num_tokens / step_time,
            "step_time": step_time,
        }

    def validate(self) -> NelboEstimate:
        """Estimate the bound on the validation split; a collective of the whole job."""
        with parameters_gathered(self.chunks):
            return estimate_nelbo(self.step, self.chunks, self.validation_loader, self.config.validation.num_sequences)

    def save(self, *, is_final: bool = False) -> None:
        """Write a checkpoint of the completed steps; a collective of the whole job.

        With `checkpoint.async_save` it is published later, by `collect_save`. A checkpoint that cannot be written is
        reported, and training goes on.

        Args:
            is_final: nothing will change the state any more: wait, and fail if it cannot be written.

        Raises:
            SaveError: with `is_final`, it cannot be written.
        """
        self.collect_save()
        overlap = self.config.checkpoint.async_save and not is_final
        try:
            with parameters_gathered(self.chunks):
                self.writer.start(
                    self.completed_steps,
                    self.denoisers,
                    self.optimizer,
                    manifest=self.manifest(),
                    config_yaml=self.config.to_yaml(),
                    tokenizer=self.tokenizer,
                    overlap=overlap,
                )
        except SaveError as error:
            self._take_note_of(error, is_final)
        if not overlap:
            self.collect_save(is_final=is_final)

    def collect_save(self, *, is_final: bool = False) -> None:
        """Wait for the checkpoint that is being written, if one is, and publish it; a collective of the whole job.

        Raises:
            SaveError: with `is_final`, it could not be written.
        """
        if not self.writer.in_flight:
            return
        try:
            self.last_checkpoint, seconds = self.writer.finish()
            logger.info("saved %s in %s", self.last_checkpoint, format_duration(seconds))
        except SaveError as error:
            self._take_note_of(error, is_final)

    def _take_note_of(self, error: SaveError, is_final: bool) -> None:
        if is_final:
            raise error
        if self.groups.rank == 0:
            logger.error("%s; training goes on", error)

    def run(self) -> bool:
        """Train to the last step, or until a signal asks to stop.

        Returns:
            True when the run is complete, False when it was stopped; either way the newest checkpoint holds its state.

        Raises:
            NonFiniteLossError: see `train_step`.
            SaveError: the last checkpoint cannot be written.
        """
        training = self.config.training
        if self.completed_steps >= training.train_steps:
            logger.info("%s has already completed its %d steps", self.run_dir, training.train_steps)
            if self.last_validation is None or self.last_validation["step"] != self.completed_steps:
                with self._writer() as writer:
                    self._record(writer, self.validate())
            return True
        logger.info(
            "training %s on tensor %d x context %d x pipeline %d x data %d: batches of %d x %d tokens, %d x %d at once",
            self.run_dir,
            self.groups.tp.size(),
            self.groups.cp.size(),
            self.groups.pp.size(),
            self.groups.dp.size(),
            training.global_batch_size_at(self.consumed_samples),
            self.config.data.sequence_length,
            training.micro_batch_size * self.groups.dp.size(),
            self.config.data.sequence_length,
        )
        with StopSignal(self.groups.control) as stop, self._writer() as writer:
            batches = self.training_batches()
            while self.completed_steps < training.train_steps:
                line = self.train_step(batches)
                if writer:
                    writer.training(line)
                is_last = self.completed_steps == training.train_steps
                signal_name = stop.agreed()
                is_save_due, is_written = self.writer.agree()
                if is_written:
                    self.collect_save()
                # Whoever asks to stop may not wait for long: save at once. The last validation is made up for later.
                if not signal_name and (is_last or self._is_due(self.config.validation.interval)):
                    self._record(writer, self.validate())
                if is_last or signal_name or is_save_due or self._is_due(self.config.checkpoint.interval):
                    self.save(is_final=bool(is_last or signal_name))
                if signal_name:
                    logger.info("stopped by %s after step %d; start again to go on", signal_name, self.completed_steps)
                    return False
        return True

    def _writer(self) -> AbstractContextManager[MetricsWriter | None]:
        """The files of the run on rank 0, nothing elsewhere."""
        if self.groups.rank != 0:
            return nullcontext()
        return MetricsWriter(
            self.run_dir,
            resumed_step=self.completed_steps,
            train_steps=self.config.training.train_steps,
            console_interval=self.config.training.log_interval,
        )

    def _is_due(self, interval: int) -> bool:
        return interval > 0 and self.completed_steps % interval == 0

    def _record(self, writer: MetricsWriter | None, estimate: NelboEstimate) -> None:
        """Keep a validation for the manifest and write it down."""
        corpus = self.corpus.manifest
        logger.info("validation: %s; unigram entropy of the corpus %.4f nats/token", estimate, corpus.unigram_entropy)
        self.last_validation = {"step": self.completed_steps, **dataclasses.asdict(estimate)}
        if writer:
            writer.validation(
                {
                    "step": self.completed_steps,
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


def train(config: TrainConfig, run_dir: Path, groups: Groups) -> bool:
    """Train `config` in `run_dir`, resuming what is there; returns whether the run is complete.

    Raises:
        ValueError: configuration, corpus, layout and run directory do not fit together; the directory is as it was.
        NonFiniteLossError: see `Trainer.train_step`.
    """
    trainer = Trainer(config, run_dir, groups)
    trainer.resume()
    if groups.rank == 0:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "config.yaml").write_text(config.to_yaml())
    dist.barrier()
    return trainer.run()
