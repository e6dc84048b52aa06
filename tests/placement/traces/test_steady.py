"""The steady load: sequences as witnesses, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from headgate.placement.traces.steady import steady_load
from headgate.placement.traces.trace import Trace


def made(**more) -> Trace:
    """One layer, top-1: 6 tokens of a sequence on expert 0, 2 of another on 1, 4 of a third on 2, 2, 3 and none."""
    ids = np.array([0] * 6 + [1] * 2 + [2, 2, 3, 255], np.uint8).reshape(1, 12, 1)
    return Trace(ids, 4, **{"sequence": np.repeat([5, 3, 9], [6, 2, 4]).astype(np.int32), **more})


def test_a_long_sequence_counts_no_more_than_so_many_tokens():
    assert steady_load(made(), most=2)[0].tolist() == pytest.approx(np.array([2, 2, 1, 0.5]) / 5.5)
    assert steady_load(made(), most=99)[0].tolist() == pytest.approx(np.array([6, 2, 2, 1]) / 11)
    assert steady_load(made(sequence=None), most=1)[0].tolist() == pytest.approx(np.array([6, 2, 2, 1]) / 11)


def test_labels_keep_their_tokens():
    labels = np.array([7] * 8 + [2] * 4)  # 8 tokens in two sequences, 4 in one
    found = steady_load(made(), labels, most=2)[0]
    assert found.tolist() == pytest.approx(np.array([4, 4, 2, 1]) / 11)


def test_unused_layers_and_no_tokens():
    none = Trace(np.full((2, 0, 1), 255, np.uint8), 3, sequence=np.zeros(0, np.int32))
    assert steady_load(none).tolist() == [[0, 0, 0]] * 2
    silent = Trace(np.full((1, 3, 1), 255, np.uint8), 4, sequence=np.zeros(3, np.int32))
    assert steady_load(silent).tolist() == [[0, 0, 0, 0]]


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="most must be at least 1 token, got 0"):
        steady_load(made(), most=0)
    with pytest.raises(ValueError, match=r"labels must be .T=12., got \(3,\)"):
        steady_load(made(), np.zeros(3, int))
