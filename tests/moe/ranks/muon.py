"""The checks of Muon and of Memory on many ranks, run by test_muon_ranks.py: one process's update under every fold and
FSDP2; a memory whose columns are cut."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from folds_cases import D, layer, make_fold, some_folds
from placed_cases import placement, replicas_are_equal
from ranks_compare import close
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import headgate
from headgate.dispatch import Fold
from headgate.moe.shards import shards_of

CHECKS: dict[str, Callable[[], None]] = {}
F64 = torch.float64
PRECISE = 1e-9  # Newton-Schulz multiplies what gradients differ by, up to 500 times


def check(function):
    CHECKS[function.__name__] = function
    return function


def model(**options) -> nn.Sequential:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(D, D, dtype=F64), layer(F64, **options), nn.LayerNorm(D, dtype=F64))


def steps(mine: nn.Module, optimizer: torch.optim.Optimizer, fold: Fold | None, first: int = 0, n: int = 2) -> None:
    size, rank = (1, 0) if fold is None else (dist.get_world_size(), dist.get_rank())
    for step in range(first, first + n):
        torch.manual_seed(100 + step)
        x, g = torch.randn(16, D, dtype=F64), torch.randn(16, D, dtype=F64)
        part = slice(rank * 16 // size, (rank + 1) * 16 // size)
        optimizer.zero_grad()
        ((mine(x[part]) * g[part]).sum() * (1 if fold is None else fold.size("dp", "cp"))).backward()
        optimizer.step()


def trained(fold: Fold | None, n: int = 2, prepare=None, muon=None, options=None, **how):
    mine = model(**(options or {}))
    if fold is not None:
        headgate.parallelize(mine, fold, **how)
    if prepare is not None:
        prepare(mine)
    optimizer = headgate.Muon(mine, lr=0.05, **(muon or {}))
    steps(mine, optimizer, fold, n=n)
    return mine, optimizer


def full(whole: nn.Module, mine: nn.Module, what: str) -> None:
    ours = dict(mine.named_parameters())
    for name, p in whole.named_parameters():
        owner, _, leaf = name.rpartition(".")
        shards, expected, found = shards_of(mine.get_submodule(owner)), p.detach(), ours[name].detach()
        if shards is not None:
            expected = shards.cuts[leaf].of(expected, shards.held, shards.etp, shards.fold.rank("etp"))
        close(found.full_tensor() if hasattr(found, "full_tensor") else found, expected, f"{what}: {name}", PRECISE)


@check
def one_process_s_update_under_every_fold():
    for muon in ({}, {"split_gate_up": True, "adjust_lr_fn": "original"}):
        whole, _ = trained(None, muon=muon)
        for sizes in list(Fold.possible(dist.get_world_size()))[:: 1 if muon else 3]:
            fold = make_fold(sizes)
            full(whole, trained(fold, muon=muon)[0], f"{fold} {muon}")


@check
def shards_of_fsdp2_and_shared_experts_cut_over_tp():
    whole, _ = trained(None)
    for fold in some_folds():
        full(whole, trained(fold, fsdp=True)[0], f"{fold} fsdp")
    for fold in some_folds():
        if fold.size("tp") > 1:
            full(whole, trained(fold, cut_shared=True)[0], f"{fold} cut_shared")


@check
def experts_that_are_whole_are_no_traffic():
    size = dist.get_world_size()
    for fold, messages in ((Fold({"dp": size}, {"ep": size}), 0), (Fold({"dp": size}, {"etp": size}), 2)):
        _, optimizer = trained(fold, n=1)
        with CommDebugMode() as mode:
            optimizer.step()
        assert mode.get_total_counts() == messages, f"{fold}: {mode.get_comm_counts()}"


@check
def replicas_stay_equal_to_the_bit():
    size = dist.get_world_size()
    fold = Fold({"dp": size}, {"ep": size})
    mine, _ = trained(fold, prepare=lambda m: headgate.place_experts(m, placement(3, size, 16, 3)))
    replicas_are_equal(mine[1], "after two steps", lambda p: p.detach())


@check
def checkpoints_move_between_folds():
    size = dist.get_world_size()
    path = [None]
    if dist.get_rank() == 0:
        import tempfile

        path = [tempfile.mkdtemp()]
    dist.broadcast_object_list(path)
    whole, _ = trained(None, n=3)
    mine, optimizer = trained(Fold({"dp": size}, {"etp": size}), n=2)
    headgate.save_checkpoint(f"{path[0]}/c", mine, optimizer)
    fold = Fold({"tp": size}, {"ep": size})
    other = headgate.parallelize(model(), fold)
    optimizer = headgate.Muon(other, lr=0.1)
    headgate.load_checkpoint(f"{path[0]}/c", other, optimizer)
    steps(other, optimizer, fold, first=2, n=1)
    full(whole, other, "after a checkpoint")


@check
def migrated_experts_keep_their_momentum():
    size = dist.get_world_size()
    fold = Fold({"dp": size}, {"ep": size})
    whole, _ = trained(None, n=3)
    mine, optimizer = trained(fold)
    optimizer.zero_grad()
    for _ in headgate.migrate(mine, placement(5, size, 16, 0), optimizer=optimizer):
        pass
    steps(mine, optimizer, fold, first=2, n=1)
    full(whole, mine, "after a migration")


@check
def linear_layers_by_fsdp2_and_tensor_parallelism():
    """Uneven shards, a stack cut along its experts, and a matrix that two dimensions of a mesh cut."""
    size = dist.get_world_size()
    line = init_device_mesh("cpu", (size,))
    torch.manual_seed(5)
    shapes = {"tall": (size + 3, 6), "wide": (5, 2 * size + 1), "stack": (size + 1, 4, 6), "plain": (6, 5)}
    shapes |= {"slices": (3, size * 2, 5)}
    cuts = {"tall": [Shard(0)], "wide": [Shard(1)], "stack": [Shard(0)], "plain": [Replicate()], "slices": [Shard(1)]}
    whole = {n: nn.Parameter(torch.randn(s, dtype=F64)) for n, s in shapes.items()}
    mine = {n: nn.Parameter(distribute_tensor(p.detach(), line, cuts[n])) for n, p in whole.items()}
    if size % 2 == 0 and size > 2:
        grid = init_device_mesh("cpu", (2, size // 2))
        whole["both"] = nn.Parameter(torch.randn(7, 8, dtype=F64))
        mine["both"] = nn.Parameter(distribute_tensor(whole["both"].detach(), grid, [Shard(0), Shard(1)]))
    one, many = headgate.Muon(whole.values(), lr=0.1, model=nn.Module()), headgate.Muon(mine.values(), lr=0.1)
    for _ in range(2):
        for n, p in whole.items():
            p.grad = torch.randn_like(p)
            mine[n].grad = distribute_tensor(p.grad, mine[n].device_mesh, mine[n].placements)
        one.step()
        many.step()
    for n, p in whole.items():
        close(mine[n].detach().full_tensor(), p.detach(), n, PRECISE)
    dense = nn.Sequential(nn.Linear(5, 7, dtype=F64), nn.Linear(7, 3, dtype=F64))
    for part in dense:
        fully_shard(part, mesh=line)
    optimizer = headgate.Muon(dense, lr=0.1)
    dense(torch.randn(4, 5, dtype=F64)).sum().backward()
    optimizer.step()
    assert [g["algorithm"] for g in optimizer.param_groups] == ["muon", "adamw"]


@check
def a_memory_whose_columns_are_cut():
    """One process's outputs and gradients, with other numbers of tokens on each rank, none among them."""
    size, rank = dist.get_world_size(), dist.get_rank()
    tokens = [5, 0, 7, 1][:size]
    torch.manual_seed(2)
    x, g = torch.randn(sum(tokens), D, dtype=F64), torch.randn(sum(tokens), D, dtype=F64)
    mask = torch.rand(sum(tokens)) < 0.8
    part = slice(sum(tokens[:rank]), sum(tokens[: rank + 1]))
    memories = []
    for group in (None, dist.group.WORLD):
        torch.manual_seed(4)
        memories.append(headgate.Memory(D, 7, 3, heads=2, key_size=3, group=group, value_size=2 * size, dtype=F64))
    whole, mine = memories
    columns = slice(2 * rank, 2 * rank + 2)
    assert torch.equal(mine.values, whole.values[:, columns])
    x1, x2 = x.clone().requires_grad_(), x[part].clone().requires_grad_()
    y1, y2 = whole(x1, mask), mine(x2, mask[part])
    (y1 * g).sum().backward()
    (y2 * g[part]).sum().backward()
    close(y2, y1[part], "y", PRECISE)
    close(x2.grad, x1.grad[part], "dx", PRECISE)
    close(mine.values.grad, whole.values.grad[:, columns], "values", PRECISE)
    for name, p in mine.named_parameters():
        if name != "values":
            dist.all_reduce(p.grad)
            close(p.grad, dict(whole.named_parameters())[name].grad, name, PRECISE)
