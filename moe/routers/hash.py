"""The hash router: a token's id says its experts, and nothing is learned about it."""

from __future__ import annotations

import heapq

import torch
from torch import Tensor, nn

from ...kernels.router_logits import router_logits
from ...kernels.routing import Routing, pairs_of_experts
from ...kernels.topk import SCORES
from ...kernels.topk.reference import EPS, score_of
from .given import Given
from .router import Router


class HashRouter(Router):
    """Each token id has its K experts, in a table: `layer(x, ids=token_ids)`. Every weight is `scale` / K.

    `vocab_size` V. `table` int [V, K] says the experts of each id; None: drawn from `seed`, K different ones for each
    id, as likely as any. `balanced_table` makes one from a corpus. It is a buffer, saved with the model.

    With `score` there is a gate, and weights are its scores at the experts of the table: "softmax", "sigmoid",
    "sqrtsoftplus" (DeepSeek-V4's first layers), divided by their sum if `renormalize`. Without one the router has no
    parameters, and the output teaches it nothing.

    Source: Roller et al., Hash Layers (2021).

    >>> router = HashRouter(hidden_size=16, num_experts=8, top_k=1, vocab_size=100)
    >>> ids = torch.tensor([5, 7, 5])
    >>> a, b, c = router(torch.randn(3, 16), Given(ids=ids)).expert_ids[:, 0].tolist(); a == c
    True
    """

    needs_ids = True
    balances = False
    table: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        vocab_size: int,
        table: Tensor | None = None,
        seed: int = 0,
        score: str | None = None,
        renormalize: bool = False,
        scale: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k)
        if not hasattr(vocab_size, "__index__") or vocab_size < 1:
            raise ValueError(f"HashRouter: vocab_size must be a positive integer, got {vocab_size!r}")
        known = [name for name in SCORES if name != "topk_softmax"]
        if score not in (None, *known):
            raise ValueError(f"HashRouter: score must be None or one of {', '.join(known)}, got {score!r}")
        if not 0 < scale < float("inf"):
            raise ValueError(f"HashRouter: scale must be positive and finite, got {scale}")
        if table is not None:
            _check_table(table, vocab_size, num_experts, top_k)
        self.vocab_size, self.seed, self.score = vocab_size, seed, score
        self.renormalize, self.scale = renormalize, scale
        self.given_table = table
        self.trains_gate = score is not None
        self.register_buffer("table", torch.empty(vocab_size, top_k, dtype=torch.int32, device=device))
        self.weight = None
        if score is not None:
            self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The gate as nn.Linear; the table as it was given, or drawn again, with the same experts."""
        if self.weight is not None:
            nn.init.uniform_(self.weight, -(self.hidden_size**-0.5), self.hidden_size**-0.5)
        if not self.table.is_meta:
            table = self.given_table
            drawn = _drawn(self.vocab_size, self.num_experts, self.top_k, self.seed) if table is None else table
            self.table.copy_(drawn)

    def choose(self, x: Tensor, given: Given) -> Routing:
        if given.ids is None:
            raise ValueError(f"HashRouter: given.ids must be the token ids [{len(x)}], got None")
        ids = given.ids.long()
        if given.mask is not None:
            ids = ids.masked_fill(~given.mask, 0)
        if x.device.type == "cpu" and not torch.compiler.is_compiling() and ids.numel():
            least, most = ids.aminmax()
            if least < 0 or most >= self.vocab_size:
                wrong = least if least < 0 else most
                raise ValueError(f"HashRouter: ids must be between 0 and {self.vocab_size - 1}, got {wrong.item()}")
        experts = self.table[ids]
        counts = pairs_of_experts(experts, self.num_experts).int()
        if self.weight is None or self.score is None:
            dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
            weights = torch.full(experts.shape, self.scale / self.top_k, dtype=dtype, device=x.device)
            return Routing(experts, weights, self.num_experts, counts)
        logits = router_logits(x, self.weight)
        scores = score_of(logits, self.score)
        weights = scores.gather(1, experts.long())
        if self.renormalize:
            weights = weights / (weights.sum(1, keepdim=True) + EPS)
        return Routing(experts, weights * self.scale, self.num_experts, counts, scores, logits)

    def weights_at(self, routing: Routing, ids: Tensor, none: Tensor) -> Tensor:
        if self.score is not None:
            return super().weights_at(routing, ids, none)
        return torch.full_like(routing.weights, self.scale / self.top_k)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, vocab_size={self.vocab_size}, score={self.score!r}"


def balanced_table(counts: Tensor, num_experts: int, top_k: int = 1) -> Tensor:
    """A table int32 [V, K] for HashRouter under which a corpus loads all experts evenly: `counts` [V] says how often
    each id occurs in it. The most frequent id first, each goes to the K experts with the least load so far (Graham's
    rule: the largest load is at most 4/3 of the best there is for K = 1), the lowest expert first among equals.

    Raises ValueError where counts is not [V] of finite numbers of at least 0, or K is not between 1 and E.

    >>> balanced_table(torch.tensor([9, 1, 5, 4]), num_experts=2)[:, 0].tolist()
    [0, 0, 1, 1]
    """
    if not isinstance(counts, Tensor) or counts.dim() != 1:
        what = tuple(counts.shape) if isinstance(counts, Tensor) else type(counts).__name__
        raise ValueError(f"balanced_table: counts must be a tensor [V], got {what}")
    numbers = counts.double()
    if not numbers.isfinite().all() or (numbers < 0).any():
        raise ValueError("balanced_table: counts must be finite and not negative, got some that are not")
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"balanced_table: top_k must be between 1 and num_experts ({num_experts}), got {top_k}")
    table = torch.empty(len(counts), top_k, dtype=torch.int32)
    loads = [(0.0, e) for e in range(num_experts)]
    often = numbers.tolist()
    for token in numbers.sort(descending=True, stable=True).indices.tolist():
        taken = [heapq.heappop(loads) for _ in range(top_k)]
        table[token] = torch.tensor([e for _, e in taken], dtype=torch.int32)
        for load, e in taken:
            heapq.heappush(loads, (load + often[token], e))
    return table


def _drawn(vocab: int, experts: int, k: int, seed: int) -> Tensor:
    """K different experts for each id, int32 [V, K], from `seed` alone."""
    generator = torch.Generator().manual_seed(seed)
    some = [torch.rand(min(4096, vocab - at), experts, generator=generator) for at in range(0, vocab, 4096)]
    return torch.cat([r.argsort(1)[:, :k] for r in some]).int()


def _check_table(table: Tensor, vocab: int, experts: int, k: int) -> None:
    if not isinstance(table, Tensor) or table.is_floating_point() or tuple(table.shape) != (vocab, k):
        what = f"{table.dtype} {tuple(table.shape)}" if isinstance(table, Tensor) else type(table).__name__
        raise ValueError(f"HashRouter: table must be integers [V, K] = [{vocab}, {k}], got {what}")
    if table.min() < 0 or table.max() >= experts:
        wrong = table.min() if table.min() < 0 else table.max()
        raise ValueError(f"HashRouter: table must name experts between 0 and {experts - 1}, got {wrong.item()}")
    ordered = table.sort(1).values
    if (ordered[:, 1:] == ordered[:, :-1]).any():
        raise ValueError("HashRouter: table must name different experts for each id, got one twice")
