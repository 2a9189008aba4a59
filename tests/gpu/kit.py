"""Pack what a machine with a GPU lacks into one folder: wheels, the project, and data files.

    python -m tests.gpu.kit [--python 3.12] [--has list.txt] [--out gpu-kit]

list.txt is what that machine has, as `pip freeze` or `pip list` prints it; the default is torch alone, of this
environment's version. The folder works wherever it is copied: bash gpu-kit/tests/gpu/run.sh
"""

import argparse
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Iterable
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename
from packaging.version import InvalidVersion, Version

from tests.gpu.data import write_packed

ROOT = Path(__file__).resolve().parent.parent.parent
LEFT_OUT = ("wandb", "scikit-learn", "matplotlib")  # the parts do without; with scipy they would take over 60 MiB
PROJECT = ("distloop", "configs", "examples", "tests", "launch", "slurm", "pyproject.toml", "README.md", "LICENSE")
MOST = 60 * 2**20
GLIBC = 28  # 2.28, of 2018: what torch's own wheels ask for

Versions = dict[str, Version]


class KitError(Exception):
    """The kit cannot be made: a message, and the exit code."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


# ---- what is there, and what is wanted -------------------------------------------------------------------------------


def read_list(text: str) -> Versions:
    """The packages in the output of `pip freeze` or `pip list`; lines of another form, such as -e, are passed over."""
    found = {}
    for line in text.splitlines():
        words = re.fullmatch(r"\s*([A-Za-z0-9][\w.-]*)(?:\s*==\s*|\s+)([^\s;]+)(\s.*|;.*)?", line)
        try:
            if words:
                found[str(canonicalize_name(words[1]))] = Version(words[2])
        except InvalidVersion:
            continue
    return found


def requirements() -> list[Requirement]:
    """What the parts need: the project's own dependencies, but for those that they do without, and pytest."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [
        *project["dependencies"],
        *(one for one in project["optional-dependencies"]["dev"] if one[:7] == "pytest>"),
    ]
    return [one for one in map(Requirement, named) if one.name not in LEFT_OUT]


def usable(has: Versions, wanted: Iterable[Requirement]) -> Versions:
    """Those packages of the list that are not too old for distloop. Raises KitError without a torch that is."""
    bounds = {str(canonicalize_name(one.name)): one.specifier for one in wanted}
    kept = {name: version for name, version in has.items() if name not in bounds or fits(bounds[name], version)}
    if "torch" not in has:
        raise KitError("the list names no torch: give the output of `pip freeze` on the machine with the GPU", 2)
    if "torch" not in kept:
        raise KitError(f"the list has torch {has['torch']}; distloop needs torch{bounds['torch']} on that machine", 2)
    return kept


def fits(bound: object, version: Version) -> bool:
    return bound.contains(version, prereleases=True)  # type: ignore[attr-defined]


# ---- wheels ----------------------------------------------------------------------------------------------------------


def stand_in(name: str, version: Version, folder: Path) -> Path:
    """Write an empty wheel of a package that is there, without needs of its own, so that pip does not fetch it.

    A version without a local part, as an index has them, gets one, so that pip cannot take the index's file.
    """
    full = str(version) if version.local else f"{version}+present"
    stem = f"{name.replace('-', '_')}-{full}"
    path = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{stem}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {full}\n")
        wheel.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{stem}.dist-info/RECORD", "")
    return path


def download(python: str, has: Versions, wanted: list[Requirement], folder: Path) -> None:
    """Have pip resolve `wanted` for that Python beside what is there; the wheels that are not come into `folder`."""
    with tempfile.TemporaryDirectory(prefix="distloop-gpu-kit-") as temporary:
        links = Path(temporary) / "links"
        links.mkdir()
        present = {stand_in(name, version, links).name for name, version in has.items()}
        constraints = Path(temporary) / "constraints.txt"
        pins = [f"{name}=={parse_wheel_filename(path.name)[1]}" for path in links.iterdir() for name in [named(path)]]
        constraints.write_text("\n".join(pins))
        words = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(folder), "--only-binary", ":all:"]
        words += ["--find-links", str(links), "--constraint", str(constraints), "--python-version", python]
        words += ["--implementation", "cp"]
        for tag in [*(f"manylinux_2_{minor}" for minor in range(GLIBC, 4, -1)), "manylinux2014", "manylinux1", "linux"]:
            words += ["--platform", f"{tag}_x86_64"]
        while True:  # more than once only if that Python needs what this one does not
            done = subprocess.run([*words, *map(str, wanted)], capture_output=True, text=True, check=False)
            if done.returncode != 0:
                said = "\n".join(line for line in done.stderr.splitlines() if not line.startswith("WARNING"))
                raise KitError(
                    f"pip finds no set of wheels for Python {python} beside what the list has:\n{said}\n"
                    "A package that is too old there: take its line out of the list, and the kit packs a newer one."
                )
            for name in present:
                (folder / name).unlink(missing_ok=True)
            lacking = missing(python, has, folder)
            if not lacking:
                return
            wanted = [*wanted, *lacking]


