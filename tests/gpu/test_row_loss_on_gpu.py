"""The native row loss on a GPU: exact as on the CPU, under streams, graphs and `torch.compile`."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from ops.cases import MASK, NOISES, Case, assert_within_twice_eager, in_shards, make_case, make_logits

from megadiff import ops
from megadiff.ops import RowTargets, _library

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def test_the_kernels_are_live() -> None:
    assert _library.state("cuda") == "native"


def on_gpu(targets: RowTargets) -> RowTargets:
    return RowTargets(*(field.cuda() for field in targets))


def whole(case: Case, logits: torch.Tensor, **options: bool) -> tuple[torch.Tensor, torch.Tensor]:
    terms, gradient = ops.whole_row_gradient(
        logits.cuda(), on_gpu(case.targets), vocab_size=case.vocab_size, mask_id=MASK, **options
    )
    return terms.cpu(), gradient.cpu()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize(
    ("vocab_size", "num_columns", "num_rows"),
    [
        (1271, 1271, 151),
        (37, 48, 150),
        (32_768, 32_768, 60),
        (50_257, 50_304, 12),  # chunks of a thread that its loads do not divide
        (131_072, 131_072, 30),
        (131_071, 131_072, 6),
    ],
)
def test_value_and_gradient_are_as_exact_as_the_eager_operators(
    noise: str, vocab_size: int, num_columns: int, num_rows: int, dtype: torch.dtype
) -> None:
    case, logits = make_case(noise, num_rows, vocab_size), make_logits(num_rows, num_columns).to(dtype)
    terms, gradient = whole(case, logits)
    assert_within_twice_eager(case, logits, terms, gradient)
    assert (gradient[:, MASK] == 0).all() and (gradient[:, vocab_size:] == 0).all()


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_shards", [1, 2, 4])
def test_shards_of_the_vocabulary_are_as_exact(noise: str, num_shards: int, dtype: torch.dtype) -> None:
    case, logits = make_case(noise, 300, 1271, seed=5), make_logits(300, 1408).to(dtype)
    moved = Case(case.process, on_gpu(case.targets), case.log_snr_T)
    terms, gradient = in_shards(ops, moved, logits.cuda(), num_shards)
    assert_within_twice_eager(case, logits, terms.cpu(), gradient.cpu())


@pytest.mark.parametrize("noise", NOISES)
def test_extreme_logits(noise: str) -> None:
    case, logits = make_case(noise, 61, 1271), 1e4 * make_logits(61, 1408).sign()
    assert_within_twice_eager(case, logits, *whole(case, logits))


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place_and_from_strided_rows(dtype: torch.dtype) -> None:
    case, logits = make_case("hybrid 0", 33, 40_001), make_logits(33, 40_001).to(dtype)
    expected = whole(case, logits)
    strided = torch.full((33, 40_010), torch.nan, dtype=dtype, device="cuda")[:, 3:40_004].copy_(logits)
    terms, gradient = ops.whole_row_gradient(
        strided, on_gpu(case.targets), vocab_size=40_001, mask_id=MASK, overwrite=True
    )
    assert torch.equal(terms.cpu(), expected[0]) and torch.equal(gradient.cpu(), expected[1])
    assert strided._base is not None
    assert strided._base[:, :3].isnan().all() and strided._base[:, 40_004:].isnan().all()


def test_silent_and_broken_rows() -> None:
    case, logits = make_case("hybrid 0", 12, 131_072), make_logits(12, 131_072)
    silent = torch.arange(12) % 2 == 0
    targets = case.targets._replace(
        kl_weight=case.targets.kl_weight.masked_fill(silent, 0.0),
        is_weight=case.targets.is_weight.masked_fill(silent, 0.0),
    )
    logits[silent] = torch.nan
    logits[5, 100_000] = torch.nan
    terms, gradient = whole(Case(case.process, targets, case.log_snr_T), logits)
    others = ~silent & (torch.arange(12) != 5)
    assert (terms[:, silent] == 0).all() and (gradient[silent] == 0).all()
    assert terms[0, 5].isnan() and terms[:, others].isfinite().all() and gradient[others].isfinite().all()


def test_a_graph_replays_on_new_numbers() -> None:
    """Captured: no synchronisation, no allocation but outputs, the stream of torch."""
    first, second = make_case("hybrid 0", 40, 131_072), make_case("hybrid 0", 40, 131_072, seed=5)
    logits = make_logits(40, 131_072).bfloat16()
    held, held_logits = on_gpu(first.targets), logits.cuda()
    graph = torch.cuda.CUDAGraph()
    ops.whole_row_gradient(held_logits, held, vocab_size=131_072, mask_id=MASK)  # loads the kernels
    with torch.cuda.graph(graph):
        terms, gradient = ops.whole_row_gradient(held_logits, held, vocab_size=131_072, mask_id=MASK)
    for place, value in zip(held, second.targets, strict=True):
        place.copy_(value)
    graph.replay()
    expected = whole(second, logits)
    assert torch.equal(terms.cpu(), expected[0]) and torch.equal(gradient.cpu(), expected[1])


def test_works_on_a_stream_of_its_own() -> None:
    case, logits = make_case("hybrid 0", 200, 32_768), make_logits(200, 32_768)
    targets, expected = on_gpu(case.targets), whole(case, logits)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # the logits arrive late: a kernel on another stream would miss them
        moved = logits.pin_memory().to("cuda", non_blocking=True)
        terms, _ = ops.whole_row_gradient(moved, targets, vocab_size=32_768, mask_id=MASK, overwrite=True)
    stream.synchronize()
    assert torch.equal(terms.cpu(), expected[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_scaling_rows(dtype: torch.dtype) -> None:
    matrix, factor = make_logits(5, 1271).to(dtype), torch.tensor([1.0, 0.0, -2.5, 1.0, 1 / 3])
    expected = (matrix.float() * factor[:, None]).to(dtype)
    assert torch.equal(ops.scale_rows_(matrix.cuda(), factor.cuda()).cpu(), expected)


def test_a_thread_of_its_own_and_every_device() -> None:
    case, logits = make_case("hybrid 0", 12, 131_072), make_logits(12, 131_072)
    expected = whole(case, logits)

    def on(index: int) -> torch.Tensor:
        targets = RowTargets(*(field.to(f"cuda:{index}") for field in case.targets))
        moved = logits.to(f"cuda:{index}")
        return ops.whole_row_gradient(moved, targets, vocab_size=131_072, mask_id=MASK)[1].cpu()

    with ThreadPoolExecutor() as threads:
        for gradient in threads.map(on, range(torch.cuda.device_count())):
            assert torch.equal(gradient, expected[1])


def test_operators_keep_torch_contract_and_compile() -> None:
    case, logits = make_case("hybrid 0", 6, 37), make_logits(6, 48).cuda()
    targets = on_gpu(case.targets)
    torch.library.opcheck(torch.ops.megadiff.whole_row_gradient.default, (logits, *targets, 37, MASK))
    torch.library.opcheck(torch.ops.megadiff.whole_row_gradient_.default, (logits.clone(), *targets, 37, MASK))

    def step(logits: torch.Tensor) -> torch.Tensor:
        return ops.whole_row_gradient(2.0 * logits, targets, vocab_size=37, mask_id=MASK)[1] * 0.5

    torch.testing.assert_close(torch.compile(step, fullgraph=True)(logits), step(logits))


def test_more_elements_than_32_bits_count() -> None:
    """T·W = 2³¹ + 131072, of which only the last rows count."""
    num_rows, vocab_size = (1 << 14) + 1, 1 << 17
    case = make_case("hybrid 0", num_rows, vocab_size)
    counts = torch.arange(num_rows) >= num_rows - 2
    targets = on_gpu(case.targets._replace(kl_weight=counts * 1.0, is_weight=counts * 1.0))
    logits = torch.zeros(num_rows, vocab_size, dtype=torch.bfloat16, device="cuda")
    logits[-2:] = make_logits(2, vocab_size).bfloat16()
    last = RowTargets(*(field[-2:].contiguous() for field in targets))
    numbers = {"vocab_size": vocab_size, "mask_id": MASK}
    expected_terms, expected = ops.whole_row_gradient(logits[-2:].clone(), last, **numbers)
    terms, gradient = ops.whole_row_gradient(logits, targets, **numbers, overwrite=True)
    assert torch.equal(terms[:, -2:], expected_terms) and torch.equal(gradient[-2:], expected)
    assert (terms[:, :-2] == 0).all() and (gradient[-3] == 0).all()
