"""Costs: the formulas by a clock that the work itself moves, and one run on this machine."""

import pytest
import torch

from headgate.kernels import quantize
from headgate.moe.offload.costs import measure_costs, rate, tabulate, timed
from headgate.placement.caching.costs import FREE
from headgate.placement.cluster.links import Link


class Clock:
    """Shows a time that work moves on."""

    def __init__(self):
        self.now, self.calls = 0.0, 0

    def __call__(self):
        return self.now

    def working(self, *seconds):
        """work(): takes these seconds, one after the other, the last again and again."""

        def work(*_):
            self.now += seconds[min(self.calls, len(seconds) - 1)]
            self.calls += 1

        return work


@pytest.mark.parametrize(
    ("seconds", "budget_s", "median", "calls"),
    [
        ((9, 2, 4, 3), 0.0, 3, 4),  # the first is not counted; three are, whatever the budget
        ((9, 1), 10.0, 1, 11),
        ((9, 0.01), 100.0, 0.01, 101),  # nobody needs more than a hundred
    ],
)
def test_the_median_of_what_the_time_allows(seconds, budget_s, median, calls):
    clock = Clock()
    assert timed(clock.working(*seconds), budget_s, clock) == pytest.approx(median)
    assert clock.calls == calls


def test_more_rows_are_never_faster():
    clock, took = Clock(), {1: 1.0, 2: 3.0, 4: 2.5, 8: 4.0}

    def work(n):
        clock.now += took[n]

    assert tabulate(work, (1, 2, 4, 8), 0, clock) == (1, 3, 3, 4)


def test_a_link_by_its_sizes():
    clock = Clock()

    def move(size):
        clock.now += 20e-6 + size / 50e9

    link = rate(move, (10**5, 10**6, 10**7), 0, clock)
    assert (link.latency_us, link.bandwidth_GBps) == (pytest.approx(20), pytest.approx(50))


def weights(pair=False):
    if pair:
        return {"w_gate": torch.randn(3, 24, 16), "w_up": torch.randn(3, 24, 16), "w_down": torch.randn(3, 16, 24)}
    return {"w_gate_up": torch.randn(3, 48, 16), "w_down": torch.randn(3, 16, 24)}


@pytest.mark.parametrize("pair", [False, True])
def test_on_this_machine(pair, tmp_path):
    file = tmp_path / "experts"
    file.write_bytes(bytes(10_000))  # shorter than an expert: reading goes on at its beginning
    costs = measure_costs(weights(pair), file=file, dtype=torch.float32, rows=(1, 4, 64), seconds=0.05)
    assert costs.rows == (1, 4, 64)
    assert 0 < costs.device_s[0] <= costs.device_s[1] <= costs.device_s[2] < 10
    assert costs.host_s is None  # the host is the device
    assert costs.copy == FREE
    assert costs.expert_bytes == 4 * (48 * 16 + 16 * 24)
    assert costs.read.bandwidth_GBps > 0
    assert costs.read_s() > 0


def test_forms_and_few_bits():
    stored = {name: w.transpose(1, 2).contiguous() for name, w in weights().items()}
    rules = dict(dtype=torch.float32, rows=(2,), seconds=0.01)
    assert measure_costs(stored, transposed=True, activation="gelu", **rules).read == Link(0.0, float("inf"))
    w = {"w_gate_up": torch.randn(2, 64, 32), "w_down": torch.randn(2, 32, 32)}
    biased = w | {"b_gate_up": torch.randn(2, 64), "b_down": torch.randn(2, 32)}
    assert measure_costs(biased, **rules).expert_bytes == 4 * (64 * 32 + 32 * 32 + 64 + 32)
    few = {name: quantize(t, "mxfp4") for name, t in w.items()}
    assert measure_costs(few, **rules).expert_bytes == sum(q.nbytes for q in few.values()) // 2


def test_experts_are_taken_in_turn(monkeypatch):
    seen = []
    import headgate.moe.offload.costs as module

    real = module.grouped_ffn

    def watched(rows, routing, first, w_down, **form):
        seen.append(w_down.data_ptr())
        return real(rows, routing, first, w_down, **form)

    monkeypatch.setattr(module, "grouped_ffn", watched)
    measure_costs(weights(), dtype=torch.float32, rows=(1,), seconds=0)
    assert len(set(seen)) == 3


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="measure_costs: weights must be those of an expert by name, got none"):
        measure_costs({})
    empty = tmp_path / "empty"
    empty.touch()
    with pytest.raises(ValueError, match="measure_costs: file must hold bytes to read, got an empty one"):
        measure_costs(weights(), dtype=torch.float32, file=empty)
    with pytest.raises(FileNotFoundError):
        measure_costs(weights(), dtype=torch.float32, file=tmp_path / "none")
    with pytest.raises(TypeError, match="grouped_ffn: w_gate_up must have the dtype of rows"):
        measure_costs(weights())


@pytest.mark.gpu
def test_on_a_gpu():
    costs = measure_costs({k: w.bfloat16() for k, w in weights().items()}, device="cuda", rows=(1, 64))
    assert costs.host_s is not None
    assert 0 < costs.device_s[0] <= costs.device_s[1]
    assert 0 < costs.copy_s() < 1
    assert costs.start_s > 0
