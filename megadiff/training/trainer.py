"""One run on this rank: assembled, resumed, stepped, validated and saved; when it is time for what, the loop decides.

State is the number of completed steps, the parameters, the optimizer's moments and the average of the weights.
Everything else (which samples come next, their noise, the learning rate) is a function of the step and is recomputed,
so a run that was killed goes on as if nothing had happened.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from megadiff import accelerations
from megadiff.data.corpus import TOKENIZER_NAME, Corpus
from megadiff.data.loader import Batch
from megadiff.data.tokenizer import Tokenizer
from megadiff.evaluation.generate import GenerateConfig
from megadiff.evaluation.likelihood import NelboEstimate, estimate_nelbo
from megadiff.evaluation.trace import written_texts
from megadiff.machine.versions import versions
from megadiff.models.denoiser import build_denoiser
from megadiff.models.whole import undivided
from megadiff.parallel.groups import Groups
from megadiff.training.adam import set_step_count
from megadiff.training.agreement import check_agreement, implementations
from megadiff.training.checkpoint import choose_checkpoint
from megadiff.training.chunks import parameters_gathered, wrap_chunks
from megadiff.training.ema import WeightAverage
from megadiff.training.identity import check_resumable, model_identity
from megadiff.training.initial import load_initial_weights
from megadiff.training.metrics import format_duration
from megadiff.training.observed import NUM_SUMS, Observed
from megadiff.training.optimizer import build_optimizer, grad_norms, set_hyperparameters
from megadiff.training.rerun import Result, StepRerun
from megadiff.training.resilience import NonFiniteLossError, RunClock
from megadiff.training.state import load_checkpoint
from megadiff.training.step import VALIDATION_SEED
from megadiff.training.stragglers import Stragglers
from megadiff.training.watchdog import Watchdog
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
            ValueError: corpus, model and layout do not fit together, or ranks would train by different code.
        """
        self.config, self.run_dir, self.groups = config, run_dir, groups
        check_agreement(implementations(config), groups.control)
        self.corpus = Corpus.open(config.data.path)
        length, seed = config.data.sequence_length, config.training.seed
        self.train_loader = config.data.loader(self.corpus, "train", seed)
        self.validation_loader = config.data.loader(self.corpus, "validation", VALIDATION_SEED)
        dtype = DTYPES[config.training.parameter_precision]

        self.clock = RunClock(config.training)
        self.watchdog = Watchdog(groups.connect_to_store(), groups.rank, groups.world_size, timeout=config.hang_timeout)
        self.stragglers = Stragglers(groups, threshold=config.training.straggler_ratio)
        self.rerun = StepRerun(config.training, config.to_yaml(), groups, run_dir)

        self.step = dataclasses.replace(
            config.denoising_step(self.corpus, groups),
            on_micro_batch=partial(self.watchdog.beat, "computing a micro-batch"),
        )
        self.attention = config.resolved_attention()
        self.transformer_impl = config.resolved_transformer_impl()
        self.denoisers = build_denoiser(
            config.model,
            groups,
            vocab_size=self.step.vocab_size,
            sequence_length=self.step.objective.sequence_length(length),
            seed=seed,
            dtype=dtype,
            attention=self.attention,
            transformer_impl=self.transformer_impl,
            fp8=config.used_fp8,
        )
        self.chunks = wrap_chunks(self.denoisers, config.parallel, before_reduction=self._before_reduction)
        self.optimizer = build_optimizer(config.optimizer, self.chunks, groups, scales=config.model.scales, dtype=dtype)
        decay = config.optimizer.ema_decay
        self.average = None if decay is None else WeightAverage(self.optimizer, decay)

        self.tokenizer = (self.corpus.directory / TOKENIZER_NAME).read_bytes()
        self.writer = CheckpointWriter(run_dir, config.checkpoint, groups)

        self.completed_steps = 0
        self.consumed_samples = 0
        self.last_checkpoint: Path | None = None
        self.last_validation: dict[str, Any] | None = None
        self.init_from: dict[str, Any] | None = None
        """Where the weights of a new run came from."""
        self.observed: Observed | None = None
        """Sums of the last step."""
        self.grad_norms: dict[str, float] = {}
        """Gradient norm by group of parameters, of the last step that was reported; before clipping."""

    def _before_reduction(self) -> None:
        """This rank's own work for a step is done; from here on it waits for others."""
        self.stragglers.end()
        self.watchdog.beat("reducing gradients")

    def model_identity(self) -> dict[str, Any]:
        """What must agree between a checkpoint and the run that resumes from it."""
        return model_identity(
            self.config.model,
            vocab_size=self.step.vocab_size,
            mask_id=self.step.mask_id,
            tokenizer=self.tokenizer,
            precision=self.config.training.parameter_precision,
        )

    def manifest(self) -> dict[str, Any]:
        """Everything a checkpoint tells about itself."""
        corpus = self.corpus.manifest
        return {
            "step": self.completed_steps,
            "consumed_samples": self.consumed_samples,
            "consumed_tokens": self.consumed_samples * self.step.sequence_length,
            **self.model_identity(),
            **{name: getattr(corpus, name) for name in ("bos_id", "eos_id", "pad_id")},
            "init_from": self.init_from,
            "optimizer": self.config.optimizer.description,
            "optimizer_algorithm": self.config.optimizer.algorithm,
            "accelerations": accelerations.used(self.transformer_impl),
            "ema_decay": self.config.optimizer.ema_decay,
            "attention": self.attention,
            "transformer_impl": self.transformer_impl,
            "linear_precision": self.config.training.precision,
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
            "versions": versions(),
        }

    def resume(self) -> None:
        """Continue from the checkpoint that `checkpoint.load` means, or begin with the weights of `training.init_from`.

        Raises:
            ValueError: no such checkpoint is good, or it belongs to another model.
        """
        training = self.config.training
        chosen = choose_checkpoint(self.run_dir, self.config.checkpoint, self.groups.control)
        if chosen is not None:
            self._load(*chosen)
        elif training.init_from is not None:
            identity = self.model_identity() | {"model": self.config.model.architecture}
            del identity["precision"]
            self.init_from = load_initial_weights(
                Path(training.init_from),
                training.init_weights,
                self.denoisers,
                self.optimizer,
                expected=identity,
                verify=self.config.checkpoint.verify,
                control=self.groups.control,
            )
            if self.average is not None:
                self.average.restart()
        self.rerun.resume(self.completed_steps)

    def _load(self, checkpoint: Path, manifest: dict[str, Any]) -> None:
        saved = yaml.safe_load((checkpoint / "config.yaml").read_text())
        check_resumable(checkpoint, manifest, saved, config=self.config, expected=self.model_identity())
        has_average = manifest.get("ema_decay") is not None
        average = self.average if has_average else None
        load_checkpoint(checkpoint, self.denoisers, self.optimizer, average, control=self.groups.control)
        self.completed_steps, self.consumed_samples = manifest["step"], manifest["consumed_samples"]
        set_step_count(self.optimizer.optimizer, self.completed_steps)
        self.last_checkpoint, self.last_validation = checkpoint, manifest["validation"]
        self.init_from = manifest.get("init_from")
        logger.info("resumed from %s", checkpoint)
        if self.average is not None and not has_average:
            self.average.restart()
            logger.info("%s holds no average of the weights: it begins at the loaded ones", checkpoint.name)
        if self.average is None and has_average:
            logger.info("the average of the weights in %s ends here: optimizer.ema_decay is none", checkpoint.name)
        for difference in self.config.differences(saved):
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

    def _gradients(self, batches: Iterator[Batch], num_micro_batches: int) -> tuple[float, Observed, float]:
        """Forward and backward over the micro-batches of a step; gradients are reduced, divided and clipped.

        Returns:
            The mean loss of this rank's own samples (0 where it has none), the sums of the whole job, and the gradient
            norm before clipping.
        """
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        self.stragglers.begin()
        logged = self.step.run_micro_batches(self.chunks, batches, num_micro_batches)
        sums = torch.stack(logged).sum(dim=0) if logged else torch.zeros(NUM_SUMS, dtype=torch.float64)
        own = self.step.sum_over_context(sums)
        # Read from the device at once; the reduction works in place.
        *totals, own_loss, _, own_tokens = torch.cat([self.step.reduce_over_job(own.clone()), own[:3]]).tolist()
        self.optimizer.prepare_grads()
        if self.config.training.is_reported(self.completed_steps + 1):
            self.grad_norms = grad_norms(self.optimizer)
        clip = self.config.optimizer.clip_grad
        grad_norm = self.optimizer.clip_grad_norm(clip) if clip else self.optimizer.get_grad_norm()
        return own_loss / max(own_tokens, 1.0), Observed.of(totals), grad_norm

    def train_step(self, batches: Iterator[Batch]) -> dict[str, Any]:
        """One optimizer step over one global batch; returns its line for metrics.jsonl.

        Raises:
            NonFiniteLossError: loss or gradient norm is not finite; parameters are as before the step.
            SuspectResultError: the same, and the rerun state machine has judged it.
        """
        started = time.perf_counter()
        config = self.config.training
        global_batch_size = config.global_batch_size_at(self.consumed_samples)
        num_micro_batches = global_batch_size // (config.micro_batch_size * self.groups.dp.size())
        ordinals = [self.consumed_samples, self.consumed_samples + global_batch_size]

        # 1. forward and backward, once, or again where the result is suspect
        for micro_batches in self.rerun.attempts(batches, num_micro_batches):
            own, observed, grad_norm = self._gradients(micro_batches, num_micro_batches)
            num_tokens = observed.num_tokens
            loss, nelbo = observed.loss / num_tokens, observed.nelbo / num_tokens
            self.rerun.validate(Result(own_loss=own, loss=loss, grad_norm=grad_norm))

        # 2. check before anything is updated; loss and norm are global, so all ranks decide alike
        self.rerun.settle(self.completed_steps + 1)
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self.collect_save()
            raise NonFiniteLossError(
                f"loss {loss} and gradient norm {grad_norm} at step {self.completed_steps + 1}, sample ordinals "
                f"{ordinals[0]} to {ordinals[1] - 1}; the last good checkpoint is "
                f"{self.last_checkpoint or 'none (nothing was saved yet)'}: lower optimizer.lr or look at these samples"
            )

        # 3. update
        learning_rate = self.config.optimizer.learning_rate(self.completed_steps, config.train_steps)
        set_hyperparameters(self.optimizer, self.config.optimizer, self.config.model.scales, learning_rate)
        self.optimizer.step_with_ready_grads()
        self.completed_steps += 1
        if self.average is not None:
            self.average.update(self.completed_steps)
        self.consumed_samples, self.observed = ordinals[1], observed

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
        """Estimate the bound on the validation split, for the manifest, too; a collective of the whole job."""
        started = time.monotonic()
        with parameters_gathered(self.chunks):
            estimate = estimate_nelbo(
                self.step, self.chunks, self.validation_loader, self.config.validation.num_sequences
            )
        self.clock.record("validation", time.monotonic() - started)
        self.last_validation = {"step": self.completed_steps, **dataclasses.asdict(estimate)}
        return estimate

    def write_texts(self) -> dict[str, str]:
        """What the model writes now, Markdown by name; empty on the ranks of other copies. A collective of the job."""
        watch = self.config.watch
        if not watch.num_texts:
            return {}
        with parameters_gathered(self.chunks):
            if self.groups.dp.rank() != 0 or self.groups.cp.rank() != 0:
                return {}
            return written_texts(
                GenerateConfig(
                    prompt=watch.text_prompt,
                    length=watch.text_length,
                    num_denoising_steps=watch.text_steps,
                    num_samples=watch.num_texts,
                ),
                undivided(self.config.model, self.denoisers, self.groups, vocab_size=self.step.vocab_size),
                self.config.objective,
                Tokenizer(self.tokenizer),
                trained_on_prompts=self.config.data.kind == "examples",
            )

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
        self.watchdog.beat("saving a checkpoint")
        overlap = self.config.checkpoint.async_save and not is_final
        try:
            with self._patience(), parameters_gathered(self.chunks):
                self.writer.start(
                    self.completed_steps,
                    self.denoisers,
                    self.optimizer,
                    self.average,
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
            with self._patience():
                self.last_checkpoint, seconds = self.writer.finish()
            self.clock.record("save", seconds)
            logger.info("saved %s in %s", self.last_checkpoint, format_duration(seconds))
        except SaveError as error:
            self._take_note_of(error, is_final)

    def _patience(self) -> AbstractContextManager[None]:
        """Who waits for a save waits in a collective: as long as one may take, and no longer."""
        return self.watchdog.patience(60 * self.config.parallel.timeout_minutes)

    def _take_note_of(self, error: SaveError, is_final: bool) -> None:
        if is_final:
            raise error
        if self.groups.rank == 0:
            logger.error("%s; training goes on", error)
