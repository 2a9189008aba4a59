"""The data set `tokens`, and `distloop tokens`, which makes its files."""

from __future__ import annotations

import json
import os
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset

from distloop.commands import tokens as command
from distloop.config.settings import Data
from distloop.data.datasets import load_data
from distloop.data.loader import offers_to_model
from distloop.data.order import MicroBatch
from distloop.data.seeded import SeededDataset, identity, no_check
from distloop.data.seeding import uniforms
from distloop.data.tokens import Kind, Tokens, tokens
from distloop.errors import UsageError

TEXT = "Größe, 5 €: eine Zeile\n" * 40
SIDECAR = '{"dtype": "%s", "vocabulary": %s, "bytes_per_token": 1.0}'


def make(folder: Path, *words: str, text: str = TEXT) -> int:
    """Run the command on a file with this text."""
    (folder / "text.txt").write_text(text, encoding="utf-8")
    return command.main([str(folder / "text.txt"), *words, str(folder / "made")])


def read(folder: Path, half: str, dtype: str = "<u2") -> list[int]:
    return np.fromfile(folder / "made" / f"{half}.bin", dtype).tolist()


def numbered(folder: Path, count: int = 101, dtype: str = "uint16", first: int = 0) -> Path:
    """A folder of files in which each token is its place."""
    folder.mkdir(exist_ok=True)
    for half in ("train", "val"):
        np.arange(first, first + count, dtype=dtype).tofile(folder / f"{half}.bin")
    return folder


# ---- the command -------------------------------------------------------------------------------------------------


def test_bytes_are_tokens_in_both_files_and_no_character_is_divided(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "BLOCK", 7)
    size = len(TEXT.encode())
    for number in range(40):  # the border falls on each place of a line
        folder = tmp_path / str(number)
        folder.mkdir()
        assert make(folder, "--validation-share", str((200 + number) / size)) == 0
        halves = [bytes(read(folder, half)) for half in ("train", "val")]
        assert b"".join(halves) == TEXT.encode()
        assert 196 + number < len(halves[1]) <= 200 + number
        for half in halves:
            half.decode("utf-8")
    written = json.loads((folder / "made" / "tokens.json").read_text())
    assert written == {"dtype": "uint16", "vocabulary": 256, "bytes_per_token": 1.0}
    assert "--data tokens --data.root" in capsys.readouterr().out
    assert oct((folder / "made").stat().st_mode) == oct(folder.stat().st_mode)


def test_each_file_gives_its_last_part_to_validation(tmp_path: Path) -> None:
    for name, letter in (("a", "a"), ("b", "b")):
        (tmp_path / name).write_text(letter * 100)
    assert command.main([str(tmp_path / "b"), str(tmp_path / "a"), str(tmp_path / "made")]) == 0
    assert bytes(read(tmp_path, "train")) == b"b" * 90 + b"a" * 90
    assert bytes(read(tmp_path, "val")) == b"b" * 10 + b"a" * 10


