"""What is imported before anything is done, as sets: each of these packages costs tens of MB and tenths of a second."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import talking
import torch

from headgate.bench import light
from headgate.kernels.uncompiled import uncompiled
from headgate.placement.caching import names, policies

LOOK = """
import sys
def look(*names):
    print(*sorted(n for n in names if sys.modules.get(n) is not None), sep=",")
"""


def python(code: str, *words: str, threads: int = 1) -> list[str]:
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    env.pop("TRITON_INTERPRET", None)
    line = [sys.executable, "-P", "-c", LOOK + code, *words]
    done = subprocess.run(line, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return talking.save(tmp_path_factory.mktemp("light"))


def test_the_library_imports_no_more_than_it_uses():
    """One line after the other in one process: what a line loads stays loaded, so that no line can hide it. A function
    that is not to be compiled is left alone though torch's compiler comes in after it."""
    said = python("""
import headgate
look("torch", "numpy")
from headgate import MoE, Experts, grouped_ffn
from headgate.dispatch import AllToAll
look("torch._dynamo", "sympy", "triton", "numba", "scipy", "transformers", "rich", "matplotlib")
from headgate.kernels.uncompiled import uncompiled
import torch
inside = []
@uncompiled
def alone(x):
    inside.append(torch.compiler.is_compiling())
    return x + 1
one = torch.zeros(1)
assert alone(one) == 1
look("torch._dynamo")
assert torch.compile(lambda x: 2 * alone(2 * x), backend="eager")(one) == 2
print(inside)
import headgate.moe.offload.seen, headgate.moe.offload.room
look("numba", "transformers")
from headgate import load
look("scipy.linalg", "scipy.optimize", "scipy.sparse", "transformers", "rich", "matplotlib")
""")
    assert said == ["", "", "", "[False, False]", "", ""]


def test_uncompiled_functions_keep_their_name_and_are_never_traced():
    inside = []

    @uncompiled
    def counted(x: torch.Tensor, *, by: int) -> torch.Tensor:
        """Adds."""
        inside.append(torch.compiler.is_compiling())
        return x + by

    assert (counted.__name__, counted.__doc__) == ("counted", "Adds.")
    compiled = torch.compile(lambda x: counted(x * 2, by=1) * 2, backend="eager")
    assert compiled(torch.ones(2)).tolist() == compiled(torch.ones(2)).tolist() == [6, 6]
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(lambda x: counted(x, by=1), backend="eager", fullgraph=True)(torch.ones(2))
    assert inside == [False, False]


COMMAND = """
sys.argv[0] = "headgate"
from headgate.cli import main
assert main() == 0
print()
look("numba", "scipy", "scipy.linalg", "scipy.optimize", "triton", "sklearn", "matplotlib")
import importlib.util
print(all(name not in sys.modules or sys.modules[name] for name in ("scipy", "triton")))
"""


def test_doctor_imports_what_it_says_something_of(folder):
    said = python(COMMAND, "doctor", str(folder), "--json")
    assert '"complete": true' in "\n".join(said)
    assert said[-2:] == ["", "True"]


def test_generate_imports_what_an_answer_takes(folder):
    said = python(COMMAND, *f"generate {folder} --budget 50% --raw --prompt one --max-new-tokens 2".split())
    assert said[-2:] == ["numba", "True"]


def test_packages_are_out_of_sight_for_a_while_only(monkeypatch):
    monkeypatch.delitem(sys.modules, "zipapp", raising=False)
    seen = []

    def work() -> None:
        try:
            import zipapp
        except ImportError:
            seen.append("none")
        else:
            seen.append(zipapp.__name__)

    light._without(("zipapp",), work)
    light._without(("zipapp", "torch"), work)  # it is loaded: it stays
    assert seen == ["none", "zipapp", "zipapp", "zipapp"]
    assert sys.modules["torch"] is torch


def test_what_needs_a_package_after_all_gets_it(monkeypatch):
    monkeypatch.delitem(sys.modules, "zipapp", raising=False)
    done = []

    def work() -> None:
        import zipapp

        done.append(zipapp.__name__)

    light._without(("zipapp",), work)
    assert done == ["zipapp"]


def test_the_names_of_policies_are_those_of_the_policies():
    assert tuple(policies.POLICIES) == names.NAMES
    assert policies.NEED_TRACE is names.NEED_TRACE
