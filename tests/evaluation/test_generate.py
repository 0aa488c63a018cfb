"""Every objective has its sampler, and a text is a function of settings and weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_ranks
from torch import Tensor

from megadiff.config import vocabulary_of
from megadiff.data.corpus import Corpus
from megadiff.data.tokenizer import Tokenizer
from megadiff.diffusion import AttentionLayout
from megadiff.evaluation.generate import GenerateConfig, generate
from megadiff.objectives import (
    AutoregressiveConfig,
    BlockDiffusionConfig,
    DuoConfig,
    EsoLmConfig,
    GiddConfig,
    MdlmConfig,
    ObjectiveConfig,
)

OBJECTIVES: list[tuple[ObjectiveConfig, int]] = [
    (GiddConfig(noise="masked"), 6),
    (MdlmConfig(), 6),
    (DuoConfig(), 6),
    (BlockDiffusionConfig(block_size=8), 6),
    (AutoregressiveConfig(), 24),
    (EsoLmConfig(), 6),
    (EsoLmConfig(alpha_0=0.0), 24),
]
"""With the number that the last report of progress names."""


def write(corpus: Path) -> list[dict[str, Any]]:
    from megadiff.models.config import DenoiserConfig
    from megadiff.models.denoiser import Denoiser
    from megadiff.models.whole import WholeDenoiser
    from megadiff.parallel import groups as parallel_groups

    groups = parallel_groups.initialize(parallel_groups.ParallelConfig())
    tokenizer = Tokenizer.load(corpus / "tokenizer.model")
    vocabulary = vocabulary_of(Corpus.open(str(corpus)).manifest)
    config = DenoiserConfig(num_layers=1, hidden_size=16, num_attention_heads=2)
    trained = Denoiser(config, groups, vocab_size=vocabulary.size, sequence_length=24, seed=1)
    with torch.no_grad():
        for i, parameter in enumerate(trained.parameters()):  # the head starts at zero
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
    denoiser = WholeDenoiser([trained], groups, vocabulary.size)
    found = []
    for objective, _ in OBJECTIVES:
        states: dict[int, Any] = {}
        settings = GenerateConfig(prompt="def ", length=24, num_denoising_steps=6, num_samples=2)
        one, two = (
            generate(settings, denoiser, objective, vocabulary, tokenizer, progress=states.__setitem__)
            for _ in range(2)
        )
        try:
            mended = generate(dataclasses.replace(settings, renewal=0.5), denoiser, objective, vocabulary, tokenizer)
        except ValueError as error:
            mended = str(error)
        found.append({"one": one, "two": two, "mended": mended, "calls": max(states)})
    parallel_groups.shutdown()
    return found


@pytest.fixture(scope="module")
def written(corpus_dir: Path) -> list[dict[str, Any]]:
    return run_ranks(1, write, corpus_dir)[0]


@pytest.mark.parametrize("index", range(len(OBJECTIVES)), ids=lambda i: str(OBJECTIVES[i][0]))
def test_texts_begin_with_the_prompt_and_repeat(written: list[dict[str, Any]], index: int) -> None:
    found, (_, num_calls) = written[index], OBJECTIVES[index]
    assert found["one"] == found["two"] and len(found["one"]) == 2
    assert all(text.startswith("def ") for text in found["one"])
    assert found["calls"] <= num_calls
    if OBJECTIVES[index][0].name in ("autoregressive", "eso_lm"):
        assert "keeps every token that it has written: leave it 0" in found["mended"]
    else:
        assert found["mended"] != found["one"] and all(text.startswith("def ") for text in found["mended"])


class _Denoiser:
    """Predicts at every place an id that tells what it has read there; keeps what it was given."""

    device = torch.device("cpu")

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.read: list[Tensor] = []
        self.layouts: list[AttentionLayout] = []

    def __call__(self, ids_BL: Tensor, position_BL: Tensor, layout: AttentionLayout, log_snr_BL: Tensor) -> Tensor:
        self.read.append(ids_BL.clone())
        self.layouts.append(layout)
        logits_BLV = torch.zeros(*ids_BL.shape, self.vocab_size)
        logits_BLV[..., 300] = 100.0
        return logits_BLV


@pytest.mark.parametrize("shift_inputs", [False, True])
def test_the_denoiser_reads_the_canvas_where_it_was_trained_to(corpus_dir: Path, shift_inputs: bool) -> None:
    tokenizer = Tokenizer.load(corpus_dir / "tokenizer.model")
    denoiser: Any = _Denoiser(tokenizer.vocab_size)
    prompt, canvases = tokenizer.encode("import"), []
    generate(
        GenerateConfig(prompt="import", length=8, num_denoising_steps=4),
        denoiser,
        GiddConfig(noise="masked", shift_inputs=shift_inputs),
        vocabulary_of(Corpus.open(corpus_dir).manifest),
        tokenizer,
        progress=lambda _, canvas_BL: canvases.append(canvas_BL.clone()),
    )
    start = [*prompt, *[tokenizer.mask_id] * (8 - len(prompt))]
    before = [torch.tensor([start]), *canvases[:-1]]
    for read_BL, canvas_BL in zip(denoiser.read, before, strict=True):
        expected = [tokenizer.bos_id, *canvas_BL[0, :-1].tolist()] if shift_inputs else canvas_BL[0].tolist()
        assert read_BL[0].tolist() == expected


@pytest.mark.parametrize("trained_on_prompts, prompt_fraction", [(False, 0.0), (True, 0.0), (False, 0.2)])
def test_prompts_are_seen_as_in_training(corpus_dir: Path, trained_on_prompts: bool, prompt_fraction: float) -> None:
    tokenizer = Tokenizer.load(corpus_dir / "tokenizer.model")
    denoiser: Any = _Denoiser(tokenizer.vocab_size)
    generate(
        GenerateConfig(prompt="import", length=8, num_denoising_steps=1),
        denoiser,
        GiddConfig(prompt_fraction=prompt_fraction),
        vocabulary_of(Corpus.open(corpus_dir).manifest),
        tokenizer,
        trained_on_prompts=trained_on_prompts,
    )
    [layout] = denoiser.layouts
    if trained_on_prompts or prompt_fraction:
        assert layout.given_BS.sum().item() == len(tokenizer.encode("import"))
    else:
        assert layout.is_plain
