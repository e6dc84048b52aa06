"""Rows per token, by formula: see placement/volume.py, where planning without torch finds them too."""

from ..placement.volume import Rows, distinct_parts, rows_per_token

__all__ = ["Rows", "distinct_parts", "rows_per_token"]