def named(wheel: Path) -> str:
    return str(parse_wheel_filename(wheel.name)[0])


def missing(python: str, has: Versions, folder: Path) -> list[Requirement]:
    """What the wheels need on that Python, and neither they nor the list have: pip asks for the needs on its own."""
    there = {*has, *(named(path) for path in folder.glob("*.whl"))}
    target = {**default_environment(), "python_version": python, "python_full_version": f"{python}.0", "extra": ""}
    target |= {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64"}
    lacking = []
    for path in folder.glob("*.whl"):
        with zipfile.ZipFile(path) as wheel:
            [metadata] = [name for name in wheel.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name)]
            lines = wheel.read(metadata).decode().split("\n\n")[0].splitlines()
        for line in lines:
            if line.startswith("Requires-Dist: "):
                one = Requirement(line.removeprefix("Requires-Dist: "))
                needed = one.marker is None or one.marker.evaluate(target)  # type: ignore[arg-type]
                if needed and canonicalize_name(one.name) not in there:
                    one.marker = None
                    lacking.append(one)
    return lacking


# ---- the folder ------------------------------------------------------------------------------------------------------


def copy_project(folder: Path) -> None:
    """Copy the files that git knows, as they are now."""
    words = ["git", "ls-files", "-z", "--", *PROJECT]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise KitError(f"the kit is made in a git checkout, whose files it packs: {done.stderr.strip()}")
    for name in filter(None, done.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def check_size(folder: Path) -> str:
    """What the folder holds, in words. Raises KitError if it is larger than MOST."""
    sizes = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    total = sum(sizes.values())
    if total > MOST:
        largest = sorted(sizes, key=lambda path: -sizes[path])[:8]
        lines = [f"  {sizes[path] / 2**20:6.1f} MiB  {path.relative_to(folder)}" for path in largest]
        limit = f"{folder} has {total / 2**20:.1f} MiB, more than {MOST >> 20}; its largest files:"
        hint = "Install the largest of them on that machine, or name them in the list if they are there."
        raise KitError("\n".join([limit, *lines, hint]))
    wheels = sorted(path.name.split("-")[0] for path in folder.glob("wheels/*.whl"))
    return f"{folder}: {total / 2**20:.1f} MiB, with {len(wheels)} wheels: {', '.join(wheels)}"


def make(python: str, has: Versions, folder: Path) -> str:
    """Make the folder anew; returns what it holds, in words."""
    wanted = requirements()
    has = usable(has, wanted)
    if folder.exists():
        if any(folder.iterdir()) and not (folder / "tests" / "gpu" / "run.sh").exists():
            raise KitError(f"{folder} has files of another kind in it: it is not overwritten", 2)
        shutil.rmtree(folder)
    for name in ("wheels", "data"):
        (folder / name).mkdir(parents=True)
    download(python, has, wanted, folder / "wheels")
    copy_project(folder)
    write_packed(folder / "data")
    return check_size(folder)


def main() -> int:
    this = "{}.{}".format(*sys.version_info)
    parser = argparse.ArgumentParser(description="Pack what a machine with a GPU lacks into one folder.")
    parser.add_argument("--python", default=this, help="that machine's Python; default: %(default)s, this one")
    parser.add_argument(
        "--has", type=Path, help="its `pip freeze`; default: torch alone, of this environment's version"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "gpu-kit")
    arguments = parser.parse_args()
    try:
        if not re.fullmatch(r"3\.(1[1-9]|[2-9]\d)", arguments.python):
            raise KitError(f"Python {arguments.python}: distloop needs 3.11 or newer, written as 3.12", 2)
        text = arguments.has.read_text() if arguments.has else f"torch=={importlib.metadata.version('torch')}"
        said = make(arguments.python, read_list(text), arguments.out)
    except OSError as error:
        said, code = str(error), 2
    except KitError as error:
        said, code = str(error), error.code
    else:
        print(f"{said}\nCopy it to that machine, and type there: bash {arguments.out.name}/tests/gpu/run.sh")
        return 0
    print(f"gpu-kit: {said}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
