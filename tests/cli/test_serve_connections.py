"""Clients of `headgate serve` that keep it waiting: no headers, headers one by one, too many, none who reads. Command
lines that make no sense."""

from __future__ import annotations

import socket
import threading
import time

import pytest
import talking

from headgate import cli
from headgate.cli import loading

uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")

from headgate.cli.serve import connections  # noqa: E402

GET = b"GET / HTTP/1.1\r\nHost: x\r\n"
ended = []


async def app(scope, receive, send):
    """Answers with as much as the path says."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for _ in range(int(scope["path"].strip("/") or 1)):
        await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
    await send({"type": "http.response.body", "body": b""})
    ended.append(scope["path"])


@pytest.fixture
def address(monkeypatch):
    monkeypatch.setattr(connections, "HEADERS_S", 0.5)
    monkeypatch.setattr(connections, "TAKEN_S", 1.5)
    monkeypatch.setattr(connections, "BESIDE", 2)
    ended.clear()
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, log_level="critical", lifespan="off", http=connections.connections(2))
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield listener.getsockname()
    server.should_exit = True
    thread.join()
    listener.close()


def is_cut(client: socket.socket) -> bool:
    client.settimeout(30)
    try:
        while client.recv(1 << 20):
            pass
    except ConnectionError:
        pass
    return True


def answered(client: socket.socket, path: bytes = b"/") -> bytes:
    client.settimeout(30)
    client.sendall(GET.replace(b"/ ", path + b" ", 1) + b"\r\n")
    found = b""
    while not found.endswith(b"0\r\n\r\n"):
        part = client.recv(1 << 20)
        assert part
        found += part
    return found


def test_who_sends_no_headers_is_cut(address):
    """From the first, in the middle of them, and after an answer."""
    with socket.create_connection(address) as idle, socket.create_connection(address) as slow:
        slow.sendall(GET)
        assert is_cut(idle)
        assert is_cut(slow)
    with socket.create_connection(address) as again:
        assert answered(again).startswith(b"HTTP/1.1 200")
        assert answered(again).startswith(b"HTTP/1.1 200")
        again.sendall(GET)
        assert is_cut(again)


def test_a_request_may_take_longer_than_its_headers(address):
    with socket.create_connection(address) as client:
        client.sendall(GET.replace(b"GET", b"POST") + b"Content-Length: 1\r\n\r\n")
        client.settimeout(30)
        assert client.recv(15).startswith(b"HTTP/1.1 200")
    with socket.create_connection(address) as client:  # 8 MiB, with a pause that is shorter than the bound
        client.sendall(GET.replace(b"/ ", b"/128 ", 1) + b"\r\n")
        time.sleep(0.1)
        size, part = 0, b""
        while not part.endswith(b"0\r\n\r\n"):
            part = client.recv(1 << 20)
            assert part
            size += len(part)
        assert size > 8 << 20


def test_who_does_not_read_is_cut_and_the_request_ends(address):
    with socket.create_connection(address) as client:
        client.sendall(GET.replace(b"/ ", b"/4096 ", 1) + b"\r\n")
        end = time.monotonic() + 30
        while "/4096" not in ended:
            assert time.monotonic() < end
            time.sleep(0.05)
        assert is_cut(client)


def test_more_connections_than_the_most_are_cut_and_others_are_answered(address):
    first = [socket.create_connection(address) for _ in range(4)]
    assert answered(first[0]).startswith(b"HTTP/1.1 200")
    with socket.create_connection(address) as one_more:
        assert is_cut(one_more)
    assert answered(first[1]).startswith(b"HTTP/1.1 200")
    for client in first:
        client.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return talking.save(tmp_path_factory.mktemp("talking"))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--port", "70000"], "--port: must be a whole number from 0 to 65535, got '70000'"),
        (["--at-once", "0"], "--at-once: must be a whole number from 1 to 256"),
        (["--host", "no.such.host.invalid"], "serve: --host must be an address of this machine"),
        (["--api-key", ""], "serve: --api-key must be printable ASCII"),
        (["--context", "1000", "--port", "0"], "serve: --context must be at most this model's 512, got 1000"),
        (["--port", "TAKEN"], "serve: cannot listen on 127.0.0.1, port"),
    ],
)
def test_an_odd_line_is_refused(folder, capsys, words, says):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        words = [str(taken.getsockname()[1]) if word == "TAKEN" else word for word in words]
        try:
            status = cli.main(["serve", str(folder), *words])
        except SystemExit as stop:  # argparse
            status = stop.code
    assert status == (1 if "cannot" in says else 2)
    assert says in capsys.readouterr().err.splitlines()[-1]


def test_options_reach_load(folder, monkeypatch):
    from headgate.moe.offload import load as module

    real, asked = module.load, {}

    def load(path, budget, policy, prefetch, disk, **options):
        asked.update(options, budget=budget, policy=policy, prefetch=prefetch, disk=disk)
        return real(path, budget, policy, prefetch, disk, **options)

    monkeypatch.setattr(module, "load", load)
    line = f"serve {folder} --budget 30% --prefetch none --policy lru --no-page-cache --readers 1".split()
    with loading.opened(cli.parser(line).parse_args(line), None) as found:
        assert found.longest == talking.CONTEXT
    del asked["tell"]
    assert asked == {
        "budget": "30%", "policy": "lru", "prefetch": None, "disk": None, "formats": None, "device": "cpu",
        "trace": None, "readers": 1, "page_cache": False, "config": None,
    }  # fmt: skip
