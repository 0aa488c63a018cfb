"""FP8 without FP8 hardware: rounding against a table of all FP8 numbers, products and gradients against the rounded."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from torch import Tensor

from megadiff.models.fp8_emulation import Emulation, fp8_linear, fp8_matmul, largest_magnitude, quantize

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def finite_numbers(dtype: torch.dtype) -> Tensor:
    """All numbers of an FP8 type, ascending, as fp64; where 0 is twice, once."""
    numbers = torch.arange(256, dtype=torch.uint8).view(dtype).double()
    return numbers[numbers.isfinite()].unique()


def by_table(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest number of the type to each of x, scaled so that the largest is hit; fp64, not scaled back."""
    table = finite_numbers(dtype)
    scaled = x.float() * (torch.finfo(dtype).max / x.abs().max().float())
    distance = (scaled.double().flatten()[:, None] - table).abs()
    return table[distance.argmin(dim=1)].view(x.shape)


@pytest.mark.parametrize("dtype, count, largest", [(E4M3, 253, 448.0), (E5M2, 247, 57344.0)])
def test_every_fp8_number_stays_itself(dtype: torch.dtype, count: int, largest: float) -> None:
    numbers = finite_numbers(dtype).float()
    assert numbers.numel() == count and numbers.max() == largest
    quantized = quantize(numbers, dtype, torch.tensor(largest))
    assert torch.equal(quantized.dequantized(), numbers) and quantized.inverse_scale == 1.0


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 300.0])
def test_rounds_to_the_nearest_number_and_as_torch_does(dtype: torch.dtype, scale: float) -> None:
    x = scale * torch.randn(64, 33, generator=torch.Generator().manual_seed(0))
    amax = largest_magnitude(x)
    quantized = quantize(x, dtype, amax)
    assert torch.equal(quantized.values.double(), by_table(x, dtype))
    assert torch.equal(quantized.values.float(), (x * (torch.finfo(dtype).max / amax)).to(dtype).float())
    assert quantized.values.float().abs().max() == torch.finfo(dtype).max, "the whole range is used"
    worst = (quantized.dequantized() - x).abs().max() / amax
    assert worst <= 2.0 ** -(4 if dtype == E4M3 else 3), "half of the spacing at the largest number"


def test_ties_go_to_even_and_what_is_larger_than_said_saturates() -> None:
    unscaled = torch.tensor(448.0)
    ties = torch.tensor([17.0, 19.0, -17.0, 21.0])  # spacing 2 between 16 and 32
    assert quantize(ties, E4M3, unscaled).values.float().tolist() == [16.0, 20.0, -16.0, 20.0]
    beyond = quantize(torch.tensor([449.0, 1e6, -1e6]), E4M3, unscaled)
    assert beyond.values.float().tolist() == [448.0, 448.0, -448.0]


def test_zeros_tiny_numbers_and_numbers_that_are_not_finite() -> None:
    for x in (torch.zeros(3), torch.full((3,), 1e-40)):
        assert quantize(x, E4M3, largest_magnitude(x)).dequantized().isfinite().all()
    for bad in (math.inf, math.nan):
        x = torch.tensor([1.0, bad])
        for dtype in (E4M3, E5M2):
            assert quantize(x, dtype, largest_magnitude(x)).dequantized()[1].isnan()


@pytest.fixture
def alone() -> Emulation:
    return Emulation(fp8_format="hybrid", amax_group=_GroupOfOne())  # type: ignore[arg-type]


