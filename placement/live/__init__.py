"""Placements of a system that runs: which replica takes which rows, and the way from one placement to another.

| file | holds |
|---|---|
| choice.py | rows of a batch to replicas: the linear program of a layer as a flow, exact, in whole rows |
| allot.py | the rows of a choice, shared out over the ranks that send them |
| migrate.py | the way with the fewest bytes, in steps that each leave a valid placement |
| rearrange.py | the same slot by slot, for numbers of slots that differ |
| rebalance.py | whether a new placement pays for its migration |
"""

from ..lookup import files_of

__getattr__ = files_of(__name__)
