"""headgate.offload: a model's experts in host memory or on disk, those in use in a fixed number of slots."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.quantized import Quantized, quantize
from ...kernels.routing import Routing
from ...placement.costs import Costs
from ...placement.policies import Setting
from ...placement.policies import policy as start_policy
from ...placement.predict import Predictor, fit
from ...placement.trace import Trace
from ..elsewhere import elsewhere_of, send_elsewhere
from . import ahead
from .arena import plan_slots
from .costs import measure_costs
from .engine import Engine
from .file import FileStore
from .forms import Form, experts_in, form_of
from .host import HostStore, Store
from .kinds import Layer, Weights
from .pace import Pace
from .stats import Stats

FILE = "experts.safetensors"
PREFETCH = ("gate", "path")
Formats = Mapping[str, Sequence[str | None]]  # module name -> the format of each expert
_Found = list[tuple[str, nn.Module, Form]]


def offload(
    model: nn.Module,
    budget: str | int | float = "8GiB",
    policy: str = "adaptive",
    prefetch: str | Predictor | None = "gate",
    disk: str | os.PathLike[str] | None = None,
    *,
    device: torch.device | str | None = None,
    scope: str = "layer",
    trace: Trace | None = None,
    formats: Formats | None = None,
    hybrid: bool | Costs = False,
    readers: int = 2,
    page_cache: bool = True,
    verify: bool = False,
    log: bool = False,
) -> Offload:
    """Moves the experts of a model out of its device's memory, in place; outputs stay the same to the bit.

    model     a transformers model after `headgate.replace`, or one with `headgate.MoE` layers. For inference: a call
              that would need a gradient of its experts raises
    budget    what the slots may take on the device: "8GiB", bytes, or a share of the experts' bytes ("25%", 0.25). At
              least the top-k of one layer must fit (scope "shared"), or of each ("layer")
    policy    which expert goes when a slot is needed, a name in `headgate.placement.policies.POLICIES`: "adaptive"
              learns as it goes how soon each is used again; "learned" begins with what `trace` has taught it
    prefetch  "gate": the next layer's router, applied to this layer's rows, says what to fetch ahead; "path" (or a
              fitted Predictor): the experts that the token went to so far say it, learned from `trace`; None: nothing
              is. What is fetched ahead must be worth its bytes, at the price that was measured so far (see Pace)
    disk      a folder for experts.safetensors, written now; None: host memory, page-locked where the device is a GPU.
              On a CPU it must be given. Experts on the meta device are taken from the file that is there already
    device    where to compute; everything but the experts is moved there. None: where the model is
    scope     "layer": each layer has slots of its own; "shared": all layers share them
    trace     what policies and predictors that learn have to learn from, of this model's layers in this order
    formats   experts in few bits: module name -> a format ("int8", "int4", None: as they are) for each expert, as
              `headgate.moe.offload.precisions` chooses them. Outputs are then those of the rounded weights
    hybrid    True: the host computes experts where they are, in host memory, wherever that ends a step sooner than to
              fetch them. What either costs is measured now, in about a second, on the first layer's weights, unless
              Costs are given. On a GPU outputs then stay the same to rounding: the host sums in another order
    readers   threads that fetch; from disk, each with four requests at a time
    page_cache, verify   with `disk`: whether the system may keep copies of what was read; whether each expert's
              checksum is compared when it is read
    log       keep every access, for `Offload.log`

    Returns an Offload: what was moved and what was not (`skipped`, with the reason), `stats()`, and `close()`, which
    brings the experts back. Parameters keep names and shapes; what they hold is read from the lower tier when somebody
    asks (state_dict, save_pretrained). Several threads may generate at once.

    Raises ValueError / TypeError naming argument, rule and value, OSError where the disk is full or cannot be written;
    nothing is changed then.

    >>> headgate.replace(model)
    >>> with headgate.offload(model, budget="25%", disk="/scratch/experts") as offloaded:
    ...     model.generate(**inputs)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"offload: model must be a torch.nn.Module, got {type(model).__name__}")
    found, skipped = _survey(model)
    where = torch.device(device) if device is not None else _device_of(model, found)
    if where.type == "cpu" and disk is None:
        raise ValueError(
            "offload: disk must be a folder where the device is a CPU, whose memory is the host's: got None"
        )
    _check_hybrid(hybrid, disk, formats)
    groups = _groups(found, formats or {})
    foresight = _foresight(prefetch, model, found, trace)
    if readers < 1:
        raise ValueError(f"offload: readers must be at least 1, got {readers}")
    layers = [
        Layer.of(name, *((experts, _like(form.weights(module), len(experts), format)) for experts, format in parts))
        for (name, module, form), parts in zip(found, groups, strict=True)
    ]
    places = plan_slots(layers, budget, 1, scope).places
    shape = places.of.shape
    state = start_policy(policy, Setting(shape[0], shape[1], places.slots, trace))
    store = _store(found, layers, groups, disk, where, page_cache=page_cache, verify=verify)
    try:
        costs = _costs(hybrid, store, found[0][2], where)
        engine = Engine(store, budget, policy=state, scope=scope, device=where, readers=readers, log=log, costs=costs)
    except BaseException:
        store.close()
        raise
    return Offload(model, found, skipped, engine, store, foresight, where)


