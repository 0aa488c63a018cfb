"""Settings of objectives that predict every token at its place with attention in both directions.

Those are the ones that autoregressive weights can be adapted to: what such weights are used to can be kept, the slots
of the inputs for good and the attention in the beginning.
"""

from __future__ import annotations

from dataclasses import dataclass

from megadiff.diffusion import AnnealedObjective, Objective, ShiftedObjective
from megadiff.fields import require
from megadiff.objectives.base import MaskFeature, ObjectiveConfig, Vocabulary


@dataclass(frozen=True, kw_only=True)
class InPlaceObjectiveConfig(ObjectiveConfig):
    """Base of the settings of objectives that predict in place."""

    shift_inputs: bool = False
    """Let the model read every noised token one place later, behind a begin token, as autoregressive models read: for
    runs that begin with the weights of one (training.init_from)."""
    attention_annealing_samples: int = 0
    """Samples of the training stream over which attention grows from causal to bidirectional, place by place; 0 is
    bidirectional from the first."""

    def __post_init__(self) -> None:
        super().__post_init__()
        samples = self.attention_annealing_samples
        require(samples >= 0, "objective.attention_annealing_samples", samples, "be at least 0 (0: none)")

    def adapted(self, objective: Objective, vocabulary: Vocabulary) -> Objective:
        """An objective as these settings have it."""
        if self.attention_annealing_samples:
            objective = AnnealedObjective(objective, self.attention_annealing_samples)
        if self.shift_inputs:
            objective = ShiftedObjective(objective, vocabulary.bos_id)
        return objective

    @property
    def shifts_inputs(self) -> bool:
        return self.shift_inputs

    def mask_features(self, *, documents: bool, prompts: bool) -> frozenset[MaskFeature]:
        """What the attention masks of a run have; see `ObjectiveConfig.mask_features`."""
        features = super().mask_features(documents=documents, prompts=prompts)
        return features | {"causal", "look-ahead"} if self.attention_annealing_samples else features
