"""Packed checkpoints: every tensor in a lossless encoding, smaller on disk and faster to read.

``pack`` writes a folder that ``omnimem.checkpoint.open`` and ``omnimem.torch.load`` take like the
original; ``unpack`` makes the original files again, byte for byte, and proves it by their SHA-256.
``_packed_header`` says what a packed file is. Both read in place through a store, a bounded number
of bytes at a time, encode or decode on several threads, and write in order. A file appears under
its name when it is whole and on disk; what goes wrong leaves nothing behind.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from . import checkpoint
from ._output import OutputFile, OutputFolder, files_below, refuse_inside
from ._packed_header import CODINGS, build_header, header_room, read_shard
from .errors import CorruptError, FormatError

if TYPE_CHECKING:
    from . import Lease, Store
    from ._safetensors import Header, TensorInfo

__all__ = ["Summary", "pack", "unpack"]

_WINDOW = 256 << 20
"""Plain bytes at work at a time, beside the largest tensor's."""
_AHEAD = 64
"""Tensors at work at a time."""
_SLACK = 64 << 20
"""Memory of a store beside the bytes at work: their alignment, its segments."""

_T = TypeVar("_T")
_Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Summary:
    """What ``pack`` or ``unpack`` did."""

    folder: Path
    """Where the files are."""
    files: int
    """Safetensors files that were packed or unpacked; the others were copied."""
    plain_bytes: int
    """Bytes of these files, unpacked."""
    packed_bytes: int
    """Bytes of these files, packed."""
    seconds: float
    """How long it took."""

    @property
    def ratio(self) -> float:
        """How many times smaller the packed files are."""
        return self.plain_bytes / self.packed_bytes if self.packed_bytes else 1.0


def pack(
    model_dir: str | os.PathLike[str],
    out: str | os.PathLike[str],
    coding: str = "balanced",
    progress: _Progress | None = None,
    threads: int | None = None,
) -> Summary:
    """Write a packed copy of a checkpoint.

    Parameters
    ----------
    model_dir : path-like
        A folder that ``omnimem.checkpoint.open`` takes, or one safetensors file.
    out : path-like
        The folder to write, which must not exist or be empty. Files keep their names; all that is
        not a shard is copied as it is.
    coding : str
        "balanced", the denser one, or "fast", which takes less time to decode.
    progress : callable, optional
        Called with the bytes done and the bytes to do.
    threads : int, optional
        That encode; by default one a CPU that this process may use.

    Returns
    -------
    Summary
        Bytes before and after, seconds.

    Raises
    ------
    ValueError
        An unknown coding, a checkpoint that is packed already, `out` not empty or inside
        `model_dir`.
    FormatError
        The checkpoint breaks its format.
    CorruptError
        A file changed meanwhile, or an encoded form does not decode to the bytes it is made of.
    DiskFullError
        No room in `out`. Nothing is left there.
    """
    if coding not in CODINGS:
        raise ValueError(f"coding={coding!r} must be one of {', '.join(CODINGS)}")
    with checkpoint.open(model_dir) as opened:
        packed = [path for path in opened.files if read_shard(Path(path)).packing]
        if packed:
            raise ValueError(
                f"{packed[0]}: is packed already; `omnimem unpack` makes the original of it"
            )
        work = partial(_pack_file, coding=coding)
        return _convert(opened, opened.files, out, progress, threads, work)


def unpack(
    model_dir: str | os.PathLike[str],
    out: str | os.PathLike[str],
    progress: _Progress | None = None,
    threads: int | None = None,
) -> Summary:
    """Write the original files of a packed checkpoint.

    Parameters
    ----------
    model_dir : path-like
        A folder that ``pack`` wrote, or one safetensors file of it.
    out : path-like
        The folder to write, which must not exist or be empty.
    progress : callable, optional
        Called with the bytes done and the bytes to do.
    threads : int, optional
        That decode; by default one a CPU that this process may use.

    Returns
    -------
    Summary
        Bytes before and after, seconds.

    Raises
    ------
    ValueError
        Nothing there is packed, `out` is not empty or inside `model_dir`.
    FormatError
        The checkpoint breaks its format.
    CorruptError
        A form is damaged, or a file would not be the one that was packed.
    DiskFullError
        No room in `out`. Nothing is left there.
    """
    with checkpoint.open(model_dir) as opened:
        packed = [path for path in opened.files if read_shard(Path(path)).packing]
        if not packed:
            raise ValueError(
                f"{opened.path}: is not packed, so there is nothing to unpack; `omnimem pack` "
                "packs it"
            )
        return _convert(opened, packed, out, progress, threads, _unpack_file)


# ---- one file ----


def _pack_file(path: Path, file: OutputFile, work: _Work, coding: str) -> tuple[int, int]:
    """Write the packed form of a file; return its bytes, unpacked and packed."""
    from . import _core

    def encode(lease: Lease) -> bytes:
        form = _core.encode(lease, coding=coding) or _core.encode(lease, coding="none")
        assert form is not None
        _core._coded_compare(form, lease)
        return form

    header = read_shard(path).header
    room = header_room(header, coding, path)
    digest = hashlib.sha256(_beginning(header))
    forms = dict.fromkeys(header.tensors, 0)
    file.seek(room)
    for name, lease, form in work.run(header.tensors, encode):
        with lease, memoryview(lease) as plain:
            digest.update(plain)
        file.write(form)
        forms[name] = len(form)
        work.advance(header.tensors[name].nbytes)
    file.seek(0)
    file.write(build_header(header, coding, digest.hexdigest(), forms, room))
    file.sync()
    packing = read_shard(file.place).packing
    if packing is None or packing.original.raw != header.raw:
        raise FormatError(f"{path}: its packed form does not describe it; please report this")
    return header.size, room + sum(forms.values())


