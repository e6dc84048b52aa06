"""Gradients of rows and router weights through offloaded experts: those of resident ones, whatever stands in slots."""

from __future__ import annotations

import threading
from functools import partial

import pytest
import torch
from hybrid_cases import ALL, MIXED, NBYTES, Slow
from offload_cases import (
    D,
    E,
    K,
    Stack,
    Watched,
    batch,
    file_store,
    host_store,
    resident,
    soon,
    weights,
)  # fmt: skip
from torch.utils.checkpoint import checkpoint

import headgate
from headgate.kernels import Routing, quantize
from headgate.moe.offload import Engine, HostStore, Layer, hybrid

pytestmark = pytest.mark.usefixtures("no_thread_is_left")
ONE_EACH = 3 * (NBYTES + 64)  # room for one expert of each of three layers


def gradients(call, x, routing, grad=None, ask=("rows", "weights")):
    """(y, gradients of those that ask) of call(x, routing)."""
    x, w = (t.detach().requires_grad_(name in ask) for t, name in ((x, "rows"), (routing.weights, "weights")))
    y = call(x, Routing(routing.expert_ids, w, routing.num_experts))
    grad = torch.ones_like(y) if grad is None else grad
    return y.detach(), torch.autograd.grad(y, [t for t in (x, w) if t.requires_grad], grad)


def assert_same(engine, made, x, routing, layer=0, ask=("rows", "weights"), **form):
    grad = torch.randn(x.shape).to(x.dtype)
    want = gradients(lambda *a: resident(*a, made[layer], **form), x, routing, grad, ask)
    got = gradients(lambda *a: engine.compute(layer, *a, **form), x, routing, grad, ask)
    assert torch.equal(got[0], want[0])
    for a, b in zip(got[1], want[1], strict=True):
        assert torch.equal(a, b)
    assert not engine.cache.table.busy.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("budget", ["one of each", "60%"])
def test_the_bits_of_resident_experts(dtype, budget, cpu_form, tmp_path):
    """One slot for all eight experts of a layer, and more: a pass takes waves."""
    made = weights(dtype, bias=True, d=32)
    nbytes = sum(t[0].nbytes for t in made[0].values())
    room = 3 * nbytes + 512 if budget == "one of each" else budget
    with Engine(file_store(made, tmp_path / "x"), room, scope="layer") as engine:
        if budget == "one of each":
            assert engine.places.slots == 3
        for tokens in (1, 40, 600):
            x, routing = batch(tokens, dtype, d=32)
            assert_same(engine, made, x, routing, layer=tokens % 3)


@pytest.mark.parametrize("form", ["plain", "transposed", "pair"])
def test_forms(form):
    made = weights(form=form)
    how = {"transposed": form == "transposed", "gated": form != "plain", "activation": "silu"}
    with Engine(host_store(made), "40%", top_k=K) as engine:
        assert_same(engine, made, *batch(40), **how)


@pytest.mark.parametrize("ask", [("rows",), ("weights",)])
def test_one_of_both(ask):
    made = weights()
    with Engine(host_store(made), "40%", top_k=K) as engine:
        assert_same(engine, made, *batch(40), ask=ask)


def test_no_tokens_no_experts_and_repeated_ones(cpu_form):
    made = weights()
    with Engine(host_store(made), "40%", top_k=K) as engine:
        for ids in (torch.zeros(0, 2), torch.full((3, 2), -1), torch.full((33, 2), 4), torch.tensor([[1, -1], [E, 1]])):
            x, routing = torch.randn(len(ids), D), Routing.from_topk(ids.long(), torch.rand(ids.shape), E)
            assert_same(engine, made, x, routing)


@pytest.mark.parametrize("format", ["int8", "int4", "mxfp4", "fp8"])
def test_few_bits(format, assert_close):
    """Of the rounded weights, to rounding: forward the offload keeps them as they are stored."""
    made = [{n: quantize(t, format) for n, t in w.items()} for w in weights(d=64, f=64, layers=1)]
    dense = {n: w.dequantize(torch.float32) for n, w in made[0].items()}
    with Engine(HostStore([Layer.of("a", (range(E), made[0]))], lambda i: [made[i]]), "40%", top_k=K) as engine:
        x, routing = batch(40, d=64)
        got = gradients(lambda *a: engine.compute(0, *a), x, routing)
        want = gradients(lambda *a: resident(*a, dense), x, routing)
        for a, b in zip((got[0], *got[1]), (want[0], *want[1]), strict=True):
            assert_close(a, b.double(), scale=50)


