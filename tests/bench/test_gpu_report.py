"""`headgate bench --gpu-report` and `sweep`, end to end on the CPU with tiny shapes. No test asserts a time."""

from __future__ import annotations

import json
import os
import time
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from headgate import cli
from headgate.bench.check import WrongNumbers
from headgate.bench.gpu import figures, measure, packed, report
from headgate.bench.gpu.check import check, truth_of
from headgate.bench.gpu.measure import Case, Measurer
from headgate.bench.gpu.report import Child, Report
from headgate.bench.gpu.rivals import RIVALS, NotServed, absent, torch_grouped
from headgate.bench.gpu.roofline import DECODE, Roof, summary
from headgate.bench.gpu.shapes import MODELS, SONIC, STANDARD, problem_on
from headgate.bench.gpu.text import case_lines, floor_us
from headgate.bench.gpu.timing import Clock, Entry, interleave, statistics_of

HERE = ("headgate", "torch", "hf-grouped", "hf-batched", "hf-eager")


@pytest.fixture(autouse=True)
def _one_thread():
    """Tiny shapes: more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny(name: str):
    return replace(STANDARD[name], hidden=32, intermediate=16, experts=6, top_k=2)


def case(name: str, tokens: int, kind: str, **more) -> Case:
    return Case(tiny(name), tokens, kind, budget_s=0.01, contestants=more.pop("contestants", HERE), **more)


@pytest.mark.parametrize("name", ["qwen3", "gpt-oss"])
def test_training_is_measured_for_everybody_who_is_here(name):
    pytest.importorskip("transformers")
    found = Measurer("cpu").run(case(name, 24, "train"))
    assert list(found["contestants"]) == [*HERE, "cublas"]
    for who in ("headgate", "torch", "hf-grouped", "hf-batched", "cublas"):
        assert {"forward", "backward", "step"} <= set(found["contestants"][who]), found["contestants"][who]
        times = found["contestants"][who]["forward"]
        assert times["min_us"] <= times["lower_quartile_us"] <= times["median_us"] <= times["max_us"]
    assert set(found["contestants"]["hf-eager"]) == {"forward"}
    assert found["saved_bytes"]["headgate"] == found["expected_saved_bytes"]
    found |= {
        "copy_GBps": 1.0,
        "roofline": {k: summary(tiny(name), 24, k, Roof(1, 1)) for k in ("forward", "backward")},
    }
    assert floor_us(found, "step") == floor_us(found, "forward") + floor_us(found, "backward")
    assert len(case_lines(found)) > 10
    json.dumps(found)


def test_decoding_takes_other_experts_with_each_call():
    problem = problem_on("cpu", replace(tiny("qwen3"), experts=64), 1, calls=8)
    taken = [set(ids.flatten().tolist()) for ids, _ in problem.routings]
    assert all(not a & b for a, b in pairwise(taken))
    found = Measurer("cpu").run(case("gpt-oss", 4, "decode", contestants=("headgate", "torch")))
    assert found["calls"] == 16
    assert found["weight_bytes"] <= 6 * tiny("gpt-oss").expert_elements * 2
    assert "median_us" in found["contestants"]["torch"]["forward"]


@pytest.mark.parametrize("tokens", [2, DECODE + 1])
def test_formats_of_few_bits_are_checked_and_measured(tokens, monkeypatch):
    small = replace(tiny("qwen3" if tokens == 2 else "gpt-oss"), hidden=64, intermediate=32)
    who = ("headgate", "int4", "Q8_0", "Q4_K")
    few = Case(small, tokens, "packed", budget_s=0.01, contestants=who)
    found = Measurer("cpu").run(few)
    assert found["contestants"]["Q4_K"] == {
        "skipped": f"Q4_K needs sizes that are multiples of 256, not {small.name}'s"
    }
    size = {n: found["contestants"][n]["weight_bytes"] for n in who[:3]}
    bits = {n: 16 * size[n] / size["headgate"] for n in size}
    assert bits == {"headgate": 16, "int4": pytest.approx(4.5, rel=0.1), "Q8_0": 8.5}
    steps = {"forward"} if tokens == 2 else {"forward", "backward", "step"}
    assert all(steps <= set(found["contestants"][n]) for n in who[:3])
    assert sum(" forward " in line for line in case_lines(found)) == 3
    if tokens > 4:  # the backward pass widens by `expert`, too
        return
    monkeypatch.setattr(packed.Quantized, "expert", lambda q, e, dtype: torch.ones(q.shape[1:], dtype=dtype))
    found = Measurer("cpu").run(few)
    assert all("off by" in found["contestants"][n]["refused"] for n in ("int4", "Q8_0"))


@pytest.mark.parametrize("name", ["qwen3", "gpt-oss"])
def test_the_whole_layer_is_checked_and_measured(name):
    found = Measurer("cpu").run(case(name, 1, "layer"))
    assert list(found["contestants"]) == ["headgate"]
    assert found["contestants"]["headgate"]["forward"]["median_us"] > 0


def _wrong(what: str):
    def build(problem):
        right = torch_grouped(problem)

        def forward(x, ids, weights):
            if what == "unwritten":
                return torch.where(torch.arange(len(x))[:, None] > 0, right(x, ids, weights), torch.nan)
            if what == "gradient":
                return right(x, ids, weights.detach()) + 0 * weights.sum()
            if what == "weight gradient":
                p = problem.parameters["down_proj"]
                return right(x, ids, weights) + (p - p.detach()).sum() * 0.5
            return right(x, ids, weights) * 1.05

        return forward

    return build


@pytest.mark.parametrize("what", ["values", "unwritten", "gradient", "weight gradient"])
def test_wrong_numbers_get_no_time(what):
    problem = problem_on("cpu", tiny("qwen3"), 4)
    truth = truth_of(problem, train=True)
    check(problem, torch_grouped(problem), truth, train=True)
    with pytest.raises(WrongNumbers):
        check(problem, _wrong(what)(problem), truth, train=True)


def test_who_fails_is_recorded_and_the_others_go_on(monkeypatch):
    def broken(problem):
        raise RuntimeError("no kernel\nimage")

    def unserved(problem):
        raise NotServed("only squares")

    def memory(problem):
        raise torch.OutOfMemoryError("too big")

    changed = {"torch": broken, "hf-grouped": unserved, "hf-batched": memory, "hf-eager": _wrong("values")}
    table = {n: replace(r, build=changed.get(n, r.build), packages=()) for n, r in RIVALS.items()}
    monkeypatch.setattr(measure, "RIVALS", table)
    monkeypatch.setattr("headgate.bench.gpu.rivals.RIVALS", table)
    found = Measurer("cpu").run(case("qwen3", 8, "train"), {"liger": "unused"})["contestants"]
    assert found["torch"] == {"failed": "RuntimeError: no kernel image"}
    assert found["hf-grouped"] == {"skipped": "only squares"}
    assert "too big" in found["hf-batched"]["failed"]
    assert "off by" in found["hf-eager"]["refused"]
    assert "median_us" in found["headgate"]["forward"]


def test_who_fails_while_timed_takes_no_further_part():
    calls = []

    def tires(_):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("tired")

    entries = {"a": Entry({"forward": tires}), "b": Entry({"forward": lambda _: None})}
    failed = {}
    done = interleave(entries, Clock("cpu"), 0.0, (4, 4), failed=lambda name, error: failed.update({name: str(error)}))
    assert (done, failed, len(calls)) == (4, {"a": "tired"}, 2)
    assert len(entries["b"].samples["forward"]) == 4


def test_statistics():
    found = statistics_of([4e-6, 1e-6, 2e-6, 3e-6, 5e-6])
    assert (found["median_us"], found["lower_quartile_us"], found["upper_quartile_us"]) == pytest.approx((3, 2, 4))
    assert statistics_of([1e-6])["lower_quartile_us"] == pytest.approx(1)


def test_what_is_absent_is_named_with_the_reason():
    for name, rival in RIVALS.items():
        why = absent(name)
        assert (why is None) or rival.packages[0] in why
    assert absent("headgate") is None


@pytest.mark.gpu
@pytest.mark.parametrize("kind", measure.KINDS)
def test_on_a_gpu_headgate_and_torch_are_measured(kind):
    """Small, but through everything that only a GPU has: events, graphs, peaks, the kernels themselves."""
    shape = replace(STANDARD["gpt-oss"], hidden=256, intermediate=256, experts=8, top_k=2)
    tokens = {"train": 300, "decode": 8, "layer": 1}[kind]
    found = Measurer("cuda").run(Case(shape, tokens, kind, ("headgate", "torch"), budget_s=0.05))
    assert "failed" not in found
    names = ["headgate"] if kind == "layer" else ["headgate", "torch"]
    assert [n for n in names if "median_us" not in found["contestants"][n].get("forward", {})] == [], found
    if kind == "train":
        assert found["saved_bytes"]["headgate"] == found["expected_saved_bytes"]
        assert found["peak_bytes"]["headgate"]["step_bytes"] > 0


# --- the run --------------------------------------------------------------------------------------------------------


def test_a_run_writes_json_and_a_plot_and_ends_in_time(tmp_path, capsys):
    cases = [
        case("qwen3", 1, "layer"), case("qwen3", 8, "decode"),
        replace(case("sonic-4096-1024-128-8", 24, "train"), contestants=("headgate", "torch", "scattermoe")),
    ]  # fmt: skip
    assert Report(cases, tmp_path, "cpu", 120).run() == 0
    found = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert found["complete"]
    assert [c["pass"] for c in found["cases"]] == ["layer", "decode", "train"]
    assert found["ceilings"]["copy_GBps"] > 0
    assert found["device"]["present"]["headgate"]
    assert {f["figure"]: f["verdict"] for f in found["figures"]}[
        "saved for backward / (rows + H + routing)"
    ] == "reached"
    said = capsys.readouterr().out
    assert "decode, T = 1, whole layer" in said
    if absent("scattermoe"):
        assert "ScatterMoE" in said or "scattermoe" in said
        assert "absent" in found["cases"][2]["contestants"]["scattermoe"]
    pytest.importorskip("matplotlib")
    assert next(tmp_path.glob("*.png")).stat().st_size > 10_000
    assert not list(tmp_path.glob("*.tmp"))


def test_out_of_time_leaves_cases_out_and_keeps_the_rest(tmp_path):
    run = Report([case("qwen3", 1, "layer")], tmp_path, "cpu", 0)
    assert run.run() == 1
    found = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert found["left_out"] == ["qwen3/1/layer"]
    assert not found["complete"]


class Dying:
    """Stands where the child stands: dies while `who` runs, until it is left out."""

    def __init__(self, who: str) -> None:
        self.who, self.calls = who, 0

    def call(self, function, case, leave_out, patience_s):
        self.calls += 1
        if self.who not in leave_out:
            raise BrokenProcessPool("gone")
        return {"left_out": dict(leave_out)}

    def doing(self):
        return self.who

    def end(self):
        pass


@pytest.mark.parametrize(("who", "calls"), [("liger", 2), ("", 1)])
def test_a_case_is_run_again_without_who_killed_the_process(tmp_path, monkeypatch, who, calls):
    run = Report([], tmp_path, "cpu", 60)
    run.child = dying = Dying(who)
    monkeypatch.setattr(report, "Child", lambda device: dying)
    found = run._one(case("qwen3", 8, "train"), 5.0)
    assert dying.calls == calls
    if who:
        assert "died" in found["left_out"]["liger"]
    else:
        assert found["failed"]


def test_who_is_slow_to_start_or_hangs_takes_part_in_no_other_case(tmp_path, monkeypatch):
    class Slow(Dying):
        def call(self, function, case, leave_out, patience_s):
            if "torch" not in leave_out:
                raise TimeoutError
            return {"start_s": {"headgate": 99.0, "liger": 40.0, "hf-eager": 1.0}}

    run = Report([], tmp_path, "cpu", 60)
    run.child = slow = Slow("torch")
    monkeypatch.setattr(report, "Child", lambda device: slow)
    run._one(case("qwen3", 8, "train"), 5.0)
    assert set(run.banned) == {"torch", "liger"}
    assert "no end after 5 s at qwen3/8/train" in run.banned["torch"]


def test_a_dead_child_is_noticed():
    child = Child("cpu")
    try:
        with pytest.raises(BrokenProcessPool):
            child.call(os._exit, 3)
    finally:
        child.end()
    assert not child.progress.exists()


def test_a_contestant_that_does_nothing_any_more_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(report, "STILL_S", 2.0)
    child = Child("cpu")
    try:
        child.call(time.sleep, 3.0)  # nobody is at work: a case may take its time
        child.progress.write_text("liger")
        with pytest.raises(TimeoutError, match="no sign of life for 2 s"):
            child.call(time.sleep, 60.0)
        assert child.doing() == "liger"
    finally:
        child.end()


def test_the_plan_begins_with_what_the_figures_ask_for():
    cases = report.plan()
    keys = [c.key for c in cases]
    assert len(keys) == len(set(keys))
    assert keys[0] == "qwen3/1/layer"
    assert {f"{n}/{t}/decode" for n in ("qwen3", "gpt-oss") for t in (8, 16, 32, 64)} <= set(keys[:9])
    assert {c.shape.name for c in cases[:20]} >= set(SONIC)
    assert {c.shape.name for c in cases if c.tokens == 4096} == set(MODELS)
    assert {c.tokens for c in cases} >= {1, 8, 64, 256, 1024, 4096, 16384, 65536}


def _result(shape: str, tokens: int, kind: str, **medians) -> dict:
    contestants = {n: {step: {"median_us": us} for step, us in steps.items()} for n, steps in medians.items()}
    sizes = STANDARD[shape].sizes()
    return {"shape": shape, "tokens": tokens, "pass": kind, "sizes": sizes, "contestants": contestants}


def test_figures_are_the_worst_case_and_say_which():
    t, name = 32768, "sonic-4096-1024-128-8"
    pairs = 6 * t * 8 * 4096 * 1024
    fast = _result(name, t, "train", headgate={"forward": pairs / 600e6, "backward": 2 * pairs / 500e6},
                   cublas={"forward": pairs / 750e6})  # fmt: skip
    slow = _result(
        "sonic-4096-2048-64-4", t, "train", headgate={"forward": pairs / 490e6, "backward": 2 * pairs / 460e6}
    )
    qwen = _result("qwen3", 4096, "train", headgate={"forward": 100, "step": 300}, torch={"forward": 190, "step": 390})
    rows = {r["figure"]: r for r in figures.rows([fast, slow, qwen])}
    forward = rows["training forward, SonicMoE set with F >= 768"]
    assert forward["value"] == pytest.approx(490)
    assert (forward["verdict"], forward["reached_in"], forward["cases"]) == ("short", 1, 2)
    assert "sonic-4096-2048-64-4" in forward["worst_case"]
    assert rows["the same, share of cuBLAS"]["value"] == pytest.approx(0.8)
    assert rows["backward, SonicMoE set"]["verdict"] == "reached"
    assert rows["forward, T >= 4096, against torch, ScatterMoE, transformers"]["verdict"] == "stretch"
    assert rows["forward + backward, T >= 4096, against the same"]["verdict"] == "reached"
    assert rows["training forward, fine-grained F = 256"]["verdict"] == "not measured"
    layer = figures.rows([_result("qwen3", 1, "layer", headgate={"forward": 25})])
    assert next(r for r in layer if "whole layer" in r["figure"])["verdict"] == "reached"
    decode = _result("qwen3", 8, "decode", headgate={"forward": 100}) | {"weight_bytes": 344e6, "copy_GBps": 4300}
    assert next(r for r in figures.rows([decode]) if "copy bandwidth" in r["figure"])["value"] == pytest.approx(0.8)
    assert len(figures.lines(rows.values())) == 2 + len(rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_the_commands_say_so(capsys, tmp_path):
    for argv in (["bench", "--gpu-report", "--out", str(tmp_path)], ["bench", "sweep"]):
        assert cli.main(argv) == 1
        assert "needs a GPU, and torch sees none" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench"])
    assert stop.value.code == 2
