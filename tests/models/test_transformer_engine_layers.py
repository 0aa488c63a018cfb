"""Transformer Engine's layers, by stand-ins: the same model, the same initial weights and names in checkpoints."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_ranks
from models import te_stand_in
from torch import Tensor

from megadiff.models.config import DenoiserConfig
from megadiff.models.fp8 import Fp8Config

VOCAB, LENGTH = 400, 8
MODELS = {
    "squared ReLU": DenoiserConfig(num_layers=3, hidden_size=32, num_attention_heads=4, init_std=0.3),
    "gated, complete_p": DenoiserConfig(
        num_layers=3,
        hidden_size=32,
        num_attention_heads=4,
        ffn_hidden_size=48,
        activation="swiglu",
        qk_layernorm=False,
        parametrization="complete_p",
    ),
}


def by_either(model: DenoiserConfig, tensor: int, sequence_parallel: bool) -> dict[str, dict[str, Any]]:
    """Shards, logits and gradients of a model with local layers and with those of the stand-ins."""
    from megadiff.diffusion import AttentionLayout
    from megadiff.models.denoiser import Denoiser
    from megadiff.models.weights import canonical_shards
    from megadiff.models.whole import undivided
    from megadiff.parallel import groups as parallel_groups

    te_stand_in.install()
    groups = parallel_groups.initialize(
        parallel_groups.ParallelConfig(tensor_model_parallel_size=tensor, sequence_parallel=sequence_parallel)
    )
    tokens = torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    position = torch.arange(LENGTH).expand(2, LENGTH)
    found: dict[str, dict[str, Any]] = {}
    implementations: tuple[Any, ...] = ("local", "transformer_engine")
    denoisers = {
        name: Denoiser(model, groups, vocab_size=VOCAB, sequence_length=LENGTH, seed=3, transformer_impl=name)
        for name in implementations
    }
    for name, denoiser in denoisers.items():
        shards = {shard.key: shard for shard in canonical_shards(denoiser)}
        initial = {key: (s.global_offset, s.global_shape, s.data.detach().clone()) for key, s in shards.items()}
        state = denoiser.sharded_state_dict(metadata={"non_homogeneous_layers": True})
        other = {key: value.key for key, value in state.items() if "extra_state" in key}
        with torch.no_grad():
            shards["output_layer.weight"].data.normal_(generator=torch.Generator().manual_seed(1))
            for key, shard in shards.items():
                if len(shard.global_shape) == 1:
                    shard.data += 0.1 * len(key)
        for module in denoiser.modules():
            if getattr(module, "fuse_wgrad_accumulation", False):  # as Megatron's data parallelism prepares weights
                module.weight.main_grad = torch.zeros_like(module.weight, dtype=torch.float32)
                module.weight.grad_added_to_main_grad = False
        logits = denoiser(tokens, position, AttentionLayout())
        logits[..., 5].sum().backward()
        accumulated = {key for key, shard in shards.items() if getattr(shard.data, "grad_added_to_main_grad", False)}
        gradients = {
            key: (shard.data.main_grad if key in accumulated else shard.data.grad).clone()
            for key, shard in shards.items()
        }
        found[name] = {"initial": initial, "logits": logits.detach(), "gradients": gradients, "other": other}
        found[name]["accumulated"] = accumulated
    # What either saves, the other loads: tensors under the same names, and nothing else.
    saved = {shard.key: shard.data for shard in canonical_shards(denoisers["local"])}
    theirs = denoisers["transformer_engine"]
    whole = undivided(model, [theirs], groups, vocab_size=VOCAB)  # of the same parameters: what is loaded changes both
    with torch.no_grad():
        for shard in canonical_shards(theirs):
            shard.data.zero_()
    state = theirs.sharded_state_dict(metadata={"non_homogeneous_layers": True})
    theirs.load_state_dict({name: saved.get(value.key) for name, value in state.items()})
    found["transformer_engine"]["loaded"] = theirs(tokens, position, AttentionLayout()).detach()
    found["transformer_engine"]["whole"] = whole(tokens, position, AttentionLayout())
    found["transformer_engine"]["handed"] = te_stand_in.handed
    parallel_groups.shutdown()
    return found


@pytest.mark.parametrize("layout", [(1, False), (2, True)])
@pytest.mark.parametrize("name", MODELS)
def test_the_model_is_the_same_by_either(name: str, layout: tuple[int, bool]) -> None:
    ranks = run_ranks(layout[0], by_either, MODELS[name], *layout)
    columns = torch.cat([found["local"]["logits"] for found in ranks], dim=-1)
    for found in ranks:
        local, theirs = found["local"], found["transformer_engine"]
        assert local["initial"].keys() == theirs["initial"].keys()
        assert set(theirs["other"].values()) == set(local["other"].values())
        assert not local["accumulated"] and theirs["accumulated"] == {
            key for key, (_, shape, _) in local["initial"].items() if "layers" in key and len(shape) == 2
        }
        for key, (offset, shape, values) in local["initial"].items():
            their_offset, their_shape, their_values = theirs["initial"][key]
            assert (offset, shape) == (their_offset, their_shape) and torch.equal(values, their_values), key
            torch.testing.assert_close(theirs["gradients"][key], local["gradients"][key], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(theirs["logits"], local["logits"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(theirs["loaded"], local["logits"], rtol=1e-5, atol=1e-5)
        whole = theirs["whole"].transpose(0, 1)
        torch.testing.assert_close(whole, columns[..., :VOCAB], rtol=1e-5, atol=1e-5)
        for layer, settings in theirs["handed"].items():
            assert settings <= constructor_settings(layer), f"the real {layer} takes no such settings"


def constructor_settings(name: str) -> set[str]:
    """Keyword arguments of one of Megatron's Transformer Engine layers, read from its source: the package is absent."""
    source = Path(importlib.util.find_spec(te_stand_in.NAME).origin).read_text()  # type: ignore[arg-type, union-attr]
    [layer] = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef) and node.name == name]
    [init] = [node for node in layer.body if isinstance(node, ast.FunctionDef) and node.name == "__init__"]
    return {argument.arg for argument in init.args.kwonlyargs}


