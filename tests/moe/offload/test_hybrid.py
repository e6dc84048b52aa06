"""Hybrid execution: what the host computes where the weights are gives the same, to the bit."""

from __future__ import annotations

import copy
import threading

import numpy as np
import pytest
import torch
from hybrid_cases import ALL, MIXED, NBYTES, NONE, Slow, costs, host_threads
from offload_cases import (
    D,
    E,
    F,
    K,
    L,
    batch,
    file_store,
    layers_of,
    offload_threads,
    resident,
    run,
    run_at_once,
    soon,
    weights,
)
from torch import nn

import headgate
from headgate.kernels import quantize
from headgate.kernels.grouped_ffn import grouped_ffn
from headgate.kernels.lora_ffn import Delta
from headgate.kernels.routing import Routing
from headgate.moe.offload import Engine, HostCache, HostStore, Layer, hybrid
from headgate.moe.offload.adapted import Carried
from headgate.moe.offload.costs import costs_of
from headgate.moe.offload.forms import survey
from headgate.moe.offload.offload import Offload
from headgate.placement.caching.cache import Cache
from headgate.placement.caching.costs import FREE, Costs
from headgate.placement.caching.policies import Setting, policy
from headgate.placement.caching.split import DEVICE, HOST, split
from headgate.placement.cluster.links import Link

pytestmark = pytest.mark.usefixtures("no_thread_is_left")


# --- right, to the bit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["layer", "shared"])
@pytest.mark.parametrize("said", [ALL, NONE, MIXED], ids=["all", "none", "mixed"])
def test_equals_all_weights_at_hand(said, scope, cpu_form):
    made = weights()
    with Engine(Slow(made), "40%", top_k=K, scope=scope, costs=said) as engine:
        run(engine, made)
        stats = engine.stats()
    assert (stats.host > 0) == (said is not NONE)
    assert (stats.loads > 0) == (said is not ALL)
    assert stats.hits + stats.host + stats.loads == stats.accesses


