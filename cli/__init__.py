"""The `headgate` command: one thin function per subcommand, no logic of its own.

Exit status: 0 done; 1 the thing asked failed; 2 bad usage; 130 interrupted with Ctrl-C.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from .. import __version__

DEMO = """\
Trains a small transformers MoE language model (about 20 million parameters, random weights) on real text: swaps its
experts for Headgate's, shows how little the numbers change and how much the speed does, records where tokens go, and
writes model, trace.npz, metrics.json and report.html. Needs no network. Ctrl-C keeps what there is.
"""
DEMO_EXAMPLE = """examples:
  headgate demo
  headgate demo --text moby-dick.txt --steps 300 --output whale
"""
TRAIN = """\
Trains the demo's model on real text over all ranks that torchrun started (without it: one), under any fold of data,
context, tensor, expert and pipeline parallelism. The losses are those of one process, up to rounding.
"""
TRAIN_EXAMPLE = """examples:
  headgate train --steps 20
  torchrun --nproc-per-node 4 --no-python headgate train --fold dp=2,tp=2,ep=4
  torchrun --nproc-per-node 4 --no-python headgate train --fold pp=2,cp=2,ep=2 --checkpoint run --every 50
"""
TRACE = """\
Records which experts the tokens of a transformers MoE model choose, converts what SGLang, vLLM, transformers, llama.cpp
and others recorded, and shows what a trace says. A trace is an .npz file; it is streamed, never whole in memory.
"""
TRACE_EXAMPLE = """examples:
  headgate trace ./OLMoE-1B-7B --text book.txt --tokens 50000 --output olmoe.npz
  headgate trace --from expert_distribution_recorder_1764088000.5_0.pt --output served.npz
  headgate trace --show olmoe.npz --against served.npz
"""
DOCTOR_EXAMPLE = """examples:
  headgate doctor
  headgate doctor ./OLMoE-1B-7B        the folder of a transformers model; only its config.json is read
"""
BENCH_EXAMPLE = """examples:
  headgate bench moe --quick
  headgate bench --gpu-report
  headgate bench compile --chips sm_90 --shapes qwen3
"""
# name -> (module of its options and its run, what it is)
BENCHMARKS = {
    "moe": ("..bench.moe", "the expert layer beside its rivals"),
    "quantized": ("..bench.quantized", "decoding with weights in int8, int4 and mxfp4 beside bf16 and fp32"),
    "dispatch": ("..bench.dispatch.command", "the dispatchers beside rivals, on gloo ranks of this machine"),
    "compile": ("..bench.gpu.compile", "every GPU kernel built ahead of time, without a GPU"),
    "roofline": ("..bench.gpu.roofline", "FLOPs, bytes and floor time of every launch"),
    "sweep": ("..bench.gpu.sweep", "the chosen tiles beside all others, on a GPU"),
    "placement": (
        "..bench.placement",
        "placements beside EPLB: crossings, load, rows that move, bounds, replicas, drift",
    ),
    "offload": (
        "..bench.offload",
        "expert caches beside Belady, predictors, prefetch, and generation with experts on disk",
    ),
    "links": ("..bench.links", "the links behind published tables, and which dispatcher wins where"),
}


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


def _demo(args: argparse.Namespace) -> int:
    """The tour; with --json its figures go to standard output and everything else to standard error."""
    _need("transformers", "demo", "hf")
    from .demo import Options, run
    from .screen import Screen

    options = Options(text=args.text, output=args.output, steps=args.steps, seed=args.seed)
    tour = run(options, Screen(out=sys.stderr if args.json else sys.stdout))
    if args.json:
        print(json.dumps(tour.metrics))
    return 130 if tour.interrupted else 0


def _train(args: argparse.Namespace) -> int:
    """The demo's model over many ranks; with --json its figures go to standard output, all else to standard error."""
    _need("transformers", "train", "hf")
    from .train import run

    return run(args)


def _trace(args: argparse.Namespace) -> int:
    """A trace recorded, converted or shown; with --json the figures go to standard output."""
    if args.model:
        _need("transformers", "trace", "hf")
    from .trace import run

    return run(args)


