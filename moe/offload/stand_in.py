"""A weight that is elsewhere, in its parameter's place: it can be read, and an edit raises instead of being lost."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

_SETS_DATA = Tensor.data.__set__  # type: ignore[attr-defined]
_HARMLESS = {"requires_grad_", "detach_", "rename_"}
_IN_PLACE = {
    "__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__idiv__", "__ifloordiv__", "__imod__",
    "__ipow__", "__ilshift__", "__irshift__", "__iand__", "__ior__", "__ixor__",
}  # fmt: skip


@dataclass(eq=False)
class About:
    """Which weight it is; all of it; whether it is a read-only map of a file; whether nobody serves it any more; once
    DLPack has lent its memory, the checksum of that moment."""

    name: str
    whole: Tensor
    mapped: bool = False
    left: bool = False
    lent: int | None = None

    def lend(self) -> None:
        if self.mapped:  # what DLPack lends can be written into, and to write into this ends the process
            raise BufferError(f"offload: {self.name} is a read-only map of a file, which DLPack cannot lend: clone it")
        if self.lent is None:
            self.lent = self._checksum()

    def changed(self) -> bool:
        """Whether somebody wrote into the memory that was lent."""
        return self.lent is not None and self.lent != self._checksum()

    def refusal(self) -> RuntimeError:
        if self.left:
            return RuntimeError(
                f"offload: {self.name} must stay as it is in the experts file, of which it is a read-only map: "
                "Offload.close(restore=True) brings weights into memory"
            )
        return RuntimeError(
            f"offload: {self.name} must stay as it was when it was offloaded, got other weights; "
            "close the Offload before weights change"
        )

    def _checksum(self) -> int:
        memory: Any = self.whole.cpu().reshape(-1).view(torch.uint8).numpy()
        return zlib.crc32(memory)


class StandIn(Tensor):
    """A parameter or a view of one whose numbers are in a lower tier. What torch would write into it raises
    RuntimeError; numpy sees it read-only; memory that DLPack has lent is compared when the weight is used.

    A parameter becomes one, and itself again, by its class: it stays the same object. What is computed from it are
    plain tensors; so are copies and what is saved.
    """

    _about: About

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            for written in _written(func, args, kwargs):
                if func == _SETS_DATA and _same_memory(written, args[1]):
                    return None
                raise written._about.refusal()
            sources = [t for t in tree_leaves(args) if isinstance(t, StandIn)]
            if func is Tensor.__dlpack__ and sources:
                sources[0]._about.lend()
            return tree_map(lambda result: _guarded(result, sources), func(*args, **kwargs))

    def set_(self, source: Any = None, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """Torch does not announce this one. Of the memory that it has already, as parametrize does: nothing."""
        if isinstance(source, Tensor) and not args and not kwargs and _same_memory(self, source):
            return self
        raise self._about.refusal()

    def __deepcopy__(self, memo: Any) -> Tensor:
        memo[id(self)] = copy.deepcopy(plain(self), memo)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return plain(self).__reduce_ex__(protocol)


def stand_in(parameter: nn.Parameter, name: str, mapped: bool) -> About:
    """The parameter refuses edits from now on. `mapped`: its memory is a read-only map of a file."""
    about = About(name, parameter.detach(), mapped and not parameter.is_meta)
    parameter.__class__ = StandIn  # type: ignore[assignment]
    vars(parameter).update(_about=about, _is_param=True)  # torch's mark of a parameter
    return about


def stand_back(parameter: nn.Parameter) -> None:
    """The parameter is itself again."""
    if type(parameter) is StandIn:
        del parameter._about, parameter._is_param  # type: ignore[attr-defined]
        parameter.__class__ = nn.Parameter


def plain(t: Tensor) -> Tensor:
    """The same memory without the guard: a parameter of a parameter, a tensor of a view."""
    with torch._C.DisableTorchFunctionSubclass():
        alias = t.detach().as_subclass(Tensor)
        return nn.Parameter(alias, t.requires_grad) if isinstance(t, nn.Parameter) else alias


def _written(func: Any, args: Any, kwargs: Any) -> Iterator[StandIn]:
    """The stand-ins that torch's function `func` would write into."""
    name = getattr(func, "__name__", "").split(".")[0]
    trailing = name.endswith("_") and not name.endswith("__") and name not in _HARMLESS
    if trailing or name in _IN_PLACE or func == _SETS_DATA:
        yield from (t for t in tree_leaves(args[:1]) if isinstance(t, StandIn))
    yield from (t for t in tree_leaves(kwargs.get("out")) if isinstance(t, StandIn))


def _same_memory(a: Tensor, b: Tensor) -> bool:
    with torch._C.DisableTorchFunctionSubclass():
        return _alias(a, b) and (a.shape, a.stride(), a.dtype, a.storage_offset()) == (
            b.shape, b.stride(), b.dtype, b.storage_offset()
        )  # fmt: skip


def _alias(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have one storage, on meta too."""
    return torch._C._is_alias_of(a, b)  # type: ignore[attr-defined]


def _guarded(result: Any, sources: list[StandIn]) -> Any:
    """A view of a stand-in is one too; numpy's is read-only."""
    if isinstance(result, np.ndarray) and sources and _shared(result, sources[0]):
        result.flags.writeable = False
    if not isinstance(result, Tensor) or isinstance(result, StandIn):
        return result
    source = next((s for s in sources if _alias(result, s)), None)
    if source is None:
        return result
    view = result.as_subclass(StandIn)
    view._about = source._about
    return view


def _shared(array: np.ndarray, t: Tensor) -> bool:
    return np.may_share_memory(array, t.detach().as_subclass(Tensor).numpy())
