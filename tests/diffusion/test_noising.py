"""Drawing noise: right frequencies, evenly spread levels, and the noise of slices is the slice of noise."""

import math

import pytest
import torch
from chance import assert_frequencies, assert_uniform

from megadiff.diffusion import (
    DiffusionProcess,
    HybridMixing,
    MaskedMixing,
    NoiseSchedule,
    UniformMixing,
    corrupt,
    noise_rows,
    sequence_log_snr,
)
from megadiff.philox import VALIDATION_OFFSET, Purpose, random_words

V, MASK = 7, 3
SEED = 1234


def process_of(mixing):
    return DiffusionProcess(NoiseSchedule(), mixing)


def times(ordinals, seed=SEED, purpose_offset=0):
    schedule = NoiseSchedule()
    return schedule.time(sequence_log_snr(schedule, seed, torch.as_tensor(ordinals), purpose_offset))


def star_discrepancy(points_WN):
    """Largest gap between the empirical and the uniform distribution function, per window."""
    ordered = points_WN.sort(-1).values
    steps = torch.arange(points_WN.shape[-1] + 1, dtype=torch.float64) / points_WN.shape[-1]
    return torch.maximum((steps[1:] - ordered).amax(-1), (ordered - steps[:-1]).amax(-1))


@pytest.mark.parametrize("window", [8, 64, 500])
def test_every_window_of_samples_spreads_evenly(window):
    for start in (0, 10**6, 1 << 40):
        stream = times(torch.arange(start, start + 4000))
        discrepancy = star_discrepancy(stream.unfold(0, window, 1)).max().item()
        # Independent draws would have 0.87/√window on average; the golden ratio has O(log(window)/window).
        assert discrepancy < (1 + math.log(window)) / (2 * window) + 1 / window
        assert discrepancy < 0.75 * 0.87 / math.sqrt(window)


def test_windows_of_every_rank_spread_evenly_too():
    for num_ranks in (2, 8, 24):
        stream = times(torch.arange(5, 5 + 256 * num_ranks, num_ranks))
        assert star_discrepancy(stream) < 0.75 * 0.87 / 16


def test_times_are_exact_64_bit_rotations():
    golden = (math.isqrt(5 << 128) - (1 << 64)) // 2  # floor(2**64 / φ)
    ordinals = [0, 1, 12345, (1 << 33) + 7, (1 << 62) + 11, (1 << 63) - 1]
    level = int(random_words(SEED, torch.tensor(0), torch.tensor(0), Purpose.SEQUENCE)[0])
    exact = [((n * (golden | 1) + (level << 32)) % (1 << 64)) / (1 << 64) for n in ordinals]
    torch.testing.assert_close(times(ordinals), torch.tensor(exact, dtype=torch.float64), rtol=0, atol=1e-12)


def test_levels_differ_between_seeds_and_from_validation_and_are_uniform_over_seeds():
    ordinals = torch.arange(4)
    assert (times(ordinals) - times(ordinals, purpose_offset=VALIDATION_OFFSET)).abs().min() > 1e-3
    over_seeds = torch.stack([times(ordinals, seed) for seed in range(400)], dim=-1)
    for of_ordinal in over_seeds:
        assert_uniform(of_ordinal)


def test_levels_of_a_slice_are_the_slice_of_the_levels():
    ordinals = torch.arange(100, 164)
    whole = sequence_log_snr(NoiseSchedule(), SEED, ordinals)
    assert whole.dtype == torch.float64
    assert whole.min() >= -9 and whole.max() <= 9
    assert torch.equal(sequence_log_snr(NoiseSchedule(), SEED, ordinals[17:40]), whole[17:40])


MIXINGS = [
    MaskedMixing(V, MASK),
    *(UniformMixing(V, mask_id) for mask_id in (0, MASK, V - 1)),
    UniformMixing(V, MASK, include_mask=True),
    *(HybridMixing(V, MASK, shift) for shift in (-1000.0, -2.0, 0.0, 2.0, 1000.0)),
]


@pytest.mark.parametrize("mixing", MIXINGS, ids=str)
@pytest.mark.parametrize("log_snr", [-2.0, 1.0])
def test_corruption_frequencies_are_the_marginal(mixing, log_snr):
    process, token = process_of(mixing), 5
    tokens = torch.full((100, 400), token)
    levels = torch.full((100, 1), log_snr, dtype=torch.float64)
    noised = corrupt(tokens, levels, torch.arange(100) + (1 << 35), SEED, process)
    probs = process.marginal_at(levels[0], torch.tensor(token), torch.arange(V))
    assert_frequencies(noised, probs)


def test_corruption_follows_the_word_contract():
    process, seed, length = process_of(HybridMixing(V, MASK, 0.3)), (1 << 50) + 3, 64
    ordinals = [9, 1 << 45]
    tokens = (torch.arange(2 * length) % V).view(2, length)
    log_snr = torch.linspace(-2, 2, 2 * length, dtype=torch.float64).view(2, length)
    expected = torch.empty_like(tokens)
    for b, ordinal in enumerate(ordinals):
        for i in range(length):
            words = random_words(seed, torch.tensor(ordinal), torch.tensor(i), Purpose.TOKEN)
            _, keep, kind, drawn = words.tolist()
            level = log_snr[b, i].item()
            uniform_id = drawn * (V - 1) >> 32
            noise = uniform_id + (uniform_id >= MASK) if kind < 2**32 / (1 + math.exp(-level - 0.3)) else MASK
            expected[b, i] = tokens[b, i] if keep < 2**32 / (1 + math.exp(-level)) else noise
    assert torch.equal(corrupt(tokens, log_snr, torch.tensor(ordinals), seed, process), expected)
    assert len(expected.unique()) == V


