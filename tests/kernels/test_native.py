"""The compiled CPU form: built once, kept, and done without where it cannot be had, which is said."""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from headgate.kernels import native

needs_compiler = pytest.mark.skipif(not native.available(), reason=f"no compiled form: {native.status().why}")


@pytest.fixture
def quick_compiler(tmp_path, monkeypatch) -> Path:
    """A compiler that notes each build and optimises little, and an empty cache. Returns its notes."""
    notes, script = tmp_path / "builds", tmp_path / "bin" / "quick-c++"
    script.parent.mkdir()
    real = shutil.which(os.environ.get("CXX") or "g++") or shutil.which("clang++")
    script.write_text(f'#!/bin/sh\ncase "$*" in *-shared*) echo build >> {notes};; esac\nexec {real} "$@" -O1\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("HEADGATE_CACHE", str(tmp_path / "cache"))
    notes.touch()
    return notes


@pytest.mark.slow
@needs_compiler
def test_is_built_once_kept_and_never_half_there(quick_compiler, tmp_path):
    """Two that start together may both build; nothing of theirs is left but one library, and no third builds again."""
    with ThreadPoolExecutor(2) as pool:
        states = [f.result()[1] for f in [pool.submit(native._build) for _ in range(2)]]
    assert {s.form for s in states} == {"native"}, states
    built = quick_compiler.read_text().count("build")
    assert native._build()[1] == states[0] == states[1]
    assert quick_compiler.read_text().count("build") == built
    assert [str(f) for f in (tmp_path / "cache").iterdir()] == [states[0].path]


def test_without_a_compiler_plain_torch_serves_and_says_so(monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.warns(UserWarning, match="run in plain torch, which is slower: no C\\+\\+ compiler found"):
        lib, state = native._load.__wrapped__()
    assert lib is None
    assert state.form == "plain"


def test_a_compiler_that_fails_is_named_with_its_words(monkeypatch, tmp_path):
    broken = tmp_path / "broken-c++"
    broken.write_text("#!/bin/sh\necho 'licence expired' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("HEADGATE_CACHE", str(tmp_path / "cache"))
    lib, state = native._build()
    assert lib is None
    assert "broken-c++ failed: licence expired" in state.why


def test_a_cache_that_cannot_be_written_is_not_the_end(monkeypatch, tmp_path):
    """The build goes to the temporary directory instead, or there is none: the operations run either way."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HEADGATE_CACHE", str(tmp_path / "file" / "cache"))
    assert native._cache_dir().is_dir()


@pytest.mark.parametrize("cxx", ['g++ "x', "g++ 'x", "g++ \\"])
def test_a_cxx_that_no_shell_reads_is_named(monkeypatch, cxx):
    monkeypatch.setenv("CXX", cxx)
    lib, state = native._build()
    assert lib is None
    assert state.form == "plain"
    assert f"CXX must be a command as a shell reads it, got {cxx!r}" in state.why


def test_words_of_a_compiler_in_any_encoding_do_no_harm(monkeypatch, tmp_path):
    broken = tmp_path / "broken-c++"
    broken.write_bytes(b"#!/bin/sh\necho 'licen\xe7a \xff'\necho 'licen\xe7a' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("HEADGATE_CACHE", str(tmp_path / "cache"))
    assert "broken-c++ failed: licen" in native._build()[1].why


DAMAGE = {
    "cut short": lambda data: data[:20_000],
    "garbage": lambda data: b"no library" * 100,
    "empty": lambda data: b"",
    "one bit": lambda data: data[:30_000] + bytes([data[30_000] ^ 1]) + data[30_001:],
    "a pipe": None,
}


@pytest.mark.parametrize("damage", DAMAGE)
@needs_compiler
def test_a_damaged_library_is_never_loaded_but_built_again_and_said(damage, tmp_path, monkeypatch):
    """The compiler of this test copies the library that is there: what a build makes, in no time."""
    built = native.status().path
    script, cache = tmp_path / "copy-c++", tmp_path / "cache"
    script.write_text(f"""#!/bin/sh
for last; do :; done
case "$*" in *-shared*-o*) cp {built} "$last";; esac
""")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("HEADGATE_CACHE", str(cache))
    first = native._build()[1]
    assert first.form == "native", first
    there = Path(first.path)
    whole = there.read_bytes()
    if DAMAGE[damage] is None:
        there.unlink()
        os.mkfifo(there)
    else:
        there.unlink()  # a library that this process has loaded must not be written into
        there.write_bytes(DAMAGE[damage](whole))
    with pytest.warns(UserWarning, match=r"the compiled form in .* is damaged; it is built again"):
        assert native._build()[1] == first
    assert there.read_bytes() == whole
    assert [str(f) for f in cache.iterdir()] == [first.path]

    there.unlink()
    there.write_bytes(whole[:1000])
    script.write_text("#!/bin/sh\ncase \"$*\" in *-shared*) echo 'disk full' >&2; exit 1;; esac\n")
    with pytest.warns(UserWarning, match="is damaged"):
        lib, state = native._build()
    assert lib is None
    assert "disk full" in state.why


@needs_compiler
def test_a_library_without_our_functions_is_not_taken(tmp_path, monkeypatch):
    (tmp_path / "none.cpp").write_text('extern "C" int nothing() { return 0; }\n')
    script, real = tmp_path / "other-c++", shutil.which("g++")
    script.write_text(f"""#!/bin/sh
for last; do :; done
case "$*" in *-shared*-o*) exec {real} -shared -fPIC {tmp_path / "none.cpp"} -o "$last";; esac
""")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("HEADGATE_CACHE", str(tmp_path / "cache"))
    lib, state = native._build()
    assert lib is None
    assert "lacks hg_" in state.why


@pytest.mark.skipif(not os.environ.get("CXX", "").endswith("/sanitizing_cxx"), reason="for make test-sanitized")
def test_the_library_watches_itself():
    """Where the build failed, the tests of the compiled form would be skipped."""
    assert native.status().form == "native", native.status()
    assert b"__asan_init" in Path(native.status().path).read_bytes()


def test_plain_on_request(monkeypatch):
    monkeypatch.setenv("HEADGATE_CPU", "plain")
    assert native.library() is None
    assert native.serves(torch.float32, pairs=1, experts=1) is None


@needs_compiler
def test_serves_what_it_multiplies(monkeypatch):
    monkeypatch.delenv("HEADGATE_CPU", raising=False)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert native.serves(dtype, pairs=1, experts=1) is not None
    assert native.serves(torch.float64, pairs=1, experts=1) is None
