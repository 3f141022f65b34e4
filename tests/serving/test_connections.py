"""Connections that say little, slowly, too much, or are too many; uvicorn itself, on a free port."""

import contextlib
import json
import socket
import threading
import time

import pytest
import uvicorn
from processes import HANG

from mmrf_jax.serving import connections

SECONDS, MOST = 2.0, 4
GOOD = b"GET / HTTP/1.1\r\nhost: a\r\n\r\n"


async def app(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


@pytest.fixture(scope="module")
def port():
    listening = socket.create_server(("127.0.0.1", 0))
    limited = connections.protocol(SECONDS, MOST)
    config = uvicorn.Config(
        app, http=limited, ws="none", lifespan="off", log_level="error", timeout_keep_alive=int(HANG)
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    yield listening.getsockname()[1]
    server.should_exit = True
    thread.join()


@contextlib.contextmanager
def connected(port: int):
    with socket.create_connection(("127.0.0.1", port), timeout=HANG) as made:
        yield made


def rest(made: socket.socket) -> bytes:
    """What comes until the service closes the connection."""
    read = b""
    with contextlib.suppress(ConnectionResetError):
        while some := made.recv(65_536):
            read += some
    return read


def refused(answer: bytes, status: bytes) -> str:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 " + status) and b"connection: close" in head, answer
    return json.loads(body)["detail"][0]["msg"]


def answer(made: socket.socket) -> bytes:
    """What a request of the connection is answered."""
    read = b""
    with contextlib.suppress(ConnectionResetError, BrokenPipeError):
        made.sendall(GOOD)
        while not read.endswith(b"ok") and (more := made.recv(1000)):
            read += more
    return read


def taken(stack: contextlib.ExitStack, port: int) -> socket.socket:
    """A connection that was taken and has had an answer; the service may not know yet that one before it is gone."""
    while True:
        made = stack.enter_context(connected(port))
        if answer(made).startswith(b"HTTP/1.1 200"):
            return made


def test_headers_must_come_in_time(port):
    with connected(port) as made:
        made.sendall(GOOD[:20])
        assert "did not come within 2 s" in refused(rest(made), b"408")
    with connected(port) as made:
        assert rest(made) == b""  # who says nothing is answered nothing


def test_the_next_request_of_a_connection_must_come_in_time(port):
    for begun in (b"\r\n", GOOD[:20]):
        with contextlib.ExitStack() as stack:
            made = taken(stack, port)
            made.sendall(begun)
            if begun == b"\r\n":
                assert rest(made) == b""
            else:
                assert "did not come within 2 s" in refused(rest(made), b"408")


def test_a_connection_between_requests_is_kept(port):
    with contextlib.ExitStack() as stack:
        made = taken(stack, port)
        time.sleep(1.5 * SECONDS)
        assert answer(made).startswith(b"HTTP/1.1 200")


def test_headers_have_a_length(port):
    with connected(port) as made:
        made.sendall(GOOD[:-2] + b"x: " + b"y" * 40_000)
        assert "more than 32768 bytes" in refused(rest(made), b"431")
    with connected(port) as made:
        made.sendall(GOOD[:-2] + b"x: " + b"y" * 20_000 + b"\r\n\r\n")
        assert made.recv(1000).startswith(b"HTTP/1.1 200")


def test_connections_are_so_many(port):
    with contextlib.ExitStack() as stack:
        opened = [taken(stack, port) for _ in range(MOST)]  # between two requests they may stay
        with connected(port) as made:
            assert "4 connections are open" in refused(rest(made), b"503")
        assert answer(opened[0]).startswith(b"HTTP/1.1 200")
        opened[0].sendall(GOOD[:20])
        assert "did not come" in refused(rest(opened[0]), b"408")  # that one has made room
        assert taken(stack, port)
