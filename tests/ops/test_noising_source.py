"""The sources of the noising operator, compiled by themselves: the same bits from every compiler flag and back end."""

from __future__ import annotations

import ctypes
import decimal
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megadiff.diffusion import (
    HybridMixing,
    MaskedMixing,
    MixingDistribution,
    NoiseSchedule,
    UniformMixing,
    sequence_log_snr,
)
from megadiff.ops import _library
from megadiff.ops.noising import noise_rows

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which("c++") or shutil.which("g++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
needs_kernels = pytest.mark.skipif(
    not _library.is_live("cpu"), reason=f"native CPU kernels are not live: {_library.state('cpu')}"
)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
V, SEED = 131072, (1 << 63) + 99
PROBE = """
#include "noising/noising_math.h"
extern "C" void exp_of_negatives(const double* x, double* y, int64_t size) {
  for (int64_t i = 0; i < size; ++i) y[i] = megadiff::exp_of_negative(x[i]);
}
extern "C" void philox(const uint32_t* counter, uint64_t key, uint32_t* words) {
  megadiff::PhiloxWords w = megadiff::philox({counter[0], counter[1], counter[2], counter[3]}, key);
  words[0] = w.first, words[1] = w.second, words[2] = w.third, words[3] = w.fourth;
}
extern "C" uint64_t threshold(double p) { return megadiff::threshold(p); }
extern "C" void level(double log_snr, double pdf, double scale, double shift, uint32_t states, megadiff::Level* level) {
  *level = megadiff::level_of(log_snr, pdf, {scale, shift, 0, states, false});
}
"""
Probe = Callable[..., ctypes.CDLL]


def compiled(source: Path, *flags: str) -> ctypes.CDLL:
    library = source.with_suffix(".so")
    command = [str(COMPILER), "-std=c++17", "-fPIC", "-shared", f"-I{ROOT / 'csrc'}", *flags, str(source)]
    subprocess.run([*command, "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Probe:
    def build(*flags: str) -> ctypes.CDLL:
        source = tmp_path_factory.mktemp("probe") / "probe.cpp"
        source.write_text(PROBE)
        return compiled(source, *flags)

    return build


def exponentials(library: ctypes.CDLL, x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    library.exp_of_negatives(ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()), ctypes.c_int64(x.numel()))
    return y


def exponents() -> Tensor:
    """Numbers <= 0 of every magnitude, those where the reduction changes its integer, and the ends of the range."""
    uniform = torch.rand(3, 6000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    halves = torch.arange(0.5, 1021, dtype=torch.float64) * torch.tensor(2.0, dtype=torch.float64).log()
    extremes = torch.tensor([0.0, 5e-324, 1e-300, 2.0**-54, 2.0**-53, 707.9999, 708.0], dtype=torch.float64)
    below, above = halves.nextafter(torch.zeros_like(halves)), halves.nextafter(halves + 1)
    return -torch.cat([*(uniform * torch.tensor([[1.0], [20.0], [708.0]])), below, halves, above, extremes])


def test_the_exponential_is_wrong_by_less_than_a_unit(probe: Probe) -> None:
    library, x, worst = probe("-O3"), exponents(), 0.0
    with decimal.localcontext() as context:
        context.prec = 40
        for argument, value in zip(x.tolist(), exponentials(library, x).tolist(), strict=True):
            exact = decimal.Decimal(argument).exp()
            unit = decimal.Decimal(2) ** (exact.ln() / decimal.Decimal(2).ln()).__floor__() / 2**52
            worst = max(worst, float(abs(decimal.Decimal(value) - exact) / unit))
    assert worst < 0.7
    ends = torch.tensor([0.0, -0.0, -708.0001, -745.0, -1e300, -torch.inf], dtype=torch.float64)
    assert exponentials(library, ends).tolist() == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert exponentials(library, -torch.full((1,), torch.nan, dtype=torch.float64)).isnan().all()


def test_bits_do_not_depend_on_the_compilers_flags(probe: Probe) -> None:
    plain, fused = probe("-O0"), probe("-O3", "-ffp-contract=fast", "-march=native")
    assert torch.equal(exponentials(plain, exponents()), exponentials(fused, exponents()))
    levels = [(ctypes.c_uint8 * 48)() for _ in range(2)]  # two thresholds, then eight floats
    for log_snr in torch.linspace(-40, 40, 997, dtype=torch.float64).tolist():
        for scale, shift in ((1.0, 0.0), (0.37, -2.1), (-0.9, 1.3), (1.0, torch.inf), (1.0, -torch.inf)):
            for library, level in zip((plain, fused), levels, strict=True):
                numbers = (ctypes.c_double(number) for number in (log_snr, 0.123, scale, shift))
                library.level(*numbers, ctypes.c_uint32(V - 1), level)
            assert bytes(levels[0]) == bytes(levels[1])


def test_known_answers_and_thresholds(probe: Probe) -> None:
    library, ones = probe("-O3"), 0xFFFFFFFF
    digits = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    for counter, key, expected in (
        ((0,) * 4, 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((ones,) * 4, (1 << 64) - 1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (digits, 0x299F31D0A4093822, "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ):
        words = (ctypes.c_uint32 * 4)()
        library.philox((ctypes.c_uint32 * 4)(*counter), ctypes.c_uint64(key), words)
        assert " ".join(f"{word:08x}" for word in words) == expected
    library.threshold.restype = ctypes.c_uint64
    unit = 2.0**-32
    for p in (0.0, 1e-300, 0.5 * unit, 1.5 * unit, 2.5 * unit, 0.3, 0.5, 1 - unit, 1 - 0.5 * unit, 1 - 2.0**-53, 1.0):
        assert library.threshold(ctypes.c_double(p)) == round(p * 2**32)


class Strided(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("row_stride", ctypes.c_int64), ("column_stride", ctypes.c_int64))


class Mixing(ctypes.Structure):
    _fields_ = (
        ("scale", ctypes.c_double),
        ("shift", ctypes.c_double),
        ("mask_id", ctypes.c_int64),
        ("num_uniform_states", ctypes.c_uint32),
        ("mask_is_uniform_state", ctypes.c_bool),
    )


class Task(ctypes.Structure):
    _fields_ = (
        ("batch_size", ctypes.c_int64),
        ("num_tokens", ctypes.c_int64),
        *((name, Strided) for name in ("tokens", "log_snr", "log_snr_pdf", "counted", "ordinal", "position")),
        ("seed", ctypes.c_uint64),
        ("purpose", ctypes.c_uint32),
        ("mixing", Mixing),
        ("noised", ctypes.c_void_p),
        ("numbers", ctypes.c_void_p),
    )


class Emulated:
    """The CUDA kernel on this processor; its tensors end where memory ends."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        library.guarded_new.restype = ctypes.c_void_p
        library.noise_rows.restype = ctypes.c_char_p

    def guarded(self, tensor: Tensor) -> Tensor:
        size, mapping, mapped = tensor.numel() * tensor.itemsize, ctypes.c_void_p(), ctypes.c_int64()
        out = ctypes.byref(mapping), ctypes.byref(mapped)
        place = self.library.guarded_new(ctypes.c_int64(size), ctypes.c_int64(tensor.itemsize), True, *out)
        memory = (ctypes.c_uint8 * size).from_address(place)
        return torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape).copy_(tensor)

    def noise_rows(self, tensors: dict[str, Tensor | None], mixing: MixingDistribution, purpose: int) -> list[Tensor]:
        placed = {name: tensor if tensor is None else self.guarded(tensor) for name, tensor in tensors.items()}
        tokens_BL = placed["tokens"]
        assert tokens_BL is not None
        noised_BL = self.guarded(torch.full_like(tokens_BL, -1))
        numbers_4BL = self.guarded(torch.full((4, *tokens_BL.shape), -1.0))
        task = Task(*tokens_BL.shape, seed=SEED, purpose=purpose)
        for name, tensor in placed.items():
            if tensor is not None:
                columns = tensor.shape[-1] > 1 and name != "ordinal"
                row_stride = 0 if name == "position" else tensor.stride(0)
                setattr(task, name, Strided(tensor.data_ptr(), row_stride, tensor.stride(-1) if columns else 0))
        task.mixing = Mixing(*(getattr(mixing, name) for name, _ in Mixing._fields_))
        task.noised, task.numbers = noised_BL.data_ptr(), numbers_4BL.data_ptr()
        error = self.library.noise_rows(tokens_BL.dtype == torch.int64, ctypes.byref(task))
        assert error is None, error.decode()
        return [noised_BL, *numbers_4BL]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    source = tmp_path_factory.mktemp("emulated") / "noising.cpp"
    source.write_text(f'#include "{ROOT / "tests/csrc/noising_driver.cpp"}"\n')
    tests, headers = ROOT / "tests" / "csrc", Path(torch.__file__).parent / "include"
    libraries = Path(torch.__file__).parent / "lib"
    includes = [f"-include{tests / 'cuda_emulator.h'}", f"-I{tests}", f"-I{tests / 'stubs'}", "-isystem", str(headers)]
    return Emulated(compiled(source, "-O2", *includes, f"-L{libraries}", "-lc10"))


MIXINGS = [
    MaskedMixing(V, 3),
    UniformMixing(1271, 3),
    UniformMixing(V, 3, include_mask=True),
    HybridMixing(V, V - 1, 0.0),
    HybridMixing(1271, 0, -2.0, scale=0.7),
]


def example(
    mixing: MixingDistribution, shape: tuple[int, int], dtype: torch.dtype, per_token: bool
) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(shape[1])
    log_snr = sequence_log_snr(NoiseSchedule(), SEED, torch.arange(shape[0]))[:, None]
    if per_token:
        log_snr = 18 * torch.rand(shape, generator=generator, dtype=torch.float64) - 9
    return {
        "tokens": torch.randint(mixing.vocab_size, shape, generator=generator).to(dtype),
        "log_snr": log_snr,
        "log_snr_pdf": NoiseSchedule().log_snr_pdf(log_snr),
        "counted": torch.rand(shape, generator=generator) < 0.8,
        "ordinal": torch.arange(shape[0]) + (1 << 40),
        "position": torch.arange(shape[1]).flip(0) * 5 if per_token else None,
    }


def native(
    tensors: dict[str, Tensor | None], mixing: MixingDistribution, purpose: int, device: str = "cpu"
) -> list[Tensor]:
    moved = (tensor if tensor is None else tensor.to(device) for tensor in tensors.values())
    tokens_BL, log_snr_BL, log_snr_pdf_BL, counted_BL, ordinal_B, position_L = moved
    assert tokens_BL is not None and log_snr_BL is not None and log_snr_pdf_BL is not None
    assert counted_BL is not None and ordinal_B is not None
    outputs = noise_rows(
        tokens_BL,
        log_snr_BL,
        log_snr_pdf_BL,
        ordinal_B,
        counted_BL,
        seed=SEED,
        purpose=purpose,
        scale=mixing.scale,
        shift=mixing.shift,
        num_uniform_states=mixing.num_uniform_states,
        mask_id=mixing.mask_id,
        mask_is_uniform_state=mixing.mask_is_uniform_state,
        position_L=position_L,
    )
    return [output.cpu() for output in outputs]


def assert_same_bits(outputs: list[Tensor], expected: list[Tensor]) -> None:
    for output, reference in zip(outputs, expected, strict=True):
        assert output.dtype == reference.dtype
        bits = torch.int64 if output.dtype == torch.int64 else torch.int32
        assert torch.equal(output.contiguous().view(bits), reference.contiguous().view(bits))


@needs_kernels
@pytest.mark.parametrize("mixing", MIXINGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("per_token", [False, True])
def test_the_cuda_source_gives_the_bits_of_the_cpu(
    emulated: Emulated, mixing: MixingDistribution, dtype: torch.dtype, per_token: bool
) -> None:
    for shape in ((1, 1), (3, 255), (2, 256), (4, 1271)):
        tensors = example(mixing, shape, dtype, per_token)
        for purpose in (0, 128):
            assert_same_bits(emulated.noise_rows(tensors, mixing, purpose), native(tensors, mixing, purpose))


@pytest.mark.gpu
@needs_kernels
@needs_gpu
@pytest.mark.parametrize("mixing", MIXINGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("per_token", [False, True])
def test_a_gpu_gives_the_bits_of_the_cpu(mixing: MixingDistribution, dtype: torch.dtype, per_token: bool) -> None:
    for shape in ((0, 5), (1, 1), (3, 1271), (64, 16384)):
        tensors = example(mixing, shape, dtype, per_token)
        assert_same_bits(native(tensors, mixing, 0, "cuda"), native(tensors, mixing, 0))
