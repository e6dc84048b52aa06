"""Checks on many ranks: one-sided copies. See ranks.py."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
from dispatch_cases import D, cases, check

from headgate.dispatch import AllToAll, Symmetric, window
from headgate.kernels.routing import Routing


@check
def one_sided_copies_give_the_bits_of_messages():
    for what, case in cases("symmetric", torch.bfloat16).items():
        results = []
        for d in (Symmetric(), AllToAll()):
            x, weights = (case.mine(t).clone().requires_grad_() for t in (case.x, case.weights))
            rows, local, ticket = d.dispatch(x, Routing.from_topk(case.mine(case.ids), weights, case.experts))
            y = d.combine(rows * local.weights.sum(1, keepdim=True), ticket)
            (y * case.mine(case.g)).sum().backward()
            results.append([rows.detach(), local.expert_ids, y.detach(), x.grad, weights.grad])
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b), what


@check
def a_window_grows_in_step_and_leaves_no_file():
    d, opened, original = Symmetric(), [], window.CPUWindow
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(window, "shared_folder", os.getcwd)  # the folder of this test alone
        patch.setattr(window, "CPUWindow", lambda *arguments: opened.append(arguments[1]) or original(*arguments))
        for tokens in (1, 30, 600, 800, 2, 2000):  # only the last rank has many
            tokens = tokens if dist.get_rank() == dist.get_world_size() - 1 else 1
            ids = torch.arange(tokens).view(tokens, 1) % dist.get_world_size()
            x = torch.randn(tokens, 1000)
            rows, _, ticket = d.dispatch(x, Routing.from_topk(ids, torch.ones(tokens, 1), dist.get_world_size()))
            assert torch.equal(d.combine(rows, ticket), x)
    # 600 rows of 1000 * 4 + 1 * (4 + 4) bytes are 2.4 MB; 800 want more than that, and get twice as much
    assert opened == [n * 2**20 for n in (1, 3, 6, 12)]
    dist.barrier()
    assert not [name for name in os.listdir() if name.startswith("headgate-")]


@check
def memory_that_cannot_be_shared_is_an_error_on_every_rank():
    """The last rank is as on another machine, first for its own file and then for those of the others."""
    size, rank = dist.get_world_size(), dist.get_rank()
    routing = Routing.from_topk(torch.zeros(3, 1, dtype=torch.int32), torch.ones(3, 1), size)
    mapped = window._mapped
    elsewhere = {"shared_folder": lambda: "/nowhere", "_mapped": lambda name, nbytes: mapped("/nowhere", nbytes)}
    for name, instead in elsewhere.items():
        d = Symmetric()
        with pytest.MonkeyPatch.context() as patch:
            if rank == size - 1:
                patch.setattr(window, name, instead)
            words = rf"^Symmetric: group must be ranks of one machine, .* got on rank {size - 1}: .*No such file"
            with pytest.raises(ValueError, match=words):
                d.dispatch(torch.zeros(3, D), routing)
        rows, _, ticket = d.dispatch(torch.ones(3, D), routing)  # and it can go on
        assert torch.equal(d.combine(rows, ticket), torch.ones(3, D))
