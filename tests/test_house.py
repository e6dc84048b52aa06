"""The rules of the house (ARCHITECTURE.md): who may import whom, what a wheel holds, who else may live beside us."""

from __future__ import annotations

import ast
import os
import runpy
import shutil
import subprocess
import sys
import tomllib
import zipfile
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = PROJECT["tool"]["setuptools"]["packages"]
NOT_OURS = {"tests", "docs", "build", "dist", "headgate-demo", "__pycache__"}

# floor -> the floors below it, and the packages of others, beside the standard library, that it may import
FLOORS = {
    "kernels": (set(), {"torch", "numpy", "triton", "cupy"}),
    "placement": (set(), {"numpy", "scipy", "numba", "pyarrow", "yaml"}),
    "dispatch": ({"kernels", "placement"}, {"torch", "numpy", "deep_ep"}),
    "moe": ({"dispatch", "kernels", "placement"}, {"torch", "numpy", "transformers", "safetensors", "gguf"}),
}
# The rooms of placement/, from bottom to top, and what each imports of those above it in this table; nothing more.
PLACEMENT: dict[str, set[str]] = {
    "__init__": set(),
    "files": set(),
    "careful": set(),
    "lookup": set(),
    "slots": set(),
    "compiled": set(),
    "cluster": {"lookup"},
    "traces": {"careful", "files", "lookup"},
    "placement": {"careful", "cluster", "files"},
    "cost": {"cluster"},
    "formats": {"placement", "careful", "cluster", "files"},
    "caching": {"traces", "careful", "cluster", "compiled", "files", "lookup"},
    "walk": {"cost", "placement", "traces"},
    "problem": {"walk", "cost", "placement", "traces", "cluster", "slots"},
    "live": {"walk", "placement", "traces", "cluster", "slots", "lookup"},
    "search": {"problem", "walk", "cost", "placement", "slots", "lookup", "compiled"},
    "bounds": {"search", "problem", "lookup"},
    "place": {"bounds", "search", "problem", "walk", "placement", "traces", "cluster", "slots"},
}
MAX_LINES, MAX_FUNCTION = 450, 80


@cache
def nodes(source: str) -> list[ast.AST]:
    """Every node of a file; several rules look at each."""
    return list(ast.walk(ast.parse(source)))


def folder(package: str) -> Path:
    return ROOT.joinpath(*package.split(".")[1:])


def library() -> list[Path]:
    return sorted(f.relative_to(ROOT) for p in PACKAGES for f in folder(p).glob("*.py"))


def inside(path: Path, node: ast.ImportFrom) -> tuple[str, ...]:
    """Where a relative import of the file `path` begins, as a path below the root; () is the root."""
    above = path.parts[: len(path.parts) - node.level]
    return (*above, *(node.module.split(".") if node.module else ()))


def rooms(path: Path, node: ast.ImportFrom) -> set[str]:
    """The rooms of placement/, other than its own, that an import of the file `path` there reaches."""
    below = inside(path, node)[1:2]
    return ({*below} or {a.name for a in node.names}) - {room_of(path)}


def room_of(path: Path) -> str:
    return path.with_suffix("").parts[1]


def broken_rules(path: Path, source: str) -> list[str]:
    """What the imports of a library file, `path` relative to the root, do against the house."""
    floor, found = path.parts[0], []
    below, others = FLOORS[floor]
    for node in nodes(source):
        if isinstance(node, ast.ImportFrom) and node.level:
            target = inside(path, node)[:1]
            reached = target or [a.name.split(".")[0] for a in node.names]
            found += [f"line {node.lineno}: {floor} must not know {t}" for t in reached if t not in {floor, *below}]
            if target == ("placement",) and floor == "placement":
                beyond = sorted(rooms(path, node) - PLACEMENT.get(room_of(path), set()))
                found += [f"line {node.lineno}: placement/{room_of(path)} must not know placement/{r}" for r in beyond]
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            for name in {n.split(".")[0] for n in names}:
                if name == "headgate":
                    found.append(f"line {node.lineno}: imports inside the library are relative")
                elif name not in others and name not in sys.stdlib_module_names:
                    found.append(f"line {node.lineno}: {floor} must not import {name}")
    return found


