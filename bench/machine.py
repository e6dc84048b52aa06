"""What this machine is: processor, memory, versions. Plain facts, read without loading anything heavy."""

from __future__ import annotations

import importlib.util
import os
import platform
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as _version
from pathlib import Path


def processor() -> str:
    """For instance "AMD EPYC, 2 cores, 24 GB"."""
    return f"{_cpu_name()}, {cores()} cores, {memory_bytes() / 1e9:.0f} GB"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> int:
    """Installed memory, 0 where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0


def must_fit(what: str, least_bytes: float) -> None:
    """Raises ValueError where something needs more memory than the machine has."""
    there = memory_bytes()
    if there and least_bytes > there:
        raise ValueError(
            f"{what} must fit into memory, {there / 1e9:.0f} GB, got what needs {least_bytes / 1e9:,.0f} GB at least"
        )


def version(distribution: str) -> str | None:
    """The installed version, or None."""
    try:
        return _version(distribution)
    except PackageNotFoundError:
        return None


def need(who: str, package: str, extra: str) -> None:
    """Raises RuntimeError, in the name of `who`, where a package is not installed that `extra` brings."""
    if importlib.util.find_spec(package) is None:
        raise RuntimeError(f"{who}: needs {package}, which is not installed: pip install 'headgate[{extra}]'")
