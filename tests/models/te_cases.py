"""What Transformer Engine is held to, as functions for `run_ranks`: layers, attention, FP8, and what checkpoints hold.

On a GPU they run on the package, for `tests/gpu/test_transformer_engine_on_gpu.py`. Without one, stand-ins take its
place and round nothing, so that the cases themselves are known to run before there is a GPU.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from models import te_stand_in
from tiny import tiny_config
from torch import Tensor

VOCAB, LENGTH = 400, 256
MODELS: dict[str, dict[str, Any]] = {
    "squared ReLU": {},
    "gated, grouped": {"activation": "swiglu", "num_query_groups": 2, "parametrization": "complete_p"},
}
LAYOUTS = ("bidirectional", "causal", "documents", "causal documents")


def prepare() -> None:
    """Take the package where there is a device, else stand-ins."""
    from megadiff import accelerations

    if not torch.cuda.is_available():
        te_stand_in.install()
        accelerations.why_no_transformer_engine = lambda: ""
        accelerations.why_no_fp8 = lambda recipe: ""


def error(found: Tensor, exact: Tensor) -> float:
    """Relative, of a tensor as a whole."""
    return float((found.double() - exact.double()).norm() / exact.double().norm())


def errors(model: dict[str, Any], layout: str, transformer_impl: Any, attention: Any) -> dict[str, tuple[float, float]]:
    """Errors of logits and of each gradient in bf16 against local modules in fp32: those asked for, then local ones."""
    from megadiff.diffusion.layout import AttentionLayout, document_numbers
    from megadiff.models.config import DenoiserConfig
    from megadiff.models.denoiser import build_denoiser
    from megadiff.models.weights import canonical_shards
    from megadiff.parallel import groups as parallel_groups
    from megadiff.training.chunks import wrap_chunks

    prepare()
    groups = parallel_groups.initialize(parallel_groups.ParallelConfig())
    config = DenoiserConfig(num_layers=2, hidden_size=256, num_attention_heads=4, **model)
    tokens = torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(0)).to(groups.device)
    documents = document_numbers(tokens % 100, end_id=2) if "documents" in layout else None
    seen = AttentionLayout("causal" if "causal" in layout else "bidirectional", documents)
    position = torch.arange(LENGTH, device=groups.device).expand(2, LENGTH)
    weight = torch.randn(LENGTH, 2, 1024, generator=torch.Generator().manual_seed(1)).to(groups.device)

    def results(dtype: torch.dtype, **settings: Any) -> dict[str, Tensor]:
        sizes = {"vocab_size": VOCAB, "sequence_length": LENGTH, "seed": 3}
        denoisers = build_denoiser(config, groups, **sizes, dtype=dtype, **settings)
        with torch.no_grad():
            for shard in canonical_shards(denoisers[0]):
                if len(shard.global_shape) == 1:
                    shard.data += 0.1 * len(shard.key) / 40
                if shard.key == "output_layer.weight":  # it begins at zero, and nothing would reach the layers
                    drawn = torch.randn(shard.global_shape, generator=torch.Generator().manual_seed(2))
                    shard.data.copy_(0.05 * drawn.to(dtype))
        [chunk] = wrap_chunks(denoisers, groups.config, before_reduction=lambda: None)  # for gradients that are fused
        logits = chunk(tokens, position, seen)
        (logits.float() * weight).sum().backward()
        gradients = {shard.key: shard.data.main_grad.clone() for shard in canonical_shards(denoisers[0])}
        return {"logits": logits.detach(), **gradients}

    exact, plain = results(torch.float32), results(torch.bfloat16)
    asked = results(torch.bfloat16, transformer_impl=transformer_impl, attention=attention)
    parallel_groups.shutdown()
    return {name: (error(asked[name], exact[name]), error(plain[name], exact[name])) for name in exact}


def trained(corpus: Path, run_dir: Path, phases: list[tuple[int, dict[str, dict[str, Any]]]]) -> list[float]:
    """Losses of a run that goes on through phases, each up to a step and with settings of its own; texts at its end.

    A micro-batch has 128 tokens on a rank and all widths are multiples of 128, which every recipe divides.
    """
    from megadiff.parallel import groups as parallel_groups
    from megadiff.training.loop import train

    prepare()
    for last_step, sections in phases:
        training = {"train_steps": last_step, "micro_batch_size": 4, "precision": "bf16"}
        config = tiny_config(
            corpus,
            model={"num_layers": 3, "hidden_size": 128} | sections.get("model", {}),
            training=training | sections.get("training", {}),
            parallel=sections.get("parallel"),
            optimizer={"lr_decay_style": "constant"},
            checkpoint={"interval": 0},
            watch={"num_texts": 1, "text_length": 8, "text_steps": 2},
            fp8=sections.get("fp8", {}),
        )
        config.check(1)
        with parallel_groups.joined(config.parallel) as groups:
            train(config, run_dir, groups)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def kind_of_dry_run(corpus: Path, sections: dict[str, dict[str, Any]]) -> str:
    """Whose modules a dry run builds, on the meta device."""
    from megadiff.dry_run import dry_run

    prepare()
    model = {"hidden_size": 128} | sections.pop("model", {})
    return str(dry_run(tiny_config(corpus, model=model, **sections), 4, VOCAB).kind)
