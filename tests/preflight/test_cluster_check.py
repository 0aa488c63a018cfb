"""The pre-flight check on two processes that take themselves for two nodes; and what happens when one is not there."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from distributed import run_ranks

from megadiff.cli import main
from megadiff.exit_codes import EXIT_HUNG
from megadiff.integrity import sources_digest
from megadiff.preflight import measure
from megadiff.preflight.check import check_cluster, peers, rounds_of_pairs
from megadiff.preflight.facts import driver_version
from megadiff.preflight.judge import PreflightConfig
from megadiff.preflight.meeting import Meeting, MeetingEndedError, Place, first_host

# Processes that share busy cores are of any speed.
CALM = PreflightConfig(scratch_mib=2, timeout=60.0, min_compute=0.0, min_bandwidth=0.0, min_writing=0.0)
CALM_FLAGS = [
    word for name in ("min-compute", "min-bandwidth", "min-writing") for word in (f"--{name}", "0")
]  # fmt: skip


def as_two_nodes() -> Any:
    return mock.patch("socket.gethostname", lambda: f"node{os.environ['RANK']}")


def two_nodes_checked(scratch: Path) -> tuple[int, str]:
    with as_two_nodes(), contextlib.redirect_stdout(io.StringIO()) as output:
        code = main(["doctor", "--cluster", "--scratch", str(scratch), "--scratch-mib", "2", *CALM_FLAGS])
    return code, output.getvalue()


def test_two_nodes_are_measured_and_the_slowest_is_named(tmp_path: Path) -> None:
    (code, text), other = run_ranks(2, two_nodes_checked, tmp_path)
    assert (code, other) == (0, (0, "")), text
    assert "2 rank(s) on 2 node(s)" in text and "nothing is wrong" in text and "slowest: node node" in text
    for name in ("matrix products", "writing", "all-reduce, pairs of nodes", "sending, pairs of nodes"):
        assert f"\n{name} " in text
    assert not list(tmp_path.iterdir())


def two_different_nodes(folder: Path) -> tuple[bool, list[str]]:
    second = os.environ["RANK"] == "1"
    scratch = folder / "not there" if second else folder
    with as_two_nodes(), mock.patch.dict(os.environ, {"NCCL_DEBUG": "INFO"} if second else {}):
        is_good, verdict = check_cluster(
            PreflightConfig(scratch=scratch, scratch_mib=1, timeout=60.0, min_compute=0, min_bandwidth=0)
        )
    return is_good, verdict.wrong if verdict else []


def test_what_is_wrong_is_said_by_rank_zero_and_known_to_all(tmp_path: Path) -> None:
    (is_good, wrong), other = run_ranks(2, two_different_nodes, tmp_path)
    assert not is_good and other == (False, [])
    cannot_write, different = wrong
    assert (
        cannot_write.startswith("rank 1 on node1: cannot write in ") and "(No such file or directory)" in cannot_write
    )
    assert different == "NCCL_DEBUG is INFO on node1, but not there elsewhere: make them the same"


def one_rank_does_not_come() -> tuple[int, str]:
    if os.environ["RANK"] == "1":
        return 0, ""
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        return main(["doctor", "--cluster", "--timeout", "2"]), errors.getvalue()


def test_a_rank_that_never_comes_is_named() -> None:
    (code, text), _ = run_ranks(2, one_rank_does_not_come, timeout=60.0)
    assert code == EXIT_HUNG
    assert "error: rank 1 did not answer within 2 s (before: host): look at what that node prints" in text


def only_rank_zero_leaves() -> str:
    meeting = Meeting(Place.of(os.environ), timeout=1.0)
    meeting.enter()
    if meeting.place.rank == 1:
        time.sleep(2)  # rank 0 keeps the store for this one as long as it said it would
        return ""
    with mock.patch("megadiff.preflight.meeting.logger.warning") as warning:
        meeting.leave()
    return str(warning.call_args[0][1])


def test_who_keeps_the_store_leaves_last_and_waits_no_longer_than_for_anything() -> None:
    assert run_ranks(2, only_rank_zero_leaves) == [f"rank 1 on {socket.gethostname()}", ""]


def one_rank_falls_silent() -> str:
    """Rank 1 meets the others, and then does nothing more; rank 2 learns from rank 0 who that was."""
    with as_two_nodes():
        meeting = Meeting(Place.of(os.environ), timeout=60.0)
        meeting.enter()
        meeting.timeout = 1.0
        if meeting.place.rank == 1:
            time.sleep(3.0)  # the test's time-out would take it for dead
            return ""
        with pytest.raises(MeetingEndedError) as caught:
            meeting.collect("products")
        return str(caught.value)


def test_a_rank_that_falls_silent_is_named_with_its_host_by_all_others() -> None:
    zero, _, two = run_ranks(3, one_rank_falls_silent, timeout=90.0)
    assert zero == two
    assert zero.startswith("rank 1 on node1 did not answer within 1 s (before: products)")


def rank_zero_leaves() -> str:
    meeting = Meeting(Place.of(os.environ), timeout=30.0)
    if meeting.place.rank == 0:
        meeting.store.get("seen")  # the store is there until rank 1 has found it
        return ""
    meeting.store.set("seen", "")
    meeting.timeout = 0.5
    with (
        mock.patch("megadiff.preflight.meeting.SECONDS_FOR_AN_ANSWER", 0.5),
        pytest.raises(MeetingEndedError) as caught,
    ):
        meeting.collect("products")
    return str(caught.value)


def test_a_silent_rank_zero_is_named() -> None:
    _, message = run_ranks(2, rank_zero_leaves, timeout=90.0)
    assert message.startswith("rank 0 did not answer rank 1 within 1 s")


def test_a_job_without_a_store_says_where_it_looked() -> None:
    place = Place.of({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"})
    with pytest.raises(MeetingEndedError, match=r"rank 1 on .* found no store at localhost:1 within 1 s"):
        Meeting(place, timeout=1.0)


def test_what_hangs_or_fails_after_all_have_signed_in_ends(caplog: pytest.LogCaptureFixture) -> None:
    meeting = Meeting(Place.of({}), timeout=0.2)
    with mock.patch("megadiff.preflight.meeting.os._exit") as leave, caplog.at_level(logging.CRITICAL):
        with meeting.in_time("a product"):
            pass
        time.sleep(0.4)
        assert not leave.called
        with meeting.in_time("a collective"):
            while not leave.called:
                time.sleep(0.05)
        with (
            pytest.raises(
                MeetingEndedError, match=r"a collective failed on rank 0 on .*, so look at .*: remote end gone"
            ),
            meeting.in_time("a collective"),
        ):
            raise RuntimeError("remote\n end gone")
    leave.assert_called_once_with(EXIT_HUNG)
    assert "waited 0.2 s for a collective and goes" in caplog.text


def test_places_are_those_of_torchrun_and_srun() -> None:
    assert Place.of({}).world_size == 1
    torchrun = {"RANK": "3", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "29500"}
    place = Place.of({**torchrun, "TORCHELASTIC_USE_AGENT_STORE": "True", "SLURM_STEP_NUM_TASKS": "2"})
    assert (place.rank, place.world_size, place.local_rank, place.launcher_has_store) == (3, 16, 1, True)
    srun = {"SLURM_PROCID": "9", "SLURM_STEP_NUM_TASKS": "16", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "12345678"}
    place = Place.of({**srun, "SLURM_STEP_NODELIST": "gpu[007-009,12],login1"})
    assert (place.rank, place.local_rank, place.address, place.port) == (9, 1, "gpu007", 25_678)
    assert not place.launcher_has_store and first_host("login1,gpu[1-2]") == "login1"
    with pytest.raises(ValueError, match="WORLD_SIZE is 2, but RANK, MASTER_PORT not set: start with torchrun or srun"):
        Place.of({"WORLD_SIZE": "2", "MASTER_ADDR": "a"})


@pytest.mark.parametrize("num_nodes", range(1, 10))
def test_every_node_meets_both_neighbours_and_one_at_a_time(num_nodes: int) -> None:
    rounds = rounds_of_pairs(num_nodes)
    for edges in rounds:
        nodes = [node for edge in edges for node in edge]
        assert len(nodes) == len(set(nodes))
    met = {frozenset(edge) for edges in rounds for edge in edges}
    assert met == {frozenset((node, (node + 1) % num_nodes)) for node in range(num_nodes) if num_nodes > 1}


def test_ranks_send_to_those_at_their_place_on_the_other_node() -> None:
    assert peers([([0, 1], [2, 3]), ([4, 5], [6])]) == {0: 2, 1: 3, 2: 0, 3: 1, 4: 6, 6: 4}


def test_facts_of_a_gpu_are_read_as_they_are_written(tmp_path: Path) -> None:
    version = tmp_path / "version"
    version.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  565.57.01  Release Build\n")
    assert driver_version(version) == "565.57.01" and driver_version(tmp_path / "none") == "unknown"
    assert len(sources_digest()) == 16

    def answered(code: str) -> float | None:
        query = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        with contextlib.suppress(subprocess.TimeoutExpired):
            query.wait(30.0 if "print" in code else 0.1)
        return measure._answer(query)

    assert answered("print(1980)") == 1980.0 and answered("print('[N/A]')") is None
    assert answered("import time; time.sleep(60)") is None and measure._answer(None) is None


def test_options_out_of_range_and_out_of_place_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for options, message in (
        (["--cluster", "--scratch-mib", "0"], "--scratch-mib is 0, but must be at least 1"),
        (["--cluster", "--timeout", "0"], "--timeout is 0.0, but must be positive"),
        (["--cluster", "--max-clock-offset", "-1"], "--max-clock-offset is -1.0, but must be positive"),
        (["--cluster", "--min-compute", "1"], "--min-compute is 1.0, but must lie in [0, 1)"),
        (["--cluster", "--min-share-of-peak", "1"], "--min-share-of-peak is 1.0, but must lie in [0, 1)"),
        (["--cluster", "--min-pair-gb-per-s", "-1"], "--min-pair-gb-per-s is -1.0, but must be at least 0"),
        (["--scratch", "here"], "--scratch is for the check of a cluster: give --cluster, too"),
    ):
        assert main(["doctor", *options]) == 2
        assert message in capsys.readouterr().err
