"""The names and layouts of a megadiff checkpoint and of its Hugging Face twin, as one table that reads both ways.

Each row of `TABLE` ties one tensor of the checkpoint to the one, two or three tensors it becomes, with a `Transform`
that knows both directions; some rows are there for some models only. `to_hf` and `to_megadiff` walk the rows one tensor
at a time, so a lazy mapping is enough and a model never has to fit in memory; both refuse to start unless the names on
their input side are exactly the table's.

Shapes are written in letters: Vp padded vocabulary rows, H hidden, F feed-forward, D head size,
QKV = (N + 2G)·D for N query heads in G query groups. A `{i}` in a name is the layer number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_NAMES_SHOWN = 6


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """The numbers that fix every shape of the denoiser, unpadded and padded vocabulary included."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    ffn_hidden_size: int
    vocab_size: int
    padded_vocab_size: int
    is_gated: bool = False
    """Whether feed-forward layers are SwiGLU."""
    qk_layernorm: bool = True
    """Whether queries and keys are normalised."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name in ("is_gated", "qk_layernorm"):
                continue
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}, expected a positive integer.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size is {self.hidden_size}, expected a multiple of num_attention_heads"
                f" ({self.num_attention_heads})."
            )
        if self.num_attention_heads % self.num_query_groups:
            raise ValueError(
                f"num_attention_heads is {self.num_attention_heads}, expected a multiple of num_query_groups"
                f" ({self.num_query_groups})."
            )
        if self.vocab_size > self.padded_vocab_size:
            raise ValueError(
                f"vocab_size is {self.vocab_size}, expected at most padded_vocab_size ({self.padded_vocab_size})."
            )

    @property
    def head_size(self) -> int:
        """D, the width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    def shape(self, letters: str) -> torch.Size:
        """Translate a shape in letters, e.g. `"F H"`, into numbers."""
        size_of = {
            "Vp": self.padded_vocab_size,
            "H": self.hidden_size,
            "F": self.ffn_hidden_size,
            "2F": 2 * self.ffn_hidden_size,
            "D": self.head_size,
            "QKV": (self.num_attention_heads + 2 * self.num_query_groups) * self.head_size,
        }
        return torch.Size(size_of[letter] for letter in letters.split())


@dataclass(frozen=True)
class Transform:
    """A change of layout and its inverse: one checkpoint tensor to the tuple of HF tensors, and back."""

    to_hf: Callable[[Tensor, ModelSizes], tuple[Tensor, ...]]
    to_megadiff: Callable[[tuple[Tensor, ...], ModelSizes], Tensor]


def _drop_padding(weight: Tensor, sizes: ModelSizes) -> tuple[Tensor, ...]:
    return (weight[: sizes.vocab_size],)


def _restore_padding(parts: tuple[Tensor, ...], sizes: ModelSizes) -> Tensor:
    (rows,) = parts
    missing = sizes.padded_vocab_size - sizes.vocab_size
    return torch.cat([rows, rows.new_zeros(missing, rows.shape[1])])


def _split_qkv(weight: Tensor, sizes: ModelSizes) -> tuple[Tensor, ...]:
    """Cut the fused projection, stored group by group as [its query heads, k, v], into q, k and v."""
    queries_per_group = sizes.num_attention_heads // sizes.num_query_groups
    grouped = weight.unflatten(0, (sizes.num_query_groups, queries_per_group + 2, sizes.head_size))
    return tuple(part.flatten(0, 2) for part in grouped.split([queries_per_group, 1, 1], dim=1))


def _fuse_qkv(parts: tuple[Tensor, ...], sizes: ModelSizes) -> Tensor:
    grouped = [part.unflatten(0, (sizes.num_query_groups, -1, sizes.head_size)) for part in parts]
    return torch.cat(grouped, dim=1).flatten(0, 2)


def _split_gated(weight: Tensor, sizes: ModelSizes) -> tuple[Tensor, ...]:
    """Part the alternating rows of gate and up."""
    return weight.unflatten(0, (sizes.ffn_hidden_size, 2)).unbind(1)


def _fuse_gated(parts: tuple[Tensor, ...], sizes: ModelSizes) -> Tensor:
    return torch.stack(parts, dim=1).flatten(0, 1)


COPY = Transform(lambda weight, _: (weight,), lambda parts, _: parts[0])
VOCAB_ROWS = Transform(_drop_padding, _restore_padding)
QKV = Transform(_split_qkv, _fuse_qkv)
GATED = Transform(_split_gated, _fuse_gated)


@dataclass(frozen=True)
class Entry:
    """One row of the table: a checkpoint tensor, its shape in letters, the HF tensors it becomes, how, and of whom."""

    megadiff: str
    shape: str
    hf: tuple[str, ...]
    transform: Transform
    belongs_to: Callable[[ModelSizes], bool] = lambda sizes: True

    def at_layer(self, layer: int) -> Entry:
        """This row with `{i}` replaced by a layer number."""
        return replace(
            self,
            megadiff=self.megadiff.replace("{i}", str(layer)),
            hf=tuple(name.replace("{i}", str(layer)) for name in self.hf),
        )


