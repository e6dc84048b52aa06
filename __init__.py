"""Headgate: Mixture-of-Experts for PyTorch.

The public face. Nothing is imported until it is asked for (PEP 562): pytest runs this file under another name, and a
login node plans placements without loading torch.
"""

__version__ = "0.1.0"

_WHERE = {
    "MoE": "moe.layer",
    "Experts": "moe.experts",
    "Capacity": "moe.capacity",
    "TokenRanks": "moe.losses",
    "update_biases": "moe.bias",
    "Muon": "moe.muon",
    "Memory": "moe.memory",
    "MoM": "moe.mom",
    "replace": "moe.hf",
    "restore": "moe.hf",
    "record": "moe.record",
    "replay": "moe.replay",
    "Fold": "dispatch.fold",
    "lora": "moe.lora.lora",
    "load_lora": "moe.lora.lora",
    "tune_only": "moe.lora.tune",
    "load_tuned": "moe.lora.tune",
    "parallelize": "moe.ranks.parallel",
    "parallelize_attention": "moe.hf.attention",
    "no_sync": "moe.ranks.parallel",
    "clip_grad_norm_": "moe.ranks.parallel",
    "set_degree": "moe.ranks.parallel",
    "Overlap": "dispatch.schedule",
    "ShortcutBlock": "moe.shortcut",
    "place_experts": "moe.ranks.placed",
    "migrate": "moe.ranks.placed",
    "offload": "moe.offload.offload",
    "load": "moe.offload.load",
    "pack": "moe.offload.pack",
    "convert": "moe.convert.convert",
    "Paths": "moe.paths.paths",
    "OuterSync": "moe.paths.outer",
    "CoarseRouter": "moe.paths.coarse",
    "ModelPool": "moe.offload.models",
    "save_checkpoint": "moe.ranks.checkpoint",
    "load_checkpoint": "moe.ranks.checkpoint",
    "Routing": "kernels.routing",
    "grouped_ffn": "kernels.grouped_ffn",
    "Trace": "placement.traces.trace",
    "Topology": "placement.cluster.topology",
    "Workload": "placement.cluster.topology",
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
