"""What every objective's settings have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

from megadiff.diffusion import DiffusionProcess, Objective
from megadiff.fields import require, require_choices

MaskFeature = Literal["causal", "documents", "permuted documents", "clean prefix", "look-ahead", "block diffusion"]
"""What an attention mask has beyond letting every position see every position."""


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The ids that objectives know by name."""

    size: int
    """V: real ids, the mask among them."""
    mask_id: int
    bos_id: int
    eos_id: int
    pad_id: int


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig(ABC):
    """Base of the settings of an objective."""

    name: str
    """Which objective this is: what `--objective` takes."""
    random_length_fraction: float = 0.0
    """Share of the training samples that are cut to a random length (uniform in 1 to L), so that the model meets short
    texts; published is 0.01. The rest of such a sample is neither seen nor counted."""

    def __post_init__(self) -> None:
        require_choices(self, "objective")
        require(
            0.0 <= self.random_length_fraction <= 1.0,
            "objective.random_length_fraction",
            self.random_length_fraction,
            "lie in [0, 1]",
        )

    @abstractmethod
    def build(self, vocabulary: Vocabulary) -> Objective:
        """The objective over a vocabulary."""

    def process(self, vocabulary: Vocabulary) -> DiffusionProcess:
        """The noise process, for previews and for samplers that reverse it.

        Raises:
            ValueError: The objective has none.
        """
        raise ValueError(f"objective {self.name} has no noise process to show or to reverse: choose another one")

    @property
    def cutting(self) -> dict[str, float]:
        """Shares of what may push the end of a sample out, by setting."""
        return {"random_length_fraction": self.random_length_fraction}

    @property
    def gives_log_snr(self) -> bool:
        """Whether every position has a noise level that the model can be conditioned on."""
        return True

    @property
    def shifts_inputs(self) -> bool:
        """Whether the model reads every noised token one place later (`megadiff.diffusion.shifted_inputs`)."""
        return False

    def model_length(self, num_tokens: int) -> int:
        """S, the model's sequence length for samples of L = `num_tokens` tokens."""
        return num_tokens

    def mask_features(self, *, documents: bool, prompts: bool) -> frozenset[MaskFeature]:
        """What the attention masks of a run have.

        Args:
            documents: whether attention is confined to documents.
            prompts: whether samples begin with given context.
        """
        return frozenset({"documents"} if documents or self.random_length_fraction > 0 else ())
