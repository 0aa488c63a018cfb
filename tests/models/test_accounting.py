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
from megadiff.models.config import DenoiserConfig
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
    flops = flops_per_token(CONFIG, VOCAB, 100)
    assert flops.total == 3 * (4 * (2 * matrices + attention) + 2 * 2048 * 48)
    assert flops.head + flops.padding == 6 * 2048 * 48 and flops.head == 6 * VOCAB * 48
    conditioned = flops_per_token(CONDITIONED, VOCAB, 100)
    assert conditioned.total - flops.total == conditioned.conditioning == 6 * (128 * 48 + 48 * 48)
    assert (flops * 2).total == 2 * flops.total


def sized(num_layers: int, hidden_size: int, num_heads: int) -> DenoiserConfig:
    return DenoiserConfig(num_layers=num_layers, hidden_size=hidden_size, num_attention_heads=num_heads)


@pytest.mark.parametrize(
    "layers, width, heads, published",
    [
        (8, 512, 8, 2.517e8),
        (12, 768, 12, 7.361e8),
        (20, 1536, 12, 4.152e9),
        (18, 3072, 24, 1.359e10),
        (34, 4608, 36, 5.583e10),
    ],
)
def test_operations_without_head_are_those_of_the_first_study(
    layers: int, width: int, heads: int, published: float
) -> None:
    flops = flops_per_token(sized(layers, width, heads), 131_072, 2048)
    assert flops.without_head == 72 * layers * width**2 + 12 * layers * width * 2048
    assert flops.without_head == pytest.approx(published, rel=3e-4)


@pytest.mark.parametrize(
    "layers, width, heads, published, steps",
    [
        (6, 256, 4, 5.303e10, {6e18: 147_333}),
        (12, 768, 12, 4.494e11, {1e19: 28_973}),
        (18, 896, 14, 8.292e11, {6e18: 9_421}),
        (20, 1024, 16, 1.1669e12, {3e19: 33_475}),
        (21, 1408, 11, 2.2326e12, {6e19: 34_992}),
        (28, 2176, 17, 6.8054e12, {1e20: 19_133}),
    ],
)
def test_operations_without_attention_are_those_of_the_second_study(
    layers: int, width: int, heads: int, published: float, steps: dict[float, int]
) -> None:
    """Forward, of 2048 tokens, whose published counts also hold normalisations and a time embedding: up to 0.3 %."""
    flops = flops_per_token(sized(layers, width, heads), 32_001, 2048)
    assert flops.without_attention == 6 * (12 * layers * width**2 + 32_001 * width)
    of_modulation = 256 * 128 + 128**2 + 128 * (6 * width * layers + 2 * width)  # once per sequence; not in our model
    multiplications = 2048 * flops.without_attention // 6 + of_modulation
    assert 2 * multiplications == pytest.approx(published, rel=3e-3)
    if width in (256, 2176):
        assert multiplications == pytest.approx({256: 26.4427e9, 2176: 3.4009e12}[width], rel=2e-5)
    for compute, published_steps in steps.items():
        assert compute / (6 * multiplications * 256) == pytest.approx(published_steps, rel=3e-3)
