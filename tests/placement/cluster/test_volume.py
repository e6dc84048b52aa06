"""Rows per token: the formulas against every choice there is, and against tokens that are counted one by one."""

import doctest
from itertools import combinations

import numpy as np
import pytest

from headgate.placement.cluster import volume
from headgate.placement.cluster.volume import VOLUMES, Rows, distinct_parts, rows_per_token


def test_examples():
    result = doctest.testmod(volume)
    assert result.attempted == 3
    assert not result.failed


@pytest.mark.parametrize(("experts", "k", "parts", "at_most"), [(6, 2, 3, 1), (8, 4, 4, 2), (8, 3, 8, 3), (6, 3, 3, 2)])
def test_at_most_is_the_mean_over_all_free_choices_cut_off(experts, k, parts, at_most):
    each = experts // parts
    hit = [min(len({e // each for e in choice}), at_most) for choice in combinations(range(experts), k)]
    if at_most * each < k:
        with pytest.raises(ValueError, match=r"at_most parts must hold top_k \(2\) experts"):
            distinct_parts(experts, k, parts, at_most)
    else:
        assert distinct_parts(experts, k, parts, at_most) == pytest.approx(sum(hit) / len(hit), rel=1e-12)
        assert distinct_parts(experts, k, parts, parts) == distinct_parts(experts, k, parts)


def chosen(tokens: int, experts: int, k: int, nodes: int, at_most: int | None) -> np.ndarray:
    """bool [T, E] of an even router, which first takes the `at_most` nodes with the best experts."""
    scores = np.random.default_rng(0).random((tokens, experts))
    if at_most is not None:
        best = scores.reshape(tokens, nodes, -1).max(2)
        taken = best >= np.sort(best, 1)[:, -at_most, None]
        scores = np.where(np.repeat(taken, experts // nodes, 1), scores, -1)
    return scores >= np.sort(scores, 1)[:, -k, None]


def counted(hit: np.ndarray, ranks: int, per_node: int, dispatcher: str) -> Rows:
    """Rows per token, by moving every token of every rank. `hit`: bool [T, E]; token t belongs to rank t mod G."""
    tokens, nodes = len(hit), ranks // per_node
    home = np.arange(tokens) % ranks
    by_rank = hit.reshape(tokens, ranks, -1)
    own_rank, own_node = np.eye(ranks, dtype=bool)[home], np.eye(nodes, dtype=bool)[home // per_node]
    near = np.repeat(own_node, per_node, 1) & ~own_rank
    far = np.repeat(~own_node, per_node, 1)
    if dispatcher == "plain":
        copies = by_rank.sum(2)
    else:
        copies = by_rank.any(2).astype(int)
    if dispatcher in ("plain", "all_to_all"):
        return Rows((copies * near).sum() / tokens, (copies * far).sum() / tokens)
    to_nodes = copies.reshape(tokens, nodes, per_node).any(2)
    elsewhere = np.arange(ranks) % per_node != (home % per_node)[:, None]  # the first to have it has the token's number
    return Rows((copies * elsewhere).sum() / tokens, (to_nodes & ~own_node).sum() / tokens)


@pytest.mark.parametrize("dispatcher", ["plain", "all_to_all", "hierarchical", "pipelined"])
@pytest.mark.parametrize(
    ("ranks", "per_node", "at_most"), [(8, 8, None), (32, 8, None), (64, 8, None), (64, 8, 4), (8, 1, 3)]
)
def test_an_even_router_sends_what_the_formula_says(dispatcher, ranks, per_node, at_most):
    experts, k = 64, 6
    hit = chosen(20_000, experts, k, ranks // per_node, at_most)
    assert (hit.sum(1) == k).all()
    found = counted(hit, ranks, per_node, dispatcher)
    said = rows_per_token(
        dispatcher, ranks=ranks, ranks_per_node=per_node, num_experts=experts, top_k=k, at_most_nodes=at_most
    )
    loose = 0.01 if at_most else 0.006  # with a limit, distinct ranks are a little low
    assert found.inside == pytest.approx(said.inside, rel=loose, abs=0.01)
    assert found.across == pytest.approx(said.across, rel=loose, abs=0.01)


def test_collectives_bring_every_row_once():
    """All-gather: each of G - 1 others gets the row. All-reduce: each rank sends all but its own share, twice."""
    sizes = {"ranks_per_node": 4, "num_experts": 12, "top_k": 2}
    gather = rows_per_token("all_gather", ranks=12, **sizes)
    assert gather == Rows(inside=3 * 3, across=2)
    reduce = rows_per_token("slice_all_reduce", ranks=12, **sizes)
    assert reduce.inside + reduce.across == pytest.approx(2 * 11 / 12)
    assert rows_per_token("all_gather", ranks=4, **sizes) == Rows(3, 0)


def test_no_dispatcher_moves_more_between_nodes_than_all_gather():
    sizes = {"ranks": 16, "ranks_per_node": 4, "num_experts": 32}
    for k in (1, 4, 32):
        rows = {name: rows_per_token(name, top_k=k, **sizes) for name in VOLUMES}
        assert rows["hierarchical"].across <= rows["all_gather"].across + 1e-12
        assert rows["all_to_all"].across <= rows["plain"].across + 1e-12
    assert rows["hierarchical"] == rows["all_gather"], "every token to every rank"


def test_what_cannot_be_is_refused():
    good = {"ranks": 8, "ranks_per_node": 4, "num_experts": 16, "top_k": 2}
    for change, words in [
        ({"ranks_per_node": 3}, r"ranks_per_node must divide ranks \(8\), got 3"),
        ({"ranks_per_node": 0}, r"ranks_per_node must divide ranks \(8\), got 0"),
        ({"num_experts": 12}, r"num_experts must be a multiple of ranks \(8\), got 12"),
        ({"top_k": 17}, "top_k must be between 1"),
        ({"at_most_nodes": 0}, "at_most parts must hold top_k"),
    ]:
        with pytest.raises(ValueError, match=words):
            rows_per_token("hierarchical", **(good | change))
    with pytest.raises(ValueError, match=r"dispatcher must be one of plain, all_to_all, .* got 'rings'"):
        rows_per_token("rings", **good)
