"""Size and kind of the denoiser: what is chosen, what follows from it, and which layouts it divides over.

Numbers and words only: whoever counts or converts a model needs neither Megatron-Core nor a device.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from megadiff import accelerations
from megadiff.fields import require, require_choices
from megadiff.models.parametrization import ParametrizationName, Scales

if TYPE_CHECKING:
    from megadiff.models.fp8 import Fp8Recipe, Precision
    from megadiff.parallel.groups import ParallelConfig

AttentionBackend = Literal["local", "transformer_engine"]
"""Whose kernels compute core attention: torch's, or Transformer Engine's."""

TransformerImpl = Literal["local", "transformer_engine"]
"""Whose linear layers and norms make up the layers: Megatron's and torch's, or Transformer Engine's."""

TRANSFORMER_ENGINE_MASKS = {"causal", "documents"}
"""What attention masks may have for Transformer Engine's kernels to know them."""

VOCABULARY_MULTIPLE = 1024
"""The vocabulary is padded to a multiple of this whatever the layout is, so that checkpoints fit any layout."""


@dataclass(frozen=True, kw_only=True)
class DenoiserConfig:
    """Size of the denoiser."""

    num_layers: int = 12
    """Transformer layers."""
    hidden_size: int = 768
    """Width of the residual stream."""
    num_attention_heads: int = 12
    """Attention heads per layer."""
    num_query_groups: int | None = None
    """Key-value heads per layer (grouped-query attention); as many as heads by default."""
    ffn_hidden_size: int | None = None
    """Width of the feed-forward layer; four times hidden_size by default."""
    activation: Literal["squared_relu", "swiglu"] = "squared_relu"
    """Of the feed-forward layer: ReLU², or SiLU of one half times the other (two matrices in, as in Llama)."""
    qk_layernorm: bool = True
    """Normalise queries and keys, head by head."""
    rotary_base: int = 10000
    """Base of the rotary frequencies."""
    layernorm_epsilon: float = 1e-6
    """Added to the mean square in every norm."""
    init_std: float = 0.02
    """Standard deviation of the initial matrices; with parametrization complete_p of the embedding, and that of the
    layers is 20/√hidden_size times as large."""
    parametrization: ParametrizationName = "standard"
    """How initial weights, residual branches, logits and learning rates follow the model's size: complete_p scales them
    so that settings found on a small model are those of a large one (docs/optimizer.md); a part of the model."""
    log_snr_conditioning: bool = False
    """Tell the denoiser the noise level of every position, by a vector added to its input; a part of the model, and
    only for objectives with noise levels."""
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """Whose linear layers and norms make up the layers: Megatron's and torch's (local) or Transformer Engine's, fused;
    auto takes the latter on GPUs where it is installed, in bf16. Checkpoints are the same; training.precision fp8 needs
    it."""
    attention_backend: Literal["auto", "local", "transformer_engine"] = "auto"
    """Whose kernels compute attention: torch's (local) or Transformer Engine's; auto takes the latter on GPUs where it
    is installed and the layout allows. Changes memory and speed, never the result."""
    fused_head_loss: bool = False
    """Compute output layer and loss in one, on rows of nonzero weight, so that the logits of a micro-batch never exist;
    faster under masked noise, where half of the rows have none. Changes memory and speed, never the result."""

    def __post_init__(self) -> None:
        for name in ("num_layers", "hidden_size", "num_attention_heads", "query_groups", "ffn_size", "rotary_base"):
            setting = {"query_groups": "num_query_groups", "ffn_size": "ffn_hidden_size"}.get(name, name)
            require(getattr(self, name) >= 1, f"model.{setting}", getattr(self, name), "be at least 1")
        for name in ("layernorm_epsilon", "init_std"):
            require(0 < getattr(self, name) < math.inf, f"model.{name}", getattr(self, name), "be positive and finite")
        require_choices(self, "model")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"model.hidden_size {self.hidden_size} does not divide into model.num_attention_heads "
                f"{self.num_attention_heads} heads: choose a multiple"
            )
        if self.head_size % 2:
            raise ValueError(
                f"the head size model.hidden_size / model.num_attention_heads is {self.head_size}, but rotary phases "
                "need an even one: change either"
            )
        if self.num_attention_heads % self.query_groups:
            raise ValueError(
                f"model.num_attention_heads {self.num_attention_heads} does not divide into model.num_query_groups "
                f"{self.num_query_groups} groups: choose a divisor"
            )

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def query_groups(self) -> int:
        return self.num_attention_heads if self.num_query_groups is None else self.num_query_groups

    @property
    def ffn_size(self) -> int:
        return 4 * self.hidden_size if self.ffn_hidden_size is None else self.ffn_hidden_size

    @property
    def is_gated(self) -> bool:
        """Whether the feed-forward layer multiplies one half of its width by the other."""
        return self.activation == "swiglu"

    @classmethod
    def of_manifest(cls, settings: dict[str, Any]) -> DenoiserConfig:
        """The settings in a manifest; what an older version could not choose was as the default is."""
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in settings.items() if name in known})

    @property
    def architecture(self) -> dict[str, Any]:
        """What gives weights their shapes and their meaning; the other settings say how they begin or are computed."""
        return {
            "num_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "num_attention_heads": self.num_attention_heads,
            "num_query_groups": self.query_groups,
            "ffn_hidden_size": self.ffn_size,
            "activation": self.activation,
            "qk_layernorm": self.qk_layernorm,
            "rotary_base": self.rotary_base,
            "layernorm_epsilon": self.layernorm_epsilon,
            "parametrization": self.parametrization,
        }

    @property
    def scales(self) -> Scales:
        """Everything that follows from size and parametrisation."""
        return Scales.of(self.parametrization, num_layers=self.num_layers, hidden_size=self.hidden_size)

    def check_layout(self, parallel: ParallelConfig) -> None:
        """Check that the model divides over a layout.

        Raises:
            ValueError: heads, feed-forward width or layers do not divide.
        """
        tensor_parallel_size = parallel.tensor_model_parallel_size
        for name, value in (
            ("model.num_attention_heads", self.num_attention_heads),
            ("model.num_query_groups", self.query_groups),
            ("model.ffn_hidden_size", self.ffn_size),
            ("a vocabulary padded to multiples of", VOCABULARY_MULTIPLE),
        ):
            if value % tensor_parallel_size:
                raise ValueError(
                    f"{name} {value} does not divide over parallel.tensor_model_parallel_size "
                    f"{tensor_parallel_size}: choose a size that divides it"
                )
        self.layers_per_stage(parallel)

    def resolved_attention(
        self, parallel: ParallelConfig, *, mask_features: Iterable[str], half_precision: bool
    ) -> AttentionBackend:
        """Whose kernels compute attention on this machine.

        Args:
            mask_features: what the run's attention masks have, as its objective says.
            half_precision: whether the model computes in bf16.

        Raises:
            ValueError: Transformer Engine is asked for and is not there, or would change the result.
        """
        features = set(mask_features)
        unknown = features - TRANSFORMER_ENGINE_MASKS
        # Over context-parallel ranks it cuts each document into pieces of equal length, and so pads every document.
        padded = "documents" in features and parallel.context_parallel_size > 1
        usable = accelerations.has_transformer_engine_attention()
        if self.attention_backend == "auto":
            return "transformer_engine" if usable and half_precision and not padded and not unknown else "local"
        if self.attention_backend == "transformer_engine":
            if unknown:
                raise ValueError(
                    "model.attention_backend is transformer_engine, which knows no masks with "
                    f"{', '.join(sorted(unknown))}, as this objective needs: choose local, or auto"
                )
            if padded:
                raise ValueError(
                    "model.attention_backend transformer_engine would pad every document to divide it over "
                    f"parallel.context_parallel_size {parallel.context_parallel_size}: choose local, or one of "
                    "data.reset_at_document and context parallelism"
                )
            if not usable:
                raise ValueError(
                    "model.attention_backend is transformer_engine, but there is no CUDA device or no "
                    "transformer_engine package that can be imported: choose local, or auto"
                )
            if not half_precision:
                raise ValueError(
                    "model.attention_backend is transformer_engine, whose kernels compute in 16 bits, but "
                    "training.precision is fp32: choose local, or bf16"
                )
        return self.attention_backend

    def resolved_transformer_impl(self, precision: Precision, fp8_recipe: Fp8Recipe) -> TransformerImpl:
        """Whose linear layers and norms make up the layers on this machine.

        Raises:
            ValueError: Transformer Engine is asked for, or needed for `precision`, and cannot run here.
        """
        asked = self.transformer_impl
        if precision == "fp8":
            if asked == "local":
                raise ValueError(
                    "model.transformer_impl is local, but training.precision fp8 is computed by Transformer Engine's "
                    "layers: choose transformer_engine or auto, or fp8-emulated"
                )
            if reason := accelerations.why_no_fp8(fp8_recipe):
                raise ValueError(
                    f"training.precision is fp8 with fp8.recipe {fp8_recipe}, which cannot run here ({reason}): choose "
                    "bf16, another recipe, or fp8-emulated"
                )
            return "transformer_engine"
        if precision == "fp8-emulated":
            if asked == "transformer_engine":
                raise ValueError(
                    "model.transformer_impl is transformer_engine, but training.precision fp8-emulated rounds the "
                    "products of local layers: choose local or auto, or fp8"
                )
            return "local"
        if precision == "fp32":
            if asked == "transformer_engine":
                raise ValueError(
                    "model.transformer_impl is transformer_engine, whose products of fp32 numbers keep the 10 bits of "
                    "TF32, but training.precision is fp32: choose local or auto, or bf16"
                )
            return "local"
        reason = accelerations.why_no_transformer_engine()
        if asked == "transformer_engine" and reason:
            raise ValueError(
                f"model.transformer_impl is transformer_engine, which cannot run here ({reason}): choose local, or auto"
            )
        return "local" if asked == "local" or reason else "transformer_engine"

    def layers_per_stage(self, parallel: ParallelConfig) -> list[int]:
        """Layers of each pipeline rank, over all its virtual stages.

        Raises:
            ValueError: the layers do not divide.
        """
        num_stages, virtual_stages = parallel.pipeline_model_parallel_size, parallel.num_virtual_stages
        first, last = parallel.num_layers_in_first_pipeline_stage, parallel.num_layers_in_last_pipeline_stage
        equal_stages = num_stages - (first is not None) - (last is not None)
        left_over = self.num_layers - (first or 0) - (last or 0)
        if left_over % max(1, equal_stages) or left_over < equal_stages or (not equal_stages and left_over):
            raise ValueError(
                f"model.num_layers {self.num_layers} does not divide over parallel.pipeline_model_parallel_size "
                f"{num_stages}: {left_over} layer(s) are left for {equal_stages} equal stage(s) beside "
                f"parallel.num_layers_in_first_pipeline_stage {first} and ..._last_pipeline_stage {last}"
            )
        equal = left_over // max(1, equal_stages)
        layers = [equal] * num_stages
        layers[0], layers[-1] = first or layers[0], last or layers[-1]
        for stage, num_layers in enumerate(layers):
            if num_layers % virtual_stages:
                raise ValueError(
                    f"the {num_layers} layer(s) of pipeline stage {stage} do not divide over "
                    f"parallel.virtual_pipeline_model_parallel_size {virtual_stages}: change the number of stages"
                )
        if virtual_stages > 1 and not equal_stages:
            raise ValueError(
                f"parallel.num_layers_in_first_pipeline_stage {first} and ..._last_pipeline_stage {last} leave no "
                "other stage, which Megatron's virtual stages cannot count with: give only one of the two"
            )
        return layers


def padded_vocab_size(vocab_size: int) -> int:
    """Rows of the embedding and of the head for a vocabulary."""
    return -(-vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
