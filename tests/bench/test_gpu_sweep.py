"""`headgate bench sweep`, end to end on the CPU with tiny shapes, in Triton's interpreter. No test asserts a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from headgate.bench.gpu import sweep
from headgate.bench.gpu.build import Builder, Job
from headgate.bench.gpu.products import Problem, Real, gemms_of, serves, weights_of
from headgate.bench.gpu.shapes import STANDARD
from headgate.kernels.chip import H200

SWEEPS = """
from contextlib import redirect_stdout
from dataclasses import replace
import json, sys
from headgate.bench.gpu import products, sweep
from headgate.cli import main
small = {"hidden": 16, "intermediate": 16, "experts": 4, "top_k": 1}
sweep.STANDARD = {n: replace(sweep.STANDARD[n], **small) for n in ("qwen3", "gpt-oss")}
sweep.H200 = replace(sweep.H200, processors=1)  # few programs: the interpreter pays by the program
products.Problem.calls = 1  # several, one after the other, are for a chip's caches
for name, options in json.loads(sys.argv[1]).items():
    always = ["--samples", "1", "--dtype", "fp32", "--device", "cpu", "--json", f"{name}.json"]
    with open(f"{name}.txt", "w") as said, redirect_stdout(said):
        assert main(["bench", "sweep", *options.split(), *always]) == 0, name
"""
RUNS = {
    "training": "--shapes gpt-oss --tokens 6 --gemms up down back dx dw --limit 2",
    "no time": "--tokens 5 6 --limit 5 --minutes 1e-9",
}
FEW_ROWS = {
    "formats": "--tokens 1 --formats none int4 --limit 2",
    "no time": "--tokens 1 5 --limit 5 --minutes 1e-9",
}


def sweeps(runs: dict[str, str], folder: Path) -> dict[str, tuple[list[dict], str]]:
    """name of a run -> (its sweeps, what it printed), one after the other in one process with the interpreter."""
    command = [sys.executable, "-P", "-c", SWEEPS, json.dumps(runs)]
    env = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=env, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {}
    for name in runs:
        each = json.loads((folder / f"{name}.json").read_text())["sweeps"]
        said = (folder / f"{name}.txt").read_text()
        assert all(f["rank"] <= f["timed"] <= f["of"] and f["ratio"] >= 1 for f in each)
        assert not [c for f in each for c in f["candidates"] if "failed" in c], said
        found[name] = each, said
    return found


@pytest.fixture(scope="module")
def swept(tmp_path_factory) -> dict[str, tuple[list[dict], str]]:
    return sweeps(RUNS, tmp_path_factory.mktemp("sweeps"))


def test_every_product_of_training_computes_the_same_numbers_with_every_tile(swept):
    found, said = swept["training"]
    assert [f["gemm"] for f in found] == ["up", "down", "back", "dx", "dw"]
    assert all(f["timed"] == 2 for f in found)
    table = said.splitlines()[-6:]
    assert table[0].split()[:2] == ["chosen", "us"]
    assert [line.split()[4] for line in table[1:]] == ["up", "down", "back", "dx", "dw"]


@pytest.mark.slow
def test_few_rows_in_every_format(tmp_path):
    runs = sweeps(FEW_ROWS, tmp_path)
    found, said = runs["formats"]
    formats = ["none", "int4"]
    assert [(f["format"], f["gemm"]) for f in found] == [(f, g) for f in formats for g in ("thin_up", "thin_down")]
    assert "GB/s" in said
    only_the_chosen_tile(runs["no time"][0], ["thin_up", "thin_down", "up", "down"])


def test_a_time_that_is_over_leaves_the_chosen_tile(swept):
    only_the_chosen_tile(swept["no time"][0], ["up", "down"] * 2)


def only_the_chosen_tile(found: list[dict], gemms: list[str]) -> None:
    assert [(f["gemm"], f["timed"]) for f in found] == [(g, 1) for g in gemms]
    assert all(f["untried"] == f["of"] - 1 for f in found)
    assert any(f["untried"] for f in found)


def test_a_candidate_with_other_numbers_has_no_time(monkeypatch):
    """And one whose launch fails costs no more than itself."""
    problem = Problem(STANDARD["qwen3"], 1)
    answers = {0: torch.ones(2), 1: torch.ones(2) * 2, 2: None, 3: torch.ones(2)}
    timed = sweep.Sweep.__new__(sweep.Sweep)
    timed.problem, timed.clock = problem, sweep.Clock("cpu")

    def with_tile(_gemm, tile):
        if answers[tile] is None:
            raise RuntimeError("out of resources")
        return [answers[tile]], lambda: None

    timed.real = SimpleNamespace(with_tile=with_tile, calls=[None], hit=8)
    monkeypatch.setattr(Problem, "candidates", lambda *_: list(answers))
    found = timed.measure("thin_up", 4, 1)
    assert ["us" in c for c in found["candidates"]] == [True, False, False, True]
    assert "not those of the chosen tile" in found["candidates"][1]["failed"]
    assert "out of resources" in found["candidates"][2]["failed"]
    assert "2 have no time" in "\n".join(sweep.lines(found))


class Turns:
    """A clock whose runs take what they say."""

    def __init__(self):
        self.now, self.order = 0.0, []

    def takes(self, name, *seconds):
        left = list(seconds)

        def run():
            self.order.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run

    def mark(self):
        return self.now

    def between(self, a, b):
        return b - a

    def wait(self):
        pass

    def lead(self, _seconds):
        pass


def test_a_chip_that_slows_down_slows_both():
    """The chosen one before and after each sample: a drift of the clock rate is no difference."""
    clock = Turns()
    chosen = clock.takes("a", 1.0, 2.0, 4.0)
    us, ratio = sweep.beside(clock, chosen, clock.takes("b", 1.5, 3.0), samples=2)
    assert (us, ratio) == (pytest.approx(2.25), pytest.approx(1.0))
    assert "".join(clock.order) == "ababa"


def test_what_is_far_slower_is_not_timed_more_closely():
    clock = Turns()
    _, ratio = sweep.beside(clock, clock.takes("a", 1.0), clock.takes("b", 2.0), samples=9)
    assert ratio == 2
    assert clock.order.count("b") == 2


def test_products_by_tokens_and_format():
    assert gemms_of(4) == ["thin_up", "thin_down"]
    assert gemms_of(64) == ["up", "down"]
    assert gemms_of(4096) == ["up", "down", "back", "dx", "dw"]
    assert gemms_of(4096, "int4") == ["up", "down"]
    assert not serves("thin_up", 5, "none")
    assert not serves("dw", 4096, "fp8")
    args = SimpleNamespace(shapes=["qwen3"], formats=["none"], tokens=[8], gemms=["thin_up"], dtype="bf16")
    with pytest.raises(ValueError, match="--gemms must be some that these tokens and formats have, got thin_up"):
        sweep.cases_of(args, H200)


@pytest.mark.parametrize(("enough", "copies"), [(4.9, 1), (5.5, 6), (99, 16)])
def test_calls_of_few_tokens_take_other_experts_and_cold_weights(monkeypatch, enough, copies):
    """One call's weights would still lie in L2 when the next one comes. `enough`: calls that must lie between."""
    shape = replace(STANDARD["qwen3"], hidden=16, intermediate=16, experts=32, top_k=2)
    problem = Problem(shape, 1)
    monkeypatch.setattr("headgate.bench.gpu.products.COLD_BYTES", enough * 2 * 16 * 16 * 2)
    real = Real(problem, "cpu", weights_of(problem, "cpu"), problem.calls)
    assert (len(real.calls), real.hit) == (16, 2)
    for i in range(12):
        near = [set(c.ids.flatten().tolist()) for c in real.calls[i : i + 4]]
        assert sum(map(len, near)) == len(set.union(*near)), "of four neighbours no two take the same expert"
    assert len({c.w2.data_ptr() for c in real.calls}) == copies
    assert all(torch.equal(c.w2, real.calls[0].w2) for c in real.calls)
    assert [Problem(shape, t).calls for t in (8, 64, 65)] == [16, 8, 1]


