"""A service over HTTP in a thread of the tests' process."""

import contextlib
import json
import socket
import threading
import urllib.error
import urllib.request

import uvicorn
from processes import HANG


class Client:
    """Asks a service on this machine."""

    def __init__(self, port: int):
        self.url, self.token = f"http://127.0.0.1:{port}", None

    def __call__(self, path: str, body=None, text: bool = False):
        data = None if body is None else json.dumps(body).encode()
        headers = {"content-type": "application/json"} | (
            {"authorization": f"Bearer {self.token}"} if self.token else {}
        )
        try:
            with urllib.request.urlopen(urllib.request.Request(self.url + path, data, headers), timeout=HANG) as answer:
                content = answer.read().decode()
                return answer.status, content if text else json.loads(content)
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())


@contextlib.contextmanager
def served(make, lifespan="on"):
    """Serves the application that `make` makes, in a thread that makes it too."""
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    listening.listen()
    servers = []

    def run():
        servers.append(uvicorn.Server(uvicorn.Config(make(), log_level="warning", lifespan=lifespan)))
        servers[0].run(sockets=[listening])

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield Client(listening.getsockname()[1])
    finally:
        servers[0].should_exit = True
        thread.join()
