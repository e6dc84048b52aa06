"""routed_experts as vLLM returns them (--enable-return-routed-experts), logical ids of one sequence:

uint8, uint16, int16 or int32 [T - 1, L, K] over prompt and answer; the last token that was sampled is never run. Layers
count those without experts too, which stay 0 throughout and are left out here (where K > 1).

.npy            one sequence, `np.save(file, output.routed_experts)`
.npz            one array for each sequence, in the order of the file
.json, .jsonl   responses of /v1/completions, /v1/chat/completions or /inference/v1/generate, one, a list of them, or
                one a line: choices[i].routed_experts is the base64 text of an .npy file; nested lists are taken as well

Versions differ in where the prompt's part stands. Some write all of a sequence into its choice. Others (0.21) write
prompt_routed_experts [prompt, L, K] beside the choices, and the generated part alone into each: then a sequence is the
prompt and the first choice; further choices, which ran no prompt of their own, are sequences of generated tokens.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...careful import header
from ..trace import Trace
from .common import Found, Options, trace_of


def fits(found: Found) -> bool:
    content = found.content
    if isinstance(content, np.ndarray):
        return content.ndim == 3 and content.dtype.kind in "iu"
    arrays = list(content.values()) if isinstance(content, dict) else []
    if arrays and all(isinstance(a, np.ndarray) for a in arrays):
        return all(a.ndim == 3 and a.dtype.kind in "iu" for a in arrays)
    return any(True for _ in _responses(content))


def read(found: Found, options: Options) -> Trace:
    content = found.content
    if isinstance(content, np.ndarray):
        named = [("routed_experts", content)]
    elif isinstance(content, dict) and all(isinstance(a, np.ndarray) for a in content.values()):
        named = list(content.items())
    else:
        named = _joined(found, options)
    found.rule(bool(named), "routed_experts", "there in some choice", "none")
    sequences = [found.array(value, name, dims=3) for name, value in named]
    shapes = {s.shape[1:] for s in sequences}
    found.rule(len(shapes) == 1, "routed_experts", "of one [., L, K]", sorted(shapes))
    ids = np.concatenate(sequences).astype(np.int64).transpose(1, 0, 2)
    layers = np.arange(len(ids))
    if ids.shape[2] > 1:
        layers = np.flatnonzero(ids.any(axis=(1, 2)))
    sequence = np.repeat(np.arange(len(sequences)), [len(s) for s in sequences])
    return trace_of(found, ids[layers], options, layers=layers.tolist(), sequence=sequence)


def _joined(found: Found, options: Options) -> list[tuple[str, NDArray]]:
    """(where, ids [., L, K]) of each choice of each response, the prompt's part before its first choice. Tells how many
    tokens came from where."""
    named: list[tuple[str, NDArray]] = []
    tokens = {"in prompt_routed_experts": 0, "generated": 0, "of prompts and answers in one array": 0}
    bare = 0
    for where, response, choices in _responses(found.content):
        head = response.get("prompt_routed_experts")
        prompt = None if head is None else _decoded(found, f"{where}, prompt_routed_experts", head)
        for index, value in choices:
            name = f"{where}, choice {index}, routed_experts"
            ids = _decoded(found, name, value)
            answer = _answer_tokens(response)
            alone = prompt is not None if answer is None else len(ids) <= answer
            tokens["generated" if alone else "of prompts and answers in one array"] += len(ids)
            bare += alone and prompt is None
            if alone and prompt is not None:
                fits = prompt.ndim == ids.ndim and prompt.shape[1:] == ids.shape[1:]
                found.rule(fits, name, f"[., L, K] as its prompt's {list(prompt.shape)}", list(ids.shape))
                tokens["in prompt_routed_experts"] += len(prompt)
                ids = np.concatenate([prompt, ids])
            prompt = None if prompt is None else prompt[:0]
            named.append((name, ids))
        if prompt is not None and len(prompt):  # no choice took it: an answer of one token is never run
            tokens["in prompt_routed_experts"] += len(prompt)
            named.append((f"{where}, prompt_routed_experts", prompt))
    told = [f"{count:,} {what}" for what, count in tokens.items() if count]
    options.tell(f"tokens: {', '.join(told) or 'none'}")
    if bare:
        options.tell(f"{bare} choices have generated tokens alone: their prompts were not recorded")
    return named


def _answer_tokens(response: dict[str, Any]) -> int | None:
    """Tokens of the answer, by the response's own count; None where it has none, where several answers share it, or
    where a prompt of one token leaves open what an array holds."""
    usage = response.get("usage")
    prompt, answer = (
        (usage.get(n) for n in ("prompt_tokens", "completion_tokens")) if isinstance(usage, dict) else (0, 0)
    )
    counted = type(prompt) is int and type(answer) is int and prompt > 1 and answer > 0
    return answer if counted and len(_choices(response)) == 1 else None


def _responses(content: Any) -> Iterator[tuple[str, dict[str, Any], list[tuple[int, Any]]]]:
    """(where, response, [(index, routed_experts), ...]) of each response that has them, of prompt or choices."""
    for number, response in enumerate(content if isinstance(content, list) else [content]):
        if isinstance(response, dict):
            routed = [choice.get("routed_experts") for choice in _choices(response)]
            there = [(index, value) for index, value in enumerate(routed) if value is not None]
            if there or response.get("prompt_routed_experts") is not None:
                yield f"response {number}", response, there


def _choices(response: dict[str, Any]) -> list[dict[str, Any]]:
    choices = response.get("choices", [response])
    return [choice for choice in choices if isinstance(choice, dict)] if isinstance(choices, list) else []


def _decoded(found: Found, name: str, value: Any) -> NDArray:
    if not isinstance(value, str):
        return found.array(value, name, dims=3)
    with found.file.watched("an .npy file in base64", name):
        text = base64.b64decode(value, validate=True)
        stream = io.BytesIO(text)
        shape, fortran, dtype = header(found.file, stream, name, len(text))
        flat = np.frombuffer(text, dtype, offset=stream.tell())
        return flat.reshape(shape, order="F" if fortran else "C")
