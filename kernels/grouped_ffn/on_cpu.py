"""grouped_ffn on CPU."""

from __future__ import annotations

from . import plain


def forward(*args):
    return plain.forward(*args)


def backward(*args):
    return plain.backward(*args)
