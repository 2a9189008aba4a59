"""Rows of steps that are done again leave metrics.jsonl for metrics.set_aside.jsonl, also if that is cut short.

Rows lie in the order of their steps, so that the file is read from its end, and cut there: what a start costs does not
grow with the run. It is never held in memory whole.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from distloop.run.files import sync, write_blocks

SET_ASIDE = "metrics.set_aside.jsonl"
BLOCK_BYTES = 1 << 18
MARGIN = 1 << 20  # so many bytes on end that all stay, and no more is looked for: a loop of one's own may log late

Span = tuple[int, int]  # of a file: where it begins and ends


def blocks_from_end(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """(where it begins, some whole lines) of a file, the last ones first. It holds a block or a longer line."""
    begin = file.seek(0, os.SEEK_END)
    pieces: list[bytes] = []  # of a line that begins further ahead, the last piece first
    while begin:
        size = min(BLOCK_BYTES, begin)
        begin = file.seek(begin - size)
        chunk = file.read(size)
        cut = chunk.find(b"\n") + 1 if begin else 0  # the line before it begins further ahead
        if begin and not cut:
            pieces.append(chunk)
            continue
        if block := b"".join([chunk[cut:], *reversed(pieces)]):
            yield begin + cut, block
        pieces = [chunk[:cut]]


def lines_from_end(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """(where it begins, the line with its end) of each line of a file, the last one first."""
    for begin, block in blocks_from_end(file):
        end = begin + len(block)
        lines = [line + b"\n" for line in block.split(b"\n")]
        lines[-1] = lines[-1][:-1]  # one that is not ended, or what follows the last one: nothing
        for line in reversed(lines):
            end -= len(line)
            if line:
                yield end, line


def set_aside_until(path: Path) -> int:
    """The last step whose row was set aside; -1 if none was."""
    last = -1
    aside = path.with_name(SET_ASIDE)
    with contextlib.suppress(FileNotFoundError), open(aside, encoding="utf-8", errors="replace") as file:
        for line in file:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                last = max(last, int(json.loads(line)["step"]))
    return last


def set_rows_aside(path: Path, step: int, is_validated: bool = True) -> int:
    """Move the rows of steps after `step`, and damaged lines near them, to metrics.set_aside.jsonl; returns how many.
    `is_validated`: else the row of that step's validation is moved as well. A process that is killed in here loses
    nothing and doubles nothing: a row is on the disk there before it leaves the file, and comes there once. Raises
    OSError."""
    if not path.exists():
        return 0
    with open(path, "rb") as file:
        count, spans, first = _rows_to_move(file, step, is_validated)
        size = file.seek(0, os.SEEK_END)
        if not spans:
            if size and not _ends_a_line(file):  # a whole row that lacks its end: the next one would be added to it
                with open(path, "ab") as same:
                    same.write(b"\n")
            return 0
        _add(path.with_name(SET_ASIDE), file, spans, first)
        if len(spans) == 1 and spans[0][1] == size:
            os.truncate(path, spans[0][0])
            sync(path)
        else:  # few: the validation of `step` before a picture of it; rows that a loop of one's own has logged late
            stay = zip([0, *(end for _, end in spans)], [*(begin for begin, _ in spans), size], strict=True)
            write_blocks(path, _contents(file, list(stay)))
    return count


def _rows_to_move(file: BinaryIO, step: int, is_validated: bool) -> tuple[int, list[Span], bytes]:
    """(how many rows are to be moved, where they are, the first of them)."""
    count, clear = 0, 0
    spans: list[Span] = []  # the last one first
    first = b""
    for begin, line in lines_from_end(file):
        row = _row(line)
        is_validation = row is not None and row.get("kind") == "validate"
        if row is None or row["step"] > step or (row["step"] == step and is_validation and not is_validated):
            end = begin + len(line)
            if spans and spans[-1][0] == end:
                end = spans.pop()[1]
            spans.append((begin, end))
            count, clear, first = count + 1, 0, line
            continue
        clear += len(line)
        if clear > MARGIN and row["step"] < step:
            break
    return count, spans[::-1], first


def _row(line: bytes) -> dict[str, Any] | None:
    """The row in a line; None if it is damaged."""
    with contextlib.suppress(ValueError, RecursionError):
        row = json.loads(line.decode())
        if isinstance(row, dict) and isinstance(row.get("step"), (int, float)):
            return row
    return None


def _add(aside: Path, file: BinaryIO, spans: list[Span], first: bytes) -> None:
    """Add these parts of the file, the first line of which is `first`, to `aside`; wait until they are on the disk."""
    is_new = not aside.exists()
    with open(aside, "a+b") as there:
        done = _added_before(there, file, spans, first)
        there.seek(0, os.SEEK_END)
        for chunk in _contents(file, spans):
            there.write(chunk[done:])
            done = max(0, done - len(chunk))
    sync(aside)
    if is_new:
        sync(aside.parent)


def _added_before(there: BinaryIO, file: BinaryIO, spans: list[Span], first: bytes) -> int:
    """How many bytes of these parts were added by a start that was killed before it took them out of the file. A line
    that was added in part is cut off."""
    most = sum(end - begin for begin, end in spans)
    size = there.seek(0, os.SEEK_END)
    for begin, line in lines_from_end(there):
        if not line.endswith(b"\n"):
            size = there.truncate(begin)
            continue
        if size - begin > most + 1:  # the end of the last line is added
            break
        if line.rstrip(b"\n") == first.rstrip(b"\n"):
            there.seek(begin)
            if all(chunk.startswith(there.read(len(chunk))) for chunk in _contents(file, spans)):
                return size - begin
    return 0


def _contents(file: BinaryIO, spans: list[Span]) -> Iterator[bytes]:
    """These parts of a file, in blocks, with the end of the last line if it lacks one."""
    block = b"\n"
    for begin, end in spans:
        file.seek(begin)
        for place in range(begin, end, BLOCK_BYTES):
            block = file.read(min(BLOCK_BYTES, end - place))
            yield block
    if not block.endswith(b"\n"):
        yield b"\n"


def _ends_a_line(file: BinaryIO) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"
