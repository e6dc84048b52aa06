"""Slots: a fixed piece of the device's memory in which cached experts stand, and how many of them a budget pays for."""

from __future__ import annotations

import heapq
import math
import mmap
import re
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...kernels.quantized import Quantized
from ...placement.caching.pools import SCOPES, Pools, pools
from .host import Store
from .kinds import Kind, Layer

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
LARGE = 3 << 19  # bytes of an expert from which on whole pages are hardly more
_ALIGN = 64  # bytes: where the slots of a part begin, beside multiples of its own size


def parse_size(size: str | int, name: str) -> int:
    """Bytes of text or a number ("2GiB", "500 MB", 4096). Raises TypeError or ValueError naming `name` and the rule."""
    rule = f'{name} must be bytes of at least 1 ("2GiB", "500 MB", 4096), got {size!r}'
    if isinstance(size, bool) or not isinstance(size, str | int):
        raise TypeError(rule)
    found = _spelled(size) if isinstance(size, str) else (size, False)
    if found is None or found[1] or not 1 <= found[0] < math.inf:
        raise ValueError(rule)
    return int(found[0])


def _spelled(text: str) -> tuple[float, bool] | None:
    """The number in text, and whether it is a share; None where it is neither that nor bytes."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:(%)|([KMGT]I?)?B?)\s*", text, re.IGNORECASE)
    if not found or ("." in found[1] and text.strip() == found[1]):  # "0.25": of what?
        return None
    number = float(found[1])
    return (number / 100, True) if found[2] else (number * _UNITS[(found[3] or "").upper()], False)


def parse_budget(budget: str | int | float, whole: int) -> int:
    """Bytes. A budget is a number of them ("8GiB", "500 MB", 4096) or a share of `whole`, at most all ("25%", 0.25).

    Raises TypeError or ValueError, with that rule, for anything else.
    """
    rule = (
        'offload: budget must be bytes ("8GiB", "500 MB", 4096) or a share of all experts, above 0 and at most 1 '
        f'("25%", 0.25), or "auto" for a model, got {budget!r}'
    )
    if isinstance(budget, bool) or not isinstance(budget, str | int | float):
        raise TypeError(rule)
    found = _spelled(budget) if isinstance(budget, str) else (budget, isinstance(budget, float))
    if found is None:
        raise ValueError(rule)
    size, is_share = found
    if is_share:
        if not 0 < size <= 1:
            raise ValueError(rule)
        size *= whole
    if size < 1 or size == math.inf:
        raise ValueError(rule)
    return int(size)


class Layout(NamedTuple):
    """Slots for experts of each of the `kinds`, [kinds] of them, kind by kind, and the pools that they make; the last
    `spares` are in none."""

    kinds: list[Kind]
    slots: list[int]
    places: Pools
    spares: int = 0


def plan_slots(
    layers: Sequence[Layer], budget: str | int | float, top_k: int, scope: str, detours: bool = False
) -> Layout:
    """The slots that a budget pays for. With `detours` one in 16 is a spare, up to 9, where experts are of one kind:
    what a step needs in one and the same slot, one after the other, can then be there at once (of one token with up
    to ten experts, whatever the policy).

    `scope` "layer": each layer has slots of its own, as large a share of its experts as the others; "shared": all
    layers share them. Experts of different kinds never share slots. Raises ValueError naming the least that is needed:
    slots for `top_k` experts, in each layer or for all of them.
    """
    if scope not in SCOPES:
        raise ValueError(f"offload: scope must be one of {', '.join(SCOPES)}, got {scope!r}")
    if top_k < 1:
        raise ValueError(f"offload: top_k must be at least 1, got {top_k}")
    size = parse_budget(budget, sum(layer.nbytes for layer in layers))
    kinds = list(dict.fromkeys(kind for layer in layers for _, kind in layer.groups))
    of = np.zeros((len(layers), max(layer.experts for layer in layers)), np.int32)
    found: dict[tuple[int, int], int] = {}  # (kind, layer or 0) -> experts in this pool
    for l, layer in enumerate(layers):
        for experts, kind in layer.groups:
            key = kinds.index(kind), l if scope == "layer" else 0
            found[key] = found.get(key, 0) + len(experts)
    order = {key: p for p, key in enumerate(sorted(found))}
    for l, layer in enumerate(layers):
        for experts, kind in layer.groups:
            of[l, list(experts)] = order[kinds.index(kind), l if scope == "layer" else 0]
    experts_of, kind_of = [found[key] for key in order], [k for k, _ in order]
    spares = min(9, size // (16 * kinds[0].nbytes)) if detours and len(kinds) == 1 else 0
    slots, spares = _share_out(kinds, kind_of, experts_of, size, top_k, scope, spares)
    per_kind = _by_kind(len(kinds), kind_of, slots)
    return Layout(kinds, [n + spares for n in per_kind], pools(of, np.array(slots)), spares)


def detoured(layers: Sequence[Layer], device: torch.device | str, readers: int) -> bool:
    """Whether slots are to have spares: where a device copies by itself, and on a CPU where experts are so large that
    they are computed in whole pages (see paged.py)."""
    kinds = {kind for layer in layers for _, kind in layer.groups}
    large = all(not kind.coded and kind.nbytes >= LARGE for kind in kinds)
    return readers == 0 or (torch.device(device).type == "cpu" and large)


def _share_out(
    kinds: list[Kind], kind_of: list[int], experts: list[int], size: int, top_k: int, scope: str, spares: int
) -> tuple[list[int], int]:
    """Slots of each pool: the least for each, then always one more where the share of experts with a slot is lowest.
    Up to `spares`, of the first kind, come behind the least and before the rest."""
    slots = [min(top_k, n) for n in experts]
    per_kind = _by_kind(len(kinds), kind_of, slots)
    spare = size - arena_bytes(kinds, per_kind)
    if spare < 0:
        where = "each layer" if scope == "layer" else "one layer"
        meant = f' bytes (a share is "{size}%" or {size / 100})' if size <= 100 else ""
        raise ValueError(
            f"offload: budget must be at least {size - spare} bytes, for {top_k} experts of {where}, got {size}{meant}"
        )
    while spares and arena_bytes(kinds[:1], [per_kind[0] + spares]) - arena_bytes(kinds[:1], per_kind[:1]) > spare:
        spares -= 1
    per_kind[0] += spares
    spare -= arena_bytes(kinds[:1], per_kind[:1]) - arena_bytes(kinds[:1], [per_kind[0] - spares])
    queue = [(s / n, p) for p, (s, n) in enumerate(zip(slots, experts, strict=True)) if s < n]
    heapq.heapify(queue)
    while queue:
        _, p = heapq.heappop(queue)
        k = kind_of[p]
        cost = arena_bytes([kinds[k]], [per_kind[k] + 1]) - arena_bytes([kinds[k]], [per_kind[k]])
        if cost > spare:
            continue
        spare -= cost
        slots[p] += 1
        per_kind[k] += 1
        if slots[p] < experts[p]:
            heapq.heappush(queue, (slots[p] / experts[p], p))
    return slots, spares


def _by_kind(kinds: int, kind_of: Sequence[int], slots: Sequence[int]) -> list[int]:
    return [sum(s for k, s in zip(kind_of, slots, strict=True) if k == kind) for kind in range(kinds)]


def arena_bytes(kinds: Sequence[Kind], slots: Sequence[int]) -> int:
    """What so many `slots` of each kind take, with the bytes that alignment costs."""
    return sum(_aligned(n * part.nbytes) for kind, n in zip(kinds, slots, strict=True) for part in kind.parts)


def _aligned(n: int) -> int:
    return -(-n // _ALIGN) * _ALIGN


class Arena:
    """Slots for experts of each of the `kinds`, as many as `slots` says, allocated once on `device`.

    Slots are numbered through all kinds. On CPUs the memory begins on a page, and is page-locked (`pinned`) or takes
    room only as it is written.
    """

    windows = True  # kernels are told of some slots only

    def __init__(
        self, kinds: Sequence[Kind], slots: Sequence[int], device: torch.device | str, pinned: bool = False
    ) -> None:
        self.kinds, self.device = tuple(kinds), torch.device(device)
        self.first = [sum(slots[:k]) for k in range(len(slots) + 1)]
        self.nbytes = arena_bytes(kinds, slots)
        with torch.inference_mode(False):  # readers, too, must be allowed to write
            self._parts = _slots(kinds, slots, _memory(self.nbytes, self.device, pinned))
        self._windows: dict[tuple[int, int], dict[str, Tensor | Quantized]] = {}
        self._views: dict[int, dict[str, Tensor]] = {}

    def kind_of(self, slot: int) -> int:
        return bisect_right(self.first, slot) - 1

    def nbytes_of(self, slot: int) -> int:
        """Of the expert in a slot."""
        return self.kinds[self.kind_of(slot)].nbytes

    def slot(self, slot: int) -> dict[str, Tensor]:
        """The parts of the expert in a slot, to be filled."""
        if slot not in self._views:
            kind = self.kind_of(slot)
            self._views[slot] = {name: t[slot - self.first[kind]] for name, t in self._parts[kind].items()}
        return self._views[slot]

    def move(self, spare: int, slot: int) -> None:
        """What is in a spare slot, to its own."""
        for name, to in self.slot(slot).items():
            to.copy_(self.slot(spare)[name])

    def load(self, store: Store, layer: int, expert: int, slot: int) -> None:
        """Brings an expert into a slot. Raises OSError where the store cannot give it."""
        store.read(layer, expert, self.slot(slot))

    def group(self, slots: Sequence[int], first: int, last: int) -> tuple[list[int], dict[str, Tensor | Quantized]]:
        """(their numbers, weights) of the experts in `slots`, which are some of first .. last - 1."""
        return [slot - first for slot in slots], self.weights(first, last)

    def weights(self, begin: int, end: int) -> dict[str, Tensor | Quantized]:
        """The weights [S, ...] of slots begin .. end - 1, which are of one kind."""
        if (begin, end) not in self._windows:
            kind = self.kind_of(begin)
            here = slice(begin - self.first[kind], end - self.first[kind])
            parts = {name: t[here] for name, t in self._parts[kind].items()}
            self._windows[begin, end] = self.kinds[kind].join(parts)
        return self._windows[begin, end]

    def close(self) -> None:
        """Lets the memory go, once nobody else holds a tensor of it."""
        self._parts, self._windows, self._views = [], {}, {}


def _slots(kinds: Sequence[Kind], slots: Sequence[int], memory: Tensor) -> list[dict[str, Tensor]]:
    """The parts [S, ...] of each kind in `memory`, one after the other."""
    parts: list[dict[str, Tensor]] = []
    at = 0
    for kind, n in zip(kinds, slots, strict=True):
        parts.append({})
        for part in kind.parts:
            parts[-1][part.name] = memory[at : at + n * part.nbytes].view(part.dtype).view(n, *part.shape)
            at += _aligned(n * part.nbytes)
    return parts


def numbered(device: torch.device | str) -> torch.device:
    """A GPU by its number: which one is current differs between threads, and may change."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _memory(nbytes: int, device: torch.device, pinned: bool) -> Tensor:
    if device.type != "cpu" or pinned:
        return torch.empty(nbytes, dtype=torch.uint8, device=device, pin_memory=pinned)
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)
