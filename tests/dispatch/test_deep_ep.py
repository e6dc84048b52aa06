"""DeepEP where it is not installed: its checks on a model of ElasticBuffer over gloo, and what it says is missing."""

import importlib.util
import inspect
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks_runner import cases_of, passed_on_every_rank, ranks_fixture

from headgate.dispatch import ENGINES, DeepEP, Dispatcher

RANKS = Path(__file__).with_name("deep_ep_ranks.py")
results = ranks_fixture(RANKS)
SIZES = {"max_tokens": 8, "hidden_size": 256, "top_k": 2}


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(("size", "check"), cases_of(RANKS, [4]))
def test_on_a_model_of_its_kernels(results, size, check):
    passed_on_every_rank(results(size), check)


def test_every_engine_is_a_dispatcher_and_says_whether_it_can_run():
    for engine in ENGINES.values():
        assert all(hasattr(engine, name) for name in ("local_experts", "dispatch", "combine"))
        assert engine.why_not() is None or "must" in engine.why_not()


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"hidden_size": 384}, "hidden_size must be a multiple of 256, got 384"),
        ({"hidden_size": 0}, "hidden_size must be a multiple of 256, got 0"),
        ({"top_k": 33}, "top_k must be between 1 and 32, got 33"),
    ],
)
def test_sizes_that_the_kernels_do_not_take(sizes, words):
    with pytest.raises(ValueError, match=f"^DeepEP: {words}$"):
        DeepEP(**SIZES | sizes)


def test_what_is_missing_is_said_in_the_order_of_need(group, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"^DeepEP: device must be a CUDA GPU, got none that torch sees$"):
        DeepEP(**SIZES)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    with pytest.raises(ValueError, match=r"^DeepEP: device must have compute capability 9\.0, got 8\.9$"):
        DeepEP(**SIZES)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    if importlib.util.find_spec("deep_ep") is None:
        with pytest.raises(ValueError, match=r"^DeepEP: deep_ep must be installed \(python setup\.py .* got no"):
            DeepEP(**SIZES)
    monkeypatch.setattr(DeepEP, "why_not", staticmethod(lambda: None))
    with pytest.raises(ValueError, match=r"^DeepEP: group must work on NCCL for CUDA, got gloo$"):
        DeepEP(**SIZES)


def test_it_needs_torch_distributed():
    with pytest.raises(ValueError, match=r"DeepEP: group must be given, or torch\.distributed be initialised"):
        DeepEP(**SIZES)


@pytest.mark.gpu
def test_the_installed_deep_ep_takes_what_it_is_given():
    """The model in elastic.py is as good as this: every argument that it and DeepEP name, the real one has."""
    real = pytest.importorskip("deep_ep").ElasticBuffer
    used = {
        "__init__": {"group", "num_max_tokens_per_rank", "hidden", "num_topk", "deterministic"},
        "dispatch": {
            *("x", "topk_idx", "topk_weights", "num_experts", "num_max_tokens_per_rank", "num_sms", "handle"),
        },
        "combine": {"x", "handle", "topk_weights"},
    }
    for method, names in used.items():
        assert names <= set(inspect.signature(getattr(real, method)).parameters)
    assert isinstance(DeepEP.__new__(DeepEP), Dispatcher)
