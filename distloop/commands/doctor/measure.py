"""What the ranks find out together for `distloop doctor`, and what it thinks of that.

torch is imported where it is needed: the environment has to be in order before that.
"""

from __future__ import annotations

import contextlib
import functools
import secrets
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from distloop.commands.doctor.lines import FAIL, OK, WARN, Facts, Line, spread, where
from distloop.ranks.places import Position
from distloop.tracking.wording import memory_size, short_duration

REDUCED = {4 * 2**10: 20, 2**20: 10, 32 * 2**20: 5}  # bytes of an all-reduce -> how often it is timed
MATRIX_SIZES = {"cpu": 1024, "cuda": 8192}  # some 30 ms on a core and on a large GPU
PRODUCTS = 10
SLOW_RATIO = 1.3  # the slowest rank over the median: in a synchronous run all wait for it
LEAST_GPU_BANDWIDTH = 1e9  # bytes a second between GPUs: less is what plain Ethernet gives


class Ranks:
    """Does the same piece of work on all ranks, and tells each what all have found. Without a group: on this one."""

    def __init__(self, position: Position, rank: int, world_size: int) -> None:
        self.position, self.rank, self.world_size = position, rank, world_size

    def gather(self, phase: str, work: Callable[[], Any]) -> list[Any]:
        """The results of `work` on all ranks, by rank. Collective."""
        import torch.distributed as dist

        self.position.enter(phase)
        own = work()
        # A phase of its own, so that a rank that hangs at work is seen to be behind those that wait for it.
        self.position.enter(f"{phase}, waiting for the others")
        if self.world_size == 1:
            return [own]
        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, own)
        return found


def share_runs_dir(ranks: Ranks, runs_dir: str, limit_seconds: float) -> list[dict[str, Any]]:
    """Let rank 0 and each other rank leave files for each other in the run directory's parent. Collective.

    By rank: the path meant, `problem` in words or "", and `seconds` until the other side's file was seen.
    Every rank, not one of each node, since ranks of one node may differ in working directory or container.
    """
    folder, rank = Path(runs_dir).absolute(), ranks.rank
    token = secrets.token_hex(8)
    created: list[Path] = []

    def start() -> str:
        try:
            created.extend(path for path in (folder, *folder.parents) if not path.exists())
            meeting = folder / f".doctor-{token}"
            meeting.mkdir(parents=True)
            created.insert(0, meeting)
            (meeting / "rank_0").write_text(token)
        except OSError as error:
            return f"cannot be written: {error.strerror}"
        return ""

    token, problem = ranks.gather("run directory, writing", lambda: (token, start()) if rank == 0 else (None, None))[0]
    meeting = folder / f".doctor-{token}"

    def answer() -> dict[str, Any]:
        if problem:
            return {"path": str(folder), "problem": problem if rank == 0 else "", "seconds": 0.0}
        begun = time.monotonic()
        while not _holds(meeting / "rank_0", token):
            if time.monotonic() - begun > limit_seconds:
                return {"path": str(folder), "problem": "does not show what rank 0 wrote", "seconds": limit_seconds}
            time.sleep(0.02)
        seconds = time.monotonic() - begun
        try:
            if rank:
                (meeting / f"rank_{rank}").write_text(token)
        except OSError as error:
            return {"path": str(folder), "problem": f"cannot be written: {error.strerror}", "seconds": seconds}
        return {"path": str(folder), "problem": "", "seconds": seconds}

    answers = ranks.gather("run directory, reading what rank 0 wrote", answer)

    def finish() -> list[dict[str, Any]]:
        begun = time.monotonic()
        wanted = [other for other, found in enumerate(answers) if other and not problem and not found["problem"]]
        while wanted and time.monotonic() - begun <= limit_seconds:
            wanted = [other for other in wanted if not _holds(meeting / f"rank_{other}", token)]
            if wanted:
                time.sleep(0.02)
        for other in wanted:
            answers[other] |= {"problem": "is written to, but rank 0 does not see it", "seconds": limit_seconds}
        for other in range(len(answers)):
            with contextlib.suppress(OSError):
                (meeting / f"rank_{other}").unlink(missing_ok=True)
        for path in created:
            with contextlib.suppress(OSError):  # in use by somebody else by now
                path.rmdir()
        return answers

    return ranks.gather("run directory, reading what the others wrote", lambda: finish() if rank == 0 else None)[0]


def _holds(path: Path, text: str) -> bool:
    try:
        return path.read_text() == text
    except OSError:
        return False


