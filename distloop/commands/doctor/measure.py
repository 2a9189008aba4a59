"""What the ranks measure together for `distloop doctor`, and the verdicts on it.

torch is imported inside functions, since the environment must be set before that.
"""

import contextlib
import functools
import os
import secrets
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from distloop.commands.doctor.results import FAIL, OK, Facts, Result, ranks_by_value, warn_if, where
from distloop.ranks.places import Position
from distloop.tracking.wording import memory_size, short_duration

REDUCED_BYTES = {4 * 2**10: 20, 2**20: 10, 32 * 2**20: 5}  # bytes of an all-reduce -> how often it is timed
MATRIX_SIZES = {"cpu": 1024, "cuda": 8192}  # a product takes about 30 ms on a core and on a large GPU
PRODUCTS = 10
SLOW_RATIO = 1.3  # of the slowest rank's time to the median: all ranks of a run wait for the slowest
LEAST_GPU_BANDWIDTH = 1e9  # bytes a second between GPUs; plain Ethernet gives less

Gather = Callable[[str, Callable[[], Any]], list[Any]]


def gather(position: Position, world_size: int, phase: str, work: Callable[[], Any]) -> list[Any]:
    """The results of `work` on all ranks, by rank. Collective; with a world size of 1 it needs no group.

    `phase`: the name of this rank's position.
    """
    import torch.distributed as dist

    position.enter(phase)
    own = work()
    # A phase of its own, so that a rank that hangs in `work` is behind the ranks that wait for it.
    position.enter(f"{phase}, waiting for the others")
    results = [own] * world_size
    if world_size > 1:
        dist.all_gather_object(results, own)
    return results


def share_runs_dir(gather: Gather, rank: int, runs_dir: str, limit_seconds: float) -> list[dict[str, Any]]:
    """Check that rank 0 and each other rank see each other's files in `runs_dir`. Collective.

    Returns by rank: `path` (the absolute folder), `problem` (a text, or "") and `seconds` until rank 0's file was seen.
    Every rank takes part, since ranks of one node may differ in working directory or container.
    """
    folder = Path(runs_dir).absolute()
    created: list[Path] = []

    def write_token() -> tuple[str, str]:
        token = secrets.token_hex(8)
        meeting = folder / f".doctor-{token}"
        created.extend(path for path in (meeting, *meeting.parents) if not os.path.exists(path))
        return token, _write(meeting / "rank_0", token)

    results = gather("run directory, writing", lambda: write_token() if rank == 0 else None)
    token, problem_of_rank_0 = results[0]
    meeting = folder / f".doctor-{token}"

    def answer() -> dict[str, Any]:
        """Wait for rank 0's file, then write this rank's."""
        problem, seconds = problem_of_rank_0 if rank == 0 else "", 0.0
        if not problem_of_rank_0:
            start = time.monotonic()
            if _is_seen(meeting / "rank_0", token, start + limit_seconds):
                seconds = time.monotonic() - start
                problem = _write(meeting / f"rank_{rank}", token) if rank else ""
            else:
                problem, seconds = "does not show what rank 0 wrote", limit_seconds
        return {"path": str(folder), "problem": problem, "seconds": seconds}

    answers = gather("run directory, reading what rank 0 wrote", answer)

    def read_answers() -> list[dict[str, Any]]:
        deadline = time.monotonic() + limit_seconds
        for other, each in enumerate(answers):
            path = meeting / f"rank_{other}"
            if not (problem_of_rank_0 or each["problem"] or _is_seen(path, token, deadline)):
                each |= {"problem": "is written to, but rank 0 does not see it", "seconds": limit_seconds}
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        for path in created:
            with contextlib.suppress(OSError):  # another process has put a file into it
                path.rmdir()
        return answers

    return gather("run directory, reading what the others wrote", lambda: read_answers() if rank == 0 else None)[0]


