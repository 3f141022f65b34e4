"""Contexts of MLIR that are used again: one takes a millisecond and a megabyte to make, and JAX makes one a program."""

import threading

from jax._src.interpreters import mlir


def reuse() -> None:
    """Give each thread one context: a context has no locks, and threads compile together."""
    made, make = threading.local(), mlir.make_ir_context

    def of_thread():
        if not hasattr(made, "context"):
            made.context = make()
        return made.context

    mlir.make_ir_context = of_thread
