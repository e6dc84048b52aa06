"""What fails, dies or hangs on many ranks is named with its rank, and leaves the next script alone."""

from __future__ import annotations

import pytest
from ranks_runner import cases_of, checks_of, passed_on_every_rank, run_ranks

SCRIPT = """
import os, time
import torch.distributed as dist

def well():
    assert dist.get_world_size() == 2
    dist.barrier()

def broken():
    assert dist.get_rank() == 0, "one is odd"

def dead():
    if dist.get_rank() == 1:
        os._exit(3)

def hangs():
    if dist.get_rank() == 1:
        time.sleep(1000)

CHECKS = {f.__name__: f for f in (well, broken, dead, hangs)}
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


@pytest.fixture
def run(script, tmp_path):
    def run(name: str, *checks: str, **options):
        (tmp_path / name).mkdir()
        return run_ranks(script, 2, tmp_path / name, list(checks), **options)

    return run


def test_what_fails_is_named_with_its_rank_and_only_what_is_asked_for_runs(run):
    results = run("first", "well", "broken")
    passed_on_every_rank(results, "well")
    assert results[0].checks == {"well": "", "broken": ""}
    with pytest.raises(AssertionError, match=r"(?s)^rank 1:.*one is odd"):
        passed_on_every_rank(results, "broken")
    with pytest.raises(AssertionError, match=r"rank 0 did not come to it; its last check: \['broken'\]"):
        passed_on_every_rank(results, "hangs")
    passed_on_every_rank(run("second", "well"), "well")


def test_a_rank_that_dies_is_named(run):
    results = run("first", "dead")
    with pytest.raises(AssertionError, match=r"^rank 1 began it, and died or was ended in it"):
        passed_on_every_rank(results, "dead")
    passed_on_every_rank(run("second", "well"), "well")


@pytest.mark.slow
def test_a_rank_that_hangs_is_ended_and_shows_where_it_was(run):
    results = run("first", "hangs", seconds=20)
    with pytest.raises(AssertionError, match=r"(?s)^rank 1 began it.*Fatal Python error: Aborted.* in hangs"):
        passed_on_every_rank(results, "hangs")
    passed_on_every_rank(run("second", "well"), "well")


def test_slow_must_name_checks(script):
    assert list(checks_of(script)) == ["well", "broken", "dead", "hangs"]
    slow = [case.values for case in cases_of(script, [2, 4], {"well": (4,)}) if case.marks]
    assert slow == [(4, "well")]
    with pytest.raises(ValueError, match=r"cases_of: slow must name checks of script\.py, got \['wel'\]"):
        cases_of(script, [2], {"wel": (2,)})
