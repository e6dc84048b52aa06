"""What parallelize was told of the ways of rows, and the dispatchers that come of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from math import gcd
from typing import Any

import torch.distributed as dist

from ...dispatch import (
    DISPATCHERS,
    ENGINES,
    AllGather,
    DeepEP,
    Dispatcher,
    Fold,
    Hierarchical,
    Overlap,
    SliceAllReduce,
    measure,
)
from ...dispatch.wire import Wires
from ...placement.cluster.links import Links
from ..losses import TokenRanks

ACTIVATIONS = ("sharded", "replicated")
ADAPT_EVERY = 100  # calls between two looks at what "auto" goes by
Make = Callable[[dist.ProcessGroup], Dispatcher]


@dataclass(frozen=True)
class Choice:
    """What parallelize was told of the ways of rows."""

    fold: Fold
    dispatcher: str | Make | None
    activations: str
    wire: str | tuple[str, str]
    backward_wire: str | tuple[str, str]
    ranks_per_node: int | None
    max_tokens: int | None
    overlap: Overlap | None = None
    buffers: dict[tuple[int, int], Any] = field(default_factory=dict)  # DeepEP's, by D and K

    def options(self) -> dict[str, object]:
        """What all ranks must have chosen alike."""
        named = "a function" if callable(self.dispatcher) else self.dispatcher
        said = {f: getattr(self, f) for f in ("activations", "wire", "backward_wire", "max_tokens")}
        said["overlap"] = None if self.overlap is None else self.overlap.degree
        return {"dispatcher": named, **said, "ranks_per_node": self._ranks_per_node()}

    def check(self) -> None:
        if self.activations not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise ValueError(f"parallelize: activations must be one of {known}, got {self.activations!r}")
        named, s = self.dispatcher, self.fold.sizes
        names = [name for name in (*DISPATCHERS, *ENGINES) if name != "local"]
        if isinstance(named, str) and named not in names:
            rule = f"one of {', '.join(names)}, a function or None"
            raise ValueError(f"parallelize: dispatcher must be {rule}, got {named!r}")
        if not (named is None or isinstance(named, str) or callable(named)):
            raise TypeError(f"parallelize: dispatcher must be a name, a function of a group or None, got {named!r}")
        if isinstance(named, str) and self.replicated != (named == "slice_all_reduce"):
            rule = "slice_all_reduce for replicated activations and only then"
            raise ValueError(f"parallelize: dispatcher must be {rule}, got {named!r} for {self.activations} ones")
        if self.replicated and s.ep * s.etp != s.tp:
            raise ValueError(
                "parallelize: activations='replicated' must come with ep * etp == tp, "
                f"got ep={s.ep} etp={s.etp} tp={s.tp}: shard the sequences over tp instead"
            )
        per_node = self.ranks_per_node
        if per_node is not None and (not isinstance(per_node, int) or per_node < 1):
            raise ValueError(f"parallelize: ranks_per_node must be a positive integer or None, got {per_node!r}")
        Wires.of("parallelize", self.wire, self.backward_wire)
        if not isinstance(self.overlap, Overlap | None):
            raise TypeError(f"parallelize: overlap must be an Overlap, its degree or None, got {self.overlap!r}")
        if self.overlap is not None and named in ("auto", *ENGINES):
            raise ValueError(f"parallelize: overlap must be None with dispatcher={named!r}, got {self.overlap}")
        self._check_engine()

    def _check_engine(self) -> None:
        if self.engine is None:
            if self.max_tokens is not None:
                rule = "come with dispatcher='deep_ep' only"
                raise ValueError(f"parallelize: max_tokens must {rule}, got {self.max_tokens}")
            return
        beside = f"with dispatcher={self.dispatcher!r}"
        for name in ("wire", "backward_wire"):
            if getattr(self, name) != "exact":
                raise ValueError(f"parallelize: {name} must be 'exact' {beside}, got {getattr(self, name)!r}")
        if self.max_tokens is None:
            rule = f"given {beside}, the most tokens of a rank in one call"
            raise ValueError(f"parallelize: max_tokens must be {rule}, got None")
        why = self.engine.why_not()
        if why is not None:
            raise ValueError(f"parallelize: dispatcher={self.dispatcher!r} cannot run here: {why}")

    @property
    def engine(self) -> type[DeepEP] | None:
        return ENGINES.get(self.dispatcher) if isinstance(self.dispatcher, str) else None

    @property
    def replicated(self) -> bool:
        return self.activations == "replicated"

    def links(self) -> Links | None:
        """What "auto" goes by, measured once for all layers."""
        if self.dispatcher != "auto" or self.fold.size("ep") == 1:
            return None
        return measure(Hierarchical(self.fold.group("ep"), self._ranks_per_node()), device=self.fold.device_type)

    def of(self, name: str, hidden_size: int, top_k: int, links: Links | None) -> Make:
        """The function from the ep group to the dispatcher of a layer, `name` telling it from others."""
        if callable(self.dispatcher):
            return self.dispatcher
        per_node = self._ranks_per_node()
        kind = self.dispatcher or self._default(top_k, per_node)
        if kind == "slice_all_reduce":
            return partial(SliceAllReduce, name=name)
        if self.engine is not None:
            return partial(self._engine, self.engine, name, hidden_size, top_k)
        options: dict[str, Any] = {"wire": self.wire, "backward_wire": self.backward_wire, "name": name}
        if kind in ("hierarchical", "auto"):
            options["ranks_per_node"] = per_node
        if kind == "auto":
            options |= {"links": links, "every": ADAPT_EVERY}
        return partial(DISPATCHERS[kind], **options)

    def _engine(
        self, engine: type[DeepEP], name: str, hidden_size: int, top_k: int, group: dist.ProcessGroup
    ) -> DeepEP:
        assert self.max_tokens is not None
        sizes: dict[str, Any] = {"max_tokens": self.max_tokens, "hidden_size": hidden_size, "top_k": top_k}
        made = engine(group, **sizes, buffer=self.buffers.get((hidden_size, top_k)), name=name)
        self.buffers[hidden_size, top_k] = made.buffer
        return made

    def inner(self, name: str) -> Make:
        """The same for ranks that hold slices of the same experts."""
        if self.replicated:
            return partial(SliceAllReduce, sliced=True, name=name)
        return partial(AllGather, sliced=True, wire=self.wire, backward_wire=self.backward_wire, name=name)

    def _default(self, top_k: int, per_node: int) -> str:
        if self.replicated:
            return "slice_all_reduce"
        ep = self.fold.size("ep")
        if 1 < per_node < ep:
            return "hierarchical"
        return "all_gather" if top_k > ep else "all_to_all"

    def _ranks_per_node(self) -> int:
        """How many ranks of an ep group share a node."""
        ep, etp = self.fold.size("ep"), self.fold.size("etp")
        node = self.ranks_per_node or int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
        return gcd(max(node // etp, 1), ep)

    def token_ranks(self) -> TokenRanks:
        f = self.fold
        names = ("dp", "cp") if self.replicated else ("dp", "cp", "tp")
        return TokenRanks(f.group(*names), f.size("dp", "cp"), f.group(*names[1:]))
