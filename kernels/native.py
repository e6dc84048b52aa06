"""The C++ forms of the CPU operations: compiled at first use with the machine's own compiler, cached, loaded by ctypes.

No torch header is needed, so a build takes seconds, and one build serves every torch version. The library is linked
against the OpenMP runtime that torch has loaded: two runtimes would fight over the same cores. Where no compiler is
found, or the build fails, `library()` is None, the plain torch forms serve, and `status()` says why.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

_HERE = Path(__file__).parent
_SOURCES = [  # the longest to compile first
    "grouped_ffn/quantized.cpp",
    "grouped_ffn/on_cpu.cpp",
    "expert_outputs/on_cpu.cpp",
    "plan/on_cpu.cpp",
    "threads.cpp",
]
_SYMBOLS = (
    "hg_grouped_ffn_forward",
    "hg_grouped_ffn_backward",
    "hg_grouped_ffn_quantized",
    "hg_combine_outputs",
    "hg_plan",
    "hg_team",
)
_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"]


@dataclass(frozen=True)
class Status:
    """Which CPU form runs: `form` is "native" or "plain", `why` one sentence, `path` of the built library if any."""

    form: str
    why: str
    path: str | None = None


def status() -> Status:
    """What serves CPU operations on this machine; builds the library if that has not been tried yet."""
    if os.environ.get("HEADGATE_CPU") == "plain":
        return Status("plain", "HEADGATE_CPU=plain asks for it")
    return _load()[1]


def available() -> bool:
    return _load()[0] is not None


def library() -> ctypes.CDLL | None:
    """The loaded library, or None where the plain forms serve.

    HEADGATE_CPU=plain asks for the plain forms. It is read at every call, and must not change between a forward pass
    and its backward pass: each form lays out for itself what it keeps.
    """
    return None if os.environ.get("HEADGATE_CPU") == "plain" else _load()[0]


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, Status]:
    lib, state = _build()
    if lib is None:
        warnings.warn(f"headgate: CPU operations run in plain torch, which is slower: {state.why}", stacklevel=2)
    return lib, state


def _build() -> tuple[ctypes.CDLL | None, Status]:
    # clang++ is taken only when asked for: it would bring an OpenMP runtime of its own beside torch's
    asked = os.environ.get("CXX") or "g++"
    try:
        command = shlex.split(asked)
    except ValueError as error:
        return None, Status("plain", f"CXX must be a command as a shell reads it, got {asked!r} ({error})")
    if not command or shutil.which(command[0]) is None:
        return None, Status("plain", f"no C++ compiler found (looked for {' '.join(command)}; install g++ or set CXX)")
    if sys.platform != "linux":
        return None, Status("plain", f"the C++ form is built on Linux only, this is {sys.platform}")
    if torch.backends.openmp.is_available() is False:
        return None, Status("plain", "this torch was built without OpenMP")
    flags = [*_FLAGS, "-mcpu=native" if platform.machine() == "aarch64" else "-march=native"]
    try:
        key = _key(command, flags)
        target = _cache_dir() / f"headgate-{key}.so"
        if not _is_whole(target):
            with _alone(target.with_suffix(".lock")):
                if not _is_whole(target):
                    if os.path.lexists(target):
                        words = f"headgate: the compiled form in {target} is damaged; it is built again"
                        warnings.warn(words, stacklevel=2)
                    _compile(command, flags, target)
        lib = ctypes.CDLL(str(target))
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        words = detail.decode(errors="replace") if isinstance(detail, bytes) else detail
        return None, Status("plain", f"building the C++ form with {' '.join(command)} failed: {words.strip()[:500]}")
    lacking = [name for name in _SYMBOLS if not hasattr(lib, name)]
    if lacking:
        return None, Status("plain", f"what {' '.join(command)} built lacks {', '.join(lacking)}: {target}")
    return lib, Status("native", f"C++ compiled by {' '.join(command)} for this CPU ({_isa()})", str(target))


def _key(command: list[str], flags: list[str]) -> str:
    """Names a build: sources, flags, the compiler's version and what `native` means to it on this CPU."""
    digest = hashlib.sha256()
    for path in sorted([*_HERE.glob("*.h"), *_HERE.glob("*/*.h"), *(_HERE / s for s in _SOURCES)]):
        digest.update(path.read_bytes())
    # what the compiler makes of `native` here: a cache on a shared home directory serves several kinds of machine
    seen = subprocess.run(
        [*command, *flags[:1], *flags[-1:], "-dM", "-E", "-x", "c++", "-"],
        input="", capture_output=True, text=True, errors="replace", check=True, timeout=60,
    )  # fmt: skip
    digest.update(seen.stdout.encode())
    digest.update(" ".join([*command, *flags, "with its digest"]).encode())
    return digest.hexdigest()[:16]


