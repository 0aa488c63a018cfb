"""A Slurm cluster of two nodes, n1 and n2, on this machine: real daemons, in a directory of their own.

    PYTHONPATH=tests python -m slurm.cluster        starts one, says how to use it, and ends it with Ctrl-C

Each node has one CPU and claims a GPU, which is /dev/null. Jobs of the partition `urgent` take the nodes from those of
`patient`, which get SIGTERM and a minute.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
from ports import free_ports

PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
DAEMONS = ("munged", "slurmctld", "slurmd")
CONFIGURATION = """
ClusterName=two
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket
StateSaveLocation={directory}/state
SlurmctldPidFile={directory}/slurmctld.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdPidFile={directory}/%n/slurmd.pid
SlurmdLogFile={directory}/%n.log
SlurmdSpoolDir={directory}/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
KillWait=10
ReturnToService=2
SchedulerParameters=batch_sched_delay=1,sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={first_port} CPUs=1 Gres=gpu:1
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={second_port} CPUs=1 Gres=gpu:1
PartitionName=patient Nodes=n[1-2] Default=YES PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=n[1-2] PriorityTier=2 PreemptMode=OFF
"""


def is_installed() -> bool:
    return all(shutil.which(daemon, path=PATH) for daemon in DAEMONS)


def wait_until(condition: Callable[[], object], what: str, *, timeout: float) -> float:
    """Wait for a condition; returns the seconds that it took.

    Raises:
        TimeoutError: it did not come true in time.
    """
    started = time.monotonic()
    while not condition():
        if time.monotonic() - started > timeout:
            raise TimeoutError(f"{what} did not happen within {timeout:g} s")
        time.sleep(0.2)
    return time.monotonic() - started


class Cluster:
    """Two nodes and their controller; `running` makes one."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.environment = {**os.environ, "PATH": PATH, "SLURM_CONF": str(directory / "slurm.conf")}
        for name in ("state", "n1", "n2"):
            (directory / name).mkdir()
        ports = free_ports(3)
        (directory / "slurm.conf").write_text(
            CONFIGURATION.format(
                directory=directory,
                user=getpass.getuser(),
                host=socket.gethostname().partition(".")[0],
                controller_port=ports[0],
                first_port=ports[1],
                second_port=ports[2],
            )
        )
        (directory / "gres.conf").write_text("NodeName=n[1-2] Name=gpu File=/dev/null\n")

    def start(self) -> None:
        """Start all daemons and wait until both nodes are idle."""
        key = self.directory / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        files = [f"--{what}={self.directory}/munge.{what.partition('-')[0]}" for what in ("log-file", "pid-file")]
        files += [f"--seed-file={self.directory}/munge.seed", f"--key-file={key}"]
        files += [f"--socket={self.directory}/munge.socket"]
        # Forced: the directory above is closed to other users, and munge asks for one that is open.
        self._daemon("munged", "--foreground", "--force", *files)
        wait_until((self.directory / "munge.socket").exists, "munge's socket", timeout=20)
        self._daemon("slurmctld", "-D")
        for node in ("n1", "n2"):
            self.start_node(node)
        wait_until(lambda: self.run("sinfo", "-h", "-o", "%t %D").split("\n")[0] == "idle 2", "idle nodes", timeout=60)

    def start_node(self, name: str) -> None:
        self._daemon("slurmd", "-D", "-N", name)

    def _daemon(self, *command: str) -> None:
        with open(self.directory / f"{command[0]}{command[-1] if '-N' in command else ''}.out", "ab") as output:
            subprocess.Popen(command, env=self.environment, stdout=output, stderr=output, start_new_session=True)

    def run(self, *command: str, cwd: Path | None = None, **variables: str) -> str:
        """What a command of Slurm's prints.

        Raises:
            subprocess.SubprocessError: it failed, or took half a minute.
        """
        environment = self.environment | variables
        finished = subprocess.run(
            command, check=True, env=environment, cwd=cwd, stdout=subprocess.PIPE, text=True, timeout=30
        )
        return finished.stdout.strip()

    def submit(self, *command: str, cwd: Path, **variables: str) -> str:
        """`sbatch` in a folder; returns the number of the job."""
        return self.run("sbatch", "--parsable", *command, cwd=cwd, **variables)

    def state(self, job: str) -> str:
        """State of a job and its exit code: "FAILED 2:0"."""
        shown = dict(word.partition("=")[::2] for word in self.run("scontrol", "show", "job", "-o", job).split())
        return f"{shown['JobState']} {shown['ExitCode']}"

    def processes(self, *nodes: str) -> list[psutil.Process]:
        """All that runs here for these nodes: daemon, steps and what they have started; without nodes, the controller's
        processes too."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                environment = process.environ()
                if environment.get("SLURM_CONF") == self.environment["SLURM_CONF"]:
                    node = environment.get("SLURMD_NODENAME", process.cmdline()[-1])
                    if node in nodes or not nodes:
                        found.append(process)
                elif process.name() == "slurmstepd":
                    # A step's daemon has no environment, but the log of its node is open in it.
                    logs = {str(self.directory / f"{node}.log") for node in nodes or ("n1", "n2")}
                    if logs & {file.path for file in process.open_files()}:
                        found.append(process)
        return found

    def signal_tasks(self, job: str, number: signal.Signals) -> None:
        """Signal the tasks of a job's steps and nothing that they have started, as clusters with cgroups do."""
        for process in self.processes("n1", "n2"):
            with contextlib.suppress(psutil.Error):
                environment = process.environ()
                is_step = environment.get("SLURM_STEP_ID", "").isdigit() and environment["SLURM_JOB_ID"] == job
                if is_step and process.parent().name() == "slurmstepd":  # type: ignore[union-attr]
                    process.send_signal(number)

    def rank(self, job: str, rank: int) -> psutil.Process:
        """The process of a rank."""
        wanted = {"SLURM_JOB_ID": job, "RANK": str(rank)}
        [process] = [p for p in self.processes("n1", "n2") if wanted.items() <= p.environ().items()]
        return process

    def kill_node(self, name: str) -> None:
        """As when the plug is pulled, except that peers see connections break: nobody on the node gets a word."""
        kill(self.processes(name))

    def stop(self) -> None:
        """End everything that was started here."""
        with contextlib.suppress(subprocess.SubprocessError):
            self.run("scancel", "--user", getpass.getuser(), "--signal", "KILL", "--full")
        kill(self.processes())


def kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(processes, timeout=20)


@contextlib.contextmanager
def running() -> Iterator[Cluster]:
    """A cluster in a new temporary directory, which is gone at the end with everything in it."""
    # Not pytest's: the path of a socket may have no more than 107 characters.
    with tempfile.TemporaryDirectory(prefix="megadiff-slurm-", ignore_cleanup_errors=True) as directory:
        cluster = Cluster(Path(directory))
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()


if __name__ == "__main__":
    with running() as two_nodes, contextlib.suppress(KeyboardInterrupt):
        print(f"export SLURM_CONF={two_nodes.environment['SLURM_CONF']}    # Ctrl-C ends the cluster", flush=True)
        while True:
            time.sleep(3600)
