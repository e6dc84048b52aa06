"""Chapter: train the swapped model for some hundred steps and watch it learn."""

from __future__ import annotations

import math
import statistics
import time
from functools import partial

from ...bench import draw, html
from ...bench.corpus import baselines
from ...bench.olmoe import Model, Optimizer, learning_rate
from ...moe.hf import replace
from .model import cross_entropy, losses
from .tour import Tour

PATIENCE = 1.3  # times the planned seconds: then the last steps are left out, unless --steps was given
CHECKS = (0.04, 0.12, 0.3, 0.5, 0.75)  # of the way: looks at held-out text, besides those before and after
FEWEST, MOST = 100, 600


def choose_steps(tour: Tour) -> int:
    """As many as fit in the time by the fastest step just measured; the loop ends in time if it was too fast."""
    options = tour.options
    if options.steps is not None:
        return options.steps
    step_seconds = min(tour.metrics["speed"]["seconds"]["training_step"]["headgate"])
    return max(FEWEST, min(MOST, round(options.train_seconds / step_seconds / 10) * 10))


def run(tour: Tour) -> None:
    options, model = tour.options, tour.model
    replace(model)
    steps = choose_steps(tour)
    length = options.shape.length
    held_out = tour.corpus.held_out_batches(options.rows, length, 16)
    found = tour.metrics["train"] = {
        "steps": steps,
        "tokens_per_step": options.rows * length,
        "bits_per_byte_of": baselines(tour.corpus),
        "train": [],  # bits per byte at each step
        "held_out": [[0, bits(cross_entropy(model, held_out))]],  # [step, bits per byte]
        "seconds": [],
    }
    _loop(tour, model, held_out, found)
    final = cross_entropy(model, held_out)
    found["held_out"].append([len(found["train"]), bits(final)])
    found["final_bits_per_byte"] = bits(final)
    found["final_perplexity_per_byte"] = math.exp(final)
    found["tokens_per_second"] = found["tokens_per_step"] / statistics.median(found["seconds"])
    _say(tour, found)


def _loop(tour: Tour, model: Model, held_out: list, found: dict) -> None:
    options, steps = tour.options, found["steps"]
    optimizer = Optimizer(model, rate=0.0)
    batches = tour.corpus.batches(options.rows, options.shape.length, options.seed)
    due = list(CHECKS)
    limit = math.inf if options.steps is not None else PATIENCE * options.train_seconds
    began = time.perf_counter()
    model.train()
    with tour.screen.bar(steps) as bar:
        for step in range(steps):
            start = time.perf_counter()
            done = max(step / steps, (start - began) / limit)  # so that the rate is down when the time is up
            if done >= 1:
                break
            loss, entropy = losses(model, next(batches))
            loss.backward()
            optimizer.step(learning_rate(done, options.learning_rate))
            value = bits(float(entropy))
            if not math.isfinite(value):
                raise RuntimeError(f"demo: training diverged at step {step}; try another --seed")
            found["seconds"].append(time.perf_counter() - start)
            found["train"].append(value)
            if due and done >= due[0]:
                due.pop(0)
                found["held_out"].append([step + 1, bits(cross_entropy(model, held_out))])
            rate = found["tokens_per_step"] / statistics.median(found["seconds"][-9:])
            seen = f"loss {value * math.log(2):.2f}  {value:.2f} bits/byte  held-out {found['held_out'][-1][1]:.2f}"
            bar.update(step + 1, f"{seen}  {rate:,.0f} tokens/s")


def bits(nats: float) -> float:
    return nats / math.log(2)


def _say(tour: Tour, found: dict) -> None:
    before = found["bits_per_byte_of"]
    tour.screen.say(
        f"  {len(found['train'])} steps of {found['tokens_per_step']:,} bytes in {sum(found['seconds']):.0f} s, median "
        f"{found['tokens_per_second']:,.0f} tokens/s"
    )
    tour.screen.table(
        [
            ("held-out text", "bits per byte", "perplexity"),
            *((name, f"{value:.2f}", f"{2**value:.1f}") for name, value in before.items()),
            ("before training", f"{found['held_out'][0][1]:.2f}", f"{2 ** found['held_out'][0][1]:.1f}"),
            ("after training", f"{found['final_bits_per_byte']:.2f}", f"{found['final_perplexity_per_byte']:.1f}"),
        ]
    )


def section(tour: Tour) -> str:
    found = tour.metrics["train"]
    done = len(found["train"])
    last = found.get("final_bits_per_byte", found["held_out"][-1][1])
    words = (
        f"{done} of {found['steps']} steps of {found['tokens_per_step']:,} bytes each, from {tour.corpus.source}. "
        f"On files that it never saw the model needs <b>{last:.2f} bits per byte</b> (perplexity {2**last:.1f}); "
        f"knowing nothing costs {found['bits_per_byte_of']['uniform']:.2f}, knowing how frequent each byte is "
        f"{found['bits_per_byte_of']['unigram']:.2f}, knowing the byte before it "
        f"{found['bits_per_byte_of']['bigram']:.2f}."
    )
    title = "bits per byte: training text (line), held-out text (dots)"
    return html.prose(words) + draw.inline(partial(curve, found=found), title, 860, 340)


def curve(axis: draw.Axes, found: dict) -> None:
    """Picture: bits per byte over steps."""
    steps = len(found["train"]) if "final_bits_per_byte" in found else found["steps"]
    draw.loss(axis, found["train"], found["held_out"], found["bits_per_byte_of"], steps)
