"""The native noising operator: the eager version's noise token by token, and the same bits whatever compiles it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from chance import assert_frequencies
from torch import Tensor

from megadiff.diffusion import (
    DiffusionProcess,
    HybridMixing,
    MaskedMixing,
    MixingDistribution,
    NoisedRows,
    NoiseSchedule,
    UniformMixing,
    noise_rows,
    sequence_log_snr,
)
from megadiff.objectives.noising import fused_noise_rows
from megadiff.ops import _library
from megadiff.ops import noising as ops
from megadiff.philox import Purpose, random_words

needs_kernels = pytest.mark.skipif(
    not _library.is_live("cpu"), reason=f"native CPU kernels are not live: {_library.state('cpu')}"
)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
NUMBERS = ("alpha", "uniform_mass", "loss_weight", "elbo_weight")
LARGE, SMALL, MASK, SEED = 131072, 1271, 3, (1 << 63) + 12345
MIXINGS = [
    MaskedMixing(LARGE, LARGE - 1),
    UniformMixing(LARGE, MASK),
    UniformMixing(SMALL, MASK, include_mask=True),
    HybridMixing(SMALL, 0, 0.0),
    HybridMixing(LARGE, MASK, -2.0, scale=0.5),
    HybridMixing(SMALL, SMALL - 1, 1.0, scale=-1.0),
]


def process_of(mixing: MixingDistribution) -> DiffusionProcess:
    return DiffusionProcess(NoiseSchedule(), mixing)


def clean_tokens(process: DiffusionProcess, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(process.mixing.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def units_apart(a: Tensor, b: Tensor) -> int:
    """Largest distance of two float32 tensors of numbers >= 0, in units in the last place."""
    bits_a, bits_b = (tensor.contiguous().view(torch.int32).long() for tensor in (a, b))
    return int((bits_a - bits_b).abs().amax()) if a.numel() else 0


def assert_as_eager(fused: NoisedRows, eager: NoisedRows) -> None:
    assert fused.noised.dtype == eager.noised.dtype
    assert torch.equal(fused.noised, eager.noised)
    for name in NUMBERS:
        ours, theirs = getattr(fused, name), getattr(eager, name)
        assert ours.dtype == torch.float32 and ours.shape == theirs.shape
        assert units_apart(ours, theirs) <= 1, name


@needs_kernels
@pytest.mark.parametrize("mixing", MIXINGS, ids=str)
def test_noise_equals_the_eager_version_token_by_token(mixing: MixingDistribution) -> None:
    """All mixings together: 10⁷ draws, over every kind of argument."""
    process, batch_size, length = process_of(mixing), 16, 8192
    for chunk in range(13):
        ordinal_B = torch.arange(batch_size) + (chunk << 40)
        seed, validation = SEED + chunk, chunk % 3 == 1
        tokens_BL = clean_tokens(process, batch_size, length, seed=chunk)
        counted_BL = tokens_BL % 5 != 0
        log_snr_BL = sequence_log_snr(process.schedule, seed, ordinal_B)[:, None]
        position_L = None
        if chunk % 2:
            tokens_BL = tokens_BL.int()
        if chunk % 3 == 2:
            log_snr_BL = log_snr_BL.expand(tokens_BL.shape)
        if chunk % 4 == 1:
            position_L = torch.cat([torch.arange(length // 2), torch.arange(3 * length, 3 * length + length // 2)])
        if chunk % 4 == 2:
            log_snr_BL = torch.linspace(-9, 9, batch_size * length, dtype=torch.float64).view(length, batch_size).t()
        arguments = (tokens_BL, log_snr_BL, ordinal_B, counted_BL, seed, process)
        options: dict[str, Any] = dict(validation=validation, position_L=position_L)
        fused = fused_noise_rows(*arguments, **options)
        assert_as_eager(fused, noise_rows(*arguments, **options))
        for weight in (fused.loss_weight, fused.elbo_weight):
            assert (weight[~counted_BL] == 0).all()


@needs_kernels
@pytest.mark.parametrize(
    "mixing",
    [
        MaskedMixing(7, MASK),
        UniformMixing(7, MASK),
        UniformMixing(7, MASK, include_mask=True),
        HybridMixing(7, MASK, 0.0),
        HybridMixing(7, MASK, -2.0),
    ],
    ids=str,
)
def test_frequencies_are_the_marginal(mixing: MixingDistribution) -> None:
    process, token = process_of(mixing), 5
    tokens_BL, level_B1 = torch.full((100, 1000), token), torch.full((100, 1), 0.5, dtype=torch.float64)
    noised = fused_noise_rows(
        tokens_BL, level_B1, torch.arange(100), torch.ones_like(tokens_BL, dtype=torch.bool), SEED, process
    ).noised
    assert_frequencies(noised, process.marginal_at(level_B1[0], torch.tensor(token), torch.arange(7)))


def words_by_noising(seed: int, ordinal_B: Tensor, position_L: Tensor, purpose: int) -> Tensor:
    """The upper 31 bits of every token's id word: noise alone, uniform over 2**31 ids below the mask."""
    shape = (len(ordinal_B), len(position_L))
    zeros = torch.zeros(shape, dtype=torch.int64)
    noised, *_ = ops.noise_rows(
        zeros,
        torch.full((shape[0], 1), -1e3, dtype=torch.float64),
        torch.ones(shape[0], 1, dtype=torch.float64),
        ordinal_B,
        zeros.bool(),
        seed=seed,
        purpose=purpose,
        scale=1.0,
        shift=torch.inf,
        num_uniform_states=1 << 31,
        mask_id=1 << 31,
        mask_is_uniform_state=False,
        position_L=position_L,
    )
    return noised


