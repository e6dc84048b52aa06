"""headgate.record: the trace is what the routers chose, and the model is left as it was."""

import tracemalloc

import numpy as np
import pytest
import torch
from torch import nn

from headgate.moe.record import record


def olmoe(**changes):
    transformers = pytest.importorskip("transformers")
    shape = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 8,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 32,
        "pad_token_id": None,
        "eos_token_id": None,
    }
    return transformers.OlmoeForCausalLM(transformers.OlmoeConfig(**shape | changes))


def ids(rows=2, length=7, seed=0):
    return torch.randint(0, 32, (rows, length), generator=torch.Generator().manual_seed(seed))


def hooks(model):
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def test_the_trace_is_what_the_routers_chose():
    model = olmoe()
    batches = [ids(2, 7), ids(1, 5, seed=1)]
    trace = record(model, batches, weights=True)
    assert trace.expert_ids.shape == (3, 19, 2)
    assert trace.num_experts == 6
    assert trace.sequence.tolist() == [0] * 7 + [1] * 7 + [2] * 5
    assert trace.layer_names == tuple(f"model.layers.{i}.mlp.experts" for i in range(3))
    with torch.no_grad():
        logits = [model(input_ids=b, output_router_logits=True).router_logits for b in batches]
    for layer in range(3):
        scores = torch.cat([one[layer] for one in logits]).softmax(-1)
        weight, chosen = scores.topk(2, dim=-1)
        np.testing.assert_array_equal(trace.expert_ids[layer], chosen.numpy())
        np.testing.assert_allclose(trace.weights[layer], weight.numpy(), atol=1e-3)


def test_a_swapped_model_and_gpt_oss_names():
    from headgate.moe.hf import replace

    transformers = pytest.importorskip("transformers")
    model = transformers.GptOssForCausalLM(
        transformers.GptOssConfig(
            vocab_size=32, hidden_size=16, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, head_dim=8,
            num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=32,
            pad_token_id=None, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        )
    )  # fmt: skip
    before = record(model, [ids()])
    replace(model)
    after = record(model, [ids()])
    assert before.expert_ids.shape == (2, 14, 2)
    np.testing.assert_array_equal(before.expert_ids, after.expert_ids)


def test_headgate_layers_are_heard_by_their_routing():
    from headgate.moe.layer import MoE

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(32, 16)
            self.layers = nn.ModuleList(MoE(16, 8, num_experts, top_k=2) for num_experts in (4, 6))

        def forward(self, input_ids):
            x = self.embed(input_ids)
            for layer in self.layers:
                x = x + layer(x)
            return x

    model = Model()
    trace = record(model, [ids()], weights=True)
    assert trace.layer_names == ("layers.0", "layers.1")
    assert trace.experts_of_layer.tolist() == [4, 6]
    np.testing.assert_array_equal(trace.expert_ids[1], model.layers[1].last_routing.expert_ids)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_parts_of_a_model_are_passed_over():
    from headgate.moe.layer import MoE

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.moe = nn.Embedding(32, 16), MoE(16, 8, 4, top_k=2)
            self.scripted = torch.jit.script(nn.Linear(16, 16))

        def forward(self, input_ids):
            return self.moe(self.scripted(self.embed(input_ids)))

    trace = record(Model(), ids(), weights=True)
    assert trace.layer_names == ("moe",)
    assert trace.expert_ids.shape == (1, 14, 2)


def test_one_batch_needs_no_list():
    model = olmoe()
    listed = record(model, [ids()])
    for batch in (ids(), {"input_ids": ids()}):
        np.testing.assert_array_equal(record(model, batch).expert_ids, listed.expert_ids)


def test_padding_is_left_out_and_max_tokens_cuts():
    model = olmoe()
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    batch = {"input_ids": ids(2, 5), "attention_mask": mask}
    assert record(model, [batch]).sequence.tolist() == [0] * 3 + [1] * 5
    assert record(model, iter([batch] * 50), max_tokens=10).sequence.tolist() == [0] * 3 + [1] * 5 + [2] * 2


def test_the_model_is_left_as_it_was_even_after_an_error():
    model = olmoe().train()
    model.model.layers[1].eval()
    modes = [m.training for m in model.modules()]
    before = hooks(model)

    def batches():
        yield ids()
        raise RuntimeError("the disk is gone")

    with pytest.raises(RuntimeError, match="disk"):
        record(model, batches())
    assert [m.training for m in model.modules()] == modes
    assert hooks(model) == before
    record(model, [ids()])
    assert [m.training for m in model.modules()] == modes
    assert hooks(model) == before


class Experts(nn.Module):
    """The boundary with ids given from outside, to see sentinels and layers that differ."""

    def __init__(self, chosen, num_experts):
        super().__init__()
        self.chosen, self.num_experts = chosen, num_experts

    def forward(self, hidden_states, top_k_index, top_k_weights):
        return hidden_states


class Stack(nn.Module):
    def __init__(self, *layers, repeat=1):
        super().__init__()
        self.layers, self.repeat = nn.ModuleList(layers), repeat

    def forward(self, input_ids):
        x = torch.zeros(input_ids.numel(), 4)
        for layer in [*self.layers] * self.repeat:
            layer(x, top_k_weights=torch.ones(layer.chosen.shape), top_k_index=layer.chosen)


