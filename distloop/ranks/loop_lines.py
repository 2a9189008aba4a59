"""The line of the loop at which a rank is, and which lines show that one rank is further on than another."""

import ast
import linecache
import os
import sys
import threading
import types
from typing import NamedTuple, TypeGuard

from distloop.config.secrets import clean_text

LOOPS = (ast.For, ast.While, ast.AsyncFor)


class LoopLine(NamedTuple):
    """A line of the function that holds the loop."""

    text: str = ""  # for people, without secrets: "train.py:101 outputs = task.forward(task_model, micro.batch)"
    number: int = 0  # the first line of its statement, for comparing ranks; 0: the line must not be compared


class LoopLines:
    """The lines of one function, such as train(), while the main thread runs it."""

    def __init__(self, code: types.CodeType, compares: bool = True) -> None:
        self.code = code
        self._comparable: dict[int, int] | None = None if compares else {}  # read from the source when first needed
        self._lines: dict[int, LoopLine] = {0: LoopLine()}
        self._reading = threading.Lock()  # ast.parse in two threads at once can raise SystemError in Python 3.11

    def of_main_thread(self) -> LoopLine:
        """The main thread's line of the function; an empty one outside of it. Any thread may ask."""
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        while frame is not None and frame.f_code is not self.code:
            frame = frame.f_back
        return self._line(frame.f_lineno or 0 if frame is not None else 0)

    def of_error(self, error: BaseException) -> LoopLine:
        """The line of the function that `error` passed through; an empty one if it did not."""
        trace = error.__traceback__
        while trace is not None and trace.tb_frame.f_code is not self.code:
            trace = trace.tb_next
        return self._line(trace.tb_lineno or 0 if trace is not None else 0)

    def _line(self, number: int) -> LoopLine:
        with self._reading:
            if self._comparable is None:
                source = "".join(linecache.getlines(self.code.co_filename))
                self._comparable = comparable_lines(source, self.code.co_firstlineno)
        if number not in self._lines:  # a thread asks four times a second, and clean_text takes its time
            source_line = linecache.getline(self.code.co_filename, number).partition("  # ")[0].strip()
            text = f"{os.path.basename(self.code.co_filename)}:{number} {clean_text(source_line)}".strip()
            self._lines[number] = LoopLine(text, self._comparable.get(number, 0))
        return self._lines[number]


def comparable_lines(source: str, first_line: int) -> dict[int, int]:
    """Lines of a function of which a later one is reached later, each with the first line of its statement. Empty where
    the source cannot be read.

    `first_line`: code.co_firstlineno. Ranks with the same marks in the same step may be compared by these lines.
    Others may be reached again after a later line:
    - those of an inner loop: any but the outermost, and but `for … in ….of_step(…)`, where each turn makes a mark;
    - the head of a `with`, to which Python returns to leave the block, and that of a loop;
    - the outermost loop up to its first of_step, since the step before is still counted there.
    """
    statements = _statements(source, first_line)
    lines = {line: one.lineno for one in statements for line in _lines_of(one)}  # inner statements come later
    loops = [one for one in statements if isinstance(one, LOOPS)]
    for one in statements:
        excluded = range(0)
        if isinstance(one, (ast.With, ast.AsyncWith)) or _is_of_step(one):
            excluded = range(one.lineno, max(one.body[0].lineno, one.lineno + 1))
        elif isinstance(one, LOOPS):
            of_step = [inner.lineno for inner in loops if inner.lineno in _lines_of(one) and _is_of_step(inner)]
            is_inner = any(one.lineno in _lines_of(other) for other in loops if other is not one)
            excluded = _lines_of(one) if is_inner or not of_step else range(one.lineno, min(of_step) + 1)
        for line in excluded:
            lines.pop(line, None)
    return lines


def _statements(source: str, first_line: int) -> list[ast.stmt | ast.excepthandler]:
    """The statements of the function that begins at this line, outer ones before inner ones."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and first_line == min(
            [node.lineno, *(decorator.lineno for decorator in node.decorator_list)]
        ):
            return [one for one in ast.walk(node) if isinstance(one, (ast.stmt, ast.excepthandler))][1:]
    return []


def _lines_of(statement: ast.stmt | ast.excepthandler) -> range:
    return range(statement.lineno, (statement.end_lineno or statement.lineno) + 1)


def _is_of_step(statement: ast.AST) -> TypeGuard[ast.For]:
    call = statement.iter if isinstance(statement, ast.For) else None
    return isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "of_step"
