"""`headgate bench dispatch`, end to end on tiny shapes and real ranks. No test asserts a time."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from headgate.bench.dispatch import command
from headgate.bench.dispatch.contestants import CONTESTANTS, WIRED
from headgate.bench.dispatch.launch import launch
from headgate.bench.dispatch.overhead import Overhead, figure
from headgate.bench.dispatch.report import case_lines, ratios
from headgate.bench.dispatch.volume import WAYS, Movement, even, rows
from headgate.bench.dispatch.world import SHAPES, Layout, _batch
from headgate.bench.shapes import Case, make_parameters

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("this torch has no gloo", allow_module_level=True)

RANK = (sys.executable, str(Path(__file__).with_name("dispatch_rank.py")))
TINY = replace(SHAPES["fine"], hidden=12, intermediate=8, experts=8, top_k=3)
T = 10


def parsed(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args([*argv])


def job(names: list[str], ranks: int = 2, inside: int = 1, **changes) -> dict:
    world = {"shape": asdict(TINY), "tokens": T, "dtype": "fp32", "contestants": names}
    made = {
        "ranks": ranks,
        "ranks_per_node": inside,
        "passes": ["forward", "train"],
        "skew": 0.0,
        "budget_s": 0.01,
        "clock": "wall",
    }
    return made | {"timeout_s": 240.0, "worlds": [world]} | changes


# --- everybody, on two ranks -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The command itself on two ranks, two nodes: exit status, text, JSON."""
    pytest.importorskip("transformers")
    patch = pytest.MonkeyPatch()
    target = tmp_path_factory.mktemp("dispatch") / "out.json"
    options = ["--ranks", "2", "--ranks-per-node", "1", "--shapes", "fine", "--tokens", str(T), "--dtypes", "fp32"]
    with patch.context() as p:
        p.setitem(SHAPES, "fine", TINY)
        status = command.run(parsed(*options, "--wires", "bf16", "fp8", "--budget", "0.01", "--json", str(target)))
    return status, json.loads(target.read_text())


@pytest.mark.slow
def test_everybody_is_right_and_timed(run):
    status, report = run
    assert status == 0, [c["implementations"] for c in report["cases"]]
    assert [c["pass"] for c in report["cases"]] == ["forward", "train"]
    for case in report["cases"]:
        everybody = case["implementations"]
        wired = {f"{name}/{wire}" for name in WIRED for wire in ("bf16", "fp8")}
        assert set(everybody) == {*CONTESTANTS, *wired}
        assert all(i["min_s"] <= i["median_s"] <= i["max_s"] for i in everybody.values())
        times = {n: i["median_s"] for n, i in everybody.items()}
        assert case["ratios"]["times_all_to_all"]["plain"] == times["plain"] / times["all_to_all"]
        beside = times["hf_all_reduce"] / times["slice_all_reduce"]
        assert case["ratios"]["times_slice_all_reduce"]["hf_all_reduce"] == beside
    assert {"cpu", "torch", "transformers", "ranks"} <= set(report["machine"])
    assert report["machine"]["threads"] == 1
    assert report["settings"]["tokens"] == T


@pytest.mark.slow
def test_narrow_wires_are_fewer_bytes_and_pairs_are_more(run):
    forward = run[1]["cases"][0]["implementations"]
    sent = {n: i["bytes"]["leave_rank_bytes_per_token"] for n, i in forward.items()}
    assert sent["all_to_all/fp8"] < sent["all_to_all/bf16"] < sent["all_to_all"] < sent["plain"]
    assert sent["hf_all_to_all"] == sent["plain"] < sent["hf_shared_all_to_all"]


# --- four ranks on two nodes -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory) -> SimpleNamespace:
    """One run for all that four ranks show: a world in which wrong contestants stand between right ones, then one in
    which rank 1 fails."""
    work = job(["all_to_all", *WRONG, "hierarchical", "plain"], 4, 2, timeout_s=600.0)
    work["worlds"] += job(["all_to_all", "failing"])["worlds"]
    target, error, began = tmp_path_factory.mktemp("four") / "out.json", io.StringIO(), time.monotonic()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(error):
        patch.setattr(command, "job", lambda args: work)
        status = command.run(parsed("--json", str(target)), RANK)
    report, seconds = json.loads(target.read_text()), time.monotonic() - began
    return SimpleNamespace(status=status, error=error.getvalue(), report=report, seconds=seconds)


@pytest.fixture(scope="module")
def four(four_ranks) -> dict[str, dict]:
    """pass -> what was found; the wrong ones stand between the right ones."""
    return {case["pass"]: case for case in four_ranks.report["cases"]}


