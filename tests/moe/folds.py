"""The checks of parallelize on many ranks, run by test_folds.py: one process's numbers under every fold."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

import headgate
from headgate.dispatch import DISPATCHERS, AllToAll, Fold
from headgate.kernels.routing import Routing
from headgate.moe import MoE
from headgate.moe.capacity import Capacity
from headgate.moe.shards import shards_of
from headgate.moe.sync import local

CHECKS = {}
D, F, E, K = 8, 16, 16, 3
TOLERANCE = 1e-5


FIRST: list[Fold] = []  # its groups serve all folds: making them is most of the time


def make_fold(sizes) -> Fold:
    fold = Fold.of(sizes, like=FIRST[0] if FIRST else None)
    FIRST[:] = FIRST or [fold]
    return fold


def check(function):
    CHECKS[function.__name__] = function
    return function


def layer(dtype=torch.float32, seed=3, **options) -> MoE:
    torch.manual_seed(seed)
    form = dict(shared_intermediate_size=8, bias=True, router_options={"renormalize": True}, dtype=dtype)
    form |= dict(load_balancing_coef=0.1, z_loss_coef=0.01)
    made = MoE(D, F, E, K, **{**form, **options})
    with torch.no_grad():
        for b in (made.experts.b_gate_up, made.experts.b_down):
            if b is not None:
                b.normal_()
    return made


def close(actual, expected, what, tolerance=TOLERANCE):
    assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if expected.numel():
        error, size = (actual - expected).abs().max().item(), expected.abs().max().item()
        assert error <= tolerance * max(size, 1e-30), f"{what}: error {error:.3g} of {size:.3g}"


def parts(tokens: list[int]) -> list[slice]:
    ends = torch.tensor(tokens).cumsum(0).tolist()
    return [slice(e - n, e) for e, n in zip(ends, tokens, strict=True)]


def compare(whole: nn.Module, mine: nn.Module, of, what: str, tolerance=TOLERANCE) -> None:
    """`of(parameter)` of every parameter: this rank's part of one process's."""
    ours = dict(mine.named_parameters())
    for name, p in whole.named_parameters():
        owner, _, leaf = name.rpartition(".")
        shards, part = shards_of(mine.get_submodule(owner)), of(p)
        if shards is not None:
            part = shards.cuts[leaf].of(part, shards.held, shards.etp, shards.fold.rank("etp"))
        found = of(ours[name])
        if isinstance(ours[name], DTensor):  # FSDP2 cuts what a rank would hold once more
            mesh = ours[name].device_mesh
            chunks, at = part.chunk(mesh.size()), mesh.get_local_rank()
            part, found = (chunks[at] if at < len(chunks) else part[:0]), local(found)
        close(found, part, f"{what}: {name}", tolerance)


def once(fold: Fold, options=None, **how) -> None:
    """Layer, its gradients, their norm and one optimizer step under `fold`, against one process."""
    size, rank = dist.get_world_size(), dist.get_rank()
    tokens = [5, 0, 9, 1, 4, 3, 6, 2][:size]
    torch.manual_seed(11)
    x, g = torch.randn(sum(tokens), D), torch.randn(sum(tokens), D)
    whole, mine = layer(**(options or {})), layer(**(options or {}))
    headgate.parallelize(mine, fold, **how)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1) for m in (whole, mine)]
    average = fold.size("dp", "cp")
    x1 = x.clone().requires_grad_()
    y1 = whole(x1)
    ((y1 * g).sum() / average).backward()
    part = parts(tokens)[rank]
    x2 = x[part].clone().requires_grad_()
    y2 = mine(x2)
    (y2 * g[part]).sum().backward()
    what = f"{fold} {how}"
    close(y2, y1[part], f"{what}: y")
    close(x2.grad / average, x1.grad[part], f"{what}: dx")
    for name, loss in whole.aux_losses.items():
        close(mine.aux_losses[name], loss, f"{what}: {name}")
    if whole.capacity is not None:
        assert mine.last_overflow.dropped_total == whole.last_overflow.dropped > 0, what
    compare(whole, mine, lambda p: p.grad, f"{what}: gradient")
    norm = torch.nn.utils.clip_grad_norm_(whole.parameters(), 0.5)
    close(headgate.clip_grad_norm_(mine, 0.5).float(), norm, f"{what}: norm")
    for optimizer in optimizers:
        optimizer.step()
    compare(whole, mine, lambda p: p.detach(), f"{what}: after a step")


@check
def the_layer_under_every_fold():
    for sizes in Fold.possible(dist.get_world_size()):
        once(make_fold(sizes))


def some_folds() -> list[Fold]:
    """A few of all: each degree larger than one somewhere, experts and attention cut differently."""
    every = list(Fold.possible(dist.get_world_size()))
    mixed = [s for s in every if s.attention != s.experts]
    return [make_fold(s) for s in (every[0], every[-1], *mixed[:: max(len(mixed) // 4, 1)])]


@check
def other_forms_of_layers():
    for options in ({"gated": False, "activation": "gelu"}, {"bias": False, "shared_intermediate_size": 0}):
        for fold in some_folds():
            once(fold, options)


@check
def tokens_dropped_or_not():
    """The capacity of the whole batch: the same pairs go as in one process."""
    for drop in ("weight", "position"):
        for sizes in list(Fold.possible(dist.get_world_size()))[:: 1 if dist.get_world_size() < 4 else 5]:
            once(make_fold(sizes), {"capacity": Capacity(0.7, drop=drop, scope="batch")})


@check
def two_levels_of_routing():
    for fold in some_folds():
        once(fold, {"router": "bilevel", "router_options": {"nodes": 4, "topk_nodes": 3}, "bias": False})


@check
def every_dispatcher_by_name():
    size = dist.get_world_size()
    for fold in (Fold({"dp": size}, {"ep": size}), Fold({"tp": size}, {"ep": size // 2, "etp": 2})):
        for name in DISPATCHERS:
            if name not in ("local", "slice_all_reduce"):
                once(fold, dispatcher=name, ranks_per_node=2)


def replicated(fold: Fold) -> None:
    """Every rank of tp passes the same tokens: gradients are those of one process with each token once."""
    tp, average = fold.size("tp"), fold.size("dp", "cp")
    torch.manual_seed(11)
    x, g = torch.randn(7 * average, D), torch.randn(7 * average, D)
    whole, mine = layer(), headgate.parallelize(layer(), fold, activations="replicated")
    x1 = x.clone().requires_grad_()
    y1 = whole(x1)
    ((y1 * g).sum() / average).backward()
    part = parts([7] * average)[dist.get_rank() // tp]
    x2 = x[part].clone().requires_grad_()
    y2 = mine(x2)
    (y2 * g[part]).sum().backward()
    close(y2, y1[part], f"{fold}: y")
    close(x2.grad / average, x1.grad[part], f"{fold}: dx")
    compare(whole, mine, lambda p: p.grad, f"{fold}: gradient")
    norm = torch.nn.utils.clip_grad_norm_(whole.parameters(), 0.5)
    close(headgate.clip_grad_norm_(mine, 0.5).float(), norm, f"{fold}: norm")


@check
def replicated_activations():
    for sizes in Fold.possible(dist.get_world_size()):
        if sizes.ep * sizes.etp == sizes.tp:
            replicated(make_fold(sizes))


@check
def sharded_by_fsdp():
    for fold in some_folds():
        once(fold, fsdp=True)


@check
def a_switch_of_degree_moves_no_weight_and_changes_no_number():
    size = dist.get_world_size()
    for experts in ({"etp": size}, {"ep": size // 2, "etp": 2}, {"edp": size // 2, "etp": 2}, {"ep": size}):
        fold = Fold({"dp": size}, experts)
        mine = headgate.parallelize(layer(), fold)
        torch.manual_seed(dist.get_rank())
        x, g = torch.randn(6, D, requires_grad=True), torch.randn(6, D)
        before, results = [p.data_ptr() for p in mine.parameters()], []
        etp = fold.size("etp")
        for degree in (etp, *(r for r in range(etp) if r == 0 or etp % r == 0), etp):
            headgate.set_degree(mine, degree)
            mine.zero_grad()
            x.grad = None
            y = mine(x)
            (y * g).sum().backward()
            results.append([y.detach(), x.grad, *(p.grad for p in mine.parameters())])
            assert [p.data_ptr() for p in mine.parameters()] == before
            for a, b in zip(results[0], results[-1], strict=True):
                close(b, a, f"{fold} r={degree}")
        with pytest.raises(ValueError, match=f"set_degree: degree must be 0 or divide etp = {etp}, got 3"):
            headgate.set_degree(mine, 3)


@check
def a_degree_says_what_travels():
    """r = 0: weights only; r = etp: rows only."""
    size = dist.get_world_size()
    mine = headgate.parallelize(layer(bias=False), Fold({"dp": size}, {"etp": size}))
    routing = Routing.from_topk(torch.zeros(4, K, dtype=torch.int64), torch.ones(4, K), E)
    for degree, expected in ((size, {"all_gather": 2, "reduce_scatter": 1}), (0, {"all_gather": 2})):
        headgate.set_degree(mine, degree)
        with CommDebugMode() as mode, torch.no_grad():
            mine.experts(torch.zeros(4, D), routing)
        found: dict[str, int] = {}
        for op, n in mode.get_comm_counts().items():
            name = str(op).split(".")[-1].replace("_into_tensor", "").replace("_tensor", "")
            found[name] = found.get(name, 0) + n
        assert found == expected, f"r={degree}: {found}"


@check
def the_degree_follows_the_rows():
    """Few rows travel themselves; many leave the weights to travel. All ranks choose alike, and say why."""
    size = dist.get_world_size()
    mine = headgate.parallelize(layer(), Fold({"dp": size}, {"etp": size}))
    shards = mine.experts.dispatcher
    shards._every = 1
    for tokens, expected in ((1 if dist.get_rank() else 3, size), (3000, 1), (0, size)):
        mine(torch.randn(tokens, D))
        assert shards.degree == expected, shards.why()
        assert f"taken: r = {expected}" in shards.why()
    whole = layer()
    torch.manual_seed(dist.get_rank())
    for tokens in (3, 3000):
        x = torch.randn(tokens, D)
        close(mine(x), whole(x), f"{tokens} tokens, r = {shards.degree}")


@check
def gradients_that_add_up():
    """Two backward passes to a step, synchronised each or only at the last: one with both batches."""
    whole, halves = [slice(0, 8)], [slice(0, 4), slice(4, 8)]
    plain = {"load_balancing_coef": 0.0, "z_loss_coef": 0.0}  # two half batches balance otherwise than a whole one
    for fold in some_folds():
        for how in ({}, {"fsdp": True}):
            torch.manual_seed(dist.get_rank())
            x, g = torch.randn(8, D), torch.randn(8, D)
            results = []
            for pause, pieces in ((False, whole), (False, halves), (True, halves)):
                mine = headgate.parallelize(layer(**plain), fold, **how)
                for piece in pieces:
                    quiet = pause and piece is not pieces[-1]
                    with headgate.no_sync(mine) if quiet else contextlib.nullcontext():
                        (mine(x[piece]) * g[piece]).sum().backward()
                results.append([local(p.grad) for p in mine.parameters()])
            for other in results[1:]:
                for a, b in zip(results[0], other, strict=True):
                    close(b, a, f"{fold} {how}")


# --- checkpoints ---------------------------------------------------------------------------------------------------


def optimizer_of(module: nn.Module, lr: float) -> torch.optim.AdamW:
    """Two groups with rates of their own."""
    rest = [p for n, p in module.named_parameters() if "router" not in n]
    return torch.optim.AdamW([{"params": list(module.router.parameters()), "lr": lr / 10}, {"params": rest}], lr=lr)


def trained(fold: Fold | None, **how) -> tuple[MoE, torch.optim.AdamW]:
    """A layer with an optimizer that has made two steps, the same under every fold; in fp64."""
    mine = layer(torch.float64)
    if fold is not None:
        headgate.parallelize(mine, fold, **how)
    optimizer = optimizer_of(mine, 1e-2)
    for step in range(2):
        train(mine, optimizer, fold, step)
    return mine, optimizer


def train(mine: MoE, optimizer: torch.optim.Optimizer, fold: Fold | None, step: int) -> None:
    torch.manual_seed(100 + step)
    size, rank = (1, 0) if fold is None else (dist.get_world_size(), dist.get_rank())
    x, g = torch.randn(16, D, dtype=torch.float64), torch.randn(16, D, dtype=torch.float64)
    part = parts([16 // size] * size)[rank]
    optimizer.zero_grad()
    ((mine(x[part]) * g[part]).sum() * (1 if fold is None else fold.size("dp", "cp"))).backward()
    optimizer.step()


def folder(name: str) -> Path:
    return Path.cwd() / name


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


class Unpicklable:
    def __reduce__(self):
        raise OSError("no space left")


@check
def a_save_that_fails_keeps_the_last_checkpoint():
    mine, optimizer = trained(some_folds()[1])
    headgate.save_checkpoint(folder("kept"), mine, optimizer, extra="first")
    with pytest.raises(BaseException, match="no space left"):
        headgate.save_checkpoint(folder("kept"), mine, optimizer, extra=Unpicklable())
    dist.barrier()
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


# --- bad input -------------------------------------------------------------------------------------------------------


@check
def ranks_that_built_another_module_are_named():
    fold, size = some_folds()[1], dist.get_world_size()
    made = layer()
    if dist.get_rank() == size - 1:
        with torch.no_grad():
            made.shared.ffn.w_down[0, 0, 0] += 1
    with pytest.raises(
        ValueError, match=f"shared.ffn.w_down must be the same on every rank, .* on rank {size - 1} and"
    ):
        headgate.parallelize(made, fold)
    assert made.experts.w_down.shape[0] == E
    words = f"dispatcher must be the same on every rank, got 'all_gather' on rank {size - 1} and None on rank 0"
    with pytest.raises(ValueError, match=words):
        headgate.parallelize(layer(), fold, dispatcher="all_gather" if dist.get_rank() == size - 1 else None)


@check
def ranks_that_ask_for_different_folds_are_named():
    size = dist.get_world_size()
    odd = dist.get_rank() == size - 1
    with pytest.raises(
        ValueError, match=f"Fold: (tp|dp) must be .* on rank {size - 1} and {size if size > 2 else '.'} on rank 0"
    ):
        Fold({"tp": size} if odd else {"dp": size}, {"ep": size})
    with pytest.raises(
        ValueError, match=f"Fold: pp must be the same on every rank, got -1 on rank {size - 1} and 1 on"
    ):
        Fold({"dp": size}, {"ep": size}, pp="one" if odd else 1)


def two_with_the_same_weights() -> nn.Module:
    both = nn.Sequential(layer(), layer())
    both[1].experts.w_down = both[0].experts.w_down
    return both


@check
def what_one_rank_finds_amiss_every_rank_hears_of():
    size, odd = dist.get_world_size(), dist.get_rank() == dist.get_world_size() - 1
    fold = some_folds()[1]
    on = "" if odd else rf" \(on rank {size - 1}\)"
    with pytest.raises(ValueError, match=f"activations must be one of sharded, replicated, got 'mixed'{on}$"):
        headgate.parallelize(layer(), fold, activations="mixed" if odd else "sharded")
    frozen = layer()
    frozen.router.weight.requires_grad_(not odd)
    with pytest.raises(ValueError, match=rf"router.weight must be the same .* frozen with .* on rank {size - 1}"):
        headgate.parallelize(frozen, fold)
    turned = layer()
    if odd:
        with torch.no_grad():
            turned.router.weight.copy_(turned.router.weight.flip(0))
    with pytest.raises(ValueError, match=r"router.weight must be the same on every rank"):
        headgate.parallelize(turned, fold)
    mine, _ = trained(fold)
    headgate.save_checkpoint(folder("seen"), mine)
    with pytest.raises(OSError, match=f"path must be a folder that save_checkpoint wrote, got .*nowhere{on}$"):
        headgate.load_checkpoint(folder("nowhere" if odd else "seen"), mine)
    headgate.load_checkpoint(folder("seen"), mine)


@check
def a_backward_pass_that_fails_leaves_nothing_behind():
    fold = some_folds()[1]
    plain = {"load_balancing_coef": 0.0, "z_loss_coef": 0.0}
    mine, other = (headgate.parallelize(layer(**plain), fold) for _ in range(2))
    torch.manual_seed(dist.get_rank())
    x = torch.randn(5, D)

    def fail(grad):
        raise RuntimeError("on purpose")

    broken = mine.router.weight.register_hook(fail)  # after those of the experts and the shared expert
    with pytest.raises(RuntimeError, match="on purpose"):
        mine(x).sum().backward()
    broken.remove()
    mine.zero_grad()
    for m in (mine, other):
        m(x).sum().backward()
    for a, b in zip(mine.parameters(), other.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


@check
def parameters_that_came_later_are_noticed():
    mine = headgate.parallelize(layer(), some_folds()[1])
    mine.load_state_dict(mine.state_dict(), assign=True)
    mine.router.weight = nn.Parameter(mine.router.weight.detach().clone())
    with pytest.raises(ValueError, match=r"clip_grad_norm_: module must have the parameters that parallelize saw, got"):
        headgate.clip_grad_norm_(mine, 1.0)
    with pytest.raises(ValueError, match="clip_grad_norm_: max_norm must be a positive number, got -1"):
        headgate.clip_grad_norm_(mine, -1)


@check
def what_cannot_be_cut_is_refused_whole():
    size = dist.get_world_size()
    fold, sliced = Fold({"dp": size}, {"ep": size}), Fold({"dp": size}, {"etp": size})
    trials = [
        (lambda: MoE(D, F, size + 1, 1), fold, {}, f"ep must divide the {size + 1} experts of experts, got ep={size}"),
        (lambda: MoE(D, 17, E, 1), sliced, {}, f"etp must divide 17, a size of experts.w_gate_up, got etp={size}"),
        (lambda: nn.Linear(3, 3), fold, {}, "module must hold experts .*, got a Linear without any"),
        (
            lambda: layer(),
            fold,
            {"dispatcher": "slice_all_reduce"},
            "slice_all_reduce for replicated activations and only",
        ),
        (lambda: layer(), fold, {"wire": "fp4"}, "wire must be one of exact, .*, got 'fp4'"),
        (lambda: layer(), fold, {"ranks_per_node": 0}, "ranks_per_node must be a positive integer or None, got 0"),
        (two_with_the_same_weights, fold, {}, "experts must not share parameters, got 0.experts and 1.experts"),
        (lambda: layer(), fold, {"activations": "mixed"}, "must be one of sharded, replicated, got 'mixed'"),
        (lambda: layer(), fold, {"dispatcher": "magic"}, "dispatcher must be one of .*, got 'magic'"),
        (lambda: layer(), fold, {"activations": "replicated"}, r"must come with ep \* etp == tp, got ep="),
        (lambda: layer(dispatcher=AllToAll()), fold, {}, "experts must have no dispatcher of its own, got AllToAll"),
        (lambda: headgate.parallelize(layer(), fold), fold, {}, "must not be parallelized already"),
    ]
    for make, over, how, words in trials:
        made = make()
        with pytest.raises(ValueError, match=f"^parallelize: .*{words}"):
            headgate.parallelize(made, over, **how)
    with pytest.raises(TypeError, match=r"fold must be a headgate\.Fold, got dict"):
        headgate.parallelize(layer(), {})
    with pytest.raises(TypeError, match="must be copied before"):
        copy.deepcopy(headgate.parallelize(layer(), fold))


@check
def an_impossible_fold_names_the_nearest():
    size = dist.get_world_size()
    rule = r"dp \* cp \* tp must equal edp \* ep \* etp, got dp=3 .* which is 3 and 1; possible: dp="
    with pytest.raises(ValueError, match=rule):
        Fold({"dp": 3})
    rule = f"must be the world's {size} ranks, got .* which is {2 * size}; possible: dp={size} "
    with pytest.raises(ValueError, match=rule):
        Fold({"dp": 2 * size}, {"ep": 2 * size})
    with pytest.raises(ValueError, match="attention must name dp, cp, tp only, got ep"):
        Fold({"ep": 2})
    with pytest.raises(TypeError, match=r"tp must be an integer, got 1\.5"):
        Fold({"tp": 1.5})
    with pytest.raises(ValueError, match="pp must be at least 1, got 0"):
        Fold(pp=0)
