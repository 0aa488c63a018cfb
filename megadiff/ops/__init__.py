"""Fused operations of the bound: tensors and numbers in, tensors out; no groups, no configuration."""

from megadiff.ops.functional import RowSums, RowTargets, row_gradient, row_loss, row_partial_sums, row_statistics

__all__ = ["RowSums", "RowTargets", "row_gradient", "row_loss", "row_partial_sums", "row_statistics"]
