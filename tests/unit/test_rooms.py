"""How the package is built: which rooms may import which, what an import may do, how long things may be.

Each check takes the folder of a package and returns a list of faults. Each is shown to find a planted fault, and holds
for distloop itself.
"""

from __future__ import annotations

import ast
import functools
import json
import os
import subprocess
import sys
import textwrap
import tokenize
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

PACKAGE = Path(__file__).resolve().parent.parent.parent / "distloop"

# A module imports from its own room and from rooms before it.
ROOMS = ("errors", "config", "ranks", "data", "run", "training", "tracking", "train", "commands")
# What users run and import. They may import anything; nothing in the package imports them.
FACES = ("tasks", "doctor", "evaluate", "status")

Check = Callable[[Path], list[str]]


# ---- reading a package's imports -------------------------------------------------------------------------------------


class Import(NamedTuple):
    importer: str
    """Dotted name of the module in which the import stands."""
    line: int
    target: str
    """Dotted name of the module that is imported."""
    name: str | None
    """What is taken from `target`; None: the module itself."""
    runs: bool
    """False under `if TYPE_CHECKING:`."""
    in_function: bool
    alias: str
    """What it is called in the importer."""

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.target}" + (f".{self.name}" if self.name else "")


@functools.cache
def sources(folder: Path) -> dict[str, Path]:
    """The modules of a package by their dotted names; a room's __init__.py has the name of the room."""
    found = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@functools.cache
def imports(folder: Path) -> tuple[Import, ...]:
    """All imports of a package, those of other packages too: at the top, in functions, for type checkers."""
    modules = sources(folder)
    return tuple(
        one for module, path in modules.items() for one in _imports_in(parsed(path), module, path.stem, set(modules))
    )


def _imports_in(
    node: ast.AST, module: str, stem: str, modules: set[str], runs: bool = True, in_function: bool = False
) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(module, child.lineno, alias.name, None, runs, in_function, alias.asname or alias.name)
        elif isinstance(child, ast.ImportFrom):
            base = child.module or ""
            if child.level:  # relative: to the module's folder, and one further up for each dot more
                up = child.level - (stem == "__init__")
                base = ".".join(filter(None, [*module.split(".")[: -up or None], base]))
            for alias in child.names:
                inner = f"{base}.{alias.name}"
                target, name = (inner, None) if inner in modules else (base, alias.name)
                yield Import(module, child.lineno, target, name, runs, in_function, alias.asname or alias.name)
        elif (
            isinstance(child, ast.Call)
            and _last_name(child.func) in ("import_module", "__import__")
            and child.args
            and isinstance(child.args[0], ast.Constant)
        ):
            yield Import(module, child.lineno, str(child.args[0].value), None, runs, in_function, "")
        if isinstance(child, ast.If) and _last_name(child.test) == "TYPE_CHECKING":
            for part, part_runs in ((child.body, False), (child.orelse, runs)):
                block = ast.Module(part, [])
                yield from _imports_in(block, module, stem, modules, part_runs, in_function)
        else:
            inside = in_function or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _imports_in(child, module, stem, modules, runs, inside)


def _last_name(node: ast.AST) -> str | None:
    """`x` and `a.x` -> "x"."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else None


def within(folder: Path) -> list[Import]:
    """The imports of the package from itself."""
    return [one for one in imports(folder) if one.target.split(".")[0] == folder.name]


# ---- the checks of imports -------------------------------------------------------------------------------------------


def backward_imports(folder: Path) -> list[str]:
    """Imports from a later room. Those under TYPE_CHECKING count: who names a room's types depends on that room."""

    def floor(module: str) -> int:
        """-1: the package's own __init__.py, which all may import and which imports none of them."""
        room = module.split(".")[1] if "." in module else None
        return -1 if room is None else ROOMS.index(room) if room in ROOMS else len(ROOMS)

    faults = [
        f"{module}: in none of the rooms {', '.join(ROOMS)}"
        for module in sources(folder)
        if floor(module) == len(ROOMS) and module.split(".")[1] not in FACES
    ]
    for one in within(folder):
        if floor(one.target) == len(ROOMS):
            faults.append(f"{one}, which is for users")
        elif floor(one.target) > floor(one.importer):
            faults.append(f"{one}, which comes later")
    return faults


