"""What chance may do in a test: one rate of false alarms for all, and more draws where a test is to see more.

Most draws are functions of (seed, ordinal, position), and the same on every machine; those of torch's generators, and
trained weights, follow its release and the processor. The bounds are for any draws: a correct program fails one
assertion with about one seed in a million.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FALSE_ALARM = 1e-6
"""Probability that a correct program fails one assertion."""
STANDARD_ERRORS = 6.0
"""How far an average may be from its expectation. For a normal one 4.9 would do; averages of a few hundred losses that
weigh 1/t are skewed, and are beyond 4.9 five times as often."""


def assert_mean(samples: Tensor, exact: float, *, at_most: float) -> None:
    """Assert that independent samples have the mean `exact`, and that they are enough to show it.

    Args:
        samples: floats, of any shape.
        exact: their expectation; 1e-6 of it is granted to rounding, for samples that do not vary.
        at_most: greatest standard error of the average, in its own unit.
    """
    mean, error = samples.double().mean().item(), samples.double().std().item() / math.sqrt(samples.numel())
    assert error <= at_most, f"a standard error of {error:.3g} shows less than {at_most:.3g} would"
    assert abs(mean - exact) <= STANDARD_ERRORS * error + 1e-6 * abs(exact), (
        f"{mean:.6g} ± {error:.2g} is not {exact:.6g}"
    )


def assert_frequencies(ids: Tensor, probs: Tensor) -> None:
    """Assert that independent ids are distributed as `probs`, [V], by Pearson's test; impossible ones do not occur."""
    counts = torch.bincount(ids.flatten(), minlength=probs.numel()).double()
    possible = probs > 0
    assert counts[~possible].sum() == 0, f"impossible ids were drawn: counts {counts.tolist()}"
    expected = probs[possible].double() * ids.numel()
    assert expected.min() >= 20, "too few draws for a χ² test whose tail is to be right"
    statistic = ((counts[possible] - expected) ** 2 / expected).sum()
    freedom = torch.tensor(max(int(possible.sum()) - 1, 1), dtype=torch.float64)
    beyond = torch.special.gammaincc(freedom / 2, statistic / 2).item()
    assert beyond > FALSE_ALARM, f"χ² = {statistic:.1f} at {freedom:.0f} degrees of freedom has p = {beyond:.1g}"


def assert_uniform(values: Tensor, error: float = 1.0) -> None:
    """Assert that independent values are uniform in [0, 1], by Kolmogorov and Smirnov's test.

    Args:
        values: what a distribution function makes of its own samples, [N].
        error: standard error in units of that of an exact distribution function: √2 for another sample's.
    """
    steps = (torch.arange(len(values)) + 0.5) / len(values)
    distance = (values.sort().values - steps).abs().max().item()
    bound = error * math.sqrt(math.log(2 / FALSE_ALARM) / 2 / len(values))
    assert distance <= bound, f"distance {distance:.4f} exceeds {bound:.4f}"