def test_certain_levels_keep_or_replace_every_token():
    tokens = torch.arange(12).view(2, 6) % MASK
    ordinal, process = torch.arange(2), process_of(MaskedMixing(V, MASK))
    ends = torch.tensor([[1000.0], [-1000.0]], dtype=torch.float64)
    noised = corrupt(tokens, ends, ordinal, SEED, process)
    assert torch.equal(noised[0], tokens[0]) and (noised[1] == MASK).all()


def test_noise_of_a_slice_is_the_slice_of_the_noise():
    process, ordinal = process_of(HybridMixing(V, MASK, 0.0)), torch.arange(40, 48)
    tokens = torch.randint(V, (8, 32), generator=torch.Generator().manual_seed(0))
    log_snr = sequence_log_snr(process.schedule, SEED, ordinal)[:, None].expand(8, 32)
    whole = corrupt(tokens, log_snr, ordinal, SEED, process)
    batch_slice = corrupt(tokens[3:5], log_snr[3:5], ordinal[3:5], SEED, process)
    assert torch.equal(batch_slice, whole[3:5])
    positions = torch.tensor([4, 5, 6, 7, 24, 25, 26, 27])
    zigzag = corrupt(tokens[:, positions], log_snr[:, :1], ordinal, SEED, process, position_L=positions)
    assert torch.equal(zigzag, whole[:, positions])
    shuffled = torch.tensor([6, 0, 3])
    assert torch.equal(corrupt(tokens[shuffled], log_snr[shuffled], ordinal[shuffled], SEED, process), whole[shuffled])


def test_validation_and_seeds_have_noise_of_their_own_and_dtype_is_kept():
    process, ordinal = process_of(MaskedMixing(V, MASK)), torch.arange(8)
    tokens, level = torch.zeros(8, 32, dtype=torch.int32), torch.zeros(8, 1)
    noised = corrupt(tokens, level, ordinal, SEED, process)
    assert noised.dtype == torch.int32
    of_validation = corrupt(tokens, level, ordinal, SEED, process, validation=True)
    of_other_seed = corrupt(tokens, level, ordinal, SEED + 1, process)
    for other in (of_validation, of_other_seed):
        assert 0.3 < (noised != other).double().mean() < 0.7


@pytest.mark.parametrize(
    "level_shape, ordinal_shape, position_shape",
    [((2,), (2,), (3,)), ((2, 2), (2,), (3,)), ((2, 3), (2, 1), (3,)), ((2, 3), (2,), (2,))],
)
def test_shapes_that_do_not_fit_are_refused(level_shape, ordinal_shape, position_shape):
    with pytest.raises(ValueError, match="log_snr_BL, ordinal_B and position_L must have shapes"):
        corrupt(
            torch.zeros(2, 3, dtype=torch.int64),
            torch.zeros(level_shape),
            torch.zeros(ordinal_shape, dtype=torch.int64),
            SEED,
            process_of(MaskedMixing(V, MASK)),
            position_L=torch.zeros(position_shape, dtype=torch.int64),
        )


@pytest.mark.parametrize("mixing", MIXINGS, ids=str)
@pytest.mark.parametrize("per_token", [False, True])
def test_numbers_of_the_rows_are_those_of_the_process(mixing, per_token):
    process, ordinal = process_of(mixing), torch.arange(8)
    tokens = torch.randint(V, (8, 32), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    log_snr = torch.linspace(-9, 9, 256, dtype=torch.float64).view(8, 32)
    log_snr = log_snr if per_token else log_snr[:, :1]
    counted, position = tokens > 1, torch.arange(32) + 100
    rows = noise_rows(tokens, log_snr, ordinal, counted, SEED, process, validation=True, position_L=position)
    noised = corrupt(tokens, log_snr, ordinal, SEED, process, validation=True, position_L=position)
    assert rows.noised.dtype == tokens.dtype and torch.equal(rows.noised, noised)
    levels = log_snr.expand(8, 32)
    weight = process.loss_weight(levels, tokens, noised)
    elbo_weight = process.elbo_weight(levels, tokens, noised)
    for numbers, expected in (
        (rows.alpha, process.alpha(levels)),
        (rows.uniform_mass, process.uniform_mass(levels)),
        (rows.loss_weight, weight * counted),
        (rows.elbo_weight, elbo_weight * counted),
    ):
        assert numbers.dtype == torch.float32 and torch.equal(numbers, expected.float())


def test_a_choice_of_counted_tokens_of_another_shape_is_refused():
    tokens, level = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 1)
    with pytest.raises(ValueError, match=r"counted_BL must have the tokens' shape \(2, 3\), got \(2, 1\)"):
        noise_rows(tokens, level, torch.arange(2), level > 0, SEED, process_of(MaskedMixing(V, MASK)))
