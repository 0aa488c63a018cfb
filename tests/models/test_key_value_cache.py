"""Cached decoding: every call's logits are those of a model that reads everything anew, as in training."""

from __future__ import annotations

import pytest
import torch
from distributed import run_ranks
from torch import Tensor

VOCAB, MASK, BOS, LENGTH, BLOCK, SEED = 40, 3, 1, 12, 4, 5


def compare_calls(kind: str, alpha_0: float) -> tuple[Tensor, int, float]:
    """Sample with a decoder whose every call is checked against an uncached one.

    Returns:
        The sample, the number of calls, and the largest difference of logits.
    """
    from megadiff.diffusion import (
        AttentionLayout,
        DiffusionProcess,
        MaskedMixing,
        NoiseSchedule,
        autoregressive_sample,
        block_diffusion_sample,
        eso_lm_sample,
    )
    from megadiff.models.config import DenoiserConfig
    from megadiff.models.denoiser import Denoiser
    from megadiff.models.key_value_cache import CachedDecoder
    from megadiff.models.whole import WholeDenoiser
    from megadiff.parallel import groups as parallel_groups

    groups = parallel_groups.initialize(parallel_groups.ParallelConfig())
    sizes = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2}
    config = DenoiserConfig(**sizes, init_std=0.3, log_snr_conditioning=kind == "blocks")
    denoiser = Denoiser(config, groups, vocab_size=VOCAB, sequence_length=LENGTH, seed=SEED)
    with torch.no_grad():
        for i, parameter in enumerate(denoiser.parameters()):  # the head starts at zero
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
    decoder = CachedDecoder(WholeDenoiser([denoiser], groups, VOCAB))
    kept = torch.zeros(2, 2, 0, dtype=torch.int64)  # ids and positions
    differences = []

    def uncached(new: Tensor, num_kept: int, log_snr_BQ: Tensor | None) -> Tensor:
        """Logits of the new places, from the layout of training."""
        (ids, position), size = torch.cat([kept, new], dim=2), kept.shape[2] + new.shape[2]
        if kind != "blocks":
            return denoiser(ids, position, AttentionLayout("causal")).transpose(0, 1)[:, -new.shape[2] :, :VOCAB]
        # The doubled sequence; of the clean half, only blocks before the one in work may matter.
        start = kept.shape[2] + num_kept
        noised, clean = torch.full((2, 2, LENGTH), 7)
        noised[:, start:size], clean[:, :start] = ids[:, start:], ids[:, :start]
        place = torch.arange(2 * LENGTH)
        layout = AttentionLayout("block_diffusion", block_size=BLOCK, query_Q=place, key_K=place)
        assert log_snr_BQ is not None
        log_snr = torch.full((2, 2 * LENGTH), 9.0)  # of the clean half, and of a prompt in the block
        log_snr[:, max(start, 5) : size] = log_snr_BQ[0, -1]
        both_ids, position = torch.cat([noised, clean], dim=1), (place % LENGTH).expand(2, -1)
        logits = denoiser(both_ids, position, layout, log_snr_BS=log_snr).transpose(0, 1)
        both = torch.cat([logits[:, LENGTH + kept.shape[2] : LENGTH + start], logits[:, start:size]], dim=1)
        return both[..., :VOCAB]

    @torch.no_grad()
    def checked(
        ids_BQ: Tensor, position_BQ: Tensor, block_Q: Tensor, num_kept: int, log_snr_BQ: Tensor | None = None
    ) -> Tensor:
        nonlocal kept
        new = torch.stack([ids_BQ, position_BQ])
        expected = uncached(new, num_kept, log_snr_BQ)
        logits = decoder(ids_BQ, position_BQ, block_Q, num_kept, log_snr_BQ)
        differences.append((logits - expected).abs().max().item())
        kept = torch.cat([kept, new[:, :, :num_kept]], dim=2)
        return logits

    canvas = torch.tensor([[9, 8, 7, 6, 5, *[0] * 7], [5, 6, 7, 8, 9, *[0] * 7]])
    fixed = (torch.arange(LENGTH) < 5).expand(2, LENGTH)
    ids = {"vocab_size": VOCAB, "mask_id": MASK}
    if kind == "autoregressive":
        tokens = autoregressive_sample(checked, canvas, fixed, SEED, bos_id=BOS, **ids)
    elif kind == "eso_lm":
        tokens = eso_lm_sample(checked, canvas, fixed, SEED, 4, alpha_0=alpha_0, **ids)
    else:
        process = DiffusionProcess(NoiseSchedule(), MaskedMixing(VOCAB, MASK))
        tokens = block_diffusion_sample(checked, process, canvas, fixed, SEED, 3, block_size=BLOCK)
    assert torch.equal(tokens[fixed], canvas[fixed])
    parallel_groups.shutdown()
    return tokens, len(differences), max(differences)


@pytest.mark.parametrize(
    "kind, alpha_0, num_calls",
    [
        ("autoregressive", 0.0, [7]),
        ("eso_lm", 1.0, range(2, 5)),
        ("eso_lm", 0.5, range(3, 8)),
        ("eso_lm", 0.0, [7]),
        ("blocks", 0.0, [6]),
    ],
)
def test_cached_logits_are_uncached_logits(kind: str, alpha_0: float, num_calls: list[int]) -> None:
    tokens, calls, difference = run_ranks(1, compare_calls, kind, alpha_0)[0]
    assert calls in num_calls and difference < 1e-5
    assert not (tokens == MASK).any()
