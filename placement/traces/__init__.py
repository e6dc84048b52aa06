"""Where tokens went: traces in memory, streamed or synthetic, other programs' recordings, and what is counted of them.

| file | holds |
|---|---|
| trace.py, file.py | a Trace in memory, with its file; a TraceFile that streams |
| generate.py | synthetic traces with chosen skew, affinity, domains and drift |
| readers/ | recordings of other programs |
| statistics.py | loads, transitions and pairs, counted exactly, for solvers |
| steady.py, scenarios.py | loads yet to come; loads of domains that a placement has to stand |
| affinity.py, drift.py | how well one layer foretells the next; how far two traces lie apart |
"""

from ..lookup import files_of

__getattr__ = files_of(__name__)
