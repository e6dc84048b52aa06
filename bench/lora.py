"""`headgate bench lora`: a training step of LoRA on experts beside PEFT's `target_parameters`, same block, same run.

The block is transformers' own for Qwen3-MoE: router, top-k and experts. A step is forward and backward, with a gradient
of the block's input, as inside a model; the adapters' numbers are the same for everybody, and so must the gradients be.
Memory is taken in a process for each, as in memory.py: the high-water mark of a step above what was resident before.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from .arguments import number, output, positive, workers
from .hardware import headgate_form
from .machine import must_fit, need, processor
from .measure import CLOCKS, Contestant, interleave, threads
from .memory import _mark, _resident, measurable
from .output import write_json
from .screen import Screen
from .shapes import DTYPES, SHAPES

OURS = "headgate"
ABOUT = {
    OURS: "headgate.lora",
    "peft": "PEFT's target_parameters, transformers' grouped_mm (its default)",
    "peft eager": "PEFT's target_parameters, transformers' eager loop",
    "peft swapped": "PEFT's target_parameters after headgate.replace",
}
DEFAULT = (OURS, "peft", "peft swapped")
EXAMPLE = """examples:
  headgate bench lora --threads 1 --clock cpu
  headgate bench lora --tokens 512 2048 --rank 8 --json lora.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `headgate bench lora`."""
    parser.epilog = EXAMPLE
    add = parser.add_argument
    add("--tokens", nargs="+", type=positive, default=[2048], metavar="T", help="tokens a step (default: 2048)")
    add("--rank", type=positive, default=16, metavar="R", help="default: %(default)s")
    add("--dtype", choices=list(DTYPES), default="bf16", help="of the weights; adapters are fp32 (default: bf16)")
    add("--forms", nargs="+", choices=list(ABOUT), default=list(DEFAULT), metavar="FORM", help=f"of {', '.join(ABOUT)}")
    add("--experts", type=positive, default=SHAPES["qwen3"].experts, metavar="E", help="default: %(default)s")
    add("--hidden", type=positive, default=SHAPES["qwen3"].hidden, metavar="D", help="default: %(default)s")
    add("--intermediate", type=positive, default=SHAPES["qwen3"].intermediate, metavar="F", help="default: %(default)s")
    add("--top-k", type=positive, default=SHAPES["qwen3"].top_k, metavar="K", help="default: %(default)s")
    add("--threads", type=workers, metavar="N", help="for everybody (default: torch's choice)")
    add("--budget", type=number, default=40.0, metavar="S", help="seconds of sampling for each T (default: 40)")
    add("--clock", choices=tuple(CLOCKS), default="wall", help="cpu: the process's own time, with --threads 1 only")
    add("--no-peak", action="store_true", help="leave out the peak memory (a process for each)")
    add("--json", type=output, metavar="FILE", help="write the figures to FILE; - for standard output")


def run(args: argparse.Namespace) -> int:
    """Measures and prints; 0, or 1 where gradients differ."""
    need("bench lora", "peft", "dev")
    need("bench lora", "transformers", "hf")
    if args.top_k > args.experts:
        raise ValueError(f"bench lora: --top-k must be at most --experts, got {args.top_k} and {args.experts}")
    pairs = max(args.tokens) * args.top_k
    each = 3.0 * args.experts * args.hidden * args.intermediate
    must_fit("bench lora: sizes and --tokens", 4 * 4 * each + 16 * pairs * (args.hidden + args.intermediate))
    with threads("bench lora", args.threads, args.clock):
        found = measure(args, Screen(out=sys.stderr if args.json == "-" else sys.stdout))
    write_json(args.json, found)
    return int(any("differs" in f for row in found["tokens"].values() for f in row.values()))


def _sizes(args: argparse.Namespace) -> dict[str, Any]:
    names = ("experts", "hidden", "intermediate", "top_k", "rank", "dtype")
    return {name: getattr(args, name) for name in names}


def measure(args: argparse.Namespace, screen: Screen) -> dict[str, Any]:
    """tokens -> form -> seconds a step (median, least), tokens/s, and bytes above the weights."""
    sizes = _sizes(args)
    screen.say(f"{processor()}; {torch.get_num_threads()} threads; {headgate_form()}")
    said = f"D {args.hidden}, F {args.intermediate}, E {args.experts}, K {args.top_k}, rank {args.rank}, {args.dtype}"
    screen.say(f"Qwen3-MoE block, {said}; forward and backward; {args.clock} time")
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for tokens in args.tokens:
        rows[str(tokens)] = row = _times(args, sizes, tokens)
        for name in () if args.no_peak or measurable() else args.forms:
            row[name] |= peak(sizes | {"tokens": tokens, "form": name, "threads": torch.get_num_threads()})
    base = [name for name in args.forms if name != OURS]
    table = [("tokens", "form", "s a step", "least", "tokens/s", *(f"x {b}" for b in base), "peak MB")]
    for tokens, row in rows.items():
        for name, f in row.items():
            over = [f"{row[b]['median_s'] / f['median_s']:.2f}" for b in base]
            memory = f"{f['peak_bytes'] / 1e6:.0f}" if "peak_bytes" in f else ""
            line = (f"{f['median_s']:.3f}", f"{f['least_s']:.3f}", f"{f['tokens_per_s']:.0f}", *over, memory)
            table.append((tokens, name + (" (differs)" if "differs" in f else ""), *line))
    screen.table(table, left=(1,))
    for name in args.forms:
        screen.say(f"  {name}: {ABOUT[name]}")
    return {"sizes": sizes, "machine": processor(), "clock": args.clock, "tokens": rows}


def _times(args: argparse.Namespace, sizes: dict[str, Any], tokens: int) -> dict[str, dict[str, Any]]:
    contestants, seen = {}, {}
    for name in args.forms:
        step, gradients = built(name, sizes, tokens)
        begin = CLOCKS[args.clock]()
        step(0)
        contestants[name] = who = Contestant(step)
        who.first_s = CLOCKS[args.clock]() - begin
        seen[name] = gradients()
    interleave(contestants, args.budget, args.clock)
    found: dict[str, dict[str, Any]] = {}
    for name, who in contestants.items():
        s = sorted(who.samples_s)
        median = s[len(s) // 2]
        found[name] = {
            "median_s": median, "least_s": s[0], "samples_s": who.samples_s, "tokens_per_s": tokens / median
        }  # fmt: skip
        apart = [_apart(a, b) for a, b in zip(seen[name], seen[args.forms[0]], strict=True)]
        bound = 2e-2 if args.dtype == "bf16" else 2e-3
        if strange := [x for x in apart if not x < bound]:  # NaN is
            found[name]["differs"] = strange[0]
    return found


def _apart(a: Tensor, b: Tensor) -> float:
    """As a part of the size of the gradient."""
    return float((a.float() - b.float()).norm() / b.float().norm())


def built(name: str, sizes: dict[str, Any], tokens: int) -> tuple[Callable[[int], Any], Callable[[], list[Tensor]]]:
    """(a training step, the gradients that it left: of the input and of every adapter)."""
    block, dtype = _block(sizes, "eager" if name == "peft eager" else "grouped_mm"), DTYPES[sizes["dtype"]]
    model, rank = nn.ModuleDict({"mlp": block}), sizes["rank"]
    if name in (OURS, "peft swapped"):
        import_module("headgate").replace(model)
    if name == OURS:
        lora = import_module("headgate").lora(model, rank, alpha=rank)
        with tempfile.TemporaryDirectory() as folder:
            _put_on(nn.ModuleDict({"mlp": _block(sizes, "eager")}), rank)[0].save_pretrained(folder)
            lora.remove()
            lora = import_module("headgate").load_lora(model, folder)

        def factors() -> list[Tensor]:
            one = lora.layers["mlp.experts"]
            a = [p.grad.flatten(0, 1) for p in (one.a_gate_up, one.a_down)]  # type: ignore[union-attr, operator]
            b = [p.grad.permute(1, 2, 0).flatten(1) for p in (one.b_gate_up, one.b_down)]  # type: ignore[union-attr, operator]
            return [*a, *b]
    else:
        wrappers = _put_on(model, rank)[1]

        def factors() -> list[Tensor]:
            return [getattr(w, which).default.weight.grad for which in ("lora_A", "lora_B") for w in wrappers]

    torch.manual_seed(2)
    x = torch.randn(1, tokens, sizes["hidden"], dtype=dtype).requires_grad_()
    grad = torch.randn(1, tokens, sizes["hidden"], dtype=dtype)
    learning = [x, *(p for p in model.parameters() if p.requires_grad)]

    def step(_turn: int) -> None:
        for p in learning:
            p.grad = None
        y = model["mlp"](x)
        (y[0] if isinstance(y, tuple) else y).backward(grad)

    return step, lambda: [x.grad, *factors()]  # type: ignore[list-item]


def _put_on(model: nn.Module, rank: int) -> tuple[Any, list[Any]]:
    """(PEFT's model, its wrappers, gate and up first), with adapters of numbers that are the same on every call."""
    peft = import_module("peft")
    torch.manual_seed(1)
    names = ["experts.gate_up_proj", "experts.down_proj"]
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=[], target_parameters=names)
    made = peft.get_peft_model(model, config)
    wrappers = [m for m in made.modules() if hasattr(m, "parameter_name")]
    wrappers.sort(key=lambda w: names.index(f"experts.{w.parameter_name}"))
    with torch.no_grad():
        for w in wrappers:
            w.lora_B.default.weight.normal_(std=0.02)
    return made, wrappers