def matrix_product_seconds(device: str) -> float:
    """The median time of a product of two float32 matrices of MATRIX_SIZES[device]."""
    import torch

    size = MATRIX_SIZES[device]
    matrix = torch.ones(size, size, device=device)
    return _median_seconds(lambda: matrix @ matrix, PRODUCTS, device)


def all_reduce_seconds(device: str, group: Any) -> tuple[dict[int, float], bool]:
    """By bytes, the median time of an all-reduce; and whether the sums were right. Collective."""
    import torch
    import torch.distributed as dist

    seconds, right = {}, True
    for size, times in REDUCED.items():
        tensor = torch.ones(size // 4, device=device)
        dist.all_reduce(tensor, group=group)
        right &= bool((tensor == dist.get_world_size(group)).all())
        tensor.zero_()
        reduce = functools.partial(dist.all_reduce, tensor, group=group)
        seconds[size] = _median_seconds(reduce, times, device)
    return seconds, right


def _median_seconds(work: Callable[[], Any], times: int, device: str) -> float:
    import torch

    taken = []
    for _ in range(times + 1):
        begun = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken[1:])  # without the first, which sets things up


def runs_dir(facts: Facts, answers: Sequence[Mapping[str, Any]]) -> list[Line]:
    """The answers are those of share_runs_dir."""
    lines = []
    for problem, ranks in spread([answer["problem"] for answer in answers]).items():
        if problem:
            path, seconds = answers[ranks[0]]["path"], answers[ranks[0]]["seconds"]
            found = f"{path} {problem}: {where(facts, ranks)}" + (f", after {seconds:.0f} s" if seconds >= 1 else "")
            if path != answers[0]["path"]:
                found += f" (rank 0 on {facts[0]['node']} has {answers[0]['path']})"
            advice = "Give --runs-dir an absolute path on a disk that all nodes share and you may write to."
            lines.append(Line(FAIL, "run directory", found, advice))
    if lines:
        return lines
    path = answers[0]["path"]
    if len(facts) == 1:
        return [Line(OK, "run directory", f"{path} can be written")]
    seconds = max(answer["seconds"] for answer in answers)
    found = f"{path} is shared by all ranks and can be written; a file is seen within {short_duration(seconds)}"
    return [Line(OK, "run directory", found)]


def slowest_rank(facts: Facts, seconds: Sequence[float], device: str) -> list[Line]:
    """`seconds`: of the same matrix product, by rank."""
    operations = 2 * MATRIX_SIZES[device] ** 3
    median = statistics.median_low(seconds)  # of two ranks the faster one
    found = f"{operations / median / 1e9:,.0f} GFLOP/s in float32"
    if len(facts) == 1:
        return [Line(OK, "speed", found)]
    slowest = max(range(len(seconds)), key=lambda rank: seconds[rank])
    ratio = seconds[slowest] / median
    found += f" at the median; slowest is {where(facts, [slowest])}, {ratio:.2f} times the median"
    if ratio > SLOW_RATIO:
        advice = (
            "All wait for it: see what else runs there, its clock and temperature, its CPU binding; run doctor again, "
            "and leave the node out if it stays so (Slurm: --exclude)."
        )
        return [Line(WARN, "speed", found, advice)]
    return [Line(OK, "speed", found)]


def all_reduce(facts: Facts, answers: Sequence[tuple[Mapping[int, float], bool]], device: str) -> list[Line]:
    """The answers are those of all_reduce_seconds."""
    wrong = [rank for rank, (_, right) in enumerate(answers) if not right]
    if wrong:
        advice = "Do not train on these nodes before this is understood (NCCL_DEBUG=INFO says which way data goes)."
        return [Line(FAIL, "all-reduce", f"the sum is wrong on {where(facts, wrong)}", advice)]
    world_size = len(facts)
    parts, bandwidth = [], 0.0
    for size in answers[0][0]:
        seconds = max(taken[size] for taken, _ in answers)
        # What each rank has to send and receive at least, whatever the algorithm.
        bandwidth = 2 * (world_size - 1) / world_size * size / seconds
        shown = f", {bandwidth / 1e9:.2g} GB/s" if size >= 2**20 else ""
        parts.append(f"{memory_size(size)} in {short_duration(seconds)}{shown}")
    found = f"{'NCCL' if device == 'cuda' else 'gloo'}, {world_size} ranks: {'; '.join(parts)}"
    if device == "cuda" and bandwidth < LEAST_GPU_BANDWIDTH:
        advice = (
            "Less than a fast network gives: NCCL_DEBUG=INFO says which one is used (NCCL_SOCKET_IFNAME, NCCL_IB_HCA)."
        )
        return [Line(WARN, "all-reduce", found, advice)]
    return [Line(OK, "all-reduce", found)]
