"""Batches as a function of sample ordinals, and the ordinals of each rank's micro-batches.

A batch is named by its ordinals, the places of its samples in the training stream. `BatchLoader.batch`
computes any batch from them alone; what a rank reads in which step is arithmetic on them. So the loader has
no state to save: a run resumes from its number of consumed samples, under any micro-batch size and any
data-parallel size.

Shape suffixes: B samples of a batch, L tokens of a sample.
"""

from __future__ import annotations

import itertools
import logging
import os
import queue
import socket
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from megadiff.data.corpus import Corpus, CorpusKind
from megadiff.data.finetune import Examples
from megadiff.data.order import SampleOrder
from megadiff.data.samples import SampleSource, Windows
from megadiff.fields import Seconds, require

logger = logging.getLogger(__name__)

_SECONDS_TO_END = 2.0
"""How long the end of a run waits for the batch that is being read."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read, and in which pieces."""

    path: str
    """Folder of a corpus made by `megadiff prepare`."""
    sequence_length: int
    """L, tokens per sample."""
    kind: CorpusKind = "text"
    """What the corpus was prepared as: text to pre-train on, or examples to fine-tune on: each is a sample, and its
    prompt is neither noised nor in the loss."""
    responses: Literal["last", "every"] = "last"
    """Examples: of each conversation the last response is learned, or every one, as a sample of its own."""
    pad_response_in_loss: bool = True
    """Examples: whether a response is filled up to the sequence length with end-of-text that is predicted and counts;
    if not, what fills it up is neither seen nor counted."""
    reset_at_document: bool = False
    """Confine attention to documents and count positions from 0 in each; a sample goes on to hold several documents,
    and parts of them at its ends."""
    read_timeout: Seconds = 300.0
    """How long a rank waits for its next micro-batch before it takes the file system for dead and fails."""

    def __post_init__(self) -> None:
        require(self.read_timeout > 0, "data.read_timeout", self.read_timeout, "be positive")
        require(self.sequence_length >= 1, "data.sequence_length", self.sequence_length, "be at least 1")
        require(
            self.kind == "text" or not self.reset_at_document,
            "data.reset_at_document",
            self.reset_at_document,
            "be false with data.kind examples, of which a sample holds one",
        )

    @property
    def hides_padding(self) -> bool:
        """Whether samples end with tokens that nobody may see."""
        return self.kind == "examples" and not self.pad_response_in_loss

    def loader(self, corpus: Corpus, split: str, seed: int) -> BatchLoader:
        """What reads the samples of a split, in the order of a seed.

        Raises:
            ValueError: The corpus is of another kind, is damaged, or has no sample of this length.
        """
        found = corpus.manifest.kind
        if found != self.kind:
            raise ValueError(
                f"corpus {self.path} was prepared with --kind {found}, but data.kind is {self.kind}: change the "
                "setting or the corpus"
            )
        source: SampleSource
        if self.kind == "text":
            source = Windows(corpus.split(split), self.sequence_length)
        else:
            source = Examples(
                corpus.split(split),
                self.sequence_length,
                eos_id=corpus.manifest.eos_id,
                pad_id=corpus.manifest.pad_id,
                responses=self.responses,
                pad_in_loss=self.pad_response_in_loss,
            )
        return BatchLoader(source, seed, read_timeout=self.read_timeout)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Samples of one micro-batch, or their names alone: then L is 0."""

    tokens_BL: Tensor
    """int64, in [0, V)."""
    loss_mask_BL: Tensor
    """bool; false where a token is given, or only fills up a sample or a batch, and so does not count."""
    given_BL: Tensor
    """bool; true where a token is context that is neither noised nor predicted: a prompt."""
    ordinal_B: Tensor
    """int64: each sample's place in the training stream, the key of its noise."""