def _write(path: Path, text: str) -> str:
    """Write the file; returns the problem, or ""."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError as error:
        return f"cannot be written: {error.strerror}"
    return ""


def _is_seen(path: Path, text: str, deadline: float) -> bool:
    """Wait until the file holds the text; False if it does not at the deadline (of time.monotonic())."""
    while True:
        with contextlib.suppress(OSError):
            if path.read_text() == text:
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)


def matrix_product_seconds(device: str) -> float:
    """Median seconds of the product of two float32 matrices, [MATRIX_SIZES[device], MATRIX_SIZES[device]]."""
    import torch

    size = MATRIX_SIZES[device]
    matrix = torch.ones(size, size, device=device)
    return _median_seconds(lambda: matrix @ matrix, PRODUCTS, device)


def all_reduce_seconds(device: str, group: Any) -> tuple[dict[int, float], bool]:
    """(bytes -> median seconds of an all-reduce, whether all sums were right). Collective."""
    import torch
    import torch.distributed as dist

    seconds, is_right = {}, True
    for size, times in REDUCED_BYTES.items():
        tensor = torch.ones(size // 4, device=device)
        dist.all_reduce(tensor, group=group)
        is_right &= bool((tensor == dist.get_world_size(group)).all())
        tensor.zero_()
        reduce = functools.partial(dist.all_reduce, tensor, group=group)
        seconds[size] = _median_seconds(reduce, times, device)
    return seconds, is_right


def _median_seconds(work: Callable[[], Any], times: int, device: str) -> float:
    import torch

    seconds = []
    for _ in range(times + 1):
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])  # the first call also sets things up


def runs_dir(facts: Facts, answers: Sequence[Mapping[str, Any]]) -> list[Result]:
    """The verdict on what share_runs_dir returns."""
    results = []
    for problem, ranks in ranks_by_value([answer["problem"] for answer in answers]).items():
        if problem:
            path, seconds = answers[ranks[0]]["path"], answers[ranks[0]]["seconds"]
            finding = f"{path} {problem}: {where(facts, ranks)}" + (f", after {seconds:.0f} s" if seconds >= 1 else "")
            if path != answers[0]["path"]:
                finding += f" (rank 0 on {facts[0]['node']} has {answers[0]['path']})"
            advice = "Give --runs-dir an absolute path on a disk that all nodes share and you may write to."
            results.append(Result(FAIL, "run directory", finding, advice))
    finding = f"{answers[0]['path']} can be written"
    if len(facts) > 1:
        seen = short_duration(max(answer["seconds"] for answer in answers))
        finding = f"{answers[0]['path']} is shared by all ranks and can be written; a file is seen within {seen}"
    return results or [Result(OK, "run directory", finding)]


def slowest_rank(facts: Facts, seconds: Sequence[float], device: str) -> list[Result]:
    """The verdict on the seconds of the same matrix product, by rank."""
    median = statistics.median_low(seconds)  # of two ranks the faster one
    finding = f"{2 * MATRIX_SIZES[device] ** 3 / median / 1e9:,.0f} GFLOP/s in float32"
    ratio = max(seconds) / median
    if len(facts) > 1:
        slowest = where(facts, [seconds.index(max(seconds))])
        finding += f" at the median; slowest is {slowest}, {ratio:.2f} times the median"
    advice = (
        "All wait for it: see what else runs there, its clock and temperature, its CPU binding; run doctor again, "
        "and leave the node out if it stays so (Slurm: --exclude)."
    )
    return [warn_if(ratio > SLOW_RATIO, "speed", finding, advice)]


def all_reduce(facts: Facts, answers: Sequence[tuple[Mapping[int, float], bool]], device: str) -> list[Result]:
    """The verdict on what all_reduce_seconds returns, by rank."""
    wrong = [rank for rank, (_, right) in enumerate(answers) if not right]
    if wrong:
        advice = "Do not train on these nodes before this is understood (NCCL_DEBUG=INFO says which way data goes)."
        return [Result(FAIL, "all-reduce", f"the sum is wrong on {where(facts, wrong)}", advice)]
    world_size, parts, bandwidth = len(facts), [], 0.0
    for size in answers[0][0]:
        seconds = max(taken[size] for taken, _ in answers)
        # Each rank must send and receive at least so many bytes, with any algorithm.
        bandwidth = 2 * (world_size - 1) / world_size * size / seconds
        rate = f", {bandwidth / 1e9:.2g} GB/s" if size >= 2**20 else ""
        parts.append(f"{memory_size(size)} in {short_duration(seconds)}{rate}")
    finding = f"{'NCCL' if device == 'cuda' else 'gloo'}, {world_size} ranks: {'; '.join(parts)}"
    advice = "Less than a fast network gives: NCCL_DEBUG=INFO says which one is used (NCCL_SOCKET_IFNAME, NCCL_IB_HCA)."
    return [warn_if(device == "cuda" and bandwidth < LEAST_GPU_BANDWIDTH, "all-reduce", finding, advice)]
