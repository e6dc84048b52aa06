"""`headgate bench compile`: every launch of every standard shape, built ahead of time, without a GPU.

Registers, spills, shared memory and the instructions that matter, kernel by kernel; the exit status is 1 where anything
spills, needs more shared memory than the chip has, or does not compile.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from typing import Any

from ...kernels.chip import CHIPS, Chip
from ...kernels.quantized import FORMATS
from .. import children, machine, screen
from ..arguments import output, positive, workers
from ..output import write_json
from ..shapes import DTYPES
from .build import Job, build_all, cuobjdump, job_of
from .record import PASSES, record
from .shapes import STANDARD, tokens_of

EXAMPLE = """examples:
  headgate bench compile --chips sm_80 sm_90 --shapes qwen3 gpt-oss
  headgate bench compile --passes quantized widened --formats Q4_K Q6_K --shapes qwen3 --tokens 1 64 4096
  headgate bench compile --limit 2 --json builds.json      two configurations of each kernel, chip and pass
"""
DEFAULT_CHIPS = ("H200", "A100", "RTX3090", "RTX4090", "B200")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `headgate bench compile`."""
    parser.epilog = EXAMPLE
    add = parser.add_argument
    names = ", ".join(CHIPS)
    about = f"of {names}, or sm_80 and the like (default: {' '.join(DEFAULT_CHIPS)})"
    add("--chips", nargs="+", type=chip_named, metavar="CHIP", help=about)
    add("--shapes", nargs="+", choices=list(STANDARD), metavar="SHAPE", help=f"of {', '.join(STANDARD)} (default: all)")
    add("--tokens", nargs="+", type=positive, metavar="T", help="tokens per call (default: 1 to 65536)")
    add("--passes", nargs="+", choices=PASSES, metavar="PASS", help=f"of {', '.join(PASSES)} (default: all)")
    add("--dtypes", nargs="+", choices=list(DTYPES), default=["bf16"], metavar="DTYPE", help="default: bf16")
    add(
        "--formats", nargs="+", choices=FORMATS, default=list(FORMATS), metavar="FORMAT",
        help=f"of the passes quantized and widened: {', '.join(FORMATS)} (default: all)",
    )  # fmt: skip
    add("--limit", type=positive, metavar="N", help="at most N configurations of each kernel, chip and pass")
    add("--processes", type=workers, default=machine.cores(), metavar="N", help="default: %(default)s")
    add("--cache", metavar="DIR", help="Triton's cache (default: a temporary one, so that everything is built)")
    add("--all", action="store_true", help="print every configuration, not one line per kernel and chip")
    add("--json", type=output, metavar="FILE", help="write every configuration to FILE; - for standard output")


def chip_named(name: str) -> Chip:
    """A chip by its name, or the first of a compute capability."""
    found = CHIPS.get(name) or next(
        (c for c in CHIPS.values() if name in (f"sm_{c.capability}", str(c.capability))), None
    )
    if found is None:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(CHIPS)} or sm_80 and the like, got {name!r}")
    return found


