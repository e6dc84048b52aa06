"""The table of splits on a small trace."""

import pytest

from headgate.bench.offload.split import costs_with, measure
from headgate.placement.caching.costs import FREE, Costs
from headgate.placement.cluster.links import Link
from headgate.placement.traces.generate import generate


def test_measure():
    trace = generate(layers=3, experts=16, top_k=4, tokens=200)
    costs = Costs((1, 8), (1e-4, 2e-4), (4e-4, 2e-3), Link(10, 20), FREE, 10**7, 1e-5)
    found = measure(trace, costs, batches=(1, 16), steps=30)
    assert list(found) == [1, 16]
    for row in found.values():
        assert row["split"] == pytest.approx(1, abs=3e-3)
        assert row["worst"] <= 1.003
        assert row["proved"] == 1
        assert row["slower"] == 0
        assert min(row[name] for name in ("fiddler", "each", "fetch", "host")) >= 1
        assert row["away"] < row["experts"] <= 16
    assert found[16]["each"] > 1.01  # which the machines share, although each expert alone is faster fetched
    assert found[1]["experts"] == 4


def test_costs_of_this_host_beside_a_device_that_is_assumed():
    costs = costs_with(10, 4, hidden=64, intermediate=32)
    assert costs.host_s is not None
    assert [4 * s for s in costs.device_s] == pytest.approx(costs.host_s)
    assert costs.copy == Link(10, 10)
    assert costs.expert_bytes == 3 * 2 * 64 * 32
