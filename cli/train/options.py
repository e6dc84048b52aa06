"""What `headgate train` can be asked for."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, field, fields
from math import gcd
from pathlib import Path
from typing import Any

from ...bench.arguments import number, seed, whole
from ...bench.machine import must_fit
from ...bench.olmoe import Shape
from ...dispatch import ENGINES
from ...dispatch.fold import ATTENTION, EXPERTS, Sizes
from ...dispatch.wire import FORMATS

NAMES = (*ATTENTION, *EXPERTS, "pp")


@dataclass(frozen=True)
class Options:
    """`fold` None: data parallel, experts spread as far as their number allows. `micro`: parts of a step's batch, one
    after the other; None: as many as there are pipeline stages. Raises ValueError naming the rule."""

    fold: dict[str, int] | None = None
    elastic: bool = False
    steps: int = 100
    batch: int = 8
    micro: int | None = None
    learning_rate: float = 3e-3
    seed: int = 0
    text: Path | None = None
    checkpoint: Path | None = None
    every: int | None = None
    dispatcher: str | None = None
    wire: str = "exact"
    timeout: int = 300
    json: bool = False
    shape: Shape = field(default_factory=Shape)

    def __post_init__(self) -> None:
        counts = {name: getattr(self, name) for name in ("steps", "batch", "micro", "every", "timeout")} | vars(
            self.shape
        )
        for name, value in counts.items():
            if value is not None and value < 1:
                raise ValueError(f"train: --{name.replace('_', '-')} must be at least 1, got {value}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"train: --seed must be 0 .. 2**32 - 1, got {self.seed}")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(f"train: --lr must be more than 0, got {self.learning_rate}")
        if self.wire not in FORMATS:
            raise ValueError(f"train: --wire must be one of {', '.join(FORMATS)}, got {self.wire!r}")
        if self.dispatcher in ENGINES:
            raise ValueError(f"train: --dispatcher must be one that moves fp32 rows, got {self.dispatcher!r}")
        if self.every is not None and self.checkpoint is None:
            raise ValueError(f"train: --every must come with --checkpoint, got {self.every} without it")
        if self.checkpoint is not None and self.checkpoint.exists() and not self.checkpoint.is_dir():
            raise ValueError(f"train: --checkpoint must be a folder, got the file {self.checkpoint}")
        must_fit("train: the model and a batch", self._least_bytes())
        if self.shape.hidden % (2 * self.shape.heads):
            raise ValueError(
                f"train: --hidden must be a multiple of twice --heads ({self.shape.heads}), got {self.shape.hidden}"
            )
        if self.shape.top_k > self.shape.experts:
            raise ValueError(f"train: --top-k must be at most --experts ({self.shape.experts}), got {self.shape.top_k}")

    def _least_bytes(self) -> float:
        """Of fp32 weights, which every rank makes before it keeps its part, and of token ids."""
        s = self.shape
        layer = s.hidden * (4 * s.hidden + s.experts * (3 * s.ffn + 1))
        return 4.0 * s.layers * layer + 8.0 * self.batch * s.length

    @property
    def parts(self) -> int:
        return self.micro or (self.fold or {}).get("pp", 1)


def options_of(args: argparse.Namespace) -> Options:
    given = {f.name: getattr(args, f.name) for f in fields(Options) if f.name not in ("fold", "shape")}
    shape = Shape(**{f.name: getattr(args, f.name) for f in fields(Shape)})
    return Options(fold=None if args.fold is None else parse_fold(args.fold), shape=shape, **given)


def parse_fold(text: str) -> dict[str, int]:
    """ "dp=2,tp=2,ep=4" -> {"dp": 2, "tp": 2, "ep": 4}; raises ValueError."""
    found: dict[str, int] = {}
    for part in text.split(","):
        name, _, number = part.strip().partition("=")
        if name not in NAMES or name in found or not number.isdecimal():
            raise ValueError(
                f"train: --fold must be sizes such as dp=2,tp=2,ep=4, each of {', '.join(NAMES)} at most once, "
                f"got {text!r}"
            )
        found[name] = int(number)
    return found


def choose(options: Options, world: int) -> tuple[Sizes, str | None]:
    """(the sizes to train under, what is to be said about them). Raises ValueError where none will do."""
    if options.fold is None:
        ep = gcd(world, options.shape.experts)
        sizes, said = Sizes(dp=world, cp=1, tp=1, edp=world // ep, ep=ep, etp=1), None
    else:
        attention, experts = ({n: s for n, s in options.fold.items() if n in side} for side in (ATTENTION, EXPERTS))
        pp = options.fold.get("pp", 1)
        asked_for = math.prod(attention.values()) * pp if options.elastic else world
        sizes, said = Sizes.of(attention, experts, pp, asked_for), None
        if asked_for != world:
            sizes, said = _nearest(sizes, options, world)
    wrong = misfit(sizes, options)
    if wrong is not None:
        raise ValueError(f"train: {wrong}")
    return sizes, said


def _nearest(asked: Sizes, options: Options, world: int) -> tuple[Sizes, str]:
    for sizes in asked.nearest(world, count=10_000):
        if misfit(sizes, options) is None:
            return sizes, f"--fold {asked} is for {asked.stage * asked.pp} ranks and here are {world}: taking {sizes}"
    raise ValueError(f"train: --elastic found no fold of {world} ranks for this model and --batch {options.batch}")


def misfit(sizes: Sizes, options: Options) -> str | None:
    """Why the model and the batch cannot be cut like that, or None."""
    shape, s = options.shape, sizes
    rules = (
        ("heads", shape.heads, "tp * cp", s.tp * s.cp),
        ("length", shape.length, "tp * cp", s.tp * s.cp),
        ("batch", options.batch, f"dp and {options.parts} micro-batches", s.dp * options.parts),
        ("experts", shape.experts, "ep", s.ep),
        ("ffn", shape.ffn, "etp", s.etp),
    )
    for name, value, what, divisor in rules:
        if value % divisor:
            return f"--{name} must be a multiple of {divisor} ({what}), got {value} under {s}"
    if shape.layers < s.pp:
        return f"--layers must be at least one for each of {s.pp} stages, got {shape.layers}"
    return None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    def add(name: str, about: str, **more: Any) -> None:
        default = more.get("default")
        more.setdefault("metavar", "N")
        parser.add_argument(name, help=about if default is None else f"{about} (default: %(default)s)", **more)

    add("--fold", f"sizes of {', '.join(NAMES)}; one left out is 1 (default: dp = ranks, ep as far as experts allow)",
        metavar="SIZES")  # fmt: skip
    parser.add_argument("--elastic", action="store_true", help="with other ranks than the fold's, take the nearest")
    add("--steps", "optimizer steps", type=whole, default=Options.steps)
    add("--batch", "sequences to a step, over all ranks", type=whole, default=Options.batch)
    add("--micro", "micro-batches that a step's batch is cut into (default: pp)", type=whole)
    add(
        "--lr",
        "the highest learning rate",
        type=number,
        default=Options.learning_rate,
        metavar="X",
        dest="learning_rate",
    )
    add("--seed", "of weights and batches", type=seed, default=Options.seed, metavar="S")
    add("--text", "train on this file (default: Python's own library)", type=Path, metavar="FILE")
    add("--checkpoint", "keep a checkpoint here, and go on from it where there is one", type=Path, metavar="DIR")
    add("--every", "write it every N steps too, not only at the end", type=whole)
    add("--dispatcher", "how rows reach their experts (default: by the fold)", metavar="NAME")
    add("--wire", f"format of rows on the way: {', '.join(FORMATS)}", default=Options.wire, metavar="FORMAT")
    add("--timeout", "seconds that a rank waits for another", type=whole, default=Options.timeout, metavar="S")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON on standard output")
    for f in fields(Shape):
        add(f"--{f.name.replace('_', '-')}", f"the model's {f.name}", type=whole, default=f.default)
