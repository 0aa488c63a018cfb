"""A Hugging Face folder as what a megadiff checkpoint is made of: sizes, settings, tensors by canonical name.

Read are our own exports and models of the Llama family, whose layers are ours with other settings: pre-norm RMSNorm,
rotary phases in halves, no biases. Of those, `lm_head` may be tied to the embedding; here each gets its own copy. The
vocabulary may grow: ids that a diffusion model needs and the tokenizer of another model lacks are appended.

Neither Megatron nor transformers is needed, and no code that a folder brings is run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megadiff.hf.mapping import ModelSizes, to_megadiff

OWN, FAMILY = "megadiff", ("llama", "mistral", "qwen3")
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True, kw_only=True)
class HuggingFaceModel:
    """A model in Hugging Face format; its tensors are read when asked for."""

    folder: Path
    model_type: str
    sizes: ModelSizes
    rotary_base: int
    layernorm_epsilon: float
    sequence_length: int
    """Of the training that the folder tells of; the longest that attention sees whole."""
    settings: Mapping[str, Any]
    """`config.json`."""
    tokenizer: bytes
    """A SentencePiece model."""

    @classmethod
    def open(cls, folder: Path) -> HuggingFaceModel:
        """Read what a folder says of its model.

        Raises:
            ValueError: there is none, or none that a denoiser can hold; the sentence says why.
        """
        path = folder / "config.json"
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(settings, dict):
                raise ValueError(f"a {type(settings).__name__}, expected a mapping")
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} cannot be read ({error}); give the folder of a Hugging Face model.") from error
        rotary: dict[str, Any] = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
        base: Any = rotary.get("rope_theta") or settings.get("rope_theta") or 10000.0
        if problems := _problems(folder, settings, rotary, base):
            raise ValueError(
                f"{folder} cannot be imported: {'; '.join(problems)}. Exports of megadiff can, and models of the types"
                f" {', '.join(FAMILY)} with a SentencePiece tokenizer."
            )
        own = settings["model_type"] == OWN
        heads, vocab_size = settings["num_attention_heads"], settings["vocab_size"]
        length = settings["max_position_embeddings"]
        return cls(
            folder=folder,
            model_type=settings["model_type"],
            sizes=ModelSizes(
                num_layers=settings["num_hidden_layers"],
                hidden_size=settings["hidden_size"],
                num_attention_heads=heads,
                num_query_groups=settings.get("num_key_value_heads") or heads,
                ffn_hidden_size=settings["intermediate_size"],
                vocab_size=vocab_size,
                padded_vocab_size=vocab_size,
                is_gated=settings.get("gated_mlp", False) if own else True,
                qk_layernorm=settings.get("qk_norm", True) if own else settings["model_type"] == "qwen3",
            ),
            rotary_base=int(base),
            layernorm_epsilon=settings["rms_norm_eps"],
            sequence_length=min(length, settings.get("sliding_window") or length),
            settings=settings,
            tokenizer=(folder / "tokenizer.model").read_bytes(),
        )

    def tensors(
        self, *, vocab_size: int, padded_vocab_size: int, mask_id: int, unk_id: int
    ) -> Iterator[tuple[str, Tensor]]:
        """The denoiser's tensors by canonical name, whole.

        Args:
            vocab_size: of the denoiser; ids beyond the model's own are new.
            padded_vocab_size: rows of embedding and head; those beyond the vocabulary are zero.
            mask_id: where it is new, its embedding is the mean of all others, and its row of the head, which is never
                read, zero.
            unk_id: the id whose rows other new ids get: no text has either.

        Raises:
            ValueError: a tensor is missing, unknown or of another shape than the config says, or a file is damaged.
        """
        sizes = replace(self.sizes, vocab_size=vocab_size, padded_vocab_size=padded_vocab_size)
        saved = _SafeTensors(self.folder)
        is_tied = bool(self.settings.get("tie_word_embeddings"))
        extended = _Extended(saved, self.sizes.vocab_size, vocab_size, mask_id, unk_id, is_tied=is_tied)
        return to_megadiff(extended, sizes)


def _problems(folder: Path, settings: dict[str, Any], rotary: dict[str, Any], base: float) -> list[str]:
    """Why a denoiser cannot hold this model, a few words each."""
    model_type = settings.get("model_type")
    if model_type not in (OWN, *FAMILY):
        return [f"model_type is {model_type!r}"]
    needed = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size")
    numbers = (*needed, "rms_norm_eps", "max_position_embeddings")
    if missing := [name for name in numbers if not isinstance(settings.get(name), int | float)]:
        return [f"config.json has no number for {', '.join(missing)}"]
    head_size = settings["hidden_size"] // settings["num_attention_heads"]
    rope_type = rotary.get("rope_type", rotary.get("type", "default"))
    found = {
        f"hidden_act is {settings.get('hidden_act')!r}, not 'silu'": (
            model_type != OWN and settings.get("hidden_act", "silu") != "silu"
        ),
        "its layers have biases": bool(settings.get("attention_bias") or settings.get("mlp_bias")),
        f"head_dim is {settings.get('head_dim')}, not hidden_size / num_attention_heads = {head_size}": (
            (settings.get("head_dim") or head_size) != head_size
        ),
        f"its rotary phases are of type {rope_type!r}": rope_type != "default",
        f"its rotary base {base} is no whole number": int(base) != base,
        "it has no tokenizer.model, and no other kind of tokenizer is known here": (
            not (folder / "tokenizer.model").is_file()
        ),
    }
    return [problem for problem, is_there in found.items() if is_there]


class _SafeTensors(Mapping[str, Tensor]):
    """The tensors of a folder of safetensors files by name."""

    def __init__(self, folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        if index.is_file():  # other files are other formats of the same weights
            files = sorted(folder / name for name in set(json.loads(index.read_text())["weight_map"].values()))
        else:
            files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise ValueError(f"{folder} has no .safetensors file; convert its weights to that format first.")
        self._file_of: dict[str, Path] = {}
        for path in files:
            try:
                with safe_open(path, framework="pt") as file:
                    self._file_of |= dict.fromkeys(file.keys(), path)
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{path} cannot be read ({error}); fetch it again.") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._file_of[name], framework="pt") as file:
            return file.get_tensor(name)


class _Extended(Mapping[str, Tensor]):
    """The tensors of a model with a head of its own and rows for further ids."""

    def __init__(
        self, tensors: Mapping[str, Tensor], old_size: int, new_size: int, mask_id: int, unk_id: int, *, is_tied: bool
    ) -> None:
        self._tensors, self._new_ids, self._is_tied = tensors, range(old_size, new_size), is_tied
        self._mask_id, self._unk_id = mask_id, unk_id

    def __iter__(self) -> Iterator[str]:
        # Older files also hold the frequencies of the rotary phases, which follow from the base.
        yield from (name for name in self._tensors if not name.endswith("rotary_emb.inv_freq"))
        if self._is_tied and _HEAD not in self._tensors:
            yield _HEAD

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __getitem__(self, name: str) -> Tensor:
        weight = self._tensors[_EMBEDDING if name == _HEAD and _HEAD not in self._tensors else name]
        if name not in (_EMBEDDING, _HEAD) or not self._new_ids:
            return weight
        mask_row = torch.zeros_like(weight[0]) if name == _HEAD else weight.float().mean(dim=0).to(weight.dtype)
        new_rows = [mask_row if index == self._mask_id else weight[self._unk_id] for index in self._new_ids]
        return torch.cat([weight, torch.stack(new_rows)])
