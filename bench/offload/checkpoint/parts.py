"""The parts of the table: which jobs are run, and what their figures are held to."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ....kernels.quantized import FORMATS
from . import gguf_file, make
from .files import disk_GBps, drop, warm
from .processes import Done, Run

BUDGET = "25%"
FEW = 1  # layers of the model for few bits: 340 MB of experts, and minutes to quantise
BESIDE = {"Q4_K": "Q4_K", "int4": "Q4_0"}  # our format, and llama.cpp's of as many bits


@dataclass(frozen=True)
class Line:
    """A line of the table; `value` in `unit`, to be at most (`least`: at least) `reach`, better `stretch`. Without a
    value: `note` says why."""

    what: str
    value: float | None = None
    unit: str = ""
    reach: float | None = None
    stretch: float | None = None
    note: str = ""
    least: bool = False
    digits: int = 2

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "skipped"
        for name, limit in (("stretch", self.stretch), ("reached", self.reach)):
            if limit is not None and (self.value >= limit if self.least else self.value <= limit):
                return name
        return "" if self.reach is None else "missed"


@dataclass
class Case:
    """The checkpoint, where it and what is made of it lie, and how jobs and lines of `headgate` are run. `figures`: all
    that was measured, for JSON."""

    folder: Path
    sizes: make.Sizes
    run: Run
    command: Callable[[list[str]], Done]
    tokens: Mapping[str, int] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def model(self) -> Path:
        return make.make(self.folder / "bf16", self.sizes)

    @cached_property
    def few(self) -> Path:
        """The first layers, for few bits."""
        return make.make(self.folder / "few", self.few_sizes)

    @property
    def few_sizes(self) -> make.Sizes:
        return replace(self.sizes, layers=min(FEW, self.sizes.layers))

    @property
    def budget_bytes(self) -> int:
        return self.sizes.expert_bytes // 4

    @property
    def routes(self) -> Path:
        return self.folder / "routes.npy"

    @cached_property
    def resident(self) -> Mapping[str, Any]:
        return self.decode("resident", budget=None)

    @cached_property
    def cached(self) -> Mapping[str, Any]:
        """A quarter in memory, the files in the page cache."""
        self.note("warm_share", warm(make.shards(self.model)))
        return self.decode("25 %, page cache", budget=BUDGET)

    @cached_property
    def direct(self) -> Mapping[str, Any]:
        """A quarter in memory, the page cache kept out; writes `routes`."""
        drop(make.shards(self.model))
        return self.decode("25 %, disk", budget=BUDGET, page_cache=False, routes=str(self.routes))

    def decode(self, name: str, folder: Path | None = None, **options: Any) -> Mapping[str, Any]:
        options = {"folder": str(folder or self.model), "vocab": self.sizes.vocab, **self.tokens, **options}
        return self.note(name, self.run("decode", options).said)

    def note(self, name: str, found: Any) -> Any:
        self.figures[name] = found
        return found


def remove(folder: Path) -> None:
    """Removes all that was made in a case's folder, and the folder where nothing else is in it."""
    for name in ("bf16", "few"):
        make.remove(folder / name)
    for pattern in ("*.gguf", "*.part", "*.experts", "routes.npy"):
        for path in folder.glob(pattern):
            path.unlink()
    shutil.rmtree(folder / "accelerate", ignore_errors=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def start(case: Case) -> Iterator[Line]:
    share = warm(make.shards(case.model))
    done = _first(case, "first, warm")
    need = case.sizes.rest_bytes + case.budget_bytes
    over, anonymous = done.peak_bytes - need, done.anonymous_bytes
    yield Line(
        "start to first token at 25 %: peak memory above rest + budget", over / 1e9, "GB", 0.5, 0.2,
        f"peak {_GB(done.peak_bytes)} = {_GB(need)} + {_GB(over)}; anonymous {_GB(anonymous)}; imports alone take "
        f"{_GB(done.said['imports_bytes'])}",
    )  # fmt: skip
    written = round(done.said["written_bytes"] / 1e6)  # what Python compiles on the way is less than that
    yield Line("extra disk in bf16", written / 1e3, "GB", 0.0, note="written by the process, to the MB")
    yield _first_line("start to first token, page cache warm", done, 12.0, 6.0, f"{share:.0%} of the files cached")


def cold(case: Case) -> Iterator[Line]:
    shards = make.shards(case.model)
    rate = case.note("disk_GBps", disk_GBps(max(shards, key=lambda each: each.stat().st_size)))
    left = drop(shards)
    done = _first(case, "first, cold")
    disk_s = done.said["read_bytes"] / rate / 1e9
    yield _first_line(
        "start to first token, page cache cold", done, None, None,
        f"read {_GB(done.said['read_bytes'])}, {disk_s:.1f} s at the disk's {rate:.2f} GB/s; {left:.0%} cached before",
    )  # fmt: skip
    share = disk_s / max(done.said["first_s"] - done.said["imports_s"], 1e-9)
    yield Line("the same: share of the disk's rate that reading reaches", share, "", 0.8, 0.95, least=True)


def _first(case: Case, name: str) -> Done:
    options = {"folder": str(case.model), "budget": BUDGET, "vocab": case.sizes.vocab}
    done = case.run("first", options | {key: n for key, n in case.tokens.items() if key == "prompt"})
    case.note(name, {**done.said, "peak_bytes": done.peak_bytes})
    return done


def _first_line(what: str, done: Done, reach: float | None, stretch: float | None, note: str) -> Line:
    said = done.said
    parts = f"imports {said['imports_s']:.1f}, load {said['load_s']:.1f}, waiting {said['wait_s']:.1f} s"
    return Line(what, said["first_s"], "s", reach, stretch, f"{parts}; {said['cpu_s']:.1f} CPU s; {note}", digits=1)


def _GB(n: float) -> str:
    return f"{n / 1e9:.2f} GB"


def pack(case: Case) -> Iterator[Line]:
    output = case.folder / "int4.experts"
    output.unlink(missing_ok=True)
    done = case.command(["pack", str(case.model), str(output), "--formats", "int4"])
    case.note("pack", _cost(done))
    took = f"{_GB(output.stat().st_size)} written in {done.wall_s:.0f} s, {done.cpu_s:.0f} CPU s"
    note = f"{took}; anonymous {_GB(done.anonymous_bytes)}"
    yield Line("pack to int4: peak memory", done.peak_bytes / 1e9, "GB", 2.0, 1.0, note)
    output.unlink()


def doctor(case: Case) -> Iterator[Line]:
    done = case.command(["doctor", str(case.model)])
    case.note("doctor", _cost(done))
    note = f"anonymous {_GB(done.anonymous_bytes)}"
    yield Line("doctor MODEL: peak memory", done.peak_bytes / 1e9, "GB", 0.5, note=note)
    yield Line("doctor MODEL: time", done.wall_s, "s", 10.0, 3.0, f"{done.cpu_s:.1f} CPU s", digits=1)


def _cost(done: Done) -> dict[str, Any]:
    names = ("peak_bytes", "anonymous_bytes", "wall_s", "cpu_s")
    return {name: getattr(done, name) for name in names}


def decode(case: Case) -> Iterator[Line]:
    resident = case.resident
    for what, found in (("page cache", case.cached), ("disk, page cache kept out", case.direct)):
        same = "tokens the same" if found["answers"] == resident["answers"] else "TOKENS DIFFER"
        yield Line(
            f"decoding at 25 % over the resident model, CPU s a token: {what}", found["cpu_s"] / resident["cpu_s"], "x",
            1.15, 1.05,
            f"{_pair(found, resident, 'cpu_s')} CPU s, {_pair(found, resident, 'wall_s')} s; hit rate "
            f"{found['hit_rate']:.2f}, {found['read_bytes'] / 1e6:.0f} MB from the disk; {same}",
        )  # fmt: skip


def llama(case: Case) -> Iterator[Line]:
    what = "tokens/s at 25 % over llama.cpp's mmap held to the same memory"
    if (lacking := _lacking("llama_cpp", "gguf")) is not None:
        yield Line(what, note=lacking)
        return
    path = gguf_of(case, case.model, case.sizes, "bf16")
    ours = case.direct
    drop([path])
    theirs = case.run(
        "llama",
        {
            "path": str(path), "vocab": case.sizes.vocab, "experts": case.sizes.experts, "rest": case.sizes.rest_bytes,
            "memory": ours["peak_bytes"], "routes": str(case.routes), **case.tokens,
        },
    ).said  # fmt: skip
    yield _beside(case, what, ours, theirs, "llama.cpp", 3.0)


def accelerate(case: Case) -> Iterator[Line]:
    what = "tokens/s at 25 % over accelerate's disk offload, its page cache emptied between tokens"
    if (lacking := _lacking("accelerate")) is not None:
        yield Line(what, note=lacking)
        return
    ours, to = case.direct, case.folder / "accelerate"
    to.mkdir(exist_ok=True)
    options = {"folder": str(case.model), "offload": str(to), "vocab": case.sizes.vocab, "layers": case.sizes.layers}
    theirs = case.run("accelerate", options | {k: n for k, n in case.tokens.items() if k == "prompt"}).said
    shutil.rmtree(to)
    yield _beside(case, what, ours, theirs, "accelerate", 10.0)


def _beside(case: Case, what: str, ours: Mapping, theirs: Mapping, name: str, reach: float) -> Line:
    case.note(name, theirs)
    count = min(len(ours["answers"]), len(theirs["answers"]))
    same = sum(a == b for a, b in zip(ours["answers"], theirs["answers"], strict=False)) / count
    return Line(
        what, theirs["wall_s"] / ours["wall_s"], "x", reach,
        note=f"{_pair(ours, theirs, 'wall_s')} s a token, {_pair(ours, theirs, 'cpu_s')} CPU s, "
        f"{_pair(ours, theirs, 'read_bytes', 1e6, 0)} MB from the disk, "
        f"{_pair(ours, theirs, 'anonymous_bytes', 1e9, 1)} GB anonymous; {same:.0%} of the answers the same",
        least=True,
    )  # fmt: skip


def _pair(ours: Mapping[str, Any], theirs: Mapping[str, Any], name: str, unit: float = 1.0, digits: int = 3) -> str:
    return f"{ours[name] / unit:.{digits}f} / {theirs[name] / unit:.{digits}f}"


def bits(case: Case) -> Iterator[Line]:
    """Experts in few bits, all in memory: their part of a token's time, which is what half of them take, doubled."""
    for ours, theirs in BESIDE.items():
        what = f"{ours} experts in memory, CPU s a token of their part over llama.cpp's {theirs}"
        if ours not in FORMATS:
            yield Line(what, note=f"headgate has no {ours} here")
        elif (lacking := _lacking("llama_cpp", "gguf")) is not None:
            yield Line(what, note=lacking)
        else:
            mine, rival = _mine(case, ours), _rival(case, theirs)
            yield Line(
                what,
                mine / rival,
                "x",
                1.3,
                1.0,
                f"{1e3 * mine:.1f} / {1e3 * rival:.1f} ms, {case.few_sizes.layers} layers",
            )


def _mine(case: Case, format: str) -> float:
    output = case.folder / f"few-{format}.experts"
    if not output.exists():
        case.command(["pack", str(case.few), str(output), "--formats", format])
    warm([output])
    options = {"budget": "100%", "disk": str(output), "formats": format, **_many(case)}
    return _part(case, lambda k: case.decode(f"{format}, {k} experts", case.few, top_k=k, **options)["cpu_s"])


def _rival(case: Case, format: str) -> float:
    path = gguf_of(case, case.few, case.few_sizes, format)
    warm([path])
    options = {"path": str(path), "vocab": case.sizes.vocab, "experts": case.sizes.experts, **_many(case)}

    def run(top_k: int) -> float:
        said = case.run("llama", {**options, "top_k": top_k}).said
        return case.note(f"llama.cpp, {format}, {top_k} experts", said)["cpu_s"]

    return _part(case, run)


def _many(case: Case) -> Mapping[str, int]:
    """One layer takes milliseconds: more tokens than elsewhere."""
    return case.tokens or {"tokens": 200}


def _part(case: Case, cpu_s: Callable[[int], float]) -> float:
    k = case.sizes.top_k
    return (cpu_s(k) - cpu_s(k // 2)) * k / (k - k // 2)


def gguf_of(case: Case, model: Path, sizes: make.Sizes, format: str) -> Path:
    """The model as a GGUF file, written now unless it is there."""
    path = case.folder / f"{model.name}-{format}.gguf"
    if path.exists():
        return path
    if format == "bf16":
        from ....moe.offload.checkpoint import Checkpoint

        checkpoint = Checkpoint(model)
        try:
            gguf_file.write(sizes, checkpoint.read, path)
        finally:
            checkpoint.close()
        return path
    wide, new = gguf_of(case, model, sizes, "bf16"), path.with_suffix(".part")
    try:
        case.run("requantize", {"path": str(wide), "output": str(new), "format": format})
        new.rename(path)
    finally:
        new.unlink(missing_ok=True)
    return path


def _lacking(*packages: str) -> str | None:
    called = {"llama_cpp": "llama-cpp-python"}
    missing = [called.get(each, each) for each in packages if importlib.util.find_spec(each) is None]
    return f"not installed: {', '.join(missing)}" if missing else None


PARTS: Mapping[str, Callable[[Case], Iterator[Line]]] = {
    "start": start,
    "cold": cold,
    "pack": pack,
    "doctor": doctor,
    "decode": decode,
    "llama": llama,
    "accelerate": accelerate,
    "bits": bits,
}
