"""The machines: nodes, GPUs and links, and the rows that dispatchers send over them.

| file | holds |
|---|---|
| topology.py | Topology, the machine that experts are placed on; Workload, what a step of it moves |
| links.py | what an exchange costs: a latency and a bandwidth for each class of link |
| volume.py | the rows that each dispatcher moves, by formula |
"""

from ..lookup import files_of

__getattr__ = files_of(__name__)