@needs_kernels
def test_words_follow_the_counter_contract() -> None:
    zero = torch.zeros(1, dtype=torch.int64)
    assert words_by_noising(0, zero, zero, 0).item() == 0x9B00DBD8 >> 1
    ordinal_B = torch.tensor([0, 5, (1 << 32) + 1, (1 << 63) - 1, -2])
    position_L = torch.tensor([0, 7, (1 << 32) - 1, (1 << 32) + 7, -1])
    for seed in (0, 1 << 32, (1 << 64) - 1):
        for purpose in (Purpose.TOKEN, Purpose.SHUFFLE + 128, 255):
            words = random_words(seed, ordinal_B[:, None], position_L, purpose)[..., 3]
            assert torch.equal(words_by_noising(seed, ordinal_B, position_L, purpose), words >> 1)


@needs_kernels
def test_weights_are_exactly_zero_where_nothing_is_to_be_learned() -> None:
    for mixing in (MaskedMixing(SMALL, MASK), HybridMixing(SMALL, MASK, -1000.0)):
        process, ordinal_B = process_of(mixing), torch.arange(32)
        tokens_BL = 4 + clean_tokens(process, 32, 100) % (SMALL - 4)
        log_snr_B1 = sequence_log_snr(process.schedule, SEED, ordinal_B)[:, None]
        rows = fused_noise_rows(tokens_BL, log_snr_B1, ordinal_B, tokens_BL > 100, SEED, process)
        active = (rows.noised == MASK) & (tokens_BL > 100)
        assert 0.3 < active.double().mean() < 0.7
        for weight in (rows.loss_weight, rows.elbo_weight):
            assert torch.equal(weight != 0, active)
        assert (rows.uniform_mass == 0).all()


@needs_kernels
@pytest.mark.parametrize("mixing", [*MIXINGS, HybridMixing(LARGE, 3, 1000.0), HybridMixing(LARGE, 3, -1000.0)], ids=str)
def test_extreme_levels_stay_numbers(mixing: MixingDistribution) -> None:
    process = process_of(mixing)
    level_B = torch.tensor([-708.0, -300.0, -80.0, -30.0, -1e-300, 0.0, 1e-300, 30.0, 80.0, 300.0, 708.0])
    tokens_BL, ordinal_B = clean_tokens(process, len(level_B), 500), torch.arange(len(level_B))
    arguments = (ordinal_B, torch.ones_like(tokens_BL, dtype=torch.bool), SEED, process)
    rows = fused_noise_rows(tokens_BL, level_B.double()[:, None], *arguments)
    for name in NUMBERS:
        assert not getattr(rows, name).isnan().any(), name
    assert_as_eager(rows, noise_rows(tokens_BL, level_B.double()[:, None], *arguments))
    assert torch.equal(rows.noised[-1], tokens_BL[-1]) and (rows.alpha[0] == 0).all() and (rows.alpha[-1] == 1).all()


