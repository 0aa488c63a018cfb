"""Memory of one micro-batch, tensor by tensor: what autograd keeps of it, and what its backward needs beside.

A model is a row of pieces in the order of forward. Every piece keeps something until its backward, which needs some
more for a moment. Backward goes through the pieces from the last to the first, so the memory at a piece is what the
pieces up to it keep, plus what this one needs: `highest` finds the piece where that is most. Each function below is one
piece of `megadiff.models.specs` or of the output layer, and names its tensors in the order in which they come to be.

Letters are those of docs/notation.md. On one rank: T rows of a micro-batch (divided over context-parallel ranks), T'
rows between the matrices (divided over tensor-parallel ranks too, under sequence parallelism), n heads, g key-value
heads, f feed-forward width, W vocabulary columns, e bytes of an element.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from megadiff.models.conditioning import NUM_LEVEL_FEATURES
from megadiff.models.config import DenoiserConfig, padded_vocab_size
from megadiff.parallel.groups import ParallelConfig
from megadiff.parallel.head_loss import MAX_CHUNK_ELEMENTS

FP32 = 4
INT64 = 8


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Sizes of one micro-batch on one rank."""

    rows: int
    """T."""
    rows_between: int
    """T'."""
    hidden: int
    heads: int
    groups: int
    head_size: int
    ffn: int
    is_gated: bool
    normalises_queries: bool
    """And keys."""
    columns: int
    """W."""
    element: int
    """Bytes of an element of the model's type: 2 or 4."""
    context: int
    """Ranks over which keys and values are gathered."""
    tensor: int
    """Ranks that share the matrices."""

    @classmethod
    def of(
        cls, config: DenoiserConfig, parallel: ParallelConfig, *, num_tokens: int, vocab_size: int, element: int
    ) -> Shard:
        """Divide a model and a micro-batch of S·B = `num_tokens` tokens over a layout."""
        tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
        rows = num_tokens // cp
        return cls(
            rows=rows,
            rows_between=rows // tp if parallel.sequence_parallel else rows,
            hidden=config.hidden_size,
            heads=config.num_attention_heads // tp,
            groups=config.query_groups // tp,
            head_size=config.head_size,
            ffn=config.ffn_size // tp,
            is_gated=config.is_gated,
            normalises_queries=config.qk_layernorm,
            columns=padded_vocab_size(vocab_size) // tp,
            element=element,
            context=cp,
            tensor=tp,
        )

    @property
    def is_fp32(self) -> bool:
        return self.element == FP32

    @property
    def divides_rows(self) -> bool:
        """Whether sequence parallelism divides the rows between the matrices."""
        return self.rows_between < self.rows

    @property
    def residual(self) -> int:
        """Bytes of the residual stream at one place, e·T'·H; also of its gradient."""
        return self.element * self.rows_between * self.hidden

    @property
    def gathered(self) -> int:
        """Bytes of all rows of the residual stream, e·T·H."""
        return self.element * self.rows * self.hidden


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A part of the model, in bytes."""

    name: str
    kept: int
    """From forward to backward."""
    working: int = 0
    """What backward needs beside all that is kept by this piece and those before it; what it has released by then
    counts against it."""
    component: Literal["activations", "logits"] = "activations"


@dataclass(frozen=True, kw_only=True)
class Moment:
    """Where in backward memory is highest."""

    name: str
    activations: int
    logits: int
    working: int

    @property
    def total(self) -> int:
        return self.activations + self.logits + self.working


def kept(pieces: Iterable[Piece]) -> int:
    """Bytes that the pieces keep between forward and backward."""
    return sum(piece.kept for piece in pieces)


def highest(pieces: Sequence[Piece]) -> Moment:
    """The moment of one micro-batch's backward at which its memory is highest."""
    moments, so_far = [], {"activations": 0, "logits": 0}
    for piece in pieces:
        so_far[piece.component] += piece.kept
        moments.append(Moment(name=piece.name, working=piece.working, **so_far))
    return max(moments, key=lambda moment: moment.total)


def _norm_kept(shard: Shard, elements: int, rows: int) -> int:
    """x·scale and the scale of each row, fp32; of bf16 inputs also x in fp32, which fp32 inputs are themselves."""
    in_fp32 = 0 if shard.is_fp32 else FP32 * elements
    return in_fp32 + FP32 * elements + FP32 * rows


def _norm_working(elements: int) -> int:
    """The gradient in fp32, and its products with gain and normalised input."""
    return 3 * FP32 * elements


def _residual_norm(shard: Shard) -> tuple[int, int]:
    """Bytes that a norm of the residual stream keeps (with its output, which the next matrix reads), and works with."""
    elements = shard.rows_between * shard.hidden
    return _norm_kept(shard, elements, shard.rows_between) + shard.residual, _norm_working(elements)


