"""What ranks decide each on its own, and what happens where one of them decides otherwise."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch.distributed as dist
from distributed import run_ranks
from tiny import tiny_config

from megadiff.training.agreement import first_difference, implementations


def start_where_rank_1_has(library: str | None, corpus: Path, run_dir: Path) -> str:
    """What a rank is told of a job in which rank 1 pretends to have a library."""
    from megadiff import accelerations
    from megadiff.parallel import groups as parallel_groups
    from megadiff.training.trainer import Trainer

    config = tiny_config(corpus, training={"precision": "bf16"})
    groups = parallel_groups.initialize(config.parallel)
    if dist.get_rank() == 1 and library == "transformer_engine":
        accelerations.why_no_transformer_engine = lambda: ""
    told = ""
    try:
        Trainer(config, run_dir, groups)
    except ValueError as error:
        told = str(error)
    parallel_groups.shutdown()
    return told


def test_all_ranks_refuse_before_anything_is_built(corpus_dir: Path, tmp_path: Path) -> None:
    host = socket.gethostname()
    told = run_ranks(2, start_where_rank_1_has, "transformer_engine", corpus_dir, tmp_path)
    theirs, ours = (
        f"model.transformer_impl {name}, model.attention_backend {name}" for name in ("transformer_engine", "local")
    )
    assert told[0] == told[1] and not any(tmp_path.iterdir())
    assert told[0].startswith(f"rank 1 on {host} would train with {theirs}, gradient accumulation transformer_engine")
    assert f"but rank 0 on {host} with {ours}, gradient accumulation torch: install the same" in told[0]


def test_ranks_of_one_kind_start(corpus_dir: Path, tmp_path: Path) -> None:
    assert run_ranks(2, start_where_rank_1_has, None, corpus_dir, tmp_path) == ["", ""]


def test_versions_and_missing_libraries_are_differences_too(corpus_dir: Path) -> None:
    mine = implementations(tiny_config(corpus_dir))
    assert mine["model.transformer_impl"] == mine["model.attention_backend"] == "local"
    assert mine["optimizer.implementation"] == "AdamW by torch" and mine["gradient accumulation"] == "torch"
    assert {"version of torch", "version of megatron-core", "version of megadiff"} <= set(mine)
    assert first_difference([("a", mine)] * 3) == ""
    assert mine["operators"] == "native" and len(mine["digest of megadiff's sources"]) == 16
    other = mine | {"version of torch": "2.0", "version of apex": "0.1"}
    found = first_difference([("a", mine), ("a", mine), ("b", other), ("c", other)])
    assert found.startswith("rank 2 on b would train with version of torch 2.0, version of apex 0.1, but rank 0 on a ")
    assert f"with version of torch {mine['version of torch']}, version of apex none: install the same" in found


@pytest.mark.parametrize("asked", ["transformer_engine", "apex"])
def test_what_cannot_run_here_ends_the_run_before_the_comparison(corpus_dir: Path, asked: str) -> None:
    with pytest.raises(ValueError, match=r"cannot run here \(no CUDA device\)"):
        implementations(tiny_config(corpus_dir, optimizer={"implementation": asked}))