@needs_kernels
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0), (1, 1), (1, 1271), (3, 129), (2, 10007)], ids=str)
@pytest.mark.parametrize("per_token", [False, True])
def test_odd_shapes_and_layouts(shape: tuple[int, int], per_token: bool) -> None:
    """Transposed, sliced and broadcast inputs; threads that take pieces of sequences."""
    batch_size, length = shape
    process, ordinal_B = process_of(HybridMixing(SMALL, MASK, 0.0)), torch.arange(2 * batch_size)[::2]
    tokens_BL = clean_tokens(process, length, batch_size).t()
    counted_BL = torch.rand(batch_size, 2 * length)[:, ::2] < 0.5
    level = torch.linspace(-5, 5, batch_size * length, dtype=torch.float64).view(shape)
    level = level if per_token else level.amax(dim=1, keepdim=True) if length else level.new_zeros(batch_size, 1)
    arguments = (tokens_BL, level, ordinal_B, counted_BL, SEED, process)
    expected = noise_rows(*arguments, position_L=torch.arange(3 * length)[::3])
    for num_threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(num_threads)
        fused = fused_noise_rows(*arguments, position_L=torch.arange(3 * length)[::3])
        torch.set_num_threads(before)
        assert fused.noised.is_contiguous()
        assert_as_eager(fused, expected)


def operator_arguments(**replaced: Any) -> dict[str, Any]:
    tokens_BL = torch.arange(6).view(2, 3)
    return {
        "tokens_BL": tokens_BL,
        "log_snr_BL": torch.zeros(2, 1, dtype=torch.float64),
        "log_snr_pdf_BL": torch.ones(2, 3, dtype=torch.float64),
        "ordinal_B": torch.arange(2),
        "counted_BL": tokens_BL > 1,
        "seed": 0,
        "purpose": 0,
        "scale": 1.0,
        "shift": 0.0,
        "num_uniform_states": 6,
        "mask_id": 3,
        "mask_is_uniform_state": False,
        "position_L": torch.arange(3),
    } | replaced


@needs_kernels
@pytest.mark.parametrize(
    ("replaced", "error", "message"),
    [
        (dict(seed=-1), ValueError, r"seed must lie in \[0, 2\*\*64\), got -1"),
        (dict(seed=1 << 64), ValueError, "seed must lie in"),
        (dict(tokens_BL=torch.zeros(2, 3)), RuntimeError, "tokens must be int32 or int64"),
        (dict(tokens_BL=torch.arange(6)), RuntimeError, r"tokens must have shape \[B, L\], got 1 dim"),
        (dict(log_snr_BL=torch.zeros(2, 3)), RuntimeError, "log_snr must be float64"),
        (dict(log_snr_BL=torch.zeros(2).double()), RuntimeError, r"log_snr must have shape \[2, 3\] or one column"),
        (dict(log_snr_BL=torch.zeros(3, 3).double()), RuntimeError, "log_snr must have shape"),
        (dict(log_snr_pdf_BL=torch.zeros(2, 2).double()), RuntimeError, "log_snr_pdf must have shape"),
        (dict(log_snr_pdf_BL=torch.zeros(2, 3)), RuntimeError, "log_snr_pdf must be float64"),
        (dict(ordinal_B=torch.arange(3)), RuntimeError, r"ordinal must have shape \[2\]"),
        (dict(ordinal_B=torch.arange(2).int()), RuntimeError, "ordinal must be int64"),
        (dict(counted_BL=torch.ones(2, 1, dtype=torch.bool)), RuntimeError, r"counted must have shape \[2, 3\] like"),
        (dict(counted_BL=torch.ones(2, 3)), RuntimeError, "counted must be bool"),
        (dict(position_L=torch.arange(2)), RuntimeError, r"position must have shape \[3\]"),
        (dict(position_L=torch.zeros(3)), RuntimeError, "position must be int64"),
        (dict(purpose=256), RuntimeError, r"purpose must be in \[0, 256\), got 256"),
        (dict(num_uniform_states=0), RuntimeError, r"num_uniform_states must be in \[1, 2\^31\], got 0"),
        (dict(mask_id=7), RuntimeError, r"mask_id must be in \[0, 7\), got 7"),
        (dict(mask_id=6, mask_is_uniform_state=True), RuntimeError, r"mask_id must be in \[0, 6\), got 6"),
        (
            dict(num_uniform_states=1 << 31, tokens_BL=torch.zeros(2, 3, dtype=torch.int32)),
            RuntimeError,
            "int32 tokens cannot hold",
        ),
    ],
)
def test_what_does_not_fit_is_refused(replaced: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.noise_rows(**operator_arguments(**replaced))


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("with_position", [False, True])
def test_the_operator_passes_opcheck(dtype: torch.dtype, with_position: bool) -> None:
    arguments = operator_arguments()
    tensors = ("tokens_BL", "log_snr_BL", "log_snr_pdf_BL", "ordinal_B", "position_L", "counted_BL")
    inputs = [arguments.pop(name) for name in tensors]
    inputs[0] = inputs[0].to(dtype)
    if not with_position:
        inputs[4] = None
    torch.library.opcheck(torch.ops.megadiff.noise_rows.default, (*inputs, *arguments.values()))
