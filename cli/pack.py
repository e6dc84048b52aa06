"""`headgate pack MODEL OUT`: the experts of a checkpoint into one file, in few bits if wished."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from pathlib import Path

from ..bench.arguments import output_file
from ..bench.light import import_models
from ..bench.machine import need
from ..bench.screen import Bar, Screen
from ..kernels.quantized import FORMATS
from ..moe.offload.arena import parse_size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `headgate pack`."""
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL", help="a model folder with safetensors files, or a GGUF file")
    about = "the file to write, for headgate.load(MODEL, disk=OUT); a name in .gguf: a GGUF file, the whole model"
    add(
        "--config",
        type=Path,
        metavar="DIR",
        help="of a GGUF file: a folder with config.json (default: what the file says)",
    )
    add("output", type=output_file, metavar="OUT", help=about)
    add("--formats", choices=FORMATS, help="the format of all experts (default: as they are)")
    add("--max-memory", type=_size, metavar="X", help="bytes that experts may take on the way, such as 2GiB")


def run(args: argparse.Namespace) -> int:
    """Writes the file; 0."""
    need("pack", "transformers", "hf")
    if args.alone:
        import_models()
    from ..moe.offload.pack import pack
    from .loading import check_config

    check_config(args.model, args.config, "pack")

    screen, bars = Screen(), list[Bar]()
    with ExitStack() as stack:

        def tell(done: int, total: int) -> None:
            if not bars:
                bars.append(stack.enter_context(screen.bar(total)))
            bars[0].update(done, "experts")

        pack(args.model, args.output, config=args.config, formats=args.formats, max_memory=args.max_memory, tell=tell)
    screen.say(f"wrote {args.output}, {args.output.stat().st_size / 1e9:.3g} GB")
    return 0


def _size(text: str) -> int:
    """Bytes."""
    try:
        return parse_size(text, "")
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).strip()) from error
