"""The shipped model file: its sampler is the exact ancestral one, and `generate` keeps its promises."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from chance import assert_frequencies
from torch import Tensor

from megadiff.diffusion import DiffusionProcess, HybridMixing, MaskedMixing, NoiseSchedule, UniformMixing
from megadiff.hf.modeling_megadiff import (
    MegadiffConfig,
    MegadiffForDiffusionLM,
    NoiseLevel,
    denoising_levels,
    denoising_step,
    draw_noised,
    keep_and_redraw_odds,
)

V, MASK, LENGTH = 11, 3, 16
NOISES: list[dict[str, Any]] = [
    {"noise_type": "masked"},
    {"noise_type": "uniform"},
    {"noise_type": "hybrid", "noise_shift": 0.0},
    {"noise_type": "hybrid", "noise_shift": -2.0, "noise_scale": 0.5},
    {"noise_type": "hybrid", "noise_shift": 2.0, "min_log_snr": -5.0, "max_log_snr": 6.0},
    {"noise_type": "hybrid", "noise_shift": 1000.0},
]


def _config(**changes: Any) -> MegadiffConfig:
    return MegadiffConfig(
        vocab_size=V,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        mask_token_id=MASK,
        **changes,
    )


def _model(**changes: Any) -> MegadiffForDiffusionLM:
    torch.manual_seed(0)
    model = MegadiffForDiffusionLM(_config(**changes)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    with torch.no_grad():
        model.lm_head.weight[MASK] = 30 * model.lm_head.weight[MASK].abs()  # tempts the sampler to write masks
    return model


def _process(config: MegadiffConfig) -> DiffusionProcess:
    schedule = NoiseSchedule(config.min_log_snr, config.max_log_snr)
    if config.noise_type == "masked":
        return DiffusionProcess(schedule, MaskedMixing(V, MASK))
    if config.noise_type == "uniform":
        return DiffusionProcess(schedule, UniformMixing(V, MASK))
    return DiffusionProcess(schedule, HybridMixing(V, MASK, config.noise_shift, config.noise_scale))


def _marginal(xhat_RV: Tensor, level: NoiseLevel) -> Tensor:
    probs_RV = level.kept * xhat_RV + level.uniform / (V - 1) * (torch.arange(V) != MASK).double()
    probs_RV[:, MASK] += level.masked
    return probs_RV


@pytest.mark.parametrize("noise", NOISES, ids=str)
def test_a_step_draws_from_the_posterior_of_the_process(noise: dict[str, Any]) -> None:
    config = _config(**noise)
    process = _process(config)
    logits_RV = torch.randn(V, V, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits_RV[:, MASK] = -torch.inf
    xhat_RV, noised_R = logits_RV.softmax(-1), torch.arange(V)
    log_snrs = [-4.0, -1.0, 1.5, 4.5]
    for now_log_snr, then_log_snr in [*pairwise(log_snrs), (1.5, None), (-4.0, None)]:
        now = NoiseLevel.at(now_log_snr, config)
        t = torch.tensor(now_log_snr, dtype=torch.float64)
        if then_log_snr is None:
            then = NoiseLevel(kept=1.0, uniform=0.0, masked=0.0)
            expected_RV = process.clean_posterior(t, noised_R, xhat_RV)
        else:
            then = NoiseLevel.at(then_log_snr, config)
            s = torch.tensor(then_log_snr, dtype=torch.float64)
            torch.testing.assert_close(_marginal(xhat_RV, then), process.marginal(s, xhat_RV), rtol=1e-12, atol=0)
            expected_RV = process.posterior(t, s, noised_R, xhat_RV)
        keep_R, redraw_R = keep_and_redraw_odds(noised_R, xhat_RV, now, then, config)
        probs_RV = keep_R[:, None] * torch.eye(V) + redraw_R[:, None] * _marginal(xhat_RV, then)
        reachable_R = probs_RV.sum(-1) > 0  # a masked process has no uniform noise, a uniform one no masks
        assert reachable_R.sum() >= V - 1
        probs_RV = probs_RV / probs_RV.sum(-1, keepdim=True)
        torch.testing.assert_close(probs_RV[reachable_R].double(), expected_RV[reachable_R], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("noise", NOISES[:3], ids=str)
def test_draws_have_the_frequencies_of_the_odds(noise: dict[str, Any]) -> None:
    """Chi-squared tests of `draw_noised` and `denoising_step` against the exact probabilities."""
    config, num_draws = _config(**noise), 40_000
    generator = torch.Generator().manual_seed(1)
    now, then = NoiseLevel.at(-1.0, config), NoiseLevel.at(0.5, config)
    xhat_V = torch.tensor([0.3, 0.1, 0.0, 0.0, 0.2, 0.1, 0.1, 0.05, 0.05, 0.05, 0.05])
    xhat_RV = xhat_V.expand(num_draws, V)

    clean_R = torch.multinomial(xhat_V, num_draws, replacement=True, generator=generator)
    assert_frequencies(draw_noised(clean_R, then, config, generator), _marginal(xhat_V[None], then)[0])
    start = MASK if config.noise_type != "uniform" else 4
    noised_R = torch.full((num_draws,), start)
    keep, redraw = (odds[0] for odds in keep_and_redraw_odds(noised_R, xhat_RV, now, then, config))
    probs_V = keep * torch.eye(V)[start] + redraw * _marginal(xhat_V[None], then)[0]
    drawn_R = denoising_step(noised_R, xhat_RV, now, then, config, generator)
    assert_frequencies(drawn_R, probs_V / probs_V.sum())


@pytest.mark.parametrize("noise", NOISES, ids=str)
def test_levels_rise_from_the_noisy_end_of_training_to_clean_text(noise: dict[str, Any]) -> None:
    config = _config(**noise)
    levels = denoising_levels(50, config)
    assert len(levels) == 51 and levels[-1] == NoiseLevel(kept=1.0, uniform=0.0, masked=0.0)
    first = NoiseLevel.at(config.min_log_snr, config)
    for field in ("kept", "uniform", "masked"):
        assert getattr(levels[0], field) == pytest.approx(getattr(first, field), rel=1e-9)
    kept = [level.kept for level in levels]
    assert kept == sorted(kept) and len(set(kept)) == 51
    assert all(abs(level.kept + level.uniform + level.masked - 1) < 1e-12 for level in levels)


def test_extreme_ranges_of_log_snr_stay_finite() -> None:
    levels = denoising_levels(20, _config(min_log_snr=-60.0, max_log_snr=60.0))
    assert levels[0].kept == pytest.approx(8.756510762696521e-27, rel=1e-9)


@pytest.mark.parametrize("num_denoising_steps", [1, 2, 30])
@pytest.mark.parametrize("noise", NOISES, ids=str)
def test_generate_keeps_the_prompt_and_never_writes_a_mask(noise: dict[str, Any], num_denoising_steps: int) -> None:
    model = _model(**noise, suppressed_token_ids=[0, 2])
    prompt_BP = torch.tensor([[5, 6, 2, 7], [8, 9, 0, 10]])
    before = prompt_BP.clone()
    written = set()
    for seed in range(5):
        ids_BL = model.generate(prompt_BP, max_new_tokens=10, num_denoising_steps=num_denoising_steps, seed=seed)
        assert ids_BL.shape == (2, 14) and torch.equal(ids_BL[:, :4], prompt_BP)
        written |= set(ids_BL[:, 4:].flatten().tolist())
    assert not written & {0, 2, MASK} and len(written) >= 4
    assert torch.equal(prompt_BP, before)


def test_generate_fills_in_masks_and_leaves_the_rest() -> None:
    model = _model(noise_type="hybrid")
    ids_BL = torch.tensor([[5, MASK, 6, MASK, MASK, 7]])
    filled_BL = model.generate(ids_BL, max_new_tokens=0, num_denoising_steps=8, seed=0)
    fixed_BL = ids_BL != MASK
    assert torch.equal(filled_BL[fixed_BL], ids_BL[fixed_BL]) and not (filled_BL == MASK).any()
    assert ids_BL[0, 1] == MASK  # the argument is not written into


def test_generate_without_prompt_fills_the_trained_length_and_is_repeatable() -> None:
    model = _model(noise_type="uniform")
    one = model.generate(num_denoising_steps=4, seed=3)
    assert one.shape == (1, LENGTH)
    assert torch.equal(one, model.generate(num_denoising_steps=4, generator=torch.Generator().manual_seed(3)))
    assert not torch.equal(one, model.generate(num_denoising_steps=4, seed=4))
    several = model.generate(torch.empty(3, 0), num_denoising_steps=4, seed=3)
    assert several.shape == (3, LENGTH) and several.dtype == torch.long


def test_a_masked_model_reveals_what_it_is_sure_of() -> None:
    """A denoiser that always says 7 writes 7, whatever the noise; at low temperature a lean becomes a rule."""
    for noise in NOISES:
        model = _model(**noise)
        with torch.no_grad():
            model.model.norm.weight.zero_()
            model.model.norm.weight[0] = 1.0
            model.lm_head.weight.zero_()
        model.model.norm.register_forward_hook(lambda module, inputs, output: torch.ones_like(output))
        with torch.no_grad():
            model.lm_head.weight[7, 0] = 1.0
        sure = model.generate(num_denoising_steps=16, temperature=0.01, seed=0)
        assert (sure == 7).all(), noise
        unsure = model.generate(num_denoising_steps=16, temperature=1.0, seed=0)
        assert not (unsure == 7).all()


@torch.no_grad()
def test_padding_is_not_seen() -> None:
    model = _model()
    ids_BL = torch.tensor([[5, 6, 7, 8]])
    expected = model(ids_BL).logits
    left = model(torch.tensor([[9, 1, 5, 6, 7, 8]]), attention_mask=torch.tensor([[0, 0, 1, 1, 1, 1]])).logits
    right = model(torch.tensor([[5, 6, 7, 8, 9, 1]]), attention_mask=torch.tensor([[1, 1, 1, 1, 0, 0]])).logits
    torch.testing.assert_close(left[:, 2:], expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(right[:, :4], expected, rtol=0, atol=2e-5)
    unmasked = model(torch.tensor([[9, 1, 5, 6, 7, 8]])).logits
    assert (unmasked[:, 2:] - expected).abs().max() > 0.01
    shuffled = model(ids_BL.flip(1), position_ids=torch.tensor([[3, 2, 1, 0]])).logits
    torch.testing.assert_close(shuffled.flip(1), expected, rtol=0, atol=2e-5)
    padded = model.generate(
        torch.tensor([[9, 1, 5]]), torch.tensor([[0, 0, 1]]), max_new_tokens=3, num_denoising_steps=4, seed=0
    )
    assert padded[0, :3].tolist() == [9, 1, 5]


def test_xhat_gives_the_mask_no_probability() -> None:
    model = _model()
    log_probs = model.xhat_log_probs(torch.randn(2, 3, V).bfloat16())
    assert log_probs.dtype == torch.float32 and (log_probs[..., MASK] == -torch.inf).all()
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(2, 3))


def test_embeddings_can_be_exchanged() -> None:
    model = _model()
    embedding, head = torch.nn.Embedding(V, 16), torch.nn.Linear(16, V, bias=False)
    model.set_input_embeddings(embedding)
    model.set_output_embeddings(head)
    assert model.get_input_embeddings() is embedding and model.get_output_embeddings() is head


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_denoising_steps": 0}, "num_denoising_steps is 0, expected at least 1"),
        ({"temperature": 0.0}, "temperature is 0.0, expected a positive number"),
        ({"temperature": float("nan")}, "temperature is nan, expected a positive number"),
        ({"seed": 1, "generator": torch.Generator()}, "seed and generator are both given"),
        ({"input_ids": torch.tensor([1, 2])}, r"input_ids has shape \(2,\), expected \[batch, tokens\]"),
        ({"max_new_tokens": 17}, "max_new_tokens is 17, expected 0 to 16: the prompt has 0 tokens"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1, expected 0 to 16"),
        ({"input_ids": torch.tensor([[1]]), "max_new_tokens": 0}, "there is nothing to write"),
        ({"input_ids": torch.ones(1, LENGTH)}, "there is nothing to write"),
    ],
)
def test_generate_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _model().generate(**arguments)


def test_config_refuses_unknown_noise() -> None:
    with pytest.raises(ValueError, match="noise_type is 'gaussian', expected one of masked, uniform, hybrid"):
        _config(noise_type="gaussian")


def test_config_round_trip(tmp_path: Path) -> None:
    config = _config(noise_type="hybrid", noise_shift=-2.0, suppressed_token_ids=[0, 2, 4])
    config.save_pretrained(tmp_path)
    again = MegadiffConfig.from_pretrained(tmp_path)
    for name in ("vocab_size", "noise_shift", "suppressed_token_ids", "rope_theta", "num_key_value_heads"):
        assert getattr(again, name) == getattr(config, name)


def test_shifted_inputs_stand_one_place_later_behind_a_begin_token() -> None:
    """Whatever stands before the first token; callers give ids and get logits as of any other model."""
    shifted, plain = _model(shift_inputs=True, bos_token_id=1), _model(bos_token_id=1)
    ids_BL = torch.randint(4, V, (2, 6), generator=torch.Generator().manual_seed(0))
    by_hand = torch.cat([torch.ones(2, 1, dtype=torch.int64), ids_BL[:, :-1]], dim=1)
    assert torch.equal(shifted(ids_BL).logits, plain(by_hand).logits)
    padding = torch.zeros(2, 3, dtype=torch.int64)
    seen = torch.cat([padding, torch.ones_like(ids_BL)], dim=1)
    padded = shifted(torch.cat([padding + 5, ids_BL], dim=1), seen).logits
    behind = plain(torch.cat([padding, by_hand], dim=1), seen).logits
    torch.testing.assert_close(padded[:, 3:], behind[:, 3:])
