"""Paths trained on many ranks: what each rank runs (ranks_runner.py), for test_paths.py."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn

from headgate.moe.paths import OuterSync, Paths

CHECKS: dict[str, Callable[[], None]] = {}
PATIENCE_S = 0.05


def check(function):
    CHECKS[function.__name__] = function
    return function


def some_paths(seed: int) -> Paths:
    torch.manual_seed(seed)
    return Paths([[nn.Linear(3, 4)], [nn.Linear(4, 4), nn.Linear(4, 4)], [nn.Linear(4, 2), nn.Linear(4, 2)]])


def train_one_step(paths: Paths, path: tuple[int, ...], seed: int, step: int) -> None:
    """A step of plain SGD on data of a seed."""
    draw = torch.Generator().manual_seed(100 * seed + step)
    x, y = torch.randn(5, 3, generator=draw), torch.randn(5, 2, generator=draw)
    loss = (paths(x, path) - y).square().mean()
    some = [*paths.model(path).parameters()]
    for p, grad in zip(some, torch.autograd.grad(loss, some), strict=True):
        p.data -= 0.1 * grad


class Reference:
    """The outer step of all ranks in one process, parameter by parameter."""

    def __init__(self, paths: Paths) -> None:
        self.paths, self.momentum = paths, {name: torch.zeros_like(p) for name, p in paths.named_parameters()}

    def meet(self, local: list[tuple[Paths, tuple[int, ...], float]], lr: float, momentum: float) -> None:
        for name, p in self.paths.named_parameters():
            _, level, index = name.split(".")[:3]
            trained = [
                (w, dict(one.named_parameters())[name]) for one, path, w in local if path[int(level)] == int(index)
            ]
            if not trained:
                continue
            delta = sum(w * (p.data - now.data) for w, now in trained) / sum(w for w, _ in trained)
            m = self.momentum[name].mul_(momentum).add_(delta)
            p.data -= lr * (delta + momentum * m)


def equal(paths: Paths, expected: Paths) -> None:
    for (name, p), e in zip(paths.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, e, msg=lambda said, name=name: f"{name}: {said}", rtol=1e-5, atol=1e-6)
    everybody = [torch.empty_like(p) for _ in range(dist.get_world_size())]
    dist.all_gather(everybody, p.detach())
    assert all(torch.equal(everybody[0], other) for other in everybody)


@check
def meetings_are_the_outer_steps_of_one_process():
    """Three rounds, of different weights, with one path that nobody trains; ranks begin with different weights."""
    rank, size = dist.get_rank(), dist.get_world_size()
    paths = some_paths(rank)
    outer = OuterSync(paths, every=2, lr=0.7, momentum=0.9, name="rounds")
    reference = Reference(some_paths(0))
    equal(paths, reference.paths)
    chosen = [(0, 0, 0), (0, 0, 1), (0, 0, 1), (0, 0, 0)][:size]
    for round in range(3):
        local = []
        for other, path in enumerate(chosen):
            one = copy.deepcopy(reference.paths)
            for step in range(2):
                train_one_step(one, path, 10 * round + other, step)
            local.append((one, path, 2.0 * (other + 1)))
        for step in range(2):
            draw = 10 * round + rank
            train_one_step(paths, chosen[rank], draw, step)
            assert outer.step(chosen[rank], weight=rank + 1) == (step == 1)
        reference.meet(local, 0.7, 0.9)
        equal(paths, reference.paths)
    assert outer.round == 3
    untouched = dict(some_paths(0).named_parameters())
    torch.testing.assert_close(paths.levels[1][1].weight, untouched["levels.1.1.weight"], rtol=0, atol=0)


@check
def a_slow_rank_meets_with_the_steps_that_it_has_done():
    rank = dist.get_rank()
    paths = some_paths(0)
    outer = OuterSync(paths, every=50, lr=1.0, momentum=0.0, patience_s=PATIENCE_S, name="slow")
    path, slow = outer.mine[0], rank == dist.get_world_size() - 1
    for step in range(50):
        if slow:
            time.sleep(0.1)
        train_one_step(paths, path, rank, step)
        if outer.step(path):
            break
    assert step < 49 if slow else step == 49, step
    assert outer.round == 1
    everybody = [torch.empty_like(paths.levels[0][0].weight) for _ in range(dist.get_world_size())]
    dist.all_gather(everybody, paths.levels[0][0].weight.detach())
    assert all(torch.equal(everybody[0], other) for other in everybody)


@check
def a_rank_that_comes_later_gets_the_state_and_counts():
    """The last rank is no member at first; the others meet once without it, and let it in."""
    rank, size = dist.get_rank(), dist.get_world_size()
    late = size - 1
    paths = some_paths(0 if rank != late else 7)
    options = {"every": 1, "lr": 1.0, "momentum": 0.5, "members": [*range(late)], "name": "late", "timeout_s": 60}
    if rank == late:
        dist.barrier()
        outer = OuterSync(paths, **options)
        dist.barrier()
    else:
        outer = OuterSync(paths, **options)
        assert outer.members == tuple(range(late))
        train_one_step(paths, (0, 0, 0), 0, 0)
        outer.step((0, 0, 0))
        dist.barrier()
        while outer.members != tuple(range(size)):  # until the late one has asked
            train_one_step(paths, (0, 0, 0), 0, outer.round)
            outer.step((0, 0, 0))
        dist.barrier()
    expected = copy.deepcopy(paths)
    equal(paths, expected)
    assert outer.round >= 1
    assert outer.members == tuple(range(size))
    rounds = outer.round
    reference = Reference(copy.deepcopy(paths))
    for (name, m), begin in zip(outer.state_dict()["momentum"].items(), reference.momentum, strict=True):
        reference.momentum[begin] = m.clone()
        assert begin == f"levels.{name}"
    local = []
    for other in range(size):
        one = copy.deepcopy(reference.paths)
        train_one_step(one, (0, 1, 1), 50 + other, 0)
        local.append((one, (0, 1, 1), 1.0))
    train_one_step(paths, (0, 1, 1), 50 + rank, 0)
    outer.step((0, 1, 1))
    reference.meet(local, 1.0, 0.5)
    equal(paths, reference.paths)
    assert outer.round == rounds + 1
