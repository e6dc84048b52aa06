"""headgate bench routers: its figures against what must hold, and a run that goes on where it was ended."""

import json

import pytest

from headgate import cli

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("routers")
    text = folder / "text"
    text.write_bytes(bytes(range(256)) * 40)
    line = f"bench routers --size small --steps 2 --seeds 0 --text {text} --folder {folder} --json {folder}/out.json"
    line += " --only softmax moepp bilevel soft locmoe expert_choice"
    assert cli.main(line.split()) == 0
    return line, folder, json.loads((folder / "out.json").read_text())


def test_what_routers_promise_is_in_the_figures(found):
    runs = {name: run for name, (run,) in found[2]["runs"].items()}
    assert runs["softmax"]["held_out"]["rows_per_token"] == 2
    assert 0 < runs["moepp"]["held_out"]["rows_per_token"] < 2
    assert runs["moepp"]["flops_per_token"] < runs["softmax"]["flops_per_token"]
    assert runs["soft"]["training"]["variation"] == runs["expert_choice"]["training"]["variation"] == 0
    crossings = {name: run["held_out"]["crossings_per_token"] for name, run in runs.items()}
    assert crossings["bilevel"] == pytest.approx(1 - runs["bilevel"]["held_out"]["local"])  # one node a token
    assert crossings["bilevel"] < crossings["softmax"] < 1
    assert all(0 < run["bits"] < 9 for run in runs.values())
    assert all(run["training"]["dropped"] == 0 for run in runs.values())


def test_a_run_that_is_there_is_not_run_again(found, capsys):
    line, folder, before = found
    kept = folder / "small-2-softmax-0.json"
    kept.write_text(json.dumps(json.loads(kept.read_text()) | {"bits": 7.25}))
    assert cli.main([*line.split(), "--plot", str(folder / "p.svg")]) == 0
    after = json.loads((folder / "out.json").read_text())
    assert after["runs"]["softmax"][0]["bits"] == 7.25
    assert after["runs"]["moepp"] == before["runs"]["moepp"]
    assert "7.250" in capsys.readouterr().out
    assert "softmax" in (folder / "p.svg").read_text()


def test_runs_on_another_text_are_not_taken_for_these(found, capsys):
    line, folder, _ = found
    (folder / "other").write_bytes(bytes(range(255)) * 40)
    assert cli.main(line.replace(f"--text {folder}/text", f"--text {folder}/other").split()) == 2
    assert "--folder must hold runs on this text, got" in capsys.readouterr().err


def test_an_unknown_router_is_named(capsys):
    assert cli.main(["bench", "routers", "--only", "soft", "hard"]) == 2
    assert "--only must be some of softmax, " in capsys.readouterr().err
