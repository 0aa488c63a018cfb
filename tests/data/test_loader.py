"""A batch depends on its ordinals alone, however many ranks and micro-batches read them."""

from __future__ import annotations

import itertools
import logging
import re
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megadiff.data.corpus import Corpus, TokenStream
from megadiff.data.loader import Batch, BatchLoader, DataConfig
from megadiff.data.samples import Windows

L = 16


@pytest.fixture(scope="module")
def stream(corpus_dir: Path) -> TokenStream:
    return Corpus.open(corpus_dir).split("train")


@pytest.fixture(scope="module")
def loader(stream: TokenStream) -> BatchLoader:
    return BatchLoader(Windows(stream, L), seed=1)


def ordinals_of(batches: Iterator[Batch], count: int) -> list[list[int]]:
    return [batch.ordinal_B.tolist() for batch in itertools.islice(batches, count)]


def test_a_batch_is_its_ordinals(loader: BatchLoader, stream: TokenStream) -> None:
    ordinals = [5, 0, 3 * loader.num_samples + 2, 5]
    batch = loader.batch(ordinals)
    assert batch.ordinal_B.tolist() == ordinals
    assert batch.tokens_BL.shape == (4, L) and batch.tokens_BL.dtype == torch.int64
    assert batch.loss_mask_BL.shape == (4, L) and batch.loss_mask_BL.dtype == torch.bool
    assert batch.loss_mask_BL.all()
    for row, ordinal in zip(batch.tokens_BL, ordinals, strict=True):
        assert torch.equal(row, loader.batch([ordinal]).tokens_BL[0])

    epoch = loader.batch(range(loader.num_samples)).tokens_BL
    windows = torch.stack([torch.from_numpy(stream.window(index, L)) for index in range(loader.num_samples)])
    assert sorted(map(tuple, epoch.tolist())) == sorted(map(tuple, windows.tolist()))
    assert not torch.equal(epoch, windows)


def test_order_of_ranks_and_micro_batches(loader: BatchLoader) -> None:
    """Step k, micro-batch m, rank r: start + k·G + m·(B·size) + r·B + [0, B)."""
    batches = loader.iterate(
        start_sample=24, global_batch_size=12, micro_batch_size=2, data_parallel_rank=1, data_parallel_size=3
    )
    assert ordinals_of(batches, 4) == [[26, 27], [32, 33], [38, 39], [44, 45]]


@pytest.mark.parametrize(("micro_batch_size", "size"), [(1, 1), (3, 1), (12, 1), (2, 2), (3, 4), (1, 12)])
def test_every_layout_reads_the_same_global_batches(loader: BatchLoader, micro_batch_size: int, size: int) -> None:
    start, num_steps, global_batch_size = 36, 3, 12
    num_micro_batches = global_batch_size // (micro_batch_size * size)
    ranks = [loader.iterate(start, global_batch_size, micro_batch_size, rank, size) for rank in range(size)]
    for step in range(num_steps):
        read = [ordinal for rank in ranks for ordinals in ordinals_of(rank, num_micro_batches) for ordinal in ordinals]
        first = start + step * global_batch_size
        assert sorted(read) == list(range(first, first + global_batch_size))


def test_reading_ahead_changes_nothing(stream: TokenStream) -> None:
    resumed = BatchLoader(Windows(stream, L), seed=1, prefetch_batches=3).iterate(8, 4, 2)
    direct = BatchLoader(Windows(stream, L), seed=1, prefetch_batches=0).iterate(0, 4, 2)
    next_batches = itertools.islice(direct, 4, 10)
    for got, expected in zip(resumed, next_batches, strict=False):
        assert torch.equal(got.tokens_BL, expected.tokens_BL)
        assert torch.equal(got.ordinal_B, expected.ordinal_B)


def test_errors_of_the_reading_thread_reach_the_consumer(loader: BatchLoader, monkeypatch: pytest.MonkeyPatch) -> None:
    read = loader.batch

    def fail_at_ten(ordinals: range) -> Batch:
        if 10 in ordinals:
            raise OSError("the disk is gone")
        return read(ordinals)

    monkeypatch.setattr(loader, "batch", fail_at_ten)
    batches = loader.iterate(0, 4, 4)
    assert ordinals_of(batches, 2) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)


