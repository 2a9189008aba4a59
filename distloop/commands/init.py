"""`distloop init [FOLDER]`: write what a project of one's own begins with: configs, scripts, an example, the loop."""

import argparse
import contextlib
import os
import shlex
import sys
from pathlib import Path

from distloop import __version__
from distloop.commands.copy import PACKAGE, copy_of, write
from distloop.errors import RunFailed, UsageError

LOOP = "my_train.py"
SUFFIXES = {".yaml", ".sh", ".sbatch", ".md", ".py"}  # of what is written
# What is written, by its name in the folder: whole folders of the repository, all that its folder examples/ has,
# and a copy of the loop.
WRITTEN = {
    "README.md": "what to type",
    "mine.py": "data, a model and a task of your own, to change; configs/mine.yaml names them",
    LOOP: "the loop, to change",
    "configs": "a file for each recipe",
    "launch": "scripts that start a run on this machine, or on several",
    "slurm": "scripts for sbatch; common.sh is the place to set up your environment",
}


def main(arguments: list[str]) -> int:
    """Write to the folder that the command line names; returns the exit code: 0 written, 1 failed, 2 wrong usage."""
    parser = argparse.ArgumentParser(
        prog="distloop init",
        description="Write what a project of your own begins with: configs, scripts for machines and for Slurm, "
        "an example of data, model and task, and a copy of the loop. An existing file is never replaced.",
        allow_abbrev=False,
    )
    parser.add_argument("folder", metavar="FOLDER", nargs="?", default=".", help="where to; default: the current one")
    folder = Path(parser.parse_args(arguments).folder)
    try:
        texts = project()
        check(folder, texts)
        write_all(folder, texts)
    except (UsageError, RunFailed) as error:
        print(f"distloop: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    lines = [f"  {name:<12} {what}" for name, what in WRITTEN.items()]
    enter = [] if folder.samefile(".") else [f"  cd {shlex.quote(str(folder))}"]
    begin = ["", "To begin:", *enter, "  distloop train --config configs/mine.yaml"]
    print("\n".join([f"distloop {__version__} has written to {folder.resolve()}:", *lines, *begin]))
    return 0


def project() -> dict[Path, str]:
    """The text of each file that is written, by its place in the project. Raises RunFailed if one is not there."""
    origin = PACKAGE / "project"  # in an installed distloop; in a checkout they lie beside the package
    if not origin.is_dir():
        origin = PACKAGE.parent
    texts = {}
    for folder in ("configs", "launch", "slurm", "examples"):
        base = origin / folder if folder == "examples" else origin
        for file in sorted((origin / folder).rglob("*")):
            if file.is_file() and file.suffix in SUFFIXES:  # not what pip compiles or an editor leaves
                texts[file.relative_to(base)] = file.read_text(encoding="utf-8")
    texts[Path(LOOP)] = copy_of((PACKAGE / "train.py").read_text(encoding="utf-8"), LOOP)
    if absent := WRITTEN.keys() - {place.parts[0] for place in texts}:
        raise RunFailed(f"{', '.join(sorted(absent))}: not in {origin}. Install distloop again.")
    return texts


def check(folder: Path, texts: dict[Path, str]) -> None:
    """Raise UsageError unless all files may be written to `folder`, where nothing is in their way."""
    if folder.resolve().is_relative_to(PACKAGE):
        raise UsageError(f"{folder} is a part of distloop itself ({PACKAGE}): name a folder of your own.")
    for path in (folder, *folder.parents):
        if os.path.lexists(path) and not path.is_dir():
            raise UsageError(f"{path} is there, and no folder: name another, such as my_project.")
    there = [place for place in texts if os.path.lexists(folder / place)]
    parents = {parent for place in texts for parent in place.parents}
    there += [place for place in parents if place != Path() and _is_in_the_way(folder / place)]
    other = "distloop init my_project writes to another folder"
    if len(there) == len(texts):
        raise UsageError(f"{folder.resolve()} has all that is written here: it stays as it is. {other}.")
    if there:
        names = ", ".join(sorted(map(str, there)))
        raise UsageError(
            f"Nothing was written: in {folder.resolve()} there are already {names}. {other}, from which you can take "
            "what you need."
        )


def _is_in_the_way(place: Path) -> bool:
    """True unless a folder is or can be there: a link may lead to another project."""
    return os.path.lexists(place) and (place.is_symlink() or not place.is_dir())


def write_all(folder: Path, texts: dict[Path, str]) -> None:
    """Write all files to `folder`, which is made if need be. Raises UsageError if one cannot be written; what was
    written before it is removed."""
    with contextlib.ExitStack() as undo:
        for place, text in texts.items():
            file = folder / place
            try:
                for parent in reversed([file.parent, *file.parent.parents]):
                    if not parent.is_dir():
                        parent.mkdir()
                        undo.callback(remove, parent)
                write(file, text)
                undo.callback(remove, file)
                if text.startswith("#!"):  # a wheel and what installs it need not keep the mode
                    mode = file.stat().st_mode
                    file.chmod(mode | (mode & 0o444) >> 2)  # for all who may read it
            except OSError as error:
                raise UsageError(f"{file} cannot be written: {error.strerror or error}.") from None
        undo.pop_all()


def remove(path: Path) -> None:
    """Remove a file, or a folder with nothing in it, if that is possible."""
    with contextlib.suppress(OSError):
        path.rmdir() if path.is_dir() else path.unlink()
