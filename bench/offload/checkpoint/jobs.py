"""What Headgate does in a process of its own: from a folder to the first token, and token after token."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...light import import_engine, import_models
from .processes import memory_of, traffic

PROMPT, WARM, TOKENS = 68, 16, 48
Job = Callable[..., dict[str, Any]]


def tokens_of(vocab: int, count: int, seed: int = 0) -> list[int]:
    """Ids drawn by Zipf's law, as words are: what comes again finds its experts again."""
    chance = 1 / np.arange(1, vocab + 1)
    rng = np.random.default_rng(seed)
    return rng.permutation(vocab)[rng.choice(vocab, count, p=chance / chance.sum())].tolist()


def first(folder: str, budget: str, begun: float, vocab: int, prompt: int = PROMPT) -> dict[str, Any]:
    """headgate.load and the first token of an answer, in a process that imports as `headgate generate` does. Seconds
    since it was started, `begun`."""
    import_models()
    import_engine()
    from transformers import Qwen3MoeForCausalLM  # noqa: F401  # what it imports counts as imports

    from ....moe.offload.load import load

    ids = torch.tensor([tokens_of(vocab, prompt)])
    ready, start = time.time(), memory_of()
    model: Any
    model, offloaded = load(folder, budget)
    loaded = time.time()
    with offloaded, torch.inference_mode():
        out = model.generate(ids, max_new_tokens=1, do_sample=False)
    first_s, moved, memory, stats = time.time() - begun, traffic(), memory_of(), offloaded.stats()
    return {
        "first_s": first_s,
        "imports_s": ready - begun,
        "load_s": loaded - ready,
        "imports_bytes": start["VmRSS"],
        "cpu_s": time.process_time(),
        "wait_s": stats.wait_s,
        "read_bytes": moved["read_bytes"],
        "written_bytes": moved["write_bytes"],
        "slots_bytes": offloaded.engine.arena.nbytes,
        "anonymous_bytes": memory["RssAnon"],
        "token": int(out[0, -1]),
    }


def decode(
    folder: str,
    budget: str | None,
    vocab: int,
    *,
    page_cache: bool = True,
    formats: str | None = None,
    disk: str | None = None,
    top_k: int | None = None,
    routes: str | None = None,
    prompt: int = PROMPT,
    warm: int = WARM,
    tokens: int = TOKENS,
) -> dict[str, Any]:
    """A prompt, `warm` tokens, and `tokens` more that are measured. `budget` None: all experts in memory, without the
    engine. `routes`: a file for the experts of every token, int32 [tokens, L, K], in order."""
    from ....moe.offload.load import load

    model, offloaded = load(folder, budget or "10%", disk=disk, formats=formats, page_cache=page_cache)
    if top_k is not None:
        _choose(model, top_k)
    if budget is None:
        offloaded.close(restore=True)
    seen = _watch(model) if routes else []
    ids = tokens_of(vocab, prompt + warm + tokens)
    step = _steps(model)
    with torch.inference_mode():
        step(ids[:prompt])
        found = timed(step, ids[prompt:], warm)
    if routes:
        np.save(routes, np.concatenate([np.stack(each, 1) for each in _by_step(seen, model)]))
    stats = offloaded.stats()
    found |= {"hit_rate": stats.hits / max(1, stats.accesses), "wait_s": stats.wait_s}
    if budget is not None:
        offloaded.close()
    return found


def timed(
    step: Callable[[Sequence[int]], int],
    ids: Sequence[int],
    warm: int,
    between: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Seconds, processor seconds and bytes from the disk for a token, after `warm` of them; `between` tokens the clocks
    stand. `answers`: what the model says after each."""
    answers, spent = [], np.zeros(3)
    for at, each in enumerate(ids):
        before = _clocks()
        answers.append(step([each]))
        if at >= warm:
            spent += _clocks() - before
        between()
    cpu, wall, read = (spent / (len(ids) - warm)).tolist()
    memory = {"peak_bytes": memory_of()["VmHWM"], "anonymous_bytes": memory_of()["RssAnon"]}
    return {"cpu_s": cpu, "wall_s": wall, "read_bytes": read, **memory, "answers": answers}


def _clocks() -> np.ndarray:
    return np.array([time.process_time(), time.perf_counter(), traffic()["read_bytes"]])


def _steps(model: Any) -> Callable[[Sequence[int]], int]:
    """A model with its cache: some tokens in, the most likely next one out."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)

    def step(ids: Sequence[int]) -> int:
        out = model(input_ids=torch.tensor([ids]), past_key_values=cache, use_cache=True, logits_to_keep=1)
        return int(out.logits[0, -1].argmax())

    return step


def _routers(model: Any) -> list[Any]:
    return [module for module in model.modules() if type(module).__name__ == "Qwen3MoeTopKRouter"]


def _choose(model: Any, top_k: int) -> None:
    for router in _routers(model):
        router.top_k = top_k


def _watch(model: Any) -> list[Tensor]:
    """Gets what the routers choose, layer after layer and step after step."""
    seen: list[Tensor] = []
    for router in _routers(model):
        router.register_forward_hook(lambda _module, _args, out: seen.append(out[2].reshape(-1, out[2].shape[-1])))
    return seen


def _by_step(seen: Sequence[Tensor], model: Any) -> list[list[np.ndarray]]:
    layers = len(_routers(model))
    return [[t.to(torch.int32).numpy() for t in seen[at : at + layers]] for at in range(0, len(seen), layers)]


JOBS: Mapping[str, Job] = {"first": first, "decode": decode}


def main(told: Mapping[str, Any]) -> dict[str, Any]:
    """One job by its name; `threads`: of torch."""
    options = dict(told)
    name, threads, begun = options.pop("job"), options.pop("threads", None), options.pop("begun")
    if threads:
        torch.set_num_threads(threads)
    if name == "first":
        options["begun"] = begun
    if name in JOBS:
        return JOBS[name](**options)
    from .rivals import RIVALS

    return RIVALS[name](**options, threads=threads or torch.get_num_threads())


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
