"""routed_experts as vLLM returns them (--enable-return-routed-experts), logical ids of one sequence:

uint8, uint16, int16 or int32 [T - 1, L, K] over prompt and answer; the last token that was sampled is never run. Layers
count those without experts too, which stay 0 throughout and are left out here (where K > 1).

.npy            one sequence, `np.save(file, output.routed_experts)`
.npz            one array for each sequence, in the order of the file
.json, .jsonl   responses of /v1/completions, /v1/chat/completions or /inference/v1/generate, one, a list of them, or
                one a line: choices[i].routed_experts is the base64 text of an .npy file; nested lists are taken as well
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..trace import Trace
from .common import Found, Options, trace_of


def fits(found: Found) -> bool:
    content = found.content
    if isinstance(content, np.ndarray):
        return content.ndim == 3 and content.dtype.kind in "iu"
    arrays = list(content.values()) if isinstance(content, dict) else []
    if arrays and all(isinstance(a, np.ndarray) for a in arrays):
        return all(a.ndim == 3 and a.dtype.kind in "iu" for a in arrays)
    return any(True for _ in _responses(content))


def read(found: Found, options: Options) -> Trace:
    content = found.content
    if isinstance(content, np.ndarray):
        named = [("routed_experts", content)]
    elif isinstance(content, dict) and all(isinstance(a, np.ndarray) for a in content.values()):
        named = list(content.items())
    else:
        named = [(name, _decoded(found, name, value)) for name, value in _responses(content)]
    found.rule(bool(named), "routed_experts", "there in some choice", "none")
    sequences = [found.array(value, name, dims=3) for name, value in named]
    shapes = {s.shape[1:] for s in sequences}
    found.rule(len(shapes) == 1, "routed_experts", "of one [., L, K]", sorted(shapes))
    ids = np.concatenate(sequences).astype(np.int64).transpose(1, 0, 2)
    layers = np.arange(len(ids))
    if ids.shape[2] > 1:
        layers = np.flatnonzero(ids.any(axis=(1, 2)))
    sequence = np.repeat(np.arange(len(sequences)), [len(s) for s in sequences])
    return trace_of(found, ids[layers], options, layers=layers.tolist(), sequence=sequence)


def _responses(content: Any) -> Iterator[tuple[str, Any]]:
    """(where, routed_experts) of each choice that has them."""
    for number, response in enumerate(content if isinstance(content, list) else [content]):
        choices = response.get("choices", [response]) if isinstance(response, dict) else []
        for index, choice in enumerate(choices if isinstance(choices, list) else []):
            if isinstance(choice, dict) and choice.get("routed_experts") is not None:
                yield f"response {number}, choice {index}, routed_experts", choice["routed_experts"]


def _decoded(found: Found, name: str, value: Any) -> NDArray:
    if not isinstance(value, str):
        return found.array(value, name, dims=3)
    try:
        return np.load(io.BytesIO(base64.b64decode(value, validate=True)), allow_pickle=False)
    except (binascii.Error, ValueError, EOFError, OSError) as error:
        raise ValueError(f"read: {name} of {found.path} must be an .npy file in base64, got {error}") from error
