"""What a denoiser costs, counted from its sizes: parameters of a shard, operations of a token.

Formulas only: no tensors and no process groups, so that a model of any size is counted at once, anywhere. Memory of
activations is counted in `megadiff.models.activations`, memory of a whole rank in `megadiff.planning`.

Letters are those of docs/notation.md: S model length, H hidden size, N query heads, G key-value heads, D head size, F
feed-forward width, W vocabulary columns of a rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

from megadiff.models.conditioning import NUM_LEVEL_FEATURES
from megadiff.models.config import DenoiserConfig, padded_vocab_size


def layer_parameters(config: DenoiserConfig, tensor_parallel_size: int = 1, *, fuses_norms: bool = False) -> list[int]:
    """Elements of each parameter of one layer on one tensor-parallel rank, in the order of the modules.

    Matrices are divided, gains are not: two of the residual stream, two of queries and keys where those are normalised.

    Args:
        fuses_norms: the norms of the residual stream are in linear_qkv and linear_fc1, as in Transformer Engine's.
    """
    hidden, tp = config.hidden_size, tensor_parallel_size
    query, key_value = config.num_attention_heads * config.head_size, config.query_groups * config.head_size
    norm, projection = hidden, query * hidden // tp  # input_layernorm, linear_proj
    return [
        *((projection, norm) if fuses_norms else (norm, projection)),
        hidden * (query + 2 * key_value) // tp,  # linear_qkv
        *[config.head_size, config.head_size] * config.qk_layernorm,  # q_layernorm, k_layernorm
        hidden,  # pre_mlp_layernorm
        (1 + config.is_gated) * hidden * config.ffn_size // tp,  # linear_fc1
        config.ffn_size * hidden // tp,  # linear_fc2
    ]


def conditioning_parameters(config: DenoiserConfig) -> list[int]:
    """Elements of each parameter of the noise level's embedding, which tensor-parallel ranks do not divide."""
    if not config.log_snr_conditioning:
        return []
    hidden = config.hidden_size
    return [NUM_LEVEL_FEATURES * hidden, hidden, hidden * hidden, hidden]  # matrix and bias of linear_1, of linear_2


def chunk_parameters(
    config: DenoiserConfig,
    vocab_size: int,
    tensor_parallel_size: int,
    *,
    num_layers: int,
    has_embedding: bool,
    has_head: bool,
    fuses_norms: bool = False,
) -> list[int]:
    """Elements of each parameter of one (virtual) pipeline stage on one tensor-parallel rank, in order.

    Embedding and head, which share nothing, have a row for every id of the padded vocabulary; noise levels are embedded
    where the tokens are, and the final norm is where the head is. For `fuses_norms` see `layer_parameters`.
    """
    outer = padded_vocab_size(vocab_size) * config.hidden_size // tensor_parallel_size
    layers = layer_parameters(config, tensor_parallel_size, fuses_norms=fuses_norms) * num_layers
    embedding = [outer, *conditioning_parameters(config)]
    return embedding * has_embedding + layers + [config.hidden_size, outer] * has_head


def total_parameters(config: DenoiserConfig, vocab_size: int) -> int:
    """Parameters of the whole model, padded rows of embedding and head among them."""
    whole = chunk_parameters(config, vocab_size, 1, num_layers=config.num_layers, has_embedding=True, has_head=True)
    return sum(whole)


def buffer_elements(
    parameters: Sequence[int], *, distributed_optimizer: bool, data_parallel_size: int, bucket_size: int | None
) -> int:
    """Elements of the buffer in which Megatron's DDP keeps the gradients of some parameters.

    With the distributed optimizer, parameters start at multiples of 64 elements, and buckets end at multiples of the
    number of ranks that share the buffer, and of 128.

    Args:
        data_parallel_size: ranks that share the buffer, data x context.
        bucket_size: elements from which on a bucket is full; None is one bucket.

    Source: `_ParamAndGradBuffer` of Megatron-Core 0.16.1.
    """
    if not distributed_optimizer:
        return sum(parameters)
    bucket_multiple = math.lcm(data_parallel_size, 128)
    bucket_start = end = 0
    for size in reversed(parameters):
        end = _round_up(end, 64) + size
        if bucket_size is not None and end - bucket_start >= bucket_size:
            bucket_start = end = _round_up(end, bucket_multiple)
    return _round_up(end, bucket_multiple)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@dataclass(frozen=True, kw_only=True)
class TokenFlops:
    """Floating-point operations of one token, forward and backward, by what they are for; recomputation not counted.

    Publications count different sums of these, and exponents of laws in one do not hold in another.
    """

    layers: int
    """Products with the matrices of the layers."""
    attention: int
    """Queries with keys, and probabilities with values: the full square, whatever the mask hides."""
    head: int
    """Columns of the head that are ids."""
    padding: int
    """Columns of the head that pad the vocabulary; computed, too."""
    conditioning: int
    """Embedding of the noise level."""

    @property
    def total(self) -> int:
        """All that is computed."""
        return self.layers + self.attention + self.head + self.padding + self.conditioning

    @property
    def without_head(self) -> int:
        """Layers and attention: the count of von Rütte et al. (arXiv 2512.10858), 72·layers·H² + 12·layers·H·S."""
        return self.layers + self.attention

    @property
    def without_attention(self) -> int:
        """Layers and head: the count of Sahoo et al. (arXiv 2602.15014), for causal and bidirectional models alike."""
        return self.layers + self.head

    def __mul__(self, positions: int) -> TokenFlops:
        return TokenFlops(**{field.name: positions * getattr(self, field.name) for field in fields(self)})


def flops_per_token(config: DenoiserConfig, vocab_size: int, sequence_length: int) -> TokenFlops:
    """Operations of one position of the model's sequence.

    A product with a matrix of P elements is 2·P operations forward and twice that backward. Every position attends to
    all S, so attention is 4·S·N·D a layer forward. Causal models are often counted with half of it: the two are not
    comparable. Looking up an embedding costs nothing.

    Args:
        sequence_length: S, what the model sees.
    """
    matrices = sum(size for size in layer_parameters(config) if size > config.hidden_size)
    attention = 2 * sequence_length * config.num_attention_heads * config.head_size
    padding = padded_vocab_size(vocab_size) - vocab_size
    return TokenFlops(
        layers=6 * config.num_layers * matrices,
        attention=6 * config.num_layers * attention,
        head=6 * vocab_size * config.hidden_size,
        padding=6 * padding * config.hidden_size,
        conditioning=6 * sum(size for size in conditioning_parameters(config) if size > config.hidden_size),
    )
