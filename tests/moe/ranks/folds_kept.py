"""The checks of checkpoints that move between folds, and of experts on disk, run by test_folds_kept.py."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from folds_cases import D, E, F, K, compare, folder, layer, optimizer_of, some_folds, train, trained

import headgate
from headgate.dispatch import AllToAll, Fold
from headgate.moe import MoE

CHECKS = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


@check
def a_checkpoint_moves_between_folds_and_to_one_process():
    reference, reference_optimizer = trained(None)
    train(reference, reference_optimizer, None, 2)
    ways = [(fold, how) for fold in some_folds() for how in ({}, {"fsdp": True})]
    for at, (fold, how) in enumerate(ways):
        mine, optimizer = trained(fold, **how)
        headgate.save_checkpoint(folder("moving"), mine, optimizer, extra={"step": 2})
        for target, options in (ways[(at + 3) % len(ways)], (None, {})):
            other = layer(torch.float64, seed=5)
            if target is not None:
                headgate.parallelize(other, target, **options)
            fresh = optimizer_of(other, 1.0)
            assert headgate.load_checkpoint(folder("moving"), other, fresh) == {"step": 2}
            assert [g["lr"] for g in fresh.param_groups] == [1e-3, 1e-2]
            train(other, fresh, target, 2)
            compare(reference, other, lambda p: p.detach(), f"{fold} {how} -> {target} {options}", 1e-9)
        dist.barrier()


@check
def a_checkpoint_of_one_process_goes_to_any_fold():
    reference, optimizer = trained(None)
    if dist.get_rank() == 0:
        headgate.save_checkpoint(folder("alone"), reference, optimizer)
    dist.barrier()
    train(reference, optimizer, None, 2)
    for fold in some_folds():
        mine, fresh = trained(fold)
        headgate.load_checkpoint(folder("alone"), mine, fresh)
        train(mine, fresh, fold, 2)
        compare(reference, mine, lambda p: p.detach(), f"{fold}", 1e-9)


@check
def a_checkpoint_with_shared_experts_cut_over_tp_moves_like_any():
    """The shared expert is one tensor there, however it was cut."""
    reference, optimizer = trained(None)
    size = dist.get_world_size()
    tp, dp = Fold({"tp": size}, {"ep": size}), Fold({"dp": size}, {"ep": size})
    ways = [(tp, {"cut_shared": True}), (None, {}), (dp, {"fsdp": True}), (tp, {"cut_shared": True, "fsdp": True}),
            (Fold({"dp": size // 2, "tp": 2}, {"etp": size}), {"cut_shared": True})]  # fmt: skip
    train(reference, optimizer, None, 2)
    for at, (fold, how) in enumerate(ways):
        mine, optimizer = trained(fold, **how)
        if fold is not None or dist.get_rank() == 0:
            headgate.save_checkpoint(folder("shared"), mine, optimizer)
        dist.barrier()
        for target, options in ways:
            if at and not options.get("cut_shared"):
                continue
            other = layer(torch.float64, seed=5)
            if target is not None:
                headgate.parallelize(other, target, **options)
            fresh = optimizer_of(other, 1.0)
            headgate.load_checkpoint(folder("shared"), other, fresh)
            train(other, fresh, target, 2)
            compare(reference, other, lambda p: p.detach(), f"{fold} {how} -> {target} {options}", 1e-9)
        dist.barrier()


@check
def a_save_that_fails_keeps_the_last_checkpoint():
    mine, optimizer = trained(some_folds()[1])
    headgate.save_checkpoint(folder("kept"), mine, optimizer, extra="first")
    with pytest.raises(ValueError, match=r"save_checkpoint: extra must be .*, got object"):
        headgate.save_checkpoint(folder("kept"), mine, optimizer, extra=object())
    in_the_way = folder("kept").with_name("kept.partial")
    if dist.get_rank() == 0:
        in_the_way.write_text("")
    dist.barrier()
    with pytest.raises(BaseException, match="File exists"):
        headgate.save_checkpoint(folder("kept"), mine, optimizer, extra="lost")
    dist.barrier()
    if dist.get_rank() == 0:
        in_the_way.unlink()
    assert headgate.load_checkpoint(folder("kept"), mine, optimizer) == "first"
    headgate.save_checkpoint(folder("kept"), mine, optimizer, extra="second")
    assert headgate.load_checkpoint(folder("kept"), mine) == "second"
    assert sorted(p.name for p in folder("kept").parent.glob("kept*")) == ["kept"]


@check
def a_checkpoint_that_does_not_fit_is_refused():
    fold = some_folds()[1]
    mine, optimizer = trained(fold)
    headgate.save_checkpoint(folder("fits"), mine)
    before = [p.detach().clone() for p in mine.parameters()]
    with pytest.raises(FileNotFoundError, match="path must be a folder that save_checkpoint wrote, got "):
        headgate.load_checkpoint(folder("nothing"), mine)
    with pytest.raises(ValueError, match="path must hold an optimizer's state, got one without"):
        headgate.load_checkpoint(folder("fits"), mine, optimizer)
    larger = headgate.parallelize(MoE(D, F, 2 * E, K), fold)
    with pytest.raises(ValueError, match=r"router.weight must be \(32, 8\), got \(16, 8\) from"):
        headgate.load_checkpoint(folder("fits"), larger)
    gate = headgate.parallelize(MoE(D, F, E, K, shared_intermediate_size=8, shared_gate=True, bias=True), fold)
    with pytest.raises(ValueError, match=r"path must hold shared.gate.weight, got a checkpoint without it"):
        headgate.load_checkpoint(folder("fits"), gate)
    by_hand = MoE(D, F, E, K, dispatcher=AllToAll())
    with pytest.raises(
        ValueError, match="checkpoint: experts must be cut by parallelize where ranks share its experts"
    ):
        headgate.save_checkpoint(folder("fits"), by_hand)
    adafactor = torch.optim.Adafactor(mine.parameters())
    mine(torch.randn(3, D, dtype=torch.float64)).sum().backward()
    adafactor.step()
    with pytest.raises(ValueError, match="optimizer must keep numbers or tensors of the parameter's shape for experts"):
        headgate.save_checkpoint(folder("fits"), mine, adafactor)
    before = [p.detach().clone() for p in mine.parameters()]
    stale = torch.optim.SGD(layer().parameters())
    with pytest.raises(ValueError, match="optimizer must hold parameters of the module only, got another of shape"):
        headgate.save_checkpoint(folder("fits"), mine, stale)
    assert all(torch.equal(a, b) for a, b in zip(before, mine.parameters(), strict=True))


@check
def a_ranks_experts_can_be_on_disk():
    """Rows travel as before, and each rank serves its part of the experts from slots: the same bits."""
    x = torch.randn(9, D, dtype=torch.float64, generator=torch.Generator().manual_seed(dist.get_rank()))
    world = dist.get_world_size()
    mine = layer(torch.float64).eval()
    headgate.parallelize(mine, headgate.Fold(attention={"dp": world}, experts={"ep": world}))
    with torch.no_grad():
        want = mine(x)
        where = f"{folder('offload')}-{dist.get_rank()}"
        with headgate.offload(mine, "60%", "lru", "gate", where) as offloaded:
            assert torch.equal(mine(x), want)
            assert offloaded.stats().loads
        assert torch.equal(mine(x), want)


def compile_the_cache():
    from headgate.placement.caching.cache import Cache
    from headgate.placement.caching.policies import Setting, policy
    from headgate.placement.caching.pools import per_layer

    cache = Cache(per_layer(1, 4, 2), policy("lru", Setting(1, 4, 2)))
    cache.step(0, [0, 1])
    cache.prefetch(0, [2])
    cache.new_sequence()


PREPARE = {"a_ranks_experts_can_be_on_disk": compile_the_cache}
