"""Policies that foretell the next use: from nothing ("adaptive"), or with what a trace has taught ("learned")."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...careful import opened
from ...files import write_whole
from ...traces.trace import Trace
from ..steps import steps_of
from .foresight import BLOCKS, GAIN, OFTEN, RATES, ROWS, SEEN, fit_steps
from .state import LEARNED, Setting, State, learned_from, options, state

VERSION = 1
PASSES = 2  # over the trace: a third gains less than half a point of the gap to Belady
ANEW = 0.5  # the least gain that a taught feature begins with: teaching may be false, and unlearning takes lessons too


def adaptive(setting: Setting) -> State:
    """Foresight (foresight.py) that starts from nothing and learns while it works.

    Options: `gamma`, 0 .. 1, how far it looks (0: as far as the slots reach); `guard` 0 leaves the guard out. Costs 4 B
    for each of L * 9 * E * E weights, and about 10 us a step with 64 experts.
    """
    return _begin("adaptive", setting)


def learned(setting: Setting) -> State:
    """Foresight that has learned from the setting's trace, and goes on. Options as adaptive's."""
    return Learned.fit(learned_from("learned", setting), setting.slots).begin(setting)


@dataclass(frozen=True, eq=False)
class Learned:
    """What foresight has learned of a model.

    weights  float32 [L, 9 E, E]
    gain     float64 [9, L, E]: how much each feature still learns
    often    float64 [L, E]: frequency;  recent  float64 [2, L, E]: running means

    Raises ValueError / TypeError where the fields do not fit together.

    >>> trace = Trace(np.arange(40, dtype=np.uint8).reshape(1, 40, 1) % 4, num_experts=4)    # 0 1 2 3 0 1 2 3 ..
    >>> Learned.fit(trace, slots=2).weights.shape
    (1, 36, 4)
    """

    weights: NDArray[np.float32]
    gain: NDArray[np.float64]
    often: NDArray[np.float64]
    recent: NDArray[np.float64]

    def __post_init__(self) -> None:
        if self.often.ndim != 2 or not self.often.size:
            raise ValueError(f"Learned: often must be [L, E] and not empty, got {self.often.shape}")
        layers, experts = self.often.shape
        kinds = {"weights": np.float32, "gain": np.float64, "often": np.float64, "recent": np.float64}
        shapes = {
            "weights": (layers, BLOCKS * experts, experts),
            "gain": (BLOCKS, layers, experts),
            "often": (layers, experts),
            "recent": (len(RATES), layers, experts),
        }
        for name, kind in kinds.items():
            found = getattr(self, name)
            if found.dtype != kind:
                raise TypeError(f"Learned: {name} must be {np.dtype(kind)}, got {found.dtype}")
            if found.shape != shapes[name]:
                raise ValueError(f"Learned: {name} must be {shapes[name]}, got {found.shape}")
            if not np.isfinite(found).all():
                raise ValueError(f"Learned: {name} must be finite, got {found[~np.isfinite(found)][0]}")

    @classmethod
    def fit(cls, trace: Trace, slots: int, passes: int = PASSES) -> Learned:
        """Learns from a trace, token by token and `passes` times over it, for a cache of `slots` in all."""
        if passes < 1:
            raise ValueError(f"Learned: passes must be at least 1, got {passes}")
        made = _begin("learned", Setting(trace.shape[0], trace.num_experts, slots, options={"guard": 0}))
        steps = steps_of(trace)
        for _ in range(passes):
            fit_steps(made, steps.layer, steps.offsets, steps.ids)
        memory = made.memory
        return cls(made.tables, memory[GAIN:SEEN].copy(), memory[OFTEN].copy(), memory[OFTEN + 1 : GAIN].copy())

    def begin(self, setting: Setting) -> State:
        """A policy that knows this, and learns on from a copy. ValueError: the setting is another model's."""
        if self.often.shape != (setting.layers, setting.experts):
            raise ValueError(
                f"Learned: setting must have L, E = {self.often.shape}, got {(setting.layers, setting.experts)}"
            )
        made = _begin("learned", setting)
        made.tables[:] = self.weights
        made.memory[GAIN:SEEN] = np.maximum(self.gain, ANEW)
        made.memory[OFTEN], made.memory[OFTEN + 1 : GAIN] = self.often, self.recent
        made.notes[1] = np.inf  # the frequencies are known
        return made

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes an `.npz` at exactly `path`, whole or not at all. Raises OSError where that cannot be done."""
        fields = {name: getattr(self, name) for name in _FIELDS}
        write_whole(Path(path), lambda file: np.savez(file, version=np.int64(VERSION), **fields))

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, max_bytes: int | None = None) -> Learned:
        """Reads what `save` wrote. `max_bytes` of memory that it may fill: None for four times the file, or 64 MB.

        Raises OSError where it is missing or may not be read, or ValueError naming file and fault.
        """
        with opened(path, "Learned", max_bytes) as file:
            found = file.npz(required={"version", *_FIELDS}, allowed=())
            file.integers(found.pop("version"), "version", shape=(), low=VERSION, high=VERSION)
            try:
                return cls(**found)
            except (ValueError, TypeError) as error:
                raise file.damaged("what Learned.save wrote", str(error).removeprefix("Learned: ")) from error


_FIELDS = ("weights", "gain", "often", "recent")


def _begin(name: str, setting: Setting) -> State:
    """Foresight that has seen nothing."""
    found = options(name, setting, gamma=0.0, guard=1.0)
    if not 0 <= found["gamma"] < 1:
        raise ValueError(f"policy: gamma of {name} must be 0 .. 1, 1 not among them, got {found['gamma']}")
    if setting.slots < 1:
        raise ValueError(f"policy: slots of {name} must be at least 1, got {setting.slots}")
    layers, experts = setting.layers, setting.experts
    made = state(
        LEARNED,
        setting,
        numbers=(max(1, setting.slots // layers), found["gamma"], found["guard"]),
        tables=np.zeros((layers, BLOCKS * experts, experts), np.float32),
        memory=ROWS,
        notes=np.zeros((2, layers)),
        frank=True,
    )
    made.memory[GAIN:SEEN] = 1
    return made
