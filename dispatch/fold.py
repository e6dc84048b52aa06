"""Parallel folding: the same ranks seen twice, as the attention's (dp, cp, tp) and as the experts' (edp, ep, etp)."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from math import log, prod

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from . import collectives
from .agreement import disagreement
from .rollcall import time_out

ATTENTION = ("dp", "cp", "tp")
EXPERTS = ("edp", "ep", "etp")


@dataclass(frozen=True)
class Sizes:
    """The six degrees and the stages of a fold: numbers only, checked.

    Rank = ((pp * DP + dp) * CP + cp) * TP + tp = ((pp * EDP + edp) * EP + ep) * ETP + etp: tensor parallelism takes
    neighbours on both sides, and a pipeline stage is the same ranks on both (Liu et al., MoE Parallel Folding, 2025).
    """

    dp: int
    cp: int
    tp: int
    edp: int
    ep: int
    etp: int
    pp: int = 1

    @classmethod
    def of(cls, attention: Mapping[str, int], experts: Mapping[str, int], pp: int, world: int) -> Sizes:
        """From a Fold's arguments; a name that is left out is 1. Raises ValueError / TypeError, see Fold."""
        for what, names, given in (("attention", ATTENTION, attention), ("experts", EXPERTS, experts)):
            if set(given) - set(names):
                raise ValueError(f"Fold: {what} must name {', '.join(names)} only, got {', '.join(given)}")
        sizes = {name: attention.get(name, 1) for name in ATTENTION} | {name: experts.get(name, 1) for name in EXPERTS}
        for name, size in (*sizes.items(), ("pp", pp)):
            if not hasattr(size, "__index__"):
                raise TypeError(f"Fold: {name} must be an integer, got {size!r}")
            if size < 1:
                raise ValueError(f"Fold: {name} must be at least 1, got {size}")
        new = cls(**sizes, pp=pp)
        left, right = prod(new.attention), prod(new.experts)
        if left != right:
            raise ValueError(
                f"Fold: dp * cp * tp must equal edp * ep * etp, got {new}, which is {left} and {right}; "
                f"possible: {_listed(new.nearest(world))}"
            )
        if left * pp != world:
            raise ValueError(
                f"Fold: pp * dp * cp * tp must be the world's {world} ranks, got {new}, which is {left * pp}; "
                f"possible: {_listed(new.nearest(world))}"
            )
        return new

    @property
    def attention(self) -> tuple[int, int, int]:
        return self.dp, self.cp, self.tp

    @property
    def experts(self) -> tuple[int, int, int]:
        return self.edp, self.ep, self.etp

    @property
    def stage(self) -> int:
        """Ranks of a pipeline stage."""
        return prod(self.attention)

    def __str__(self) -> str:
        named = [f"{n}={getattr(self, n)}" for n in (*ATTENTION, *EXPERTS)] + ([f"pp={self.pp}"] if self.pp > 1 else [])
        return " ".join(named)

    def nearest(self, world: int, count: int = 3) -> list[Sizes]:
        """The possible folds of `world` ranks that are fewest doublings away from these sizes, best first."""
        pp = self.pp if world % self.pp == 0 else 1

        def away(other: tuple[int, int, int], mine: tuple[int, int, int]) -> float:
            return sum(abs(log(a / b)) for a, b in zip(other, mine, strict=True))

        def best(mine: tuple[int, int, int]) -> list[tuple[float, tuple[int, int, int]]]:
            found = [(away(t, mine), t) for t in triples(world // pp)]
            return sorted(found, key=lambda f: (f[0], [-n for n in f[1]]))[:count]  # of equals, more data parallelism

        both = [(a + e, at, et) for a, at in best(self.attention) for e, et in best(self.experts)]
        both.sort(key=lambda b: b[0])
        return [Sizes(*at, *et, pp) for _, at, et in both[:count]]

    def ranks(self, names: tuple[str, ...]) -> torch.Tensor:
        """int64, one dimension for each of `names` and before them one for each group of such ranks.

        >>> Sizes(dp=2, cp=1, tp=2, edp=1, ep=4, etp=1).ranks(("dp",))  # the groups of ranks that differ in dp alone
        tensor([[0, 2],
                [1, 3]])
        """
        side = ATTENTION if set(names) <= {"pp", *ATTENTION} else EXPERTS
        order = ("pp", *side)
        grid = torch.arange(self.pp * self.stage).view(*(getattr(self, n) for n in order))
        others = [d for d, n in enumerate(order) if n not in names]
        grid = grid.permute(*others, *(order.index(n) for n in names))
        return grid.reshape(-1, *(getattr(self, n) for n in names))


def triples(product: int) -> Iterator[tuple[int, int, int]]:
    """All (a, b, c) with a * b * c == product."""
    for a in range(1, product + 1):
        if product % a == 0:
            for b in range(1, product // a + 1):
                if product // a % b == 0:
                    yield a, b, product // a // b


class Fold:
    """Attention over dp x cp x tp and experts over edp x ep x etp, on the same ranks of each of `pp` pipeline stages.

        dp    data parallel: other sequences               edp   expert data parallel: copies of the experts
        cp    context parallel: parts of the sequences     ep    expert parallel: E / ep experts to a rank
        tp    tensor parallel: parts of heads, F           etp   expert tensor parallel: F / etp of each expert

    Every combination with dp * cp * tp == edp * ep * etp is possible; a name that is left out is 1. tp and etp take
    neighbouring ranks, so that they stay within a node where they fit.

    `attention` and `experts` are DeviceMeshes of this rank's stage, ("dp", "cp", "tp") and ("ep", "edp", "etp"), for
    parallelize_module, FSDP2 and DTensors; `group(*names)` is the process group of the ranks that differ in those
    names alone, `size(*names)` and `rank(*names)` its size and this rank's place in it. Groups of the same ranks are
    made once.

    device_type  the device that the groups work on; None: the accelerator that torch sees, else "cpu"
    timeout      of the groups made here; None: that of the default group
    like         another fold, whose groups are used again where they are of the same ranks

    Every rank must make the same folds in the same order. Raises ValueError where the ranks ask for different ones
    (with rank and name, on every rank), where the sizes do not fit (with the rule and the nearest folds that do), and
    where torch.distributed is not initialised; TypeError where a size is no integer.

    >>> fold = headgate.Fold(attention=dict(dp=2, tp=2), experts=dict(ep=4))  # under torchrun --nproc-per-node 4
    >>> fold.size("dp"), fold.group("ep").size()
    (2, 4)
    """

    def __init__(
        self,
        attention: Mapping[str, int] | None = None,
        experts: Mapping[str, int] | None = None,
        pp: int = 1,
        *,
        device_type: str | None = None,
        timeout: timedelta | None = None,
        like: Fold | None = None,
    ) -> None:
        if not dist.is_initialized():
            raise ValueError("Fold: torch.distributed must be initialised (torchrun, init_process_group), got none")
        if device_type is None:
            device_type = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"  # type: ignore[union-attr]
        _agree({**(attention or {}), **(experts or {}), "pp": pp}, device_type)
        self.sizes = Sizes.of(attention or {}, experts or {}, pp, dist.get_world_size())
        self.device_type, self._timeout = device_type, timeout or time_out(dist.group.WORLD)  # type: ignore[arg-type]
        self._groups: dict[tuple[int, ...], dist.ProcessGroup] = {} if like is None else like._groups
        self._by_name: dict[tuple[str, ...], dist.ProcessGroup] = {}
        self.attention = self._mesh(*ATTENTION)
        self.experts = self._mesh("ep", "edp", "etp")
        for names in ((*ATTENTION,), ("dp", "cp"), ("cp", "tp"), ("ep", "etp"), ("pp",)):
            self.group(*names)

    @staticmethod
    def possible(world: int, pp: int = 1) -> Iterator[Sizes]:
        """The sizes of every fold of `world` ranks in `pp` stages; none where pp does not divide them."""
        if world % pp:
            return
        for attention in triples(world // pp):
            for experts in triples(world // pp):
                yield Sizes(*attention, *experts, pp)

    @classmethod
    def of(cls, sizes: Sizes, **options) -> Fold:
        attention = {n: getattr(sizes, n) for n in ATTENTION}
        return cls(attention, {n: getattr(sizes, n) for n in EXPERTS}, sizes.pp, **options)

    def over_tp(self) -> Fold:
        """The same ranks for experts that every token goes to: cut over tp, and alike on all others. The ranks of a
        stage must come by."""
        s, twin = self.sizes, copy.copy(self)
        twin.sizes, twin._by_name = replace(s, edp=s.dp * s.cp, ep=1, etp=s.tp), {}
        twin.experts = twin._mesh("ep", "edp", "etp")
        return twin

    def apart(self) -> Fold:
        """The same ranks in groups of their own, which are made as they are asked for: for transfers beside others."""
        twin = copy.copy(self)
        twin._groups, twin._by_name = {}, {}
        return twin

    @property
    def stage(self) -> int:
        """Which pipeline stage this rank belongs to."""
        return dist.get_rank() // self.sizes.stage

    def group(self, *names: str) -> dist.ProcessGroup:
        """The group of the ranks that differ from this one in `names` alone, in the order of their ranks."""
        if names in self._by_name:
            return self._by_name[names]
        for side in (ATTENTION, EXPERTS):
            if names and set(names) <= {"pp", *side}:
                break
        else:
            known = f"names out of pp, {', '.join(ATTENTION)}, or out of pp, {', '.join(EXPERTS)}"
            raise ValueError(f"Fold: group must be asked for by {known}, got {', '.join(map(str, names)) or 'none'}")
        rank = dist.get_rank()
        for ranks in self.sizes.ranks(names).flatten(1).sort(1).values.tolist():
            if rank in ranks:
                self._by_name[names] = self._group(ranks)
                return self._by_name[names]
        raise AssertionError(f"rank {rank} is in no group of {names}")

    def _group(self, ranks: list[int]) -> dist.ProcessGroup:
        if tuple(ranks) not in self._groups:
            self._groups[tuple(ranks)] = dist.new_group(ranks, timeout=self._timeout, use_local_synchronization=True)
        return self._groups[tuple(ranks)]

    def blocks(self, name: str, count: int) -> dist.ProcessGroup:
        """The `count` neighbours in group(name) that this rank stands among."""
        ranks, at = dist.get_process_group_ranks(self.group(name)), self.rank(name)
        return self._group(ranks[at - at % count : at - at % count + count])

    def strided(self, name: str, step: int) -> dist.ProcessGroup:
        """Every `step`-th rank of group(name), this one among them: with blocks(name, step) they make up the group."""
        return self._group(dist.get_process_group_ranks(self.group(name))[self.rank(name) % step :: step])

    def size(self, *names: str) -> int:
        return self.group(*names).size()

    def rank(self, *names: str) -> int:
        return self.group(*names).rank()

    def flat(self, *names: str) -> DeviceMesh:
        """The ranks of group(*names) as a mesh of one dimension, for FSDP2."""
        return DeviceMesh.from_group(self.group(*names), self.device_type, mesh_dim_names=("_".join(names),))

    def _mesh(self, *names: str) -> DeviceMesh:
        ranks = self.sizes.ranks(names)
        mine = next(r for r in ranks if dist.get_rank() in r)
        groups = [self.group(name) for name in names]
        return DeviceMesh.from_group(groups, self.device_type, mesh=mine, mesh_dim_names=names)

    def __deepcopy__(self, memo: object) -> Fold:
        return self  # groups cannot be copied, and need not be

    def __repr__(self) -> str:
        return f"Fold({self.sizes})"


def _agree(asked: Mapping[str, int], device_type: str) -> None:
    """Raises ValueError on every rank where they ask for different folds: no group is made by some of them only."""
    names = (*ATTENTION, *EXPERTS, "pp")
    sizes = [asked.get(name, 1) for name in names]
    mine = torch.tensor([[s if hasattr(s, "__index__") else -1 for s in sizes]], device=device_type)
    everybody = collectives.all_gather(mine, dist.group.WORLD).tolist()  # type: ignore[arg-type]
    field, odd, value, other, common = disagreement(everybody, range(len(everybody)))
    if field:
        got = f"{value} on rank {odd} and {common} on rank {other}"
        raise ValueError(f"Fold: {names[field - 1]} must be the same on every rank, got {got}")


def _listed(sizes: list[Sizes]) -> str:
    return "; ".join(map(str, sizes))
