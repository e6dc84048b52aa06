"""DeepEP V2's ElasticBuffer as far as DeepEP uses it, moving rows over gloo: what it takes, refuses and gives back.

Written from deep_ep/buffers/elastic.py, csrc/elastic/buffer.hpp and the kernels of DeepEP 2.1.0 (dd758ca), in the
layout that does not expand, deterministic, on one node.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

topk_idx_t = torch.int64


@dataclass
class EPHandle:
    """`sent`: for each rank the tokens that went there, rising; `received`: rows from each rank."""

    num_experts: int
    num_max_tokens_per_rank: int
    num_sms: int
    topk_idx: Tensor
    recv_src_metadata: Tensor
    sent: list[Tensor]
    received: list[int]


class ElasticBuffer:
    def __init__(self, group, num_max_tokens_per_rank=0, hidden=0, num_topk=0, deterministic=False):
        self.group, self.num_ranks, self.rank_idx = group, dist.get_world_size(group), dist.get_rank(group)
        self.num_max_tokens_per_rank, self.hidden, self.num_topk = num_max_tokens_per_rank, hidden, num_topk

    def dispatch(
        self,
        x,
        topk_idx=None,
        topk_weights=None,
        num_experts=None,
        num_max_tokens_per_rank=None,
        num_sms=0,
        handle=None,
    ):
        assert num_sms or num_experts  # it works out the one from the other
        assert x.dtype == torch.bfloat16
        assert x.is_contiguous()
        if handle is None:
            handle = self._layout(x, topk_idx, num_experts, num_max_tokens_per_rank)
        else:
            assert topk_idx is None
            assert num_experts in (None, handle.num_experts)
        assert x.shape == (len(handle.topk_idx), self.hidden)
        each = handle.num_experts // self.num_ranks
        ids = self._to_ranks(handle.topk_idx, handle)
        local = torch.where((ids >= self.rank_idx * each) & (ids < (self.rank_idx + 1) * each), ids % each, -1)
        weights = None
        if topk_weights is not None:
            assert topk_weights.dtype == torch.float32
            assert topk_weights.is_contiguous()
            assert topk_weights.shape == handle.topk_idx.shape
            weights = self._to_ranks(topk_weights, handle)  # all K of a token, whoever holds their experts
        return self._to_ranks(x, handle), local, weights, handle, None

    def combine(self, x, handle, topk_weights=None, num_sms=0):
        rows = sum(handle.received)
        assert x.dtype == torch.bfloat16
        assert x.is_contiguous()
        assert x.shape == (rows, self.hidden)
        home = self._back(x, handle)
        y = torch.zeros(len(handle.topk_idx), self.hidden)
        for tokens, part in zip(handle.sent, home, strict=True):
            y[tokens] += part.float()
        weights = None
        if topk_weights is not None:
            assert topk_weights.dtype == torch.float32
            assert topk_weights.is_contiguous()
            assert topk_weights.shape == (rows, handle.topk_idx.shape[1])
            weights = torch.zeros(handle.topk_idx.shape)
            holder = torch.where(handle.topk_idx < 0, -1, handle.topk_idx // (handle.num_experts // self.num_ranks))
            for rank, (tokens, part) in enumerate(zip(handle.sent, self._back(topk_weights, handle), strict=True)):
                weights[tokens] = torch.where(holder[tokens] == rank, part, weights[tokens])
        return y.bfloat16(), weights, None

    def _layout(self, x, topk_idx, num_experts, num_max_tokens_per_rank):
        assert topk_idx.dtype == topk_idx_t
        assert topk_idx.is_contiguous()
        assert topk_idx.shape[1] <= self.num_topk
        assert 1 <= len(topk_idx) <= num_max_tokens_per_rank <= self.num_max_tokens_per_rank
        assert num_experts % self.num_ranks == 0
        assert topk_idx.min() >= -1
        assert topk_idx.max() < num_experts
        for row in topk_idx.tolist():
            chosen = [e for e in row if e >= 0]
            assert len(chosen) == len(set(chosen)), "a trap on the device"
        holder = torch.where(topk_idx < 0, -1, topk_idx // (num_experts // self.num_ranks))
        sent = [(holder == rank).any(1).nonzero().flatten() for rank in range(self.num_ranks)]
        counts = torch.tensor([len(tokens) for tokens in sent])
        received = torch.empty_like(counts)
        dist.all_to_all_single(received, counts, group=self.group)
        metadata = torch.zeros(int(received.sum()), topk_idx.shape[1] + 2, dtype=torch.int32)
        sizes = (num_experts, num_max_tokens_per_rank, 24)
        return EPHandle(*sizes, topk_idx.clone(), metadata, sent, received.tolist())

    def _to_ranks(self, t: Tensor, handle: EPHandle) -> Tensor:
        outgoing, counts = t[torch.cat(handle.sent)], [len(tokens) for tokens in handle.sent]
        incoming = t.new_empty(sum(handle.received), t.shape[1])
        dist.all_to_all_single(incoming, outgoing, handle.received, counts, group=self.group)
        return incoming

    def _back(self, t: Tensor, handle: EPHandle) -> tuple[Tensor, ...]:
        counts = [len(tokens) for tokens in handle.sent]
        home = t.new_empty(sum(counts), t.shape[1])
        dist.all_to_all_single(home, t, counts, handle.received, group=self.group)
        return home.split(counts)
