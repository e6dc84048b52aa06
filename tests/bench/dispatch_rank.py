"""One rank of `headgate bench dispatch` with contestants that must be refused, started by test_bench_dispatch.py:
`python dispatch_rank.py FOLDER RANK`."""

from __future__ import annotations

import sys
from dataclasses import replace

import torch
import torch.distributed as dist

from headgate.bench.dispatch import rank
from headgate.bench.dispatch.contestants import CONTESTANTS
from headgate.bench.dispatch.rivals import Step


class Backward(torch.autograd.Function):
    """The identity; the gradient goes through `change`."""

    @staticmethod
    def forward(ctx, x, change):
        ctx.change = change
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return ctx.change(grad), None


def around(before=lambda t: t, after=lambda y: y, experts=lambda p: None, name="all_to_all"):
    """Headgate's layer with something done to its inputs, its output or its expert weights' gradients."""

    def build(world, wire):
        step = CONTESTANTS[name].build(world, wire)
        experts(step.gate_up)

        def forward(x, ids, weights):
            return after(step.forward(before(x), ids, weights))

        return Step(forward, step.gate_up, step.down)

    return replace(CONTESTANTS[name], build=build)


def odd(value, other):
    return value if dist.get_rank() == 1 else other


def chatty(y):
    dist.all_reduce(torch.ones(3))
    return y


def broadcasting(y):
    dist.broadcast(torch.ones(3), 0)
    return y


def failing(y):
    if dist.get_rank() == 1:
        raise OSError("the disk is full")
    dist.all_reduce(torch.ones(3))
    return y


def cannot_be_built(world, wire):
    raise AttributeError("no such function any more")


BROKEN = {
    "output": around(after=lambda y: y * odd(1.01, 1)),
    "nan": around(after=lambda y: y * odd(torch.nan, 1)),
    "input": around(before=lambda x: Backward.apply(x, lambda g: g * odd(1.01, 1))),
    "experts": around(experts=lambda p: p.register_hook(lambda g: g * odd(1.01, 1))),
    "chatty": around(after=chatty),
    "broadcasting": around(after=broadcasting),
    "missing": replace(CONTESTANTS["all_to_all"], build=cannot_be_built),
    "failing": around(after=failing),
}

if __name__ == "__main__":
    rank.main(sys.argv[1], int(sys.argv[2]), dict(CONTESTANTS) | BROKEN)
