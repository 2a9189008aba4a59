"""`distloop tokens FILE… FOLDER`: make the files of the data set `tokens` from text, by bytes or by a tokenizer."""

import argparse
import json
import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distloop.config.registry import import_callable
from distloop.data.tokens import DTYPES, SIDECAR, TRAIN, VALIDATION, Kind
from distloop.errors import UsageError

BLOCK = 4 << 20  # bytes that are read at once
BYTES = 256  # the vocabulary without a tokenizer


def main(arguments: list[str]) -> int:
    """Make the files that the command line asks for; returns the exit code: 0 written, 2 wrong usage."""
    options = parser().parse_args(arguments)
    try:
        check(options)
        kind, counts = write(options)
    except UsageError as error:
        print(f"distloop: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        place = error.filename2 or error.filename or options.folder
        print(f"distloop: {place}: {error.strerror or error}.", file=sys.stderr)
        return 2
    print(
        f"{options.folder}: {counts[TRAIN]:,} tokens to train on, {counts[VALIDATION]:,} to validate on, of "
        f"{kind.dtype}; vocabulary {kind.vocabulary:,}; {kind.bytes_per_token:.4g} bytes of text a token.\n"
        f"To train on them: --data tokens --data.root {shlex.quote(str(options.folder))} --data.args.length 256"
    )
    return 0


def parser() -> argparse.ArgumentParser:
    words = argparse.ArgumentParser(
        prog="distloop tokens",
        description=f"Make {TRAIN}, {VALIDATION} and {SIDECAR} of text files, for data.name: tokens. Without a "
        "tokenizer each byte is a token, and files may be larger than the memory. Nothing is replaced.",
        allow_abbrev=False,
    )
    words.add_argument("files", metavar="FILE", nargs="+", type=Path, help="text, one after the other in this order")
    words.add_argument("folder", metavar="FOLDER", type=Path, help="where to: a new folder, or one without files")
    words.add_argument(
        "--tokenizer",
        metavar="MODULE:CALLABLE",
        help="your own: it gets a text and returns a list of whole numbers. It is called twice for each file, with "
        "the part to train on and the part to validate on, which are in memory; they must be UTF-8",
    )
    words.add_argument("--vocabulary", type=int, metavar="N", help="how many tokens the tokenizer knows")
    words.add_argument(
        "--validation-share",
        type=float,
        default=0.1,
        metavar="SHARE",
        help="the last part of each file, which is for validation; default: 0.1",
    )
    return words


def check(options: argparse.Namespace) -> None:
    """Raise UsageError unless the files are there, and nothing is in the folder."""
    for file in options.files:
        if not file.is_file():
            raise UsageError(f"{file} is {'a folder' if file.is_dir() else 'not there'}: name text files.")
    if os.path.lexists(options.folder) and not options.folder.is_dir():
        raise UsageError(f"{options.folder} is a file: the last word names the folder to write to.")
    if options.folder.is_dir() and any(options.folder.iterdir()):
        raise UsageError(f"{options.folder} has files already, and stays as it is: name a new folder.")
    if not 0 < options.validation_share < 1:
        raise UsageError(f"--validation-share {options.validation_share:g}: a number between 0 and 1, such as 0.1.")
    if (options.tokenizer is None) != (options.vocabulary is None):
        raise UsageError("--tokenizer and --vocabulary need each other. Without both, the tokens are the 256 bytes.")
    if options.vocabulary is not None and not 0 < options.vocabulary <= 2**32:
        raise UsageError(f"--vocabulary {options.vocabulary}: give the number of tokens, 1 to 2**32.")


def write(options: argparse.Namespace) -> tuple[Kind, dict[str, int]]:
    """Write the files into a folder aside, which becomes the one that was asked for once all is written; returns what
    the tokens are, and how many each file has. Raises UsageError."""
    tokenizer = import_callable("--tokenizer", options.tokenizer) if options.tokenizer else None
    vocabulary = options.vocabulary or BYTES
    dtype = "uint16" if vocabulary <= 2**16 else "uint32"
    folder = options.folder.resolve()
    aside = folder.with_name(f".{folder.name}.{os.getpid()}")
    aside.mkdir(parents=True)
    counts, sizes = {TRAIN: 0, VALIDATION: 0}, {TRAIN: 0, VALIDATION: 0}
    try:
        for name in counts:
            with open(aside / name, "wb") as target:
                for file in options.files:
                    begin, end = part_of(file, options.validation_share, name == VALIDATION)
                    sizes[name] += end - begin
                    for found in numbers_of(file, begin, end, tokenizer, vocabulary):
                        counts[name] += len(found)
                        target.write(found.astype(DTYPES[dtype]).tobytes())
            if not counts[name]:
                what = "train on" if name == TRAIN else "validate on"
                raise UsageError(f"There are no tokens to {what}: give more text, or another --validation-share.")
        kind = Kind(dtype, vocabulary, sizes[VALIDATION] / counts[VALIDATION])
        (aside / SIDECAR).write_text(json.dumps(kind._asdict()) + "\n", encoding="utf-8")
        os.rename(aside, folder)  # fails if there are files meanwhile
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return kind, counts


def part_of(file: Path, share: float, is_validation: bool) -> tuple[int, int]:
    """From which byte to which the file is for training, or for validation. No character of UTF-8 is divided."""
    size = file.stat().st_size
    border = size - round(size * share)
    with open(file, "rb") as opened:
        opened.seek(border)
        near = opened.read(3)
    border += len(near) - len(near.lstrip(bytes(range(0x80, 0xC0))))  # the rest of a character
    return (border, size) if is_validation else (0, border)


def numbers_of(file: Path, begin: int, end: int, tokenizer: Any, vocabulary: int) -> Iterator[NDArray[Any]]:
    """The tokens of a part of a file, in pieces. Raises UsageError for what is no text, or gives no tokens."""
    with open(file, "rb") as opened:
        opened.seek(begin)
        if tokenizer is None:
            while begin < end and (block := opened.read(min(BLOCK, end - begin))):
                begin += len(block)
                yield np.frombuffer(block, np.uint8)
            return
        content = opened.read(end - begin)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{file} is no text in UTF-8 (byte {begin + error.start}: {error.reason}): convert it, or leave "
            "--tokenizer out."
        ) from None
    if text:
        yield checked(tokenizer(text), file, vocabulary)


def checked(returned: Any, file: Path, vocabulary: int) -> NDArray[Any]:
    """What the tokenizer returned, as an array. Raises UsageError unless it is a list of tokens."""
    found = np.asarray(returned)
    if found.ndim != 1 or (found.size and not np.issubdtype(found.dtype, np.integer)):
        raise UsageError(
            f"--tokenizer must return a list of whole numbers; for {file} it gave a {type(returned).__name__}: "
            f"{str(returned)[:80]}"
        )
    for wrong in found[(found < 0) | (found >= vocabulary)][:1]:
        raise UsageError(
            f"--tokenizer returned the token {wrong} for {file}, but a vocabulary of {vocabulary} has 0 to "
            f"{vocabulary - 1}. Correct --vocabulary."
        )
    return found
