"""The order of samples is a permutation of each epoch, and a different one each time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from chance import assert_frequencies

from megadiff.data.order import SampleOrder


@pytest.mark.parametrize("num_windows", [1, 2, 3, 4, 15, 16, 17, 100, 255, 256, 257, 1000, 65537])
def test_each_epoch_visits_every_window_once(num_windows: int) -> None:
    order = SampleOrder(num_windows, seed=5)
    for epoch in (0, 1, 10**6):
        ordinals = epoch * num_windows + np.arange(num_windows)
        assert np.array_equal(np.sort(order.windows(ordinals)), np.arange(num_windows))


def test_each_place_is_looked_up_alone() -> None:
    """Any part of the stream, across epochs and in any arrangement, agrees with the whole."""
    order = SampleOrder(37, seed=0)
    whole = order.windows(range(5 * 37))
    places = np.random.default_rng(0).integers(0, 5 * 37, size=(4, 50))
    assert np.array_equal(order.windows(places), whole[places])


def test_epochs_and_seeds_differ() -> None:
    ordinals = np.arange(1000)
    first = SampleOrder(1000, seed=1).windows(ordinals)
    others = (
        SampleOrder(1000, seed=1).windows(ordinals + 1000),
        SampleOrder(1000, seed=2).windows(ordinals),
        SampleOrder(1000, seed=1 + 2**32).windows(ordinals),
        ordinals,
    )
    for other in others:
        assert (first == other).mean() < 0.02, "two independent orders share one place on average"


def test_known_order() -> None:
    """A resumed run must read on in the order of the run it resumes, whatever version of this file it has."""
    first, second = SampleOrder(10, seed=0).windows(np.arange(20)).reshape(2, 10).tolist()
    assert first == [8, 2, 1, 9, 4, 5, 7, 3, 6, 0]
    assert second == [2, 7, 5, 1, 8, 4, 9, 0, 3, 6]


@pytest.mark.parametrize("num_windows", [3, 10, 100])
def test_every_window_is_as_likely_in_every_place(num_windows: int) -> None:
    """Chi-square over epochs: first, middle and last place, and the step from one place to the next."""
    num_epochs = 2500
    orders = SampleOrder(num_windows, seed=3).windows(
        np.arange(num_epochs)[:, None] * num_windows + np.arange(num_windows)
    )
    draws = {
        "first": orders[:, 0],
        "middle": orders[:, num_windows // 2],
        "last": orders[:, -1],
        "step": (orders[:, 1] - orders[:, 0]) % num_windows - 1,
    }
    for name, values in draws.items():
        num_values = num_windows - 1 if name == "step" else num_windows
        assert_frequencies(torch.from_numpy(values), torch.full((num_values,), 1 / num_values))


def test_a_large_corpus_needs_no_table() -> None:
    windows = SampleOrder(10**12, seed=0).windows(np.arange(1000) * 10**9)
    assert len(set(windows.tolist())) == 1000
    assert windows.min() >= 0 and windows.max() < 10**12
    assert windows.std() == pytest.approx(10**12 / 12**0.5, rel=0.1)


def test_no_windows() -> None:
    with pytest.raises(ValueError, match="num_windows must be at least 1, got 0"):
        SampleOrder(0, seed=0)
