"""The walk once more, in plain Python, one token after the other: the truth that `walk` is compared with."""

from __future__ import annotations

from collections import Counter, defaultdict


def brute_walk(ids, none, placement, homes, replica="home", home="fixed", foretold=None):
    """A dict of Counters keyed by (layer, ...), and the slot of every choice."""
    topology = placement.topology
    node = [g // topology.gpus_per_node for g in range(topology.gpus)]
    gpu_of_slot = placement.gpu_of_slot.tolist()
    found = defaultdict(Counter)
    layers, tokens, top_k = ids.shape
    turns = Counter()
    slots_of_choice = {}
    where = [int(h) for h in homes]
    before = [[] for _ in range(tokens)]
    for layer in range(layers):
        standing = defaultdict(list)
        for slot, expert in enumerate(placement.expert_of_slot[layer].tolist()):
            standing[expert].append(slot)
        for t in range(tokens):
            h, now = where[t], []
            for k in range(top_k):
                expert = int(ids[layer, t, k])
                if expert == none:
                    continue
                options = standing[expert]
                if replica == "follow" and layer:
                    near = {s: nearness(before[t], node, gpu_of_slot[s]) for s in options}
                    options = [s for s in options if near[s] == max(near.values())]
                at_home = [s for s in options if gpu_of_slot[s] == h]
                near = [s for s in options if node[gpu_of_slot[s]] == node[h]]
                options = at_home or near or options
                turn = 0
                if len(options) > 1:
                    turn = (turns[layer, h, expert] + h) % len(options)
                    turns[layer, h, expert] += 1
                slots_of_choice[layer, t, k] = options[turn]
                now.append((k, gpu_of_slot[options[turn]]))
            on = [g for _, g in now]
            then = next_home(h, on, [int(ids[layer, t, k]) for k, _ in now], home, foretold, layer, layers)
            for g in on:
                found["load"][layer, g] += 1
            for g in set(on):
                found["rows"][layer, h, g] += 1
                found["back"][layer, g, then] += 1
            for n in {node[g] for g in on}:
                found["node_rows"][layer, h, n] += 1
                found["node_back"][layer, n, then] += 1
            for a in before[t]:
                for b in on:
                    found["transitions"][layer - 1] += 1
                    found["cross_gpu"][layer - 1] += a != b
                    found["cross_node"][layer - 1] += node[a] != node[b]
            where[t], before[t] = then, on
    return found, slots_of_choice


def nearness(before, node, gpu):
    """How many of the choices before were on this GPU, and how many on its node."""
    return before.count(gpu), sum(node[g] == node[gpu] for g in before)


def next_home(h, on, experts, home, foretold, layer, layers):
    if home == "fixed" or not on:
        return h
    counts = Counter(on)
    if home == "foretold" and layer < layers - 1:
        score = {g: sum(foretold.on_gpu[layer, e, g] for e in experts) for g in counts}
        best = max(score.values())
        candidates = {g for g in counts if abs(score[g] - best) < 1e-9}
        counts = Counter({g: counts[g] for g in candidates})
    most = max(counts.values())
    among = sorted(g for g in counts if counts[g] == most)
    return h if h in among else among[0]
