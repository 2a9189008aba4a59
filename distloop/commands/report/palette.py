"""The colours of curves, accounts and states, by the names that style.css gives them."""

import functools
import re
from pathlib import Path

STYLE = Path(__file__).with_name("templates") / "style.css"
SERIES = ("blue", "red", "green", "orange", "pink", "sky", "violet", "brown", "olive", "black")
ACCOUNT_COLOURS = {
    "compute": "blue",
    "data": "orange",
    "validation": "green",
    "checkpoint": "pink",
    "start_up": "mark",
    "lost": "red",
}
STATE_COLOURS = {"finished": "green", "running": "blue", "starting": "sky", "stopped": "orange"}  # others: red


@functools.cache
def light_colours() -> dict[str, str]:
    """The colours on a light page: "#0072b2" for "blue"."""
    light, _, _ = STYLE.read_text(encoding="ascii").partition("@media")
    return dict(re.findall(r"--(\w+): (#\w{6})", light))
