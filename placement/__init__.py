"""Ground floor: where experts live, and which stand in memory. numpy in, numpy out; knows no torch.

| room or file | holds |
|---|---|
| place.py | `place`, which conducts: a trace and a topology in, a placement with its cost and a bound out |
| bounds/ | what no placement can go below |
| search/ | finds placements: METHODS by name |
| live/ | placements of a system that runs: replicas of a batch, migration, whether it pays |
| problem.py | what a placement is to be good at |
| walk.py, cost.py | what it costs a trace, token by token; what was counted |
| placement.py, slots.py, formats.py | what a placement is, checked; slots; other systems' files |
| caching/ | which experts stand in memory, by itself |
| traces/ | where tokens went, and what is counted from it |
| cluster/ | nodes, GPUs, links, and the rows sent over them |
| compiled.py, files.py | numba's cache across files; files written whole or not at all |
| careful.py | the one way to read a file that a stranger may have written |
| lookup.py | the files of a room by their names |

The files of a room answer here too, under their own names and when they are first asked for:
`headgate.placement.rebalance` is `placement/live/rebalance.py`. Who may import whom: tests/test_house.py.
"""

_ROOMS = {
    "search": "assign balance copies eplb groups ilp loops methods recombine replicate simple state transport",
    "live": "allot choice migrate rearrange rebalance",
    "caching": "cache costs locality policies precision predict predictors prefetch regroup simulate split steps tiers",
    "traces": "affinity drift generate readers scenarios statistics steady trace",
    "cluster": "links topology volume",
    "bounds": "certify",
}
_HERE = "careful compiled cost files formats place placement problem slots walk"
_WHERE = {name: f".{room}.{name}" for room, names in _ROOMS.items() for name in names.split()}
_WHERE |= {name: f".{name}" for name in _HERE.split()}


def __getattr__(name: str):
    from importlib import import_module

    if name in _WHERE:
        return import_module(_WHERE[name], __name__)
    raise AttributeError(f"headgate.placement has no attribute {name!r}; it offers {', '.join(sorted(_WHERE))}")


def __dir__():
    return sorted([*globals(), *_WHERE])
