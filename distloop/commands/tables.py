"""Tables for people. On a terminal rich fits them to the width; in a pipe lines are whole and rich is not imported.

What run directories and other machines say is shown as text: markup as it stands, control characters as escapes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

GAP = 2  # spaces between columns
NARROW = 60  # characters: on a narrower terminal the texts of entries stand below their heads

Parts = Sequence[tuple[str, str]]  # the parts of a text, each with its style in rich's words


class Column(NamedTuple):
    """A column of a table."""

    title: str
    cells: list[str]
    styles: Sequence[str] = ()
    """The style of each cell in rich's words; empty: none has one."""
    align_right: bool = False
    drop_order: int = 0
    """A terminal without room drops columns in the order of this number; 0: the column is never dropped."""
    least_width: int = 30
    """The column is dropped rather than made narrower than this, where it is wider by itself."""
    overflow: str = "cut"
    """What happens to cells that are too wide. cut: they end with an ellipsis at the least width. fold: they take
    several lines. fill: the column takes the room that others leave, and its cells end with an ellipsis."""


class Entry(NamedTuple):
    """A head with a text beside it."""

    head: Parts
    text: str
    """One or more lines."""
    commands: str = ""
    """Lines below the text. They are not folded, so that one can copy a command from a terminal."""


def printable(text: str) -> str:
    """The text with escapes, such as \\n and \\x1b, for characters that end a line, move the cursor or are not seen."""
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


def table(columns: Sequence[Column]) -> tuple[str, list[Column]]:
    """(The table as text for sys.stdout, the columns for which the terminal has no room)."""
    columns = [each._replace(title=printable(each.title), cells=list(map(printable, each.cells))) for each in columns]
    if not sys.stdout.isatty():
        padded = [_plain_column([column.title, *column.cells], column.align_right) for column in columns]
        return "\n".join((" " * GAP).join(cells).rstrip() for cells in zip(*padded, strict=True)), []
    from rich.cells import cell_len
    from rich.table import Table
    from rich.text import Text

    def least_width(column: Column) -> int:
        return min(column.least_width, max(map(cell_len, [column.title, *column.cells])))

    console = _console()
    shown = fitting(columns, console.width, least_width)
    fills = any(column.overflow == "fill" for column in shown)
    rich_table = Table(box=None, padding=(0, GAP, 0, 0), pad_edge=False, header_style="bold", expand=fills)
    for column in shown:
        rich_table.add_column(
            Text(column.title),
            justify="right" if column.align_right else "left",
            overflow="fold" if column.overflow == "fold" else "ellipsis",
            no_wrap=column.overflow != "fold",
            width=least_width(column) if column.overflow == "fill" else None,
            max_width=least_width(column) if column.overflow == "cut" else None,
            ratio=1 if column.overflow == "fill" else None,
        )
    for index in range(len(columns[0].cells)):
        rich_table.add_row(*(Text(each.cells[index], each.styles[index] if each.styles else "") for each in shown))
    return _drawn(console, rich_table), [column for column in columns if column not in shown]


def fitting(columns: Sequence[Column], width: int, least_width: Callable[[Column], int]) -> list[Column]:
    """The columns for which a terminal of this width has room: rich drops none by itself."""
    shown = list(columns)
    for column in sorted(columns, key=lambda column: column.drop_order):
        if column.drop_order and sum(map(least_width, shown)) + GAP * (len(shown) - 1) > width:
            shown.remove(column)
    return shown


def entries(rows: Iterable[Entry]) -> str:
    """Heads, each with its text beside it, as text for sys.stdout. Entries without a text are left out."""
    clean = [
        Entry([(printable(part), style) for part, style in row.head], _printable_lines(row.text), row.commands)
        for row in rows
        if row.text
    ]
    if not clean:
        return ""
    if not sys.stdout.isatty():
        heads = _plain_column(["".join(part for part, _ in row.head) for row in clean])
        return "\n".join(
            f"  {'' if index else head:<{len(head)}}  {line}".rstrip()
            for head, row in zip(heads, clean, strict=True)
            for index, line in enumerate([*row.text.splitlines(), *_printable_lines(row.commands).splitlines()])
        )
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    console = _console()
    titles = [Text.assemble(*row.head) for row in clean]
    head_width = min(console.width // 3, max(head.cell_len for head in titles))
    indent = 6 if console.width < NARROW else 2 + head_width + GAP
    parts: list[RenderableType] = []
    for head, row in zip(titles, clean, strict=True):
        if console.width < NARROW:
            parts += [Padding(head, (0, 0, 0, 2)), Padding(Text(row.text), (0, 0, 0, indent))]
        else:
            grid = Table.grid(padding=(0, GAP, 0, 0))
            grid.add_column(width=head_width, overflow="fold")
            grid.add_column(overflow="fold")
            grid.add_row(head, Text(row.text))
            parts.append(Padding(grid, (0, 0, 0, 2)))
        parts += [Text(" " * indent + line) for line in _printable_lines(row.commands).splitlines()]
    return _drawn(console, *parts)


def _printable_lines(text: str) -> str:
    return "\n".join(map(printable, text.expandtabs(4).split("\n")))


def _plain_column(cells: list[str], align_right: bool = False) -> list[str]:
    width = max(map(len, cells))
    return [f"{cell:{'>' if align_right else '<'}{width}}" for cell in cells]


def _console() -> Console:
    """rich's view of the terminal, also of one that says it has no columns."""
    from rich.console import Console

    console = Console()
    return console if console.width else Console(width=80)


def _drawn(console: Console, *parts: RenderableType) -> str:
    """What rich prints. It does not fold a Text."""
    from rich.text import Text

    with console.capture() as capture:
        for part in parts:
            console.print(part, soft_wrap=isinstance(part, Text))
    return capture.get().rstrip("\n")
