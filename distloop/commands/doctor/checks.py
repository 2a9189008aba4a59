"""The checks of `distloop doctor` on the facts that ranks have gathered: a verdict for each subject, and an advice.

Plain functions of the facts of all ranks (find_facts of facts.py), by rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from distloop.commands.doctor.results import (
    FAIL,
    OK,
    WARN,
    Facts,
    Result,
    names_text,
    nodes_by,
    nodes_of,
    ranks_by_value,
    ranks_text,
    spread_text,
    where,
)
from distloop.commands.doctor.variables import variables
from distloop.tracking.wording import memory_size, plural

GIB = 2**30
LEAST_SHARED_MEMORY = GIB
LEAST_MEMORY_PER_RANK = GIB
LEAST_FREE = {"run directory": 10 * GIB, "/tmp": GIB}
LEAST_LIMITS = {"open files": (4096, "ulimit -n 65536"), "processes": (4096, "ulimit -u 65536")}


def check_facts(facts: Facts) -> list[Result]:
    """The results of all checks of this file."""
    checks = (launch, versions, code, devices, cpus, memory, disks, shared_memory, limits, variables)
    return [result for check in checks for result in check(facts)]


def launch(facts: Facts) -> list[Result]:
    """How the ranks were started, and on which nodes."""
    problems = [fact["launch"] for fact in facts if fact["launch"]]
    if problems:
        problem, _, advice = problems[0].partition("\n")
        return [Result(FAIL, "launch", problem, advice)]
    warnings = sorted({warning for fact in facts for warning in fact["launch_warnings"]})
    if warnings:
        return [Result(WARN, "launch", "; ".join(warnings), "Harmless if the config asks for the same.")]
    nodes = nodes_of(facts)
    places = [f"{ranks_text(ranks)} on {node}" for node, ranks in nodes.items()]
    finding = ", ".join(places[:8]) + (f" and {len(places) - 8} more nodes" if len(places) > 8 else "")
    return [Result(OK, "launch", finding if len(facts) > 1 else f"one process on {facts[0]['node']}")]


def versions(facts: Facts) -> list[Result]:
    """Whether all ranks have the same versions of Python, packages and driver."""
    results = []
    advice = "Use one environment on all nodes: a virtual environment on a shared disk, or a container."
    for name in facts[0]["versions"]:
        values = [fact["versions"][name] for fact in facts]
        if len(set(values)) > 1:
            results.append(Result(FAIL, "versions", f"{name} differs: {spread_text(facts, values)}", advice))
    drivers = [fact["driver"] for fact in facts]
    if len(set(drivers)) > 1:
        finding = f"the GPU driver differs: {spread_text(facts, drivers)}"
        results.append(Result(WARN, "versions", finding, "Ask for nodes of one kind."))
    if not results:
        items = {**facts[0]["versions"], "driver": facts[0]["driver"]}
        finding = ", ".join(f"{name} {version}" for name, version in items.items() if version)
        results.append(Result(OK, "versions", finding + (", the same on all ranks" if len(facts) > 1 else "")))
    return results


def code(facts: Facts) -> list[Result]:
    """Whether all ranks run the same code."""

    def text(fact: Mapping[str, Any]) -> str:
        copy = fact["code"]
        if copy["commit"] is None:
            return f"files {copy['digest']} in {copy['folder']}"
        changes = " with changes" if copy["changed"] else ""
        return f"commit {copy['commit']}{changes} ({copy['digest']}) in {copy['folder']}"

    if len({fact["code"]["digest"] for fact in facts}) > 1:
        finding = f"the ranks run different code: {spread_text(facts, [text(fact) for fact in facts])}"
        advice = "Start all ranks from one copy of the code, on a shared disk, or bring the copies to one commit."
        return [Result(FAIL, "code", finding, advice)]
    return [Result(OK, "code", text(facts[0]))]


def devices(facts: Facts) -> list[Result]:
    """Whether each rank has a GPU of its own, and GPUs are of one kind and free."""
    gpus = {rank: fact["gpu"] for rank, fact in enumerate(facts) if fact["gpu"]}
    without = [rank for rank in range(len(facts)) if rank not in gpus]
    wanted = facts[0]["wants_device"]
    advice = "See that each task is given a GPU (nvidia-smi there, CUDA_VISIBLE_DEVICES, Slurm's --gpus-per-node)."
    if without and (gpus or wanted == "cuda"):
        return [Result(FAIL, "devices", f"no GPU for {where(facts, without)}", advice)]
    if not gpus:
        driver = facts[0]["driver"]
        if driver and wanted == "auto":
            torch = f"PyTorch {facts[0]['versions']['torch']}"
            finding = f"the CPU: there is a GPU driver ({driver}), but {torch} sees no GPU"
            advice = "Install a PyTorch for this driver's CUDA; see CUDA_VISIBLE_DEVICES."
            return [Result(WARN, "devices", finding, advice)]
        return [Result(OK, "devices", "the CPU")]
    results = []
    places: dict[tuple[str, str], list[int]] = {}
    for rank, gpu in gpus.items():
        places.setdefault((facts[rank]["host"], gpu["uuid"]), []).append(rank)
    for (_, uuid), ranks in places.items():
        if len(ranks) > 1:
            finding = f"{where(facts, ranks)} are on one GPU ({uuid})"
            advice = (
                "Start at most one process per GPU; CUDA_VISIBLE_DEVICES must differ between tasks that see one each."
            )
            results.append(Result(FAIL, "devices", finding, advice))
    names = [gpu["name"] for gpu in gpus.values()]
    if len(set(names)) > 1:
        finding = f"GPUs differ: {spread_text(facts, names)}"
        results.append(Result(WARN, "devices", finding, "All wait for the slowest: ask for nodes of one kind."))
    counts = nodes_by(lambda ranks: (max(gpus[rank]["visible"] for rank in ranks), len(ranks)), nodes_of(facts))
    for (visible, count), nodes in counts.items():
        if visible > count:
            finding = f"{visible} GPUs are shown to {plural(count, 'rank')}: {names_text(nodes)}"
            results.append(Result(WARN, "devices", finding, "Start one process per GPU to use them all."))
    busy = [rank for rank, gpu in gpus.items() if gpu["free"] < 0.9 * gpu["total"]]
    if busy:
        least = min(gpus[rank]["free"] for rank in busy)
        finding = f"GPU memory is in use by others for {where(facts, busy)}: {memory_size(least)} free"
        results.append(Result(WARN, "devices", finding, "See what runs there (nvidia-smi), or ask for exclusive GPUs."))
    name = f"{facts[0]['gpu']['name']}, {memory_size(facts[0]['gpu']['total'])}"
    return results or [Result(OK, "devices", f"{len(gpus)} × {name}" if len(gpus) > 1 else name)]


def cpus(facts: Facts) -> list[Result]:
    """Whether the ranks of a node have as many CPUs as they start threads."""
    results = []
    short_of_cpus = [
        rank
        for rank, fact in enumerate(facts)
        if (fact["slurm_cpus_per_task"] or "").isdecimal() and len(fact["cpus"]) < int(fact["slurm_cpus_per_task"])
    ]
    if short_of_cpus:
        fact = facts[short_of_cpus[0]]
        finding = (
            f"SLURM_CPUS_PER_TASK is {fact['slurm_cpus_per_task']}, but {where(facts, short_of_cpus)} may use "
            f"{len(fact['cpus'])} of the node's CPUs"
        )
        advice = "srun does not take over --cpus-per-task: export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK before it."
        results.append(Result(WARN, "CPUs", finding, advice))
    nodes = nodes_of(facts)
    counts = nodes_by(
        lambda ranks: (len(ranks), sum(facts[rank]["threads"] for rank in ranks), _cpus_of(facts, ranks)), nodes
    )
    for (count, threads, cpu_count), names in counts.items():
        finding = f"{plural(count, 'rank')} with {plural(threads, 'thread')} on {cpu_count} CPUs: {names_text(names)}"
        advice = f"export OMP_NUM_THREADS={max(1, cpu_count // count)}"
        if count > cpu_count:
            results.append(Result(WARN, "CPUs", finding, "Ask for at least one CPU per rank (Slurm: --cpus-per-task)."))
        elif threads > cpu_count:
            results.append(Result(WARN, "CPUs", finding, f"{advice}: threads in excess wait for each other."))
        elif (
            facts[nodes[names[0]][0]]["device"] == "cpu" and 4 * threads <= cpu_count
        ):  # torch would start one per core
            results.append(Result(WARN, "CPUs", finding, f"{advice}: launchers set 1 where it is not set."))
    each = ranks_by_value([f"{len(fact['cpus'])} CPUs and {plural(fact['threads'], 'thread')}" for fact in facts])
    finding = "; ".join(f"{text} for {where(facts, ranks)}" for text, ranks in each.items())
    return results or [Result(OK, "CPUs", finding)]


def _cpus_of(facts: Facts, ranks: Iterable[int]) -> int:
    return len({cpu for rank in ranks for cpu in facts[rank]["cpus"]})


def memory(facts: Facts) -> list[Result]:
    """How much memory the node with the least memory per rank has left."""
    nodes = {node: ranks for node, ranks in nodes_of(facts).items() if facts[ranks[0]]["memory"] is not None}
    if not nodes:
        return []
    node = min(nodes, key=lambda node: facts[nodes[node][0]]["memory"] / len(nodes[node]))
    left, ranks = facts[nodes[node][0]]["memory"], nodes[node]
    finding = f"{memory_size(left)} left on {node}, for {plural(len(ranks), 'rank')} and loader workers"
    if left / len(ranks) < LEAST_MEMORY_PER_RANK:
        return [Result(WARN, "memory", finding, "Ask for more memory (Slurm: --mem), or start fewer ranks per node.")]
    return [Result(OK, "memory", finding)]


def disks(facts: Facts) -> list[Result]:
    """How much room the disks have."""
    results = []
    for name, least in LEAST_FREE.items():
        readable = [fact for fact in facts if fact["disks"][name]["free"] is not None]
        if readable:
            fact = min(readable, key=lambda fact: fact["disks"][name]["free"])
            free, path = fact["disks"][name]["free"], fact["disks"][name]["path"]
            on_node = f" of {fact['node']}" if len(nodes_of(facts)) > 1 else ""
            finding = f"{memory_size(free)} free in {path}{on_node}"
            if free < least:
                results.append(Result(WARN, "disk", finding, f"Make room: {memory_size(least)} is little enough."))
            else:
                results.append(Result(OK, "disk", finding))
    return results


def shared_memory(facts: Facts) -> list[Result]:
    """How much shared memory loader workers have."""
    having = [fact for fact in facts if fact["shared_memory"] is not None]
    if not having:
        return []
    fact = min(having, key=lambda fact: fact["shared_memory"])
    finding = f"{memory_size(fact['shared_memory'])} free in /dev/shm of {fact['node']}"
    if fact["shared_memory"] < LEAST_SHARED_MEMORY:
        advice = "Loader workers hand batches over in it: docker run --shm-size=16g (or --ipc=host), or data.workers 0."
        return [Result(WARN, "shared memory", finding, advice)]
    return [Result(OK, "shared memory", finding)]


def limits(facts: Facts) -> list[Result]:
    """Limits of the process: open files, processes, locked memory."""
    results = []

    def text(name: str, value: int | None) -> str:
        if value is None:
            return f"{name} unlimited"
        return f"{name} {memory_size(value) if name == 'locked memory' else value}"

    for name, (least, advice) in LEAST_LIMITS.items():
        low = [rank for rank, fact in enumerate(facts) if (fact["limits"][name] or least) < least]
        if low:
            finding = f"{text(name, facts[low[0]]['limits'][name])} for {where(facts, low)}"
            advice += " before the start, or ask whoever keeps the machine."
            results.append(Result(WARN, "limits", finding, advice))
    locked = [rank for rank, fact in enumerate(facts) if fact["rdma"] and fact["limits"]["locked memory"] is not None]
    if locked:
        finding = f"{text('locked memory', facts[locked[0]]['limits']['locked memory'])} for {where(facts, locked)}"
        advice = "InfiniBand needs it: ulimit -l unlimited (Slurm: LimitMEMLOCK=infinity for slurmd)."
        results.append(Result(WARN, "limits", finding, advice))
    finding = ", ".join(text(name, value) for name, value in facts[0]["limits"].items())
    return results or [Result(OK, "limits", finding)]
