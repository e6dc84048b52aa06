"""Paths: each is one dense model; documents find theirs by clusters, then by loss; ranks meet seldom."""

from __future__ import annotations

import threading
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks_runner import cases_of, passed_on_every_rank, ranks_fixture
from torch import nn

from headgate.moe.clusters import kmeans
from headgate.moe.paths import CoarseRouter, OuterSync, Paths

RANKS = Path(__file__).with_name("ranks_paths.py")
results = ranks_fixture(RANKS)


@pytest.mark.parametrize(("size", "check"), cases_of(RANKS, [4]))
def test_on_every_rank(results, size, check):
    passed_on_every_rank(results(size), check)


def test_k_means_finds_clusters_leaves_none_empty_and_is_the_same_again():
    torch.manual_seed(0)
    truth = torch.arange(60) % 3
    points = torch.randn(60, 5) * 0.1 + torch.eye(3, 5)[truth] * 4
    centers, of = kmeans(points, 3, seed=1)
    assert len({(a, b) for a, b in zip(truth.tolist(), of.tolist(), strict=True)}) == 3
    for e in range(3):
        torch.testing.assert_close(centers[e], points[of == e].mean(0))
    again = kmeans(points, 3, seed=1)
    assert torch.equal(again[0], centers)
    assert torch.equal(again[1], of)
    for same in (torch.ones(4, 2), torch.ones(5, 2)):
        assert torch.bincount(kmeans(same, 4)[1], minlength=4).min() >= 1
    with pytest.raises(ValueError, match=r"kmeans: clusters must be in 1 .. points"):
        kmeans(points, 61)
    with pytest.raises(ValueError, match="must be finite"):
        kmeans(points / 0, 2)


def levels():
    torch.manual_seed(0)
    return [[nn.Linear(6, 4)], [nn.Linear(4, 4), nn.Linear(4, 4)], [nn.Linear(4, 2) for _ in range(3)]]


def test_a_path_is_one_dense_model_and_trains_its_modules_alone():
    paths = Paths(levels())
    assert paths.counts == (1, 2, 3)
    assert paths.all[:4] == [(0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 1, 0)]
    x = torch.randn(5, 6)
    dense = nn.Sequential(paths.levels[0][0], paths.levels[1][1], paths.levels[2][2])
    assert torch.equal(paths(x, (0, 1, 2)), dense(x))
    paths(x, (0, 1, 2)).sum().backward()
    assert {n for n, p in paths.named_parameters() if p.grad is not None} == {
        f"levels.{at}.{kind}" for at in ("0.0", "1.1", "2.2") for kind in ("weight", "bias")
    }
    for odd in ((0, 1), (0, 2, 0), (0, 0, -1)):
        with pytest.raises(ValueError, match="Paths: path must be a number below"):
            paths(x, odd)
    shared = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="share no parameter"):
        Paths([[shared], [shared]])
    with pytest.raises(ValueError, match="levels must hold a module each"):
        Paths([[nn.Linear(4, 4)], []])


def test_documents_go_by_the_product_of_clusters_then_by_what_they_lose_least():
    torch.manual_seed(0)
    a, b = torch.arange(80) % 2, torch.arange(80) // 2 % 2
    features = torch.cat([torch.eye(2)[a] * 3, torch.eye(2)[b] * 3], 1) + 0.1 * torch.randn(80, 4)
    router = CoarseRouter((2, 2), features)
    taken = router(features)
    for level, truth in enumerate((a, b)):
        assert len(set(zip(truth.tolist(), taken[:, level].tolist(), strict=True))) == 2
    losses = torch.rand(80, 4)
    wanted = (a ^ b) * 2 + b  # another division than the clusters', linear in no part of the features alone
    losses[torch.arange(80), wanted] = -1
    with_product = torch.cat([features, (features[:, :1] - 1.5) * (features[:, 2:3] - 1.5)], 1)
    learned = CoarseRouter((2, 2), with_product)
    assert learned.reroute(with_product, losses) == 1.0
    assert torch.equal(learned(with_product)[:, 0] * 2 + learned(with_product)[:, 1], wanted)
    kept = CoarseRouter((2, 2), with_product + 1)
    kept.load_state_dict(learned.state_dict())
    assert torch.equal(kept(with_product), learned(with_product))
    with pytest.raises(ValueError, match=r"features must be \[N, 4\], got \[80, 5\]"):
        router(with_product)
    with pytest.raises(ValueError, match=r"losses must be finite, \[80, 4\]"):
        router.reroute(features, losses[:, :3])
    with pytest.raises(ValueError, match="counts must be numbers of modules"):
        CoarseRouter((2, 0), features)


