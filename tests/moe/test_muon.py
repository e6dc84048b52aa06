"""headgate.Muon: torch.optim.Muon on each expert's matrix, AdamW by a rule; the API of an optimizer. Many ranks:
ranks/test_muon_ranks.py."""

import copy

import pytest
import torch
from torch import nn

import headgate
from headgate.moe import muon
from headgate.moe.matrices import Stack

LAYER = dict(hidden_size=12, intermediate_size=10, num_experts=5, top_k=2)


def stepped(layer, optimizer, seed, tokens=64):
    torch.manual_seed(seed)
    optimizer.zero_grad()
    layer(torch.randn(tokens, 12)).square().sum().backward()
    optimizer.step()


def test_ranks_with_uneven_slices_exchange_the_same_pieces(monkeypatch):
    """Each piece is two all-to-alls: ranks that cut the list elsewhere would hang, or mix matrices up."""
    monkeypatch.setattr(muon, "TOGETHER", 40)
    pieces = []
    for mine in (4, 4, 1, 0):  # of 9 rows, as FSDP2 cuts them
        stack = Stack(ffn=1, group=object(), sizes=(4, 4, 1, 0))
        updates = [
            muon._Update(nn.Parameter(torch.empty(mine, n)), torch.empty(1, mine, n), stack) for n in (3, 6, 5, 2)
        ]
        pieces.append([[u.matrices.shape[2] for u in some] for some in muon._in_pieces(updates)])
    assert pieces == [[[3, 6], [5, 2]]] * 4


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("nesterov", [False, True])
def test_each_expert_s_matrix_as_torch_s_muon(split, nesterov, monkeypatch):
    """In bf16, as torch: three steps. And in fp32 with torch's iteration in fp64: to rounding."""
    same = {"lr": 0.03, "weight_decay": 0.2, "momentum": 0.8, "nesterov": nesterov, "adjust_lr_fn": "original"}
    for dtype, within in ((torch.bfloat16, 2e-2), (None, 5e-4)):
        layer = headgate.MoE(**LAYER)
        ours = headgate.Muon(layer, split_gate_up=split, ns_dtype=dtype, **same)
        if dtype is None:
            monkeypatch.setattr("torch.optim._muon._zeropower_via_newtonschulz", in_fp64)
        weights = layer.experts.w_gate_up, layer.experts.w_down
        blocks = (2 if split else 1, 1)

        def matrices(t, n):
            return list(t.detach().clone().unflatten(1, (n, -1)).flatten(0, 1))

        theirs = [nn.Parameter(m) for w, n in zip(weights, blocks, strict=True) for m in matrices(w, n)]
        before = [p.detach().clone() for p in theirs]
        other = torch.optim.Muon(theirs, **same)
        for step in range(3):
            stepped(layer, ours, step)
            grads = [m for w, n in zip(weights, blocks, strict=True) for m in matrices(w.grad, n)]
            for p, grad in zip(theirs, grads, strict=True):
                p.grad = grad
            other.step()
        found = [m for w, n in zip(weights, blocks, strict=True) for m in matrices(w, n)]
        for mine, p, was in zip(found, theirs, before, strict=True):
            assert (mine - p).abs().max() < within * (p - was).abs().max()


def in_fp64(grad, coefficients, steps, eps):
    from headgate.kernels import newton_schulz_reference

    return newton_schulz_reference(grad[None].double(), coefficients, steps, eps)[0]


def test_the_rule_says_who_gets_which_update():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.attention = nn.Embedding(20, 12), nn.Linear(12, 12)
            self.moe = headgate.MoE(**LAYER, bias=True, shared_intermediate_size=4, shared_gate=True)
            self.norm, self.lm_head, self.to_one = nn.LayerNorm(12), nn.Linear(12, 20, bias=False), nn.Linear(12, 1)
            self.tied, self.frozen = nn.Linear(12, 20, bias=False), nn.Linear(12, 12).requires_grad_(False)
            self.tied.weight = self.embed.weight

    model = Model()
    names = {p: n for n, p in model.named_parameters()}
    muon, adamw = headgate.Muon(model).param_groups
    assert {names[p] for p in muon["params"]} == {
        "attention.weight", "moe.experts.w_gate_up", "moe.experts.w_down", "moe.shared.ffn.w_gate_up",
        "moe.shared.ffn.w_down",
    }  # fmt: skip
    assert len(adamw["params"]) + len(muon["params"]) == sum(p.requires_grad for p in model.parameters())


def test_experts_of_transformers_where_they_are():
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = dict(hidden_size=16, intermediate_size=16, moe_intermediate_size=8, num_experts=4, num_experts_per_tok=2)
    sizes |= dict(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8, vocab_size=50)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes))
    names = {p: n.rpartition(".")[2] for n, p in model.named_parameters()}
    muon, adamw = headgate.Muon(model).param_groups
    block = model.model.layers[0]
    linear = [m.weight for m in block.self_attn.modules() if isinstance(m, nn.Linear)]
    assert set(muon["params"]) == {block.mlp.experts.gate_up_proj, block.mlp.experts.down_proj, *linear}
    assert {model.lm_head.weight, block.mlp.gate.weight} <= set(adamw["params"]), names


