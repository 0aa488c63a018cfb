"""Ten billion parameters on 256 ranks, built in seconds; and what the checks say when something does not fit."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import resource
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from megatron.core.dist_checkpointing import ShardedTensor
from models import te_stand_in
from tiny import tiny_config

from megadiff.cli import main
from megadiff.config import load_recipe
from megadiff.dry_run import BuiltRank, DryRun, Kind, check_copies, check_sizes, check_tiling, dry_run, ranks_to_build
from megadiff.parallel.groups import ParallelConfig, joined
from megadiff.parallel.imagined import imagined_rank
from megadiff.planning import plan_memory

UNIFORM = Path(__file__).parents[1] / "examples" / "recipes" / "gidd_10b_uniform.py"
VOCAB = 131_072
TP4_PP4 = ParallelConfig(
    tensor_model_parallel_size=4,
    sequence_parallel=True,
    pipeline_model_parallel_size=4,
    num_layers_in_first_pipeline_stage=9,
    num_layers_in_last_pipeline_stage=7,
    use_distributed_optimizer=True,
    overlap_grad_reduce=True,
)


def built_in_a_process_of_its_own(parallel: ParallelConfig | None, world_size: int) -> tuple[DryRun, float, float]:
    """The dry run of the recipe, its seconds of processor time, and the process's largest memory in GB."""
    config = load_recipe(UNIFORM)
    config = dataclasses.replace(config, parallel=parallel or config.parallel)
    started = time.process_time()
    found = dry_run(config, world_size, VOCAB)
    assert not dist.is_initialized()
    return found, time.process_time() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


@pytest.mark.parametrize("parallel, roles", [(None, 4), (TP4_PP4, 16)])
def test_ten_billion_on_256_ranks_takes_seconds_and_no_memory(parallel: ParallelConfig | None, roles: int) -> None:
    [(found, seconds, gigabytes)] = run_ranks(1, built_in_a_process_of_its_own, parallel, 256)
    print(f"{seconds:.1f} s, {gigabytes:.2f} GB")
    assert (found.ranks, found.roles, found.tensors) == (2 * roles, roles, 8 * 34 + 3)
    # Embedding and head; four matrices, two gains, two gains of queries and keys in each layer; one gain at the end.
    assert found.parameters == 2 * VOCAB * 4608 + 34 * (12 * 4608**2 + 2 * 4608 + 2 * 128) + 4608
    assert seconds < 10 and gigabytes < 1.0


def test_a_layout_that_does_not_fit_is_refused_in_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", str(UNIFORM), "--world-size", "256", "--vocab-size", str(VOCAB), "--build"]
    assert main([*command, "--parallel.tensor-model-parallel-size", "8"]) == 2
    assert capsys.readouterr().err == (
        "error: model.num_attention_heads 36 does not divide over parallel.tensor_model_parallel_size 8: choose a size "
        "that divides it\n"
    )
    assert main([*command, "--parallel.num-layers-in-last-pipeline-stage", "16"]) == 2
    assert "leave no other stage, which Megatron's virtual stages cannot count with" in capsys.readouterr().err


def commands_that_build(corpus: Path, folder: Path) -> list[str]:
    recipe = folder / "recipe.py"
    recipe.write_text(
        "from pathlib import Path\nfrom tiny import tiny_config\n\n\ndef config():\n"
        f"    return tiny_config(Path({str(corpus)!r}), parallel={{'context_parallel_size': 2}})\n"
    )
    command = ["plan", str(recipe), "--world-size", "8", "--build", "--mfu", "0.4"]
    printed = []
    # Noise levels are embedded by a layer of torch's own, which names no device.
    for options in (["--objective", "duo", "--model.log-snr-conditioning", "true"], ["--json"]):
        with contextlib.redirect_stdout(io.StringIO()) as output:
            assert main([*command, *options]) == 0
        printed.append(output.getvalue())
    with (
        mock.patch("megadiff.models.accounting.total_parameters", lambda config, vocab_size: 1),
        pytest.raises(ValueError, match="all ranks together hold 90,304 parameters, but the model has 1: report"),
    ):
        dry_run(load_recipe(recipe), 8, 400)
    return printed


def test_plan_command_builds(corpus_dir: Path, tmp_path: Path) -> None:
    [[text, told]] = run_ranks(1, commands_that_build, corpus_dir, tmp_path)
    assert "at an assumed 40 % of 989.4 TFLOP/s on 8 device(s); computed, not measured" in text
    assert "built 2 of 8 ranks without memory, the first and the last copy of 1 role(s)" in text
    assert "layers: local, attention: local\n" in text
    found = json.loads(told)
    assert found["built"]["parameters"] == found["parameters"] and found["pace"]["mfu"] == 0.4


def built_by_transformer_engine(corpus: Path) -> list[Kind]:
    """Whose modules are built where it is there, by stand-ins, with and without a setting that asks for it."""
    from megadiff import accelerations

    te_stand_in.install()
    accelerations.why_no_transformer_engine = lambda: ""
    two_by_two = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "use_distributed_optimizer": True}
    found = []
    for precision, fp8 in (("bf16", {}), ("fp32", {}), ("fp8-emulated", {}), ("fp8", {"param_gather": True})):
        config = tiny_config(corpus, parallel=two_by_two, training={"precision": precision}, fp8=fp8)
        found.append(dry_run(config, 8, 400).kind)
    return found


