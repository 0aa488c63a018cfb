"""Texts for the pages that watch a run: what a model writes, and how it came about, as Markdown."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from torch import Tensor

from megadiff.data.tokenizer import Tokenizer
from megadiff.evaluation.generate import GenerateConfig, generate
from megadiff.objectives import ObjectiveConfig, Vocabulary

if TYPE_CHECKING:
    from megadiff.models.whole import WholeDenoiser

NUM_FRAMES = 8


class DenoisingTrace:
    """The first sample on its way from noise to text: what samplers call after their steps, and the frames of it."""

    def __init__(self, tokenizer: Tokenizer, num_steps: int) -> None:
        """Keep `NUM_FRAMES` frames or so of a sampler that makes `num_steps` steps."""
        self._tokenizer = tokenizer
        self._every = max(1, num_steps // NUM_FRAMES)
        self._frames: list[tuple[int, str]] = []

    def __call__(self, num_calls: int, canvas_BL: Tensor) -> None:
        """Keep a frame; see `megadiff.diffusion.ancestral_sample`."""
        if num_calls == 1 or num_calls % self._every == 0:
            self._frames.append((num_calls, self._shown(canvas_BL[0].tolist())))

    def _shown(self, ids: list[int]) -> str:
        """A canvas as text; a mask is `░`."""
        runs = itertools.groupby(ids, key=lambda token: token == self._tokenizer.mask_id)
        # Whole runs are decoded: a character may have its bytes in several tokens.
        return "".join("░" * len(list(run)) if hidden else self._tokenizer.decode(list(run)) for hidden, run in runs)

    @property
    def markdown(self) -> str:
        """All frames, one under the other."""
        return "\n\n".join(f"**call {calls}**\n\n{fenced(text)}" for calls, text in self._frames)


def fenced(text: str) -> str:
    """A text as it is, in Markdown."""
    return "\n".join(f"    {line}" for line in text.splitlines() or [""])


def written_texts(
    config: GenerateConfig,
    denoiser: WholeDenoiser,
    objective: ObjectiveConfig,
    tokenizer: Tokenizer,
    *,
    trained_on_prompts: bool,
) -> dict[str, str]:
    """Write texts and return them, and how the first one came about, as Markdown by name; see `generate`."""
    ids = {name: getattr(tokenizer, name) for name in ("mask_id", "bos_id", "eos_id", "pad_id")}
    trace = DenoisingTrace(tokenizer, config.num_denoising_steps)
    texts = generate(
        config,
        denoiser,
        objective,
        Vocabulary(size=tokenizer.vocab_size, **ids),
        tokenizer,
        trained_on_prompts=trained_on_prompts,
        progress=trace,
    )
    return pages(texts, trace)


def pages(texts: list[str], trace: DenoisingTrace) -> dict[str, str]:
    """Markdown by the name under which it is shown."""
    return {"text/samples": "\n\n---\n\n".join(map(fenced, texts)), "text/denoising": trace.markdown}
