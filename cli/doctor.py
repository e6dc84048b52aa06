"""`headgate doctor [MODEL]`: what this machine can run, and what the swap does to a model."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from ..bench import machine
from ..bench.gpu import doctor as gpu
from ..bench.light import import_models
from .loading import check_config
from .versions import known_ranges, outside

# distribution -> the extra that brings it; None: comes with headgate itself, or is the user's own choice
PACKAGES = {
    "headgate": None,
    "torch": None,
    "numpy": None,
    "transformers": "hf",
    "safetensors": "hf",
    "fastapi": "serve",
    "uvicorn": "serve",
    "openai": "serve",
    "peft": None,
    "gguf": "gguf",
    "triton": "gpu",
    "matplotlib": "plot",
}
EXTRAS = {
    "hf": "the drop-in for transformers models, headgate demo and train",
    "gguf": "models in GGUF files: headgate.load and pack",
    "serve": "headgate serve",
    "gpu": "kernels for CUDA devices",
    "plot": "pictures: headgate demo, and every --plot that draws",
}
TOKENS = 16
LARGEST_RUN_bytes = 1 << 30  # a larger model is built without weights
SHARES = (10, 25, 50, 100)  # percent of the experts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `headgate doctor`."""
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="a transformers model folder, its config.json, or a GGUF file"
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="DIR",
        help="of a GGUF file: a folder with config.json (default: what the file says)",
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(args: argparse.Namespace) -> int:
    """Prints the findings; 0, or 1 where a model was given of which an MoE block was not taken or not called, or a file
    is missing or cut."""
    model, as_json = args.model, args.json
    if args.config is not None and model is None:
        raise ValueError("doctor: --config must come with a GGUF file, got no MODEL")
    if args.alone and model is not None and importlib.util.find_spec("transformers") is not None:
        import_models(gpu=bool(_gpus()))
    found = examine()
    if model is not None:
        found["model"] = examine_model(Path(model), args.config)
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        print("\n".join([*_machine_lines(found), *(_model_lines(found["model"]) if model is not None else [])]))
    return 0 if model is None or found["model"]["complete"] else 1


def examine() -> dict[str, Any]:
    """The machine, the versions, the forms of the operations that run here. Builds the C++ form if nothing has yet."""
    from ..bench.hardware import available_bytes, describe

    versions = {name: machine.version(name) for name in PACKAGES}
    lacking = {extra for name, extra in PACKAGES.items() if extra is not None and versions[name] is None}
    return {
        "machine": describe(),
        "memory_available_bytes": available_bytes(),
        "python": sys.version.split()[0],
        "devices": ["cpu", *_gpus()],
        "gpu": gpu.examine(),
        "versions": versions,
        "known_versions": known_ranges(),
        "warnings": outside(versions),
        "compiler": _compiler(),
        "missing_extras": {extra: EXTRAS[extra] for extra in sorted(lacking)},
    }


def _gpus() -> list[str]:
    import torch

    return [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]


def _compiler() -> str | None:
    """The C++ compiler that the C++ form would be built with, and its version."""
    for name in (os.environ.get("CXX"), "g++", "clang++"):
        if name and shutil.which(name):
            try:
                said = subprocess.run([name, "--version"], capture_output=True, text=True, timeout=20, check=True)
            except (OSError, subprocess.SubprocessError) as error:
                return f"{name}, which does not run: {error}"
            return (said.stdout.splitlines() or [name])[0]
    return None


def _machine_lines(found: dict[str, Any]) -> list[str]:
    about = found["machine"]
    rows = [
        ("processor", about["cpu"]),
        ("instructions", " ".join(about["isa"]) or "unknown"),
        ("threads", str(about["threads"])),
        ("devices", ", ".join(found["devices"])),
        ("python", found["python"]),
        *((name, number or "not installed") for name, number in found["versions"].items() if name != "triton"),
        ("C++ compiler", found["compiler"] or "none found (install g++ or set CXX)"),
        ("grouped_ffn on CPU", about["headgate_form"]),
        *gpu.rows(found["gpu"]),
    ]
    lines = [f"{name:<20}{value}" for name, value in rows]
    lines += [f"{'warning':<20}{sentence}" for sentence in found["warnings"]]
    lines += [f"{'missing':<20}{use}: pip install 'headgate[{e}]'" for e, use in found["missing_extras"].items()]
    return lines


