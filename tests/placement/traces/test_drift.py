"""Drift between two traces, beside what chance makes of it."""

import numpy as np
import pytest

from headgate.placement.traces.drift import drift, total_variation
from headgate.placement.traces.file import TraceFile
from headgate.placement.traces.generate import generate
from headgate.placement.traces.trace import Trace


def one_choice(*layers):
    return Trace(np.array(layers, np.uint8)[..., None], 4)


def test_distances_written_out():
    a = one_choice([0, 0, 1, 1], [2, 2, 2, 2])
    b = one_choice([0, 0, 0, 1], [2, 2, 3, 3])
    found = drift(a, b, movers=3)
    np.testing.assert_allclose(found.load, [0.25, 0.5])
    # shares of (0,2), (1,2), (0,3), (1,3): 1/2, 1/2, 0, 0 and 2/4, 0, 1/4, 1/4
    np.testing.assert_allclose(found.transitions, [0.5])
    assert [(m.layer, m.expert, m.change) for m in found.movers] == [(1, 2, -0.5), (1, 3, 0.5), (0, 0, 0.25)]
    assert found.tokens == (4, 4)


def test_total_variation_of_nothing():
    assert total_variation(np.zeros(3), np.array([1, 0, 1])) == 0.5
    assert total_variation(np.zeros(3), np.zeros(3)) == 0


def test_more_of_the_same_is_chance_and_another_domain_is_not():
    trace = generate(3, 32, 2, 12_000, domains=2, topics=8, shift=0.6)
    quarters = [
        Trace(trace.expert_ids[:, at : at + 3000], 32, sequence=trace.sequence[at : at + 3000])
        for at in range(0, 12_000, 3000)
    ]
    same, other = drift(quarters[0], quarters[1]), drift(quarters[0], quarters[3])
    for found, chance in ((same.load, same.load_by_chance), (same.transitions, same.transitions_by_chance)):
        np.testing.assert_allclose(found, chance, rtol=0.5)
    assert (other.load > 3 * same.load).all()
    assert (other.transitions > 2 * same.transitions).all()


def test_chance_knows_that_sequences_stick_together():
    """Sequences of one expert each: two halves of them differ far more than halves of as many free tokens."""
    rng = np.random.default_rng(0)
    stuck = np.repeat(rng.integers(0, 4, 40), 50)
    a, b = (
        Trace(s[None, :, None].astype(np.uint8), 4, sequence=np.repeat(np.arange(20), 50).astype(np.int32))
        for s in (stuck[:1000], stuck[1000:])
    )
    free = rng.integers(0, 4, 2000).astype(np.uint8)
    loose = [Trace(f[None, :, None], 4, sequence=np.arange(1000, dtype=np.int32)) for f in (free[:1000], free[1000:])]
    assert drift(a, b).load_by_chance[0] > 2 * drift(*loose).load_by_chance[0]


def test_streamed_it_is_the_same_and_it_can_be_read(tmp_path):
    a, b = (generate(3, 16, 2, 2000, seed=0, drift=d) for d in (0.0, 1.0))
    expected = drift(a, b)
    a.save(tmp_path / "a.npz")
    with TraceFile(tmp_path / "a.npz") as file:
        found = drift(file, b)
    for name in ("load", "load_by_chance", "transitions", "transitions_by_chance"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    said = str(found)
    assert said.startswith("2,000 and 2,000 tokens")
    assert f"load         {found.load.mean():.3f}, by chance {found.load_by_chance.mean():.3f}" in said
    assert said.count("of the choices") == 5
    np.testing.assert_array_equal(drift(a, b, seed=1).load, expected.load)
    assert (drift(a, b, seed=1).load_by_chance != expected.load_by_chance).any()


def test_what_cannot_be_compared_is_refused():
    trace = generate(2, 8, 2, 50)
    with pytest.raises(ValueError, match="num_experts must be 8 in both traces, got 9"):
        drift(trace, generate(2, 9, 2, 50))
    with pytest.raises(ValueError, match="b must have tokens, got none"):
        drift(trace, Trace(trace.expert_ids[:, :0], 8))
