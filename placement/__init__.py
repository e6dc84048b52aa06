"""Ground floor: where experts live, and which stand in memory. numpy in, numpy out; knows no torch.

Each subject has a room of its own. Its files answer here too, under their own names and when they are first asked for:
`headgate.placement.rebalance` is `placement/live/rebalance.py`.
"""

_ROOMS = {
    "search": "assign balance copies eplb groups ilp loops methods recombine replicate simple state transport",
    "live": "allot choice migrate rearrange rebalance",
    "caching": "cache costs locality policies precision predict predictors prefetch regroup simulate split steps tiers",
    "traces": "affinity drift generate readers scenarios statistics steady trace",
    "cluster": "links topology volume",
    "bounds": "certify",
}
_HERE = "compiled cost files formats place placement problem slots walk"
_WHERE = {name: f".{room}.{name}" for room, names in _ROOMS.items() for name in names.split()}
_WHERE |= {name: f".{name}" for name in _HERE.split()}


def __getattr__(name: str):
    from importlib import import_module

    if name in _WHERE:
        return import_module(_WHERE[name], __name__)
    raise AttributeError(f"headgate.placement has no attribute {name!r}; it offers {', '.join(sorted(_WHERE))}")


def __dir__():
    return sorted([*globals(), *_WHERE])
