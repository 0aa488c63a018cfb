"""examples/pretrain_dlm.sh on a real Slurm cluster: preempted, given a ladder, misused, and cut in half."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pretraining import LAUNCHER, ON_CPUS, comparable, lines, torchrun, write_recipe
from slurm.cluster import Cluster, is_installed, running, wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.slurm,
    pytest.mark.skipif(not is_installed(), reason="Slurm is not installed: apt-get install slurm-wlm munge"),
]
WITHOUT_GPUS = ("--gpus-per-node", "0", "--time", "30")
STEPS = ("--training.train-steps", "200")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running() as cluster:
        yield cluster


@pytest.fixture
def recipe(tmp_path: Path, corpus_dir: Path) -> Path:
    return write_recipe(tmp_path / "recipe.py", corpus_dir)


def submit(cluster: Cluster, recipe: Path, *options: str, settings: tuple[str, ...] = (), **variables: str) -> str:
    """Submit the real file from another folder than the checkout, one process per node."""
    variables = ON_CPUS | {"NPROC_PER_NODE": "1"} | variables
    options = (*WITHOUT_GPUS, "--output", "%j.log", *options)
    return cluster.submit(*options, str(LAUNCHER), str(recipe), *settings, cwd=recipe.parent, **variables)


def start_again(cluster: Cluster, job: str) -> None:
    """Else Slurm waits for two minutes; sooner than this, it takes the new start for the one that it has revoked."""
    cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now+10")


def has_trained(run_dir: Path, *, steps: int) -> bool:
    return len(lines(run_dir)) >= steps


def test_preempted_run_goes_on_to_the_same_losses(cluster: Cluster, recipe: Path) -> None:
    folder = recipe.parent
    job = submit(cluster, recipe, "--nodes", "2", settings=("--run-dir", "preempted", *STEPS))
    wait_until(lambda: has_trained(folder / "preempted", steps=20), "the first steps", timeout=300)
    urgent = cluster.submit("-p", "urgent", "--nodes", "2", "--output", "/dev/null", "--wrap", "true", cwd=folder)
    wait_until(lambda: cluster.state(urgent) == "COMPLETED 0:0", "the urgent job", timeout=60)
    assert cluster.state(job).startswith("PENDING")
    assert 20 <= len(lines(folder / "preempted")) < 200, "stopped between first and last step"

    start_again(cluster, job)
    wait_until(lambda: has_trained(folder / "preempted", steps=100), "later steps", timeout=300)
    cluster.signal_tasks(job, signal.SIGTERM)  # clusters with cgroups signal nobody else
    wait_until(lambda: cluster.state(job).startswith("PENDING"), "the job in the queue", timeout=60)
    start_again(cluster, job)
    wait_until(lambda: cluster.state(job) == "COMPLETED 0:0", "the end", timeout=300)
    log = (folder / f"{job}.log").read_text()
    said = ("start 1 of job", "back into the queue", "start 2 of job", "start 3 of job", "complete: preempted")
    assert sorted(said, key=log.index) == list(said)
    for start in (0, 1):
        assert "stopped by SIG" in (folder / f"preempted/logs/{job}.{start}/n1.log").read_text()
    resumed = (folder / f"preempted/logs/{job}.2/n1.log").read_text()
    assert "resumed from" in resumed and "changed since" not in resumed

    torchrun(recipe, "--run-dir", "whole", *STEPS)
    assert comparable(folder / "preempted") == comparable(folder / "whole")


def test_array_gives_each_task_its_line_and_its_run(cluster: Cluster, recipe: Path) -> None:
    folder = recipe.parent
    (folder / "ladder.txt").write_text(f"--optimizer.lr 1e-3\n{recipe} --optimizer.lr 3e-3\n")
    submit(
        cluster, recipe, "--nodes", "1", "--array", "1-3", "--output", "%a.log",
        settings=("--ladder", "ladder.txt", "--run-dir", "rates", "--dry-run"),
    )  # fmt: skip
    wait_until(lambda: not cluster.run("squeue", "-h"), "the end of the array", timeout=300)
    for task, rate in enumerate(("1e-3", "3e-3"), start=1):
        log = (folder / f"{task}.log").read_text()
        assert f"megadiff train {recipe} --run-dir rates/{task} --training.exit-after=1740" in log
        assert f"--optimizer.lr {rate}\n" in log
    assert "line 3 of ladder.txt is empty, or there is none" in (folder / "3.log").read_text()
    assert not (folder / "rates").exists()


def test_tasks_of_an_array_go_back_into_the_queue_by_themselves(cluster: Cluster, recipe: Path) -> None:
    """One is asked to, the one whose number is that of the whole array; the time of the other comes to its end."""
    folder = recipe.parent
    (folder / "ladder.txt").write_text("--optimizer.lr 1e-3\n--optimizer.lr 3e-3\n")
    array = submit(
        cluster, recipe, "--nodes", "1", "--array", "1-2", "--output", "%a.log", "--time", "4",
        settings=("--ladder", "ladder.txt", "--run-dir", "rates", "--training.train-steps", "100000"),
    )  # fmt: skip
    runs = {task: folder / "rates" / str(task) for task in (1, 2)}
    wait_until(lambda: all(has_trained(run, steps=5) for run in runs.values()), "the first steps", timeout=300)
    [namesake] = [task for task, run in runs.items() if (run / f"logs/{array}.0").exists()]
    other = 3 - namesake
    cluster.signal_tasks(array, signal.SIGUSR1)
    wait_until(lambda: cluster.state(f"{array}_{namesake}").startswith("PENDING"), "the task in the queue", timeout=60)
    assert cluster.state(f"{array}_{other}").startswith("RUNNING")
    wait_until(lambda: cluster.state(f"{array}_{other}").startswith("PENDING"), "the end of its time", timeout=240)
    cluster.run("scancel", array)
    wait_until(lambda: not cluster.run("squeue", "-h"), "the end of the array", timeout=120)
    for task, run in runs.items():
        assert "back into the queue" in (folder / f"{task}.log").read_text()
        [log] = run.glob("logs/*.0/n*.log")
        assert "stopped by SIGUSR1 after step" in log.read_text(), "Slurm sends it two minutes before the time is over"


def test_bad_input_is_one_sentence_before_any_node_starts(cluster: Cluster, recipe: Path) -> None:
    folder = recipe.parent
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        tensor = ("--parallel.tensor-model-parallel-size",)
        jobs = {
            submit(cluster, folder / "none.py", "--nodes", "1"): f"no recipe {folder}/none.py: expected a Python file",
            submit(cluster, recipe, "--nodes", "1", MASTER_PORT=port): f"port {port} of n",
            submit(cluster, recipe, "--nodes", "1", MASTER_PORT="70000"): "MASTER_PORT is '70000', but must be a port",
            submit(cluster, recipe, "--nodes", "1", "--array", "7"): "this is task 7 of an array",
            submit(cluster, recipe, "--nodes", "1", "--gpus-per-node", "1"): "Slurm granted 1 GPU(s) on",
            submit(cluster, recipe, "--nodes", "2", settings=(*tensor, "4")): "2 process(es) cannot hold copies of a "
            "model divided over tensor 4",
        }
        wait_until(lambda: not cluster.run("squeue", "-h"), "the end of the jobs", timeout=300)
    for job, sentence in jobs.items():
        assert cluster.state(job) == "FAILED 2:0", sentence
        last = (folder / f"{job}.log").read_text().splitlines()[-1]
        assert last.startswith(f"error: {sentence}"), last
    assert not (folder / "runs").exists()


def test_job_fails_with_the_reason_when_a_node_dies(cluster: Cluster, recipe: Path) -> None:
    settings = ("--run-dir", "halved", "--training.train-steps", "100000")
    job = submit(cluster, recipe, "--nodes", "2", settings=settings)
    wait_until(lambda: has_trained(recipe.parent / "halved", steps=5), "the first steps", timeout=300)
    cluster.kill_node("n2")
    died = time.monotonic()
    log = recipe.parent / f"{job}.log"
    wait_until(lambda: "error: n1 failed" in log.read_text(), "the reason", timeout=60)
    wait_until(lambda: cluster.state(job).endswith(" 1:0"), "the failure of the job", timeout=60)
    assert time.monotonic() - died < 60
    assert "error: no word from n2: down" in log.read_text()
    assert "Connection" in log.read_text()
    assert "queue" not in log.read_text()


def test_job_fails_with_the_reason_when_one_rank_dies_and_its_peer_hangs(cluster: Cluster, recipe: Path) -> None:
    wait_until(lambda: cluster.run("sinfo", "-h", "-n", "n1", "-o", "%t") == "idle", "an idle node", timeout=60)
    settings = ("--run-dir", "hanging", "--training.train-steps", "100000")
    job = submit(cluster, recipe, "--nodes", "1", "-w", "n1", settings=settings, NPROC_PER_NODE="2")
    wait_until(lambda: has_trained(recipe.parent / "hanging", steps=5), "the first steps", timeout=300)
    cluster.rank(job, 0).suspend()
    cluster.rank(job, 1).kill()
    died = time.monotonic()
    wait_until(lambda: cluster.state(job).endswith(" 1:0"), "the failure of the job", timeout=60)
    assert time.monotonic() - died < 60
    log = (recipe.parent / f"{job}.log").read_text()
    assert "error: n1 failed with exit code 1" in log
