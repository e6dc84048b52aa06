"""`headgate bench links`: the links behind DeepEP's published tables, and which dispatcher wins where on such links.

Arithmetic alone. Every time that it prints beside a published one is modelled, and so are those of the second table.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from math import isfinite
from pathlib import Path

from ...placement.cluster.links import Link, Links
from .. import draw as pictures
from ..arguments import number, output, whole
from ..output import write_json
from ..screen import Screen
from .published import fitted, points
from .variants import variant_lines
from .winners import Sizes, check_lines, fit_lines, link_lines, row, winner_lines

EXAMPLE = """examples:
  headgate bench links
  headgate bench links --plot links.png
  headgate bench links --across 5 25 --inside 3 300 --hidden-size 2048 --experts 128 --bytes 2 2
"""
FIRST = "Links fitted on DeepEP's published tables: H800, ConnectX-7. Every time that is not published is modelled."
SECOND = "Which dispatcher wins on these links, the counts of rows sent first as Headgate does: modelled, not measured."
RANKS = tuple(8 << i for i in range(9))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `headgate bench links`."""
    sizes = Sizes()
    parser.epilog = EXAMPLE
    add = parser.add_argument
    add("--ranks", nargs="+", type=whole, default=RANKS, metavar="G", help="default: 8 to 2048")
    add(
        "--tokens",
        nargs="+",
        type=whole,
        default=(16, 128, 4096),
        metavar="T",
        help="per rank (default: 16 128 4096)",
    )
    add("--ranks-per-node", type=whole, default=sizes.ranks_per_node, metavar="N", help="default: %(default)s")
    add("--hidden-size", type=whole, default=sizes.hidden_size, metavar="D", help="default: %(default)s")
    add(
        "--experts",
        type=whole,
        default=sizes.num_experts,
        metavar="E",
        help="default: %(default)s; at least the ranks",
    )
    add("--top-k", type=whole, default=sizes.top_k, metavar="K", help="default: %(default)s")
    add(
        "--at-most-nodes",
        type=whole,
        metavar="M",
        default=sizes.at_most_nodes,
        help="nodes that the router takes first; 0: no limit (default: %(default)s)",
    )
    both = [sizes.dispatch_bytes, sizes.combine_bytes]
    add("--bytes", nargs=2, type=number, default=both, metavar=("THERE", "BACK"), help="per number (default: 1 2)")
    for name, what in (("inside", "inside a node"), ("across", "between nodes")):
        link = f"the links {what}, both ways (default: the fit)"
        add(f"--{name}", nargs=2, type=number, metavar=("US", "GB/s"), help=link)
    add("--plot", metavar="FILE", help="draw it: .png or .svg")
    add("--json", type=output, metavar="FILE", help="write everything to FILE; - for standard output")


def run(args: argparse.Namespace) -> int:
    """Prints, draws and writes; always 0."""
    positive = ("ranks", "tokens", "ranks_per_node", "hidden_size", "experts", "top_k", "bytes")
    for name in positive:
        given = getattr(args, name)
        if min(given if isinstance(given, list | tuple) else [given]) <= 0:
            raise ValueError(f"links: --{name.replace('_', '-')} must be positive, got {given}")
    if args.plot:
        pictures.check(Path(args.plot), "links")
    there, back = args.bytes
    limit = args.at_most_nodes or None
    sizes = Sizes(args.hidden_size, args.experts, args.top_k, there, back, args.ranks_per_node, limit)
    published = fitted()
    found = points(*published)
    used = [_changed(links, args.inside, args.across) for links in published]
    rows = [row(sizes, ranks, tokens, *used) for tokens in args.tokens for ranks in args.ranks]
    if not all(isfinite(us) for line in rows for us in line["modelled_us"].values()):
        raise ValueError(f"links: times must be finite, got others with {_second(sizes)}, or with these links")
    screen = Screen(out=sys.stderr if args.json == "-" else sys.stdout)
    lines = [
        FIRST,
        *link_lines(*published),
        "",
        *fit_lines(found),
        "",
        *variant_lines(),
        "",
        *check_lines(),
        "",
        SECOND,
        _second(sizes),
    ]
    if used != list(published):
        lines += link_lines(*used)
    screen.say("\n".join([*lines, *winner_lines(rows)]))
    if args.plot:
        from .plot import draw

        where = "the fitted" if used == list(published) else "given"
        draw(found, rows, Path(args.plot), f"Modelled on {where} links, counts of rows first\n{_second(sizes)}")
    report = {
        "version": 1,
        "sizes": asdict(sizes),
        "fitted": {"dispatch": asdict(published[0]), "combine": asdict(published[1])},
        "used": {"dispatch": asdict(used[0]), "combine": asdict(used[1])},
        "published": [asdict(p) | {"error": p.error} for p in found],
        "modelled": rows,
    }
    write_json(args.json, report)
    return 0


def _changed(links: Links, inside: list[float] | None, across: list[float] | None) -> Links:
    return Links(Link(*inside) if inside else links.inside, Link(*across) if across else links.across)


def _second(sizes: Sizes) -> str:
    limit = f", a token at most on {sizes.at_most_nodes} nodes" if sizes.at_most_nodes else ""
    return (
        f"D {sizes.hidden_size}, E {sizes.num_experts} or the ranks if more, K {sizes.top_k}{limit}, "
        f"{sizes.dispatch_bytes:g} bytes per number there and {sizes.combine_bytes:g} back, "
        f"{sizes.ranks_per_node} ranks to a node"
    )
