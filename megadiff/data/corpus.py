"""A prepared corpus on disk, and its two splits as streams of tokens.

A corpus is a folder with `tokenizer.model`, `token_bytes.npy`, a pair of Megatron's `.bin/.idx` files for
each split and `corpus.json`, the manifest. The manifest is written last: a folder without one is not a
corpus.

A split of texts is read as one long stream, the documents one after another, cut into windows of exactly L tokens:
no token is shared by two windows and only the last num_tokens mod L are never read. Of a split of examples the index
tells where prompts and responses begin: they are the sequences of its documents, in turn.
"""

from __future__ import annotations

import json
import os
import struct
import weakref
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from megadiff.data.tokenizer import Tokenizer

SPLITS = ("train", "validation")
MANIFEST_NAME = "corpus.json"
TOKENIZER_NAME = "tokenizer.model"
TOKEN_BYTES_NAME = "token_bytes.npy"

CorpusKind = Literal["text", "examples"]
"""What the documents of a corpus are: texts, or examples of prompts and responses in turn."""

_REMEDY = "run `megadiff prepare` again"


@dataclass(frozen=True, kw_only=True)
class SplitSize:
    """What one split holds."""

    num_documents: int
    """Documents, none empty."""
    num_bytes: int
    """Bytes of text; end-of-document tokens stand for none."""
    num_tokens: int
    """Tokens, one end-of-document token per document included."""


