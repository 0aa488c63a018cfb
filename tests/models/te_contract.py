"""What megadiff, and Megatron-Core on its behalf, use of Transformer Engine, used on the skeleton of a release.

    python -m models.te_contract UNPACKED_WHEEL VERSION        # in a process of its own, from tests/

Arguments and names are not listed here: megadiff's own code runs, on every kind of layer, mask and recipe, and whatever
it asks for that the release does not have is an error. `REACHED` says what must have been asked for by then, so that
nothing passes because it was left out. `NAMES` lists what is not called, but read or written on the package's objects.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import sys
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from models import te_skeleton

from megadiff.machine.versions import major_minor

VOCAB, LENGTH = 400, 32
_DPA = "pytorch.attention.dot_product_attention.dot_product_attention.DotProductAttention"
REACHED = {
    "pytorch.module.layernorm_linear.LayerNormLinear.__init__",
    "pytorch.module.layernorm_linear.LayerNormLinear.forward",
    "pytorch.module.linear.Linear.__init__",
    "pytorch.module.linear.Linear.forward",
    f"{_DPA}.__init__",
    f"{_DPA}.forward",
    "pytorch.quantization.fp8_autocast",
    "pytorch.quantization.fp8_model_init",
    "pytorch.quantization.check_fp8_support",
    "pytorch.quantization.check_fp8_block_scaling_support",
    "pytorch.quantization.check_mxfp8_support",
    "pytorch.distributed.checkpoint",
    "pytorch.cpu_offload.get_cpu_offload_context",
    "pytorch.optimizers.fused_adam.FusedAdam.__init__",
    "pytorch.optimizers.fused_adam.FusedAdam.step",
    "pytorch.tensor.utils.cast_master_weights_to_fp8",
    "pytorch.tensor.utils.post_all_gather_processing",
    "pytorch.tensor.utils.replace_raw_data",
    "pytorch.quantized_tensor.QuantizedTensor.dequantize",
    "DelayedScaling",
    "Float8CurrentScaling",
    "Float8BlockScaling",
    "MXFP8BlockScaling",
}
"""Qualified names below the package, and recipes by their own."""
MASKS = {"no_mask", "causal", "padding", "padding_causal"}
"""Of attention to whole sequences and to packed documents."""
IGNORED = {"DelayedScaling": {"params_dtype", "device", "override_linear_precision"}}
"""What Megatron hands to recipes that is no field of theirs; for the last, `fp8.wgrad` false is refused."""
NAMES = {
    "megadiff/models/te_linears.py": {
        "fuse_wgrad_accumulation": "pytorch/module/base.py",
        "get_extra_state": "pytorch/module/base.py",
        "set_extra_state": "pytorch/module/base.py",
        "layer_norm_": "pytorch/module/layernorm_linear.py",
    },
    "megadiff/training/adam.py": {
        name: "pytorch/optimizers/fused_adam.py" for name in ("exp_avg", "exp_avg_sq", "step")
    },
    "megadiff/models/weights.py": {"get_high_precision_init_val": "pytorch/module/base.py"},
    "tests/models/te_stand_in.py": {
        "main_grad": "pytorch/module/linear.py",
        "grad_added_to_main_grad": "pytorch/module/linear.py",
        "layer_norm_weight": "pytorch/module/layernorm_linear.py",
    },
}
"""By file of ours: names in it, and the file of the package that has them, too."""
RETURNS = "Tuple[bool, str]"
"""What the checks of FP8 give, of which we read the second."""


def hold(root: Path, version: str) -> None:
    """Use everything, on the release whose wheel is unpacked at `root`.

    Raises:
        Exception: whatever the package would raise, and AssertionError for what `REACHED`, `NAMES` and others list.
    """
    te_skeleton.install(root, version)
    accelerations_are_found(version)
    fused_adam_is_built_and_steps()
    tensors_in_fp8_are_filled_gathered_and_read()
    models_are_built_and_run()
    package = root / te_skeleton.PACKAGE
    seen = {name.removeprefix(f"{te_skeleton.PACKAGE}.") for name in te_skeleton.SEEN.calls}
    assert seen >= REACHED, f"never asked for: {sorted(REACHED - seen)}"
    ignored = {name: names for name, names in te_skeleton.SEEN.ignored.items() if names}
    assert ignored == IGNORED, f"recipes ignore {ignored}"
    for call in te_skeleton.SEEN.calls[f"{te_skeleton.PACKAGE}.pytorch.quantization.fp8_model_init"]:
        assert call["recipe"] is not None and call["preserve_high_precision_init_val"], (
            "Megatron leaves out what is not there"
        )
    masks = {call["attn_mask_type"] for call in te_skeleton.SEEN.calls[f"{te_skeleton.PACKAGE}.{_DPA}.forward"]}
    assert masks == MASKS, f"masks are {masks}"
    from transformer_engine.pytorch.constants import AttnMaskTypes

    assert set(AttnMaskTypes) >= MASKS, f"masks of the package are {AttnMaskTypes}"
    names_are_there(package)
    tensors_in_fp8_are_moved_as_the_stand_in_moves_them(package, version)


def accelerations_are_found(version: str) -> None:
    """What `auto` and the doctor ask."""
    from megadiff import accelerations

    with (
        patch("torch.cuda.is_available", lambda: True),
        patch("torch.cuda.get_device_capability", lambda: (10, 0)),
        patch("torch.version.cuda", "13.0"),
        patch.object(accelerations, "version", {"transformer_engine": version}.get),
    ):
        assert not accelerations.why_no_transformer_engine(), accelerations.why_no_transformer_engine()
        assert not accelerations.transformer_engine_concern(), accelerations.transformer_engine_concern()
        for recipe in accelerations.FP8_CHECK:
            assert not accelerations.why_no_fp8(recipe), accelerations.why_no_fp8(recipe)
        assert accelerations.resolve_adam("auto") == "transformer_engine"


def fused_adam_is_built_and_steps() -> None:
    from megadiff.training.adam import fused_adam, initialize_state

    optimizer = fused_adam([{"params": [torch.zeros(3)]}, {"params": []}], "transformer_engine")
    initialize_state(optimizer)
    optimizer.step()


def tensors_in_fp8_are_filled_gathered_and_read() -> None:
    """What Megatron's data parallelism and distributed optimizer, and our writer, do with parameters in FP8."""
    from megatron.core import fp8_utils

    tensor: Any = object()
    fp8_utils.modify_underlying_storage(tensor, torch.zeros(1))
    fp8_utils.quantize_param_shard([tensor], [torch.zeros(1)], [0], None)
    fp8_utils.post_all_gather_processing([tensor])
    made = torch.zeros(2).as_subclass(fp8_utils.FP8_TENSOR_CLASS)
    assert fp8_utils.is_float8tensor(made)
    fp8_utils.dequantize_fp8_tensor(made)


