"""What llama.cpp and accelerate do with the same model, the same tokens and the same memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .files import cached_share, drop
from .held import Held, let_go, spans_of
from .jobs import PROMPT, TOKENS, WARM, _steps, timed, tokens_of
from .processes import memory_of

FTYPES = {"Q4_K": 14, "Q4_0": 2, "Q8_0": 7}  # llama.cpp's numbers of file types
_REST = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp.gate")
_AT_ONCE = 4  # prompt tokens between two looks at a rival's memory


def llama(
    path: str,
    vocab: int,
    experts: int,
    threads: int,
    *,
    rest: int = 0,
    memory: int | None = None,
    routes: str | None = None,
    top_k: int | None = None,
    prompt: int = PROMPT,
    warm: int = WARM,
    tokens: int = TOKENS,
) -> dict[str, Any]:
    """A GGUF file mapped by llama.cpp; with `memory`, held to so many bytes, of which `rest` are no experts'. `routes`:
    the experts of every token, as `jobs.decode` wrote them."""
    from llama_cpp import Llama

    more = {} if top_k is None else {"kv_overrides": {"qwen3moe.expert_used_count": top_k}}
    held = routing = None
    file = Path(path)
    spans = spans_of(file, experts) if memory is not None else {}
    model = Llama(path, n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False, **more)
    if memory is not None and routes is not None:
        routing = np.load(routes)
        held = Held(file, spans, max(0, memory - rest - memory_of()["RssAnon"]))
    ids = tokens_of(vocab, prompt + warm + tokens)
    at = 0

    def step(some: Sequence[int]) -> int:
        nonlocal at
        model.eval(some)
        at += len(some)
        logits = np.ctypeslib.as_array(model._ctx.get_logits_ith(-1), (vocab,))
        return int(logits.argmax())

    def forget(count: int = 1) -> None:
        if held is not None and routing is not None:
            held.used(routing[at - count : at].transpose(1, 0, 2))

    some = _AT_ONCE if held is not None else prompt
    for first in range(0, prompt, some):
        step(ids[first : min(prompt, first + some)])
        forget(min(some, prompt - first))
    found = timed(step, ids[prompt:], warm, forget)
    if held is not None:
        found |= {"experts_bytes": held.most_bytes, "over_bytes": held.over_bytes(rest)}
        held.close()
    return found


def requantize(path: str, output: str, format: str, threads: int) -> dict[str, Any]:
    """Every matrix of a GGUF file in a format of few bits, by llama.cpp itself."""
    import ctypes

    import llama_cpp

    how = llama_cpp.llama_model_quantize_default_params()
    how.nthread, how.ftype, how.pure = threads, FTYPES[format], True
    status = llama_cpp.llama_model_quantize(path.encode(), output.encode(), ctypes.byref(how))
    if status:
        raise RuntimeError(f"llama.cpp could not write {output}: {status}")
    return {}


def accelerate(
    folder: str,
    offload: str,
    vocab: int,
    threads: int,
    *,
    layers: int,
    prompt: int = PROMPT,
    warm: int = 1,
    tokens: int = 3,
) -> dict[str, Any]:
    """The experts on disk by accelerate, everything else in memory. Its files are put out of the page cache after every
    token: it maps them, and what a page cache of the same memory would have kept is read once more."""
    import torch
    from transformers import AutoModelForCausalLM

    begin = time.perf_counter()
    where = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    for n in range(layers):
        where |= {f"model.layers.{n}.{name}": "cpu" for name in _REST} | {f"model.layers.{n}.mlp.experts": "disk"}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map=where, offload_folder=offload)
    load_s = time.perf_counter() - begin
    files = [file for file in Path(offload).rglob("*") if file.is_file() and file.stat().st_size]
    ids = tokens_of(vocab, prompt + warm + tokens)
    drop(files)  # what was just written has to be on the disk first
    step, stayed = _steps(model), [0.0]

    def forget() -> None:
        for each in files:
            let_go(each)
        stayed.append(cached_share(files))

    with torch.inference_mode():
        step(ids[:prompt])
        forget()
        return timed(step, ids[prompt:], warm, forget) | {"load_s": load_s, "stayed": max(stayed)}


RIVALS: Mapping[str, Callable[..., dict[str, Any]]] = {
    "llama": llama,
    "requantize": requantize,
    "accelerate": accelerate,
}
