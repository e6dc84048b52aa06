"""The engine of an offload cache: serves a layer's step from slots, while what is missing is on its way.

One piece of code decides (placement/caching/cache.py), readers fetch (loads.py) or a GPU copies by itself (copies.py),
and whoever calls `compute` computes (passes.py): first what is there, then each expert as it arrives; the host may
compute some where they are (hybrid.py).
"""

from __future__ import annotations

import os
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...kernels.activation import Activation
from ...kernels.routing import Routing
from ...kernels.transforms import refuse_transforms
from ...placement.caching.cache import Ahead, Cache, Step
from ...placement.caching.costs import Costs
from ...placement.caching.policies import Setting, State
from ...placement.caching.policies import policy as start_policy
from ...placement.caching.prefetch import prefetch as prefetch_likely
from ...placement.traces.trace import Trace
from .adapted import Carried, compute_adapted
from .arena import detoured, numbered, plan_slots
from .copies import Copies, readers_of
from .groups import Group, window
from .host import Store
from .hybrid import Host, Job, Pairs
from .loads import DONE, FAILED, HELD, Load, Loader, Use, all_or_none, end, failure
from .paged import arena_for
from .passes import Call, Then, compute
from .stats import Access, DeviceTiming, Stats, Timing


class Engine:
    """Serves the experts of `store` from slots on `device` that a `budget` pays for.

    `budget`: bytes, "8GiB", or a share of the experts' bytes, "25%" or 0.25; at least `top_k` experts of each layer, or
    with `scope` "shared" of one. `policy`: a name of POLICIES, with its `options`, and a `trace` where it learns from
    one; or its State. `readers`: threads that fetch; 0, of a HostStore alone: none, as a GPU copies out of page-locked
    memory by itself; None: 0 there on a GPU, else 2. `patience_s`: how long a step waits for an expert before it raises
    TimeoutError. `log`: keep every Access in `log`. `costs`, for a HostStore of plain tensors: the host computes those
    experts of a step that are not in slots which `split` gives it at these costs, where they are, in a thread of its
    own; the others are fetched, in the cache's order.

    Any number of threads may call at once. `close` ends the threads and lets the memory go; so does the end of a
    `with` block, and of the engine's own life. It does not survive a fork, and cannot be copied or pickled.
    """

    def __init__(
        self,
        store: Store,
        budget: str | int | float,
        *,
        policy: str | State = "lru",
        scope: str = "layer",
        top_k: int = 1,
        device: torch.device | str = "cpu",
        readers: int | None = None,
        patience_s: float = 600.0,
        trace: Trace | None = None,
        options: Mapping[str, float] | None = None,
        log: bool = False,
        costs: Costs | None = None,
    ) -> None:
        readers = readers_of(readers, store, device)
        layout = plan_slots(store.layers, budget, top_k, scope, detoured(store.layers, device, readers))
        self.layers, self.store, self.places, self.patience_s = store.layers, store, layout.places, patience_s
        shape = self.places.of.shape
        if isinstance(policy, str):
            policy = start_policy(policy, Setting(shape[0], shape[1], self.places.slots, trace, options or {}))
        self.cache = Cache(self.places, policy)
        self.arena = arena_for(store, layout, numbered(device), readers)
        self.log: list[Access] | None = [] if log else None
        self._calls = self._accesses = self._hits = self._ahead = self._used = 0
        self.hybrid, self._at_host, self._wait_s = costs is not None, 0, 0.0
        timing = Timing()
        by_events = readers == 0 and self.arena.device.type == "cuda"
        self._timing: Timing | DeviceTiming = DeviceTiming(self.arena.device) if by_events else timing
        self._host = None if costs is None else Host(store, costs, timing)
        self._chance = np.zeros(shape, np.float32)  # told last, for each layer
        self._promised = np.zeros(shape, bool)  # fetched ahead, and not used yet
        self._newest: dict[int, Load] = {}  # slot -> the last load ordered for it
        self._spares = list(range(self.places.slots, self.places.slots + layout.spares))
        self._loader: Loader | Copies
        if readers:
            self._loader = Loader(store, self.arena, readers, timing)
        else:
            self._loader = Copies(store, self.arena, self._timing)  # type: ignore[arg-type]  # see readers_of
        self._pid = os.getpid()
        self._finalizer = weakref.finalize(self, end, self._pid, self._loader, self._host, store, self.arena)

    # --- what a layer calls ------------------------------------------------------------------------------------------

    def compute(
        self,
        layer: int,
        rows: Tensor,
        routing: Routing,
        *,
        activation: str | Activation = "silu",
        gated: bool = True,
        transposed: bool = False,
        interleaved: bool = False,
        then: Then = None,
        back: Then = None,
        carried: Carried | None = None,
    ) -> Tensor:
        """grouped_ffn(rows, routing, ...) [R, D] on the experts of `layer`, to the bit; to rounding where the host
        computes some for a GPU, or the experts of up to four rows on one come in parts: sums take another order.
        Gradients of rows and router weights, too, are grouped_ffn's; their pass is a step of its own.

        Weights are called as grouped_ffn's arguments are (or w_gate and w_up, for a pair). `then`: see `step`; `back`:
        the same for the backward pass. `carried`: LoRA of the experts. Waits for the device once a pass, to know them.
        Raises OSError or RuntimeError naming layer and expert where one cannot be had; the next call tries again.
        """
        self._check(layer)
        instead = "call the model outside of it, or close the Offload first"
        refuse_transforms("offload", instead, rows, routing.weights)
        if routing.num_experts != self.layers[layer].experts:
            raise ValueError(
                f"offload: routing must be over the {self.layers[layer].experts} experts of {self.layers[layer].name}, "
                f"got {routing.num_experts}"
            )
        form = {"activation": activation, "gated": gated, "transposed": transposed, "interleaved": interleaved}
        call = Call(self, layer, routing.num_experts, form, then, back)
        return compute(call, rows, routing) if carried is None else compute_adapted(call, rows, routing, carried)

    def step(
        self,
        layer: int,
        ids: Sequence[int] | NDArray[np.int32],
        then: Then = None,
        rows: NDArray[np.integer] | None = None,
        together: bool = False,
    ) -> Generator[Group]:
        """One step of `layer`, which needs the experts `ids`, distinct and rising: yields each of them once, in groups,
        as they are there. A group's weights are valid until the next is asked for. `then(ids)` is called once the loads
        are ordered, before anything is waited for. Close the generator (`closing`) if it may be left early. An engine
        with costs that is told the `rows` [n] of each expert yields those that are the host's to compute first.
        `together`: as few groups as can be, where that makes nobody wait but the device."""
        self._check(layer)
        experts, ids = self.layers[layer].experts, np.asarray(ids, np.int32)
        if ids.ndim != 1 or (len(ids) and (ids[0] < 0 or ids[-1] >= experts or (ids[1:] <= ids[:-1]).any())):
            raise ValueError(f"offload: ids must be distinct, rising and below {experts}, got {ids.tolist()}")
        chains, detours, apart = self._begin(layer, ids, rows)
        try:
            if self._host is not None and len(apart):
                yield Group(apart.tolist(), apart.tolist(), self._host.weights[layer], host=True)
            if then is not None:
                then(ids)
            while chains:
                uses = self._arrived(layer, chains, together)
                slots = [use.slot for use in uses]
                first, last = window(self.places, layer, uses, self.arena.first[-1])
                with self._loader.lock:
                    self._loader.before(slots)
                begun = self._timing.begin_computing()
                try:
                    yield Group([use.expert for use in uses], *self.arena.group(slots, first, last))
                finally:
                    self._timing.end_computing(begun)  # type: ignore[arg-type]  # its own mark
                    with self._loader.lock:
                        self._loader.used(slots)
                self._computed(chains, uses)
        finally:
            self._leave(chains, detours)

    def order_host(self, work: Callable[[], Pairs | None]) -> Job:
        """Has the host do its part of a step, see `wait_host`."""
        assert self._host is not None, "who gets a group for the host has an engine with costs"
        return self._host.order(work)

    def wait_host(self, job: Job) -> Pairs | None:
        """What came of the host's part, waited for."""
        assert self._host is not None
        begun = time.perf_counter()
        made = self._host.wait(job, self.patience_s)
        with self._loader.lock:
            self._wait_s += time.perf_counter() - begun
        return made

    def prefetch(self, layer: int, ids, worth=None) -> int:
        """Orders experts of a step to come, the most important first, where they are not there and `worth` more than
        what must go (Cache.prefetch); they are read when no miss waits. Returns how many were ordered; waits for none.
        """
        self._check(layer)
        with self._loader.lock:
            self._open()
            self._settle()
            return self._order_ahead(layer, self.cache.prefetch(layer, ids, worth), np.asarray(ids))

    def prefetch_likely(self, layer: int, chance: NDArray[np.float32], price: float, room: float) -> int:
        """The same by the chance [E] that each expert of `layer` is needed, where it is worth its bytes: see
        placement/caching/prefetch.py."""
        self._check(layer)
        with self._loader.lock:
            self._open()
            self._settle()
            self._chance[layer, : len(chance)] = chance
            ahead = prefetch_likely(self.cache, layer, self._chance, price, room)
            likeliest = np.argsort(-self._chance[layer], kind="stable")
            return self._order_ahead(layer, ahead, likeliest[self.cache.table.promised[layer, likeliest]])

    def _order_ahead(self, layer: int, ahead: Ahead, asked: NDArray[np.integer]) -> int:
        """Orders the loads of a fetch ahead, and notes what was `asked` for, in that order."""
        self._calls += 1
        experts, slots, displaced = (a.tolist() for a in (ahead.experts, ahead.slots, ahead.gone))
        taken = {e: (slot, gone) for e, slot, gone in zip(experts, slots, displaced, strict=True)}
        with all_or_none(self.cache, layer, experts):
            for e in asked.tolist():
                if e in taken:
                    slot, gone = taken[e]
                    self._note(layer, e, "ahead", gone)
                    self._order(layer, e, slot, urgent=False)
                    self._promised[layer, e] = True
                elif self.cache.table.slot_of[layer, e] >= 0:
                    self._note(layer, e, "kept", -1)
            self._loader.flush()
        self._ahead += len(taken)
        return len(taken)

    def new_sequence(self) -> None:
        """Tells the policy that another sequence begins."""
        with self._loader.lock:
            self.cache.new_sequence()

    def pace(self) -> tuple[int, float, float] | None:
        """(loads that wait or run, seconds of copying for each load so far, and for all); None: see Loader.at_hand."""
        if self._loader.at_hand:
            return None
        with self._loader.lock:
            copy_s = self._timing.seconds()[0]
            return self._loader.waiting, copy_s / max(1, self._loader.loads), copy_s

    def stats(self) -> Stats:
        with self._loader.lock:
            copy_s, compute_s, both_s = self._timing.seconds()
            return Stats(
                self._accesses, self._hits, self._at_host, self._loader.loads, self._ahead, self._used,
                self._loader.bytes, self._wait_s, copy_s, compute_s, both_s, self._loader.restarts,
            )  # fmt: skip

    def close(self) -> None:
        """Ends all threads and lets slots and store go; steps in hand raise. May be called twice."""
        self._finalizer()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self):
        raise TypeError("offload: an engine holds threads and memory and cannot be copied or pickled: undo it first")

    # --- a step ------------------------------------------------------------------------------------------------------

    def _begin(
        self, layer: int, ids: NDArray[np.int32], rows: NDArray[np.integer] | None
    ) -> tuple[dict[int, deque[Use]], list[Use], NDArray[np.int32]]:
        """Decides, holds slots, orders loads: slot -> experts there in turn; who makes a detour; what the host does."""
        loader, begun = self._loader, time.perf_counter()
        with loader.lock:
            self._open()
            loader.revive()
            self._settle()
            apart = self._apart(layer, ids, rows)
            while not self.cache.ready(layer, np.setdiff1d(ids, apart) if len(apart) else ids):
                self._wait(begun, f"a slot of {self.layers[layer].name}")
                self._settle()
                apart = self._apart(layer, ids, rows)
            step = self.cache.step(layer, ids, apart)
            self._calls += 1
            self._accesses += len(ids)
            self._hits += step.hits
            self._at_host += len(apart)
            self._used += int(self._promised[layer, ids].sum())
            self._promised[layer, ids] = False
            chains, detours = {}, []  # type: ignore[var-annotated]
            try:
                with all_or_none(self.cache, layer, step.experts[step.hits :].tolist()):
                    self._order_step(layer, step, chains, detours)
            except BaseException:
                self._leave(chains, detours)
                raise
            for e in apart.tolist():
                self._note(layer, e, "host", -1)
            self._wait_s += time.perf_counter() - begun
        return chains, detours, apart

    def _order_step(self, layer: int, step: Step, chains: dict[int, deque[Use]], detours: list[Use]) -> None:
        for e, slot, gone in zip(step.experts.tolist(), step.slots.tolist(), step.gone.tolist(), strict=True):
            hit = gone == -2
            self._note(layer, e, "hit" if hit else "miss", -1 if hit else gone)
            if slot in chains and self._spares:
                detours.append(self._detour(layer, e, slot, chains))
                continue
            load = self._there(slot) if hit else self._order(layer, e, slot, urgent=True, held=slot in chains)
            if slot not in chains:
                chains[slot] = deque()
                self.cache.table.busy[slot] += 1
            chains[slot].append(Use(e, slot, load))
        self._loader.flush()

    def _detour(self, layer: int, expert: int, slot: int, chains: dict[int, deque[Use]]) -> Use:
        """Orders a load into a spare slot, as this step still needs what stands in its own. Until it is there nobody
        else may see it."""
        load = self._order(layer, expert, slot, urgent=True, held=True)
        use = Use(expert, self._spares.pop(), load, detour=True)
        self._loader.queue(load, urgent=True, slot=use.slot)
        chains[use.slot] = deque([use])
        self.cache.table.busy[slot] += 1
        return use

    def _apart(self, layer: int, ids: NDArray[np.int32], rows: NDArray[np.integer] | None) -> NDArray[np.int32]:
        """The experts that the host is to compute, as things stand; one on its way to a slot counts as there."""
        if self._host is None or rows is None or not len(ids):
            return ids[:0]
        return self._host.part(ids, rows, self.cache.table.slot_of[layer, ids] >= 0)

    def _there(self, slot: int) -> Load | None:
        """The load that a hit has to wait for, now among the urgent ones; None: the expert has arrived."""
        load = self._newest.get(slot)
        if load is None or load.state == DONE:
            return None
        self._loader.hurry(load)
        return load

    def _order(self, layer: int, expert: int, slot: int, *, urgent: bool, held: bool = False) -> Load:
        """Orders a load; `held`: once this step is through with who stands there."""
        load, old = Load(layer, expert, slot), self._newest.get(slot)
        if held:
            load.state = HELD
        else:
            if old is not None:
                self._loader.cancel(old)
                load.before = old
            self._loader.queue(load, urgent)
        self._newest[slot] = load
        return load

    def _arrived(self, layer: int, chains: dict[int, deque[Use]], together: bool) -> list[Use]:
        """The uses, at the heads of their chains and of one kind, that can be computed; waits until there is one. Not
        `together`: those that the device has first, and none of pools and spare slots at once."""
        begun = time.perf_counter()
        self._loader.help([chain[0].load for chain in chains.values()])
        with self._loader.lock:
            while True:
                self._open()
                heads = [chain[0] for chain in chains.values()]
                for use in heads:
                    if use.load is not None and use.load.state == FAILED:
                        raise failure(use.load, self.layers[layer].name)
                there = [use for use in heads if use.load is None or self._loader.there(use)]
                if there:
                    self._wait_s += time.perf_counter() - begun
                    if not together or len(there) < sum(map(len, chains.values())):
                        soonest = set(self._loader.soonest([use.slot for use in there]))
                        there = [use for use in there if use.slot in soonest]
                        there = [u for u in there if not self.arena.windows or u.detour == there[0].detour]
                    kind = self.arena.kind_of(there[0].slot)
                    return [use for use in there if self.arena.kind_of(use.slot) == kind]
                self._wait(begun, f"experts {', '.join(str(u.expert) for u in heads)} of {self.layers[layer].name}")

    def _computed(self, chains: dict[int, deque[Use]], uses: list[Use]) -> None:
        """Lets the loads begin that waited for these uses, and slots go that the step is through with."""
        with self._loader.lock:
            for use in uses:
                chain = chains[use.slot]
                chain.popleft()
                if chain:
                    load = chain[0].load
                    assert load is not None, "what follows in a slot is a miss"
                    self._loader.queue(load, urgent=True)
                else:
                    del chains[use.slot]
                    if not use.detour:
                        self.cache.table.busy[use.slot] -= 1
            self._loader.flush()
            self._loader.arrived.notify_all()

    def _leave(self, chains: dict[int, deque[Use]], detours: list[Use]) -> None:
        """Ends a step, perhaps early: on what it ordered last into a slot the cache counts, and others may wait."""
        if not chains and not detours:
            return
        with self._loader.lock:
            for use in detours:
                chains.pop(use.slot, None)
                self._come_home(use, chains)
            for slot, chain in chains.items():
                *between, last = chain
                for use in between:  # nobody else can have seen these
                    if use.load is not None:
                        self._loader.cancel(use.load)
                if between and last.load is not None:
                    last.load.before = between[0].load
                    self._loader.queue(last.load, urgent=True)
                self.cache.table.busy[slot] -= 1
            self._loader.flush()
            chains.clear()
            self._loader.arrived.notify_all()

    def _come_home(self, use: Use, chains: dict[int, deque[Use]]) -> None:
        """The end of a detour: to its own slot goes who is to stay, and nobody of `chains`, not computed, behind it."""
        load = use.load
        assert load is not None, "who makes a detour is a miss"
        stays = self._newest.get(load.slot) is load
        self._loader.move(use.slot, load, stays, [other.load for other in chains.get(load.slot, ())])
        self._spares.append(use.slot)
        self.cache.table.busy[load.slot] -= 1

    def _settle(self) -> None:
        """Takes experts that could not be fetched out of the cache: the next step that needs them tries again."""
        failed, self._loader.failed = self._loader.failed, []
        for load in failed:
            if self._newest.get(load.slot) is load:
                self.cache.lose(load.layer, load.expert)
                del self._newest[load.slot]
                self._promised[load.layer, load.expert] = False

    def _wait(self, begun: float, what: str) -> None:
        self._open()
        if time.perf_counter() - begun > self.patience_s:
            raise TimeoutError(f"offload: waited {self.patience_s:g} s for {what}")
        self._loader.wait()

    def _note(self, layer: int, expert: int, how: str, gone: int) -> None:
        if gone >= 0:
            self._promised.flat[gone] = False
        if self.log is not None:
            self.log.append(Access(self._calls, layer, expert, how, gone))

    def _check(self, layer: int) -> None:
        if os.getpid() != self._pid:
            raise RuntimeError("offload: the engine must be used in the process that made it, got a fork of it")
        self._open()
        if not 0 <= layer < len(self.layers):
            raise ValueError(f"offload: layer must be 0 .. {len(self.layers) - 1}, got {layer}")

    def _open(self) -> None:
        if self._loader.closed:
            raise RuntimeError("offload: the engine must be open, got one that is closed")
