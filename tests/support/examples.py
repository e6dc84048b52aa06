"""Property tests with few examples in every run, and with many where the slow tests run too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis.strategies import SearchStrategy


def examples(few: int, many: int, *drawn: SearchStrategy, **named: SearchStrategy) -> Callable:
    """hypothesis' `given(*drawn, **named)` as two tests: [few], and [many], which is marked slow.

    The test takes what is drawn and no fixtures.
    """

    def split(check: Callable[..., None]) -> Callable[[int], None]:
        def test(number: int) -> None:
            settings(max_examples=number, deadline=None)(given(*drawn, **named)(check))()

        test.__name__, test.__qualname__, test.__doc__ = check.__name__, check.__qualname__, check.__doc__
        test.__module__ = check.__module__
        both: Any = pytest.mark.parametrize("number", [few, pytest.param(many, marks=pytest.mark.slow)])
        return both(test)

    return split
