"""Values of a checkpoint that are no tensors: as JSON and the tensors in it, so that reading them runs nothing.

    None, bool, int, float, text, lists, dicts with text keys    as JSON has them
    anything else                                                {"$kind": ...}, the kinds of _encode below

The JSON is kept as a tensor of bytes under `key`, tensor i of the value under `key#i`.
"""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_DEEPEST = 100
_RULE = (
    "must be None, a bool, a number, text, bytes, a strided tensor, an array of numbers, "
    "or a list, tuple or dict of these"
)


def pack(key: str, value: Any, what: str) -> dict[str, Tensor]:
    """The entries of a value. Raises ValueError with the path in `what` of what cannot be kept."""
    tensors: list[Tensor] = []
    text = json.dumps(_encode(value, what, tensors, _DEEPEST), separators=(",", ":")).encode()
    entries = {key: torch.frombuffer(bytearray(text), dtype=torch.uint8)}
    return entries | {f"{key}#{i}": t for i, t in enumerate(tensors)}


def entries_of(key: str, saved: Mapping[str, Any]) -> Iterator[str]:
    """The keys of a value's entries in a checkpoint."""
    start = f"{key}#"
    return (name for name in saved if name == key or (name.startswith(start) and name[len(start) :].isdecimal()))


def unpack(key: str, entries: Mapping[str, Tensor]) -> Any:
    """The value. Raises ValueError where the entries are not what `pack` makes."""
    try:
        return _decode(json.loads(entries[key].numpy().tobytes()), key, entries)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{key} must be JSON as save_checkpoint writes it, got {type(error).__name__}") from error


def _encode(x: Any, path: str, tensors: list[Tensor], left: int) -> Any:
    if not left:
        raise ValueError(f"{path.split('[')[0]} must be nested at most {_DEEPEST} deep")
    kind = type(x)
    if x is None or kind in (bool, int, float, str):
        return x
    if kind is list:
        return [_encode(v, f"{path}[{i}]", tensors, left - 1) for i, v in enumerate(x)]
    if kind in (tuple, torch.Size):
        return {"$tuple": [_encode(v, f"{path}[{i}]", tensors, left - 1) for i, v in enumerate(x)]}
    if isinstance(x, dict) and kind.__name__ in ("dict", "OrderedDict"):
        values = [_encode(v, f"{path}[{k!r}]", tensors, left - 1) for k, v in x.items()]
        if all(type(k) is str and not k.startswith("$") for k in x):
            return dict(zip(x, values, strict=True))
        return {"$dict": [[_key(k, path), v] for k, v in zip(x, values, strict=True)]}
    if kind is Counter:  # the milestones of MultiStepLR
        return {"$counter": [[_key(k, path), _encode(v, f"{path}[{k!r}]", tensors, left - 1)] for k, v in x.items()]}
    if kind is bytes:
        return {"$bytes": base64.b64encode(x).decode()}
    if kind in (Tensor, nn.Parameter):
        if x.layout != torch.strided or x.is_quantized:
            raise ValueError(f"{path} {_RULE}, got {x.layout if x.layout != torch.strided else x.dtype}")
        return {"$tensor": _add(tensors, x.detach().cpu())}
    if isinstance(x, np.generic) or kind is np.ndarray:
        try:
            return {"$array": _add(tensors, torch.from_numpy(np.array(x, x.dtype.newbyteorder("="))))}
        except (TypeError, ValueError):
            raise ValueError(f"{path} {_RULE}, got an array of {x.dtype}") from None
    raise ValueError(f"{path} {_RULE}, got {kind.__name__}")


def _key(k: Any, path: str) -> Any:
    if k is not None and type(k) not in (bool, int, float, str):
        raise ValueError(f"{path}: keys of dicts must be text or numbers, got {type(k).__name__}")
    return k


def _add(tensors: list[Tensor], t: Tensor) -> int:
    tensors.append(t)
    return len(tensors) - 1


def _decode(x: Any, key: str, entries: Mapping[str, Tensor]) -> Any:
    if isinstance(x, list):
        return [_decode(v, key, entries) for v in x]
    if not isinstance(x, dict):
        return x
    if not any(k.startswith("$") for k in x):
        return {k: _decode(v, key, entries) for k, v in x.items()}
    ((kind, inner),) = x.items()
    if kind == "$tuple":
        return tuple([_decode(v, key, entries) for v in inner])
    if kind in ("$dict", "$counter"):
        found = {k: _decode(v, key, entries) for k, v in inner}
        return found if kind == "$dict" else Counter(found)
    if kind == "$bytes":
        return base64.b64decode(inner, validate=True)
    if kind in ("$tensor", "$array"):
        t = entries[f"{key}#{inner:d}"]
        return t if kind == "$tensor" else t.numpy()[() if not t.dim() else ...]
    raise ValueError(f"unknown kind {kind}")
