"""Numbers, durations (in seconds) and sizes (in bytes) as text for people. Only the standard library is imported."""

import math
from typing import Any

UNKNOWN = "–"
ASCII = {"·": "-", "×": "x", "…": "...", "–": "-", "—": "-", "→": "->", "━": "=", "─": "-", "≤": "<=", "≥": ">="}


def number(value: Any) -> str:
    """0.9806, 1.2e-05, 12345, and [0.1, 0.25] for a list. Anything else becomes str(value)."""
    if isinstance(value, list):
        return f"[{', '.join(map(number, value))}]"
    if not isinstance(value, (int, float)):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def number_with_zeros(value: Any) -> str:
    """0.8000 where `number` gives 0.8, so that a number keeps its width while it changes; a dash for None."""
    if value is None:
        return UNKNOWN
    return f"{value:#.4g}" if isinstance(value, float) and 1e-4 <= abs(value) < 1000 else number(value)


def number_with_commas(value: Any) -> str:
    """12,345 for an int, as `number` for a float; a dash for None, nan and infinity; str(value) for anything else."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return UNKNOWN
    if isinstance(value, bool):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else number(value)


def number_on_axis(value: float) -> str:
    """A short label: 0.05, 1500, 20k, 1.5M, 1e-05."""
    if abs(value) >= 1e15 or (value and abs(value) < 1e-3):
        return f"{value:.3g}"
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):.6g}{unit}"
    return f"{value:.6g}"


def percent(share: float | None) -> str:
    """0.987 -> 98.7 %; a dash for None, nan and infinity."""
    if share is None or not math.isfinite(share):
        return UNKNOWN
    return f"{100 * share:.1f} %" if share < 0.9995 else f"{100 * share:.0f} %"


def plural(amount: int, noun: str) -> str:
    """1 rank, 2 ranks."""
    return f"{amount} {noun}{'' if amount == 1 else 's'}"


def duration(seconds: float) -> str:
    """65 -> 1:05, 3700 -> 1:01:40."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def long_duration(seconds: float | None) -> str:
    """4.2 s, 1:05, 1:01:40, 3 d 4 h; a dash for None, nan and infinity."""
    if seconds is None or not math.isfinite(seconds):
        return UNKNOWN
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds >= 0.05 or not seconds else "< 0.1 s"
    if seconds >= 72 * 3600:
        return f"{seconds // 86400:.0f} d {seconds % 86400 // 3600:.0f} h"
    return duration(seconds)


def short_duration(seconds: float) -> str:
    """1.5 s, 20 ms, 200 µs."""
    factor, unit = (1.0, "s") if seconds >= 1 else (1e3, "ms") if seconds * 1e3 >= 1 else (1e6, "µs")
    return f"{seconds * factor:.3g} {unit}"


def age(seconds: float | None) -> str:
    """90 s ago, 90 min ago, 3 h ago, 2 d ago; a dash for None."""
    if seconds is None:
        return UNKNOWN
    for unit, length, limit in (("s", 1, 120), ("min", 60, 7200), ("h", 3600, 48 * 3600)):
        if seconds < limit:
            return f"{seconds // length:.0f} {unit} ago"
    return f"{seconds // 86400:.0f} d ago"


def memory_size(size: float) -> str:
    """In powers of 1024, as memory is sold: 512 bytes, 4 KiB, 1.5 GiB."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.3g} {unit}" if size < 100 else f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:,.1f} TiB"


def file_size(size: int) -> str:
    """In powers of 1000, as disks are sold: 812 kB, 1.2 GB."""
    amount = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 999.5:
            return f"{amount:.3g} {unit}"
        amount /= 1000
    return f"{amount:.3g} TB"


def encodable(text: str, encoding: str | None) -> str:
    """The text with each character that `encoding` lacks replaced: · by -, … by ..., a letter by a question mark."""
    try:
        text.encode(encoding or "utf-8")
    except UnicodeEncodeError:
        return "".join(encodable(each, encoding) for each in text) if len(text) > 1 else ASCII.get(text, "?")
    return text
