"""Headgate: Mixture-of-Experts for PyTorch.

The public face. Nothing is imported until it is asked for (PEP 562): pytest runs this file under another name, and a
login node plans placements without loading torch.
"""

__version__ = "0.1.0"

_WHERE = {
    "MoE": "moe.layer",
    "Experts": "moe.experts",
    "Capacity": "moe.capacity",
    "replace": "moe.hf",
    "restore": "moe.hf",
    "record": "moe.record",
    "Fold": "dispatch.fold",
    "parallelize": "moe.parallel",
    "parallelize_attention": "moe.hf.attention",
    "no_sync": "moe.parallel",
    "clip_grad_norm_": "moe.parallel",
    "set_degree": "moe.parallel",
    "place_experts": "moe.placed",
    "migrate": "moe.placed",
    "offload": "moe.offload.offload",
    "ModelPool": "moe.offload.models",
    "save_checkpoint": "moe.checkpoint",
    "load_checkpoint": "moe.checkpoint",
    "Routing": "kernels.routing",
    "grouped_ffn": "kernels.grouped_ffn",
    "Trace": "placement.trace",
    "Topology": "placement.topology",
    "Workload": "placement.topology",
    "Objective": "placement.problem",
    "Placement": "placement.placement",
    "place": "placement.place",
}
_MODULES = {
    "hf": "moe.hf",
    "kernels": "kernels",
    "moe": "moe",
    "placement": "placement",
    "dispatch": "dispatch",
    "bench": "bench",
}

__all__ = ["__version__", *_WHERE]


def __getattr__(name: str):
    from importlib import import_module

    if name in _WHERE:
        return getattr(import_module(f"headgate.{_WHERE[name]}"), name)
    if name in _MODULES:
        return import_module(f"headgate.{_MODULES[name]}")
    raise AttributeError(f"headgate has no attribute {name!r}; it offers {', '.join(sorted([*_WHERE, *_MODULES]))}")


def __dir__():
    return sorted([*__all__, *_MODULES])
