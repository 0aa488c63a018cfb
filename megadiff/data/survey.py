"""One pass over the documents: how many, how large, which ones; and the split into training and validation.

The split follows from the contents alone. A document's key is 64 bits of its SHA-256: copies share it and
so fall on the same side, and neither file names nor the order of the inputs matter.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator

import numpy as np

from megadiff.data.documents import Document, document_size


class Survey:
    """Size, hash and key of every document; takes 16 bytes of memory per document.

    Args:
        documents: None of them empty.
    """

    def __init__(self, documents: Iterable[Document]) -> None:
        keys, lengths, digest = array("Q"), array("Q"), hashlib.sha256()
        for document in documents:
            keys.append(document_key(document))
            lengths.append(document_size(document))
            for index, part in enumerate(document):
                is_further = index > 0
                digest.update((len(part) | is_further << 63).to_bytes(8, "little"))
                digest.update(part)
        self.sha256 = digest.hexdigest()
        """SHA-256 over all documents in order, each part after its length as 8 little-endian bytes, the highest bit of
        which is set from a document's second part on."""
        self.num_documents = len(keys)
        self.num_bytes = sum(lengths)
        self._keys, place = np.unique(np.array(keys, dtype=np.uint64), return_inverse=True)
        self._bytes_of_key = np.zeros(len(self._keys), dtype=np.int64)
        np.add.at(self._bytes_of_key, place, np.array(lengths, dtype=np.int64))

    @property
    def num_distinct(self) -> int:
        """Number of different documents."""
        return len(self._keys)

    def validation_keys(self, fraction: float) -> frozenset[int]:
        """Choose the documents of the validation split: by key, up to `fraction` of the bytes.

        A document larger than the whole share is passed over, hence validation gets between one and two
        times its share, never everything; where all documents are larger, the smallest is taken.

        Args:
            fraction: Share of the bytes, in (0, 1/2].
        """
        share = fraction * self.num_bytes
        chosen, filled = [], 0
        for key, size in zip(self._keys.tolist(), self._bytes_of_key.tolist(), strict=True):
            if filled >= share:
                break
            if size <= share:
                chosen.append(key)
                filled += size
        return frozenset(chosen or [int(self._keys[np.argmin(self._bytes_of_key)])])


class TwoParts:
    """The texts, each cut in two after a line end, so that the second part is about `fraction` of it.

    With it a corpus that is one single text still has something to validate on.
    """

    def __init__(self, documents: Iterable[Document], fraction: float) -> None:
        self._documents = documents
        self._fraction = fraction

    def __iter__(self) -> Iterator[Document]:
        for (text,) in self._documents:
            cut = text.rfind(b"\n", 0, int(len(text) * (1 - self._fraction))) + 1
            yield from ((part,) for part in (text[:cut], text[cut:]) if part)


def document_key(document: Document) -> int:
    """Return the first 64 bits of the SHA-256 of the document's text."""
    return int.from_bytes(hashlib.sha256(b"".join(document)).digest()[:8], "little")