def _matrix_working(shard: Shard, inputs: int, outputs: int, *, divided_outputs: bool) -> int:
    """Backward of a product with a matrix, [T, inputs] to [T, outputs] on this rank.

    The gradients of its output (gathered, where the rows of the output are divided), of its input, and of the matrix.
    """
    gathered = shard.element * shard.rows * outputs if not divided_outputs or shard.divides_rows else 0
    return gathered + shard.element * (shard.rows * inputs + inputs * outputs)


def attention_pieces(shard: Shard, *, recompute_core: bool) -> list[Piece]:
    """From the norm's output to the residual stream: q k v, their norms and rotary phases, attention, projection."""
    e, rows, size = shard.element, shard.rows, shard.head_size
    query, key = rows * shard.heads * size, rows * shard.groups * size
    qkv_columns = (shard.heads + 2 * shard.groups) * size

    # Values are a part of what qkv returns, and keep all of it; under context parallelism they are copied, but fp32
    # norms of queries and keys read their inputs there.
    values_are_gathered = shard.context > 1 and not recompute_core
    norms_read_it = shard.is_fp32 and shard.normalises_queries
    qkv = 0 if values_are_gathered and not norms_read_it else e * rows * qkv_columns
    # Queries of a group lie apart in it, unless there is one: the norm reads a copy.
    query_copy = e * query if shard.is_fp32 and shard.heads != shard.groups else 0
    norms = query_copy + _norm_kept(shard, query + key, rows * (shard.heads + shard.groups))
    query_and_key_norms = Piece(name="query and key norms", kept=norms, working=_norm_working(query + key))
    gathered = 2 * e * shard.context * key
    # What attention reads; recomputed, what it gives phases to, which are views of qkv where no norm has read them.
    read = e * query + (gathered if values_are_gathered else e * key)
    if recompute_core and not shard.normalises_queries:
        read = e * query if shard.heads != shard.groups else 0
    output, log_sum_exp = e * query, FP32 * rows * shard.heads
    gradients = e * (2 * query + 2 * key) + (gathered if shard.context > 1 else 0)
    phased = e * query + (gathered if shard.context > 1 else e * key)
    again = log_sum_exp + output + phased if recompute_core else 0
    return [
        Piece(name="qkv", kept=qkv, working=_matrix_working(shard, shard.hidden, qkv_columns, divided_outputs=False)),
        *[query_and_key_norms] * shard.normalises_queries,
        # Gradients without phases, beside those with, in place of what attention has read, and that of the values.
        Piece(name="phases of queries and keys", kept=read, working=e * (query + 2 * key)),
        # What attention returns is what the projection reads: kept once.
        Piece(
            name="core attention",
            kept=output + (0 if recompute_core else log_sum_exp),
            working=gradients + again,
        ),
        Piece(
            name="attention projection",
            kept=0,
            working=_matrix_working(shard, shard.heads * size, shard.hidden, divided_outputs=True),
        ),
    ]


def mlp_piece(shard: Shard, *, recompute: bool) -> Piece:
    """From the norm's output to the residual stream, in tensors of f columns.

    The first product is kept, and its squared ReLU, which the second matrix reads. Backward of that matrix makes two
    gradients; when squared ReLU makes one more, what the matrix has read is released.

    Of a gated layer, both halves of the first product are kept, and what comes of them. When backward makes two
    gradients from one, what came of them has been released; unless compiled, it makes each by itself before it joins
    them. Backward of the first matrix, which may be the largest by far, comes when everything has been released.
    """
    wide = shard.element * shard.rows * shard.ffn
    second_matrix = _matrix_working(shard, shard.ffn, shard.hidden, divided_outputs=True)
    if shard.is_gated:
        held = 3 * wide
        first_matrix = _matrix_working(shard, shard.hidden, 2 * shard.ffn, divided_outputs=False)
        working = max(4 * wide, second_matrix, first_matrix - held)
    else:
        held, working = 2 * wide, second_matrix
    again = held + shard.residual if recompute else 0  # its output too, though nobody reads it again
    return Piece(name="feed-forward", kept=0 if recompute else held, working=again + working)


def layer_pieces(shard: Shard, parallel: ParallelConfig, *, input_is_held: bool) -> list[Piece]:
    """The pieces of one layer without full recompute.

    Args:
        input_is_held: whether somebody keeps the layer's input in any case. Its norm keeps fp32 inputs, copies others.
    """
    selected = parallel.recompute_modules if parallel.recompute_granularity == "selective" else ()
    norm, norm_working = _residual_norm(shard)
    stream = shard.residual if shard.is_fp32 else 0
    branches = [
        Piece(name="input norm", kept=norm, working=norm_working),
        *attention_pieces(shard, recompute_core="core_attn" in selected),
        Piece(name="middle of the layer", kept=stream),
        Piece(name="feed-forward norm", kept=norm, working=norm_working),
        mlp_piece(shard, recompute="mlp" in selected),
    ]
    return [
        Piece(name="layer input", kept=shard.residual if input_is_held else stream, working=shard.residual),
        # The gradient of the residual stream waits for that of the branch.
        *(replace(piece, working=shard.residual + piece.working) for piece in branches),
    ]


