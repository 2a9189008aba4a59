"""Reads back what wandb wrote offline: the .wandb files of a run directory, each a log of protobuf records.

A file begins with seven bytes, `:W&B`, a magic number and a version. Then come blocks of 32 KiB of pieces, each with a
header: CRC-32 of its type and body, length, type (whole, first, middle, last). A torn tail is left out.
"""

from __future__ import annotations

import importlib
import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BEGIN = b":W&B" + struct.pack("<HB", 0xBEE1, 0)
BLOCK, HEADER = 32768, struct.Struct("<IHB")
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4


@dataclass
class Part:
    """What one process of wandb wrote of a run."""

    run: str = ""
    fields: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None
    preempting: bool = False
    files: list[str] = field(default_factory=list)


def parts(run: Path) -> list[Part]:
    """What the run directory `run` holds, in the order in which it was begun, without parts that have no row."""
    files = sorted((run / "wandb").glob("*run-*/*.wandb"), key=lambda path: path.parent.name.removeprefix("offline-"))
    return [part for part in map(read_part, files) if part.history]


def read_part(path: Path) -> Part:
    """One .wandb file."""
    messages = importlib.import_module("wandb.proto.wandb_internal_pb2")
    part = Part()
    for body in records(path.read_bytes()):
        record = messages.Record()
        record.ParseFromString(body)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            part.run = record.run.run_id
            part.fields = {
                name: getattr(record.run, name) for name in ("project", "display_name", "run_group", "notes")
            }
            part.fields["tags"] = list(record.run.tags)
        elif kind == "history":
            part.history.append(_items(record.history.item))
        elif kind == "summary":
            part.summary |= _items(record.summary.update)
        elif kind == "config":
            part.config |= _items(record.config.update)
        elif kind == "exit":
            part.exit_code = record.exit.exit_code
        elif kind == "preempting":
            part.preempting = True
        elif kind == "files":
            part.files += [file.path for file in record.files.files]
    return part


def records(data: bytes) -> Iterator[bytes]:
    """The records of a file, up to the first that is torn."""
    assert data[:7] == BEGIN, data[:7]
    position, body = len(BEGIN), b""
    while position + HEADER.size <= len(data):
        left = BLOCK - position % BLOCK
        if left < HEADER.size:  # too little for a header: filled up with zeros
            position += left
            continue
        checksum, length, kind = HEADER.unpack_from(data, position)
        piece = data[position + HEADER.size : position + HEADER.size + length]
        if len(piece) < length or zlib.crc32(bytes([kind]) + piece) != checksum:
            return
        position += HEADER.size + length
        body = piece if kind in (WHOLE, FIRST) else body + piece
        if kind in (WHOLE, LAST):
            yield body


def _items(items: Any) -> dict[str, Any]:
    return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}
