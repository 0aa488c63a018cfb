"""Who may attend to whom, said as a value instead of an L x L tensor.

The layout travels with the batch to the core attention, which picks a kernel for it. Further layouts (a clean
prefix, doubled sequences, blocks, permuted orders) become further kinds here, with the few numbers each of
them needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class AttentionLayout:
    """The visibility rule of one model call.

    Raises:
        ValueError: If the kind is unknown.
    """

    kind: Literal["bidirectional", "causal"] = "bidirectional"
    """`bidirectional`: every position sees every position; `causal`: itself and those before it."""

    def __post_init__(self) -> None:
        if self.kind not in ("bidirectional", "causal"):
            raise ValueError(f"kind must be 'bidirectional' or 'causal', got {self.kind!r}; pick one of the two.")
