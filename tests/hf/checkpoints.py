"""Checkpoints made by hand, and an independent denoiser to compare exports with."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import yaml
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from megadiff.hf.mapping import ModelSizes

SIZES = ModelSizes(
    num_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    num_query_groups=2,
    ffn_hidden_size=48,
    vocab_size=400,
    padded_vocab_size=1024,
)
SEQUENCE_LENGTH = 24


def random_state(sizes: ModelSizes, *, seed: int = 0) -> dict[str, Tensor]:
    """Model tensors by canonical name, written out without the name table; gains differ from 1."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    def gain(size: int) -> Tensor:
        return 1 + 0.2 * torch.randn(size, generator=generator)

    hidden, ffn, head = (
        sizes.hidden_size,
        sizes.ffn_hidden_size,
        sizes.hidden_size // sizes.num_attention_heads,
    )
    state = {"embedding.word_embeddings.weight": draw(sizes.padded_vocab_size, hidden)}
    for layer in range(sizes.num_layers):
        prefix = f"decoder.layers.{layer}"
        rows = (sizes.num_attention_heads + 2 * sizes.num_query_groups) * head
        state[f"{prefix}.input_layernorm.weight"] = gain(hidden)
        state[f"{prefix}.self_attention.linear_qkv.weight"] = draw(rows, hidden)
        if sizes.qk_layernorm:
            state[f"{prefix}.self_attention.q_layernorm.weight"] = gain(head)
            state[f"{prefix}.self_attention.k_layernorm.weight"] = gain(head)
        state[f"{prefix}.self_attention.linear_proj.weight"] = draw(hidden, hidden)
        state[f"{prefix}.pre_mlp_layernorm.weight"] = gain(hidden)
        state[f"{prefix}.mlp.linear_fc1.weight"] = draw((1 + sizes.is_gated) * ffn, hidden)
        state[f"{prefix}.mlp.linear_fc2.weight"] = draw(hidden, ffn)
    state["decoder.final_layernorm.weight"] = gain(hidden)
    state["output_layer.weight"] = draw(sizes.padded_vocab_size, hidden)
    return state


