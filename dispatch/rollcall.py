"""A rank that dies is named: where a collective fails, the ranks that are left call the roll.

A backend says "Connection closed by peer" or "Timed out", and not who. So every rank whose collective failed writes a
page into the store of torch.distributed, waits for the pages of the others in its group, writes down whom it misses,
and reads whom they miss; all come to the same names. It costs nothing until something fails, and no thread until then.

In a ring only the neighbours of a dead rank hear of it from gloo; the others would wait for their time-out. So a rank
that has heard closes its own connections first, and within milliseconds all are in the roll call. A group in which a
collective failed is therefore of no more use. New ones can be made of the ranks that are left: by `dist.new_group` with
`use_local_synchronization=True`, or by `dist.destroy_process_group` and a fresh start.

Run on gloo only. NCCL reports a dead rank late, from its watchdog or when a communicator is aborted. What it raises in
a collective is a RuntimeError too and is caught here; what ends the process, or appears in a later wait for the device,
is not, and NCCL's connections are not closed from here.
"""

from __future__ import annotations

import functools
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

GRACE_S = 5.0  # how long an answer may take; less where a quarter of the group's time-out is less
_POLL_S = 0.02
_TAG = 0x726F6C6C  # of a message that nobody sends
_PAGE, _NAME = "headgate/rollcall/{}", "headgate/rank/{}"

C = TypeVar("C", bound=Callable[..., Any])


