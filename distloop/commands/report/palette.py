"""The colours of the report, light and dark.

Plots are drawn in the light colours. In the page each colour is a CSS variable, so that plots turn dark as well.
"""

from __future__ import annotations

PALETTE = {  # name: (light, dark)
    "page": ("#f6f7f9", "#14171b"),
    "panel": ("#fffffe", "#1c2026"),
    "ink": ("#1d2530", "#e6e9ee"),
    "soft": ("#667085", "#98a2b3"),
    "line": ("#e4e7ec", "#313842"),
    "mark": ("#b4bcc9", "#566070"),
    # After Okabe and Ito: colour-blind readers can tell them apart. Each has a lighter form for a dark page.
    "blue": ("#0072b2", "#4ba3dc"),
    "red": ("#d55e00", "#f0803a"),
    "green": ("#009e73", "#2fc298"),
    "orange": ("#e69f00", "#f0b429"),
    "pink": ("#cc79a7", "#dd97bd"),
    "sky": ("#56b4e9", "#8accf3"),
    "violet": ("#5b4ba8", "#9d8ff0"),
    "brown": ("#8c564b", "#c08d82"),
    "olive": ("#8f8f1f", "#c2c25a"),
    "black": ("#344054", "#cfd6e1"),
}
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
