"""Faults to inject into a run: what a flaky device, a bad sample or a stuck process does to it."""

from __future__ import annotations

import os
import time
from typing import Any
from unittest import mock

from torch import Tensor

from megadiff.data.corpus import TokenStream
from megadiff.data.loader import Batch
from megadiff.diffusion import NoisedBatch
from megadiff.training.step import DenoisingStep


def is_rank(rank: int) -> bool:
    return int(os.environ.get("RANK", "0")) == rank


class LossFault:
    """Multiplies the loss of one sample's micro-batch on one rank; use as a context manager.

    Args:
        ordinal: of the sample.
        times: how often the fault shows; None: whenever the sample is computed.
    """

    def __init__(self, *, rank: int, ordinal: int, factor: float, times: int | None = None) -> None:
        self.rank, self.ordinal, self.factor = rank, ordinal, factor
        self.left = float("inf") if times is None else times
        self.is_at_hand = False

    def __enter__(self) -> LossFault:
        noised_batch, training_loss = DenoisingStep.noised_batch, DenoisingStep._training_loss

        def watched(step: DenoisingStep, batch: Batch, *, validation: bool) -> NoisedBatch:
            self.is_at_hand = not validation and self.ordinal in batch.ordinal_B.tolist()
            return noised_batch(step, batch, validation=validation)

        def faulty(step: DenoisingStep, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
            loss, num_tokens, logged = training_loss(step, *arguments)
            if not (self.is_at_hand and is_rank(self.rank) and self.left > 0):
                return loss, num_tokens, logged
            self.left -= 1
            logged[0] *= self.factor
            return loss * self.factor, num_tokens, logged

        self.patches = [
            mock.patch.object(DenoisingStep, "noised_batch", watched),
            mock.patch.object(DenoisingStep, "_training_loss", faulty),
        ]
        for patch in self.patches:
            patch.start()
        return self

    def __exit__(self, *exception: object) -> None:
        for patch in self.patches:
            patch.stop()


def hang_at(ordinal: int, *, rank: int) -> None:
    """From now on, a rank sleeps for ever when it comes to a sample."""
    noised_batch = DenoisingStep.noised_batch

    def guilty_function(step: DenoisingStep, batch: Batch, *, validation: bool) -> NoisedBatch:
        if is_rank(rank) and ordinal in batch.ordinal_B.tolist():
            time.sleep(1e6)
        return noised_batch(step, batch, validation=validation)

    DenoisingStep.noised_batch = guilty_function  # type: ignore[method-assign]


def stop_reading_after(num_windows: int, *, rank: int) -> None:
    """From now on, a rank's file system hangs after some reads."""
    window, count = TokenStream.window, 0

    def stuck(stream: TokenStream, *arguments: Any) -> Any:
        nonlocal count
        count += 1
        if is_rank(rank) and count > num_windows:
            time.sleep(1e6)
        return window(stream, *arguments)

    TokenStream.window = stuck  # type: ignore[method-assign]
