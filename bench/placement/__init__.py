"""`headgate bench placement`: placements beside EPLB and exact layers in turn, fitted on one half of a trace, judged on
the other: crossings, load, rows that move, bounds, replicas, drift, a large case, and the replica choice per batch.
"""

from .command import add_arguments, run

__all__ = ["add_arguments", "run"]
