"""Synthetic traces with chosen skew, affinity between layers, domains and drift, for tests and for scale.

Every expert of a layer has a popularity, Zipf's 1 / rank^skew in an order of the layer's own, and belongs to one topic;
a layer's topics are equally popular, as nearly as its experts can be shared out. A token carries a topic through the
layers, and makes each of its K choices among the topic's experts or among all. What experts of one topic share is the
affinity that a placement can use. What a token takes over from the one before it is the memory that a cache can use.
"""

from __future__ import annotations

import heapq
from math import isfinite

import numba
import numpy as np
from numpy.typing import NDArray

from .trace import Trace, id_type


def generate(
    layers: int,
    experts: int,
    top_k: int,
    tokens: int,
    *,
    skew: float = 0.5,
    affinity: float = 0.5,
    topics: int | None = None,
    hold: float = 0.9,
    domains: int = 1,
    shift: float = 0.5,
    drift: float = 0.0,
    carry: float = 0.0,
    repeat: float = 0.0,
    length: int = 128,
    seed: int = 0,
) -> Trace:
    """A Trace of `tokens` in sequences of `length`, each token's K experts of a layer distinct.

    skew      Zipf's exponent of the experts' loads; 0: all alike. Distinct choices flatten the head a little
    affinity  the share of choices, 0 .. 1, among the experts of the token's topic
    topics    how many there are (None: so many that a topic has about 2 K experts); at most E
    hold      the chance that a token keeps its topic from one layer to the next
    domains   parts of equal size, one after the other: sequence q of Q is of domain q * domains // Q
    shift     with several domains, the share of a domain's topics and free choices that follow its own preferences:
              topics that no other domain prefers, another order of popularity
    drift     the share that follows later preferences at the last token; it grows linearly from none at the first
    carry     the chance that a token begins with the topic with which the token before it, of its sequence, began
    repeat    the share of choices that are one of the same layer's choices of the token before it
    seed      same seed, same trace

    Raises ValueError naming field, rule and value.

    >>> generate(layers=4, experts=16, top_k=2, tokens=100).shape
    (4, 100, 2)
    """
    topics = max(1, round(experts / (2 * top_k))) if topics is None else topics
    counts = {"layers": layers, "experts": experts, "tokens": tokens, "domains": domains, "length": length}
    for name, value in counts.items():
        _rule(value >= 1, name, "at least 1", value)
    _rule(1 <= top_k <= experts, "top_k", f"1 .. experts={experts}", top_k)
    _rule(1 <= topics <= experts, "topics", f"1 .. experts={experts}", topics)
    _rule(domains == 1 or domains <= topics, "domains", f"at most topics={topics}", domains)
    _rule(isfinite(skew) and skew >= 0, "skew", "finite and not negative", skew)
    shares = {"affinity": affinity, "hold": hold, "shift": shift, "drift": drift, "carry": carry, "repeat": repeat}
    for name, share in shares.items():
        _rule(0 <= share <= 1, name, "0 .. 1", share)
    rng = np.random.default_rng(seed)
    sequence = np.arange(tokens, dtype=np.int64) // length
    domain = (sequence * domains // (int(sequence[-1]) + 1)).astype(np.int32)
    late = np.linspace(0, drift, tokens)
    own = shift if domains > 1 else 0.0
    ids = np.empty((layers, tokens, top_k), id_type(experts))
    topic = np.full(tokens, -1, np.int32)
    follows = sequence == np.concatenate([[-1], sequence[:-1]])
    for layer in range(layers):
        order, first, tables = _layer(rng, experts, topics, domains, skew)
        state = np.uint64(rng.integers(2**63))
        _draw(ids[layer], topic, domain, late, follows, order, first, tables, affinity, hold, own, carry, repeat, state)
    return Trace(ids, experts, sequence=sequence.astype(np.int32))


def like_deepseek_v2_lite(tokens: int, seed: int = 0) -> Trace:
    """26 layers, top-6 of 64, two domains, near a real trace of DeepSeek-V2-Lite on two tasks, 16,701 tokens:

    | as `headgate trace --show` prints it, mean of layers     | real | this |
    |---|---|---|
    | load, max / mean                                         | 3.25 | 3.48 |
    | 6 best successors: share of the transitions, lift        | .393, 1.76 | .361, 1.62 |
    | 6 best companions: share of the pairs inside a layer     | .410 | .379 |
    | GPUs of a token and layer, experts dealt out over 8      | 4.57 | 4.53 |
    | total variation of loads between the domains             | .334 | .306 |
    | hits of an LRU cache of 8, 16, 32 of a layer's experts   | .325, .499, .736 | .347, .519, .730 |
    """
    return generate(
        26, 64, 6, tokens, skew=0.95, affinity=0.75, topics=13, hold=0.98, domains=2, shift=0.5, carry=0.8, repeat=0.01,
        seed=seed,
    )  # fmt: skip


def _layer(
    rng: np.random.Generator, experts: int, topics: int, domains: int, skew: float
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """One layer's preferences: the experts sorted by topic, where each topic begins among them [M + 1], and summed
    popularities in that order [1 + domains + 1, E + 1]: everybody's, each domain's own, the later ones."""
    zipf = np.arange(1, experts + 1, dtype=np.float64) ** -skew
    popularity = [rng.permutation(zipf / zipf.sum()) for _ in range(domains + 2)]
    topic = _shared_out(popularity[0], topics, rng.permutation(topics))
    order = np.argsort(topic, kind="stable")
    first = np.searchsorted(topic[order], np.arange(topics + 1))
    tables = np.zeros((domains + 2, experts + 1))
    np.cumsum(np.array(popularity)[:, order], axis=1, out=tables[:, 1:])
    return order, first, tables / tables[:, -1:]


def _shared_out(popularity: NDArray[np.float64], topics: int, names: NDArray[np.int64]) -> NDArray[np.int64]:
    """The topic of each expert: the most popular first, each to the topic that has least so far."""
    heap = [(0.0, int(name)) for name in names]
    heapq.heapify(heap)
    topic = np.empty(len(popularity), np.int64)
    for expert in np.argsort(-popularity, kind="stable"):
        mass, name = heapq.heappop(heap)
        topic[expert] = name
        heapq.heappush(heap, (mass + popularity[expert], name))
    return topic


@numba.njit(cache=True)
def _uniform(state):
    """(next state, a number in 0 .. 1) of SplitMix64 (Steele, Lea and Flood, 2014)."""
    state = state + np.uint64(0x9E3779B97F4A7C15)
    z = state
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return state, (z >> np.uint64(11)) * (1.0 / 9007199254740992.0)


@numba.njit(cache=True)
def _draw(ids, topic, domain, late, follows, order, first, tables, affinity, hold, own, carry, repeat, state):
    """Fills ids [T, K] of one layer and moves topic [T] on (-1: none yet). Without carry or repeat nothing is drawn for
    them, so that the trace of a seed stays what it was."""
    tokens, top_k = ids.shape
    topics, domains, last = len(first) - 1, len(tables) - 2, len(tables) - 1
    experts = len(order)
    taken = np.full(experts, -1, np.int64)  # the token that has chosen an expert
    for t in range(tokens):
        state, stay = _uniform(state)
        state, which = _uniform(state)
        state, u = _uniform(state)
        again = False
        if carry > 0 and topic[t] < 0 and follows[t]:
            state, kind = _uniform(state)
            again = kind < carry
        if again:
            topic[t] = topic[t - 1]
        elif topic[t] < 0 or stay >= hold:
            if which < own:  # the topics of a domain d: d, d + domains, ...
                mine = (topics - 1 - domain[t]) // domains + 1
                topic[t] = domain[t] + domains * int(u * mine)
            elif which < own + (1 - own) * late[t]:  # the later topics: the first half
                topic[t] = int(u * ((topics + 1) // 2))
            else:
                topic[t] = int(u * topics)
        for k in range(top_k):
            tries = 0
            while True:
                state, kind = _uniform(state)
                state, which = _uniform(state)
                state, u = _uniform(state)
                low, high, table = 0, experts, 0
                if repeat > 0 and follows[t] and tries < 8:
                    state, same = _uniform(state)
                    if same < repeat:
                        expert = int(ids[t - 1, int(u * top_k)])
                        tries += 1
                        if taken[expert] != t:
                            break
                        continue
                if kind < affinity and tries < 8 and first[topic[t]] < first[topic[t] + 1]:
                    low, high = first[topic[t]], first[topic[t] + 1]
                elif which < own:
                    table = 1 + domain[t]
                elif which < own + (1 - own) * late[t]:
                    table = last
                edges = tables[table]
                place = np.searchsorted(edges[low : high + 1], edges[low] + u * (edges[high] - edges[low]), "right")
                expert = order[min(low + place - 1, high - 1)]
                tries += 1
                if tries > 64:  # next to nothing but what is taken is ever drawn
                    expert = int(u * experts)
                    while taken[expert] == t:
                        expert = (expert + 1) % experts
                if taken[expert] != t:
                    break
            taken[expert] = t
            ids[t, k] = expert


def _rule(holds: bool, field: str, rule: str, value: object) -> None:
    if not holds:
        raise ValueError(f"generate: {field} must be {rule}, got {value}")