def _unpack_file(path: Path, file: OutputFile, work: _Work) -> tuple[int, int]:
    """Write the original of a packed file; return its bytes, unpacked and packed."""
    shard = read_shard(path)
    packing = shard.packing
    if packing is None:
        raise CorruptError(f"{path}: changed since it was opened; unpack it again")
    beginning = _beginning(packing.original)
    digest = hashlib.sha256(beginning)
    file.write(beginning)
    for name, lease, _ in work.run(shard.tensors, lambda lease: None):
        with lease, memoryview(lease) as plain:
            digest.update(plain)
            file.write(plain)
        work.advance(shard.tensors[name].nbytes)
    if digest.hexdigest() != packing.sha256:
        raise CorruptError(
            f"{path}: would be unpacked to another file than was packed (SHA-256 "
            f"{digest.hexdigest()}, kept {packing.sha256}); fetch it, or pack the original again"
        )
    return packing.original.size, shard.header.size


def _beginning(header: Header) -> bytes:
    return len(header.raw).to_bytes(8, "little") + header.raw


# ---- the folder ----


def _convert(
    opened: checkpoint.Checkpoint,
    shards: list[str],
    out: str | os.PathLike[str],
    progress: _Progress | None,
    threads: int | None,
    convert: Callable[[Path, OutputFile, _Work], tuple[int, int]],
) -> Summary:
    """Convert some files of a checkpoint, copy all others that are in its folder."""
    started = time.monotonic()
    root = opened.path if opened.path.is_dir() else opened.path.parent
    names = {Path(os.path.relpath(shard, root)) for shard in shards}
    others = []
    if opened.path.is_dir():
        refuse_inside(out, root)
        others = [name for name in files_below(root) if name not in names]
    total = sum(info.nbytes for info in map(opened.info, opened.names()) if info.file in shards)
    total += sum((root / name).stat().st_size for name in others)
    plain = packed = 0
    with OutputFolder(out) as folder, _Work(opened, threads, progress, total) as work:
        for name in sorted(names):
            with folder.file(name) as file:
                before, after = convert(root / name, file, work)
                opened.check_unchanged(os.fspath(root / name))
            plain, packed = plain + before, packed + after
        for name in others:
            with folder.file(name) as file:
                file.copy(root / name, work.advance)
    return Summary(folder.place, len(names), plain, packed, time.monotonic() - started)


class _Work:
    """Reads tensors ahead, has threads work on them, and gives them back in order."""

    def __init__(
        self,
        opened: checkpoint.Checkpoint,
        threads: int | None,
        progress: _Progress | None,
        total: int,
    ) -> None:
        if threads is None:
            threads = len(os.sched_getaffinity(0))
        if threads < 1:
            raise ValueError(f"threads={threads} must be at least 1")
        from . import Store, StoreConfig

        costs = (_cost(opened.info(name)) for name in opened.names())
        self._window = _WINDOW + max(costs, default=0)
        self._store: Store = Store(StoreConfig(host_limit=self._window + _SLACK, disk_limit=0))
        self._pool = ThreadPoolExecutor(threads, "omnimem-pack")
        self._progress = progress
        self._done, self._total = 0, total

    def run(
        self, tensors: dict[str, TensorInfo], task: Callable[[Lease], _T]
    ) -> Iterator[tuple[str, Lease, _T]]:
        """Give each tensor that has bytes, its lease, and what the task made of it."""
        todo = deque(name for name, info in tensors.items() if info.nbytes)
        waiting: deque[tuple[str, Future[tuple[Lease, _T]]]] = deque()
        at_work = 0
        try:
            while todo or waiting:
                while todo and len(waiting) < _AHEAD:
                    cost = _cost(tensors[todo[0]])
                    if waiting and at_work + cost > self._window:
                        break
                    at_work += cost
                    name = todo.popleft()
                    checkpoint.add_tensor(self._store, name, tensors[name])
                    self._store.prefetch([name])
                    waiting.append((name, self._pool.submit(self._work, name, task)))
                name, future = waiting[0]
                lease, made = future.result()
                yield name, lease, made
                del lease, made, future
                waiting.popleft()
                at_work -= _cost(tensors[name])
        finally:
            for _, future in waiting:
                future.cancel()

    def _work(self, name: str, task: Callable[[Lease], _T]) -> tuple[Lease, _T]:
        lease = self._store.lease(name, timeout=None)
        self._store.remove(name)
        return lease, task(lease)

    def advance(self, nbytes: int) -> None:
        """Report bytes that are done."""
        self._done += nbytes
        if self._progress is not None:
            self._progress(self._done, self._total)

    def __enter__(self) -> _Work:
        return self

    def __exit__(self, *exc: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._store.close()


def _cost(info: TensorInfo) -> int:
    return info.nbytes + (info.encoded_nbytes or 0)
