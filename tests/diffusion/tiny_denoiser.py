"""A causal-or-not transformer in float64 that obeys attention layouts, small enough to run on everything there is."""

from __future__ import annotations

import torch
from torch import Tensor

from megadiff.diffusion import AttentionLayout, NoisedBatch

HEADS, SIZE, LAYERS = 2, 4, 2


class TinyDenoiser:
    """Two layers with rotary phases and random weights; logits [B, S, V]."""

    def __init__(self, vocab_size: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        width = HEADS * SIZE

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64, generator=generator) / shape[0] ** 0.5

        self.embedding = draw(vocab_size, width) * vocab_size**0.5
        self.layers = [(draw(width, 3 * width), draw(width, width), draw(width, width)) for _ in range(LAYERS)]
        self.head = draw(width, vocab_size) * 2

    def __call__(self, ids_BS: Tensor, position_BS: Tensor, visible_BQK: Tensor) -> Tensor:
        x = self.embedding[ids_BS]
        for in_projection, out_projection, mlp in self.layers:
            query, key, value = (
                part.unflatten(-1, (HEADS, SIZE)).transpose(1, 2) for part in (x @ in_projection).chunk(3, dim=-1)
            )
            scores = rotated(query, position_BS) @ rotated(key, position_BS).mT
            weights = scores.masked_fill(~visible_BQK[:, None], -torch.inf).softmax(-1)
            x = x + (weights @ value).transpose(1, 2).flatten(2) @ out_projection
            x = x + torch.tanh(x @ mlp)
        return x @ self.head

    def on(self, batch: NoisedBatch) -> Tensor:
        """Logits of a noised batch."""
        return self(batch.noised_BS, batch.position_BS, visible(batch.layout, batch.noised_BS.shape[1]))


def rotated(x_BHSD: Tensor, position_BS: Tensor) -> Tensor:
    """Apply rotary phases."""
    angle = position_BS[:, None, :, None] * torch.tensor([1.0, 0.3], dtype=torch.float64)
    a, b = x_BHSD.chunk(2, dim=-1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)


def causal(size: int) -> Tensor:
    """Every place sees itself and those before it, bool [1, S, S]."""
    return torch.ones(1, size, size, dtype=torch.bool).tril()


def visible(layout: AttentionLayout, size: int) -> Tensor:
    """Any layout as a tensor, bool [B or 1, S, S]."""
    if not layout.is_plain:
        return layout.visible_BQK
    return causal(size) if layout.kind == "causal" else torch.ones(1, size, size, dtype=torch.bool)
