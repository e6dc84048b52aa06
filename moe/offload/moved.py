"""Parameters out of a model and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..elsewhere import Absent, send_elsewhere
from .forms import Form
from .host import Store
from .kinds import widened
from .stand_in import About, StandIn, stand_back, stand_in


class Seen(NamedTuple):
    """A parameter as it was when experts left: what changes it changes one of these."""

    parameter: nn.Parameter
    version: int
    address: int
    about: About


@dataclass(eq=False)
class Moved:
    """One experts module: its parameters as they were, where, whether they were learning, and what they are now."""

    name: str
    module: nn.Module
    form: Form
    before: dict[str, nn.Parameter]
    devices: dict[str, torch.device]
    learning: dict[str, bool]
    now: dict[str, Seen]

    @classmethod
    def of(
        cls, name: str, module: nn.Module, form: Form, stand_ins: Mapping[str, Tensor], mapped: bool = False
    ) -> Moved:
        """Puts `stand_ins` into the parameters; where there is none, nothing that has numbers. `mapped`: they are
        read-only maps of a file."""
        before = form.weights(module)
        for parameter in before.values():
            stand_back(parameter)  # of an Offload before this one, which left a map
        devices = {ours: p.device for ours, p in before.items()}
        moved = cls(name, module, form, before, devices, {n: p.requires_grad for n, p in before.items()}, {})
        for ours, parameter in before.items():
            data = stand_ins.get(ours, torch.empty_like(parameter, device="meta"))
            now = moved._put(ours, data)
            now.requires_grad_(False)
            seen = now._version, now.data_ptr()
            moved.now[ours] = Seen(now, *seen, stand_in(now, f"{name}.{form.names[ours]}", mapped))
        return moved

    @property
    def was_absent(self) -> bool:
        """Whether its experts were on the meta device: they have never been in memory."""
        return any(device.type == "meta" for device in self.devices.values())

    def restore(self, store: Store, index: int, device: torch.device) -> None:
        """The experts back in the parameters, where these were (of the meta device: on `device`), made again from what
        the store has: those in few bits are the rounded ones. Nothing is changed if that fails."""
        layer = store.layers[index]
        with torch.inference_mode(False):
            back = {
                ours: torch.empty(
                    p.shape, dtype=p.dtype, device=device if self.devices[ours].type == "meta" else self.devices[ours]
                )
                for ours, (p, *_) in self.now.items()
            }
            for e in range(layer.experts):
                kind = layer.kind(e)
                parts = {part.name: torch.empty(1, *part.shape, dtype=part.dtype) for part in kind.parts}
                try:
                    store.read(index, e, {name: t[0] for name, t in parts.items()})
                except OSError as error:
                    what = f"offload: {self.name} could not be brought back: {error}; close(restore=False) gives it up"
                    raise OSError(error.errno, what) from error
                wide = widened(kind.join(parts), back["w_down"].dtype)
                for ours, w in self.form.inside(wide).items():
                    back[ours][e] = w[0]
            self.put_back(back)

    def put_back(self, weights: Mapping[str, Tensor]) -> None:
        for ours, data in weights.items():
            stand_back(self.now[ours].parameter)
            self._put(ours, data).requires_grad_(self.learning[ours])
        send_elsewhere(self.module, None)

    def leave(self) -> None:
        """Nobody serves the module any more; its parameters hold what they hold. Those that are maps of a file go on
        refusing edits. Those that were on the meta device and still are have no numbers, and a call says so."""
        for seen in self.now.values():
            seen.about.left = True
            if not seen.about.mapped:
                stand_back(seen.parameter)
        absent = self.was_absent and any(seen.parameter.is_meta for seen in self.now.values())
        send_elsewhere(self.module, Absent(self.name) if absent else None)

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

    def refuse_learning(self) -> None:
        """Raises ValueError where a weight asks for a gradient and one would be taken."""
        for parameter, _, _, about in self.now.values():
            if parameter.requires_grad and torch.is_grad_enabled():
                raise ValueError(
                    f"offload: {about.name} must not ask for a gradient while it is offloaded, as experts are frozen: "
                    "requires_grad_(False) on it, or close the Offload to train it"
                )

    def check(self) -> None:
        """Raises RuntimeError where somebody has changed, moved or exchanged the weights, or adapters compute them."""
        for ours, (parameter, version, address, about) in self.now.items():
            found = getattr(self.module, self.form.names[ours])
            if not isinstance(found, nn.Parameter):
                raise RuntimeError(
                    f"offload: {about.name} must stay a parameter, got one that is computed (a LoRA adapter on it, a "
                    "parametrization): close the Offload, and merge or remove what computes it before the next"
                )
            same = found is parameter and type(found) is StandIn
            if not same or found._version != version or found.data_ptr() != address or about.changed():
                raise about.refusal()


def move_others(model: nn.Module, found: Sequence[tuple[str, nn.Module, Form]], device: torch.device) -> None:
    """Everything but the experts that move goes to `device`."""
    experts = {p for _, module, form in found for p in form.weights(module).values()}
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor not in experts and tensor.device != device:
            tensor.data = tensor.data.to(device)
