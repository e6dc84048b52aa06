"""A rank's slots of experts as torch.distributed.checkpoint sees them: pieces of a tensor [E, ...]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType


class Chunks(Tensor):
    """A tensor [E, ...] of which this rank has, in `held` [slots, ...], the rows of `experts`, each with `held`'s part
    number `rank` of each of the `blocks` of dimension `ffn`. It has no numbers of its own: whoever asks for more than
    its pieces gets an error.

    A piece that several ranks have is written once, and read by each of them.
    """

    held: Tensor
    ffn: int
    width: int  # of a piece, along `ffn`
    places: dict[torch.Size, tuple[int, int]]  # where a piece starts: in the whole, and its slot and block here

    @staticmethod
    def __new__(
        cls, held: Tensor, experts: Sequence[int], num_experts: int, ffn: int, rank: int, etp: int, blocks: int = 1
    ) -> Chunks:
        shape = list(held.shape)
        shape[0], shape[ffn] = num_experts, shape[ffn] * etp
        new = Tensor._make_wrapper_subclass(cls, shape, dtype=held.dtype, device=held.device)
        new.held, new.ffn, new.width, new.places = held, ffn, held.shape[ffn] // blocks, {}
        for slot, expert in enumerate(experts):
            for block in range(blocks):
                offsets = [0] * held.dim()
                offsets[0], offsets[ffn] = expert, (block * etp + rank) * new.width
                new.places[torch.Size(offsets)] = slot, block
        return new

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise NotImplementedError(f"Chunks: {func} must not be called on it, only pieces are here")

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        sizes = [1, *self.held.shape[1:]]
        sizes[self.ffn] = self.width
        return [ChunkStorageMetadata(offsets, torch.Size(sizes)) for offsets in self.places]

    def __create_write_items__(self, fqn: str, _object: Any) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.held)
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, self.shape),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        slot, block = self.places[index.offset]
        return self.held[slot : slot + 1].narrow(self.ffn, block * self.width, self.width)
