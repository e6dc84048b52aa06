"""`pytest bench --benchmark-only`: the cases of `headgate bench moe` under pytest-benchmark.

One group per case. pytest-benchmark measures one implementation after another, not in turns: for ratios take
`headgate bench moe`.
"""

from __future__ import annotations

import pytest

from headgate.bench.case import Bench, LeftOut, Settings


@pytest.fixture(scope="module")
def bench():
    return Bench(Settings())


def test_moe(benchmark, bench, moe_case, implementation):
    try:
        problem = bench.problem(moe_case)
        who = bench.enter(moe_case, problem, implementation)
    except LeftOut as left:
        if left.kind == "refused":
            raise
        pytest.skip(left.reason)
    benchmark.group = str(moe_case)
    benchmark.extra_info |= {"calls_per_round": who.calls, "pairs": moe_case.tokens * moe_case.shape.top_k}

    def one_round():
        for call in range(who.calls):
            who.run(call)

    benchmark.pedantic(one_round, setup=who.after, rounds=2 if who.first_s > 0.5 else 7)
    who.after()
