"""What `distloop doctor` thinks of what each rank has found alone: a verdict for each subject, and what to do.

Plain functions of the facts of all ranks (doctor_facts.py), by rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from distloop.commands.doctor.lines import (
    FAIL,
    OK,
    WARN,
    Facts,
    Line,
    group,
    names_text,
    nodes_of,
    ranks_text,
    spread,
    spread_text,
    where,
)
from distloop.tracking.wording import memory_size, plural

GIB = 2**30
LEAST_SHARED_MEMORY = GIB
LEAST_MEMORY_PER_RANK = GIB
LEAST_FREE = {"run directory": 10 * GIB, "/tmp": GIB}
LEAST_LIMITS = {"open files": (4096, "ulimit -n 65536"), "processes": (4096, "ulimit -u 65536")}


def check_facts(facts: Facts) -> list[Line]:
    """The lines on what each rank found alone."""
    checks = (launch, versions, code, devices, cpus, memory, disks, shared_memory, limits, environment)
    return [line for check in checks for line in check(facts)]


def launch(facts: Facts) -> list[Line]:
    problems = [fact["launch"] for fact in facts if fact["launch"]]
    if problems:
        what, _, right = problems[0].partition("\n")
        return [Line(FAIL, "launch", what, right)]
    warnings = sorted({warning for fact in facts for warning in fact["launch_warnings"]})
    if warnings:
        return [Line(WARN, "launch", "; ".join(warnings), "Harmless if the config asks for the same.")]
    nodes = nodes_of(facts)
    places = [f"{ranks_text(ranks)} on {node}" for node, ranks in nodes.items()]
    shown = ", ".join(places[:8]) + (f" and {len(places) - 8} more nodes" if len(places) > 8 else "")
    return [Line(OK, "launch", shown if len(facts) > 1 else f"one process on {facts[0]['node']}")]


def versions(facts: Facts) -> list[Line]:
    lines = []
    advice = "Use one environment on all nodes: a virtual environment on a shared disk, or a container."
    for name in facts[0]["versions"]:
        values = [fact["versions"][name] for fact in facts]
        if len(set(values)) > 1:
            lines.append(Line(FAIL, "versions", f"{name} differs: {spread_text(facts, values)}", advice))
    drivers = [fact["driver"] for fact in facts]
    if len(set(drivers)) > 1:
        found = f"the GPU driver differs: {spread_text(facts, drivers)}"
        lines.append(Line(WARN, "versions", found, "Ask for nodes of one kind."))
    if not lines:
        known = {**facts[0]["versions"], "driver": facts[0]["driver"]}
        shown = ", ".join(f"{name} {version}" for name, version in known.items() if version)
        lines.append(Line(OK, "versions", shown + (", the same on all ranks" if len(facts) > 1 else "")))
    return lines


def code(facts: Facts) -> list[Line]:
    def text(fact: Mapping[str, Any]) -> str:
        own = fact["code"]
        if own["commit"] is None:
            return f"files {own['digest']} in {own['folder']}"
        return f"commit {own['commit']}{' with changes' if own['changed'] else ''} ({own['digest']}) in {own['folder']}"

    if len({fact["code"]["digest"] for fact in facts}) > 1:
        found = f"the ranks run different code: {spread_text(facts, [text(fact) for fact in facts])}"
        advice = "Start all ranks from one copy of the code, on a shared disk, or bring the copies to one commit."
        return [Line(FAIL, "code", found, advice)]
    return [Line(OK, "code", text(facts[0]))]


def devices(facts: Facts) -> list[Line]:
    gpus = {rank: fact["gpu"] for rank, fact in enumerate(facts) if fact["gpu"]}
    without = [rank for rank in range(len(facts)) if rank not in gpus]
    wants = facts[0]["wants_device"]
    advice = "See that each task is given a GPU (nvidia-smi there, CUDA_VISIBLE_DEVICES, Slurm's --gpus-per-node)."
    if without and (gpus or wants == "cuda"):
        return [Line(FAIL, "devices", f"no GPU for {where(facts, without)}", advice)]
    if not gpus:
        driver = facts[0]["driver"]
        if driver and wants == "auto":
            torch = f"PyTorch {facts[0]['versions']['torch']}"
            found = f"the CPU: there is a GPU driver ({driver}), but {torch} sees no GPU"
            return [Line(WARN, "devices", found, "Install a PyTorch for this driver's CUDA; see CUDA_VISIBLE_DEVICES.")]
        return [Line(OK, "devices", "the CPU")]
    lines = []
    places: dict[tuple[str, str], list[int]] = {}
    for rank, gpu in gpus.items():
        places.setdefault((facts[rank]["host"], gpu["uuid"]), []).append(rank)
    for (_, uuid), ranks in places.items():
        if len(ranks) > 1:
            found = f"{where(facts, ranks)} are on one GPU ({uuid})"
            advice = (
                "Start at most one process per GPU; CUDA_VISIBLE_DEVICES must differ between tasks that see one each."
            )
            lines.append(Line(FAIL, "devices", found, advice))
    names = [gpu["name"] for gpu in gpus.values()]
    if len(set(names)) > 1:
        found = f"GPUs differ: {spread_text(facts, names)}"
        lines.append(Line(WARN, "devices", found, "All wait for the slowest: ask for nodes of one kind."))
    shown = group(nodes_of(facts), lambda ranks: (max(gpus[rank]["visible"] for rank in ranks), len(ranks)))
    for (visible, count), alike in shown.items():
        if visible > count:
            found = f"{visible} GPUs are shown to {plural(count, 'rank')}: {names_text(alike)}"
            lines.append(Line(WARN, "devices", found, "Start one process per GPU to use them all."))
    busy = [rank for rank, gpu in gpus.items() if gpu["free"] < 0.9 * gpu["total"]]
    if busy:
        least = min(gpus[rank]["free"] for rank in busy)
        found = f"GPU memory is in use by others for {where(facts, busy)}: {memory_size(least)} free"
        lines.append(Line(WARN, "devices", found, "See what runs there (nvidia-smi), or ask for exclusive GPUs."))
    name = f"{facts[0]['gpu']['name']}, {memory_size(facts[0]['gpu']['total'])}"
    return lines or [Line(OK, "devices", f"{len(gpus)} × {name}" if len(gpus) > 1 else name)]


def cpus(facts: Facts) -> list[Line]:
    lines = []
    lost = [
        rank
        for rank, fact in enumerate(facts)
        if (fact["slurm_cpus_per_task"] or "").isdecimal() and len(fact["cpus"]) < int(fact["slurm_cpus_per_task"])
    ]
    if lost:
        fact = facts[lost[0]]
        found = (
            f"SLURM_CPUS_PER_TASK is {fact['slurm_cpus_per_task']}, but {where(facts, lost)} may use "
            f"{len(fact['cpus'])} of the node's CPUs"
        )
        advice = "srun does not take over --cpus-per-task: export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK before it."
        lines.append(Line(WARN, "CPUs", found, advice))
    nodes = nodes_of(facts)
    for (count, threads, there), alike in group(
        nodes, lambda ranks: (len(ranks), sum(facts[rank]["threads"] for rank in ranks), _cpus_of(facts, ranks))
    ).items():
        found = f"{plural(count, 'rank')} with {plural(threads, 'thread')} on {there} CPUs: {names_text(alike)}"
        advice = f"export OMP_NUM_THREADS={max(1, there // count)}"
        if count > there:
            lines.append(Line(WARN, "CPUs", found, "Ask for at least one CPU per rank (Slurm: --cpus-per-task)."))
        elif threads > there:
            lines.append(Line(WARN, "CPUs", found, f"{advice}: threads in excess wait for each other."))
        elif facts[nodes[alike[0]][0]]["device"] == "cpu" and 4 * threads <= there:  # torch takes one per core
            lines.append(Line(WARN, "CPUs", found, f"{advice}: launchers set 1 where it is not set."))
    each = spread([f"{len(fact['cpus'])} CPUs and {plural(fact['threads'], 'thread')}" for fact in facts])
    return lines or [Line(OK, "CPUs", "; ".join(f"{text} for {where(facts, ranks)}" for text, ranks in each.items()))]


def _cpus_of(facts: Facts, ranks: Iterable[int]) -> int:
    return len({cpu for rank in ranks for cpu in facts[rank]["cpus"]})


def memory(facts: Facts) -> list[Line]:
    nodes = {node: ranks for node, ranks in nodes_of(facts).items() if facts[ranks[0]]["memory"] is not None}
    if not nodes:
        return []
    node = min(nodes, key=lambda node: facts[nodes[node][0]]["memory"] / len(nodes[node]))
    left, ranks = facts[nodes[node][0]]["memory"], nodes[node]
    found = f"{memory_size(left)} left on {node}, for {plural(len(ranks), 'rank')} and loader workers"
    if left / len(ranks) < LEAST_MEMORY_PER_RANK:
        return [Line(WARN, "memory", found, "Ask for more memory (Slurm: --mem), or start fewer ranks per node.")]
    return [Line(OK, "memory", found)]


def disks(facts: Facts) -> list[Line]:
    lines = []
    for name, least in LEAST_FREE.items():
        known = [fact for fact in facts if fact["disks"][name]["free"] is not None]
        if known:
            fact = min(known, key=lambda fact: fact["disks"][name]["free"])
            free, path = fact["disks"][name]["free"], fact["disks"][name]["path"]
            found = f"{memory_size(free)} free in {path}" + (f" of {fact['node']}" if len(nodes_of(facts)) > 1 else "")
            if free < least:
                lines.append(Line(WARN, "disk", found, f"Make room: {memory_size(least)} is little enough."))
            else:
                lines.append(Line(OK, "disk", found))
    return lines


def shared_memory(facts: Facts) -> list[Line]:
    known = [fact for fact in facts if fact["shared_memory"] is not None]
    if not known:
        return []
    fact = min(known, key=lambda fact: fact["shared_memory"])
    found = f"{memory_size(fact['shared_memory'])} free in /dev/shm of {fact['node']}"
    if fact["shared_memory"] < LEAST_SHARED_MEMORY:
        advice = "Loader workers hand batches over in it: docker run --shm-size=16g (or --ipc=host), or data.workers 0."
        return [Line(WARN, "shared memory", found, advice)]
    return [Line(OK, "shared memory", found)]


def limits(facts: Facts) -> list[Line]:
    lines = []

    def text(name: str, value: int | None) -> str:
        if value is None:
            return f"{name} unlimited"
        return f"{name} {memory_size(value) if name == 'locked memory' else value}"

    for name, (least, advice) in LEAST_LIMITS.items():
        low = [rank for rank, fact in enumerate(facts) if (fact["limits"][name] or least) < least]
        if low:
            found = f"{text(name, facts[low[0]]['limits'][name])} for {where(facts, low)}"
            lines.append(Line(WARN, "limits", found, f"{advice} before the start, or ask whoever keeps the machine."))
    locked = [rank for rank, fact in enumerate(facts) if fact["rdma"] and fact["limits"]["locked memory"] is not None]
    if locked:
        found = f"{text('locked memory', facts[locked[0]]['limits']['locked memory'])} for {where(facts, locked)}"
        advice = "InfiniBand needs it: ulimit -l unlimited (Slurm: LimitMEMLOCK=infinity for slurmd)."
        lines.append(Line(WARN, "limits", found, advice))
    shown = ", ".join(text(name, value) for name, value in facts[0]["limits"].items())
    return lines or [Line(OK, "limits", shown)]


def _is_on(value: str) -> bool:
    return value.lower() not in ("", "0", "false", "no")


# variable -> (whether its value is bad, what to do)
BAD_SETTINGS: dict[str, tuple[Callable[[str], bool], str]] = {
    "CUDA_LAUNCH_BLOCKING": (_is_on, "The CPU waits for each kernel: unset it unless you look for an error."),
    "NCCL_DEBUG": (lambda value: value.upper() == "TRACE", "It writes without end: use WARN or INFO."),
    "NCCL_P2P_DISABLE": (_is_on, "GPUs talk through the host's memory: unset it."),
    "NCCL_SHM_DISABLE": (_is_on, "GPUs of a node may talk through the network: unset it."),
    "NCCL_IB_DISABLE": (_is_on, "Nodes talk through plain sockets: unset it where there is InfiniBand or RoCE."),
    "TORCH_DISTRIBUTED_DEBUG": (lambda value: value.upper() == "DETAIL", "It checks each collective: unset it."),
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": (lambda value: value == "0", "A failed collective hangs: unset it."),
    "TORCH_NCCL_BLOCKING_WAIT": (_is_on, "The CPU waits for each collective: unset it."),
    "PYTORCH_NO_CUDA_MEMORY_CACHING": (_is_on, "Each tensor asks the driver for memory: unset it."),
}


def environment(facts: Facts) -> list[Line]:
    lines = []
    for variable, (is_bad, advice) in BAD_SETTINGS.items():
        values = [fact["settings"].get(variable) for fact in facts]
        bad = [rank for rank, value in enumerate(values) if value is not None and is_bad(value)]
        if bad:
            found = f"{variable}={values[bad[0]]} for {where(facts, bad)}"
            lines.append(Line(WARN, "environment", found, advice))
    hidden = [rank for rank, fact in enumerate(facts) if fact["settings"].get("CUDA_VISIBLE_DEVICES") == ""]
    if hidden and facts[0]["wants_device"] != "cpu":
        found = f"CUDA_VISIBLE_DEVICES is set and empty for {where(facts, hidden)}: all GPUs are hidden"
        lines.append(Line(WARN, "environment", found, "Unset it, or say --device cpu if that is meant."))
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        wrong = [rank for rank, fact in enumerate(facts) if variable in fact["unknown_interfaces"]]
        if wrong:
            value = facts[wrong[0]]["unknown_interfaces"][variable]
            found = f"{variable}={value} names no network interface of {where(facts, wrong)}"
            lines.append(Line(FAIL, "environment", found, "Unset it, or name one that `ip link` shows on that node."))
    names = sorted({name for fact in facts for name in fact["settings"] if name.startswith(("NCCL_", "TORCH_NCCL_"))})
    for name in names:
        values = [fact["settings"].get(name, "unset") for fact in facts]
        if len(set(values)) > 1:
            found = f"{name} differs: {spread_text(facts, values)}"
            lines.append(Line(WARN, "environment", found, "Export it alike on all nodes, or nowhere."))
    file = next((fact["accelerate_config"] for fact in facts if fact["accelerate_config"]), None)
    if file:
        found = f"{file} decides what a bare `accelerate launch` is not told"
        advice = "Give `accelerate launch --config_file launch/accelerate/….yaml`, as the scripts in launch/ do."
        lines.append(Line(WARN, "environment", found, advice))
    return lines or [Line(OK, "environment", "no setting that is known to be bad")]
