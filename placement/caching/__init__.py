"""Which experts stand in slots: one compiled core for the simulator and the live model. This room stands by itself.

| file | holds |
|---|---|
| cache.py, pools.py, steps.py | the cache that decides, step by step; its slots in pools; a trace as such steps |
| simulate.py | what a cache would do on a trace, and Belady's optimum |
| tiers.py | caches below caches; the time waited, and its bound |
| policies/, names.py | what to keep: eviction policies by name; the names alone |
| locality.py | how local a routing is: SRP and SCH |
| predict.py, predictors/ | which experts come next, as calibrated chances: one interface for traces and live steps |
| prefetch.py | what is fetched ahead: chance against bytes, and the link's room, under any eviction policy |
| costs.py | what an expert costs by rows, on the host and on the device, and to move |
| split.py | which of a step's experts the host computes: a flow shop, exact or with its bound |
| regroup.py | requests into batches that touch few experts, with a bound |
| precision.py | bits for each expert, with a bound |
"""

from ..lookup import files_of

__getattr__ = files_of(__name__)
