"""Documents in, a corpus out: tokenizer, training and validation tokens, and a manifest.

Three passes over the documents: one measures and hashes them, one trains the tokenizer on a sample of the
training documents, one encodes. Documents stream through; no pass holds more than a few of them. Every
choice (split, sample, order) follows from the contents alone, so the same documents and options give the
same files, with any number of workers.

Files are written in a folder of their own inside the output folder and moved out when all is done, the
manifest last: whatever interrupts the preparation, the output folder holds a whole corpus or none. A corpus
that is already there and was made from the same documents with the same options is left as it is. Of two
processes that prepare the same folder at once, the second waits and then finds what the first has made.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import math
import platform
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megadiff.data.corpus import (
    MANIFEST_NAME,
    SPLITS,
    TOKEN_BYTES_NAME,
    TOKENIZER_NAME,
    Corpus,
    CorpusKind,
    CorpusManifest,
    SplitSize,
)
from megadiff.data.documents import Document, DocumentSource, document_size
from megadiff.data.encoding import encode_documents
from megadiff.data.examples import CHAT_TEMPLATE, ExampleFormat
from megadiff.data.survey import Survey, TwoParts, document_key
from megadiff.data.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_FORMAT_VERSION = 1
"""Part of the fingerprint: to be raised when the same documents and options would give other files."""

_TEMPORARY_PREFIX = ".preparing-"
_LOCK_NAME = ".lock"
_SAMPLE_BLOCK_BYTES = 1 << 16
_SECONDS_BETWEEN_PROGRESS = 5.0


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """What `megadiff prepare` reads and writes."""

    input: tuple[str, ...] = ()
    """Files, folders (read recursively) or .jsonl files; none means the Python standard library's sources."""
    output_dir: Path
    """Folder of the corpus; a corpus already made there from the same documents and options is reused."""
    kind: CorpusKind = "text"
    """What the documents are: text to pre-train on, or examples to fine-tune on: lines of .jsonl files with `prompt`
    and `response`, or with `messages`."""
    chat_template: str = CHAT_TEMPLATE
    """Examples: how a message is written, with {role} before {content}."""
    vocab_size: int = 4096
    """Number of tokens of the trained tokenizer, special ones included; a given tokenizer brings its own."""
    validation_fraction: float = 0.02
    """Share of the bytes kept for validation, in whole documents."""
    text_key: str = "text"
    """Field of a .jsonl line that holds the document's text."""
    tokenizer: Path | None = None
    """SentencePiece model to use instead of training one."""
    num_workers: int = 1
    """Processes that encode; the result does not depend on it."""
    tokenizer_sample_bytes: int = 1 << 26
    """Bytes of training documents, spread evenly over them, that the tokenizer is trained on."""

    def __post_init__(self) -> None:
        if not 0 < self.validation_fraction <= 0.5:
            raise ValueError(
                f"validation_fraction must lie in (0, 0.5], got {self.validation_fraction}; give, say, 0.02."
            )
        for name in ("num_workers", "tokenizer_sample_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}; give a positive number.")
        if self.kind == "examples" and not self.input:
            raise ValueError("kind is examples, but there is no input; give --input with .jsonl files of examples.")
        ExampleFormat(self.chat_template)


