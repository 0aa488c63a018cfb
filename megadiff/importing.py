"""From a Hugging Face folder to a megadiff checkpoint, for `training.init_from`, `evaluate` and `generate`."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import torch

from megadiff.config import TrainConfig
from megadiff.data.loader import DataConfig
from megadiff.data.tokenizer import Tokenizer, adopted_model
from megadiff.hf.importer import OWN, HuggingFaceModel
from megadiff.machine.versions import versions
from megadiff.models.config import DenoiserConfig
from megadiff.models.denoiser import build_denoiser
from megadiff.models.weights import canonical_shards
from megadiff.objectives import AutoregressiveConfig, GiddConfig, ObjectiveConfig
from megadiff.parallel import groups as parallel_groups
from megadiff.training.checkpoint import CheckpointConfig
from megadiff.training.identity import model_identity
from megadiff.training.writer import CheckpointWriter

logger = logging.getLogger(__name__)


def import_from_hf(source: Path, output: Path) -> Path:
    """Write the checkpoint of a model that Hugging Face format holds, in one process and in fp32.

    Args:
        source: a folder with config.json, *.safetensors and tokenizer.model.
        output: the run directory to make; its one checkpoint is that of step 0.

    Returns:
        The checkpoint.

    Raises:
        ValueError: the model or its tokenizer cannot be imported, or `output` holds something.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists and is not empty: give the name of a new directory")
    model = HuggingFaceModel.open(source)
    tokenizer_model, num_new = adopted_model(model.tokenizer)
    tokenizer = Tokenizer(tokenizer_model)
    if tokenizer.vocab_size - num_new != model.sizes.vocab_size:
        raise ValueError(
            f"{source} has rows for {model.sizes.vocab_size} ids, but its tokenizer.model has "
            f"{tokenizer.vocab_size - num_new} pieces: put the tokenizer there that the model was trained with"
        )
    config = TrainConfig(
        model=_denoiser_config(model),
        objective=_objective(model),
        # The path is that of this project's recipes; a folder of weights has no corpus.
        data=DataConfig(path="data/text", sequence_length=model.sequence_length),
    )
    identity = model_identity(
        config.model,
        vocab_size=tokenizer.vocab_size,
        mask_id=tokenizer.mask_id,
        tokenizer=tokenizer_model,
        precision="fp32",
    )
    with parallel_groups.joined(parallel_groups.ParallelConfig()) as groups:
        [denoiser] = build_denoiser(
            config.model, groups, vocab_size=tokenizer.vocab_size, sequence_length=model.sequence_length, seed=0
        )
        parameters = {shard.key: shard.data for shard in canonical_shards(denoiser)}
        with torch.no_grad():
            for name, weight in model.tensors(
                vocab_size=tokenizer.vocab_size,
                padded_vocab_size=identity["padded_vocab_size"],
                mask_id=tokenizer.mask_id,
                unk_id=tokenizer.unk_id,
            ):
                parameters[name].copy_(weight)
        writer = CheckpointWriter(output, CheckpointConfig(), groups)
        manifest = {
            "step": 0,
            "consumed_samples": 0,
            "consumed_tokens": 0,
            **identity,
            **{name: getattr(tokenizer, name) for name in ("bos_id", "eos_id", "pad_id")},
            "imported_from": {"path": str(source.resolve()), "model_type": model.model_type},
            "ema_decay": None,
            "validation": None,
            "versions": versions(),
        }
        yaml = config.to_yaml()
        writer.start(0, [denoiser], None, manifest=manifest, config_yaml=yaml, tokenizer=tokenizer_model, overlap=False)
        checkpoint, _ = writer.finish()
    if num_new:
        logger.info("the vocabulary has grown by %d ids, the mask among them, to %d", num_new, tokenizer.vocab_size)
    logger.info("imported %s as %s; prepare text with --tokenizer %s/tokenizer.model", source, checkpoint, checkpoint)
    return checkpoint


def _denoiser_config(model: HuggingFaceModel) -> DenoiserConfig:
    sizes = model.sizes
    return DenoiserConfig(
        num_layers=sizes.num_layers,
        hidden_size=sizes.hidden_size,
        num_attention_heads=sizes.num_attention_heads,
        num_query_groups=sizes.num_query_groups,
        ffn_hidden_size=sizes.ffn_hidden_size,
        activation="swiglu" if sizes.is_gated else "squared_relu",
        qk_layernorm=sizes.qk_layernorm,
        rotary_base=model.rotary_base,
        layernorm_epsilon=model.layernorm_epsilon,
    )


def _objective(model: HuggingFaceModel) -> ObjectiveConfig:
    """What an export was trained on; other models predict the next token."""
    if model.model_type != OWN:
        return AutoregressiveConfig()
    names = {
        "noise": "noise_type",
        "shift": "noise_shift",
        "scale": "noise_scale",
        "min_log_snr": "min_log_snr",
        "max_log_snr": "max_log_snr",
        "shift_inputs": "shift_inputs",
    }
    known = {field: model.settings[name] for field, name in names.items() if name in model.settings}
    return dataclasses.replace(GiddConfig(), **known)
