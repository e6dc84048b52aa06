"""Every GPU kernel is built ahead of time for chips that are not here, in a process without the interpreter."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

pytest.importorskip("triton")

from headgate.bench.gpu import compile as builds
from headgate.bench.gpu.build import Job, build_all
from headgate.bench.gpu.record import PASSES, record
from headgate.bench.gpu.shapes import STANDARD
from headgate.kernels.chip import H200

GEMMS = ("up_kernel", "rows_kernel", "back_kernel", "dw_kernel")
CODE = "import sys; from headgate.cli import main; sys.exit(main(sys.argv[1:]))"
RUNS = {
    "some": "--chips sm_90 --shapes gpt-oss-tp8 --tokens 4096 --passes forward backward --limit 1 --processes 1",
    "widths": "--chips sm_90 --shapes gpt-oss-tp8 --tokens 4096 --passes forward backward",
    "blocks": "--chips sm_80 sm_90 --shapes qwen3 --tokens 1 64 1024 --passes quantized widened --formats Q6_K Q8_0 "
    "--limit 4",
    "many": "--chips sm_80 sm_90 --shapes qwen3 gpt-oss --tokens 1 4096 --limit 1",  # what is chosen, without a sweep
}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """built(name of a run) -> (its builds, what it printed); a run is made once."""

    @cache
    def run(name: str) -> tuple[list[dict], str]:
        file = tmp_path_factory.mktemp("builds") / "builds.json"
        command = [sys.executable, "-P", "-c", CODE, "bench", "compile", *RUNS[name].split(), "--json", str(file)]
        # the interpreter is asked for: the command must leave it by itself
        env = os.environ | {"TRITON_INTERPRET": "1"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=env)
        print(done.stdout)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(file.read_text())["builds"], done.stdout

    return run


@pytest.mark.parametrize(("name", "chips"), [("some", {90}), pytest.param("many", {80, 90}, marks=pytest.mark.slow)])
def test_every_kernel_fits_its_chip_and_spills_nothing(built, name, chips):
    found, said = built(name)
    both = {(r["kernel"], r["sm"]) for r in found}
    assert {sm for _, sm in both} == chips
    assert all({k for k, sm in both if sm == chip} == {k for k, _ in both} for chip in chips)
    assert {*GEMMS, "combine_kernel", "router_grad_kernel", "column_sum_kernel"} <= {k for k, _ in both}
    for r in found:
        assert r["spill_bytes"] == 0, r["what"]
        assert 0 < r["registers"] <= 255, r["what"]
        assert r["shared_bytes"] <= r["shared_limit"], r["what"]
    for kernel in GEMMS:
        large = [r for r in found if r["kernel"] == kernel and r["sm"] == 90 and "BM=128" in r["what"]]
        assert large, kernel
        assert all(r["wgmma"] > 0 for r in large), kernel
        assert all(r["mma"] > 0 for r in found if r["kernel"] == kernel and r["sm"] == 80), kernel
    assert f"{len(found)} builds, 0 at fault" in said


@pytest.mark.parametrize("name", ["some", pytest.param("widths", marks=pytest.mark.slow)])
def test_widths_that_are_no_multiple_of_16_keep_their_wide_loads(built, name):
    """8 elements are 16 bytes: a compiler that knows only of multiples of 16 would load narrowly, and spill."""
    found = [r for r in built(name)[0] if r["kernel"] in GEMMS]
    assert {r["kernel"] for r in found} == {*GEMMS}
    assert all(r["tma"] + r["cp_async"] > 0 for r in found)


def test_every_kernel_that_is_launched_anywhere_is_among_them():
    """What the sources hand to a launch, against what the passes of the standard shapes really launch."""
    root = Path(builds.__file__).parents[2] / "kernels"
    named = {n for f in root.rglob("*.py") for n in re.findall(r"\blaunch\(\s*(_?[a-z]\w*)\s*,", f.read_text())}
    kinds = [(STANDARD[n], t, kind) for n in ("qwen3", "gpt-oss") for t in (1, 4096) for kind in PASSES]
    launched = {x.name for case in kinds for x in record(*case, H200)}
    assert launched
    assert named - {"kernel"} <= launched, "a pass of bench/gpu/record.py must launch it"


def test_what_is_wrong_is_said():
    fine = {"spill_bytes": 0, "registers": 100, "shared_bytes": 10, "shared_limit": 20}
    assert builds.fault(fine) is None
    assert builds.fault(fine | {"spill_bytes": None}) is None, "unknown is not zero, and is no fault"
    assert "spills 8 bytes" in builds.fault(fine | {"spill_bytes": 8})
    assert "the chip has 20" in builds.fault(fine | {"shared_bytes": 21})
    assert "does not compile" in builds.fault({"error": "no"})
    row = {"kernel": "k", "chip": "c", "what": "k[]", "wgmma": 0, "mma": 1, "tcgen05": 0, "tma": 0, "cp_async": 2}
    table = builds.table([row | fine, row | fine | {"spill_bytes": None, "mma": 3}], every=False)
    assert table[1].split() == ["k", "c", "2", "100", "?", "10", "20", "0", "1-3", "0", "0", "2"]


@pytest.mark.slow
def test_kernels_that_shift_ggufs_blocks_into_place_spill_nothing(built):
    """Those that take the most registers: where rows are many, and where they are few."""
    found, _ = built("blocks")
    wanted = {"thin_up_kernel", "thin_down_kernel", "up_kernel", "rows_kernel", "back_kernel"}
    for chip in (80, 90):
        assert wanted <= {r["kernel"] for r in found if r["sm"] == chip}
    assert [r["what"] for r in found if builds.fault(r)] == []


@pytest.mark.slow  # three starts of a compiler's process
def test_a_compiler_that_dies_costs_its_own_job_alone(monkeypatch, tmp_path):
    """One job's process ends at once, the other's result comes all the same."""
    script = tmp_path / "deadly.py"
    script.write_text("import os\nos._exit(9)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    jobs = [Job("deadly", "kernel", H200, 4, 1, ()), Job("json", "missing", H200, 4, 1, ())]
    found = {r["what"].split("[")[0]: r["error"] for r in build_all(jobs, 1)}
    assert "process died" in found["kernel"]
    assert "AttributeError" in found["missing"]