def examine_model(path: Path, given: Path | None = None) -> dict[str, Any]:
    """Builds the model of a transformers config with random weights, swaps it and runs a few tokens through it.

    `path`: a model folder, its config.json, or a GGUF file; `given`: the folder with the config of one. Nothing is
    downloaded and no weights are read. A model of more than 1 GiB, or more than fits into memory, is built without
    storage and swapped, but not run.

    Returns, among others, `replaced` (name -> what runs), `skipped` (name -> reason), `calls` (name -> number),
    `memory` (bytes of the experts, as the files have them, and of the rest), `checkpoint` (files in the folder: how
    many, their bytes, those of experts, the `trouble` that `headgate.load` has with them, whether they are `damaged`),
    `complete` (every MoE block taken, and called if the model ran, and no file missing or cut). Raises ValueError
    naming the rule where the path will not do.
    """
    from ..moe.hf import replace

    files: dict[str, Any] | None
    memory: dict[str, Any] | None
    if path.exists() and check_config(path, given, "doctor"):
        config, empty, memory, files = _gguf(path, given)
    else:
        config = _config(path)
        empty = _empty(config)
        files, memory = _checkpoint(path) if path.is_dir() else (None, None)
        memory = memory or _memory(empty)
    size = sum(p.numel() * p.element_size() for p in empty.parameters())
    room = _room()
    fits = size < room
    model = _build(config) if fits else _empty(config)
    found: dict[str, Any] = {
        "class": type(model).__name__,
        "model_type": config.model_type,
        "parameters": sum(p.numel() for p in model.parameters()),
        "ran": None,
        "replaced": {},
        "skipped": {},
        "calls": {},
        "memory": memory,
        "checkpoint": files,
        "complete": False,
    }
    try:
        report = replace(model)
    except ValueError as error:  # a dense model
        return {**found, "ran": str(error)}
    if fits:
        found["ran"] = _forward(model, config)
    else:
        found["ran"] = f"not run: it needs {_GB(size)}, and at most {_GB(room)} are taken for it"
    # Which gate runs is found by evaluating it, which weights without storage do not allow: then the class alone.
    how = report.how if fits else {name: what.split(":")[0] for name, what in report.how.items()}
    calls = report.calls
    ran = not fits or (found["ran"] is None and all(calls.values()))
    whole = found["checkpoint"] is None or not found["checkpoint"]["damaged"]
    complete = ran and whole and not report.skipped
    return {**found, "replaced": how, "skipped": report.skipped, "calls": calls, "complete": complete}


def _gguf(path: Path, given: Path | None) -> tuple[Any, Any, dict[str, Any], dict[str, Any]]:
    """Config, model without storage, memory and files of a GGUF file, from its header. Raises ValueError where
    `headgate.load` would not take it."""
    from ..moe.offload.seen import seen

    try:
        with seen(path, given) as what:
            files = what.files.files
            found: dict[str, Any] = {
                "kind": "GGUF",
                "files": len(files),
                "bytes": sum(os.fstat(f).st_size for f, _ in files),
            }
            found |= {"experts_bytes": sum(layer.nbytes for layer in what.layers), "trouble": None, "damaged": False}
            memory = _shared_out(what.model, what.found, what.layers)
            return what.model.config, what.model, memory, found
    except ValueError as error:
        said = _first_line(error)
        raise ValueError(f"doctor: MODEL must be a GGUF file that headgate.load takes, got {path} ({said})") from error


def _memory(model: Any) -> dict[str, Any] | None:
    """Bytes of the experts that `headgate.offload` moves, and of the rest; None for a model without. `auto`: what
    budget="auto" would be on this machine, in words, and `auto_bytes`, None where it leaves none. Swaps `model`."""
    from ..moe.hf import replace
    from ..moe.offload.forms import survey
    from ..moe.offload.lower import groups_of, layers_of

    try:
        replace(model)
        moved, _ = survey(model)
    except ValueError:
        return None
    return _shared_out(model, moved, layers_of(moved, groups_of(moved, {})))


def _shared_out(model: Any, moved: Any, layers: Any) -> dict[str, Any]:
    """`_memory` of a model whose experts modules are kept as `layers` say."""
    import torch

    from ..moe.offload.room import split_of

    experts = {p for _, module, form in moved for p in form.weights(module).values()}
    rest = {p for p in model.parameters() if p not in experts}
    found = {"experts_bytes": sum(layer.nbytes for layer in layers), "rest_bytes": sum(p.nbytes for p in rest)}
    try:
        split = split_of(model, moved, layers, torch.device("cpu"), None)
    except ValueError as error:
        return {**found, "auto_bytes": None, "auto": _first_line(error)}
    return {**found, "auto_bytes": split.budget, "auto": str(split)}