_MEGADIFF, _HF = "decoder.layers.{i}.", "model.layers.{i}."
_QKV_NAMES = tuple(f"{_HF}self_attn.{part}_proj.weight" for part in "qkv")
_FC1, _UP = f"{_MEGADIFF}mlp.linear_fc1.weight", f"{_HF}mlp.up_proj.weight"


def _has_qk_norm(sizes: ModelSizes) -> bool:
    return sizes.qk_layernorm


def _is_gated(sizes: ModelSizes) -> bool:
    return sizes.is_gated


def _is_not_gated(sizes: ModelSizes) -> bool:
    return not sizes.is_gated


TABLE: tuple[Entry, ...] = (
    Entry("embedding.word_embeddings.weight", "Vp H", ("model.embed_tokens.weight",), VOCAB_ROWS),
    Entry(f"{_MEGADIFF}input_layernorm.weight", "H", (f"{_HF}input_layernorm.weight",), COPY),
    Entry(f"{_MEGADIFF}self_attention.linear_qkv.weight", "QKV H", _QKV_NAMES, QKV),
    Entry(f"{_MEGADIFF}self_attention.q_layernorm.weight", "D", (f"{_HF}self_attn.q_norm.weight",), COPY, _has_qk_norm),
    Entry(f"{_MEGADIFF}self_attention.k_layernorm.weight", "D", (f"{_HF}self_attn.k_norm.weight",), COPY, _has_qk_norm),
    Entry(f"{_MEGADIFF}self_attention.linear_proj.weight", "H H", (f"{_HF}self_attn.o_proj.weight",), COPY),
    Entry(f"{_MEGADIFF}pre_mlp_layernorm.weight", "H", (f"{_HF}post_attention_layernorm.weight",), COPY),
    Entry(_FC1, "F H", (_UP,), COPY, _is_not_gated),
    Entry(_FC1, "2F H", (f"{_HF}mlp.gate_proj.weight", _UP), GATED, _is_gated),
    Entry(f"{_MEGADIFF}mlp.linear_fc2.weight", "H F", (f"{_HF}mlp.down_proj.weight",), COPY),
    Entry("decoder.final_layernorm.weight", "H", ("model.norm.weight",), COPY),
    Entry("output_layer.weight", "Vp H", ("lm_head.weight",), VOCAB_ROWS),
)


def entries(sizes: ModelSizes) -> Iterator[Entry]:
    """The table written out for a model: the embedding, then layer by layer, then the head."""
    rows = [entry for entry in TABLE if entry.belongs_to(sizes)]
    per_layer = [entry for entry in rows if "{i}" in entry.megadiff]
    first, *last = (entry for entry in rows if "{i}" not in entry.megadiff)
    yield first
    for layer in range(sizes.num_layers):
        yield from (entry.at_layer(layer) for entry in per_layer)
    yield from last


def to_hf(tensors: Mapping[str, Tensor], sizes: ModelSizes) -> Iterator[tuple[str, Tensor]]:
    """Turn a checkpoint's model tensors into HF parameters, reading each tensor once, when its turn comes.

    Args:
        tensors: Canonical name -> full (unsharded) tensor; may be lazy.
        sizes: The shapes that the checkpoint's config and manifest promise.

    Yields:
        (HF parameter name, tensor), every parameter exactly once.

    Raises:
        ValueError: If a name is missing or unknown, or a shape differs from the promised one.
    """
    rows = list(entries(sizes))
    _check_names("the checkpoint", tensors, [row.megadiff for row in rows])
    for row in rows:
        weight = tensors[row.megadiff]
        _check_shape(row.megadiff, weight, sizes.shape(row.shape))
        yield from zip(row.hf, row.transform.to_hf(weight, sizes), strict=True)


def to_megadiff(tensors: Mapping[str, Tensor], sizes: ModelSizes) -> Iterator[tuple[str, Tensor]]:
    """Turn HF parameters into a checkpoint's model tensors: the inverse of `to_hf`, padded rows filled with zeros.

    Args:
        tensors: HF parameter name -> tensor; may be lazy.
        sizes: The shapes of the model, the padded vocabulary among them.

    Yields:
        (canonical name, full tensor), every tensor exactly once.

    Raises:
        ValueError: If a name is missing or unknown, or a shape is not the model's.
    """
    rows = list(entries(sizes))
    _check_names("the Hugging Face model", tensors, [name for row in rows for name in row.hf])
    for row in rows:
        parts = tuple(tensors[name] for name in row.hf)
        promised = row.transform.to_hf(torch.empty(sizes.shape(row.shape), device="meta"), sizes)
        for name, part, expected in zip(row.hf, parts, promised, strict=True):
            _check_shape(name, part, expected.shape)
        yield row.megadiff, row.transform.to_megadiff(parts, sizes)


def _check_names(owner: str, found: Iterable[str], expected: Iterable[str]) -> None:
    found, expected = set(found), set(expected)
    if missing := expected - found:
        raise ValueError(f"{owner} lacks {_some(missing)}; expected the denoiser that its config describes.")
    if unknown := found - expected:
        raise ValueError(f"{owner} holds {_some(unknown)}, which the name table does not know; extend the table.")


def _check_shape(name: str, tensor: Tensor, expected: torch.Size) -> None:
    if tensor.shape != expected:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, expected {tuple(expected)} from the model's sizes;"
            " the config belongs to another model."
        )


def _some(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:_NAMES_SHOWN])
    return shown + (f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else "")
