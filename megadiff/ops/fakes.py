"""Shapes and types of the native operators' outputs, for tracing without data (`torch.compile`, meta tensors)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_FAKES: dict[str, Callable[..., Any]] = {
    "noise_rows": lambda tokens, *_: (_like(tokens), tokens.new_empty((4, *tokens.shape), dtype=torch.float32)),
    "row_statistics": lambda logits, *_: _floats(logits, 4),
    "row_partial_sums": lambda logits, *_: _floats(logits, 2),
    "row_loss": lambda log_sum_exp, *_: _floats(log_sum_exp, 3),
    "row_gradient": lambda logits, *_: _like(logits),
    "row_gradient_": lambda *_: None,
    "whole_row_loss": lambda logits, *_: _floats(logits, 3),
    "whole_row_gradient": lambda logits, *_: (_floats(logits, 3), _like(logits)),
    "whole_row_gradient_": lambda logits, *_: _floats(logits, 3),
    "scale_rows_": lambda *_: None,
}


def register() -> None:
    """Register the fakes of all operators, after the library with their schemas has been loaded."""
    for name, fake in _FAKES.items():
        torch.library.register_fake(f"megadiff::{name}", fake)


def _floats(rows: Tensor, count: int) -> Tensor:
    return rows.new_empty(count, rows.shape[0], dtype=torch.float32)


def _like(tensor: Tensor) -> Tensor:
    return tensor.new_empty(tensor.shape)
