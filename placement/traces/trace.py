"""A routing trace: which experts every token went to, layer by layer, and the `.npz` file that keeps it."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..files import write_whole

VERSION = 1
# what reading an archive of arrays that is damaged, or lies about its sizes, may raise
BROKEN = (
    OSError, ValueError, KeyError, AttributeError, TypeError, EOFError, MemoryError, RuntimeError, OverflowError,
    zipfile.BadZipFile, zlib.error,
)  # fmt: skip


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
        ids = self.expert_ids
        _rule(ids.dtype.kind == "u", "expert_ids", "unsigned integers", ids.dtype, TypeError)
        _rule(ids.ndim == 3, "expert_ids", "[L, T, K]", ids.shape)
        layers, tokens, _ = ids.shape
        _rule(0 < self.num_experts <= self.none, "num_experts", f"1 .. {self.none} for {ids.dtype}", self.num_experts)
        live = ids[self.live]
        _rule(
            not live.size or int(live.max()) < self.num_experts,
            "expert_ids",
            f"below num_experts={self.num_experts}, or {self.none} for none",
            int(live.max()) if live.size else None,
        )
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
            live = self.expert_ids[layer][self.live[layer]]
            worst = int(live.max()) if live.size else -1
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
    def load(cls, path: str | os.PathLike[str]) -> Trace:
        """Reads a trace file. Fields that are not the format's are ignored.

        Raises FileNotFoundError, or ValueError naming the file and what is wrong with it.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                found = {name: file[name] for name in file.files if name in _FIELDS}
        except FileNotFoundError:
            raise
        except BROKEN as error:
            raise ValueError(f"Trace: {path} must be an .npz file of numeric arrays, got {error}") from error
        missing = {"expert_ids", "num_experts"} - found.keys()
        if missing:
            raise ValueError(f"Trace: {path} must hold {' and '.join(sorted(missing))}, got {sorted(found)}")
        version = int(found.get("version", VERSION))
        if version != VERSION:
            raise ValueError(f"Trace: version of {path} must be {VERSION}, got {version}")
        try:
            return cls(
                expert_ids=found["expert_ids"],
                num_experts=int(found["num_experts"]),
                weights=found.get("weights"),
                sequence=found.get("sequence"),
                layer_names=tuple(str(name) for name in found.get("layer_names", ())),
                experts_of_layer=found.get("experts_of_layer"),
                version=version,
            )
        except (ValueError, TypeError) as error:
            raise ValueError(f"{error} (in {path})") from error


_FIELDS = {"version", "num_experts", "expert_ids", "weights", "sequence", "layer_names", "experts_of_layer"}


def _rule(holds: bool, field: str, rule: str, value: object, kind: type[Exception] = ValueError) -> None:
    if not holds:
        raise kind(f"Trace: {field} must be {rule}, got {value}")
