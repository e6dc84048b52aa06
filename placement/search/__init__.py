"""Finds placements: a table of methods, their searches, and the compiled inner loops of these.

| file | holds |
|---|---|
| methods.py | METHODS: a name, and a function of a Problem and a Run |
| transport.py, assign.py | one layer exactly, given its neighbours; all layers in turn |
| search.py, loops.py, state.py | the swap search; its compiled loops; what a placement without replicas scores |
| recombine.py | the best of several placements, layer by layer, GPUs renamed |
| copies.py, token_loops.py | swaps judged on the tokens: rows copied |
| replicate.py, replica_loops.py | which experts the spare slots hold |
| balance.py, balance_search.py, groups.py | load alone: replicas and GPUs by local search; whole groups to nodes |
| exact.py, walk_loops.py | small cases by what a walk counts: all placements, or descents |
| ilp.py | the exact model, by HiGHS |
| eplb.py, simple.py | EPLB as published; what frameworks start with, and chance |
"""

from ..lookup import files_of

__getattr__ = files_of(__name__)
