"""A SentencePiece tokenizer that gives back every byte it was given.

SentencePiece loses text in three ways, each closed here:

* its default normalisation rewrites white space and characters: models are trained with the identity, without
  a dummy prefix, and with byte fallback, so that a character outside the vocabulary becomes its UTF-8 bytes;
* it stores a space as U+2581 and so takes a real U+2581 for a space: such characters are encoded as bytes;
* it carries only valid UTF-8: bytes that are not are encoded as bytes, one piece each.

Decoding joins a table of bytes per piece, so neither direction depends on SentencePiece's own text decoding.

Training does not read running text. Documents are cut into words by one regular expression, the words are
counted, and byte-pair merges are learned from the counts: pieces never cross from one word into the next,
which suits source code (runs of spaces, operators and names stay apart), and 12 MB take about one second.
Only counts matter and one thread merges them, so the same words give the same model bytes, in any order.
"""

from __future__ import annotations

import io
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2

logger = logging.getLogger(__name__)

BOS_ID, EOS_ID, PAD_ID, MASK_ID, UNK_ID = range(5)
MASK_PIECE = "<mask>"
NUM_SPECIAL_PIECES = 5
NUM_BYTE_PIECES = 256
MIN_LEARNED_PIECES = 2
MIN_VOCAB_SIZE = NUM_SPECIAL_PIECES + NUM_BYTE_PIECES + MIN_LEARNED_PIECES

SPACE_MARK = "\u2581"
"""What SentencePiece writes for a space."""

# Everything beyond ASCII counts as a letter, except U+2581 and U+2585, which SentencePiece keeps for
# itself, and the surrogates that stand for invalid bytes. Tabs and other control characters are never part
# of a piece.
_LETTER = r"A-Za-z_\x80-\u2580\u2582-\u2584\u2586-\ud7ff\ue000-\U0010ffff"
_WORD = re.compile(
    r" {2,48}"  # indentation, whole; a single space goes with the word after it
    rf"| ?[{_LETTER}]{{1,48}}"
    r"| ?[0-9]{1,48}"
    r"| ?[!-/:-@\[-^`{-~]{1,48}"  # punctuation
    r"|[\r\n]{1,48}"
    r"| "
)
_NOT_CARRIED = re.compile(rf"([{SPACE_MARK}\ud800-\udfff]+)")

SEGMENT_LENGTH = 8192
"""Characters per call of SentencePiece, whose time per character grows with the length of the text."""


