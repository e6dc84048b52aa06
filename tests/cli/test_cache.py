"""`headgate cache`: the table, its figures, pictures, refusals."""

from __future__ import annotations

import json

import numpy as np
import pytest

from headgate import cli
from headgate.cli.cache.compare import case_of
from headgate.placement.caching.policies import POLICIES
from headgate.placement.caching.simulate import simulate
from headgate.placement.traces.generate import generate
from headgate.placement.traces.trace import Trace


@pytest.fixture
def folder(tmp_path):
    generate(layers=3, experts=16, top_k=2, tokens=900, length=45, seed=3).save(tmp_path / "t.npz")
    return tmp_path


def cache(folder, *more):
    return cli.main(["cache", str(folder / "t.npz"), *map(str, more)])


def figures(folder, capsys, *more):
    assert cache(folder, *more, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_the_table_and_its_figures(folder, capsys):
    assert cache(folder, "--budget", "25%") == 0
    said = capsys.readouterr().out
    for words in (*POLICIES, "belady", "4 slots a layer (25%)", "no choice and no prefetch waits less", "SRP", "SCH"):
        assert words in said
    found = figures(folder, capsys, "--slots", 4)
    trace = Trace.load(folder / "t.npz")
    fit, judge = trace.select(slice(450)), trace.select(slice(450, None))
    assert (found["tokens"], found["learned_from"]) == (450, 450)
    for name, row in found["policies"].items():
        assert row["hit_rate"] == simulate(judge, name, 4, fit=fit).hit_rate
        assert row["bound_ms"] <= row["stall_ms"] + 1e-9
        assert row["gap_closed"] <= 1
    best = found["policies"]["belady"]
    assert best["gap_closed"] == 1
    assert best["stall_ms"] == min(row["stall_ms"] for row in found["policies"].values())
    assert set(found["locality"]["srp"]) == {"4", "16", "64", "256"}


def test_prefetch_tiers_batches_and_one_pool(folder, capsys):
    few = ("--policies", "lru", "lfru", "--slots", 6)
    plain = figures(folder, capsys, *few)["policies"]["lru"]
    right = figures(folder, capsys, *few, "--prefetch", "perfect")["policies"]["lru"]
    assert right["hit_rate"] > 0.95
    assert right["stall_ms"] < plain["stall_ms"]
    assert right["copies_of_lru"] == pytest.approx(1, abs=0.1)
    for kind in ("next", "transition"):
        found = figures(folder, capsys, *few, "--prefetch", kind, "--most", 2)["policies"]["lru"]
        assert found["hit_rate"] > plain["hit_rate"]
        assert 0 < found["ahead_used"] < 1
        assert found["copies_of_lru"] > 1
    tiers = figures(folder, capsys, *few, "--host-budget", "50%")["policies"]["lru"]
    assert 0 < tiers["reads_per_token"] < tiers["loads_per_token"] == plain["loads_per_token"]
    assert tiers["stall_ms"] > plain["stall_ms"]
    assert cache(folder, *few, "--host-budget", "50%", "--prefetch", "popular", "--batch", 4, "--scope", "shared") == 0
    said = capsys.readouterr().out
    for words in ("one pool of all; passes of 4", "fetched ahead (popular)", "a host cache of 8 slots a layer"):
        assert words in said


def test_a_trace_that_compresses_well_is_read(tmp_path):
    tokens = 9_000_000
    domain = (np.arange(tokens) >= tokens // 2).astype(np.int8)
    ids = np.zeros((1, tokens, 8), np.uint8)
    np.savez_compressed(tmp_path / "t.npz", expert_ids=ids, num_experts=8, domain=domain)
    case = case_of(tmp_path / "t.npz", 0.5)
    assert case.fit.shape == case.judge.shape == (1, tokens // 2, 8)


def test_budgets_in_bytes(folder, capsys):
    assert figures(folder, capsys, "--budget", "480MB", "--expert-bytes", "16MB")["slots"] == 10
    assert figures(folder, capsys, "--budget", "1TiB")["slots"] == 16


def test_without_tokens_to_learn_from_policies_are_left_out(folder, capsys):
    assert cache(folder, "--slots", 4, "--fit-share", 0) == 0
    said = capsys.readouterr().out
    assert "static left out: policy: static must be given a trace to learn from" in said
    assert "judged on 900 others" in said


def test_the_picture(folder, capsys):
    pytest.importorskip("matplotlib")
    for kind in ("svg", "png"):
        found = figures(folder, capsys, "--slots", 4, "--policies", "lru", "static", "--plot", folder / f"c.{kind}")
        assert (folder / f"c.{kind}").stat().st_size > 5000
    curves = found["curves"]
    assert curves["slots"] == sorted(curves["slots"])
    for name in ("lru", "static"):
        assert np.all(np.array(curves["hit_rates"][name]) <= curves["hit_rates"]["belady"])


def test_each_domain_is_cut_for_itself(tmp_path):
    ids = np.arange(8, dtype=np.uint8)[None, :, None]
    np.savez(tmp_path / "d.npz", expert_ids=ids, num_experts=8, domain=np.array([0, 0, 0, 0, 1, 1, 1, 1]))
    case = case_of(tmp_path / "d.npz", 0.5)
    assert case.fit.expert_ids.ravel().tolist() == [0, 1, 4, 5]
    assert case.judge.expert_ids.ravel().tolist() == [2, 3, 6, 7]
    np.savez(tmp_path / "d.npz", expert_ids=ids, num_experts=8, domain=np.zeros(3))
    with pytest.raises(ValueError, match=r"domain of .* must be \[T=8\], got \(3,\)"):
        case_of(tmp_path / "d.npz", 0.5)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ([], "one of --budget and --slots must be given, got None and None"),
        (["--slots", 4, "--budget", "25%"], "one of --budget and --slots must be given"),
        (["--slots", 17], "slots must be 1 .. 16 a layer, got 17"),
        (["--budget", "some"], "--budget must be bytes such as 16MB or 8GiB, got some"),
        (["--budget", "x%"], "--budget must be a share such as 25% or bytes, got x%"),
        (["--budget", "1MB"], "--budget must be enough for one expert of each layer, got 1MB"),
        (["--slots", 4, "--fit-share", 1], "--fit-share must be 0 or more and below 1, got 1.0"),
        (["--slots", 4, "--fit-share", 0, "--prefetch", "path"], "must have tokens to learn from"),
        (["--slots", 4, "--link-GBps", 0], "link_GBps must be finite and above 0, got 0.0"),
        (["--slots", 4, "--plot", "c.pdf"], "--plot must end in .png or .svg, got c.pdf"),
        (["--slots", 4, "--plot", "/nowhere/c.png"], "the folder of /nowhere/c.png must exist"),
        (["--slots", 4, "--batch", 0], "batch must be at least 1, got 0"),
    ],
)
def test_bad_usage_is_told_in_one_line(folder, more, says, capsys):
    assert cache(folder, *more) == 2
    said = capsys.readouterr()
    assert says in said.err
    assert said.out == ""
    assert said.err.count("\n") == 1
