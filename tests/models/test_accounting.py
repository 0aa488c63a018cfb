"""Parameters and operations counted from sizes, against models that are built and sums done by hand."""

from __future__ import annotations

import dataclasses

import pytest
from distributed import run_ranks

from megadiff.models.accounting import (
    buffer_elements,
    chunk_parameters,
    flops_per_token,
    layer_parameters,
    total_parameters,
)
from megadiff.models.denoiser import DenoiserConfig
from megadiff.parallel.groups import ParallelConfig

VOCAB = 1500
CONFIG = DenoiserConfig(num_layers=4, hidden_size=48, num_attention_heads=6, num_query_groups=2, ffn_hidden_size=80)
INTERLEAVED = ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)


CONDITIONED = dataclasses.replace(CONFIG, log_snr_conditioning=True)
GATED = dataclasses.replace(CONFIG, activation="swiglu", qk_layernorm=False)


def built(config: DenoiserConfig, parallel: ParallelConfig) -> list[tuple[list[int], int, int]]:
    """Of each chunk of this rank: elements of its parameters, and of Megatron's buffers without and with sharding."""
    from megadiff.models.denoiser import build_denoiser
    from megadiff.parallel import groups as parallel_groups
    from megadiff.training.chunks import wrap_chunks

    groups = parallel_groups.initialize(parallel)
    denoisers = build_denoiser(config, groups, vocab_size=VOCAB, sequence_length=8, seed=1)
    sizes = [[parameter.numel() for parameter in denoiser.parameters()] for denoiser in denoisers]
    buffers = []
    for sharded in (False, True):
        chunks = wrap_chunks(
            denoisers, dataclasses.replace(parallel, use_distributed_optimizer=sharded), before_reduction=lambda: None
        )
        buffers.append([sum(buffer.numel for buffer in chunk.buffers) for chunk in chunks])
    return list(zip(sizes, *buffers, strict=True))


def built_on_layouts(
    cases: list[tuple[DenoiserConfig, ParallelConfig]],
) -> list[list[tuple[list[int], int, int]]]:
    from megadiff.parallel import groups as parallel_groups

    results = [built(config, layout) for config, layout in cases]
    parallel_groups.shutdown()
    return results


def test_parameters_and_buffers_are_those_of_models_that_are_built() -> None:
    tp2 = ParallelConfig(tensor_model_parallel_size=2)
    cases = [(CONDITIONED, tp2), (GATED, tp2), (CONDITIONED, INTERLEAVED), (CONDITIONED, ParallelConfig())]
    for rank, (tensor, gated, interleaved, data) in enumerate(run_ranks(2, built_on_layouts, cases)):
        whole = {"num_layers": 4, "has_embedding": True, "has_head": True}
        for config, tp, dp, chunks, places in (
            (CONDITIONED, 2, 1, tensor, [whole]),
            (GATED, 2, 1, gated, [whole]),
            (CONDITIONED, 1, 2, data, [whole]),
            (
                *(CONDITIONED, 1, 1, interleaved),
                [
                    {"num_layers": 1, "has_embedding": rank == 0, "has_head": False},
                    {"num_layers": 1, "has_embedding": False, "has_head": rank == 1},
                ],
            ),
        ):
            assert len(chunks) == len(places)
            for (sizes, plain, sharded), place in zip(chunks, places, strict=True):
                counted = chunk_parameters(config, VOCAB, tp, **place)
                assert counted == sizes
                for distributed, elements in ((False, plain), (True, sharded)):
                    assert elements == buffer_elements(
                        counted, distributed_optimizer=distributed, data_parallel_size=dp, bucket_size=None
                    )


def test_eighty_five_million_parameters_are_those_between_embedding_and_head() -> None:
    config = DenoiserConfig(num_layers=12, hidden_size=768, num_attention_heads=12)
    between = total_parameters(config, 32768) - 2 * 32768 * 768
    assert between == 12 * (12 * 768**2 + 2 * 768 + 2 * 64) + 768
    assert between == pytest.approx(85e6, rel=1e-3)


def test_buckets_end_at_multiples_of_what_shares_them() -> None:
    # Reversed: 100 fills a bucket of 100, padded to 640 = lcm(5, 128); 70 and 60 begin at multiples of 64: one more.
    assert (
        buffer_elements([60, 70, 100], distributed_optimizer=True, data_parallel_size=5, bucket_size=100) == 640 + 640
    )


def test_operations_count_the_full_square_of_attention() -> None:
    matrices = sum(size for size in layer_parameters(CONFIG) if size > 48)
    assert matrices == 48 * (48 + 2 * 16) + 48 * 48 + 2 * 48 * 80
    attention = 2 * 2 * 100 * 48  # of each token: 100 products of queries and keys, 100 of probabilities and values
    head = 2048 * 48
    assert flops_per_token(CONFIG, VOCAB, 100) == 3 * (4 * (2 * matrices + attention) + 2 * head)
    conditioning = 2 * (128 * 48 + 48 * 48)
    assert flops_per_token(CONDITIONED, VOCAB, 100) == flops_per_token(CONFIG, VOCAB, 100) + 3 * conditioning
