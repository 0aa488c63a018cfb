"""A denoiser that answers for whole sequences, whatever layout, kernels and precision train it.

Training divides positions over ranks, wants lengths that divide, and may compute by kernels that know no cache or round
to FP8. A sampler asks for one place as well as for all. So what it asks is another model of the same parameters:
Megatron's own layers over whole sequences, on the tensor-parallel ranks and pipeline stages that hold them.

Shapes: B samples, S places of a call, H hidden size, W = columns of this rank, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from torch import Tensor

from megadiff.models.config import DenoiserConfig
from megadiff.models.denoiser import Denoiser, build_denoiser
from megadiff.models.weights import canonical_shards, named_shards
from megadiff.parallel.groups import Groups
from megadiff.parallel.imagined import META, OnMeta


class WholeDenoiser:
    """A denoiser that is asked on every rank of one copy of the model, and answers on each."""

    def __init__(self, denoisers: Sequence[Denoiser], groups: Groups, vocab_size: int) -> None:
        """Ask these.

        Args:
            denoisers: this rank's virtual stages, in order; neither sequence nor context parallel.
            vocab_size: V, the real ids.
        """
        self._denoisers, self._groups, self._vocab_size = denoisers, groups, vocab_size

    @property
    def device(self) -> torch.device:
        """Where ids are read and logits returned."""
        return self._groups.device

    @torch.no_grad()
    def __call__(self, noised_BS: Tensor, position_BS: Tensor, layout: Any, log_snr_BS: Tensor | None = None) -> Tensor:
        """Predict clean tokens; a collective of tensor-parallel ranks and pipeline stages.

        Args:
            noised_BS: ids, int64; those of the first rank count, for a GPU may draw another token than its peer where
                sums in another order decide.
            position_BS: place of each id in its document, int64.
            layout: who may see whom, an `AttentionLayout` or a `CachedAttention`.
            log_snr_BS: noise levels, for denoisers that are conditioned on them.

        Returns:
            Logits [B, S, V].
        """
        groups = self._groups
        if groups.mp.size() > 1:
            noised_BS = noised_BS.clone(memory_format=torch.contiguous_format)
            # broadcast over the copy, [B, S] int64
            dist.broadcast(noised_BS, src=dist.get_global_rank(groups.mp, 0), group=groups.mp)
        output = None
        for index, denoiser in enumerate(self._denoisers):
            for stage in range(groups.pp.size()):
                is_last = index == len(self._denoisers) - 1 and stage == groups.pp.size() - 1
                if stage == groups.pp.rank():
                    denoiser.set_input_tensor(output)
                    output = denoiser(noised_BS, position_BS, layout, log_snr_BS=log_snr_BS)
                else:
                    output = self._room_for_output(denoiser, noised_BS, is_last)
                if groups.pp.size() > 1:
                    # broadcast over pp, [S, B, H], of the last stage [S, B, W]: the next one needs it, the last all
                    dist.broadcast(output, src=dist.get_global_rank(groups.pp, stage), group=groups.pp)
        assert output is not None
        logits_SBV = gather_from_tensor_model_parallel_region(output, group=groups.tp)[..., : self._vocab_size]
        return logits_SBV.transpose(0, 1)

    def _room_for_output(self, denoiser: Denoiser, noised_BS: Tensor, is_last: bool) -> Tensor:
        """Memory for what a stage elsewhere computes."""
        config = denoiser.config
        width = denoiser.vocab_size // self._groups.tp.size() if is_last else config.hidden_size
        return torch.empty(*noised_BS.t().shape, width, dtype=config.params_dtype, device=self.device)


def undivided(
    config: DenoiserConfig, denoisers: Sequence[Denoiser], groups: Groups, *, vocab_size: int
) -> WholeDenoiser:
    """Another model of the same parameters, not of copies, that takes whole sequences; no collective.

    It lives as long as these parameters stay where they are, and computes in their precision. Context-parallel ranks
    hold all of them: each answers without the others.

    Args:
        config: what `denoisers` were built with.
        denoisers: this rank's part of the model that is trained.
        vocab_size: V, the real ids.
    """
    layout = dataclasses.replace(groups.config, sequence_parallel=False, context_parallel_size=1)
    with OnMeta():  # there is no memory for parameters of its own, and no need of any
        others = build_denoiser(
            config,
            dataclasses.replace(groups, config=layout, device=META),
            vocab_size=vocab_size,
            sequence_length=denoisers[0].max_sequence_length,
            seed=0,
            dtype=denoisers[0].config.params_dtype,
        )
    for other, denoiser in zip(others, denoisers, strict=True):
        held = {shard.key: shard.data for shard in canonical_shards(denoiser)}
        for name, shard in named_shards(other):
            module, _, attribute = name.rpartition(".")
            setattr(other.get_submodule(module), attribute, held[shard.key])
        other.inverse_frequency_P = denoiser.inverse_frequency_P
        other.eval()
    return WholeDenoiser(others, groups, vocab_size)