def layers_in_fp8(fp8: Fp8Config) -> dict[str, list[int]]:
    """The layers for which Megatron asks for FP8 while it builds and while it computes; -1: all at once."""
    from megatron.core.fp8_utils import is_first_last_bf16_layer
    from megatron.core.transformer import transformer_block

    from megadiff.diffusion import AttentionLayout
    from megadiff.models.denoiser import Denoiser
    from megadiff.parallel import groups as parallel_groups

    te_stand_in.install()
    asked: dict[str, list[int]] = {"building": [], "computing": []}

    def context(config: Any, layer: int = -1, is_init: bool = False) -> Any:
        enabled = (config.fp8_param if is_init else config.fp8) and not is_first_last_bf16_layer(config, layer)
        if enabled:
            asked["building" if is_init else "computing"].append(layer)
        return contextlib.nullcontext()

    transformer_block.get_fp8_context = context
    groups = parallel_groups.initialize(parallel_groups.ParallelConfig())
    denoiser = Denoiser(
        MODELS["squared ReLU"],
        groups,
        vocab_size=VOCAB,
        sequence_length=LENGTH,
        seed=3,
        transformer_impl="transformer_engine",
        fp8=fp8,
    )
    assert len({type(layer.mlp.linear_fc2) for layer in denoiser.decoder.layers}) == 1, "a class for every layer"
    tokens = torch.zeros(2, LENGTH, dtype=torch.long)
    denoiser(tokens, tokens, AttentionLayout())
    norms = [module for module in denoiser.modules() if hasattr(module, "is_first_microbatch")]
    assert not any(module.is_first_microbatch for module in norms)
    denoiser.set_is_first_microbatch()
    assert norms and all(module.is_first_microbatch for module in norms), "weights in FP8 would be those of old steps"
    parallel_groups.shutdown()
    return asked


