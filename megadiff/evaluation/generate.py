"""Text from a checkpoint, by the sampler of its objective.

The modules are those of training, so what is sampled is what was trained: in one process, which opens checkpoints of
any layout, or by the ranks that train it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megadiff.data.tokenizer import Tokenizer
from megadiff.diffusion import (
    AttentionLayout,
    ancestral_sample,
    autoregressive_sample,
    block_diffusion_sample,
    eso_lm_sample,
    shifted_inputs,
)
from megadiff.fields import flag, require
from megadiff.models.key_value_cache import CachedDecoder
from megadiff.models.whole import WholeDenoiser
from megadiff.objectives import AutoregressiveConfig, BlockDiffusionConfig, EsoLmConfig, ObjectiveConfig, Vocabulary


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """How text is written."""

    prompt: str = ""
    """Text that the sample starts with; it is kept as it is."""
    length: int = 128
    """Tokens of the canvas, the prompt included."""
    num_denoising_steps: int = 128
    """Calls of the denoiser; more steps, better text. Autoregressive models make one per token whatever this is,
    Eso-LM at most this many by diffusion; block diffusion divides them over its blocks, at least one for each."""
    num_samples: int = 1
    """Samples to write."""
    temperature: float = 1.0
    """Divides the logits."""
    renewal: float = 0.0
    """Share of every denoising step that guesses tokens and noises them anew, so that the model can mend what it wrote
    too early; needs many steps. 0 is ancestral sampling. Not for models that keep what they have written
    (autoregressive, Eso-LM)."""
    seed: int = 1234
    """Same seed, same text."""

    def __post_init__(self) -> None:
        for name in ("length", "num_denoising_steps", "num_samples"):
            require(getattr(self, name) >= 1, f"--{flag(name)}", getattr(self, name), "be at least 1")
        require(0 <= self.renewal <= 1, "--renewal", self.renewal, "lie in [0, 1]")


def generate(
    config: GenerateConfig,
    denoiser: WholeDenoiser,
    objective: ObjectiveConfig,
    vocabulary: Vocabulary,
    tokenizer: Tokenizer,
    *,
    trained_on_prompts: bool = False,
    progress: Callable[[int, Tensor], None] | None = None,
) -> list[str]:
    """Write `config.num_samples` texts, prompt included, each up to its end of document.

    Args:
        denoiser: the model; all ranks that it is divided over write the same.
        objective: what it was trained for, over `vocabulary`.
        trained_on_prompts: whether it was fine-tuned, and so knows prompts as the objective's masks have them.
        progress: called after calls of the denoiser with (finished calls, ids [B, L]).

    Raises:
        ValueError: the prompt leaves no room on the canvas, or the objective has no sampler.
    """
    prompt = tokenizer.encode(config.prompt)
    if len(prompt) >= config.length:
        raise ValueError(
            f"the prompt has {len(prompt)} tokens, but the canvas has room for {config.length}: raise --length"
        )
    device = denoiser.device
    canvas_BL = torch.zeros(config.num_samples, config.length, dtype=torch.int64, device=device)
    canvas_BL[:, : len(prompt)] = torch.tensor(prompt, dtype=torch.int64, device=device)
    fixed_BL = (torch.arange(config.length, device=device) < len(prompt)).expand_as(canvas_BL)
    settings = {
        "canvas_BL": canvas_BL,
        "fixed_BL": fixed_BL,
        "seed": config.seed,
        "temperature": config.temperature,
        "excluded_ids": (tokenizer.bos_id, tokenizer.pad_id, tokenizer.unk_id),
        "progress": progress,
    }
    features = objective.mask_features(documents=False, prompts=trained_on_prompts)
    layout = AttentionLayout(given_BS=fixed_BL if "clean prefix" in features else None)
    tokens_BL = _sample(config, denoiser, objective, vocabulary, layout, settings)
    return [tokenizer.decode(_until_end(ids, tokenizer.eos_id)) for ids in tokens_BL.tolist()]


def _sample(
    config: GenerateConfig,
    denoiser: WholeDenoiser,
    objective: ObjectiveConfig,
    vocabulary: Vocabulary,
    layout: AttentionLayout,
    settings: dict[str, Any],
) -> Tensor:
    """Write a canvas by the sampler that belongs to the objective; int64 [B, L].

    Args:
        layout: of objectives whose models read the whole canvas.
        settings: what all samplers have in common.

    Raises:
        ValueError: tokens are to change that the sampler keeps.
    """
    steps = config.num_denoising_steps
    ids: dict[str, Any] = {"vocab_size": vocabulary.size, "mask_id": vocabulary.mask_id}
    decoder = CachedDecoder(denoiser)
    match objective:
        case AutoregressiveConfig() | EsoLmConfig() if config.renewal > 0:
            raise ValueError(
                f"--renewal is {config.renewal:g}, but objective {objective.name} keeps every token that it has "
                "written: leave it 0"
            )
        case AutoregressiveConfig():
            return autoregressive_sample(decoder, bos_id=vocabulary.bos_id, **ids, **settings)
        case EsoLmConfig(alpha_0=alpha_0):
            return eso_lm_sample(decoder, num_denoising_steps=steps, alpha_0=alpha_0, **ids, **settings)
        case BlockDiffusionConfig(block_size=block_size):
            num_blocks = -(-settings["canvas_BL"].shape[1] // block_size)
            return block_diffusion_sample(
                decoder,
                objective.process(vocabulary),
                num_denoising_steps=-(-steps // num_blocks),
                block_size=block_size,
                renewal=config.renewal,
                **settings,
            )
        case _:
            process, fixed_BL = objective.process(vocabulary), settings["fixed_BL"]
            position_BL = torch.arange(fixed_BL.shape[1], device=fixed_BL.device).expand_as(fixed_BL)

            def denoise(noised_BL: Tensor, log_snr: Tensor) -> Tensor:
                log_snr_BL = torch.where(fixed_BL, process.schedule.max_log_snr, log_snr)  # the prompt is clean
                inputs_BL = shifted_inputs(noised_BL, vocabulary.bos_id) if objective.shifts_inputs else noised_BL
                return denoiser(inputs_BL, position_BL, layout, log_snr_BL)

            return ancestral_sample(denoise, process, num_denoising_steps=steps, renewal=config.renewal, **settings)


def _until_end(ids: list[int], eos_id: int) -> list[int]:
    return ids[: ids.index(eos_id)] if eos_id in ids else ids