def _place(args: argparse.Namespace) -> int:
    """A placement from a trace; with --json its figures go to standard output, all else to standard error."""
    from .place import run

    return run(args)


def _cache(args: argparse.Namespace) -> int:
    """Cache policies on a trace; with --json the figures go to standard output, all else to standard error."""
    from .cache import run

    return run(args)


def _doctor(args: argparse.Namespace) -> int:
    """What this machine can run."""
    from .doctor import run

    return run(args.model, args.json)


def _bench(args: argparse.Namespace) -> int:
    """A benchmark by its name, or the report on a GPU."""
    if args.benchmark is None and not args.gpu_report:
        args.refuse(f"one of --gpu-report and {', '.join(BENCHMARKS)} must be given")
    where = "..bench.gpu.report" if args.benchmark is None else BENCHMARKS[args.benchmark][0]
    return importlib.import_module(where, __package__).run(args)


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
    tour.set_defaults(call=_demo)

    training = _command(add, "train", help="the same model over many ranks", description=TRAIN, epilog=TRAIN_EXAMPLE)
    if argv[:1] == ["train"]:  # the options name the model's sizes, which loads torch: not for `headgate --help`
        importlib.import_module(".train", __package__).add_arguments(training)
    training.set_defaults(call=_train)

    tracing = _command(add, "trace", help="where tokens go", description=TRACE, epilog=TRACE_EXAMPLE)
    if argv[:1] == ["trace"]:  # the options name the formats, which loads numpy
        importlib.import_module(".trace", __package__).add_arguments(tracing)
    tracing.set_defaults(call=_trace)

    about = "Which GPU each expert should live on, layer by layer: a placement with its cost and a proved bound."
    placing = _command(add, "place", help="experts to GPUs, by a trace", description=about)
    if argv[:1] == ["place"]:
        importlib.import_module(".place", __package__).add_arguments(placing)
    placing.set_defaults(call=_place)

    about = "What a cache of experts would hit on a trace, by every policy, beside Belady's optimum."
    caching = _command(add, "cache", help="caches of experts, by a trace", description=about)
    if argv[:1] == ["cache"]:
        importlib.import_module(".cache", __package__).add_arguments(caching)
    caching.set_defaults(call=_cache)

    about = "What this machine can run; with MODEL, what the swap takes of it, and the calls that really ran."
    check = _command(add, "doctor", help="what this machine can run", description=about, epilog=DOCTOR_EXAMPLE)
    check.add_argument("model", nargs="?", metavar="MODEL", help="a transformers model folder, or its config.json")
    check.add_argument("--json", action="store_true", help="print the findings as JSON")
    check.set_defaults(call=_doctor)

    about = "Micro-benchmarks beside whatever rivals are installed."
    benches = _command(add, "bench", help="micro-benchmarks", description=about, epilog=BENCH_EXAMPLE)
    benches.add_argument(
        "--gpu-report", action="store_true", help="measure everything on this machine's GPU, in minutes"
    )
    kinds = benches.add_subparsers(title="benchmarks", metavar="BENCHMARK", dest="benchmark")
    # a benchmark's options name shapes and rivals, which loads torch: not for `headgate --help`
    asked = argv[1:] if argv[:1] == ["bench"] else ()
    for name, (module, about) in BENCHMARKS.items():
        sub = _command(kinds.add_parser, name, help=about, description=f"{about[0].upper()}{about[1:]}.")
        if name in asked:
            importlib.import_module(module, __package__).add_arguments(sub)
    if asked and not set(BENCHMARKS) & set(asked):
        importlib.import_module("..bench.gpu.report", __package__).add_arguments(benches)
    benches.set_defaults(call=_bench, refuse=benches.error)
    return parser


def _command(make, *args, **more) -> argparse.ArgumentParser:
    return make(*args, formatter_class=argparse.RawDescriptionHelpFormatter, **more)


def _need(package: str, subcommand: str, extra: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise RuntimeError(f"{subcommand}: needs {package}, which is not installed: pip install 'headgate[{extra}]'")


def _one_line(error: Exception) -> str:
    """The message without line breaks; an error that says nothing is named."""
    return " ".join(str(error).split()) or type(error).__name__
