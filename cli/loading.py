"""A model for the commands that answer prompts: the options of `headgate.load`, the model, its tokenizer."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..bench.arguments import device, input_file, positive, workers
from ..bench.light import import_engine, import_models
from ..bench.machine import need

PREFETCH = ("gate", "path", "none")
CONFIG = "of a GGUF file: a folder with config.json, and tokenizer if it has one (default: what the file says)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, and how it is loaded."""
    from ..kernels.quantized import FORMATS
    from ..placement.caching.names import NAMES, NEED_TRACE

    add = parser.add_argument
    add("model", type=Path, metavar="MODEL", help="a transformers model folder with safetensors files, or a GGUF file")
    add("--config", type=Path, metavar="DIR", help=CONFIG)
    add("--budget", default="8GiB", metavar="X", help="memory for experts, such as 4GiB or 25%% (default 8GiB)")
    add("--formats", choices=FORMATS, help="experts in few bits, in a file under --disk (default: as they are)")
    add("--disk", type=Path, metavar="DIR", help="a folder for the experts file, or the file that headgate pack wrote")
    add("--policy", choices=NAMES, default="adaptive", help="which expert goes (default adaptive)")
    add("--prefetch", choices=PREFETCH, default="gate", help="what foretells the next experts (default gate)")
    words = ", ".join(NEED_TRACE)
    add("--trace", type=input_file, metavar="FILE", help=f"a trace of this model, to learn from; for {words} and path")
    add("--device", type=device, default="cpu", help="where to compute: cpu, cuda, cuda:1 (default cpu)")
    add("--readers", type=positive, metavar="N", help="threads that read experts (default 2)")
    add("--no-page-cache", action="store_true", help="leave no copies of what was read in the system's page cache")
    add("--threads", type=workers, metavar="N", help="threads that compute (default: as torch chooses)")


TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


@dataclass(frozen=True)
class Loaded:
    """A model with its experts elsewhere, and what turns text into tokens; `load_s`: seconds that it took."""

    model: Any
    offloaded: Any
    tokenizer: Any
    load_s: float

    @property
    def longest(self) -> int | None:
        """Tokens that the model can see, as its config says; None where it does not say."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)


def tokenizer_of(model: Path, who: str, config: Path | None = None) -> Any:
    """The tokenizer in a model's folder or GGUF file, or beside the `config` of one. Raises ValueError where there is
    none that transformers can read."""
    from transformers import AutoTokenizer

    if not model.exists():
        raise ValueError(f"{who}: MODEL must be a transformers model folder or a GGUF file, got {model}")
    gguf = check_config(model, config, who)
    folder, where = model, dict[str, Any]()
    if gguf and config is not None and any((config / name).is_file() for name in TOKENIZERS):
        folder = config
    elif gguf:
        from ..moe.offload.gguf_file import first_of

        file = first_of(model)
        folder, where = file.parent, {"gguf_file": file.name}
    elif model.is_file():
        raise ValueError(f"{who}: MODEL must be a transformers model folder or a GGUF file, got the file {model}")
    try:
        found = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **where)
        if not set(found.get_vocab()) - set(found.all_special_tokens):  # transformers makes one of no file at all
            raise ValueError("no tokenizer files, or some without a vocabulary")
        return found
    except Exception as error:  # a stranger's files in another library: whatever it says
        said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        hint = " (--config DIR may hold one)" if where else ""
        raise ValueError(f"{who}: MODEL must have a tokenizer that transformers can read, got {said}{hint}") from error


def check_config(model: Path, config: Path | None, who: str) -> bool:
    """Whether a model is a GGUF file, or a folder with one. Raises ValueError where --config is no folder, or comes
    with another kind of model; RuntimeError where what reads such files is not installed."""
    from ..moe.offload.gguf_file import gguf_in

    gguf = gguf_in(model)
    if config is not None and not gguf:
        raise ValueError(f"{who}: --config must come with a GGUF file, got {model}")
    if config is not None and not config.is_dir():
        raise ValueError(f"{who}: --config must be a folder with config.json, got {config}")
    if gguf:
        need(who, "gguf", "gguf")
    return gguf


@contextmanager
def opened(args: argparse.Namespace, tokenizer: Any) -> Iterator[Loaded]:
    """The model of a command line, for the length of a `with`. A person who watches sees a bar. Raises as
    `headgate.load`."""
    import torch
    from transformers.utils import logging

    from ..moe.offload.load import load
    from ..placement.traces.trace import Trace

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    logging.disable_progress_bar()
    trace = None if args.trace is None else Trace.load(args.trace)
    began = time.perf_counter()
    with _bars() as tell:
        model, offloaded = load(
            args.model, args.budget, args.policy, None if args.prefetch == "none" else args.prefetch, args.disk,
            config=args.config, formats=args.formats, device=args.device, trace=trace, readers=args.readers,
            page_cache=not args.no_page_cache, tell=tell,
        )  # fmt: skip
    try:
        yield Loaded(model, offloaded, tokenizer, time.perf_counter() - began)
    finally:
        offloaded.close()


@contextmanager
def _bars() -> Iterator[Any]:
    """What `load` tells, as bars on standard error, where that is a terminal."""
    from ..bench.screen import Bar, Screen

    screen, under_way = Screen(sys.stderr), dict[str, Bar]()
    with ExitStack() as stack:

        def tell(what: str, done: int, total: int) -> None:
            if not sys.stderr.isatty():
                return
            if what not in under_way:
                stack.close()  # one bar at a time
                under_way[what] = stack.enter_context(screen.bar(total))
            under_way[what].update(done, what)

        yield tell


def check_extras(who: str) -> None:
    """Raises RuntimeError where transformers is not installed."""
    need(who, "transformers", "hf")


def begin(args: argparse.Namespace) -> None:
    """Imports torch, transformers and the engine: in a process of the command's own, no more of them than it takes."""
    if args.alone:
        import_models(gpu=args.device != "cpu")
        import_engine()
