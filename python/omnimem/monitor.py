"""The memory monitor: how much memory is left, how short it is, where it is going, and why."""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Self

from omnimem import _core
from omnimem._explain import explain
from omnimem.alerts import LEVELS, Alert, AlertSystem, Tally, level_of
from omnimem.cache import ModelWeightCache
from omnimem.config import MonitorConfig, format_share, format_size
from omnimem.errors import ClosedError
from omnimem.pools import MemoryPoolManager, PoolStats
from omnimem.pressure import MemoryPressureLevel
from omnimem.store import Store, StoreStats

__all__ = ["MemoryMonitor", "MemoryPressure", "MemoryStats"]

log = logging.getLogger("omnimem.monitor")

_WORDS = {
    MemoryPressureLevel.LOW: "low",
    MemoryPressureLevel.MEDIUM: "warning",
    MemoryPressureLevel.HIGH: "warning",
    MemoryPressureLevel.CRITICAL: "critical",
}


_PATIENCE = 5.0
"""Seconds that stopping waits for the thread to keep its last sample."""


class MemoryPressure(str):
    """How short memory is: equal to "low", "warning" or "critical"."""

    level: MemoryPressureLevel
    """The same in four steps: MEDIUM and HIGH are "warning"."""
    usage: float
    """Share in use, 0..1, of the tightest of the machine and its cgroups; what watched stores
    would give for nothing (`MemoryStats.spare`) is not in use."""
    cause: str
    """Why, in numbers; empty when it is low."""
    seconds_to_exhaustion: float | None
    """Until all is in use if it goes on so; None: unknown, or it does not rise."""

    def __new__(
        cls,
        level: MemoryPressureLevel,
        usage: float,
        cause: str = "",
        seconds_to_exhaustion: float | None = None,
    ) -> Self:
        me = super().__new__(cls, _WORDS[level])
        me.level = level
        me.usage = usage
        me.cause = cause
        me.seconds_to_exhaustion = seconds_to_exhaustion
        return me

    def __getnewargs__(self) -> tuple[Any, ...]:
        return self.level, self.usage, self.cause, self.seconds_to_exhaustion


@dataclass(kw_only=True)
class MemoryStats:
    """Memory at a moment (`MemoryMonitor.get_memory_stats`). Bytes, seconds, shares from 0 to 1."""

    system_memory: tuple[int, int]
    """(total, available) of the tightest of the machine and its cgroups, by share in use."""
    gpu_memory: tuple[int, int] | None = None
    """(total, free) of the fullest GPU; None: there is none."""
    pool_stats: Mapping[str, PoolStats] = field(default_factory=dict)
    """By device, of the pools that the monitor was given."""
    cache_stats: Mapping[str, Any] = field(default_factory=dict)
    """Of the cache that the monitor was given, as its `get_stats` has them. Those in `history` are
    without `access_counts` and `item_count`, which cost more with more entries."""
    timestamp: float = field(default_factory=time.time)
    """Seconds since the epoch."""
    stage: str | None = None
    """What `log_memory_usage` was told; None: it was a sample."""
    level: MemoryPressureLevel = MemoryPressureLevel.LOW
    """How short memory is."""
    usage: float = 0.0
    """Share of `system_memory` in use, without what is `spare`."""
    spare: int = 0
    """Bytes of idle blocks that lie in files too: watched stores give them for nothing."""
    cause: str = ""
    """Why the level is what it is; empty when it is LOW."""
    source: str = "system"
    """What is tightest: "system", or "cgroup DIRECTORY"."""
    rss: int | None = None
    """This process's memory; None: unknown."""
    swap: tuple[int, int] | None = None
    """(total, free) of the machine's swap; None: unknown."""
    psi: tuple[float, float] | None = None
    """Shares of time in which some, and all, tasks waited for memory; None: unknown."""
    store: StoreStats | None = None
    """Tiers and counters of the store that the monitor was given."""
    gpus: tuple[tuple[str, int, int], ...] = ()
    """(name, total, free) of each GPU."""
    trend: str = "stable"
    """Of memory in use: "rising", "falling", "stable" or "oscillating"."""
    slope: float | None = None
    """Bytes a second; None: unknown."""
    seconds_to_exhaustion: float | None = None
    """Until all is in use if it goes on so; None: unknown, or it does not rise."""
    number: int = 0
    """Of the sample."""

    @property
    def pressure(self) -> MemoryPressure:
        """The level as `MemoryMonitor.check_memory_pressure` tells it."""
        return MemoryPressure(self.level, self.usage, self.cause, self.seconds_to_exhaustion)


