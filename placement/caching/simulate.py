"""What a cache of experts would do on a trace: the live model's own decisions, step by step, counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..compiled import njit
from ..traces.file import TraceFile
from ..traces.trace import Trace
from .cache import empty, fetch_ahead, serve
from .policies import Setting, State, belady, policy
from .policies.step import new_sequence
from .pools import SCOPES, Pools, per_layer, shared
from .steps import Steps, next_use, steps_of


@dataclass(frozen=True)
class Prefetch:
    """Candidates for each step, fetched when the step `horizon` before it has been served.

    ids      int [N, m], in the order of their importance, -1: none
    worth    float64 [N, m] or None: fetched only where above the value of the expert that must go; None: always
    most     fetches at most for a step
    """

    ids: NDArray[np.integer]
    worth: NDArray[np.floating] | None = None
    horizon: int = 1
    most: int = 4


def perfect(steps: Steps, horizon: int = 1, most: int | None = None) -> Prefetch:
    """Candidates that are right: what a router that runs ahead of its layers knows (Read-ME's pre-gate)."""
    sizes = np.diff(steps.offsets)
    column = np.arange(len(steps.ids)) - np.repeat(steps.offsets[:-1], sizes)
    ids = np.full((len(steps), int(sizes.max(initial=1))), -1, np.int32)
    ids[np.repeat(np.arange(len(steps)), sizes), column] = steps.ids
    return Prefetch(ids, None, horizon, ids.shape[1] if most is None else most)


def foreseen(steps: Steps, chances: NDArray[np.floating], candidates: int, horizon: int = 1, most: int = 4) -> Prefetch:
    """The likeliest `candidates` of each step. chances [L, T, E]: how likely each token of the trace uses an expert, as
    `predict.foretell` says; a pass of several tokens uses it if one of them does. The worth is that chance.

    Raises ValueError where the sizes are not those of the steps.
    """
    layers, tokens = steps.layers, steps.tokens[:: steps.layers]
    wanted = (layers, int(tokens.sum()), steps.experts)
    if chances.shape != wanted:
        raise ValueError(f"foreseen: chances must be [L, T, E] = {wanted}, got {chances.shape}")
    if not 1 <= candidates <= steps.experts:
        raise ValueError(f"foreseen: candidates must be 1 .. {steps.experts}, got {candidates}")
    starts = np.cumsum(tokens) - tokens
    ids, worth = np.empty((len(steps), candidates), np.int32), np.empty((len(steps), candidates))
    for layer in range(layers):
        none_does = np.multiply.reduceat(1.0 - chances[layer], starts) if len(starts) else np.empty((0, steps.experts))
        ranked = np.argsort(none_does, axis=1, kind="stable")[:, :candidates]
        ids[layer::layers], worth[layer::layers] = ranked, 1.0 - np.take_along_axis(none_does, ranked, 1)
    return Prefetch(ids, worth, horizon, most)


class Log(NamedTuple):
    """What happened, in order: a step's accesses as they were served, then what was fetched ahead after it."""

    step: NDArray[np.int32]  # [events]
    expert: NDArray[np.int32]  # layer * E + expert
    gone: NDArray[np.int64]  # whom it displaced (layer * E + expert), -1: nobody, -2: it was a hit
    wave: NDArray[np.int32]
    ahead: NDArray[np.bool_]  # fetched ahead, not an access


@dataclass(frozen=True)
class Simulation:
    """Counts int64 [L]: `accesses` (distinct experts of steps), `hits`, `prefetched`, and of those `used` before they
    left. `waves`: turns that steps took beyond their first. `log` where it was asked for."""

    steps: Steps
    places: Pools
    accesses: NDArray[np.int64]
    hits: NDArray[np.int64]
    prefetched: NDArray[np.int64]
    used: NDArray[np.int64]
    waves: int
    log: Log | None

    @property
    def slots(self) -> int:
        """Of all pools."""
        return self.places.slots

    @property
    def hit_rate(self) -> float:
        """Hits over accesses; 1 where there are none."""
        return float(self.hits.sum() / self.accesses.sum()) if self.accesses.any() else 1.0

    @property
    def loads(self) -> int:
        """Loads on demand: misses."""
        return int((self.accesses - self.hits).sum())

    @property
    def transfers(self) -> int:
        """Experts copied in all, on demand and ahead."""
        return self.loads + int(self.prefetched.sum())


def slots_of(slots: int | float, layers: int, experts: int, scope: str = "layer") -> Pools:
    """Pools for `slots` a layer (int), or a share of its experts (float, 0 .. 1, rounded, at least one slot); "shared"
    makes one pool of all. Raises ValueError for others."""
    if scope not in SCOPES:
        raise ValueError(f"simulate: scope must be one of {', '.join(SCOPES)}, got {scope!r}")
    if isinstance(slots, float):
        if not 0 < slots <= 1:
            raise ValueError(f"simulate: slots must be a share above 0 and at most 1, or a whole number, got {slots}")
        count = max(1, round(slots * experts))
    else:
        count = slots
    if not 1 <= count <= experts:
        raise ValueError(f"simulate: slots must be 1 .. {experts} a layer, got {count}")
    return per_layer(layers, experts, count) if scope == "layer" else shared(layers, experts, layers * count)


def simulate(
    source: Trace | TraceFile | Steps,
    rule: str | State = "lru",
    slots: int | float | Pools = 16,
    *,
    scope: str = "layer",
    batch: int = 1,
    prefetch: Prefetch | Sequence[Prefetch] = (),
    fit: Trace | None = None,
    options: Mapping[str, float] | None = None,
    log: bool = False,
) -> Simulation:
    """A cache that starts empty, over a whole trace.

    source    a trace, or its `steps_of`
    rule      the policy: a name of POLICIES, "belady", or a State that has seen nothing (it is used up)
    slots     as slots_of, or Pools
    batch     tokens of a forward pass, as steps_of
    prefetch  what is fetched ahead; several are taken in their order
    fit       a trace for policies that learn from one
    log       keep what happened, 21 bytes an event

    Raises ValueError as slots_of, steps_of and policy do, and where a prefetch does not fit the steps.

    >>> ids = np.array([[[0], [1], [0], [2], [0], [1]]], np.uint8)
    >>> [simulate(Trace(ids, 3), rule, 2).hits.sum() for rule in ("lru", "belady")]
    [np.int64(2), np.int64(2)]
    """
    steps = source if isinstance(source, Steps) else steps_of(source, batch)
    layers, experts = steps.layers, steps.experts
    places = slots if isinstance(slots, Pools) else slots_of(slots, layers, experts, scope)
    setting = Setting(layers, experts, places.slots, fit, options or {})
    future = np.empty(0, np.int64)
    if rule == "belady":
        chosen = belady(setting)
        future, first = next_use(steps)
        chosen.value[:] = -first
    else:
        chosen = policy(rule, setting) if isinstance(rule, str) else rule
    ahead = _stacked([prefetch] if isinstance(prefetch, Prefetch) else prefetch, steps)
    events = len(steps.ids) + int((ahead.ids >= 0).sum()) if log else 0
    narrow, wide = np.int32, np.int64
    kept = Log(*(np.empty(events, kind) for kind in (narrow, narrow, wide, narrow, np.bool_)))  # type: ignore[arg-type]
    counts = np.zeros((4, layers), np.int64)
    waves, n = _run(empty(places), chosen, steps, future, ahead, counts, kept, log)
    made = Log(*(field[:n] for field in kept)) if log else None  # type: ignore[arg-type]
    accesses, hits, prefetched, used = counts
    return Simulation(steps, places, accesses, hits, prefetched, used, waves, made)


def least_loads(steps: Steps, places: Pools) -> NDArray[np.int64]:
    """Experts that each step must load, int64 [N]; no cache has loaded fewer up to any step: Belady's (1966), where
    a miss may pass by without a slot. The policy "belady" gives each miss a slot, and may load a little more."""
    future, _ = next_use(steps)
    found = np.zeros(len(steps), np.int64)
    _least(steps, places, future, found)
    return found


@njit
def _least(steps, places, future, found):
    size = steps.experts
    holder = np.full(places.first[-1], -1, np.int64)
    slot_of, soon = np.full((steps.layers, size), -1), np.zeros((steps.layers, size), np.int64)
    for n in range(len(steps.layer)):
        layer = steps.layer[n]
        missing = steps.ids[steps.offsets[n] : steps.offsets[n + 1]].copy()
        for i in range(steps.offsets[n], steps.offsets[n + 1]):
            e = steps.ids[i]
            soon[layer, e] = future[i]
            if slot_of[layer, e] < 0:
                missing[found[n]] = e
                found[n] += 1
        for e in missing[: found[n]]:
            pool, best, far = places.of[layer, e], -1, soon[layer, e]
            for s in range(places.first[pool], places.first[pool + 1]):
                h = holder[s]
                if h < 0 or soon[h // size, h % size] > far:
                    best, far = s, soon[h // size, h % size] if h >= 0 else far
                    if h < 0:
                        break
            if best < 0:
                continue
            h = holder[best]
            if h >= 0:
                slot_of[h // size, h % size] = -1
            holder[best], slot_of[layer, e] = layer * size + e, best


class _Ahead(NamedTuple):
    """Several Prefetch as compiled code reads them."""

    ids: NDArray[np.int32]  # [H, N, m]
    worth: NDArray[np.float64]  # [H, N, m]
    horizon: NDArray[np.int64]  # [H]
    most: NDArray[np.int64]  # [H]


def _stacked(each: Sequence[Prefetch], steps: Steps) -> _Ahead:
    width = max((one.ids.shape[1] for one in each if one.ids.ndim == 2), default=0)
    ids = np.full((len(each), len(steps) if each else 0, width), -1, np.int32)
    worth = np.full(ids.shape, np.inf)
    for h, one in enumerate(each):
        if one.ids.ndim != 2 or len(one.ids) != len(steps):
            raise ValueError(f"simulate: ids of prefetch must be [N={len(steps)}, m], got {one.ids.shape}")
        if one.ids.size and (one.ids.min() < -1 or one.ids.max() >= steps.experts):
            found = (int(one.ids.min()), int(one.ids.max()))
            raise ValueError(f"simulate: ids of prefetch must be -1 .. {steps.experts - 1}, got {found}")
        if one.horizon < 1 or one.most < 0:
            raise ValueError(
                f"simulate: horizon must be at least 1 and most not negative, got {one.horizon}, {one.most}"
            )
        ids[h, :, : one.ids.shape[1]] = one.ids
        if one.worth is not None:
            if one.worth.shape != one.ids.shape:
                raise ValueError(f"simulate: worth must be {one.ids.shape} as ids, got {one.worth.shape}")
            worth[h, :, : one.ids.shape[1]] = one.worth
    horizons, most = ([getattr(one, name) for one in each] for name in ("horizon", "most"))
    return _Ahead(ids, worth, np.array(horizons, np.int64), np.array(most, np.int64))


@njit
def _run(table, policy, steps, future, ahead, counts, log, keep):
    """Fills counts [4, L]: accesses, hits, prefetched, used; returns waves beyond first ones and the log's length."""
    layers, experts = table.slot_of.shape
    room = max(experts, ahead.ids.shape[2])
    order, slot, wave = np.empty(room, np.int32), np.empty(room, np.int32), np.empty(room, np.int32)
    gone = np.empty(room, np.int64)
    fresh = np.zeros((layers, experts), np.bool_)  # fetched ahead and not used yet
    waves, n = 0, 0
    for step in range(len(steps.layer)):
        layer = np.int64(steps.layer[step])  # what the live model says: with int32 every policy is compiled once more
        begin, end = steps.offsets[step], steps.offsets[step + 1]
        ids, size = steps.ids[begin:end], end - begin
        if steps.begins[step]:
            new_sequence(policy)
        if len(future):
            for i in range(begin, end):
                policy.value[layer, steps.ids[i]] = -future[i]
        hits = serve(table, policy, layer, ids, ids, order, slot, gone, wave)
        counts[0, layer] += size
        counts[1, layer] += hits
        for i in range(size):
            if gone[i] == -2:
                counts[3, layer] += fresh[layer, order[i]]
            elif gone[i] >= 0:
                fresh[gone[i] // experts, gone[i] % experts] = False
            fresh[layer, order[i]] = False
        if size:
            waves += wave[size - 1]
        if keep:
            n = _note(log, n, step, layer * experts, order[:size], gone, wave, False)
        for h in range(len(ahead.horizon)):
            to = step + ahead.horizon[h]
            if to >= len(steps.layer):
                continue
            layer, size = np.int64(steps.layer[to]), 0
            while size < ahead.ids.shape[2] and ahead.ids[h, to, size] >= 0:
                size += 1
            ids = ahead.ids[h, to, :size]
            fetch_ahead(table, policy, layer, ids, ahead.worth[h, to], ahead.most[h], slot, gone)
            m = 0
            for i in range(size):
                if slot[i] < 0:
                    continue
                counts[2, layer] += 1
                if gone[i] >= 0:
                    fresh[gone[i] // experts, gone[i] % experts] = False
                fresh[layer, ids[i]] = True
                order[m], gone[m], wave[m] = ids[i], gone[i], 0
                m += 1
            if keep:
                n = _note(log, n, step, layer * experts, order[:m], gone, wave, True)
    return waves, n


@njit
def _note(log, n, step, first, order, gone, wave, ahead):
    for i in range(len(order)):
        log.step[n], log.expert[n], log.gone[n] = step, first + order[i], gone[i]
        log.wave[n], log.ahead[n] = wave[i], ahead
        n += 1
    return n