def test_a_reader_that_hangs_or_ends_is_an_error(
    stream: TokenStream, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    stuck = threading.Event()
    request.addfinalizer(stuck.set)
    loader = BatchLoader(Windows(stream, L), seed=1, read_timeout=0.2)
    monkeypatch.setattr(loader, "batch", lambda ordinals: stuck.wait())
    place = rf"{re.escape(str(stream.path))} on rank 0, host {socket.gethostname()}"
    with pytest.raises(TimeoutError, match=rf"no micro-batch came from {place}, within 0.2 s: the file system hangs"):
        next(loader.iterate(0, 4, 4))

    monkeypatch.setattr(loader, "batch", lambda ordinals: sys.exit(0))
    with pytest.raises(
        RuntimeError, match=rf"the reader of {place}, ended with SystemExit\(0\), expected a micro-batch"
    ):
        next(loader.iterate(0, 4, 4))


def test_the_reading_thread_ends_with_its_iterator(loader: BatchLoader) -> None:
    def readers() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name.startswith("batch-loader")]

    before = set(readers())
    batches = loader.iterate(0, 4, 4)
    next(batches)
    (reader,) = set(readers()) - before
    del batches
    reader.join(timeout=10)
    assert not reader.is_alive()


@pytest.mark.parametrize(("micro_batch_size", "size"), [(1, 1), (4, 1), (4, 2), (3, 2), (64, 1)])
def test_validation_covers_each_sample_once(loader: BatchLoader, micro_batch_size: int, size: int) -> None:
    num_sequences = 10
    counted: dict[int, torch.Tensor] = {}
    lengths = set()
    for rank in range(size):
        iterator, num_micro_batches = loader.validation_batches(num_sequences, micro_batch_size, rank, size)
        batches = list(iterator)
        assert len(batches) == num_micro_batches
        lengths.add(num_micro_batches)
        for batch in batches:
            assert batch.tokens_BL.shape == (micro_batch_size, L), "equal shapes on all ranks"
            for tokens, mask, ordinal in zip(
                batch.tokens_BL, batch.loss_mask_BL, batch.ordinal_B.tolist(), strict=True
            ):
                assert mask.all() or not mask.any()
                if mask.all():
                    assert ordinal not in counted
                    counted[ordinal] = tokens
    assert len(lengths) == 1, "equally many batches on all ranks"
    assert sorted(counted) == list(range(num_sequences))
    for ordinal, tokens in counted.items():
        assert torch.equal(tokens, loader.batch([ordinal]).tokens_BL[0])


def test_more_validation_samples_than_windows(corpus_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    stream = Corpus.open(corpus_dir).split("validation")
    loader = BatchLoader(Windows(stream, stream.num_tokens // 3), seed=0)
    with caplog.at_level(logging.INFO, logger="megadiff"):
        loader.validation_batches(3, 1)
        assert caplog.text == ""
        for _ in range(2):
            batches, _ = loader.validation_batches(6, 6)
    (told,) = caplog.records  # once, and below the warnings that every rank shows
    assert "the split has 3 sequences" in told.message and told.levelno == logging.INFO
    (batch,) = batches
    assert batch.ordinal_B.tolist() == list(range(6))
    first, second = (sorted(map(tuple, half.tolist())) for half in batch.tokens_BL.split(3))
    assert first == second and len(set(first)) == 3


def test_bad_sizes(loader: BatchLoader, stream: TokenStream) -> None:
    with pytest.raises(ValueError, match=r"multiple of .* = 2 \* 3 = 6, got 8; change one of the three"):
        loader.iterate(0, 8, 2, 0, 3)
    with pytest.raises(ValueError, match="global_batch_size must be a multiple"):
        loader.iterate(0, 0, 2)
    with pytest.raises(ValueError, match="micro_batch_size must be at least 1, got 0"):
        loader.iterate(0, 8, 0)
    with pytest.raises(ValueError, match=r"data_parallel_rank must lie in \[0, 2\), got 2"):
        loader.iterate(0, 8, 2, 2, 2)
    with pytest.raises(ValueError, match="num_sequences must be at least 1, got 0"):
        loader.validation_batches(0, 2)
    with pytest.raises(ValueError, match=r"sequence_length must lie in .* split, got 1000000000"):
        Windows(stream, 10**9)
    with pytest.raises(ValueError, match=r"data.sequence_length is 0, but must be at least 1"):
        DataConfig(path="corpus", sequence_length=0)
    with pytest.raises(ValueError, match=r"data.read_timeout is 0, but must be positive"):
        DataConfig(path="corpus", sequence_length=8, read_timeout=0)
