"""The order of training samples as a function: ordinal in the stream -> window of the corpus.

Each epoch visits every window once, in an order of its own. The order is a keyed permutation (a Feistel
network), not a shuffled list: any ordinal is looked up in constant time and memory, so a run resumes from
one integer and every rank finds its own samples without a table.

A Feistel network permutes the integers of 2w bits whatever its round function is. To permute [0, n), with w
the smallest that holds n, a value that lands outside is sent through again until it lands inside (cycle
walking), at most four times on average since 2**(2w) < 4n.

Sources: Luby and Rackoff, "How to construct pseudorandom permutations from pseudorandom functions" (1988);
Black and Rogaway, "Ciphers with arbitrary finite domains" (CT-RSA 2002), section 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from megadiff.philox import Purpose, random_words

_NUM_ROUNDS = 8
_MIN_HALF_BITS = 2


class SampleOrder:
    """A keyed permutation of the windows for each epoch.

    Args:
        num_windows: Windows per epoch, n.
        seed: Key of the order, in [0, 2**64).

    Raises:
        ValueError: If there are no windows.
    """

    def __init__(self, num_windows: int, seed: int) -> None:
        if num_windows < 1:
            raise ValueError(f"num_windows must be at least 1, got {num_windows}; give a larger corpus.")
        self.num_windows = num_windows
        self.seed = seed
        self._half_bits = max(_MIN_HALF_BITS, ((num_windows - 1).bit_length() + 1) // 2)

    def windows(self, ordinals: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return the window that each ordinal reads, int64, of the ordinals' shape.

        The epoch is the ordinal divided by the number of windows; within an epoch no window repeats.
        """
        epochs, places = np.divmod(np.asarray(ordinals, dtype=np.int64), self.num_windows)
        distinct_epochs, which = np.unique(epochs, return_inverse=True)
        round_keys = self._round_keys(distinct_epochs)[:, which.reshape(epochs.shape)]
        values = self._feistel(places.astype(np.uint64), round_keys)
        while (outside := values >= self.num_windows).any():
            values[outside] = self._feistel(values[outside], round_keys[:, outside])
        return values.astype(np.int64)

    def _round_keys(self, epochs: np.ndarray) -> np.ndarray:
        """Draw one 32-bit key per round for each epoch, uint64 [rounds, epochs]."""
        words = random_words(
            self.seed,
            torch.from_numpy(epochs),
            torch.arange(_NUM_ROUNDS // 4)[:, None],
            Purpose.SHUFFLE,
        )
        return words.movedim(-1, 1).reshape(_NUM_ROUNDS, len(epochs)).numpy().astype(np.uint64)

    def _feistel(self, values: np.ndarray, round_keys: np.ndarray) -> np.ndarray:
        half = np.uint64(self._half_bits)
        mask = np.uint64((1 << self._half_bits) - 1)
        left, right = values >> half, values & mask
        for key in round_keys:
            left, right = right, left ^ (_mix(right, key) & mask)
        return (left << half) | right


def _mix(values: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Scramble the low 32 bits, with a key for each value.

    Products by odd constants, each folded back by a shift, as in MurmurHash3's finaliser (Appleby).
    """
    low = np.uint64(0xFFFFFFFF)
    values = (values + key) & low
    values = ((values ^ (values >> np.uint64(16))) * np.uint64(0x85EBCA6B)) & low
    values = ((values ^ (values >> np.uint64(13))) * np.uint64(0xC2B2AE35)) & low
    return values ^ (values >> np.uint64(16))
