"""The denoiser against a plain-torch transformer, its weights as a function, and the shapes it refuses."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from distributed import run_ranks
from torch import Tensor

from megadiff.models.config import DenoiserConfig, padded_vocab_size
from megadiff.models.parametrization import ParametrizationName
from megadiff.parallel.groups import ParallelConfig

VOCAB, LENGTH, SEED = 1500, 24, 11
CONFIG = DenoiserConfig(
    num_layers=2, hidden_size=48, num_attention_heads=6, num_query_groups=2, ffn_hidden_size=80, init_std=0.3
)


def _norm(x: Tensor, gain: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + CONFIG.layernorm_epsilon) * gain


def _rotate(x_BLND: Tensor, position_BL: Tensor) -> Tensor:
    half = x_BLND.shape[-1] // 2
    angle = position_BL[..., None, None] * CONFIG.rotary_base ** (-torch.arange(half) / half)
    a, b = x_BLND[..., :half], x_BLND[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)


def plain_logits(
    weights: dict[str, Tensor], noised_BL: Tensor, position_BL: Tensor, causal: bool, branch: float, logit: float
) -> Tensor:
    """The architecture, written without Megatron, with multipliers of each branch and of the logits."""
    x = weights["embedding.word_embeddings.weight"][noised_BL]
    heads, groups, size = CONFIG.num_attention_heads, CONFIG.query_groups, CONFIG.head_size
    for i in range(CONFIG.num_layers):
        layer = {
            name.removeprefix(f"decoder.layers.{i}.").removesuffix(".weight"): weight
            for name, weight in weights.items()
            if name.startswith(f"decoder.layers.{i}.")
        }
        h = _norm(x, layer["input_layernorm"])
        qkv = (h @ layer["self_attention.linear_qkv"].t()).unflatten(-1, (groups, heads // groups + 2, size))
        q, k, v = qkv[..., :-2, :].flatten(2, 3), qkv[..., -2, :], qkv[..., -1, :]
        q = _rotate(_norm(q, layer["self_attention.q_layernorm"]), position_BL)
        k = _rotate(_norm(k, layer["self_attention.k_layernorm"]), position_BL)
        k, v = (t.repeat_interleave(heads // groups, dim=2) for t in (k, v))
        scores = torch.einsum("bqnd,bknd->bnqk", q, k) / math.sqrt(size)
        if causal:
            scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)
        context = torch.einsum("bnqk,bknd->bqnd", scores.softmax(-1), v).flatten(2)
        x = x + branch * context @ layer["self_attention.linear_proj"].t()
        h = _norm(x, layer["pre_mlp_layernorm"])
        x = x + branch * torch.relu(h @ layer["mlp.linear_fc1"].t()).square() @ layer["mlp.linear_fc2"].t()
    return logit * _norm(x, weights["decoder.final_layernorm.weight"]) @ weights["output_layer.weight"].t()


def build_on_layout(tensor: int, pipeline: int, parametrization: ParametrizationName = "standard") -> dict[str, Any]:
    """Initial weights of this rank by canonical name with their global offsets, and logits where they live."""
    from megadiff.diffusion import AttentionLayout
    from megadiff.models.denoiser import Denoiser
    from megadiff.models.weights import canonical_shards
    from megadiff.parallel import groups as parallel_groups

    groups = parallel_groups.initialize(
        parallel_groups.ParallelConfig(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline)
    )
    config = dataclasses.replace(CONFIG, parametrization=parametrization)
    denoiser = Denoiser(config, groups, vocab_size=VOCAB, sequence_length=LENGTH, seed=SEED)
    shards = {s.key: (s.global_offset, s.global_shape, s.data.detach().clone()) for s in canonical_shards(denoiser)}
    logits = {}
    multipliers = (4 / CONFIG.num_layers, 512 / CONFIG.hidden_size) if parametrization == "complete_p" else (1.0, 1.0)
    if tensor == pipeline == 1:
        with torch.no_grad():
            for i, parameter in enumerate(denoiser.parameters()):  # the head starts at zero: perturb everything
                parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
            weights = {s.key: s.data.detach().clone() for s in canonical_shards(denoiser)}
            noised = torch.randint(VOCAB, (3, LENGTH), generator=torch.Generator().manual_seed(0))
            position = torch.stack([torch.arange(LENGTH), torch.arange(LENGTH).flip(0), torch.arange(LENGTH) * 3])
            for kind in ("bidirectional", "causal"):
                ours = denoiser(noised, position, AttentionLayout(kind)).transpose(0, 1)
                logits[kind] = (ours, plain_logits(weights, noised, position, kind == "causal", *multipliers))
            fired = []
            denoiser.output_layer.register_forward_pre_hook(lambda *_: fired.append("output layer"))
            hidden, weight = denoiser(noised, position, AttentionLayout("causal"), lambda *given: given)
            logits["by head"] = (torch.einsum("sbh,wh->bsw", hidden, weight), logits["causal"][0])
            assert fired == ["output layer"]
    parallel_groups.shutdown()
    return {"shards": shards, "logits": logits}


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    return run_ranks(1, build_on_layout, 1, 1)[0]


@pytest.fixture(scope="module")
def complete_p() -> dict[str, Any]:
    return run_ranks(1, build_on_layout, 1, 1, "complete_p")[0]


def test_a_head_takes_the_place_of_the_product_but_not_of_the_hooks(whole: dict[str, Any]) -> None:
    by_head, logits = whole["logits"]["by head"]
    torch.testing.assert_close(by_head, logits, rtol=1e-5, atol=1e-5)


def test_complete_p_multiplies_branches_and_logits(complete_p: dict[str, Any]) -> None:
    for kind, (ours, plain) in complete_p["logits"].items():
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-4, msg=kind)


@pytest.mark.parametrize("kind", ["bidirectional", "causal"])
def test_equals_a_plain_transformer(whole: dict[str, Any], kind: str) -> None:
    ours, plain = whole["logits"][kind]
    assert ours.shape == (3, LENGTH, padded_vocab_size(VOCAB))
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)


def test_initial_weights_do_not_depend_on_the_layout(whole: dict[str, Any]) -> None:
    ranks = run_ranks(2, build_on_layout, 2, 1)
    assert ranks[0]["shards"].keys() == whole["shards"].keys()
    for rank in ranks:
        for name, (offset, shape, values) in rank["shards"].items():
            _, whole_shape, whole_values = whole["shards"][name]
            assert shape == whole_shape
            window = tuple(slice(o, o + n) for o, n in zip(offset, values.shape, strict=True))
            assert torch.equal(values, whole_values[window]), name


def test_initial_weights_have_the_stated_spread(whole: dict[str, Any], complete_p: dict[str, Any]) -> None:
    residual = CONFIG.init_std / math.sqrt(2 * CONFIG.num_layers)
    by_width = 0.4 / math.sqrt(CONFIG.hidden_size) * CONFIG.init_std / 0.02
    expected = {
        "embedding.word_embeddings.weight": (CONFIG.init_std, CONFIG.init_std),
        "decoder.layers.1.self_attention.linear_qkv.weight": (CONFIG.init_std, by_width),
        "decoder.layers.1.mlp.linear_fc2.weight": (residual, by_width),
        "output_layer.weight": (0.0, 0.0),
    }
    for name, stds in expected.items():
        for built, std in zip((whole, complete_p), stds, strict=True):
            values = built["shards"][name][2]
            assert values.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * values.numel()))
    gains = [values for name, (_, _, values) in whole["shards"].items() if name.endswith("norm.weight")]
    assert gains and all((gain == 1).all() for gain in gains)
    layers = [whole["shards"][f"decoder.layers.{i}.mlp.linear_fc1.weight"][2] for i in range(2)]
    assert not torch.equal(*layers)


def test_refuses_sizes_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match=r"model.num_layers is 0"):
        DenoiserConfig(num_layers=0)
    with pytest.raises(ValueError, match=r"hidden_size 100 does not divide into model.num_attention_heads 12"):
        DenoiserConfig(hidden_size=100)
    with pytest.raises(ValueError, match=r"the head size .* is 3"):
        DenoiserConfig(hidden_size=36)
    with pytest.raises(ValueError, match=r"model.parametrization is 'mup', but must be one of standard, complete_p"):
        DenoiserConfig(parametrization="mup")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_query_groups 5"):
        DenoiserConfig(num_query_groups=5)
    with pytest.raises(ValueError, match=r"num_attention_heads 12 does not divide over .*tensor_model_parallel_size 5"):
        DenoiserConfig().check_layout(ParallelConfig(tensor_model_parallel_size=5))
    with pytest.raises(ValueError, match=r"num_layers 12 does not divide over .*pipeline_model_parallel_size 5"):
        DenoiserConfig().check_layout(ParallelConfig(pipeline_model_parallel_size=5))
