"""The table of weights in few bits, on small sizes."""

from __future__ import annotations

import json

import pytest
import torch

from headgate.cli import main

SIZES = ["--rows", "1", "2", "--experts", "6", "--top-k", "2", "--hidden", "64", "--intermediate", "32"]
SMALL = ["bench", "quantized", *SIZES]


def test_every_form_is_measured_and_compared(tmp_path, capsys):
    threads, target = torch.get_num_threads(), tmp_path / "out.json"
    assert main([*SMALL, "--budget", "0.2", "--threads", "1", "--clock", "cpu", "--json", str(target)]) == 0
    found = json.loads(target.read_text())
    assert list(found) == ["1", "2"]
    for row in found.values():
        assert list(row) == ["read", "fp32", "bf16", "int8", "int4", "uint4", "mxfp4", "Q8_0", "Q4_0", "gguf_mxfp4"]
        assert row["read"]["of_read"] == 1
        assert row["bf16"]["over_bf16"] == row["fp32"]["over_fp32"] == 1
        for name, f in row.items():
            assert 0 < f["ms"] <= f["median_ms"]
            assert f["of_read"] == pytest.approx(f["GBps"] / row["read"]["GBps"])
            assert name == "read" or f["over_fp32"] == pytest.approx(row["fp32"]["ms"] / f["ms"])
        per_s = {name: f["GBps"] * f["ms"] for name, f in row.items()}  # bytes, in some unit
        assert per_s["fp32"] == pytest.approx(2 * per_s["bf16"])
        assert per_s["int8"] < 0.6 * per_s["bf16"]
        assert per_s["int4"] < 0.35 * per_s["bf16"]
        assert per_s["Q8_0"] == pytest.approx(34 / 64 * per_s["bf16"])
    assert "mxfp4" in capsys.readouterr().out
    assert torch.get_num_threads() == threads


def test_gate_and_up_in_one_format_and_down_in_another(tmp_path):
    target = tmp_path / "out.json"
    sizes = ["--experts", "3", "--top-k", "2", "--hidden", "256", "--intermediate", "256", "--rows", "1"]
    assert main(["bench", "quantized", *sizes, "--formats", "Q4_K+Q6_K", "--budget", "0.1", "--json", str(target)]) == 0
    row = json.loads(target.read_text())["1"]
    per_s = {name: f["GBps"] * f["ms"] for name, f in row.items()}
    assert per_s["Q4_K+Q6_K"] == pytest.approx((2 * 144 + 210) / (3 * 512) * per_s["bf16"])


def test_bad_options_are_named(capsys):
    for formats, rule in (("Q4_K", "Q4_K must go with --hidden a multiple of 256"), ("int5", "must be of int8, int4")):
        assert main([*SMALL, "--formats", formats]) == 2
        assert f"bench quantized: --formats {rule}" in capsys.readouterr().err
    assert main([*SMALL, "--threads", "2", "--clock", "cpu"]) == 2
    assert "--clock cpu must go with --threads 1" in capsys.readouterr().err
    assert main([*SMALL[:-1], "0"]) == 2
    assert "--intermediate must be at least 1, got 0" in capsys.readouterr().err