def _checkpoint(folder: Path) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """What is to be said of a folder's safetensors files, from index and headers, and `_memory` of the model in them;
    None where there is none."""
    from ..moe.offload.checkpoint import INDEX, Checkpoint
    from ..moe.offload.seen import seen

    files = sorted(folder.glob("*.safetensors"))
    if not files and not (folder / INDEX).exists():
        return None, None
    size = sum(file.stat().st_size for file in files)
    found: dict[str, Any] = {"kind": "safetensors", "files": len(files), "bytes": size, "experts_bytes": None}
    found |= {"trouble": None, "damaged": False}
    try:
        Checkpoint(folder).close()
    except (OSError, ValueError) as error:
        return {**found, "trouble": _first_line(error), "damaged": True}, None
    try:
        with seen(folder) as what:
            found["experts_bytes"] = sum(layer.nbytes for layer in what.layers)
            return found, _shared_out(what.model, what.found, what.layers)
    except (OSError, ValueError, ImportError) as error:
        found["trouble"] = _first_line(error)
    return found, None


def _config(path: Path) -> Any:
    if importlib.util.find_spec("transformers") is None:
        raise ValueError("doctor: a MODEL needs transformers, which is not installed: pip install 'headgate[hf]'")
    from transformers import AutoConfig

    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"doctor: MODEL must be a transformers model folder or its config.json, got {path}")
    try:
        return AutoConfig.from_pretrained(file, local_files_only=True)
    except Exception as error:  # a stranger's file in another library: whatever it says
        said = _first_line(error)
        raise ValueError(f"doctor: MODEL must be a config that transformers can read, got {file} ({said})") from error


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _build(config: Any) -> Any:
    """Raises ValueError where transformers cannot."""
    try:
        return _built(config)
    except Exception as error:
        said = _first_line(error)
        raise ValueError(f"doctor: MODEL must be a model that transformers can build, got {said}") from error


def _empty(config: Any) -> Any:
    """The model without storage."""
    import torch

    with torch.device("meta"):
        return _build(config)


def _built(config: Any) -> Any:
    import transformers

    for name in config.architectures or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)._from_config(config)
    for kind in (transformers.AutoModelForCausalLM, transformers.AutoModel):
        if type(config) in kind._model_mapping:
            return kind.from_config(config)
    raise ValueError(f"a {config.model_type}")


def _room() -> float:
    """Bytes that a model may take: half of what is available, so that its forward pass has some too, at most 1 GiB."""
    from ..bench.hardware import available_bytes

    return min((available_bytes() or machine.memory_bytes()) / 2, LARGEST_RUN_bytes)


def _forward(model: Any, config: Any) -> str | None:
    """Runs a few random tokens; what went wrong, or None."""
    import torch

    vocabulary = getattr(config.get_text_config(), "vocab_size", None)
    if vocabulary is None:
        return "not run: it takes no token ids"
    ids = torch.randint(0, vocabulary, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids}
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    try:
        with torch.no_grad():
            model.eval()(**inputs)
    except Exception as error:  # a model with inputs of its own: what it says is the finding
        return f"its forward pass on token ids failed: {type(error).__name__}: {_first_line(error)}"
    return None


def _model_lines(found: dict[str, Any]) -> list[str]:
    taken, left = len(found["replaced"]), len(found["skipped"])
    lines = ["", f"{found['class']} ({found['model_type']}), {found['parameters'] / 1e6:,.1f} M parameters"]
    if taken or left:
        verb = "can be swapped" if found["ran"] else "run through Headgate"
        lines.append(f"  {taken} of {taken + left} MoE blocks {verb}")
    kinds: dict[str, list[str]] = {}
    for name, how in found["replaced"].items():
        kinds.setdefault(how, []).append(name)
    for how, names in kinds.items():
        calls = [found["calls"][name] for name in names]
        ran = "" if found["ran"] else f"; {sum(calls)} calls in a pass of {TOKENS} tokens"
        lines.append(f"  taken    {len(names)} x {how}{ran}")
        quiet = [name for name, n in zip(names, calls, strict=True) if not n]
        if quiet and found["ran"] is None:
            lines.append(f"  never called: {', '.join(quiet)}")
    lines += [f"  skipped  {name}: {why}" for name, why in found["skipped"].items()]
    if found["ran"] is not None:
        lines.append(f"  {found['ran']}")
    return [*lines, *_memory_lines(found)]


def _memory_lines(found: dict[str, Any]) -> list[str]:
    lines, memory, files = [], found["memory"], found["checkpoint"]
    if memory is not None:
        experts, rest = memory["experts_bytes"], memory["rest_bytes"]
        lines.append(f"  experts {_GB(experts)}, the rest {_GB(rest)}")
        at = ", ".join(f"{_GB(rest + experts * share / 100)} with {share}%" for share in SHARES)
        lines.append(f"  headgate.load(folder, budget=...) takes {at}; the KV cache and about 1 GB beside that")
        lines.append(f"  budget='auto' on a CPU here: {memory['auto']}")
    if files is not None:
        trouble = files["trouble"] or "headgate.load takes them"
        lines.append(f"  {files['files']} {files['kind']} files of {_GB(files['bytes'])}: {trouble}")
    return lines


def _GB(nbytes: float) -> str:
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.1f} MB"