class _GroupOfOne:
    def size(self) -> int:
        return 1


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in FP8 by the table, scaled back, fp64."""
    return by_table(x, dtype) / (torch.finfo(dtype).max / x.abs().max().float()).double()


@pytest.mark.parametrize("fp8_format, gradient_dtype", [("hybrid", E5M2), ("e4m3", E4M3)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2.0**-8)])
def test_products_and_gradients_are_those_of_rounded_matrices(
    fp8_format: str, gradient_dtype: torch.dtype, dtype: torch.dtype, tolerance: float
) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, 3, 33, generator=generator).to(dtype).requires_grad_()
    weight = (0.02 * torch.randn(17, 33, generator=generator)).to(dtype).requires_grad_()
    grad = (1e-4 * torch.randn(5, 3, 17, generator=generator)).to(dtype)
    emulation = Emulation(fp8_format=fp8_format, amax_group=_GroupOfOne())  # type: ignore[arg-type]
    y = fp8_linear(x, weight, emulation)
    y.backward(grad)

    x_8, weight_8 = rounded(x.detach(), E4M3), rounded(weight.detach(), E4M3)
    grad_8 = rounded(grad, gradient_dtype)
    expected = {
        "y": (y, x_8 @ weight_8.t()),
        "input": (x.grad, grad_8 @ weight_8),
        "weight": (weight.grad, grad_8.flatten(0, 1).t() @ x_8.flatten(0, 1)),
    }
    for name, (ours, exact) in expected.items():
        assert ours is not None and ours.dtype == dtype and ours.shape == exact.shape
        error = (ours.double() - exact).abs().max() / exact.abs().max()
        assert error <= tolerance, f"{name}: {error}"
    plain = x.detach().double() @ weight.detach().double().t()
    assert (y.double() - plain).abs().max() / plain.abs().max() > 1e-3, "nothing was rounded"


ON_GPU = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.mark.parametrize("device", ["cpu", ON_GPU])
@pytest.mark.parametrize("gradients", [E4M3, E5M2])
def test_products_are_those_of_torch(gradients: torch.dtype, device: str) -> None:
    """`torch._scaled_mm` is cuBLAS on a GPU: tensor cores, where compute capability is 8.9 or more."""
    generator = torch.Generator().manual_seed(0)
    a_MK = torch.randn(64, 1024, generator=generator).to(device)
    b_NK = 0.02 * torch.randn(48, 1024, generator=generator).to(device)
    a, b = quantize(a_MK, gradients, largest_magnitude(a_MK)), quantize(b_NK, E4M3, largest_magnitude(b_NK))
    b = b._replace(values=b.values.t())
    ours = fp8_matmul(a, b, torch.bfloat16)
    scales = {"scale_a": a.inverse_scale, "scale_b": b.inverse_scale}
    theirs = torch._scaled_mm(a.values, b.values, **scales, out_dtype=torch.bfloat16)
    assert (ours.float() - theirs.float()).norm() <= 2.0**-8 * theirs.float().norm()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_casts_on_a_gpu_are_those_of_the_host(dtype: torch.dtype) -> None:
    x = torch.randn(257, 129, generator=torch.Generator().manual_seed(0)).bfloat16()
    on_host, on_gpu = (quantize(y, dtype, largest_magnitude(y)) for y in (x, x.cuda()))
    assert torch.equal(on_gpu.values.cpu().view(torch.uint8), on_host.values.view(torch.uint8))


def test_only_wanted_gradients_are_computed(alone: Emulation) -> None:
    x, weight = torch.randn(2, 4), torch.randn(3, 4, requires_grad=True)
    fp8_linear(x, weight, alone).sum().backward()
    assert x.grad is None and weight.grad is not None
    x.requires_grad_()
    fp8_linear(x, weight.detach(), alone).sum().backward()
    assert x.grad is not None


def maxima_over_a_group() -> list[float]:
    dist.init_process_group("gloo")
    emulation = Emulation(fp8_format="hybrid", amax_group=dist.group.WORLD)  # type: ignore[arg-type]
    rank = dist.get_rank()
    found = emulation.amaxes(torch.tensor([1.0, -5.0 + rank]), torch.tensor([float(rank)])).tolist()
    dist.destroy_process_group()
    return found


def test_a_tensor_has_one_maximum_whoever_holds_its_parts() -> None:
    assert run_ranks(2, maxima_over_a_group) == [[5.0, 1.0]] * 2
