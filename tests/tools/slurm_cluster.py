"""A real Slurm cluster in one folder: munged, slurmctld and two nodes with two pretend GPUs each, on loopback.

`python -m tests.tools.slurm_cluster` starts one to play with. It needs root and Debian's slurmctld, slurmd,
slurm-client and munge, and neither systemd nor /etc/slurm.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.tools.ranks import REPOSITORY, clean_environment, free_port

NODES = ("n1", "n2")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "OUT_OF_MEMORY")
_SEARCH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"  # where Debian has the daemons; not on every user's PATH

# cred_expire is also what a requeued job waits before it starts again; Slurm's own is 120 seconds.
# Job numbers differ between clusters of one machine, since runs derive their ports from them.
_CONFIGURATION = """\
ClusterName=distloop
FirstJobId={first_job}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
StateSaveLocation={folder}/state
SlurmdPidFile={folder}/%n.pid
SlurmdLogFile={folder}/%n.log
SlurmdSpoolDir={folder}/spool/%n
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire={requeue_delay}
MpiDefault=none
ProctrackType=proctrack/{proctrack}
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=1000
GresTypes=gpu
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
MinJobAge=86400
MessageTimeout=5
ReturnToService=1
KillWait={kill_wait}
SlurmdTimeout={slurmd_timeout}
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port={node_ports} CPUs=8 RealMemory=16000 Gres=gpu:2
PartitionName=debug Nodes=n[1-2] Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime={grace_time}
PartitionName=urgent Nodes=n[1-2] MaxTime=INFINITE PriorityTier=10
"""


def missing() -> str | None:
    """What keeps a cluster from starting on this machine and how to get it, in one line; None if nothing does."""
    absent = [program for program in PROGRAMS if shutil.which(program, path=_SEARCH) is None]
    if absent:
        return f"no {', '.join(absent)}: apt-get install slurmctld slurmd slurm-client munge"
    return None if os.geteuid() == 0 else "a Slurm cluster for tests needs root (a container will do)"


def _cgroup(node: str) -> Path:
    return Path(f"/sys/fs/cgroup/freezer/slurm_{node}")  # where proctrack/cgroup keeps a node's jobs


def _remove_cgroups() -> bool:
    for group in [group for node in NODES for group, *_ in os.walk(_cgroup(node), topdown=False)]:
        with contextlib.suppress(OSError):
            os.rmdir(group)
    return not any(_cgroup(node).exists() for node in NODES)


def cgroup_missing() -> str | None:
    """Why proctrack/cgroup does not work on this machine, in one line; None if it does."""
    freezer = Path("/sys/fs/cgroup/freezer")
    if not freezer.is_dir():
        return "proctrack/cgroup needs the freezer controller of cgroup v1 in /sys/fs/cgroup/freezer"
    if not os.access(freezer, os.W_OK):
        return f"proctrack/cgroup needs a writable {freezer}: run the container with --privileged"
    if any(_cgroup(node).exists() for node in NODES):
        return "proctrack/cgroup: another such cluster is running or was killed, for its cgroups are there"
    return None


@dataclass
class Cluster:
    """Two nodes, n1 and n2, of 8 CPUs and 2 GPUs; partitions `debug` and `urgent`, whose jobs preempt those of debug.

    All that it writes is in `folder`, whose path must be short enough for a socket (about 70 characters).
    Times are in seconds and Slurm's own.
    """

    folder: Path
    proctrack: str = "linuxproc"  # or cgroup, see cgroup_missing()
    kill_wait: int = 30  # what a job has between SIGTERM and SIGKILL
    slurmd_timeout: int = 10  # how long a node may be silent; seen DOWN about 20 s after it was killed
    grace_time: int = 0  # the notice of preemption
    requeue_delay: int = 5  # between the requeue of a job and its next start; Slurm takes no less

    def __post_init__(self) -> None:
        self.folder = self.folder.resolve()
        self.configuration = self.folder / "slurm.conf"
        self.environment = {**clean_environment(), "SLURM_CONF": str(self.configuration)}
        self.environment["PATH"] = f"{Path(sys.executable).parent}:{self.environment['PATH']}"
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Cluster:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def start(self) -> None:
        """Bring everything up and wait until both nodes take jobs. TimeoutError with the logs if they do not."""
        for name in ("state", "spool/n1", "spool/n2"):
            (self.folder / name).mkdir(parents=True)
        ports = ",".join(str(free_port()) for _ in NODES)
        host = socket.gethostname().split(".")[0]
        own = {"controller_port": free_port(), "node_ports": f"[{ports}]", "first_job": 1 + secrets.randbelow(100_000)}
        self.configuration.write_text(_CONFIGURATION.format(**vars(self), host=host, **own))
        for index, device in enumerate(("null", "zero")):  # Slurm asks no more of a GPU than to be a device file
            (self.folder / f"gpu{index}").symlink_to(f"/dev/{device}")
        (self.folder / "gres.conf").write_text(f"AutoDetect=off\nName=gpu File={self.folder}/gpu[0-1]\n")
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        words = [f"--{option}={self.folder}/munge.{name}" for option, name in files.items()]
        try:
            self._start_daemon("munged", "munged", "--foreground", "--force", *words)
            self.wait_until((self.folder / "munge.socket").exists, "munged")
            self._start_daemon("slurmctld", "slurmctld", "-D", "-f", str(self.configuration))
            for node in NODES:
                self.start_slurmd(node)
            self.wait_until(lambda: all(self.node_state(node) == "IDLE" for node in NODES), "the nodes to be IDLE", 60)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Take everything down: the daemons, and what jobs have left on the nodes."""
        for node in NODES:
            self.kill_slurmd(node)
        for daemon in reversed(self.daemons.values()):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self.daemons.clear()
        if self.proctrack == "cgroup":
            self.wait_until(_remove_cgroups, "the nodes' cgroups to be empty")

    def _start_daemon(self, name: str, *words: str) -> None:
        # In the foreground, so that its pid is known, and ended by the kernel should the thread that starts it end.
        with open(self.folder / f"{name}.out", "ab") as output:
            self.daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "TERM", *words],
                cwd=self.folder,
                env={**self.environment, "PATH": f"{self.environment['PATH']}:/usr/sbin:/sbin"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def run(
        self, *words: str, folder: Path | None = None, environment: dict[str, str] | None = None, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run one of Slurm's commands. RuntimeError with its output if it fails and `check` is set."""
        variables = {**self.environment, **(environment or {})}
        result = subprocess.run(
            words, cwd=folder or self.folder, env=variables, text=True, capture_output=True, timeout=60, check=False
        )
        if check and result.returncode != 0:
            raise RuntimeError(f"{' '.join(words)}: exit code {result.returncode}\n{result.stdout}{result.stderr}")
        return result

    def submit(
        self,
        script: Path,
        *arguments: str,
        options: Sequence[str] = (),
        folder: Path | None = None,
        environment: dict[str, str] | None = None,
    ) -> str:
        """sbatch a script from `folder` (the script's own by default); returns the job's id."""
        words = ["sbatch", "--parsable", *options, str(script), *arguments]
        return self.run(*words, folder=folder or script.parent, environment=environment).stdout.strip()

    def jobs(self, job_id: str) -> list[dict[str, str]]:
        """The fields of `scontrol show job`: one record, or one per task that an array has been split into."""
        lines = self.run("scontrol", "show", "job", "--oneliner", job_id).stdout.splitlines()
        return [dict(re.findall(r"(\w[\w:/]*)=(.*?)(?= [\w:/]+=|\s*$)", line)) for line in lines if line.strip()]

    def job(self, job_id: str) -> dict[str, str]:
        return self.jobs(job_id)[0]

    def wait(self, job_id: str, *states: str, restarts: int = 0, timeout: float = 60) -> dict[str, str]:
        """Wait until a job that was restarted at least so many times is in one of these states (default: has ended).

        Returns its fields. A requeued job waiting to start again is PENDING; with `restarts` it is waited through.
        """
        wanted = states or ENDED
        found: dict[str, str] = {}

        def reached() -> bool:
            found.clear()
            found.update(self.job(job_id))
            return found["JobState"] in wanted and int(found["Restarts"]) >= restarts

        def what() -> str:
            return f"job {job_id} to be {' or '.join(wanted)}; it is {found}\n{self.log(job_id)}"

        self.wait_until(reached, what, timeout)
        return found

    def log(self, job_id: str) -> str:
        """What a job has printed."""
        path = Path(self.job(job_id)["StdOut"])
        return path.read_text(errors="replace") if path.exists() else ""

    def node_state(self, node: str) -> str:
        """The state as Slurm writes it, such as IDLE, MIXED, DOWN*, IDLE+DRAIN; UNKNOWN if slurmctld is not there."""
        found = re.search(r"State=(\S+)", self.run("scontrol", "show", "node", node, check=False).stdout)
        return found[1] if found else "UNKNOWN"

    def set_node(self, node: str, state: str, reason: str = "a test") -> None:
        self.run("scontrol", "update", f"NodeName={node}", f"State={state}", f"Reason={reason}")

    def start_slurmd(self, node: str) -> None:
        self._start_daemon(node, "slurmd", "-D", "-N", node, "-f", str(self.configuration))

    def kill_slurmd(self, node: str, with_tasks: bool = True) -> None:
        """kill -9 a node's slurmd and, as if the machine had lost power, all that runs in its jobs."""
        daemon = self.daemons.pop(node, None)
        if daemon is not None:
            daemon.kill()
            daemon.wait()
        while with_tasks and (processes := self.processes(node)):
            for process in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.01)

    def processes(self, node: str) -> list[int]:
        """The pids of a node's slurmstepds, of the processes in its jobs, and of all their descendants."""
        parents = {}
        for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
            with contextlib.suppress(OSError):
                state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
                if state != "Z":
                    parents[pid] = int(parent)
        found = {pid for pid in parents if self._belongs(pid, node)}
        if self.proctrack == "cgroup":
            for path in _cgroup(node).rglob("cgroup.procs"):
                with contextlib.suppress(OSError):
                    found |= {int(pid) for pid in path.read_text().split()}
        while children := {pid for pid, parent in parents.items() if parent in found} - found:
            found |= children
        return sorted(found)

    def _belongs(self, pid: int, node: str) -> bool:
        process = Path(f"/proc/{pid}")
        with contextlib.suppress(OSError):
            if process.joinpath("exe").readlink().name.startswith("slurmstepd"):  # Debian's is slurmstepd-wlm
                log = self.folder / f"{node}.log"
                return any(file.readlink() == log for file in process.joinpath("fd").iterdir())
            variables = process.joinpath("environ").read_bytes().split(b"\0")
            return {f"SLURM_CONF={self.configuration}".encode(), f"SLURMD_NODENAME={node}".encode()} <= set(variables)
        return False

    def clean(self) -> None:
        """Cancel all jobs, start slurmds that were killed and bring the nodes back to IDLE."""

        def no_jobs() -> bool:
            self.run("scancel", "--full", "--signal=KILL", "--state=RUNNING", check=False)
            self.run("scancel", "--user=root", check=False)
            return not self.run("squeue", "--noheader").stdout.strip()

        for node in NODES:
            if node not in self.daemons:
                self.start_slurmd(node)
        self.wait_until(no_jobs, "all jobs to end", 90)
        for node in NODES:
            if self.node_state(node) != "IDLE":
                self.run("scontrol", "update", f"NodeName={node}", "State=RESUME", check=False)
        self.wait_until(lambda: all(self.node_state(node) == "IDLE" for node in NODES), "the nodes to be IDLE")

    def wait_until(self, condition: Callable[[], Any], what: str | Callable[[], str], timeout: float = 60) -> None:
        """Wait for a condition, up to `timeout` seconds. TimeoutError with the ends of the daemons' logs."""
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > deadline:
                text = what if isinstance(what, str) else what()
                raise TimeoutError(f"waited {timeout:g} s for {text}\n{self.logs()}")
            time.sleep(0.1)

    def logs(self, lines: int = 30) -> str:
        """The ends of the daemons' logs."""
        tails = []
        for name in ("slurmctld", *NODES):
            log = self.folder / f"{name}.log"
            path = log if log.exists() else log.with_suffix(".out")  # what was wrong before the log was opened
            if path.exists():
                tails += [f"---- {path}", *path.read_text(errors="replace").splitlines()[-lines:]]
        return "\n".join(tails)


def main() -> None:
    if (reason := missing()) is not None:
        sys.exit(reason)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder, contextlib.suppress(KeyboardInterrupt):
        started = time.monotonic()
        with Cluster(Path(folder)) as cluster:
            print(f"# Up after {time.monotonic() - started:.1f} s, until Ctrl-C. In another terminal:")
            path = f"{Path(sys.executable).parent}:$PATH"
            print(f'export SLURM_CONF={cluster.configuration} PATH="{path}" PYTHONPATH={REPOSITORY}', flush=True)
            signal.pause()


if __name__ == "__main__":
    main()
