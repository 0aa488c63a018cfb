"""One micro-batch, from clean tokens to the sums that the loss and the bound are made of.

The only place where the noise process, the denoiser and the vocabulary-parallel loss meet. It knows no formulas and
no files: the objective builds the noised batch, the denoiser predicts, `vocab_loss` compares (or `head_loss` does both
at once), and Megatron's schedules run the pieces over pipeline stages.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from megadiff.data.loader import Batch
from megadiff.diffusion import NoisedBatch, Objective, Rows, Samples, document_numbers
from megadiff.parallel.batch import broadcast_batch, context_parallel_index, context_parallel_order
from megadiff.parallel.groups import Groups
from megadiff.parallel.head_loss import HeadLoss, head_loss
from megadiff.parallel.vocab_loss import vocab_loss
from megadiff.training.observed import observed_sums

VALIDATION_SEED = 0
"""Seed of validation samples and noise; not the run's, so that all runs are measured alike."""

LossClosure = Callable[[Tensor | HeadLoss], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class DenoisingStep:
    """Everything one micro-batch needs that does not change from step to step."""

    objective: Objective
    groups: Groups
    vocab_size: int
    mask_id: int
    token_bytes_V: Tensor
    """Bytes of text that each id stands for, for bits per byte."""
    sequence_length: int
    micro_batch_size: int
    seed: int
    fused_head_loss: bool = False
    """Whether the output layer computes losses of rows with weight rather than logits of all."""
    has_prompts: bool = False
    """Whether samples begin with context that is given, as in fine-tuning."""
    hides_padding: bool = False
    """Whether samples end with tokens that are neither given nor counted, which no other token may see."""
    document_end_id: int | None = None
    """Id that ends a document, where attention and positions are confined to documents; None: samples are one."""
    on_micro_batch: Callable[[], None] | None = None
    """Called when a micro-batch has been read: a sign of life."""

    @cached_property
    def _index_S(self) -> Tensor | None:
        """Places in the model's sequence of the positions that this rank holds, on the host; None: all of them."""
        cp = self.groups.cp
        if cp.size() == 1:
            return None
        return context_parallel_index(self.objective.sequence_length(self.sequence_length), cp.rank(), cp.size())

    def noised_batch(self, batch: Batch, *, validation: bool) -> NoisedBatch:
        """Noise a micro-batch; the same on tensor-parallel peers and pipeline stages.

        Context-parallel ranks noise whole samples, so that nothing depends on who holds what, and keep their positions.

        Args:
            batch: with tokens where this rank reads the data, ordinals alone on its tensor-parallel peers.
        """
        tokens_BL, counted_BL, given_BL = broadcast_batch(
            (batch.tokens_BL, batch.loss_mask_BL, batch.given_BL) if self.groups.tp.rank() == 0 else None,
            batch_size=self.micro_batch_size,
            sequence_length=self.sequence_length,
            groups=self.groups,
        )
        document_BL = None
        if self.document_end_id is not None:
            document_BL = document_numbers(tokens_BL, self.document_end_id)
        elif self.hides_padding:
            document_BL = (~(counted_BL | given_BL)).long()
        samples = Samples(
            tokens_BL=tokens_BL,
            counted_BL=counted_BL,
            ordinal_B=batch.ordinal_B,
            given_BL=given_BL if self.has_prompts else None,
            document_BL=document_BL,
        )
        seed = VALIDATION_SEED if validation else self.seed
        whole = self.objective.noised_batch(samples, seed, validation=validation)
        if self._index_S is None:
            return whole
        order_S = context_parallel_order(whole.noised_BS.shape[1], self.groups.cp.size())
        return whole.divided(self._index_S.to(samples.device), order_S.to(samples.device))

    def _head_loss(self, batch: Batch, rows: Rows, validation: bool, hidden_SBH: Tensor, weight_WH: Tensor) -> HeadLoss:
        """What the output layer computes instead of logits, on the last pipeline stage.

        How many rows have weight follows from the ordinals, which every rank has on the host: nobody asks the device,
        which is busy with the layers meanwhile.
        """
        seed = VALIDATION_SEED if validation else self.seed
        active_rows = self.objective.count_active_rows(
            batch.ordinal_B, self.sequence_length, seed, validation=validation, index_S=self._index_S
        )
        return head_loss(
            hidden_SBH,
            weight_WH,
            rows,
            vocab_size=self.vocab_size,
            mask_id=self.mask_id,
            tp_group=self.groups.tp,
            sequence_parallel=self.groups.config.sequence_parallel,
            active_rows=active_rows,
        )

    def _noised_batches(self, evaluate: bool, batches: Iterator[Batch]) -> Iterator[tuple[Batch, NoisedBatch]]:
        for batch in batches:
            if self.on_micro_batch:
                self.on_micro_batch()
            yield batch, self.noised_batch(batch, validation=evaluate)

    def _forward_step(
        self, evaluate: bool, batches: Iterator[tuple[Batch, NoisedBatch]], model: nn.Module
    ) -> tuple[Tensor | HeadLoss, LossClosure]:
        """Megatron's forward step: the model's output and the closure that turns it into a loss and what is logged."""
        batch, noised = next(batches)
        head = partial(self._head_loss, batch, noised.rows, evaluate) if self.fused_head_loss else None
        output = model(
            noised.noised_BS,
            noised.position_BS,
            noised.layout,
            head,
            log_snr_BS=noised.log_snr_BS,
            soft_ids_BSK=noised.soft_ids_BSK,
            soft_weights_BSK=noised.soft_weights_BSK,
        )
        return output, partial(self._sequence_bounds if evaluate else self._training_loss, noised)

    def _losses(self, rows: Rows, output: Tensor | HeadLoss) -> HeadLoss:
        """Losses of a micro-batch, on the last pipeline stage: from the logits, or as the fused head has them.

        Args:
            rows: flat.
            output: of the model; logits [S, B, W] are overwritten where a gradient is wanted.
        """
        if isinstance(output, HeadLoss):
            return output
        losses = vocab_loss(
            output.flatten(0, 1),
            rows,
            vocab_size=self.vocab_size,
            mask_id=self.mask_id,
            tp_group=self.groups.tp,
            overwrite_logits=True,
        )
        return HeadLoss(torch.where(rows.counted, losses.loss_T, 0.0).sum(), *losses)

    def _training_loss(self, noised: NoisedBatch, output: Tensor | HeadLoss) -> tuple[Tensor, Tensor, Tensor]:
        """(Σ loss, number of counted tokens, `observed_sums`): Megatron divides by the global token count."""
        rows = noised.rows.flat()
        loss, _, kl_T, is_T = self._losses(rows, output)
        log_snr_T = None if noised.log_snr_BS is None else noised.log_snr_BS.t().flatten()
        return loss, rows.counted.sum().int(), observed_sums(loss, rows, kl_T, is_T, log_snr_T)

    def _sequence_bounds(self, noised: NoisedBatch, output: Tensor | HeadLoss) -> tuple[Tensor, Tensor, Tensor]:
        """Logged, fp64 [3, B]: each sequence's Σ NELBO in nats, counted tokens, and bytes of text in them."""
        rows = noised.rows
        flat = rows.flat()
        _, _, kl_T, is_T = self._losses(flat, output)
        nelbo_T = torch.where(flat.counted, flat.elbo_weight * (kl_T + is_T), 0.0).double()
        nelbo_B = nelbo_T.view(rows.target.t().shape).sum(dim=0)
        tokens_B = rows.counted.sum(dim=1)
        bytes_B = torch.where(rows.counted, self.token_bytes_V[rows.target], 0).sum(dim=1)
        return nelbo_T.sum(), tokens_B.sum().int(), torch.stack([nelbo_B, tokens_B.double(), bytes_B.double()])

    def run_micro_batches(
        self,
        chunks: Sequence[nn.Module],
        batches: Iterator[Batch],
        num_micro_batches: int,
        *,
        evaluate: bool = False,
    ) -> list[Tensor]:
        """Run forward (and backward unless evaluating) through the pipeline schedule.

        Args:
            chunks: this rank's virtual stages, in order; all see the same micro-batches, which are noised once.

        Returns:
            The logged tensor of every micro-batch on the last pipeline stage; an empty list elsewhere.
        """
        noised = self._noised_batches(evaluate, itertools.islice(batches, num_micro_batches))
        iterators = list(itertools.tee(noised, len(chunks)))
        schedule = get_forward_backward_func(
            pp_size=self.groups.pp.size(), vp_size=self.groups.config.virtual_pipeline_model_parallel_size
        )
        return schedule(
            forward_step_func=partial(self._forward_step, evaluate),
            data_iterator=iterators if len(chunks) > 1 else iterators[0],
            model=list(chunks),
            num_microbatches=num_micro_batches,
            seq_length=self.objective.sequence_length(self.sequence_length),
            micro_batch_size=self.micro_batch_size,
            forward_only=evaluate,
        )

    def sum_over_context(self, sums: Tensor) -> Tensor:
        """Sum a tensor of the last stages over the ranks that share its samples; others keep theirs."""
        sums = sums.to(self.groups.device)
        if self.groups.is_last_stage and self.groups.cp.size() > 1:
            dist.all_reduce(sums, group=self.groups.cp)
        return sums

    def reduce_over_job(self, sums: Tensor) -> Tensor:
        """Sum a tensor of the last stages over data-parallel ranks and give it to every rank."""
        sums = sums.to(self.groups.device)
        if self.groups.is_last_stage:
            dist.all_reduce(sums, group=self.groups.dp)
        if self.groups.pp.size() > 1:
            dist.broadcast(sums, src=self.groups.last_stage_rank, group=self.groups.pp)
        return sums
