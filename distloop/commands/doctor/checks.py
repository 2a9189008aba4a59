"""The checks of `distloop doctor`: each judges one subject by the facts of all ranks, and gives advice."""

import statistics

from distloop.commands.doctor.measure import MATRIX_SIZES
from distloop.commands.doctor.results import (
    Check,
    Fact,
    Facts,
    Result,
    by_value,
    fail,
    group,
    names_text,
    nodes_of,
    ok,
    spread_text,
    warn,
    warn_if,
    where,
)
from distloop.commands.doctor.variables import variables
from distloop.tracking.wording import memory_size, plural, short_duration

GIB = 2**30
LEAST_SHARED_MEMORY = GIB
LEAST_MEMORY_PER_RANK = GIB
LEAST_FREE = {"run directory": 10 * GIB, "/tmp": GIB}
LEAST_LIMITS = {"open files": (4096, "ulimit -n 65536"), "processes": (4096, "ulimit -u 65536")}
SLOW_RATIO = 1.3  # of the slowest rank's time to the median: all ranks of a run wait for the slowest
LEAST_GAIN = 0.9  # of the default decoder's time: for less, pixels need not change
LEAST_GPU_BANDWIDTH = 1e9  # bytes a second between GPUs; plain Ethernet gives less


def launch(facts: Facts) -> list[Result]:
    """How the ranks were started, and on which nodes."""
    problems = [fact["launch"] for fact in facts if fact["launch"]]
    if problems:
        problem, _, advice = problems[0].partition("\n")
        return [fail(problem, advice)]
    warnings = sorted({warning for fact in facts for warning in fact["launch_warnings"]})
    if warnings:
        return [warn("; ".join(warnings), "Harmless if the config asks for the same.")]
    if len(facts) == 1:
        return [ok(f"one process on {facts[0]['node']}")]
    places = list(map(where, nodes_of(facts).values()))
    more = f" and {len(places) - 8} more nodes" if len(places) > 8 else ""
    return [ok(", ".join(places[:8]) + more)]


def versions(facts: Facts) -> list[Result]:
    """Whether all ranks have the same versions of Python, packages and driver."""
    results = []
    advice = "Use one environment on all nodes: a virtual environment on a shared disk, or a container."
    for name in facts[0]["versions"]:
        if spread := spread_text(facts, [fact["versions"][name] for fact in facts]):
            results.append(fail(f"{name} differs: {spread}", advice))
    if spread := spread_text(facts, [fact["driver"] for fact in facts]):
        results.append(warn(f"the GPU driver differs: {spread}", "Ask for nodes of one kind."))
    items = {**facts[0]["versions"], "driver": facts[0]["driver"]}
    found = ", ".join(f"{name} {version}" for name, version in items.items() if version)
    return results or [ok(found + (", the same on all ranks" if len(facts) > 1 else ""))]


def code(facts: Facts) -> list[Result]:
    """Whether all ranks run the same code."""

    def text(fact: Fact) -> str:
        copy = fact["code"]
        commit = copy["commit"] and f"commit {copy['commit']}{' with changes' if copy['changed'] else ''}, "
        return f"{commit or ''}files {copy['digest']} in {copy['folder']}"

    if len({fact["code"]["digest"] for fact in facts}) > 1:
        advice = "Start all ranks from one copy of the code, on a shared disk, or bring the copies to one commit."
        return [fail(f"the ranks run different code: {spread_text(facts, map(text, facts))}", advice)]
    return [ok(text(facts[0]))]


def devices(facts: Facts) -> list[Result]:
    """Whether each rank has a GPU of its own, and GPUs are of one kind and free."""
    without = [fact for fact in facts if not fact["gpu"]]
    driver, wanted = facts[0]["driver"], facts[0]["wants_device"]
    if not without:
        return _gpus(facts)
    if len(without) < len(facts) or wanted == "cuda":
        advice = "See that each task is given a GPU (nvidia-smi there, CUDA_VISIBLE_DEVICES, Slurm's --gpus-per-node)."
        return [fail(f"no GPU for {where(without)}", advice)]
    if driver and wanted == "auto":
        found = f"the CPU: there is a GPU driver ({driver}), but PyTorch {facts[0]['versions']['torch']} sees no GPU"
        return [warn(found, "Install a PyTorch for this driver's CUDA; see CUDA_VISIBLE_DEVICES.")]
    return [ok("the CPU")]


