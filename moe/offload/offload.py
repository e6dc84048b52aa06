"""headgate.offload: a model's experts in host memory or on disk, those in use in a fixed number of slots."""

from __future__ import annotations

import os
import threading
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...kernels.autocast import under_autocast
from ...kernels.routing import Routing
from ...kernels.uncompiled import uncompiled
from ...placement.caching.costs import Costs
from ...placement.caching.policies import Setting
from ...placement.caching.policies import policy as start_policy
from ...placement.caching.predict import Predictor
from ...placement.traces.trace import Trace
from ..elsewhere import send_elsewhere
from ..lora.attached import at_work
from ..shards import shards_of
from . import ahead
from .adapted import Carried
from .arena import detoured, plan_slots
from .checksums import Verify, check_verify
from .costs import costs_of
from .engine import Engine
from .forms import Found, runs_here, survey
from .host import Store, maps_files
from .kinds import Layer
from .lower import Formats, check_there, groups_of, layers_of, store_of
from .moved import Moved, move_others
from .pace import Pace
from .ready import compiling
from .room import Split, asked_split
from .stats import Stats


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
    readers: int | None = None,
    page_cache: bool = True,
    verify: Verify = "first",
    context: int | None = None,
    log: bool = False,
) -> Offload:
    """Moves the experts of a model out of its device's memory, in place; outputs stay the same to the bit (on a GPU for
    up to four rows where their experts can all be there at once, as spare slots let those of one token; else to
    rounding).

    model     a transformers model after `headgate.replace` or with headgate as its experts implementation, or one with
              `headgate.MoE` layers. Its experts are frozen; everything else may learn (see docs/lora.md): gradients go
              through them, by a step of its own of each layer in the backward pass
    budget    what the slots for experts may take on the device: bytes ("8GiB", 4096) or a share of all experts' bytes,
              at most all ("25%", 0.25). Room for one expert at least (scope "shared"), or for one of each layer
              ("layer"). It covers the slots and nothing else: the rest of the model, the KV cache and the rows that are
              computed come beside it, as do Python and torch (about 0.7 GB), and for each reader of a GPU one expert in
              host memory. "auto": what is free now (memory, control groups, ulimit -v and -d; the GPU's own) less these
              and a margin of a twentieth, at least 256 MiB; `Offload.split` says how it was shared out
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
    formats   experts in few bits: "int8", "int4" or another format for all, or module name -> a format (None: as they
              are) for each expert, as `headgate.moe.offload.precisions` chooses them. Outputs are then those of the
              rounded weights
    hybrid    True: the host computes experts where they are, in host memory, wherever that ends a step sooner than to
              fetch them. What either costs is measured now, in about a second, on the first layer's weights, unless
              Costs are given. On a GPU outputs then stay the same to rounding: the host sums in another order
    readers   threads that fetch; from disk, each with four requests at a time. 0, without a disk: none, as a GPU copies
              out of page-locked memory by itself, in order. None: 0 there, else 2
    page_cache, verify   with `disk`: whether the system may keep copies of what was read (on a CPU large experts are
              then computed in maps of the file, see docs/fit.md); whether an expert's checksum is compared when it is
              read for the "first" time, at each read (True: of a copy) or never (False)
    context   with budget="auto": tokens that the KV cache is to have room for, of all texts together; None: 4096
    log       keep every access, for `Offload.log`

    Returns an Offload: what was moved and what was not (`skipped`, with the reason), `stats()`, and `close()`, which
    brings the experts back. Parameters keep names and shapes; what they hold is read from the lower tier when somebody
    asks (state_dict, save_pretrained), but for layers with `formats`, which have nothing to read and come back rounded.
    To write into one raises RuntimeError (see StandIn); all other weights can be edited. Experts that a LoRA adapter
    computes stay where they are. Several threads may generate at once.

    Raises ValueError / TypeError naming argument, rule and value, OSError where the disk is full or cannot be written;
    nothing is changed then.

    >>> headgate.replace(model)
    >>> with headgate.offload(model, budget="25%", disk="/scratch/experts") as offloaded:
    ...     model.generate(**inputs)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"offload: model must be a torch.nn.Module, got {type(model).__name__}")
    found, skipped = survey(model)
    check_there(model, found)
    where = torch.device(device) if device is not None else _device_of(model, found)
    if where.type == "cpu" and disk is None:
        raise ValueError(
            "offload: disk must be a folder where the device is a CPU, whose memory is the host's: got None"
        )
    _check_hybrid(hybrid, disk, formats)
    check_verify(verify, "offload")
    groups = groups_of(found, {} if formats is None else formats)
    layers = layers_of(found, groups)
    plan = Plan.of(
        model, found, skipped, layers, where, budget=budget, policy=policy, prefetch=prefetch, scope=scope, trace=trace,
        readers=readers, hybrid=hybrid, log=log, from_disk=disk is not None, context=context,
    )  # fmt: skip
    return plan.start(store_of(found, layers, groups, disk, where, page_cache=page_cache, verify=verify))


@dataclass(frozen=True)
class Plan:
    """An Offload to be, with all settings checked, before anything is read, written or moved."""

    model: nn.Module
    found: Found
    skipped: Mapping[str, str]
    device: torch.device
    foresight: ahead.Foresight | None
    engine: Mapping[str, Any]
    hybrid: bool | Costs
    split: Split | None
    compiling: threading.Thread

    @classmethod
    def of(
        cls,
        model: nn.Module,
        found: Found,
        skipped: Mapping[str, str],
        layers: Sequence[Layer],
        device: torch.device,
        *,
        budget: str | int | float,
        policy: str,
        prefetch: str | Predictor | None,
        scope: str,
        trace: Trace | None,
        readers: int | None,
        log: bool,
        from_disk: bool,
        hybrid: bool | Costs = False,
        context: int | None = None,
    ) -> Plan:
        """Raises ValueError / TypeError where a setting is not what it may be; see `offload`."""
        if isinstance(readers, bool) or not isinstance(readers, int | None):
            raise TypeError(f"offload: readers must be an integer or None, got {readers!r}")
        if trace is not None and not isinstance(trace, Trace):
            raise TypeError(f"offload: trace must be a Trace or None, got {type(trace).__name__}")
        if readers is not None and readers < from_disk:
            raise ValueError(f"offload: readers must be at least 1, or 0 without a disk, got {readers}")
        split = asked_split(budget, context, model, found, layers, device)
        budget = budget if split is None else split.budget
        foresight = ahead.foresight_of(prefetch, model, found, trace)
        alone = device.type == "cuda" and not from_disk and not readers
        detours = detoured(layers, device, 0 if alone else readers or 2)
        places = plan_slots(layers, budget, 1, scope, detours).places
        shape = places.of.shape
        state = start_policy(policy, Setting(shape[0], shape[1], places.slots, trace))
        engine = {
            "budget": budget, "policy": state, "scope": scope, "device": device, "readers": readers, "log": log
        }  # fmt: skip
        return cls(model, found, skipped, device, foresight, engine, hybrid, split, compiling(device))

    def start(self, store: Store) -> Offload:
        """Over a lower tier with the experts in it, which is closed if that fails."""
        self.compiling.join()
        try:
            costs = costs_of(self.hybrid, store, self.found[0][2], self.device)
            engine = Engine(store, costs=costs, **self.engine)
        except BaseException:
            store.close()
            raise
        return Offload(self.model, self.found, self.skipped, engine, store, self.foresight, self.device, self.split)


def _device_of(model: nn.Module, found: Found) -> torch.device:
    """Where everything else is."""
    experts = {p for _, module, form in found for p in form.weights(module).values()}
    for some in ([p for p in model.parameters() if p not in experts], experts):
        devices = {p.device for p in some if not p.is_meta}
        if len(devices) > 1:
            raise ValueError(f"offload: device must be given for a model on several, got {sorted(map(str, devices))}")
        if devices:
            return devices.pop()
    return torch.device("cpu")


def _check_hybrid(hybrid: bool | Costs, disk: object, formats: Formats | None) -> None:
    if not isinstance(hybrid, bool | Costs):
        raise TypeError(f"offload: hybrid must be True, False or Costs, got {type(hybrid).__name__}")
    for name, value in (("disk", disk), ("formats", formats)):
        if hybrid and value:
            raise ValueError(
                f"offload: {name} must be None with hybrid, for which the host needs whole experts in its memory, got "
                f"{value!r}"
            )


class Offload:
    """A model whose experts are elsewhere. See `offload`. Ends with `close`, or as a context manager."""

    def __init__(
        self,
        model: nn.Module,
        found: Found,
        skipped: Mapping[str, str],
        engine: Engine,
        store: Store,
        foresight: ahead.Foresight | None,
        device: torch.device,
        split: Split | None = None,
    ) -> None:
        self.engine, self.skipped = engine, dict(skipped)
        self.split = split  # with budget="auto": how what was free was shared out
        self.layers = [name for name, _, _ in found]
        self._store, self._foresight = store, foresight
        self._pace = Pace(len(found))
        self._came: dict[tuple[int, int], NDArray[np.int32]] = {}  # (thread, layer): what it chose last, forward
        self._moved: list[Moved] = []
        self._lock = threading.Lock()
        self._hook = model.register_forward_pre_hook(self._before, with_kwargs=True)
        try:
            move_others(model, found, device)
            for index, (name, module, form) in enumerate(found):
                self._moved.append(Moved.of(name, module, form, store.whole(index), maps_files(store)))
                send_elsewhere(module, _Elsewhere(self, index))
        except BaseException as error:
            self._undo(error)
            raise

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
        self._pace.new_sequence()
        if self._foresight is not None:
            self._foresight.start()

    def close(self, discard: bool = False, *, restore: bool | Literal["auto"] = "auto") -> None:
        """Brings the experts back to where they were, layer by layer, and ends the threads. The file stays.

        With "auto", those that were in memory before: what came from a file, being on the meta device, is not brought
        there. After an `offload` from an experts file its parameters are then maps of that file, which can be read and
        computed with; after a `headgate.load` they stay on the meta device: a call of the model raises RuntimeError.
        True brings all back into memory.

        Experts in few bits come back rounded. Raises OSError where some cannot be read, as in a file that was damaged:
        `restore=False` gives them up. Raises RuntimeError, before anything is done, where weights were changed
        meanwhile, which would be lost: `discard` says that they may. After an error it can be called again.
        With `restore=False` nothing is brought back: parameters keep what they hold now, the lower tier's own bytes.
        That is for a model which is offloaded again from the same store (`HostStore.lend`), with other settings.
        """
        if restore not in (True, False, "auto"):
            raise ValueError(f'Offload.close: restore must be True, False or "auto", got {restore!r}')
        with self._lock:
            if not discard:
                for one in self._moved:
                    one.check()
            while self._moved:
                last = len(self._moved) - 1
                one = self._moved[last]
                if not restore or (restore == "auto" and one.was_absent):
                    self._moved.pop().leave()
                    continue
                one.restore(self._store, last, self.engine.arena.device)
                self._moved.pop()
            self._hook.remove()
            self.engine.close()

    def _undo(self, error: BaseException) -> None:
        """The end of one that could not begin, for a cause that is to be heard, whatever else goes wrong."""
        try:
            self.close(discard=True)
        except Exception as another:
            error.add_note(f"and experts that had been moved could not be brought back: {another}")
            self.close(discard=True, restore=False)

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

    @uncompiled  # decisions, reads and waiting are not for a graph; what is around it is compiled
    def compute(self, index: int, rows: Tensor, routing: Routing) -> Tensor:
        """What grouped_ffn would give for the experts of layer `index`."""
        one = self._moved[index] if index < len(self._moved) else None
        if one is None:
            raise RuntimeError("offload: the Offload must be open, got one that is being closed")
        one.check()
        one.refuse_learning()
        form, dtype = one.form, one.now["w_down"].parameter.dtype
        if under_autocast(rows.device):
            wanted = torch.get_autocast_dtype(rows.device.type)
            if wanted != dtype:
                raise ValueError(f"offload: autocast must be off or to the experts' {dtype}, got autocast to {wanted}")
        carried, lora = None, at_work(one.module)
        if lora is not None:
            apart = form.interleaved and not form.layout["interleaved"]
            carried = Carried(*lora.deltas(shards_of(one.module), apart), lora.dropout if lora.training else 0.0)
        return self.engine.compute(
            index, rows.to(dtype), routing, carried=carried,
            activation=form.activation, gated=form.activation.gated, **form.layout,
            then=lambda ids: self._fetch_ahead(index, rows, routing, ids),
            back=partial(self._fetch_back, index, self._came.get((threading.get_ident(), index - 1))),
        ).to(rows.dtype)  # fmt: skip

    def _fetch_ahead(self, index: int, rows: Tensor, routing: Routing, ids: NDArray[np.int32]) -> None:
        """While a layer waits and computes: what the next may need."""
        if self._foresight is None:
            return
        if torch._C._current_graph_task_id() >= 0:  # checkpointing repeats a forward pass within the backward pass
            self._fetch_back(index, self._came.get((threading.get_ident(), index - 1)), ids)
            return
        self._came[threading.get_ident(), index] = ids
        pace = self.engine.pace()
        if pace is None:
            self._pace.new_sequence()  # what passes meanwhile is no idle time
            return
        self._foresight.came(index, ids)
        self._pace.asked(index)
        guess = self._foresight.guess(index, rows, routing.expert_ids)
        if guess is not None:
            layer, chance = guess
            price, room = self._pace.order(layer, *pace)
            self.engine.prefetch_likely(layer, chance, price, room)

    def _fetch_back(self, index: int, before: NDArray[np.int32] | None, _ids: NDArray[np.int32]) -> None:
        """While a layer's backward pass waits and computes: what the one `before` it had chosen."""
        self._moved[index].check()
        if before is not None:
            self.engine.prefetch(index - 1, before)

    @uncompiled
    def _before(self, _model: nn.Module, _args: tuple, kwargs: dict[str, Any]) -> None:
        for one in self._moved:
            if not runs_here(one.module):
                raise RuntimeError(
                    f"offload: {one.name} must run through Headgate while it is offloaded, got another experts "
                    "implementation; choose headgate again, or close the Offload first"
                )
        if kwargs.get("cache") is not None:  # continuous batching: several texts in each call, none of them new as such
            return
        past: Any = kwargs.get("past_key_values")
        if past is None or (hasattr(past, "get_seq_length") and not past.get_seq_length()):
            self.new_sequence()


class _Elsewhere:
    """What a module's forward calls. A copy of the model (deepcopy, pickle) would share slots: it is refused."""

    def __init__(self, offloaded: Offload, index: int) -> None:
        self.offloaded, self.index = offloaded, index

    def __call__(self, rows: Tensor, routing: Routing) -> Tensor:
        return self.offloaded.compute(self.index, rows, routing)

    def freeze(self) -> dict[nn.Parameter, bool]:
        """The experts stay frozen when they come back; returns which parameters would have learned."""
        one = self.offloaded._moved[self.index]
        learned = {p: one.learning[ours] for ours, seen in one.now.items() for p in (seen.parameter, one.before[ours])}
        one.learning = dict.fromkeys(one.learning, False)
        return learned

    def thaw(self, parameters: Container[nn.Parameter]) -> None:
        """Those of the experts' `parameters` that are among these learn when they come back."""
        one = self.offloaded._moved[self.index]
        for ours, seen in one.now.items():
            one.learning[ours] |= seen.parameter in parameters or one.before[ours] in parameters

    def __reduce__(self):
        raise TypeError("offload: an offloaded model cannot be copied or pickled; close its Offload first")
