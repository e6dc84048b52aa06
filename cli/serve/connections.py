"""How long a connection may keep us waiting, and how many there may be."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEADERS_S = 20.0  # for a request's first line and headers to come
TAKEN_S = 60.0  # for a client to take some of what is written to it
BESIDE = 256  # connections beside those whose requests may be inside


class Connection(H11Protocol):
    """uvicorn's, which waits for ever for headers and for who does not read, and takes any number. Such a connection
    is cut here, and its request ends as that of a client who left."""

    most = BESIDE
    _waits: asyncio.TimerHandle | None = None  # for headers
    _blocked: asyncio.TimerHandle | None = None  # for a client to read

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.most:
            transport.abort()
        else:
            self._waits = self.loop.call_later(HEADERS_S, self._cut_idle)

    def data_received(self, data: bytes) -> None:
        if self._idle() and self._waits is None:
            self._waits = self.loop.call_later(HEADERS_S, self._cut_idle)
        super().data_received(data)
        if not self._idle():
            _off(self._waits)
            self._waits = None

    def pause_writing(self) -> None:
        super().pause_writing()
        _off(self._blocked)
        self._blocked = self.loop.call_later(TAKEN_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        _off(self._blocked)
        self._blocked = None

    def connection_lost(self, exc: Exception | None) -> None:
        _off(self._waits)
        _off(self._blocked)
        self._waits = self._blocked = None
        super().connection_lost(exc)

    def _idle(self) -> bool:
        """No request is under way."""
        return self.cycle is None or self.cycle.response_complete

    def _cut_idle(self) -> None:
        self._waits = None
        if self._idle():
            self.transport.close()


def _off(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


def connections(inside: int) -> Callable[..., Connection]:
    """What uvicorn makes connections with, for `inside` requests at a time."""
    return type("Connection", (Connection,), {"most": inside + BESIDE})
