"""The CUDA kernels of the row loss, run from their own source on the CPU: exact, in their memory, barriers in place.

tests/csrc/cuda_emulator.h runs every CUDA thread, in random order between barriers, and says what it finds; see there.
Its approximate instructions are as inaccurate as their manual allows. What it cannot tell is speed.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from ops.cases import MASK, NOISES, Case, assert_within_twice_eager, in_shards, make_case, make_logits
from ops.emulated import DTYPES, Device, Emulated, build

from megadiff.ops import RowSums, RowTargets, eager, merge_statistics

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator of CUDA needs g++")
HOPPER = Device(90, 132, 227 * 1024, 228 * 1024)
AMPERE = Device(80, 108, 163 * 1024, 164 * 1024)


def small_device(capability: int, shared_bytes: int, code: int = 0) -> Device:
    """One on which rows of a few thousand columns divide over blocks as those of 131 072 do on a real one."""
    return Device(capability, 132, shared_bytes, 3 * (shared_bytes + 1024), code)


@pytest.fixture(scope="module")
def kernels_on_hopper(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    return Emulated(build("nelbo_driver.cpp", tmp_path_factory.mktemp("emulated")))


@pytest.fixture
def kernels(kernels_on_hopper: Emulated) -> Iterator[Emulated]:
    kernels_on_hopper.set_device(HOPPER)
    kernels_on_hopper.library.set_seed(0)
    yield kernels_on_hopper


def whole(kernels: Emulated, case: Case, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return kernels.whole_row_gradient(logits, case.targets, vocab_size=case.vocab_size, mask_id=MASK)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize(("vocab_size", "num_columns", "num_rows"), [(1271, 1271, 151), (37, 48, 150)])
def test_value_and_gradient_are_as_exact_as_the_eager_operators(
    kernels: Emulated, noise: str, vocab_size: int, num_columns: int, num_rows: int, dtype: torch.dtype
) -> None:
    case, logits = make_case(noise, num_rows, vocab_size), make_logits(num_rows, num_columns).to(dtype)
    terms, gradient = whole(kernels, case, logits)
    assert_within_twice_eager(case, logits, terms, gradient)
    assert (gradient[:, MASK] == 0).all() and (gradient[:, vocab_size:] == 0).all()


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("num_shards", [1, 2, 4])
def test_shards_of_the_vocabulary_are_as_exact(kernels: Emulated, noise: str, num_shards: int) -> None:
    """Four shards of 352 columns: the last holds padding. In fewer rows a single one of small α decides the outcome."""
    case, logits = make_case(noise, 300, 1271, seed=5), make_logits(300, 1408)
    assert_within_twice_eager(case, logits, *in_shards(kernels, case, logits, num_shards))


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_shards_in_low_precision(kernels: Emulated, dtype: torch.dtype) -> None:
    case, logits = make_case("hybrid 0", 60, 1271), make_logits(60, 1408).to(dtype)
    assert_within_twice_eager(case, logits, *in_shards(kernels, case, logits, 2))


@pytest.mark.parametrize(
    ("device", "cluster"),
    [
        (small_device(90, 25_000), 1),
        (small_device(90, 14_000), 2),
        (small_device(90, 7_500), 4),
        (small_device(90, 4_500), 8),
        (small_device(90, 2_500), 1),  # no cluster is large enough: numerators are computed anew
        (small_device(80, 7_500), 1),  # no clusters at all
        (small_device(90, 7_500, code=80), 1),  # nor in older code that a newer device compiles for itself
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_divide_over_blocks(kernels: Emulated, device: Device, cluster: int, dtype: torch.dtype) -> None:
    kernels.set_device(device)
    for noise in ("masked", "hybrid 0"):
        case, logits = make_case(noise, 12, 4501), make_logits(12, 4504).to(dtype)
        assert_within_twice_eager(case, logits, *whole(kernels, case, logits))
        assert kernels.launched().cluster == cluster and kernels.launched().blocks == 12 * cluster


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_whose_slice_is_empty(kernels: Emulated, dtype: torch.dtype) -> None:
    """1100 columns in slices of 192 leave nothing for two of eight blocks, which keep the barriers all the same."""
    kernels.set_device(small_device(90, 2_900))
    case, logits = make_case("hybrid 0", 12, 1100), make_logits(12, 1100).to(dtype)
    assert_within_twice_eager(case, logits, *whole(kernels, case, logits))
    assert kernels.launched().cluster == 8


def test_large_vocabulary_on_real_devices(kernels: Emulated) -> None:
    case, logits = make_case("uniform", 3, 131_072), make_logits(3, 131_072).bfloat16()
    assert_within_twice_eager(case, logits, *whole(kernels, case, logits))
    launched = kernels.launched()
    assert (launched.cluster, launched.threads) == (8, 256)
    assert 3 * (launched.shared_bytes + 1024) <= HOPPER.per_multiprocessor, "three blocks to a multiprocessor"

    kernels.set_device(AMPERE)
    assert_within_twice_eager(case, logits, *whole(kernels, case, logits))
    assert (kernels.launched().cluster, kernels.launched().threads) == (1, 640)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "layout",
    [
        {"at_end": False},
        {"lead": 3, "gap": 9},
        {"lead": 1},
        {"gap": 9, "at_end": False},
        {"lead": 2, "gradient_lead": 3},
    ],
    ids=str,
)
def test_rows_that_begin_anywhere(kernels: Emulated, layout: dict[str, int], dtype: torch.dtype) -> None:
    """No byte outside the rows is read or written, wherever they begin and however far apart they are."""
    kernels = replace(kernels, **layout)
    for device in (HOPPER, small_device(90, 2_900), small_device(80, 2_000)):
        kernels.set_device(device)
        case, logits = make_case("hybrid 0", 24, 1271), make_logits(24, 1271).to(dtype)
        assert_within_twice_eager(case, logits, *whole(kernels, case, logits))
    assert_within_twice_eager(case, logits, *in_shards(kernels, case, logits, 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", [HOPPER, small_device(90, 2_900), small_device(80, 2_000)])
def test_the_same_in_place_for_any_ids_and_any_order_of_threads(
    kernels: Emulated, device: Device, dtype: torch.dtype
) -> None:
    kernels.set_device(device)
    case, logits = make_case("hybrid 0", 24, 1271), make_logits(24, 1271).to(dtype)
    terms, gradient = whole(kernels, case, logits)
    assert torch.equal(kernels.whole_row_loss(logits, case.targets, vocab_size=1271, mask_id=MASK), terms)

    kernels.library.set_seed(1)
    narrow = case.targets._replace(target=case.targets.target.int(), noised=case.targets.noised.int())
    again = kernels.whole_row_gradient(logits, narrow, vocab_size=1271, mask_id=MASK, overwrite=True)
    assert torch.equal(again[0], terms) and torch.equal(again[1], gradient)

    columns = {"vocab_start": 0, "vocab_size": 1271, "mask_id": MASK}
    statistics = kernels.row_statistics(logits, narrow.target, narrow.noised, **columns)
    log_sum_exp, target_logit, noised_logit = merge_statistics(statistics[None])
    partial_sums = kernels.row_partial_sums(logits, log_sum_exp, narrow, **columns)
    sums = RowSums(log_sum_exp, target_logit, noised_logit, *partial_sums)
    in_place = kernels.row_gradient(logits, sums, narrow, **columns, overwrite=True)
    assert torch.equal(in_place, kernels.row_gradient(logits, sums, case.targets, **columns))


def test_offsets_that_32_bits_cannot_count(kernels: Emulated) -> None:
    """Rows 2³⁰ elements apart, in memory that exists where it is touched."""
    near, far = replace(kernels, at_end=False), replace(kernels, at_end=False, gap=(1 << 30) + 16)
    case, logits = make_case("hybrid 0", 5, 37), make_logits(5, 48).bfloat16()
    columns = {"vocab_start": 0, "vocab_size": 37, "mask_id": MASK}
    statistics = near.row_statistics(logits, *case.targets[:2], **columns)
    assert torch.equal(far.row_statistics(logits, *case.targets[:2], **columns), statistics)
    log_sum_exp, target_logit, noised_logit = merge_statistics(statistics[None])
    partial_sums = near.row_partial_sums(logits, log_sum_exp, case.targets, **columns)
    assert torch.equal(far.row_partial_sums(logits, log_sum_exp, case.targets, **columns), partial_sums)
    sums = RowSums(log_sum_exp, target_logit, noised_logit, *partial_sums)
    options = {"vocab_size": 37, "mask_id": MASK, "overwrite": True}
    for ours, expected in (
        (
            far.row_gradient(logits, sums, case.targets, vocab_start=0, **options),
            near.row_gradient(logits, sums, case.targets, **columns),
        ),
        (far.whole_row_gradient(logits, case.targets, **options)[1], whole(near, case, logits)[1]),
        (far.scale_rows_(logits, torch.full((5,), 0.5)), logits * 0.5),
    ):
        assert torch.equal(ours, expected)


def test_statistics_are_those_of_the_eager_operator(kernels: Emulated) -> None:
    """Also of shards without the mask, of padding alone and of no columns; int32 ids."""
    case, logits = make_case("hybrid 0", 9, 37), make_logits(9, 80).bfloat16()
    for begin, end in ((0, 40), (40, 80), (20, 60), (0, 0)):
        columns = {"vocab_start": begin, "vocab_size": 37, "mask_id": MASK}
        ours = kernels.row_statistics(logits[:, begin:end], case.targets.target.int(), case.targets.noised, **columns)
        if end == 0:
            assert (ours[1] == 0).all() and (ours[[0, 2, 3]] == -torch.inf).all()
            continue
        expected = eager.row_statistics(logits[:, begin:end], *case.targets[:2], **columns)
        assert torch.equal(ours[[0, 2, 3]], expected[[0, 2, 3]])
        torch.testing.assert_close(ours[1], expected[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("noise", NOISES)
def test_extreme_logits(kernels: Emulated, noise: str) -> None:
    """±1e4: probabilities are 0 or 1 to the last bit, log-probabilities reach -2e4."""
    case = make_case(noise, 61, 1271)
    logits = 1e4 * make_logits(61, 1408).sign()
    assert_within_twice_eager(case, logits, *in_shards(kernels, case, logits, 2))
    assert_within_twice_eager(case, logits, *whole(kernels, case, logits))


@pytest.mark.parametrize("noise", ["uniform", "hybrid 0"])
def test_flat_logits_whose_odds_are_all_large(kernels: Emulated, noise: str) -> None:
    """k·p up to 1e4 in every column: the product of a thread's 1 + k·p would overflow many times over."""
    case, logits = make_case(noise, 60, 4501), torch.zeros(60, 4501)
    kernels.set_device(small_device(80, 1_000))
    assert_within_twice_eager(case, logits, *whole(kernels, case, logits))
    assert_within_twice_eager(case, logits, *in_shards(kernels, case, logits, 1))