class Tokenizer:
    """Bytes to token ids and back, without loss for any byte string.

    `encode` never yields a special id: text such as `<mask>` or `</s>` is ordinary text.

    Args:
        model: A serialized SentencePiece model.

    Raises:
        ValueError: If the model cannot be read, or lacks the mask, another special id or the byte pieces.
    """

    def __init__(self, model: bytes) -> None:
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise ValueError(
                f"the tokenizer model ({len(model)} bytes) is not a SentencePiece model: {error}; give a "
                "tokenizer.model written by `megadiff prepare`."
            ) from error
        self.vocab_size: int = self._processor.vocab_size()
        self._bytes_of_piece = [self._piece_bytes(index) for index in range(self.vocab_size)]
        self._byte_ids = {
            self._bytes_of_piece[index][0]: index for index in range(self.vocab_size) if self._processor.IsByte(index)
        }
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        self.pad_id: int = self._processor.pad_id()
        self.unk_id: int = self._processor.unk_id()
        self.mask_id: int = self._processor.piece_to_id(MASK_PIECE)

        needed = {
            f"the control symbol {MASK_PIECE}": self._processor.IsControl(self.mask_id),
            "BOS, EOS, PAD or UNK": min(self.bos_id, self.eos_id, self.pad_id, self.unk_id) >= 0,
            "byte pieces": len(self._byte_ids) == NUM_BYTE_PIECES,
        }
        if not all(needed.values()):
            missing = ", ".join(name for name, present in needed.items() if not present)
            raise ValueError(
                f"the tokenizer model of {self.vocab_size} pieces lacks {missing}; give a tokenizer.model "
                "written by `megadiff prepare`."
            )

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a model file.

        Raises:
            ValueError: If there is no such file, or it is no usable model.
        """
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"tokenizer {path} is not a file; give a tokenizer.model written by `megadiff prepare`.")
        return cls(path.read_bytes())

    @classmethod
    def train(cls, documents: Iterable[bytes], vocab_size: int, path: str | Path) -> Tokenizer:
        """Learn `vocab_size` pieces from `documents` and write the model to `path`.

        The ids are BOS 0, EOS 1 (end of document), PAD 2, MASK 3, UNK 4 (never produced), then 256 bytes,
        then the learned pieces.

        Raises:
            ValueError: If the documents hold no words, or too few for `vocab_size`, or it is too small.
        """
        if vocab_size < MIN_VOCAB_SIZE:
            raise ValueError(
                f"vocab_size must be at least {NUM_SPECIAL_PIECES} special pieces + {NUM_BYTE_PIECES} bytes "
                f"+ {MIN_LEARNED_PIECES} learned ones, got {vocab_size}; give a larger --vocab-size."
            )
        counts = Counter[str]()
        for document in documents:
            counts.update(_WORD.findall(document.decode("utf-8", "surrogateescape")))
        if not counts:
            raise ValueError("the corpus holds no words to train a tokenizer on; give text with --input.")
        logger.info("tokenizer: learning a vocabulary of %d from %d distinct words", vocab_size, len(counts))
        try:
            model = _learn_pieces(counts, vocab_size)
        except RuntimeError as error:
            largest = _largest_vocab_size(counts, vocab_size)
            smaller = f"--vocab-size {largest} or less, or " if largest >= MIN_VOCAB_SIZE else ""
            raise ValueError(
                f"vocab_size {vocab_size} does not fit a corpus of {len(counts)} distinct words; "
                f"give {smaller}more text with --input."
            ) from error
        tokenizer = cls(model)
        Path(path).write_bytes(model)
        return tokenizer

    def encode(self, text: bytes | str) -> list[int]:
        """Return the token ids of `text`, without BOS or EOS.

        A `str` stands for its UTF-8 bytes; surrogate escapes (as in `sys.argv`) stand for raw bytes.

        Raises:
            ValueError: If a `str` holds a surrogate that stands for no byte.
        """
        if isinstance(text, bytes):
            text = text.decode("utf-8", "surrogateescape")
        ids: list[int] = []
        for index, run in enumerate(_NOT_CARRIED.split(text)):
            if index % 2 == 1:  # split() puts what the pattern matched at the odd places
                ids.extend(self._byte_ids[byte] for byte in run.encode("utf-8", "surrogateescape"))
            else:
                for segment in _segments(run):
                    ids.extend(self._processor.encode(segment))
        return ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the bytes that `ids` stand for; special ids stand for none.

        Raises:
            ValueError: If an id lies outside the vocabulary.
        """
        pieces = []
        for index in map(int, ids):
            if not 0 <= index < self.vocab_size:
                raise ValueError(
                    f"token id {index} is outside the vocabulary [0, {self.vocab_size}); decode with the "
                    "tokenizer that the tokens were made with."
                )
            pieces.append(self._bytes_of_piece[index])
        return b"".join(pieces)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text that `ids` stand for; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def token_bytes(self) -> np.ndarray:
        """Return the number of bytes that each token stands for, int32 [V]; 0 for special ids."""
        return np.array([len(piece) for piece in self._bytes_of_piece], dtype=np.int32)

    def _piece_bytes(self, index: int) -> bytes:
        if self._processor.IsControl(index) or self._processor.IsUnknown(index):
            return b""
        piece = self._processor.id_to_piece(index)
        if self._processor.IsByte(index):
            return bytes([int(piece.removeprefix("<0x").removesuffix(">"), 16)])
        return piece.replace(SPACE_MARK, " ").encode("utf-8")


