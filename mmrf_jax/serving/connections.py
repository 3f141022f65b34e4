"""Limits of a connection before the guard sees a request: duration, size and number of connections."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from mmrf_jax.serving import guard

HEADER_BYTES = 32_768  # of a request's line and headers, in addition to the last read


class _Connection(HttpToolsProtocol):
    """A connection with limits; see `protocol`."""

    seconds: float
    most: int
    _timer: asyncio.TimerHandle | None = None
    _waits = True  # for headers
    _head = 0  # header bytes so far
    _read = 0  # bytes of the last read

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.most:
            self._refuse(b"503 Service Unavailable", f"{self.most} connections are open, no more are taken; come again")
        else:
            self._arm()

    def connection_lost(self, exc) -> None:
        self._disarm()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._read = len(data)
        self._head += self._read
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._waits and self._head > HEADER_BYTES:
            large = f"the headers have more than {HEADER_BYTES} bytes; send less"
            self._refuse(b"431 Request Header Fields Too Large", large)
        elif self._waits or self._idle():  # blank lines alone start no request, but end the wait for one
            self._arm()

    def on_message_begin(self) -> None:
        self._waits, self._head = True, self._read
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._waits = False
        self._disarm()
        super().on_headers_complete()

    def _idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _arm(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(self.seconds, self._late)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self) -> None:
        self._timer = None
        if self.transport.is_closing():
            return
        if not self._idle():  # half of the next request, while one is answered
            self._arm()
        elif self._waits and self._head:
            self._refuse(b"408 Request Timeout", f"the headers did not come within {self.seconds:g} s")
        else:
            self.transport.close()

    def _refuse(self, status: bytes, message: str) -> None:
        body = guard.refusal(message)
        length = str(len(body)).encode()
        lines = [b"HTTP/1.1 " + status, b"content-type: application/json", b"content-length: " + length]
        self.transport.write(b"\r\n".join([*lines, b"connection: close", b"", body]))
        self.transport.close()


def protocol(seconds: float, most: int) -> type[asyncio.Protocol]:
    """Return uvicorn's HTTP/1.1 protocol with limits; by itself it accepts headers of any duration and length.

    Args:
      seconds: time for the headers of a request to arrive, from the start of the connection or their first byte (408; a
        connection that has sent nothing is closed).
      most: simultaneous connections; further ones are rejected (503).
    """
    return type("Connection", (_Connection,), {"seconds": seconds, "most": most})