class BatchLoader:
    """Reads samples in the order of a keyed permutation, a new one each epoch.

    Args:
        source: The samples of a split.
        seed: Key of the order. For validation, one that does not change with the run's, so that all runs are
            measured on the same samples.
        prefetch_batches: Micro-batches read ahead by a background thread; 0 reads each when it is asked for.
        read_timeout: Seconds that the consumer waits for the background thread before it gives up; None: for ever.
    """

    def __init__(
        self,
        source: SampleSource,
        seed: int,
        *,
        prefetch_batches: int = 4,
        read_timeout: float | None = None,
    ) -> None:
        self.num_samples = len(source)
        """Samples per epoch."""
        self.path = source.path
        """File of the tokens."""
        self._source = source
        self._order = SampleOrder(self.num_samples, seed)
        self._prefetch_batches = prefetch_batches
        self._read_timeout = read_timeout
        self._has_told_of_repeats = False

    def batch(self, ordinals: Sequence[int]) -> Batch:
        """Return the samples with these ordinals.

        Raises:
            ValueError: If the corpus file holds an id outside the vocabulary.
        """
        samples = [self._source[int(index)] for index in self._order.windows(ordinals)]
        given_B1 = torch.tensor([[sample.num_given] for sample in samples])
        counted_B1 = torch.tensor([[sample.num_counted] for sample in samples])
        place_L = torch.arange(self._source.sequence_length)
        given_BL = place_L < given_B1
        return Batch(
            tokens_BL=torch.from_numpy(np.stack([sample.tokens_L for sample in samples])),
            loss_mask_BL=~given_BL & (place_L < given_B1 + counted_B1),
            given_BL=given_BL,
            ordinal_B=torch.tensor(ordinals, dtype=torch.int64),
        )

    def iterate(
        self,
        start_sample: int,
        global_batch_size: int,
        micro_batch_size: int,
        data_parallel_rank: int = 0,
        data_parallel_size: int = 1,
        *,
        read: bool = True,
    ) -> Iterator[Batch]:
        """Yield this rank's micro-batches of step after step, without end.

        Step k holds the ordinals start_sample + k * global_batch_size + [0, global_batch_size).

        Args:
            start_sample: Samples consumed before, by the run as a whole.
            global_batch_size: Samples per optimizer step over all ranks.
            micro_batch_size: B.
            data_parallel_rank: This rank.
            data_parallel_size: Number of data-parallel ranks.
            read: False yields the ordinals alone, for ranks that are sent the tokens by another.

        Raises:
            ValueError: If the sizes do not divide or there is no such rank; at the call, not the first batch.
        """
        ranks = _DataParallelShare(micro_batch_size, data_parallel_rank, data_parallel_size)
        per_turn = ranks.samples_per_turn
        if global_batch_size < 1 or global_batch_size % per_turn:
            raise ValueError(
                "global_batch_size must be a multiple of micro_batch_size * data-parallel size = "
                f"{micro_batch_size} * {data_parallel_size} = {per_turn}, got {global_batch_size}; "
                "change one of the three."
            )
        turns = itertools.count(start_sample, per_turn)
        return self._batches((ranks.ordinals(turn) for turn in turns), read)

    def validation_batches(
        self,
        num_sequences: int,
        micro_batch_size: int,
        data_parallel_rank: int = 0,
        data_parallel_size: int = 1,
        *,
        read: bool = True,
        batches_multiple: int = 1,
    ) -> tuple[Iterator[Batch], int]:
        """Return this rank's micro-batches of the samples 0 to num_sequences - 1, and how many they are.

        Every rank gets equally many batches of equal shape: samples beyond the last are there to fill up,
        with a loss mask of false. Where the split has fewer, they come again, under other ordinals and so under other
        noise. For `read` see `iterate`. The number of batches is a multiple of `batches_multiple`.

        Raises:
            ValueError: If there are no samples or no such rank; at the call, not the first batch.
        """
        ranks = _DataParallelShare(micro_batch_size, data_parallel_rank, data_parallel_size)
        if num_sequences < 1:
            raise ValueError(f"num_sequences must be at least 1, got {num_sequences}; give, say, 512.")
        if num_sequences > self.num_samples and not self._has_told_of_repeats:
            self._has_told_of_repeats = True
            logger.info(  # no warning: those are shown by every rank
                "validation: the split has %d sequences of %d tokens, so %d sequences repeat some with other "
                "noise; `megadiff prepare` with a larger --validation-fraction gives more",
                self.num_samples,
                self._source.sequence_length,
                num_sequences,
            )
        num_turns = -(-num_sequences // (ranks.samples_per_turn * batches_multiple)) * batches_multiple
        turns = range(0, num_turns * ranks.samples_per_turn, ranks.samples_per_turn)
        batches = self._batches((ranks.ordinals(turn) for turn in turns), read)
        return (_count_below(batch, num_sequences) for batch in batches), len(turns)

    def _batches(self, ordinals_of_batches: Iterable[range], read: bool) -> Iterator[Batch]:
        """Yield the batches in order, or their ordinals alone."""
        return self._read_ahead(ordinals_of_batches) if read else map(_ordinals_alone, ordinals_of_batches)

    def _read_ahead(self, ordinals_of_batches: Iterable[range]) -> Iterator[Batch]:
        """Yield the batches in order while one thread reads the next ones; its errors are raised here.

        Raises:
            TimeoutError: A batch did not come in time; the thread is left where it hangs, and does not keep the process
                from ending.
        """
        if self._prefetch_batches == 0:
            yield from map(self.batch, ordinals_of_batches)
            return
        reader = _Reader(self)
        try:
            num_pending = 0
            for ordinals in ordinals_of_batches:
                reader.request(ordinals)
                num_pending += 1
                if num_pending > self._prefetch_batches:
                    yield reader.result(self._read_timeout)
                    num_pending -= 1
            for _ in range(num_pending):
                yield reader.result(self._read_timeout)
        finally:
            reader.end()


class _Reader:
    """A thread that reads one batch after another, as they are requested."""

    def __init__(self, loader: BatchLoader) -> None:
        self._loader = loader
        self._requests: queue.SimpleQueue[range | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[Batch | BaseException] = queue.SimpleQueue()
        self._has_ended = False
        # A daemon: the interpreter does not wait for it at exit, when it may hang in the file system.
        self._thread = threading.Thread(target=self._run, name="batch-loader", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while (ordinals := self._requests.get()) is not None and not self._has_ended:
            try:
                self._results.put(self._loader.batch(ordinals))
            except BaseException as error:
                self._results.put(error)

    def request(self, ordinals: range) -> None:
        """Ask for one more batch."""
        self._requests.put(ordinals)

    def result(self, timeout: float | None) -> Batch:
        """Wait for the oldest batch that was requested and not yet taken.

        Raises:
            Exception: What reading it raised.
            RuntimeError: Reading it ended the thread.
            TimeoutError: It took longer than `timeout` seconds.
        """
        where = f"{self._loader.path} on rank {os.environ.get('RANK', '0')}, host {socket.gethostname()}"
        try:
            result = self._results.get(timeout=timeout)
        except queue.Empty:
            raise TimeoutError(
                f"no micro-batch came from {where}, within {timeout:g} s: the file system hangs or is too slow; look "
                "at it, or raise data.read_timeout"
            ) from None
        if isinstance(result, Exception):
            raise result
        if isinstance(result, BaseException):
            raise RuntimeError(f"the reader of {where}, ended with {result!r}, expected a micro-batch") from result
        return result

    def end(self) -> None:
        """Let the thread end after the batch at hand, and wait for that unless it hangs.

        A thread that still computes with torch when the interpreter ends would take the process down with it.
        """
        self._has_ended = True
        self._requests.put(None)
        self._thread.join(_SECONDS_TO_END)


class _DataParallelShare:
    """Which ordinals one data-parallel rank reads.

    Micro-batches go round the ranks: in each turn, rank r takes the micro_batch_size ordinals after the
    r * micro_batch_size of the ranks before it.
    """

    def __init__(self, micro_batch_size: int, rank: int, size: int) -> None:
        if micro_batch_size < 1:
            raise ValueError(f"micro_batch_size must be at least 1, got {micro_batch_size}; give a positive number.")
        if not 0 <= rank < size:
            raise ValueError(f"data_parallel_rank must lie in [0, {size}), got {rank}; give this process's own rank.")
        self.samples_per_turn = micro_batch_size * size
        self._micro_batch_size = micro_batch_size
        self._rank = rank

    def ordinals(self, turn_start: int) -> range:
        """Return this rank's ordinals in the turn whose first ordinal is `turn_start`."""
        start = turn_start + self._rank * self._micro_batch_size
        return range(start, start + self._micro_batch_size)


def _ordinals_alone(ordinals: Sequence[int]) -> Batch:
    """Return the batch with these ordinals, of samples without tokens."""
    ordinal_B = torch.tensor(ordinals, dtype=torch.int64)
    return Batch(
        tokens_BL=ordinal_B.new_empty(len(ordinals), 0),
        loss_mask_BL=torch.empty(len(ordinals), 0, dtype=torch.bool),
        given_BL=torch.empty(len(ordinals), 0, dtype=torch.bool),
        ordinal_B=ordinal_B,
    )


def _count_below(batch: Batch, num_samples: int) -> Batch:
    """Return the batch with samples of ordinal `num_samples` and more left out of the loss."""
    counted_B = batch.ordinal_B < num_samples
    return replace(batch, loss_mask_BL=batch.loss_mask_BL & counted_B[:, None])
