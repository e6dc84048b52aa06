"""One rank of the benchmark: `python -m headgate.bench.dispatch.rank FOLDER RANK`, started by launch.py.

All ranks run the same contestants in the same order. Rank 0 writes what was found, a line of JSON each, to
FOLDER/news; a rank that fails leaves FOLDER/RANK.error and ends, and whoever started the ranks ends the others.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..check import WrongNumbers, _compare
from ..measure import Contestant as Timed
from ..measure import interleave, sample
from ..shapes import PASSES, Shape
from .contestants import CONTESTANTS, Contestant, find
from .rivals import Step
from .traffic import Traffic
from .volume import even, exact
from .world import Inputs, Layout, World

Tell = Callable[[dict[str, Any]], None]
Moved = tuple[
    list[int], list[int], dict[str, int]
]  # bytes of a rank: of rows to each, of counts to each, by collective


@dataclass
class Entrant:
    """A contestant ready to run on this rank."""

    who: Contestant
    step: Step
    inputs: Inputs

    def run(self, train: bool) -> Tensor:
        i = self.inputs
        if not train:
            with torch.no_grad():
                return self.step.forward(i.x, i.ids, i.weights)
        y = self.step.forward(i.x, i.ids, i.weights)
        y.backward(i.grad)
        return y.detach()

    def clear(self) -> None:
        self.step.clear()
        self.inputs.x.grad = self.inputs.weights.grad = None


def agreed(reason: str) -> str:
    """The first reason that a rank has, "" where none has: what one rank refuses, all refuse."""
    said: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(said, reason)
    return next((f"rank {rank}: {text}" for rank, text in enumerate(said) if text), "")


def slowest(seconds: list[float]) -> list[float]:
    """Of each sample the time of the rank that took longest."""
    times = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(times, op=dist.ReduceOp.MAX)
    return times.tolist()


def check(world: World, entrant: Entrant, train: bool) -> list[Moved]:
    """Output and, in training, all gradients against one process; bytes against the formula, on every rank.

    Returns what every rank moved. Raises WrongNumbers on every rank.
    """
    with Traffic() as traffic:
        y = entrant.run(train)
    reason = ""
    try:
        _compare_with_truth(world, entrant, y, train)
        wanted = exact(entrant.who.moves(world), world.ids, world.shape.experts, world.layout, train)[world.rank]
        if traffic.unknown:
            raise WrongNumbers(f"its collectives {', '.join(sorted(traffic.unknown))} are not counted")
        if not torch.equal(traffic.sent, wanted):
            raise WrongNumbers(f"{traffic.sent.tolist()} bytes left for each rank, {wanted.tolist()} by its formula")
    except WrongNumbers as error:
        reason = str(error)
    entrant.clear()
    reason = agreed(reason)
    if reason:
        raise WrongNumbers(reason)
    found: list[Any] = [None] * world.layout.ranks
    dist.all_gather_object(found, (traffic.sent.tolist(), traffic.counts.tolist(), traffic.by_op))
    return found


def _compare_with_truth(world: World, entrant: Entrant, y: Tensor, train: bool) -> None:
    truth, tolerance, at = world.truth, entrant.who.tolerance(world.dtype), world.mine(entrant.who.shared)
    _compare("output", y, truth.y[at], tolerance)
    if train:
        _compare("gradient of input", entrant.inputs.x.grad, truth.x[at], tolerance)
        _compare("gradient of routing weights", entrant.inputs.weights.grad, truth.weights[at], tolerance)
        for name, got in entrant.step.gradients().items():
            _compare(f"gradient of {name}", got, truth.parameters[name][world.held], tolerance)


def enter(world: World, who: Contestant) -> Entrant:
    """Builds a contestant. Raises WrongNumbers, on every rank, where it cannot be built on one."""
    reason, step = "", None
    try:
        step = who.step(world)
    except (ImportError, AttributeError, TypeError, ValueError, KeyError) as error:  # a rival that has changed
        reason = f"cannot be built: {type(error).__name__}: {error}"
    reason = agreed(reason)
    if step is None or reason:
        raise WrongNumbers(reason)
    return Entrant(who, step, world.inputs(who.shared))


def measure(world: World, table: Mapping[str, Contestant], names: list[str], job: dict[str, Any], tell: Tell) -> None:
    """Checks all, then times those that are right, in turns; tells a case for each pass."""
    passes, clock = job["passes"], job["clock"]
    entrants: dict[str, Entrant] = {}
    out: dict[str, dict[str, dict[str, Any]]] = {kind: {} for kind in passes}
    for name in names:
        tell({"progress": f"{world.shape.name} {world.dtype}: {name}"})
        try:
            entrant = enter(world, find(name, table))
            moved = {kind: check(world, entrant, kind == "train") for kind in PASSES}  # training too, always
        except WrongNumbers as error:
            for kind in passes:
                out[kind][name] = {"refused": str(error)}
            continue
        entrants[name] = entrant
        for kind in passes:
            out[kind][name] = {"bytes": _bytes(world, entrant.who, moved[kind], kind == "train")}
    for kind in passes:
        here = f"{world.shape.name} {world.dtype} {kind}"
        timed = {name: _timed(e, kind == "train", tell, f"{here}: timing {name}") for name, e in entrants.items()}
        for who in timed.values():  # the slowest rank's time, so that all choose the same number of rounds
            who.first_s = slowest([sample(who, 0, clock)])[0]
        rounds = interleave(timed, job["budget_s"], clock, rounds=(5, 40))
        for name, who in timed.items():
            who.samples_s = slowest(who.samples_s)
            out[kind][name] = who.summary() | {"shared": entrants[name].who.shared} | out[kind][name]
        tell({"case": _case(world, kind) | {"clock": clock, "rounds": rounds, "implementations": out[kind]}})


def _timed(entrant: Entrant, train: bool, tell: Tell, what: str) -> Timed:
    """Ranks start each sample together."""

    def after() -> None:
        entrant.clear()
        tell({"progress": what})

    return Timed(lambda _: entrant.run(train), after, dist.barrier)


def _case(world: World, kind: str) -> dict[str, Any]:
    return {
        "shape": asdict(world.shape), "tokens_per_rank": world.tokens, "dtype": world.dtype, "pass": kind,
        "ranks": world.layout.ranks, "ranks_per_node": world.layout.ranks_per_node, "skew": world.skew,
    }  # fmt: skip


def _bytes(world: World, who: Contestant, found: list[Moved], train: bool) -> dict[str, Any]:
    """Sums over ranks, per token of the whole batch; `even`: by formula, of a router that chooses evenly."""
    layout, tokens = world.layout, world.layout.ranks * world.tokens
    sent = torch.tensor([row for row, _, _ in found])
    by_op: dict[str, int] = {}
    for _, _, ops in found:
        for op, n in ops.items():
            by_op[op] = by_op.get(op, 0) + n
    even_rank, even_node = even(who.moves(world), world.shape, layout, train)
    return {
        "leave_rank_bytes_per_token": sent[layout.off_rank()].sum().item() / tokens,
        "leave_node_bytes_per_token": sent[layout.off_node()].sum().item() / tokens,
        "even_leave_rank_bytes_per_token": even_rank,
        "even_leave_node_bytes_per_token": even_node,
        "counts_bytes_per_rank": sum(sum(counts) for _, counts, _ in found) / layout.ranks,
        "to_each_rank_bytes": sent.tolist(),
        "by_collective_bytes": by_op,
    }


def run(job: dict[str, Any], rank: int, table: Mapping[str, Contestant], tell: Tell) -> None:
    layout = Layout(job["ranks"], job["ranks_per_node"])
    for wanted in job["worlds"]:
        shape = Shape(**wanted["shape"])
        tell({"progress": f"{shape.name} {wanted['dtype']}: one process, for the truth"})
        world = World(layout, rank, shape, wanted["tokens"], wanted["dtype"], job["skew"])
        measure(world, table, wanted["contestants"], job, tell)


def main(folder: str, rank: int, table: Mapping[str, Contestant] = CONTESTANTS) -> None:
    serve(folder, rank, lambda job, rank, tell: run(job, rank, table, tell))


def serve(folder: str, rank: int, work: Callable[[dict[str, Any], int, Tell], None]) -> None:
    """work(job, rank, tell) as one of the ranks that launch.py has started."""
    here = Path(folder)
    job = json.loads((here / "job.json").read_text())
    torch.set_num_threads(1)
    try:
        store, limit = dist.FileStore(str(here / "store"), job["ranks"]), timedelta(seconds=job["timeout_s"])
        dist.init_process_group("gloo", store=store, rank=rank, world_size=job["ranks"], timeout=limit)
        with open(here / "news", "a") as news:

            def tell(what: dict[str, Any]) -> None:
                if rank == 0:
                    print(json.dumps(what), file=news, flush=True)

            work(job, rank, tell)
        dist.barrier()
        dist.destroy_process_group()
    except Exception as error:
        note = json.dumps({"when": time.time(), "error": f"{type(error).__name__}: {error}"})
        (here / f"{rank}.error").write_text(note)
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # an orderly end would wait for collectives that the others never enter


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