def models_are_built_and_run() -> None:
    """Layers of both kinds under all recipes, attention under all layouts, recomputation of all kinds."""
    from megadiff.models.config import DenoiserConfig
    from megadiff.models.fp8 import ROW_MULTIPLE, Fp8Config
    from megadiff.parallel.groups import ParallelConfig

    sizes = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4}
    plain = DenoiserConfig(**sizes)
    gated = DenoiserConfig(**sizes, activation="swiglu", num_query_groups=2, qk_layernorm=False)
    forward_and_backward(plain, ParallelConfig(), None)
    forward_and_backward(gated, ParallelConfig(), None)
    for recipe in ROW_MULTIPLE:
        for fp8_format in ("hybrid", "e4m3"):
            fp8 = Fp8Config(recipe=recipe, format=fp8_format)  # type: ignore[arg-type]
            forward_and_backward(plain, ParallelConfig(), fp8)
        forward_and_backward(gated, ParallelConfig(), dataclasses.replace(fp8, param_gather=True))
    delayed = Fp8Config(recipe="delayed", margin=1, amax_history_len=16, amax_compute_algo="max", tp_only_amax_red=True)
    forward_and_backward(plain, ParallelConfig(), delayed)
    for recomputed in (
        ParallelConfig(recompute_granularity="full"),
        ParallelConfig(recompute_granularity="full", recompute_method="block"),
        ParallelConfig(recompute_granularity="selective", recompute_modules=("core_attn", "mlp")),
    ):
        for used in (None, Fp8Config(), delayed):
            forward_and_backward(plain, recomputed, used)


