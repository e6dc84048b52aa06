"""The row of a LoRA step around experts, on a small model."""

import pytest
import torch

from headgate.placement.traces.generate import generate

pytest.importorskip("transformers")
pytest.importorskip("peft")

from headgate.bench.offload.learning import SETTINGS, measure
from headgate.bench.offload.model import Size


def test_measure(tmp_path):
    trace = generate(layers=2, experts=8, top_k=2, tokens=10)
    size = Size(hidden=64, ffn=32, layers=2, dtype=torch.float32)
    found = measure(trace, size, length=12, rounds=2, folder=tmp_path)
    assert len(found) == 2 * len(SETTINGS)
    for name, figures in found.items():
        assert min(figures["wall_s"], figures["cpu_s"]) > 0
        assert (figures["MB"] > 0) == ("resident" not in name)
    assert not [*tmp_path.iterdir()]
