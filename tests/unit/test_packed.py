"""`distloop pack`, and the data set `packed` that reads its stores."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from filelock import FileLock
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from distloop.commands import pack as command
from distloop.config.settings import Data
from distloop.data import packed
from distloop.data.datasets import IMAGENET_MEAN, DataSource, load_data
from distloop.data.fingerprint import fingerprint
from distloop.data.loader import make_loader
from distloop.data.order import MicroBatchSampler, Plan
from distloop.data.pictures import load_picture
from distloop.data.seeding import seed_sample
from distloop.errors import UsageError
from tests.tools.ranks import wait_until

CPU = torch.device("cpu")
SIZE, CROP = 24, 20
ARGS = {"crop": CROP, "resize": SIZE}


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of pictures of all kinds, 14 to train on; a part of a store has 4 of them."""
    monkeypatch.setattr(packed, "PART", 4)
    generator = np.random.default_rng(0)
    sizes = [(40, 60), (60, 40), (33, 33), (24, 90), (10, 30), (23, 24), (25, 100)]
    for half, count in (("train", 7), ("val", 3)):
        for name in ("cat", "dog"):
            (tmp_path / "source" / half / name).mkdir(parents=True)
            for number, size in enumerate(sizes[:count]):
                picture = Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8))
                mode, ending = (("L", "png"), ("CMYK", "jpg"), ("RGBA", "png"), *[("RGB", "jpg")] * 4)[number]
                picture.convert(mode).save(tmp_path / "source" / half / name / f"{number}.{ending}")
    return tmp_path / "source"


