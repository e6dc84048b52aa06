"""The harness of `headgate bench moe`, end to end on tiny shapes. No test asserts a time."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from headgate.bench import memory, moe
from headgate.bench.bounds import Matmuls
from headgate.bench.case import Bench, Settings, _ratios
from headgate.bench.figures import FIGURES
from headgate.bench.measure import Contestant, interleave, sample
from headgate.bench.report import case_lines, figure_lines
from headgate.bench.rivals import IMPLEMENTATIONS
from headgate.bench.shapes import SHAPES, UNSCALED, Case, make_parameters, make_problem

RIVALS = ("plain", "eager", "batched_mm", "grouped_mm", "sorted")


def tiny(name: str):
    return replace(SHAPES[name], hidden=32, intermediate=16, experts=6, top_k=2)


def settings(**changes) -> Settings:
    return Settings(**{"rivals": RIVALS, "budget_s": 0.05} | changes)


@pytest.mark.parametrize("name", list(SHAPES))
def test_every_family_is_measured_by_every_implementation(name):
    result = Bench(settings()).run(Case(tiny(name), 24, "bf16", "train"))
    assert list(result["implementations"]) == ["headgate", *RIVALS, "matmuls", "dense"]
    for who, found in result["implementations"].items():
        assert found["min_s"] <= found["median_s"] <= found["max_s"], who
        assert found["samples_s"]
    assert set(result["memory"]["kept_bytes"]) == {"headgate", *RIVALS}
    json.dumps(result)
    assert len(case_lines(result)) > len(result["implementations"])


def test_ratios_are_the_quotients_of_the_medians():
    result = Bench(settings()).run(Case(tiny("qwen3"), 16, "fp32", "forward"))
    times = {n: i["median_s"] for n, i in result["implementations"].items()}
    ratios = result["ratios"]
    for name, ratio in ratios["times_headgate"].items():
        assert ratio == times[name] / times["headgate"]
    best = min(("eager", "batched_mm", "grouped_mm"), key=times.__getitem__)
    assert ratios["best"] == {"name": best, "times_headgate": times[best] / times["headgate"]}
    assert ratios["share_of_matmuls"] == times["matmuls"] / times["headgate"]
    assert ratios["share_of_read"] == pytest.approx(
        result["bytes_hit"] / (ratios["read_GBps"] * 1e9) / times["headgate"], rel=1e-12
    )


def _scaled(factor):
    def build(problem):
        forward = IMPLEMENTATIONS["sorted"](problem)
        return lambda x, ids, weights: forward(x, ids, weights) * factor

    return build


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, *grads):
        return grads[0] * 1.1


def _wrong_backward(problem):
    forward = IMPLEMENTATIONS["sorted"](problem)
    return lambda x, ids, weights: _WrongGradient.apply(forward(x, ids, weights))


def _wrong_when_large(problem):
    """Right on the small check, wrong on the case itself."""
    forward = IMPLEMENTATIONS["sorted"](problem)
    return lambda x, ids, weights: forward(x, ids, weights) * (1.1 if x.shape[0] > 40 else 1.0)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (_scaled(1.1), "output"),
        (_wrong_backward, "gradient"),
        (_wrong_when_large, "output"),
        (_scaled(torch.nan), "off"),
    ],
    ids=["output", "gradient", "only at size", "nan"],
)
def test_wrong_numbers_get_no_time(wrong, says):
    bench = Bench(settings(rivals=("broken", "sorted"), implementations=dict(IMPLEMENTATIONS) | {"broken": wrong}))
    result = bench.run(Case(tiny("olmoe"), 48, "fp32", "train"))
    broken = result["implementations"]["broken"]
    assert list(broken) == ["refused"]
    assert says in broken["refused"]
    assert "median_s" in result["implementations"]["sorted"]
    assert "broken" not in result["ratios"]["times_headgate"]
    assert any("refused" in line for line in case_lines(result))


def test_headgate_refused_leaves_no_ratio():
    bench = Bench(settings(rivals=("sorted",), implementations=dict(IMPLEMENTATIONS) | {"headgate": _scaled(0.5)}))
    result = bench.run(Case(tiny("qwen3"), 24, "fp32", "forward"))
    assert "refused" in result["implementations"]["headgate"]
    assert result["ratios"] == {}


def test_too_much_memory_or_time_is_skipped_with_the_reason():
    bench = Bench(settings(rivals=("batched_mm", "eager"), memory_bytes=1000, limit_s=0.0))
    found = bench.run(Case(tiny("qwen3"), 24, "fp32", "train"))["implementations"]
    assert "GiB" in found["batched_mm"]["skipped"]
    assert "limit 0" in found["eager"]["skipped"]
    huge = Bench(settings()).run(Case(replace(UNSCALED["deepseek"], experts=10**6), 16, "fp32", "train"))
    assert "are free" in huge["skipped"]
    assert "skipped" in case_lines(huge)[1]


def test_kept_bytes_are_the_promise_and_grouped_mm_keeps_more():
    problem = make_problem(tiny("gpt-oss"), 24, torch.bfloat16, make_parameters(tiny("gpt-oss"), torch.bfloat16))
    # rows 24*32, H 24*2*2*16, weights 24*2 in bf16; ids 24*2 in int32
    assert problem.bytes_kept() == 2 * (24 * 32 + 24 * 2 * 32 + 48) + 4 * 48
    assert memory.saved_bytes(problem, IMPLEMENTATIONS["headgate"](problem)) == problem.bytes_kept()
    assert memory.saved_bytes(problem, IMPLEMENTATIONS["grouped_mm"](problem)) > problem.bytes_kept()


def test_peak_memory_counts_the_gradients():
    reason = memory.measurable()
    if reason:
        pytest.skip(reason)
    found = memory.peak(SHAPES["qwen3"], 16, "bf16", "sorted", threads=1)
    weights = 64 * 3 * 1024 * 512 * 2
    assert found["gradient_bytes"] == weights + 2 * (16 * 1024 + 16 * 8)
    assert 0.95 * weights < found["backward_bytes"] < 1.5 * weights


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_the_bound_multiplies_what_the_implementations_multiply(name):
    shape = tiny(name)
    problem = make_problem(shape, 24, torch.float32, make_parameters(shape, torch.float32))
    with FlopCounterMode(display=False) as ours:
        Matmuls(problem, train=True)(0)
    with FlopCounterMode(display=False) as dense:
        Matmuls(problem, train=True, dense=True)(0)
    assert ours.get_total_flops() == dense.get_total_flops() == 18 * 24 * 2 * 32 * 16


def test_one_token_meets_other_experts_in_every_call():
    problem = make_problem(tiny("qwen3"), 1, torch.float32, make_parameters(tiny("qwen3"), torch.float32))
    assert sorted(torch.cat([ids for ids, _ in problem.routings]).flatten().tolist()) == list(range(6))


def test_turns_are_taken_and_slow_ones_take_fewer():
    order: list[str] = []
    who = {
        "a": Contestant(lambda _: order.append("a"), first_s=0.01),
        "b": Contestant(lambda _: order.append("b"), first_s=0.01),
        "slow": Contestant(lambda _: order.append("slow"), first_s=0.5),
        "endless": Contestant(lambda _: order.append("endless"), first_s=9.0),
    }
    assert interleave(who, budget_s=1.0, rounds=(3, 5)) == 5
    assert order == ["a", "b", "slow", *"ba", *"ab", *"ab", *"ab"]
    assert who["endless"].samples_s == [9.0]
    assert "first call" in who["endless"].note


def test_before_and_after_surround_every_sample():
    order: list[str] = []
    who = Contestant(*(lambda *_, w=w: order.append(w) for w in ("run", "after", "before")), calls=2)
    sample(who, 0)
    assert order == ["before", "run", "run", "after"]


def _run(*argv: str) -> int:
    parser = argparse.ArgumentParser()
    moe.add_arguments(parser)
    return moe.run(parser.parse_args([*argv]))


def test_command_writes_what_it_prints(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(SHAPES, "qwen3", tiny("qwen3"))
    target = tmp_path / "out.json"
    options = ["--shapes", "qwen3", "--tokens", "1", "24", "--dtypes", "fp32", "--budget", "0.05", "--no-peak"]
    assert _run(*options, "--json", str(target)) == 0
    report = json.loads(target.read_text())
    assert report["version"] == 1
    assert {"cpu", "isa", "threads", "torch", "transformers", "headgate_form"} <= set(report["machine"])
    assert [(c["tokens"], c["pass"]) for c in report["cases"]] == [
        (1, "forward"), (1, "train"), (24, "forward"), (24, "train"),
    ]  # fmt: skip
    text = capsys.readouterr().out
    assert report["machine"]["headgate_form"] in text
    assert text.count("of the bare matmuls") == 4
    assert [p.name for p in tmp_path.iterdir()] == ["out.json"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--clock", "cpu"], "--threads 1"),
        (["--budget", "-1"], "--budget must be positive"),
    ],
)
def test_bad_options_are_said_before_anything_runs(options, says, capsys):
    assert _run(*options) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "says"),
    [(["--device", "tpu"], "--device: must be cpu"), (["--json", "/nonexistent/x.json"], "--json: must be a file")],
)
def test_odd_values_are_refused_by_the_parser(options, says, capsys):
    with pytest.raises(SystemExit):
        _run(*options)
    assert says in capsys.readouterr().err


def test_figures_know_short_from_reached():
    share = next(f for f in FIGURES if f.reach == 0.80)
    decode = next(f for f in FIGURES if f.or_share == 0.8)

    def result(ours, **times):
        found = {"headgate": {"median_s": ours}} | {n: {"median_s": t} for n, t in times.items()}
        made = {"implementations": found, "bytes_hit": 1e6, "memory": {}}
        return made | {"ratios": _ratios(made)}

    rows = [share.row(result(1.0, matmuls=m)) for m in (0.79, 0.80, 0.92)]
    assert [r["verdict"] for r in rows] == ["short", "PASS", "stretch"]
    assert decode.row(result(1.0, eager=1.65, grouped_mm=1.7))["verdict"] == "PASS"
    # 1 MB at 256 MiB/s takes 3.7 ms: close enough to the read bound counts as the stretch
    assert decode.row(result(0.004, eager=0.005, read=1.0))["verdict"] == "stretch"
    missing = {"implementations": {"headgate": {"refused": "wrong"}}, "ratios": {}, "memory": {}}
    rows.append(share.row(missing))
    assert rows[-1]["verdict"] == "not measured"
    assert "wrong" in rows[-1]["aside"]
    assert len(figure_lines(rows)) == 2 + len(rows)
