"""From the command line to the table."""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import asdict
from functools import partial
from pathlib import Path

from .. import machine
from ..arguments import effort, input_file, number, output, workers
from ..output import write_json
from ..placement import table
from ..placement.case import case_of
from ..screen import Screen
from .rows import ROWS, generation

CHECKPOINT = "checkpoint"  # a row that goes alone: it needs no trace
PARTS = ("start", "cold", "pack", "doctor", "decode", "llama", "accelerate", "bits")  # of it, whose module loads torch
EXPERTS = ("qwen3-235b", "olmoe")  # of model.ON_GPU, which loads torch

EXAMPLE = """examples:
  headgate bench offload
  headgate bench offload trace.npz --rows eviction recall prefetch --json figures.json
  headgate bench offload trace.npz --rows generation --threads 1
  headgate bench offload trace.npz --rows generation --device cuda --experts olmoe
  headgate bench offload --rows checkpoint --folder /scratch/bench --threads 1 --json checkpoint.json
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
    rows = f"some of {', '.join(ROWS)} (default: these); or {CHECKPOINT}: a model of 8.7 GB, made on the disk"
    add("--rows", nargs="+", choices=[*ROWS, CHECKPOINT], default=list(ROWS), metavar="ROW", help=rows)
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
    add(
        "--folder",
        type=Path,
        metavar="DIR",
        help="of the row checkpoint: where it is made, and used again (default: in the system's temporary folder)",
    )
    add("--parts", nargs="+", choices=PARTS, metavar="P", help=f"of the row checkpoint: some of {', '.join(PARTS)}")
    add(
        "--scale", type=number, metavar="X", help="of the row checkpoint: its sizes, above 0 and at most 1 (default: 1)"
    )
    add("--remove", action="store_true", help="of the row checkpoint: remove what it made at the end")
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
    if CHECKPOINT in args.rows:
        return _checkpoint(args)
    for name in ("folder", "parts", "scale", "remove"):
        if getattr(args, name) not in (None, False):
            raise ValueError(f"offload: --{name} must come with --rows {CHECKPOINT}, got {' '.join(args.rows)}")
    case = case_of(args.trace)
    rows = ROWS | {"generation": partial(generation, device=args.device, experts=args.experts or EXPERTS[0])}
    found = table.fill(case, args.rows, rows, args.effort, table.screen_for(case, args.json))
    table.write(case, found, args.json)
    return 0


def _checkpoint(args: argparse.Namespace) -> int:
    """The row that makes a model: it goes alone. Its table is printed at the end, figures as they come."""
    if args.rows != [CHECKPOINT] or args.trace is not None or args.device != "cpu":
        raise ValueError(f"offload: --rows {CHECKPOINT} must go alone, on the CPU and without a trace, got {args.rows}")
    scale = 1.0 if args.scale is None else args.scale
    if not 0 < scale <= 1:
        raise ValueError(f"offload: --scale must be above 0 and at most 1, got {scale:g}")
    folder = args.folder or Path(tempfile.gettempdir()) / "headgate-bench-checkpoint"
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"offload: --folder must be a folder, got the file {folder}")
    machine.need("offload", "transformers", "hf")
    from .checkpoint.rows import measure, remove

    screen = Screen(out=sys.stderr if args.json == "-" else sys.stdout)
    screen.say(machine.processor())
    try:
        row = measure(folder, parts=args.parts or PARTS, scale=scale, threads=args.threads, say=screen.say)
    finally:
        if args.remove:
            remove(folder)
    screen.heading(row.title)
    screen.table([row.head, *row.lines], left=(0, 4, 5), rule=True)
    write_json(args.json, {"machine": machine.processor(), "rows": {CHECKPOINT: asdict(row)}})
    return 0
