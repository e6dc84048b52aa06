"""A transformers model folder and a text become a trace file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...bench.corpus import read_corpus
from ...bench.screen import Bar, Screen
from ...moe.record import record
from ...placement.traces.file import TraceFile
from ..demo.model import quiet

BLOCK = 1 << 20  # characters that are made tokens at a time
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def recorded(args: argparse.Namespace) -> TraceFile:
    """Streams the trace to --output. Raises ValueError where model, tokenizer or text cannot be used."""
    screen = Screen(out=sys.stderr if args.json else sys.stdout)
    model, tokenizer = _load(args.model)
    tokens, passes = args.tokens or 20_000, Passes(args.text, tokenizer, args.length, args.batch)
    how = "its tokenizer" if tokenizer is not None else "bytes, as the folder has no tokenizer"
    screen.say(f"{type(model).__name__} from {args.model}, {tokens:,} tokens of {passes.source} ({how})")

    def batches(bar: Bar) -> Iterator[Tensor]:
        seen = 0
        for batch in passes:
            yield batch
            seen += batch.numel()
            bar.update(min(seen, tokens), "tokens")

    with quiet(), screen.bar(tokens) as bar:
        return record(
            model,
            batches(bar),
            weights=args.weights,
            max_tokens=tokens,
            sample=args.sample,
            seed=args.seed,
            path=args.output or Path("trace.npz"),
        )


def _load(folder: str) -> tuple[nn.Module, Any]:
    """The model, on a GPU where there is one, and its tokenizer or None."""
    import transformers

    path = Path(folder)
    if not (path / "config.json").is_file():
        raise ValueError(f"trace: MODEL must be the folder of a transformers model, with its config.json, got {folder}")
    try:
        with quiet():
            model = transformers.AutoModelForCausalLM.from_pretrained(path, local_files_only=True, dtype="auto")
            there = any((path / name).exists() for name in TOKENIZER)
            tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True) if there else None
    except Exception as error:  # whatever another library says of a stranger's files
        raise ValueError(f"trace: MODEL must be a folder that transformers can load, got {folder}: {error}") from error
    words = int(model.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]
    if tokenizer is None and words < 256:
        raise ValueError(f"trace: MODEL must have a tokenizer, or a vocabulary of 256 bytes at least, got {words}")
    here = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return nn.Module.to(model, here), tokenizer


class Passes:
    """Batches int64 [B, length] of a text's tokens in order, the last rows shorter. `text` None: Python's library."""

    def __init__(self, text: Path | None, tokenizer: Any, length: int, batch: int) -> None:
        self.text, self.tokenizer, self.length, self.batch = text, tokenizer, length, batch
        self.corpus = read_corpus(None, length, who="trace") if text is None else None
        self.source = self.corpus.source if self.corpus else str(text)
        if text is not None and not text.is_file():
            raise ValueError(f"trace: --text must be a file that can be read, got {text}")

    def __iter__(self) -> Iterator[Tensor]:
        left: list[int] = []
        for block in self._blocks():
            if self.tokenizer is None:
                left += list(block.encode("utf-8", "surrogateescape"))
            else:
                left += self.tokenizer(block, add_special_tokens=False)["input_ids"]
            size = self.length * self.batch
            whole = len(left) // size * size
            yield from torch.tensor(left[:whole], dtype=torch.int64).view(-1, self.batch, self.length)
            left = left[whole:]
        rows = len(left) // self.length
        if rows:
            yield torch.tensor(left[: rows * self.length]).view(rows, self.length)
        if left[rows * self.length :]:
            yield torch.tensor([left[rows * self.length :]])

    def _blocks(self) -> Iterator[str]:
        if self.corpus is not None:
            yield self.corpus.held_out.tobytes().decode("utf-8", "surrogateescape")
            yield self.corpus.train.tobytes().decode("utf-8", "surrogateescape")
            return
        assert self.text is not None
        with self.text.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
            while block := file.read(BLOCK):
                yield block
