"""Every byte string survives the tokenizer; training depends on the text alone."""

from __future__ import annotations

import io
import random
import re
import sysconfig
from pathlib import Path

import pytest
import sentencepiece

from megadiff.data.documents import DocumentSource
from megadiff.data.encoding import encode_losslessly
from megadiff.data.tokenizer import MASK_PIECE, SEGMENT_LENGTH, Tokenizer

VOCAB_SIZE = 600

NASTY = [
    b"",
    b" ",
    b"   leading and trailing   ",
    b"\n\n\t\tdef f():\r\n\r    return  1\n",
    b"<mask> </s> <s> <pad> <unk> <0x41> <bos>",
    "a\u2581b \u2581\u2581 \u2585 \u2584".encode(),  # SentencePiece's marks for a space and for the unknown
    "Åﬁ①\u00a0\u3000é e\u0301 漢字 🙂 \ufeff\ufffd\u2028".encode(),  # what normalisation rewrites
    b"\0 nul \0\0",
    b"\xff\xfe cut \xe2\x96 off \xe2\x96\x81 \xc0\x80 overlong",
    b"\xed\xa0\x80 a surrogate \xed\xb2\x80",
    bytes(range(256)) * 2,
    b"x" * (3 * SEGMENT_LENGTH + 1),
    b" " * (2 * SEGMENT_LENGTH) + b"\n" * SEGMENT_LENGTH,
    "漢".encode() * SEGMENT_LENGTH + b"\xff",
]


@pytest.fixture(scope="module")
def documents() -> list[bytes]:
    return [text for (text,) in DocumentSource((str(Path(sysconfig.get_paths()["stdlib"], "json")),))]


