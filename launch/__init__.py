"""The mains. Whatever starts as `python -m launch.NAME` imports this first."""

import io
import os
import signal
import sys

if sys.argv[0] == "-m":  # what it is while Python looks for the main
    # Until `common.run` hears signals there is nothing to save, and a traceback of imports says nothing.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    for _name in ("stdout", "stderr"):  # None where the caller has closed them
        if getattr(sys, _name) is None:
            setattr(sys, _name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a table that the terminal cannot show is no error
