"""torch.compile of a model that is offloaded: right from the first call, which nothing ran before."""

import pytest
import torch

import headgate


def test_a_model_is_compiled_before_any_eager_call(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.OlmoeConfig(
        vocab_size=32, hidden_size=16, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, max_position_embeddings=32,
    )  # fmt: skip
    model = transformers.OlmoeForCausalLM(config).eval()
    headgate.replace(model)
    ids = torch.randint(32, (2, 7))
    with torch.no_grad():
        want = model(ids).logits
        with headgate.offload(model, "50%", disk=tmp_path, prefetch="gate") as offloaded:
            compiled = torch.compile(model, backend="eager")
            assert torch.equal(compiled(ids).logits, want)
            assert torch.equal(compiled(ids).logits, want)
            assert offloaded.stats().loads > 0
