"""The slots of an autoregressive model for a diffusion objective, so that weights of the one can begin the other.

An autoregressive model reads [BOS, x_0 .. x_{L-2}] and predicts x_i at place i. Here it reads the noised tokens in the
same slots, [BOS, z_0 .. z_{L-2}], and place i still predicts x_i: rows do not move, and nothing that the weights have
learned about places has to be unlearned. The last noised token of a document is read by nobody. The bound is valid all
the same, because it holds for any function x_θ of z, one that ignores a part of it among them; what is lost is what
that token would have told.

Source: Gong et al., "Scaling Diffusion Language Models via Adaptation from Autoregressive Models" (arXiv 2410.17891),
which shifts the outputs instead: place i reads z_i and predicts x_{i+1}, and the first token is not predicted at all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from megadiff.diffusion.objectives.wrapper import ObjectiveWrapper
from megadiff.diffusion.rows import NoisedBatch
from megadiff.diffusion.samples import Samples, document_starts, shifted_inputs


@dataclass(frozen=True)
class ShiftedObjective(ObjectiveWrapper):
    """Another objective whose model reads each noised token one place later."""

    bos_id: int
    """Id that stands before a document."""

    def noised_batch(self, samples: Samples, seed: int, *, validation: bool = False) -> NoisedBatch:
        """Noise a batch and move what the model reads; see `Objective.noised_batch`.

        A place is clean context where both its slot and its target are: the last token of a prompt, which predicts the
        first of the response, may see the response. So prompts at the beginning of samples stay as they are.
        """
        batch = self.inner.noised_batch(samples, seed, validation=validation)
        document_BS, given_BS = batch.layout.document_BS, batch.layout.given_BS
        starts_BS = document_starts(batch.noised_BS, document_BS)
        if given_BS is not None:
            batch = replace(batch, layout=replace(batch.layout, given_BS=given_BS & (starts_BS | given_BS.roll(1, 1))))
        if batch.soft_ids_BSK is not None and batch.soft_weights_BSK is not None:
            starts_BS1 = starts_BS[..., None]
            only_first_K = torch.arange(batch.soft_ids_BSK.shape[-1], device=samples.device) == 0
            batch = replace(
                batch,
                soft_ids_BSK=batch.soft_ids_BSK.roll(1, 1).where(~starts_BS1, self.bos_id),
                soft_weights_BSK=torch.where(
                    starts_BS1, only_first_K.to(batch.soft_weights_BSK), batch.soft_weights_BSK.roll(1, 1)
                ),
            )
        return replace(batch, noised_BS=shifted_inputs(batch.noised_BS, self.bos_id, document_BS))
