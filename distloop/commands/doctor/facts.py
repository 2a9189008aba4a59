"""The facts about a rank and its machine that `distloop doctor` gathers. checks.py judges them.

torch is imported inside functions, since the environment must be set before that.
"""

import contextlib
import hashlib
import importlib.metadata
import os
import platform
import re
import shutil
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

import distloop
from distloop.errors import UsageError
from distloop.ranks import launch_guards
from distloop.ranks.environment import node_name

SHOWN_SETTINGS = re.compile(r"(NCCL|GLOO|CUDA|TORCH|PYTORCH|OMP|MKL)_")
LIMITS = {"open files": "RLIMIT_NOFILE", "processes": "RLIMIT_NPROC", "locked memory": "RLIMIT_MEMLOCK"}


def find_facts(given: Mapping[str, str], runs_dir: str, device: str, expected: int | None) -> dict[str, Any]:
    """The facts that this rank gathers without the others, as plain JSON. Sizes are in bytes.

    `given`: the environment at the start of this process. `device`, `expected`: --device and --expect-world.
    """
    import torch

    if device == "auto" and launch_guards.launcher_uses_cpu(given):
        device = "cpu"
    uses_cuda = torch.cuda.is_available() and device != "cpu"
    problem, warnings = _launch(given, device, not uses_cuda, expected)
    return {
        "rank": int(os.environ.get("RANK", 0)),
        "node": node_name(),
        "host": os.uname().nodename,
        "launch": problem,
        "launch_warnings": warnings,
        "device": "cuda" if uses_cuda else "cpu",
        "wants_device": device,
        "gpu": _gpu() if uses_cuda else None,
        "versions": _versions(),
        "driver": _driver(),
        "code": _code(),
        "cpus": psutil.Process().cpu_affinity() if psutil.LINUX else list(range(os.cpu_count() or 1)),
        "threads": torch.get_num_threads(),
        "slurm_cpus_per_task": given.get("SLURM_CPUS_PER_TASK"),
        "memory": _memory(),
        "disks": {"run directory": _free(Path(runs_dir)), "/tmp": _free(Path("/tmp"))},
        "shared_memory": _free(Path("/dev/shm"))["free"] if os.path.isdir("/dev/shm") else None,
        "limits": _limits(),
        "rdma": os.path.isdir("/sys/class/infiniband") and bool(os.listdir("/sys/class/infiniband")),
        "settings": {name: value for name, value in sorted(given.items()) if SHOWN_SETTINGS.match(name)},
        "unknown_interfaces": unknown_interfaces(given, [name for _, name in socket.if_nameindex()]),
        "accelerate_config": _accelerate_config(),
    }


def _launch(given: Mapping[str, str], device: str, use_cpu: bool, expected: int | None) -> tuple[str, list[str]]:
    """What is wrong with the launch of this process ("" if nothing), and warnings, in the words of a run."""
    launch = launch_guards.launched_by()
    try:
        warnings = launch_guards.override_launcher(dict(given), "no")
        launch_guards.check_launch(os.environ, launch, device, use_cpu)
        launch_guards.check_world(int(os.environ.get("WORLD_SIZE", 1)), os.environ, expected, launch)
    except UsageError as error:
        return str(error), []
    return "", warnings


def _gpu() -> dict[str, Any]:
    """The GPU of this rank, chosen as train.py chooses it. It becomes torch's current device."""
    import torch

    visible = torch.cuda.device_count()
    number = int(os.environ.get("LOCAL_RANK", 0)) % visible
    torch.cuda.set_device(number)
    properties = torch.cuda.get_device_properties(number)
    free, total = torch.cuda.mem_get_info(number)
    uuid = str(getattr(properties, "uuid", number))
    return {"name": properties.name, "uuid": uuid, "free": free, "total": total, "visible": visible}


def _versions() -> dict[str, str | None]:
    import torch
    import torch.distributed as dist

    packages: dict[str, str | None] = dict.fromkeys(("torchvision", "accelerate", "numpy"))
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            packages[name] = importlib.metadata.version(name)
    has_nccl = torch.version.cuda is not None and dist.is_nccl_available()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        **packages,
        "distloop": distloop.__version__,
        "CUDA": torch.version.cuda,
        "NCCL": ".".join(map(str, torch.cuda.nccl.version())) if has_nccl else None,
    }


def _driver() -> str | None:
    """The version of NVIDIA's kernel driver."""
    with contextlib.suppress(OSError):
        match = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", Path("/proc/driver/nvidia/version").read_text(encoding="utf-8"))
        return match[1] if match else None
    return None


def _code() -> dict[str, Any]:
    """Which copy of distloop this is: a digest of its files, and the commit if git tracks it."""
    folder = Path(distloop.__file__).resolve().parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())

    def git(*words: str) -> str | None:
        try:
            command = ("git", "-C", str(folder), *words)
            return subprocess.run(
                command, capture_output=True, encoding="utf-8", errors="replace", timeout=10, check=True
            ).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return None

    commit = git("rev-parse", "--short", "HEAD") if git("ls-files", "__init__.py") else None
    changed = bool(git("status", "--porcelain", "--", ".")) if commit else False
    return {"folder": str(folder), "digest": digest.hexdigest()[:12], "commit": commit, "changed": changed}


def _memory() -> int:
    """Bytes of memory available on the machine, or the limit of this process's control group if that is less."""
    sizes = [psutil.virtual_memory().available]
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers in ("", "memory"):  # "": version 2, in which the limits of all parent groups count
                root = Path("/sys/fs/cgroup", controllers)
                groups = [root / path.strip("/"), *(root / path.strip("/")).parents]
                names = [group / name for group in groups for name in ("memory.max", "memory.limit_in_bytes")]
                texts = [name.read_text(encoding="utf-8").strip() for name in names if name.is_file()]
                sizes += [int(text) for text in texts if text.isdecimal()]
    return min(sizes)


def _free(path: Path) -> dict[str, Any]:
    """Bytes free on the disk of this folder, which need not exist yet."""
    path = path.absolute()
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    try:
        return {"path": str(path), "free": shutil.disk_usage(existing).free}
    except OSError:
        return {"path": str(path), "free": None}


def _limits() -> dict[str, int | None]:
    """The soft limits of this process; None for unlimited."""
    import resource

    soft = {name: resource.getrlimit(getattr(resource, limit))[0] for name, limit in LIMITS.items()}
    return {name: None if value == resource.RLIM_INFINITY else value for name, value in soft.items()}


def unknown_interfaces(environ: Mapping[str, str], interfaces: list[str]) -> dict[str, str]:
    """variable -> value, for each variable that names only network interfaces that this machine lacks.

    Gloo accepts names; NCCL accepts beginnings of names, `=` before exact names, and `^` before names to avoid.
    """
    unknown = {}
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        value = environ.get(variable, "")
        matches = str.__eq__ if variable.startswith("GLOO") or value.startswith("=") else str.startswith
        names = value.removeprefix("=").split(",")
        exists = any(matches(interface, name) for name in names for interface in interfaces)
        if value and not value.startswith("^") and not exists:
            unknown[variable] = value
    return unknown


def _accelerate_config() -> str | None:
    """Accelerate's default file of this user, if it exists and the launcher was started without --config_file."""
    with contextlib.suppress(psutil.Error):
        if "--config_file" in " ".join(psutil.Process(os.getppid()).cmdline()):
            return None
    try:
        from accelerate.commands.config.config_args import default_config_file
    except Exception:  # another version of Accelerate
        return None
    return str(default_config_file) if os.path.isfile(default_config_file) else None
