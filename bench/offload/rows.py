"""The rows of the table, one function each: what is compared, by which figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from ..placement.case import Case
from ..placement.rows import Row
from .predict import by_sequence, recalled

SLOTS = (8, 16, 32)


def eviction(case: Case, effort: float) -> Row:
    from .evict import measure

    found = measure(case.fit, case.judge, (case.fit_domain, case.judge_domain), SLOTS)
    names = ("lru", "lfru", "lfu-cached", "adaptive", "learned", "belady")
    lines = [(str(slots), *(f"{rates[name]:.3f}" for name in names)) for slots, rates in found.items()]
    kinds = ("crossed_adaptive", "crossed", "renamed", "shuffled_lfru", "shuffled")
    lines += [
        (
            f"{slots}, of the gap",
            *("" if f"{name}_gap" not in rates else f"{rates[f'{name}_gap']:.0%}" for name in names),
        )
        for slots, rates in found.items()
    ]
    text = [f"{kind} {' / '.join(f'{rates[kind]:.0%}' for rates in found.values() if kind in rates)}" for kind in kinds]
    return Row(
        "Hit rates without prefetch, one token at a time, by slots of a layer (" + "; ".join(text) + ")",
        ("slots", *names),
        lines,
        {str(slots): rates for slots, rates in found.items()},
    )


def recall(case: Case, effort: float) -> Row:
    methods = ("popular", "transition", "ridge", "path")
    found = {method: recalled(case.fit, case.judge, method) for method in methods}
    found |= {f"path, {h} ahead": recalled(case.fit, case.judge, "path", h) for h in (2, 3)}
    return _recall("Recall of the next layer's K experts, K / 2K fetched, from ids alone", found)


def sequences(case: Case, effort: float) -> Row:
    train, test = by_sequence(case.whole)
    found = {method: recalled(train, test, method) for method in ("ridge", "path")}
    return _recall("The same, fitted on every other sequence", found)


def _recall(title: str, found: dict[str, dict[str, Any]]) -> Row:
    lines = [
        (
            name,
            "{:.3f} / {:.3f}".format(*row["from_layers"]),
            "{:.3f} / {:.3f}".format(*row["all_layers"]),
            f"{row['calibration_largest']:.3f}",
            f"{row['bytes'] / 1e6:.1f}",
            f"{row['fit_cpu_s']:.1f}",
            f"{sum(row['step_us']):.0f}",
        )
        for name, row in found.items()
    ]
    head = ("predictor", "layers with one before", "all layers", "chances off by", "MB", "fit CPU s", "us a step")
    return Row(title, head, lines, found)


def prefetch(case: Case, effort: float) -> Row:
    from .predict import measure

    found = measure(case.fit, case.judge, (16, 8), ("lru", "adaptive", "learned"), ("curve",))["curve"]
    lines = [
        (
            str(row["slots"]),
            row["policy"],
            "none ahead" if row["price"] is None else f"{row['price']:g}",
            f"{row['hit_rate']:.3f}",
            f"{row['loads']:.3f}",
        )
        for row in found
    ]
    head = ("slots", "policy", "price of bytes", "hit rate", "loads / LRU's alone")
    return Row("With prefetch by path: hit rate against bytes", head, lines, found)


def waiting(case: Case, effort: float) -> Row:
    from .predict import measure

    found = measure(case.fit, case.judge, (16,), ("lru",), ("waiting",))["waiting"]
    lines = [(f"{row['load']:g}", *(f"{share:.3f}" for share in row["waiting"].values())) for row in found]
    head = ("load / step", *(f"price {price}" for price in found[0]["waiting"]))
    return Row("Time that steps wait, prefetching over not, LRU in 16 slots, one link", head, lines, found)


def split(case: Case, effort: float) -> Row:
    from .split import costs_with, measure

    lines, figures = [], {}
    for copy_GBps, speed in ((25.0, 5.0), (100.0, 20.0), (5.0, 5.0)):
        found = measure(case.judge, costs_with(copy_GBps, speed), steps=max(20, round(100 * effort)))
        figures[f"{copy_GBps:g} GB/s, device {speed:g}x"] = found
        for batch, row in found.items():
            lines.append(
                (
                    f"{copy_GBps:g} GB/s, {speed:g}x",
                    str(batch),
                    f"{row['split']:.4f}",
                    f"{row['worst']:.4f}",
                    f"{row['fiddler']:.2f}",
                    f"{row['fetch']:.2f}",
                    f"{row['host']:.2f}",
                    f"{row['median_us']:.0f}",
                    f"{row['p99_us']:.0f}",
                )
            )
    head = ("link, device", "tokens", "split", "worst step", "Fiddler", "all fetched", "all host", "us", "p99")
    title = "Makespan over the least, host or device (host measured here; link and device assumed)"
    return Row(title, head, lines, figures)


def regroup(case: Case, effort: float) -> Row:
    from .regroup import measure

    found = {batch: measure(case.judge, batch=batch) for batch in (4, 8, 16)}
    lines = [
        (
            str(batch),
            f"{row['arrival']:.1f}",
            f"{row['regrouped']:.1f}",
            f"{row['bound']:.1f}",
            f"{row['judged_arrival']:.1f}",
            f"{row['judged']:.1f}",
            f"{row['cpu_s']:.2f}",
        )
        for batch, row in found.items()
    ]
    head = ("batch", "as they arrive", "regrouped", "bound", "later tokens: arriving", "regrouped", "CPU s")
    return Row(
        "Distinct experts of a batch and layer, 128 requests", head, lines, {str(b): r for b, r in found.items()}
    )


def batching(case: Case, effort: float) -> Row:
    from .batching import measure
    from .model import Size

    found = measure(case.judge, Size(layers=4))
    lines = [
        (name, f"{row['tokens_per_s']:.1f}", f"{row['MB']:.1f}", f"{row['hit_rate']:.3f}")
        for name, row in found.items()
    ]
    title = "32 prompts, 8 tokens each, experts on disk, 25 % in memory: micro-batches in turn, and module by module"
    return Row(title, ("", "tokens/s", "MB a token", "hit rate"), lines, found)


def learning(case: Case, effort: float) -> Row:
    from importlib.util import find_spec

    title = "A LoRA step on attention, 2 x 256 tokens, experts on disk, 25 % in memory"
    if find_spec("peft") is None:
        return Row(f"{title}: skipped, peft is not installed (pip install peft)", ("",), [], {})
    from .learning import measure
    from .model import Size

    found = measure(case.judge, Size(layers=2), rounds=max(3, round(5 * effort)))
    lines = []
    for name, one in found.items():
        base = found["resident, checkpointed" if name.endswith("checkpointed") else "resident"]
        over = (f"{one[f] / base[f]:.2f}" for f in ("wall_s", "cpu_s"))
        lines.append((name, f"{one['wall_s']:.2f}", f"{one['cpu_s']:.2f}", *over, f"{one['MB']:.0f}"))
    head = ("", "s a step", "CPU s", "over resident", "CPU s over resident", "MB read")
    return Row(title + ", beside resident ones; the same gradients to the bit", head, lines, found)


def generation(case: Case, effort: float, device: str = "cpu", experts: str = "qwen3-235b") -> Row:
    from .generation import SETTINGS, measure, measure_on_gpu
    from .model import ON_GPU, Size

    if device == "cpu":
        found = measure(case.fit, case.judge, Size(), settings=SETTINGS)
        plain = ", ".join(f"{rate:.2f} GB/s by {n}" for n, rate in found["plain_read_GBps"].items())
        title = f"Generation with experts on disk, 25 % in memory, page cache kept out; plain reads reach {plain}"
    else:
        found = measure_on_gpu(case.fit, case.judge, ON_GPU[experts], settings=SETTINGS, device=device)
        title = (
            f"Generation with experts like {experts}'s in page-locked host memory, 25 % on the device; plain copies "
            f"reach {found['plain_copy_GBps']:.1f} GB/s"
        )
    base, rates = found["on demand"].tokens_per_s, ("plain_read_GBps", "plain_copy_GBps")
    lines = [
        (
            name, f"{one.tokens_per_s:.2f}", f"{one.tokens_per_s / base:.2f}", f"{one.hit_rate:.3f}", f"{one.MB:.1f}",
            "" if one.overlap is None else f"{one.overlap:.0%}", "" if one.GBps is None else f"{one.GBps:.2f}",
        )
        for name, one in found.items() if name not in rates
    ]  # fmt: skip
    head = ("", "tokens/s", "over on demand", "hit rate", "MB a token", "overlap", "GB/s while reading")
    figures = {name: one if name in rates else asdict(one) for name, one in found.items()}
    return Row(title, head, lines, figures)


ROWS: dict[str, Callable[[Case, float], Row]] = {
    "eviction": eviction,
    "recall": recall,
    "sequences": sequences,
    "prefetch": prefetch,
    "waiting": waiting,
    "split": split,
    "regroup": regroup,
    "batching": batching,
    "learning": learning,
    "generation": generation,
}
LIVE: Sequence[str] = ("batching", "learning", "generation")  # these load torch and transformers, and write to disk