@dataclass(frozen=True, kw_only=True)
class CorpusManifest:
    """What is in a corpus and how it was made."""

    fingerprint: str
    """SHA-256 of the documents and of every option that the files depend on."""
    kind: CorpusKind = "text"
    """What the documents are; corpora of older versions are text."""
    chat_template: str | None = None
    """Examples: how a message of a conversation was written."""
    source: str
    """Where the documents came from."""
    corpus_sha256: str
    """SHA-256 over all documents in order; see `Survey.sha256`."""
    python_version: str
    """Version of the interpreter that prepared the corpus; the default corpus is its standard library."""
    command: str
    """The command line that prepared the corpus."""
    tokenizer_sha256: str
    """SHA-256 of `tokenizer.model`."""
    vocab_size: int
    """V; token ids lie in [0, V)."""
    bos_id: int
    """Begin of text; not in the streams."""
    eos_id: int
    """End of document."""
    pad_id: int
    """Padding; not in the streams."""
    mask_id: int
    """The mask; not in the streams."""
    unk_id: int
    """Unknown piece; never produced."""
    validation_fraction: float
    """Share of the bytes that was asked for validation."""
    unigram_entropy: float
    """Entropy of the token frequencies over both splits, nats per token: the loss without any context."""
    unigram_bits_per_byte: float
    """The same in bits per byte of text."""
    train: SplitSize
    """Size of the training split."""
    validation: SplitSize
    """Size of the validation split."""

    def save(self, path: Path) -> None:
        """Write the manifest as JSON."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> CorpusManifest:
        """Read a manifest.

        Raises:
            ValueError: If the file is not JSON, or its fields are not those of a manifest.
        """
        try:
            values: dict[str, Any] = json.loads(path.read_bytes())
            for split in SPLITS:
                values[split] = SplitSize(**values[split])
            return cls(**values)
        except (ValueError, TypeError, KeyError) as error:
            names = ", ".join(field.name for field in fields(cls))
            raise ValueError(
                f"{path} is not a corpus manifest with the fields {names} ({error!r}); {_REMEDY}."
            ) from error


class TokenStream:
    """One split: the tokens of its documents, one after another.

    Args:
        prefix: Path of the `.bin` and `.idx` files without their suffix.
        vocab_size: V; a token id at or above it is an error when it is read.

    Raises:
        ValueError: If a file is missing or damaged, or the size of the `.bin` is not what the `.idx` says.
    """

    def __init__(self, prefix: Path, vocab_size: int) -> None:
        self.name = prefix.name
        self.path = prefix.with_name(f"{prefix.name}.bin")
        self._vocab_size = vocab_size
        self.index_path = prefix.with_name(f"{prefix.name}.idx")
        for path in (self.path, self.index_path):
            if not path.is_file():
                raise ValueError(f"corpus file {path} is missing; {_REMEDY}.")
        dtype, lengths, _ = _read_index(self.index_path)
        self.num_tokens = int(lengths.sum(dtype=np.int64))
        got, expected = self.path.stat().st_size, self.num_tokens * dtype.itemsize
        if got != expected:
            raise ValueError(
                f"corpus file {self.path} has {got} bytes, but its index counts {self.num_tokens} tokens, "
                f"{expected} bytes: it was cut short or overwritten; {_REMEDY}."
            )
        if self.num_tokens == 0:
            raise ValueError(f"corpus file {self.path} is empty; {_REMEDY} with more text.")
        # Read, not mapped: where a mapped file is cut short or its disk fails, the kernel kills the process unheard.
        self._descriptor = os.open(self.path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)
        self._dtype = dtype

    def num_windows(self, sequence_length: int) -> int:
        """Number of whole windows of `sequence_length` tokens.

        Raises:
            ValueError: If there is not one.
        """
        if not 1 <= sequence_length <= self.num_tokens:
            more = "a larger --validation-fraction" if self.name == "validation" else "more text"
            raise ValueError(
                f"sequence_length must lie in [1, {self.num_tokens}], the tokens of the {self.name} split, "
                f"got {sequence_length}; give shorter sequences or run `megadiff prepare` with {more}."
            )
        return self.num_tokens // sequence_length

    def window(self, index: int, sequence_length: int) -> np.ndarray:
        """Return the tokens [index * L, (index + 1) * L) of the stream, int64 [L].

        Raises:
            ValueError: If there is no such window, it holds an id outside the vocabulary, or the file is cut short.
            OSError: If the disk fails.
        """
        num_windows = self.num_windows(sequence_length)
        if not 0 <= index < num_windows:
            raise ValueError(
                f"window must lie in [0, {num_windows}) of the {self.name} split, got {index}; "
                "take windows from a SampleOrder."
            )
        return self.tokens(index * sequence_length, sequence_length)

    def tokens(self, start: int, count: int) -> np.ndarray:
        """Return the tokens [start, start + count) of the stream, which has them, int64 [count], count > 0.

        Raises:
            ValueError: If one is an id outside the vocabulary, or the file is cut short.
            OSError: If the disk fails.
        """
        tokens = self._read(start, count).astype(np.int64)
        least, greatest = np.min(tokens), np.max(tokens)
        if not 0 <= least <= greatest < self._vocab_size:
            worst = least if least < 0 else greatest
            raise ValueError(
                f"corpus file {self.path} holds token id {worst} near token {start}, expected ids in "
                f"[0, {self._vocab_size}): it was made with another tokenizer or is damaged; {_REMEDY}."
            )
        return tokens

    def sequences(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the lengths of all sequences (parts of documents) and how many each document has, int64.

        Raises:
            ValueError: If the index is damaged.
        """
        _, lengths, bounds = _read_index(self.index_path)
        return lengths.astype(np.int64), np.diff(bounds)

    def _read(self, start: int, count: int) -> np.ndarray:
        """Return the tokens [start, start + count) as they are stored; threads may read at once."""
        content, size, offset = b"", count * self._dtype.itemsize, start * self._dtype.itemsize
        while len(content) < size:
            piece = os.pread(self._descriptor, size - len(content), offset + len(content))
            if not piece:
                raise ValueError(
                    f"corpus file {self.path} ends within tokens {start} to {start + count - 1}, expected "
                    f"{self.num_tokens}: it was cut short while it was in use; {_REMEDY}."
                )
            content += piece
        return np.frombuffer(content, dtype=self._dtype)


