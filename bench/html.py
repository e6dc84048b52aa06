"""Pages: one HTML file each, nothing loaded from elsewhere, light or dark as the reader's screen is."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from .draw import PALETTE

DARK = (
    "--paper:#14171a; --card:#1c2024; --ink:#e8eaec; --soft:#98a1a9; --rule:#2d3338; --accent:#3fb8b0; "
    "--quiet:#59626a; --warm:#ef8a4c; "
)
CSS = """
* { box-sizing:border-box; }
body { margin:0; background:var(--paper); color:var(--ink); font:16px/1.6 system-ui,-apple-system,"Segoe UI",Roboto,
  "Helvetica Neue","DejaVu Sans",sans-serif; -webkit-font-smoothing:antialiased; }
main { max-width:940px; margin:0 auto; padding:56px 24px 40px; }
h1 { font-size:34px; line-height:1.2; letter-spacing:-.02em; margin:0 0 10px; }
.lead { font-size:18px; color:var(--soft); max-width:42em; margin:0 0 34px; }
section { background:var(--card); border:1px solid var(--rule); border-radius:14px; padding:26px 30px 28px;
  margin:0 0 22px; }
h2 { font-size:21px; letter-spacing:-.01em; margin:0 0 8px; }
h2 span { color:var(--accent); margin-right:.5em; font-variant-numeric:tabular-nums; }
h3 { font-size:16px; margin:26px 0 4px; }
p { margin:0 0 14px; max-width:46em; }
code { font:.9em ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace; background:var(--paper);
  border:1px solid var(--rule); border-radius:5px; padding:.05em .35em; }
.tiles { display:grid; grid-template-columns:repeat(auto-fit,minmax(190px,1fr)); gap:14px; margin:0 0 26px; }
.tile { background:var(--card); border:1px solid var(--rule); border-radius:14px; padding:16px 20px 15px; }
.tile b { display:block; font-size:29px; line-height:1.25; letter-spacing:-.02em; color:var(--accent);
  font-variant-numeric:tabular-nums; }
.tile small { color:var(--soft); font-size:13.5px; line-height:1.4; display:block; }
.grid { display:grid; grid-template-columns:repeat(auto-fit,minmax(330px,1fr)); gap:18px 34px; align-items:start; }
figure { margin:12px 0 4px; }
figcaption { font-size:13.5px; color:var(--soft); margin-bottom:8px; line-height:1.4; }
svg { width:100%; height:auto; display:block; overflow:visible; }
.scroll, figure.wide { overflow-x:auto; } figure.wide svg { min-width:600px; }
td { white-space:nowrap; } table { border-collapse:collapse; font-size:15px; font-variant-numeric:tabular-nums; }
th { text-align:left; color:var(--soft); font-weight:500; font-size:13.5px; }
th,td { padding:6px 26px 6px 0; border-bottom:1px solid var(--rule); }
.key { display:inline-block; margin:1px 10px 1px 0; white-space:nowrap; } .key small { color:var(--soft); }
kbd { font:14px ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace; background:var(--paper);
  border:1px solid var(--rule); border-bottom-width:2px; border-radius:5px; padding:0 .45em; margin-right:4px; }
pre.sample { font:13.5px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace; margin:0;
  background:var(--paper); border:1px solid var(--rule); border-radius:10px; padding:14px 18px; white-space:pre-wrap;
  overflow-wrap:anywhere; }
pre b { color:var(--accent); }
.note { border-left:4px solid var(--warm); padding:2px 0 2px 14px; margin:0 0 24px; }
footer { color:var(--soft); font-size:13.5px; margin-top:30px; } footer p { max-width:none; margin:0 0 6px; }
@media print { section,.tile { break-inside:avoid; } }
"""


def page(title: str, heading: str, lead: str, body: str) -> str:
    """The whole page; `lead` and `body` may hold markup."""
    light = "--paper:#fbfaf8; " + "".join(f"--{name}:{colour}; " for name, colour in PALETTE.items())
    colours = f":root {{ {light}}}\n@media (prefers-color-scheme: dark) {{ :root {{ {DARK} }} }}"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><style>{colours}{CSS}</style></head><body><main>
<h1>{escape(heading)}</h1>
<p class="lead">{lead}</p>
{body}</main></body></html>
"""


def prose(words: str) -> str:
    """A paragraph; `words` may hold markup."""
    return f"<p>{words}</p>\n"


def subtitle(words: str) -> str:
    return f"<h3>{escape(words)}</h3>\n"


def table(rows: Sequence[Sequence[str]], raw: bool = False) -> str:
    """The first row is the head; `raw` cells may hold markup."""
    safe = (lambda cell: cell) if raw else escape
    head = "".join(f"<th>{safe(cell)}</th>" for cell in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{safe(cell)}</td>" for cell in row) + "</tr>" for row in rows[1:])
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>\n'


def grid(pictures: Sequence[str]) -> str:
    return f'<div class="grid">{"".join(pictures)}</div>\n'


def key(letter: str, note: str) -> str:
    return f'<span class="key"><kbd>{escape(letter)}</kbd><small>{escape(note)}</small></span>'


def sample(prompt: str, text: str) -> str:
    return f'<pre class="sample"><b>{escape(prompt)}</b>{escape(text)}</pre>\n'
