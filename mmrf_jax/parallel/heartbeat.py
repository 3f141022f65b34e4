"""Heartbeats between the processes of a run: each names, in one line, a process that never joins, ends or hangs.

JAX's own service would abort them with a stack trace that does not name it. Before it starts, process 0 listens on its
port, and every other process connects and says who it is. When all have joined, process 0 leaves the port to JAX and
keeps the connections. The kernel closes the connection of a process that ends; missing or unchanged heartbeats show
that one is silent or stuck. This module needs no JAX and compares no clocks of different machines.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import re
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

_LONGEST = 4_096  # bytes of a message
_RETRY = 0.2  # seconds between two attempts to connect
_NOWHERE: dict[str, Any] = {"at": "", "waits": False, "compiles": False}  # where the main thread of a process is
_COMPILERS = ("jax/_src/compiler.py", "jax/_src/compilation_cache.py")  # compiling takes long, and ends
# The folder mmrf_jax as faulthandler writes it; not any of that name, which may also hold the libraries.
_PACKAGE = os.path.join(os.path.dirname(os.path.dirname(__file__)), "").encode("ascii", "backslashreplace").decode()
_FRAME = re.compile(r'^  File "(.*)", line (\d+) in (.*)$', re.MULTILINE)  # a line of faulthandler


class ProcessLost(RuntimeError):
    """A process of the run never joined, has ended, or hangs; the message names it."""


class Limits(NamedTuple):
    """Times in seconds.

    Attributes:
      join: until all processes have joined.
      silent: without a heartbeat of a process, until it counts as lost: its machine is gone, or it is suspended.
      stalled: without progress of any process, until one counts as hanging. Other lines of code, and compiling, are
        progress too.
      beat: between two heartbeats.
      grace: for this process to end by itself once another is lost.
    """

    join: float = 300.0
    silent: float = 60.0
    stalled: float = 1_800.0
    beat: float = 2.0
    grace: float = 5.0


LIMITS = Limits()


class _Peer:
    """The connection to a process: messages are lines of JSON."""

    def __init__(self, connection: socket.socket):
        self._socket, self._writing = connection, threading.Lock()
        self._file = connection.makefile("rb")
        self.name, self.beat = "", {"moved": 0, **_NOWHERE}
        self.left = False

    def send(self, **message: Any) -> None:
        """Send a message; nothing if the other end is gone, which its reader finds out."""
        with contextlib.suppress(OSError), self._writing:
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, timeout: float) -> dict[str, Any] | None:
        """Return the next message; None at the end of the connection.

        Raises:
          TimeoutError: if none comes in time.
        """
        self._socket.settimeout(timeout)
        try:
            line = self._file.readline(_LONGEST)
            return json.loads(line) if line.endswith(b"\n") else None
        except TimeoutError:
            raise
        except (OSError, ValueError):
            return None

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


class HeartbeatMonitor:
    """Watches the other processes of a run: the first process watches all, each other one watches the first.

    Args:
      address: HOST:PORT of the first process.
      number: of processes.
      index: of this one, from 0.
      moved: returns a count that grows while this process makes progress.
      end: (line) -> ends this process, in a thread of this object; called `grace` seconds after another is lost.
      limits: times.

    Raises:
      ProcessLost: if a process has not joined in time.
    """

    def __init__(
        self,
        address: str,
        number: int,
        index: int,
        moved: Callable[[], int],
        end: Callable[[str], object],
        limits: Limits = LIMITS,
    ):
        self._number, self._moved, self._end, self._limits = number, moved, end, limits
        self._ended, self._verdict = threading.Event(), threading.Event()
        self._deciding = threading.Lock()
        self._lost: str | None = None
        me = f"process {index} (pid {os.getpid()} on {socket.gethostname()})"
        host, port = address.rsplit(":", 1)
        self._me, self._index = me, index
        self._peers = self._gather(int(port)) if index == 0 else {0: self._join(host.strip("[]"), int(port))}
        for peer in self._peers.values():
            threading.Thread(target=self._listen, args=(peer,), name="heartbeat", daemon=True).start()
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def lost(self, seconds: float) -> str | None:
        """Return the line about a lost process, waiting for one if there is none yet; None if nothing comes."""
        self._verdict.wait(seconds)
        return self._lost

    def leave(self) -> None:
        """Leave the run in agreement with the others, which then do not miss this process."""
        self._ended.set()
        for peer in self._peers.values():
            peer.send(bye=True)

    def _gather(self, port: int) -> dict[int, _Peer]:
        """Wait for all other processes; the port is free again afterwards."""
        peers: dict[int, _Peer] = {}
        end = time.monotonic() + self._limits.join
        with _listener(port) as server:
            while len(peers) + 1 < self._number and (left := end - time.monotonic()) > 0.0:
                server.settimeout(left)
                try:
                    peer = _Peer(server.accept()[0])
                    said = peer.receive(min(left, 5.0)) or {}
                except TimeoutError:
                    continue
                if said.get("of") == self._number and said.get("process") in range(1, self._number):
                    peer.name = str(said["name"])
                    peers[said["process"]] = peer
                else:
                    peer.close()
        if missing := [n for n in range(1, self._number) if n not in peers]:
            line = f"{_processes(missing)} of {self._number} did not join within {self._limits.join:.0f} s"
            for peer in peers.values():
                peer.send(lost=line)
            raise ProcessLost(line)
        for peer in peers.values():
            peer.send(go=True, name=self._me)
        return peers

    def _join(self, host: str, port: int) -> _Peer:
        """Connect to the first process, and wait until all have joined."""
        end, late = time.monotonic() + self._limits.join, self._limits.silent
        line = f"process 0 of {self._number}, at {host}:{port}, did not join within {self._limits.join:.0f} s"
        while (left := end - time.monotonic()) > 0.0:
            try:
                peer = _Peer(socket.create_connection((host, port), timeout=left))
            except OSError:  # it does not listen yet, or its name is not known yet
                time.sleep(_RETRY)
                continue
            peer.send(process=self._index, of=self._number, name=self._me)
            try:  # the first began to wait at another time
                said = peer.receive(self._limits.join + late)
            except TimeoutError:
                raise ProcessLost(line) from None
            if said is None:  # it was not the first process, or that one has ended
                peer.close()
                time.sleep(_RETRY)
                continue
            if "lost" in said:
                raise ProcessLost(str(said["lost"]))
            peer.name = str(said["name"])
            return peer
        raise ProcessLost(line)

    def _listen(self, peer: _Peer) -> None:
        """Read what a process says, until it leaves or is lost."""
        while not self._ended.is_set():
            try:
                said = peer.receive(self._limits.silent)
            except TimeoutError:
                said = {"lost": f"nothing has been heard of {peer.name} for {self._limits.silent:.0f} s"}
            if said is None and self._index:
                # JAX's service has ended with process 0, and would abort this process within a second.
                return self._decide(f"{peer.name} has ended", grace=0.0)
            if said is None:
                said = {"lost": f"{peer.name} has ended"}
            if "bye" in said:
                peer.left = True
                return
            if "lost" in said:
                return self._decide(str(said["lost"]))
            peer.beat = said

    def _beat(self) -> None:
        """Say that this process lives; in the first, find out whether the run hangs."""
        before, since = None, time.monotonic()
        while not self._ended.wait(self._limits.beat):
            try:
                place = _place()
            except OSError:  # no room for a temporary file
                place = _NOWHERE
            mine = {"moved": self._moved(), **place}
            for peer in self._peers.values():
                peer.send(**mine)
            if self._index:
                continue
            beats = {self._me: mine} | {peer.name: peer.beat for peer in self._peers.values() if not peer.left}
            now = [(beat["moved"], beat["at"]) for beat in beats.values()]
            if now != before or any(beat["compiles"] for beat in beats.values()):
                before, since = now, time.monotonic()
            elif time.monotonic() - since > self._limits.stalled:
                return self._decide(_hanging(beats, self._limits.stalled))

    def _decide(self, line: str, grace: float | None = None) -> None:
        """Tell the others, and end this process unless it ends by itself."""
        with self._deciding:
            if self._lost is not None or self._ended.is_set():
                return
            self._lost = line
        self._verdict.set()
        if self._index == 0:
            for peer in self._peers.values():
                peer.send(lost=line)
        if not self._ended.wait(self._limits.grace if grace is None else grace):
            self._end(line)
        self._ended.set()


def _listener(port: int) -> socket.socket:
    """Listen on all addresses of this machine, as JAX's service does."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    return socket.create_server(("", port), backlog=1024)