def prepare(config: PrepareConfig) -> CorpusManifest:
    """Make the corpus that `config` describes, or find it already made.

    Raises:
        ValueError: If the input or the options cannot make a corpus, or a given tokenizer loses text.
    """
    if config.output_dir.exists() and not config.output_dir.is_dir():
        raise ValueError(f"output_dir {config.output_dir} is a file; give a folder.")
    if config.tokenizer is not None:
        Tokenizer.load(config.tokenizer)  # an unusable one is better known before the documents are read

    documents, survey = _survey(config)
    fingerprint = _fingerprint(config, survey)
    config.output_dir.mkdir(parents=True, exist_ok=True)
    with _locked(config.output_dir):
        return _finished(config.output_dir, fingerprint) or _make(config, documents, survey, fingerprint)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold the folder's lock, after waiting for who holds it; a lock dies with its process."""
    with contextlib.ExitStack() as stack:
        try:
            # The file stays: were it deleted, one process could lock the old file and another a new one.
            file = stack.enter_context((directory / _LOCK_NAME).open("a"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.info("corpus: another process is preparing %s; waiting", directory)
                fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:  # a folder that may only be read, a file system without locks
            logger.info("corpus: %s cannot be locked (%s); go on, as the only one there", directory, error)
        yield


def _make(config: PrepareConfig, documents: Iterable[Document], survey: Survey, fingerprint: str) -> CorpusManifest:
    """Make the corpus in the output folder, which this process has for itself."""
    for left_over in config.output_dir.glob(f"{_TEMPORARY_PREFIX}*"):
        shutil.rmtree(left_over)
    with tempfile.TemporaryDirectory(dir=config.output_dir, prefix=_TEMPORARY_PREFIX) as temporary:
        folder = Path(temporary)
        validation_keys = survey.validation_keys(config.validation_fraction)
        training_documents = (text for text in documents if document_key(text) not in validation_keys)
        tokenizer = _make_tokenizer(config, training_documents, survey.num_bytes, folder / TOKENIZER_NAME)
        np.save(folder / TOKEN_BYTES_NAME, tokenizer.token_bytes())
        sizes, counts_V = _write_splits(documents, survey, validation_keys, folder, config.num_workers)
        manifest = _describe(config, survey, fingerprint, tokenizer, sizes, counts_V, folder)
        manifest.save(folder / MANIFEST_NAME)
        _publish(folder, config.output_dir)
    logger.info(
        "corpus: %d training and %d validation tokens, %.2f bytes per token, unigram entropy %.3f nats per "
        "token, in %s",
        manifest.train.num_tokens,
        manifest.validation.num_tokens,
        survey.num_bytes / counts_V.sum(),
        manifest.unigram_entropy,
        config.output_dir,
    )
    return manifest


def _survey(config: PrepareConfig) -> tuple[Iterable[Document], Survey]:
    """Measure the documents; a single one is cut in two, so that there is something to validate on."""
    read_example = ExampleFormat(config.chat_template).document if config.kind == "examples" else None
    source = DocumentSource(config.input, config.text_key, leave_out=config.output_dir, read_example=read_example)
    documents: Iterable[Document] = source
    survey = Survey(_with_progress(documents, "measured", sum(path.stat().st_size for path in source.paths)))
    if survey.num_distinct == 1 and config.kind == "text":
        logger.warning("the corpus is a single document: its last lines become the validation document")
        documents = TwoParts(source, config.validation_fraction)
        survey = Survey(documents)
    skipped = ", ".join(f"{count} {reason}" for reason, count in source.skipped.items() if count) or "nothing"
    logger.info("corpus: %d documents, %.1f MB; skipped: %s", survey.num_documents, survey.num_bytes / 1e6, skipped)
    if survey.num_distinct < 2:
        raise ValueError(
            "the corpus needs two different documents, one to train and one to validate on, got "
            f"{survey.num_distinct} from {len(source.paths)} files (skipped: {skipped}); "
            "give more text with --input."
        )
    return documents, survey


def _fingerprint(config: PrepareConfig, survey: Survey) -> str:
    """Hash everything that the files of the corpus depend on."""
    trained = config.tokenizer is None
    depends_on = {
        "format": _FORMAT_VERSION,
        "kind": config.kind,
        "corpus": survey.sha256,
        "validation_fraction": config.validation_fraction,
        "tokenizer": None if config.tokenizer is None else _file_sha256(config.tokenizer),
        "vocab_size": config.vocab_size if trained else None,
        "tokenizer_sample_bytes": config.tokenizer_sample_bytes if trained else None,
    }
    return hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()


def _finished(directory: Path, fingerprint: str) -> CorpusManifest | None:
    """Return the manifest of a whole corpus with this fingerprint, or None where it has to be made."""
    if not (directory / MANIFEST_NAME).is_file():
        return None
    try:
        corpus = Corpus.open(directory)
        for split in SPLITS:
            corpus.split(split)
        if _file_sha256(directory / TOKENIZER_NAME) == corpus.manifest.tokenizer_sha256:
            if corpus.manifest.fingerprint != fingerprint:
                return None
            logger.info("corpus: %s is up to date", directory)
            return corpus.manifest
        damage = f"{TOKENIZER_NAME} is not the one it was made with"
    except (ValueError, OSError) as error:
        damage = str(error)
    logger.warning("corpus: making %s anew, for it is damaged: %s", directory, damage)
    return None


def _make_tokenizer(
    config: PrepareConfig, training_documents: Iterable[Document], num_bytes: int, path: Path
) -> Tokenizer:
    """Write the given or a trained tokenizer to `path`."""
    if config.tokenizer is not None:
        shutil.copyfile(config.tokenizer, path)
        return Tokenizer.load(path)
    sample = _sample(training_documents, rate=config.tokenizer_sample_bytes / num_bytes)
    return Tokenizer.train(sample, config.vocab_size, path)


def _sample(documents: Iterable[Document], rate: float) -> Iterator[bytes]:
    """Yield about the share `rate` of the text, in blocks spread evenly over it."""
    wanted = 0.0
    for document in documents:
        text = b"".join(document)
        for start in range(0, len(text), _SAMPLE_BLOCK_BYTES):
            wanted += rate
            if wanted >= 1:
                wanted = 0.0 if rate >= 1 else wanted - 1
                yield text[start : start + _SAMPLE_BLOCK_BYTES]


def _write_splits(
    documents: Iterable[Document],
    survey: Survey,
    validation_keys: frozenset[int],
    folder: Path,
    num_workers: int,
) -> tuple[dict[str, SplitSize], np.ndarray]:
    """Encode the documents into the `.bin/.idx` files of both splits, in their order.

    Returns:
        The sizes by split, and how often each token occurs over both, int64 [V].

    Raises:
        ValueError: If the documents are not those of the survey any more.
    """
    vocab_size = len(np.load(folder / TOKEN_BYTES_NAME))
    dtype = np.uint16 if vocab_size <= 1 << 16 else np.int32
    writers = {split: _SplitWriter(folder / split, dtype) for split in SPLITS}
    counts_V = np.zeros(vocab_size, dtype=np.int64)
    documents = _with_progress(documents, "encoded", survey.num_bytes)
    for document, tokens_of_parts in encode_documents(documents, folder / TOKENIZER_NAME, num_workers):
        split = "validation" if document_key(document) in validation_keys else "train"
        tokens = np.concatenate(tokens_of_parts)
        writers[split].add(document, tokens, [len(part) for part in tokens_of_parts])
        np.add.at(counts_V, tokens, 1)

    sizes = {split: writer.close() for split, writer in writers.items()}
    written = sum(size.num_bytes for size in sizes.values())
    if written != survey.num_bytes:
        raise ValueError(
            f"the input changed while it was read: got {written} bytes at the end, expected the "
            f"{survey.num_bytes} of the beginning; run `megadiff prepare` again."
        )
    return sizes, counts_V


class _SplitWriter:
    """Writes one split's `.bin/.idx` files and counts what goes in.

    The parts of a document are its sequences, in Megatron's words: the index knows where prompts and responses begin.
    """

    def __init__(self, prefix: Path, dtype: type[np.uint16] | type[np.int32]) -> None:
        self._index_path = f"{prefix}.idx"
        self._builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
        self._num_documents = self._num_bytes = self._num_tokens = 0

    def add(self, document: Document, tokens: np.ndarray, lengths: list[int]) -> None:
        self._builder.add_document(tokens, lengths)
        self._num_documents += 1
        self._num_bytes += document_size(document)
        self._num_tokens += len(tokens)

    def close(self) -> SplitSize:
        self._builder.finalize(self._index_path)
        return SplitSize(num_documents=self._num_documents, num_bytes=self._num_bytes, num_tokens=self._num_tokens)


def _describe(
    config: PrepareConfig,
    survey: Survey,
    fingerprint: str,
    tokenizer: Tokenizer,
    sizes: dict[str, SplitSize],
    counts_V: np.ndarray,
    folder: Path,
) -> CorpusManifest:
    share_V = counts_V[counts_V > 0] / counts_V.sum()
    unigram_entropy = -float((share_V * np.log(share_V)).sum())
    return CorpusManifest(
        fingerprint=fingerprint,
        kind=config.kind,
        chat_template=config.chat_template if config.kind == "examples" else None,
        source=shlex.join(config.input) or "Python standard library",
        corpus_sha256=survey.sha256,
        python_version=platform.python_version(),
        command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        tokenizer_sha256=_file_sha256(folder / TOKENIZER_NAME),
        vocab_size=tokenizer.vocab_size,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
        mask_id=tokenizer.mask_id,
        unk_id=tokenizer.unk_id,
        validation_fraction=config.validation_fraction,
        unigram_entropy=unigram_entropy,
        unigram_bits_per_byte=unigram_entropy / math.log(2) * int(counts_V.sum()) / survey.num_bytes,
        train=sizes["train"],
        validation=sizes["validation"],
    )


def _publish(folder: Path, output_dir: Path) -> None:
    """Move the finished files to where they belong; the manifest, which makes them a corpus, goes last."""
    (output_dir / MANIFEST_NAME).unlink(missing_ok=True)
    for path in sorted(folder.iterdir(), key=lambda path: path.name == MANIFEST_NAME):
        path.replace(output_dir / path.name)


def _file_sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _with_progress(documents: Iterable[Document], label: str, total_bytes: int) -> Iterator[Document]:
    """Pass the documents on, and log every few seconds how far they have come."""
    done = 0
    next_time = time.monotonic() + _SECONDS_BETWEEN_PROGRESS
    for document in documents:
        yield document
        done += document_size(document)
        if time.monotonic() >= next_time:
            logger.info("corpus: %s %.0f %% of %.1f MB", label, 100 * done / total_bytes, total_bytes / 1e6)
            next_time = time.monotonic() + _SECONDS_BETWEEN_PROGRESS
