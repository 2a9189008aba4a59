"""Data sets: what they hold, where their files are looked for, and what is said when they are not there."""

from __future__ import annotations

import gzip
import hashlib
import multiprocessing
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, random_split
from torchvision.datasets import CIFAR10, FashionMNIST

from distloop.config.settings import Data
from distloop.data.batches import to_model
from distloop.data.datasets import DataSource, cifar10, diabetes, digits, load_data
from distloop.data.download import download_lock
from distloop.data.fingerprint import fingerprint
from distloop.data.order import MicroBatch
from distloop.data.seeded import SeededDataset, collate_of, no_check
from distloop.data.whole_batches import InMemory
from distloop.errors import UsageError
from tests.tools.image_files import Uint8s, accept_cifar10, garments, idx_file, write_cifar10, write_garments
from tests.tools.ranks import closed_port

# ---- embedded ------------------------------------------------------------------------------------------------


def test_digits_are_1437_and_360_images_of_every_class_alike() -> None:
    source = digits()
    assert (len(source.train), len(source.validation)) == (1437, 360)
    assert source.train.inputs.shape == (1437, 1, 8, 8)
    assert source.train.inputs.dtype == torch.uint8
    assert int(source.train.inputs.max()) == 255
    assert source.train.targets.dtype == torch.int64
    assert source.classes == tuple("0123456789")
    for digit in range(10):
        held_out, kept = (int((half.targets == digit).sum()) for half in (source.validation, source.train))
        assert abs(held_out - 0.2 * (held_out + kept)) <= 1  # stratified


def test_the_split_of_digits_is_fixed_and_disjoint() -> None:
    first, second = digits(), digits()
    torch.manual_seed(1)
    np.random.seed(1)
    third = digits()
    for half in ("train", "validation"):
        images = getattr(first, half).inputs
        assert torch.equal(images, getattr(second, half).inputs)
        assert torch.equal(images, getattr(third, half).inputs)
    train, validation = ({image.numpy().tobytes() for image in half.inputs} for half in (first.train, first.validation))
    assert (len(train), len(validation)) == (1437, 360)  # no image is there twice, so this tells apart:
    assert not train & validation


def test_only_the_training_half_of_digits_is_augmented() -> None:
    source = digits(shift=2)
    random = np.full((1, 3), 0.99)
    train, _ = source.train.batch(np.array([0]), random)
    validation, _ = source.validation.batch(np.array([0]), random)
    assert torch.equal(train[0, 0, :6, :6], source.train.inputs[0, 0, 2:, 2:])
    assert torch.equal(validation, source.validation.inputs[:1])


def test_diabetes_is_353_and_89_rows_standardised_by_the_training_rows() -> None:
    source = diabetes()
    assert (len(source.train), len(source.validation)) == (353, 89)
    assert source.train.inputs.shape == (353, 10)
    assert source.train.targets.shape == (353, 1)
    assert source.train.inputs.dtype == source.train.targets.dtype == torch.float32
    assert source.classes is None
    for columns in (source.train.inputs, source.train.targets):
        assert columns.mean(0).abs().max() < 1e-6
        assert (columns.std(0, correction=0) - 1).abs().max() < 1e-5
    assert source.validation.inputs.mean(0).abs().max() > 0.01
    train, validation = ({row.numpy().tobytes() for row in half.inputs} for half in (source.train, source.validation))
    assert (len(train), len(validation)) == (353, 89)
    assert not train & validation
    assert torch.equal(diabetes().train.inputs, source.train.inputs)


# ---- Fashion-MNIST -------------------------------------------------------------------------------------------


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with closed_port() as port:
        monkeypatch.setattr(FashionMNIST, "mirrors", [f"http://127.0.0.1:{port}/"])
        monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{port}/cifar-10-python.tar.gz")
        yield


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("download", [True, False])
def test_fashion_mnist_on_the_disk_needs_no_network(tmp_path: Path, download: bool) -> None:
    arrays = write_garments(tmp_path)
    source = load_data(Data("fashion_mnist", root=str(tmp_path), args={"download": download}))
    assert source.classes is not None
    assert (len(source.classes), source.classes[0], source.classes[9]) == (10, "T-shirt/top", "Ankle boot")
    assert torch.equal(source.train.inputs, torch.from_numpy(arrays["train-images-idx3-ubyte"])[:, None])
    assert torch.equal(source.validation.inputs, torch.from_numpy(arrays["t10k-images-idx3-ubyte"])[:, None])
    assert source.train.targets.tolist() == [index % 10 for index in range(30)]
    assert source.train.targets.dtype == torch.int64
    assert (source.train.draws, source.validation.draws) == (3, 0)


