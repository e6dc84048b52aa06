"""A LoRA step on attention around frozen experts: a quarter of them in memory, the rest on disk; or all resident."""

from __future__ import annotations

import tempfile
import time
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...moe.offload.offload import offload
from ...placement.traces.trace import Trace
from .model import Size, build

SETTINGS: dict[str, dict[str, Any]] = {  # options of headgate.offload; resident: none; each plain and checkpointed
    "resident": {},
    "25 %, read through the page cache": {"budget": 0.25},
    "25 %, page cache kept out": {"budget": 0.25, "page_cache": False},
}


def measure(
    trace: Trace,
    size: Size,
    *,
    rows: int = 2,
    length: int = 256,
    rounds: int = 5,
    folder: Path | None = None,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Steps of PEFT's LoRA (r 8) on q_proj, v_proj and o_proj, `rows` texts of `length` tokens each; forward, backward
    and the optimizer. The model has as many experts and choices as the trace; its routers are its own.

    Of each setting, plain and checkpointed, the median `wall_s` and `cpu_s` (all threads') of a step, and the `MB` that
    it reads. Settings take turns, so that all meet the same neighbours. Raises ImportError without PEFT, AssertionError
    where adapters get other gradients than those around resident experts.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 256, (rounds + 1, rows, length), generator=generator)
    found: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory(dir=folder) as to, ExitStack() as opened:
        opened.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", FutureWarning)  # newer versions have another word for checkpointing
        ways: dict[str, tuple[Any, Any]] = {}
        for name, options in SETTINGS.items():
            model = _adapted(build(trace, size, seed), seed)
            offloaded = None
            if options:
                place = Path(to) / str(len(ways))
                offloaded = opened.enter_context(offload(model, disk=place, **options))
            ways[name] = model, offloaded
        for turn, batch in enumerate(ids):  # the first only warms up
            for checkpointed in (False, True):
                want: list[Tensor] = []
                for name, (model, offloaded) in ways.items():
                    seen, got = _step(model, offloaded, batch, checkpointed)
                    want = want or got
                    if not all(map(torch.equal, got, want)):
                        raise AssertionError(f"learning: gradients of {name} must be those around resident experts")
                    if turn:
                        kept = found.setdefault(f"{name}, checkpointed" if checkpointed else name, {})
                        for figure, value in seen.items():
                            kept.setdefault(figure, []).append(value)
        for _, offloaded in ways.values():
            if offloaded is not None:
                offloaded.close(restore=False)  # nobody asks for them any more
    return {name: {f: float(np.median(v)) for f, v in figures.items()} for name, figures in found.items()}


def _adapted(model: nn.Module, seed: int) -> Any:
    import peft

    torch.manual_seed(seed)
    config = peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj", "o_proj"], init_lora_weights=False)
    made: Any = peft.get_peft_model(model.train(), config)  # type: ignore[arg-type]  # a transformers model
    made.enable_input_require_grads()
    made.learned = [p for p in made.parameters() if p.requires_grad]
    made.optimizer = torch.optim.SGD(made.learned, lr=1e-3)
    return made


def _step(model: Any, offloaded: Any, ids: Tensor, checkpointed: bool) -> tuple[dict[str, float], list[Tensor]]:
    """(figures, gradients of the adapters)."""
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()
    before = offloaded.stats().bytes if offloaded else 0
    cpu, wall = time.process_time(), time.perf_counter()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    model.optimizer.step()
    figures = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
    figures["MB"] = ((offloaded.stats().bytes if offloaded else 0) - before) / 1e6
    grads = [p.grad.clone() for p in model.learned]
    model.optimizer.zero_grad()
    return figures, grads
