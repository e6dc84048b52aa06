"""The table of rooms, the parser made from it, and the run of one command."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from .. import __version__
from .signals import Handler, Terminated

STATUSES = """\
exit status:
  0 done; 1 the thing asked failed; 2 bad usage; 130 interrupted with Ctrl-C; 143 ended by SIGTERM
"""


@dataclass(frozen=True)
class Command:
    """`room`: the module, relative to this package, loaded when the command is asked for. `commands` of its own; where
    none of them is named, the room itself runs. `examples` "": the room sets the epilog."""

    room: str
    help: str
    about: str
    examples: str = ""
    commands: Mapping[str, Command] = field(default_factory=dict)

    def load(self):
        return importlib.import_module(self.room, __package__)


def _bench(room: str, help: str) -> Command:
    return Command(f"..bench.{room}", help, f"{help[0].upper()}{help[1:]}.")


BENCHMARKS = {
    "moe": _bench("moe", "the expert layer beside its rivals"),
    "quantized": _bench(
        "quantized", "decoding with weights in few bits (int8, int4, GGUF's blocks, ...) beside bf16 and fp32"
    ),
    "lora": _bench("lora", "a training step of LoRA on experts beside PEFT's"),
    "optimizer": _bench("optimizer", "a step of Muon on stacks of experts beside torch.optim.Muon expert by expert"),
    "dispatch": _bench("dispatch.command", "the dispatchers beside rivals, on gloo ranks of this machine"),
    "overlap": _bench("overlap.command", "how much of the rows' travel is hidden, on a declared link"),
    "compile": _bench("gpu.compile", "every GPU kernel built ahead of time, without a GPU"),
    "roofline": _bench("gpu.roofline", "FLOPs, bytes and floor time of every launch"),
    "sweep": _bench("gpu.sweep", "the chosen tiles beside all others, on a GPU"),
    "placement": _bench(
        "placement", "placements beside EPLB: crossings, load, rows that move, bounds, replicas, drift"
    ),
    "offload": _bench(
        "offload.command", "expert caches beside Belady, predictors, prefetch, and generation with experts on disk"
    ),
    "routers": _bench("routers", "every router in the demo's model: held-out loss, load, rows and speed"),
    "links": _bench("links", "the links behind published tables, and which dispatcher wins where"),
}
COMMANDS = {
    "demo": Command(
        ".demo",
        "the tour, on real text",
        """\
Trains a small transformers MoE language model (about 20 million parameters, random weights) on real text: swaps its
experts for Headgate's, shows how little the numbers change and how much the speed does, records where tokens go, and
writes the model, trace.npz, placement.json, metrics.json, report.html and report.png. It needs no network. Ctrl-C keeps
what there is.
""",
        """\
  headgate demo
  headgate demo --text moby-dick.txt --steps 300 --output whale
""",
    ),
    "train": Command(
        ".train",
        "the same model over many ranks",
        """\
Trains the demo's model on real text over all ranks that torchrun started (without torchrun: one), under any fold of
data, context, tensor, expert and pipeline parallelism. The losses are those of one process, up to rounding.
""",
        """\
  headgate train --steps 20
  torchrun --nproc-per-node 4 --no-python headgate train --fold dp=2,tp=2,ep=4
  torchrun --nproc-per-node 4 --no-python headgate train --fold pp=2,cp=2,ep=2 --checkpoint run --every 50
""",
    ),
    "trace": Command(
        ".trace",
        "where tokens go",
        """\
Records which experts the tokens of a transformers MoE model choose, converts what SGLang, vLLM, transformers, llama.cpp
and others recorded, and shows what a trace says. A trace is an .npz file; it is streamed, never whole in memory.
""",
        """\
  headgate trace ./OLMoE-1B-7B --text book.txt --tokens 50000 --output olmoe.npz
  headgate trace --from expert_distribution_recorder_1764088000.5_0.pt --output served.npz
  headgate trace --show olmoe.npz --against served.npz
""",
    ),
    "place": Command(
        ".place",
        "experts to GPUs, by a trace",
        "Finds which GPU each expert should live on, layer by layer: a placement with its cost and a proved bound.",
        """\
  headgate place trace.npz --nodes 2 --gpus-per-node 4 --output placement.json
  headgate place trace.npz --nodes 1 --gpus-per-node 8 --slots-per-gpu 9 --objective transitions --max-load 1.06 \\
      --compare --explain --plot placement.html --output placement.json
  headgate place newer.npz --nodes 2 --gpus-per-node 4 --migrate-from placement.json --output new.json
  headgate place trace.npz --nodes 1 --gpus-per-node 8 --output placement.json --export sglang experts.json
""",
    ),
    "cache": Command(
        ".cache",
        "caches of experts, by a trace",
        "Shows what a cache of experts would hit on a trace, by every policy, beside Belady's optimum.",
        """\
  headgate cache trace.npz --budget 25%
  headgate cache trace.npz --slots 16 --batch 8 --scope shared --policies lru lfru layer
  headgate cache trace.npz --budget 8GiB --expert-bytes 17.3MB --host-budget 50% --prefetch path --plot cache.png
""",
    ),
    "generate": Command(
        ".generate",
        "answers of a model that does not fit",
        "Answers prompts with a transformers MoE model that may be larger than memory: its experts stay in the "
        "checkpoint's files, those in use stand in --budget. Prompts go through the model's chat template, if it has "
        "one. Ctrl-C ends an answer at its next token.",
        """\
  headgate generate ./Qwen3-30B-A3B --budget 4GiB --prompt "Why is the sky blue?" --stats
  headgate generate ./Qwen3-30B-A3B --budget 4GiB --disk /scratch --formats int4 --chat
  headgate generate ./OLMoE-1B-7B --budget 25% --file prompts.txt --batch 8 --json
  headgate generate ./OLMoE-1B-7B --budget 25% --raw --temperature 0 --prompt "Once upon a time"
