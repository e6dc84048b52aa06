"""DeepEP's kernels behind the dispatchers' contract, where they are installed (github.com/deepseek-ai/DeepEP, V2)."""

from __future__ import annotations

import copy
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..kernels.routing import Routing
from ..kernels.uncompiled import uncompiled
from . import collectives
from .agreement import Agreement, held_experts
from .all_to_all import checked
from .linear import back, send
from .wire import Wires

MOST_CHOICES, WIDTH = 32, 256  # lanes of a warp that read a token's choices; bf16 numbers that a warp moves at once
OLDEST = (9, 0)


@dataclass
class Buffered:
    """A Route through an ElasticBuffer. `handle`: where the rows of this call went, from its first `send` on."""

    buffer: Any
    num_experts: int
    hidden_size: int
    max_tokens: int
    handle: Any = None

    def send(self, rows: Tensor | None, beside: Sequence[Tensor], wire: str) -> tuple[Tensor | None, list[Tensor]]:
        if self.handle is None:
            assert rows is not None
            rows, ids, weights, self.handle, _ = self.buffer.dispatch(
                rows.contiguous(),
                topk_idx=beside[0].contiguous(),
                topk_weights=beside[1].contiguous(),
                num_experts=self.num_experts,
                num_max_tokens_per_rank=self.max_tokens,
            )
            return rows, [ids, weights.masked_fill(ids < 0, 0)]
        received, ids, weights, _, _ = self.buffer.dispatch(
            self._rows(rows, self.handle.topk_idx, beside),
            topk_weights=beside[0].contiguous() if beside else None,
            num_experts=self.num_experts,
            num_sms=self.handle.num_sms,
            handle=self.handle,
        )
        moved = [weights.masked_fill(ids < 0, 0)] if beside else []
        return (None if rows is None else received), moved

    def back(self, rows: Tensor | None, beside: Sequence[Tensor], wire: str) -> tuple[Tensor | None, list[Tensor]]:
        weights = beside[0].contiguous() if beside else None
        sent = self._rows(rows, self.handle.recv_src_metadata, beside)
        y, moved, _ = self.buffer.combine(sent, self.handle, topk_weights=weights)
        return (None if rows is None else y), [moved] if beside else []

    def _rows(self, rows: Tensor | None, like: Tensor, beside: Sequence[Tensor]) -> Tensor:
        """The kernels move rows, with weights or without: where only weights are wanted, rows of zeros go along."""
        if rows is not None:
            return rows.contiguous()
        return beside[0].new_zeros(like.shape[0], self.hidden_size, dtype=torch.bfloat16)


@dataclass(frozen=True)
class Ticket:
    """What combine needs of a dispatch: the route, the tokens of this rank, and what came."""

    route: Buffered
    tokens: int
    shape: torch.Size


