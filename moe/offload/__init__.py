"""Experts larger than the device: they stand in a lower tier, and those in use in a fixed number of slots."""

from ...placement.lookup import files_of
from .arena import Arena, plan_slots
from .batching import BatchSizes, batch_sizes, generate_offline
from .costs import measure_costs
from .engine import Engine
from .file import FileStore
from .groups import Group
from .host import HostStore, Store
from .host_cache import HostCache
from .kinds import Kind, Layer
from .sensitivity import Sensitivity, precisions, sensitivity
from .stats import Access, Stats

__all__ = [
    "Access",
    "Arena",
    "BatchSizes",
    "Engine",
    "FileStore",
    "Group",
    "HostCache",
    "HostStore",
    "Kind",
    "Layer",
    "Sensitivity",
    "Stats",
    "Store",
    "batch_sizes",
    "generate_offline",
    "measure_costs",
    "plan_slots",
    "precisions",
    "sensitivity",
]

__getattr__ = files_of(__name__)
