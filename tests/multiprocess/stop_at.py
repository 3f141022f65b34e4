"""Runs a main that stops itself by SIGSTOP right before a function is called for the Nth time.

With HANG=1 in the environment its main thread waits there for ever instead, while its other threads go on.

python stop_at.py mmrf_jax.envs.rollout.unroll 2 launch.train --config=…
"""

import importlib
import os
import runpy
import signal
import sys
import threading


def stop_at(function: str, call: int) -> None:
    module, name = function.rsplit(".", 1)
    original, calls = getattr(importlib.import_module(module), name), 0

    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == call:
            threading.Event().wait() if os.environ.get("HANG") else os.kill(os.getpid(), signal.SIGSTOP)
        return original(*args, **kwargs)

    setattr(sys.modules[module], name, counted)


if __name__ == "__main__":
    _, function, call, main, *args = sys.argv
    sys.path.insert(0, os.getcwd())
    # The mains set the environment up before JAX is imported; `stop_at` imports it.
    importlib.import_module("mmrf_jax.cli.common")
    sys.argv = [main, *args]
    stop_at(function, int(call))
    runpy.run_module(main, run_name="__main__", alter_sys=True)
