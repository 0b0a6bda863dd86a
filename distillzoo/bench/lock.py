"""One process at a time on an output folder: a lock that the system drops when its holder dies."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from distillzoo.errors import OptionError

if sys.platform != "win32":
    import fcntl

__all__ = ["LOCK_NAME", "folder_lock"]

LOCK_NAME = ".lock"


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold a folder for this process: two that train the same runs would write over each other.

    The lock is the system's, on the file ``.lock``; the text in it only says who holds it. A file that a dead process has left is
    held by nobody and is taken over, whatever runs under its number today.

    Args:
        folder: The output folder, which exists.
    Raises:
        OptionError: If another process holds it.
    """
    handle = _take(folder / LOCK_NAME)
    try:
        yield
    finally:
        if handle is not None:
            with suppress(OSError):
                (folder / LOCK_NAME).unlink()  # before it is let go: whoever waits finds its file gone and makes a new one
            handle.close()


def _take(path: Path) -> IO[str] | None:
    """Return the open file that holds the lock; ``None`` where the system or its file system knows no such locks."""
    if sys.platform == "win32":
        return None
    while True:
        try:
            handle = path.open("a+", encoding="utf-8")
        except OSError:  # read-only: whoever wants to write there says so
            return None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.seek(0)
            holder = _holder(handle.read())
            handle.close()
            raise OptionError(
                f"The output folder {str(path.parent)!r} is in use by {holder}, and two runs on one folder would write over each "
                "other; wait for its end, or name another folder with --output."
            ) from None
        except OSError:  # some network file systems have no locks
            handle.close()
            return None
        if _same_file(path, handle):
            handle.seek(0)
            handle.truncate()
            since = datetime.now(UTC).isoformat(timespec="seconds")
            json.dump({"pid": os.getpid(), "host": socket.gethostname(), "since": since}, handle)
            handle.flush()
            return handle
        handle.close()  # its holder ended between the two calls and took the file away


def _same_file(path: Path, handle: IO[str]) -> bool:
    try:
        return path.stat().st_ino == os.fstat(handle.fileno()).st_ino
    except FileNotFoundError:
        return False


def _holder(text: str) -> str:
    """Say who holds the lock, as far as the file tells."""
    try:
        found = json.loads(text)
        return f"process {int(found['pid'])} on {found['host']} since {found['since']}"
    except (ValueError, KeyError, TypeError):
        return "another process"
