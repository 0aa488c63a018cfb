"""Examples to fine-tune on, as samples: what was said before a response, the response, end-of-text, and filling.

    given                        counted
    prompt [response prompt …]   response  end-of-text  | end-of-text …  counted too, or
                                                        | padding …      neither given nor counted

A prompt is never noised and never in the loss. The corpus holds conversations whole, so that none is in both splits;
which of their responses are learned, and how samples are filled up, is a matter of the run. Nothing is packed and
nothing is cut: a response that does not fit behind what precedes it is left out.
"""

from __future__ import annotations

import logging
from typing import Literal

import numpy as np

from megadiff.data.corpus import TokenStream
from megadiff.data.samples import Sample

logger = logging.getLogger(__name__)


class Examples:
    """The responses of a split that fit into a sample, in the order of the corpus.

    Takes 24 bytes of memory per response.

    Args:
        stream: A split of a corpus of examples.
        sequence_length: L.
        eos_id: End-of-text: what a response ends with.
        pad_id: What fills up a sample where that does not count.
        responses: Of each conversation the last response, or every one as a sample of its own.
        pad_in_loss: Whether samples are filled up with end-of-text that counts.

    Raises:
        ValueError: If no response fits, or documents are not prompts and responses in turn.
    """

    def __init__(
        self,
        stream: TokenStream,
        sequence_length: int,
        *,
        eos_id: int,
        pad_id: int,
        responses: Literal["last", "every"] = "last",
        pad_in_loss: bool = True,
    ) -> None:
        self.path = stream.path
        self.sequence_length = sequence_length
        self._stream = stream
        self._eos_id = eos_id
        self._pad_id = pad_id
        self._pad_in_loss = pad_in_loss

        lengths, per_document = stream.sequences()
        if (per_document % 2).any():
            raise ValueError(
                f"corpus index {stream.index_path} has documents of an odd number of parts, expected prompts and "
                "responses in turn; run `megadiff prepare` again."
            )
        ends = lengths.cumsum()
        num_responses = per_document // 2
        is_last = np.zeros(len(lengths) // 2, dtype=bool)
        is_last[num_responses.cumsum() - 1] = True
        first_part = np.repeat(per_document.cumsum() - per_document, num_responses)
        begin, response = (ends - lengths)[first_part], (ends - lengths)[1::2]
        end = ends[1::2] - is_last  # documents are stored with an end-of-text token, here every response gets one

        wanted = is_last | (responses == "every")
        needed = end + 1 - begin
        fits = wanted & (needed <= sequence_length)
        if not fits.any():
            raise ValueError(
                f"none of the {wanted.sum()} responses of {stream.path} fits with what precedes it into "
                f"data.sequence_length {sequence_length}: the shortest takes {needed[wanted].min()} tokens; "
                "give longer sequences."
            )
        logger.info(  # no warning: those are shown by every rank
            "%s: %d examples; %d more do not fit into %d tokens and are left out",
            stream.name,
            fits.sum(),
            (wanted & ~fits).sum(),
            sequence_length,
        )
        self._begin, self._response, self._end = begin[fits], response[fits], end[fits]

    def __len__(self) -> int:
        return len(self._begin)

    def __getitem__(self, index: int) -> Sample:
        begin, response, end = (int(place[index]) for place in (self._begin, self._response, self._end))
        tokens_L = np.full(self.sequence_length, self._eos_id if self._pad_in_loss else self._pad_id)
        num_tokens = end - begin
        tokens_L[:num_tokens] = self._stream.tokens(begin, num_tokens)
        tokens_L[num_tokens] = self._eos_id
        num_given = response - begin
        num_counted = (self.sequence_length if self._pad_in_loss else num_tokens + 1) - num_given
        return Sample(tokens_L, num_given, num_counted)
