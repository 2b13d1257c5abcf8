"""The cubin cache on disk: entries are whole or absent, and nobody else can write them."""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
import warnings
from pathlib import Path
from typing import NamedTuple

from ..errors import CompileError

_MAGIC = b"qkrope-cubin-1\n"
_DIGEST = 32
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


class Entry(NamedTuple):
    """A cubin and what ptxas said of it."""

    cubin: bytes
    log: str


def directory() -> Path:
    """QKROPE_CACHE_DIR, else $XDG_CACHE_HOME/qkrope, else ~/.cache/qkrope. Not created here."""
    named = os.environ.get("QKROPE_CACHE_DIR")
    if named:
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "qkrope"


def _checked(create: bool) -> Path | None:
    """The directory, refused where someone else could have put code into it."""
    path = directory()
    if create:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        info = path.stat()
    except FileNotFoundError:
        return None
    if info.st_uid != os.getuid() or info.st_mode & _OTHERS_WRITE:
        raise CompileError(
            f"cache directory {path}: expected one that you own and only you can write, got owner "
            f"{info.st_uid} and mode {stat.filemode(info.st_mode)}; fix it or set QKROPE_CACHE_DIR"
        )
    return path


def _path(folder: Path, key: str) -> Path:
    return folder / f"{key}.cubin"


def read(key: str) -> Entry | None:
    """The entry of a key; one that is missing, unreadable, truncated or altered is a miss."""
    try:
        folder = _checked(create=False)
        if folder is None:
            return None
        return parse(_path(folder, key).read_bytes())
    except OSError:
        return None


def parse(data: bytes) -> Entry | None:
    """The entry that a file holds; None where it is truncated or altered."""
    body = data[len(_MAGIC) + _DIGEST :]
    if data[: len(_MAGIC)] != _MAGIC:
        return None
    if hashlib.sha256(body).digest() != data[len(_MAGIC) : len(_MAGIC) + _DIGEST]:
        return None
    size = int.from_bytes(body[:4], "little")
    return Entry(cubin=body[4 + size :], log=body[4 : 4 + size].decode())


def write(key: str, entry: Entry) -> Path | None:
    """Publishes an entry by rename. A disk that refuses costs only the next compile: it warns."""
    log = entry.log.encode()
    body = len(log).to_bytes(4, "little") + log + entry.cubin
    try:
        folder = _checked(create=True)
        assert folder is not None
        handle, staged = tempfile.mkstemp(dir=folder, prefix=".staging-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(_MAGIC + hashlib.sha256(body).digest() + body)
            path = _path(folder, key)
            Path(staged).replace(path)
        except BaseException:
            Path(staged).unlink(missing_ok=True)
            raise
    except OSError as error:
        # The same text each time, without the staged name: Python then says it once.
        text = f"qkrope keeps no compiled kernels in {directory()}: {error.strerror or error}"
        warnings.warn(text, RuntimeWarning, stacklevel=3)
        return None
    return path


def entries() -> list[Path]:
    """The files of every entry, oldest first."""
    folder = directory()
    found = [p for p in folder.glob("*.cubin") if p.is_file()] if folder.is_dir() else []
    return sorted(found, key=lambda p: p.stat().st_mtime)


def clear() -> int:
    """Deletes every entry and leftover; returns how many entries there were."""
    found = entries()
    for path in found:
        path.unlink(missing_ok=True)
    if directory().is_dir():
        for path in directory().glob(".staging-*"):
            path.unlink(missing_ok=True)
    return len(found)
