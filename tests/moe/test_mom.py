"""headgate.MoM against a loop over tokens and memories; prefill and decode; padding; gradients; bad input."""

import pytest
import torch
import torch.nn.functional as F

import headgate

F64 = torch.float64


def make(**options):
    given = dict(hidden_size=8, num_memories=4, top_k=2, num_heads=2, key_size=3, value_size=5, dtype=F64, chunk=4)
    return headgate.MoM(**{**given, **options})


def by_token(layer, x, state=None, mask=None):
    """The layer as its docstring says it: token by token, memory by memory."""
    heads, dk, dv, m = layer.num_heads, layer.key_size, layer.value_size, layer.num_memories
    shape = (len(x), layer.num_states, heads, dk, dv)
    states = [list(s.unbind(0)) for s in (torch.zeros(shape, dtype=x.dtype) if state is None else state).unbind(0)]
    out = []
    for b, sequence in enumerate(x):
        for t, token in enumerate(sequence):
            if mask is not None and not mask[b, t]:
                out.append(torch.zeros_like(token))
                continue
            chosen = layer.router(token[None])
            pairs = list(zip(chosen.expert_ids[0].tolist(), chosen.weights[0], strict=True))
            pairs += [(m, torch.tensor(1.0))] if layer.shared else []
            q, mixed = layer.query(token).view(heads, dk), 0
            for e, weight in pairs:
                k, v, gates = (layer.w_memories[e] @ token).view(heads, -1).split([dk, dv, layer.w_memories.shape[1] // heads - dk - dv], 1)  # fmt: skip # noqa: E501
                s, query = states[b][e], q
                if layer.rule != "linear":
                    s = s * (-layer.decay_rate[e].exp() * F.softplus(gates[:, 0] + layer.decay_bias[e])).exp()[:, None, None]  # fmt: skip # noqa: E501
                if layer.rule == "gated_delta":
                    k, query = F.normalize(k, dim=1), F.normalize(q, dim=1)
                    v = gates[:, 1:].sigmoid() * (v - torch.einsum("hkv,hk->hv", s, k))
                states[b][e] = s = s + k[:, :, None] * v[:, None, :]
                mixed = mixed + weight * torch.einsum("hkv,hk->hv", s, query * dk**-0.5)
            y = layer.norm(mixed).flatten()
            out.append(layer.out(y if layer.gate is None else y * F.silu(layer.gate(token))))
    return torch.stack(out).view_as(x), torch.stack([torch.stack(s) for s in states])


@pytest.mark.parametrize("rule", ["linear", "gated", "gated_delta"])
@pytest.mark.parametrize("shared", [False, True])
def test_equals_the_loop_over_tokens(rule, shared, assert_close):
    layer = make(rule=rule, shared=shared, gated_output=shared)
    x = torch.randn(3, 11, 8, dtype=F64)
    begin = torch.randn(3, layer.num_states, 2, 3, 5, dtype=F64)
    for state in (None, begin):
        (y, after), (expected, states) = layer(x, state=state), by_token(layer, x, state)
        assert_close(y, expected)
        assert_close(after, states)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    g = torch.randn_like(y)
    pairs = (torch.autograd.grad(t, parameters, g, allow_unused=True) for t in (y, expected))
    for name, a, b in zip(names, *pairs, strict=True):
        assert_close(a, b, name=name, scale=10)


@pytest.mark.parametrize("rule", ["linear", "gated", "gated_delta"])
def test_prefill_equals_decode_and_any_cut_of_the_sequence(rule, assert_close):
    layer = make(rule=rule)
    x = torch.randn(2, 13, 8, dtype=F64)
    y, last = layer(x)
    for lengths in ([1] * 13, [5, 1, 7], [13]):
        state, parts = None, []
        for piece in x.split(lengths, 1):
            part, state = layer(piece, state=state)
            parts.append(part)
        assert_close(torch.cat(parts, 1), y)
        assert_close(state, last)


def test_one_memory_is_the_plain_layer(assert_close):
    """M = 1, K = 1, nothing shared: Gated DeltaNet; its one state sees every token with weight 1."""
    layer = make(num_memories=1, top_k=1, shared=False)
    x = torch.randn(2, 9, 8, dtype=F64)
    y, state = layer(x)
    from headgate.kernels import linear_memory_reference

    parts = (x.reshape(-1, 8) @ layer.w_memories[0].T).unflatten(1, (2, -1))
    k, v, gates = parts.split([3, 5, 2], 2)
    decay = -layer.decay_rate.exp() * F.softplus(gates[..., 0] + layer.decay_bias)
    q = F.normalize(layer.query(x.reshape(-1, 8)).unflatten(1, (2, 3)), dim=2) * 3**-0.5
    offsets = torch.tensor([0, 9, 18])
    begin = torch.zeros(2, 2, 3, 5, dtype=F64)
    beta = gates[..., 1].sigmoid()
    o, after = linear_memory_reference(q, F.normalize(k, dim=2), v, decay, beta, offsets, begin)
    expected = layer.out(layer.norm(o).flatten(1) * F.silu(layer.gate(x.reshape(-1, 8))))
    assert_close(y, expected.view_as(y))
    assert_close(state[:, 0], after)
    both = make(num_memories=1, top_k=1, shared=True)
    assert both(x)[1].shape[1] == 2


def test_a_memory_sees_only_the_tokens_that_chose_it(assert_close):
    layer = make(shared=False)
    x = torch.randn(1, 12, 8, dtype=F64)
    _, state = layer(x)
    ids = layer.last_routing.expert_ids
    other = x.clone()
    other[0, 3] = torch.randn(8, dtype=F64)
    _, changed = layer(other)
    touched = set(ids[3].tolist()) | set(layer.last_routing.expert_ids[3].tolist())
    for m in range(4):
        assert torch.equal(state[0, m], changed[0, m]) == (m not in touched)
    assert 1 < len(touched) < 4


def test_later_tokens_and_other_sequences_change_nothing(assert_close):
    layer = make()
    x = torch.randn(2, 10, 8, dtype=F64)
    y, _ = layer(x)
    other = x.clone()
    other[0, 6:], other[1] = 7.0, -1.0
    assert_close(layer(other)[0][0, :6], y[0, :6])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_written_nowhere(side, assert_close):
    layer = make(load_balancing_coef=0.1)
    tokens = [torch.randn(1, n, 8, dtype=F64) for n in (4, 7, 0)]
    x, mask = torch.full((3, 7, 8), torch.nan, dtype=F64), torch.zeros(3, 7, dtype=torch.bool)
    for b, t in enumerate(tokens):
        n = t.shape[1]
        at = slice(7 - n, 7) if side == "left" else slice(0, n)
        x[b, at], mask[b, at] = t[0], True
    y, state = layer(x, mask)
    assert (y[~mask] == 0).all()
    assert layer.last_routing.counts.sum() == 2 * 11
    for b, t in enumerate(tokens):
        alone, after = layer(t)
        assert_close(y[b][mask[b]], alone[0])
        assert_close(state[b], after[0])
    layer(x, mask)[0].sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_gradients_against_finite_differences():
    layer = make(num_memories=3, hidden_size=4, num_heads=1)
    x = torch.randn(1, 5, 4, dtype=F64, requires_grad=True)
    state = torch.randn(1, 4, 1, 3, 5, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, s: layer(x, state=s), (x, state))


def test_the_balancing_loss_evens_the_load():
    layer = make(load_balancing_coef=1.0, dtype=torch.float32)
    with torch.no_grad():
        layer.router.weight[0] += 0.3
    x = torch.randn(8, 32, 8) + 1
    optimizer = torch.optim.Adam(layer.router.parameters(), lr=0.05)
    loads = []
    for _ in range(40):
        optimizer.zero_grad()
        (layer(x)[0] * 0).sum().backward()
        optimizer.step()
        loads.append(layer.last_routing.counts.max().item())
    assert loads[-1] < 0.75 * loads[0]
    assert set(layer.aux_losses) == {"load_balancing"}


def test_other_routers_odd_shapes_and_bf16():
    for router in ("sigmoid", "cosine", "top_p"):
        make(router=router)(torch.randn(2, 5, 8, dtype=F64))[0].sum().backward()
    layer = make(dtype=None)
    for shape in ((0, 3, 8), (2, 0, 8)):
        y, state = layer(torch.randn(shape))
        assert y.shape == shape
        assert state.shape == (shape[0], 5, 2, 3, 5)
    x = torch.randn(2, 9, 8)
    expected, _ = layer(x)
    y, state = layer.bfloat16()(x.bfloat16())
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert (y.float() - expected).square().mean() < 0.1 * expected.square().mean()


@pytest.mark.parametrize(
    ("error", "words", "given"),
    [
        (ValueError, r"top_k must be at most num_memories \(4\), got 5", {"top_k": 5}),
        (ValueError, "rule must be one of linear, gated, gated_delta, got 'rnn'", {"rule": "rnn"}),
        (TypeError, "num_memories must be an integer, got 2.5", {"num_memories": 2.5}),
        (ValueError, "chunk must be at least 1, got 0", {"chunk": 0}),
        (
            ValueError,
            "router must choose by x alone, got a RecurrentRouter that carries_state",
            {"router": "recurrent"},
        ),
        (ValueError, "router must not look at later tokens, got a ExpertChoiceRouter", {"router": "expert_choice"}),
    ],
)
def test_what_is_refused(error, words, given):
    with pytest.raises(error, match=f"MoM: {words}"):
        make(**given)


def test_what_a_forward_refuses():
    layer = make()
    with pytest.raises(ValueError, match=r"x must be \[B, T, 8\], got \(3, 8\)"):
        layer(torch.randn(3, 8))
    x = torch.randn(2, 3, 8, dtype=F64)
    with pytest.raises(ValueError, match=r"state must be \[2, 5, 2, 3, 5\] as the layer returned it, got \[1, 5, 2"):
        layer(x, state=torch.zeros(1, 5, 2, 3, 5))
    with pytest.raises(ValueError, match=r"mask must be bool \[2, 3\], got torch.bool \[3, 2\]"):
        layer(x, torch.ones(3, 2, dtype=torch.bool))
