"""The command-line programs. Python imports this package first for every `python -m launch.NAME`."""

import io
import os
import signal
import sys

if sys.argv[0] == "-m":  # the value of argv[0] while Python looks for the main module
    # Until `common.run` handles signals there is nothing to save, and a traceback from the imports would not help.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    for _name in ("stdout", "stderr"):  # None if the caller has closed them
        if getattr(sys, _name) is None:
            setattr(sys, _name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a character that the terminal cannot show is not an error
