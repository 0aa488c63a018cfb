"""What devices can do at most: dense bf16 products, in 10¹² a second, as their makers say."""

from __future__ import annotations

BF16_TFLOPS = {
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.4,
    "H200": 989.4,
    "A100": 312.0,
    "B200": 2250.0,
}
"""By what the name of a device contains, the more special first."""


def peak_tflops(device_name: str) -> float | None:
    """Return the peak of a device, None where it is not known here."""
    return next((tflops for name, tflops in BF16_TFLOPS.items() if name in device_name), None)