@pytest.mark.parametrize("form", [None, "plain", "transposed", "pair", "interleaved", "bias"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_form_of_weights(form, dtype, cpu_form):
    made = weights(dtype, form=form, bias=form in ("bias", "interleaved"))
    said = {"gated": form != "plain", "transposed": form == "transposed", "interleaved": form == "interleaved"}
    with Engine(Slow(made), "30%", top_k=K, costs=MIXED) as engine:
        run(engine, made, steps=9, dtype=dtype, activation="gelu_tanh" if form == "plain" else "silu", **said)
        assert 0 < engine.stats().host < engine.stats().accesses


def test_waves_of_what_is_left():
    """Slots for the experts of two tokens' choices: prefills take waves, and the host its part."""
    made = weights()
    with Engine(Slow(made), K * NBYTES + 256, top_k=K, scope="shared", costs=MIXED) as engine:
        run(engine, made, tokens=(33, 40))
        assert engine.stats().host > 0
        assert engine.stats().loads > 0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_of_gradients_hold_on_the_host(mode, cpu_form):
    made = weights()
    x, routing = batch(3)
    with Engine(Slow(made), "30%", top_k=K, costs=ALL) as engine:
        with mode():
            run(engine, made, steps=6)
            assert not engine.compute(0, x.clone().requires_grad_(), routing).requires_grad
        assert engine.stats().loads == 0


def test_no_tokens_no_experts_and_repeated_ones(cpu_form):
    made = weights()
    with Engine(Slow(made), "30%", top_k=K, costs=ALL) as engine:
        for ids in (torch.zeros(0, 2), torch.full((3, 2), -1), torch.full((3, 2), 4), torch.tensor([[1, -1], [E, 1]])):
            x, routing = torch.randn(len(ids), D), Routing.from_topk(ids.long(), torch.rand(ids.shape), E)
            assert torch.equal(engine.compute(0, x, routing), resident(x, routing, made[0]))
        assert engine.stats().host == 2


def test_outputs_that_lie_elsewhere_come_by_pairs(monkeypatch):
    """As on a GPU: the host returns its pairs, and only those are put among the others."""
    monkeypatch.setattr(hybrid, "in_place", lambda out: False)
    made = weights()
    for said in (ALL, MIXED):
        with Engine(Slow(made), "30%", top_k=K, costs=said) as engine:
            run(engine, made)
            assert engine.stats().host > 0


def test_many_threads_at_once():
    """One host thread for all of them, slots that others hold, and junk fetched ahead."""
    made = weights()
    for scope in ("shared", "layer"):
        with Engine(Slow(made), 0.3, top_k=K, scope=scope, costs=MIXED) as engine:
            run_at_once(engine, made)
            assert len(host_threads()) == 1
            assert engine.stats().host > 0


# --- what is decided -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lru", "lfu", "adaptive"])
@pytest.mark.parametrize("said", [ALL, MIXED, costs(4e-4, start_s=5e-4)], ids=["all", "mixed", "start"])
def test_the_split_asked_is_the_one_taken(said, name):
    """Access by access: the split of what is not in slots, and a Cache told what is apart."""
    made, want = weights(), []
    with Engine(Slow(made), "40%", policy=name, top_k=K, log=True, costs=said) as engine:
        cache = Cache(engine.places, policy(name, Setting(L, E, engine.places.slots)))
        for i in range(30):
            layer = i % L
            x, routing = batch((1, 2, 12)[i % 4 % 3])
            ids, rows = np.unique(routing.expert_ids.numpy(), return_counts=True)
            where = np.where(cache.table.slot_of[layer, ids] >= 0, DEVICE, HOST)
            apart = ids[split(rows, where, said).host]
            step = cache.step(layer, ids, apart)
            rows = zip(step.experts.tolist(), step.gone.tolist(), strict=True)
            want += [(layer, e, "hit" if g == -2 else "miss", max(g, -1)) for e, g in rows]
            want += [(layer, e, "host", -1) for e in apart.tolist()]
            engine.compute(layer, x, routing)
            guess = np.random.permutation(E)[:2]
            engine.prefetch((i + 1) % L, guess)
            ahead = cache.prefetch((i + 1) % L, guess)
            rows = zip(ahead.experts.tolist(), ahead.gone.tolist(), strict=True)
            want += [((i + 1) % L, e, "ahead", g) for e, g in rows]
        assert [tuple(a)[1:] for a in engine.log if a.how != "kept"] == want
        assert engine.stats().host == sum(how == "host" for _, _, how, _ in want) > 0


def test_what_the_host_computed_is_fetched_once_costs_say_so_and_stays():
    """One row is the host's, many are worth the way; by then the policy knows how often it was used."""
    made = weights()
    said = Costs((1, 8), (1e-4, 1e-4), (5e-4, 1.0), Link(1e3, np.inf), FREE, NBYTES)

    def step(expert: int, tokens: int) -> str:
        x, routing = (
            torch.randn(tokens, D),
            Routing.from_topk(torch.full((tokens, 1), expert), torch.ones(tokens, 1), E),
        )
        assert torch.equal(engine.compute(0, x, routing), resident(x, routing, made[0]))
        return engine.log[-1].how

    with Engine(Slow(made), 0.25, policy="lfu", costs=said, log=True) as engine:
        assert engine.places.slots == 2 * L
        assert [step(0, 8), step(1, 8)] == ["miss", "miss"]
        assert [step(5, 1) for _ in range(4)] == ["host"] * 4
        assert step(5, 8) == "miss"  # for 0
        assert [step(e, 8) for e in (2, 3, 4)] == ["miss"] * 3  # over one another
        assert step(5, 1) == "hit"


def test_an_expert_on_its_way_counts_as_there():
    made, gate = weights(), threading.Event()
    x, routing = torch.randn(1, D), Routing.from_topk(torch.tensor([[2, 3]]), torch.ones(1, 2), E)
    with Engine(Slow(made, lambda *_: gate.wait(30)), "40%", top_k=K, costs=ALL, log=True) as engine:
        engine.prefetch(0, [2])
        threading.Timer(0.2, gate.set).start()
        assert torch.equal(engine.compute(0, x, routing), resident(x, routing, made[0]))
        assert [(a.expert, a.how) for a in engine.log] == [(2, "ahead"), (2, "hit"), (3, "host")]


def test_the_host_computes_while_the_rest_is_on_its_way():
    made, gate = weights(), threading.Event()
    chosen = Routing.from_topk(torch.tensor([[2, 3]]), torch.ones(1, 2), E)
    x, computing = torch.randn(1, D), []
    with Engine(Slow(made, lambda *_: gate.wait(30)), "40%", top_k=K, costs=MIXED) as engine:

        def begun(ids) -> None:
            assert soon(lambda: engine._host is not None and not engine._host._jobs)  # done, and nothing has come
            computing.append(engine.stats())
            gate.set()

        assert torch.equal(engine.compute(0, x, chosen, then=begun), resident(x, chosen, made[0]))
        assert (computing[0].host, computing[0].loads) == (1, 0)
        assert computing[0].compute_s > 0
        assert engine.stats().loads == 1


# --- where it is allowed ---------------------------------------------------------------------------------------------


def test_experts_that_the_host_cannot_compute_in_place(tmp_path):
    made = weights(d=128, f=64)
    coded = [{name: quantize(t, "int4", block=(1, 32)) for name, t in w.items()} for w in made]
    stores = [
        file_store(made, tmp_path / "x"),
        HostCache(HostStore(layers_of(made), lambda i: [made[i]]), 0.5),
        HostStore([Layer.of("m", (range(E), w)) for w in coded], lambda i: [coded[i]]),
    ]
    for store in stores:
        with pytest.raises(ValueError, match="costs must be None where experts are not plain tensors in host memory"):
            Engine(store, "50%", top_k=K, costs=MIXED)
        store.close()
    assert not offload_threads()


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        made = [headgate.MoE(hidden_size=D, intermediate_size=16, num_experts=E, top_k=K) for _ in range(L)]
        self.blocks = nn.ModuleList(made)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


def test_a_model_whose_experts_are_in_host_memory():
    """What `offload` puts together where there is a GPU, here with memory for its memory."""
    model, calls = Stack().eval(), [torch.randn(n, D) for n in (20, 1, 1, 3, 1, 0, 1)]
    with torch.no_grad():
        want = [model(x) for x in calls]
        found, skipped = survey(model)
        made = [{n: p.detach() for n, p in form.weights(module).items()} for _, module, form in found]
        store = HostStore(layers_of(made), lambda i: [made[i]])
        engine = Engine(store, "40%", top_k=K, costs=MIXED)
        with Offload(model, found, skipped, engine, store, None, torch.device("cpu")) as offloaded:
            for x, y in zip(calls, want, strict=True):
                assert torch.equal(model(x), y)
            assert 0 < offloaded.stats().host < offloaded.stats().accesses
        for x, y in zip(calls, want, strict=True):
            assert torch.equal(model(x), y)
        measured = costs_of(True, HostStore(layers_of(made), lambda i: [made[i]]), found[0][2], torch.device("cpu"))
    assert measured.expert_bytes == NBYTES
    assert measured.host_s is None  # the host is the device
    assert costs_of(MIXED, store, found[0][2], torch.device("cpu")) is MIXED
    assert costs_of(False, store, found[0][2], torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("options", "kind", "says"),
    [
        ({"hybrid": True, "disk": "there"}, ValueError, "disk must be None with hybrid, .*, got 'there'"),
        ({"hybrid": MIXED, "disk": "there"}, ValueError, "disk must be None with hybrid"),
        ({"hybrid": True}, ValueError, "disk must be a folder where the device is a CPU"),
        ({"hybrid": "yes", "disk": "there"}, TypeError, "hybrid must be True, False or Costs, got str"),
        ({"hybrid": True, "device": "meta", "formats": {"blocks.0.experts": ["int4"] * E}}, ValueError, "formats must"),
    ],
)
def test_bad_input_changes_nothing(options, kind, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = Stack()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(kind, match=says):
        headgate.offload(model, "40%", "lru", None, **options)
    assert not list(tmp_path.iterdir())
    assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items())


@pytest.mark.gpu
def test_on_a_gpu(assert_close):
    """Host and device at once, many steps without a wait in between, and a whole model with costs measured."""
    made = weights(layers=2, d=256, f=128)
    store = HostStore(layers_of(made), lambda i: [made[i]], "cuda")
    there = [{name: t.cuda() for name, t in w.items()} for w in made]
    with Engine(store, "30%", top_k=K, device="cuda", costs=MIXED) as engine:
        for tokens in (1, 8, 64):
            for i in range(20):
                x, routing = batch(tokens, d=256)
                x, routing = x.cuda(), Routing.from_topk(routing.expert_ids.cuda(), routing.weights.cuda(), E)
                engine.prefetch((i + 1) % 2, np.random.permutation(E)[:2])
                w = there[i % 2]
                want = grouped_ffn(x, routing, w["w_gate_up"], w["w_down"])
                assert_close(engine.compute(i % 2, x, routing), want)
        assert 0 < engine.stats().host < engine.stats().accesses
    model, x = Stack().cuda().eval(), torch.randn(5, D, device="cuda")
    with torch.no_grad():
        want = model(x)
        for said in (True, ALL):
            with headgate.offload(model, "40%", hybrid=said) as offloaded:
                assert_close(model(x), want)
                assert said is True or offloaded.stats().host > 0


def test_experts_that_carry_lora_are_refused_whoever_would_compute_them():
    made = weights()
    a, b = torch.randn(E, 2, D), torch.randn(E, 2 * F, 2)
    with Engine(Slow(made), "40%", top_k=K, costs=MIXED) as engine:
        x, routing = batch(5)
        with pytest.raises(ValueError, match=r"hybrid must be False where experts carry LoRA, got it with model\.1"):
            engine.compute(1, x, routing, carried=Carried(Delta(a, b, 1.0), None))
        assert engine.stats().loads == 0, "it is refused before anything is fetched"