def jobs_of(
    shapes: Iterable[str],
    chips: Sequence[Chip],
    tokens: Sequence[int] | None = None,
    passes: Sequence[str] = PASSES,
    limit: int | None = None,
    dtypes: Sequence[str] = ("bf16",),
    formats: Sequence[str] = FORMATS,
) -> list[Job]:
    """What must be built for these cases, each once; with `limit`, so many of each kernel, chip and pass, from the last
    (many tokens) to the first (few), spread evenly."""
    found: dict[tuple[str, str, str], dict[Job, None]] = {}
    for name in shapes:
        shape = STANDARD[name]
        for chip in chips:
            for t in tokens or tokens_of(shape):
                for kind, dtype in itertools.product(passes, dtypes):
                    for launched in record(shape, t, kind, chip, DTYPES[dtype], formats):
                        job = job_of(launched, chip)
                        found.setdefault((job.name, chip.name, kind), {})[job] = None
    jobs: dict[Job, None] = {}
    for group in map(list, found.values()):
        n = len(group) if limit is None else min(limit, len(group))
        jobs |= {group[-1 - i * (len(group) - 1) // max(1, n - 1)]: None for i in range(n)}
    return list(jobs)


def run(args: argparse.Namespace) -> int:
    """Builds, prints, writes; 0, or 1 where a kernel spills, does not fit or does not compile."""
    if os.environ.get("TRITON_INTERPRET"):
        return _again(args)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="headgate-builds-") as temporary:
        os.environ["TRITON_CACHE_DIR"] = args.cache or temporary
        chips = args.chips or [CHIPS[c] for c in DEFAULT_CHIPS]
        kinds = (args.passes or PASSES, args.limit, args.dtypes, args.formats)
        jobs = jobs_of(args.shapes or STANDARD, chips, args.tokens, *kinds)
        seen = screen.Screen(out=sys.stderr if args.json == "-" else sys.stdout)
        seen.say(_heading(jobs))
        results = []
        with seen.bar(len(jobs)) as bar:
            for result in build_all(jobs, args.processes):
                results.append(result)
                bar.update(len(results), result["kernel"])
    results.sort(key=lambda r: (r["kernel"], r["sm"], r["what"]))
    bad = [r for r in results if fault(r)]
    seen.say("\n".join(table(results, every=args.all)))
    for r in bad:
        seen.say(f"{r['chip']}: {r['what']}: {fault(r)}")
    seen.say(f"{len(results)} builds, {len(bad)} at fault, {time.monotonic() - begin:.0f} s")
    write_json(args.json, {"version": 1, "triton": _triton_version(), "builds": results})
    return 1 if bad or not results else 0


def fault(result: dict[str, Any]) -> str | None:
    """What is wrong with one build; None if nothing."""
    if "error" in result:
        return f"does not compile: {result['error']}"
    if result["spill_bytes"]:
        return f"spills {result['spill_bytes']} bytes ({result['registers']} registers)"
    if result["shared_bytes"] > result["shared_limit"]:
        return f"needs {result['shared_bytes']} bytes of shared memory, the chip has {result['shared_limit']}"
    return None


def table(results: Sequence[dict[str, Any]], every: bool) -> list[str]:
    """One line per kernel and chip with the largest of its configurations, or one per configuration."""
    counts = ("wgmma", "mma", "tcgen05", "tma", "cp_async")
    lines: list[tuple[str, ...]] = [("kernel", "chip", "builds", "regs", "spill", "shared", "of", *counts, "")]
    groups: dict[Any, list[dict[str, Any]]] = {}
    for r in results:
        groups.setdefault((r["kernel"], r["chip"], r["what"] if every else ""), []).append(r)
    for (kernel, chip, what), group in groups.items():
        fine = [r for r in group if "error" not in r]
        cells = [""] * 9
        if fine:
            cells = [_most(fine, name) for name in ("registers", "spill_bytes", "shared_bytes")]
            cells += [str(fine[0]["shared_limit"]), *(_span(fine, name) for name in counts)]
        lines.append((kernel, chip, str(len(group)), *cells, what if fine else "does not compile"))
    return screen.lines(lines, left=(0, 1, len(lines[0]) - 1))


def _most(results: Sequence[dict[str, Any]], field: str) -> str:
    known = [r[field] for r in results if r[field] is not None]
    return str(max(known)) if len(known) == len(results) else "?"


def _span(results: Sequence[dict[str, Any]], field: str) -> str:
    low, high = min(r[field] for r in results), max(r[field] for r in results)
    return str(low) if low == high else f"{low}-{high}"


def _heading(jobs: Sequence[Job]) -> str:
    tool = "" if cuobjdump() else "; no cuobjdump was found: registers and spills are unknown"
    return f"triton {_triton_version()}: {len(jobs)} builds of {len({j.name for j in jobs})} kernels{tool}"


def _triton_version() -> str:
    import triton

    return triton.__version__


def _again(args: argparse.Namespace) -> int:
    """The same command in a process whose Triton compiles: kernels become interpreted ones where they are decorated."""
    command = ["--processes", str(args.processes)]
    for name in ("shapes", "tokens", "passes", "dtypes", "formats"):
        if getattr(args, name):
            command += [f"--{name}", *map(str, getattr(args, name))]
    command += ["--chips", *(c.name for c in args.chips)] if args.chips else []
    for name in ("limit", "cache", "json"):
        if getattr(args, name) is not None:
            command += [f"--{name}", str(getattr(args, name))]
    command += ["--all"] if args.all else []
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    code = "import argparse, sys; from headgate.bench.children import tidy_on_sigterm; tidy_on_sigterm(); "
    code += "from headgate.bench.gpu.compile import add_arguments, run; "
    code += "parser = argparse.ArgumentParser(); add_arguments(parser); sys.exit(run(parser.parse_args()))"
    return children.run([sys.executable, "-P", "-c", code, *command], env)
