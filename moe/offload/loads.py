"""Reader threads: they bring experts from the lower tier into slots, misses in hand before what is fetched ahead."""

from __future__ import annotations

import os
import resource
import threading
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from resource import getrusage
from typing import Any

import torch

from ...placement.caching.cache import Cache
from .arena import Arena
from .host import Store
from .paged import Paged
from .ready import Sleepers
from .stats import Timing

HELD, QUEUED, RUNNING, DONE, FAILED, CANCELLED = "held", "queued", "running", "done", "failed", "cancelled"
AWAY = "away"  # there, but in a spare slot
_TRIES = 2
_RARELY, _FADE = 0.1, 0.1  # bytes of a load that come from the disk; weight of the last one
_WHO = getattr(resource, "RUSAGE_THREAD", resource.RUSAGE_SELF)  # a thread, on Linux
_BLOCK = 512  # bytes, of ru_inblock
LOOK_S = 0.2  # how often one who waits looks whether the readers live
_END_S = 60.0  # how long a closing loader waits for a read to end


@dataclass(eq=False)
class Load:
    """One expert on its way to a slot. HELD: the slot is still needed as it is by the step that ordered the load."""

    layer: int
    expert: int
    slot: int
    state: str = QUEUED
    before: Load | None = None  # into the same slot: this one follows it
    tries: int = 0
    error: BaseException | None = None
    spare: int | None = None  # where it goes first

    @property
    def over(self) -> bool:
        return self.state in (DONE, AWAY, FAILED, CANCELLED)

    @property
    def may_begin(self) -> bool:
        """Whether nothing that was ordered before is still being read into the slot."""
        before = self.before
        while before is not None and before.state == CANCELLED:  # it never began, but what it followed may have
            before = before.before
        return before is None or before.over


class Use:
    """One expert's turn in a slot within a step. `detour`: it is a spare slot, and the load is for another."""

    __slots__ = ("detour", "expert", "load", "slot")

    def __init__(self, expert: int, slot: int, load: Load | None, detour: bool = False) -> None:
        self.expert, self.slot, self.load, self.detour = expert, slot, load, detour


@contextmanager
def all_or_none(cache: Cache, layer: int, experts: Sequence[int]) -> Iterator[None]:
    """Where loads of `experts`, for which the cache has decided, are ordered. If that is left early, by Ctrl-C say,
    none of them counts as there."""
    try:
        yield
    except BaseException:
        for e in experts:
            cache.lose(layer, e)
        raise


def failure(load: Load, layer: str) -> Exception:
    """What a step raises that needs an expert which could not be had."""
    text = f"offload: expert {load.expert} of {layer} (layer {load.layer}) could not be read: {load.error}"
    error = OSError(load.error.errno, text) if isinstance(load.error, OSError) else RuntimeError(text)
    error.__cause__ = load.error
    return error


