"""Offline generation with experts on disk: all micro-batches' rows meet at the experts, or one batch runs at a time."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch

from ...moe.offload.batching import generate_offline
from ...moe.offload.offload import offload
from ...placement.traces.trace import Trace
from .model import Size, build


def measure(
    trace: Trace,
    size: Size,
    *,
    prompts: int = 32,
    length: int = 16,
    new: int = 8,
    micro_batch: int = 4,
    budget: float = 0.25,
    folder: Path | None = None,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Two ways to generate `new` tokens for `prompts` random prompts: "model", micro-batch after micro-batch, and
    "module", all under way at once. The model has as many experts and choices as the trace; its routers are its own.

    Of each `tokens_per_s`, `MB` read for a token, and its `hit_rate`; of "module" also the share of tokens that are
    those of "model", `same` (in half types rounding depends on how many rows an expert has). The page cache is kept
    out of it.
    """
    model = build(trace, size, seed)
    ids = list(torch.randint(2, 256, (prompts, length), generator=torch.Generator().manual_seed(seed)))
    found: dict[str, dict[str, float]] = {}
    made = {}
    with tempfile.TemporaryDirectory(dir=folder) as to:
        for name, at_once in (("model", 1), ("module", None)):
            with offload(model, budget, prefetch=None, disk=to, page_cache=False) as offloaded:
                generate_offline(model, ids[:1], micro_batch=1, max_new_tokens=1)  # started, and compiled
                before, begin = offloaded.stats(), time.perf_counter()
                made[name] = torch.stack(
                    generate_offline(
                        model, ids, micro_batch=micro_batch, at_once=at_once, max_new_tokens=new, do_sample=False
                    )
                )
                seconds, after = time.perf_counter() - begin, offloaded.stats()
            found[name] = {
                "tokens_per_s": prompts * new / seconds,
                "MB": (after.bytes - before.bytes) / (prompts * new) / 1e6,
                "hit_rate": (after.hits - before.hits) / (after.accesses - before.accesses),
            }
    found["module"]["same"] = (made["model"] == made["module"]).float().mean().item()
    return found
