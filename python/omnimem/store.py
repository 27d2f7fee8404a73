"""The store: named blocks of bytes in RAM and on disk, and the rights to touch them."""

from __future__ import annotations

import atexit
import os
import threading
import warnings
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any

from omnimem import _core
from omnimem.config import StoreConfig, parse_size

__all__ = [
    "BlockInfo",
    "Event",
    "GroupStats",
    "Pressed",
    "Store",
    "StoreStats",
    "TierStats",
    "Usage",
]


@dataclass(frozen=True, slots=True)
class BlockInfo:
    """What a store knows of one block (`Store.info`)."""

    nbytes: int
    """Bytes of the block."""
    tiers: tuple[str, ...]
    """Where a whole copy is: "host", "disk" (the swap file)."""
    leases: int
    """Leases and views that hold it."""
    origin: str | None
    """Path of the first file range that holds the bytes; None: they came by `add` or `take`."""
    origin_offset: int
    """Where they begin in that file."""
    origin_count: int
    """File ranges."""
    dtype: str | None
    """Remembered element type as NumPy and torch spell it; None: unknown."""
    shape: tuple[int, ...] | None
    """Remembered shape; None: unknown."""
    group: str
    """The group that it belongs to."""


@dataclass(frozen=True, slots=True)
class TierStats:
    """Bytes of one tier."""

    used_bytes: int = 0
    """Held by copies of blocks."""
    peak_bytes: int = 0
    """The most that was ever used."""
    limit_bytes: int = 0
    """What may be used."""
    mapped_bytes: int = 0
    """Taken from the system: memory segments with their caches, or the swap file's size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupStats:
    """Counters of one group of blocks (`Store.group_stats`): bytes, seconds, events.

    Those from `hits` on are the sums of the events that `Store.events` shows the last of.
    """

    blocks: int
    """Blocks with a name."""
    pinned: int
    """Of these, pinned."""
    swapped: int
    """Of these, with their only bytes below memory, where the store wrote them."""
    leases: int
    """Leases that are out."""
    host_bytes: int
    """Memory that their copies hold."""
    host_peak_bytes: int
    """The most that was ever held."""
    idle_bytes: int
    """Of `host_bytes`, those that may go now."""
    spare_bytes: int
    """Of `idle_bytes`, those of blocks that lie in files: they go for nothing."""
    missing_bytes: int
    """Bytes of blocks that are not in memory; those of which only an encoded form is are not."""
    disk_bytes: int
    """Bytes of the swap file that their copies hold."""
    limit_bytes: int
    """The most that `host_bytes` may be; 0: only the store's limit binds."""
    packed_bytes: int
    """Of `host_bytes`, those of encoded forms."""
    gone_bytes: int
    """Memory of blocks that lost their names while somebody holds them; not in `host_bytes`."""
    evictions: int
    """Of a cache: entries that made way."""
    issued: int
    """Blocks fetched because they were foretold."""
    used: int
    """Of these, used."""
    recent: int
    """Accesses remembered, 1024 at most; the next three are of these."""
    reused: int
    """Those of a block that had been accessed within as many before."""
    repeated: int
    """Those that went on with the block just accessed."""
    foretold: int
    """Those that the order of accesses had foretold."""
    hits: int
    """Accesses that found the bytes in memory."""
    misses: int
    """Accesses that did not."""
    outs: int
    """Copies that left memory for a lower tier."""
    ins: int
    """Copies that came back from one."""
    out_bytes: int
    """Written for that; nothing where the lower copy was still good."""
    in_bytes: int
    """Read for that."""
    out_seconds: float
    """From the decision until the copy was written, summed over the copies."""
    in_seconds: float
    """From the request until the bytes were proven, summed over the copies."""
    trouble: str
    """Why the last swapping out stopped before it had freed enough; "": it did not."""

    @classmethod
    def nothing(cls) -> GroupStats:
        """Of a group that is gone."""
        counters: dict[str, Any] = dict.fromkeys((f.name for f in fields(cls)), 0)
        return cls(**{**counters, "out_seconds": 0.0, "in_seconds": 0.0, "trouble": ""})


