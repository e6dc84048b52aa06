"""Ground floor: one folder per operation; tensors in, tensors out.

Each operation is a torch.library op whose backend PyTorch chooses by device; its truth stands next door in
`reference.py`.
"""

if __name__ == "kernels":  # found by its bare name: somebody looks for Hugging Face's package
    from .aside import stand_aside

    stand_aside()
else:
    from .activation import GPT_OSS, Activation
    from .expert_gradients import combine_gradients, expert_gradients
    from .expert_outputs import combine_outputs, expert_outputs
    from .grouped_ffn import grouped_ffn
    from .grouped_linear import grouped_linear
    from .linear_memory import linear_memory, linear_memory_reference
    from .lora_ffn import Delta, lora_ffn
    from .newton_schulz import newton_schulz, newton_schulz_reference
    from .plan import Plan, plan
    from .quantized import Quantized, quantize
    from .router_logits import router_logits
    from .routing import Routing
    from .topk import topk

__all__ = [
    "GPT_OSS",
    "Activation",
    "Delta",
    "Plan",
    "Quantized",
    "Routing",
    "combine_gradients",
    "combine_outputs",
    "expert_gradients",
    "expert_outputs",
    "grouped_ffn",
    "grouped_linear",
    "linear_memory",
    "linear_memory_reference",
    "lora_ffn",
    "newton_schulz",
    "newton_schulz_reference",
    "plan",
    "quantize",
    "router_logits",
    "topk",
]


def __getattr__(name: str):
    """A file of this folder by its name, without an import of its own: `headgate.kernels.tiles`."""
    from importlib import import_module
    from importlib.util import find_spec

    if __name__ != "kernels" and not name.startswith("_") and find_spec(f"{__name__}.{name}"):
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
