"""The parts of the dispatchers that need no second rank: formats, agreement, places, volumes."""

import re
from itertools import combinations
from pathlib import Path

import pytest
import torch

from headgate.dispatch import DISPATCHERS, Overlap
from headgate.dispatch.agreement import FIELDS, disagreement, held_experts, localised
from headgate.dispatch.all_to_all import destinations, tokens_of_places
from headgate.dispatch.symmetric import fetches
from headgate.dispatch.wire import decode, encode, message
from headgate.moe import MoE
from headgate.placement.cluster.volume import distinct_parts

ROOT = Path(__file__).resolve().parents[2]

# --- formats --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wire", ["bf16", "fp8", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 1e-41, 1e-30, 1e30])
def test_an_element_comes_back_within_the_stated_bound(wire, dtype, scale):
    t = (torch.randn(50, 64, dtype=torch.float64) * torch.logspace(-6, 0, 64, dtype=torch.float64) * scale).to(dtype)
    t[3] = 0
    back = decode(encode(t, wire), wire, dtype).double()
    t = t.double()
    m = t.abs().amax(1, keepdim=True)
    if wire == "bf16":
        allowed = torch.maximum(t.abs() * 2**-8, torch.tensor(2.0**-134))
    else:
        s = (m / (448 if wire == "fp8" else 127)).clamp_min(2**-126)
        allowed = torch.maximum(t.abs() * 2**-4, s * 2**-10) if wire == "fp8" else s / 2
    error = (t - back).abs()
    assert (error <= allowed + 2**-22 * m).all()
    assert error.max() > 0, "not lossy at all?"


@pytest.mark.parametrize("wire", ["fp8", "int8"])
def test_a_row_with_an_inf_or_a_nan_is_nan_and_its_neighbours_are_not(wire):
    t = torch.randn(4, 5)
    t[1, 2], t[2, 0] = float("inf"), float("nan")
    back = decode(encode(t, wire), wire, t.dtype)
    assert back[1:3].isnan().all()
    assert back[[0, 3]].isfinite().all()


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_a_message_is_one_row_of_bytes_and_its_inverse(rows):
    x, ids = torch.randn(rows, 3, dtype=torch.bfloat16), torch.randint(-1, 9, (rows, 1), dtype=torch.int32)
    weights = torch.rand(rows, 1, dtype=torch.float64)
    packed, inverse = message(x, [ids, weights], "exact")
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, 3 * 2 + 4 + 8)
    back, beside = inverse(packed, None)
    assert all(map(torch.equal, (x, ids, weights), (back, *beside)))


# --- agreement ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "said"),
    [
        ([[1, 8], [1, 8], [1, 8]], (0, 0, 0, 0, 0)),
        ([[1, 8], [1, 9], [1, 8]], (2, 14, 9, 10, 8)),
        ([[1, 9], [1, 8], [1, 8]], (2, 10, 9, 14, 8)),  # the first rank may be the odd one
        ([[1, 8], [1, 9]], (2, 14, 9, 10, 8)),  # a tie goes to the lowest rank
        ([[2, 9], [1, 8], [1, 8]], (1, 10, 2, 14, 1)),  # the first field that differs
    ],
)
def test_the_odd_rank_is_named(headers, said):
    assert disagreement(headers, [10, 14, 18]) == said
    assert len(set(FIELDS)) == len(FIELDS)


def test_experts_are_held_in_a_row():
    assert [held_experts("X", 6, r, 3) for r in range(3)] == [range(0, 2), range(2, 4), range(4, 6)]
    with pytest.raises(ValueError, match="X: num_experts must be a multiple of the group's 4 ranks, got 6"):
        held_experts("X", 6, 0, 4)
    assert localised(torch.tensor([-1, 0, 2, 3, 4, 99]), range(2, 4)).tolist() == [-1, -1, 0, 1, -1, -1]


@pytest.mark.parametrize("name", [name for name in DISPATCHERS if name != "local"])
def test_needs_torch_distributed(name):
    with pytest.raises(ValueError, match=r"group must be given, or torch\.distributed be initialised, got None"):
        DISPATCHERS[name]()