def test_the_modules_that_would_train_are_built(corpus_dir: Path) -> None:
    theirs = Kind(layers="transformer_engine", attention="transformer_engine")
    [found] = run_ranks(1, built_by_transformer_engine, corpus_dir)
    assert found[0] == found[3] == theirs
    assert found[1] == Kind(layers="local", attention="local")
    assert found[2] == Kind(layers="local", attention="transformer_engine")


def built_without_transformer_engine(corpus: Path, sections: dict[str, Any]) -> str:
    return str(dry_run(tiny_config(corpus, **sections), 4, 400))


@pytest.mark.parametrize(
    "sections",
    [
        {"training": {"precision": "fp8"}},
        {"model": {"transformer_impl": "transformer_engine"}, "training": {"precision": "bf16"}},
        {"model": {"attention_backend": "transformer_engine"}, "training": {"precision": "bf16"}},
    ],
)
def test_local_modules_stand_in_and_it_is_said(corpus_dir: Path, sections: dict[str, Any]) -> None:
    [told] = run_ranks(1, built_without_transformer_engine, corpus_dir, sections)
    assert told.endswith(
        "layers: local, attention: local, in place of Transformer Engine's, which cannot be built here (no CUDA device)"
    )


def test_both_copies_of_every_role_are_built() -> None:
    assert ranks_to_build(TP4_PP4, 256) == [64 * s + c + t for s in range(4) for c in (0, 60) for t in range(4)]
    assert ranks_to_build(TP4_PP4, 16) == list(range(16))


def imagined_inside_of_a_job() -> str:
    with joined(ParallelConfig()), pytest.raises(ValueError) as caught, imagined_rank(ParallelConfig(), 2, 0):
        pass
    return str(caught.value)


def test_ranks_are_imagined_outside_of_jobs_only() -> None:
    [message] = run_ranks(1, imagined_inside_of_a_job)
    assert message == "this process is part of a job, but ranks can be imagined only outside of one: start it alone"


def shard(offset: int, size: int, *, copy: int = 0, whole: int = 6) -> ShardedTensor:
    """Rows of a matrix of two columns."""
    return ShardedTensor(
        "matrix",
        torch.empty(size, 2, device="meta"),
        torch.float32,
        local_shape=(size, 2),
        global_shape=(whole, 2),
        global_offset=(offset, 0),
        axis_fragmentations=None,
        replica_id=copy,
    )


def test_shards_tile_each_tensor_exactly_once() -> None:
    assert check_tiling([shard(0, 3), shard(3, 3), shard(0, 3, copy=1)]) == (1, 12)
    for shards, boxes in (
        ([shard(0, 3)], r"\[0:3, 0:2\]:"),
        ([shard(0, 3), shard(3, 3, copy=1)], r"\[0:3, 0:2\]:"),
        ([shard(0, 3, copy=1)], "nothing:"),
        ([shard(0, 3), shard(3, 3), shard(3, 3)], r"\[0:3, 0:2\], \[3:6, 0:2\], \[3:6, 0:2\]:"),
        ([shard(0, 4), shard(3, 2)], r"\[0:4, 0:2\], \[3:5, 0:2\]:"),
    ):
        with pytest.raises(ValueError, match=rf"matrix do not tile \(6, 2\) exactly once, but hold {boxes} report"):
            check_tiling(shards)
    with pytest.raises(ValueError, match=r"a shard of matrix says that the whole is \(4, 2\), another one \(6, 2\)"):
        check_tiling([shard(0, 3), shard(0, 2, whole=4)])


def test_ranks_that_differ_from_plan_or_copy_are_named(corpus_dir: Path) -> None:
    config = tiny_config(corpus_dir)
    [planned] = plan_memory(config, 1, 400)
    sizes = [[1024 * 32, *2 * [32, 1024, 3072, 8, 8, 32, 4096, 4096], 32, 1024 * 32]]
    settings: dict[str, Any] = {"rank": 0, "tensor": 0, "stage": 0, "parameters": sizes, "shards": [shard(0, 3)]}
    good = BuiltRank(buffer_elements=planned.parameters, **settings)
    check_sizes(good, config, planned, 400)
    with pytest.raises(
        ValueError, match=r"rank 0 \(tensor 0, pipeline stage 0\) has buffers of 7 elements, but the pl"
    ):
        check_sizes(dataclasses.replace(good, buffer_elements=7), config, planned, 400)
    with pytest.raises(ValueError, match=r"holds 1 parameters, but 90,304 .or the same in another order. are counted"):
        check_sizes(dataclasses.replace(good, parameters=[[1]]), config, planned, 400)

    copy = dataclasses.replace(good, rank=1, shards=[shard(0, 3, copy=1)])
    assert check_copies([good, copy]) == 1
    with pytest.raises(ValueError, match=r"rank 1 \(.*\) holds other shards than rank 0 \(.*\), of which it is a copy"):
        check_copies([good, dataclasses.replace(copy, shards=[shard(3, 3)])])
