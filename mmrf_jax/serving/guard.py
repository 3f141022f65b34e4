"""Checks on every request before its route: authentication, load, size and time."""

from __future__ import annotations

import asyncio
import dataclasses
import hmac
import json
import time
from typing import Any

from mmrf_jax.serving.monitoring import Metrics

_OPEN = ("/healthz",)  # answered at any load and without a token, for health checks
# Without a token, which a browser cannot send before it has the page: the page asks for it itself, as /docs does.
_PUBLIC = ("/", "/docs", "/openapi.json")
_WATCHED = ("/metrics",)  # answered at any load, since it reports the load
_ROUTES = ("/rank", "/items", "/feedback", "/docs", "/healthz", "/metrics", "/openapi.json", "/")


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of requests.

    Attributes:
      in_flight: simultaneous requests; further ones are rejected (429).
      body_bytes: of a request (413).
      seconds: until a request is aborted (503), and for a body to arrive (408).
      token: required in `Authorization: Bearer …`; None requires none.
    """

    in_flight: int = 256
    body_bytes: int = 262_144
    seconds: float = 5.0
    token: str | None = None


class Guard:
    """ASGI middleware that applies the limits and counts requests."""

    def __init__(self, app: Any, limits: Limits, metrics: Metrics):
        self._app, self._limits, self._metrics = app, limits, metrics
        self._in_flight = 0

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"]
        route = path if path in _ROUTES else "/demo" if path.startswith("/demo/") else "other"
        status, head = 500, scope["method"] == "HEAD"
        if head:  # as GET, without the body
            scope = scope | {"method": "GET"}

        async def counted(message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            elif head and message["type"] == "http.response.body":
                message = message | {"body": b""}
            await send(message)

        began = time.perf_counter()
        try:
            await self._let_in(scope, receive, counted, path)
        finally:
            self._metrics.requests.labels(route, status).inc()
            self._metrics.seconds.labels(route).observe(time.perf_counter() - began)

    async def _let_in(self, scope, receive, send, path: str) -> None:
        limits = self._limits
        if path in _OPEN or (path in _PUBLIC and scope["method"] == "GET"):
            await self._app(scope, _nothing, send)
            return
        headers = dict(scope["headers"])
        if limits.token is not None:
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, b"Bearer " + limits.token.encode()):
                challenge = [(b"www-authenticate", b"Bearer")]
                await _refuse(send, 401, "give the service's token: Authorization: Bearer TOKEN", challenge)
                return
        if path in _WATCHED:
            await self._app(scope, _nothing, send)
            return
        if self._in_flight >= limits.in_flight:
            message = f"{self._in_flight} requests are in flight, no more are taken; come again"
            await _refuse(send, 429, message, [(b"retry-after", b"1")])
            return
        self._in_flight += 1
        self._metrics.in_flight.set(self._in_flight)
        try:
            await self._within(scope, receive, send, headers)
        finally:
            self._in_flight -= 1
            self._metrics.in_flight.set(self._in_flight)

    async def _within(self, scope, receive, send, headers: dict[bytes, bytes]) -> None:
        limits = self._limits
        large = f"the body has more than {limits.body_bytes} bytes; send less"
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > limits.body_bytes:
            await _refuse(send, 413, large, [(b"connection", b"close")])
            return
        try:
            body = await asyncio.wait_for(_read(receive, limits.body_bytes), limits.seconds)
        except TimeoutError:
            await _refuse(send, 408, f"the body did not come within {limits.seconds:g} s", [(b"connection", b"close")])
            return
        if body is None:
            await _refuse(send, 413, large, [(b"connection", b"close")])
            return
        started, given = False, False

        async def whole():
            nonlocal given
            if given:
                return await receive()  # the client disconnects
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def starting(message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await asyncio.wait_for(self._app(scope, whole, starting), limits.seconds)
        except TimeoutError:
            if started:
                raise
            await _refuse(send, 503, f"not answered within {limits.seconds:g} s; come again", [(b"retry-after", b"1")])


async def _nothing():
    """Return an empty body, for routes that do not read it."""
    return {"type": "http.request", "body": b"", "more_body": False}


async def _read(receive, limit: int) -> bytes | None:
    """Read the whole body; return None if it is larger than the limit."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return bytes(body)
        body += message.get("body", b"")
        if len(body) > limit:
            return None
        if not message.get("more_body"):
            return bytes(body)


def refusal(message: str) -> bytes:
    """Return the body of an `api.Error` without a field."""
    return json.dumps({"detail": [{"loc": [], "msg": message, "type": "refused"}]}).encode()


async def _refuse(send, status: int, message: str, headers=()) -> None:
    body = refusal(message)
    kinds = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*kinds, *headers]})
    await send({"type": "http.response.body", "body": body})
