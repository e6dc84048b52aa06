"""From the command line to the table."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from ...bench import draw
from ...bench.arguments import input_file, number, whole
from ...bench.screen import Screen
from ...placement.caching.policies import POLICIES
from ...placement.caching.simulate import SCOPES
from ...placement.caching.tiers import Times
from .compare import AHEAD, Case, Plan, case_of, compare, curves

UNITS = {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `headgate cache`."""
    add = parser.add_argument
    add("trace", type=input_file, metavar="TRACE", help="a routing trace (.npz), as `headgate trace` writes it")
    add("--budget", metavar="X", help="device memory for experts: a share of them all, 25%%, or bytes, 8GiB")
    add("--slots", type=whole, metavar="N", help="instead: experts of each layer in device memory")
    add(
        "--policies", nargs="+", choices=list(POLICIES), metavar="NAME", help=f"of {', '.join(POLICIES)} (default: all)"
    )
    add("--batch", type=whole, default=1, metavar="N", help="tokens of a forward pass (default: %(default)s)")
    add("--scope", choices=SCOPES, default="layer", help="slots of each layer, or of all (default: %(default)s)")
    add(
        "--fit-share",
        type=number,
        default=0.5,
        metavar="X",
        help="learn from a domain's first tokens, judge on the rest",
    )
    add("--prefetch", choices=AHEAD, help="fetch ahead: what will be needed, layers in order, or what a predictor says")
    add("--horizon", type=whole, default=1, metavar="N", help="so many layers ahead (default: %(default)s)")
    add("--most", type=whole, default=4, metavar="N", help="fetches for a step at most (default: %(default)s)")
    add("--expert-bytes", default="16MB", metavar="B", help="of one expert (default: %(default)s)")
    add("--link-GBps", type=number, default=25.0, metavar="X", help="host to device (default: %(default)s)")
    add("--host-budget", metavar="X", help="host memory for experts, as --budget; the rest is on disk (default: all)")
    add("--disk-GBps", type=number, default=3.0, metavar="X", help="disk to host (default: %(default)s)")
    add("--compute-us", type=number, default=100.0, metavar="X",
        help="of a layer beside its experts (default: %(default)s)")  # fmt: skip
    add("--expert-us", type=number, default=10.0, metavar="X", help="of one expert (default: %(default)s)")
    add("--plot", type=Path, metavar="FILE", help="draw hit rates over slots: .png or .svg")
    add("--json", action="store_true", help="print the figures as JSON on standard output, all else on standard error")


def run(args: argparse.Namespace) -> int:
    """Exit status 0; raises ValueError on bad usage, OSError where files cannot be read or written."""
    screen = Screen(out=sys.stderr if args.json else sys.stdout)
    _check(args)
    case = case_of(args.trace, args.fit_share)
    plan = _plan(args, case)
    found = compare(case, plan)
    show(found, plan, screen)
    if args.plot is not None:
        sizes, rates = curves(case, plan)
        found["curves"] = {"slots": sizes, "hit_rates": rates}
        _draw(found, args.plot, f"{args.trace.stem}: {found['tokens']:,} tokens held out")
        screen.say(f"picture: {args.plot}")
    if args.json:
        print(json.dumps(found))
    return 0


def _check(args: argparse.Namespace) -> None:
    """What can be refused before the work is done."""
    if (args.budget is None) == (args.slots is None):
        raise ValueError(f"cache: one of --budget and --slots must be given, got {args.budget} and {args.slots}")
    if not 0 <= args.fit_share < 1:
        raise ValueError(f"cache: --fit-share must be 0 or more and below 1, got {args.fit_share}")
    if args.plot is not None:
        draw.check(args.plot, "cache")


def _plan(args: argparse.Namespace, case: Case) -> Plan:
    layers, experts = case.judge.shape[0], case.judge.num_experts
    size = _bytes(args.expert_bytes, "--expert-bytes")
    if not size >= 1:
        raise ValueError(f"cache: --expert-bytes must be at least 1, got {args.expert_bytes}")
    slots = args.slots if args.budget is None else _slots(args.budget, "--budget", layers, experts, size)
    host = None if args.host_budget is None else _slots(args.host_budget, "--host-budget", layers, experts, size)
    times = Times(size, args.link_GBps, args.disk_GBps, args.compute_us / 1e6, args.expert_us / 1e6)
    names = tuple(dict.fromkeys(args.policies or POLICIES))
    return Plan(names, slots, args.scope, args.batch, times, host, args.prefetch, args.horizon, args.most)


