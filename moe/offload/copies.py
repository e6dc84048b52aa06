"""Loads that need no reader: the device copies experts out of page-locked memory while everybody goes on."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch

from .arena import Arena
from .host import HostStore, Store
from .loads import CANCELLED, DONE, FAILED, HELD, LOOK_S, Load
from .stats import DeviceTiming, Timing


class Copies:
    """What Loader is for a lower tier that has to be read. A load goes onto a stream of its own the moment it is
    ordered, behind the kernels that still read its slot, and kernels that need it are put behind it: nobody waits, and
    no thread has to be woken. Loads run in the order in which they were ordered. On a CPU each is a copy, made at once.
    """

    def __init__(self, store: HostStore, arena: Arena, timing: Timing | DeviceTiming) -> None:
        self._store, self._arena, self._timing = store, arena, timing
        self.lock = threading.RLock()  # a finalizer may run in a thread that holds it
        self.arrived = threading.Condition(self.lock)
        self.failed: list[Load] = []
        self.closed = False
        self.loads = self.bytes = self.restarts = self._number = 0
        self.threads: list[threading.Thread] = []
        self._stream = torch.cuda.Stream(arena.device) if arena.device.type == "cuda" else None
        if self._stream is not None:  # what stood in the slots' memory before may still be read or written
            self._stream.wait_stream(torch.cuda.current_stream(arena.device))
        self._uses: dict[int, dict[Any, torch.cuda.Event]] = {}  # slot -> by stream, after the last kernel that read it
        self._copied: dict[int, tuple[int, torch.cuda.Event]] = {}  # slot -> number and end of a copy on its way to it

    @property
    def waiting(self) -> int:
        """Loads on their way."""
        self._forget(list(self._copied))
        return len(self._copied)

    def queue(self, load: Load, urgent: bool) -> None:
        """Orders a load; `urgent` ones are no faster here."""
        self.copy(load, load.slot)

    def copy(self, load: Load, slot: int) -> None:
        """Orders the copy of a load's expert to a slot, and is done with the load if that is the load's own."""
        try:
            parts = self._store.parts(load.layer, load.expert)
            with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext(), torch.no_grad():
                if self._stream is not None:
                    for event in self._uses.pop(slot, {}).values():
                        self._stream.wait_event(event)
                with self._timing.copying():
                    for name, to in self._arena.slot(slot).items():
                        to.copy_(parts[name], non_blocking=True)
                self._arrives(slot)
        except Exception as error:
            load.state, load.error = FAILED, error
            self.failed.append(load)
            return
        if slot == load.slot:
            load.state = DONE
        self.loads += 1
        self.bytes += self._arena.kinds[self._arena.kind_of(slot)].nbytes

    def move(self, spare: int, load: Load) -> None:
        """Moves a load's expert from a spare slot to its own, on the current stream: kernels that read it there, or who
        stood in its own before, are ahead on that."""
        self.before([spare])
        for event in self._uses.pop(load.slot, {}).values():
            torch.cuda.current_stream(self._arena.device).wait_event(event)
        with torch.no_grad():
            come = self._arena.slot(spare)
            for name, to in self._arena.slot(load.slot).items():
                to.copy_(come[name], non_blocking=True)
        self.used([spare])
        self._arrives(load.slot)
        load.state = DONE

    def _arrives(self, slot: int) -> None:
        """What the current stream has been given ends with a copy to a slot."""
        self._copied.pop(slot, None)
        if self._stream is not None:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self._arena.device))
            self._number += 1
            self._copied[slot] = self._number, event

    def _forget(self, slots: Sequence[int]) -> None:
        for slot in slots:
            if slot in self._copied and self._copied[slot][1].query():
                del self._copied[slot]

    def soonest(self, slots: Sequence[int]) -> list[int]:
        """Those that kernels need not wait for; where there are none, the quarter that comes first."""
        self._forget(slots)
        late = sorted((self._copied[slot][0], slot) for slot in slots if slot in self._copied)
        if len(late) < len(slots):
            return [slot for slot in slots if slot not in self._copied]
        return [slot for _, slot in late[: -(-len(late) // 4)]]

    def before(self, slots: Sequence[int]) -> None:
        """Kernels that the current stream is given from now on run when the experts of these slots are there."""
        self._forget(slots)
        for slot in slots:
            if slot in self._copied:
                torch.cuda.current_stream(self._arena.device).wait_event(self._copied[slot][1])

    def used(self, slots: Sequence[int]) -> None:
        """Takes notice that kernels that read these slots have been queued on the current stream."""
        if self._stream is not None:
            event, stream = torch.cuda.Event(), torch.cuda.current_stream(self._arena.device)
            event.record(stream)
            for slot in slots:
                self._uses.setdefault(slot, {})[stream.cuda_stream] = event

    def hurry(self, load: Load) -> None:
        """Nothing to do: every load has been ordered."""

    def cancel(self, load: Load) -> None:
        """Drops a load that has not been ordered yet."""
        if load.state == HELD:
            load.state = CANCELLED

    def wait(self) -> None:
        """Waits a moment for another thread to be through with its slots."""
        self.arrived.wait(LOOK_S)

    def revive(self) -> None:
        """Nothing to do: there are no threads."""

    def close(self) -> bool:
        """Waits for the copies in hand."""
        with self.lock:
            self.closed = True
            self.arrived.notify_all()
        if self._stream is not None:
            self._stream.synchronize()
        return True


def readers_of(readers: int | None, store: Store, device: torch.device | str) -> int:
    """The threads that fetch; see Engine. Raises ValueError where there must be some."""
    alone = isinstance(store, HostStore)
    if readers is None:
        return 0 if alone and torch.device(device).type == "cuda" else 2
    if readers < (0 if alone else 1):
        raise ValueError(
            f"offload: readers must be at least 1, or 0 for experts that wait in host memory, got {readers}"
        )
    return readers