def test_bytes_of_weights_in_few_bits():
    whole, half, four = (
        Problem(STANDARD["qwen3"], 1, format=f).amounts("thin_up", hit)[1]
        for f, hit in (("none", 8), ("int8", 8), ("none", 4))
    )
    assert whole == pytest.approx(8 * 2 * 768 * 2048 * 2, rel=0.01)
    assert half == pytest.approx(whole / 2 * (1 + 4 / 128), rel=0.01), "and a scale for 128 weights"
    assert four == pytest.approx(whole / 2, rel=0.01)
    problem = Problem(STANDARD["qwen3"], 1)
    assert problem.rate(1e6, 2e6, 1.0) == "2000 GB/s"
    assert problem.rate(4e8, 1e6, 1.0) == "400 TFLOP/s"


BUILDS = """
import json, sys
from headgate.bench.gpu.build import Builder
from headgate.bench.gpu.compile import fault
from headgate.bench.gpu.products import GEMMS, Problem, gemms_of
from headgate.bench.gpu.shapes import STANDARD
from headgate.kernels.chip import H100

if __name__ == "__main__":
    builder, found = Builder(1), []  # a process more would be an import of torch more
    for tokens, format in json.loads(sys.argv[1]):
        problem = Problem(STANDARD["qwen3"], tokens, format=format, chip=H100)
        for gemm in gemms_of(tokens, format):
            for tile in problem.candidates(gemm, 2):
                jobs = problem.jobs(gemm, tile)
                builder.ask(jobs)
                faults = [fault(builder.wait(job)) for job in jobs]
                found.append([tokens, format, gemm, str(tile), GEMMS[gemm][1] in [j.name for j in jobs], faults])
    builder.close()
    print(json.dumps(found))
"""


@pytest.mark.parametrize(
    ("cases", "products"),
    [
        ([(1, "none")], 2),
        pytest.param([(1, "none"), (1, "int4"), (32, "none"), (4096, "none")], 2 + 2 + 2 + 5, marks=pytest.mark.slow),
    ],
    ids=["few", "all"],
)
def test_the_first_candidates_are_built_for_an_h100(tmp_path, cases, products):
    """In a process without the interpreter, as the sweep builds them ahead: none spills, none needs too much memory."""
    script = tmp_path / "builds.py"
    script.write_text(BUILDS)
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-P", str(script), json.dumps(cases)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 2 * products
    for *what, launched, faults in found:
        assert launched, what
        assert not any(faults), (what, faults)


@pytest.mark.slow  # four starts of a compiler's process
def test_builds_are_asked_for_ahead_and_survive_a_compiler_that_dies(tmp_path, monkeypatch):
    (tmp_path / "deadly.py").write_text("import os\nos._exit(9)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    deadly, missing, late = (Job(m, "kernel", H200, 4, 1, ()) for m in ("deadly", "json", "ast"))
    builder = Builder(1)
    try:
        builder.ask([deadly, missing])
        assert builder.wait(missing, timeout_s=0.0) is None
        assert "process died" in builder.wait(deadly)["error"]
        assert "AttributeError" in builder.wait(missing)["error"]
        builder.ask([late])
        assert "AttributeError" in builder.wait(late)["error"]
        builder.forget()
        assert "AttributeError" in builder.wait(late)["error"], "what is done is kept"
    finally:
        builder.close()