def letters(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def as_array(text: str) -> Any:
    return torch.tensor([70_000 + len(word) for word in text.split()])


def fractions(text: str) -> list[float]:
    return [1.5]


@pytest.mark.parametrize(("vocabulary", "dtype"), [(2**16, "uint16"), (2**16 + 1, "uint32")])
def test_a_tokenizer_gives_the_tokens_and_its_vocabulary_their_type(
    tmp_path: Path, vocabulary: int, dtype: str
) -> None:
    assert make(tmp_path, "--tokenizer", "tests.unit.test_tokens:letters", "--vocabulary", str(vocabulary)) == 0
    found = read(tmp_path, "train", dtype), read(tmp_path, "val", dtype)
    assert found[0] + found[1] == letters(TEXT)
    kind = json.loads((tmp_path / "made" / "tokens.json").read_text())
    text = "".join(map(chr, found[1]))
    assert kind == {"dtype": dtype, "vocabulary": vocabulary, "bytes_per_token": len(text.encode()) / len(text)}


def test_a_tokenizer_may_return_an_array(tmp_path: Path) -> None:
    assert make(tmp_path, "--tokenizer", "tests.unit.test_tokens:as_array", "--vocabulary", "70010") == 0
    assert set(read(tmp_path, "train", "<u4")) == {70_001, 70_002, 70_004, 70_005, 70_006}


def broken(text: str) -> list[int]:
    raise LookupError(text)


OWN = "--tokenizer tests.unit.test_tokens:"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--validation-share 0", "--validation-share 0: a number between 0 and 1"),
        ("--validation-share 1e-9", "There are no tokens to validate on"),
        ("--validation-share 0.9999999", "There are no tokens to train on"),
        (f"{OWN}letters", "--tokenizer and --vocabulary need each other"),
        ("--vocabulary 300", "--tokenizer and --vocabulary need each other"),
        (f"{OWN}letters --vocabulary 0", "--vocabulary 0: give the number of tokens"),
        (
            f"{OWN}letters --vocabulary 8364",
            "returned the token 8364 for {text}, but a vocabulary of 8364 has 0 to 8363",
        ),
        (f"{OWN}fractions --vocabulary 9", "must return a list of whole numbers; for {text} it gave a list: [1.5]"),
        (f"{OWN}broken --vocabulary 9", "raised"),
        (f"{OWN}letter --vocabulary 9", "no callable 'letter'. Did you mean 'letters'?"),
    ],
)
def test_a_mistake_is_said_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, said: str
) -> None:
    if said == "raised":  # by the user's own code
        with pytest.raises(LookupError):
            make(tmp_path, *words.split())
    else:
        assert make(tmp_path, *words.split()) == 2
        assert said.format(text=tmp_path / "text.txt") in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["text.txt"]


def test_what_is_there_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = tmp_path / "made"
    made.mkdir()
    assert make(tmp_path) == 0  # into a folder without files
    before = {file: file.read_bytes() for file in made.iterdir()}
    assert make(tmp_path, text="other " * 100) == 2
    assert f"{made} has files already, and stays as it is" in capsys.readouterr().err
    assert command.main([str(made / "train.bin"), str(tmp_path / "text.txt")]) == 2
    assert "text.txt is a file: the last word names the folder" in capsys.readouterr().err
    assert command.main([str(made), str(tmp_path / "other")]) == 2
    assert "made is a folder: name text files" in capsys.readouterr().err
    assert command.main([str(tmp_path / "none"), str(tmp_path / "other")]) == 2
    assert "none is not there: name text files" in capsys.readouterr().err
    assert {file: file.read_bytes() for file in made.iterdir()} == before
    assert sorted(os.listdir(tmp_path)) == ["made", "text.txt"]


def test_a_file_that_comes_meanwhile_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(*arguments: Any) -> Any:
        (tmp_path / "made").mkdir(exist_ok=True)
        (tmp_path / "made" / "train.bin").write_text("another's")
        return border(*arguments)

    border = command.part_of
    monkeypatch.setattr(command, "part_of", other)
    assert make(tmp_path) == 2
    assert f"{tmp_path / 'made'}: Directory not empty" in capsys.readouterr().err
    assert (tmp_path / "made" / "train.bin").read_text() == "another's"
    assert sorted(os.listdir(tmp_path)) == ["made", "text.txt"]


def test_a_text_that_is_not_utf_8_has_no_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "latin").write_bytes("ä".encode("latin-1") * 3 + b"abc" * 20)
    words = [str(tmp_path / "latin"), str(tmp_path / "made")]
    assert command.main([*words, "--tokenizer", "tests.unit.test_tokens:letters", "--vocabulary", "300"]) == 2
    assert "latin is no text in UTF-8 (byte 0: invalid" in capsys.readouterr().err
    assert command.main(words) == 0


# ---- the data set ------------------------------------------------------------------------------------------------


def test_validation_is_in_order_without_overlap_and_targets_are_one_token_further(tmp_path: Path) -> None:
    for count, windows in ((96, 11), (97, 12), (101, 12)):  # the last one needs a target for its last token
        _, validation = tokens(str(numbered(tmp_path / "data", count)), length=8)
        assert len(validation) == windows
    inputs, targets = validation.batch(np.arange(12), np.empty((12, 0)))
    assert (inputs.dtype, targets.dtype) == (torch.int64, torch.int64)
    assert inputs.flatten().tolist() == list(range(96))
    assert torch.equal(targets, inputs + 1)
    assert inputs.is_contiguous()
    assert targets.is_contiguous()


