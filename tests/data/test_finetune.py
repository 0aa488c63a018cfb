"""A response that fits is a sample: what precedes it is given, it and its end count, the rest fills up."""

from __future__ import annotations

import itertools
import json
import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megadiff.data.corpus import Corpus
from megadiff.data.loader import BatchLoader, DataConfig
from megadiff.data.preprocess import PrepareConfig, prepare
from megadiff.data.samples import Windows

L = 48


def conversations() -> list[list[str]]:
    """Prompts and responses in turn, one to three pairs of ragged lengths; some do not fit into L tokens."""
    source = random.Random(0)
    words = ["sum", "of", "seven", "and", "three", "is", "ten", "\n"]
    return [
        [f"{number}{part}" + " ".join(source.choices(words, k=source.randrange(9))) for part in "abcdef"[: 2 * pairs]]
        for number, pairs in enumerate(source.choices([1, 1, 2, 3], k=60))
    ]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("examples")
    lines = [
        {"messages": [{"role": ("user", "assistant")[i % 2], "content": part} for i, part in enumerate(parts)]}
        for parts in conversations()
    ]
    (folder / "examples.jsonl").write_text("\n".join(map(json.dumps, lines)))
    options: dict[str, Any] = {"vocab_size": 300, "validation_fraction": 0.2, "chat_template": "{role}{content}"}
    prepare(PrepareConfig(kind="examples", input=(str(folder),), output_dir=folder / "corpus", **options))
    return Corpus.open(folder / "corpus")


def loader(corpus: Corpus, split: str = "train", sequence_length: int = L, **settings: Any) -> BatchLoader:
    config = DataConfig(path=str(corpus.directory), kind="examples", sequence_length=sequence_length, **settings)
    return config.loader(corpus, split, seed=3)


@pytest.mark.parametrize("pad_in_loss", [False, True])
@pytest.mark.parametrize("responses", ["last", "every"])
def test_samples_are_the_responses_that_fit(
    corpus: Corpus, responses: str, pad_in_loss: bool, caplog: pytest.LogCaptureFixture
) -> None:
    expected, num_expected, num_left_out = [], 0, 0
    for parts in conversations():
        written = [part if i % 2 else f"user{part}assistant" for i, part in enumerate(parts)]
        for last in range(1, len(parts), 2) if responses == "every" else [len(parts) - 1]:
            num_expected += 1
            if sum(len(corpus.tokenizer.encode(part)) for part in written[: last + 1]) + 1 <= L:
                expected.append(("".join(written[:last]), written[last]))

    found = []
    with caplog.at_level(logging.INFO, logger="megadiff"):
        for split in ("train", "validation"):
            reader = loader(corpus, split, responses=responses, pad_response_in_loss=pad_in_loss)
            batch = reader.batch(range(reader.num_samples))
            for tokens, counted, given in zip(batch.tokens_BL, batch.loss_mask_BL, batch.given_BL, strict=True):
                num_given = int(given.sum())
                assert given[:num_given].all() and counted[num_given] and not (counted & given).any()
                end = tokens.tolist().index(corpus.tokenizer.eos_id)
                filling = tokens[end + 1 :]
                if pad_in_loss:
                    assert counted[num_given:].all() and (filling == corpus.tokenizer.eos_id).all()
                else:
                    assert counted[num_given : end + 1].all() and not counted[end + 1 :].any()
                    assert (filling == corpus.tokenizer.pad_id).all()
                decode = corpus.tokenizer.decode
                found.append((decode(tokens[:num_given].tolist()), decode(tokens[num_given:end].tolist())))
            num_left_out += int(caplog.messages[-1].split(";")[1].split()[0])
    assert sorted(found) == sorted(expected)
    assert 0 < num_left_out == num_expected - len(expected)


def test_all_responses_too_long(corpus: Corpus) -> None:
    stream = corpus.split("train")
    lengths, per_document = stream.sequences()
    shortest = np.add.reduceat(lengths, per_document.cumsum() - per_document).min()
    message = rf"none of the \d+ responses of .*train.bin fits .* data.sequence_length 3: the shortest takes {shortest}"
    with pytest.raises(ValueError, match=message):
        loader(corpus, sequence_length=3)
    assert loader(corpus, sequence_length=shortest).num_samples >= 1


def test_a_resumed_run_reads_each_example_once_per_epoch(corpus: Corpus) -> None:
    reader = loader(corpus)
    num_steps = reader.num_samples // 4
    stopped_after = num_steps // 2

    def read(start_sample: int, num_steps: int, rank: int, micro_batch_size: int) -> list[list[int]]:
        batches = loader(corpus).iterate(start_sample, 4, micro_batch_size, rank, 2)
        batches = itertools.islice(batches, num_steps * 2 // micro_batch_size)
        return [tokens.tolist() for batch in batches for tokens in batch.tokens_BL]

    before = [sample for rank in range(2) for sample in read(0, stopped_after, rank, 2)]
    after = [sample for rank in range(2) for sample in read(4 * stopped_after, num_steps - stopped_after, rank, 1)]
    epoch = reader.batch(range(reader.num_samples)).tokens_BL.tolist()
    assert sorted(before + after) == sorted(epoch[: 4 * num_steps])
    assert len(set(map(tuple, epoch))) == reader.num_samples
    following = reader.batch(range(reader.num_samples, 2 * reader.num_samples)).tokens_BL.tolist()
    assert sorted(following) == sorted(epoch) and following != epoch


def test_text_and_examples_are_not_taken_for_each_other(corpus: Corpus, corpus_dir: Path) -> None:
    examples, text = (DataConfig(path="here", kind=kind, sequence_length=L) for kind in ("examples", "text"))
    with pytest.raises(ValueError, match=r"corpus here was prepared with --kind examples, but data.kind is text"):
        text.loader(corpus, "train", seed=0)
    with pytest.raises(ValueError, match=r"corpus here was prepared with --kind text, but data.kind is examples"):
        examples.loader(Corpus.open(corpus_dir), "train", seed=0)
    with pytest.raises(ValueError, match=r"data.reset_at_document is True, but must be false with data.kind examples"):
        DataConfig(path="here", kind="examples", sequence_length=L, reset_at_document=True)


def test_parts_that_are_not_in_pairs(corpus: Corpus, tmp_path: Path) -> None:
    index = corpus.directory / "train.idx"
    whole = index.read_bytes()
    bounds = np.frombuffer(whole[-16:], dtype=np.int64) - [1, 0]
    try:
        index.write_bytes(whole[:-16] + bounds.tobytes())
        with pytest.raises(
            ValueError, match=r"train.idx has documents of an odd number of parts, expected prompts and"
        ):
            loader(corpus)
    finally:
        index.write_bytes(whole)


def test_a_window_is_a_sample_of_which_all_counts(corpus_dir: Path) -> None:
    batch = BatchLoader(Windows(Corpus.open(corpus_dir).split("train"), L), seed=0).batch(range(3))
    assert batch.loss_mask_BL.all() and not batch.given_BL.any() and batch.tokens_BL.dtype == torch.int64