def import_circles(folder: Path) -> list[str]:
    """Modules that import each other, directly or through others, also from inside functions.

    Imports under TYPE_CHECKING do not count: they never run, so that two modules of one room may name each other's
    types. (Between rooms the order of rooms forbids it.) A name that a room hands on is an import of the module that
    the room has it from.
    """
    owners = {(one.importer, one.name): one.target for one in within(folder)}
    modules = sources(folder)
    targets: dict[str, set[str]] = {module: set() for module in modules}
    for one in within(folder):
        is_room = one.target in modules and modules[one.target].stem == "__init__"
        target = owners.get((one.target, one.name), one.target) if is_room else one.target
        if one.runs and target in modules and target != one.importer:
            targets[one.importer].add(target)
    faults: dict[frozenset[str], str] = {}
    for module in modules:
        circle = _shortest_circle(module, targets)
        faults.setdefault(frozenset(circle), " -> ".join(circle))
    return [text for text in faults.values() if text]


def _shortest_circle(start: str, targets: dict[str, set[str]]) -> list[str]:
    paths = deque([[start]])
    seen = set()
    while paths:
        path = paths.popleft()
        for target in sorted(targets[path[-1]]):
            if target == start:
                return [*path, start]
            if target not in seen:
                seen.add(target)
                paths.append([*path, target])
    return []


def reaches_into_train(folder: Path) -> list[str]:
    """Commands take nothing from train.py but the function train(), and only the command line takes that."""
    train, commands = f"{folder.name}.train", f"{folder.name}.commands"
    return [
        str(one)
        for one in within(folder)
        if one.target == train
        and one.importer.startswith(f"{commands}.")
        and (one.importer, one.name) != (f"{commands}.cli", "train")
    ]


# ---- what an import does ---------------------------------------------------------------------------------------------

EFFECTS = ("atexit hook", "signal handler", "warnings", "environment", "thread")
IMPORT_ALL = """
import atexit, contextlib, importlib, json, os, signal, sys, threading, warnings

def snapshot():
    wakeup = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(wakeup)
    handlers = [signal.getsignal(number) for number in sorted(signal.valid_signals())]
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    return {
        "atexit hook": atexit._ncallbacks(),
        "signal handler": (wakeup, handlers, blocked),
        "warnings": (list(warnings.filters), warnings.showwarning, warnings.formatwarning),
        "environment": dict(os.environ),
        "thread": set(threading.enumerate()),
    }

others, modules = json.loads(sys.argv[1])
for name in others:
    with contextlib.suppress(ImportError):  # a.b where b is no module but a name in a
        importlib.import_module(name)
faults = []
for name in modules:
    before = snapshot()
    importlib.import_module(name)
    faults += [(name, what) for what, state in snapshot().items() if state != before[what]]
    os.environ.clear()  # so that the next module that sets the same variables is named, too
    os.environ.update(before["environment"])
print(json.dumps(faults), flush=True)
os._exit(0)
"""


