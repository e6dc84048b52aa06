"""`headgate bench overlap`: every schedule gives the same numbers, and the report holds what the table says."""

from __future__ import annotations

import json

import pytest

from headgate import cli
from headgate.bench.overlap.command import hidden


def test_a_block_in_training(tmp_path, capsys):
    file = tmp_path / "overlap.json"
    words = "--tokens 8 --degrees 3 --layers block --passes train --budget 0.1 --json"
    assert cli.main(["bench", "overlap", *words.split(), str(file)]) == 0
    (case,) = json.loads(file.read_text())["cases"]
    assert (case["layer"], case["pass"], list(case["degrees"])) == ("block", "train", ["no schedule", "degree 3"])
    assert case["transfers_s"] == pytest.approx(4 * 8 * case["per_row_s"]) == pytest.approx(case["computed_s"] / 2)
    assert f"{hidden(case, 'degree 3'):.0%}" in capsys.readouterr().out


def test_what_is_hidden_is_a_share_of_what_can_be():
    degrees = {"no schedule": {"with_delay_s": [3.0, 3.0, 9.0]}, "degree 2": {"with_delay_s": [2.5]}}
    assert hidden({"transfers_s": 1.0, "computed_s": 2.0, "degrees": degrees}, "degree 2") == 0.5


def test_a_budget_that_is_none(capsys):
    assert cli.main(["bench", "overlap", "--budget", "0"]) == 2
    assert "--budget must be positive and below 1e5, got 0.0" in capsys.readouterr().err
