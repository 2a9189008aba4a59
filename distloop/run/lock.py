"""The lock of a run directory: a file that names the owner, with a heartbeat.
The owner counts the heartbeat up. A process that sees no change for DEAD_SECONDS of its own clock takes over: so the
clocks and process numbers of two machines are never compared. On the same machine, and after a requeue of the same
Slurm job, no wait is needed.

Not filelock's SoftFileLease: it takes two machines of one name for the same, waits for ever for a lock that was cut
short, sees only at its second beat that it was taken over, and cannot name a job or move with its folder."""

import contextlib
import json
import os
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from distloop.errors import UsageError
from distloop.ranks.talking import say
from distloop.run.files import now, write_json

LOCK = "lock.json"
BEAT_SECONDS = 5.0
DEAD_SECONDS = 30.0  # several beats, and longer than a shared file system takes to show one


class RunLock:
    """The lock of one run directory. Takes effect with acquire()."""

    def __init__(self) -> None:
        self.path: Path | None = None
        self.identity = {
            "token": uuid.uuid4().hex,
            "machine": os.uname().nodename,
            "processes": _process_space(),
            "pid": os.getpid(),
            "pid_started": _started(os.getpid()),
            "slurm_job": os.environ.get("SLURM_JOB_ID"),
            "slurm_restart": int(os.environ.get("SLURM_RESTART_COUNT", 0)),
            "since": now(),
        }
        self.beats = 0
        self.next_beat = 0.0
        self.busy = threading.Lock()  # beats come from several threads
        self.taken_over_by: str | None = None

    def acquire(self, folder: Path) -> str | None:
        """Own `folder`; returns a message if a dead owner had it. Raises UsageError that names a living owner."""
        path = folder / LOCK
        while True:
            if self._create(path):
                for leftover in folder.glob(f".{LOCK}.*"):  # of starts that were killed
                    if not leftover.name.startswith(f".{LOCK}.after-"):
                        leftover.unlink(missing_ok=True)
                return None
            if (owner := _read(path)) is None:
                continue  # released in between
            if not self._is_dead(path, owner):
                raise UsageError(
                    f"{folder} belongs to a run that is going on: {describe(owner)}. Wait for its end, or stop it "
                    f"(touch {folder / 'STOP'}), or use --name OTHER for a run of its own."
                )
            if self._replace(path, owner):
                return f"taken over from {describe(owner)}, which is dead"

    def _replace(self, path: Path, owner: dict[str, Any]) -> bool:
        """Replace a dead owner's lock by ours, without a moment between; False: look again. Of several processes that
        want to, the one that creates a file with the dead owner's token does."""
        claim = path.with_name(f".{LOCK}.after-{owner.get('token', 'nobody')}")
        try:
            os.close(os.open(claim, os.O_CREAT | os.O_EXCL))
        except FileExistsError:  # another process does; a file of one that was killed then is removed
            with contextlib.suppress(FileNotFoundError):
                if time.time() - claim.stat().st_mtime > DEAD_SECONDS:
                    claim.unlink()
            time.sleep(0.02)
            return False
        try:
            owner_now = _read(path)
            if owner_now is None or owner_now.get("token") != owner.get("token"):
                return False  # another process was faster
            self._write(path)
            self.path, self.next_beat = path, time.monotonic() + BEAT_SECONDS
            return True
        finally:
            claim.unlink(missing_ok=True)

    def beat(self) -> str | None:
        """Count the heartbeat up, when it is time to. Returns who has taken over, if anyone has. That happens if this
        process was suspended for DEAD_SECONDS. It must not write any more."""
        with self.busy:
            if self.path is not None and self.taken_over_by is None and time.monotonic() >= self.next_beat:
                self.next_beat = time.monotonic() + BEAT_SECONDS
                self._beat(self.path)
            return self.taken_over_by

    def _beat(self, path: Path) -> None:
        try:
            owner = _read(path)
            if owner and owner.get("token") != self.identity["token"]:
                self.taken_over_by = describe(owner)
            else:
                self._write(path)
        except OSError:  # the disk is full; the time of the file can still be set
            with contextlib.suppress(OSError):
                os.utime(path)

    def move(self, folder: Path, to: Path) -> None:
        """Rename our folder, and release it."""
        with self.busy:
            folder.rename(to)
            self.path = to / LOCK
        self.release()

    def release(self) -> None:
        """Remove the lock, if it is ours."""
        with self.busy:
            path, self.path = self.path, None
        if path is not None and (_read(path) or {}).get("token") == self.identity["token"]:
            path.unlink(missing_ok=True)

    def _create(self, path: Path) -> bool:
        aside = path.with_name(f".{LOCK}.{self.identity['token']}")
        self._write(aside)
        try:
            os.link(aside, path)  # fails if the file exists, and shows whole files only, on NFS too
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links
            try:
                os.close(os.open(path, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return False
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)
        self.path, self.next_beat = path, time.monotonic() + BEAT_SECONDS
        return True

    def _write(self, path: Path) -> None:
        self.beats += 1
        write_json(path, {**self.identity, "beat": self.beats, "written": now()}, synced=False)

    def _is_dead(self, path: Path, owner: dict[str, Any]) -> bool:
        job, restart = self.identity["slurm_job"], self.identity["slurm_restart"]
        if job and owner.get("slurm_job") == job and int(owner.get("slurm_restart") or 0) < int(str(restart)):
            return True  # Slurm requeues a job once its processes have ended
        if (ended := _has_ended(owner, self.identity["processes"])) is not None:
            return ended
        say(f"distloop: looking for up to {DEAD_SECONDS:.0f} s whether {describe(owner)} still owns {path.parent}")
        sign, until = _sign(path), time.monotonic() + DEAD_SECONDS
        while time.monotonic() < until:
            time.sleep(0.5)
            if _sign(path) != sign:
                return not path.exists()
        return True


def owner_of(folder: Path) -> dict[str, Any] | None:
    """The owner that the lock of a run directory names; {} if it is damaged, None if there is none."""
    return _read(folder / LOCK)


def why_gone(folder: Path, owner: dict[str, Any] | None) -> str | None:
    """Why nobody runs in `folder`, whose lock names `owner`, any more; None while the owner lives. Does not wait:
    of an owner on another machine it takes the heartbeat's age by the file system's clock and ours. That is good enough
    for a display, not for taking over."""
    if owner is None:
        return "its process has ended"
    process = f"process {owner.get('pid')} on {owner.get('machine')}"
    if (ended := _has_ended(owner, _process_space())) is not None:
        return f"{process} has ended" if ended else None
    try:
        silent = time.time() - (folder / LOCK).stat().st_mtime
    except FileNotFoundError:  # released in between
        return f"{process} has ended"
    return f"silent {silent:.0f} s: {process}" if silent > DEAD_SECONDS else None


def describe(owner: dict[str, Any]) -> str:
    """ "process 123 on gpu03, Slurm job 42, since 2026-…" """
    job = f", Slurm job {owner['slurm_job']}" if owner.get("slurm_job") else ""
    return f"process {owner.get('pid')} on {owner.get('machine')}{job}, since {owner.get('since')}"


def _read(path: Path) -> dict[str, Any] | None:
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
        return owner if isinstance(owner, dict) else {}
    except FileNotFoundError:
        return None
    except ValueError:
        return {}


def _has_ended(owner: dict[str, Any], processes: object) -> bool | None:
    """True if the owner has ended; None if it is on another machine than those `processes` (_process_space())."""
    if not owner.get("processes") or owner["processes"] != processes:
        return None
    started, pid = owner.get("pid_started"), owner.get("pid")
    if not (started and isinstance(pid, int)):  # a damaged lock
        return True
    return _started(pid) not in (started, "unknown")


def _sign(path: Path) -> tuple[Any, ...]:
    """The parts of a lock that change while its owner lives."""
    try:
        return _read(path), path.stat().st_mtime_ns
    except OSError:
        return ()


def _process_space() -> str | None:
    """The machine's boot and the container: process numbers may be compared where both are the same."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _started(pid: int) -> str | None:
    """When a process of this machine started, in clock ticks since boot; None if it does not run. Not by psutil: its
    time changes when the clock is set, and another user's process that the system hides does not exist for it."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:  # another user's process, which runs
        pass
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:  # another operating system, or hidden from other users
        return "unknown"
    return None if fields[0] in "ZX" else fields[19]
