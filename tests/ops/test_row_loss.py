"""The native row loss on CPU: exact against the dense bound, silent where it must be, safe at every edge.

The arithmetic is that of the CUDA kernels (csrc/nelbo/nelbo_math.h); what differs there is held by test_cuda_source.py.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch
from ops.cases import MASK, NOISES, Case, assert_within_twice_eager, dense, in_shards, make_case, make_logits

from megadiff import ops
from megadiff.ops import RowTargets, _library, eager

pytestmark = pytest.mark.skipif(
    not _library.is_live("cpu"), reason=f"native CPU kernels are not live: {_library.state('cpu')}"
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def whole(case: Case, logits: torch.Tensor, **options: bool) -> tuple[torch.Tensor, torch.Tensor]:
    return ops.whole_row_gradient(logits, case.targets, vocab_size=case.vocab_size, mask_id=MASK, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize(
    ("vocab_size", "num_columns", "num_rows"), [(1271, 1271, 151), (37, 48, 150), (5000, 6144, 60)]
)
def test_value_and_gradient_are_as_exact_as_the_eager_operators(
    noise: str, vocab_size: int, num_columns: int, num_rows: int, dtype: torch.dtype
) -> None:
    case, logits = make_case(noise, num_rows, vocab_size), make_logits(num_rows, num_columns).to(dtype)
    terms, gradient = whole(case, logits)
    assert gradient.dtype == dtype and terms.dtype == torch.float32
    assert_within_twice_eager(case, logits, terms, gradient)
    assert (gradient[:, MASK] == 0).all() and (gradient[:, vocab_size:] == 0).all()


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("num_shards", [1, 2, 4])
def test_shards_of_the_vocabulary_are_as_exact(noise: str, num_shards: int) -> None:
    """Four shards of 352 columns: the last holds padding beyond the 1271 ids."""
    case, logits = make_case(noise, 150, 1271), make_logits(150, 1408)
    assert_within_twice_eager(case, logits, *in_shards(ops, case, logits, num_shards))


def test_a_shard_of_padding_alone_adds_nothing() -> None:
    case, logits = make_case("hybrid 0", 30, 37), make_logits(30, 80)
    assert_within_twice_eager(case, logits, *in_shards(ops, case, logits, 2))
    statistics = ops.row_statistics(logits[:, 40:], *case.targets[:2], vocab_start=40, vocab_size=37, mask_id=MASK)
    assert (statistics[0] == -torch.inf).all() and (statistics[1] == 0).all() and (statistics[2:] == -torch.inf).all()


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("num_shards", [1, 2])
def test_extreme_logits(noise: str, num_shards: int) -> None:
    """±1e4: probabilities are 0 or 1 to the last bit, log-probabilities reach -2e4."""
    case = make_case(noise, 61, 1271)
    logits = 1e4 * make_logits(61, 1408).sign()
    assert_within_twice_eager(case, logits, *in_shards(ops, case, logits, num_shards))
    assert_within_twice_eager(case, logits, *whole(case, logits))


@pytest.mark.parametrize("noise", ["uniform", "hybrid 0"])
def test_targets_of_probability_zero(noise: str) -> None:
    """With uniform mass a logit of -inf at x and at z costs a finite number of nats."""
    case, logits = make_case(noise, 30, 1271), make_logits(30, 1271)
    rows = torch.arange(30)
    logits[rows, case.targets.target] = -torch.inf
    logits[rows, case.targets.noised] = -torch.inf
    assert_within_twice_eager(case, logits, *whole(case, logits))


def test_masked_noise_at_a_target_of_probability_zero_is_an_infinite_loss() -> None:
    case, logits = make_case("masked", 3, 37), make_logits(3, 37)
    logits[2, case.targets.target[2]] = -torch.inf
    terms = whole(case, logits)[0]
    assert terms[0, 2] == torch.inf and terms[:, :2].isfinite().all()


@pytest.mark.parametrize("broken", [0x7FC00000, 0x7FC00001, 0x7F800001, 0x7FFFFFFF, -1, 0x7F800000], ids=hex)
def test_broken_logits_break_their_row_and_no_other(broken: int) -> None:
    """NaN of any sign and payload, and infinity."""
    case, logits = make_case("hybrid 0", 12, 1271), make_logits(12, 1271)
    expected, expected_gradient = whole(case, logits)
    logits.view(torch.int32)[5, 700] = broken
    for terms, gradient in (whole(case, logits), in_shards(ops, case, logits, 1)):
        assert terms[0, 5].isnan() and gradient[5].isnan().any()
        others = torch.arange(12) != 5
        torch.testing.assert_close(terms[:, others], expected[:, others])
        torch.testing.assert_close(gradient[others], expected_gradient[others])


def test_rows_of_zero_weight_are_silent_even_with_broken_logits() -> None:
    case, logits = make_case("hybrid 0", 12, 1271), make_logits(12, 1271)
    silent = torch.arange(12) % 2 == 0
    targets = case.targets._replace(
        kl_weight=case.targets.kl_weight.masked_fill(silent, 0.0),
        is_weight=case.targets.is_weight.masked_fill(silent, 0.0),
    )
    case = Case(case.process, targets, case.log_snr_T)
    logits[silent] = torch.nan
    for terms, gradient in (whole(case, logits), in_shards(ops, case, logits, 1)):
        assert (terms[:, silent] == 0).all() and (gradient[silent] == 0).all()
        assert terms[:, ~silent].isfinite().all() and (gradient[~silent] != 0).any()


def test_ratio_beyond_the_grouped_sums() -> None:
    """k = α/c up to 1e30, where four factors 1 + k·p no longer fit a float."""
    case, logits = make_case("hybrid 0", 27, 1271), make_logits(27, 1271)
    mass = torch.logspace(-8, -29, 27)
    targets = case.targets._replace(uniform_mass=mass, alpha=torch.full_like(mass, 0.9))
    targets64 = RowTargets(*targets[:2], *(field.double() for field in targets[2:]))
    expected = in_shards(eager, Case(case.process, targets64, case.log_snr_T), logits.double(), 1)
    for ours in (in_shards(ops, Case(case.process, targets, case.log_snr_T), logits, 1), whole_of(targets, logits)):
        for value, reference in zip(ours, expected, strict=True):
            torch.testing.assert_close(value.double(), reference, rtol=2e-5, atol=2e-6)


def whole_of(targets: RowTargets, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return ops.whole_row_gradient(logits, targets, vocab_size=logits.shape[1], mask_id=MASK)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_in_place_for_any_ids_strides_and_threads(dtype: torch.dtype) -> None:
    case, logits = make_case("hybrid 0", 33, 1271), make_logits(33, 1271).to(dtype)
    terms, gradient = whole(case, logits)
    assert torch.equal(ops.whole_row_loss(logits, case.targets, vocab_size=1271, mask_id=MASK), terms)

    narrow_ids = case.targets._replace(target=case.targets.target.int(), noised=case.targets.noised.int())
    strided = torch.full((33, 1280), torch.nan, dtype=dtype)[:, 3:1274].copy_(logits)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        again = ops.whole_row_gradient(strided, narrow_ids, vocab_size=1271, mask_id=MASK, overwrite=True)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(again[0], terms) and torch.equal(again[1], gradient)
    assert again[1] is strided and strided._version > 1
    assert strided._base is not None and strided._base[:, :3].isnan().all() and strided._base[:, 1274:].isnan().all()

    sums_terms, sums_gradient = in_shards(ops, case, logits, 1)
    overwritten = logits.clone()
    log_sum_exp = overwritten.float().masked_fill(torch.arange(1271) == MASK, -torch.inf).logsumexp(1)
    rows = torch.arange(33)
    sums = ops.RowSums(
        log_sum_exp,
        overwritten[rows, case.targets.target].float(),
        overwritten[rows, case.targets.noised].float().masked_fill(case.targets.noised == MASK, -torch.inf),
        *ops.row_partial_sums(overwritten, log_sum_exp, case.targets, vocab_start=0, vocab_size=1271, mask_id=MASK),
    )
    columns = {"vocab_start": 0, "vocab_size": 1271, "mask_id": MASK}
    expected = ops.row_gradient(overwritten, sums, case.targets, **columns)
    assert torch.equal(ops.row_gradient(overwritten, sums, case.targets, **columns, overwrite=True), expected)
    torch.testing.assert_close(sums_terms, terms, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(sums_gradient, gradient, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scaling_rows(dtype: torch.dtype) -> None:
    matrix, factor = make_logits(5, 1271).to(dtype), torch.tensor([1.0, 0.0, -2.5, 1.0, 1 / 3])
    expected = (matrix.float() * factor[:, None]).to(dtype)
    twin = matrix.clone().mul_(factor[:, None])
    assert torch.equal(ops.scale_rows_(matrix, factor), expected) and torch.equal(twin, expected)


def test_no_rows_one_row_no_columns() -> None:
    for num_rows in (0, 1):
        case = make_case("hybrid 0", num_rows, 1271)
        terms, gradient = whole(case, make_logits(num_rows, 1271))
        assert terms.shape == (3, num_rows) and gradient.shape == (num_rows, 1271)
    case = make_case("hybrid 0", 4, 37)
    statistics = ops.row_statistics(torch.zeros(4, 0), *case.targets[:2], vocab_start=0, vocab_size=37, mask_id=MASK)
    assert (statistics[0] == -torch.inf).all() and (statistics[1] == 0).all()


def test_refusals() -> None:
    case, logits = make_case("hybrid 0", 6, 37), make_logits(6, 37)
    columns = {"vocab_size": 37, "mask_id": MASK}
    with pytest.raises(RuntimeError, match=r"contiguous along columns, its stride is 6: call \.contiguous"):
        ops.whole_row_loss(logits.t().contiguous().t(), case.targets, **columns)
    with pytest.raises(RuntimeError, match="overlap in memory"):
        ops.whole_row_gradient(logits[:1].expand(6, 37), case.targets, **columns, overwrite=True)
    with pytest.raises(RuntimeError, match=r"target must have shape \[6\]"):
        ops.whole_row_loss(logits, case.targets._replace(target=case.targets.target[:5]), **columns)
    with pytest.raises(RuntimeError, match="noised must be int32 or int64, got Float: call"):
        ops.whole_row_loss(logits, case.targets._replace(noised=case.targets.noised.float()), **columns)
    with pytest.raises(RuntimeError, match=r"target must be contiguous, its stride is 2: call \.contiguous"):
        strided = torch.stack([case.targets.target] * 2, dim=1)[:, 0]
        ops.whole_row_loss(logits, case.targets._replace(target=strided), **columns)
    with pytest.raises(RuntimeError, match="at least one column, got none"):
        ops.whole_row_loss(logits[:, :0], case.targets, **columns)
    with pytest.raises(RuntimeError, match=r"logits must have shape \[rows, columns\], got 1"):
        torch.ops.megadiff.whole_row_loss(logits[0], *case.targets, 37, MASK)
    with pytest.raises(RuntimeError, match="native operators take float32, bfloat16 and float16, got Double"):
        torch.ops.megadiff.whole_row_loss(logits.double(), *case.targets, 37, MASK)
    with pytest.raises(RuntimeError, match="alpha must be float32, got Double"):
        torch.ops.megadiff.whole_row_loss(logits, *case.targets._replace(alpha=case.targets.alpha.double()), 37, MASK)


def test_operators_keep_torch_contract() -> None:
    """Schemas tell the truth about mutation and aliasing, fakes about shapes; for every operator of the row loss."""
    case, logits = make_case("hybrid 0", 6, 37), make_logits(6, 48)
    targets, columns = tuple(case.targets), (0, 37, MASK)
    sums = tuple(torch.rand(5, 6).unbind())
    library = torch.ops.megadiff
    for op, arguments in (
        (library.row_statistics, (logits, *targets[:2], *columns)),
        (library.row_partial_sums, (logits, sums[0], *targets, *columns)),
        (library.row_loss, (*sums, *targets, MASK)),
        (library.row_gradient, (logits, *sums, *targets, *columns)),
        (library.row_gradient_, (logits.clone(), *sums, *targets, *columns)),
        (library.whole_row_loss, (logits, *targets, *columns[1:])),
        (library.whole_row_gradient, (logits, *targets, *columns[1:])),
        (library.whole_row_gradient_, (logits.clone(), *targets, *columns[1:])),
        (library.scale_rows_, (logits.clone(), sums[0])),
    ):
        torch.library.opcheck(op.default, arguments)


def test_compiles_without_a_graph_break() -> None:
    case, logits = make_case("hybrid 0", 6, 37), make_logits(6, 48)

    def step(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        terms, gradient = whole(case, 2.0 * logits)
        return terms.sum(), gradient * 0.5

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for ours, expected in zip(compiled(logits), step(logits), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("instruction_set", ["baseline", "avx2"])
def test_narrower_instruction_sets(instruction_set: str) -> None:
    """The same tests with the kernels that an older processor would choose."""
    if wish := os.environ.get("MEGADIFF_CPU_ISA"):  # the inner run
        assert _library.instruction_set() == wish
        return
    if platform.machine() != "x86_64" and instruction_set != "baseline":
        pytest.skip("an instruction set of x86-64")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    command += ["-k", f"exact or extreme or broken or scaling or in_place or grouped or {instruction_set}"]
    environment = {**os.environ, "MEGADIFF_CPU_ISA": instruction_set}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and " passed" in result.stdout, result.stdout + result.stderr


@pytest.mark.slow
def test_more_elements_than_32_bits_count() -> None:
    """T·W = 2³¹ + 131072: the last rows of a matrix of 4 GiB, of which only they count."""
    num_rows, vocab_size = (1 << 14) + 1, 1 << 17
    case = make_case("hybrid 0", num_rows, vocab_size)
    counts = torch.arange(num_rows) >= num_rows - 2
    targets = case.targets._replace(kl_weight=counts * 1.0, is_weight=counts * 1.0)
    logits = torch.zeros(num_rows, vocab_size, dtype=torch.bfloat16)
    logits[-2:] = make_logits(2, vocab_size).bfloat16()
    last = RowTargets(*(field[-2:].contiguous() for field in targets))
    expected_terms, expected = ops.whole_row_gradient(logits[-2:], last, vocab_size=vocab_size, mask_id=MASK)
    terms, gradient = ops.whole_row_gradient(logits, targets, vocab_size=vocab_size, mask_id=MASK, overwrite=True)
    assert torch.equal(terms[:, -2:], expected_terms) and torch.equal(gradient[-2:], expected)
    assert (terms[:, :-2] == 0).all() and (gradient[-3] == 0).all()


def test_dense_reference_is_not_ours() -> None:
    """A guard of this file: the yardstick notices a relative error of 1e-5."""
    case, logits = make_case("hybrid 0", 30, 1271), make_logits(30, 1271)
    terms, gradient = dense(case, logits)
    with pytest.raises(AssertionError):
        assert_within_twice_eager(case, logits, (terms * (1 + 1e-5)).float(), gradient.float())
