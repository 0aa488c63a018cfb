"""The split into training and validation follows from the contents."""

from __future__ import annotations

import hashlib
import random

import pytest

from megadiff.data.documents import Document, document_size
from megadiff.data.survey import Survey, TwoParts, document_key


def make_documents(num_documents: int) -> list[Document]:
    source = random.Random(num_documents)
    return [(source.randbytes(source.randrange(1, 400)),) for _ in range(num_documents)]


@pytest.mark.parametrize("fraction", [0.02, 0.1, 0.5])
def test_validation_gets_its_share(fraction: float) -> None:
    documents = make_documents(1000)
    keys = Survey(documents).validation_keys(fraction)
    chosen = sum(document_size(document) for document in documents if document_key(document) in keys)
    share = fraction * sum(map(document_size, documents))
    assert share <= chosen < min(2 * share, share + 400)


def test_neither_order_nor_copies_matter() -> None:
    documents = make_documents(200)
    survey = Survey(documents)
    assert Survey(documents[::-1]).validation_keys(0.1) == survey.validation_keys(0.1)
    doubled = Survey(documents * 2)
    assert doubled.validation_keys(0.1) == survey.validation_keys(0.1)
    assert (doubled.num_documents, doubled.num_distinct) == (400, 200)


def test_one_huge_document_is_not_validation() -> None:
    documents = [(b"x" * 10_000,), *make_documents(100)]
    assert document_key(documents[0]) not in Survey(documents).validation_keys(0.02)


@pytest.mark.parametrize("fraction", [0.02, 0.5])
def test_both_sides_always_get_a_document(fraction: float) -> None:
    for num_documents in range(2, 12):
        documents = make_documents(num_documents)
        keys = Survey(documents).validation_keys(fraction)
        assert 1 <= sum(document_key(document) in keys for document in documents) < num_documents
    assert Survey([(b"large" * 9,), (b"small",)]).validation_keys(0.02) == {document_key((b"small",))}


def test_hash_covers_contents_order_and_borders() -> None:
    survey = Survey([(b"ab",), (b"c",)])
    assert survey.sha256 == hashlib.sha256(b"\2" + bytes(7) + b"ab" + b"\1" + bytes(7) + b"c").hexdigest()
    assert (survey.num_documents, survey.num_bytes) == (2, 3)
    for other in ([(b"c",), (b"ab",)], [(b"a",), (b"bc",)], [(b"abc",)], [(b"ab", b"c")]):
        assert Survey(other).sha256 != survey.sha256


def test_two_parts() -> None:
    text = b"".join(b"line %d\n" % number for number in range(100))
    (first,), (second,) = TwoParts([(text,)], 0.1)
    assert first + second == text and first.endswith(b"\n")
    assert 0.1 <= len(second) / len(text) < 0.12
    assert list(TwoParts([(b"one line",)], 0.1)) == [(b"one line",)]
