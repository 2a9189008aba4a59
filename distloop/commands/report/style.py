"""The colours, light and dark, and the style sheet.

Plots are drawn in the light colours. In the page each colour becomes a CSS variable, so that plots turn dark as well.
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


def variables(dark: bool) -> str:
    """The palette as CSS variables."""
    return "".join(f"--{name}:{colours[dark]};" for name, colours in PALETTE.items())


def style_sheet() -> str:
    """The style sheet of the page."""
    return (
        f":root{{color-scheme:light dark;{variables(False)}}}"
        f"@media (prefers-color-scheme:dark){{:root{{{variables(True)}}}}}{RULES}"
    )


RULES = """
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,"Noto Sans",sans-serif;-webkit-text-size-adjust:100%}
main{max-width:1200px;margin:0 auto;padding:28px 24px 48px}
h1{font-size:26px;line-height:1.25;margin:0;font-weight:650;overflow-wrap:anywhere}
h2{font-size:18px;margin:0 0 14px;font-weight:620}
h3{font-size:14px;margin:0 0 2px;font-weight:600}
section,.card{background:var(--panel);border:1px solid var(--line);border-radius:10px;padding:20px 22px;margin-top:18px;
min-width:0}
section.empty{display:flex;flex-wrap:wrap;gap:2px 16px;align-items:baseline;padding:12px 22px}
section.empty h2{margin:0;font-size:15px}
.top{display:flex;flex-wrap:wrap;align-items:center;gap:6px 14px}
.facts{color:var(--soft);margin:6px 0 0;overflow-wrap:anywhere}
.facts span:not(:last-child)::after{content:" \\b7  "}
.badge{border-radius:99px;padding:2px 12px;font-size:13px;font-weight:600;color:var(--c);
border:1px solid var(--c);white-space:nowrap}
.reason{margin:14px 0 0;padding:10px 14px;border-left:3px solid var(--c);background:var(--panel);white-space:pre-wrap;
overflow-wrap:anywhere}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(142px,1fr));gap:12px;margin-top:18px}
.tile{background:var(--panel);border:1px solid var(--line);border-radius:10px;padding:12px 14px;min-width:0}
.tile b{display:block;font-size:23px;line-height:1.3;font-weight:600;font-variant-numeric:tabular-nums;
white-space:nowrap;overflow:hidden;text-overflow:ellipsis}
.tile span{display:block;color:var(--soft);font-size:13px;overflow-wrap:anywhere}
.plots{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:0 28px}
.plots>div{display:grid;grid-template-rows:subgrid;grid-row:span 3;margin-bottom:22px;align-content:start}
.plots .legend{margin:0 0 2px}
.plots .legend:empty{margin:0}
svg{display:block;width:100%;height:auto}
svg text{font-family:inherit!important}
.alone svg{width:580px;max-width:100%}
.legend{margin:0 0 4px;line-height:20px;color:var(--soft);font-size:13px;display:flex;flex-wrap:wrap;gap:2px 16px}
.legend span{display:inline-flex;align-items:center;gap:6px;min-width:0;overflow-wrap:anywhere}
.key{flex:none;width:16px;height:0;border-top:2.5px solid var(--c)}
.key.thin{opacity:.4}
.key.dash{border-top-style:dashed}
.key.area{height:10px;width:10px;border:0;background:var(--c);border-radius:2px}
.key.dot{height:7px;width:7px;border:0;background:var(--c);border-radius:50%}
.quiet,.note{color:var(--soft);margin:0;font-size:14px}
.note{margin-top:8px;font-size:13px;overflow-wrap:anywhere}
.wide{overflow-x:auto;margin:0 -4px;padding:0 4px}
table{border-collapse:collapse;font-size:14px;font-variant-numeric:tabular-nums}
th{color:var(--soft);font-weight:500;text-align:left;font-size:13px;vertical-align:bottom}
th,td{padding:5px 18px 5px 0;border-bottom:1px solid var(--line)}
th:last-child,td:last-child{padding-right:0}
td{vertical-align:top;overflow-wrap:break-word;max-width:420px}
tbody tr:last-child td{border-bottom:0}
.one{white-space:nowrap}
.n{text-align:right;white-space:nowrap}
td .key{display:inline-block;margin:0 8px 1px 0}
table.full{width:100%}
td.n,th.n{overflow-wrap:normal}
tr:first-child .first{font-weight:650}
.bars{display:grid;grid-template-columns:max-content minmax(0,1fr) max-content;gap:6px 14px;align-items:center;
font-size:14px;margin:10px 0 18px}
.bars .name{max-width:240px;overflow-wrap:anywhere}
.bars .name i{display:inline-block;width:9px;height:9px;border-radius:50%;background:var(--c);margin-right:8px}
.bars .value{text-align:right;color:var(--soft);font-variant-numeric:tabular-nums;white-space:nowrap}
.bar{display:flex;height:20px;border-radius:4px;overflow:hidden;background:var(--line)}
.bar i{display:block;background:var(--c);min-width:0}
.beside{display:flex;flex-wrap:wrap;gap:24px 64px;align-items:flex-start}
.beside>*{min-width:0;max-width:100%}
.beside>:last-child{flex:1 1 360px}
.matrix{border-spacing:2px;border-collapse:separate;font-size:13px;margin-left:-2px}
.matrix td,.matrix th{padding:0;border:0;text-align:center;vertical-align:middle}
.matrix tbody th{text-align:right;padding-right:8px;color:var(--ink);font-weight:400;max-width:150px;
white-space:nowrap;overflow:hidden;text-overflow:ellipsis}
.matrix thead th.c{height:1px;vertical-align:bottom;color:var(--ink);font-weight:400}
.matrix thead th.c span{writing-mode:vertical-rl;transform:rotate(180deg);max-height:130px;overflow:hidden;
display:inline-block;text-align:left;white-space:nowrap;text-overflow:ellipsis}
.matrix td{min-width:38px;height:34px;border-radius:4px}
.matrix td.zero{color:var(--mark)}
.mistakes{display:grid;grid-template-columns:repeat(auto-fill,minmax(120px,1fr));gap:16px 14px}
.mistakes figure{margin:0;min-width:0}
.mistakes img,.mistakes .none{display:block;width:100%;aspect-ratio:1;object-fit:contain;image-rendering:pixelated;
background:var(--page);border:1px solid var(--line);border-radius:6px}
.mistakes .none{display:grid;place-items:center;color:var(--mark);font-size:13px}
.mistakes figcaption{font-size:13px;line-height:1.4;margin-top:6px;overflow-wrap:anywhere}
.mistakes figcaption span{color:var(--soft)}
.pairs{display:grid;grid-template-columns:minmax(110px,max-content) minmax(0,1fr);gap:3px 20px;margin:0;font-size:14px}
.pairs dt{color:var(--soft)}
.pairs dd{margin:0;overflow-wrap:anywhere;font-variant-numeric:tabular-nums}
code,pre{font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono","DejaVu Sans Mono",monospace}
pre{margin:10px 0 0;padding:12px 14px;background:var(--page);border:1px solid var(--line);border-radius:6px;
overflow:auto;max-height:560px;white-space:pre}
pre.wrap{white-space:pre-wrap;overflow-wrap:anywhere}
pre .add{color:var(--green)}pre .del{color:var(--red)}pre .at{color:var(--violet)}pre .file{font-weight:700}
details{margin-top:12px}
details:first-child{margin-top:0}
summary{cursor:pointer;color:var(--blue);font-size:14px;width:fit-content}
details[open]>summary{margin-bottom:8px}
footer{color:var(--soft);font-size:13px;margin-top:24px}
@media (max-width:900px){main{padding:20px 14px 32px}.plots{grid-template-columns:minmax(0,1fr)}
section,section.empty{padding-left:16px;padding-right:16px}.matrix td{min-width:28px}}
@media print{body{background:none}section,.tile{break-inside:avoid}}
"""
