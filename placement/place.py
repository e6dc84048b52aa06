"""`place`: from a trace and a topology to a placement, with its cost and a bound that none can be below."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .bounds.certify import certify
from .cluster.topology import Topology, Workload
from .placement import Placement
from .problem import Objective, Problem
from .search.methods import METHODS, Run
from .slots import Pin, checked_load
from .traces.file import TraceFile
from .traces.scenarios import scenario_loads
from .traces.statistics import statistics
from .traces.trace import Trace
from .walk import homes_of

TOKENS = 200_000  # of a longer trace file are looked at
TABLES_bytes = 4 << 30  # of rows between GPUs, at most
RUN = 256  # of which so many stand together
IN_MEMORY_bytes = 1 << 28


def place(
    source: Trace | TraceFile,
    topology: Topology,
    slots_per_gpu: int | None = None,
    method: str = "auto",
    *,
    objective: str | Objective = "time",
    workload: Workload | None = None,
    load: NDArray | None = None,
    scenarios: int | NDArray[np.integer] | None = None,
    pins: Sequence[Pin] | None = None,
    groups: int = 1,
    start: Placement | None = None,
    time_limit: float = 60.0,
    effort: float = 1.0,
    seed: int = 0,
    bound: bool = True,
    progress: Callable[[str], None] | None = None,
) -> Placement:
    """The placement of `source`'s experts on `topology` that makes the objective small.

    slots_per_gpu  slots of a layer on each GPU; None: just enough for all experts. What is left over holds replicas
    method         a name in METHODS: "auto" (decomposition and search), "ilp" (exact, for small cases), "balance" (load
                   alone), "eplb", "linear", "random"
    objective      "time" (predicted seconds of `workload`'s step), "transitions", "copies", "load", or an Objective
    load           [L, E]: what loads to expect, in place of the trace's own, such as `steady_load(trace)`
    scenarios      what other loads it must stand: see `scenario_loads`; with "load" and spare slots their mean
    pins           triples (layer, expert, gpu): replicas that must be there
    groups         E / groups consecutive experts stay on one node (group-limited routers); not with "linear", "random"
    start          a placement for the search to begin with; left aside with spare slots and with "load"
    time_limit     seconds for all of it, but for counting the trace and compiling the loops at their first use; the
                   search ends earlier by itself, its length is `effort` times the usual
    seed           same seed, same answer, unless the time limit or Ctrl-C ends the search early
    bound          whether to prove how far from the best possible the answer can be
    progress       told a line now and then

    `placement.cost` are the figures of the walk (`Cost.summary`, and the objective's `score`), `placement.bound` what
    no placement can be below, with `gap`, how much lower the best can be, over the score; `proved` where that is 0.
    A TraceFile of more than 200,000 tokens is sampled (`sampled`), and all figures are those of the sample.
    Ctrl-C ends the search, not the call: the best so far is returned, its bound too; a second one raises. An integer
    program that runs is not interrupted.

    Raises ValueError / TypeError naming argument, rule and value.

    >>> ids = np.array([[[0], [1], [2], [3]] * 2, [[1], [0], [3], [2]] * 2], dtype=np.uint8)
    >>> found = place(Trace(ids, 4), Topology(nodes=1, gpus_per_node=2), objective="transitions")
    >>> found.cost["cross_gpu"], found.bound["gap"]
    (0, 0.0)
    """
    if method not in METHODS:
        raise ValueError(f"place: method must be one of {', '.join(METHODS)}, got {method!r}")
    for name, value in (("time_limit", time_limit), ("effort", effort)):
        if not value > 0:
            raise ValueError(f"place: {name} must be above 0, got {value}")
    say, began = progress or (lambda line: None), time.perf_counter()
    trace = sampled(source, TOKENS)
    if np.ndim(scenarios) == 1 and len(scenarios) == source.shape[1] != trace.shape[1]:  # type: ignore[arg-type]
        scenarios = np.asarray(scenarios)[_taken(source.shape[1], TOKENS)]
    problem = problem_of(trace, topology, slots_per_gpu, objective, workload, load, scenarios, pins, groups, seed)
    if start is not None and not np.array_equal(start.slots_of_gpu, problem.slots_of_gpu):
        rule = f"{problem.slots_of_gpu.tolist()} slots"
        raise ValueError(f"place: start must have {rule}, got {start.slots_of_gpu.tolist()}")
    with _interruptible() as interrupted:
        run = Run(began + time_limit * (0.6 if bound else 1.0), interrupted, seed, effort, start, say)
        slots, proof = METHODS[method](problem, run)
        placement = problem.placement(slots)
        searched = time.perf_counter() - began
        cost = run.walked(problem, placement)
        parts = problem.parts(cost, placement)
        score = problem.score(parts)
        say(f"score {score:.6g} after {searched:.1f} s")
        run.deadline = began + time_limit
        found = certify(problem, parts, score, proof, run) if bound else {}
    how = {"method": method, "seed": seed, "effort": effort, "search_s": round(searched, 3)}
    how |= {"seconds": round(time.perf_counter() - began, 3), "interrupted": interrupted.is_set()}
    how |= run.notes
    return replace(placement, cost={**cost.summary(workload), "score": score}, bound=found, method=how)


def problem_of(
    trace: Trace,
    topology: Topology,
    slots_per_gpu: int | None,
    objective: str | Objective,
    workload: Workload | None = None,
    load: NDArray | None = None,
    scenarios: int | NDArray[np.integer] | None = None,
    pins: Sequence[Pin] | None = None,
    groups: int = 1,
    seed: int = 0,
) -> Problem:
    """The Problem of these arguments of `place`, checked."""
    layers, tokens, top_k = trace.shape
    experts = trace.num_experts
    if trace.experts_of_layer is not None and len(set(trace.experts_of_layer.tolist())) > 1:
        rule = "layers with equally many experts"
        raise ValueError(f"place: source must have {rule}, got {sorted(set(trace.experts_of_layer.tolist()))}")
    if not layers or not tokens:
        raise ValueError(f"place: source must have layers and tokens, got {layers} and {tokens}")
    if 16 * layers * topology.gpus**2 > TABLES_bytes:
        rule = f"few enough GPUs for tables [L={layers}, G, G] of 16 bytes in {TABLES_bytes:,}"
        raise ValueError(f"place: topology must have {rule}, got {topology.gpus}")
    slots = topology.slots_of_gpu(experts, slots_per_gpu)
    if groups < 1 or experts % groups:
        raise ValueError(f"place: groups must divide the experts, {experts}, got {groups}")
    if experts >= 2**15:
        raise ValueError(f"place: source must have fewer than {2**15} experts, got {experts}")
    ids = np.where(trace.live, trace.expert_ids.astype(np.int16), np.int16(-1))
    loads = scenario_loads(trace, scenarios, seed)
    if load is not None:
        expected = checked_load("place", load)
        if expected.shape != (layers, experts):
            raise ValueError(f"place: load must be [L, E] = {(layers, experts)}, got {expected.shape}")
        loads[0] = expected / np.maximum(expected.sum(1, keepdims=True), np.finfo(float).tiny)
    return Problem(
        experts,
        statistics(trace).transitions,
        loads,
        ids,
        topology,
        slots,
        _objective(objective, topology, workload or Workload(), layers, top_k),
        _pins(pins, layers, experts, topology.gpus, slots),
        groups,
        load is None,
        homes_of(trace, topology.gpus),
    )


def _objective(given: str | Objective, topology: Topology, workload: Workload, layers: int, top_k: int) -> Objective:
    if isinstance(given, Objective):
        return given
    known: dict[str, Callable[[], Objective]] = {
        "time": lambda: Objective.time(topology, workload, layers, top_k),
        "transitions": lambda: Objective.transitions(topology),
        "copies": lambda: Objective.copied(topology),
        "load": lambda: Objective(load=1.0),
    }
    if given not in known:
        raise ValueError(f"place: objective must be an Objective or one of {', '.join(known)}, got {given!r}")
    return known[given]()


def _pins(
    pins: Sequence[Pin] | None, layers: int, experts: int, gpus: int, slots: NDArray[np.int32]
) -> NDArray[np.int32]:
    table = np.full((layers, experts), -1, np.int32)
    for pin in pins or ():
        layer, expert, gpu = pin
        if not (0 <= layer < layers and 0 <= expert < experts and 0 <= gpu < gpus):
            raise ValueError(f"place: pins must be (layer, expert, gpu) below ({layers}, {experts}, {gpus}), got {pin}")
        if table[layer, expert] not in (-1, gpu):
            raise ValueError(f"place: pins must name one GPU for an expert, got {pin} and GPU {table[layer, expert]}")
        table[layer, expert] = gpu
    for layer, row in enumerate(table):
        held = np.bincount(row[row >= 0], minlength=gpus)
        if (held > slots).any():
            g = int(np.argmax(held - slots))
            raise ValueError(f"place: pins must fit the {slots[g]} slots of GPU {g} in layer {layer}, got {held[g]}")
    return table


def open_source(path: str | os.PathLike[str]) -> Trace | TraceFile:
    """A trace file in memory, or, above 256 MiB, as a TraceFile that streams. Raises as they do."""
    size = os.path.getsize(path)
    if size > IN_MEMORY_bytes:
        return TraceFile(path)
    return Trace.load(path, max_bytes=max(IN_MEMORY_bytes, 4 * size))


def sampled(source: Trace | TraceFile, tokens: int = TOKENS) -> Trace:
    """A trace in memory: all of it, or of a longer TraceFile evenly spread runs of 256 tokens, about `tokens`."""
    if isinstance(source, Trace):
        return source
    every = source.shape[1]
    if every <= tokens:
        return source.trace()
    taken, layers = _taken(every, tokens), []
    for layer in range(source.shape[0]):
        at, parts = 0, []
        for ids in source.chunks(layer):
            parts.append(ids[taken[at : at + len(ids)]])
            at += len(ids)
        layers.append(np.concatenate(parts))
    sequence = source.sequence
    kept = None if sequence is None else sequence[taken]
    return Trace(np.stack(layers), source.num_experts, None, kept, source.layer_names, source.experts_of_layer)


def _taken(every: int, tokens: int) -> NDArray[np.bool_]:
    taken = np.zeros(every, bool)
    for start in np.linspace(0, every - RUN, max(tokens // RUN, 1)).astype(np.int64).tolist():
        taken[start : start + RUN] = True
    return taken


@contextmanager
def _interruptible() -> Iterator[Any]:
    """An event that the first Ctrl-C sets; outside the main thread nothing listens."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def first(number: int, frame: Any) -> None:
        event.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, first)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)
