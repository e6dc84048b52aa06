"""SGLang's expert distribution recorder (python/sglang/srt/eplb/expert_distribution.py).

A .pt file in SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR, by the mode:

per_token           one file a rank: {records: [...], last_physical_to_logical_map: int [L, P]}; a record is a forward
                    pass: topk_ids_of_layer int32 [L, T, 8], *physical* ids, -1 where nothing was chosen (fewer than 8
                    choices; a layer without experts), input_ids, positions, extend_seq_lens (None when decoding)
per_pass            the same with global_physical_count [L, P] in place of the ids: loads only
stat, stat_approx   one file: {rank, logical_count int32 or float [steps, L, E], ...}: loads only

Physical ids become logical ones by the recorded map, which is the last one: a recording over a rebalancing is not to be
trusted.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..statistics import Statistics
from ..trace import Trace
from .common import Found, Options, statistics_of, trace_of


def fits(found: Found) -> bool:
    return isinstance(found.content, dict) and (
        {"records", "last_physical_to_logical_map"} <= found.content.keys()
        or {"logical_count", "rank"} <= found.content.keys()
    )


def read(found: Found, options: Options) -> Trace | Statistics:
    content = found.content
    found.rule(fits(found), "content", "a dict with records or logical_count", type(content).__name__)
    if "logical_count" in content:
        counts = found.array(content["logical_count"], "logical_count", dims=3, kinds="iuf")
        _countable(found, counts, "logical_count")
        total = counts.sum(axis=0, dtype=np.float64 if counts.dtype.kind == "f" else np.int64)
        return statistics_of(found, total, "logical_count", options)
    logical = found.array(content["last_physical_to_logical_map"], "last_physical_to_logical_map", dims=2)
    found.rule(logical.size > 0, "last_physical_to_logical_map", "[L, P], not empty", list(logical.shape))
    found.rule(logical.min() >= 0, "last_physical_to_logical_map", "not negative", logical.min())
    physical = logical.shape[1]
    rule = f"below {physical}, for no expert is without a physical one"
    found.rule(logical.max() < physical, "last_physical_to_logical_map", rule, logical.max())
    records = content["records"]
    fine = isinstance(records, list) and bool(records) and all(isinstance(r, dict) for r in records)
    found.rule(fine, "records", "a list of dicts, at least one", type(records).__name__ if not records else records[:1])
    if all("topk_ids_of_layer" in record for record in records):
        return _per_token(found, records, logical, options)
    return _per_pass(found, records, logical, options)


def _per_token(found: Found, records: list[dict], logical: NDArray, options: Options) -> Trace:
    layers, physical = logical.shape
    chunks = []
    for number, record in enumerate(records):
        field = f"records[{number}].topk_ids_of_layer"
        ids = found.array(record["topk_ids_of_layer"], field, dims=3).astype(np.int64)
        found.rule(len(ids) == layers, field, f"[L={layers}, T, K]", list(ids.shape))
        found.rule(int(ids.min(initial=-1)) >= -1, field, "physical ids, or -1 for none", ids.min(initial=-1))
        top = int(ids.max(initial=-1))
        found.rule(top < physical, field, f"physical ids below {physical}", top)
        chunks.append(np.where(ids < 0, -1, logical[np.arange(layers)[:, None, None], ids]))
    widths = {chunk.shape[2] for chunk in chunks}
    found.rule(len(widths) == 1, "records", "of one K", sorted(widths))
    ids = np.concatenate(chunks, axis=1)
    chosen = ids >= 0
    used = np.flatnonzero(chosen.any(axis=(1, 2)))
    ids = ids[used][:, :, chosen.any(axis=(0, 1))]
    experts = int(logical.max()) + 1
    sequence = _sequences(found, records)
    return trace_of(found, ids, options, layers=used.tolist(), sequence=sequence, num_experts=experts)


def _sequences(found: Found, records: list[dict[str, Any]]) -> NDArray | None:
    """A sequence for each stretch that a prefill pass extends; None where passes decode: these do not say for whom."""
    lengths: list[int] = []
    for number, record in enumerate(records):
        extended = record.get("extend_seq_lens")
        if extended is None:
            return None
        tokens, field = np.shape(record["topk_ids_of_layer"])[1], f"records[{number}].extend_seq_lens"
        length = found.array(extended, field, dims=1)
        found.rule(int(length.min(initial=0)) >= 0, field, "not negative", length.min(initial=0))
        total = sum(length.tolist())  # numpy's sum may wrap
        found.rule(total == tokens, field, f"adding up to {tokens} tokens", total)
        lengths += length.tolist()
    return np.repeat(np.arange(len(lengths)), lengths)


def _per_pass(found: Found, records: list[dict], logical: NDArray, options: Options) -> Statistics:
    total = np.zeros(logical.shape, np.int64)
    for number, record in enumerate(records):
        field = f"records[{number}].global_physical_count"
        found.rule("global_physical_count" in record, field, "there", sorted(record))
        counts = found.array(record["global_physical_count"], field, dims=2)
        found.rule(counts.shape == logical.shape, field, f"[L, P]={list(logical.shape)}", list(counts.shape))
        _countable(found, counts, field)
        total += counts
    load = np.zeros((len(logical), int(logical.max()) + 1), np.int64)
    np.add.at(load, (np.arange(len(logical))[:, None], logical), total)
    return statistics_of(found, load, "global_physical_count", options)


def _countable(found: Found, counts: NDArray, field: str) -> None:
    """That no sum of them wraps."""
    total = float(counts.sum(dtype=np.float64))
    found.rule(counts.min(initial=0) >= 0 and total < 2**48, field, "not negative, below 2**48 in sum", total)
