"""The `headgate` command: one thin function per subcommand, no logic of its own.

Exit status: 0 done; 1 the thing asked failed; 2 bad usage; 130 interrupted with Ctrl-C.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from . import __version__

DEMO = """\
Trains a small transformers MoE language model (about 20 million parameters, random weights) on real text: swaps its
experts for Headgate's, shows how little the numbers change and how much the speed does, records where tokens go, and
writes model, trace.npz, metrics.json and report.html. Needs no network. Ctrl-C keeps what there is.
"""
DEMO_EXAMPLE = """examples:
  headgate demo
  headgate demo --text moby-dick.txt --steps 300 --output whale
"""
DOCTOR_EXAMPLE = """examples:
  headgate doctor
  headgate doctor ./OLMoE-1B-7B        the folder of a transformers model; only its config.json is read
"""
BENCH_EXAMPLE = """example:
  headgate bench moe --quick
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns its exit status. `argv` without the program's name; None: sys.argv."""
    args = _parser(sys.argv[1:] if argv is None else argv).parse_args(argv)
    try:
        return args.call(args)
    except KeyboardInterrupt:
        print("headgate: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `headgate doctor | head`
        sys.stdout = None  # type: ignore[assignment]  # or the interpreter complains on its way out
        return 1
    except (ValueError, OSError, RuntimeError) as error:
        print(f"headgate: {_one_line(error)}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1


def demo(args: argparse.Namespace) -> int:
    """The tour; with --json its figures go to standard output and everything else to standard error."""
    _need("transformers", "demo", "hf")
    from .bench.demo import Options, run
    from .bench.demo.screen import Screen

    options = Options(text=args.text, output=args.output, steps=args.steps, seed=args.seed)
    tour = run(options, Screen(out=sys.stderr if args.json else sys.stdout))
    if args.json:
        print(json.dumps(tour.metrics))
    return 130 if tour.interrupted else 0


def doctor(args: argparse.Namespace) -> int:
    """What this machine can run."""
    from .bench.doctor import run

    return run(args.model, args.json)


def bench_moe(args: argparse.Namespace) -> int:
    """The micro-benchmark of the expert layer."""
    from .bench.moe import run

    return run(args)


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    parser = _command(argparse.ArgumentParser, prog="headgate", description="Mixture-of-Experts for PyTorch.")
    parser.add_argument("--version", action="version", version=f"headgate {__version__}")
    commands = parser.add_subparsers(title="subcommands", metavar="SUBCOMMAND", required=True)
    add = commands.add_parser

    tour = _command(add, "demo", help="the tour, on real text", description=DEMO, epilog=DEMO_EXAMPLE)
    tour.add_argument("--text", type=Path, metavar="FILE", help="train on this file (default: Python's own library)")
    tour.add_argument("--output", type=Path, metavar="DIR", default=Path("headgate-demo"), help="default: %(default)s")
    tour.add_argument("--steps", type=int, metavar="N", help="training steps (default: what fits in about 90 s)")
    tour.add_argument("--seed", type=int, default=0, metavar="S", help="default: %(default)s")
    tour.add_argument("--json", action="store_true", help="print the figures as JSON on standard output")
    tour.set_defaults(call=demo)

    about = "What this machine can run; with MODEL, what the swap takes of it, and the calls that really ran."
    check = _command(add, "doctor", help="what this machine can run", description=about, epilog=DOCTOR_EXAMPLE)
    check.add_argument("model", nargs="?", metavar="MODEL", help="a transformers model folder, or its config.json")
    check.add_argument("--json", action="store_true", help="print the findings as JSON")
    check.set_defaults(call=doctor)

    about = "Micro-benchmarks beside whatever rivals are installed."
    benches = _command(add, "bench", help="micro-benchmarks", description=about, epilog=BENCH_EXAMPLE)
    kinds = benches.add_subparsers(title="benchmarks", metavar="BENCHMARK", required=True)
    moe = _command(kinds.add_parser, "moe", help="the expert layer", description="Headgate's expert layer and rivals.")
    if "bench" in argv:  # its options name shapes and rivals, which loads torch: not for `headgate --help`
        from .bench.moe import add_arguments

        add_arguments(moe)
    moe.set_defaults(call=bench_moe)
    return parser


def _command(make, *args, **more) -> argparse.ArgumentParser:
    return make(*args, formatter_class=argparse.RawDescriptionHelpFormatter, **more)


def _need(package: str, subcommand: str, extra: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise RuntimeError(f"{subcommand}: needs {package}, which is not installed: pip install 'headgate[{extra}]'")


def _one_line(error: Exception) -> str:
    """The message without line breaks; an error that says nothing is named."""
    return " ".join(str(error).split()) or type(error).__name__