class MemoryMonitor:
    """Looks at memory, tells how short it is, and has what it watches give memory back in time.

    Pressure is "warning" from `alert_thresholds["warning"]` on (MEDIUM, and halfway to critical
    HIGH), "critical" from `"critical"` on; each level is left 5 points below, and may be entered
    earlier where tasks wait for memory or it will soon be used up. It is measured at the tightest
    of the machine, every memory cgroup of this process, and each GPU.

    Parameters
    ----------
    config : MonitorConfig, optional
    store : Store, optional
        Whose numbers belong to each record, and which gives way under pressure.
    pools : MemoryPoolManager, optional
        The same.
    cache : ModelWeightCache, optional
        The same.

    Attributes
    ----------
    config : MonitorConfig
    history : deque of MemoryStats
        The last `history_size` records: samples while monitoring runs, and `log_memory_usage`.
        While nothing happens records are made several at a time, and when somebody looks here:
        the numbers of pools, cache and store are of then.
    alerts : AlertSystem
        Callbacks for rising pressure.

    Notes
    -----
    A context manager that starts and stops monitoring, and closes. Any method may be called from
    any thread. Asking needs no `start_monitoring`: each question then takes a sample. After a
    fork the child's questions raise `ClosedError`. One that is dropped, or left at exit, stops.
    """

    def __init__(
        self,
        config: MonitorConfig | None = None,
        *,
        store: Store | None = None,
        pools: MemoryPoolManager | None = None,
        cache: ModelWeightCache | None = None,
    ) -> None:
        self.config = MonitorConfig() if config is None else config
        if not isinstance(self.config, MonitorConfig):
            raise TypeError(f"config must be a MonitorConfig, not {type(config).__name__}")
        self._history: deque[MemoryStats] = deque(maxlen=self.config.history_size)
        self._kept = 0
        """The last sample that is in `history`."""
        self._keeping = threading.Lock()  # who adds to it does; nobody waits for it
        self.alerts = AlertSystem()
        self._core = _core.Monitor(self._thresholds(), self.config.monitoring_interval)
        self._store = store if store is not None or cache is None else cache.store
        self._pools = pools
        self._cache = cache
        self._end = weakref.finalize(self, _end, self._core, self.alerts._tally, os.getpid())
        others = () if cache is None else (cache.store,)
        stores = {id(each): each for each in (store, *others) if each is not None}
        for watched in stores.values():
            self._core.watch(watched)
        if pools is not None:
            self._core.watch_pools(pools)
        _open_monitors.add(self)

    # -- running ---------------------------------------------------------------------------------

    def start_monitoring(self) -> None:
        """Begin to look by itself, to fill `history` and to call alerts. Idempotent.

        Raises
        ------
        ClosedError
            The monitor is closed.
        """
        if not self.config.enable_monitoring:
            log.debug("monitoring is off: enable_monitoring is False; asking still works")
            return
        self._core.start()
        thread = threading.Thread(
            target=_watch, args=(self._core, weakref.ref(self)), name="omnimem-alerts", daemon=True
        )
        if self.__dict__.setdefault("_running", thread) is not thread:
            return
        try:
            thread.start()
        except BaseException:
            self.__dict__.pop("_running", None)
            self._core.stop()
            raise

    def stop_monitoring(self) -> None:
        """Stop looking. Idempotent. Callbacks that run are waited for half a second at most."""
        thread = self.__dict__.pop("_running", None)
        if thread is None:
            return
        with suppress(ClosedError):
            self._core.stop()
        if thread.ident is not None and thread is not threading.current_thread():
            thread.join(_PATIENCE)
        self._keep()
        self.alerts._wait()

    @property
    def running(self) -> bool:
        """Whether it looks by itself."""
        return "_running" in self.__dict__

    def close(self) -> None:
        """Stop, and let go of what is watched. Idempotent. `history` stays."""
        self.stop_monitoring()
        self._end()

    def __enter__(self) -> Self:
        self.start_monitoring()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- asking ----------------------------------------------------------------------------------

    @property
    def history(self) -> deque[MemoryStats]:
        """The last `history_size` records, the oldest first."""
        self._keep()
        return self._history

    def get_memory_stats(self) -> MemoryStats:
        """Take a sample, and tell all numbers.

        Raises
        ------
        ClosedError
            The monitor is closed, or belongs to the process that forked this one.
        """
        return self._record(self._core.sample(), self._parts(whole=True))

    def check_memory_pressure(self) -> MemoryPressure:
        """How short memory is: "low", "warning" or "critical".

        While monitoring runs, by its last sample, which is `monitoring_interval` old at most.
        """
        return _pressure(self._report())

    def log_memory_usage(self, stage: str) -> MemoryStats:
        """Take a sample, keep it in `history` under a name, and log a line of it.

        Parameters
        ----------
        stage : str
            What the program does now, such as "after loading".

        Returns
        -------
        MemoryStats
            The record. The line goes to the logger "omnimem.monitor" as INFO, with the fields
            `stage`, `pressure`, `usage`, `total_bytes`, `available_bytes` and `rss_bytes`.
        """
        report = self._core.sample()
        self._keep()
        stats = self._record(report, self._parts(), stage)
        self._history.append(stats)
        total, available = stats.system_memory
        rss = "" if stats.rss is None else f", this process {format_size(stats.rss)}"
        log.info(
            "%s: %s of %s in use (%s), %s available%s, pressure %s",
            stage,
            format_share(stats.usage),
            format_size(total),
            stats.source,
            format_size(available),
            rss,
            stats.pressure,
            extra={
                "stage": stage,
                "pressure": str(stats.pressure),
                "usage": stats.usage,
                "total_bytes": total,
                "available_bytes": available,
                "rss_bytes": stats.rss,
            },
        )
        return stats

    def get_history(self, limit: int = 100) -> list[MemoryStats]:
        """The last records, at most `limit`, the oldest first.

        Raises
        ------
        ValueError
            A negative limit.
        """
        if limit < 0:
            raise ValueError(f"limit={limit!r} must be at least 0")
        return list(self.history)[-limit:] if limit else []

    def wait_for_level(
        self, level: str | MemoryPressureLevel, timeout: float | None = None
    ) -> bool:
        """Wait until memory is as short as that or shorter; for LOW, until it is short no more.

        Parameters
        ----------
        level : str or MemoryPressureLevel
            "low", "warning" (MEDIUM), "critical", or any level.
        timeout : float, optional
            Seconds; None: for ever. Ctrl-C ends it.

        Returns
        -------
        bool
            False at the deadline.

        Raises
        ------
        ClosedError
            The monitor is closed, also meanwhile.
        """
        rank = LEVELS.index(level_of(level))
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            report = self._report()
            if report["level"] >= rank if rank else report["level"] == 0:
                return True
            pause = float(self.config.monitoring_interval)
            if deadline is not None:
                pause = min(pause, deadline - time.monotonic())
            if pause <= 0:
                return False
            self._core.wait(report["number"], None, pause)

    def explain(self) -> str:
        """Why the monitor acted, or why not: a sentence, and a table of who holds what.

        Returns
        -------
        str
            Plain text, as wide as the terminal.
        """
        report = self._core.sample()
        return explain(
            report,
            self._record(report, self._parts()),
            self._store,
            self._core.actions(),
            self._thresholds(),
        )

    def __repr__(self) -> str:
        state = "closed" if not self._end.alive else "running" if self.running else "stopped"
        return f"<omnimem.MemoryMonitor, {state}, {len(self._history)} records>"

    # -- parts -----------------------------------------------------------------------------------

    def _thresholds(self) -> tuple[float, float, float]:
        warning, critical = (self.config.alert_thresholds[k] for k in ("warning", "critical"))
        return warning, (warning + critical) / 2, critical

    def _owned(self) -> bool:
        """Whether this thread is the one that monitoring runs on."""
        return self.__dict__.get("_running") is threading.current_thread()

    def _report(self) -> dict[str, Any]:
        return self._core.report() if self.running else self._core.sample()

    def _record(
        self, report: dict[str, Any], parts: dict[str, Any], stage: str | None = None
    ) -> MemoryStats:
        gpus = [(total, free) for _, _, _, total, free, *_ in report["gpus"] if total]
        return MemoryStats(
            system_memory=(report["total"], report["available"]),
            gpu_memory=min(gpus, key=lambda gpu: gpu[1] / gpu[0], default=None),
            **parts,
            timestamp=report["wall"],
            stage=stage,
            level=LEVELS[report["level"]],
            usage=report["usage"],
            spare=report["spare"],
            cause=report["cause"],
            source=report["source"],
            rss=report["rss"],
            swap=report["swap"],
            psi=report["psi"],
            gpus=tuple((name, total, free) for _, _, name, total, free, *_ in report["gpus"]),
            trend=report["trend"],
            slope=report["slope"],
            seconds_to_exhaustion=report["seconds_to_exhaustion"],
            number=report["number"],
        )

    def _parts(self, whole: bool = False) -> dict[str, Any]:
        """The numbers of a record that are not the core's."""
        return {
            "pool_stats": self._pool_stats(),
            "cache_stats": self._cache_stats(whole),
            "store": self._store_stats(),
        }

    def _store_stats(self) -> StoreStats | None:
        try:
            return None if self._store is None else self._store.stats()
        except ClosedError:
            return None

    def _pool_stats(self) -> dict[str, PoolStats]:
        pools = self._pools
        try:
            return {} if pools is None else {d: pools.get_pool_stats(d) for d in pools.pools}
        except ClosedError:
            return {}

    def _cache_stats(self, whole: bool) -> dict[str, Any]:
        if self._cache is None:
            return {}
        return self._cache.get_stats() if whole else self._cache._figures()

    def _keep(self) -> None:
        """Have `history` know of all samples that monitoring took."""
        if not self._keeping.acquire(blocking=False):
            return
        try:
            reports = self._core.recent(self._kept)
            parts = self._parts() if reports else {}
            for report in reports:
                self._kept = report["number"]
                self._history.append(self._record(report, parts))
        except ClosedError:
            pass  # what there was is there
        finally:
            self._keeping.release()

    def _notice(self) -> None:
        """Keep what monitoring saw, and have alerts called that it raises."""
        report = self._core.report()
        self._keep()
        risen = self.alerts._see(report["level"], report["transitions"])
        if risen:
            former, level = (LEVELS[rank] for rank in risen)
            stats = self._record(report, self._parts())
            text = _suggest(stats)
            self.alerts._tell(Alert(level, former, stats.pressure, stats, text))