def _block(sizes: dict[str, Any], experts: str) -> nn.Module:
    of = import_module("transformers.models.qwen3_moe.modeling_qwen3_moe").Qwen3MoeSparseMoeBlock
    config = import_module("transformers.models.qwen3_moe.configuration_qwen3_moe").Qwen3MoeConfig(
        hidden_size=sizes["hidden"], moe_intermediate_size=sizes["intermediate"], num_experts=sizes["experts"],
        num_experts_per_tok=sizes["top_k"], hidden_act="silu", norm_topk_prob=True,
    )  # fmt: skip
    config._experts_implementation = experts
    torch.manual_seed(0)
    block = of(config).to(DTYPES[sizes["dtype"]])
    with torch.no_grad():
        for p in block.parameters():
            p.normal_(std=p.shape[-1] ** -0.5)
    return block


def peak(job: dict[str, Any], timeout_s: float = 400) -> dict[str, int]:
    """In a fresh process, of the second step: peak_bytes above what was resident, with gradients of the first gone."""
    env = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "MALLOC_MMAP_MAX_": "1000000",
    }
    command = [sys.executable, "-P", "-m", "headgate.bench.lora", json.dumps(job)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout_s)
    if done.returncode:
        raise RuntimeError(f"memory of {job['form']}: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _child(job: dict[str, Any]) -> dict[str, int]:
    torch.set_num_threads(job["threads"])
    step, _ = built(job["form"], job, job["tokens"])
    step(0)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    start = _mark()
    step(0)
    return {"peak_bytes": _resident("VmHWM") - start}


if __name__ == "__main__":
    print(json.dumps(_child(json.loads(sys.argv[1]))))
