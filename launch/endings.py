"""How a main ends whose output nobody reads any more. It imports no JAX: `launch.multiprocess` starts at once."""

import contextlib
import select
import signal
import sys
from collections.abc import Iterator

from mmrf_jax.parallel.ending import end_by


@contextlib.contextmanager
def of_closed_pipes() -> Iterator[None]:
    """Where stdout or stderr is a pipe whose reader has gone, as in `… | head`, the process ends as others do there."""
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
    """Whether stdout or stderr is a pipe that nobody reads any more."""
    poll = select.poll()
    for descriptor in (1, 2):
        poll.register(descriptor, 0)  # of errors it always tells
    return any(event & select.POLLERR for _, event in poll.poll(0))
