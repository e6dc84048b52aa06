"""Replicas: which slot a choice goes to, against the walk that counts placements; and a dispatcher around it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
from placement_cases import random_case

from headgate.dispatch import AllToAll, Local
from headgate.dispatch.protocol import Dispatcher
from headgate.dispatch.replicas import Placed, Replicas
from headgate.kernels.routing import Routing
from headgate.placement.cluster.topology import Topology
from headgate.placement.placement import Placement
from headgate.placement.walk import walk

TWO_NODES = Placement(np.array([[0, 1, 2, 3, 1, 4, 0, 1]]), 5, Topology(2, 2))


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(("nodes", "per_node", "spare"), [(1, 1, 0), (2, 2, 1), (3, 2, 3), (1, 5, 2)])
def test_slots_are_those_of_the_walk(seed, nodes, per_node, spare):
    trace, placement = random_case(seed, 2, 40, nodes, per_node, spare, top_k=3)
    homes = np.random.default_rng(seed).integers(0, nodes * per_node, 40)
    chosen = np.empty(trace.expert_ids.shape, np.int32)
    walk(trace, placement, homes=homes, chosen=chosen)
    for layer in range(2):
        for gpu in range(nodes * per_node):
            ids = torch.from_numpy(trace.expert_ids[layer, homes == gpu].astype(np.int64))
            found = Replicas.of(placement, layer, gpu).slots(ids)
            assert found.dtype == torch.int32
            np.testing.assert_array_equal(found.numpy(), chosen[layer, homes == gpu])


def test_the_rule_on_an_example():
    """GPU 3 is on node 1 with GPU 2: its own, its node's, then all in turn from (n + 3)."""
    replicas = Replicas.of(TWO_NODES, 0, 3)
    ids = torch.tensor([[0, 1, 2], [3, 4, -1], [3, 7, 4]])
    assert replicas.slots(ids).tolist() == [[6, 7, 2], [3, 5, -1], [3, -1, 5]]
    away = Replicas.of(Placement(np.array([[0, 1, 0, 2, 1, 2]]), 3, Topology(3, 1)), 0, 2)
    assert away.slots(torch.zeros(5, 1, dtype=torch.int64)).flatten().tolist() == [0, 2, 0, 2, 0]  # (n + 2) % 2


def test_no_tokens_and_no_experts():
    replicas = Replicas.of(TWO_NODES, 0, 1)
    assert replicas.slots(torch.empty(0, 2, dtype=torch.int32)).shape == (0, 2)
    assert (replicas.slots(torch.full((3, 2), -1)) == -1).all()


def test_bad_numbers_are_refused():
    with pytest.raises(ValueError, match=r"Replicas: gpu must be in 0 \.\. 3, got 4"):
        Replicas.of(TWO_NODES, 0, 4)
    with pytest.raises(ValueError, match=r"Replicas: layer must be in 0 \.\. 0, got 1"):
        Replicas.of(TWO_NODES, 1, 0)


@pytest.fixture(scope="module")
def group():
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("this torch has no gloo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("make", [Local, AllToAll])
def test_placed_is_a_dispatcher(make, group, assert_close):
    order = Placement(np.array([[3, 1, 0, 2]]), 4, Topology(1, 1))
    placed = Placed(Replicas.of(order, 0, 0), make())
    assert isinstance(placed, Dispatcher)
    assert placed.local_experts(4) == range(4)
    with pytest.raises(ValueError, match="Placed: num_experts must be the placement's 4, got 8"):
        placed.local_experts(8)
    x = torch.randn(6, 5, dtype=torch.float64)
    ids = torch.randint(-1, 4, (6, 2))
    rows, local, ticket = placed.dispatch(x, Routing.from_topk(ids, torch.rand(6, 2, dtype=torch.float64), 4))
    r = torch.randn_like(rows)
    assert_close((rows * r).sum(), (x * placed.combine(r, ticket)).sum())
    with pytest.raises(ValueError, match="Placed: routing must be over the placement's 4 experts, got 8"):
        placed.dispatch(x, Routing.from_topk(ids, torch.rand(6, 2), 8))
    slot = {3: 0, 1: 1, 0: 2, 2: 3, -1: -1}
    chosen = sorted(s for row in ids.tolist() for s in map(slot.get, row))
    assert sorted(s for s in local.expert_ids.flatten().tolist() if s >= 0) == [s for s in chosen if s >= 0]


@pytest.mark.gpu
def test_nothing_waits_for_the_device():
    trace, placement = random_case(1, 1, 200, 2, 2, 1, top_k=3)
    ids = torch.from_numpy(trace.expert_ids[0].astype(np.int64))
    expected = Replicas.of(placement, 0, 1).slots(ids)
    on_gpu, replicas = ids.cuda(), Replicas.of(placement, 0, 1, "cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = replicas.slots(on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found.cpu(), expected)