def _recomputed(shard: Shard, layers: Sequence[Piece]) -> Piece:
    """Layers of which the input alone is kept, and everything else, the output too, is made anew in backward."""
    moment = highest(layers)
    # The total holds the input, which is kept anyway, but not the output, which is as large: one stands for the other.
    return Piece(name=f"{moment.name}, recomputed", kept=shard.residual, working=moment.total)


def transformer_pieces(
    shard: Shard, parallel: ParallelConfig, *, num_layers: int, input_is_received: bool
) -> list[Piece]:
    """The layers of one (virtual) pipeline stage, under the recompute that the layout asks for.

    Args:
        input_is_received: from another stage; Megatron keeps it, to read its gradient.
    """
    # Cosines and sines of half a head, made once in fp32 for all layers.
    pieces = [Piece(name="rotary phases", kept=FP32 * shard.rows * shard.head_size)]
    if parallel.recompute_granularity != "full":
        for layer in range(num_layers):
            pieces += layer_pieces(shard, parallel, input_is_held=input_is_received and layer == 0)
        return pieces

    unit_is_layer = parallel.recompute_method == "block"
    unit = 1 if unit_is_layer else parallel.recompute_num_layers
    recomputed = min(num_layers, parallel.recompute_num_layers) if unit_is_layer else num_layers
    for start in range(0, recomputed, unit):
        size = min(unit, recomputed - start)
        layers = [piece for index in range(size) for piece in layer_pieces(shard, parallel, input_is_held=index == 0)]
        pieces.append(_recomputed(shard, layers))
    for _ in range(recomputed, num_layers):
        pieces += layer_pieces(shard, parallel, input_is_held=False)
    return pieces


def embedding_piece(shard: Shard) -> Piece:
    """Ids in, residual stream out; backward makes a dense gradient of the rank's rows of the table."""
    return Piece(
        name="embedding",
        kept=INT64 * shard.rows,
        working=shard.residual + 2 * shard.gathered + shard.element * shard.columns * shard.hidden,
    )


def conditioning_piece(shard: Shard) -> Piece:
    """Noise levels in, added to the residual stream: features, both sides of SiLU; in backward their gradients, too.

    Levels and embedded tokens have the stream's gradient in common, and the MLP's gradient is the stream's.
    """
    features = shard.element * shard.rows_between * NUM_LEVEL_FEATURES
    matrix = shard.element * shard.hidden * shard.hidden
    return Piece(
        name="noise levels", kept=features + 2 * shard.residual, working=shard.residual + max(shard.residual, matrix)
    )


def final_norm_piece(shard: Shard, *, output_is_kept: bool) -> Piece:
    """The norm before the output layer, which may keep what the norm returns, to multiply with it in backward."""
    norm, working = _residual_norm(shard)
    stream = shard.residual if shard.is_fp32 else 0
    output = 0 if output_is_kept else shard.residual
    return Piece(name="final norm", kept=stream + norm - output, working=working + shard.residual)


def _row_bytes(rows: int) -> int:
    """Numbers of rows that the loss reads: two ids, five fp32 numbers, a flag; and the three it returns."""
    return rows * (2 * INT64 + 5 * FP32 + 1 + 3 * FP32)


def head_pieces(shard: Shard) -> list[Piece]:
    """Output layer and loss: logits become their own gradient where they lie; then three gradients of the product."""
    logits = shard.element * shard.rows * shard.columns
    matrix = shard.element * shard.columns * shard.hidden
    divided = shard.residual if shard.divides_rows else 0
    return [
        final_norm_piece(shard, output_is_kept=True),
        Piece(
            name="head",
            kept=logits + _row_bytes(shard.rows),
            working=shard.gathered + divided + matrix,
            component="logits",
        ),
    ]


def fused_head_pieces(shard: Shard) -> list[Piece]:
    """Output layer and loss in one, on all rows (masked noise may leave up to all of them active).

    Kept are the gradients of hidden states and matrix. A chunk's logits and hidden states (a copy without those of rows
    that do not count) come and go, while the norm's output is still there. Several chunks sum the matrix's gradient in
    fp32, of which the kept one is a rounded copy.
    """
    e, hidden = shard.element, shard.hidden
    most_rows = max(1, MAX_CHUNK_ELEMENTS // shard.columns)
    num_chunks = -(-shard.rows // most_rows)
    chunk_rows = -(-shard.rows // num_chunks)
    matrix = shard.columns * hidden
    chunk = e * chunk_rows * (shard.columns + hidden)
    sums = FP32 * matrix if num_chunks > 1 and not shard.is_fp32 else 0
    gathered = shard.gathered if shard.divides_rows else 0
    return [
        final_norm_piece(shard, output_is_kept=False),
        Piece(
            name="fused head",
            kept=shard.gathered + e * matrix + _row_bytes(shard.rows),
            working=shard.residual + gathered + chunk + sums,
            component="logits",
        ),
    ]
