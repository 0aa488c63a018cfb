"""Text from a checkpoint, by reversing the diffusion process.

One process holds the whole denoiser, whatever layout trained it; it is the training one, so what is sampled is what was
trained.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megadiff.data.tokenizer import Tokenizer
from megadiff.diffusion import AttentionLayout, DiffusionProcess, ancestral_sample
from megadiff.fields import flag, require
from megadiff.models.denoiser import Denoiser


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """How text is written."""

    prompt: str = ""
    """Text that the sample starts with; it is kept as it is."""
    length: int = 128
    """Tokens of the canvas, the prompt included."""
    num_denoising_steps: int = 128
    """Calls of the denoiser; more steps, better text."""
    num_samples: int = 1
    """Samples to write."""
    temperature: float = 1.0
    """Divides the logits."""
    seed: int = 1234
    """Same seed, same text."""

    def __post_init__(self) -> None:
        for name in ("length", "num_denoising_steps", "num_samples"):
            require(getattr(self, name) >= 1, f"--{flag(name)}", getattr(self, name), "be at least 1")


def generate(
    config: GenerateConfig,
    denoiser: Denoiser,
    process: DiffusionProcess,
    tokenizer: Tokenizer,
    *,
    progress: Callable[[int, Tensor], None] | None = None,
) -> list[str]:
    """Write `config.num_samples` texts, prompt included, each up to its end of document.

    Args:
        denoiser: the whole model on this rank.
        progress: called after every denoising step with (finished steps, ids [B, L]).

    Raises:
        ValueError: the prompt leaves no room on the canvas.
    """
    prompt = tokenizer.encode(config.prompt)
    if len(prompt) >= config.length:
        raise ValueError(
            f"the prompt has {len(prompt)} tokens, but the canvas has room for {config.length}: raise --length"
        )
    vocab_size = process.mixing.vocab_size
    device = denoiser.inverse_frequency_D.device
    canvas_BL = torch.zeros(config.num_samples, config.length, dtype=torch.int64, device=device)
    canvas_BL[:, : len(prompt)] = torch.tensor(prompt, dtype=torch.int64, device=device)
    fixed_BL = (torch.arange(config.length, device=device) < len(prompt)).expand_as(canvas_BL)
    position_BL = torch.arange(config.length, device=device).expand_as(canvas_BL)

    def denoise(noised_BL: Tensor, log_snr: Tensor) -> Tensor:
        log_snr_BL = torch.where(fixed_BL, process.schedule.max_log_snr, log_snr)  # the prompt is clean
        logits_LBW = denoiser(noised_BL, position_BL, AttentionLayout(), log_snr_BS=log_snr_BL)
        return logits_LBW[..., :vocab_size].transpose(0, 1)

    tokens_BL = ancestral_sample(
        denoise,
        process,
        canvas_BL,
        fixed_BL,
        config.seed,
        config.num_denoising_steps,
        temperature=config.temperature,
        excluded_ids=(tokenizer.bos_id, tokenizer.pad_id, tokenizer.unk_id),
        progress=progress,
    )
    return [tokenizer.decode(_until_end(ids, tokenizer.eos_id)) for ids in tokens_BL.tolist()]


def _until_end(ids: list[int], eos_id: int) -> list[int]:
    return ids[: ids.index(eos_id)] if eos_id in ids else ids
