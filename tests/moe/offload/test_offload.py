"""headgate.offload: whole models whose experts are on disk answer as they did, to the bit, and get them back."""

from __future__ import annotations

import copy
import gc
import pickle
import threading

import numpy as np
import pytest
import torch
from func_transforms import ONE
from offload_cases import Stack
from torch import nn
from torch.autograd import forward_ad

import headgate
from headgate.moe.offload import Engine, FileStore, HostStore, Layer, lower
from headgate.moe.offload.forms import survey
from headgate.moe.offload.offload import Offload
from headgate.placement.caching.cache import Cache
from headgate.placement.caching.policies import POLICIES, Setting, policy
from headgate.placement.caching.prefetch import prefetch as fetch_likely


def calls(dtype=torch.float32):
    """Prefill, then tokens one by one."""
    torch.manual_seed(7)
    return [torch.randn(n, 32, dtype=dtype) for n in (40, 1, 1, 1, 3, 1, 0, 1, 1, 17, 1)]


def answers(model, inputs):
    with torch.no_grad():
        return [model(x=x) for x in inputs]


def same(got, want):
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def trace_of(model):
    return headgate.record(model, torch.randint(0, 64, (6, 20)))


@pytest.mark.parametrize("prefetch", [None, "gate", "path"])
@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_and_prefetch_gives_the_same_bits(stack, tmp_path, name, prefetch):
    inputs = calls()
    want, trace = answers(stack, inputs), trace_of(stack)
    with headgate.offload(stack, "30%", name, prefetch, tmp_path, trace=trace) as offloaded:
        same(answers(stack, inputs), want)
        stats = offloaded.stats()
        assert 0 < stats.hits < stats.accesses
        assert stats.loads > 0
    same(answers(stack, inputs), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("scope", ["layer", "shared"])
def test_a_budget_of_next_to_nothing(tmp_path, dtype, scope):
    torch.manual_seed(0)
    stack, inputs = Stack(dtype, bias=True, shared_intermediate_size=8).eval(), calls(dtype)
    want = answers(stack, inputs)
    one = sum(w.nbytes // 8 for n, w in stack.blocks[0].experts.named_parameters())
    budget = one * (6 if scope == "layer" else 2) + 1024  # 2 experts of each layer, or of one
    with headgate.offload(stack, budget, "lru", "gate", tmp_path, scope=scope) as offloaded:
        assert offloaded.engine.arena.nbytes <= budget
        same(answers(stack, inputs), want)


def test_on_plain_torch_too(stack, tmp_path, cpu_form):
    inputs = calls()
    want = answers(stack, inputs)
    with headgate.offload(stack, "25%", "lru", "gate", tmp_path):
        same(answers(stack, inputs), want)


def test_generation_in_threads_at_once(stack, tmp_path):
    inputs = [calls(), calls()[::-1], calls()[1:5] * 3, calls()[:2] * 4]
    want = [answers(stack, some) for some in inputs]
    got = [None] * 4
    with headgate.offload(stack, "25%", "lru", "path", tmp_path, trace=trace_of(stack)):

        def run(i):
            got[i] = answers(stack, inputs[i])

        threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join(60)
    for a, b in zip(got, want, strict=True):
        assert a is not None, "a thread hangs, or has died"
        same(a, b)


@pytest.mark.parametrize("prefetch", ["gate", "path"])
def test_the_log_is_what_the_cache_would_do(stack, tmp_path, prefetch):
    """Access by access: the same steps and fetches ahead through a Cache alone."""
    with headgate.offload(stack, "30%", "lru", prefetch, tmp_path, trace=trace_of(stack), log=True) as offloaded:
        asked, kinds, engine = [], [], offloaded.engine
        fetch, begin = engine.prefetch_likely, engine._begin
        engine.prefetch_likely = lambda *a: (asked.append(a), kinds.append("ahead"), fetch(*a))[2]
        engine._begin = lambda *a: (kinds.append("step"), begin(*a))[1]
        answers(stack, calls())
        log, places = list(offloaded.log), engine.places
    cache = Cache(places, policy("lru", Setting(*places.of.shape, places.slots)))
    chance, asked = np.zeros(places.of.shape, np.float32), iter(asked)
    assert {a.how for a in log} == {"hit", "miss", "ahead", "kept"}
    for number in range(1, engine._calls + 1):
        some = [a for a in log if a.step == number]
        if kinds[number - 1] == "ahead":
            layer, told, price, room = next(asked)
            chance[layer] = told
            found = fetch_likely(cache, layer, chance, price, room)
            assert [(a.expert, a.gone) for a in some if a.how == "ahead"] == pairs(found)
        elif some:
            found = cache.step(some[0].layer, sorted(a.expert for a in some))
            assert [(a.expert, a.gone) for a in some] == [(e, -1 if g == -2 else g) for e, g in pairs(found)]
            assert sum(a.how == "hit" for a in some) == found.hits


def pairs(found):
    return list(zip(found.experts.tolist(), found.gone.tolist(), strict=True))


def test_parameters_keep_names_shapes_and_contents(stack, tmp_path):
    before = {name: w.clone() for name, w in stack.state_dict().items()}
    kept = stack.blocks[0].experts.w_down
    kept.requires_grad_(False)
    with headgate.offload(stack, "25%", "lru", None, tmp_path):
        during = stack.state_dict()
        assert during.keys() == before.keys()
        assert all(torch.equal(during[name], w) for name, w in before.items())
        assert not any(p.requires_grad for b in stack.blocks for p in b.experts.parameters())
        assert stack.blocks[0].router.weight.requires_grad
    assert all(torch.equal(stack.state_dict()[name], w) for name, w in before.items())
    assert stack.blocks[0].experts.w_down is kept
    assert not kept.requires_grad
    assert stack.blocks[1].experts.w_down.requires_grad
    assert not [n for m in stack.modules() for n in vars(m) if n.startswith("_headgate_off")]


def test_experts_on_the_meta_device_come_from_the_file(stack, tmp_path, monkeypatch):
    inputs = calls()
    want = answers(stack, inputs)
    headgate.offload(stack, "25%", "lru", None, tmp_path).close()
    empty = copy.deepcopy(stack)
    for block in empty.blocks:
        block.experts.to("meta")
    with headgate.offload(empty, "25%", "lru", "gate", tmp_path) as offloaded:
        same(answers(empty, inputs), want)
        monkeypatch.setattr(offloaded._store, "read", lambda *_: 1 / 0)  # nobody brings them into memory at the end
    same(answers(empty, inputs), want)  # out of maps of the file
    for block in empty.blocks:
        block.experts.to("meta")
    headgate.offload(empty, "25%", "lru", "gate", tmp_path).close(restore=True)
    (tmp_path / "experts.safetensors").write_bytes(b"")
    same(answers(empty, inputs), want)


def test_few_bits(stack, tmp_path):
    """Outputs of rounded weights, and weights that come back rounded."""
    names = [f"blocks.{i}.experts" for i in range(3)]
    formats = {names[0]: ["int4", None] * 4, names[2]: ["int4"] * 8}
    rounded = copy.deepcopy(stack)
    for name, of in formats.items():
        for w in (rounded.get_submodule(name).w_gate_up, rounded.get_submodule(name).w_down):
            for e, kind in enumerate(of):
                if kind:
                    w.data[e] = headgate.kernels.quantize(w.data[e : e + 1], kind).dequantize(w.dtype)[0]
    inputs = calls()
    want = answers(rounded, inputs)
    whole = sum(w.nbytes for b in stack.blocks for w in b.experts.parameters())
    with headgate.offload(stack, "40%", "lru", "gate", tmp_path, formats=formats) as offloaded:
        assert (tmp_path / "experts.safetensors").stat().st_size < 0.7 * whole
        assert offloaded.engine.arena.nbytes < 0.4 * whole
        for a, b in zip(answers(stack, inputs), want, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)
    same(answers(stack, inputs), want)


def test_one_format_for_all_is_made_expert_by_expert(stack, tmp_path, monkeypatch):
    """quantize takes several times the memory of what it is given: never a whole layer."""
    named = {f"blocks.{i}.experts": ["int4"] * 8 for i in range(3)}
    with headgate.offload(copy.deepcopy(stack), "50%", disk=tmp_path / "named", formats=named) as offloaded:
        want = [offloaded._store.layers, (tmp_path / "named/experts.safetensors").read_bytes()]
    given, quantize = [], lower.quantize
    monkeypatch.setattr(lower, "quantize", lambda w, format: given.append(w) or quantize(w, format))
    with headgate.offload(stack, "50%", disk=tmp_path / "all", formats="int4") as offloaded:
        assert [offloaded._store.layers, (tmp_path / "all/experts.safetensors").read_bytes()] == want
    real = [len(w) for w in given if not w.is_meta]
    assert real
    assert set(real) == {1}
    for wrong in ("int3", ""):
        with pytest.raises(ValueError, match="format must be one of"):
            headgate.offload(stack, "50%", disk=tmp_path / "all", formats=wrong)
    with pytest.raises(TypeError, match="formats must be a format, or a mapping of modules' names, got 4"):
        headgate.offload(stack, "50%", disk=tmp_path / "all", formats=4)


def another_w_down(experts) -> None:
    experts.w_down = torch.nn.Parameter(torch.zeros_like(experts.w_down))


def test_weights_that_change_meanwhile_are_noticed(stack, tmp_path):
    offloaded = headgate.offload(stack, "25%", "lru", None, tmp_path)
    another_w_down(stack.blocks[1].experts)
    with pytest.raises(RuntimeError, match=r"blocks.1.experts.w_down must stay as it was"):
        answers(stack, calls()[:1])
    offloaded.close(discard=True)


def test_copies_are_refused(stack, tmp_path):
    with headgate.offload(stack, "25%", "lru", None, tmp_path):
        with pytest.raises(TypeError, match="cannot be copied or pickled"):
            copy.deepcopy(stack)
        with pytest.raises(TypeError, match="cannot be copied or pickled"):
            pickle.dumps(stack)
    copy.deepcopy(stack)


def test_a_close_that_fails_can_be_called_again(stack, tmp_path, monkeypatch):
    inputs = calls()
    want = answers(stack, inputs)
    offloaded = headgate.offload(stack, "25%", "lru", None, tmp_path)
    read = offloaded._store.read
    monkeypatch.setattr(offloaded._store, "read", lambda i, e, into: 1 / 0 if i == 1 else read(i, e, into))
    with pytest.raises(ZeroDivisionError):
        offloaded.close()
    monkeypatch.undo()
    same(answers(stack, inputs), want)  # one layer is back, two are served
    offloaded.close()
    same(answers(stack, inputs), want)
    assert all(p.requires_grad for p in stack.parameters())


def test_a_beginning_that_fails_is_undone(stack, tmp_path, monkeypatch):
    inputs, kept = calls(), stack.blocks[0].experts.w_down
    want = answers(stack, inputs)
    whole = FileStore.whole
    monkeypatch.setattr(FileStore, "whole", lambda self, i: 1 / 0 if i == 1 else whole(self, i))
    with pytest.raises(ZeroDivisionError):
        headgate.offload(stack, "25%", "lru", None, tmp_path)
    assert stack.blocks[0].experts.w_down is kept
    assert kept.requires_grad
    same(answers(stack, inputs), want)
    assert not stack._forward_pre_hooks


def test_two_models_in_one_folder(stack, tmp_path):
    """The file of the second takes the name of the first's, and not its place."""
    torch.manual_seed(9)
    other, inputs = Stack().eval(), calls()
    want, others = answers(stack, inputs), answers(other, inputs)
    with headgate.offload(stack, "25%", "lru", None, tmp_path), headgate.offload(other, "25%", "lru", None, tmp_path):
        same(answers(stack, inputs), want)
        same(answers(other, inputs), others)
    same(answers(stack, inputs), want)
    same(answers(other, inputs), others)


def test_weights_that_would_be_lost_are_named_at_the_end(stack, tmp_path):
    offloaded = headgate.offload(stack, "25%", "lru", None, tmp_path)
    another_w_down(stack.blocks[1].experts)
    with pytest.raises(RuntimeError, match="w_down must stay as it was when it was offloaded"):
        offloaded.close()
    offloaded.close(discard=True)
    assert stack.blocks[0].experts.w_down.any()


def test_closed_under_inference_mode_it_can_train(stack, tmp_path):
    with torch.inference_mode(), headgate.offload(stack, "25%", "lru", None, tmp_path):
        stack(x=calls()[0])
    stack(x=calls()[0]).sum().backward()


def test_autocast_to_another_type_is_refused(stack, tmp_path):
    with (
        headgate.offload(stack, "25%", "lru", None, tmp_path),
        torch.no_grad(),
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ValueError, match="autocast must be off or to"),
    ):
        stack(x=calls()[0])


def test_shared_weights_are_refused(stack, tmp_path):
    stack.blocks[1].experts.w_down = stack.blocks[0].experts.w_down
    with pytest.raises(ValueError, match=r"their own weights, got blocks.1.experts with blocks.0.experts's"):
        headgate.offload(stack, "25%", "lru", None, tmp_path)


def test_a_model_that_is_forgotten_leaves_no_thread(tmp_path):
    before = set(threading.enumerate())
    made = Stack().eval()
    headgate.offload(made, "25%", "lru", "gate", tmp_path)
    with torch.no_grad():
        made(x=calls()[0])
    del made
    gc.collect()
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("name", ["jvp", "forward_ad", "grad"])
def test_transforms_are_refused(name, stack, tmp_path):
    x = calls()[0]
    with headgate.offload(stack, "25%", "lru", None, tmp_path), torch.no_grad():
        with pytest.raises(NotImplementedError, match="offload: tensors must not be those of a transform"):
            ONE[name](lambda x: stack(x=x), (x,))
        with forward_ad.dual_level():  # nobody's tangent
            stack(x=x)


def test_close_twice_and_use_after(stack, tmp_path):
    offloaded = headgate.offload(stack, "25%", "lru", None, tmp_path)
    offloaded.close()
    offloaded.close()
    assert not [t for t in threading.enumerate() if t.name == "headgate-offload"]
    with headgate.offload(stack, "25%", "lru", None, tmp_path):  # and once more
        answers(stack, calls()[:1])


def test_one_store_serves_one_setting_after_another(stack):
    """Closed with restore=False, parameters hold the store's own bytes, from which the next Offload takes them."""
    inputs = calls()
    want = answers(stack, inputs)
    found, skipped = survey(stack)
    made = [{ours: p.detach().clone() for ours, p in form.weights(module).items()} for _, module, form in found]
    layers = [Layer.of(name, (range(8), w)) for (name, _, _), w in zip(found, made, strict=True)]
    store = HostStore(layers, lambda i: [made[i]])
    for name in ("lru", "lfu"):
        lent = store.lend()
        engine = Engine(lent, "30%", policy=name)
        offloaded = Offload(stack, found, skipped, engine, lent, None, torch.device("cpu"))
        same(answers(stack, inputs), want)
        assert offloaded.stats().loads > 0
        offloaded.close(restore=False)
        offloaded.close()
        with pytest.raises(OSError, match="closed"):
            lent.parts(0, 0)
        assert not stack._forward_pre_hooks
    for i, (_, module, form) in enumerate(found):
        assert all(p.data_ptr() == made[i][ours].data_ptr() for ours, p in form.weights(module).items())
    same(answers(stack, inputs), want)  # nobody serves them now


def test_weights_that_would_be_lost_are_named_without_restoring_too(stack, tmp_path):
    offloaded = headgate.offload(stack, "25%", "lru", None, tmp_path)
    another_w_down(stack.blocks[1].experts)
    with pytest.raises(RuntimeError, match="must stay as it was when it was offloaded"):
        offloaded.close(restore=False)
    offloaded.close(discard=True)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"budget": "10 bytes or so"}, ValueError, "budget must be"),
        ({"budget": 100}, ValueError, "budget must be at least"),
        ({"policy": "fifo"}, ValueError, "name must be one of"),
        ({"policy": "static"}, ValueError, "trace"),
        ({"prefetch": "crystal"}, ValueError, "prefetch must be one of gate, path"),
        ({"prefetch": "path"}, ValueError, "trace must be given"),
        ({"disk": None}, ValueError, "disk must be a folder"),
        ({"scope": "rank"}, ValueError, "scope must be one of"),
        ({"readers": 0}, ValueError, "readers must be at least 1"),
        ({"readers": "2"}, TypeError, "readers must be an integer or None, got '2'"),
        ({"trace": 3}, TypeError, "trace must be a Trace or None, got int"),
        ({"formats": {"blocks.0.experts": "int4"}}, TypeError, "formats must be a list for blocks.0.experts"),
        ({"formats": {"blocks.9.experts": ["int4"] * 8}}, ValueError, "formats must be for modules"),
        ({"formats": {"blocks.0.experts": ["int4"] * 7}}, ValueError, "one for each of the 8 experts"),
        ({"formats": {"blocks.0.experts": ["int3"] * 8}}, ValueError, "format must be one of"),
    ],
)
def test_bad_input_changes_nothing(stack, tmp_path, change, kind, message):
    want = answers(stack, calls())
    options = {"budget": "25%", "policy": "lru", "prefetch": None, "disk": tmp_path / "there", **change}
    with pytest.raises(kind, match=message):
        headgate.offload(stack, **options)
    assert not (tmp_path / "there").exists()
    same(answers(stack, calls()), want)
    assert all(p.requires_grad for p in stack.parameters())


