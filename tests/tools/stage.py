"""Say what is to happen at a place in user code (see tests/lab/stage.py) of the runs that work in `folder`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from tests.tools.ranks import wait_until


def _ask(folder: Path, place: str, **asked: Any) -> None:
    stage = folder / "stage"
    stage.mkdir(parents=True, exist_ok=True)
    for came in _arrivals(folder, place):  # of ranks that were killed there
        came.unlink()
    aside = stage / f".{place}.json"
    aside.write_text(json.dumps(asked))
    aside.rename(stage / f"{place}.json")


def _arrivals(folder: Path, place: str) -> list[Path]:
    return [path for path in (folder / "stage").glob(f"{place}.*") if path.suffix != ".json"]


def hold(folder: Path, place: str, *, count: int | None = None, rank: int | None = None, in_c: bool = False) -> None:
    """Hold a rank, or all, when it gets to this place, each time or for the time `count`.

    in_c: as uninterruptibly as a collective holds it, so that no Python handler of a signal runs.
    """
    _ask(folder, place, do="hold in C" if in_c else "hold", rank=rank, first=count or 0, last=count)


def let_go(folder: Path, place: str) -> None:
    """Let those go on that are held at this place, and hold no more there."""
    (folder / "stage" / f"{place}.json").unlink()


def fail(folder: Path, place: str, how: str, *, rank: int | None = None, count: int | None = None) -> None:
    """Let a rank, or all, fail once, when it gets to this place. `how`: one of tests.lab.stage.WAYS_TO_FAIL."""
    _ask(folder, place, do=how, rank=rank, first=count or 0, last=count)


def interrupt(folder: Path, place: str, count: int, *, rank: int = 0, signal_name: str = "SIGTERM") -> None:
    """Let a rank send itself a signal, once, so that a test knows in the middle of what it comes."""
    _ask(folder, place, do=signal_name, rank=rank, first=count, last=count)


def is_there(folder: Path, place: str, rank: int = 0) -> bool:
    """Whether the rank is held at the place, or has failed or got its signal there."""
    return (folder / "stage" / f"{place}.{rank}").exists()


def arrived(folder: Path, place: str, ranks: Iterable[int] = (0,)) -> None:
    """Wait until these ranks are there."""
    for rank in ranks:
        wait_until(partial(is_there, folder, place, rank), f"rank {rank} at {place}")


def forget(folder: Path, place: str) -> None:
    """Forget who was there: the next attempt, which is held as this one was, arrives anew."""
    for came in _arrivals(folder, place):
        came.unlink()


def clear(folder: Path) -> None:
    """Ask for nothing any more."""
    shutil.rmtree(folder / "stage", ignore_errors=True)
