"""`headgate bench overlap`: degrees of a schedule beside none, on a declared link."""

from __future__ import annotations

import argparse
import statistics
import sys
from typing import Any

from .. import report as plain
from ..arguments import number, output, positive
from ..dispatch.launch import launch
from ..hardware import describe
from ..output import write_json
from ..screen import Screen
from ..shapes import PASSES

RANK = (sys.executable, "-P", "-m", "headgate.bench.overlap.rank")
LAYERS = ("layer", "block")
EXAMPLE = """examples:
  headgate bench overlap                            a layer and a shortcut block on 2 ranks, some minutes
  headgate bench overlap --ranks 4 --degrees 4 --layers layer --passes forward
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `headgate bench overlap`."""
    parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, EXAMPLE
    add = parser.add_argument
    add("--ranks", type=positive, default=2, metavar="G", help="processes, one thread each (default: 2)")
    add("--tokens", type=positive, default=4096, metavar="T", help="of each rank (default: 4096)")
    add("--degrees", nargs="+", type=positive, default=[1, 2, 4, 8], metavar="N", help="(default: 1 2 4 8)")
    add("--layers", nargs="+", choices=LAYERS, default=list(LAYERS), help="layer, block (default: both)")
    add("--passes", nargs="+", choices=PASSES, default=list(PASSES), help="forward, train (default: both)")
    add("--budget", type=number, default=20.0, metavar="S", help="seconds of timing per case (default: 20)")
    add("--json", type=output, metavar="FILE", help="write everything to FILE; - for standard output")


def run(args: argparse.Namespace) -> int:
    """Measures, prints, writes; 0, 1 where a rank failed, 2 for a budget that is none."""
    if not 0 < args.budget < 1e5:
        print(f"headgate bench overlap: --budget must be positive and below 1e5, got {args.budget}", file=sys.stderr)
        return 2
    screen = Screen(out=sys.stderr if args.json == "-" else sys.stdout)
    machine = describe() | {"threads": 1, "ranks": args.ranks}
    job = {name: getattr(args, name) for name in ("ranks", "tokens", "degrees", "layers", "passes")}
    job |= {"budget_s": args.budget, "timeout_s": 120.0 + 4 * args.budget}
    report: dict[str, Any] = {"version": 1, "machine": machine, "settings": job, "cases": []}
    screen.say("\n".join([*plain.machine_lines(machine | {"load_1min": None}), ""]))
    with screen.bar(len(args.layers) * len(args.passes)) as bar:

        def tell(news: dict[str, Any]) -> None:
            if "progress" in news:
                bar.update(len(report["cases"]), news["progress"])
                return
            report["cases"].append(news["case"])
            screen.say("\n".join(case_lines(news["case"])))

        launch(job, tell, RANK)
    write_json(args.json, report)
    return 0


def hidden(case: dict[str, Any], name: str) -> float:
    """The share that a schedule hides of what can be hidden: the smaller of transfers and computation."""
    without, here = (statistics.median(case["degrees"][n]["with_delay_s"]) for n in ("no schedule", name))
    return (without - here) / min(case["transfers_s"], case["computed_s"])


def case_lines(case: dict[str, Any]) -> list[str]:
    lines = [
        f"{case['layer']}, {case['pass']}: computed in {1e3 * case['computed_s']:.1f} ms; transfers of "
        f"{1e3 * case['transfers_s']:.1f} ms, declared ({1e6 * case['per_row_s']:.1f} us a row)",
        f"  {'':<12} {'no delay':>10} {'':>7} {'delay':>10} {'hidden':>8}",
    ]
    base = statistics.median(case["degrees"]["no schedule"]["without_delay_s"])
    for name, found in case["degrees"].items():
        bare, slow = (statistics.median(found[n]) for n in ("without_delay_s", "with_delay_s"))
        share = "" if name == "no schedule" else f"{hidden(case, name):8.0%}"
        lines.append(f"  {name:<12} {1e3 * bare:7.1f} ms {bare / base:6.2f}x {1e3 * slow:7.1f} ms {share}")
    return [*lines, ""]
