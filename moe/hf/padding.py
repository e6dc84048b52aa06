"""The attention mask of a transformers model, taken to its experts: a token that is padding has no expert there.

A hook before the model's forward pass notes the mask, one after it forgets it; each experts module looks it up. A
forward pass that activation checkpointing runs again, inside a backward pass, finds the mask that it had before.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.chip import say_once

_PADDING = "_headgate_padding"
_MOST = 256  # forward passes of a module that may wait for their backward pass


class Padding:
    """What the experts of one model know of the pass at hand. Each thread has a pass of its own."""

    def __init__(self) -> None:
        self._local = threading.local()
        self._compiled: list[Any] = []  # the passes of a graph that is being traced, which knows no threads

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, _state: dict[str, Any]) -> None:
        Padding.__init__(self)

    def _passes(self) -> list[Any]:
        if torch.compiler.is_compiling():
            return self._compiled
        if not hasattr(self._local, "passes"):
            self._local.passes = []
        return self._local.passes

    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Of calls inside each other the outermost speaks: only that one was given what the user gave."""
        passes = self._passes()
        passes.append(passes[-1] if passes else live_tokens(module, args, kwargs))

    def after(self, _module: nn.Module, _args: tuple, _output: Any) -> None:
        passes = self._passes()
        if passes:
            passes.pop()

    def of(self, module: nn.Module, rows: Tensor, tokens: int) -> Tensor | None:
        """bool [T], False for padding, of the T tokens that an experts module sees; None: all are there."""
        if torch.compiler.is_compiling():
            return _fitting(self._compiled[-1] if self._compiled else None, tokens, rows.device)
        seen = vars(module).setdefault(_SEEN, [])
        if torch._C._current_graph_task_id() != -1:
            return _again(module, seen, rows)
        passes = self._passes()
        mask = _fitting(passes[-1] if passes else None, tokens, rows.device)
        if module.training or torch.is_grad_enabled():
            seen.append((_key(rows), mask))
            del seen[:-_MOST]
        return mask


_SEEN = "_headgate_padding_seen"


def live_tokens(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
    """bool [B * S] from the attention_mask that a model is called with: its last S columns, 0 for padding. Of packed
    sequences a mask may number them: what is not 0 is there. None: no mask, so every token is there.

    A mask of another form (4 dimensions, one for each kind of layer) says who looks at whom, and not what is padding:
    then all are there, and this is said once.

    Raises TypeError for a floating point mask, ValueError for one with fewer columns than there are tokens.
    """
    names = tuple(inspect.signature(type(module).forward).parameters)[1:]
    given = dict(zip(names, args, strict=False)) | kwargs
    mask, tokens = given.get("attention_mask"), given.get("input_ids")
    tokens = given.get("inputs_embeds") if tokens is None else tokens
    if mask is None or not isinstance(tokens, Tensor):
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        kind = f"one of {mask.dim()} dimensions" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        say_once("skip_padding", f"attention_mask is no [B, S], but {kind}", "experts on padding too")
        return None
    if mask.is_floating_point():
        raise TypeError(f"skip_padding: attention_mask [B, S] must be integers or bool, got {mask.dtype}")
    batch, length = tokens.shape[:2]
    if mask.shape[0] != batch or mask.shape[1] < length:
        raise ValueError(
            f"skip_padding: attention_mask must be [{batch}, {length}], or longer by what is cached, got "
            f"{list(mask.shape)}"
        )
    return (mask[:, mask.shape[1] - length :] != 0).reshape(-1)


def _fitting(mask: Tensor | None, tokens: int, device: torch.device) -> Tensor | None:
    if mask is None:
        return None
    if len(mask) != tokens:
        say_once(
            "skip_padding", f"experts see {tokens} rows, and attention_mask has {len(mask)}", "experts on padding too"
        )
        return None
    return mask.to(device)


def _again(module: nn.Module, seen: list[tuple[Tensor, Tensor | None]], rows: Tensor) -> Tensor | None:
    """The mask of the pass that saw these rows."""
    key = _key(rows)
    fitting = [(known, mask) for known, mask in seen if known.shape == key.shape and known.device == key.device]
    if fitting and all(mask is fitting[0][1] for _, mask in fitting):
        return fitting[0][1]
    for known, mask in reversed(fitting):  # it is mostly the last one
        if torch.equal(known, key):
            return mask
    raise RuntimeError(
        f"skip_padding: {type(module).__name__} must run again with rows that it saw in its last {_MOST} forward "
        "passes, got others"
    )


def _key(rows: Tensor) -> Tensor:
    """Tells one batch's rows from another's, without a look at the device; the same rows, run again, give the same.
    The length of the answer tells numbers of rows apart."""
    known = rows.detach()
    some = known.flatten()[:: max(1, known.numel() // 64)][:64]
    return torch.cat([some.double(), known.sum(dtype=torch.float64)[None], known.new_zeros(len(known) % 8).double()])


def attach(model: nn.Module, modules: list[nn.Module]) -> None:
    """From now on the experts `modules` of `model` know the attention mask of each forward pass."""
    padding = Padding()
    for holder in _takers(model, modules):
        holder.register_forward_pre_hook(padding.before, with_kwargs=True, prepend=True)
        holder.register_forward_hook(padding.after, always_call=True)
    for module in modules:
        vars(module)[_PADDING] = padding


def detach(model: nn.Module) -> None:
    """Takes off what `attach` put on, of a copy too."""
    for module in model.modules():
        for hooks, kinds in (
            (module._forward_pre_hooks, (module._forward_pre_hooks_with_kwargs,)),
            (module._forward_hooks, (module._forward_hooks_with_kwargs, module._forward_hooks_always_called)),
        ):
            for key in [k for k, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), Padding)]:
                del hooks[key]
                for kind in kinds:
                    kind.pop(key, None)  # type: ignore[attr-defined]
        for name in (_PADDING, _SEEN):
            vars(module).pop(name, None)


def refusal(model: nn.Module, modules: list[nn.Module]) -> str | None:
    """Why a model's attention mask cannot be taken to its experts, or None."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return "a decoder-only model: the masks of an encoder and a decoder are different ones"
    if not any(True for _ in _takers(model, modules)):
        return "a model whose forward takes an attention_mask"
    return None


def _takers(model: nn.Module, modules: list[nn.Module]):
    """The models in `model`, itself too, that hold all these experts and take an attention_mask."""
    for module in model.modules():
        if not (hasattr(module, "config") and hasattr(module, "get_input_embeddings")):
            continue
        inside = set(module.modules())
        if all(m in inside for m in modules) and "attention_mask" in inspect.signature(type(module).forward).parameters:
            yield module


def without_padding(
    module: nn.Module, forward: Callable[..., Any], names: tuple[str, ...], *args: Any, **kwargs: Any
) -> Any:
    """A call at transformers' boundary whose padding has no expert: ids -1 and weights 0 there, so that it costs no row
    of a product, no byte between ranks, and its answer is 0. `names` of the boundary's three arguments."""
    given = dict(zip(names, args, strict=False)) | kwargs
    padding: Padding | None = vars(module).get(_PADDING)
    if padding is None or any(given.get(name) is None for name in names):
        return forward(module, *args, **kwargs)
    rows, ids, weights = (given.pop(name) for name in names)
    mask = padding.of(module, rows, len(ids))
    if mask is not None:
        gone = ~mask[:, None]
        ids, weights = ids.masked_fill(gone, -1), weights.masked_fill(gone, 0)
    return forward(module, rows, ids, weights, **given)
