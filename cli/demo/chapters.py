"""The chapters of the tour, in order, and the conductor that runs them and keeps what they found."""

from __future__ import annotations

import json
import time
from pathlib import Path

from ...bench.corpus import read_corpus
from ...bench.output import write_text
from ...bench.screen import Screen
from . import caching, files, placement, report, routing, sample, speed, swap, train
from .model import parameters, quiet, tokenizer
from .tour import Chapter, Options, Shape, Tour, spoken

__all__ = ["CHAPTERS", "Chapter", "Options", "Shape", "Tour", "run"]

CHAPTERS = [
    Chapter("swap", "The swap", swap.run, swap.section),
    Chapter("speed", "Speed and memory", speed.run, speed.section),
    Chapter("train", "Training", train.run, train.section),
    Chapter("routing", "Where tokens go", routing.run, routing.section),
    Chapter("placement", "Where experts live", placement.run, placement.section),
    Chapter("cache", "Experts larger than memory", caching.run, caching.section),
    Chapter("sample", "What it writes", sample.run, sample.section),
]
NEED_BYTES = 200_000_000


def run(options: Options, screen: Screen | None = None, chapters: list[Chapter] | None = None) -> Tour:
    """Runs the chapters and writes model, trace, metrics and report into `options.output`.

    Ctrl-C ends the tour early and keeps what there is (`tour.interrupted` names the chapter). Raises ValueError before
    any work is done where the text or the output folder will not do.
    """
    screen = screen or Screen()
    chapters = CHAPTERS if chapters is None else chapters
    corpus = read_corpus(options.text, options.shape.length)
    files.prepare(options.output, NEED_BYTES)
    tour = Tour(options, screen, corpus)
    start = time.perf_counter()
    screen.say(f"Text: {len(corpus.train):,} bytes to train on, {len(corpus.held_out):,} held out ({corpus.source})")
    with quiet():
        try:
            _walk(tour, chapters)
        finally:
            if tour.metrics:  # also after an error: a trained model is not thrown away
                _keep(tour, chapters, time.perf_counter() - start)
    return tour


def _walk(tour: Tour, chapters: list[Chapter]) -> None:
    for number, chapter in enumerate(chapters, 1):
        tour.screen.heading(f"{number}. {chapter.title}")
        try:
            chapter.run(tour)
        except KeyboardInterrupt:
            tour.interrupted = chapter.name
            tour.screen.say(f"  interrupted in the chapter {chapter.title!r}")
            return


def _keep(tour: Tour, chapters: list[Chapter], seconds: float) -> None:
    """Writes what there is, each part whole, and takes away the parts of an earlier run that this one lacks."""
    folder, screen = tour.options.output, tour.screen
    tour.metrics = {"about": _about(tour, seconds), **tour.metrics}
    screen.heading("Kept")
    kept = {"report.html", "report.png", files.MARK}
    if tour.model is not None:
        kept.add("model")
        files.write_folder(folder / "model", lambda to: save_model(tour, to))
        screen.say(f"  {folder / 'model'}: {parameters(tour.model)[0] / 1e6:.1f} M parameters, safetensors")
    if tour.trace is not None:
        kept.add("trace.npz")
        tour.trace.save(folder / "trace.npz")
        screen.say(f"  {folder / 'trace.npz'}: the routing of {tour.trace.expert_ids.shape[1]:,} tokens")
    if tour.placement is not None:
        kept.add("placement.json")
        tour.placement.save(folder / "placement.json")
        screen.say(f"  {folder / 'placement.json'}: the GPU of every expert, with cost and bound")
    write_text(folder / "report.html", report.page(tour, chapters))
    screen.say(f"  {folder / 'report.html'}: everything with pictures; open it in a browser")
    report.write_sheet(folder / "report.png", tour.metrics)
    screen.say(f"  {folder / 'report.png'}: its main pictures on one sheet")
    write_text(folder / files.MARK, json.dumps(tour.metrics, indent=1))
    screen.say(f"  {folder / files.MARK}: every figure")
    files.clear(folder, kept)
    screen.say(f"\n{spoken(seconds)} in all")


def _about(tour: Tour, seconds: float) -> dict:
    import torch
    import transformers

    from ...bench import machine

    return {
        "seconds": seconds,
        "interrupted": tour.interrupted,
        "seed": tour.options.seed,
        "shape": vars(tour.options.shape),
        "text": tour.corpus.source,
        "machine": machine.processor(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def save_model(tour: Tour, folder: Path) -> None:
    """The model as transformers saves it, with a tokenizer whose ids are bytes."""
    tour.model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
