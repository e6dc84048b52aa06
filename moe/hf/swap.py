"""replace and restore: Headgate's forward on the experts of somebody else's model, and their own back.

A swap sets one attribute, `forward`, on each experts module. Class, parameters, hooks and state_dict keys stay, so that
whatever knows the model (PEFT, save_pretrained, output_router_logits) goes on knowing it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from ...kernels.chip import say_once
from ..elsewhere import Absent, elsewhere_of
from ..shards import shards_of
from .counting import counter, forget
from .gate import forget_gate
from .interface import NAME, check_transformers
from .padding import attach, detach, refusal, without_padding
from .report import Report
from .table import Adapter, adapter_of, arguments_of, by_interface, looks_like_experts

_SWAP = "_headgate_swap"
_Found = tuple[str, nn.Module, Adapter]


@dataclass(eq=False)
class _Swap:
    """What a swapped module remembers: the forward put there and where it stands in for which (None: the class's)."""

    forward: Callable[..., Any]
    slot: str
    before: Callable[..., Any] | None
    helper: bool


def replace(model: nn.Module, *, skip_padding: bool = False) -> Report:
    """Lets every MoE experts block of a transformers model run through Headgate, in place, weights shared.

    The boundary is transformers' own, (hidden_states, top_k_index, top_k_weights) -> hidden_states: the model keeps its
    routers, its losses and its parameters under their names. The activation is found by evaluating each module's own
    gate; where no fused form equals it, the module's gate runs between two grouped matmuls, with a warning.

    `skip_padding` takes the attention_mask [B, S] that the model is called with to its experts: a token where it is 0
    costs no row of a product and no byte between ranks, and its experts answer 0, so that what the model says at
    padding is another number, which nobody reads. Cached decoding takes the last S columns. A mask of another form, and
    families whose experts are not told ids, compute padding as before, and say so once.

    Returns a Report: `replaced`, `skipped` (name -> reason), `calls`; warns where every block was skipped. Copies
    (deepcopy, torch.save) are swapped too; nn.DataParallel's replicas cannot be, DistributedDataParallel needs none.

    Raises ValueError for a model without MoE blocks or already swapped, TypeError for something that is no module,
    ImportError where transformers is older than 5.18; ValueError where `skip_padding` is asked of a model with an
    encoder, or one that takes no attention_mask. If a block fails, all are restored first.

    >>> report = headgate.replace(model)
    >>> print(report)
    Headgate runs 16 of 16 MoE blocks of OlmoeForCausalLM, none skipped, 0 calls so far
      16 x OlmoeExperts: gated silu, fused
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"replace: model must be a torch.nn.Module, got {type(model).__name__}")
    check_transformers("replace")
    for name, module in model.named_modules():
        if _SWAP in vars(module):
            raise ValueError(
                f"replace: model must not be swapped already, got one whose {name or 'root'} is; "
                "headgate.restore(model) undoes it"
            )
    found, skipped = _survey(model)
    if not found and not skipped:
        raise ValueError(
            f"replace: model must hold MoE experts, got a {type(model).__name__} without any of transformers'"
        )
    told = [module for _, module, adapter in found if adapter.skips] if skip_padding else []
    why = refusal(model, told) if skip_padding else None
    if why is not None:
        raise ValueError(f"replace: skip_padding must have {why}, got a {type(model).__name__}")
    report = Report(type(model).__name__, skipped=skipped)
    if not found:
        name, why = next(iter(skipped.items()))
        warnings.warn(
            f"headgate: replace took no MoE block of {report.model}; {name or 'the model'}: {why}", stacklevel=2
        )
    if skip_padding and len(told) < sum(not adapter.helper for _, _, adapter in found):
        say_once("skip_padding", f"experts of {report.model} are not told ids", "experts on padding too")
    try:
        for name, module, adapter in found:
            how = adapter.prepare(module)
            _put(module, adapter, skip_padding and adapter.skips)
            if not adapter.helper:
                report.add(name, f"{type(module).__name__}: {how}", counter(module))
        if told:
            attach(model, told)
    except BaseException:
        for _name, module, _adapter in found:
            _take_back(module)
        raise
    return report


def restore(model: nn.Module) -> list[str]:
    """Gives every swapped module of `model` its own forward back; returns the names that the Report had.

    Raises ValueError for a model that is not swapped, or where somebody has put another forward over Headgate's since:
    nothing is changed then.
    """
    swapped = [(name, module) for name, module in model.named_modules() if _SWAP in vars(module)]
    if not swapped:
        raise ValueError(
            f"restore: model must be swapped by headgate.replace, got a {type(model).__name__} that is not"
        )
    for name, module in swapped:
        if _slot_of(module) is None:
            raise ValueError(
                f"restore: the forward of {name or 'the model'} must be the one that headgate.replace put there, got "
                f"{vars(module).get('forward')!r}; undo that first"
            )
        if not isinstance(elsewhere_of(module), Absent | None):
            raise ValueError(
                f"restore: {name or 'the model'} must have its experts in place, got them offloaded; "
                "close the Offload first"
            )
        if shards_of(module) is not None:
            raise ValueError(
                f"restore: {name or 'the model'} must hold all its experts, got one parallelized over ranks; "
                "load its checkpoint into a new model instead"
            )
    names = [name for name, module in swapped if not vars(module)[_SWAP].helper]
    for _name, module in swapped:
        _take_back(module)
    detach(model)
    return names


def is_swapped(model: nn.Module) -> bool:
    return any(_SWAP in vars(module) for module in model.modules())


def adapter_in(module: nn.Module) -> Adapter | None:
    """The adapter by which an experts module runs that is swapped, or has headgate as its experts implementation; None
    for any other module."""
    swap = vars(module).get(_SWAP)
    if swap is not None:
        return None if swap.helper else adapter_of(module)
    chosen = getattr(getattr(module, "config", None), "_experts_implementation", None)
    return adapter_of(module) if chosen == NAME and by_interface(module) else None


def swapped_experts(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The experts modules of a swapped model by name."""
    swapped = [(n, m) for n, m in model.named_modules() if _SWAP in vars(m)]
    return [(n, m) for n, m in swapped if not vars(m)[_SWAP].helper]


def _survey(model: nn.Module) -> tuple[list[_Found], dict[str, str]]:
    found: list[_Found] = []
    skipped: dict[str, str] = {}
    unknown: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        adapter = adapter_of(module)
        if adapter is None:
            if looks_like_experts(module):
                unknown.append((name, module))
            continue
        why = _foreign(module) or adapter.refusal(module)
        if why is None:
            found.append((name, module, adapter))
        else:
            skipped[name] = why
    found = _pair_with_blocks(found, skipped)
    known = [*(name for name, _, _ in found), *skipped]
    for name, module in unknown:
        inside = name + "." if name else ""
        if not any(k.startswith(inside) or name.startswith(f"{k}.") for k in known):
            skipped[name] = f"{type(module).__name__} is not called at transformers' experts boundary"
    return found, skipped


def _pair_with_blocks(found: list[_Found], skipped: dict[str, str]) -> list[_Found]:
    """Experts that need their block's forward changed too are taken with it or not at all, and so is the block."""
    helpers = {name: module for name, module, adapter in found if adapter.helper}
    served = set()
    kept = []
    for name, module, adapter in found:
        if adapter.block is not None:
            holder = next((n for n, m in helpers.items() if any(part is module for part in m.modules())), None)
            if holder is None:
                skipped[name] = f"its {adapter.block} could not be swapped with it"
                continue
            served.add(holder)
        kept.append((name, module, adapter))
    return [entry for entry in kept if not entry[2].helper or entry[0] in served]


def _foreign(module: nn.Module) -> str | None:
    """Why a module whose forward somebody else has set on the instance is left alone."""
    own = vars(module).get("forward")
    if own is None or "_old_forward" in vars(module):  # accelerate's hooks call _old_forward: that one is swapped
        return None
    name = getattr(own, "__qualname__", type(own).__name__)
    return f"its forward is set by {name}; headgate.hf.register() and set_experts_implementation run inside it"


def _put(module: nn.Module, adapter: Adapter, skip_padding: bool) -> None:
    slot = "_old_forward" if "_old_forward" in vars(module) else "forward"
    forward = partial(adapter.forward, module)
    if skip_padding:
        forward = partial(without_padding, module, adapter.forward, arguments_of(module)[:3])
    vars(module)[_SWAP] = _Swap(forward, slot, vars(module).get(slot), adapter.helper)
    vars(module)[slot] = forward


def _slot_of(module: nn.Module) -> str | None:
    """Where Headgate's forward is now: hooks of accelerate set after the swap have moved it."""
    ours = vars(module)[_SWAP].forward
    return next((slot for slot in ("forward", "_old_forward") if vars(module).get(slot) is ours), None)


def _take_back(module: nn.Module) -> None:
    if _SWAP in vars(module):
        slot, swap = _slot_of(module), vars(module).pop(_SWAP)
        if slot is not None:
            vars(module).pop(slot)
            if swap.slot == slot and swap.before is not None:
                vars(module)[slot] = swap.before
            elif slot == "_old_forward":
                vars(module)[slot] = type(module).forward.__get__(module)
    forget(module)
    for part in module.modules():  # DBRX keeps its activation one module further in
        forget_gate(part)