def _survey(model: nn.Module) -> tuple[_Found, dict[str, str]]:
    """The experts modules that can be moved, and why the others cannot."""
    found, skipped = [], {}
    for name, module in experts_in(model):
        if elsewhere_of(module) is not None:
            raise ValueError(f"offload: model must not be offloaded already, got one whose {name} is")
        form = form_of(module)
        if isinstance(form, str):
            skipped[name] = form
        else:
            found.append((name, module, form))
    if not found:
        why = next(iter(skipped.values()), "run headgate.replace on a transformers model first")
        raise ValueError(f"offload: model must have experts that run through Headgate, got none to move: {why}")
    return found, skipped


def _device_of(model: nn.Module, found: _Found) -> torch.device:
    """Where everything else is."""
    experts = {p for _, module, form in found for p in form.weights(module).values()}
    others = (p.device for p in model.parameters() if p not in experts)
    here = next((d for d in others if d.type != "meta"), None)
    if here is None:
        here = next((p.device for p in experts if p.device.type != "meta"), torch.device("cpu"))
    return here


def _groups(found: _Found, formats: Formats) -> list[list[tuple[list[int], str | None]]]:
    """Of each layer, the experts of each format, rising."""
    unknown = sorted(formats.keys() - {name for name, _, _ in found})
    if unknown:
        raise ValueError(f"offload: formats must be for modules of experts that are moved, got {', '.join(unknown)}")
    groups = []
    for name, module, form in found:
        experts = len(form.weights(module)["w_down"])
        of = list(formats.get(name, [None] * experts))
        if len(of) != experts:
            raise ValueError(
                f"offload: formats must have one for each of the {experts} experts of {name}, got {len(of)}"
            )
        if form.transposed and any(of):
            raise ValueError(f"offload: formats must be None for transposed weights, got some for {name}")
        kinds = dict.fromkeys(of)
        groups.append([([e for e in range(experts) if of[e] == kind], kind) for kind in kinds])
    return groups


def _coded(weights: Mapping[str, Tensor], format: str | None) -> Weights:
    """Weights [n, ...] in a format; biases stay as they are."""
    if format is None:
        return weights
    return {name: quantize(w, format) if name.startswith("w_") else w for name, w in weights.items()}


def _like(weights: Mapping[str, Tensor], n: int, format: str | None) -> Weights:
    """What `_coded` would give of n experts, without a number in it."""
    empty = {name: torch.empty((n, *w.shape[1:]), dtype=w.dtype, device="meta") for name, w in weights.items()}
    return _coded(empty, format)


def _store(found: _Found, layers, groups, disk, device: torch.device, *, page_cache: bool, verify: bool) -> Store:
    """The lower tier with everything in it; a file that is there already where experts are on the meta device."""
    absent = [name for name, module, form in found if form.weights(module)["w_down"].is_meta]

    def weights(i: int) -> list[Weights]:
        _, module, form = found[i]
        whole = {name: p.detach() for name, p in form.weights(module).items()}
        experts = len(whole["w_down"])
        return [
            _coded(whole if len(some) == experts else {n: w[some] for n, w in whole.items()}, format)
            for some, format in groups[i]
        ]

    if disk is None:
        if absent:
            raise ValueError(f"offload: disk must be a folder with {FILE} for experts on the meta device, got None")
        return HostStore(layers, weights, device)
    path = Path(disk) / FILE
    if len(absent) not in (0, len(found)):
        raise ValueError(f"offload: experts must be all on the meta device or none, got {absent[0]} among others")
    if not absent:
        path.parent.mkdir(parents=True, exist_ok=True)
        FileStore.write(path, layers, weights)
    return FileStore(path, layers, page_cache=page_cache, verify=verify)


