"""Loads that need no reader: the device copies experts out of page-locked memory while everybody goes on."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import nullcontext

import torch

from .arena import Arena
from .host import HostStore, Store
from .loads import CANCELLED, DONE, FAILED, HELD, LOOK_S, Load, Use, Uses, copy_stream
from .stats import DeviceTiming, Timing


class Copies:
    """What Loader is for a lower tier that has to be read. Loads go onto a stream of their own, in the order in
    which they are ordered, behind the kernels that still read their slots, and kernels that need them are put behind
    them: nobody waits, and no thread has to be woken. On a CPU each is a copy, made at once.
    """

    def __init__(self, store: HostStore, arena: Arena, timing: Timing | DeviceTiming) -> None:
        self._store, self._arena, self._timing = store, arena, timing
        self.lock = threading.RLock()  # a finalizer may run in a thread that holds it
        self.arrived = threading.Condition(self.lock)
        self.failed: list[Load] = []
        self.closed = False
        self.loads = self.bytes = self.restarts = self._number = 0
        self._taken: list[tuple[Load, int]] = []
        self._stream, self._uses = copy_stream(arena.device), Uses(arena.device)
        self._copied: dict[int, tuple[int, torch.cuda.Event]] = {}  # slot -> number and end of a copy on its way to it

    @property
    def waiting(self) -> int:
        """Loads on their way."""
        return len(self._late(list(self._copied)))

    def queue(self, load: Load, urgent: bool, slot: int | None = None) -> None:
        """Takes a load up for the next `flush`, into its own slot or first into a spare `slot`, where it is not to be
        seen yet. Urgent ones are no faster here."""
        self._taken.append((load, load.slot if slot is None else slot))
        if slot is None:
            load.state = DONE

    def flush(self) -> None:
        """Orders the copies of all loads that were taken up, in one go: what a load costs the caller counts. Kernels
        wait for a few of them at a time."""
        taken, self._taken = self._taken, []
        if not taken:
            return
        parts, waiting = max(4, -(-len(taken) // 4)), {id(load): load for load, _ in taken}
        try:
            with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext(), torch.no_grad():
                for some in (taken[i : i + parts] for i in range(0, len(taken), parts)):
                    with self._timing.copying():
                        for load, slot in some:
                            self._copy(load, slot)
                    self._arrive([slot for _, slot in some])
                    for load, _ in some:
                        del waiting[id(load)]
        except BaseException as error:  # such as Ctrl-C: nobody may believe that these are there
            for load in waiting.values():
                self._fail(load, error)
            raise

    def _fail(self, load: Load, error: BaseException) -> None:
        if load.state != FAILED:
            load.state, load.error = FAILED, error
            self.failed.append(load)

    def _copy(self, load: Load, slot: int) -> None:
        """Puts a copy onto the current stream, behind the kernels that still read the slot."""
        try:
            parts = self._store.parts(load.layer, load.expert)
            self._uses.wait(slot)
            for name, to in self._arena.slot(slot).items():
                to.copy_(parts[name], non_blocking=True)
        except Exception as error:
            self._fail(load, error)
            return
        self.loads += 1
        self.bytes += self._arena.kinds[self._arena.kind_of(slot)].nbytes

    def there(self, use: Use) -> bool:
        """Whether kernels can be put behind its copy."""
        return use.detour or (use.load is not None and use.load.state == DONE)

    def move(self, spare: int, load: Load, stays: bool, _late: Sequence[Load | None]) -> None:
        """Moves a load's expert from a spare slot to its own if it `stays`, on the current stream: kernels that read it
        there, or who stood in its own before, are ahead on that."""
        if load.state != HELD or not stays or self.closed:  # not HELD: it has failed
            return
        self.before([spare, load.slot])
        self._uses.wait(load.slot)
        with torch.no_grad():
            come = self._arena.slot(spare)
            for name, to in self._arena.slot(load.slot).items():
                to.copy_(come[name], non_blocking=True)
        self.used([spare, load.slot])  # what is copied there next is behind this
        self._arrive([load.slot])
        load.state = DONE

    def _arrive(self, slots: Sequence[int]) -> None:
        """What the current stream has been given ends with copies to these slots."""
        if self._stream is None:
            return
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._arena.device))
        self._number += 1
        for slot in slots:
            self._copied[slot] = self._number, event

    def _late(self, slots: Sequence[int]) -> dict[int, tuple[int, torch.cuda.Event]]:
        """Of slots, those whose experts are on their way."""
        for slot in slots:
            if slot in self._copied and self._copied[slot][1].query():
                del self._copied[slot]
        return {slot: self._copied[slot] for slot in slots if slot in self._copied}

    def soonest(self, slots: Sequence[int]) -> list[int]:
        """Those that kernels need not wait for; where there are none, those that come first."""
        late = self._late(slots)
        if len(late) < len(slots):
            return [slot for slot in slots if slot not in late]
        first = min(number for number, _ in late.values())
        return [slot for slot, (number, _) in late.items() if number == first]

    def before(self, slots: Sequence[int]) -> None:
        """Kernels that the current stream is given from now on run when the experts of these slots are there."""
        for event in dict(self._late(slots).values()).values():
            torch.cuda.current_stream(self._arena.device).wait_event(event)

    def used(self, slots: Sequence[int]) -> None:
        """Takes notice that kernels that read these slots have been queued on the current stream."""
        self._uses.note(slots)

    def hurry(self, load: Load) -> None:
        """Nothing to do: every load has been ordered."""

    def cancel(self, load: Load) -> None:
        """Drops a load that has not been ordered yet."""
        if load.state == HELD:
            load.state = CANCELLED

    at_hand = False

    def help(self, loads: Sequence[Load | None]) -> None:
        """Nothing to do: the device copies by itself."""

    def wait(self) -> None:
        """Waits a moment for another thread to be through with its slots."""
        self.arrived.wait(LOOK_S)

    def revive(self) -> None:
        """Nothing to do: there are no threads."""

    def close(self) -> bool:
        """Waits for the copies in hand, and for kernels that read slots."""
        with self.lock:
            self.closed = True
            self.arrived.notify_all()
            events = [*self._uses.events(), *(event for _, event in self._copied.values())]
        for event in events:
            event.synchronize()
        return True


def readers_of(readers: int | None, store: Store, device: torch.device | str) -> int:
    """The threads that fetch; see Engine. Raises TypeError, and ValueError where there must be some."""
    if isinstance(readers, bool) or not isinstance(readers, int | None):
        raise TypeError(f"offload: readers must be an integer or None, got {readers!r}")
    cuda = torch.device(device).type == "cuda"
    alone = isinstance(store, HostStore) and (store.pinned or not cuda)
    if readers is None:
        return 0 if alone and cuda else 2
    if readers < (0 if alone else 1):
        raise ValueError(
            f"offload: readers must be at least 1, or 0 for a HostStore (page-locked, before a GPU), got {readers}"
        )
    return readers
