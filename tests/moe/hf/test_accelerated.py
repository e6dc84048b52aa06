"""Models that accelerate keeps on the host or on disk are run, recorded and measured like others."""

import copy

import numpy as np
import pytest
import torch

import headgate
from headgate.moe.hf.accelerated import device_of
from headgate.moe.offload import sensitivity

accelerate = pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def plain():
    config = transformers.OlmoeConfig(
        vocab_size=32, hidden_size=16, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, max_position_embeddings=32,
    )  # fmt: skip
    model = transformers.OlmoeForCausalLM(config).eval()
    headgate.replace(model)
    return model


@pytest.mark.parametrize("where", ["host", "disk"])
def test_a_model_placed_by_accelerate(where, plain, tmp_path):
    ids = torch.randint(32, (2, 7))
    model = copy.deepcopy(plain)
    headgate.restore(model)
    if where == "host":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        accelerate.disk_offload(model, tmp_path / "weights", execution_device=torch.device("cpu"))
    assert next(model.parameters()).is_meta
    headgate.replace(model)
    assert device_of(model) == torch.device("cpu")
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, plain(ids).logits)
    found, want = headgate.record(model, ids, weights=True), headgate.record(plain, ids, weights=True)
    np.testing.assert_array_equal(found.expert_ids, want.expert_ids)
    measured, expected = sensitivity(model, ids), sensitivity(plain, ids)
    np.testing.assert_array_equal(measured.tokens, expected.tokens)
    np.testing.assert_allclose(measured.error, expected.error)
    assert next(model.parameters()).is_meta  # as it was
    with pytest.raises(ValueError, match=r"offload: model must have its weights in memory, got .* accelerate keeps"):
        headgate.offload(model, "50%", disk=tmp_path)
    assert not (tmp_path / "experts.safetensors").exists()
