"""A rank that dies is named: deaths.py kills and stops ranks; here is what those that are left must have said."""

import importlib.util
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch.distributed as dist

from headgate.dispatch import DeadRanks
from headgate.dispatch.rollcall import call

DEATHS = Path(__file__).with_name("deaths.py")

if not (dist.is_available() and dist.is_gloo_available() and hasattr(os, "fork")):
    pytest.skip("this torch has no gloo, or this system no fork", allow_module_level=True)


def _scenarios():
    spec = importlib.util.spec_from_file_location("headgate_test_deaths", DEATHS)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SCENARIOS


SCENARIOS = _scenarios()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """All scenarios, one after the other, by one start of deaths.py; what it printed is in the file `log`."""
    folder = tmp_path_factory.mktemp("deaths")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HEADGATE_CPU": "plain"}
    with open(folder / "log", "w") as log:
        command = [sys.executable, DEATHS, folder]
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            process.wait(240)
        except subprocess.TimeoutExpired:
            pass  # the scenarios that are missing say it
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with the ranks that it started
            process.wait()
    return folder


@pytest.mark.parametrize("name", SCENARIOS)
def test_those_who_are_left_name_the_dead(folder, name):
    what, log = SCENARIOS[name], (folder / "log").read_text()[-3000:]
    assert (folder / name).exists(), log
    played = json.loads((folder / name).read_text())
    for rank in what.reports:
        report = played["reports"][rank]
        assert report, f"rank {rank} did not report\n{log}"
        assert not report["wrong"], f"rank {rank}:\n{report['wrong']}"
        assert report["dead"] == (list(what.dead) or None), f"rank {rank}: {report}"
        # the time-out of the collective, as long again for the roll call, and two seconds for a busy machine
        assert report["seconds"] < 2 * what.timeout_s + 2, f"rank {rank}: {report}"
        for dead in what.dead:
            if what.store == "file" or 0 not in what.dead:  # then the store can still be read
                assert f" {dead} ({os.uname().nodename}, pid {played['pids'][dead]})" in report["message"]
                # a process that is stopped, or has merely finished, is told from one that is gone
                assert ("is alive" in report["message"]) == (name == "stopped_and_late")
            else:
                assert f"rank {dead} " in report["message"]
    if name == "in_half_of_the_ranks":
        assert [played["reports"][rank]["message"] for rank in (0, 1)] == ["", ""]


def test_where_nobody_is_dead_the_error_stays_and_all_hear_of_its_origin(folder):
    reports = json.loads((folder / "nobody").read_text())["reports"]
    assert "Split sizes doesn't match" in reports[1]["message"]
    for rank in (0, 2, 3):
        assert "Split sizes" not in reports[rank]["message"]
        (note,) = reports[rank]["notes"]
        assert "so no rank is dead. " in note
        assert "rank 1: Split sizes doesn't match" in note


# --- the roll call itself, by threads ---------------------------------------------------------------------------------


def roll(*calls, store=None):
    """What the calls (rank, group, ranks, seconds until it comes) come to, with 1 s of grace: rank -> the dead."""
    store, found = store or dist.HashStore(), {}

    def work(rank, group, ranks, late=0.0):
        time.sleep(late)
        found[rank] = sorted(call(store, group, ranks, rank, f"error of {rank}", 1.0)[0])

    threads = [threading.Thread(target=work, args=arguments) for arguments in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return found


ALL = range(4)


def test_a_rank_that_is_late_within_the_grace_period_is_not_dead():
    assert roll(*((rank, "g", ALL, 0.1 * rank) for rank in ALL)) == {0: [], 1: [], 2: [], 3: []}


def test_all_come_to_the_same_names_even_where_only_one_missed_a_rank():
    found = roll((0, "g", ALL), (1, "g", ALL, 0.7), (2, "g", ALL, 0.7), (3, "g", ALL, 1.35))
    assert found == {0: [3], 1: [3], 2: [3], 3: [3]}


@pytest.mark.parametrize("late", [0.0, 0.5, 2.0])
def test_a_rank_that_left_with_the_name_is_not_dead(late):
    """Rank 0 shares no group with rank 3; rank 1 does, and has heard before rank 0 comes, or not yet."""
    assert roll((0, "0-1", (0, 1), late), (1, "1-3", (1, 3))) == {0: [3], 1: [3]}


def test_in_a_new_group_only_those_are_named_that_died_since():
    store = dist.HashStore()
    assert roll(*((rank, "old", ALL) for rank in (0, 1, 2)), store=store) == {0: [3], 1: [3], 2: [3]}
    assert roll(*((rank, "new", (0, 1, 2)) for rank in (0, 2)), store=store) == {0: [1], 2: [1]}


def test_the_rank_that_may_host_the_store_leaves_last():
    store = dist.HashStore()

    def page(done):
        store.set("headgate/rollcall/1", json.dumps({"group": "g", "error": "", "missing": [], "done": done}))

    def read_at_leisure():
        time.sleep(0.5)
        store.set("all is read", "")
        page(done=True)

    page(done=False)
    threading.Thread(target=read_at_leisure).start()
    call(store, "g", (0, 1), 0, "", 1.0)
    assert store.check(["all is read"])


def test_the_error_keeps_its_ranks_in_a_pickle():
    error = pickle.loads(pickle.dumps(DeadRanks("rank 3 did not answer", (3,))))
    assert (str(error), error.ranks) == ("rank 3 did not answer", (3,))