def _check_hybrid(hybrid: bool | Costs, disk: object, formats: Formats | None) -> None:
    if not isinstance(hybrid, bool | Costs):
        raise TypeError(f"offload: hybrid must be True, False or Costs, got {type(hybrid).__name__}")
    for name, value in (("disk", disk), ("formats", formats)):
        if hybrid and value:
            raise ValueError(
                f"offload: {name} must be None with hybrid, for which the host needs whole experts in its memory, got "
                f"{value!r}"
            )


def _costs(hybrid: bool | Costs, store: Store, form: Form, device: torch.device) -> Costs | None:
    """What hybrid execution goes by; measured on the first layer, whose experts have this `form`."""
    if not hybrid or isinstance(hybrid, Costs):
        return hybrid or None
    weights = store.whole(0)
    return measure_costs(
        weights, device=device, dtype=weights["w_down"].dtype, activation=form.activation, gated=form.activation.gated,
        transposed=form.transposed, interleaved=form.interleaved,
    )  # fmt: skip


def _foresight(prefetch: object, model: nn.Module, found: _Found, trace: Trace | None) -> ahead.Foresight | None:
    if prefetch is None:
        return None
    if prefetch == "gate":
        routers = [
            ahead.router_of(model, name, len(form.weights(module)["w_down"])) if name else None
            for name, module, form in found
        ]
        return ahead.Gate(routers)
    if prefetch == "path":
        if trace is None:
            raise ValueError("offload: trace must be given for prefetch='path', which learns from it, got None")
        prefetch = fit(trace)
    if not isinstance(prefetch, Predictor):
        raise ValueError(
            f"offload: prefetch must be one of {', '.join(PREFETCH)}, a Predictor or None, got {prefetch!r}"
        )
    shape = len(found), max(len(form.weights(module)["w_down"]) for _, module, form in found)
    if prefetch.shape != shape:
        raise ValueError(f"offload: prefetch must be of [L, E] = {shape}, got a predictor of {prefetch.shape}")
    return ahead.Path(prefetch)


@dataclass(eq=False)
class _Moved:
    """One experts module: its parameters as they were, whether they were learning, and what they are now."""

    name: str
    module: nn.Module
    form: Form
    before: dict[str, nn.Parameter]
    learning: dict[str, bool]
    now: dict[str, tuple[nn.Parameter, int]]

    @classmethod
    def of(cls, name: str, module: nn.Module, form: Form, stand_ins: Mapping[str, Tensor]) -> _Moved:
        """Puts `stand_ins` into the parameters; where there is none, nothing that has numbers."""
        moved = cls(name, module, form, form.weights(module), {}, {})
        for ours, parameter in moved.before.items():
            moved.learning[ours] = parameter.requires_grad
            data = stand_ins.get(ours, torch.empty_like(parameter, device="meta"))
            now = moved._put(ours, data)
            now.requires_grad_(False)
            moved.now[ours] = (now, now._version)
        return moved

    def restore(self, weights: Mapping[str, Tensor]) -> None:
        for ours, data in weights.items():
            self._put(ours, data).requires_grad_(self.learning[ours])

    def _put(self, ours: str, data: Tensor) -> nn.Parameter:
        """`data` as the module's parameter: the same object, unless one of the two is on the meta device."""
        parameter, name = self.before[ours], self.form.names[ours]
        if torch._has_compatible_shallow_copy_type(parameter, data):
            parameter.data = data
        else:
            if not parameter.is_meta:
                parameter.data = parameter.data.new_empty(0)  # or it would keep the experts
            parameter = nn.Parameter(data, requires_grad=False)
        setattr(self.module, name, parameter)
        return parameter

    def check(self) -> None:
        """Raises RuntimeError where somebody has changed or exchanged the weights."""
        for ours, (parameter, version) in self.now.items():
            name = self.form.names[ours]
            found = getattr(self.module, name)
            if found is not parameter or found._version != version:
                raise RuntimeError(
                    f"offload: {self.name}.{name} must stay as it was when it was offloaded, got other weights; "
                    "close the Offload before weights change"
                )


