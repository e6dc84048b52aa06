"""`headgate doctor` says which versions are outside of the ranges known to work."""

from __future__ import annotations

import argparse
import json
import re
import tomllib
from importlib.metadata import version
from itertools import chain
from pathlib import Path

import pytest

from headgate.cli import doctor
from headgate.cli.versions import KNOWN, known_ranges, outside

ROOT = Path(doctor.__file__).parents[1]


@pytest.mark.parametrize(
    "installed",
    [
        {},
        {"torch": None, "triton": None},
        {"torch": "2.11.0+cpu", "transformers": "5.18.0", "peft": "0.15.0", "triton": "3.6.0"},
        {"torch": "2.14.9", "transformers": "5.24.1.dev0", "numpy": "0.1"},
    ],
)
def test_inside_nothing_is_said(installed):
    assert outside(installed) == []


@pytest.mark.parametrize(
    ("installed", "said"),
    [
        ({"torch": "2.10.2"}, "torch 2.10.2 was not tested; versions known to work: 2.11 to 2.14"),
        ({"torch": "2.15.0a0+git1"}, "torch 2.15.0a0+git1 was not tested; versions known to work: 2.11 to 2.14"),
        ({"torch": "3.0", "peft": "0.21.2"}, "torch 3.0 was not tested; versions known to work: 2.11 to 2.14"),
        ({"transformers": "5.100.0"}, "transformers 5.100.0 was not tested; versions known to work: 5.18 to 5.24"),
        ({"triton": "main"}, "triton main was not tested; versions known to work: 3.6 to 3.9"),
    ],
)
def test_outside_is_named(installed, said):
    assert outside(installed) == [said]


@pytest.mark.parametrize("as_json", [False, True])
def test_doctor_warns(as_json, monkeypatch, capsys):
    real = doctor.machine.version
    monkeypatch.setattr(doctor.machine, "version", lambda name: "9.9.9" if name == "torch" else real(name))
    assert doctor.run(argparse.Namespace(model=None, config=None, json=as_json, alone=False)) == 0
    said = capsys.readouterr().out
    sentence = "torch 9.9.9 was not tested; versions known to work: 2.11 to 2.14"
    if as_json:
        found = json.loads(said)
        assert sentence in found["warnings"]
        assert found["known_versions"] == known_ranges()
    else:
        assert re.search(rf"^warning +{re.escape(sentence)}$", said, re.M)


def test_the_versions_that_tests_are_pinned_to_are_inside():
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert outside(pins) == []
    assert set(KNOWN) <= set(pins)


def test_the_oldest_versions_are_those_asked_for():
    """The lower ends are what the installation asks for at least."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = "\n".join([*project["dependencies"], *chain(*project["optional-dependencies"].values())])
    for name, limits in known_ranges().items():
        assert f"{name}>={limits['oldest']}" in asked


def test_the_page_shows_the_same_ranges():
    page = (ROOT / "docs/versions.md").read_text(encoding="utf-8")
    for name, limits in known_ranges().items():
        assert f"\n| {name} | {limits['oldest']} | {limits['newest']} |" in page


def test_here_nothing_is_said():
    """The suite passes here, so what is installed belongs into the ranges: a new release moves them."""
    assert outside({name: version(name) for name in ("torch", "transformers", "peft")}) == []
