"""What README.md, CONTRIBUTING.md and docs/ tell a reader to type runs, literally and in its order.

It runs in a copy of the working tree with small data and shorter recipes (tests/tools/documents.py). Commands for Slurm
run in tests/slurm/test_documents.py.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.tools.documents import PAGES, Block, blocks_of, environment, run_page, start, working_copy
from tests.tools.ranks import REPOSITORY, free_port
from tests.tools.records import rows, status

pytestmark = pytest.mark.timeout(900)  # each test is a whole page, command after command
DOCS = REPOSITORY / "docs"
# Those without a test of their own here, which looks at what came out as well.
OTHERS = [
    page
    for page in PAGES
    if any(block.is_typed for block in blocks_of(page))
    and page.name not in ("README.md", "checkpoints.md", "own-code.md")
]


def finished(folder: Path, *names: str) -> None:
    states = {name: status(folder / "runs" / name)["state"] for name in names}
    assert states == dict.fromkeys(names, "finished")


def output_of(printed: dict[Block, str], words: str) -> str:
    """What the one block with these words printed."""
    [output] = [text for block, text in printed.items() if words in block.text]
    return output


@pytest.mark.long
def test_a_reader_can_type_all_of_the_readme(tmp_path: Path) -> None:
    printed = run_page(REPOSITORY / "README.md", working_copy(tmp_path, digits_epochs=4))
    finished(tmp_path, "digits", "cifar10", "four", "sine")
    assert "4 processes on cpu" in output_of(printed, "PROCESSES=4")
    assert "runs/digits is finished" in output_of(printed, "PROCESSES=4")  # by `make train`, above it
    assert "4 processes on cpu" in output_of(printed, "accelerate launch")
    assert rows(tmp_path / "runs" / "sine", "validate")[-1]["loss"] < 0.3


@pytest.mark.long
def test_a_reader_can_stop_continue_extend_and_move_a_run(tmp_path: Path) -> None:
    page = DOCS / "checkpoints.md"
    printed = run_page(page, working_copy(tmp_path, digits_epochs=20))
    commands = [printed[block] for block in blocks_of(page) if "python -m distloop.train" in block.text]
    assert "(the file STOP), saved in runs/digits; the same command continues" in commands[0]
    assert "continuing after step" in commands[1]
    assert "the previous run was moved to runs/digits.old-1" in commands[2]
    assert "is finished" in commands[3]


@pytest.mark.long
def test_a_reader_can_train_the_examples_of_own_code(tmp_path: Path) -> None:
    run_page(DOCS / "own-code.md", working_copy(tmp_path, digits_epochs=4))
    built_in = ("mixup", "pictures", "trivial", "unsplit")
    names = ("letters", "on-two", "auroc", "parts", "night", "prototypes", "tokens", *built_in)
    finished(tmp_path, *names)
    last = {name: rows(tmp_path / "runs" / name, "validate")[-1] for name in names}
    assert min(last[name]["accuracy"] for name in ("letters", "prototypes", "mixup", "night")) > 0.5
    assert last["auroc"]["auroc"] > 0.9
    assert status(tmp_path / "runs" / "parts")["reason"].startswith("no better accuracy than")
    assert {"accuracy/night", "samples/night"} <= set(last["night"])


@pytest.mark.long
@pytest.mark.parametrize("page", OTHERS, ids=lambda page: page.name)
def test_a_reader_can_type_what_the_other_pages_say(tmp_path: Path, page: Path) -> None:
    folder = working_copy(tmp_path, digits_epochs=4)
    assert run_page(page, folder)


@pytest.mark.long
def test_the_commands_for_two_machines_make_one_run(tmp_path: Path) -> None:
    folder = working_copy(tmp_path, digits_epochs=4)
    [block] = [block for block in blocks_of(DOCS / "launching.md") if block.needs == "two machines"]
    text = block.text.replace("10.0.0.1", "127.0.0.1")  # this machine is both
    assert text != block.text
    variables = {**environment(folder), "PROCESSES": "1", "MASTER_PORT": str(free_port())}
    lines = text.splitlines()
    processes = [start(line, folder, variables, tmp_path / f".machine-{n}") for n, line in enumerate(lines)]
    with ThreadPoolExecutor(len(processes)) as pool:
        codes = list(pool.map(lambda process: process.wait(120), processes))
    outputs = [(tmp_path / f".machine-{n}").read_text() for n in range(len(lines))]
    assert codes == [0, 0], outputs
    assert "2 processes on cpu" in outputs[0]
    finished(tmp_path, "digits")
