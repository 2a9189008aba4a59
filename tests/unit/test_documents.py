"""README.md, CONTRIBUTING.md and docs/ name what is there: files, anchors, settings, commands. Each page begins with
what a reader wants to do. That their commands run is held by tests/multiprocess/ and tests/slurm/test_documents.py."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote

import pytest

from distloop.commands.cli import COMMANDS
from distloop.config.help import settings_help
from tests.tools import config_page, files_page
from tests.tools.documents import PAGES, PARTS_OF_A_LOOP, blocks_of, without_blocks
from tests.tools.ranks import REPOSITORY

ALL_PAGES = [*PAGES, REPOSITORY / "CHANGELOG.md", REPOSITORY / "tests" / "README.md"]
DOCS = [page for page in PAGES if page.parent != REPOSITORY]
LANGUAGES = {"sh", "text", "python", "yaml", "bash", "diff"}
# What excuses a block of commands from being run. Each new one is a decision.
NEEDS = {"two machines", "the archive", "an account at W&B", "8 GB of free memory and some minutes", "some minutes"}
NEEDS |= {"conda", "internet", "a GPU"}
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
by_name = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def text_and_commands(page: Path) -> str:
    """The text of a page and its blocks of commands, without code and output."""
    return "\n".join([without_blocks(page), *(block.text for block in blocks_of(page) if block.language == "sh")])


def anchors(page: Path) -> set[str]:
    """The anchors of a page: GitHub's for its headings, and its own."""
    text = without_blocks(page)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    slugs = (re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings)
    return {*slugs, *re.findall(r'id="([^"]+)"', text)}


# ---- their form ------------------------------------------------------------------------------------------------------


def test_the_readme_is_short() -> None:
    assert len((REPOSITORY / "README.md").read_text().splitlines()) <= 200


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_a_page_begins_with_what_a_reader_wants_to_do(page: Path) -> None:
    title, *rest = page.read_text().splitlines()
    assert title.startswith("# ")
    assert sum(line.startswith("- To ") for line in rest[:16]) >= 2


@by_name
def test_each_block_says_what_it_is(page: Path) -> None:
    assert page.read_text().count("\n```") == 2 * len(blocks_of(page))
    for block in blocks_of(page):
        assert block.language in LANGUAGES, block
        assert max(map(len, block.text.splitlines())) <= 125, f"{block}: too wide"
        if block.language == "sh" and block.needs is None:
            assert "…" not in re.sub(r"(^|\s)#.*", "", block.text), f"{block}: such a command cannot be run"


def test_few_commands_are_excused_from_being_run() -> None:
    blocks = [block for page in PAGES for block in blocks_of(page) if block.language == "sh"]
    excused = [block for block in blocks if block.needs is not None]
    assert {block.needs for block in excused} == NEEDS
    assert len(excused) < len(blocks) / 4


# ---- what they name --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_what_a_page_links_to_is_there(page: Path) -> None:
    for link in LINK.findall(without_blocks(page)):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = unquote(link).partition("#")
        target = (page.parent / path) if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_each_page_can_be_reached_from_the_readme() -> None:
    seen, waiting = set(), [REPOSITORY / "README.md"]
    while waiting:
        if (page := waiting.pop()) not in seen and page.suffix == ".md" and page.exists():
            seen.add(page)
            links = (link.partition("#")[0] for link in LINK.findall(without_blocks(page)) if "://" not in link)
            waiting += [(page.parent / link).resolve() for link in links if link]
    assert set(PAGES) <= seen


@by_name
def test_the_files_that_a_page_names_are_there(page: Path) -> None:
    names = r"(?<![\w/.-])((?:launch|slurm|configs|distloop|tests)/[\w./-]*\w/?)"
    for name in re.findall(names, text_and_commands(page)):
        assert any((folder / name).exists() for folder in (REPOSITORY, REPOSITORY / "examples")), name


@by_name
def test_settings_and_commands_that_a_page_names_exist(page: Path) -> None:
    text = text_and_commands(page)
    keys = {setting.key for setting in settings_help()}
    for option in re.findall(r"--([a-z_]+\.[\w.-]+\w)", text):
        section, _, name = option.replace("-", "_").partition(".")
        is_argument = section == "own" or f"{section}.{name.partition('.')[0]}" in keys
        assert is_argument or f"{section}.{name.removeprefix('no_')}" in keys, option
    sections = "|".join(sorted({key.partition(".")[0] for key in keys if "." in key}))
    if page.name != PARTS_OF_A_LOOP:  # where loop objects have such names
        for key in re.findall(rf"`((?:{sections})\.(?!py`)[a-z_]+)\b[^`(]*`", text):
            assert key in keys, key
    commands = [block.text for block in blocks_of(page) if block.language == "sh"]
    typed = "\n".join([*commands, *re.findall(r"`([^`]+)`", without_blocks(page))])
    for word in re.findall(r"^distloop (?!--)([a-z]+)", typed, re.MULTILINE):
        assert word in COMMANDS, word
    targets = re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    for target in re.findall(r"^make ([\w-]+)", typed, re.MULTILINE):
        assert target in targets, target


def test_the_messages_that_are_explained_are_said() -> None:
    page = (REPOSITORY / "docs" / "troubleshooting.md").read_text()
    said = "\n".join(
        path.read_text()
        for folder in ("distloop", "slurm")
        for path in (REPOSITORY / folder).rglob("*")
        if path.suffix in (".py", ".sh")
    )
    messages = re.findall(r"^\| ([^|`]+?) \|", page, re.MULTILINE)[1:]
    assert len(messages) > 10
    for message in messages:
        for part in message.split(" … "):
            assert part.replace("\\*\\*\\*", "{MASK}") in said, part


@by_name
def test_python_and_shell_that_a_page_shows_as_a_file_are_right(page: Path) -> None:
    for block in blocks_of(page):
        if block.language == "python" and page.name != PARTS_OF_A_LOOP:
            ast.parse(block.text)
        if block.language in ("sh", "bash"):
            subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)


@pytest.mark.parametrize("generator", [config_page, files_page], ids=lambda module: module.__name__)
def test_a_generated_page_is_what_its_generator_writes(generator: ModuleType) -> None:
    assert generator.PAGE.read_text() == generator.page(), f"run: python -m {generator.__name__}"
