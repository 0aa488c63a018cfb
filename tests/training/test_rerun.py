"""Unexpected results are computed again and attributed: to a device when they change, to the run when they do not."""

from __future__ import annotations

import logging
import math
import os
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from distributed import run_ranks
from faults import LossFault, is_rank
from tiny import tiny_config

from megadiff.exit_codes import EXIT_RERUN_ELSEWHERE, EXIT_RESULT_REJECTED
from megadiff.training.rerun import StepRerun

TRAIN_STEPS, FAULTY_STEP = 27, 26
ORDINAL = 8 * (FAULTY_STEP - 1) + 2
"""A sample of the faulty step that rank 1 of 2 computes, in its first micro-batch of two."""


class Messages(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def run(
    run_dir: Path, corpus_dir: Path, mode: str, fault: Any = None, node: str = "first", spike_factor: float = 10.0
) -> dict[str, Any]:
    """Start or resume a run on this rank, on a node of that name; how it ended, what it said and what is on disk."""
    from megadiff.parallel import groups as parallel_groups
    from megadiff.training import loop, rerun, trainer
    from megadiff.training.metrics import read_metrics

    parallel = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
    training = {"train_steps": TRAIN_STEPS, "rerun_mode": mode, "precision": "bf16", "log_interval": 5}
    training["spike_factor"] = spike_factor
    config = tiny_config(corpus_dir, parallel=parallel, training=training, checkpoint={"interval": 8, "keep_last": 0})
    groups = parallel_groups.initialize(config.parallel)
    messages = Messages()
    for module in (loop, trainer, rerun):
        module.logger.addHandler(messages)
        module.logger.setLevel(logging.INFO)
    uname = os.uname
    os.uname = lambda: os.uname_result((uname()[0], node, *uname()[2:]))  # type: ignore[assignment]
    ended: Any = "complete"
    try:
        with fault or nullcontext():
            loop.train(config, run_dir, groups)
    except rerun.SuspectResultError as error:
        ended = (error.exit_code, str(error))
    finally:
        os.uname = uname
        for module in (loop, trainer, rerun):
            module.logger.removeHandler(messages)
    times = ("tokens_per_second", "step_time")
    return {
        "ended": ended,
        "said": messages.texts,
        "checkpoints": sorted(path.name for path in (run_dir / "checkpoints").iterdir()),
        "memory": (run_dir / "rerun.json").exists(),
        "lines": [
            {name: value for name, value in line.items() if name not in times}
            for line in read_metrics(run_dir)
            if "loss" in line
        ],
    }


def attribute(directory: Path, corpus_dir: Path) -> dict[str, dict[str, Any]]:
    """Every way in which a step can go wrong, on two data-parallel ranks of which one errs."""

    import torch.distributed as dist

    def fault(factor: float, times: int | None = None) -> LossFault:
        return LossFault(rank=1, ordinal=ORDINAL, factor=factor, times=times)

    def before_the_fault(name: str) -> Path:
        """A copy of the good run as it was after step 24."""
        if is_rank(0):
            shutil.copytree(directory / "off", directory / name, ignore=shutil.ignore_patterns("step_00000027"))
        dist.barrier()
        return directory / name

    mode, nan = "validate_results", math.nan
    return {
        "off": run(directory / "off", corpus_dir, "disabled"),
        "on": run(directory / "on", corpus_dir, mode),
        "twice": run(directory / "twice", corpus_dir, "report_determinism_stats"),
        "spike once": run(directory / "spike once", corpus_dir, mode, fault(1e4, times=1)),
        "spike": run(directory / "spike", corpus_dir, mode, fault(1e4)),
        "spike, off": run(before_the_fault("spike, off"), corpus_dir, "disabled", fault(1e4)),
        "nan once": run(directory / "nan once", corpus_dir, mode, fault(nan, times=1)),
        "nan once, resumed": run(directory / "nan once", corpus_dir, mode),
        "nan": run(before_the_fault("nan"), corpus_dir, mode, fault(nan)),
        "nan, same node": run(directory / "nan", corpus_dir, mode, fault(nan)),
        "nan, other node": run(directory / "nan", corpus_dir, mode, fault(nan), node="second"),
        "bad node": run(before_the_fault("bad node"), corpus_dir, mode, fault(nan)),
        "bad node, left": run(directory / "bad node", corpus_dir, mode, node="second"),
        "bad node, resumed": run(directory / "bad node", corpus_dir, mode, node="second"),
        "changed": run(before_the_fault("changed"), corpus_dir, mode, fault(nan)),
        "changed, resumed": run(directory / "changed", corpus_dir, mode, spike_factor=20.0),
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, corpus_dir: Path) -> list[dict[str, dict[str, Any]]]:
    return run_ranks(2, attribute, tmp_path_factory.mktemp("rerun"), corpus_dir, timeout=600.0)


def one(said: list[str], part: str) -> str:
    (text,) = [text for text in said if part in text]
    return text


@pytest.mark.slow
def test_the_machine_changes_no_bit(found: list[dict[str, dict[str, Any]]]) -> None:
    for name in ("on", "twice"):
        assert found[0][name]["ended"] == "complete"
        assert found[0][name]["lines"] == found[0]["off"]["lines"]
    assert len(found[0]["off"]["lines"]) == TRAIN_STEPS
    reports = [text for text in found[0]["twice"]["said"] if "every step was computed twice" in text]
    assert reports[-1].endswith("relative differences: 25 samples, all identical")


@pytest.mark.slow
def test_a_transient_spike_is_computed_away(found: list[dict[str, dict[str, Any]]]) -> None:
    once = found[0]["spike once"]
    verdict = one(once["said"], "step 26:")
    assert "a transient fault of rank 1 (host first, device cpu); going on" in verdict
    assert once["ended"] == "complete" and once["lines"] == found[0]["off"]["lines"]
    assert not any("step 26:" in text for text in found[1]["spike once"]["said"]), "rank 0 speaks for all"


@pytest.mark.slow
def test_a_spike_of_the_run_is_reported_and_trained_on(found: list[dict[str, dict[str, Any]]]) -> None:
    spike = found[0]["spike"]
    verdict = one(spike["said"], "step 26:")
    assert "the same when computed again: it belongs to data or settings, not to a device; going on" in verdict
    assert spike["ended"] == "complete" and spike["lines"] == found[0]["spike, off"]["lines"]
    assert spike["lines"][FAULTY_STEP - 1]["loss"] > 100 * found[0]["off"]["lines"][FAULTY_STEP - 1]["loss"]


@pytest.mark.slow
def test_a_transient_nan_ends_the_run_with_a_name_and_a_checkpoint(found: list[dict[str, dict[str, Any]]]) -> None:
    for ranks in found:
        code, text = ranks["nan once"]["ended"]
        assert code == EXIT_RESULT_REJECTED
        assert text.startswith("step 26: loss nan and gradient norm nan; computed again it is loss 0")
        assert text.endswith("a transient fault of rank 1 (host first, device cpu)")
    assert found[0]["nan once"]["checkpoints"] == ["step_00000008", "step_00000016", "step_00000024", "step_00000025"]
    assert found[0]["nan once, resumed"]["ended"] == "complete"
    assert found[0]["nan once, resumed"]["lines"] == found[0]["off"]["lines"]


@pytest.mark.slow
def test_a_nan_that_comes_back_asks_for_another_node_which_settles_it(found: list[dict[str, dict[str, Any]]]) -> None:
    first, same, other = (found[0][name] for name in ("nan", "nan, same node", "nan, other node"))
    assert first["ended"][0] == EXIT_RERUN_ELSEWHERE and first["memory"]
    assert "the same when computed again on rank 1 (host first, device cpu): data, settings, or" in first["ended"][1]
    assert first["checkpoints"] == ["step_00000008", "step_00000016", "step_00000024", "step_00000025"]
    assert same["ended"][0] == EXIT_RERUN_ELSEWHERE and same["memory"]
    assert "on the same again: rank 1 (host first, device cpu); start on another node" in same["ended"][1]
    assert other["ended"][0] == EXIT_RESULT_REJECTED and not other["memory"]
    assert "the same on another device: it is the run's own; lower optimizer.lr" in other["ended"][1]
    assert other["checkpoints"] == first["checkpoints"] and len(other["lines"]) == FAULTY_STEP - 1


@pytest.mark.slow
def test_a_device_that_always_errs_is_found_and_left(found: list[dict[str, dict[str, Any]]]) -> None:
    assert found[0]["bad node"]["ended"][0] == EXIT_RERUN_ELSEWHERE
    code, text = found[0]["bad node, left"]["ended"]
    assert code == EXIT_RESULT_REJECTED and "on another device it is loss 0" in text
    assert "a persistent fault of host first, device cpu; take it out" in text
    assert found[0]["bad node, resumed"]["ended"] == "complete"
    assert found[0]["bad node, resumed"]["lines"] == found[0]["off"]["lines"]


@pytest.mark.slow
def test_after_other_settings_nothing_is_compared(found: list[dict[str, dict[str, Any]]]) -> None:
    assert found[0]["changed"]["memory"] and not found[0]["changed, resumed"]["memory"]
    resumed = found[0]["changed, resumed"]
    assert one(resumed["said"], "rerun.json").endswith("no longer counts and is deleted: settings changed")
    assert resumed["ended"] == "complete" and resumed["lines"] == found[0]["off"]["lines"]


@pytest.mark.parametrize("content", ["{", "[]", '{"step": 3}'])
def test_a_damaged_memory_says_what_to_delete(tmp_path: Path, content: str) -> None:
    rerun = StepRerun.__new__(StepRerun)
    rerun._memory, rerun._config_yaml, rerun._groups = tmp_path / "rerun.json", "", SimpleNamespace(world_size=1)
    assert rerun._read_memory() is None
    rerun._memory.write_text(content)
    with pytest.raises(ValueError, match=r"rerun.json is damaged .*: delete it to go on without it"):
        rerun._read_memory()