@pytest.mark.usefixtures("no_network")
def test_files_that_cannot_be_written_to_are_read_where_they_are(tmp_path: Path) -> None:
    write_garments(tmp_path)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    load_data(Data("fashion_mnist", root=str(tmp_path)))
    assert sorted(path.name for path in tmp_path.rglob("*")) == before  # no lock file, nothing


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    ("name", "folder", "torchvision_name"),
    [("fashion_mnist", "FashionMNIST/raw", "FashionMNIST"), ("cifar10", "cifar-10-batches-py", "CIFAR10")],
)
@pytest.mark.parametrize("download", [True, False])
def test_missing_files_are_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, folder: str, torchvision_name: str, download: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught:
        load_data(Data(name, root="data", args={"download": download}))
    message = str(caught.value)
    assert f"{torchvision_name} is not complete in {tmp_path / 'data' / folder}" in message
    assert "Copy its files there" in message
    assert "--data.root" in message
    assert ("Connection refused" if download else "data.args.download is false") in message
    code = re.search(r'python -c "(.*)"', message)
    assert code is not None
    compile(code[1], "message", "exec")
    assert f"import {torchvision_name} as D" in code[1]
    assert "root" not in code[1]
    assert "'data'" in code[1]


def test_who_waits_for_a_download_too_long_is_told_for_whom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distloop.data.download.WAIT_SECONDS", 0.5)
    root = tmp_path / "data"
    code = "import sys, pathlib; from distloop.data.download import download_lock\n"
    code += "with download_lock(pathlib.Path(sys.argv[1])): print('has it', flush=True); input()"
    for _ in range(2):  # the second one replaces the first one's name
        with subprocess.Popen(
            [sys.executable, "-c", code, root], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as holder:
            assert holder.stdout
            assert holder.stdout.readline() == b"has it\n"
            name = f"process {holder.pid} on {os.uname().nodename}"
            for _ in range(2):  # who waits leaves the name where it is
                with pytest.raises(UsageError) as caught, download_lock(root):
                    pass
                assert str(caught.value).startswith(f"Waited 0.5 s for {name} to download data to {root}; ")
            holder.kill()
    with download_lock(root):  # that of a killed process is free
        pass


@pytest.mark.usefixtures("no_network")
def test_one_missing_file_is_enough_to_be_explained(tmp_path: Path) -> None:
    write_garments(tmp_path)
    (tmp_path / "FashionMNIST" / "raw" / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(UsageError, match="not complete"):
        load_data(Data("fashion_mnist", root=str(tmp_path), args={"download": False}))


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("size", [0, 9, 500])
def test_a_file_that_was_cut_short_is_explained(tmp_path: Path, size: int) -> None:
    write_garments(tmp_path)
    file = tmp_path / "FashionMNIST" / "raw" / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(UsageError, match=str(file.parent)):
        load_data(Data("fashion_mnist", root=str(tmp_path), args={"download": False}))


def test_a_root_that_cannot_be_made_is_explained(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file, not a folder")
    with pytest.raises(UsageError, match="FashionMNIST is not complete"):
        load_data(Data("fashion_mnist", root=str(tmp_path / "data")))


class Server:
    """Serves files from memory on loopback and counts how often each was asked for."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.requests: Counter[str] = Counter()
        requests = self.requests

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.send_response(200)
                self.send_header("Content-Length", str(len(files[self.path.strip("/")])))
                self.end_headers()

            def do_GET(self) -> None:
                if "Method" not in self.headers:  # torchvision looks for redirections with "Method: HEAD"
                    requests[self.path.strip("/")] += 1
                self.do_HEAD()
                self.wfile.write(files[self.path.strip("/")])

            def log_message(self, *arguments: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/"

    def __enter__(self) -> Server:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Fashion-MNIST's mirror with 30 + 20 images."""
    files = {f"{name}.gz": gzip.compress(idx_file(array)) for name, array in garments().items()}
    with Server(files) as server:
        monkeypatch.setattr(FashionMNIST, "mirrors", [server.url])
        md5s = [(name, hashlib.md5(content).hexdigest()) for name, content in files.items()]
        monkeypatch.setattr(FashionMNIST, "resources", md5s)
        yield server


def load_together(root: str, barrier: Any, answers: Any) -> None:
    """In a process: load the data, but only go on to download once all processes have found it missing."""
    look = FashionMNIST.__init__

    def look_together(self: Any, *arguments: Any, download: bool = False, **options: Any) -> None:
        try:
            look(self, *arguments, download=download, **options)
        except RuntimeError:
            if not download:
                barrier.wait(60)
            raise

    FashionMNIST.__init__ = look_together
    source = load_data(Data("fashion_mnist", root=root))
    answers.put((len(source.train), int(source.train.inputs.sum()), int(source.validation.inputs.sum())))


def test_two_processes_at_once_download_each_file_once_and_both_have_it(tmp_path: Path, mirror: Server) -> None:
    context = multiprocessing.get_context("fork")
    barrier, answers = context.Barrier(2), context.Queue()
    processes = [context.Process(target=load_together, args=(str(tmp_path), barrier, answers)) for _ in range(2)]
    for process in processes:
        process.start()
    found = [answers.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    arrays = garments()
    sums = (int(arrays[f"{half}-images-idx3-ubyte"].sum()) for half in ("train", "t10k"))
    assert found == [(30, *sums)] * 2
    assert mirror.requests == Counter(dict.fromkeys([f"{name}.gz" for name in arrays], 1))


def test_what_was_downloaded_once_is_not_asked_for_again(tmp_path: Path, mirror: Server) -> None:
    for _ in range(2):
        assert len(load_data(Data("fashion_mnist", root=str(tmp_path))).train) == 30
    assert set(mirror.requests.values()) == {1}


def test_a_download_with_another_checksum_is_refused(
    tmp_path: Path, mirror: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    resources = [(name, "0" * 32 if "t10k-labels" in name else md5) for name, md5 in FashionMNIST.resources]
    monkeypatch.setattr(FashionMNIST, "resources", resources)
    with pytest.raises(UsageError, match="downloading failed"):
        load_data(Data("fashion_mnist", root=str(tmp_path)))


# ---- CIFAR-10 ------------------------------------------------------------------------------------------------


@pytest.fixture
def pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Uint8s:
    """CIFAR-10 with four images in each file, in tmp_path; their pixels, [24, 3072]."""
    written = write_cifar10(tmp_path)
    accept_cifar10(tmp_path, monkeypatch.setattr)
    return written


@pytest.mark.usefixtures("no_network")
def test_cifar10_on_the_disk_needs_no_network(tmp_path: Path, pixels: Uint8s) -> None:
    source = load_data(Data("cifar10", root=str(tmp_path)))
    images = torch.from_numpy(pixels).reshape(-1, 3, 32, 32)
    assert torch.equal(source.train.inputs, images[:20])
    assert torch.equal(source.validation.inputs, images[20:])
    assert source.train.targets.tolist() == [index % 10 for index in range(20)]
    assert source.classes is not None
    assert (len(source.classes), source.classes[0]) == (10, "airplane")
    assert (source.train.pad, source.train.flip, source.validation.draws) == (4, True, 0)


@pytest.mark.usefixtures("no_network", "pixels")
def test_a_damaged_cifar10_file_is_explained(tmp_path: Path) -> None:
    file = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UsageError, match=f"not complete in {file.parent}"):
        cifar10(str(tmp_path), download=False)


# ---- folders of pictures -------------------------------------------------------------------------------------


def write_pictures(root: Path, halves: dict[str, dict[str, int]]) -> None:
    """ROOT/HALF/CLASS/N.png or .jpg, so many of each class, in several sizes and modes."""
    generator = np.random.default_rng(0)
    for half, classes in halves.items():
        for name, count in classes.items():
            folder = root / half / name
            folder.mkdir(parents=True)
            for number in range(count):
                height, width = generator.integers(30, 60, 2)
                picture = Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
                if number % 2:
                    picture.convert("L").save(folder / f"{number}.png")
                else:
                    picture.save(folder / f"{number}.jpg")


def batch_of(dataset: Any, epoch: int, indices: list[int]) -> Any:
    return SeededDataset(dataset, 0, collate_of(Data()), no_check).__getitems__(MicroBatch(epoch, np.array(indices)))


def test_pictures_become_bytes_of_one_size_and_are_normalised_where_the_model_is(tmp_path: Path) -> None:
    write_pictures(tmp_path, {"train": {"cat": 3, "dog": 2}, "val": {"cat": 1, "dog": 2}})
    source = load_data(Data("image_folder", root=str(tmp_path), args={"crop": 32, "resize": 40}))
    assert (len(source.train), len(source.validation), source.classes) == (5, 3, ("cat", "dog"))
    for half, labels in ((source.train, [0, 0, 0, 1, 1]), (source.validation, [0, 1, 1])):
        images, targets = batch_of(half, 0, list(range(len(half))))
        assert images.shape == (len(half), 3, 32, 32)
        assert images.dtype == torch.uint8
        assert targets.tolist() == labels
        normalised, _ = to_model((images, targets), source, torch.float64)
        red = (images[:, 0].double() / 255 - 0.485) / 0.229
        assert torch.allclose(normalised[:, 0], red)


def test_only_training_pictures_change_from_epoch_to_epoch(tmp_path: Path) -> None:
    write_pictures(tmp_path, {"train": {"cat": 2}, "val": {"cat": 2}})
    source = load_data(Data("image_folder", root=str(tmp_path), args={"crop": 32, "resize": 40}))
    for half, changes in ((source.train, True), (source.validation, False)):
        images = [batch_of(half, epoch, [0, 1])[0] for epoch in (0, 0, 1)]
        assert torch.equal(images[0], images[1])
        assert torch.equal(images[0], images[2]) is not changes


def test_halves_with_different_classes_are_refused(tmp_path: Path) -> None:
    write_pictures(tmp_path, {"train": {"cat": 1, "dog": 1}, "val": {"cat": 1, "frog": 1}})
    with pytest.raises(UsageError, match=r"(?s)train.*val.*same classes.*dog, frog"):
        load_data(Data("image_folder", root=str(tmp_path)))


@pytest.mark.parametrize("halves", [{}, {"train": {"cat": 1}}, {"train": {"cat": 0}, "val": {"cat": 1}}])
def test_missing_pictures_are_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, halves: dict[str, dict[str, int]]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path / "pictures", halves)
    with pytest.raises(UsageError, match="one folder of pictures per class") as caught:
        load_data(Data("image_folder", root="pictures"))
    assert f"{tmp_path}/pictures/train and {tmp_path}/pictures/val" in str(caught.value)
    assert "--data.root" in str(caught.value)


# ---- the user's own ------------------------------------------------------------------------------------------


def pair(root: str, samples: int = 3) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    return [(root, index) for index in range(samples)], [(root, 0)]


def source_of_two() -> DataSource:
    train, validation = (InMemory(torch.zeros(count, 1), torch.zeros(count, 1)) for count in (2, 1))
    return DataSource(train, validation, classes=("only",))


def nothing() -> None:
    return None


def list_of_two() -> list[list[int]]:
    return [[1], [2]]


def whole() -> Any:
    return InMemory(torch.zeros(8, 3), torch.zeros(8))


def listed() -> Any:
    return random_split(whole(), [0.5, 0.5])


def loaders() -> Any:
    return DataLoader(whole()), DataLoader(whole())


def three() -> tuple[list[int], ...]:
    return [1], [2], [3]


def generators() -> tuple[Iterator[int], Iterator[int]]:
    return iter([1]), iter([2])


class Stream(IterableDataset):
    def __len__(self) -> int:  # perhaps: it is of no use without an index
        return 2

    def __iter__(self) -> Iterator[int]:
        return iter([1, 2])


class NoIndex(Dataset):
    def __len__(self) -> int:
        return 2


def stream() -> tuple[Stream, list[int]]:
    return Stream(), [2]


def no_index() -> tuple[NoIndex, list[int]]:
    return NoIndex(), [2]


def no_validation() -> tuple[list[int], list[int]]:
    return [1, 2], []


def test_a_users_callable_may_return_two_halves_and_is_told_what_it_asks_for() -> None:
    source = load_data(Data("tests.unit.test_datasets:pair", root="there", args={"samples": 5}))
    assert isinstance(source, DataSource)
    assert source.train == [(f"{os.getcwd()}/there", index) for index in range(5)]
    assert (len(source.validation), source.classes, source.mean) == (1, None, None)


def test_a_users_callable_may_return_a_source() -> None:
    source = load_data(Data("tests.unit.test_datasets:source_of_two"))
    assert (len(source.train), source.classes) == (2, ("only",))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "returned a NoneType; return \\(train, validation\\)"),
        ("list_of_two", "returned a list"),
        ("three", "returned a tuple of 3; return \\(train, validation\\)"),
        ("whole", "returned a InMemory; return \\(train, validation\\).*tuple\\(.*random_split"),
        ("listed", "returned a list; .*tuple\\(.*random_split"),
        ("generators", "train half needs __len__ and __getitem__, which a list_iterator lacks: .*three ways out"),
        ("stream", "train half needs __len__ and __getitem__, which a Stream lacks: .*three ways out: list"),
        ("no_index", "train half needs __len__ and __getitem__, which a NoIndex lacks: return data sets"),
        ("loaders", "train half needs __len__ and __getitem__, which a DataLoader lacks: .*makes the loaders"),
        ("no_validation", "validation half is empty"),
        ("digit", "no callable 'digit'.*'digits'"),
    ],
)
def test_what_is_no_data_set_is_refused_by_name(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=f"tests.unit.test_datasets:{name}.*{message}"):
        load_data(Data(f"tests.unit.test_datasets:{name}"))


