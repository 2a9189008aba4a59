"""A wheel of this checkout, installed into an environment of its own, and a project that its `distloop init` wrote."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.tools.ranks import REPOSITORY, TIMEOUT, command

ACCELERATE = """#!{python}
from accelerate.commands.accelerate_cli import main

main()
"""


def say_where(project: Path) -> None:
    """Each process that imports the project's mine.py prints which distloop it has."""
    with open(project / "mine.py", "a") as file:
        # In one write: ranks print at the same time.
        file.write("\nimport distloop\n\nprint(f'distloop is {distloop.__file__}\\n', end='', flush=True)\n")


def build(folder: Path, source: Path = REPOSITORY) -> Path:
    """Build a wheel from a checkout or an sdist, without the network; returns its path, in `folder`."""
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    pip("wheel", *options, "--wheel-dir", str(folder), str(source))
    [wheel] = folder.glob("*.whl")
    return wheel


def pip(*words: str) -> None:
    done = command([sys.executable, "-m", "pip", "--disable-pip-version-check", *words], Path.cwd())
    assert done.returncode == 0, done.stdout


@dataclass
class Installed:
    """An environment of its own in `folder`, where the wheel is installed; torch and others are those of the tests'."""

    folder: Path

    def __post_init__(self) -> None:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", self.folder], check=True, timeout=TIMEOUT)
        self.python = self.folder / "bin" / "python"
        [packages] = self.folder.glob("lib/python3.*/site-packages")
        wheel = build(self.folder / "wheel")
        pip("--python", str(self.python), "install", "--no-deps", "--no-index", "--quiet", str(wheel))
        # A folder that is named in a .pth has no .pth files of its own read, such as that of an editable distloop.
        others = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
        (packages / "others.pth").write_text("\n".join(others))
        accelerate = self.folder / "bin" / "accelerate"
        accelerate.write_text(ACCELERATE.format(python=self.python))
        accelerate.chmod(0o755)
        self.package = packages / "distloop"
        self.environment = {
            "PATH": f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "VIRTUAL_ENV": str(self.folder),
            "PYTHONPATH": "",  # the checkout is not importable
            "CUDA_VISIBLE_DEVICES": "",
        }

    def run(self, folder: Path, *words: str, **variables: object) -> subprocess.CompletedProcess[str]:
        """Run a command in this environment, as typed in `folder`."""
        return command(list(words), folder, self.environment | {name: str(value) for name, value in variables.items()})

    def project(self, folder: Path) -> Path:
        """A folder that `distloop init` wrote, whose mine.py says which distloop is imported; returns it."""
        done = self.run(folder.parent, "distloop", "init", folder.name)
        assert done.returncode == 0, done.stdout
        say_where(folder)
        return folder

    def check_imported(self, output: str, processes: int) -> None:
        """At least so many processes have imported a project's mine.py, all with distloop from the wheel.

        Loader workers are among them where Python does not fork them: from 3.14 on.
        """
        said = [line.removeprefix("distloop is ") for line in output.splitlines() if line.startswith("distloop is ")]
        assert len(said) >= processes, output
        assert all(Path(file).samefile(self.package / "__init__.py") for file in said), output  # through links, too
