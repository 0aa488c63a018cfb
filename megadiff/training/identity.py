"""Which model a checkpoint holds, and whether this run may go on from it.

What a manifest says of the model is its identity: what says how it is computed (backend, layers, layout) is no part of
it, and may change at every start.
"""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megadiff.models.config import DenoiserConfig, padded_vocab_size

if TYPE_CHECKING:
    from megadiff.config import TrainConfig

_HOW_IT_IS_COMPUTED = ("fused_head_loss", "attention_backend", "transformer_impl")


def model_identity(
    config: DenoiserConfig, *, vocab_size: int, mask_id: int, tokenizer: bytes, precision: str
) -> dict[str, Any]:
    """The entries of a manifest that say which model it is."""
    model = {name: value for name, value in dataclasses.asdict(config).items() if name not in _HOW_IT_IS_COMPUTED}
    return {
        "model": model,
        "vocab_size": vocab_size,
        "padded_vocab_size": padded_vocab_size(vocab_size),
        "mask_id": mask_id,
        "tokenizer_sha256": hashlib.sha256(tokenizer).hexdigest(),
        "precision": precision,
    }


def differences(manifest: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Entries of a manifest that are not as expected, a few words each; nested mappings are compared by entry."""
    found = []
    for name, value in expected.items():
        saved = manifest.get(name)
        if isinstance(value, dict) and isinstance(saved, dict):
            found += [f"{name}.{k} {saved.get(k)} (this run: {value[k]})" for k in value if saved.get(k) != value[k]]
        elif saved != value:
            found.append(f"{name} {saved} (this run: {value})")
    return found


def check_resumable(
    checkpoint: Path,
    manifest: dict[str, Any],
    saved: dict[str, Any],
    *,
    config: TrainConfig,
    expected: dict[str, Any],
) -> None:
    """Refuse a checkpoint that this run cannot go on from, before anything of it is loaded.

    Args:
        manifest: the checkpoint's own.
        saved: the configuration that it was trained with, as read from its config.yaml.
        expected: identity of this run's model.

    Raises:
        ValueError: it holds imported weights, or is of another objective, optimizer or model (naming every entry that
            differs).
    """
    elsewhere = "choose another --run-dir, and begin there with {} (training.init_from)"
    if "imported_from" in manifest:
        raise ValueError(f"{checkpoint} holds imported weights, no run that could go on: {elsewhere.format('them')}")
    if (before := saved["objective"]["name"]) != config.objective.name:
        raise ValueError(
            f"{checkpoint} was trained for objective {before}, but this run's is {config.objective.name}: "
            f"{elsewhere.format('its weights')}"
        )
    algorithm = config.optimizer.algorithm
    if (before := manifest.get("optimizer_algorithm", "adamw")) != algorithm:  # older versions had AdamW alone
        raise ValueError(
            f"{checkpoint} holds the moments of {before}, but optimizer.algorithm is {algorithm}: set it to "
            f"{before}, or {elsewhere.format('its weights')}"
        )
    model = dataclasses.asdict(DenoiserConfig.of_manifest(manifest["model"]))
    if problems := differences({**manifest, "model": model}, expected):
        raise ValueError(
            f"checkpoint {checkpoint} belongs to another model: it has {', '.join(problems)}; "
            "resume with the configuration in its config.yaml or choose another --run-dir"
        )