""",
    ),
    "serve": Command(
        ".serve",
        "an OpenAI-compatible server for such a model",
        "Serves the same over HTTP, as OpenAI's clients ask it: /v1/chat/completions, /v1/completions, /v1/responses, "
        "with streaming, and /v1/models, /health. It listens on this machine only unless --host says otherwise. "
        "Ctrl-C or SIGTERM ends it when what is being answered has ended, or after 10 seconds.",
        """\
  headgate serve ./Qwen3-30B-A3B --budget 4GiB --port 8000
  headgate serve ./OLMoE-1B-7B --budget 25% --host 0.0.0.0 --at-once 8    with HEADGATE_API_KEY in the environment
  curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
      -d '{"messages": [{"role": "user", "content": "Why is the sky blue?"}], "stream": true}'
""",
    ),
    "pack": Command(
        ".pack",
        "experts of a checkpoint into one file",
        "Writes the experts of a checkpoint into one file, in few bits if wished, for headgate.load. One expert at a "
        "time is in memory. When it is interrupted nothing is left behind.",
        """\
  headgate pack ./OLMoE-1B-7B olmoe.experts --formats int4
  headgate pack ./Qwen3-30B-A3B /scratch/q.experts --formats int8 --max-memory 2GiB
""",
    ),
    "convert": Command(
        ".convert",
        "a dense model into a MoE model",
        "Writes a MoE model of transformers' own classes out of a dense one (Llama, Mistral, Qwen2, Qwen3, OLMo2), or "
        "out of several of one shape. Tensors are made one by one. When it is interrupted nothing is left behind.",
        """\
  headgate convert ./Llama-3.2-1B ./Llama-8x1B --experts 8 --top-k 2
  headgate convert ./Qwen3-0.6B ./Qwen3-64x --method granular --shards 8 --experts 64 --top-k 8
  headgate convert ./Qwen3-0.6B ./Qwen3-readme --method activations --text book.txt --experts 4
  headgate convert ./law ./code ./prose ./merged --top-k 2
""",
    ),
    "doctor": Command(
        ".doctor",
        "what this machine can run",
        "Says what this machine can run. With MODEL: what the swap takes of it, which calls really ran, how much "
        "memory it needs, and whether its files are whole. No weights are read.",
        """\
  headgate doctor
  headgate doctor ./OLMoE-1B-7B        the folder of a transformers model
""",
    ),
    "bench": Command(
        "..bench.gpu.report",
        "micro-benchmarks",
        "Micro-benchmarks beside whatever rivals are installed.",
        """\
  headgate bench moe --quick
  headgate bench --gpu-report
  headgate bench compile --chips sm_90 --shapes qwen3
""",
        BENCHMARKS,
    ),
}


def run(words: Sequence[str], handler: Handler | None = None) -> int:
    """Runs one command and returns its exit status. `handler`: the process's own, told when the work begins."""
    try:
        args = parser(words).parse_args(words)
        room = args.command.load()
        args.alone = handler is not None
        if handler is not None:
            handler.working = True
        status = room.run(args)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("headgate: interrupted", file=sys.stderr)
        return 130
    except Terminated:
        print("headgate: terminated", file=sys.stderr)
        return 143
    except BrokenPipeError:  # `headgate doctor | head`
        sys.stdout = None  # type: ignore[assignment]  # or the interpreter complains on its way out
        return 1
    except RecursionError as error:
        return _gave_up(error)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        print(f"headgate: {one_line(error)}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    except (MemoryError, OverflowError) as error:
        return _gave_up(error)


def parser(words: Sequence[str] | None = None) -> argparse.ArgumentParser:
    """The parser of the whole command line, with every option of every command.

    `words`: a command line; then only the commands that it names get their options. The options of the others would
    load torch and numpy, which `headgate --help` does without.
    """
    top = _Parser(
        prog="headgate",
        description="Mixture-of-Experts for PyTorch.",
        epilog=STATUSES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"headgate {__version__}")
    _add(top.add_subparsers(title="subcommands", metavar="SUBCOMMAND", required=True), COMMANDS, words)
    return top


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(_short(message))


def _add(kinds, commands: Mapping[str, Command], words: Sequence[str] | None) -> None:
    asked, rest = (None, None) if words is None else (words[:1], words[1:])
    for name, command in commands.items():
        sub = kinds.add_parser(
            name,
            help=command.help,
            description=command.about,
            epilog=f"examples:\n{command.examples}" if command.examples else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(command=command, alone=False)  # alone: the process is this command's own
        if asked is not None and name not in asked:
            continue
        if command.commands:
            _add(sub.add_subparsers(title="benchmarks", metavar="BENCHMARK"), command.commands, rest)
        if not rest or rest[0] not in command.commands:
            command.load().add_arguments(sub)


def _gave_up(error: Exception) -> int:
    """What no check has foreseen: numbers too large for the machine."""
    kind = "out of memory" if isinstance(error, MemoryError) else type(error).__name__
    print(f"headgate: gave up: {kind}: {one_line(error)}", file=sys.stderr)
    return 1


def one_line(error: Exception) -> str:
    """The message without line breaks; an error that says nothing is named."""
    return _short(" ".join(str(error).split())) or type(error).__name__


def _short(text: str) -> str:
    """A text whose middle is left out, where a value of the user's makes it long."""
    return text if len(text) <= 1000 else f"{text[:500]} [...] {text[-200:]}"
