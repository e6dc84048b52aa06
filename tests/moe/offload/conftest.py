"""What the offload tests share."""

from __future__ import annotations

import pytest
import torch
from offload_cases import Stack


@pytest.fixture
def stack():
    """A small model of three MoE layers."""
    torch.manual_seed(3)
    return Stack().eval()
