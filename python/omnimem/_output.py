"""A folder that is written as a whole: files appear under their names when they are on disk.

Each file is written under another name, synced and renamed. What goes wrong, Ctrl-C included, takes
all that was written with it, so that nothing is left that looks like a result.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from .errors import DiskFullError

__all__ = ["OutputFile", "OutputFolder", "files_below", "refuse_inside"]

_PIECE = 16 << 20
"""Bytes of one write."""
_PAGE = 4096
"""What place and length of a write past the page cache are multiples of."""
_LAST = ("model.safetensors.index.json", "config.json")
"""Files that come last: a folder without them does not look whole."""


def files_below(root: Path) -> list[Path]:
    """Return the paths of all files in a folder, relative to it, links followed.

    Raises
    ------
    ValueError
        Something there is neither a file nor a folder, or a link leads back to where it lies.
    OSError
        A folder cannot be read.
    """
    found = []

    def fail(error: OSError) -> None:
        raise error

    for place, folders, files in os.walk(root, onerror=fail, followlinks=True):
        for name in folders:
            path = os.path.join(place, name)
            if os.path.islink(path) and _leads_back(path, place, root):
                raise ValueError(f"{path}: a link to a folder that holds it; take it away")
        for name in files:
            path = os.path.join(place, name)
            if not os.path.isfile(path):
                raise ValueError(f"{path}: is no regular file and cannot be copied; take it away")
            found.append(Path(os.path.relpath(path, root)))
    return sorted(found, key=lambda path: (path.as_posix() in _LAST, path))


def _leads_back(link: str, place: str, root: Path) -> bool:
    """Tell whether a link leads to one of the folders that were gone through on the way to it."""
    inside = Path(os.path.relpath(place, root))
    passed = [root / part for part in (inside, *inside.parents)]
    return os.path.realpath(link) in map(os.path.realpath, passed)


def refuse_inside(out: str | os.PathLike[str], root: Path) -> None:
    """Check that a folder to be written does not lie in the one that is copied.

    Raises
    ------
    ValueError
        It does.
    """
    if _holds(root, out):
        raise ValueError(f"{os.fspath(out)}: lies in {root}, which is copied; name another folder")


def _holds(folder: str | os.PathLike[str], path: str | os.PathLike[str]) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


class OutputFile:
    """A file that is being written, past the page cache where the file system allows it.

    (Measured: 1.3 GB/s against 0.27 through the cache, which also leaves no room for others.)
    """

    def __init__(self, place: Path, folder: Path) -> None:
        self.place = place
        """Where it is for now."""
        self._folder = folder
        self._descriptor = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self._direct = self._set_direct(True)
        self._buffer = mmap.mmap(-1, _PIECE)  # at a page
        self._held = 0

    def write(self, data: bytes | memoryview) -> None:
        """Append at the present place."""
        with memoryview(data) as whole, memoryview(self._buffer) as buffer:
            at = 0
            while at < len(whole):
                step = min(len(whole) - at, _PIECE - self._held)
                buffer[self._held : self._held + step] = whole[at : at + step]
                at += step
                self._held += step
                if self._held == _PIECE:
                    self._flush()

    def seek(self, offset: int) -> None:
        """Go on writing at `offset`."""
        self._flush()
        if offset % _PAGE:
            self._direct = self._direct and self._set_direct(False)
        os.lseek(self._descriptor, offset, os.SEEK_SET)

    def copy(self, source: Path, progress: Callable[[int], None]) -> None:
        """Append the bytes of a file; `progress` is called with the bytes of each piece."""
        with source.open("rb", buffering=0) as file:
            while piece := file.read(_PIECE):
                self.write(piece)
                progress(len(piece))

    def sync(self) -> None:
        """Wait until the bytes are on disk."""
        self._flush()
        with _full(self._folder):
            os.fsync(self._descriptor)

    def close(self) -> None:
        """Give the descriptor back; the buffer goes with the object."""
        os.close(self._descriptor)

    def _flush(self) -> None:
        at, end, self._held = 0, self._held, 0
        with memoryview(self._buffer) as buffer, _full(self._folder):
            while at < end:
                if (at | end) % _PAGE:
                    self._direct = self._direct and self._set_direct(False)
                try:
                    at += os.write(self._descriptor, buffer[at:end])
                except OSError as error:
                    if not self._direct or error.errno != errno.EINVAL:
                        raise
                    self._direct = self._set_direct(False)

    def _set_direct(self, on: bool) -> bool:
        """Turn O_DIRECT on, if that can be, or off; return what it is then."""
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        try:
            wanted = flags | os.O_DIRECT if on else flags & ~os.O_DIRECT
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, wanted)
        except OSError:
            return False
        return on


class OutputFolder:
    """A folder that is being written. A context manager.

    Parameters
    ----------
    out : path-like
        It is made, with its parents, or exists and is empty.

    Raises
    ------
    ValueError
        There is something.
    OSError
        It cannot be made or read.
    """

    def __init__(self, out: str | os.PathLike[str]) -> None:
        self.place = Path(out)
        self._made: list[Path] = []
        self._folders: list[Path] = []

    def __enter__(self) -> OutputFolder:
        if self.place.exists() and not self.place.is_dir():
            raise ValueError(f"{self.place}: is a file; name a folder that does not exist yet")
        if self.place.is_dir() and any(self.place.iterdir()):
            raise ValueError(
                f"{self.place}: is not empty, and nothing in it is replaced; name another folder "
                "or empty this one"
            )
        self._make(self.place)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            for folder in {path.parent for path in (*self._made, *self._folders)}:
                _sync_folder(folder)
            return
        for path in reversed(self._made):
            with suppress(OSError):
                path.unlink(missing_ok=True)
        for folder in reversed(self._folders):
            with suppress(OSError):
                folder.rmdir()

    @contextmanager
    def file(self, name: Path) -> Iterator[OutputFile]:
        """Open a file, by its path in the folder; it has that name once the block has ended."""
        place = self.place / name
        self._make(place.parent)
        unfinished = place.with_name(f".{place.name}.partial")
        self._made.append(unfinished)
        with _full(self.place):
            file = OutputFile(unfinished, self.place)
        try:
            yield file
            file.sync()
        finally:
            file.close()
        self._made.append(place)
        unfinished.replace(place)

    def _make(self, folder: Path) -> None:
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        for path in reversed(missing):
            with _full(self.place):
                path.mkdir()
            self._folders.append(path)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _full(folder: Path) -> Iterator[None]:
    """Make an error of a full disk say where, and what next."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(folder).free if folder.exists() else 0
        full = DiskFullError(
            f"{folder}: no room for what is being written ({free} bytes free), so all of it was "
            "taken away; make room, or name a folder on another file system"
        )
        full.errno = error.errno
        raise full from error
