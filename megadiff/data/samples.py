"""What a loader reads: samples of one length, numbered from 0.

Text is cut into windows; examples to fine-tune on are samples of their own (`megadiff.data.finetune`). Order, epochs,
ranks and resuming are the loader's and do not depend on which it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from megadiff.data.corpus import TokenStream


@dataclass(frozen=True)
class Sample:
    """L tokens: first those that are given, then those that are predicted and count, then what fills up the rest."""

    tokens_L: np.ndarray
    """int64, in [0, V)."""
    num_given: int
    num_counted: int


class SampleSource(Protocol):
    """Samples of one length, to be read by several threads at once."""

    @property
    def path(self) -> Path:
        """File of the tokens."""
        ...

    @property
    def sequence_length(self) -> int:
        """L."""
        ...

    def __len__(self) -> int:
        """Number of samples, at least 1."""
        ...

    def __getitem__(self, index: int) -> Sample:
        """Read a sample.

        Raises:
            ValueError: If it holds an id outside the vocabulary, or the file is cut short.
            OSError: If the disk fails.
        """
        ...


class Windows:
    """The windows of a stream of texts; all of their tokens count.

    Raises:
        ValueError: If the stream is shorter than one window.
    """

    def __init__(self, stream: TokenStream, sequence_length: int) -> None:
        self.path = stream.path
        self.sequence_length = sequence_length
        self._stream = stream
        self._num_windows = stream.num_windows(sequence_length)

    def __len__(self) -> int:
        return self._num_windows

    def __getitem__(self, index: int) -> Sample:
        return Sample(self._stream.window(index, self.sequence_length), 0, self.sequence_length)
