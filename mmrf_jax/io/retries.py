"""fsspec's file systems: failed requests are retried with backoff, and other errors say what to do.

Requests that a bucket answers with 429, 5xx or nothing are retried with exponential backoff for `PATIENCE` seconds. One
line reports the outage, and another its end.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from mmrf_jax.io import extras
from mmrf_jax.io.progress import say

#: Seconds of retries while a bucket does not answer.
PATIENCE = 900.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 20.0  # seconds
_EXTRAS = {"gs": "gcs", "gcs": "gcs", "s3": "s3", "s3a": "s3"}
_MODULES = ("aiohttp", "botocore", "aiobotocore", "gcsfs", "google", "requests", "urllib3", "azure")

T = TypeVar("T")


class Unavailable(OSError):
    """A bucket answers with 429, 5xx or nothing; a retry may help."""


# ------------------------------------------------------------------------------------------------------- File systems

_settled = False


def filesystem(protocol: str) -> Any:
    """Return fsspec's file system of a protocol, without a cache of listings.

    Raises:
      MissingExtra: if its package is not installed.
      ValueError: for a protocol that fsspec does not know.
    """
    with extras.needed(_EXTRAS.get(protocol, "gcs")):
        import fsspec
    _settle(fsspec)
    try:
        return fsspec.filesystem(protocol)
    except ValueError as error:
        raise ValueError(f"{protocol}:// is no protocol of fsspec; use gs://, s3:// or a path") from error
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        fix = f"pip install 'mmrf_jax[{extra}]'" if extra else str(error)
        raise extras.MissingExtra(f"{protocol}:// needs a package that is not installed; {fix}") from error


def _settle(fsspec: Any) -> None:
    """Set the options of all file systems of this process, also of those that orbax opens."""
    global _settled
    if _settled:
        return
    _settled = True
    fresh = {"use_listings_cache": False}
    slow = {"connect_timeout": 20, "read_timeout": 60, "retries": {"max_attempts": 2}}
    fsspec.config.conf.setdefault("s3", {}).update(fresh | {"config_kwargs": slow})
    # Without it gcsfs asks for the kind of each bucket, by a second protocol that needs its own permission.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    try:
        import aiohttp
        import gcsfs.core
    except ImportError:
        return
    # Its own retries are silent for half a minute, and then print a traceback; ours say one line.
    wrapped = gcsfs.core.GCSFileSystem._request
    gcsfs.core.GCSFileSystem._request = getattr(wrapped, "__wrapped__", wrapped)
    limits = aiohttp.ClientTimeout(total=None, sock_connect=20, sock_read=60)
    for name in ("gs", "gcs"):
        fsspec.config.conf.setdefault(name, {}).update(fresh | {"requests_timeout": limits})


# ------------------------------------------------------------------------------------------------------------- Retries

_down: dict[str, float] = {}  # bucket -> since when it does not answer
_telling = threading.Lock()


def retried(address: str, call: Callable[[], T]) -> T:
    """Call a function, with retries and exponential backoff while its bucket does not answer.

    Raises:
      PermissionError, OSError: naming the address and the fix.
    """
    bucket = "/".join(address.split("/")[:3])
    pause, end, renewed = _FIRST_PAUSE, None, False
    while True:
        try:
            found = call()
        except Exception as error:
            if _code(error) == 401 and not renewed:  # a token that has just expired
                renewed = True
                continue
            known = translated(address, error)
            if not isinstance(known, Unavailable):
                if known is error:
                    raise
                raise known from error
            now = time.monotonic()
            end = now + PATIENCE if end is None else end
            if now >= end:
                raise OSError(
                    errno.ETIMEDOUT, f"{bucket} has not answered for {_minutes(PATIENCE)} ({known}); try again later"
                ) from error
            _tell(bucket, f"{bucket} does not answer ({known}); trying again for {_minutes(PATIENCE)}", True)
        else:
            if bucket in _down:
                _tell(bucket, f"{bucket} answers again", False)
            return found
        time.sleep(pause * (0.5 + os.urandom(1)[0] / 512))  # so that processes do not ask at the same moments
        pause = min(2 * pause, _LONGEST_PAUSE)


def _tell(bucket: str, line: str, down: bool) -> None:
    """Say once that a bucket does not answer, and once that it does."""
    with _telling:
        if (bucket in _down) == down:
            return
        if down:
            _down[bucket] = time.monotonic()
        else:
            del _down[bucket]
    say(line)


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{seconds:.0f} s"


def translated(address: str, error: Exception) -> Exception:
    """Return the error of a file system's library as one that says what to do; `Unavailable` if a retry may help."""
    text = " ".join(str(error).split())[:200] or type(error).__name__
    if isinstance(error, FileNotFoundError | FileExistsError | IsADirectoryError | NotADirectoryError):
        return error
    code = _code(error)
    refused = PermissionError(
        errno.EACCES, f"no permission ({text}); docs/object-storage.md says which credentials and roles are needed"
    )
    refused.filename = address
    if isinstance(error, PermissionError) or code in (401, 403) or text.startswith("Forbidden"):
        return refused
    kind = type(error)
    if "Credentials" in kind.__name__ or kind.__name__ in ("RefreshError", "TokenRetrievalError"):
        return refused
    if code is not None and (code in (408, 429) or code >= 500):
        return Unavailable(f"{code} {text.split(',')[0]}" if str(code) not in text else text)
    if isinstance(error, ConnectionError | TimeoutError) or (isinstance(error, OSError) and error.errno in _BUSY):
        return Unavailable(text)
    if kind.__module__.split(".")[0] in _MODULES and code is None:
        return Unavailable(f"{kind.__name__}: {text}")
    if kind.__module__.split(".")[0] in _MODULES:
        return OSError(errno.EIO, text, address)
    return error


_BUSY = (errno.EBUSY, errno.EIO, getattr(errno, "EREMOTEIO", errno.EIO), errno.ETIMEDOUT)  # macOS lacks one


def _code(error: BaseException) -> int | None:
    """Return the HTTP status of an error, or of the error that caused it."""
    found: Any = getattr(error, "code", None) or getattr(error, "status", None)
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode", found)
    if isinstance(found, str) and found.isdigit():
        found = int(found)
    if isinstance(found, int):
        return found
    return _code(error.__cause__) if error.__cause__ is not None else None
