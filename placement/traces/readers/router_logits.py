"""Router logits as transformers returns them (output_router_logits=True): the choice is the K largest of each row.

.pt    `torch.save(output.router_logits, file)`: a tuple with [tokens, E] (or [B, S, E]) of each layer, None for those
       without experts; or a list of such tuples, one a forward pass; or a dict with either under router_logits
.npz   an array [tokens, E] of each layer, in the order of the file

K must be given. Routers that do more than that, with biases or groups (DeepSeek-V3), choose otherwise.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..trace import Trace
from .common import Found, Options, trace_of


def fits(found: Found) -> bool:
    if isinstance(found.content, dict) and "logical_count" in found.content:
        return False  # a recorder's counts, which may be fractions too
    passes = _passes(found.content)
    return bool(passes) and all(_is_layer(x) for one in passes for x in one) and any(x is not None for x in passes[0])


def read(found: Found, options: Options) -> Trace:
    top_k = options.top_k
    found.rule(top_k is not None, "top_k", "given, for router logits do not say it", None)
    assert top_k is not None
    found.rule(fits(found), "content", "a tuple of logits [tokens, E], or a list of them", type(found.content).__name__)
    passes = _passes(found.content)
    layers = [layer for layer, logits in enumerate(passes[0]) if logits is not None]
    chunks, experts = [], 0
    for number, one in enumerate(passes):
        here = [layer for layer, logits in enumerate(one) if logits is not None]
        found.rule(here == layers, f"pass {number}", f"logits of layers {layers}", here)
        rows = [_rows(found, one[layer], f"pass {number}, layer {layer}") for layer in layers]
        shapes = {r.shape for r in rows}
        found.rule(len(shapes) == 1, f"pass {number}", "of one [tokens, E] in all layers", sorted(shapes))
        experts = experts or rows[0].shape[1]
        found.rule(rows[0].shape[1] == experts, f"pass {number}", f"E={experts} wide as the first", rows[0].shape[1])
        found.rule(top_k <= experts, "top_k", f"at most E={experts}", top_k)
        # stable, so that the lower id wins a tie
        chunks.append(np.stack([np.argsort(-r, axis=1, kind="stable")[:, :top_k] for r in rows]))
    return trace_of(found, np.concatenate(chunks, axis=1), options, layers=layers, num_experts=experts)


def _passes(content: Any) -> list[list[Any]]:
    """[pass][layer] -> logits or None; empty where the content is something else."""
    if isinstance(content, dict) and "router_logits" in content:
        content = content["router_logits"]
    if isinstance(content, dict):
        content = list(content.values())
    if not isinstance(content, list | tuple) or not content:
        return []
    if all(isinstance(one, list | tuple) and one for one in content):
        return [list(one) for one in content]
    return [list(content)]


def _is_layer(x: Any) -> bool:
    return x is None or (isinstance(x, np.ndarray) and x.dtype.kind == "f" and x.ndim in (2, 3))


def _rows(found: Found, logits: NDArray, field: str) -> NDArray[np.float32]:
    flat = logits.reshape(-1, logits.shape[-1])
    return found.array(flat, field, dims=2, kinds="f").astype(np.float32)
