"""A routing trace: which experts every token went to, layer by layer, and the `.npz` file that keeps it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..careful import Guard, Opened, opened
from ..files import write_whole

VERSION = 1
MOST_LAYERS = 100_000
MOST_EMPTY = 10_000_000  # tokens without choices, which need no bytes


def id_type(num_experts: int) -> np.dtype:
    """The smallest unsigned type that holds the ids 0 .. num_experts - 1 and, above them, the value for "no expert"."""
    for kind in (np.uint8, np.uint16, np.uint32):
        if num_experts <= np.iinfo(kind).max:
            return np.dtype(kind)
    raise ValueError(f"Trace: num_experts must be below 2**32, got {num_experts}")


@dataclass(frozen=True, eq=False)
class Trace:
    """Expert ids [L, T, K] as recorded, L layers in the order in which they ran.

    expert_ids        unsigned [L, T, K]; the largest value of the type means no expert (a dropped token, or the filling
                      of a layer with fewer choices than K)
    num_experts       E, the largest over the layers
    weights           float16 [L, T, K] or None: the router's weights, 0 where there is no expert
    sequence          int32 [T] or None: which sequence a token belongs to; the tokens of one stand together, in order
    layer_names       L names, or empty
    experts_of_layer  int32 [L] or None: E of each layer, where they differ
    version           of the format

    Raises ValueError / TypeError naming field, rule and value where the fields do not fit together.

    >>> ids = np.array([[[0, 2], [1, 2]], [[1, 0], [1, 255]]], dtype=np.uint8)      # L=2, T=2, K=2; one slot is empty
    >>> Trace(ids, num_experts=3).live.sum()
    np.int64(7)
    """

    expert_ids: NDArray[np.unsignedinteger]
    num_experts: int
    weights: NDArray[np.float16] | None = None
    sequence: NDArray[np.int32] | None = None
    layer_names: tuple[str, ...] = ()
    experts_of_layer: NDArray[np.int32] | None = None
    version: int = VERSION

    def __post_init__(self) -> None:
        _rule(self.expert_ids.dtype.kind == "u", "expert_ids", "unsigned integers", self.expert_ids.dtype, TypeError)
        for name in ("expert_ids", "weights", "sequence", "experts_of_layer"):
            value = getattr(self, name)
            if value is not None and not value.dtype.isnative:  # numba cannot tell it from the machine's own order
                object.__setattr__(self, name, value.astype(value.dtype.newbyteorder("=")))
        ids = self.expert_ids
        _rule(ids.ndim == 3, "expert_ids", "[L, T, K]", ids.shape)
        layers, tokens, _ = ids.shape
        _rule(0 < self.num_experts <= self.none, "num_experts", f"1 .. {self.none} for {ids.dtype}", self.num_experts)
        worst = max((_highest(layer, self.none) for layer in ids), default=-1)
        rule = f"below num_experts={self.num_experts}, or {self.none} for none"
        _rule(worst < self.num_experts, "expert_ids", rule, worst)
        if self.weights is not None:
            _rule(self.weights.shape == ids.shape, "weights", f"{ids.shape} as expert_ids", self.weights.shape)
            _rule(self.weights.dtype == np.float16, "weights", "float16", self.weights.dtype, TypeError)
            odd = ~np.isfinite(self.weights)
            _rule(not odd.any(), "weights", "finite", self.weights[odd][0] if odd.any() else None)
        if self.sequence is not None:
            _rule(self.sequence.shape == (tokens,), "sequence", f"[T={tokens}]", self.sequence.shape)
            _rule(self.sequence.dtype == np.int32, "sequence", "int32", self.sequence.dtype, TypeError)
        _rule(len(self.layer_names) in (0, layers), "layer_names", f"{layers} names or none", len(self.layer_names))
        self._check_experts_of_layer()

    def _check_experts_of_layer(self) -> None:
        per_layer = self.experts_of_layer
        if per_layer is None:
            return
        layers = self.expert_ids.shape[0]
        _rule(per_layer.shape == (layers,), "experts_of_layer", f"[L={layers}]", per_layer.shape)
        for layer, experts in enumerate(per_layer.tolist()):
            _rule(0 < experts <= self.num_experts, "experts_of_layer", f"1 .. {self.num_experts}", experts)
            worst = _highest(self.expert_ids[layer], self.none)
            _rule(worst < experts, f"expert_ids of layer {layer}", f"below its {experts} experts", worst)

    @property
    def none(self) -> int:
        """The id that means no expert."""
        return int(np.iinfo(self.expert_ids.dtype).max)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(L, T, K)."""
        return self.expert_ids.shape  # type: ignore[return-value]

    @property
    def live(self) -> NDArray[np.bool_]:
        """bool [L, T, K]: where there is an expert."""
        return self.expert_ids != self.none

    def experts(self, layer: int) -> int:
        """The number of experts of one layer."""
        return self.num_experts if self.experts_of_layer is None else int(self.experts_of_layer[layer])

    def select(self, tokens: slice | NDArray) -> Trace:
        """The trace of some tokens: a slice, a mask bool [T], or their numbers, in that order.

        >>> ids = np.array([[[0], [1], [2]]], dtype=np.uint8)
        >>> Trace(ids, num_experts=3).select(slice(1, None)).expert_ids.ravel()
        array([1, 2], dtype=uint8)
        """
        return replace(
            self,
            expert_ids=self.expert_ids[:, tokens],
            weights=None if self.weights is None else self.weights[:, tokens],
            sequence=None if self.sequence is None else self.sequence[tokens],
        )

    def chunks(self, layer: int) -> Iterator[NDArray[np.unsignedinteger]]:
        """The ids [T, K] of one layer, in one piece: what a TraceFile gives in several."""
        yield self.expert_ids[layer]

    def pairs(self, layer: int) -> Iterator[tuple[NDArray, NDArray]]:
        """The ids [T, K] of `layer` and of `layer + 1`, in one piece."""
        yield self.expert_ids[layer], self.expert_ids[layer + 1]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a compressed `.npz` at exactly `path`, whole or not at all (a temporary file, then a rename).

        Raises OSError where the folder cannot be written or the disk is full; an older file then stays as it was.
        """
        fields: dict[str, object] = {
            "version": np.int64(self.version),
            "num_experts": np.int64(self.num_experts),
            "expert_ids": np.ascontiguousarray(self.expert_ids),  # layer after layer, as TraceFile reads them
        }
        optional = {"weights": self.weights, "sequence": self.sequence, "experts_of_layer": self.experts_of_layer}
        fields |= {name: value for name, value in optional.items() if value is not None}
        if self.layer_names:
            fields["layer_names"] = np.array(self.layer_names, dtype=np.str_)
        write_whole(Path(path), lambda file: np.savez_compressed(file, **fields))  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, max_bytes: int | None = None) -> Trace:
        """Reads a trace file into memory, `max_bytes` at most (None: four times the file, or 64 MB).

        Raises OSError where it is missing or may not be read, or ValueError naming the file and what is wrong with it.
        """
        with opened(path, "Trace", max_bytes) as file:
            found = file.npz(REQUIRED, OPTIONAL)
            experts, version = (scalar(file, found, name) for name in ("num_experts", "version"))
            file.rule(version == VERSION, "version", str(VERSION), version)
            of_layer = found.get("experts_of_layer")
            if of_layer is not None:
                of_layer = file.integers(of_layer, "experts_of_layer", shape=(None,), low=1, high=2**31 - 1)
            check_shape(file, found["expert_ids"].shape)
            names = found.get("layer_names", np.empty(0, np.str_))
            file.rule(names.ndim == 1 and names.dtype.kind == "U", "layer_names", "text [L]", names.dtype)
            try:
                return cls(
                    expert_ids=found["expert_ids"],
                    num_experts=experts,
                    weights=found.get("weights"),
                    sequence=found.get("sequence"),
                    layer_names=tuple(names.tolist()),
                    experts_of_layer=None if of_layer is None else of_layer.astype(np.int32),
                )
            except (ValueError, TypeError) as error:
                raise file.damaged("a trace", str(error).removeprefix("Trace: ")) from error


REQUIRED = {"expert_ids", "num_experts"}
# domain [T] and domain_names say which text a token is of: `domain_of` reads them, a trace has no use for them
OPTIONAL = {"version", "weights", "sequence", "layer_names", "experts_of_layer", "domain", "domain_names"}


def check_shape(file: Guard, shape: tuple[int, ...]) -> None:
    """What loops over [L, T, K] must end: a file of a few bytes could declare 10**18 tokens of no choices."""
    file.rule(len(shape) == 3, "expert_ids", "[L, T, K]", shape)
    file.rule(shape[0] <= MOST_LAYERS, "expert_ids", f"of at most {MOST_LAYERS} layers", shape)
    file.rule(shape[2] > 0 or shape[1] <= MOST_EMPTY, "expert_ids", f"of at most {MOST_EMPTY} tokens at K=0", shape)


def scalar(file: Opened, found: Mapping[str, NDArray], name: str) -> int:
    """One whole number of a trace file."""
    value = found.get(name, np.array(VERSION))
    file.rule(value.shape == () and value.dtype.kind in "iu", name, "one whole number", value)
    return int(value)


def domain_of(path: str | os.PathLike[str], tokens: int) -> NDArray[np.int64] | None:
    """int64 [T]: the array `domain` of a trace file, None where it holds none. Raises as Trace.load."""
    with opened(path, "Trace") as file:
        if "domain" not in file.names(REQUIRED, OPTIONAL):
            return None
        domain = file.npz(REQUIRED, OPTIONAL, only="domain")["domain"]
        file.rule(domain.shape == (tokens,), "domain", f"[T={tokens}]", domain.shape)
        return file.integers(domain.astype(np.int64), "domain", shape=(tokens,), low=-(2**31), high=2**31 - 1)


def _highest(ids: NDArray[np.unsignedinteger], none: int) -> int:
    """The highest expert, -1 where there is none."""
    live = ids != none
    return int(ids.max(where=live, initial=0)) if live.any() else -1


def _rule(holds: bool, field: str, rule: str, value: object, kind: type[Exception] = ValueError) -> None:
    if not holds:
        raise kind(f"Trace: {field} must be {rule}, got {value}")
