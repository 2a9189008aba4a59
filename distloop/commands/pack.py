"""`distloop pack SOURCE DEST --size N`: make a store of small pictures of a folder, for the data set `packed`.

It can be killed at any time: the same command goes on. `distloop pack --check STORE` compares a store's checksums.
"""

import argparse
import io
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from distloop.commands.packing import Job, Made, all_made, sha256_of, workers
from distloop.errors import RunFailed, UsageError
from distloop.run.files import write_bytes, write_text
from distloop.tracking.wording import file_size

MOST_SAID = 10  # pictures that cannot be loaded


def main(arguments: list[str]) -> int:
    """Do what the command line asks for; returns the exit code: 0 done, 1 damaged, 2 wrong usage."""
    options = parser().parse_args(arguments)
    try:
        if options.check:
            return check_store(options)
        pack(options)
    except UsageError as error:
        print(f"distloop: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        place = error.filename2 or error.filename or options.dest
        print(f"distloop: {place}: {error.strerror or error}. The same command goes on.", file=sys.stderr)
        return 2
    except RunFailed as error:
        print(f"distloop: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("distloop: interrupted; the same command goes on.", file=sys.stderr)
        return 130
    return 0


def parser() -> argparse.ArgumentParser:
    words = argparse.ArgumentParser(
        prog="distloop pack",
        description="Make a store of small pictures of SOURCE/train/CLASS/ and SOURCE/val/CLASS/, for data.name: "
        "packed: the same order and labels as image_folder has of SOURCE. Pixels are kept as they are: 3 bytes each. "
        "The same command goes on with what was interrupted. --check STORE compares the checksums of one.",
        usage="distloop pack SOURCE DEST --size N [--processes N]\n       distloop pack --check STORE [--processes N]",
        allow_abbrev=False,
    )
    words.add_argument("source", metavar="SOURCE", type=Path, help="the folder of pictures; with --check: the store")
    words.add_argument("dest", metavar="DEST", type=Path, nargs="?", help="a new folder, or the one that was begun")
    words.add_argument("--size", type=int, metavar="N", help="pixels of the shorter side; smaller pictures stay")
    words.add_argument("--processes", type=int, metavar="N", help="default: one for each CPU of this process")
    words.add_argument("--check", action="store_true", help="read all of STORE and compare its checksums")
    return words


def check(options: argparse.Namespace) -> None:
    """Raise UsageError unless the folder may be written to, as the command line says."""
    from distloop.data.packed import BEGUN, STORE

    if options.dest is None or options.size is None:
        raise UsageError("distloop pack SOURCE DEST --size 256: give both folders, and the pixels of the shorter side.")
    if options.size < 1 or (options.processes is not None and options.processes < 1):
        raise UsageError("--size and --processes are whole numbers above 0.")
    if os.path.lexists(options.dest) and not options.dest.is_dir():
        raise UsageError(f"{options.dest} is a file: the second word names the folder to write to.")
    if (options.dest / STORE).exists():
        raise UsageError(f"{options.dest} is packed to its end, and stays as it is: name a new folder.")
    if (options.dest / BEGUN).exists():
        if (options.dest / BEGUN).read_text(encoding="utf-8") != beginning(options):
            raise UsageError(f"{options.dest} was begun with another --size or version: remove it, or name another.")
    elif options.dest.is_dir() and any(options.dest.iterdir()):
        raise UsageError(f"{options.dest} has files already, and stays as it is: name a new folder.")


def beginning(options: argparse.Namespace) -> str:
    """The text of a file that a store has until all is packed."""
    from distloop.data.packed import FORMAT

    return json.dumps({"format": FORMAT, "size": options.size}) + "\n"


def pack(options: argparse.Namespace) -> None:
    """Make the store, or what is left of it. Raises UsageError for pictures that cannot be loaded."""
    from filelock import FileLock, Timeout

    from distloop.data.packed import BEGUN, HALVES, PART, part_file
    from distloop.data.pictures import load_picture, open_folders

    check(options)
    folders = open_folders(str(options.source), (None, None), load_picture, "distloop pack")
    options.dest.mkdir(parents=True, exist_ok=True)
    write_text(options.dest / BEGUN, beginning(options))
    lock = FileLock(options.dest / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UsageError(f"Another process packs into {options.dest} at this time.") from None
    with lock, workers(options.processes) as pool:
        made: dict[str, list[Made]] = {}
        for half, folder in zip(HALVES, folders, strict=True):
            (options.dest / half).mkdir(exist_ok=True)
            starts = range(0, len(folder.samples), PART)
            jobs = [
                Job(part_file(options.dest, half, number), folder.samples[start : start + PART], options.size)
                for number, start in enumerate(starts)
            ]
            made[half] = all_made(pool, jobs, f"{half}: {{:,}} of {len(folder.samples):,} pictures")
        if errors := [error for parts in made.values() for part in parts for error in part.errors]:
            more = f"\n  and {len(errors) - MOST_SAID} more" if len(errors) > MOST_SAID else ""
            raise UsageError(
                f"{len(errors)} of the pictures cannot be loaded:\n  " + "\n  ".join(errors[:MOST_SAID]) + more + "\n"
                "Replace or remove them. The same command goes on with what is left."
            )
        finish(options, folders, made)
    print(
        f"{options.dest}: {len(folders[0]):,} pictures to train on, {len(folders[1]):,} to validate on, their shorter "
        f"side {options.size} pixels at most; {file_size(sum(part.size for parts in made.values() for part in parts))}"
        f"\nTo train on them: --data packed --data.root {shlex.quote(str(options.dest))}"
    )


def finish(options: argparse.Namespace, folders: tuple[Any, Any], made: dict[str, list[Made]]) -> None:
    """Write the tables of the store, packed.json last, and remove what was needed until now."""
    import numpy as np

    from distloop.data.packed import BEGUN, FORMAT, STORE, digest_of

    stored: dict[str, Any] = {"format": FORMAT, "size": options.size, "classes": folders[0].classes}
    stored |= {"parts": {}, "rows": {}}
    for (half, parts), folder in zip(made.items(), folders, strict=True):
        rows = np.array([row for part in parts for row in part.rows], "<i4")
        content = io.BytesIO()
        np.save(content, rows)
        write_bytes(options.dest / f"{half}.npy", content.getvalue())
        names = [os.path.relpath(path, folder.root) for path, _ in folder.samples]
        write_text(options.dest / f"{half}.names.json", json.dumps(names, indent=0) + "\n")
        stored["parts"][half] = [(part.size, part.sha256) for part in parts]
        stored["rows"][half] = digest_of(rows)
    write_text(options.dest / STORE, json.dumps(stored) + "\n")
    for half, parts in made.items():
        for number in range(len(parts)):
            (options.dest / half / f"{number:05}.json").unlink(missing_ok=True)
    for name in (BEGUN, ".lock"):
        (options.dest / name).unlink(missing_ok=True)


def check_store(options: argparse.Namespace) -> int:
    """Read all of the store and compare its checksums. Raises RunFailed that names what differs."""
    from distloop.data.packed import HALVES, Packed, part_file, read_store

    if options.dest is not None or options.size is not None:
        raise UsageError("distloop pack --check STORE takes one folder, and no --size.")
    store = read_store(options.source)
    pictures = sum(len(Packed(store, half, lambda picture: picture)) for half in HALVES)
    parts = [(part_file(store.folder, half, n), part) for half in HALVES for n, part in enumerate(store.parts[half])]
    with workers(options.processes) as pool:
        found = list(pool.map(sha256_of, [file for file, _ in parts]))
    damaged = [str(file) for (file, part), sha256 in zip(parts, found, strict=True) if part.sha256 != sha256]
    if damaged:
        raise RunFailed(
            f"{len(damaged)} of {len(parts)} files have other contents than were packed:\n  "
            + "\n  ".join(damaged[:MOST_SAID])
            + "\nCopy the store anew, or pack the pictures again."
        )
    print(f"{store.folder}: {pictures:,} pictures in {len(parts)} files, as they were packed")
    return 0