@pytest.mark.parametrize("path", [f for f in library() if f.parts[0] in FLOORS], ids=str)
def test_imports_go_down_only(path):
    assert not broken_rules(path, (ROOT / path).read_text())


@pytest.mark.parametrize(
    ("path", "line", "broken"),
    [
        ("kernels/plan/x.py", "from ..routing import Routing", False),
        ("kernels/plan/x.py", "from . import reference", False),
        ("kernels/plan/x.py", "from ...placement import Trace", True),
        ("kernels/plan/x.py", "from ... import moe", True),
        ("kernels/x.py", "def f():\n    from ..moe import MoE", True),
        ("kernels/x.py", "import transformers", True),
        ("placement/x.py", "import numpy as np, json", False),
        ("placement/x.py", "import torch", True),
        ("placement/x.py", "from torch import Tensor", True),
        ("placement/search/x.py", "from ..walk import walk", False),
        ("placement/search/x.py", "from .state import State", False),
        ("placement/search/x.py", "from ..bounds import certify", True),
        ("placement/traces/readers/x.py", "from ..trace import Trace", False),
        ("placement/traces/readers/x.py", "from ...placement import Placement", True),
        ("placement/traces/x.py", "from .. import walk", True),
        ("placement/caching/x.py", "from ..cost import Cost", True),
        ("placement/place.py", "from .caching.cache import Cache", True),
        ("placement/place.py", "from .bounds.certify import certify", False),
        ("placement/__init__.py", "from .place import place", True),
        ("placement/bounds/x.py", "from ..traces.trace import Trace", True),
        ("placement/cost.py", "from .placement import Placement", True),
        ("placement/nowhere/x.py", "from ..slots import check_slots", True),
        ("dispatch/x.py", "from ..kernels.plan import Plan", False),
        ("dispatch/x.py", "from ..moe.layer import MoE", True),
        ("moe/hf/x.py", "from ...kernels import Routing", False),
        ("moe/hf/x.py", "from ... import kernels", False),
        ("moe/hf/x.py", "from ...bench import case", True),
        ("moe/x.py", "from headgate.kernels import Routing", True),
    ],
)
def test_the_import_rule_sees_what_breaks_it(path, line, broken):
    assert bool(broken_rules(Path(path), line)) == broken


def test_the_rooms_of_placement_stand_on_what_is_above_them_in_the_table_and_on_no_more():
    files = [f for f in library() if f.parts[0] == "placement"]
    used: dict[str, set[str]] = {room_of(path): set() for path in files}
    for path in files:
        for node in nodes((ROOT / path).read_text()):
            if isinstance(node, ast.ImportFrom) and node.level and inside(path, node)[:1] == ("placement",):
                used[room_of(path)] |= rooms(path, node)
    assert used == PLACEMENT, "what no file needs is not allowed"
    order = list(PLACEMENT)
    assert all(order.index(r) < order.index(room) for room, below in PLACEMENT.items() for r in below)


@pytest.mark.parametrize("package", [p for p in PACKAGES if p.startswith("headgate.placement")])
def test_a_room_of_placement_says_what_each_of_its_files_holds(package):
    doc = ast.get_docstring(ast.parse((folder(package) / "__init__.py").read_text()))
    table = doc.partition("file | holds |\n")[2].partition("\n\n")[0]
    named = [name for row in table.splitlines() if row for name in row.split("|")[1].strip().split(", ")]
    rooms = [f"{f.parent.name}/" for f in folder(package).glob("*/__init__.py")]
    there = {f.name for f in folder(package).glob("*.py")} | set(rooms)
    assert sorted(n for n in named if n != "---") == sorted(there - {"__init__.py"})