def test_alone_a_meeting_is_nesterov_and_its_state_goes_on_elsewhere():
    paths = Paths(levels())
    outer = OuterSync(paths, every=1, lr=0.5, momentum=0.9)
    assert outer.mine == paths.all
    begin = paths.levels[0][0].weight.detach().clone()
    begin_momentum = torch.zeros_like(begin)
    for _ in range(2):
        delta = torch.randn_like(begin)
        paths.levels[0][0].weight.data -= delta
        assert outer.step((0, 0, 0))
        begin_momentum = 0.9 * begin_momentum + delta
        begin = begin - 0.5 * (delta + 0.9 * begin_momentum)
        torch.testing.assert_close(paths.levels[0][0].weight.data, begin)
    other = Paths([[nn.Linear(6, 4)], [nn.Linear(4, 4), nn.Linear(4, 4)], [nn.Linear(4, 2) for _ in range(3)]])
    again = OuterSync(other, every=1)
    again.load_state_dict(outer.state_dict())
    assert again.round == 2
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), paths.parameters(), strict=True))
    odd = OuterSync(Paths([[nn.Linear(6, 4)]]), every=1)
    with pytest.raises(ValueError, match=r"begin must be of these paths, got another 1.0.bias"):
        odd.load_state_dict(outer.state_dict())


def test_a_module_that_is_not_finite_spoils_no_meeting():
    paths = Paths(levels())
    outer = OuterSync(paths, every=1, lr=1.0, momentum=0.0)
    begin = [p.detach().clone() for p in paths.parameters()]
    paths.levels[1][0].weight.data[1, 2] = torch.nan
    paths.levels[0][0].bias.data += 1
    with pytest.warns(UserWarning, match="module 0 of level 1 is not finite on rank 0"):
        outer.step((0, 0, 0))
    begin[1] += 1  # the bias of the first module
    for p, expected in zip(paths.parameters(), begin, strict=True):
        torch.testing.assert_close(p.data, expected)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"every": 0}, "every must be a whole number of at least 1, got 0"),
        ({"momentum": 1.0}, "momentum must be in 0 .. 0.9999, got 1.0"),
        ({"lr": float("nan")}, "lr must be in 0 .. 10, got nan"),
        ({"members": [0, 1]}, "store must be given where torch.distributed has not begun"),
    ],
)
def test_odd_options_of_a_meeting(options, says):
    with pytest.raises(ValueError, match=says):
        OuterSync(Paths(levels()), **options)


def test_an_odd_step():
    outer = OuterSync(Paths(levels()), every=9)
    with pytest.raises(ValueError, match="weight must be positive and finite, got 0"):
        outer.step((0, 0, 0), 0)
    with pytest.raises(ValueError, match="path must be a number below"):
        outer.step((0, 0), 1)


def test_a_rank_that_was_left_out_comes_back_and_owes_no_meeting():
    """Two ranks as threads: one is late by more than the time-out, is left out, asks, and goes on training with the
    state of the other, who meets no more until it has begun."""
    store, late, back = dist.HashStore(), threading.Event(), threading.Event()
    found: dict[int, tuple] = {}

    def live(rank: int) -> None:
        torch.manual_seed(rank)
        paths = Paths([[nn.Linear(2, 2)]])
        outer = OuterSync(paths, every=1, store=store, rank=rank, members=[0, 1], timeout_s=2.5)
        outer.step((0,))
        if rank == 1:
            assert late.wait(30)
            outer.step((0,))
            back.set()
        else:
            outer.step((0,))
            late.set()
            while outer.members != (0, 1):
                outer.step((0,))
            assert back.wait(30)
        outer.step((0,))
        found[rank] = outer.members, outer.round, paths.levels[0][0].weight.detach().clone()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        threads = [threading.Thread(target=live, args=(rank,), daemon=True) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    (members, rounds, weight), other = found[0], found[1]
    assert members == other[0] == (0, 1)
    assert rounds == other[1]
    assert torch.equal(weight, other[2])