def test_layers_of_different_sizes_and_ids_that_mean_none():
    model = Stack(Experts(torch.tensor([[3, 1], [4, -1]]), 4), Experts(torch.tensor([[299], [7]]), 300))
    trace = record(model, [ids(1, 2)], weights=True)
    assert trace.expert_ids.dtype == np.uint16
    none = trace.none
    assert trace.expert_ids.tolist() == [[[3, 1], [none, none]], [[299, none], [7, none]]]
    assert trace.weights.tolist() == [[[1, 1], [0, 0]], [[1, 0], [1, 0]]]
    assert trace.experts_of_layer.tolist() == [4, 300]


def test_what_cannot_be_recorded_is_refused():
    fine = Experts(torch.zeros(2, 1, dtype=torch.long), 4)
    with pytest.raises(ValueError, match="must have MoE layers, got a Linear"):
        record(nn.Linear(2, 2), [])
    with pytest.raises(ValueError, match="at least one token"):
        record(Stack(fine), [])
    with pytest.raises(ValueError, match=r"second run of layers\.0"):
        record(Stack(fine, repeat=2), [ids(1, 2)])
    with pytest.raises(ValueError, match="must see the batch's tokens, got 2"):
        record(Stack(fine), [ids(1, 3)])
    with pytest.raises(ValueError, match=r"input_ids must be a tensor \[B, S\], got \(3,\)"):
        record(Stack(fine), [torch.zeros(3, dtype=torch.long)])
    with pytest.raises(TypeError, match="must be a tensor of input ids or a dict"):
        record(Stack(fine), ["def main():"])
    with pytest.raises(ValueError, match="max_tokens must be at least 1, got 0"):
        record(Stack(fine), [], max_tokens=0)


def test_a_sample_is_whole_sequences_and_the_same_for_the_same_seed():
    model = olmoe()
    batches = [ids(2, 6, seed=i) for i in range(40)]
    whole = record(model, batches, weights=True)
    part = record(model, batches, weights=True, sample=0.25, seed=3)
    kept = np.isin(whole.sequence, part.sequence)
    np.testing.assert_array_equal(part.expert_ids, whole.expert_ids[:, kept])
    np.testing.assert_array_equal(part.weights, whole.weights[:, kept])
    np.testing.assert_array_equal(part.sequence, whole.sequence[kept])
    assert 8 <= len(set(part.sequence.tolist())) <= 34  # of 80: 20 expected
    again = record(model, batches, sample=0.25, seed=3)
    np.testing.assert_array_equal(part.sequence, again.sequence)
    assert part.sequence.tolist() != record(model, batches, sample=0.25, seed=4).sequence.tolist()


def test_batches_of_which_nothing_is_kept_are_not_run():
    model, runs = olmoe(), []
    model.register_forward_hook(lambda *_: runs.append(1))
    part = record(model, [ids(1, 4)] * 60, sample=0.1)
    assert len(runs) == len(set(part.sequence.tolist())) < 30


def test_a_streamed_trace_is_the_one_in_memory(tmp_path):
    model = olmoe()
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    batches = [{"input_ids": ids(2, 5, seed=i), "attention_mask": mask} for i in range(5)]
    for more in ({}, {"weights": True, "max_tokens": 21}, {"sample": 0.5, "seed": 1}):
        expected = record(model, batches, **more)
        with record(model, batches, path=tmp_path / "t.npz", **more) as streamed:
            found = streamed.trace()
        for name in ("expert_ids", "weights", "sequence", "experts_of_layer"):
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
        assert (found.num_experts, found.layer_names) == (expected.num_experts, expected.layer_names)
        assert [p.name for p in tmp_path.iterdir()] == ["t.npz"]


def test_streamed_layers_of_different_sizes(tmp_path):
    model = Stack(Experts(torch.tensor([[3, 1], [4, -1]]), 4), Experts(torch.tensor([[299], [7]]), 300))
    trace = record(model, [ids(1, 2)] * 3, weights=True, path=tmp_path / "t.npz")
    assert trace.shape == (2, 6, 2)
    assert trace.experts_of_layer.tolist() == [4, 300]
    assert next(trace.chunks(0)).tolist() == [[3, 1], [trace.none] * 2] * 3


def test_memory_of_a_streamed_recording_does_not_grow_with_tokens(tmp_path):
    model = Stack(*[Experts(torch.arange(8192).view(4096, 2) % 7, 7) for _ in range(2)])
    batch = ids(4, 1024)

    def peak(count, **more):
        tracemalloc.start()
        try:
            record(model, (batch for _ in range(count)), **more)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    path = tmp_path / "t.npz"
    record(model, batch, path=path)  # whatever is loaded at first use is there
    few, many = (peak(count, path=path) for count in (100, 300))
    assert many < few + 1e5
    assert peak(300) > few + 4e6


def test_a_failure_while_streaming_leaves_the_old_file_and_nothing_else(tmp_path):
    model = olmoe()
    (tmp_path / "t.npz").write_bytes(b"old")

    def batches():
        yield ids()
        raise RuntimeError("the disk is gone")

    with pytest.raises(RuntimeError, match="disk"):
        record(model, batches(), path=tmp_path / "t.npz")
    with pytest.raises(ValueError, match="at least one token"):
        record(model, [], path=tmp_path / "t.npz")
    assert (tmp_path / "t.npz").read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises(FileNotFoundError):
        record(model, [ids()], path=tmp_path / "none" / "t.npz")
    assert hooks(model) == 0


@pytest.mark.parametrize("sample", [0, -1, 1.5, float("nan")])
def test_a_sample_is_a_share(sample):
    with pytest.raises(ValueError, match="sample must be above 0 and at most 1"):
        record(olmoe(), [ids()], sample=sample)