@pytest.mark.parametrize(
    "fp8, building, computing",
    [
        (Fp8Config(), [], [0, 1, 2]),
        (Fp8Config(first_last_layers_bf16=True), [], [1]),
        (Fp8Config(first_last_layers_bf16=True, num_layers_at_end_in_bf16=0), [], [1, 2]),
        (Fp8Config(param_gather=True, first_last_layers_bf16=True), [1], [1]),
        (Fp8Config(recipe="delayed"), [], [-1]),
    ],
)
def test_megatron_asks_for_fp8_in_the_layers_that_are_to_have_it(
    fp8: Fp8Config, building: list[int], computing: list[int]
) -> None:
    [asked] = run_ranks(1, layers_in_fp8, fp8)
    assert asked == {"building": building, "computing": computing}


class _InFp8(torch.nn.Parameter):
    """Stands for a parameter in FP8, which keeps what it was rounded from."""

    unrounded: Tensor

    def get_high_precision_init_val(self) -> Tensor:
        return self.unrounded


class _OnHost(Tensor):
    """Stands for a tensor in host memory, beside parameters in that of a device: whoever draws there is slow."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.__name__ in ("empty_like", "copy_"), f"{func.__name__} computes on the host"
        plain = [x.as_subclass(Tensor) if isinstance(x, cls) else x for x in args]
        return func(*plain, **(kwargs or {}))


def initial_weights_in_fp8() -> bool:
    from megadiff.models.denoiser import Denoiser
    from megadiff.models.weights import canonical_shards, initialize_weights
    from megadiff.parallel import groups as parallel_groups

    groups = parallel_groups.initialize(parallel_groups.ParallelConfig())
    model = MODELS["squared ReLU"]
    denoiser = Denoiser(model, groups, vocab_size=VOCAB, sequence_length=LENGTH, seed=3)
    expected = {shard.key: shard.data.detach().clone() for shard in canonical_shards(denoiser)}
    linear = denoiser.decoder.layers[1].mlp.linear_fc1
    linear.weight = _InFp8(torch.zeros_like(linear.weight))
    unrounded = torch.zeros_like(linear.weight).detach()
    linear.weight.unrounded = unrounded.as_subclass(_OnHost)
    initialize_weights(denoiser, seed=3, init_std=model.init_std, scales=model.scales)
    whole = expected["decoder.layers.1.mlp.linear_fc1.weight"]
    parallel_groups.shutdown()
    return torch.equal(unrounded, whole) and torch.equal(linear.weight, whole)


def test_parameters_in_fp8_begin_unrounded_and_are_drawn_where_they_lie() -> None:
    assert run_ranks(1, initial_weights_in_fp8) == [True]


def marks_of_layers() -> set[tuple[bool, int]]:
    """Of the matrices of the layers, where torch moves a tensor by exchanging it, as it does with those in FP8."""
    from megadiff.models.denoiser import Denoiser
    from megadiff.parallel import groups as parallel_groups

    torch.__future__.set_swap_module_params_on_conversion(True)
    te_stand_in.install()
    groups = parallel_groups.initialize(parallel_groups.ParallelConfig())
    sizes = {"vocab_size": VOCAB, "sequence_length": LENGTH, "seed": 3}
    denoiser = Denoiser(MODELS["squared ReLU"], groups, **sizes, transformer_impl="transformer_engine")
    matrices = [parameter for parameter in denoiser.decoder.parameters() if parameter.dim() == 2]
    parallel_groups.shutdown()
    return {(matrix.tensor_model_parallel, matrix.partition_dim) for matrix in matrices}


def test_parameters_are_not_moved_where_they_are() -> None:
    """They would lose what gradient norms and initial weights know them by."""
    assert run_ranks(1, marks_of_layers) == [{(True, 0), (True, 1)}]


def test_what_is_rounded_before_it_is_filled_has_no_maximum() -> None:
    from megadiff.models.weights import draw_nothing

    found_in_memory = torch.nn.Parameter(torch.full((2, 3), torch.nan))
    draw_nothing(found_in_memory)
    assert torch.equal(found_in_memory, torch.zeros(2, 3))
