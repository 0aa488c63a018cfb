"""From a megadiff checkpoint to a directory that transformers loads: weights, config, code, tokenizer, card.

The checkpoint may come from any layout; it is read in one process, tensor by tensor, and written shard by
shard, so memory holds one shard and one tensor. Everything goes into a hidden folder beside OUT, which is
renamed when it is complete: a crash leaves no half export.

Neither Megatron nor transformers is needed to convert, so the JSON files are written directly.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from megadiff.hf.mapping import to_hf
from megadiff.hf.model_card import model_card
from megadiff.hf.source import Source

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SHARD_BYTES = 4 * 1024**3
_MODEL_CODE = "modeling_megadiff"
_TOKENIZER_CODE = "tokenization_megadiff"


def convert_to_hf(
    checkpoint: Path,
    output: Path,
    *,
    weights: str = "model",
    dtype: str = "float32",
    max_shard_size: int = SHARD_BYTES,
    overwrite: bool = False,
) -> None:
    """Export a checkpoint so that `AutoModelForCausalLM.from_pretrained(output, trust_remote_code=True)` loads it.

    Args:
        checkpoint: A checkpoint, or a run directory, of which the newest checkpoint is taken.
        output: The directory to make; its parent is made too.
        weights: "model" for the trained weights, "ema" for their exponential moving average.
        dtype: "float32" or "bfloat16", the type of the exported weights.
        max_shard_size: Largest weight file, in bytes; a single larger tensor gets a file of its own.
        overwrite: Replace `output` if it is an earlier export.

    Raises:
        ValueError: If the checkpoint is none, is damaged or does not fit its own config, if `output` is in
            the way, if the dtype is unknown, or if there is no average. Nothing is changed then.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}.")
    if max_shard_size < 1:
        raise ValueError(f"max_shard_size is {max_shard_size}, expected a positive number of bytes.")
    output = output.resolve()
    _check_output(output, overwrite)
    source = Source.open(checkpoint, weights=weights)

    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        parameters = ((name, weight.to(DTYPES[dtype])) for name, weight in to_hf(source.tensors, source.sizes))
        _write_weights(parameters, partial, max_shard_size)
        _write_json(partial / "config.json", _model_config(source, dtype))
        _copy_code(_MODEL_CODE, partial)
        if source.tokenizer is None:
            logger.warning("%s has no tokenizer.model: the export has no tokenizer", source.folder)
        else:
            shutil.copyfile(source.folder / "tokenizer.model", partial / "tokenizer.model")
            _copy_code(_TOKENIZER_CODE, partial)
            _write_json(partial / "tokenizer_config.json", _tokenizer_config(source))
        (partial / "README.md").write_text(model_card(source, output.name), encoding="utf-8")
        _put_in_place(partial, output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    logger.info("exported %s to %s", source.folder, output)


def _check_output(output: Path, overwrite: bool) -> None:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not output.is_dir():
        raise ValueError(f"{output} is a file, expected a directory to make; give another output.")
    config = output / "config.json"
    if not (config.is_file() and '"model_type": "megadiff"' in config.read_text(encoding="utf-8", errors="replace")):
        raise ValueError(f"{output} is not empty and no earlier export, so it is left alone; give another output.")
    if not overwrite:
        raise ValueError(f"{output} already holds an export; replace it with --overwrite or give another output.")


def _put_in_place(partial: Path, output: Path) -> None:
    """Rename the finished export; what it replaces is deleted only afterwards."""
    retired = output.with_name(f".{output.name}.replaced")
    shutil.rmtree(retired, ignore_errors=True)
    if output.exists():
        output.rename(retired)
    partial.rename(output)
    shutil.rmtree(retired, ignore_errors=True)


def _write_weights(parameters: Iterable[tuple[str, Tensor]], folder: Path, max_shard_size: int) -> None:
    """Write safetensors files in the order of the parameters, and an index if there is more than one."""
    shards: list[list[str]] = []
    total_size = 0
    for shard in _fill_shards(parameters, max_shard_size):
        save_file(shard, folder / _part_name(len(shards)), metadata={"format": "pt"})
        shards.append(list(shard))
        total_size += sum(weight.nbytes for weight in shard.values())
        logger.info("wrote weight file %d (%.2f GB so far)", len(shards), total_size / 1e9)

    if len(shards) == 1:
        (folder / _part_name(0)).rename(folder / "model.safetensors")
        return
    weight_map = {}
    for number, names in enumerate(shards):
        file_name = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / _part_name(number)).rename(folder / file_name)
        weight_map.update(dict.fromkeys(names, file_name))
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    _write_json(folder / "model.safetensors.index.json", index)


