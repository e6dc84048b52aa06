"""From the command line to the trace file."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ...bench.arguments import input_file, number, positive, seed
from ...bench.machine import must_fit, need
from ...bench.screen import Screen
from ...placement.traces.file import TraceFile
from ...placement.traces.generate import like_deepseek_v2_lite
from ...placement.traces.readers import READERS, convert, read
from ...placement.traces.statistics import Statistics
from .summary import loads, show, summary


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help="record: the folder of a transformers MoE model, with its weights")
    add("--text", type=Path, metavar="FILE", help="what it reads (default: Python's own library)")
    add("--tokens", type=positive, metavar="N", help="how many tokens (default: 20000; of --from: all)")
    add("--length", type=positive, metavar="N", default=512, help="of a sequence (default: %(default)s)")
    add("--batch", type=positive, metavar="N", default=4, help="sequences to a pass (default: %(default)s)")
    add("--sample", type=number, metavar="X", default=1.0, help="the share of sequences to keep (default: all)")
    add("--weights", action="store_true", help="keep the router's weights too")
    add("--seed", type=seed, metavar="S", default=0, help="of samples, generated and dealt out (default: %(default)s)")
    add("--from", dest="source", type=input_file, metavar="FILE", help="convert what another program recorded")
    add("--format", choices=READERS, help="of --from (default: told by what the file holds)")
    add("--top-k", type=positive, metavar="K", help="of --from, where it does not say itself")
    add("--experts", type=positive, metavar="E", help="of --from, where it does not say itself")
    add("--generate", action="store_true", help="a synthetic trace, like one of DeepSeek-V2-Lite on two tasks")
    add("--show", type=input_file, metavar="TRACE", help="what a trace says: loads, affinity between layers")
    add("--against", type=input_file, metavar="TRACE", help="with --show: the drift from there to another trace")
    add("--output", type=Path, metavar="TRACE", help="the trace file to write, .npz (default for MODEL: trace.npz)")
    add("--json", action="store_true", help="print the figures as JSON on standard output, all else on standard error")


def run(args: argparse.Namespace) -> int:
    """Exit status 0; raises ValueError on bad usage, OSError and RuntimeError where it cannot be done."""
    found = _found(args)
    show(found, Screen(out=sys.stderr if args.json else sys.stdout))
    if args.json:
        print(json.dumps(found))
    return 0


def _found(args: argparse.Namespace) -> dict[str, Any]:
    asked = {"MODEL": args.model, "--from": args.source, "--generate": args.generate, "--show": args.show}
    given = [name for name, value in asked.items() if value]
    if len(given) != 1:
        raise ValueError(f"trace: one of {', '.join(asked)} must be given, got {' and '.join(given) or 'none'}")
    if args.against is not None and not args.show:
        raise ValueError(f"trace: --against must come with --show, got {args.against} without it")
    if args.output is not None and args.output.suffix != ".npz":
        raise ValueError(f"trace: --output must end in .npz, got {args.output}")
    if args.show:
        if args.output is not None:
            raise ValueError(f"trace: --output must not come with --show, got {args.output}")
        return _shown(args)
    told: list[str] = []
    if args.source:
        made = _converted(args, told)
        if isinstance(made, Statistics):
            return loads(made, str(args.source)) | {"told": told}
    elif args.generate:
        output = args.output or Path("trace.npz")
        must_fit("trace: --tokens", 200.0 * (args.tokens or 0))  # 26 layers, 6 experts to a token
        like_deepseek_v2_lite(args.tokens or 20_000, args.seed).save(output)
        made = TraceFile(output)
    else:
        need("trace", "transformers", "hf")
        from .recording import recorded

        made = recorded(args)
    with made:
        return summary(made, args.seed) | {"told": told}


def _shown(args: argparse.Namespace) -> dict[str, Any]:
    with TraceFile(args.show) as trace:
        if args.against is None:
            return summary(trace, args.seed)
        with TraceFile(args.against) as other:
            return summary(trace, args.seed, other)


def _converted(args: argparse.Namespace, told: list[str]) -> TraceFile | Statistics:
    """The recording that the options name; `told` receives what its reader has to say."""
    options = {"top_k": args.top_k, "num_experts": args.experts, "max_tokens": args.tokens, "tell": told.append}
    if args.output is None:
        found = read(args.source, args.format, **options)
        if isinstance(found, Statistics):
            return found
        raise ValueError(f"trace: --output must be given for a trace of tokens, got none for {args.source}")
    return convert(args.source, args.output, args.format, **options)
