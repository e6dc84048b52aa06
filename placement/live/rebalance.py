"""Whether a new placement pays for its migration, step after step, and what that policy is worth on a drifting trace.

A proposal is fitted on the older part of a window of recent tokens and judged on the newer part: what it gains on the
tokens that it was fitted to is no gain. It pays where

    steps * (seconds now - seconds then)  >  hysteresis * seconds of the migration

with `steps` until the next decision, step seconds by `Cost.seconds` on the newer part, the rest by `Migration.seconds`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..cluster.topology import Workload
from ..placement import Placement
from ..traces.trace import Trace
from ..walk import walk
from .migrate import Migration, migrate

Propose = Callable[[Trace, Placement], Placement]
POLICIES = ("never", "always", "pays")


@dataclass(frozen=True)
class Decision:
    """What is known of a proposal: seconds of a step now and then, of the migration, and whether it pays."""

    migration: Migration
    now_s: float
    then_s: float
    migration_s: float
    steps: float
    pays: bool

    @property
    def saved_s(self) -> float:
        """Until the next decision, the migration not counted."""
        return self.steps * (self.now_s - self.then_s)

    def why(self) -> str:
        """One line."""
        gain = f"{1e3 * self.now_s:.3f} -> {1e3 * self.then_s:.3f} ms a step saves {self.saved_s:.3g} s"
        cost = f"moving {self.migration.moved} experts takes {self.migration_s:.3g} s"
        return f"{'migrate' if self.pays else 'stay'}: {gain} in {self.steps:g} steps, {cost}"


@dataclass(frozen=True)
class Rebalancer:
    """Decides for one workload. `decide` changes nothing: whoever migrates goes on with `decision.migration.target`.

    propose       (recent trace, placement now) -> placement: such as `place` with `start`, or `balance`
    expert_bytes  of one expert's weights in one layer (with its optimizer's state, where that travels)
    steps         until the next decision
    hysteresis    how many times its cost a migration must save; 0: any gain will do
    fit           the share of the window, its older part, that the proposal may look at
    relabel       whether GPUs may change their names to save bytes (see `migrate`)

    Raises ValueError naming field, rule and value.
    """

    propose: Propose
    expert_bytes: float
    steps: float
    workload: Workload | None = None
    hysteresis: float = 1.0
    fit: float = 0.75
    relabel: bool = False

    def __post_init__(self) -> None:
        for name in ("expert_bytes", "steps", "hysteresis"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"Rebalancer: {name} must not be negative, got {getattr(self, name)}")
        if not 0 < self.fit < 1:
            raise ValueError(f"Rebalancer: fit must be between 0 and 1, got {self.fit}")

    def decide(self, window: Trace, placement: Placement) -> Decision:
        """On a window of recent tokens, oldest first. Raises ValueError where it has fewer than 2."""
        tokens = window.expert_ids.shape[1]
        if tokens < 2:
            raise ValueError(f"Rebalancer: window must have at least 2 tokens, got {tokens}")
        cut = min(max(round(self.fit * tokens), 1), tokens - 1)
        older, newer = window.select(slice(cut)), window.select(slice(cut, None))
        proposal = self.propose(older, placement)
        migration = migrate(placement, proposal, relabel=self.relabel)
        now, then = (walk(newer, p).seconds(self.workload) for p in (placement, migration.target))
        cost = migration.seconds(self.expert_bytes)
        pays = self.steps * (now - then) > self.hysteresis * cost and migration.moved > 0
        return Decision(migration, now, then, cost, self.steps, pays)


@dataclass(frozen=True)
class Outcome:
    """What a policy came to: predicted seconds of all steps, of all migrations, how many of these, experts moved, and
    seconds of each window, its migration included."""

    policy: str
    steps_s: float
    migrations_s: float
    migrations: int
    moved: int
    windows_s: tuple[float, ...]

    @property
    def seconds(self) -> float:
        return self.steps_s + self.migrations_s


def simulate(
    trace: Trace,
    placement: Placement,
    rebalancer: Rebalancer,
    window: int,
    policies: Sequence[str] = POLICIES,
) -> list[Outcome]:
    """Serves `trace` window by window, `rebalancer.steps` steps of its workload on each, under each policy.

    Between two windows the policy may migrate by what the last one showed: "never", "always" to the proposal, or when
    it "pays". The first window is served with `placement` by all. Raises ValueError naming argument, rule and value.
    """
    tokens = trace.expert_ids.shape[1]
    if not 2 <= window <= tokens:
        raise ValueError(f"simulate: window must be 2 .. T={tokens}, got {window}")
    for policy in policies:
        if policy not in POLICIES:
            raise ValueError(f"simulate: policies must be among {', '.join(POLICIES)}, got {policy!r}")
    starts = np.arange(0, tokens - window + 1, window)
    windows = [trace.select(slice(start, start + window)) for start in starts.tolist()]
    return [_served(windows, placement, rebalancer, policy) for policy in policies]


def _served(windows: list[Trace], placement: Placement, rebalancer: Rebalancer, policy: str) -> Outcome:
    moved, migrations, spent, seconds = 0, 0, 0.0, []
    for number, window in enumerate(windows):
        cost = 0.0
        if number and policy != "never":
            decision = rebalancer.decide(windows[number - 1], placement)
            if decision.pays or (policy == "always" and decision.migration.moved):
                placement = replace(decision.migration.target, cost={}, bound={})
                moved, migrations, cost = moved + decision.migration.moved, migrations + 1, decision.migration_s
        spent += cost
        seconds.append(rebalancer.steps * walk(window, placement).seconds(rebalancer.workload) + cost)
    return Outcome(policy, sum(seconds) - spent, spent, migrations, moved, tuple(seconds))
