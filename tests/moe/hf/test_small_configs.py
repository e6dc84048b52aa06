"""The rules that make a configuration small, on a class that no release of transformers has."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from small_configs import small_values, smaller

pytest.importorskip("transformers")


@dataclass
class Coming:
    """A family to come: names of its own, relations between its fields, kinds of layers by rule."""

    vocab_size: int = 100_000
    hidden_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    swa_num_attention_heads: int = 48
    swa_head_dim: int = 128
    loop_layer_start: int = 6
    loop_layer_end: int = 18
    layers_per_block: int = 6
    num_experts_per_tok: int = 1
    n_routed_experts: int = 256
    frobnication_width: int = 1111
    use_moe: bool = False
    image_token_id: int = 99_999
    layer_types: list | None = None
    mlp_layer_types: list | None = None
    moe_intermediate_size: int | list = 2048
    rope_parameters: dict | None = None

    def __post_init__(self):
        n = self.num_hidden_layers
        self.layer_types = self.layer_types or ["local" if i % 4 else "global" for i in range(n)]
        self.mlp_layer_types = self.mlp_layer_types or ["dense" if i < 2 else "sparse" for i in range(n)]
        self.rope_parameters = self.rope_parameters or {"rope_theta": 1e4, "mrope_section": [22, 21, 21]}
        if self.loop_layer_start <= 0 or self.loop_layer_start % self.layers_per_block:
            raise ValueError("loop_layer_start must be a positive multiple of layers_per_block")
        if self.loop_layer_end % self.layers_per_block or self.loop_layer_end > n:
            raise ValueError("loop_layer_end must be a multiple of layers_per_block inside the layers")


def test_a_family_to_come():
    small = Coming(**small_values(Coming))
    assert (small.num_hidden_layers, small.loop_layer_start, small.loop_layer_end) == (2, 1, 2)
    assert small.mlp_layer_types == ["sparse", "sparse"]
    assert sorted(small.layer_types) == ["global", "local"]
    assert small.num_attention_heads == small.num_key_value_heads == small.swa_num_attention_heads == 4
    assert (small.n_routed_experts, small.num_experts_per_tok, small.use_moe) == (8, 1, True)
    assert (small.vocab_size, small.swa_head_dim, small.image_token_id) == (64, 8, 1)
    assert sum(small.rope_parameters["mrope_section"]) == 4


def test_changes_go_first():
    assert Coming(**small_values(Coming, hidden_size=48, use_moe=False)).hidden_size == 48


@pytest.mark.parametrize(("shape", "field"), [((1111, 32), "frobnication_width"), ((32, 3333), "frobnication_width")])
def test_what_no_name_says_is_found_by_the_shape_of_a_parameter(shape, field):
    assert smaller(Coming(**small_values(Coming)), shape) == {field: 16}


def test_a_shape_that_no_field_explains():
    assert smaller(Coming(**small_values(Coming)), (7919, 31)) == {}
