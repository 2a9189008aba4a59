"""Write docs/files.md, which says what each file of the package has, from the first sentence of its docstring.

python -m tests.tools.files_page
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

from tests.tools.ranks import REPOSITORY

PAGE = REPOSITORY / "docs" / "files.md"
PACKAGE = REPOSITORY / "distloop"
ROOMS = ("config", "ranks", "data", "run", "training", "tracking", "commands")
HEAD = """\
# Which file has what

- To understand distloop: read [`distloop/train.py`](../distloop/train.py), then the files that it imports from
- To change it: [CONTRIBUTING.md](../CONTRIBUTING.md) says how to set up, test and write
- To find a test or a helper of the tests: [tests/README.md](../tests/README.md)

A package of the code imports only from itself and from those before it: errors < config < ranks < data, run < training,
tracking < train < commands. `tests/unit/test_rooms.py` checks this, and how long things may be.

This page is generated from the first sentence of each file: `python -m tests.tools.files_page`.

| beside the package | |
|---|---|
| `configs/` | one YAML file for each recipe ([these](config.md#the-recipes)) |
| `launch/` | scripts for one machine and for several, and their Accelerate configs ([more](launching.md)) |
| `slurm/` | sbatch scripts, and what they share ([more](slurm.md)) |
| `examples/` | what `distloop init` writes beside these: data, a model and a task of your own, a README |
| `docs/` | a page per subject; own-loop.md has the names that a loop uses; config.md and this page are generated |
| `tests/` | tests by what they cost, user code for them (`lab/`), helpers (`tools/`), measurements (`bench/`) |
| `Makefile`, `.ci/` | what is typed, what CI runs |
| `CHANGELOG.md` | what is new, and what copies of the loop have to change |
"""


def page() -> str:
    """The text of docs/files.md."""
    parts = [HEAD, table("distloop/", sorted(PACKAGE.glob("*.py")))]
    for room in ROOMS:
        files = sorted((PACKAGE / room).rglob("*.py"), key=lambda path: (len(path.parts), path))
        parts.append(table(f"distloop/{room}/", files))
    return "".join(parts)


def table(folder: str, files: list[Path]) -> str:
    """A section: what the folder is, and a row for each file in it."""
    base = REPOSITORY / folder
    head = f"\n## {folder.rstrip('/')}\n\n{first_sentence(base / '__init__.py')}\n\n| file | what it has |\n|---|---|\n"
    named = [path for path in files if path.name != "__init__.py"]
    return head + "".join(f"| `{path.relative_to(base)}` | {first_sentence(path)} |\n" for path in named)


def first_sentence(path: Path) -> str:
    text = " ".join((ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0].split())
    return re.split(r"(?<=[.!?]) (?=[A-Z])", text)[0]


if __name__ == "__main__":
    PAGE.write_text(page())
