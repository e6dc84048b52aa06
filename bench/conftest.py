"""Options of `pytest bench`: which cases pytest-benchmark drives."""

from __future__ import annotations


def pytest_addoption(parser):
    group = parser.getgroup("headgate", "headgate's micro-benchmarks")
    group.addoption("--moe-shapes", default="qwen3", help="comma-separated, or all (default: %(default)s)")
    group.addoption("--moe-tokens", default="1,16,256", help="comma-separated (default: %(default)s)")
    group.addoption("--moe-dtypes", default="bf16", help="comma-separated (default: %(default)s)")
    group.addoption(
        "--moe-implementations",
        default="headgate,grouped_mm,sorted,matmuls",
        help="comma-separated (default: %(default)s)",
    )


def pytest_generate_tests(metafunc):
    if "moe_case" not in metafunc.fixturenames:
        return
    # not at import time: other test sessions collect this folder too
    from headgate.bench.shapes import PASSES, SHAPES, Case

    def listed(option):
        return metafunc.config.getoption(option).split(",")

    shapes = list(SHAPES) if listed("--moe-shapes") == ["all"] else listed("--moe-shapes")
    cases = [
        Case(SHAPES[shape], int(tokens), dtype, kind)
        for shape in shapes
        for dtype in listed("--moe-dtypes")
        for tokens in listed("--moe-tokens")
        for kind in PASSES
    ]
    names = [f"{c.shape.name}-T{c.tokens}-{c.dtype}-{c.kind}" for c in cases]
    metafunc.parametrize("moe_case", cases, ids=names, scope="module")
    metafunc.parametrize("implementation", listed("--moe-implementations"))