def adopted_model(model: bytes) -> tuple[bytes, int]:
    """Make a SentencePiece model that was trained elsewhere one that loses nothing and has what `Tokenizer` needs.

    Normalisation, the dummy prefix and the removal of spaces are switched off, and the mask and the padding symbol
    appended where there is none: no id changes. A model that lacks nothing stays as it is, byte by byte.

    Returns:
        The model, and how many pieces were appended.

    Raises:
        ValueError: If it is no SentencePiece model.
    """
    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # made at import
    try:
        proto.ParseFromString(model)
    except DecodeError as error:
        raise ValueError(
            f"the tokenizer model ({len(model)} bytes) is not a SentencePiece model: {error}; give a tokenizer.model."
        ) from error
    before = proto.SerializeToString(deterministic=True)
    normaliser = proto.normalizer_spec
    normaliser.add_dummy_prefix = False
    normaliser.remove_extra_whitespaces = False
    if normaliser.precompiled_charsmap:
        normaliser.precompiled_charsmap = b""
    present = {piece.piece for piece in proto.pieces}
    new = [name for name in (MASK_PIECE, proto.trainer_spec.pad_piece) if name not in present]
    for name in new:
        proto.pieces.add(piece=name, score=0.0, type=proto.SentencePiece.CONTROL)
    after = proto.SerializeToString(deterministic=True)
    return (model if after == before else after), len(new)


def _learn_pieces(counts: Counter[str], vocab_size: int, **options: Any) -> bytes:
    """Return a model of `vocab_size` pieces; SentencePiece raises RuntimeError where the words give fewer."""
    num_learned = vocab_size - NUM_SPECIAL_PIECES - NUM_BYTE_PIECES
    words = _without_rare_characters(counts, max_characters=num_learned // 2)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(f"{word}\t{count}" for word, count in sorted(words.items())),
        model_writer=model,
        input_format="tsv",
        model_type="bpe",
        vocab_size=vocab_size,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        byte_fallback=True,
        allow_whitespace_only_pieces=True,
        # The words are already cut: within one, any merge is welcome.
        split_by_whitespace=False,
        split_by_unicode_script=False,
        split_by_number=False,
        max_sentencepiece_length=32,
        character_coverage=1.0,
        bos_id=BOS_ID,
        eos_id=EOS_ID,
        pad_id=PAD_ID,
        unk_id=UNK_ID,
        control_symbols=MASK_PIECE,  # takes the first free id, 3
        num_threads=1,
        minloglevel=2,
        **options,
    )
    return model.getvalue()


def _largest_vocab_size(counts: Counter[str], too_large: int) -> int:
    """Return the largest size that the words fill, or one below `MIN_VOCAB_SIZE` if they fill none.

    A smaller vocabulary keeps fewer characters, which may leave fewer pieces again: hence the repetition.
    """
    size, num_pieces = too_large + 1, too_large
    while MIN_VOCAB_SIZE <= num_pieces < size:
        learned = Tokenizer(_learn_pieces(counts, num_pieces, hard_vocab_limit=False))
        size, num_pieces = num_pieces, learned.vocab_size
    return num_pieces


def _segments(text: str) -> Iterator[str]:
    """Cut `text` into pieces of at most `SEGMENT_LENGTH` characters, after a line end where there is one."""
    start = 0
    while start < len(text):
        end = start + SEGMENT_LENGTH
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        yield text[start:end]
        start = end


def _without_rare_characters(counts: Counter[str], max_characters: int) -> Counter[str]:
    """Cut the words at rare characters, which are left to the byte pieces.

    Rare are the last characters by frequency: one in two thousand of the text, or as many as it takes to
    keep at most `max_characters` distinct ones (thousands of ideographs would leave no room for words).
    """
    characters = Counter[str]()
    for word, count in counts.items():
        for character in word:
            characters[character] += count
    kept: list[str] = []
    enough = 0.9995 * characters.total()
    for character, count in sorted(characters.items(), key=lambda item: (-item[1], item[0]))[:max_characters]:
        if enough <= 0:
            break
        kept.append(character)
        enough -= count
    rare = re.compile(f"[^{re.escape(''.join(kept))}]")
    words = Counter[str]()
    for word, count in counts.items():
        for part in filter(None, rare.split(word)):
            words[part] += count
    return words