class DeadRanks(RuntimeError):
    """Ranks that did not answer a roll call: `ranks`, their global numbers, rising. The failure itself is its cause.

    A rank that lives but is stopped, or busy elsewhere for longer than the grace period, did not answer either. If it
    comes later it gets the same error, with its own number in it. The message says of a rank on this host whether its
    process is alive: one that has merely finished earlier than the others is.
    """

    def __init__(self, message: str, ranks: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.ranks = ranks


@dataclass(frozen=True)
class Page:
    """What a rank writes in a roll call. `missing`: whom it misses, None while it waits. `done`: it has read enough."""

    group: str
    error: str
    missing: list[int] | None = None
    done: bool = False


def sign_in(group: dist.ProcessGroup) -> None:
    """Leaves this rank's host and process number in the store, for the day when it cannot say them any more."""
    if dist.get_backend(group) != "fake":  # ranks of one process, with no store
        sign(_store(), dist.get_rank())


def sign(store: dist.Store, rank: int) -> None:
    """The same in a store."""
    store.set(_NAME.format(rank), f"{socket.gethostname()}, pid {os.getpid()}")


def named(collective: C) -> C:
    """A function that runs a collective, on the group in its last argument, with a roll call where it fails."""

    @functools.wraps(collective)
    def run(*args, **kwargs):
        try:
            return collective(*args, **kwargs)
        except RuntimeError as error:
            hold(collective.__name__, kwargs.get("group", args[-1]), error)
            raise

    return cast(C, run)


def hold(what: str, group: dist.ProcessGroup, error: RuntimeError) -> None:
    """The roll call of a group's ranks after `error` in its collective `what`, on every rank that got one.

    Raises DeadRanks, from `error`, where a rank does not answer within GRACE_S, or where the store is gone together
    with the rank that hosts it. Otherwise adds a note to `error`, with what the others say, and returns. Takes at most
    the group's time-out.
    """
    ranks, me = dist.get_process_group_ranks(group), dist.get_rank()
    if len(ranks) == 1 or isinstance(error, DeadRanks | NotImplementedError | torch.OutOfMemoryError):
        return
    limit = time_out(group)
    grace = min(GRACE_S, limit.total_seconds() / 4) if limit else GRACE_S  # a call waits at most four times as long
    _close(group)
    store, said = _store(), gist(error)
    outcome: list[tuple[dict[int, str], dict[int, str]]] = []
    lost = ["it does not answer"]

    def work() -> None:
        try:
            outcome.append(call(store, group.group_name, ranks, me, said, grace))
        except (RuntimeError, OSError) as broken:
            lost.append(gist(broken))

    # A thread, because a store whose host is stopped never returns. It is left behind then.
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(4 * grace)
    if not outcome:
        _without_store(what, store, me, lost[-1], error)
        return
    dead, errors = outcome[0]
    if dead:
        names = ", ".join(f"{rank} ({name})" for rank, name in sorted(dead.items()))
        alive = ", ".join(str(rank) for rank, name in sorted(dead.items()) if _alive(name))
        still = f"; the process of {alive} is alive: it has finished, or is stopped or busy elsewhere" if alive else ""
        raise DeadRanks(
            f"{what}: rank{'s' * (len(dead) > 1)} {names} did not answer a roll call within {grace:.3g} s after a "
            f"collective failed: {said}{still}",
            tuple(sorted(dead)),
        ) from error
    others = "; ".join(f"rank {rank}: {said}" for rank, said in sorted(errors.items()))
    error.add_note(f"{what}: every rank of the group answered a roll call, so no rank is dead. {others}")


def call(
    store: dist.Store, group: str, ranks: Collection[int], me: int, error: str, grace: float
) -> tuple[dict[int, str], dict[int, str]]:
    """The roll call itself: (rank -> name of the dead, rank -> error of those that answered).

    It has two rounds, who is here and whom do you miss, so that all who answer come to the same names. The second waits
    for those who came at the end of the first, whose own first round takes `grace` seconds too. A rank that is in the
    roll call of another group, or has left one with a name that is news here, is not dead: it is why this rank waited
    in vain, and it knows the name.
    """
    begun = time.monotonic()
    others, last = set(ranks) - {me}, _read(store, me)
    known = set(last.missing or ()) if last and last.group != group else set()

    def counts(page: Page) -> bool:
        return page.group == group or page.missing is None or bool(set(page.missing) - known)

    mine = Page(group, error)
    _write(store, me, mine)
    answered = _gather(store, others, counts, begun + grace)
    mine = replace(mine, missing=sorted(others - answered.keys()))
    _write(store, me, mine)
    heard = _gather(store, answered, lambda page: page.missing is not None, begun + 2.5 * grace)
    dead = others - heard.keys()
    dead.update(*(page.missing or () for page in heard.values()))
    names = {rank: _name(store, rank) for rank in dead}
    _write(store, me, replace(mine, done=True))
    if me == 0:  # the store may live in this process: the others must have read it before it can end
        _gather(store, heard, lambda page: page.done, begun + 3.5 * grace)
    return names, {rank: page.error for rank, page in heard.items()}


def _gather(
    store: dist.Store, ranks: Collection[int], wanted: Callable[[Page], bool], deadline: float
) -> dict[int, Page]:
    """The pages that are as wanted: when all are, or at the deadline."""
    pages: dict[int, Page] = {}
    while True:
        for rank in set(ranks) - pages.keys():
            page = _read(store, rank)
            if page and wanted(page):
                pages[rank] = page
        if len(pages) == len(ranks) or time.monotonic() > deadline:
            return pages
        time.sleep(_POLL_S)


def _without_store(what: str, store: dist.Store, me: int, reason: str, error: RuntimeError) -> None:
    """The end of a roll call whose store is gone: it names the rank that hosts it, if a rank does."""
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun's agent, which is no rank
    if isinstance(store, dist.TCPStore) and me != 0 and not by_agent:
        raise DeadRanks(
            f"{what}: rank 0 is gone, and with it the store that it hosts at {store.host}:{store.port} ({reason}), so "
            f"that others cannot be asked for, after a collective failed: {gist(error)}",
            (0,),
        ) from error
    error.add_note(f"{what}: no roll call could be held, because the store is gone: {reason}")


def _close(group: dist.ProcessGroup) -> None:
    """Closes gloo's connections to the others, who then hear that something is wrong. Elsewhere nothing is closed."""
    if "gloo" in str(dist.get_backend_config(group)):
        hang_up(group)


def hang_up(group: Any) -> None:
    """Closes the connections of a group of gloo's."""
    for peer in range(group.size()):
        if peer != group.rank():
            with suppress(RuntimeError):  # gloo closes all connections of a group when an operation has timed out
                group.recv([torch.empty(1)], peer, _TAG).wait(timedelta(milliseconds=1))


def gist(error: Exception) -> str:
    """The first sentence of an error, without the place in gloo's source that it starts with."""
    line = (str(error).splitlines() or [""])[0]
    return re.sub(r"^\[\S+:\d+\] ", "", line).split(". ")[0] or type(error).__name__


def time_out(group: dist.ProcessGroup) -> timedelta | None:
    """How long a collective of the group may take; None where its backend has no such option."""
    options = getattr(group._get_backend(group._device_types[0]), "options", None)
    return getattr(options, "_timeout", None)


def _store() -> dist.Store:
    return dist.group.WORLD.get_group_store()  # type: ignore[union-attr]


def _read(store: dist.Store, rank: int) -> Page | None:
    key = _PAGE.format(rank)  # asked for first: `get` waits for a key that is not there
    return Page(**json.loads(store.get(key))) if store.check([key]) else None


def _write(store: dist.Store, rank: int, page: Page) -> None:
    store.set(_PAGE.format(rank), json.dumps(asdict(page)))


def _name(store: dist.Store, rank: int) -> str:
    key = _NAME.format(rank)
    return store.get(key).decode() if store.check([key]) else "host unknown"


def _alive(name: str) -> bool:
    """Whether the process of a signature runs; it must be one of this host. A zombie does not."""
    host, _, pid = name.partition(", pid ")
    if host != socket.gethostname() or not pid.isdigit():
        return False
    try:
        os.kill(int(pid), 0)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:1]
    except OSError:  # it is gone; or its number is another user's by now
        return False
    return state != ["Z"]