def _processes(numbers: list[int]) -> str:
    return f"process{'es' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def _place() -> dict[str, Any]:
    """Return where this process's main thread is in our code, whether JAX has it wait, and whether JAX compiles.

    `frame.f_back` of a thread that runs can crash CPython 3.11; `faulthandler` reads all frames at once.
    """
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file)
        file.seek(0)
        return _read(file.read().decode(errors="replace"), threading.main_thread().ident or 0)


def _read(dump: str, ident: int) -> dict[str, Any]:
    """Return the place of the thread `ident` in what `faulthandler` wrote, the innermost frame first."""
    threads = [thread for thread in dump.split("\n\n") if f" 0x{ident:016x} " in thread.partition("\n")[0]]
    frames = [frame for thread in threads for frame in _FRAME.findall(thread)]
    if not frames:
        return dict(_NOWHERE)
    ours = (f"{path[len(_PACKAGE) :]}:{line} ({name})" for path, line, name in frames if path.startswith(_PACKAGE))
    return {
        "at": next(ours, ""),
        "waits": f"{os.sep}jax{os.sep}" in frames[0][0],
        "compiles": frames[0][0].endswith(_COMPILERS),
    }


def _hanging(beats: dict[str, dict[str, Any]], seconds: float) -> str:
    """Name the processes that hang: those behind the others, else those that do not wait for the others."""
    least = min(beat["moved"] for beat in beats.values())
    behind = {name: beat for name, beat in beats.items() if beat["moved"] == least}
    guilty = {name: beat for name, beat in behind.items() if not beat["waits"]} or behind
    places = "; ".join(f"{name} hangs in {beat['at'] or 'unknown code'}" for name, beat in guilty.items())
    return f"{places}: the run has not moved for {seconds:.0f} s"
