"""What Megatron would receive for FP8, field by field, and what is refused before anything starts."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from tiny import tiny_config

from megadiff import accelerations
from megadiff.models.config import DenoiserConfig
from megadiff.models.denoiser import transformer_config
from megadiff.models.fp8 import ROW_MULTIPLE, Fp8Config, Fp8Recipe
from megadiff.parallel.groups import ParallelConfig

NO_FP8 = {
    "fp8": None,
    "fp8_param": False,
    "fp8_margin": 0,
    "fp8_amax_history_len": 1,
    "fp8_amax_compute_algo": "most_recent",
    "fp8_wgrad": True,
    "fp8_dot_product_attention": False,
    "fp8_multi_head_attention": False,
    "tp_only_amax_red": False,
    "first_last_layers_bf16": False,
    "num_layers_at_start_in_bf16": 1,
    "num_layers_at_end_in_bf16": 1,
}
BF16_LAYERS: dict[str, Any] = {
    "first_last_layers_bf16": True,
    "num_layers_at_start_in_bf16": 2,
    "num_layers_at_end_in_bf16": 3,
}
DELAYED: dict[str, Any] = {
    "margin": 1,
    "amax_history_len": 1024,
    "amax_compute_algo": "max",
    "tp_only_amax_red": True,
}


@pytest.mark.parametrize(
    "impl, fp8, changed",
    [
        ("local", None, {"transformer_impl": "local"}),
        ("transformer_engine", None, {"transformer_impl": "transformer_engine"}),
        ("transformer_engine", Fp8Config(), {"fp8": "hybrid", "fp8_recipe": "tensorwise"}),
        (
            "transformer_engine",
            Fp8Config(recipe="blockwise", format="e4m3", param_gather=True, **BF16_LAYERS),
            {"fp8": "e4m3", "fp8_recipe": "blockwise", "fp8_param": True, **BF16_LAYERS},
        ),
        ("transformer_engine", Fp8Config(recipe="mxfp8"), {"fp8": "hybrid", "fp8_recipe": "mxfp8"}),
        (
            "transformer_engine",
            Fp8Config(recipe="delayed", **DELAYED),
            {
                "fp8": "hybrid",
                "fp8_recipe": "delayed",
                "fp8_margin": 1,
                "fp8_amax_history_len": 1024,
                "fp8_amax_compute_algo": "max",
                "tp_only_amax_red": True,
            },
        ),
        # Emulated: Megatron opens no FP8 context, but says which layers stay as they are.
        ("local", Fp8Config(**BF16_LAYERS), {"fp8": None, **BF16_LAYERS}),
    ],
)
def test_megatron_receives_each_field(impl: Any, fp8: Fp8Config | None, changed: dict[str, Any]) -> None:
    config = transformer_config(DenoiserConfig(), ParallelConfig(), torch.bfloat16, impl, fp8)
    for name, expected in (NO_FP8 | changed).items():
        assert getattr(config, name) == expected, name


@pytest.mark.parametrize("recipe", ROW_MULTIPLE)
def test_rows_are_multiples_of_what_megatron_says(recipe: Fp8Recipe) -> None:
    from megatron.core.enums import Fp8Recipe as MegatronRecipe
    from megatron.core.fp8_utils import get_fp8_align_size

    assert ROW_MULTIPLE[recipe] == get_fp8_align_size(MegatronRecipe(recipe))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"recipe": "rowwise"}, r"fp8.recipe is 'rowwise', but must be one of delayed, tensorwise, blockwise, mxfp8"),
        ({"num_layers_at_start_in_bf16": -1}, r"fp8.num_layers_at_start_in_bf16 is -1, but must be at least 0"),
        ({"margin": -1, "recipe": "delayed"}, r"fp8.margin is -1, but must be at least 0"),
        ({"amax_history_len": 0, "recipe": "delayed"}, r"fp8.amax_history_len is 0, but must be at least 1"),
        *(
            ({"recipe": recipe, "wgrad": False}, r"fp8.wgrad is false, but Transformer Engine has no such setting")
            for recipe in ROW_MULTIPLE
        ),
        ({"recipe": "delayed", "first_last_layers_bf16": True}, r"first_last_layers_bf16 is true, but .*delayed"),
        *(
            ({name: value}, rf"fp8.{name} is {value}, but only fp8.recipe delayed reads it, not tensorwise")
            for name, value in DELAYED.items()
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Fp8Config(**settings)


MODEL = DenoiserConfig(num_layers=4, hidden_size=64, num_attention_heads=4)
TWO_BY_TWO = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True, context_parallel_size=2)


@pytest.mark.parametrize(
    "fp8, precision, model, parallel, num_tokens, message",
    [
        (
            {},
            "fp8",
            {},
            ParallelConfig(),
            72,
            r"a rank has 72 tokens of a micro-batch .*tensorwise need a multiple of 16",
        ),
        ({}, "fp8", {}, TWO_BY_TWO, 96, r"a rank has 24 tokens of a micro-batch"),
        ({"recipe": "mxfp8"}, "fp8", {}, TWO_BY_TWO, 192, r"a rank has 48 tokens .*mxfp8 need a multiple of 32"),
        ({}, "fp8", {"hidden_size": 72}, ParallelConfig(), 64, r"a rank has 72 columns of a row \(model.hidden_size\)"),
        ({}, "fp8", {"num_query_groups": 1, "hidden_size": 80}, TWO_BY_TWO, 64, r"a rank has 40 outputs of attention"),
        ({}, "fp8", {"hidden_size": 32, "num_query_groups": 2}, TWO_BY_TWO, 64, r""),
        ({}, "fp8", {"ffn_hidden_size": 40}, ParallelConfig(), 64, r"a rank has 40 columns of the feed-forward layer"),
        ({"param_gather": True}, "fp8", {}, ParallelConfig(), 64, r"param_gather .*parallel.use_distributed_optimizer"),
        (
            {"param_gather": True, "recipe": "mxfp8"},
            "fp8",
            {},
            ParallelConfig(use_distributed_optimizer=True),
            64,
            r"param_gather is true, but with fp8.recipe mxfp8",
        ),
        ({"recipe": "blockwise"}, "fp8-emulated", {}, ParallelConfig(), 1, r"blockwise, but .*knows tensorwise alone"),
        ({"param_gather": True}, "fp8-emulated", {}, ParallelConfig(), 1, r"param_gather .*keeps parameters in bf16"),
        (
            {"first_last_layers_bf16": True, "num_layers_at_end_in_bf16": 3},
            "fp8-emulated",
            {},
            ParallelConfig(pipeline_model_parallel_size=2),
            1,
            r"num_layers_at_end_in_bf16 is 3, but must be at most the 2 layer\(s\) that model.num_layers 4",
        ),
    ],
)
def test_what_does_not_divide_or_fit_is_refused(
    fp8: dict[str, Any], precision: Any, model: dict[str, Any], parallel: ParallelConfig, num_tokens: int, message: str
) -> None:
    config, sizes = Fp8Config(**fp8), dataclasses.replace(MODEL, **model)
    if not message:
        config.check(precision, sizes, parallel, num_tokens=num_tokens)
        return
    with pytest.raises(ValueError, match=message):
        config.check(precision, sizes, parallel, num_tokens=num_tokens)
    config.check("bf16", sizes, parallel, num_tokens=num_tokens)


@pytest.mark.parametrize(
    "ends, in_fp8",
    [
        ({}, [4, 4]),
        ({"first_last_layers_bf16": True}, [3, 3]),
        ({"first_last_layers_bf16": True, "num_layers_at_start_in_bf16": 3}, [2, 2]),
    ],
)
def test_layers_in_fp8_are_those_of_each_stage(ends: dict[str, Any], in_fp8: list[int]) -> None:
    """Two virtual stages of two layers each: the first rank has layers 0, 1, 4, 5, the second 2, 3, 6, 7."""
    model = dataclasses.replace(MODEL, num_layers=8)
    parallel = ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
    assert Fp8Config(**ends).layers_in_fp8(model, parallel) == in_fp8


@pytest.mark.parametrize("impl", ["auto", "local", "transformer_engine"])
@pytest.mark.parametrize("reason", ["", "no CUDA device"])
def test_layers_are_transformer_engines_where_they_can_and_must(
    monkeypatch: pytest.MonkeyPatch, impl: Any, reason: str
) -> None:
    monkeypatch.setattr(accelerations, "why_no_transformer_engine", lambda: reason)
    monkeypatch.setattr(accelerations, "why_no_fp8", lambda recipe: reason and f"{reason} for {recipe}")
    model = DenoiserConfig(transformer_impl=impl)

    def resolved(precision: Any) -> str:
        return model.resolved_transformer_impl(precision, "tensorwise")

    if impl == "transformer_engine" and reason:
        with pytest.raises(ValueError, match=r"cannot run here \(no CUDA device\): choose local, or auto"):
            resolved("bf16")
    else:
        assert resolved("bf16") == ("local" if impl == "local" or reason else "transformer_engine")
    if impl == "local":
        with pytest.raises(ValueError, match=r"transformer_impl is local, but training.precision fp8 is computed by"):
            resolved("fp8")
    elif reason:
        with pytest.raises(ValueError, match=r"fp8 with fp8.recipe tensorwise, .*\(no CUDA device for tensorwise\)"):
            resolved("fp8")
    else:
        assert resolved("fp8") == "transformer_engine"
    if impl == "transformer_engine":
        with pytest.raises(ValueError, match=r"fp8-emulated rounds the products of local layers"):
            resolved("fp8-emulated")
        with pytest.raises(ValueError, match=r"TF32, but training.precision is fp32: choose local or auto, or bf16"):
            resolved("fp32")
    else:
        assert resolved("fp8-emulated") == resolved("fp32") == "local"


def test_a_run_without_the_hardware_ends_before_anything_starts(corpus_dir: Any) -> None:
    config = tiny_config(corpus_dir, training={"precision": "fp8"})
    assert config.used_fp8 == Fp8Config() and tiny_config(corpus_dir).used_fp8 is None
    with pytest.raises(ValueError, match=r"training.precision is fp8 .*cannot run here \(no CUDA device\)"):
        config.check(1)
    config.check_layout(1)  # evaluation computes in fp32
    offloaded = tiny_config(
        corpus_dir,
        training={"precision": "fp8"},
        fp8={"param_gather": True},
        optimizer={"optimizer_cpu_offload": True, "cpu_adam": "torch"},
    )
    with pytest.raises(ValueError, match=r"param_gather is true, but .*optimizer_cpu_offload is on"):
        offloaded.check_fp8()
    with pytest.raises(ValueError, match=r"training.precision is 'fp4', but must be one of bf16, fp32, fp8, fp8-emul"):
        tiny_config(corpus_dir, training={"precision": "fp4"})
