"""ModelPool: several models that take turns in few slots answer as they did."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

import headgate


def network(width, dtype=torch.float32):
    """With a buffer, a tensor without elements, and a bias that two layers share."""
    made = nn.Sequential(nn.Linear(8, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 5))
    made.add_module("last", nn.Linear(5, 5))
    made.last.bias = made[3].bias
    made.register_buffer("none", torch.empty(0))
    return made.to(dtype).eval()


@pytest.fixture
def models():
    torch.manual_seed(1)
    return {"law": network(640), "code": network(640), "chat": network(33), "half": network(16, torch.float64)}


def test_models_take_turns(models, tmp_path):
    x = {name: torch.randn(3, 8, dtype=model[0].weight.dtype) for name, model in models.items()}
    want = {name: model(x[name]).detach() for name, model in models.items()}
    keys = {name: list(model.state_dict()) for name, model in models.items()}
    largest = max(sum(t.nbytes for t in m.state_dict().values()) for m in models.values())
    with headgate.ModelPool(models, int(2.4 * largest), "lru", tmp_path) as pool:
        assert pool.engine.places.slots == 2
        assert pool.engine.arena.nbytes <= int(2.4 * largest)
        for name in ["law", "code", "law", "chat", "half", "law", "law"]:
            with pool.use(name) as model:
                assert model is models[name]
                assert torch.equal(model(x[name]), want[name])
            assert torch.equal(model(x[name]), want[name])  # outside too, from the lower tier
        stats = pool.stats()
        assert (stats.accesses, stats.hits, stats.loads) == (7, 2, 5)
    for name, model in models.items():
        assert torch.equal(model(x[name]), want[name])
        assert list(model.state_dict()) == keys[name]
        assert all(p.requires_grad for p in model.parameters())
        assert model.last.bias is model[3].bias
        model(x[name]).sum().backward()


def test_rows_go_to_the_model_they_chose(models, tmp_path):
    del models["half"]
    inputs, choice = torch.randn(7, 8), ["code", "law", "code", "chat", "law", "law", "code"]
    want = [models[name](row[None])[0].detach() for name, row in zip(choice, inputs, strict=True)]
    with headgate.ModelPool(models, "67%", "lru", tmp_path) as pool:
        with pool.use("chat"):
            pass
        got = pool.map(choice, inputs, lambda model, rows: model(rows))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)
        stats = pool.stats()
        assert stats.hits == 3  # chat was there, and the two after it were fetched while others computed
        assert stats.used == 2


def test_threads_at_once(models, tmp_path):
    """Four at a time in two slots, some of them on the same model."""
    del models["half"]
    x = torch.randn(3, 8)
    want = {name: model(x).detach() for name, model in models.items()}
    wrong, done = [], []
    with headgate.ModelPool(models, "67%", "lru", tmp_path) as pool:

        def run(offset):
            for i in range(20):
                name = [*models][(i * offset + offset) % 3]
                with pool.use(name) as model:
                    if not torch.equal(model(x), want[name]):
                        wrong.append(name)
            done.append(offset)

        threads = [threading.Thread(target=run, args=(n,)) for n in range(1, 5)]
        for t in threads:
            t.start()
        for t in threads:
            t.join(60)
    assert sorted(done) == [1, 2, 3, 4]
    assert not wrong


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"models": {}}, ValueError, "models must not be empty"),
        ({"models": {"a": 3}}, TypeError, "models must be modules, got int for 'a'"),
        ({"budget": "1%"}, ValueError, "budget must be at least"),
        ({"policy": "fifo"}, ValueError, "name must be one of"),
        ({"disk": None}, ValueError, "disk must be a folder"),
    ],
)
def test_bad_input(models, tmp_path, change, kind, message):
    with pytest.raises(kind, match=message):
        headgate.ModelPool(**{"models": models, "budget": "50%", "policy": "lru", "disk": tmp_path, **change})
    assert models["law"][0].weight.requires_grad


def test_unknown_names(models, tmp_path):
    with headgate.ModelPool(models, "50%", "lru", tmp_path) as pool:
        with pytest.raises(ValueError, match="name must be one of law, code, chat, half, got 'art'"), pool.use("art"):
            pass
        with pytest.raises(ValueError, match="a name for each of 2 rows, got 1"):
            pool.map(["law"], torch.randn(2, 8), lambda model, rows: model(rows))
    twice = models["law"]
    with pytest.raises(ValueError, match="must be different objects"):
        headgate.ModelPool({"a": twice, "b": twice}, "50%", "lru", tmp_path)


def test_it_does_not_close_over_a_model_in_use(models, tmp_path):
    pool = headgate.ModelPool(models, "50%", "lru", tmp_path)
    with pool.use("law"), pytest.raises(RuntimeError, match="must not be in use"):
        pool.close()
    pool.close()
    pool.close()
