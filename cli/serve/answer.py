"""Tokens of one answer into text for its client, up to a stop string."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable
from typing import Any

from transformers.cli.serving.utils import _StreamError, response_events_to_chunks

FAILED = "the answer could not be computed: the server's log says why"


class Gone(Exception):
    """Ends a generation from within: nobody wants the rest."""


class Answer:
    """What transformers' handlers read: `queue` holds pieces (text, reasoning, tool calls), at last None or an error,
    and `total_tokens` counts. Tokens are put by whatever thread generates; `ended` is set, once, with the last piece.

    tokenizer   the Rust tokenizer of a fast tokenizer
    stop        strings that end the answer; none of them is passed on
    parser      makes reasoning and tool calls of text, for models that have a template for it
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...], parser: Any, on_cancel: Callable[[], None]) -> None:
        from tokenizers.decoders import DecodeStream

        self.queue: asyncio.Queue = asyncio.Queue()
        self.tokens: list[int] = []
        self.text = ""
        self.ended, self._gone = asyncio.Event(), threading.Event()
        self._loop = asyncio.get_running_loop()
        self._tokenizer, self._stop, self._parser, self._on_cancel = tokenizer, stop, parser, on_cancel
        self._decode = DecodeStream([], skip_special_tokens=parser is None)
        self._held, self._prompt = "", True
        if parser is not None:
            for item in response_events_to_chunks(parser.initial_events):
                self.queue.put_nowait(item)

    @property
    def total_tokens(self) -> int:
        return len(self.tokens)

    @property
    def gone(self) -> bool:
        """Whether nobody wants more: the client left, or a stop string came."""
        return self._gone.is_set()

    def put(self, value: Any) -> None:
        """Tokens from `generate`, the prompt first. Raises Gone where nobody wants more."""
        if self.gone:
            raise Gone
        if self._prompt:
            self._prompt = False
            return
        if not self.add(value.reshape(-1).tolist()):
            raise Gone

    def add(self, tokens: list[int]) -> bool:
        """More tokens; False where a stop string has come."""
        for token in tokens:
            if self.gone:
                return False
            self.tokens.append(token)
            piece = self._decode.step(self._tokenizer, token)
            if piece and not self._pass_on(piece):
                self._gone.set()
                return False
        return True

    def _pass_on(self, piece: str) -> bool:
        self._held += piece
        at = min((found for found in map(self._held.find, self._stop) if found >= 0), default=None)
        if at is not None:
            self._emit(self._held[:at])
            self._held = ""
            return False
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)  # what may become a stop string
        self._emit(self._held[: len(self._held) - keep])
        self._held = self._held[len(self._held) - keep :]
        return True

    def _emit(self, text: str) -> None:
        self.text += text
        if not text:
            return
        items = [text] if self._parser is None else response_events_to_chunks(self._parser.feed(text))
        for item in items:
            self._tell(self.queue.put_nowait, item)

    def end(self) -> None:
        """All tokens have come."""
        self._emit(self._held)
        self._held = ""
        if self._parser is not None:
            try:
                _, events = self._parser.finalize()
            except (ValueError, RuntimeError):  # amid a tool call, say: its rest is no call
                events = []
            for item in response_events_to_chunks(events):
                self._tell(self.queue.put_nowait, item)
        self._tell(self._last, None)

    def fail(self, error: object) -> None:
        """No more will come. The client hears that it is so, the log why."""
        print(f"headgate: serve: an answer failed: {error}", file=sys.stderr, flush=True)
        self._gone.set()
        self._tell(self._last, _StreamError(FAILED))

    def cancel(self) -> None:
        """The client is gone; called on the event loop."""
        if not self.ended.is_set():
            self._gone.set()
            self._on_cancel()
            self._last(None)

    def leave(self) -> None:
        """Nobody wants more, and nobody listens."""
        self._gone.set()

    def _last(self, item: Any) -> None:
        if not self.ended.is_set():
            self.ended.set()
            self.queue.put_nowait(item)

    def _tell(self, what: Callable[[Any], None], item: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(what, item)
        except RuntimeError:  # the loop is closed: the server ends, nobody listens
            self._gone.set()


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` with which `stop` begins."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
