"""The name table: what each row does, that the rows cover both models exactly once, and the way back."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from checkpoints import SIZES, random_state, sizes_with

from megadiff.hf import mapping
from megadiff.hf.mapping import TABLE, ModelSizes, entries, to_hf, to_megadiff
from megadiff.hf.modeling_megadiff import MegadiffConfig, MegadiffForDiffusionLM


@pytest.mark.parametrize(
    "changes",
    [
        {"num_query_groups": 1},
        {"num_query_groups": 2},
        {"num_query_groups": 4},
        {"is_gated": True, "qk_layernorm": False},
    ],
)
def test_there_and_back_is_identity(changes: dict[str, Any]) -> None:
    sizes = sizes_with(**changes)
    state = random_state(sizes)
    back = dict(to_megadiff(dict(to_hf(state, sizes)), sizes))
    assert back.keys() == state.keys()
    for name, weight in state.items():
        if weight.shape[0] == sizes.padded_vocab_size:
            assert not back[name][sizes.vocab_size :].any()
            weight = torch.cat([weight[: sizes.vocab_size], torch.zeros_like(weight[sizes.vocab_size :])])
        assert torch.equal(back[name], weight), name
    assert all(torch.equal(a, dict(to_hf(state, sizes))[name]) for name, a in to_hf(back, sizes))


@pytest.mark.parametrize("gated_mlp, qk_norm", [(False, True), (True, False)])
def test_produces_exactly_the_parameters_of_the_hf_model(gated_mlp: bool, qk_norm: bool) -> None:
    sizes = sizes_with(is_gated=gated_mlp, qk_layernorm=qk_norm)
    config = MegadiffConfig(
        vocab_size=SIZES.vocab_size,
        hidden_size=SIZES.hidden_size,
        intermediate_size=SIZES.ffn_hidden_size,
        num_hidden_layers=SIZES.num_layers,
        num_attention_heads=SIZES.num_attention_heads,
        num_key_value_heads=SIZES.num_query_groups,
        gated_mlp=gated_mlp,
        qk_norm=qk_norm,
    )
    expected = {name: weight.shape for name, weight in MegadiffForDiffusionLM(config).state_dict().items()}
    produced = list(to_hf(random_state(sizes), sizes))
    assert len(produced) == len(expected)
    assert {name: weight.shape for name, weight in produced} == expected


def test_no_name_is_used_twice() -> None:
    rows = list(entries(SIZES))
    assert len({row.megadiff for row in rows}) == len(rows)
    hf_names = [name for row in rows for name in row.hf]
    assert len(set(hf_names)) == len(hf_names)
    assert len(rows) == 3 + 8 * SIZES.num_layers
    assert len(TABLE) == 12


def test_qkv_rows_go_group_by_group() -> None:
    """Label the rows of the fused projection by what Megatron stores there and see where the labels end up."""
    sizes = sizes_with(hidden_size=16, num_attention_heads=4, num_query_groups=2)
    labels = [f"q{i}" for i in (0, 1)] + ["k0", "v0"] + [f"q{i}" for i in (2, 3)] + ["k1", "v1"]
    rows = [(label, d) for label in labels for d in range(4)]
    fused = torch.arange(len(rows), dtype=torch.float32)[:, None].expand(-1, sizes.hidden_size)
    parts = mapping.QKV.to_hf(fused, sizes)
    names = [[rows[int(i)] for i in part[:, 0]] for part in parts]
    assert names[0] == [(f"q{i}", d) for i in range(4) for d in range(4)]
    assert names[1] == [(f"k{i}", d) for i in range(2) for d in range(4)]
    assert names[2] == [(f"v{i}", d) for i in range(2) for d in range(4)]


def test_missing_and_unknown_names_are_named_in_both_directions() -> None:
    state = random_state(SIZES)
    parameters = dict(to_hf(state, SIZES))
    for convert, tensors in ((to_hf, state), (to_megadiff, parameters)):
        lost = next(iter(tensors))
        with pytest.raises(ValueError, match=re.escape(f"lacks {lost};")):
            next(convert({name: t for name, t in tensors.items() if name != lost}, SIZES))
        with pytest.raises(ValueError, match="holds time_embedding"):
            next(convert({**tensors, "time_embedding.weight": torch.zeros(2)}, SIZES))
    with pytest.raises(ValueError, match=r"and 13 more"):
        next(to_hf({}, SIZES))


def test_shapes_of_another_model_are_refused_in_both_directions() -> None:
    state = random_state(SIZES)
    parameters = dict(to_hf(state, SIZES))
    wider = sizes_with(ffn_hidden_size=52)
    with pytest.raises(ValueError, match=r"layers.0.mlp.linear_fc1.weight has shape \(48, 32\), expected \(52, 32\)"):
        dict(to_hf(state, wider))
    with pytest.raises(ValueError, match=r"layers.0.mlp.up_proj.weight has shape \(48, 32\), expected \(52, 32\)"):
        dict(to_megadiff(parameters, wider))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 0}, "num_layers is 0, expected a positive integer"),
        ({"hidden_size": 32.0}, "hidden_size is 32.0, expected a positive integer"),
        ({"num_attention_heads": 5}, r"hidden_size is 32, expected a multiple of num_attention_heads \(5\)"),
        ({"num_query_groups": 3}, r"num_attention_heads is 4, expected a multiple of num_query_groups \(3\)"),
        ({"vocab_size": 1025}, r"vocab_size is 1025, expected at most padded_vocab_size \(1024\)"),
    ],
)
def test_impossible_sizes(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sizes_with(**changes)


def test_shape_letters() -> None:
    sizes = ModelSizes(
        num_layers=1,
        hidden_size=24,
        num_attention_heads=6,
        num_query_groups=2,
        ffn_hidden_size=5,
        vocab_size=7,
        padded_vocab_size=8,
    )
    assert sizes.shape("QKV H") == (40, 24)
    assert sizes.shape("Vp F D") == (8, 5, 4)
