"""First floor: moves token rows to the ranks of their experts and back. One file per dispatcher, one line per file."""

from .local import Local
from .protocol import Dispatcher

__all__ = ["DISPATCHERS", "Dispatcher", "Local"]

DISPATCHERS: dict[str, type[Dispatcher]] = {"local": Local}
