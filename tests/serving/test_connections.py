"""Connections that say little, slowly, too much, or are too many; uvicorn itself, on a free port."""

import contextlib
import json
import socket
import threading
import time

import pytest
import uvicorn

from mmrf_jax.serving import connections

SECONDS, MOST = 1.0, 4
GOOD = b"GET / HTTP/1.1\r\nhost: a\r\n\r\n"


async def app(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


@pytest.fixture(scope="module")
def port():
    listening = socket.create_server(("127.0.0.1", 0))
    limited = connections.protocol(SECONDS, MOST)
    config = uvicorn.Config(app, http=limited, ws="none", lifespan="off", log_level="error", timeout_keep_alive=30)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    yield listening.getsockname()[1]
    server.should_exit = True
    thread.join()


@contextlib.contextmanager
def connected(port: int):
    with socket.create_connection(("127.0.0.1", port), timeout=20.0) as made:
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


def test_headers_must_come_in_time(port):
    with connected(port) as made:
        made.sendall(GOOD[:20])
        assert "did not come within 1 s" in refused(rest(made), b"408")
    with connected(port) as made:
        assert rest(made) == b""  # who says nothing is told nothing


def test_the_next_request_of_a_connection_must_come_in_time(port):
    for begun in (b"\r\n", GOOD[:20]):
        with connected(port) as made:
            made.sendall(GOOD)
            answer = b""
            while not answer.endswith(b"ok"):
                answer += made.recv(1000)
            made.sendall(begun)
            if begun == b"\r\n":
                assert rest(made) == b""
            else:
                assert "did not come within 1 s" in refused(rest(made), b"408")


def test_a_connection_between_requests_is_kept(port):
    with connected(port) as made:
        for _ in range(3):
            made.sendall(GOOD)
            answer = b""
            while not answer.endswith(b"ok"):
                answer += made.recv(1000)
            assert answer.startswith(b"HTTP/1.1 200")
            time.sleep(1.5 * SECONDS)


def test_headers_have_a_length(port):
    with connected(port) as made:
        made.sendall(GOOD[:-2] + b"x: " + b"y" * 40_000)
        assert "more than 32768 bytes" in refused(rest(made), b"431")
    with connected(port) as made:
        made.sendall(GOOD[:-2] + b"x: " + b"y" * 20_000 + b"\r\n\r\n")
        assert made.recv(1000).startswith(b"HTTP/1.1 200")


def test_connections_are_so_many(port):
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(connected(port)) for _ in range(MOST + 1)]
        assert "4 connections are open" in refused(rest(opened[-1]), b"503")
        opened[0].sendall(GOOD)
        assert opened[0].recv(1000).startswith(b"HTTP/1.1 200")
        assert [rest(made) for made in opened[1:-1]] == [b""] * (MOST - 1)  # closed, they have said nothing
        with connected(port) as made:
            made.sendall(GOOD)
            assert made.recv(1000).startswith(b"HTTP/1.1 200")
