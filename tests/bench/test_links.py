"""`headgate bench links`: the fit on DeepEP's published tables, its errors on what was held out, and the report."""

import json

import numpy as np
import pytest

from headgate import cli
from headgate.bench.links import published
from headgate.bench.links.published import (
    EXPERTS,
    FITTED,
    HELD_OUT,
    LOW_LATENCY,
    PER_NODE,
    TOP_K,
    at_the_card,
    fitted,
    low_latency,
    low_latency_GBps,
    points,
)
from headgate.bench.links.variants import busiest, mean, variants
from headgate.bench.links.winners import OURS, Sizes, row
from headgate.placement.cluster.links import H800_CX7

POINTS = points(*fitted())


def errors(kernels: str, direction: str, use: str) -> dict[int, float]:
    return {
        p.ranks: p.error for p in POINTS if (p.kernels, p.direction, p.use) == (kernels, direction, use)
    }  # fmt: skip


def test_two_points_foretell_the_others():
    """Published times of dispatch on 32, 64 and 128 ranks within 5%, from those on 16 and 256."""
    dispatch = errors("low-latency", "dispatch", "held out")
    assert set(dispatch) == set(HELD_OUT)
    assert max(map(abs, dispatch.values())) < 0.035
    combine = errors("low-latency", "combine", "held out")
    assert sorted(abs(round(e, 3)) for e in combine.values()) == [0.037, 0.041, 0.054]
    for direction in ("dispatch", "combine"):
        assert all(abs(errors("low-latency", direction, "fitted")[r]) < 1e-6 for r in FITTED)


def test_held_out_points_do_not_enter_the_fit(monkeypatch):
    before = fitted()
    changed = {r: (1, 1, 1, 1) if r in HELD_OUT else v for r, v in LOW_LATENCY.items()}
    monkeypatch.setattr(published, "LOW_LATENCY", changed)
    monkeypatch.setattr(published, "NORMAL", {8: published.NORMAL[8], 16: (1, 1), 32: (1, 1), 64: (1, 1)})
    assert fitted() == before


def test_the_normal_kernels_between_nodes_were_not_used_and_come_out_near():
    for direction in ("dispatch", "combine"):
        found = errors("normal", direction, "not used")
        assert set(found) == {16, 32, 64}
        assert max(map(abs, found.values())) < 0.12


def test_no_variant_with_as_few_parameters_foretells_combine_within_5_percent():
    found = variants()
    assert len(found) == 7
    for direction in ("dispatch", "combine"):
        same = [errors("low-latency", direction, "held out")[r] for r in HELD_OUT]
        assert found[f"at once, {direction}"][0] == pytest.approx(same)
    for name, (wrong, _) in found.items():
        assert (max(map(abs, wrong)) > 0.05) == (not name.endswith("dispatch")), name
    link = found["the busiest rank, dispatch"][1]
    assert link.bandwidth_GBps > 50, "more than the card has"


def test_the_busiest_of_many_ranks_gets_what_a_simulation_gives_it():
    ranks, case = 32, low_latency(32)
    rng = np.random.default_rng(0)
    most = []
    for _ in range(12):
        scores = rng.random((case.tokens * ranks, EXPERTS))
        ids = np.argpartition(scores, -TOP_K, axis=1)[:, -TOP_K:] // (EXPERTS // ranks)
        node = np.arange(len(ids)) // case.tokens // PER_NODE
        got = [
            np.bincount(ids[node != n].ravel(), minlength=ranks)[n * PER_NODE : (n + 1) * PER_NODE] for n in range(4)
        ]
        most.append(max(map(max, got)))
    assert np.mean(most) == pytest.approx(busiest(ranks), rel=0.015)
    assert np.mean(most) > 1.04 * mean(ranks)


def test_our_bytes_are_those_of_the_published_bandwidths():
    for ranks, (_, dispatch, _, combine) in LOW_LATENCY.items():
        assert low_latency_GBps(ranks, 0) == pytest.approx(dispatch, rel=0.025)
        assert low_latency_GBps(ranks, 1) == pytest.approx(combine, rel=0.025)


def test_nothing_goes_through_a_card_faster_than_it_can():
    assert all(20 < leaves < 50 for *_, leaves in at_the_card())


def test_the_preset_is_this_fit():
    for preset, found in zip((H800_CX7.dispatch, H800_CX7.combine), fitted(), strict=True):
        for a, b in ((preset.inside, found.inside), (preset.across, found.across)):
            assert (a.latency_us, a.bandwidth_GBps) == pytest.approx((b.latency_us, b.bandwidth_GBps), rel=5e-3)


def test_the_winner_is_the_fastest_of_ours():
    links = fitted()
    for ranks in (8, 64, 2048):
        for tokens in (16, 4096):
            found = row(Sizes(), ranks, tokens, *links)
            assert found["modelled_us"][found["wins"]] == min(found["modelled_us"][name] for name in OURS)
            assert found["why"].startswith(found["wins"])
            assert found["experts"] == max(256, ranks)


def test_the_command_prints_and_writes(tmp_path, capsys):
    file = tmp_path / "links.json"
    assert cli.main(["bench", "links", "--ranks", "8", "2048", "--tokens", "128", "--json", str(file)]) == 0
    said = capsys.readouterr().out
    rows = [line.split() for line in said.splitlines()]
    assert ["low-latency", "64", "dispatch", "173", "us", "179", "us", "+3.4%", "held", "out"] in rows
    assert "128 tokens per rank, modelled us" in said
    assert "modelled, not measured" in said
    report = json.loads(file.read_text())
    assert [r["ranks"] for r in report["modelled"]] == [8, 2048]
    assert len(report["published"]) == 20
    assert cli.main(["bench", "links", "--ranks", "16", "--tokens", "16", "--across", "500", "1", "--json", "-"]) == 0
    slow = json.loads(capsys.readouterr().out)
    assert slow["used"]["dispatch"]["across"] == {"latency_us": 500, "bandwidth_GBps": 1}
    assert slow["fitted"] == report["fitted"]
    assert slow["modelled"][0]["modelled_us"]["all_to_all"] > 1500


def test_the_command_draws(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "links.png"
    argv = ["bench", "links", "--ranks", "8", "64", "--tokens", "16", "--plot", str(path), "--json", "-"]
    assert cli.main(argv) == 0
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--ranks", "12"], "ranks_per_node must divide ranks (12), got 8"),
        (["--tokens", "0"], "links: --tokens must be positive, got [0]"),
        (["--experts", "100"], "num_experts must be a multiple of ranks"),
        (["--across", "1", "0"], "Link: bandwidth_GBps must be positive, got 0"),
    ],
)
def test_bad_sizes_are_status_2(argv, words, capsys):
    assert cli.main(["bench", "links", *argv]) == 2
    assert words in capsys.readouterr().err
