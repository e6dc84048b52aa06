"""Who takes part: Headgate's dispatchers, and the rivals of rivals.py. A new one is a builder and a line in the table.

A builder makes of a World the contestant's step on this rank: a function (x, ids, weights) -> y, and the two expert
weights that this rank holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn

from ...dispatch import AllGather, AllToAll, Dispatcher, Hierarchical, SliceAllReduce
from ...moe import Experts
from ..check import TOLERANCE
from ..shapes import DTYPES, as_routing
from . import rivals
from .rivals import Step
from .volume import Movement
from .world import World

# Largest difference allowed of a whole step, relative to the largest entry; rows are rounded up to twice each way.
LOSSY = {"bf16": 2e-2, "fp8": 0.2, "int8": 5e-2}


@dataclass(frozen=True)
class Contestant:
    """`shared`: all ranks have the same G*T tokens; else each has its own T. `wire`: the format of its rows."""

    about: str
    build: Callable[[World, str], Step]
    movements: Callable[[World, str], list[Movement]]
    shared: bool = False
    wire: str = "exact"

    def step(self, world: World) -> Step:
        return self.build(world, self.wire)

    def moves(self, world: World) -> list[Movement]:
        return self.movements(world, self.wire)

    def tolerance(self, dtype: str) -> float:
        return max(TOLERANCE[dtype], LOSSY.get(self.wire, 0.0))


def _headgate(make: Callable[[World, str], Dispatcher]) -> Callable[[World, str], Step]:
    def build(world: World, wire: str) -> Step:
        s, p = world.shape, world.problem.parameters
        dispatcher = make(world, wire)
        layer = Experts(s.experts, s.hidden, s.intermediate, dispatcher=dispatcher, dtype=DTYPES[world.dtype])
        layer.w_gate_up = nn.Parameter(p["gate_up_proj"].detach()[world.held])
        layer.w_down = nn.Parameter(p["down_proj"].detach()[world.held])

        def forward(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            return layer(x, as_routing(s, ids, weights))

        return Step(forward, layer.w_gate_up, layer.w_down)

    return build


def _row_bytes(world: World, wire: str) -> int:
    d = world.shape.hidden
    return {"exact": d * world.problem.x.element_size(), "bf16": 2 * d, "fp8": d + 4, "int8": d + 4}[wire]


def _messages(way: str) -> Callable[[World, str], list[Movement]]:
    """A row with its ids and weights there, a row back; in the backward pass the weights' gradients go home."""

    def movements(world: World, wire: str) -> list[Movement]:
        row, k, w = _row_bytes(world, wire), world.shape.top_k, world.problem.x.element_size()
        return [Movement(way, (row + k * (4 + w), row), (row, row + k * w))]

    return movements


def _fp32_sums(world: World, wire: str) -> list[Movement]:
    """An all-reduce of y, then one of the gradients of x and of the weights."""
    both = (4 * world.shape.hidden, 4 * (world.shape.hidden + world.shape.top_k))
    return [Movement("everyone", both, both)]


CONTESTANTS: Mapping[str, Contestant] = {
    "all_to_all": Contestant(
        "headgate: Experts with AllToAll",
        _headgate(lambda world, wire: AllToAll(wire=wire, backward_wire=wire)),
        _messages("ranks"),
    ),
    "hierarchical": Contestant(
        "headgate: Experts with Hierarchical",
        _headgate(
            lambda world, wire: Hierarchical(None, world.layout.ranks_per_node, wire=wire, backward_wire=wire),
        ),
        _messages("levels"),
    ),
    "all_gather": Contestant(
        "headgate: Experts with AllGather",
        _headgate(lambda world, wire: AllGather(wire=wire, backward_wire=wire)),
        _messages("everyone"),
    ),
    "plain": Contestant(
        "hand-written all-to-all, one row per (token, expert) pair, as torchtitan does it", rivals.plain, rivals.pairs
    ),
    "hf_all_to_all": Contestant(
        "transformers' expert parallelism, all_to_all, each rank with its own tokens",
        rivals.transformers("all_to_all", shared=False),
        rivals.pairs,
    ),
    "slice_all_reduce": Contestant(
        "headgate: Experts with SliceAllReduce, the batch on every rank",
        _headgate(lambda world, wire: SliceAllReduce()),
        _fp32_sums,
        shared=True,
    ),
    "hf_all_reduce": Contestant(
        "transformers' expert parallelism, all_reduce, the batch on every rank",
        rivals.transformers("all_reduce", shared=True),
        rivals.reduced,
        shared=True,
    ),
    "hf_shared_all_to_all": Contestant(
        "transformers' expert parallelism, all_to_all, the batch on every rank: its default in training",
        rivals.transformers("all_to_all", shared=True),
        rivals.sliced,
        shared=True,
    ),
}
WIRED = ("all_to_all", "hierarchical", "all_gather")
TRANSFORMERS = tuple(name for name in CONTESTANTS if name.startswith("hf_"))


def find(name: str, table: Mapping[str, Contestant] = CONTESTANTS) -> Contestant:
    """By name, which may end in a wire format: "all_to_all/bf16"."""
    base, _, wire = name.partition("/")
    return replace(table[base], wire=wire) if wire else table[base]


def with_wires(names: list[str], wires: list[str]) -> list[str]:
    """The names, each that knows wire formats followed by itself with each of them."""
    found = []
    for name in names:
        found += [name, *(f"{name}/{w}" for w in wires if name in WIRED)]
    return found
