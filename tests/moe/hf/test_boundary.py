"""Odd calls of experts: off-rank ids, no tokens, dropped tokens, dropout inside, experts that are the identity."""

from __future__ import annotations

import pytest
import torch

import headgate


@pytest.mark.filterwarnings("ignore:headgate")
@pytest.mark.parametrize("name", ["olmoe", "gpt_oss", "nemotron_h", "step3p7", "muse_spark", "inkling2"])
class TestBoundary:
    """Odd calls of one experts module: three fused forms, an undecorated one, and two with matmuls around their own."""

    def modules(self, build, name):
        family = build(name)
        swapped = family.clone()
        path = headgate.replace(swapped).replaced[0]
        return family.model.get_submodule(path), swapped.get_submodule(path)

    def args(self, module, tokens=5):
        width = module.down_proj.shape[2 if getattr(module, "is_transposed", False) else 1]
        return torch.randn(tokens, width), torch.randint(0, 8, (tokens, 3)), torch.rand(tokens, 3)

    def test_off_rank_experts_count_as_none(self, build, name, assert_close):
        original, ours = self.modules(build, name)
        x, ids, w = self.args(ours)
        ids[0, 1] = ids[3, 0] = ids[3, 1] = ids[3, 2] = (
            8  # what expert-parallel transformers write for other ranks' experts
        )
        x.requires_grad_()
        w.requires_grad_()
        want = original(x, ids.clamp(max=7), w.masked_fill(ids == 8, 0))
        got = ours(x, ids, w)
        assert_close(got, want)
        assert got[3].eq(0).all()
        for a, b in zip(*(torch.autograd.grad(y.square().sum(), (x, w)) for y in (got, want)), strict=True):
            assert_close(a, b, scale=2)

    def test_no_token_one_token_and_one_expert_twice(self, build, name, assert_close):
        original, ours = self.modules(build, name)
        x, ids, w = self.args(ours)
        assert ours(x[:0], ids[:0], w[:0]).shape == (0, x.shape[1])
        ids[:, 1] = ids[:, 0]
        for part in (slice(1), slice(5)):
            assert_close(ours(x[part], ids[part], w[part]), original(x[part], ids[part], w[part]))

    def test_rows_of_any_strides_and_names_of_arguments(self, build, name, assert_close):
        original, ours = self.modules(build, name)
        x, ids, w = self.args(ours)
        x = x.T.contiguous().T
        ids = ids.T.contiguous().T.int()
        assert_close(ours(x, top_k_weights=w, top_k_index=ids), original(x, ids.long(), w))
        with pytest.raises(TypeError, match="experts: top_k_index and top_k_weights must both be given"):
            ours(x, ids)


class TestDictionaries:
    """Switch and NLLB draw dropout inside their experts: the same numbers must fall on the same rows."""

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize(
        ("name", "drops"),
        [
            ("switch_transformers", {"dropout_rate": 0.3, "router_jitter_noise": 0.1}),
            ("nllb_moe", {"moe_token_dropout": 0.2, "activation_dropout": 0.3, "dropout": 0.1}),
            ("nllb_moe", {"moe_token_dropout": 0.2, "second_expert_policy": "random"}),
        ],
    )
    def test_dropout(self, build, name, drops, training, assert_same_step):
        family = build(name, **drops)
        family.model.train(training)
        torch.manual_seed(5)
        want = family.step()
        headgate.replace(family.model)
        torch.manual_seed(5)
        assert_same_step(family.step(), want)

    def test_switch_drops_over_capacity(self, build, assert_close):
        module = build("switch_transformers").model.encoder.block[1].layer[-1].mlp.experts
        chosen = torch.nn.functional.one_hot(torch.tensor([0, 3, 3, 1, 7]), 8)
        chosen[2] = 0
        args = torch.randn(5, 32), chosen[:, None], torch.rand(5, 1)
        want = module(*args)
        headgate.replace(module)
        got = module(*args)
        assert_close(got, want)
        assert got[2].eq(0).all()


@pytest.mark.parametrize(("routed", "zero"), [(5, 0), (5, 3), (2, 6), (0, 4)])
def test_longcat_zero_experts(build, zero, routed, assert_close):
    family = build("longcat_flash", n_routed_experts=routed, zero_expert_num=zero)
    want = family.step()[0]
    headgate.replace(family.model)
    assert_close(family.step()[0], want)
