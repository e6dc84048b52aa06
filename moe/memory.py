"""Memory: a layer of millions of value rows, of which a token takes the few whose product keys are nearest."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.autocast import no_autocast
from ..kernels.routing import Routing
from ..kernels.topk import topk
from ..placement.files import write_whole
from .columns import by_columns


@dataclass
class Usage:
    """Which values were used while it was counted: `weight` fp64 [E], the sum of the weights of each.

    `share`: the part of all values that had any weight. `kl`: log E + sum_e z_e log z_e, z the weights as parts of
    their sum: 0 where all are used alike, log E where one has everything. Source: Lample et al. (2019), section 4.
    """

    weight: Tensor = field(repr=False)

    @property
    def share(self) -> float:
        return (self.weight > 0).double().mean().item()

    @property
    def kl(self) -> float:
        z = self.weight / self.weight.sum()
        return math.log(len(z)) + torch.special.xlogy(z, z).sum().item()


class Memory(nn.Module):
    """Product-key memory: x [..., D] -> y [..., D], each token the weighted sum of K of E = n * n rows of values.

        q = norm(W_q x)  [H, 2, h];   s_1 = K_1 q_1,  s_2 = K_2 q_2  [n];   score of value i * n + j: s_1[i] + s_2[j]
        y = sum over heads and their K best values of softmax(score) * values[id]

    The K best of n * n scores are found among the K best of each half: of these only pairs (r, r') of ranks with
    r * r' <= K can be among them, about K log K. It is the exhaustive search, ties included: of equal sums the one
    whose first half stands higher comes first, then whose second half does; of equal halves the lower number.

    num_keys         n, of each half; E = n * n values. top_k K for each of `heads` H, which share the values
    key_size         h, of each half
    query_norm       LayerNorm of each head's query
    value_size       width of a value, Dv. Where it is not D, or with `gated`, a projection Dv -> D follows
    gated            y = W_o (sum * silu(W_g x)), "Memory+"
    sparse_grad      the gradient of `values` is a sparse tensor [E, Dv] of the rows chosen, for torch.optim.SparseAdam;
                     without it a dense one
    values_of        another Memory whose values this one shares, with keys of its own. `to_host` and `to_disk` move
                     those of one Memory: each of several has its own copy afterwards
    group            a process group: rank g holds columns [g Dv / G, (g + 1) Dv / G) of all values. Tokens differ from
                     rank to rank; choices travel to all, each rank looks up its columns for all tokens, and columns
                     travel home. All ranks draw the same values from the same seed. The gradient of `values` is that of
                     the sum of all ranks' losses; the other parameters are whole, and to be averaged (DDP, ignoring
                     `values`)

    `layer(x, mask)`: as MoE's mask. `last_routing`: Routing of the last forward, detached: ids and weights [T, H * K].
    `counting()` says which values are used. `to_host()` and `to_disk(path)` move the values out of device memory.

    Raises ValueError / TypeError naming argument, rule and value. Cost per token: 4 H n h FLOPs for scores, 2 H K Dv
    for values. Sources: Lample et al., Large Memory Layers with Product Keys (2019); Berges et al., Memory Layers at
    Scale (2024).

    >>> memory = Memory(hidden_size=16, num_keys=32, top_k=4, heads=2)
    >>> memory(torch.randn(3, 16)).shape, memory.last_routing.num_experts, memory.last_routing.expert_ids.shape
    (torch.Size([3, 16]), 1024, torch.Size([3, 8]))
    """

    values: nn.Parameter | None  # None: they are on the host or on disk
    _first: Tensor
    _second: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_keys: int,
        top_k: int,
        *,
        heads: int = 4,
        key_size: int = 128,
        value_size: int | None = None,
        query_norm: bool = True,
        gated: bool = False,
        sparse_grad: bool = False,
        values_of: Memory | None = None,
        group: dist.ProcessGroup | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        width = hidden_size if value_size is None else value_size
        sizes = {"hidden_size": hidden_size, "num_keys": num_keys, "top_k": top_k, "heads": heads}
        for name, size in {**sizes, "key_size": key_size, "value_size": width}.items():
            if not hasattr(size, "__index__") or isinstance(size, bool):
                raise TypeError(f"Memory: {name} must be an integer, got {size!r}")
            if size < 1:
                raise ValueError(f"Memory: {name} must be at least 1, got {size}")
        if top_k > num_keys**2:
            raise ValueError(f"Memory: top_k must be at most the {num_keys**2} values, got {top_k}")
        if num_keys**2 >= 2**31:
            raise ValueError(f"Memory: num_keys must be below 46341: values have numbers of 32 bits, got {num_keys}")
        ranks = 1 if group is None else group.size()
        if width % ranks:
            raise ValueError(f"Memory: value_size must be a multiple of the {ranks} ranks of group, got {width}")
        _check_shared(values_of, num_keys, width, group)
        self.hidden_size, self.num_keys, self.top_k, self.heads, self.key_size = *sizes.values(), key_size
        self.value_size, self.gated, self.sparse_grad, self.group = width, gated, sparse_grad, group
        where: dict = {"device": device, "dtype": dtype}
        self.query = nn.Linear(hidden_size, heads * 2 * key_size, **where)
        self.query_norm = nn.LayerNorm(2 * key_size, **where) if query_norm else None
        self.keys = nn.Parameter(torch.empty(heads, 2, num_keys, key_size, **where))
        shape = (num_keys**2, width // ranks)
        self.values = nn.Parameter(torch.empty(shape, **where)) if values_of is None else values_of.values
        self.gate = nn.Linear(hidden_size, width, bias=False, **where) if gated else None
        self.out = nn.Linear(width, hidden_size, bias=False, **where) if gated or width != hidden_size else None
        self._stored: Tensor | None = None if values_of is None else values_of._stored
        self._usage: Usage | None = None
        self.last_routing: Routing | None = None
        first, second = _pairs(top_k, num_keys)
        self.register_buffer("_first", torch.tensor(first, device=device), persistent=False)
        self.register_buffer("_second", torch.tensor(second, device=device), persistent=False)
        self.reset_parameters(values=values_of is None)

    @property
    def num_values(self) -> int:
        """E."""
        return self.num_keys**2

    def reset_parameters(self, values: bool = True) -> None:
        """Keys uniform within 1 / sqrt(h), values normal with deviation 1 / sqrt(Dv), as Lample et al."""
        nn.init.uniform_(self.keys, -(self.key_size**-0.5), self.key_size**-0.5)
        if not values or self.values is None:
            return
        if self.group is None:
            nn.init.normal_(self.values, std=self.value_size**-0.5)
            return
        each, rank = self.values.shape[1], self.group.rank()
        with torch.no_grad():
            for rows in self.values.split(1 << 12):  # as one rank would draw them, and no more than that at once
                full = rows.new_empty(len(rows), self.value_size).normal_(std=self.value_size**-0.5)
                rows.copy_(full[:, rank * each : (rank + 1) * each])

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError(f"Memory: x must be a tensor [..., {self.hidden_size}], got {type(x).__name__}")
        if x.dim() == 0 or x.shape[-1] != self.hidden_size:
            raise ValueError(f"Memory: x must be [..., {self.hidden_size}], got {tuple(x.shape)}")
        if mask is not None and (mask.dtype != torch.bool or mask.shape != x.shape[:-1]):
            rule = f"bool {list(x.shape[:-1])} as x is but for D"
            raise ValueError(f"Memory: mask must be {rule}, got {mask.dtype} {list(mask.shape)}")
        tokens = x.reshape(-1, self.hidden_size)
        if mask is not None:
            tokens = tokens.masked_fill(~mask.reshape(-1, 1), 0)
        routing = self.route(tokens)
        if mask is not None:
            routing = routing.masked(mask.reshape(-1))
        self.last_routing = routing.detach()
        if self._usage is not None:
            seen = routing.expert_ids >= 0
            used = routing.weights.detach().double() * seen
            self._usage.weight.index_add_(0, routing.expert_ids.clamp_min(0).flatten().long(), used.flatten())
        y = self.look_up(routing).to(x.dtype)
        if self.gate is not None:
            y = y * F.silu(self.gate(tokens))
        y = y if self.out is None else self.out(y)
        return y.reshape(x.shape)

    def route(self, tokens: Tensor) -> Routing:
        """Which values each of tokens [T, D] takes, best first in each head: ids and fp32 weights [T, H * K]."""
        count, heads = len(tokens), self.heads
        query = self.query(tokens).unflatten(1, (heads, -1))
        query = query if self.query_norm is None else self.query_norm(query)
        with no_autocast(tokens.device):
            wide = torch.float64 if query.dtype == torch.float64 else torch.float32
            halves = query.unflatten(2, (2, -1)).movedim(0, 2).flatten(0, 1).to(wide)  # [H * 2, T, h]
            scores = torch.bmm(halves, self.keys.flatten(0, 1).to(wide).mT)
            scores = scores.unflatten(0, (heads, 2)).movedim(2, 0).reshape(count * heads, 2, self.num_keys)
            best = min(self.top_k, self.num_keys)
            ids = _best(scores.flatten(0, 1), best).view(count * heads, 2, best)
            kept = scores.gather(2, ids)
            first, second = self._first, self._second
            sums = kept[:, 0].index_select(1, first) + kept[:, 1].index_select(1, second)
            among = _best(sums, self.top_k)
            weights = sums.gather(1, among).softmax(1)
            numbers = ids[:, 0].index_select(1, first) * self.num_keys + ids[:, 1].index_select(1, second)
            shape = (count, heads * self.top_k)
            chosen = numbers.gather(1, among).view(shape)
        return Routing.from_topk(chosen, weights.view(shape), self.num_values)

    def look_up(self, routing: Routing) -> Tensor:
        """The weighted sums of values [T, Dv] of any routing over them; -1 is no value."""
        if self.group is None:
            return self._bag(routing.expert_ids, routing.weights)
        return by_columns(routing.expert_ids, routing.weights, self.group, self._bag)

    def _bag(self, ids: Tensor, weights: Tensor) -> Tensor:
        values = self._stored if self.values is None else self.values
        assert values is not None
        weights = weights.masked_fill(ids < 0, 0).to(values.dtype)
        ids = ids.clamp_min(0).long()
        if values.device != ids.device:  # on the host: what is asked for comes over, each row once
            needed, ids = ids.unique(return_inverse=True)
            values = values.index_select(0, needed.to(values.device)).to(ids.device)
        sparse = self.sparse_grad and values.requires_grad
        return F.embedding_bag(ids, values, per_sample_weights=weights, mode="sum", sparse=sparse)

    @contextmanager
    def counting(self) -> Iterator[Usage]:
        """Counts which values are used by the forwards inside: a Usage."""
        device = self.keys.device
        before, self._usage = self._usage, Usage(torch.zeros(self.num_values, dtype=torch.float64, device=device))
        try:
            yield self._usage
        finally:
            self._usage = before

    def to_host(self) -> Memory:
        """Moves the values to host memory, frozen: page-locked where there is a GPU. The rows that a forward asks for
        are copied to the device, each once. They are no parameter any more, and not in `state_dict`."""
        host = self._out_of_the_module("to_host").cpu()
        self._stored = host.pin_memory() if torch.cuda.is_available() else host
        self.values = None
        return self

    def to_disk(self, path: str | os.PathLike[str]) -> Memory:
        """Writes the values to the new file `path`, frozen, and reads from there what a forward asks for: the file is
        mapped, and the operating system keeps what is used often. Raises FileExistsError where there is one."""
        values, file = self._out_of_the_module("to_disk"), Path(path)
        if file.exists():
            raise FileExistsError(f"Memory: path must be a new file, got {file}, which exists")

        def write(out: BinaryIO) -> None:
            for rows in values.split(1 << 12):
                out.write(rows.cpu().contiguous().view(torch.uint8).numpy().data)

        write_whole(file, write)
        mapped = torch.from_file(str(file), shared=False, size=values.numel(), dtype=values.dtype)
        self._stored, self.values = mapped.view(values.shape), None
        return self

    def _out_of_the_module(self, what: str) -> Tensor:
        if self.values is None:
            raise ValueError(f"Memory: values must be in the module for {what}, got a memory whose values have left it")
        return self.values.detach()

    def extra_repr(self) -> str:
        return f"num_values={self.num_values}, top_k={self.top_k}, heads={self.heads}, value_size={self.value_size}"


def _best(scores: Tensor, k: int) -> Tensor:
    """int64 [R, k]: the places of the k best, best first, the lowest first among equals."""
    return topk(scores.detach(), k, score="topk_softmax").expert_ids.long()


def _pairs(top_k: int, num_keys: int) -> tuple[list[int], list[int]]:
    """The pairs of ranks, from 0, that can be among the K best sums: (r + 1)(r' + 1) <= K, in lexicographic order.

    A pair (r, r') has (r + 1)(r' + 1) - 1 others before it, whatever the scores: those with ranks r and r' at most.
    """
    best = min(top_k, num_keys)
    pairs = [(r, s) for r in range(best) for s in range(min(best, top_k // (r + 1)))]
    return [r for r, _ in pairs], [s for _, s in pairs]


def _check_shared(other: Memory | None, num_keys: int, width: int, group: dist.ProcessGroup | None) -> None:
    if other is None:
        return
    if not isinstance(other, Memory):
        raise TypeError(f"Memory: values_of must be a Memory or None, got {type(other).__name__}")
    if (other.num_keys, other.value_size, other.group) != (num_keys, width, group):
        what = f"{other.num_keys} keys, values of {other.value_size}"
        raise ValueError(f"Memory: values_of must have {num_keys} keys, values of {width} and this group, got {what}")
