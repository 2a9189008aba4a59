"""The parts of a store of pictures, which `distloop pack` makes in several processes."""

import contextlib
import hashlib
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

from distloop.errors import UsageError
from distloop.run.files import sync, write_text

SAY_SECONDS = 10.0


class Job(NamedTuple):
    """A part of the store that is to be made."""

    file: Path
    pictures: list[tuple[str, int]]  # (path, label)
    size: int  # pixels of the shorter side


class Made(NamedTuple):
    """What became of it. With errors nothing was written."""

    size: int = 0
    sha256: str = ""
    rows: tuple[tuple[int, int, int], ...] = ()  # (label, height, width) of each picture
    errors: tuple[str, ...] = ()


@contextlib.contextmanager
def workers(count: int | None) -> Iterator[Executor]:
    """Processes that make parts; they end with this one, however it ends. Raises UsageError if one is killed."""
    count = count or len(os.sched_getaffinity(0))
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("fork"), leave_with_parent)
    try:
        yield pool
    except BrokenProcessPool:
        raise UsageError(
            "A process that packs was killed (by lack of memory?). The same command goes on; --processes makes fewer."
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def leave_with_parent() -> None:
    """In a process of the pool: Ctrl-C is the parent's, and nobody waits for a parent that was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_after_parent, daemon=True).start()


def _leave_after_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def all_made(pool: Executor, jobs: list[Job], words: str) -> list[Made]:
    """The parts that were made, in order. `words`: to say how far it is, with a place for the number of pictures."""
    futures = {pool.submit(make, job): job for job in jobs}
    waiting, pictures, said = set(futures), 0, time.monotonic()
    while waiting:
        done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
        for future in done:
            future.result()  # raises what was raised there
            pictures += len(futures[future].pictures)
        if time.monotonic() > said + SAY_SECONDS or not waiting:
            said = time.monotonic()
            print(words.format(pictures), flush=True)
    return [future.result() for future in futures]


def make(job: Job) -> Made:
    """Make a part, unless it is there: of these pictures as they are now, with the checksum that it had."""
    stamps = []
    for path, label in job.pictures:
        facts = os.stat(path)
        stamps.append([path, label, facts.st_size, facts.st_mtime_ns])
    of = hashlib.sha256(json.dumps([job.size, stamps]).encode(errors="surrogatepass")).hexdigest()
    sidecar = job.file.with_suffix(".json")
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads(sidecar.read_text(encoding="utf-8"))
        if found["of"] == of and sha256_of(job.file) == found["sha256"]:
            return Made(found["size"], found["sha256"], tuple(map(tuple, found["rows"])))
    made = write_part(job)
    if not made.errors:
        write_text(sidecar, json.dumps({"of": of, **made._asdict()}))
    return made


def write_part(job: Job) -> Made:
    """Write the pixels aside, and rename the file once it is on the disk."""
    from distloop.data.bad_samples import is_of_the_sample
    from distloop.data.pictures import load_picture

    aside = job.file.with_suffix(".writing")
    aside.unlink(missing_ok=True)  # one that was left may be read-only
    digest, rows, errors = hashlib.sha256(), [], []
    with open(aside, "wb") as target:
        for path, label in job.pictures:
            try:
                picture = smaller(load_picture(path), job.size)
            except Exception as error:
                if not (isinstance(error, UsageError) or is_of_the_sample(error)):
                    raise
                errors.append(str(error) if path in str(error) else f"{path}: {error}")
                continue
            pixels = picture.tobytes()
            digest.update(pixels)
            target.write(pixels)
            rows.append((label, picture.height, picture.width))
        size = target.tell()
    if errors:
        aside.unlink()
        return Made(errors=tuple(errors))
    sync(aside)
    aside.chmod(aside.stat().st_mode & 0o444)
    aside.replace(job.file)
    return Made(size, digest.hexdigest(), tuple(rows))


def smaller(picture: Any, size: int) -> Any:
    """The picture of PIL with a shorter side of so many pixels, as torchvision's Resize makes it, or as it is."""
    from PIL.Image import Resampling

    from distloop.data.resizing import scaled

    if min(picture.size) <= size:
        return picture
    height, width = scaled(picture.height, picture.width, size)
    return picture.resize((width, height), Resampling.BILINEAR)


def sha256_of(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