class Offload:
    """A model whose experts are elsewhere. See `offload`. Ends with `close`, or as a context manager."""

    def __init__(
        self,
        model: nn.Module,
        found: _Found,
        skipped: Mapping[str, str],
        engine: Engine,
        store: Store,
        foresight: ahead.Foresight | None,
        device: torch.device,
    ) -> None:
        self.engine, self.skipped = engine, dict(skipped)
        self.layers = [name for name, _, _ in found]
        self._store, self._foresight = store, foresight
        self._pace = Pace(len(found))
        self._moved: list[_Moved] = []
        self._lock = threading.Lock()
        _move_others(model, found, device)
        for index, (name, module, form) in enumerate(found):
            self._moved.append(_Moved.of(name, module, form, store.whole(index)))
            send_elsewhere(module, _Elsewhere(self, index))
        self._hook = model.register_forward_pre_hook(self._before, with_kwargs=True)

    @property
    def log(self):
        """Every access (layer, expert, hit or miss or fetched ahead, who went for it), with `log=True`; else None."""
        return self.engine.log

    def stats(self) -> Stats:
        """Hits, loads, bytes, and where the time went, so far."""
        return self.engine.stats()

    def new_sequence(self) -> None:
        """Tells policy and predictor that another text begins. A model called without past_key_values does so."""
        self.engine.new_sequence()
        if self._foresight is not None:
            self._foresight.start()

    def close(self) -> None:
        """Brings the experts back into the parameters, on the device, and ends the threads. The file stays."""
        with self._lock:
            moved, self._moved = self._moved, []
        if not moved:
            return
        try:
            for index, one in enumerate(moved):
                self._bring_back(index, one)
        finally:
            self._hook.remove()
            self.engine.close()

    def __enter__(self) -> Offload:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        slots = self.engine.places.slots
        return (
            f"Offload({len(self.layers)} layers, {slots} slots of {self.engine.arena.nbytes:,} bytes, {self.stats()})"
        )

    # --- inside a forward pass ---------------------------------------------------------------------------------------

    def compute(self, index: int, rows: Tensor, routing: Routing) -> Tensor:
        """What grouped_ffn would give for the experts of layer `index`."""
        one = self._moved[index]
        one.check()
        form = one.form
        return self.engine.compute(
            index, rows.to(one.now["w_down"][0].dtype), routing,
            activation=form.activation, gated=form.activation.gated, transposed=form.transposed,
            interleaved=form.interleaved, then=lambda ids: self._fetch_ahead(index, rows, routing, ids),
        ).to(rows.dtype)  # fmt: skip

    def _fetch_ahead(self, index: int, rows: Tensor, routing: Routing, ids) -> None:
        """While a layer waits and computes: what the next may need."""
        if self._foresight is None:
            return
        self._foresight.came(index, ids)
        self._pace.asked(index)
        guess = self._foresight.guess(index, rows, routing.expert_ids.cpu().numpy())
        if guess is not None:
            layer, chance = guess
            price, room = self._pace.order(layer, *self.engine.pace())
            self.engine.prefetch_likely(layer, chance, price, room)

    def _before(self, _model: nn.Module, _args: tuple, kwargs: dict[str, Any]) -> None:
        past: Any = kwargs.get("past_key_values")
        if past is None or (hasattr(past, "get_seq_length") and not past.get_seq_length()):
            self.new_sequence()

    def _bring_back(self, index: int, one: _Moved) -> None:
        """Weights are made again from what the store has; those in few bits are the rounded ones."""
        device, layer = self.engine.arena.device, self._store.layers[index]
        back = {name: torch.empty(p.shape, dtype=p.dtype, device=device) for name, (p, _) in one.now.items()}
        for e in range(layer.experts):
            kind = layer.kind(e)
            parts = {part.name: torch.empty(1, *part.shape, dtype=part.dtype, device=device) for part in kind.parts}
            self._store.read(index, e, {name: t[0] for name, t in parts.items()})
            for ours, w in kind.join(parts).items():
                back[ours][e] = (w.dequantize(back[ours].dtype) if isinstance(w, Quantized) else w)[0]
        one.restore(back)
        send_elsewhere(one.module, None)


def _move_others(model: nn.Module, found: _Found, device: torch.device) -> None:
    """Everything but the experts that move goes to `device`."""
    experts = {p for _, module, form in found for p in form.weights(module).values()}
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor not in experts and tensor.device != device:
            tensor.data = tensor.data.to(device)


class _Elsewhere:
    """What a module's forward calls. A copy of the model (deepcopy, pickle) would share slots: it is refused."""

    def __init__(self, offloaded: Offload, index: int) -> None:
        self.offloaded, self.index = offloaded, index

    def __call__(self, rows: Tensor, routing: Routing) -> Tensor:
        return self.offloaded.compute(self.index, rows, routing)

    def __reduce__(self):
        raise TypeError("offload: an offloaded model cannot be copied or pickled; close its Offload first")
