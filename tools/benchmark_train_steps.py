"""What `benchmark_train.py` measures on a rank: training steps that differ in nothing but the forward step.

One `Trainer` holds model, data, optimizer and data-parallel wrapper; contenders take turns as its `step`. Ours is the
`DenoisingStep` of a run. The ones it is measured against read clean tokens and take a vocabulary-parallel cross-entropy
of every position, as Megatron's `compute_language_model_loss` does, by each of its implementations that can run: no
noise, no bound, and only the loss is logged.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from benchmark_train_cases import AUTOREGRESSIVE, BASELINE, FUSED_BASELINE, OURS, TRANSFORMER_ENGINE_BASELINE
from benchmark_train_machine import Clocks
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
from megatron.core.models.common.language_module.language_module import te_parallel_cross_entropy
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor

from megadiff.accelerations import why_no_transformer_engine
from megadiff.config import TrainConfig
from megadiff.data.corpus import (
    MANIFEST_NAME,
    SPLITS,
    TOKEN_BYTES_NAME,
    TOKENIZER_NAME,
    CorpusManifest,
    SplitSize,
)
from megadiff.data.loader import Batch
from megadiff.diffusion import AttentionLayout, NoisedBatch, document_numbers
from megadiff.diffusion.layout import positions_in_documents
from megadiff.objectives import GiddConfig
from megadiff.parallel import groups as parallel_groups
from megadiff.parallel.batch import broadcast_batch
from megadiff.parallel.groups import Groups
from megadiff.training.checkpoint import from_rank_zero
from megadiff.training.observed import NUM_SUMS
from megadiff.training.step import DenoisingStep
from megadiff.training.trainer import Trainer

T = TypeVar("T")

NUM_SPECIAL_IDS, END_ID, MASK_ID = 4, 1, 3
DOCUMENT_TOKENS = 300


def zipf_tokens(vocab_size: int, num_tokens: int) -> np.ndarray:
    """Return random tokens that occur as often as Zipf's law states, int32 [num_tokens]."""
    generator = np.random.default_rng(0)
    rank = (vocab_size - NUM_SPECIAL_IDS) ** generator.random(num_tokens)  # between 1 and their number, density 1/rank
    return (NUM_SPECIAL_IDS - 1 + rank).astype(np.int32)


def write_corpus(directory: Path, vocab_size: int, tokens: np.ndarray) -> None:
    """Write tokens as a corpus of documents of 300.

    It trains nothing, but it is read, noised and embedded like text, with any vocabulary and at once.

    Args:
        tokens: ordinary ids, int32; the last one of each document is replaced by the end of the document.
    """
    directory.mkdir(parents=True)
    num_tokens = len(tokens)
    tokens[DOCUMENT_TOKENS - 1 :: DOCUMENT_TOKENS] = END_ID
    lengths = [len(part) for part in np.split(tokens, range(DOCUMENT_TOKENS, num_tokens, DOCUMENT_TOKENS))]
    for split in SPLITS:
        builder = IndexedDatasetBuilder(str(directory / f"{split}.bin"), dtype=np.int32)
        builder.add_document(tokens, lengths)
        builder.finalize(str(directory / f"{split}.idx"))
    size = SplitSize(num_documents=len(lengths), num_bytes=num_tokens, num_tokens=num_tokens)
    nowhere = dict.fromkeys(("fingerprint", "corpus_sha256", "python_version", "command", "tokenizer_sha256"), "")
    numbers = dict.fromkeys(("validation_fraction", "unigram_entropy", "unigram_bits_per_byte"), 0.0)
    ids = {"bos_id": 0, "eos_id": END_ID, "pad_id": 2, "mask_id": MASK_ID, "unk_id": 0}
    facts: dict[str, Any] = {**nowhere, **numbers, **ids, "train": size, "validation": size}
    (directory / TOKENIZER_NAME).write_bytes(b"")
    np.save(directory / TOKEN_BYTES_NAME, np.ones(vocab_size, dtype=np.int32))
    CorpusManifest(source="random tokens", vocab_size=vocab_size, **facts).save(directory / MANIFEST_NAME)


# ------------------------------------------------------------------------------------------------------- contenders


@dataclass(frozen=True, kw_only=True)
class CleanRows:
    """What cross-entropy wants to know of a micro-batch, [B, L] each."""

    target: Tensor
    counted: Tensor