def _bytes(text: str, option: str) -> float:
    """16MB, 8GiB, 1e6."""
    number = text.strip().rstrip("BbIiKkMmGgTt")
    unit = text.strip()[len(number) :].upper() or "B"
    try:
        found = float(number) * UNITS[unit]
    except (ValueError, KeyError):
        found = math.nan
    if not (math.isfinite(found) and found >= 0):
        raise ValueError(f"cache: {option} must be bytes such as 16MB or 8GiB, got {text}")
    return found


def _slots(text: str, option: str, layers: int, experts: int, expert_bytes: float) -> int:
    """The slots of a layer that a share of all experts, or bytes, are enough for."""
    if text.strip().endswith("%"):
        try:
            found = float(text.strip()[:-1]) / 100 * experts
        except ValueError:
            found = math.inf
        if math.isinf(found):
            raise ValueError(f"cache: {option} must be a share such as 25% or bytes, got {text}")
    else:
        found = _bytes(text, option) / (expert_bytes * layers)
    if not found + 1e-9 >= 1:
        raise ValueError(f"cache: {option} must be enough for one expert of each layer, got {text}")
    return int(min(found + 1e-9, experts))


def _draw(found: dict[str, Any], path: Path, title: str) -> None:
    def fill(figure: Any) -> None:
        axis = figure.subplots()
        axis.set_title(title)
        draw.hit_rates(axis, found["curves"]["slots"], found["curves"]["hit_rates"], found["experts"])

    draw.write(path, 900, 560, fill)


def show(found: dict[str, Any], plan: Plan, screen: Screen) -> None:
    """The table and what it says of the trace."""
    say = screen.say
    share = found["slots"] / found["experts"]
    say(
        f"{found['layers']} layers of {found['experts']} experts, top-{found['top_k']}; {found['slots']} slots a layer"
        f" ({share:.0%}), {'one pool of all' if plan.scope == 'shared' else 'each its own'}; passes of {plan.batch}"
    )
    say(f"learned from {found['learned_from']:,} tokens, judged on {found['tokens']:,} others")
    ahead, tiers = plan.prefetch is not None, plan.host_slots is not None
    head = ["", "hits", "of the gap", "loads"] + ["ahead", "used", "copies"] * ahead + ["reads"] * tiers + ["wait ms"]
    table = [head]
    for name, row in sorted(found["policies"].items(), key=lambda item: item[1]["hit_rate"]):
        cells = [name, f"{row['hit_rate']:.3f}", f"{row['gap_closed']:.0%}", f"{row['loads_per_token']:.2f}"]
        if ahead:
            cells += [f"{row['ahead_per_token']:.2f}", f"{row['ahead_used']:.0%}", f"{row['copies_of_lru']:.2f}x"]
        if tiers:
            cells += [f"{row['reads_per_token']:.2f}"]
        table.append([*cells, f"{row['stall_ms']:.2f}"])
    screen.table(table)
    for name, why in found["left_out"].items():
        say(f"  {name} left out: {why}")
    say("of the gap: from lru to belady without prefetch; loads: on demand, a token, all layers")
    if ahead:
        say(f"ahead: fetched ahead ({plan.prefetch}), a token; used: of those; copies: all, over those of lru alone")
    if tiers:
        say(f"reads: from disk, a token, below a host cache of {plan.host_slots} slots a layer by lru")
    best = found["policies"]["belady"]
    say(
        f"wait: a token, beside {best['compute_ms']:.2f} ms of computing; no choice and no prefetch waits less than"
        f" {best['bound_ms']:.2f} ms"
    )
    _locality(found["locality"], screen)


def _locality(found: dict[str, Any], screen: Screen) -> None:
    srp, sch = found["srp"], found["sch"]
    rows = [["locality, tokens in a segment", *map(str, srp)]]
    rows.append(["SRP: one set of experts a segment", *(f"{x['value']:.3f}" for x in srp.values())])
    if all(x["low"] == x["low"] for x in srp.values()):
        rows.append(["  95% interval", *(f"+-{(x['high'] - x['low']) / 2:.3f}" for x in srp.values())])
    rows.append(["  its best size, times K", *(f"{x['rho']:.2f}" for x in srp.values())])
    for m in next(iter(sch.values())):
        cells = [f"{x[m]:.3f}" for s, x in sch.items() if s]
        rows.append([f"SCH: {m} slots that see it ahead (lru {sch[0][m]:.3f})", *cells])
    screen.table(rows)