def test_every_folder_with_python_is_a_listed_package():
    folders = {f.parent.relative_to(ROOT) for f in ROOT.rglob("*.py")}
    ours = {f for f in folders if not any(part in NOT_OURS or part.startswith(".") for part in f.parts)}
    assert {".".join(("headgate", *f.parts)) for f in ours} == set(PACKAGES)
    assert all((folder(p) / "__init__.py").exists() for p in PACKAGES)


def test_no_package_among_the_tests():
    assert not list((ROOT / "tests").rglob("__init__.py")), "--import-mode=importlib wants none"


def function_lengths(source: str) -> list[tuple[int, str]]:
    """(lines without the docstring, name) of every function."""
    found = []
    for node in nodes(source):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            doc = node.body[0] if ast.get_docstring(node) else None
            found.append(
                (node.end_lineno - node.lineno + 1 - (doc.end_lineno - doc.lineno + 1 if doc else 0), node.name)
            )
    return found


@pytest.mark.parametrize("path", library(), ids=str)
def test_files_and_functions_stay_readable(path):
    source = (ROOT / path).read_text()
    assert source.count("\n") <= MAX_LINES, f"{path}: more than {MAX_LINES} lines; what in it is a thing of its own?"
    long = [f"{name}: {lines}" for lines, name in function_lengths(source) if lines > MAX_FUNCTION]
    assert not long, f"{path}: functions longer than {MAX_FUNCTION} lines: {', '.join(long)}"


# --- the wheel -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    """The wheel, unpacked. Built from a copy: a build leaves its traces in the tree it is run in."""
    work = tmp_path_factory.mktemp("wheel")
    skip = shutil.ignore_patterns(".*", "*.egg-info", *NOT_OURS)
    shutil.copytree(ROOT, work / "tree", ignore=lambda d, names: {*skip(d, names), *virtual_environments(d, names)})
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(work), "."]
    done = subprocess.run(build, cwd=work / "tree", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(work.glob("headgate-*.whl"))) as archive:
        archive.extractall(work / "site")
    return work / "site"


def virtual_environments(where: str, names: list[str]) -> set[str]:
    return {n for n in names if os.path.exists(os.path.join(where, n, "pyvenv.cfg"))}


def test_the_wheel_holds_what_an_editable_install_sees(wheel):
    sees = {f"headgate/{f.name}" for f in [*ROOT.glob("*.py"), ROOT / "py.typed"]}
    for package in PACKAGES[1:]:
        here = folder(package).relative_to(ROOT)
        sees |= {f"headgate/{here}/{f.name}" for f in folder(package).iterdir() if f.is_file() and f.suffix != ".md"}
    holds = {str(f.relative_to(wheel)) for f in (wheel / "headgate").rglob("*") if f.is_file()}
    assert holds == sees, "add new kinds of files to package-data in pyproject.toml"
    assert list(wheel.glob("headgate-*.dist-info/licenses/LICENSE"))


def python(code: str, cwd: Path, tmp_path: Path, path: tuple[Path, ...] = ()) -> str:
    """What a program prints that is started as console scripts are: the first place on sys.path is its own folder."""
    script = tmp_path / "bin" / "program.py"
    script.parent.mkdir(exist_ok=True)
    script.write_text(code)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "HF_HUB_OFFLINE": "1"}
    return outcome([sys.executable, str(script)], cwd, env)


def outcome(command: list[str], cwd: Path, env: dict[str, str]) -> str:
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_wheel_imports_outside_the_repository(wheel, tmp_path):
    code = f"""
import importlib, pkgutil, headgate
assert headgate.__file__.startswith({str(wheel)!r}), headgate.__file__
for name in headgate.__all__:
    getattr(headgate, name)
for module in pkgutil.walk_packages(headgate.__path__, "headgate."):
    print(importlib.import_module(module.name).__name__)
"""
    modules = python(code, tmp_path, tmp_path, (wheel,)).split()
    assert set(PACKAGES[1:]) <= set(modules)


