"""Experts larger than the device: they stand in a lower tier, and those in use in a fixed number of slots.

A name is imported when it is asked for: whoever reads a header needs no engine, and no numba.
"""

from ...placement.lookup import files_of

_WHERE = {
    "Access": "stats",
    "Arena": "arena",
    "BatchSizes": "batching",
    "Engine": "engine",
    "FileStore": "file",
    "Group": "groups",
    "HostCache": "host_cache",
    "HostStore": "host",
    "Kind": "kinds",
    "Layer": "kinds",
    "Sensitivity": "calibration",
    "Stats": "stats",
    "Store": "host",
    "batch_sizes": "batching",
    "generate_offline": "batching",
    "measure_costs": "costs",
    "plan_slots": "arena",
    "precisions": "calibration",
    "sensitivity": "calibration",
}

__all__ = list(_WHERE)

_file = files_of(__name__)


def __getattr__(name: str):
    from importlib import import_module

    return getattr(import_module(f".{_WHERE[name]}", __name__), name) if name in _WHERE else _file(name)
