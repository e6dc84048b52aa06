"""The options of `headgate serve`; what is loaded, said and closed; the process that listens."""

from __future__ import annotations

import argparse
import ipaddress
import logging
import os
import socket
import sys
from contextlib import closing
from typing import Any

from ...bench.arguments import MOST, positive
from ...bench.machine import need
from ...bench.screen import Screen
from .. import loading

KEY = "HEADGATE_API_KEY"
CONTEXT, MOST_BYTES, GRACE_S = 4096, 1 << 20, 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `headgate serve`."""
    add = parser.add_argument
    loading.add_arguments(parser)
    add(
        "--host", default="127.0.0.1", metavar="NAME", help="the address to listen on (default 127.0.0.1: this machine)"
    )
    add("--port", type=_port, default=8000, metavar="N", help="the port, 0: a free one (default 8000)")
    add("--name", metavar="NAME", help="the model's name for clients (default: MODEL's last part)")
    add("--api-key", metavar="KEY", help=f"the key that clients must send; better in the environment, as {KEY}")
    add("--at-once", type=_few, default=4, metavar="N", help="answers computed together; 1: in turn (default 4)")
    add("--max-waiting", type=_count, default=16, metavar="N", help="requests that may wait beside those (default 16)")
    add(
        "--context", type=positive, metavar="N", help=f"tokens of prompt and answer (default {CONTEXT}, or the model's)"
    )
    add("--max-request-bytes", type=positive, default=MOST_BYTES, metavar="N", help="of a body (default 1 MiB)")


def run(args: argparse.Namespace) -> int:
    """Serves until a signal ends it, which is raised then."""
    loading.check_extras("serve")
    for package in ("fastapi", "uvicorn", "openai", "pydantic"):
        need("serve", package, "serve")
    key = _key(args)
    loading.begin(args)
    tokenizer = loading.tokenizer_of(args.model, "serve", args.config)
    if not hasattr(tokenizer, "_tokenizer"):
        raise ValueError(f"serve: MODEL must have a fast tokenizer, got {type(tokenizer).__name__}")
    import transformers.utils.logging as said

    said.set_verbosity_error()
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)  # what fails is said once, by us
    with closing(_listening(args.host, args.port)) as listener, loading.opened(args, tokenizer) as loaded:
        _serve(args, loaded, key, listener)
    return 0


def _serve(args: argparse.Namespace, loaded: loading.Loaded, key: str | None, listener: socket.socket) -> None:
    import uvicorn

    from .app import application
    from .connections import connections

    screen, name = Screen(), args.name or args.model.resolve().name
    if loaded.longest is not None and args.context is not None and args.context > loaded.longest:
        raise ValueError(f"serve: --context must be at most this model's {loaded.longest}, got {args.context}")
    context = args.context or min(CONTEXT, loaded.longest or CONTEXT)
    manager = _manager(loaded.model, context, args.at_once)
    try:
        hosts = ["localhost", "127.0.0.1", "[::1]", args.host] if _loopback(listener) else None
        app = application(
            loaded.model, loaded.tokenizer, name, manager, max_waiting=args.max_waiting,
            most_bytes=args.max_request_bytes, key=key, hosts=hosts,
        )  # fmt: skip
        if hosts is None and key is None:
            print(f"headgate: serve: whoever reaches {args.host} may ask: no key is set", file=sys.stderr)
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=GRACE_S,
            lifespan="off", http=connections(manager.at_once + args.max_waiting), ws="none",  # type: ignore[arg-type]
        )  # fmt: skip
        host, port = listener.getsockname()[:2]
        where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        how = f"{manager.at_once} answers at once" if manager.at_once > 1 else "one answer after another"
        screen.say(
            f"serving {name} on http://{where}/v1, {how}, {context:,} tokens each; loaded in {loaded.load_s:.1f} s"
        )
        sys.stdout.flush()
        uvicorn.Server(config).run(sockets=[listener])
    finally:
        manager.stop()


def _manager(model: Any, context: int, at_once: int) -> Any:
    """Together, where transformers can batch this model; else in turn, and it says so."""
    from .managers import InTurn, Together

    if at_once == 1:
        return InTurn(model, context)
    together, attention = None, model.config._attn_implementation
    try:
        together = Together(model, context, at_once)
        together.warm_up()
        return together
    except BaseException as error:  # what transformers, or the model's own code, says; or a signal
        if together is not None:
            together.stop()
        if not isinstance(error, Exception):
            raise
        why = str(error) or type(error).__name__
        if model.config._attn_implementation != attention:
            model.set_attn_implementation(attention)
    print(f"headgate: serve: one answer after another, as continuous batching failed: {why[:300]}", file=sys.stderr)
    return InTurn(model, context)


def _key(args: argparse.Namespace) -> str | None:
    key = args.api_key if args.api_key is not None else os.environ.get(KEY)
    if key is None:
        return None
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        where = KEY if args.api_key is None else "--api-key"
        raise ValueError(f"serve: {where} must be printable ASCII without spaces, one character at least")
    return key


def _listening(host: str, port: int) -> socket.socket:
    """A socket that listens, before anything is loaded. Raises ValueError where there is no such address."""
    try:
        family, *_, address = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise ValueError(f"serve: --host must be an address of this machine, got {host[:100]!r} ({error})") from error
    try:
        return socket.create_server(address[:2], family=family, backlog=128)
    except OSError as error:
        raise OSError(error.errno, f"serve: cannot listen on {host}, port {port}: {error.strerror}") from error


def _loopback(listener: socket.socket) -> bool:
    return ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback


def _port(text: str) -> int:
    return _whole(text, 0, 65535)


def _count(text: str) -> int:
    return _whole(text, 0, MOST)


def _few(text: str) -> int:
    return _whole(text, 1, 256)


def _whole(text: str, least: int, most: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if not least <= value <= most:
        raise argparse.ArgumentTypeError(f"must be a whole number from {least} to {most}, got {text!r}")
    return value
