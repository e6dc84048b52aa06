"""Rows that travel while experts compute: the numbers of one process, whatever is late; errors reach every rank."""

from __future__ import annotations

import gc
import random
import time
import weakref
from concurrent.futures import Future
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from folds_cases import D, E, F, K, check, layer, once, some_folds
from ranks_compare import close
from torch.utils.checkpoint import checkpoint

import headgate
from headgate.dispatch import AllToAll, Fold, Overlap, collectives
from headgate.dispatch.rollcall import DeadRanks
from headgate.dispatch.schedule import Flight, _groups
from headgate.moe import Capacity, MoE, ShortcutBlock
from headgate.moe.ranks.parallel import parallel_of


@contextmanager
def late(seconds: float):
    """Each all-to-all waits for a random time first, another on each rank."""
    original, drawn = collectives.all_to_all, random.Random(dist.get_rank())

    def all_to_all(*args):
        time.sleep(drawn.random() * seconds)
        return original(*args)

    collectives.all_to_all = all_to_all
    try:
        yield
    finally:
        collectives.all_to_all = original


@check
def experts_compute_while_rows_travel():
    """Under folds of all kinds; more chunks than some ranks have tokens."""
    for fold, degree in zip(some_folds(), (4, 2, 1, 3, 6) * 5, strict=False):
        once(fold, overlap=degree)
    size, capacity = dist.get_world_size(), Capacity(0.7, scope="batch")
    options = {"weights_on_input": True, "latent_size": 4, "bias": False, "capacity": capacity}
    once(Fold({"dp": size}, {"ep": size}), options, overlap=Overlap(2))


@check
def gradients_are_averaged_over_other_groups_than_rows_travel():
    """Both at once, from two threads: in one group they would meet each other."""
    for fold in some_folds():
        spread = headgate.parallelize(layer(), fold, overlap=2)
        rows = set(_groups(spread.experts.dispatcher))
        for _, over in parallel_of(spread).cut():
            for names in (("edp",), ("edp", "etp")):
                assert over.group(*names) not in rows, (fold, names)


@check
def messages_that_are_late_change_nothing():
    fold = Fold({"dp": dist.get_world_size()}, {"ep": dist.get_world_size()})
    with late(0.02):
        once(fold, overlap=4)


@check
def a_schedule_under_checkpointing_and_without_gradients():
    size = dist.get_world_size()
    plain, mine = (
        MoE(D, F, E, K, dispatcher=AllToAll(), overlap=overlap, shared_intermediate_size=8, dtype=torch.float64)
        for overlap in (None, Overlap(3))
    )
    mine.load_state_dict(plain.state_dict())
    x = torch.randn(5 * dist.get_rank(), D, dtype=torch.float64)
    found = []
    for of, again in ((plain, False), (mine, False), (mine, True)):
        here = x.clone().requires_grad_()
        y = checkpoint(of, here, use_reentrant=False) if again else of(here)
        y.square().sum().backward(retain_graph=True)
        once_more = torch.autograd.grad(y.square().sum(), here)[0]
        close(once_more, here.grad, "a second backward pass", 1e-12)
        found.append([y.detach(), here.grad, *(p.grad.clone() for p in of.parameters())])
        of.zero_grad()
    with torch.no_grad():
        found.append([mine(x), *found[0][1:]])
    for other in found[1:]:
        for a, b in zip(other, found[0], strict=True):
            close(a, b, f"{size} ranks", 1e-12)


@check
def an_error_in_one_ranks_experts_is_one_on_every_rank():
    torch.manual_seed(3)
    mine = MoE(D, F, E, K, dispatcher=AllToAll(), overlap=Overlap(3))
    x, compute, calls = torch.randn(7, D), mine.experts._compute, []

    def fails(*args):
        calls.append(args)
        if len(calls) == 2:
            raise ArithmeticError("not today")
        return compute(*args)

    y = mine(x)
    odd = dist.get_world_size() - 1
    if dist.get_rank() == odd:
        mine.experts._compute = fails
    expected = (
        (ArithmeticError, "not today") if dist.get_rank() == odd else (RuntimeError, f"experts of rank {odd} failed")
    )
    with pytest.raises(expected[0], match=expected[1]) as caught:
        mine(x)
    assert not isinstance(caught.value, DeadRanks)
    mine.experts._compute = compute
    assert torch.equal(mine(x), y), "no rank has a transfer too many or too few"


