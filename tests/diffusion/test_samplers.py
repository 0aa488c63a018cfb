"""Ancestral sampling: exact for an exact denoiser, faithful to the prompt, a pure function of its seed."""

import math

import pytest
import torch
from chance import STANDARD_ERRORS, assert_frequencies

from megadiff.diffusion import (
    DiffusionProcess,
    HybridMixing,
    MaskedMixing,
    NoiseSchedule,
    UniformMixing,
    ancestral_sample,
)
from megadiff.philox import Purpose, random_words

V, MASK = 6, 3
P = torch.tensor([0.4, 0.25, 0.05, 0.0, 0.2, 0.1], dtype=torch.float64)
MIXINGS = [
    MaskedMixing(V, MASK),
    UniformMixing(V, MASK),
    UniformMixing(V, MASK, include_mask=True),
    HybridMixing(V, MASK, 0.0),
    HybridMixing(V, MASK, 2.0),
]


def process_of(mixing):
    return DiffusionProcess(NoiseSchedule(), mixing)


def oracle(noised_BL, log_snr):
    """Exact logits for tokens drawn independently from P, with a loud logit for the mask."""
    logits = P.log().masked_fill(torch.arange(V) == MASK, 50.0)
    return logits.expand(*noised_BL.shape, V)


def free_canvas(batch_size, length):
    canvas = torch.zeros(batch_size, length, dtype=torch.int64)
    return canvas, torch.zeros_like(canvas, dtype=torch.bool)


@pytest.mark.parametrize("mixing", MIXINGS, ids=str)
@pytest.mark.parametrize("grid, num_steps, renewal", [("cosine", 7, 0), ("linear", 4, 1.0), ("cosine", 1, 0.5)])
def test_samples_of_an_exact_denoiser_follow_the_data(mixing, grid, num_steps, renewal):
    canvas, fixed = free_canvas(200, 100)
    tokens = ancestral_sample(oracle, process_of(mixing), canvas, fixed, 5, num_steps, grid=grid, renewal=renewal)
    assert_frequencies(tokens, P)


@pytest.mark.parametrize("mixing", MIXINGS, ids=str)
@pytest.mark.parametrize("renewal", [0.0, 0.3, 1.0])
def test_every_step_has_the_marginal_of_its_level(mixing, renewal):
    process, (canvas, fixed) = process_of(mixing), free_canvas(200, 100)
    states = {}
    ancestral_sample(oracle, process, canvas, fixed, 5, 5, grid="linear", renewal=renewal, progress=states.__setitem__)
    assert sorted(states) == [1, 2, 3, 4, 5]
    for step in (1, 2, 3, 4):
        level = process.schedule.log_snr(torch.tensor(1 - step / 5, dtype=torch.float64))
        assert_frequencies(states[step], process.marginal(level, P))
    assert_frequencies(states[5], P)


@pytest.mark.parametrize("grid", ["cosine", "linear"])
def test_the_denoiser_is_told_the_level_of_what_it_reads(grid):
    process, (canvas, fixed), told = process_of(UniformMixing(V, MASK)), free_canvas(300, 100), []

    def denoise(noised_BL, log_snr):
        told.append(log_snr)
        assert_frequencies(noised_BL, process.marginal(log_snr, P))
        return oracle(noised_BL, log_snr)

    ancestral_sample(denoise, process, canvas, fixed, 6, 5, grid=grid)
    assert told[0] == process.schedule.min_log_snr and len(told) == 5 and sorted(told) == told


def test_more_steps_resolve_dependent_tokens():
    """Two equal tokens: drawn in one step they are independent, in many steps they agree."""

    def copy_the_other(noised_BL, log_snr):
        other = torch.nn.functional.one_hot(noised_BL.flip(1), V).double()
        known = (noised_BL.flip(1) != MASK)[..., None]
        return torch.where(known, 1e3 * other, 0.0)

    canvas, fixed = free_canvas(2000, 2)
    disagreement = {}
    for num_steps in (1, 10, 100):
        tokens = ancestral_sample(
            copy_the_other, process_of(MaskedMixing(V, MASK)), canvas, fixed, 1, num_steps, grid="linear"
        )
        disagreement[num_steps] = (tokens[:, 0] != tokens[:, 1]).double().mean().item()
    # Both are written in the same of n equal steps with probability 1/n, and then differ in 4 cases of 5.
    for num_steps, frequency in disagreement.items():
        expected = 0.8 / num_steps
        assert abs(frequency - expected) < STANDARD_ERRORS * (expected * (1 - expected) / 2000) ** 0.5 + 2e-3


def test_prompts_are_kept_and_seen_and_the_rest_of_the_canvas_is_not():
    canvas = torch.randint(V, (3, 10), generator=torch.Generator().manual_seed(0))
    fixed = torch.zeros(3, 10, dtype=torch.bool)
    fixed[:, :4] = True
    fixed[1, 7] = True
    seen = []

    def denoise(noised_BL, log_snr):
        seen.append(noised_BL)
        return oracle(noised_BL, log_snr)

    process = process_of(HybridMixing(V, MASK, 0.0))
    tokens = ancestral_sample(denoise, process, canvas, fixed, 2, 8)
    assert len(seen) == 8
    assert all(torch.equal(state[fixed], canvas[fixed]) for state in (*seen, tokens))
    scribbled = torch.where(fixed, canvas, (canvas + 1) % V)
    assert torch.equal(ancestral_sample(oracle, process, scribbled, fixed, 2, 8), tokens)


