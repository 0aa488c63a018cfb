"""What else a run may be, besides divided: settings of `tiny_config`, by name, for the layout test.

Only fused heads and micro-batches change nothing; every other variant is compared with itself in one process.
"""

from __future__ import annotations

from typing import Any

from megadiff.objectives import (
    AutoregressiveConfig,
    BlockDiffusionConfig,
    DuoConfig,
    EsoLmConfig,
    GiddConfig,
    MdlmConfig,
)

Settings = dict[str, Any]
"""Sections of `tiny_config`; the objective may be a whole one."""

CONDITIONED: Settings = {"model": {"log_snr_conditioning": True}}
GIDD_OPTIONS = GiddConfig(
    noise="uniform",
    schedule="cosine",
    independent_level_fraction=0.3,
    linear_level_fraction=0.2,
    prompt_fraction=0.4,
    max_empty_token_fraction=0.2,
    random_length_fraction=0.3,
)
EXACT_COUNT = MdlmConfig(masking="exact_count", loss_weighting="simple")
CURRICULUM = DuoConfig(curriculum_end_sample=35, curriculum_log10_temperature=(-0.5, -2.0))
"""Which ends within a micro-batch."""
ADAPTED = MdlmConfig(shift_inputs=True, attention_annealing_samples=40)

_OBJECTIVES: dict[str, Settings] = {
    "gidd, all options": {"objective": GIDD_OPTIONS, **CONDITIONED},
    "mdlm": {"objective": MdlmConfig(random_length_fraction=0.3)},
    "mdlm, exact count": {"objective": EXACT_COUNT},
    "mdlm, adapted": {"objective": ADAPTED},
    "duo": {"objective": DuoConfig(), **CONDITIONED},
    "duo, curriculum": {
        "objective": CURRICULUM,
        **CONDITIONED,
    },
    "eso-lm": {"objective": EsoLmConfig(loss_weighting="simple")},
    "eso-lm, sequential": {"objective": EsoLmConfig(alpha_0=0.5)},
    "block diffusion": {"objective": BlockDiffusionConfig(block_size=8)},
    "block diffusion, exact count": {"objective": BlockDiffusionConfig(block_size=4, masking="exact_count")},
    "autoregressive": {"objective": AutoregressiveConfig()},
}
# Adam turns gradients of the size of rounding, which the first steps have here, into whole steps; not so with this.
EVERY_OBJECTIVE = {name: {**settings, "optimizer": {"adam_eps": 1e-5}} for name, settings in _OBJECTIVES.items()}
"""Each objective, with the options that change its batches."""

# The same ε, for it is divided by width x depth; and a third of the published rate: at width 32, steps of the published
# one are so long that rounding grows tenfold within eight.
PUBLISHED: Settings = {
    "model": {"parametrization": "complete_p", "init_std": 0.02, "log_snr_conditioning": True},
    "optimizer": {"algorithm": "laprop", "lr": 0.1, "decoupled_lr": None, "adam_eps": 1e-3},
}
"""Optimizer and parametrisation of arXiv 2512.10858."""

# Tensors are scaled by micro-batch: all layouts have the same ones.
FP8: Settings = {"training": {"precision": "fp8-emulated", "micro_batch_size": 2}, "optimizer": {"adam_eps": 1e-5}}

VARIANTS: dict[str, Settings] = {
    "": {},
    "masked": {"objective": {"noise": "masked"}},
    "micro-batch 1": {"training": {"micro_batch_size": 1}},
    "gated": {"model": {"activation": "swiglu", "qk_layernorm": False}},
    "complete_p, laprop": PUBLISHED,
    "fp8-emulated": FP8,
    "gated, fp8-emulated": FP8 | {"model": {"activation": "swiglu"}, "fp8": {"first_last_layers_bf16": True}},
    "ramped": {"training": {"rampup_batch_size": (4, 4, 12), "micro_batch_size": 2}},
    **EVERY_OBJECTIVE,
}
VARIANTS |= {
    ", ".join(filter(None, [name, "fused"])): settings
    | {"model": settings.get("model", {}) | {"fused_head_loss": True}}
    for name, settings in VARIANTS.items()
}
"""By name, each with and without the fused head."""


def same_run(variant: str) -> str:
    """The variant that the reference of another is trained as: without what changes nothing."""
    return variant.removesuffix("fused").removesuffix(", ").removesuffix("micro-batch 1")
