"""headgate.load: a model whose experts stay in the files of its checkpoint, and are never in memory all at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...placement.caching.predict import Predictor
from ...placement.traces.trace import Trace
from .checksums import Verify, check_digests, check_verify
from .file import FileStore
from .host import Store
from .kinds import Layer
from .lower import FILE, Formats, Groups, groups_of
from .offload import Offload, Plan
from .seen import Seen, seen, source_of, written

Tell = Callable[[str, int, int], object]


def load(
    path: str | os.PathLike[str],
    budget: str | int | float = "8GiB",
    policy: str = "adaptive",
    prefetch: str | Predictor | None = "gate",
    disk: str | os.PathLike[str] | None = None,
    *,
    config: Any = None,
    formats: Formats | None = None,
    device: torch.device | str = "cpu",
    scope: str = "layer",
    trace: Trace | None = None,
    readers: int | None = None,
    page_cache: bool = True,
    verify: Verify = "first",
    context: int | None = None,
    log: bool = False,
    tell: Tell = lambda what, done, total: None,
) -> tuple[nn.Module, Offload]:
    """A transformers MoE model from a folder, with its experts left in the folder's own safetensors files: they are
    never in memory all at once, and without `disk` nothing is written. Outputs are those of `from_pretrained` and
    `offload`.

    path      a folder with config.json and either model.safetensors.index.json with its files or model.safetensors, as
              save_pretrained and hub downloads have it; or a GGUF file, the first of a split one, or a folder with one.
              The files must stay as they are while the model is used
    config    of a GGUF file: a folder with config.json, or a transformers config; None: what the file's metadata say
    budget    what the slots for experts may take on the device, see `offload`, or "auto". Beside it stand the rest of
              the model (attention, embeddings, norms, routers, shared experts) and the KV cache of a generation, for
              `context` tokens of which "auto" leaves room
    formats   experts in few bits, see `offload`; `disk` must be given
    disk      a folder for experts.safetensors, written expert by expert where it is not there yet; or a file that
              `headgate.pack` wrote. A file that is there is used if it was made of this very checkpoint with these
              formats, and refused if not
    device    where to compute
    verify    of an experts file (`disk`), an expert's checksum is compared when it is read for the "first" time, at
              each read (True) or never (False). The folder's own files have no checksums: no expert is read from one
              whose size or time of change is another than at first (unless False). True: files whose SHA-256 Hugging
              Face's client noted are read whole before anything else and compared, and each expert, at each read, with
              what it was at its first
    policy, prefetch, scope, trace, readers, page_cache, context, log   as in `offload`
    tell      called, from any thread, as the work goes on: with "experts", written to `disk`, or "tensors", read into
              memory; how many are done; and of how many

    Everything but the experts is read into memory, ties and buffers as from_pretrained makes them; which tensors of the
    files make which parameter is asked of transformers. Experts in few bits stay so, in slots and in products: those of
    compressed-tensors, GPTQ, AWQ, FP8 and MXFP4, and the blocks of a GGUF file where products take them (Q8_0, Q4_0,
    Q4_K, Q5_K, Q6_K, MXFP4, and Q5_0 and IQ4_NL, which become Q8_0 exactly). Others are widened to the model's dtype
    whenever one is read, and what else is in few bits once, when it is loaded; it says so. The model is in evaluation
    mode and runs through Headgate.
    Without `disk` its experts' parameters are on the meta device: they have names and shapes, and no numbers.
    `Offload.close()` leaves them there, and the model can compute no more; `close(restore=True)` brings them into
    memory.

    Returns the model and its Offload.

    Raises OSError where a file is missing or cannot be read; ValueError where one is not what it should be, a tensor is
    missing or of another shape or dtype than the model's, the checkpoint is quantized in a way that is not taken, or
    transformers makes experts by more than stacking, concatenating and turning; else as `offload`. All this is found
    out before a weight is read.

    >>> model, offloaded = headgate.load("/models/Qwen3-30B-A3B", budget="4GiB")
    >>> model.generate(**inputs)
    """
    where = torch.device(device)
    if formats not in (None, {}) and disk is None:
        raise ValueError(f"load: disk must be a folder for experts in few bits, got None with formats={formats!r}")
    check_verify(verify, "load")
    with seen(path, config) as what:
        model = what.model
        groups = groups_of(what.found, {} if formats is None else formats)
        layers = what.layers_in(groups)
        plan = Plan.of(
            model, what.found, what.skipped, layers, where, budget=budget, policy=policy, prefetch=prefetch,
            scope=scope, trace=trace, readers=readers, log=log, from_disk=True, context=context,
        )  # fmt: skip
        if verify is True:
            check_digests(what.files.files, "load")
        packed = None if disk is None else _packed(what, layers, groups, Path(disk), page_cache, verify, tell)
        try:
            what.fill(lambda *of: tell("tensors", *of))
            for (handle, name), stamp in zip(what.files.files, what.files.stamps, strict=True):
                if verify:
                    stamp.compare(handle, name)
        except BaseException:
            if packed is not None:
                packed.close()
            raise
        store: Store = packed or what.store(what.files.take(), page_cache, verify)
    return model, plan.start(store)


def _packed(
    what: Seen,
    layers: Sequence[Layer],
    groups: Groups,
    disk: Path,
    page_cache: bool,
    verify: Verify,
    tell: Tell,
) -> FileStore:
    """The experts file in a folder, or the file itself; written now if it is not there. Raises OSError where the disk
    has no room, ValueError where the file is another checkpoint's."""
    path = disk if disk.exists() and not disk.is_dir() else disk / FILE
    if path.exists():
        return FileStore(path, layers, source=source_of(what, groups), page_cache=page_cache, verify=verify)
    path.parent.mkdir(parents=True, exist_ok=True)
    return written(
        what, layers, groups, path, page_cache=page_cache, who="load: disk", verify=verify,
        tell=lambda *of: tell("experts", *of),
    )  # fmt: skip
