"""Swapped experts under torch.compile: one graph, gradients included, and a swap that a graph has not seen yet."""

from __future__ import annotations

import pytest
import torch

import headgate
import headgate.hf


class TestCompile:
    INTERFACE = ("olmoe", "gpt_oss", "muse_spark", "inkling2", "nemotron_h")
    OTHERS = ("llama4", "longcat_flash", "dbrx", "doge", "step3p7")

    @pytest.mark.parametrize(
        ("name", "way"),
        [
            *((n, "swap") for n in INTERFACE + OTHERS),
            (INTERFACE[0], "experts implementation"),
            *(pytest.param(n, "experts implementation", marks=pytest.mark.slow) for n in INTERFACE[1:]),
        ],
    )
    @pytest.mark.filterwarnings("ignore")
    def test_one_graph(self, build, name, way, assert_close):
        """The experts alone, called for the first time inside the graph: nothing may break it, gradients included."""
        torch._dynamo.reset()
        family = build(name)
        twin = family.clone()
        report = headgate.replace(twin)
        path = report.replaced[0].rpartition(".")[0] if name == "llama4" else report.replaced[0]
        heard = []
        hook = family.model.get_submodule(path).register_forward_pre_hook(
            lambda _m, args, kwargs: heard.append((*args, *kwargs.values())), with_kwargs=True
        )
        family.model(**family.inputs)
        hook.remove()
        original = family.model.get_submodule(path)
        args = [a.detach().requires_grad_() if a.is_floating_point() else a for a in heard[0]]
        ours = twin.get_submodule(path)
        if way == "experts implementation":
            headgate.restore(twin)
            headgate.hf.register()
            twin.set_experts_implementation("headgate")
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")

        def tensor(out):
            return out[0] if isinstance(out, tuple) else out

        want, got = tensor(original(*args)), tensor(compiled(*args))
        assert_close(got, want)
        one, two = (torch.autograd.grad(y.square().sum(), args[0]) for y in (got, want))
        assert_close(one[0], two[0], scale=2)
        if way == "swap":
            assert report.compiled == [report.replaced[0]]
            assert "compiled graphs" in str(report)

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore")
    def test_a_swap_after_compiling_is_seen_by_the_graph(self, build, assert_close):
        torch._dynamo.reset()
        olmoe = build("olmoe")
        olmoe.model.set_experts_implementation("grouped_mm")
        compiled = torch.compile(olmoe.model, fullgraph=True, backend="aot_eager")
        want = compiled(**olmoe.inputs).loss
        report = headgate.replace(olmoe.model)
        assert report.compiled == []
        assert_close(compiled(**olmoe.inputs).loss, want)
        assert report.compiled == report.replaced
        headgate.restore(olmoe.model)
        assert_close(compiled(**olmoe.inputs).loss, want)

    def test_whole_model(self, build, assert_same_step):
        torch._dynamo.reset()
        olmoe = build("olmoe")
        want = olmoe.step()
        headgate.replace(olmoe.model)
        compiled = torch.compile(olmoe.model, fullgraph=True, backend="aot_eager")
        for _ in range(3):  # counting must not recompile: the limit would end the graph
            olmoe.model.zero_grad()
            loss = compiled(**olmoe.inputs).loss
            loss.backward()
        assert_same_step((loss.detach(), {n: p.grad for n, p in olmoe.model.named_parameters()}), want)
