"""Output layer and row loss in one, on active rows only, without ever holding the logits of a micro-batch.

Rows of zero weight need no logits: under masked noise they are half of all. The others go through the head in chunks;
a chunk's logits are made in one buffer, become their own gradient there, and are multiplied into the gradients of
hidden states and weight before the next chunk takes their place:

    logits         = hidden·Wᵀ                   GEMM, one chunk
    loss, gradient = sharded_row_loss(logits)    the gradient over the logits; at most two collectives per chunk
    grad_hidden    = gradient·W                  GEMM
    grad_weight   += gradientᵀ·hidden            GEMM, summed in fp32

These are the three GEMMs of the plain path and nothing is computed twice, because the differentiable result is a
single number, Σ loss: forward knows both gradients up to the factor that backward receives. Kept from forward to
backward are grad_hidden of the active rows and grad_weight, both in the type of the parameters, in place of hidden
states and logits. Over tensor-parallel ranks, grad_hidden is reduced once, not once per chunk.

Memory beyond that does not grow with T·W: one chunk of logits, hidden states of a chunk, and with several chunks the
fp32 sum of the weight's gradient (on a CPU in 16 bits one product of its size more).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor
from torch.autograd.function import once_differentiable

from megadiff import ops
from megadiff.ops import RowTargets
from megadiff.parallel.vocab_loss import check_shards, refuse_second_backward, row_targets, sharded_row_loss

if TYPE_CHECKING:
    from megadiff.diffusion.rows import Rows

MAX_CHUNK_ELEMENTS = 2**29
"""Logits of a chunk: 4096 rows of a vocabulary of 131 072, 1 GiB in bf16.