@pytest.mark.parametrize("count", [96, 97, 101, 104])
def test_training_windows_begin_anywhere_in_their_stretch_of_the_file(tmp_path: Path, count: int) -> None:
    train, _ = tokens(str(numbered(tmp_path / "data", count)), length=8)
    indices = np.arange(len(train))
    begins = set()
    for epoch in range(200):
        inputs, targets = train.batch(indices, uniforms(0, epoch, indices, train.draws))
        first = inputs[:, 0].numpy()
        assert (first // 8 == indices).all()
        assert torch.equal(targets, inputs + 1)
        begins.update(first.tolist())
    assert begins == set(range(count - 8))  # the last window ends with the file


def test_a_window_follows_from_seed_epoch_and_index_alone(tmp_path: Path) -> None:
    train, _ = tokens(str(numbered(tmp_path / "data")), length=8)

    def loaded(seed: int, epoch: int, *indices: int) -> torch.Tensor:
        return SeededDataset(train, seed, identity, no_check)[MicroBatch(epoch, np.array(indices))][0]

    together = loaded(0, 3, 7, 2, 11)
    assert torch.equal(together[1:2], loaded(0, 3, 2))
    assert torch.equal(together, loaded(0, 3, 11, 7, 2)[[1, 2, 0]])
    assert not torch.equal(together, loaded(0, 4, 7, 2, 11))
    assert not torch.equal(together, loaded(1, 3, 7, 2, 11))


def test_the_file_is_opened_at_the_first_batch_and_not_sent_to_loader_processes(tmp_path: Path) -> None:
    train, validation = tokens(str(numbered(tmp_path / "data", 10_000)), length=8)
    train.batch(np.array([1]), np.zeros((1, 1)))
    assert train.mapped is not None
    assert validation.mapped is None
    sent = pickle.dumps(train)
    assert len(sent) < 1000
    assert pickle.loads(sent).mapped is None
    assert pickle.loads(sent).batch(np.array([1]), np.zeros((1, 1)))[0].tolist() == [list(range(8, 16))]


def test_files_without_a_sidecar_are_uint16_or_what_the_arguments_say(tmp_path: Path) -> None:
    train, _ = tokens(str(numbered(tmp_path / "data")), length=8)
    assert train.vocabulary is None
    wide = numbered(tmp_path / "wide", dtype="uint32", first=70_000)
    train, validation = tokens(str(wide), length=8, dtype="uint32", vocabulary=70_101)
    assert validation.batch(np.array([0]), np.empty((1, 0)))[0][0, 0] == 70_000
    source = load_data(Data("tokens", root=str(wide), args={"length": 8, "dtype": "uint32", "vocabulary": 70_101}))
    offered = offers_to_model(source.train.batch(np.array([0]), np.zeros((1, 1))), source)
    assert offered == {"num_classes": 70_101, "num_outputs": 70_101, "input_shape": (8,)}


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_a_sidecar_says_type_and_vocabulary(tmp_path: Path, dtype: str) -> None:
    folder = numbered(tmp_path / "data", dtype=dtype)
    (folder / "tokens.json").write_text(SIDECAR % (dtype, 101))
    train, validation = tokens(str(folder), length=8, vocabulary=101)
    assert (train.vocabulary, validation.vocabulary) == (101, 101)
    assert validation.batch(np.array([11]), np.empty((1, 0)))[0][0].tolist() == list(range(88, 96))


def test_a_token_that_the_vocabulary_does_not_have_is_named(tmp_path: Path) -> None:
    _, validation = tokens(str(numbered(tmp_path / "data")), length=8, vocabulary=90)
    validation.batch(np.array([10]), np.empty((1, 0)))
    with pytest.raises(UsageError, match=r"val.bin: its token 90 is 90, but a vocabulary of 90 ends at 89. Correct"):
        validation.batch(np.array([0, 11]), np.empty((2, 0)))


Change = dict[str, bytes | None]
WIDE = np.array([1000, 20_000, 50_000, 7] * 20, "<u4").tobytes()
WIDER = np.array([1000, 120_000, 50_000, 7] * 20, "<u4").tobytes()


@pytest.mark.parametrize(
    ("files", "arguments", "said"),
    [
        ({"train.bin": None}, {}, "train.bin cannot be read (No such file or directory). Point --data.root to"),
        ({"val.bin": None}, {}, "distloop tokens FILE FOLDER"),
        ({"val.bin": b""}, {}, "val.bin is empty. Make it anew"),
        ({"train.bin": b"a" * 101}, {}, "train.bin has 101 bytes, which are not whole tokens of uint16"),
        ({}, {"dtype": "uint32"}, "has 202 bytes, which are not whole tokens of uint32"),
        ({"val.bin": b"a" * 16}, {}, "val.bin has 8 tokens, and a window of 8 with its targets needs 9"),
        ({"train.bin": WIDE}, {}, "train.bin looks like a file of uint32: as uint16, each second token is 0 at most"),
        ({"val.bin": WIDER}, {}, "val.bin looks like a file of uint32: as uint16, each second token is 1 at most"),
        ({}, {"vocabulary": 65_537}, "tokens of uint16 have no vocabulary of 65537"),
        ({}, {"dtype": "int64"}, "dtype is one of uint16, uint32, not 'int64'"),
        ({}, {"length": 0}, "length is a whole number above 0, not 0"),
        ({}, {"vocabulary": True}, "vocabulary is a whole number above 0, not True"),
        ({"tokens.json": b"{}"}, {}, "tokens.json cannot be read (KeyError: 'dtype'). `distloop tokens` writes it as"),
        ({"tokens.json": (SIDECAR % ("int8", 9)).encode()}, {}, "tokens.json cannot be read (KeyError: 'int8')"),
        ({"tokens.json": (SIDECAR % ("uint16", 0)).encode()}, {}, "tokens of uint16 have no vocabulary of 0"),
        (
            {"tokens.json": (SIDECAR % ("uint16", 101)).encode()},
            {"vocabulary": 100},
            "data.args.vocabulary = 100, but {folder}/tokens.json says 101. Leave it out.",
        ),
    ],
)
def test_files_and_arguments_that_do_not_fit_are_refused(
    tmp_path: Path, files: Change, arguments: dict[str, Any], said: str
) -> None:
    folder = numbered(tmp_path / "data")
    for name, content in files.items():
        (folder / name).unlink(missing_ok=True)
        if content is not None:
            (folder / name).write_bytes(content)
    with pytest.raises(UsageError) as raised:
        load_data(Data("tokens", root=str(folder), args={"length": 8, **arguments}))
    assert said.format(folder=folder) in str(raised.value)


@pytest.mark.parametrize("content", [WIDE, WIDER])
def test_a_type_that_is_said_is_believed(tmp_path: Path, content: bytes) -> None:
    folder = numbered(tmp_path / "data")
    for half in ("train", "val"):
        (folder / f"{half}.bin").write_bytes(content)
    assert len(tokens(str(folder), length=8, dtype="uint16")[0]) == 19
    assert len(tokens(str(folder), length=8, dtype="uint32")[0]) == 9


def test_a_window_in_a_large_file_begins_where_it_should(tmp_path: Path) -> None:
    file = tmp_path / "train.bin"
    with open(file, "wb") as sparse:  # 6 GB, of which nothing is on the disk
        sparse.truncate(2 * 3_000_000_001)
        sparse.seek(2 * 2_999_999_984)
        sparse.write(np.arange(17, dtype="<u2").tobytes())
    data = Tokens(file, 16, Kind())
    assert data.batch(np.array([len(data) - 1]), np.empty((1, 0)))[0][0].tolist() == list(range(16))


# ---- samples without an index ------------------------------------------------------------------------------------


class Streamed(IterableDataset):
    def __iter__(self) -> Iterator[int]:
        yield from range(5)


class StreamedWithLength(Streamed):
    def __len__(self) -> int:
        return 5


class Iterates:
    def __iter__(self) -> Iterator[int]:
        yield from range(5)


def streamed(kind: str) -> tuple[Any, Any]:
    return getattr(sys.modules[__name__], kind)(), [1]


@pytest.mark.parametrize("kind", ["Streamed", "StreamedWithLength", "Iterates"])
def test_samples_without_an_index_are_refused_with_the_ways_out(kind: str) -> None:
    with pytest.raises(UsageError) as raised:
        load_data(Data("tests.unit.test_tokens:streamed", args={"kind": kind}))
    message = str(raised.value)
    for words in (f"a {kind}", "__getitem__(i)", "three ways out", "(file, offset, size)", "--data tokens"):
        assert words in message
    assert "docs/own-code.md, Samples without an index" in message
