"""From the command line to the table."""

from __future__ import annotations

import argparse
from functools import partial

from ..arguments import effort, input_file, output, workers
from ..placement import table
from ..placement.case import case_of
from .rows import ROWS, generation

EXPERTS = ("qwen3-235b", "olmoe")  # of model.ON_GPU, which loads torch

EXAMPLE = """examples:
  headgate bench offload
  headgate bench offload trace.npz --rows eviction recall prefetch --json figures.json
  headgate bench offload trace.npz --rows generation --threads 1
  headgate bench offload trace.npz --rows generation --device cuda --experts olmoe
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `headgate bench offload`."""
    parser.epilog = EXAMPLE
    add = parser.add_argument
    add(
        "trace",
        nargs="?",
        type=input_file,
        metavar="TRACE",
        help="a file (default: generated like DeepSeek-V2-Lite)",
    )
    add("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW", help=f"some of {', '.join(ROWS)}")
    add("--effort", type=effort, default=1.0, metavar="X", help="of what is repeated (default: 1)")
    add(
        "--threads",
        type=workers,
        metavar="N",
        help="of torch in batching and generation (default: torch's choice)",
    )
    add(
        "--device",
        default="cpu",
        metavar="D",
        help="where generation runs; on cuda experts are in host memory (default: cpu)",
    )
    add(
        "--experts",
        choices=EXPERTS,
        help=f"whose sizes the experts have on cuda (default: {EXPERTS[0]})",
    )
    add("--json", type=output, metavar="FILE", help="write everything to FILE; - for standard output")


def run(args: argparse.Namespace) -> int:
    """Prints the rows as they are done; always 0."""
    if args.threads is not None:
        import torch

        torch.set_num_threads(args.threads)
    if args.device != "cpu":
        import torch

        if args.device != "cuda" or not torch.cuda.is_available():
            raise ValueError(
                f"offload: --device must be cpu, or cuda on a machine with a GPU that torch sees, got {args.device}"
            )
    if args.experts and args.device == "cpu":
        raise ValueError(f"offload: --experts must come with --device cuda, got {args.experts}")
    if args.device != "cpu" and "generation" not in args.rows:
        raise ValueError("offload: --device cuda must come with the row generation, the only one that runs there")
    case = case_of(args.trace)
    rows = ROWS | {"generation": partial(generation, device=args.device, experts=args.experts or EXPERTS[0])}
    found = table.fill(case, args.rows, rows, args.effort, table.screen_for(case, args.json))
    table.write(case, found, args.json)
    return 0
