"""How many rows each dispatcher moves, by formula: exact for a router that chooses evenly.

| rows of one token, one direction | leave the rank | leave the node |
|---|---|---|
| plain all-to-all, one per expert | K (G - 1) / G | K (N - 1) / N |
| AllToAll | d(G) (G - 1) / G | d(G) (N - 1) / N |
| Hierarchical | d(N) (N - 1) / N, then inside d(G) (g - 1) / g | d(N) (N - 1) / N |
| AllGather | G - 1 | G - g |

with G ranks on N nodes of g, and d(n) the expected number of distinct ones, of n equal parts of the experts, that a
token's K experts lie in.
"""

from __future__ import annotations

from math import comb


def distinct_parts(num_experts: int, top_k: int, parts: int) -> float:
    """d(n) = n (1 - C(E - E/n, K) / C(E, K)): the expected number of parts that K of E experts, all different, lie in.

    >>> distinct_parts(num_experts=4, top_k=2, parts=2)  # 2 of 6 pairs stay in one half
    1.6666666666666665
    """
    if parts < 1 or num_experts % parts:
        raise ValueError(f"distinct_parts: parts must divide num_experts ({num_experts}), got {parts}")
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"distinct_parts: top_k must be between 1 and num_experts ({num_experts}), got {top_k}")
    return parts * (1 - comb(num_experts - num_experts // parts, top_k) / comb(num_experts, top_k))
