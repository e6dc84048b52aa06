"""budget="auto": what a device has free for experts, beside the rest of the model and the KV cache asked for."""

from __future__ import annotations

import re
import resource
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.routing import Routing
from ..elsewhere import elsewhere_of, send_elsewhere
from .arena import numbered
from .forms import Found
from .kinds import Layer

CONTEXT = 4096  # tokens, where nobody says how many
_SHARE, _LEAST = 20, 256 << 20  # the margin: one part in so many of what is free, and at least so many bytes
_ADDRESSES = 768 << 20  # that threads take beside the memory that they use: stacks, and arenas of malloc
_UNLIMITED = 1 << 60  # cgroup v1 says so of no limit
_MEMINFO = re.compile(r"^(\w+):\s+(\d+) kB$", re.MULTILINE)


@dataclass(frozen=True)
class Split:
    """How what is free is shared out, in bytes. `limit` names what bounds it: "MemAvailable", "cgroup memory",
    "RLIMIT_AS" and so on. `rest`: of the model, as far as it is not there yet. `cache`: keys and values of `context`
    tokens. `step`: rows of the experts' outputs when these tokens are computed at once. `margin`: left alone.
    `experts`: all of them. `budget`: what remains for slots, at most all experts."""

    free: int
    limit: str
    rest: int
    cache: int
    context: int
    step: int
    margin: int
    experts: int

    @property
    def budget(self) -> int:
        return min(self.experts, self.free - self.rest - self.cache - self.step - self.margin)

    def __str__(self) -> str:
        parts = (
            f"{_MB(self.rest)} for the rest of the model, {_MB(self.cache)} for keys and values of {self.context:,} "
            f"tokens, {_MB(self.step)} to compute these at once, {_MB(self.margin)} left alone"
        )
        share = f", {self.budget / self.experts:.0%} of all" if self.budget > 0 else ""
        return f"{_MB(self.budget)} for experts{share}: {_MB(self.free)} free ({self.limit}), less {parts}"


def asked_split(
    budget: object, context: object, model: nn.Module, found: Found, layers: Sequence[Layer], device: torch.device
) -> Split | None:
    """The Split of budget="auto", None for any other. Raises ValueError where `context` is none for this budget."""
    if not (isinstance(budget, str) and budget.strip().lower() == "auto"):
        if context is not None:
            raise ValueError(f'offload: context must be None but for budget="auto", got {context!r}')
        return None
    if context is not None and (isinstance(context, bool) or not isinstance(context, int) or context < 0):
        raise ValueError(f"offload: context must be tokens of at least 0, got {context!r}")
    return split_of(model, found, layers, device, context)