def _cache_dir() -> Path:
    root = os.environ.get("HEADGATE_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "headgate"
    )
    for candidate in (Path(root), Path(tempfile.gettempdir()) / f"headgate-{os.getuid()}"):
        try:
            candidate.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError:
            continue
        # code is loaded from here: a directory that others may write to is not one to trust
        found = candidate.stat()
        if os.access(candidate, os.W_OK) and found.st_uid == os.getuid() and not found.st_mode & 0o022:
            return candidate
    raise OSError(f"no directory that only this user may write to keep the build in (tried {root}); set HEADGATE_CACHE")


@contextlib.contextmanager
def _alone(lock: Path):
    """Ranks that start together on one machine: one compiles, the others wait for what it makes."""
    import fcntl  # Linux has it, as the compiled form needs

    with open(lock, "w") as held:
        with contextlib.suppress(OSError):  # a file system without locks: then several compile the same
            fcntl.flock(held, fcntl.LOCK_EX)
        try:
            yield  # closing the file, or the death of the process, lets the next one in
        finally:
            lock.unlink(missing_ok=True)  # who waits has it open, and finds the library built


def _is_whole(target: Path) -> bool:
    """Whether the library ends with the digest of what comes before. A damaged one would kill the process."""
    if not target.is_file():
        return False
    data = target.read_bytes()
    return hashlib.sha256(data[:-32]).digest() == data[-32:]


def _compile(command: list[str], flags: list[str], target: Path) -> None:
    """Builds beside the target and renames, so that processes starting together never see half a library.

    Files are compiled side by side, the longest first, and linked: on two cores that takes half the time of one after
    the other.
    """
    with tempfile.TemporaryDirectory(prefix="building-", dir=target.parent) as folder:
        objects = [str(Path(folder, f"{i}.o")) for i in range(len(_SOURCES))]

        def build(*arguments: str) -> None:
            subprocess.run(
                [*command, *flags, *arguments],
                capture_output=True, text=True, errors="replace", check=True, timeout=300,
            )  # fmt: skip

        def compiled(source: str, to: str) -> None:
            build(f"-I{_HERE}", "-c", str(_HERE / source), "-o", to)

        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            list(pool.map(compiled, _SOURCES, objects))
        name = str(Path(folder, "all.so"))
        build("-shared", *objects, "-o", name)
        with open(name, "r+b") as built:  # loaders ignore what comes after a library
            built.write(hashlib.sha256(built.read()).digest())
        os.replace(name, target)


def _isa() -> str:
    return torch.backends.cpu.get_cpu_capability()


DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def serves(dtype: torch.dtype, pairs: int, experts: int) -> ctypes.CDLL | None:
    """The library, if it is the form to multiply this dtype with; the same answer forward and backward.

    fp64 stays with plain torch. So does bf16 with many rows an expert on a CPU with AMX, whose matrix units torch's
    matmul drives and this library does not.
    """
    if dtype not in DTYPES or (dtype == torch.bfloat16 and pairs >= 32 * experts and _amx()):
        return None
    return library()


@functools.cache
def _amx() -> bool:
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())


def product_type(rows: torch.Tensor) -> torch.dtype:
    """The type in which torch multiplies `rows` best on this CPU; elsewhere their own.

    fp16 goes through fp32, of which CPUs are faster; so does bf16 where the dot product of bf16 pairs is there but not
    its matrix unit, on processors of Intel: it takes twice as long there as the products of floats.
    """
    wide = rows.dtype == torch.float16 or (rows.dtype == torch.bfloat16 and _slow_bf16())
    return torch.float32 if wide and rows.device.type == "cpu" else rows.dtype


@functools.cache
def _slow_bf16() -> bool:
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return False
    return "GenuineIntel" in text and not _amx()
