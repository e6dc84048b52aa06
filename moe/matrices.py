"""The parameters of a model as stacks of matrices, whatever cut them over ranks; which of them Muon is to update."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from .experts import Experts
from .hf.experts import cuts_of_experts, is_decorated
from .hf.experts import refusal as refused
from .ranks.whole import Slices
from .routers import Router
from .shards import Cut, shards_of

ROUTERS = frozenset({"gate", "router", "wg", "shared_expert_gate", "shared_gate"})
HEADS = frozenset({"lm_head", "embed_out", "output_layer", "head", "score", "classifier"})


@dataclass(frozen=True)
class Stack:
    """How a parameter [E, ., .] or [., .] is a stack of matrices.

    `rows`: 1 where outputs are dimension 1 of [E, out, in], 2 where they are dimension 2 (transformers' transposed
    experts). `ffn`: the dimension that folds cut, and that holds `blocks` matrices, one after the other. `group`: the
    ranks among which it is cut; None: this rank has it whole. `sizes`: how much of a block each of these ranks has.
    """

    rows: int = 1
    ffn: int = 1
    blocks: int = 1
    group: dist.ProcessGroup | None = None
    sizes: tuple[int, ...] = ()

    def units(self, t: Tensor) -> Tensor:
        """t [E, ., .] -> [E, blocks, m, n]."""
        return t.unflatten(self.ffn, (self.blocks, -1)).movedim(self.ffn, 1)

    def joined(self, units: Tensor) -> Tensor:
        """Back again."""
        return units.movedim(1, self.ffn).flatten(self.ffn, self.ffn + 1)

    def slices(self, t: Tensor) -> Slices:
        return Slices(self.units(t), self.ffn + 1, self.sizes)


def stack_of(parameter: Tensor, stack: Stack) -> Stack | None:
    """`stack` with the ranks that cut the matrices of a DTensor; None where several dimensions of a mesh do."""
    if not isinstance(parameter, DTensor):
        return stack
    cuts = [(i, p) for i, p in enumerate(parameter.placements) if not isinstance(p, Replicate)]
    if parameter.dim() == 3:  # whole experts need no company
        cuts = [(i, p) for i, p in cuts if not (isinstance(p, Shard) and p.dim == 0)]
    if not cuts:
        return stack
    mesh, (i, p) = parameter.device_mesh, cuts[0]
    if len(cuts) > 1 or type(p) is not Shard or stack.group is not None or stack.blocks > 1:
        return None
    full, ranks = parameter.shape[p.dim], mesh.size(i)
    each = math.ceil(full / ranks)
    sizes = tuple(max(0, min(each, full - r * each)) for r in range(ranks))
    return Stack(stack.rows, p.dim if parameter.dim() == 3 else p.dim + 1, 1, mesh.get_group(i), sizes)


def stacks_in(module: nn.Module) -> dict[nn.Parameter, Stack]:
    """The weights of experts in `module`, as they stand now: cut by `parallelize`, or whole."""
    found: dict[nn.Parameter, Stack] = {}
    for name, part in module.named_modules():
        for leaf, cut in _cuts(name, part).items():
            parameter, shards = getattr(part, leaf), shards_of(part)
            if not isinstance(parameter, nn.Parameter) or parameter.dim() != 3:
                continue
            rows = cut.ffn if "up" in leaf else 3 - cut.ffn
            if shards is None or shards.etp == 1:
                found[parameter] = Stack(rows, cut.ffn, cut.blocks)
                continue
            each = parameter.shape[cut.ffn] // cut.blocks
            found[parameter] = Stack(rows, cut.ffn, cut.blocks, shards.fold.group("etp"), (each,) * shards.etp)
    return found


def _cuts(name: str, part: nn.Module) -> Mapping[str, Cut]:
    shards = shards_of(part)
    if shards is not None:
        return shards.cuts
    if isinstance(part, Experts):
        return part.cuts()
    if is_decorated(part) and refused(part) is None:
        return cuts_of_experts(name, part, 1)[1]
    return {}


def chosen(module: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """(what Muon updates, what AdamW updates) of the parameters that ask for a gradient, by name; see Muon."""
    stacks, hidden = stacks_in(module), {id(p) for p in _hidden(module)}
    muon, adamw = dict[str, nn.Parameter](), dict[str, nn.Parameter]()
    for name, p in module.named_parameters():
        if p.requires_grad:
            matrix = "lora_" not in name and (p in stacks or id(p) in hidden)
            (muon if matrix else adamw)[name] = p
    return muon, adamw


def _hidden(module: nn.Module) -> Iterator[nn.Parameter]:
    """The weights of linear layers that are no head and no router, and have more than one row and column."""
    apart = nn.Embedding | nn.EmbeddingBag | Router
    others = {id(p) for m in module.modules() if isinstance(m, apart) for p in m.parameters()}
    head = getattr(module, "get_output_embeddings", lambda: None)()
    for name, part in module.named_modules():
        if not isinstance(part, nn.Linear) or part is head or name.rpartition(".")[2] in ROUTERS | HEADS:
            continue
        if id(part.weight) not in others and min(part.weight.shape) > 1:
            yield cast(nn.Parameter, part.weight)
