"""Ranks that come and go: a circle is who is here now, with connections of its own.

Everything is found through one store of torch.distributed, which must outlive the ranks (torchrun's agent hosts one). A
process group of torch.distributed is not needed, so a process can join that was not there at the start. Rows travel
over gloo, from host memory.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...dispatch.rollcall import DeadRanks, call, gist, hang_up, sign

_GRACE_S, _POLL_S = 5.0, 0.02


class Circle:
    """`members`, rising numbers of ranks, `rank` one of them. `generation`: how often members have changed; all members
    have the same. A circle of one has no connections."""

    def __init__(self, store: dist.Store, rank: int, members: Sequence[int], generation: int, timeout_s: float) -> None:
        self.store, self.rank, self.members = store, rank, tuple(sorted(members))
        self.generation, self.timeout_s = generation, timeout_s
        self.name = f"{generation}:{','.join(map(str, self.members))}"
        sign(store, rank)
        self._group: Any = None

    def connect(self) -> None:
        """Raises RuntimeError where a member does not come."""
        if self._group is None and len(self.members) > 1:
            place = dist.PrefixStore(self.name, self.store)
            limit = timedelta(seconds=self.timeout_s)
            self._group = dist.ProcessGroupGloo(place, self.members.index(self.rank), len(self.members), limit)

    def gather(self, x: Tensor) -> Tensor:
        """x [n] of each member, in their order: [M, n]."""
        self.connect()
        if self._group is None:
            return x[None]
        found = [torch.empty_like(x) for _ in self.members]
        self._group.allgather([found], [x]).wait()
        return torch.stack(found)

    def add(self, x: Tensor) -> None:
        """x becomes the sum over members, the same bits everywhere."""
        if self._group is not None:
            self._group.allreduce([x]).wait()

    def broadcast(self, x: Tensor, index: int) -> None:
        """x becomes that of the member `index`."""
        if self._group is not None:
            options = dist.BroadcastOptions()
            options.rootRank, options.rootTensor = index, 0
            self._group.broadcast([x], options).wait()

    def lost(self, error: RuntimeError) -> DeadRanks:
        """Who is missing after `error` in one of the above, as those who are left agree. Raises `error` if nobody."""
        if self._group is not None:
            hang_up(self._group)
        grace = min(_GRACE_S, self.timeout_s / 4)
        said = gist(error)
        dead, _ = call(self.store, self.name, self.members, self.rank, said, grace)
        if not dead:
            raise error
        names = ", ".join(f"{rank} ({name})" for rank, name in sorted(dead.items()))
        why = f"did not answer a roll call within {grace:.3g} s after an exchange failed: {said}"
        found = DeadRanks(f"OuterSync: rank{'s' * (len(dead) > 1)} {names} {why}", tuple(sorted(dead)))
        found.__cause__ = error
        return found

    def close(self) -> None:
        self._group = None


# --- the door ---------------------------------------------------------------------------------------------------------


def ask(store: dist.Store, rank: int, timeout_s: float) -> tuple[list[int], int, int]:
    """Asks the members to be let in, and waits: (members, generation, asks that are answered). Raises TimeoutError."""
    number = store.add("asks", 1)
    store.set(f"ask/{number}", str(rank))
    deadline, key = time.monotonic() + timeout_s, f"answer/{number}"
    while not store.check([key]):
        if time.monotonic() > deadline:
            raise TimeoutError(f"OuterSync: the members must let rank {rank} in within {timeout_s:g} s, got no answer")
        time.sleep(_POLL_S)
    members, generation, answered = json.loads(store.get(key))
    return members, generation, answered


def asked(store: dist.Store) -> int:
    """How many asks there were."""
    return store.add("asks", 0)


def askers(store: dist.Store, begin: int, end: int) -> list[int]:
    """The ranks of the asks begin + 1 .. end."""
    return [int(store.get(f"ask/{number}")) for number in range(begin + 1, end + 1)]


def answer(store: dist.Store, begin: int, end: int, members: Sequence[int], generation: int) -> None:
    for number in range(begin + 1, end + 1):
        store.set(f"answer/{number}", json.dumps([list(members), generation, end]))
