"""Ranks that die: `python deaths.py FOLDER [SCENARIO ...]`, started by test_rollcall.py.

For each scenario it forks four gloo ranks, some of which are killed or stopped on the way, and writes into the file
FOLDER/SCENARIO, as JSON, their process numbers and what each lived to report. One import of torch serves them all.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from headgate.dispatch import AllToAll, DeadRanks, Hierarchical, collectives
from headgate.kernels import topk
from headgate.kernels.routing import Routing
from headgate.moe import MoE
from headgate.moe.losses import TokenRanks, load_balancing_loss
from headgate.moe.paths import OuterSync, Paths

SIZE, D, F, E, K = 4, 5, 6, 12, 2


@dataclass(frozen=True)
class Scenario:
    """What each rank does, which ranks are to be named, which report, by which store, in which time-out."""

    run: Callable[[], None]
    dead: tuple[int, ...]
    reports: tuple[int, ...]
    store: str
    timeout_s: float


SCENARIOS: dict[str, Scenario] = {}


def scenario(*dead: int, reports: tuple[int, ...] | None = None, store: str = "file", timeout_s: float = 8.0):
    def add(function):
        alive = tuple(r for r in range(SIZE) if r not in dead) if reports is None else reports
        SCENARIOS[function.__name__] = Scenario(function, dead, alive, store, timeout_s)
        return function

    return add


def end(*ranks: int, by: signal.Signals = signal.SIGKILL) -> None:
    if dist.get_rank() in ranks:
        os.kill(os.getpid(), by)


def dispatch(dispatcher):
    """A call that is well, too, before somebody dies: then all ranks have connected."""
    ids = torch.arange(6 * K).view(6, K) % E
    return dispatcher.dispatch(torch.ones(6, D), Routing.from_topk(ids, torch.ones(6, K), E))


@scenario(1)
def before_a_dispatch():
    dispatcher = AllToAll()
    dispatch(dispatcher)
    end(1)
    try:
        dispatch(dispatcher)
    except DeadRanks as dead:
        start_afresh_without(dead.ranks)
        raise


@scenario(2)
def between_dispatch_and_combine():
    dispatcher = AllToAll()
    rows, _, ticket = dispatch(dispatcher)
    end(2)
    try:
        dispatcher.combine(rows, ticket)
    except DeadRanks as dead:
        left = [rank for rank in range(SIZE) if rank not in dead.ranks]
        equals_one_rank(dist.new_group(left, use_local_synchronization=True))
        raise


@scenario(3)
def in_the_backward_pass():
    y = MoE(D, F, E, K, dispatcher=AllToAll())(torch.ones(6, D, requires_grad=True))
    y.register_hook(lambda grad: end(3))
    y.sum().backward()


@scenario(1, 2, store="tcp")
def two_at_once():
    """Rank 0 hosts the store and must not take it with it before rank 3 has read."""
    dispatcher = AllToAll()
    dispatch(dispatcher)
    end(1, 2)
    dispatch(dispatcher)


@scenario(2)
def in_a_ring():
    """Rank 0 is no neighbour of rank 2: from gloo it would hear nothing before its time-out."""
    dispatch(AllToAll())
    routing = topk(torch.randn(6, E), K)
    end(2)
    load_balancing_loss(routing, ranks=TokenRanks(dist.group.WORLD, average=1))


@scenario(3)
def in_groups_that_not_all_are_in():
    """Rank 0 shares no group with rank 3: it waits for a rank that has left with the name."""
    dispatcher = Hierarchical(ranks_per_node=2)
    dispatch(dispatcher)
    end(3)
    dispatch(dispatcher)


@scenario(2, reports=(3,))
def in_half_of_the_ranks():
    """Global numbers in a group of ranks 2 and 3. The others are not asked, and not disturbed."""
    halves = [dist.new_group(ranks, timeout=timedelta(seconds=8)) for ranks in ([0, 1], [2, 3])]
    dispatcher = AllToAll(halves[dist.get_rank() // 2])
    dispatch(dispatcher)
    end(2)
    dispatch(dispatcher)


@scenario(0, store="tcp")
def the_host_of_the_store():
    dispatcher = AllToAll()
    dispatch(dispatcher)
    end(0)
    dispatch(dispatcher)


@scenario(2, reports=(0, 1, 2, 3), timeout_s=6.0)
def stopped_and_late():
    """It is named as the dead are, and hears of it itself when it goes on."""
    dispatcher = AllToAll()
    dispatch(dispatcher)
    end(2, by=signal.SIGSTOP)
    dispatch(dispatcher)


@scenario(0, store="tcp", timeout_s=4.0)
def a_stopped_host_of_the_store():
    """Its store takes every question and answers none."""
    dispatcher = AllToAll()
    dispatch(dispatcher)
    end(0, by=signal.SIGSTOP)
    dispatch(dispatcher)


@scenario(2)
def between_meetings_of_paths():
    """The others repeat the meeting without it, deal its path anew and go on together."""
    torch.manual_seed(dist.get_rank())
    paths = Paths([[nn.Linear(D, D)], [nn.Linear(D, D) for _ in range(SIZE)]])
    outer = OuterSync(paths, every=1, timeout_s=8.0)

    def step():
        (path, *_) = outer.mine
        paths(torch.ones(3, D), path).square().sum().backward()
        for p in paths.parameters():
            if p.grad is not None:
                p.data -= 0.01 * p.grad
                p.grad = None
        outer.step(path)
        return path

    assert step() == (0, dist.get_rank())
    end(2)
    step()
    assert outer.round == 2
    assert outer.members == (0, 1, 3)
    assert step() == (0, outer.members.index(dist.get_rank()))
    left = dist.new_group([0, 1, 3], use_local_synchronization=True)
    for p in paths.parameters():
        assert len({tuple(t.flatten().tolist()) for t in collectives.all_gather(p.detach()[None], left)}) == 1
    raise outer.lost[0]


@scenario()
def nobody():
    """A collective that one rank cannot begin: the others hear at once, and of whom."""
    sent = [1, 1, 1, 1] if dist.get_rank() != 1 else [1, 1, 1, 5]
    collectives.all_to_all(torch.ones(4, D), [1, 1, 1, 1], sent, dist.group.WORLD)


def start_afresh_without(dead: tuple[int, ...]) -> None:
    left = [rank for rank in range(SIZE) if rank not in dead]
    store, rank = dist.group.WORLD.get_group_store(), left.index(dist.get_rank())
    dist.destroy_process_group()
    start(dist.PrefixStore("again", store), rank, len(left), 8.0)
    equals_one_rank(dist.group.WORLD)


def equals_one_rank(group) -> None:
    """The layer on the ranks that are left, output and gradients, against one rank that holds every expert."""
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    torch.manual_seed(1)
    everything = torch.randn(4 * size, D, dtype=torch.float64)
    results = []
    for dispatcher in (AllToAll(group), None):
        torch.manual_seed(2)
        layer = MoE(D, F, E, K, dispatcher=dispatcher, dtype=torch.float64)
        x = (everything if dispatcher is None else everything.chunk(size)[rank]).clone().requires_grad_()
        y = layer(x)
        y.square().sum().backward()
        results.append((layer.experts, y.detach(), x.grad))
    (experts, y, dx), (whole, y1, dx1) = results
    held = slice(experts.local_experts.start, experts.local_experts.stop)
    assert len(experts.local_experts) == E // size
    torch.testing.assert_close(y, y1.chunk(size)[rank])
    torch.testing.assert_close(dx, dx1.chunk(size)[rank])
    torch.testing.assert_close(experts.w_down.grad, whole.w_down.grad[held])


def start(store: dist.Store, rank: int, size: int, timeout_s: float) -> None:
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout_s))


def live(what: Scenario, rank: int, place: str) -> dict:
    """One rank of a scenario: what became of it."""
    if what.store == "tcp":
        store = dist.TCPStore("127.0.0.1", int(place), SIZE, rank == 0, timedelta(seconds=30))
    else:
        store = dist.FileStore(place, SIZE)
    start(store, rank, SIZE, what.timeout_s)
    begun = time.monotonic()
    report: dict = {"dead": None, "message": "", "notes": [], "wrong": ""}
    try:
        what.run()
    except RuntimeError as error:
        report |= {"message": str(error), "notes": getattr(error, "__notes__", [])}
        if isinstance(error, DeadRanks):
            report |= {"dead": error.ranks, "cause": type(error.__cause__).__name__}
    except Exception:
        report["wrong"] = traceback.format_exc()
    return report | {"seconds": time.monotonic() - begun}


def fork(what: Scenario, rank: int, place: str, out: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        out.write_text(json.dumps(live(what, rank, place)))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)  # at once, and with it whatever the others might still want of this rank


def wait(pids: list[int], seconds: float) -> list[int]:
    """Those that have not ended by themselves after some time."""
    deadline, left = time.monotonic() + seconds, list(pids)
    while left and time.monotonic() < deadline:
        time.sleep(0.02)
        left = [pid for pid in left if os.waitpid(pid, os.WNOHANG) == (0, 0)]
    return left


def play(name: str, folder: Path) -> None:
    what = SCENARIOS[name]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        place = str(s.getsockname()[1]) if what.store == "tcp" else str(folder / f"{name}.store")
    outs = [folder / f"{name}.{rank}" for rank in range(SIZE)]
    pids = [fork(what, rank, place, out) for rank, out in enumerate(outs)]
    left = wait([pid for rank, pid in enumerate(pids) if rank not in what.dead], 3 * what.timeout_s)
    silent = [pid for rank, pid in enumerate(pids) if rank in what.dead]
    for pid in silent:
        os.kill(pid, signal.SIGCONT)  # nothing to a process that was killed and not yet waited for
    for pid in left + wait(silent, 3 * what.timeout_s):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    reports = [json.loads(out.read_text()) if out.exists() else None for out in outs]
    (folder / name).write_text(json.dumps({"pids": pids, "reports": reports}))


def main(folder: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    for name in names or SCENARIOS:
        begun = time.monotonic()
        play(name, folder)
        print(f"{name}: {time.monotonic() - begun:.1f} s", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