def reference_logits(state: dict[str, Tensor], sizes: ModelSizes, ids_L: Tensor) -> Tensor:
    """The denoiser for one sequence, in float64 and with loops instead of batched shapes: logits [L, V]."""
    state = {name: weight.double() for name, weight in state.items()}
    num_heads, num_groups = sizes.num_attention_heads, sizes.num_query_groups
    head, length = sizes.hidden_size // num_heads, len(ids_L)

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * state[name]

    def rope(x_LD: Tensor) -> Tensor:
        turned = torch.empty_like(x_LD)
        for d in range(head // 2):
            angle_L = torch.arange(length, dtype=torch.float64) * 10000.0 ** (-2 * d / head)
            a, b = x_LD[:, d], x_LD[:, d + head // 2]
            turned[:, d] = a * angle_L.cos() - b * angle_L.sin()
            turned[:, d + head // 2] = b * angle_L.cos() + a * angle_L.sin()
        return turned

    x = state["embedding.word_embeddings.weight"][ids_L]
    for layer in range(sizes.num_layers):
        prefix = f"decoder.layers.{layer}"
        qkv = norm(x, f"{prefix}.input_layernorm.weight") @ state[f"{prefix}.self_attention.linear_qkv.weight"].T
        heads = list(qkv.split(head, dim=1))  # in the order of the rows: each group's queries, its k, its v
        outputs = []
        for _ in range(num_groups):
            queries = [heads.pop(0) for _ in range(num_heads // num_groups)]
            key, value = heads.pop(0), heads.pop(0)
            key = rope(norm(key, f"{prefix}.self_attention.k_layernorm.weight"))
            for query in queries:
                query = rope(norm(query, f"{prefix}.self_attention.q_layernorm.weight"))
                outputs.append((query @ key.T / head**0.5).softmax(-1) @ value)
        x = x + torch.cat(outputs, dim=1) @ state[f"{prefix}.self_attention.linear_proj.weight"].T
        hidden = norm(x, f"{prefix}.pre_mlp_layernorm.weight") @ state[f"{prefix}.mlp.linear_fc1.weight"].T
        x = x + hidden.clamp(min=0) ** 2 @ state[f"{prefix}.mlp.linear_fc2.weight"].T
    logits = norm(x, "decoder.final_layernorm.weight") @ state["output_layer.weight"].T
    return logits[:, : sizes.vocab_size]


class Blocks(torch.Tensor):
    """A tensor that saves itself in blocks of rows, as tensor-parallel ranks save theirs."""

    num_blocks: int

    @classmethod
    def of(cls, tensor: Tensor, num_blocks: int) -> Blocks:
        blocks = tensor.as_subclass(cls)
        blocks.num_blocks = num_blocks
        return blocks

    def _chunks(self) -> list[ChunkStorageMetadata]:
        rows, rest = self.shape[0] // self.num_blocks, self.shape[1:]
        zeros = (0,) * len(rest)
        return [
            ChunkStorageMetadata(torch.Size((block * rows, *zeros)), torch.Size((rows, *rest)))
            for block in range(self.num_blocks)
        ]

    def __create_write_items__(self, fqn: str, _: Any) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self)
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.shape),
            )
            for chunk in self._chunks()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return self._chunks()

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        rows = self.shape[0] // self.num_blocks
        return self.as_subclass(torch.Tensor)[index.offset[0] :][:rows].clone()


def write_state(folder: Path, state: dict[str, Tensor], *, num_blocks: int = 1) -> None:
    """Write a distributed checkpoint with an optimizer's tensors and an object beside the model."""
    content: dict[str, Any] = {name: Blocks.of(tensor, num_blocks) for name, tensor in state.items()}
    content["optimizer.state.exp_avg.output_layer.weight"] = torch.zeros(3)
    content["chained_0.optimizer.state.exp_avg.decoder.final_layernorm.weight"] = torch.zeros(3)
    content["rng_state/shard_0_1"] = {"not": "a tensor"}
    dcp.save(content, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)


def default_config(sizes: ModelSizes) -> dict[str, Any]:
    return {
        "model": {
            "num_layers": sizes.num_layers,
            "hidden_size": sizes.hidden_size,
            "num_attention_heads": sizes.num_attention_heads,
            "num_query_groups": sizes.num_query_groups,
            "ffn_hidden_size": sizes.ffn_hidden_size,
            "rotary_base": 10000,
            "layernorm_epsilon": 1.0e-6,
        },
        "objective": {
            "name": "gidd",
            "noise": "hybrid",
            "shift": 0.0,
            "scale": 1.0,
            "min_log_snr": -9.0,
            "max_log_snr": 9.0,
        },
        "data": {"path": "corpus", "sequence_length": SEQUENCE_LENGTH},
    }


def default_manifest(sizes: ModelSizes) -> dict[str, Any]:
    return {
        "step": 400,
        "consumed_samples": 3200,
        "vocab_size": sizes.vocab_size,
        "padded_vocab_size": sizes.padded_vocab_size,
        "bos_id": 0,
        "eos_id": 1,
        "pad_id": 2,
        "mask_id": 3,
        "validation": {"nelbo": 5.25, "stderr": 0.03, "bits_per_byte": 2.125, "num_sequences": 512},
    }


def write_checkpoint(
    folder: Path,
    *,
    sizes: ModelSizes = SIZES,
    state: dict[str, Tensor] | None = None,
    tokenizer: Path | None = None,
    num_blocks: int = 1,
    config: dict[str, Any] | None = None,
    manifest: dict[str, Any] | None = None,
) -> dict[str, Tensor]:
    """Write a whole checkpoint directory; returns the model tensors that it holds."""
    state = random_state(sizes) if state is None else state
    folder.mkdir(parents=True)
    write_state(folder / "state", state, num_blocks=num_blocks)
    (folder / "config.yaml").write_text(yaml.safe_dump(config or default_config(sizes)))
    (folder / "manifest.json").write_text(json.dumps(manifest or default_manifest(sizes)))
    if tokenizer is not None:
        shutil.copyfile(tokenizer, folder / "tokenizer.model")
    return state


def sizes_with(**changes: Any) -> ModelSizes:
    return replace(SIZES, **changes)