_open_monitors: weakref.WeakSet[MemoryMonitor] = weakref.WeakSet()
_closed: Counter[tuple[str, Any]] = Counter()
"""What monitors that are closed had counted: for totals of the process."""


def _counted(core: _core.Monitor, tally: Tally) -> Counter[tuple[str, Any]]:
    """What a monitor has counted so far; empty when it is closed."""
    try:
        report = core.report()
    except ClosedError:
        return Counter()
    counted: Counter[tuple[str, Any]] = Counter(
        {("transitions", level): count for level, count in report["transitions"].items()}
    )
    counted["overhead", None] = report["overhead_seconds"]
    counted["calls", None] = tally.calls
    counted["failures", None] = tally.failures
    return counted


def _end(core: _core.Monitor, tally: Tally, owner: int) -> None:
    if os.getpid() == owner:
        _closed.update(_counted(core, tally))
        core.close()


def _watch(core: _core.Monitor, monitor_of: weakref.ref[MemoryMonitor]) -> None:
    """Be the thread of a monitor: it holds none, so that one that is dropped goes."""
    stirs = 0
    while True:
        stirs = core.follow(stirs)
        monitor = monitor_of()
        if stirs < 0 or monitor is None or not monitor._owned():
            return
        try:
            monitor._notice()
        except ClosedError:
            return
        except Exception:
            log.exception("the monitor could not keep a sample; it goes on with the next")
        del monitor


def _pressure(report: dict[str, Any]) -> MemoryPressure:
    return MemoryPressure(
        LEVELS[report["level"]], report["usage"], report["cause"], report["seconds_to_exhaustion"]
    )


def _suggest(stats: MemoryStats) -> str:
    """What would help most."""
    total, available = stats.system_memory
    used = total - available
    ours = stats.store.host.used_bytes if stats.store else 0
    ours += sum(pool.reserved_size for pool in stats.pool_stats.values())
    process = stats.rss or 0
    if 2 * process < used:
        return (
            f"other processes hold {format_size(max(used - process, 0))} of "
            f"{format_size(used)} in use: stop some of them, or raise the limit of {stats.source}"
        )
    if 2 * ours < process:
        return (
            f"{format_size(process - ours)} of this process's {format_size(process)} lie outside "
            "omnimem: keep fewer tensors, or put them into a store, which can move them out"
        )
    return (
        f"omnimem holds {format_size(ours)}: let leases and views go that are not needed, close "
        "models and caches that are idle, or lower host_limit"
    )
