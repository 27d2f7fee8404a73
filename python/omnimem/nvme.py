"""The I/O side of a swapper: where its swap file lies, how much is in flight, how fast it is."""

from __future__ import annotations

import os
from typing import Any

from omnimem._storage import default_directory, free_bytes, ram_file_system
from omnimem.config import StoreConfig, parse_size
from omnimem.store import Store

__all__ = ["NVMeOptimizer"]

_LEAST_REQUEST, _MOST_REQUEST, _MOST_WINDOW = 64 << 10, 1 << 20, 1 << 30
_KEPT_FREE = 0.05


class NVMeOptimizer:
    """Settings and statistics of the I/O engine that a swapper uses.

    Parameters
    ----------
    block_size : int or str
        Bytes of the blocks that are moved, 4 KiB to 1 GiB. With `max_concurrent_swaps` it makes
        the window: the bytes in flight, which decide the throughput of flash. Requests are of
        at most 1 MiB. Blocks of any size can be registered.
    swap_directory : path, optional
        Where the swap file lies: a nameless file in a private folder (mode 0700) of ours, which
        is gone with the process however that ends. By default `$XDG_CACHE_HOME/omnimem`,
        `~/.cache/omnimem` or `/var/tmp`, the first that can be written and is no memory. It can
        be set until the first block is written out.
    max_concurrent_swaps : int
        Blocks in flight at a time, 1 to 256; the others wait for their turn.
    allow_ram_file_system : bool
        Take a directory that lies in RAM (tmpfs): swapping there frees no memory.

    Raises
    ------
    ValueError
        A value outside its bounds, or a directory on a RAM file system.
    """

    def __init__(
        self,
        block_size: int | str = "4MiB",
        swap_directory: str | os.PathLike[str] | None = None,
        max_concurrent_swaps: int = 4,
        *,
        allow_ram_file_system: bool = False,
    ) -> None:
        self._block_size = parse_size(block_size, "block_size")
        if not 4096 <= self._block_size <= _MOST_WINDOW:
            raise ValueError(f"block_size={block_size} must lie between 4 KiB and 1 GiB")
        if not 1 <= max_concurrent_swaps <= 256:
            raise ValueError(
                f"max_concurrent_swaps={max_concurrent_swaps} must lie between 1 and 256"
            )
        self._concurrent = max_concurrent_swaps
        self._allow_ram = allow_ram_file_system
        self._store: Store | None = None
        self._limit = 0
        self._asked = 0
        self._directory = self._check(
            default_directory() if swap_directory is None else swap_directory
        )

    @property
    def block_size(self) -> int:
        """Bytes of the blocks that are moved."""
        return self._block_size

    @property
    def max_concurrent_swaps(self) -> int:
        """Blocks in flight at a time."""
        return self._concurrent

    @property
    def swap_directory(self) -> str:
        """Where the swap file lies, or will lie."""
        return self._directory

    @swap_directory.setter
    def swap_directory(self, directory: str | os.PathLike[str]) -> None:
        where = self._check(directory)
        if self._store is not None:
            self._store._disk(where, self._fit(where, self._asked))
        self._directory = where
        self._limit = self._fit(where, self._asked)

    def get_swap_stats(self) -> dict[str, Any]:
        """How the engine does, from the core's counters.

        Returns
        -------
        dict
            active_swaps : copies on their way now; max_concurrent_swaps; block_size : bytes;
            swap_directory : str;
            read_bytes, written_bytes : of the device, alignment included;
            read_gbps, write_gbps : GB/s (10^9) while at least one request was in flight;
            read_latency_p50, read_latency_p99, write_latency_p50, write_latency_p99 : seconds of
            one request of at most 1 MiB, from its issue on, right to 19 %; 0.0: there was none;
            queue_depth, max_queue_depth : requests in flight now, and at most;
            io_errors : requests that failed for good;
            backend, backend_reason : "uring" or "threads", and why; None before the first use.
        """
        stats = None if self._store is None else self._store.stats()

        def rate(nbytes: int, seconds: float) -> float:
            return nbytes / seconds / 1e9 if seconds else 0.0

        return {
            "active_swaps": stats.moves if stats else 0,
            "max_concurrent_swaps": self._concurrent,
            "block_size": self._block_size,
            "swap_directory": self._directory,
            "read_bytes": stats.read_bytes if stats else 0,
            "written_bytes": stats.written_bytes if stats else 0,
            "read_gbps": rate(stats.read_bytes, stats.read_busy_seconds) if stats else 0.0,
            "write_gbps": rate(stats.written_bytes, stats.write_busy_seconds) if stats else 0.0,
            "read_latency_p50": stats.read_latency[0] if stats else 0.0,
            "read_latency_p99": stats.read_latency[1] if stats else 0.0,
            "write_latency_p50": stats.write_latency[0] if stats else 0.0,
            "write_latency_p99": stats.write_latency[1] if stats else 0.0,
            "queue_depth": stats.io_in_flight if stats else 0,
            "max_queue_depth": stats.io_depth if stats else self._window() // self._request(),
            "io_errors": stats.io_errors if stats else 0,
            "backend": stats.io_backend if stats else None,
            "backend_reason": stats.io_reason if stats else None,
        }

    # -- for the swapper -------------------------------------------------------------------------

    def _open(self, host_limit: int, swap_limit: int, io_backend: str) -> Store:
        """The store of a swapper; an optimizer has one."""
        if self._store is not None:
            raise ValueError("this NVMeOptimizer belongs to another swapper: make one for each")
        self._asked = swap_limit
        self._limit = self._fit(self._directory, swap_limit)
        self._store = Store(
            StoreConfig(
                host_limit=host_limit,
                disk_limit=self._limit,
                directory=self._directory,
                io_backend=io_backend,
                io_window=self._window(),
                io_request=self._request(),
            )
        )
        return self._store

    def _join(self, store: Store) -> None:
        """Speak for a store that a swapper shares."""
        if self._store is not None:
            raise ValueError("this NVMeOptimizer belongs to another swapper: make one for each")
        self._store = store
        if store.config.directory is not None:
            self._directory = os.fspath(store.config.directory)
        self._asked = self._limit = parse_size(store.config.disk_limit)

    def _set_limit(self, swap_limit: int) -> None:
        self._asked = swap_limit
        self._limit = self._fit(self._directory, swap_limit)
        if self._store is not None:
            self._store._disk(None, self._limit)

    def _request(self) -> int:
        return max(_LEAST_REQUEST, min(_MOST_REQUEST, self._block_size // 4096 * 4096))

    def _window(self) -> int:
        window = self._block_size * self._concurrent
        return max(self._request(), min(window, _MOST_WINDOW))

    def _fit(self, directory: str, swap_limit: int) -> int:
        """What of a limit the directory has room for, with a part kept free."""
        used = self._store.stats().disk.mapped_bytes if self._store is not None else 0
        return min(swap_limit, used + int(free_bytes(directory) * (1 - _KEPT_FREE)))

    def _check(self, directory: str | os.PathLike[str]) -> str:
        where = os.path.abspath(os.fspath(directory))
        ram = None if self._allow_ram else ram_file_system(where)
        if ram is not None:
            raise ValueError(
                f"swap_directory={where!r} lies on {ram}, which is memory: swapping there frees "
                "none; choose a directory on a disk, or pass allow_ram_file_system=True"
            )
        return where
