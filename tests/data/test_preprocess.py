"""A corpus holds exactly its documents, appears whole or not at all, and is made only once."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import math
import platform
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megadiff.data import encoding, preprocess
from megadiff.data.corpus import SPLITS, Corpus, CorpusManifest
from megadiff.data.preprocess import PrepareConfig, prepare
from megadiff.data.survey import document_key
from megadiff.data.tokenizer import Tokenizer

CORPUS_FILES = {
    "corpus.json",
    "token_bytes.npy",
    "tokenizer.model",
    *(f"{split}.{suffix}" for split in SPLITS for suffix in ("bin", "idx")),
}


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Forty small files, some of them not UTF-8."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(40):
        line = f"file {number:02d} holds some words, and the value {number**3}.\n".encode()
        (folder / f"{number:02d}.txt").write_bytes(line * (1 + number % 5) + b"\xff\xe2" * (number % 3))
    return folder


@pytest.fixture
def make(texts: Path, tmp_path: Path) -> Callable[..., CorpusManifest]:
    def make(**changes: Any) -> CorpusManifest:
        options = {
            "input": (str(texts),),
            "output_dir": tmp_path / "corpus",
            "vocab_size": 320,
            "validation_fraction": 0.1,
        }
        return prepare(PrepareConfig(**{**options, **changes}))

    return make


def read(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def read_split(corpus: Corpus, split: str) -> tuple[np.ndarray, list[bytes]]:
    stream = corpus.split(split)
    tokens = stream.window(0, stream.num_tokens)
    ends = np.flatnonzero(tokens == corpus.manifest.eos_id)
    assert ends[-1] == len(tokens) - 1
    parts = np.split(tokens, ends[:-1] + 1)
    return tokens, [corpus.tokenizer.decode_bytes(part) for part in parts]


def test_corpus_holds_exactly_the_documents(make: Callable[..., CorpusManifest], texts: Path, tmp_path: Path) -> None:
    manifest = make()
    corpus = Corpus.open(tmp_path / "corpus")
    assert corpus.manifest == manifest
    assert {path.name for path in corpus.directory.iterdir()} == CORPUS_FILES | {".lock"}

    documents = [path.read_bytes() for path in sorted(texts.iterdir())]
    tokens, written = {}, {}
    for split in SPLITS:
        tokens[split], written[split] = read_split(corpus, split)
        size = getattr(manifest, split)
        assert size.num_documents == len(written[split]) > 0
        assert size.num_bytes == sum(map(len, written[split]))
        assert size.num_tokens == len(tokens[split])
    kept = {document_key((text,)) for text in written["validation"]}
    assert [document for document in documents if document_key((document,)) not in kept] == written["train"]
    assert [document for document in documents if document_key((document,)) in kept] == written["validation"]

    counts = Counter(np.concatenate([tokens[split] for split in SPLITS]).tolist())
    total = counts.total()
    entropy = math.log(total) - sum(count * math.log(count) for count in counts.values()) / total
    assert manifest.unigram_entropy == pytest.approx(entropy, rel=1e-12)
    bits = entropy / math.log(2) * total / sum(map(len, documents))
    assert manifest.unigram_bits_per_byte == pytest.approx(bits, rel=1e-12)

    digest = hashlib.sha256()
    for document in documents:
        digest.update(len(document).to_bytes(8, "little") + document)
    assert manifest.corpus_sha256 == digest.hexdigest()
    assert manifest.python_version == platform.python_version()
    assert manifest.source == str(texts)


def test_megatron_reads_the_same(make: Callable[..., CorpusManifest], tmp_path: Path) -> None:
    manifest = make()
    corpus = Corpus.open(tmp_path / "corpus")
    for split in SPLITS:
        dataset = IndexedDataset(str(corpus.directory / split))
        assert dataset.index.dtype is np.uint16
        assert len(dataset.document_indices) - 1 == getattr(manifest, split).num_documents
        tokens, _ = read_split(corpus, split)
        assert np.array_equal(np.concatenate(list(dataset)), tokens)


def test_large_vocabulary_is_stored_in_32_bits(make: Callable[..., CorpusManifest], tmp_path: Path) -> None:
    model = tmp_path / "large.model"
    words = (f"{number:06x}".translate(str.maketrans("0123456789", "ghijklmnop")) for number in range(1 << 17))
    Tokenizer.train([" ".join(words).encode()], (1 << 16) + 1, model)
    manifest = make(tokenizer=model)
    assert manifest.vocab_size == (1 << 16) + 1
    assert (tmp_path / "corpus" / "train.bin").stat().st_size == 4 * manifest.train.num_tokens
    read_split(Corpus.open(tmp_path / "corpus"), "train")


def test_same_files_whoever_encodes(
    make: Callable[..., CorpusManifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "_BATCH_BYTES", 100)  # many batches, more than the workers take at once
    made = [make(output_dir=tmp_path / name, num_workers=n) for name, n in (("one", 1), ("two", 2))]
    assert made[0] == made[1]
    assert read(tmp_path / "one") == read(tmp_path / "two")


def test_a_finished_corpus_is_reused(
    make: Callable[..., CorpusManifest], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = make()
    with monkeypatch.context() as patch:
        patch.setattr(preprocess, "encode_documents", None)
        assert make(num_workers=2) == manifest

    # Anything that the files depend on, and any damage, makes them anew.
    other_fraction = make(validation_fraction=0.3)
    assert other_fraction.validation.num_bytes > manifest.validation.num_bytes
    assert make(vocab_size=330).vocab_size == 330
    assert make() == manifest
    directory = tmp_path / "corpus"
    for name in sorted(CORPUS_FILES):
        whole = read(directory)
        (directory / name).write_bytes(whole[name][: len(whole[name]) // 2])
        assert make() == manifest
        assert read(directory) == whole, name
    (texts / "00.txt").write_bytes(b"changed\n")
    assert make().corpus_sha256 != manifest.corpus_sha256


def test_two_at_once_make_one_corpus(
    make: Callable[..., CorpusManifest],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    train = Tokenizer.train
    at_work = threading.Event()

    def dawdle_and_train(*arguments: Any) -> Tokenizer:
        assert not at_work.is_set(), "both make the corpus"
        at_work.set()
        deadline = time.monotonic() + 20
        while "another process is preparing" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.01)
        return train(*arguments)

    monkeypatch.setattr(Tokenizer, "train", dawdle_and_train)
    with caplog.at_level(logging.INFO, logger="megadiff"), ThreadPoolExecutor() as pool:
        first = pool.submit(make)
        assert at_work.wait(timeout=20)
        second = pool.submit(make)
        assert second.result() == first.result()
    corpus = tmp_path / "corpus"
    assert f"corpus: another process is preparing {corpus}; waiting" in caplog.messages
    assert f"corpus: {corpus} is up to date" in caplog.messages


def test_a_folder_without_locks(
    make: Callable[..., CorpusManifest], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unsupported(*arguments: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with caplog.at_level(logging.INFO, logger="megadiff"):
        assert make().vocab_size == 320
    assert "cannot be locked" in caplog.text


def test_interruption_leaves_all_or_nothing(
    make: Callable[..., CorpusManifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode_documents = preprocess.encode_documents

    def interrupted(*arguments: Any) -> Iterator[Any]:
        yield next(iter(encode_documents(*arguments)))
        raise KeyboardInterrupt

    directory = tmp_path / "corpus"
    with monkeypatch.context() as patch:
        patch.setattr(preprocess, "encode_documents", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make()
        assert set(read(directory)) == {".lock"}

    make()
    before = read(directory)
    with monkeypatch.context() as patch:
        patch.setattr(preprocess, "encode_documents", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make(vocab_size=330)
    assert read(directory) == before

    # A killed process cannot clean up; the next one does, and what is not ours stays.
    (directory / ".preparing-left").mkdir()
    (directory / "notes.txt").write_text("mine")
    make(vocab_size=330)
    assert set(read(directory)) == CORPUS_FILES | {".lock", "notes.txt"}


def test_interruption_while_files_are_moved(
    make: Callable[..., CorpusManifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However far the moving came, nothing passes for a corpus before all files are in place."""
    replace = Path.replace
    make(vocab_size=330)
    for num_moved in range(len(CORPUS_FILES)):
        moved: list[Path] = []

        def interrupted(path: Path, target: Path, moved: list[Path] = moved, limit: int = num_moved) -> Path:
            if len(moved) == limit:
                raise KeyboardInterrupt
            moved.append(path)
            return replace(path, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", interrupted)
            with pytest.raises(KeyboardInterrupt):
                make()
        with pytest.raises(ValueError, match="its preparation never finished"):
            Corpus.open(tmp_path / "corpus")
    assert make().vocab_size == 320


def test_a_given_tokenizer_is_used(make: Callable[..., CorpusManifest], tmp_path: Path) -> None:
    first = make(output_dir=tmp_path / "first")
    second = make(tokenizer=tmp_path / "first" / "tokenizer.model", vocab_size=9999)
    assert second.vocab_size == 320
    assert second.tokenizer_sha256 == first.tokenizer_sha256
    assert (tmp_path / "corpus" / "train.bin").read_bytes() == (tmp_path / "first" / "train.bin").read_bytes()
    with pytest.raises(ValueError, match=r"absent.model is not a file"):
        make(tokenizer=tmp_path / "absent.model")


def test_tokenizer_learns_from_an_even_sample_of_the_training_documents(
    make: Callable[..., CorpusManifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bytes] = []
    train = Tokenizer.train

    def spy(documents: Any, *arguments: Any) -> Tokenizer:
        seen[:] = documents
        return train(seen, *arguments)

    monkeypatch.setattr(Tokenizer, "train", spy)
    manifest = make()
    _, training_documents = read_split(Corpus.open(tmp_path / "corpus"), "train")
    assert seen == training_documents

    total = manifest.train.num_bytes + manifest.validation.num_bytes
    make(tokenizer_sample_bytes=total // 2, vocab_size=300)
    assert set(seen) < set(training_documents)
    assert sum(map(len, seen)) == pytest.approx(manifest.train.num_bytes / 2, rel=0.2)


def test_a_single_document_is_cut_in_two(
    make: Callable[..., CorpusManifest], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    book = tmp_path / "book.txt"
    book.write_bytes(b"".join(b"The words of line %d, and its end.\n" % number for number in range(200)))
    manifest = make(input=(str(book),))
    assert "single document" in caplog.text
    assert (manifest.train.num_documents, manifest.validation.num_documents) == (1, 1)
    _, (first,) = read_split(Corpus.open(tmp_path / "corpus"), "train")
    _, (second,) = read_split(Corpus.open(tmp_path / "corpus"), "validation")
    assert first + second == book.read_bytes()

    book.write_bytes(b"a single line without an end")
    with pytest.raises(ValueError, match=r"needs two different documents.*got 1 from 1 files"):
        make(input=(str(book),))


def test_an_empty_corpus_is_refused(make: Callable[..., CorpusManifest], tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    (folder / "zeros.bin").write_bytes(bytes(4))
    with pytest.raises(ValueError, match=r"got 0 from 1 files \(skipped: 1 binary\); give more text"):
        make(input=(str(folder),))
    assert not (tmp_path / "corpus").exists()


def test_input_that_changes_under_way(
    make: Callable[..., CorpusManifest], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = Tokenizer.train

    def change_and_train(*arguments: Any) -> Tokenizer:
        tokenizer = train(*arguments)
        (texts / "07.txt").write_bytes(b"shorter\n")
        return tokenizer

    monkeypatch.setattr(Tokenizer, "train", change_and_train)
    with pytest.raises(ValueError, match="the input changed while it was read: got"):
        make()
    assert set(read(tmp_path / "corpus")) == {".lock"}


def test_bad_options(make: Callable[..., CorpusManifest], texts: Path) -> None:
    with pytest.raises(ValueError, match=r"validation_fraction must lie in \(0, 0.5\], got 0"):
        make(validation_fraction=0)
    with pytest.raises(ValueError, match="num_workers must be at least 1, got 0"):
        make(num_workers=0)
    with pytest.raises(ValueError, match="tokenizer_sample_bytes must be at least 1, got 0"):
        make(tokenizer_sample_bytes=0)
    with pytest.raises(ValueError, match=r"output_dir .*00.txt is a file; give a folder"):
        make(output_dir=texts / "00.txt")


def test_progress_is_shown(
    make: Callable[..., CorpusManifest], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(time, "monotonic", iter(range(0, 10**6, 3)).__next__)
    with caplog.at_level(logging.INFO, logger="megadiff"):
        manifest = make()
    shares = [line for line in caplog.messages if "encoded" in line and "%" in line]
    assert len(shares) > 5 and "encoded 100 %" in shares[-1]
    assert f"{manifest.train.num_tokens} training" in caplog.text
