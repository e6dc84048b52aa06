"""From the command line to the last step, on every rank."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ...bench.corpus import Corpus, read_corpus
from ...bench.machine import need
from ...bench.screen import Screen
from ...dispatch import Fold
from ...dispatch.fold import Sizes
from ...dispatch.rollcall import hold
from ..commands import one_line
from ..demo.model import quiet
from .loop import Trainer
from .model import build_stage
from .options import Options, choose, options_of
from .ranks import device, process_group, together


def run(args: argparse.Namespace) -> int:
    """Exit status: 0, or 2 on every rank where one of them found something amiss before the first step."""
    need("train", "transformers", "hf")
    with open(os.devnull, "w") as nowhere, quiet(), process_group(max(args.timeout, 1)):
        first = dist.get_rank() == 0
        screen = Screen(out=(sys.stderr if args.json else sys.stdout) if first else nowhere)
        try:
            trainer = prepare(args, screen)
        except ValueError as error:
            if first:
                print(f"headgate: {one_line(error)}", file=sys.stderr, flush=True)
            dist.barrier()  # torchrun ends all ranks when the first is gone: not before this line is out
            return 2
        try:
            found = trainer.train(screen)
        except RuntimeError as error:
            hold("train", dist.group.WORLD, error)  # type: ignore[arg-type]  # torch's own collectives do not say who is dead
            raise
        if first and args.json:
            print(json.dumps(about(trainer) | found))
    return 0


def prepare(args: argparse.Namespace, screen: Screen) -> Trainer:
    """Everything up to the first step. Raises ValueError, the same on every rank, where something does not fit."""
    options, here, sizes, said, corpus = together(lambda: examine(args))
    fold = Fold.of(sizes, device_type=here.type, timeout=timedelta(seconds=options.timeout))
    stage = together(lambda: build_stage(options, fold, here))
    trainer = Trainer(options, fold, stage, corpus, here)
    if said:
        screen.say(said)
    world, backend = dist.get_world_size(), "nccl" if here.type == "cuda" else "gloo"
    screen.say(f"{sizes} on {world} rank{'s' if world > 1 else ''} ({here.type}, {backend}); text: {corpus.source}")
    if trainer.resume():
        screen.say(f"going on after step {trainer.step} of {options.checkpoint}")
    return trainer


def examine(args: argparse.Namespace) -> tuple[Options, torch.device, Sizes, str | None, Corpus]:
    """What a rank can find out by itself."""
    options = options_of(args)
    sizes, said = choose(options, dist.get_world_size())
    return options, device(), sizes, said, read_corpus(options.text, options.shape.length, who="train")


def about(trainer: Trainer) -> dict[str, Any]:
    """What stands beside the figures in the JSON."""
    sizes, done = asdict(trainer.fold.sizes), trainer.step
    return {"fold": sizes, "ranks": dist.get_world_size(), "device": trainer.device.type, "last_step": done}