class DeepEP:
    """What AllToAll does, by DeepEP's kernels: over NVLink, and over RDMA at most once to each node.

    `max_tokens`, `hidden_size`, `top_k`: the most tokens of a rank in one call, D (a multiple of 256), and the most
    experts per token (at most 32), the same on every rank. They decide the size of the buffer, so let one DeepEP serve
    all layers of that width. `buffer`: an ElasticBuffer of the same group and sizes to use in place of a new one.
    `group`: on NCCL; None: all ranks. `name`: see AllToAll.

    Rows are bf16, and travel exact; router weights travel in fp32. Sums over ranks are taken in fp32 and rounded once
    (once more for each node where there are several). Of a token's K weights each arrives only at the rank that holds
    its expert, the others as zero. A token's K experts must be different ones: the kernels stop the device otherwise.

    A dispatch is one all-gather of a few integers (the agreement, and that no rank has more than `max_tokens`) and
    ElasticBuffer.dispatch, which waits for the device to learn R. Combine is ElasticBuffer.combine; the backward pass
    of each is the other, on the layout that the forward pass left. `deterministic` sorts the rows that came, so that
    their order is the same on every run, and with it the bits of the experts' gradients.

    It has not run on a GPU yet: the suite runs it on a model of ElasticBuffer that moves rows over gloo
    (tests/support/elastic.py), written from DeepEP 2.1.0 (dd758ca).

    Raises ValueError / TypeError where it cannot run: no CUDA device, one older than sm_90, no deep_ep, a group without
    NCCL, or sizes that the kernels do not take; and on every rank, before rows move, where the ranks disagree.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        *,
        max_tokens: int,
        hidden_size: int,
        top_k: int,
        deterministic: bool = True,
        buffer: Any = None,
        name: str = "",
    ) -> None:
        check_sizes(max_tokens, hidden_size, top_k)
        self.agreement = Agreement("DeepEP", group, name, Wires())
        self.max_tokens, self.hidden_size, self.top_k = max_tokens, hidden_size, top_k
        self.deterministic = deterministic
        self.buffer = self._new_buffer() if buffer is None else buffer

    @staticmethod
    def why_not() -> str | None:
        """Why it cannot run in this process, in the form of the rule that is broken; None where it can."""
        if not torch.cuda.is_available():
            return "device must be a CUDA GPU, got none that torch sees"
        capability = torch.cuda.get_device_capability()
        if capability < OLDEST:
            return f"device must have compute capability 9.0, got {capability[0]}.{capability[1]}"
        if importlib.util.find_spec("deep_ep") is None:
            how = "python setup.py install in a clone of github.com/deepseek-ai/DeepEP, with nvidia-nccl-cu13>=2.30.4"
            return f"deep_ep must be installed ({how}), got no such package"
        import deep_ep  # type: ignore[import-not-found]

        if not hasattr(deep_ep, "ElasticBuffer"):
            return f"deep_ep must be 2.0 or newer, got {getattr(deep_ep, '__version__', 'one without ElasticBuffer')}"
        return None

    def _new_buffer(self) -> Any:
        why = self.why_not()
        if why:
            raise ValueError(f"DeepEP: {why}")
        group = self.agreement.group
        backends = dict(part.split(":") for part in dist.get_backend_config(group).split(","))
        if backends.get("cuda") != "nccl":
            raise ValueError(f"DeepEP: group must work on NCCL for CUDA, got {backends.get('cuda')}")
        # The buffer takes the group's communicator, which NCCL makes at the first collective: this one.
        mine = torch.tensor([[self.max_tokens, self.hidden_size, self.top_k]], device="cuda")
        sizes = list(map(tuple, collectives.all_gather(mine, group).tolist()))
        if len(set(sizes)) > 1:
            got = dict(zip(self.agreement.ranks, sizes, strict=True))
            raise ValueError(f"DeepEP: (max_tokens, hidden_size, top_k) must be the same on every rank, got {got}")
        import deep_ep

        return deep_ep.ElasticBuffer(
            group,
            num_max_tokens_per_rank=self.max_tokens,
            hidden=self.hidden_size,
            num_topk=self.top_k,
            deterministic=self.deterministic,
        )

    def local_experts(self, num_experts: int) -> range:
        return held_experts("DeepEP", num_experts, self.agreement.rank, self.agreement.size)

    @uncompiled
    def dispatch(self, x: Tensor, routing: Routing) -> tuple[Tensor, Routing, Ticket]:
        header = self.agreement.header(x, routing)
        tokens, complaint = self.agreement.gather(header, x.shape[0], x.device)
        self.agreement.enforce(complaint)
        self._check_call(x, routing, tokens)
        held = self.local_experts(routing.num_experts)
        ids, weights = routing.expert_ids, routing.weights.float()
        # The width of ids is chosen where DeepEP is built.
        width = sys.modules[type(self.buffer).__module__.split(".")[0]].topk_idx_t
        ids = torch.where((ids >= 0) & (ids < routing.num_experts), ids, -1).to(width)
        if not x.shape[0]:  # DeepEP's own tests have no rank without tokens; here it has one that goes nowhere
            x, weights, ids = F.pad(x, (0, 0, 0, 1)), F.pad(weights, (0, 0, 0, 1)), F.pad(ids, (0, 0, 0, 1), value=-1)
        route = Buffered(self.buffer, routing.num_experts, self.hidden_size, self.max_tokens)
        rows, ids, weights = send(x, ids, weights, route, ("exact", "exact"))
        local = Routing(ids.to(torch.int32), weights.to(routing.weights.dtype), len(held))
        return rows, local, Ticket(route, tokens[self.agreement.rank], rows.shape)

    @uncompiled
    def combine(self, rows: Tensor, ticket: Ticket) -> Tensor:
        rows = checked("DeepEP", rows, ticket.shape, torch.bfloat16)
        return back(rows, ticket.route, ("exact", "exact"))[: ticket.tokens]

    def _check_call(self, x: Tensor, routing: Routing, tokens: list[int]) -> None:
        """Every rank comes to the same words, as all know what is checked."""
        if x.dtype != torch.bfloat16:
            raise TypeError(f"DeepEP: x must be torch.bfloat16, got {x.dtype}")
        if x.shape[1] != self.hidden_size:
            raise ValueError(f"DeepEP: x must be [T, {self.hidden_size}], got {tuple(x.shape)}")
        if routing.expert_ids.shape[1] > self.top_k:
            raise ValueError(f"DeepEP: top_k must be at most {self.top_k}, got {routing.expert_ids.shape[1]}")
        if max(tokens) > self.max_tokens:
            rank = self.agreement.ranks[tokens.index(max(tokens))]
            raise ValueError(f"DeepEP: x must have at most {self.max_tokens} rows, got {max(tokens)} on rank {rank}")

    def __deepcopy__(self, memo: object) -> DeepEP:
        twin = copy.copy(self)  # of the same buffer, which cannot be copied
        twin.agreement = copy.deepcopy(self.agreement)
        return twin

    def __repr__(self) -> str:
        return f"DeepEP({self.agreement}, max_tokens={self.max_tokens})"


def check_sizes(max_tokens: int, hidden_size: int, top_k: int) -> None:
    if max_tokens < 1:
        raise ValueError(f"DeepEP: max_tokens must be at least 1, got {max_tokens}")
    if hidden_size < 1 or hidden_size % WIDTH:
        raise ValueError(f"DeepEP: hidden_size must be a multiple of {WIDTH}, got {hidden_size}")
    if not 1 <= top_k <= MOST_CHOICES:
        raise ValueError(f"DeepEP: top_k must be between 1 and {MOST_CHOICES}, got {top_k}")
