"""Ranks train paths apart, and every n steps their modules meet: DiLoCo's outer step, for ranks that come and go."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...dispatch.rollcall import DeadRanks
from .circle import Circle, answer, ask, asked, askers
from .paths import Path, Paths

_WHO = "OuterSync"


class OuterSync:
    """Call `step(path, weight)` after each step of your own optimizer; every `every` steps the ranks meet.

    There, each module moves by the mean of what it moved on the ranks that trained it, weighted by what they trained it
    on, with Nesterov momentum: delta = mean(begin - now), m = momentum * m + delta,
    module = begin - lr * (delta + momentum * m). A module that nobody trained stays.

    paths       the same modules on every rank; all ranks get the first one's weights, or of one that is further
    every       steps between two meetings
    lr, momentum  of the outer step; 1 and 0: plain averages (local SGD)
    patience_s  a rank that is slow meets with fewer steps: it comes after its step once half of the ranks are there,
                and have been for so long
    store, rank  where ranks find each other, and this one's number (default: torch.distributed's own). A process of
                no process group can take part with a store and a number of its own. The store must outlive its ranks
    members     the ranks at the start (default: all of torch.distributed). A rank that is not one of them is let in by
                the others at their next meeting, and waits for it here, at most `timeout_s`
    timeout_s   for which a rank waits in a meeting
    name        of this training in the store: another for each of several

    A rank that dies, or is stopped, is left out with a warning: the others repeat the meeting without it, and `mine` is
    dealt anew. When it goes on it asks to be let in again, and what it did since the last meeting is lost. All ranks
    hold all modules on the host, twice in fp32 (weights of the last meeting, momentum): no module dies with a rank.
    What travels is the modules that were trained, in fp32, over gloo: their parameters. Buffers stay each rank's own.

    A module that has become NaN or Inf on a rank is left out of the mean there, with a warning.

    `round`: meetings so far. `lost`: what was said of ranks that were left out. Raises ValueError naming argument, rule
    and value; TimeoutError where nobody lets this rank in.

    Sources: Douillard et al., DiLoCo (2023), lr 0.7 and momentum 0.9; DiPaCo (2024).

    >>> outer = headgate.OuterSync(paths, every=100)
    >>> for ids in batches:
    ...     path = outer.mine[0]
    ...     loss = cross_entropy(paths(ids, path), ids)
    ...     loss.backward(); inner.step(); inner.zero_grad()
    ...     outer.step(path, weight=ids.numel())
    """

    def __init__(
        self,
        paths: Paths,
        *,
        every: int = 100,
        lr: float = 0.7,
        momentum: float = 0.9,
        patience_s: float = 30.0,
        store: dist.Store | None = None,
        rank: int | None = None,
        members: Sequence[int] | None = None,
        timeout_s: float = 300.0,
        name: str = "paths",
    ) -> None:
        if type(every) is not int or every < 1:
            raise ValueError(f"{_WHO}: every must be a whole number of at least 1, got {every!r}")
        limits = (("lr", lr, 0, 10), ("momentum", momentum, 0, 0.9999), ("patience_s", patience_s, 0, 1e6))
        for option, value, low, high in (*limits, ("timeout_s", timeout_s, 0.1, 1e6)):
            if not low <= value <= high:
                raise ValueError(f"{_WHO}: {option} must be in {low} .. {high:g}, got {value}")
        self.paths, self.every, self.lr, self.momentum = paths, every, lr, momentum
        self.patience_s, self.timeout_s = patience_s, timeout_s
        self.round, self.lost = 0, list[DeadRanks]()
        self._modules = [(i, j) for i, level in enumerate(paths.counts) for j in range(level)]
        self._begin = {at: [p.detach().float().cpu().clone() for p in self._of(at)] for at in self._modules}
        self._momentum = {at: [torch.zeros_like(p) for p in some] for at, some in self._begin.items()}
        self._weight, self._steps = dict.fromkeys(self._modules, 0.0), 0
        self._waiting_since: float | None = None
        store, self.rank, everybody = _place(store, rank, members)
        self._store = dist.PrefixStore(f"headgate/outer/{name}", store)
        self._answered = 0
        if self.rank in everybody:
            self._circle = Circle(self._store, self.rank, everybody, 0, timeout_s)
            self._meet(self._together)
        else:
            self._enter()

    @property
    def members(self) -> tuple[int, ...]:
        return self._circle.members

    @property
    def mine(self) -> list[Path]:
        """The paths of this rank: dealt in turn. Where ranks are more than paths, several have the same one."""
        every, n, me = self.paths.all, len(self.members), self.members.index(self.rank)
        return every[me::n] or [every[me % len(every)]]

    def step(self, path: Sequence[int], weight: float = 1.0) -> bool:
        """Says that `path` was trained for a step here, on so much (tokens, documents). Meets where it is time, and
        says whether it did."""
        if not 0 < weight < float("inf"):
            raise ValueError(f"{_WHO}: weight must be positive and finite, got {weight}")
        self.paths.model(path)  # it is one
        for at in enumerate(path):
            self._weight[at] += weight
        self._steps += 1
        if self._steps < self.every and not self._awaited():
            return False
        self.meet()
        return True

    def meet(self) -> None:
        """Meets now; the others come when they have done their steps, or after `patience_s`."""
        self._check_finite()
        self._store.add(self._key(), 1)
        self._meet(self._exchange)
        self._steps, self._waiting_since = 0, None

    def state_dict(self) -> dict[str, Any]:
        """The weights of the last meeting, momentum and round: the same on all ranks, for any number of ranks."""
        return {"round": self.round, "begin": self._named(self._begin), "momentum": self._named(self._momentum)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """On every rank, before a step. Raises ValueError where the state is another model's, and changes nothing."""
        for part, mine in (("begin", self._begin), ("momentum", self._momentum)):
            shapes, given = ({n: tuple(t.shape) for n, t in s.items()} for s in (self._named(mine), state[part]))
            if shapes != given:
                odd = sorted(n for n in shapes.keys() | given.keys() if shapes.get(n) != given.get(n))
                raise ValueError(f"{_WHO}: {part} must be of these paths, got another {odd[0]}")
        for part, mine in (("begin", self._begin), ("momentum", self._momentum)):
            for name, tensor in self._named(mine).items():
                tensor.copy_(state[part][name])
        self.round = state["round"]
        self._settle()

    # --- a meeting ---

    def _meet(self, work: Any) -> None:
        """work(), again and again with fewer members until it is done, and with those who asked."""
        while True:
            try:
                work()
                newcomers = askers(self._store, self._answered, self._seen)
                if not newcomers:
                    return
                self._let_in(newcomers)
            except RuntimeError as error:
                if self._leave_out(error):
                    return
                continue
            work = self._together

    def _leave_out(self, error: RuntimeError) -> bool:
        """Goes on without those who are missing. True: this rank was, and has come in again, with the others' state: it
        owes them no meeting, and they are in none."""
        found = self._circle.lost(error)
        self.lost.append(found)
        left = [rank for rank in self.members if rank not in found.ranks]
        if self.rank in found.ranks:
            warnings.warn(f"{_WHO}: the others went on without rank {self.rank}; it asks to be let in", stacklevel=4)
            self._forget()
            self._enter()
            return True
        warnings.warn(f"{found}; {len(left)} ranks go on", stacklevel=4)
        self._circle = Circle(self._store, self.rank, left, self._circle.generation + 1, self.timeout_s)
        return False

    def _let_in(self, newcomers: Sequence[int]) -> None:
        members = sorted({*self.members, *newcomers})
        generation, begin, self._answered = self._circle.generation + 1, self._answered, self._seen
        answer(self._store, begin, self._seen, members, generation)  # by each, the same: one may die before it has
        self._circle.close()
        self._circle = Circle(self._store, self.rank, members, generation, self.timeout_s)

    def _enter(self) -> None:
        members, generation, self._answered = ask(self._store, self.rank, self.timeout_s)
        self._circle = Circle(self._store, self.rank, members, generation, self.timeout_s)
        self.round = -1  # whoever is a member is further
        self._meet(self._together)

    def _header(self) -> Tensor:
        """What every member says, [M, 2 + modules]: its round, asks that it saw, what it trained each module on."""
        mine = [self.round, asked(self._store), *(self._weight[at] for at in self._modules)]
        found = self._circle.gather(torch.tensor(mine, dtype=torch.float64))
        self._seen = int(found[:, 1].max())
        return found

    def _together(self) -> None:
        """Every member has the state of the first that is furthest."""
        self._adopt(self._header())

    def _adopt(self, header: Tensor) -> None:
        rounds = header[:, 0]
        first = int(rounds.argmax())
        behind = self.round < int(rounds[first]) or self.round <= 0
        for at in self._modules:
            for kept in (self._begin, self._momentum):
                for tensor in kept[at]:
                    self._circle.broadcast(tensor if behind else tensor.clone(), first)
        self.round = max(0, int(rounds[first]))
        if behind:
            self._settle()

    def _exchange(self) -> None:
        """One outer step. Nothing is changed before all sums are here, and everybody has them."""
        header = self._header()
        if header[:, 0].min() != header[:, 0].max():  # some had done this meeting when it failed for others
            self._adopt(header)
            return
        total = dict(zip(self._modules, header[:, 2:].sum(0).tolist(), strict=True))
        moved = {at: self._moved(at) for at in self._modules if total[at] > 0}
        for tensors in moved.values():
            flat = torch.cat([t.flatten() for t in tensors]) if tensors else torch.zeros(1)
            self._circle.add(flat)
            for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors] or [1]), strict=False):
                tensor.copy_(part.view_as(tensor))
        self._circle.gather(torch.zeros(1))  # whoever gets past this knows that all have the sums
        for at, tensors in moved.items():
            for begin, m, delta in zip(self._begin[at], self._momentum[at], tensors, strict=True):
                delta /= total[at]
                m.mul_(self.momentum).add_(delta)
                begin.sub_(self.lr * (delta + self.momentum * m))
        self.round += 1
        self._settle()

    def _moved(self, at: tuple[int, int]) -> list[Tensor]:
        """(begin - now) * weight of a module's parameters."""
        weight = self._weight[at]
        if not weight:
            return [torch.zeros_like(begin) for begin in self._begin[at]]
        now = (p.detach().float().cpu() for p in self._of(at))
        return [(begin - p) * weight for begin, p in zip(self._begin[at], now, strict=True)]

    @torch.no_grad()
    def _settle(self) -> None:
        """The modules are what they are after the meeting."""
        for at in self._modules:
            for p, begin in zip(self._of(at), self._begin[at], strict=True):
                p.copy_(begin)
        self._forget()

    def _forget(self) -> None:
        self._weight = dict.fromkeys(self._modules, 0.0)

    def _check_finite(self) -> None:
        """A module that is NaN or Inf here is not in the mean: it would be so on all ranks, for ever."""
        for at in self._modules:
            if self._weight[at] and not all(p.isfinite().all() for p in self._of(at)):
                self._weight[at] = 0.0
                what = f"module {at[1]} of level {at[0]} is not finite on rank {self.rank}"
                warnings.warn(f"{_WHO}: {what}, and what it trained there since the last meeting is lost", stacklevel=4)

    # --- who is waited for ---

    def _key(self) -> str:
        return f"{self._circle.name}/{self.round}/arrived"

    def _awaited(self) -> bool:
        """Whether half of the members have been there for `patience_s`."""
        if self._store.add(self._key(), 0) * 2 < len(self.members):
            return False
        now = time.monotonic()
        self._waiting_since = now if self._waiting_since is None else self._waiting_since
        return now - self._waiting_since >= self.patience_s

    def _of(self, at: tuple[int, int]) -> list[Tensor]:
        levels: Any = self.paths.levels
        return list(levels[at[0]][at[1]].parameters())

    def _named(self, kept: dict[tuple[int, int], list[Tensor]]) -> dict[str, Tensor]:
        levels: Any = self.paths.levels
        names = {at: [n for n, _ in levels[at[0]][at[1]].named_parameters()] for at in kept}
        return {f"{i}.{j}.{n}": t for (i, j), some in kept.items() for n, t in zip(names[i, j], some, strict=True)}


def _place(
    store: dist.Store | None, rank: int | None, members: Sequence[int] | None
) -> tuple[dist.Store, int, list[int]]:
    """Where ranks meet, which this is, and who is there at the start."""
    here = dist.is_available() and dist.is_initialized()
    if store is None and not here:
        if members not in (None, [0]) or rank not in (None, 0):
            raise ValueError(f"{_WHO}: store must be given where torch.distributed has not begun, got None")
        return dist.HashStore(), 0, [0]
    if not here and (rank is None or members is None):
        raise ValueError(f"{_WHO}: rank and members must be given with a store of one's own, got {rank}, {members}")
    store = dist.group.WORLD.get_group_store() if store is None else store  # type: ignore[union-attr]
    rank = dist.get_rank() if rank is None else rank
    found = list(range(dist.get_world_size())) if members is None else sorted(set(members))
    if not found or any(type(n) is not int or n < 0 for n in (*found, rank)):
        raise ValueError(f"{_WHO}: members must be numbers of ranks, at least one, got {found} and rank {rank}")
    return store, rank, found
