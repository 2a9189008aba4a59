"""Read README.md, CONTRIBUTING.md and docs/: their blocks of commands and code, and a folder to run these in.

Above a block, `<!-- needs: two machines -->` says what a test machine lacks to run it, and
`<!-- beside: the block above -->` that it is typed while the block above runs.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from tests.tools.image_files import write_cifar10, write_garments
from tests.tools.ranks import REPOSITORY, clean_environment, wait_until

PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
PARTS_OF_A_LOOP = "own-loop.md"  # what its Python is; tests/unit/test_own_loop_docs.py holds that page
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MARKER = re.compile(r"<!-- (needs|beside): (.+) -->\n\Z")
FILE_NAME = re.compile(r"(?:#!.*\n)?# ([\w-]+\.(?:py|yaml|sbatch))\b")  # in the first comment of a block


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    text: str
    needs: str | None = None
    beside: bool = False

    @property
    def file(self) -> str | None:
        """The name of the file that the block shows, if it shows one."""
        found = FILE_NAME.match(self.text) if self.language != "sh" else None
        return found and found[1]

    @property
    def is_for_slurm(self) -> bool:
        return self.language == "sh" and re.search(r"\b(sbatch|srun) ", self.text) is not None

    @property
    def is_typed(self) -> bool:
        """Whether it is run in the working copy: commands, and Python that shows no file."""
        runs = self.language == "sh" or (self.language == "python" and self.page != PARTS_OF_A_LOOP)
        return runs and not (self.file or self.needs or self.is_for_slurm)

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    """The blocks of a page, in order."""
    text, found = page.read_text(), []
    for match in FENCE.finditer(text):
        marker = MARKER.search(text, 0, match.start())
        kind, what = marker.groups() if marker else ("", None)
        line = text.count("\n", 0, match.start()) + 1
        needs = what if kind == "needs" else None
        found.append(Block(page.name, line, match[1], match[2], needs, kind == "beside"))
    return found


def without_blocks(page: Path) -> str:
    """The text of a page between its blocks."""
    return FENCE.sub("", page.read_text())


# ---- a folder to run them in -----------------------------------------------------------------------------------------

# The tests of the copy, for `make test`, which would otherwise run itself.
TESTS = ("tests/gpu/test_doctor.py", "tests/unit/test_due.py", "tests/multiprocess/test_metrics_rows.py")
# What is changed in the recipes of the copy, so that a run of them takes seconds and downloads nothing.
SHORTER: dict[str, dict[str, Any]] = {
    "cifar10": {"data": "tests.lab.user_code:small_cifar10", "schedule": "constant", "batch": {"global_size": 8}},
    "fashion_mnist": {"schedule": "constant", "batch": {"global_size": 32}},
    "imagenet": {
        "data": {"name": "image_folder", "root": "data/imagenet", "args": {"crop": 32, "resize": 40}},
        "schedule": "constant",
        "batch": {"global_size": 8},
    },
}


def working_copy(folder: Path, digits_epochs: int) -> Path:
    """A copy of the working tree in `folder` as `make train` leaves it, with small data, shorter recipes, few tests."""
    words = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(words, cwd=REPOSITORY, text=True, capture_output=True, check=True).stdout.split("\0")
    for name in filter(None, names):
        left_out = re.match(r"tests/.*/test_\w+\.py", name) and name not in TESTS
        if (source := REPOSITORY / name).is_file() and not left_out:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, folder / name)
    (folder / ".venv").mkdir()
    for path in Path(sys.prefix).iterdir():
        if path.name in ("bin", "lib", "lib64", "include", "pyvenv.cfg"):
            (folder / ".venv" / path.name).symlink_to(path)
    for name in ("installed", "installed-dev"):  # for the Makefile: there is nothing to install
        (folder / ".venv" / name).touch()
    for name, changes in SHORTER.items():
        change_recipe(folder, name, {**changes, "train": {"steps": 2}, "log": {"every_steps": 1}})
    change_recipe(folder, "digits", {"train": {"epochs": digits_epochs}})
    write_data(folder / "data")
    return folder


def change_recipe(folder: Path, name: str, changes: dict[str, Any]) -> None:
    path = folder / "configs" / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **changes}))


def write_data(folder: Path) -> None:
    """A few random pictures in the formats of CIFAR-10, Fashion-MNIST and ImageNet."""
    generator = np.random.default_rng(0)
    write_cifar10(folder)
    write_garments(folder, 64, 16)
    for half in ("train", "val"):
        for name in ("cat", "dog"):
            pictures = folder / "imagenet" / half / name
            pictures.mkdir(parents=True)
            for number in range(8):
                picture = generator.integers(0, 256, (48, 60, 3), dtype=np.uint8)
                Image.fromarray(picture).save(pictures / f"{number}.jpg")


def environment(folder: Path) -> dict[str, str]:
    """Of a user in the working copy who has activated its .venv, on a machine without a GPU."""
    variables = clean_environment()
    variables |= {"PATH": f"{folder}/.venv/bin{os.pathsep}{variables['PATH']}", "PYTHONPATH": str(folder)}
    variables |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    return variables


def start(text: str, folder: Path, variables: dict[str, str], output: Path) -> subprocess.Popen[bytes]:
    """Start commands in bash, which ends at the first one that fails. Their output goes to a file."""
    with open(output, "wb") as file:
        words = ["bash", "-euo", "pipefail", "-c", text]
        return subprocess.Popen(words, cwd=folder, env=variables, stdout=file, stderr=file, stdin=subprocess.DEVNULL)


def run_page(page: Path, folder: Path) -> dict[Block, str]:
    """Write the files that a page shows and run its commands and Python examples in the working copy, in their order.

    Returns what each block printed. AssertionError with that if one fails. Leaves out what needs more or is for Slurm.
    """
    variables, printed = environment(folder), {}
    blocks = blocks_of(page)
    running: list[tuple[Block, subprocess.Popen[bytes], Path]] = []
    for number, block in enumerate(blocks):
        if block.file:
            (folder / block.file).write_text(block.text)
        elif block.is_typed:
            text = block.text if block.language == "sh" else f"python - <<'END'\n{block.text}END"
            output = folder / f".output-{number}"
            process = start(text, folder, variables, output)
            running.append((block, process, output))
            if blocks[number + 1 : number + 2] and blocks[number + 1].beside:
                wait_until((folder / "runs" / "digits" / "metrics.jsonl").exists, f"{block} to train")
                continue
            for one, started, file in running:
                code = started.wait(300)
                printed[one] = file.read_text()
                assert code == 0, f"{one}: exit code {code}\n{one.text}\n{printed[one]}"
            running.clear()
    return printed
