"""What other programs record, read into a Trace, or into Statistics where there are counts only.

| file | holds |
|---|---|
| common.py | a recording opened by its kind, and a Trace or Statistics made of what was found |
| torch_file.py, parquet_rows.py | tensors out of torch.save's files, without torch; parquet, by a process of its own |
| sglang.py, vllm.py, router_logits.py, llama_cpp.py, flame_moe.py, esft.py, eplb.py, counts.py | one format each |
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..file import TraceFile
from ..statistics import Statistics
from ..trace import Trace
from . import counts, eplb, esft, flame_moe, llama_cpp, router_logits, sglang, vllm
from .common import Found, Options, open_recording


@dataclass(frozen=True)
class Reader:
    """`fits`: whether a recording looks like this format; `read`: it, or a ValueError that says why not."""

    about: str
    fits: Callable[[Found], bool]
    read: Callable[[Found, Options], Trace | Statistics]


READERS = {
    "sglang": Reader("SGLang's expert distribution recorder, .pt", sglang.fits, sglang.read),
    "vllm": Reader("routed_experts as vLLM returns them, .npy, .npz, .json, .jsonl", vllm.fits, vllm.read),
    "router-logits": Reader("transformers' router_logits, .pt, .npz", router_logits.fits, router_logits.read),
    "counts": Reader("choices of each layer and expert counted, layer,expert,count, .csv", counts.fits, counts.read),
    "llama.cpp": Reader("llama-moe-trace's CSV", llama_cpp.fits, llama_cpp.read),
    "flame-moe": Reader("FLAME-MoE's routing traces, a folder of .parquet", flame_moe.fits, flame_moe.read),
    "esft": Reader("ESFT's expert scores, a folder of .txt", esft.fits, esft.read),
    "eplb": Reader("the weights [L, E] that EPLB takes, .pt, .npy, .npz, .json: loads only", eplb.fits, eplb.read),
}


def convert(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    format: str | None = None,
    *,
    top_k: int | None = None,
    num_experts: int | None = None,
    max_tokens: int | None = None,
    tell: Callable[[str], None] | None = None,
    max_bytes: int | None = None,
) -> TraceFile:
    """`read`, written to the trace file `output`, whole or not at all. FLAME-MoE's traces are streamed.

    Raises what `read` raises, and ValueError where the recording holds loads only.
    """
    options = Options(top_k, num_experts, max_tokens, tell or (lambda line: None), max_bytes)
    found = open_recording(Path(path), max_bytes)
    with found.file.watched("a recording"):
        name = _format(found, format)
        trace = None if name == "flame-moe" else READERS[name].read(found, options)
    if trace is None:
        return flame_moe.write(found, options, output)
    if not isinstance(trace, Trace):
        raise ValueError(f"convert: {path} must hold the choices of tokens to become a trace, got loads only")
    trace.save(output)
    return TraceFile(output)


def read(
    path: str | os.PathLike[str],
    format: str | None = None,
    *,
    top_k: int | None = None,
    num_experts: int | None = None,
    max_tokens: int | None = None,
    tell: Callable[[str], None] | None = None,
    max_bytes: int | None = None,
) -> Trace | Statistics:
    """What another program recorded, whole in memory.

    format       a name in READERS; None: told by what the file holds
    top_k        K, where the recording does not say it (router logits; llama.cpp without decoding)
    num_experts  E, where it does not (None: one more than the largest id)
    max_tokens   read no more than the first so many
    tell         called with a line where something is worth knowing, such as how many tokens came from where
    max_bytes    memory that the file may fill (None: four times its size, or 64 MB)

    Raises OSError where it is missing or may not be read; ValueError naming file, field, rule and value, where the
    format cannot be told, the content is not what it should be, an id is out of range, or an option is missing;
    RuntimeError where a package is missing.

    >>> trace = read("expert_distribution_recorder_1764088000.5_0.pt")
    """
    options = Options(top_k, num_experts, max_tokens, tell or (lambda line: None), max_bytes)
    found = open_recording(Path(path), max_bytes)
    with found.file.watched("a recording"):
        return READERS[_format(found, format)].read(found, options)


def _format(found: Found, format: str | None) -> str:
    if format is None:
        format = next((name for name, reader in READERS.items() if reader.fits(found)), None)
        found.rule(format is not None, "content", f"in a format of {', '.join(READERS)}", "something else")
    if format not in READERS:
        raise ValueError(f"read: format must be one of {', '.join(READERS)}, got {format!r}")
    return format