def _gpus(facts: Facts) -> list[Result]:
    results = []
    advice = "Start at most one process per GPU; CUDA_VISIBLE_DEVICES must differ between tasks that see one each."
    for (_, uuid), ranks in group(((fact["host"], fact["gpu"]["uuid"]), fact) for fact in facts).items():
        if len(ranks) > 1:
            results.append(fail(f"{where(ranks)} are on one GPU ({uuid})", advice))
    if spread := spread_text(facts, [fact["gpu"]["name"] for fact in facts]):
        results.append(warn(f"GPUs differ: {spread}", "All wait for the slowest: ask for nodes of one kind."))
    nodes = nodes_of(facts).items()
    counts = group(((max(fact["gpu"]["visible"] for fact in ranks), len(ranks)), node) for node, ranks in nodes)
    for (visible, count), names in counts.items():
        if visible > count:
            found = f"{visible} GPUs are shown to {plural(count, 'rank')}: {names_text(names)}"
            results.append(warn(found, "Start one process per GPU to use them all."))
    busy = [fact for fact in facts if fact["gpu"]["free"] < 0.9 * fact["gpu"]["total"]]
    if busy:
        least = memory_size(min(fact["gpu"]["free"] for fact in busy))
        found = f"GPU memory is in use by others for {where(busy)}: {least} free"
        results.append(warn(found, "See what runs there (nvidia-smi), or ask for exclusive GPUs."))
    name = f"{facts[0]['gpu']['name']}, {memory_size(facts[0]['gpu']['total'])}"
    return results or [ok(f"{len(facts)} × {name}" if len(facts) > 1 else name)]


def cpus(facts: Facts) -> list[Result]:
    """Whether the ranks of a node have as many CPUs as they start threads."""
    results = []
    asked_for = [(fact, fact["slurm_cpus_per_task"] or "") for fact in facts]
    short = [fact for fact, asked in asked_for if asked.isdecimal() and len(fact["cpus"]) < int(asked)]
    if short:
        advice = "srun does not take over --cpus-per-task: export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK before it."
        found = f"{where(short)} may use {len(short[0]['cpus'])} of the node's CPUs"
        results.append(warn(f"SLURM_CPUS_PER_TASK is {short[0]['slurm_cpus_per_task']}, but {found}", advice))
    for counts, nodes in group((_counts(ranks), node) for node, ranks in nodes_of(facts).items()).items():
        ranks_there, threads, cpu_count, device = counts
        advice = f"export OMP_NUM_THREADS={max(1, cpu_count // ranks_there)}"
        if ranks_there > cpu_count:
            advice = "Ask for at least one CPU per rank (Slurm: --cpus-per-task)."
        elif threads > cpu_count:
            advice += ": threads in excess wait for each other."
        elif device == "cpu" and 4 * threads <= cpu_count:  # torch would start one per core
            advice += ": launchers set 1 where it is not set."
        else:
            continue
        found = f"{plural(ranks_there, 'rank')} with {plural(threads, 'thread')} on {cpu_count} CPUs"
        results.append(warn(f"{found}: {names_text(nodes)}", advice))
    each = by_value(facts, [f"{len(fact['cpus'])} CPUs and {plural(fact['threads'], 'thread')}" for fact in facts])
    return results or [ok("; ".join(f"{text} for {where(ranks)}" for text, ranks in each.items()))]


def _counts(facts: Facts) -> tuple[int, int, int, str]:
    """(ranks, their threads, their CPUs, device) of a node, from the facts of its ranks."""
    cpus_of_node = {cpu for fact in facts for cpu in fact["cpus"]}
    return len(facts), sum(fact["threads"] for fact in facts), len(cpus_of_node), facts[0]["device"]