def test_ratio_beyond_the_grouped_sums(kernels: Emulated) -> None:
    """k = α/c up to 1e30, where four factors 1 + k·p no longer fit a float."""
    case, logits = make_case("hybrid 0", 27, 1271), make_logits(27, 1271)
    mass = torch.logspace(-8, -29, 27)
    targets = case.targets._replace(uniform_mass=mass, alpha=torch.full_like(mass, 0.9))
    targets64 = RowTargets(*targets[:2], *(field.double() for field in targets[2:]))
    expected = in_shards(eager, Case(case.process, targets64, case.log_snr_T), logits.double(), 1)
    case = Case(case.process, targets, case.log_snr_T)
    for ours in (in_shards(kernels, case, logits, 1), whole(kernels, case, logits)):
        for value, reference in zip(ours, expected, strict=True):
            torch.testing.assert_close(value.double(), reference, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("noise", ["uniform", "hybrid 0"])
def test_targets_of_probability_zero(kernels: Emulated, noise: str) -> None:
    """With uniform mass a logit of -inf at x and at z costs a finite number of nats."""
    case, logits = make_case(noise, 30, 1271), make_logits(30, 1271)
    rows = torch.arange(30)
    logits[rows, case.targets.target] = -torch.inf
    logits[rows, case.targets.noised] = -torch.inf
    assert_within_twice_eager(case, logits, *whole(kernels, case, logits))
    assert_within_twice_eager(case, logits, *in_shards(kernels, case, logits, 1))


def test_masked_noise_at_a_target_of_probability_zero_is_an_infinite_loss(kernels: Emulated) -> None:
    case, logits = make_case("masked", 3, 37), make_logits(3, 37)
    logits[2, case.targets.target[2]] = -torch.inf
    terms = whole(kernels, case, logits)[0]
    assert terms[0, 2] == torch.inf and terms[:, :2].isfinite().all()


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
@pytest.mark.parametrize("device", [HOPPER, small_device(90, 2_900), small_device(80, 2_000)])
def test_broken_logits_break_their_row_and_no_other(kernels: Emulated, broken: float, device: Device) -> None:
    kernels.set_device(device)
    case, logits = make_case("hybrid 0", 12, 1271), make_logits(12, 1271)
    expected, expected_gradient = whole(kernels, case, logits)
    logits[5, 700] = broken
    others = torch.arange(12) != 5
    terms, gradient = whole(kernels, case, logits)
    assert terms[0, 5].isnan() and gradient[5].isnan().any()
    assert torch.equal(terms[:, others], expected[:, others])
    assert torch.equal(gradient[others], expected_gradient[others])

    terms, gradient = in_shards(kernels, case, logits, 1)
    assert terms[0, 5].isnan() and gradient[5].isnan().any() and gradient[others].isfinite().all()
    columns = {"vocab_start": 0, "vocab_size": 1271, "mask_id": MASK}
    statistics = kernels.row_statistics(logits, *case.targets[:2], **columns)
    torch.testing.assert_close(statistics, eager.row_statistics(logits, *case.targets[:2], **columns), equal_nan=True)


@pytest.mark.parametrize("device", [HOPPER, small_device(90, 2_900), small_device(80, 2_000)])
def test_rows_of_zero_weight_are_not_even_read(kernels: Emulated, device: Device) -> None:
    kernels.set_device(device)
    case, logits = make_case("hybrid 0", 12, 1271), make_logits(12, 1271)
    silent = torch.arange(12) % 2 == 0
    weights = {name: getattr(case.targets, name).masked_fill(silent, 0.0) for name in ("kl_weight", "is_weight")}
    case = Case(case.process, case.targets._replace(**weights), case.log_snr_T)
    logits[silent] = torch.nan
    for terms, gradient in (whole(kernels, case, logits), in_shards(kernels, case, logits, 1)):
        assert (terms[:, silent] == 0).all() and (gradient[silent] == 0).all()
        assert terms[:, ~silent].isfinite().all() and (gradient[~silent] != 0).any()

    only_silent = RowTargets(*(field[:1] for field in case.targets))
    unreadable = kernels.matrix(logits[:1])
    gradient = kernels.new_gradient(unreadable)
    kernels.forbid(unreadable)
    assert (kernels.whole_row(unreadable, gradient, only_silent, 1271, MASK) == 0).all() and (gradient == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_scaling_rows(kernels: Emulated, dtype: torch.dtype) -> None:
    matrix, factor = make_logits(5, 1271).to(dtype), torch.tensor([1.0, 0.0, -2.5, 1.0, 3.0])
    expected = (matrix.float() * factor[:, None]).to(dtype)
    for layout in ({}, {"lead": 3, "gap": 2}, {"at_end": False}):
        assert torch.equal(replace(kernels, **layout).scale_rows_(matrix, factor), expected)
    untouchable = kernels.matrix(matrix[:1])
    kernels.forbid(untouchable)
    kernels.scale_rows(untouchable, torch.ones(1))


def test_one_row_is_what_it_is_among_others(kernels: Emulated) -> None:
    case, logits = make_case("hybrid 0", 7, 1271), make_logits(7, 1272)
    terms, gradient = whole(kernels, case, logits)
    alone = Case(case.process, RowTargets(*(field[3:4] for field in case.targets)), case.log_snr_T[3:4])
    terms_alone, gradient_alone = whole(kernels, alone, logits[3:4])
    assert torch.equal(terms_alone, terms[:, 3:4]) and torch.equal(gradient_alone, gradient[3:4])
