"""Samplers that keep finished tokens: exact for a table of exact conditionals, and frugal with calls."""

import itertools

import pytest
import torch
from chance import STANDARD_ERRORS, assert_frequencies

from megadiff.diffusion import (
    DiffusionProcess,
    MaskedMixing,
    NoiseSchedule,
    ancestral_sample,
    autoregressive_sample,
    block_diffusion_sample,
    eso_lm_sample,
)

V, MASK, BOS, L = 4, 3, 3, 3
TEXTS = torch.tensor(list(itertools.product(range(3), repeat=L)))
P = torch.rand(len(TEXTS), dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.05
P /= P.sum()
PROCESS = DiffusionProcess(NoiseSchedule(), MaskedMixing(V, MASK))
IDS = dict(vocab_size=V, mask_id=MASK)


class Table:
    """`Decode` by exact conditionals of P: each new place given all that it sees, kept or beside it.

    Autoregressive: what is fed at a place is the token before it.
    """

    def __init__(self, autoregressive=False):
        self.lag = 1 if autoregressive else 0
        self.kept = []
        self.fed = []

    def __call__(self, ids_BQ, position_BQ, block_Q, num_kept, log_snr_BQ=None):
        self.fed.append(ids_BQ.shape[1])
        new = list(zip(ids_BQ.T, position_BQ.T, strict=True))
        logits = []
        for query, (_, place_B) in enumerate(new):
            seen = self.kept + [key for i, key in enumerate(new) if block_Q[i] <= block_Q[query]]
            weight = P.expand(len(ids_BQ), len(TEXTS))
            for id_B, at_B in seen:
                told_BT = id_B[:, None] == TEXTS[:, (at_B - self.lag).clamp(min=0)].T
                tells_B = (at_B >= self.lag) & (id_B != MASK)
                weight = torch.where(tells_B[:, None] & ~told_BT, 0.0, weight)
            here_BT = TEXTS[:, place_B].T
            logits.append(torch.stack([torch.where(here_BT == v, weight, 0.0).sum(1) for v in range(V)], dim=1).log())
        self.kept += new[:num_kept]
        assert self.lag or not any((id_B == MASK).any() for id_B, _ in self.kept), "a mask was kept"
        return torch.stack(logits, dim=1)


def ar(canvas, fixed, seed, table=None, **options):
    return autoregressive_sample(table or Table(True), canvas, fixed, seed, bos_id=BOS, **IDS, **options)


def eso(canvas, fixed, seed, table=None, alpha_0=1.0, steps=10**6, **options):
    return eso_lm_sample(table or Table(), canvas, fixed, seed, steps, alpha_0=alpha_0, **IDS, **options)


def block(canvas, fixed, seed, table=None, block_size=2, steps=150, **options):
    return block_diffusion_sample(
        table or Table(), PROCESS, canvas, fixed, seed, steps, block_size=block_size, grid="linear", **options
    )


SAMPLERS = [
    pytest.param(ar, {}, id="autoregressive"),
    *(pytest.param(eso, {"alpha_0": alpha_0}, id=f"eso-lm {alpha_0}") for alpha_0 in (1.0, 0.5, 0.0)),
    pytest.param(block, {}, id="blocks of 2"),
    pytest.param(block, {"renewal": 0.3}, id="blocks of 2, renewed"),
    pytest.param(block, {"block_size": 1, "steps": 1}, id="blocks of 1"),
]


def free_canvas(batch_size, length=L):
    canvas = torch.zeros(batch_size, length, dtype=torch.int64)
    return canvas, torch.zeros_like(canvas, dtype=torch.bool)


@pytest.mark.parametrize("sample, options", SAMPLERS)
@pytest.mark.parametrize("seed", [1, 2])
def test_samples_of_an_exact_model_follow_the_data(sample, options, seed):
    tokens = sample(*free_canvas(5000), seed, **options)
    assert_frequencies(tokens @ torch.tensor([9, 3, 1]), P)


@pytest.mark.parametrize("sample, options", SAMPLERS)
def test_prompts_are_kept_and_seen(sample, options):
    canvas, fixed = free_canvas(5000)
    canvas[:, 0], fixed[:, 0] = 2, True
    tokens = sample(canvas, fixed, 3, **options)
    given = torch.where(TEXTS[:, 0] == 2, P, 0.0)
    assert_frequencies(tokens @ torch.tensor([9, 3, 1]), given / given.sum())


@pytest.mark.parametrize("sample, options", SAMPLERS)
def test_samples_are_functions_of_seed_and_ordinal(sample, options):
    tokens = sample(*free_canvas(50), 9, **options)
    ordinal = torch.tensor([40, 3, 17])
    assert torch.equal(sample(*free_canvas(3), 9, ordinal_B=ordinal, **options), tokens[ordinal])
    assert not torch.equal(sample(*free_canvas(50), 10, **options), tokens)


@pytest.mark.parametrize("sample, options", SAMPLERS)
def test_temperature_excluded_ids_and_progress(sample, options):
    states = {}
    tokens = sample(*free_canvas(300), 4, excluded_ids=[1], progress=states.__setitem__, **options)
    assert set(tokens.unique().tolist()) == {0, 2}
    assert torch.equal(states[max(states)], tokens)
    cold = sample(*free_canvas(300), 4, temperature=1e-3, **options)
    if sample is not eso:  # whose orders differ from sample to sample, and with them what is likely
        assert len(cold.unique(dim=0)) <= 3


def test_autoregressive_calls_feed_every_token_once():
    table = Table(True)
    canvas, fixed = free_canvas(2)
    canvas[:], fixed[:, :2] = torch.tensor([1, 2, 0]), True
    ar(canvas, fixed, 1, table)
    assert table.fed == [3] and [int(id_B[0]) for id_B, _ in table.kept] == [BOS, 1, 2]
    table = Table(True)
    ar(*free_canvas(2), 1, table)
    assert table.fed == [1, 1, 1]


def test_eso_lm_calls_feed_new_tokens_and_the_masks_in_question():
    table = Table()
    eso(*free_canvas(2), 1, table)
    assert table.fed == [1, 2, 2] and len(table.kept) == 2  # what the last call wrote is of no use to anybody
    table = Table()
    eso(*free_canvas(2), 1, table, steps=1)
    assert table.fed == [3] and not table.kept
    canvas, fixed = free_canvas(2)
    fixed[:, :2] = True
    table = Table()
    eso(canvas, fixed, 1, table)
    assert table.fed == [3] and len(table.kept) == 2


class Blind:
    """`Decode` without opinions, to see orders and counts."""

    def __init__(self):
        self.asked = []

    def __call__(self, ids_BQ, position_BQ, block_Q, num_kept, log_snr_BQ=None):
        self.asked.append(position_BQ[:, num_kept:])
        return torch.zeros(*ids_BQ.shape, V)


def test_eso_lm_writes_what_its_schedule_says():
    """Binomial counts for each of four steps, every sample in its own random order, the rest from left to right."""
    length, steps, alpha_0 = 1000, 4, 0.6
    decode = Blind()
    eso(*free_canvas(2, length), 5, decode, alpha_0=alpha_0, steps=steps)
    counts = [asked.shape[1] for asked in decode.asked]
    expected = length * alpha_0 / steps
    assert all(abs(count - expected) < STANDARD_ERRORS * expected**0.5 for count in counts[:steps])
    assert set(counts[steps:]) == {1} and sum(counts) == length
    order = torch.cat(decode.asked, dim=1)
    assert torch.equal(order.sort(dim=1).values, torch.arange(length).expand(2, length))
    by_diffusion, rest = order.split([sum(counts[:steps]), length - sum(counts[:steps])], dim=1)
    assert (rest.diff(dim=1) > 0).all()
    for row in by_diffusion:
        # The number of rises in a random order of n has the variance (n + 1)/12.
        assert abs((row.diff() > 0).double().mean().item() - 0.5) < STANDARD_ERRORS / (12 * len(row)) ** 0.5
    assert not torch.equal(*by_diffusion)


def test_one_block_of_everything_is_ancestral_sampling():
    canvas, fixed = free_canvas(200)
    canvas[:, 1], fixed[:, 1] = 2, True

    def denoise(noised_BL, log_snr):
        place_BL = torch.arange(L).expand(noised_BL.shape)
        return Table()(noised_BL, place_BL, torch.zeros(L), 0)

    expected = ancestral_sample(denoise, PROCESS, canvas, fixed, 6, 8, grid="linear")
    assert torch.equal(block(canvas, fixed, 6, block_size=L, steps=8), expected)


def test_blocks_before_are_kept_once_and_prompts_cost_no_steps():
    table = Table()
    canvas, fixed = free_canvas(3)
    fixed[:, :2] = True
    block(canvas, fixed, 1, table, steps=5)
    assert table.fed == [3, 1, 1, 1, 1] and len(table.kept) == 2
    table = Table()
    block(*free_canvas(3), 1, table, steps=2)
    assert table.fed == [2, 2, 3, 1]


@pytest.mark.parametrize(
    "sample, options, message",
    [
        (ar, dict(canvas=torch.zeros(2, 3)), "canvas_BL must be int64"),
        (eso, dict(steps=0), "num_denoising_steps must be at least 1, got 0"),
        (
            eso,
            dict(fixed=torch.tensor([[True, False, False], [False] * 3])),
            "fixed_BL must fix equally many places",
        ),
        (eso, dict(fixed=torch.zeros(2, 2, dtype=torch.bool)), "fixed_BL must be bool of the canvas' shape"),
        (eso, dict(excluded_ids=range(V)), "excluded_ids must lie in .* leave some id to write"),
        (block, dict(block_size=0), "block_size must be at least 1, got 0"),
        (block, dict(temperature=0.0), "temperature must be positive and finite"),
    ],
)
def test_bad_arguments_are_refused(sample, options, message):
    canvas, fixed = free_canvas(2)
    arguments = {"canvas": canvas, "fixed": fixed, "seed": 0} | options
    with pytest.raises(ValueError, match=message):
        sample(**arguments)