@pytest.mark.parametrize("mixing", MIXINGS, ids=str)
def test_excluded_ids_and_the_mask_are_never_written(mixing):
    canvas, fixed = free_canvas(50, 100)
    tokens = ancestral_sample(oracle, process_of(mixing), canvas, fixed, 3, 3, excluded_ids=(0, 4))
    allowed = P.clone()
    allowed[[0, 4]] = 0
    assert_frequencies(tokens, allowed / allowed.sum())


def test_written_tokens_of_the_masked_process_stay_whatever_the_model_says():
    def restless(noised_BL, log_snr):
        return torch.nn.functional.one_hot((noised_BL + 1) % V, V) * 1e4 + oracle(noised_BL, log_snr)

    states = {}
    canvas, fixed = free_canvas(20, 30)
    process = process_of(MaskedMixing(V, MASK))
    ancestral_sample(restless, process, canvas, fixed, 4, 12, progress=states.__setitem__)
    for step in range(1, 12):
        written = states[step] != MASK
        assert torch.equal(states[step + 1][written], states[step][written])
    assert written.any() and not written.all()


def test_renewal_writes_mistakes_of_the_beginning_anew():
    """A denoiser that says 0 as long as α ≤ ½, and 1 after that: half of the tokens are written too early.

    At every later step a written token is hidden again with probability renewal·(1 − α_s).
    """

    def late_learner(noised_BL, log_snr):
        token = int(log_snr > 0)
        return 100.0 * torch.nn.functional.one_hot(torch.full_like(noised_BL, token), V).double()

    process, (canvas, fixed), mistakes = process_of(MaskedMixing(V, MASK)), free_canvas(400, 40), []
    for renewal in (0.0, 0.5):
        tokens = ancestral_sample(late_learner, process, canvas, fixed, 1, 40, grid="linear", renewal=renewal)
        mistakes.append((tokens == 0).double().mean().item())
    alpha = torch.arange(22, 41) / 40  # after the steps that say 1
    assert mistakes[0] == pytest.approx(21 / 40, abs=0.03)
    assert mistakes[1] == pytest.approx(21 / 40 * (1 - 0.5 * (1 - alpha)).prod().item(), abs=0.015)


def test_samples_are_functions_of_seed_ordinal_and_position():
    process, (canvas, fixed) = process_of(HybridMixing(V, MASK, 0.0)), free_canvas(6, 40)
    tokens = ancestral_sample(oracle, process, canvas, fixed, 9, 6)
    assert torch.equal(ancestral_sample(oracle, process, canvas, fixed, 9, 6), tokens)
    ordinal = torch.tensor([4, 1])
    some = ancestral_sample(oracle, process, canvas[:2], fixed[:2], 9, 6, ordinal_B=ordinal)
    assert torch.equal(some, tokens[ordinal])
    shorter = ancestral_sample(oracle, process, canvas[:, :25], fixed[:, :25], 9, 6)
    assert torch.equal(shorter, tokens[:, :25])
    assert not torch.equal(ancestral_sample(oracle, process, canvas, fixed, 10, 6), tokens)


def test_prior_and_steps_use_one_block_of_sampler_words_each(monkeypatch):
    drawn = []

    def spy(seed, ordinal, position, purpose, block):
        drawn.append((purpose, block))
        return random_words(seed, ordinal, position, purpose, block)

    monkeypatch.setattr("megadiff.diffusion.samplers.random_words", spy)
    ancestral_sample(oracle, process_of(UniformMixing(V, MASK)), *free_canvas(2, 3), 9, 4)
    assert drawn == [(Purpose.SAMPLER, block) for block in range(5)]


@pytest.mark.parametrize("mixing", MIXINGS[:4], ids=str)
def test_low_temperature_writes_the_mode(mixing):
    canvas, fixed = free_canvas(4, 30)
    tokens = ancestral_sample(oracle, process_of(mixing), canvas, fixed, 1, 40, temperature=0.005)
    assert (tokens == 0).all()


def valid_arguments():
    canvas, fixed = free_canvas(2, 3)
    process = process_of(MaskedMixing(V, MASK))
    return dict(denoise=oracle, process=process, canvas_BL=canvas, fixed_BL=fixed, seed=0, num_denoising_steps=2)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(renewal=1.5), "renewal must lie in .0, 1., got 1.5; 0 is ancestral sampling"),
        (dict(canvas_BL=torch.zeros(3, dtype=torch.int64)), "canvas_BL must be int64 of shape"),
        (dict(canvas_BL=torch.zeros(2, 3)), "canvas_BL must be int64 of shape"),
        (dict(fixed_BL=torch.zeros(2, 2, dtype=torch.bool)), "fixed_BL must be bool of the canvas' shape"),
        (dict(fixed_BL=torch.zeros(2, 3)), "fixed_BL must be bool of the canvas' shape"),
        (dict(ordinal_B=torch.arange(3)), "ordinal_B must have shape"),
        (dict(num_denoising_steps=0), "num_denoising_steps must lie in"),
        (dict(num_denoising_steps=1 << 24), "num_denoising_steps must lie in"),
        (dict(temperature=0.0), "temperature must be positive and finite, got 0.0"),
        (dict(temperature=math.inf), "temperature must be positive and finite"),
        (dict(grid="quadratic"), "grid must be 'cosine' or 'linear', got 'quadratic'"),
        (dict(excluded_ids=[V]), "excluded_ids must lie in"),
        (dict(excluded_ids=range(V)), "excluded_ids must lie in .* leave some id to write"),
        (dict(denoise=lambda noised_BL, log_snr: torch.zeros(2, 3, V + 2)), "denoise must return logits of shape"),
    ],
)
def test_bad_arguments_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ancestral_sample(**{**valid_arguments(), **changes})
