"""Ctrl-C and SIGTERM at any moment: status 130 and 143, one line, and nothing that is half, temporary or running."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
from signalled import STATUS, Ended, Process

from headgate import __version__, cli
from headgate.bench import children
from headgate.cli import doctor
from headgate.cli.signals import Handler, Terminated
from headgate.placement.files import write_whole
from headgate.placement.placement import Placement
from headgate.placement.traces.file import TraceFile
from headgate.placement.traces.generate import like_deepseek_v2_lite
from headgate.placement.traces.trace import Trace

BOTH = (signal.SIGINT, signal.SIGTERM)
PLACE = ["place", "t.npz", "--nodes", "1", "--gpus-per-node", "2", "--objective", "transitions"]
# command -> the seconds in which it is likely to be at work, and how each of its outputs is read
LIGHT = {
    "trace --generate --tokens 4000 --output made.npz": (0.7, {"made.npz": lambda path: TraceFile(path).close()}),
    "trace --show t.npz": (0.9, {}),
    "cache t.npz --slots 2 --policies lru": (1.0, {}),
    f"{' '.join(PLACE)} --method linear --output p.json": (1.2, {"p.json": Placement.load}),
    "bench links --json links.json": (0.5, {"links.json": lambda path: json.loads(path.read_text())}),
    "bench roofline --shapes qwen3 --tokens 1 4 --json roof.json": (
        1.2, {"roof.json": lambda path: json.loads(path.read_text())},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def trace(tmp_path_factory) -> Trace:
    """A small one; the commands have run once in this process's caches, so that nothing compiles while it is timed."""
    found = like_deepseek_v2_lite(400, 0)
    return Trace(found.expert_ids[:3], found.num_experts)


def check(ended: Ended, number: int, kept: bool = False) -> None:
    """`kept`: beside the command's own words, one line says what is kept."""
    lines = ended.said.splitlines()
    assert ended.status == STATUS[number], ended
    assert "Traceback" not in ended.said + ended.out
    assert lines[-1].startswith("headgate: "), ended.said
    assert lines[-1].split(";")[0].endswith("interrupted" if number == signal.SIGINT else "terminated"), ended.said
    assert not ended.left
    assert not ended.children


def volley(folder: Path, trace: Trace, count: int, seed: int) -> None:
    """`count` signals: a third at the first moment, a third while modules load, a third up to the end."""
    draw, sent, missed = random.Random(seed), 0, 0
    while sent < count:
        assert missed < 2 * count, "the processes end before their signals"
        command, number = draw.choice(list(LIGHT)), draw.choice(BOTH)
        seconds, outputs = LIGHT[command]
        delay = draw.uniform(0, (0.02, 0.3, seconds)[sent % 3])
        here = folder / str(sent + missed)
        here.mkdir()
        trace.save(here / "t.npz")
        process = Process(command.split(), here)
        process.wait_until(process.listens, 5.0)
        time.sleep(delay)
        process.process.send_signal(number)
        ended = process.ended()
        for name, read in outputs.items():
            if (here / name).exists():
                read(here / name)
        extra = {p.name for p in here.iterdir()} - {"t.npz", ".out", ".err", "temporaries", *outputs}
        assert not extra, (command, delay)
        if ended.status == 0:  # it was done: then it is all there
            assert all((here / name).exists() for name in outputs)
            assert not ended.left
            missed += 1
            continue
        check(ended, number)
        assert ended.said.count("\n") == 1 or "after" in ended.said, ended.said
        sent += 1


def test_a_signal_at_any_moment(tmp_path, trace):
    volley(tmp_path, trace, 12, seed=1)


@pytest.mark.slow
def test_a_hundred_signals(tmp_path, trace):
    volley(tmp_path, trace, 100, seed=2)


HANDLERS_FIRST = """
import signal, sys
class Watch:
    def find_spec(self, name, path=None, target=None):
        early = ("headgate", "headgate.cli", "headgate.cli.signals", *allowed)
        if name not in early and not callable(signal.getsignal(signal.SIGTERM)):
            print(name)
allowed = {"signal", "atexit"}
from headgate.cli import main
sys.meta_path.insert(0, Watch())
try:
    main()
except SystemExit:
    pass
"""


