"""What devices can do at most: dense bf16 products, in 10¹² a second, as their makers say.

Data sheets count a structured sparsity that training does not have; these are their halves.
"""

from __future__ import annotations

BF16_TFLOPS = {
    "A100": 312.0,
    "H100": 989.4,
    "H100 NVL": 835.5,
    "H100 PCIe": 756.0,
    "H200": 989.4,
    "H200 NVL": 835.5,
    "B200": 2250.0,
    "GB200": 2500.0,
}
"""By what the name of a device contains; the longest one counts."""


def peak_tflops(device_name: str) -> float | None:
    """Return the peak of a device, None where it is not known here."""
    known = [name for name in BF16_TFLOPS if name in device_name]
    return BF16_TFLOPS[max(known, key=len)] if known else None