class Corpus:
    """A prepared corpus; made with `Corpus.open`."""

    def __init__(self, directory: Path, manifest: CorpusManifest, token_bytes_V: Tensor) -> None:
        self.directory = directory
        self.manifest = manifest
        self.token_bytes_V = token_bytes_V
        """Bytes that each token stands for, int64; 0 for special ids."""

    @classmethod
    def open(cls, directory: str | Path) -> Corpus:
        """Open the corpus in `directory`; the splits are opened by `split`.

        Raises:
            ValueError: If the folder, its manifest or its byte table is missing or damaged.
        """
        directory = Path(directory)
        if not directory.is_dir():
            raise ValueError(f"corpus {directory} is not a folder; run `megadiff prepare --output-dir {directory}`.")
        for name in (MANIFEST_NAME, TOKEN_BYTES_NAME):
            if not (directory / name).is_file():
                raise ValueError(
                    f"corpus {directory} has no {name}, so its preparation never finished; "
                    f"run `megadiff prepare --output-dir {directory}`."
                )
        manifest = CorpusManifest.load(directory / MANIFEST_NAME)
        try:
            token_bytes = np.load(directory / TOKEN_BYTES_NAME)
        except (ValueError, EOFError) as error:
            raise ValueError(f"{directory / TOKEN_BYTES_NAME} is damaged ({error}); {_REMEDY}.") from error
        if token_bytes.shape != (manifest.vocab_size,):
            raise ValueError(
                f"{directory / TOKEN_BYTES_NAME} has shape {token_bytes.shape}, expected one number for each "
                f"of the {manifest.vocab_size} tokens; {_REMEDY}."
            )
        return cls(directory, manifest, torch.from_numpy(token_bytes.astype(np.int64)))

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the corpus was encoded with."""
        return Tokenizer.load(self.directory / TOKENIZER_NAME)

    def split(self, name: str) -> TokenStream:
        """Open the `train` or the `validation` split.

        Raises:
            ValueError: If there is no such split, or its files are missing or damaged.
        """
        if name not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {name!r}; choose one of these.")
        return TokenStream(self.directory / name, self.manifest.vocab_size)


_INDEX_HEADER = struct.Struct("<9sQBQQ")
_INDEX_MAGIC = b"MMIDIDX\0\0"
_INDEX_DTYPES: dict[int, np.dtype[Any]] = {4: np.dtype(np.int32), 8: np.dtype(np.uint16)}


def _read_index(path: Path) -> tuple[np.dtype[Any], np.ndarray, np.ndarray]:
    """Return what a Megatron `.idx` file tells: token type, lengths of sequences, and where documents begin and end.

    The header (magic, version, type code, number of sequences, number of bounds) is followed by a 4-byte length and
    an 8-byte pointer for each sequence, and 0 and the sequence numbers at which documents end, 8 bytes each. Megatron's
    own reader does not compare the lengths with the size of the `.bin`. Every rank comes by here, so the file is
    mapped, not read: the ranks of a machine share its pages.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            header = file.read(_INDEX_HEADER.size)
        magic, _, code, num_sequences, num_bounds = _INDEX_HEADER.unpack(header)
        if magic != _INDEX_MAGIC:
            raise ValueError(f"it opens with {magic!r}")
        dtype = _INDEX_DTYPES[code]
        expected = _INDEX_HEADER.size + num_sequences * (4 + 8) + num_bounds * 8
        if size != expected:
            raise ValueError(f"it has {size} bytes, expected {expected}")
    except (ValueError, KeyError, struct.error) as error:
        raise ValueError(f"corpus index {path} is damaged ({error!r}); {_REMEDY}.") from error
    content = np.memmap(path, mode="r")
    lengths = content[_INDEX_HEADER.size :][: 4 * num_sequences].view(np.int32)
    bounds = content[size - 8 * num_bounds :].view(np.int64)
    return dtype, lengths, bounds
