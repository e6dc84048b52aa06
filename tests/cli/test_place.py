"""`headgate place` and `headgate bench placement`: files, tables, pictures, migration, refusals."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest

from headgate import cli
from headgate.bench.placement.case import case_of
from headgate.bench.placement.rows import ROWS
from headgate.cli.place import page
from headgate.placement.cluster.topology import Topology
from headgate.placement.formats import import_map
from headgate.placement.live.migrate import migrate
from headgate.placement.placement import Placement
from headgate.placement.traces.generate import generate
from headgate.placement.traces.trace import Trace
from headgate.placement.walk import walk


@pytest.fixture
def folder(tmp_path):
    generate(layers=3, experts=8, top_k=2, tokens=800, length=40, seed=3).save(tmp_path / "t.npz")
    return tmp_path


def place(folder, *more, output="p.json", nodes="2"):
    common = ["--nodes", nodes, "--gpus-per-node", "2", "--time-limit", "2", "--output", str(folder / output)]
    return cli.main(["place", str(folder / "t.npz"), *common, *map(str, more)])


def test_a_placement_on_the_command_line(folder, capsys):
    assert place(folder, "--objective", "transitions", "--max-load", "1.3", "--compare", "--explain") == 0
    said = capsys.readouterr().out
    found = Placement.load(folder / "p.json")
    cost = walk(Trace.load(folder / "t.npz"), found)
    assert found.topology.nodes == 2
    assert f"{cost.cross_gpu_share:.1%}" in said
    for words in ("linear", "eplb", "balance", "this", "at most", "What no placement can be below", "Layers:", "GPU 3"):
        assert words in said


def test_json_is_all_that_standard_output_gets(folder, capsys):
    assert place(folder, "--json", "--compare", "--slots-per-gpu", 3) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["cost"] == Placement.load(folder / "p.json").cost
    assert set(found["compare"]) == {"linear", "eplb", "balance", "this"}
    assert found["bound"]["gap"] >= 0


def test_a_comparison_needs_no_file_and_says_what_it_leaves_out(folder, capsys):
    """A dominant expert: EPLB wants more copies of it than there are GPUs. Uneven slots: EPLB refuses."""
    ids = np.zeros((1, 200, 1), np.uint8)
    ids[0, ::10, 0] = np.arange(20) % 4
    Trace(ids, 4).save(folder / "one.npz")
    common = [
        *("place", str(folder / "one.npz"), "--nodes", "1", "--gpus-per-node", "2"),
        *("--time-limit", "1", "--method", "linear"),
    ]
    assert cli.main([*common, "--slots-per-gpu", "4", "--compare", "--json"]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert found["output"] is None
    assert set(found["compare"]) == {"linear", "eplb", "balance", "this"}
    assert found["notes"]["eplb"].startswith("3 copies, which it wants beside another of the same expert")
    assert "eplb: 3 copies" in said.err
    assert cli.main([*common, "--slots", "3", "2", "--compare"]) == 0
    assert "eplb: not compared: eplb: slots_of_gpu must be the same on every GPU" in capsys.readouterr().out
    assert sorted(p.name for p in folder.iterdir()) == ["one.npz", "t.npz"]
    assert cli.main(common) == 2
    assert "--output must be given, or one of --compare, --explain and --plot" in capsys.readouterr().err


def test_held_out_sequences_judge(folder, capsys):
    assert place(folder, "--hold-out", 0.5, "--compare", "--json") == 0
    said = capsys.readouterr()
    assert "on tokens held out:" in said.err
    judged = json.loads(said.out)["compare"]["this"]["tokens"]
    assert judged == 400
    assert Placement.load(folder / "p.json").cost["tokens"] == 400


def test_migration_from_an_earlier_placement_and_export(folder, capsys):
    assert place(folder, "--method", "linear") == 0
    before = Placement.load(folder / "p.json")
    assert place(folder, "--migrate-from", folder / "p.json", "--objective", "transitions", "--json",
                 "--export", "sglang", folder / "s.json", output="q.json") == 0  # fmt: skip
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["migration"]
    after = Placement.load(folder / "q.json")
    plan = migrate(before, after)
    np.testing.assert_array_equal(plan.target.expert_of_slot, after.expert_of_slot)  # slots stay as planned
    assert found["moved"] == plan.moved > 0
    steps = json.loads((folder / "q.migration.json").read_text())["steps"]
    assert sum(len(step["moves"]) for step in steps) == plan.moved
    np.testing.assert_array_equal(import_map(folder / "s.json", Topology(2, 2)).expert_of_slot, after.expert_of_slot)
    assert place(folder, "--migrate-from", folder / "s.json", "--method", "linear", output="r.json") == 0


def test_an_earlier_placement_that_does_not_fit_is_refused_before_the_search(folder, capsys):
    assert place(folder, "--slots-per-gpu", 3, "--method", "linear") == 0
    before = (folder / "p.json").read_text()
    assert place(folder, "--migrate-from", folder / "p.json", output="q.json") == 2
    assert "--migrate-from must have slots of GPUs as asked for now, [2, 2, 2, 2], got [3, 3, 3, 3]" in (
        capsys.readouterr().err
    )
    assert place(folder, "--migrate-from", folder / "p.json") == 2
    assert "--output must be another file" in capsys.readouterr().err
    assert (folder / "p.json").read_text() == before
    assert not (folder / "q.json").exists()


def test_a_baseline_that_cannot_be_made_is_left_out(folder, capsys):
    assert place(folder, "--slots", 1, 3, 2, 2, "--compare", "--json") == 0
    assert set(json.loads(capsys.readouterr().out)["compare"]) == {"linear", "balance", "this"}


def test_pins_groups_scenarios_and_uneven_gpus(folder):
    assert place(folder, "--pin", 0, 5, 3, "--groups", 4, "--scenarios", 2) == 0
    assert Placement.load(folder / "p.json").gpus_of(0, 5) == [3]
    assert place(folder, "--slots", 1, 2, 2, 3, "--speed", 1, 2, 2, 3, "--compare") == 0
    assert Placement.load(folder / "p.json").slots_of_gpu.tolist() == [1, 2, 2, 3]


def test_the_page_stands_alone_and_shows_every_picture(folder):
    assert place(folder, "--plot", folder / "p.html") == 0
    text = (folder / "p.html").read_text()
    assert text.count("<svg") == 4
    assert "http" not in text
    assert "src=" not in text
    trace = Trace.load(folder / "t.npz").select(slice(40))
    assert "<svg" in page.pictures(Placement.load(folder / "p.json"), trace, {})


def test_a_page_needs_matplotlib_and_says_so_before_the_work(folder, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert place(folder, "--plot", folder / "p.html") == 1
    assert "place: --plot: needs matplotlib, which is not installed: pip install " in capsys.readouterr().err
    assert not (folder / "p.json").exists()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--hold-out", "1"], "--hold-out must be 0 or more and below 1, got 1.0"),
        (["--max-load", "1.1"], "--max-load goes with --objective transitions or copies, got time"),
        (["--export", "megatron", "x"], "--export must name one of sglang, vllm, trtllm, got megatron"),
        (["--plot", "/nowhere/p.html"], "the folder of /nowhere/p.html must exist"),
        (["--slots-per-gpu", "1"], "slots must be at least as many as experts, 8, got 4"),
        (["--relabel", "--pin", "0", "1", "2"], "--relabel must be left out with --pin"),
        (["--export", "vllm", "x", "--slots", "1", "2", "2", "3"], "--slots must be alike on every GPU for vllm"),
        (["--links", "abacus"], "machine must be one of h800-cx7, got 'abacus'"),
    ],
)
def test_what_is_refused_leaves_nothing(folder, more, says, capsys):
    assert place(folder, *more) == 2
    assert says in capsys.readouterr().err
    assert not (folder / "p.json").exists()


def test_files_that_will_not_do(folder, capsys):
    (folder / "t.npz").write_bytes(b"no trace")
    assert place(folder) == 2
    assert "must be a whole .npz file" in capsys.readouterr().err
    (folder / "t.npz").unlink()
    assert place(folder) == 1
    generate(layers=2, experts=8, top_k=2, tokens=50).save(folder / "t.npz")
    (folder / "old.json").write_text('{"version": 1}')
    assert place(folder, "--migrate-from", folder / "old.json") == 2
    assert "must be an object with layers" in capsys.readouterr().err


# --- the table -------------------------------------------------------------------------------------------------------


def test_a_case_is_cut_in_the_middle_of_each_domain(tmp_path):
    ids = np.arange(8, dtype=np.uint8)[None, :, None].repeat(2, 0)
    np.savez(tmp_path / "d.npz", expert_ids=ids, num_experts=8, domain=np.array([0, 0, 0, 0, 1, 1, 1, 1]))
    case = case_of(tmp_path / "d.npz")
    assert case.fit.expert_ids[0, :, 0].tolist() == [0, 1, 4, 5]
    assert case.judge.expert_ids[0, :, 0].tolist() == [2, 3, 6, 7]
    assert case.judge_domain.tolist() == [0, 0, 1, 1]


@pytest.mark.slow
def test_every_row_of_the_table(tmp_path, capsys):
    rows = [name for name in ROWS if name not in ("large", "rebalanced")]  # those take minutes
    generate(layers=3, experts=16, top_k=2, tokens=1200, length=50, domains=2).save(tmp_path / "t.npz")
    files = ["--json", str(tmp_path / "f.json"), "--plot", str(tmp_path / "f.html")]
    assert cli.main(["bench", "placement", str(tmp_path / "t.npz"), "--effort", "0.002", "--rows", *rows, *files]) == 0
    found = json.loads((tmp_path / "f.json").read_text())
    assert list(found["rows"]) == rows
    for row in found["rows"].values():
        assert row["lines"]
        assert all(len(line) == len(row["head"]) for line in row["lines"])
    certified = found["rows"]["certified"]["figures"]
    assert certified["bound"] <= certified["reached"]
    assert found["rows"]["crossings"]["figures"]["placed"]["gpu"] < found["rows"]["crossings"]["figures"]["eplb"]["gpu"]
    said = capsys.readouterr().out
    assert all(row["title"] in said for row in found["rows"].values())
    assert (tmp_path / "f.html").read_text().count("<table") == len(rows)


def test_effort_must_be_something(capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", "placement", "--effort", "0"])
    assert "--effort: must be above 0" in capsys.readouterr().err
