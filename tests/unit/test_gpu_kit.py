"""The kit of the GPU parts: lists of packages, what is packed for them, and the data."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from packaging.version import Version

from distloop.config.settings import Data
from distloop.data.datasets import DataSource, diabetes, digits, load_data
from tests.gpu import kit
from tests.gpu.data import packed_diabetes, packed_digits, packed_images, write_packed
from tests.gpu.kit import KitError, check_size, copy_project, download, missing, read_list, requirements, usable
from tests.tools.ranks import REPOSITORY, TIMEOUT

# ---- lists -----------------------------------------------------------------------------------------------------------

FREEZE = """
torch==2.11.0+cu128
Huggingface_Hub == 1.33.0
numpy==2.5.2 ; python_version >= "3.12"
-e git+https://example.org/mine.git#egg=mine
mine @ file:///home/me/mine
odd==not-a-version
# a comment
"""
COLUMNS = """
Package            Version      Editable project location
------------------ ------------ -------------------------
torch              2.11.0+cu128
huggingface-hub    1.33.0
numpy              2.5.2        /home/me/numpy
WARNING: there is a newer pip
"""


@pytest.mark.parametrize("text", [FREEZE, COLUMNS], ids=["freeze", "columns"])
def test_both_forms_of_pips_lists_are_read_and_other_lines_passed_over(text: str) -> None:
    versions = {"torch": "2.11.0+cu128", "huggingface-hub": "1.33.0", "numpy": "2.5.2"}
    assert read_list(text) == {name: Version(version) for name, version in versions.items()}


def test_what_is_too_old_for_distloop_is_packed_and_what_is_not_stays_there() -> None:
    wanted = [Requirement("torch>=2.8"), Requirement("filelock>=3.30"), Requirement("rich>=13.7")]
    has = read_list("torch==2.9.0a0+nv25\nfilelock==3.20\nrich==15.0.0\nother==0.1")
    assert sorted(usable(has, wanted)) == ["other", "rich", "torch"]


def make_kit(folder: Path, text: str, *words: str) -> subprocess.CompletedProcess[str]:
    (folder / "list.txt").write_text(text)
    all_words = [sys.executable, "-m", "tests.gpu.kit", "--has", str(folder / "list.txt")]
    all_words += ["--out", str(folder / "kit")]
    options: dict[str, Any] = {"cwd": REPOSITORY, "timeout": TIMEOUT}
    return subprocess.run([*all_words, *words], capture_output=True, text=True, check=False, **options)


@pytest.mark.parametrize(
    ("text", "words", "said"),
    [
        ("numpy==2.5.2", (), "the list names no torch: give the output of `pip freeze`"),
        ("torch==2.7.1", (), "the list has torch 2.7.1; distloop needs torch>=2.8 on that machine"),
        ("torch==2.9.0", ("--python", "3.10"), "Python 3.10: distloop needs 3.11 or newer"),
        ("torch==2.9.0", ("--has", "no-such-file"), "No such file or directory: 'no-such-file'"),
    ],
)
def test_what_cannot_be_packed_for_is_refused_in_one_message(
    tmp_path: Path, text: str, words: tuple[str, ...], said: str
) -> None:
    done = make_kit(tmp_path, text, *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "kit").exists()


def test_a_folder_that_is_no_kit_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "kit").mkdir()
    (tmp_path / "kit" / "mine.txt").write_text("mine")
    done = make_kit(tmp_path, "torch==2.9.0")
    assert done.returncode == 2
    assert "kit has files of another kind in it" in done.stderr
    assert (tmp_path / "kit" / "mine.txt").read_text() == "mine"


# ---- wheels ----------------------------------------------------------------------------------------------------------


def test_the_parts_need_what_distloop_needs_but_three_and_pytest() -> None:
    names = [one.name for one in requirements()]
    assert {"torch", "torchvision", "accelerate", "numpy", "pydantic", "pytest"} <= set(names)
    assert not {"wandb", "scikit-learn", "matplotlib", "pytest-timeout"} & set(names)


def wheel(folder: Path, name: str, version: str, *needs: str, tag: str = "py3-none-any") -> Path:
    path = folder / f"{name}-{version}-{tag}.whl"
    about = f"{name}-{version}.dist-info"
    lines = [
        "Metadata-Version: 2.1",
        f"Name: {name}",
        f"Version: {version}",
        *(f"Requires-Dist: {one}" for one in needs),
    ]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{about}/METADATA", "\n".join(lines) + "\n\nRequires-Dist: in the words below\n")
        archive.writestr(f"{about}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
        archive.writestr(f"{about}/RECORD", "")
    return path


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels, the only ones that pip finds."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name in ("PIP_CONSTRAINT", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def packed(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.whl"))


def test_pip_resolves_beside_what_is_there_and_packs_none_of_it(tmp_path: Path, index: Path) -> None:
    wheel(index, "torch", "2.12.0", "large>=1")  # with needs that are not in the index
    wheel(index, "torch", "2.11.0", tag="cp312-cp312-manylinux_2_28_x86_64")  # what pip would rather take
    wheel(index, "torchvision", "0.27.0", "torch==2.12.0", "numpy", tag="cp312-cp312-manylinux_2_28_x86_64")
    wheel(index, "torchvision", "0.26.0", "torch==2.11.0", "numpy", tag="cp312-cp312-manylinux_2_17_x86_64")
    wheel(index, "torchvision", "0.26.0", "torch==2.11.0", "numpy", tag="cp311-cp311-manylinux_2_28_x86_64")
    wheel(index, "numpy", "9.9", tag="cp312-cp312-manylinux_2_28_x86_64")
    wanted = [Requirement("torch>=2.8"), Requirement("torchvision>=0.23")]
    for has, expected in (
        ("torch==2.11.0\nnumpy==2.5.2", []),
        ("torch==2.11.0+cu128", ["numpy-9.9-cp312-cp312-manylinux_2_28_x86_64.whl"]),
    ):
        folder = tmp_path / has.partition("\n")[2]
        download("3.12", read_list(has), wanted, folder)
        assert packed(folder) == [*expected, "torchvision-0.26.0-cp312-cp312-manylinux_2_17_x86_64.whl"]
        for path in folder.glob("*.whl"):
            path.unlink()


def test_what_that_python_needs_and_this_one_does_not_is_packed_as_well(tmp_path: Path, index: Path) -> None:
    # pip reads markers for the Python that it runs in.
    wheel(
        index, "rich", "15.0", "backport; python_version >= '3.17'", "old; python_version < '3.11'", "x; extra == 'x'"
    )
    wheel(index, "backport", "1.0", "further>=2")
    wheel(index, "further", "2.0")
    folder = tmp_path / "wheels"
    has = read_list("torch==2.11.0")
    download("3.17", has, [Requirement("rich>=13.7")], folder)
    assert packed(folder) == [f"{name}-py3-none-any.whl" for name in ("backport-1.0", "further-2.0", "rich-15.0")]
    (folder / "further-2.0-py3-none-any.whl").unlink()
    assert [str(one) for one in missing("3.17", has, folder)] == ["further>=2"]
    assert missing("3.17", read_list("further 2.1"), folder) == []


def test_packages_that_do_not_go_together_are_named(tmp_path: Path, index: Path) -> None:
    wheel(index, "torchvision", "0.27.0", "torch==2.12.0")
    with pytest.raises(
        KitError, match=r"(?s)no set of wheels for Python 3.12.*torchvision.*take its line out"
    ) as caught:
        download("3.12", read_list("torch==2.11.0"), [Requirement("torchvision")], tmp_path / "wheels")
    assert caught.value.code == 1


# ---- the folder ------------------------------------------------------------------------------------------------------


def test_a_kit_that_is_too_large_names_its_largest_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wheels").mkdir()
    wheel(tmp_path / "wheels", "small", "1.0")
    for name, size in (("numpy-1.0-x.whl", 3 << 20), ("pillow-1.0-x.whl", 2 << 20)):
        (tmp_path / "wheels" / name).write_bytes(bytes(size))
    assert "5.0 MiB, with 3 wheels: numpy, pillow, small" in check_size(tmp_path)
    monkeypatch.setattr(kit, "MOST", 5 << 20)
    with pytest.raises(KitError, match=r"(?s)5.0 MiB, more than 5;.*3.0 MiB  wheels/numpy-1.0.*2.0 MiB  wheels/pillow"):
        check_size(tmp_path)


def test_the_project_is_packed_as_it_is_now_without_its_pages(tmp_path: Path) -> None:
    copy_project(tmp_path)
    for name in (
        "distloop/train.py",
        "configs/digits.yaml",
        "tests/tools/ranks.py",
        "tests/gpu/run.sh",
        "pyproject.toml",
    ):
        assert (tmp_path / name).read_bytes() == (REPOSITORY / name).read_bytes()
    assert (tmp_path / "tests" / "gpu" / "run.sh").stat().st_mode & 0o111
    assert not (tmp_path / "docs").exists()
    assert not list(tmp_path.rglob("__pycache__"))


# ---- data ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_packed(folder)
    return folder


def contents(source: DataSource) -> dict[str, Any]:
    found = dataclasses.asdict(dataclasses.replace(source, train=None, validation=None))
    for half in ("train", "validation"):
        dataset = getattr(source, half)
        found |= {f"{half} {name}": value for name, value in vars(dataset).items()}
    del found["bad_samples"]  # an object that no sample has entered
    return found


@pytest.mark.parametrize("shift", [1, 2])
@pytest.mark.parametrize("has_kit", [True, False])
def test_packed_data_have_the_bits_of_distloops_own(
    data: Path, monkeypatch: pytest.MonkeyPatch, shift: int, has_kit: bool
) -> None:
    if has_kit:
        monkeypatch.setenv("GPU_DATA", str(data))
        monkeypatch.setitem(sys.modules, "sklearn", None)
        monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    else:
        monkeypatch.delenv("GPU_DATA", raising=False)
    ours = [packed_digits(shift), packed_diabetes()]
    monkeypatch.undo()
    for source, own in zip(ours, [digits(shift), diabetes()], strict=True):
        for (name, value), (own_name, own_value) in zip(contents(source).items(), contents(own).items(), strict=True):
            assert name == own_name
            if isinstance(value, torch.Tensor):
                assert value.dtype == own_value.dtype
                assert torch.equal(value, own_value), name
            else:
                assert (type(value), value) == (type(own_value), own_value), name


@pytest.mark.parametrize("has_kit", [True, False])
def test_small_images_are_read_by_distloops_own_loaders(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_kit: bool
) -> None:
    if has_kit:
        monkeypatch.setenv("GPU_DATA", str(data))
    else:
        monkeypatch.delenv("GPU_DATA", raising=False)
    for _ in range(2):  # written once
        root = str(packed_images(tmp_path))
    assert (root == str(data)) is has_kit
    code = "import sys; from distloop.config.settings import Data; from distloop.data.datasets import load_data\n"
    code += "source = load_data(Data('tests.lab.user_code:small_cifar10', root=sys.argv[1]))\n"
    code += "print(len(source.train), len(source.validation), tuple(source.train.inputs.shape[1:]))"
    words = [sys.executable, "-c", code, root]  # a process of its own, since it changes torchvision's checksums
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=TIMEOUT)
    assert done.stdout == "300 60 (3, 32, 32)\n"
    source = load_data(Data("fashion_mnist", root=root, args={"download": False}))
    assert (len(source.train), len(source.validation)) == (300, 100)


def test_make_gpu_installs_what_the_parts_need_unless_a_kit_brings_it(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml"):
        (tmp_path / name).write_text((REPOSITORY / name).read_text())

    def commands() -> str:
        done = subprocess.run(["make", "-n", "gpu"], cwd=tmp_path, capture_output=True, text=True, timeout=TIMEOUT)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "'.[dev]'" in commands()
    (tmp_path / "gpu-kit" / "wheels").mkdir(parents=True)
    assert commands().strip() == "bash tests/gpu/run.sh"