def split_of(
    model: nn.Module, found: Found, layers: Sequence[Layer], device: torch.device, context: int | None
) -> Split:
    """For a transformers model on its way to `device`, with the experts modules `found`, which `layers` says how they
    are kept. Raises ValueError where too little is free for any expert, or where that of a device is not known."""
    tokens, device = CONTEXT if context is None else context, numbered(device)
    moved = {p for _, module, form in found for p in form.weights(module).values()}
    others = {t for t in (*model.parameters(), *model.buffers()) if t not in moved and t.device != device}
    free, limit = free_bytes(device, sum(p.nbytes for p in moved if p.device.type == "cpu"))
    widths = [layer.outputs(form.layout["transposed"]) for layer, (_, _, form) in zip(layers, found, strict=True)]
    margin = max(_ADDRESSES if limit == "RLIMIT_AS" else _LEAST, free // _SHARE)
    split = Split(
        free=free, limit=limit, rest=sum(t.nbytes for t in others), cache=cache_bytes(model, found, tokens),
        context=tokens, step=tokens * 4 * max(widths) * (_choices(model) + 2), margin=margin,
        experts=sum(layer.nbytes for layer in layers),
    )  # fmt: skip
    if split.budget < 1:
        raise ValueError(
            f'offload: budget must be bytes or a share where "auto" leaves none, got {split} (context= may be smaller)'
        )
    return split


def _choices(model: nn.Module) -> int:
    """Experts of a token, as a model's configuration calls them; 8 where it does not."""
    config = _text_config(model)
    for name in ("num_experts_per_tok", "moe_topk", "num_experts_per_token", "top_k_experts", "moe_k"):
        found = getattr(config, name, None)
        if isinstance(found, int):
            return found
    return 8


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


# --- the KV cache ----------------------------------------------------------------------------------------------------


def cache_bytes(model: nn.Module, found: Found, tokens: int) -> int:
    """Bytes of what a transformers model keeps of one text of so many tokens, counted by a forward pass on the meta
    device, in which no number is computed. 0 for a model that keeps nothing."""
    if tokens == 0 or not hasattr(model, "config"):
        return 0
    from transformers import DynamicCache

    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    try:
        cache = DynamicCache(config=_text_config(model))
        with torch.no_grad(), _on_meta(model), _experts_aside(found):
            model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    except Exception as error:  # a model with inputs of its own, or one whose masks ask for numbers
        said = next(iter(str(error).splitlines()), type(error).__name__)[:120]
        raise ValueError(
            f"offload: budget must be bytes or a share for a {type(model).__name__}, or context=0: what its KV cache "
            f"takes cannot be counted ({said})"
        ) from error
    return sum(t.nbytes for t in _tensors(cache) if t.is_floating_point())  # others are lengths and the like


def _tensors(of: object, seen: set[int] | None = None) -> Iterator[Tensor]:
    """The tensors that an object of transformers' caches holds."""
    seen = set() if seen is None else seen
    if id(of) in seen:
        return
    seen.add(id(of))
    if isinstance(of, Tensor):
        yield of
    elif isinstance(of, Mapping):
        for one in of.values():
            yield from _tensors(one, seen)
    elif isinstance(of, list | tuple):
        for one in of:
            yield from _tensors(one, seen)
    elif type(of).__module__ == "transformers.cache_utils":
        yield from _tensors(vars(of), seen)


@contextmanager
def _on_meta(model: nn.Module) -> Iterator[None]:
    """The model's parameters and buffers on the meta device for a while; the objects stay the same."""
    kept = [(table, name, t) for m in model.modules() for table in _tables(m) for name, t in table.items()]
    empty = {t: t if t.is_meta else torch.empty_like(t, device="meta") for _, _, t in kept if t is not None}
    try:
        for table, name, t in kept:
            if t is not None:
                table[name] = nn.Parameter(empty[t], t.requires_grad) if isinstance(t, nn.Parameter) else empty[t]
        yield
    finally:
        for table, name, t in kept:
            table[name] = t


def _tables(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    return module._parameters, module._buffers


@contextmanager
def _experts_aside(found: Found) -> Iterator[None]:
    """Experts modules answer with rows of their shape for a while."""

    def nothing(rows: Tensor, _: Routing) -> Tensor:
        return torch.empty_like(rows)

    before = [(module, elsewhere_of(module)) for _, module, _ in found]
    try:
        for module, _ in before:
            send_elsewhere(module, nothing)
        yield
    finally:
        for module, there in before:
            send_elsewhere(module, there)


# --- what is free ----------------------------------------------------------------------------------------------------


def free_bytes(device: torch.device, leaving: int = 0) -> tuple[int, str]:
    """What this process can still take on a device, and what bounds it. Of host memory so many bytes are `leaving`, as
    experts that go to the disk; addresses for slots are taken before that. Raises ValueError for a device that does not
    say."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        own = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch's, that nobody holds
        return free + own, f"free on {device}"
    if device.type != "cpu":
        raise ValueError(f'offload: budget must be bytes or a share on {device}, got "auto", which is for CPU and CUDA')
    bounds = {name: n + leaving * (name in ("MemAvailable", "cgroup memory")) for name, n in host_bounds().items()}
    if not bounds:
        raise ValueError(
            'offload: budget must be bytes or a share where the system does not say what is free, got "auto"'
        )
    limit = min(bounds, key=bounds.__getitem__)
    return max(0, bounds[limit]), limit


def host_bounds(root: Path = Path("/")) -> dict[str, int]:
    """What each limit leaves this process, in bytes of memory or of addresses. Limits that are not set are not there.
    `root`: of the file system that says it."""
    bounds = {}
    meminfo = {name: int(kB) << 10 for name, kB in _MEMINFO.findall(_read(root / "proc/meminfo"))}
    if "MemAvailable" in meminfo:
        bounds["MemAvailable"] = meminfo["MemAvailable"]
    if _read(root / "proc/sys/vm/overcommit_memory").strip() == "2":
        bounds["CommitLimit"] = meminfo["CommitLimit"] - meminfo["Committed_AS"]
    own = {name: int(kB) << 10 for name, kB in _MEMINFO.findall(_read(root / "proc/self/status").replace("\t", " "))}
    for name, kind, taken in (
        ("RLIMIT_AS", resource.RLIMIT_AS, "VmSize"),
        ("RLIMIT_DATA", resource.RLIMIT_DATA, "VmData"),
    ):
        soft, _ = resource.getrlimit(kind)
        if soft != resource.RLIM_INFINITY and taken in own:
            bounds[name] = soft - own[taken]
    left = [n for n in (_left(folder, *names) for folder, names in _cgroups(root)) if n is not None]
    if left:
        bounds["cgroup memory"] = min(left)
    return bounds


_Names = tuple[tuple[str, ...], str, tuple[str, str]]  # of a control group's files: limits, what is used, page cache
_V2: _Names = (("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file"))
_V1: _Names = (("memory.limit_in_bytes",), "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))


def _cgroups(root: Path) -> Iterator[tuple[Path, _Names]]:
    """The folders of this process's control groups and of those above them; in a container the first is the mount."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, controllers, path = [*line.split(":", 2), "", ""][:3]
        if number == "0" and not controllers:
            top, names = root / "sys/fs/cgroup", _V2
        elif "memory" in controllers.split(","):
            top, names = root / "sys/fs/cgroup/memory", _V1
        else:
            continue
        here = [part for part in path.split("/") if part not in ("", "..")]
        for n in range(len(here), -1, -1):
            yield top.joinpath(*here[:n]), names


def _left(folder: Path, limits: Sequence[str], usage: str, cached: Sequence[str]) -> int | None:
    """What a control group still allows; the page cache goes when memory is asked for. None: no limit."""
    said = [_read(folder / name).strip() for name in limits]
    limit = min((int(text) for text in said if text.isdigit() and int(text) < _UNLIMITED), default=None)
    used = _read(folder / usage).strip()
    if limit is None or not used.isdigit():
        return None
    stat = dict(line.split()[:2] for line in _read(folder / "memory.stat").splitlines() if len(line.split()) == 2)
    return limit - int(used) + sum(int(stat.get(name, 0)) for name in cached)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _MB(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.0f} MB"
