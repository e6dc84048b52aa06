"""Odd command lines, each in a forked process: `python odd_lines.py FOLDER COUNT SEED` prints the faults, a line each.

Every command of `headgate.cli.parser()` has a small line that works (or is refused at the last of its checks, where the
work is long), and in it one option gets one odd value, is left out, comes twice or lacks its value. A fault is: a
traceback, a status that is not documented, a line that takes long, or memory that runs out instead of being counted.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
import os
import random
import resource
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from headgate import cli
from headgate.placement.traces.generate import like_deepseek_v2_lite
from headgate.placement.traces.trace import Trace

STATUSES = (0, 1, 2, 130, 143)
SECONDS = 20.0
MEMORY = 2**30  # beyond what the process has when it is forked
MOST_SAID = 4000  # characters on standard error, a usage included
VALUES = (
    *("0", "-1", "1", "2", "3.5", "nan", "inf", "-inf", "1e30", "1e-30", "9" * 31, "-" + "9" * 31, "2147483647"),
    *(
        "9" * 5000,
        "0x10",
        "1_000",
        "１２",
        "",
        " ",
        "x",
        "x" * 9999,
        "../x",
        "\udcff",
        "a\nb",
        "-",
        "--",
        "%",
        "25%",
    ),
    *("8GiB", "1e400GB", "None", "true", "[1]", "FOLDER", "FOLDER/", "MISSING", "MISSING/x.json", "FIFO", "FIFO.npz"),
    *("/dev/zero", "/dev/null", "/dev/full", "CLOSED", "EMPTY.npz", "EMPTY.json", "BROKEN.npz", "BROKEN.json"),
)
# What each line begins with. The demo and the training end at a text that is too short, ranks at a number that does not
# divide; what needs a GPU ends there.
LINES = {
    "": "--version",
    "demo": "--text SHORT --output demo --steps 1",
    "train": "--text SHORT --steps 1",
    "trace": "--generate --tokens 100 --output made.npz",
    "trace from": "--from served.json --format vllm --output made.npz",
    "trace show": "--show t.npz",
    "place": "t.npz --nodes 1 --gpus-per-node 2 --method linear --time-limit 0.5 --output p.json",
    "cache": "t.npz --slots 2 --policies lru",
    "generate": "config --prompt why --max-new-tokens 1",
    "serve": "config --port 0",
    "pack": "config out.experts",
    "convert": "dense made --experts 2",
    "doctor": "config",
    "bench": "--gpu-report --only sonic",
    "bench moe": "--shapes qwen3 --rivals --no-peak --memory-limit 0.3 --tokens 1 --dtypes fp32 --passes forward"
    " --budget 0.01 --threads 1",
    "bench optimizer": "--experts 3 --hidden 16 --intermediate 8 --threads 1 --budget 0.01",
    "bench quantized": "--rows 1 --experts 4 --top-k 2 --hidden 16 --intermediate 16 --threads 1 --budget 0.01",
    "bench dispatch": "--ranks 3 --ranks-per-node 1",
    "bench lora": "--forms headgate --tokens 1 --experts 3 --hidden 16 --intermediate 8 --top-k 1 --threads 1"
    " --budget 0.01 --no-peak",
    "bench overlap": "--tokens 1 --budget 0",
    "bench routers": "--text SHORT --only softmax --size small --steps 1 --seeds 0",
    "bench placement": "MISSING --rows crossings",
    "bench offload": "MISSING --rows recall",
    "bench links": "--ranks 8 --tokens 16",
    "bench compile": "--chips sm_1",
    "bench roofline": "--shapes qwen3 --tokens 1",
    "bench sweep": "--tokens 1 --limit 1",
}
LONG = {
    "bench dispatch": ("--overhead",),
    "bench moe": ("--unscaled", "--figures", "--budget", "--shapes"),
    "bench overlap": ("--budget",),
    "bench sweep": ("--device",),
}  # options that make them work for long
CONFIG = {
    "architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "vocab_size": 40, "hidden_size": 16,
    "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
    "num_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip


DENSE = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 40, "hidden_size": 16,
    "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
}  # fmt: skip


def prepare(folder: Path) -> None:
    """What the lines name."""
    os.chdir(folder)
    found = like_deepseek_v2_lite(200, 0)
    Trace(found.expert_ids[:5], found.num_experts).save("t.npz")
    Path("SHORT").write_text("too short")
    Path("FOLDER").mkdir()
    Path("config").mkdir()
    Path("config/config.json").write_text(json.dumps(CONFIG))
    Path("dense").mkdir()
    Path("dense/config.json").write_text(json.dumps(DENSE))
    layer = {"self_attn.q_proj": (16, 16), "self_attn.k_proj": (16, 16), "self_attn.v_proj": (16, 16)}
    layer |= {"self_attn.o_proj": (16, 16), "mlp.gate_proj": (8, 16), "mlp.up_proj": (8, 16), "mlp.down_proj": (16, 8)}
    layer |= {"input_layernorm": (16,), "post_attention_layernorm": (16,)}
    shapes = {"model.embed_tokens": (40, 16), "model.norm": (16,), "lm_head": (40, 16)}
    shapes |= {f"model.layers.0.{name}": shape for name, shape in layer.items()}
    weights = {f"{name}.weight": np.ones(shape, np.float32) for name, shape in shapes.items()}
    save_file(weights, "dense/model.safetensors", {"format": "pt"})
    for name in ("FIFO", "FIFO.npz"):
        os.mkfifo(name)
    Path("CLOSED").write_text("x")
    Path("CLOSED").chmod(0)
    for name in ("EMPTY.npz", "EMPTY.json"):
        Path(name).touch()
    for name in ("BROKEN.npz", "BROKEN.json"):
        Path(name).write_bytes(b"PK\x03\x04{[")


def parsers(parser: argparse.ArgumentParser, path: tuple[str, ...] = ()) -> Iterator[tuple[str, argparse.Action]]:
    """(command, one of its arguments) of the whole tree."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, sub in action.choices.items():
                yield from parsers(sub, (*path, name))
        yield " ".join(path), action


