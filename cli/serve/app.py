"""The server's application: who is let in, how many at a time, what goes wrong and how it is said."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import jinja2
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.utils import GenerationState

from .answer import FAILED
from .bodies import Body, Chat, Completion, Refused, Response, checked
from .managers import Manager, until

BODY_S = 30.0  # for a request's body to come
PASSED_OVER = 1 << 24  # bytes beyond the bound that are read to no end: a client that is cut off hears no answer
KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "invalid_request_error",
    429: "rate_limit_error",
}


_NO_PROMPT = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError, jinja2.TemplateError)


class One(ModelManager):
    """transformers' keeper of models, with one that is there. Nothing is looked up, loaded or downloaded."""

    def __init__(self, model: Any, tokenizer: Any, name: str) -> None:
        super().__init__()
        self.force_model = self.name = name
        self.tokenizer, self._pair = tokenizer, (model, tokenizer)

    @staticmethod
    def process_model_name(model_id: str) -> str:
        return model_id

    def load_model_and_processor(self, model_id_and_revision, progress_callback=None, tqdm_class=None, gguf_file=None):
        return self._pair

    async def load_model_streaming(self, model_id_and_revision, gguf_file=None):
        raise Refused(400, "the model is loaded already")
        yield  # it is a generator

    def shutdown(self) -> None:
        """The model is closed by who opened it."""


class State(GenerationState):
    """transformers' choice of a manager: ours."""

    def __init__(self, manager: Manager) -> None:
        super().__init__()
        self._manager = manager

    def use_continuous_batching(self, model, modality):
        return False  # the handlers then leave it all to the manager

    def get_manager(self, model_id, use_cb=False):
        return self._manager

    def is_cb_alive(self) -> bool:
        return self._manager.alive()


class Admission:
    """At most `most` requests inside: `at_once` under way, the others waiting."""

    def __init__(self, at_once: int, max_waiting: int) -> None:
        self.at_once, self.most = at_once, at_once + max_waiting
        self.inside, self._mean_s = 0, 1.0

    @contextmanager
    def request(self) -> Iterator[None]:
        """Raises Refused where there are too many."""
        if self.inside >= self.most:
            wait_s = max(1, round(self._mean_s * (self.inside - self.at_once + 1) / self.at_once))
            raise Refused(
                429,
                f"{self.inside} requests are being answered or waiting, which is the most: try again in {wait_s} s",
                "overloaded",
                {"Retry-After": str(wait_s)},
            )
        self.inside += 1
        began = time.monotonic()
        try:
            yield
        finally:
            self.inside -= 1
            self._mean_s += (time.monotonic() - began - self._mean_s) / 8


class Endpoint:
    """POST of one kind of request to one of transformers' handlers."""

    def __init__(
        self, handler: Any, kind: type[Body], manager: Manager, admission: Admission, most_bytes: int, one: One
    ) -> None:
        self.handler, self.kind, self.manager, self.admission = handler, kind, manager, admission
        self.most_bytes, self.one = most_bytes, one

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        tokenizer = self.one.tokenizer
        said = await _read_json(Request(scope, receive), self.most_bytes)
        body, wanted = checked(self.kind, said, self.one.name, tokenizer)
        if self.kind is not Completion and tokenizer.chat_template is None:
            raise Refused(400, "the model has no chat template: ask /v1/completions")
        name = uuid.uuid4().hex
        with self.admission.request(), self.manager.request(name, wanted):
            gone = asyncio.ensure_future(_left(receive))
            try:
                response = await until(asyncio.ensure_future(self._handled(body, name)), gone)
            finally:
                gone.cancel()
            if response is None:
                return
            if isinstance(response, StreamingResponse) and self.kind is not Response:
                response.body_iterator = _with_end(response.body_iterator)
            await response(scope, receive, send)

    async def _handled(self, body: dict[str, Any], name: str) -> Any:
        try:
            return await self.handler.handle_request(body, name)
        except _NO_PROMPT as error:
            said = f"{type(error).__name__}: {error}"[:300]
            raise Refused(400, f"the request could not be made a prompt of: {said}", "invalid_value") from error