@check
def an_error_beside_transfers_is_one_on_every_rank():
    torch.manual_seed(3)
    moe = MoE(D, F, E, K, dispatcher=AllToAll(), overlap=Overlap(2))
    odd, fails, parts = dist.get_world_size() - 1, [], {}

    class Part(torch.nn.Linear):
        def forward(self, x):
            if self in fails:
                raise ArithmeticError("not beside")
            return super().forward(x)

    parts = {"attention": Part(D, D), "shared": Part(D, D)}
    block, x = ShortcutBlock(moe=moe, **parts), torch.randn(7, D)
    y = block(x)
    for part in parts.values():
        fails[:] = [part] * (dist.get_rank() == odd)
        with pytest.raises(ArithmeticError if fails else RuntimeError, match=f"not beside|of rank {odd} failed"):
            block(x)
    fails.clear()
    assert torch.equal(block(x), y), "no rank has a transfer too many or too few"


@check
def a_schedule_leaves_nothing_behind():
    """Nor does the graph hold the rows that came home, nor anything a cycle that Python has to find, or cannot."""
    mine = MoE(D, F, E, K, dispatcher=AllToAll(), overlap=Overlap(3))
    flights, arrived, alive = weakref.WeakSet(), Flight.arrived, []

    def seen(flight):
        outs, differ = arrived(flight)
        flights.add(flight)
        alive.extend(map(weakref.ref, outs))
        return outs, differ

    def over():
        mine.overlap.wire(torch.device("cpu")).submit(int).result()  # the thread has let go of its last job

    Flight.arrived = seen
    gc.collect()
    gc.disable()
    try:
        with torch.no_grad():
            mine(torch.randn(5, D))
        over()
        assert not flights
        for through in (mine, lambda x: checkpoint(mine, x, use_reentrant=False)):
            y = through(torch.randn(5, D, requires_grad=True))
            assert len(flights) == 6
            assert not [v for f in flights for v in vars(f).values() if isinstance(v, Future | torch.Tensor)]
            y.sum().backward()
            del y
            over()
            assert not flights
        assert not [ref for ref in alive if ref() is not None]
    finally:
        Flight.arrived = arrived
        gc.enable()


@check
def a_block_whose_attention_hides_the_transfers():
    torch.manual_seed(3)
    parts = {"attention": torch.nn.MultiheadAttention(D, 2, batch_first=True), "shared": torch.nn.Linear(D, D)}
    moe, norm = layer(shared_intermediate_size=0), torch.nn.LayerNorm(D)
    block = ShortcutBlock(moe=moe, norm=norm, **parts)
    x = torch.randn(2, 3, D, requires_grad=True)
    h = x + parts["attention"](x, x, x)[0]
    expected = h + parts["shared"](h) + moe(norm(x))
    wanted = torch.autograd.grad(expected.square().sum(), [x, *block.parameters()])
    close(block(x, x, x), expected, "one process")
    size = dist.get_world_size()
    headgate.parallelize(block, Fold({"dp": size}, {"ep": size}), overlap=2)
    y = block(x, x, x)
    close(y, expected, "with a schedule")
    y.square().sum().backward()  # every rank has the same tokens, so the average over ranks is one rank's
    for (name, p), g in zip(block.named_parameters(), wanted[1:], strict=True):
        if "experts" not in name:
            close(p.grad, g, name, 1e-4)
    close(x.grad, wanted[0], "x", 1e-4)


@check
def what_a_schedule_cannot_do_is_refused():
    fold = some_folds()[0]
    for how, error, words in (
        ({"overlap": 0}, ValueError, "Overlap: degree must be at least 1, got 0"),
        ({"overlap": "4"}, TypeError, "parallelize: overlap must be an Overlap, its degree or None, got '4'"),
        ({"overlap": 2, "dispatcher": "auto"}, ValueError, "parallelize: overlap must be None with dispatcher='auto'"),
    ):
        with pytest.raises(error, match=words):
            headgate.parallelize(layer(), fold, **how)
