"""The megadiff tokenizer for transformers: SentencePiece pieces that stand for bytes, without loss.

Every id stands for fixed bytes, so decoding joins bytes and encoding loses none: what SentencePiece cannot
carry (its own space mark U+2581, and bytes that are no UTF-8, which Python writes as surrogate escapes) is
encoded byte by byte. Special tokens are never read from text: `<mask>` in a text is six characters. To write
a mask into a prompt, insert `tokenizer.mask_token_id`, or call the tokenizer with
`split_special_tokens=False`.
"""

import os
import re
import shutil
from collections.abc import Iterable, Iterator

import sentencepiece
from transformers import PreTrainedTokenizer

SPACE_MARK = "\u2581"
NOT_CARRIED = re.compile(f"([{SPACE_MARK}\ud800-\udfff]+)")
SEGMENT_LENGTH = 8192


class MegadiffTokenizer(PreTrainedTokenizer):
    """Text to ids and back; `decode_bytes` gives the exact bytes where `decode` must give valid text."""

    vocab_files_names = {"vocab_file": "tokenizer.model"}  # noqa: RUF012
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(self, vocab_file: str, **kwargs):
        self.vocab_file = vocab_file
        self.processor = sentencepiece.SentencePieceProcessor(model_file=vocab_file)
        kwargs.setdefault("split_special_tokens", True)
        kwargs.setdefault("clean_up_tokenization_spaces", False)
        kwargs.setdefault("padding_side", "left")
        super().__init__(**kwargs)

    @property
    def vocab_size(self) -> int:
        return self.processor.vocab_size()

    def get_vocab(self) -> dict[str, int]:
        pieces = {self.processor.id_to_piece(index): index for index in range(self.vocab_size)}
        return {**pieces, **self.added_tokens_encoder}

    def _tokenize(self, text: str, **kwargs) -> list[str]:
        pieces: list[str] = []
        for index, run in enumerate(NOT_CARRIED.split(text)):
            if index % 2 == 1:  # split() puts what the pattern matched at the odd places
                pieces.extend(f"<0x{byte:02X}>" for byte in run.encode("utf-8", "surrogateescape"))
            else:
                for segment in _segments(run):
                    pieces.extend(self.processor.encode(segment, out_type=str))
        return pieces

    def _convert_token_to_id(self, token: str) -> int:
        return self.processor.piece_to_id(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self.processor.id_to_piece(index)

    def convert_tokens_to_string(self, tokens: Iterable[str]) -> str:
        return b"".join(map(self._bytes_of, tokens)).decode("utf-8", "replace")

    def decode_bytes(self, token_ids: Iterable[int]) -> bytes:
        """The exact bytes that ids stand for; special ids stand for none."""
        return b"".join(map(self._bytes_of, self.convert_ids_to_tokens(list(token_ids), skip_special_tokens=True)))

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **kwargs,
    ) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        return self.convert_tokens_to_string(self.convert_ids_to_tokens(ids, skip_special_tokens))

    def _bytes_of(self, token: str) -> bytes:
        """The bytes of a piece; the name of a special or added token."""
        index = self.processor.piece_to_id(token)
        if self.processor.IsByte(index):
            return bytes([int(token[3:5], 16)])
        if self.processor.IsControl(index) or self.processor.IsUnknown(index):
            return token.encode("utf-8")
        return token.replace(SPACE_MARK, " ").encode("utf-8")

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None) -> list[int]:
        return token_ids_0 + (token_ids_1 or [])

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        path = os.path.join(save_directory, (f"{filename_prefix}-" if filename_prefix else "") + "tokenizer.model")
        if os.path.abspath(path) != os.path.abspath(self.vocab_file):
            shutil.copyfile(self.vocab_file, path)
        return (path,)


def _segments(text: str) -> Iterator[str]:
    """Cut text as in training, into at most `SEGMENT_LENGTH` characters, after a line end where there is
    one."""
    start = 0
    while start < len(text):
        end = start + SEGMENT_LENGTH
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        yield text[start:end]
        start = end