async def _left(receive: Any) -> None:
    """Ends when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _with_end(pieces: Any) -> AsyncIterator[Any]:
    """The last event of a stream, which some clients wait for."""
    async for piece in pieces:
        yield piece
    yield "data: [DONE]\n\n"


async def _read_json(request: Request, most: int) -> Any:
    """The body. Raises Refused where it is no JSON, too large, or does not come."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # a web page may send others to any server, without asking
        raise Refused(415, f"content-type must be application/json, got {kind[:100]!r}")
    parts, size = list[bytes](), 0
    too_large = Refused(413, f"the body must have at most {most:,} bytes", "request_too_large", {"Connection": "close"})
    if int(request.headers.get("content-length") or 0) > most + PASSED_OVER:  # the server has seen that it is a number
        raise too_large
    try:
        async with asyncio.timeout(BODY_S):
            async for part in request.stream():
                size += len(part)
                if size <= most:
                    parts.append(part)
                elif size > most + PASSED_OVER:
                    raise too_large
    except TimeoutError as error:
        raise Refused(408, f"the body must come within {BODY_S:.0f} s", None, {"Connection": "close"}) from error
    if size > most:
        raise too_large
    try:
        return json.loads(b"".join(parts))
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body must be JSON: {error}"[:300]) from error


class Key:
    """Lets in who knows the key; /health is for all."""

    def __init__(self, app: Any, key: str) -> None:
        self.app, self._key = app, key.encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["path"] == "/health":
            return await self.app(scope, receive, send)
        given = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, key = given.partition(b" ")
        if scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), self._key):
            return await self.app(scope, receive, send)
        refused = Refused(401, "Authorization must be 'Bearer' and the key of this server", "invalid_api_key")
        refused.headers = {"WWW-Authenticate": "Bearer"}
        await _told(None, refused)(scope, receive, send)


def _told(_: Any, error: Exception) -> JSONResponse:
    """An error as OpenAI's clients read it."""
    if isinstance(error, HTTPException):  # transformers' and Starlette's own
        status = 400 if error.status_code == 422 else error.status_code
        error = Refused(status, str(error.detail), None, dict(error.headers or {}))
    assert isinstance(error, Refused)
    kind = KINDS.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    text = str(error).encode("utf-8", "backslashreplace").decode()  # half a character of the client's, say
    said = {"message": text, "type": kind, "code": error.code}
    return JSONResponse({"error": said}, error.status, error.headers)


async def _telling(request: Any, error: Exception) -> JSONResponse:
    return _told(request, error)


async def _failed(request: Any, error: Exception) -> JSONResponse:
    return _told(request, Refused(500, FAILED))  # Starlette raises the error after that, and uvicorn's log has it


async def _nobody(request: Any, error: Exception) -> JSONResponse:
    return JSONResponse({}, 499)  # nobody reads it


def application(
    model: Any,
    tokenizer: Any,
    name: str,
    manager: Manager,
    *,
    max_waiting: int,
    most_bytes: int,
    key: str | None,
    hosts: list[str] | None,
) -> Starlette:
    """The ASGI application. `hosts`: names that a browser may have called us by, None: any."""
    one, state, admission = One(model, tokenizer, name), State(manager), Admission(manager.at_once, max_waiting)
    about = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "headgate"}

    def models(request: Request) -> JSONResponse:
        return JSONResponse({"object": "list", "data": [about]})

    def model_(request: Request) -> JSONResponse:
        if request.path_params["name"] != name:
            raise Refused(404, f"model must be {name!r}, the one that is loaded", "model_not_found")
        return JSONResponse(about)

    def health(request: Request) -> JSONResponse:
        inside = {"inside": admission.inside, "at_once": admission.at_once}
        if not manager.alive():
            return JSONResponse({"status": "the last step of the model failed", **inside}, 503)
        return JSONResponse({"status": "ok", **inside})

    def post(path: str, handler: Any, kind: type[Body]) -> Route:
        return Route(path, Endpoint(handler(one, state), kind, manager, admission, most_bytes, one), methods=["POST"])

    middleware = []
    if hosts is not None:
        middleware.append(Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False))
    if key is not None:
        middleware.append(Middleware(Key, key=key))
    return Starlette(
        routes=[
            post("/v1/chat/completions", ChatCompletionHandler, Chat),
            post("/v1/completions", CompletionHandler, Completion),
            post("/v1/responses", ResponseHandler, Response),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", model_),
            Route("/health", health),
        ],
        middleware=middleware,
        exception_handlers={Refused: _telling, HTTPException: _telling, ClientDisconnect: _nobody, Exception: _failed},
    )
