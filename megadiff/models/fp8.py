"""FP8 products of the layers: which format, how it is scaled, which layers stay in bf16, and what has to divide.

Numbers and words only, under Megatron's names without their prefix `fp8_`. Embedding, attention, norms, output layer
and loss are never in FP8.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from megadiff.fields import require, require_choices

if TYPE_CHECKING:
    from megadiff.models.config import DenoiserConfig
    from megadiff.parallel.groups import ParallelConfig

Precision = Literal["bf16", "fp32", "fp8", "fp8-emulated"]
"""What training computes in."""
Fp8Format = Literal["hybrid", "e4m3"]
Fp8Recipe = Literal["delayed", "tensorwise", "blockwise", "mxfp8"]

ROW_MULTIPLE: dict[Fp8Recipe, int] = {"delayed": 16, "tensorwise": 16, "blockwise": 16, "mxfp8": 32}
"""What the sides of every matrix in an FP8 product are multiples of; `get_fp8_align_size` of Megatron-Core 0.16.1."""

_OF_DELAYED_SCALING = ("margin", "amax_history_len", "amax_compute_algo", "tp_only_amax_red")


def parameter_precision(precision: Precision) -> Literal["bf16", "fp32"]:
    """Of parameters and activations: FP8 is what linear layers round to, for their products alone."""
    return "fp32" if precision == "fp32" else "bf16"


@dataclass(frozen=True, kw_only=True)
class Fp8Config:
    """FP8 products, with training.precision fp8 or fp8-emulated."""

    format: Fp8Format = "hybrid"
    """hybrid: gradients in E5M2, inputs and weights in E4M3; e4m3: all in E4M3."""
    recipe: Fp8Recipe = "tensorwise"
    """How tensors are scaled: as a whole by their own maximum (tensorwise) or by that of steps before (delayed), or in
    blocks (blockwise; mxfp8 on Blackwell). fp8-emulated knows tensorwise."""
    first_last_layers_bf16: bool = False
    """Keep the first and the last layers in bf16; not with recipe delayed."""
    num_layers_at_start_in_bf16: int = 1
    """So many at the start of the model, with first_last_layers_bf16."""
    num_layers_at_end_in_bf16: int = 1
    """And so many at its end."""
    param_gather: bool = False
    """Keep the matrices of the layers in FP8 and gather them so after an update; needs training.precision fp8 and
    parallel.use_distributed_optimizer."""
    margin: int = 0
    """Recipe delayed: scale to the largest number divided by 2^margin."""
    amax_history_len: int = 1
    """Recipe delayed: steps whose maxima are remembered."""
    amax_compute_algo: Literal["most_recent", "max"] = "most_recent"
    """Recipe delayed: which of the remembered maxima counts."""
    wgrad: bool = True
    """Compute weight gradients in FP8, too. False is refused, for Transformer Engine would ignore it."""
    tp_only_amax_red: bool = False
    """Recipe delayed: agree on maxima over tensor-parallel ranks alone, not over all that hold the same layers."""

    def __post_init__(self) -> None:
        require_choices(self, "fp8")
        for name in ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16", "margin"):
            require(getattr(self, name) >= 0, f"fp8.{name}", getattr(self, name), "be at least 0")
        require(self.amax_history_len >= 1, "fp8.amax_history_len", self.amax_history_len, "be at least 1")
        if not self.wgrad:
            raise ValueError(
                "fp8.wgrad is false, but Transformer Engine has no such setting and would compute weight gradients in "
                "FP8 all the same: leave it out, or choose training.precision bf16"
            )
        if self.recipe == "delayed":
            if self.first_last_layers_bf16:
                raise ValueError(
                    "fp8.first_last_layers_bf16 is true, but with fp8.recipe delayed all layers are in FP8: set it "
                    "false, or choose another recipe"
                )
            return
        defaults = {field.name: field.default for field in fields(self)}
        for name in _OF_DELAYED_SCALING:
            if getattr(self, name) != defaults[name]:
                raise ValueError(
                    f"fp8.{name} is {getattr(self, name)}, but only fp8.recipe delayed reads it, not {self.recipe}: "
                    "leave it out, or choose delayed"
                )

    @property
    def bf16_layers(self) -> dict[str, Any]:
        """Which layers stay in bf16, as fields of Megatron's `TransformerConfig`."""
        return {
            "first_last_layers_bf16": self.first_last_layers_bf16,
            "num_layers_at_start_in_bf16": self.num_layers_at_start_in_bf16,
            "num_layers_at_end_in_bf16": self.num_layers_at_end_in_bf16,
        }

    @property
    def megatron_settings(self) -> dict[str, Any]:
        """All of it as fields of Megatron's `TransformerConfig`, for Transformer Engine's layers."""
        return {
            "fp8": self.format,
            "fp8_recipe": self.recipe,
            "fp8_param": self.param_gather,
            "fp8_margin": self.margin,
            "fp8_amax_history_len": self.amax_history_len,
            "fp8_amax_compute_algo": self.amax_compute_algo,
            "fp8_wgrad": self.wgrad,
            "fp8_dot_product_attention": False,
            "fp8_multi_head_attention": False,
            "tp_only_amax_red": self.tp_only_amax_red,
            **self.bf16_layers,
        }

    def layers_in_fp8(self, model: DenoiserConfig, parallel: ParallelConfig) -> list[int]:
        """How many layers of each pipeline rank have FP8 products, over all its virtual stages."""
        virtual_stages, layers = parallel.num_virtual_stages, model.layers_per_stage(parallel)
        stage_of_layer = [
            stage
            for _ in range(virtual_stages)
            for stage, num_layers in enumerate(layers)
            for _ in range(num_layers // virtual_stages)
        ]
        if self.first_last_layers_bf16:
            end = model.num_layers - self.num_layers_at_end_in_bf16
            stage_of_layer = stage_of_layer[self.num_layers_at_start_in_bf16 : end]
        return [stage_of_layer.count(stage) for stage in range(len(layers))]

    def check(self, precision: Precision, model: DenoiserConfig, parallel: ParallelConfig, *, num_tokens: int) -> None:
        """Check that FP8 is what `precision` needs, and that its products divide.

        Args:
            num_tokens: S·B of a micro-batch before it is divided.

        Raises:
            ValueError: naming the first thing that does not fit.
        """
        if precision not in ("fp8", "fp8-emulated"):
            return
        self._check_bf16_layers(model, parallel)
        if precision == "fp8-emulated":
            if self.recipe != "tensorwise":
                raise ValueError(
                    f"fp8.recipe is {self.recipe}, but training.precision fp8-emulated knows tensorwise alone: choose "
                    "that"
                )
            if self.param_gather:
                raise ValueError(
                    "fp8.param_gather is true, but training.precision fp8-emulated keeps parameters in bf16: set it "
                    "false"
                )
            return
        if self.param_gather and not parallel.use_distributed_optimizer:
            raise ValueError(
                "fp8.param_gather is true, but nothing is gathered without a distributed optimizer: set "
                "parallel.use_distributed_optimizer true"
            )
        if self.param_gather and self.recipe == "mxfp8":
            raise ValueError(
                "fp8.param_gather is true, but with fp8.recipe mxfp8 Megatron gathers parameters in the buffer of the "
                "gradients, which is not supported here: set it false, or choose another recipe"
            )
        self._check_multiples(model, parallel, num_tokens)

    def _check_bf16_layers(self, model: DenoiserConfig, parallel: ParallelConfig) -> None:
        most = model.num_layers // parallel.pipeline_model_parallel_size  # Megatron's own limit
        for name in ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16") if self.first_last_layers_bf16 else ():
            if getattr(self, name) > most:
                raise ValueError(
                    f"fp8.{name} is {getattr(self, name)}, but must be at most the {most} layer(s) that "
                    f"model.num_layers {model.num_layers} has per pipeline stage: lower it"
                )

    def _check_multiples(self, model: DenoiserConfig, parallel: ParallelConfig, num_tokens: int) -> None:
        tp, multiple = parallel.tensor_model_parallel_size, ROW_MULTIPLE[self.recipe]
        query, key_value = model.num_attention_heads * model.head_size, model.query_groups * model.head_size
        divided = parallel.context_parallel_size * (tp if parallel.sequence_parallel else 1)
        sides = {
            "tokens of a micro-batch (training.micro_batch_size x the model's sequence length)": num_tokens // divided,
            "columns of a row (model.hidden_size)": model.hidden_size,
            "outputs of attention (model.num_attention_heads x head size)": query // tp,
            "queries, keys and values": (query + 2 * key_value) // tp,
            "columns of the feed-forward layer (model.ffn_hidden_size)": model.ffn_size // tp,
        }
        for name, size in sides.items():
            if size % multiple:
                raise ValueError(
                    f"a rank has {size} {name}, but FP8 products by fp8.recipe {self.recipe} need a multiple of "
                    f"{multiple}: change it, or how it is divided"
                )