@pytest.mark.parametrize(("name", "hint"), [("digit", "'digits'"), ("cifar", "'cifar10'")])
def test_an_unknown_name_is_refused_with_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(UsageError, match=f"data.name = '{name}' is not known.*{hint}"):
        load_data(Data(name))


def test_arguments_that_a_data_set_does_not_take_are_refused_with_those_that_it_takes() -> None:
    with pytest.raises(UsageError, match=r"data.args.*'shifts'.*takes \(shift"):
        load_data(Data("digits", args={"shifts": 2}))


# ---- known again ---------------------------------------------------------------------------------------------


def two_tensors(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 4, generator=generator), torch.randint(3, (6,), generator=generator)


def test_data_in_memory_is_known_by_its_contents() -> None:
    inputs, targets = two_tensors()
    known = fingerprint(InMemory(inputs, targets))
    assert known["samples"] == 6
    assert known == fingerprint(InMemory(*two_tensors()))
    assert known == fingerprint(InMemory(inputs, targets, pad=2)), "how it is augmented is the config's to say"
    strided = inputs.T.contiguous().T
    assert not strided.is_contiguous()
    assert known == fingerprint(InMemory(strided, targets)), "how it lies in memory is nothing of its contents"
    changed = inputs.clone()
    changed[5, 3] = torch.nextafter(changed[5, 3], torch.tensor(9.0))
    relabelled = targets.clone()
    relabelled[0] = (relabelled[0] + 1) % 3
    others = [
        InMemory(changed, targets),
        InMemory(inputs, relabelled),
        InMemory(inputs.flip(0), targets.flip(0)),
        InMemory(inputs.double(), targets),
        InMemory(inputs.reshape(6, 2, 2), targets),
        InMemory(inputs[:5], targets[:5]),
    ]
    digests = [fingerprint(other)["sha256"] for other in others]
    assert len({known["sha256"], *digests}) == 7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.bool, torch.uint8, torch.complex64])
