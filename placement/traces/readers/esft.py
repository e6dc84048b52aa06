"""ESFT's expert scores (deepseek-ai/ESFT, results/expert_scores/TASK/ or .../rank_N/).

A folder with a file expert_weights_N.txt for each MoE layer; a line is a sequence: the experts of its tokens, K after
K, separated by tabs, two tabs, and as many router weights. K is 6 (DeepSeek-V2-Lite) unless `top_k` says otherwise.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...careful import opened
from ..trace import Trace
from .common import Found, Options, trace_of

LAYER = re.compile(r"expert_weights_(\d+)\.txt")
TOP_K = 6


def fits(found: Found) -> bool:
    return bool(_files(found.path))


def read(found: Found, options: Options) -> Trace:
    files, top_k = _files(found.path), options.top_k or TOP_K
    found.rule(bool(files), "folder", "holding expert_weights_N.txt", "none")
    layers = [_layer(found, files[number], top_k) for number in sorted(files)]
    lengths = layers[0][2]
    for number, layer in zip(sorted(files), layers, strict=True):
        found.rule(layer[2] == lengths, f"lines of layer {number}", "of the same lengths in all layers", layer[2][:4])
    return trace_of(
        found,
        np.stack([ids for ids, _, _ in layers]),
        options,
        layers=sorted(files),
        sequence=np.repeat(np.arange(len(lengths)), lengths),
        weights=np.stack([weights for _, weights, _ in layers]),
    )


def _files(path: Path) -> dict[int, Path]:
    several = path.iterdir() if path.is_dir() else [path]
    return {int(match[1]): file for file in several if (match := LAYER.fullmatch(file.name))}


def _layer(found: Found, path: Path, top_k: int) -> tuple[NDArray[np.int64], NDArray[np.float64], list[int]]:
    """ids and weights [T, K] of one file, and the tokens of each sequence."""
    ids, weights, lengths = [], [], []
    with opened(path, "read") as file:
        lines = list(file.lines("replace"))
    for number, line in enumerate(lines, 1):
        field, (chosen, _, scored) = f"line {number} in {path.name}", line.partition("\t\t")
        with found.file.watched("ids, two tabs, weights", field):
            ids.append(np.array(chosen.split("\t"), np.int64))
            weights.append(np.array(scored.split("\t"), np.float64))
            found.rule(bool((np.abs(weights[-1]) <= 65504).all()), field, "of weights that float16 can hold", scored)
        counts = len(ids[-1]), len(weights[-1])
        found.rule(counts[0] == counts[1], field, "one weight for each id", f"{counts[0]} ids, {counts[1]} weights")
        found.rule(counts[0] % top_k == 0, field, f"a multiple of K={top_k} ids", counts[0])
        lengths.append(counts[0] // top_k)
    found.rule(bool(ids), f"lines in {path.name}", "at least one", 0)
    return np.concatenate(ids).reshape(-1, top_k), np.concatenate(weights).reshape(-1, top_k), lengths
