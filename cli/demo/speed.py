"""Chapter: speed and memory beside transformers' implementations, measured in alternation."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ...bench import draw, html
from ...bench.olmoe import Model
from .model import RIVALS, generate, implementation, losses
from .tour import Tour
from .train import Optimizer

CONTENDERS = (*RIVALS, "headgate")
MIN_ROUNDS, MAX_ROUNDS = 3, 7
PATIENCE = 2  # times the planned seconds: then fewer than MIN_ROUNDS must do
STEADY = 1.3  # median over fastest round of the same work; beyond it the machine was doing something else
NEW_TOKENS = 24
ONE_CORE = 0.95  # with less than a core for itself on average the process had to wait for others
WARNING = "Something else was using this machine: these speeds are not to be relied on."
WORK = {
    "training_step": "training step",
    "forward": "forward pass",
    "generate": "generating, one token at a time",
}


def run(tour: Tour) -> None:
    model = tour.model
    tour.screen.say(f"  {torch.get_num_threads()} threads, float32, medians of alternating rounds")
    batch = next(tour.corpus.batches(tour.options.rows, tour.options.shape.length, tour.options.seed))
    wall, busy = time.perf_counter(), time.process_time()
    seconds = _measure(tour, model, batch)
    cores = (time.process_time() - busy) / (time.perf_counter() - wall)
    tokens = {"training_step": batch.numel(), "forward": batch.numel(), "generate": NEW_TOKENS}
    rates = {
        work: {name: tokens[work] / statistics.median(times) for name, times in by_name.items()}
        for work, by_name in seconds.items()
    }
    kept = {name: _kept_for_backward(model, batch, name) for name in CONTENDERS}
    tour.metrics["speed"] = {
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        "tokens_per_step": batch.numel(),
        "seconds": seconds,
        "cores_had": cores,
        "median_over_fastest": _spread(seconds["training_step"]),
        "tokens_per_second": rates,
        "kept_for_backward_bytes": {name: total for name, (total, _) in kept.items()},
        "kept_by_experts_bytes": {name: inside for name, (_, inside) in kept.items()},
    }
    tour.screen.table(_table(tour.metrics["speed"]))
    if not reliable(tour.metrics["speed"]):
        tour.screen.say(f"  {WARNING}")


def _measure(tour: Tour, model: Model, batch: Tensor) -> dict[str, dict[str, list[float]]]:
    """seconds[work][contender]: one entry per round; the first round, which warms up, is left out."""
    optimizer = Optimizer(model, rate=0.0)
    prompt = bytes(batch[0, :32].tolist())

    def step() -> None:
        losses(model, batch)[0].backward()
        optimizer.step()

    def forward() -> None:
        with torch.no_grad():
            model(input_ids=batch)

    def write() -> None:
        generate(model, prompt, NEW_TOKENS, seed=0, temperature=0)

    work: dict[str, Callable[[], None]] = {"training_step": step, "forward": forward, "generate": write}
    seconds: dict[str, dict[str, list[float]]] = {name: {who: [] for who in CONTENDERS} for name in work}
    began = time.perf_counter()
    total = max(1, round(tour.options.speed_seconds))  # in seconds: rounds are as long as they are
    with tour.screen.bar(total) as bar:
        for turn in range(MAX_ROUNDS + 1):
            order = CONTENDERS if turn % 2 else CONTENDERS[::-1]  # so that none always follows the same one
            for who in order:
                with implementation(model, who):
                    for name, do in work.items():
                        took = _time(do)
                        if turn:
                            seconds[name][who].append(took)
            spent = time.perf_counter() - began
            bar.update(min(int(spent), total), f"seconds of measuring, {turn + 1} rounds")
            if spent > tour.options.speed_seconds * (1 if turn >= MIN_ROUNDS else PATIENCE) and turn:
                break
    model.zero_grad()
    return seconds


def _time(do: Callable[[], None]) -> float:
    start = time.perf_counter()
    do()
    return time.perf_counter() - start


def _kept_for_backward(model: Model, batch: Tensor, name: str) -> tuple[int, int]:
    """Bytes that a forward pass keeps for backward: in all, and what the experts add.

    Each storage counts once, whole, for the first that saves it; parameters do not count.
    """
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}
    experts: dict[int, int] = {}
    inside = 0

    def enter(*_: object) -> None:
        nonlocal inside
        inside += 1

    def leave(*_: object) -> None:
        nonlocal inside
        inside -= 1

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and storage.data_ptr() not in seen:
            seen[storage.data_ptr()] = storage.nbytes()
            if inside:
                experts[storage.data_ptr()] = storage.nbytes()
        return tensor

    with implementation(model, name):
        modules = [module for path, module in model.named_modules() if path.endswith("mlp.experts")]
        hooks = [module.register_forward_pre_hook(enter) for module in modules]
        hooks += [module.register_forward_hook(leave) for module in modules]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = losses(model, batch)[0]
        for hook in hooks:
            hook.remove()
        del loss
    return sum(seen.values()), sum(experts.values())


def _spread(seconds: dict[str, list[float]]) -> float:
    return max(statistics.median(times) / min(times) for times in seconds.values())


def reliable(found: dict) -> bool:
    """Whether this process had the machine to itself: rounds alike, and never less than one core for its own."""
    return found["median_over_fastest"] <= STEADY and found["cores_had"] >= ONE_CORE


def _table(found: dict) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("tokens per second", *CONTENDERS, "headgate / best")]
    for work, rates in found["tokens_per_second"].items():
        rows.append((WORK[work], *(f"{rates[who]:,.0f}" for who in CONTENDERS), f"{ratio(rates):.2f}x"))
    kept = found["kept_by_experts_bytes"]
    rows.append(("MB kept by experts", *(f"{kept[who] / 1e6:,.0f}" for who in CONTENDERS), f"{fewer(kept):.2f}x less"))
    return rows


def ratio(rates: dict[str, float]) -> float:
    """Headgate's rate over the best rival's."""
    return rates["headgate"] / max(rates[who] for who in RIVALS)


def fewer(kept: dict[str, int]) -> float:
    """The best rival's bytes over Headgate's."""
    return min(kept[who] for who in RIVALS) / max(kept["headgate"], 1)


def rate_bars(axis: draw.Axes, rates: dict[str, float]) -> None:
    """Picture: tokens per second."""
    draw.bars(axis, {who: rates[who] for who in CONTENDERS}, "headgate", "tokens/s")


def kept_bars(axis: draw.Axes, kept: dict[str, int]) -> None:
    """Picture: megabytes kept for the backward pass."""
    draw.bars(axis, {who: kept[who] / 1e6 for who in CONTENDERS}, "headgate", "MB")


def section(tour: Tour) -> str:
    found = tour.metrics["speed"]
    rounds = len(next(iter(found["seconds"]["training_step"].values())))
    pictures = [
        draw.inline(partial(rate_bars, rates=rates), f"{WORK[work]}, tokens/s: {ratio(rates):.2f}× the best other")
        for work, rates in found["tokens_per_second"].items()
    ]
    kept = found["kept_by_experts_bytes"]
    less = f"kept for backward by the experts, MB: {fewer(kept):.2f}× less than the best other"
    pictures.append(draw.inline(partial(kept_bars, kept=kept), less))
    note = html.prose(f"<b>{WARNING}</b>") if not reliable(found) else ""
    return (
        note
        + html.prose(
            f"One model, the same weights, {found['tokens_per_step']:,} tokens a step in {found['dtype']} on "
            f"{found['threads']} threads. The implementations took turns for {rounds} rounds; the bars are medians. "
            "A training step is forward, backward and optimiser of the whole model, of which the experts are a part."
        )
        + html.grid(pictures)
    )