# --- bytes -----------------------------------------------------------------------------------------------------------


def copies(way: str, layout: Layout) -> list[list[int]]:
    """Rows from each rank to each other, one by one, of the batch that the ranks draw."""
    size, inside = layout.ranks, layout.ranks_per_node
    batch = _batch(TINY, size * T, torch.float32, 0.0, make_parameters(TINY, torch.float32))
    moved = [[0] * size for _ in range(size)]
    for t, chosen in enumerate(batch.routings[0][0].tolist()):
        home = t // T
        owners = [e // (TINY.experts // size) for e in chosen]
        if way == "pairs":
            hops = [(home, r) for r in owners]
        elif way == "ranks":
            hops = [(home, r) for r in set(owners)]
        else:
            gate = {n: n * inside + home % inside for n in {r // inside for r in owners}}
            hops = [(home, g) for g in gate.values()] + [(gate[r // inside], r) for r in set(owners)]
        for a, b in hops:
            moved[a][b] += a != b
    return moved


def test_counted_bytes_are_the_formulas_to_the_byte(four):
    """Messages written out: D = 12 and K = 3 of fp32, ids of 4 bytes."""
    layout, found = Layout(4, 2), four
    row, ids, weights = 12 * 4, 3 * 4, 3 * 4
    size = {  # bytes (there, back) of a pass
        ("forward", "plain"): (row, row),
        ("train", "plain"): (2 * row, 2 * row),
        ("forward", "headgate"): (row + ids + weights, row),
        ("train", "headgate"): (row + ids + weights + row, row + row + weights),
    }
    for name, way in (("all_to_all", "ranks"), ("hierarchical", "levels"), ("plain", "pairs")):
        moved = copies(way, layout)
        for kind, case in found.items():
            there, back = size[kind, "plain" if name == "plain" else "headgate"]
            wanted = [[moved[a][b] * there + moved[b][a] * back for b in range(4)] for a in range(4)]
            counted = case["implementations"][name]["bytes"]
            assert counted["to_each_rank_bytes"] == wanted, (name, kind)
            assert counted["leave_rank_bytes_per_token"] == sum(map(sum, wanted)) / (4 * T)
            far = sum(wanted[a][b] for a in range(4) for b in range(4) if a // 2 != b // 2)
            assert counted["leave_node_bytes_per_token"] == far / (4 * T)
            everything = sum(map(sum, wanted)) + 4 * counted["counts_bytes_per_rank"]
            assert counted["by_collective_bytes"] == {"all_to_all": everything}
    right = {n: i for n, i in found["forward"]["implementations"].items() if n not in WRONG}
    counts = {n: i["bytes"]["counts_bytes_per_rank"] for n, i in right.items()}
    # int64: the numbers of 2 experts to each of 3 ranks; a row count, 5 of a complaint and the 13 fields of a header
    # to 3 ranks, and on two levels to one on each
    assert counts == {"plain": 3 * 2 * 8, "all_to_all": 3 * 19 * 8, "hierarchical": 2 * 19 * 8}


@pytest.mark.parametrize("layout", [Layout(4, 2), Layout(8, 2), Layout(8, 4), Layout(4, 4), Layout(2, 1)], ids=str)
def test_an_even_router_sends_what_the_formula_says(layout):
    torch.manual_seed(0)
    shape = replace(TINY, experts=16, top_k=3)
    ids = torch.rand(layout.ranks * 4000, 16).topk(3).indices
    for way in WAYS:
        moved = rows(way, ids, 16, layout) * 1.0
        expected = even([Movement(way, (1, 1), (0, 0))], shape, layout, train=False)
        for found, wanted in zip((moved.sum(), moved[layout.off_node()].sum()), expected, strict=True):
            assert float(found) / len(ids) == pytest.approx(wanted, abs=0.02), way


# --- what must not get a time, and what must not hang ----------------------------------------------------------------


WRONG = {
    "output": "rank 1: output is off by",
    "nan": "rank 1: output is off by nan",
    "input": "rank 1: gradient of input is off by",
    "experts": "rank 1: gradient of gate_up_proj is off by",
    "chatty": "by its formula",
    "broadcasting": "collectives broadcast_ are not counted",
    "missing": "cannot be built: AttributeError: no such function any more",
}


def test_wrong_numbers_get_no_time(four):
    """The first four are wrong on rank 1 alone; all ranks refuse them."""
    for case in four.values():
        for name, words in WRONG.items():
            assert list(case["implementations"][name]) == ["refused"], name
            assert words in case["implementations"][name]["refused"], name
        assert "median_s" in case["implementations"]["all_to_all"]
        assert case["ratios"] == ratios(case)
        assert set(case["ratios"]["times_all_to_all"]) == {"all_to_all", "hierarchical", "plain"}
        assert sum("refused" in line for line in case_lines(case)) == len(WRONG)


def test_a_rank_that_fails_ends_the_run_with_its_error_and_what_was_measured_is_kept(four_ranks):
    assert four_ranks.status == 1
    assert four_ranks.seconds < 600, "a rank waited for the one that failed"
    assert "bench dispatch: rank 1 failed: OSError: the disk is full" in four_ranks.error
    assert [(c["pass"], len(c["implementations"])) for c in four_ranks.report["cases"]] == [
        (kind, len(WRONG) + 3) for kind in ("forward", "train")
    ]


@pytest.mark.parametrize(
    ("program", "timeout_s", "says"),
    [
        ("pass", 1.0, "no news from the ranks for 1 s"),
        ("os.kill(os.getpid(), 9)", 60.0, "rank 1 ended with status -9"),
        ("sys.exit('cannot start')", 60.0, "rank 1 ended with status 1 cannot start"),
    ],
)
def test_ranks_that_say_nothing(program, timeout_s, says):
    """Rank 1 does something, rank 0 waits for long."""
    program = f"import os, sys, time\nif sys.argv[2] == '1': {program}\ntime.sleep(600)"
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=f"^bench dispatch: {says}$"):
        launch(job([], timeout_s=timeout_s), lambda _: None, (sys.executable, "-c", program))
    assert time.monotonic() - began < 50


# --- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--ranks", "1", "--ranks-per-node", "1"], "--ranks must be at least 2, got 1"),
        (["--ranks", "4", "--ranks-per-node", "3"], "--ranks-per-node must divide the 4 ranks, got 3"),
        (["--ranks", "16", "--ranks-per-node", "4"], "--ranks must divide the 8 experts of few, got 16"),
        (["--budget", "-1"], "--budget must be positive"),
        (["--timeout", "0"], "--timeout must be positive"),
        (["--skew", "-1"], "--skew must be between 0 and 10"),
        (["--threads", "1"], "--threads must come with --overhead"),
        (["--overhead", "--clock", "cpu"], "--clock cpu must come with --threads 1"),
    ],
)
def test_bad_options_are_said_before_anything_runs(options, says, capsys, monkeypatch):
    monkeypatch.setattr(command, "launch", None)
    assert command.run(parsed(*options)) == 2
    assert capsys.readouterr().err.startswith(f"headgate bench dispatch: {says}")


def test_rows_of_bf16_have_no_bf16_wire():
    worlds = command.job(parsed("--shapes", "fine", "--contestants", "all_to_all", "plain", "--wires", "bf16", "fp8"))
    named = {w["dtype"]: w["contestants"] for w in worlds["worlds"]}
    assert named["fp32"] == ["all_to_all", "all_to_all/bf16", "all_to_all/fp8", "plain"]
    assert named["bf16"] == ["all_to_all", "all_to_all/fp8", "plain"]


# --- one rank --------------------------------------------------------------------------------------------------------


def test_the_overhead_is_the_median_of_pairs(monkeypatch):
    result = Overhead(0.01, "wall").run(Case(replace(TINY, name="tiny"), 24, "fp32", "train"))
    times = {n: i["samples_s"] for n, i in result["implementations"].items()}
    assert set(times) == {"headgate", "experts"}
    assert len(times["headgate"]) == len(times["experts"]) == result["rounds"] >= 9
    for bare, whole, value, verdict in (
        ([1, 2, 4], [1.02, 2.2, 4.04], 2.0, "PASS"),
        ([1, 1], [1.04, 1.04], 4.0, "short"),
    ):
        for name, samples in (("headgate", bare), ("experts", whole)):
            result["implementations"][name]["samples_s"] = samples
        row = figure(result, added=5.0)
        assert row["value"] == pytest.approx(value)
        assert (row["reach"], row["verdict"]) == (3.0, verdict)


def test_the_command_prints_the_figure(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(command, "SHAPE", TINY)
    options = ["--overhead", "--tokens", "24", "--dtypes", "fp32", "--passes", "forward", "--budget", "0.01"]
    assert command.run(parsed(*options, "--json", str(tmp_path / "out.json"))) == 0
    report = json.loads((tmp_path / "out.json").read_text())
    assert [f["case"] for f in report["figures"]] == ["T 24 fp32 forward: Experts with Local above grouped_ffn"]
    assert f"adds {report['added_us']:.1f} us to a call" in report["figures"][0]["aside"]
    assert report["figures"][0]["case"] in capsys.readouterr().out
