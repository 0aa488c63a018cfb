"""Documents to tokens, in order, by one process or several; every document is decoded again and compared.

Documents travel in batches of a quarter of a megabyte, and only a few batches are under way at a time, so
memory does not grow with the corpus. This module imports little on purpose: each worker process imports it
anew.
"""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np

from megadiff.data.documents import Document, document_size
from megadiff.data.tokenizer import Tokenizer

_BATCH_BYTES = 1 << 18
_BATCHES_PER_WORKER = 3


def encode_documents(
    documents: Iterable[Document], tokenizer_path: Path, num_workers: int = 1
) -> Iterator[tuple[Document, list[np.ndarray]]]:
    """Yield each document with its tokens, in order, each closed by the end-of-document token.

    Args:
        documents: Parts of raw bytes.
        tokenizer_path: A SentencePiece model; every worker loads it.
        num_workers: Processes; with 1 all is done in this one.

    Returns:
        Pairs of a document and the int32 tokens [number of tokens] of its parts.

    Raises:
        ValueError: If the tokenizer does not give back a document byte for byte.
    """
    if num_workers == 1:
        tokenizer = Tokenizer.load(tokenizer_path)
        for document in documents:
            yield document, encode_losslessly(tokenizer, document)
        return

    spawn = multiprocessing.get_context("spawn")  # a fork would copy the threads' locks of whoever calls this
    pending: deque[tuple[list[Document], Future[list[list[np.ndarray]]]]] = deque()
    with ProcessPoolExecutor(num_workers, mp_context=spawn) as pool:
        for batch in _batches(documents):
            pending.append((batch, pool.submit(_encode_batch, tokenizer_path, batch)))
            if len(pending) == _BATCHES_PER_WORKER * num_workers:
                first, encoded = pending.popleft()
                yield from zip(first, encoded.result(), strict=True)
        for first, encoded in pending:
            yield from zip(first, encoded.result(), strict=True)


def encode_losslessly(tokenizer: Tokenizer, document: Document) -> list[np.ndarray]:
    """Return the tokens of the document's parts, int32, after decoding them as a check.

    Parts are encoded one by one, as a prompt is that is to be continued; the last is closed by the end-of-document
    token.

    Raises:
        ValueError: If the tokens do not decode to the document.
    """
    ids_of_parts = [tokenizer.encode(part) for part in document]
    for part, ids in zip(document, ids_of_parts, strict=True):
        decoded = tokenizer.decode_bytes(ids)
        if decoded != part:
            pairs = zip(part, decoded, strict=False)
            place = next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(part), len(decoded)))
            raise ValueError(
                f"the tokenizer loses text: {part[place : place + 24]!r} comes back as "
                f"{decoded[place : place + 24]!r}; give one trained with identity normalisation, no dummy prefix "
                "and byte fallback, or none to train one."
            )
    ids_of_parts[-1].append(tokenizer.eos_id)
    return [np.array(ids, dtype=np.int32) for ids in ids_of_parts]


def _encode_batch(tokenizer_path: Path, batch: list[Document]) -> list[list[np.ndarray]]:
    tokenizer = _worker_tokenizer(tokenizer_path)
    return [encode_losslessly(tokenizer, document) for document in batch]


@lru_cache(maxsize=1)
def _worker_tokenizer(tokenizer_path: Path) -> Tokenizer:
    """Load the tokenizer once in the life of a worker process."""
    return Tokenizer.load(tokenizer_path)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += document_size(document)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
