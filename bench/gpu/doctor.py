"""What `headgate doctor` says of GPUs: each device, the form of every operation there and why; what is missing and how
to get it; what can be done without one."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
from typing import Any

from .. import machine

OLDEST_TRITON = (3, 6)
EXTRA = "pip install 'headgate[gpu]'"
# operation -> what runs where its Triton kernels cannot
INSTEAD = {
    "grouped_ffn": "a loop of matmuls over experts, which waits for the device",
    "grouped_linear": "a loop of matmuls over experts, which waits for the device",
    "topk": "several operations of torch",
    "plan": "a stable sort in torch",
    "router_logits": "a product of widened copies",
}
_CUPY = ("cupy-cuda13x", "cupy-cuda12x", "cupy")
_WITHOUT = (
    "headgate bench compile builds every kernel for sm_80, sm_90 and more",
    "headgate bench roofline gives the floor of every launch",
    "the tests run the kernels in Triton's interpreter",
)


def examine() -> dict[str, Any]:
    """`devices`: name, capability, memory and forms of each; `torch`: what its build is for; `triton`, `cupy`: version
    or None; `triton_trouble`, `interpreter`: what is wrong, or None; `dispatchers`: what each lacks, or None."""
    import torch

    built = torch.version.cuda or torch.version.hip
    version, trouble = triton()
    return {
        "devices": [_device(i) for i in range(torch.cuda.device_count())],
        "torch": f"built for {'ROCm' if torch.version.hip else 'CUDA'} {built}" if built else "built without CUDA",
        "triton": version,
        "triton_trouble": trouble,
        "cupy": next((f"{name} {v}" for name in _CUPY if (v := machine.version(name))), None),
        "interpreter": interpreted(os.environ.get("TRITON_INTERPRET")),
        "dispatchers": dispatchers(),
    }


def dispatchers() -> dict[str, str | None]:
    """Dispatchers that need more than collectives -> why they cannot move CUDA tensors here, or None."""
    from ...dispatch import ENGINES
    from ...dispatch.window import why_not

    return {"Symmetric": why_not("cuda"), **{engine.__name__: engine.why_not() for engine in ENGINES.values()}}


def triton() -> tuple[str | None, str | None]:
    """(version or None, what is wrong with it or None)."""
    import torch

    if importlib.util.find_spec("triton") is None:
        return None, f"not installed: {EXTRA}"
    version = None if torch.cuda.device_count() else machine.version("triton")
    if version is not None:  # nothing runs it here: it is not imported, which takes 70 MB
        return version, too_old(version)
    try:
        version = importlib.import_module("triton").__version__
    except Exception as error:  # a broken installation: what it says is the finding
        return None, f"installed, but import fails: {type(error).__name__}: {' '.join(str(error).split())}"
    return version, too_old(version)


def too_old(version: str) -> str | None:
    """Why this Triton will not do, or None."""
    found = re.match(r"(\d+)\.(\d+)", version)
    if found and (int(found[1]), int(found[2])) < OLDEST_TRITON:
        return f"older than {'.'.join(map(str, OLDEST_TRITON))}, the oldest that the kernels are built with: {EXTRA}"
    return None


def interpreted(setting: str | None) -> str | None:
    """What a value of TRITON_INTERPRET does, or None where it does nothing."""
    if (setting or "").lower() not in ("1", "true", "on", "yes", "y"):  # as Triton reads it
        return None
    return f"TRITON_INTERPRET={setting} is set: kernels crawl in Triton's interpreter, on a GPU too; unset it"


def _device(index: int) -> dict[str, Any]:
    import torch

    from ...kernels.chip import chip_of, why_not

    memory = torch.cuda.get_device_properties(index).total_memory
    return describe(chip_of(index), memory, why_not(index))


def describe(chip: Any, memory_bytes: int, why: str | None) -> dict[str, Any]:
    """One device as data; `why` no Triton kernel can run there, or None."""
    forms = {op: "Triton" if why is None else instead for op, instead in INSTEAD.items()}
    return {
        "name": chip.name,
        "capability": f"{chip.capability // 10}.{chip.capability % 10}",
        "memory_bytes": memory_bytes,
        "processors": chip.processors,
        "shared_bytes": chip.shared_bytes,
        "forms": forms,
        "why_not_triton": why,
    }


def rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """(label, text) of what `examine` found."""
    out = []
    for i, device in enumerate(found["devices"]):
        size = f"{device['memory_bytes'] / 2**30:.0f} GiB, {device['processors']} multiprocessors"
        out.append((f"cuda:{i}", f"{device['name']}, compute capability {device['capability']}, {size}"))
        forms: dict[str, list[str]] = {}
        for op, form in device["forms"].items():
            forms.setdefault(form, []).append(op)
        out += [("", f"{', '.join(ops)}: {form}") for form, ops in forms.items()]
        if device["why_not_triton"]:
            out.append(("", f"because {device['why_not_triton']}"))
    if not found["devices"]:
        out.append(("GPU", f"none that torch sees; torch is {found['torch']}"))
    version, trouble = found["triton"], found["triton_trouble"]
    out.append(("triton", ": ".join(filter(None, (version, trouble)))))
    out.append(("cupy", found["cupy"] or "not installed; optional, no kernel is written in CUDA C++ yet"))
    out += [(f"{name} on GPUs", why or "available") for name, why in found["dispatchers"].items()]
    if found["interpreter"]:
        out.append(("interpreter", found["interpreter"]))
    if not found["devices"] and version and not trouble:
        out += zip(("without a GPU", "", ""), _WITHOUT, strict=True)
    return out