@dataclass(frozen=True, slots=True)
class Usage:
    """When a group is used as a whole (`Store.usage`). Moments are those of `time.monotonic`."""

    uses: int
    """Uses ever."""
    recent: int
    """Of the last 64, those that began within the window."""
    busy: int
    """Uses that have begun and not ended."""
    first: float
    """When the first one began; 0.0: there was none."""
    last: float
    """When the last one began."""
    next: float
    """When it is expected to be used next: now while it is in use, else after as many turns (runs
    of uses, of any group) as usual, as long as turns took of late. 0.0: it never was."""
    gap: float
    """Seconds between the beginnings of runs, the median of the last ones; 0.0: unknown. Uses
    within a second of each other, without another group's between, are one run."""


@dataclass(frozen=True, slots=True)
class Pressed:
    """What a store gave up (`Store.press`)."""

    trimmed_bytes: int
    """Memory that no block used."""
    dropped_bytes: int
    """Memory of blocks that lie elsewhere too."""
    dropped_blocks: int
    """Those blocks."""
    written_bytes: int
    """Memory of blocks that were written to the swap file."""
    written_blocks: int
    """Those blocks."""
    left_bytes: int
    """Of blocks that may still go."""


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a block (`Store.events`)."""

    number: int
    """Events are numbered from 0."""
    time: float
    """Seconds of `time.monotonic`."""
    kind: str
    """"hit", "miss", "out", "in", or "packed_out", "packed_in": of a block's encoded form."""
    group: str
    """Its group."""
    block: str
    """The beginning of its name."""
    nbytes: int
    """Bytes moved."""
    seconds: float
    """How long it took."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreStats:
    """Counters of a store since it was opened (`Store.stats`): bytes, seconds, events."""

    host: TierStats
    """RAM."""
    disk: TierStats
    """The swap file; files that are read in place do not count."""
    packed: TierStats = TierStats()
    """Of `host`: encoded forms of blocks, in use; the limit and what is mapped are
    those of both."""
    gpu: Mapping[str, TierStats] = field(default_factory=lambda: MappingProxyType({}))
    """By device."""
    idle_bytes: int
    """Of `host`, bytes that may go now: `host.used_bytes - idle_bytes` are held."""
    spare_bytes: int
    """Of `idle_bytes`, those of blocks that lie in files: they go for nothing."""
    exported_bytes: int
    """Bytes of blocks that some consumer can still see (buffers, DLPack)."""
    blocks: int
    """Blocks with a name."""
    leases: int
    """Leases that are out."""
    hits: int
    """Leases that found the bytes in memory."""
    misses: int
    """Leases that did not."""
    fills: int
    """Copies brought into memory."""
    drops: int
    """Copies dropped for free: the bytes are elsewhere."""
    writes: int
    """Copies written to the swap file."""
    read_bytes: int
    """Read from devices, alignment included."""
    written_bytes: int
    """Written to the swap file, alignment included."""
    read_busy_seconds: float
    """With at least one read in flight."""
    write_busy_seconds: float
    """With at least one write in flight."""
    read_latency: tuple[float, float]
    """Seconds that half, and 99 %, of the read requests (1 MiB at most) did not exceed."""
    write_latency: tuple[float, float]
    """The same of write requests."""
    stall_seconds: float
    """Threads waited for bytes."""
    prefetches: int
    """Blocks fetched ahead."""
    prefetch_hits: int
    """Of those, used."""
    prefetch_waste: int
    """Of those, dropped unused."""
    verified_bytes: int
    """Hashed on the way in."""
    rereads: int
    """Blocks read a second time because their checksum differed."""
    corrupt: int
    """Checksums that differed."""
    io_errors: int
    """Requests that failed for good."""
    io_in_flight: int
    """Requests in flight now."""
    io_depth: int
    """Requests in flight at most."""
    moves: int
    """Copies of blocks on their way now."""
    io_backend: str
    """"uring" or "threads"."""
    io_reason: str
    """Why that one."""
    io_fell_back: bool
    """io_uring was wanted and denied."""


class Store(_core.Store):
    """Named blocks of bytes in RAM and on disk, within byte limits.

    Parameters
    ----------
    config : StoreConfig, optional
        Limits and I/O; by default `StoreConfig.from_env`.

    Raises
    ------
    IOFailure
        The directory of the swap file cannot be used, or io_uring was demanded and denied.

    Warns
    -----
    RuntimeWarning
        Once a process, when "auto" fell back to the thread back end; the text says why.

    Notes
    -----
    A context manager. All methods may be called from any thread; those that wait let others run,
    see Ctrl-C, and end at their `timeout` (seconds, None: never) with `BusyError`. After a fork the
    child's calls raise `ClosedError`. A store that is dropped without `close` closes itself.
    """

    def __init__(self, config: StoreConfig | None = None) -> None:
        if config is None:
            config = StoreConfig.from_env()
        elif not isinstance(config, StoreConfig):
            raise TypeError(f"config must be a StoreConfig, not {type(config).__name__}")
        super().__init__(
            parse_size(config.host_limit),
            parse_size(config.disk_limit),
            config.directory,
            config.io_backend,
            config.verify,
            parse_size(config.io_window),
            parse_size(config.io_request),
            config.io_threads,
        )
        self._config = config
        _open_stores.add(self)
        stats = super()._stats()
        if stats["io_fell_back"]:
            _warn_fallback(stats["io_reason"])

    @property
    def config(self) -> StoreConfig:
        """What the store was opened with."""
        return self._config

    def info(self, name: str) -> BlockInfo:
        """What is known of a block.

        Raises
        ------
        KeyError
            No block has that name.
        """
        return BlockInfo(*self._info(name))

    def stats(self) -> StoreStats:
        """Bytes by tier, and counters."""
        values: dict[str, Any] = self._stats()
        values["host"] = TierStats(*values["host"])
        values["disk"] = TierStats(*values["disk"])
        values["packed"] = replace(
            values["host"],
            used_bytes=values.pop("packed_bytes"),
            peak_bytes=values.pop("packed_peak_bytes"),
        )
        return StoreStats(**values)

    def group_stats(self, group: str = "default") -> GroupStats:
        """Counters of one group. Takes no longer with more blocks."""
        return GroupStats(**self._group_stats(group))

    def usage(self, group: str, window: float = 300.0) -> Usage:
        """When a group was used as a whole (`use_begin`), and is expected to be used next.

        Parameters
        ----------
        group : str
            Its name.
        window : float
            Seconds within which uses count as recent.
        """
        return Usage(*self._usage(group, window))

    def press(
        self, level: int, nbytes: int = 0, ceiling: float = 0.0, timeout: float | None = 30.0
    ) -> Pressed:
        """Memory is short, or no longer: what a monitor does by itself.

        Parameters
        ----------
        level : int
            0 (low) to 3 (critical). From 1 on nothing is fetched on a guess, and memory that no
            block uses goes back to the system, until it is 0 again.
        nbytes : int
            Bytes of memory that idle blocks are to give up besides, those of the groups first
            whose next use is furthest.
        ceiling : float
            Share in use, 0..1, of the tightest memory of the process from which on the store has
            idle blocks give way before it takes more memory; 0.0: the default, 0.9.
        timeout : float, optional
            Seconds to wait for writes; None: as long as they take.

        Raises
        ------
        ValueError
            No such level, no such share.
        BusyError
            Not all is written yet at the deadline; it goes on.
        """
        return Pressed(*self._press(level, nbytes, ceiling, timeout))

    def events(self, since: int = 0) -> list[Event]:
        """The last events, at most 4096, from number `since` on, oldest first."""
        return [Event(*event) for event in self._events(since)]

    def __repr__(self) -> str:
        return f"<omnimem.Store, host_limit={self._config.host_limit}>"


_open_stores: weakref.WeakSet[Store] = weakref.WeakSet()
_warned = threading.Lock()  # taken once, by whoever warns first, and never given back


def _warn_fallback(reason: str) -> None:
    if _warned.acquire(blocking=False):
        warnings.warn(
            f"omnimem uses threads for I/O, since io_uring is not available: {reason}",
            RuntimeWarning,
            stacklevel=3,
        )


def _close_all(owner: int = os.getpid()) -> None:
    if os.getpid() != owner:
        return
    for store in list(_open_stores):
        store.close()
    _core._collect_last()


atexit.register(_close_all)
