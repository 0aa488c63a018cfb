"""Who may attend to whom, said as a value instead of an L x L tensor.

The layout travels with the batch to the core attention, which picks a kernel for it: `plain` layouts are modes of every
attention kernel, the others are masks, built where they are used from one rule, `visible`. Further layouts (a clean
prefix, doubled sequences, blocks, permuted orders) become further kinds here, with the few numbers each of them needs.

Shapes: B samples, S the whole sequence, Q queries and K keys of this rank. Under context parallelism a rank has the
queries of some places only, and receives keys in the order of its group, not of the sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Literal

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask


@dataclass(frozen=True, eq=False)
class AttentionLayout:
    """The visibility rule of one model call.

    Raises:
        ValueError: If the kind is unknown.
    """

    kind: Literal["bidirectional", "causal"] = "bidirectional"
    """`bidirectional`: every position sees every position; `causal`: itself and those before it."""
    document_BS: Tensor | None = None
    """Number of the document at every position, int64: positions see their own document only. None: all are one."""
    query_Q: Tensor | None = None
    """Places in the sequence of this rank's queries, int64; None: all, in order."""
    key_K: Tensor | None = None
    """Places in the sequence of the keys as they arrive, int64; None: all, in order."""

    def __post_init__(self) -> None:
        if self.kind not in ("bidirectional", "causal"):
            raise ValueError(f"kind must be 'bidirectional' or 'causal', got {self.kind!r}; pick one of the two.")

    def divided(self, query_Q: Tensor, key_K: Tensor) -> AttentionLayout:
        """Return the same rule for a rank with the queries of these places and keys in this order."""
        return replace(self, query_Q=query_Q, key_K=key_K)

    @property
    def is_plain(self) -> bool:
        """Whether `kind` says it all, so that an attention kernel needs no mask."""
        return self.document_BS is None and (self.kind == "bidirectional" or self.query_Q is None)

    def visible(self, sample: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Tell which queries see which keys, bool, of the broadcast shape.

        Args:
            sample, query, key: int64 indices of this rank's samples, queries and keys, of shapes that broadcast.
        """
        if self.query_Q is not None:
            query = self.query_Q[query]
        if self.key_K is not None:
            key = self.key_K[key]
        seen = query >= key if self.kind == "causal" else torch.ones_like(query >= key)
        if self.document_BS is None:
            return seen
        return seen & (self.document_BS[sample, query] == self.document_BS[sample, key])

    @cached_property
    def visible_BQK(self) -> Tensor:
        """The rule of a layout that is not plain as a tensor, bool; made once for all layers of a model call.

        B is 1 where all samples have the same rule.
        """
        sample, query, key = (torch.arange(size, device=self._device) for size in self._shape)
        return self.visible(sample[:, None, None], query[:, None], key).expand(self._shape)

    @cached_property
    def document_bounds(self) -> Tensor:
        """Where documents begin in the samples laid out one after another, and where the last ends, int32.

        Made once for all layers of a model call, because the device has to be asked how many documents there are.
        """
        assert self.document_BS is not None
        starts_BS = torch.ones_like(self.document_BS, dtype=torch.bool)
        starts_BS[:, 1:] = self.document_BS[:, 1:] != self.document_BS[:, :-1]
        begin_D = starts_BS.flatten().nonzero().flatten().int()
        return torch.cat([begin_D, begin_D.new_full((1,), self.document_BS.numel())])

    @cached_property
    def block_mask(self) -> BlockMask:
        """The rule of a layout that is not plain as blocks of keys that blocks of queries may skip, for FlexAttention.

        Made once for all layers of a model call; on GPUs without ever holding the rule as a tensor.
        """
        create = _compiled_create_block_mask() if self._device.type == "cuda" else create_block_mask
        num_samples, num_queries, num_keys = self._shape
        return create(
            lambda sample, head, query, key: self.visible(sample, query, key),
            B=num_samples,
            H=None,
            Q_LEN=num_queries,
            KV_LEN=num_keys,
            device=self._device,
        )

    @property
    def _shape(self) -> tuple[int, int, int]:
        """B, Q and K of a layout that is not plain."""
        num_keys = self._some_tensor.shape[-1]
        return (
            1 if self.document_BS is None else self.document_BS.shape[0],
            num_keys if self.query_Q is None else self.query_Q.shape[0],
            num_keys,
        )

    @property
    def _device(self) -> torch.device:
        return self._some_tensor.device

    @property
    def _some_tensor(self) -> Tensor:
        """One whose last dimension is that of the keys: a layout that is not plain has one."""
        found = self.document_BS if self.document_BS is not None else self.key_K
        assert found is not None
        return found


@cache
def _compiled_create_block_mask() -> Callable[..., BlockMask]:
    return torch.compile(create_block_mask)


def document_numbers(tokens_BL: Tensor, end_id: int) -> Tensor:
    """Number the documents of each sample from 0, int64 [B, L]; a document ends with its end-of-document token.

    Args:
        tokens_BL: Clean ids, int64.
        end_id: Id of the end-of-document token.
    """
    ended_BL = (tokens_BL == end_id).long()
    return ended_BL.cumsum(dim=1) - ended_BL


def positions_in_documents(document_BL: Tensor) -> Tensor:
    """Count positions from 0 in each document, int64 [B, L].

    Args:
        document_BL: Document numbers, int64, that never fall.
    """
    place_BL = torch.arange(document_BL.shape[1], device=document_BL.device).expand_as(document_BL)
    is_first_BL = torch.ones_like(document_BL, dtype=torch.bool)
    is_first_BL[:, 1:] = document_BL[:, 1:] != document_BL[:, :-1]
    return place_BL - torch.where(is_first_BL, place_BL, 0).cummax(dim=1).values