class Uses:
    """After which kernels a slot may be filled again. On a CPU a kernel is through when its call returns."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last: dict[int, dict[Any, torch.cuda.Event]] = {}  # slot -> by stream, after the last kernel that uses it

    def note(self, slots: Sequence[int]) -> None:
        """Kernels that use these slots have been queued on the current stream."""
        if self._device.type == "cuda":
            event, stream = torch.cuda.Event(), torch.cuda.current_stream(self._device)
            event.record(stream)
            for slot in slots:
                self._last.setdefault(slot, {})[stream.cuda_stream] = event

    def wait(self, slot: int) -> None:
        """What the current stream is given from now on is behind those of a slot."""
        for event in self._last.pop(slot, {}).values():
            torch.cuda.current_stream(self._device).wait_event(event)

    def events(self) -> list[torch.cuda.Event]:
        return [event for by_stream in self._last.values() for event in by_stream.values()]


def copy_stream(device: torch.device) -> torch.cuda.Stream | None:
    """A stream to fill slots of `device` on, behind whoever had their memory before; None on a CPU."""
    if device.type != "cuda":
        return None
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    return stream


class Loader:
    """`readers` threads, a lock that guards every Load and whatever else its owner puts under it, and two conditions
    of this lock: `work` for readers, `arrived` for those who wait for experts or for slots.

    A load that fails is tried once more, then it is FAILED and put into `failed` for the owner to deal with. A reader
    that has died is replaced, and its load begun again, by whoever waits.
    """

    def __init__(self, store: Store, arena: Arena | Paged, readers: int, timing: Timing) -> None:
        self._store, self._arena, self._timing = store, arena, timing
        self.lock = threading.RLock()  # a finalizer may run in a thread that holds it
        self.work, self.arrived = threading.Condition(self.lock), threading.Condition(self.lock)
        self.failed: list[Load] = []
        self.closed = False
        self.loads = self.bytes = self.restarts = 0
        self._urgent: deque[Load] = deque()
        self._ahead: deque[Load] = deque()
        self._running: dict[threading.Thread, Load] = {}
        self._stream, self._uses = copy_stream(arena.device), Uses(arena.device)
        self._from_disk = 1.0  # of the bytes of the last loads, as far as their own threads read them
        self._sleepers = Sleepers() if readers and arena.device.type == "cpu" else None
        self.threads = [self._start() for _ in range(readers)]

    def _start(self) -> threading.Thread:
        thread = threading.Thread(target=self._run, name="headgate-offload", daemon=True)
        thread.start()
        return thread

    @property
    def waiting(self) -> int:
        """Urgent loads that are not over."""
        return len(self._running) + len({id(load) for load in self._urgent if load.state == QUEUED})

    # --- for the owner, who holds the lock ---------------------------------------------------------------------------

    def queue(self, load: Load, urgent: bool, slot: int | None = None) -> None:
        """Orders a load, into its own slot or first into a spare `slot`, where it is not to be seen yet."""
        load.spare = slot
        (self._urgent if urgent else self._ahead).append(load)
        load.state = QUEUED
        if not (urgent and self._helps):
            self.work.notify()

    def flush(self) -> None:
        """Nothing to do: a load is with the readers as soon as it is ordered."""

    def hurry(self, load: Load) -> None:
        """Moves a load that waits to the urgent ones."""
        if load.state == QUEUED:
            self.queue(load, urgent=True, slot=load.spare)

    def there(self, use: Use) -> bool:
        """Whether it can be computed."""
        return use.load is not None and (use.load.state == DONE or (use.detour and use.load.state == AWAY))

    def move(self, spare: int, load: Load, stays: bool, late: Sequence[Load | None]) -> None:
        """Moves a load's expert from a spare slot to its own if it is one that `stays`, or has it read there if it has
        not come, where a step was left early: `late` are loads into its own slot that are not to come any more. The
        spare slot is free then."""
        for one in (load, *(late if stays else ())):
            if one is None:
                continue
            while one.state == RUNNING and not self.closed:
                self.wait()
            if one is not load:
                self.cancel(one)
        if not stays or self.closed:
            self.cancel(load)
        elif load.state == AWAY:
            self._arena.move(spare, load.slot)
            load.state, load.spare = DONE, None
            self.arrived.notify_all()
        elif load.state == QUEUED:
            self.cancel(load)  # where it was to go; a reader may be taking it from its queue
            load.state = HELD
            self.queue(load, urgent=True)

    def cancel(self, load: Load) -> None:
        """Drops a load that has not begun; one that has is left to end."""
        if load.state in (HELD, QUEUED, AWAY):
            load.state = CANCELLED

    def wait(self) -> None:
        """Waits a moment for something to arrive, and sees to it that somebody is at work on it."""
        if not self.arrived.wait(LOOK_S):
            self.revive()

    @property
    def at_hand(self) -> bool:
        """Whether loads are maps of what is in memory already, which take microseconds: nothing is gained by ordering
        them before it is known who is needed."""
        return isinstance(self._arena, Paged) and self._arena.mapped and self._from_disk < _RARELY

    def help(self, loads: Sequence[Load | None]) -> None:
        """Does loads that are at hand in the thread that needs them, where this is the only one that computes: to wake
        a reader takes as long. Not under the lock."""
        me = threading.current_thread()
        for load in loads:
            if load is None or load.state != QUEUED:
                continue
            try:
                with self.lock:
                    if not self._helps:
                        self.work.notify()  # they may not be at hand since they were ordered
                        continue
                    if load.state != QUEUED or not load.may_begin or self.closed:
                        continue
                    self._begin(load, me)
                error = self._end(load, me)
            except BaseException as e:  # such as Ctrl-C, on the way
                with self.lock:
                    if self._running.pop(me, None) is not None:
                        self._retry(load, e)
                raise
            if error is not None and not isinstance(error, Exception):
                raise error

    @property
    def _helps(self) -> bool:
        return self.at_hand and torch.get_num_threads() == 1

    def revive(self) -> None:
        """Replaces readers that have died; what they were about is begun again, or failed if that was the last try."""
        for i, thread in enumerate(self.threads):
            if thread.is_alive() or self.closed:
                continue
            load = self._running.pop(thread, None)
            if load is not None and load.state == RUNNING:
                self._retry(load, RuntimeError("the thread that read it has died"))
            self.restarts += 1
            self.threads[i] = self._start()

    def soonest(self, slots: Sequence[int]) -> Sequence[int]:
        """Those that kernels need not wait for: all, as a load is over when the device has the expert."""
        return slots

    def before(self, slots: Sequence[int]) -> None:
        """Nothing to do, for the same reason."""

    def used(self, slots: Sequence[int]) -> None:
        """Takes notice that kernels that read these slots have been queued on the current stream."""
        self._uses.note(slots)

    # --- the readers -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        me = threading.current_thread()
        while (load := self._take(me)) is not None:
            error = self._end(load, me)
            with self.lock:
                self.work.notify()  # a load that followed this one may begin
            if error is not None and not isinstance(error, Exception):
                return
            del load, error

    def _begin(self, load: Load, me: threading.Thread) -> None:
        self._running[me] = load
        load.before = None
        load.state, load.tries = RUNNING, load.tries + 1

    def _end(self, load: Load, me: threading.Thread) -> BaseException | None:
        """Reads what has begun; the error, where that failed. A reader goes on only if it was an Exception."""
        error: BaseException | None = None
        try:
            self._read(load)
        except BaseException as e:
            error = e
        with self.lock:
            if error is None:
                load.state = DONE if load.spare is None else AWAY
                self.loads += 1
                self.bytes += self._arena.nbytes_of(load.slot)
            else:
                self._retry(load, error)
            del self._running[me]
            self.arrived.notify_all()
        return error

    def _take(self, me: threading.Thread) -> Load | None:
        """The next load to be read, waited for; None: the loader is closed."""
        with self.lock:
            while not self.closed:
                load = self._next()
                if load is not None:
                    self._begin(load, me)
                    return load
                self.work.wait(1.0)
        return None

    def _next(self) -> Load | None:
        """The first load that may begin, taken off its queue; those that no longer wait are dropped."""
        for queue in (self._urgent, self._ahead):
            for _ in range(len(queue)):
                load = queue.popleft()
                if load.state != QUEUED:
                    continue
                if load.may_begin:
                    return load
                queue.append(load)
        return None

    def _retry(self, load: Load, error: BaseException) -> None:
        if load.tries < _TRIES and not self.closed:
            self.queue(load, urgent=True, slot=load.spare)
            self.work.notify()
        else:
            load.state, load.error = FAILED, error
            self.failed.append(load)
            self.arrived.notify_all()

    def _read(self, load: Load) -> None:
        with self._timing.copying(), torch.cuda.stream(self._stream) if self._stream else nullcontext():
            slot = load.slot if load.spare is None else load.spare
            self._uses.wait(slot)
            read = getrusage(_WHO).ru_inblock
            self._arena.load(self._store, load.layer, load.expert, slot)
            share = (getrusage(_WHO).ru_inblock - read) * _BLOCK / self._arena.nbytes_of(load.slot)
            self._from_disk += _FADE * (min(1.0, share) - self._from_disk)

    def close(self) -> bool:
        """Ends the readers: each finishes the read it is at; the rest is dropped. Returns whether all have ended."""
        with self.lock:
            self.closed = True
            for load in (*self._urgent, *self._ahead):
                self.cancel(load)
            self.work.notify_all()
            self.arrived.notify_all()
        others = [thread for thread in self.threads if thread is not threading.current_thread()]
        for thread in others:
            thread.join(_END_S)
        me = threading.current_thread()
        with self.lock:  # a thread that computes may be reading, too: see help
            helped = self.arrived.wait_for(lambda: not (self._running.keys() - {me, *self.threads}), _END_S)
        ended = helped and not any(thread.is_alive() for thread in others)
        if not ended:  # they keep the slots' memory until they end
            warnings.warn(f"offload: a read has not ended within {_END_S:.0f} s of close()", stacklevel=2)
        if self._sleepers is not None:
            self._sleepers.close()
        return ended


def end(pid: int, loader: Any, host: Any, store: Store, arena: Arena | Paged) -> None:
    """Of an engine that is closed or gone; a fork of its process has no threads to end, and a lock nobody opens."""
    if os.getpid() != pid:
        return
    if host is not None:
        host.close()
    if loader.close():
        store.close()
    arena.close()