Each chunk reads and writes the fp32 sum of the weight's gradient, 8 bytes for 6·rows operations. By roofline a Hopper
GPU moves them in the time of some 300 rows' products: of 1024 rows that would be over a quarter, of these it is 7 %.
"""


class HeadLoss(NamedTuple):
    """Loss of a micro-batch and of its rows in nats, in fp32; only the first is differentiable."""

    loss: Tensor
    """Σ loss over counted rows, a scalar."""
    loss_T: Tensor
    kl_T: Tensor
    is_T: Tensor


@dataclass(frozen=True, kw_only=True)
class _ChunkedHead:
    """The head on the selected rows of a micro-batch, chunk by chunk."""

    index_A: Tensor | None
    """Which rows are selected, each at most once; None: all, in order."""
    targets: RowTargets
    """Of the selected rows, [A]."""
    any_uniform_mass: bool
    vocab_size: int
    mask_id: int
    tp_group: dist.ProcessGroup | None
    reduce_grad_hidden: bool
    """Whether the gradient of the hidden states has still to be summed over `tp_group`."""
    max_chunk_elements: int

    def run(
        self, hidden_TH: Tensor, weight_WH: Tensor, for_hidden: bool, for_weight: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Losses of the selected rows, [3, A], and the gradients of their sum that are wanted, [A, H] and [W, H].

        A row without weight adds exactly nothing to the gradients, whatever its hidden state holds.
        """
        num_rows, num_columns = self.targets.target.shape[0], weight_WH.shape[0]
        most_rows = max(1, self.max_chunk_elements // num_columns)
        num_chunks = max(1, -(-num_rows // most_rows))
        chunk_rows = max(1, -(-num_rows // num_chunks))  # of nearly equal size: no small last chunk

        sum_dtype = torch.promote_types(weight_WH.dtype, torch.float32)
        terms_3A = hidden_TH.new_empty(3, num_rows, dtype=sum_dtype)
        buffer_CW = hidden_TH.new_empty(chunk_rows, num_columns)
        grad_hidden_AH = hidden_TH.new_empty(num_rows, hidden_TH.shape[1]) if for_hidden else None
        # A single chunk needs no sum in higher precision.
        grad_weight_WH = (
            torch.zeros_like(weight_WH, dtype=weight_WH.dtype if num_chunks == 1 else sum_dtype) if for_weight else None
        )
        for start in range(0, num_rows, chunk_rows):
            chunk = slice(start, min(start + chunk_rows, num_rows))
            targets = RowTargets(*(field[chunk] for field in self.targets))
            hidden_CH = hidden_TH[chunk] if self.index_A is None else hidden_TH.index_select(0, self.index_A[chunk])
            hidden_CH = hidden_CH.masked_fill(~targets.active[:, None], 0.0)
            logits_CW = torch.mm(hidden_CH, weight_WH.t(), out=buffer_CW[: hidden_CH.shape[0]])
            terms_3A[:, chunk], gradient_CW = sharded_row_loss(
                logits_CW,
                targets,
                any_uniform_mass=self.any_uniform_mass,
                vocab_size=self.vocab_size,
                mask_id=self.mask_id,
                tp_group=self.tp_group,
                gradient=for_hidden or for_weight,
                overwrite=True,
            )
            if gradient_CW is not None and grad_hidden_AH is not None:
                torch.mm(gradient_CW, weight_WH, out=grad_hidden_AH[chunk])
            if gradient_CW is not None and grad_weight_WH is not None:
                _add_product_(grad_weight_WH, gradient_CW, hidden_CH)
        return terms_3A, grad_hidden_AH, None if grad_weight_WH is None else grad_weight_WH.to(weight_WH.dtype)

    def scattered(self, selected_A: Tensor, num_rows: int, dim: int) -> Tensor:
        """Values of the selected rows among those of all rows, which are 0."""
        if self.index_A is None:
            return selected_A
        shape = list(selected_A.shape)
        shape[dim] = num_rows
        return selected_A.new_zeros(shape).index_copy_(dim, self.index_A, selected_A)


def _add_product_(sum_WH: Tensor, gradient_CW: Tensor, hidden_CH: Tensor) -> None:
    """sum += gradientᵀ·hidden, where the sum may be fp32 and the factors of 16 bits."""
    if sum_WH.dtype == gradient_CW.dtype:
        sum_WH.addmm_(gradient_CW.t(), hidden_CH)
    elif sum_WH.is_cuda:
        torch.addmm(sum_WH, gradient_CW.t(), hidden_CH, out_dtype=sum_WH.dtype, out=sum_WH)
    else:  # no CPU kernel takes both types; products of a chunk are rounded once more
        sum_WH.add_(gradient_CW.t() @ hidden_CH)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TH: Tensor, weight_WH: Tensor, head: _ChunkedHead) -> tuple[Tensor, Tensor]:
        terms_3A, grad_hidden_AH, grad_weight_WH = head.run(hidden_TH, weight_WH, *ctx.needs_input_grad[:2])
        ctx.save_for_backward(grad_hidden_AH, grad_weight_WH)
        ctx.head, ctx.num_rows = head, hidden_TH.shape[0]
        terms_3T = head.scattered(terms_3A, hidden_TH.shape[0], dim=1)
        ctx.mark_non_differentiable(terms_3T)
        return terms_3T[0].sum(), terms_3T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        grad_hidden_AH, grad_weight_WH = ctx.saved_tensors
        refuse_second_backward(ctx)
        for gradient in (grad_hidden_AH, grad_weight_WH):
            if gradient is not None:
                ops.scale_rows_(gradient, grads[0].expand(gradient.shape[0]).contiguous())
        if grad_hidden_AH is None:
            return None, grad_weight_WH, None
        if ctx.head.reduce_grad_hidden:
            # all-reduce SUM over tp, [A, H]
            dist.all_reduce(grad_hidden_AH, group=ctx.head.tp_group)
        return ctx.head.scattered(grad_hidden_AH, ctx.num_rows, dim=0), grad_weight_WH, None


def head_loss(
    hidden_SBH: Tensor,
    weight_WH: Tensor,
    rows: Rows,
    *,
    vocab_size: int,
    mask_id: int,
    tp_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    active_rows: int | None = None,
    max_chunk_elements: int = MAX_CHUNK_ELEMENTS,
) -> HeadLoss:
    """Loss of a micro-batch from the hidden states before the output layer; equal to `vocab_loss` of its logits.

    Backward may pass through the result once: the gradients are scaled in place.

    Args:
        hidden_SBH: [S, B, H] on every rank of `tp_group`, or [S/tp, B, H] with `sequence_parallel`.
        weight_WH: [W, H] local rows of the output layer; rank r holds the ids [r·W, (r+1)·W), those from `vocab_size`
            on are padding.
        rows: fields [B, S], or flat [T] with T = s·B + b; rows that are not counted have no weight here.
        vocab_size: number of real ids, the mask's among them.
        mask_id: id of the mask, which never gets probability.
        tp_group: ranks that share the vocabulary; None where one rank holds it all.
        sequence_parallel: the hidden states are divided over `tp_group`: they are gathered (T·H elements), and their
            gradient is reduced and scattered (T·H), as by Megatron's own output layer, which gathers once more.
        active_rows: upper bound, known on the host, of the rows with weight: only so many are computed, chosen on the
            device by one stable sort of T flags, so that nothing waits for it. None: all rows. A bound that is too
            small makes the loss NaN.
        max_chunk_elements: most logits that exist at a time; at least one row's.

    Returns:
        The loss, and loss, KL and IS per row in nats, fp32 (fp64 for fp64 hidden states); 0 for rows of zero weight.

    Raises:
        ValueError: the number of rows differs from the number of hidden states, or the shards hold fewer columns than
            the vocabulary has.

    Source: arXiv 2512.10858, proposition 1, in the stable form of `megadiff.ops.eager`.
    """
    rows = rows.flat()
    divided = tp_group is not None and tp_group.size() > 1
    if sequence_parallel and divided:
        hidden_SBH = gather_from_sequence_parallel_region(hidden_SBH, group=tp_group)
    hidden_TH = hidden_SBH.flatten(0, 1)
    num_rows = hidden_TH.shape[0]
    if rows.target.shape[0] != num_rows:
        raise ValueError(
            f"rows describe {rows.target.shape[0]} tokens but there are {num_rows} hidden states: both must be of one "
            "micro-batch, and hidden states that are divided over tensor-parallel ranks need sequence_parallel=True"
        )
    check_shards(vocab_size, weight_WH.shape[0], tp_group)

    targets = row_targets(rows)
    targets = targets._replace(
        kl_weight=targets.kl_weight.where(rows.counted, 0.0), is_weight=targets.is_weight.where(rows.counted, 0.0)
    )
    active = targets.active
    index_A = None
    if active_rows is not None and active_rows < num_rows:
        index_A = torch.argsort(~active, stable=True)[:active_rows]
        targets = RowTargets(*(field[index_A] for field in targets))
    head = _ChunkedHead(
        index_A=index_A,
        targets=targets,
        any_uniform_mass=rows.any_uniform_mass,
        vocab_size=vocab_size,
        mask_id=mask_id,
        tp_group=tp_group,
        reduce_grad_hidden=divided and not sequence_parallel,
        max_chunk_elements=max_chunk_elements,
    )
    if torch.is_grad_enabled() and (hidden_TH.requires_grad or weight_WH.requires_grad):
        loss, terms_3T = _HeadLoss.apply(hidden_TH, weight_WH, head)
    else:
        terms_3A, _, _ = head.run(hidden_TH, weight_WH, False, False)
        terms_3T = head.scattered(terms_3A, num_rows, dim=1)
        loss = terms_3T[0].sum()
    if index_A is not None:
        loss = torch.where(active.sum() <= index_A.shape[0], loss, torch.nan)
    return HeadLoss(loss, *terms_3T)
