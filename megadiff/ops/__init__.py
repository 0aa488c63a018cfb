"""Fused operations of the bound: tensors and numbers in, tensors out; no groups, no configuration."""

from megadiff.ops.eager import merge_statistics
from megadiff.ops.functional import (
    row_gradient,
    row_loss,
    row_partial_sums,
    row_statistics,
    scale_rows_,
    whole_row_gradient,
    whole_row_loss,
)
from megadiff.ops.rows import RowSums, RowTargets

__all__ = [
    "RowSums",
    "RowTargets",
    "merge_statistics",
    "row_gradient",
    "row_loss",
    "row_partial_sums",
    "row_statistics",
    "scale_rows_",
    "whole_row_gradient",
    "whole_row_loss",
]