# --- places ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "parts"), [(1, 4), (3, 4), (6, 4), (8, 2), (2, 1)])
@pytest.mark.parametrize("tokens", [0, 1, 40])
def test_copies_stand_rank_by_rank_once_each_tokens_rising(k, parts, tokens):
    held = range(8, 16)
    ids = torch.randint(-1, 20, (tokens, k))
    counts, place = destinations(ids, held, parts)
    wanted = [
        (p, t) for p in range(parts) for t in range(tokens)
        if any(e in held and (e - 8) // (8 // parts) == p for e in ids[t].tolist())
    ]  # fmt: skip
    assert counts.tolist() == [sum(p == q for q, _ in wanted) for p in range(parts)]
    assert tokens_of_places(place, len(wanted)).tolist() == [t for _, t in wanted]
    assert place.shape == (tokens, min(k, parts))
    for t in range(tokens):
        found = [n for n, (_, u) in enumerate(wanted) if u == t]
        assert place[t].tolist() == found + [-1] * (place.shape[1] - len(found))


# --- one-sided copies -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("high", [1, 2, 7])
def test_what_each_rank_fetches_is_what_was_laid_out_for_it(size, high):
    """All ranks' windows as tensors of one process: a row is named by its sender, its receiver and its number."""
    counts = torch.randint(0, high, (size, size)).tolist()
    windows = [[(i, j, n) for j in range(size) for n in range(counts[i][j])] for i in range(size)]
    for rank in range(size):
        out, peers = [None] * sum(row[rank] for row in counts), []
        for peer, there, here, rows in fetches(counts, rank):
            assert rows > 0
            out[here : here + rows] = windows[peer][there : there + rows]
            peers.append((peer - rank) % size)
        assert out == [(i, rank, n) for i in range(size) for n in range(counts[i][rank])]
        assert peers == sorted(set(peers)), "each peer once, the next ranks first"


# --- volumes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("experts", "k", "parts"), [(6, 2, 3), (8, 4, 2), (6, 6, 6), (4, 1, 4)])
def test_distinct_parts_is_the_mean_over_all_choices(experts, k, parts):
    each = experts // parts
    hit = [len({e // each for e in choice}) for choice in combinations(range(experts), k)]
    assert distinct_parts(experts, k, parts) == pytest.approx(sum(hit) / len(hit), rel=1e-12)
    with pytest.raises(ValueError, match="parts must divide"):
        distinct_parts(experts, k, experts + 1)
    with pytest.raises(ValueError, match="top_k must be between 1"):
        distinct_parts(experts, experts + 1, parts)


def off_node(nodes: int, limit: int | None = None, tokens: int = 20_000) -> tuple[float, float, float]:
    """Rows per token that leave its node, E = 256, K = 8, 8 GPUs to a node: plain, once per rank, once per node.

    Counted in a simulation with the dispatchers' own `destinations`. `limit`: the router first takes so many nodes.
    """
    experts, k, ranks = 256, 8, 8 * nodes
    scores = torch.rand(tokens, experts)
    if limit is not None and limit < nodes:  # DeepSeek-V3: a node's score is the sum of its best K / limit
        per_node = scores.view(tokens, nodes, -1)
        best = per_node.topk(k // limit, dim=2).values.sum(2).topk(limit, dim=1).indices
        allowed = torch.zeros(tokens, nodes, dtype=torch.bool).scatter_(1, best, True)
        scores = scores.masked_fill(~allowed.repeat_interleave(experts // nodes, 1), -1)
    ids = scores.topk(k, dim=1).indices
    own = torch.arange(tokens) % nodes
    plain = (ids // (experts // nodes) != own[:, None]).sum().item()
    elsewhere = [0, 0]
    for level, parts in enumerate((ranks, nodes)):
        for n in range(nodes):
            counts, _ = destinations(ids[own == n], range(experts), parts)
            there = torch.arange(parts) // (parts // nodes) != n
            elsewhere[level] += counts[there].sum().item()
    return plain / tokens, elsewhere[0] / tokens, elsewhere[1] / tokens


@pytest.mark.parametrize("nodes", [2, 4, 8])
def test_the_readmes_rows_per_token(nodes):
    """Simulation = closed form = what the page of the dispatchers says."""
    plain, per_rank, per_node = off_node(nodes)
    leave = (nodes - 1) / nodes
    formula = (8 * leave, distinct_parts(256, 8, 8 * nodes) * leave, distinct_parts(256, 8, nodes) * leave)
    assert (plain, per_rank, per_node) == pytest.approx(formula, abs=0.03)
    limited = off_node(nodes, limit=4)[2]
    row = re.search(rf"^\| {nodes} \|(.*)\|$", (ROOT / "docs" / "dispatchers.md").read_text(), re.MULTILINE)
    assert row, f"docs/dispatchers.md has no row for {nodes} nodes"
    printed = [float(cell) for cell in row[1].split("|")]
    assert printed[:3] == [round(f, 2) for f in formula]
    assert printed[3] == pytest.approx(limited, abs=0.03)


def test_a_schedule_in_one_process_is_the_layer_and_an_error_is_its_own():
    mine, plain = (MoE(8, 8, 4, 2, overlap=overlap) for overlap in (Overlap(2), None))
    plain.load_state_dict(mine.state_dict())
    x = torch.randn(5, 8)
    torch.testing.assert_close(mine(x), plain(x))

    def fails(*_):
        raise ArithmeticError("not today")

    mine.experts._compute = fails
    with pytest.raises(ArithmeticError, match="not today"):
        mine(x)
