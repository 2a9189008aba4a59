"""What the ranks measure together for `distloop doctor`. checks.py judges it.

torch is imported inside functions, since the environment must be set before that.
"""

import contextlib
import functools
import os
import secrets
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distloop.ranks.places import Position

PICTURES = 24  # of a folder, each loaded with each decoder
REDUCED_BYTES = {4 * 2**10: 20, 2**20: 10, 32 * 2**20: 5}  # bytes of an all-reduce -> how often it is timed
MATRIX_SIZES = {"cpu": 1024, "cuda": 8192}  # a product takes about 30 ms on a core and on a large GPU
PRODUCTS = 10

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
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        return f"cannot be written: {error.strerror}"
    return ""


def _is_seen(path: Path, text: str, deadline: float) -> bool:
    """Wait until the file holds the text; False if it does not at the deadline (of time.monotonic())."""
    while True:
        with contextlib.suppress(OSError):
            if path.read_text(encoding="utf-8") == text:
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


def all_reduce_seconds(device: str, group: Any) -> dict[str, Any]:
    """`seconds`: bytes -> median seconds of an all-reduce; `is_right`: whether all sums were right. Collective."""
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
    return {"seconds": seconds, "is_right": is_right}


def picture_seconds(root: str) -> dict[str, Any]:
    """`seconds`: decoder -> median CPU seconds of a training picture of the folder ROOT, as `image_folder` loads it;
    `problem`: why there are none, or ""."""
    import torch

    from distloop.data.datasets import image_folder
    from distloop.data.pictures import DECODERS
    from distloop.errors import UsageError

    seconds: dict[str, list[float]] = {decoder: [] for decoder in DECODERS}
    threads, path = torch.get_num_threads(), ""
    torch.set_num_threads(1)  # as in a loader's process
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of decoders, about single pictures
            halves = {decoder: image_folder(root, decoder=decoder).train for decoder in DECODERS}
            count = len(halves[DECODERS[0]])
            for number in range(0, count, max(1, count // PICTURES)):
                path = halves[DECODERS[0]].samples[number][0]
                for decoder, pictures in halves.items():
                    pictures[number]  # reads the file, so that the disk is not measured
                    start = time.process_time()
                    pictures[number]
                    seconds[decoder].append(time.process_time() - start)
    except UsageError as error:
        return {"seconds": {}, "problem": str(error)}
    except Exception as error:  # of a broken file, decoders raise many kinds
        return {"seconds": {}, "problem": f"{path} cannot be loaded: {type(error).__name__}: {error}"}
    finally:
        torch.set_num_threads(threads)
    return {"seconds": {decoder: statistics.median(each) for decoder, each in seconds.items()}, "problem": ""}


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
