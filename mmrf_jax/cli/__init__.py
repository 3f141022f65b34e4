"""The commands, as `mmrf NAME` and, in a checkout, as the scripts of launch/. One module per command."""

import io
import os
import signal
import sys


def begin() -> None:
    """Prepare this process for a command, before anything slow is imported."""
    # Until `common.run` handles signals there is nothing to save, and a traceback from the imports would not help.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    for name in ("stdout", "stderr"):  # None if the caller has closed them
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a character that the terminal cannot show is not an error