CrossEntropy = Callable[[Tensor, Tensor, dist.ProcessGroup], Tensor]
"""From logits [S, B, W], which it may overwrite, targets [S, B] and the tensor-parallel group: losses [S, B]."""


def _unfused(logits_SBW: Tensor, target_SB: Tensor, tp_group: dist.ProcessGroup) -> Tensor:
    return vocab_parallel_cross_entropy(logits_SBW, target_SB)


def _transformer_engines(logits_SBW: Tensor, target_SB: Tensor, tp_group: dist.ProcessGroup) -> Tensor:
    # Its kernel reads the strides, which a tensor with one column may state in any way; as Megatron calls it.
    strided_SB = target_SB.as_strided(target_SB.shape, (target_SB.shape[1], 1))
    return te_parallel_cross_entropy(logits_SBW, strided_SB, tp_group)


def cross_entropies(config: TrainConfig) -> dict[str, CrossEntropy]:
    """Megatron's implementations that can run here, by the contender's name; the last one is the most fused."""
    found: dict[str, CrossEntropy] = {BASELINE: _unfused}
    if config.training.parameter_precision == "bf16":  # to which it rounds its gradient, whatever the logits are
        found[FUSED_BASELINE] = fused_vocab_parallel_cross_entropy
    if not why_no_transformer_engine() and te_parallel_cross_entropy is not None:
        found[TRANSFORMER_ENGINE_BASELINE] = _transformer_engines
    return found


def contenders(config: TrainConfig, ours: Sequence[str]) -> list[str]:
    """The names of all steps that take turns: some of ours, and all plain ones that can run here."""
    return [*ours, *cross_entropies(config), AUTOREGRESSIVE]


@dataclass(frozen=True, kw_only=True)
class CrossEntropyStep(DenoisingStep):
    """The step of a run with clean tokens and Megatron's cross-entropy in place of noise, row loss and bound."""

    cross_entropy: CrossEntropy
    autoregressive: bool = False
    """Causal attention and the next token as target; else every position sees all, its own target too."""

    def noised_batch(self, batch: Batch, *, validation: bool) -> NoisedBatch:
        """The batch without noise, and rows for cross-entropy."""
        tokens_BL, counted_BL, _ = broadcast_batch(
            (batch.tokens_BL, batch.loss_mask_BL, batch.given_BL) if self.groups.tp.rank() == 0 else None,
            batch_size=self.micro_batch_size,
            sequence_length=self.sequence_length,
            groups=self.groups,
        )
        target_BL = tokens_BL
        if self.autoregressive:
            target_BL = tokens_BL.roll(-1, dims=1)
            counted_BL[:, -1] = False
        position_BL = torch.arange(tokens_BL.shape[1], device=tokens_BL.device).expand(tokens_BL.shape)
        document_BL = None
        if self.document_end_id is not None:
            document_BL = document_numbers(tokens_BL, self.document_end_id)
            position_BL = positions_in_documents(document_BL)
        return NoisedBatch(
            noised_BS=tokens_BL,
            position_BS=position_BL,
            layout=AttentionLayout("causal" if self.autoregressive else "bidirectional", document_BL),
            rows=cast(Any, CleanRows(target=target_BL, counted=counted_BL)),
        )

    def _training_loss(self, noised: NoisedBatch, output: Any) -> tuple[Tensor, Tensor, Tensor]:
        """(Σ loss, number of counted tokens, logged sums); the loss once more where a bound would be logged."""
        rows = noised.rows
        loss_SB = self.cross_entropy(output, rows.target.t().contiguous(), self.groups.tp)
        loss = (loss_SB * rows.counted.t()).sum()
        num_tokens, logged = rows.counted.sum(), loss.detach().double()
        sums = torch.stack([logged, logged, num_tokens.double()])
        return loss, num_tokens.int(), torch.nn.functional.pad(sums, (0, NUM_SUMS - len(sums)))


def step_of(name: str, config: TrainConfig, trainer: Trainer) -> DenoisingStep:
    """The contender of this name, on the trainer's corpus and groups."""
    if name in OURS:
        noise, fused_head_loss = OURS[name]
        assert isinstance(config.objective, GiddConfig)
        variant = dataclasses.replace(
            config,
            objective=dataclasses.replace(config.objective, noise=noise),
            model=dataclasses.replace(config.model, fused_head_loss=fused_head_loss),
        )
        return variant.denoising_step(trainer.corpus, trainer.groups)
    plain = {field.name: getattr(trainer.step, field.name) for field in dataclasses.fields(DenoisingStep)}
    plain["fused_head_loss"] = False
    known = cross_entropies(config)
    loss = list(known.values())[-1] if name == AUTOREGRESSIVE else known[name]
    return CrossEntropyStep(**plain, cross_entropy=loss, autoregressive=name == AUTOREGRESSIVE)


