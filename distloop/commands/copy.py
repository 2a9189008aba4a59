"""`distloop copy FILE`: write this version's loop to a file of one's own, which trains as distloop/train.py does."""

import argparse
import contextlib
import re
import shlex
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

from distloop import __version__
from distloop.errors import RunFailed, UsageError

PACKAGE = Path(__file__).resolve().parent.parent
# A pattern that distloop/train.py holds once -> what a copy has in its place.
CHANGES = {
    r"accelerate launch distloop/train\.py ": "accelerate launch {command} ",
    r"python -m distloop\.train ": "python {command} ",
    # A copy lies beside its user's modules, in the folder that Python puts first on its path.
    r"import sys\n": "",
    r"from pathlib import Path\n\nif not __package__:.*\n(?: {4}.*\n)+": "",
    # In two lines, which the copy's longer call would not fit into as one.
    r" {4}prepare_process\(\) {2}(?P<comment>#.*)\n": "    {comment}\n    prepare_process(copied_from={version})\n",
}
COMMANDS = """\
{file}: the loop of distloop {version}, yours to change. It starts as distloop/train.py does:

  python {file} --config …
  accelerate launch {file} --config …
  TRAIN={file} launch/single_node.sh --config …
  TRAIN={file} sbatch slurm/single_node.sbatch --config …

docs/own-loop.md says what each name in it does, and what may be changed."""


def main(arguments: list[str]) -> int:
    """Write the copy that the command line names; returns the exit code: 0 written, 1 failed, 2 wrong usage."""
    parser = argparse.ArgumentParser(
        prog="distloop copy",
        description="Write the loop of this version of distloop to a file of your own: change what you like in it, and "
        "start it as distloop/train.py is started. An existing file is never replaced.",
        allow_abbrev=False,
    )
    parser.add_argument("file", metavar="FILE", help="the file to write, such as my_train.py")
    file = Path(parser.parse_args(arguments).file)
    try:
        check_name(file)
        text = copy_of((PACKAGE / "train.py").read_text(encoding="utf-8"), file.name)
        write(file, text)
    except (UsageError, RunFailed) as error:
        print(f"distloop: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    print(COMMANDS.format(file=shlex.quote(str(file)), version=__version__))
    return 0


def copy_of(loop: str, name: str) -> str:
    """The text of a copy called `name` of `loop`, the text of distloop/train.py. Raises RunFailed if that is not this
    version's own."""
    texts = {"command": shlex.quote(name), "version": f'"{__version__}"'}
    for pattern, text in CHANGES.items():
        if len(found := list(re.finditer(pattern, loop))) != 1:
            raise RunFailed(
                f"{PACKAGE / 'train.py'} is not that of distloop {__version__}: {pattern!r} is in it {len(found)} "
                "times, not once. Install distloop again, or copy the file by hand."
            )
        [match] = found
        loop = loop[: match.start()] + text.format(**texts, **match.groupdict()) + loop[match.end() :]
    return loop


def check_name(file: Path) -> None:
    """Raise UsageError unless a loop may be written to `file`, and started there."""
    if file.is_dir():
        raise UsageError(f"{file} is a folder: name the file to write, such as {file / 'my_train.py'}.")
    if file.suffix != ".py":
        raise UsageError(f"{file} is no name of a Python file: it ends in .py, as {file.stem or 'my_train'}.py does.")
    if not file.name.isprintable() or set(file.name) & set("'\"\\"):
        raise UsageError(f"{file.name!r}: a name without quotes and backslashes is needed, such as my_train.py.")
    if not file.parent.is_dir():
        raise UsageError(
            f"{file}: there is no folder {file.parent}. Make it first: mkdir -p {shlex.quote(str(file.parent))}"
        )
    if file.parent.resolve().is_relative_to(PACKAGE):
        raise UsageError(f"{file} would be a part of distloop itself ({PACKAGE}): write it to a folder of your own.")
    # Python looks for modules in the folder of the file that it runs, before all others.
    if file.stem in {"distloop", *sys.stdlib_module_names, *packages_distributions()}:
        raise UsageError(
            f"{file}: Python would take it for the installed module '{file.stem}', which other modules import. Choose "
            f"another name, such as my_{file.name}."
        )


def write(file: Path, text: str) -> None:
    """Write a new file. Raises UsageError if it is there already, or cannot be written."""
    try:
        with open(file, "x", encoding="utf-8") as stream:
            stream.write(text)
    except FileExistsError:
        raise UsageError(
            f"{file} is there already, and stays as it is: choose another name, or move it away."
        ) from None
    except OSError as error:
        with contextlib.suppress(OSError):
            file.unlink()  # what there was room for: it is this file's, since another would have been seen above
        raise UsageError(f"{file} cannot be written: {error.strerror or error}.") from None