@pytest.fixture(scope="module")
def tokenizer(documents: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.train(documents, VOCAB_SIZE, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@pytest.mark.parametrize("text", NASTY, ids=lambda text: repr(text[:12]))
def test_nasty_bytes_survive(tokenizer: Tokenizer, text: bytes) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode_bytes(ids) == text
    assert all(index > tokenizer.unk_id for index in ids), "text must never become a special id"
    assert tokenizer.token_bytes()[ids].sum() == len(text)


def test_random_bytes_survive(tokenizer: Tokenizer) -> None:
    source = random.Random(0)
    alphabet = [b"\xe2", b"\x96", b"\x81", b" ", b"\n", b"<mask>", b"def ", "é".encode(), b"\0", b"\xff"]
    for _ in range(300):
        noise = source.randbytes(source.randrange(40))
        shuffled = b"".join(source.choices(alphabet, k=source.randrange(40)))
        for text in (noise, shuffled):
            assert tokenizer.decode_bytes(tokenizer.encode(text)) == text


def test_every_unicode_character_survives(tokenizer: Tokenizer) -> None:
    characters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    for start in range(0, len(characters), 4096):
        text = "a ".join(characters[start : start + 4096]).encode()
        assert tokenizer.decode_bytes(tokenizer.encode(text)) == text


def test_the_whole_default_corpus_survives(tmp_path: Path) -> None:
    library = [text for (text,) in DocumentSource()]
    tokenizer = Tokenizer.train(library, 4096, tmp_path / "tokenizer.model")
    num_bytes = num_tokens = 0
    for text in library:
        [tokens] = encode_losslessly(tokenizer, (text,))
        num_tokens += len(tokens)
        num_bytes += len(text)
    assert num_bytes > 5e6, "the standard library's sources are missing"
    assert num_bytes / num_tokens > 2.5, "the pieces do not fit the corpus"


def test_special_ids_and_byte_table(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == VOCAB_SIZE
    specials = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.mask_id, tokenizer.unk_id)
    assert specials == (0, 1, 2, 3, 4)
    assert tokenizer.decode_bytes(specials) == b""
    table = tokenizer.token_bytes()
    assert table.shape == (VOCAB_SIZE,)
    assert (table[:5] == 0).all() and (table[5:261] == 1).all() and (table[261:] >= 1).all()


def test_pieces_suit_source_code(tokenizer: Tokenizer) -> None:
    """Indentation is one token, and words keep a single space before them."""
    pieces = [tokenizer.decode([index]) for index in tokenizer.encode("\n        return None")]
    assert pieces == ["\n", " " * 8, "return", " None"]


def test_text_arguments(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("naïve") == tokenizer.encode("naïve".encode())
    assert tokenizer.encode("\udcff") == tokenizer.encode(b"\xff"), "surrogate escapes stand for raw bytes"
    assert tokenizer.decode(tokenizer.encode(b"a\xffb")) == "a\ufffdb"
    with pytest.raises(ValueError, match="surrogates not allowed"):
        tokenizer.encode("\ud800")
    with pytest.raises(ValueError, match=f"token id {VOCAB_SIZE} is outside"):
        tokenizer.decode_bytes([7, VOCAB_SIZE])


def test_training_depends_on_the_text_alone(documents: list[bytes], tmp_path: Path) -> None:
    first, second = tmp_path / "first.model", tmp_path / "second.model"
    Tokenizer.train(documents, VOCAB_SIZE, first)
    Tokenizer.train(reversed(documents), VOCAB_SIZE, second)
    assert first.read_bytes() == second.read_bytes()


def test_many_characters_leave_room_for_words(tmp_path: Path) -> None:
    """A script with more characters than the vocabulary has places still trains; the rest are bytes."""
    text = "".join(map(chr, range(0x4E00, 0x5E00))).encode() + b" common words" * 500
    tokenizer = Tokenizer.train([text], 300, tmp_path / "tokenizer.model")
    assert tokenizer.decode_bytes(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(b" common words")) == 2


# In the second, smaller vocabularies keep fewer of the many letters, and so need to be smaller still.
@pytest.mark.parametrize("text", [b"hello world", b"a\nb\nc\nd\ne\nf\ng\nh\ni\nj\nk\nl\nm\nn" + b" vwxyz wxyz xyz" * 9])
def test_the_largest_vocabulary_that_fits_is_told(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "tokenizer.model"
    with pytest.raises(ValueError, match=r"vocab_size 4096 does not fit a corpus of \d+ distinct words; ") as told:
        Tokenizer.train([text], 4096, path)
    found = re.search(r"; give --vocab-size (\d+) or less, or more text with --input\.$", str(told.value))
    assert found is not None
    with pytest.raises(ValueError, match="does not fit"):
        Tokenizer.train([text], int(found[1]) + 1, path)
    assert not path.exists()
    assert Tokenizer.train([text], int(found[1]), path).vocab_size == int(found[1])


def test_vocabulary_that_does_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    with pytest.raises(ValueError, match="does not fit a corpus of 2 distinct words; give more text with --input"):
        Tokenizer.train([b"a b"], 4096, path)
    with pytest.raises(ValueError, match=r"vocab_size must be at least .* got 262; give a larger"):
        Tokenizer.train([b"hello world"], 262, path)
    with pytest.raises(ValueError, match="no words to train"):
        Tokenizer.train([b"\t\0"], 300, path)
    assert not path.exists()


def test_unusable_models(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent.model is not a file; give a tokenizer.model"):
        Tokenizer.load(tmp_path / "absent.model")
    (tmp_path / "text.model").write_bytes(b"not a model")
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        Tokenizer.load(tmp_path / "text.model")
    with pytest.raises(ValueError, match="lacks the control symbol <mask>, BOS, EOS, PAD or UNK, byte pieces"):
        Tokenizer(foreign_model())


def test_a_lossy_tokenizer_is_refused() -> None:
    """SentencePiece's defaults merge spaces and rewrite characters, which the check at encoding must see."""
    lossy = Tokenizer(foreign_model(byte_fallback=True, pad_id=3, vocab_size=300, control_symbols=MASK_PIECE))
    assert encode_losslessly(lossy, (b"\xff",))[-1].tolist()[-1] == lossy.eos_id
    with pytest.raises(ValueError, match=r"the tokenizer loses text: b'a  b' comes back as b' a b'"):
        encode_losslessly(lossy, (b"a  b",))


def foreign_model(**options: object) -> bytes:
    """A model trained with SentencePiece's own defaults but for `options`."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some words to learn from", "and some more words"] * 20),
        model_writer=model,
        model_type="bpe",
        minloglevel=2,
        **{"vocab_size": 40, **options},
    )
    return model.getvalue()