@pytest.fixture
def store(source: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert pack(source) == 0
    assert "14 pictures to train on, 6 to validate on" in capsys.readouterr().out
    return source.parent / "store"


def pack(source: Path, dest: str = "store", size: int = SIZE) -> int:
    return command.main([str(source), str(source.parent / dest), "--size", str(size), "--processes", "1"])


def loaded(root: Path, name: str = "packed", **args: Any) -> DataSource:
    return load_data(Data(name, root=str(root), args={**ARGS, **args}))


def unchanged(picture: Tensor) -> Tensor:
    return picture


def pictures_of(folder: Path) -> list[tuple[Any, int]]:
    """All of a store's training pictures, as they are in it."""
    half = packed.Packed(packed.read_store(folder), "train", unchanged)
    return [half[index] for index in range(len(half))]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# ---- what is in a store ------------------------------------------------------------------------------------------


def test_order_and_labels_are_those_of_the_folder_and_pixels_those_of_the_smaller_picture(
    source: Path, store: Path
) -> None:
    of_source, of_store = (loaded(root, name) for root, name in ((source, "image_folder"), (store, "packed")))
    samples = of_source.train.samples
    assert of_store.classes == of_source.classes == ("cat", "dog")
    assert len(of_store.train) == len(samples) == 14
    for (pixels, label), (path, expected) in zip(pictures_of(store), samples, strict=True):
        picture = load_picture(path)
        if min(picture.size) > SIZE:
            picture = v2.Resize(SIZE, antialias=True)(picture)
        assert label == expected
        assert torch.equal(pixels, v2.functional.pil_to_tensor(picture))
    names = json.loads((store / "train.names.json").read_text())
    assert names == [os.path.relpath(path, source / "train") for path, _ in samples]
    assert sorted(each.name for each in store.iterdir() if each.is_file()) == [
        *("packed.json", "train.names.json", "train.npy", "val.names.json", "val.npy")
    ]
    assert sorted(each.name for each in (store / "train").iterdir()) == [f"0000{number}.bin" for number in range(4)]


def test_validation_pictures_are_those_of_the_folder_to_the_bit(source: Path, store: Path) -> None:
    of_source, of_store = (loaded(root, name) for root, name in ((source, "image_folder"), (store, "packed")))
    for index in range(6):
        (expected, label), (found, found_label) = of_source.validation[index], of_store.validation[index]
        assert torch.equal(found, expected)
        assert found_label == label
    assert loaded(store, validation_crop=18).validation[0][0].shape == (3, 18, 18)
    assert torch.equal(
        loaded(store, augment="none").train[0][0], loaded(source, "image_folder", augment="none").train[0][0]
    )


@pytest.mark.parametrize(("augment", "erase"), [("crop_flip", 0.0), ("trivial", 0.0), ("auto", 0.0), ("rand", 0.5)])
def test_training_pictures_are_augmented_as_torchvision_augments_the_smaller_picture(
    store: Path, augment: str, erase: float
) -> None:
    smooth = v2.InterpolationMode.BILINEAR
    policies = {
        "trivial": v2.TrivialAugmentWide(interpolation=smooth),
        "rand": v2.RandAugment(interpolation=smooth),
        "auto": v2.AutoAugment(interpolation=smooth),
    }
    grey = [round(255 * share) for share in IMAGENET_MEAN]
    last = v2.RandomErasing(erase, value=grey) if erase else v2.Identity()
    first = [v2.RandomResizedCrop(CROP, antialias=True), v2.RandomHorizontalFlip()]
    by_hand = v2.Compose([*first, policies.get(augment, v2.Identity()), last])
    train = loaded(store, augment=augment, erase=erase).train
    for index, (picture, _) in enumerate(pictures_of(store)):
        seed_sample(3, 1, index)
        expected = by_hand(picture)
        seed_sample(3, 1, index)
        found = train[index][0]
        assert (found.dtype, found.shape) == (torch.uint8, (3, CROP, CROP))
        if "AVX" in torch.backends.cpu.get_cpu_capability():  # elsewhere torchvision resizes floats, and rounds others
            assert torch.equal(found, expected)


@pytest.mark.parametrize(("name", "args"), [("packed", {}), ("image_folder", {"decoder": "torchvision"})])
def test_samples_are_the_same_for_any_number_of_workers_and_ranks(
    source: Path, store: Path, name: str, args: dict[str, Any]
) -> None:
    data = loaded(store if name == "packed" else source, name, **args)

    def steps(world_size: int, workers: int) -> list[Tensor]:
        found = []
        for rank in range(world_size):
            sampler = MicroBatchSampler(Plan(14, 4, world_size, total_steps=5, rank=rank, seed=2), 0)
            settings = Data(name, workers=workers)
            loader = make_loader(settings, data, None, 2, CPU, torch.float32, data.train, sampler)
            found.append([batch[0] for batch in loader])
        return [torch.cat(of_step) for of_step in zip(*found, strict=True)]

    expected = steps(1, 0)
    assert len(expected) == 5
    assert len({batch.sum().item() for batch in expected}) == 5
    for world_size, workers in ((1, 2), (2, 0)):
        assert all(map(torch.equal, steps(world_size, workers), expected))


def test_a_store_is_known_again_and_told_from_another(source: Path, store: Path) -> None:
    known = fingerprint(loaded(store).train)
    assert known == fingerprint(loaded(store, augment="trivial").train)
    assert pack(source, "again") == 0
    assert known == fingerprint(loaded(source.parent / "again").train)
    Image.new("RGB", (60, 40), "red").save(source / "train" / "cat" / "0.png")  # of the same size
    assert pack(source, "other") == 0
    assert known != fingerprint(loaded(source.parent / "other").train)


def test_files_are_mapped_not_kept_open_and_are_read_only(store: Path) -> None:
    train = loaded(store).train
    before = psutil.Process().num_fds()
    assert not train.mapped
    for index in range(len(train)):
        train[index]
    assert len(train.mapped) == 4
    assert psutil.Process().num_fds() == before
    assert {file.stat().st_mode & 0o222 for file in (store / "train").iterdir()} == {0}
    assert not train.__getstate__()["mapped"]
    with pytest.raises(IndexError):
        train[14]


# ---- a store that is begun ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("half", ["train", "validation"])
def test_a_sample_that_is_changed_in_place_is_whole_in_the_next_epoch(store: Path, half: str) -> None:
    """As a collate function of the user's may do, which erases a part of each picture."""
    dataset = getattr(loaded(store, augment="none"), half)
    picture = dataset[0][0]
    before = picture.clone()
    picture[:, :4] = 255 - picture[:, :4]
    assert torch.equal(dataset[0][0], before)


def test_a_pack_that_is_killed_leaves_no_process_and_goes_on_where_it_was(source: Path, store: Path) -> None:
    undisturbed = contents(store)
    last = source / "train" / "dog" / "6.jpg"
    content = last.read_bytes()
    last.unlink()
    os.mkfifo(last)  # who loads it waits for ever
    process = multiprocessing.get_context("fork").Process(target=pack, args=(source, "killed"))
    process.start()
    killed = source.parent / "killed"
    wait_until(lambda: (killed / "train" / "00003.writing").exists(), "the part with the picture that never comes")
    of_pool = psutil.Process(process.pid).children()
    assert of_pool
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    try:
        wait_until(lambda: not any(map(runs, of_pool)), "the end of its processes")
    finally:
        for each in filter(runs, of_pool):
            each.kill()
    with pytest.raises(UsageError, match="is not packed to its end"):
        loaded(killed)

    last.unlink()
    last.write_bytes(content)
    before = inodes(killed)
    assert pack(source, "killed") == 0
    assert contents(killed) == undisturbed
    assert [number for number in before if inodes(killed)[number] != before[number]] == []
    assert len(before) == 3


def runs(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def inodes(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_ino for file in (folder / "train").glob("*.bin")}


def test_what_cannot_be_loaded_is_named_and_made_when_it_is_replaced(
    source: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut, deep, odd = (source / "train" / place for place in ("cat/3.jpg", "cat/2.png", "dog/0.png"))
    whole = {file: file.read_bytes() for file in (cut, deep, odd)}
    cut.write_bytes(whole[cut][:-300])
    Image.fromarray(np.full((40, 40), 40_000, np.uint16)).save(deep)
    odd.write_bytes(b"no picture")
    assert pack(source, "other") == 2
    said = capsys.readouterr().err
    assert "3 of the pictures cannot be loaded" in said
    assert f"{cut}: image file is truncated" in said
    assert f"{deep} has values from 40000 to 40000" in said
    assert f"cannot identify image file <_io.BufferedReader name='{odd}'>" in said
    other = source.parent / "other"
    before = inodes(other)
    assert sorted(before) == ["00002.bin", "00003.bin"]

    # A picture that changed meanwhile, and a file that was damaged, are made again.
    for file, content in whole.items():
        file.write_bytes(content)
    stamp = (source / "train" / "dog" / "6.jpg").stat()
    os.utime(source / "train" / "dog" / "6.jpg", ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1))
    spoil(other / "train" / "00002.bin")
    assert pack(source, "other") == 0
    assert contents(other) == contents(store)
    assert not set(inodes(other).values()) & set(before.values())


def spoil(file: Path) -> None:
    """Change a byte."""
    file.chmod(0o644)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_what_cannot_be_meant_is_refused_and_leaves_everything_as_it_is(
    source: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = source.parent
    (folder / "file").write_text("")
    (folder / "begun").mkdir()
    (folder / "begun" / "packing.json").write_text('{"format": 1, "size": 25}\n')
    (folder / "locked").mkdir()
    (folder / "locked" / "packing.json").write_text('{"format": 1, "size": 24}\n')
    cases: dict[tuple[Any, ...], str] = {
        (source, "file", "--size", "24"): "file is a file",
        (source, "source", "--size", "24"): "has files already, and stays as it is",
        (source, "store", "--size", "24"): "is packed to its end, and stays as it is",
        (source, "begun", "--size", "24"): "was begun with another --size or version",
        (source, "locked", "--size", "24"): "Another process packs into",
        (source, "new"): "give both folders, and the pixels",
        (source,): "give both folders, and the pixels",
        (source, "new", "--size", "0"): "whole numbers above 0",
        (source / "train", "new", "--size", "24"): "Put one folder of pictures per class in each",
        (source, "--check"): "packed.json is not there. Make a store",
        (store, "new", "--check"): "takes one folder",
    }
    with FileLock(folder / "locked" / ".lock"):
        before = contents(folder)
        for (first, *rest), message in cases.items():
            words = [str(folder / word) if not word.startswith("-") and not word.isdigit() else word for word in rest]
            assert command.main([str(first), *words]) == 2
            assert message in capsys.readouterr().err
        assert contents(folder) == before


# ---- a store that is damaged, or does not fit --------------------------------------------------------------------


def test_a_check_finds_a_byte_that_changed(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([str(store), "--check", "--processes", "1"]) == 0
    assert "20 pictures in 6 files, as they were packed" in capsys.readouterr().out
    spoil(store / "val" / "00001.bin")
    assert command.main([str(store), "--check", "--processes", "1"]) == 1
    assert f"1 of 6 files have other contents than were packed:\n  {store}/val/00001.bin" in capsys.readouterr().err


def shorten(file: Path) -> None:
    file.chmod(0o644)
    with open(file, "r+b") as opened:
        opened.truncate(file.stat().st_size - 1)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("packed.json", Path.unlink, r"packed.json is not there. Make a store .* point --data.root"),
        ("packed.json", lambda file: file.write_text("{"), r"packed.json cannot be read"),
        (
            "packed.json",
            lambda file: file.write_text('{"format": 2}'),
            r"has the format 2, and this version .* reads 1",
        ),
        ("train.npy", spoil, r"train.npy cannot be used \(it is another one than was packed\)"),
        ("train.npy", shorten, r"train.npy cannot be used \(ValueError"),
        ("train/00003.bin", shorten, r"00003.bin has \S+ bytes instead of \S+. Copy the store anew"),
        ("val/00001.bin", Path.unlink, r"00001.bin is not there"),
    ],
)
def test_a_store_that_is_damaged_is_refused(
    store: Path, name: str, change: Callable[[Path], Any], message: str
) -> None:
    change(store / name)
    with pytest.raises(UsageError, match=message):
        loaded(store)


@pytest.mark.parametrize("name", ["crop", "resize", "validation_crop"])
def test_more_pixels_than_a_store_has_are_refused(store: Path, name: str) -> None:
    with pytest.raises(UsageError, match=rf"data.args = .*: {name} is 25, and the pictures of .* to 24 pixels"):
        loaded(store, **{name: 25})  # type: ignore[arg-type]
