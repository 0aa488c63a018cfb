"""From causal to bidirectional attention in the course of a run, for weights that have only ever looked back.

Every place sees itself, those before it and a few after it: how many is a function of the sample's place in the
training stream, from 0 at the first sample to all at sample `num_samples`. It is known on the host, and the same on
every device, in every layout and after a resume. Validation always sees everything: it measures the model that the run
is about, and its samples have no place in the course of training.

Source: after Gong et al. (arXiv 2410.17891), who open single entries above the diagonal at random, with a probability
that grows linearly in the step. A growing look-ahead reaches the same end; it needs no noise of its own, and blocks of
keys that no query sees can be skipped.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megadiff.diffusion.objectives.wrapper import ObjectiveWrapper
from megadiff.diffusion.rows import NoisedBatch
from megadiff.diffusion.samples import Samples


def annealed_lookahead(ordinal_B: Tensor, length: int, num_samples: int) -> Tensor:
    """Return how many places after itself each place of a sample sees, int64 [B], from 0 to `length`.

    Args:
        ordinal_B: Places in the training stream, int64.
        length: S.
        num_samples: Samples until attention is bidirectional, at least 1.
    """
    return (ordinal_B.clamp(max=num_samples) * length) // num_samples


@dataclass(frozen=True)
class AnnealedObjective(ObjectiveWrapper):
    """Another objective whose attention grows from causal to bidirectional."""

    num_samples: int
    """Samples of the training stream until attention is bidirectional, at least 1."""

    def noised_batch(self, samples: Samples, seed: int, *, validation: bool = False) -> NoisedBatch:
        """Noise a batch and narrow its attention; see `Objective.noised_batch`.

        Once all samples of a batch see everything, its layout is the inner objective's.
        """
        batch = self.inner.noised_batch(samples, seed, validation=validation)
        if validation or bool((samples.ordinal_B >= self.num_samples).all()):
            return batch
        length = batch.noised_BS.shape[1]
        lookahead_B = annealed_lookahead(samples.ordinal_B, length, self.num_samples).to(samples.device)
        place_S = torch.arange(length, device=samples.device)
        layout = replace(batch.layout, kind="causal", lookahead_B=lookahead_B, query_Q=place_S, key_K=place_S)
        return replace(batch, layout=layout)
