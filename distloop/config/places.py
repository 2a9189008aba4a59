"""Folders and files that settings name: `~` and `$NAME` in them, and the folder in which a relative one begins.

Recorded and compared on resume is the text as it was given, which means the same on another machine.
"""

import os
import re
import sys
from pathlib import Path, PosixPath

from distloop.config.references import FromEnvironment
from distloop.errors import UsageError

KEYS = ("config", "runs_dir", "init_from", "data.root")
VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([^}]*)\})")

# The process's, as its current folder is: the one in which its command was typed. A user's code may go elsewhere.
_start_folder: str | None = None
# The process's, too: places that check_place() has filled in. A user's code may set variables.
_filled_in: dict[str, str] = {}


class PlaceFromStart(PosixPath):
    """An absolute path that was given as a relative one: in messages it is shown as it was given."""

    def __format__(self, spec: str) -> str:
        return format(shown(self), spec)


def remember_start() -> None:
    """Relative places begin in the current folder; the first call counts. Raises UsageError if it was removed."""
    global _start_folder
    try:
        _start_folder = _start_folder or os.getcwd()
    except FileNotFoundError:
        raise UsageError("The folder in which this was started does not exist any more: cd to another one.") from None


def start_folder() -> str:
    """The folder in which relative places begin."""
    return _start_folder or os.getcwd()


def absolute(text: str) -> Path:
    """The absolute path of a place, with its home folder and variables filled in, as they were when it was checked."""
    text = _filled_in.get(text) or _fill_in(text)
    kind = Path if os.path.isabs(text) else PlaceFromStart
    return kind(os.path.join(start_folder(), text))


def _fill_in(text: str) -> str:
    """The text with its home folder and variables, or as it is where one is not set: check_place() has seen it."""
    with_variables = text if any(name not in os.environ for name in _names_in(text)) else os.path.expandvars(text)
    return os.path.expanduser(with_variables)


def _names_in(text: str) -> list[str]:
    return [name or in_braces for name, in_braces in VARIABLE.findall(text)]


def root_for_code(text: str) -> str:
    """data.root as a user's code gets it: an absolute path, but an address or a variable's value as it is."""
    return text if _is_as_it_is("data.root", text) else str(absolute(text))


def shown(path: str | Path) -> str:
    """A path for a message: as seen from the start folder, if it is below it."""
    text = str(path)
    return text.removeprefix(f"{start_folder()}{os.sep}") or text


def check_place(key: str, text: str) -> None:
    """Raise UsageError for the text of a place that names none."""
    if not text:
        raise UsageError(f"{key} is empty: give a path (. is the current folder). Was a variable of the shell not set?")
    if _is_as_it_is(key, text):
        return
    filled_in = _fill_in(text)
    is_there = os.path.lexists(os.path.join(start_folder(), os.path.expanduser(text)))
    for name in _names_in(text):
        if not re.fullmatch(r"\w+", name):
            raise UsageError(f"{key} = {text!r}: ${{NAME}} takes the name of a variable, and no default as in a shell.")
        if name not in os.environ and not is_there:  # else a $ in a file's name
            raise UsageError(f"{key} = {text!r}: there is no environment variable {name!r}. Set it, and export it.")
        if os.environ.get(name) == "":
            raise UsageError(f"{key} = {text!r}: the environment variable {name!r} is empty. Set it, and export it.")
    if "\r" in filled_in:
        raise UsageError(
            f"{key} = {text!r} has a carriage return in it, as a variable has that comes from a file with the line "
            "ends of Windows. dos2unix FILE changes them."
        )
    first = os.path.expandvars(text).split(os.sep)[0]
    if first.startswith("~") and filled_in.startswith(first):
        raise UsageError(
            f"{key} = {text!r}: there is no user {first[1:]!r}. Write ./{first} for a folder of that name."
        )
    if filled_in != text and os.path.lexists(os.path.join(start_folder(), text)):
        raise UsageError(
            f"{key} = {text!r}: ~ and $NAME are filled in, but there is something here that has just this name, too, "
            "which an earlier version may have made. Move it to where you mean, or rename it."
        )
    check_file_name(key, filled_in)
    _filled_in[text] = filled_in


def _is_as_it_is(key: str, text: str) -> bool:
    return key == "data.root" and ("://" in text or isinstance(text, FromEnvironment))


def check_file_name(key: str, text: str) -> None:
    """Raise UsageError if the locale of this process writes a file's name otherwise than others read it."""
    encoding = sys.getfilesystemencoding()
    if not text.isascii() and encoding != "utf-8":
        raise UsageError(
            f"{key} = {text!r}: file names here are in {encoding}, by the locale of this process: another one would "
            "not find it. Set PYTHONUTF8=1 in the environment, or use letters of ASCII only."
        )