@pytest.mark.parametrize("costs", [ALL, MIXED], ids=["all on the host", "some"])
@pytest.mark.parametrize("direct", [True, False])
def test_the_host_computes_its_part(costs, direct, monkeypatch):
    if not direct:  # as on a GPU: the host returns its pairs, and only those are put among the others
        monkeypatch.setattr(hybrid, "in_place", lambda out: False)
    made = weights()
    with Engine(Slow(made), "30%", top_k=K, costs=costs) as engine:
        for tokens in (1, 40):
            assert_same(engine, made, *batch(tokens))
            assert_same(engine, made, *batch(tokens), ask=("weights",))
        assert engine.stats().host > 0


def test_what_is_kept_between_the_passes():
    """Rows, choices and weights; not the pre-activation, 2 F numbers for each of the K experts of a row."""
    made, kept = weights(), []
    x, routing = batch(40)
    x.requires_grad_()
    with (
        Engine(host_store(made), "40%", top_k=K) as engine,
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        engine.compute(0, x, routing)
    assert sum(t.nbytes for t in kept) == x.nbytes + routing.expert_ids.nbytes + routing.weights.nbytes


def test_several_threads():
    made, wrong = weights(), []
    with Engine(Slow(made), "30%", top_k=K, scope="shared") as engine:

        def learn(seed: int) -> None:
            own = torch.Generator().manual_seed(seed)
            try:
                for i in range(8):
                    x, routing = batch((1, 30)[i % 2], generator=own)
                    want = gradients(partial(resident, w=made[i % 3]), x, routing)
                    got = gradients(partial(engine.compute, i % 3), x, routing)
                    if not all(map(torch.equal, (got[0], *got[1]), (want[0], *want[1]))):
                        wrong.append((seed, i))
            except Exception as error:
                wrong.append((seed, repr(error)))

        threads = [threading.Thread(target=learn, args=(seed,)) for seed in range(3)]
        for t in threads:
            t.start()
        for t in threads:
            t.join(120)
        assert not any(t.is_alive() for t in threads)
        assert not wrong
        assert not engine.cache.table.busy.any()


def test_an_expert_that_cannot_be_read_on_the_way_back():
    """The backward pass says which; asked again it goes through."""
    made, sick = weights(), [False]

    def trouble(layer, expert, nth):
        if sick[0] and expert == 3:
            raise OSError(5, "bad sector")

    ids = torch.arange(8).view(4, 2)
    x, routing = torch.randn(4, D, requires_grad=True), Routing.from_topk(ids, torch.ones(4, 2), E)
    with Engine(Watched(host_store(made), trouble), ONE_EACH) as engine:
        y, sick[0] = engine.compute(0, x, routing), True
        with pytest.raises(OSError, match=r"expert 3 of model\.0\.experts .*bad sector"):
            torch.autograd.grad(y.sum(), x, retain_graph=True)
        assert soon(lambda: not engine.cache.table.busy.any())
        sick[0] = False
        (got,) = torch.autograd.grad(y.sum(), x)
        (want,) = torch.autograd.grad(resident(x, routing, made[0]).sum(), x)
        assert torch.equal(got, want)


def test_after_the_end_and_twice():
    made = weights()
    x, routing = batch(5)
    x.requires_grad_()
    engine = Engine(host_store(made), "40%", top_k=K)
    y = engine.compute(0, x, routing)
    (d_x,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        d_x.sum().backward()
    y = engine.compute(0, x, routing)
    engine.close()
    with pytest.raises(RuntimeError, match="must be open, got one that is closed"):
        y.sum().backward()


# --- models ----------------------------------------------------------------------------------------------------------


def frozen(stack):
    for name, p in stack.named_parameters():
        p.requires_grad_(".experts." not in name)
    return stack


def learned(stack, x, through=lambda block, x: block(x)):
    """(y, gradients of x and of everything but the experts)."""
    x = x.clone().requires_grad_()
    y = x
    for block in stack.blocks:
        y = y + through(block, y)
    y.square().sum().backward()
    found = {n: p.grad for n, p in stack.named_parameters() if p.grad is not None} | {"x": x.grad}
    stack.zero_grad()
    return y.detach(), found


def assert_same_learned(got, want):
    assert torch.equal(got[0], want[0])
    assert got[1].keys() == want[1].keys()
    for name, value in want[1].items():
        assert torch.equal(got[1][name], value), name


WAYS = {
    "plain": lambda block, x: block(x),
    "checkpointed": lambda block, x: checkpoint(block, x, use_reentrant=False),
    "checkpointed, reentrant": lambda block, x: checkpoint(block, x, use_reentrant=True),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("scope", ["layer", "shared"])
def test_a_model_learns_around_its_experts(way, scope, stack, tmp_path):
    frozen(stack)
    x = torch.randn(50, 32)
    want = learned(stack, x)
    assert len(want[1]) == 4  # three routers, and x
    with headgate.offload(stack, "25%", "lru", "gate", tmp_path, scope=scope) as offloaded:
        for _ in range(2):
            assert_same_learned(learned(stack, x, WAYS[way]), want)
        passes = 2 if way == "plain" else 3
        chosen = offloaded.stats().accesses
        assert chosen % (2 * passes) == 0, "forward, once more where checkpointed, and back"
    assert_same_learned(learned(stack, x), want)


def test_gradients_add_up_over_micro_batches(stack, tmp_path):
    """All forward passes before the first backward pass, too."""
    frozen(stack)
    parts = torch.randn(4, 9, 32)

    def all_at_once():
        sum(stack(x=x).square().sum() for x in parts).backward()
        found = {n: p.grad for n, p in stack.named_parameters() if p.grad is not None}
        stack.zero_grad()
        return torch.zeros(()), found

    want = all_at_once()
    with headgate.offload(stack, "25%", "adaptive", "gate", tmp_path):
        assert_same_learned(all_at_once(), want)


def test_the_way_back_fetches_the_layer_before_ahead(stack, tmp_path):
    x = torch.randn(1, 32)
    with headgate.offload(frozen(stack), "34%", "lru", "gate", tmp_path, scope="shared", log=True) as offloaded:
        y = stack(x=x.requires_grad_())
        chosen = {(a.layer, a.expert) for a in offloaded.log if a.how in ("hit", "miss")}
        with torch.no_grad():  # of other texts
            stack(x=torch.randn(40, 32))
        begun = len(offloaded.log)
        y.sum().backward()
        back = offloaded.log[begun:]
        assert [a.layer for a in back if a.how in ("hit", "miss")] == [2, 2, 1, 1, 0, 0]
        ahead = [(a.layer, a.expert) for a in back if a.how in ("ahead", "kept")]
        assert sorted(ahead) == sorted(each for each in chosen if each[0] < 2)
        assert "ahead" in {a.how for a in back}
        assert all(a.how == "hit" for a in back if a.layer < 2 and a.how in ("hit", "miss"))


def test_experts_that_ask_for_a_gradient_are_refused_by_name(stack, tmp_path):
    frozen(stack)
    x = torch.randn(9, 32)
    with headgate.offload(stack, "25%", "lru", None, tmp_path) as offloaded:
        stack.requires_grad_(True)
        with pytest.raises(ValueError, match=r"blocks\.0\.experts\.w_gate_up must not ask for a gradient while it is"):
            stack(x=x)
        with torch.no_grad():
            stack(x=x)
        frozen(stack)
        y = stack(x=x)
        assert offloaded.stats().accesses
        before = stack.blocks[2].experts.w_down
        stack.blocks[2].experts.w_down = torch.nn.Parameter(torch.zeros(8, 32, 16))
        with pytest.raises(RuntimeError, match=r"blocks\.2\.experts\.w_down must stay as it was"):
            y.sum().backward()
        stack.blocks[2].experts.w_down = before
    assert all(p.requires_grad == (".experts." not in n) for n, p in stack.named_parameters())


def test_under_autocast(tmp_path):
    """To the experts' own type, as it must be; rows of another type get their gradient in theirs."""
    torch.manual_seed(0)
    stack = frozen(Stack(torch.bfloat16))
    x = torch.randn(20, 32)

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            y = x.clone().requires_grad_()
            z = y
            for block in stack.blocks:
                z = z + block(z)
        (found,) = torch.autograd.grad(z.square().sum(), y)
        return z.detach(), {"x": found}

    want = run()
    assert want[1]["x"].dtype == torch.float32
    with headgate.offload(stack, "25%", "lru", "gate", tmp_path):
        assert_same_learned(run(), want)