def memory(facts: Facts) -> list[Result]:
    """How much memory the node with the least memory per rank has left."""
    ranks = min(nodes_of(facts).values(), key=lambda ranks: ranks[0]["memory"] / len(ranks))
    left = ranks[0]["memory"]
    found = f"{memory_size(left)} left on {ranks[0]['node']}, for {plural(len(ranks), 'rank')} and loader workers"
    advice = "Ask for more memory (Slurm: --mem), or start fewer ranks per node."
    return [warn_if(left / len(ranks) < LEAST_MEMORY_PER_RANK, found, advice)]


def disks(facts: Facts) -> list[Result]:
    """How much room the disks have."""
    results = []
    for name, least in LEAST_FREE.items():
        readable = [(fact["disks"][name], fact["node"]) for fact in facts if fact["disks"][name]["free"] is not None]
        if readable:
            disk, node = min(readable, key=lambda each: each[0]["free"])
            of_node = f" of {node}" if len(nodes_of(facts)) > 1 else ""
            advice = f"Make room: {memory_size(least)} is little enough."
            found = f"{memory_size(disk['free'])} free in {disk['path']}{of_node}"
            results.append(warn_if(disk["free"] < least, found, advice))
    return results


def shared_memory(facts: Facts) -> list[Result]:
    """How much shared memory loader workers have."""
    having = [fact for fact in facts if fact["shared_memory"] is not None]
    if not having:
        return []
    fact = min(having, key=lambda fact: fact["shared_memory"])
    found = f"{memory_size(fact['shared_memory'])} free in /dev/shm of {fact['node']}"
    advice = "Loader workers hand batches over in it: docker run --shm-size=16g (or --ipc=host), or data.workers 0."
    return [warn_if(fact["shared_memory"] < LEAST_SHARED_MEMORY, found, advice)]


def limits(facts: Facts) -> list[Result]:
    """Limits of the process: open files, processes, locked memory."""
    results = []

    def text(name: str, fact: Fact) -> str:
        value = fact["limits"][name]
        return f"{name} " + ("unlimited" if value is None else memory_size(value) if "memory" in name else str(value))

    for name, (least, command) in LEAST_LIMITS.items():
        if low := [fact for fact in facts if (fact["limits"][name] or least) < least]:
            advice = f"{command} before the start, or ask whoever keeps the machine."
            results.append(warn(f"{text(name, low[0])} for {where(low)}", advice))
    if locked := [fact for fact in facts if fact["rdma"] and fact["limits"]["locked memory"] is not None]:
        advice = "InfiniBand needs it: ulimit -l unlimited (Slurm: LimitMEMLOCK=infinity for slurmd)."
        results.append(warn(f"{text('locked memory', locked[0])} for {where(locked)}", advice))
    return results or [ok(", ".join(text(name, facts[0]) for name in facts[0]["limits"]))]


def runs_dir(facts: Facts) -> list[Result]:
    """Whether all ranks write to one folder of runs and see each other's files there."""
    results = []
    first = facts[0]["runs_dir"]
    for problem, ranks in by_value(facts, [fact["runs_dir"]["problem"] for fact in facts]).items():
        if problem:
            path, seconds = ranks[0]["runs_dir"]["path"], ranks[0]["runs_dir"]["seconds"]
            found = f"{path} {problem}: {where(ranks)}" + (f", after {seconds:.0f} s" if seconds >= 1 else "")
            if path != first["path"]:
                found += f" (rank 0 on {facts[0]['node']} has {first['path']})"
            advice = "Give --runs-dir an absolute path on a disk that all nodes share and you may write to."
            results.append(fail(found, advice))
    found = f"{first['path']} can be written"
    if len(facts) > 1:
        seen = short_duration(max(fact["runs_dir"]["seconds"] for fact in facts))
        found = f"{first['path']} is shared by all ranks and can be written; a file is seen within {seen}"
    return results or [ok(found)]


