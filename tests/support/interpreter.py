"""Triton's interpreter without work that it does again and again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def language_patched_once() -> Iterator[None]:
    """Within: a kernel's launch replaces the functions of triton.language as before, a helper called by it does not.

    The interpreter looks through the whole language again at each call of a @triton.jit function in a kernel (tl.sum
    and tl.cdiv are such functions), though all is replaced since the launch. That is a third to a half of its time.
    Where a function still finds an original, it is replaced as before.
    """
    from triton import language as tl
    from triton.runtime import interpreter

    patch = interpreter._patch_lang
    nothing = getattr(interpreter, "_LangPatchScope", lambda: None)()  # what a launch undoes at its end

    def once(fn):
        seen = [value for value in fn.__globals__.values() if value is tl or value is tl.core]
        originals = [lang.load for lang in seen] + [tl.core.tensor.__add__]
        if not seen or any(map(tl.core.is_builtin, originals)):
            return patch(fn)
        return nothing

    interpreter._patch_lang = once
    try:
        yield
    finally:
        interpreter._patch_lang = patch