def lines(count: int, seed: int) -> list[tuple[str, list[str]]]:
    """Each argument of each command as often as any other, with values in turn."""
    draw = random.Random(seed)
    actions: dict[str, list[argparse.Action]] = {}
    for command, action in parsers(cli.parser()):
        actions.setdefault(command, []).append(action)
    cases = [(name, action) for name in LINES for action in actions[_command(name)]]
    cases = [(name, action) for name, action in cases if not {*action.option_strings} & {*LONG.get(name, ())}]
    found: list[tuple[str, list[str]]] = []
    while len(found) < count:
        draw.shuffle(cases)
        found += [(name, odd(name, action, draw)) for name, action in cases]
    return found[:count]


def _command(name: str) -> str:
    words = name.split()
    return " ".join(words[: 2 if words[:1] == ["bench"] else 1])


def odd(name: str, action: argparse.Action, draw: random.Random) -> list[str]:
    """A line of a command in which this argument is odd."""
    command, words = _command(name).split(), LINES[name].split()
    kind, option = draw.random(), (action.option_strings or [""])[-1]
    if isinstance(action, argparse._SubParsersAction):
        return [*command, draw.choice(VALUES)]
    if option:
        given = _without(words, option) if kind < 0.9 else words  # else it comes twice
        if action.nargs == 0:
            return [*command, *given, option, *([draw.choice(VALUES)] if kind < 0.2 else [])]
    else:
        given = words[1:] if words and not words[0].startswith("-") else words
    if kind > 0.97:  # left out, or without its value
        return [*command, *given, option] if option else [*command, *given]
    number = action.nargs if isinstance(action.nargs, int) else draw.choice((1, 1, 3)) if action.nargs else 1
    good = [str(c) for c in action.choices][:3] if action.choices else []
    values = [draw.choice((*good, *VALUES) if action.choices else VALUES) for _ in range(number)]
    return [*command, *given, option, *values] if option else [*command, *values, *given]


def _without(words: list[str], option: str) -> list[str]:
    if option not in words:
        return words
    at = words.index(option)
    end = at + 1
    while end < len(words) and not words[end].startswith("--"):
        end += 1
    return words[:at] + words[end:]


def fault(line: list[str]) -> str | None:
    """What is wrong with how the command takes it."""
    for name in ("out", "err"):
        Path(name).unlink(missing_ok=True)
    began, pid = time.monotonic(), os.fork()
    if not pid:
        _child(line)
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        if time.monotonic() - began > SECONDS:
            os.kill(pid, signal.SIGKILL)
            used = sum(os.wait4(pid, 0)[2][:2])
            said = Path("err").read_text(errors="replace")[-2000:]
            return f"no end after {SECONDS:.0f} s, {used:.1f} s of them at work: {said}"
        time.sleep(0.002)
    said = Path("err").read_text(errors="replace")
    if "Traceback" in said:
        return f"a traceback: {said.strip().splitlines()[-1][:300]}"
    if os.WIFSIGNALED(status) or os.WEXITSTATUS(status) not in STATUSES:
        return f"status {os.waitstatus_to_exitcode(status)}: {said[-300:]}"
    if "headgate: gave up: " in said or "can't allocate" in said:
        return f"refused too late: {said.strip()[-300:]}"
    if os.WEXITSTATUS(status) and not said.strip():
        return None if Path("out").read_text(errors="replace").strip() else "nothing said"
    if len(said) > MOST_SAID:
        return f"{len(said)} characters on standard error: {said[-300:]}"
    return None


def _child(line: list[str]) -> None:
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", errors="strict"), os.fdopen(2, "w", errors="backslashreplace")
    faulthandler.dump_traceback_later(SECONDS - 2, file=2)
    there = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (there + MEMORY, there + MEMORY))
    try:
        try:
            status = cli.main(line)
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else 99
        sys.stdout and sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
        status = 98
    finally:
        sys.stderr.flush()
        os._exit(status)


def main() -> None:
    folder, count, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    prepare(folder)
    warm: set[str] = set()
    for name, line in lines(count, seed):
        if name not in warm:  # what it loads and compiles is there when processes are forked
            warm.add(name)
            with suppress(SystemExit):
                cli.main([*_command(name).split(), *LINES[name].split()])
            gc.collect()  # or a forked process collects what belongs to threads that it does not have
            gc.freeze()
        why = fault(line)
        if why:
            shown = [word if len(word) < 80 else f"{word[:20]}...({len(word)})" for word in line]
            print("FAULT", json.dumps(shown), why.replace("\n", " "), flush=True)


if __name__ == "__main__":
    main()
