"""One rank of the benchmark, started by dispatch/launch.py: `python -m headgate.bench.overlap.rank FOLDER RANK`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...dispatch import AllToAll, Dispatcher, Overlap
from ...kernels.routing import Routing
from ...moe import MoE, ShortcutBlock
from ..dispatch.rank import Tell, serve, slowest
from ..measure import Contestant, interleave, sample

D, F, PER_RANK, K = 512, 1024, 4, 2


class _Sleep(torch.autograd.Function):
    """x, after `seconds`; its gradient too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        time.sleep(seconds)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        time.sleep(ctx.seconds)
        return grads[0], None


class Slow:
    """A dispatcher on a link that takes `per_row` seconds for a token's row, there, back, and for their gradients."""

    def __init__(self, inner: Dispatcher) -> None:
        self.inner, self.per_row = inner, 0.0

    def local_experts(self, num_experts: int) -> range:
        return self.inner.local_experts(num_experts)

    def dispatch(self, x: Tensor, routing: Routing) -> tuple[Tensor, Routing, Any]:
        return self.inner.dispatch(_Sleep.apply(x, self.per_row * len(x)), routing)

    def combine(self, rows: Tensor, ticket: Any) -> Tensor:
        y = self.inner.combine(rows, ticket)
        return _Sleep.apply(y, self.per_row * len(y))


@dataclass
class Entrant:
    """`degree` 0: no schedule."""

    module: nn.Module
    slow: Slow
    x: Tensor
    degree: int

    def run(self, per_row: float, train: bool) -> Tensor:
        self.slow.per_row = per_row
        if not train:
            with torch.no_grad():
                return self.module(self.x)
        y = self.module(self.x)
        y.backward(torch.ones_like(y))
        return y.detach()


def mlp(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(D, width, bias=False), nn.ReLU(), nn.Linear(width, D, bias=False))


def entrants(tokens: int, degrees: list[int], block: bool) -> dict[str, Entrant]:
    """The same layer, or block, with every schedule; a block's attention and shared expert: half the experts' work."""
    torch.manual_seed(1)
    beside = {name: mlp(3 * F * K // 4) for name in ("attention", "shared")}
    state, found = None, {}
    for degree in (0, *degrees):
        slow = Slow(AllToAll())
        moe = MoE(
            D, F, PER_RANK * dist.get_world_size(), K, dispatcher=slow, overlap=Overlap(degree) if degree else None,
            force_load_balancing="round_robin",
        )  # fmt: skip
        state = moe.state_dict() if state is None else state
        moe.load_state_dict(state)
        module = ShortcutBlock(moe=moe, **beside) if block else moe
        torch.manual_seed(dist.get_rank())
        x = torch.randn(tokens, D, requires_grad=True)
        found[f"degree {degree}" if degree else "no schedule"] = Entrant(module, slow, x, degree)
    return found


def timed(run: Callable[[Entrant], object], those: dict[str, Entrant], budget_s: float) -> dict[str, list[float]]:
    """Seconds of each, of the rank that took longest, in turns."""

    def contestant(entrant: Entrant) -> Contestant:
        return Contestant(lambda _: run(entrant), lambda: entrant.module.zero_grad(), dist.barrier)

    found = {name: contestant(entrant) for name, entrant in those.items()}
    for who in found.values():
        sample(who, 0)
        who.first_s = slowest([sample(who, 0)])[0]
    interleave(found, budget_s, rounds=(5, 40))
    return {name: slowest(who.samples_s) for name, who in found.items()}


def median(seconds: list[float]) -> float:
    return torch.tensor(seconds).median().item()


def measure(job: dict[str, Any], block: bool, train: bool, tell: Tell) -> None:
    tokens, budget = job["tokens"], job["budget_s"]
    those = entrants(tokens, job["degrees"], block)
    wanted = those["no schedule"].run(0.0, train)
    for name, entrant in those.items():
        error = (entrant.run(0.0, train) - wanted).abs().max().item()
        if error > 1e-4 * wanted.abs().max().item():
            raise AssertionError(f"{name}: its output is {error:.3g} away from that without a schedule")
    what = {"layer": "block" if block else "layer", "pass": "train" if train else "forward"}
    tell({"progress": f"{what['layer']} {what['pass']}: no delay"})
    without = timed(lambda e: e.run(0.0, train), those, budget / 2)
    computed = median(without["no schedule"])
    passes = 4 if train else 2
    # sized alike: a layer's transfers as its computation; a block's as what is beside them, half of it
    per_row = computed * (0.5 if block else 1.0) / (passes * tokens)
    tell({"progress": f"{what['layer']} {what['pass']}: {1e6 * per_row:.1f} us a row"})
    with_delay = timed(lambda e: e.run(per_row, train), those, budget)
    tell({"case": what | {
        "computed_s": computed, "transfers_s": passes * tokens * per_row, "per_row_s": per_row, "degrees": {
            name: {"without_delay_s": without[name], "with_delay_s": with_delay[name]} for name in those
        },
    }})  # fmt: skip


def run(job: dict[str, Any], rank: int, tell: Tell) -> None:
    for layer in job["layers"]:
        for kind in job["passes"]:
            measure(job, layer == "block", kind == "train", tell)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), run)
