"""Random traces and placements for the tests of placement."""

from __future__ import annotations

import numpy as np

from headgate.placement.cluster.topology import Topology
from headgate.placement.placement import Placement
from headgate.placement.traces.trace import Trace


def random_case(seed: int, layers: int, tokens: int, nodes: int, per_node: int, spare: int, top_k: int):
    """A trace with empty slots here and there, and a random valid placement of it with `spare` more slots per GPU."""
    rng = np.random.default_rng(seed)
    topology = Topology(nodes, per_node)
    experts = max(topology.gpus, top_k) + int(rng.integers(0, 7))
    ids = np.stack([rng.permuted(np.tile(np.arange(experts), (tokens, 1)), axis=1)[:, :top_k] for _ in range(layers)])
    ids = np.where(rng.random(ids.shape) < 0.1, 255, ids).astype(np.uint8)
    slots = topology.slots_of_gpu(experts) + min(spare, experts - int(topology.slots_of_gpu(experts).max()))
    return Trace(ids, experts), Placement(random_slots(rng, layers, experts, slots), experts, topology, slots)


def random_slots(rng, layers, experts, slots_of_gpu):
    """Every expert somewhere, each GPU filled with distinct experts."""
    found = []
    for _ in range(layers):
        on = [[] for _ in slots_of_gpu]
        places = rng.permutation(np.repeat(np.arange(len(slots_of_gpu)), slots_of_gpu))[:experts]
        for expert, gpu in enumerate(places):
            on[gpu].append(expert)
        for gpu, size in enumerate(slots_of_gpu):
            rest = rng.permutation([e for e in range(experts) if e not in on[gpu]])
            on[gpu] += rest[: size - len(on[gpu])].tolist()
            rng.shuffle(on[gpu])
        found.append([e for experts_here in on for e in experts_here])
    return np.array(found, np.int32)
