"""Module-based batching beside model-based batching, on a small model."""

import pytest
import torch

from headgate.placement.traces.generate import generate

pytest.importorskip("transformers")

from headgate.bench.offload.batching import measure
from headgate.bench.offload.model import Size


def test_measure(tmp_path):
    trace = generate(layers=2, experts=8, top_k=2, tokens=10)
    size = Size(hidden=64, ffn=32, layers=2, dtype=torch.float32)
    found = measure(trace, size, prompts=8, length=4, new=5, micro_batch=2, folder=tmp_path)
    assert found["module"]["same"] == 1
    assert found["module"]["MB"] < found["model"]["MB"]
    assert min(row["tokens_per_s"] for row in found.values()) > 0
    assert all(0 <= row["hit_rate"] < 1 for row in found.values())