def test_the_others_as_torch_s_adamw():
    layer = headgate.MoE(**LAYER)
    ours = headgate.Muon(layer, lr=0.01, adamw={"lr": 0.02, "weight_decay": 0.3, "eps": 1e-6})
    p = nn.Parameter(layer.router.weight.detach().clone())
    theirs = torch.optim.AdamW([p], lr=0.02, weight_decay=0.3, eps=1e-6, betas=(0.9, 0.95))
    for step in range(3):
        stepped(layer, ours, step)
        p.grad = layer.router.weight.grad.clone()
        theirs.step()
    assert torch.equal(p, layer.router.weight)


def test_it_is_an_optimizer_of_torch():
    """state_dict, a copy, a scheduler: training goes on with the same bits."""
    layer = headgate.MoE(**LAYER)
    optimizer = headgate.Muon(layer, lr=0.01)
    stepped(layer, optimizer, 0)
    twin = copy.deepcopy(layer)
    other = headgate.Muon(twin, lr=0.5)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, o in ((layer, optimizer), (twin, other)):
        schedule = torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.5**step)
        for step in range(1, 3):
            stepped(one, o, step)
            schedule.step()
    assert [g["lr"] for g in optimizer.param_groups] == [0.0025, 0.0025]
    for a, b in zip(layer.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)
    both = copy.deepcopy((layer, optimizer))
    for one, o in ((layer, optimizer), both):
        stepped(one, o, 9)
    for a, b in zip(layer.parameters(), both[0].parameters(), strict=True):
        assert torch.equal(a, b)


def test_it_learns_and_goes_on_from_a_checkpoint(tmp_path):
    layer = headgate.MoE(**LAYER)
    optimizer = headgate.Muon(layer, lr=0.02)
    x = torch.randn(256, 12)
    target, losses = x.roll(1, 1).tanh(), []
    for step in range(40):
        optimizer.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step == 19:
            headgate.save_checkpoint(tmp_path / "c", layer, optimizer)
    assert losses[-1] < 0.7 * losses[0]
    other = headgate.MoE(**LAYER)
    again = headgate.Muon(other, lr=1.0)
    headgate.load_checkpoint(tmp_path / "c", other, again)
    for expected in losses[20:]:
        again.zero_grad()
        loss = (other(x) - target).square().mean()
        loss.backward()
        again.step()
        assert loss.item() == expected


def test_an_expert_without_a_token_only_decays():
    layer = headgate.MoE(**LAYER)
    before = layer.experts.w_down.detach().clone()
    optimizer = headgate.Muon(layer, lr=0.1, weight_decay=0.5)
    layer(torch.randn(1, 12)).sum().backward()
    idle = layer.last_routing.counts == 0
    optimizer.step()
    assert torch.equal(layer.experts.w_down[idle], before[idle] * (1 - 0.05))
    assert not torch.equal(layer.experts.w_down[~idle], before[~idle] * (1 - 0.05))


@pytest.mark.parametrize(
    ("error", "words", "given"),
    [
        (ValueError, "lr must be at least 0, got -1", {"lr": -1}),
        (ValueError, "momentum must be at least 0 and below 1, got 1.0", {"momentum": 1.0}),
        (TypeError, "weight_decay must be a number, got 'x'", {"weight_decay": "x"}),
        (ValueError, "ns_steps must be between 1 and 99, got 0", {"ns_steps": 0}),
        (ValueError, "ns_coefficients must be three numbers", {"ns_coefficients": (1.0,)}),
        (ValueError, "adjust_lr_fn must be .* got 'half'", {"adjust_lr_fn": "half"}),
        (ValueError, r"parameter 0 of group 0 must be \[out, in\] or .* got \(3,\)", {"params": [torch.ones(3)]}),
        (ValueError, 'must be "muon" or "adamw", got \'sgd\'', {"params": [{"params": [], "algorithm": "sgd"}]}),
        (TypeError, "model must be a torch.nn.Module or None, got int", {"params": [], "model": 3}),
        (TypeError, "newton_schulz: dtype must be", {"ns_dtype": torch.float16}),
    ],
)  # fmt: skip
def test_what_is_refused(error, words, given):
    params = given.pop("params", None) or [nn.Parameter(torch.ones(2, 2))]
    with pytest.raises(error, match=words):
        headgate.Muon(params, **given)


def test_a_sparse_gradient_is_refused_before_anything_moves():
    p, table = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(4, 2))
    optimizer = headgate.Muon([p, table])
    p.grad = torch.randn(2, 2)
    table.grad = torch.sparse_coo_tensor(torch.tensor([[1]]), torch.ones(1, 2), (4, 2))
    with pytest.raises(ValueError, match="gradients must be dense and real, got a sparse one, 1 of group 0"):
        optimizer.step()
    assert torch.equal(p, torch.ones(2, 2))
    assert not optimizer.state