def speed(facts: Facts) -> list[Result]:
    """Whether a rank computes more slowly than the others."""
    seconds = [fact["product_seconds"] for fact in facts]
    median, slowest = statistics.median_low(seconds), max(seconds)  # median_low: of two ranks the faster one
    found = f"{2 * MATRIX_SIZES[facts[0]['measured_on']] ** 3 / median / 1e9:,.0f} GFLOP/s in float32"
    if len(facts) > 1:
        rank = where([facts[seconds.index(slowest)]])
        found += f" at the median; slowest is {rank}, {slowest / median:.2f} times the median"
    advice = (
        "All wait for it: see what else runs there, its clock and temperature, its CPU binding; run doctor again, "
        "and leave the node out if it stays so (Slurm: --exclude)."
    )
    return [warn_if(slowest / median > SLOW_RATIO, found, advice)]


def pictures(facts: Facts) -> list[Result]:
    """How long a training picture takes with each decoder. A picture that cannot be loaded fails."""
    if bad := [fact for fact in facts if fact["pictures"]["problem"]]:
        return [fail(f"{where(bad)}: {bad[0]['pictures']['problem']}", "Mend or remove it, or give another folder.")]
    slowest = max(facts, key=lambda fact: fact["pictures"]["seconds"]["pil"])
    seconds = slowest["pictures"]["seconds"]
    times = ", ".join(f"{short_duration(each)} with {decoder}" for decoder, each in seconds.items())
    cpus_each = len(slowest["cpus"]) / sum(fact["host"] == slowest["host"] for fact in facts)
    on_slowest = f" on the slowest, {where([slowest])}" if len(facts) > 1 else ""
    is_faster = seconds["torchvision"] < LEAST_GAIN * seconds["pil"]
    choice = "--data.args.decoder torchvision" if is_faster else "the default decoder, pil"
    rate = cpus_each / seconds["torchvision" if is_faster else "pil"]
    found = f"a training picture takes {times} of CPU time{on_slowest}; take {choice}: {rate:,.0f} a second for a rank"
    return [ok(f"{found}. `distloop pack` makes them faster yet.")]


def all_reduce(facts: Facts) -> list[Result]:
    """Whether sums over several ranks are right, and how fast they are."""
    if wrong := [fact for fact in facts if not fact["all_reduce"]["is_right"]]:
        advice = "Do not train on these nodes before this is understood (NCCL_DEBUG=INFO says which way data goes)."
        return [fail(f"the sum is wrong on {where(wrong)}", advice)]
    parts, bandwidth, device = [], 0.0, facts[0]["measured_on"]
    for size in facts[0]["all_reduce"]["seconds"]:
        seconds = max(fact["all_reduce"]["seconds"][size] for fact in facts)
        # Each rank must send and receive at least so many bytes, with any algorithm.
        bandwidth = 2 * (len(facts) - 1) / len(facts) * size / seconds
        rate = f", {bandwidth / 1e9:.2g} GB/s" if size >= 2**20 else ""
        parts.append(f"{memory_size(size)} in {short_duration(seconds)}{rate}")
    found = f"{'NCCL' if device == 'cuda' else 'gloo'}, {len(facts)} ranks: {'; '.join(parts)}"
    advice = "Less than a fast network gives: NCCL_DEBUG=INFO says which one is used (NCCL_SOCKET_IFNAME, NCCL_IB_HCA)."
    return [warn_if(device == "cuda" and bandwidth < LEAST_GPU_BANDWIDTH, found, advice)]


CHECKS: dict[str, Check] = {
    "launch": launch,
    "versions": versions,
    "code": code,
    "devices": devices,
    "CPUs": cpus,
    "memory": memory,
    "disk": disks,
    "shared memory": shared_memory,
    "limits": limits,
    "environment": variables,
}
"""Of what each rank finds alone."""

MEASUREMENTS: dict[str, Check] = {
    "run directory": runs_dir,
    "speed": speed,
    "pictures": pictures,
    "all-reduce": all_reduce,
}
"""Of what the ranks measure together."""
