"""Whole models as experts: several models behind one choice, those in use in slots, through the tiers of the experts.

Source: Prabhakar et al., SambaNova SN40L (2024), composition of experts: a router sends each request to one of many
models, whose weights wait in a larger and slower memory.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .engine import Engine
from .file import FileStore
from .host import HostStore, Store
from .kinds import Layer
from .stats import Stats

FILE = "models.safetensors"
_ALIGN, _PAGE = 64, 4096


class ModelPool:
    """Models by name, of which as many as a budget pays for are on the device at a time.

    models    name -> module, any architectures. They are changed in place: their parameters and buffers are on the
              device while they are in use, and in the lower tier otherwise. Tensors that models share are kept for each
    budget    of the slots on the device, each as large as the largest model: bytes, "8GiB", or "50%" of so many
    policy    which model goes when a slot is needed, a name in POLICIES
    disk      a folder for the models' file, written now; None: host memory. On a CPU it must be given
    device    where models run

    For inference: weights must not change. `close` brings all models back to the device whole. Raises ValueError /
    TypeError naming argument, rule and value, OSError where the disk is full; nothing is changed then.

    >>> pool = headgate.ModelPool({"law": law, "code": code, "chat": chat}, budget="40%", disk="/scratch")
    >>> with pool.use("law") as model:
    ...     model.generate(**inputs)
    >>> pool.map(["code", "law", "code"], prompts, lambda model, rows: model(rows).logits)
    """

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        budget: str | int | float,
        policy: str = "lru",
        disk: str | os.PathLike[str] | None = None,
        *,
        device: torch.device | str = "cpu",
        readers: int = 2,
    ) -> None:
        if not models:
            raise ValueError("ModelPool: models must not be empty")
        for name, model in models.items():
            if not isinstance(model, nn.Module):
                raise TypeError(f"ModelPool: models must be modules, got {type(model).__name__} for {name!r}")
        self.names = list(models)
        if len(set(models.values())) != len(models):
            raise ValueError("ModelPool: models must be different objects, got one under several names")
        where = torch.device(device)
        if where.type == "cpu" and disk is None:
            raise ValueError("ModelPool: disk must be a folder where the device is a CPU, got None")
        self._models = [_Packed(model) for model in models.values()]
        room = -(-max(packed.nbytes for packed in self._models) // _PAGE) * _PAGE
        blob = {"bytes": torch.empty(1, room, dtype=torch.uint8, device="meta")}
        layers = [Layer.of(name, ([0], blob)) for name in self.names]

        def weights(i: int) -> list[dict[str, Tensor]]:
            return [{"bytes": self._models[i].pack(room)[None]}]

        store: Store
        if disk is None:
            store = HostStore(layers, weights, where)
        else:
            path = Path(disk) / FILE
            path.parent.mkdir(parents=True, exist_ok=True)
            store = FileStore.write(path, layers, weights)
        try:
            self.engine = Engine(store, budget, policy=policy, scope="shared", device=where, readers=readers)
        except BaseException:
            store.close()
            raise
        self._store, self._lock, self._users = store, threading.Lock(), [0] * len(self.names)
        options = {"writable": True} if isinstance(store, FileStore) else {}  # who holds a model may write into it
        self._whole = [store.whole(i, **options)["bytes"][0] for i in range(len(self._models))]
        for packed, part in zip(self._models, self._whole, strict=True):
            packed.freeze()
            packed.unpack(part)

    @contextmanager
    def use(self, name: str) -> Iterator[Any]:
        """The model on the device, for the length of the block; waits until there is a slot. Any number of threads."""
        i = self._index(name)
        with closing(self.engine.step(i, [0])) as groups:
            group = next(groups)
            with self._lock:
                self._users[i] += 1
                if self._users[i] == 1:
                    blob = group.weights["bytes"]
                    assert isinstance(blob, Tensor)
                    self._models[i].unpack(blob[group.slots[0]])
            try:
                yield self._models[i].model
            finally:
                with self._lock:
                    self._users[i] -= 1
                    if not self._users[i]:
                        self._models[i].unpack(self._whole[i])

    def map(self, choice: Sequence[str], inputs: Tensor, call: Callable[[nn.Module, Tensor], Tensor]) -> list[Tensor]:
        """call(model, rows) for the rows [n, ...] of `inputs` [B, ...] that chose a model, one call for each model: its
        results, row by row, in the order of `inputs`. Models that are there come first, and the next is fetched
        meanwhile."""
        if len(choice) != len(inputs):
            raise ValueError(f"ModelPool: choice must be a name for each of {len(inputs)} rows, got {len(choice)}")
        rows: dict[int, list[int]] = {}
        for row, name in enumerate(choice):
            rows.setdefault(self._index(name), []).append(row)
        slot_of = self.engine.cache.table.slot_of
        order = sorted(rows, key=lambda i: (slot_of[i, 0] < 0, rows[i][0]))
        found: list[Tensor | None] = [None] * len(inputs)
        for i, after in zip(order, [*order[1:], None], strict=True):
            with self.use(self.names[i]) as model:
                if after is not None:
                    self.engine.prefetch(after, [0])
                for row, result in zip(rows[i], call(model, inputs[rows[i]]), strict=True):
                    found[row] = result
        return [result for result in found if result is not None]

    def stats(self) -> Stats:
        """Hits, loads and bytes so far, a model being one expert."""
        return self.engine.stats()

    def close(self) -> None:
        """Every model whole on the device again, with weights of its own; threads ended. The file stays. Raises
        RuntimeError while a model is in use; after an error it can be called again."""
        with self._lock:
            if any(self._users):
                raise RuntimeError("ModelPool: models must not be in use when it is closed, got some that are")
            while self._models:
                i = len(self._models) - 1
                with torch.inference_mode(False):
                    blob = torch.empty_like(self._whole[i], device=self.engine.arena.device)
                    self._store.read(i, 0, {"bytes": blob})
                    self._models[i].unpack(blob, copy=True)
                self._models[i].thaw()
                self._models.pop()
            self.engine.close()

    def __enter__(self) -> ModelPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _index(self, name: Hashable) -> int:
        if name not in self.names:
            raise ValueError(f"ModelPool: name must be one of {', '.join(self.names)}, got {name!r}")
        return self.names.index(name)  # type: ignore[arg-type]


class _Packed:
    """A model whose parameters and buffers can be one run of bytes, each beginning at a multiple of 64."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        named = [*model.named_parameters(), *model.named_buffers()]
        self.tensors = [t for _, t in named]
        absent = [name for name, t in named if t.is_meta]
        if absent:
            raise ValueError(f"ModelPool: models must have their weights, got {absent[0]} on the meta device")
        self.shapes = [(t.shape, t.dtype) for t in self.tensors]
        self.learning = [t.requires_grad for t in self.tensors]
        self.places, self.nbytes = [], 0
        for t in self.tensors:
            self.places.append((self.nbytes, self.nbytes + t.numel() * t.element_size()))
            self.nbytes = -(-self.places[-1][1] // _ALIGN) * _ALIGN

    def pack(self, room: int) -> Tensor:
        """All of it as bytes [room], in host memory."""
        blob = torch.zeros(room, dtype=torch.uint8)
        for t, (begin, end) in zip(self.tensors, self.places, strict=True):
            blob[begin:end] = t.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        return blob

    def unpack(self, blob: Tensor, copy: bool = False) -> None:
        """The tensors as views of `blob`, or copies."""
        for t, (begin, end), (shape, dtype) in zip(self.tensors, self.places, self.shapes, strict=True):
            view = blob[begin:end].view(dtype).view(shape)
            t.data = view.clone() if copy else view

    def freeze(self) -> None:
        for t in self.tensors:
            t.requires_grad_(False)

    def thaw(self) -> None:
        for t, learning in zip(self.tensors, self.learning, strict=True):
            t.requires_grad_(learning)