def test_data_of_any_type_is_known(dtype: torch.dtype) -> None:
    zeros, ones = torch.zeros(4, 2, dtype=dtype), torch.ones(4, 2, dtype=dtype)
    targets = torch.zeros(4)
    assert fingerprint(InMemory(zeros, targets)) == fingerprint(InMemory(zeros.clone(), targets))
    assert fingerprint(InMemory(zeros, targets)) != fingerprint(InMemory(ones, targets))


def test_folders_of_pictures_are_known_by_names_and_labels_wherever_they_are(tmp_path: Path) -> None:
    def known(folder: str, changes: dict[str, dict[str, int]]) -> dict[str, Any]:
        write_pictures(tmp_path / folder, {"train": {"cat": 3, "dog": 2}, "val": {"cat": 1, "dog": 1}, **changes})
        return fingerprint(load_data(Data("image_folder", root=str(tmp_path / folder))).train)

    first = known("first", {})
    assert first["samples"] == 5
    assert known("moved", {}) == first
    assert known("other-labels", {"train": {"cat": 2, "dog": 3}})["sha256"] != first["sha256"]
    (tmp_path / "moved" / "train" / "cat" / "0.jpg").rename(tmp_path / "moved" / "train" / "cat" / "00.jpg")
    again = fingerprint(load_data(Data("image_folder", root=str(tmp_path / "moved"))).train)
    assert again["samples"] == 5
    assert again["sha256"] != first["sha256"]