# --- lazy, and good company ------------------------------------------------------------------------------------------


def test_the_root_imports_nothing_eagerly():
    """pytest, too, runs the root's __init__.py, under another name and outside any package."""
    assert runpy.run_path(str(ROOT / "__init__.py"))["__version__"] == PROJECT["project"]["version"]


def test_planning_loads_no_torch(tmp_path):
    """One line after the other in one process: what a line loads stays loaded, so that no line can hide it."""
    lines = ["import headgate", "import headgate.placement", "from headgate import Trace, place"]
    look = "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    code = "\n".join(["import sys", *(f"{line}\n{look}" for line in lines)])
    assert python(code, tmp_path, tmp_path).split("\n") == ["[]", "[]", "[]", ""]


def test_what_is_not_there_is_named():
    import headgate

    with pytest.raises(AttributeError, match="headgate has no attribute 'nonsense'; it offers "):
        headgate.nonsense  # noqa: B018


@pytest.fixture
def foreign_kernels(tmp_path) -> Path:
    """A folder with a package `kernels` such as Hugging Face's: whatever transformers asks of it is there."""
    from transformers.utils.import_utils import KERNELS_MIN_VERSION

    site = tmp_path / "site"
    mode = site / "kernels" / "layer" / "mode"
    mode.mkdir(parents=True)
    anything = """
class _Anything:
    def __init__(self, *args, **kwargs): pass
    def __call__(self, thing=None, *args, **kwargs): return thing if isinstance(thing, type) else self
    def __getattr__(self, name): return _Anything()
    def __or__(self, other): return self
def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return _Anything()
"""
    for place in (site / "kernels", site / "kernels" / "layer", mode):
        (place / "__init__.py").write_text(anything)
    info = site / f"kernels-{KERNELS_MIN_VERSION}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_MIN_VERSION}\n")
    return site


BESIDE = """
import sys
sys.path += {late}
{first}
{second}
from transformers.models.olmoe.modeling_olmoe import OlmoeForCausalLM
from headgate.kernels import grouped_ffn
from transformers.utils.import_utils import is_kernels_available
print(is_kernels_available(), getattr(sys.modules.get("kernels"), "__file__", None))
"""
OURS, THEIRS = "import headgate, headgate.kernels", "import transformers"
SCRIPT, IN_ROOT = "console script", "python -c in the repository"


@pytest.mark.parametrize(
    ("start", "where", "first"),
    [
        pytest.param(SCRIPT, "absent", OURS, marks=pytest.mark.slow),
        pytest.param(SCRIPT, "earlier", THEIRS, marks=pytest.mark.slow),
        pytest.param(SCRIPT, "later", OURS, marks=pytest.mark.slow),
        pytest.param(IN_ROOT, "absent", THEIRS, marks=pytest.mark.slow),
        (IN_ROOT, "later", OURS),
        pytest.param(IN_ROOT, "later", THEIRS, marks=pytest.mark.slow),
    ],
)
def test_transformers_imports_beside_us(start, where, first, foreign_kernels, tmp_path):
    """Our folder `kernels` must not be taken for Hugging Face's package of that name, nor hide it."""
    late = [str(foreign_kernels)] if where == "later" else []
    early = (foreign_kernels,) if where == "earlier" else ()
    code = BESIDE.format(late=late, first=first, second=THEIRS if first == OURS else OURS)
    if start == SCRIPT:
        said = python(code, ROOT, tmp_path, early).split()
    else:
        said = outcome([sys.executable, "-c", code], ROOT, {**os.environ, "HF_HUB_OFFLINE": "1"}).split()
    if where == "absent":  # unless the real one is installed
        assert said[0] == "False" or "site-packages" in said[1]
    else:
        assert said == ["True", str(foreign_kernels / "kernels" / "__init__.py")]
