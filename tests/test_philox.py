"""Philox: known answers, a reference in plain integers, the counter contract, and what is made of words."""

import random

import pytest
import torch
from chance import STANDARD_ERRORS

from megadiff.philox import (
    VALIDATION_OFFSET,
    Purpose,
    multiply_high,
    philox,
    random_words,
    standard_normal,
    threshold,
    uniform_from_words,
)


def scalar_philox(counter, key):
    """Philox4x32-10 on Python integers, which never overflow."""
    c, k = list(counter), list(key)
    for _ in range(10):
        product_0, product_1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [
            (product_1 >> 32) ^ c[1] ^ k[0],
            product_1 & 0xFFFFFFFF,
            (product_0 >> 32) ^ c[3] ^ k[1],
            product_0 & 0xFFFFFFFF,
        ]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


ONES = 0xFFFFFFFF
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ((ONES,) * 4, (ONES,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


@pytest.mark.parametrize("counter, key, expected", KNOWN_ANSWERS)
def test_known_answers(counter, key, expected):
    assert " ".join(f"{int(word):08x}" for word in philox(counter, key)) == expected


def test_equals_the_scalar_reference_on_random_counters():
    rng = random.Random(1)
    counters = [[rng.getrandbits(32) for _ in range(4)] for _ in range(200)]
    key = (rng.getrandbits(32), rng.getrandbits(32))
    words = torch.stack(philox(tuple(torch.tensor(counters).unbind(-1)), key), dim=-1)
    assert words.tolist() == [scalar_philox(counter, key) for counter in counters]


def test_counter_contract_with_64_bit_seed_and_ordinals():
    seed = 0xFEDCBA9876543210
    ordinals = [0, 1, (1 << 32) - 1, 1 << 32, (7 << 40) + 5, (1 << 63) - 1]
    positions = [0, 3, (1 << 32) - 1]
    purpose, block = Purpose.SAMPLER + VALIDATION_OFFSET, 77
    words = random_words(seed, torch.tensor(ordinals)[:, None], torch.tensor(positions), purpose, block)
    assert words.shape == (len(ordinals), len(positions), 4)
    for i, ordinal in enumerate(ordinals):
        for j, position in enumerate(positions):
            counter = (position, purpose * 2**24 + block, ordinal & ONES, ordinal >> 32)
            assert words[i, j].tolist() == scalar_philox(counter, (seed & ONES, seed >> 32))
    with_int_ordinal = random_words(seed, (1 << 64) - 2, torch.tensor(positions), purpose, block)
    counter = (positions[1], purpose * 2**24 + block, ONES - 1, ONES)
    assert with_int_ordinal[1].tolist() == scalar_philox(counter, (seed & ONES, seed >> 32))


def test_slices_purposes_and_blocks():
    ordinal, position = torch.arange(6)[:, None], torch.arange(8)
    whole = random_words(5, ordinal, position, Purpose.TOKEN)
    assert torch.equal(random_words(5, ordinal[2:4], position[3:7], Purpose.TOKEN), whole[2:4, 3:7])
    blocks = random_words(5, ordinal[:, :, None], position[:, None], Purpose.TOKEN, torch.arange(3))
    assert torch.equal(blocks[:, :, 0], whole)
    for other in (
        blocks[:, :, 1],
        random_words(6, ordinal, position, Purpose.TOKEN),
        random_words(5, ordinal, position, Purpose.SHUFFLE),
        random_words(5, ordinal, position, Purpose.TOKEN + VALIDATION_OFFSET),
        random_words(5, ordinal + (1 << 32), position, Purpose.TOKEN),
        random_words(5 + (1 << 32), ordinal, position, Purpose.TOKEN),
    ):
        assert (other == whole).sum() <= 1


def test_purposes_are_numbered_as_the_kernels_expect():
    names = ["TOKEN", "SEQUENCE", "ORDER", "GAUSSIAN", "INSERT", "SAMPLER", "WEIGHT", "SHUFFLE"]
    assert [(p.name, p.value) for p in Purpose] == list(zip(names, range(8), strict=True))


EXTREME_WORDS = torch.tensor([0, 1, ONES - 1, ONES])


def test_thresholds_are_exact_at_both_ends_and_right_between():
    assert not (threshold(torch.tensor(0.0, dtype=torch.float64)) > EXTREME_WORDS).any()
    assert (threshold(torch.tensor(1.0, dtype=torch.float64)) > EXTREME_WORDS).all()
    probabilities = torch.tensor([-1.0, 1.75 * 2.0**-32, 0.25, 1.0 - 2.0**-32, 7.0], dtype=torch.float64)
    assert threshold(probabilities).tolist() == [0, 2, 1 << 30, (1 << 32) - 1, 1 << 32]
    words = random_words(3, torch.arange(5000), torch.zeros((), dtype=torch.int64), Purpose.TOKEN)
    for p in (0.01, 0.5, 0.9):
        frequency = (words < threshold(torch.tensor(p, dtype=torch.float64))).double().mean()
        assert abs(frequency - p) < STANDARD_ERRORS * (p * (1 - p) / words.numel()) ** 0.5


def test_uniforms_stay_inside_the_open_interval():
    uniform = uniform_from_words(EXTREME_WORDS)
    assert uniform.dtype == torch.float64
    assert uniform.tolist() == [2.0**-33, 3 * 2.0**-33, 1 - 3 * 2.0**-33, 1 - 2.0**-33]


@pytest.mark.parametrize("n", [1, 3, 50257, 131071, 131072, 1 << 31])
def test_multiply_high_is_the_integer_formula(n):
    rng = random.Random(n)
    words = [0, 1, ONES - 1, ONES, *(rng.getrandbits(32) for _ in range(50))]
    ids = multiply_high(torch.tensor(words), n).tolist()
    assert ids == [word * n >> 32 for word in words]
    assert min(ids) == 0 and max(ids) == n - 1


def test_standard_normal_has_normal_moments():
    words = random_words(9, torch.arange(100_000), torch.zeros((), dtype=torch.int64), Purpose.WEIGHT)
    normal = standard_normal(words.unflatten(-1, (2, 2))).flatten()
    count = normal.numel()
    moments = [normal.pow(k).mean().item() for k in (1, 2, 3, 4)]
    for moment, expected, variance in zip(moments, (0, 1, 0, 3), (1, 2, 15, 96), strict=True):
        assert abs(moment - expected) < STANDARD_ERRORS * (variance / count) ** 0.5
    below = (normal < torch.tensor([[-2.0], [-1.0], [0.5]])).double().mean(-1)
    expected_below = torch.special.ndtr(torch.tensor([-2.0, -1.0, 0.5], dtype=torch.float64))
    assert torch.allclose(below, expected_below, atol=STANDARD_ERRORS * 0.5 / count**0.5)
    assert standard_normal(torch.cartesian_prod(EXTREME_WORDS, EXTREME_WORDS)).isfinite().all()


@pytest.mark.parametrize(
    "arguments, name",
    [
        (dict(seed=-1), "seed"),
        (dict(seed=1 << 64), "seed"),
        (dict(purpose=256), "purpose"),
        (dict(purpose=-1), "purpose"),
        (dict(block=1 << 24), "block"),
    ],
)
def test_out_of_range_arguments_are_refused(arguments, name):
    zero = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match=rf"^{name} must lie in"):
        random_words(**{"seed": 0, "ordinal": zero, "position": zero, "purpose": 0, **arguments})


@pytest.mark.parametrize("n", [0, (1 << 31) + 1])
def test_multiply_high_refuses_products_beyond_63_bits(n):
    with pytest.raises(ValueError, match=r"^n must lie in"):
        multiply_high(EXTREME_WORDS, n)
