"""The examples in the docstrings of modules and of the operations beneath them run and say what they say."""

import doctest
import sys
from importlib import import_module

import pytest
import torch

import headgate
from headgate.kernels import Routing, grouped_linear, linear_memory, newton_schulz, topk
from headgate.moe.ranks.whole import share_out

MODULES = [
    *("moe.experts", "moe.layer", "moe.shared", "moe.routers.softmax", "moe.routers.sigmoid"),
    *("moe.bias", "moe.capacity", "moe.free", "moe.muon", "moe.memory", "moe.mom", "moe.ranks.whole"),
    *("moe.routers.bilevel", "kernels.newton_schulz", "kernels.linear_memory"),
    *(
        f"moe.routers.{name}"
        for name in (
            *("cosine", "expert_choice", "hash", "locmoe", "longcat", "moepp", "pregate", "quantile", "recurrent"),
            *("reinforce", "relu", "sinkhorn", "top_p"),
        )
    ),
    *("kernels.topk", "kernels.grouped_linear", "kernels.grouped_ffn"),
]
NAMES = {"torch": torch, "headgate": headgate, "Routing": Routing, "grouped_linear": grouped_linear, "topk": topk}
NAMES |= {"linear_memory": linear_memory, "newton_schulz": newton_schulz, "share_out": share_out}


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    import_module(f"headgate.{name}")
    module = sys.modules[f"headgate.{name}"]  # kernels.topk the attribute is the function
    result = doctest.testmod(module, extraglobs=NAMES)
    assert result.attempted
    assert not result.failed