def forward_and_backward(model: Any, parallel: Any, fp8: Any) -> None:
    from megadiff.diffusion.layout import AttentionLayout, document_numbers
    from megadiff.models.denoiser import Denoiser
    from megadiff.parallel import groups as parallel_groups

    groups = parallel_groups.initialize(parallel)
    denoiser = Denoiser(
        model,
        groups,
        vocab_size=VOCAB,
        sequence_length=LENGTH,
        seed=3,
        dtype=torch.bfloat16,
        attention="transformer_engine",
        transformer_impl="transformer_engine",
        fp8=fp8,
    )
    over_context_ranks(denoiser)
    tokens = torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    position = torch.arange(LENGTH).expand(2, LENGTH)
    documents = document_numbers(tokens % 10, end_id=2)
    for kind in ("bidirectional", "causal"):
        for documents_BS in (None, documents):
            layout = AttentionLayout(kind, documents_BS)  # type: ignore[arg-type]
            denoiser(tokens, position, layout).float().sum().backward()
    denoiser.set_is_first_microbatch()
    denoiser.sharded_state_dict(metadata={"non_homogeneous_layers": True})
    parallel_groups.shutdown()


def over_context_ranks(denoiser: Any) -> None:
    """Attention as it is built where context is divided: only the constructor, for a rank alone has nobody to ask."""
    from megatron.core.extensions.transformer_engine import TEDotProductAttention
    from megatron.core.transformer.enums import AttnMaskType

    config = copy.copy(denoiser.config)
    config.context_parallel_size = 2
    TEDotProductAttention.cp_stream = object()
    TEDotProductAttention(config, 1, AttnMaskType.no_mask, "self", cp_comm_type="p2p")


def names_are_there(package: Path) -> None:
    """What is read or written by name is in our file and in the package's; checks give what we take."""
    ours = Path(__file__).parents[2]
    for path, names in NAMES.items():
        for name, theirs in names.items():
            assert name in (ours / path).read_text(), f"{path} has no {name} any more: take it off the list"
            assert name in words_of(package / theirs), f"{theirs} has no {name}, which {path} relies on"
    from megadiff.accelerations import FP8_CHECK

    functions = ast.walk(ast.parse((package / "pytorch" / "quantization.py").read_text()))
    returns = {x.name: ast.unparse(x.returns) for x in functions if isinstance(x, ast.FunctionDef) and x.returns}
    for check in FP8_CHECK.values():
        assert returns.get(check) == RETURNS, f"{check} returns {returns.get(check)}"


def tensors_in_fp8_are_moved_as_the_stand_in_moves_them(package: Path, version: str) -> None:
    """`te_stand_in.QuantizedTensor`, by which saving is tested, stays in FP8 on the host as they do from 2.16 on."""
    [tensor] = [
        node
        for node in ast.parse((package / "pytorch" / "quantized_tensor.py").read_text()).body
        if isinstance(node, ast.ClassDef) and node.name == "QuantizedTensor"
    ]
    stays_when_moved = "func == torch.ops.aten._to_copy.default" in ast.unparse(tensor)
    assert stays_when_moved is (major_minor(version) >= (2, 16)), f"stays when moved: {stays_when_moved}"


def words_of(path: Path) -> set[str]:
    """Attributes, functions and texts of a source; of texts, the parts before the last word, too: layer_norm_weight."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Attribute(attr=name) | ast.FunctionDef(name=name) | ast.Constant(value=str(name)):
                found |= {name, name[: name.rfind("_") + 1]}
    return found


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    hold(Path(sys.argv[1]), sys.argv[2])
    print("held")
