"""The emulator of CUDA finds what it says it finds: one sound kernel, and the same with a fault of each kind."""

from __future__ import annotations

import ctypes
import shutil

import pytest
import torch
from ops.emulated import Device, Emulated, build

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator of CUDA needs g++")
FAULTS = ["none", "no barrier", "divergence", "early exit", "shuffle by half", "out of bounds", "out of shared"]
FAULTS += ["misaligned", "no start", "late read"]
SHARED_BYTES = 64 * 4


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    return Emulated(build("faults_driver.cpp", tmp_path_factory.mktemp("emulated")))


def reverse(
    emulated: Emulated, fault: str, *, team: int = 2, shared_bytes: int = SHARED_BYTES, capability: int = 90
) -> torch.Tensor:
    """[teams, threads of a team]"""
    emulated.set_device(Device(capability, 132, 100_000, 200_000))
    out = emulated.vector(torch.full((8 * 64,), -1.0))
    emulated.library.reverse.restype = ctypes.c_char_p
    numbers = [ctypes.c_int64(x) for x in (8, team, shared_bytes)]
    error = emulated.library.reverse(ctypes.c_int64(FAULTS.index(fault)), ctypes.c_void_p(out.data_ptr()), *numbers)
    if error:
        raise RuntimeError(error.decode())
    return out.view(8 // team, team * 64)


def is_right(out: torch.Tensor) -> bool:
    return torch.equal(out, torch.arange(out.shape[1]).float().flip(0).expand_as(out))


@pytest.mark.parametrize("team", [1, 2, 8])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_sound_kernel_runs(emulated: Emulated, team: int, seed: int) -> None:
    emulated.library.set_seed(seed)
    assert is_right(reverse(emulated, "none", team=team))


@pytest.mark.parametrize(
    ("fault", "team"), [("no barrier", 1), ("no barrier", 2), ("no start", 2), ("no start", 8), ("late read", 2)]
)
def test_faults_that_show_as_wrong_results(emulated: Emulated, fault: str, team: int) -> None:
    assert not is_right(reverse(emulated, fault, team=team))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("divergence", r"barrier divergence from block \d+ on: of its threads \d+ wait at "),
        ("early exit", r"barrier divergence from block \d+ on: of its threads 2 have ended, 126 wait at cluster.sync"),
        ("shuffle by half", r"barrier divergence .* 64 wait at a shuffle"),
        ("out of bounds", r"access outside memory at 0x[0-9a-f]+, by thread 63 of block 7"),
        ("out of shared", r"access outside memory at 0x[0-9a-f]+, by thread \d+ of block \d+"),
        ("misaligned", r"misaligned access, by thread \d+ of block \d+"),
    ],
)
def test_faults_that_stop_the_launch(emulated: Emulated, fault: str, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        reverse(emulated, fault)
    assert is_right(reverse(emulated, "none")), "the next launch begins afresh"


def test_launches_that_a_device_refuses(emulated: Emulated) -> None:
    with pytest.raises(RuntimeError, match="CUDA failed to launch a kernel: invalid cluster size"):
        reverse(emulated, "none", capability=80)
    with pytest.raises(RuntimeError, match="CUDA failed to raise a kernel's shared memory: invalid argument"):
        reverse(emulated, "none", shared_bytes=100_001)
    assert is_right(reverse(emulated, "none", shared_bytes=100_000))
