"""Who may attend to whom, said as a value instead of an L x L tensor.

The layout travels with the batch to the core attention, which picks a kernel for it: `plain` layouts are modes of every
attention kernel, the others are masks, built where they are used from one rule, `visible`. A rule is a kind and what
narrows it:

    bidirectional      every position sees every position
    causal             itself and those before it, or a few further ones while a causal model is turned into a
                       bidirectional one; over a permuted sequence, those before it in the permutation
    block diffusion    [noised | clean], each L long in blocks: a noised block sees itself and the clean blocks before
                       it; a clean block sees itself and the clean blocks before it

    documents          positions see their own document only
    given              clean context sees clean context only, so that it can be computed once for all levels

Shapes: B samples, S the whole sequence, Q queries and K keys of this rank. Under context parallelism a rank has the
queries of some places only, and receives keys in the order of its group, not of the sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

LayoutKind = Literal["bidirectional", "causal", "block_diffusion"]


@dataclass(frozen=True, eq=False)
class AttentionLayout:
    """The visibility rule of one model call.

    Raises:
        ValueError: If the kind is unknown, or a setting belongs to another kind.
    """

    kind: LayoutKind = "bidirectional"
    """The rule without what narrows it."""
    document_BS: Tensor | None = None
    """Number of the document at every position, int64: positions see their own document only. None: all are one."""
    given_BS: Tensor | None = None
    """Whether a position is clean context, bool; such a position sees only such. None: none is."""
    lookahead_B: Tensor | None = None
    """Causal: how many positions after itself each position of a sample sees, int64. None: none."""
    block_size: int | None = None
    """Block diffusion: positions of a block."""
    query_Q: Tensor | None = None
    """Places in the sequence of this rank's queries, int64; None: all, in order."""
    key_K: Tensor | None = None
    """Places in the sequence of the keys as they arrive, int64; None: all, in order."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(LayoutKind):
            raise ValueError(f"kind must be one of {', '.join(get_args(LayoutKind))}, got {self.kind!r}; pick one.")
        if (self.kind == "block_diffusion") != (self.block_size is not None):
            raise ValueError(f"block_size is {self.block_size} with kind {self.kind!r}; it belongs to block_diffusion.")
        if self.lookahead_B is not None and self.kind != "causal":
            raise ValueError(f"lookahead_B widens causal attention, got kind {self.kind!r}; leave it None.")
        if not self.is_plain and all(x is None for x in (self.document_BS, self.given_BS, self.key_K)):
            raise ValueError(f"a layout of kind {self.kind!r} that is a mask needs a length; give key_K and query_Q.")

    def divided(self, query_Q: Tensor, key_K: Tensor) -> AttentionLayout:
        """Return the same rule for a rank with the queries of these places and keys in this order."""
        return replace(self, query_Q=query_Q, key_K=key_K)

    @property
    def is_plain(self) -> bool:
        """Whether `kind` says it all, so that an attention kernel needs no mask."""
        narrowed = any(x is not None for x in (self.document_BS, self.given_BS, self.lookahead_B))
        return not narrowed and (self.kind == "bidirectional" or (self.kind == "causal" and self.query_Q is None))

    def visible(self, sample: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Tell which queries see which keys, bool, of the broadcast shape.

        Args:
            sample, query, key: int64 indices of this rank's samples, queries and keys, of shapes that broadcast.
        """
        if self.query_Q is not None:
            query = self.query_Q[query]
        if self.key_K is not None:
            key = self.key_K[key]
        seen = self._seen_by_kind(sample, query, key)
        if self.given_BS is not None:
            seen = seen & (self.given_BS[sample, key] | ~self.given_BS[sample, query])
        if self.document_BS is not None:
            seen = seen & (self.document_BS[sample, query] == self.document_BS[sample, key])
        return seen

    def _seen_by_kind(self, sample: Tensor, query: Tensor, key: Tensor) -> Tensor:
        if self.kind == "bidirectional":
            return torch.ones_like(query >= key)
        if self.kind == "causal":
            return key <= (query if self.lookahead_B is None else query + self.lookahead_B[sample])
        assert self.block_size is not None
        half = self._some_tensor.shape[-1] // 2
        query_block, key_block = (query % half) // self.block_size, (key % half) // self.block_size
        query_is_clean, key_is_clean = query >= half, key >= half
        own = (query_block == key_block) & (query_is_clean == key_is_clean)
        return own | ((key_block < query_block) & key_is_clean)

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
        num_rules, num_queries, num_keys = self._shape
        return create(
            lambda sample, head, query, key: self.visible(sample, query, key),
            B=num_rules,
            H=None,
            Q_LEN=num_queries,
            KV_LEN=num_keys,
            device=self._device,
        )

    @property
    def _shape(self) -> tuple[int, int, int]:
        """B (1 where all samples have the same rule), Q and K of a layout that is not plain."""
        of_samples = [x for x in (self.document_BS, self.given_BS, self.lookahead_B) if x is not None]
        num_keys = self._some_tensor.shape[-1]
        return (
            of_samples[0].shape[0] if of_samples else 1,
            num_keys if self.query_Q is None else self.query_Q.shape[0],
            num_keys,
        )

    @property
    def _device(self) -> torch.device:
        return self._some_tensor.device

    @property
    def _some_tensor(self) -> Tensor:
        """One whose last dimension is that of the keys: a layout that is not plain has one."""
        return next(x for x in (self.document_BS, self.given_BS, self.key_K) if x is not None)


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
