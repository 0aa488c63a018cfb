"""Pearson's test for the histograms of the samplers and corruptions under test."""

import torch
from torch import Tensor


def assert_frequencies(ids: Tensor, probs: Tensor) -> None:
    """Assert that independent `ids` are distributed as `probs`, [V], up to chance of about one in 1e4.

    Ids of probability 0 must not occur at all. The bound is Wilson and Hilferty's approximate quantile.
    """
    counts = torch.bincount(ids.flatten(), minlength=probs.numel()).double()
    possible = probs > 0
    assert counts[~possible].sum() == 0, f"impossible ids were drawn: counts {counts.tolist()}"
    expected = probs[possible].double() * ids.numel()
    assert expected.min() >= 5, "too few draws for a χ² test"
    statistic = ((counts[possible] - expected) ** 2 / expected).sum().item()
    freedom = max(int(possible.sum()) - 1, 1)
    bound = freedom * (1 - 2 / (9 * freedom) + 3.7 * (2 / (9 * freedom)) ** 0.5) ** 3
    assert statistic < bound, f"χ² = {statistic:.1f} exceeds {bound:.1f} at {freedom} degrees of freedom"