def _fill_shards(parameters: Iterable[tuple[str, Tensor]], max_shard_size: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, weight in parameters:
        if shard and size + weight.nbytes > max_shard_size:
            yield shard
            shard, size = {}, 0
        # A copy of its own: a view would keep, or write, the whole tensor that it was cut from.
        shard[name] = weight.clone(memory_format=torch.contiguous_format)
        size += weight.nbytes
    yield shard


def _part_name(number: int) -> str:
    return f"part-{number:05d}"  # the final name tells the number of files, which is known at the end


def _model_config(source: Source, dtype: str) -> dict[str, Any]:
    sizes, tokenizer = source.sizes, source.tokenizer
    suppressed = {source.bos_id, source.pad_id} | ({tokenizer.unk_id()} if tokenizer else set())
    return {
        "architectures": ["MegadiffForDiffusionLM"],
        "auto_map": {
            "AutoConfig": f"{_MODEL_CODE}.MegadiffConfig",
            "AutoModel": f"{_MODEL_CODE}.MegadiffModel",
            "AutoModelForCausalLM": f"{_MODEL_CODE}.MegadiffForDiffusionLM",
            "AutoModelForMaskedLM": f"{_MODEL_CODE}.MegadiffForDiffusionLM",
        },
        "model_type": "megadiff",
        "dtype": dtype,
        "vocab_size": sizes.vocab_size,
        "hidden_size": sizes.hidden_size,
        "intermediate_size": sizes.ffn_hidden_size,
        "num_hidden_layers": sizes.num_layers,
        "num_attention_heads": sizes.num_attention_heads,
        "num_key_value_heads": sizes.num_query_groups,
        "max_position_embeddings": source.sequence_length,
        "rope_theta": float(source.rotary_base),
        "rms_norm_eps": source.layernorm_epsilon,
        "gated_mlp": sizes.is_gated,
        "qk_norm": sizes.qk_layernorm,
        "shift_inputs": source.shift_inputs,
        "noise_type": source.noise,
        "noise_shift": source.shift,
        "noise_scale": source.scale,
        "min_log_snr": source.min_log_snr,
        "max_log_snr": source.max_log_snr,
        "bos_token_id": source.bos_id,
        "eos_token_id": source.eos_id,
        "pad_token_id": source.pad_id,
        "mask_token_id": source.mask_id,
        "suppressed_token_ids": sorted(suppressed),
        "tie_word_embeddings": False,
    }


def _tokenizer_config(source: Source) -> dict[str, Any]:
    assert source.tokenizer is not None
    name_of = source.tokenizer.id_to_piece
    return {
        "tokenizer_class": "MegadiffTokenizer",
        "auto_map": {"AutoTokenizer": [f"{_TOKENIZER_CODE}.MegadiffTokenizer", None]},
        "model_max_length": source.sequence_length,
        "bos_token": name_of(source.bos_id),
        "eos_token": name_of(source.eos_id),
        "pad_token": name_of(source.pad_id),
        "mask_token": name_of(source.mask_id),
        "unk_token": name_of(source.tokenizer.unk_id()),
    }


def _copy_code(module: str, folder: Path) -> None:
    shutil.copyfile(Path(__file__).with_name(f"{module}.py"), folder / f"{module}.py")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