# --------------------------------------------------------------------------------------------------------- measuring


class StepTime(NamedTuple):
    """Seconds of one optimizer step."""

    wall: float
    cpu: float
    """Of them those in which the main thread computed: what a busy machine distorts least, and waiting leaves out."""
    passes: float
    """Of them those of forward and backward; the rest is the optimizer's: zeros, gradient norm, update, copies."""
    peak: int
    """Bytes of the device that tensors took at most meanwhile; 0 on a CPU."""


class _WatchedPasses:
    """A step that notes when its forward and backward passes begin and end, on the device where there is one."""

    def __init__(self, step: DenoisingStep) -> None:
        self._step = step
        self._on_gpu = torch.cuda.is_available()
        self._moments: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._step, name)

    def _note(self) -> None:
        if self._on_gpu:
            self._moments.append(torch.cuda.Event(enable_timing=True))
            self._moments[-1].record()
        else:
            self._moments.append(time.perf_counter())

    def run_micro_batches(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        self._note()
        logged = self._step.run_micro_batches(*args, **kwargs)
        self._note()
        return logged

    @property
    def seconds(self) -> float:
        """Between the two; the device must have come to the end."""
        begin, end = self._moments
        return begin.elapsed_time(end) / 1000 if self._on_gpu else end - begin


def timed_step(trainer: Trainer, batches: Iterator[Batch]) -> StepTime:
    """Take one optimizer step, with all that the device has to do for it."""
    step, passes = trainer.step, _WatchedPasses(trainer.step)
    trainer.step = cast(Any, passes)
    torch.cuda.synchronize()  # nothing on a CPU
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    started, started_cpu = time.perf_counter(), time.thread_time()
    trainer.train_step(batches)
    torch.cuda.synchronize()
    wall, cpu = time.perf_counter() - started, time.thread_time() - started_cpu
    trainer.step = step
    return StepTime(wall, cpu, passes.seconds, torch.cuda.max_memory_allocated() if on_gpu else 0)


def warm_up(seconds: float, steps: Iterable[Callable[[], object]], groups: Groups) -> None:
    """Take these steps, and then as many more, until so many seconds have passed on rank 0; a collective of the job.

    Kernels are compiled and chosen at the first steps; clocks come down to what power and heat allow after seconds.
    """
    started, steps = time.perf_counter(), list(steps)
    for step in steps:
        step()
    for step in itertools.cycle(steps):
        if from_rank_zero(lambda: time.perf_counter() - started >= seconds, groups.control):
            return
        step()


def in_turns(
    config: TrainConfig, names: Sequence[str], rounds: int, warm_up_seconds: float, measure: Callable[..., T]
) -> tuple[dict[str, list[T]], dict[str, str]]:
    """Measure a step of each contender in every round, in an order drawn anew: a busy moment meets all alike.

    Args:
        warm_up_seconds: of steps before those that are reported, at least one of each contender.
        measure: from the trainer and its batches, what is to be known of the next step.

    Returns:
        What was measured, by contender, and the device's clocks meanwhile.
    """
    with parallel_groups.joined(config.parallel) as groups:
        trainer = Trainer(config, Path("unused"), groups)
        steps = {name: step_of(name, config, trainer) for name in names}
        batches, order = trainer.training_batches(), random.Random(0)

        def measured(name: str) -> T:
            trainer.step = steps[name]
            return measure(trainer, batches)

        warm_up(warm_up_seconds, [partial(measured, name) for name in names], groups)
        found: dict[str, list[T]] = {name: [] for name in names}
        with Clocks() as clocks:
            for _ in range(rounds):
                for name in order.sample(names, len(names)):
                    found[name].append(measured(name))
    return found, clocks.medians


def measure_layout(config: TrainConfig, rounds: int, warm_up_seconds: float) -> list[StepTime]:
    """Steps of a run."""
    with parallel_groups.joined(config.parallel) as groups:
        trainer = Trainer(config, Path("unused"), groups)
        step = partial(timed_step, trainer, trainer.training_batches())
        warm_up(warm_up_seconds, [step], groups)
        return [step() for _ in range(rounds)]