@functools.cache
def import_effects(folder: Path) -> list[str]:
    """What the import of a module changes in its process, all modules being imported in one fresh process.

    What other packages do when they are imported is theirs: they are imported before. Slurm's variables are set, as
    in a task of srun.
    """
    others = {
        name
        for one in imports(folder)
        if one.runs and not one.in_function and one.target.split(".")[0] != folder.name
        for name in (one.target, f"{one.target}.{one.name}")
    }
    environment = {name: value for name, value in os.environ.items() if not name.endswith(("RANK", "WORLD_SIZE"))}
    environment.pop("OMP_NUM_THREADS", None)
    environment |= {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "localhost"}
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, json.dumps([sorted(others), _each_after_its_imports(folder)])],
        cwd=folder.parent,
        env={**environment, "PYTHONPATH": str(folder.parent)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return [f"{module}: {what}" for module, what in json.loads(done.stdout.splitlines()[-1])]


def _each_after_its_imports(folder: Path) -> list[str]:
    """All modules, so ordered that what an import does is blamed on the module that does it."""
    ordered: dict[str, None] = {}
    seen = set()

    def visit(module: str) -> None:
        if module in seen:
            return
        seen.add(module)
        for one in within(folder):
            if one.importer == module and one.runs and one.target in sources(folder):
                visit(one.target)
        ordered[module] = None

    for module in sources(folder):
        if not module.endswith(".__main__"):  # those are run, not imported
            visit(module)
    return list(ordered)


# ---- state of a module -----------------------------------------------------------------------------------------------

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
# Methods that change what they are called on.
CHANGING = {"append", "appendleft", "extend", "insert", "add", "update", "setdefault", "sort", "reverse"}
CHANGING |= {"pop", "popleft", "popitem", "remove", "discard", "clear"}


def undefended_state(folder: Path) -> list[str]:
    """Module-level names that functions change, without a comment that says why this state is global.

    The rule: a function declares X `global`; or assigns to, or deletes, an item or attribute of it (X[k] = v,
    X.a += 1, del X[k]); or calls one of the methods CHANGING on it or on a part of it (X.append(v), X[k].add(v)). X is
    a name of the function's own module or one imported from the package; module.X counts as well. The comment stands
    on the line where X gets its first value, on lines of its own directly above, or beside `global X`.
    functools.cache is no state in this sense, as it changes no result.
    """
    modules = sources(folder)
    faults = []
    for module, path in modules.items():
        imported = {one.alias: (one.target, one.name) for one in within(folder) if one.importer == module}
        comments = _comments(path)
        for change in _changes(parsed(path)):
            owner, name = imported.get(change.names[0], (module, change.names[0]))
            if name is None:  # names[0] is a module
                name = change.names[1] if len(change.names) > 1 else ""
            place = _bindings(parsed(modules[owner])).get(name) if owner in modules else None
            if place is None and not change.is_global:  # a function's own variable, or another package's
                continue
            defended = change.is_global and change.line in comments
            if place is not None:
                defended |= place in _comments(modules[owner]) or place - 1 in _comments(modules[owner], alone=True)
            if not defended:
                faults.append(f"{module}:{change.line} changes {owner}.{name}, which no comment defends")
    return faults


def _bindings(tree: ast.Module) -> dict[str, int]:
    """The names that a module gives values itself, outside of functions and classes; the line of the first value."""
    found: dict[str, int] = {}
    nodes = deque(ast.iter_child_nodes(tree))
    while nodes:
        node = nodes.popleft()
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            found.setdefault(getattr(node, "name", ""), node.lineno)
        else:
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.setdefault(node.id, node.lineno)
            nodes += ast.iter_child_nodes(node)
    return found


class Change(NamedTuple):
    line: int
    names: list[str]
    """X[k].a.append(v) -> X, a."""
    is_global: bool = False


def _changes(node: ast.AST, own: frozenset[str] = frozenset(), in_function: bool = False) -> Iterator[Change]:
    """What functions change beyond their `own` variables."""
    if isinstance(node, FUNCTIONS):
        in_function, own = True, own | _variables(node)
    changed: list[ast.AST] = []
    if isinstance(node, ast.Global):
        yield from (Change(node.lineno, [name], is_global=True) for name in node.names)
    elif isinstance(node, ast.Subscript | ast.Attribute) and not isinstance(node.ctx, ast.Load):
        changed = [node.value] if isinstance(node, ast.Subscript) else [node]
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CHANGING:
        changed = [node.func.value]
    for value in changed:
        names = _dotted(value)
        if in_function and names and names[0] not in own:
            yield Change(value.lineno, names)  # type: ignore[attr-defined]
    for child in ast.iter_child_nodes(node):
        yield from _changes(child, own, in_function)


def _variables(function: ast.AST) -> frozenset[str]:
    """The parameters and variables of a function and of those inside it."""
    nodes = list(ast.walk(function))
    stored = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    stored |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    return frozenset(stored.difference(*(node.names for node in nodes if isinstance(node, ast.Global))))


def _dotted(node: ast.AST) -> list[str]:
    """`X[k].a` -> ["X", "a"]; [] for what does not begin with a name."""
    if isinstance(node, ast.Subscript):
        return _dotted(node.value)
    if isinstance(node, ast.Attribute):
        before = _dotted(node.value)
        return [*before, node.attr] if before else []
    return [node.id] if isinstance(node, ast.Name) else []


@functools.cache
def _comments(path: Path, alone: bool = False) -> frozenset[int]:
    """The lines with a comment that is none for a tool; `alone`: those with nothing else."""
    with open(path, "rb") as file:
        return frozenset(
            token.start[0]
            for token in tokenize.tokenize(file.readline)
            if token.type == tokenize.COMMENT
            and not token.string.startswith(("# noqa", "# type:"))
            and (not alone or token.line.lstrip().startswith("#"))
        )


# ---- how long things are ---------------------------------------------------------------------------------------------

TRAIN_FILE, TRAIN_FUNCTION, LOOP, FILE, FUNCTION, CLASS = 150, 110, 50, 300, 60, 150  # lines, docstrings included


def long_train(folder: Path) -> list[str]:
    """train.py, its function train() and the `while` statement in it, which is the loop."""
    path = folder / "train.py"
    function = next(node for node in parsed(path).body if isinstance(node, ast.FunctionDef) and node.name == "train")
    loops = [node for node in ast.walk(function) if isinstance(node, ast.While)]
    assert loops, "train() has no while statement"
    return [
        *_above(TRAIN_FILE, [("train.py", _lines(path))]),
        *_above(TRAIN_FUNCTION, [("train()", _length(function))]),
        *_above(LOOP, [("the loop", _length(loop)) for loop in loops]),
    ]


def long_files(folder: Path) -> list[str]:
    return _above(FILE, [(str(path.relative_to(folder)), _lines(path)) for path in sources(folder).values()])


def long_functions(folder: Path) -> list[str]:
    return _above(FUNCTION, [one for one in _definitions(folder, FUNCTIONS) if one[0] != "train.py train"])


def long_classes(folder: Path) -> list[str]:
    return _above(CLASS, _definitions(folder, (ast.ClassDef,)))


def _definitions(folder: Path, kinds: tuple[type, ...]) -> list[tuple[str, int]]:
    return [
        (f"{path.relative_to(folder)} {getattr(node, 'name', 'lambda')}", _length(node))
        for path in sources(folder).values()
        for node in ast.walk(parsed(path))
        if isinstance(node, kinds)
    ]


def _lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def _length(node: ast.AST) -> int:
    return node.end_lineno - node.lineno + 1  # type: ignore[attr-defined]


def _above(limit: int, lengths: list[tuple[str, int]]) -> list[str]:
    return [f"{name}: {length} lines, at most {limit}" for name, length in lengths if length > limit]


# ---- distloop holds to them ------------------------------------------------------------------------------------------


def _with(words: tuple[str, ...], faults: list[str]) -> list[str]:
    return [fault for fault in faults if all(word in fault for word in words)]


def test_imports_run_one_way() -> None:
    assert backward_imports(PACKAGE) == []


def test_no_modules_import_each_other() -> None:
    assert import_circles(PACKAGE) == []


def test_state_of_a_module_is_defended_by_a_comment() -> None:
    assert undefended_state(PACKAGE) == []


def test_commands_do_not_reach_into_train() -> None:
    assert reaches_into_train(PACKAGE) == []


@pytest.mark.parametrize("effect", ["atexit hook", "environment", "signal handler", "warnings", "thread"])
def test_an_import_changes_nothing_in_its_process(effect: str) -> None:
    assert _with((effect,), import_effects(PACKAGE)) == []


def test_the_loop_fits_on_a_screen() -> None:
    assert long_train(PACKAGE) == []


def test_files_are_short() -> None:
    assert long_files(PACKAGE) == []


def test_functions_are_short() -> None:
    assert long_functions(PACKAGE) == []


def test_classes_are_short() -> None:
    assert long_classes(PACKAGE) == []


# ---- a planted fault of each kind is found ---------------------------------------------------------------------------

HAND_ON = """
from typing import TYPE_CHECKING
from sound import hand_on
if TYPE_CHECKING:
    from {module} import {name} as {name}
else:
    __getattr__ = hand_on(__name__, __file__)
"""
# What is allowed and looks like a fault; the planted files come on top.
SOUND = {
    "__init__.py": "def hand_on(*_):\n    return lambda name: object",
    "errors.py": "class Mistake(Exception): ...",
    "config/__init__.py": HAND_ON.format(module="sound.config.settings", name="Config"),
    "config/settings.py": "from ..errors import Mistake\nclass Config: ...",
    "ranks/__init__.py": "",
    "ranks/watch.py": """
        from typing import TYPE_CHECKING
        from sound.config import Config
        if TYPE_CHECKING:
            from sound.ranks.wish import Wish  # which imports this module, when it runs
        SIGNALS = {"SIGTERM": 15}
        SIGNALS["SIGINT"] = 2
        seen = []  # the process's, as signals are
        # So is this one.
        last = {}
        def listen(last_of=seen):
            names = []
            names.append(1)
            seen.append(1)
            last["x"] = names
        """,
    "ranks/wish.py": "import sound.ranks.watch\nclass Wish: ...",
    "train.py": """
        from sound.ranks import watch
        def train():
            while True:
                watch.listen()
        def main(): ...
        """,
    "commands/__init__.py": "",
    "commands/cli.py": "def main():\n    from sound.train import train",
    "status.py": "from sound.commands.cli import main\nfrom sound.train import main as other",
}


def lines(count: int, line: str = "x = 1", indent: int = 0) -> str:
    return f"{' ' * indent}{line}\n" * count


@pytest.fixture
def package(tmp_path: Path) -> Callable[[dict[str, str]], Path]:
    """Writes the package `sound` with these files in it."""

    def write(planted: dict[str, str]) -> Path:
        for name, text in {**SOUND, **planted}.items():
            path = tmp_path / "sound" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(textwrap.dedent(text))
        return tmp_path / "sound"

    return write


CHECKS = [
    backward_imports,
    import_circles,
    reaches_into_train,
    import_effects,
    undefended_state,
    long_train,
    long_files,
    long_functions,
    long_classes,
]


@pytest.mark.parametrize("check", CHECKS)
def test_a_sound_package_has_no_fault(check: Check, package: Callable[[dict[str, str]], Path]) -> None:
    assert check(package({})) == []


WATCH = "from sound.ranks import watch"
# The check that finds it, then the planted files: name, text, …; the fault names the first of them.
PLANTED: dict[str, tuple[Any, ...]] = {
    "an import from a later room": (backward_imports, "config/late.py", WATCH),
    "one with import": (backward_imports, "config/late.py", "import sound.ranks.watch as w"),
    "a relative one": (backward_imports, "config/late.py", "from ..ranks.watch import listen"),
    "a relative one of a room": (backward_imports, "config/__init__.py", "from ..ranks.watch import listen"),
    "one in a function": (backward_imports, "config/late.py", f"def f():\n    {WATCH}"),
    "one for type checkers": (
        backward_imports,
        "config/late.py",
        f"from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    {WATCH}",
    ),
    "one by its name in a string": (
        backward_imports,
        "config/late.py",
        "import importlib\nf = lambda: importlib.import_module('sound.ranks.watch')",
    ),
    "a name that a room hands on from a later one": (
        backward_imports,
        "config/__init__.py",
        HAND_ON.format(module="sound.ranks.watch", name="listen"),
    ),
    "the package imports from itself": (backward_imports, "__init__.py", "from .errors import Mistake"),
    "a face is imported": (backward_imports, "commands/own.py", "import sound.status"),
    "a module outside of the rooms": (backward_imports, "helpers.py", ""),
    "a circle of two": (import_circles, "ranks/watch.py", "def f():\n    from sound.ranks.wish import Wish"),
    "a circle of three": (
        import_circles,
        "ranks/watch.py",
        "import sound.ranks.third",
        "ranks/third.py",
        "from . import wish",
    ),
    "a circle through a room": (
        import_circles,
        "config/settings.py",
        "from . import load\nclass Config: ...",
        "config/load.py",
        "from sound.config import Config",
    ),
    "another command takes train()": (reaches_into_train, "commands/own.py", "from sound.train import train"),
    "the command line takes more": (reaches_into_train, "commands/cli.py", "from sound.train import main"),
    "the command line takes all": (reaches_into_train, "commands/cli.py", "def f():\n    from sound import train"),
    "an atexit hook": (import_effects, "ranks/own.py", "import atexit\natexit.register(print)"),
    "a signal handler": (
        import_effects,
        "ranks/own.py",
        "import signal\nsignal.signal(signal.SIGUSR1, signal.SIG_IGN)",
    ),
    "a warnings filter": (import_effects, "ranks/own.py", "import warnings\nwarnings.simplefilter('ignore')"),
    "how warnings are shown": (import_effects, "ranks/own.py", "import warnings\nwarnings.showwarning = print"),
    "the environment": (import_effects, "ranks/own.py", "import os\nos.environ['RANK'] = '0'"),
    "a thread": (
        import_effects,
        "ranks/own.py",
        "import threading, time\nthreading.Thread(target=time.sleep, args=(60,), daemon=True).start()",
    ),
    "a global": (undefended_state, "ranks/own.py", "x = None\ndef f():\n    global x\n    x = 1"),
    "a list": (undefended_state, "ranks/own.py", "x = []  # noqa\ndef f():\n    x.append(1)"),
    "a list in a mapping": (undefended_state, "ranks/own.py", "x = {1: []}\ndef f():\n    x[1].append(1)"),
    "a mapping": (undefended_state, "ranks/own.py", "if 1:\n    x = {}\nf = lambda: x.update(a=1)"),
    "an item": (undefended_state, "ranks/own.py", "x = {}\nclass C:\n    def f(self):\n        x['a'] = 1"),
    "an attribute": (undefended_state, "ranks/own.py", "x = print()\ndef f():\n    x.a += 1"),
    "a class": (undefended_state, "ranks/own.py", "class C: ...\ndef f():\n    def g():\n        del C.a"),
    "state of another module": (
        undefended_state,
        "ranks/own.py",
        "from sound.ranks import wish\ndef f():\n    wish.Wish.a = 1",
    ),
    "a name of another module": (
        undefended_state,
        "ranks/own.py",
        "def f():\n    from sound.ranks.wish import Wish\n    Wish.a = 1",
    ),
    "a long train.py": (long_train, "train.py", "def train():\n    while 1: ...\n" + lines(149)),
    "a long train()": (long_train, "train.py", "def train():\n    while 1: ...\n" + lines(109, indent=4)),
    "a long loop": (long_train, "train.py", "def train():\n    while 1:\n" + lines(50, indent=8)),
    "a long file": (long_files, "ranks/own.py", lines(301)),
    "a long function": (long_functions, "ranks/own.py", "class C:\n    def f(self):\n" + lines(60, indent=8)),
    "another train()": (long_functions, "ranks/own.py", "def train():\n" + lines(60, indent=4)),
    "a long class": (long_classes, "ranks/own.py", "class C:\n" + lines(150, indent=4)),
}


@pytest.mark.parametrize(("check", "files"), [(check, files) for check, *files in PLANTED.values()], ids=list(PLANTED))
def test_a_planted_fault_is_found(check: Check, files: list[str], package: Callable[[dict[str, str]], Path]) -> None:
    planted = dict(zip(files[::2], files[1::2], strict=True))
    faults = check(package(planted))
    assert len(faults) == 1, faults
    place = files[0].removesuffix(".py").replace("/__init__", "").replace("/", ".")
    assert check is long_train or place.removeprefix("__init__") in faults[0].replace("/", ".").replace(".py", "")
