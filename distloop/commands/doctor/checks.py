"""The checks of `distloop doctor` on the facts of all ranks: each gives verdicts on one subject, and advice."""

from collections.abc import Mapping
from typing import Any

from distloop.commands.doctor.results import (
    FAIL,
    OK,
    WARN,
    Facts,
    Result,
    group,
    names_text,
    nodes_of,
    ranks_by_value,
    ranks_text,
    spread_text,
    warn_if,
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
    if len(facts) == 1:
        return [Result(OK, "launch", f"one process on {facts[0]['node']}")]
    places = [f"{ranks_text(ranks)} on {node}" for node, ranks in nodes_of(facts).items()]
    more = f" and {len(places) - 8} more nodes" if len(places) > 8 else ""
    return [Result(OK, "launch", ", ".join(places[:8]) + more)]


def versions(facts: Facts) -> list[Result]:
    """Whether all ranks have the same versions of Python, packages and driver."""
    results = []
    advice = "Use one environment on all nodes: a virtual environment on a shared disk, or a container."
    for name in facts[0]["versions"]:
        if spread := spread_text(facts, [fact["versions"][name] for fact in facts]):
            results.append(Result(FAIL, "versions", f"{name} differs: {spread}", advice))
    if spread := spread_text(facts, [fact["driver"] for fact in facts]):
        results.append(Result(WARN, "versions", f"the GPU driver differs: {spread}", "Ask for nodes of one kind."))
    items = {**facts[0]["versions"], "driver": facts[0]["driver"]}
    finding = ", ".join(f"{name} {version}" for name, version in items.items() if version)
    return results or [Result(OK, "versions", finding + (", the same on all ranks" if len(facts) > 1 else ""))]


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
    driver, wanted = facts[0]["driver"], facts[0]["wants_device"]
    if without and (gpus or wanted == "cuda"):
        advice = "See that each task is given a GPU (nvidia-smi there, CUDA_VISIBLE_DEVICES, Slurm's --gpus-per-node)."
        return [Result(FAIL, "devices", f"no GPU for {where(facts, without)}", advice)]
    if gpus:
        return _gpus(facts, gpus)
    if driver and wanted == "auto":
        finding = f"the CPU: there is a GPU driver ({driver}), but PyTorch {facts[0]['versions']['torch']} sees no GPU"
        advice = "Install a PyTorch for this driver's CUDA; see CUDA_VISIBLE_DEVICES."
        return [Result(WARN, "devices", finding, advice)]
    return [Result(OK, "devices", "the CPU")]


def _gpus(facts: Facts, gpus: dict[int, dict[str, Any]]) -> list[Result]:
    results = []
    advice = "Start at most one process per GPU; CUDA_VISIBLE_DEVICES must differ between tasks that see one each."
    ranks_of = group(((facts[rank]["host"], gpu["uuid"]), rank) for rank, gpu in gpus.items())
    for (_, uuid), ranks in ranks_of.items():
        if len(ranks) > 1:
            finding = f"{where(facts, ranks)} are on one GPU ({uuid})"
            results.append(Result(FAIL, "devices", finding, advice))
    if spread := spread_text(facts, [gpu["name"] for gpu in gpus.values()]):
        advice = "All wait for the slowest: ask for nodes of one kind."
        results.append(Result(WARN, "devices", f"GPUs differ: {spread}", advice))
    counts = group(
        ((max(gpus[rank]["visible"] for rank in ranks), len(ranks)), node) for node, ranks in nodes_of(facts).items()
    )
    for (visible, count), nodes in counts.items():
        if visible > count:
            finding = f"{visible} GPUs are shown to {plural(count, 'rank')}: {names_text(nodes)}"
            results.append(Result(WARN, "devices", finding, "Start one process per GPU to use them all."))
    busy = [rank for rank, gpu in gpus.items() if gpu["free"] < 0.9 * gpu["total"]]
    if busy:
        least = min(gpus[rank]["free"] for rank in busy)
        finding = f"GPU memory is in use by others for {where(facts, busy)}: {memory_size(least)} free"
        results.append(Result(WARN, "devices", finding, "See what runs there (nvidia-smi), or ask for exclusive GPUs."))
    name = f"{gpus[0]['name']}, {memory_size(gpus[0]['total'])}"
    return results or [Result(OK, "devices", f"{len(gpus)} × {name}" if len(gpus) > 1 else name)]


def cpus(facts: Facts) -> list[Result]:
    """Whether the ranks of a node have as many CPUs as they start threads."""
    results = []
    asked_for = [fact["slurm_cpus_per_task"] or "" for fact in facts]
    short = [r for r, fact in enumerate(facts) if asked_for[r].isdecimal() and len(fact["cpus"]) < int(asked_for[r])]
    if short:
        finding = (
            f"SLURM_CPUS_PER_TASK is {asked_for[short[0]]}, but {where(facts, short)} may use "
            f"{len(facts[short[0]]['cpus'])} of the node's CPUs"
        )
        advice = "srun does not take over --cpus-per-task: export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK before it."
        results.append(Result(WARN, "CPUs", finding, advice))
    nodes_by_counts = group((_counts([facts[rank] for rank in ranks]), node) for node, ranks in nodes_of(facts).items())
    for (ranks_there, threads, cpu_count, device), nodes in nodes_by_counts.items():
        advice = f"export OMP_NUM_THREADS={max(1, cpu_count // ranks_there)}"
        if ranks_there > cpu_count:
            advice = "Ask for at least one CPU per rank (Slurm: --cpus-per-task)."
        elif threads > cpu_count:
            advice += ": threads in excess wait for each other."
        elif device == "cpu" and 4 * threads <= cpu_count:  # torch would start one per core
            advice += ": launchers set 1 where it is not set."
        else:
            continue
        counts = f"{plural(ranks_there, 'rank')} with {plural(threads, 'thread')} on {cpu_count} CPUs"
        results.append(Result(WARN, "CPUs", f"{counts}: {names_text(nodes)}", advice))
    each = ranks_by_value([f"{len(fact['cpus'])} CPUs and {plural(fact['threads'], 'thread')}" for fact in facts])
    finding = "; ".join(f"{text} for {where(facts, ranks)}" for text, ranks in each.items())
    return results or [Result(OK, "CPUs", finding)]


def _counts(facts: Facts) -> tuple[int, int, int, str]:
    """(ranks, their threads, their CPUs, device) of a node, from the facts of its ranks."""
    cpus_of_node = {cpu for fact in facts for cpu in fact["cpus"]}
    return len(facts), sum(fact["threads"] for fact in facts), len(cpus_of_node), facts[0]["device"]


def memory(facts: Facts) -> list[Result]:
    """How much memory the node with the least memory per rank has left."""
    nodes = [
        (facts[ranks[0]]["memory"] / len(ranks), node, len(ranks))
        for node, ranks in nodes_of(facts).items()
        if facts[ranks[0]]["memory"] is not None
    ]
    if not nodes:
        return []
    per_rank, node, count = min(nodes, key=lambda each: each[0])
    finding = f"{memory_size(per_rank * count)} left on {node}, for {plural(count, 'rank')} and loader workers"
    advice = "Ask for more memory (Slurm: --mem), or start fewer ranks per node."
    return [warn_if(per_rank < LEAST_MEMORY_PER_RANK, "memory", finding, advice)]


def disks(facts: Facts) -> list[Result]:
    """How much room the disks have."""
    results = []
    for name, least in LEAST_FREE.items():
        readable = [(fact["disks"][name], fact["node"]) for fact in facts if fact["disks"][name]["free"] is not None]
        if readable:
            disk, node = min(readable, key=lambda each: each[0]["free"])
            of_node = f" of {node}" if len(nodes_of(facts)) > 1 else ""
            finding = f"{memory_size(disk['free'])} free in {disk['path']}{of_node}"
            advice = f"Make room: {memory_size(least)} is little enough."
            results.append(warn_if(disk["free"] < least, "disk", finding, advice))
    return results


def shared_memory(facts: Facts) -> list[Result]:
    """How much shared memory loader workers have."""
    sizes = [(fact["shared_memory"], fact["node"]) for fact in facts if fact["shared_memory"] is not None]
    if not sizes:
        return []
    size, node = min(sizes, key=lambda each: each[0])
    finding = f"{memory_size(size)} free in /dev/shm of {node}"
    advice = "Loader workers hand batches over in it: docker run --shm-size=16g (or --ipc=host), or data.workers 0."
    return [warn_if(size < LEAST_SHARED_MEMORY, "shared memory", finding, advice)]


def limits(facts: Facts) -> list[Result]:
    """Limits of the process: open files, processes, locked memory."""
    results = []

    def text(name: str, rank: int) -> str:
        value = facts[rank]["limits"][name]
        return f"{name} " + ("unlimited" if value is None else memory_size(value) if "memory" in name else str(value))

    for name, (least, advice) in LEAST_LIMITS.items():
        low = [rank for rank, fact in enumerate(facts) if (fact["limits"][name] or least) < least]
        if low:
            advice += " before the start, or ask whoever keeps the machine."
            results.append(Result(WARN, "limits", f"{text(name, low[0])} for {where(facts, low)}", advice))
    locked = [rank for rank, fact in enumerate(facts) if fact["rdma"] and fact["limits"]["locked memory"] is not None]
    if locked:
        finding = f"{text('locked memory', locked[0])} for {where(facts, locked)}"
        advice = "InfiniBand needs it: ulimit -l unlimited (Slurm: LimitMEMLOCK=infinity for slurmd)."
        results.append(Result(WARN, "limits", finding, advice))
    return results or [Result(OK, "limits", ", ".join(text(name, 0) for name in facts[0]["limits"]))]
