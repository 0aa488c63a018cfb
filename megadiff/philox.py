"""Philox4x32-10: random words as a pure function of (seed, stream ordinal, position, purpose).

Every random number of megadiff comes from here: noise, sampling, initial weights, shuffling. No generator
object exists anywhere, hence tensor-parallel ranks, pipeline stages, context-parallel slices and resumed runs
draw the same words without exchanging a byte, and a slice of the arguments gives the same slice of the words.

The counter layout is a contract shared with the native kernels:

    key     = (seed_lo, seed_hi)
    counter = (position, purpose * 2**24 + block, ordinal_lo, ordinal_hi)

Words are 32-bit integers held in int64 tensors. Torch has no unsigned 64-bit product, so 32 x 32-bit products
are assembled from 16-bit halves. Probabilities become integer thresholds and ids come from the high half of a
product, never from a floating-point scaling of the word: two devices then agree bit for bit, and no id is
favoured.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

from __future__ import annotations

import math
from enum import IntEnum

import torch
from torch import Tensor

WORD_RANGE = 1 << 32
"""Number of values of one word."""

VALIDATION_OFFSET = 128
"""Added to a purpose, it gives validation a stream of its own."""

_WORD_MASK = WORD_RANGE - 1
_BLOCK_BITS = 24
_NUM_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)


class Purpose(IntEnum):
    """What words are drawn for; one stream each, so that no two uses ever share a word."""

    TOKEN = 0
    """Corruption of one token; words: level, keep, kind, id."""
    SEQUENCE = 1
    """Choices for a whole sequence; words: level, independent?, prompt?, prompt length."""
    ORDER = 2
    """Random orders of positions."""
    GAUSSIAN = 3
    """Gaussian latents behind discrete noise; words of block k: the k-th largest, its id, its order, the clean one."""
    INSERT = 4
    """Insertion of empty tokens."""
    SAMPLER = 5
    """Draws of the reverse process; the block is the step."""
    WEIGHT = 6
    """Initial weights."""
    SHUFFLE = 7
    """Order of the training samples."""


def _multiply_high_low(multiplier: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """Return the high and the low 32 bits of `multiplier * word`; no intermediate exceeds 2**49."""
    low_product = (multiplier & 0xFFFF) * word
    middle = (multiplier >> 16) * word + (low_product >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low_product & 0xFFFF)


def philox(
    counter: tuple[Tensor | int, Tensor | int, Tensor | int, Tensor | int], key: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Encrypt a 128-bit counter under a 64-bit key with ten Philox4x32 rounds.

    Args:
        counter: Four words in [0, 2**32), ints or int64 tensors that broadcast together, least significant
            first.
        key: Two words in [0, 2**32), least significant first.

    Returns:
        Four int64 tensors of the broadcast shape, each in [0, 2**32).
    """
    c0, c1, c2, c3 = (torch.as_tensor(word, dtype=torch.int64) for word in counter)
    k0, k1 = key
    for _ in range(_NUM_ROUNDS):
        high_0, low_0 = _multiply_high_low(_MULTIPLIERS[0], c0)
        high_1, low_1 = _multiply_high_low(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0 = (k0 + _KEY_INCREMENTS[0]) & _WORD_MASK
        k1 = (k1 + _KEY_INCREMENTS[1]) & _WORD_MASK
    return c0, c1, c2, c3


def random_words(
    seed: int, ordinal: Tensor | int, position: Tensor | int, purpose: int, block: Tensor | int = 0
) -> Tensor:
    """Draw four random words for every (ordinal, position).

    Args:
        seed: The run's seed, in [0, 2**64).
        ordinal: The sample's place in the training stream, 64 bits; int64 of any shape, or an int.
        position: The place inside the sample, of which the low 32 bits count; int64 that broadcasts with
            `ordinal`, or an int.
        purpose: A `Purpose`, plus `VALIDATION_OFFSET` for validation; in [0, 256).
        block: Further words of the same place, in [0, 2**24); int64 that broadcasts too, or an int.

    Returns:
        int64 words in [0, 2**32), of shape broadcast(ordinal, position, block) + (4,).

    Raises:
        ValueError: If seed, purpose or an integer block is out of range.
    """
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed must lie in [0, 2**64), got {seed}; choose a non-negative 64-bit integer.")
    if not 0 <= purpose < 1 << 8:
        raise ValueError(f"purpose must lie in [0, 256), got {purpose}; use a Purpose, at most once offset.")
    if isinstance(block, int) and not 0 <= block < 1 << _BLOCK_BITS:
        raise ValueError(f"block must lie in [0, 2**{_BLOCK_BITS}), got {block}; use another ordinal for more words.")
    counter = (
        position & _WORD_MASK,
        purpose * (1 << _BLOCK_BITS) + block,
        ordinal & _WORD_MASK,
        (ordinal >> 32) & _WORD_MASK,
    )
    return torch.stack(philox(counter, (seed & _WORD_MASK, seed >> 32)), dim=-1)


def uniform_from_words(words: Tensor) -> Tensor:
    """Map each word to the float64 centre of its cell of width 2**-32 in the open interval (0, 1)."""
    return (words.double() + 0.5) / WORD_RANGE


def threshold(probability: Tensor) -> Tensor:
    """Return the int64 number below which a word falls with the given probability.

    Args:
        probability: float64, any shape; rounded to a multiple of 2**-32 and clamped to [0, 1].

    Returns:
        int64 in [0, 2**32] of the same shape: `word < threshold(p)` never holds at p = 0 and always at p = 1.
    """
    return (probability.double() * WORD_RANGE).round().clamp(0, WORD_RANGE).long()


def multiply_high(word: Tensor, n: int) -> Tensor:
    """Map words to uniform integers in [0, n) as floor(word * n / 2**32).

    Args:
        word: int64 words in [0, 2**32), any shape.
        n: Number of outcomes, in [1, 2**31]. An outcome's probability is off by less than 2**-32.

    Returns:
        int64 of the same shape.

    Raises:
        ValueError: If n is out of range.
    """
    if not 1 <= n <= 1 << 31:
        raise ValueError(f"n must lie in [1, 2**31], got {n}; the product with a word must stay below 2**63.")
    return (word * n) >> 32


def standard_normal(words: Tensor) -> Tensor:
    """Turn pairs of words into standard normal numbers by the Box-Muller transform.

    Args:
        words: int64 words of shape [..., 2].

    Returns:
        float64 of shape [...]; magnitudes stay below 6.8 because a word has 32 bits. Devices may differ in
        the last bits, as their logarithms and cosines do.
    """
    uniform = uniform_from_words(words)
    return torch.sqrt(-2.0 * torch.log(uniform[..., 0])) * torch.cos(2.0 * math.pi * uniform[..., 1])
