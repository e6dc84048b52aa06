"""`headgate convert MODEL [MODEL ...] OUT`: a MoE model out of a dense one, or out of several."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ..bench.arguments import number, seed, whole
from ..bench.machine import need
from ..bench.screen import Bar, Screen
from ..moe.offload.arena import parse_size

METHODS = ("copy", "granular", "activations", "merge")
CLASSES = ("mixtral", "qwen2_moe", "qwen3_moe", "flex_olmo")
_SEQUENCE, _MOST = 256, 512  # tokens of a calibration sequence, and how many of them at most


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `headgate convert`."""
    add = parser.add_argument
    add("model", type=Path, nargs="+", metavar="MODEL", help="folder of a dense transformers model; several to merge")
    add("output", type=Path, metavar="OUT", help="the folder to write, new or empty")
    add("--experts", type=whole, metavar="E", help="experts of a layer (default: 8; merge: the number of models)")
    add("--top-k", type=whole, default=2, metavar="K", help="experts of a token (default: %(default)s)")
    about = "how experts are made (default: merge for several models, else copy)"
    add("--method", choices=METHODS, help=about)
    add("--to", choices=CLASSES, help="the MoE class, where there is a choice (default: by the model)")
    about = "layers that get experts, such as 1,3,5-9 (default: all)"
    add("--layers", type=_layers, metavar="LIST", help=about)
    add("--shards", type=whole, metavar="G", help="granular: parts that the FFN is cut into (default: 8)")
    add("--scaling", choices=("down", "nvidia"), help="granular: what is multiplied with G (default: down)")
    add("--noise", type=number, metavar="X", help="copy, granular: noise in standard deviations (default: 0)")
    add("--router-std", type=number, metavar="X", help="of new router weights (default: the config's)")
    add("--text", type=Path, metavar="FILE", help="activations: text to calibrate with")
    add("--keep", type=number, metavar="X", help="activations: share of neurons that an expert keeps (default: 0.5)")
    add("--pregate", action="store_true", help="activations: the first router learns for all layers")
    add("--seed", type=seed, default=0, metavar="S", help="of routers, noise and clusters (default: %(default)s)")
    add("--shard", type=_size, default="5GB", metavar="X", help="most bytes of a file (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Writes the folder; 0."""
    need("convert", "transformers", "hf")
    from ..moe.convert.convert import convert

    method = args.method or ("merge" if len(args.model) > 1 else "copy")
    options: dict[str, Any] = {
        "shards": args.shards, "scaling": args.scaling, "noise": args.noise, "keep": args.keep,
        "pregate": args.pregate or None,
    }  # fmt: skip
    options = {name: value for name, value in options.items() if value is not None}
    if args.text is not None:
        options["calibration"] = _calibration(args.model[0], args.text)
    screen, bars = Screen(), list[Bar]()
    with ExitStack() as stack:

        def tell(done: int, total: int) -> None:
            if not bars:
                bars.append(stack.enter_context(screen.bar(total)))
            bars[0].update(done, "tensors")

        try:
            convert(
                args.model if len(args.model) > 1 else args.model[0], args.output, experts=args.experts,
                top_k=args.top_k, method=method, to=args.to, layers=args.layers, router_std=args.router_std,
                seed=args.seed, shard=args.shard, tell=tell, **options,
            )  # fmt: skip
        except TypeError as error:  # an option of another method
            raise ValueError(str(error)) from error
    size = sum(file.stat().st_size for file in args.output.glob("*.safetensors"))
    screen.say(f"wrote {args.output}, {size / 1e9:.3g} GB")
    return 0


def _calibration(model: Path, text: Path) -> Any:
    """Token ids [B, S] of the beginning of a text, by the model's tokenizer."""
    import torch
    import transformers

    from ..placement.careful import read_regular

    if not model.is_dir():
        raise ValueError(f"convert: MODEL must be a folder, got {model}")
    said = read_regular(text, "convert", 1 << 30).decode(errors="replace")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(model, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of many types, by what is there
        raise ValueError(f"convert: MODEL must have a tokenizer for --text, got {model} ({error})") from error
    ids = tokenizer(said[: 16 * _SEQUENCE * _MOST], return_tensors="pt").input_ids[0]
    count = min(len(ids) // _SEQUENCE, _MOST)
    if not count:
        raise ValueError(f"convert: --text must have at least {_SEQUENCE} tokens, got {len(ids)} in {text}")
    return torch.as_tensor(ids[: count * _SEQUENCE]).view(count, _SEQUENCE)


def _layers(text: str) -> list[int]:
    """ "1,3,5-9" -> numbers."""
    found: list[int] = []
    for part in text.split(","):
        begin, dash, end = part.strip().partition("-")
        fine = all(n.isascii() and n.isdecimal() and len(n) < 6 for n in (begin, end if dash else begin))
        if not fine or (dash and int(end) < int(begin)):
            raise argparse.ArgumentTypeError(f"must be numbers of layers such as 1,3,5-9, got {text!r}")
        found += range(int(begin), int(end if dash else begin) + 1)
    return found


def _size(text: str) -> int:
    """Bytes."""
    try:
        return parse_size(text, "")
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).strip()) from error
