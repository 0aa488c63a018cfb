"""Peaks of devices, by the names that CUDA gives them."""

from __future__ import annotations

import pytest

from megadiff.devices import peak_tflops


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA GB200", 2500.0),  # of more power than the B200 whose name it contains
        ("a toaster", None),
    ],
)
def test_a_device_is_known_by_the_longest_name_that_it_has(name: str, tflops: float | None) -> None:
    assert peak_tflops(name) == tflops