def test_what_cannot_be_offloaded(tmp_path):
    with pytest.raises(TypeError, match=r"must be a torch.nn.Module, got str"):
        headgate.offload("model")
    with pytest.raises(ValueError, match="must have experts"):
        headgate.offload(nn.Linear(2, 2), disk=tmp_path)


def test_twice(stack, tmp_path):
    with (
        headgate.offload(stack, "25%", "lru", None, tmp_path),
        pytest.raises(ValueError, match="must not be offloaded already"),
    ):
        headgate.offload(stack, "25%", "lru", None, tmp_path)


def without_a_buffer(stack, folder):
    stack.blocks[0].router.register_buffer("seen", torch.empty(3, device="meta"))


def without_a_router(stack, folder):
    stack.blocks[2].router.weight = nn.Parameter(torch.empty_like(stack.blocks[2].router.weight, device="meta"))


def half_a_layer(stack, folder):
    w = stack.blocks[1].experts.w_gate_up
    stack.blocks[1].experts.w_gate_up = nn.Parameter(torch.empty_like(w, device="meta"))


def without_experts(stack, folder):
    for block in stack.blocks:
        block.experts.to("meta")


def a_file_in_the_way(stack, folder):
    folder.rmdir()
    folder.write_text("mine")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without_a_buffer, r"must be in memory but for experts, got blocks.0.router.seen on the meta .* headgate.load"),
        (without_a_router, r"must be in memory but for experts, got blocks.2.router.weight on the meta device"),
        (half_a_layer, r"experts must be all on the meta device or none, got blocks.1.experts.w_gate_up there"),
        (without_experts, r"disk must be a folder with experts.safetensors for experts on the meta device, got \S+/x"),
        (a_file_in_the_way, r"disk must be a folder, got the file \S+/x"),
    ],
)
def test_a_model_that_is_not_all_there_or_a_disk_that_is_no_folder(stack, tmp_path, spoil, message):
    (folder := tmp_path / "x").mkdir()
    spoil(stack, folder)
    before = {name: id(p) for name, p in stack.named_parameters()}
    with pytest.raises(ValueError, match=message):
        headgate.offload(stack, "40%", "lru", None, folder)
    assert {name: id(p) for name, p in stack.named_parameters()} == before
    assert not folder.is_dir() or not any(folder.iterdir())
    assert not stack._forward_pre_hooks