def test_nothing_is_imported_before_the_handlers_are_there(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", HANDLERS_FIRST, "--version"],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.stdout == f"headgate {__version__}\n", done.stdout + done.stderr


def ready(text: str, process: Process):
    return lambda: text in process.output()


@pytest.mark.parametrize("number", BOTH)
def test_bench_moe_ends_with_the_signals_status(tmp_path, number):
    options = "--shapes qwen3 --dtypes fp32 --passes forward --rivals --no-peak --budget 30 --tokens 64 --json m.json"
    process = Process(["bench", "moe", *options.split()], tmp_path)
    process.wait_until(ready("0/1", process))
    process.process.send_signal(number)
    check(process.ended(), number)
    assert (tmp_path / "m.json").exists() == (number == signal.SIGINT)  # what was measured is kept


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_bench_dispatch_takes_its_ranks_with_it(tmp_path, number):
    options = "--ranks 2 --ranks-per-node 1 --shapes fine --dtypes fp32 --passes forward --contestants plain"
    process = Process(["bench", "dispatch", *options.split(), "--budget", "60"], tmp_path)
    process.wait_until(lambda: bool([*tmp_path.glob("*/*/store")]))
    process.process.send_signal(number)
    check(process.ended(), number)


def test_a_second_signal_does_not_disturb_the_tidying_up(tmp_path):
    handler = Handler()
    handler.working = True

    def half(file):
        file.write(b"half")
        handler(signal.SIGINT, None)

    class Impatient(type(tmp_path)):
        def unlink(self, **options):
            handler(signal.SIGINT, None)
            handler(signal.SIGTERM, None)
            super().unlink(**options)

    (tmp_path / "out").write_text("old")
    path = Impatient(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, half)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out").read_text() == "old"
    with pytest.raises(Terminated):
        handler(signal.SIGTERM, None)


_COMPUTES = """
import sys, threading, torch
from headgate.cli import commands, main
x = torch.ones(1 << 20)
def compute():
    while True:
        x.mul(1.0)
for _ in range(2):
    threading.Thread(target=compute, daemon=True).start()
commands.run = lambda words, handler: 143
sys.exit(main())
"""


def test_threads_that_still_compute_do_not_abort_the_end():
    ended = subprocess.run([sys.executable, "-c", _COMPUTES], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (143, "")


def test_a_command_inside_a_program_leaves_its_signals_alone(monkeypatch, capsys):
    def look(args):
        seen.append([signal.getsignal(n) for n in BOTH])
        return 0

    seen: list = []
    monkeypatch.setattr(doctor, "run", look)
    before = [signal.getsignal(n) for n in BOTH]
    assert cli.main(["doctor"]) == 0
    thread = threading.Thread(target=cli.main, args=(["doctor"],))
    thread.start()
    thread.join()
    assert seen == [before, before]
    assert [signal.getsignal(n) for n in BOTH] == before


def test_a_signal_waits_until_a_started_process_can_be_ended():
    heard = []
    before = [signal.signal(n, lambda n, frame: heard.append(n)) for n in BOTH]
    try:
        with children.starting():
            for n in BOTH:
                signal.raise_signal(n)
            assert not heard
        assert sorted(heard) == sorted(BOTH)
    finally:
        for n, handler in zip(BOTH, before, strict=True):
            signal.signal(n, handler)


def test_a_pool_that_hangs_is_ended():
    pool = ProcessPoolExecutor(1, mp_context=get_context("fork"))
    future = pool.submit(time.sleep, 600)
    while not future.running():
        time.sleep(0.01)
    processes = list(pool._processes.values())
    children.end(pool)
    assert not any(p.is_alive() for p in processes)


@pytest.mark.parametrize("kind", ["null", "fifo", "folder"])
def test_what_is_no_file_is_not_replaced(tmp_path, kind):
    path = Path("/dev/null") if kind == "null" else tmp_path / kind
    if kind == "fifo":
        os.mkfifo(path)  # nobody reads it
    if kind == "folder":
        path.mkdir()
    if kind == "null":
        link = tmp_path / "null"
        link.symlink_to(path)
        write_whole(link, lambda file: file.write(b"gone"))
        assert link.is_symlink()
    else:
        with pytest.raises(OSError, match=kind):
            write_whole(path, lambda file: file.write(b"x"))
    assert len(list(tmp_path.iterdir())) == 1
