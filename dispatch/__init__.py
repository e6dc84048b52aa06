"""First floor: moves token rows to the ranks of their experts and back. One file per dispatcher, one line per file."""

from .all_gather import AllGather
from .all_to_all import AllToAll
from .auto import Auto
from .compose import Compose
from .deep_ep import DeepEP
from .fold import Fold
from .hierarchical import Hierarchical
from .local import Local
from .measure import measure
from .protocol import Dispatcher
from .rollcall import DeadRanks
from .schedule import Overlap
from .slice_all_reduce import SliceAllReduce
from .symmetric import Symmetric

__all__ = [
    "DISPATCHERS",
    "ENGINES",
    "AllGather",
    "AllToAll",
    "Auto",
    "Compose",
    "DeadRanks",
    "DeepEP",
    "Dispatcher",
    "Fold",
    "Hierarchical",
    "Local",
    "Overlap",
    "SliceAllReduce",
    "Symmetric",
    "measure",
]

DISPATCHERS: dict[str, type[Dispatcher]] = {
    "local": Local,
    "all_gather": AllGather,
    "all_to_all": AllToAll,
    "hierarchical": Hierarchical,
    "slice_all_reduce": SliceAllReduce,
    "symmetric": Symmetric,
    "auto": Auto,
}

# Dispatchers on somebody else's kernels: `why_not()` says what is missing here, or None.
ENGINES: dict[str, type[DeepEP]] = {"deep_ep": DeepEP}
