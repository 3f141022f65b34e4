"""Handling of closed output pipes. It does not import JAX, so `mmrf multiprocess` starts quickly."""

import contextlib
import select
import signal
import sys
from collections.abc import Iterator

from mmrf_jax.parallel.ending import end_by


@contextlib.contextmanager
def of_closed_pipes() -> Iterator[None]:
    """End the process by SIGPIPE, as usual, if the reader of stdout or stderr has closed the pipe, as in `… | head`."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
    except BrokenPipeError:
        if not is_closed_pipe():
            raise
        end_by(signal.SIGPIPE)


def is_closed_pipe() -> bool:
    """Return whether stdout or stderr is a pipe without a reader."""
    poll = select.poll()
    for descriptor in (1, 2):
        poll.register(descriptor, 0)  # errors are always reported
    return any(event & select.POLLERR for _, event in poll.poll(0))
