"""Noise levels and mixtures at the input: what they add up to, on one rank and on several."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_ranks
from tiny import tiny_config
from torch import Tensor

from megadiff.config import vocabulary_of
from megadiff.data.corpus import Corpus
from megadiff.data.tokenizer import Tokenizer
from megadiff.evaluation.generate import GenerateConfig, generate
from megadiff.models.conditioning import LONGEST_PERIOD, MAX_ABS_LOG_SNR, NUM_LEVEL_FEATURES, level_features
from megadiff.models.config import DenoiserConfig
from megadiff.objectives import DuoConfig, GiddConfig

VOCAB, LENGTH, SEED = 1500, 8, 3
CONFIG = DenoiserConfig(
    num_layers=1, hidden_size=32, num_attention_heads=4, init_std=0.5, log_snr_conditioning=True, ffn_hidden_size=32
)


def _inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(2, LENGTH, 5, generator=generator)
    return {
        "noised_BS": torch.randint(VOCAB, (2, LENGTH), generator=generator),
        "position_BS": torch.arange(LENGTH).expand(2, LENGTH),
        "log_snr_BS": 4 * torch.randn(2, LENGTH, generator=generator, dtype=torch.float64),
        "soft_ids_BSK": torch.randint(VOCAB, (2, LENGTH, 5), generator=generator),
        "soft_weights_BSK": weights / weights.sum(-1, keepdim=True),
    }


def embed(tensor: int, sequence_parallel: bool, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """On this rank: embeddings of plain and of soft inputs, [S, B, H], and the gradients of all parameters, by name.

    Sharded gradients come with their offsets; those of marked parameters are summed as Megatron sums them.
    """
    from megadiff.models.denoiser import Denoiser
    from megadiff.models.weights import canonical_shards, normal_at
    from megadiff.parallel import groups as parallel_groups

    settings = {"tensor_model_parallel_size": tensor, "sequence_parallel": sequence_parallel}
    groups = parallel_groups.initialize(parallel_groups.ParallelConfig(**settings))
    denoiser = Denoiser(CONFIG, groups, vocab_size=VOCAB, sequence_length=LENGTH, seed=SEED, dtype=dtype)
    embedding, inputs = denoiser.embedding, _inputs()
    weights = {shard.key: shard.data.detach().clone() for shard in canonical_shards(denoiser)}
    plain = {name: inputs[name] for name in ("noised_BS", "position_BS", "log_snr_BS")}
    one_token = torch.zeros(2, LENGTH, 5)
    one_token[..., 1] = 1.0
    outputs = {"initial": embedding(**plain)}
    with torch.no_grad():  # the last matrix starts at zero
        last = embedding.level_embedding.linear_2.weight
        index = torch.arange(last.numel()).view(last.shape)
        last.copy_(normal_at(SEED, "test", index))
    outputs["plain"] = embedding(**plain)
    same = inputs["noised_BS"][..., None].expand(2, LENGTH, 5)
    outputs["one token"] = embedding(**plain, soft_ids_BSK=same, soft_weights_BSK=one_token)
    outputs["soft"] = embedding(**inputs)
    rows = torch.arange(LENGTH).chunk(tensor if sequence_parallel else 1)[groups.tp.rank() if sequence_parallel else 0]
    probe = torch.randn(LENGTH, 2, 32, generator=torch.Generator().manual_seed(1))[rows].to(dtype)
    (outputs["soft"] * probe).sum().backward()
    gradients = {}
    for shard in canonical_shards(denoiser):
        parameter = denoiser.get_parameter(shard.key)
        if parameter.grad is None:
            continue
        gradient = parameter.grad
        if getattr(parameter, "sequence_parallel", False):
            torch.distributed.all_reduce(gradient, group=groups.tp)
        gradients[shard.key] = (shard.global_offset[0], gradient)
    parallel_groups.shutdown()
    outputs = {name: output.detach() for name, output in outputs.items()}
    return {"rows": rows, "outputs": outputs, "gradients": gradients, "weights": weights}


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    return run_ranks(1, embed, 1, False)[0]


def test_features_tell_levels_apart_and_stop_at_the_stated_range() -> None:
    log_snr = torch.linspace(-MAX_ABS_LOG_SNR, MAX_ABS_LOG_SNR, 1001, dtype=torch.float64)
    features = level_features(log_snr)
    assert features.shape == (1001, NUM_LEVEL_FEATURES) and features.dtype == torch.float32
    assert (features.diff(dim=0).norm(dim=-1) > 0.05).all()
    slowest = features[:, 0]
    torch.testing.assert_close(slowest, torch.sin(2 * math.pi * log_snr / LONGEST_PERIOD).float())
    assert (slowest.diff() > 0).all()  # alone it orders the whole range
    beyond = level_features(torch.tensor([-math.inf, -99.0, 99.0], dtype=torch.float64))
    assert torch.equal(beyond, features[[0, 0, -1]])


def test_a_new_model_is_one_without_conditioning(whole: dict[str, Any]) -> None:
    weights = whole["weights"]
    tokens = weights["embedding.word_embeddings.weight"][_inputs()["noised_BS"].t()]
    assert torch.equal(whole["outputs"]["initial"], tokens)
    names = [f"embedding.level_embedding.linear_{i}.{part}" for i in (1, 2) for part in ("weight", "bias")]
    assert [name for name in weights if "level" in name] == names
    assert weights[names[0]].std() == pytest.approx(CONFIG.init_std, rel=0.1)
    assert all((weights[name] == 0).all() for name in names[1:])


def test_a_mixture_is_the_weighted_sum_of_its_embeddings(whole: dict[str, Any]) -> None:
    inputs, outputs = _inputs(), whole["outputs"]
    levels = outputs["plain"] - outputs["initial"]
    assert levels.std() > 0.5
    rows_BSKH = whole["weights"]["embedding.word_embeddings.weight"][inputs["soft_ids_BSK"]]
    dense = (inputs["soft_weights_BSK"][..., None] * rows_BSKH).sum(dim=2).transpose(0, 1)
    torch.testing.assert_close(outputs["soft"], dense + levels, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outputs["one token"], outputs["plain"])


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_tensor_parallel_ranks_agree_with_one(whole: dict[str, Any], sequence_parallel: bool) -> None:
    for rank in run_ranks(2, embed, 2, sequence_parallel):
        for name, output in rank["outputs"].items():
            torch.testing.assert_close(output, whole["outputs"][name][rank["rows"]], rtol=1e-5, atol=1e-5)
        assert rank["gradients"].keys() == whole["gradients"].keys() and len(rank["gradients"]) == 5
        for name, (offset, gradient) in rank["gradients"].items():
            expected = whole["gradients"][name][1][offset : offset + len(gradient)]
            torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-5, msg=name)


def test_half_precision_is_close(whole: dict[str, Any]) -> None:
    [rank] = run_ranks(1, embed, 1, False, torch.bfloat16)
    for name in ("plain", "soft"):
        ours, exact = rank["outputs"][name], whole["outputs"][name]
        assert ours.dtype == torch.bfloat16
        assert (ours.float() - exact).norm() < 0.02 * exact.norm()
    gradient, exact = (x["gradients"]["embedding.word_embeddings.weight"][1].float() for x in (rank, whole))
    assert (gradient - exact).norm() < 0.02 * exact.norm()


def test_generation_tells_the_level_of_each_step_and_that_prompts_are_clean(corpus_dir: Path) -> None:
    tokenizer = Tokenizer.load(corpus_dir / "tokenizer.model")
    vocabulary = vocabulary_of(Corpus.open(corpus_dir).manifest)
    prompt = len(tokenizer.encode("def f("))
    levels = []

    def denoiser(noised_BL: Tensor, position_BL: Tensor, layout: Any, log_snr_BL: Tensor) -> Tensor:
        levels.append(log_snr_BL)
        return torch.zeros(*noised_BL.shape, vocabulary.size)

    denoiser.device = torch.device("cpu")  # type: ignore[attr-defined]
    schedule = DuoConfig().process(vocabulary).schedule
    settings = GenerateConfig(prompt="def f(", length=16, num_denoising_steps=3, num_samples=2)
    generate(settings, denoiser, DuoConfig(), vocabulary, tokenizer)  # type: ignore[arg-type]
    told = torch.stack(levels)
    assert told.shape == (3, 2, 16) and (told[..., :prompt] == schedule.max_log_snr).all()
    free = told[..., prompt:]
    assert (free == free[:, :1, :1]).all() and (free[:, 0, 0].diff() > 0).all()
    assert free[0, 0, 0] == schedule.min_log_snr


class WithoutLevels(GiddConfig):
    gives_log_snr = False


def test_conditioning_on_nothing_is_refused(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, model={"log_snr_conditioning": True})
    config.check(1)
    with pytest.raises(ValueError, match=r"model.log_snr_conditioning is true, but objective gidd has no noise levels"):
        dataclasses.replace(config, objective=WithoutLevels()).check(1)
