"""sensitivity: what rounding an expert's weights does to its outputs on its tokens; and the choice by it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import headgate
from headgate.kernels import quantize
from headgate.kernels.quantized import PER_BYTE
from headgate.moe.offload.calibration import Sensitivity, chosen, precisions, sensitivity

E, D, F = 4, 32, 64


class Small(nn.Module):
    """Two MoE layers on embedded ids; `seen` holds what the experts of the first were given."""

    def __init__(self, dtype=torch.float32) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, D, dtype=dtype)
        sizes = {"hidden_size": D, "intermediate_size": F, "num_experts": E, "top_k": 2}
        self.layers = nn.ModuleList(headgate.MoE(**sizes, dtype=dtype) for _ in range(2))
        self.seen: list = []
        self.layers[0].experts.register_forward_hook(lambda _m, args, _y: self.seen.append(args))

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = x + layer(x)
        return x


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Small()


def hooks(model):
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def by_hand(model, e, kind, keep=None):
    """(squared error, squared size, tokens) of expert e of the first layer, from what its experts were given."""
    x, routing = model.seen[-1]
    experts = model.layers[0].experts
    hit = routing.expert_ids == e
    if keep is not None:
        hit &= keep.flatten()[:, None]
    token, k = hit.nonzero(as_tuple=True)
    scale = routing.weights[token, k].double()[:, None]

    def out(w1, w2):
        gate, up = (x[token].double() @ w1.double().T).chunk(2, 1)
        return scale * ((torch.nn.functional.silu(gate) * up) @ w2.double().T)

    want = out(experts.w_gate_up[e], experts.w_down[e])
    rounded = (quantize(w[e : e + 1], kind).dequantize(torch.float64)[0] for w in (experts.w_gate_up, experts.w_down))
    return (out(*rounded) - want).square().sum().item(), want.square().sum().item(), len(token)


class TestMeasured:
    def test_every_expert_and_format_by_hand(self, model):
        formats = ("int8", "int4", "fp8")
        found = sensitivity(model, torch.randint(0, 50, (3, 9)), formats)
        assert found.layers == ("layers.0.experts", "layers.1.experts")
        assert (found.experts, found.formats) == ((E, E), formats)
        assert found.tokens.sum(1).tolist() == [54, 54]
        for e in range(E):
            for b, kind in enumerate(formats):
                wrong, size, tokens = by_hand(model, e, kind)
                assert found.tokens[0, e] == tokens
                assert found.size[0, e] == pytest.approx(size, rel=1e-5)
                assert found.error[0, e, b] == pytest.approx(wrong / size, rel=1e-2)
        assert (found.error[..., 0] < found.error[..., 1] / 50).all()  # 8 bits beside 4
        assert (found.error[..., 1] < 0.1).all()

    def test_batches_add_up_and_padding_does_not_count(self, model):
        ids, mask = torch.randint(0, 50, (2, 9)), torch.ones(2, 9, dtype=torch.long)
        mask[1, :5] = 0
        found = sensitivity(model, [{"input_ids": ids, "attention_mask": mask}, ids[:1]], ("int4",))
        assert found.tokens.sum(1).tolist() == [2 * (13 + 9)] * 2
        one = sensitivity(model, {"input_ids": ids, "attention_mask": mask}, ("int4",))
        for e in range(E):
            wrong, size, tokens = by_hand(model, e, "int4", mask.bool())
            assert one.tokens[0, e] == tokens
            if tokens:
                assert one.error[0, e, 0] == pytest.approx(wrong / size, rel=1e-2)

    def test_few_rows_are_spread_over_an_experts_own(self, model):
        ids = torch.randint(0, 50, (2, 40))
        whole, some = sensitivity(model, ids, ("int4",), max_rows=1000), sensitivity(model, ids, ("int4",), max_rows=8)
        assert some.tokens.max() == 8
        assert whole.tokens.sum() == 2 * 2 * 80
        np.testing.assert_allclose(some.error, whole.error, rtol=0.5)

    def test_bytes_are_those_of_the_stored_formats(self, model):
        found = sensitivity(model, torch.randint(0, 50, (1, 4)), tuple(PER_BYTE))
        experts = model.layers[0].experts
        for b, kind in enumerate(PER_BYTE):
            each = sum(quantize(w.detach(), kind).nbytes for w in (experts.w_gate_up, experts.w_down)) // E
            assert (found.nbytes[..., 1 + b] == each).all()
        assert (found.nbytes[..., 0] == 4 * 3 * D * F).all()

    def test_the_model_is_left_as_it_was_whatever_happens(self, model):
        model.train()
        before, kept = hooks(model), {n: p.clone() for n, p in model.named_parameters()}
        sensitivity(model, torch.randint(0, 50, (1, 4)))
        with pytest.raises(ValueError, match="attention_mask must have a place for each of 4 tokens, got 3"):
            sensitivity(model, {"input_ids": torch.zeros(1, 4).long(), "attention_mask": torch.ones(1, 3)})
        assert hooks(model) == before
        assert model.training
        assert all(torch.equal(p, kept[n]) for n, p in model.named_parameters())

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            (
                {"formats": ("int3",)},
                ValueError,
                "formats must be some of fp8, int8, int4, uint4, mxfp4, Q8_0, .*, each once, got",
            ),
            ({"formats": ()}, ValueError, "formats must be some of"),
            ({"max_rows": 0}, ValueError, "max_rows must be at least 1, got 0"),
            ({"model": nn.Linear(2, 2)}, ValueError, "model must have experts that run through Headgate, got none"),
            ({"batches": []}, ValueError, "batches must hold at least one token that reaches an expert, got none"),
        ],
    )
    def test_bad_input_is_named(self, model, options, error, message):
        given = {"model": model, "batches": torch.zeros(1, 2).long()} | options
        with pytest.raises(error, match=f"sensitivity: {message}"):
            sensitivity(given.pop("model"), given.pop("batches"), **given)


def made_up(**changes):
    """Two layers, of 3 and 2 experts, in int8 and int4; expert 2 of the first got no token."""
    given = dict(
        layers=("a", "b"), experts=(3, 2), formats=("int8", "int4"),
        error=np.array([[[1e-4, 1e-2], [1e-4, 4e-2], [0, 0]], [[1e-4, 1e-2], [1e-4, 1e-2], [0, 0]]]),
        size=np.array([[9.0, 1.0, 0.0], [5.0, 5.0, 0.0]]), tokens=np.array([[6, 4, 0], [5, 5, 0]]),
        nbytes=np.broadcast_to(np.array([64, 33, 17]), (2, 3, 3)).copy(),
    ) | changes  # fmt: skip
    return Sensitivity(**given)


class TestChosen:
    def test_by_bytes_and_by_error(self):
        found = made_up()
        assert precisions(found, budget="100%") == {"a": [None] * 3, "b": [None] * 2}
        few = precisions(found, budget=5 * 17)
        assert few == {"a": ["int4"] * 3, "b": ["int4"] * 2}
        # one step from int4 to int8, where error times share is largest: .0099 * 9/11 against .0099 / 2, .0399 / 11
        assert precisions(found, budget=5 * 17 + 16) == {"a": ["int8", "int4", "int4"], "b": ["int4"] * 2}
        tight, loose = (chosen(found, error=share) for share in (1e-4, 2e-2))
        assert tight.error <= 1e-4 < loose.error <= 2e-2
        assert loose.bytes < tight.bytes
        assert chosen(found, error=0.0).bytes == 5 * 64

    def test_an_expert_without_tokens_counts_as_one_choice_of_a_token(self):
        costs, share = made_up().costs()
        assert share[0].tolist() == pytest.approx([9 / 11, 1 / 11, 1 / 11])
        assert costs[0, 2].tolist() == pytest.approx([1e-4, (9e-2 + 4e-2) / 10])

    def test_bad_input_is_named(self):
        with pytest.raises(ValueError, match="precisions: one of budget and error must be given, got None and None"):
            precisions(made_up())
        with pytest.raises(ValueError, match="budget_bytes must be at least the least bytes there is, 85, got 84"):
            precisions(made_up(), budget=84)


def test_what_is_chosen_runs_offloaded(model, tmp_path):
    ids = torch.randint(0, 50, (2, 12))
    found = sensitivity(model, ids)
    formats = precisions(found, error=1e-4)
    assert {f for layer in formats.values() for f in layer} >= {"int8"}
    with torch.no_grad():
        want = model(ids)
        with headgate.offload(model, budget="100%", prefetch=None, disk=tmp_path, formats=formats):
            got = model(ids)
    assert ((got - want).square().sum() / want.square().sum()).item() < 1e-3
    assert not torch.equal(got, want)


@pytest.mark.parametrize("kind", ["olmoe", "gpt_oss"])
def test_transformers_models(kind):
    """Stacked weights as they are, and transposed ones with biases; padding in front."""
    transformers = pytest.importorskip("transformers")
    small = dict(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, num_experts_per_tok=2, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    if kind == "olmoe":
        model = transformers.OlmoeForCausalLM(transformers.OlmoeConfig(num_experts=4, **small))
    else:
        model = transformers.GptOssForCausalLM(transformers.GptOssConfig(num_local_experts=4, head_dim=8, **small))
    for p in model.parameters():
        if p.dim() == 3:
            nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    headgate.replace(model)
    ids, mask = torch.randint(2, 64, (2, 8)), torch.ones(2, 8, dtype=torch.long)
    mask[0, :3] = 0
    found = sensitivity(model, {"input_ids": ids, "attention_mask": mask})
    assert len(found.layers) == 2
    assert found.tokens.sum(1).tolist() == [26, 26]
    seen = found.tokens > 0
    assert (found.error[seen] > 0).all()
    assert (found.error[seen][:, 0] < found.error[seen][:, 1] / 20).all()
    assert (found.error[seen] < 0.1).all()
