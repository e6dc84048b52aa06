"""The roofline: arithmetic against closed forms, and against the tensors that the kernels are given."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

from headgate import cli
from headgate.bench.gpu import roofline
from headgate.bench.gpu.record import record
from headgate.bench.gpu.roofline import Roof, least, saved_bytes, stages, summary
from headgate.bench.gpu.shapes import MODELS, SONIC, SONIC_TOKENS, STANDARD, experts_hit, problem_on, tokens_of
from headgate.kernels import grouped_ffn
from headgate.kernels.chip import H200

CASES = [(s, t) for s in STANDARD.values() for t in tokens_of(s)]


def test_the_standard_shapes_are_all_there():
    assert list(MODELS) == ["mixtral", "qwen3", "olmoe", "gpt-oss", "deepseek", "qwen3-next", "gpt-oss-tp8"]
    assert len(SONIC) == len(SONIC_TOKENS) == 11
    assert min(t for _, t in CASES) == 1
    assert max(t for _, t in CASES) == 65536


@pytest.mark.parametrize("name", list(STANDARD))
def test_products_cost_6ndf_forward_and_12ndf_backward(name):
    shape = STANDARD[name]
    for t in tokens_of(shape):
        ndf = t * shape.top_k * shape.hidden * shape.intermediate
        assert sum(s.flops for s in stages(shape, t, "forward")) == 6 * ndf
        assert sum(s.flops for s in stages(shape, t, "slots")) == 6 * ndf
        assert sum(s.flops for s in stages(shape, t, "backward")) == 12 * ndf
        router = 2 * t * shape.hidden * shape.experts
        assert sum(s.flops for s in stages(shape, t, "decode")) == 6 * ndf + router
        assert least(shape, t, "forward").flops == 6 * ndf


@pytest.mark.parametrize(("name", "tokens"), [("qwen3", 1), ("qwen3", 8), ("gpt-oss", 64), ("olmoe", 4096)])
def test_experts_hit_is_what_random_routing_hits(name, tokens):
    shape = STANDARD[name]
    tries = max(1, 512 // tokens)
    ids = torch.rand(tries, tokens, shape.experts).topk(shape.top_k, dim=2).indices.flatten(1)
    hit = sum(row.unique().numel() for row in ids) / tries
    assert experts_hit(shape, tokens) == pytest.approx(hit, rel=0.03)


def test_one_token_of_qwen3_by_hand():
    """8 experts of 3 * 2048 * 768 weights in bf16 are 75.5 MB: 17.6 us at 4.3 TB/s."""
    found = summary(MODELS["qwen3"], 1, "decode", Roof(4300, 790))
    launches = {x["name"]: x for x in found["launches"]}
    weights = 8 * 3 * 2048 * 768 * 2
    assert found["least_bytes"] == pytest.approx(weights, rel=1e-3)
    assert launches["up"]["floor_us"] + launches["down"]["floor_us"] == pytest.approx(weights / 4300e3, rel=2e-3)
    assert {x["bound"] for x in found["launches"]} == {"bytes"}
    assert sum(x["share"] for x in found["launches"]) == pytest.approx(1)


def test_saved_bytes_are_what_autograd_keeps():
    from headgate.bench.memory import saved_bytes as kept

    for name in ("qwen3", "gpt-oss"):
        from dataclasses import replace

        small = replace(STANDARD[name], hidden=32, intermediate=16, experts=6, top_k=2)
        problem = problem_on("cpu", small, 10)

        def forward(x, ids, weights, problem=problem, small=small):
            from headgate.bench.shapes import as_routing

            p = problem.parameters
            return grouped_ffn(
                x, as_routing(small, ids, weights), p["gate_up_proj"], p["down_proj"],
                b_gate_up=p.get("gate_up_proj_bias"), b_down=p.get("down_proj_bias"), activation=small.form,
                transposed=small.transposed, interleaved=small.interleaved,
            )  # fmt: skip

        assert kept(problem, forward) == saved_bytes(small, 10, weight_itemsize=2) == problem.bytes_kept()


# stage of the model -> kernel, and which of the pass's launches of that kernel it is
KERNELS = {
    "forward": {"up": ("up_kernel", 0), "down": ("rows_kernel", 0), "combine": ("combine_kernel", 0)},
    "backward": {
        "back": ("back_kernel", 0), "router_grad": ("router_grad_kernel", 0), "dw_down": ("dw_kernel", 0),
        "dw_up": ("dw_kernel", 1), "dx": ("rows_kernel", 0), "dx_sum": ("combine_kernel", 0),
        "db_down": ("column_sum_kernel", 0), "db_up": ("column_sum_kernel", 1),
    },
    "slots": {
        "up": ("up_kernel", 0), "down": ("rows_kernel", 0), "spread": ("spread_kernel", 0),
        "combine": ("combine_kernel", 0),
    },
}  # fmt: skip


@pytest.mark.parametrize(("name", "kind"), itertools.product(["qwen3", "gpt-oss", "sonic-4096-256-256-16"], KERNELS))
def test_the_models_bytes_are_those_of_the_tensors_that_the_kernels_get(name, kind):
    """With many tokens every expert is hit, so that each tensor given to a kernel is read or written once, whole."""
    pytest.importorskip("triton")
    shape = STANDARD[name]
    launches = record(shape, 32768, kind, H200)
    parts = next((x.tensors()["parts"].shape[0] for x in launches if x.name == "back_kernel"), 1)
    model = {s.name: s for s in stages(shape, 32768, kind, columns=-(-shape.intermediate // parts)) if s.name != "plan"}
    assert set(model) <= set(KERNELS[kind])
    for stage, found in model.items():
        kernel, nth = KERNELS[kind][stage]
        launched = [x for x in launches if x.name == kernel][nth]
        given = {id(t): t.numel() * t.element_size() for n, t in launched.tensors().items() if _used(n, launched)}
        assert sum(given.values()) == pytest.approx(found.bytes, rel=0.02), (stage, list(launched.tensors()))


def _used(name: str, launched) -> bool:
    """Pointers that stand in for what a variant of the kernel does not have are not read."""
    a = launched.arguments
    gathers, bias = a.get("GATHER", True), a.get("BIAS", True)
    flags = {"bias": bias, "h": a.get("KEEP", True), "weights": a.get("WEIGHTED", gathers), "pair_of_row": gathers}
    if launched.name == "router_grad_kernel":
        flags |= {"grad": bias, "expert_ids": bias}
    return bool(flags.get(name, True))


@pytest.mark.parametrize("tokens", [1, 4, 5, 64, 4096])
def test_the_model_has_as_many_launches_as_the_operation_makes(tokens):
    pytest.importorskip("triton")
    names = [x.name for x in record(MODELS["qwen3"], tokens, "inference", H200)]
    products = [n for n in names if n not in ("_rank", "_count", "_place")]
    model = [s.name for s in stages(MODELS["qwen3"], tokens, "decode")][2:]  # without router and topk
    assert len(products) == len([n for n in model if n != "plan"])
    assert ("plan" in model) == (len(products) < len(names))


def test_few_tokens_hit_few_experts_and_no_more_than_there_are():
    shape = MODELS["deepseek"]
    hit = [experts_hit(shape, t) for t in (1, 2, 64, 65536)]
    assert hit[0] == pytest.approx(8)
    assert hit == sorted(hit)
    assert hit[-1] <= 256


def test_the_command_prints_every_launch_and_writes_json(tmp_path, capsys):
    file = tmp_path / "roof.json"
    argv = ["bench", "roofline", "--shapes", "qwen3", "--tokens", "1", "4096", "--tflops", "790", "--json", str(file)]
    assert cli.main(argv) == 0
    said = capsys.readouterr().out
    report = json.loads(file.read_text())
    assert report["tflops"] == 790
    assert [(p["tokens"], p["pass"]) for p in report["passes"]] == [
        (1, "forward"), (1, "backward"), (1, "decode"), (1, "slots"),
        (4096, "forward"), (4096, "backward"), (4096, "slots")
    ]  # fmt: skip
    for p in report["passes"]:
        assert p["floor_us"] == pytest.approx(sum(x["floor_us"] for x in p["launches"]))
        assert p["floor_us"] >= p["least_floor_us"]
        assert all(x["name"] in said for x in p["launches"])
    assert cli.main(["bench", "roofline", "--tokens", "0"]) == 2
    assert len(roofline.lines(report["passes"][0], sums=True)) == 1
