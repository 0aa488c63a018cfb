"""The fused head inside a training step: what it is told, by whom, and what stays the same around it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
from distributed import run_ranks
from tiny import tiny_config

from megadiff.data.corpus import Corpus
from megadiff.data.loader import BatchLoader
from megadiff.data.samples import Windows
from megadiff.diffusion import Rows


def watched_heads(corpus: Path) -> dict[str, Any]:
    """Train and validate over tp 2 under masked noise; the bound and the true number of rows of each fused head."""
    from megadiff.parallel import groups as parallel_groups
    from megadiff.training import step as step_module
    from megadiff.training.trainer import Trainer

    head_loss, seen = step_module.head_loss, []

    def watched_head_loss(hidden: torch.Tensor, weight: torch.Tensor, rows: Rows, **kwargs: Any) -> Any:
        seen.append((kwargs["active_rows"], int((rows.kl_weight != 0).sum()), rows.target.numel()))
        return head_loss(hidden, weight, rows, **kwargs)

    step_module.head_loss = watched_head_loss  # type: ignore[assignment]
    config = tiny_config(
        corpus,
        parallel={"tensor_model_parallel_size": 2},
        objective={"noise": "masked"},
        model={"fused_head_loss": True},
    )
    groups = parallel_groups.initialize(config.parallel)
    trainer = Trainer(config, Path("unused"), groups)
    batches = trainer.training_batches()
    trainer.train_step(batches)
    trained = len(seen)
    trainer.validate()
    tokens = next(batches).tokens_BL.shape
    identity = trainer.model_identity()["model"]
    parallel_groups.shutdown()
    return {"training": seen[:trained], "validation": seen[trained:], "tokens": tokens, "identity": identity}


def test_every_rank_knows_the_rows_with_weight_without_the_tokens(corpus_dir: Path) -> None:
    reader, peer = run_ranks(2, watched_heads, corpus_dir)
    assert reader["tokens"] == (2, 32) and peer["tokens"] == (2, 0)
    for purpose, num_micro_batches in (("training", 4), ("validation", 5)):
        assert reader[purpose] == peer[purpose] and len(reader[purpose]) == num_micro_batches
        assert all(bound == active for bound, active, _ in reader[purpose])
        assert 0 < sum(active for _, active, _ in reader[purpose]) < sum(total for *_, total in reader[purpose])
    assert "fused_head_loss" not in reader["identity"]  # a run may go on with the other setting


def test_ordinals_are_those_of_the_batches_that_a_peer_reads(corpus_dir: Path) -> None:
    loader = BatchLoader(Windows(Corpus.open(corpus_dir).split("validation"), 32), seed=3, prefetch_batches=0)
    for place in (0, 1):
        pairs = zip(loader.iterate(16, 8, 2, place, 2), loader.iterate(16, 8, 2, place, 2, read=False), strict=False)
        for batch, names in itertools.islice(pairs, 6):
            assert torch.equal(batch.ordinal_B, names.ordinal_B)
            assert names.tokens_BL.shape == names.loss_mask_BL.shape == (2, 0)
        (batches, count), (names_only, same_count) = (
            loader.validation_batches(7, 2, place, 2, read=read) for read in (True, False)
        )
        ordinals = [batch.ordinal_B.tolist() for batch in batches]
        assert ordinals == [batch.ordinal_B.tolist() for batch in names_only] and len(ordinals) == count == same_count
