"""A patch of etils that gives orbax the storage layer of this package for addresses, with its retries.

Arrays on gs:// bypass it: TensorStore's own driver retries for a quarter of an hour while a bucket does not answer.
"""

from __future__ import annotations

import os
from typing import Any, cast

from etils.epath import backend, gpath, stat_utils

from mmrf_jax.io import retries
from mmrf_jax.io.storage import RemotePath

_SCHEMES = ("gs", "s3", "az")
#: Without them TensorStore waits for ever for an answer that does not come.
_LIMITS = {
    "TENSORSTORE_CURL_CONNECT_TIMEOUT_SECONDS": "20",
    "TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES": "1",
    "TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS": "60",
}


def _at(path: Any) -> RemotePath:
    return RemotePath(os.fspath(path))


class _Backend(backend.Backend):
    """File operations of etils on addresses. Folders exist while they hold an object."""

    def open(self, path, mode):
        return _at(path).open(mode)

    def exists(self, path):
        return _at(path).exists()

    def isdir(self, path):
        return _at(path).is_dir()

    def listdir(self, path):
        return list(_at(path).names())

    def glob(self, path):
        found = _at(path)
        return [os.fspath(match) for match in found.parent.glob(found.name)]

    def walk(self, top, *, top_down=True, on_error=None):
        raise NotImplementedError

    def makedirs(self, path, *, exist_ok=False, mode=None):
        if not exist_ok and self.exists(path):
            raise FileExistsError(f"{path} exists")

    mkdir = makedirs

    def rmtree(self, path):
        _at(path).remove()

    def remove(self, path):
        _at(path).unlink()

    def rename(self, path, dst):
        if self.exists(dst):
            raise FileExistsError(f"{dst} exists")
        self.replace(path, dst)

    def replace(self, path, dst):
        _at(dst).write_bytes(_at(path).read_bytes())
        _at(path).unlink()

    def copy(self, path, dst, overwrite):
        if not overwrite and self.exists(dst):
            raise FileExistsError(f"{dst} exists")
        _at(dst).write_bytes(_at(path).read_bytes())

    def stat(self, path):
        remote = _at(path)
        size = 0 if (folder := remote.is_dir()) else remote.stat().st_size
        return stat_utils.StatResult(is_directory=folder, length=size, mtime=0, owner=None, group=None, mode=None)


def use_storage() -> None:
    """Make etils, and with it orbax, use `io.storage` for addresses, in this process."""
    from orbax.checkpoint._src.path import gcs_utils

    for name, value in _LIMITS.items():
        os.environ.setdefault(name, value)
    for scheme in _SCHEMES:
        cast(Any, gpath)._PREFIX_TO_BACKEND[scheme] = _Backend()
    # Orbax asks for the bucket's settings, which the roles of object users do not allow, to delete empty folders.
    gcs_utils.is_hierarchical_namespace_enabled = lambda path: False  # type: ignore[assignment]
    retries.filesystem("gs")
