"""What depends on a model's width and depth: initial weights, multipliers of its outputs, and how fast groups learn.

Under `standard` nothing does but the initial spread of the matrices that write into the residual stream, and every size
wants a learning rate of its own. `complete_p` scales so that activations, and what one step changes in them, are of the
same order at any size: settings that were found on a small model are those of a large one.

Factors and nothing else, on the standard library alone: training multiplies by them, exports fold them into weights.

Source: CompleteP, Dey et al. (arXiv 2505.01618), with the constants of arXiv 2512.10858, section 3 and table 5.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

ParametrizationName = Literal["standard", "complete_p"]

BASE_WIDTH = 512
"""Width at which logits are multiplied by 1."""
RESIDUAL_SCALE = 4.0
"""What all branches of one kind, attention or feed-forward, together are multiplied by: each one by this over L."""
INNER_STD = 20.0
"""√H times the initial deviation of the layers' matrices, relative to the embedding's: 0.4 and 0.02 in the paper."""
OUTER_LR = 0.02
"""Learning rate of embedding, head, gains and biases, relative to that of the run."""

HEAD = "output_layer.weight"
RESIDUAL_MATRICES = ("linear_proj.weight", "linear_fc2.weight")
"""How the names of the matrices end that write into the residual stream."""


@dataclass(frozen=True, kw_only=True)
class Scales:
    """Factors on the settings of a model and of its optimizer; see docs/optimizer.md for the table."""

    residual_multiplier: float = 1.0
    """Of what each attention and feed-forward branch adds to the residual stream."""
    logit_multiplier: float = 1.0
    """Of the hidden states before the head, and so of the logits."""
    inner_std: float = 1.0
    """On model.init_std, of matrices of the layers that read the residual stream."""
    residual_std: float = 1.0
    """And of those that write into it."""
    inner_lr: float = 1.0
    """On the learning rate, of the matrices of the layers and of conditioning."""
    outer_lr: float = 1.0
    """Of embedding and head."""
    gain_lr: float = 1.0
    """Of gains and biases."""
    inner_weight_decay: float = 1.0
    """On weight decay, of the groups with these learning rates; gains and biases have none."""
    outer_weight_decay: float = 1.0
    eps: float = 1.0
    """On what is added to the root of the second moment, in all groups."""

    @classmethod
    def of(cls, parametrization: ParametrizationName, *, num_layers: int, hidden_size: int) -> Scales:
        """The factors of a model of this depth L and width H.

        Raises:
            ValueError: there is no such parametrisation.
        """
        if parametrization == "standard":
            return cls(residual_std=1.0 / math.sqrt(2 * num_layers))
        if parametrization == "complete_p":
            return cls(
                residual_multiplier=RESIDUAL_SCALE / num_layers,
                logit_multiplier=BASE_WIDTH / hidden_size,
                inner_std=INNER_STD / math.sqrt(hidden_size),
                residual_std=INNER_STD / math.sqrt(hidden_size),
                inner_lr=1.0 / hidden_size,
                outer_lr=OUTER_LR,
                gain_lr=OUTER_LR,
                inner_weight_decay=hidden_size,  # times the learning rate, no function of the width
                outer_weight_decay=0.0,
                eps=1.0 / (hidden_size * num_layers),
            )
        raise ValueError(f"model.parametrization is {parametrization!r}, but must be one of standard, complete_p")

    def multiplier(self, name: str) -> float:
        """What the product with a matrix is multiplied by, by the matrix's canonical name."""
        if name == HEAD:
            return self.logit_multiplier
        return self.residual_multiplier if name.endswith(RESIDUAL_MATRICES) else 1.0
