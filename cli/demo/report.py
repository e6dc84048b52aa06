"""report.html: one file, nothing loaded from elsewhere, light or dark as the reader's screen is."""

from __future__ import annotations

from html import escape

from ..screen import spoken
from . import speed
from .tour import Chapter, Tour

CSS = """
:root { --paper:#fbfaf8; --card:#ffffff; --ink:#1d2126; --soft:#6c737c; --rule:#e6e3dd; --accent:#0b6e75;
  --quiet:#b9bfc4; --warm:#c8541a; }
@media (prefers-color-scheme: dark) { :root { --paper:#14171a; --card:#1c2024; --ink:#e8eaec; --soft:#98a1a9;
  --rule:#2d3338; --accent:#3fb8b0; --quiet:#59626a; --warm:#ef8a4c; } }
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
text { font-size:13px; fill:var(--ink); font-variant-numeric:tabular-nums; }
text.soft { fill:var(--soft); font-size:12px; } text.strong { font-weight:650; }
.accent { fill:var(--accent); } .quiet { fill:var(--quiet); } .cell { fill:var(--accent); }
line.rule { stroke:var(--rule); stroke-width:1; } line.dash { stroke:var(--soft); stroke-dasharray:4 5; }
.link { stroke:var(--quiet); stroke-width:3; } .line { fill:none; stroke:var(--accent); stroke-width:1.5; opacity:.75; }
.held { fill:none; stroke:var(--warm); stroke-width:2; }
.dot { fill:var(--warm); stroke:var(--card); stroke-width:1.5; }
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


def page(tour: Tour, chapters: list[Chapter]) -> str:
    """The whole page; a chapter without figures (the tour was cut short) is left out."""
    about = tour.metrics["about"]
    there = [chapter for chapter in chapters if chapter.name in tour.metrics]
    sections = "".join(
        f'<section id="{chapter.name}"><h2><span>{number}</span>{escape(chapter.title)}</h2>\n'
        f"{chapter.section(tour)}</section>\n"
        for number, chapter in enumerate(there, 1)
    )
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>headgate demo</title><style>{CSS}</style></head><body><main>
<h1>A mixture of experts, end to end</h1>
<p class="lead">What <code>headgate demo</code> found on this machine in {spoken(about["seconds"])}: a small MoE
language model, swapped, measured, trained on real text and looked into.</p>
{_note(about)}{_tiles(tour)}
{sections}<footer><p>{escape(about["machine"])}; {escape(versions)}; seed {about["seed"]}.</p>
<p>Beside this page: <code>model/</code> (transformers, safetensors), <code>trace.npz</code>,
<code>placement.json</code>, <code>metrics.json</code> with every figure above.
Run it again: <code>headgate demo --seed {about["seed"]}</code></p></footer>
</main></body></html>
"""


def _note(about: dict) -> str:
    if about["interrupted"] is None:
        return ""
    return f'<p class="note">Interrupted in: {escape(about["interrupted"])}. What was done by then is here.</p>\n'


def _tiles(tour: Tour) -> str:
    found = tour.metrics
    tiles = []
    if "swap" in found:
        tiles.append((f"{found['swap']['headgate_against_eager']['output']:.0e}", "largest change of the output"))
    if "speed" in found and speed.reliable(found["speed"]):
        rates = found["speed"]["tokens_per_second"]["training_step"]
        tiles.append((f"{speed.ratio(rates):.2f}×", "tokens per second in training, against transformers' best"))
    if "final_bits_per_byte" in found.get("train", {}):
        tiles.append(
            (f"{found['train']['final_bits_per_byte']:.2f}", "bits per byte on text it never saw (8 untrained)")
        )
    if found.get("routing", {}).get("affinity"):
        lifts = [pair["lift"] for pair in found["routing"]["affinity"]]
        tiles.append((f"{sum(lifts) / len(lifts):.1f}×", "better than chance: foretelling a token's next expert"))
    if "placement" in found:
        rows = found["placement"]["judged"]
        less = 1 - rows["auto"]["cross_node_share"] / max(rows["eplb"]["cross_node_share"], 1e-9)
        tiles.append((f"{less:.0%}", "fewer transitions between nodes than with EPLB, by placement"))
    inner = "".join(
        f'<div class="tile"><b>{escape(big)}</b><small>{escape(small)}</small></div>' for big, small in tiles
    )
    return f'<div class="tiles">{inner}</div>' if inner else ""
