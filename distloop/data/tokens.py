"""Windows over a file of tokens that is mapped into memory: for language models."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distloop.data.whole_batches import WholeBatches
from distloop.errors import UsageError

DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
TRAIN, VALIDATION = "train.bin", "val.bin"
SIDECAR = "tokens.json"  # the fields of Kind, as `distloop tokens` writes them


class Kind(NamedTuple):
    """What the tokens of a folder are."""

    dtype: str = "uint16"
    vocabulary: int | None = None  # how many tokens there are, counted from 0; None: unknown
    bytes_per_token: float | None = None  # of the validation text


class Tokens(WholeBatches):
    """Windows over a file of tokens. A batch is (inputs, targets), int64 [batch, length] each; the targets are the
    same windows, one token further on.

    Window i begins at token i × length, so that windows in order do not overlap; the tokens behind the last whole one
    are left out. `drawn`: window i begins at one of the `length` tokens from there on (fewer at the end of the file),
    drawn from (seed, epoch, i). So an epoch goes over the whole file once, and its windows begin elsewhere each time.
    """

    def __init__(self, file: Path, length: int, kind: Kind, drawn: bool = False) -> None:
        """Raises UsageError for a file that is not there, or is shorter than a window."""
        self.file, self.length, self.vocabulary = str(file.resolve()), length, kind.vocabulary
        self.dtype, self.draws = DTYPES[kind.dtype], int(drawn)
        self.places = tokens_in(file, kind.dtype) - length  # at which a window can begin: each has one token more
        if self.places < 1:
            raise UsageError(
                f"{file} has {self.places + length} tokens, and a window of {length} with its targets needs "
                f"{length + 1}. Give a smaller --data.args.length, or more text."
            )
        self.mapped: NDArray[Any] | None = None  # once a batch was asked for, in each process for itself

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "mapped": None}  # loader processes get the name, not the tokens

    def __len__(self) -> int:
        return (self.places - 1) // self.length + 1

    def batch(self, indices: NDArray[np.int64], random: NDArray[np.float64]) -> tuple[Tensor, Tensor]:
        """The windows at `indices`. Raises UsageError for a token that the vocabulary does not have."""
        if self.mapped is None:
            self.mapped = np.asarray(np.memmap(self.file, self.dtype, "r"))
        starts = indices * self.length
        if self.draws:
            starts += (random[:, 0] * np.minimum(self.length, self.places - starts)).astype(np.int64)
        windows = self.mapped[starts[:, None] + np.arange(self.length + 1)].astype(np.int64)
        if self.vocabulary is not None and windows.max() >= self.vocabulary:
            row, column = np.argwhere(windows >= self.vocabulary)[0]
            raise UsageError(
                f"{self.file}: its token {starts[row] + column} is {windows[row, column]}, but a vocabulary of "
                f"{self.vocabulary} ends at {self.vocabulary - 1}. Correct the vocabulary or the type, in {SIDECAR} "
                "beside the file, or with --data.args.vocabulary and --data.args.dtype."
            )
        found = torch.from_numpy(windows)
        return found[:, :-1].contiguous(), found[:, 1:].contiguous()  # a user's loss may call view()


def tokens(root: str, length: int, dtype: str | None = None, vocabulary: int | None = None) -> tuple[Tokens, Tokens]:
    """The windows of ROOT/train.bin, drawn, and of ROOT/val.bin, in order: files of uint16 or uint32 numbers, as
    `distloop tokens` and nanoGPT's prepare.py write them. `length`: of a window, in tokens. `dtype` and `vocabulary`:
    by default what tokens.json beside the files says; without that file uint16 and unknown. Raises UsageError."""
    for name, value in (("length", length), ("vocabulary", 1 if vocabulary is None else vocabulary)):
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} is a whole number above 0, not {value!r}")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype is one of {', '.join(DTYPES)}, not {dtype!r}")
    folder = Path(root)
    kind = kind_of(folder, dtype, vocabulary)
    halves = Tokens(folder / TRAIN, length, kind, drawn=True), Tokens(folder / VALIDATION, length, kind)
    if dtype is None and not (folder / SIDECAR).exists():
        refuse_wider(folder / TRAIN)
        refuse_wider(folder / VALIDATION)
    return halves


def kind_of(folder: Path, dtype: str | None, vocabulary: int | None) -> Kind:
    """What tokens.json in the folder says, which the arguments must not contradict; without it, what the arguments say.
    Raises UsageError."""
    file = folder / SIDECAR
    kind = Kind(dtype or "uint16", vocabulary)
    if file.exists():
        try:
            stored = json.loads(file.read_text(encoding="utf-8"))
            kind = Kind(stored["dtype"], int(stored["vocabulary"]), float(stored["bytes_per_token"]))
            DTYPES[kind.dtype]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"{file} cannot be read ({type(error).__name__}: {error}). `distloop tokens` writes it as "
                '{"dtype": "uint16", "vocabulary": 256, "bytes_per_token": 1.0}.'
            ) from None
        for name, given in (("dtype", dtype), ("vocabulary", vocabulary)):
            if given not in (None, getattr(kind, name)):
                raise UsageError(f"data.args.{name} = {given}, but {file} says {getattr(kind, name)}. Leave it out.")
    if kind.vocabulary is not None and not 0 < kind.vocabulary <= 2 ** (8 * DTYPES[kind.dtype].itemsize):
        raise UsageError(
            f"{folder}: tokens of {kind.dtype} have no vocabulary of {kind.vocabulary}. Give both as they are in the "
            "files (--data.args.dtype uint32)."
        )
    return kind


def tokens_in(file: Path, dtype: str) -> int:
    """How many tokens a file has. Raises UsageError if it is not there, is empty, or ends within a token."""
    try:
        size = file.stat().st_size
    except OSError as error:
        raise UsageError(
            f"data.name = 'tokens': {file} cannot be read ({error.strerror}). Point --data.root to the folder that has "
            f"{TRAIN} and {VALIDATION}, or make one of text: distloop tokens FILE FOLDER"
        ) from None
    width = DTYPES[dtype].itemsize
    if size == 0 or size % width:
        what = "is empty" if size == 0 else f"has {size} bytes, which are not whole tokens of {dtype}"
        raise UsageError(f"{file} {what}. Make it anew, or give its type: --data.args.dtype uint16 or uint32.")
    return size // width


def refuse_wider(file: Path) -> None:
    """Raise UsageError for a file of which nobody says the type, and that looks like one of uint32: read as uint16,
    each second token would be the upper half of a number, and far smaller than those between."""
    numbers = np.fromfile(file, DTYPES["uint16"], 2048)
    if len(numbers) > 1 and int(numbers[::2].max()) > 64 * int(numbers[1::2].max()):
        raise UsageError(
            f"{file} looks like a file of uint32: as uint16, each second token is {numbers[1::2].max()} at most. Say "
            "which it is: --data.args.dtype uint32 or uint16."
        )
