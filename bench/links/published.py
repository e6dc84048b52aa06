"""DeepEP's published tables, and the links that explain them.

Source: https://github.com/deepseek-ai/DeepEP at commit dd758ca: docs/legacy.md (V1; its low-latency table is that of
2025-06-05, since when those kernels use NVLink inside a node) and README.md (V2). H800, about 160 GB/s of NVLink, one
ConnectX-7 of 400 Gb/s each, 8 to a node; hidden size 7168, 8 experts per token, FP8 there with an fp32 scale for 128
numbers, bf16 back. E is 256, as in DeepSeek-V3: the tables do not say it.

The bandwidths are logical: the bytes include what stays on the rank or in its node (tests/test_low_latency.py,
test_internode.py and test_intranode.py there), so the time is those bytes over the bandwidth.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...placement.cluster.links import Case, Links, fit, predict
from ...placement.cluster.volume import distinct_parts

HIDDEN, EXPERTS, TOP_K, PER_NODE, AT_MOST_NODES = 7168, 256, 8, 8, 4
FP8 = HIDDEN + HIDDEN // 128 * 4
BF16 = 2 * HIDDEN
DIRECTIONS = ("dispatch", "combine")

# ranks -> us and GB/s of dispatch, of combine; 128 tokens
LOW_LATENCY = {
    8: (77, 98, 114, 127),
    16: (118, 63, 195, 74),
    32: (155, 48, 273, 53),
    64: (173, 43, 314, 46),
    128: (192, 39, 369, 39),
    256: (194, 39, 360, 40),
}
FITTED, HELD_OUT = (16, 256), (32, 64, 128)
# ranks -> GB/s of dispatch, of combine; 4096 tokens, at most 4 nodes; 8 ranks: NVLink, more: the card
NORMAL = {8: (153, 158), 16: (43, 43), 32: (58, 57), 64: (51, 50)}
# ranks -> GB/s of dispatch, of combine; 8192 tokens, V2 on SM90 with ConnectX-7
V2 = {16: (90, 81), 32: (61, 61)}


def low_latency(ranks: int) -> Case:
    """One message per (token, expert): 16 bytes of header there."""
    return Case(ranks, PER_NODE, 128, EXPERTS, TOP_K, FP8 + 16, BF16)


def normal(ranks: int) -> Case:
    """One row per (token, node), passed on inside it."""
    return Case(ranks, PER_NODE, 4096, EXPERTS, TOP_K, FP8, BF16, AT_MOST_NODES)


def normal_s(ranks: int, direction: int) -> float:
    """The published time: the rows for all ranks (one node) or all nodes, their own among them, over the bandwidth."""
    parts, at_most = (ranks, None) if ranks == PER_NODE else (ranks // PER_NODE, AT_MOST_NODES)
    rows = normal(ranks).tokens * distinct_parts(EXPERTS, TOP_K, parts, at_most)
    return rows * (FP8, BF16)[direction] / (NORMAL[ranks][direction] * 1e9)


def low_latency_s(ranks: int, direction: int) -> float:
    return LOW_LATENCY[ranks][2 * direction] * 1e-6


def low_latency_GBps(ranks: int, direction: int) -> float:
    """The bandwidth that our bytes give with the published time."""
    case = low_latency(ranks)
    return case.tokens * TOP_K * _row_bytes(case, direction) / low_latency_s(ranks, direction) / 1e9


def fitted() -> tuple[Links, Links]:
    """The links of dispatch and of combine, each through two points.

    Between nodes: the low-latency kernels on FITTED ranks. Inside: on 8 ranks the low-latency kernels (few bytes) and
    the normal ones (many), which are not the same code.
    """
    found = []
    for direction in range(2):
        across = []
        for ranks in FITTED:
            case = low_latency(ranks)
            sent = case.rows("plain").across * _row_bytes(case, direction)
            across.append((sent, low_latency_s(ranks, direction)))
        few, many = low_latency(PER_NODE), normal(PER_NODE)
        inside = [
            (few.rows("plain").inside * _row_bytes(few, direction), low_latency_s(PER_NODE, direction)),
            (many.rows("all_to_all").inside * _row_bytes(many, direction), normal_s(PER_NODE, direction)),
        ]
        found.append(Links(inside=fit(inside), across=fit(across)))
    return found[0], found[1]


def _row_bytes(case: Case, direction: int) -> float:
    return (case.dispatch_bytes, case.combine_bytes)[direction]


@dataclass(frozen=True)
class Point:
    """A published time beside the modelled one."""

    kernels: str
    ranks: int
    direction: str
    use: str
    published_s: float
    modelled_s: float

    @property
    def error(self) -> float:
        """Relative: positive where the model is slower."""
        return self.modelled_s / self.published_s - 1


def points(dispatch: Links, combine: Links) -> list[Point]:
    """Every published time that the model can say: those it was fitted on, those held out, and the normal kernels."""
    found = []
    for direction, name in enumerate(DIRECTIONS):
        for ranks in LOW_LATENCY:
            p = predict("plain", low_latency(ranks), dispatch, combine, counts=False)
            use = "held out" if ranks in HELD_OUT else "fitted"
            published = low_latency_s(ranks, direction)
            found.append(Point("low-latency", ranks, name, use, published, (p.dispatch_s, p.combine_s)[direction]))
        for ranks in NORMAL:
            kind = "all_to_all" if ranks == PER_NODE else "pipelined"
            p = predict(kind, normal(ranks), dispatch, combine, counts=False)
            use = "fitted" if ranks == PER_NODE else "not used"
            found.append(
                Point("normal", ranks, name, use, normal_s(ranks, direction), (p.dispatch_s, p.combine_s)[direction])
            )
    return found


def at_the_card() -> list[tuple[str, int, str, float, float]]:
    """(kernels, ranks, direction, published logical GB/s, GB/s that leave the node) of every internode table."""
    tables = {"V1 normal": {r: v for r, v in NORMAL.items() if r > PER_NODE}, "V2": V2}
    return [
        (kernels, ranks, name, values[i], values[i] * (1 - PER_NODE / ranks))
        for kernels, table in tables.items()
        for ranks, values in table.items()
        for i, name in enumerate(DIRECTIONS)
    ]
